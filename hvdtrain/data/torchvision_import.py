"""Import torchvision, also where its operators cannot be loaded.

The compiled operators in torchvision's wheel are built for one torch; beside a CPU-only torch they do not load. The
import then fails, because torchvision registers gradients and shapes for operators that do not exist. Data sets,
transforms and classification models need none of them, so the operators are declared, without an implementation, and
the import goes through. What needs them (`ops.nms`, detection models, `io.read_image`) still fails when it is called.
Seen with torch 2.13.0+cpu and torchvision 0.28.0.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import torch

from hvdtrain.errors import DataError

_MISSING_OPERATOR = re.compile(r"operator torchvision::(\w+) does not exist")
_REGISTERED = re.compile(r"register_fake\(\s*f?[\"']torchvision::(\w+)[\"']")
_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_declared: set[str] = set()


def import_torchvision(module: str = "torchvision") -> ModuleType:
    """Import torchvision, or a module of it such as `torchvision.datasets`; again at no cost.

    Raises:
        DataError: torchvision, or something that it needs, is not installed.
    """
    while True:
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name not in ("torchvision", "PIL", "numpy"):
                raise
            raise DataError(
                f"{error.name} is not installed: run `pip install pillow numpy`, `pip install --no-deps torchvision`;"
                f" take the torchvision made for torch {torch.__version__} (0.28.0 for torch 2.13.0)."
                " Without --no-deps, pip may put another torch in place of yours."
            ) from error
        except RuntimeError as error:
            missing = _MISSING_OPERATOR.search(str(error))
            if missing is None or missing[1] in _declared:
                raise
            names = {missing[1], *_registered_names()} - _declared
            _forget_torchvision()  # modules kept from a failed import are no attributes of the next
            for name in names:
                if not hasattr(torch.ops.torchvision, name):
                    torch.library.define(f"torchvision::{name}", _SCHEMA)
            _declared.update(names)


def _registered_names() -> set[str]:
    """Return the operators for which torchvision registers shapes.

    All are declared before it is imported again: up to torch 2.6 an operator whose shapes a first, failed import has
    registered refuses to have them registered a second time.
    """
    found = importlib.util.find_spec("torchvision")
    folders = [Path(folder) for folder in found.submodule_search_locations or ()] if found else []
    sources = [file.read_text(errors="replace") for folder in folders for file in folder.glob("*.py")]
    return {name for text in sources for name in _REGISTERED.findall(text)}


def _forget_torchvision() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
