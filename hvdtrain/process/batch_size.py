"""The global batch of a run that is not started yet, or goes on: what its ranks must divide. Standard library only."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from hvdtrain.errors import ConfigError
from hvdtrain.process.hosts import option, whole_number
from hvdtrain.process.placement import Batch, training_words
from hvdtrain.process.run_files import CHECKPOINTS, named_checkpoint

_MOST_BYTES = 1 << 16
_SECONDS_TO_SAY = 120
_TOTAL, _MICRO, _ACCUM = "global_batch_size", "micro_batch_size", "accum_steps"


def saved_batch(run_dir: Path) -> Batch | None:
    """Return the global batch of a run's newest checkpoint; None where there is none.

    A run that goes on adapts micro-batch and accumulation, so that any divisor will do.
    """
    saved = _saved(run_dir)
    return None if saved is None else Batch(saved)


def asked_batch(command: Sequence[str]) -> Batch:
    """Return the global batch of a new run, as its command and its recipe say.

    Raises:
        ConfigError: the batch would be another on each number of ranks.
    """
    given = _resolved(command) or {
        name: whole_number(option(command, (f"--train.{name.replace('_', '-')}",))[1])
        for name in (_TOTAL, _MICRO, _ACCUM)
    }
    total, micro, accum = (given.get(name) for name in (_TOTAL, _MICRO, _ACCUM))
    if total is not None and micro is not None and accum is not None:
        raise ConfigError(
            f"--train.global-batch-size {total}, --train.micro-batch-size {micro} and --train.accum-steps {accum} fit"
            " one number of ranks only: leave --train.accum-steps out, which then follows the ranks"
        )
    if total is None and micro is not None:
        raise ConfigError(
            f"--train.micro-batch-size {micro} alone makes another global batch of each number of ranks: say"
            " --train.global-batch-size, which is kept"
        )
    return Batch(total, micro or accum or 1)


def _saved(run_dir: Path) -> int | None:
    path = run_dir / CHECKPOINTS / named_checkpoint(run_dir) / "manifest.json"
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_MOST_BYTES)) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return None
    total = values.get(_TOTAL) if isinstance(values, dict) else None
    return total if type(total) is int and total > 0 else None


def _resolved(command: Sequence[str]) -> dict[str, int | None]:
    """Ask the command itself, by `--print-config`; empty where it does not say: then its ranks will say why."""
    words = training_words(command)
    if not words:
        return {}
    try:
        done = subprocess.run(
            [*words, "--print-config"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_SECONDS_TO_SAY
        )
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return {}
    table = re.search(r"^\[train\]$(.*?)(?=^\[|\Z)", done.stdout.decode(errors="replace"), re.MULTILINE | re.DOTALL)
    if done.returncode or table is None:
        return {}
    found = re.findall(rf"^({_TOTAL}|{_MICRO}|{_ACCUM}) = (\d{{1,9}})$", table[1], re.MULTILINE)
    return {name: int(number) for name, number in found}
