"""hvdtrain against other frameworks and bare loops: same model, batches, precision, threads, clipping.

    python benchmarks/speed.py --ranks 2 --steps 60 --repeats 5
    python benchmarks/speed.py --ranks 1 --nanogpt DIR --runners hvdtrain nanogpt
    python benchmarks/speed.py --table --nanogpt DIR --output benchmarks/results/speed.txt

Bare loops, the shortest that are correct: Horovod, DistributedDataParallel, one process. Frameworks: Accelerate,
Lightning Fabric and the Trainer of transformers, where they can be imported. All are in bare_loops.py. With a clone of
github.com/karpathy/nanoGPT, its train.py trains its own model of the same layers, width and length, on the same text;
the inner width of our feed-forward layers then makes both models equally large. On CPUs it has one process and fp32
only.

Each runner is launched in turn, `--repeats` times; a launch gives the median time of a step, without warm-up.
Ratios are of launches that followed each other. hvdtrain is the command that users type. On a machine with GPUs each
rank takes one. On CPUs where hvdtrain has linear layers compute by oneDNN (hvdtrain/models/linear.py), "torch's mm" is
hvdtrain without that: the same products as the others.

`--table`: one and two ranks, fp32 and bf16, all runners.
"""

from __future__ import annotations

import argparse
import atexit
import copy
import importlib.util
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import bare_loops  # noqa: E402
import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from bare_loops import WINDOW  # noqa: E402

from hvdtrain.data.text.stream import PreparedText  # noqa: E402
from hvdtrain.models.linear import takes_onednn  # noqa: E402

TORCHS_PRODUCTS = "torch's mm"  # hvdtrain with --model.linear torch: the loop alone, compared with the others
OURS = ("hvdtrain", TORCHS_PRODUCTS)
RUNNERS = (*OURS, *bare_loops.LOOPS, "nanogpt")
BY_TORCHRUN = ("ddp", "accelerate", "fabric", "hf trainer", "nanogpt")
PACKAGES = {"accelerate": ("accelerate",), "fabric": ("lightning",), "hf trainer": ("transformers", "accelerate")}
SKIPPED_WINDOWS = 2  # warm-up


def why_not(runner: str, given: argparse.Namespace) -> str:
    """Return why a runner cannot take part, "" if it can."""
    missing = [package for package in PACKAGES.get(runner, ()) if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} cannot be imported"
    if runner == "nanogpt" and given.nanogpt is None:
        return "it needs --nanogpt DIR, a clone of github.com/karpathy/nanoGPT"
    if runner == "nanogpt" and not torch.cuda.is_available() and (given.ranks > 1 or given.precision != "fp32"):
        return "without GPUs its train.py has one process and fp32"
    if runner == "one process" and given.ranks == 1:
        return "it is ddp's loop on one rank"
    if runner == TORCHS_PRODUCTS and not takes_onednn("auto", bare_loops.local_device()):
        return "it is hvdtrain itself on this machine"
    return ""


def settings(given: argparse.Namespace) -> list[str]:
    """Return hvdtrain's flags for the model and batch of the comparison."""
    return [
        *("--model.num-layers", str(given.layers), "--model.hidden-size", str(given.hidden_size)),
        *("--model.num-heads", str(given.heads), "--model.compile", given.compile),
        *("--data.sequence-length", str(given.length), "--train.steps", str(given.steps)),
        *("--train.micro-batch-size", str(given.batch), "--train.accum-steps", "1", "--optim.warmup-steps", "0"),
        *("--log.every", str(WINDOW), "--eval.every", "1000000", "--checkpoint.every", "1000000"),
        *("--train.precision", given.precision),
        *(("--model.intermediate-size", str(given.intermediate_size)) if given.intermediate_size else ()),
        *(("--data.path", f"{given.tokens}/train.bin") if given.tokens else ()),
        *(("--data.val-path", f"{given.tokens}/val.bin") if given.tokens else ()),
        *(("--data.vocab-size", str(given.vocab_size)) if given.tokens else ()),
    ]


