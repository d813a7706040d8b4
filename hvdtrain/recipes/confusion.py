"""Which classes are taken for which: counted over the held-out images of all ranks, each once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvdtrain.errors import reason_of
from hvdtrain.settings.files import replaced_whole
from hvdtrain.trainer.component import Component

if TYPE_CHECKING:
    from hvdtrain.trainer.job import Job
    from hvdtrain.trainer.state import Training

FILE = "confusion.csv"
"""In the run's directory: a row for each class, a column for each answer."""
_MOST_SHOWN, _MOST_PAIRS = 12, 5
_CORNER = "is \\ taken for"


class ConfusionMatrix(Component):
    """Counts answers while the held-out images are evaluated; rank 0 writes the counts of all ranks.

    Args:
        classes: their names.
    """

    name = "confusion"

    def __init__(self, classes: tuple[str, ...]) -> None:
        self._classes = classes
        self._counts: Tensor | None = None
        self._job: Job | None = None
        self.counts = torch.zeros(0, 0, dtype=torch.int64)
        """Of the last evaluation, over all ranks, int64 `(classes, answers)` on the CPU; empty before it."""

    def of(self, job: Job) -> ConfusionMatrix:
        """Return itself, for the job's ranks and directory: what `Task.components` calls."""
        self._job = job
        return self

    def before_evaluation(self, training: Training) -> None:
        """Begin to count."""
        assert self._job is not None
        self._counts = torch.zeros(len(self._classes) ** 2, dtype=torch.int64, device=self._job.world.device)

    @torch.no_grad()
    def add(self, labels: Tensor, answers: Tensor) -> None:
        """Count answers, int64 `(n,)`, to images of the classes `labels`, `(n,)`; negative labels are left out.

        Outside of an evaluation nothing is counted.
        """
        if self._counts is None:
            return
        is_known = (labels >= 0).long()
        self._counts.index_add_(0, labels.clamp_min(0) * len(self._classes) + answers, is_known)

    def after_evaluation(self, training: Training, metrics: Mapping[str, float]) -> None:
        """Sum over the ranks, and write. Collective."""
        assert self._job is not None
        assert self._counts is not None
        own, self._counts = self._counts, None
        total = self._job.world.all_reduce(own, "sum", "confusion").cpu()
        self.counts = total.view(len(self._classes), -1)
        if self._job.world.rank == 0 and self._job.directory is not None:
            try:
                self._write(self._job.run.path / FILE)
            except OSError as error:
                self._job.log.say(f"WARNING: {FILE} cannot be written ({reason_of(error)})")

    def _write(self, path: Path) -> None:
        names = [_quoted(name) for name in self._classes]
        rows = [",".join(("class", *names))]
        rows += [",".join((name, *map(str, row))) for name, row in zip(names, self.counts.tolist(), strict=True)]
        with replaced_whole(path) as temporary:
            temporary.write_text("\n".join(rows) + "\n", encoding="utf-8", errors="surrogateescape")

    def describe(self) -> str:
        """Return what a person should see: the matrix of a few classes, the commonest mistakes of many."""
        if not self.counts.numel():
            return ""
        if len(self._classes) <= _MOST_SHOWN:
            return self._table()
        wrong = self.counts.clone().fill_diagonal_(0).flatten()
        largest = wrong.topk(min(_MOST_PAIRS, len(wrong)))
        pairs = [
            f"  {self._classes[place // len(self._classes)]} taken for {self._classes[place % len(self._classes)]}:"
            f" {count:,}"
            for count, place in zip(*(part.tolist() for part in largest), strict=True)
            if count
        ]
        return "\n".join(["most often mistaken:", *pairs, f"all of it is in {FILE}"]) if pairs else ""

    def _table(self) -> str:
        names = [name[:10] for name in self._classes]
        first = max(len(_CORNER), *map(len, names))
        widths = [
            max(len(name), len(str(int(column.max())))) for name, column in zip(names, self.counts.T, strict=True)
        ]
        head = [f"{name:>{width}}" for name, width in zip(names, widths, strict=True)]
        rows = [
            "  ".join((f"{name:{first}}", *(f"{n:>{width}}" for n, width in zip(row, widths, strict=True))))
            for name, row in zip(names, self.counts.tolist(), strict=True)
        ]
        return "\n".join(["  ".join((f"{_CORNER:{first}}", *head)), *rows])


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"' if any(c in name for c in ',"\n') else name
