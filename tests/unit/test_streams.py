"""What a stream of the user's own goes on with, told to torch's allocator: on tensors of a GPU without storage."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.world.streams import keep_for_stream


class Recorded(TorchDispatchMode):
    """Notes for which streams the memory of which tensors is kept."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.record_stream.default:
            self.found.append((tuple(args[0].shape), args[1].stream_id))
            return None
        return func(*args, **(kwargs or {}))


def stream(number):
    return torch.Stream(stream_id=number, device_index=0, device_type=1)  # of CUDA


@pytest.mark.parametrize(("current", "expected"), [(0, []), (7, [((2,), 7), ((3, 4), 7)])])
def test_a_result_is_kept_for_a_stream_that_is_not_the_default_one(monkeypatch, current, expected):
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream(current))
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: stream(0))
    with FakeTensorMode(), Recorded() as recorded:
        keep_for_stream(torch.empty(2, device="cuda"))
        keep_for_stream((torch.empty(3, 4, device="cuda"), torch.empty(1, dtype=torch.int32)))  # of an all-to-all
        keep_for_stream(torch.empty(5))
    assert recorded.found == expected
