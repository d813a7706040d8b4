"""Training loops as PyTorch users write them: a table that runs on one process and on N ranks, which must agree.

Each entry is one function of an environment: `Alone` runs it as plain torch on all samples, `Ranks` on this rank's
share through `World.wrap`. `docs/own-loop.md` has one line for each, compared by `tests/unit/test_loops.py`.
"""

import copy
import functools
import threading
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim import lr_scheduler, swa_utils
from torch.utils.checkpoint import checkpoint

from hvdtrain.world import synchronize_batch_norm

SAMPLES = 24  # divides by 1, 2, 3, 4 ranks
STEPS = 5


class Alone:
    """Plain torch, all samples."""

    rank, size = 0, 1

    def wrap(self, optimizer, model, **settings):
        return optimizer

    def share(self, tensor):
        return tensor

    def mean(self, value, name):
        return value.detach()

    def gather(self, tensor):
        return tensor

    def normalize(self, model):
        return model

    def synchronize(self, optimizer):
        pass


class Ranks(Alone):
    """One rank of several."""

    def __init__(self, world):
        self.world = world
        self.rank, self.size = world.rank, world.size

    def wrap(self, optimizer, model, **settings):
        return self.world.wrap(optimizer, model, **settings)

    def share(self, tensor):
        return tensor[self.rank :: self.size]

    def mean(self, value, name):
        return self.world.all_reduce(value.detach(), "mean", name)

    def gather(self, tensor):
        """Return all ranks' rows in the order that one process has them in: `share` deals them out one by one."""
        rows = self.world.all_gather(tensor, differentiable=True)
        return rows.unflatten(0, (self.size, -1)).transpose(0, 1).flatten(0, 1)

    def normalize(self, model):
        return synchronize_batch_norm(model, self.world)

    def synchronize(self, optimizer):
        optimizer.synchronize()


@dataclass(frozen=True)
class Loop:
    group: str
    call: str
    """As the documentation shows it."""
    run: object
    """Takes an environment, returns the modules whose weights must agree."""
    note: str = ""
    """What to write instead of, or besides, what one would write on one process."""
    tolerance: float = 1e-10

    @property
    def name(self):
        return f"{self.group}: {self.call}"


LOOPS = []


def loop(group, call, note="", **more):
    def add(run):
        LOOPS.append(Loop(group, call, run, note, **more))
        return run

    return add


def filled(module, seed=0):
    """Give a module weights that depend on nothing but the seed (ranks may be threads of one process)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(0.5))
    return module


def network(seed=0):
    return filled(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double(), seed)


def data(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (SAMPLES,), generator=generator)


def batch(env, step):
    return tuple(env.share(tensor) for tensor in data(step))


def loss_of(model, env, step):
    x, y = batch(env, step)
    return F.cross_entropy(model(x), y)


def sgd(module, **settings):
    return torch.optim.SGD(module.parameters(), **{"lr": 0.1, "momentum": 0.9, **settings})


def plain(env, make, after_backward=lambda model, _: None, after_step=lambda loss: None, model=None, steps=STEPS):
    """The loop of PyTorch's tutorials."""
    model = model or network()
    optimizer = env.wrap(make(model), model)
    for step in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, env, step)
        loss.backward()
        after_backward(model, optimizer)
        optimizer.step()
        after_step(env.mean(loss, "loss"))
    return [model]


# torch.optim

OPTIMIZERS = {
    "Adadelta": {},
    "Adafactor": {},
    "Adagrad": {},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.5},
    "Adamax": {},
    "ASGD": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.5},
    "Rprop": {},
    "SGD": {"momentum": 0.9, "nesterov": True},
}
for _name, _settings in OPTIMIZERS.items():

    def _make(model, name=_name, settings=_settings):
        return getattr(torch.optim, name)(model.parameters(), lr=0.01, **settings)

    loop("torch.optim", _name)(functools.partial(plain, make=_make))


if hasattr(torch.optim, "Muon"):

    @loop("torch.optim", "Muon")
    def muon(env):
        def make(model):
            return torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.01)

        return plain(env, make, model=filled(nn.Sequential(nn.Linear(6, 3, bias=False).double())))


@loop("torch.optim", "SparseAdam")
def sparse_adam(env):
    words = filled(nn.Embedding(20, 3, sparse=True).double())
    optimizer = env.wrap(torch.optim.SparseAdam(words.parameters(), lr=0.1), words)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(words((x[:, 0].abs() * 10).long() % 20), y).backward()
        optimizer.step()
    return [words]


