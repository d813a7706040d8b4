"""What `bench` answers, from what was measured. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hvdtrain.errors import counted
from hvdtrain.verbs.bench.measure import PARTS, Variant
from hvdtrain.verbs.kit import in_brackets, quartiles


@dataclass(frozen=True)
class Row:
    """What was measured of one variant. Seconds are of one step."""

    name: str
    step_s: float
    step_s_quartiles: tuple[float, float, float]
    units_per_s: float
    """Tokens or samples, of all ranks."""
    units_per_s_a_rank: tuple[float, float]
    """Mean of the rounds, and 1.96 times their standard deviation, as Horovod's synthetic benchmark has it."""
    time_per_sample_ratio: float
    """Against the recipe as it is, median of the rounds."""
    time_per_sample_ratio_quartiles: tuple[float, float, float]
    parts_s: dict[str, float]
    """On rank 0."""

    def as_dict(self, unit: str) -> dict[str, Any]:
        """Return plain values for JSON; the throughput is named by its unit."""
        values = asdict(self)
        return {name.replace("units_per_s", f"{unit}_per_s"): value for name, value in values.items()}


def row_of(variant: Variant, first: Variant) -> Row:
    """Return a variant's figures next to those of the recipe as it is."""
    step_s = statistics.median(variant.steps_s)
    rates = [variant.targets_per_step / seconds / variant.num_ranks for seconds in variant.steps_s]
    # Time a sample, round by round, against the recipe as it is: what slows the machine slows both.
    ratios = [
        (changed / variant.samples_per_step) / (base / first.samples_per_step)
        for changed, base in zip(variant.steps_s, first.steps_s, strict=True)
    ]
    return Row(
        name=variant.name,
        step_s=step_s,
        step_s_quartiles=quartiles(variant.steps_s),
        units_per_s=variant.targets_per_step / step_s,
        units_per_s_a_rank=(statistics.fmean(rates), 1.96 * statistics.pstdev(rates)),
        time_per_sample_ratio=quartiles(ratios)[1],
        time_per_sample_ratio_quartiles=quartiles(ratios),
        parts_s={part: statistics.median(parts[part] for parts in variant.parts_s) for part in PARTS},
    )


def throughput_lines(row: Row, unit: str, num_ranks: int) -> str:
    """Return the throughput in the form of Horovod's synthetic benchmark, of a rank and in total."""
    mean, spread = row.units_per_s_a_rank
    total = f"{unit}/s on {counted(num_ranks, 'rank')}: {num_ranks * mean:,.1f} +-{num_ranks * spread:,.1f}"
    return f"{unit}/s a rank: {mean:,.1f} +-{spread:,.1f}\n{total}"


def parts_table(row: Row) -> str:
    """Return where the time of a step goes."""
    lines = ["part            ms a step   share"]
    for part, seconds in row.parts_s.items():
        label = "exposed comm." if part == "communication" else part
        lines.append(f"{label:14} {1e3 * seconds:10.2f}  {seconds / row.step_s:6.1%}")
    lines.append(f"{'step':14} {1e3 * row.step_s:10.2f}")
    in_turn = sum(row.parts_s.values())
    if in_turn > 1.05 * row.step_s:  # what overlaps in the whole step does not in its parts
        lines.append(
            f"(the parts were timed apart, each waited for: one after another they take {1e3 * in_turn:.2f} ms)"
        )
    return "\n".join(lines)


def variants_table(rows: Sequence[Row], unit: str) -> str:
    """Return the variants below each other."""
    lines = [f"{'':28} {'ms a step':>10} {unit + '/s':>12}   time a sample against the first [quartiles]"]
    for row in rows:
        ratio = in_brackets(row.time_per_sample_ratio_quartiles)
        lines.append(f"{row.name:28} {1e3 * row.step_s:10.2f} {row.units_per_s:12,.0f}   {ratio}")
    return "\n".join(lines)
