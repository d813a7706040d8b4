"""The verb `bench`, as a user starts it."""

import json

import pytest
from conftest import REPOSITORY

RECIPE = REPOSITORY / "tests" / "support" / "faulty_recipe.py"


@pytest.mark.alone
@pytest.mark.parametrize(("launcher", "ranks"), [(None, 1), ("mpirun", 2)])
def test_the_parts_are_the_whole(hvdtrain, tmp_path, launcher, ranks):
    arguments = ("--steps", "4", "--rounds", "2", "--pause", "0.1", "--json", "answer.json", "--no-knobs")
    done = hvdtrain("bench", RECIPE, *arguments, launcher=launcher, ranks=ranks)
    assert done.code == 0, done.text
    answer = json.loads((tmp_path / "answer.json").read_text())
    (row,) = answer["variants"]
    assert sum(row["parts_s"].values()) == pytest.approx(row["step_s"], rel=0.3)
    assert row["parts_s"]["forward"] > 0.1  # the pause lies there, and is most of a step on any machine
    assert row["samples_per_s"] == pytest.approx(16 / row["step_s"])
    # 8 x 32 and 32 x 1 weights, 2 operations each, 3 passes, 16 samples
    assert answer["flops_per_step"] == 3 * 2 * 16 * (8 * 32 + 32)
    assert answer["ranks"] == ranks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answer.json"]


def test_knobs_are_measured_side_by_side(hvdtrain, tiny_lm):
    """But for torch.compile, which takes most of a minute and is tried in tests/ranks: here it does nothing."""
    off = {"TORCHDYNAMO_DISABLE": "1"}
    fast = ("--steps", "1", "--rounds", "1", "--warmup", "1", "--train.precision", "bf16")
    done = hvdtrain("bench", "lm", *tiny_lm[2:], *fast, launcher="mpirun", ranks=2, timeout=300, **off)
    assert done.code == 0, done.text
    for knob in (
        "as it is",
        "--model.compile blocks",
        "--comm.bucket-mib 1",
        "--comm.compression fp16",
        "accumulation 4",
        "--optim.kernel foreach",
    ):
        assert knob in done.out
    assert "MFU" in done.out


@pytest.mark.beside
def test_mistakes_are_one_message(hvdtrain):
    done = hvdtrain("bench", RECIPE, "--rounds", "0")
    assert done.code == 2
    assert "--rounds = 0 must be at least 1" in done.err
    assert "Traceback" not in done.text
