"""Keys, headers and the choice of an upstream, on every API: `serves`, `auth`, kinds of models, rerank."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.api_calls import (
    ASKED,
    BOTH,
    CHAT,
    MESSAGES,
    RESPONSES,
    Api,
    assert_messages_error,
    messages_request,
    responses_request,
)
from tests.support.api_upstreams import AnswersByPath, AnswersMessages
from tests.support.books import assert_books
from tests.support.client import chat_request
from tests.support.errors import assert_error
from tests.support.files import UPSTREAM_KEY
from tests.support.misbehaviours import Fails
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]
APIS = [pytest.param(api, id=api.path.rpartition("/")[2]) for api in BOTH]
RERANK = "/v1/rerank"
DOCUMENTS = ["x" * 6, "x" * 6]


def rerank_request(model: str = "plain", **members: Any) -> dict[str, Any]:
    """Estimated at 4."""
    return {"model": model, "query": "xxxx", "documents": DOCUMENTS, **members}


CALLS: list[tuple[str, str, Any]] = [
    ("POST", MESSAGES, messages_request()),
    ("POST", f"{MESSAGES}/count_tokens", {"model": "plain", "messages": ASKED}),
    ("POST", RESPONSES, responses_request()),
    ("POST", f"{RESPONSES}/input_tokens", responses_request()),
    ("POST", RERANK, rerank_request()),
    ("POST", CHAT, chat_request()),
    ("POST", "/v1/completions", {"model": "plain", "prompt": "hi"}),
    ("POST", "/v1/embeddings", {"model": "embedder", "input": "hi"}),
    ("GET", "/v1/models", None),
    ("GET", "/api/v1/models/plain", None),
    ("GET", "/api/billing/subscription", None),
]
UNKNOWN_KEY = "sk-" + "x" * 43


# -- A client's key


@pytest.fixture
def friend(proxy: RunningProxy, funded_key: MakeKey) -> Account:
    proxy.upstream.behaviour = AnswersByPath()
    return funded_key(credits=10_000)


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_a_key_may_come_in_either_header_or_the_same_in_both(
    proxy: RunningProxy, friend: Account, method: str, path: str, body: Any
) -> None:
    bearer, other = {"authorization": f"Bearer {friend.key}"}, {"x-api-key": friend.key}
    for headers in (bearer, other, {**bearer, **other}):
        assert proxy.client(None).request(method, path, body, headers).status == 200, headers
    assert_books(proxy, friend, proxy.client(friend.key).balance)


@pytest.mark.parametrize(("method", "path", "body"), CALLS)
def test_two_keys_are_one_too_many(
    proxy: RunningProxy, upstream: FakeUpstream, friend: Account, method: str, path: str, body: Any
) -> None:
    """Also where both are known: whose request would it be?"""
    second = proxy.command("key", "add", friend.name)["key"]
    refuse = assert_messages_error if path.startswith(MESSAGES) else assert_error
    for first, other, code in (
        (friend.key, UNKNOWN_KEY, "invalid_api_key"),
        (UNKNOWN_KEY, friend.key, "invalid_api_key"),
        (friend.key, second, "invalid_api_key"),
    ):
        headers = {"authorization": f"Bearer {first}", "x-api-key": other}
        refuse(proxy.client(None).request(method, path, body, headers), 401, code)
    refuse(proxy.client(None).request(method, path, body, {"x-api-key": UNKNOWN_KEY}), 401, "invalid_api_key")
    refuse(proxy.client(None).request(method, path, body, {"x-api-key": ""}), 401, "missing_api_key")
    assert not upstream.posts
    assert_books(proxy, friend, credits=10_000)


# -- The upstream's key, and what else reaches it

ANTHROPIC = {"anthropic-version": "2023-06-01", "anthropic-beta": "a,b"}


HOUSE_MODELS: dict[str, Any] = {
    "keyed": {"tier": "one", "upstream": "keyed"},
    "talker": {"tier": "one", "upstream": "chatty"},
    "either": {"tier": "one", "upstream": ["chatty", "main"]},
    "messenger": {"tier": "one", "upstream": "messenger"},
    "split": {"tier": "one", "upstream": ["chatty", "messenger"]},
    "reranker": {"tier": "half", "upstream": "main", "kind": "rerank"},
    "chatter": {"tier": "one", "upstream": "main", "kind": "chat"},
}


@pytest.fixture(scope="module")
def arranged(module_proxy: Callable[..., RunningProxy], loop_thread: Any) -> Any:
    """A proxy whose upstreams differ in what they serve: `main`, and another behind all other doors."""
    other = FakeUpstream(loop_thread)
    own = {"anthropic-version": "2020-01-01", "x-team": "blue"}
    doors = {
        "chatty": {"base_url": other.url, "serves": ["chat/completions", "completions"]},
        "keyed": {"base_url": other.url, "api_key": UPSTREAM_KEY, "auth": "x-api-key", "headers": own},
        "messenger": {"base_url": other.url, "serves": ["messages"]},
    }
    yield module_proxy(upstreams=doors, models=HOUSE_MODELS, behaviour=AnswersByPath()), other
    other.close()
    assert not other.errors, other.errors


@pytest.fixture
def house(arranged: tuple[RunningProxy, FakeUpstream]) -> Any:
    """The proxy, its upstream that speaks everything, and the one behind all other doors."""
    proxy, other = arranged
    for server in (proxy.upstream, other):
        server.reset(AnswersByPath())
    yield proxy, proxy.upstream, other
    proxy.assert_well()


@pytest.mark.parametrize(("path", "body"), [(path, body) for method, path, body in CALLS if method == "POST"][:6])
def test_the_upstreams_key_goes_as_its_config_says(
    proxy: RunningProxy, upstream: FakeUpstream, friend: Account, house: Any, path: str, body: Any
) -> None:
    """And the client's nowhere, whichever header it came in."""
    arranged, _, chatty = house
    guest = arranged.add_account(1000)
    for where, server, account, model in (
        (proxy, upstream, friend, "plain"),
        (arranged, chatty, guest, "keyed"),
    ):
        for headers in ({"x-api-key": account.key}, {"authorization": f"Bearer {account.key}"}):
            assert where.client(None).post(path, {**body, "model": model}, headers).status == 200
            sent = server.posts[-1].headers
            keys = {name: sent[name] for name in ("authorization", "x-api-key") if name in sent}
            expected = {"authorization": f"Bearer {UPSTREAM_KEY}"} if model == "plain" else {"x-api-key": UPSTREAM_KEY}
            assert keys == expected
            assert account.key not in str(sent)
    assert_books(arranged, guest, arranged.client(guest.key).balance)


