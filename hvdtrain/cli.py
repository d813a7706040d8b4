"""The command line: verbs, settings, exit codes. Nothing else parses arguments.

Arguments are parsed before Horovod starts, on every rank alike; rank 0 alone talks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from hvdtrain.config import merge, nearest, to_dict
from hvdtrain.errors import ConfigError, HvdtrainError, UsageError
from hvdtrain.launch import Launch, prepare_process

if TYPE_CHECKING:
    from hvdtrain.trainer import Recipe

PROGRAM = "python -m hvdtrain"
VERBS = ("train",)
_OWN_FLAGS = ("config", "run-dir", "print-config", "dry-run", "allow-config-change")
T = TypeVar("T")

_USAGE = f"""\
usage: {PROGRAM} [train [RECIPE]] [--section.setting VALUE ...]

  train RECIPE   train, or go on with the run in --run-dir; without a recipe: lm

recipes: {{recipes}}, or the path of your own .py file
settings of a recipe: {PROGRAM} train RECIPE --help
several ranks: horovodrun -np 4 {PROGRAM} train RECIPE"""

# A launcher ends the whole job when its first rank leaves: the others give rank 0 this long to say why.
_SECONDS_FOR_RANK_0 = 5.0


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A parsed command line."""

    recipe_name: str
    recipe: Recipe
    run_dir: Path | None
    print_config: bool
    dry_run: bool
    allowed_changes: tuple[str, ...]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 finished, 2 wrong usage, 75 stopped on request."""
    launch = prepare_process()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with _silent_unless(launch.rank == 0):
            invocation = parse(arguments)
    except UsageError as error:
        return _refuse(error, launch)
    except SystemExit as stop:  # --help, or a value that does not parse
        return _leave(stop.code if isinstance(stop.code, int) else 2, launch)
    if invocation is None:
        return _leave(0, launch)
    if invocation.print_config:
        if launch.rank == 0:
            sys.stdout.write(_toml(invocation.recipe))
        return _leave(0, launch)
    from hvdtrain.run import run

    try:
        run(
            invocation.recipe_name,
            invocation.recipe,
            invocation.run_dir,
            invocation.dry_run,
            invocation.allowed_changes,
        )
        return 0
    except HvdtrainError as error:
        return _refuse(error, launch)


def parse(arguments: list[str]) -> Invocation | None:
    """Return what the command line asks for; None where it was a request for help, which is answered.

    Raises:
        UsageError: the message names what is wrong, and the nearest right thing.
        SystemExit: tyro has printed help, or what is wrong with a value.
    """
    from hvdtrain.recipes import RECIPES, load_recipe

    if arguments[:1] in (["--help"], ["-h"]):
        print(_USAGE.format(recipes=", ".join(RECIPES)))  # noqa: T201
        return None
    words, flags = _split(arguments)
    verb, name = (*words, "train", "lm")[:2] if len(words) != 1 else (words[0], "lm")
    if verb not in VERBS:
        raise ConfigError(f"there is no verb '{verb}'{nearest(verb, VERBS)}; see {PROGRAM} --help")
    if len(words) > 2:
        raise ConfigError(f"'{words[2]}' is one word too many: settings are written --section.setting VALUE")
    return _parse_recipe(name, load_recipe(name), flags)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split into the words before the first flag, and the rest."""
    first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first_flag], arguments[first_flag:]