def launcher(runner: str, given: argparse.Namespace) -> list[str]:
    """Return the command that starts this runner's ranks."""
    ranks = str(given.ranks)
    if runner == "one process" or (given.ranks == 1 and runner != "ddp"):
        return [sys.executable]
    if runner in BY_TORCHRUN:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    if given.controller == "gloo":
        return ["horovodrun", "--gloo", "-np", ranks, sys.executable]
    return ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", ranks, sys.executable]


def run(command: list[str], runner: str, given: argparse.Namespace, folder: Path = REPOSITORY) -> str:
    """Start a runner and return its output."""
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(given.threads)}
    if runner not in BY_TORCHRUN and environ.get("OMPI_MCA_mpi_yield_when_idle") is None:
        environ["OMPI_MCA_mpi_yield_when_idle"] = "1"  # as hvdtrain sets it: fair to the bare loop
    done = subprocess.run(command, env=environ, cwd=folder, timeout=1800, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{runner} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return done.stdout


def launch(runner: str, given: argparse.Namespace) -> float:
    """Return the median seconds of a step in one launch of a runner."""
    with tempfile.TemporaryDirectory() as folder:
        if runner in OURS:
            command = [*launcher(runner, given), "-m", "hvdtrain", "train", "lm", "--run-dir", folder, *settings(given)]
            run(command + (["--model.linear", "torch"] if runner == TORCHS_PRODUCTS else []), runner, given)
            lines = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            steps = [line["time/step_s"] for line in lines if "time/step_s" in line]
        elif runner == "nanogpt":
            steps = nanogpt(given, Path(folder))
        else:
            times = Path(folder) / "times.json"
            description = {name: value for name, value in vars(given).items() if not isinstance(value, Path)}
            description |= {"runner": runner, "times": str(times)}
            loops = str(Path(__file__).with_name("bare_loops.py"))
            run([*launcher(runner, given), loops, json.dumps(description)], runner, given)
            steps = json.loads(times.read_text())
    return statistics.median(steps[SKIPPED_WINDOWS:])


def prepare_nanogpt(clone: Path, text: PreparedText, folder: Path) -> None:
    """Copy nanoGPT's programs from a clone into a folder, and a text beside them in its format."""
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(clone / name, folder)
    data = folder / "data" / "text"
    data.mkdir(parents=True)
    for name, shards in (("train", text.train_shards), ("val", text.val_shards)):
        tokens = [np.fromfile(shard.path, dtype=shard.dtype) for shard in shards]
        np.concatenate(tokens).astype(np.uint16).tofile(data / f"{name}.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": text.vocab_size}))


