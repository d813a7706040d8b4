"""The verb: builds the variants, lets them take turns, shows the table."""

from __future__ import annotations

from collections.abc import Sequence

from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.trainer import Recipe
from hvdtrain.trainer.precision import settle_precision
from hvdtrain.verbs.bench.flops import flops_per_step, peak_flops
from hvdtrain.verbs.bench.measure import Variant, build_variants, memory_peak_bytes
from hvdtrain.verbs.bench.report import parts_table, row_of, throughput_lines, variants_table
from hvdtrain.verbs.kit import Speaker, check_json_path, head_line, write_json
from hvdtrain.verbs.options import BenchOptions
from hvdtrain.verbs.phase_clock import PhaseClock
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
    world.progress = PhaseClock(world.device)
    task = world.together(lambda: recipe.build(say), "build")
    built, refused = build_variants(recipe, task, world, options.knobs)
    first = built[0]
    flops = flops_per_step(first.job, first.training)
    peak, source = peak_flops(world.device, recipe.train.precision)
    say(head_line("bench", name, world.size, str(first.job.plan), recipe.train.precision))
    if choice:
        say(choice)
    _take_turns(built, options)
    rows = [row_of(variant, first) for variant in built]
    mfu = flops / rows[0].step_s / (peak * world.size)
    memory = memory_peak_bytes(world.device)
    say(parts_table(rows[0]))
    say(
        f"{flops / 1e9:.4g} GFLOP a step, peak {peak / 1e9:,.0f} GFLOP/s a rank ({source}): MFU {mfu:.1%};"
        f" at most {memory / 2**30:.2f} GiB of memory on rank 0"
    )
    say(throughput_lines(rows[0], task.unit, world.size))
    say(variants_table(rows, task.unit))
    for text in refused:
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


def _take_turns(variants: Sequence[Variant], options: BenchOptions) -> None:
    """Warm all variants up, then measure them in rounds. Collective."""
    for variant in variants:
        variant.run(options.warmup, is_counted=False)
    for _ in range(options.rounds):
        for variant in variants:
            variant.run(options.steps, is_counted=True)
