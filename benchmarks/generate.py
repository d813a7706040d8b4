"""Tokens a second of generated text on one core: hvdtrain, with and without its cache, and transformers' `generate`.

All three continue the same prompt with the same exported model, in turns. hvdtrain's figure is that of the verb: text
included. transformers' is of tokens alone. "Of processor time" is what a core of its own would give: other work on the
machine, whose load is written down, changes it less.

python benchmarks/generate.py --repeats 7 --output benchmarks/results/generate.txt
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

# Name, layers, width, tokens of the context: the recipe lm's, and one of five million parameters.
MODELS = (("the default run's", 3, 128, 128), ("5M", 6, 256, 288))
PROMPT = "def read(path, encoding='utf-8')"  # a token a byte, as in the models
UNCACHED = "without cache"

Run = Callable[[float], list[int]]
"""Continues the prompt at a temperature: the tokens that were added."""


def main() -> None:
    """Measure in turns, print and write down."""
    import machine
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    parts = [machine.describe(), f"load:     {os.getloadavg()[0]:.1f} processes, before"]
    if importlib.util.find_spec("transformers") is None:
        parts.append("transformers is not installed: it is left out")
    else:
        parts.append(f"peer:     transformers {importlib.metadata.version('transformers')}")
    for model in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            parts.append(compare(model, Path(folder), given.repeats))
    table = "\n".join(parts)
    print(table)
    if given.output:
        given.output.write_text(table + "\n")


def compare(model: tuple[str, int, int, int], folder: Path, repeats: int) -> str:
    """Return the rows of one model."""
    import machine

    name, num_layers, hidden_size, length = model
    num_parameters = export(folder, num_layers, hidden_size, length)
    num_tokens = length - len(PROMPT)
    runs: dict[str, Run] = {
        "hvdtrain": hvdtrain_run(folder, num_tokens, use_cache=True),
        UNCACHED: hvdtrain_run(folder, num_tokens, use_cache=False),
    }
    if importlib.util.find_spec("transformers") is not None:
        runs["transformers"] = transformers_run(folder, num_tokens)
    greedy = [run(0.0) for run in runs.values()]  # the first time is not measured
    wall: dict[str, list[float]] = {key: [] for key in runs}
    cpu: dict[str, list[float]] = {key: [] for key in runs}
    for repeat in range(repeats):
        for key, run in runs.items():
            if key == UNCACHED and repeat % 3:  # takes as long as all others
                continue
            started, used = time.perf_counter(), time.process_time()
            count = len(run(0.8))
            wall[key].append(count / (time.perf_counter() - started))
            cpu[key].append(count / (time.process_time() - used))
            assert count == num_tokens
    lines = [
        f"{'tokens/s':14} {'of time':>22} {'of processor time':>22} {'hvdtrain over it':>18} {'processor time':>16}"
    ]
    for key in runs:
        over = [statistics.median(rates["hvdtrain"]) / statistics.median(rates[key]) for rates in (wall, cpu)]
        spreads = machine.spread(wall[key], 0), machine.spread(cpu[key], 0)
        lines.append(f"{key:14} {spreads[0]:>22} {spreads[1]:>22} {over[0]:>18.2f} {over[1]:>16.2f}")
    lines.append(f"same greedy tokens: {'yes' if all(tokens == greedy[0] for tokens in greedy) else 'no'}")
    head = (
        f"\n{name}: {num_layers} layers x {hidden_size}, {num_parameters / 1e6:.2f}M parameters, one thread, a prompt"
        f" of {len(PROMPT)} tokens and {num_tokens} more; {repeats} interleaved repeats; median [quartiles]\n"
    )
    return "\n".join((head, *lines))


def export(folder: Path, num_layers: int, hidden_size: int, length: int) -> int:
    """Write a model as `export` does; return its number of parameters."""
    from hvdtrain.data.text.tokenizer import ByteTokenizer, write_tokenizer
    from hvdtrain.models.config import DecoderConfig
    from hvdtrain.models.decoder import Decoder
    from hvdtrain.models.interchange import to_llama
    from hvdtrain.models.weights import model_weights
    from hvdtrain.verbs.export import write_model

    model = Decoder(DecoderConfig(num_layers=num_layers, hidden_size=hidden_size, num_heads=4), 257, seed=0)
    files = folder / "files"
    files.mkdir()
    # Text never ends here: how often a model says so is not what is measured.
    (files / "config.json").write_text(json.dumps(to_llama(model.config, 257, length, None)))
    write_tokenizer(ByteTokenizer(), files, length)
    write_model(files, model_weights(model), folder / "export")
    return model.num_parameters()


def hvdtrain_run(folder: Path, num_tokens: int, use_cache: bool) -> Run:
    """Return what the verb `generate` does once the model is loaded."""
    from hvdtrain.models.sampling import Sampling
    from hvdtrain.rundir.trained import open_trained
    from hvdtrain.verbs.generate import Continuation, open_writer

    writer = open_writer(open_trained(folder / "export", "latest"), is_chat=False)

    def run(temperature: float) -> list[int]:
        tokens: list[int] = []
        text = Continuation(writer, ())

        def add(row: int, token: int) -> bool:
            tokens.append(token)
            text.add(token)
            text.take()
            return False

        writer.write([PROMPT], num_tokens, Sampling(temperature=temperature, seed=1), add, use_cache)
        return tokens

    return run


def transformers_run(folder: Path, num_tokens: int) -> Run:
    """Return transformers' own way, on what it reads of the export."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "export")
    inputs = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False)
    shown = inputs["input_ids"]

    def run(temperature: float) -> list[int]:
        how = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        settings = transformers.GenerationConfig(max_new_tokens=num_tokens, pad_token_id=0, **how)
        with torch.inference_mode():
            said = model.generate(shown, attention_mask=inputs["attention_mask"], generation_config=settings)
        tokens: list[int] = said[0, shown.shape[1] :].tolist()
        return tokens

    return run


if __name__ == "__main__":
    main()
