"""Preferences with adapters, as a user trains them: on two ranks, and what is refused."""

import shutil

import pytest
from adapters import import_peft, make_place, settings
from safetensors.torch import load_file

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


def test_gone_on_with_on_another_number_of_ranks_and_used(hvdtrain, called, place):
    """Trained on two ranks; from the middle of an epoch once more, by one; written with, and exported both ways."""
    given = arguments(place, lora_rank=2, lora_dropout=0.1)
    done = hvdtrain("train", "dpo", *given, "--run-dir", "run", launcher="mpirun", ranks=2, timeout=300)
    assert done.code == 0, done.text
    assert "are trained, sent and saved" in done.out
    assert "reference:  the base model, computed once" in done.out
    saved = place / "run" / "checkpoints"
    of_two = load_file(saved / "step-00000006" / "model.safetensors")
    shutil.rmtree(saved / "step-00000006")
    (saved / "latest").write_text("step-00000003\n")
    done = called("train", "dpo", *given, "--run-dir", "run")
    assert done.code == 0, done.text
    of_one = load_file(saved / "step-00000006" / "model.safetensors")
    assert of_one.keys() == of_two.keys()
    assert max(float((of_one[name] - of_two[name]).abs().max()) for name in of_one) < 1e-4
    said = set()
    for folder, more in (("run", ()), ("adapters", ()), ("merged", ("--merged",))):
        if folder != "run":
            done = called("export", "run", "--output", folder, *more)
            assert done.code == 0, done.text
        done = called("generate", folder, "--chat", "--prompt", "hello 3", "--temperature", "0", "--max-tokens", "6")
        assert done.code == 0, done.text
        said.add(done.out)
    assert len(said) == 1
    done = called("train", "dpo", *given, "--model.path", "adapters", "--data.tokenizer", "tiny")
    assert done.code == 2, done.text
    assert "adapters holds adapters, not a whole model: export them with --merged" in done.err


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
