"""What the user gives, by files, flags or a program, put into a recipe's settings: the one way in for all three."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError, reason_of
from hvdtrain.optim.table import own_class, owners, with_name
from hvdtrain.process.arguments import misfit
from hvdtrain.settings import Config, OptimConfig, merge, nearest
from hvdtrain.settings.common import full_name
from hvdtrain.settings.fields import fields_of
from hvdtrain.settings.paths import check_path
from hvdtrain.settings.units import shortened
from hvdtrain.settings.values import MisfitError, Source, Words, flattened
from hvdtrain.trainer.task import Recipe

# Of a recipe's own warm-up that is longer than the user's run, this share of the run is left.
_SHARE_OF_WARMUP = 0.1

Layer = tuple[Mapping[str, Any], Source]
"""Values, nested as in TOML, and where they come from."""


def apply(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """Return the recipe with the values of all layers, the later ones over the earlier, and what follows from them.

    Raises:
        ConfigError: a setting that there is not, a wrong value, values that do not fit together, or a setting that has
            no effect beside the others.
        UsageError: what the settings name cannot be read.
    """
    written = misfit(recipe.build, 1)
    if written:
        raise ConfigError(
            f"the recipe {type(recipe).__name__} has a method {written}, which is called with one argument: write"
            " def build(self, say)"
        )
    defaults = recipe = dataclasses.replace(recipe, optim=own_class(recipe.optim))
    for number, (values, source) in enumerate(layers):
        recipe = _with_optimizer(recipe, values, source, layers[:number])
        recipe = _merged(_without_replaced(recipe, layers[: number + 1]), layers[number:])
    recipe = _with_warmup_that_fits(recipe, layers)
    resolved = recipe.resolve()
    for values, source in reversed(layers):  # the last one that gives a setting is the one to be told
        _refuse_without_effect(values, source, defaults, recipe, resolved)
    return resolved


def changeable(names: Sequence[str], recipe: Config, source: Source) -> tuple[str, ...]:
    """Return settings, or sections, that may change within a run, as `Config` names them.

    Raises:
        ConfigError: there is no such setting, or it never may change.
    """
    settings = [name for name, _, _ in fields_of(recipe)]
    known = settings + sorted({name.split(".")[0] for name in settings if "." in name})
    flag = source.name("allow_config_change")
    for given in names:
        name = given.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{flag}: there is no setting '{shortened(name)}'{nearest(name, known)}")
        if name in ("model", "train", "train.global_batch_size") or name.startswith("model."):
            raise ConfigError(
                f"{flag} {name}: the model and the global batch cannot change within a run; begin another with"
                " --run-dir"
            )
    return tuple(given.replace("-", "_") for given in names)


def in_sections(settings: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return a program's settings by section, where some are given by short or full names: `{"steps": 5}`."""
    known = {name for name, _, _ in fields_of(recipe)}
    result: dict[str, Any] = {}
    for name, value in settings.items():
        section, _, last = full_name(name.replace("-", "_"), known).partition(".")
        whole = value if isinstance(value, Mapping) or not last else {last: value}
        before = result.get(section if last else name)
        result[section if last else name] = {**before, **whole} if isinstance(before, Mapping) else whole
    return result


