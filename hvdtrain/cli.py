"""The command line: verbs, settings, exit codes. Nothing else parses arguments.

Arguments are parsed before Horovod starts, on every rank alike; rank 0 alone talks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

from hvdtrain import __version__
from hvdtrain.errors import ConfigError, HvdtrainError, UsageError
from hvdtrain.process.launch import Launch, prepare_process
from hvdtrain.settings import merge, nearest, to_dict
from hvdtrain.verbs.options import (
    BenchOptions,
    DoctorOptions,
    ExportOptions,
    GenerateOptions,
    PlanOptions,
    RecipeOptions,
    TrainOptions,
    VerifyOptions,
)

if TYPE_CHECKING:
    from hvdtrain.trainer import Recipe

PROGRAM = "python -m hvdtrain"
T = TypeVar("T")

_USAGE = f"""\
usage: {PROGRAM} [VERB [RECIPE]] [--section.setting VALUE ...]

  train RECIPE    train, or go on with the run in --run-dir; without a verb and a recipe: train lm
  verify RECIPE   prove that training it on these ranks is the same as on one
  bench RECIPE    measure where a step's time goes, and what would make it shorter
  plan RECIPE     measure, and say how many workers to use
  doctor          look at the machine, the ranks and the network, and say what to mend
  generate DIR    continue prompts with a trained language model, of a run or exported
  export DIR      write a run's model as transformers reads it
  setup           build Horovod for this torch and this MPI, and install it in this environment

