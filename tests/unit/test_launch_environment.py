"""What the files in `launch/` hand on to ranks on other hosts, by the commands that they print."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SET = {
    "NCCL_IB_HCA": "mlx5",
    "HOROVOD_CYCLE_TIME": "2",
    "UCX_TLS": "rc",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "OMP_NUM_THREADS": "1",
}


@pytest.fixture
def launched(tmp_path):
    """Return a function that runs a launch file and returns the words of the command that it prints."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"mpirun": "true", "python": f'exec {sys.executable} "$@"'}.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "nodes").write_text("localhost\n")
    variables = {
        "VIRTUAL_ENV": str(tmp_path),
        "HVDTRAIN_RUN_DIR": str(tmp_path / "run"),
        "LSB_JOBID": "7",
        "LS_SUBCWD": str(LAUNCH.parent),
        "LSB_MCPU_HOSTS": "localhost 1",
        "PBS_O_WORKDIR": str(LAUNCH.parent),
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
    }

    def run(script, **more):
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables, **more}
        done = subprocess.run(
            ["bash", str(LAUNCH / script), "train", "lm"], env=environment, capture_output=True, text=True, timeout=120
        )
        printed = [line for line in done.stdout.splitlines() if line.startswith("+ ")]
        assert printed, done.stdout + done.stderr
        return printed[0].split(), done.stderr

    return run


def handed_on(words):
    return {words[i + 1].partition("=")[0] for i, word in enumerate(words) if word == "-x"}


@pytest.mark.parametrize("script", ["mpirun.sh", "pbs.sh", "lsf.sh", "slurm.sbatch"])
def test_what_is_set_for_the_libraries_reaches_all_hosts(launched, script):
    words, _ = launched(script, **SET, EDITOR="vi", CUDA_VISIBLE_DEVICES="0,1")
    assert handed_on(words) >= {"PATH", "CUDA_VISIBLE_DEVICES", *SET}
    assert "EDITOR" not in handed_on(words)
    counts = [words.count(name) for name in handed_on(words)]
    assert max(counts) == 1  # mpirun refuses a variable that is given twice


def test_gpus_named_by_uuid_are_this_hosts_own(launched):
    words, _ = launched("mpirun.sh", CUDA_VISIBLE_DEVICES="GPU-4b36,GPU-9f01")
    assert "CUDA_VISIBLE_DEVICES" not in handed_on(words)


@pytest.mark.parametrize("given", [{"SLURM_JOB_GPUS": "2,3"}, {"SLURM_GPUS_ON_NODE": "2"}])
def test_gpus_that_slurm_has_given_are_this_hosts_own(launched, given):
    """On another host the job may have others, which Slurm tells its ranks; that the CPU is meant goes for all."""
    words, _ = launched("slurm.sbatch", **given, SLURM_CPUS_PER_TASK="8", CUDA_VISIBLE_DEVICES="2,3")
    assert "CUDA_VISIBLE_DEVICES" not in handed_on(words)
    for none in ("", "-1"):
        words, _ = launched("slurm.sbatch", **given, SLURM_CPUS_PER_TASK="8", CUDA_VISIBLE_DEVICES=none)
        assert "CUDA_VISIBLE_DEVICES" in handed_on(words)


