"""`generate` of an encoder-decoder: texts, or the lines of a file, translated."""

from __future__ import annotations

import sys
import time

from hvdtrain.data.text.encodings import read_text
from hvdtrain.errors import ConfigError, counted
from hvdtrain.rundir.trained import Trained
from hvdtrain.verbs.kit import standard_input
from hvdtrain.verbs.options import GenerateOptions

_BATCH, _BEAMS = 32, 4


def translate(options: GenerateOptions, trained: Trained) -> int:
    """Write what the model makes of each text on a line of its own; returns the exit code.

    Raises:
        ConfigError: an option that is for language models was given.
        DataError: model or file cannot be read.
    """
    from hvdtrain.recipes.transformers_models.translating import Translator

    refuse_what_draws(options, "translates")
    texts = _texts(options)
    translator = Translator(trained)
    started = time.perf_counter()
    for start in range(0, len(texts), _BATCH):
        part = texts[start : start + _BATCH]
        # Whoever translates a file counts on its lines: an empty one stays, and no answer takes two.
        wanted = [text for text in part if text]
        answers = iter(translator.translate(wanted, options.beams or _BEAMS, options.max_tokens) if wanted else [])
        for text in part:
            sys.stdout.write(" ".join(next(answers).split("\n")) + "\n" if text else "\n")
        sys.stdout.flush()
    seconds = time.perf_counter() - started
    rate = len(texts) / max(seconds, 1e-9)
    sys.stderr.write(f"{counted(len(texts), 'text')} in {seconds:.2f} s: {rate:,.1f} texts/s\n")
    return 0


def _texts(options: GenerateOptions) -> list[str]:
    if options.file is not None:
        if options.prompt:
            raise ConfigError("give --prompt or --file, not both")
        whole = read_text(options.file.expanduser(), f"--file {options.file}")
    elif options.prompt:
        return [text.strip() for text in options.prompt]
    elif sys.stdin is None or sys.stdin.isatty():
        raise ConfigError("there is nothing to translate: give --file, --prompt, or texts by standard input")
    else:
        whole = standard_input()
    return [line.strip() for line in whole.removesuffix("\n").split("\n")] if whole else []


def refuse_what_draws(options: GenerateOptions, what: str) -> None:
    """Raise ConfigError where an option was given that only language models have.

    Args:
        options: as given.
        what: the run does instead.
    """
    given = {
        "--chat": options.chat,
        "--temperature": options.temperature is not None,
        "--top-k": options.top_k is not None,
        "--top-p": options.top_p is not None,
        "--stop": bool(options.stop),
        "--no-cache": not options.cache,
    }
    for flag, is_given in given.items():
        if is_given:
            raise ConfigError(f"{flag} is for language models, and {options.run_dir} {what}: leave it out")


def refuse_for_language_models(options: GenerateOptions) -> None:
    """Raise ConfigError where an option was given that language models do not have."""
    for flag, is_given in {"--file": options.file is not None, "--beams": options.beams is not None}.items():
        if is_given:
            raise ConfigError(f"{flag} is for runs of seq2seq and ctc, and {options.run_dir} is none: leave it out")
