"""A plan as `plan.json`, from which `plan --from` answers again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError, DataError, reason_of
from hvdtrain.optim.noise import NoiseScale
from hvdtrain.settings.untrusted import read_json
from hvdtrain.verbs.plan.answer import Answer
from hvdtrain.verbs.plan.facts import Facts
from hvdtrain.verbs.plan.methods import Format
from hvdtrain.verbs.plan.network import Network, Pace
from hvdtrain.verbs.plan.step import Bucket, Compute

FORMAT_VERSION = 3


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
        return _facts_of(saved["facts"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--from {path}: {file} was not written by this plan ({error!r})") from error


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
