"""The scripted upstream and the load generator for machines without a C compiler: what `upstream.c` and `load.c` do.

    python tests/bench/fallback.py upstream port=8001
    python tests/bench/fallback.py load port=8000 request=FILE connections=50 ...

Options and output are those of the C programs, whose first comments explain them. Each answer costs about ten times as
much CPU here, so with few cores the contestants get less of the machine; their CPU per request can still be compared.
"""

import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any, cast

import uvloop

COMMON = b'"created":1763827200,"id":"chatcmpl-kqB1zXw0bX3qT9yJ7mC5vN2hL8pR4sDf","model":"bench",'
CHUNK = COMMON + b'"system_fingerprint":"b7120-a1b2c3d4e","object":"chat.completion.chunk"'
USAGE = b'"usage":{"completion_tokens":%d,"prompt_tokens":60,"total_tokens":%d}'
ANSWER = (
    b'{"choices":[{"finish_reason":"stop","index":0,"message":{"role":"assistant","content":"The answer is forty-two, '
    b'and here is one more sentence."}}],' + COMMON + b'"object":"chat.completion",' + USAGE % (16, 76) + b"}"
)
JSON_HEAD = b"HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nServer: bench\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
)


def http_chunk(event: bytes) -> bytes:
    """One event as an HTTP chunk of its own."""
    return b"%x\r\ndata: %s\n\n\r\n" % (len(event) + 8, event)


TOKENS = [  # they differ: LiteLLM refuses a model that repeats itself
    http_chunk(b'{"choices":[{"finish_reason":null,"index":0,"delta":{"content":" %04d"}}],' % number + CHUNK + b"}")
    for number in range(1024)
]


class Upstream(asyncio.Protocol):
    """One connection of the scripted upstream."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to wait for a request."""
        self.transport = cast(asyncio.Transport, transport)
        self.received, self.length, self.needed = [b""], 0, 0

    def data_received(self, data: bytes) -> None:
        """Collect a request; answer it when it is complete."""
        self.received.append(data)
        self.length += len(data)
        if not self.needed:
            self.received = [b"".join(self.received)]
            head_end = self.received[0].find(b"\r\n\r\n")
            if head_end < 0:
                return
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.received[0][:head_end])
            self.needed = head_end + 4 + int(length[1] if length else 0)
        if self.length >= self.needed:
            request = b"".join(self.received)[:16384]
            self.received, self.length, self.needed = [b""], 0, 0
            self.answer(request)

    def answer(self, request: bytes) -> None:
        """Send what the request's text asks for."""
        mark = re.search(rb"\[events=(\d+) pace_ms=(\d+)\]", request)
        events, pace_ms = (int(mark[1]), int(mark[2])) if mark else (0, 0)
        if not events:
            self.transport.write(JSON_HEAD % len(ANSWER) + ANSWER)
            return
        usage = http_chunk(b'{"choices":[],' + CHUNK + b"," + USAGE % (events, events + 60) + b"}")
        finish = http_chunk(b'{"choices":[{"finish_reason":"stop","index":0,"delta":{}}],' + CHUNK + b"}")
        tail = finish + usage + http_chunk(b"[DONE]") + b"0\r\n\r\n"
        self.transport.write(STREAM_HEAD)
        if pace_ms:
            self.transport.write(TOKENS[0])
            due = asyncio.get_running_loop().time() + random.random() * pace_ms / 1000
            self.send_later(due, events - 1, pace_ms / 1000, tail)
        else:
            self.transport.write(b"".join(TOKENS[i % 1024] for i in range(events)) + tail)

    def send_later(self, due: float, events: int, pace_seconds: float, tail: bytes) -> None:
        """Send one event when it is due and plan the next; after the last comes the tail."""
        if not self.transport.is_closing():
            asyncio.get_running_loop().call_at(due, self.send_one, due, events, pace_seconds, tail)

    def send_one(self, due: float, events: int, pace_seconds: float, tail: bytes) -> None:
        """Send what is due now."""
        self.transport.write(TOKENS[events % 1024] if events else tail)
        if events:
            self.send_later(due + pace_seconds, events - 1, pace_seconds, tail)


