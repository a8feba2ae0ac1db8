"""Those who attack the proxy: upstreams that misbehave, clients that do not read, machines that go wrong.

An upstream is a class with the misbehaviour in its name (a behaviour of `FakeUpstream`). What goes wrong in the
proxy's own process (its clock, its own code) is brought about by a `sitecustomize.py` that Python runs as it starts.
"""

import contextlib
import fcntl
import json
import os
import re
import select
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Self

from tests.support.client import Client
from tests.support.commands import PROXY, proxy_environment
from tests.support.exchange import Exchange
from tests.support.process import RunningProxy
from tests.support.sse import sse
from tests.support.waiting import WAIT_SECONDS, Signal, wait_until

# --------------------------------------------------------------------------------------------------
# Streams, put together by hand


def chunk(delta: Any = None, **members: Any) -> bytes:
    """An event of a chat stream."""
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    return sse(
        {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": choices, **members}
    )


def words(number: int) -> bytes:
    """So many events of one token each."""
    return chunk({"content": "word"}) * number


FINISH = chunk(choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}])
DONE = sse(b"[DONE]")


def usage_event(prompt: int, completion: int) -> bytes:
    return chunk(usage={"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion})


def whole_answer(message: Any, usage: Any = None, **members: Any) -> dict[str, Any]:
    """A chat answer that is not streamed."""
    choices = [{"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop"}]
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, **members}
    return answer if usage is None else {**answer, "usage": usage}


# --------------------------------------------------------------------------------------------------
# Upstreams


@dataclass
class SendsInOneRead:
    """The whole stream in one HTTP chunk, in one write; with `before`, some of it in a chunk of its own."""

    body: bytes
    before: bytes = b""

    def __post_init__(self) -> None:
        self.resume = Signal()

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        if self.before:
            await exchange.send(self.before)
            await self.resume.happened()
        await exchange.send(self.body)
        await exchange.end()


@dataclass
class SendsEventByEvent:
    """Each piece in an HTTP chunk and a write of its own."""

    pieces: list[bytes]

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        for piece in self.pieces:
            await exchange.send(piece)
        await exchange.end()


def echo_of(exchange: Exchange) -> bytes:
    """A whole HTTP answer that repeats the user's last message; of a stream, as a stream."""
    said = "answer to " + exchange.json["messages"][-1]["content"]
    usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
    if exchange.is_stream:
        kind, body = "text/event-stream", chunk({"content": said}) + FINISH + usage_event(5, 3) + DONE
    else:
        kind, body = "application/json", json.dumps(whole_answer({"content": said}, usage)).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


class AnswersTwice:
    """Sends its answer, and at once the same answer again."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.raw(echo_of(exchange) * 2)
        exchange.complete = True


class AnswersAgainLater:
    """Sends its answer a second time when it is told to, on a connection that waits for its next request."""

    def __init__(self) -> None:
        self.again, self.sent = Signal(), Signal()

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.raw(echo_of(exchange))
        exchange.complete = True
        if not self.sent.is_set():
            await self.again.happened()
            await exchange.raw(echo_of(exchange))
            self.sent.set()


@dataclass
class SaysNothingAndBreaks:
    """200 and headers, these bytes that are no event, and the end of the connection in the middle of the answer."""

    prelude: bytes

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.send(self.prelude)


@dataclass
class SendsRaw:
    """Exactly these bytes, head and all, and the end of the connection."""

    data: bytes

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.raw(self.data)


@dataclass
class AnswersAtLength:
    """A whole answer of so many bytes of text."""

    size: int
    usage: tuple[int, int] = (5, 3)

    async def __call__(self, exchange: Exchange) -> None:
        prompt, completion = self.usage
        usage = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
        await exchange.answer(whole_answer({"content": "x" * self.size}, usage))


@dataclass
class AnswersOneChoicesUsage:
    """Several choices and the usage of one of them, as llama.cpp's whole answers say it."""

    text: str = "word" * 20
    tokens: int = 20

    async def __call__(self, exchange: Exchange) -> None:
        numbers = range(exchange.json.get("n", 1))
        message = {"role": "assistant", "content": self.text}
        choices = [{"index": n, "message": message, "finish_reason": "stop"} for n in numbers]
        usage = {"prompt_tokens": 5, "completion_tokens": self.tokens, "total_tokens": 5 + self.tokens}
        await exchange.answer({**whole_answer({}), "choices": choices, "usage": usage})


class PlainServer:
    """A server that answers GETs from a table and knows no other path (404)."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = answers.get(self.path)
                body = json.dumps({"detail": "Not Found"} if found is None else found).encode()
                self.send_response(404 if found is None else 200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(WAIT_SECONDS)


# --------------------------------------------------------------------------------------------------
# Clients that go wrong. A socket of their own: a real client's library would read.


def request_bytes(path: str, body: bytes = b"", key: str | None = None, length: int | None = None) -> bytes:
    """A request as bytes, its body perhaps announced as longer than it is."""
    authorization = f"authorization: Bearer {key}\r\n" if key else ""
    size = len(body) if length is None else length
    framing = f"content-type: application/json\r\ncontent-length: {size}\r\n" if size else ""
    method = "POST" if size else "GET"
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{authorization}{framing}\r\n".encode() + body


class RawClient:
    """A socket to the proxy."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), WAIT_SECONDS)

    def send(self, data: bytes) -> Self:
        """Send all; a proxy that hung up has answered already."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(data)
        return self

    def status(self) -> int:
        """The status of the first answer (0: the connection ended without one)."""
        self.socket.settimeout(WAIT_SECONDS)
        return int(head[9:12]) if (head := self.read_until(b"\r\n")) else 0

    def read_until(self, marker: bytes) -> bytes:
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while marker not in received and (data := self.socket.recv(65536)):
                received += data
        return received

    def read_all(self) -> bytes:
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while data := self.socket.recv(65536):
                received += data
        return received

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class NeverReads(RawClient):
    """Asks and asks, has next to no room for answers, and reads none of them."""

    def __init__(self, port: int) -> None:
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.connect(("127.0.0.1", port))

    def flood(self, data: bytes, times: int = 2000) -> None:
        """Send this until the proxy takes no more of it: for half a second nothing could be sent."""
        self.socket.setblocking(False)
        pending = data * times
        with contextlib.suppress(ConnectionError):
            while pending and select.select([], [self.socket], [], 0.5)[1]:
                with contextlib.suppress(BlockingIOError):
                    pending = pending[self.socket.send(pending[:65536]) :]


# --------------------------------------------------------------------------------------------------
# What the process looks like from outside


def memory_mb(proxy: RunningProxy, kind: str = "VmRSS") -> int:
    """Of the proxy's process, now; `VmHWM` is the most there has been since `forget_peak`."""
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    found = re.search(rf"{kind}:\s+(\d+) kB", status)
    assert found, status
    return int(found[1]) // 1024


def forget_peak(proxy: RunningProxy) -> int:
    """Start `VmHWM` anew; return what the process has now."""
    Path(f"/proc/{proxy.process.pid}/clear_refs").write_text("5")
    return memory_mb(proxy)


def sockets_of(proxy: RunningProxy) -> int:
    count = 0
    for link in Path(f"/proc/{proxy.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(link.readlink()).startswith("socket:")
    return count


# --------------------------------------------------------------------------------------------------
# A clock that is wrong

CLOCK = """
import os, time
def offset(real=open):
    with real(os.environ["CLOCK_OFFSET_FILE"]) as file:
        return int(file.read() or 0)
def ahead(of, unit):
    return lambda: of() + offset() * unit
time.time, time.time_ns = ahead(time.time, 1), ahead(time.time_ns, 10**9)
"""


class Clock:
    """The clock of a proxy's machine: starts right, may be set while the proxy runs. Only `environment` has it."""

    def __init__(self, folder: Path) -> None:
        site, self._file = folder / "clock", folder / "clock-offset"
        site.mkdir()
        (site / "sitecustomize.py").write_text(CLOCK)
        self.environment = {"PYTHONPATH": str(site), "CLOCK_OFFSET_FILE": str(self._file)}
        self.set(days=0)

    def set(self, days: float) -> None:
        fresh = self._file.with_suffix(".new")
        fresh.write_text(str(int(days * 86400)))
        fresh.rename(self._file)

    def command(self, proxy: RunningProxy, *arguments: object) -> Any:
        """A command on the same machine, so by the same clock; decoded, whatever its exit code."""
        command = [sys.executable, str(PROXY), "--config", str(proxy.config), *map(str, arguments), "--json"]
        environment = proxy_environment(self.environment)
        done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, env=environment)
        assert "Traceback" not in done.stderr, done.stderr
        return json.loads(done.stdout)


# --------------------------------------------------------------------------------------------------
# Code of our own that fails

FAILURE = """
from aiohttp import http_writer, web
real_write, real_prepare = http_writer.StreamWriter.write, web.StreamResponse.prepare
def poisoned(data):
    return b"POISON" in bytes(data)
async def write(self, chunk, *args, **kwargs):
    if poisoned(chunk):
        raise RuntimeError("a failure of our own, in a write")
    return await real_write(self, chunk, *args, **kwargs)
async def prepare(self, request):
    if "x-poison" in request.headers and self.status == 200:
        raise RuntimeError("a failure of our own, before the headers")
    return await real_prepare(self, request)
http_writer.StreamWriter.write, web.StreamResponse.prepare = write, prepare
"""


def failing_code(folder: Path) -> dict[str, str]:
    """An environment in which writing the word POISON to a client raises, and so does preparing an answer to a
    request with an `x-poison` header."""
    site = folder / "failure"
    site.mkdir()
    (site / "sitecustomize.py").write_text(FAILURE)
    return {"PYTHONPATH": str(site)}


# --------------------------------------------------------------------------------------------------
# A proxy whose standard streams go wrong


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class BareProxy:
    """`python proxy.py serve` through a shell line of the test's own; it listens on the port its config says."""

    def __init__(self, config: Path, port: int, redirections: str = "", **options: Any) -> None:
        self.config, self.port = config, port
        program = [sys.executable, str(PROXY), "--config", str(config), "serve"]
        self.process = subprocess.Popen(
            ["/bin/sh", "-c", f'exec "$0" "$@" {redirections}', *program],
            env=proxy_environment(),
            cwd=config.parent,
            **options,
        )

    def client(self, key: str | None) -> Client:
        return Client(self.port, key)

    def answers(self) -> bool:
        """It is up: /health says so."""
        with contextlib.suppress(OSError):
            return self.client(None).get("/health").status == 200
        return False

    def wait_until_up_or_over(self) -> bool:
        """True: it serves. False: it has ended."""
        wait_until(lambda: self.process.poll() is not None or self.answers(), "the proxy serves or ends")
        return self.process.poll() is None

    def end(self) -> int:
        """SIGTERM, if it runs; the exit code."""
        self.process.terminate()
        return self.process.wait(WAIT_SECONDS)


@contextlib.contextmanager
def bare_proxy(config: Path, port: int, redirections: str = "", **options: Any) -> Iterator[BareProxy]:
    proxy = BareProxy(config, port, redirections, **options)
    try:
        yield proxy
    finally:
        if proxy.process.poll() is None:
            proxy.process.kill()
            proxy.process.wait(WAIT_SECONDS)
        for stream in (proxy.process.stdout, proxy.process.stderr):
            if stream is not None:
                stream.close()


def shrink_pipe(stream: Any) -> None:
    """The smallest buffer that the kernel gives a pipe."""
    fcntl.fcntl(stream, fcntl.F_SETPIPE_SZ, 4096)


@contextlib.contextmanager
def pipe_without_reader() -> Iterator[int]:
    """The writing end of a pipe whose reader is gone."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        yield writer
    finally:
        os.close(writer)


def program(config: Path, *arguments: str, wait: float = WAIT_SECONDS, **options: Any) -> Any:
    """`python proxy.py --config FILE ARGUMENTS` with standard streams of the test's own."""
    command = [sys.executable, str(PROXY), "--config", str(config), *arguments]
    settings: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.run(command, text=True, timeout=wait, env=proxy_environment(), cwd=config.parent, **settings)
