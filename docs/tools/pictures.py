"""The pictures of the pages, as SVG, from benchmarks/results: `python docs/tools/pictures.py` writes them anew."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
FOLDER = ROOT / "docs" / "pictures"

_INK, _GREY, _BLUE, _RED, _PALE = "#24292f", "#8c959f", "#1f6fb4", "#d1495b", "#dceaf7"


def step_time() -> str:
    """Return bars of speed.txt: the time of a step, by who takes it."""
    rows = re.findall(r"^(\S.*?)  +([\d.]+) \[([\d.]+), ([\d.]+)\]", (RESULTS / "speed.txt").read_text(), re.MULTILINE)
    names = {
        "hvdtrain": "hvdtrain, 2 ranks",
        "torch's mm": "hvdtrain, with torch's own products",
        "horovod": "bare Horovod loop, 2 ranks",
        "ddp": "PyTorch DDP, 2 ranks",
        "one process": "one process, half the samples",
    }
    scale = 330 / max(float(high) for *_, high in rows)
    parts = [_text(20, 28, "Time of a step, ms (median and quartiles): shorter is better", size=15, weight="bold")]
    for i, (name, median, low, high) in enumerate(rows):
        y = 50 + 38 * i
        width, x_low, x_high = (scale * float(value) for value in (median, low, high))
        colour = _BLUE if name == "hvdtrain" else _GREY
        parts += [
            _text(250, y + 18, names[name], anchor="end"),
            f'<rect x="260" y="{y}" width="{width:.1f}" height="26" fill="{colour}"/>',
            _line(260 + x_low, y + 13, 260 + x_high, y + 13, width=2),
            _text(270 + x_high, y + 18, median, weight="bold"),
        ]
    about = "decoder of 6 layers x 256, 8 x 128 tokens a rank, fp32, 2 cores; benchmarks/results/speed.txt"
    return _picture(680, 275, [*parts, _text(20, 260, about, size=12, colour=_GREY)])


def plan_accuracy() -> str:
    """Return the step times that plan predicted against those measured, from plan_accuracy.txt."""
    points = [*_predictions((RESULTS / "plan_accuracy.txt").read_text())]
    low, high = 480.0, 3000.0

    def place(x: float, y: float) -> tuple[float, float]:
        share = [math.log(value / low) / math.log(high / low) for value in (x, y)]
        return 80 + 480 * share[0], 370 - 320 * share[1]

    parts = [_text(20, 28, "Step times that plan predicted for 4 and 8 hosts, ms", size=15, weight="bold")]
    for factor, dash in ((1.0, ""), (0.9, "4 4"), (1.1, "4 4")):
        (x1, y1), (x2, y2) = (
            place(low / min(factor, 1), low * max(factor, 1)),
            place(high / max(factor, 1), high * min(factor, 1)),
        )
        parts.append(_line(x1, y1, x2, y2, colour=_GREY, dash=dash))
    for tick in (500, 1000, 2000, 3000):
        x, y = place(tick, tick)
        parts += [_text(x, 390, f"{tick:,}", anchor="middle"), _text(72, y + 5, f"{tick:,}", anchor="end")]
    for measured, predicted, hosts in points:
        x, y = place(measured, predicted)
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{_BLUE if hosts == 2 else _RED}" fill-opacity="0.75"/>'
        )
    parts += [
        _text(320, 412, "measured", anchor="middle"),
        _text(100, 60, "predicted from 2 hosts", colour=_BLUE),
        _text(100, 80, "predicted from 4 hosts", colour=_RED),
        _text(100, 100, "dashed: 10 % off", colour=_GREY),
        _text(20, 436, "throttled networks, MPI and Gloo; benchmarks/results/plan_accuracy.txt", size=12, colour=_GREY),
    ]
    return _picture(600, 450, parts)


def _predictions(text: str) -> Iterator[tuple[float, float, int]]:
    """Yield measured and predicted milliseconds, and the number of hosts that the prediction was made from."""
    for line in text.splitlines():
        found = re.search(r"(?:mpi|gloo) +\d+ +([\d.]+) +([\d.]+) +[-+][\d.]+%(?: +([\d.]+) +[-+][\d.]+%)?", line)
        if found:
            measured, from_two, from_four = found.groups()
            yield float(measured), float(from_two), 2
            if from_four:
                yield float(measured), float(from_four), 4


def step() -> str:
    """Return the drawing of one step on two ranks."""
    parts = [_text(20, 28, "One step on two ranks", size=15, weight="bold")]
    titles = (
        "its part of the batch",
        "forward: sum of losses",
        "backward: gradients",
        "mean of the ranks",
        "clip, step",
    )
    for row, y in enumerate((60, 190)):
        parts.append(_text(20, y + 32, f"rank {row}", weight="bold"))
        for i, title in enumerate(titles):
            x = 90 + 150 * i
            if i != 3:
                parts += [_box(x, y, 125, 50), *_words(x + 62, y, title)]
            if i < 4:
                parts.append(_arrow(x + 127, y + 25, x + 148, y + 25))
    parts += [_box(540, 60, 125, 180, fill=_PALE), *_words(602, 105, "ring all-reduce: the mean over all ranks")]
    parts += [
        _text(90, 285, "Same weights before, same gradient, same step: same weights after, bit for bit.", colour=_GREY),
    ]
    return _picture(830, 300, parts)


PICTURES: dict[str, Callable[[], str]] = {
    "step_time.svg": step_time,
    "plan_accuracy.svg": plan_accuracy,
    "step.svg": step,
}


def _picture(width: int, height: int, parts: list[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    style = 'font-family="Helvetica, Arial, sans-serif"'
    ground = f'<rect width="{width}" height="{height}" fill="#ffffff"/>'
    return "\n".join([f"{head} {style}>", ground, *parts, "</svg>", ""])


def _text(
    x: float, y: float, text: str, *, size: int = 13, weight: str = "normal", anchor: str = "start", colour: str = _INK
) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{escape(text)}</text>'


def _words(x: float, y: float, text: str) -> list[str]:
    """Return a text in the middle of a box, at most 16 letters a line."""
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) > 15:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    top = y + 29 - 8 * (len(lines) - 1)
    return [_text(x, top + 16 * i, line, anchor="middle") for i, line in enumerate(lines)]


def _box(x: float, y: float, width: float, height: float, fill: str = "#ffffff") -> str:
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="5" fill="{fill}" stroke="{_BLUE}"/>'


def _line(x1: float, y1: float, x2: float, y2: float, *, colour: str = _INK, width: float = 1.5, dash: str = "") -> str:
    place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {place} stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dash or "none"}"/>'


def _arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    head = f'<path d="M {x2 - 6} {y2 - 4} L {x2} {y2} L {x2 - 6} {y2 + 4} Z" fill="{_INK}"/>'
    return _line(x1, y1, x2, y2) + head


def write() -> None:
    """Write all pictures."""
    FOLDER.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        (FOLDER / name).write_text(draw())


if __name__ == "__main__":
    write()
