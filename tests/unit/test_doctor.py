"""Each check of `doctor` sees its fault in the facts, and nothing where all is well."""

import ast
import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain import cli
from hvdtrain.errors import ConfigError
from hvdtrain.install.clone import setup_command
from hvdtrain.settings.paths import existing_parent
from hvdtrain.verbs.doctor import diagnose
from hvdtrain.verbs.doctor.facts import RankFacts
from hvdtrain.verbs.doctor.findings import Finding, exit_code, table
from hvdtrain.verbs.doctor.network import AllReduce, Network, Pair, _answer, _ask, schedule
from hvdtrain.verbs.doctor.software import check_mpi
from hvdtrain.verbs.options import DoctorOptions
from hvdtrain.world.door import Door
from hvdtrain.world.inspect import HorovodBuild, mpi_library

GIB = 2**30
BUILD = HorovodBuild(version="0.28.1", torch="2.13.0", features=("MPI", "Gloo", "NCCL", "CUDA"))
VERSIONS = {
    "hvdtrain": "0.1.0",
    "python": "3.11.7",
    "torch": "2.13.0",
    "numpy": "2.4.6",
    "horovod": "0.28.1",
    "MPI": "Open MPI v5.0.11",
}


def healthy(hosts=2, per_host=2, gpus=0):
    """Return the facts of ranks with which nothing is wrong."""
    return [
        RankFacts(
            launcher="mpirun",
            rank=host * per_host + local,
            size=hosts * per_host,
            local_rank=local,
            local_size=per_host,
            host=f"node{host}",
            host_resolves=True,
            pid=1000 + local,
            versions=VERSIONS,
            horovod=BUILD,
            horovod_size=hosts * per_host,
            cores=(0, 1, 2, 3),
            launcher_cores=(0, 1, 2, 3),
            load=1.0,
            threads=2,
            gpus=tuple(f"uuid-{host}-{i}" for i in range(gpus)),
            num_machine_gpus=gpus,
            torch_cuda="13.0" if gpus else None,
            variables={"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "2"},
            run_dir="runs",
            free_bytes=500 * GIB,
            is_writable=True,
            sees_rank_0_file=True,
            shared_memory_bytes=8 * GIB,
            shared_memory_free_bytes=7 * GIB,
            open_files=65536,
            addresses={"lo": "127.0.0.1", "eth0": f"10.0.0.{host + 1}"},
            interface="eth0" if host else None,
            interface_mbit=10_000 if host else None,
            clock_s=(100.0, 101.0, 102.0),
        )
        for host in range(hosts)
        for local in range(per_host)
    ]


def plant(ranks, *changed, **fault):
    """Return the facts with a fault on some ranks (on all where none is named)."""
    return [dataclasses.replace(f, **fault) if not changed or f.rank in changed else f for f in ranks]


def bad(ranks, network=Network()):  # noqa: B008
    return [finding for finding in diagnose(ranks, network) if finding.status != "ok"]


def only(ranks, network=Network()):  # noqa: B008
    findings = bad(ranks, network)
    assert len(findings) == 1, findings
    return findings[0]


def pairs(slow=(), gbit=10.0, hosts=4):
    return tuple(
        Pair(
            hosts=(f"node{a}", f"node{b}"),
            latency_s=5e-3 if (a, b) in slow else 5e-5,
            bytes_per_s=(0.05 if (a, b) in slow else gbit / 8) * 1e9,
        )
        for a in range(hosts)
        for b in range(a + 1, hosts)
    )


REDUCES = (AllReduce(num_bytes=8, horovod_s=1e-3, mpi_s=1e-4), AllReduce(num_bytes=2**24, horovod_s=0.02, mpi_s=0.02))


@pytest.mark.parametrize("gpus", [0, 2])
@pytest.mark.parametrize("hosts", [1, 3])
def test_nothing_is_said_of_healthy_ranks(hosts, gpus):
    network = Network(all_reduces=REDUCES, pairs=pairs(hosts=hosts))
    assert bad(healthy(hosts, gpus=gpus), network) == []
    alone = [dataclasses.replace(healthy(1, 1)[0], launcher="none", horovod_size=None, sees_rank_0_file=None)]
    assert bad(alone) == []


def other(**changes):
    return {"versions": {**VERSIONS, **changes}}


BROKEN = HorovodBuild(version="0.28.1", torch="2.1.0", problem="ImportError: undefined symbol")
ONE_CORE = {"cores": (2,)}
# name: facts' fault, the ranks that have it (none: all), status, what the line says, what mends it
FAULTS = {
    "two clocks": ({"clock_s": (103.5, 104.5, 105.5)}, (2, 3), "warning", "node1 is 3.500 s ahead", "set-ntp"),
    "late clock": ({"clock_s": (40.0, 41.0, 42.0)}, (2, 3), "warning", "60.000 s behind node0", "set-ntp"),
    "another torch": (other(torch="2.12.0"), (3,), "error", "torch 2.12.0 on rank 3 (node1)", "one environment"),
    "another hvdtrain": (other(hvdtrain="0.0.9"), (1, 3), "error", "0.0.9 on ranks 1, 3", "PATH"),
    "another MPI": (other(MPI="Open MPI v4.1.4"), (2,), "error", "Open MPI v4.1.4", "PATH"),
    "another Python": (other(python="3.10.1"), (2,), "error", "3.10.1", "PATH"),
    "nearly the same Python": (other(python="3.11.9"), (2,), "warning", "3.11.9", "PATH"),
    "host without address": ({"host_resolves": False}, (2, 3), "warning", "node1 has no address", "/etc/hosts"),
    "host without address, Gloo": (
        {"host_resolves": False, "launcher": "horovodrun --gloo"},
        (),
        "error",
        "node0, node1 has no address",
        "/etc/hosts",
    ),
    "pinned to one core": (ONE_CORE, (2, 3), "error", "node1: ranks 2, 3 are pinned to core 2", "--bind-to none"),
    "too many threads": ({"threads": 4}, (), "warning", "oversubscribed", "export OMP_NUM_THREADS=2"),
    "small container": ({"core_quota": 1.0}, (0, 1), "warning", "2 threads each on 1 core:", "start 1 ranks"),
    "small shared memory": ({"shared_memory_bytes": 64 * 2**20}, (2, 3), "warning", "64 MiB", "--shm-size=1g"),
    "full shared memory": (
        {"shared_memory_free_bytes": 2**20},
        (0, 1),
        "warning",
        "1 MiB of 8.0 GiB are free",
        "ls -lS",
    ),
    "shared memory that cannot be written": (
        {"shared_memory_is_writable": False},
        (0, 1),
        "warning",
        "/dev/shm cannot be written",
        "--tmpfs /dev/shm",
    ),
    "no shared memory": ({"shared_memory_bytes": None}, (0,), "warning", "there is no /dev/shm", "emptyDir"),
    "other programs": ({"load": 9.3}, (0, 1), "warning", "node0: 9.3 processes for 4 cores", "top"),
    "few open files": ({"open_files": 256}, (3,), "warning", "node1: at most 256", "ulimit -n 65536"),
    "full disk": ({"free_bytes": 2**20}, (0,), "error", "1 MiB free", "--run-dir"),
    "little disk": ({"free_bytes": 3 * GIB}, (0,), "warning", "3.0 GiB free", "--run-dir"),
    "read-only disk": ({"is_writable": False}, (0,), "error", "cannot be written", "--run-dir"),
    "separate disks": ({"sees_rank_0_file": False}, (2, 3), "warning", "ranks 2, 3 see another runs", "share"),
    "a variable": (
        {"variables": {"NCCL_DEBUG": "WARN", "OMP_NUM_THREADS": "1"}},
        (3,),
        "warning",
        "OMP_NUM_THREADS is 1 on rank 3, 2 on rank 0",
        "mpirun -x OMP_NUM_THREADS=2",
    ),
    "an address twice": (
        {"addresses": {"docker0": "172.17.0.1"}},
        (),
        "warning",
        "172.17.0.1 of docker0",
        "btl_tcp_if_exclude lo,docker0",
    ),
    "singletons": ({"horovod_size": 1}, (), "error", "4 ranks, but Horovod sees 1", "mpirun of the MPI"),
    "singletons of srun": ({"horovod_size": 1, "launcher": "srun"}, (), "error", "Horovod sees 1", "srun --mpi=pmix"),
    "not connected": ({"contact_problem": "it broke"}, (), "error", "it broke", "fewer ranks"),
    "built for another torch": (
        {"horovod": dataclasses.replace(BUILD, torch="2.1.0")},
        (0, 1),
        "error",
        "built against torch 2.1.0, but 2.13.0 runs on node0",
        "launch/setup.sh",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_facts_is_one_line(name):
    fault, changed, status, figure, remedy = FAULTS[name]
    finding = only(plant(healthy(), *changed, **fault))
    assert (finding.status, figure in finding.figure, remedy in finding.remedy) == (status, True, True), finding
    assert exit_code([finding]) == (status == "error")


def test_horovod_that_is_missing_or_broken_matters_to_a_launcher_only():
    missing = HorovodBuild()
    versions = {**VERSIONS, "horovod": None, "MPI": None}
    for build, says in ((missing, "not installed"), (BROKEN, "does not load (ImportError: undefined symbol)")):
        alone = plant(healthy(1, 1), horovod=build, versions=versions, launcher="none", horovod_size=None)
        assert (only(alone).status, says in only(alone).figure) == ("warning", True)
        ranks = plant(healthy(1, 2), horovod=build, versions=versions, horovod_size=None, contact_problem="no Horovod")
        findings = bad(ranks[:1])
        assert {(f.status, f.what) for f in findings} == {("error", "launcher"), ("error", "horovod")}
        assert all("launch/setup.sh" in f.remedy for f in findings)
    assert "built against torch 2.1.0, 2.13.0 runs" in findings[1].figure


def test_an_mpi4py_that_does_not_load_is_not_called_missing(tmp_path, monkeypatch):
    versions = {**VERSIONS, "MPI": None}
    (missing,) = check_mpi(plant(healthy(1), versions=versions))
    assert missing.figure.startswith("mpi4py is not installed")
    # As a real one says it, of another MPI's library.
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text(
        "raise RuntimeError('cannot load MPI library\\nlibmpi.so.12: no')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "mpi4py"]:
        monkeypatch.delitem(sys.modules, name)
    library = mpi_library()
    assert (library.name, "cannot load MPI library" in library.problem) == (None, True)
    problem = library.problem
    finding = only(plant(healthy(1), versions=versions, mpi4py_problem=problem))
    assert (finding.status, f"mpi4py does not load ({problem})" in finding.figure) == ("warning", True)


def test_a_user_without_a_clone_is_sent_to_no_file_of_it(tmp_path):
    """Wherever an answer of doctor or of a start names the set-up: the same code, installed by pip."""
    shutil.copytree(Path(hvdtrain.__file__).parent, tmp_path / "hvdtrain", ignore=shutil.ignore_patterns("__pycache__"))
    code = "from hvdtrain.install.clone import *; print(setup_command(), other_environment())"
    command, environ = [sys.executable, "-c", code], {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("hvdtrain setup "), done.stderr
    assert "launch/" not in done.stdout
    assert setup_command() == "launch/setup.sh"
    for file in (tmp_path / "hvdtrain").rglob("*.py"):
        tree = ast.parse(file.read_text())
        nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)]
        docstrings = {id(node.body[0].value) for node in nodes if node.body and isinstance(node.body[0], ast.Expr)}
        constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in docstrings]
        said = [node.lineno for node in constants if "launch/setup.sh" in str(node.value)]
        assert file.name == "clone.py" or not said, f"{file}: {said}"


@pytest.mark.parametrize("name", ["HOROVOD_CONTROLLER", "HOROVOD_CPU_OPERATIONS"])
def test_gloo_under_mpirun_is_named(name):
    ranks = plant(healthy(1), variables={name: "gloo"}, contact_problem="each would be alone", horovod_size=None)
    finding = only(ranks[:1])
    assert (finding.status, finding.what) == ("error", "launcher")
    assert f"unset {name}" in finding.remedy


def test_cores():
    """Ranks bound side by side are fine; bound to a part of the host while the rest is idle is not."""
    ranks = [dataclasses.replace(f, cores=(2 * f.local_rank, 2 * f.local_rank + 1)) for f in healthy(1)]
    assert bad(ranks) == []
    ranks = [dataclasses.replace(f, cores=(f.local_rank,), threads=1) for f in healthy(1)]
    assert "2 may be used by no rank" in only(ranks).figure
    # one core is all there is: more ranks than cores, but nothing pins them
    finding = only(plant(healthy(1), cores=(0,), launcher_cores=(0,), threads=1))
    assert (finding.status, "wait for each other" in finding.figure) == ("warning", True)
    # three ranks on two cores of four, the fourth free
    ranks = plant(healthy(1, 4), 0, 1, 2, cores=(0, 1), threads=1)
    assert "ranks 0, 1, 2 are pinned to core 0, 1" in bad(ranks)[0].figure


def test_gpus_that_torch_does_not_use():
    ranks = plant(healthy(1), unused_gpus="of AMD: hvdtrain trains on NVIDIA's GPUs and on CPUs")
    finding = only(ranks)
    assert (finding.status, "on the CPU, with GPUs of AMD" in finding.figure) == ("warning", True)
    assert "CUDA_VISIBLE_DEVICES= (empty)" in finding.remedy


def test_gpus():
    ranks = healthy(2, 2, gpus=2)
    shared = only(plant(ranks, 2, 3, gpus=("uuid-1-0",), visible_devices="0"))
    assert (shared.status, "node1: ranks 2, 3 share GPU uuid-1-0" in shared.figure) == ("error", True)
    assert "unset CUDA_VISIBLE_DEVICES" in shared.remedy
    few = only(plant(ranks, 0, 1, gpus=("a",), num_machine_gpus=1))
    assert "ranks 0, 1 share GPU a" in few.figure
    crowded = only(plant(healthy(1, 3, gpus=2), threads=1))
    assert (crowded.status, "3 ranks, but 2 GPUs" in crowded.figure) == ("error", True)
    hidden = [dataclasses.replace(f, gpus=(f"uuid-{f.rank}",)) for f in healthy(1, 2, gpus=2)]
    assert (only(hidden).status, "its own GPU only" in only(hidden).figure) == ("warning", True)
    one_blind = only(plant(ranks, 3, gpus=(), visible_devices=""))
    assert (one_blind.status, "visible to rank 3" in one_blind.figure) == ("error", True)
    all_blind = only(plant(healthy(1, 2, gpus=2), gpus=(), torch_cuda=None))
    assert (all_blind.status, "torch is built for the CPU" in all_blind.figure) == ("warning", True)


def test_hosts_with_gpus_and_hosts_without():
    """Training refuses them together, so it is more than a warning."""
    found = bad(plant(healthy(3, 2, gpus=2), 4, 5, gpus=()))
    (refused,) = [finding for finding in found if finding.status == "error"]
    assert "torch uses none on node2, and some on node0" in refused.figure
    assert "CUDA_VISIBLE_DEVICES= (empty)" in refused.remedy


def test_gpus_without_nccl():
    finding = only(plant(healthy(1, gpus=2), horovod=dataclasses.replace(BUILD, features=("MPI", "Gloo"))))
    assert (finding.status, finding.what) == ("error", "NCCL")
    assert "HOROVOD_GPU_OPERATIONS=NCCL" in finding.remedy


def test_a_slow_pair_of_hosts_is_named():
    ranks = healthy(4)
    finding = only(ranks, Network(pairs=pairs(slow=[(1, 3)])))
    assert "node1 - node3: 5 ms, 0.05 GB/s; the best pair has 0.05 ms, 1.25 GB/s" in finding.figure
    findings = bad(healthy(5), Network(pairs=pairs(slow=[(0, 3), (1, 3), (2, 3), (3, 4)], hosts=5)))
    assert len(findings) == 4
    assert all("node3 is in 4 slow pairs: ethtool on node3" in f.remedy for f in findings)
    two_of_three = bad(healthy(3), Network(pairs=pairs(slow=[(0, 2), (1, 2)], hosts=3)))
    assert all("node2 is in 2 slow pairs" in f.remedy for f in two_of_three)
    assert len(two_of_three) == 2
    broken = (Pair(hosts=("node0", "node1"), latency_s=10, bytes_per_s=0),)
    assert (only(ranks, Network(pairs=broken)).status) == "error"


def test_a_slow_all_reduce_between_hosts():
    slow = AllReduce(num_bytes=2**24, horovod_s=1.0, mpi_s=0.9)
    assert "no more than 1 Gbit/s Ethernet" in only(healthy(2), Network(all_reduces=(slow,))).figure
    assert bad(healthy(1), Network(all_reduces=(slow,))) == []
    slower = AllReduce(num_bytes=2**24, horovod_s=0.2, mpi_s=0.02)
    assert "10.0 times as long as plain MPI" in only(healthy(1), Network(all_reduces=(slower,))).figure
    assert [f.what for f in bad(plant(healthy(1), load=50.0), Network(all_reduces=(slower,)))] == ["load"]
    assert slow.bandwidth(1.0, 4) == 1.5 * 2**24


@pytest.mark.parametrize("num_hosts", [2, 3, 4, 7, 16, 17, 40])
def test_every_host_is_in_one_pair_at_a_time(num_hosts):
    turns = schedule(num_hosts)
    for turn in turns:
        hosts = [host for pair in turn for host in pair]
        assert len(hosts) == len(set(hosts))
    met = [pair for turn in turns for pair in turn]
    every = {(a, b) for a in range(num_hosts) for b in range(a + 1, num_hosts) if num_hosts <= 16 or b == a + 1}
    assert (set(met), len(met)) == (every, len(every))


def test_a_pair_is_measured_and_one_that_does_not_answer_is_said(monkeypatch):
    monkeypatch.setattr("hvdtrain.verbs.doctor.network._PAIR_LIMIT_S", 20.0)
    own = next((a for a in _own_addresses() if not a.startswith("127.")), None)
    if own is None:
        pytest.skip("no network interface but lo")
    door = Door(b"token", size=3)
    ((_, port),) = door.listen([""])
    server = threading.Thread(target=_answer, args=(door,))
    server.start()
    with socket.create_connection((own, port)) as stranger:
        stranger.sendall(b"wrong" * 20)
        pair = _ask([("127.0.0.1", port), (own, port)], b"token", 2, ("a", "b"))
    server.join(timeout=120)
    door.close()
    assert pair.bytes_per_s > 1e6
    assert 0 < pair.latency_s < 1
    assert _ask([(own, port)], b"token", 1, ("a", "b")).bytes_per_s == 0


def _own_addresses():
    from hvdtrain.verbs.doctor.facts import addresses

    return addresses().values()


def test_table():
    text = table(
        [
            Finding("ok", "a", "fine"),
            Finding("error", "long name", "broken " * 30, "mend it"),
            Finding("warning", "b", "so so", "x"),
        ]
    )
    assert text.splitlines()[0] == "ok       a          fine"
    assert "                  > mend it" in text.splitlines()
    assert text.splitlines()[-1] == "1 error, 1 warning, 1 ok"
    assert max(map(len, text.splitlines())) <= 116


def test_facts_become_json():
    (facts, *_) = json.loads(json.dumps([dataclasses.asdict(facts) for facts in healthy()]))
    assert facts["horovod"]["torch"] == BUILD.torch


def test_run_directories_that_do_not_exist_yet(tmp_path, monkeypatch):
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
    monkeypatch.chdir(tmp_path)
    assert existing_parent(Path("runs")) == tmp_path


def test_command_line(tmp_path):
    report = tmp_path / "doctor.json"
    asked = cli.parse(["doctor", "--json", str(report), "--run-dir", "runs/mine"])
    assert (asked.verb, asked.recipe) == ("doctor", None)
    assert asked.options == DoctorOptions(json=report, run_dir=Path("runs/mine"))
    with pytest.raises(ConfigError, match="there is no flag '--jason'; did you mean '--json'"):
        cli.parse(["doctor", "--jason", "x"])
    with pytest.raises(ConfigError, match="'lm' is one word too many"):
        cli.parse(["doctor", "lm"])
    with pytest.raises(ConfigError, match="did you mean 'doctor'"):
        cli.parse(["docter"])
    with pytest.raises(ConfigError, match="must be greater than 0"):
        cli.parse(["doctor", "--timeout", "0"])


def test_a_verb_without_a_recipe_may_take_a_word(tmp_path):
    assert cli.parse(["generate", str(tmp_path), "--max-tokens", "5"]).options.run_dir == tmp_path
    with pytest.raises(ConfigError, match="'b' is one word too many"):
        cli.parse(["generate", "a", "b"])


def test_a_doctor_that_waits_in_vain_and_cannot_write_says_why(tmp_path):
    """Its answer comes from a timer, whose exceptions nobody would hear of."""
    program = (
        "import time\nfrom hvdtrain.verbs import doctor\nfrom hvdtrain.verbs.options import DoctorOptions\n"
        "doctor.try_connect = lambda: time.sleep(60)  # ranks that do not come\n"
        "doctor.doctor(DoctorOptions(timeout=0.2))"
    )
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=tmp_path, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60
        )
    assert done.returncode == 1
    assert "doctor cannot show what it has found: No space left on device" in done.stderr
