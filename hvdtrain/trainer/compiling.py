"""What of a model is compiled, and that whoever watches over the ranks hears of it."""

from __future__ import annotations

import weakref
from typing import Literal

import torch
from torch import nn

from hvdtrain.models.compilation import can_compile_for
from hvdtrain.models.private_torch import on_compilation
from hvdtrain.process.progress import Progress
from hvdtrain.settings import ModelConfig
from hvdtrain.world import World


def what_is_compiled(
    settings: ModelConfig, model: nn.Module, device: torch.device
) -> Literal["none", "model", "blocks"]:
    """Return what `--model.compile` comes to: for `auto`, the blocks on a GPU that can be compiled for, else nothing.

    Blocks rather than the whole, whose gradients would all be there at the end of its backward pass.
    """
    if settings.compile != "auto":
        return settings.compile
    return "blocks" if blocks_of(model) and can_compile_for(device) else "none"


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the parts of the model's `nn.ModuleList`s."""
    return [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]


class _Watched:
    """The world whose progress is noted; the compiler's callbacks are the process's."""

    world: weakref.ref[World] | None = None
    progress: Progress | None = None
    """That of the compilation under way."""
    before: str = ""


def note_compilations(world: World) -> None:
    """Have this rank's progress say when it compiles, which takes minutes and is no hang, from now on."""
    _Watched.world = weakref.ref(world)
    on_compilation(_begin, _end)  # a notebook may have called torch._dynamo.reset() since the last training


def _begin(*_: object) -> None:
    world = _Watched.world() if _Watched.world is not None else None
    if world is not None:
        _Watched.progress, _Watched.before = world.progress, world.progress.read().phase
        world.progress.enter("compilation")


def _end(*_: object) -> None:
    progress, _Watched.progress = _Watched.progress, None
    if progress is not None and progress.read().phase == "compilation":
        progress.enter(_Watched.before)  # type: ignore[arg-type]
