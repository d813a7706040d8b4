"""Causal attention on CPUs: torch's own kernel against what else torch's operations make of it, one thread.

    nice -n -20 python benchmarks/attention.py --output benchmarks/results/attention.txt
    nice -n -20 python benchmarks/attention.py --precision bf16 --output benchmarks/results/attention_bf16.txt

Forward and backward, as a decoder calls it: heads lie beside each other in each token. The candidates take turns. What
is measured is processor time, which counts less of what else runs on the machine than the clock does.

- torch: `scaled_dot_product_attention`, which takes 32 queries of one head at a time (64 from 192 tokens on).
- torch, copied: the same, of heads that were copied together before.
- whole: products of all queries with all keys, by `torch.bmm` and autograd.
- hvdtrain: what the trainer puts in torch's place in bf16 where the CPU multiplies it (hvdtrain/models/attention.py).
- blocks of N: N queries of all heads at a time with the keys that they see, by `torch.bmm`; the weights are computed
  again in the backward pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

from hvdtrain.models.attention import use_onednn_attention  # noqa: E402
from hvdtrain.process.launch import prepare_process  # noqa: E402

# Samples, tokens, heads of queries, heads of keys, numbers a head.
SHAPES = (
    *((8, 128, 4, 4, 64), (16, 128, 4, 4, 64), (16, 128, 8, 2, 32), (16, 256, 8, 8, 32), (4, 512, 4, 4, 64)),
    (1, 2048, 4, 4, 64),
)


def hidden(first: int, last: int, like: Tensor) -> Tensor:
    """Return what is added so that queries first to last - 1 do not see the keys behind them."""
    return torch.full((last - first, last - first), -torch.inf, dtype=like.dtype).triu(1)


class Blocks(torch.autograd.Function):
    """Softmax of q k' over the keys up to each query's own, times v, a block of queries of all heads at a time.

    With P the weights and g the gradient of the output: dv = P' g, ds = P (g v' - rowsum(g y)), dq = ds k, dk = ds' q.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, size: int) -> Tensor:
        """Map `(B, H, T, D)` and twice `(B, K, T, D)` to `(B, H, T, D)`."""
        samples, heads, tokens, width = query.shape
        groups = samples * key.shape[1]
        q = (query * width**-0.5).contiguous().view(groups, -1, tokens, width)
        k, v = (tensor.contiguous().view(groups, tokens, width) for tensor in (key, value))
        y, log_sums = torch.empty_like(q), q.new_empty(*q.shape[:-1], 1)
        for first in range(0, tokens, size):
            last = min(first + size, tokens)
            scores = torch.bmm(q[:, :, first:last].reshape(groups, -1, width), k[:, :last].transpose(1, 2))
            by_query = scores.view(groups, -1, last - first, last)
            by_query[..., first:] += hidden(first, last, scores)
            weights = torch.softmax(scores, -1)
            # Every query sees the first key: its score less the logarithm of its weight.
            log_sums[:, :, first:last] = by_query[..., :1] - weights.view_as(by_query)[..., :1].log()
            y[:, :, first:last] = torch.bmm(weights, v[:, :last]).view(groups, -1, last - first, width)
        ctx.save_for_backward(q, k, v, y, log_sums)
        ctx.size = size
        return y.view(samples, heads, tokens, width)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        q, k, v, y, log_sums = ctx.saved_tensors
        groups, _, tokens, width = q.shape
        g = gradients[0].contiguous().view_as(q)
        along = (g * y).sum(-1, keepdim=True)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for first in range(0, tokens, ctx.size):
            last = min(first + ctx.size, tokens)
            rows, seen = slice(first, last), slice(0, last)
            queries, above = (tensor[:, :, rows].reshape(groups, -1, width) for tensor in (q, g))
            weights = torch.bmm(queries, k[:, seen].transpose(1, 2))
            by_query = weights.view(groups, -1, last - first, last)
            by_query.sub_(log_sums[:, :, rows])
            by_query[..., first:] += hidden(first, last, weights)
            weights.exp_()
            dv[:, seen].baddbmm_(weights.transpose(1, 2), above)
            change = torch.bmm(above, v[:, seen].transpose(1, 2))
            change.view_as(by_query).sub_(along[:, :, rows])
            change.mul_(weights)
            dq[:, :, rows] = torch.bmm(change, k[:, seen]).view(groups, -1, last - first, width)
            dk[:, seen].baddbmm_(change.transpose(1, 2), queries)
        samples, _, _, _ = gradients[0].shape
        dq = dq.mul_(width**-0.5).view_as(gradients[0])
        return dq, *(tensor.view(samples, -1, tokens, width) for tensor in (dk, dv)), None


def torchs(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return torch's own."""
    use_onednn_attention(False)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def ours(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return hvdtrain's."""
    use_onednn_attention(True)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1])


def copied(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return torch's own, of heads that were copied together."""
    return torchs(query.contiguous(), key.contiguous(), value.contiguous())


def whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return it by products of all queries with all keys."""
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(2, 3)
    return torch.softmax(scores + hidden(0, query.shape[2], scores), -1) @ value


def in_blocks(size: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return it in blocks of queries."""
    y: Tensor = Blocks.apply(query, key, value, size)  # type: ignore[no-untyped-call]
    return y


CANDIDATES: dict[str, Callable[..., Tensor]] = {
    "torch": torchs,
    "torch, copied": copied,
    "hvdtrain": ours,
    "whole": whole,
    **{f"blocks of {size}": partial(in_blocks, size) for size in (32, 64, 128)},
}


def measure(shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> list[str]:
    """Return the rows of one shape."""
    samples, tokens, heads, kv_heads, width = shape
    inputs = [
        torch.randn(samples, tokens, count, width, dtype=dtype).transpose(1, 2).requires_grad_()
        for count in (heads, kv_heads, kv_heads)
    ]
    gradient = torch.randn(samples, tokens, heads, width, dtype=dtype).transpose(1, 2)

    def work(attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(*inputs), inputs, gradient)

    absolute, relative = (1e-4, 1e-4) if dtype == torch.float32 else (0.3, 0.1)
    candidates = {name: it for name, it in CANDIDATES.items() if it is not ours or dtype == torch.bfloat16}
    for attention in candidates.values():
        torch.testing.assert_close(work(attention), work(torchs), atol=absolute, rtol=relative)
    forward = machine.take_turns([partial(attention, *inputs) for attention in candidates.values()], repeats)
    both = machine.take_turns([partial(work, attention) for attention in candidates.values()], repeats)
    rows = [f"{samples} x {tokens} tokens, {heads} heads of {width}, {kv_heads} of keys and values"]
    for name, ahead, taken in zip(candidates, forward, both, strict=True):
        ratios = [a / b for a, b in zip(taken, both[0], strict=True)]
        times = (machine.spread([1e3 * s for s in measured], 1) for measured in (ahead, taken))
        rows.append(f"{name:20} {' '.join(f'{cell:>22}' for cell in (*times, machine.spread(ratios, 2)))}")
    return [*rows, ""]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.precision]
    head = f"{given.precision:20} {'forward, ms':>22} {'with backward, ms':>22} {'of the time of torch':>22}"
    about = "processor time, in turns; median [quartiles]"
    rows = [row for shape in SHAPES for row in measure(shape, dtype, given.repeats)]
    table = "\n".join((machine.describe(), "", about, "", head, "", *rows)).rstrip()
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    prepare_process()
    main()
