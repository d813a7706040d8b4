"""Networks of convolutions on CPUs: images as planes against channels last, forward and backward, one thread.

    nice -n -20 python benchmarks/channels_last.py --output benchmarks/results/channels_last.txt

The two layouts take turns. What is measured is processor time, which counts less of what else runs on the machine than
the clock does.
"""

from __future__ import annotations

import argparse
import copy
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

from hvdtrain.models.small_resnet import SmallResNet  # noqa: E402
from hvdtrain.process.launch import prepare_process  # noqa: E402

CLASSES = 10
# Network, images, pixels a side.
CASES = (("resnet20", 32, 32), ("resnet20", 128, 32), ("resnet18", 8, 64), ("resnet18", 4, 224), ("resnet50", 4, 128))


def network(name: str) -> nn.Module:
    """Return the network of this name."""
    if name == "resnet20":
        return SmallResNet(20, CLASSES)
    import torchvision

    model: nn.Module = getattr(torchvision.models, name)(num_classes=CLASSES)
    return model


def step(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    """Compute the gradients."""
    model.zero_grad()
    F.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]


def measure(name: str, count: int, pixels: int, repeats: int) -> str:
    """Return the row of one network."""
    planes, images = network(name), torch.randn(count, 3, pixels, pixels)
    labels = torch.randint(CLASSES, (count,))
    last = copy.deepcopy(planes).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    actions = [
        partial(step, planes, images, labels),
        partial(step, last, images.to(memory_format=torch.channels_last), labels),
    ]
    times = machine.take_turns(actions, repeats)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    cells = [*(machine.spread([1e3 * s for s in measured], 0) for measured in times), machine.spread(ratios, 2)]
    return f"{f'{name}, {count} x {pixels} x {pixels}':24} {' '.join(f'{cell:>22}' for cell in cells)}"


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    head = f"{'fp32':24} {'planes, ms':>22} {'channels last, ms':>22} {'of the time of planes':>22}"
    rows = [measure(*case, given.repeats) for case in CASES]
    about = "forward and backward; processor time, in turns; median [quartiles]"
    table = "\n".join((machine.describe(), "", about, "", head, *rows))
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    prepare_process()
    main()
