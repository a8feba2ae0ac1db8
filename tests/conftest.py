"""Helpers of the tests: a scripted upstream, the real proxy process, funded accounts, a plain HTTP client.

The proxy under test is always `python proxy.py`, a process of its own, reached over sockets; the upstreams
are real servers in a thread of their own, so that a test may be written with or without asyncio. Nothing here
looks inside proxy.py.

    def test_something(proxy, upstream, funded_key):  # one proxy for the whole run, its scripted upstream
        account = funded_key(credits=100)
        upstream.behaviour = Answers(tokens=3)
        answer = proxy.client(account.key).chat()
        assert_books(proxy, account, credits=100 - 8)

    def test_another(running_proxy):  # a proxy with a configuration, or a fate, of its own
        proxy = running_proxy(options={"max_body_mb": 1})
"""

import asyncio
import contextlib
import gzip
import http.client
import itertools
import json
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import date, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import pytest
import yaml
from openai import AsyncOpenAI, OpenAI

REPOSITORY = Path(__file__).resolve().parent.parent
PROXY = REPOSITORY / "proxy.py"
WAIT_SECONDS = 20.0  # how long anything may take that must happen; a test that waits this long fails
CLOSED_SECONDS = 3.0  # "the upstream is closed within a second", on a busy machine
UPSTREAM_KEY = "upstream-secret-key"
QUESTION = "Say three words"  # 15 bytes: the estimate E of this prompt is ceil(15 / 4 + 4) = 8
QUESTION_ESTIMATE = 8


# --------------------------------------------------------------------------------------------------
# Waiting


class Signal:
    """Something that happens once: set in any thread, waited for in a test or inside any event loop."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()

    def set(self) -> None:
        with contextlib.suppress(Exception):
            self._future.set_result(None)

    def is_set(self) -> bool:
        return self._future.done()

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait in a test; a TimeoutError is a failed test."""
        self._future.result(seconds)

    async def happened(self) -> None:
        """Wait in an event loop."""
        await asyncio.shield(asyncio.wrap_future(self._future))


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.02)
    return answer


def milli(credits_: float) -> int:
    """Credits as the integer of thousandths that the books hold."""
    return round(credits_ * 1000)


# --------------------------------------------------------------------------------------------------
# Server-sent events


def split_events(body: bytes) -> list[bytes]:
    """The events of a body, each with its line ends, for any of the three line ends."""
    return [match.group() for match in re.finditer(rb".+?(?:\r\n\r\n|\n\n|\r\r|\Z)", body, re.DOTALL)]


def event_data(event: bytes) -> Any:
    """What an event carries: decoded JSON, `"[DONE]"`, or None for a comment."""
    lines = [line[5:].strip() for line in re.split(rb"\r\n|\n|\r", event) if line.startswith(b"data:")]
    if not lines:
        return None
    data = b"\n".join(lines)
    return "[DONE]" if data == b"[DONE]" else json.loads(data)


def sse(data: Any, newline: bytes = b"\n") -> bytes:
    encoded = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    return b"data: " + encoded + newline * 2


# --------------------------------------------------------------------------------------------------
# The scripted upstream

Behaviour = Callable[["Exchange"], Awaitable[None]]


class NotingReader(asyncio.StreamReader):
    """Notes that the peer went away, also while nobody reads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.gone = asyncio.Event()
        self.on_gone: Callable[[], None] = lambda: None

    def _note(self) -> None:
        self.gone.set()
        self.on_gone()

    def feed_eof(self) -> None:
        self._note()
        super().feed_eof()

    def set_exception(self, exc: BaseException) -> None:
        self._note()
        super().set_exception(exc)


class Exchange:
    """One request as the upstream got it, and the means to answer it, well or badly."""

    def __init__(self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes):
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.sent = bytearray()  # the body that was sent, without HTTP's own framing
        self.closed = Signal()  # the proxy closed the connection
        self.finished = Signal()  # the script ended, or was cut off
        self.complete = False  # the answer ended as HTTP says: the connection may be used again
        self._writer = writer
        self._chunked = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_stream(self) -> bool:
        return bool(self.json.get("stream"))

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(
        self,
        status: int = 200,
        content_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        """Send status and headers: with a length if one is given, else chunked."""
        self._chunked = length is None
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"content-type: {content_type}", framing]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        """Send a piece of the body, in one HTTP chunk."""
        self.sent += data
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    async def end(self) -> None:
        if self._chunked:
            await self.raw(b"0\r\n\r\n")
        self.complete = True

    async def answer(
        self,
        body: Any,
        status: int = 200,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A whole answer at once."""
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.head(status, content_type, headers, length=len(encoded))
        await self.send(encoded)
        await self.end()

    async def stall(self) -> None:
        """Say nothing more, for ever, and keep the connection open."""
        await asyncio.Event().wait()

    def reset(self) -> None:
        """Break the connection with a TCP reset."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


class LoopThread:
    """An event loop in a thread of its own, for servers that outlive a test's loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="upstreams", daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_SECONDS)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_SECONDS)
        self.loop.close()


