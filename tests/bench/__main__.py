"""What does the proxy cost? One command measures it next to gateways that do less, and prints a table.

    python -m tests.bench                 under five minutes; longer with LiteLLM, which takes its time
    python -m tests.bench --quick         under one minute; without the long streams and the full database
    python -m tests.bench --svg costs.svg --json costs.json

It needs Linux, the proxy's own requirements, and nothing else. With a C compiler its upstream and its load generator
are C; nginx and LiteLLM take part if they are installed. All run on this machine, one process each, over loopback.
They are measured in turn, in several rounds, every other round backwards; a ratio is the median of the rounds' ratios,
each between two measurements of the same half minute. So a machine that is busy with other things spreads the numbers,
but shifts the ratios little.
"""

import argparse
import dataclasses
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench import measure, report
from tests.bench.chart import chart
from tests.bench.contestants import STARTERS, Contestant, installed, verdict_of_audit
from tests.bench.measure import Tools
from tests.bench.report import Cell, Report
from tests.bench.tables import flatness

SECONDS_MAX = 900  # whatever happens


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


def say(words: str) -> None:
    """Report progress on stderr; stdout is for the table."""
    print(words, file=sys.stderr, flush=True)


def machine(tools: Tools) -> str:
    """The machine and the programs, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    return (
        f"{os.cpu_count()} cores, {cpu}; Linux {platform.release().split('-')[0]}, Python {platform.python_version()}; "
        f"load generator and upstream: {tools.language}; {time.strftime('%Y-%m-%d')}"
    )


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


def once(bench: Bench, plan: Plan) -> Report:
    """What is measured once: large bodies, and many streams at their beginning and at their end."""
    found: Report = {key: {} for key in ("blocked_ms", "quiet_ms", "endurance_cpu", "endurance_mb")}
    say("10 MB bodies")
    for name, delays in bench.ask(measure.blockage, plan.blockage_seconds, only=("pass-through", "proxy")).items():
        for key, delays_ms in delays.items():
            found[key][name] = Cell(delays_ms, value=max(delays_ms))
    if plan.endurance_seconds and "proxy" in [each.name for each in bench.contestants]:
        say(f"2,000 streams for {plan.endurance_seconds} s")
        for name, pairs in bench.ask(measure.endurance, plan.endurance_seconds, only=("proxy",)).items():
            for key, (first, last) in pairs.items():
                found[key][name] = Cell([last], [last / first])
    return found


def tables(plan: Plan, tools: Tools, upstream_port: int) -> tuple[Report, str]:
    """The proxy on a full and on an empty database, and a sentence about the full one."""
    say(f"a database of {plan.accounts * 10:,} requests and {plan.accounts:,} accounts")
    flat = flatness(tools, upstream_port, plan.accounts, plan.table_rounds, plan.window_seconds)
    one = [full / empty for full, empty in zip(flat.full_us, flat.empty_us, strict=True)]
    many = [full / empty for full, empty in zip(flat.full_many_keys_us, flat.empty_us, strict=True)]
    found = {
        "tables_cpu": {"proxy": Cell(flat.full_us, one)},
        "tables_keys_cpu": {"proxy": Cell(flat.full_many_keys_us, many)},
        "tables_start": {"proxy": Cell([flat.started_seconds[1]])},
    }
    return found, (
        f"The full database: {flat.rows:,} requests, {plan.accounts:,} accounts, filled in {flat.fill_seconds:.0f} s; "
        f"start on an empty one {flat.started_seconds[0]:.2f} s; audit {flat.audit}."
    )


@contextmanager
def everybody(names: list[str], upstream_port: int, directory: Path) -> Iterator[list[Contestant]]:
    """Start the contestants one after the other; they wait idly for their turns."""
    with ExitStack() as stack:
        contestants = []
        for name in names:
            (directory / name).mkdir()
            try:
                contestants.append(stack.enter_context(STARTERS[name](upstream_port, directory / name)))
            except RuntimeError as error:
                say(f"left out: {error}")
                continue
            say(f"started {name} in {contestants[-1].started_seconds:.2f} s")
        yield contestants


def run(plan: Plan, names: list[str], directory: Path, found: Report, notes: list[str]) -> None:
    """Measure everything into a report, and into sentences to go below it."""
    tools = measure.build_tools(directory)
    notes.append(machine(tools))
    with measure.scripted_upstream(tools, SECONDS_MAX) as upstream_port:
        with everybody(names, upstream_port, directory) as contestants:
            # Memory comes first: later it would tell what a contestant has been through.
            say("memory with 500 streams")
            bench = Bench(tools, Contestant("direct", upstream_port), contestants)
            found["resident_mb"] = report.compare([bench.ask(measure.resident_mb)], [each.name for each in contestants])
            found.update(rounds(bench, plan))
            found.update(once(bench, plan))
        if "proxy" in names:
            notes.append(f"After the run, the proxy's audit {verdict_of_audit(directory / 'proxy' / 'config.yaml')}.")
        if "proxy" in names and plan.accounts:
            more, sentence = tables(plan, tools, upstream_port)
            found.update(more)
            notes.append(sentence)


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what the proxy costs.")
    parser.add_argument("--quick", action="store_true", help="under one minute: fewer rounds, no flatness")
    parser.add_argument("--long", action="store_true", help="2,000 streams for two minutes instead of 24 seconds")
    parser.add_argument("--rounds", type=int, help="how often everything is repeated")
    parser.add_argument("--contestants", help=f"some of {','.join(STARTERS)}; all that are installed if not given")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    return parser.parse_args()


def main() -> None:
    """Measure, print, draw."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"gave up after {SECONDS_MAX} s"))
    signal.alarm(SECONDS_MAX)
    plan = QUICK if arguments.quick else FULL
    if arguments.long:
        plan = dataclasses.replace(plan, endurance_seconds=120)
    if arguments.rounds:
        plan = dataclasses.replace(plan, rounds=arguments.rounds)
    names = arguments.contestants.split(",") if arguments.contestants else installed()
    if unknown := [name for name in names if name not in installed()]:
        sys.exit(f"not installed or not known: {', '.join(unknown)}; here are {', '.join(installed())}")

    found: Report = {}
    notes: list[str] = []
    begin = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            run(plan, names, Path(directory), found, notes)
    finally:  # what was measured before something failed is worth reading too
        notes.append(f"{plan.rounds} rounds, {time.monotonic() - begin:.0f} s.")
        print(report.table(found), "", *notes, sep="\n", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(found, notes), indent=1) + "\n")
    if arguments.svg:
        arguments.svg.write_text(chart(found, notes[0]))


def as_json(found: Report, notes: list[str]) -> dict[str, Any]:
    """All numbers, with the goals."""
    goals = {each.key: each for each in (*report.MEASURES, *report.FLATNESS)}
    return {
        "notes": notes,
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
                        "goal_met": cell.meets(goals[key]) if name == "proxy" else None,
                    }
                    for name, cell in cells.items()
                },
            }
            for key, cells in found.items()
        },
    }


if __name__ == "__main__":
    main()