for _search in (None, "strong_wolfe"):

    def _lbfgs(env, search=_search):
        model = network()
        optimizer = env.wrap(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4, line_search_fn=search), model)
        x, y = batch(env, 0)

        def closure():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
        return [model]

    loop("torch.optim", f"LBFGS(line_search_fn={_search!r}), step(closure)")(_lbfgs)


@loop("torch.optim", "step(closure)")
def closure(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    losses = []
    for step in range(STEPS):

        def closure(step=step):
            model.zero_grad()
            loss = loss_of(model, env, step)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure))
    return [model, *losses]


for _kernel in ("foreach", "fused", "maximize"):

    def _kernel_make(model, kernel=_kernel):
        return torch.optim.AdamW(model.parameters(), lr=0.01, **{kernel: True})

    loop("torch.optim", f"AdamW({_kernel}=True)")(functools.partial(plain, make=_kernel_make))


@loop("torch.optim", "zero_grad(set_to_none=False)")
def keep_zeros(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad(set_to_none=False)
        loss_of(model, env, step).backward()
        optimizer.step()
    return [model]


@loop("torch.optim", "model.zero_grad(), p.grad = None")
def zero_by_hand(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        if step % 2:
            model.zero_grad(set_to_none=step > 2)
        else:
            for parameter in model.parameters():
                parameter.grad = None
        loss_of(model, env, step).backward()
        optimizer.step()
    return [model]


@loop("torch.optim", "add_param_group()")
def add_group(env):
    model = network()
    optimizer = env.wrap(torch.optim.SGD(model[0].parameters(), lr=0.1), model)
    for step in range(STEPS):
        if step == 2:
            optimizer.add_param_group({"params": model[2].parameters(), "lr": 0.05})
        model.zero_grad()
        loss_of(model, env, step).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.05)
        optimizer.step()
    return [model]


@loop("torch.optim", "state_dict(), load_state_dict()")
def resumed(env):
    model = network()
    optimizer = env.wrap(torch.optim.AdamW(model.parameters(), lr=0.01), model)
    for step in range(STEPS):
        if step == 2:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = network(1)
            optimizer = env.wrap(torch.optim.AdamW(model.parameters(), lr=0.5), model)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
    return [model]


for _when in ("before", "after"):

    def _hooks(env, when=_when):
        model = network()
        counts = torch.zeros(3, dtype=torch.float64)
        optimizer = sgd(model)

        def before(optimizer, args, kwargs):
            counts[0] += 1
            counts[2] += sum(p.grad.sum() for p in model.parameters()).item()  # of the mean

        def after(optimizer, args, kwargs):
            counts[1] += 1

        def register():
            optimizer.register_step_pre_hook(before)
            optimizer.register_step_post_hook(after)

        if when == "before":
            register()
        optimizer = env.wrap(optimizer, model)
        if when == "after":
            register()
        optimizer.load_state_dict(optimizer.state_dict())
        for step in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, env, step).backward()
            optimizer.step()
        assert counts[:2].tolist() == [STEPS, STEPS]
        return [model, counts]

    loop("torch.optim", f"step hooks registered {_when} wrap()")(_hooks)


@loop("torch.optim", "several step() after one backward()")
def two_steps(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
        optimizer.step()
    return [model]


# torch.optim.lr_scheduler

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.5**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.7),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.5)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "swa_utils.SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}
for _name, _scheduler in SCHEDULERS.items():

    def _scheduled(env, make=_scheduler):
        ends = []
        for when in ("before", "after"):
            model = network()
            optimizer = sgd(model)
            scheduler = make(optimizer) if when == "before" else None
            optimizer = env.wrap(optimizer, model)
            scheduler = scheduler or make(optimizer)
            for step in range(STEPS):
                optimizer.zero_grad()
                loss = loss_of(model, env, step)
                loss.backward()
                optimizer.step()
                is_plateau = isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)
                scheduler.step(*([env.mean(loss, "metric")] if is_plateau else []))
            ends += [model, torch.tensor([optimizer.param_groups[0]["lr"]])]
        return ends

    loop(
        "lr_scheduler",
        f"{_name}, made before or after wrap()",
        'step(metric): the same metric on all ranks, `world.all_reduce(loss.detach(), "mean", "metric")`'
        if _name == "ReduceLROnPlateau"
        else "",
    )(_scheduled)


# torch.amp


