"""The verb: builds the variants, has them measured, shows the table."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.trainer import Recipe
from hvdtrain.trainer.flops import flops_per_step
from hvdtrain.trainer.precision import settle_precision
from hvdtrain.trainer.task import build_task
from hvdtrain.verbs.bench.measure import Possible, Variant, are_measured_apart, memory_peak_bytes
from hvdtrain.verbs.bench.peak import peak_flops
from hvdtrain.verbs.bench.report import parts_table, row_of, throughput_lines, variants_table
from hvdtrain.verbs.kit import Speaker, check_json_path, head_line, write_json
from hvdtrain.verbs.options import BenchOptions
from hvdtrain.world import World, watched


def bench(name: str, recipe: Recipe, options: BenchOptions) -> int:
    """Answer `bench RECIPE`; returns the exit code. Collective.

    Raises:
        ConfigError: settings do not fit, or the figures cannot be written where they should be.
    """
    return watched(recipe, lambda world, heartbeat, unwatched: _bench(name, recipe, options, world))


def _bench(name: str, recipe: Recipe, options: BenchOptions, world: World) -> int:
    say = Speaker(world.rank == 0)
    world.together(lambda: check_json_path(options.json) if say.speaks else None, "bench.json.path")
    recipe, choice = settle_precision(recipe, world)

    def begin(plan: str) -> None:
        say(head_line("bench", name, world.size, plan, recipe.train.precision))
        if choice:
            say(choice)

    task = world.together(lambda: build_task(recipe, say), "build")
    peak, source = peak_flops(world.device, recipe.train.precision)
    possible = Possible(recipe, task, world, options.knobs)
    measure = _one_by_one if are_measured_apart(world.device) else _in_turns
    built, flops, memory = measure(possible, options, begin)
    rows = [row_of(variant, built[0]) for variant in built]
    mfu = flops / rows[0].step_s / (peak * world.size)
    say(parts_table(rows[0]))
    say(
        f"{flops / 1e9:.4g} GFLOP a step, peak {peak / 1e9:,.0f} GFLOP/s a rank ({source}): MFU {mfu:.1%};"
        f" at most {memory / 2**30:.2f} GiB of memory on rank 0"
    )
    say(throughput_lines(rows[0], task.unit, world.size))
    say(variants_table(rows, task.unit))
    for text in possible.refused:
        say(f"not measured: {text}")
    everyone = world.all_gather_object(describe_rank(world.device), "bench.ranks")
    answer = {
        "recipe": name,
        "ranks": world.size,
        "flops_per_step": flops,
        "peak_flops": peak,
        "mfu": mfu,
        "memory_peak_bytes": memory,
        "variants": [row.as_dict(task.unit) for row in rows],
        "environment": describe_environment(world.launch.launcher, everyone),
    }
    world.together(lambda: write_json(options.json, answer) if say.speaks else None, "bench.json")
    return 0


def _in_turns(
    possible: Possible, options: BenchOptions, announce: Callable[[str], None]
) -> tuple[list[Variant], float, int]:
    """Warm all variants up, then measure them in rounds.

    Returns the variants, the first one's operations a step, and the most memory that was held. Collective.
    """
    built = list(possible)
    flops = _flops_of(built[0])
    announce(built[0].plan)
    for variant in built:
        variant.run(options.warmup, is_counted=False)
    for _ in range(options.rounds):
        for variant in built:
            variant.run(options.steps, is_counted=True)
    return built, flops, memory_peak_bytes(_device_of(built[0]))


def _one_by_one(
    possible: Possible, options: BenchOptions, announce: Callable[[str], None]
) -> tuple[list[Variant], float, int]:
    """Build, measure and free one variant after another; the same, with the memory of the first. Collective."""
    built: list[Variant] = []
    flops, memory = 0.0, 0
    for variant in possible:
        built.append(variant)
        if len(built) == 1:
            flops = _flops_of(variant)
            announce(variant.plan)
        variant.run(options.warmup, is_counted=False)
        for _ in range(options.rounds):
            variant.run(options.steps, is_counted=True)
        memory = memory or memory_peak_bytes(_device_of(variant))
        variant.free()
    return built, flops, memory


def _flops_of(variant: Variant) -> float:
    assert variant.rehearsal is not None
    return flops_per_step(*variant.rehearsal)


def _device_of(variant: Variant) -> torch.device:
    assert variant.rehearsal is not None
    return variant.rehearsal[0].world.device
