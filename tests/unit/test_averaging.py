"""Averaging of gradients, without a launch: ranks are threads, and the sums are real."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from thread_world import run_ranks
from torch.utils.checkpoint import checkpoint

from hvdtrain.errors import ConfigError
from hvdtrain.process.launch import Launch
from hvdtrain.world import Averaging, SoloWorld, WrappedOptimizer
from hvdtrain.world.exchange import GradientExchange

SAMPLES = 12


def network(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def data(step, dtype=torch.float64):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, 6, generator=generator).to(dtype), torch.randint(0, 3, (SAMPLES,), generator=generator)


def share(world, tensor):
    return tensor[world.rank :: world.size]


def train(model, optimizer, steps, of=lambda tensor: tensor):
    for step in range(steps):
        x, y = data(step, next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(of(x)), of(y)).backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


def sgd(model, **settings):
    return torch.optim.SGD(model.parameters(), lr=0.1, **settings)


def largest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("bucket_bytes", [100, 1 << 20])
def test_ranks_equal_one_process(size, bucket_bytes):
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model, momentum=0.9), model, bucket_bytes=bucket_bytes)
        return train(model, optimizer, 5, lambda tensor: share(world, tensor))

    model = network()
    alone = train(model, sgd(model, momentum=0.9), 5)
    ranks = run_ranks(size, work)
    assert largest(ranks[0], alone) < 1e-13
    assert all(torch.equal(a, b) for other in ranks[1:] for a, b in zip(ranks[0], other, strict=True))


def test_buckets_leave_while_backward_runs():
    """From the second step on; in the first, nothing is known of how often backward adds to a gradient."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, bucket_bytes=1)
        early = []
        for step in range(2):
            x, y = data(step)
            optimizer.zero_grad()
            before = len(world.sent)
            seen = []
            model[0].weight.register_hook(lambda g, seen=seen, before=before: seen.append(len(world.sent) - before))
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            early.append(seen[-1])
        return early

    assert run_ranks(2, work) == [[0, 3]] * 2  # the last layer's weight and bias, and the first one's bias


def test_the_users_object_is_the_one_that_averages():
    optimizer = sgd(network())
    wrapped = SoloWorld(torch.device("cpu"), Launch("none")).wrap(optimizer, network())
    assert wrapped is optimizer
    assert isinstance(wrapped, torch.optim.SGD)
    assert isinstance(wrapped, WrappedOptimizer)
    with pytest.raises(ConfigError, match="wrapped already"):
        SoloWorld(torch.device("cpu"), Launch("none")).wrap(optimizer, network())
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(wrapped)


def test_settings_are_checked_where_they_enter():
    solo, model = SoloWorld(torch.device("cpu"), Launch("none")), network()
    with pytest.raises(ConfigError, match="accum_steps = 0 must be"):
        solo.wrap(sgd(model), model, accum_steps=0)
    with pytest.raises(ConfigError, match=r"bucket_bytes = 2\.5 must be"):
        Averaging(bucket_bytes=2.5)
    with pytest.raises(ConfigError, match="op = 'sum' must be 'average' or 'adasum'"):
        Averaging(op="sum")
    with pytest.raises(ConfigError, match="no compression 'fp8': choose none, fp16, bf16"):
        Averaging(compression="fp8")
    with pytest.raises(ConfigError, match=r"leave out --comm\.compression"):
        Averaging(op="adasum", compression="fp16")
    with pytest.raises(ConfigError, match="noise-scale needs averaged, dense"):
        Averaging(has_square=True, compression="fp16")
    embedding = torch.nn.Embedding(3, 2, sparse=True)
    with pytest.raises(ConfigError, match="noise-scale needs averaged, dense"):
        solo.wrap(sgd(embedding), embedding, has_square=True)
    assert solo.wrap(sgd(model), model, Averaging(accum_steps=3), accum_steps=4).mean_square is None


