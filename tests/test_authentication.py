"""Who may come in: an unknown key only ever sees 401, and no key goes where it does not belong."""

import socket
from collections.abc import Callable
from typing import Any

import openai
import pytest

from tests.support.answers import Answers
from tests.support.books import assert_books
from tests.support.client import Client, chat_request
from tests.support.errors import assert_error
from tests.support.files import UPSTREAM_KEY
from tests.support.misbehaviours import Fails
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream
from tests.support.waiting import WAIT_SECONDS

MakeKey = Callable[..., Account]
UNKNOWN_KEY = "sk-" + "x" * 43
CALLS: list[tuple[str, str, Any]] = [
    ("POST", "/v1/chat/completions", chat_request()),
    ("POST", "/v1/completions", {"model": "plain", "prompt": "hi"}),
    ("POST", "/v1/embeddings", {"model": "embedder", "input": "hi"}),
    ("POST", "/api/v1/chat/completions", chat_request()),
    ("GET", "/v1/models", None),
    ("GET", "/v1/models/plain", None),
    ("GET", "/api/v1/models", None),
    ("GET", "/api/billing/subscription", None),
]


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "missing_api_key"),
        ("", "missing_api_key"),
        ("Bearer", "missing_api_key"),
        ("Bearer ", "missing_api_key"),
        ("bearer {key}", "missing_api_key"),
        ("BEARER {key}", "missing_api_key"),
        ("Basic {key}", "missing_api_key"),
        ("{key}", "missing_api_key"),
        (f"Bearer {UNKNOWN_KEY}", "invalid_api_key"),
        ("Bearer {key}x", "invalid_api_key"),
        ("Bearer x", "invalid_api_key"),
    ],
)
def test_without_a_known_key_there_is_only_401(
    proxy: RunningProxy,
    upstream: FakeUpstream,
    somebody: Account,
    method: str,
    path: str,
    body: Any,
    header: str,
    code: str,
) -> None:
    headers = {} if header is None else {"authorization": header.format(key=somebody.key)}
    answer = proxy.client(None).request(method, path, body, headers)
    assert_error(answer, 401, code, "authentication_error")
    assert somebody.key not in answer.body.decode() and UNKNOWN_KEY not in answer.body.decode()
    assert answer.headers["x-ratelimit-limit"] is None
    assert not upstream.posts


@pytest.fixture(scope="module")
def somebody(shared: Any) -> Account:
    """An account that these tests only look at."""
    account = shared.proxy.add_account(100)
    assert isinstance(account, Account)
    return account


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_a_known_key_comes_in(proxy: RunningProxy, somebody: Account, method: str, path: str, body: Any) -> None:
    assert proxy.client(somebody.key).request(method, path, body).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"not json",
        b"[" * 100_000,
        b"{}",
        b'{"model": "nonsense", "messages": []}',
        b'{"model": "retired", "messages": [{"role": "user", "content": "hi"}]}',
        b'{"model": "plain", "n_predict": 5, "Model": "x"}',
        b'{"model": "plain", "messages": "' + b"x" * 200_000 + b'"}',
        b"x" * (33 << 20),
    ],
    ids=["no json", "deep", "empty", "no model", "retired", "twins", "200 KB", "33 MB"],
)
def test_an_unknown_key_sees_401_whatever_it_sends(proxy: RunningProxy, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        assert_error(proxy.client(UNKNOWN_KEY).post(path, body), 401, "invalid_api_key", "authentication_error")


def test_without_a_key_the_body_is_not_waited_for(proxy: RunningProxy) -> None:
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=WAIT_SECONDS) as connection:
        connection.sendall(head.encode())
        assert connection.recv(12) == b"HTTP/1.1 401"


def test_the_official_client_raises_its_authentication_error(proxy: RunningProxy) -> None:
    with proxy.openai(UNKNOWN_KEY) as client, pytest.raises(openai.AuthenticationError) as raised:
        client.models.list()
    assert (raised.value.code, raised.value.status_code) == ("invalid_api_key", 401)
    assert raised.value.request_id == raised.value.response.headers["x-request-id"]


