"""Who started this process, threads, and devices."""

import gc
import os
import pwd
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from hvdtrain.errors import DataError, LaunchError
from hvdtrain.process import garbage
from hvdtrain.process.job import command_of
from hvdtrain.process.launch import Launch, detect_launch, give_home, prepare_process, threads_per_rank
from hvdtrain.process.output import while_read
from hvdtrain.process.session import horovodrun_options, on_this_machine
from hvdtrain.world import SoloWorld, pick_device
from hvdtrain.world.start import check_controller, check_launcher


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch("none")),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Launch("none")),  # in a batch script, not in a step
        (
            {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "HOROVOD_LOCAL_RANK": "1", "HOROVOD_LOCAL_SIZE": "2"},
            Launch("horovodrun --gloo", 3, 4, 1, 2),
        ),
        (  # left behind, where mpirun has started this rank
            {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"},
            Launch("mpirun", 1, 2),
        ),
        (  # whose ranks are told where the others are
            {"HOROVOD_RANK": "3", "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "OMPI_COMM_WORLD_SIZE": "2"},
            Launch("horovodrun --gloo", 3),
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "5",
                "OMPI_COMM_WORLD_SIZE": "8",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
            },
            Launch("mpirun", 5, 8, 1, 4),
        ),
        (
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "6",
                "SLURM_STEP_NUM_TASKS": "7",
                "SLURM_LOCALID": "0",
                "SLURM_NODEID": "3",
                "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
            },
            Launch("srun", 6, 7, 0, 1),
        ),
        (
            {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"},
            Launch("mpiexec", 1, 2, 1, 2),
        ),
        (  # whose daemons were started by srun, a task for each host
            {
                "SLURM_STEP_ID": "0",
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "PMI_RANK": "3",
                "PMI_SIZE": "4",
                "MPI_LOCALRANKID": "1",
                "MPI_LOCALNRANKS": "2",
            },
            Launch("mpiexec", 3, 4, 1, 2),
        ),
        (  # srun gives its tasks PMI_RANK, too (--mpi=pmi2)
            {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "PMI_RANK": "1", "PMI_SIZE": "2"},
            Launch("srun", 1, 2),
        ),
    ],
)
def test_launchers_are_recognised(environ, expected):
    assert detect_launch(environ) == expected


def test_a_shell_of_slurm_is_no_rank(monkeypatch):
    """That of `srun --pty bash` is a step of one task; Open MPI would take that for all the slots that there are."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert on_this_machine() == {}
    given = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert command_of(1, ["true"]) == ["true"]
    assert on_this_machine()["PRTE_MCA_ras"] == "^slurm"
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert on_this_machine()["OMPI_ALLOW_RUN_AS_ROOT"] == "1"
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(LaunchError, match="this is rank 0 of 2 that srun has started"):
        command_of(1, ["true"])


def test_cores_are_shared_and_bound_ranks_keep_their_own(monkeypatch):
    masks = {0: set(range(8)), os.getppid(): set(range(8))}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: masks[pid])
    assert threads_per_rank(1) == 8
    assert threads_per_rank(2) == 4
    assert threads_per_rank(16) == 1
    masks[0] = {4, 5}  # bound by the launcher, which itself is not
    assert threads_per_rank(4) == 2
    masks[os.getppid()] = {4, 5}  # the whole job has two cores
    assert threads_per_rank(2) == 1


def test_threads_and_yielding_are_set_unless_the_user_did(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    ranks = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    environ = dict(ranks)
    prepare_process(environ)
    assert environ["OMP_NUM_THREADS"] == environ["MKL_NUM_THREADS"] == "2"
    assert environ["OMPI_MCA_mpi_yield_when_idle"] == "1"
    environ = {**ranks, "OMP_NUM_THREADS": "1"}
    prepare_process(environ)
    assert environ["OMP_NUM_THREADS"] == "1"
    assert "MKL_NUM_THREADS" not in environ
    assert "OMPI_MCA_mpi_yield_when_idle" not in environ  # two cores are free to spin on
    environ = {**ranks, "OMPI_MCA_mpi_yield_when_idle": "0"}
    prepare_process(environ)
    assert environ["OMPI_MCA_mpi_yield_when_idle"] == "0"


RANKS = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}


@pytest.mark.parametrize(
    ("given", "home", "site", "expected"),
    [
        ({}, None, None, "^ofi"),
        ({}, "# btl = self\nbtl_tcp_if_include = eth0\npml = ob1\n", "mtl = ^ofi\n", "^ofi"),
        ({}, "btl=self,tcp\n", None, None),
        ({}, None, "mtl = ^ofi\n  btl = ^uct,openib,ofi\n", None),
        ({}, None, "btl_ofi_mode = 2\n", None),
        ({"OMPI_MCA_btl": "self,tcp"}, None, None, "self,tcp"),
        ({"OMPI_MCA_btl": "^openib"}, None, None, "^openib,ofi"),
        ({"OMPI_MCA_btl_ofi_mode": "2"}, None, None, None),
        ({"OMPI_MCA_btl_ofi_mode": "2", "OMPI_MCA_btl": "^openib"}, None, None, "^openib"),
        ({"OMPI_MCA_mca_base_param_files": "mine"}, None, None, None),
        ({"OPAL_PREFIX": "", "PATH": "/nowhere"}, None, None, None),
    ],
)
def test_open_mpi_looks_for_no_one_sided_libfabric_unless_somebody_has_chosen(tmp_path, given, home, site, expected):
    """It sleeps for a second where there is none; a choice in its own files would be overruled by a variable."""
    program = tmp_path / "mpi" / "bin" / "mpirun"
    for file, text in (
        (program, ""),
        (tmp_path / "home" / ".openmpi" / "mca-params.conf", home),
        (tmp_path / "mpi" / "etc" / "openmpi-mca-params.conf", site),
    ):
        file.parent.mkdir(parents=True)
        if text is not None:
            file.write_text(text)
    program.chmod(0o755)
    environ = {**RANKS, "PATH": str(program.parent), "HOME": str(tmp_path / "home"), **given}
    if not Path("/etc/openmpi").exists() or expected != "^ofi":
        prepare_process(environ)
        assert environ.get("OMPI_MCA_btl") == expected
    alone = {"PATH": str(program.parent), "HOME": str(tmp_path / "home")}
    prepare_process(alone)
    assert "OMPI_MCA_btl" not in alone


LOOKS = """
import gc
from hvdtrain import Recipe
from hvdtrain.errors import ConfigError
class Looks(Recipe):
    def build(self, say):
        raise ConfigError(f"looks: {gc.isenabled()}, leaves alone: {gc.get_freeze_count() > 100_000}")
