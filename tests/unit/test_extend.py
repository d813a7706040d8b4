"""The program that docs/extend.md is."""

import os
import re
from pathlib import Path

import pytest

from hvdtrain import cli

PAGE = Path(__file__).parents[2] / "docs" / "extend.md"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Put back the variables that a start sets for its process."""
    for name in ("HOROVOD_FUSION_THRESHOLD", "MKL_NUM_THREADS", "OMPI_MCA_mpi_yield_when_idle"):
        monkeypatch.setenv(name, os.environ.get(name, "0"))


def test_the_page_is_a_program_that_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "VERBS", dict(cli.VERBS))
    code = "\n\n".join(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL))
    names = {"__name__": "extend"}
    exec(compile(code, str(PAGE), "exec"), names)
    lines = (tmp_path / "runs" / "watched" / "metrics.jsonl").read_text()
    assert '"train/longest_step"' in lines
    assert (tmp_path / "runs" / "curve" / "config.toml").read_text().count("points = 100") == 1
    assert "count RECIPE" in cli.parse(["--help"])
    assert "finished" in capsys.readouterr().out
    assert names["optimizer"].codec is None or names["world"].size == 1


def test_the_files_of_the_table_exist():
    root = PAGE.parents[1]
    named = re.findall(r"`((?:tests|recipes|trainer|rundir|optim|world|verbs)/[\w/]+\.py)`", PAGE.read_text())
    missing = [name for name in named if "NAME" not in name]
    missing = [name for name in missing if not (root / name).exists() and not (root / "hvdtrain" / name).exists()]
    assert missing == []
