"""Buffers of gradients lie in huge pages, and are what torch's would be."""

import gc
import itertools
import mmap
from pathlib import Path

import pytest
import torch

from hvdtrain.world import huge_pages

CPU = torch.device("cpu")
COUNT = 3 << 20
ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def mapping_of(address: int) -> tuple[int, int]:
    """Return the KiB of the mapping that holds an address, and how many of them lie in huge pages."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        first, _, end = line.split()[0].partition("-")
        if end and int(first, 16) <= address < int(end, 16):
            fields = dict(line.split(":") for line in itertools.takewhile(lambda line: "VmFlags" not in line, lines))
            return int(fields["Size"].split()[0]), int(fields["AnonHugePages"].split()[0])
    return 0, 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 1000, COUNT, COUNT + 1])
def test_it_is_what_torch_makes(dtype: torch.dtype, count: int) -> None:
    buffer = huge_pages.zeros(count, dtype, CPU)
    assert buffer.shape == (count,)
    assert torch.equal(buffer, torch.zeros(count, dtype=dtype))
    assert buffer.add_(1).sum(dtype=torch.float64) == count
    assert buffer.is_contiguous()
    assert not buffer.requires_grad


@pytest.mark.parametrize("count", [80_000, 600_000, 16 << 20])
def test_it_lies_in_huge_pages(count: int) -> None:
    """Also one that fills no page: the gradients of the textbook's network, 437 kB."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or not ENABLED.exists() or "[never]" in ENABLED.read_text():
        pytest.skip("this kernel gives no huge pages")
    buffer = huge_pages.zeros(count, torch.float32, CPU)
    assert buffer.data_ptr() % (2 << 20) == 0
    assert mapping_of(buffer.data_ptr())[1] == 0, "it takes room before it is written to"
    buffer.fill_(1)
    # Where memory is in pieces the kernel gives fewer than all, and none at all hardly ever.
    assert mapping_of(buffer.data_ptr())[1] >= max(2 << 10, buffer.nbytes >> 12)


def test_its_memory_is_given_back() -> None:
    buffer = huge_pages.zeros(256 << 20, torch.uint8, CPU)
    address, part = buffer.data_ptr(), buffer[:10]
    del buffer
    gc.collect()
    part.fill_(3)
    assert mapping_of(address)[0] >= 256 << 10, "a part of it keeps it"
    del part
    gc.collect()
    assert mapping_of(address)[0] < 256 << 10
