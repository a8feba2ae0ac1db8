"""What upstreams do wrong, a class each: `upstream.behaviour = BreaksMidEvent(tokens=2)`."""

import gzip
import json
from dataclasses import dataclass, field
from typing import Any

from tests.support.answers import Answers
from tests.support.exchange import Exchange
from tests.support.sse import sse
from tests.support.waiting import Signal


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
class BreaksBetweenEvents:
    """Some tokens, then the connection ends without HTTP's end."""

    tokens: int = 2

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await Answers(tokens=self.tokens).send_tokens(exchange)
        await self.then(exchange)

    async def then(self, exchange: Exchange) -> None:
        """What others do after the tokens."""


class StallsMidStream(BreaksBetweenEvents):
    """Some tokens, then silence with the connection open."""

    async def then(self, exchange: Exchange) -> None:
        await exchange.stall()


@dataclass
class BreaksBeforeFirstEvent:
    """200, headers, half of the first event, reset."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.send(Answers().token(exchange)[:20])
        exchange.reset()


class BreaksMidEvent(BreaksBetweenEvents):
    """Some tokens, half of the next, then the connection ends without HTTP's end."""

    async def then(self, exchange: Exchange) -> None:
        await exchange.send(Answers().token(exchange)[:-20])


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


class EndsInMidAir(BreaksBetweenEvents):
    """Some tokens and a clean end: neither a finish reason nor usage nor [DONE]."""

    async def then(self, exchange: Exchange) -> None:
        await exchange.end()


class EmptyBody:
    """200, headers, and a clean end at once."""

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await exchange.end()


@dataclass
class ErrorEventThenDone(BreaksBetweenEvents):
    """What vLLM does when its engine dies: an error event, then [DONE] and a clean end."""

    error: bytes = sse({"error": {"message": "EngineCore encountered an issue.", "type": "InternalServerError"}})

    async def then(self, exchange: Exchange) -> None:
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


class UsageComesLate(Answers):
    """Says why it ended, and the usage only when it may go on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.sent = Signal()

    async def send_closing(self, exchange: Exchange) -> None:
        await self.send(exchange, self.finish(exchange))
        await self.resume.happened()
        await self.send(exchange, self.closing_usage(exchange) + sse(b"[DONE]"))
        self.sent.set()
