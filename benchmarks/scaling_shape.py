"""The scaling that Horovod's paper reports, recomputed by `plan`'s model from public figures.

    python benchmarks/scaling_shape.py --output benchmarks/results/scaling_shape.txt

Nothing is measured here. Sources and what comes of it: docs/plan.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

GPUS_PER_HOST = 4
BATCH = 64
BUCKET_BYTES = 25 << 20
# Forward and backward passes take a third and two thirds of a step's operations.
BACKWARD = 2 / 3

# Parameters, images a second of one P100, efficiency at 512 GPUs in the paper, share of the parameters that lie in the
# last layers, whose gradients are ready first.
MODELS = {
    "Inception V3": (23.8e6, 142.0, 0.90, 0.09),
    "ResNet-101": (44.5e6, 103.6, 0.90, 0.05),
    "VGG-16": (138.4e6, 154.0, 0.68, 0.89),
}


def main() -> None:
    """Print the table."""
    from hvdtrain.verbs.plan.methods import sends_of
    from hvdtrain.verbs.plan.network import Layout, Network, other_network
    from hvdtrain.verbs.plan.step import Bucket, Compute, step_time

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="25gbit,5us")
    parser.add_argument("--inside-gb-s", type=float, default=10.0, help="all-reduce bandwidth inside a host (PCIe)")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    inside = Network("mpi", 1e-4, 5e-6, 1 / given.inside_gb_s / 1e9, None, None, 0.0, GPUS_PER_HOST)
    network = other_network(inside, given.network)
    counts = (1, 4, 8, 32, 128, 512)
    lines = [
        f"network {given.network}, {GPUS_PER_HOST} GPUs a host, batch {BATCH} a GPU; efficiency by number of GPUs",
        f"{'':14}" + "".join(f"{n:>7}" for n in counts) + "   paper, 512",
    ]
    for name, (parameters, speed, paper, last) in MODELS.items():
        step = BATCH / speed
        compute = Compute(step * (1 - BACKWARD), step * BACKWARD, 0.0)
        num_bytes = 4 * parameters
        # The last layers take little of the backward pass's time, the others share the rest evenly.
        count = max(1, round(num_bytes / BUCKET_BYTES))
        buckets = []
        for i in range(count):
            share = (i + 1) / count
            ready = 0.05 * share / last if share <= last else 0.05 + 0.95 * (share - last) / (1 - last)
            buckets.append(Bucket(min(1.0, ready), round(num_bytes / count)))
        cells = []
        for n in counts:
            sends = sends_of(buckets, "none", 1, Layout.of(n, GPUS_PER_HOST), (network, None))
            time = step_time(compute, sends).total_s
            cells.append(f"{step / time:7.0%}")
        lines.append(f"{name:14}{''.join(cells)}   {paper:.0%}")
    text = "\n".join(lines)
    print(text)
    if given.output:
        given.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
