"""What a step asks of a GPU, counted without one: operators of blocks and loss, of an update, and looks at its numbers.

Blocks run on tensors of a GPU that have no storage, so that the ways for GPUs are taken; what is compiled is looked at
between torch's autograd and its kernels.
"""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from thread_world import ThreadWorld, run_ranks
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.models import linear, loss
from hvdtrain.models.config import DecoderConfig
from hvdtrain.models.decoder import Decoder
from hvdtrain.models.elementwise import RMSNorm, rotary_tables
from hvdtrain.models.private_torch import FakeTensorMode, copy_all_
from hvdtrain.settings import Config, HealthConfig, LogConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, evaluation, train_step
from hvdtrain.trainer import step as step_module
from hvdtrain.trainer.evaluation import evaluate
from hvdtrain.trainer.fakes import _fake
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.state import start_training
from hvdtrain.world.batch_norm import SyncBatchNorm, _sums_of_moments
from hvdtrain.world.means import start_means
from hvdtrain.world.question import Question

pytestmark = pytest.mark.filterwarnings("default")  # the compiler's own are none of ours
aten = torch.ops.aten
GPU = torch.device("cuda", 0)
DECODER = DecoderConfig(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, intermediate_size=96)
CASTS = ("_to_copy", "convert_element_type", "copy_")


def is_view(func):
    """Return whether an operator computes nothing."""
    aliases = [result.alias_info for result in func._schema.returns]
    is_alias = any(alias is not None and not alias.is_write for alias in aliases)
    return is_alias or func in (aten._unsafe_view.default, aten.detach.default)


