"""Data as users write it, in a file that worker processes import."""

import os
import random
import signal
import threading
import time
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset


class Pair(NamedTuple):
    """A batch with names."""

    image: torch.Tensor
    label: torch.Tensor


class Augmented(Dataset):
    """Sample i is what it draws by each of three libraries, its number, and the process that read it."""

    def __init__(self, size=21):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        if i >= self.size:
            raise IndexError(i)
        drawn = torch.tensor([torch.rand(()).item(), np.random.rand(), random.random()], dtype=torch.float64)
        return {"drawn": drawn, "more": Pair(torch.full((2, 3), i), i), "name": f"sample {i}", "process": os.getpid()}


class Bad(Dataset):
    """Something happens at sample 5."""

    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 16

    def __getitem__(self, i):
        if i == 5:
            if self.kind == "raise":
                raise ValueError("sample 5 is broken")
            if self.kind == "odd":
                raise OddError(threading.Lock())
            if self.kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.kind == "exit":
                os._exit(3)
            time.sleep(1000)
        return i


class OddError(Exception):
    """An exception that cannot be pickled."""


class Locked(Augmented):
    """Cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


class Counting(IterableDataset):
    """Yields 0 to n - 1 with what was drawn."""

    def __init__(self, size, yields=None):
        self.size = size
        self.yields = size if yields is None else yields
        self.began = []

    def __len__(self):
        return self.size

    def __iter__(self):
        self.began.append(0)
        for i in range(self.yields):
            yield i, torch.rand(())


class Vectors(Dataset):
    """Four numbers and what is to be predicted from them, with noise that each sample draws."""

    def __init__(self, size=30, seed=0):
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(seed))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + random.random() + torch.randn(4), self.x[i].sum(0, keepdim=True)


class Endless:
    """Yields ever more; says how far it is, and can go on from there."""

    def __init__(self, vectors=False):
        self.vectors = vectors
        self.next = 0
        self.yielded = 0

    def __iter__(self):
        while True:
            value = self.next
            self.next += 1
            self.yielded += 1
            if self.vectors:
                x = torch.randn(4)
                yield x, x.sum(0, keepdim=True) + value % 3
            else:
                yield value, torch.rand(())

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]
