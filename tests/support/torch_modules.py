"""Loops that call what torch documents of modules, parametrizations and autograd: more of `torch_calls.py`."""

import operator

import torch
import torch.nn.functional as F
from loops import SEEDED, STEPS, batch, data, filled, network, sgd
from torch import nn
from torch.nn.modules import module as of_modules
from torch.nn.utils import parametrize, prune
from torch_calls import proves, trained


class Half(nn.Module):
    def forward(self, weight):
        return weight * 0.5

    def right_inverse(self, weight):
        return weight * 2


@proves(
    *(f"parametrize.{name}" for name in ("register_parametrization", "remove_parametrizations", "is_parametrized")),
    *(f"parametrize.{name}" for name in ("ParametrizationList", "type_before_parametrizations")),
    "parametrize.transfer_parametrizations_and_params",
)
def parametrized_midway(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 2)
    parametrize.register_parametrization(model[0], "weight", Half())
    trained(env, model, optimizer, 2, first=2)
    assert parametrize.is_parametrized(model[0])
    other = parametrize.type_before_parametrizations(model[0])(6, 8).double()
    parametrize.transfer_parametrizations_and_params(model[0], other)
    parametrize.remove_parametrizations(model[0], "weight")
    return [*trained(env, model, optimizer, 2, first=4), other.weight]


def _pruned(change):
    def run(env):
        model = network()
        optimizer = env.wrap(sgd(model), model)
        trained(env, model, optimizer, 2)
        with SEEDED:
            torch.manual_seed(0)
            change(model)
        assert prune.is_pruned(model)
        trained(env, model, optimizer, 2, first=2)
        prune.remove(model[0], "weight")
        return [*trained(env, model, optimizer, 2, first=4), *model.buffers()]

    return run


PRUNING = {
    "identity": lambda model: prune.identity(model[0], "weight"),
    "l1_unstructured": lambda model: prune.l1_unstructured(model[0], "weight", 0.3),
    "random_unstructured": lambda model: prune.random_unstructured(model[0], "weight", 0.3),
    "ln_structured": lambda model: prune.ln_structured(model[0], "weight", 2, n=2, dim=0),
    "random_structured": lambda model: prune.random_structured(model[0], "weight", 2, dim=0),
    "custom_from_mask": lambda model: prune.custom_from_mask(model[0], "weight", torch.eye(8, 6)),
    "global_unstructured": lambda model: prune.global_unstructured(
        [(model[0], "weight"), (model[2], "weight")], prune.L1Unstructured, amount=0.3
    ),
    "remove": lambda model: prune.l1_unstructured(model[0], "weight", 2),
    "is_pruned": lambda model: [prune.l1_unstructured(model[0], "weight", 2) for _ in range(2)],
}
for _name, _change in PRUNING.items():
    proves(f"prune.{_name}")(_pruned(_change))


# Modules, changed and converted after wrapping


def _converted(change, dtype=torch.float64, momentum=0.9):
    def run(env):
        model = network().to(dtype)
        optimizer = env.wrap(sgd(model, momentum=momentum), model)
        trained_in(env, model, optimizer, 2)
        change(model)
        return trained_in(env, model, optimizer, 3)

    return run


def trained_in(env, model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(model(x.to(model[0].weight.dtype)).double(), y).backward()
        optimizer.step()
    return [model]


CONVERSIONS = {
    "double": lambda model: model.double(),
    "type": lambda model: model.type(torch.float64),
    "to": lambda model: model.to(torch.float64),
}
for _name, _change in CONVERSIONS.items():
    # Momentum would be of the old type, for torch's optimizers too.
    proves(f"Module.{_name}", tolerance=1e-6)(_converted(_change, torch.float32, momentum=0))
for _name in ("float", "half", "bfloat16"):
    _tolerance = 1e-6 if _name == "float" else 1e-2
    proves(f"Module.{_name}", tolerance=_tolerance)(_converted(operator.methodcaller(_name), momentum=0))
KEEPING = {
    "apply": lambda model: model.apply(lambda m: m.requires_grad_(True)),
    "cpu": lambda model: model.cpu(),
    "share_memory": lambda model: model.share_memory(),
    "train": lambda model: model.eval().train(),
    "eval": lambda model: model.eval(),
    "to_empty": lambda model: filled(model.to_empty(device="cpu"), 3),
    "load_state_dict": lambda model: model.load_state_dict(network(3).state_dict()),
    "state_dict": lambda model: model.load_state_dict({k: v * 0.5 for k, v in model.state_dict().items()}),
    "requires_grad_": lambda model: model[0].requires_grad_(False),
    "zero_grad": lambda model: model.zero_grad(set_to_none=False),
}
for _name, _change in KEEPING.items():
    proves(f"Module.{_name}")(_converted(_change))


@proves(*(f"Module.{name}" for name in ("add_module", "register_module", "set_submodule", "register_parameter")))
@proves("Module.register_buffer")
def grown(env):
    """A network that grows while it is trained."""
    model = network()
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 2)
    model.add_module("3", filled(nn.Linear(3, 3).double(), 1))
    model.register_module("4", filled(nn.Linear(3, 3).double(), 2))
    model[3].register_parameter("bias", nn.Parameter(torch.ones(3).double()))
    model[3].register_buffer("count", torch.zeros(1))
    optimizer.add_param_group({"params": [*model[3].parameters(), *model[4].parameters()], "lr": 0.05})
    trained(env, model, optimizer, 2, first=2)
    model.set_submodule("0", filled(nn.Linear(6, 8).double(), 5))
    optimizer.add_param_group({"params": model[0].parameters()})
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 0.1)
    return trained(env, model, optimizer, 2, first=4)


