"""The recipe hf: models of transformers, fine-tuned and from scratch, on conversations and text, and back."""

import json
import sys

import pytest
import torch
from hugging import import_transformers
from safetensors.torch import load_file
from tiny_models import make_config, make_model, make_tokenizer

pytestmark = pytest.mark.beside

DATA = ["--data.path", "chats.jsonl", "--data.val-fraction", "0.2", "--data.sequence-length", "32"]
SHORT = [*DATA, "--train.global-batch-size", "8", "--train.epochs", "2", "--optim.peak-lr", "1e-2"]


@pytest.fixture
def place(tmp_path):
    with (tmp_path / "chats.jsonl").open("w") as file:
        for i in range(200):
            answer = {"role": "assistant", "content": "world " * (i % 7 + 1)}
            file.write(json.dumps({"messages": [{"role": "user", "content": f"hello {i}"}, answer]}) + "\n")
    return tmp_path


def val_losses(run_dir):
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line["val/loss"] for line in lines if "val/loss" in line]


@pytest.mark.parametrize(("family", "ranks"), [("gpt2", 1), ("qwen3", 2)])
def test_fine_tuned_and_loaded_again(hvdtrain, called, place, family, ranks):
    transformers = import_transformers()
    make_model(place / "tiny", family)
    train = ["train", "hf", "--model.path", "tiny", *SHORT, "--eval.every", "10", "--run-dir", "run"]
    done = called(*train) if ranks == 1 else hvdtrain(*train, launcher="horovodrun-mpi", ranks=ranks)
    assert done.code == 0, done.text
    losses = val_losses(place / "run")
    assert losses[-1] < losses[0] < 6
    done = called("export", "run", "--output", "out")
    assert done.code == 0, done.text
    model = transformers.AutoModelForCausalLM.from_pretrained(place / "out")
    newest = (place / "run" / "checkpoints" / "latest").read_text().strip()
    saved = load_file(place / "run" / "checkpoints" / newest / "model.safetensors")
    for name, tensor in model.state_dict().items():
        if name in saved:
            assert torch.equal(tensor, saved[name])
    assert {name for name, _ in model.named_parameters()} <= saved.keys()
    assert transformers.AutoTokenizer.from_pretrained(place / "out").chat_template
    assert model.config.use_cache


def test_from_scratch_on_text_and_made_to_write(called, place):
    make_config("llama").save_pretrained(place / "shape")
    make_tokenizer(place / "shape")
    (place / "text").mkdir()
    for i in range(20):
        (place / "text" / f"{i}.txt").write_text("hello world, how are you\n" * (i + 3))
    train = ["train", "hf", "--model.config", "shape/config.json", *SHORT, "--data.path", "text", "--run-dir", "run"]
    done = called(*train)
    assert done.code == 0, done.text
    done = called("generate", "run", "--prompt", "hello world, how", "--temperature", "0", "--max-tokens", "8")
    assert done.code == 0, done.text
    assert done.out.startswith("hello world, how")


def test_verify(hvdtrain, place):
    make_model(place / "tiny", "llama")
    done = hvdtrain("verify", "hf", "--model.path", "tiny", *SHORT, launcher="mpirun", ranks=2)
    assert done.code == 0, done.text
    assert "all checks passed, 0 warnings" in done.out


def test_mistakes(called, place, monkeypatch):
    make_model(place / "tiny", "llama")
    for arguments, message in (
        ([], "give --model.path, a model to begin with, or --model.config"),
        (["--model.path", "nowhere/here"], "no tokenizer comes from nowhere/here"),
    ):
        done = called("train", "hf", *SHORT, *arguments)
        assert done.code == 2, done.text
        assert message in done.err
    monkeypatch.setitem(sys.modules, "transformers", None)  # whose import now fails
    done = called("train", "hf", *SHORT, "--model.path", "tiny")
    assert done.code == 2, done.text
    assert "pip install 'hvdtrain[hf]'" in done.err
    assert not (place / "runs").exists()
