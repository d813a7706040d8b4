"""The command line: verbs, settings, exit codes. Nothing else parses arguments.

Arguments are parsed before Horovod starts, on every rank alike; rank 0 alone talks.
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdtrain import __version__
from hvdtrain.errors import ConfigError, HvdtrainError, UsageError
from hvdtrain.process import garbage
from hvdtrain.process.launch import Launch, detect_launch, give_home, open_outputs, prepare_process
from hvdtrain.process.output import print_anything, silent_unless, tell, while_read
from hvdtrain.process.stop import StoppedEarly, end_on_signals, hear_all
from hvdtrain.process.stray import leave_to_rank_0, stray_hint
from hvdtrain.process.working_directory import is_gone, search_last
from hvdtrain.settings import NONE, to_dict
from hvdtrain.settings.flags import COMMAND_LINE, known_flags, make_options, read_flags, settle_flags
from hvdtrain.settings.help import help_of
from hvdtrain.settings.units import shortened
from hvdtrain.settings.values import Source, Words, nested
from hvdtrain.verbs.meant import BEFORE_THE_REST, is_recipe, meant_verb
from hvdtrain.verbs.options import TrainOptions
from hvdtrain.verbs.table import VERBS, Verb

if TYPE_CHECKING:
    from hvdtrain.settings import OptimConfig
    from hvdtrain.trainer import Recipe
    from hvdtrain.verbs.sweep.grid import Grid

PROGRAM = "python -m hvdtrain"
_HELP_ALL = "--help-all"

# A launcher ends the whole job when its first rank leaves: the others give rank 0 this long to say why.
_SECONDS_FOR_RANK_0 = 5.0


@dataclasses.dataclass(frozen=True)
class Invocation:
    """A parsed command line."""

    verb: str
    options: Any
    recipe_name: str = ""
    recipe: Recipe | None = None
    grid: Grid | None = None
    """Of a verb that takes several values of settings."""

    def run(self) -> int:
        """Do it; returns the exit code."""
        module, _, function = VERBS[self.verb].answer.partition(":")
        answer = getattr(importlib.import_module(module), function)
        garbage.go_on()
        if self.grid is not None:
            return int(answer(self.grid, self.options))
        return int(answer(self.recipe_name, self.recipe, self.options) if self.recipe else answer(self.options))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 finished, 2 wrong usage, 75 stopped on request."""
    is_process = arguments is None  # of its own, not a call from a program
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    open_outputs()
    give_home()
    if is_process:
        hear_all()
    if arguments[:1] == ["help"] and arguments[1:2] and arguments[1] in BEFORE_THE_REST:
        arguments = [arguments[1], "--help"]
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"hvdtrain {__version__}\n")
        return 0
    if is_process and is_gone():
        tell("hvdtrain: the working directory has been deleted: cd to one that is there first")
        return 2
    if arguments[:1] in (["-np"], ["--np"]) and arguments[2:3] == ["sweep"]:  # it starts the ranks of each trial
        arguments = [*arguments[2:], "--np", arguments[1]]
    if arguments[:1] in (["setup"], ["supervise"], ["-np"], ["--np"]):
        return _other_program(arguments[0])(arguments[1:])
    if is_process:
        search_last()
        print_anything()
        end_on_signals()
        garbage.rest()
    # A sweep computes nothing itself, and hands its environment on to ranks, each of which prepares itself.
    launch = detect_launch() if arguments[:1] == ["sweep"] else prepare_process()
    try:
        return while_read(lambda: _run(arguments, launch))
    except StoppedEarly as stop:
        if launch.rank == 0:
            tell(f"hvdtrain: {stop.reason}")
        return stop.exit_code


def _other_program(name: str) -> Callable[[list[str]], int]:
    """Return what answers for words that are no verbs: it starts ranks and is none, and needs no torch or Horovod."""
    if name == "setup":  # which comes before all that has to be installed first
        from hvdtrain.install.__main__ import main as set_up

        return set_up
    if name == "supervise":
        from hvdtrain.process.supervise import main as supervise

        return supervise
    from hvdtrain.process.job import start_ranks

    return start_ranks


