"""The traps of Horovod 0.28.1, each against one process on the whole batch; naive use of Horovod fails every one."""

import contextlib
import copy
import functools

import loops
import pytest
import torch
import torch.nn.functional as F
from test_optimizer import OPTIMIZERS, data, largest_difference, network, share
from test_world import digest
from torch.utils.checkpoint import checkpoint

from hvdtrain.errors import ConfigError, UsageError

ADAMW = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.5)


def compare(
    world, model, steps, optimizer=ADAMW, tolerance=1e-12, loss=None, before=lambda step, model, optimizer: None
):
    """Train on all ranks and on one; the weights must agree, and the ranks must be equal."""
    loss = loss or (lambda model, x, y, rank: F.cross_entropy(model(x), y))
    reference = copy.deepcopy(model)
    ours = world.wrap(optimizer([p for p in model.parameters() if p.requires_grad]), model)
    alone = optimizer([p for p in reference.parameters() if p.requires_grad])
    for step in range(steps):
        x, y = data(step)
        before(step, model, ours)
        before(step, reference, alone)
        ours.zero_grad()
        loss(model, share(world, x), share(world, y), world.rank).backward()
        alone.zero_grad()
        parts = [
            loss(reference, x[rank :: world.size], y[rank :: world.size], rank) / world.size
            for rank in range(world.size)
        ]
        sum(parts).backward()
        ours.step()
        alone.step()
    assert largest_difference(model, reference) < tolerance
    assert len(set(world.all_gather_object(digest(model.parameters()), "end"))) == 1
    return model, ours


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = torch.nn.Linear(6, 8).double()
        self.heads = torch.nn.ModuleList(torch.nn.Linear(8, 3).double() for _ in range(3))


def test_what_no_rank_used_is_not_decayed(world):
    def loss(model, x, y, rank):
        return F.cross_entropy(model.heads[0](model.body(x)), y)

    before = TwoHeads().heads[1].weight
    model, optimizer = compare(world, TwoHeads(), 4, loss=loss)
    assert torch.equal(model.heads[1].weight, before)
    assert model.heads[1].weight.grad is None
    assert len(optimizer.state_dict()["state"]) == 4  # the other heads have no moments


def test_what_some_ranks_used_counts_zero_on_the_others(world):
    def loss(model, x, y, rank):
        return F.cross_entropy(model.heads[0 if rank == 0 else 1](model.body(x)), y)

    compare(world, TwoHeads(), 4, loss=loss)


def test_used_in_some_steps_only(world):
    def counted(model, x, y, rank):
        head = (int(x.sum().item() * 1e6) + rank) % 3
        return F.cross_entropy(model.heads[head](model.body(x)), y)

    compare(world, TwoHeads(), 8, loss=counted)


def test_frozen_and_unfrozen_while_training(world):
    """Horovod goes on moving what was frozen, and never averages what was unfrozen."""
    model = network()
    for parameter in model[2].parameters():
        parameter.requires_grad_(False)
    later = {3: (2, True), 6: (0, False), 8: (0, True)}

    def before(step, model, optimizer):
        if step in later:
            layer, trains = later[step]
            for parameter in model[layer].parameters():
                parameter.requires_grad_(trains)
        if step == 3:
            optimizer.add_param_group({"params": list(model[2].parameters()), "lr": 0.02})

    compare(world, model, 11, before=before)


def test_several_losses_in_a_step(world):
    model, reference = network(), network()
    optimizer, alone = world.wrap(ADAMW(model.parameters()), model), ADAMW(reference.parameters())
    for step in range(4):
        optimizer.zero_grad()
        alone.zero_grad()
        for part in range(2):
            x, y = data(10 * step + part)
            F.cross_entropy(model(share(world, x)), share(world, y)).backward()
            F.cross_entropy(reference(x), y).backward()
        optimizer.step()
        alone.step()
    assert largest_difference(model, reference) < 1e-12


class Checkpointed(torch.nn.Module):
    def __init__(self, reentrant, shared):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 8).double()
        blocks = [torch.nn.Linear(8, 8).double() for _ in range(1 if shared else 3)]
        self.blocks = torch.nn.ModuleList(blocks * (3 if shared else 1))
        self.last = torch.nn.Linear(8, 3).double()
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block(x).tanh(), x, use_reentrant=self.reentrant)
        return self.last(x)


@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_activation_checkpoints(world, reentrant, shared):
    """With `use_reentrant=True`, a shared block's gradient is complete only after several additions."""
    compare(world, Checkpointed(reentrant, shared), 4)


