"""`predict` of a model that hears: what is said in clips of speech."""

from __future__ import annotations

import sys

from hvdtrain.rundir.trained import Trained
from hvdtrain.verbs.kit import write_json
from hvdtrain.verbs.options import PredictOptions


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
