"""The settings of what travels between the ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hvdtrain.errors import ConfigError
from hvdtrain.settings.compression import EXACT, parse_compression, patterns_in
from hvdtrain.settings.fields import Section, setting


@dataclass(frozen=True, kw_only=True)
class CommConfig(Section):
    """What travels between the ranks."""

    compression: Literal["none", "fp16", "bf16", "int8", "powersgd:R", "topk:P"] | str = setting(
        "none", several_ranks=True
    )
    """Format of gradients on the wire. fp16 halves the bytes and rounds each gradient to 11 bits; bf16 halves them too,
    and rounds to 8 bits with the range of fp32. The others send an approximation and remember what it leaves out for
    later steps: int8 numbers of 8 bits, powersgd:4 matrices of rank 4 (arXiv:1905.13727), topk:0.01 the largest 1 % of
    the numbers of each tensor."""
    compression_min_size: int = setting(1024, above=0, several_ranks=True)
    """int8, powersgd and topk send tensors of fewer numbers as they are."""
    compression_warmup_steps: int = setting(0, minimum=0, several_ranks=True)
    """int8, powersgd and topk send everything as it is in so many steps of a run (or averages, of --comm.sync local)
    before they begin."""
    compression_exact: str = setting("auto", several_ranks=True)
    """Parameters that int8, powersgd and topk send as they are, by patterns of their names, as in
    "*embed*,lm_head.weight". auto: with powersgd the weights of embeddings and of the output layer; none: small ones
    alone."""
    bucket_mib: int = setting(25, above=0, maximum=1 << 20, changeable=True, several_ranks=True)
    """Gradients travel in parts of this size (the first of 1 MiB), each as soon as backward has finished it."""
    op: Literal["average", "adasum"] = setting("average", several_ranks=True)
    """adasum combines gradients by their directions (arXiv:2006.02924), before they are clipped; MPI and 2, 4, 8, ...
    ranks only."""

    sync: Literal["every-step", "local"] = setting("every-step", several_ranks=True)
    """every-step: gradients are averaged in each step. local: each rank takes --comm.period steps by itself, then what
    they have moved by is averaged: less talk, for slow networks (arXiv:1805.09767)."""
    period: int = setting(50, above=0, several_ranks=True)
    """Steps between two averages of --comm.sync local."""
    sync_warmup_steps: int = setting(0, minimum=0, several_ranks=True)
    """local: average after each of so many steps at first, without --comm.outer (arXiv:1808.07217)."""
    outer: Literal["average", "nesterov"] = setting("average", several_ranks=True)
    """local: take the mean update as it is, or as the gradient of SGD with Nesterov's momentum (DiLoCo,
    arXiv:2311.08105)."""
    outer_lr: float | None = setting(None, above=0, several_ranks=True)
    """local: by what the mean update is multiplied. None: 1, or 0.7 with --comm.outer nesterov."""
    outer_momentum: float | None = setting(None, minimum=0, below=1, several_ranks=True)
    """local: the momentum of --comm.outer nesterov; 0.9 in the paper, for hundreds of averages. None: 1 - outer_lr /
    sqrt(ranks), with which what all ranks move by alike counts sqrt(ranks) times in the long run."""
    fragments: int = setting(1, above=0, several_ranks=True)
    """local: average the model in so many parts, each once in a period and at a step of its own (arXiv:2501.18512)."""
    overlap_steps: int = setting(0, minimum=0, several_ranks=True)
    """local: steps that an average may take to arrive, while training goes on."""
    overlap_rule: Literal["mix", "delayed"] = setting("mix", several_ranks=True)
    """local: what stays of a rank's own weights when an average arrives late. mix: a share of them (arXiv:2501.18512).
    delayed: all that it has moved by since it sent (arXiv:2006.00441)."""
    overlap_mix: float = setting(0.5, minimum=0, below=1, several_ranks=True)
    """local: that share, of --comm.overlap-rule mix: 0 none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_compression(self.compression)
        patterns_in(self.compression_exact)
        if self.sync == "local" and self.fragments > self.period:
            raise ConfigError(
                f"--comm.fragments {self.fragments} need as many steps of a period, and --comm.period is {self.period}"
            )
        if self.sync == "local" and self.overlap_steps >= self.period:
            raise ConfigError(
                f"--comm.overlap-steps {self.overlap_steps} must be less than --comm.period {self.period}: an average"
                " arrives before the next one begins"
            )

    def unused(self) -> Iterator[tuple[str, str]]:
        """Yield what lays out buckets where there are none, and what belongs to local updates."""
        if parse_compression(self.compression)[0] in EXACT:
            for name in ("compression_min_size", "compression_warmup_steps", "compression_exact"):
                yield name, "it is for --comm.compression int8, powersgd and topk"
        if self.op == "adasum":
            yield "bucket_mib", "--comm.op adasum sends each gradient by itself"
        if self.sync != "local":
            names = ("period", "sync_warmup_steps", "outer", "outer_lr", "outer_momentum", "fragments")
            for name in (*names, "overlap_steps", "overlap_rule", "overlap_mix"):
                yield name, "it belongs to --comm.sync local"
            return
        if self.outer != "nesterov":
            yield "outer_momentum", "it belongs to --comm.outer nesterov"
        if not self.overlap_steps:
            for name in ("overlap_rule", "overlap_mix"):
                yield name, "it belongs to --comm.overlap-steps"
        elif self.overlap_rule != "mix":
            yield "overlap_mix", "it belongs to --comm.overlap-rule mix"
