"""Every type and layout travels bit for bit and is reduced, or is refused with its name."""

import itertools
import math
import warnings

import pytest
import torch
from thread_world import run_ranks

from hvdtrain.errors import UsageError
from hvdtrain.world.carriers import for_reduction

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
COMPLEX = [torch.complex64, torch.complex128]
ALL = [*FLOATS, *INTEGERS, *COMPLEX, torch.bool, torch.uint64]


def of_rank(rank, dtype, shape=(3, 4)):
    values = torch.randint(0, 5, shape, generator=torch.Generator().manual_seed(rank)) + rank
    values = values + 1j * values.flip(0) if dtype.is_complex else values
    return (values % 2 if dtype == torch.bool else values).to(dtype)


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "transposed": lambda t: t.t().contiguous().t(),
    "strided": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "scalar": lambda t: t[0, 0].clone(),
    "empty": lambda t: t[:0],
    "expanded": lambda t: t[:1].clone().expand(5, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_broadcast(dtype, layout):
    def work(world):
        tensor = LAYOUTS[layout](of_rank(world.rank, dtype))
        stride = tensor.stride()
        world.broadcast_tensors({"buffer": tensor}, "test")
        assert tensor.stride() == stride
        return tensor

    first, second = run_ranks(2, work)
    expected = LAYOUTS[layout](of_rank(0, dtype)).contiguous().reshape(-1).view(torch.uint8)
    for tensor in (first, second):
        assert torch.equal(tensor.contiguous().reshape(-1).view(torch.uint8), expected)


def test_broadcast_of_a_conjugate():
    def work(world):
        tensor = of_rank(world.rank, torch.complex64).conj()
        world.broadcast_tensors({"buffer": tensor}, "test")
        return tensor.resolve_conj()

    for tensor in run_ranks(2, work):
        assert torch.equal(tensor, of_rank(0, torch.complex64).conj().resolve_conj())


@pytest.mark.parametrize("op", ["sum", "mean", "min", "max"])
@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_reduction(dtype, op):
    def work(world):
        tensor = of_rank(world.rank, dtype).t()
        before = tensor.clone()
        try:
            result = world.all_reduce(tensor, op, "counts of words")
        except UsageError as error:
            return str(error)
        assert torch.equal(tensor.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))
        return result

    refused = {
        "mean": [*INTEGERS, torch.bool, torch.uint64],
        "sum": [torch.bool, torch.uint64],
        "min": [*COMPLEX, torch.uint64],
        "max": [*COMPLEX, torch.uint64],
    }[op]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    parts = torch.stack([of_rank(rank, dtype).t().to(wide) for rank in range(2)])
    for result in run_ranks(2, work):
        if dtype in refused:
            assert result.startswith(f"'counts of words' is {dtype}")
            continue
        expected = {"sum": parts.sum, "mean": parts.mean}.get(op) or getattr(parts, f"a{op}")
        assert result.dtype == dtype
        assert torch.equal(result.to(wide), expected(0).to(dtype).to(wide))


def quantized_eye():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to drop these
        return torch.quantize_per_tensor(torch.eye(3), 0.1, 0, torch.quint8)


def test_what_has_no_numbers_of_its_own_is_refused_by_name():
    quantized = quantized_eye()

    def work(world):
        dense = torch.eye(3)
        said = []
        overlapping = torch.zeros(5).as_strided((3, 3), (1, 1))
        for tensor in (dense.to_sparse(), quantized, overlapping):
            with pytest.raises(UsageError) as caught:
                world.broadcast_tensors({"layer.mask": tensor}, "test")
            said.append(str(caught.value))
        with pytest.raises(UsageError, match=r"'mask' is a torch\.sparse_coo tensor"):
            world.all_reduce(dense.to_sparse(), "sum", "mask")
        return said

    for said in run_ranks(2, work):
        assert "'layer.mask' is a torch.sparse_coo tensor" in said[0]
        assert "'layer.mask' is a quantized tensor" in said[1]
        assert "'layer.mask' overlaps itself" in said[2]


def test_a_models_buffers_of_all_types():
    def work(world):
        model = torch.nn.Module()
        for i, dtype in enumerate(ALL):
            model.register_buffer(f"b{i}", of_rank(world.rank, dtype))
        world.broadcast_state(model)
        return [buffer.view(torch.uint8) for buffer in model.buffers()]

    for buffers in run_ranks(2, work):
        assert all(torch.equal(b, of_rank(0, dtype).view(torch.uint8)) for b, dtype in zip(buffers, ALL, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("op", ["min", "max"])
def test_the_order_of_floats_is_kept_and_nan_stands_out(dtype, op):
    special = [math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0, 1e-7, -1e-7, 6e4, -6e4, math.nan, -math.nan]
    numbers = torch.tensor(special, dtype=dtype)
    for pair in itertools.product(numbers, repeat=2):
        sent, restore = for_reduction(torch.stack(pair), op, "pair")
        found = restore((sent.amin(0) if op == "min" else sent.amax(0))[None])
        expected = torch.stack(pair).amin(0) if op == "min" else torch.stack(pair).amax(0)
        assert found.dtype == dtype
        assert found == expected or bool(found.isnan() & expected.isnan())
    sent, restore = for_reduction(numbers, op, "same")
    assert torch.equal(restore(sent).nan_to_num(7.0), numbers.nan_to_num(7.0))