class Connection(asyncio.Protocol):
    """One connection of the load generator."""

    def __init__(self, load: "Load") -> None:
        """Belong to a load generator; nothing is sent yet."""
        self.load, self.busy = load, False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        """A connection that ends under a request is a failed answer."""
        if self.busy:
            self.end("connection closed")

    def send(self, request: bytes, start: float) -> None:
        """Send a request whose time counts from `start`."""
        self.busy, self.start, self.head, self.last, self.first = True, start, b"", b"", False
        self.last_read = start
        self.events, self.left = 0, -1
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer.

        Chunk framing is not decoded, so an event whose closing blank line a server splits between two HTTP chunks is
        not counted; the events that close an answer make up for it in the check.
        """
        if not self.head.endswith(b"\r\n\r\n"):
            head, blank_line, data = (self.head + data).partition(b"\r\n\r\n")
            self.head = head + blank_line
            length = re.search(rb"(?i)\r\ncontent-length: *(\d+)", self.head)
            self.left = int(length[1]) if length else -1
        if not data:
            return
        if not self.first:
            self.first = True
            self.load.open += 1
            self.load.first_us.append(1e6 * (time.monotonic() - self.start))
        elif self.load.options["events"]:
            self.load.gap_us.append(1e6 * (time.monotonic() - self.last_read))
        self.last_read = time.monotonic()
        found = (self.last[-1:] + data).count(b"\n\n")
        self.events += found
        self.load.events += found
        self.last = (self.last + data)[-64:]
        if self.left >= 0:
            self.left -= len(data)
        if self.left == 0 or (self.left < 0 and self.last.endswith(b"\r\n0\r\n\r\n")):
            self.end(self.complaint())

    def complaint(self) -> str:
        """What is wrong with a whole answer, if anything."""
        wanted = self.load.options["events"]
        whole = self.events >= wanted and b"data: [DONE]\n\n" in self.last if wanted else b"}" in self.last[-10:]
        return "" if whole and self.head.startswith(b"HTTP/1.1 200") else "not a complete answer"

    def end(self, complaint: str) -> None:
        """Count an answer, and go on."""
        self.busy = False
        self.load.open -= self.first
        self.load.done(self, complaint)


class Load:
    """The load generator: a closed loop, or an open one if there is a rate."""

    def __init__(self, options: dict[str, Any]) -> None:
        """Read the requests."""
        self.options = dict.fromkeys(("spread_ms", "rate", "phase_ms", "once", "events", "paused"), 0)
        self.options |= {"connections": 1, "parts": 1}
        self.options |= {name: int(value) for name, value in options.items() if name != "request"}
        requests, parts = Path(options["request"]).read_bytes(), self.options["parts"]
        size = len(requests) // parts
        self.requests_to_send = itertools.cycle([requests[i * size : (i + 1) * size] for i in range(parts)])
        self.requests = self.events = self.failed = self.open = self.busy = 0
        self.report_when_idle = False
        self.latency_us: list[float] = []
        self.first_us: list[float] = []
        self.gap_us: list[float] = []
        self.idle: list[Connection] = []

    async def start_one(self, due: float) -> None:
        """Send the next request over an idle connection, or a new one."""
        self.busy += 1
        request = next(self.requests_to_send)
        self.idle = [connection for connection in self.idle if not connection.transport.is_closing()]
        if self.idle:
            self.idle.pop().send(request, due)
            return
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self), "127.0.0.1", self.options["port"])
        connection.send(request, due)

    def done(self, connection: Connection, complaint: str) -> None:
        """Book an answer; in a closed loop send the next request."""
        self.busy -= 1
        if complaint:
            self.failed += 1
            print(f"load: {complaint}: {connection.head[:300]!r}", file=sys.stderr, flush=True)
        else:
            self.requests += 1
            self.latency_us.append(1e6 * (time.monotonic() - connection.start))
            if self.options["rate"] or self.options["once"] or self.options["paused"]:
                self.idle.append(connection)
            else:
                self.busy += 1
                connection.send(next(self.requests_to_send), time.monotonic())
        if self.report_when_idle and not self.busy:
            self.report()

    def take_command(self) -> None:
        """Answer a line on stdin; its end is the end of the program."""
        line = os.read(0, 4096)
        if not line:
            asyncio.get_running_loop().stop()
        if line.startswith(b"p"):
            self.options["paused"], self.report_when_idle = 1, self.busy > 0
        if line.startswith(b"r"):
            self.options["paused"] = 0
            self.task = asyncio.ensure_future(self.start_all())
        if line and not self.report_when_idle:
            self.report()

    def report(self) -> None:
        """Print the counters."""
        found = {name: getattr(self, name) for name in ("requests", "events", "failed", "open")}
        for name in ("latency_us", "first_us", "gap_us"):
            samples = sorted(getattr(self, name))[::-1]
            found[name] = samples[:: max(1, len(samples) // 2000)][::-1]
            setattr(self, name, [])
        print(json.dumps(found), flush=True)
        self.report_when_idle = False

    async def start_all(self) -> None:
        """Let every connection go on."""
        for _ in range(self.options["connections"] - self.busy):
            await self.start_one(time.monotonic())

    async def run(self) -> None:
        """Start requests as the options say, until stdin ends."""
        asyncio.get_running_loop().add_reader(0, self.take_command)
        if self.options["paused"]:
            return
        rate, connections = self.options["rate"], self.options["connections"]
        interval = 1 / rate if rate else self.options["spread_ms"] / 1000 / connections
        due = time.monotonic()
        if rate:
            due = (due // interval + 2) * interval + self.options["phase_ms"] / 1000
        made = 0
        while rate or made < connections:
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            await self.start_one(due if rate else time.monotonic())
            made += 1
            due += interval


def main() -> None:
    """Run as one of the two until killed, until stdin ends, or until the time is up."""
    options = dict(word.split("=", 1) for word in sys.argv[2:])
    signal.alarm(int(options.pop("seconds", 600)))
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    if sys.argv[1] == "upstream":
        loop.run_until_complete(loop.create_server(Upstream, "127.0.0.1", int(options["port"]), backlog=4096))
        loop.run_forever()
    else:
        task = loop.create_task(Load(options).run())
        loop.run_forever()
        task.cancel()


if __name__ == "__main__":
    main()
