"""Which of GPT-3's sizes (arXiv:2005.14165, table 2.1) fit a card of 80 GB, and by which settings?

    python benchmarks/gpt3_memory.py --output benchmarks/results/gpt3_memory.txt

What `train --dry-run` says of memory, for ranks that need not be there: the decoder of `lm` in each size, one sample of
2,048 tokens at a time, AdamW, --train.precision bf16 (weights and state in fp32). Nothing is allocated. Activations are
traced with two and with four blocks, since every further block keeps as much; what comes and goes is that of four
blocks, which is more than it is behind the gradients of many.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import machine
import torch

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.process.launch import Launch
from hvdtrain.recipes.lm import lm
from hvdtrain.trainer import Job, Task
from hvdtrain.trainer.fakes import without_storage
from hvdtrain.trainer.memory import RESERVE, Memory, estimate, wire_bytes
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.sharded_memory import sharded_shares
from hvdtrain.world import SoloWorld

# Name, layers, width, heads. XL's 24 heads do not divide its width, nor 40 heads of 128 make the 5,140 printed there.
SIZES = (
    ("Small", 12, 768, 12),
    ("Medium", 24, 1024, 16),
    ("Large", 24, 1536, 16),
    ("XL", 24, 2048, 16),
    ("2.7B", 32, 2560, 32),
    ("6.7B", 32, 4096, 32),
    ("13B", 40, 5120, 40),
    ("175B", 96, 12288, 96),
)
VOCABULARY, LENGTH = 50257, 2048
CARD_GIB = 79.0  # what a card of 80 GB has for programs
RANKS = (8, 64, 1024)
TRACED = (2, 4)


class Ranks(SoloWorld):
    """Stands for many ranks where only their number matters."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.device("cpu"), Launch("none"))
        self.size = size


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of the table, as `lm` builds it, without storage."""

    shape: DecoderConfig

    def job(self, layers: int, ranks: int, *, blocks: bool = False, shard: bool = False) -> Job:
        """Return a training of so many blocks on so many ranks."""
        recipe = lm()
        shape = dataclasses.replace(self.shape, num_layers=layers, checkpoint_blocks=blocks)
        train = dataclasses.replace(
            recipe.train, precision="bf16", global_batch_size=ranks, micro_batch_size=1, accum_steps=None
        )
        optim = dataclasses.replace(recipe.optim, shard=shard)
        config = dataclasses.replace(recipe, train=train, model=shape, optim=optim)
        with without_storage():
            model = Decoder(shape, VOCABULARY, seed=0)
        tokens = torch.zeros(ranks, LENGTH, dtype=torch.int64)
        data = TensorSamples(tokens, tokens)
        losses = {"loss_sums": lambda model, batch: {"loss": model(*batch)}}
        return rehearse(Task(model=model, train_data=data, val_data=data, **losses), config, Ranks(ranks))

    def of_micro_batch(self, blocks: bool) -> tuple[int, int]:
        """Return the bytes that a micro-batch keeps for its backward pass, and those that come and go."""
        few, more = (estimate(self.job(n, 1, blocks=blocks)) for n in TRACED)
        assert few.activations is not None
        assert more.activations is not None
        a_block = (more.activations - few.activations) // (TRACED[1] - TRACED[0])
        return more.activations + (self.shape.num_layers - TRACED[1]) * a_block, more.transients

    def memory(self, ranks: int, kept: tuple[int, int], shard: bool, offload: bool = False) -> Memory:
        """Return what a rank needs; with `offload`, on its card."""
        job = self.job(self.shape.num_layers, ranks, shard=shard)
        model = job.task.model
        weights = sum(parameter.nbytes for parameter in model.parameters())
        wire, state, host = wire_bytes(job), 2 * weights, 0
        if shard:
            shares = sharded_shares(job, torch.optim.AdamW(model.parameters(), lr=1.0, foreach=False), model)
            of_each = {p: 2 * p.nbytes for p in model.parameters()}
            wire, state = shares.wire_bytes, shares.most_of(of_each)
            if offload:
                state, host = shares.most_at_once(of_each), state
        return Memory(weights, weights + wire, state, kept[0], 1, kept[1], host)


def fits(memory: Memory) -> bool:
    """Return whether a card holds it, with the reserve that training keeps."""
    return memory.total * (1 + RESERVE) <= CARD_GIB * 2**30


def row(name: str, layers: int, width: int, heads: int) -> str:
    """Return a size's line: GiB a rank by settings, those that fit marked."""
    size = Size(DecoderConfig(num_layers=layers, hidden_size=width, num_heads=heads))
    plain, blocks = (size.of_micro_batch(checkpointed) for checkpointed in (False, True))
    ways = [size.memory(8, plain, False), size.memory(8, blocks, False)]
    ways += [size.memory(ranks, blocks, True) for ranks in RANKS]
    offloaded = size.memory(RANKS[0], blocks, True, True)
    cells = [f"{way.total / 2**30:8.1f}{'*' if fits(way) else ' '}" for way in [*ways, offloaded]]
    state = [f"{way.optimizer / 2**30:8.2f}" for way in ways[1:]]
    return f"{name:>7} {ways[0].weights / 4e9:7.3f} {' '.join(cells)} {' '.join(state)}"


def main() -> None:
    """Compute, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    lines = [
        f"GiB a rank; * fits a card of 80 GB ({CARD_GIB:g} GiB, of which {RESERVE:.0%} of the need stay free)",
        "one sample of 2,048 tokens, AdamW, bf16 with weights and state in fp32; computed, not measured",
        "",
        "   size billion     data    blocks   sharded state, blocks checkp. offloaded     AdamW's state alone",
        "        weights parallel   checkp.  8 ranks  64 ranks 1024 ranks  8 ranks     whole  8 ranks 64 ranks    1024",
    ]
    for size in SIZES:
        lines.append(row(*size))
        print(lines[-1], flush=True)
    text = "\n".join([machine.describe(), "", *lines]) + "\n"
    print(text)
    if given.output:
        given.output.write_text(text)


if __name__ == "__main__":
    main()
