"""What is measured, and how: each function here puts one kind of load on a contestant and returns numbers.

CPU is the CPU time that the contestant's process tree used within a window, divided by the work that the load generator
saw done in the same window (requests answered, or events received). Times are the load generator's.
"""

import dataclasses
import json
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.contestants import HERE, Contestant, free_port, running

CHUNK_STREAMS, CHUNK_PACE_MS = 100, 20
LATENCY_RATE = 25
OPENING_SECONDS_MAX = 4  # beyond the time over which the load generator spreads the streams' beginnings
NOT_STREAMED = "[events=0 pace_ms=0]"
TURN_SECONDS, OPENING_TURN_SECONDS = 0.25, 0.15  # the opening turn opens the connections


@dataclass
class Tools:
    """The two helpers as commands: compiled C, or, without a compiler, slower Python."""

    upstream: list[str]
    load: list[str]
    directory: Path
    language: str


def build_tools(directory: Path) -> Tools:
    """Compile the scripted upstream and the load generator, or fall back to Python."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if not compiler or sys.platform != "linux":
        fallback = [sys.executable, str(HERE / "fallback.py")]
        return Tools([*fallback, "upstream"], [*fallback, "load"], directory, "Python (no C compiler found)")
    for name in ("upstream", "load"):
        command = [compiler, "-O2", "-o", str(directory / name), str(HERE / f"{name}.c")]
        subprocess.run(command, check=True, timeout=60)
    return Tools([str(directory / "upstream")], [str(directory / "load")], directory, "C")


@contextmanager
def scripted_upstream(tools: Tools, seconds: int) -> Iterator[int]:
    """Run the scripted upstream; gives its port."""
    port = free_port()
    arguments = [*tools.upstream, f"port={port}", f"seconds={seconds}"]
    with running(arguments, tools.directory / "upstream.log") as process:
        contestant = Contestant("direct", port, process)
        deadline = time.monotonic() + 10
        while not contestant.answers():
            if time.monotonic() > deadline:
                raise RuntimeError("the scripted upstream did not start")
            time.sleep(0.01)
        yield port


@dataclass
class Snapshot:
    """The load generator's counters since its start, and the times of answers completed since the last snapshot."""

    requests: int
    events: int
    failed: int
    open: int
    latency_us: list[float]
    first_us: list[float]
    gap_us: list[float]  # between two parts of a streamed body


class OverCapacityError(RuntimeError):
    """A contestant cannot do what is asked: answers fail, or are not complete in time."""

    def __init__(self, contestant: Contestant, what: str) -> None:
        """Say who could not do what."""
        super().__init__(f"{contestant.name}: {contestant.ended()}{what}")
        self.contestant = contestant


