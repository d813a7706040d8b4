"""Checks that training on all ranks is what one rank does with the same global batches. Collective."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from hvdtrain.trainer.scaler import LossScaler
from hvdtrain.trainer.state import Training, start_training
from hvdtrain.trainer.step import train_step
from hvdtrain.verbs.verify.compare import between, movement, worst_of
from hvdtrain.verbs.verify.nature import Nature
from hvdtrain.verbs.verify.table import Row, judged
from hvdtrain.verbs.verify.trial import Trial, smallest_divisor
from hvdtrain.world import codec_for, plain_sum
from hvdtrain.world.filling import lies_densely, like

# From 65536 on, the loss scale is halved as often as the first gradients overflow.
_MOST_BACK_OFFS = 17
_APPROXIMATE = (
    "--comm.compression {} sends a part of each gradient, and the rest in later steps: another training than on one"
    " rank. What is sent and what is kept are compared in 4, ranks with each other in 7"
)
_NOT_AN_AVERAGE = "Adasum is no average: there is nothing to compare it with"


def check_one_rank(nature: Nature) -> list[Row]:
    """2: a few steps on all ranks equal the same steps on one, with the same global batches."""
    trial, size = nature.trial, nature.trial.world.size
    name = f"{trial.steps} steps on {size} ranks = on one rank"
    if not nature.is_average:
        return [Row(2, name, "not run", "", "", _NOT_AN_AVERAGE)]
    if nature.codec.is_approximate:
        return [Row(2, name, "not run", "", "", _APPROXIMATE.format(nature.codec.name))]
    apart = (nature.depends_on_batch or bool(nature.randomness.by_micro_batch)) and not nature.in_step
    run, alone = trial.together(), trial.alone(apart=apart)
    # Statistics that ranks gather apart are averaged, those of one rank follow each other: only weights must agree.
    ours = run.weights if apart else run.tensors
    difference, rank = worst_of(trial.world, between(ours, alone.tensors, movement(alone)), "one_rank")
    where = f"largest in {difference.name} on rank {rank}; " if difference.name else ""
    advice = (
        f"{where}look for a loss that is a mean instead of a sum over its targets, num_targets() that does not count"
        " them, data that differs between ranks, or random numbers of a generator of your own"
    )
    what = f"{difference} ({trial.recipe.train.precision})"
    return [judged(2, name, difference, nature.tolerance, advice, what)]


def check_average(nature: Nature) -> list[Row]:
    """4: the averaged gradient is what plain MPI makes of the same local gradients."""
    trial, world = nature.own, nature.own.world
    name = "averaged gradient = plain MPI's"
    if nature.codec.is_approximate:
        name = "averaged gradient + what is kept = plain MPI's"
        comm = dataclasses.replace(trial.recipe.comm, compression_warmup_steps=0)
        trial = dataclasses.replace(trial, recipe=dataclasses.replace(trial.recipe, comm=comm))
    if not nature.is_average:
        return [Row(4, name, "not run", "", "", _NOT_AN_AVERAGE)]
    averaged, expected, witness = _averaged_gradients(trial)
    largest = max(float(tensor.abs().max()) for tensor in expected.values())
    difference, _ = worst_of(world, between(averaged, expected, largest), "average")
    advice = f"largest in {difference.name}: gradients are lost, or averaged before they are complete"
    return [judged(4, name, difference, _rounding(trial), advice, f"{difference} ({witness})")]


def _averaged_gradients(trial: Trial) -> tuple[dict[str, Tensor], dict[str, Tensor], str]:
    """Return the gradients of a step as averaged, as plain MPI averages them, and who did that. Collective."""
    train = dataclasses.replace(trial.recipe.train, max_grad_norm=None)
    trial = dataclasses.replace(trial, recipe=dataclasses.replace(trial.recipe, train=train))
    world, job = trial.world, trial.job(trial.world)
    local: dict[str, Tensor] = {}
    named = dict(job.task.model.named_parameters())
    for key, parameter in ((key, parameter) for key, parameter in named.items() if parameter.requires_grad):
        hang = parameter.register_post_accumulate_grad_hook  # before Horovod's: sees this rank's own gradient
        hang(lambda p, key=key: local.__setitem__(key, p.grad.detach().to_dense().clone()))  # type: ignore[no-untyped-call]
    training = start_training(job)
    before_update: dict[nn.Parameter, Tensor] = {}
    # Optimizers may write into the gradients: of torch's SGD with Nesterov's momentum, the way for GPUs does.
    training.optimizer.register_step_pre_hook(lambda *_: before_update.update(_copies(training)))
    for _ in range(_MOST_BACK_OFFS):
        before_update.clear()
        train_step(job, training)
        gradients = before_update or _copies(training)  # a step that is left out asks no optimizer
        if all(gradient.isfinite().all() for gradient in gradients.values()):
            break  # else the loss scale is still too large
    scaler = training.component(LossScaler)
    scale = scaler.scale if scaler else 1.0
    codec = training.optimizer.codec
    kept = codec.left_over() if codec is not None else {}
    averaged, expected, witness = {}, {}, "mpi4py"
    for key, parameter in ((key, p) for key, p in training.model.named_parameters() if p in gradients):
        own = local.get(key, torch.zeros_like(parameter, dtype=torch.float64)).double() / world.size / scale
        total = plain_sum(world, own)
        if total is None:
            witness = "gathered, no MPI"
            total = torch.stack(world.all_gather_object(own.cpu(), f"verify.gradient.{key}")).sum(0)
        averaged[key], expected[key] = gradients[parameter].cpu().double(), total
        if key in kept:
            left = world.all_reduce(kept[key].cpu().double(), "sum", f"verify.kept.{key}")
            # Buckets hold numbers as they lie in the parameter's memory, such as channels last.
            averaged[key] += like(left.view(-1), parameter) if lies_densely(parameter) else left.view(total.shape)
    return averaged, expected, witness


def _copies(training: Training) -> dict[nn.Parameter, Tensor]:
    return {parameter: grad.clone() for parameter, grad in training.strategy.whole_gradients(training).items()}


def _rounding(trial: Trial) -> float:
    """Return the relative error that sums over ranks may have, from the type that gradients travel in."""
    types: dict[str, torch.dtype] = {"fp64": torch.float64, "bf16-true": torch.bfloat16}
    return codec_for(trial.recipe.comm).tolerance(types.get(trial.recipe.train.precision, torch.float32))


def check_accumulation(nature: Nature) -> list[Row]:
    """5: micro-batches that are accumulated equal one batch as large as all of them."""
    trial = nature.trial
    k = smallest_divisor(trial.plan.global_batch_size)
    name = f"{k} micro-batches = one {k} times as large"
    if nature.depends_on_batch or nature.in_step:
        return [Row(5, name, "not run", "", "", "the model's output depends on the batch, see 8")]
    if nature.randomness.by_micro_batch:
        return [Row(5, name, "not run", "", "", "some random numbers belong to micro-batches, see 9")]
    one, several = trial.alone(accum_steps=1), trial.alone(accum_steps=k)
    difference = between(several.tensors, one.tensors, movement(one))
    difference, _ = worst_of(trial.world, difference, "accumulation")
    advice = f"largest in {difference.name}: the loss must be a sum over its targets, not a mean"
    return [judged(5, name, difference, nature.tolerance, advice, f"{difference}")]
