"""Matrix products of linear layers in fp32: torch's own (MKL) against oneDNN's, one thread.

    nice -n -20 python benchmarks/linear.py --output benchmarks/results/linear_avx2.txt

For each layer the output and both gradients, then steps of a decoder; the two libraries take turns. What is measured is
processor time, which counts less of what else runs on the machine than the clock does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

from hvdtrain.models.config import DecoderConfig  # noqa: E402
from hvdtrain.models.decoder import Decoder  # noqa: E402
from hvdtrain.models.linear import linear, use_onednn  # noqa: E402
from hvdtrain.process.launch import prepare_process  # noqa: E402

# Rows (samples x tokens), inputs and outputs of a layer.
SHAPES = ((64, 784, 128), (64, 256, 256), (1024, 256, 256), (1024, 256, 688), (1024, 688, 256), (1024, 768, 3072))
# Layers, width, samples and tokens of a decoder.
STEPS = ((4, 128, 16, 128), (6, 256, 8, 128))


VOCABULARY = 256


def layer_row(samples: int, inputs: int, outputs: int, repeats: int) -> str:
    """Return what was measured of one layer."""
    x, weight = torch.randn(samples, inputs, requires_grad=True), torch.randn(outputs, inputs, requires_grad=True)
    gradient = torch.randn(samples, outputs)

    def work(product: Callable[..., torch.Tensor]) -> None:
        torch.autograd.grad(product(x, weight), [x, weight], gradient)

    times = machine.take_turns([partial(work, F.linear), partial(work, linear)], repeats)
    operations = 3 * 2 * samples * inputs * outputs
    rates = [[operations / s / 1e9 for s in measured] for measured in times]
    return row(f"{samples} x {inputs} -> {outputs}", rates, times, 0)


def step_row(layers: int, width: int, batch: int, length: int, repeats: int) -> str:
    """Return what was measured of forward and backward passes of a decoder, in ms."""
    tokens, targets = (torch.randint(VOCABULARY, (batch, length)) for _ in range(2))
    models = [Decoder(DecoderConfig(num_layers=layers, hidden_size=width, num_heads=4), VOCABULARY) for _ in range(2)]
    use_onednn(models[1])

    def work(model: Decoder) -> None:
        model.zero_grad()
        model(tokens, targets).backward()

    times = machine.take_turns([partial(work, model) for model in models], repeats)
    return row(f"{layers} x {width}, {batch} x {length}", [[1e3 * s for s in measured] for measured in times], times, 1)


def row(what: str, shown: Sequence[Sequence[float]], times: Sequence[Sequence[float]], digits: int) -> str:
    """Return a line of the table: both libraries, and how many times as fast oneDNN is."""
    ratios = [a / b for a, b in zip(*times, strict=True)]
    cells = [*(machine.spread(values, digits) for values in shown), machine.spread(ratios, 2)]
    return f"{what:20} {' '.join(f'{cell:>20}' for cell in cells)}"


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = f"{'layer':20} {'torch, GFLOP/s':>20} {'oneDNN, GFLOP/s':>20} {'times as fast':>20}"
    rows = [layer_row(*shape, given.repeats) for shape in SHAPES]
    decoders = f"{'decoder':20} {'torch, ms':>20} {'oneDNN, ms':>20} {'times as fast':>20}"
    steps = [step_row(*shape, given.repeats) for shape in STEPS]
    about = "output and both gradients; processor time, in turns; median [quartiles]"
    table = "\n".join((machine.describe(), "", about, "", head, *rows, "", decoders, *steps))
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    prepare_process()
    main()