def test_a_dropped_optimizer_leaves_nothing_behind():
    """Hooks on the parameters must not keep it, its buckets and its state alive."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)
        train(model, optimizer, 1, lambda tensor: share(world, tensor))
        return model, weakref.ref(optimizer), weakref.ref(optimizer._exchange)

    for model, *weak in run_ranks(2, work):
        gc.collect()
        assert [ref() for ref in weak] == [None, None]
        F.cross_entropy(model(data(0)[0]), data(0)[1]).backward()


def test_sparse_rows_of_some_ranks_only():
    def work(world):
        words = torch.nn.Embedding(10, 3, sparse=True).double()
        torch.nn.init.ones_(words.weight)
        optimizer = world.wrap(sgd(words), words)
        optimizer.zero_grad()
        if world.rank == 0:
            words(torch.tensor([1, 1, 4])).sum().backward()
        optimizer.synchronize()
        gradient = words.weight.grad
        optimizer.step()
        return gradient.is_sparse, gradient.to_dense()[:, 0].tolist(), words.weight[1, 0].item()

    expected = [0.0, 1.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert run_ranks(2, work) == [(True, expected, 0.9)] * 2


def test_what_no_rank_used_keeps_no_gradient():
    def work(world):
        heads = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(3))
        optimizer = world.wrap(sgd(heads), heads)
        heads[world.rank](torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return [None if head.weight.grad is None else head.weight.grad.tolist() for head in heads]

    assert run_ranks(2, work) == [[[[0.5, 0.5]], [[0.5, 0.5]], None]] * 2


def test_parameters_that_are_not_the_models_have_a_name():
    def work(world):
        model, scale = torch.nn.Linear(2, 1), torch.nn.Parameter(torch.ones(1))
        optimizer = world.wrap(torch.optim.SGD([scale, *model.parameters()], lr=0.1), model, bucket_bytes=1)
        (model(torch.ones(1, 2)) * scale).sum().backward()
        optimizer.step()
        return [name for name in world.sent if name.endswith("parameter 2")]

    assert all(len(names) == 1 for names in run_ranks(2, work))


def test_adasum_gives_each_tensor_undivided():
    def work(world):
        model = network()
        seen = []
        start = world.start_all_reduce_

        def note(tensor, op, name):
            seen.append((op, tensor.clone()))
            return start(tensor, op, name)

        world.start_all_reduce_ = note
        optimizer = world.wrap(sgd(model), model, op="adasum")
        x, y = data(0)
        own = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        F.cross_entropy(model(x), y).backward()
        optimizer.synchronize()
        combined = [tensor for op, tensor in seen if op == "adasum"]
        return all(a.flatten().equal(b) for a, b in zip(own, combined, strict=True)), len(combined) == len(own)

    assert run_ranks(2, work) == [(True, True)] * 2


def test_adasum_leaves_alone_what_no_rank_used():
    """A gradient of zeros would be decayed."""

    def work(world):
        heads = torch.nn.ModuleList(torch.nn.Linear(2, 1) for _ in range(3))
        optimizer = world.wrap(torch.optim.AdamW(heads.parameters()), heads, op="adasum")
        heads[world.rank].weight.sum().backward()
        optimizer.step()
        return [None if head.weight.grad is None else head.weight.grad.tolist() for head in heads]

    assert run_ranks(2, work) == [[[[1.0, 1.0]], [[1.0, 1.0]], None]] * 2


def test_adasum_of_sparse_gradients_is_refused():
    def work(world):
        words = torch.nn.Embedding(3, 2, sparse=True)
        with pytest.raises(ConfigError, match="adasum needs dense gradients"):
            world.wrap(sgd(words), words, op="adasum")
        return True

    assert run_ranks(2, work) == [True, True]


@pytest.mark.parametrize("place", ["first", "second"])
@pytest.mark.parametrize(
    ("settings", "other", "says"),
    [
        ({"accum_steps": 4}, {}, "has accum_steps = 4, the other 1"),
        ({}, {"accum_steps": 4}, "has accum_steps = 1, the other 4"),
        ({"op": "adasum"}, {}, "has op = adasum, the other average"),
        ({"compression": "fp16"}, {}, "has compression = fp16, the other none"),
        ({"has_square": True}, {}, "has squared norms to average"),
        ({"accum_steps": 2, "compression": "bf16"}, {"accum_steps": 2, "compression": "bf16"}, None),
        ({"bucket_bytes": 1}, {}, None),
    ],
)
def test_optimizers_that_share_parameters_average_alike_or_the_earlier_is_refused(settings, other, says, place):
    """The one wrapped last averages what both have: with its settings, and not in silence with the earlier one's."""

    def work(world):
        model = network()
        optimizers = [world.wrap(sgd(model), model, **settings), world.wrap(sgd(model[2]), model, **other)]
        optimizer = optimizers[place == "second"]
        if says is None or place == "second":
            train(model, optimizer, 2)
            return True
        with pytest.raises(ConfigError, match=f"wrapped later, and {says}"):
            train(model, optimizer, 2)
        return True

    assert run_ranks(2, work) == [True, True]


