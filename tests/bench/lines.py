"""The table by clients as an SVG: one panel a number, one line a contestant, more clients further to the right.

Drawn like the bars of `chart.py`, and in their colours.
"""

import math
from collections.abc import Callable

from tests.bench.chart import MARGIN, PANEL_WIDTH, STYLE, page, text
from tests.bench.clients import CLIENTS, NUMBERS, Point, Rounds, medians
from tests.bench.proxies import is_proxy
from tests.bench.report import YARDSTICK, number

HEIGHT, TOP, LEFT, RIGHT, GAP = 180, 34, 48, 96, 70
LABEL_STEP = 15
MORE_STYLE = """
  .line { fill: none; stroke: #9aa4af; stroke-width: 2; }
  .bare { stroke: #59636e; stroke-dasharray: 5 3; }
  .ours { stroke-width: 2.5; }
  .ours-0 { stroke: #0969da; }
  .ours-1 { stroke: #bc4c00; }
  .ours-2 { stroke: #8250df; }
  .ours-3 { stroke: #1a7f37; }
  .grid { stroke: #d1d9e0; stroke-width: 1; }
  @media (prefers-color-scheme: dark) {
    .line { stroke: #6e7781; }
    .bare { stroke: #9198a1; }
    .ours-0 { stroke: #4493f8; }
    .ours-1 { stroke: #f0883e; }
    .ours-2 { stroke: #ab7df8; }
    .ours-3 { stroke: #3fb950; }
    .grid { stroke: #3d444d; }
  }
"""


def steps_of(least: float, most: float, logarithmic: bool) -> list[float]:
    """Round numbers for the vertical axis; the first and the last are its ends."""
    if logarithmic:
        exponents = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
        steps = [part * 10.0**exponent for exponent in exponents for part in (1, 2, 5)]
        first = max(place for place, step in enumerate(steps) if step <= least)
        return steps[first : 1 + min(place for place, step in enumerate(steps) if step >= most)]
    step = 10 ** math.floor(math.log10(most))
    step = next(step * part for part in (0.2, 0.5, 1, 2) if most / (step * part) <= 6)
    return [step * count for count in range(math.ceil(most / step) + 1)]


def spread_out(places: dict[str, float]) -> dict[str, float]:
    """Move labels down until none stands on another."""
    found: dict[str, float] = {}
    last = -math.inf
    for name in sorted(places, key=lambda name: places[name]):
        last = found[name] = max(places[name], last + LABEL_STEP)
    return found


def panel(title: str, what: Callable[[Point], float], found: Rounds, x: float, y: float) -> list[str]:
    """One number: CPU from zero, the others on a logarithmic scale, since they differ a hundredfold."""
    known = {name: medians(found, name, what) for name in found.names}
    numbers = [value for values in known.values() for value in values if value > 0]
    drawn = [text(x, y + 14, title, "title")]
    if not numbers:
        return drawn
    logarithmic = not title.startswith("CPU")
    steps = steps_of(min(numbers), max(numbers), logarithmic)
    scale = math.log10 if logarithmic else float
    low, high = scale(steps[0]), scale(steps[-1])
    left, top, width = x + LEFT, y + TOP, PANEL_WIDTH - LEFT - RIGHT

    def height(value: float) -> float:
        return top + HEIGHT * (1 - (scale(value) - low) / ((high - low) or 1))

    for step in steps:
        at = height(step)
        drawn.append(f'<line x1="{left}" y1="{at:.1f}" x2="{left + width}" y2="{at:.1f}" class="grid"/>')
        drawn.append(text(left - 8, at + 4, f"{step:,g}", "quiet", "end"))
    across = [left + width * place / (len(CLIENTS) - 1) for place in range(len(CLIENTS))]
    drawn += [
        text(at, top + HEIGHT + 18, str(clients), "quiet", "middle")
        for at, clients in zip(across, CLIENTS, strict=True)
    ]
    ours = [name for name in known if is_proxy(name)]
    ends = {}
    for name, values in known.items():
        kind = f"line ours ours-{ours.index(name) % 4}" if name in ours else "line"
        kind += " bare" if name == YARDSTICK else ""
        points = [(at, height(value)) for at, value in zip(across, values, strict=True) if value > 0]
        if points:
            drawn.append(f'<polyline points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in points)}" class="{kind}"/>')
            ends[name] = points[-1][1]
    last = {name: next(value for value in reversed(known[name]) if value > 0) for name in ends}
    for name, at in spread_out(ends).items():
        drawn.append(text(left + width + 8, at + 4, f"{name} {number(last[name])}", "quiet"))
    return drawn


def chart(found: Rounds, subtitle: str) -> str:
    """The whole drawing."""
    panel_height = TOP + HEIGHT + GAP - 30
    width = 2 * PANEL_WIDTH + 3 * MARGIN + RIGHT
    height = 76 + 2 * panel_height + 12
    drawn = [
        text(MARGIN, 32, "Few and many at once: by the number of clients, each with one request at a time", "heading"),
        text(MARGIN, 52, subtitle, "quiet"),
    ]
    for place, (title, what) in enumerate(NUMBERS.items()):
        row, column = divmod(place, 2)
        x = MARGIN + column * (PANEL_WIDTH + MARGIN + RIGHT / 2)
        drawn += panel(title, what, found, x, 76 + row * panel_height)
    return page(
        width, height, "Throughput, latency and CPU by the number of clients at once", STYLE + MORE_STYLE, drawn
    )
