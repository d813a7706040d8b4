"""How long does it take from a command to the end of its first steps?

    python benchmarks/start_up.py

Each command runs on its own, one after the other, in turns: torch alone, a loop of two steps in bare torch (which loads
torch's compiler when it makes its optimizer), hvdtrain's help, and two steps of `hvdtrain train`, once as it is and
once with the compiler loaded as bare torch loads it. Files are in the page cache: a first round is not counted.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402

BARE = """
import torch
model = torch.nn.Sequential(torch.nn.Linear(784, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10))
optimizer = torch.optim.AdamW(model.parameters())
for _ in range(2):
    loss = torch.nn.functional.cross_entropy(model(torch.rand(64, 784)), torch.randint(10, (64,)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""
WITH_COMPILER = "import torch._dynamo, runpy, sys; runpy.run_module('hvdtrain', run_name='__main__', alter_sys=True)"
TRAIN = ("train", str(REPOSITORY / "benchmarks" / "overhead_recipe.py"), "--train.steps", "2", "--run-dir")
OURS = ("-m", "hvdtrain")
COMMANDS: dict[str, tuple[str, ...]] = {
    "import torch": ("-c", "import torch"),
    "two steps in bare torch": ("-c", BARE),
    "hvdtrain --help": (*OURS, "--help"),
    "hvdtrain train lm --help": (*OURS, "train", "lm", "--help"),
    "hvdtrain train, two steps": (*OURS, *TRAIN),
    "the same, torch's compiler loaded": ("-c", WITH_COMPILER, *TRAIN),
}


def seconds(arguments: tuple[str, ...], folder: Path) -> tuple[float, float]:
    """Return the seconds by the clock and of processor time that Python takes with these arguments."""
    words = [*arguments, str(folder / "run")] if arguments[-1] == "--run-dir" else arguments
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *words], cwd=REPOSITORY, check=True, timeout=120, stdout=subprocess.DEVNULL)
    by_clock, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    return by_clock, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="a command runs so often")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for repeat in range(given.repeats + 1):
        for name, arguments in COMMANDS.items():
            with tempfile.TemporaryDirectory() as folder:
                both = seconds(arguments, Path(folder))
            if repeat:
                taken[name].append(both)
    lines = [machine.describe(), "", "one process; median and quartiles in seconds, and by how much of torch's import"]
    lines.append(f"{'':36}{'by the clock':24}{'processor time':24}ratio")
    for name, pairs in taken.items():
        clock, processor = zip(*pairs, strict=True)
        ratios = [one[0] / torch[0] for one, torch in zip(pairs, taken["import torch"], strict=True)]
        row = f"{name:36}{machine.spread(clock, 2):24}{machine.spread(processor, 2):24}{machine.spread(ratios, 2)}"
        lines.append(row)
    table = "\n".join(lines)
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