@pytest.mark.parametrize(
    ("visible", "ranks"),
    [
        (None, "8"),
        ("3", "1"),
        ("0,2,5", "3"),
        ("GPU-4b36,GPU-9f01", "2"),
        ("0,1,-1,2", "2"),
        ("0,1,2,3,4,5,6,7,8,9", "8"),
        ("", "cores"),
        ("-1", "cores"),
        ("NoDevFiles", "cores"),
    ],
)
def test_a_machine_starts_a_rank_for_each_gpu_that_is_not_hidden(tmp_path, visible, ranks):
    """More ranks than GPUs that can be seen are refused."""
    (tmp_path / "bin").mkdir()
    cards = "; ".join(f'echo "GPU {n}: NVIDIA H100 (UUID: GPU-{n})"' for n in range(8))
    for name, text in {"nvidia-smi": cards, "nproc": "echo 3", "horovodrun": "exit 0", "python": "exit 0"}.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    shutil.copytree(LAUNCH, tmp_path / "launch")
    (tmp_path / "launch" / "setup.sh").write_text("#!/bin/sh\n")  # of the files beside local.sh, the one that installs
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "VIRTUAL_ENV": str(tmp_path)}
    environment |= {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    command = ["bash", str(tmp_path / "launch" / "local.sh"), "train", "lm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[words.index("-np") + 1] == ("3" if ranks == "cores" else ranks)


def test_nccl_is_given_the_name_of_an_interface(launched):
    words, said = launched("mpirun.sh", HVDTRAIN_INTERFACE="eth1")
    assert {"NCCL_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE"} <= handed_on(words)
    assert "address range" not in said


def test_nccl_is_never_given_an_address_range(launched):
    words, said = launched("mpirun.sh", HVDTRAIN_INTERFACE="10.0.0.0/16")
    assert "NCCL_SOCKET_IFNAME" not in handed_on(words)
    assert words[words.index("btl_tcp_if_include") + 1] == "10.0.0.0/16"
    assert "10.0.0.0/16 is an address range" in said


def test_a_slurm_task_with_a_gpu_is_told_of_too_few_cores(launched):
    assert "has 1 cores" in launched("slurm.sbatch", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_PER_TASK="1")[1]
    assert "cores" not in launched("slurm.sbatch", SLURM_GPUS_ON_NODE="2", SLURM_CPUS_PER_TASK="8")[1]
    assert "cores" not in launched("slurm.sbatch", SLURM_CPUS_PER_TASK="1")[1]


def test_the_mpijob_hands_them_on(tmp_path):
    job = yaml.safe_load((LAUNCH / "mpijob.yaml").read_text())
    (container,) = job["spec"]["mpiReplicaSpecs"]["Launcher"]["template"]["spec"]["containers"]
    (script,) = container["args"]
    (tmp_path / "mpirun").write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / "mpirun").chmod(0o755)
    path = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "EDITOR": "vi"}
    libraries = {**SET, "PYTORCH_ALLOC_CONF": "expandable_segments:True", "HF_HUB_OFFLINE": "1"}
    for visible, more in (("0,1", {"CUDA_VISIBLE_DEVICES"}), ("GPU-4b36", set())):
        own = {**path, **libraries, "CUDA_VISIBLE_DEVICES": visible}
        done = subprocess.run([*container["command"], script], env=own, capture_output=True, text=True)
        assert handed_on(done.stdout.split()) == {"PATH", *libraries, *more}


def sourced(tmp_path, **variables):
    """Return what environment.sh, found by a relative path, has come to, and what it said."""
    told = '. launch/environment.sh; printf "%s\\n" "$root" "$environment" "${PYTHONHOME-}" "${TMPDIR-}"'
    done = subprocess.run(
        ["bash", "-euc", told],
        cwd=LAUNCH.parent,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), **variables},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_variables_that_lead_astray_are_left_aside(tmp_path):
    root = str(LAUNCH.parent)
    plain = [root, f"{root}/.venv", "", ""]
    assert sourced(tmp_path) == (plain, "")
    assert sourced(tmp_path, CDPATH=f".:{tmp_path}", PYTHONHOME="/opt/other") == (plain, "")
    told, said = sourced(tmp_path, TMPDIR=str(tmp_path / "none"))
    assert (told, said) == (plain, f"TMPDIR={tmp_path}/none is no directory: /tmp takes its place\n")
    assert sourced(tmp_path, TMPDIR=str(tmp_path))[0][3] == str(tmp_path)


@pytest.mark.parametrize("variables", [("VIRTUAL_ENV",), ("CONDA_PREFIX", "CONDA_DEFAULT_ENV")])
def test_an_active_environment_that_was_moved_is_not_made_anew(tmp_path, variables):
    """As in a shell where it was activated before the clone got another name."""
    active = {name: str(tmp_path / "env") for name in variables}
    (told, said), root = sourced(tmp_path, **active), str(LAUNCH.parent)
    assert told[1] == f"{root}/.venv"
    assert said == f"the active environment, {tmp_path}/env, is not there any more: {root}/.venv takes its place\n"
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").touch()
    told, said = sourced(tmp_path, **active)
    assert (told[1], said) == (f"{tmp_path}/env", "")
    assert sourced(tmp_path, VIRTUAL_ENV=f"{root}/.venv-new") == ([root, f"{root}/.venv-new", "", ""], "")