def _run(arguments: list[str], launch: Launch) -> int:
    try:
        with silent_unless(launch.rank == 0):
            invocation = parse(arguments)
    except UsageError as error:
        return _refuse(error, launch)
    if isinstance(invocation, str):
        return _answer(invocation, launch)
    if invocation.recipe and invocation.options.print_config:
        return _answer(_toml(invocation.recipe), launch)
    if VERBS[invocation.verb].is_for_one and launch.rank != 0:
        return leave_to_rank_0(launch)
    try:
        return invocation.run()
    except HvdtrainError as error:
        return _refuse(error, launch)


def parse(arguments: list[str]) -> Invocation | str:
    """Return what the command line asks for, or the text that answers it: help.

    Raises:
        UsageError: the message names what is wrong, and the nearest right thing.
    """
    if arguments[:1] in (["--help"], ["-h"], ["help"]):
        if len(arguments) == 1 or arguments[1].startswith("-"):
            return _overview()
        return parse([*(["train"] if is_recipe(arguments[1]) else []), *arguments[1:], "--help"])  # help train, help lm
    if arguments[:1] in (["--version"], ["-V"], ["version"]):
        return f"hvdtrain {__version__}\n"
    words, flags = _split(arguments)
    name = words[0] if words else "train"
    verb = VERBS.get(name)
    if verb is None:
        raise ConfigError(f"there is no verb '{shortened(name)}'{meant_verb(name)}; see {PROGRAM} --help")
    following = words[1:] if verb.more else words[1:2] or (["lm"] if verb.has_recipe else [])
    if (len(words) > 2 and not verb.more) or (following and not verb.takes):
        word = words[2] if len(words) > 2 else words[1]
        raise ConfigError(f"'{shortened(word)}' is one word too many: settings are written --section.setting VALUE")
    if verb.has_recipe:
        return _parse_recipe(name, following[0], flags)
    return _parse_plain(name, following, flags)


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Split into the words before the first flag, and the rest."""
    first_flag = next((i for i, word in enumerate(arguments) if word.startswith("-")), len(arguments))
    return arguments[:first_flag], arguments[first_flag:]


def _asks_for_help(flags: list[str]) -> bool:
    return any(flag in flags for flag in ("--help", "-h", _HELP_ALL))


def _parse_plain(name: str, words: list[str], flags: list[str]) -> Invocation | str:
    verb = VERBS[name]
    if _asks_for_help(flags):
        return f"usage: {PROGRAM} {name} {_asked(verb)} [--option VALUE ...]\n{_help(verb)}\n"
    given = [*((verb.takes.replace("-", "_"), Words((word,))) for word in words[:1]), *read_flags(flags)]
    given[1:1] = [(verb.more, Words(words[1:]))] if words[1:] else []
    return Invocation(name, make_options(verb.options, settle_flags(given, known_flags(verb.options))))


def _asked(verb: Verb) -> str:
    """Return the words after a verb, for a person."""
    takes, more = verb.takes.replace("-", "_"), verb.more and f"{verb.more}..."
    return (more if takes == verb.more else f"{takes} {more}").upper().strip()


def _parse_recipe(name: str, recipe_name: str, flags: list[str]) -> Invocation | str:
    from hvdtrain.optim.table import all_settings
    from hvdtrain.recipes import load_recipe
    from hvdtrain.recipes.given import apply, changeable, read_toml

    verb, recipe = VERBS[name], load_recipe(recipe_name)
    if verb.has_grid:  # as launchers spell it; anywhere else one dash begins a negative number
        flags = ["--np" if word == "-np" else word for word in flags]
    if _asks_for_help(flags):
        recipe = dataclasses.replace(recipe, optim=_named_optimizer(flags, recipe))
        value = "A,B,..." if verb.has_grid else "VALUE"
        usage = f"usage: {PROGRAM} {name} {recipe_name} [--section.setting {value} ...]"
        return f"{usage}\n\n{type(recipe).__doc__ or ''}\n{_help(verb, recipe, _HELP_ALL in flags)}\n"
    of_verb = known_flags(verb.options)
    known = {**all_settings("optim."), **known_flags(recipe), **of_verb}
    _refuse_of_other_recipes(read_flags(flags), known, recipe_name)
    given = settle_flags(read_flags(flags), known)
    options = make_options(verb.options, {flag: words for flag, words in given.items() if flag in of_verb})
    for_recipe = {flag: words for flag, words in given.items() if flag not in of_verb}
    if options.instead_of_recipe and (for_recipe or options.config):
        flag = COMMAND_LINE.name(min(for_recipe, default="config"))
        raise ConfigError(f"{flag} has no effect beside {options.instead_of_recipe}: nothing is measured, leave it out")
    layers = [(read_toml(options.config), Source(str(options.config)))] if options.config else []
    if verb.has_grid:
        from hvdtrain.verbs.sweep.grid import read_grid

        grid = read_grid(recipe_name, recipe, layers, for_recipe, known, options)
        return Invocation(name, options, recipe_name, grid.first, grid)
    recipe = apply(recipe, [*layers, (nested(for_recipe), COMMAND_LINE)])
    if isinstance(options, TrainOptions):
        options = dataclasses.replace(
            options, allow_config_change=changeable(options.allow_config_change, recipe, COMMAND_LINE)
        )
    return Invocation(name, options, recipe_name, recipe)


def _named_optimizer(flags: list[str], recipe: Recipe) -> OptimConfig:
    """Return the settings of the optimizer that the flags name, or of the recipe's own."""
    from hvdtrain.optim.table import own_class, with_name

    given = [word for flag in flags for word in flag.split("=", 1)]
    if "--optim.name" in given[:-1]:
        return with_name(recipe.optim, given[given.index("--optim.name") + 1])
    return own_class(recipe.optim)


