"""`predict` of clips of speech, and `generate` of one: what is said in them, by a model that hears."""

from __future__ import annotations

import sys

from hvdtrain.errors import ConfigError
from hvdtrain.rundir.trained import Trained
from hvdtrain.verbs.kit import write_json
from hvdtrain.verbs.options import GenerateOptions, PredictOptions
from hvdtrain.verbs.translate import refuse_what_draws


def transcribe(options: PredictOptions, trained: Trained) -> int:
    """Write down what is said in each clip, a line each; returns the exit code.

    Raises:
        ConfigError: soundfile is not installed.
        DataError: the model cannot be loaded, or a clip cannot be read.
    """
    from hvdtrain.recipes.transformers_models.listening import Listener

    listener = Listener(trained)
    width = max(len(str(file)) for file in options.files)
    answers = []
    for file in options.files:
        text = listener.write_down(file)
        answers.append({"file": str(file), "text": text})
        sys.stdout.write(f"{file!s:{width}}   {text}\n")
    write_json(options.json, {"source": trained.source, "clips": answers})
    return 0


def transcribe_file(options: GenerateOptions, trained: Trained) -> int:
    """Answer `generate` of a model that hears: write the text of one clip, and nothing else; returns the exit code.

    Raises:
        ConfigError: there is no clip, or an option that is for other models was given.
        DataError: the model cannot be loaded, or the clip cannot be read.
    """
    refuse_what_draws(options, "writes down speech")
    if options.beams is not None:
        raise ConfigError(f"--beams is for encoder-decoders, and {options.run_dir} writes down speech: leave it out")
    if options.file is None or options.prompt:
        raise ConfigError(
            f"{options.run_dir} writes down speech: give it a clip by --file, or several by python -m hvdtrain predict"
            f" {options.run_dir} FILES..."
        )
    from hvdtrain.recipes.transformers_models.listening import Listener

    sys.stdout.write(f"{Listener(trained).write_down(options.file)}\n")
    return 0
