"""PowerSGD, top-k and int8 against the papers' formulas written out, and what they remember; ranks are threads."""

import copy
import math

import pytest
import torch
from test_averaging import data, network, sgd, share, train
from test_averaging import largest as furthest
from thread_world import run_ranks

from hvdtrain.errors import ConfigError
from hvdtrain.settings import CommConfig
from hvdtrain.world import Int8, PowerSGD, TopK, codec_for, codec_of
from hvdtrain.world.int8 import BLOCK, read, rounded
from hvdtrain.world.memory import Memory
from hvdtrain.world.topk import largest

KINDS = {
    "powersgd": lambda **options: PowerSGD(1, **{"min_size": 4, "min_saving": 0.0, **options}),
    "topk": lambda **options: TopK(0.1, **{"min_size": 4, **options}),
    "int8": lambda **options: Int8(**{"min_size": 4, **options}),
}
SHAPES = {"matrix": (6, 5), "kernel": (4, 3, 2), "vector": (7,), "small": (2,), "wide": (3, 200)}


def gradient(step, rank, name):
    generator = torch.Generator().manual_seed(1000 * step + 10 * rank + len(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64)


def parameters(dtype=torch.float64):
    return torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for name, s in SHAPES.items()})


def averaged(world, codec, steps, *, bucket_bytes=1 << 20, value=gradient, dtype=torch.float64, step_too=True):
    """Return each step's means by name, and what the rank remembers after each."""
    model = parameters(dtype)
    optimizer = world.wrap(
        torch.optim.SGD(model.parameters(), lr=1.0), model, compression=codec, bucket_bytes=bucket_bytes
    )
    found = []
    for step in steps:
        optimizer.zero_grad()
        losses = [(p * value(step, world.rank, name).to(dtype)).sum() for name, p in model.items()]
        sum(losses).backward()
        means = {name: p.grad.clone() for name, p in model.items()}
        if step_too:
            optimizer.step()
        found.append((means, {name: kept.clone() for name, kept in codec.left_over().items()}))
    return found


def exact_mean(step, size, name, value=gradient):
    return sum(value(step, rank, name) for rank in range(size)) / size


def powersgd_by_the_paper(steps, size, name, first_q):
    """Algorithm 2 of arXiv:1905.13727 for one matrix: errors by rank in gradients' own units, M is g_w + e_w."""
    errors, q = [torch.zeros(SHAPES[name]).double().flatten(1)] * size, first_q
    means = []
    for step in steps:
        whole = [gradient(step, w, name).flatten(1) + errors[w] for w in range(size)]
        p = sum(m @ q for m in whole) / size
        p, _ = torch.linalg.qr(p)
        of_ranks = [m.T @ p for m in whole]
        errors = [m - p @ own.T for m, own in zip(whole, of_ranks, strict=True)]
        q = sum(of_ranks) / size
        means.append((p @ q.T).view(SHAPES[name]))
    return means, [error.view(SHAPES[name]) for error in errors]


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_powersgd_is_the_papers(size, bucket_bytes):
    def work(world):
        codec = PowerSGD(2, min_size=8)
        return averaged(world, codec, range(4), bucket_bytes=bucket_bytes), codec.state_dict()["factors"]

    ranks = run_ranks(size, work)
    first, _ = run_ranks(size, lambda world: (averaged(world, codec := PowerSGD(2, min_size=8), [0]), codec))[0]
    for name in ("matrix", "wide"):
        columns = math.prod(SHAPES[name][1:])
        probe = PowerSGD(2, min_size=8)
        piece = type("Piece", (), {"name": name, "whole": torch.zeros(SHAPES[name]).double()})
        q = probe._factor(piece)
        assert q.shape == (2, columns)
        means, errors = powersgd_by_the_paper(range(4), size, name, q.T)
        for rank, (found, _) in enumerate(ranks):
            for step in range(4):
                assert (found[step][0][name] - means[step]).abs().max() < 1e-12
            assert (found[-1][1][name] * size - errors[rank]).abs().max() < 1e-12
    for name in ("vector", "small"):  # sent as they are, and nothing is remembered of them
        for step, (means, kept) in enumerate(ranks[0][0]):
            assert (means[name] - exact_mean(step, size, name)).abs().max() < 1e-15
            assert name not in kept
    for found, factors in ranks[1:]:
        assert all(torch.equal(a[n], b[n]) for (a, _), (b, _) in zip(found, ranks[0][0], strict=True) for n in a)
        assert all(torch.equal(factors[n], q) for n, q in ranks[0][1].items())
    assert torch.equal(first[0][0]["matrix"], ranks[0][0][0][0]["matrix"]) or bucket_bytes == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_powersgd_of_full_rank_is_the_exact_mean(dtype):
    def work(world):
        return averaged(world, PowerSGD(200, min_size=1, min_saving=0.0), range(3), dtype=dtype)

    for found in run_ranks(2, work):
        for step, (means, kept) in enumerate(found):
            assert {"matrix", "kernel", "wide"} == kept.keys()
            for name, mean in means.items():
                gap = (mean.double() - exact_mean(step, 2, name)).abs().max()
                assert gap < (1e-12 if dtype == torch.float64 else 1e-5)


