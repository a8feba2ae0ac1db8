"""What is refused before it costs anything, in one shape, and in which order."""

import gzip
import json
import socket
from bisect import bisect
from collections.abc import Callable
from typing import Any

import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.attackers import AnswersAtLength, memory_mb
from tests.support.books import assert_books
from tests.support.client import Client, Response, chat_request
from tests.support.errors import assert_error
from tests.support.misbehaviours import Fails
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream
from tests.support.waiting import WAIT_SECONDS

MakeKey = Callable[..., Account]
CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]
DOCUMENTED = {200, 400, 401, 402, 403, 404, 405, 410, 413, 422, 429, 500, 502, 503, 504}


# -- Not JSON


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"not json",
        b"[]",
        b'"text"',
        b"7",
        b"null",
        b'{"model": "plain"',
        b'{"model": "plain"} {}',
        b'{"model": "plain", "messages": [], "x": NaN}',
        b'{"model": "plain", "messages": [], "x": Infinity}',
        b'{"model": "plain", "messages": [], "x": "\\ud800"}',
        b'{"model": "plain", "messages": [], "x": "\xff"}',
        b'{"model": "plain", "x": ' + b"[" * 200_000 + b"]" * 200_000 + b"}",
        b'{"a":' * 200_000 + b"1" + b"}" * 200_000,
        b"\xef\xbb\xbf",
    ],
    ids=lambda body: repr(body[:40]),
)
def test_what_is_no_json_object_is_refused(untouched: Any, body: bytes) -> None:
    for path in (CHAT, "/v1/completions", "/v1/embeddings"):
        assert_error(untouched.post(path, body), 400, "invalid_json", "invalid_request_error")


DEEP = {  # where a client's JSON may be as deep as it likes
    "a member": b'"x": %s',
    "a tool": b'"tools": [{"type": "function", "function": {"name": "f", "parameters": %s}}]',
    "a response format": b'"response_format": {"schema": %s}',
}


@pytest.mark.parametrize("padding", [0, 300_000])
@pytest.mark.parametrize("place", DEEP)
def test_a_body_a_little_too_deep_is_refused_and_no_upstream_is_blamed(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey, place: str, padding: int
) -> None:
    """Between the deepest body that is relayed and one that cannot be decoded are some that cannot be encoded again."""
    account, lines_before = funded_key(credits=100_000), len(proxy.lines)
    upstream.behaviour = backup.behaviour = AnswersAtLength(12)

    def ask(depth: int) -> Response:
        start = json.dumps(chat_request(model="pair", user="x" * padding)).encode()[:-1]
        nested = DEEP[place] % (b"[" * depth + b"]" * depth)
        return proxy.client(account.key).post(CHAT, start + b", " + nested + b"}")

    too_deep = bisect(range(100_000), False, key=lambda depth: ask(depth).status != 200)
    relayed = len(upstream.posts)
    assert relayed > 1
    for depth in range(too_deep, too_deep + 30):
        error = assert_error(ask(depth), 400, "invalid_json", "invalid_request_error")
        assert "nested too deeply" in error["message"]
    assert len(upstream.posts) == relayed
    assert ask(1).status == 200
    assert (len(upstream.posts), len(backup.posts)) == (relayed + 1, 0)
    assert not [line for line in proxy.lines[lines_before:] if "skipped for" in line]
    assert_books(proxy, account, credits=100_000 - 8 * (relayed + 1))


def test_a_body_of_a_million_lists_is_refused(untouched: Any) -> None:
    body = json.dumps(chat_request()).encode()[:-1] + b', "x": [' + b"[]," * 10**6 + b"[]]}"
    error = assert_error(untouched.post(CHAT, body), 400, "invalid_json", "invalid_request_error")
    assert "more than 500000 members and elements" in error["message"]


# -- Members that are missing, of a wrong type, or out of range

