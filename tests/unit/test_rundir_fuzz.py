"""Run directories that were damaged at random: whatever is in one, it ends in a sentence or in a run, and in time.

Seeded, so that a failure comes again: HVDTRAIN_FUZZ=1000 tries a thousand instead of a few.
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
from dataclasses import dataclass

import pytest
import torch

import hvdtrain
from hvdtrain.rundir.trained import open_trained
from hvdtrain.verbs.plan.logged import find_noise

COUNT = int(os.environ.get("HVDTRAIN_FUZZ", "12"))
SECONDS = 120
ODD_VALUES = [None, [], {}, "x", -1, 1e400, True, 2**70, [[]], {"a": None}, "\0", "../../x", "/dev/zero"]


@dataclass(frozen=True, kw_only=True)
class Line(hvdtrain.Recipe):
    """A straight line through points."""

    def build(self, say):
        x = torch.linspace(-1, 1, 20).unsqueeze(1)
        torch.manual_seed(0)
        data = hvdtrain.TensorSamples(x, 3 * x)
        return hvdtrain.Task(
            model=torch.nn.Linear(1, 1),
            train_data=data,
            val_data=data,
            loss_sums=lambda model, batch: {"loss": (model(batch[0]) - batch[1]).square().sum()},
            write_model_files=lambda folder: (folder / "config.json").write_text("{}"),
        )


RECIPE = Line(
    train=hvdtrain.TrainConfig(steps=6, global_batch_size=10),
    optim=hvdtrain.OptimConfig(schedule="constant"),
    log=hvdtrain.LogConfig(every=1),
    eval=hvdtrain.EvalConfig(every=2),
    checkpoint=hvdtrain.CheckpointConfig(every=2, keep_last=2),
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("healthy") / "run"
    hvdtrain.train(RECIPE, run_dir=run_dir, train={"steps": 4})
    return run_dir


@contextlib.contextmanager
def limited(seconds):
    """Fail what does not end in time, such as the reading of a pipe that nobody writes to."""

    def fail(number, frame):
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def flip(draw, path):
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def cut(draw, path):
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content) + 1)])


def fill(draw, path):
    path.write_bytes(
        draw.choice([b"", b"\0" * 300, b"[" * 50_000, b"\xff\xfe\n", b"{}", b"null\n", draw.randbytes(200)])
    )


def remove(draw, path):
    path.unlink()


def make_other(draw, path):
    path.unlink()
    kind = draw.choice(["fifo", "directory", "device", "loop", "dangling"])
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": "/nowhere/at/all"}[kind])


def odd_json(draw, path):
    """Change a value somewhere in a JSON file, and seal a manifest again."""
    try:
        values = json.loads(path.read_text().splitlines()[0] if path.suffix == ".jsonl" else path.read_text())
        values[draw.choice([*values, "new"])] = draw.choice(ODD_VALUES)
    except (ValueError, IndexError, TypeError):
        return fill(draw, path)
    if "checksum" in values:
        values.pop("checksum")
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
        values["checksum"] = digest
    return path.write_text(json.dumps(values) + "\n")


def odd_state(draw, path):
    """Forge a state that loads, and a manifest that fits it."""
    folder = path.parent
    if not (folder / "state.pt").is_file() or not (folder / "manifest.json").is_file():
        return fill(draw, path)
    try:
        state = torch.load(folder / "state.pt", weights_only=True)
        values = json.loads((folder / "manifest.json").read_text())
        state[draw.choice([*state])] = draw.choice([None, [], {}, 3, torch.ones(2), "x"])
        torch.save(state if draw.random() < 0.8 else [state], folder / "state.pt")
        values["sha256"]["state.pt"] = hashlib.sha256((folder / "state.pt").read_bytes()).hexdigest()
        (folder / "manifest.json").write_text(json.dumps(values))
    except Exception:  # damaged by an earlier change
        return fill(draw, path)
    return odd_json(draw, folder / "manifest.json") if draw.random() < 0.2 else reseal(folder / "manifest.json")


def reseal(path):
    values = json.loads(path.read_text())
    values.pop("checksum", None)
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps({**values, "checksum": digest}))


def odd_folder(draw, path):
    """Rename, double or replace the folder that holds a file."""
    folder = path.parent
    if folder.name == "run":
        return fill(draw, path)
    kind = draw.choice(["copy", "rename", "remove", "file", "link"])
    other = folder.with_name(draw.choice(["step-good", "step-00000900", "step-1", "step-00000002", "checkpoints.bak"]))
    if kind == "copy" and not other.exists():
        shutil.copytree(folder, other, symlinks=True)
    elif kind == "rename" and not other.exists():
        folder.rename(other)
    elif kind in ("remove", "file", "link"):
        shutil.rmtree(folder)
        if kind == "file":
            folder.write_text("in the way")
        elif kind == "link":
            folder.symlink_to("/proc/self")
    return None


def grow(draw, path):
    """Let a file pretend to be huge; it takes no room."""
    os.truncate(path, draw.choice([1 << 31, 1 << 36, 1 << 41]))


def put_beside(draw, path):
    """Put something of another kind beside a file, under a name that hvdtrain uses itself, or of odd bytes."""
    names = [".writing-step-00000004", ".replaced-step-00000004", ".writing-latest", ".config.toml.writing-1"]
    names += ["step-99999999999999999", "step-000000000", "step-00000010", "best", "x\udcff", "a\nb"]
    other, kind = path.with_name(draw.choice(names)), draw.choice(["folder", "file", "fifo", "loop", "link"])
    if other.exists() or other.is_symlink():
        return
    if kind == "folder":
        other.mkdir()
    elif kind == "file":
        other.write_bytes(draw.randbytes(50))
    elif kind == "fifo":
        os.mkfifo(other)
    else:
        other.symlink_to(other if kind == "loop" else "/etc")


CHANGES = [flip, flip, cut, fill, remove, make_other, odd_json, odd_json, odd_state, odd_state, odd_folder]
CHANGES += [grow, put_beside]


@pytest.mark.parametrize("seed", range(COUNT))
def test_a_damaged_directory_ends_in_a_sentence_or_a_run(healthy, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # waiting for the disk takes most of the time
    draw = random.Random(seed)
    run_dir = tmp_path / "run"
    shutil.copytree(healthy, run_dir)
    for _ in range(draw.choice([1, 1, 2, 3])):
        files = sorted(path for path in run_dir.rglob("*") if path.is_file() and not path.is_symlink())
        if files:
            draw.choice(CHANGES)(draw, draw.choice(files))
    with limited(SECONDS):
        for which in ("latest", "best", "2"):
            with contextlib.suppress(hvdtrain.HvdtrainError):
                open_trained(run_dir, which)
        find_noise(run_dir)
        result, sentence = None, "finished"
        try:
            result = hvdtrain.train(RECIPE, run_dir=run_dir)
        except hvdtrain.HvdtrainError as error:
            sentence = str(error)
        assert 0 < len(sentence) < 2000
        if result:
            assert result.step == 6
            again = hvdtrain.train(RECIPE, run_dir=run_dir)  # and what it saved is good
            assert again.metrics == result.metrics
