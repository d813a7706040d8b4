"""Where the time of a GPU's step goes: the model of the size of GPT-2 small, one GPU, kernel by kernel.

    python benchmarks/gpu_step.py --compile blocks --output benchmarks/results/gpu_step.txt

Takes training steps on random tokens, without a log or checkpoints: milliseconds a step, tokens/s, the share of the
peak by nanoGPT's count of operations (6 a parameter and token, 12 x layers x width x length for attention), and what
torch's profiler sees: the kernels, and where the GPU has none.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "benchmarks")]

import machine  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch._inductor.config  # noqa: E402
from torch.autograd import DeviceType  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from hvdtrain.models import linear  # noqa: E402
from hvdtrain.process.launch import Launch  # noqa: E402
from hvdtrain.recipes import load_recipe  # noqa: E402
from hvdtrain.trainer import train_step  # noqa: E402
from hvdtrain.trainer.peaks import data_sheet_peak  # noqa: E402
from hvdtrain.trainer.rehearsal import rehearse  # noqa: E402
from hvdtrain.trainer.state import start_training  # noqa: E402
from hvdtrain.world import SoloWorld  # noqa: E402

VOCAB, WARM_UP, WINDOWS, STEPS, MOST_ROWS = 50_304, 8, 4, 5, 40
MOST_GAPS, LONG_US = 8, 5.0


class Gap(NamedTuple):
    """Time in which the GPU computes nothing, after one kernel and before another."""

    after: str
    before: str
    us: float


def recipe_of(given: argparse.Namespace, folder: Path) -> Any:
    """Return lm-124m on random tokens."""
    draw = np.random.default_rng(0)
    for name, count in (("train", 4_000_000), ("val", 100_000)):
        draw.integers(VOCAB, size=count, dtype=np.uint16).tofile(folder / f"{name}.bin")
    recipe: Any = load_recipe("lm-124m")
    paths = {"path": str(folder / "train.bin"), "val_path": str(folder / "val.bin")}
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(
            recipe.train,
            micro_batch_size=given.micro_batch,
            accum_steps=given.accum,
            global_batch_size=None,
            precision=given.precision,
        ),
        model=dataclasses.replace(
            recipe.model, compile=given.compile, loss_chunk=given.loss_chunk, residual_dtype=given.residual_dtype
        ),
        data=dataclasses.replace(recipe.data, tokenizer="byte", vocab_size=VOCAB, **paths),
    )


def is_kernel(event: Any) -> bool:
    """Return whether a row of the profiler's is a kernel's, not a name under which torch has entered some of them.

    Not to be told by the name: the kernel of torch's fused optimizers has "Optimizer" in it, as their entry has.
    """
    return bool(event.device_type == DeviceType.CUDA) and not event.is_user_annotation


def gaps_of(events: list[Any]) -> list[Gap]:
    """Return the gaps between what the GPU did."""
    done = sorted((event for event in events if is_kernel(event)), key=lambda event: event.time_range.start)
    gaps, last = [], done[0]
    for event in done[1:]:
        if event.time_range.start > last.time_range.end:
            gaps.append(Gap(last.name, event.name, event.time_range.start - last.time_range.end))
        last = max(last, event, key=lambda each: each.time_range.end)
    return gaps


def describe_gaps(gaps: list[Gap]) -> list[str]:
    """Return lines on the gaps of some steps: what they take of one, and between which kernels the longest lie."""
    long = [gap for gap in gaps if gap.us > LONG_US]
    by_place: dict[tuple[str, str], list[float]] = {}
    for gap in long:
        by_place.setdefault((gap.after, gap.before), []).append(gap.us)
    places = sorted(by_place.items(), key=lambda item: -sum(item[1]))
    return [
        f"no kernel runs for {sum(gap.us for gap in gaps) / STEPS / 1e3:.2f} ms of a step, of which"
        f" {sum(gap.us for gap in long) / STEPS / 1e3:.2f} ms in more than {LONG_US:.0f} us at a time, mostly between",
        *(
            f"{sum(found) / STEPS / 1e3:8.3f} ms {len(found) / STEPS:6.1f}  {after[:60]} and {before[:60]}"
            for (after, before), found in places[:MOST_GAPS]
        ),
    ]


def main() -> None:
    """Measure, print and write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", choices=["none", "blocks", "model"], default="blocks")
    parser.add_argument("--micro-batch", type=int, default=16)
    parser.add_argument("--accum", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--loss-chunk", type=int, help="positions whose logits exist at a time")
    parser.add_argument("--precision", choices=["bf16", "bf16-true", "fp16", "tf32", "fp32"], default="bf16")
    parser.add_argument("--residual-dtype", choices=["fp32", "products"], default="fp32")
    parser.add_argument("--apart", action="store_true", help="a product for each weight, instead of joined ones")
    parser.add_argument("--inductor", nargs="*", default=[], help="NAME=NUMBER of torch's compiler")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this torch sees no GPU")
    for word in given.inductor:
        name, _, number = word.partition("=")
        if hasattr(torch._inductor.config, name):
            setattr(torch._inductor.config, name, int(number))
        else:
            print(f"torch {torch.__version__} has no {name}: left out")
    if given.apart:
        linear._gains_by_one = lambda x: False
    with tempfile.TemporaryDirectory() as folder:
        recipe = recipe_of(given, Path(folder))
        world = SoloWorld(torch.device("cuda", 0), Launch("none"))
        job = rehearse(recipe.build(lambda line: None), recipe, world, only_full_batches=True)
        training = start_training(job)
        for _ in range(WARM_UP):
            train_step(job, training)
        torch.cuda.synchronize()
        seconds, of_host = [], []
        for _ in range(WINDOWS):
            started = time.perf_counter()
            for _ in range(STEPS):
                train_step(job, training)
            of_host.append((time.perf_counter() - started) / STEPS)
            torch.cuda.synchronize()
            seconds.append((time.perf_counter() - started) / STEPS)
        step, host = statistics.median(seconds), statistics.median(of_host)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiled:
            for _ in range(STEPS):
                train_step(job, training)
            torch.cuda.synchronize()
    tokens = given.accum * given.micro_batch * recipe.data.sequence_length
    shape = recipe.model
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    flops = tokens * (6 * parameters + 12 * shape.num_layers * shape.hidden_size * recipe.data.sequence_length)
    peak = data_sheet_peak(torch.cuda.get_device_name(0), torch.bfloat16)
    share = f", {flops / step / peak:.1%} of the data sheet's peak in bf16" if peak else ""
    kernels = [event for event in profiled.key_averages() if is_kernel(event)]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    lines = [
        machine.describe(),
        "",
        f"{given.precision}, residual stream {given.residual_dtype}; loss in chunks of"
        f" {given.loss_chunk or 'as it is'}; compiled: {' '.join([given.compile, *given.inductor])}"
        f"{'; products apart' if given.apart else ''}",
        f"{given.accum} x {given.micro_batch} x {recipe.data.sequence_length} tokens: {step * 1e3:.1f} ms a step,"
        f" the host through after {host * 1e3:.1f}; {tokens / step:,.0f} tokens/s{share};"
        f" {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most",
        f"kernels: {total / STEPS / 1e3:.1f} ms a step in {sum(event.count for event in kernels) / STEPS:.0f} launches",
        *(
            f"{event.self_device_time_total / STEPS / 1e3:8.2f} ms {event.count / STEPS:6.0f}  {event.key[:100]}"
            for event in kernels[:MOST_ROWS]
        ),
        *describe_gaps(gaps_of(profiled.events())),
    ]
    print("\n".join(lines))
    if given.output:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
