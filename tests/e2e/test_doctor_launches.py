"""`doctor` in real launches, healthy ones and such with a fault planted in the real environment."""

import json
import os
import shutil
import socket
import sys

import pytest
from conftest import REPOSITORY
from planted import __file__ as PLANTED
from planted import can_make_namespaces

DOCTOR = [sys.executable, "-m", "hvdtrain", "doctor"]
MPIRUN = ["mpirun", "--oversubscribe", "-np", "2"]
needs_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="this user may not make mount namespaces (unshare --mount --uts)"
)


def lines(done, status=None):
    """Return the table's lines, without horovodrun's prefixes, and each remedy on the line of its finding."""
    found = []
    for raw in done.out.splitlines():
        line = raw.removeprefix("[0]<stdout>:")
        if line.startswith(("ok  ", "warning  ", "error  ")):
            found.append(line)
        elif line.startswith("        ") and found:
            found[-1] += " " + line.strip()
    return [line for line in found if status in (None, line.split()[0])]


def the(done, status, what):
    """Return the line of this status about `what`."""
    found = [line for line in lines(done, status) if line[9:].startswith(what)]
    assert found, done.text
    return found[0]


def planted(*faults):
    return [sys.executable, PLANTED, *faults, "--", *DOCTOR]


@pytest.mark.beside
def test_one_process(run, tmp_path):
    done = run(*DOCTOR, "--json", "report/doctor.json", "--run-dir", "runs/mine", timeout=120)
    assert done.code == 0, done.text
    assert "none: one process" in the(done, "ok", "launcher")
    assert "runs/mine" in done.out
    report = json.loads((tmp_path / "report" / "doctor.json").read_text())
    assert report["exit_code"] == 0
    assert [finding["status"] for finding in report["findings"]] == [line.split()[0] for line in lines(done)]
    assert report["ranks"][0]["rank"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report"]


@pytest.mark.alone
@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun-gloo"])
def test_two_ranks(hvdtrain, tmp_path, launcher):
    threads = str(os.cpu_count()) if launcher == "horovodrun-gloo" else "1"
    environment = {"OMP_NUM_THREADS": threads}
    done = hvdtrain("doctor", "--json", "doctor.json", launcher=launcher, ranks=2, timeout=180, **environment)
    assert done.code == 0, done.text
    assert "started 2 ranks on 1 host; Horovod sees all of them" in the(done, "ok", "launcher")
    assert lines(done, "error") == []
    if threads != "1":  # two ranks with a thread for each core
        assert "oversubscribed > export OMP_NUM_THREADS=" in the(done, "warning", "cores")
    measured = json.loads((tmp_path / "doctor.json").read_text())["network"]["all_reduces"]
    assert [item["num_bytes"] for item in measured] == [8, 2**16, 2**20, 2**24]
    assert all(0 < item["horovod_s"] < 10 for item in measured)
    # plain MPI stands beside it wherever mpi4py sees the same two ranks: not without MPI
    assert all((item["mpi_s"] is not None) == (launcher == "mpirun") for item in measured)
    assert ("plain MPI" in done.out) == (launcher == "mpirun")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["doctor.json"]


@pytest.mark.beside
def test_gloo_under_mpirun(run):
    done = run(*MPIRUN, *DOCTOR, timeout=120, HOROVOD_CONTROLLER="gloo")
    assert done.code == 1, done.text
    line = the(done, "error", "launcher")
    assert "HOROVOD_CONTROLLER=gloo" in line
    assert "> unset HOROVOD_CONTROLLER, or start with horovodrun --gloo -np 2" in line
    assert "Traceback" not in done.text


@pytest.mark.alone
def test_faults_of_ranks_and_host(run, tmp_path):
    """Both ranks on one core, rank 1 with another hvdtrain, another variable, too few open files."""
    copy = tmp_path / "other" / "hvdtrain"
    shutil.copytree(REPOSITORY / "hvdtrain", copy, ignore=shutil.ignore_patterns("__pycache__"))
    start = copy / "__init__.py"
    start.write_text(start.read_text().replace('__version__ = "', '__version__ = "9.'))
    faults = planted("core", "files", "threads", f"python={copy.parent}")
    done = run(*MPIRUN, "--bind-to", "none", *faults, timeout=180, OMP_NUM_THREADS="1")
    assert done.code == 1, done.text
    assert "hvdtrain 9." in the(done, "error", "versions")
    assert "on rank 1 (" in the(done, "error", "versions")
    assert "at most 256" in the(done, "warning", "open files")
    assert "> ulimit -n 65536" in the(done, "warning", "open files")
    assert "OMP_NUM_THREADS is 3 on rank 1, 1 on rank 0 > mpirun -x OMP_NUM_THREADS=1" in the(
        done, "warning", "variables"
    )
    if len(os.sched_getaffinity(0)) > 1:
        assert "ranks 0, 1 are pinned to core" in the(done, "error", "cores")
        assert "> mpirun --bind-to none" in the(done, "error", "cores")


@pytest.mark.alone
@needs_namespaces
def test_two_hosts(run):
    """Two names, each with its own small /dev/shm, and other directories of one name; a real network interface."""
    mca = ["--mca", "btl", "self,tcp"]
    done = run(*MPIRUN, *mca, *planted("hosts", "shared-memory"), timeout=180, OMP_NUM_THREADS="1")
    assert "started 2 ranks on 2 hosts" in the(done, "ok", "launcher")
    assert "node1 is 0." in the(done, "ok", "clocks").replace("node0 is", "node1 is")
    assert "rank 1 see another runs than rank 0" in the(done, "warning", "run directory")
    assert "is on several hosts" in the(done, "warning", "interface")  # it is one machine, after all
    line = the(done, "warning", "shared memory")
    assert "node0, node1: /dev/shm has 16 MiB" in line
    assert "--shm-size=1g" in line
    assert "over TCP" in the(done, "ok", "pairs of hosts")


@pytest.mark.beside
def test_fake_number_of_ranks(run):
    done = run(*DOCTOR, timeout=120, OMPI_COMM_WORLD_SIZE="4", OMPI_COMM_WORLD_RANK="0")
    assert done.code == 1, done.text
    line = the(done, "error", "launcher")
    assert "mpirun started 4 ranks, but Horovod sees 1" in line
    assert "no launcher is seen above this process" in line
    assert "unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE; or start with" in line
    assert "launch/setup.sh" in line
    assert "Traceback" not in done.text


@pytest.mark.beside
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PMI_RANK": "0", "PMI_SIZE": "4"}, "unset PMI_RANK PMI_SIZE; if one has"),
        ({"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4"}, "unset OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_"),
        ({"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4"}, "unset HOROVOD_RANK HOROVOD_SIZE"),
    ],
)
def test_training_with_what_a_launcher_left_behind(run, variables, says):
    done = run(sys.executable, "-m", "hvdtrain", "train", "lm", "--train.steps", "1", timeout=120, **variables)
    assert done.code == 2, done.text
    assert says in done.err
    assert "Traceback" not in done.text


