"""The verb `plan`, as a user starts it."""

import json
import re

import pytest

from hvdtrain import cli

SMALL = ["--model.num-layers", "2", "--model.hidden-size", "64", "--data.sequence-length", "32", "--noise-steps", "6"]


@pytest.mark.alone
@pytest.mark.parametrize(("launcher", "ranks"), [(None, 1), ("horovodrun-gloo", 2), ("mpirun", 4)])
def test_plan(hvdtrain, tmp_path, small_text, launcher, ranks):
    asked = ["plan", "lm", "--data.path", small_text, *SMALL, "--output", "out", "--to", "16", "--price", "2"]
    done = hvdtrain(*asked, launcher=launcher, ranks=ranks)
    assert done.code == 0, done.text
    assert "gradient noise scale" in done.out
    assert "recommended: " in done.out or "no recommendation: a step of" in done.out  # a busy machine
    values = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert [row["workers"] for row in values["rows"]] == [n for n in (1, 2, 4) if n <= ranks]
    assert "the network between hosts" in values["unknown"] or ranks == 1
    assert values["facts"]["alone"]["forward_s"] > 0
    assert values["facts"]["alone"]["backward_s"] > 0
    readiness = [bucket["ready"] for bucket in values["facts"]["buckets"]]
    assert 0 < readiness[0] <= readiness[-1] <= 1
    assert "<figure" in (tmp_path / "out" / "plan.html").read_text()
    if ranks == 1:
        assert "--link" in done.out
    else:
        assert values["facts"]["network"]["controller"] == ("gloo" if "gloo" in launcher else "mpi")
        assert ("plain MPI takes" in done.out) == ("gloo" not in launcher)
    if ranks == 4:  # once more without a launcher, for a network that one does not have
        again = hvdtrain("plan", "--from", "out", "--to", "32", "--link", "25gbit,5us", "--ranks-per-host", "2")
        assert again.code == 0, again.text
        assert re.search(r"^[> ] +32 ", again.out, re.MULTILINE)
    assert not (tmp_path / "runs").exists()


@pytest.mark.beside
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "--from", "nowhere"], "--from nowhere cannot be read"),
        (["plan", "lm", "--noise-from", "nowhere"], "--noise-from nowhere cannot be read"),
        (["plan", "lm", "--to", "0"], "--to = 0 must be greater than 0"),
        (["plan", "--from", ".", "--train.steps", "5"], "--train.steps has no effect beside --from"),
        (["plan", "--from", ".", "--config", __file__], "--config has no effect beside --from"),
        (["plan", "--from", ".", "--noise-steps", "5"], "--noise-steps has no effect beside --from"),
        (["plan", "lm", "--noise-from", ".", "--noise-steps", "5"], "--noise-steps has no effect beside --noise-from"),
        (["plan", "lm", "--ranks-per-host", "2"], "--ranks-per-host has no effect without --link"),
        (["plan", "lm", "--price", "1e10"], "--price = 10000000000.0 must be "),
        (
            ["sweep", "lm", "--train.seed", "0,1", "--sweep.metric", ""],
            "--sweep.metric '' is none: give an evaluation's, as val",
        ),
        (["sweep", "lm", "--train.seed", "0,1", "--sweep.metric", "state"], "--sweep.metric 'state' is none"),
        (["sweep", "lm", "--train.seed", "0,1", "--dry-run", "--launcher", "'x"], "has a quotation mark too few"),
        (["sweep", "lm", "--train.seed", "0,1", "--dry-run", "--launcher", ""], "--launcher is empty"),
        (["plan", "lm", "--link", "0gbit,5us"], "--link 0gbit,5us: the rate must be from 1kbit"),
        (["generate", ".", "--temperature", "0", "--top-k", "3"], "--top-k has no effect: --temperature 0 takes"),
        (["plan", "lm", "--too", "8"], "there is no flag '--too'; did you mean '--to'?"),
    ],
)
def test_mistakes(arguments, message, capsys, monkeypatch):
    """In this process: they are told before anything starts, but for the variables that each start sets."""
    monkeypatch.setenv("HOROVOD_FUSION_THRESHOLD", "0")
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err
