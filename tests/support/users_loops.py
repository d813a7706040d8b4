"""Loops as users have brought them to forums: more of the table in `loops.py`."""

import copy
import itertools

import torch
import torch.nn.functional as F
from loops import STEPS, batch, data, filled, loop, loss_of, network, sgd
from torch import nn


def trained(env, model, optimizer, steps=STEPS, first=0):
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.step()
    return [model]


@loop("loops", "a second optimizer over the same parameters, the first one used again")
def second_optimizer(env):
    model = network()
    first = env.wrap(sgd(model), model)
    trained(env, model, first, 2)
    second = env.wrap(torch.optim.Adam(model.parameters(), lr=0.01), model)
    trained(env, model, second, 2, first=2)
    return trained(env, model, first, 2, first=4)


@loop("loops", "optimizers that share parameters, a rank without a batch")
def shared_parameters(env):
    model = network()
    optimizers = [env.wrap(sgd(model), model), env.wrap(torch.optim.Adam(model[2].parameters(), lr=0.01), model)]
    for step in range(STEPS):
        model.zero_grad()
        for optimizer in optimizers:
            optimizer.zero_grad()
        if env.rank == 0:
            x, y = data(step)
            (F.cross_entropy(model(x), y) * env.size).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [model]


class SharpnessAware(torch.optim.Optimizer):
    """Two passes a step, the second at the worst point nearby (arXiv:2010.01412)."""

    def __init__(self, params, base, **settings):
        super().__init__(params, settings)
        self.base = base(self.param_groups, **settings)
        self.param_groups = self.base.param_groups

    def gradients(self):
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def climb(self):
        norm = torch.stack([p.grad.norm() for p in self.gradients()]).norm()
        for parameter in self.gradients():
            self.state[parameter]["before"] = parameter.data.clone()
            parameter.add_(parameter.grad, alpha=float(0.05 / norm))
        self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        if closure is not None:
            self.climb()
            torch.enable_grad()(closure)()
        for parameter in self.gradients():
            parameter.data = self.state[parameter]["before"]
        self.base.step()