def nanogpt(given: argparse.Namespace, folder: Path) -> list[float]:
    """Run nanoGPT's train.py, in a copy beside the text in its format; returns the mean seconds of its windows."""
    prepare_nanogpt(given.nanogpt, bare_loops.text_of(given), folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    overrides = {
        "dataset": "text",
        "device": device,
        "dtype": {"fp32": "float32", "bf16": "bfloat16"}[given.precision],
        "compile": given.compile != "none",
        "n_layer": given.layers,
        "n_head": given.heads,
        "n_embd": given.hidden_size,
        "block_size": given.length,
        "batch_size": given.batch,
        "gradient_accumulation_steps": given.ranks,  # of all processes: one micro-batch each
        "max_iters": given.steps,
        "decay_lr": False,
        "learning_rate": 1e-3,
        "eval_interval": 1_000_000,
        "eval_iters": 1,
        "always_save_checkpoint": False,
    }
    words = [f"--{name}={value}" for name, value in overrides.items()]
    output = run([*launcher("nanogpt", given), "train.py", *words], "nanogpt", given, folder)
    steps = [float(ms) / 1e3 for ms in re.findall(r"^iter [1-9].*time ([\d.]+)ms", output, flags=re.MULTILINE)]
    return [statistics.mean(steps[i : i + WINDOW]) for i in range(0, len(steps) - WINDOW + 1, WINDOW)]


def random_tokens(vocab_size: int) -> str:
    """Return a folder with files of random tokens; it is removed at the end."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    draw = np.random.default_rng(0)
    for name, count in (("train", 4_000_000), ("val", 100_000)):
        draw.integers(vocab_size, size=count, dtype=np.uint16).tofile(Path(folder) / f"{name}.bin")
    return folder


def as_large_as_nanogpt(given: argparse.Namespace) -> int:
    """Return the multiple of 16 with which the decoder has about, and not more than, the parameters of nanoGPT's model.

    Its feed-forward layers have 8 C^2 parameters, ours 3 C I; it has T C more, for positions.
    """
    exact = 8 * given.hidden_size / 3 + given.length / (3 * given.layers)
    return int(exact) // 16 * 16


def compared(given: argparse.Namespace) -> str:
    """Launch the runners in turns, and return the rows of their times, and of hvdtrain's against each."""
    why = {runner: why_not(runner, given) for runner in given.runners}
    seconds: dict[str, list[float]] = {runner: [] for runner, reason in why.items() if not reason}
    for repeat in range(given.repeats):
        for runner, times in seconds.items():
            times.append(launch(runner, given))
            print(f"repeat {repeat + 1}: {runner} {1e3 * times[-1]:.1f} ms", file=sys.stderr, flush=True)
    ours = seconds["hvdtrain"]
    rows = [
        f"{runner:12} {machine.spread([1e3 * s for s in times], 1):26}"
        f" {machine.spread([a / b for a, b in zip(ours, times, strict=True)])}"
        for runner, times in seconds.items()
    ]
    inner = f" (inner width {given.intermediate_size})" if given.intermediate_size else ""
    return "\n".join(
        (
            f"decoder of {given.layers} layers x {given.hidden_size}{inner},"
            f" {given.batch} x {given.length} tokens a rank, {given.ranks} ranks of {given.threads} thread,"
            f" {given.precision}, compiled: {given.compile}, {given.controller};"
            f" {given.repeats} interleaved launches of {given.steps} steps; median [quartiles]",
            "",
            "runner       ms a step                  hvdtrain's time / this one's",
            *rows,
            *(f"{runner:12} not run: {reason}" for runner, reason in why.items() if reason),
        )
    )


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="1 and 2 ranks, fp32 and bf16")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, help="default: the recipe's, or what makes nanoGPT as large")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8, help="samples of a rank")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--compile", choices=["none", "blocks", "model"], default="none", help="what of hvdtrain's; others: the model"
    )
    parser.add_argument("--vocab-size", type=int, help="random tokens of so large a vocabulary, in place of text")
    parser.add_argument("--controller", choices=["mpi", "gloo"], default="mpi")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runners", nargs="+", default=RUNNERS, choices=RUNNERS, help="hvdtrain among them")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, for the runner of that name")
    given = parser.parse_args()
    if "hvdtrain" not in given.runners:
        parser.error("--runners need hvdtrain, with which all others are compared")
    if given.nanogpt:
        given.nanogpt = given.nanogpt.resolve()
        given.intermediate_size = given.intermediate_size or as_large_as_nanogpt(given)
    given.tokens = random_tokens(given.vocab_size) if given.vocab_size else None
    of_table = [{"ranks": ranks, "precision": precision} for precision in ("fp32", "bf16") for ranks in (1, 2)]
    parts = []
    for difference in of_table if given.table else [{}]:
        part = copy.copy(given)
        vars(part).update(difference)
        parts.append(compared(part))
    result = "\n\n".join((machine.describe(), *parts))
    print(result)
    if given.output:
        given.output.write_text(result + "\n")


if __name__ == "__main__":
    main()