def scaled(env, clip=False, accumulate=1, bad_step=None):
    model = network()
    optimizer = env.wrap(sgd(model), model, accum_steps=accumulate)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            huge = float("inf") if step == bad_step and env.rank == env.size - 1 else 1.0
            scaler.scale(loss_of(model, env, 10 * step + part) / accumulate * huge).backward()
        if clip:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    return [model, torch.tensor([scaler.get_scale()])]


loop("torch.amp", "scaler.scale(loss).backward(); scaler.step(optimizer); scaler.update()")(scaled)
loop("torch.amp", "scaler.unscale_(optimizer); clip_grad_norm_()")(functools.partial(scaled, clip=True))
loop("torch.amp", "scaler, a loss that overflows on one rank")(functools.partial(scaled, bad_step=2))
loop("torch.amp", "scaler, clipping and accumulation", "`wrap(..., accum_steps=k)`")(
    functools.partial(scaled, clip=True, accumulate=3, bad_step=2)
)


@loop("torch.amp", "one scaler, two optimizers")
def two_scaled(env):
    models = [network(0), network(1)]
    optimizers = [env.wrap(sgd(model), model) for model in models]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        x, y = batch(env, step)
        outputs = [model(x) for model in models]
        losses = [F.cross_entropy(outputs[i] + outputs[1 - i].square(), y) for i in range(2)]
        scaler.scale(losses[0]).backward(retain_graph=True)
        scaler.scale(losses[1]).backward()
        scaler.unscale_(optimizers[0])
        for optimizer in optimizers:
            scaler.step(optimizer)
        scaler.update()
    return models


@loop("torch.amp", "autocast()", tolerance=1e-2)
def autocast(env):
    model = network().float()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(x.float()), y)
        loss.backward()
        optimizer.step()
    return [model]


# torch.nn.utils


def changed(call, note=""):
    def add(change):
        loop("torch.nn.utils", call, note)(functools.partial(plain, make=sgd, after_backward=change))
        return change

    return add


@changed("clip_grad_norm_()")
def clip_norm(model, optimizer):
    assert nn.utils.clip_grad_norm_(model.parameters(), 0.05) > 0.05


@changed("clip_grad_value_()")
def clip_value(model, optimizer):
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


@changed("get_total_norm(), clip_grads_with_norm_()")
def clip_by_norm(model, optimizer):
    norm = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    nn.utils.clip_grads_with_norm_(model.parameters(), 0.05, norm)


@changed("parameters_to_vector(), vector_to_parameters()")
def vectors(model, optimizer):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.99, model.parameters())


SEEDED = threading.Lock()  # ranks that are threads share torch's generator
PARAMETRIZATIONS = {
    "parametrizations.weight_norm": parametrizations.weight_norm,
    "parametrizations.spectral_norm": parametrizations.spectral_norm,
    "parametrizations.orthogonal": parametrizations.orthogonal,
    "prune.l1_unstructured": lambda layer: prune.l1_unstructured(layer, "weight", 0.3),
}
for _name, _change in PARAMETRIZATIONS.items():

    def _parametrized(env, change=_change):
        with SEEDED:
            model = network()
            torch.manual_seed(0)
            change(model[0])
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name.endswith(("_u", "_v")):
                    buffer.copy_(F.normalize(torch.ones_like(buffer), dim=0))
        return plain(env, sgd, model=model)

    loop("torch.nn.utils", f"{_name}()")(_parametrized)


@loop("torch.nn.utils", "parametrize, stateless: torch.func.functional_call()")
def functional(env):
    class Symmetric(nn.Module):
        def forward(self, weight):
            return weight.triu() + weight.triu(1).T

    model = filled(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 3)).double())
    parametrize.register_parametrization(model[0], "weight", Symmetric())
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), y).backward()
        optimizer.step()
    return [model]


# Gradients changed by hand


def by_hand(call):
    def add(change):
        loop("gradients by hand", call)(functools.partial(plain, make=sgd, after_backward=change))
        return change

    return add


@by_hand("p.grad.add_(noise)")
def noise(model, optimizer):
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.grad.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.01)


@by_hand("p.grad.mul_(mask)")
def mask(model, optimizer):
    model[0].weight.grad[:, :3].mul_(0)


@by_hand("p.grad = p.grad.sign()")
def signs(model, optimizer):
    for parameter in model.parameters():
        parameter.grad = parameter.grad.sign() * 0.01


@by_hand("p.grad = None")
def dropped(model, optimizer):
    model[0].bias.grad = None