class Load:
    """A running load generator. A failed answer ends the measurement: a number that counts it would mean nothing."""

    def __init__(self, process: "subprocess.Popen[bytes]", contestant: Contestant, log: Path) -> None:
        """Take charge of the generator's pipes."""
        self.process, self.contestant, self.log = process, contestant, log

    def snapshot(self, command: str = "", seconds: float = 10) -> Snapshot:
        """Ask for the counters, and with a command make it pause or resume."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], seconds)[0]:
            raise OverCapacityError(self.contestant, f"not all requests were answered within {seconds:.0f} s")
        found = Snapshot(**json.loads(self.process.stdout.readline()))
        if found.failed:
            complaints = self.log.read_text(errors="replace")[-600:]
            raise OverCapacityError(self.contestant, f"{found.failed} answers failed: {complaints}")
        return found

    def wait_for_open(self, count: int, seconds: float) -> None:
        """Wait until so many answers have begun and none has ended."""
        deadline = time.monotonic() + seconds
        while (now_open := self.snapshot().open) < count:
            if time.monotonic() > deadline:
                raise OverCapacityError(self.contestant, f"{now_open} of {count} streams opened in time")
            time.sleep(0.05)

    def wait_for_requests(self, count: int, seconds: float) -> None:
        """Wait until so many answers are complete."""
        deadline = time.monotonic() + seconds
        while (done := self.snapshot().requests) < count:
            if time.monotonic() > deadline:
                raise OverCapacityError(self.contestant, f"{done} of {count} answers {seconds:.0f} s late")
            time.sleep(0.05)


@contextmanager
def load(tools: Tools, contestant: Contestant, request: bytes, **options: int) -> Iterator[Load]:
    """Put load on a contestant for as long as the block lasts; the options are those of `load.c`."""
    stem = f"{contestant.name}-{time.monotonic_ns()}"
    request_file, log = tools.directory / f"{stem}.request", tools.directory / f"{stem}.load"
    request_file.write_bytes(request)
    words = [f"{name}={value}" for name, value in {"port": contestant.port, **options}.items()]
    arguments = [*tools.load, f"request={request_file}", *words]
    with (
        log.open("wb") as errors,
        running(arguments, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        yield Load(process, contestant, log)


@dataclass
class Window:
    """What a contestant did between two instants."""

    cpu_seconds: float
    seconds: float
    requests: int
    events: int
    latency_us: list[float] = field(default_factory=list)  # of the requests, or of as many as the load generator tells

    def __add__(self, other: "Window") -> "Window":
        """Two windows together."""
        names = [each.name for each in dataclasses.fields(self)]
        return Window(*(getattr(self, name) + getattr(other, name) for name in names))

    def cpu_us(self, unit: str) -> float:
        """CPU in microseconds for each of the `requests` or `events`."""
        done = self.requests if unit == "requests" else self.events
        return self.cpu_seconds / done * 1e6 if done else float("nan")


def observe(loads: list[Load], seconds: float) -> list[Window]:
    """Watch loaded contestants for some seconds, the same for all."""

    def look(running_load: Load) -> tuple[float, float, Snapshot]:
        return time.monotonic(), running_load.contestant.cpu_seconds(), running_load.snapshot()

    before = [look(running_load) for running_load in loads]
    time.sleep(seconds)
    return [
        Window(cpu_end - cpu, end - begin, last.requests - first.requests, last.events - first.events)
        for (begin, cpu, first), (end, cpu_end, last) in zip(before, map(look, loads), strict=True)
    ]


def take_turns(
    tools: Tools,
    loads: list[tuple[Contestant, list[bytes]]],
    seconds: float,
    turn_seconds: float = TURN_SECONDS,
    **options: int,
) -> dict[str, Window]:
    """Closed loops at full speed, a quarter of a second on each contestant in turn.

    A turn begins and ends with no request under way, so what was used and what was done in it belong together. The
    turns are short because a machine's other work changes from second to second, and should meet all alike.
    """
    totals = {contestant.name: Window(0, 0, 0, 0) for contestant, _ in loads}
    with ExitStack() as stack:
        running_loads = []
        for contestant, requests in loads:
            options = {**options, "parts": len(requests), "paused": 1}
            running_loads.append(stack.enter_context(load(tools, contestant, b"".join(requests), **options)))
        for running_load in running_loads:
            take_turn(running_load, OPENING_TURN_SECONDS)
        for turn in range(round(seconds / turn_seconds)):
            for running_load in running_loads[:: 1 if turn % 2 else -1]:
                window = take_turn(running_load, turn_seconds)
                totals[running_load.contestant.name] += window
    return totals


def take_turn(running_load: Load, turn_seconds: float) -> Window:
    """Let a paused load generator run for a while, until the last of its requests is answered."""
    contestant = running_load.contestant
    begin, cpu = time.monotonic(), contestant.cpu_seconds()
    before = running_load.snapshot("resume")
    time.sleep(turn_seconds)
    after, seconds = running_load.snapshot("pause", 30), time.monotonic() - begin
    time.sleep(0.005)  # for what a server does when the answer is out
    requests, events = after.requests - before.requests, after.events - before.events
    return Window(contestant.cpu_seconds() - cpu, seconds, requests, events, after.latency_us)


def request_cpu(tools: Tools, contestants: list[Contestant], seconds: float) -> dict[str, float]:
    """µs a request, not streamed, 50 at a time; each connection sends the next when the last is answered."""
    loads = [(contestant, [contestant.request(NOT_STREAMED)]) for contestant in contestants]
    windows = take_turns(tools, loads, seconds, connections=50)
    return {name: window.cpu_us("requests") for name, window in windows.items()}


def burst_cpu(tools: Tools, contestants: list[Contestant], seconds: float) -> dict[str, float]:
    """µs a chunk of streams of 1,000 that come as fast as they are read, 4 at a time; opening them is included."""
    text = "[events=1000 pace_ms=0]"
    loads = [(contestant, [contestant.request(text, stream=True)]) for contestant in contestants]
    windows = take_turns(tools, loads, seconds, connections=4, events=1000)
    return {name: window.cpu_us("events") for name, window in windows.items()}


def chunk_cpu(tools: Tools, contestants: list[Contestant], seconds: float) -> dict[str, float]:
    """µs a chunk of 100 streams at 20 ms. They open before the window and end after it: it holds nothing else.

    All contestants have their streams in the same seconds, as in `latencies`, and LiteLLM alone.
    """
    if len(groups := apart(contestants)) > 1:
        return {name: value for group in groups for name, value in chunk_cpu(tools, group, seconds).items()}
    spread_seconds = 0.5
    events = int((seconds + spread_seconds + 0.7) * 1000 / CHUNK_PACE_MS)
    options = {"connections": CHUNK_STREAMS, "spread_ms": int(spread_seconds * 1000), "once": 1, "events": events}
    with ExitStack() as stack:
        loads = []
        for contestant in contestants:
            request = contestant.request(f"[events={events} pace_ms={CHUNK_PACE_MS}]", stream=True)
            loads.append(stack.enter_context(load(tools, contestant, request, **options)))
        time.sleep(spread_seconds + 0.4)
        windows = observe(loads, seconds)
        for running_load in loads:
            running_load.wait_for_requests(CHUNK_STREAMS, 5)
    return {contestant.name: window.cpu_us("events") for contestant, window in zip(contestants, windows, strict=True)}


def apart(contestants: list[Contestant]) -> list[list[Contestant]]:
    """Those that can be measured in the same seconds, and LiteLLM, which may need a whole core."""
    alone = [contestant for contestant in contestants if contestant.name == "LiteLLM"]
    together = [contestant for contestant in contestants if contestant not in alone]
    return [group for group in (together, alone) if group]


def latencies(tools: Tools, contestants: list[Contestant], seconds: float, events: int = 0) -> dict[str, list[float]]:
    """25 requests a second to each in turn: ms to the end of the answer, or with `events` to its first byte.

    All contestants (the upstream itself among them) are asked in the same seconds, a few milliseconds apart, so that
    whatever else the machine does meets all of them; LiteLLM, which may need a whole core for this, is asked alone. A
    streamed answer has its events 20 ms apart.
    """
    if len(groups := apart(contestants)) > 1:
        return {name: times for group in groups for name, times in latencies(tools, group, seconds, events).items()}
    found = {}
    with ExitStack() as stack:
        loads = []
        for turn, contestant in enumerate(contestants):
            request = contestant.request(f"[events={events} pace_ms=20]", stream=events > 0)
            phase_ms = turn * 1000 // LATENCY_RATE // len(contestants)
            options = {"connections": 200, "rate": LATENCY_RATE, "phase_ms": phase_ms, "events": events}
            loads.append(stack.enter_context(load(tools, contestant, request, **options)))
        time.sleep(0.7)
        for running_load in loads:
            running_load.snapshot()
        time.sleep(seconds)
        for running_load in loads:
            snapshot = running_load.snapshot()
            times_us = snapshot.first_us if events else snapshot.latency_us
            found[running_load.contestant.name] = [time_us / 1000 for time_us in times_us]
    return found


def first_bytes(tools: Tools, contestants: list[Contestant], seconds: float) -> dict[str, list[float]]:
    """ms to the first byte of a streamed answer's body."""
    return latencies(tools, contestants, seconds, events=5)


