"""The heartbeat between processes that share nothing but a folder: no Horovod, no launcher, no training."""

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import time
from multiprocessing import forkserver, resource_tracker
from pathlib import Path

import heartbeat_rank as acts
import pytest
import torch
from patience import wait_for

from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld
from hvdtrain.world.heartbeat import Heartbeat


@pytest.fixture(scope="module")
def context():
    """Processes that begin where torch is imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hvdtrain.world"])
    first = context.Process(target=int)  # when it has ended, the server is up
    first.start()
    first.join()
    yield context
    forkserver._forkserver._stop()
    resource_tracker._resource_tracker._stop()


@pytest.fixture
def begin(context, tmp_path):
    """Start ranks, each with what it does once it is told to; ends what is left of them."""
    started = []

    def begin(*what):
        for rank, act in enumerate(what):
            started.append(context.Process(target=acts.run, args=(tmp_path, rank, len(what), act)))
            started[-1].start()
        return started

    yield begin
    for process in started:
        process.kill()
        process.join()


@pytest.fixture
def job(begin, tmp_path):
    """Start ranks, and tell them to act once they have met and heard of each other's steps."""

    def job(*what):
        ranks = begin(*what)
        wait_for(lambda: all((tmp_path / f"heard-{rank}").exists() for rank in range(len(what))))
        (tmp_path / "go").touch()
        return ranks

    return job


def ended(processes, folder, seconds=60):
    """Return exit code and standard error of each rank."""
    for process in processes:
        process.join(seconds)
        assert process.exitcode is not None, "it is still there"
    return [(process.exitcode, (folder / f"err-{rank}").read_text()) for rank, process in enumerate(processes)]


def inodes_of(pid):
    """Return the sockets that a process has open."""
    found = set()
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.add(str(path.readlink())[8:-1])
    return found


def listening(pid):
    """Return the ports at which a process listens."""
    own = inodes_of(pid)
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    rows += [line.split() for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]]
    return [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and row[9] in own]


def test_farewells_are_no_deaths(job, tmp_path):
    ranks = job(acts.go_on, acts.go_on, acts.go_on)
    wait_for(lambda: not any(listening(process.pid) for process in ranks))  # all are in: nobody may come any more
    (tmp_path / "over").touch()
    assert ended(ranks, tmp_path) == [(0, "")] * 3


@pytest.mark.parametrize(("dead", "speaker"), [(1, 0), (2, 0), (0, 1)])
def test_a_dead_rank_is_named_once(job, tmp_path, dead, speaker):
    results = ended(job(*(acts.kill if rank == dead else acts.go_on for rank in range(3))), tmp_path)
    for rank, (code, err) in enumerate(results):
        if rank == dead:
            continue
        assert code == 1
        said = re.findall(rf"hvdtrain: rank {dead} on \S+ is gone, killed or crashed: it was last seen at step", err)
        assert len(said) == (rank == speaker), err
        assert "stacks of all threads" in (tmp_path / f"log-{rank}").read_text()


def test_a_failure_is_said_once_with_its_code(job, tmp_path):
    results = ended(job(acts.go_on, acts.fail, acts.go_on), tmp_path)
    assert [code for code, _ in results] == [7, 7, 7]
    assert "".join(err for _, err in results).count("bad luck on rank 1") == 1


def test_a_stopped_rank_is_missed(job, tmp_path):
    ranks = job(acts.go_on, acts.stop)
    ((code, err),) = ended(ranks[:1], tmp_path)
    assert code == 1
    assert re.search(r"rank 1 on \S+ has given no sign of life for", err)


@pytest.mark.parametrize(
    ("what", "rank", "where"),
    [
        ((acts.hang_at_end, acts.wait_for_others), 0, "end"),
        ((acts.wait_for_others, acts.hang_at_start), 1, "start"),
    ],
)
def test_a_hang_outside_of_steps_is_named(job, tmp_path, what, rank, where):
    results = ended(job(*what), tmp_path)
    text = "".join(err for _, err in results)
    assert [code for code, _ in results] == [1, 1], text
    stuck = rf"no rank has made progress for 2 s.*: rank {rank} on \S+ has been at {where} for \d+ s; the others wait"
    assert re.search(stuck, text)


def test_a_child_that_keeps_the_connections_does_not_hide_a_death(job, tmp_path):
    ranks = job(acts.go_on, acts.fork_and_die)
    ((code, err),) = ended(ranks[:1], tmp_path)
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
    assert code == 1
    assert re.search(r"rank 1 on \S+ is gone, killed or crashed", err)  # not its silence


@pytest.mark.parametrize("act", [acts.fail_without_reader, acts.fail_with_sleeping_reader])
def test_saying_why_is_no_condition_of_leaving(job, tmp_path, act):
    """Both ranks have something to say, and nobody listens."""
    assert all(code in (1, 7) for code, _ in ended(job(act, act), tmp_path))


def test_what_fails_in_the_watch_is_reported_as_what_it_is(job, tmp_path):
    results = ended(job(acts.break_watch, acts.go_on), tmp_path)
    assert [code for code, _ in results] == [1, 1]
    text = "".join(err for _, err in results)
    assert text.count("watching over the ranks failed") == 1
    assert "TypeError" in text
    assert "is gone" not in text


def test_farewell_waits_for_no_beat():
    """A beat of ten seconds, and a thread that sleeps in it."""
    beat = Heartbeat(SoloWorld(torch.device("cpu"), Launch("none")), limit_s=100.0)
    beat._interval_s = 10.0
    beat.start()
    time.sleep(0.2)
    started = time.monotonic()
    beat.close()
    assert time.monotonic() - started < 5
    assert not beat._thread.is_alive()


def test_strangers_at_the_door_while_ranks_come_in(begin, tmp_path):
    """One rank is late. Meanwhile others talk to the port, and all the same all ranks come in."""
    ranks = begin(acts.go_on, acts.go_on, acts.come_late)
    wait_for(lambda: listening(ranks[0].pid))
    (port,) = listening(ranks[0].pid)
    visitors = []
    for says in 40 * (b"[]\n", b"[" * 50_000, b'{"token": "x", "name": "y", "rank": 1}\n', b"\0" * 68, b""):
        with contextlib.suppress(OSError):
            visitors.append(socket.create_connection(("127.0.0.1", port), timeout=0.2))
            visitors[-1].sendall(says)
    assert len(visitors) > 100
    (tmp_path / "come").touch()
    wait_for(lambda: all((tmp_path / f"up-{rank}").exists() for rank in range(3)))
    (tmp_path / "over").touch()
    assert ended(ranks, tmp_path) == [(0, "")] * 3
    for visitor in visitors:
        visitor.close()


def test_rank_0_hears_no_more_from_a_thousand_ranks_than_from_a_hundred():
    world = SoloWorld(torch.device("cpu"), Launch("none"))
    intervals = {}
    for size in (2, 128, 1024, 4096):
        world.size = size
        beat = Heartbeat(world, limit_s=300.0)
        intervals[size] = beat._interval_s
        for part in (beat._selector, beat._waker, beat._wakeful):  # or the next test hears of them
            part.close()
    assert intervals == {2: 1.0, 128: 1.0, 1024: 8.0, 4096: 30.0}  # a tenth of the limit at most
