"""How an exported model is loaded again: what `export` prints, and writes into README.md."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.export import ExportedProgram

from hvdtrain.errors import ConfigError, one_line
from hvdtrain.models.small_resnet import DEPTHS
from hvdtrain.recipes.image_models import MODEL_TYPE, Description, load_classifier, read_description
from hvdtrain.rundir.trained import Trained
from hvdtrain.settings.untrusted import read_json

CTC, SEQ2SEQ = "AutoModelForCTC", "AutoModelForSeq2SeqLM"
"""Auto classes of transformers."""


@dataclass(frozen=True)
class Loading:
    """How a kind of model is loaded."""

    hint: str
    """A line for a person; `{output}` stands for the directory."""
    note: str = ""
    """What README.md says; nothing where those who load it know."""
    program: Callable[[dict[str, Tensor]], ExportedProgram] | None = None
    """Returns torch.export's program with these weights; None where a model is not exported so."""
    inputs: str = "images"
    """What the program is given."""


def loading_of(trained: Trained, is_merged: bool = False) -> Loading:
    """Return how a trained model is loaded; of adapters, as part of the whole model if they are merged.

    Raises:
        DataError: what describes it is damaged.
    """
    if trained.model_type == MODEL_TYPE:
        about = read_description(trained.folder)
        hint = "README.md there says how to load it; python -m hvdtrain predict {output} FILES... answers with it"
        return Loading(hint, _classifier_note(about), lambda weights: _program(about, weights, trained.source))
    if trained.is_adapter and not is_merged:
        return Loading("peft.AutoPeftModelForCausalLM.from_pretrained({output!r}); --merged writes the whole model")
    if trained.model_type:
        kind = auto_class_of(trained)
        hint = f"transformers.{kind}.from_pretrained({{output!r}})"
        if kind == SEQ2SEQ:
            return Loading(hint)
        return Loading(hint, "", partial(_of_transformers, trained, kind), "waves" if kind == CTC else "tokens")
    return Loading("README.md there says how to load it", _plain_note())


def auto_class_of(trained: Trained) -> str:
    """Return the auto class of transformers that loads a model, by what its config.json says; nothing without one."""
    if not trained.model_type:
        return ""
    about = read_json(trained.folder / "config.json")
    named = about.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    if name.endswith("ForCTC"):
        return CTC
    return SEQ2SEQ if name and about.get("is_encoder_decoder") is True else "AutoModelForCausalLM"


def _of_transformers(trained: Trained, kind: str, weights: dict[str, Tensor]) -> ExportedProgram:
    from hvdtrain.recipes.transformers_models.as_program import program_of

    return program_of(trained, weights, kind)


def _program(about: Description, weights: dict[str, Tensor], source: str) -> ExportedProgram:
    """Return the program of a classifier for any number of images.

    Raises:
        ConfigError: torch.export cannot follow the model.
    """
    model = load_classifier(about, weights, source)
    example = torch.zeros(2, about.channels, about.image_size, about.image_size, dtype=next(model.parameters()).dtype)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (example,), dynamic_shapes=({0: torch.export.Dim("images")},))
    except Exception as error:  # whatever tracing a model raises
        raise ConfigError(f"torch.export cannot follow {about.name}: {one_line(error)}") from error


def _classifier_note(about: Description) -> str:
    if about.channels == 1:
        lines = ["from hvdtrain.models.mlp import Mlp", "", "model = Mlp()"]
    elif about.name in DEPTHS:
        build = f"SmallResNet({DEPTHS[about.name]}, {len(about.classes)})"
        lines = ["from hvdtrain.models.small_resnet import SmallResNet", "", f"model = {build}"]
    else:
        options = {"num_classes": len(about.classes)}
        if about.name.startswith("vit_"):
            options["image_size"] = about.image_size
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        if about.name.startswith("maxvit_"):
            given += f", input_size=({about.image_size}, {about.image_size})"
        if about.name in ("googlenet", "inception_v3"):
            given += ", aux_logits=False, init_weights=True"
        lines = ["import torchvision", "", f'model = torchvision.models.get_model("{about.name}", {given})']
    code = "\n".join(["import safetensors.torch", *lines, *_LOAD, "model.eval()"])
    shape = f"(n, {about.channels}, {about.image_size}, {about.image_size})"
    return f"""\
# {about.name}, {len(about.classes)} classes

`model.safetensors` holds the `state_dict()`, `config.json` the classes in the order of the logits.

```python
{code}
```

It is shown images `{shape}`: the shorter side resized to {about.resize} pixels, the middle cut out, brought from
0..255 to 0..1, less the mean {list(about.mean)}, divided by the standard deviation {list(about.std)}.
`model.pt2`, if it is here, is the same for torch alone: `torch.export.load("model.pt2").module()(images)`; `model.onnx`
for onnxruntime: `onnxruntime.InferenceSession("model.onnx").run(["logits"], {{"images": images}})`, of numpy's arrays.
"""


_LOAD = ('model.load_state_dict(safetensors.torch.load_file("model.safetensors"))',)


def _plain_note() -> str:
    return """\
# A trained model

`model.safetensors` holds the `state_dict()` of the recipe's model, tied tensors once.

```python
import safetensors.torch

weights = safetensors.torch.load_file("model.safetensors")
model.load_state_dict(weights)  # the model that the recipe's build() makes; strict=False where weights are tied
```
"""
