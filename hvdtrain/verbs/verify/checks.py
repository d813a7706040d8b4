"""The checks, in their order. Each runs the user's model and returns rows; all of them are collective."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hvdtrain.errors import DivergedError
from hvdtrain.verbs.verify.dangers import check_dangers
from hvdtrain.verbs.verify.exactness import check_accumulation, check_average, check_one_rank
from hvdtrain.verbs.verify.kept import check_kept
from hvdtrain.verbs.verify.nature import find_nature
from hvdtrain.verbs.verify.random_numbers import check_random
from hvdtrain.verbs.verify.replicas import check_end, check_resume, check_start
from hvdtrain.verbs.verify.samples import check_epoch
from hvdtrain.verbs.verify.table import Row
from hvdtrain.verbs.verify.trial import Run, Trial


def all_checks(own: Trial, show: Callable[[Row], None]) -> list[Row]:
    """Run every check, and show each row as soon as it is known. Collective."""
    rows: list[Row] = []

    def add(found: list[Row]) -> None:
        rows.extend(found)
        for row in found:
            show(row)

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
    add(_guarded(9, lambda: check_random(nature)))
    add(_guarded(10, lambda: check_kept(nature)))
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
    9: "random numbers",
    10: "modules stay in their modes",
}


def _guarded(number: int, check: Callable[[], list[Row]]) -> list[Row]:
    """Run a check; that ranks differ before it could begin is a row, too."""
    try:
        return check()
    except DivergedError as error:
        return [Row(number, _NAMES[number], "FAIL", "could not be run", "", str(error))]
