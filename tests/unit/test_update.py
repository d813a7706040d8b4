"""Steps that are not finite leave no trace, and a step asks the device nothing that it would have to wait for."""

import dataclasses
import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hvdtrain.data.dataset import TensorSamples
from hvdtrain.errors import DivergedError
from hvdtrain.models.private_torch import norm_of
from hvdtrain.optim.adamw import AdamWConfig
from hvdtrain.process.launch import Launch
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.log import MetricLog
from hvdtrain.settings import Config, HealthConfig, OptimConfig, TrainConfig
from hvdtrain.trainer import Task, settle, train_step
from hvdtrain.trainer import update as update_module
from hvdtrain.trainer.line import step_metrics
from hvdtrain.trainer.state import start_training
from hvdtrain.trainer.stopwatch import Stopwatch
from hvdtrain.trainer.strategy import model_tensors
from hvdtrain.world import SoloWorld

ADAMW, LOOP, SGD = OptimConfig(), AdamWConfig(kernel="loop"), OptimConfig(name="sgd")


class Said(MetricLog):
    """Keeps what was said."""

    def __init__(self):
        super().__init__(None, [])
        self.lines = []

    def say(self, line):
        self.lines.append(line)


class Device(SoloWorld):
    """A CPU that is treated as a GPU is: nobody waits for it."""

    reads_at_once = False


def start(tmp_path, optim, bad=(), most=20, world=Device, limit=1.0):
    """Begin a training of one sample a step, in order, whose samples at `bad` are not finite."""
    x = torch.arange(1.0, 9).view(8, 1)
    x[list(bad)] = math.nan
    data = TensorSamples(x, 2 * x)

    def loss(model, batch):
        return {"loss": ((model(batch[0]) - batch[1]) ** 2).sum()}

    torch.manual_seed(0)
    task = Task(model=nn.Linear(1, 1), train_data=data, val_data=data, loss_sums=loss)
    train = TrainConfig(steps=8, global_batch_size=1, max_grad_norm=limit)
    health = HealthConfig(max_skipped_steps=most)
    config = Config(train=train, optim=optim, health=health)
    job = settle(task, config, world(torch.device("cpu"), Launch("none")), RunDirectory(tmp_path), Said())
    return job, start_training(job)


def test_a_step_that_is_not_finite_leaves_running_statistics_alone(tmp_path):
    """They would be nan from then on, and with them every evaluation."""

    def run(folder, bad):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(24, 2, generator=generator)
        x[bad] = math.nan
        data = TensorSamples(x, x.sum(1, keepdim=True))

        def loss(model, batch):
            return {"loss": ((model(batch[0]) - batch[1]) ** 2).sum()}

        torch.manual_seed(0)
        task = Task(
            model=nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 1)), train_data=data, val_data=data, loss_sums=loss
        )
        config = Config(train=TrainConfig(steps=6, global_batch_size=4), optim=SGD)
        world = SoloWorld(torch.device("cpu"), Launch("none"))
        job = settle(task, config, world, RunDirectory(folder), Said())
        training, seen = start_training(job), []
        for _ in range(6):
            train_step(job, training)
            seen.append([buffer.clone() for buffer in training.model.buffers()])
        return job, seen

    job, _ = run(tmp_path / "healthy", [])
    for number in (0, 3):
        _, seen = run(tmp_path / str(number), job.order.global_batch(number)[:1])
        assert all(buffer.isfinite().all() for buffers in seen for buffer in buffers)
        before = seen[number - 1] if number else [torch.zeros(2), torch.ones(2), torch.tensor(0)]
        assert all(map(torch.equal, before, seen[number]))
        assert seen[-1][2] == 5


def order_of(job):
    return [int(job.order.global_batch(step)) for step in range(8)]


@pytest.mark.parametrize("world", [SoloWorld, Device])
@pytest.mark.parametrize("optim", [ADAMW, LOOP, SGD], ids=["adamw", "adamw, loop", "sgd"])
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path, optim, world):
    bad = order_of(start(tmp_path, optim, world=world)[0])[3:5]
    job, training = start(tmp_path, optim, bad, world=world)
    stopwatch = Stopwatch(0)
    for step in range(8):
        tensors = {**model_tensors(training.model), **states(training)}
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        train_step(job, training)
        after = {**model_tensors(training.model), **states(training)}
        assert (step in (3, 4)) == (before.keys() == after.keys() and all(before[n].equal(after[n]) for n in before))
    assert [line.split(":")[1].split(" is")[0] for line in job.log.lines] == [" step 4", " step 5"]
    metrics = step_metrics(job, training, stopwatch)
    assert math.isfinite(metrics["train/loss"])
    assert metrics["train/skipped_steps"] == 2


def states(training):
    """Return the optimizer's tensors by parameter and name."""
    state = training.optimizer.state_dict()["state"]
    return {(i, key): torch.as_tensor(v) for i, entry in state.items() for key, v in entry.items() if v is not None}


