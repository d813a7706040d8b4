"""Nothing is saved that cannot be loaded, nothing good is thrown away, and nothing odd ends in a traceback."""

import dataclasses
import hashlib
import json
import os
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import fail_with, list_checkpoints, load_newest, reseal, save
from test_metrics import full_disk

from hvdtrain.errors import CheckpointError, ResumeError, UsageError
from hvdtrain.rundir import checkpoint as one
from hvdtrain.rundir.checkpoints import Checkpoints
from hvdtrain.rundir.directory import RunDirectory
from hvdtrain.rundir.manifest import Manifest, decode_manifest, read_manifest
from hvdtrain.rundir.parts import write_part
from hvdtrain.rundir.retention import Retention, kept_steps
from hvdtrain.world.state_file import write_state


def steps(run_dir):
    return [int(path.name.rpartition("-")[2]) for path in list_checkpoints(run_dir)]


def pointer(run_dir, name="latest"):
    return (run_dir / "checkpoints" / name).read_text().strip()


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    "error",
    [KeyError("x"), AttributeError("x"), TypeError("x"), ValueError("x"), MemoryError(), OSError(28, "No space")],
)
@pytest.mark.parametrize("place", ["safetensors.torch.save_file", "torch.save", "flush_folder"])
def test_any_exception_in_a_save_is_one_error_and_leaves_nothing(tmp_path, monkeypatch, error, place):
    save(tmp_path, 1)
    monkeypatch.setattr(f"hvdtrain.rundir.checkpoint.{place}", fail_with(error))
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step-00000001"]
    assert pointer(tmp_path) == "step-00000001"


@pytest.mark.parametrize("room", [300_000, 400_000, 400_300])
def test_a_full_disk_is_called_that(tmp_path, room):
    """Torch's own words for it are "unexpected pos 3291904 vs 3291796"."""
    state = {"numbers": torch.zeros(100_000)}
    (tmp_path / "folder").mkdir()
    with full_disk(room):
        with pytest.raises(CheckpointError, match=r"could not be written \(.*File too large"):
            Checkpoints(tmp_path / "checkpoints").save(
                Manifest(step=1, samples=0, world_size=1), {"w": torch.ones(2)}, state, Retention()
            )
        with pytest.raises(UsageError, match=r"cannot be written: .*File too large"):
            write_state(state, tmp_path / "state.pt")
        assert "File too large" in write_part(tmp_path / "folder", 0, state).error
    write_state(state, tmp_path / "state.pt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "folder", "state.pt"]


def test_state_that_would_not_load_again_is_no_checkpoint(tmp_path):
    """A class of the user's own passes torch.save, and is refused when it is loaded."""
    save(tmp_path, 1)
    with pytest.raises(CheckpointError, match="does not load again"):
        Checkpoints(tmp_path / "checkpoints").save(
            Manifest(step=2, samples=0, world_size=1), {"w": torch.ones(2)}, {"odd": Custom()}, Retention()
        )
    assert names(tmp_path) == ["latest", "step-00000001"]


class Custom:
    pass


@pytest.mark.parametrize("change", ["name", "shape", "value"])
def test_weights_that_were_written_wrong_are_found(tmp_path, monkeypatch, change):
    wrong = {"name": {"v": torch.ones(3)}, "shape": {"w": torch.ones(4)}, "value": {"w": torch.tensor([0.0, 1.0, 3.0])}}
    monkeypatch.setattr(one.safetensors.torch, "save_file", lambda tensors, path: save_file(wrong[change], path))
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 1)
    assert names(tmp_path) == []


def test_a_save_that_cannot_point_latest_to_it_has_failed(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "latest").unlink()
    (tmp_path / "checkpoints" / "latest").mkdir()
    (tmp_path / "checkpoints" / "latest" / "x").write_text("")
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 2)


