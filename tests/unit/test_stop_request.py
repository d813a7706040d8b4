"""Requests to stop, from signals, the clock and the launcher, in processes of their own."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hvdtrain.process.ancestors import Ancestor, _waits_for_launcher, as_owner, find_launcher, seconds_since_launch

HEAD = """
import os, signal, subprocess, sys, time
from hvdtrain.process.stop import StopRequest, end_on_signals
"""


def python(code, **more):
    return subprocess.Popen(
        [sys.executable, "-c", HEAD + code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more
    )


def ended(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


WAIT = """
with StopRequest(None) as request:
    print('up', flush=True)
    while not request.reason:
        time.sleep(0.05)
    print(request.reason)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_is_a_request(number):
    code, out, err = ended(
        python(f"with StopRequest(None) as r:\n    os.kill(os.getpid(), {number})\n    print(r.reason)")
    )
    assert (code, out.strip()) == (0, number.name), err


def test_what_nohup_ignores_stays_ignored():
    begin = "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    code, out, err = ended(
        python(f"{begin}with StopRequest(None) as r:\n    os.kill(os.getpid(), signal.SIGHUP)\n    print(r.reason)")
    )
    assert (code, out.strip()) == (0, "None"), err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_before_training_ends_it_with_75(number):
    code, _, err = ended(python(f"end_on_signals()\nos.kill(os.getpid(), {number})\ntime.sleep(60)"))
    assert code == 75, err


def test_a_signal_ends_a_call_that_python_cannot_interrupt():
    lock_twice = "mutex = ctypes.create_string_buffer(64)\nlock = ctypes.CDLL(None).pthread_mutex_lock\nlock(mutex)\n"
    process = python(f"import ctypes\n{lock_twice}end_on_signals()\nprint('up', flush=True)\nlock(mutex)")
    assert process.stdout.readline() == "up\n"
    time.sleep(0.5)
    process.terminate()
    code, _, err = ended(process)
    assert code == 75
    assert err == "hvdtrain: stopped by SIGTERM: nothing is lost, the same command begins where it would have begun\n"


def test_training_takes_signals_over_and_gives_them_back():
    code, out, err = ended(
        python(
            "end_on_signals()\n"
            "with StopRequest(None) as r:\n    os.kill(os.getpid(), signal.SIGTERM)\n    print(r.reason, flush=True)\n"
            "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(60)"
        )
    )
    assert (code, out.strip()) == (75, "SIGTERM"), err


def test_the_clock_runs_since_the_launcher_was_started(tmp_path):
    """What came before training began is part of --train.max-time."""
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\nsleep 2\n"$@"\n')
    launcher.chmod(0o755)
    (tmp_path / "rank.py").write_text(
        HEAD + "from hvdtrain.process.ancestors import seconds_since_launch\nprint(seconds_since_launch())\n"
        "with StopRequest(1.5) as r: print(r.reason)\nwith StopRequest(6000) as r: print(r.reason)"
    )
    done = subprocess.run(
        [launcher, sys.executable, tmp_path / "rank.py"], capture_output=True, text=True, timeout=120, check=True
    )
    seconds, short, long = done.stdout.splitlines()
    assert 2 <= float(seconds) < 600
    assert (short, long) == ("--train.max-time is used up", "None")


@pytest.mark.parametrize("is_in_shell", [False, True])
def test_a_launcher_that_is_gone_is_a_request(tmp_path, is_in_shell):
    """Or the shell that waits for it, which is what horovodrun becomes with MPI."""
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\n"$@" &\nwait\n')
    launcher.chmod(0o755)
    (tmp_path / "rank.py").write_text(HEAD + WAIT)
    command = [str(launcher), sys.executable, str(tmp_path / "rank.py")]
    command = ["sh", "-c", f"{shlex.join(command)} 2>&1"] if is_in_shell else command
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "up\n"
    time.sleep(1.5)
    process.kill()
    assert process.stdout.read().strip() == "the launcher is gone"  # to the end: the rank has left, too
    process.stdout.close()
    process.wait(timeout=120)