class Operators(TorchDispatchMode):
    """Counts operators by name, those aside that compute nothing."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += not is_view(func)
        return func(*args, **(kwargs or {}))


def casts(names):
    return sum(names[name] for name in CASTS)


def block_and_inputs():
    """Return a block, what it reads and the tables of its rotation."""
    x = torch.randn(2, 32, 64, requires_grad=True)
    rope = rotary_tables(torch.arange(32), DECODER.head_size, 10_000.0, like=x)
    return Decoder(DECODER, 300).model.layers[0], x, rope


def test_operators_of_a_block_on_a_gpu_that_is_not_compiled(monkeypatch):
    """Forward and backward, by the ways of GPUs: 119, 30 of them casts, before products were joined."""
    monkeypatch.setattr(RMSNorm, "forward", nn.RMSNorm.forward)
    found = {}
    for joins in (False, True):
        monkeypatch.setattr(linear, "_gains_by_one", lambda x, joins=joins: joins)
        block, x, rope = block_and_inputs()
        with Operators() as forward, torch.autocast("cpu", torch.bfloat16):
            y = block(x, rope)
        with Operators() as backward:
            y.backward(torch.empty_like(y))
        assert (forward.names["mm"], backward.names["mm"]) == ((4, 8) if joins else (7, 14))
        found[joins] = forward.names + backward.names
    apart, joined = (found[joins] for joins in (False, True))
    assert casts(apart) == 30
    assert casts(joined) == 18  # of weights 4, of their gradients 4, of what each product reads and of its gradient
    assert sum(joined.values()) <= sum(apart.values()) - 20


def test_weights_are_not_put_together_to_write_a_token():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), Operators() as operators:
        layers = [_fake(nn.Linear(8, size, bias=False), GPU, None) for size in (8, 4, 4)]
        linear.products(torch.empty(1, 1, 8, device=GPU), *layers)
    assert (operators.names["mm"], operators.names["cat"]) == (3, 0)


@pytest.fixture
def compiled(monkeypatch):
    """Compile a function up to its kernels; yields that, and the operators of each piece, forward and backward."""
    found = []

    def note(module, inputs):
        names = Counter()
        for node in module.graph.nodes:
            if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
                names[node.target.overloadpacket.__name__] += not is_view(node.target)
        found.append(names)
        return module.forward

    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    monkeypatch.setattr(linear, "_gains_by_one", lambda x: True)
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend=backend, fullgraph=True), found
    torch._dynamo.reset()


def test_operators_of_a_compiled_block(compiled):
    """The products are joined, those of backward, too: each block has four forward and eight backward, no more."""
    compile_it, found = compiled
    block, x, rope = block_and_inputs()
    with torch.autocast("cpu", torch.bfloat16):
        compile_it(block)(x, rope).sum().backward()
    forward, backward = found
    assert (forward["mm"], backward["mm"]) == (4, 8)
    assert all(parameter.grad.abs().sum() > 0 for parameter in block.parameters())


def test_operators_of_a_chunk_of_the_loss(monkeypatch):
    """Three products; inputs and weight are cast once, and the first chunk is added to nothing."""

    def without_count(logits, wanted, dtype, scale):
        with torch.utils._python_dispatch._disable_current_modes():
            return loss.terms(logits, wanted, dtype, scale)

    monkeypatch.setattr(loss, "_terms_for", lambda hidden: without_count)
    hidden, weight = torch.randn(2, 32, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    found = []
    for chunk in (64, 32, 16):
        with torch.autocast("cpu", torch.bfloat16), Operators() as operators:
            loss.chunked_loss(hidden, weight, torch.zeros(2, 32, dtype=torch.int64), chunk)
        found.append(operators.names)
    assert [names["mm"] for names in found] == [3, 6, 12]
    assert found[2] - found[1] == Counter({name: 2 * count for name, count in (found[1] - found[0]).items()})
    each = found[1] - found[0]
    assert sum(each.values()) <= 3 + 3  # the products, and to add the loss and the gradients of hidden and weight
    assert found[0]["zeros_like"] == 0


@pytest.mark.parametrize("scale", [None, 1.0])
def test_the_loss_goes_over_the_logits_as_seldom_as_it_can(scale):
    """Inductor, which makes the kernels, finds the largest logit and the sum of powers from it in one pass."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes import post_grad

    with FakeTensorMode() as mode:
        logits, wanted = torch.empty(64, 3000, dtype=torch.bfloat16), torch.empty(64, dtype=torch.int64)
        trace = make_fx(
            lambda *given: loss.fusable_terms(*given, torch.float32, scale), decomposition_table=select_decomp_table()
        )
        traced = trace(logits, wanted)
        for node in traced.graph.nodes:  # the same on a GPU
            if isinstance(own := node.meta.get("val"), torch.Tensor):
                node.meta["val"] = torch.empty_strided(own.shape, own.stride(), dtype=own.dtype, device=GPU)
    with mode:
        post_grad.lazy_init()
        post_grad.pass_patterns[1].apply(traced.graph)
    names = Counter(str(node.target) for node in traced.graph.nodes if node.op == "call_function")
    assert sum(count for name, count in names.items() if "prepare_softmax_online" in name) == 1
    assert not any("amax" in name for name in names)


class AskedLater(ThreadWorld):
    """Ranks on what cannot be looked at without waiting, as GPUs are."""

    reads_at_once = False


def training_of(world, num_layers=2, accum_steps=1, model=None, **sections):
    world.__class__ = AskedLater
    tokens = torch.randint(50, (64, 9), generator=torch.Generator().manual_seed(0))
    data = TensorSamples(tokens[:, :-1].clone(), tokens[:, 1:].clone())
    decoder = DecoderConfig(num_layers=num_layers, hidden_size=32, num_heads=2, loss_chunk=8)
    task = Task(
        model=model or Decoder(decoder, 50),
        train_data=data,
        val_data=data,
        loss_sums=lambda model, batch: {"loss": model(*batch)},
        unit="tokens",
    )
    train = {"steps": 9, "global_batch_size": 8, "accum_steps": accum_steps, **sections.pop("train", {})}
    job = rehearse(task, Config(train=TrainConfig(**train), **sections), world)
    return job, start_training(job)


def test_an_update_takes_no_more_operators_for_more_weights(monkeypatch):
    """Norm, clipping, AdamW and all that is noted of a step: a few kernels each for all weights."""
    update = step_module.update
    found = {}

    def counted(job, training, step):
        with Operators() as operators:
            update(job, training, step)
        found[len(list(training.model.parameters()))] = operators.names

    monkeypatch.setattr(step_module, "update", counted)
    for num_layers in (1, 4):

        def work(world, num_layers=num_layers):
            job, training = training_of(world, num_layers)
            for _ in range(3):
                train_step(job, training)

        run_ranks(1, work)
    few, many = (found[key] for key in sorted(found))
    assert few == many
    assert sum(few.values()) <= 24
    assert few["copy_"] == 0  # of what was added in place onto itself


