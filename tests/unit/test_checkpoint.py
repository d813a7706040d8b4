"""Checkpoints: what is written is read back, what is damaged is refused, what was there stays."""

import hashlib
import json

import pytest
import torch

from hvdtrain.errors import CheckpointError, ResumeError
from hvdtrain.models.weights import load_model_weights, model_weights
from hvdtrain.rundir.checkpoint import load_checkpoint
from hvdtrain.rundir.checkpoints import Checkpoints
from hvdtrain.rundir.manifest import Manifest
from hvdtrain.rundir.retention import Retention


def save(run_dir, step=1, weights=None, retention=None, **more):
    return Checkpoints(run_dir / "checkpoints").save(
        Manifest(step=step, samples=10 * step, world_size=2, **more),
        weights or {"w": torch.arange(3.0)},
        {"step": step, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
        retention or Retention(),
    )


def list_checkpoints(run_dir):
    return [*Checkpoints(run_dir / "checkpoints").by_step().values()]


def load_newest(run_dir, warn):
    return Checkpoints(run_dir / "checkpoints").load_newest(warn)


def test_what_was_saved_is_loaded(tmp_path):
    path = save(tmp_path, 200)
    assert path == tmp_path / "checkpoints" / "step-00000200"
    assert list_checkpoints(tmp_path) == [path]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000200\n"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "model.safetensors", "state.pt"]
    checkpoint = load_checkpoint(path)
    assert checkpoint.weights["w"].tolist() == [0, 1, 2]
    assert checkpoint.state["optimizer"]["state"][0]["m"].tolist() == [1, 1]
    assert (checkpoint.manifest.step, checkpoint.manifest.samples, checkpoint.manifest.world_size) == (200, 2000, 2)


def test_none_yet(tmp_path):
    assert load_newest(tmp_path, print) is None


def test_only_the_newest_are_kept_and_rests_of_an_interrupted_save_go(tmp_path):
    (tmp_path / "checkpoints" / ".writing-step-00000009").mkdir(parents=True)
    for step in (5, 10, 15):
        save(tmp_path, step, retention=Retention(keep_last=2))
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step-00000010", "step-00000015"]


def test_the_best_and_every_so_many_stay(tmp_path):
    for step, loss in ((5, 3.0), (10, 1.0), (15, None), (20, 2.0), (25, float("nan")), (30, 4.0)):
        save(tmp_path, step, val_loss=loss, retention=Retention(keep_last=1, keep_every=20))
    assert [int(path.name[5:]) for path in list_checkpoints(tmp_path)] == [10, 20, 30]
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000010\n"
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000030\n"


def test_a_damaged_one_is_passed_over_with_a_warning(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step)
    newest, middle = (tmp_path / "checkpoints" / f"step-0000000{step}" for step in (3, 2))
    (newest / "state.pt").unlink()
    (middle / "model.safetensors").write_bytes((middle / "model.safetensors").read_bytes()[:-5])
    warnings = []
    assert load_newest(tmp_path, warnings.append).manifest.step == 1
    assert len(warnings) == 2
    assert "state.pt" in warnings[0]
    assert "model.safetensors is damaged" in warnings[1]
    (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints"):
        load_newest(tmp_path, warnings.append)


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    path = save(tmp_path, 5, weights={"w": torch.zeros(1)})
    assert load_checkpoint(path).weights["w"].tolist() == [0]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_a_flipped_bit_is_found(tmp_path, name):
    path = save(tmp_path)
    damaged = bytearray((path / name).read_bytes())
    damaged[-1] ^= 1
    (path / name).write_bytes(damaged)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
def test_a_missing_file_is_named(tmp_path, name):
    path = save(tmp_path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(path)


def reseal(path, **changes):
    """Change a manifest as someone would who knows how its checksum is made."""
    values = {**json.loads((path / "manifest.json").read_text()), **changes}
    del values["checksum"]
    values = {name: value for name, value in values.items() if value is not ...}
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({**values, "checksum": digest}))


def test_a_newer_format_stops_the_run(tmp_path):
    """Falling back would throw away what a newer hvdtrain has trained."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    reseal(path, format_version=99, new_field=[1])
    with pytest.raises(CheckpointError, match="newer hvdtrain"):
        load_checkpoint(path)
    with pytest.raises(ResumeError, match=r"\(format 99\): update this one, or choose another --run-dir"):
        load_newest(tmp_path, print)


def fail_with(error):
    def fail(*arguments, **named):
        raise error

    return fail


def test_a_failed_save_leaves_the_last_one(tmp_path, monkeypatch):
    save(tmp_path, 1)
    monkeypatch.setattr("hvdtrain.rundir.checkpoint.torch.save", fail_with(OSError("disk full")))
    with pytest.raises(CheckpointError, match="disk full"):
        save(tmp_path, 2)
    assert load_newest(tmp_path, print).manifest.step == 1


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    path = save(tmp_path)

    class Evil:
        def __reduce__(self):
            return (print, ("owned",))

    torch.save({"x": Evil()}, path / "state.pt")
    digest = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    hashes = json.loads((path / "manifest.json").read_text())["sha256"]
    reseal(path, sha256={**hashes, "state.pt": digest})
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(path)


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(4, 3)
        self.head = torch.nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight
        self.norm = torch.nn.BatchNorm1d(3)


def test_tied_weights_are_stored_once_and_buffers_too():
    model = Tied()
    weights = model_weights(model)
    assert sorted(weights) == [
        "embed.weight",
        "norm.bias",
        "norm.num_batches_tracked",
        "norm.running_mean",
        "norm.running_var",
        "norm.weight",
    ]
    other = Tied()
    load_model_weights(other, weights)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_weights_of_another_model_are_named():
    weights = model_weights(Tied())
    del weights["norm.bias"]
    weights["embed.weight"] = torch.zeros(5, 3)
    weights["extra"] = torch.zeros(1)
    with pytest.raises(ResumeError) as caught:
        load_model_weights(Tied(), weights)
    for part in ("norm.bias is missing", "extra is not in this model", "(5, 3) in the checkpoint and (4, 3)"):
        assert part in str(caught.value)
