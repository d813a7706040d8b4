"""The task of `recipes/dpo.py`: pairs, the model, its reference and the loss. Needs torch and transformers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvdtrain.data.config import cache_dir
from hvdtrain.data.dataset import in_batches
from hvdtrain.data.text.packed import read_meta, write_packed
from hvdtrain.data.text.preference_pairs import PreferencePairs, PreferenceReader
from hvdtrain.data.text.sources import find_sources
from hvdtrain.errors import ConfigError, DataError, counted
from hvdtrain.models.private_torch import is_fake
from hvdtrain.recipes.dpo import DpoConfig, PairsConfig, Preferences
from hvdtrain.recipes.hf_task import adapted, describe_adapters, tokenizer_of, try_out, write_files
from hvdtrain.recipes.transformers_models.forward import Head
from hvdtrain.recipes.transformers_models.layouts import IN_EQUAL_ROWS
from hvdtrain.recipes.transformers_models.loading import check_length, fit_embeddings, identity, load_model
from hvdtrain.recipes.transformers_models.lora import BaseWeights
from hvdtrain.recipes.transformers_models.rows import row_log_probs
from hvdtrain.trainer.component import Component
from hvdtrain.trainer.job import Job
from hvdtrain.trainer.modes import in_eval_mode
from hvdtrain.trainer.state import Training
from hvdtrain.trainer.step import autocast, to_device
from hvdtrain.trainer.task import Task

# Pairs whose reference is computed together, by one rank: the same on any number of ranks, so that it comes out alike.
_TOGETHER = 8
METRICS = ("loss", "reward_accuracy", "reward_margin", "chosen_reward", "rejected_reward")


def build_task(recipe: Preferences, say: Callable[[str], None]) -> Task:
    """Return the task; `say` tells a person what takes long."""
    data, settings, length = recipe.data, recipe.model, recipe.data.sequence_length
    tokenizer = tokenizer_of(data, settings)
    folder = _prepare(data, tokenizer, say)
    train = PreferencePairs(folder, "train", length)
    held_out = PreferencePairs(folder, "val", length, first=len(train))
    for name, pairs in (("training", train), ("held-out", held_out)):
        if len(pairs) == 0:
            lost = pairs.num_left_out + pairs.num_alike
            raise DataError(
                f"no {name} pair fits into {length} tokens: give a larger --data.sequence-length"
                if lost
                else f"there are no {name} pairs: use more, or give --data.val-path"
            )
    model = load_model(settings.path, None, settings.attention, recipe.train.seed, settings.trust_remote_code)
    meta = read_meta(folder)
    embeddings = fit_embeddings(model, len(tokenizer), meta["largest_token"], settings.resize_embeddings)
    check_length(model, length)
    base = adapted(model, settings, recipe.train.seed)
    way = try_out(model, train.batch(torch.arange(min(len(train), 8)))[0], max(train.width, held_out.width), ())
    if way.loss.balance is not None:
        raise ConfigError(
            "a mixture of experts is balanced by a loss that preferences do not have: set output_router_logits to false"
            " in the model's config.json"
        )
    loss = DpoLoss(recipe.dpo, way.loss.head, way.loss.layout is IN_EQUAL_ROWS, len(train) + len(held_out))
    lines = (
        f"data:       {data.path}: {len(train):,} pairs with {train.num_tokens:,} tokens in their answers,"
        f" {len(held_out):,} pairs held out, vocabulary {len(tokenizer):,}",
        *_describe_pairs(meta, (train, held_out), length),
        embeddings,
        describe_adapters(settings, model),
        f"reference:  {'the base model' if base else 'the model as it is before the first step'}, computed once",
    )
    return Task(
        model=model,
        train_data=train,
        val_data=held_out,
        loss_sums=loss,
        metrics=METRICS,
        unit="pairs",
        write_model_files=lambda folder: write_files(folder, model, tokenizer, base),
        components=(
            *(() if base is None else (lambda job: BaseWeights(base),)),
            partial(Reference, loss, train, held_out),
        ),
        description="\n".join(filter(None, lines)),
        fingerprint=f"{folder.name} {length}",
    )


def _describe_pairs(meta: dict[str, Any], parts: Sequence[PreferencePairs], length: int) -> Iterator[str]:
    """Yield what a person should know of the pairs: their formats, and what is cut or left out of them."""
    num_cut = sum(pairs.num_cut for pairs in parts)
    num_left_out = sum(pairs.num_left_out for pairs in parts)
    num_alike = sum(pairs.num_alike for pairs in parts)
    yield f"formats:    {', '.join(f'{count:,} {name}' for name, count in meta['formats'].items())}"
    if num_cut:
        yield f"cut:        {counted(num_cut, 'pair')} at the end, longer than {length} tokens"
    if num_left_out:
        yield f"left out:   {counted(num_left_out, 'pair')} whose prompt leaves no room for an answer"
    if num_alike:
        yield f"left out:   {counted(num_alike, 'pair')} whose answers differ only behind {length} tokens"
    if meta["num_skipped"]:
        yield f"left out:   {counted(meta['num_skipped'], 'record')} that cannot be used, such as {meta['skipped'][0]}"


def _prepare(data: PairsConfig, tokenizer: Any, say: Callable[[str], None]) -> Path:
    """Return the folder of the tokenised pairs."""
    splits = find_sources(data, say)
    reader = PreferenceReader(tokenizer, data.on_error)
    digest = hashlib.sha256(json.dumps(["pairs", data.on_error, identity(tokenizer)]).encode())
    for part in splits.values():
        digest.update("\0".join(["", *(f"{source.digest} {source.held_out_below}" for source in part)]).encode())
    work = {name: partial(reader.read, part) for name, part in splits.items()}
    return write_packed(cache_dir(data), digest.hexdigest()[:32], work, reader.describe, say)


@dataclass
class DpoLoss:
    """The loss of arXiv:2305.18290, equation 7: -log sigmoid(beta x (log-ratio of the chosen answer - the rejected's)).

    A log-ratio is the log-probability of an answer, given its prompt, less that of the reference; beta times it is the
    answer's reward. With label smoothing e the loss is (1 - e) of this and e of that with the answers exchanged
    (https://ericmitchell.ai/cdpo.pdf).
    """

    settings: DpoConfig
    head: Head | None
    """The model's, where it can be given a part of the hidden states."""
    draws: bool
    """The model draws random numbers: then a call's rows are the samples, and their shape depends on no others."""
    num_pairs: int
    reference: Tensor = field(init=False)
    """float64 `(pairs, 2)`: log-probabilities of the chosen and the rejected answer; nan where they are not known."""

    def __post_init__(self) -> None:
        self.reference = torch.full((self.num_pairs, 2), torch.nan, dtype=torch.float64)

    def __call__(self, model: nn.Module, batch: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """Return the sums of `METRICS` over the pairs of a batch of `PreferencePairs`."""
        policy = self.log_probs(model, batch)
        if self.reference.device != policy.device and not is_fake(policy):
            self.reference = self.reference.to(policy.device)
        reference = torch.zeros_like(policy) if is_fake(policy) else self.reference[batch[2]].to(policy.dtype)
        rewards = self.settings.beta * (policy - reference)
        margins = rewards[:, 0] - rewards[:, 1]
        smoothing = self.settings.label_smoothing
        losses = -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)
        seen = rewards.detach()
        return {
            "loss": losses.sum(),
            "reward_accuracy": (seen[:, 0] > seen[:, 1]).sum(),
            "reward_margin": (seen[:, 0] - seen[:, 1]).sum(),
            "chosen_reward": seen[:, 0].sum(),
            "rejected_reward": seen[:, 1].sum(),
        }

    def log_probs(self, model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
        """Return the model's log-probabilities of a batch's answers, `(n, 2)`, the chosen ones first."""
        tokens, targets, _ = batch
        if self.draws:
            sides = [row_log_probs(model, self.head, tokens[:, i], targets[:, i]) for i in (0, 1)]
            return torch.stack(sides, 1)
        if len(tokens) and not is_fake(tokens):
            # As long as the longest of these: what comes behind is not looked at.
            width = int((targets >= 0).any(0).any(0).nonzero().max()) + 1
            tokens, targets = tokens[..., :width], targets[..., :width]
        flat = row_log_probs(model, self.head, tokens.flatten(0, 1), targets.flatten(0, 1))
        return flat.view(len(tokens), 2)


class Reference(Component):
    """Computes what the reference thinks of all pairs, before the first step, each rank a part; kept in checkpoints.

    The reference is the model itself, as it is then: nothing of it need be held in memory.
    """

    name = "reference"

    def __init__(self, loss: DpoLoss, train: PreferencePairs, held_out: PreferencePairs, job: Job) -> None:
        self._loss, self._job = loss, job
        # A rehearsal, which is not saved, trains on a few pairs and evaluates none.
        parts = [(train, len(job.task.train_data))]
        if job.directory is not None and job.task.val_data is held_out:
            parts.append((held_out, len(held_out)))
        self._batches = [(data, indices) for data, n in parts for indices in in_batches(torch.arange(n), _TOGETHER)]
        self._step = 0

    def attach(self, training: Training) -> None:
        """Learn whether the run goes on: then the weights are no reference any more."""
        self._step = training.step

    def begin(self, model: nn.Module) -> None:
        """Compute it, unless the run goes on. Collective."""
        if self._step or any(is_fake(parameter) for parameter in model.parameters()):
            return
        world = self._job.world
        known = torch.zeros(self._loss.num_pairs, 2, dtype=torch.float64)
        is_known = torch.zeros(self._loss.num_pairs, dtype=torch.bool)
        for number, (data, indices) in enumerate(self._batches):
            pairs = data.batch(indices)
            is_known[pairs[2]] = True
            if number % world.size == world.rank:
                known[pairs[2]] = self._of(model, pairs)
        total = world.all_reduce(known, "sum", "reference")
        self._loss.reference = total.where(is_known[:, None], torch.nan).to(world.device)

    @torch.no_grad()
    def _of(self, model: nn.Module, pairs: tuple[Tensor, ...]) -> Tensor:
        device, precision = self._job.world.device, self._job.config.train.precision
        with in_eval_mode(model), autocast(precision, device):
            return self._loss.log_probs(model, to_device(pairs, device, precision)).double().cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return the log-probabilities."""
        return {"log_probs": self._loss.reference}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take those that the run was begun with."""
        self._loss.reference = state["log_probs"].to(self._job.world.device, copy=True)
