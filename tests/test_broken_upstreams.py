"""An upstream that breaks costs what was relayed of its answer, and nothing where nothing was."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE
from tests.support.errors import assert_error, error_frame
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
    SendsGarbage,
    SendsGzip,
    SpeaksNoHttp,
    StallsMidStream,
    WrongContentLength,
)
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]


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
    answer = proxy.client(account.key).chat(stream=True, model="impatient" if name == "stalls" else "plain")
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