def read_toml(path: Path) -> dict[str, Any]:
    """Read a file of settings.

    Raises:
        ConfigError: it cannot be read, or is not TOML.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    check_path(str(path), "file", "--config")
    try:
        return tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path} cannot be read: {reason_of(error)}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not TOML: {str(error).splitlines()[0]}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is not TOML that can be read: brackets within brackets without end") from error


def _merged(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """Return the recipe with the values of the first layer, and where these alone do not fit, of the others, too.

    A file may hold one of two settings that belong together, and a flag the other.

    Raises:
        ConfigError: a value is wrong, or they do not fit with those of the others either.
    """
    (values, source), *others = layers
    try:
        return merge(recipe, values, source)
    except MisfitError as error:
        sections = [found for given, _ in layers if isinstance(found := given.get(error.section), Mapping)]
        whole = {name.replace("-", "_"): value for section in sections for name, value in section.items()}
        if len(sections) < 2 or whole == values.get(error.section):
            raise
        try:
            return _merged(recipe, [({**values, error.section: whole}, source), *others])
        except MisfitError:
            raise
        except ConfigError:  # another layer holds what is wrong: it would be blamed on this one
            raise error from None


def _with_optimizer(recipe: Recipe, values: Mapping[str, Any], source: Source, before: Sequence[Layer]) -> Recipe:
    """Return the recipe with the class of settings that the optimizer named in `values` has.

    Raises:
        ConfigError: there is no such optimizer, or a setting that was given belongs to another one.
    """
    section = values.get("optim")
    if not isinstance(section, Mapping):
        return recipe
    optim = recipe.optim
    name = section.get("name")
    name = name[-1] if isinstance(name, Words) and name else name
    if isinstance(name, str):
        try:
            optim = with_name(optim, name)
        except ConfigError as error:
            raise ConfigError(f"{source.name('optim.name')}: {error}") from error
    for earlier, its_source in before:
        _refuse_others(
            optim, {key: v for key, v in _section(earlier).items() if _is_set(recipe.optim, key)}, its_source
        )
    _refuse_others(optim, section, source)
    return dataclasses.replace(recipe, optim=optim)


def _section(values: Mapping[str, Any]) -> Mapping[str, Any]:
    section = values.get("optim")
    return section if isinstance(section, Mapping) else {}


def _is_set(optim: OptimConfig, key: str) -> bool:
    """Tell whether a setting has another value than its default."""
    items = {item.name: item for item in dataclasses.fields(optim)}
    name = key.replace("-", "_")
    return name in items and getattr(optim, name) != items[name].default


def _refuse_others(optim: OptimConfig, given: Mapping[str, Any], source: Source) -> None:
    own = {item.name for item in dataclasses.fields(optim)}
    for key in given:
        others = [] if key.replace("-", "_") in own else [*owners(key.replace("-", "_"))]
        if others:
            raise ConfigError(
                f"{source.name(f'optim.{key}')} is a setting of {_listed(others)}, and the optimizer is"
                f" {optim.name}: leave it out, or give --optim.name {others[0]}"
            )


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def _without_replaced(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """Return the recipe without its own settings that those of the user, in the last layer, stand in for."""
    values, _ = layers[-1]
    train, optim = (_given_in(values, section) for section in ("train", "optim"))
    before = {name for earlier, _ in layers[:-1] for name in _given_in(earlier, "train")}
    left_open: Any = dict.fromkeys((*_other_length(train), *_other_batch(recipe, train, before)))
    warmup: Any = {"warmup_steps": None} if "warmup_fraction" in optim else {}
    warmup = {"warmup_fraction": 0.0} if "warmup_steps" in optim else warmup
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(recipe.train, **left_open),
        optim=dataclasses.replace(recipe.optim, **warmup),
    )


def _given_in(values: Mapping[str, Any], section: str) -> set[str]:
    inner = values.get(section)
    return {name.replace("-", "_") for name in inner} if isinstance(inner, Mapping) else set()


def _other_length(given: set[str]) -> list[str]:
    """Return steps where epochs are given, and the other way round."""
    pair = {"steps", "epochs"}
    return [*(pair - given)] if len(pair & given) == 1 else []


def _other_batch(recipe: Recipe, given: set[str], before: set[str]) -> list[str]:
    """Return the batch setting that is left open: two of the three are enough, the recipe's own is the first to go."""
    batch = ("accum_steps", "micro_batch_size", "global_batch_size")
    is_settled = all(name in given or getattr(recipe.train, name) is not None for name in batch)
    if not is_settled or not given & {*batch}:
        return []
    others = [name for name in batch if name not in given]
    return ([name for name in others if name not in before] or others)[:1]


def _with_warmup_that_fits(recipe: Recipe, layers: Sequence[Layer]) -> Recipe:
    """Return the recipe with its own warm-up as a share of the steps, where a user's fewer steps have no room for it.

    A warm-up that the user has given stays as it is, and is refused where it does not fit.
    """
    warmup, steps = recipe.optim.warmup_steps, recipe.train.steps
    is_given = any("warmup_steps" in _given_in(values, "optim") for values, _ in layers)
    if is_given or not warmup or steps is None or steps > warmup:
        return recipe
    optim = dataclasses.replace(recipe.optim, warmup_steps=None, warmup_fraction=_SHARE_OF_WARMUP)
    return dataclasses.replace(recipe, optim=optim)


def _refuse_without_effect(
    values: Mapping[str, Any], source: Source, defaults: Recipe, recipe: Recipe, resolved: Recipe
) -> None:
    """Raise ConfigError where a setting that was given has no effect.

    A file may hold what is the recipe's or anybody's default, or what it comes to where it is left out: the resolved
    settings of every run are such a file.

    Args:
        values: of a layer.
        source: where they come from.
        defaults: the recipe without any layer.
        recipe: with all of them.
        resolved: the same, resolved.
    """
    own, given, found = (flattened_settings(config) for config in (defaults, recipe, resolved))
    unused = dict(recipe.unused())
    plain = {name: item.default for name, item, _ in fields_of(recipe)}
    names = [*flattened(values)]
    left_out = _left_out(recipe, defaults) if source.file and not unused.keys().isdisjoint(names) else {}
    for name in names:
        harmless = (None, *((own.get(name), plain.get(name)) if source.file else ()))
        comes_to_that = name in left_out and given.get(name) == left_out[name]
        if name in unused and given.get(name) not in harmless and not comes_to_that:
            raise ConfigError(f"{source.name(name)} has no effect: {unused[name]}")
        if given.get(name) != found.get(name):
            raise ConfigError(
                f"{source.name(name)} has no effect: it is {found.get(name)} in the model that the training begins with"
            )


def _left_out(recipe: Recipe, defaults: Recipe) -> dict[str, Any]:
    """Return what all settings come to where those that have no effect are as in `defaults`, by their names."""
    changes: dict[str, dict[str, Any]] = {}
    for name, _ in recipe.unused():
        section, _, last = name.rpartition(".")
        if hasattr(getattr(defaults, section, None), last):  # another optimizer has other settings
            changes.setdefault(section, {})[last] = getattr(getattr(defaults, section), last)
    try:
        sections = {name: dataclasses.replace(getattr(recipe, name), **values) for name, values in changes.items()}
        return flattened_settings(dataclasses.replace(recipe, **sections).resolve())
    except ConfigError:  # they do not fit together so
        return {}


def flattened_settings(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the value of every setting by its name, such as `train.steps`."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value, name = getattr(config, item.name), f"{prefix}{item.name}"
        flat.update(flattened_settings(value, f"{name}.") if dataclasses.is_dataclass(value) else {name: value})
    return flat
