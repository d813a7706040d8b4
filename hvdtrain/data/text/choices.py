"""Multiple-choice questions: a language model answers with the continuation that it finds likeliest.

A line of the file is `{"context": "...", "choices": ["...", ...], "answer": 1}`, the answer counted from 0. Context and
choice are tokenised together, as in a text; a token that holds the end of the one and the beginning of the other is the
choice's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.data.text.encodings import read_text
from hvdtrain.data.text.windows import IGNORED
from hvdtrain.errors import DataError, one_line
from hvdtrain.settings.untrusted import parse_json

Encode = Callable[[str], Sequence[int]]


class Choices:
    """A `Dataset` of questions, each with all its choices.

    Args:
        path: the file.
        encode: returns the tokens of a text.
        begin: tokens before every context.
        max_length: the most tokens that the model is shown; of a longer context the beginning is left out.
        write: returns what stands before a choice, of what a line has as its context: the text itself, or what a chat
            template makes of it.

    Raises:
        DataError: a line is no question; names it.
    """

    reads_ahead = True

    def __init__(
        self, path: Path, encode: Encode, begin: Sequence[int], max_length: int, write: Callable[[Any], str] = str
    ) -> None:
        self._write = write
        # Not splitlines(): JSON may hold signs that it takes for ends of lines.
        lines = read_text(path, f"--eval.choices {path}").split("\n")
        self._rows: list[list[tuple[list[int], int]]] = []
        self._bytes: list[list[int]] = []
        self._answers: list[int] = []
        for number, line in enumerate(lines, 1):
            if line.strip():
                self._add(line, f"--eval.choices {path}, line {number}", encode, list(begin), max_length)
        if not self._rows:
            raise DataError(f"--eval.choices {path} holds no question")

    def _add(self, line: str, place: str, encode: Encode, begin: list[int], max_length: int) -> None:
        try:
            value = parse_json(line)
            choices, answer = value["choices"], value["answer"]
            is_text = [isinstance(text, str | int | float) and not isinstance(text, bool) for text in choices]
            if not isinstance(choices, list) or not all(is_text):
                raise DataError("'choices' is no list of texts")
            choices = [str(text) for text in choices]
            context = self._write(value["context"])
        except (ValueError, KeyError, TypeError) as error:
            why = f"there is no {error}" if isinstance(error, KeyError) else one_line(error)
            raise DataError(f'{place} is not {{"context": ..., "choices": [...], "answer": ...}}: {why}') from error
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise DataError(f"{place}: the answer {answer} is none of the {len(choices)} choices, counted from 0")
        before = begin + list(encode(context))
        rows = []
        for text in choices:
            whole = begin + list(encode(context + text))
            shared = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
            count = len(whole) - min(shared, len(whole))
            if shared == 0 or not 0 < count <= max_length:
                raise DataError(f"{place}: a context and choices of 1 to {max_length} tokens are needed")
            rows.append((whole[-(max_length + 1) :], count))
        self._rows.append(rows)
        self._bytes.append([len(text.encode()) for text in choices])
        self._answers.append(answer)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return tokens and targets, int64 `(n, C, T)`, bytes `(n, C)` and answers `(n,)`.

        Only the choices' tokens are targets. A question with fewer choices than others is filled up with ones of no
        bytes.
        """
        chosen = [self._rows[i] for i in indices.tolist()]
        most = max(map(len, chosen))
        length = max(len(row) for rows in chosen for row, _ in rows) - 1
        tokens = torch.zeros(len(chosen), most, length, dtype=torch.int64)
        targets = torch.full_like(tokens, IGNORED)
        num_bytes = torch.zeros(len(chosen), most, dtype=torch.int64)
        for q, (index, rows) in enumerate(zip(indices.tolist(), chosen, strict=True)):
            for c, (row, count) in enumerate(rows):
                tokens[q, c, : len(row) - 1] = torch.tensor(row[:-1])
                targets[q, c, len(row) - 1 - count : len(row) - 1] = torch.tensor(row[-count:])
                num_bytes[q, c] = self._bytes[index][c]
        return tokens, targets, num_bytes, torch.tensor([self._answers[i] for i in indices.tolist()])

    def num_targets(self, indices: Tensor) -> int:
        """Return one a question."""
        return len(indices)


def count_right(
    model: nn.Module, batch: tuple[Tensor, ...], logits_of: Callable[[nn.Module, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return how many questions are answered rightly: by log-likelihood, and by log-likelihood per byte.

    Args:
        model: the model.
        batch: of `Choices`.
        logits_of: maps model and tokens, int64 `(B, T)`, to logits `(B, T, V)`.
    """
    tokens, targets, num_bytes, answers = batch
    logits = logits_of(model, tokens.flatten(0, 1)).float()
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    scores = -nats.view(targets.shape).sum(-1).masked_fill(num_bytes == 0, torch.inf)
    return {
        "choice_accuracy": (scores.argmax(1) == answers).sum(),
        "choice_accuracy_per_byte": ((scores / num_bytes.clamp(min=1)).argmax(1) == answers).sum(),
    }
