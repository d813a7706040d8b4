"""Megabytes of text a second as tokens, by all cores: what a first start does, against the `tokenizers` library itself.

python benchmarks/tokenise.py --repeats 5 --output benchmarks/results/tokenise.txt

The text is the standard library's source. `encode_batch` and `encode_batch_fast` (which leaves out where each token
stands) are the library's calls with all of the text in memory at once, the tokens taken out of them as lists; hvdtrain
reads the files, keeps a few megabytes of them in memory, and writes the tokens to a file. "cpu" is processor time,
which other work on the machine does not change as much.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]


def main() -> None:
    """Measure in turns, print and write down."""
    import machine

    from hvdtrain.data.text.corpus import read_all, standard_library
    from hvdtrain.data.text.tokenize import write_tokens
    from hvdtrain.data.text.tokenizer import train_bpe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=300)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    load = os.getloadavg()[0]
    documents = standard_library()[: given.files]
    texts = [text for _, text in read_all(documents)]
    num_bytes = sum(len(text.encode()) for text in texts)
    tokenizer = train_bpe(iter(texts), 4096)
    with tempfile.TemporaryDirectory() as folder:
        runs: dict[str, Callable[[], object]] = {
            "encode_batch": lambda: [one.ids for one in tokenizer.inner.encode_batch(texts, add_special_tokens=False)],
            "encode_batch_fast": lambda: [
                one.ids for one in tokenizer.inner.encode_batch_fast(texts, add_special_tokens=False)
            ],
            "hvdtrain": lambda: write_tokens(Path(folder) / "tokens.bin", documents, tokenizer),
        }
        wall: dict[str, list[float]] = {name: [] for name in runs}
        cpu: dict[str, list[float]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(given.repeats):
            for name, run in runs.items():
                started, used = time.perf_counter(), sum(os.times()[:2])
                run()
                wall[name].append(num_bytes / 1e6 / (time.perf_counter() - started))
                cpu[name].append(num_bytes / 1e6 / (sum(os.times()[:2]) - used))
    rows = [
        f"{name:18} {machine.spread(wall[name], 2):>22} {machine.spread(cpu[name], 2):>26}"
        f" {statistics.median(wall['hvdtrain']) / statistics.median(wall[name]):>18.2f}"
        f" {statistics.median(cpu['hvdtrain']) / statistics.median(cpu[name]):>10.2f}"
        for name in runs
    ]
    table = "\n".join(
        (
            machine.describe(),
            f"load:     {load:.1f} processes, before",
            "",
            f"{len(texts)} files, {num_bytes / 1e6:.1f} MB, a byte-level BPE of 4,096 tokens;"
            f" {given.repeats} interleaved repeats; median [quartiles]",
            "",
            f"{'':18} {'MB/s':>22} {'MB for a second of cpu':>26} {'hvdtrain over it':>18} {'cpu':>10}",
            *rows,
        )
    )
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


if __name__ == "__main__":
    main()
