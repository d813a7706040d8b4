"""Warnings: what a model itself does that data parallelism changes, and by how much. Collective."""

from __future__ import annotations

from hvdtrain.errors import listed
from hvdtrain.trainer.buffers import ChangingBuffers
from hvdtrain.trainer.state import replicated_tensors
from hvdtrain.verbs.verify.compare import between, bitwise, in_bits, movement, worst_of
from hvdtrain.verbs.verify.nature import Nature
from hvdtrain.verbs.verify.table import Row, warned
from hvdtrain.verbs.verify.trial import Run


def check_dangers(nature: Nature, whole: Run) -> list[Row]:
    """8: what the model itself does that data parallelism changes; warnings with their size."""
    rows = []
    again = nature.own.together()
    difference, _ = worst_of(nature.own.world, bitwise(whole, replicated_tensors(again.training)), "again")
    advice = (
        f"two runs of the same command differ, first in {difference.name}: an operation without a deterministic"
        " algorithm (--train.deterministic names it), or random numbers of a generator of your own"
    )
    rows.append(warned("two identical runs are identical", difference, advice, in_bits(difference)))
    if nature.depends_on_batch:
        rows.append(_batch_dependence(nature))
    changing = whole.training.component(ChangingBuffers)
    if nature.own.world.size > 1 and changing and (buffers := changing.names):
        advice = f"{listed(buffers, most=2)}: equal on all ranks after every step"
        name, figure = "buffers that steps change", f"{len(buffers)}, averaged over ranks"
        rows.append(Row(8, name, "pass", figure, "", advice, 0.0))
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