@pytest.mark.parametrize(("path", "body"), [(path, body) for method, path, body in CALLS if method == "POST"][:6])
def test_headers_of_anthropics_pass_and_the_configs_own_win(house: Any, path: str, body: Any) -> None:
    proxy, main, chatty = house
    account = proxy.add_account(1000)
    client = proxy.client(account.key)
    headers = {**ANTHROPIC, "x-conversation-id": "c", "openai-organization": "o", "x-anthropic": "no prefix"}
    assert client.post(path, body, headers).status == 200
    sent = main.posts[-1].headers
    assert {name: sent.get(name) for name in headers} == {**dict.fromkeys(headers), **ANTHROPIC}
    assert client.post(path, {**body, "model": "keyed"}, headers).status == 200
    sent = chatty.posts[-1].headers
    assert (sent["anthropic-version"], sent["anthropic-beta"], sent["x-team"]) == ("2020-01-01", "a,b", "blue")
    assert_books(proxy, account, client.balance)


def test_a_query_passes_on_messages_alone(house: Any) -> None:
    proxy, main, _ = house
    client = proxy.client(proxy.add_account(1000).key)
    for method, path, body in CALLS[:8]:
        assert client.request(method, f"{path}?beta=true", body).status == 200
        query = "?beta=true" if path.startswith(MESSAGES) else ""
        assert main.posts[-1].path == path + query