def test_a_revoked_key_ends_with_the_next_request(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    other = proxy.command("key", "add", account.name)
    assert proxy.client(account.key).chat().status == 200
    proxy.command("key", "revoke", account.key_id)
    for answer in (proxy.client(account.key).chat(), proxy.client(account.key).get("/v1/models")):
        assert_error(answer, 401, "revoked_api_key", "authentication_error")
    assert proxy.client(other["key"]).chat().status == 200
    listed = {row["key_id"]: row["revoked_at"] for row in proxy.command("key", "list", account.name)}
    assert bool(listed[account.key_id]) and not listed[other["key_id"]]
    assert_books(proxy, account, credits=100 - 16)


def test_a_suspended_account_is_refused_until_it_is_resumed(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    client = proxy.client(account.key)
    proxy.command("account", "suspend", account.name)
    assert_error(client.chat(), 403, "account_suspended", "permission_error")
    with proxy.openai(account.key) as official, pytest.raises(openai.PermissionDeniedError):
        official.embeddings.create(model="embedder", input="hi")
    assert proxy.account(account.name)["status"] == "suspended"
    assert not upstream.posts
    proxy.command("account", "resume", account.name)
    assert client.chat().status == 200
    assert_books(proxy, account, credits=92)


def test_the_time_of_a_keys_last_use_is_noted(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    (before,) = proxy.command("key", "list", account.name)
    assert proxy.client(account.key).chat().status == 200
    (after,) = proxy.command("key", "list", account.name)
    assert (before["last_used_at"], bool(after["last_used_at"])) == (None, True)


# -- Keys and headers stay on their side


def test_the_clients_key_never_reaches_an_upstream(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    sent = {
        "x-api-key": account.key,
        "cookie": "a=b",
        "openai-organization": "org",
        "x-forwarded-for": "1.2.3.4",
        "x-anything": "else",
        "user-agent": "spy",
        "accept-encoding": "gzip",
    }
    answer = proxy.client(account.key).post("/v1/chat/completions", chat_request(), sent)
    assert answer.status == 200
    got = upstream.posts[0].headers
    assert got["authorization"] == f"Bearer {UPSTREAM_KEY}"
    assert not {"x-api-key", "cookie", "openai-organization", "x-forwarded-for", "x-anything"} & set(got)
    assert account.key not in str(got) and "spy" not in str(got)


def test_what_the_config_sets_and_what_the_client_accepts_reaches_the_upstream(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    client = proxy.client(funded_key(credits=100).key)
    assert client.post("/v1/chat/completions", chat_request(), {"accept": "text/event-stream"}).status == 200
    got = upstream.posts[0].headers
    assert (got["x-team"], got["content-type"], got["accept"]) == ("blue", "application/json", "text/event-stream")


def test_an_upstream_without_a_key_gets_none(proxy: RunningProxy, backup: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    assert proxy.client(account.key).chat(model="absent-pair").status == 200
    assert "authorization" not in backup.posts[0].headers


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstreams_headers_reach_the_client_only_if_they_are_on_the_list(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    passed = {"cache-control": "no-store", "openai-processing-ms": "12", "x-accel-buffering": "no"}
    dropped = {
        "set-cookie": "a=b",
        "server": "secret-server",
        "x-request-id": "theirs",
        "openai-organization": "theirs",
        "x-ratelimit-limit": "4711",
        "access-control-allow-origin": "*",
        "strict-transport-security": "max-age=1",
        "x-upstream-secret": UPSTREAM_KEY,
    }
    upstream.behaviour = Answers(headers={**passed, **dropped})
    answer = proxy.client(funded_key(credits=100).key).chat(stream=stream)
    assert {name: answer.headers[name] for name in passed} == passed
    assert not [name for name, value in dropped.items() if answer.headers[name] == value]


@pytest.mark.parametrize("status", [401, 402, 403, 407])
def test_what_is_wrong_with_our_key_is_not_the_clients_business(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: int
) -> None:
    account = funded_key(credits=100)
    message = f"Incorrect API key provided: {UPSTREAM_KEY}"
    upstream.behaviour = Fails(status, {"error": {"message": message, "code": "invalid_api_key"}})
    answer = proxy.client(account.key).chat()
    assert_error(answer, 502, "upstream_error", "upstream_error")
    assert UPSTREAM_KEY not in answer.body.decode() + answer.headers.as_string() + proxy.output
    assert_books(proxy, account, credits=100)


def test_one_account_never_sees_another(proxy: RunningProxy, funded_key: MakeKey) -> None:
    rich, poor = funded_key(credits=1000), funded_key(credits=10)
    clients: list[Client] = [proxy.client(account.key) for account in (rich, poor)]
    assert clients[0].chat().status == 200
    assert [client.balance for client in clients] == [992, 10]
    assert_books(proxy, poor, credits=10)
