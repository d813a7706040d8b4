"""A trained model as a program: torch.export's `model.pt2`, which needs torch alone, or `model.onnx`, without it."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import warnings

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hvdtrain.errors import ConfigError, one_line
from hvdtrain.verbs.loading import Loading
from hvdtrain.verbs.options import ExportOptions

ONNX_FILE = "model.onnx"
_LIBRARIES = ("onnx", "onnxscript")


def further_files(how: Loading, weights: dict[str, Tensor], options: ExportOptions) -> dict[str, bytes]:
    """Return the files that are asked for beside the weights, by name.

    Raises:
        ConfigError: this model is not exported so, a library is missing, or torch cannot follow the model.
    """
    asked = {"--program": options.program, "--format onnx": options.format == "onnx"}
    for flag, is_asked in asked.items():
        if is_asked and how.program is None:
            raise ConfigError(
                f"{flag} is for classifiers of images, language models and models that hear: of others, call"
                " torch.export.export, or torch.onnx.export, with an input of theirs"
            )
    if not any(asked.values()) or how.program is None:
        return {}
    if options.format == "onnx":
        _check_libraries()
    program = how.program(weights)
    files = {}
    if options.program:
        saved = io.BytesIO()
        torch.export.save(program, saved)
        files["model.pt2"] = saved.getvalue()
    if options.format == "onnx":
        files[ONNX_FILE] = _as_onnx(program, how.inputs)
    return files


def _check_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"--format onnx needs {' and '.join(missing)}: pip install 'hvdtrain[onnx]'")


def _as_onnx(program: ExportedProgram, inputs: str) -> bytes:
    """Return a program of one input as ONNX, weights within.

    Raises:
        ConfigError: torch.onnx has no operator for a part of it, or it is too large for one file.
    """
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            made = torch.onnx.export(program, input_names=[inputs], output_names=["logits"], dynamo=True, verbose=False)
            assert made is not None
            content: bytes = made.model_proto.SerializeToString()
    except Exception as error:  # whatever a conversion raises
        raise ConfigError(f"--format onnx: torch.onnx cannot write this model: {one_line(error)}") from error
    return content