class Words(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(50, 8, sparse=True).double()
        self.out = torch.nn.Linear(8, 3).double()

    def forward(self, x):
        return self.out(self.embed((x[:, :2].abs() * 10).long() % 50).mean(1))


@pytest.mark.parametrize("only_on_rank_0", [False, True], ids=["everywhere", "rank 0"])
def test_sparse_gradients(world, only_on_rank_0):
    """Horovod hangs where one rank alone has a sparse gradient."""

    def loss(model, x, y, rank):
        output = model(x) if rank == 0 or not only_on_rank_0 else model.out(x.new_ones(len(x), 8))
        return F.cross_entropy(output, y)

    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    model, _ = compare(world, Words(), 4, optimizer=sgd, loss=loss)
    assert model.embed.weight.grad.is_sparse


def test_sparse_adam(world):
    model, reference = Words(), Words()
    optimizer = world.wrap(torch.optim.SparseAdam([model.embed.weight], lr=0.1), model)
    alone = torch.optim.SparseAdam([reference.embed.weight], lr=0.1)
    for step in range(3):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(share(world, x)), share(world, y)).backward()
        optimizer.step()
        alone.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        alone.step()
    assert (model.embed.weight - reference.embed.weight).abs().max() < 1e-12


@pytest.mark.parametrize("overflow", [False, True], ids=["finite", "overflow"])
def test_scaler_clipping_and_accumulation(world, overflow):
    """fp32 with a loss scaler: average, unscale, clip, step. An overflow on one rank is skipped by all."""
    model, reference = network(torch.float32), network(torch.float32)
    sgd = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9)
    optimizer = world.wrap(sgd(model.parameters()), model, accum_steps=2)
    alone = sgd(reference.parameters())
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10), torch.amp.GradScaler("cpu", init_scale=2.0**10)]
    for step in range(5):
        optimizer.zero_grad()
        alone.zero_grad()
        is_bad = overflow and step == 2
        for part in range(2):
            x, y = data(10 * step + part, torch.float32)
            huge = float("inf") if is_bad and part == 1 else 1.0
            mine = huge if world.rank == world.size - 1 else 1.0
            scalers[0].scale(F.cross_entropy(model(share(world, x)), share(world, y)) / 2 * mine).backward()
            scalers[1].scale(F.cross_entropy(reference(x), y) / 2 * huge).backward()
        for scaler, one, net in ((scalers[0], optimizer, model), (scalers[1], alone, reference)):
            if one is optimizer:
                optimizer.synchronize()
            scaler.unscale_(one)
            norm = torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
            assert is_bad or norm > 0.1
            scaler.step(one)
            scaler.update()
    assert scalers[0].get_scale() == scalers[1].get_scale() == (512 if overflow else 1024)
    assert largest_difference(model, reference) < 1e-6


@pytest.mark.parametrize("kind", ["model", "blocks"])
def test_compiled(world, kind):
    """Per block, gradients still leave while backward runs; either way names are those of the plain model."""

    def compiled(model):
        if kind == "model":
            model.compile(backend="aot_eager")
        else:
            for block in model:
                block.compile(backend="aot_eager")
        return model

    model = compiled(network())
    optimizer = world.wrap(ADAMW(model.parameters()), model)
    reference = network()
    alone = ADAMW(reference.parameters())
    for step in range(3):
        x, y = data(step)
        optimizer.zero_grad()
        F.cross_entropy(model(share(world, x)), share(world, y)).backward()
        optimizer.step()
        alone.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        alone.step()
    assert list(model.state_dict()) == list(reference.state_dict())
    assert largest_difference(model, reference) < 1e-12


MORE_OPTIMIZERS = {
    **OPTIMIZERS,
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], lr=0.01),
}


