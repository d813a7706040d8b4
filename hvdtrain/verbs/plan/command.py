"""The verb: measures, predicts, shows; or answers again from what was measured."""

from __future__ import annotations

import dataclasses
import socket
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError, HvdtrainError, counted
from hvdtrain.optim.noise import NoiseScale
from hvdtrain.process.launch import detect_launch
from hvdtrain.process.tracebacks import sentence_of
from hvdtrain.rundir.environment import describe_environment, describe_rank
from hvdtrain.trainer import Job, Recipe, Task
from hvdtrain.trainer.precision import settle_precision
from hvdtrain.trainer.rehearsal import rehearse
from hvdtrain.trainer.task import build_task
from hvdtrain.verbs.kit import Speaker, head_line
from hvdtrain.verbs.options import PlanOptions
from hvdtrain.verbs.plan.all_reduce import groups_of
from hvdtrain.verbs.plan.answer import Answer, answer
from hvdtrain.verbs.plan.facts import Facts
from hvdtrain.verbs.plan.gather import gather
from hvdtrain.verbs.plan.logged import find_noise, noise_of_run
from hvdtrain.verbs.plan.network import other_network
from hvdtrain.verbs.plan.page import save_html
from hvdtrain.verbs.plan.report import describe, table
from hvdtrain.verbs.plan.saved import load_json, save_json
from hvdtrain.world import World, watched

# Where none is named, so that it says nothing of what is in a saved plan.
_DEFAULT_RECIPE = "lm"


def plan(name: str, recipe: Recipe, options: PlanOptions) -> int:
    """Answer `plan RECIPE`; returns the exit code. Collective, but for `--from`.

    Raises:
        ConfigError: settings do not fit, a file of --from or --noise-from is none, or --output cannot be written.
    """
    if options.from_ is not None:
        facts = load_json(options.from_)
        if name != _DEFAULT_RECIPE and Path(name).name != Path(facts.recipe).name:
            raise ConfigError(
                f"--from {options.from_} holds a plan of {facts.recipe}, not of {name}: measure {name} first"
            )
        facts = _with_noise(facts, _logged_noise(options))
        about, given = _from_file(facts, options)
        say = Speaker(detect_launch().rank == 0)
        say(f"plan {facts.recipe}, from what was measured in {options.from_}")
        say(about)
        _show(given, options, {}, say)
        return 0
    if options.link is not None:
        other_network(None, options.link)  # refused now, and not when all is measured
    if recipe.comm.sync == "local":  # measured as steps that average, and predicted with all other ways to average
        recipe = dataclasses.replace(recipe, comm=dataclasses.replace(recipe.comm, sync="every-step"))
    return watched(
        recipe,
        lambda world, heartbeat, unwatched: _plan(name, recipe, options, world),
        lambda launch: groups_of(launch.size, launch.local_size),
    )


def _from_file(facts: Facts, options: PlanOptions) -> tuple[str, Answer]:
    """Return what is said of saved facts, and the answer.

    Raises:
        ConfigError: nothing follows from them: the file was changed by hand, or damaged.
    """
    try:
        about, given = describe(facts), _ask(facts, options)
        table(given)
    except HvdtrainError:
        raise
    except Exception as error:  # of many types: whatever a text does where a number belongs
        raise ConfigError(
            f"--from {options.from_}: no plan can be made of what it holds ({sentence_of(error)}): measure again"
        ) from error
    return about, given


def _plan(name: str, recipe: Recipe, options: PlanOptions, world: World) -> int:
    say = Speaker(world.rank == 0)
    logged = world.together(lambda: _logged_noise(options) if world.rank == 0 else None, "plan.noise")
    recipe, choice = settle_precision(recipe, world)
    task = world.together(lambda: build_task(recipe, say), "plan.build")
    job = world.together(lambda: _job(recipe, task, world), "plan.settle")
    everyone = world.all_gather_object((socket.gethostname(), describe_rank(world.device)), "plan.ranks")
    hosts = [host for host, _ in everyone]
    say(head_line("plan", name, world.size, counted(len(set(hosts)), "host"), str(job.plan)))
    if choice:
        say(choice)
    if options.link is not None:
        per_host, is_known = options.ranks_per_host or hosts.count(hosts[0]), world.size > len(set(hosts))
        world.together(lambda: _check_inside(per_host, is_known), "plan.link")
    facts = gather(name, recipe, task, job, hosts, 0 if options.noise_from else options.noise_steps)
    facts = _with_noise(facts, world.broadcast_object(logged, "plan.noise"))
    say(describe(facts))
    given = world.together(lambda: _ask(facts, options, world.size), "plan.answer")
    environment = describe_environment(world.launch.launcher, [rank for _, rank in everyone])
    world.together(lambda: _show(given, options, environment, say), "plan.write")
    return 0


def _logged_noise(options: PlanOptions) -> NoiseScale | None:
    """Return what a run has logged: the one of --noise-from, or the one in whose directory --from finds the plan."""
    if options.noise_from is not None:
        return noise_of_run(options.noise_from)
    return None if options.from_ is None else find_noise(options.from_)


def _with_noise(facts: Facts, noise: NoiseScale | None) -> Facts:
    return facts if noise is None else dataclasses.replace(facts, noise=noise)


def _job(recipe: Recipe, task: Task, world: World) -> Job:
    return rehearse(task, recipe, world, num_steps=recipe.train.steps or 1000, only_full_batches=True)


def _ask(facts: Facts, options: PlanOptions, size: int = 1) -> Answer:
    if options.link is not None:
        facts = _on_other_network(facts, options)
    to = options.to or max(8, 4 * max([size, *facts.measured_steps_s]))
    return answer(facts, to, options.price)


def _on_other_network(facts: Facts, options: PlanOptions) -> Facts:
    assert options.link is not None
    per_host = options.ranks_per_host or facts.ranks_per_host
    _check_inside(per_host, facts.network is not None and facts.network.inside_byte_s is not None)
    changed = {
        name: None if network is None and name == "fp16_network" else other_network(network, options.link)
        for name, network in (("network", facts.network), ("fp16_network", facts.fp16_network))
    }
    return dataclasses.replace(facts, ranks_per_host=per_host, **changed)  # type: ignore[arg-type]


def _check_inside(per_host: int, is_known: bool) -> None:
    if per_host > 1 and not is_known:
        raise ConfigError(
            f"--link describes the links between hosts, and nothing is known of the {per_host} ranks inside one:"
            " measure on as many ranks, or give --ranks-per-host 1"
        )


def _show(given: Answer, options: PlanOptions, environment: dict[str, Any], say: Speaker) -> None:
    """Show the table, and write the files of --output, on the rank that speaks."""
    say(table(given))
    if options.output is not None and say.speaks:
        save_json(options.output / "plan.json", given, environment)
        missing = save_html(options.output / "plan.html", given)
        say(f"written to {options.output / 'plan.json'} and {options.output / 'plan.html'}")
        if missing:
            say(missing)
