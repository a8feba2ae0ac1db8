"""Chat, Responses and Messages as the chaos tests speak them: each event is data, to be torn and delayed at will.

`tokens` is what a usage says, (prompt, completion), or None where an event has no usage.
"""

import json
from typing import Any

from tests.support.api_calls import CHAT, MESSAGES, RESPONSES, messages_request, responses_request
from tests.support.api_upstreams import named
from tests.support.client import chat_request
from tests.support.sse import sse

Tokens = tuple[int, int] | None

NONSENSE, NONSENSE_TEXT = b"data: {\xff", "{?"  # it may be read by somebody: all of it counts as text


class Chat:
    path, bound = CHAT, "max_tokens"
    failure = sse({"error": {"message": "the engine died"}}) + sse(b"[DONE]")
    usages: tuple[str, ...] = ("closing", "closing", "finish", "every", "none")

    def request(self, content: str, model: str, **members: Any) -> dict[str, Any]:
        return chat_request(content, model, **members)

    def content(self, request: dict[str, Any]) -> str:
        return str(request["messages"][0]["content"])

    def encode(self, data: Any, newline: bytes = b"\n") -> bytes:
        return sse(data, newline)

    def used(self, tokens: Tokens) -> dict[str, Any]:
        return {"usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}} if tokens else {}

    def chunk(self, choices: list[Any], tokens: Tokens) -> dict[str, Any]:
        return {"id": "x", "choices": choices, **self.used(tokens)}

    def opening(self, tokens: Tokens) -> list[Any]:
        return []

    def word(self, word: str, tokens: Tokens) -> dict[str, Any]:
        return self.chunk([{"index": 0, "delta": {"content": word}, "finish_reason": None}], tokens)

    def closing(self, where: str, tokens: Tokens) -> list[Any]:
        """What ends a stream, usage `where` the plan says; the last one is the end itself."""
        finish = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        events: list[Any] = [self.chunk(finish, tokens if where in ("finish", "every") else None)]
        return events + ([self.chunk([], tokens)] if where == "closing" else []) + [b"[DONE]"]

    def whole(self, text: str, tokens: Tokens) -> dict[str, Any]:
        return {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], **self.used(tokens)}

    def text(self, data: dict[str, Any]) -> str:
        """Of an event, or of a whole answer."""
        choices = data.get("choices") or [{}]
        return (choices[0].get("delta") or choices[0].get("message") or {}).get("content") or ""


class Messages(Chat):
    path = MESSAGES
    failure = named({"type": "error", "error": {"type": "overloaded_error", "message": "the engine died"}})
    usages = ("closing", "closing", "closing", "none")

    def request(self, content: str, model: str, **members: Any) -> dict[str, Any]:
        request = messages_request(content, model, **members)
        return request if "max_tokens" in members else {k: v for k, v in request.items() if k != "max_tokens"}

    def encode(self, data: Any, newline: bytes = b"\n") -> bytes:
        return named(data, newline)

    def used(self, tokens: Tokens) -> dict[str, Any]:
        """Half of the prompt is cached."""
        if tokens is None:
            return {}
        cached = tokens[0] // 2
        said = {"input_tokens": tokens[0] - cached, "cache_read_input_tokens": cached, "output_tokens": tokens[1]}
        return {"usage": said}

    def opening(self, tokens: Tokens) -> list[Any]:
        return [{"type": "message_start", "message": {"role": "assistant", "content": [], **self.used(tokens)}}]

    def word(self, word: str, tokens: Tokens) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}

    def closing(self, where: str, tokens: Tokens) -> list[Any]:
        usage = {"usage": {"output_tokens": tokens[1]}} if tokens else {}
        stop = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, **usage}
        return [{"type": "content_block_stop", "index": 0}, stop, {"type": "message_stop"}]

    def whole(self, text: str, tokens: Tokens) -> dict[str, Any]:
        return {"type": "message", "content": [{"type": "text", "text": text}], **self.used(tokens)}

    def text(self, data: dict[str, Any]) -> str:
        if data.get("type") == "message":
            return str(data["content"][0]["text"])
        return str(data["delta"]["text"]) if data.get("type") == "content_block_delta" else ""


class Responses(Messages):
    path, bound = RESPONSES, "max_output_tokens"
    failure = named({"type": "error", "code": "server_error", "message": "the engine died", "param": None})

    def request(self, content: str, model: str, **members: Any) -> dict[str, Any]:
        return responses_request(content, model, **members)

    def content(self, request: dict[str, Any]) -> str:
        return str(request["input"][0]["content"])

    def used(self, tokens: Tokens) -> dict[str, Any]:
        return {"usage": {"input_tokens": tokens[0], "output_tokens": tokens[1]} if tokens else None}

    def opening(self, tokens: Tokens) -> list[Any]:
        return [{"type": "response.created", "response": {"status": "in_progress", "usage": None}}]

    def word(self, word: str, tokens: Tokens) -> dict[str, Any]:
        return {"type": "response.output_text.delta", "item_id": "m", "delta": word}

    def closing(self, where: str, tokens: Tokens) -> list[Any]:
        response = {"status": "completed", "output": [], **self.used(tokens)}
        return [{"type": "response.content_part.done"}, {"type": "response.completed", "response": response}]

    def whole(self, text: str, tokens: Tokens) -> dict[str, Any]:
        part = {"type": "output_text", "text": text}
        output = [{"type": "message", "role": "assistant", "content": [part]}]
        return {"object": "response", "status": "completed", "output": output, **self.used(tokens)}

    def text(self, data: dict[str, Any]) -> str:
        if data.get("object") == "response":
            return str(data["output"][0]["content"][0]["text"])
        return str(data["delta"]) if data.get("type") == "response.output_text.delta" else ""


DIALECTS: list[Chat] = [Chat(), Messages(), Responses()]


def dialect_of(path: str) -> Chat:
    return next(dialect for dialect in DIALECTS if dialect.path == path)


def texts_in(body: bytes, dialect: Chat) -> list[str]:
    """The text of each whole event, or of a whole answer."""
    if body.startswith(b"{"):
        try:
            return [dialect.text(json.loads(body))]
        except json.JSONDecodeError:
            return []
    found = []
    for event in whole_events(body):
        nonsense = event == NONSENSE.removeprefix(b"data: ")
        found.append(NONSENSE_TEXT if nonsense else dialect.text(json.loads(event)))
    return [text for text in found if text]


def whole_events(body: bytes) -> list[bytes]:
    """What the data lines of the whole events carry; what follows the last blank line is no event."""
    lines = body.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    events = lines.split(b"\n\n")[:-1]
    return [line[6:] for event in events for line in event.split(b"\n") if line.startswith(b"data: {")]
