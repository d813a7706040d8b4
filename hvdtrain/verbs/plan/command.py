"""The verb: measures, predicts, shows; or answers again from what was measured."""

from __future__ import annotations

import dataclasses
import math
import socket
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from hvdtrain import __version__
from hvdtrain.errors import ConfigError
from hvdtrain.optim.noise import NoiseScale, noise_scale
from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.rundir.log import MetricLog
from hvdtrain.trainer import Job, Recipe, Task, settle
from hvdtrain.trainer.memory import RESERVE, available, estimate
from hvdtrain.trainer.state import start_training
from hvdtrain.verbs.options import PlanOptions
from hvdtrain.verbs.plan import measure
from hvdtrain.verbs.plan.answer import Answer, Facts, answer, predict
from hvdtrain.verbs.plan.logged import find_noise, noise_of_run
from hvdtrain.verbs.plan.network import Controller, Network, fit, other_network
from hvdtrain.verbs.plan.report import describe, load_json, save_html, save_json, table
from hvdtrain.world import World, codec_of, watched

# A rank this much slower than the median one is named.
_STRAGGLER = 1.15


def plan(name: str, recipe: Recipe, options: PlanOptions) -> int:
    """Answer `plan RECIPE`; returns the exit code. Collective, but for `--from`."""
    if options.from_ is not None:
        facts = _with_noise(load_json(options.from_), _logged_noise(options))
        _tell(_ask(facts, options), options, {}, sys.stdout.write)
        return 0
    return watched(
        recipe,
        lambda world, heartbeat, unwatched: _plan(name, recipe, options, world),
        lambda launch: measure.groups_of(launch.size, launch.local_size),
    )


def _plan(name: str, recipe: Recipe, options: PlanOptions, world: World) -> int:
    say = sys.stdout.write if world.rank == 0 else _say_nothing
    logged = world.together(lambda: _logged_noise(options) if world.rank == 0 else None, "plan.noise")
    task = world.together(lambda: recipe.build(lambda line: _say(say, line)), "plan.build")
    job = world.together(lambda: _job(recipe, task, world), "plan.settle")
    everyone = world.all_gather_object((socket.gethostname(), describe_rank(world.device)), "plan.ranks")
    hosts = [host for host, _ in everyone]
    ranks = "1 rank" if world.size == 1 else f"{world.size} ranks"
    _say(say, f"hvdtrain {__version__}: plan {name}, measured on {ranks} of {len(set(hosts))} hosts, {job.plan}")
    facts = _measure(name, recipe, task, job, world, hosts, 0 if options.noise_from else options.noise_steps)
    facts = _with_noise(facts, world.broadcast_object(logged, "plan.noise"))
    _say(say, describe(facts))
    given = world.together(lambda: _ask(facts, options, world.size), "plan.answer")
    environment = describe_environment(world.launch.launcher, [rank for _, rank in everyone])
    world.together(lambda: _tell(given, options, environment, say) if world.rank == 0 else None, "plan.write")
    return 0


def _logged_noise(options: PlanOptions) -> NoiseScale | None:
    """Return what a run has logged: the one of --noise-from, or the one in whose directory --from finds the plan."""
    if options.noise_from is not None:
        return noise_of_run(options.noise_from)
    return None if options.from_ is None else find_noise(options.from_)


def _with_noise(facts: Facts, noise: NoiseScale | None) -> Facts:
    return facts if noise is None else dataclasses.replace(facts, noise=noise)


def _job(recipe: Recipe, task: Task, world: World) -> Job:
    steps = dataclasses.replace(recipe.train, steps=recipe.train.steps or 1000, epochs=None, max_time=None)
    settings = dataclasses.replace(recipe, train=steps)
    return settle(task, settings, world, Path("hvdtrain-plan-has-no-run-directory"), MetricLog(None, []))