@loop("gradients by hand", "p.grad = torch.autograd.grad(loss, p)")
def own_gradients(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        gradients = torch.autograd.grad(loss_of(model, env, step), list(model.parameters()))
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        env.synchronize(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop("gradients by hand", "p.register_hook() before wrap()")
def tensor_hooks(env):
    model = network()
    model[0].weight.register_hook(lambda gradient: gradient * 0.5)
    return plain(env, sgd, model=model)


# Loops


@loop("loops", "accumulation, declared", "`wrap(..., accum_steps=k)`: one average a step")
def accumulation(env, clip=True, parts=3):
    model = network()
    optimizer = env.wrap(sgd(model), model, accum_steps=3)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(parts):
            (loss_of(model, env, 10 * step + part) / parts).backward()
        if parts < 3:
            env.synchronize(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


loop(
    "loops", "fewer backward passes than accum_steps", "`optimizer.synchronize()` before clipping; `step()` does it too"
)(functools.partial(accumulation, parts=2))


@loop("loops", "accumulation, not declared", "right, but each pass averages: prefer `accum_steps`")
def undeclared(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(3):
            (loss_of(model, env, 10 * step + part) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop("loops", "several losses, backward(retain_graph=True)")
def several_losses(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        output = model(x)
        F.cross_entropy(output, y).backward(retain_graph=True)
        output.square().mean().backward()
        optimizer.step()
    return [model]


@loop("loops", "a rank without a batch", "`optimizer.step()` all the same: what it did not compute counts as zero")
def empty_rank(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        if env.rank == 0:
            x, y = data(step)
            (F.cross_entropy(model(x), y) * env.size).backward()
        env.synchronize(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop(
    "loops",
    "if not loss.isfinite(): continue",
    'decide together: `world.all_reduce(loss.isfinite().float(), "min", "finite")`',
)
def nan_batch(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, env, step)
        if step == 2 and env.rank == env.size - 1:
            loss = loss * float("nan")
        finite = loss.isfinite().double()
        if isinstance(env, Ranks):
            finite = env.world.all_reduce(finite, "min", "finite")
        if not finite:
            continue
        loss.backward()
        optimizer.step()
    return [model]


@loop("loops", "if not norm.isfinite(): continue (after backward())", "all ranks see the same mean, and agree")
def nan_gradient(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, env, step)
        (loss * (float("nan") if step == 2 and env.rank == env.size - 1 else 1.0)).backward()
        if nn.utils.clip_grad_norm_(model.parameters(), 0.1).isfinite():
            optimizer.step()
    return [model]


@loop("loops", "GAN as in PyTorch's DCGAN tutorial: netD.zero_grad(), two backward() for D, one through D for G")
def dcgan(env):
    generator, critic = network(1), network(2)
    generator, critic = (
        nn.Sequential(generator, nn.Linear(3, 6).double()),
        nn.Sequential(critic, nn.Linear(3, 1).double()),
    )
    filled(generator, 1)
    filled(critic, 2)
    of_d = env.wrap(torch.optim.Adam(critic.parameters(), lr=0.01, betas=(0.5, 0.999)), critic)
    of_g = env.wrap(torch.optim.Adam(generator.parameters(), lr=0.01, betas=(0.5, 0.999)), generator)
    for step in range(STEPS):
        real, noise = batch(env, step)[0], batch(env, 100 + step)[0]
        critic.zero_grad()
        F.binary_cross_entropy_with_logits(critic(real), torch.ones(len(real), 1).double()).backward()
        fake = generator(noise)
        F.binary_cross_entropy_with_logits(critic(fake.detach()), torch.zeros(len(real), 1).double()).backward()
        of_d.step()
        generator.zero_grad()
        F.binary_cross_entropy_with_logits(critic(fake), torch.ones(len(real), 1).double()).backward()
        of_g.step()
    return [generator, critic]


@loop("loops", "gradient penalty (WGAN-GP): autograd.grad(create_graph=True)")
def penalty(env):
    model = filled(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double())
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = batch(env, step)[0].requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (model(x).mean() + (gradient.norm(dim=1) - 1).square().mean()).backward()
        optimizer.step()
    return [model]


@loop("loops", "backward(create_graph=True)")
def higher_order(env):
    model = network()
    optimizer = env.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(3):
        optimizer.zero_grad()
        loss = loss_of(model, env, step)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of the cycle that zero_grad() breaks
            loss.backward(create_graph=True)
        optimizer.step()
        optimizer.zero_grad()
    return [model]


@loop("loops", "actor and critic: two optimizers, one model, one loss")
def actor_critic(env):
    body, actor, critic = nn.Linear(6, 8), nn.Linear(8, 3), nn.Linear(8, 1)
    model = filled(nn.ModuleList([body, actor, critic]).double())
    first = env.wrap(torch.optim.Adam([*body.parameters(), *actor.parameters()], lr=0.01), model)
    second = env.wrap(torch.optim.Adam(critic.parameters(), lr=0.02), model)
    for step in range(STEPS):
        x, y = batch(env, step)
        features = body(x).tanh()
        first.zero_grad()
        second.zero_grad()
        (F.cross_entropy(actor(features), y) + critic(features).square().mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        first.step()
        second.step()
    return [model]


@loop("loops", "optimizers that take turns, modules with equal layer names")
def turns(env):
    models = [network(0), network(1)]
    optimizers = [env.wrap(sgd(model), model) for model in models]
    for step in range(STEPS):
        optimizer, model = optimizers[step % 2], models[step % 2]
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
    return models


@loop("loops", "saliency: backward() for the input's gradient, then zero_grad()")
def saliency(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        x, y = batch(env, step)
        x.requires_grad_()
        model(x).max(1).values.sum().backward()
        assert x.grad is not None
        optimizer.zero_grad()
        F.cross_entropy(model(x.detach()), y).backward()
        optimizer.step()
    return [model]


@loop("loops", "adversarial examples (FGSM): autograd.grad for the input")
def adversarial(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        x, y = batch(env, step)
        x.requires_grad_()
        (direction,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
        optimizer.zero_grad()
        F.cross_entropy(model(x.detach() + 0.1 * direction.sign()), y).backward()
        optimizer.step()
    return [model]


@loop("loops", "gradual unfreezing: p.requires_grad_(True) while training")
def unfreeze(env):
    model = network()
    model[0].requires_grad_(False)
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS + 3):
        if step in (2, 6):
            model[0].requires_grad_(True)
            model[2].requires_grad_(step == 6)
        if step == 4:
            model[0].requires_grad_(False)
            model[2].requires_grad_(True)
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop("loops", "gradual unfreezing: add_param_group() of what was left out")
def unfreeze_group(env):
    model = network()
    model[0].requires_grad_(False)
    optimizer = env.wrap(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01), model)
    for step in range(STEPS):
        if step == 2:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.02})
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.first, self.shared, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.reentrant = reentrant

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=self.reentrant)
        for _ in range(2):
            x = checkpoint(lambda x: self.shared(x).tanh(), x, use_reentrant=self.reentrant)
        return self.last(x)


for _reentrant in (False, True):

    def _checkpointed(env, reentrant=_reentrant):
        model = filled(Checkpointed(reentrant).double())
        optimizer = env.wrap(sgd(model), model, accum_steps=2)
        for step in range(STEPS):
            optimizer.zero_grad()
            for part in range(2):
                x, y = batch(env, 10 * step + part)
                (F.cross_entropy(model(x.requires_grad_()), y) / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
        return [model]

    loop("loops", f"torch.utils.checkpoint(use_reentrant={_reentrant})")(_checkpointed)


@loop("loops", "swa_utils.AveragedModel, update_bn()", "update_bn runs on this rank's data: give all ranks the same")
def averaged_model(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.9))
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
        average.update_parameters(model)
    swa_utils.update_bn([data(0)[0]], average)
    return [model, average]


@loop("loops", 'for group in optimizer.param_groups: group["lr"] = ...')
def rate_by_hand(env):
    model = network()
    optimizer = sgd(model)
    groups = optimizer.param_groups
    optimizer = env.wrap(optimizer, model)
    if isinstance(env, Ranks):
        env.world.broadcast_state(model, optimizer)
    for step in range(STEPS):
        for group in groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
    return [model]


@loop("loops", "complex parameters")
def complex_weights(env):
    model = filled(nn.Linear(6, 3, dtype=torch.complex128))
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(model(x.to(torch.complex128)).abs(), y).backward()
        optimizer.step()
    return [model]


def tensors_of(results):
    return [
        tensor.detach() for item in results for tensor in (item.parameters() if isinstance(item, nn.Module) else [item])
    ]


def difference(ours, theirs):
    """Return the largest difference, relative to the largest value."""
    pairs = zip(tensors_of(ours), tensors_of(theirs), strict=True)
    return max((a - b).abs().max().item() / max(1.0, b.abs().max().item()) for a, b in pairs)


def table():
    """Return the loops as the lines of a Markdown table."""
    head = ["| | written as | on N ranks |", "|---|---|---|"]
    return "\n".join([*head, *(f"| {item.group} | `{item.call}` | {item.note or 'as it is'} |" for item in LOOPS)])