recipes: {{recipes}}, or the path of your own .py file
all settings: {PROGRAM} VERB [RECIPE] --help
several ranks: horovodrun -np 4 {PROGRAM} VERB [RECIPE]"""

# Verb -> module and function that runs it, and what it is asked besides a recipe's settings.
_VERBS: dict[str, tuple[str, str, type[RecipeOptions]]] = {
    "train": ("hvdtrain.verbs.train", "train", TrainOptions),
    "verify": ("hvdtrain.verbs.verify", "verify", VerifyOptions),
    "bench": ("hvdtrain.verbs.bench", "bench", BenchOptions),
    "plan": ("hvdtrain.verbs.plan", "plan", PlanOptions),
}

# Verbs without a recipe -> the same, and the flag whose value may be given as the word after the verb.
_PLAIN_VERBS: dict[str, tuple[str, str, type[Any], str | None]] = {
    "doctor": ("hvdtrain.verbs.doctor", "doctor", DoctorOptions, None),
    "export": ("hvdtrain.verbs.export", "export", ExportOptions, "run-dir"),
    "generate": ("hvdtrain.verbs.generate", "generate", GenerateOptions, "run-dir"),
}

# A launcher ends the whole job when its first rank leaves: the others give rank 0 this long to say why.
_SECONDS_FOR_RANK_0 = 5.0


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A parsed command line."""

    verb: str
    options: Any
    recipe_name: str = ""
    recipe: Recipe | None = None

    def run(self) -> int:
        """Do it; returns the exit code."""
        module, function = (_VERBS[self.verb] if self.recipe else _PLAIN_VERBS[self.verb])[:2]
        answer = getattr(importlib.import_module(module), function)
        return int(answer(self.recipe_name, self.recipe, self.options) if self.recipe else answer(self.options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 finished, 2 wrong usage, 75 stopped on request."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"hvdtrain {__version__}\n")
        return 0
    if arguments[:1] == ["setup"]:  # before all that has to be installed first
        from hvdtrain.install.__main__ import main as set_up

        return set_up(arguments[1:])
    launch = prepare_process()
    try:
        with _silent_unless(launch.rank == 0):
            invocation = parse(arguments)
    except UsageError as error:
        return _refuse(error, launch)
    except SystemExit as stop:  # --help, or a value that does not parse
        return _leave(stop.code if isinstance(stop.code, int) else 2, launch)
    if invocation is None:
        return _leave(0, launch)
    if invocation.recipe and invocation.options.print_config:
        if launch.rank == 0:
            sys.stdout.write(_toml(invocation.recipe))
        return _leave(0, launch)
    try:
        return invocation.run()
    except HvdtrainError as error:
        return _refuse(error, launch)


def parse(arguments: list[str]) -> Invocation | None:
    """Return what the command line asks for; None where it was a request for help, which is answered.

    Raises:
        UsageError: the message names what is wrong, and the nearest right thing.
        SystemExit: tyro has printed help, or what is wrong with a value.
    """
    if arguments[:1] and arguments[0] in _PLAIN_VERBS:
        return _parse_plain(*_split(arguments))

    from hvdtrain.recipes import RECIPES, load_recipe

    if arguments[:1] in (["--help"], ["-h"]):
        print(_USAGE.format(recipes=", ".join(RECIPES)))  # noqa: T201
        return None
    words, flags = _split(arguments)
    verb, name = (*words, "train", "lm")[:2] if len(words) != 1 else (words[0], "lm")
    if verb not in _VERBS:
        raise ConfigError(f"there is no verb '{verb}'{nearest(verb, [*_VERBS, *_PLAIN_VERBS])}; see {PROGRAM} --help")
    if len(words) > 2:
        raise ConfigError(f"'{words[2]}' is one word too many: settings are written --section.setting VALUE")
    return _parse_recipe(verb, name, load_recipe(name), flags)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split into the words before the first flag, and the rest."""
    first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first_flag], arguments[first_flag:]


def _parse_plain(words: list[str], flags: list[str]) -> Invocation:
    import tyro

    verb, *more = words
    _, _, options, positional = _PLAIN_VERBS[verb]
    if len(more) > (positional is not None):
        raise ConfigError(f"'{more[-1]}' is one word too many: {PROGRAM} {verb} --help")
    flags = [*(f"--{positional}={word}" for word in more), *flags]
    given: Any
    given, unknown = tyro.cli(options, args=flags, prog=f"{PROGRAM} {verb}", return_unknown_args=True)
    _refuse_unknown(unknown, _flags_of(options))
    return Invocation(verb, given)


def _flags_of(options: type[Any]) -> list[str]:
    return [f"--{item.name.rstrip('_').replace('_', '-')}" for item in dataclasses.fields(options)]


def _refuse_unknown(unknown: list[str], known: list[str]) -> None:
    if unknown:
        word = unknown[0].split("=")[0]
        raise ConfigError(f"there is no flag '{word}'{nearest(word, known)}" if word.startswith("-") else _stray(word))


def _parse_recipe(verb: str, name: str, recipe: Recipe, flags: list[str]) -> Invocation:
    import tyro

    file = _config_file(flags)
    values = _read_toml(file) if file else {}
    recipe = merge(_leave_batch_open(recipe, values, flags), values, str(file))
    *_, options = _VERBS[verb]
    hints = get_type_hints(options)
    # tyro reads the docstrings of `options`; the recipe's sections become flags beside its own.
    kind = dataclasses.make_dataclass(
        verb,
        [
            ("settings", Annotated[type(recipe), tyro.conf.arg(name="")], dataclasses.field(default=recipe)),
            # A field that is named after a word of Python's has an underscore that its flag has not.
            *(
                (item.name, Annotated[hints[item.name], tyro.conf.arg(name=item.name[:-1])], item)
                for item in dataclasses.fields(options)
                if item.name.endswith("_")
            ),
        ],
        bases=(options,),
        frozen=True,
        kw_only=True,
    )
    parsed: Any
    parsed, unknown = tyro.cli(
        kind,
        args=flags,
        prog=f"{PROGRAM} {verb} {name}",
        description=type(recipe).__doc__,
        return_unknown_args=True,
    )
    _refuse_unknown(unknown, [*_flags_of(options), *(f"--{flag}" for flag in _flag_names(recipe))])
    given = options(**{item.name: getattr(parsed, item.name) for item in dataclasses.fields(options)})
    if isinstance(given, TrainOptions):
        allowed = tuple(setting.replace("-", "_") for setting in given.allow_config_change)
        for setting in allowed:
            _check_changeable(setting, recipe)
        given = dataclasses.replace(given, allow_config_change=allowed)
    return Invocation(verb, given, name, parsed.settings.resolve())


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