WRONG: list[tuple[str, Any]] = [
    ("model", 7),
    ("model", None),
    ("model", ["plain"]),
    ("model", {}),
    ("messages", "hi"),
    ("messages", {}),
    ("messages", 7),
    ("messages", ["hi"]),
    ("stream", "true"),
    ("stream", 1),
    ("stream", []),
    ("stream_options", "yes"),
    ("stream_options", [1]),
    ("stream_options", {"include_usage": "yes"}),
    ("stream_options", {"include_usage": 1}),
    ("n", 0),
    ("n", -1),
    ("n", 129),
    ("n", True),
    ("n", "2"),
    ("n", 1.5),
    ("n", 10**30),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("max_tokens", 2**31 + 1),
    ("max_tokens", True),
    ("max_tokens", "10"),
    ("max_tokens", 1.5),
    ("max_tokens", 10**30),
    ("max_completion_tokens", 0),
    ("max_completion_tokens", False),
    ("max_completion_tokens", "10"),
    ("max_completion_tokens", 2**31 + 1),
]


@pytest.mark.parametrize(("member", "value"), WRONG, ids=lambda value: json.dumps(value)[:40])
def test_a_member_of_a_wrong_type_or_value_is_named(untouched: Any, member: str, value: Any) -> None:
    members = {} if member in ("stream", "stream_options") else {"stream": True}
    body = {**chat_request(**members), **({"stream": True} if member == "stream_options" else {}), member: value}
    assert_validation(untouched.post(CHAT, body), member)


@pytest.mark.parametrize(
    ("path", "body", "member"),
    [
        (CHAT, {"messages": MESSAGES}, "model"),
        (CHAT, {"model": "plain"}, "messages"),
        ("/v1/completions", {"model": "plain"}, "prompt"),
        ("/v1/completions", {"model": "plain", "prompt": 7}, "prompt"),
        ("/v1/completions", {"model": "plain", "prompt": {"a": 1}}, "prompt"),
        ("/v1/completions", {"model": "plain", "prompt": "hi", "best_of": 0}, "best_of"),
        ("/v1/completions", {"model": "plain", "prompt": "hi", "best_of": True}, "best_of"),
        ("/v1/completions", {"model": "plain", "prompt": "hi", "best_of": 129}, "best_of"),
        ("/v1/embeddings", {"model": "embedder"}, "input"),
        ("/v1/embeddings", {"model": "embedder", "input": 7}, "input"),
        ("/v1/embeddings", {"model": "embedder", "input": {"a": 1}}, "input"),
    ],
)
def test_what_a_call_needs_must_be_there(untouched: Any, path: str, body: dict[str, Any], member: str) -> None:
    assert_validation(untouched.post(path, body), member)


def assert_validation(answer: Any, member: str) -> None:
    """422, with the reasons by field."""
    error = assert_error(answer, 422, "validation_failed", "invalid_request_error")
    reasons = answer.json()["errors"]
    assert any(member in name for name in reasons), (member, reasons)
    assert all(isinstance(why, list) and all(isinstance(one, str) and one for one in why) for why in reasons.values())
    assert error["message"]


def test_the_largest_maximum_and_n_are_accepted(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=50_000)
    client = proxy.client(account.key)
    for members in ({"n": 128, "max_tokens": 2}, {"max_tokens": 2**31}, {"n": 1, "max_completion_tokens": 1}):
        assert client.chat(**members).status == 200, members


# -- Members by another name


@pytest.mark.parametrize(
    "twin",
    [
        *("Model", "MODEL", "mo_del", "mo-del", "Stream", "ſtream", "stream_", "Stream_Options", "streamOptions"),
        *("stream-options", "N", "n_", "Best_Of", "bestOf", "max-tokens", "maxTokens", "MAX_TOKENS", "max_to\u212aens"),
        *("maxcompletiontokens", "max-completion-tokens", "Messages", "meſſages", "Prompt", "Input"),
    ],
)
def test_a_member_that_some_server_would_take_for_another_is_refused(untouched: Any, twin: str) -> None:
    """Beside the true one and alone; Go's JSON matches names case-insensitively, also U+017F for `s`."""
    for value in (1, "plain", True, MESSAGES):
        assert_validation(untouched.post(CHAT, {**chat_request(), twin: value}), twin)