def test_a_matrix_is_sent_as_it_is_where_its_factors_are_no_smaller():
    codec = PowerSGD(2, min_size=8)
    shapes = [torch.Size(shape) for shape in SHAPES.values()]
    assert [codec.compresses(shape) for shape in shapes] == [True, True, False, False, True]
    assert [PowerSGD(3, min_size=8).compresses(shape) for shape in shapes] == [False] * 5
    assert codec.tensor_bytes(torch.Size((6, 5)), torch.float32) == 4 * 2 * 11
    assert PowerSGD(3).tensor_bytes(torch.Size((6, 5)), torch.float32) == 4 * 30


def test_topk_sends_the_largest_of_each_rank():
    def work(world):
        return averaged(world, TopK(0.1, min_size=8), range(2))

    ranks = run_ranks(3, work)
    errors = [torch.zeros(600).double()] * 3
    for step in range(2):
        total = torch.zeros(600).double()
        for rank in range(3):
            whole = gradient(step, rank, "wide").flatten() / 3 + errors[rank]
            chosen = whole.abs().argsort(descending=True)[:60]
            total[chosen] += whole[chosen]
            errors[rank] = whole.index_fill(0, chosen, 0.0)
        for rank in range(3):
            means, kept = ranks[rank][step]
            assert torch.equal(means["wide"], ranks[0][step][0]["wide"])
            assert (means["wide"].flatten() - total).abs().max() < 1e-15
            assert (kept["wide"].flatten() - errors[rank]).abs().max() < 1e-15


@pytest.mark.parametrize("kind", ["normal", "few", "equal", "nan"])
def test_the_largest_of_a_long_tensor_are_found(kind):
    numbers = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    if kind == "few":
        numbers[50:] = 0
    if kind == "equal":
        numbers.fill_(1.0)
    if kind == "nan":
        numbers[[5, 77_777]] = torch.nan
    for count in (1, 1000, 60_000):
        places = largest(numbers, count)
        assert len(places.unique()) == count
        sizes = numbers.abs().nan_to_num(torch.inf)
        assert torch.equal(sizes[places].sort().values, sizes.sort().values[-count:])
        assert kind != "nan" or count == 1 or {5, 77_777} <= set(places.tolist())


