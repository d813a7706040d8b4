"""A rank for tests of the heartbeat: it beats and does something; its world is a folder that it shares with others."""

import os
import pickle
import signal
import sys
import time

import torch

from hvdtrain.process.launch import Launch
from hvdtrain.world import SoloWorld
from hvdtrain.world import heartbeat as module
from hvdtrain.world.heartbeat import Heartbeat


class FolderWorld(SoloWorld):
    """Objects go through files."""

    def __init__(self, folder, rank, size):
        super().__init__(torch.device("cpu"), Launch("none"))
        self.folder, self.rank, self.size, self.count, self.is_late = folder, rank, size, 0, False

    def all_gather_pickled(self, value, name):
        self.count += 1
        path = self.folder / f"{self.count}-{self.rank}"
        path.with_suffix(".part").write_bytes(pickle.dumps(value))
        path.with_suffix(".part").rename(path)
        others = [self.folder / f"{self.count}-{rank}" for rank in range(self.size)]
        while not all(other.exists() for other in others):
            time.sleep(0.01)
        return [pickle.loads(other.read_bytes()) for other in others]

    def broadcast_pickled(self, value, name, root):
        value = self.all_gather_pickled(value, name)[root]
        while self.is_late and not (self.folder / "come").exists():
            time.sleep(0.01)
        return value


def kill(beat, world):
    os.kill(os.getpid(), signal.SIGKILL)


def stop(beat, world):
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(beat, world):
    beat.fail(f"bad luck on rank {world.rank}", 7)


def fail_without_reader(beat, world):
    """The launcher is gone, and with it the reader of the pipes."""
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(reader)
    os.close(writer)
    fail(beat, world)


def fail_with_sleeping_reader(beat, world):
    """The pipe is full: no write ever returns."""
    _, writer = os.pipe()
    os.dup2(writer, 2)
    os.set_blocking(2, False)
    try:
        while True:
            os.write(2, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(2, True)
    fail(beat, world)


def hang_at_start(beat, world):
    world.progress.__init__()
    time.sleep(60)


def hang_at_end(beat, world):
    world.progress.leave()
    time.sleep(60)


def wait_for_others(beat, world):
    world.progress.enter("communication")
    time.sleep(60)


def fork_and_die(beat, world):
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    (world.folder / "child").write_text(str(child))
    os.kill(os.getpid(), signal.SIGKILL)


def break_watch(beat, world):
    beat._judge = None


def go_on(beat, world):
    pass


def come_late(beat, world):
    pass


def run(folder, rank, size, act):
    """Be a rank: meet the others, train for a while, act when told to, and go on until told that it is over."""
    with (folder / f"err-{rank}").open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    world = FolderWorld(folder, rank, size)
    world.is_late = act is come_late
    module._SECONDS_TO_LEAVE = 3.0
    beat = Heartbeat(world, limit_s=2.0)
    assert beat.start() == [], "a rank is not watched"
    beat.log_to(folder / f"log-{rank}")
    (folder / f"up-{rank}").touch()
    step, others = 0, size - 1 if rank == 0 else 1
    while not (folder / "over").exists():
        world.progress.begin_step(step)
        step += 1
        time.sleep(0.05)
        if [peer.place.step is None for peer in list(beat._peers.values())] == [False] * others:
            (folder / f"heard-{rank}").touch()
        if (folder / "go").exists():
            act(beat, world)
    world.progress.leave()
    beat.close()