def _measure(
    name: str, recipe: Recipe, task: Task, job: Job, world: World, hosts: list[str], noise_steps: int
) -> Facts:
    """Measure everything; the same facts on every rank. Collective."""
    micro, per_host = job.plan.micro_batch_size, hosts.count(hosts[0])
    settings: Any = job.config
    room = _memory(job)
    by_micro, memory = _own_by_micro_batch(settings, task, world, micro, room)
    own, training = measure.own_job(settings, task, world.device, micro)
    world.barrier("plan.together")
    mine = measure.own_steps(own, training, warmup=1, steps=5)
    of_ranks = world.all_gather_object(mine, "plan.own")
    slowest = max(of_ranks, key=lambda item: item.compute.total_s)
    codec = codec_of(recipe.comm.compression)
    buckets = measure.ready_buckets(own, training, recipe.comm.bucket_mib << 20, codec)
    buckets = world.broadcast_object(buckets, "plan.buckets")
    network, fp16, plain = _network(world, hosts, buckets, codec.wire_bytes(1, torch.float32) == 2)
    norms, small, large = measure.gradient_norms(own, training, world, noise_steps)
    # The first steps of all have gradients of their own kind.
    noise = noise_scale(norms[len(norms) // 2 :], small, large) if norms else None
    samples = job.order.global_batch(0)
    alone = by_micro[micro]
    facts = Facts(
        recipe=name,
        unit=task.unit,
        units_per_sample=task.train_data.num_targets(samples) / len(samples),
        micro_batch_size=micro,
        accum_steps=job.plan.accum_steps,
        ranks_per_host=per_host,
        alone=alone.compute,
        together=slowest.compute,
        together_ranks=per_host,
        spread=statistics.median(item.spread for item in of_ranks),
        buckets=buckets,
        network=network,
        fp16_network=fp16,
        noise=noise,
        slowest=_straggler(of_ranks, hosts),
        steps_to_target=recipe.train.steps,
        recipe_batch=job.plan.global_batch_size,
        memory_bytes=memory,
        memory_fixed_bytes=room.fixed_bytes,
        memory_sample_bytes=room.sample_bytes,
        memory_free_bytes=room.free_bytes,
        by_micro_batch={size: item.compute for size, item in by_micro.items()},
        plain_mpi_s=plain,
    )
    if world.size == 1:
        return dataclasses.replace(facts, measured_steps_s={1: alone.compute.total_s})
    # Real steps of all ranks tell how much of the hidden communication the computing pays for.
    whole = measure.whole_steps(job, start_training(job), warmup=2, steps=8)
    measured = {1: alone.compute.total_s, world.size: statistics.median(whole)}
    facts = dataclasses.replace(facts, measured_steps_s=measured)
    facts = dataclasses.replace(facts, pace=_pace(facts, world.size))
    return dataclasses.replace(facts, interference=_interference(facts, world.size))


@dataclasses.dataclass(frozen=True)
class _Room:
    """What a rank needs, and what the one with the least memory has."""

    fixed_bytes: int
    sample_bytes: float | None
    free_bytes: int | None

    def holds(self, samples: int) -> bool:
        """Return whether a micro-batch of so many samples fits, as far as is known."""
        if self.free_bytes is None or self.sample_bytes is None:
            return True
        return self.fixed_bytes + samples * self.sample_bytes <= self.free_bytes


def _memory(job: Job) -> _Room:
    """Return rank 0's estimate, and the least that any rank has. Collective."""
    needed = estimate(job)
    of_ranks = job.world.all_gather_object((needed, available(job)[0]), "plan.memory")
    needed = of_ranks[0][0]
    known = [free for _, free in of_ranks if free is not None]
    a_sample = None if needed.activations is None else needed.activations * (1 + RESERVE) / needed.micro_batch_size
    return _Room(int(needed.fixed * (1 + RESERVE)), a_sample, min(known, default=None))


def _own_by_micro_batch(
    recipe: Recipe, task: Task, world: World, micro: int, room: _Room
) -> tuple[dict[int, measure.Measured], int | None]:
    """Measure rank 0's steps at several micro-batches while the others wait. Collective."""
    found: dict[int, measure.Measured] = {}
    memory = None
    if world.rank == 0:
        sizes = [
            micro,
            *(size for size in (micro // 2, 2 * micro) if 0 < size <= len(task.train_data) and room.holds(size)),
        ]
        for size in sizes:
            own, training = measure.own_job(recipe, task, world.device, size)
            found[size] = measure.own_steps(own, training, warmup=1, steps=5 if size == micro else 3)
            if world.device.type == "cuda" and size == micro:
                memory = torch.cuda.max_memory_allocated(world.device)
    return world.broadcast_object((found, memory), "plan.alone")


def _network(
    world: World, hosts: list[str], buckets: list[Any], is_fp16: bool
) -> tuple[Network | None, Network | None, dict[int, float]]:
    """Measure and fit the network for both formats; the first is the recipe's. Collective."""
    if world.size == 1:
        return None, None, {}
    controller: Controller = "gloo" if world.launch.launcher == "horovodrun --gloo" else "mpi"
    largest = max(bucket.num_bytes for bucket in buckets)
    sizes = sorted({*(size for size in measure.SIZES if size < largest), largest})
    timings, plain = measure.all_reduce_timings(world, hosts, sizes, torch.float16 if is_fp16 else torch.float32)
    if is_fp16:
        return fit(controller, timings), None, plain
    halves = sorted({size // 2 for size in sizes})
    in_fp16, _ = measure.all_reduce_timings(world, hosts, halves, torch.float16)
    return fit(controller, timings), fit(controller, in_fp16), plain


def _straggler(of_ranks: list[measure.Measured], hosts: list[str]) -> str:
    times = [item.compute.total_s for item in of_ranks]
    middle = statistics.median(times)
    worst = max(range(len(times)), key=lambda rank: times[rank])
    if len(times) < 2 or times[worst] < _STRAGGLER * middle:
        return ""
    return f"rank {worst} on {hosts[worst]} takes {times[worst] / middle:.2f} times as long as the median rank"


def _interference(facts: Facts, size: int) -> float:
    """Return the share of hidden communication that a real step is longer than predicted by, between 0 and 1."""
    free = predict(facts, size)
    all_of_it = predict(dataclasses.replace(facts, interference=1.0), size)
    hidden = all_of_it.total_s - free.total_s
    if hidden <= 0.01 * free.total_s:
        return 0.0
    return min(1.0, max(0.0, (facts.measured_steps_s[size] - free.total_s) / hidden))


def _pace(facts: Facts, size: int) -> float:
    """Return the factor of the network's times that makes the predicted step of all ranks the measured one.

    One all-reduce after the other, as it was measured, is not quite what a step does. Where no communication is waited
    for, nothing is known of it.
    """
    low, high = 0.5, 2.0
    wanted = facts.measured_steps_s[size]
    if predict(facts, size).exposed_s < 0.05 * wanted:
        return 1.0
    for _ in range(30):
        middle = math.sqrt(low * high)
        if predict(dataclasses.replace(facts, pace=middle), size).total_s < wanted:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)


def _ask(facts: Facts, options: PlanOptions, size: int = 1) -> Answer:
    if options.network is not None:
        facts = _on_other_network(facts, options)
    to = options.to or max(8, 4 * max([size, *facts.measured_steps_s]))
    return answer(facts, to, options.price)


def _on_other_network(facts: Facts, options: PlanOptions) -> Facts:
    assert options.network is not None
    per_host = options.ranks_per_host or facts.ranks_per_host
    if per_host > 1 and (facts.network is None or facts.network.inside_byte_s is None):
        raise ConfigError(
            f"--network describes the links between hosts, and nothing is known of the {per_host} ranks inside one:"
            " measure on as many ranks, or give --ranks-per-host 1"
        )
    changed = {
        name: None if network is None and name == "fp16_network" else other_network(network, options.network)
        for name, network in (("network", facts.network), ("fp16_network", facts.fp16_network))
    }
    return dataclasses.replace(facts, ranks_per_host=per_host, **changed)  # type: ignore[arg-type]


def _tell(given: Answer, options: PlanOptions, environment: dict[str, Any], say: Any) -> None:
    if options.from_ is not None:
        _say(say, describe(given.facts))
    _say(say, table(given))
    if options.output is not None:
        save_json(options.output / "plan.json", given, environment)
        save_html(options.output / "plan.html", given)
        _say(say, f"written to {options.output / 'plan.json'} and {options.output / 'plan.html'}")


def _say(say: Any, text: str) -> None:
    say(text + "\n")
    if say == sys.stdout.write:
        sys.stdout.flush()


def _say_nothing(text: str) -> None:
    pass
