"""Continuing a prompt with and without the key-value cache: the same tokens, and how much faster.

python benchmarks/generate.py --tokens 256 --repeats 5 --output benchmarks/results/generate.txt
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]


def main() -> None:
    """Measure in turns, print and write down."""
    import machine

    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder
    from hvdtrain.models.sampling import Sampling, sample

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32, help="tokens")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    output, given.output = given.output, None
    model = Decoder(DecoderConfig(num_layers=given.layers, hidden_size=given.hidden_size, num_heads=4), 257, seed=0)
    prompts = [[(7 * i + j) % 257 for j in range(given.prompt)] for i in range(given.batch)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    said = {}
    for _ in range(given.repeats):
        for use_cache in (True, False):
            started = time.perf_counter()
            said[use_cache] = list(
                sample(
                    model,
                    prompts,
                    given.tokens,
                    context_length=given.prompt + given.tokens,
                    sampling=Sampling(temperature=0.8, seed=1),
                    use_cache=use_cache,
                )
            )
            seconds[use_cache].append(time.perf_counter() - started)
    count = given.tokens * given.batch
    rates = {use: [count / value for value in values] for use, values in seconds.items()}
    ratios = [without / with_cache for with_cache, without in zip(seconds[True], seconds[False], strict=True)]
    table = "\n".join(
        (
            machine.describe(),
            "",
            f"decoder of {given.layers} layers x {given.hidden_size}, {given.batch} prompts of {given.prompt} tokens,"
            f" {given.tokens} added; {given.repeats} interleaved repeats; median [quartiles]",
            "",
            f"with cache     {machine.spread(rates[True], 0)} tokens/s",
            f"without        {machine.spread(rates[False], 0)} tokens/s",
            f"ratio          {machine.spread(ratios, 2)}",
            f"same tokens    {'yes' if said[True] == said[False] else 'no: fp32 rounds differently'}",
        )
    )
    print(table)
    if output:
        output.write_text(table + "\n")


if __name__ == "__main__":
    main()
