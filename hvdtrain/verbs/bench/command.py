"""The verb: builds the variants, lets them take turns, shows the table."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from hvdtrain import __version__
from hvdtrain.errors import ConfigError
from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.trainer import Recipe
from hvdtrain.verbs.bench.flops import flops_per_step, peak_flops
from hvdtrain.verbs.bench.measure import Variant, build_variants, memory_peak_bytes
from hvdtrain.verbs.bench.stopwatch import PARTS, TimedProgress
from hvdtrain.verbs.options import BenchOptions
from hvdtrain.world import World, watched


def bench(name: str, recipe: Recipe, options: BenchOptions) -> int:
    """Answer `bench RECIPE`; returns the exit code. Collective."""
    return watched(recipe, lambda world, heartbeat, unwatched: _bench(name, recipe, options, world))


def _bench(name: str, recipe: Recipe, options: BenchOptions, world: World) -> int:
    say = _say if world.rank == 0 else _say_nothing
    world.progress = TimedProgress(world.device, waits=True)
    task = world.together(lambda: recipe.build(say), "build")
    built, refused = build_variants(recipe, task, world, options.knobs)
    first = built[0]
    flops = flops_per_step(first.job, first.training)
    peak, source = peak_flops(world.device, recipe.train.precision)
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    say(f"hvdtrain {__version__}: bench {name} on {ranks}, {first.job.plan}, {recipe.train.precision}")
    for variant in built:
        variant.run(options.warmup, is_counted=False)
    for _ in range(options.rounds):
        for variant in built:
            variant.run(options.steps, is_counted=True)
    unit = task.unit
    rows = [_row(variant, first, unit) for variant in built]
    mfu = flops / statistics.median(first.steps_s) / (peak * world.size)
    say(_parts_table(first))
    say(
        f"{flops / 1e9:.4g} GFLOP a step, peak {peak / 1e9:,.0f} GFLOP/s a rank ({source}): MFU {mfu:.1%};"
        f" at most {memory_peak_bytes(world.device) / 2**30:.2f} GiB of memory on rank 0"
    )
    say(_table(rows, unit))
    for text in refused:
        say(f"not measured: {text}")
    everyone = world.all_gather_object(describe_rank(world.device), "bench.ranks")
    answer = {
        "recipe": name,
        "ranks": world.size,
        "flops_per_step": flops,
        "peak_flops": peak,
        "mfu": mfu,
        "memory_peak_bytes": memory_peak_bytes(world.device),
        "variants": rows,
        "environment": describe_environment(world.launch.launcher, everyone),
    }
    world.together(lambda: _write(options.json, answer) if world.rank == 0 else None, "bench.json")
    return 0


def _row(variant: Variant, first: Variant, unit: str) -> dict[str, Any]:
    step_s = statistics.median(variant.steps_s)
    # Time a sample, round by round, against the recipe as it is: what slows the machine slows both.
    ratios = [
        (mine / variant.samples_per_step) / (base / first.samples_per_step)
        for mine, base in zip(variant.steps_s, first.steps_s, strict=True)
    ]
    low, middle, high = _quartiles(ratios)
    return {
        "name": variant.name,
        "step_s": step_s,
        "step_s_quartiles": _quartiles(variant.steps_s),
        f"{unit}_per_s": variant.targets_per_step / step_s,
        "time_per_sample_ratio": middle,
        "time_per_sample_ratio_quartiles": (low, middle, high),
        "parts_s": {part: statistics.median(parts[part] for parts in variant.parts_s) for part in PARTS},
    }


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _parts_table(first: Variant) -> str:
    total = statistics.median(first.steps_s)
    lines = ["part            ms a step   share"]
    for part in PARTS:
        seconds = statistics.median(parts[part] for parts in first.parts_s)
        label = "exposed comm." if part == "communication" else part
        lines.append(f"{label:14} {1e3 * seconds:10.2f}  {seconds / total:6.1%}")
    return "\n".join([*lines, f"{'step':14} {1e3 * total:10.2f}"])


def _table(rows: list[dict[str, Any]], unit: str) -> str:
    lines = [f"{'':28} {'ms a step':>10} {unit + '/s':>12}   time a sample against the first [quartiles]"]
    for row in rows:
        low, middle, high = row["time_per_sample_ratio_quartiles"]
        lines.append(
            f"{row['name']:28} {1e3 * row['step_s']:10.2f} {row[f'{unit}_per_s']:12,.0f}"
            f"   {middle:.3f} [{low:.3f}, {high:.3f}]"
        )
    return "\n".join(lines)


def _write(path: Path | None, answer: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(answer, indent=2) + "\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error.strerror}") from error


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _say_nothing(text: str) -> None:
    pass