def test_gradients_are_put_into_a_bucket_by_a_few_operators():
    from hvdtrain.world.filling import fill_at_once

    wire = torch.zeros(30 * 8)
    views, gradients = list(wire.split(8)), [torch.randn(8) for _ in range(30)]
    for given, count in ((gradients, 2), (views, 1), ([None, *gradients[1:]], 3)):
        with Operators() as operators:
            fill_at_once(wire, views, given, 2)
        assert sum(operators.names.values()) == count


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"gradient_as_bucket_view": True}),
        (torch.float32, {"compression": "fp16"}),
        (torch.float32, {"compression": "bf16"}),
        (torch.float32, {"compression": "powersgd:2"}),
        (torch.float32, {"compression": "int8"}),
        (torch.float32, {"compression": "topk:0.1"}),
        (torch.float32, {"shard": True}),
        (torch.bfloat16, {}),
    ],
    ids=["none", "views", "fp16", "bf16", "powersgd", "int8", "topk", "shard", "weights of 16 bits"],
)
def test_gradients_come_back_from_a_bucket_by_a_few_operators(dtype, options):
    """Those of another type than they travel in, and what a format sends as it is, were copied one by one."""
    found = []
    for count in (2, 12):

        def work(world, count=count):
            model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(count))).to(dtype)
            plain = torch.optim.SGD(model.parameters(), lr=0.1, foreach=True)
            optimizer = world.wrap(plain, model, warns_of_copies=False, **options)
            for _ in range(3):
                optimizer.zero_grad()
                with Operators() as operators:
                    model(torch.ones(2, 8, dtype=dtype)).square().mean().backward()
                    optimizer.step()
            return operators.names

        found.append(run_ranks(2, work)[0])
    few, many = found
    assert many - few == Counter(mm=30)


class Looks(TorchDispatchMode):
    """Notes operators that tell the host what is in a tensor, for which it waits for a GPU."""

    KINDS = (
        aten._local_scalar_dense.default,
        aten.nonzero.default,
        aten.equal.default,
        aten.is_nonzero.default,
        aten.masked_select.default,
        aten._unique2.default,
        aten.repeat_interleave.Tensor,
    )

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_mark = func is self.KINDS[0] and args[0].dtype == torch.int64  # of draws, by the host's own generator
        if func in self.KINDS and not is_mark:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class Normalised(nn.Module):
    """With running statistics, and numbers that samples draw."""

    def __init__(self):
        super().__init__()
        self.table, self.norm, self.drop = nn.Embedding(50, 8), nn.BatchNorm1d(8), nn.Dropout(0.2)

    def forward(self, tokens, targets):
        x = self.norm(self.table(tokens).transpose(1, 2)).transpose(1, 2)
        return F.cross_entropy(F.linear(self.drop(x), self.table.weight).flatten(0, 1), targets.flatten()).mul(8.0)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"accum_steps": 2},
        {"train": {"precision": "fp16"}},
        {"train": {"precision": "bf16", "ema": 0.9}},
        {"health": HealthConfig(spikes="skip", noise_scale=True), "log": LogConfig(grad_norms=True)},
        {"optim": OptimConfig(shard=True)},
        {"optim": OptimConfig(name="sgd")},
        {"model": Normalised()},
    ],
    ids=["as it is", "accumulation", "fp16", "bf16, average", "what is watched", "shard", "sgd", "statistics"],
)
def test_a_step_looks_at_no_number_of_the_device(given, monkeypatch):
    monkeypatch.setattr(Question, "read", lambda *_: None)  # gradients on a GPU carry none

    def work(world):
        job, training = training_of(world, **given)
        for _ in range(3):
            train_step(job, training)
        with Looks() as looks:
            train_step(job, training)
        return looks.found

    assert run_ranks(2, work) == [[], []]


