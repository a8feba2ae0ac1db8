"""The Responses API: what its usage costs, how its errors look, and that nothing is stored."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.api_calls import RESPONSES, responses_request
from tests.support.api_upstreams import AnswersByPath, AnswersResponses, named
from tests.support.books import assert_books
from tests.support.client import QUESTION, QUESTION_ESTIMATE
from tests.support.errors import assert_error
from tests.support.misbehaviours import Fails, ResetsBeforeHeaders, SendsEvents, StallsBeforeFirstByte
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]
INPUT_TOKENS = f"{RESPONSES}/input_tokens"
ENDS = ["completed", "incomplete", "failed"]


# -- What an answer costs


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", ENDS)
def test_an_answer_costs_its_usage_however_it_ended(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: str, stream: bool
) -> None:
    """Cached and reasoning tokens are parts; a failed answer is an answer."""
    account = funded_key(credits=1000)
    upstream.behaviour = AnswersResponses(tokens=8, prompt_tokens=44, cached=43, status=status)
    answer = proxy.client(account.key).post(RESPONSES, responses_request(stream=stream))
    assert (answer.status, answer.clean, answer.body) == (200, True, bytes(upstream.posts[0].sent))
    assert_books(proxy, account, credits=1000 - 52)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("status", ENDS)
def test_an_answer_without_usage_costs_what_was_counted(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: str, stream: bool
) -> None:
    """`.done` events and the closing one repeat the text: it is counted once."""
    account = funded_key(credits=1000)
    upstream.behaviour = AnswersResponses(tokens=6, usage=False, status=status)
    answer = proxy.client(account.key).post(RESPONSES, responses_request(stream=stream))
    assert answer.clean
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 6)


def stream_with(usage: Any, *more: dict[str, Any]) -> bytes:
    """Three words and these events, and a closing event with this usage."""
    answers = AnswersResponses(tokens=3)
    *closing, last = answers.closing({"model": "m"})
    last = {**last, "response": {**last["response"], "usage": usage}}
    events = [*answers.opening({"model": "m"}), *[answers.token()] * 3, *more, *closing, last]
    return b"".join(map(named, events))


USAGES: dict[str, tuple[Any, int]] = {
    "plain": ({"input_tokens": 5, "output_tokens": 3, "total_tokens": 8}, 8),
    "details are parts": (
        {
            "input_tokens": 50,
            "input_tokens_details": {"cached_tokens": 43, "cache_write_tokens": 3},
            "output_tokens": 30,
            "output_tokens_details": {"reasoning_tokens": 27},
            "total_tokens": 500,
        },
        80,
    ),
    "a prompt of zero": ({"input_tokens": 0, "output_tokens": 3}, QUESTION_ESTIMATE + 3),
    "no prompt": ({"output_tokens": 3}, QUESTION_ESTIMATE + 3),
    "no output": ({"input_tokens": 5}, 8),
    "null": (None, QUESTION_ESTIMATE + 3),
    "nulls": ({"input_tokens": None, "output_tokens": None}, QUESTION_ESTIMATE + 3),
    "no numbers": ({"input_tokens": "5", "output_tokens": 2.5}, QUESTION_ESTIMATE + 3),
}


@pytest.mark.parametrize("name", USAGES)
def test_the_usage_of_the_closing_event_counts(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    usage, price = USAGES[name]
    account = funded_key(credits=1000)
    for piece_bytes in (None, 50, 1):
        upstream.behaviour = SendsEvents(body := stream_with(usage), piece_bytes)
        answer = proxy.client(account.key).post(RESPONSES, responses_request(stream=True))
        assert (answer.body, answer.clean) == (body, True)
    assert_books(proxy, account, credits=1000 - 3 * price)


COUNTED: dict[str, tuple[dict[str, Any], int]] = {  # an event, and what it counts
    "text": ({"type": "response.output_text.delta", "delta": "12345678"}, 2),
    "reasoning": ({"type": "response.reasoning_text.delta", "delta": "12345678"}, 2),
    "a summary": ({"type": "response.reasoning_summary_text.delta", "delta": "12345678"}, 2),
    "a refusal": ({"type": "response.refusal.delta", "delta": "12345678"}, 2),
    "arguments": ({"type": "response.function_call_arguments.delta", "delta": "12345678"}, 2),
    "a kind of tomorrow": ({"type": "response.telepathy.delta", "delta": "12345678"}, 2),
    "bytes, not characters": ({"type": "response.output_text.delta", "delta": "日本"}, 2),
    "a delta that is no text": ({"type": "response.telepathy.delta", "delta": {"text": "12345678"}}, 0),
    "done repeats": ({"type": "response.output_text.done", "text": "12345678"}, 0),
    "no text": ({"type": "response.output_text.delta", "delta": ""}, 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_bears_text_is_counted_where_no_usage_says_better(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    event, count = COUNTED[name]
    account = funded_key(credits=1000)
    upstream.behaviour = SendsEvents(stream_with(None, event))
    assert proxy.client(account.key).post(RESPONSES, responses_request(stream=True)).clean
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 3 - count)


# -- What is forwarded


@pytest.mark.parametrize("store", [{}, {"store": True}, {"store": False}, {"store": None}])
def test_an_upstream_is_always_told_to_store_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, store: dict[str, Any]
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = AnswersResponses()
    for stream in (False, True):
        assert proxy.client(account.key).post(RESPONSES, responses_request(stream=stream, **store)).status == 200
        assert upstream.posts[-1].json["store"] is False
    assert_books(proxy, account, credits=1000 - 16)


def test_what_codex_sends_reaches_the_upstream_as_it_is(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """No `stream_options`, no maximum where credits are plenty, no query, no header of the client's."""
    account = funded_key(credits=100_000)
    upstream.behaviour = AnswersResponses()
    function = {"type": "function", "name": "shell", "parameters": {"type": "object"}, "strict": False}
    request = responses_request(
        stream=True,
        store=False,
        tools=[function, {"type": "namespace", "name": "n", "tools": [function]}, {"type": "web_search"}],
        tool_choice="auto",
        parallel_tool_calls=True,
        reasoning={"summary": "auto"},
        include=["reasoning.encrypted_content"],
        prompt_cache_key="k",
        client_metadata={"x": "y"},
    )
    headers = {"originator": "codex_exec", "session-id": "s", "x-conversation-id": "c", "x-codex-turn-metadata": "{}"}
    answer = proxy.client(account.key).post(f"{RESPONSES}?x=1", request, headers)
    assert answer.clean
    sent = upstream.posts[0]
    assert (sent.path, sent.json) == (RESPONSES, request)
    assert not set(headers) & set(sent.headers)
    assert_books(proxy, account, credits=100_000 - 8)


