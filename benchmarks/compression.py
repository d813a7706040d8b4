"""What does fp16 on the wire do to the loss? The default recipe, trained with and without, for several seeds.

python benchmarks/compression.py --steps 300 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402


def train(folder: Path, ranks: int, steps: int, seed: int, *more: str) -> float:
    """Return the held-out loss at the end, in nats a token."""
    run_dir = folder / f"{seed}-{'-'.join(more) or 'plain'}"
    command = [
        "horovodrun",
        "-np",
        str(ranks),
        sys.executable,
        "-m",
        "hvdtrain",
        "train",
        "lm",
        "--run-dir",
        str(run_dir),
    ]
    command += ["--train.steps", str(steps), "--train.seed", str(seed), *more]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=REPOSITORY, timeout=1800)
    last = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    return float(last["val/loss"])


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    plain, fp16 = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(given.seeds):
            plain.append(train(Path(folder), given.ranks, given.steps, seed))
            fp16.append(train(Path(folder), given.ranks, given.steps, seed, "--comm.compression", "fp16"))
    rows = [f"{seed:4}  {a:8.4f}  {b:8.4f}  {b - a:+9.4f}" for seed, (a, b) in enumerate(zip(plain, fp16, strict=True))]
    gap = statistics.mean(b - a for a, b in zip(plain, fp16, strict=True))
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"recipe lm, {given.ranks} ranks, {given.steps} steps: held-out loss in nats a byte",
            "",
            "seed      fp32  fp16 wire  difference",
            *rows,
            "",
            f"mean difference {gap:+.4f}; between seeds (fp32) the loss varies by {statistics.stdev(plain):.4f}"
            if given.seeds > 1
            else "",
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
