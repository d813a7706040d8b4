"""Checks of random numbers: whom they belong to, and that no two ranks or micro-batches draw the same. Collective."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import Tensor

from hvdtrain.errors import listed
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.verbs.verify.nature import Nature
from hvdtrain.verbs.verify.table import Row

_NAME = "random numbers"


def check_random(nature: Nature) -> list[Row]:
    """9: each sample draws its own numbers, the same however a batch is cut; what cannot, differs on every rank."""
    world = nature.own.world
    broken = world.all_gather_object(_broken_by_cuts(world.device), "verify.random.cuts")
    of_rank = [_draw(world.device, 2 * world.rank + place) for place in (0, 1)]
    drawn = [draw for draws in world.all_gather_object(of_rank, "verify.random.ranks") for draw in draws]
    if any(broken):
        advice = "what a sample draws depends on its micro-batch: this is a bug of hvdtrain, please report it"
        return [Row(9, _NAME, "FAIL", "not those of samples", "", advice)]
    for source, values in zip(("torch", "numpy", "Python"), zip(*drawn, strict=True), strict=True):
        if len(set(values)) < len(values):
            advice = f"{source}'s generator is not seeded for each micro-batch: please report this bug of hvdtrain"
            return [Row(9, _NAME, "FAIL", f"{source}'s are the same everywhere", "", advice)]
    return [_case(nature)]


def _case(nature: Nature) -> Row:
    """Say which case the user's model is."""
    found = nature.randomness
    if found.repeated:
        advice = (
            f"{listed(found.repeated)} drew the same numbers in several micro-batches, from a torch.Generator of your"
            " own: seed it by the sample, or leave the generator out and each sample gets its own numbers"
        )
        return Row(9, _NAME, "warning", "repeated by a generator of its own", "", advice)
    if found.by_micro_batch:
        advice = (
            f"drawn from {listed(sorted(found.by_micro_batch))} by functions that do not know samples: different on"
            " every rank and in every micro-batch, and so not the same on another number of ranks. If that matters,"
            " draw with torch.rand, randn, randint, normal or bernoulli, the samples in the first dimension"
        )
        return Row(9, _NAME, "warning", "belong to micro-batches", "", advice)
    figure = "belong to samples" if found.is_by_sample else "none are drawn"
    return Row(9, _NAME, "pass", figure, "", "", 0.0)


def _draw(device: torch.device, number: int) -> tuple[float, float, float]:
    """Return what torch, numpy and Python draw for a micro-batch, by functions that do not know samples."""

    def draw() -> tuple[float, float, float]:
        return float(torch.rand(7)[0]), float(np.random.rand()), random.random()

    positions = torch.arange(4 * number, 4 * number + 4)
    return MicroBatchRandomness(device).run(positions, (0, 0), draw, lambda _: None)


def _broken_by_cuts(device: torch.device) -> bool:
    """Tell whether samples draw other numbers in a micro-batch of their own, or all the same."""

    def drawn(positions: Tensor) -> Tensor:
        randomness = MicroBatchRandomness(device)
        return randomness.run(positions, (0, 0), lambda: torch.rand(len(positions), 5, device=device), lambda _: None)

    everything = torch.arange(6)
    whole, parts = drawn(everything), [drawn(part) for part in (everything[:1], everything[1:3], everything[3:])]
    return not whole.equal(torch.cat(parts)) or len({str(row) for row in whole.tolist()}) < len(whole)
