"""Loops that call what torch documents and `loops.py` does not show; `torch_names.py` says which names each proves.

As there: a function of an environment returns what must be alike on one process and on N ranks.
"""

import copy
import warnings

import torch
import torch.nn.functional as F
from loops import STEPS, batch, data, filled, loss_of, network, plain, sgd
from torch import nn
from torch.nn.utils import rnn
from torch.optim import lr_scheduler, swa_utils
from torch.optim import optimizer as of_optimizers

PROOFS = {}
"""Loop by the names that it calls."""
TOLERANCES = {}
"""Of loops that compute in other types than fp64."""


def proves(*names, tolerance=1e-10):
    def add(run):
        PROOFS.update(dict.fromkeys(names, run))
        TOLERANCES[run] = tolerance
        return run

    return add


def trained(env, model, optimizer, steps=STEPS, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
    return [model]


# Optimizers


@proves(
    "Optimizer.register_state_dict_pre_hook",
    "Optimizer.register_state_dict_post_hook",
    "Optimizer.register_load_state_dict_pre_hook",
    "Optimizer.register_load_state_dict_post_hook",
    "Optimizer.load_state_dict",
    "Optimizer.state_dict",
)
def state_hooks(env):
    """Hooks that count, and two that change what they are given, registered before and after `wrap`."""
    model = network()
    optimizer, counts = sgd(model), torch.zeros(4)

    def count(place):
        def hook(*arguments):
            counts[place] += 1

        return hook

    def register():
        optimizer.register_state_dict_pre_hook(count(0))
        optimizer.register_state_dict_post_hook(count(1))
        optimizer.register_load_state_dict_pre_hook(count(2))
        optimizer.register_load_state_dict_post_hook(count(3))

    def halved(optimizer, state):
        state = copy.deepcopy(state)
        state["param_groups"][0]["lr"] /= 2
        return state

    register()
    optimizer = env.wrap(optimizer, model)
    register()
    optimizer.register_state_dict_post_hook(halved)
    optimizer.register_load_state_dict_pre_hook(halved)
    trained(env, model, optimizer, 2)
    optimizer.load_state_dict(optimizer.state_dict())
    assert counts.tolist() == [2.0] * 4
    assert optimizer.param_groups[0]["lr"] == 0.025
    return trained(env, model, optimizer, 2, first=2)


@proves("optimizer.register_optimizer_step_pre_hook", "optimizer.register_optimizer_step_post_hook")
def hooks_of_all_optimizers(env):
    model = network()
    optimizer, seen = env.wrap(sgd(model), model), []

    def hook(of, args, kwargs):
        if of is optimizer:
            seen.append(model[0].weight.grad.detach().clone())

    handles = [
        of_optimizers.register_optimizer_step_pre_hook(hook),
        of_optimizers.register_optimizer_step_post_hook(hook),
    ]
    try:
        trained(env, model, optimizer)
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == 2 * STEPS
    return [model, *seen]  # both see the mean


@proves("Optimizer.step", "Optimizer.zero_grad", "Optimizer.add_param_group", "optim.Optimizer")
def own_optimizer(env):
    """One of a user's own, as the documentation has it."""

    class Signs(torch.optim.Optimizer):
        def __init__(self, params, lr):
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        parameter.sub_(parameter.grad.sign() * group["lr"])

    model = network()
    optimizer = env.wrap(Signs(model[2].parameters(), 0.01), model)
    optimizer.add_param_group({"params": model[0].parameters(), "lr": 0.02})
    return trained(env, model, optimizer)


@proves("optim.swap_in_optimizer_params_and_state")
def swapped(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 2)
    other = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    state = copy.deepcopy(optimizer.state_dict())
    x, y = batch(env, 2)
    gradients = torch.autograd.grad(F.cross_entropy(model(x), y), [*model.parameters()])
    for parameter, gradient in zip(other.values(), gradients, strict=True):
        parameter.grad = gradient
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, other, state):
        optimizer.step()
    return [*trained(env, model, optimizer, 2, first=2), *other.values()]


# Schedulers, averages of weights


@proves(
    "LRScheduler.step",
    "LRScheduler.get_last_lr",
    "LRScheduler.get_lr",
    "LRScheduler.state_dict",
    "LRScheduler.load_state_dict",
    "lr_scheduler.LRScheduler",
)
def own_scheduler(env):
    class Halves(lr_scheduler.LRScheduler):
        def get_lr(self):
            return [rate * 0.5**self.last_epoch for rate in self.base_lrs]

    model, rates = network(), []
    optimizer = env.wrap(sgd(model), model)
    scheduler = Halves(optimizer)
    for step in range(STEPS):
        if step == 3:
            states = copy.deepcopy((optimizer.state_dict(), scheduler.state_dict()))
            optimizer = env.wrap(sgd(model), model)
            scheduler = Halves(optimizer)
            optimizer.load_state_dict(states[0])
            scheduler.load_state_dict(states[1])
        trained(env, model, optimizer, 1, first=step)
        scheduler.step()
        rates += scheduler.get_last_lr()
    assert rates == [0.05, 0.025, 0.0125, 0.00625, 0.003125]
    return [model]


def _averaged(make):
    def run(env):
        model = network()
        average = swa_utils.AveragedModel(model, **make())
        optimizer = env.wrap(sgd(model), model)
        for step in range(STEPS):
            trained(env, model, optimizer, 1, first=step)
            average.update_parameters(model)
        return [model, average]

    return run