@pytest.mark.parametrize("twin", ["Include_Usage", "includeUsage", "include-usage", "INCLUDE_USAGE"])
def test_a_stream_option_that_some_server_would_take_for_another_is_refused(untouched: Any, twin: str) -> None:
    answer = untouched.chat(stream=True, stream_options={twin: False})
    assert_error(answer, 422, "validation_failed", "invalid_request_error")


@pytest.mark.parametrize("name", ["n_predict", "num_predict", "max_new_tokens"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_other_names_for_the_maximum_are_refused(untouched: Any, name: str, path: str) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    for value in (5, -1, None, "x"):
        assert_validation(untouched.post(path, {"model": "plain", **prompt, name: value}), name)


def test_a_duplicate_member_reaches_the_upstream_once_as_priced(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    message = json.dumps(MESSAGES)
    body = f'{{"model": "dear", "max_tokens": 50000, "messages": {message}, "max_tokens": 2, "model": "half"}}'
    answer = proxy.client(account.key).post(CHAT, body.encode())
    assert answer.status == 200
    sent = upstream.posts[0].body
    assert (sent.count(b"max_tokens"), sent.count(b'"model"')) == (1, 1)
    assert (upstream.posts[0].json["max_tokens"], upstream.posts[0].json["model"]) == (2, "half")
    assert_books(proxy, account, credits=1000 - 3.5)


def test_two_maxima_are_both_forwarded_as_the_smaller(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    assert proxy.client(account.key).chat(max_tokens=2, max_completion_tokens=900).status == 200
    sent = upstream.posts[0].json
    assert (sent["max_tokens"], sent["max_completion_tokens"]) == (2, 2)
    assert_books(proxy, account, credits=1000 - 7)


def test_all_other_members_pass_untouched(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    others = {
        "temperature": 0.7,
        "seed": 2**70,
        "stop": ["\u2028", "é", "\\"],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"Model": 1, "n": "x"}}}],
        "response_format": {"type": "json_object"},
        "logit_bias": {"50256": -100},
        "user": None,
        "metadata": {"n_predict": 5, "nested": [[[]]]},
        "x_vendor": {"Max_Tokens": True},
        "top_logprobs": 0,
        "": "empty",
    }
    answer = proxy.client(funded_key(credits=100_000).key).chat(**others)
    assert answer.status == 200
    assert upstream.posts[0].json == {**chat_request(), **others}


def test_a_body_may_be_compressed_and_a_bomb_is_too_large(running_proxy: Callable[..., RunningProxy]) -> None:
    proxy = running_proxy(options={"max_body_mb": 1})
    account = proxy.add_account(100)
    client, header = proxy.client(account.key), {"content-encoding": "gzip"}
    bomb = gzip.compress(b'{"model": "plain", "x": "' + b" " * (50 << 20) + b'"}')
    assert_error(client.post(CHAT, bomb, header), 413, "body_too_large", "invalid_request_error")
    assert client.post(CHAT, gzip.compress(json.dumps(chat_request()).encode()), header).status in (200, 400, 415)
    big = chat_request("x" * (2 << 20))
    assert_error(client.post(CHAT, big), 413, "body_too_large", "invalid_request_error")
    assert len(proxy.upstream.posts) <= 1
    assert proxy.account(account.name)["held"] == 0


def test_a_body_of_40_megabytes_is_too_large(untouched: Any) -> None:
    answer = untouched.chat("x" * (40 << 20))
    assert_error(answer, 413, "body_too_large", "invalid_request_error")


def test_a_body_below_the_limit_is_relayed(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=100_000_000)
    assert proxy.client(account.key).chat("x" * (20 << 20)).status == 200
    assert len(upstream.posts[0].json["messages"][0]["content"]) == 20 << 20
    assert_books(proxy, account, credits=100_000_000 - 8)


def test_large_bodies_that_are_refused_leave_nothing_in_memory(proxy: RunningProxy, untouched: Client) -> None:
    wrong: list[dict[str, Any]] = [{"model": "nothing"}, {"n": "two"}]
    bodies = [json.dumps(chat_request("x" * (8 << 20), **members)).encode() for members in wrong]
    assert [untouched.post(CHAT, body).status for body in bodies] == [404, 422]
    before = memory_mb(proxy)
    for body in bodies * 6:
        untouched.post(CHAT, body)
    assert memory_mb(proxy) - before < 40


# -- The prompt's estimate, as the hold shows it


@pytest.mark.parametrize(
    ("path", "body", "estimate"),
    [
        (CHAT, {"messages": MESSAGES}, 5),  # 2 bytes and a message: 4.5
        (CHAT, {"messages": [{"role": "user", "content": "é" * 8}]}, 8),  # bytes, not letters
        (CHAT, {"messages": [*MESSAGES, *MESSAGES]}, 9),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "abcd"}]}]}, 5),
        ("/v1/completions", {"prompt": "x" * 40}, 10),
        ("/v1/completions", {"prompt": [1, 2, 3, 4, 5]}, 5),
        ("/v1/completions", {"prompt": "x" * 40_000}, 10_000),
    ],
)
def test_what_a_prompt_is_estimated_at_is_required_twice(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, path: str, body: dict[str, Any], estimate: int
) -> None:
    account = funded_key(credits=1)
    error = assert_error(proxy.client(account.key).post(path, {"model": "plain", **body}), 402, "insufficient_credits")
    assert error["required"] == 2 * estimate + 1
    assert not upstream.posts