def test_the_last_step_is_heard_before_anything_is_logged(tmp_path):
    bad = order_of(start(tmp_path, ADAMW)[0])[:2]
    job, training = start(tmp_path, ADAMW, bad, most=2)
    train_step(job, training)
    train_step(job, training)
    with pytest.raises(DivergedError, match="2 steps in a row were skipped, up to step 2: the loss on rank 0"):
        step_metrics(job, training, Stopwatch(0))


class Questions(TorchDispatchMode):
    """Counts how often a tensor's value is asked for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def questions_in_a_step(tmp_path, optim):
    job, training = start(tmp_path, optim)
    for _ in range(3):
        train_step(job, training)
    with Questions() as questions:
        train_step(job, training)
    return questions.count


def test_a_step_waits_for_no_device(tmp_path):
    """What became of the step before has long arrived on the host, and is read from its memory."""
    assert questions_in_a_step(tmp_path, ADAMW) == 0
    assert questions_in_a_step(tmp_path, LOOP) > 0


@pytest.mark.parametrize("limit", [None, 1e6], ids=["no limit", "a limit that is not reached"])
@pytest.mark.parametrize("optim", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_where_nothing_waits_the_steps_are_bitwise_the_same(tmp_path, optim, limit):
    """Plain numbers and answers by a look stand for tensors of the device: not a bit differs, nor after a bad step."""
    bad = order_of(start(tmp_path, optim)[0])[2:3]
    ends = []
    for world in (SoloWorld, Device):
        job, training = start(tmp_path, optim, bad, world=world, limit=limit)
        for _ in range(8):
            train_step(job, training)
        metrics = {name: value for name, value in step_metrics(job, training, Stopwatch(0)).items() if "train/" in name}
        ends.append((metrics, [parameter.tolist() for parameter in training.model.parameters()]))
    assert ends[0] == ends[1]
    assert ends[0][0]["train/skipped_steps"] == 1


@pytest.mark.parametrize("optim", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_fused_optimizer_clips_as_it_steps(tmp_path, optim):
    """Gradients are read and written once less; the step is that of clipped ones, and they stay clipped."""
    ends, counts = [], []
    for world in (SoloWorld, Device):
        job, training = start(tmp_path, optim, world=world, limit=0.01)
        with Products() as products:
            for _ in range(8):
                train_step(job, training)
        counts.append(products.count)
        parameters = [*training.model.parameters()]
        assert float(torch.nn.utils.get_total_norm([p.grad for p in parameters])) == pytest.approx(0.01, rel=1e-3)
        ends.append([tensor.detach().clone() for p in parameters for tensor in (p, p.grad)])
    assert counts[0] >= 8
    assert counts[1] == 0
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b)


def test_who_looks_at_gradients_before_a_step_sees_them_clipped(tmp_path):
    job, training = start(tmp_path, ADAMW, limit=0.01)
    seen = []

    def look(optimizer, args, kwargs):
        seen.append(float(torch.nn.utils.get_total_norm([p.grad for p in training.model.parameters()])))

    training.optimizer.register_step_pre_hook(look)
    train_step(job, training)
    assert seen == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("shapes", [[(3,)], [(700, 30), (30,), (5, 4, 3)], []])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_norm_is_bitwise_torchs_own(shapes, dtype):
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(dtype) for shape in shapes]
    assert norm_of(tensors).equal(torch.nn.utils.get_total_norm(tensors))
    mixed = [*tensors, torch.ones(2, dtype=torch.float16), torch.ones(3)]
    assert norm_of(mixed).equal(torch.nn.utils.get_total_norm(mixed))


class Products(TorchDispatchMode):
    """Counts multiplications of many tensors by one number."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._foreach_mul_.Tensor, torch.ops.aten.mul_.Tensor)
        return func(*args, **(kwargs or {}))


# Gradients of norm 5, at the limit and on both sides of it: torch adds a millionth to the norm.
@pytest.mark.parametrize("limit", [1.0, 4.999999, 5.0, 5.0000005, 5.000001, 5.0000015, 5.00001, 1e9])
@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_a_gradient_within_its_limit_is_passed_over_without_a_product(tmp_path, limit, value):
    """Bitwise what torch's clipping makes of it: a product by 1 is left out, and no other."""
    job, training = start(tmp_path, ADAMW, world=SoloWorld)
    config = dataclasses.replace(job.config, train=dataclasses.replace(job.config.train, max_grad_norm=limit))
    given = [torch.tensor([[3.0 * value]]), torch.tensor([4.0])]
    expected = nn.Linear(1, 1)
    for model in (training.model, expected):
        model.weight.grad, model.bias.grad = (gradient.clone() for gradient in given)
    norm = nn.utils.clip_grad_norm_(expected.parameters(), limit)
    with Products() as products:
        found, _ = update_module._clip(dataclasses.replace(job, config=config), training)
    assert found.nan_to_num().equal(norm.nan_to_num())
    for own, of_torch in zip(training.model.parameters(), expected.parameters(), strict=True):
        assert own.grad.nan_to_num(7.0).equal(of_torch.grad.nan_to_num(7.0))
    is_changed = not all(map(torch.equal, given, (p.grad for p in expected.parameters())))
    assert (products.count == 0) == (limit >= 5.000001 and value == 1.0)
    assert is_changed <= (products.count > 0)
