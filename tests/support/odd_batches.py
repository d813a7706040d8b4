"""Batches as users' collate functions return them, in a file that worker processes import."""

import collections
import dataclasses
import types
from typing import NamedTuple

import torch


@dataclasses.dataclass
class Record:
    x: torch.Tensor
    inner: dict


@dataclasses.dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    name: str = "frozen"


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Encoding(collections.UserDict):
    """As transformers' tokenizers return: no dict, and more than its items."""

    def __init__(self, data=None, encodings=None):
        super().__init__(data)
        self.encodings = encodings


class Output(collections.OrderedDict):
    """As transformers' models return: items that are attributes, too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        object.__setattr__(self, key, value)


class Listed(list):
    """A list with something of its own."""

    def __init__(self, values, name):
        super().__init__(values)
        self.name = name


class Image(torch.Tensor):
    """A tensor of a class of its own."""


class Strict(tuple):
    """A tuple that is made of two things, as many libraries' are."""

    __slots__ = ()

    def __new__(cls, one, other):
        return super().__new__(cls, (one, other))


def x():
    return torch.arange(6.0).view(3, 2)


# Kind -> a batch of it.
BATCHES = {
    "tensor": x,
    "list": lambda: [x(), "text", 3],
    "tuple": lambda: (x(), None),
    "named tuple": lambda: Pair(x(), torch.zeros(3)),
    "dictionary": lambda: {"x": x(), "names": ["a", "b", "c"]},
    "ordered dictionary": lambda: collections.OrderedDict(x=x()),
    "default dictionary": lambda: collections.defaultdict(list, x=x()),
    "user's dictionary": lambda: Encoding({"x": x()}, encodings="kept"),
    "attributes": lambda: Output(x=x()),
    "frozen mapping": lambda: types.MappingProxyType({"x": x()}),
    "list with a name": lambda: Listed([x()], "named"),
    "strict tuple": lambda: Strict(x(), 1),
    "dataclass": lambda: Record(x(), {"y": [x(), Frozen(x())]}),
    "frozen dataclass": lambda: Frozen(x()),
    "packed sequence": lambda: torch.nn.utils.rnn.pack_sequence([x(), x()[:2]]),
    "sparse": lambda: (x().to_sparse(), x()),
    "sparse rows": lambda: x().to_sparse_csr(),
    "quantized": lambda: torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8),
    "own class": lambda: x().as_subclass(Image),
    "parameter": lambda: torch.nn.Parameter(x()),
    "of a graph": lambda: x().requires_grad_() * 2,
    "conjugate": lambda: torch.complex(x(), x()).conj(),
    "transposed": lambda: x().t(),
    "expanded": lambda: x()[:1].expand(4, 2),
    "one number": lambda: torch.tensor(3.0),
    "nothing": lambda: torch.zeros(0, 3),
    "bits": lambda: x() > 2,
    "bfloat16": lambda: x().bfloat16(),
    "eight bits": lambda: x().to(torch.float8_e4m3fn),
    "unsigned": lambda: x().to(torch.uint16),
}


class Kinds:
    """A data set of batches of hvdtrain's own kind: batch i is of kind i."""

    def __len__(self):
        return len(BATCHES)

    def num_targets(self, indices):
        return len(indices)

    def batch(self, indices):
        return list(BATCHES.values())[int(indices[0])]()


class Unsendable:
    """A batch that no process can give to another."""

    def __len__(self):
        return 4

    def num_targets(self, indices):
        return len(indices)

    def batch(self, indices):
        return x(), {1: lambda: 0, 2: Wordless()}.get(int(indices[0]), 1)


class Wordless:
    """What raises an error that says nothing when it is pickled."""

    def __reduce__(self):
        raise ValueError
