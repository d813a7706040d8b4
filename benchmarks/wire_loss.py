"""What each format of gradients on the wire, and local updates, do to the loss, without any network.

    python benchmarks/wire_loss.py --output benchmarks/results/wire_loss.txt
    python benchmarks/wire_loss.py --steps 1000 --formats none none,sync=local,period=25,outer=nesterov

The ranks are threads of one process (`tests/support/thread_world.py`), so that a row takes no launch; their sums are
real. A small decoder on recipe lm's text; the same steps for every format, seed by seed. A busy machine makes it slow,
and changes nothing.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests" / "support")]

import machine  # noqa: E402
import thread_world  # noqa: E402

from hvdtrain.recipes import load_recipe  # noqa: E402
from hvdtrain.recipes.given import apply  # noqa: E402
from hvdtrain.settings.values import Source, nested  # noqa: E402
from hvdtrain.trainer.evaluation import evaluate  # noqa: E402
from hvdtrain.trainer.rehearsal import rehearse  # noqa: E402
from hvdtrain.trainer.state import start_training  # noqa: E402
from hvdtrain.trainer.step import train_step  # noqa: E402
from hvdtrain.world import World  # noqa: E402

# A format, the exact steps before it begins, and other settings of --comm.
FORMATS = (
    "none",
    "int8",
    "powersgd:4,20,compression_exact=none",
    "powersgd:4,20",
    "powersgd:8,20,compression_exact=none",
    "powersgd:8,20",
    "powersgd:16,20",
    "topk:0.01,20",
    "topk:0.1,20",
)


def number(text: str) -> float | str:
    """Return a number where it is one."""
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        return text


def trained(given: argparse.Namespace, text: str, seed: int) -> tuple[float, float]:
    """Return the held-out loss, nats a byte, and the bytes that a rank has handed over in a step."""
    words = text.split(",")
    name, *warmup = [word for word in words if "=" not in word]
    settings: dict[str, object] = {"model.num_layers": given.layers, "model.hidden_size": given.hidden}
    settings |= {"model.num_heads": given.hidden // 32, "data.sequence_length": given.length}
    settings |= {"train.global_batch_size": given.batch, "train.seed": seed, "train.steps": given.steps}
    settings |= {"comm.compression": name, "train.precision": "fp32"}
    settings |= {"comm.compression_warmup_steps": int(warmup[0])} if warmup else {}
    for key, _, value in (word.partition("=") for word in words):
        settings |= {key if "." in key else f"comm.{key}": number(value)} if value else {}
    one_at_a_time = threading.Lock()  # the text is prepared once

    def work(world: World) -> tuple[float, float]:
        with one_at_a_time:
            recipe = apply(load_recipe("lm"), [(nested(settings), Source("wire_loss.py"))])
            task = recipe.build(lambda line: None)
        job = rehearse(task, recipe, world, num_steps=given.steps)
        training = start_training(job)
        for _ in range(given.steps):
            train_step(job, training)
        handed = (world.handed_bytes["gradients"] + world.handed_bytes["outer"]) / given.steps
        return evaluate(job, training)["val/loss"], handed

    return thread_world.run_ranks(given.ranks, work)[0]


def main() -> None:
    """Train, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=64, help="size; a head for each 32")
    parser.add_argument("--length", type=int, default=48, help="of a sample, in bytes")
    parser.add_argument("--batch", type=int, default=16, help="samples of all ranks in a step")
    parser.add_argument(
        "--formats",
        nargs="+",
        default=FORMATS,
        help="each with the exact steps before it, and settings, of --comm unless they say otherwise:"
        " topk:0.1,20,compression_exact=none or none,sync=local,period=25,optim.peak_lr=0.003",
    )
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    thread_world.SECONDS = 3600.0  # a rank may wait long for another on a busy machine
    torch.set_num_threads(1)
    rows = [machine.describe(), "", f"held-out loss in nats a byte, {given.steps} steps, {given.ranks} ranks, by seed"]
    rows += [
        f"decoder of {given.layers} x {given.hidden}, {given.batch} x {given.length} bytes of recipe lm's text a step",
        "",
    ]
    plain: list[float] = []
    for text in given.formats:
        found = [trained(given, text, seed) for seed in range(given.seeds)]
        plain = plain or [loss for loss, _ in found]
        off = [loss / exact - 1 for (loss, _), exact in zip(found, plain, strict=True)]
        losses = " ".join(f"{loss:.4f}" for loss, _ in found)
        of_seeds = " ".join(f"{share:+.2%}" for share in off)
        middle = f"{statistics.mean(off):+.2%} of the first's ({of_seeds})"
        rows.append(f"{text:38} {losses}   {middle}   {found[0][1]:9,.0f} bytes a step")
        print(rows[-1], file=sys.stderr, flush=True)
        if given.output:  # a row is worth having when time is up
            given.output.write_text("\n".join(rows) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
