"""kill -9 and SIGTERM in the middle of streams: the books add up, and what clients got is charged."""

import contextlib
import http.client
import json
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE, Response, Stream, chat_request
from tests.support.errors import assert_error, error_frame
from tests.support.misbehaviours import StallsBeforeHeaders
from tests.support.process import Account, RunningProxy
from tests.support.waiting import CLOSED_SECONDS

MakeProxy = Callable[..., RunningProxy]
SLICE = 10


@contextlib.contextmanager
def streams(proxy: RunningProxy, accounts: list[Account], words: int) -> Iterator[list[Stream]]:
    """A stream of each account, of which this many words have come."""
    with contextlib.ExitStack() as stack:
        open_streams = [stack.enter_context(proxy.client(account.key).stream_chat()) for account in accounts]
        for stream in open_streams:
            stream.read_until(b'"word"', times=words)
        yield open_streams


@pytest.mark.parametrize("words", [3, 137])
def test_after_kill_9_all_but_the_last_slice_of_each_stream_is_charged(running_proxy: MakeProxy, words: int) -> None:
    proxy = running_proxy(options={"hold_output_tokens": SLICE}, behaviour=Answers(tokens=1000, pause_after=words))
    accounts = [proxy.add_account(5000) for _ in range(6)]
    with streams(proxy, accounts, words):
        assert proxy.audit()["open_requests"] == 6
        proxy.kill()
    assert_audit(proxy)
    proxy.start()
    audit = assert_audit(proxy)
    assert (audit["held"], audit["open_requests"]) == (0, 0)
    for account in accounts:
        charged = 5000 - proxy.account(account.name)["credits"]
        assert max(0, words - SLICE) <= charged - QUESTION_ESTIMATE <= words
        assert proxy.client(account.key).balance == 5000 - charged


def test_crash_after_crash_while_commands_run_beside(running_proxy: MakeProxy) -> None:
    """Commands write to the same database, and may be killed off from their server at any moment."""
    proxy = running_proxy(options={"hold_output_tokens": SLICE})
    account = proxy.add_account(1_000_000)
    granted = 1_000_000
    for crash in range(4):
        proxy.upstream.reset(Answers(tokens=1000, pause_after=5 + crash))
        beside = threading.Thread(target=proxy.run, args=("credit", "add", account.name, 7, "--ref", f"crash-{crash}"))
        with streams(proxy, [account] * 20, 5 + crash):
            beside.start()
            proxy.kill()
            beside.join()
        granted += 7
        proxy.start()
        assert_audit(proxy)
        assert proxy.account(account.name)["held"] == 0
    added = [proxy.command("credit", "add", account.name, 7, "--ref", f"crash-{crash}")["added"] for crash in range(4)]
    assert added == [False] * 4
    charged = granted - proxy.account(account.name)["credits"]
    assert 80 * QUESTION_ESTIMATE <= charged <= 80 * (QUESTION_ESTIMATE + 8)


