"""The checks, in their order. Each runs the user's model and returns rows; all of them are collective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hvdtrain.data.order import SampleOrder
from hvdtrain.errors import DivergedError
from hvdtrain.trainer.loop import forward_sums, train_step
from hvdtrain.trainer.saver import Saver
from hvdtrain.trainer.state import replicated_tensors, start_training
from hvdtrain.verbs.verify.compare import Difference, between, movement, worst_of
from hvdtrain.verbs.verify.table import Row, Status
from hvdtrain.verbs.verify.trial import Run, Trial, smallest_divisor
from hvdtrain.world import codec_of, digest_of, has_synchronized_layers, plain_sum

# Adam divides by the gradient's size: where the true gradient is zero, as of a bias before batch normalisation, it
# blows the last bits of fp64 up to about 1e-7 of a step. Every planted bug in the tests shows above 1e-4.
_FP64_TOLERANCE = 1e-5
# Their steps are no smooth function of the gradient: a last bit can turn them round.
_ROUGH = ("muon", "Rprop")
_NOT_AN_AVERAGE = "Adasum is no average: there is nothing to compare it with"


@dataclasses.dataclass(frozen=True)
class Nature:
    """What was found out about the model before the checks."""

    trial: Trial
    """In fp64 where the model runs in it, else with plain SGD, which does not blow rounding errors up."""
    own: Trial
    """With the user's own settings."""
    tolerance: float
    """Of relative differences."""
    depends_on_batch: bool
    in_step: bool

    @property
    def is_average(self) -> bool:
        """Return whether gradients are averaged at all."""
        return self.own.recipe.comm.op == "average"


def find_nature(own: Trial) -> Nature:
    """Find out in what precision the model can be compared, and whether its loss is a sum over samples. Collective."""
    precision, optim, tolerance = own.recipe.train.precision, own.recipe.optim, _FP64_TOLERANCE
    sgd = dataclasses.replace(optim, name="sgd", momentum=0.0)
    if optim.name in _ROUGH:
        optim = sgd
    if all(own.world.all_gather_object(_runs_in_fp64(own), "verify.fp64")):
        precision = "fp64"
    else:
        optim = sgd
        tolerance = 1e-4 if precision == "fp32" else 5e-2
    if own.recipe.comm.compression != "none":
        kind = torch.float64 if precision == "fp64" else torch.float32
        optim, tolerance = sgd, max(tolerance, codec_of(own.recipe.comm.compression).tolerance(kind))
    train = dataclasses.replace(own.recipe.train, precision=precision)
    trial = dataclasses.replace(own, recipe=dataclasses.replace(own.recipe, train=train, optim=optim))
    job = trial.job(trial.solo())
    training = start_training(job)
    return Nature(trial, own, tolerance, _depends_on_batch(trial), has_synchronized_layers(training.model))


def _runs_in_fp64(trial: Trial) -> bool:
    try:
        job = trial.job(trial.solo(), precision="fp64")
        training = start_training(job)
        train_step(job, training)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return all(parameter.dtype == torch.float64 for parameter in training.model.parameters())


