"""A plan as `plan.json`, from which `plan --from` answers again."""

from __future__ import annotations

import dataclasses
import json
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError, DataError, reason_of
from hvdtrain.optim.noise import NoiseScale
from hvdtrain.settings.fields import alternatives, is_of, is_optional
from hvdtrain.settings.untrusted import read_json
from hvdtrain.verbs.plan.answer import Answer
from hvdtrain.verbs.plan.facts import Facts
from hvdtrain.verbs.plan.methods import Format
from hvdtrain.verbs.plan.network import Network, Pace
from hvdtrain.verbs.plan.step import Bucket, Compute

FORMAT_VERSION = 3
# No count, and no number of seconds or bytes, is larger.
_LARGEST = 1e18


def save_json(path: Path, answer: Answer, environment: Mapping[str, Any]) -> None:
    """Write `plan.json`: the facts, from which `plan --from` answers again, and the answer."""
    values = {"format_version": FORMAT_VERSION, **answer.as_dict(), "environment": environment}
    write_output(path, json.dumps(values, indent=2) + "\n")


def load_json(path: Path) -> Facts:
    """Read the facts of a `plan.json`, or of the one in a directory.

    Raises:
        ConfigError: it is not there, or something else.
    """
    file = path / "plan.json" if path.is_dir() else path
    try:
        saved = read_json(file)
    except DataError as error:
        raise ConfigError(f"--from {path}: {error}: let `plan RECIPE --output {file.parent}` write it") from error
    try:
        if saved["format_version"] != FORMAT_VERSION:
            other = f"{file} has format {saved['format_version']!r}, this hvdtrain reads {FORMAT_VERSION}"
            raise ConfigError(f"--from {path}: {other}: measure again with `plan RECIPE --output {file.parent}`")
        facts = _facts_of(saved["facts"])
        _check("facts", facts, Facts)
        return facts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--from {path}: {file} was not written by this plan ({error!r})") from error


def _check(name: str, value: Any, hint: Any) -> None:
    """Raise ValueError where a value is not of the type that its field is declared with, or was never measured."""
    if value is None and is_optional(hint):
        return
    kinds = [kind for kind in alternatives(hint) if is_of(kind, value)]
    if not kinds or (isinstance(value, int | float) and not _is_measured(name, value)):
        raise ValueError(f"{name} is {value!r}")
    for key, item, hint_of_item in _parts(value, kinds[0]):
        _check(f"{name}.{key}", item, hint_of_item)


def _is_measured(name: str, value: float) -> bool:
    # No gradient is left where the noise scale is infinite.
    return 0 <= value <= _LARGEST or (value == math.inf and name.startswith("facts.noise."))


def _parts(value: Any, kind: Any) -> Iterator[tuple[object, Any, Any]]:
    """Yield what a value of this type is made of: name, value, and the type that is declared."""
    if dataclasses.is_dataclass(kind):
        for name, hint in typing.get_type_hints(kind).items():
            yield name, getattr(value, name), hint
    elif isinstance(value, Mapping):
        yield from ((key, item, typing.get_args(kind)[1]) for key, item in value.items())
    elif isinstance(value, tuple):
        yield from ((place, item, typing.get_args(kind)[0]) for place, item in enumerate(value))


def _facts_of(values: dict[str, Any]) -> Facts:
    def by_number(name: str) -> dict[int, Any]:
        return {int(number): value for number, value in values[name].items()}

    return Facts(
        **{
            **values,
            "alone": Compute(**values["alone"]),
            "together": Compute(**values["together"]),
            "buckets": tuple(map(_bucket_of, values["buckets"])),
            "network": _network_of(values["network"]),
            "fp16_network": _network_of(values["fp16_network"]),
            "formats": {name: _format_of(value) for name, value in values["formats"].items()},
            "noise": NoiseScale(**values["noise"]) if values["noise"] else None,
            "by_micro_batch": {size: Compute(**value) for size, value in by_number("by_micro_batch").items()},
            "measured_steps_s": by_number("measured_steps_s"),
            "plain_mpi_s": by_number("plain_mpi_s"),
        }
    )


def _bucket_of(values: dict[str, Any]) -> Bucket:
    exact = {name: tuple(values.get(name, ())) for name in ("exact", "exact_for")}
    return Bucket(**{**values, "shapes": tuple(map(tuple, values["shapes"])), **exact})


def _network_of(values: dict[str, Any] | None) -> Network | None:
    if values is None:
        return None
    return Network(**{**values, "paces": {way: Pace(**pace) for way, pace in values["paces"].items()}})


def _format_of(values: dict[str, Any]) -> Format:
    return Format(**{**values, "codec_s": {int(ranks): seconds for ranks, seconds in values["codec_s"].items()}})


def write_output(path: Path, text: str) -> None:
    """Write a file of --output.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({reason_of(error)}): choose another --output") from error
