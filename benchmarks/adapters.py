"""Adapters and preferences on a tiny model, made here: what they cost, what they reach, on one rank and on two.

    python benchmarks/adapters.py

A base model learns to write numbers below 10,000 in words, in one of two styles at random: plain, or as a sentence. It
is then fine-tuned to be plain, with all weights and with adapters (--model.lora-rank), and taught by preferences (dpo)
that plain is better. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks"), str(REPOSITORY / "tests" / "support")]

import machine  # noqa: E402
from tiny_models import make_tokenizer  # noqa: E402

UNITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
UNITS += [f"{name}teen" for name in ("thir", "four", "fif", "six", "seven", "eigh", "nine")]
TENS = [f"{name}ty" for name in ("twen", "thir", "for", "fif", "six", "seven", "eigh", "nine")]
COMMON = [
    *("--data.sequence-length", "64", "--train.global-batch-size", "32", "--data.cache-dir", "cache"),
    *("--log.every", "1000", "--eval.every", "1000"),
]
RANK = "8"


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


def message(role: str, content: str) -> dict[str, str]:
    """Return a message."""
    return {"role": role, "content": content}


def write_data(folder: Path) -> list[int]:
    """Write conversations and preferences; returns numbers that are in none of them."""
    drawn = random.Random(0)
    numbers = drawn.sample(range(10000), 7030)
    base, tuned, pairs, asked = numbers[:4000], numbers[4000:5500], numbers[5500:7000], numbers[7000:]

    def write(name: str, records: list[Any]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    def talk(n: int, answer: str) -> dict[str, Any]:
        return {"messages": [message("user", str(n)), message("assistant", answer)]}

    write("base.jsonl", [talk(n, drawn.choice(styles(n))) for n in base])
    write("plain.jsonl", [talk(n, styles(n)[0]) for n in tuned])
    write("pairs.jsonl", [{"prompt": str(n), "chosen": [message("assistant", styles(n)[0])],
                           "rejected": [message("assistant", styles(n)[1])]} for n in pairs])  # fmt: skip
    return asked


def run(folder: Path, name: str, ranks: int, *arguments: str) -> tuple[dict[str, float], float]:
    """Train; returns the last evaluation and the seconds it took, with the start."""
    command = [sys.executable, "-m", "hvdtrain", "train", *arguments, *COMMON, "--run-dir", name]
    if ranks > 1:
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command]
    started = time.perf_counter()
    call(folder, *command)
    seconds = time.perf_counter() - started
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    last = [line for line in lines if "val/loss" in line][-1]
    print(f"{name}: {last} in {seconds:.0f} s", file=sys.stderr, flush=True)
    return last, seconds


def call(folder: Path, *command: str) -> str:
    """Run a command and return what it prints."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environ = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, cwd=folder, timeout=1800, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def answers(folder: Path, model: str, asked: list[int]) -> tuple[float, float]:
    """Return the share of new numbers whose greedy answer is plain, and that is the right number in either style."""
    command = [
        sys.executable,
        "-m",
        "hvdtrain",
        "generate",
        model,
        "--chat",
        "--temperature",
        "0",
        "--max-tokens",
        "60",
    ]
    command += ["--prompt", *map(str, asked)]
    parts = call(folder, *command).split("--- ")[1:]
    texts = [part.split("\n", 2)[2].strip() for part in parts]
    plain = sum("number" not in text for text in texts) / len(asked)
    right = sum(text in styles(n) for text, n in zip(texts, asked, strict=True)) / len(asked)
    return plain, right


def dry_run(folder: Path, *arguments: str) -> list[str]:
    """Return what a dry run says of memory and network on two ranks."""
    command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", "2", sys.executable, "-m", "hvdtrain", "train"]
    lines = call(folder, *command, *arguments, *COMMON, "--dry-run").splitlines()
    return [line for line in lines if line.startswith(("lora", "memory", "network", "frozen"))]


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=None, help="file for the result; none: standard output")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        text = measure(Path(name))
    if options.output:
        options.output.write_text(text)
    else:
        print(text)


def measure(folder: Path) -> str:
    """Return the result of all runs as text."""
    import transformers

    make_tokenizer(folder / "shape")
    shape = {"hidden_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    tokens = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0}
    transformers.LlamaConfig(**shape, **tokens, intermediate_size=192).save_pretrained(folder / "shape")
    asked = write_data(folder)
    begin = ["--model.config", "shape/config.json", "--data.path", "base.jsonl", "--train.steps", "500"]
    run(folder, "base", 1, "hf", *begin, "--optim.peak-lr", "5e-3")
    call(folder, sys.executable, "-m", "hvdtrain", "export", "base", "--output", "model")
    rows = [row("base", 1, {}, answers(folder, "base", asked))]
    lora = ["--model.lora-rank", RANK]
    tune = ["hf", "--model.path", "model", "--data.path", "plain.jsonl", "--train.steps", "60"]
    prefer = ["dpo", "--model.path", "model", "--data.path", "pairs.jsonl", "--train.steps", "60"]
    for title, arguments, ranks in (
        ("hf, all weights", [*tune, "--optim.peak-lr", "1e-3"], (1,)),
        (f"hf, rank {RANK}", [*tune, *lora, "--optim.peak-lr", "1e-2"], (1, 2)),
        ("dpo, all weights", [*prefer, "--optim.peak-lr", "1e-4"], (1,)),
        (f"dpo, rank {RANK}", [*prefer, *lora, "--optim.peak-lr", "1e-3"], (1, 2)),
    ):
        for count in ranks:
            name = f"{title}-{count}".replace(" ", "").replace(",", "-")
            last, seconds = run(folder, name, count, *arguments)
            newest = (folder / name / "checkpoints" / "latest").read_text().strip()
            kib = (folder / name / "checkpoints" / newest / "model.safetensors").stat().st_size / 1024
            rows.append(row(title, count, last, answers(folder, name, asked), f"{kib:,.0f}", f"{seconds:.0f}"))
    said = dry_run(folder, *tune, *lora)
    lines = [
        machine.describe(),
        "",
        "a Llama of 3 layers, 96 wide, 300 tokens; numbers in words, 60 steps of 32 samples or pairs, fp32",
        "",
        f"{'':18} ranks  held-out loss  reward accuracy   plain   right   weights saved, KiB   s, with start",
        *rows,
        "",
        f"a dry run of hf, rank {RANK}, on two ranks",
        "",
        *said,
    ]
    return "\n".join(lines) + "\n"


def row(
    title: str, ranks: int, last: dict[str, float], answered: tuple[float, float], kib: str = "", seconds: str = ""
) -> str:
    """Return a line of the table."""
    loss = f"{last['val/loss']:.5f}" if last else ""
    accuracy = f"{last['val/reward_accuracy']:.3f}" if "val/reward_accuracy" in last else ""
    plain, right = answered
    figures = f"{loss:>13}  {accuracy:>15}   {plain:5.3f}   {right:5.3f}   {kib:>18}   {seconds:>13}"
    return f"{title:18} {ranks:5}  {figures}".rstrip()


if __name__ == "__main__":
    main()
