"""What lies where a user starts us hides no module of Python's or of a library's; where nothing lies, that is said."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import hvdtrain
from hvdtrain.process.working_directory import for_launcher, module_command, search_last

CODE = Path(hvdtrain.__file__).parents[1]
LIBRARIES = ("torch", "numpy", "rich", "safetensors", "tokenizers", "tomli_w", "tqdm", "transformers", "horovod")
# Those of other systems aside, which are asked for where they are not.
NAMES = {name for name in {*sys.stdlib_module_names, *LIBRARIES} - {"distutils"} if find_spec(name)}
RECIPE = """
import hvdtrain, torch
from own_module import LENGTH

class Sum(hvdtrain.Recipe):
    def build(self, say):
        x = torch.randn(LENGTH, 4)
        data = torch.utils.data.TensorDataset(x, x.sum(1))
        return hvdtrain.Task(model=torch.nn.Linear(4, 1), train_data=data, val_data=data, loss_sums=sums)

def sums(model, batch):
    return {"loss": (model(batch[0]).squeeze(1) - batch[1]).square().sum()}

def recipe():
    return Sum(train=hvdtrain.TrainConfig(steps=2, global_batch_size=4))
"""


def hide(folder, names):
    """Write a file of each of these names, which ends whatever program imports it."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} is the one of the working directory')\n")
    return folder


def run(*command, cwd, **variables):
    keep = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environ = {**keep, "PYTHONPATH": str(CODE), **variables}
    return subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True, timeout=120)


def test_python_m_looks_there_last(tmp_path):
    """All names of Python's library but those that Python itself imports before it comes to us."""
    (tmp_path / "own.py").write_text("import sys; print(*sys.modules)")
    loaded = {*run(sys.executable, "-m", "own", cwd=tmp_path).stdout.split()}
    assert "random" not in loaded
    folder = hide(tmp_path / "work", NAMES - loaded - {"__future__"})
    done = run(sys.executable, "-m", "hvdtrain", "--help", cwd=folder)
    assert (done.returncode, done.stderr) == (0, "")
    assert "usage: " in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 always looks there first for what -m names")
def test_ranks_and_workers_look_there_last_and_find_the_users_modules(tmp_path, monkeypatch):
    folder = hide(tmp_path / "work", NAMES)
    monkeypatch.chdir(folder)
    (folder / "own_module.py").write_text("LENGTH = 8\n")
    (folder / "mine.py").write_text(RECIPE)
    words = ["train", "mine.py", "--data.workers", "1", "--run-dir", "run"]
    done = run(*module_command("hvdtrain"), *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "finished in" in done.stdout
    done = run(*module_command("hvdtrain"), *words, cwd=folder, PYTHONSAFEPATH="1")
    assert done.returncode == 2
    assert "No module named 'own_module'" in done.stderr


def test_what_is_meant_for_a_launcher_ends_with_its_ranks(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    given = for_launcher(module_command("hvdtrain"))
    assert bool(given) is (sys.version_info >= (3, 11))
    assert for_launcher([sys.executable, "own.py"]) == {}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "path", ["/library"])
    search_last()
    assert sys.path == ["/library", str(tmp_path)]
    assert not {*given} & {*os.environ}


@pytest.mark.parametrize("first", ["", "{here}", "/somewhere/bin"])
def test_the_working_directory_is_the_last_place(monkeypatch, tmp_path, first):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    monkeypatch.setattr(sys, "path", [first.format(here=tmp_path), "/library"])
    search_last()
    search_last()
    assert sys.path == [*(["/somewhere/bin"] if "bin" in first else []), "/library", str(tmp_path)]


def test_where_it_is_left_as_it_is(monkeypatch, tmp_path):
    """A clone that may be found by nothing else, and a user who wants nothing of the working directory."""
    for folder, safe in ((CODE, ""), (tmp_path, "1")):
        monkeypatch.chdir(folder)
        monkeypatch.setenv("PYTHONSAFEPATH", safe)
        monkeypatch.setattr(sys, "path", ["", "/library"])
        search_last()
        assert sys.path == ["", "/library"]


@pytest.mark.parametrize("words", [["--help"], ["-np", "2", "train", "lm"], ["setup"]])
def test_a_working_directory_that_is_gone_is_told(tmp_path, words):
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    done = run("sh", "-ec", script, "sh", sys.executable, "-m", "hvdtrain", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("hvdtrain: the working directory has been deleted: cd")
    assert "Traceback" not in done.stderr
