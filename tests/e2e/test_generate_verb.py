"""A language model's way: trained, exported, read by transformers, trained further, and made to write."""

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import environment
from hugging import import_transformers

pytestmark = pytest.mark.beside

SHAPE = ["--model.num-layers", "1", "--model.hidden-size", "32", "--model.num-heads", "2"]
SHORT = ["--train.steps", "12", "--data.sequence-length", "32", "--optim.warmup-steps", "0"]
SHORT += ["--train.global-batch-size", "4"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, small_text):
    """A run of two ranks with a BPE of its own, and its export."""
    folder = tmp_path_factory.mktemp("trained")
    questions = [{"context": "import ", "choices": ["os", "zzz"], "answer": i % 2} for i in range(5)]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    train = [
        "train",
        "lm",
        "--data.path",
        small_text,
        "--data.tokenizer",
        "bpe",
        "--data.vocab-size",
        "300",
        *SHAPE,
        *SHORT,
    ]
    train += ["--eval.choices", "questions.jsonl"]
    for command in (
        ["horovodrun", "-np", "2", sys.executable, "-m", "hvdtrain", *train, "--run-dir", "run"],
        [sys.executable, "-m", "hvdtrain", "export", "run", "--output", "out"],
    ):
        done = subprocess.run(
            [str(word) for word in command], cwd=folder, env=environment(), capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert "transformers.AutoModelForCausalLM.from_pretrained('out')" in done.stdout
    return folder


def test_transformers_writes_the_same(hvdtrain, called, trained):
    transformers = import_transformers()
    model = transformers.AutoModelForCausalLM.from_pretrained(trained / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(trained / "out")
    prompt = "def close(self):"
    tokens = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt)["input_ids"]]])
    theirs = model.generate(tokens, do_sample=False, max_new_tokens=16, pad_token_id=0)[0, tokens.shape[1] :]
    for where, run in (("run", hvdtrain), ("out", called)):
        asked = ["generate", trained / where, "--prompt", prompt, "--temperature", "0", "--max-tokens", "16"]
        done = run(*asked)
        assert done.code == 0, done.text
        assert done.out == f"{prompt}{tokenizer.decode(theirs, skip_special_tokens=True)}\n"
        assert re.fullmatch(r"\d+ tokens in [\d.]+ s: [\d,]+ tokens/s\n", done.err)


def test_questions_are_answered_on_all_ranks(trained):
    """Five questions on two ranks; the same question with either answer, so that three or two of five are right."""
    last = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["val/choice_accuracy"] in (0.4, 0.6)
    assert last["val/choice_accuracy_per_byte"] in (0.4, 0.6)
    assert last["val/perplexity"] > 1


def test_several_prompts_and_the_cache(called, trained):
    asked = ["generate", "run", "--prompt", "import os", "class A", "--max-tokens", "40", "--seed", "3"]
    with_cache = called(*asked, cwd=trained)
    without = called(*asked, "--no-cache", cwd=trained)
    assert with_cache.out == without.out
    assert with_cache.out.startswith("--- 1\nimport os")
    assert "\n--- 2\nclass A" in with_cache.out


def test_training_goes_on_from_an_export(called, trained, small_text):
    train = ["train", "lm", "--data.path", small_text, *SHORT, "--model.init-from", "out", "--run-dir", "further"]
    refused = called(*train, *SHAPE, cwd=trained)
    assert refused.code == 2
    assert "--model.num-layers has no effect: the model in --model.init-from out has a shape of its own" in refused.err
    done = called(*train, "--log.every", "1", cwd=trained)
    assert done.code == 0, done.text
    assert "vocabulary 300" in done.out
    assert "num_layers = 1" in (trained / "further" / "config.toml").read_text()

    def losses(run):
        lines = map(json.loads, (trained / run / "metrics.jsonl").read_text().splitlines())
        return [line["train/loss"] for line in lines if "train/loss" in line]

    assert losses("further")[0] == pytest.approx(losses("run")[-1], abs=0.5)  # where the first run ended
    assert losses("further")[0] < torch.tensor(300.0).log() - 0.3  # not where a new model begins


def test_mistakes(called, trained, small_text, tmp_path):
    done = called("export", "run", "--output", "out", cwd=trained)
    assert done.code == 2
    assert "out is not empty: choose another --output, or give --overwrite" in done.err
    assert called("export", "run", "--output", "out", "--overwrite", "--dtype", "bfloat16", cwd=trained).code == 0
    assert json.loads((trained / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert called("export", "run", "--output", "out", "--overwrite", cwd=trained).code == 0
    for arguments, message in (
        (["generate", tmp_path], "neither a run's directory"),
        (["generate", trained / "run", "--checkpoint", "3"], "no checkpoint '3': there are of steps 12"),
        (["generate", trained / "run", "--top-p", "2"], "--top-p = 2.0 must be greater than 0 and at most 1"),
        (["train", "lm", "--data.path", small_text, "--model.init-from", tmp_path], "config.json cannot be read"),
    ):
        done = called(*arguments)
        assert done.code == 2, done.text
        assert message in done.err


def test_a_dry_run_allocates_nothing_and_says_what_it_would_take(called, tmp_path):
    """The weights alone of a model of 1 billion parameters are larger than the memory that the process may have."""
    script = tmp_path / "small.py"
    script.write_text(
        "import resource, sys\n"
        "from hvdtrain.cli import main\n"
        "code = main(sys.argv[1:])\n"
        "assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20, 'KiB'\n"
        "sys.exit(code)\n"
    )
    asked = ["train", "lm-1b", "--data.tokenizer", "byte", "--train.global-batch-size", "1", "--dry-run"]
    done = subprocess.run(
        [sys.executable, script, *asked, "--health.no-memory-check"],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "973,672,448 parameters" in done.stdout
    assert "16 x model.layers.*.self_attn.k_proj.weight (512, 2048)" in done.stdout
    assert re.search(
        r"memory: +[\d.]+ GiB a rank: weights 3.63 GiB, gradients 3.63 GiB, optimizer 7.25 GiB", done.stdout
    )
    assert not list(tmp_path.glob("runs"))
    refused = called(*asked, "--model.hidden-size", "65536", "--model.num-heads", "64")
    assert refused.code == 2
    assert "training needs about" in refused.err
    assert "--train.precision bf16-true" in refused.err
