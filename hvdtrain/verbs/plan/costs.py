"""What each way to average did to the held-out loss where it was measured, by the project's own benchmarks.

Small decoders, a few hundred steps, AdamW: an order of size, and no promise for another model. How far the ranks of
local updates drift apart depends on the period and the learning rate; long trainings lose less than short ones.
"""

from __future__ import annotations

from dataclasses import dataclass

from hvdtrain.settings.compression import parse_compression
from hvdtrain.verbs.plan.methods import Method


@dataclass(frozen=True)
class LossChange:
    """Measured."""

    change: float
    """Of the held-out loss after as many steps, as a share of that of exact averages: 0.01 is 1 % worse."""
    where: str
    """The file in benchmarks/results that has it, and what was measured."""

    def __str__(self) -> str:
        return f"{round(self.change, 3) + 0.0:+.1%}"  # a rounded -0.0 is +0.0 %


_POWERSGD = "powersgd_loss.txt: rank {}, embeddings exact, 500 steps, 20 of them exact, 2 seeds"
_TOPK = "wire_loss.txt: {} %, 200 steps, the first 20 exact, 2 seeds"
_OF_FORMATS = {
    ("none", 0): LossChange(0.0, ""),
    ("fp16", 0): LossChange(-0.0002, "compression.txt: 3 seeds, within their spread"),
    ("bf16", 0): LossChange(0.0067, "slow_links.txt: 300 steps, 1 seed"),
    ("int8", 0): LossChange(0.0057, "wire_loss.txt: 200 steps, 2 seeds"),
    ("powersgd", 4): LossChange(0.0463, _POWERSGD.format(4)),
    ("powersgd", 8): LossChange(0.0170, _POWERSGD.format(8)),
    ("powersgd", 16): LossChange(0.0069, _POWERSGD.format(16)),
    ("topk", 0.01): LossChange(0.1195, _TOPK.format(1)),
    ("topk", 0.1): LossChange(0.0489, _TOPK.format(10)),
}
_LOCAL = {
    "average": LossChange(0.0620, "local_outer.txt: 1,500 steps, a period of 20, 2 ranks, 1 seed"),
    "nesterov": LossChange(0.0312, "local_outer.txt: 1,500 steps, a period of 20, 2 ranks, 1 seed"),
}


def loss_change(method: Method) -> LossChange | None:
    """Return what was measured of a method, None where nothing was."""
    compression = parse_compression(method.compression)
    if method.period is None:
        return _OF_FORMATS.get(compression)
    return _LOCAL[method.outer] if compression[0] == "none" else None
