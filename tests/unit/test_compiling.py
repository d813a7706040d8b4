"""What is compiled, into how many pieces, and what is said meanwhile."""

import copy
import dataclasses
from functools import partial, partialmethod

import pytest
import torch
from families import tiny_model
from hugging import import_transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.private_torch import compile_in_place
from hvdtrain.process.launch import Launch
from hvdtrain.recipes import load_recipe
from hvdtrain.recipes.transformers_models.heads import ProductHead
from hvdtrain.settings import ModelConfig
from hvdtrain.trainer import compiling
from hvdtrain.trainer.randomness import MicroBatchRandomness
from hvdtrain.world import SoloWorld

pytestmark = pytest.mark.filterwarnings("default")  # the compiler's own are none of ours
CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def graphs():
    """What has been compiled: a list to which `backend` adds the number of operators of each piece."""
    torch._dynamo.reset()
    found = []
    yield found
    torch._dynamo.reset()


@pytest.fixture
def in_place(monkeypatch):
    """Hand `compile_in_place` the compilers of these tests."""

    def given(module, backend):
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend, fullgraph=True))
            compile_in_place(module)

    return given


def counting(found, at_each=lambda: None):
    """Return a compiler that compiles nothing, and notes each piece that it is given."""

    def backend(module, inputs):
        found.append(len(module.graph.nodes))
        at_each()
        return module.forward

    return backend


def steps(model, x, compiled):
    randomness = MicroBatchRandomness(CPU, model=compiled, is_compiled=compiled is not None)
    for step in range(3):
        randomness.run(torch.arange(len(x)), (0, step), lambda: model(x), lambda out: out.sum().backward())


def small_model(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.ReLU(), nn.Linear(4, 2))


@pytest.mark.parametrize(
    ("asked", "device", "blocks", "suits", "is_done"),
    [
        ("auto", GPU, True, True, "blocks"),
        ("auto", GPU, True, False, "none"),
        ("auto", GPU, False, True, "none"),
        ("auto", CPU, True, False, "none"),
        ("model", CPU, True, False, "model"),
        ("none", GPU, True, True, "none"),
    ],
)
def test_auto_is_the_blocks_where_that_can_be_counted_on(monkeypatch, asked, device, blocks, suits, is_done):
    monkeypatch.setattr(compiling, "can_compile_for", lambda device: suits)
    model = nn.ModuleList([nn.Linear(1, 1)]) if blocks else nn.Linear(1, 1)
    assert compiling.what_is_compiled(ModelConfig(compile=asked), model, device) == is_done


def test_nothing_is_compiled_by_itself_on_cpus():
    assert load_recipe("lm-124m").model.compile == "auto"
    model = nn.ModuleList([nn.Linear(1, 1)])
    assert compiling.what_is_compiled(ModelConfig(compile="auto"), model, CPU) == "none"


def test_a_model_that_draws_nothing_is_compiled_once_and_whole(graphs, in_place):
    model, x = small_model(), torch.randn(3, 4)
    in_place(model, counting(graphs))
    steps(model, x, model)
    assert len(graphs) == 1


def test_the_first_pass_of_a_compiled_model_that_draws_counts_once(graphs, monkeypatch):
    x = torch.randn(8, 4)
    plain, compiled = (small_model(nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=counting(graphs)))
        compile_in_place(compiled)
    steps(plain, x, None)
    steps(compiled, x, compiled)
    assert compiled[1].num_batches_tracked == 3
    torch.testing.assert_close(compiled[1].running_mean, plain[1].running_mean)
    for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)  # the same dropout


def test_a_decoder_with_a_chunked_loss_is_compiled_by_blocks_into_one_piece_each_kind(graphs, in_place):
    model = Decoder(DecoderConfig(num_layers=3, hidden_size=32, num_heads=2, loss_chunk=4), 50)
    backend = counting(graphs)
    for block in compiling.blocks_of(model):
        in_place(block, backend)
    tokens = torch.randint(50, (2, 8))
    randomness = MicroBatchRandomness(CPU, model=model, is_compiled=True)
    for step in range(2):
        randomness.run(torch.arange(2), (0, step), lambda: model(tokens, tokens), lambda loss: loss.backward())
    assert len(graphs) == 1  # blocks are alike: they share it