@pytest.mark.parametrize("method", ["GET", "DELETE"])
@pytest.mark.parametrize("path", [f"{RESPONSES}/resp_1", f"/api{RESPONSES}/resp_1", f"{RESPONSES}/resp_1/input_items"])
def test_an_answer_cannot_be_asked_for_again(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, method: str, path: str
) -> None:
    account = funded_key(credits=10)
    error = assert_error(proxy.client(account.key).request(method, path), 404, "not_found", "invalid_request_error")
    assert "stored" in error["message"]
    assert not upstream.posts
    assert_error(proxy.client(None).request(method, path), 401, "missing_api_key")
    assert_books(proxy, account, credits=10)


# -- Errors


@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_the_one_shape(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    account, poor = funded_key(credits=1000), funded_key(credits=1)
    client = proxy.client(account.key)
    assert_error(client.post(RESPONSES, b"{"), 400, "invalid_json", "invalid_request_error")
    for model, status, code in (("plane", 404, "model_not_found"), ("retired", 410, "model_retired")):
        assert_error(client.post(RESPONSES, responses_request(model=model, stream=stream)), status, code)
    error = assert_error(proxy.client(poor.key).post(RESPONSES, responses_request()), 402, "insufficient_credits")
    assert (error["credits"], error["required"]) == (1, 2 * QUESTION_ESTIMATE + 1)
    for behaviour in (Fails(500), Fails(401), ResetsBeforeHeaders()):
        upstream.behaviour = behaviour
        assert_error(client.post(RESPONSES, responses_request(stream=stream)), 502, "upstream_error")
    if not stream:
        upstream.behaviour = StallsBeforeFirstByte()
        assert_error(client.post(RESPONSES, responses_request(model="impatient")), 504, "upstream_timeout")
    assert_books(proxy, account, credits=1000)


@pytest.mark.parametrize("status", [400, 404, 422, 429])
def test_an_upstreams_error_passes_with_its_body(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: int
) -> None:
    account = funded_key(credits=100)
    for body in (b'{"error": {"code":400, "message": "too long"}}', b'{"error":{"message":"m","type":"t"} }'):
        upstream.behaviour = Fails(status, body)
        answer = proxy.client(account.key).post(RESPONSES, responses_request(stream=True))
        assert (answer.status, answer.body) == (status, body)
    upstream.behaviour = Fails(status, {"detail": "no"})
    answer = proxy.client(account.key).post(RESPONSES, responses_request())
    assert answer.status == status and answer.error["message"]
    assert_books(proxy, account, credits=100)


# -- Counting tokens


@pytest.mark.usefixtures("early_in_a_minute")
def test_counting_tokens_is_free_and_counts_as_a_request(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    upstream.behaviour = AnswersByPath(prompt_tokens=44)
    account = funded_key(credits=0, tier="two-a-minute")
    client = proxy.client(account.key)
    for prefix in ("", "/api"):
        answer = client.post(f"{prefix}{INPUT_TOKENS}", {"model": "plain", "input": QUESTION})
        assert (answer.status, answer.json()) == (200, {"input_tokens": 44})
        assert upstream.posts[-1].path == INPUT_TOKENS
    assert_error(client.post(INPUT_TOKENS, responses_request()), 429, "rate_limit_exceeded")
    assert "plain" in str(proxy.command("usage", account.name)), "a row a request"
    assert_books(proxy, account, credits=0)


def test_counting_tokens_refuses_what_an_answer_would_refuse(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    client = proxy.client(account.key)
    for members in ({"previous_response_id": "resp_1"}, {"conversation": "conv_1"}, {"Input": "x"}):
        answer = client.post(INPUT_TOKENS, responses_request(**members))
        assert_error(answer, 422, "validation_failed")
        assert set(members) <= set(answer.json()["errors"]), json.dumps(answer.json())
    assert_books(proxy, account, credits=100)
