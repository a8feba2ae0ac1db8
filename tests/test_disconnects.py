"""A client that leaves, or does not read, pays for what it got, frees the upstream and hinders nobody."""

import contextlib
import re
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE
from tests.support.exchange import Exchange
from tests.support.misbehaviours import (
    StallsBeforeFirstByte,
    StallsBeforeHeaders,
    UsageComesLate,
)
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS, Signal, wait_until

MakeKey = Callable[..., Account]


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


def test_when_the_first_byte_came_is_known_of_a_client_that_left_too(
    proxy: RunningProxy, paused: Any, funded_key: MakeKey
) -> None:
    """The row says it, the log the same, and it is counted."""

    def first_bytes() -> float:
        text = proxy.client(None).get("/metrics").body.decode()
        return float(text.partition("\nproxy_first_byte_seconds_count ")[2].split()[0])

    account, before = funded_key(credits=1000), first_bytes()
    paused(pause_after=1)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"word"')
        name = stream.headers["x-request-id"]
        stream.leave()
    logged = re.search(r"(\d+)/\d+ ms$", proxy.wait_for_line(f"{name} .* client_gone "))
    assert logged
    proxy.wait_until_settled(account)
    row = f"SELECT outcome, first_byte_ms FROM request WHERE id = {int(name.removeprefix('req_'), 16)}"
    assert proxy.ledger.query(row) == [("client_gone", int(logged[1]))]
    assert first_bytes() == before + 1
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 1)


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
    upstream.behaviour = late = UsageComesLate(tokens=4, prompt_tokens=40)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"finish_reason": "stop"')
        stream.leave()
        late.resume.set()
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - 44)


@pytest.mark.parametrize("turn", range(5))
def test_leaving_just_as_the_usage_comes_costs_the_exact_usage(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, turn: int
) -> None:
    """The proxy finds both at once: a read that bears the usage, and nobody to send it to."""
    account = funded_key(credits=1000)
    upstream.behaviour = late = UsageComesLate(tokens=4, prompt_tokens=40)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"finish_reason": "stop"')
        proxy.process.send_signal(signal.SIGSTOP)
        try:
            stream.leave()
            late.resume.set()
            late.sent.wait()
            time.sleep(0.05)  # both are in the proxy's sockets
        finally:
            proxy.process.send_signal(signal.SIGCONT)
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
        wait_until(lambda: sizes.append(len(sent)) or sizes[-100:].count(len(sent)) == 100, "the upstream waits", 60)
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
    """Tokens in the read after one that is too much for the client. What is in one read is handed over as a whole
    (SPEC section 6), and how much of that has reached somebody who is gone cannot be known."""
    account, other = funded_key(credits=3000), funded_key(credits=3000)
    handed_over = Signal()

    async def sends_more_than_is_read(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.send(sse({"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}))
        await exchange.send(sse({"padding": "p" * 14_000_000, "choices": []}))
        await handed_over.happened()
        await exchange.send(sse({"choices": [{"index": 0, "delta": {"content": "more" * 500}}]}))
        await exchange.stall()

    upstream.behaviour = sends_more_than_is_read
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b"padding")
        handed_over.set()
        sent = upstream.next_exchange().sent
        wait_until(lambda: b"more" in sent[-100:], "everything is sent")
        for _ in range(5):  # by then the proxy could have seen it
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