def test_a_query_reaches_the_upstream_byte_for_byte(house: Any) -> None:
    proxy, main, _ = house
    account = proxy.add_account(1000)
    client = proxy.client(account.key)
    queries = ["x=%20a%23b&beta=true", "x=a+b&y=%2B%26%3d%3D", "beta=true&beta=%C3%A9%e9&z=/?:@", "x=%00%0d%0aX:%201"]
    for query in queries:
        assert client.post(f"{MESSAGES}?{query}", messages_request()).status == 200
        assert main.posts[-1].path == f"{MESSAGES}?{query}"
    assert_books(proxy, account, credits=1000 - 8 * len(queries))


# -- What an upstream serves


@pytest.mark.parametrize("api", APIS)
def test_an_upstream_that_does_not_serve_an_api_is_passed_over(house: Any, api: Api) -> None:
    proxy, main, chatty = house
    account = proxy.add_account(1000)
    client = proxy.client(account.key)
    assert api.ask(client, model="either").status == 200
    assert (len(main.posts), len(chatty.posts)) == (1, 0)
    assert client.chat(model="either").status == 200
    assert (len(main.posts), len(chatty.posts)) == (1, 1), "chat goes to the first"
    assert_books(proxy, account, credits=1000 - 16)


@pytest.mark.parametrize("api", APIS)
def test_where_no_upstream_serves_an_api_the_error_names_what_there_is(house: Any, api: Api) -> None:
    proxy, main, chatty = house
    account = proxy.add_account(1000)
    answer = api.ask(proxy.client(account.key), model="talker")
    assert answer.status == 404
    message = answer.json()["error"]["message"]
    assert "talker" in message and "chat/completions" in message and "embeddings" not in message
    if api.path == MESSAGES:
        assert_messages_error(answer, 404)
    assert not main.posts and not chatty.posts
    assert_books(proxy, account, credits=1000)


def test_who_serves_messages_counts_their_tokens_too(house: Any) -> None:
    proxy, _, chatty = house
    account = proxy.add_account(1000)
    client = proxy.client(account.key)
    for model in ("messenger", "split"):
        assert client.post(MESSAGES, messages_request(model=model)).status == 200
        assert client.post(f"{MESSAGES}/count_tokens", {"model": model, "messages": ASKED}).status == 200
        assert client.post(RESPONSES, responses_request(model=model)).status == 404
    assert client.chat(model="messenger").status == 404
    assert client.chat(model="split").status == 200
    assert len(chatty.posts) == 5
    assert_books(proxy, account, credits=1000 - 3 * 8)


def test_an_api_that_there_is_not_is_named_in_the_config(running_proxy: Callable[..., RunningProxy]) -> None:
    proxy = running_proxy()
    text = proxy.config.read_text()
    for wrong, right in (("serves: [massages]", "messages"), ("auth: basic", "bearer")):
        door = f"  wrong:\n    base_url: http://127.0.0.1:9/v1\n    {wrong}\n"
        path = proxy.folder / "wrong.yaml"
        path.write_text(text.replace("upstreams:\n", f"upstreams:\n{door}"))
        done = proxy.commands.run("--config", str(path), "check")
        assert done.returncode == 2 and right in done.stderr, done.stderr


def test_a_path_that_there_is_not_lists_the_apis_that_there_are(proxy: RunningProxy, friend: Account) -> None:
    error = assert_error(proxy.client(friend.key).post("/v1/completion", {}), 404, "not_found")
    for name in ("chat/completions", "completions", "embeddings", "rerank", "responses", "messages"):
        assert name in error["message"]
    assert_books(proxy, friend, credits=10_000)


@pytest.mark.parametrize("api", APIS)
def test_what_the_first_upstream_cannot_do_the_second_does_and_it_is_paid_once(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, friend: Account, api: Api
) -> None:
    backup.behaviour = AnswersByPath()
    for status in (500, 503, 429, 401):
        upstream.behaviour = Fails(status)
        for stream in (False, True):
            answer = api.ask(proxy.client(friend.key), model="pair", stream=stream)
            assert (answer.status, answer.clean) == (200, True)
    assert (len(upstream.posts), len(backup.posts)) == (8, 8)
    assert_books(proxy, friend, credits=10_000 - 8 * 8)


