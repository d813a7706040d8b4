"""Verbs that only read what was trained are answered by one process, whatever starts how many."""

import os
import subprocess
import sys

import pytest
from builds import script

from hvdtrain import cli
from hvdtrain.process import stray

MORE = {"compare": ["none"], "predict": ["7.png"]}
READING = sorted(verb for verb, made in cli.VERBS.items() if made.is_for_one)


def test_they_are_those_that_are_given_a_run():
    assert READING == ["compare", "export", "generate", "predict", "report", "watch"]


@pytest.mark.parametrize("verb", READING)
def test_rank_0_alone_answers(verb, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "7.png").touch()
    launcher = script(tmp_path / "mpirun", '"$@"')
    codes, texts = [], []
    for rank in ("0", "1"):
        place = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        environ = {**os.environ, **place, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "PMIX_RANK": rank}
        words = [launcher, sys.executable, "-m", "hvdtrain", verb, "none", *MORE.get(verb, [])]
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
        codes.append(done.returncode)
        texts.append(done.stdout + done.stderr)
    assert codes == [2, 0], texts
    assert texts[0].startswith("hvdtrain: ")
    assert texts[1] == ""


@pytest.mark.parametrize("launcher", stray._SIGNS)
@pytest.mark.parametrize("words", [["report", "."], ["--help"], ["train", "nothing"]])
def test_a_rank_that_nothing_has_started_is_not_silent(launcher, words, tmp_path):
    """What a launcher sets may be left in a shell: by hand, by another job."""
    names = [name for name in stray._SIGNS[launcher] if "OMPI" not in name or launcher == "mpirun"]
    environ = {name: value for name, value in os.environ.items() if name not in sum(stray._SIGNS.values(), ())}
    environ |= {name: "4" if name.endswith(("SIZE", "STEP_ID")) else "1" for name in names}
    command = [sys.executable, "-m", "hvdtrain", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    if words != ["train", "nothing"]:
        assert f"rank 0 answers, and this is rank 1 of {'4' if launcher != 'srun' else '1'};" in done.stderr
        assert done.stderr.endswith(f"if none has started it, unset {' '.join(names)}\n")
    else:
        assert "there is no recipe 'nothing'" in done.stderr
