"""What a GPU is needed for, in order of worth, each check with a time limit: one command for a card lent for minutes.

    python benchmarks/gpu_checks.py --seconds 780 --output benchmarks/results/gpu_checks.txt

Runs in an environment that `launch/setup.sh` has made on the machine (`--setup` does that first). A check that fails or
takes too long is noted, and the next one begins; what there is no time for is named. The result file is written anew
after each check, so that one is there whenever the card is taken away.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
LINES = 60


@dataclass(frozen=True)
class Check:
    """A command, and how long it may take."""

    name: str
    words: tuple[str, ...]
    limit_s: int


def tests(name: str, file: str, which: str, limit_s: int) -> Check:
    """Return the check that some tests of tests/gpu pass."""
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--color=no", f"tests/gpu/{file}", "-k", which)
    return Check(name, words, limit_s)


# Of a decoder of the size of GPT-2 small, in bf16, as gpu_h100.txt has it.
SHAPE = ("--layers", "12", "--hidden-size", "768", "--heads", "12", "--intermediate-size", "2048", "--length", "1024")

CHECKS = (
    Check("what there is", ("-m", "hvdtrain", "doctor"), 60),
    Check("the step alone", ("benchmarks/gpu_step.py",), 120),
    tests("all that a World does, and gradients in buckets", "test_nccl.py", "everything and mpi", 150),
    tests("a step waits for nothing", "test_one_gpu.py", "does_not_wait or estimate", 90),
    Check(
        "the command train",
        (
            *("benchmarks/speed.py", "--ranks", "1", *SHAPE, "--precision", "bf16", "--batch", "16"),
            *("--vocab-size", "50304", "--steps", "60", "--repeats", "1", "--compile", "blocks"),
            *("--runners", "hvdtrain"),
        ),
        120,
    ),
    tests("a start of NCCL that takes too long", "test_nccl.py", "too_long", 60),
    tests("a clipped step by the optimizer's kernel", "test_gpu_ways.py", "clipped", 60),
    tests("saves beside the GPU", "test_gpu_saves.py", "does_not_wait or blocks or copied", 90),
    tests("two ranks in ways of their own", "test_nccl.py", "ways_of_two_ranks", 200),
    tests("dropout that is compiled", "test_gpu_ways.py", "compiled_dropout", 90),
    Check(
        "the step alone, gradients put together where they are made",
        ("benchmarks/gpu_step.py", "--inductor", "max_pointwise_cat_inputs=1", "max_complex_pointwise_cat_inputs=1"),
        120,
    ),
    Check("the step alone, the loss in one chunk", ("benchmarks/gpu_step.py", "--loss-chunk", "16384"), 120),
    Check(
        "the step alone, the residual stream in 16 bits",
        ("benchmarks/gpu_step.py", "--residual-dtype", "products"),
        120,
    ),
    tests("documents by their bounds", "test_gpu_ways.py", "documents", 90),
    tests("documents of transformers' models", "test_gpu_saves.py", "documents", 120),
    tests("attention that drops by sample", "test_gpu_saves.py", "drops", 60),
    tests("two ranks share a save", "test_nccl.py", "share_a_save", 150),
    tests(
        "two ranks over NCCL",
        "test_nccl.py",
        "not ended and not share_a_save and not (everything and mpi) and not ways_of_two_ranks and not too_long",
        240,
    ),
    tests("ranks that are ended", "test_nccl.py", "ended", 240),
    tests("the other ways of a GPU", "test_gpu_ways.py", "not documents and not compiled_dropout and not clipped", 300),
    tests("all precisions", "test_one_gpu.py", "not does_not_wait and not estimate", 300),
)


def card() -> str:
    """Return what torch and the driver say of the machine."""
    asked = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name(0))"
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=120)
    return done.stdout.strip() or "this torch sees no GPU"


def run(check: Check, limit_s: float) -> tuple[str, str]:
    """Return how a check ended, and the last lines of what it said."""
    started = time.monotonic()
    try:
        done = subprocess.run(
            [sys.executable, *check.words],
            cwd=REPOSITORY,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
        )
        how, said = f"exit code {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as error:
        how, said = f"not through in {limit_s:.0f} s", error.stdout or ""
        said = said if isinstance(said, str) else said.decode(errors="replace")
    return f"{how}, {time.monotonic() - started:.0f} s", "\n".join(said.splitlines()[-LINES:])


def main() -> None:
    """Run the checks until the time is over; the exit code is 1 where one has failed or was left out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=780, help="of all checks together")
    parser.add_argument("--setup", action="store_true", help="run launch/setup.sh first, within that time")
    parser.add_argument("--only", help="checks whose names have this text")
    parser.add_argument("--after", choices=[check.name for check in CHECKS], help="go on behind this check")
    parser.add_argument("--output", type=Path, default=Path("gpu_checks.txt"))
    given = parser.parse_args()
    end = time.monotonic() + given.seconds
    if given.setup:
        subprocess.run([str(REPOSITORY / "launch" / "setup.sh")], check=True, timeout=given.seconds)
    behind = 1 + [check.name for check in CHECKS].index(given.after) if given.after else 0
    checks = [check for check in CHECKS[behind:] if not given.only or given.only in check.name]
    summary, details = [f"machine: {card()}", ""], []
    has_failed = False
    for check in checks:
        left = end - time.monotonic()
        if left < 20:
            how, said = "LEFT OUT: no time", ""
        else:
            how, said = run(check, min(check.limit_s, left))
        has_failed |= not how.startswith("exit code 0")
        summary.append(f"{check.name:45} {how}")
        details += ["", f"== {check.name}: python {' '.join(check.words)}", said]
        print(summary[-1], flush=True)
        given.output.write_text("\n".join([*summary, *details]) + "\n")
    sys.exit(1 if has_failed else 0)


if __name__ == "__main__":
    main()