def test_a_full_disk_leaves_nothing_and_the_next_save_works(tmp_path):
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path, 2, weights={"w": torch.ones(5000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == ["latest", "step-00000001"]
    save(tmp_path, 2, weights={"w": torch.ones(5000)})
    assert load_newest(tmp_path, print).manifest.step == 2


def test_after_falling_back_new_saves_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (10, 15, 20, 25):
        save(tmp_path, step, retention=Retention(keep_last=4))
    for step in (15, 20, 25):
        (checkpoints.path_of(step) / "state.pt").write_bytes(b"")
    assert checkpoints.load_newest(lambda text: None).manifest.step == 10
    for step in (12, 14, 16):
        manifest = Manifest(step=step, samples=0, world_size=1)
        checkpoints.save(manifest, {"w": torch.ones(1)}, {}, Retention(keep_last=2))
        assert pointer(tmp_path) == f"step-{step:08d}"
        assert load_newest(tmp_path, lambda text: None).manifest.step == step
    assert set(steps(tmp_path)) >= {14, 16}
    assert 15 not in steps(tmp_path)  # damaged, and the run is past it


def test_doubtful_checkpoints_never_retire_good_ones(tmp_path):
    keep = Retention(keep_last=2)
    for step in (1, 2, 3):
        save(tmp_path, step, retention=keep)
    for step in (4, 5, 6):
        save(tmp_path, step, retention=keep, skipped_in_a_row=step - 3)
    save(tmp_path, 7, weights={"w": torch.tensor([1.0, float("nan")])}, retention=keep)
    assert steps(tmp_path) == [2, 3, 6, 7]
    report = Checkpoints(tmp_path / "checkpoints").report()
    assert "of step 2, 3; those of step 6, 7 were saved after skipped steps" in report
    warnings = []
    assert load_newest(tmp_path, warnings.append).manifest.step == 6  # weights that are not finite are of no use
    assert "not finite" in warnings[0]
    save(tmp_path, 8, retention=keep)
    assert steps(tmp_path) == [3, 8]


def test_infinities_in_buffers_are_no_sign_of_damage(tmp_path):
    weights = {"w": torch.ones(2), "mask": torch.tensor([0.0, float("-inf")])}
    Checkpoints(tmp_path / "checkpoints").save(
        Manifest(step=1, samples=0, world_size=1), weights, {}, Retention(), parameters=frozenset({"w"})
    )
    assert read_manifest(list_checkpoints(tmp_path)[0]).is_healthy


def test_the_best_is_a_good_one(tmp_path):
    save(tmp_path, 1, val_loss=2.0)
    save(tmp_path, 2, val_loss=1.0, skipped_in_a_row=3)
    assert pointer(tmp_path, "best") == "step-00000001"


def test_which_are_kept():
    health = {5: "good", 10: "damaged", 15: "unknown", 20: "good", 25: "doubtful", 30: "good", 40: "damaged"}
    assert kept_steps(health, 30, Retention(keep_last=1)) == {15, 30, 40}
    assert kept_steps(health, 30, Retention(keep_last=2, keep_every=10)) == {10, 15, 20, 30, 40}
    assert kept_steps(health, 25, Retention(keep_last=1)) == {15, 20, 25, 30, 40}
    assert kept_steps(health, 30, Retention()) == set(health)


def test_an_interrupted_replacement_loses_nothing(tmp_path):
    """Killed between the two renames: the one before has another name, the new one none yet."""
    path = save(tmp_path, 5)
    path.rename(path.with_name(".replaced-step-00000005"))
    shutil.copytree(path.with_name(".replaced-step-00000005"), path.with_name(".writing-step-00000005"))
    assert load_newest(tmp_path, print).manifest.step == 5
    assert Checkpoints(tmp_path / "checkpoints").named("latest").is_dir()
    save(tmp_path, 6)
    assert steps(tmp_path) == [5, 6]
    assert ".writing-step-00000005" not in names(tmp_path)
    save(tmp_path, 5)
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000006"]


def test_a_replacement_that_fails_leaves_the_one_before(tmp_path, monkeypatch):
    path = save(tmp_path, 5)
    rename = type(path).rename

    def fail(self, target):
        if self.name.startswith(".writing-step") and not self.name.startswith(".writing-old"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(type(path), "rename", fail)
    with pytest.raises(CheckpointError, match="could not be written"):
        save(tmp_path, 5, weights={"w": torch.zeros(1)})
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert load_newest(tmp_path, print).weights["w"].tolist() == [0, 1, 2]


def test_copies_of_the_users_are_left_alone(tmp_path):
    path = save(tmp_path, 200)
    for name in ("step-good", "step-00000200.bak", "step-00000900-old", "step-9999", "step-٠٠٠٠٠٩٩٩"):
        shutil.copytree(path, path.with_name(name))
    (path.parent / "notes").write_text("mine")
    assert steps(tmp_path) == [200]
    for step in (201, 202):
        save(tmp_path, step, retention=Retention(keep_last=1))
    assert load_newest(tmp_path, print).manifest.step == 202
    assert {"step-good", "step-00000200.bak", "step-00000900-old", "notes"} <= set(names(tmp_path))


def test_steps_above_ten_to_the_eight(tmp_path):
    for step in (99_999_999, 100_000_000, 100_000_005):
        save(tmp_path, step, retention=Retention(keep_last=2))
    assert steps(tmp_path) == [100_000_000, 100_000_005]
    assert load_newest(tmp_path, print).manifest.step == 100_000_005
    assert Checkpoints(tmp_path / "checkpoints").named("latest").name == "step-100000005"


def test_a_checkpoint_under_another_steps_name_is_not_taken(tmp_path):
    shutil.copytree(save(tmp_path, 5), tmp_path / "checkpoints" / "step-00000900")
    warnings = []
    assert load_newest(tmp_path, warnings.append).manifest.step == 5
    assert "its manifest is of step 5" in warnings[0]


def log_of(run_dir, *last):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "metrics.jsonl").write_text("".join(f'{{"step": {step}}}\n' for step in last))


def test_checkpoints_that_are_gone_never_restart_in_silence(tmp_path):
    run = RunDirectory(tmp_path / "run")
    log_of(run.path, 10, 20)
    with pytest.raises(ResumeError, match=r"checkpoints is missing, but .*metrics.jsonl goes up to step 20"):
        run.load_newest(print)
    run.checkpoints.folder.mkdir()
    warnings = []  # a run that was killed before its first save
    assert run.load_newest(warnings.append) is None
    assert "starts from step 0 again" in warnings[0]
    (run.checkpoints.folder / "latest").write_text("step-00000020\n")
    with pytest.raises(ResumeError, match="names 'step-00000020' as the latest: put it back"):
        run.load_newest(print)
    shutil.rmtree(run.checkpoints.folder)
    run.checkpoints.folder.write_text("in the way")
    with pytest.raises(ResumeError, match="cannot be listed"):
        run.load_newest(print)


def test_a_new_run_has_nothing_to_warn_of(tmp_path):
    assert RunDirectory(tmp_path).load_newest(fail_with(AssertionError)) is None


ODD = {
    "null hash": {"sha256": {"model.safetensors": None, "state.pt": None}},
    "no hashes": {"sha256": {}},
    "hash of a device": {"sha256": {"/dev/zero": "0" * 64, "state.pt": "0" * 64}},
    "hash of a file above": {"sha256": {"../latest": "0" * 64, "model.safetensors": "0" * 64, "state.pt": "0" * 64}},
    "list for a dictionary": {"sha256": ["model.safetensors"]},
    "step as text": {"step": "200"},
    "no step": {"step": ...},
    "negative step": {"step": -3},
    "no ranks": {"world_size": 0},
    "loss as a list": {"val_loss": [1.0]},
    "unknown field": {"more": 1},
    "older format": {"format_version": 1},
    "format as text": {"format_version": "2"},
    "true for a number": {"samples": True},
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_manifest_is_passed_over_and_later_saves_work(tmp_path, odd):
    save(tmp_path, 1, val_loss=2.0)
    reseal(save(tmp_path, 2, val_loss=1.0), **ODD[odd])
    warnings = []
    assert load_newest(tmp_path, warnings.append).manifest.step == 1
    assert len(warnings) == 1
    assert Checkpoints(tmp_path / "checkpoints").newest_manifest().step == 1
    save(tmp_path, 3, retention=Retention(keep_last=2))
    assert pointer(tmp_path) == "step-00000003"
    assert pointer(tmp_path, "best") == "step-00000001"


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


BREAKS = {
    "bit": flip_a_bit,
    "cut": lambda path: os.truncate(path, 40),
    "huge": lambda path: os.truncate(path, 1 << 42),  # its hash would take hours
    "gone": os.unlink,
}


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("how", BREAKS)
def test_what_a_run_goes_by_is_the_checkpoint_that_it_will_load(tmp_path, name, how):
    """A good manifest beside a damaged file says nothing: its batch may be that of another number of ranks."""
    save(tmp_path, 1, micro_batch_size=8)
    BREAKS[how](save(tmp_path, 2, micro_batch_size=2) / name)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest_manifest() == checkpoints.load_newest(lambda text: None).manifest
    assert checkpoints.newest_manifest().micro_batch_size == 8


def test_what_has_good_hashes_and_would_not_load_is_nothing_to_go_by(tmp_path):
    save(tmp_path, 1, micro_batch_size=8)
    path = save(tmp_path, 2, micro_batch_size=2)
    torch.save([1, 2], path / "state.pt")
    names = ("model.safetensors", "state.pt")
    reseal(path, sha256={name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in names})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest_manifest().micro_batch_size == 8
    assert checkpoints.load_newest(lambda text: None).manifest.step == 1


def test_what_changes_after_it_was_verified_is_noticed(tmp_path):
    """Loading does not hash files again that were verified a moment ago; these are others."""
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest_manifest().step == 2
    flip_a_bit(path / "model.safetensors")
    assert checkpoints.load_newest(lambda text: None).manifest.step == 1


@pytest.mark.parametrize("text", ["[]", "null", "3", "[" * 100_000, "", "\0" * 500, '{"step": 1}', '"' + "x" * 70_000])
def test_a_manifest_that_is_something_else(tmp_path, text):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "manifest.json").write_text(text)
    assert load_newest(tmp_path, lambda text: None).manifest.step == 1


def test_every_flipped_bit_of_a_manifest_is_noticed_or_changes_nothing(tmp_path):
    path = save(tmp_path, 200, val_loss=1.25, global_batch_size=16, micro_batch_size=4) / "manifest.json"
    content, manifest = path.read_bytes(), read_manifest(path.parent)
    noticed = 0
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert decode_manifest(bytes(flipped), path) == manifest, bit
        except CheckpointError:
            noticed += 1
    assert noticed > 0.9 * 8 * len(content)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("kind", ["fifo", "device", "link out", "directory", "loop"])
def test_what_is_no_file_of_the_checkpoint_is_not_opened(tmp_path, name, kind):
    save(tmp_path / "run", 1)
    path = save(tmp_path / "run", 2) / name
    (tmp_path / "elsewhere").write_bytes(path.read_bytes())
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to({"device": "/dev/zero", "link out": tmp_path / "elsewhere", "loop": path}[kind])
    warnings = []
    assert load_newest(tmp_path / "run", warnings.append).manifest.step == 1
    assert name in warnings[0]
    save(tmp_path / "run", 2)  # and it can be replaced
    assert load_newest(tmp_path / "run", fail_with(AssertionError)).manifest.step == 2


def test_all_files_follow_the_users_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        before = os.umask(mask)
        try:
            path = save(tmp_path / f"{mask:o}")
        finally:
            os.umask(before)
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.iterdir()}
        assert modes == {"manifest.json": mode, "model.safetensors": mode, "state.pt": mode}


def test_old_ones_that_cannot_be_removed_do_not_fail_a_save(tmp_path, monkeypatch):
    save(tmp_path, 1)
    warnings = []
    monkeypatch.setattr("hvdtrain.rundir.checkpoints.shutil.rmtree", fail_with(OSError(13, "Permission denied")))
    Checkpoints(tmp_path / "checkpoints").save(
        Manifest(step=2, samples=0, world_size=1),
        {"w": torch.ones(1)},
        {},
        Retention(keep_last=1),
        warn=warnings.append,
    )
    assert "cannot be tidied up" in warnings[0]
    assert pointer(tmp_path) == "step-00000002"


def test_the_manifest_holds_what_it_was_given(tmp_path):
    given = Manifest(step=3, samples=30, world_size=4, val_loss=float("inf"), skipped_in_a_row=2)
    folder = tmp_path / "checkpoints"
    path = Checkpoints(folder).save(given, {"w": torch.ones(1)}, {}, Retention())
    read = read_manifest(path)
    assert dataclasses.replace(read, sha256={}) == given
    assert json.loads((path / "manifest.json").read_text())["format_version"] == 3