def test_gradients_lie_as_their_parameters_do_on_a_rank_without_samples():
    """torch's fused optimizers go through both as they lie in memory, in whatever order that is."""

    def work(world, fused):
        weight = torch.linspace(-1, 1, 24).view(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
        model = torch.nn.ParameterList([torch.nn.Parameter(weight)])
        optimizer = world.wrap(torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused), model)
        for step in range(2):
            optimizer.zero_grad()
            if world.rank == 0:
                (model[0].square() * torch.linspace(step, 1, 24).view(2, 3, 2, 2)).sum().backward()
            optimizer.step()
        return model[0].detach()

    fused, plain = (run_ranks(2, lambda world, fused=fused: work(world, fused)) for fused in (True, False))
    assert all((tensor - plain[0]).abs().max() < 1e-6 for tensor in (*fused, *plain))


def test_a_gradient_that_no_optimizer_averages_is_said_once(caplog):
    """A norm over the whole model would clip every rank in another way."""

    def work(world, is_frozen):
        model = network()
        model[0].requires_grad_(not is_frozen)
        model[1].none = torch.nn.Parameter(torch.zeros(0))  # nothing to average in it
        model[1].none.grad = torch.zeros(0)
        train(model, world.wrap(sgd(model[2]), model, warns_of_copies=False), 3)

    run_ranks(2, lambda world: work(world, True))
    assert caplog.messages == []
    run_ranks(2, lambda world: work(world, False))
    (line,) = caplog.messages
    assert line.startswith("the gradient of 0.weight and 1 more stays each rank's own, as no wrapped optimizer has")


def test_weights_that_a_forward_pass_changes_are_refused():
    """Ranks would drift apart by their samples; what the message says instead is right."""

    def work(world):
        words = torch.nn.Embedding(5, 2, max_norm=1.0)
        model = torch.nn.ModuleDict({"words": words})
        with pytest.raises(ConfigError, match=r"Embedding\(max_norm=1\) words shortens its rows"):
            world.wrap(sgd(model), model)
        with torch.no_grad():
            words.weight.fill_(3.0).renorm_(2, 0, 1.0)
        words.max_norm = None
        world.wrap(sgd(model), model)
        return words.weight.norm(dim=1).tolist()

    for norms in run_ranks(2, work):
        assert norms == pytest.approx([1.0] * 5)
    alone = torch.nn.Embedding(5, 2, max_norm=1.0)
    SoloWorld(torch.device("cpu"), Launch("none")).wrap(sgd(alone), alone)


def test_whoever_goes_on_to_another_optimizer_may_still_hold_the_first():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)
        train(model, optimizer, 2)
        optimizer = world.wrap(sgd(model), model, accum_steps=2)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
        train(model, optimizer, 2)
        return True

    assert run_ranks(2, work) == [True, True]


