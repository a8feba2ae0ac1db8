"""Credits a day, as the geometry of an SVG. Labels stand beside it in HTML, so that they keep their size."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import NamedTuple

WIDTH, HEIGHT, GAP = 600, 100, 4


class Bar(NamedTuple):
    day: str
    value: int
    x: float
    y: float
    width: float
    height: float


class Chart(NamedTuple):
    bars: list[Bar]
    total: int
    most: int
    most_day: str

    @property
    def first(self) -> str:
        return self.bars[0].day

    @property
    def last(self) -> str:
        return self.bars[-1].day


def draw(values: Mapping[str, int], last: datetime.date, days: int) -> Chart:
    """`values` by ISO day; a day without one is a gap in the row of bars, not in the calendar."""
    dates = [str(last - datetime.timedelta(days=back)) for back in range(days - 1, -1, -1)]
    most = max((values.get(day, 0) for day in dates), default=0)
    step = WIDTH / days
    width = max(step - min(GAP, step / 3), 0.5)
    bars = []
    for place, day in enumerate(dates):
        value = values.get(day, 0)
        height = max(HEIGHT * value / most, 1.5) if value else 0
        bars.append(
            Bar(day, value, round(place * step, 2), round(HEIGHT - height, 2), round(width, 2), round(height, 2))
        )
    most_day = next((bar.day for bar in bars if bar.value == most), dates[-1])
    return Chart(bars, sum(bar.value for bar in bars), most, most_day)