@pytest.mark.parametrize("size", [2, 3])
def test_int8_rounds_blocks_to_127_steps(size):
    found = run_ranks(size, lambda world: averaged(world, Int8(min_size=8), range(1)))
    for means, _ in (of_rank[0] for of_rank in found):
        exact = exact_mean(0, size, "wide")
        step = sum(gradient(0, rank, "wide").abs().max() for rank in range(size)) / size / 127
        bound = step / 2 if size == 2 else 1.1 * step  # of more than two ranks the sum is rounded again
        assert 0 < (means["wide"] - exact).abs().max() <= bound
        assert torch.equal(means["wide"], found[0][0][0]["wide"])
    for small in (0.0, 2.6e-43, 1e-45):
        scales, codes = rounded(torch.full((2, BLOCK), small))
        assert not read(scales, codes).any()


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(kind, size, bucket_bytes):
    """The sum of what was sent and of what is remembered is the sum of the gradients."""
    ranks = run_ranks(size, lambda world: averaged(world, KINDS[kind](), range(5), bucket_bytes=bucket_bytes))
    names = ranks[0][-1][1].keys()
    assert names >= {"matrix", "kernel", "wide"} or kind == "topk"
    for name in SHAPES:
        sent = sum(means[name] for means, _ in ranks[0])
        kept = sum(found[-1][1].get(name, torch.zeros(SHAPES[name]).double()) for found in ranks)
        assert name not in names or kept.abs().max() > 1e-3
        assert (sent + kept - sum(exact_mean(step, size, name) for step in range(5))).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_that_averages_within_autocast_gets_the_same(kind):
    """As where backward() or step() stand within it: PowerSGD's products had 16 bits then, which ended the run."""

    def work(world):
        outside = averaged(world, KINDS[kind](), range(3), dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            return outside, averaged(world, KINDS[kind](), range(3), dtype=torch.float32)

    for outside, within in run_ranks(2, work):
        for (means, kept), (own, own_kept) in zip(outside, within, strict=True):
            assert all(torch.equal(means[name], own[name]) for name in SHAPES)
            assert kept.keys() == own_kept.keys()
            assert all(torch.equal(kept[name], own_kept[name]) for name in kept)


def bad(value):
    def of(step, rank, name):
        return gradient(step, rank, name) * (value if (step, rank, name) == (1, 1, "wide") else 1.0)

    return of


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_not_finite_is_seen_by_all_and_leaves_no_trace(kind, size, value):
    """Not finite on one rank, in one tensor. All ranks see it, skip the step, and remember of all what they did."""

    def work(world):
        codec = KINDS[kind]()
        model = parameters()
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, compression=codec, bucket_bytes=1)
        states, seen = [], []
        for step in range(3):
            optimizer.zero_grad()
            states.append(codec.state_dict())
            sum((p * bad(value)(step, world.rank, name)).sum() for name, p in model.items()).backward()
            finite = all(p.grad.isfinite().all() for p in model.values())
            seen.append(finite)
            if finite:
                optimizer.step()
            states.append(codec.state_dict())
        return states, seen

    for states, seen in run_ranks(size, work):
        assert seen == [True, False, True]
        before, after = states[1], states[3]  # the save after a skipped step is the one before it
        assert after["steps"] == before["steps"] + 1
        for part in after.keys() - {"steps"}:
            assert all(torch.equal(before[part][name], after[part][name]) for name in before[part])
        assert states[4]["steps"] == 2
        assert all(tensor.isfinite().all() for tensor in states[5]["errors"].values())
        assert any(not torch.equal(states[5]["errors"][n], before["errors"][n]) for n in before["errors"])


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_scaler_that_skips_on_the_device_leaves_no_trace(kind):
    """A fused optimizer steps all the same, and is told by `found_inf` to move nothing."""

    def work(world):
        codec, model = KINDS[kind](), parameters()
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=1.0, fused=True), model, compression=codec)
        states = []
        for step, found in enumerate((0.0, 1.0)):
            optimizer.zero_grad()
            sum((p * gradient(step, world.rank, name)).sum() for name, p in model.items()).backward()
            optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), None
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale
            states.append(codec.state_dict())
        return states

    for first, second in run_ranks(2, work):
        assert first["steps"] == 1
        assert second["steps"] == 2
        for part in first.keys() - {"steps"}:
            assert all(torch.equal(kept, second[part][name]) for name, kept in first[part].items())


