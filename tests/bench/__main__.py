"""What does the proxy cost? One command measures it next to gateways that do less, and prints a table.

    python -m tests.bench             under five minutes; longer with LiteLLM, which takes its time
    python -m tests.bench --clients   under three minutes: 1 to 256 clients at once, and are the goals reached?
    python -m tests.bench --quick     under one minute; without the long streams and the full database
    python -m tests.bench --svg costs.svg --json costs.json

`--proxy OLD/proxy.py --proxy NEW/proxy.py` compares two versions in one run. `--console` and `--database URL` put the
proxy with a console, or on another database, beside the plain one. All go with both tables; the goals of `--clients`
are for plain proxies only, and the first table tells what visitors at the console do to the relay. A database server's
own CPU is in no number.

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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench import clients, costs, lines, measure, pages, report
from tests.bench.chart import chart
from tests.bench.contestants import OTHERS, Contestant, Starter, installed, say
from tests.bench.costs import Bench
from tests.bench.measure import Tools
from tests.bench.proxies import THIS, Proxy, proxies
from tests.bench.report import Report

SECONDS_MAX = 900  # whatever happens


@dataclasses.dataclass
class Found:
    """What a run has found, complete or not."""

    costs: Report = dataclasses.field(default_factory=dict)
    by_clients: clients.Rounds | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    def text(self) -> str:
        """The tables."""
        return clients.tables(self.by_clients) if self.by_clients else report.table(self.costs)

    def svg(self) -> str:
        """The chart."""
        return lines.chart(self.by_clients, self.notes[0]) if self.by_clients else chart(self.costs, self.notes[0])

    def json(self) -> str:
        """All numbers, with the goals."""
        numbers = clients.as_json(self.by_clients) if self.by_clients else report.as_json(self.costs)
        return json.dumps({"notes": self.notes, **numbers}, indent=1) + "\n"


def machine(tools: Tools) -> str:
    """The machine and the programs, in a line."""
    about = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in about if "model name" in line), platform.machine())
    return (
        f"{os.cpu_count()} cores, {cpu}; Linux {platform.release().split('-')[0]}, Python {platform.python_version()}; "
        f"load generator and upstream: {tools.language}; {time.strftime('%Y-%m-%d')}"
    )


@contextmanager
def everybody(starters: dict[str, Starter], upstream_port: int, directory: Path) -> Iterator[list[Contestant]]:
    """Start the contestants one after the other; they wait idly for their turns."""
    with ExitStack() as stack:
        contestants = []
        for name, start in starters.items():
            (directory / name).mkdir()
            try:
                contestants.append(stack.enter_context(start(upstream_port, directory / name)))
            except RuntimeError as error:
                say(f"left out: {error}")
                continue
            say(f"started {name} in {contestants[-1].started_seconds:.2f} s")
        yield contestants


def run(arguments: argparse.Namespace, others: list[str], ours: list[Proxy], directory: Path, found: Found) -> None:
    """Measure everything into tables, and into sentences to go below them."""
    tools = measure.build_tools(directory)
    found.notes.append(machine(tools))
    found.notes += [f"{proxy.name}: {proxy.file}" for proxy in ours if proxy.plain and arguments.proxy]
    starters = {name: OTHERS[name] for name in others} | {proxy.name: proxy.start for proxy in ours}
    with measure.scripted_upstream(tools, SECONDS_MAX) as upstream_port:
        with everybody(starters, upstream_port, directory) as contestants:
            ours = [proxy for proxy in ours if proxy.name in [each.name for each in contestants]]
            bench = Bench(tools, Contestant("direct", upstream_port), contestants)
            if arguments.clients:
                run_clients(arguments, bench, ours, found)
            else:
                run_costs(arguments, bench, ours, found)
        for proxy in ours:
            found.notes.append(f"After the run, {proxy.name}'s audit {proxy.verdict_of_audit(directory / proxy.name)}.")
        plan, plain = costs_plan(arguments), [proxy for proxy in ours if proxy.plain]
        if plain and plan.accounts and not arguments.clients:
            more, sentence = costs.tables(plain[-1], plan, tools, upstream_port)
            found.costs.update(more)
            found.notes.append(sentence)


def run_clients(arguments: argparse.Namespace, bench: Bench, ours: list[Proxy], found: Found) -> None:
    """The table by clients."""
    plan = clients.QUICK if arguments.quick else clients.FULL
    if arguments.rounds:
        plan = dataclasses.replace(plan, rounds=arguments.rounds)
    names = [each.name for each in bench.contestants]
    found.by_clients = clients.Rounds(names, asked=[proxy.name for proxy in ours if proxy.plain])
    clients.measure_rounds(bench, plan, found.by_clients)


def run_costs(arguments: argparse.Namespace, bench: Bench, ours: list[Proxy], found: Found) -> None:
    """The first table, all but the full database."""
    # Memory comes first: later it would tell what a contestant has been through.
    say("memory with 500 streams")
    names = [each.name for each in bench.contestants]
    found.costs["resident_mb"] = report.compare([bench.ask(measure.resident_mb)], names)
    plan = costs_plan(arguments)
    found.costs.update(costs.rounds(bench, plan))
    found.costs.update(costs.once(bench, plan, [proxy.name for proxy in ours if proxy.plain]))
    for proxy in (proxy for proxy in ours if proxy.console):
        contestant = next(each for each in bench.contestants if each.name == proxy.name)
        more, sentence = pages.beside_visitors(proxy, contestant, bench.tools, pairs=1 if arguments.quick else 4)
        for key, cell in more.items():
            found.costs.setdefault(key, {})[proxy.name] = cell
        found.notes.append(sentence)


def costs_plan(arguments: argparse.Namespace) -> costs.Plan:
    """How much is measured for the first table."""
    plan = costs.QUICK if arguments.quick else costs.FULL
    if arguments.long:
        plan = dataclasses.replace(plan, endurance_seconds=120)
    return dataclasses.replace(plan, rounds=arguments.rounds) if arguments.rounds else plan


def read_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what the proxy costs.")
    known = (*OTHERS, "proxy")
    parser.add_argument("--clients", action="store_true", help="1 to 256 clients at once, against goals")
    parser.add_argument("--quick", action="store_true", help="under one minute: fewer rounds, no flatness")
    parser.add_argument("--long", action="store_true", help="2,000 streams for two minutes instead of 24 seconds")
    parser.add_argument("--rounds", type=int, help="how often everything is repeated")
    parser.add_argument("--contestants", help=f"some of {','.join(known)}; all that are installed if not given")
    parser.add_argument("--proxy", type=Path, action="append", metavar="FILE", help="another proxy.py; twice: both")
    parser.add_argument("--console", action="store_true", help="the proxy also with its console on, and visitors")
    parser.add_argument("--database", metavar="URL", help="the proxy also on this database, which runs already")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw the table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    return parser.parse_args()


def who(arguments: argparse.Namespace) -> tuple[list[str], list[Proxy]]:
    """The other gateways, and the proxies."""
    here = [*installed(), "proxy"]
    default = [name for name in here if name != "LiteLLM"] if arguments.clients else here
    names = arguments.contestants.split(",") if arguments.contestants else default
    if unknown := [name for name in names if name not in here]:
        sys.exit(f"not installed or not known: {', '.join(unknown)}; here are {', '.join(here)}")
    files = [file.resolve() for file in arguments.proxy or [THIS]]
    if missing := [str(file) for file in files if not file.is_file()]:
        sys.exit(f"no such file: {', '.join(missing)}")
    ours = proxies(files, arguments.console, arguments.database) if "proxy" in names else []
    return [name for name in names if name != "proxy"], ours


def main() -> None:
    """Measure, print, draw."""
    arguments = read_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.signal(signal.SIGALRM, lambda *_: sys.exit(f"gave up after {SECONDS_MAX} s"))
    signal.alarm(SECONDS_MAX)
    others, ours = who(arguments)
    found = Found()
    begin = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="bench-") as directory:
            run(arguments, others, ours, Path(directory), found)
    finally:  # what was measured before something failed is worth reading too
        found.notes.append(f"{time.monotonic() - begin:.0f} s.")
        print(found.text(), "", *found.notes, sep="\n", flush=True)
    if arguments.json:
        arguments.json.write_text(found.json())
    if arguments.svg:
        arguments.svg.write_text(found.svg())


if __name__ == "__main__":
    main()