def test_a_model_of_transformers_with_a_chunked_loss_is_compiled(graphs, monkeypatch):
    import_transformers()
    model = tiny_model("llama", vocab_size=60)
    head, tokens = ProductHead(), torch.randint(60, (1, 12))
    expected = head.loss(model, head.body(model, {"input_ids": tokens}), tokens, 4)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    model.compile()
    torch._dynamo.utils.counters.clear()
    loss = head.loss(model, head.body(model, {"input_ids": tokens}), tokens, 4)
    torch.testing.assert_close(loss, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0


def test_progress_says_that_it_compiles_in_each_training_of_a_process(graphs, in_place):
    """Whoever resets the compiler between two, as a notebook does, takes away what is called when it compiles."""
    for _ in range(2):
        world, seen = SoloWorld(CPU, Launch("none")), []
        compiling.note_compilations(world)
        world.progress.begin_step(3)
        world.progress.enter("forward")
        model = small_model()
        in_place(model, counting(graphs, lambda: seen.append(world.progress.read()[:2])))  # noqa: B023
        model(torch.randn(2, 4))
        assert seen == [(3, "compilation")]
        assert world.progress.read()[:2] == (3, "forward")
        torch._dynamo.reset()


def test_presets_for_gpus_and_those_for_cpus():
    names = {name: load_recipe(name).model.compile for name in ("lm", "lm-10m", "lm-124m", "lm-1b", "lm-3b")}
    assert names == {"lm": "none", "lm-10m": "none", "lm-124m": "auto", "lm-1b": "auto", "lm-3b": "auto"}
    assert dataclasses.is_dataclass(load_recipe("lm-1b").model)


def test_what_was_measured_once_is_compiled_all_the_same(graphs, monkeypatch):
    """Operations and memory are counted by modes, under which the compiler passes over what it meets, for good."""
    from hvdtrain.data.dataset import TensorSamples
    from hvdtrain.models import loss as models_loss
    from hvdtrain.settings import Config, TrainConfig
    from hvdtrain.trainer import Task, train_step
    from hvdtrain.trainer.flops import flops_per_step
    from hvdtrain.trainer.memory import estimate
    from hvdtrain.trainer.rehearsal import rehearse
    from hvdtrain.trainer.state import start_training

    backend = counting(graphs)
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=backend, fullgraph=True))
    monkeypatch.setattr(models_loss, "can_compile_for", lambda device: True)
    monkeypatch.setattr(models_loss._Fused, "has_failed", False)
    fused = torch.compile(models_loss.fusable_terms, backend=backend, fullgraph=True)
    monkeypatch.setattr(models_loss._Fused, "compiled", fused)
    tokens = torch.randint(50, (8, 9))
    data = TensorSamples(tokens[:, :-1].clone(), tokens[:, 1:].clone())
    task = Task(
        model=Decoder(DecoderConfig(num_layers=2, hidden_size=32, num_heads=2, loss_chunk=4), 50),
        train_data=data,
        val_data=data,
        loss_sums=lambda model, batch: {"loss": model(*batch)},
        unit="tokens",
    )
    config = Config(model=ModelConfig(compile="blocks"), train=TrainConfig(steps=3, global_batch_size=4))
    job = rehearse(task, config, SoloWorld(CPU, Launch("none")))
    assert estimate(job).activations
    training = start_training(job)
    assert flops_per_step(job, training) > 0
    assert not graphs
    train_step(job, training)
    train_step(job, training)
    assert len(graphs) == 2  # the blocks' and the loss's
    assert not models_loss._Fused.has_failed


class Dropping(nn.Module):
    """A block that drops weights of attention and outputs."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(8, 24), nn.Linear(8, 8), nn.Dropout(0.3)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.2)
        return x + self.drop(self.out(y.transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_blocks_that_draw_are_compiled_in_one_piece_and_draw_the_same(graphs, checkpointed):
    """By the compiler's front and its autograd, which joins calls that are alike, and without any graph break."""
    torch.manual_seed(0)
    plain = nn.ModuleList([Dropping(), Dropping()])
    compiled = copy.deepcopy(plain)
    for block in compiled:
        block.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    found = []
    for blocks in (plain, compiled):

        def forward(x, blocks=blocks):
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
            return x

        randomness = MicroBatchRandomness(CPU, is_compiled=blocks is compiled)
        outputs = []
        for step in range(3):
            x = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(step))
            given = (torch.arange(4) + step, (0, step), partial(forward, x), lambda out: out.square().sum().backward())
            outputs.append(randomness.run(*given).detach())
        found.append(outputs + [parameter.grad for parameter in blocks.parameters()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4  # with gradients asked of the input or not
