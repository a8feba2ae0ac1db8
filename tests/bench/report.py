"""From samples to a table: medians, spreads, ratios against the pass-through, and the goals beside them."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.bench.proxies import is_proxy

YARDSTICK = "pass-through"


@dataclass(frozen=True)
class Measure:
    """A line of the report. The goal is a limit on the proxy's value, or on its ratio to the yardstick."""

    key: str
    title: str
    unit: str
    ratio_max: float | None = None
    value_max: float | None = None
    charted: bool = True

    def goal(self) -> str:
        """The goal as text."""
        if self.ratio_max is not None:
            return f"≤ {self.ratio_max:g}x"
        return "" if self.value_max is None else f"≤ {self.value_max:g} {self.unit}"


MEASURES = (
    Measure("request_cpu", "CPU a request, not streamed, at saturation", "µs", ratio_max=1.9),
    Measure("chunk_cpu", "CPU a streamed chunk, 100 streams at 20 ms", "µs", ratio_max=1.2),
    Measure("burst_cpu", "CPU a streamed chunk, unpaced bursts", "µs", ratio_max=2.2),
    Measure("latency_p50", "added latency at 25 requests/s, p50", "ms", value_max=1.5),
    Measure("latency_p99", "added latency at 25 requests/s, p99", "ms", value_max=6, charted=False),
    Measure("first_p50", "added time to first byte, p50", "ms", value_max=1.5),
    Measure("first_p99", "added time to first byte, p99", "ms", value_max=6, charted=False),
    Measure("resident_mb", "memory with 500 open streams", "MB", value_max=80),
)
# These have a yardstick of their own: the first ten seconds, the empty database, or nobody at the console.
FLATNESS = (
    Measure("endurance_cpu", "CPU a chunk, 2,000 streams, last 10 s against first 10 s", "µs", ratio_max=1.1),
    Measure("endurance_mb", "memory, 2,000 streams, end against first 10 s", "MB", ratio_max=1.1),
    Measure("tables_cpu", "CPU a request, full database against empty", "µs", ratio_max=1.1),
    Measure("tables_keys_cpu", "the same, 1,000 keys by turns", "µs", ratio_max=1.1),
    Measure("tables_start", "time from start to first answer, full database", "s", value_max=2),
    Measure("blocked_ms", "longest blockage, 10 MB bodies", "ms", value_max=50),
    Measure("quiet_ms", "the same without the bodies", "ms"),
    Measure("pages_request", "p99 of a request beside 50 streams, visitors against none", "ms", ratio_max=2),
    Measure("pages_event", "p99 of an event's lateness in 50 streams, visitors against none", "ms", ratio_max=2),
)


@dataclass(frozen=True)
class Cell:
    """What one contestant showed in one measure."""

    values: list[float]
    ratios: list[float] = field(default_factory=list)
    value: float = math.nan  # where the median of the rounds is not the best summary

    @property
    def middle(self) -> float:
        """The value to report."""
        return median(self.values) if math.isnan(self.value) else self.value

    @property
    def ratio(self) -> float | None:
        """The median of the rounds' ratios: each compares two measurements of the same half minute."""
        return median(self.ratios) if self.ratios else None

    def meets(self, measure: Measure) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if measure.ratio_max is not None:
            return None if self.ratio is None else self.ratio <= measure.ratio_max
        return None if measure.value_max is None else self.middle <= measure.value_max


Report = dict[str, dict[str, Cell]]  # by measure, by contestant


def percentile(samples: list[float], percent: float) -> float:
    """The nearest-rank percentile."""
    ranked = sorted(samples)
    return ranked[max(0, math.ceil(len(ranked) * percent / 100) - 1)]


def compare(rounds: list[dict[str, float]], names: list[str]) -> dict[str, Cell]:
    """Cells of a measure in which every contestant was measured once a round; NaN for one that could not keep up."""
    cells = {}
    for name in names:
        together = [values for values in rounds if name in values and YARDSTICK in values]
        ratios = [values[name] / values[YARDSTICK] for values in together]
        values = [values[name] for values in rounds if name in values]
        cells[name] = Cell(values or [math.nan], ratios)
    return cells


def added(rounds: list[dict[str, list[float]]], names: list[str], percent: float) -> dict[str, Cell]:
    """A percentile of each contestant's times less that of the direct ones.

    The value is that of all rounds' times together, since one round has too few for a p99; the spread is the rounds'.
    """
    cells = {}
    for name in names:
        both = [(times[name], times["direct"]) for times in rounds if times.get(name)]
        each = [percentile(ours, percent) - percentile(direct, percent) for ours, direct in both]
        all_ours = [time for ours, _ in both for time in ours]
        all_direct = [time for _, direct in both for time in direct]
        value = percentile(all_ours, percent) - percentile(all_direct, percent) if both else math.nan
        cells[name] = Cell(each or [math.nan], value=value)
    return cells


def number(value: float) -> str:
    """About three digits; no number at all for what a contestant could not do."""
    if math.isnan(value):
        return "over capacity"
    return f"{value:,.{0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2}f}"


def spread(values: list[float]) -> str:
    """Least and greatest of several values."""
    return f"{number(min(values))} to {number(max(values))}" if len(values) > 1 else ""


def table(report: Mapping[str, dict[str, Cell]]) -> str:
    """The report as a Markdown table whose columns also line up in a terminal."""
    lines = [["measure", "contestant", "median", "spread", "ratio", "its spread", "goal", ""]]
    for measure in (*MEASURES, *FLATNESS):
        title, goal = measure.title, measure.goal()
        for name, cell in report.get(measure.key, {}).items():
            value = number(cell.middle) + ("" if math.isnan(cell.middle) else f" {measure.unit}")
            ratio = f"{number(cell.ratio)}x" if cell.ratio is not None else ""
            met = cell.meets(measure) if is_proxy(name) else None
            verdict = {None: "", True: "met", False: "MISSED"}[met]
            shown_goal = goal if is_proxy(name) else ""
            ratio_spread = spread(cell.ratios)
            lines.append([title, name, value, spread(cell.values), ratio, ratio_spread, shown_goal, verdict])
            title = ""
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """Lines of cells, the first of them the heading, as a Markdown table."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |" for line in ruled
    )


def as_json(report: Report) -> dict[str, Any]:
    """All numbers, with the goals."""
    goals = {each.key: each for each in (*MEASURES, *FLATNESS)}
    return {
        "measures": {
            key: {
                "title": goals[key].title,
                "unit": goals[key].unit,
                "goal": goals[key].goal(),
                "contestants": {
                    name: {
                        "value": cell.middle,
                        "values": cell.values,
                        "ratio": cell.ratio,
                        "ratios": cell.ratios,
                        "goal_met": cell.meets(goals[key]) if is_proxy(name) else None,
                    }
                    for name, cell in cells.items()
                },
            }
            for key, cells in report.items()
        },
    }
