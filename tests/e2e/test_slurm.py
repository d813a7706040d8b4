"""A real Slurm job: trained, signalled, saved, put back into the queue, finished."""

import json
import os
import subprocess
import sys
import time

import pytest
import slurm
import torch
from conftest import BIN, LAUNCHERS, REPOSITORY, environment
from patience import wait_for
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


TRAINING = ["train", RECIPE, "--train.steps", STEPS]
SLOWLY = ["--pause", "0.02"]


def weights(run_dir):
    return load_file(run_dir / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    command = [*LAUNCHERS["mpirun"][:-1], 2, sys.executable, "-m", "hvdtrain", *TRAINING, "--run-dir", run_dir]
    done = subprocess.run([str(word) for word in command], env=environment(), capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return weights(run_dir)


class Job:
    """A job of two ranks on one or two nodes, as slurm.sbatch starts it."""

    def __init__(self, cluster, folder, nodes, launcher):
        self.cluster, self.output, self.run_dir = cluster, folder / f"{launcher}.out", folder / launcher
        given = {
            "HOME": "/root",
            "PATH": cluster.environ["PATH"],
            "VIRTUAL_ENV": str(BIN.parent),
            "HVDTRAIN_ROOT": str(REPOSITORY),
            "HVDTRAIN_RUN_DIR": str(self.run_dir),
            "HVDTRAIN_LAUNCHER": launcher,
            # Both nodes are this machine: ranks on different ones must not look for each other's shared memory.
            "OMPI_MCA_btl": "tcp,self",
        }
        self.number = cluster.do(
            *("sbatch", "--parsable", f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}"),
            *(f"--output={self.output}", "--time=5", f"--export={','.join(given)}"),
            *(REPOSITORY / "launch" / "slurm.sbatch", *TRAINING, *SLOWLY),
            **given,
        ).strip()

    def said(self, text):
        return self.output.exists() and text in self.output.read_text()

    def show(self):
        """Return what the job and Slurm say."""
        said = self.output.read_text() if self.output.exists() else "no output yet"
        log = (self.cluster.folder / "slurmctld.log").read_text()[-3000:]
        return "\n".join((said, *(self.cluster.do("scontrol", "show", what) for what in ("job", "node")), log))

    def is_waiting(self):
        state = self.cluster.do("squeue", "-h", f"--jobs={self.number}", "-o", "%T %r", check=False)
        return "PENDING BeginTime" in state


@pytest.mark.slurm
def test_a_job_is_requeued_and_loses_nothing(cluster, uninterrupted, tmp_path):
    """With either launcher; both jobs run at once, since most of their time is spent on waiting for Slurm."""
    jobs = [Job(cluster, tmp_path, 1, "mpirun"), Job(cluster, tmp_path, 2, "srun")]
    waiting = list(jobs)
    deadline = time.monotonic() + 120
    while waiting:
        for job in [job for job in waiting if job.said("step  50/")]:
            cluster.do("scancel", "--batch", "--signal=USR1", job.number)
            waiting.remove(job)
        assert time.monotonic() < deadline, waiting[0].show()
        time.sleep(0.2)
    for job in jobs:
        wait_for(lambda job=job: job.said("back into the queue (restart 1)"), 90, job.show)
        assert "on request (SIGUSR1, rank" in job.output.read_text()
        # Slurm lets a job that was put back wait for two minutes. An administrator may shorten that, though not to
        # nothing: a node refuses the job in the second in which it has ended.
        wait_for(job.is_waiting, 90, job.show)
    time.sleep(3)
    for job in jobs:
        cluster.do("scontrol", "update", f"JobId={job.number}", "StartTime=now")
    for job, command in zip(jobs, ("mpirun -np 2", "srun --mpi=pmix"), strict=True):
        wait_for(lambda job=job: job.said("finished in"), 120, job.show)
        assert job.output.read_text().count(f"+ {command}") == 2, job.show()
        torch.testing.assert_close(weights(job.run_dir), uninterrupted, rtol=0, atol=0)


@pytest.mark.slurm
def test_ranks_of_this_machine_in_a_shell_of_slurm(cluster):
    """As in `srun --pty bash`, a step of one task."""
    environ = {**environment(), **cluster.environ, "PATH": f"{BIN}{os.pathsep}{cluster.environ['PATH']}"}
    command = ["srun", "-N1", "-n1", sys.executable, "-m", "hvdtrain", "-np", "2", "--version"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("hvdtrain 0.") == 2, done.stdout


@pytest.mark.slurm
def test_each_trial_of_a_sweep_is_a_task_of_an_array(cluster, tmp_path):
    """The job file gives each task a run of its own, `sweep` submits it and reads what has come of it."""
    given = {
        "HOME": "/root",
        "PATH": f"{BIN}{os.pathsep}{cluster.environ['PATH']}",
        "VIRTUAL_ENV": str(BIN.parent),
        "HVDTRAIN_ROOT": str(REPOSITORY),
    }
    # Held, so that they wait until the second `sweep` has looked, however long it takes.
    options = f"--hold --ntasks-per-node=1 --output={tmp_path}/%a.out --time=5"
    options += f" --export={','.join(given)},HVDTRAIN_RUN_DIR"
    command = [sys.executable, "-m", "hvdtrain", "sweep", RECIPE, "--train.seed", "1,2", "--train.steps", "5"]
    command += ["--run-dir", tmp_path / "s", "--slurm", f"--sbatch={options}"]
    command += ["--slurm-file", REPOSITORY / "launch" / "slurm.sbatch"]

    def sweep():
        environ = {**environment(), **cluster.environ, **given}
        words = [str(word) for word in command]
        done = subprocess.run(words, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def show():
        return "\n".join(path.read_text() for path in tmp_path.glob("*.out"))

    assert "submitted 2 trials as array" in (said := sweep()), said
    job = json.loads((tmp_path / "s" / "sweep.json").read_text())["slurm_job"]
    assert f"of array {job} wait or run: nothing was submitted" in (said := sweep()), said
    cluster.do("scontrol", "release", str(job))
    wait_for(lambda: not cluster.do("squeue", "-h", f"--jobs={job}", check=False).strip(), 120, show)
    for trial in "01":
        assert "finished in" in (tmp_path / f"{trial}.out").read_text(), show()
        assert f"seed = {int(trial) + 1}\n" in (tmp_path / "s" / f"trial-{trial}" / "config.toml").read_text()
    assert "2 trials: 2 finished" in (said := sweep()), said
