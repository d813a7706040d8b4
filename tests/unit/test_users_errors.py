"""A bug in a user's recipe file: one sentence first that names his line, his part of the stack, an exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from broken_recipes import PLACES, line_of

from hvdtrain.process.stop import StoppedEarly
from hvdtrain.process.tracebacks import place_of, sentence_of, stack_of
from hvdtrain.recipes import load_recipe

SCRIPT = Path(__file__).parents[1] / "support" / "broken_recipes.py"


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """How each ended: exit code, output, error output."""
    command = [sys.executable, SCRIPT, tmp_path_factory.mktemp("broken")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", PLACES)
def test_the_first_line_names_the_users_line(ends, kind):
    code, out, err = ends[kind]
    is_before_training = kind in ("import", "syntax", "top", "exit", "recipe")
    assert code == (2 if is_before_training else 1), err
    (first,) = [line for line in err.splitlines() if line.startswith("hvdtrain: ")]
    function = PLACES[kind][2]
    assert f"mine.py, line {line_of(kind)}{function and f', in {function}'}" in first
    assert "hvdtrain: " not in out
    if is_before_training:
        assert err.startswith("hvdtrain: ")
        assert out == ""


@pytest.mark.parametrize("kind", PLACES)
def test_the_stack_is_the_users_own(ends, kind):
    _, _, err = ends[kind]
    if kind not in ("syntax", "exit"):
        assert f'mine.py", line {line_of(kind)}' in err
    assert "/hvdtrain/" not in err.replace(str(SCRIPT.parent), "")
    if kind == "library":  # what he called stays in it: he needs to see which call it was
        assert "torch.zeros(2) + torch.zeros(3)" in err


def raised(action):
    with pytest.raises(Exception) as caught:  # noqa: PT011  whatever it is
        action()
    return caught.value


def test_an_exception_of_hvdtrains_own_keeps_its_whole_stack():
    own = compile("1 / 0", sentence_of.__code__.co_filename, "exec")
    error = raised(lambda: exec(own))
    assert "exec(own)" in stack_of(error)
    assert place_of(error).endswith(", in <lambda>")
    while error.__traceback__.tb_next:
        error = error.with_traceback(error.__traceback__.tb_next)
    assert place_of(error) == ""
    assert sentence_of(error) == "ZeroDivisionError: division by zero"
    assert "tracebacks.py" in stack_of(error)


def test_a_signal_while_a_file_is_read_is_no_error_of_it(tmp_path):
    file = tmp_path / "slow.py"
    file.write_text(
        "from hvdtrain.process.stop import StoppedEarly\nraise StoppedEarly('SIGTERM')\ndef recipe(): ...\n"
    )
    with pytest.raises(StoppedEarly):
        load_recipe(str(file))


class WordlessError(Exception):
    """A user's class, which cannot say what it has to say, and is equal to everything."""

    def __str__(self):
        raise RuntimeError("no words")

    def __eq__(self, other):
        raise RuntimeError("not to be compared")

    __hash__ = None


def test_an_exception_that_cannot_be_shown_is_named():
    def fail():
        try:
            raise WordlessError
        except WordlessError as first:
            raise WordlessError from first

    error = raised(fail)
    assert sentence_of(error).startswith("WordlessError: its message cannot be shown, since that raises RuntimeError (")
    assert "in fail" in sentence_of(error)
    assert "WordlessError" in stack_of(error)


@pytest.mark.parametrize(
    ("code", "expected", "is_said"),
    [
        ("os._exit(0)", 1, True),
        ("os._exit(3)", 3, False),
        ("os._exit(75)", 75, False),
        ("os.fork() or os._exit(0); os.wait()", 0, False),
        (
            "process = multiprocessing.get_context('fork').Process(target=int); process.start(); process.join()",
            0,
            False,
        ),
    ],
)
def test_no_process_ends_in_silence_as_if_its_run_had_finished(code, expected, is_said):
    program = "import multiprocessing, os\nfrom hvdtrain.process.early_end import never_silent\nbefore = os._exit\n"
    program += f"with never_silent():\n    {code}\nassert os._exit is before"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == expected, done.stderr
    assert ("ended this process by os._exit(0), and the run has not finished" in done.stderr) == is_said


LEAVES = """
import os, torch, hvdtrain

class Sum(hvdtrain.Recipe):
    def build(self, say):
        data = hvdtrain.TensorSamples(torch.randn(32, 4))
        return hvdtrain.Task(model=torch.nn.Linear(4, 1), train_data=data, val_data=data, loss_sums=leave)

def leave(model, batch):
    os._exit(0)

def recipe():
    return Sum(train=hvdtrain.TrainConfig(steps=8, global_batch_size=8))
"""


def test_train_says_that_it_was_left(tmp_path):
    (tmp_path / "mine.py").write_text(LEAVES)
    command = [sys.executable, "-m", "hvdtrain", "train", "mine.py", "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert (done.returncode, "by os._exit(0)" in done.stderr) == (1, True), done.stdout + done.stderr


def test_a_gpu_without_memory_is_told_with_what_needs_less(tmp_path):
    words = "CUDA out of memory. Tried to allocate 6.00 GiB. GPU 0 has a total capacity of 79.11 GiB"
    raises = f'raise torch.OutOfMemoryError("{words}") if model.training else ValueError()'
    (tmp_path / "mine.py").write_text(LEAVES.replace("os._exit(0)", raises))
    command = [sys.executable, "-m", "hvdtrain", "train", "mine.py", "--run-dir", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hvdtrain: ")]
    assert words in lines[0]
    assert "--train.micro-batch-size" in lines[1]
    assert "--dry-run says what a rank needs" in lines[1]
