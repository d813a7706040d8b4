"""A checkpoint's state may hold anything: whatever is odd in it ends in a sentence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from hvdtrain.errors import HvdtrainError, ResumeError
from hvdtrain.process.tracebacks import place_of, sentence_of, stack_of
from hvdtrain.trainer.job import Job

# Of `saved_state.training_state`, what every format has after `formats.upgraded`, and then what older ones have not.
_KINDS: dict[str, type | tuple[type, ...]] = {
    "step": int,
    "is_evaluation_due": (bool, int),
    "optimizer": Mapping,
    "extra_state": Mapping,
    "components": Mapping,
    "config": Mapping,
    "global_batch_size": int,
    "fingerprint": str,
}
_LATER: dict[str, type | tuple[type, ...]] = {"num_steps": int, "best_loss": (float, int)}


@contextmanager
def in_a_sentence(job: Job) -> Iterator[None]:
    """Turn whatever a state of odd values leads to into a ResumeError. Older checkpoints would have them, too."""
    try:
        yield
    except HvdtrainError:
        raise
    except Exception as error:  # of any type: the state may hold anything anywhere
        if place_of(error):
            refusal = ResumeError(
                f"code of yours does not take up what the newest checkpoint in {job.run} holds: {sentence_of(error)}."
                " Mend it and start again, the checkpoint is as it was; or choose another --run-dir"
            )
            refusal.stack = stack_of(error)
            raise refusal from error
        raise ResumeError(
            f"the newest checkpoint in {job.run} holds a state that this program cannot restore"
            f" ({type(error).__name__}: {str(error)[:300]}): train on with the program that wrote it, or choose another"
            " --run-dir"
        ) from error


def check_kinds(state: Mapping[str, Any], step: int) -> None:
    """Raise ValueError where a part of the state is missing, of another type, or of another step than `step`."""
    kinds = {**_KINDS, **{name: kind for name, kind in _LATER.items() if name in state}}
    for name, kind in kinds.items():
        if not isinstance(state.get(name), kind):
            raise ValueError(f"it has no good value for {name}")
    if state["step"] != step:
        raise ValueError(f"it is of step {state['step']}")


def check_like(now: Any, then: Any, name: str) -> None:
    """Raise ValueError where a saved value is no such thing as the one that it replaces."""
    if isinstance(now, Mapping):
        for key in now.keys() & then.keys():
            check_like(now[key], then[key], f"{name}.{key}")
    elif isinstance(now, Tensor):
        if not isinstance(then, Tensor) or then.shape != now.shape:
            raise ValueError(f"{name} is no tensor of shape {tuple(now.shape)}")
    elif isinstance(now, int | float) and not isinstance(then, int | float):
        raise ValueError(f"{name} is no number")
