"""The official `anthropic` and `openai` SDKs through the proxy, in front of what a real server answered."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.api_calls import ASKED
from tests.support.api_upstreams import AnswersMessages, AnswersResponses, EndsInMidAir, HangsUp, SaysWhatFailed, named
from tests.support.books import assert_books
from tests.support.client import QUESTION
from tests.support.exchange import Exchange
from tests.support.misbehaviours import Fails, StallsBeforeFirstByte
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream
from tests.support.waiting import WAIT_SECONDS, wait_until

pytestmark = pytest.mark.long

anthropic = pytest.importorskip("anthropic", reason="the SDK `anthropic` is not installed: pip install anthropic")

MakeKey = Callable[..., Account]
FOLDER = Path(__file__).parent / "data" / "api_captures"
FRANCE = "The capital of France is Paris."
WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


@dataclass
class Captured:
    """Answers with the capture of this name."""

    name: str

    async def __call__(self, exchange: Exchange) -> None:
        body = (FOLDER / f"{self.name}.raw").read_bytes()
        if body.startswith(b"event: "):
            await exchange.head()
            await exchange.send(body)
            await exchange.end()
        else:
            await exchange.answer(body)


@dataclass
class Posts:
    """How often a client posted: its retries show."""

    count: int = 0

    def sent(self, request: Any) -> None:
        self.count += request.method == "POST"


@contextlib.contextmanager
def claude(proxy: RunningProxy, key: str, posts: Posts | None = None, retries: int = 0) -> Iterator[Any]:
    """The SDK, with the key where it puts it by itself."""
    hooks: Any = {"request": [posts.sent]} if posts else {}
    http = anthropic.DefaultHttpxClient(event_hooks=hooks)
    options: Any = {"max_retries": retries, "timeout": WAIT_SECONDS, "http_client": http}
    with anthropic.Anthropic(base_url=proxy.base_url, api_key=key, **options) as client:
        yield client


@contextlib.contextmanager
def gpt(proxy: RunningProxy, key: str, posts: Posts | None = None, retries: int = 0) -> Iterator[Any]:
    hooks: Any = {"request": [posts.sent]} if posts else {}
    http = openai.DefaultHttpxClient(event_hooks=hooks)
    options: Any = {"max_retries": retries, "timeout": WAIT_SECONDS, "http_client": http}
    with openai.OpenAI(base_url=f"{proxy.base_url}/v1", api_key=key, **options) as client:
        yield client


# -- anthropic


def test_anthropic_creates_streams_and_counts(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=1000)
    request: Any = {"model": "plain", "max_tokens": 24, "messages": ASKED}
    with claude(proxy, account.key) as client:
        upstream.behaviour = Captured("messages-stop-sequence-nonstream")
        whole = client.messages.create(**request)
        assert (whole.usage.input_tokens, whole.usage.cache_read_input_tokens) == (1, 43) and whole.content[0].text
        upstream.behaviour = Captured("messages-stream")
        with client.messages.stream(**request) as stream:
            assert "".join(stream.text_stream) == FRANCE
            assert stream.get_final_message().usage.output_tokens == 8
        events = list(client.messages.create(**request, stream=True))
        assert events[-1].type == "message_stop"
        upstream.behaviour = Captured("count_tokens")
        assert client.messages.count_tokens(model="plain", messages=ASKED).input_tokens == 44
    assert upstream.posts[0].headers["anthropic-version"]
    assert_books(proxy, account, credits=1000 - 48 - 52 - 52)


def test_anthropic_reads_a_call_of_a_tool(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=10_000)
    tools: Any = [{"name": "get_weather", "description": "Get weather", "input_schema": WEATHER}]
    request: Any = {"model": "plain", "max_tokens": 60, "messages": ASKED, "tools": tools}
    with claude(proxy, account.key) as client:
        upstream.behaviour = Captured("messages-tools-nonstream")
        assert client.messages.create(**request).content[0].input == {"city": "Paris"}
        upstream.behaviour = Captured("messages-tools-choice-any-stream")
        with client.messages.stream(**request, tool_choice={"type": "any"}) as stream:
            assert stream.get_final_message().content[0].input == {"city": "Paris"}
    assert upstream.posts[-1].json["tool_choice"] == {"type": "any"}
    assert_books(proxy, account, credits=10_000 - 2 * 365)


async def test_anthropics_asynchronous_client_works_too(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = Captured("messages-stream")
    options: Any = {"max_retries": 0, "timeout": WAIT_SECONDS}
    async with (
        anthropic.AsyncAnthropic(base_url=f"{proxy.base_url}/api", api_key=account.key, **options) as client,
        client.messages.stream(model="plain", max_tokens=24, messages=ASKED) as stream,
    ):
        assert "".join([text async for text in stream.text_stream]) == FRANCE
    assert_books(proxy, account, credits=1000 - 52)


@dataclass(frozen=True)
class Refused:
    """What is wrong with a request, and what the SDK must raise."""

    raises: str
    code: str
    status: int
    retries: int = 0  # how often a client tries again that may try once more; where it is of no use it may twice
    members: dict[str, Any] = field(default_factory=dict)
    credits: float = 100
    key: str | None = None
    behaviour: Any = None


REFUSALS = {
    "wrong key": Refused("AuthenticationError", "invalid_api_key", 401, key="sk-" + "0" * 43),
    "no credits": Refused("PaymentRequiredError", "insufficient_credits", 402, credits=1),
    "unknown model": Refused("NotFoundError", "model_not_found", 404, members={"model": "plane"}),
    "retired model": Refused("APIStatusError", "model_retired", 410, members={"model": "retired"}),
    "foreign object": Refused(
        "UnprocessableEntityError", "validation_failed", 422, members={"extra_body": {"vector_store_ids": ["vs_1"]}}
    ),
    "no such member": Refused(
        "UnprocessableEntityError", "validation_failed", 422, members={"extra_body": {"n_predict": 5}}
    ),
    "upstream broken": Refused("InternalServerError", "upstream_error", 502, retries=1, behaviour=Fails(500)),
    "upstream absent": Refused(
        "InternalServerError", "upstream_unavailable", 503, retries=1, members={"model": "absent"}
    ),
    "upstream silent": Refused(
        "InternalServerError",
        "upstream_timeout",
        504,
        retries=1,
        members={"model": "impatient"},
        behaviour=StallsBeforeFirstByte(),
    ),
}
CASES = [(name, stream) for name, case in REFUSALS.items() for stream in (False, True) if not (stream and case.retries)]
OPENAI_CASES = [(name, stream) for name, stream in CASES if name != "upstream silent"]  # one SDK shows what a 504 is


def provoke(sdk: Any, ask: Callable[..., Any], refused: Refused, upstream: FakeUpstream) -> Any:
    """The exception that the SDK raises for a whole answer, and for a stream."""
    if refused.behaviour:
        upstream.behaviour = refused.behaviour
    with pytest.raises(getattr(sdk, refused.raises)) as raised:
        ask(**refused.members)
    assert raised.value.status_code == refused.status and raised.value.request_id
    return raised.value


@pytest.mark.parametrize(("name", "stream"), CASES)
def test_anthropic_raises_the_right_exception_and_tries_no_more_than_helps(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str, stream: bool
) -> None:
    refused, posts = REFUSALS[name], Posts()
    account = funded_key(credits=refused.credits)
    with claude(proxy, refused.key or account.key, posts, retries=refused.retries or 2) as client:

        def ask(**members: Any) -> None:
            client.messages.create(
                **{"model": "plain", "max_tokens": 24, "messages": ASKED, "stream": stream, **members}
            )

        error = provoke(anthropic, ask, refused, upstream)
    assert error.body["error"]["details"]["error_code"] == refused.code
    assert error.body["error"]["message"] in str(error)
    assert posts.count == 1 + refused.retries
    assert_books(proxy, account, refused.credits)


def test_anthropic_knows_a_suspended_account_and_a_rate_limit(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    wait_until(lambda: time.time() % 60 < 55, "the next minute begins")
    account = funded_key(credits=100, tier="two-a-minute")
    upstream.behaviour = AnswersMessages()
    request: Any = {"model": "plain", "max_tokens": 24, "messages": ASKED}
    with claude(proxy, account.key) as client:
        for _ in range(2):
            client.messages.create(**request)
        with pytest.raises(anthropic.RateLimitError) as limited:
            client.messages.create(**request)
        assert 1 <= int(limited.value.response.headers["retry-after"]) <= 60
    proxy.command("account", "suspend", account.name)
    with (
        claude(proxy, account.key, posts := Posts(), retries=2) as client,
        pytest.raises(anthropic.PermissionDeniedError),
    ):
        client.messages.create(**request)
    assert posts.count == 1
    assert_books(proxy, account, 100 - 16)


BREAKS: dict[str, Callable[[Any], Any]] = {
    "hangs up": HangsUp,
    "ends in mid-air": EndsInMidAir,
    "says what failed": lambda answers: SaysWhatFailed(
        answers, named({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})
    ),
}


@pytest.mark.parametrize("name", BREAKS)
def test_anthropic_raises_at_a_break_and_shows_what_came(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    """Left alone, it takes a stream without an end for a whole one."""
    account = funded_key(credits=1000)
    upstream.behaviour = BREAKS[name](AnswersMessages(tokens=2))
    texts: list[str] = []
    with claude(proxy, account.key) as client, pytest.raises(anthropic.APIStatusError) as raised:
        for event in client.messages.create(model="plain", max_tokens=24, messages=ASKED, stream=True):
            texts += [event.delta.text] if event.type == "content_block_delta" else []
    assert texts == ["word", "word"]
    assert raised.value.body["error"]["type"] in ("api_error", "overloaded_error")
    assert_books(proxy, account, credits=1000 - 5 - 2)


# -- openai


def test_openai_creates_and_streams_responses(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=1000)
    with gpt(proxy, account.key) as client:
        upstream.behaviour = Captured("responses-conversation")
        whole = client.responses.create(model="plain", input=QUESTION, max_output_tokens=24)
        assert whole.output_text == FRANCE and whole.usage and whole.usage.total_tokens == 52
        upstream.behaviour = Captured("responses-stream")
        events = list(client.responses.create(model="plain", input=QUESTION, max_output_tokens=24, stream=True))
        assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == FRANCE
        assert events[-1].type == "response.completed"
        upstream.behaviour = AnswersResponses(tokens=8, prompt_tokens=44)
        with client.responses.stream(model="plain", input=QUESTION) as stream:
            assert stream.get_final_response().output_text == "word" * 8
        upstream.behaviour = Captured("responses-input_tokens")
        assert client.responses.input_tokens.count(model="plain", input=QUESTION).input_tokens == 44
    assert all(exchange.json.get("store") is False for exchange in upstream.posts[:3])
    assert_books(proxy, account, credits=1000 - 3 * 52)


def test_openai_reads_a_call_of_a_tool(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=10_000)
    tools: Any = [{"type": "function", "name": "get_weather", "parameters": WEATHER, "strict": False}]
    with gpt(proxy, account.key) as client:
        upstream.behaviour = Captured("responses-tools-nonstream")
        answer = client.responses.create(model="plain", input="Weather in Paris?", tools=tools)
        (call,) = answer.output
        assert call.type == "function_call" and json.loads(call.arguments) == {"city": "Paris"}
        upstream.behaviour = Captured("responses-tools-max-cut-stream")
        events = list(client.responses.create(model="plain", input="Weather in Paris?", tools=tools, stream=True))
        assert [event.delta for event in events if event.type == "response.function_call_arguments.delta"] == ["{"]
    assert_books(proxy, account, credits=10_000 - 365 - 349)


@pytest.mark.parametrize(("name", "stream"), OPENAI_CASES)
def test_openai_raises_the_right_exception_and_tries_no_more_than_helps(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str, stream: bool
) -> None:
    refused, posts = REFUSALS[name], Posts()
    if refused.status == 402:
        refused = Refused("APIStatusError", refused.code, 402, credits=refused.credits)  # it has no class for it
    account = funded_key(credits=refused.credits)
    with gpt(proxy, refused.key or account.key, posts, retries=refused.retries or 2) as client:

        def ask(**members: Any) -> None:
            client.responses.create(**{"model": "plain", "input": ASKED, "stream": stream, **members})

        error = provoke(openai, ask, refused, upstream)
    assert error.code == refused.code
    assert posts.count == 1 + refused.retries
    assert_books(proxy, account, refused.credits)


@pytest.mark.parametrize("behaviour", [HangsUp, EndsInMidAir], ids=lambda how: how.__name__)
def test_openai_raises_at_a_break_and_shows_what_came(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, behaviour: Any
) -> None:
    """It raises on an inner `error` object only; left alone, it takes a stream without an end for a whole one."""
    account = funded_key(credits=1000)
    upstream.behaviour = behaviour(AnswersResponses(tokens=2))
    texts: list[str] = []
    with gpt(proxy, account.key) as client, pytest.raises(openai.APIError) as raised:
        for event in client.responses.create(model="plain", input=ASKED, stream=True):
            texts += [event.delta] if event.type == "response.output_text.delta" else []
    assert texts == ["word", "word"]
    assert raised.value.code == "upstream_error"
    assert_books(proxy, account, credits=1000 - 8 - 2)


def test_openai_is_told_that_nothing_is_stored(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=10)
    with gpt(proxy, account.key) as client:
        for ask in (client.responses.retrieve, client.responses.delete):
            with pytest.raises(openai.NotFoundError, match="stored"):
                ask("resp_1")
        with pytest.raises(openai.UnprocessableEntityError, match="previous_response_id"):
            client.responses.create(model="plain", input=QUESTION, previous_response_id="resp_1")
    assert_books(proxy, account, credits=10)
