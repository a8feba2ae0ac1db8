"""The report as an SVG: one panel a measure, one bar a contestant, the proxy's goal as a dashed line.

Written by hand, so that drawing needs nothing installed. The colours follow the reader's light or dark mode, background
included.
"""

import math
from collections.abc import Mapping
from html import escape

from tests.bench.proxies import is_proxy
from tests.bench.report import MEASURES, YARDSTICK, Cell, Measure, number

COLUMNS, PANEL_WIDTH, MARGIN = 2, 400, 24
BAR_HEIGHT, BAR_STEP, TITLE_HEIGHT, PANEL_GAP = 16, 24, 30, 26
LABEL_WIDTH, VALUE_WIDTH = 92, 108
BEYOND = 3.0  # a bar longer than this many times the yardstick's is cut off, so that the others can be compared

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #1f2328; }
  .heading { font-size: 15px; font-weight: 600; }
  .title { font-weight: 600; }
  .quiet { fill: #59636e; font-size: 12px; }
  .page { fill: #ffffff; stroke: #d1d9e0; }
  .bar { fill: #9aa4af; }
  .proxy { fill: #0969da; }
  .goal { stroke: #bc4c00; stroke-width: 1.5; stroke-dasharray: 4 3; }
  .goal-text { fill: #bc4c00; font-size: 12px; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .quiet { fill: #9198a1; }
    .page { fill: #0d1117; stroke: #3d444d; }
    .bar { fill: #6e7781; }
    .proxy { fill: #4493f8; }
    .goal { stroke: #f0883e; }
    .goal-text { fill: #f0883e; }
  }
"""


def text(x: float, y: float, words: str, kind: str = "", anchor: str = "start") -> str:
    """One line of text."""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{escape(words)}</text>'


def goal_of(measure: Measure, cells: Mapping[str, Cell]) -> float | None:
    """The proxy's goal in the measure's own unit."""
    if measure.ratio_max is not None:
        return measure.ratio_max * cells[YARDSTICK].middle if YARDSTICK in cells else None
    return measure.value_max


def bar(x: float, y: float, width: float, name: str, cut_off: bool) -> list[str]:
    """A bar; two slanted gaps say that it goes on."""
    kind = "bar proxy" if is_proxy(name) else "bar"
    drawn = [f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 1):.1f}" height="{BAR_HEIGHT}" class="{kind}"/>']
    if cut_off:
        for left in (x + width - 22, x + width - 13):
            corners = f"{left},{y + BAR_HEIGHT} {left + 4},{y + BAR_HEIGHT} {left + 9},{y} {left + 5},{y}"
            drawn.append(f'<polygon points="{corners}" class="page" stroke-width="0"/>')
    return drawn


def panel(measure: Measure, cells: Mapping[str, Cell], x: float, y: float) -> list[str]:
    """One measure."""
    goal, room = goal_of(measure, cells), PANEL_WIDTH - LABEL_WIDTH - VALUE_WIDTH
    known = {name: cell.middle for name, cell in cells.items() if not math.isnan(cell.middle)}
    most = max([*known.values(), goal or 0.0])
    if YARDSTICK in known:
        ours = max((value for name, value in known.items() if is_proxy(name)), default=0.0)
        most = min(most, max(BEYOND * known[YARDSTICK], 1.2 * ours, 1.2 * (goal or 0.0)))
    drawn = [text(x, y + 14, f"{measure.title}, {measure.unit}", "title")]
    left, top = x + LABEL_WIDTH, y + TITLE_HEIGHT
    for row, (name, cell) in enumerate(cells.items()):
        height, value = top + row * BAR_STEP, max(0.0, known.get(name, 0.0))
        ratio = f"  ({number(cell.ratio)}x)" if cell.ratio is not None else ""
        drawn.append(text(left - 8, height + 13, name, "", "end"))
        drawn += bar(left, height, room * min(value, most) / most, name, value > most)
        drawn.append(text(left + room + 10, height + 13, number(cell.middle) + ratio, "quiet"))
    if goal:
        at, bottom = left + room * goal / most, top + len(cells) * BAR_STEP
        drawn.append(f'<line x1="{at:.1f}" y1="{top - 4}" x2="{at:.1f}" y2="{bottom}" class="goal"/>')
        drawn.append(text(at, bottom + 12, f"goal {measure.goal()}", "goal-text", "middle"))
    return drawn


def chart(report: Mapping[str, dict[str, Cell]], subtitle: str) -> str:
    """The whole drawing."""
    shown = [measure for measure in MEASURES if measure.charted and report.get(measure.key)]
    contestants = max((len(report[measure.key]) for measure in shown), default=0)
    panel_height = TITLE_HEIGHT + contestants * BAR_STEP + PANEL_GAP
    rows = -(-len(shown) // COLUMNS)
    width = COLUMNS * PANEL_WIDTH + (COLUMNS + 1) * MARGIN
    height = 76 + rows * panel_height + 8
    drawn = []
    for place, measure in enumerate(shown):
        row, column = divmod(place, COLUMNS)
        x = MARGIN + column * (PANEL_WIDTH + MARGIN)
        drawn += panel(measure, report[measure.key], x, 76 + row * panel_height)
    heading = (text(MARGIN, 32, "What it costs: shorter is cheaper", "heading"), text(MARGIN, 52, subtitle, "quiet"))
    return page(width, height, "What the proxy costs, next to other gateways", STYLE, [*heading, *drawn])


def page(width: float, height: float, label: str, style: str, drawn: list[str]) -> str:
    """An image with a frame around what is drawn."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{label}">',
        f"<style>{style}</style>",
        f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="8" class="page"/>',
    ]
    return "\n".join([*lines, *drawn, "</svg>", ""])
