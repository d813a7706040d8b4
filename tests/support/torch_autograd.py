"""Loops that call what torch documents of autograd, checkpoints and torch.func: more of `torch_calls.py`."""

import contextlib
import functools
import warnings

import torch
import torch.nn.functional as F
from loops import SEEDED, STEPS, batch, data, filled, loss_of, network, sgd
from torch import nn
from torch.autograd import graph
from torch.utils import checkpoint as checkpoints
from torch_calls import proves


def under(context):
    """Return a loop whose forward and backward passes run in a context."""

    def run(env):
        model = network()
        optimizer = env.wrap(sgd(model), model)
        for step in range(STEPS):
            optimizer.zero_grad()
            # Some are of the whole process, whose ranks may be threads: one of them is in it.
            with context() if env.rank == 0 else contextlib.nullcontext():
                loss_of(model, env, step).backward()
            optimizer.step()
        return [model]

    return run


@contextlib.contextmanager
def _anomaly():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is slow
        with torch.autograd.detect_anomaly():
            yield


@contextlib.contextmanager
def _anomaly_set():
    torch.autograd.set_detect_anomaly(True)
    try:
        yield
    finally:
        torch.autograd.set_detect_anomaly(False)


CONTEXTS = {
    "autograd.detect_anomaly": _anomaly,
    "autograd.set_detect_anomaly": _anomaly_set,
    "autograd.set_grad_enabled": lambda: torch.autograd.set_grad_enabled(True),
    "autograd.enable_grad": torch.autograd.enable_grad,
    "autograd.set_multithreading_enabled": lambda: torch.autograd.set_multithreading_enabled(False),
    "graph.save_on_cpu": graph.save_on_cpu,
    "graph.saved_tensors_hooks": lambda: graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
    "graph.allow_mutation_on_saved_tensors": graph.allow_mutation_on_saved_tensors,
}
for _name, _context in CONTEXTS.items():
    proves(_name)(under(_context))


@proves("autograd.backward", "autograd.grad", "autograd.no_grad", "autograd.inference_mode")
def several_roots(env):
    """One call for two losses, weights that are set without a gradient, an evaluation between."""
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        output = model(x)
        torch.autograd.backward([F.cross_entropy(output, y), output.square().mean()])
        optimizer.step()
        with torch.no_grad():
            model[0].weight.clamp_(-1, 1)
        with torch.inference_mode():
            model(x)
    return [model]


@proves("graph.register_multi_grad_hook", "graph.get_gradient_edge", "graph.GradientEdge", "graph.Node")
def hooks_of_many(env):
    """A hook that runs when all gradients of a pass are there, and a backward pass from an edge of the graph."""
    model, calls = network(), []
    optimizer = env.wrap(sgd(model), model)
    handle = graph.register_multi_grad_hook([*model.parameters()], calls.append)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, env, step)
        edge = graph.get_gradient_edge(loss)
        torch.autograd.backward(edge, torch.ones_like(loss))
        optimizer.step()
    handle.remove()
    assert len(calls) == STEPS
    return [model]


@proves("checkpoint.checkpoint_sequential", "checkpoint.set_checkpoint_early_stop")
def in_segments(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        with checkpoints.set_checkpoint_early_stop(step % 2 == 0):
            output = checkpoints.checkpoint_sequential(model, 2, x, use_reentrant=False)
            F.cross_entropy(output, y).backward()
        optimizer.step()
    return [model]


@proves("checkpoint.create_selective_checkpoint_contexts", "checkpoint.CheckpointPolicy")
def selective(env):
    kept = functools.partial(checkpoints.create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default])
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(checkpoints.checkpoint(model, x, use_reentrant=False, context_fn=kept), y).backward()
        optimizer.step()
    return [model]


# torch.func


def by_function(gradients_of):
    """Return a loop that sets `.grad` to what a function of parameters, model and batch returns."""

    def run(env):
        model = network()
        optimizer = env.wrap(sgd(model), model)
        for step in range(STEPS):
            optimizer.zero_grad()
            parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
            gradients = gradients_of(model, parameters, batch(env, step))
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].contiguous()
            optimizer.step()
        return [model]

    return run


def quietly(call):
    """Run one rank at a time (levels of forward differentiation are the process's), without torch's own warnings."""

    def quiet(*arguments):
        with SEEDED, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return call(*arguments)

    return quiet


def _loss(model, parameters, x, y):
    return F.cross_entropy(torch.func.functional_call(model, parameters, (x,)), y)


@proves("func.grad")
@by_function
def functional(model, parameters, xy):
    return torch.func.grad(lambda p: _loss(model, p, *xy))(parameters)


@proves("func.grad_and_value")
@by_function
def with_value(model, parameters, xy):
    return torch.func.grad_and_value(lambda p: _loss(model, p, *xy))(parameters)[0]


@proves("func.vjp")
@by_function
def pulled_back(model, parameters, xy):
    loss, pull = torch.func.vjp(lambda p: _loss(model, p, *xy), parameters)
    return pull(torch.ones_like(loss))[0]


@proves("func.jacrev")
@by_function
def by_jacobian(model, parameters, xy):
    return torch.func.jacrev(lambda p: _loss(model, p, *xy))(parameters)


@proves("func.jacfwd")
@by_function
@quietly
def by_forward_jacobian(model, parameters, xy):
    return torch.func.jacfwd(lambda p: _loss(model, p, *xy))(parameters)


@proves("func.vmap")
@by_function
def clipped_by_sample(model, parameters, xy):
    """Gradients of each sample, clipped, as differential privacy wants them (arXiv:1607.00133)."""
    one = torch.func.grad(lambda p, x, y: _loss(model, p, x[None], y[None]))
    gradients = torch.func.vmap(one, (None, 0, 0))(parameters, *xy)
    norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
    scale = (0.1 / norms).clamp(max=1)
    return {name: torch.einsum("n,n...->...", scale, g) / len(scale) for name, g in gradients.items()}


@proves("func.jvp")
@by_function
@quietly
def forward_gradient(model, parameters, xy):
    """The gradient along one direction, without a backward pass (arXiv:2202.08587)."""
    generator = torch.Generator().manual_seed(0)
    along = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in parameters.items()}
    _, slope = torch.func.jvp(lambda p: _loss(model, p, *xy), (parameters,), (along,))
    return {name: direction * slope for name, direction in along.items()}


@proves("func.stack_module_state")
def ensemble(env):
    models = [network(seed) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    optimizer = env.wrap(torch.optim.SGD(parameters.values(), lr=0.1), nn.ParameterList(parameters.values()))
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)

        def one(p, b, x=x):
            return torch.func.functional_call(models[0], (p, b), (x,))

        outputs = torch.func.vmap(one)(parameters, buffers)
        sum(F.cross_entropy(output, y) for output in outputs).backward()
        optimizer.step()
    return [*parameters.values()]


@proves("func.functional_call")
def maml(env):
    """A step inside a step (arXiv:1703.03400)."""
    model = filled(nn.Sequential(nn.Linear(6, 3)).double())
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        support = data(100)
        own = dict(model.named_parameters())
        gradients = torch.autograd.grad(
            F.cross_entropy(model(support[0]), support[1]), [*own.values()], create_graph=True
        )
        fast = {name: p - 0.1 * g for (name, p), g in zip(own.items(), gradients, strict=True)}
        F.cross_entropy(torch.func.functional_call(model, fast, (x,)), y).backward()
        optimizer.step()
    return [model]
