"""A real Slurm job: trained, signalled, saved, put back into the queue, finished."""

import time

import pytest
import slurm
import torch
from conftest import BIN, REPOSITORY, environment
from safetensors.torch import load_file

RECIPE = REPOSITORY / "tests" / "support" / "faulty_recipe.py"
STEPS = 150


@pytest.fixture(scope="module")
def cluster():
    reason = slurm.why_not()
    if reason:
        pytest.skip(reason)
    with slurm.Slurm() as cluster:
        yield cluster


def wait_for(condition, seconds, what):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.3)


@pytest.mark.slurm
def test_a_job_is_requeued_and_loses_nothing(cluster, hvdtrain, tmp_path):
    output, run_dir = tmp_path / "job.out", tmp_path / "job"
    training = ["train", RECIPE, "--train.steps", STEPS, "--pause", "0.02"]
    variables = environment(
        HVDTRAIN_ROOT=str(REPOSITORY), HVDTRAIN_RUN_DIR=str(run_dir), VIRTUAL_ENV=str(BIN.parent), **cluster.environ
    )
    exported = [f"{name}={variables[name]}" for name in ("HVDTRAIN_ROOT", "HVDTRAIN_RUN_DIR", "VIRTUAL_ENV", "PATH")]
    answer = cluster.do(
        *("sbatch", "--parsable", f"--output={output}", "--time=5", f"--export=HOME=/root,{','.join(exported)}"),
        *(REPOSITORY / "launch" / "slurm.sbatch", *training),
    )
    job = answer.strip()

    def said(text):
        return output.exists() and text in output.read_text()

    def show():
        return output.read_text() if output.exists() else cluster.do("scontrol", "show", "job", job)

    def ask_again():
        """Slurm lets a job that was put back wait for two minutes; an administrator may shorten that, as done here."""
        cluster.do("scontrol", "update", f"JobId={job}", "StartTime=now", check=False)
        return said("finished in")

    wait_for(lambda: said("step  50/"), 90, show)
    cluster.do("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: said("back into the queue (restart 1)"), 90, show)
    assert "on request (SIGUSR1, rank" in output.read_text()
    wait_for(ask_again, 240, show)
    assert output.read_text().count("mpirun -np 2") == 2
    whole = hvdtrain(*training[:-2], "--pause", "0.02", "--run-dir", tmp_path / "whole", launcher="mpirun", ranks=2)
    assert whole.code == 0, whole.text
    name = f"checkpoints/step-{STEPS:08d}/model.safetensors"
    ours, theirs = load_file(run_dir / name), load_file(tmp_path / "whole" / name)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
