"""Multiple-choice questions as a part of every evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor, nn

from hvdtrain.data.text.choices import Choices, Encode, count_right
from hvdtrain.trainer import Evaluation


def choice_evaluation(
    path: Path,
    encode: Encode,
    begin: Sequence[int],
    max_length: int,
    logits_of: Callable[[nn.Module, Tensor], Tensor],
) -> tuple[Evaluation]:
    """Return the evaluation of the questions in a file, for a `Task`.

    Args:
        path: the file of `--eval.choices`.
        encode: returns the tokens of a text.
        begin: tokens before every context.
        max_length: the most tokens that the model is shown.
        logits_of: maps model and tokens, int64 `(B, T)`, to logits `(B, T, V)`.

    Raises:
        DataError: a line is no question.
    """
    return (
        Evaluation(
            data=Choices(path, encode, begin, max_length),
            loss_sums=lambda model, batch: count_right(model, batch, logits_of),
            metrics=("choice_accuracy", "choice_accuracy_per_byte"),
        ),
    )
