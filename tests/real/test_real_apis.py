"""The Responses and Messages APIs of llama.cpp's own server through the proxy: each request costs what it says.

Skipped where the server or the model is missing.
"""

import math
from typing import Any

import pytest
from llama import CONTEXT_TOKENS, MULTIPLIER, Llama

from tests.support.api_calls import BOTH, MESSAGES, MESSAGES_API, RESPONSES, RESPONSES_API, Api, assert_messages_error
from tests.support.books import assert_books
from tests.support.client import Response
from tests.support.process import Account, RunningProxy
from tests.support.waiting import CLOSED_SECONDS, wait_until

pytest_plugins = ["real_fixtures"]
pytestmark = pytest.mark.real

CREDITS = 20_000.0
STORY = "Write a very long story about the sea."
STORY_ESTIMATE = math.ceil(len(STORY) / 4 + 4)
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS: dict[str, list[dict[str, Any]]] = {
    MESSAGES: [{"name": "get_weather", "input_schema": SCHEMA}],
    RESPONSES: [{"type": "function", "name": "get_weather", "parameters": SCHEMA, "strict": False}],
}
APIS = [pytest.param(api, id=api.path.rpartition("/")[2]) for api in BOTH]


@pytest.fixture
def account(real_proxy: RunningProxy) -> Account:
    return real_proxy.add_account(CREDITS)


def ask(proxy: RunningProxy, account: Account, api: Api, content: str = STORY, **members: Any) -> Response:
    return api.ask(proxy.client(account.key), content=content, model="smollm2", **{api.bound: 24, **members})


def tokens_of(answer: Response) -> int:
    """What the server says of a whole answer or a stream: the last value of each member."""
    assert answer.status == 200 and answer.clean, answer.body
    usage: dict[str, int] = {}
    for chunk in answer.chunks if answer.body.startswith(b"event: ") else [answer.json()]:
        said = (chunk.get("message") or chunk.get("response") or chunk).get("usage") or {}
        usage |= {name: value for name, value in said.items() if name.endswith("put_tokens")}
    assert usage["input_tokens"] > 0 and usage["output_tokens"] > 0, usage
    return sum(usage.values())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_an_answer_costs_what_the_server_says_and_once_more_from_its_cache(
    real_proxy: RunningProxy, account: Account, api: Api, stream: bool
) -> None:
    """The second time the prompt is cached: the price is the same."""
    tokens = [tokens_of(ask(real_proxy, account, api, stream=stream, temperature=0)) for _ in range(2)]
    assert tokens[0] == tokens[1]
    assert_books(real_proxy, account, CREDITS - sum(tokens) * MULTIPLIER)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_an_answer_with_tools_costs_what_the_server_says(
    real_proxy: RunningProxy, account: Account, api: Api, stream: bool
) -> None:
    answer = ask(real_proxy, account, api, "Weather in Paris?", tools=TOOLS[api.path], stream=stream)
    assert_books(real_proxy, account, CREDITS - tokens_of(answer) * MULTIPLIER)


def test_counting_tokens_is_free(real_proxy: RunningProxy, account: Account) -> None:
    client = real_proxy.client(account.key)
    for api, path in ((MESSAGES_API, f"{MESSAGES}/count_tokens"), (RESPONSES_API, f"{RESPONSES}/input_tokens")):
        assert client.post(path, api.request(STORY, "smollm2")).json()["input_tokens"] > 8
    assert_books(real_proxy, account, CREDITS)


@pytest.mark.parametrize("api", APIS)
def test_a_client_that_leaves_a_stream_stops_the_generation(
    real_proxy: RunningProxy, account: Account, llama: Llama, api: Api
) -> None:
    before = llama.cancelled
    request = api.request(STORY, "smollm2", stream=True, ignore_eos=True, **{api.bound: 1500})
    with real_proxy.client(account.key).send("POST", api.path, request) as sent, sent.answered() as stream:
        stream.read_until(b".delta" if api.path == RESPONSES else b"_delta", times=6)
    wait_until(lambda: llama.cancelled > before, "llama.cpp cancels the task", 10 * CLOSED_SECONDS)
    wait_until(lambda: llama.busy_slots == 0, "llama.cpp is at rest")
    shown = real_proxy.wait_until_settled(account)
    assert STORY_ESTIMATE <= (CREDITS - shown["credits"]) / MULTIPLIER < 1500
    assert_books(real_proxy, account, shown["credits"])


def test_a_prompt_that_is_too_long_is_refused_in_the_apis_own_shape(real_proxy: RunningProxy, account: Account) -> None:
    answer = ask(real_proxy, account, MESSAGES_API, "word " * CONTEXT_TOKENS, stream=True)
    assert_messages_error(answer, 400)
    assert "context size" in answer.json()["error"]["message"]
    answer = ask(real_proxy, account, RESPONSES_API, "word " * CONTEXT_TOKENS)
    assert answer.status == 400 and "context size" in answer.error["message"]
    assert_books(real_proxy, account, CREDITS)


@pytest.mark.parametrize("api", APIS)
def test_a_balance_that_pays_for_less_lowers_the_maximum_that_the_server_gets(
    real_proxy: RunningProxy, api: Api
) -> None:
    poor = real_proxy.add_account(150)
    answer = ask(real_proxy, poor, api, **{api.bound: 1500, "ignore_eos": True})
    tokens = tokens_of(answer)
    assert int(answer.headers["x-max-tokens-limited"]) < 150 / MULTIPLIER
    assert_books(real_proxy, poor, 150 - tokens * MULTIPLIER)