def test_an_image_counts_as_an_image_and_not_as_its_bytes(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1)
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 500_000}}
    content = [{"type": "text", "text": "abcd"}, image]
    answer = proxy.client(account.key).chat(content)  # type: ignore[arg-type]
    assert assert_error(answer, 402, "insufficient_credits")["required"] == 2 * (1 + 4 + 1024) + 1


def test_a_thousand_prompts_are_paid_for_a_thousand_times(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=3000)
    client = proxy.client(account.key)
    body = {"model": "plain", "prompt": ["abcd"] * 1000, "max_tokens": 5000}
    answer = client.post("/v1/completions", body)
    assert answer.status == 200
    assert upstream.posts[0].json["max_tokens"] == 1, "3,000 credits pay for the prompts and 1 token each"
    poor = funded_key(credits=2999)
    assert_error(proxy.client(poor.key).post("/v1/completions", body), 402, "insufficient_credits")


def test_a_prompt_counts_at_most_as_the_context_window(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=1)
    answer = proxy.client(account.key).chat("x" * 100_000, model="windowed")
    assert assert_error(answer, 402, "insufficient_credits")["required"] == 2 * 4096 + 1


def test_a_large_prompt_needs_its_credits_before_it_is_sent(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    tools = [{"type": "function", "function": {"name": "f", "description": "x" * 4000}}]
    for members in ({"content": "x" * 400}, {"tools": tools}, {"response_format": {"schema": "x" * 4000}}):
        assert_error(proxy.client(account.key).chat(**members), 402, "insufficient_credits")
    assert not upstream.posts
    assert_books(proxy, account, credits=100)


# -- Paths, methods, headers


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/nothing", "/v2/models", "/v1/chat", "/api", "/api/billing", "/x" * 500]
)
def test_an_unknown_path_is_a_404_in_our_shape(untouched: Any, path: str) -> None:
    assert_error(untouched.get(path), 404, "not_found", "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, "POST"),
        ("PUT", "/v1/completions", "POST"),
        ("DELETE", "/v1/embeddings", "POST"),
        ("POST", "/v1/models", "GET"),
        ("PATCH", "/v1/models/plain", "GET"),
        ("POST", "/api/billing/subscription", "GET"),
        ("DELETE", "/health", "GET"),
        ("GET", "/api/v1/chat/completions", "POST"),
    ],
)
def test_a_wrong_method_says_which_are_allowed(untouched: Any, method: str, path: str, allowed: str) -> None:
    answer = untouched.request(method, path)
    assert_error(answer, 405, "method_not_allowed", "invalid_request_error")
    assert allowed in [name.strip() for name in answer.headers["allow"].split(",")]


