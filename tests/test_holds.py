"""Nobody can spend credits that they do not have, nor spend the same ones twice, however many ask at once."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION, QUESTION_ESTIMATE
from tests.support.errors import assert_error, error_frame
from tests.support.process import Account, RunningProxy
from tests.support.sse import event_data, split_events
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]
CHAT_HELD = 2 * QUESTION_ESTIMATE + 64  # for the prompt of a chat, and what its template may add to it
TEXT_ESTIMATE = 4  # of the question as a text: 15 bytes


@pytest.mark.parametrize(
    ("members", "held"),
    [
        ({"max_tokens": 30}, CHAT_HELD + 30),
        ({"max_completion_tokens": 30}, CHAT_HELD + 30),
        ({"max_tokens": 30, "n": 2}, CHAT_HELD + 60),
        ({"max_tokens": 70_000, "stream": True}, CHAT_HELD + 100),  # one slice
        ({"max_tokens": 30, "stream": True}, CHAT_HELD + 30),
        ({"max_tokens": 30, "model": "mid"}, 1.5 * (CHAT_HELD + 30)),
        ({"model": "capped"}, CHAT_HELD + 100),
        ({"model": "windowed"}, CHAT_HELD + 4096 - QUESTION_ESTIMATE),
        ({}, CHAT_HELD + 8192),
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


@pytest.mark.parametrize("members", [{"max_tokens": 30}, {"max_tokens": 70_000, "stream": True}])
def test_a_text_has_no_template_to_hold_for(
    proxy: RunningProxy, paused: Any, funded_key: MakeKey, members: dict[str, Any]
) -> None:
    account = funded_key(credits=5000)
    answers = paused(pause_after=0)
    body = {"model": "plain", "prompt": QUESTION, **members}
    with proxy.client(account.key).send("POST", "/v1/completions", body) as pending:
        answers.reached.wait()
        assert_books(proxy, account, credits=5000, held=2 * TEXT_ESTIMATE + min(members["max_tokens"], 100))
        answers.resume.set()
        assert pending.answered().finish().status == 200
    assert_audit(proxy)


@pytest.mark.parametrize("left", [0, 1, 63])
def test_what_the_template_may_add_is_held_as_far_as_the_credits_reach(
    proxy: RunningProxy, upstream: FakeUpstream, paused: Any, funded_key: MakeKey, left: int
) -> None:
    """It lowers no maximum, and refuses nobody."""
    credits_ = 2 * QUESTION_ESTIMATE + 30 + left
    account = funded_key(credits=credits_)
    answers = paused(pause_after=0)
    with proxy.client(account.key).start_chat(max_tokens=30) as pending:
        answers.reached.wait()
        assert_books(proxy, account, credits=credits_, held=credits_)
        assert upstream.posts[0].json["max_tokens"] == 30
        answers.resume.set()
        answer = pending.answered().finish()
        assert answer.status == 200 and answer.headers["x-max-tokens-limited"] is None
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
        assert CHAT_HELD + 210 <= held <= CHAT_HELD + 400, "slices of 100, not everything"
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
    with proxy.client(account.key).stream_chat(max_tokens=1000) as stream:  # holds 180
        answers.reached.wait()
        other = Answers(pause_after=0)
        upstream.behaviour = other
        with proxy.client(account.key).start_chat(max_tokens=200) as pending:  # holds 220, all that is left
            other.reached.wait()
            answers.resume.set()
            answer = stream.finish()
            assert error_frame(answer)["code"] == "insufficient_credits"
            assert answer.words == 100 + 64, "its slice, and what its template did not need"
            other.resume.set()
            assert pending.answered().finish().status == 200
    assert_books(proxy, account, credits=400 - QUESTION_ESTIMATE - 164 - 8)


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
    body = {"model": "plain", "prompt": QUESTION, "stream": stream, "max_tokens": 10}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with session.post(f"{proxy.base_url}/v1/completions", json=body) as answer:
        text = await answer.read()
        if answer.status != 200:
            return answer.status, json.loads(text)["error"]["code"]
        last = [event_data(event) for event in split_events(text)][-2] if stream else json.loads(text)
        return 200, last["usage"]["total_tokens"]


async def test_300_requests_at_once_cannot_spend_the_credits_of_20(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=20 * (2 * TEXT_ESTIMATE + 10))
    answers = Answers(tokens=10, prompt_tokens=TEXT_ESTIMATE, pause_after=0)
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
    account = funded_key(credits=20 * (2 * TEXT_ESTIMATE + 10))
    upstream.behaviour = Answers(tokens=10, prompt_tokens=TEXT_ESTIMATE)
    headers = {"authorization": f"Bearer {account.key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:
        results = await asyncio.gather(*(one_of_many(session, proxy, bool(n % 2)) for n in range(300)))
    spent = sum(tokens for status, tokens in results if status == 200)
    assert len(upstream.posts) == sum(status == 200 for status, _ in results) >= 20
    assert {code for status, code in results if status != 200} <= {"credits_in_use", "insufficient_credits"}
    assert spent <= account.credits
    assert_books(proxy, account, credits=account.credits - spent)
