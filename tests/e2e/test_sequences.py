"""The recipe seq2seq on two ranks, and what its run is used for: translated with, exported."""

import json

import pytest
from hugging import import_transformers

pytestmark = pytest.mark.beside


def test_trained_on_two_ranks_and_translated_with(hvdtrain, called, tmp_path):
    transformers = import_transformers()
    pytest.importorskip("sacrebleu")
    (tmp_path / "pairs.tsv").write_text("".join(f"{n}\t{n} {n}\n" for n in range(10, 90)))
    done = hvdtrain(
        *("train", "seq2seq", "--data.path", "pairs.tsv", "--data.vocab-size", "300", "--train.steps", "6"),
        *("--train.global-batch-size", "10", "--data.max-target-length", "12", "--run-dir", "run"),
        *("--data.cache-dir", "cache", "--eval.beams", "2"),
        launcher="mpirun",
        ranks=2,
    )
    assert done.code == 0, done.text
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"val/bleu", "val/chrf", "val/loss"} <= last.keys()
    (tmp_path / "lines.txt").write_text("11\n\n25\n")
    done = called("generate", "run", "--file", "lines.txt", "--max-tokens", "6")
    assert done.code == 0, done.text
    assert done.out.count("\n") == 3
    assert done.out.split("\n")[1] == ""
    done = called("generate", "run", "--prompt", "11", "--temperature", "0")
    assert done.code == 2, done.text
    assert "--temperature is for language models" in done.err
    done = called("export", "run", "--output", "out")
    assert done.code == 0, done.text
    assert "transformers.AutoModelForSeq2SeqLM.from_pretrained" in done.out
    transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