class FakeUpstream:
    """A real HTTP server on 127.0.0.1 that does what its `behaviour` says, and remembers every request."""

    def __init__(self, thread: LoopThread, behaviour: Behaviour | None = None) -> None:
        self.behaviour: Behaviour = behaviour or Answers()
        self.exchanges: list[Exchange] = []
        self.errors: list[BaseException] = []
        self._arrivals: queue.Queue[Exchange] = queue.Queue()
        self._thread = thread
        self._connections: set[asyncio.Task[None]] = set()
        thread.run(self._listen())

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(NotingReader(loop), self._connected, loop=loop)

        self._server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reset(self, behaviour: Behaviour | None = None) -> None:
        """Forget what was, as a test begins."""
        self.behaviour = behaviour or Answers()
        self.exchanges, self.errors, self._arrivals = [], [], queue.Queue()

    def next_exchange(self, seconds: float = WAIT_SECONDS) -> Exchange:
        """The next request, as soon as it is here (a start-up probe's GET is no request)."""
        while True:
            exchange = self._arrivals.get(timeout=seconds)
            if exchange.method == "POST":
                return exchange

    @property
    def posts(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.method == "POST"]

    def close(self) -> None:
        self._thread.run(self._close())

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: NotingReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (exchange := await self._read_request(reader, writer)) is not None:
                await self._play(exchange, reader)
                if not exchange.complete:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _read_request(self, reader: NotingReader, writer: asyncio.StreamWriter) -> Exchange | None:
        head = await reader.readuntil(b"\r\n\r\n")
        request_line, *header_lines = head.decode("latin-1").rstrip().split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in header_lines)}
        body = bytearray()
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            body += await reader.readexactly(int(headers.get("content-length", 0)))
        return Exchange(writer, method, path, headers, bytes(body))

    async def _play(self, exchange: Exchange, reader: NotingReader) -> None:
        """Run the script until it ends or the proxy closes the connection."""
        reader.on_gone = exchange.closed.set
        if reader.gone.is_set():
            exchange.closed.set()
        self.exchanges.append(exchange)
        self._arrivals.put(exchange)
        behaviour = self.behaviour if exchange.method == "POST" else answers_probe
        script = asyncio.ensure_future(behaviour(exchange))
        gone = asyncio.ensure_future(reader.gone.wait())
        try:
            await asyncio.wait({script, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            script.cancel()
            gone.cancel()
            ended, _ = await asyncio.gather(script, gone, return_exceptions=True)
            exchange.finished.set()
            if isinstance(ended, Exception) and not isinstance(ended, ConnectionError):
                self.errors.append(ended)


async def answers_probe(exchange: Exchange) -> None:
    """What a server says to GET /v1/models."""
    await exchange.answer({"object": "list", "data": []})


# --------------------------------------------------------------------------------------------------
# Behaviours of an upstream. The first one is what every server should do.


@dataclass
class Answers:
    """A server as it should be: honours the model, `stream`, `include_usage`, the maximum and `n`."""

    tokens: int = 3  # a choice, if the maximum allows as many
    word: str = "word"  # the text of a token: 4 bytes, so that estimates count tokens
    prompt_tokens: int = 5
    usage: str = "closing"  # where usage goes in a stream: closing, finish, every, each_choice, none
    unasked: bool = False  # sends usage in streams even if nobody asked (llama.cpp's /completions)
    usage_details: dict[str, Any] = field(default_factory=dict)
    newline: bytes = b"\n"
    piece_bytes: int | None = None  # the body in HTTP chunks of this many bytes; None: an event a chunk
    honours_maximum: bool = True
    pause_after: int | None = None  # wait for `resume` when this many tokens went out
    headers: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reached, self.resume = Signal(), Signal()

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.path.endswith("/embeddings"):
            await exchange.answer(self.embedding(exchange.json), headers=self.headers)
        elif not exchange.is_stream:
            await self.pause(0)
            await exchange.answer(self.whole(exchange), headers=self.headers)
        else:
            await exchange.head(headers=self.headers)
            await self.send_tokens(exchange)
            await self.send_closing(exchange)
            await exchange.end()

    async def pause(self, sent: int) -> None:
        if self.pause_after == sent:
            self.reached.set()
            await self.resume.happened()

    async def send_tokens(self, exchange: Exchange) -> None:
        """The events up to the last token."""
        await self.send(exchange, self.opening(exchange))
        await self.pause(0)
        for number in range(1, self.count(exchange.json) + 1):
            await self.send(exchange, self.token(exchange))
            await self.pause(number)

    async def send_closing(self, exchange: Exchange) -> None:
        """What follows the last token: finish reasons, usage, [DONE]."""
        await self.send(exchange, self.finish(exchange))
        await self.send(exchange, self.closing_usage(exchange))
        await self.send(exchange, sse(b"[DONE]", self.newline))

    async def send(self, exchange: Exchange, data: bytes) -> None:
        size = self.piece_bytes or len(data) or 1
        for start in range(0, len(data), size):
            await exchange.send(data[start : start + size])

    def choices(self, request: dict[str, Any]) -> int:
        return request.get("n") or 1

    def count(self, request: dict[str, Any]) -> int:
        """Tokens a choice."""
        maxima = [request[name] for name in ("max_tokens", "max_completion_tokens") if request.get(name) is not None]
        return min([self.tokens, *maxima]) if self.honours_maximum else self.tokens

    def usage_of(self, request: dict[str, Any], choices: int | None = None) -> dict[str, Any]:
        completion = self.count(request) * (self.choices(request) if choices is None else choices)
        total = self.prompt_tokens + completion
        usage = {"prompt_tokens": self.prompt_tokens, "completion_tokens": completion, "total_tokens": total}
        return {**usage, **self.usage_details}

    def wants_usage(self, request: dict[str, Any]) -> bool:
        return self.unasked or bool((request.get("stream_options") or {}).get("include_usage"))

    def event(self, exchange: Exchange, choices: list[dict[str, Any]], **members: Any) -> bytes:
        kind = "chat.completion.chunk" if "chat" in exchange.path else "text_completion"
        request = exchange.json
        data = {
            "id": "x-1",
            "object": kind,
            "created": 1,
            "model": request["model"],
            "choices": choices,
            **members,
        }
        if self.usage == "every" and self.wants_usage(request):
            data.setdefault("usage", self.usage_of(request))
        return sse(data, self.newline)

    def opening(self, exchange: Exchange) -> bytes:
        if "chat" not in exchange.path:
            return b""
        delta = {"role": "assistant", "content": ""}
        numbers = range(self.choices(exchange.json))
        return b"".join(self.event(exchange, [{"index": n, "delta": delta, "finish_reason": None}]) for n in numbers)

    def token(self, exchange: Exchange) -> bytes:
        """One token of each choice."""
        text = {"delta": {"content": self.word}} if "chat" in exchange.path else {"text": self.word, "logprobs": None}
        numbers = range(self.choices(exchange.json))
        return b"".join(self.event(exchange, [{"index": n, **text, "finish_reason": None}]) for n in numbers)

    def finish(self, exchange: Exchange) -> bytes:
        request = exchange.json
        reason = "stop" if self.count(request) == self.tokens else "length"
        text: dict[str, Any] = {"delta": {}} if "chat" in exchange.path else {"text": "", "logprobs": None}
        members = {}
        if self.usage == "finish" and self.wants_usage(request):
            members["usage"] = self.usage_of(request)
        numbers = range(self.choices(request))
        return b"".join(
            self.event(exchange, [{"index": n, **text, "finish_reason": reason}], **members) for n in numbers
        )

    def closing_usage(self, exchange: Exchange) -> bytes:
        request = exchange.json
        if not self.wants_usage(request) or self.usage not in ("closing", "each_choice"):
            return b""
        if self.usage == "each_choice":
            one = self.event(exchange, [], usage=self.usage_of(request, choices=1))
            return one * self.choices(request)
        return self.event(exchange, [], usage=self.usage_of(request))

    def whole(self, exchange: Exchange) -> dict[str, Any]:
        request = exchange.json
        text = self.word * self.count(request)
        reason = "stop" if self.count(request) == self.tokens else "length"
        chat = "chat" in exchange.path
        said: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        choices = [{"index": n, **said, "finish_reason": reason} for n in range(self.choices(request))]
        kind = "chat.completion" if chat else "text_completion"
        answer = {"id": "x-1", "object": kind, "created": 1, "model": request["model"], "choices": choices}
        return answer if self.usage == "none" else {**answer, "usage": self.usage_of(request)}

    def embedding(self, request: dict[str, Any]) -> dict[str, Any]:
        inputs = request["input"] if isinstance(request["input"], list) else [request["input"]]
        data = [{"object": "embedding", "index": n, "embedding": [0.25, 0.5]} for n in range(len(inputs))]
        usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
        return {"object": "list", "data": data, "model": request["model"], "usage": usage}


@dataclass
class SendsEvents:
    """Sends exactly these bytes as a stream, and ends it cleanly."""

    body: bytes
    piece_bytes: int | None = None
    content_type: str = "text/event-stream"

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head(content_type=self.content_type)
        size = self.piece_bytes or len(self.body) or 1
        for start in range(0, len(self.body), size):
            await exchange.send(self.body[start : start + size])
        await exchange.end()


@dataclass
class Fails:
    """Answers with this status and body."""

    status: int
    body: Any = field(default_factory=lambda: {"error": {"message": "the upstream says no", "type": "oops"}})
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.answer(self.body, self.status, self.content_type, self.headers)


class RefusesConnections:
    """No behaviour but an address: nothing listens there, and nothing else can take the port."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        self._socket.close()


class ResetsBeforeHeaders:
    """Reads the request and breaks the connection."""

    async def __call__(self, exchange: Exchange) -> None:
        exchange.reset()


class ClosesBeforeHeaders:
    """Reads the request and hangs up politely, as a pooled connection does that died in its sleep."""

    def __init__(self, times: int | None = None) -> None:
        self.times = times  # None: always

    async def __call__(self, exchange: Exchange) -> None:
        if self.times == 0:
            await Answers()(exchange)
        elif self.times is not None:
            self.times -= 1


class SpeaksNoHttp:
    """Answers with bytes that are not HTTP."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.raw(b"\x00\x01\x02 this is not HTTP\r\n\r\n")


class StallsBeforeHeaders:
    """Takes the request and says nothing."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.stall()


class StallsBeforeFirstByte:
    """Sends 200 and headers at once, as real servers do, and then no body."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head(content_type="text/event-stream" if exchange.is_stream else "application/json")
        await exchange.stall()


@dataclass
class StallsMidStream:
    """Some tokens, then silence with the connection open."""

    tokens: int = 2

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await Answers(tokens=self.tokens).send_tokens(exchange)
        await exchange.stall()


@dataclass
class BreaksBeforeFirstEvent:
    """200, headers, half of the first event, reset."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.send(Answers().token(exchange)[:20])
        exchange.reset()


@dataclass
class BreaksMidEvent:
    """Some tokens, half of the next, then the connection ends without HTTP's end."""

    tokens: int = 2

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await Answers(tokens=self.tokens).send_tokens(exchange)
        await exchange.send(Answers().token(exchange)[:-20])


@dataclass
class BreaksBetweenEvents:
    """Some tokens, then the connection ends without HTTP's end."""

    tokens: int = 2

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await Answers(tokens=self.tokens).send_tokens(exchange)


@dataclass
class EndsWithoutDone:
    """Everything but [DONE], and a clean end."""

    tokens: int = 3

    async def __call__(self, exchange: Exchange) -> None:
        answers = Answers(tokens=self.tokens)
        await exchange.head()
        await answers.send_tokens(exchange)
        await exchange.send(answers.finish(exchange) + answers.closing_usage(exchange))
        await exchange.end()


@dataclass
class EndsInMidAir:
    """Some tokens and a clean end: neither a finish reason nor usage nor [DONE]."""

    tokens: int = 2

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await Answers(tokens=self.tokens).send_tokens(exchange)
        await exchange.end()


class EmptyBody:
    """200, headers, and a clean end at once."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.end()


@dataclass
class ErrorEventThenDone:
    """What vLLM does when its engine dies: an error event, then [DONE] and a clean end."""

    tokens: int = 2
    error: bytes = sse({"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError"}})

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await Answers(tokens=self.tokens).send_tokens(exchange)
        await exchange.send(self.error + sse(b"[DONE]"))
        await exchange.end()


class SendsGarbage:
    """A stream of events that are no JSON, and a clean end."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.send(b"data: {\xff\xfe not json\n\nbla bla\n\ndata: 7\n\n")
        await exchange.end()


class WrongContentLength:
    """Promises more bytes than it sends."""

    async def __call__(self, exchange: Exchange) -> None:
        answers = Answers()
        body = answers.token(exchange) if exchange.is_stream else json.dumps(answers.whole(exchange)).encode()
        kind = "text/event-stream" if exchange.is_stream else "application/json"
        await exchange.head(content_type=kind, length=len(body) + 100)
        await exchange.send(body)


class AnswersJsonToAStream:
    """Ignores `stream: true`."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.answer(Answers().whole(exchange))


class SendsGzip:
    """Compresses though told not to."""

    async def __call__(self, exchange: Exchange) -> None:
        answers = Answers()
        if not exchange.is_stream:
            body = gzip.compress(json.dumps(answers.whole(exchange)).encode())
            await exchange.answer(body, headers={"content-encoding": "gzip"})
            return
        tokens = answers.token(exchange) * answers.tokens
        plain = answers.opening(exchange) + tokens + answers.finish(exchange) + answers.closing_usage(exchange)
        body = gzip.compress(plain + sse(b"[DONE]"))
        await exchange.head(headers={"content-encoding": "gzip"})
        await exchange.send(body)
        await exchange.end()


# --------------------------------------------------------------------------------------------------
# A client that sees the wire


@dataclass
class Response:
    """An answer that was read to its end, clean or not."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    clean: bool  # ended as HTTP says; False: the connection broke off

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json()["error"]
        assert isinstance(error, dict), self.body
        return error

    @property
    def events(self) -> list[bytes]:
        return split_events(self.body)

    @property
    def chunks(self) -> list[Any]:
        """What the events carry, without comments."""
        return [data for data in map(event_data, self.events) if data is not None]

    @property
    def words(self) -> int:
        """Events that bear text."""
        return count_words(self.chunks)


def count_words(chunks: list[Any]) -> int:
    choices = [choice for chunk in chunks if isinstance(chunk, dict) for choice in chunk.get("choices") or []]
    return sum(1 for choice in choices if choice.get("text") or choice.get("delta", {}).get("content"))


class Pending:
    """A request that was sent and is not answered yet."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def leave(self) -> None:
        """Hang up."""
        self._connection.close()

    def answered(self) -> "Stream":
        """Wait for status and headers."""
        try:
            return Stream(self._connection, self._connection.getresponse())
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Stream:
    """An answer that is read as it comes."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.status, self.headers = response.status, response.headers
        self.received = bytearray()
        self.clean: bool | None = None  # known once the end was reached

    def read_some(self) -> bool:
        """Read what is there, at least a byte; False at the end."""
        try:
            data = self._response.read1(65536)
        except (http.client.IncompleteRead, ConnectionError):
            self.clean = False
            return False
        self.received += data
        if not data:
            self.clean = self.clean is None and not (self._response.length or 0)
        return bool(data)

    def read_until(self, marker: bytes, times: int = 1) -> bytes:
        """Read until the marker has come this many times."""
        while self.received.count(marker) < times:
            assert self.read_some(), f"ended before {marker!r}: {bytes(self.received)!r}"
        return bytes(self.received)

    def finish(self) -> Response:
        """Read the rest."""
        while self.read_some():
            pass
        self.leave()
        return Response(self.status, self.headers, bytes(self.received), bool(self.clean))

    def leave(self) -> None:
        """Hang up."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Client:
    """Speaks to the proxy with a key (None: without one); a connection a request."""

    def __init__(self, port: int, key: str | None) -> None:
        self.port, self.key = port, key

    def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Pending:
        """Send a request: a body of bytes as it is, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        sent = {"content-type": "application/json"} if body is not None else {}
        if self.key is not None:
            sent["authorization"] = f"Bearer {self.key}"
        encoded = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, encoded, {**sent, **(headers or {})})
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before the whole body was sent; the answer may still be there
        except BaseException:
            connection.close()
            raise
        return Pending(connection)

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Response:
        return self.send(method, path, body, headers).answered().finish()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        return self.request("GET", path, None, headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Response:
        return self.request("POST", path, body, headers)

    def chat(self, content: str = QUESTION, model: str = "plain", **members: Any) -> Response:
        return self.post("/v1/chat/completions", chat_request(content, model, **members))

    def completion(self, prompt: Any = QUESTION, model: str = "plain", **members: Any) -> Response:
        return self.post("/v1/completions", {"model": model, "prompt": prompt, **members})

    def start_chat(self, content: str = QUESTION, model: str = "plain", **members: Any) -> Pending:
        return self.send("POST", "/v1/chat/completions", chat_request(content, model, **members))

    def stream_chat(self, content: str = QUESTION, model: str = "plain", **members: Any) -> Stream:
        """Start a streamed chat; returns when its status is here."""
        return self.start_chat(content, model, stream=True, **members).answered()

    @property
    def balance(self) -> float:
        """The credits, as the API shows them."""
        credits_ = self.get("/api/billing/subscription").json()["credits"]
        assert isinstance(credits_, int | float)
        return credits_


def chat_request(content: str = QUESTION, model: str = "plain", **members: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **members}


# --------------------------------------------------------------------------------------------------
# Commands. One process that has imported proxy.py runs them all, as `python proxy.py ARGUMENTS` would: the tests run
# hundreds, and a start takes a hundred times longer than what most of them do.

COMMAND_SERVER = """
import json, os, sys, traceback
sys.path[0] = sys.argv[1]
import proxy
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    order = json.loads(line)
    for number, name in ((1, order["stdout"]), (2, order["stderr"])):
        output = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(output, number)
        os.close(output)
    sys.argv = ["proxy.py", *order["arguments"]]
    status = 1
    try:
        status = proxy.main() or 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    print(status, file=answers, flush=True)
"""


class CommandServer:
    """Runs `proxy.py ARGUMENTS`, quickly."""

    def __init__(self, folder: Path) -> None:
        self._outputs = (folder / "command.out", folder / "command.err")
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-c", COMMAND_SERVER, str(REPOSITORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean_environment(),
        )

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            stdout, stderr = self._outputs
            order = {"arguments": arguments, "stdout": str(stdout), "stderr": str(stderr)}
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            code = int(self._process.stdout.readline())
            return subprocess.CompletedProcess(list(arguments), code, stdout.read_text(), stderr.read_text())

    def stop(self) -> None:
        self._process.communicate(timeout=WAIT_SECONDS)


def clean_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of this machine's user must not decide a test."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR", "VIRTUAL_ENV") if name in os.environ}
    return {**kept, **(extra or {})}


def run_program(config: Path, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """`python proxy.py --config FILE ARGUMENTS`, to its end, exactly as a user runs it."""
    command = [sys.executable, str(PROXY), "--config", str(config), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=WAIT_SECONDS,
        env=clean_environment(environment),
        cwd=config.parent,
    )


# --------------------------------------------------------------------------------------------------
# Files

TODAY = date.today()

TIERS: dict[str, Any] = {
    "unlimited": {},
    "two-a-minute": {"requests_per_minute": 2},
    "hundred-a-minute": {"requests_per_minute": 100},
    "one-at-a-time": {"parallel": 1},
    "two-keys": {"keys": 2},
}

MODELS: dict[str, Any] = {
    "echo": {"tier": "one", "upstream": "echo"},
    "plain": {"tier": "one", "upstream": "main"},
    "half": {"tier": "half", "upstream": "main"},
    "mid": {"tier": "mid", "upstream": "main"},
    "dear": {"tier": "dear", "upstream": "main"},
    "gratis": {"tier": "one", "multiplier": 0, "upstream": "main"},
    "thousandth": {"tier": "one", "multiplier": 0.001, "upstream": "main"},
    "windowed": {"tier": "one", "upstream": "main", "context_window": 4096},
    "capped": {"tier": "one", "upstream": "main", "max_output_tokens": 100},
    "embedder": {"tier": "half", "upstream": "main", "kind": "embedding"},
    "vendor/named:7b": {
        "tier": "mid",
        "upstream": "main",
        "aliases": ["nickname"],
        "kind": "code",
        "created": 1700000000,
    },
    "renamed": {"tier": "one", "upstream": "main", "upstream_model": "real-name:latest"},
    "impatient": {"tier": "one", "upstream": "impatient"},
    "impatient-pair": {"tier": "one", "upstream": ["impatient", "backup"]},
    "silent": {"tier": "one", "upstream": "silent"},
    "pair": {"tier": "one", "upstream": ["main", "backup"]},
    "absent": {"tier": "one", "upstream": "absent"},
    "absent-pair": {"tier": "one", "upstream": ["absent", "backup"]},
    "off": {"tier": "one", "upstream": "off"},
    "retiring": {
        "tier": "one",
        "upstream": "main",
        "deprecated": {
            "announced": TODAY - timedelta(days=10),
            "sunset": TODAY + timedelta(days=50),
            "replacement": "plain",
        },
    },
    "retired": {
        "tier": "one",
        "upstream": "main",
        "deprecated": {
            "announced": TODAY - timedelta(days=90),
            "sunset": TODAY - timedelta(days=1),
            "replacement": "plain",
        },
    },
    "announced-later": {
        "tier": "one",
        "upstream": "main",
        "deprecated": {
            "announced": TODAY + timedelta(days=10),
            "sunset": TODAY + timedelta(days=90),
            "replacement": "plain",
        },
    },
}

MODEL_TIERS: dict[str, Any] = {
    "half": {"multiplier": 0.5, "title": "Half"},
    "one": {"multiplier": 1.0, "title": "One"},
    "mid": {"multiplier": 1.5, "title": "Mid"},
    "dear": {"multiplier": 3.5, "title": "Dear"},
}

OPTIONS: dict[str, Any] = {
    "listen": "127.0.0.1:0",
    "database": "proxy.db",
    "models": "models.yaml",
    "free_credits": {"amount": 0, "days": 30},
    "default_tier": "unlimited",
    "hold_output_tokens": 100,
    "drain_seconds": 5,
    "tiers": TIERS,
}


def catalog(models: Mapping[str, Any]) -> dict[str, Any]:
    return {"owned_by": "tests", "tiers": MODEL_TIERS, "models": dict(models)}


def write_yaml(path: Path, content: Any) -> None:
    path.write_text(
        content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    )


def write_files(folder: Path, options: Mapping[str, Any], models: Mapping[str, Any]) -> Path:
    """Write both files, models only if their upstreams are there; return the path of config.yaml."""
    known = options["upstreams"]

    def usable(model: dict[str, Any]) -> bool:
        names = model["upstream"] if isinstance(model["upstream"], list) else [model["upstream"]]
        return all(name in known for name in names)

    write_yaml(folder / "config.yaml", dict(options))
    write_yaml(folder / "models.yaml", catalog({name: m for name, m in models.items() if usable(m)}))
    return folder / "config.yaml"


# --------------------------------------------------------------------------------------------------
# The proxy


@dataclass
class Account:
    """Somebody who may use the proxy."""

    name: str
    key: str
    key_id: Any
    credits: float


class RunningProxy:
    """`python proxy.py serve` on files of its own: a test may ask, stop, kill and start it again."""

    def __init__(
        self,
        config: Path,
        commands: CommandServer,
        upstream: FakeUpstream,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.commands, self.upstream = config, commands, upstream
        self.environment = dict(environment or {})
        self.lines: list[str] = []  # of both outputs, of every start
        self.stdout_lines: list[str] = []
        self.port = 0
        self._names = itertools.count(1)
        self._readers: list[threading.Thread] = []
        self._dead_on_purpose = False
        self._seen = 0  # lines that assert_well has looked at

    # -- the process

    def start(self) -> Self:
        self._dead_on_purpose = False
        lines_before = len(self.stdout_lines)
        command = [sys.executable, str(PROXY), "--config", str(self.config), "serve"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=clean_environment(self.environment),
            cwd=self.config.parent,
        )
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(stream,), daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()

        def listening() -> re.Match[str] | None:
            if self.process.poll() is not None:
                pytest.fail(f"proxy.py ended with {self.process.returncode} at start:\n{self.output}")
            found = (re.search(r"listening on http://[^ :]+:(\d+)", line) for line in self.stdout_lines[lines_before:])
            return next(filter(None, found), None)

        self.port = int(wait_until(listening, "the line `listening on http://HOST:PORT`").group(1))
        return self

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                if stream is self.process.stdout:
                    self.stdout_lines.append(line.rstrip("\n"))
                self.lines.append(line.rstrip("\n"))

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the end of the process; return its exit code (minus the signal that killed it)."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(WAIT_SECONDS)
        self._dead_on_purpose = True
        return code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def terminate(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> int:
        self.signal(signal.SIGKILL)
        return self.wait()

    def restart(self) -> Self:
        """Stop it, if it runs, and start it again on the same files (on another port)."""
        if self.process.poll() is None:
            assert self.terminate() == 0, self.output
        return self.start()

    def assert_well(self) -> None:
        """It runs, unless the test ended it, and printed no traceback since the last time somebody asked."""
        fresh, self._seen = self.lines[self._seen :], len(self.lines)
        tracebacks = [number for number, line in enumerate(fresh) if line.startswith("Traceback (most recent call")]
        if tracebacks:
            pytest.fail("proxy.py printed a traceback:\n" + "\n".join(fresh[max(0, tracebacks[0] - 3) :][:60]))
        assert self._dead_on_purpose or self.process.poll() is None, f"proxy.py died:\n{self.output}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.assert_well()
            assert self.terminate() == 0, self.output
        elif not self._dead_on_purpose:
            self.wait()
            pytest.fail(f"proxy.py died with {self.process.returncode}:\n{self.output}")
        self.assert_well()

    # -- what it says

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str, after: int = 0) -> str:
        """A line of output that matches, the first `after` lines not counted."""

        def found() -> str | None:
            return next((line for line in self.lines[after:] if re.search(pattern, line)), None)

        return str(wait_until(found, f"a line like {pattern!r} in:\n{self.output}"))

    # -- the ways to talk to it

    @property
    def folder(self) -> Path:
        return self.config.parent

    @property
    def database(self) -> Path:
        return self.folder / "proxy.db"

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None) -> Client:
        return Client(self.port, key)

    def openai(self, key: str, **options: Any) -> OpenAI:
        """The official client; `with` closes it."""
        return OpenAI(base_url=f"{self.base_url}/v1", api_key=key, max_retries=0, timeout=WAIT_SECONDS, **options)

    def async_openai(self, key: str, **options: Any) -> AsyncOpenAI:
        base_url = f"{self.base_url}/v1"
        return AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=WAIT_SECONDS, **options)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command on the same files, with its exit code and outputs."""
        return self.commands.run("--config", str(self.config), *map(str, arguments))

    def command(self, *arguments: object) -> Any:
        """A command that must succeed, with --json, decoded."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def audit(self) -> dict[str, Any]:
        audit = self.command("audit")
        assert isinstance(audit, dict)
        return audit

    def account(self, name: str) -> dict[str, Any]:
        shown = self.command("account", "show", name)
        assert isinstance(shown, dict)
        return shown

    def add_account(self, credits_: float = 100.0, tier: str | None = None, name: str | None = None) -> Account:
        name = name or f"user-{next(self._names)}"
        options: list[object] = (
            ["--credits", f"{credits_:g}" if credits_ < 1e6 else str(int(credits_))] if credits_ else []
        )
        options += ["--tier", tier] if tier else []
        made = self.command("account", "add", name, *options)
        return Account(name, made["key"], made["key_id"], made["credits"])

    def wait_until_settled(self, account: Account) -> dict[str, Any]:
        """The account, as soon as nothing of it is held."""
        what = f"the holds of {account.name} resolve"
        return dict(wait_until(lambda: (s := self.account(account.name))["held"] == 0 and s, what))


def assert_books(proxy: RunningProxy, account: Account, credits: float, held: float = 0.0) -> None:
    """The account has exactly these credits and holds, and the books of the whole database add up."""
    shown = proxy.account(account.name)
    assert (milli(shown["credits"]), milli(shown["held"])) == (milli(credits), milli(held)), shown
    assert milli(shown["free"]) + milli(shown["paid"]) == milli(shown["credits"]), shown
    assert_audit(proxy)


def assert_audit(proxy: RunningProxy) -> dict[str, Any]:
    """`audit` passes, and its totals do add up."""
    audit = proxy.audit()
    assert audit["ok"] is True, audit
    grants, lapsed, charges = (milli(audit[name]) for name in ("grants", "lapsed", "charges"))
    assert grants - lapsed - charges == milli(audit["balances"]), audit
    return audit


def assert_error(answer: Response, status: int, code: str, type_: str | None = None) -> dict[str, Any]:
    """An answer in the one error shape."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"].startswith("application/json"), answer.headers.as_string()
    assert answer.headers["x-request-id"], answer.headers.as_string()
    error = answer.error
    assert set(error) >= {"message", "type", "param", "code", "status"}, error
    assert (error["code"], error["status"]) == (code, status), error
    assert isinstance(error["message"], str) and error["message"], error
    assert type_ is None or error["type"] == type_, error
    return error


def error_frame(answer: Response) -> dict[str, Any]:
    """The error event that ends a broken stream: last, whole, no [DONE], no clean end after it."""
    last = event_data(answer.events[-1])
    assert isinstance(last, dict) and isinstance(last.get("error"), dict), answer.body[-500:]
    assert b"[DONE]" not in answer.body, answer.body[-500:]
    assert not answer.clean, "a broken stream must not end cleanly"
    error = last["error"]
    assert set(error) >= {"message", "type", "param", "code", "status"}, error
    return dict(error)


# --------------------------------------------------------------------------------------------------
# Fixtures


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    server = CommandServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.stop()


@contextlib.contextmanager
def upstreams(thread: LoopThread) -> Iterator[Callable[..., FakeUpstream]]:
    made: list[FakeUpstream] = []

    def make(behaviour: Behaviour | None = None) -> FakeUpstream:
        made.append(FakeUpstream(thread, behaviour))
        return made[-1]

    yield make
    for server in made:
        server.close()
        assert not server.errors, server.errors


@contextlib.contextmanager
def proxies(
    folder: Path, commands: CommandServer, make_upstream: Callable[..., FakeUpstream]
) -> Iterator[Callable[..., RunningProxy]]:
    """Starts proxies: `options` are laid over OPTIONS, `models` over MODELS, `upstreams` over `main`
    (`proxy.upstream`, scripted) and `echo`. Asserts that each ended well, with no traceback."""
    started: list[RunningProxy] = []

    def start(
        options: Mapping[str, Any] | None = None,
        models: Mapping[str, Any] | None = None,
        upstreams: Mapping[str, Any] | None = None,
        behaviour: Behaviour | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> RunningProxy:
        upstream = make_upstream(behaviour)
        home = folder / f"proxy-{len(started)}"
        home.mkdir()
        doors = {"echo": {"builtin": "echo"}, "main": {"base_url": upstream.url}, **(upstreams or {})}
        config = write_files(home, {**OPTIONS, "upstreams": doors, **(options or {})}, {**MODELS, **(models or {})})
        proxy = RunningProxy(config, commands, upstream, environment)
        started.append(proxy)
        return proxy.start()

    try:
        yield start
        for proxy in started:
            proxy.close()
    finally:
        for proxy in started:
            if proxy.process.poll() is None:
                proxy.kill()


@pytest.fixture
def fake_upstream(loop_thread: LoopThread) -> Iterator[Callable[..., FakeUpstream]]:
    """Makes upstreams of a test's own."""
    with upstreams(loop_thread) as make:
        yield make


@pytest.fixture
def running_proxy(
    tmp_path: Path, commands: CommandServer, fake_upstream: Callable[..., FakeUpstream]
) -> Iterator[Callable[..., RunningProxy]]:
    """Starts proxies of a test's own: see `proxies`."""
    with proxies(tmp_path, commands, fake_upstream) as start:
        yield start


@pytest.fixture(scope="module")
def module_proxy(
    tmp_path_factory: pytest.TempPathFactory, commands: CommandServer, loop_thread: LoopThread
) -> Iterator[Callable[..., RunningProxy]]:
    """Starts proxies that the tests of a module share: see `proxies`."""
    with upstreams(loop_thread) as make, proxies(tmp_path_factory.mktemp("module"), commands, make) as start:
        yield start


@dataclass
class Shared:
    """The proxy that most tests share, and its upstreams."""

    proxy: RunningProxy
    main: FakeUpstream
    backup: FakeUpstream


@pytest.fixture(scope="session")
def shared(
    tmp_path_factory: pytest.TempPathFactory, loop_thread: LoopThread, commands: CommandServer
) -> Iterator[Shared]:
    main, backup, nobody = FakeUpstream(loop_thread), FakeUpstream(loop_thread), RefusesConnections()
    upstreams = {
        "echo": {"builtin": "echo"},
        "main": {"base_url": main.url, "api_key": UPSTREAM_KEY, "headers": {"x-team": "blue"}},
        "backup": {"base_url": backup.url},
        "impatient": {"base_url": main.url, "first_byte_seconds": 1, "idle_seconds": 1},
        "silent": {"base_url": main.url, "usage_in_stream": "never"},
        "absent": {"base_url": nobody.url},
        "off": {"base_url": main.url, "api_key": "${SURELY_UNSET_VARIABLE}"},
    }
    config = write_files(tmp_path_factory.mktemp("shared"), {**OPTIONS, "upstreams": upstreams}, MODELS)
    proxy = RunningProxy(config, commands, main)
    try:
        yield Shared(proxy.start(), main, backup)
        audit = assert_audit(proxy)
        assert (audit["held"], audit["open_requests"]) == (0, 0), audit
        proxy.close()
    finally:
        if proxy.process.poll() is None:
            proxy.kill()
        for server in (main, backup, nobody):
            server.close()


@pytest.fixture
def proxy(shared: Shared) -> Iterator[RunningProxy]:
    """The shared proxy; its upstreams behave well until a test says otherwise."""
    shared.main.reset()
    shared.backup.reset()
    yield shared.proxy
    shared.proxy.assert_well()
    assert not shared.main.errors and not shared.backup.errors, (shared.main.errors, shared.backup.errors)


@pytest.fixture
def upstream(proxy: RunningProxy, shared: Shared) -> FakeUpstream:
    """The upstream `main` of the shared proxy."""
    return shared.main


@pytest.fixture
def backup(proxy: RunningProxy, shared: Shared) -> FakeUpstream:
    """The upstream `backup` of the shared proxy."""
    return shared.backup


@pytest.fixture
def funded_key(proxy: RunningProxy) -> Callable[..., Account]:
    """Makes an account of the shared proxy: `funded_key(credits=100, tier="unlimited")`."""

    def make(credits: float = 100.0, tier: str | None = None) -> Account:
        return proxy.add_account(credits, tier)

    return make