def test_the_earliest_refusal_wins(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    """authenticate, parse, find the model, hold."""
    poor, suspended = funded_key(credits=0), funded_key(credits=10)
    client = proxy.client(poor.key)
    assert_error(client.post(CHAT, b"{"), 400, "invalid_json")
    assert_error(client.post(CHAT, {"model": "nothing", "messages": 7}), 422, "validation_failed")
    assert_error(client.chat(model="nothing"), 404, "model_not_found")
    assert_error(client.chat(model="retired"), 410, "model_retired")
    assert_error(client.chat(), 402, "insufficient_credits")
    proxy.command("account", "suspend", suspended.name)
    assert_error(proxy.client(suspended.key).chat(), 403, "account_suspended")
    assert not upstream.posts
    assert_books(proxy, poor, credits=0)


def test_every_answer_has_a_request_id_of_its_own(proxy: RunningProxy, upstream: FakeUpstream, payer: Account) -> None:
    client = proxy.client(payer.key)
    answers = [client.chat(), client.chat(stream=True), client.post(CHAT, b"{"), client.get("/v1/models")]
    answers += [client.get("/health"), client.get("/nothing"), proxy.client(None).get("/v1/models")]
    upstream.behaviour = Fails(400)
    answers += [client.chat(), proxy.client("unknown").chat(), client.get("/metrics")]
    ids = [answer.headers["x-request-id"] for answer in answers]
    assert all(ids) and len(set(ids)) == len(ids)
    proxy.wait_for_line(ids[0])  # the log knows it


def test_a_header_that_we_echo_cannot_inject_another(proxy: RunningProxy, payer: Account) -> None:
    answer = proxy.client(payer.key).chat(model="x\r\nset-cookie: a=b\r\n\r\n")
    assert_error(answer, 404, "model_not_found")
    assert answer.headers["set-cookie"] is None


@pytest.mark.parametrize(
    "raw",
    [
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        b"POST /v1/embeddings HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length : 5\r\n\r\nhello",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: +5\r\n\r\nhello",
        b"GARBAGE\r\n\r\n",
    ],
)
def test_a_smuggled_request_is_refused(proxy: RunningProxy, upstream: FakeUpstream, raw: bytes) -> None:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=WAIT_SECONDS) as connection:
        connection.sendall(raw)
        status = connection.recv(64).split(b" ")[1]
    assert status in (b"400", b"401")
    assert not upstream.posts


@pytest.mark.parametrize(
    "target",
    [
        "/v1/models/../chat/completions",
        "/v1/models/%2e%2e/%2e%2e/health",
        "http://elsewhere.example/v1/models",
        "//v1/models",
    ],
)
def test_a_crooked_path_reaches_nothing_else(
    proxy: RunningProxy, upstream: FakeUpstream, payer: Account, target: str
) -> None:
    head = f"GET {target} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {payer.key}\r\nconnection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=WAIT_SECONDS) as connection:
        connection.sendall(head.encode())
        answer = connection.makefile("rb").read()
    assert answer.split(b" ")[1] in (b"200", b"400", b"404", b"405"), answer[:300]
    assert not upstream.posts


# -- What the official client makes of it


@pytest.mark.parametrize(
    ("model", "members", "exception", "code"),
    [
        ("nothing", {}, openai.NotFoundError, "model_not_found"),
        ("plain", {"n": 1000}, openai.UnprocessableEntityError, "validation_failed"),
        ("retired", {}, openai.APIStatusError, "model_retired"),
        ("absent", {}, openai.InternalServerError, "upstream_unavailable"),
    ],
)
def test_the_official_client_raises_the_right_class(
    proxy: RunningProxy, payer: Account, model: str, members: dict[str, Any], exception: Any, code: str
) -> None:
    with proxy.openai(payer.key) as client:
        for stream in (False, True):
            with pytest.raises(exception) as raised:
                client.chat.completions.create(model=model, messages=MESSAGES, stream=stream, **members)  # type: ignore
            assert raised.value.code == code
            assert raised.value.request_id