def recipe():
    return Looks()
"""


def test_python_looks_for_garbage_again_when_all_is_imported(tmp_path):
    (tmp_path / "looks.py").write_text(LOOKS)
    command = [sys.executable, "-m", "hvdtrain", "train", "looks.py", "--dry-run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (2, "hvdtrain: looks: True, leaves alone: True\n")


def test_a_program_that_has_switched_the_collector_off_keeps_it_so():
    gc.disable()
    try:
        garbage.rest()
        garbage.go_on()
        assert not gc.isenabled()
    finally:
        gc.enable()
    garbage.go_on()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    garbage.rest()
    assert not gc.isenabled()
    garbage.go_on()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_one_gpu_a_rank():
    both = ("uuid-a", "uuid-b")
    assert pick_device([(), ()], 1) == torch.device("cpu")
    assert pick_device([both, both], 1) == torch.device("cuda", 1)
    assert pick_device([("uuid-a",), ("uuid-b",)], 1) == torch.device("cuda", 0)
    with pytest.raises(LaunchError, match="3 ranks"):
        pick_device([both] * 3, 2)
    with pytest.raises(LaunchError, match="2 ranks"):
        pick_device([("uuid-a",), ("uuid-a",)], 1)
    with pytest.raises(LaunchError, match="sees 0 GPUs"):
        pick_device([both, ()], 0)


@pytest.mark.parametrize(
    ("seen", "taken"),
    [
        ([("a", "b"), ("b", "a")], ["a", "b"]),  # what one calls its second is the other's first
        ([("b", "a"), ("a", "b")], ["b", "a"]),
        ([("a", "b"), ("c", "d")], ["a", "c"]),  # two of its own each
        ([("a", "b"), ("a",)], ["b", "a"]),  # the first gives way
        ([("a", "b", "c"), ("a", "b"), ("a",)], ["c", "b", "a"]),
        ([("a", "b", "c", "d")] * 3, ["a", "b", "c"]),
    ],
)
def test_gpus_are_told_apart_by_their_identities(seen, taken):
    devices = [pick_device(seen, rank) for rank in range(len(seen))]
    assert [gpus[device.index] for gpus, device in zip(seen, devices, strict=True)] == taken


def test_as_many_names_as_ranks_are_no_help_if_they_are_one_gpu():
    with pytest.raises(LaunchError, match=r"3 ranks.*together they see 2 different ones"):
        pick_device([("a", "b"), ("b", "a"), ("a", "b")], 0)


def test_solo_world_needs_no_horovod():
    world = SoloWorld(torch.device("cpu"), Launch("none"))
    layer = torch.nn.Linear(2, 1)
    optimizer = world.wrap(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.synchronize()
    with optimizer.skip_synchronize():
        optimizer.step()
    assert isinstance(optimizer, torch.optim.SGD)
    assert world.all_reduce(torch.ones(2), "mean", "x").tolist() == [1.0, 1.0]
    assert world.broadcast_object({"a": 1}, "o") == {"a": 1}
    assert world.all_gather_object(5, "g") == [5]
    with pytest.raises(DataError, match=r"^no such file$"):
        world.together(lambda: (_ for _ in ()).throw(DataError("no such file")), "t")


@pytest.mark.parametrize(
    ("more", "name"), [({}, "torchrun"), ({"ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch")]
)
def test_launchers_of_torch_are_refused_naming_the_right_one(more, name):
    launch = detect_launch({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", **more})
    assert (launch.launcher, launch.rank, launch.size) == (name, 1, 4)
    with pytest.raises(LaunchError, match=rf"^{name} \(RANK=1, WORLD_SIZE=4\).*horovodrun -np 4 python -m hvdtrain"):
        check_launcher(launch)


def test_a_lone_process_and_horovods_own_ranks_are_no_matter_of_torch():
    assert detect_launch({"RANK": "0", "WORLD_SIZE": "1"}).launcher == "none"
    assert detect_launch({"WORLD_SIZE": "4"}).launcher == "none"
    assert detect_launch({"RANK": "1", "WORLD_SIZE": "2", "HOROVOD_RANK": "1"}).launcher == "horovodrun --gloo"
    check_launcher(Launch("none"))
    check_launcher(Launch("mpirun", 0, 2))


@pytest.mark.parametrize(
    ("launcher", "variables", "says"),
    [
        ("horovodrun --gloo", {}, "unset HOROVOD_RANK HOROVOD_SIZE"),
        ("horovodrun --gloo", {"HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1", "HOROVOD_CONTROLLER": "gloo"}, None),
        ("mpirun", {"HOROVOD_CONTROLLER": "gloo"}, "HOROVOD_CONTROLLER=gloo under mpirun"),
        ("mpirun", {"HOROVOD_CONTROLLER": "mpi"}, None),
    ],
)
def test_what_is_set_for_another_launcher_is_told_before_horovod_starts(monkeypatch, launcher, variables, says):
    for name in ("HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    launch = Launch(launcher, size=2)
    if says:
        with pytest.raises(LaunchError, match=says):
            check_controller(launch)
    else:
        check_controller(launch)


def test_a_user_without_name_and_home_gets_one(monkeypatch, tmp_path):
    """`docker run --user 54321` with HOME unset; a user with a name has his own (`env -i`)."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    environ = {"HOME": "/any"}
    give_home(environ)
    assert environ == {"HOME": "/any"}
    environ = {"HOME": ""}
    give_home(environ)
    assert environ == {"HOME": pwd.getpwuid(os.getuid()).pw_dir}
    environ = {}
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    give_home(environ)
    assert environ == {"HOME": str(tmp_path / "hvdtrain-54321")}
    assert (tmp_path / "hvdtrain-54321").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("home", "options"),
    [("mine", []), ("with a cache", []), ("nowhere", ["--disable-cache"]), ("file", ["--disable-cache"])],
)
def test_horovodrun_needs_no_home_to_write_to(tmp_path, monkeypatch, home, options):
    (tmp_path / "mine").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "with a cache" / ".horovod").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / home))
    assert horovodrun_options() == options