def test_what_is_remembered_of_another_shape_is_forgotten_on_the_device():
    """A factor of another rank, from a checkpoint; the first step is skipped."""
    for skipped in (0.0, 1.0):
        memory, fresh = Memory(), torch.ones(4, 3)
        memory.load_state_dict({"weight": torch.full((2, 3), 5.0)})
        memory.put("weight", fresh, torch.tensor(True))
        memory.settle(torch.tensor(skipped))
        assert torch.equal(memory.now()["weight"], fresh * (1 - skipped))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_are_cleared_without_a_step_leave_no_trace(kind):
    def work(world):
        codec = KINDS[kind]()
        averaged(world, codec, range(2))
        before = codec.left_over()
        before = {name: kept.clone() for name, kept in before.items()}
        model = parameters()
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, compression=codec)
        sum((p * gradient(7, world.rank, name)).sum() for name, p in model.items()).backward()
        changed = any(not torch.equal(codec.left_over()[name], kept) for name, kept in before.items())
        optimizer.zero_grad()
        return changed, all(torch.equal(codec.left_over()[name], kept) for name, kept in before.items())

    assert run_ranks(2, work) == [(True, True)] * 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_parameter_that_no_rank_uses_keeps_what_is_remembered(kind):
    """Its gradient stays None; one that only some ranks use, and one that is frozen for a while, lose nothing."""

    def work(world):
        codec, model = KINDS[kind](), parameters()
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, compression=codec)
        used = [SHAPES, [n for n in SHAPES if n != "wide"], SHAPES if world.rank else ["small"], SHAPES, SHAPES]
        sent, total = torch.zeros(3, 200).double(), torch.zeros(3, 200).double()
        kept = []
        for step, names in enumerate(used):
            model["wide"].requires_grad_(step != 3)
            optimizer.zero_grad()
            sum((model[name] * gradient(step, world.rank, name)).sum() for name in names).backward()
            optimizer.synchronize()
            if model["wide"].grad is not None:
                sent += model["wide"].grad
            if step != 3 and "wide" in names:
                total += gradient(step, world.rank, "wide") / world.size
            kept.append(codec.left_over()["wide"].clone())
            if step in (1, 3):
                assert model["wide"].grad is None
            optimizer.step()
        return sent, total, kept

    (sent, one, kept), (_, other, others) = run_ranks(2, work)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    assert not torch.equal(kept[1], kept[2])
    assert (sent + kept[-1] + others[-1] - one - other).abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_accumulation_sends_once_and_remembers_once(kind):
    def work(world):
        codec = KINDS[kind]()
        model = network()
        optimizer = world.wrap(sgd(model), model, compression=codec, accum_steps=2)
        x, y = data(0)
        for half in (slice(0, 6), slice(6, 12)):
            loss = torch.nn.functional.cross_entropy(model(share(world, x[half])), share(world, y[half]))
            (loss / 2).backward()
        several = {name: p.grad.clone() for name, p in model.named_parameters()}
        left = {name: kept.clone() for name, kept in codec.left_over().items()}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # of the mean: what is remembered has its own size
        optimizer.step()
        assert all(torch.equal(codec.left_over()[name], kept) for name, kept in left.items())
        again, other = network(), KINDS[kind]()
        optimizer = world.wrap(sgd(again), again, compression=other)
        torch.nn.functional.cross_entropy(again(share(world, x)), share(world, y)).backward()
        return several, {name: p.grad for name, p in again.named_parameters()}, codec.state_dict()["steps"]

    for several, once, steps in run_ranks(2, work):
        assert steps == 1
        assert all((several[name] - once[name]).abs().max() < 1e-12 for name in once) or kind == "int8"


@pytest.mark.parametrize("kind", KINDS)
def test_warming_up_is_exact(kind):
    def work(world):
        return averaged(world, KINDS[kind](warmup_steps=2), range(3))

    found = run_ranks(2, work)[0]
    for step in range(2):
        assert not found[step][1]
        assert all((m - exact_mean(step, 2, n)).abs().max() < 1e-15 for n, m in found[step][0].items())
    assert (found[2][0]["wide"] - exact_mean(2, 2, "wide")).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_training_is_bitwise_the_same(kind):
    """In other buckets too: what is remembered goes with the tensor."""

    def go_on(world, weights, state, bucket_bytes):
        model, codec = network(), KINDS[kind](warmup_steps=2)
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), weights, strict=True):
                parameter.copy_(weight)
        if state is not None:
            codec.load_state_dict(copy.deepcopy(state))
        optimizer = world.wrap(sgd(model), model, compression=codec, bucket_bytes=bucket_bytes)
        return train(model, optimizer, 3, lambda tensor: share(world, tensor))

    def work(world):
        model, codec = network(), KINDS[kind](warmup_steps=2)
        optimizer = world.wrap(sgd(model), model, compression=codec, bucket_bytes=100)
        of = lambda tensor: share(world, tensor)  # noqa: E731
        weights, state = train(model, optimizer, 4, of), codec.state_dict()
        on = train(model, optimizer, 3, of)
        return on, go_on(world, weights, state, 100), go_on(world, weights, state, 1), go_on(world, weights, None, 100)

    for on, resumed, other, forgetful in run_ranks(2, work):
        assert all(torch.equal(a, b) for a, b in zip(on, resumed, strict=True))
        assert furthest(on, other) < 1e-12
        assert furthest(on, forgetful) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_ranks_goes_on_with_the_sum(kind):
    def work(world):
        codec = KINDS[kind]()
        averaged(world, codec, range(3))
        return codec.state_dict()

    states = run_ranks(3, work)
    merged = KINDS[kind]().merged(states, 2)
    assert merged["steps"] == 3
    for name, kept in merged["errors"].items():
        assert (2 * kept - sum(state["errors"][name] for state in states)).abs().max() < 1e-14
    later = KINDS[kind]()
    later.load_state_dict(merged)
    if kind == "powersgd":
        assert all(torch.equal(q, states[0]["factors"][n]) for n, q in merged["factors"].items())
    assert KINDS[kind]().merged([{}, {}], 2) is None
    assert KINDS[kind]().state_dict() == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 3])