def test_a_launcher_that_is_lost_before_training_ends_its_ranks(tmp_path):
    """The shell that horovodrun has become, while the launcher below it is still there."""
    launcher = tmp_path / "mpirun"
    launcher.write_text('#!/bin/sh\n"$@" &\nwait\n')
    launcher.chmod(0o755)
    early = "from hvdtrain.process.stop import end_on_signals\nend_on_signals()\nprint('up', flush=True)\n"
    (tmp_path / "rank.py").write_text(f"{HEAD}{early}time.sleep(60)")
    rank = shlex.join([sys.executable, str(tmp_path / "rank.py")])
    process = subprocess.Popen(
        ["sh", "-c", f"{shlex.quote(str(launcher))} {rank} 2>&1"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    started = time.monotonic()
    process.kill()
    assert "stopped by the loss of its launcher: nothing is lost" in process.stdout.read()
    assert time.monotonic() - started < 30
    process.stdout.close()
    process.wait(timeout=120)


OWN = (
    HEAD
    + """
from hvdtrain.process.stop import end_without_launcher
end_without_launcher(2.0)
print('up', flush=True)
"""
)
STARTS = """
import os, signal, subprocess, sys
from hvdtrain.process.ancestors import as_owner
depth, code = int(sys.argv[1]), sys.argv[2]
environ = {**os.environ, **as_owner()}
again = [sys.executable, sys.argv[0], str(depth - 1), code] if depth else [sys.executable, "-c", code]
if depth or "slow" not in code:
    sys.exit(subprocess.call(again, env=environ))
subprocess.Popen(again, env=environ)
"""


@pytest.mark.parametrize(
    ("depth", "rank", "says"),
    [
        (0, HEAD + WAIT, "the launcher is gone"),
        (1, HEAD + WAIT, "the launcher is gone"),  # of two programs, one within another, the outer one is lost
        (0, HEAD + "end_on_signals()\nprint('up', flush=True)\ntime.sleep(60)", "nothing is lost"),
        # The program has ended before its rank could look.
        (0, "import time; time.sleep(1)  # slow\n" + HEAD + WAIT, "the launcher is gone"),
        (0, OWN + "time.sleep(60)", "this rank ends"),
        (0, OWN + "signal.signal(15, lambda *_: exit('saved'))\ntime.sleep(60)", "saved"),
        (0, OWN + "signal.signal(15, signal.SIG_IGN)\ntime.sleep(60)", "this rank ends"),
        (0, OWN.replace("print", "0 and print") + WAIT + "time.sleep(60)", "the launcher is gone\nhvdtrain: the la"),
    ],
    ids=[
        *("training", "nested", "before training", "before it looks"),
        *("own loop", "own handler", "own loop that ignores it", "trained within a program"),
    ],
)
def test_a_program_that_is_lost_ends_the_ranks_that_it_has_started(tmp_path, depth, rank, says):
    (tmp_path / "starts.py").write_text(STARTS)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "starts.py", str(depth), rank],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout.readline() == "up\n"
    started = time.monotonic()
    process.kill()
    assert says in process.stdout.read()  # to the end: the rank has left, too
    assert time.monotonic() - started < 30
    process.stdout.close()
    process.wait(timeout=120)


def test_owners_of_another_host_or_container_are_not_looked_for(monkeypatch):
    """A process id says nothing there, and so does whatever else may stand in the variable."""
    mine = as_owner()["HVDTRAIN_OWNER"]
    odd = f"{mine.rpartition('.')[0]}.1,nonsense,1.2,,{'9' * 400}.1.x,-1.-1.{mine.split('.', 2)[2]}"
    for given, expected in ((mine, 1), (odd, 0), (f"{odd},{mine}", 1)):
        code, out, err = ended(
            python(
                "from hvdtrain.process.ancestors import own_launcher, owners\n"
                "print(len(owners()) - (own_launcher() is not None))",
                env={**os.environ, "HVDTRAIN_OWNER": given},
            )
        )
        assert (code, out.strip()) == (0, str(expected)), err
    monkeypatch.setenv("HVDTRAIN_OWNER", "1.2.elsewhere")
    assert as_owner() == {"HVDTRAIN_OWNER": f"1.2.elsewhere,{mine.rpartition(',')[2]}"}


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("mpirun --tag-output -x PATH python -m hvdtrain 'a & b' > log 2>&1", True),
        ("/opt/bin/mpirun -np 2 python", True),
        ("mpirun -np 2 python &", False),  # outlives its shell
        ("mpirun -np 2 python & sleep 5", False),
        ("sleep 1; mpirun -np 2 python", False),
        ("echo mpirun", False),
        ("mpirun 'unfinished", False),
        ("", False),
    ],
)
def test_which_shells_wait_for_a_launcher(command, expected):
    assert _waits_for_launcher(command) is expected


def test_who_is_alive():
    child = subprocess.Popen(["sleep", "60"])
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    found = Ancestor(child.pid, int(fields[19]))
    assert found.is_alive()
    assert not Ancestor(child.pid, int(fields[19]) - 1).is_alive()  # another process of the same number
    assert found.age_s() < 60
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not found.is_alive()  # nobody has asked for its exit code yet
    child.wait()
    assert not found.is_alive()
    assert find_launcher() is None or os.environ.get("OMPI_COMM_WORLD_SIZE") or os.environ.get("HOROVOD_SIZE")
    assert seconds_since_launch() > 0


def test_a_forked_child_does_not_train_on_beside_its_parent():
    """A fork whose child returns into the loop: it would write the same checkpoints and metrics."""
    code = """
with StopRequest(None) as request:
    if os.fork() == 0:
        print(request.reason, flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.wait()[1]), request.reason)
"""
    code, out, err = ended(python(code))
    assert (code, out) == (0, "1 None\n")
    assert "would train on beside its parent, and is ended" in err


def test_threads_that_keep_a_process_are_named():
    code = """
import threading, hvdtrain.process.stop as stop
stop._SECONDS_FOR_THREADS = 0.1
end_on_signals()
threading.Thread(target=time.sleep, args=(3,), name='uploading').start()
"""
    code, _, err = ended(python(code))
    assert code == 0
    assert err == (
        "hvdtrain: all is done, but this process waits for 'uploading', started as a thread without daemon=True, to"
        " end\n"
    )


def test_what_a_parent_has_left_behind_is_undone():
    """A daemon that ignores SIGCHLD makes every failed launch end with 0; blocked signals stop nothing."""
    inner = (
        "import signal, subprocess, sys, time; from hvdtrain.process.stop import hear_all; hear_all();"
        "print(subprocess.run(['false']).returncode, sorted(signal.pthread_sigmask(0, [])))"
    )
    outer = f"""
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
os.execv(sys.executable, [sys.executable, '-c', {inner!r}])
"""
    assert ended(python(outer)) == (0, "1 []\n", "")
