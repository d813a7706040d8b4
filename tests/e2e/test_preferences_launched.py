"""Preferences with adapters, as a user trains them: on two ranks, and what is refused."""

import pytest
from adapters import import_peft, make_place, settings

pytestmark = pytest.mark.beside


@pytest.fixture
def place(tmp_path):
    import_peft()
    return make_place(tmp_path)


def arguments(place, **more):
    given = settings(place, "pairs.jsonl", **more)
    flat = {f"{section}.{name}": value for section, values in given.items() for name, value in values.items()}
    words = {name.replace("_", "-"): value for name, value in flat.items() if value is not None}
    return [word for name, value in words.items() for word in (f"--{name}", str(value))]


def test_two_ranks_train_as_one(hvdtrain, place):
    """In fp64 to the last digits, resumed bitwise, with dropout: checks 2 and 6."""
    given = arguments(place, lora_rank=2, lora_dropout=0.1)
    done = hvdtrain("verify", "dpo", *given, "--steps", "2", launcher="mpirun", ranks=2, timeout=300)
    assert done.code == 0, done.text
    assert "all checks passed, 0 warnings" in done.out
    assert "are trained, sent and saved" in done.out
    assert "reference:  the base model, computed once" in done.out


def test_a_dry_run_says_what_frozen_weights_save(called, place):
    done = called("train", "dpo", *arguments(place, lora_rank=2), "--dry-run")
    assert done.code == 0, done.text
    assert "frozen:     were nothing frozen, it would be" in done.out
    sent = next(line for line in done.out.splitlines() if line.startswith("network:"))
    assert "7.25 KiB of gradients" in sent  # two numbers for each side of 14 layers
    assert "activations unknown" not in done.out


def test_mistakes(called, place):
    for more, message in (
        (["--model.lora-targets", "nothing"], "this model's linear layers are"),
        (["--data.path", "chats.jsonl"], "chats.jsonl, line 1: a preference has the fields 'chosen', 'rejected'"),
        (["--dpo.beta", "0"], "--dpo.beta = 0.0 must be greater than 0"),
    ):
        done = called("train", "dpo", *arguments(place, lora_rank=2), *more)
        assert done.code == 2, done.text
        assert message in done.err
        assert "Traceback" not in done.text
    assert not (place / "runs").exists()