@pytest.mark.beside
@pytest.mark.parametrize("is_started", [True, False])
def test_ranks_that_never_come(run, is_started):
    """Gloo waits for ever for a rendezvous that does not answer, and crashes where it was told of none."""
    place = {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2", "CROSS_RANK": "0", "CROSS_SIZE": "1"}
    with socket.create_server(("127.0.0.1", 0)) as silent:
        if is_started:
            place |= {"GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": str(silent.getsockname()[1])}
        environment = {f"HOROVOD_{name}": value for name, value in place.items()}
        gloo = {"HOROVOD_CONTROLLER": "gloo", "HOROVOD_CPU_OPERATIONS": "gloo"}
        done = run(*DOCTOR, "--timeout", 2, timeout=120, **environment, **gloo)
    assert done.code == 1, done.text
    told = "waited 2 s (--timeout) for the other ones" if is_started else "unset HOROVOD_RANK HOROVOD_SIZE"
    assert told in the(done, "error", "launcher")
    assert "terminate called" not in done.text


@pytest.mark.beside
def test_horovod_of_another_torch(run, tmp_path):
    """A Horovod that does not load, as one built against an older torch."""
    broken = tmp_path / "broken" / "horovod"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
    (broken / "metadata.json").write_text('{"pytorch": "2.1.0"}')
    launched = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}
    done = run(*DOCTOR, timeout=120, PYTHONPATH=f"{broken.parent}:{REPOSITORY}", **launched)
    assert done.code == 1, done.text
    line = the(done, "error", "horovod")
    assert "undefined symbol: _ZN3c10); it was built against torch 2.1.0" in line
    assert "> launch/setup.sh" in line
    assert "Traceback" not in done.text


@pytest.mark.beside
def test_a_mistake_names_the_nearest_flag(run):
    done = run(*DOCTOR, "--jason", "x", timeout=120)
    assert done.code == 2
    assert "there is no flag '--jason'; did you mean '--json'?" in done.err
