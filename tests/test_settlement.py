"""Who pays what: when all goes well, when the client leaves, when the upstream breaks, when credits end."""

import asyncio
import contextlib
import json
import resource
import sqlite3
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE, chat_request
from tests.support.errors import assert_error, error_frame
from tests.support.exchange import Exchange
from tests.support.misbehaviours import (
    AnswersJsonToAStream,
    BreaksBeforeFirstEvent,
    BreaksBetweenEvents,
    BreaksMidEvent,
    ClosesBeforeHeaders,
    EmptyBody,
    EndsInMidAir,
    EndsWithoutDone,
    ErrorEventThenDone,
    Fails,
    ResetsBeforeHeaders,
    SendsEvents,
    SendsGarbage,
    SendsGzip,
    SpeaksNoHttp,
    StallsBeforeFirstByte,
    StallsBeforeHeaders,
    StallsMidStream,
    WrongContentLength,
)
from tests.support.process import Account, RunningProxy
from tests.support.sse import event_data, split_events, sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS, Signal, wait_until

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]


# -- All goes well


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
        ([{"prompt_tokens": 0, "completion_tokens": 0}], 0),  # an explicit zero is a zero
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


# -- The hold


@pytest.fixture
def paused(proxy: RunningProxy, upstream: FakeUpstream) -> Iterator[Callable[..., Answers]]:
    """Makes a behaviour that pauses, and lets it go on after the test whatever happens."""
    made: list[Answers] = []

    def make(**knobs: Any) -> Answers:
        made.append(Answers(**knobs))
        upstream.behaviour = made[-1]
        return made[-1]

    yield make
    for answers in made:
        answers.resume.set()


@pytest.mark.parametrize(
    ("members", "held"),
    [
        ({"max_tokens": 30}, 2 * QUESTION_ESTIMATE + 30),
        ({"max_completion_tokens": 30}, 2 * QUESTION_ESTIMATE + 30),
        ({"max_tokens": 30, "n": 2}, 2 * QUESTION_ESTIMATE + 60),
        ({"max_tokens": 70_000, "stream": True}, 2 * QUESTION_ESTIMATE + 100),  # one slice
        ({"max_tokens": 30, "stream": True}, 2 * QUESTION_ESTIMATE + 30),
        ({"max_tokens": 30, "model": "mid"}, 1.5 * (2 * QUESTION_ESTIMATE + 30)),
        ({"model": "capped"}, 2 * QUESTION_ESTIMATE + 100),
        ({"model": "windowed"}, 2 * QUESTION_ESTIMATE + 4096 - QUESTION_ESTIMATE),
        ({}, 2 * QUESTION_ESTIMATE + 8192),
    ],
)
def test_a_request_under_way_holds_what_it_may_cost(
    proxy: RunningProxy, paused: Any, funded_key: MakeKey, members: dict[str, Any], held: float
) -> None:
    account = funded_key(credits=50_000)
    answers = paused(pause_after=0)
    with proxy.client(account.key).start_chat(**{"model": "plain", **members}) as pending:
        answers.reached.wait()
        assert_books(proxy, account, credits=50_000, held=held)
        assert proxy.client(account.key).balance == 50_000, "holds are not subtracted from what is shown"
        answers.resume.set()
        assert pending.answered().finish().status == 200
    assert proxy.account(account.name)["held"] == 0
    assert_audit(proxy)


def test_the_next_slice_is_held_as_the_first_is_used(
    proxy: RunningProxy, upstream: FakeUpstream, paused: Any, funded_key: MakeKey
) -> None:
    account = funded_key(credits=5000)
    answers = paused(tokens=230, pause_after=210, word="a ")
    with proxy.client(account.key).stream_chat(max_tokens=100_000) as stream:
        answers.reached.wait()
        stream.read_until(b'"a "', times=210)
        held = proxy.account(account.name)["held"]
        assert 2 * QUESTION_ESTIMATE + 210 < held <= 2 * QUESTION_ESTIMATE + 400, "slices of 100, not everything"
        assert proxy.client(account.key).chat(max_tokens=1, model="half").status == 200  # beside it
        answers.resume.set()
        assert stream.finish().clean
    assert_books(proxy, account, credits=5000 - 235 - 3)