@proves(*(f"Module.register_{name}" for name in ("forward_hook", "forward_pre_hook", "full_backward_hook")))
@proves("Module.register_full_backward_pre_hook", "Module.register_backward_hook")
def module_hooks(env):
    """Hooks that change what passes: activations and their gradients."""
    model = network()
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 1.5,))
    optimizer = env.wrap(sgd(model), model)
    model[0].register_forward_hook(lambda module, args, output: output * 0.5)
    model[1].register_full_backward_pre_hook(lambda module, gradients: (gradients[0] * 2,))
    model[2].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    other = network()
    other[1].register_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
    return [*trained(env, model, optimizer), *trained(env, other, env.wrap(sgd(other), other))]


@proves(*(f"module.register_module_{name}" for name in ("forward_hook", "forward_pre_hook", "full_backward_hook")))
@proves("module.register_module_full_backward_pre_hook", "module.register_module_backward_hook")
def hooks_of_all_modules(env):
    model, seen = network(), []

    def of_this(module, *_):
        if module is model[1]:
            seen.append(model[2].weight.detach().clone())

    kinds = ("forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook")
    with SEEDED:  # for all modules of the process, whose ranks may be threads
        handles = [getattr(of_modules, f"register_module_{kind}")(of_this) for kind in kinds]
    optimizer = env.wrap(sgd(model), model)
    try:
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = batch(env, step)
            F.cross_entropy(model(x.requires_grad_()), y).backward()
            optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert len(seen) == len(kinds) * STEPS
    return [model, *seen]


@proves("Module.compile")
def compiled(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    with SEEDED:
        model.compile(backend="eager")
        model(data(0)[0])
    return trained(env, model, optimizer)


# Tensors


@proves("Tensor.register_hook", "Tensor.register_post_accumulate_grad_hook")
def gradient_hooks(env):
    """Before and after `wrap`: what they do to a rank's own gradient is averaged."""

    def halve(parameter):
        parameter.grad.mul_(0.5)

    model = network()
    model[0].weight.register_post_accumulate_grad_hook(halve)
    optimizer = env.wrap(sgd(model), model)
    model[2].weight.register_hook(lambda gradient: gradient * 0.5)
    model[2].bias.register_post_accumulate_grad_hook(halve)
    return trained(env, model, optimizer)


@proves("Tensor.retain_grad", "Tensor.requires_grad_", "Tensor.backward", "Tensor.grad")
def retained(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        output = model(x.requires_grad_())
        output.retain_grad()
        loss = F.cross_entropy(output, y)
        loss.backward(torch.tensor(0.5, dtype=torch.float64), inputs=[*model.parameters(), x])
        assert x.grad is not None
        optimizer.step()
    return [model]


if hasattr(torch.Tensor, "grad_dtype"):

    @proves("Tensor.grad_dtype", tolerance=1e-6)
    def gradients_of_another_type(env):
        """Gradients in fp32, of which some ranks have none."""
        model = network()
        for parameter in model.parameters():
            parameter.grad_dtype = torch.float32
        optimizer = env.wrap(sgd(model, foreach=False), model)
        for step in range(STEPS):
            optimizer.zero_grad()
            if env.rank == 0:
                (F.cross_entropy(model(data(step)[0]), data(step)[1]) * env.size).backward()
            env.synchronize(optimizer)
            assert model[0].weight.grad.dtype == torch.float32
            optimizer.step()
        return [model]