def test_the_official_client_does_not_retry_without_credits(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=0)
    with (
        proxy.openai(account.key).with_options(max_retries=5) as client,
        pytest.raises(openai.APIStatusError) as raised,
    ):
        client.embeddings.create(model="embedder", input="hi")
    assert (raised.value.status_code, raised.value.code) == (402, "insufficient_credits")


def test_the_official_client_embeds(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    with proxy.openai(account.key) as client:
        answer = client.embeddings.create(model="embedder", input=["one", "two"], encoding_format="float")
    assert [row.embedding for row in answer.data] == [[0.25, 0.5]] * 2
    assert_books(proxy, account, credits=97.5)


# -- Health and metrics


def test_health_needs_no_key(proxy: RunningProxy) -> None:
    assert proxy.client(None).get("/health").status == 200


def test_metrics_are_for_this_machine_only(proxy: RunningProxy) -> None:
    client = proxy.client(None)
    answer = client.get("/metrics")
    assert answer.status == 200 and b"# TYPE" in answer.body
    for name in ("X-Forwarded-For", "Forwarded"):
        refused = client.get("/metrics", {name: "for=127.0.0.1"})
        assert 400 <= refused.status < 500 and b"# TYPE" not in refused.body


def test_metrics_never_show_keys_or_unknown_models(proxy: RunningProxy, payer: Account) -> None:
    client = proxy.client(payer.key)
    assert client.chat(model="a-model-that-nobody-has").status == 404
    text = client.get("/metrics").body.decode()
    assert payer.key not in text and "a-model-that-nobody-has" not in text


# -- Anything at all

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)
MEMBERS = ["model", "messages", "stream", "stream_options", "n", "best_of", "max_tokens", "max_completion_tokens"]
MEMBERS += ["prompt", "input", "tools", "functions", "response_format", "Model", "n_predict"]
PART = st.fixed_dictionaries({}, optional={"type": JSON, "text": JSON, "image_url": JSON})
MESSAGE = st.fixed_dictionaries({}, optional={"role": JSON, "content": JSON | st.lists(PART), "tool_calls": JSON})
BODIES = st.builds(
    lambda sound, odd, messages, model: {**sound, **odd, **messages, **model},
    st.just({"model": "half", "messages": MESSAGES, "prompt": "hi", "input": "hi"}),
    st.dictionaries(st.sampled_from(MEMBERS), JSON, max_size=3),
    st.fixed_dictionaries({}, optional={"messages": st.lists(MESSAGE, max_size=3)}),
    st.fixed_dictionaries({}, optional={"model": st.sampled_from(["plain", "gratis", "thousandth", "echo"])}),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(body=BODIES, path=st.sampled_from([CHAT, "/v1/completions", "/v1/embeddings"]))
def test_any_json_gets_a_documented_answer(
    proxy: RunningProxy, upstream: FakeUpstream, payer: Account, body: dict[str, Any], path: str
) -> None:
    upstream.behaviour = Fails(400)  # what a server would say to most of this; odd requests must still get there whole
    encoded = json.dumps(body).encode("utf-8", "surrogatepass")
    answer = proxy.client(payer.key).post(path, encoded)
    assert answer.status in DOCUMENTED - {500}, (answer.status, answer.body)
    if answer.status != 200:
        assert answer.error["message"] and answer.headers["x-request-id"]


def test_after_all_that_nothing_is_held(proxy: RunningProxy, payer: Account) -> None:
    shown = proxy.account(payer.name)
    assert shown["held"] == 0
    assert_books(proxy, payer, credits=shown["credits"])
