"""How gradients are averaged over the ranks: what `World.wrap` is told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import nn

from hvdtrain.errors import ConfigError
from hvdtrain.world.buckets import FIRST_BUCKET_BYTES
from hvdtrain.world.codec import Codec
from hvdtrain.world.codecs import codec_of

NO_SQUARE = (
    "--health.noise-scale needs averaged, dense gradients in their own type: leave out --comm.op, --comm.compression"
    " and sparse embeddings"
)


@dataclass(frozen=True, kw_only=True)
class Averaging:
    """How gradients are averaged over the ranks."""

    accum_steps: int = 1
    """Backward passes in an optimizer step. They are summed before the average is taken: divide the loss by them.

    The gradients are averaged at the end of the last one. With 1, several passes before a step are right too, and each
    averages: all ranks must then make equally many."""
    compression: str | Codec = "none"
    """Format of the gradients on the wire: `fp16`, `powersgd:4` and so on as `--comm.compression` has them, or a codec,
    such as `PowerSGD(4, min_size=1000, warmup_steps=100)` or one of your own."""
    op: Literal["average", "adasum"] = "average"
    """adasum combines the ranks' gradients by their directions (arXiv:2006.02924) instead of averaging, before the
    optimizer sees them. All ranks then hold the same gradient, and what follows, such as clipping, sees that one."""
    bucket_bytes: int = 25 << 20
    """Gradients travel in parts of this size, each as soon as backward has finished it."""
    has_square: bool = False
    """Also average the squared norms of the ranks' own gradients, for the gradient noise scale."""
    gradient_as_bucket_view: bool = False
    """Let gradients move into the buffers that are sent as soon as these are complete: 4 bytes a parameter less, of 20
    with AdamW. A hook of yours that reads other parameters' `.grad` while backward runs then finds them on the wire."""
    follows_backward: bool = False
    """Lay the buckets out anew after the first step, in the order in which rank 0 has finished gradients. Between more
    than two ranks that changes last bits: who goes on where a run has stopped sets `bucket_order` to what it was."""
    shard: bool = False
    """Keep the optimizer's state in parts, one on each rank (`world/sharded.py`). The optimizer's groups then hold this
    rank's pieces, and their `grad` is its part of the mean: for the trainer, which clips and saves by them."""
    waits_for_caller: bool = False
    """Average in `synchronize`, or in `step`, alone where all gradients are so few that backward could send none of
    them before its end: then nothing is called for each of them. For the trainer, and for whoever calls `synchronize`
    once a step, after its last backward pass and before gradients are looked at."""
    offload: bool = False
    """Keep the optimizer's state in host memory, and take it to the parameters' device a part at a time."""
    warns_of_copies: bool = True
    """Say so where all ranks compute the same gradient in the first steps: they read the same samples, then. And where
    their optimizers' settings differ, such as the learning rate of a schedule that goes by each rank's own loss."""

    def __post_init__(self) -> None:
        for name in ("accum_steps", "bucket_bytes"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ConfigError(f"{name} = {value!r} must be a whole number greater than 0")
        if self.op not in ("average", "adasum"):
            raise ConfigError(f"op = {self.op!r} must be 'average' or 'adasum'")
        is_compressed = self.codec().name != "none"
        if self.op == "adasum" and is_compressed:
            raise ConfigError("--comm.op adasum works on full gradients: leave out --comm.compression")
        if self.has_square and (self.op == "adasum" or is_compressed):
            raise ConfigError(NO_SQUARE)

    def follows(self, parameters: Iterable[nn.Parameter]) -> bool:
        """Return whether what backward adds to their gradients is noted: not where all of it leaves at its end."""
        room = min(FIRST_BUCKET_BYTES, self.bucket_bytes)
        return not self.waits_for_caller or sum(parameter.nbytes for parameter in parameters) > room

    def codec(self) -> Codec:
        """Return the codec, a new one where it was named."""
        return codec_of(self.compression) if isinstance(self.compression, str) else self.compression

    def check_shared_with(self, later: Averaging) -> None:
        """Raise ConfigError where an optimizer that was wrapped later averages the same gradients in another way."""
        conflict = self._conflict_with(later)
        if conflict:
            raise ConfigError(
                f"this optimizer shares parameters with one that was wrapped later, and has {conflict}: a gradient"
                " is averaged in one way, so give wrap() the same for both, or use the later one only"
            )

    def _conflict_with(self, other: Averaging) -> str:
        """Say by which field one gradient cannot be averaged both ways; empty where it can."""
        if self.accum_steps != other.accum_steps:
            return f"accum_steps = {self.accum_steps}, the other {other.accum_steps}"
        if self.op != other.op:
            return f"op = {self.op}, the other {other.op}"
        if self.shard != other.shard:
            return f"shard = {self.shard}, the other {other.shard}"
        own, others = self.codec(), other.codec()
        if own is not others and (own.name != others.name or type(own) is not type(others)):
            return f"compression = {own.name}, the other {others.name}"
        return "squared norms to average, of all its parameters" if self.has_square or other.has_square else ""
