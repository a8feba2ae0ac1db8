"""What a request, a chunk and a stream cost: the first table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.bench import measure, report
from tests.bench.contestants import Contestant, say
from tests.bench.measure import Tools
from tests.bench.proxies import Proxy
from tests.bench.report import Cell, Report
from tests.bench.tables import flatness


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    window_seconds: float
    latency_seconds: float
    blockage_seconds: int
    endurance_seconds: int  # 0: not measured
    accounts: int  # of the full database, ten requests each; 0: not measured
    table_rounds: int


FULL = Plan(5, 1.25, 2.0, 3, 24, 100_000, 4)
QUICK = Plan(2, 0.75, 1.2, 1, 0, 0, 0)


class Bench:
    """The contestants, and which of them could not keep up with what."""

    def __init__(self, tools: Tools, direct: Contestant, contestants: list[Contestant]) -> None:
        """Nobody is out yet."""
        self.tools, self.direct, self.contestants = tools, direct, contestants
        self.out: set[tuple[str, str]] = set()

    def ask(
        self,
        measured: Callable[..., dict[str, Any]],
        *arguments: Any,
        backwards: bool = False,
        only: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Measure those who can keep up; whoever cannot is left out from then on, and the others begin again."""
        contestants = [each for each in self.contestants if not only or each.name in only]
        if measured in (measure.latencies, measure.first_bytes):
            contestants.insert(0, self.direct)
        while able := [each for each in contestants if (each.name, measured.__name__) not in self.out]:
            try:
                return measured(self.tools, able[:: -1 if backwards else 1], *arguments)
            except measure.OverCapacityError as error:
                say(f"left out of {measured.__name__}: {error}")
                self.out.add((error.contestant.name, measured.__name__))
                error.contestant.wait_until_idle()
        return {}


def rounds(bench: Bench, plan: Plan) -> Report:
    """All that is measured in rounds."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(plan.rounds):
        say(f"round {number + 1} of {plan.rounds}")
        for measured, seconds in (
            (measure.request_cpu, plan.window_seconds),
            (measure.chunk_cpu, plan.window_seconds),
            (measure.burst_cpu, plan.window_seconds),
            (measure.latencies, plan.latency_seconds),
            (measure.first_bytes, plan.latency_seconds),
        ):
            values = bench.ask(measured, seconds, backwards=number % 2 > 0)
            found.setdefault(measured.__name__, []).append(values)
    names = [contestant.name for contestant in bench.contestants]
    cells = {key: report.compare(found[key], names) for key in ("request_cpu", "chunk_cpu", "burst_cpu")}
    for percent in (50, 99):
        cells[f"latency_p{percent}"] = report.added(found["latencies"], names, percent)
        cells[f"first_p{percent}"] = report.added(found["first_bytes"], names, percent)
    return cells


def once(bench: Bench, plan: Plan, plain: list[str]) -> Report:
    """What is measured once: large bodies, and many streams at their beginning and at their end."""
    found: Report = {key: {} for key in ("blocked_ms", "quiet_ms", "endurance_cpu", "endurance_mb")}
    say("10 MB bodies")
    for name, delays in bench.ask(measure.blockage, plan.blockage_seconds, only=("pass-through", *plain)).items():
        for key, delays_ms in delays.items():
            found[key][name] = Cell(delays_ms, value=max(delays_ms))
    if plan.endurance_seconds and plain:
        say(f"2,000 streams for {plan.endurance_seconds} s")
        for name, pairs in bench.ask(measure.endurance, plan.endurance_seconds, only=plain).items():
            for key, (first, last) in pairs.items():
                found[key][name] = Cell([last], [last / first])
    return found


def tables(proxy: Proxy, plan: Plan, tools: Tools, upstream_port: int) -> tuple[Report, str]:
    """A proxy on a full and on an empty database, and a sentence about the full one."""
    say(f"a database of {plan.accounts * 10:,} requests and {plan.accounts:,} accounts")
    flat = flatness(proxy, tools, upstream_port, plan.accounts, plan.table_rounds, plan.window_seconds)
    one = [full / empty for full, empty in zip(flat.full_us, flat.empty_us, strict=True)]
    many = [full / empty for full, empty in zip(flat.full_many_keys_us, flat.empty_us, strict=True)]
    found = {
        "tables_cpu": {proxy.name: Cell(flat.full_us, one)},
        "tables_keys_cpu": {proxy.name: Cell(flat.full_many_keys_us, many)},
        "tables_start": {proxy.name: Cell([flat.started_seconds[1]])},
    }
    return found, (
        f"The full database of {proxy.name}: {flat.rows:,} requests, {plan.accounts:,} accounts, filled in "
        f"{flat.fill_seconds:.0f} s; start on an empty one {flat.started_seconds[0]:.2f} s; audit {flat.audit}."
    )