proves("swa_utils.get_ema_avg_fn")(_averaged(lambda: {"avg_fn": swa_utils.get_ema_avg_fn(0.9)}))
proves("swa_utils.get_swa_avg_fn")(_averaged(lambda: {"avg_fn": swa_utils.get_swa_avg_fn()}))
proves("swa_utils.get_swa_multi_avg_fn")(_averaged(lambda: {"multi_avg_fn": swa_utils.get_swa_multi_avg_fn()}))


# torch.amp


@proves(
    *(f"GradScaler.{name}" for name in ("get_scale", "get_growth_factor", "get_backoff_factor", "get_growth_interval")),
    *(f"GradScaler.{name}" for name in ("set_growth_factor", "set_backoff_factor", "set_growth_interval")),
    *(f"GradScaler.{name}" for name in ("state_dict", "load_state_dict", "is_enabled", "unscale_", "update")),
)
def scaler_settings(env):
    """A scale that grows, falls, is set by hand and is loaded."""
    model, scales = network(), []
    optimizer = env.wrap(sgd(model), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scaler.set_growth_factor(scaler.get_growth_factor() * 2)
    scaler.set_backoff_factor(scaler.get_backoff_factor() / 2)
    for step in range(6):
        if step == 4:
            state, scaler = scaler.state_dict(), torch.amp.GradScaler("cpu")
            scaler.load_state_dict(state)
            scaler.set_growth_interval(scaler.get_growth_interval() + 1)
        optimizer.zero_grad()
        bad = float("inf") if step == 2 and env.rank == 0 else 1.0
        scaler.scale(loss_of(model, env, step) * bad).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update(16.0 if step == 3 else None)
        scales.append(scaler.get_scale())
    assert scaler.is_enabled()
    return [model, torch.tensor(scales)]


@proves("amp.custom_fwd", "amp.custom_bwd", "autograd.Function")
def own_function(env):
    class Product(torch.autograd.Function):
        @staticmethod
        @torch.amp.custom_fwd(device_type="cpu")
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x @ weight.T

        @staticmethod
        @torch.amp.custom_bwd(device_type="cpu")
        def backward(ctx, gradient):
            x, weight = ctx.saved_tensors
            return gradient @ weight, gradient.T @ x

    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(model[2](Product.apply(x, model[0].weight).tanh()), y).backward()
        optimizer.step()
    return [model]


# torch.nn.utils


@proves("utils.clip_grad_norm")
def old_clip(env):
    def clip(model, optimizer):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.clip_grad_norm(model.parameters(), 0.05)

    return plain(env, sgd, after_backward=clip)


@proves("utils.weight_norm", "utils.remove_weight_norm")
def old_weight_norm(env):
    model = network()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(model[0])
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 3)
    nn.utils.remove_weight_norm(model[0])  # the weight is a new parameter, which the optimizer does not know
    optimizer.add_param_group({"params": [model[0].weight]})
    return trained(env, model, optimizer, 2, first=3)


@proves("utils.spectral_norm", "utils.remove_spectral_norm")
def old_spectral_norm(env):
    model = network()
    nn.utils.spectral_norm(model[0])
    with torch.no_grad():
        for name in ("weight_u", "weight_v"):
            buffer = getattr(model[0], name)
            buffer.copy_(F.normalize(torch.ones_like(buffer), dim=0))
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 3)
    nn.utils.remove_spectral_norm(model[0])
    return trained(env, model, optimizer, 2, first=3)


@proves("utils.skip_init")
def skipped_init(env):
    layer = nn.utils.skip_init(nn.Linear, 6, 3, dtype=torch.float64)
    return plain(env, sgd, model=filled(nn.Sequential(layer)))


def _convolved(dims, convert):
    def run(env):
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        layers = [nn.Unflatten(1, (1, *([1] * (dims - 2)), 2, 3)), kind(1, 4, 1), nn.Flatten(), nn.Linear(24, 3)]
        model = filled(nn.Sequential(*layers).double())
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
        return plain(env, sgd, model=convert(model, layout))

    return run


proves("utils.convert_conv2d_weight_memory_format")(_convolved(2, nn.utils.convert_conv2d_weight_memory_format))
proves("utils.convert_conv3d_weight_memory_format")(_convolved(3, nn.utils.convert_conv3d_weight_memory_format))


@proves(*(f"rnn.{name}" for name in ("pack_padded_sequence", "pad_packed_sequence", "pad_sequence", "unpad_sequence")))
@proves("rnn.pack_sequence", "rnn.unpack_sequence", "rnn.PackedSequence")
def sequences(env):
    model = filled(nn.ModuleList([nn.GRU(2, 4, batch_first=True), nn.Linear(4, 3)]).double())
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        lengths = (data(step)[1] + 1).clone()
        rows = [row[:n] for row, n in zip(x.view(-1, 3, 2), env.share(lengths), strict=True)]
        packed = rnn.pack_sequence(rows, enforce_sorted=False)
        padded = rnn.pad_sequence(rnn.unpack_sequence(packed), batch_first=True)
        packed = rnn.pack_padded_sequence(padded, env.share(lengths), batch_first=True, enforce_sorted=False)
        output, lengths = rnn.pad_packed_sequence(model[0](packed)[0], batch_first=True)
        last = torch.stack([row[-1] for row in rnn.unpad_sequence(output, lengths, batch_first=True)])
        F.cross_entropy(model[1](last), y).backward()
        optimizer.step()
    return [model]
