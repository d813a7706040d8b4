"""Page-locked memory: in few blocks, whose parts are files' own; where there is none, plain memory and one sentence."""

import logging

import pytest
import torch

from hvdtrain.data import pinned as module
from hvdtrain.data.pinned import SMALL_BYTES, PinnedMemory, pinned

LARGE = SMALL_BYTES // 4  # numbers of fp32


@pytest.fixture
def allocated(monkeypatch):
    """Bytes of each piece of page-locked memory that was asked for, of which a torch for CPUs has none."""
    sizes, empty = [], torch.empty

    def note(*args, pin_memory=False, **kwargs):
        made = empty(*args, **kwargs)
        if pin_memory:
            sizes.append(made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", note)
    return sizes


def test_what_is_large_shares_blocks(allocated):
    """Each by itself, torch would round 154 MB up to 256, and so on: half as much again as there is."""
    memory, shapes = PinnedMemory(True), [(50_304, 768), *[(768, 768), (2048, 768)] * 8]
    tensors = [memory.empty(shape, torch.float32) for shape in shapes]
    whole = sum(tensor.nbytes for tensor in tensors)
    alone = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in tensors)
    assert sum(allocated) == memory.taken_bytes < min(alone, 1.3 * whole)
    assert len(allocated) < 4
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(tensors))  # none lies in another
    assert [tuple(tensor.shape) for tensor in tensors] == shapes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_a_tensor_is_written_to_a_file_without_its_block(allocated, dtype, tmp_path):
    memory = PinnedMemory(True)
    tensors = [memory.empty((2 * SMALL_BYTES,), dtype) for _ in range(2)]
    tensors[1].zero_()
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    torch.save(tensors[1], tmp_path / "file.pt")
    assert (tmp_path / "file.pt").stat().st_size < tensors[1].nbytes + 10_000
    assert torch.equal(torch.load(tmp_path / "file.pt", weights_only=True), tensors[1])


def test_strides_are_kept(allocated):
    weight = torch.randn(64, 64, 8, 16).to(memory_format=torch.channels_last)
    kept = PinnedMemory(True).empty_like(weight)
    assert kept.stride() == weight.stride()
    assert torch.equal(kept.copy_(weight), weight)


def test_what_is_small_or_empty_is_torchs_to_allocate(allocated):
    memory = PinnedMemory(True)
    assert memory.empty((3, 4), torch.float32).shape == (3, 4)
    assert memory.empty((0, 4), torch.float32).shape == (0, 4)
    assert memory.empty((), torch.float32).shape == ()
    assert memory.taken_bytes == 0


def test_a_block_goes_with_its_tensors(allocated):
    memory = PinnedMemory(True)
    for _ in range(50):
        memory.empty((4 * LARGE,), torch.float32)
    assert len(memory._blocks) <= 1  # the full ones are held by nobody


@pytest.mark.skipif(torch.cuda.is_available(), reason="this torch page-locks memory")
def test_where_there_is_none_copies_wait_and_it_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(module, "_said", [])
    with caplog.at_level(logging.WARNING, "hvdtrain"):
        tensor = PinnedMemory(True).empty((LARGE,), torch.float32)
        assert torch.equal(tensor.fill_(2.0), torch.full((LARGE,), 2.0))
        batch = torch.arange(3)
        assert pinned(batch) is batch
    assert len(caplog.records) == 1
    assert "is waited for" in caplog.text


def test_only_dense_tensors_in_host_memory_are_pinned():
    """A data set may hold its batches on the GPU already, or sparse: torch would refuse them."""
    for tensor in (torch.empty(3, device="meta"), torch.eye(3).to_sparse()):
        assert pinned(tensor) is tensor