@pytest.mark.parametrize("size", [10, 100_000])
def test_a_reader_that_leaves_ends_an_answer_without_a_traceback(size):
    """`hvdtrain compare a b | head -1`; what another pipe has lost is an error as ever."""
    code = "import sys; from hvdtrain.process.output import while_read; sys.exit(while_read(lambda: {}))"
    reader, writer = os.pipe()
    os.close(reader)
    for stdout, expected in ((writer, (0, "")), (subprocess.DEVNULL, (0, ""))):
        command = [sys.executable, "-c", code.format(f"print('x' * {size}) or 0")]
        done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=120)
        assert (done.returncode, done.stderr) == expected
    os.close(writer)
    with pytest.raises(BrokenPipeError):
        while_read(lost)


@pytest.mark.parametrize("is_buffered", [True, False])
@pytest.mark.parametrize("size", [10, 100_000])
def test_an_answer_that_cannot_be_written_is_said_and_is_no_success(size, is_buffered):
    code = "import sys; from hvdtrain.process.output import while_read; sys.exit(while_read(lambda: {}))"
    command = [sys.executable, "-c", code.format(f"print('x' * {size}) or 0")]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environ |= {} if is_buffered else {"PYTHONUNBUFFERED": "1"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, env=environ)
        deaf = subprocess.run([*command[:2], code.format("print('x') or 0")], stderr=full, timeout=120, env=environ)
    assert done.returncode == 1
    assert done.stderr == (
        "hvdtrain: standard output cannot be written (No space left on device): the answer is not whole\n"
    )
    assert deaf.returncode == 0


def test_streams_are_as_they_were_after_an_answer(capsys):
    assert while_read(lambda: print("x") or 3) == 3
    assert "write" not in vars(sys.stdout)
    assert capsys.readouterr().out == "x\n"


def lost():
    raise BrokenPipeError


@pytest.mark.parametrize(
    "trouble", ["sys.stderr.close()", "sys.stderr = open('/dev/full', 'w')", "sys.stderr = Busy()"]
)
def test_an_error_output_that_takes_nothing_holds_nobody_up(trouble):
    busy = "class Busy:\n    def write(self, text):\n        raise RuntimeError('reentrant call inside a buffer')\n"
    program = f"import sys\nfrom hvdtrain.process.output import tell\n{busy}{trouble}\ntell('a word')\nprint('done')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.stdout, "Traceback" in done.stderr) == ("done\n", False)
