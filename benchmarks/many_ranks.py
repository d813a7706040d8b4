"""What watching over many ranks, and starting them, costs; and what Horovod's coordinator takes with them.

    python benchmarks/many_ranks.py --output benchmarks/results/many_ranks.txt

Two parts. The watch: rank 0's heartbeat, as it is, with 8 to 1,024 ranks at the other end of real connections, which a
second process plays by the real protocol; nothing is extrapolated. The ranks: real ones on this machine, under MPI and
Gloo, that only sleep and reduce; a line in N, and one in log2 N, is fitted to each figure, and the better one gives the
figure for 1,024 ranks. What that cannot know: ranks share these cores and no network lies between them, so that the
times of a round are a scheduler's; processor time of rank 0 is what carries over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import selectors
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [os.environ.get("MANY_RANKS_TREE", str(REPOSITORY)), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

from hvdtrain.process.launch import Launch  # noqa: E402
from hvdtrain.world import Heartbeat, SoloWorld  # noqa: E402
from hvdtrain.world.door import knock  # noqa: E402

SECONDS = 8.0
LIMIT_S = 300.0


class PlayedWorld(SoloWorld):
    """Rank 0 of a job whose other ranks are played."""

    def __init__(self, size, invitations, answers):
        super().__init__(torch.device("cpu"), Launch("none"))
        self.size, self._invitations, self._answers = size, invitations, answers

    def broadcast_pickled(self, value, name, root):
        """Invite the other ranks."""
        self._invitations.put((value, self.size))
        return value

    def all_gather_pickled(self, value, name):
        """Return the value for every rank, or who has come in."""
        return self._answers.get() if name == "heartbeat" else [value] * self.size


def play(invitations, answers) -> None:
    """Be the other ranks: knock one after the other from several threads, then report as often as they do."""
    (addresses, token), size = invitations.get()
    found = [None] * size

    def come(first):
        for rank in range(first, size, 16):
            found[rank] = next((c for a in addresses * 3 if (c := knock(a, token, rank)) is not None), None)

    threads = [threading.Thread(target=come, args=(first,)) for first in range(1, 17)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    answers.put([True, *(connection is not None for connection in found[1:])])
    report([connection for connection in found if connection is not None], answers_interval(size))


def report(connections, interval) -> None:
    """Say where each rank is, over and over, and read what rank 0 says, until it leaves."""
    chosen = selectors.DefaultSelector()
    for connection in connections:
        connection.setblocking(False)
        chosen.register(connection, selectors.EVENT_READ)
    for step in itertools.count():
        ends = time.monotonic() + interval
        line = json.dumps({"place": [step, "forward", 0.1]}).encode() + b"\n"
        for connection in connections:
            connection.send(line)
        while (left := ends - time.monotonic()) > 0:
            for key, _ in chosen.select(left):
                if not key.fileobj.recv(65536):
                    return


def answers_interval(size: int) -> float:
    """Return the seconds between two reports of a rank, as the heartbeat of the tree that is measured has it."""
    return Heartbeat(PlayedWorld(size, None, None), LIMIT_S)._interval_s


def watch(size: int) -> tuple[float, float, int]:
    """Return the seconds until all ranks are in, rank 0's share of a core afterwards, and how many could not come."""
    context = multiprocessing.get_context("fork")
    invitations, answers = context.Queue(), context.Queue()
    other = context.Process(target=play, args=(invitations, answers))
    other.start()
    beat = Heartbeat(PlayedWorld(size, invitations, answers), LIMIT_S)
    started = time.monotonic()
    missing = beat.start()
    came = time.monotonic() - started
    time.sleep(1.0)
    used, began = time.process_time(), time.monotonic()
    time.sleep(max(SECONDS, 3 * beat._interval_s))
    share = (time.process_time() - used) / (time.monotonic() - began)
    beat.close()
    other.kill()
    other.join()
    return came, share, len(missing)


