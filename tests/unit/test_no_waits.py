"""Steps on a device that cannot be looked at: torch's "meta", which has no numbers, in the place of a GPU.

Whoever reads a number there, or copies one from there, fails; copies to it must be those that nobody waits for.
"""

import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_operator_counts import ManyNorms, training_of
from thread_world import Meeting, ThreadWorld
from waiting_copies import Copies

import hvdtrain
from hvdtrain.data.image_samples import MEAN, STD, normalised
from hvdtrain.models.private_torch import FakeTensorMode
from hvdtrain.optim import fused_sgd
from hvdtrain.optim.private_optimizer import is_looked_at
from hvdtrain.process.launch import Launch
from hvdtrain.settings import CommConfig, HealthConfig, LogConfig, OptimConfig
from hvdtrain.trainer import step as step_module
from hvdtrain.trainer import train_step
from hvdtrain.trainer import update as update_module
from hvdtrain.trainer.strategy import EveryStep
from hvdtrain.world import SoloWorld, carriers, collectives
from hvdtrain.world.codecs import CODECS
from hvdtrain.world.memory import Memory

META = torch.device("meta")
WAYS = {
    "as it is": {},
    "accumulation": {"accum_steps": 2},
    "bf16, average": {"train": {"precision": "bf16", "ema": 0.9}},
    "what is watched": {"health": HealthConfig(spikes="skip", noise_scale=True), "log": LogConfig(grad_norms=True)},
    "shard": {"optim": OptimConfig(shard=True)},
    "shard, norms": {"optim": OptimConfig(shard=True), "log": LogConfig(grad_norms=True)},
    "sgd": {"optim": OptimConfig(name="sgd")},
    "statistics": {"model": ManyNorms(3, torch.nn.BatchNorm1d)},
    "local": {"comm": CommConfig(sync="local", period=2)},
    "fragments": {"comm": CommConfig(sync="local", period=2, fragments=2, overlap_steps=1, outer="nesterov")},
    **{f"compression {name}": {"comm": CommConfig(compression=name)} for name in ("fp16", "bf16", "int8")},
    "compression powersgd": {"comm": CommConfig(compression="powersgd:2", compression_min_size=64)},
    "compression topk": {"comm": CommConfig(compression="topk:0.1", compression_min_size=64)},
}


def twin():
    """Return rank 0 of two, whose other rank gives what it gives itself: what numbers are is not known here."""
    world = ThreadWorld(0, Meeting(2))
    world.device = META
    world.check_replicas = world.broadcast_state = lambda *_, **__: None
    world._start = lambda name, value, finish: lambda: finish([value] * 2)
    return world


def test_all_formats_of_gradients_are_tried():
    assert {name.split()[1] for name in WAYS if name.startswith("compression")} == CODECS.keys() - {"none"}


@pytest.fixture
def on_meta(monkeypatch):
    """Have ranks train on the device; what a step tells the host is dropped on its way."""
    for module in (carriers, collectives):  # tensors without numbers are refused
        monkeypatch.setattr(module, "check_tensor", lambda *_: None)
    monkeypatch.setattr(fused_sgd, "fused_sgd_", lambda *_: None)  # torch has none for this device
    monkeypatch.setattr(update_module, "Outcome", lambda *_: SimpleNamespace(read=lambda: (True, 1.0)))
    optimizer = sys.modules["torch.optim.optimizer"]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["cuda", "cpu", "meta"])

    # A first step asks which buffers it has changed; that later ones do not is seen in test_operator_counts.py.
    for owner in (torch, torch.Tensor):
        monkeypatch.setattr(owner, "equal", lambda *_: False)

    # It has no autocast. Batches are copied without waiting to GPUs alone.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(step_module, "autocast", lambda *_: nullcontext())
    monkeypatch.setattr(
        step_module, "to_device", lambda batch, device, _: [x.to(device, non_blocking=True) for x in batch]
    )


@pytest.mark.parametrize("given", WAYS.values(), ids=WAYS)
@pytest.mark.usefixtures("on_meta")
def test_a_step_waits_for_nothing(given):
    job, training = training_of(twin(), **given)
    assert not is_looked_at(training.optimizer)  # our own hooks want to see no clipped gradients
    train_step(job, training)  # the first one may: it finds out who has gradients
    with Copies() as copies:
        for _ in range(3):
            train_step(job, training)
    assert copies.found == []
    assert copies.num_others > 0


def test_the_norm_of_no_gradient_is_on_the_device():
    """As of a micro-batch without targets: sums there are kept or not by what was made of it in host memory."""
    on_host = SoloWorld(torch.device("cpu"), Launch("none"))
    found = [EveryStep().norm_of(world, []) for world in (on_host, twin())]
    assert [(norm.device.type, norm.dtype) for norm in found] == [("cpu", torch.float32), ("meta", torch.float32)]
    assert found[0] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_channels_last", [False, True])
def test_images_are_normalised_without_a_wait(dtype, is_channels_last):
    """Their mean was made on the GPU of plain numbers, for which torch waits, twice a micro-batch."""
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    with Copies() as copies:
        shown = normalised(images.to(META, non_blocking=True), dtype, is_channels_last)
    assert (copies.found, copies.num_others) == ([], 3)
    assert (shown.dtype, shown.shape) == (dtype, images.shape)
    mean, std = (torch.tensor(v, dtype=dtype).view(1, 3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(normalised(images, dtype, is_channels_last), (images.to(dtype) - 255 * mean) / (255 * std))


def test_what_a_codec_remembers_is_kept_where_it_is_used():
    """A checkpoint has it in host memory, where it cannot be put together with what is on a GPU."""
    memory = Memory()
    memory.load_state_dict({"weight": torch.ones(3)})
    with FakeTensorMode(allow_non_fake_inputs=True):
        fresh, answer = torch.empty(3, device="cuda"), torch.empty((), dtype=torch.bool, device="cuda")
        memory.get("weight", fresh)
        memory.put("weight", fresh, answer)
        memory.settle(answer)
    assert memory.now()["weight"].device.type == "cuda"


def test_other_gpus_of_the_host_are_left_alone():
    """Without a word torch puts the generators of all of them back, and warns."""
    files = [*Path(hvdtrain.__file__).parent.rglob("*.py")]
    assert len(files) > 100
    assert [file for file in files if re.search(r"fork_rng\(\)", file.read_text())] == []