def _refuse_of_other_recipes(flags: list[tuple[str, Words]], known: Mapping[str, Any], recipe_name: str) -> None:
    """Raise ConfigError where a flag is a setting, but of another recipe than this one."""
    from hvdtrain.recipes import RECIPES, load_recipe

    unknown = [name for name, _ in flags if name not in known and "." in name]
    first_of_each: dict[str, str] = {}
    for name, (module, _) in RECIPES.items() if unknown else ():
        first_of_each.setdefault(module, name)
    for other in first_of_each.values():
        theirs = {*known_flags(load_recipe(other))} & {*unknown}
        if theirs:
            flag = COMMAND_LINE.name(min(theirs))
            raise ConfigError(f"{flag} is a setting of the recipe {other}, and {recipe_name} has nothing of the kind")


def _help(verb: Verb, recipe: Recipe | None = None, has_all: bool = True) -> str:
    about = "" if recipe else f"\n{(verb.options.__doc__ or '').strip()}\n"
    return about + help_of(verb.options, recipe, has_all)


def _overview() -> str:
    from hvdtrain.recipes import RECIPES

    titles = {name: f"{name} {_asked(verb)}".strip() for name, verb in VERBS.items()}
    width = max(map(len, titles.values()))
    verbs = "\n".join(f"  {titles[name]:{width}}  {verb.about}" for name, verb in VERBS.items())
    verbs += f"\n  {'supervise':{width}}  start a run again until it has finished, on the hosts that there are"
    verbs += f"\n  {'setup':{width}}  build Horovod for this torch and this MPI, and install it in this environment"
    return f"""\
usage: {PROGRAM} [VERB [RECIPE]] [--section.setting VALUE ...]

{verbs}

recipes: {", ".join(RECIPES)}, or the path of your own .py file
settings: {PROGRAM} VERB [RECIPE] --help, all of them: --help-all
several ranks: horovodrun -np 4 {PROGRAM} VERB [RECIPE], or on this machine: hvdtrain -np 4 VERB [RECIPE]
"""


def _toml(recipe: Recipe) -> str:
    import tomli_w

    return tomli_w.dumps(to_dict(recipe, NONE))


def _answer(text: str, launch: Launch) -> int:
    """Print a text on rank 0."""
    if launch.rank != 0:
        return leave_to_rank_0(launch)
    sys.stdout.write(text)
    return 0


def _refuse(error: HvdtrainError, launch: Launch) -> int:
    if launch.rank == 0 or stray_hint(launch):
        tell(f"hvdtrain: {error}\n{error.stack}".rstrip("\n"))
    else:
        time.sleep(_SECONDS_FOR_RANK_0)
    return error.exit_code
