"""A real model through the proxy: llama.cpp's own server with SmolLM2-135M.

Each request is charged exactly what that server's own usage says. Skipped where the server or the model is missing.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama import CONTEXT_TOKENS, MULTIPLIER, Llama

from tests.support.books import assert_books
from tests.support.client import Response
from tests.support.process import Account, RunningProxy
from tests.support.waiting import wait_until

pytest_plugins = ["real_fixtures"]
pytestmark = pytest.mark.real

CREDITS = 20_000.0
STORY = "Write a very long story about the sea."
STORY_ESTIMATE = math.ceil(len(STORY) / 4 + 4)
ASKS = {"stream_options": {"include_usage": True}}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture
def account(real_proxy: RunningProxy) -> Account:
    return real_proxy.add_account(CREDITS)


def chat(proxy: RunningProxy, account: Account, content: str = STORY, **members: Any) -> Response:
    return proxy.client(account.key).chat(content, "smollm2", **{"max_tokens": 24, **members})


def usage_of(answer: Response) -> list[dict[str, int]]:
    """Every usage that an answer reports."""
    assert answer.status == 200, answer.body
    assert answer.clean
    chunks = answer.chunks if b"data: " in answer.body[:6] else [answer.json()]
    return [chunk["usage"] for chunk in chunks if isinstance(chunk, dict) and chunk.get("usage")]


def assert_charged(proxy: RunningProxy, account: Account, *tokens: int) -> None:
    assert all(count > 0 for count in tokens), tokens
    assert_books(proxy, account, CREDITS - sum(tokens) * MULTIPLIER)


def test_a_chat_costs_what_the_server_says(real_proxy: RunningProxy, account: Account) -> None:
    answer = chat(real_proxy, account)
    (usage,) = usage_of(answer)
    assert answer.json()["choices"][0]["message"]["content"]
    assert float(answer.headers["x-credits-charged"]) == usage["total_tokens"] * MULTIPLIER
    assert_charged(real_proxy, account, usage["total_tokens"])


def test_a_streamed_chat_costs_what_the_server_says(real_proxy: RunningProxy, account: Account) -> None:
    answer = chat(real_proxy, account, stream=True, **ASKS)
    (usage,) = usage_of(answer)
    assert answer.words > 1
    assert answer.chunks[-2]["choices"] == []
    assert_charged(real_proxy, account, usage["total_tokens"])


def test_a_stream_that_did_not_ask_for_usage_costs_the_same(real_proxy: RunningProxy, account: Account) -> None:
    answer = chat(real_proxy, account, stream=True)
    (usage,) = usage_of(answer)
    assert all(chunk["choices"] for chunk in answer.chunks[:-1]), "a loop over choices[0] would fail"
    assert_charged(real_proxy, account, usage["total_tokens"])


@pytest.mark.parametrize("stream", [False, True])
def test_a_completion_costs_what_the_server_says(real_proxy: RunningProxy, account: Account, stream: bool) -> None:
    client = real_proxy.client(account.key)
    answer = client.completion("Once upon a time", "smollm2", max_tokens=12, stream=stream)
    (usage,) = usage_of(answer)
    assert usage["completion_tokens"] == 12
    assert_charged(real_proxy, account, usage["total_tokens"])


@pytest.mark.parametrize("given", ["one text", ["one text", "another"], [1, 2, 3]])
def test_embeddings_cost_what_the_server_says(real_proxy: RunningProxy, account: Account, given: Any) -> None:
    request = {"model": "smollm2-embedding", "input": given}
    answer = real_proxy.client(account.key).post("/v1/embeddings", request)
    (usage,) = usage_of(answer)
    assert answer.json()["data"][0]["embedding"]
    assert_books(real_proxy, account, CREDITS - usage["prompt_tokens"] * 0.5)


SEVERAL: dict[str, tuple[str, dict[str, Any]]] = {  # answers to one request, and what asks for them
    "chat": ("chat/completions", {"messages": [{"role": "user", "content": STORY}], "n": 2}),
    "completions": ("completions", {"prompt": "Once upon a time", "n": 2}),
    "prompts": ("completions", {"prompt": ["One day", "A fox"]}),
}
PROMPTS_ESTIMATE = math.ceil(len("One day" + "A fox") / 4)


def texts_of(answer: Response) -> list[str]:
    """What bore content: an event each, or all of a whole answer in one."""
    if not answer.body.startswith(b"data: "):
        return ["".join(map(text_of, answer.json()["choices"]))]
    texts = ["".join(map(text_of, chunk["choices"])) for chunk in answer.chunks if isinstance(chunk, dict)]
    return [text for text in texts if text]


def text_of(choice: dict[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or choice.get("message") or {}).get("content") or ""


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("asked", SEVERAL)
def test_several_answers_cost_the_usage_or_what_must_have_been_used(
    real_proxy: RunningProxy, account: Account, asked: str, stream: bool
) -> None:
    """llama.cpp gives each answer of a stream a usage of its own; of those not streamed, it says what one took."""
    path, members = SEVERAL[asked]
    request = {"model": "smollm2", "max_tokens": 24, "ignore_eos": True, "stream": stream, **members}
    answer = real_proxy.client(account.key).post(f"/v1/{path}", request)
    usage, texts = usage_of(answer)[-1], texts_of(answer)
    certain = max(len(texts), sum(len(text.encode()) for text in texts) // 8)
    if stream:
        assert [each["completion_tokens"] for each in usage_of(answer)] == [24, 24]
        assert usage["completion_tokens"] < certain <= 48, "the events tell of both"
    assert_charged(real_proxy, account, usage["prompt_tokens"], max(usage["completion_tokens"], certain))


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("asked", SEVERAL)
def test_several_answers_of_a_server_that_speaks_of_one_cost_the_running_count(
    real_proxy: RunningProxy, account: Account, asked: str, stream: bool
) -> None:
    path, members = SEVERAL[asked]
    request = {"model": "smollm2-choice", "max_tokens": 24, "ignore_eos": True, "stream": stream, **members}
    answer = real_proxy.client(account.key).post(f"/v1/{path}", request)
    texts = texts_of(answer)
    count = max(len(texts), math.ceil(sum(len(text.encode()) for text in texts) / 4))
    prompt = PROMPTS_ESTIMATE if asked == "prompts" else usage_of(answer)[-1]["prompt_tokens"]
    assert_charged(real_proxy, account, prompt, count)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_with_tools_costs_what_the_server_says(real_proxy: RunningProxy, account: Account, stream: bool) -> None:
    answer = chat(real_proxy, account, "Weather in Paris?", tools=[WEATHER], stream=stream)
    (usage,) = usage_of(answer)
    assert_charged(real_proxy, account, usage["total_tokens"])


def test_a_client_that_leaves_a_stream_stops_the_generation(
    real_proxy: RunningProxy, account: Account, llama: Llama
) -> None:
    before = llama.cancelled
    members = {"max_tokens": 1500, "ignore_eos": True}
    with real_proxy.client(account.key).stream_chat(STORY, "smollm2", **members) as stream:
        stream.read_until(b"data: ", times=6)
        assert llama.busy_slots == 1
    wait_until(lambda: llama.cancelled > before, "llama.cpp cancels the task")
    wait_until(lambda: llama.busy_slots == 0, "llama.cpp is at rest")
    shown = real_proxy.wait_until_settled(account)
    tokens = (CREDITS - shown["credits"]) / MULTIPLIER
    assert STORY_ESTIMATE + 4 <= tokens < 1500, "the estimate of the prompt and the tokens that came"
    assert_books(real_proxy, account, shown["credits"])


def test_a_client_that_leaves_before_the_answer_stops_the_generation(
    real_proxy: RunningProxy, account: Account, llama: Llama
) -> None:
    before = llama.cancelled
    members = {"max_tokens": 1500, "ignore_eos": True}
    with real_proxy.client(account.key).start_chat(STORY, "smollm2", **members):
        wait_until(lambda: llama.busy_slots == 1, "llama.cpp generates")
    wait_until(lambda: llama.cancelled > before, "llama.cpp cancels the task")
    wait_until(lambda: llama.busy_slots == 0, "llama.cpp is at rest")
    real_proxy.wait_until_settled(account)
    assert_charged(real_proxy, account, STORY_ESTIMATE)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_as_the_server_refuses_it_and_costs_nothing(
    real_proxy: RunningProxy, account: Account, stream: bool
) -> None:
    answer = chat(real_proxy, account, "word " * CONTEXT_TOKENS, stream=stream)
    assert answer.status == 400
    assert "context size" in answer.error["message"]
    assert_charged(real_proxy, account)


def test_four_streams_at_once_cost_what_the_server_says_of_each(real_proxy: RunningProxy, account: Account) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: chat(real_proxy, account, stream=True), range(4)))
    tokens = [usage["total_tokens"] for answer in answers for usage in usage_of(answer)]
    assert len(tokens) == 4
    assert_charged(real_proxy, account, *tokens)


@pytest.mark.parametrize("stream", [False, True])
def test_a_balance_that_pays_for_less_lowers_the_maximum_that_the_server_gets(
    real_proxy: RunningProxy, stream: bool
) -> None:
    poor = real_proxy.add_account(100)
    answer = chat(real_proxy, poor, max_tokens=1500, ignore_eos=True, stream=stream)
    (usage,) = usage_of(answer)
    assert usage["completion_tokens"] == int(answer.headers["x-max-tokens-limited"]) < 100 / MULTIPLIER
    assert_books(real_proxy, poor, 100 - usage["total_tokens"] * MULTIPLIER)