def resident_mb(tools: Tools, contestants: list[Contestant], streams: int = 500) -> dict[str, float]:
    """Resident memory while so many streams are open, at 500 ms an event, a second after the last has begun."""
    found = {}
    events = 120
    options = {"connections": streams, "spread_ms": 1000, "once": 1, "events": events}
    for contestant in contestants:
        request = contestant.request(f"[events={events} pace_ms=500]", stream=True)
        with load(tools, contestant, request, **options) as running_load:
            time.sleep(1)
            running_load.wait_for_open(streams, 45)
            time.sleep(1)
            found[contestant.name] = contestant.resident_mb()
        contestant.wait_until_idle()
    return found


def endurance(
    tools: Tools, contestants: list[Contestant], seconds: int, streams: int = 2000
) -> dict[str, dict[str, tuple[float, float]]]:
    """2,000 streams at 250 ms an event: µs a chunk and MB resident, in the first ten seconds that all are open and in
    the last ten.
    """
    found = {}
    spread_seconds, pace_ms = 6, 250
    window_seconds = min(10.0, seconds / 2)
    events = int((seconds + spread_seconds + OPENING_SECONDS_MAX + 1) * 1000 / pace_ms)
    options = {"connections": streams, "spread_ms": spread_seconds * 1000, "once": 1, "events": events}
    for contestant in contestants:
        request = contestant.request(f"[events={events} pace_ms={pace_ms}]", stream=True)
        with load(tools, contestant, request, **options) as running_load:
            time.sleep(spread_seconds)
            running_load.wait_for_open(streams, OPENING_SECONDS_MAX)
            [first], first_mb = observe([running_load], window_seconds), contestant.resident_mb()
            time.sleep(max(0.0, seconds - 2 * window_seconds))
            [last], last_mb = observe([running_load], window_seconds), contestant.resident_mb()
            running_load.wait_for_requests(streams, 60)
        cpu_us = (first.cpu_us("events"), last.cpu_us("events"))
        found[contestant.name] = {"endurance_cpu": cpu_us, "endurance_mb": (first_mb, last_mb)}
    return found


