"""The check that an epoch visits each sample once, and that samples are the same on all ranks. Collective."""

from __future__ import annotations

import dataclasses

import torch

from hvdtrain.data.nested import tensors_in
from hvdtrain.data.order import SampleOrder
from hvdtrain.data.readers import read_samples
from hvdtrain.verbs.verify.nature import Nature
from hvdtrain.verbs.verify.table import Row
from hvdtrain.verbs.verify.trial import Trial
from hvdtrain.world import digest_of


def check_epoch(nature: Nature) -> list[Row]:
    """3: one epoch visits every sample exactly once, on any number of ranks; samples are the same on all ranks."""
    trial, world = nature.own, nature.own.world
    name = "an epoch visits each sample once"
    run = trial.together()
    read = sorted(sample for part in world.all_gather_object(run.read, "verify.read") for sample in part)
    wanted = torch.cat([run.job.order.global_batch(step) for step in range(trial.steps)]).sort().values.tolist()
    if read != wanted:
        twice, never = len(read) - len(set(read)), len(set(wanted) - set(read))
        advice = f"the ranks read {twice} samples twice and {never} never: they do not take the parts that are theirs"
        return [Row(3, name, "FAIL", f"{twice} twice, {never} never", advice=advice, value=float(twice + never))]
    different = _first_different_sample(nature)
    if different is not None:
        advice = f"sample {different} is not the same on all ranks: batch(indices) must give every rank the same"
        return [Row(3, name, "FAIL", "samples differ between ranks", advice=advice)]
    total, counted = len(trial.task.train_data), []
    for size in sorted({1, 2, 3, world.size, 2 * world.size + 1}):
        if not _visits_once(trial, min(total, 1_000_000), size):
            return [Row(3, name, "FAIL", f"not on {size} ranks", advice="this is a bug of hvdtrain: please report it")]
        counted.append(str(size))
    figure = f"{min(total, 1_000_000):,} samples on {', '.join(counted)} ranks"
    return [Row(3, name, "pass", figure, value=0.0)]


def _visits_once(trial: Trial, num_samples: int, size: int) -> bool:
    plan = dataclasses.replace(trial.plan, world_size=size, global_batch_size=trial.plan.global_batch_size)
    order = SampleOrder(num_samples, plan, trial.recipe.train.seed)
    seen = torch.zeros(num_samples, dtype=torch.int64)
    for step in range(order.steps_per_epoch):
        samples = order.global_batch(step)
        for rank in range(size):
            for positions in order.micro_batches(step, rank):
                seen[samples[positions]] += 1
    return bool((seen == 1).all())


def _first_different_sample(nature: Nature) -> int | None:
    trial = nature.own
    total = len(trial.task.train_data)
    some = sorted({int(i) for i in torch.linspace(0, total - 1, min(32, total))})
    batches = [read_samples(trial.task.train_data, torch.tensor([index])) for index in some]
    digests = [[int(digest_of(tensor)) for tensor in tensors_in(batch)] for batch in batches]
    everyone = trial.world.all_gather_object(digests, "verify.samples")
    return next((some[i] for i in range(len(some)) if any(own[i] != everyone[0][i] for own in everyone)), None)
