"""The recipe seq2seq on two ranks, and what its run is used for: translated with, exported; ctc on spoken words."""

import importlib.util
import json
import shutil

import pytest
from conftest import REPOSITORY
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


def test_words_that_espeak_speaks_are_learned_and_written_down(called, tmp_path):
    """Real speech, where a synthesiser is at hand; how well it is heard after minutes stands in benchmarks/results."""
    import_transformers()
    for library in ("soundfile", "jiwer", "soxr"):  # espeak-ng speaks at 22,050 Hz
        pytest.importorskip(library)
    if shutil.which("espeak-ng") is None:
        pytest.skip("espeak-ng is not installed")
    spec = importlib.util.spec_from_file_location("spoken_words", REPOSITORY / "benchmarks" / "spoken_words.py")
    spoken_words = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(spoken_words)
    spoken_words.speak(tmp_path / "clips", 16)
    where = ("--data.path", "clips", "--data.cache-dir", "cache", "--run-dir", "run")
    done = called("train", "ctc", *where, "--train.steps", "12", "--train.global-batch-size", "4", "--log.every", "1")
    assert done.code == 0, done.text
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    assert losses[-1] < 0.7 * losses[0]
    assert {"val/wer", "val/cer"} <= lines[-1].keys()
    done = called("predict", "run", "clips/00000.wav")
    assert done.code == 0, done.text
    assert done.out.startswith("clips/00000.wav ")
    said = done.out.removeprefix("clips/00000.wav ").strip()
    done = called("generate", "run", "--file", "clips/00000.wav")
    assert (done.code, done.out.strip()) == (0, said), done.text
    for wrong, message in (([], "give it a clip by --file"), (["--beams", "2"], "--beams is for encoder-decoders")):
        done = called("generate", "run", *wrong)
        assert done.code == 2, done.text
        assert message in done.err
    done = called("export", "run", "--output", "out")
    assert "transformers.AutoModelForCTC.from_pretrained" in done.out
