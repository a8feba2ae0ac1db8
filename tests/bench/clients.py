"""Few and many at once: closed loops of 1 to 256 clients, each of which asks again when it is answered.

A row is the median of the rounds. The ratios are the rounds' own, between measurements of the same few seconds; goals
that are ratios are for the proxy against the bare pass-through, and each says whether it is reached.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from tests.bench import measure
from tests.bench.contestants import Contestant, say
from tests.bench.costs import Bench
from tests.bench.measure import NOT_STREAMED, Tools, take_turns
from tests.bench.report import YARDSTICK, markdown, number, percentile, spread

CLIENTS = (1, 2, 4, 8, 16, 64, 256)
SATURATED = 64  # clients: more of them get no more answers
NOISE = 0.05


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    seconds: float  # for each contestant and number of clients, in two turns
    latency_seconds: float
    chunk_seconds: float


FULL = Plan(5, 0.8, 2.5, 1.25)
QUICK = Plan(2, 0.4, 1.5, 0.75)


@dataclass(frozen=True)
class Point:
    """What so many clients got from a contestant in one round."""

    rate: float
    p50_ms: float
    p99_ms: float
    cpu_us: float


@dataclass
class Rounds:
    """All that was measured. A contestant that could not keep up is missing in a round."""

    names: list[str]
    asked: list[str]  # of these the goals are asked
    points: list[dict[int, dict[str, Point]]] = field(default_factory=list)
    chunk_us: list[dict[str, float]] = field(default_factory=list)
    latency_ms: list[dict[str, list[float]]] = field(default_factory=list)

    def values(self, clients: int, name: str, what: Callable[[Point], float]) -> list[float]:
        """One number of one contestant, from each round."""
        return [what(each[clients][name]) for each in self.points if name in each.get(clients, {})]

    def ratios(self, clients: int, name: str, what: Callable[[Point], float]) -> list[float]:
        """The same against the yardstick."""
        rounds = [each[clients] for each in self.points if {name, YARDSTICK} <= each.get(clients, {}).keys()]
        return [what(points[name]) / what(points[YARDSTICK]) for points in rounds]

    def steps(self, fewer: int, more: int, name: str) -> list[float]:
        """How throughput changes from one row to the next, from each round."""
        rounds = [each for each in self.points if name in each.get(fewer, {}) and name in each.get(more, {})]
        return [each[more][name].rate / each[fewer][name].rate for each in rounds]


def closed_loops(tools: Tools, contestants: list[Contestant], clients: int, seconds: float) -> dict[str, Point]:
    """So many clients at once, not streamed, on each contestant by turns."""
    loads = [(contestant, [contestant.request(NOT_STREAMED)]) for contestant in contestants]
    windows = take_turns(tools, loads, seconds, turn_seconds=seconds / 2, connections=clients)
    return {
        name: Point(
            window.requests / window.seconds,
            percentile(window.latency_us, 50) / 1000,
            percentile(window.latency_us, 99) / 1000,
            window.cpu_us("requests"),
        )
        for name, window in windows.items()
    }


def measure_rounds(bench: Bench, plan: Plan, found: Rounds) -> None:
    """All numbers of clients in each round, then the two goals that are not about them."""
    for turn in range(plan.rounds):
        say(f"round {turn + 1} of {plan.rounds}")
        backwards = turn % 2 > 0
        points: dict[int, dict[str, Point]] = {}
        found.points.append(points)
        for clients in CLIENTS:
            points[clients] = bench.ask(closed_loops, clients, plan.seconds, backwards=backwards)
        found.chunk_us.append(bench.ask(measure.chunk_cpu, plan.chunk_seconds, backwards=backwards))
        found.latency_ms.append(bench.ask(measure.latencies, plan.latency_seconds, backwards=backwards))


@dataclass(frozen=True)
class Goal:
    """What is to be reached, and what was, in each round."""

    title: str
    limit: float
    ratios: list[float]
    at_least: bool = False

    @property
    def reached(self) -> bool:
        """Whether the median of the rounds is within the limit."""
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit

    @property
    def ratio(self) -> float:
        """The median of the rounds; no number, and so not reached, if nothing was measured."""
        return median(self.ratios) if self.ratios else float("nan")

    def line(self, name: str) -> list[str]:
        """A line of the table."""
        sign, verdict = "≥" if self.at_least else "≤", "reached" if self.reached else "NOT REACHED"
        limit = f"{sign} {self.limit:g}x"
        return [self.title, name, f"{number(self.ratio)}x", spread(self.ratios), limit, verdict]


def least_step(found: Rounds, name: str) -> Goal:
    """The row at which throughput grows least, or falls."""
    pairs = [(fewer, more, found.steps(fewer, more, name)) for fewer, more in pairwise(CLIENTS)]
    known = [pair for pair in pairs if pair[2]] or [(CLIENTS[0], CLIENTS[1], [])]
    fewer, more, steps = min(known, key=lambda pair: median(pair[2] or [0]))
    return Goal(f"throughput, least step: {fewer} to {more} clients", 1 - NOISE, steps, at_least=True)


def added_ratios(found: Rounds, name: str) -> list[float]:
    """What the contestant adds to the upstream's own p50, against what the yardstick adds."""
    rounds = [
        {who: percentile(times, 50) for who, times in each.items() if times}
        for each in found.latency_ms
        if {name, YARDSTICK, "direct"} <= each.keys()
    ]
    return [(p50[name] - p50["direct"]) / (p50[YARDSTICK] - p50["direct"]) for p50 in rounds]