@loop("loops", "SAM: loss.backward(); optimizer.first_step(); loss.backward(); optimizer.second_step()")
def sharpness(env):
    model = network()
    optimizer = env.wrap(SharpnessAware(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        optimizer.climb()
        loss_of(model, env, step).backward()
        optimizer.step()
    for step in range(STEPS):

        def closure(step=step):
            loss = loss_of(model, env, step)
            loss.backward()
            return loss

        optimizer.zero_grad()
        closure()
        optimizer.step(closure)
    return [model]


class Lookahead(torch.optim.Optimizer):
    """Stands around an optimizer (arXiv:1907.08610), and as many such classes is no whole one itself."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]
        self.count = 0

    def zero_grad(self):
        self.optimizer.zero_grad()

    @torch.no_grad()
    def step(self):
        self.optimizer.step()
        self.count += 1
        fast = [p for group in self.param_groups for p in group["params"]]
        for slow, parameter in zip(self.slow, fast, strict=True) if self.count % 2 == 0 else ():
            parameter.copy_(slow.lerp_(parameter, 0.5))


@loop(
    "loops", "Lookahead(optimizer), and other classes around an optimizer", "wrap the inner one: `Lookahead(wrap(...))`"
)
def lookahead(env):
    model = network()
    return trained(env, model, Lookahead(env.wrap(sgd(model), model)))


for _when in ("before", "after"):

    def _in_backward(env, when=_when):
        model, optimizers = network(), {}

        def step(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters() if when == "before" else ():
            parameter.register_post_accumulate_grad_hook(step)
        for parameter in model.parameters():
            optimizers[parameter] = env.wrap(torch.optim.SGD([parameter], lr=0.1, momentum=0.9), model)
        for parameter in model.parameters() if when == "after" else ():
            parameter.register_post_accumulate_grad_hook(step)
        for number in range(STEPS):
            loss_of(model, env, number).backward()
        return [model]

    loop("loops", f"optimizer steps within backward(), one a parameter, hooks registered {_when} wrap()")(_in_backward)


@loop("gradients by hand", "gradients = [p.grad for p in ...], kept over zero_grad()")
def kept_gradients(env):
    model, products, before = network(), [], None
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        now = [parameter.grad for parameter in model.parameters()]
        if before is not None:
            products.append(sum((a * b).sum() for a, b in zip(now, before, strict=True)))
        before = now
        optimizer.step()
    return [model, *products]


@loop("gradients by hand", "p.grad = flat[a:b].view_as(p): one buffer for all gradients")
def flat_gradients(env):
    model = network()
    optimizer = env.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    sizes = [parameter.numel() for parameter in model.parameters()]
    flat = torch.zeros(sum(sizes), dtype=torch.float64)
    for parameter, part in zip(model.parameters(), flat.split(sizes), strict=True):
        parameter.grad = part.view_as(parameter)
    for step in range(STEPS):
        flat.zero_()
        loss_of(model, env, step).backward()
        flat.mul_(0.1 / flat.norm())
        optimizer.step()
    return [model, flat]


@loop("gradients by hand", "torch._foreach_mul_(gradients, ...) on a list made once")
def listed_gradients(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in model.parameters()]
    for step in range(STEPS):
        torch._foreach_zero_(gradients)
        loss_of(model, env, step).backward()
        torch._foreach_mul_(gradients, 0.5)
        optimizer.step()
    return [model]


@loop("gradients by hand", "with torch.no_grad(): p -= lr * p.grad; p.grad.zero_()")
def no_step(env):
    model = network()
    keep = env.wrap(sgd(model), model)
    for step in range(STEPS):
        loss_of(model, env, step).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad.zero_()
    assert keep is not None  # it averages as long as it is there
    return [model]


@loop("loops", "model.to(memory_format=torch.channels_last), model.half(), ... after wrap()")
def converted(env):
    layers = [nn.Unflatten(1, (3, 1, 2)), nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(8, 3)]
    model = filled(nn.Sequential(*layers).double())
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 2)
    model.to(memory_format=torch.channels_last)
    return trained(env, model, optimizer, 2, first=2)


@loop("loops", "p.data of another shape: a vocabulary that grows")
def resized(env):
    model = filled(nn.Linear(6, 3).double())
    optimizer = env.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    trained(env, model, optimizer, 2)
    model.weight.data = torch.cat([model.weight.data, torch.ones(1, 6).double()])
    model.bias.data = torch.cat([model.bias.data, torch.ones(1).double()])
    optimizer.zero_grad()
    return trained(env, model, optimizer, 2, first=2)


@loop("loops", "heads that only some ranks use, weights decayed")
def heads(env):
    body, parts = nn.Linear(6, 8), nn.ModuleList(nn.Linear(8, 3) for _ in range(6))
    model = filled(nn.ModuleList([body, parts]).double())
    optimizer = env.wrap(torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.3), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = (tensor.chunk(6) for tensor in data(step))
        mine = [i for i in range(5) if i % env.size == env.rank]  # nobody has the last one
        losses = [F.cross_entropy(parts[i](body(x[i]).tanh()), y[i]) for i in mine]
        (sum(losses) * env.size).backward() if losses else None
        optimizer.step()
    return [model]


@loop("loops", "weights that are tied; a parameter outside of the model")
def tied(env):
    words, last = nn.Embedding(10, 4).double(), nn.Linear(4, 10, bias=False).double()
    last.weight = filled(words).weight
    model, scale = nn.Sequential(words, nn.Tanh(), last), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = env.wrap(torch.optim.Adam([scale, *model.parameters()], lr=0.01), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        (F.cross_entropy(model((x[:, 0].abs() * 5).long() % 10), y) * torch.exp(-scale) + scale).backward()
        optimizer.step()
    return [model, scale]


@loop("loops", "copy.deepcopy(model), torch.save(model): the copy is trained on")
def copied(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    trained(env, model, optimizer, 2)
    other = copy.deepcopy(model)
    return [model, *trained(env, other, env.wrap(sgd(other), other), 2, first=2)]


@loop("loops", "CycleGAN: itertools.chain(), WGAN: weights clamped, several critic steps")
def cycle(env):
    one, two, critic = network(1), network(2), filled(nn.Linear(3, 1).double(), 3)
    chained = itertools.chain(one.parameters(), two.parameters())
    of_g = env.wrap(torch.optim.Adam(chained, lr=0.01), nn.ModuleList([one, two]))
    of_d = env.wrap(torch.optim.RMSprop(critic.parameters(), lr=0.01), critic)
    for step in range(6):
        x, _ = batch(env, step)
        of_d.zero_grad()
        (critic(one(x).detach()).mean() - critic(two(x).detach()).mean()).backward()
        of_d.step()
        for parameter in critic.parameters():
            parameter.data.clamp_(-0.1, 0.1)
        if step % 3 == 2:
            critic.requires_grad_(False)
            of_g.zero_grad()
            ((one(x) - two(x)).abs().mean() - critic(two(x)).mean()).backward()
            of_g.step()
            critic.requires_grad_(True)
    return [one, two, critic]


@loop("loops", "truncated backpropagation: hidden.detach(); backward() in two halves")
def truncated(env):
    model = filled(nn.ModuleList([nn.LSTM(2, 4, batch_first=True), nn.Linear(4, 3)]).double())
    optimizer, hidden = env.wrap(sgd(model), model), None
    for step in range(STEPS):
        x, y = batch(env, step)
        optimizer.zero_grad()
        output, hidden = model[0](x.view(-1, 3, 2), hidden)
        hidden = tuple(part.detach() for part in hidden)
        last = output[:, -1].detach().requires_grad_()
        F.cross_entropy(model[1](last), y).backward()
        output[:, -1].backward(last.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
    return [model]


@loop(
    "loops",
    "an optimizer over a part of the model, clipping",
    "clip what it has: `clip_grad_norm_(head.parameters(), 1.0)`; or freeze the rest",
)
def part_of_a_model(env):
    model = network()
    optimizer = env.wrap(sgd(model[2]), model)
    for step in range(STEPS):
        model.zero_grad()
        loss_of(model, env, step).backward()
        nn.utils.clip_grad_norm_(model[2].parameters(), 0.05)
        optimizer.step()
    return [model]


class OwnForms(torch.optim.SGD):
    """As optimizers outside of torch are: other signatures, other states."""

    def zero_grad(self):
        super().zero_grad()

    def step(self):
        super().step()

    def state_dict(self):
        return {"own": super().state_dict()}

    def load_state_dict(self, state):
        super().load_state_dict(state["own"])


@loop("loops", "optimizers from outside torch: a zero_grad() without arguments, a state_dict() of another form")
def own_forms(env):
    model = network()
    optimizer = env.wrap(OwnForms(model.parameters(), lr=0.1, momentum=0.9), model)
    for step in range(STEPS):
        trained(env, model, optimizer, 1, first=step)
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return [model]


@loop("gradients by hand", "torch.func.vmap(torch.func.grad(...)): gradients of samples, clipped one by one (DP-SGD)")
def of_samples(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(model, parameters, (x[None],)), y[None])

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    for step in range(STEPS):
        named = dict(model.named_parameters())
        each = gradients({name: p.detach() for name, p in named.items()}, *batch(env, step))
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in each.values()]).norm(dim=0)
        for name, parameter in named.items():
            parameter.grad = torch.einsum("n,n...->...", (0.5 / norms).clamp(max=1), each[name]) / len(norms)
        optimizer.step()
        optimizer.zero_grad()
    return [model]


@loop("gradients by hand", "optimizer.register_step_pre_hook(clip), before wrap()")
def clipped_in_a_hook(env):
    model = network()
    optimizer = sgd(model)
    optimizer.register_step_pre_hook(lambda *_: nn.utils.clip_grad_norm_(model.parameters(), 0.05) and None)
    return trained(env, model, env.wrap(optimizer, model))


@loop("loops", "with torch.no_grad(): wrap(), step()")
def without_gradients(env):
    model = network()
    with torch.no_grad():
        optimizer = env.wrap(sgd(model), model)
        for step in range(STEPS):
            optimizer.zero_grad()
            with torch.enable_grad():
                loss_of(model, env, step).backward()
            optimizer.step()
    return [model]


@loop("loops", "backward(inputs=...), one layer after the other")
def layer_by_layer(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, env, step)
        loss.backward(inputs=list(model[2].parameters()), retain_graph=True)
        loss.backward(inputs=list(model[0].parameters()))
        optimizer.step()
    return [model]


for _whose in ("all rows", "this rank's rows"):

    def _contrastive(env, whose=_whose):
        model, other = network(), network(1)
        both = nn.ModuleList([model, other])
        optimizer = env.wrap(sgd(both), both)
        for step in range(STEPS):
            optimizer.zero_grad()
            x, _ = batch(env, step)
            ours, theirs = model(x), other(x)
            rows = torch.arange(len(data(step)[0]))
            if whose == "all rows":  # every rank computes the whole loss
                loss = F.cross_entropy(env.gather(ours) @ env.gather(theirs).t(), rows)
            else:
                loss = F.cross_entropy(ours @ env.gather(theirs).t(), env.share(rows))
            loss.backward()
            nn.utils.clip_grad_norm_(both.parameters(), 0.5)
            optimizer.step()
        return [both]

    loop(
        "loops",
        f"a contrastive loss: {_whose} against all ranks'",
        "`world.all_gather(rows, differentiable=True)`",
    )(_contrastive)


@loop("loops", "a sum over the batch that the loss divides by", '`world.all_reduce(total, "sum", differentiable=True)`')
def statistics(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        scores = model(x)
        total = scores.square().sum()
        total = total if env.size == 1 else env.world.all_reduce(total, "sum", differentiable=True)
        F.cross_entropy(scores / total.sqrt(), y).backward()
        optimizer.step()
    return [model]


@loop(
    "loops",
    "gradient penalty through batch normalisation over all ranks",
    "`hvdtrain.world.synchronize_batch_norm(model, world)`",
)
def penalty_of_batch(env):
    model = env.normalize(
        filled(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double())
    )
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        x = x.clone().requires_grad_()
        scores = model(x)
        (slope,) = torch.autograd.grad(scores.square().sum(), x, create_graph=True)
        (F.cross_entropy(scores, y) + slope.square().sum(1).mean()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
    return [model]


class InterruptError(Exception):
    pass


@loop(
    "loops",
    "an exception in the midst of backward(), the step is left out",
    "`optimizer.synchronize()`, then `optimizer.zero_grad()`",
)
def interrupted(env):
    def interrupt(gradient):
        raise InterruptError

    model = filled(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double())
    optimizer = env.wrap(sgd(model), model, accum_steps=2)
    for step in range(STEPS):
        optimizer.zero_grad()
        try:
            for part in range(2):
                x, y = batch(env, 2 * step + part)
                hidden = model[:2](x)
                if step in (1, 2) and part == step - 1:
                    hidden.register_hook(interrupt)
                F.cross_entropy(model[2:](hidden), y).backward()
        except InterruptError:
            env.synchronize(optimizer)
            optimizer.zero_grad()
            continue
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


class Joined(nn.Module):
    """Two weights are one in the forward pass: their gradients are parts of one tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4).double(), nn.Linear(6, 3).double()
        self.head = nn.Linear(7, 3).double()

    def forward(self, x):
        return self.head(F.linear(x, torch.cat([self.first.weight, self.second.weight])).tanh())


@loop("loops", "torch.cat() of weights in forward()", "`wrap(..., accum_steps=k)`: one average a step")
def joined(env):
    model = filled(Joined())
    optimizer = env.wrap(sgd(model), model, accum_steps=2)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(2):
            (loss_of(model, env, 2 * step + part) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop("loops", "torch.__future__.set_swap_module_params_on_conversion(True), then model.to(...) after wrap()")
def swapped(env):
    model = network()
    optimizer = env.wrap(torch.optim.SGD(model.parameters(), lr=0.1), model)
    for step in range(STEPS):
        if step == 2:  # as `model.to` does, which asks a setting of the whole process
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.grad = None
                    torch.utils.swap_tensors(parameter, nn.Parameter(parameter.clone()))
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop(
    "loops",
    'optimizer.param_groups[0]["params"] = list(other.parameters())',
    "`optimizer.zero_grad()` before backward()",
)
def replaced(env):
    model = network()
    optimizer = env.wrap(sgd(model), model)
    for step in range(STEPS):
        if step == 2:
            model = network(3)
            optimizer.param_groups[0]["params"] = list(model.parameters())
        optimizer.zero_grad()
        loss_of(model, env, step).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    return [model]


@loop("torch.optim", "SparseAdam, F.embedding(..., sparse=True)")
def sparse_function(env):
    words = filled(nn.Embedding(20, 3).double())
    optimizer = env.wrap(torch.optim.SparseAdam(words.parameters(), lr=0.1), words)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(env, step)
        F.cross_entropy(F.embedding((x[:, 0].abs() * 10).long() % 20, words.weight, sparse=True), y).backward()
        optimizer.step()
    return [words]