def test_an_exchange_needs_nothing_but_a_world():
    """The interface that a back end must serve: see `tests/support/thread_world.py`."""

    def work(world):
        weight = torch.nn.Parameter(torch.zeros(2))
        averaging = Averaging()
        exchange = GradientExchange(
            world, "gradients", lambda: [weight], {weight: "weight"}, set(), averaging, averaging.codec()
        )
        (weight * (world.rank + 1)).sum().backward()
        exchange.finish()
        return weight.grad.tolist()

    assert run_ranks(2, work) == [[1.5, 1.5]] * 2


def clipped(model, norm=0.01):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), norm)


@pytest.mark.parametrize("change", ["clipped", "replaced"])
def test_a_gradient_that_is_changed_before_it_is_averaged_is_refused(change):
    """Clipped on each rank by its own norm, the mean would be wrong without a word."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, accum_steps=2)
        x, y = data(0)
        F.cross_entropy(model(share(world, x)), share(world, y)).backward()
        if change == "clipped":
            clipped(model)
        else:
            model[0].bias.grad = model[0].bias.grad * 2
        with pytest.raises(
            RuntimeError, match=r"changed after backward pass 1 .*accum_steps = 2.*synchronize\(\) first"
        ):
            optimizer.step()
        return True

    assert run_ranks(2, work) == [True, True]


def test_a_gradient_that_is_changed_while_on_the_wire_is_refused():
    """By a hook that comes after ours: before, it is the gradient that is sent."""

    def work(world):
        for is_before in (True, False):
            model = network()

            def halve(parameter):
                parameter.grad.mul_(0.5)

            if is_before:
                model[2].bias.register_post_accumulate_grad_hook(halve)
            optimizer = world.wrap(sgd(model), model, bucket_bytes=1)
            train(model, optimizer, 1)
            if not is_before:
                model[2].bias.register_post_accumulate_grad_hook(halve)
                with pytest.raises(RuntimeError, match=r"changed while it was on the wire.* 2\.bias.*before wrap"):
                    train(model, optimizer, 1)
            else:
                train(model, optimizer, 1)
        return True

    assert run_ranks(2, work) == [True, True]


def test_backward_that_failed_with_gradients_on_the_wire():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, bucket_bytes=1)
        train(model, optimizer, 1)

        def fail(gradient):
            raise ValueError("out of memory")

        handle = model[0].weight.register_hook(fail)
        optimizer.zero_grad()
        with pytest.raises(ValueError, match="out of memory"):
            F.cross_entropy(model(data(0)[0]), data(0)[1]).backward()
        handle.remove()
        with pytest.raises(RuntimeError, match="the other ranks wait"):
            optimizer.zero_grad()
        optimizer.synchronize()
        return train(model, optimizer, 2)

    first, second = run_ranks(2, work)
    assert largest(first, second) == 0


def test_a_pass_that_failed_before_anything_was_sent_is_forgotten():
    def work(world):
        model, plain = network(), network()
        for net in (model, plain):
            optimizer = world.wrap(sgd(net), net)
            if net is model:
                handle = net[0].weight.register_hook(lambda gradient: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    F.cross_entropy(net(data(0)[0]), data(0)[1]).backward()
                handle.remove()
            train(net, optimizer, 2, lambda tensor: share(world, tensor))
        return largest(model.parameters(), plain.parameters())

    assert run_ranks(2, work) == [0.0, 0.0]


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_a_network_that_is_one_reentrant_checkpoint(accum_steps):
    """Its backward pass runs inside another, in which no gradient of the optimizer's is added to."""

    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, accum_steps=accum_steps)
        norms = []
        for step in range(3):
            optimizer.zero_grad()
            for part in range(accum_steps):
                x, y = data(10 * step + part)
                output = checkpoint(model, share(world, x).requires_grad_(), use_reentrant=True)
                (F.cross_entropy(output * 2, share(world, y)) / accum_steps).backward()
            norms.append(clipped(model).item())
            optimizer.step()
        return norms

    model, expected = network(), []
    optimizer = sgd(model)
    for step in range(3):
        optimizer.zero_grad()
        for part in range(accum_steps):
            x, y = data(10 * step + part)
            (F.cross_entropy(model(x) * 2, y) / accum_steps).backward()
        expected.append(clipped(model).item())
        optimizer.step()
    for norms in run_ranks(2, work):
        assert norms == pytest.approx(expected, rel=1e-12)


