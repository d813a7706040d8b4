"""The estimate of memory against what real tensors take."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import ConfigError
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.private_torch import LiveBytes
from hvdtrain.optim.sgd import SgdConfig
from hvdtrain.optim.table import build_optimizer
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import CommConfig, Config, HealthConfig, ModelConfig, OptimConfig, TrainConfig
from hvdtrain.settings.units import in_units
from hvdtrain.trainer import Task, settle
from hvdtrain.trainer.fakes import without_storage
from hvdtrain.trainer.memory import Memory, check_fits, estimate, wire_bytes
from hvdtrain.trainer.model import own_type, prepare_blocks
from hvdtrain.trainer.step import forward_sums
from hvdtrain.world import SoloWorld

DECODER = DecoderConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2)


def job_of(model, /, **sections):
    tokens = torch.randint(50, (12, 9), generator=torch.Generator().manual_seed(0))
    data = TensorSamples(tokens[:, :-1].clone(), tokens[:, 1:].clone())
    task = Task(
        model=model, train_data=data, val_data=data, loss_sums=lambda m, batch: {"loss": m(*batch)}, unit="tokens"
    )
    config = Config(**{"train": TrainConfig(steps=3, global_batch_size=4), **sections})
    return settle(
        task, config, SoloWorld(torch.device("cpu"), Launch("none")), RunDirectory(Path("none")), MetricLog(None, [])
    )


def kept_for_backward(job):
    """Return the bytes that autograd really keeps of a micro-batch."""
    model = job.task.model
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor  # keeps it alive
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        sums = forward_sums(job, model, torch.arange(job.plan.micro_batch_size))
    del sums
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-true", "fp64"])
def test_what_is_estimated_is_what_is_taken(precision):
    job = job_of(Decoder(DECODER, 50, seed=0), train=TrainConfig(steps=3, global_batch_size=4, precision=precision))
    memory = estimate(job)
    model = job.task.model.to(dtype=own_type(precision))
    weights = sum(p.nbytes for p in model.parameters())
    assert (memory.weights, memory.gradients) == (weights, weights)
    assert memory.activations == pytest.approx(kept_for_backward(job), rel=0.01)


def test_live_bytes_are_those_at_once():
    before = torch.empty(10)
    with LiveBytes() as live:
        whole = torch.empty(1000)
        part = whole[:5]
        del whole
        assert live.now == 4000  # the part keeps it
        del part
        other = before + 1
        before.add_(1)
        assert (live.now, live.peak) == (40, 4000)
    del other
    assert live.now == 0


def really_at_most(job):
    """Return the most that real tensors of both passes take, weights and inputs aside."""
    live = LiveBytes()
    with live:
        sums = forward_sums(job, job.task.model, torch.arange(job.plan.micro_batch_size))
        sums["loss"].backward()
    return live.peak


@pytest.mark.parametrize("checkpoint_blocks", [False, True])
def test_the_peak_is_that_of_real_tensors(checkpoint_blocks):
    """Where the loss is the largest part, and one that does not last."""
    decoder = dataclasses.replace(DECODER, loss_chunk=16)
    job = job_of(Decoder(decoder, 20_000, seed=0), model=ModelConfig(checkpoint_blocks=checkpoint_blocks))
    memory = estimate(job)
    assert memory.transients > 0
    prepare_blocks(job.task.model, job.config.model)
    assert memory.activations + memory.transients + memory.gradients == pytest.approx(really_at_most(job), rel=0.02)


def test_a_large_vocabulary_shows_in_the_peak():
    """Logits that come and go are no activations that are kept."""
    whole, chunks = (
        estimate(job_of(Decoder(dataclasses.replace(DECODER, loss_chunk=chunk), 20_000, seed=0))) for chunk in (None, 4)
    )
    logits = 4 * 8 * 20_000 * 4  # samples, tokens, vocabulary, bytes
    assert whole.activations > logits  # kept, as they all fit
    assert chunks.activations - chunks.gradients < logits  # the loss computes the weight's gradient ahead
    assert chunks.transients > 4 * 20_000 * 4
    assert "on the way" in str(chunks)


@pytest.mark.parametrize(
    "optim",
    [OptimConfig(), SgdConfig(momentum=0.9), *(OptimConfig(name=name) for name in ("muon", "Adafactor", "RMSprop"))],
    ids=lambda optim: optim.name,
)
def test_the_state_of_optimizers(optim):
    job = job_of(Decoder(DECODER, 50, seed=0), optim=optim)
    if optim.name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    model = job.task.model
    optimizer = build_optimizer(job.config.optim, model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    taken = sum(v.nbytes for entries in optimizer.state.values() for v in entries.values() if torch.is_tensor(v))
    assert estimate(job).optimizer == taken


def test_checkpointed_blocks_keep_less():
    whole = estimate(job_of(Decoder(DECODER, 50, seed=0)))
    blocks = estimate(job_of(Decoder(DECODER, 50, seed=0), model=ModelConfig(checkpoint_blocks=True)))
    assert blocks.activations < 0.5 * whole.activations


def test_a_model_without_storage_is_estimated_alike():
    with without_storage():
        empty = Decoder(DECODER, 50, seed=0)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty.lm_head.weight is empty.model.embed_tokens.weight
    assert estimate(job_of(empty)) == estimate(job_of(Decoder(DECODER, 50, seed=0)))
    assert not any(parameter.is_meta for parameter in Decoder(DECODER, 50, seed=0).parameters())


def test_the_wire():
    model = Decoder(DECODER, 50, seed=0)
    count = model.num_parameters()
    assert wire_bytes(job_of(model)) == 4 * count
    assert wire_bytes(job_of(model, comm=CommConfig(compression="fp16"))) == 2 * count
    pure = TrainConfig(steps=3, global_batch_size=4, precision="bf16-true")
    assert wire_bytes(job_of(model, train=pure)) == 4 * count


class Asks(nn.Module):
    """A model whose course depends on values, which fake tensors do not have."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Embedding(50, 4)

    def forward(self, tokens, targets):
        x = self.inner(tokens)
        return x.sum() if float(x.detach().sum()) > 0 else -x.sum()


def test_a_model_that_cannot_be_followed_is_said_to_be_so():
    memory = estimate(job_of(Asks()))
    assert memory.activations is None
    assert "activations unknown" in str(memory)
    assert memory.weights == 800


def test_too_much_is_refused_with_what_would_fit():
    job = job_of(Decoder(DECODER, 50, seed=0), health=HealthConfig())
    check_fits(job, estimate(job))
    huge = Memory(weights=2**30, gradients=2**30, optimizer=2**31, activations=2**62, micro_batch_size=2**30)
    with pytest.raises(ConfigError, match="needs about 4194304 TiB a rank") as refused:
        check_fits(job, huge)
    for way in ("--train.micro-batch-size", "--model.checkpoint-blocks", "--train.precision bf16"):
        assert way in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        check_fits(job, dataclasses.replace(huge, weights=2**62))
    assert "micro-batch" not in str(refused.value)


def test_units():
    assert [in_units(n) for n in (0, 1000, 1536, 3 << 20, 5 << 40)] == ["0 B", "1000 B", "1.5 KiB", "3 MiB", "5 TiB"]
