"""The image for CPUs: really built from the Dockerfile, and trained in by a user without rights.

launch/test.sh -m image tests/e2e/test_image.py        10 minutes or so
"""

import json
import re

import image
import pytest
from conftest import REPOSITORY

BASE, TAG = "hvdtrain-test-base", "hvdtrain-test"
pytestmark = [pytest.mark.image, pytest.mark.alone]


@pytest.fixture(scope="module")
def container(request):
    if "image" not in request.config.getoption("-m"):
        pytest.skip("builds an image for several minutes: ask for it with -m image")
    reason = image.why_not()
    if reason:
        pytest.skip(reason)
    image.make_base(BASE, image.cache())
    image.build(TAG, REPOSITORY, BASE_IMAGE=BASE)
    with image.Container(TAG) as container:
        yield container


def test_what_the_image_says_of_itself(container):
    config = json.loads(image.do("inspect", "--type", "image", TAG).stdout)["Docker"]["config"]
    assert config["User"] == "hvdtrain"
    assert config["Cmd"] == ["/opt/hvdtrain/launch/local.sh"]
    assert config["Labels"]["org.opencontainers.image.licenses"] == "Apache-2.0"
    healthy = container.run(*config["Healthcheck"]["Test"][1:])
    assert healthy.returncode == 0, healthy.stderr
    assert "Apache License" in container.run("cat", "/opt/hvdtrain/LICENSE").stdout
    built = container.run("horovodrun", "--check-build")
    assert re.search(r"\[X\] PyTorch[\s\S]*\[X\] MPI\s+\[X\] Gloo", built.stdout), built.stdout + built.stderr
    assert container.run("sh", "-c", "command -v nvcc cmake make").returncode != 0


@pytest.mark.parametrize("launcher", ["mpirun --oversubscribe", "horovodrun", "horovodrun --gloo"])
def test_two_ranks_train_as_a_user_without_rights(container, launcher):
    train = f"{launcher} -np 2 python -m hvdtrain train lm --data.path /opt/hvdtrain/hvdtrain --data.sequence-length 64"
    done = container.run(
        "sh", "-c", f"id -u && cd && {train} --train.steps 5 --optim.warmup-steps 0 --run-dir runs/{launcher[-4:]}"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("1000\n")
    assert "on 2 ranks, 1 host" in done.stdout
    assert "finished in" in done.stdout


def test_the_size_is_the_one_that_is_stated(container):
    size = image.do("images", "--format", "{{.Size}}", TAG).stdout.split()
    stated = re.search(r"the CPU image \(([\d.]+) GB", (REPOSITORY / "Dockerfile").read_text())
    assert size[1] == "GB"
    assert float(size[0]) == pytest.approx(float(stated[1]), rel=0.05)


TRAIN = ["python", "-m", "hvdtrain", "train", "lm", "--data.path", "/opt/hvdtrain/hvdtrain", "--train.steps", "3"]
SMALL = ["--data.sequence-length", "64", "--optim.warmup-steps", "0", "--run-dir", "/tmp/runs/any"]


def test_any_user_in_a_root_that_can_be_written(container):
    launched = ["mpirun", "--oversubscribe", "-np", "2", *TRAIN, *SMALL]
    done = container.run(*launched, options=["--user", "12345", "--env", "HOME=/"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished in" in done.stdout


@pytest.mark.parametrize("launcher", ["mpirun --oversubscribe", "horovodrun", "horovodrun --gloo"])
def test_any_user_with_nothing_to_write_to_but_tmp(container, launcher):
    """`docker run --read-only --tmpfs /tmp --user 12345`: runs and caches go to /tmp; nobody has a name."""
    done = container.run_read_only(*launcher.split(), "-np", "2", *TRAIN, *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished in" in done.stdout
    refused = container.run_read_only("/opt/hvdtrain/launch/local.sh", "1", *TRAIN[3:])
    assert refused.returncode == 2, refused.stdout + refused.stderr
    assert "Traceback" not in refused.stdout + refused.stderr
    assert "--run-dir" in refused.stderr
    config = json.loads(image.do("inspect", "--type", "image", TAG).stdout)["Docker"]["config"]
    assert container.run_read_only(*config["Healthcheck"]["Test"][1:]).returncode == 0


def test_the_default_command_trains_the_default_recipe(container):
    done = container.run("timeout", "--signal=TERM", "120", "/opt/hvdtrain/launch/local.sh")
    assert "+ horovodrun -np" in done.stdout, done.stdout + done.stderr
    assert "setup:" not in done.stdout
    assert "lm on" in done.stdout


def test_a_worker_of_an_mpijob_starts_its_sshd(container):
    script = (
        "ssh-keygen -q -t ed25519 -N '' -f ~/.ssh/id_rsa && cp ~/.ssh/id_rsa.pub ~/.ssh/authorized_keys &&"
        " (/usr/sbin/sshd -De -f ~/.sshd_config & echo $! > ~/pid; sleep 1; ssh localhost command -v mpirun; code=$?;"
        " kill $(cat ~/pid); exit $code)"
    )
    done = container.run("bash", "-c", script, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/opt/hvdtrain/.venv/bin/mpirun" in done.stdout