def be_a_rank(output: str) -> None:
    """Start, sleep and reduce; rank 0 writes what it took."""
    started = time.perf_counter()
    from hvdtrain.world import init

    world = init()
    marks = {"Horovod's start, s": time.perf_counter() - started}
    began = time.perf_counter()
    beat = Heartbeat(world, LIMIT_S)
    beat.start()
    marks["meeting of the watch, ms"] = 1e3 * (time.perf_counter() - began)
    began = time.perf_counter()
    for i in range(5):
        world.together(lambda: None, f"agreement.{i}")
    marks["an agreement, ms"] = 1e3 * (time.perf_counter() - began) / 5
    began = time.perf_counter()
    world.all_gather_object({"host": "x" * 300}, "gather")
    marks["a gather of 300 bytes of each, ms"] = 1e3 * (time.perf_counter() - began)
    tensor, times = torch.zeros(1024), []
    for _ in range(3):
        world.all_reduce(tensor, "sum", "steps")
    used, began = time.process_time(), time.perf_counter()
    while time.perf_counter() - began < SECONDS:
        time.sleep(0.2)
        at = time.perf_counter()
        world.start_all_reduce_(tensor, "sum", "steps")()
        times.append(time.perf_counter() - at)
        if bool(world.all_reduce(float(time.perf_counter() - began >= SECONDS), "max", "over")):
            break
    marks["an all-reduce of 4 KiB, ms"] = 1e3 * statistics.median(times)
    marks["rank 0's processor time, % of a core"] = 100 * (time.process_time() - used) / (time.perf_counter() - began)
    if world.rank == 0:
        Path(output).write_text(json.dumps(marks))
    world.barrier("end")
    beat.close()


def ranks(size: int, controller: str) -> dict[str, float]:
    """Return what real ranks on this machine took."""
    launch = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(size)]
    launch = launch if controller == "mpi" else ["horovodrun", "--gloo", "--disable-cache", "-np", str(size)]
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "marks.json"
        words = [sys.executable, __file__, "--be-a-rank", str(output)]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", "OMPI_MCA_mpi_yield_when_idle": "1"}
        done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=400, env=variables)
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-2000:])
        return json.loads(output.read_text())


def fitted(sizes: list[int], values: list[float]) -> str:
    """Return how a figure grows, and what it would be with 1,024 ranks; nothing is taken to shrink."""
    mean = statistics.mean(values)
    found = [(float(np.std(values)), f"{mean:.3g}, and does not grow")]
    for name, of in (("log2 N", math.log2), ("N", float)):
        x = np.array([of(size) for size in sizes])
        slope, start = np.polyfit(x, np.array(values), 1)
        error = float(np.sqrt(np.mean((start + slope * x - values) ** 2)))
        if slope > 0:
            found.append((error, f"{start:.3g} + {slope:.3g} {name}; at 1,024: {start + slope * of(1024):.3g}"))
    return min(found)[1]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--watch", type=int, nargs="*", default=[8, 32, 128, 512, 1024])
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--controllers", nargs="+", default=["mpi", "gloo"])
    parser.add_argument("--be-a-rank")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if given.be_a_rank:
        be_a_rank(given.be_a_rank)
        return
    rows = [machine.describe(), "", "the watch of rank 0: ranks, s until all are in, % of a core, ranks left outside"]
    for size in given.watch:
        came, share, missing = watch(size)
        rows.append(f"{size:6} {came:8.3f} {share:8.2%} {missing:6}")
        print(rows[-1], file=sys.stderr, flush=True)
    for controller in given.controllers if given.ranks else []:
        rows += ["", f"real ranks, {controller}: {', '.join(map(str, given.ranks))}"]
        found = []
        for size in given.ranks:
            found.append(ranks(size, controller))
            print(controller, size, found[-1], file=sys.stderr, flush=True)
        for name in found[0]:
            values = [marks[name] for marks in found]
            numbers = " ".join(f"{value:9.3g}" for value in values)
            rows.append(f"{name:38} {numbers}   {fitted(given.ranks, values)}")
    print("\n".join(rows))
    if given.output:
        given.output.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
