"""A model and a micro-batch without storage: shapes and types are real, and operators run on them at no cost."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hvdtrain.data.nested import map_tensors
from hvdtrain.data.readers import read_samples
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.optim.groups import trainable
from hvdtrain.optim.table import own_class
from hvdtrain.settings import Config
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.model import own_type, prepare_blocks


@contextlib.contextmanager
def without_storage() -> Iterator[None]:
    """Within, modules keep the shapes of their parameters alone, on torch's meta device."""
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    module: Any = nn.Module
    module.register_parameter = register_empty
    try:
        yield
    finally:
        module.register_parameter = register


def fake_model(job: Job, mode: FakeTensorMode, all_trained: bool = False) -> nn.Module:
    """Return a copy of the model as it is trained, without storage; `all_trained` as for `memory.estimate`."""
    with mode:
        model = _fake(job.task.model, job.world.device, own_type(job.config.train.precision))
        for parameter in trainable(model) if all_trained else ():
            parameter.requires_grad_(True)
        prepare_blocks(model, plain_settings(job.config).model)
    return model


def micro_batch_samples(job: Job) -> Tensor:
    """Return the samples, int64 `(n,)`, of a micro-batch at the beginning."""
    return job.order.global_batch(0)[: job.plan.micro_batch_size]


def fake_micro_batch(job: Job, mode: FakeTensorMode) -> Any:
    """Return it without storage."""
    return map_tensors(mode.from_tensor, read_samples(job.task.train_data, micro_batch_samples(job)))


def plain_settings(config: Config) -> Config:
    """Return the settings without what fake tensors cannot do, and what needs other ranks."""
    model = dataclasses.replace(config.model, compile="none", sync_batch_norm=False)
    optim = own_class(config.optim)
    if isinstance(optim, AdamWConfig):
        optim = dataclasses.replace(optim, kernel="loop")
    return dataclasses.replace(config, model=model, optim=optim)


def _fake(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy whose parameters and buffers have no storage; real numbers of type `dtype`, if one is given."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        own = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=own, device=device)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
    return copy.deepcopy(model, memo)
