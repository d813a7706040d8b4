"""Two hosts with their own names, addresses and sshd: training across them is training on one."""

import shutil
import sys

import hosts
import pytest
import torch
import yaml
from conftest import BIN, REPOSITORY, environment
from safetensors.torch import load_file

pytestmark = pytest.mark.beside

RECIPE = REPOSITORY / "tests" / "support" / "faulty_recipe.py"
STEPS = 20
TRAIN = [sys.executable, "-m", "hvdtrain", "train", RECIPE, "--train.steps", STEPS, "--run-dir"]

# Two ranks a host once: starting ranks is what these tests take their time for. The others have one a host.
LAUNCHERS = {
    "horovodrun-mpi": (["horovodrun", "--mpi", "-np", "4", "-H", "node1:2,node2:2"], 4),
    "horovodrun-gloo": (["horovodrun", "--gloo", "-np", "2", "-H", "node1:1,node2:1"], 2),
}


@pytest.fixture(scope="module")
def two_hosts():
    reason = hosts.why_not()
    if reason:
        pytest.skip(reason)
    with hosts.Hosts(2, path=f"{BIN}:/usr/local/bin:/usr/bin:/bin") as cluster:
        yield cluster


@pytest.fixture(scope="module")
def variables():
    root = {name: value for name, value in environment().items() if name.startswith("OMPI_ALLOW_RUN_AS_ROOT")}
    return {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", **root}


def weights(run_dir):
    return load_file(run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.fixture(scope="module")
def on_one_host(two_hosts, variables, tmp_path_factory):
    """What one rank trains."""
    run_dir = tmp_path_factory.mktemp("one-host") / "run"
    done = two_hosts.do("node1", [*TRAIN, run_dir], timeout=120, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(run_dir)


@pytest.mark.hosts
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_hosts_train_what_one_does(two_hosts, on_one_host, variables, tmp_path, launcher):
    command, ranks = LAUNCHERS[launcher]
    done = two_hosts.do("node1", [*command, *TRAIN, tmp_path / "run"], timeout=150, **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"on {ranks} ranks, 2 hosts" in done.stdout
    assert_close(weights(tmp_path / "run"), on_one_host)


@pytest.mark.hosts
def test_the_launch_file_for_several_hosts(two_hosts, on_one_host, variables, tmp_path):
    assert shutil.which("setsid")
    script = [REPOSITORY / "launch" / "mpirun.sh", "train", RECIPE, "--train.steps", STEPS]
    site = {
        "VIRTUAL_ENV": BIN.parent,
        "HVDTRAIN_HOSTS": "node1:1,node2:1",
        "HVDTRAIN_INTERFACE": "eth0",
        "HVDTRAIN_RUN_DIR": tmp_path / "run",
    }
    done = two_hosts.do("node1", script, timeout=150, **variables, **site)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "on 2 ranks, 2 hosts" in done.stdout
    assert_close(weights(tmp_path / "run"), on_one_host)


@pytest.mark.hosts
def test_the_launcher_of_the_mpijob_reaches_the_workers(two_hosts, on_one_host, variables, tmp_path):
    """Its command, with the variables that the operator sets and a host file as the operator writes it."""
    job = yaml.safe_load((REPOSITORY / "launch" / "mpijob.yaml").read_text())
    (container,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    (tmp_path / "hostfile").write_text("".join(f"{hosts.long_name(name)} slots=1\n" for name in two_hosts.names))
    of_operator = {
        "OMPI_MCA_orte_keep_fqdn_hostnames": "true",
        "OMPI_MCA_orte_default_hostfile": tmp_path / "hostfile",
        "OMPI_MCA_plm_rsh_args": "-o ConnectionAttempts=10",
    }
    (script,) = container["args"]
    script = script.replace("train lm --run-dir /runs/lm", f"{' '.join(map(str, TRAIN[3:]))} {tmp_path / 'run'}")
    words = [*container["command"], script]
    done = two_hosts.do("node1", words, timeout=150, **variables, **of_operator)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "on 2 ranks, 2 hosts" in done.stdout
    assert_close(weights(tmp_path / "run"), on_one_host)
