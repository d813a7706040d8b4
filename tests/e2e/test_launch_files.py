"""The files in `launch/` that start a run on a cluster, as far as one machine can try them."""

import os
import signal

import pytest
import yaml
from conftest import BIN, REPOSITORY
from patience import wait_for

pytestmark = pytest.mark.alone

RECIPE = REPOSITORY / "tests" / "support" / "faulty_recipe.py"
LONG = ["train", RECIPE, "--train.steps", "100000", "--pause", "0.02"]
SHORT = ["train", RECIPE, "--train.steps", "20"]


@pytest.fixture
def site(tmp_path):
    """Variables that point the launch files to this environment and to a run directory of the test's own."""
    return {"VIRTUAL_ENV": str(BIN.parent), "HVDTRAIN_RUN_DIR": str(tmp_path / "run")}


def wait_for_training(run_dir):
    log = run_dir / "metrics.jsonl"
    wait_for(lambda: log.exists() and '"step": 4' in log.read_text(), what="it does not train")


def finished(run_dir):
    return (run_dir / "metrics.jsonl").exists() and '"event": "finished"' in (run_dir / "metrics.jsonl").read_text()


@pytest.mark.parametrize(
    ("script", "number", "more"),
    [
        ("mpirun.sh", signal.SIGTERM, {}),
        ("horovodrun.sh", signal.SIGINT, {"HVDTRAIN_CONTROLLER": "--gloo"}),
        ("horovodrun.sh", signal.SIGUSR1, {"HVDTRAIN_CONTROLLER": "--mpi"}),
    ],
    ids=["mpirun", "horovodrun-gloo", "horovodrun-mpi"],
)
def test_a_signal_saves_and_the_same_command_goes_on(run, start, tmp_path, site, script, number, more):
    process = start(REPOSITORY / "launch" / script, *LONG, **site, **more)
    wait_for_training(tmp_path / "run")
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert out.startswith("+ ")  # the plain command
    assert "on request" in out
    step = int((tmp_path / "run" / "checkpoints" / "latest").read_text().strip().removeprefix("step-"))
    if script != "mpirun.sh":  # what a run goes on with is the same for all
        return
    done = run(
        *(REPOSITORY / "launch" / script, "train", RECIPE, "--train.steps", step + 5, "--pause", "0.02"), **site, **more
    )
    assert done.code == 0, done.text
    assert finished(tmp_path / "run")


def test_lsf_with_the_variables_that_it_sets(start, tmp_path, site):
    lsf = {"LSB_JOBID": "7", "LS_SUBCWD": str(REPOSITORY), "LSB_MCPU_HOSTS": "localhost 2"}
    arguments = " ".join(map(str, LONG))
    process = start(REPOSITORY / "launch" / "lsf.sh", HVDTRAIN_ARGUMENTS=arguments, **lsf, **site)
    wait_for_training(tmp_path / "run")
    os.kill(process.pid, signal.SIGUSR1)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 75, out
    assert "on request (SIGUSR1, rank" in out