def _depends_on_batch(trial: Trial) -> bool:
    """Tell whether a sample's loss depends on what else is in its micro-batch, although losses are summed.

    A batch that holds every sample twice has twice the loss if losses are summed, and half the loss comes from each
    half of a batch unless samples see each other.
    """
    job = trial.job(trial.solo())
    training = start_training(job)
    n = min(8, len(job.task.train_data) // 2 * 2)
    samples = torch.arange(n)

    def loss(which: Tensor) -> float:
        place = (job.config.train.seed, 0)
        with torch.no_grad():
            sums = training.randomness.run(
                which, place, lambda: forward_sums(job, training.model, samples[which]), lambda sums: None
            )
        return float(sums["loss"])

    everything = torch.arange(n)
    together, twice = loss(everything), loss(torch.cat((everything, everything)))
    apart = loss(everything[: n // 2]) + loss(everything[n // 2 :])
    scale = max(abs(together), 1e-30)
    tolerance = 1e-9 if trial.recipe.train.precision == "fp64" else 1e-3
    is_sum = abs(twice - 2 * together) < 2 * tolerance * scale
    return bool(is_sum and abs(apart - together) > tolerance * scale)


def check_start(nature: Nature) -> list[Row]:
    """1: all ranks are bitwise equal before the first step, as built and after the broadcast."""
    trial, name = nature.own, "ranks are equal at the start"
    built = {key: tensor.detach() for key, tensor in trial.task.model.state_dict().items()}
    try:
        trial.world.check_replicas(built, "verify.built")
    except DivergedError as error:
        advice = "build() must return the same weights on every rank: seed what it draws from self.train.seed"
        return [Row(1, name, "FAIL", "not as built", advice=f"{error}; {advice}")]
    try:
        start_training(trial.job(trial.world))
    except DivergedError as error:
        return [Row(1, name, "FAIL", "not after the broadcast", advice=f"{error}; the ranks' state was not broadcast")]
    return [Row(1, name, "pass", f"{len(built)} tensors, bitwise", value=0.0)]


def check_one_rank(nature: Nature) -> list[Row]:
    """2: a few steps on all ranks equal the same steps on one, with the same global batches."""
    trial, size = nature.trial, nature.trial.world.size
    name = f"{trial.steps} steps on {size} ranks = on one rank"
    if not nature.is_average:
        return [Row(2, name, "not run", "", "", _NOT_AN_AVERAGE)]
    apart = nature.depends_on_batch and not nature.in_step
    run, alone = trial.together(), trial.alone(apart=apart)
    # Statistics that ranks gather apart are averaged, those of one rank follow each other: only weights must agree.
    ours = run.weights if apart else run.tensors
    difference, rank = worst_of(trial.world, between(ours, alone.tensors, movement(alone)), "one_rank")
    where = f"largest in {difference.name} on rank {rank}; " if difference.name else ""
    advice = (
        f"{where}look for a loss that is a mean instead of a sum over its targets, num_targets() that does not count"
        " them, data that differs between ranks, or random numbers that do not come from torch"
    )
    what = f"{difference} ({trial.recipe.train.precision})"
    return [_judge(2, name, difference, nature.tolerance, advice, what)]


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
    batches = [trial.task.train_data.batch(torch.tensor([index])) for index in some]
    digests = [[int(digest_of(tensor)) for tensor in batch] for batch in batches]
    everyone = trial.world.all_gather_object(digests, "verify.samples")
    return next((some[i] for i in range(len(some)) if any(own[i] != everyone[0][i] for own in everyone)), None)


def check_average(nature: Nature) -> list[Row]:
    """4: the averaged gradient is what plain MPI makes of the same local gradients."""
    trial, world = nature.own, nature.own.world
    name = "averaged gradient = plain MPI's"
    if not nature.is_average:
        return [Row(4, name, "not run", "", "", _NOT_AN_AVERAGE)]
    train = dataclasses.replace(trial.recipe.train, max_grad_norm=None)
    trial = dataclasses.replace(trial, recipe=dataclasses.replace(trial.recipe, train=train))
    job = trial.job(world)
    local: dict[str, Tensor] = {}
    named = dict(job.task.model.named_parameters())
    for key, parameter in ((key, parameter) for key, parameter in named.items() if parameter.requires_grad):
        hang = parameter.register_post_accumulate_grad_hook  # before Horovod's: sees this rank's own gradient
        hang(lambda p, key=key: local.__setitem__(key, p.grad.detach().to_dense().clone()))  # type: ignore[no-untyped-call]
    training = start_training(job)
    train_step(job, training)
    scale = training.scaler.get_scale() if training.scaler.is_enabled() else 1.0
    ours, theirs, witness = {}, {}, "mpi4py"
    for key, parameter in training.model.named_parameters():
        own = local.get(key, torch.zeros_like(parameter, dtype=torch.float64)).double() / world.size / scale
        total = plain_sum(world, own)
        if total is None:
            witness = "gathered, no MPI"
            total = torch.stack(world.all_gather_object(own.cpu(), f"verify.gradient.{key}")).sum(0)
        ours[key] = (
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.to_dense()).cpu().double()
        )
        theirs[key] = total
    largest = max(float(tensor.abs().max()) for tensor in theirs.values())
    difference, _ = worst_of(world, between(ours, theirs, largest), "average")
    advice = f"largest in {difference.name}: gradients are lost, or averaged before they are complete"
    return [_judge(4, name, difference, _rounding(trial), advice, f"{difference} ({witness})")]


def _rounding(trial: Trial) -> float:
    """Return the relative error that sums over ranks may have, from the type that gradients travel in."""
    types: dict[str, torch.dtype] = {"fp64": torch.float64, "bf16-true": torch.bfloat16}
    return codec_of(trial.recipe.comm.compression).tolerance(types.get(trial.recipe.train.precision, torch.float32))


def check_accumulation(nature: Nature) -> list[Row]:
    """5: micro-batches that are accumulated equal one batch as large as all of them."""
    trial = nature.trial
    k = smallest_divisor(trial.plan.global_batch_size)
    name = f"{k} micro-batches = one {k} times as large"
    if nature.depends_on_batch or nature.in_step:
        return [Row(5, name, "not run", "", "", "the model's output depends on the batch, see 8")]
    one, several = trial.alone(accum_steps=1), trial.alone(accum_steps=k)
    difference = between(several.tensors, one.tensors, movement(one))
    difference, _ = worst_of(trial.world, difference, "accumulation")
    advice = f"largest in {difference.name}: the loss must be a sum over its targets, not a mean"
    return [_judge(5, name, difference, nature.tolerance, advice, f"{difference}")]


def check_resume(nature: Nature) -> tuple[list[Row], Run]:
    """6: save, load and go on is bitwise the same as not stopping. Also returns the run that did not stop."""
    own, name = nature.own, "save, load, go on = not stopping"
    whole = own.together()
    job = own.job(own.world)
    job = dataclasses.replace(job, run_dir=own.folder / "resume")
    training = start_training(job)
    train_step(job, training)
    with Saver(job) as saver:
        saver.save(training, {})
        saver.finish()
    job = dataclasses.replace(own.job(own.world), run_dir=own.folder / "resume")
    resumed = start_training(job)
    for _ in range(resumed.step, own.steps):
        train_step(job, resumed)
    difference, rank = worst_of(own.world, _bitwise(whole, replicated_tensors(resumed)), "resume")
    if resumed.step != whole.training.step:
        difference = Difference(float("inf"), float("inf"), "the step counter")
    advice = f"first seen in {difference.name} on rank {rank}: something that matters is not in the checkpoint"
    return [_judge(6, name, difference, 0.0, advice, _bits(difference))], whole


def check_end(nature: Nature, whole: Run) -> list[Row]:
    """7: ranks are bitwise equal at the end."""
    name = "ranks are equal at the end"
    tensors = replicated_tensors(whole.training)
    try:
        nature.own.world.check_replicas(tensors, "verify.end")
    except DivergedError as error:
        return [Row(7, name, "FAIL", "not equal", advice=f"{error}; something is not averaged over the ranks")]
    return [Row(7, name, "pass", f"{len(tensors)} tensors, bitwise", value=0.0)]


def check_dangers(nature: Nature, whole: Run) -> list[Row]:
    """8: what the model itself does that data parallelism changes; warnings with their size."""
    rows = []
    again = nature.own.together()
    difference, _ = worst_of(nature.own.world, _bitwise(whole, replicated_tensors(again.training)), "again")
    advice = (
        f"two runs of the same command differ, first in {difference.name}: an operation without a deterministic"
        " algorithm (torch.use_deterministic_algorithms(True) names it), or random numbers that are not torch's"
    )
    rows.append(_warn("two identical runs are identical", difference, advice, _bits(difference)))
    if nature.depends_on_batch:
        rows.append(_batch_dependence(nature))
    buffers = whole.training.buffers.names
    if buffers:
        shown = ", ".join(buffers[:2]) + (f" and {len(buffers) - 2} more" if len(buffers) > 2 else "")
        rows.append(Row(8, "buffers that steps change", "pass", f"{len(buffers)}, averaged over ranks", "", "", 0.0))
        rows[-1] = dataclasses.replace(rows[-1], advice=f"{shown}: equal on all ranks after every step")
    return rows


def _batch_dependence(nature: Nature) -> Row:
    """Say how far ranks that see only their own samples end from one that sees them all."""
    name, trial = "a sample's output depends on its batch", nature.trial
    whole, apart = trial.alone(accum_steps=1), trial.alone(apart=True)
    difference = between(apart.weights, whole.tensors, movement(whole))
    difference, _ = worst_of(trial.world, difference, "dependence")
    advice = (
        f"after {trial.steps} steps the weights are {difference.relative:.0%} of their change away from one rank that"
        f" sees the whole batch, most in {difference.name}: with batch normalisation, --model.sync-batch-norm"
        " normalises over all ranks; it is not wrong to go without, but the number of ranks then changes the model"
    )
    if nature.in_step:
        return Row(8, name, "pass", "normalised over all ranks", "")
    return Row(8, name, "warning", str(difference), "", advice, difference.relative)


def _bitwise(whole: Run, tensors: dict[str, Tensor]) -> Difference:
    theirs = replicated_tensors(whole.training)
    for key, tensor in tensors.items():
        if int(digest_of(tensor)) != int(digest_of(theirs[key])):
            gap = float((tensor.double() - theirs[key].double()).abs().max())
            return Difference(gap or 5e-324, float("nan"), key)
    return Difference(0.0, 0.0, "")


def _bits(difference: Difference) -> str:
    return f"differ by {difference.absolute:.1e}" if difference.absolute else "bitwise"


def _judge(number: int, name: str, found: Difference, tolerance: float, advice: str, figure: str) -> Row:
    measured = found.relative if tolerance else found.absolute
    status: Status = "pass" if measured <= tolerance else "FAIL"
    text = f"relative {tolerance:.0e}" if tolerance else "bitwise"
    return Row(number, name, status, figure, text, "" if status == "pass" else advice, measured)


def _warn(name: str, found: Difference, advice: str, figure: str) -> Row:
    status: Status = "warning" if found.absolute else "pass"
    return Row(8, name, status, figure, "bitwise", advice if found.absolute else "", found.absolute)


def all_checks(own: Trial, tell: Callable[[Row], None]) -> list[Row]:
    """Run every check, and tell each row as it is found. Collective."""
    rows: list[Row] = []

    def add(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            tell(row)

    nature = find_nature(own)
    for number, check in enumerate((check_start, check_one_rank, check_epoch, check_average, check_accumulation), 1):
        add(_guarded(number, partial(check, nature)))
    whole: list[Run] = []

    def resume() -> list[Row]:
        found, run = check_resume(nature)
        whole.append(run)
        return found

    add(_guarded(6, resume))
    if whole:
        add(_guarded(7, lambda: check_end(nature, whole[0])))
        add(_guarded(8, lambda: check_dangers(nature, whole[0])))
    return rows


_NAMES = {
    1: "ranks are equal at the start",
    2: "steps on all ranks = on one rank",
    3: "an epoch visits each sample once",
    4: "averaged gradient = plain MPI's",
    5: "micro-batches = one large batch",
    6: "save, load, go on = not stopping",
    7: "ranks are equal at the end",
    8: "what the model does itself",
}


def _guarded(number: int, check: Callable[[], list[Row]]) -> list[Row]:
    """Run a check; that ranks differ before it could begin is a row, too."""
    try:
        return check()
    except DivergedError as error:
        return [Row(number, _NAMES[number], "FAIL", "could not be run", "", str(error))]