def _parse_recipe(name: str, recipe: Recipe, flags: list[str]) -> Invocation:
    import tyro

    file = _config_file(flags)
    values = _read_toml(file) if file else {}
    recipe = merge(_leave_batch_open(recipe, values, flags), values, str(file))
    kind = dataclasses.make_dataclass(
        "train",
        [
            ("config", Annotated[Path | None, tyro.conf.arg(help="TOML file of settings; flags win over it.")], None),
            ("run_dir", Annotated[Path | None, tyro.conf.arg(help=_RUN_DIR_HELP)], None),
            ("print_config", Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=_PRINT_HELP)], False),
            ("dry_run", Annotated[tyro.conf.FlagCreatePairsOff[bool], tyro.conf.arg(help=_DRY_HELP)], False),
            ("allow_config_change", Annotated[tuple[str, ...], tyro.conf.arg(help=_ALLOW_HELP)], ()),
            ("settings", Annotated[type(recipe), tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
        ],
        frozen=True,
        kw_only=True,
    )
    parsed: Any
    parsed, unknown = tyro.cli(
        kind, args=flags, prog=f"{PROGRAM} train {name}", description=type(recipe).__doc__, return_unknown_args=True
    )
    if unknown:
        known = [f"--{flag}" for flag in (*_OWN_FLAGS, *_flag_names(recipe))]
        word = unknown[0].split("=")[0]
        raise ConfigError(f"there is no flag '{word}'{nearest(word, known)}" if word.startswith("-") else _stray(word))
    allowed = tuple(setting.replace("-", "_") for setting in parsed.allow_config_change)
    for setting in allowed:
        _check_changeable(setting, recipe)
    return Invocation(name, parsed.settings, parsed.run_dir, parsed.print_config, parsed.dry_run, allowed)


_RUN_DIR_HELP = "Directory of this run; goes on from its newest checkpoint. Default: a new one under runs/."
_PRINT_HELP = "Print the resolved settings as TOML, and stop."
_DRY_HELP = "Print what would be trained, and stop."
_ALLOW_HELP = "Settings, such as optim.peak-lr, that may differ from those that the run in --run-dir was begun with."


def _check_changeable(setting: str, recipe: Recipe) -> None:
    known = [name.replace("-", "_") for name in _flag_names(recipe)]
    known += sorted({name.split(".")[0] for name in known if "." in name})
    if setting not in known:
        raise ConfigError(f"--allow-config-change: there is no setting '{setting}'{nearest(setting, known)}")
    if setting in ("model", "train") or setting.startswith("model.") or setting == "train.global_batch_size":
        raise ConfigError(
            f"--allow-config-change {setting}: the model and the global batch cannot change within a run; begin another"
            " with --run-dir"
        )


def _stray(word: str) -> str:
    return f"'{word}' belongs to no flag: settings are written --section.setting VALUE"


def _leave_batch_open(recipe: Recipe, values: dict[str, Any], flags: list[str]) -> Recipe:
    """Drop the recipe's own global batch size where the user gives the two settings that fix it."""
    given = set(values.get("train", {})) | {flag.split("=")[0].removeprefix("--train.") for flag in flags}
    given = {name.replace("-", "_") for name in given}
    if {"micro_batch_size", "accum_steps"} <= given and "global_batch_size" not in given:
        return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, global_batch_size=None))
    return recipe


def _config_file(flags: list[str]) -> Path | None:
    """Return the value of --config: its settings are the defaults that the other flags change."""
    for i, flag in enumerate(flags):
        if flag == "--config" and i + 1 < len(flags):
            return Path(flags[i + 1])
        if flag.startswith("--config="):
            return Path(flag.removeprefix("--config="))
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"the configuration file {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error


def _toml(recipe: Recipe) -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(recipe))


def _flag_names(config: Any, prefix: str = "") -> Iterator[str]:
    for item in dataclasses.fields(config):
        name = prefix + item.name.replace("_", "-")
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            yield from _flag_names(value, f"{name}.")
        else:
            yield name


@contextlib.contextmanager
def _silent_unless(talks: bool) -> Iterator[None]:
    if talks:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def _refuse(error: HvdtrainError, launch: Launch) -> int:
    if launch.rank == 0:
        sys.stderr.write(f"hvdtrain: {error}\n")
        sys.stderr.flush()
    return _leave(error.exit_code, launch)


def _leave(code: int, launch: Launch) -> int:
    if code and launch.rank != 0:
        time.sleep(_SECONDS_FOR_RANK_0)
    return code
