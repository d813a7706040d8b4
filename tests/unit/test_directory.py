"""A run directory: one run at a time, nothing left by a run that was refused."""

import errno
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from hvdtrain.errors import ConfigError, ResumeError
from hvdtrain.process.run_files import named_checkpoint
from hvdtrain.rundir.directory import RunDirectory

HOLD = """
import sys
from pathlib import Path
from hvdtrain.rundir.directory import RunDirectory
held = RunDirectory(Path(sys.argv[1])).claim()
print("held", flush=True)
sys.stdin.read()
"""


def test_one_run_at_a_time(tmp_path):
    run = RunDirectory(tmp_path / "run")
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, run.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ResumeError, match=rf"another run is training in .*run \(process {other.pid} on"):
        run.claim()
    assert (run.path / "lock").exists()  # it is the other's
    other.communicate("", timeout=120)
    run.claim().release()


def test_a_run_that_was_refused_leaves_no_new_directory(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "new")
    claim = run.claim()
    run.rank_log(0).parent.mkdir()
    run.rank_log(0).write_text("x")
    claim.undo()
    assert [*tmp_path.iterdir()] == []


def test_what_others_put_there_stays(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "new")
    claim = run.claim()
    (run.path / "notes.txt").write_text("mine")
    claim.undo()
    assert [path.name for path in run.path.iterdir()] == ["notes.txt"]
    claim = run.claim()  # now it was there before
    claim.undo()
    assert (run.path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["file/run", "x" * 300, "a\0b"])
def test_a_directory_that_cannot_be_made(tmp_path, name):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --run-dir"):
        RunDirectory(tmp_path / name).claim()


def test_a_directory_that_is_there_and_cannot_be_written_to(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("pathlib.Path.open", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written to \(Read-only file system\): choose another --run-dir"):
        RunDirectory(tmp_path).claim()


@pytest.mark.parametrize("kind", ["fifo", "device", "directory"])
def test_a_lock_that_is_no_file_is_said(tmp_path, kind):
    lock = tmp_path / "lock"
    {"fifo": lambda: os.mkfifo(lock), "device": lambda: lock.symlink_to("/dev/null"), "directory": lock.mkdir}[kind]()
    with pytest.raises(ConfigError, match="lock is no regular file: remove it"):
        RunDirectory(tmp_path).claim()


def test_a_lock_holds_whatever_stands_in_it_and_without_room_for_a_name(tmp_path, monkeypatch):
    (tmp_path / "lock").write_bytes(b"\xff\xfe" * 500)
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    claim = RunDirectory(tmp_path).claim()
    try_it = "import sys; from hvdtrain.rundir.lock import claim; from pathlib import Path; claim(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", try_it, tmp_path], capture_output=True, text=True, check=False)
    assert "another run is training in" in done.stderr
    claim.release()


def test_what_is_written_when_training_begins(tmp_path):
    run = RunDirectory(tmp_path)
    run.begin({"train": {"steps": 3}}, {"ranks": []}, lambda folder: (folder / "config.json").write_text("{}"))
    run.begin({"train": {"steps": 5}}, {"ranks": [1]}, lambda folder: None)
    assert run.config.read_text() == "[train]\nsteps = 5\n"
    assert json.loads(run.environment.read_text()) == {"ranks": [1]}
    assert (run.model / "config.json").exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space"), Exception("No space left on device (os error 28)")]
)
def test_files_of_the_model_are_whole_though_the_disk_is_full_when_a_run_goes_on(tmp_path, error):
    """As tokenizers says it, which is in Rust: it was no OSError, and ended the run; the tokenizer was cut short."""

    def write(folder):
        (folder / "config.json").write_text("new")
        (folder / "tokenizer.json").write_text("half of i")
        raise error

    run = RunDirectory(tmp_path)
    run.begin({}, {}, lambda folder: [(folder / name).write_text("old") for name in ("config.json", "tokenizer.json")])
    with pytest.raises(OSError, match="No space") as caught:
        run.begin({}, {}, write)
    assert caught.value.errno == errno.ENOSPC
    assert {path.name: path.read_text() for path in run.model.iterdir()} == {
        "config.json": "old",
        "tokenizer.json": "old",
    }
    assert not [*tmp_path.glob(".*")]


def test_other_errors_of_who_writes_the_models_files_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError):
        RunDirectory(tmp_path).begin({}, {}, lambda folder: {}["vocabulary"])


def test_model_files_replace_those_of_their_names_and_what_the_dead_left_goes(tmp_path):
    run = RunDirectory(tmp_path)

    def write(folder):
        (folder / "config.json").write_text("old")
        (folder / "templates").mkdir()
        (folder / "templates" / "one.jinja").write_text("old")

    run.begin({}, {}, write)
    (run.model / "mine.txt").write_text("mine")
    (tmp_path / ".model.writing-1").mkdir()
    (tmp_path / ".config.toml.writing-1").write_text("[tra")
    (tmp_path / f".report.html.writing-{os.getpid()}").write_text("now")

    def again(folder):
        (folder / "templates").mkdir()
        (folder / "templates" / "two.jinja").write_text("new")

    run.begin({}, {}, again)
    kept = sorted(str(path.relative_to(run.model)) for path in run.model.rglob("*") if path.is_file())
    assert kept == ["config.json", "mine.txt", "templates/two.jinja"]
    assert [path.name for path in tmp_path.glob(".*")] == [f".report.html.writing-{os.getpid()}"]


def test_odd_pointers_name_nothing(tmp_path):
    folder = tmp_path / "checkpoints"
    assert named_checkpoint(tmp_path) == ""
    folder.mkdir()
    (folder / "latest").write_bytes(b"\xff\xfe" + b"x" * 1000)
    assert len(named_checkpoint(tmp_path)) < 300
    for odd in ("../../etc", "/etc/passwd", "step-good", "step-00000200.bak", "step-0200", ""):
        (folder / "latest").write_text(odd)
        assert RunDirectory(tmp_path).checkpoints.named("latest") is None
    (folder / "latest").write_text("step-00000200\n")
    assert RunDirectory(tmp_path).checkpoints.named("latest") == folder / "step-00000200"


def test_jobs_of_the_same_second_get_different_directories(tmp_path):
    """Many at once: each makes its own, and one that was refused leaves nothing behind."""
    wanted = RunDirectory(tmp_path / "runs" / "lm-20260101-000000")
    with ThreadPoolExecutor(16) as pool:
        claims = list(pool.map(lambda _: wanted.claim_new(), range(16)))
    assert len({claim.folder for claim in claims}) == 16
    assert wanted.path in {claim.folder for claim in claims}
    for claim in claims:
        claim.undo()
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="choose another --run-dir"):
        RunDirectory(tmp_path / "file" / "x").claim_new()
