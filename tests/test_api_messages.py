"""The Messages API: what its usage costs, how its errors look, which headers pass."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.api_calls import (
    ASKED,
    MESSAGES,
    MESSAGES_API,
    assert_messages_error,
    messages_request,
)
from tests.support.api_upstreams import AnswersByPath, AnswersMessages, named
from tests.support.books import assert_books
from tests.support.client import QUESTION, QUESTION_ESTIMATE
from tests.support.exchange import Exchange
from tests.support.misbehaviours import Fails, ResetsBeforeHeaders, SendsEvents, StallsBeforeFirstByte
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]
COUNT_TOKENS = f"{MESSAGES}/count_tokens"


# -- What an answer costs


@pytest.mark.parametrize("stream", [False, True])
def test_cached_tokens_are_part_of_a_prompts_price(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    """43 cached and one are 44, not 1."""
    account = funded_key(credits=1000)
    upstream.behaviour = AnswersMessages(tokens=8, prompt_tokens=44, cached=43)
    answer = proxy.client(account.key).post(MESSAGES, messages_request(stream=stream))
    assert (answer.status, answer.clean, answer.body) == (200, True, bytes(upstream.posts[0].sent))
    assert_books(proxy, account, credits=1000 - 52)


def stream_with(start: Any, *deltas: Any) -> bytes:
    """Three words, with these usages at the start and after them (absent where None)."""
    answers = AnswersMessages(tokens=3, usage=False)
    begin, block = answers.opening({"model": "m"})
    if start is not None:
        begin["message"]["usage"] = start
    *stops, stop = answers.closing({"model": "m"})
    events = [begin, block, *[answers.token()] * 3, stops[0]]
    for usage in deltas or (None,):
        events.append(dict(stops[1]) if usage is None else {**stops[1], "usage": usage})
    return b"".join(map(named, [*events, stop]))


def used(input_tokens: Any = 5, output_tokens: Any = 0, **members: Any) -> dict[str, Any]:
    return {"input_tokens": input_tokens, "output_tokens": output_tokens, **members}


CACHE = {"cache_read_input_tokens": 40, "cache_creation_input_tokens": 20}
USAGES: dict[str, tuple[Any, list[Any], int]] = {  # at the start, in message_delta, the price
    "only the output in the delta": (used(), [{"output_tokens": 3}], 8),
    "the start's output is not added": (used(5, 1), [{"output_tokens": 3}], 8),
    "both cache members": (used(**CACHE), [{"output_tokens": 3}], 68),
    "repeated in the delta": (used(5, 1, **CACHE), [used(5, 3, **CACHE)], 68),
    "an estimate, then the truth": (used(4), [used(6, 3)], 9),
    "the cache only in the delta": (used(65), [used(5, 3, **CACHE)], 68),
    "null keeps what was there": (
        used(**CACHE),
        [{"input_tokens": None, "cache_read_input_tokens": None, "output_tokens": 3}],
        68,
    ),
    "cumulative deltas": (used(), [{"output_tokens": 1}, {"output_tokens": 2}, {"output_tokens": 3}], 8),
    "a last delta with null": (used(), [{"output_tokens": 3}, {"output_tokens": None}], 8),
    "a last delta without usage": (used(), [{"output_tokens": 3}, None], 8),
    "details are parts": (
        used(cache_creation={"ephemeral_5m_input_tokens": 20}, cache_creation_input_tokens=20, service_tier="standard"),
        [{"output_tokens": 3, "output_tokens_details": {"thinking_tokens": 2}}],
        28,
    ),
    "more than was seen": (used(), [{"output_tokens": 31}], 36),
    "everything cached": (used(0, **CACHE), [{"output_tokens": 3}], 63),
    "a prompt of zero": (used(0), [{"output_tokens": 3}], QUESTION_ESTIMATE + 3),
    "no prompt": ({"output_tokens": 0}, [{"output_tokens": 3}], QUESTION_ESTIMATE + 3),
    "no output": ({"input_tokens": 5}, [None], 8),
    "no usage at all": (None, [None], QUESTION_ESTIMATE + 3),
    "null for all": (None, [used(None, None)], QUESTION_ESTIMATE + 3),
    "no numbers": (used("5", "3"), [used(-1, True)], QUESTION_ESTIMATE + 3),
}


@pytest.mark.parametrize("name", USAGES)
def test_of_each_member_of_usage_the_last_value_counts_and_nothing_is_added(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    start, deltas, price = USAGES[name]
    account = funded_key(credits=1000)
    for piece_bytes in (None, 50, 1):
        upstream.behaviour = SendsEvents(body := stream_with(start, *deltas), piece_bytes)
        answer = proxy.client(account.key).post(MESSAGES, messages_request(stream=True))
        assert (answer.body, answer.clean) == (body, True)
    assert_books(proxy, account, credits=1000 - 3 * price)


WHOLE_USAGES: dict[str, tuple[Any, int]] = {
    "cached": ({"input_tokens": 1, "cache_read_input_tokens": 43, "output_tokens": 3}, 47),
    "created": ({"input_tokens": 1, "cache_creation_input_tokens": 43, "output_tokens": 3}, 47),
    "null cache": ({"input_tokens": 5, "cache_read_input_tokens": None, "output_tokens": 3}, 8),
    "no prompt": ({"input_tokens": 0, "output_tokens": 3}, QUESTION_ESTIMATE + 3),
    "none": (None, QUESTION_ESTIMATE + 3),
}


@pytest.mark.parametrize("name", WHOLE_USAGES)
def test_a_whole_answer_costs_its_usage(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    usage, price = WHOLE_USAGES[name]
    account = funded_key(credits=1000)
    body = {**AnswersMessages(usage=False).whole({"model": "m"}), **({"usage": usage} if usage else {})}
    upstream.behaviour = SendsEvents(json.dumps(body).encode(), content_type="application/json")
    answer = proxy.client(account.key).post(MESSAGES, messages_request())
    assert answer.headers["x-credits-charged"] == str(price)
    assert_books(proxy, account, credits=1000 - price)


COUNTED: dict[str, tuple[dict[str, Any], int]] = {  # a delta, and what it counts
    "text": ({"type": "text_delta", "text": "12345678"}, 2),
    "thinking": ({"type": "thinking_delta", "thinking": "12345678"}, 2),
    "a tool's arguments": ({"type": "input_json_delta", "partial_json": "12345678"}, 2),
    "bytes, not characters": ({"type": "text_delta", "text": "日本"}, 2),
    "a signature is no text": ({"type": "signature_delta", "signature": "12345678"}, 0),
    "nothing": ({"type": "text_delta", "text": ""}, 0),
}


@pytest.mark.parametrize("name", COUNTED)
def test_what_bears_text_is_counted_where_no_usage_says_better(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    delta, count = COUNTED[name]
    account = funded_key(credits=1000)
    body = stream_with(None)
    extra = named({"type": "content_block_delta", "index": 0, "delta": delta})
    upstream.behaviour = SendsEvents(extra.join(body.partition(named({"type": "content_block_stop", "index": 0}))[::2]))
    assert proxy.client(account.key).post(MESSAGES, messages_request(stream=True)).clean
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 3 - count)


# -- Errors, by status


def refused(proxy: RunningProxy, account: Account, status: int, code: str, **members: Any) -> dict[str, Any]:
    """The details of a request's refusal."""
    answer = proxy.client(account.key).post(MESSAGES, messages_request(**members))
    return assert_messages_error(answer, status, code)


