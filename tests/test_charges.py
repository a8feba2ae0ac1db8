"""What an answer costs when all goes well: its usage times the multiplier, once, before its end is seen."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_books
from tests.support.client import QUESTION_ESTIMATE
from tests.support.errors import assert_error
from tests.support.exchange import Exchange
from tests.support.misbehaviours import (
    SendsEvents,
)
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "charged"),
    [("plain", 8), ("half", 4), ("mid", 12), ("dear", 28), ("thousandth", 0.008), ("gratis", 0)],
)
def test_an_answer_costs_its_tokens_times_the_multiplier(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, model: str, charged: float, stream: bool
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Answers(tokens=3, prompt_tokens=5)
    assert proxy.client(account.key).chat(model=model, stream=stream).status == 200
    assert_books(proxy, account, credits=100 - charged)


def test_a_thousand_tokens_at_one_and_a_half_cost_1500_credits(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=5000)
    upstream.behaviour = Answers(tokens=900, prompt_tokens=100)
    answer = proxy.client(account.key).chat("x" * 400, model="mid")
    assert answer.headers["x-credits-charged"] == "1500" and answer.headers["x-credits-remaining"] == "3500"
    assert_books(proxy, account, credits=3500)


def test_an_answer_says_what_it_cost_and_what_is_left(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=10)
    answer = proxy.client(account.key).chat(model="half")
    assert float(answer.headers["x-credits-charged"]) == 4
    assert float(answer.headers["x-credits-remaining"]) == 6
    answer = proxy.client(account.key).chat(model="thousandth")
    assert float(answer.headers["x-credits-remaining"]) == 5.992
    assert_books(proxy, account, credits=5.992)


def test_completions_and_embeddings_are_paid_for(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    client = proxy.client(account.key)
    assert client.completion().status == 200  # 5 + 3 tokens
    assert client.completion(stream=True).status == 200  # again
    embedded = client.post("/v1/embeddings", {"model": "embedder", "input": ["one", "two"]})
    assert embedded.status == 200 and float(embedded.headers["x-credits-charged"]) == 2.5  # 5 tokens, half price
    assert_books(proxy, account, credits=100 - 8 - 8 - 2.5)


@pytest.mark.parametrize("stream", [False, True])
def test_a_balance_read_right_after_an_answer_is_current(
    proxy: RunningProxy, funded_key: MakeKey, stream: bool
) -> None:
    account = funded_key(credits=1000)
    client = proxy.client(account.key)
    for already in range(10):
        assert client.chat(stream=stream).clean
        assert client.balance == 1000 - 8 * (already + 1)
    assert_books(proxy, account, credits=920)


def test_a_stream_is_paid_before_its_end_is_seen(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """At [DONE], though the upstream keeps its connection open."""
    account = funded_key(credits=100)

    async def forgets_to_close(exchange: Exchange) -> None:
        await exchange.head()
        await Answers().send_tokens(exchange)
        await Answers().send_closing(exchange)
        await exchange.stall()

    upstream.behaviour = forgets_to_close
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b"[DONE]")
        assert proxy.client(account.key).balance == 92
        assert stream.finish().clean
    assert_books(proxy, account, credits=92)


def test_detail_fields_are_parts_and_never_added(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    details = {
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
        "total_tokens": 4711,
    }
    upstream.behaviour = Answers(usage_details=details)
    client = proxy.client(account.key)
    assert client.chat().status == client.chat(stream=True).status == 200
    assert_books(proxy, account, credits=100 - 2 * 8)


def test_a_free_model_works_at_zero_balance(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=0)
    client = proxy.client(account.key)
    assert client.chat(model="gratis").status == 200
    assert client.chat(model="gratis", stream=True).clean
    assert_error(client.chat(model="plain"), 402, "insufficient_credits", "insufficient_credits")
    assert len(upstream.posts) == 2
    assert_books(proxy, account, credits=0)


def test_free_credits_have_a_date_and_are_spent_before_purchased_ones(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(options={"free_credits": {"amount": 10, "days": 30}})
    account = proxy.add_account(50)
    client = proxy.client(account.key)
    subscription = client.get("/api/billing/subscription").json()
    assert set(subscription) >= {"tier", "status", "expires_at", "credits"}
    assert (subscription["tier"], subscription["credits"]) == ("unlimited", 60)
    assert subscription["expires_at"] and proxy.account(account.name)["free_expires_at"]
    for free, paid in ((2, 50), (0, 44)):
        assert client.chat().status == 200
        shown = proxy.account(account.name)
        assert (shown["free"], shown["paid"]) == (free, paid)
    assert client.balance == 44
    assert_books(proxy, account, credits=44)


@pytest.mark.parametrize("stream", [False, True])
def test_without_usage_the_estimate_is_charged(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = Answers(tokens=6, word="tok ", usage="none")
    assert proxy.client(account.key).chat(stream=stream).status == 200
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 6)


def test_long_events_count_by_their_text(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = Answers(tokens=2, word="x" * 40, usage="none")
    assert proxy.client(account.key).chat(stream=True).clean
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 20)


@pytest.mark.parametrize("usage", ["closing", "finish", "every", "each_choice"])
def test_several_choices_are_paid_once_wherever_usage_stands(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, usage: str
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = Answers(tokens=4, usage=usage)
    assert proxy.client(account.key).chat(stream=True, n=3).clean
    assert_books(proxy, account, credits=1000 - 5 - 4 * 3)


@pytest.mark.parametrize(
    ("usages", "charged"),
    [
        ([{"prompt_tokens": 0, "completion_tokens": 0}], QUESTION_ESTIMATE + 1),  # a word came: not believed
        ([{"prompt_tokens": 7, "completion_tokens": 0}], 7 + 1),
        ([{"prompt_tokens": 7, "completion_tokens": 1}, None], 8),  # the last that is not null
        ([{"prompt_tokens": 7, "completion_tokens": 1}, {"prompt_tokens": 7, "completion_tokens": 2}], 9),
        ([None], QUESTION_ESTIMATE + 1),
        ([{"prompt_tokens": "7", "completion_tokens": 1.5}], QUESTION_ESTIMATE + 1),  # no integers: absent
        ([{"prompt_tokens": -7, "completion_tokens": 2**40}], QUESTION_ESTIMATE + 1),
        ([{"prompt_tokens": True, "completion_tokens": True}], QUESTION_ESTIMATE + 1),
    ],
)
def test_the_last_usage_that_is_one_counts(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, usages: list[Any], charged: int
) -> None:
    account = funded_key(credits=100)
    choice = {"index": 0, "delta": {"content": "word"}, "finish_reason": None}
    finish = {"index": 0, "delta": {}, "finish_reason": "stop"}
    events = [sse({"choices": [choice]}), sse({"choices": [finish]})]
    events += [sse({"choices": [], "usage": usage}) for usage in usages]
    upstream.behaviour = SendsEvents(b"".join([*events, sse(b"[DONE]")]))
    assert proxy.client(account.key).chat(stream=True).clean
    assert_books(proxy, account, credits=100 - charged)
