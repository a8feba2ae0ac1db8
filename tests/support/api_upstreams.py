"""Upstreams that speak the Responses and the Messages API, well or badly: what `Answers` is to chat.

upstream.behaviour = AnswersMessages(tokens=3, prompt_tokens=5, cached=40)
upstream.behaviour = HangsUp(AnswersResponses(tokens=2))  # no closing event, no end of HTTP's
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.support.answers import Answers, Pauses
from tests.support.exchange import Exchange


def named(data: Mapping[str, Any], newline: bytes = b"\n") -> bytes:
    """An event with its name, as both APIs send it."""
    encoded = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode()
    return b"event: " + str(data["type"]).encode() + newline + b"data: " + encoded + newline * 2


@dataclass
class Speaks(Pauses):
    """What the two APIs have in common; the events themselves are a subclass's."""

    tokens: int = 3
    word: str = "word"  # the text of a token: 4 bytes, so that estimates count tokens
    prompt_tokens: int = 5  # in all, cached ones too
    cached: int = 0  # of these
    output_tokens: int | None = None  # what usage says; None: the truth
    usage: bool = True
    newline: bytes = b"\n"
    piece_bytes: int | None = None  # the body in HTTP chunks of this many bytes; None: an event a chunk
    pause_after: int | None = None  # wait for `resume` when this many tokens went out
    honours_maximum: bool = True
    headers: dict[str, str] = field(default_factory=dict)

    async def __call__(self, exchange: Exchange) -> None:
        if not exchange.is_stream:
            await self.pause(0)
            await exchange.answer(self.whole(exchange.json), headers=self.headers)
            return
        await exchange.head(headers=self.headers)
        await self.send_tokens(exchange)
        await self.send(exchange, *self.closing(exchange.json))
        await exchange.end()

    async def send_tokens(self, exchange: Exchange) -> None:
        """The events up to the last token."""
        await self.send(exchange, *self.opening(exchange.json))
        await self.pause(0)
        for number in range(1, self.count(exchange.json) + 1):
            await self.send(exchange, self.token())
            await self.pause(number)

    async def send(self, exchange: Exchange, *events: Mapping[str, Any]) -> None:
        for event in events:
            data = named(event, self.newline)
            size = self.piece_bytes or len(data)
            for start in range(0, len(data), size):
                await exchange.send(data[start : start + size])

    def count(self, request: dict[str, Any]) -> int:
        maximum = request.get("max_output_tokens", request.get("max_tokens"))
        return self.tokens if maximum is None or not self.honours_maximum else min(self.tokens, maximum)

    def output(self, request: dict[str, Any]) -> int:
        return self.count(request) if self.output_tokens is None else self.output_tokens

    def text(self, request: dict[str, Any]) -> str:
        return self.word * self.count(request)

    def events(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """A whole stream, for who sends it in a way of its own."""
        yield from self.opening(request)
        for _ in range(self.count(request)):
            yield self.token()
        yield from self.closing(request)

    def opening(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        raise NotImplementedError

    def token(self) -> dict[str, Any]:
        raise NotImplementedError

    def closing(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """What follows the last token; the last of it ends the stream."""
        raise NotImplementedError

    def whole(self, request: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError


@dataclass
class AnswersMessages(Speaks):
    """The Messages API: the prompt's tokens at the start, cached ones apart; the answer's in `message_delta`."""

    def prompt_usage(self) -> dict[str, Any]:
        if not self.usage:
            return {}
        return {"input_tokens": self.prompt_tokens - self.cached, "cache_read_input_tokens": self.cached}

    def message(self, request: dict[str, Any], **members: Any) -> dict[str, Any]:
        fixed = {"id": "msg_1", "type": "message", "role": "assistant", "model": request["model"]}
        return {**fixed, "content": [], "stop_reason": None, "stop_sequence": None, **members}

    def opening(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        usage = {"usage": {**self.prompt_usage(), "output_tokens": 0}} if self.usage else {}
        return [
            {"type": "message_start", "message": self.message(request, **usage)},
            {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        ]

    def token(self) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": self.word}}

    def reason(self, request: dict[str, Any]) -> str:
        return "end_turn" if self.count(request) == self.tokens else "max_tokens"

    def closing(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        usage = {"usage": {"output_tokens": self.output(request)}} if self.usage else {}
        stop = {"stop_reason": self.reason(request), "stop_sequence": None}
        return [
            {"type": "content_block_stop", "index": 0},
            {"type": "message_delta", "delta": stop, **usage},
            {"type": "message_stop"},
        ]

    def whole(self, request: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "text", "text": self.text(request)}]
        usage = {"usage": {**self.prompt_usage(), "output_tokens": self.output(request)}} if self.usage else {}
        return self.message(request, content=content, stop_reason=self.reason(request), **usage)


@dataclass
class AnswersResponses(Speaks):
    """The Responses API: `.done` events and the closing one repeat the text, and the closing one has the usage."""

    status: str = "completed"  # how it ends: completed, incomplete, failed

    def response(self, request: dict[str, Any], status: str, **members: Any) -> dict[str, Any]:
        fixed = {"id": "resp_1", "object": "response", "created_at": 1, "model": request["model"]}
        return {**fixed, "status": status, "output": [], "usage": None, **members}

    def opening(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        begun = self.response(request, "in_progress")
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "in_progress", "content": []}
        part = {"type": "output_text", "text": "", "annotations": []}
        return [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            {"type": "response.output_item.added", "output_index": 0, "item": item},
            {"type": "response.content_part.added", **self.place(), "part": part},
        ]

    def place(self) -> dict[str, Any]:
        return {"item_id": "msg_1", "output_index": 0, "content_index": 0}

    def token(self) -> dict[str, Any]:
        return {"type": "response.output_text.delta", **self.place(), "delta": self.word, "logprobs": []}

    def item(self, request: dict[str, Any]) -> dict[str, Any]:
        part = {"type": "output_text", "text": self.text(request), "annotations": []}
        return {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}

    def closing(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        item = self.item(request)
        text = {"type": "response.output_text.done", **self.place(), "text": self.text(request), "logprobs": []}
        return [
            text,
            {"type": "response.content_part.done", **self.place(), "part": item["content"][0]},
            {"type": "response.output_item.done", "output_index": 0, "item": item},
            {"type": f"response.{self.status}", "response": self.whole(request)},
        ]

    def whole(self, request: dict[str, Any]) -> dict[str, Any]:
        output = self.output(request)
        usage: dict[str, Any] = {
            "input_tokens": self.prompt_tokens,
            "input_tokens_details": {"cached_tokens": self.cached},
            "output_tokens": output,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self.prompt_tokens + output,
        }
        error = {"code": "server_error", "message": "the engine died"} if self.status == "failed" else None
        members = {"output": [self.item(request)], "usage": usage if self.usage else None, "error": error}
        return self.response(request, self.status, **members)


@dataclass
class AnswersByPath:
    """A server that speaks chat and both of the others, each as it should be."""

    tokens: int = 3
    prompt_tokens: int = 5

    async def __call__(self, exchange: Exchange) -> None:
        path = exchange.path.partition("?")[0]
        members: Any = {"tokens": self.tokens, "prompt_tokens": self.prompt_tokens}
        if path.endswith(("/count_tokens", "/input_tokens")):
            await exchange.answer({"input_tokens": self.prompt_tokens})
        elif path.endswith("/rerank"):
            usage = {"prompt_tokens": self.prompt_tokens, "total_tokens": self.prompt_tokens}
            await exchange.answer({"results": [{"index": 0, "relevance_score": 0.5}], "usage": usage})
        elif path.endswith("/messages"):
            await AnswersMessages(**members)(exchange)
        elif path.endswith("/responses"):
            await AnswersResponses(**members)(exchange)
        else:
            await Answers(**members)(exchange)


# --------------------------------------------------------------------------------------------------
# Streams that end badly, or not at all


@dataclass
class EndsBadly:
    """Streams all tokens, and then does what it is named for."""

    answers: Speaks

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        await self.answers.send_tokens(exchange)
        await self.then(exchange)

    async def then(self, exchange: Exchange) -> None:
        raise NotImplementedError


class EndsInMidAir(EndsBadly):
    """All but the closing event, and a clean end."""

    async def then(self, exchange: Exchange) -> None:
        await self.answers.send(exchange, *self.answers.closing(exchange.json)[:-1])
        await exchange.end()


class HangsUp(EndsBadly):
    """Nothing: not even HTTP's end."""

    async def then(self, exchange: Exchange) -> None:
        pass


class HangsUpMidEvent(EndsBadly):
    """Half of the next one."""

    async def then(self, exchange: Exchange) -> None:
        await exchange.send(named(self.answers.token())[:-20])


class GoesSilent(EndsBadly):
    """Silence, with the connection open."""

    async def then(self, exchange: Exchange) -> None:
        await exchange.stall()


@dataclass
class SaysWhatFailed(EndsBadly):
    """An error event of its own, and a clean end."""

    event: bytes

    async def then(self, exchange: Exchange) -> None:
        await exchange.send(self.event)
        await exchange.end()


class KeepsTheLineOpen(EndsBadly):
    """Its closing event, and the connection stays open."""

    async def then(self, exchange: Exchange) -> None:
        await self.answers.send(exchange, *self.answers.closing(exchange.json))
        await exchange.stall()