@pytest.mark.parametrize("name", MORE_OPTIMIZERS)
def test_state_is_broadcast_and_restored_without_a_hidden_step(world, name):
    """Stop after 2 of 5 steps; rank 0 alone knows the state; the end is bitwise that of not stopping."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    dtype = torch.float32 if name == "muon" else torch.float64

    def train(model, optimizer, steps):
        for step in steps:
            x, y = data(step, dtype)
            optimizer.zero_grad()
            F.cross_entropy(model(share(world, x)), share(world, y)).backward()
            optimizer.step()

    def wrapped(model):
        return world.wrap(MORE_OPTIMIZERS[name](list(model.parameters())), model)

    whole = network(dtype)
    train(whole, wrapped(whole), range(5))
    half = network(dtype)
    optimizer = wrapped(half)
    train(half, optimizer, range(2))
    saved = copy.deepcopy((half.state_dict(), optimizer.state_dict()))
    torch.manual_seed(world.rank)
    again = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
    optimizer = wrapped(again)
    if world.rank == 0:
        again.load_state_dict(saved[0])
        optimizer.load_state_dict(saved[1])
    world.broadcast_state(again, optimizer)
    assert digest(again.parameters()) == digest(saved[0].values())
    train(again, optimizer, range(2, 5))
    assert digest(again.parameters()) == digest(whole.parameters())


def test_adasum(world):
    """Two ranks against the formula of arXiv:2006.02924, section 3.1; elsewhere a clear error."""
    model = network()
    if world.launch.launcher != "mpirun" and world.size > 1:
        with pytest.raises(ConfigError, match="needs MPI"):
            world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, op="adasum")
        return
    if world.size != 2:
        pytest.skip("the formula is for two ranks")
    with pytest.raises(ConfigError, match="compression"):
        world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, op="adasum", compression="fp16")
    parts = []
    for rank in range(2):
        x, y = data(0)
        plain = copy.deepcopy(model)
        F.cross_entropy(plain(x[rank::2]), y[rank::2]).backward()
        parts.append([parameter.grad for parameter in plain.parameters()])
    optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, op="adasum")
    x, y = data(0)
    F.cross_entropy(model(share(world, x)), share(world, y)).backward()
    optimizer.synchronize()
    combined = []
    for parameter, a, b in zip(model.parameters(), *parts, strict=True):
        dot = (a * b).sum()
        combined.append((1 - dot / (2 * a.square().sum())) * a + (1 - dot / (2 * b.square().sum())) * b)
        assert torch.allclose(parameter.grad, combined[-1], rtol=1e-6, atol=1e-9)
    # All ranks hold the combined gradient: what is clipped is that one.
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    assert torch.allclose(norm, torch.stack([gradient.norm() for gradient in combined]).norm(), rtol=1e-6)
    optimizer.step()
    assert len(set(world.all_gather_object(digest(model.parameters()), "adasum.end"))) == 1


def test_optimizers_that_share_parameters_have_one_accumulation(world):
    """The one wrapped last decides when gradients are averaged: the other is refused at its step, on all ranks."""
    if world.size == 1:
        return
    model = network()
    first = world.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model, accum_steps=2)
    second = world.wrap(torch.optim.SGD(model[2].parameters(), lr=0.1), model)
    x, y = data(0)
    F.cross_entropy(model(share(world, x)), share(world, y)).backward()
    with pytest.raises(ConfigError, match="wrapped later, and has accum_steps = 2, the other 1"):
        first.step()
    before = digest(model[0].parameters())
    second.step()
    assert digest(model[0].parameters()) == before
    assert len(set(world.all_gather_object(digest(model.parameters()), "shared.end"))) == 1


def test_zero_grad_that_keeps_zeros(world):
    model, reference = network(), network()
    optimizer, alone = world.wrap(ADAMW(model.parameters()), model), ADAMW(reference.parameters())
    for step in range(4):
        x, y = data(step)
        optimizer.zero_grad(set_to_none=False)
        alone.zero_grad(set_to_none=False)
        F.cross_entropy(model(share(world, x)), share(world, y)).backward()
        F.cross_entropy(reference(x), y).backward()
        optimizer.step()
        alone.step()
    assert largest_difference(model, reference) < 1e-12


@pytest.mark.parametrize("waits_for_caller", [False, True])
def test_layers_frozen_on_some_ranks_alone_are_told_at_once(world, waits_for_caller):
    """Of the same size, the gradients of one layer were added to those of another, in silence."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(world.size + 2)])
    optimizer = world.wrap(
        torch.optim.SGD(model.parameters(), lr=0.1), model, waits_for_caller=waits_for_caller, warns_of_copies=False
    )

    def train(steps):
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 4)).square().mean().backward()
            optimizer.step()

    train(1)
    model[1 + world.rank].requires_grad_(False)
    told = r"is not alike on all ranks: .*Freeze, unfreeze and add the same layers on all ranks"
    if world.size == 1:
        train(3)
        return
    with pytest.raises(UsageError, match=told):
        train(3)
    with pytest.raises(UsageError, match=r"'lengths' is not alike on all ranks: .*tensors of one shape and type"):
        world.all_reduce(torch.ones(1 + world.rank), "sum", "lengths")
    world.barrier("goes on")


def test_layers_frozen_on_all_ranks_and_trained_again(world):
    def before(step, model, optimizer):
        for i, layer in enumerate(model):
            layer.requires_grad_(step % 3 == 0 or i != step % 3)

    torch.manual_seed(0)
    compare(world, torch.nn.Sequential(*[torch.nn.Linear(6, 6).double() for _ in range(3)]), 9, before=before)


@pytest.mark.ranks(2)
def test_a_compiled_backward_pass_is_told_of(world, caplog):
    """Compiled autograd forgets what it is to call at its end: gradients were each rank's own behind it, in silence."""
    compiled = functools.partial(torch._dynamo.compiled_autograd._enable, torch.compile(backend="eager"))

    def trained(env, within):
        model = loops.network()
        optimizer = env.wrap(loops.sgd(model), model)
        for step in range(3):
            optimizer.zero_grad()
            loss = loops.loss_of(model, env, step)
            with within():
                loss.backward()
            env.synchronize(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        return [model]

    ours = trained(loops.Ranks(world), compiled)
    assert loops.difference(ours, trained(loops.Alone(), contextlib.nullcontext)) < 1e-10
    assert caplog.text.count("gradients come from a compiled backward pass") == (world.rank == 0)