# -- Kinds

KINDS: dict[str, set[str]] = {  # a model, and what it takes
    "reranker": {RERANK},
    "embedder": {"/v1/embeddings"},
    "chatter": {MESSAGES, f"{MESSAGES}/count_tokens", RESPONSES, f"{RESPONSES}/input_tokens", CHAT, "/v1/completions"},
    "plain": {path for method, path, _ in CALLS if method == "POST"},
}


@pytest.mark.parametrize("model", KINDS)
def test_a_model_takes_what_its_kind_says(house: Any, model: str) -> None:
    proxy, main, _ = house
    account = proxy.add_account(1000)
    client = proxy.client(account.key)
    for _, path, body in [call for call in CALLS if call[0] == "POST"]:
        answer = client.post(path, {**body, "model": model})
        if path in KINDS[model]:
            assert answer.status == 200, path
            continue
        (assert_messages_error if path.startswith(MESSAGES) else assert_error)(answer, 422, "validation_failed")
    assert {exchange.path for exchange in main.posts} == KINDS[model]
    assert_books(proxy, account, client.balance)


# -- Rerank

RERANK_USAGES: dict[str, tuple[Any, float]] = {
    "prompt_tokens": ({"prompt_tokens": 31, "total_tokens": 99}, 31),
    "total_tokens": ({"total_tokens": 31}, 31),
    "a null before it": ({"prompt_tokens": None, "total_tokens": 31}, 31),
    "none": (None, 4),
    "no number": ({"prompt_tokens": "31"}, 4),
}


@pytest.mark.parametrize("name", RERANK_USAGES)
def test_a_rerank_costs_its_prompt(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str) -> None:
    usage, price = RERANK_USAGES[name]
    account = funded_key(credits=1000)
    body = {"results": [{"index": 1, "relevance_score": 1.5}, {"index": 0, "relevance_score": -0.5}], "usage": usage}

    async def ranks(exchange: Any) -> None:
        await exchange.answer(json.dumps(body).encode())

    upstream.behaviour = ranks
    for prefix in ("", "/api"):
        answer = proxy.client(account.key).post(f"{prefix}{RERANK}", rerank_request(top_n=2))
        assert (answer.json(), answer.headers["x-credits-charged"]) == (body, str(price))
        assert upstream.posts[-1].json == rerank_request(top_n=2)
    assert_books(proxy, account, credits=1000 - 2 * price)


def test_a_rerank_without_documents_is_refused_and_one_who_cannot_pay_too(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=5)
    client = proxy.client(account.key)
    wrong: list[Any] = [None, "x", 7, {}]
    for documents in wrong:
        answer = client.post(RERANK, rerank_request(documents=documents))
        assert_error(answer, 422, "validation_failed", "invalid_request_error")
    assert_error(client.post(RERANK, rerank_request(documents=["x" * 4000])), 402, "insufficient_credits")
    assert not upstream.posts
    assert_books(proxy, account, credits=5)


def test_a_token_count_of_cached_prompts_stays_free(house: Any) -> None:
    """Whatever its answer says of usage."""
    proxy, main, _ = house
    account = proxy.add_account(0)
    main.behaviour = AnswersMessages(prompt_tokens=44, cached=43)
    answer = proxy.client(account.key).post(f"{MESSAGES}/count_tokens", {"model": "plain", "messages": ASKED})
    assert answer.status == 200
    assert_books(proxy, account, credits=0)


# -- Upstreams that do not speak the API


@pytest.mark.parametrize("body", [b"404 page not found", {"detail": "Not Found"}])
@pytest.mark.parametrize("api", APIS)
def test_an_upstream_that_does_not_speak_the_api_is_named(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, body: Any
) -> None:
    """llama-cpp-python, and many another."""
    account = funded_key(credits=100)
    upstream.behaviour = Fails(404, body)
    answer = api.ask(proxy.client(account.key))
    api.assert_refused(answer, 404, "upstream_refused")
    assert "main" in (message := answer.json()["error"]["message"]) and api.path.rpartition("/")[2] in message
    assert_books(proxy, account, credits=100)