def goals(found: Rounds, name: str) -> Iterator[Goal]:
    """What is asked of the proxy."""
    yield least_step(found, name)
    for clients, limit in ((1, 4.5), (2, 4.5), (4, 4.5), (16, 3.0)):
        ratios = found.ratios(clients, name, lambda point: point.p50_ms)
        yield Goal(f"p50 with {clients} at once, to bare", limit, ratios)
    ratios = found.ratios(SATURATED, name, lambda point: point.cpu_us)
    yield Goal(f"CPU a request with {SATURATED} at once, to bare", 1.9, ratios)
    chunks = [each[name] / each[YARDSTICK] for each in found.chunk_us if {name, YARDSTICK} <= each.keys()]
    yield Goal("CPU a chunk, 100 streams at 20 ms, to bare", 1.2, chunks)
    yield Goal("added p50 at 25 requests/s, to what bare adds", 1.8, added_ratios(found, name))


NUMBERS: dict[str, Callable[[Point], float]] = {
    "requests/s": lambda point: point.rate,
    "p50, ms": lambda point: point.p50_ms,
    "p99, ms": lambda point: point.p99_ms,
    "CPU a request, µs": lambda point: point.cpu_us,
}


def medians(found: Rounds, name: str, what: Callable[[Point], float]) -> list[float]:
    """A number of a contestant by the number of clients; no number where it could not keep up."""
    return [median(found.values(clients, name, what) or [float("nan")]) for clients in CLIENTS]


def tables(found: Rounds) -> str:
    """The rows, and the goals below them."""
    rows = [["at once", "contestant", *NUMBERS, "p50, to bare", "CPU, to bare"]]
    for at, clients in enumerate(CLIENTS):
        for name in found.names:
            numbers = [number(medians(found, name, what)[at]) for what in NUMBERS.values()]
            both = (found.ratios(clients, name, NUMBERS[key]) for key in ("p50, ms", "CPU a request, µs"))
            ratios = [f"{number(median(each))}x" if each else "" for each in both]
            rows.append([str(clients) if name == found.names[0] else "", name, *numbers, *ratios])
    lines = [["goal", "contestant", "median", "spread", "limit", ""]]
    for name in found.asked:
        lines += [goal.line(name) for goal in goals(found, name)]
    if YARDSTICK in found.names:  # as a measure of the noise; nothing is asked of it
        lines.append([*least_step(found, YARDSTICK).line(YARDSTICK)[:4], "", ""])
    return f"{markdown(rows)}\n\n{markdown(lines)}\n\nMedians; rounds: {len(found.points)}."


def as_json(found: Rounds) -> dict[str, Any]:
    """All numbers of all rounds, with the goals."""
    return {
        "rounds": [
            {clients: {name: asdict(point) for name, point in points.items()} for clients, points in each.items()}
            for each in found.points
        ],
        "chunk_us": found.chunk_us,
        "goals": {
            name: [{**asdict(goal), "ratio": goal.ratio, "reached": goal.reached} for goal in goals(found, name)]
            for name in found.asked
        },
    }