def test_a_whole_window_averages_once():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, accum_steps=3, warns_of_copies=False)
        rounds = []
        for step in range(2):
            optimizer.zero_grad()
            before = len(world.sent)
            for part in range(3):
                F.cross_entropy(model(data(10 * step + part)[0]), data(10 * step + part)[1]).backward()
            optimizer.synchronize()
            optimizer.step()
            rounds.append(len(world.sent) - before)
        return rounds

    assert run_ranks(2, work) == [[1, 1]] * 2


def test_each_optimizers_collectives_have_their_own_names():
    def work(world):
        for _ in range(2):
            model = network()
            train(model, world.wrap(sgd(model), model), 1)
        return [name for name in world.sent if name.startswith("gradients.")]

    for names in run_ranks(2, work):
        assert len(set(names)) == len(names) == 2


def test_a_closures_loss_is_the_mean():
    def work(world):
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        model = torch.nn.ParameterList([weight])
        optimizer = world.wrap(torch.optim.SGD([weight], lr=0.1), model)

        def closure(kind):
            optimizer.zero_grad()
            loss = (weight * (world.rank + 1)).sum()
            loss.backward()
            return {"tensor": loss, "float": loss.item(), "none": None}[kind]

        found = [optimizer.step(lambda kind=kind: closure(kind)) for kind in ("tensor", "float", "none")]
        optimizer.step(closure=lambda: closure("float"))
        return [type(value) for value in found], found[0].item(), found[1], found[2], weight.item()

    for kinds, tensor, number, none, weight in run_ranks(2, work):
        assert kinds == [torch.Tensor, float, type(None)]
        assert (tensor, number, none) == (1.5, pytest.approx(1.5 * 0.85), None)
        assert weight == pytest.approx(1 - 4 * 0.15)


def test_mean_square_is_that_of_the_ranks_own_gradients():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, has_square=True, bucket_bytes=100)
        x, y = share(world, data(0)[0]), share(world, data(0)[1])
        own = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))
        F.cross_entropy(model(x), y).backward()
        return sum(gradient.square().sum().item() for gradient in own), optimizer.mean_square.item()

    results = run_ranks(2, work)
    for _, mean in results:
        assert mean == pytest.approx(sum(own for own, _ in results) / 2, rel=1e-12)


def test_broadcast_state_leaves_groups_where_schedulers_find_them():
    def work(world):
        model = network()
        rate = torch.tensor(0.1 * (world.rank + 1))
        optimizer = torch.optim.AdamW(
            [{"params": model[0].parameters(), "lr": rate}, {"params": model[2].parameters(), "lr": 0.1}], lr=0.1
        )
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        groups = list(optimizer.param_groups)
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append(world.rank))
        optimizer = world.wrap(optimizer, model)
        if world.rank == 0:
            groups[1]["lr"] = 0.7
        world.broadcast_state(model, optimizer)
        assert all(a is b for a, b in zip(groups, optimizer.param_groups, strict=True))
        assert groups[0]["lr"] is rate or groups[0]["lr"].data_ptr() == rate.data_ptr()
        train(model, optimizer, 2)
        scheduler.step()
        return [float(group["lr"]) for group in groups], len(calls)

    assert run_ranks(2, work) == [([pytest.approx(0.05), 0.35], 2)] * 2