class ManyNorms(nn.Module):
    """So many normalisations one after the other, with statistics or without."""

    def __init__(self, count, kind):
        super().__init__()
        self.table, self.norms = nn.Embedding(50, 8), nn.ModuleList(kind(8) for _ in range(count))

    def forward(self, tokens, targets):
        x = self.table(tokens).flatten(0, 1)
        for norm in self.norms:
            x = norm(x)
        return F.cross_entropy(F.linear(x, self.table.weight), targets.flatten()).mul(8.0)


@pytest.mark.parametrize(
    ("kind", "given", "expected"),
    [
        (nn.BatchNorm1d, {}, {"native_batch_norm", "native_batch_norm_backward", "empty", "add_"}),
        (nn.LayerNorm, {"train": {"ema": 0.9}}, {"native_layer_norm", "native_layer_norm_backward", "lerp_"}),
    ],
    ids=["statistics", "average"],
)
def test_statistics_and_averages_are_kept_by_few_operators(kind, given, expected):
    """A layer with statistics took 9 more, for what they were before a step that may not count: ResNet-50 has 53."""
    found = []
    for count in (2, 12):

        def work(world, count=count):
            job, training = training_of(world, model=ManyNorms(count, kind), **given)
            for _ in range(3):
                train_step(job, training)
            with Operators() as operators:
                train_step(job, training)
            return operators.names

        found += run_ranks(1, work)
    few, many = found
    assert {name for name in many if many[name] != few[name]} == expected
    assert sum(many.values()) - sum(few.values()) == 4 * 10


def test_buffers_are_averaged_by_few_operators():
    found = []
    for count in (2, 20):

        def work(world, count=count):
            buffers = [torch.ones(3), torch.ones(5), torch.ones((), dtype=torch.int64)] * count
            with Operators() as operators:
                start_means(world, [buffer.clone() for buffer in buffers], "buffers")()
            return operators.names

        found.append(run_ranks(2, work)[0])
    few, many = found
    assert many - few == Counter(clone=3 * 18)  # the test's own
    assert sum(few.values()) - 6 < 25


def test_tensors_of_several_types_are_copied_by_type():
    """torch's kernel for many takes one type, and is replaced by a copy of each where there are several."""
    with FakeTensorMode(), ListsOfTypes() as lists:
        targets = [torch.empty(n, dtype=d, device=GPU) for n in (3, 4) for d in (torch.float32, torch.int64)]
        copy_all_(targets, [target.clone() for target in targets])
    assert lists.found == [{torch.float32}, {torch.int64}]
    assert lists.num_tensors == 4
    targets = [torch.zeros(3), torch.zeros(2, dtype=torch.int64)]
    copy_all_(targets, [torch.ones(3), torch.ones(2, dtype=torch.int64)])
    assert [target.tolist() for target in targets] == [[1, 1, 1], [1, 1]]


class ListsOfTypes(TorchDispatchMode):
    """Notes the types of the tensors that each copy of many writes to."""

    def __init__(self):
        super().__init__()
        self.found, self.num_tensors = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten._foreach_copy_.default:
            self.found.append({tensor.dtype for tensor in args[0]})
            self.num_tensors += len(args[0])
            return None
        return func(*args, **(kwargs or {}))


def test_synchronised_statistics_look_at_no_number():
    """By the ways that GPUs take; on CPUs a look is cheaper."""
    x = torch.randn(6, 3, 4)

    def work(world):
        layer = SyncBatchNorm(nn.BatchNorm1d(3), world, "layer")
        with Looks() as looks:
            sums = _sums_of_moments(x, [0, 2], 24)
            total = world.all_reduce(sums, "sum", "sums")
            layer._track_unseen(total[:3] / total[-1], total[3:6] / total[-1], total[-1])
        return looks.found

    assert run_ranks(2, work) == [[], []]


def test_evaluation_agrees_on_a_stop_every_16_batches(monkeypatch):
    asked = []

    def work(world):
        job, training = training_of(world, train={"global_batch_size": 2})
        evaluate(job, training)

    ask = evaluation._ask_to_stop
    monkeypatch.setattr(evaluation, "_ask_to_stop", lambda world, *more: asked.append(world.rank) or ask(world, *more))
    run_ranks(2, work)
    assert len(asked) == 2 * 2  # 64 samples are 32 batches of one on each of two ranks