def test_a_stream_ends_when_the_credits_are_used_up(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """An upstream that ignores the maximum cannot overdraw the account."""
    account = funded_key(credits=350)
    upstream.behaviour = Answers(tokens=5000, word="a ", honours_maximum=False)
    answer = proxy.client(account.key).chat(stream=True, max_tokens=100_000)
    error = error_frame(answer)
    assert (error["code"], error["type"]) == ("insufficient_credits", "insufficient_credits")
    assert answer.words == 350 - 2 * QUESTION_ESTIMATE, "what was held is relayed to the last token"
    assert (error["credits"], error["required"]) == (QUESTION_ESTIMATE, 2 * QUESTION_ESTIMATE + 1)
    upstream.posts[0].closed.wait(CLOSED_SECONDS)
    assert_books(proxy, account, credits=350 - QUESTION_ESTIMATE - answer.words)


def test_an_estimate_past_the_maximum_is_held_while_there_are_credits(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """An event is five tokens by its bytes; the upstream ignores the maximum and says nothing of usage."""
    account = funded_key(credits=5000)
    upstream.behaviour = Answers(tokens=200, word="twenty bytes of text", honours_maximum=False, usage="none")
    assert proxy.client(account.key).chat(stream=True, max_tokens=100).clean
    assert_books(proxy, account, credits=5000 - QUESTION_ESTIMATE - 1000)
    assert not [overrun for overrun in proxy.audit()["overruns"] if overrun["account"] == account.name]


def test_an_upstream_that_ignores_the_maximum_overdraws_by_no_more_than_an_estimate_can_miss(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """Honest answers have up to twice the bytes of their estimate, so one that has more is none."""
    account = funded_key(credits=350)
    upstream.behaviour = Answers(tokens=5000, word="twenty bytes of text", honours_maximum=False, usage="none")
    answer = proxy.client(account.key).chat(stream=True)
    assert error_frame(answer)["code"] == "insufficient_credits"
    assert answer.words == (350 - 2 * QUESTION_ESTIMATE) * 8 // 20
    assert_books(proxy, account, credits=350 - QUESTION_ESTIMATE - 5 * answer.words)


def test_a_stream_ends_when_others_hold_the_rest(
    proxy: RunningProxy, upstream: FakeUpstream, paused: Any, funded_key: MakeKey
) -> None:
    account = funded_key(credits=400)
    answers = paused(tokens=1000, word="a ", pause_after=10)
    with proxy.client(account.key).stream_chat(max_tokens=1000) as stream:  # holds 116
        answers.reached.wait()
        other = Answers(pause_after=0)
        upstream.behaviour = other
        with proxy.client(account.key).start_chat(max_tokens=200) as pending:  # holds 216; 68 are left
            other.reached.wait()
            answers.resume.set()
            answer = stream.finish()
            assert error_frame(answer)["code"] == "insufficient_credits"
            assert answer.words == 100 + 68
            other.resume.set()
            assert pending.answered().finish().status == 200
    assert_books(proxy, account, credits=400 - QUESTION_ESTIMATE - 168 - 8)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("asked", "member"),
    [
        ({}, "max_tokens"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_completion_tokens": 5000}, "max_completion_tokens"),
    ],
)
def test_a_balance_that_pays_for_300_tokens_asks_for_300(
    proxy: RunningProxy,
    upstream: FakeUpstream,
    funded_key: MakeKey,
    asked: dict[str, Any],
    member: str,
    stream: bool,
) -> None:
    account = funded_key(credits=300 + 2 * QUESTION_ESTIMATE)
    upstream.behaviour = Answers(tokens=10_000, word="a ", prompt_tokens=QUESTION_ESTIMATE)
    answer = proxy.client(account.key).chat(stream=stream, **asked)
    assert answer.status == 200 and answer.clean
    assert upstream.posts[0].json[member] == 300
    assert answer.headers["x-max-tokens-limited"] == "300"
    assert_books(proxy, account, credits=QUESTION_ESTIMATE)


@pytest.mark.parametrize("stream", [False, True])
def test_a_balance_that_is_enough_changes_no_maximum(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    account = funded_key(credits=20_000)
    client = proxy.client(account.key)
    for members in ({}, {"max_tokens": 77}, {"max_completion_tokens": 78}):
        answer = client.chat(stream=stream, **members)
        assert answer.headers["x-max-tokens-limited"] is None
        sent = upstream.next_exchange().json
        assert {name: sent[name] for name in sent if name.startswith("max_")} == members
    assert_audit(proxy)


def test_a_lowered_maximum_is_shared_by_the_choices(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=300 + 2 * QUESTION_ESTIMATE)
    upstream.behaviour = Answers(tokens=10_000, prompt_tokens=QUESTION_ESTIMATE)
    assert proxy.client(account.key).chat(n=3, max_tokens=5000).status == 200
    assert upstream.posts[0].json["max_tokens"] == 100
    assert_books(proxy, account, credits=QUESTION_ESTIMATE)


@pytest.mark.parametrize("credits_", [2 * QUESTION_ESTIMATE, 1, 0.001])
def test_who_cannot_pay_for_one_token_is_refused_and_the_model_not_called(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, credits_: float
) -> None:
    account = funded_key(credits=credits_)
    answer = proxy.client(account.key).chat(stream=True)
    error = assert_error(answer, 402, "insufficient_credits", "insufficient_credits")
    assert error["credits"] == credits_ and error["required"] == 2 * QUESTION_ESTIMATE + 1
    assert answer.headers["retry-after"] is None
    assert not upstream.posts
    assert_books(proxy, account, credits=credits_)


def test_who_can_pay_for_one_token_is_served_one(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=2 * QUESTION_ESTIMATE + 1)
    upstream.behaviour = Answers(tokens=50, prompt_tokens=QUESTION_ESTIMATE)
    assert proxy.client(account.key).chat().status == 200
    assert upstream.posts[0].json["max_tokens"] == 1
    assert_books(proxy, account, credits=QUESTION_ESTIMATE)


def test_credits_under_hold_are_in_use_and_worth_waiting_for(
    proxy: RunningProxy, upstream: FakeUpstream, paused: Any, funded_key: MakeKey
) -> None:
    account = funded_key(credits=50)
    answers = paused(pause_after=0)
    with proxy.client(account.key).start_chat() as pending:
        answers.reached.wait()
        refused = proxy.client(account.key).chat()
        assert_error(refused, 402, "credits_in_use", "insufficient_credits")
        assert refused.headers["retry-after"] == "1" and refused.headers["x-should-retry"] == "true"
        answers.resume.set()
        assert pending.answered().finish().status == 200
    assert len(upstream.posts) == 1
    assert proxy.client(account.key).chat().status == 200
    assert_books(proxy, account, credits=50 - 16)


def test_what_an_estimate_missed_is_charged_and_audit_names_it(running_proxy: MakeProxy) -> None:
    """A balance may go below zero by that much; then nothing more is served until it is topped up."""
    proxy = running_proxy(behaviour=Answers(prompt_tokens=500))
    account = proxy.add_account(100)
    answer = proxy.client(account.key).chat(max_tokens=3)
    assert answer.status == 200 and answer.headers["x-credits-charged"] == "503"
    assert_books(proxy, account, credits=-403)
    overruns = proxy.audit()["overruns"]
    assert overruns == 1 or len(overruns) == 1, overruns
    assert_error(proxy.client(account.key).chat(), 402, "insufficient_credits")
    proxy.command("credit", "add", account.name, 1000)
    proxy.upstream.behaviour = Answers()
    assert proxy.client(account.key).chat().status == 200
    assert_books(proxy, account, credits=597 - 8)


# -- Many at once


async def one_of_many(session: aiohttp.ClientSession, proxy: RunningProxy, stream: bool) -> tuple[int, Any]:
    """Ask once; the status, and the error code or the tokens that were answered."""
    body = chat_request(stream=stream, max_tokens=10, stream_options={"include_usage": True} if stream else None)
    body = {name: value for name, value in body.items() if value is not None}
    async with session.post(f"{proxy.base_url}/v1/chat/completions", json=body) as answer:
        text = await answer.read()
        if answer.status != 200:
            return answer.status, json.loads(text)["error"]["code"]
        last = [event_data(event) for event in split_events(text)][-2] if stream else json.loads(text)
        return 200, last["usage"]["total_tokens"]


async def test_300_requests_at_once_cannot_spend_the_credits_of_20(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=20 * (2 * QUESTION_ESTIMATE + 10))
    answers = Answers(tokens=10, prompt_tokens=QUESTION_ESTIMATE, pause_after=0)
    upstream.behaviour = answers
    headers = {"authorization": f"Bearer {account.key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        asked = [asyncio.ensure_future(one_of_many(session, proxy, bool(number % 2))) for number in range(300)]
        await asyncio.wait_for(refusals(asked, 280), 60)
        answers.resume.set()
        results = await asyncio.gather(*asked)
    served = [tokens for status, tokens in results if status == 200]
    assert len(served) == len(upstream.posts) == 20
    assert {code for status, code in results if status != 200} == {"credits_in_use"}
    assert {status for status, _ in results} == {200, 402}
    assert_books(proxy, account, credits=account.credits - sum(served))


async def refusals(asked: list[Any], number: int) -> None:
    """Until this many of them have an answer."""
    for done, future in enumerate(asyncio.as_completed(asked), start=1):
        await future
        if done == number:
            return


async def test_many_requests_on_a_draining_balance_never_overdraw_it(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=20 * (2 * QUESTION_ESTIMATE + 10))
    upstream.behaviour = Answers(tokens=10, prompt_tokens=QUESTION_ESTIMATE)
    headers = {"authorization": f"Bearer {account.key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        results = await asyncio.gather(*(one_of_many(session, proxy, bool(n % 2)) for n in range(300)))
    spent = sum(tokens for status, tokens in results if status == 200)
    assert len(upstream.posts) == sum(status == 200 for status, _ in results) >= 20
    assert {code for status, code in results if status != 200} <= {"credits_in_use", "insufficient_credits"}
    assert spent <= account.credits
    assert_books(proxy, account, credits=account.credits - spent)


# -- The client leaves


def test_leaving_before_the_upstream_answers_costs_the_prompt(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    for behaviour in (StallsBeforeHeaders(), StallsBeforeFirstByte()):
        upstream.behaviour = behaviour
        for stream in (False, True):
            with proxy.client(account.key).start_chat(stream=stream) as pending:
                exchange = upstream.next_exchange()
                pending.leave()
                exchange.closed.wait(CLOSED_SECONDS)
            proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - 4 * QUESTION_ESTIMATE)


@pytest.mark.parametrize("tokens", [1, 7, 150])
def test_leaving_in_the_middle_costs_the_prompt_and_what_came(
    proxy: RunningProxy, paused: Any, upstream: FakeUpstream, funded_key: MakeKey, tokens: int
) -> None:
    account = funded_key(credits=1000)
    answers = paused(tokens=500, word="a ", pause_after=tokens)
    with proxy.client(account.key).stream_chat() as stream:
        answers.reached.wait()
        stream.read_until(b'"a "', times=tokens)
        stream.leave()
        upstream.posts[0].closed.wait(CLOSED_SECONDS)
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - tokens)


def test_leaving_while_nothing_has_come_but_the_opening_costs_the_prompt(
    proxy: RunningProxy, paused: Any, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    answers = paused(pause_after=0)
    with proxy.client(account.key).stream_chat() as stream:
        answers.reached.wait()
        stream.read_until(b"assistant")
        stream.leave()
        upstream.posts[0].closed.wait(CLOSED_SECONDS)
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE)


def test_leaving_after_the_finish_reason_still_costs_the_exact_usage(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    resume = Signal()

    async def usage_comes_late(exchange: Exchange) -> None:
        answers = Answers(tokens=4, prompt_tokens=40)
        await exchange.head()
        await answers.send_tokens(exchange)
        await exchange.send(answers.finish(exchange))
        await resume.happened()
        await exchange.send(answers.closing_usage(exchange) + sse(b"[DONE]"))
        await exchange.end()

    upstream.behaviour = usage_comes_late
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"finish_reason": "stop"')
        stream.leave()
        resume.set()
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - 44)


def test_leaving_after_the_finish_reason_does_not_keep_the_upstream_for_long(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)

    async def usage_never_comes(exchange: Exchange) -> None:
        answers = Answers(tokens=4, word="a ")
        await exchange.head()
        await answers.send_tokens(exchange)
        await exchange.send(answers.finish(exchange))
        await exchange.stall()

    upstream.behaviour = usage_never_comes
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"finish_reason": "stop"')
        stream.leave()
        upstream.posts[0].closed.wait(CLOSED_SECONDS + 1)
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 4)


def test_leaving_with_the_last_event_costs_the_exact_usage(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """In the moment of settling: whichever comes first, the price is the same."""
    account = funded_key(credits=1000)
    for _ in range(20):
        with proxy.client(account.key).stream_chat() as stream:
            stream.read_until(b"usage")
            stream.leave()
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - 20 * 8)


def test_leaving_at_random_moments_leaves_no_hold_behind(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100_000)
    upstream.behaviour = Answers(tokens=40, word="a ", piece_bytes=64)
    for events in range(20):
        with proxy.client(account.key).stream_chat() as stream:
            stream.read_until(b"data: ", times=events + 1)
            stream.leave()
    for _ in range(20):
        with proxy.client(account.key).start_chat(stream=True) as pending:
            pending.leave()
    shown = proxy.wait_until_settled(account)
    assert 0 < account.credits - shown["credits"] <= 40 * (QUESTION_ESTIMATE + 40)
    wait_until(lambda: all(exchange.finished.is_set() for exchange in upstream.posts), "the upstream is quiet")
    assert_audit(proxy)


def test_a_client_that_does_not_read_slows_the_upstream_and_hinders_nobody(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1e9)
    upstream.behaviour = Answers(tokens=2000, word="x" * 100_000)  # 200 MB
    with proxy.client(account.key).stream_chat(max_tokens=100_000_000) as stream:
        sent = upstream.next_exchange().sent
        sizes: list[int] = []
        wait_until(lambda: sizes.append(len(sent)) or sizes[-25:].count(len(sent)) == 25, "the upstream waits", 60)
        assert len(sent) < 50_000_000
        assert proxy.client(account.key).chat(model="echo").status == 200
        stream.leave()
        upstream.posts[0].closed.wait(CLOSED_SECONDS)
    charged = account.credits - proxy.wait_until_settled(account)["credits"]
    assert 0 < charged <= len(sent) / 4 + 100
    assert_audit(proxy)


def test_what_waits_behind_a_client_that_does_not_read_is_not_charged_when_it_leaves(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """Tokens that the hold does not cover, in one read with the end of an event that is too much for the client."""
    account, other = funded_key(credits=3000), funded_key(credits=3000)

    async def sends_more_than_is_read(exchange: Exchange) -> None:
        wall = sse({"padding": "p" * 14_000_000, "choices": [{"index": 0, "delta": {}, "finish_reason": None}]})
        await exchange.head()
        await exchange.send(sse({"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}))
        await exchange.send(wall[:-100])
        await exchange.send(wall[-100:] + sse({"choices": [{"index": 0, "delta": {"content": "word" * 500}}]}))
        await exchange.stall()

    upstream.behaviour = sends_more_than_is_read
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b"word")
        sent = upstream.next_exchange().sent
        wait_until(lambda: sent.endswith(b"\n\n") and len(sent) > 14_000_000, "everything is sent")
        for _ in range(5):  # by then the proxy has seen it
            assert proxy.client(other.key).chat(model="echo").status == 200
        stream.leave()
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=3000 - QUESTION_ESTIMATE - 1)


def test_a_body_that_never_ends_holds_nothing_and_hinders_nobody(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    with contextlib.ExitStack() as stack:
        for _ in range(50):
            headers = {"content-length": "100000"}
            pending = proxy.client(account.key).send("POST", "/v1/chat/completions", b'{"model": "plain", ', headers)
            stack.enter_context(pending)
        assert_books(proxy, account, credits=100, held=0)
        assert proxy.client(account.key).chat().status == 200
    assert len(upstream.posts) == 1
    assert_books(proxy, account, credits=92)


# -- The upstream breaks

BROKEN_BEFORE_ANYTHING = {
    "resets before headers": ResetsBeforeHeaders(),
    "closes before headers": ClosesBeforeHeaders(),
    "speaks no HTTP": SpeaksNoHttp(),
    "empty body": EmptyBody(),
    "breaks before the first event": BreaksBeforeFirstEvent(),
    "answers 500": Fails(500),
    "answers 301": Fails(301, headers={"location": "http://127.0.0.1:1/"}),
    "answers 401": Fails(401),
    "answers 402": Fails(402),
    "answers 403": Fails(403),
    "answers 407": Fails(407),
}


@pytest.mark.parametrize("name", BROKEN_BEFORE_ANYTHING)
@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_breaks_before_the_first_event_costs_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str, stream: bool
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = BROKEN_BEFORE_ANYTHING[name]
    answer = proxy.client(account.key).chat(stream=stream)
    assert_error(answer, 502, "upstream_error", "upstream_error")
    assert_books(proxy, account, credits=1000)


def test_an_answer_shorter_than_promised_costs_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = WrongContentLength()
    assert_error(proxy.client(account.key).chat(), 502, "upstream_error", "upstream_error")
    assert_books(proxy, account, credits=1000)


BROKEN_IN_THE_MIDDLE = {
    "breaks in the middle of an event": (BreaksMidEvent(tokens=2), 2),
    "breaks between events": (BreaksBetweenEvents(tokens=5), 5),
    "ends in mid-air": (EndsInMidAir(tokens=4), 4),
    "shorter than promised": (WrongContentLength(), 1),
    "stalls": (StallsMidStream(tokens=3), 3),
}


@pytest.mark.parametrize("name", BROKEN_IN_THE_MIDDLE)
def test_an_upstream_that_breaks_in_the_middle_costs_what_was_relayed(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, name: str
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour, words = BROKEN_IN_THE_MIDDLE[name]
    answer = proxy.client(account.key).chat(stream=True, model="impatient")
    assert error_frame(answer)["code"] == ("upstream_timeout" if name == "stalls" else "upstream_error")
    assert answer.words == words
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - words)


def test_an_error_event_of_the_upstream_passes_and_what_came_before_it_is_charged(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = ErrorEventThenDone(tokens=2)
    answer = proxy.client(account.key).chat(stream=True)
    assert ErrorEventThenDone().error in answer.body
    assert answer.words == 2
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 2)


@pytest.mark.parametrize("behaviour", [EndsWithoutDone(), AnswersJsonToAStream(), SendsGzip(), Answers()])
def test_an_end_that_is_one_costs_the_exact_usage(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, behaviour: Any
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = behaviour
    answer = proxy.client(account.key).chat(stream=True)
    assert answer.status == 200 and answer.clean
    assert_books(proxy, account, credits=992)


def test_garbage_ends_as_broken_and_holds_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = SendsGarbage()
    answer = proxy.client(account.key).chat(stream=True)
    assert answer.status == 502 or not answer.clean
    assert proxy.account(account.name)["held"] == 0
    assert_audit(proxy)


def test_a_pooled_connection_that_died_is_tried_once_more_and_paid_once(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    for stream in (False, True):
        upstream.behaviour = ClosesBeforeHeaders(times=1)
        assert proxy.client(account.key).chat(stream=stream).status == 200
    assert len(upstream.posts) == 4
    assert_books(proxy, account, credits=1000 - 2 * 8)


def test_a_failover_is_paid_once(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = BreaksBeforeFirstEvent()
    answer = proxy.client(account.key).chat(model="pair", stream=True)
    assert answer.clean and answer.words == 3
    assert_books(proxy, account, credits=992)


# -- The database


@contextlib.contextmanager
def locked(proxy: RunningProxy) -> Iterator[None]:
    """Somebody else writes to the database and does not come to an end."""
    database = sqlite3.connect(proxy.database, isolation_level=None)
    try:
        database.execute("BEGIN IMMEDIATE")
        yield
    finally:
        database.close()


@contextlib.contextmanager
def full_disk(proxy: RunningProxy) -> Iterator[None]:
    """No file of the server can grow: what a full disk looks like to it."""
    before = resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def hindered(module_proxy: MakeProxy) -> RunningProxy:
    """A proxy whose database these tests hinder."""
    return module_proxy()


OBSTACLES = {"locked": locked, "full disk": full_disk}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_ledger_that_takes_no_writes_relays_nothing_and_recovers(hindered: RunningProxy, obstacle: str) -> None:
    proxy = hindered
    proxy.upstream.reset()
    account = proxy.add_account(100)
    client = proxy.client(account.key)
    assert client.chat().status == 200
    with OBSTACLES[obstacle](proxy):
        for stream in (False, True):
            assert_error(client.chat(stream=stream), 503, "ledger_unavailable", "server_error")
    assert len(proxy.upstream.posts) == 1
    assert client.chat().status == 200
    assert_books(proxy, account, credits=100 - 16)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_written_down_is_withheld_and_charged_later(hindered: RunningProxy, obstacle: str) -> None:
    """Neither the end of a stream nor a whole answer is given before it is paid."""
    proxy, answers = hindered, Answers(pause_after=0)
    proxy.upstream.reset(answers)
    account = proxy.add_account(20_000)
    client = proxy.client(account.key)
    with client.start_chat() as whole, client.stream_chat() as stream:
        stream.read_until(b"assistant")
        wait_until(lambda: len(proxy.upstream.posts) == 2, "both are under way")
        with OBSTACLES[obstacle](proxy):
            answers.resume.set()
            assert error_frame(stream.finish())["code"] == "ledger_unavailable"
            assert_error(whole.answered().finish(), 503, "ledger_unavailable", "server_error")
    left = proxy.wait_until_settled(account)["credits"]
    assert left in (20_000 - 16, 20_000 - 8)  # the stream is paid; the answer that nobody got may be void
    assert_audit(proxy)


def test_a_lock_of_a_moment_is_waited_out(hindered: RunningProxy) -> None:
    proxy = hindered
    proxy.upstream.reset()
    account = proxy.add_account(100)
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(proxy))
        with proxy.client(account.key).start_chat() as pending:
            lock.close()
            assert pending.answered().finish().status == 200
    assert_books(proxy, account, credits=92)
