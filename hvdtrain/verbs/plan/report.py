"""A plan as a table, as `plan.json`, and as `plan.html` with two plots. No libraries: the page needs no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdtrain.errors import ConfigError
from hvdtrain.optim.noise import NoiseScale
from hvdtrain.settings.units import in_units
from hvdtrain.verbs.plan.answer import Answer, Facts, Row
from hvdtrain.verbs.plan.network import Network
from hvdtrain.verbs.plan.step import Bucket, Compute

FORMAT_VERSION = 1


def table(answer: Answer) -> str:
    """Return the answer as a person reads it in a terminal."""
    facts = answer.facts
    head = f"{'workers':>7} {'ms a step':>18} {facts.unit + '/s':>12} {'efficiency':>10} {'waits':>6} {'batch':>8}"
    if facts.noise is not None:
        head += f" {'steps':>6} {'time to the same loss':>23}"
    if answer.rows[0].hours is not None:
        head += f" {'hours':>8} {'worker-h':>9}"
    if answer.rows[0].cost is not None:
        head += f" {'cost':>9}"
    lines = [head, *(_line(answer, row) for row in answer.rows)]
    lines += [f"recommended: {count(answer.recommended.workers)}: {answer.reason}"]
    lines += [f"what limits: {answer.limit}"]
    for name, factor in sorted(answer.changes, key=lambda change: change[1]):
        word = "less" if factor < 1 else "more"
        lines.append(f"  {name}: {abs(1 - factor):.0%} {word} time at {count(answer.changed_workers)}")
    if answer.unknown:
        lines.append(answer.unknown)
    return "\n".join(lines)


def count(workers: int) -> str:
    """Return a number of workers in words."""
    return f"{workers} worker{'' if workers == 1 else 's'}"


def _line(answer: Answer, row: Row) -> str:
    step = row.step.total_s * 1e3
    mark = ">" if row == answer.recommended else " "
    measured = answer.facts.measured_steps_s.get(row.workers)
    interval = f"{step:.4g} ± {100 * row.error:.0f}%"
    line = (
        f"{mark}{row.workers:6} {interval:>18} {row.units_per_s:12,.0f} {row.efficiency:10.0%} {row.exposed_share:6.0%}"
        f" {row.global_batch:8}"
    )
    if row.relative_steps is not None and row.relative_time is not None:
        assert row.time_low is not None
        assert row.time_high is not None
        line += f" {row.relative_steps:6.3f} {row.relative_time:7.3f} [{row.time_low:.3f}, {row.time_high:.3f}]"
    if row.hours is not None:
        line += f" {row.hours:8.3g} {row.worker_hours:9.3g}"
    if row.cost is not None:
        line += f" {row.cost:9.2f}"
    return line + (f"   (measured: {measured * 1e3:.4g} ms)" if measured is not None else "")


def describe(facts: Facts) -> str:
    """Return what was measured, before what follows from it."""
    alone, megabytes = facts.alone, sum(bucket.num_bytes for bucket in facts.buckets) / 1e6
    lines = [
        f"one rank:   {alone.total_s * 1e3:.4g} ms a step: forward {alone.forward_s * 1e3:.4g}, backward"
        f" {alone.backward_s * 1e3:.4g}, optimizer and the rest {alone.rest_s * 1e3:.4g}; {facts.micro_batch_size}"
        f" samples x {facts.accum_steps}; steps differ by {facts.spread:.0%}"
    ]
    if facts.memory_bytes:
        lines[-1] += f"; {facts.memory_bytes / 2**30:.2f} GiB"
    if facts.most_samples is not None and facts.memory_free_bytes is not None:
        lines.append(
            f"memory:     {in_units(facts.memory_free_bytes)} for a rank: micro-batches of up to about"
            f" {facts.most_samples:,} samples fit"
        )
    if facts.together_ranks > 1:
        slower = facts.together.total_s / alone.total_s
        lines.append(f"            {slower:.2f} times as long while all {facts.together_ranks} ranks of a host compute")
    if facts.slowest:
        lines.append(f"warning:    {facts.slowest}; the slowest rank's times are used")
    if facts.network is not None:
        lines.append(f"network:    {_describe_network(facts.network)}; {megabytes:.4g} MB of gradients")
        for size, seconds in facts.plain_mpi_s.items():
            lines.append(f"            plain MPI takes {seconds * 1e3:.4g} ms for {size / 1e6:.4g} MB over all ranks")
        if facts.interference:
            lines.append(
                f"            {facts.interference:.0%} of the communication that is hidden slows computing down"
            )
    if facts.noise is not None:
        noise = facts.noise
        near_beginning = f"from {noise.measurements} steps near the beginning; it grows while a model learns"
        whole = f"over a training, from {noise.measurements} windows of it"
        lines.append(
            f"batch:      gradient noise scale {noise.samples:,.3g} samples [{noise.low:,.3g}, {noise.high:,.3g}],"
            f" {whole if noise.is_whole_training else near_beginning}"
        )
    return "\n".join(lines)


def _describe_network(network: Network) -> str:
    parts = []
    inside, outside = network.inside_byte_s, network.outside_byte_s
    for name, byte_s, latency_s in (
        ("inside a host", inside, network.inside_latency_s),
        ("between hosts", outside, network.outside_latency_s),
    ):
        if byte_s is not None:
            rate = f"{1 / byte_s / 1e6:,.0f} MB/s" if byte_s > 0 else "no time for bytes"
            parts.append(f"{name} {rate}, {(latency_s or 0) * 1e6:,.0f} us a round")
    return f"{'; '.join(parts)} ({network.controller}; the fit is off by {network.error:.0%})"


def save_json(path: Path, answer: Answer, environment: Mapping[str, Any]) -> None:
    """Write `plan.json`: the facts, from which `plan --from` answers again, and the answer."""
    values = {"format_version": FORMAT_VERSION, **answer.as_dict(), "environment": environment}
    _write(path, json.dumps(values, indent=2) + "\n")


def load_json(path: Path) -> Facts:
    """Read the facts of a `plan.json`, or of the one in a directory.

    Raises:
        ConfigError: it is not there, or something else.
    """
    file = path / "plan.json" if path.is_dir() else path
    try:
        values = json.loads(file.read_text())["facts"]
        return Facts(
            **{
                **values,
                "alone": Compute(**values["alone"]),
                "together": Compute(**values["together"]),
                "buckets": tuple(Bucket(**bucket) for bucket in values["buckets"]),
                "network": Network(**values["network"]) if values["network"] else None,
                "fp16_network": Network(**values["fp16_network"]) if values["fp16_network"] else None,
                "noise": NoiseScale(**values["noise"]) if values["noise"] else None,
                "by_micro_batch": {int(k): Compute(**v) for k, v in values["by_micro_batch"].items()},
                "measured_steps_s": {int(k): v for k, v in values["measured_steps_s"].items()},
                "plain_mpi_s": {int(k): v for k, v in values["plain_mpi_s"].items()},
            }
        )
    except OSError as error:
        how = f"let `plan RECIPE --output {file.parent}` write it"
        raise ConfigError(f"--from {path}: {file} cannot be read ({error.strerror}): {how}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--from {path}: {file} was not written by this plan ({error!r})") from error


def save_html(path: Path, answer: Answer) -> None:
    """Write a page with the table and two plots: throughput against workers, time to the same loss against cost."""
    facts, rows = answer.facts, answer.rows
    single = rows[0].units_per_s
    plots = [
        _plot(
            f"Throughput ({facts.unit}/s)",
            "workers",
            lines={
                "ideal": [(row.workers, single * row.workers) for row in rows],
                "predicted": [(row.workers, row.units_per_s) for row in rows],
            },
            points=[
                (n, n * facts.micro_batch_size * facts.accum_steps * facts.units_per_sample / seconds)
                for n, seconds in facts.measured_steps_s.items()
                if n <= rows[-1].workers
            ],
            marked=(answer.recommended.workers, answer.recommended.units_per_s),
        )
    ]
    known = [row for row in rows if row.relative_time is not None]
    if known:
        points = [(row.workers * (row.relative_time or 0), row.relative_time or 0) for row in known]
        best = next(i for i, row in enumerate(known) if row == answer.recommended)
        plots.append(
            _plot(
                "Time to the same loss (one worker = 1)",
                "worker-hours to the same loss (one worker = 1)",
                lines={"predicted": points},
                points=[],
                marked=points[best],
                labels=[str(row.workers) for row in known],
            )
        )
    body = f"<pre>{html.escape(describe(facts))}\n\n{html.escape(table(answer))}</pre>"
    _write(
        path,
        "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>hvdtrain plan</title><style>"
        "body{font:15px sans-serif;margin:2em;color:#222}pre{font:13px monospace}svg{margin:1em 2em 1em 0}"
        "</style></head><body>"
        f"<h1>{html.escape(facts.recipe)}: {count(answer.recommended.workers)}</h1>"
        f"{''.join(plots)}{body}</body></html>\n",
    )


_COLOURS = {"ideal": "#999999", "predicted": "#1f6fb4"}
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 560, 380, 80, 50


def _plot(
    title: str,
    x_label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    points: Sequence[tuple[float, float]],
    marked: tuple[float, float],
    labels: Sequence[str] = (),
) -> str:
    """Return an SVG with two logarithmic axes."""
    everything = [point for line in lines.values() for point in line] + list(points)
    xs, ys = ([point[i] for point in everything] for i in (0, 1))
    x_low, x_high, y_low, y_high = *_limits(xs), *_limits(ys)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = (math.log(point[0]) - math.log(x_low)) / (math.log(x_high) - math.log(x_low))
        y = (math.log(point[1]) - math.log(y_low)) / (math.log(y_high) - math.log(y_low))
        return _LEFT + x * (_WIDTH - _LEFT - 20), _HEIGHT - _BOTTOM - y * (_HEIGHT - _BOTTOM - 40)

    parts = [
        f"<svg width='{_WIDTH}' height='{_HEIGHT}' role='img' aria-label='{html.escape(title)}'>",
        f"<text x='{_LEFT}' y='20' font-size='15'>{html.escape(title)}</text>",
        f"<text x='{_WIDTH / 2}' y='{_HEIGHT - 8}' font-size='13'>{html.escape(x_label)}</text>",
        f"<rect x='{_LEFT}' y='40' width='{_WIDTH - _LEFT - 20}' height='{_HEIGHT - _BOTTOM - 40}'"
        " fill='none' stroke='#ccc'/>",
    ]
    for value in _ticks(x_low, x_high):
        x, _ = place((value, y_low))
        parts.append(f"<text x='{x:.1f}' y='{_HEIGHT - 32}' font-size='12' text-anchor='middle'>{value:,.3g}</text>")
    for value in _ticks(y_low, y_high):
        _, y = place((x_low, value))
        parts.append(f"<text x='{_LEFT - 6}' y='{y + 4:.1f}' font-size='12' text-anchor='end'>{value:,.3g}</text>")
    for i, (name, line) in enumerate(lines.items()):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, line))
        dashes = " stroke-dasharray='5 4'" if name == "ideal" else ""
        parts.append(f"<polyline points='{path}' fill='none' stroke='{_COLOURS[name]}' stroke-width='2'{dashes}/>")
        parts.append(f"<text x='{_WIDTH - 100}' y='{58 + 16 * i}' font-size='12' fill='{_COLOURS[name]}'>{name}</text>")
        for (x, y), label in zip(map(place, line), labels, strict=False):
            parts.append(f"<text x='{x + 5:.1f}' y='{y - 5:.1f}' font-size='12'>{label}</text>")
    for x, y in map(place, points):
        parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='5' fill='#d1495b'><title>measured</title></circle>")
    x, y = place(marked)
    parts.append(f"<circle cx='{x:.1f}' cy='{y:.1f}' r='9' fill='none' stroke='#2a9d4b' stroke-width='2'/>")
    return "".join([*parts, "</svg>"])


def _limits(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low / 1.15, high * 1.15


def _ticks(low: float, high: float) -> list[float]:
    ticks = [m * 10.0**e for e in range(-9, 13) for m in (1, 2, 5)]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside if len(inside) <= 9 else inside[:: -(-len(inside) // 9)]


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}): choose another --output") from error