def test_a_request_that_a_crash_cut_off_before_its_answer_costs_its_prompt(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(behaviour=StallsBeforeHeaders())
    account = proxy.add_account(10_000)
    with proxy.client(account.key).start_chat():
        proxy.upstream.next_exchange()
        proxy.kill()
    proxy.start()
    assert_books(proxy, account, credits=10_000 - QUESTION_ESTIMATE)


# -- SIGTERM


def test_a_drain_lets_streams_finish(running_proxy: MakeProxy) -> None:
    answers = Answers(pause_after=2)
    proxy = running_proxy(behaviour=answers)
    account = proxy.add_account(1000)
    with streams(proxy, [account] * 3, 2) as open_streams:
        proxy.signal(signal.SIGTERM)
        refused_by_and_by(proxy)
        answers.resume.set()
        ends = [stream.finish() for stream in open_streams]
    assert all(end.clean and end.words == 3 for end in ends)
    assert proxy.wait() == 0
    assert_books(proxy, account, credits=1000 - 24)


def refused_by_and_by(proxy: RunningProxy) -> None:
    """Until nobody listens any more."""
    with contextlib.suppress(ConnectionError):
        while proxy.client(None).get("/health").status:
            pass


def test_a_drain_takes_no_more_requests_on_old_connections(running_proxy: MakeProxy) -> None:
    answers = Answers(pause_after=1)
    proxy = running_proxy(behaviour=answers)
    account = proxy.add_account(1000, tier="hundred-a-minute")
    kept = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    headers = {"authorization": f"Bearer {account.key}", "content-type": "application/json"}
    with contextlib.closing(kept), streams(proxy, [account], 1) as (stream,):
        kept.request("GET", "/v1/models", headers=headers)
        assert kept.getresponse().read()
        proxy.signal(signal.SIGTERM)
        refused_by_and_by(proxy)
        try:
            kept.request("POST", "/v1/chat/completions", json.dumps(chat_request()), headers)
            answer = kept.getresponse()
            refused = Response(answer.status, answer.headers, answer.read(), clean=True)
            assert_error(refused, 503, "shutting_down", "server_error")
            assert (refused.headers["x-ratelimit-limit"], refused.headers["connection"]) == ("100", "close")
        except (ConnectionError, http.client.RemoteDisconnected):
            pass  # an idle connection may also have been closed
        answers.resume.set()
        assert stream.finish().clean
    assert proxy.wait() == 0
    assert len(proxy.upstream.posts) == 1
    assert_books(proxy, account, credits=992)


def test_what_does_not_finish_within_the_drain_is_told_and_charged(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(options={"drain_seconds": 0.5}, behaviour=Answers(tokens=9, pause_after=4))
    account = proxy.add_account(1000)
    with streams(proxy, [account] * 3, 4) as open_streams:
        proxy.signal(signal.SIGTERM)
        errors = [error_frame(stream.finish()) for stream in open_streams]
    assert {error["code"] for error in errors} == {"shutting_down"}
    assert proxy.wait() == 0
    assert_books(proxy, account, credits=1000 - 3 * (QUESTION_ESTIMATE + 4))


def test_a_request_that_waits_when_the_drain_ends_gets_a_status(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(options={"drain_seconds": 0.5}, behaviour=StallsBeforeHeaders())
    account = proxy.add_account(20_000)
    with proxy.client(account.key).start_chat() as pending:
        exchange = proxy.upstream.next_exchange()
        proxy.signal(signal.SIGTERM)
        assert_error(pending.answered().finish(), 503, "shutting_down", "server_error")
        exchange.closed.wait(CLOSED_SECONDS)
    assert proxy.wait() == 0
    assert proxy.account(account.name)["held"] == 0
    assert_audit(proxy)


def test_a_second_sigterm_ends_at_once_and_loses_nothing(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(options={"drain_seconds": 600}, behaviour=Answers(tokens=9, pause_after=4))
    account = proxy.add_account(1000)
    with streams(proxy, [account] * 3, 4):
        proxy.signal(signal.SIGTERM)
        refused_by_and_by(proxy)
        proxy.signal(signal.SIGTERM)
        proxy.wait()
    assert_audit(proxy)
    proxy.start()
    assert_books(proxy, account, credits=1000 - 3 * (QUESTION_ESTIMATE + 4))


def test_echo_outlives_the_drain(running_proxy: MakeProxy) -> None:
    """A stream of the built-in server ends as it should while the server stops."""
    proxy = running_proxy()
    account = proxy.add_account(1_000_000)
    with proxy.client(account.key).stream_chat("word " * 20_000, model="echo") as stream:
        stream.read_until(b"word", times=3)
        proxy.signal(signal.SIGTERM)
        assert stream.finish().clean
    assert proxy.wait() == 0
    assert proxy.account(account.name)["held"] == 0