ARRAYS = {
    "lsf.sh": ("LSB_JOBINDEX", {"LSB_JOBID": "7", "LS_SUBCWD": str(REPOSITORY), "LSB_MCPU_HOSTS": "localhost 1"}),
    "pbs.sh": ("PBS_ARRAY_INDEX", {"PBS_O_WORKDIR": str(REPOSITORY), "PBS_NODEFILE": "nodes"}),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_each_task_of_an_array_is_a_run_of_its_own(run, tmp_path, name):
    index, variables = ARRAYS[name]
    (tmp_path / "nodes").write_text("localhost\n")
    if "PBS_NODEFILE" in variables:
        variables = {**variables, "PBS_NODEFILE": str(tmp_path / "nodes")}
    site = {"VIRTUAL_ENV": str(BIN.parent), "HVDTRAIN_RUN_DIR": str(tmp_path / "run")}
    arguments = " ".join(map(str, [*SHORT, "--train.seed", "%a"]))
    done = run(REPOSITORY / "launch" / name, HVDTRAIN_ARGUMENTS=arguments, **variables, **site, **{index: "3"})
    assert done.code == 0, done.text
    assert finished(tmp_path / "run-3")
    assert "seed = 3\n" in (tmp_path / "run-3" / "config.toml").read_text()


def test_pbs_submits_its_continuation_when_the_time_is_used_up(run, tmp_path, site):
    """With the variables that PBS sets, and a qsub that writes down what it is given."""
    (tmp_path / "nodes").write_text("localhost\nlocalhost\n")
    (tmp_path / "qsub").write_text('#!/bin/sh\necho "$@" >> submitted\n')
    (tmp_path / "qsub").chmod(0o755)
    pbs = {"PBS_O_WORKDIR": str(REPOSITORY), "PBS_NODEFILE": str(tmp_path / "nodes")}
    (tmp_path / "qsub").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/submitted\n')
    path = {"PATH": f"{tmp_path}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"}
    arguments = " ".join(map(str, LONG))
    script = REPOSITORY / "launch" / "pbs.sh"
    done = run(script, HVDTRAIN_ARGUMENTS=arguments, HVDTRAIN_BUDGET="2s", **pbs, **path, **site)
    assert done.code == 75, done.text
    (line,) = (tmp_path / "submitted").read_text().splitlines()
    assert f"HVDTRAIN_RUN_DIR={tmp_path / 'run'}" in line
    assert line.endswith("launch/pbs.sh")
    assert "localhost:2" in done.out


# The fields of kubeflow.org/v2beta1 MPIJob that the file may use (github.com/kubeflow/mpi-operator, v0.4, pkg/apis),
# with the values that are allowed where they are few.
SPEC = {
    "slotsPerWorker": int,
    "sshAuthMountPath": str,
    "mpiImplementation": {"OpenMPI", "Intel", "MPICH"},
    "launcherCreationPolicy": {"AtStartup", "WaitForWorkersReady"},
    "runLauncherAsWorker": bool,
    "runPolicy": {
        "cleanPodPolicy": {"None", "Running", "All"},
        "ttlSecondsAfterFinished": int,
        "activeDeadlineSeconds": int,
        "backoffLimit": int,
        "suspend": bool,
        "schedulingPolicy": dict,
    },
    "mpiReplicaSpecs": dict,
}
REPLICA = {"replicas": int, "restartPolicy": {"Never", "OnFailure"}, "template": dict}


def check(value, schema, where):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for key, item in value.items():
            assert key in schema, f"{where}.{key} is not a field of v2beta1"
            check(item, schema[key], f"{where}.{key}")
    elif isinstance(schema, set):
        assert value in schema, f"{where} = {value}"
    else:
        assert type(value) is schema, f"{where} = {value!r}"


def test_the_mpijob_is_one():
    job = yaml.safe_load((REPOSITORY / "launch" / "mpijob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v2beta1", "MPIJob")
    check(job["spec"], SPEC, "spec")
    replicas = job["spec"]["mpiReplicaSpecs"]
    assert set(replicas) == {"Launcher", "Worker"}
    for name, replica in replicas.items():
        check(replica, REPLICA, name)
        pod = replica["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        (container,) = pod["containers"]
        assert container["securityContext"]["runAsNonRoot"] is True
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        assert any(mount["mountPath"] == "/dev/shm" for mount in container["volumeMounts"])
    assert replicas["Launcher"]["replicas"] == 1


def test_every_file_says_how_it_was_tried():
    files = ("mpirun.sh", "horovodrun.sh", "slurm.sbatch", "pbs.sh", "lsf.sh", "mpijob.yaml", "apptainer.def")
    for name in (*files, "conda.yaml", "easybuild.eb", "spack.py"):
        text = (REPOSITORY / "launch" / name).read_text()
        assert "ried" in text, name  # "Tried: ..." or "Never tried: ..."
        if name in files[:-1]:
            assert "EDIT 1" in text, name
            assert "EDIT 2" in text, name
