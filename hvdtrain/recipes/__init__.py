"""Recipes: model, data, loss and settings under one name. A recipe is a function that returns a `Recipe`.

A user's own recipe is a Python file with a function `recipe` that does the same: `train my_recipe.py`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

from hvdtrain.errors import ConfigError, HvdtrainError
from hvdtrain.process.stop import StoppedEarly
from hvdtrain.process.tracebacks import place_of, sentence_of, shown, stack_of
from hvdtrain.settings import nearest
from hvdtrain.settings.paths import check_path
from hvdtrain.settings.units import shortened
from hvdtrain.trainer.task import Recipe

# Name on the command line -> module and function.
RECIPES = {
    "lm": ("hvdtrain.recipes.lm", "lm"),
    "lm-10m": ("hvdtrain.recipes.lm", "lm_10m"),
    "lm-124m": ("hvdtrain.recipes.lm", "lm_124m"),
    "lm-1b": ("hvdtrain.recipes.lm", "lm_1b"),
    "lm-3b": ("hvdtrain.recipes.lm", "lm_3b"),
    "hf": ("hvdtrain.recipes.hf", "hf"),
    "dpo": ("hvdtrain.recipes.dpo", "dpo"),
    "mnist": ("hvdtrain.recipes.mnist", "mnist"),
    "seq2seq": ("hvdtrain.recipes.seq2seq", "seq2seq"),
    "ctc": ("hvdtrain.recipes.ctc", "ctc"),
    "resnet": ("hvdtrain.recipes.resnet", "resnet"),
}


_SYNONYMS = {
    "lm": "gpt nanogpt language-model text pretrain pretraining decoder",
    "hf": (
        "gpt2 llama mistral qwen gemma phi lora peft sft finetune fine-tune finetuning fine-tuning causal-lm instruct"
        " transformers huggingface chat"
    ),
    "dpo": "preference preferences rlhf alignment",
    "seq2seq": "t5 mt5 bart mbart marian nllb m2m100 translation translate mt summarization summarisation",
    "ctc": "wav2vec2 wav2vec hubert wavlm speech asr audio transcription speech-recognition",
    "resnet": "image images vision imagenet cifar cifar10 vit convnext image-classification classifier",
    "mnist": "fashion-mnist digits mlp",
}
"""What people call a recipe that has another name here."""
_SETTINGS = (".toml", ".yaml", ".yml", ".json", ".cfg", ".ini")


def load_recipe(name: str) -> Recipe:
    """Return the default settings of a recipe, by name or by the path of a user's `.py` file.

    Raises:
        ConfigError: there is no such recipe, or the file does not define one.
    """
    if name.endswith(".py"):
        return _from_file(Path(name))
    if name.endswith(_SETTINGS):
        raise ConfigError(
            f"{shortened(name)} is a file of settings, and no recipe: train RECIPE --config FILE, and the file is TOML"
        )
    if name not in RECIPES:
        by_meaning = [recipe for recipe, words in _SYNONYMS.items() if name.lower() in words.split()]
        hint = f"; did you mean '{by_meaning[0]}'?" if by_meaning else nearest(name, RECIPES)
        raise ConfigError(f"there is no recipe '{shortened(name)}'{hint} (or give the path of a .py file)")
    module, function = RECIPES[name]
    return cast(Callable[[], Recipe], getattr(importlib.import_module(module), function))()


def _from_file(path: Path) -> Recipe:
    check_path(str(path), "file", "the recipe file")
    _check_has_recipe(path)
    name = f"hvdtrain_recipe_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up by name
    with _in_a_sentence(path, "cannot be loaded"):
        spec.loader.exec_module(module)
    function = getattr(module, "recipe", None)
    if not callable(function):
        raise ConfigError(_says_no_recipe(path))
    with _in_a_sentence(path, "defines a function 'recipe' that fails"):
        recipe = function()
    if not isinstance(recipe, Recipe):
        raise ConfigError(f"recipe() in {path} returned a {type(recipe).__name__}, not a hvdtrain.Recipe")
    return recipe


def _check_has_recipe(path: Path) -> None:
    """Raise ConfigError where a file does not even mention a recipe: to run a program to its end is not to load it."""
    text = path.read_text(errors="replace")
    if re.search(r"\brecipe\b|import \*", text):
        return
    with contextlib.suppress(SyntaxError, ValueError):  # to be told of when it is loaded
        ast.parse(text)
        raise ConfigError(_says_no_recipe(path))


def _says_no_recipe(path: Path) -> str:
    return (
        f"{path} defines no function 'recipe' that returns a hvdtrain.Recipe; a program with a loop of its own is"
        f" started by a launcher: horovodrun -np 2 python {path}, or hvdtrain -np 2 python {path}"
    )


@contextlib.contextmanager
def _in_a_sentence(path: Path, what: str) -> Iterator[None]:
    """Turn what a user's file raises into a ConfigError that names its line and keeps his part of the stack."""
    try:
        yield
    except (HvdtrainError, StoppedEarly):  # a signal may come while the file is read
        raise
    except SyntaxError as error:
        where = f"{shown(error.filename or str(path))}, line {error.lineno}"
        raise ConfigError(f"{where}, is not Python: {error.msg}") from error
    except SystemExit as error:
        raise ConfigError(f"{path} {what}: it calls sys.exit({error.code!r}) ({place_of(error)})") from error
    except BaseException as error:  # asyncio's CancelledError, a library's own, and a KeyboardInterrupt by hand, too
        refusal = ConfigError(f"{path} {what}: {sentence_of(error)}")
        refusal.stack = stack_of(error)
        raise refusal from error
