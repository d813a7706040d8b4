"""Wall time from typing the command to a held-out loss: a language recipe, against nanoGPT's train.py of its size.

    python benchmarks/time_to_loss.py --nanogpt DIR --output benchmarks/results/time_to_loss.txt
    python benchmarks/time_to_loss.py --nanogpt DIR --recipe lm-10m --nanogpt-steps 400

nanoGPT's train.py (github.com/karpathy/nanoGPT) trains on both cores, in one process, on the recipe's tokens, with 16
samples of the recipe's length a step, for 1,000 steps; its schedule ends there. Of its learning rates the one with
the better result counts. What its model then loses on all of the held-out text, cut into windows as hvdtrain cuts
it, is the loss to reach. hvdtrain is the command that users type, with settings chosen beforehand by a sweep
(docs/decisions.md): its ranks train so few steps that the run's last evaluation is below that loss, and the time of
the whole command counts: start, reading the text, training, evaluation, saving. A run that misses the loss is shown
as missed. Turns are taken, seed by seed. Text is prepared beforehand for both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from speed import prepare_nanogpt  # noqa: E402

from hvdtrain.data.text.stream import prepare_text  # noqa: E402
from hvdtrain.recipes import load_recipe  # noqa: E402
from hvdtrain.recipes.lm import LanguageModel  # noqa: E402

BATCH = 16


def language_recipe(name: str) -> LanguageModel:
    """Return a language recipe's own settings."""
    recipe = load_recipe(name)
    assert isinstance(recipe, LanguageModel)
    return recipe


def ours(given: argparse.Namespace, seed: int) -> tuple[float, float, float, int]:
    """Return one command's seconds, those of its steps, its last held-out loss in nats a token, and how many steps."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(given.ranks), sys.executable]
        command += ["-m", "hvdtrain", "train", given.recipe, "--run-dir", folder]
        command += ["--train.seed", str(seed), *given.settings]
        seconds = timed(command, REPOSITORY, threads=1)
        lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "val/loss" in line][-1]
        return seconds, last["time/train_s"], last["val/loss"], last["step"]


def timed(command: list[str], folder: Path, threads: int) -> float:
    """Run a command to its end; returns its wall time in seconds."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    started = time.perf_counter()
    done = subprocess.run(command, env=environ, cwd=folder, timeout=1800, capture_output=True, text=True)
    seconds = time.perf_counter() - started
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return seconds


def theirs(given: argparse.Namespace, seed: int, rate: float) -> tuple[float, float]:
    """Return the seconds of nanoGPT's train.py, and its model's held-out loss in nats a token."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = language_recipe(given.recipe)
        prepare_nanogpt(given.nanogpt, prepare_text(recipe.data, lambda line: None), folder)
        source = (folder / "train.py").read_text().replace("torch.manual_seed(1337", f"torch.manual_seed({1337 + seed}")
        (folder / "train.py").write_text(source)
        overrides = {
            "dataset": "text",
            "device": "cpu",
            "dtype": "float32",
            "compile": False,
            "n_layer": recipe.model.num_layers,
            "n_head": recipe.model.num_heads,
            "n_embd": recipe.model.hidden_size,
            "block_size": recipe.data.sequence_length,
            "batch_size": BATCH,
            "gradient_accumulation_steps": 1,
            "max_iters": given.nanogpt_steps,
            "lr_decay_iters": given.nanogpt_steps,
            "warmup_iters": given.nanogpt_steps // 20,
            "learning_rate": rate,
            "min_lr": rate / 10,
            "dropout": 0.0,
            "eval_interval": given.nanogpt_steps,
            "eval_iters": 1,
            "always_save_checkpoint": True,
        }
        words = [f"--{key}={value}" for key, value in overrides.items()]
        seconds = timed([sys.executable, "train.py", *words], folder, threads=len(os.sched_getaffinity(0)))
        return seconds, held_out(folder, recipe.data.sequence_length)


def held_out(folder: Path, length: int) -> float:
    """Return what nanoGPT's saved model loses on the held-out text, in windows that follow each other, as hvdtrain."""
    sys.path.insert(0, str(folder))
    sys.modules.pop("model", None)
    try:
        from model import GPT, GPTConfig
    finally:
        sys.path.remove(str(folder))
    saved = torch.load(folder / "out" / "ckpt.pt", weights_only=False)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    tokens = torch.from_numpy(np.fromfile(folder / "data" / "text" / "val.bin", dtype=np.uint16).astype(np.int64))
    count = (len(tokens) - 1) // length
    inputs = tokens[: count * length].view(count, length)
    targets = tokens[1 : count * length + 1].view(count, length)
    total = 0.0
    with torch.no_grad():
        for x, y in zip(inputs.split(64), targets.split(64), strict=True):
            total += model(x, y)[1].item() * len(x)
    return total / count


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--nanogpt-steps", type=int, default=1000)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3], help="learning rates of nanoGPT")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--recipe", default="lm", help="lm or lm-10m: its model's size, its tokens and their length")
    parser.add_argument("--output", type=Path)
    parser.add_argument("settings", nargs="*", help="hvdtrain's, after --")
    given = parser.parse_args()
    given.nanogpt = given.nanogpt.resolve()
    recipe = language_recipe(given.recipe)

    tried = {rate: theirs(given, given.seeds[0], rate) for rate in given.rates}
    best = min(tried, key=lambda rate: tried[rate][1])
    rows, ratios, besides = [], [], []
    for seed in given.seeds:
        seconds, loss = tried[best] if seed == given.seeds[0] else theirs(given, seed, best)
        our_seconds, step_seconds, our_loss, steps = ours(given, seed)
        besides.append(our_seconds - step_seconds)
        ratios.append(our_seconds / seconds)
        rows.append(
            f"{seed:4}  {seconds:9.1f}  {loss:9.4f}  {our_seconds:9.1f}  {step_seconds:9.1f}  {our_loss:9.4f}"
            f"  {steps:6}  {ratios[-1]:6.3f}  {'reached' if our_loss <= loss else 'MISSED'}"
        )
        print(rows[-1], file=sys.stderr, flush=True)
    model, data = recipe.model, recipe.data
    result = "\n".join(
        (
            machine.describe(),
            "",
            f"recipe {given.recipe}; nanoGPT: {model.num_layers} layers x {model.hidden_size},"
            f" {BATCH} x {data.sequence_length} tokens ({data.tokenizer}), {given.nanogpt_steps} steps,"
            f" one process of {len(os.sched_getaffinity(0))} threads; learning rates: "
            + ", ".join(f"{rate:g} ({loss:.4f})" for rate, (_, loss) in tried.items()),
            "",
            "seed  nanoGPT s  held-out   hvdtrain s  its steps  held-out   steps   ratio",
            *rows,
            "",
            f"hvdtrain's time / nanoGPT's: {machine.spread(ratios)}",
            f"hvdtrain's seconds besides its steps: {machine.spread(besides, 2)}",
        )
    )
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