def test_a_change_of_what_is_trained_is_laid_out_anew():
    """What is new travels in a bucket of its own, until something is frozen."""

    def work(world):
        model = network()
        model[2].requires_grad_(False)
        optimizer = world.wrap(sgd(model), model, warns_of_copies=False)
        sent = []
        for change in (lambda: None, lambda: model[2].requires_grad_(True), lambda: model[0].requires_grad_(False)):
            change()
            for _ in range(2):
                before = len(world.sent)
                train(model, optimizer, 1)
                sent.append(len(world.sent) - before)
        return sent

    assert run_ranks(2, work) == [[1, 1, 2, 2, 2, 1]] * 2


def test_step_hooks_of_before_wrap_see_the_mean_on_a_rank_without_a_batch():
    def work(world):
        model = network()
        seen = []
        optimizer = sgd(model)
        optimizer.register_step_pre_hook(lambda *_: seen.append(model[0].bias.grad.clone()))
        optimizer = world.wrap(optimizer, model)
        if world.rank == 0:
            F.cross_entropy(model(data(0)[0]), data(0)[1]).backward()
        optimizer.step()
        return seen[0]

    first, second = run_ranks(2, work)
    assert torch.equal(first, second)


def test_checkpoints_inside_a_pass_do_not_end_it():
    """Each `use_reentrant=True` is a run of autograd's engine of its own, which is over before the pass is."""

    def work(world):
        layers = torch.nn.ModuleList([torch.nn.Linear(6, 6).double() for _ in range(3)])
        optimizer = world.wrap(sgd(layers), layers, accum_steps=2, warns_of_copies=False)
        sent = []
        for _ in range(2):
            before = len(world.sent)
            for _ in range(2):
                x = data(0)[0].requires_grad_()
                for layer in layers:
                    x = checkpoint(layer, x, use_reentrant=True)
                x.sum().backward()
                sent.append(len(world.sent) - before)
            optimizer.step()
        return sent

    assert run_ranks(2, work) == [[0, 1, 0, 1]] * 2


def test_a_rank_without_a_batch_joins_every_step_however_gradients_are_cleared():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)
        for step in range(6):
            if step % 2:
                optimizer.zero_grad()
            else:
                model.zero_grad()
            if world.rank == 0 or step == 0:
                F.cross_entropy(model(data(step)[0]), data(step)[1]).backward()
            if step == 4:
                optimizer.synchronize()
                continue  # such as a scaler's overflow
            optimizer.step()
        return list(model.parameters())

    first, second = run_ranks(2, work)
    assert largest(first, second) == 0


def test_a_rank_without_a_batch_in_a_closure():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model)

        def closure():
            model.zero_grad()
            if world.rank == 0:
                F.cross_entropy(model(data(0)[0]), data(0)[1]).backward()

        for _ in range(2):
            optimizer.step(closure)
        return list(model.parameters())

    first, second = run_ranks(2, work)
    assert largest(first, second) == 0


