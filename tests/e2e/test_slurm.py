"""A real Slurm job: trained, signalled, saved, put back into the queue, finished."""

import subprocess
import sys
import time

import pytest
import slurm
import torch
from conftest import BIN, LAUNCHERS, REPOSITORY, environment
from safetensors.torch import load_file

pytestmark = pytest.mark.beside

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


TRAINING = ["train", RECIPE, "--train.steps", STEPS, "--pause", "0.02"]


def weights(run_dir):
    return load_file(run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    command = [*LAUNCHERS["mpirun"][:-1], 2, sys.executable, "-m", "hvdtrain", *TRAINING, "--run-dir", run_dir]
    done = subprocess.run([str(word) for word in command], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(run_dir)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("nodes", "launcher", "command"),
    [(1, "mpirun", "mpirun -np 2"), (2, "srun", "srun --mpi=pmix")],
    ids=["mpirun", "two-nodes-srun"],
)
def test_a_job_is_requeued_and_loses_nothing(cluster, uninterrupted, tmp_path, nodes, launcher, command):
    output, run_dir = tmp_path / "job.out", tmp_path / "job"
    given = {
        "HOME": "/root",
        "PATH": cluster.environ["PATH"],
        "VIRTUAL_ENV": str(BIN.parent),
        "HVDTRAIN_ROOT": str(REPOSITORY),
        "HVDTRAIN_RUN_DIR": str(run_dir),
        "HVDTRAIN_LAUNCHER": launcher,
        # Both nodes are this machine: ranks on different ones must not look for each other's shared memory.
        "OMPI_MCA_btl": "tcp,self",
    }
    answer = cluster.do(
        *("sbatch", "--parsable", f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", f"--output={output}"),
        *("--time=5", f"--export={','.join(given)}", REPOSITORY / "launch" / "slurm.sbatch", *TRAINING),
        **given,
    )
    job = answer.strip()

    def said(text):
        return output.exists() and text in output.read_text()

    def show():
        """Return what the job and Slurm say."""
        said = output.read_text() if output.exists() else "no output yet"
        log = (cluster.folder / "slurmctld.log").read_text()[-3000:]
        return "\n".join((said, *(cluster.do("scontrol", "show", what) for what in ("job", "node")), log))

    def is_waiting():
        return "PENDING BeginTime" in cluster.do("squeue", "-h", f"--jobs={job}", "-o", "%T %r", check=False)

    wait_for(lambda: said("step  50/"), 90, show)
    cluster.do("scancel", "--batch", "--signal=USR1", job)
    wait_for(lambda: said("back into the queue (restart 1)"), 90, show)
    assert "on request (SIGUSR1, rank" in output.read_text()
    # Slurm lets a job that was put back wait for two minutes. An administrator may shorten that, though not to nothing:
    # a node refuses the job in the second in which it has ended.
    wait_for(is_waiting, 90, show)
    time.sleep(3)
    cluster.do("scontrol", "update", f"JobId={job}", "StartTime=now")
    wait_for(lambda: said("finished in"), 120, show)
    assert output.read_text().count(f"+ {command}") == 2, show()
    ours = weights(run_dir)
    torch.testing.assert_close(ours, uninterrupted, rtol=0, atol=0)


@pytest.mark.slurm
def test_each_task_of_an_array_is_a_run_of_its_own(cluster, tmp_path):
    given = {
        "HOME": "/root",
        "PATH": cluster.environ["PATH"],
        "VIRTUAL_ENV": str(BIN.parent),
        "HVDTRAIN_ROOT": str(REPOSITORY),
        "HVDTRAIN_RUN_DIR": str(tmp_path / "run"),
    }
    short = ["train", RECIPE, "--train.steps", "5", "--train.seed", "%a"]
    job = cluster.do(
        *("sbatch", "--parsable", "--array=1,2", "--ntasks-per-node=1", f"--output={tmp_path}/%a.out", "--time=5"),
        *(f"--export={','.join(given)}", REPOSITORY / "launch" / "slurm.sbatch", *short),
        **given,
    ).strip()

    def show():
        return "\n".join(path.read_text() for path in tmp_path.glob("*.out"))

    wait_for(lambda: not cluster.do("squeue", "-h", f"--jobs={job}", check=False).strip(), 120, show)
    for task in "12":
        assert "finished in" in (tmp_path / f"{task}.out").read_text(), show()
        assert f"seed = {task}\n" in (tmp_path / f"run-{task}" / "config.toml").read_text()
