"""The behaviour of an upstream as it should be, with knobs for what real servers do differently."""

from dataclasses import dataclass, field
from typing import Any

from tests.support.exchange import Exchange
from tests.support.sse import sse
from tests.support.waiting import Signal


class Pauses:
    """Stops after so many tokens, until it may go on."""

    pause_after: int | None  # None: never

    def __post_init__(self) -> None:
        self.reached, self.resume = Signal(), Signal()

    async def pause(self, sent: int) -> None:
        if self.pause_after == sent:
            self.reached.set()
            await self.resume.happened()


@dataclass
class Answers(Pauses):
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
