"""Horovod's names on our exchange: all of them, with its arguments, and a script of one process."""

import importlib
import inspect
import subprocess
import sys

import pytest
import torch

from hvdtrain.compat import horovod as compat
from hvdtrain.errors import UsageError

REFUSED_CALLS = {
    "a group of ranks": lambda: compat.allreduce(torch.ones(1), process_set=object()),
    "a new group": lambda: compat.ProcessSet([0, 1]),
    "both ways to say it": lambda: compat.allreduce(torch.ones(1), average=True, op=compat.Sum),
    "no such operation": lambda: compat.allreduce(torch.ones(1), op=17),
    "a mean of integers": lambda: compat.allreduce(torch.ones(1, dtype=torch.int64)),
    "no such rank": lambda: compat.broadcast(torch.ones(1), root_rank=1),
    "splits that do not fit": lambda: compat.alltoall(torch.ones(2), splits=[1]),
    "a derivative that is not there": lambda: compat.alltoall(torch.ones(2, requires_grad=True), splits=[2]),
    "a format of one's own": lambda: compat.DistributedOptimizer(
        torch.optim.SGD([torch.ones(1)]), compression=type("Mine", (compat.Compression.none,), {})
    ),
    "what is no model": lambda: compat.broadcast_parameters(3, root_rank=0),
}


@pytest.fixture
def hvd(monkeypatch):
    for name in ("OMP_NUM_THREADS", "HOROVOD_FUSION_THRESHOLD", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, "1")
    compat.init()
    yield compat
    compat.shutdown()


def test_every_public_name_of_horovod_is_there_with_its_arguments():
    horovod = importlib.import_module("horovod.torch")
    names = [name for name in dir(horovod) if not name.startswith("_")]
    names = [name for name in names if not inspect.ismodule(getattr(horovod, name)) or name == "elastic"]
    assert len(names) > 50
    for name in names:
        if name in compat.ELSEWHERE:
            with pytest.raises(AttributeError, match=f"has no '{name}': "):
                getattr(compat, name)
            continue
        theirs, ours = getattr(horovod, name), getattr(compat, name)
        if inspect.isfunction(theirs) and name not in ("init", "shutdown"):
            assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
    assert not hasattr(compat, "no_such_name")


@pytest.mark.parametrize("name", compat.ELSEWHERE)
def test_an_import_of_what_is_elsewhere_says_where(name):
    """As the programs write it that use the name; whoever asks by `hasattr` whether it is there is told no."""
    assert not hasattr(compat, name)
    with pytest.raises(ImportError, match=f"has no '{name}': "):
        exec(f"from hvdtrain.compat.horovod import {name}")
    with pytest.raises(ImportError, match="cannot import name"):
        exec("from hvdtrain.compat.horovod import no_such_name")


def test_the_module_of_horovods_elastic_driver_says_what_is_instead():
    for line in ("import hvdtrain.compat.horovod.elastic", "from hvdtrain.compat.horovod.elastic import run"):
        with pytest.raises(ImportError, match="hvdtrain supervise"):
            exec(line)


def test_before_init_it_says_what_to_do():
    with pytest.raises(UsageError, match=r"call hvd\.init\(\) first"):
        compat.rank()


def test_second_derivatives(hvd):
    """They were left out in silence: what a derivative returned was a constant."""
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    (slope,) = torch.autograd.grad(hvd.allreduce(x.square(), op=hvd.Sum).square().sum(), x, create_graph=True)
    slope.sum().backward()
    assert torch.allclose(x.grad, 12 * x.detach().square())
    gathered = hvd.allgather(x.square()).square().sum()
    with pytest.raises(UsageError, match=r"cannot be differentiated twice .* with differentiable=True"):
        torch.autograd.grad(gathered, x, create_graph=True)


def test_one_process(hvd):
    hvd.init()  # a second time does nothing
    assert (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size()) == (0, 1, 0, 1)
    assert (hvd.cross_rank(), hvd.cross_size(), hvd.mpi_enabled(), hvd.is_initialized()) == (0, 1, False, True)
    tensor = torch.tensor([1.0, 2.0])
    for result in (
        hvd.allreduce(tensor),
        hvd.synchronize(hvd.allreduce_async(tensor, op=hvd.Sum)),
        hvd.allreduce_(tensor.clone(), op=hvd.Product),
        hvd.grouped_allreduce([tensor], name="group")[0],
        hvd.allgather(tensor),
        hvd.broadcast(tensor, 0),
        hvd.alltoall(tensor),
        hvd.reducescatter(tensor),
        hvd.allreduce(tensor, compression=hvd.Compression.fp16, prescale_factor=0.5, postscale_factor=2.0),
    ):
        assert torch.equal(result, tensor)
    assert hvd.broadcast_object({"a": 1}) == {"a": 1}
    assert hvd.allgather_object(3) == [3]
    hvd.barrier()
    assert hvd.join() == 0
    parts = ("mpi", "gloo", "nccl", "cuda", "rocm", "ccl", "ddl")
    assert hvd.world().built_with == {part for part in parts if getattr(hvd, f"{part}_built")()}


@pytest.mark.parametrize("call", REFUSED_CALLS.values(), ids=REFUSED_CALLS)
def test_what_cannot_be_done_is_one_sentence(hvd, call):
    with pytest.raises(UsageError) as caught:
        call()
    assert len(str(caught.value)) < 300


TAKE_TENSORS = [
    name
    for name, function in vars(compat).items()
    if inspect.isfunction(function) and "tensor" in inspect.signature(function).parameters
]


@pytest.mark.parametrize("name", TAKE_TENSORS)
@pytest.mark.parametrize("value", [0.5, [1.0], None])
def test_a_number_in_place_of_a_tensor_is_told(hvd, name, value):
    """Old scripts average accuracies that are plain numbers."""
    more = {"name": "x", "op": hvd.Sum} if name == "sparse_allreduce_async" else {}
    more = {"root_rank": 0} if name.startswith("broadcast") else more
    with pytest.raises(UsageError, match=r"take tensors, not an object of type .*: give torch\.tensor\(value\)"):
        getattr(hvd, name)(value, **more)


def test_what_has_no_effect_is_said(hvd, caplog):
    layer = torch.nn.Linear(1, 1)
    hvd.DistributedOptimizer(torch.optim.SGD(layer.parameters()), layer.named_parameters(), num_groups=2)
    assert "num_groups=...) has no effect" in caplog.text


SCRIPT = """
import hvdtrain.compat.horovod as hvd
import torch

hvd.init()
torch.manual_seed(0)
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1 * hvd.size(), momentum=0.9)
optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=model.named_parameters())
hvd.broadcast_parameters(model.state_dict(), root_rank=0)
hvd.broadcast_optimizer_state(optimizer, root_rank=0)
for step in range(3):
    optimizer.zero_grad()
    model(torch.ones(4, 2)).square().mean().backward()
    optimizer.step()
print(hvd.allreduce(torch.tensor(1.0), name="done").item())
"""


def test_a_script_without_a_launcher(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "1.0\n"), done.stderr
