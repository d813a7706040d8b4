"""The examples of docs/examples: short, and run on two ranks."""

import importlib.util
import json
import re
import sys

import pytest
from conftest import LAUNCHERS, REPOSITORY
from run_examples import RECIPES, SCRIPTS

EXAMPLES = REPOSITORY / "docs" / "examples"


def test_each_is_short_and_known_to_this_test():
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file())
    assert files == sorted([*(f"{name}.py" for name in {**SCRIPTS, **RECIPES}), "notebook.ipynb"])
    for name in files:
        assert len((EXAMPLES / name).read_text().splitlines()) <= 100, name


def test_on_two_ranks(run):
    start = [word.format(n=2) for word in LAUNCHERS["horovodrun-mpi"]]
    done = run(*start, sys.executable, REPOSITORY / "tests" / "support" / "run_examples.py", EXAMPLES, timeout=300)
    assert done.code == 0, done.text[-5000:]
    line = re.search(r"y = ([\d.]+) x \+ (-[\d.]+), loss [\d.]+ on 2 ranks", done.text)
    assert float(line[1]) == pytest.approx(3, abs=0.5)
    radius = re.search(r"epoch 30: mean radius of what is generated ([\d.]+)", done.text)
    assert 0.7 < float(radius[1]) < 1.3
    alone = run(sys.executable, EXAMPLES / "gan.py", "alone.pt")
    assert radius[0] in alone.out, alone.text  # two optimizers, their epochs: one process trains the same
    spirals = re.search(r"epoch 4: ([\d.]+)% of the held-out points", done.text)
    assert float(spirals[1]) > 85
    accuracy = re.search(r"epoch 4: accuracy ([\d.]+)", done.text)
    assert float(accuracy[1]) > 0.85
    assert float(re.search(r"images \{.*'val/accuracy': ([\d.]+)", done.text)[1]) > 0.5
    assert float(re.search(r"reversing \{.*'val/right': ([\d.]+)", done.text)[1]) > 0.1
    assert float(re.search(r"own_optimizer \{'val/loss': ([\d.]+)", done.text)[1]) < 0.2
    keras = re.search(r"keras_model \{.*'val/accuracy': ([\d.]+)", done.text)
    assert float(keras[1]) > 0.85 if importlib.util.find_spec("keras") else keras is None


def test_the_notebook(run, tmp_path):
    """Its cells, one after the other, as a notebook runs them."""
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    (tmp_path / "cells.py").write_text("\n".join(cells))
    done = run(sys.executable, "cells.py")
    assert done.code == 0, done.text
    assert re.search(r"\[\(0, 2\.\d+\), \(1, 2\.\d+\)\]", done.out)
