"""Does the gradient noise scale predict how many steps a batch needs? Measured on handwritten digits.

    python benchmarks/noise_sweep.py --output benchmarks/results/noise_sweep.txt

A network of 64-64-10 learns scikit-learn's 8x8 digits by SGD until its loss on all of them is below a target, with the
best learning rate of a grid for each batch size. The noise scale is measured along the trainings with one batch size;
from those alone S = S_min (1 + B_noise / B) predicts the steps with all others, B_noise being that of the whole
training (`noise_of_training` of hvdtrain/optim/noise.py). Beside it, what the mean of the norms, and the first steps,
would say.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

from hvdtrain.optim.noise import Norms, estimate, noise_of_training, noise_scale, steps_ratio  # noqa: E402

BATCHES = (8, 16, 32, 64, 128, 256)
MEASURED = 64  # the batch size of the trainings that the noise scale is measured in
RATES = tuple(0.05 * 2 ** (k / 2) for k in range(11))
CHUNK, CHUNKS = 16, 112
WINDOW = 4  # steps of one noise scale


def network(seed: int) -> torch.nn.Sequential:
    """Return the network."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))


def measure(model: torch.nn.Sequential, x: torch.Tensor, y: torch.Tensor, seed: int) -> Norms:
    """Return the squared gradient norms of many small batches and of all of them together, drawn as training draws."""
    chosen = torch.randint(len(x), (CHUNKS, CHUNK), generator=torch.Generator().manual_seed(seed))
    small = []
    for chunk in chosen:
        gradients = torch.autograd.grad(F.cross_entropy(model(x[chunk]), y[chunk]), list(model.parameters()))
        small.append(torch.cat([g.flatten() for g in gradients]))
    stacked = torch.stack(small).double()
    return Norms(float(stacked.square().sum(1).mean()), float(stacked.mean(0).square().sum()))


def run(
    x: torch.Tensor, y: torch.Tensor, batch: int, rate: float, seed: int, target: float, most: int, norms: list | None
) -> int | None:
    """Return the steps until the loss is below the target, None if it is not after `most`; notes norms on the way."""
    model, draws = network(seed), torch.Generator().manual_seed(seed + 1)
    parameters = list(model.parameters())
    for step in range(most):
        with torch.no_grad():
            if float(F.cross_entropy(model(x), y)) < target:
                return step
        if norms is not None:
            norms.append(measure(model, x, y, seed=1000 * seed + step))
        chosen = torch.randint(len(x), (batch,), generator=draws)
        gradients = torch.autograd.grad(F.cross_entropy(model(x[chosen]), y[chosen]), parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= rate * gradient
    return None


def sweep(x: torch.Tensor, y: torch.Tensor, target: float, seeds: int) -> tuple[dict[int, float], dict[int, float]]:
    """Return the mean steps of each batch size with its best learning rate, and those rates."""
    needed: dict[int, float] = {}
    best: dict[int, float] = {}
    for batch in BATCHES:
        for rate in RATES:
            most = int(needed.get(batch, 6000)) + 1
            steps = [run(x, y, batch, rate, seed, target, most, None) for seed in range(seeds)]
            if None not in steps and statistics.mean(steps) < needed.get(batch, 1e9):
                needed[batch], best[batch] = statistics.mean(steps), rate
        print(f"batch {batch}: {needed[batch]:.0f} steps at rate {best[batch]:.3g}", file=sys.stderr, flush=True)
    return needed, best


def main() -> None:
    """Sweep, predict, print and write down."""
    import machine
    from sklearn.datasets import load_digits

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output, given.output = given.output, None
    torch.set_num_threads(1)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    needed, best = sweep(x, y, given.target, given.seeds)
    trainings: list[list[Norms]] = []
    for seed in range(given.seeds):
        trainings.append([])
        run(x, y, MEASURED, best[MEASURED], seed, given.target, 6000, trainings[-1])
    many = CHUNK * CHUNKS
    scales = []
    for norms in trainings:
        for window in (norms[i : i + WINDOW] for i in range(0, len(norms), WINDOW)):
            signal, variance = estimate(window, CHUNK, many)
            scales.append((len(window), variance / signal if signal > 0 else math.inf))
    ways = {
        "whole training": noise_of_training(scales, MEASURED),
        "mean of norms": noise_scale([norm for norms in trainings for norm in norms], CHUNK, many),
        "first steps": noise_scale([norm for norms in trainings for norm in norms[:10]], CHUNK, many),
    }
    rows, errors = [], {way: [] for way in ways}
    for batch in BATCHES:
        row = f"{batch:5} {best[batch]:8.3g} {needed[batch]:9.1f}"
        for way, found in ways.items():
            predicted = needed[MEASURED] * steps_ratio(found.samples, batch, MEASURED)
            error = predicted / needed[batch] - 1
            row += f"   {predicted:9.1f} {error:+7.1%}"
            if batch != MEASURED:
                errors[way].append(abs(error))
        rows.append(row)
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"digits, 64-64-10, SGD, loss below {given.target}, mean of {given.seeds} seeds, best of {len(RATES)}"
            f" rates; the noise is measured with batch {MEASURED}",
            "",
            f"{'':24}   " + "   ".join(f"{way:>17}" for way in ways),
            f"{'noise scale, samples':24}   " + "   ".join(f"{found.samples:17.1f}" for found in ways.values()),
            f"{'90 % of it':24}   " + "   ".join(f"{f'{w.low:.1f} to {w.high:.1f}':>17}" for w in ways.values()),
            "batch     rate  measured   " + "   ".join(f"{'predicted   error':>17}" for _ in ways),
            *rows,
            "",
            *(
                f"{way}: median error {statistics.median(of_way):.1%}, largest {max(of_way):.1%}"
                for way, of_way in errors.items()
            ),
        )
    )
    print(table)
    if output:
        output.write_text(table + "\n")


if __name__ == "__main__":
    main()
