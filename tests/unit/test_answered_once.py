"""Verbs that only read what was trained are answered by one process, whatever starts how many."""

import os
import subprocess
import sys

import pytest

from hvdtrain import cli

MORE = {"compare": ["none"], "predict": ["7.png"]}
READING = sorted(verb for verb, made in cli.VERBS.items() if made.is_for_one)


def test_they_are_those_that_are_given_a_run():
    assert READING == ["compare", "export", "generate", "predict", "report", "watch"]


@pytest.mark.parametrize("verb", READING)
def test_rank_0_alone_answers(verb, tmp_path):
    (tmp_path / "none").mkdir()
    (tmp_path / "7.png").touch()
    codes, texts = [], []
    for rank in ("0", "1"):
        place = {"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
        environ = {**os.environ, **place, "OMPI_COMM_WORLD_LOCAL_RANK": rank, "PMIX_RANK": rank}
        words = [sys.executable, "-m", "hvdtrain", verb, "none", *MORE.get(verb, [])]
        done = subprocess.run(words, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=120)
        codes.append(done.returncode)
        texts.append(done.stdout + done.stderr)
    assert codes == [2, 0], texts
    assert texts[0].startswith("hvdtrain: ")
    assert texts[1] == ""
