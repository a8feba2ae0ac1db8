"""The one place where the tests know how the core reads a request, prices it and writes the one it forwards."""

import json
from typing import Any, Literal

import msgspec.structs

import proxy
from tests.support.core_meter import CHAT, COMPLETIONS, EMBEDDINGS

Refusal = proxy.Refusal
PROMPT = {CHAT: "messages", COMPLETIONS: "prompt", EMBEDDINGS: "input"}  # the member that holds the prompt
PATHS = list(PROMPT)
EVERY_PATH = list(proxy.APIS)
MAXIMA = ("max_tokens", "max_completion_tokens")
MODEL = proxy.Model(
    name="shown", tier="one", upstream="up", upstream_model="real", multiplier=proxy.Thousandths(1000), kind="chat"
)


def parse(path: str, raw: bytes) -> Any:
    """A request as the core has read it: `model`, `stream`, `choices`, `max_tokens`, `prompt_estimate` and more."""
    return proxy.parse_request(proxy.APIS[path], raw)


def forward(request: Any, lowered_to: int | None = None, usage_in_stream: Literal["ask", "never"] = "ask") -> bytes:
    """The body for an upstream; `lowered_to` is a maximum that credits lowered."""
    upstream = proxy.Upstream(name="up", base_url="http://127.0.0.1:1/v1", usage_in_stream=usage_in_stream)
    return bytes(proxy.forward_body(request, MODEL, upstream, lowered_to))


def within_window(window: int | None, request: Any) -> int:
    """The estimate of a request's prompts, for a model with this context window."""
    return int(msgspec.structs.replace(MODEL, context_window=window).prompt_tokens(request))


def longest_answer(window: int | None, most: int | None, prompt_tokens: int) -> int:
    """The bound of an answer whose request names none."""
    model = msgspec.structs.replace(MODEL, context_window=window, max_output_tokens=most)
    return int(model.output_tokens(prompt_tokens))


def errors_of(refusal: Any) -> dict[str, list[str]]:
    """The fields that a refusal names, and why."""
    found: dict[str, list[str]] = refusal.top["errors"]
    return found


# --------------------------------------------------------------------------------------------------
# Requests


def chat(*messages: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"messages": list(messages), **members}


def said(content: Any, **members: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **members}


def ask(path: str = CHAT, **members: Any) -> Any:
    """A short request with these members, as the core has read it."""
    body = {CHAT: chat(said("hi")), COMPLETIONS: {"prompt": "hi"}, EMBEDDINGS: {"input": "hi"}}[path]
    return parse(path, json.dumps({"model": "m", **body, **members}).encode())


def forwarded(
    request: Any, lowered_to: int | None = None, usage_in_stream: Literal["ask", "never"] = "ask"
) -> dict[str, Any]:
    """What an upstream reads."""
    sent = json.loads(forward(request, lowered_to, usage_in_stream))
    assert isinstance(sent, dict)
    return sent
