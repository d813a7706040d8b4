"""A world whose ranks are threads of one process: all that a further back end needs, and real sums in milliseconds."""

import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from hvdtrain.process.launch import Launch
from hvdtrain.process.progress import Progress
from hvdtrain.world import World

SECONDS = 60.0  # a rank may compile meanwhile, on a machine that is busy


class Meeting:
    """Where the ranks' contributions lie: one list for each collective, by its name and how often it has been used."""

    def __init__(self, size):
        self.size = size
        self.parts = {}
        self.taken = {}
        """How many ranks have had what all brought: a long training would keep every message."""
        self.failed = False
        self.condition = threading.Condition()

    def bring(self, key, rank, value):
        with self.condition:
            self.parts.setdefault(key, {})[rank] = value
            self.condition.notify_all()

    def fail(self):
        with self.condition:
            self.failed = True
            self.condition.notify_all()

    def take(self, key):
        """Return every rank's part, in the order of the ranks."""
        deadline = time.monotonic() + SECONDS
        with self.condition:
            while len(self.parts[key]) < self.size:
                if self.failed:
                    raise RuntimeError("another rank has failed")
                if not self.condition.wait(max(0.0, deadline - time.monotonic())):
                    missing = sorted(set(range(self.size)) - set(self.parts[key]))
                    raise TimeoutError(f"ranks {missing} never came to {key}")
            found = [self.parts[key][rank] for rank in range(self.size)]
            self.taken[key] = self.taken.get(key, 0) + 1
            if self.taken[key] == self.size:
                del self.parts[key], self.taken[key]
            return found


class ThreadWorld(World):
    """One of several ranks that are threads."""

    def __init__(self, rank, meeting):
        self.rank = self.local_rank = rank
        self.size = self.local_size = meeting.size
        self.device = torch.device("cpu")
        self.launch = Launch("threads", rank, meeting.size, rank, meeting.size)
        self.progress = Progress()
        self.sent = []
        """Names of this rank's collectives, in the order of their start."""
        self._meeting = meeting
        self._uses = {}

    def _start(self, name, value, finish):
        number = self._uses[name] = self._uses.get(name, 0) + 1
        self.sent.append(name)
        if isinstance(value, torch.Tensor):
            self.hand(value, name)
        self._meeting.bring((name, number), self.rank, value)
        return lambda: finish(self._meeting.take((name, number)))

    def start_all_reduce_(self, tensor, op, name):
        assert tensor.is_contiguous()

        def finish(parts):
            assert tensor.dtype != torch.bfloat16 or self.adds_bfloat16, name
            if tensor.dtype == torch.bfloat16:
                parts = [part.float() for part in parts]
            kinds = {(part.dtype, part.shape) for part in parts}
            assert len(kinds) == 1, f"{name}: {kinds}"
            if op in ("min", "max"):
                total = torch.stack(parts).amax(0) if op == "max" else torch.stack(parts).amin(0)
            else:
                total = sum(parts[1:], parts[0].clone())
            return tensor.copy_(total / self.size if op == "mean" else total)

        return self._start(name, tensor.clone(), finish)

    def start_all_gather(self, tensor, name):
        return self._start(name, tensor.clone(), torch.cat)

    def start_all_to_all(self, tensor, name):
        def finish(parts):
            return torch.cat([part.chunk(self.size)[self.rank] for part in parts])

        return self._start(name, tensor.clone(), finish)

    def all_reduce_among(self, ranks, tensor, name, op="sum"):
        raise NotImplementedError

    def broadcast_pickled(self, value, name, root):
        return self._start(name, pickle.dumps(value), lambda parts: pickle.loads(parts[root]))()

    def all_gather_pickled(self, value, name):
        return self._start(name, pickle.dumps(value), lambda parts: [pickle.loads(part) for part in parts])()

    def start_broadcast_(self, tensor, name, root=0):
        return self._start(name, tensor.clone(), lambda parts: tensor.copy_(parts[root]))


def run_ranks(size, work):
    """Run `work(world)` on so many ranks and return what each returned; raises the first rank's own exception."""
    meeting = Meeting(size)

    def guarded(rank):
        try:
            return work(ThreadWorld(rank, meeting))
        except BaseException:
            meeting.fail()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
    torch.compiler.set_stance("default")  # two threads that set it for a while may leave each other's behind
    own = [error for error in errors if "another rank has failed" not in str(error)]
    if errors:
        raise (own or errors)[0]
    return [future.result() for future in futures]