def test_errors_of_a_request_have_the_apis_own_shape(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    client = proxy.client(account.key)
    assert_messages_error(client.post(MESSAGES, b"{"), 400, "invalid_json")
    assert "model" in refused(proxy, account, 422, "validation_failed", model=7)["errors"]
    assert "max_tokens" in refused(proxy, account, 422, "validation_failed", max_tokens="9")["errors"]
    refused(proxy, account, 404, "model_not_found", model="plane")
    refused(proxy, account, 410, "model_retired", model="retired")
    for path in (COUNT_TOKENS, f"/api{MESSAGES}", f"/api{COUNT_TOKENS}"):
        assert_messages_error(client.post(path, b"{"), 400, "invalid_json")
    assert not upstream.posts
    assert_books(proxy, account, credits=1000)


def test_errors_of_a_key_and_an_account_have_the_apis_own_shape(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account, poor = funded_key(credits=1000), funded_key(credits=1)
    for key, code in ((None, "missing_api_key"), ("sk-" + "x" * 43, "invalid_api_key")):
        for path in (MESSAGES, COUNT_TOKENS):
            assert_messages_error(proxy.client(key).post(path, messages_request()), 401, code)
    details = refused(proxy, poor, 402, "insufficient_credits")
    assert (details["credits"], details["required"]) == (1, 2 * QUESTION_ESTIMATE + 1)
    proxy.command("account", "suspend", account.name)
    refused(proxy, account, 403, "account_suspended")
    proxy.command("account", "resume", account.name)
    proxy.command("key", "revoke", account.key_id)
    refused(proxy, account, 401, "revoked_api_key")
    assert_books(proxy, account, credits=1000)


@pytest.mark.usefixtures("early_in_a_minute")
def test_a_rate_limit_has_the_apis_own_shape(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=1000, tier="two-a-minute")
    upstream.behaviour = AnswersMessages()
    client = proxy.client(account.key)
    assert [client.post(MESSAGES, messages_request()).status for _ in range(2)] == [200, 200]
    answer = client.post(MESSAGES, messages_request())
    details = assert_messages_error(answer, 429, "rate_limit_exceeded")
    assert str(details["retry_after"]) == answer.headers["retry-after"]
    assert_books(proxy, account, credits=1000 - 16)


@pytest.fixture(scope="module")
def small(module_proxy: Callable[..., RunningProxy]) -> RunningProxy:
    return module_proxy(options={"max_body_mb": 1})


def test_a_body_that_is_too_large_has_the_apis_own_shape(small: RunningProxy) -> None:
    account = small.add_account(100)
    refused(small, account, 413, "body_too_large", content="x" * 2_000_000)
    assert_books(small, account, credits=100)


@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_an_upstream_have_the_apis_own_shape(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    account = funded_key(credits=1000)
    for behaviour in (Fails(500), Fails(501), Fails(401), Fails(403), ResetsBeforeHeaders()):
        upstream.behaviour = behaviour
        refused(proxy, account, 502, "upstream_error", stream=stream)
    if stream:
        upstream.behaviour = StallsBeforeFirstByte()
        refused(proxy, account, 504, "upstream_timeout", model="impatient", stream=True)
    for model in ("absent", "off"):
        refused(proxy, account, 503, "upstream_unavailable", model=model, stream=stream)
    assert_books(proxy, account, credits=1000)


# -- An upstream's own errors

OURS_ALREADY = b"""{"type": "error",  "error": {"type": "invalid_request_error",
 "message": "prompt is too long: 210000 tokens > 200000 maximum"}, "request_id": "req_upstream"}"""
OTHER_SHAPES: list[tuple[Any, str]] = [  # a body, and what its message must still say
    ({"error": {"code": 400, "message": "too long by far", "type": "invalid_request_error"}}, "too long by far"),
    ({"error": {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 8}}, "too long"),
    ({"error": "too long"}, ""),
    ({"type": "error", "message": "no error object"}, ""),
    ({"type": "error", "error": {"type": "invalid_request_error"}}, ""),
    ({"detail": "no"}, ""),
    (b"<html>no</html>", ""),
    (b"", ""),
    (b"[]", ""),
]


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 429])
def test_an_upstreams_error_in_the_right_shape_passes_byte_for_byte(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: int
) -> None:
    """Claude Code matches its words."""
    account = funded_key(credits=100)
    upstream.behaviour = Fails(status, OURS_ALREADY)
    for stream in (False, True):
        answer = proxy.client(account.key).post(MESSAGES, messages_request(stream=stream))
        assert (answer.status, answer.body) == (status, OURS_ALREADY)
        assert answer.headers["request-id"] == answer.headers["x-request-id"]
    assert_books(proxy, account, credits=100)


@pytest.mark.parametrize(("body", "says"), OTHER_SHAPES)
@pytest.mark.parametrize("status", [400, 404, 413, 422, 429])
def test_an_upstreams_error_in_another_shape_is_put_into_it(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, body: Any, says: str, status: int
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Fails(status, body)
    answer = proxy.client(account.key).post(MESSAGES, messages_request(stream=True))
    assert_messages_error(answer, status)
    assert says in answer.json()["error"]["message"]
    assert_books(proxy, account, credits=100)


# -- Headers


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_bears_its_id_under_both_names(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    upstream.behaviour = AnswersMessages(headers={"request-id": "theirs", "x-request-id": "theirs"})
    account = funded_key(credits=100)
    answer = proxy.client(account.key).post(MESSAGES, messages_request(stream=stream))
    assert answer.headers.get_all("request-id") == answer.headers.get_all("x-request-id")
    assert answer.headers["request-id"] != "theirs"
    assert_books(proxy, account, credits=92)


BETAS = "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27,effort-2025-11-24"


def test_what_claude_code_sends_reaches_the_upstream(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """Its headers by the API's prefix, its query, its members as they are; and nothing about the client."""
    account = funded_key(credits=10_000)
    upstream.behaviour = AnswersMessages()
    members: dict[str, Any] = {
        "system": [{"type": "text", "text": "You are brief.", "cache_control": {"type": "ephemeral"}}],
        "thinking": {"type": "adaptive"},
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "output_config": {"effort": "high"},
        "metadata": {"user_id": "u"},
        "tools": [],
    }
    anthropic = {"anthropic-version": "2023-06-01", "anthropic-beta": BETAS, "anthropic-zzz": "z"}
    personal = {"x-claude-code-session-id": "s", "x-app": "cli", "x-conversation-id": "c", "cookie": "c=1"}
    request = messages_request(stream=True, **{**members, "max_tokens": 3200})
    answer = proxy.client(account.key).post(f"{MESSAGES}?beta=true", request, {**anthropic, **personal})
    assert answer.clean
    sent: Exchange = upstream.posts[0]
    assert sent.path == f"{MESSAGES}?beta=true" and sent.json == {**request, "model": "plain"}
    assert {name: sent.headers.get(name) for name in anthropic} == anthropic
    assert not set(personal) & set(sent.headers)
    assert_books(proxy, account, credits=10_000 - 8)


# -- Counting tokens


@pytest.mark.usefixtures("early_in_a_minute")
def test_counting_tokens_is_free_and_counts_as_a_request(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """It needs a key, and no credits; `stream` changes nothing."""
    upstream.behaviour = AnswersByPath(prompt_tokens=44)
    account = funded_key(credits=0, tier="two-a-minute")
    client = proxy.client(account.key)
    for members in ({}, {"stream": True}):
        answer = client.post(f"{COUNT_TOKENS}?beta=true", {"model": "plain", "messages": ASKED, **members})
        assert (answer.status, answer.body) == (200, bytes(upstream.posts[-1].sent))
        assert upstream.posts[-1].path == f"{COUNT_TOKENS}?beta=true"
        assert answer.headers["request-id"] and answer.json() == {"input_tokens": 44}
    assert_messages_error(client.post(COUNT_TOKENS, messages_request()), 429, "rate_limit_exceeded")
    assert "plain" in str(proxy.command("usage", account.name)), "a row a request"
    assert_books(proxy, account, credits=0)


def test_counting_tokens_refuses_what_an_answer_would_refuse(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    client = proxy.client(account.key)
    for members in ({"n_predict": 5}, {"mcp_servers": [{"type": "url", "url": "http://x"}]}, {"Messages": ASKED}):
        answer = client.post(COUNT_TOKENS, {"model": "plain", "messages": ASKED, **members})
        assert "errors" in assert_messages_error(answer, 422, "validation_failed")
    assert_messages_error(client.post(COUNT_TOKENS, messages_request(model="nothing")), 404, "model_not_found")
    assert_books(proxy, account, credits=100)


def test_the_same_path_under_api_is_the_same(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = AnswersMessages()
    for stream in (False, True):
        answer = proxy.client(account.key).post(f"/api{MESSAGES}", messages_request(QUESTION, stream=stream))
        assert answer.status == 200 and upstream.posts[-1].path == MESSAGES
    assert MESSAGES_API.path == MESSAGES
    assert_books(proxy, account, credits=100 - 16)