def blockage(
    tools: Tools, contestants: list[Contestant], seconds: int, megabytes: int = 10
) -> dict[str, dict[str, list[float]]]:
    """The worst latency of /health in each second, in ms: `quiet`, then with bodies of 10 MB (an image) under way.

    /health is asked 200 times a second, a body comes four times a second. A loop that is blocked answers late: the
    longest delay is the longest blockage as clients meet it, queueing and the machine's other processes included. The
    quiet seconds tell how much of it is the machine's.
    """
    found = {}
    image = "data:image/png;base64," + "iVBORw0KGgo" * (megabytes * 1_000_000 // 11)
    content: list[dict[str, Any]] = [
        {"type": "text", "text": "What is in this image?"},
        {"type": "image_url", "image_url": {"url": image}},
    ]
    for contestant in contestants:
        large = contestant.request(NOT_STREAMED, content=content)
        probe = f"GET /health HTTP/1.1\r\nHost: 127.0.0.1:{contestant.port}\r\n\r\n".encode()
        with load(tools, contestant, probe, connections=200, rate=200) as health:
            time.sleep(0.5)
            health.snapshot()
            quiet_ms = [worst_ms(health) for _ in range(seconds)]
            with load(tools, contestant, large, connections=8, rate=4) as bodies:
                blocked_ms = [worst_ms(health) for _ in range(seconds)]
                bodies.wait_for_requests(1, 5)
        found[contestant.name] = {"quiet_ms": quiet_ms, "blocked_ms": blocked_ms}
    return found


def worst_ms(running_load: Load) -> float:
    """The largest latency of the second that follows."""
    time.sleep(1)
    return max(running_load.snapshot().latency_us) / 1000