def test_the_bytes_are_those_that_it_says(kind, size):
    def work(world):
        codec = KINDS[kind]()
        averaged(world, codec, range(1), dtype=torch.float32)
        return world.handed_bytes["gradients"], codec

    handed, codec = run_ranks(size, work)[0]
    said = sum(codec.tensor_bytes(torch.Size(shape), torch.float32) for shape in SHAPES.values()) + 4 * len(SHAPES)
    if kind == "int8" and size > 2:  # shares are whole blocks, what is sent as it is goes to all; and then the sums
        assert handed > said
    else:
        assert handed == said
    plain = sum(4 * math.prod(shape) for shape in SHAPES.values())
    assert kind == "int8" or said < plain


@pytest.mark.parametrize("kind", KINDS)
def test_one_object_serves_one_optimizer(kind):
    """Two models may have parameters of the same names: what is left of one would be sent for the other."""

    def work(world):
        first, second = torch.nn.Linear(40, 40), torch.nn.Linear(40, 40)
        codec = KINDS[kind]()
        optimizer = world.wrap(torch.optim.SGD(first.parameters(), lr=0.1), first, compression=codec)
        other = torch.optim.SGD(second.parameters(), lr=0.1)
        with pytest.raises(ConfigError, match="belongs to another optimizer already"):
            world.wrap(other, second, compression=codec)
        assert type(other) is torch.optim.SGD
        world.wrap(other, second, compression=codec.name)
        del optimizer
        third = torch.nn.Linear(40, 40)  # what it served is gone
        world.wrap(torch.optim.SGD(third.parameters(), lr=0.1), third, compression=codec)

    run_ranks(2, work)


def test_names():
    assert codec_of("powersgd:4", min_size=5).name == "powersgd:4"
    assert codec_of("topk:0.010").name == "topk:0.01"
    comm = CommConfig(compression="powersgd:2", compression_min_size=50, compression_warmup_steps=7)
    codec = codec_for(comm)
    assert (codec.min_size, codec.warmup_steps) == (50, 7)
    tensors = [("a", torch.Size((30, 30))), ("b", torch.Size((30,)))]
    about = codec.about(tensors)
    assert "1 of 2 tensors, 96.8% of the numbers, from step 8 on: 600 B instead of 3.63 KiB in each step" in about
    # The first averages of local updates go as they are, not the first steps.
    assert "from average 8 on: 600 B instead of 3.63 KiB in each average" in codec.about(tensors, "average")
    wrong = [
        "powersgd",
        "powersgd:0",
        "powersgd:1.5",
        "powersgd:x",
        "topk:0",
        "topk:2",
        "topk:nan",
        "int8:3",
        "none:1",
        "",
    ]
    for text in wrong:
        with pytest.raises(ConfigError, match="choose none, fp16, bf16, int8, powersgd:R"):
            CommConfig(compression=text)
    assert dict(CommConfig().unused())["compression_min_size"].startswith("it is for")


def test_a_converted_model_keeps_what_is_remembered():
    def work(world):
        codec, model = PowerSGD(1, min_size=4), parameters(torch.float32)
        optimizer = world.wrap(torch.optim.SGD(model.parameters(), lr=1.0), model, compression=codec)
        for step in range(2):
            optimizer.zero_grad()
            sum((p * gradient(step, world.rank, n).to(p.dtype)).sum() for n, p in model.items()).backward()
            optimizer.step()
            model.double()
        return codec.left_over()["wide"], sum(p.detach() for p in [model["wide"]])

    (one, weight), (other, _) = run_ranks(2, work)
    expected = exact_mean(0, 2, "wide") + exact_mean(1, 2, "wide")
    assert one.dtype == torch.float64
    assert (one + other - weight - expected).abs().max() < 1e-5
