"""What becomes of every family of causal language models in the recipe hf, each in a tiny configuration.

    python benchmarks/hf_families.py --output benchmarks/results/hf_families.txt      a few minutes, one core

Loss and gradient of packed samples are judged by what transformers computes of each document alone.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))

from families import all_families, judge
from hugging import import_transformers
from machine import describe

WORDS = {
    "packed": "documents are packed",
    "rows": "right, one document a row",
    "refused": "refused, with the reason",
    "wrong": "wrong",
    "not made": "the tests make no tiny one",
}


def main() -> None:
    """Judge all families, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for family in arguments.families or all_families():
        found[family] = judge(family)
        print(family, found[family], flush=True)
    counts = Counter(verdict.word for verdict in found.values())
    lines = [
        describe(),
        f"          transformers {import_transformers().__version__}",
        "",
        *(f"{counts[word]:4} {meaning}" for word, meaning in WORDS.items()),
        "",
        *(f"{family:26}{verdict.word:9} {verdict.why}" for family, verdict in found.items()),
    ]
    text = "\n".join(lines) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
