"""Adapters and preferences on a tiny model, made here: what they cost, and what they reach.

    python benchmarks/adapters.py

A base model learns to write numbers below 10,000 in words, in one of two styles at random: plain, or as a sentence. It
is then fine-tuned to be plain, with all weights and with adapters (--model.lora-rank), and taught by preferences (dpo)
that plain is better. One rank, nothing is downloaded. Times are of the processor: others may use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]
os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}  # threads that wait would count as work

import machine  # noqa: E402
from tiny_models import make_tokenizer  # noqa: E402

import hvdtrain  # noqa: E402
from hvdtrain.verbs.export import export  # noqa: E402
from hvdtrain.verbs.options import ExportOptions  # noqa: E402

UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += [f"{name}teen" for name in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
TENS = [f"{name}ty" for name in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]
RANK = 8
STEPS = 40


def words(n: int) -> str:
    """Return a number below 10,000 in words."""
    if n < 20:
        return UNITS[n]
    if n < 100:
        return TENS[n // 10 - 2] + (f" {UNITS[n % 10]}" if n % 10 else "")
    size, name = (1000, "thousand") if n >= 1000 else (100, "hundred")
    return f"{UNITS[n // size]} {name}" + (f" {words(n % size)}" if n % size else "")


def styles(n: int) -> tuple[str, str]:
    """Return both answers for a number: plain, and as a sentence."""
    return words(n), f"the number {words(n)} it is"


def write_data(folder: Path) -> None:
    """Write conversations and preferences of numbers that are all different."""
    drawn = random.Random(0)
    numbers = drawn.sample(range(10000), 5000)
    base, tuned, pairs = numbers[:3000], numbers[3000:4000], numbers[4000:]

    def write(name: str, records: list[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    write("base.jsonl", [{"messages": [say("user", str(n)), say("assistant", drawn.choice(styles(n)))]} for n in base])
    write("plain.jsonl", [{"messages": [say("user", str(n)), say("assistant", styles(n)[0])]} for n in tuned])
    answers = [(n, *([say("assistant", text)] for text in styles(n))) for n in pairs]
    write("pairs.jsonl", [{"prompt": str(n), "chosen": plain, "rejected": other} for n, plain, other in answers])


def run(folder: Path, name: str, recipe: str, data: str, steps: int, rate: float, **model: Any) -> str:
    """Train; returns a line of the table."""
    started = time.process_time()
    result = hvdtrain.train(
        recipe,
        run_dir=folder / name,
        model=model,
        data={"path": str(folder / data), "cache_dir": str(folder / "cache"), "sequence_length": 64},
        train={"steps": steps, "epochs": None, "global_batch_size": 16},
        optim={"peak_lr": rate},
        log={"every": 1000},
        eval={"every": None},
    )
    seconds = time.process_time() - started
    metrics = result.metrics
    accuracy = f"{metrics['val/reward_accuracy']:.3f}" if "val/reward_accuracy" in metrics else ""
    margin = f"{metrics['val/reward_margin']:.3f}" if "val/reward_margin" in metrics else ""
    newest = folder / name / "checkpoints" / (folder / name / "checkpoints" / "latest").read_text().strip()
    kib = [(newest / file).stat().st_size / 1024 for file in ("model.safetensors", "state.pt")]
    figures = f"{metrics['val/loss']:13.5f}  {accuracy:>15}  {margin:>6}  {kib[0]:7.0f}  {kib[1]:5.0f}  {seconds:11.1f}"
    print(name, figures, file=sys.stderr, flush=True)
    return f"{name:18} {figures}"


def measure(folder: Path) -> str:
    """Return the result of all runs as text."""
    import transformers

    make_tokenizer(folder / "shape")
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}
    transformers.LlamaConfig(**shape, **tokens, intermediate_size=128).save_pretrained(folder / "shape")
    write_data(folder)
    rows = [run(folder, "base", "hf", "base.jsonl", 200, 5e-3, config=folder / "shape" / "config.json")]
    export(ExportOptions(run_dir=folder / "base", output=folder / "model"))
    path = str(folder / "model")
    adapters = {"path": path, "lora_rank": RANK}
    rows += [
        run(folder, "hf, all weights", "hf", "plain.jsonl", STEPS, 2e-3, path=path),
        run(folder, f"hf, rank {RANK}", "hf", "plain.jsonl", STEPS, 1e-2, **adapters),
        run(folder, "dpo, all weights", "dpo", "pairs.jsonl", STEPS, 1e-4, path=path),
        run(folder, f"dpo, rank {RANK}", "dpo", "pairs.jsonl", STEPS, 1e-3, **adapters),
    ]
    lines = [
        machine.describe(),
        "",
        f"a Llama of 2 layers, 64 wide, 300 tokens; numbers in words; 200, then {STEPS} steps of 16 samples or pairs",
        "",
        f"{'':18} held-out loss  reward accuracy  margin  weights  state  processor s",
        f"{'':18} {'':37} {'KiB':>8}  {'KiB':>5}",
        *rows,
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="file for the result; none: standard output alone")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text = measure(Path(name))
    print(text)
    if options.output:
        options.output.write_text(text)


if __name__ == "__main__":
    main()
