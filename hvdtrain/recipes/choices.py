"""Multiple-choice questions as a part of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdtrain.settings import EvalConfig, setting
from hvdtrain.trainer.task import Evaluation

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hvdtrain.data.text.choices import Encode


@dataclass(frozen=True, kw_only=True)
class LanguageEvalConfig(EvalConfig):
    """Evaluation on the held-out data, and of questions."""

    choices: Path | None = setting(None, path="file", changeable=True)
    """.jsonl file of questions, {"context": ..., "choices": [...], "answer": 0}, to answer as well."""


def choice_evaluation(
    path: Path,
    encode: Encode,
    begin: Sequence[int],
    max_length: int,
    logits_of: Callable[[nn.Module, Tensor], Tensor],
    write: Callable[[Any], str] = str,
) -> tuple[Evaluation]:
    """Return the evaluation of the questions in a file, for a `Task`.

    Args:
        path: the file of `--eval.choices`.
        encode: returns the tokens of a text.
        begin: tokens before every context.
        max_length: the most tokens that the model is shown.
        logits_of: maps model and tokens, int64 `(B, T)`, to logits `(B, T, V)`.
        write: returns what stands before a choice, of a line's context.

    Raises:
        DataError: a line is no question.
    """
    from hvdtrain.data.text.choices import Choices, count_right

    return (
        Evaluation(
            data=Choices(path, encode, begin, max_length, write),
            loss_sums=lambda model, batch: count_right(model, batch, logits_of),
            metrics=("choice_accuracy", "choice_accuracy_per_byte"),
        ),
    )
