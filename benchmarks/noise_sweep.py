"""Does the gradient noise scale predict how many steps a batch needs? Measured on handwritten digits.

    python benchmarks/noise_sweep.py --output benchmarks/results/noise_sweep.txt

A network of 64-64-10 learns scikit-learn's 8x8 digits by SGD until its loss on all of them is below a target, with the
best learning rate of a grid for each batch size. The noise scale is measured along the way of one run; then
S = S_min (1 + B_noise / B) is held against the steps that were needed, S_min from the largest batch alone.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

BATCHES = (8, 16, 32, 64, 128, 256)
RATES = tuple(0.05 * 2 ** (k / 2) for k in range(11))
CHUNK = 16


def network(seed: int) -> torch.nn.Sequential:
    """Return the network."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def run(
    x: torch.Tensor, y: torch.Tensor, batch: int, rate: float, seed: int, target: float, most: int, norms: list | None
) -> int | None:
    """Return the steps until the loss is below the target, None if it is not after `most`; notes norms on the way."""
    from hvdtrain.noise import Norms

    model, draws = network(seed), torch.Generator().manual_seed(seed + 1)
    parameters = list(model.parameters())
    every = max(1, 256 // batch)
    for step in range(most):
        if step % every == 0:
            with torch.no_grad():
                if float(F.cross_entropy(model(x), y)) < target:
                    return step
            if norms is not None:
                few = torch.randperm(len(x), generator=draws)[: 32 * CHUNK].view(-1, CHUNK)
                small = []
                for chunk in few:
                    gradients = torch.autograd.grad(F.cross_entropy(model(x[chunk]), y[chunk]), parameters)
                    small.append(torch.cat([g.flatten() for g in gradients]))
                stacked = torch.stack(small).double()
                norms.append(Norms(float(stacked.square().sum(1).mean()), float(stacked.mean(0).square().sum())))
        chosen = torch.randint(len(x), (batch,), generator=draws)
        gradients = torch.autograd.grad(F.cross_entropy(model(x[chosen]), y[chosen]), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    return None


def main() -> None:
    """Sweep, predict, print and write down."""
    import machine
    from sklearn.datasets import load_digits

    from hvdtrain.noise import noise_scale

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output, given.output = given.output, None
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    needed, best = {}, {}
    for batch in BATCHES:
        for rate in RATES:
            most = int(needed.get(batch, 6000)) + 1
            steps = [run(x, y, batch, rate, seed, given.target, most, None) for seed in range(given.seeds)]
            if None not in steps and statistics.mean(steps) < needed.get(batch, 1e9):
                needed[batch], best[batch] = statistics.mean(steps), rate
        print(f"batch {batch}: {needed[batch]:.0f} steps at rate {best[batch]:.3g}", file=sys.stderr, flush=True)
    middle = BATCHES[len(BATCHES) // 2]
    norms: list = []
    run(x, y, middle, best[middle], 0, given.target, 6000, norms)
    found = noise_scale(norms, CHUNK, 32 * CHUNK)
    largest = BATCHES[-1]
    least = needed[largest] / (1 + found.samples / largest)
    rows, errors = [], []
    for batch in BATCHES:
        predicted = least * (1 + found.samples / batch)
        error = predicted / needed[batch] - 1
        errors += [abs(error)] if batch != largest else []
        rows.append(f"{batch:5} {best[batch]:8.3g} {needed[batch]:9.0f} {predicted:9.0f} {error:+8.1%}")
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"digits, 64-64-10, SGD, loss below {given.target}, {given.seeds} seeds, best of {len(RATES)} rates",
            f"noise scale along a run with batch {middle}: {found.samples:.1f} samples"
            f" [{found.low:.1f}, {found.high:.1f}]",
            "",
            "batch     rate  measured predicted    error   (the last row gives S_min)",
            *rows,
            "",
            f"median error {statistics.median(errors):.1%}, largest {max(errors):.1%}",
        )
    )
    print(table)
    if output:
        output.write_text(table + "\n")


if __name__ == "__main__":
    main()
