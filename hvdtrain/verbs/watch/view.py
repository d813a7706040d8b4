"""How a run that is followed looks in a terminal of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from hvdtrain.errors import counted, listed
from hvdtrain.rundir.sinks import describe
from hvdtrain.settings.units import duration
from hvdtrain.verbs.watch.follow import CURVES, Follower
from hvdtrain.verbs.watch.plot import plot, sparkline

_MOST_PLOT, _LEAST_PLOT, _MOST_EVENTS = 14, 5, 8
_MOST_RANKS = 4
_BAR = 30


def view(run: Follower, width: int, height: int, is_ascii: bool) -> RenderableType:
    """Return what the terminal shows of a run.

    Args:
        run: as far as it was looked at.
        width: columns of the terminal.
        height: lines of it; the plot and the events take what is left.
        is_ascii: the terminal has no other signs.
    """
    head = [*_head(run, width, is_ascii)]
    troubles = [Text(text, "yellow") for text in [*_ranks(run), *run.troubles]]
    left = height - len(head) - len(troubles) - 1
    events = [*run.events][-max(1, min(_MOST_EVENTS, left // 3)) :] if left > 1 else []
    curve = _curve(run, width, min(_MOST_PLOT, left - len(events)), is_ascii)
    lines = [*head, *curve, *(Text(event.text, "yellow" if event.is_warning else "") for event in events), *troubles]
    for line in lines:
        line.plain = printable(line.plain, is_ascii)
        line.no_wrap, line.overflow = True, "ellipsis" if not is_ascii else "crop"
    return Group(*lines[: max(1, height - 1)])


def printable(text: str, is_ascii: bool = False) -> str:
    """Return a text without what a terminal would obey; it keeps its length."""
    return "".join(sign if sign.isprintable() and (sign.isascii() or not is_ascii) else "?" for sign in text)


def state_of(run: Follower) -> tuple[str, bool]:
    """Return in words whether a run goes on, and whether a person should look."""
    holder, is_gone = run.holder()
    if run.is_finished:
        return "finished", False
    if is_gone:
        return f"not running: {holder} is gone", True
    by = f", by {holder}" if holder else ""
    if run.quiet_s is None:
        return f"nothing logged yet{by}", False
    if run.is_quiet:
        return f"no line of metrics for {duration(run.quiet_s)}: stopped, stuck, or slow{by}", True
    return f"last line {duration(run.quiet_s)} ago{by}", False


def _head(run: Follower, width: int, is_ascii: bool) -> Iterator[Text]:
    title = f" {run.title}" if run.title else ""
    yield Text.assemble((str(run.run), "bold"), title)
    step, whole = run.step, run.num_steps
    share = min(1.0, step / whole) if whole else 0.0
    bar = min(_BAR, width // 3)
    full = round(bar * share)
    signs = "#-" if is_ascii else "━─"
    of = f"/{whole:,}" if whole else ""
    progress = f"step {step:,}{of}  {signs[0] * full}{signs[1] * (bar - full)}" if whole else f"step {step:,}"
    state, is_trouble = state_of(run)
    both = Text(progress, "green"), Text(state, "yellow" if is_trouble else "dim")
    if len(progress) + 2 + len(state) > width:
        yield from both
    else:
        yield Text("  ").join(both)
    wanted = ("train/loss", "val/", "time/left_s", "train/lr", "throughput/", "train/grad_norm")
    figures = {name: run.last[name] for start in wanted for name in run.last if name.startswith(start)}
    if run.is_finished:
        figures.pop("time/left_s", None)
    parts = describe(figures).split("  ")
    if "time/step_s" in run.last:
        parts.append(f"{run.last['time/step_s']:.3g} s/step")
    yield from _wrapped([part for part in parts if part], width)


def _wrapped(parts: Sequence[str], width: int) -> Iterator[Text]:
    """Yield parts side by side, on as many lines as they need."""
    line = ""
    for part in parts:
        if line and len(line) + 2 + len(part) > width:
            yield Text(line)
            line = ""
        line = f"{line}  {part}" if line else part
    if line:
        yield Text(line)


def _curve(run: Follower, width: int, height: int, is_ascii: bool) -> list[Text]:
    train, held_out = (run.curves.get(name, ([], [])) for name in CURVES)
    if height < 1 or not (train[0] or held_out[0]):
        return []
    if height <= _LEAST_PLOT or width < 40:
        name, values = ("loss", train[1]) if train[1] else ("held-out loss", held_out[1])
        return [Text(f"{name} {sparkline(values, max(1, width - len(name) - 1), is_ascii)}", "cyan")]
    mark = "o" if is_ascii else "●"
    title = f"loss: training{f', held-out {mark}' if held_out[0] else ''}"
    lines = plot(train, held_out, width, height - 1, is_ascii)
    return [Text(title, "dim"), *(Text(line, "cyan") for line in lines)]


def _ranks(run: Follower) -> Iterator[str]:
    """Yield what is known of the ranks: how many, where, and who of them had to warn."""
    hosts, logs = run.hosts(), run.ranks
    if not logs:
        return
    where = f" on {counted(len({*hosts}), 'host')} ({listed(sorted({*hosts}), 4)})" if hosts else ""
    known = len(hosts) or len(logs)
    missing = [rank for rank in range(known) if rank not in {log.rank for log in logs}]
    yield f"{counted(known, 'rank')}{where}" + (f"; no log of rank {listed(missing, 4)}" if missing else "")
    warned = [log for log in logs if log.rank and log.trouble]
    for log in warned[:_MOST_RANKS]:
        yield f"rank {log.rank}: {log.trouble}"
    if len(warned) > _MOST_RANKS:
        yield f"and {counted(len(warned) - _MOST_RANKS, 'more rank')} with warnings"
