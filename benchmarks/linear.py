"""Matrix products of linear layers in fp32: torch's own (MKL) against oneDNN's, one thread.

    python benchmarks/linear.py --output benchmarks/results/linear.txt

For each layer the output and both gradients; the two libraries take turns.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

from hvdtrain.models.linear import linear  # noqa: E402

# Rows (samples x tokens), inputs and outputs of a layer.
SHAPES = ((64, 784, 128), (64, 256, 256), (1024, 256, 256), (1024, 256, 688), (1024, 688, 256), (1024, 768, 3072))


def seconds(action: Callable[[], object]) -> float:
    """Return how long it takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for samples, inputs, outputs in SHAPES:
        x, weight = torch.randn(samples, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
        gradient = torch.randn(samples, outputs)

        def work(product: Callable[..., torch.Tensor], x=x, weight=weight, gradient=gradient) -> None:
            torch.autograd.grad(product(x, weight), [x, weight], gradient)

        times: tuple[list[float], list[float]] = ([], [])
        for repeat in range(given.repeats + 3):
            for product, measured in zip((F.linear, linear), times, strict=True):
                taken = seconds(lambda product=product, work=work: work(product))
                if repeat >= 3:
                    measured.append(taken)
        operations = 3 * 2 * samples * inputs * outputs
        torchs, ours = ([operations / s / 1e9 for s in measured] for measured in times)
        ratios = [a / b for a, b in zip(*times, strict=True)]
        shape = f"{samples} x {inputs} -> {outputs}"
        rows.append(
            f"{shape:20} {machine.spread(torchs, 0):>20} {machine.spread(ours, 0):>20} {machine.spread(ratios, 2):>20}"
        )
    head = f"{'layer':20} {'torch, GFLOP/s':>20} {'oneDNN, GFLOP/s':>20} {'times as fast':>20}"
    table = "\n".join((machine.describe(), "", "output and both gradients; median [quartiles]", "", head, *rows))
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