def test_the_first_pass_of_an_added_group_is_averaged():
    def work(world):
        model = network()
        optimizer = world.wrap(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
        optimizer.add_param_group({"params": model[2].parameters()})
        model[0].requires_grad_(False)
        F.cross_entropy(model(share(world, data(0)[0])), share(world, data(0)[1])).backward()
        return model[2].weight.grad.clone()

    first, second = run_ranks(2, work)
    assert torch.equal(first, second)


def test_an_addition_to_what_was_sent_is_refused():
    def work(world):
        layer = torch.nn.Linear(6, 6).double()
        optimizer = world.wrap(sgd(layer), layer, bucket_bytes=1)

        def backward(reentrant):
            x = data(0)[0].requires_grad_()
            for _ in range(2):
                x = checkpoint(layer, x, use_reentrant=reentrant)
            x.sum().backward()

        backward(False)
        optimizer.step()
        with pytest.raises(RuntimeError, match=r"gradient of .* 2 times, an earlier one 1 times, and it has been sent"):
            backward(True)
        return True

    assert run_ranks(2, work) == [True, True]


def hooks_of(optimizer):
    return len(optimizer._exchange._hooks)


def test_a_small_model_is_averaged_when_its_caller_asks_and_is_left_alone_before():
    """The same numbers, bit by bit, for gradients that are there, frozen, and missing on one rank or on all."""

    whole = network()
    whole.add_module("rare", torch.nn.Linear(6, 3).double())
    whole.add_module("never", torch.nn.Linear(2, 2).double())

    def work(world, waits):
        model = copy.deepcopy(whole)
        model[0].bias.requires_grad_(False)
        optimizer = world.wrap(sgd(model), model, waits_for_caller=waits, accum_steps=2)
        found = []
        for step in range(4):
            model[0].bias.requires_grad_(step > 1)
            x, y = (share(world, part) for part in data(step))
            optimizer.zero_grad()
            for _ in range(2):
                logits = model[2](model[1](model[0](x)))
                logits = logits + (model.rare(x) if world.rank and step else 0)
                F.cross_entropy(logits, y).backward()
            own = [p.grad.clone() for p in model.parameters() if p.grad is not None]
            optimizer.synchronize()
            mean = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
            found.append((own, mean, [p.detach().clone() for p in model.parameters()]))
            optimizer.step()
        return hooks_of(optimizer), found

    def same(ours, theirs):
        return all(a is b if a is None or b is None else a.equal(b) for a, b in zip(ours, theirs, strict=True))

    late, usual = (run_ranks(2, lambda world, waits=waits: work(world, waits)) for waits in (True, False))
    assert [hooks for hooks, _ in late] == [0, 0]
    assert [hooks for hooks, _ in usual] == [8, 8]
    for (_, ours), (_, theirs) in zip(late, usual, strict=True):
        for (own, mean, weights), (_, others_mean, others_weights) in zip(ours, theirs, strict=True):
            assert same(mean, others_mean)
            assert same(weights, others_weights)
            assert mean[-1] is None
            assert not same(own[:1], mean[:1])  # each rank's own until then
    assert largest(late[0][1][0][2], late[0][1][3][2]) > 0


def test_a_step_averages_what_nobody_has_asked_for_before():
    def work(world):
        model = network()
        return train(model, world.wrap(sgd(model), model, waits_for_caller=True), 3, lambda t: share(world, t))

    alone = network()
    expected = train(alone, sgd(alone), 3)
    assert all(largest(weights, expected) < 1e-12 for weights in run_ranks(2, work))


def test_backward_is_followed_again_where_a_model_has_grown_beyond_one_small_part():
    def work(world):
        model = network()
        optimizer = world.wrap(sgd(model), model, waits_for_caller=True)
        before = hooks_of(optimizer)
        model.add_module("more", torch.nn.Linear(6, 30_000).double())
        optimizer.add_param_group({"params": [*model.more.parameters()]})
        model.more(torch.ones(1, 6).double() * world.rank).sum().backward()
        return before, hooks_of(optimizer), model.more.weight.grad[0, 0].item(), model[0].weight.grad

    assert run_ranks(2, work) == [(0, 6, 0.5, None)] * 2


def test_a_model_of_several_parts_is_followed_whoever_waits():
    def work(world):
        model = network()
        return hooks_of(world.wrap(sgd(model), model, waits_for_caller=True, bucket_bytes=100))

    assert run_ranks(2, work) == [4, 4]


@pytest.mark.parametrize("asks", [False, True])
def test_a_loss_scaler_looks_at_the_mean_or_is_told_to_wait(asks):
    """Of its own gradients one rank alone would leave the step out."""

    def work(world):
        model = network(torch.float32)
        optimizer = world.wrap(sgd(model), model, waits_for_caller=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        x, y = (share(world, part) for part in data(0, torch.float32))
        scaler.scale(F.cross_entropy(model(x), y) * (float("inf") if world.rank else 1)).backward()
        if asks:
            optimizer.synchronize()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale(), largest(model.parameters(), network(torch.float32).parameters())

    if asks:
        assert run_ranks(2, work) == [(2.0, 0.0)] * 2
    else:
        with pytest.raises(RuntimeError, match=r"call synchronize\(\) after backward"):
            run_ranks(2, work)
