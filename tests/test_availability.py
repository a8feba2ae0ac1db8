"""What one client, or one upstream, does must not keep the service from the others (issue 11, items 12 to 19)."""

import contextlib
import itertools
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.attackers import (
    AnswersAtLength,
    NeverReads,
    RawClient,
    SaysNothingAndBreaks,
    bare_proxy,
    forget_peak,
    free_port,
    memory_mb,
    request_bytes,
    shrink_pipe,
    sockets_of,
)
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE, Response, chat_request
from tests.support.errors import assert_error
from tests.support.misbehaviours import StallsMidStream
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]
CHAT = "/v1/chat/completions"
MB = 1 << 20


def body_with(text: bytes, **members: Any) -> bytes:
    """A chat request as bytes, with `text` put in as it is, for more members."""
    return json.dumps(chat_request(**members)).encode()[:-1] + b", " + text + b"}"


@pytest.fixture(scope="module")
def strained(module_proxy: MakeProxy) -> RunningProxy:
    """A proxy for the heavy tests, so that its memory is theirs."""
    return module_proxy()


@pytest.fixture
def shared_strain(strained: RunningProxy) -> Iterator[RunningProxy]:
    """After the test: it runs, serves, and its books add up."""
    strained.upstream.reset()
    yield strained
    strained.upstream.reset()
    account = strained.add_account(100)
    assert strained.client(account.key).chat().status == 200
    strained.assert_well()
    assert_books(strained, account, credits=100 - 8)


# -- 12. A model's name


@pytest.mark.parametrize(("length", "status", "code"), [(256, 404, "model_not_found"), (257, 422, "validation_failed")])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings"])
def test_a_models_name_has_at_most_256_characters(
    proxy: RunningProxy, funded_key: MakeKey, path: str, length: int, status: int, code: str
) -> None:
    account = funded_key(100)
    prompt = {"messages": chat_request()["messages"], "prompt": "hi", "input": "hi"}
    member = {CHAT: "messages", "/v1/completions": "prompt"}.get(path, "input")
    answer = proxy.client(account.key).post(path, {"model": "é" * length, member: prompt[member]})
    assert_error(answer, status, code, "invalid_request_error")
    assert "é" * 101 not in answer.body.decode()
    assert_books(proxy, account, credits=100)


@pytest.fixture
def callers(proxy: RunningProxy) -> dict[str, tuple[str | None, int, str]]:
    """Keys that must not be served, and what each is told. The window is the minute: its end must not come between."""
    wait_until(lambda: time.time() % 60 < 56, "the next minute begins")
    suspended, hasty = proxy.add_account(100), proxy.add_account(100, tier="two-a-minute")
    proxy.command("account", "suspend", suspended.name)
    for _ in range(2):
        assert proxy.client(hasty.key).chat().status == 200
    return {
        "without a key": (None, 401, "missing_api_key"),
        "with an unknown key": ("sk-" + "x" * 43, 401, "invalid_api_key"),
        "suspended": (suspended.key, 403, "account_suspended"),
        "rate-limited": (hasty.key, 429, "rate_limit_exceeded"),
    }


def assert_refused(who: str, answer: bytes, status: int, code: str) -> None:
    """One of `callers` was told what it must be. (Who has no key may find the connection reset: it sent too much.)"""
    if answer or status != 401:
        assert answer.startswith(b"HTTP/1.1 %d " % status), (who, answer[:300])
        assert code.encode() in answer, (who, answer[:300])
        assert len(answer) < 2000, who


def test_a_model_of_megabytes_costs_neither_time_nor_memory_whoever_asks(
    proxy: RunningProxy, callers: dict[str, tuple[str | None, int, str]]
) -> None:
    body = json.dumps(chat_request(model="x" * (24 * MB))).encode()
    before = forget_peak(proxy)
    for who, (key, status, code) in callers.items():
        with RawClient(proxy.port) as client:
            answer = client.send(request_bytes(CHAT, body, key)).read_until(b'"status":')
        assert_refused(who, answer, status, code)
    assert memory_mb(proxy, "VmHWM") - before < 300


# -- 13. Bodies that are costly to look at


@pytest.mark.parametrize("elements", [b'"",', b"1,", b'"abc",', b"[],"], ids=repr)
def test_a_body_of_millions_of_elements_is_refused(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, elements: bytes
) -> None:
    account = funded_key(1000)
    body = body_with(b'"x": [' + elements * 5_000_000 + b"0]")
    answer = proxy.client(account.key).post(CHAT, body)
    assert answer.status in (400, 413, 422), answer.status
    assert len(answer.body) < 2000
    assert not upstream.posts
    assert_books(proxy, account, credits=1000)


def test_a_body_of_millions_of_members_is_refused(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(1000)
    members = b",".join(b'"%x":0' % number for number in range(1_500_000))
    answer = proxy.client(account.key).post(CHAT, body_with(b'"x": {' + members + b"}"))
    assert answer.status in (400, 413, 422), answer.status
    assert not upstream.posts
    assert_books(proxy, account, credits=1000)


def test_a_text_full_of_commas_and_colons_is_no_costly_body(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """What costs is elements, not the letters of a text that look like them: a program's source is full of them."""
    account = funded_key(10_000_000)
    assert proxy.client(account.key).chat('{"a":[1,2,"",{}],' * 50_000).status == 200
    assert_books(proxy, account, credits=10_000_000 - 8)


def look_alikes(number: int) -> Iterator[str]:
    """So many different names that some server would take for `max_completion_tokens`."""
    letters = "maxcompletiontokens"
    choices = itertools.product(*((letter, letter.upper()) for letter in letters))
    return itertools.islice(("".join(name) for name in choices), number)


def test_the_first_ten_errors_are_told_and_no_more(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(1000)
    body = {**chat_request(), **dict.fromkeys(look_alikes(50_000), 1)}
    answer = proxy.client(account.key).post(CHAT, body)
    assert_error(answer, 422, "validation_failed", "invalid_request_error")
    assert 1 <= sum(len(why) for why in answer.json()["errors"].values()) <= 10
    assert len(answer.body) < 10_000
    assert not upstream.posts
    assert_books(proxy, account, credits=1000)


@pytest.mark.parametrize(
    "members",
    [
        {"model": "y" * 200},
        {"m" + "_" * 5000 + "odel": "x"},
        {"n": "y" * 5000},
        {"stream": "y" * 5000},
        {"max_tokens": "y" * 5000},
        {"stream_options": {"include_" + "_" * 5000 + "usage": True}},
        {"messages": [{"role": "user", "con" + "_" * 5000 + "tent": "x"}]},
        {"messages": "y" * 5000},
        {"messages": ["y" * 5000]},
    ],
    ids=lambda members: next(iter(members))[:20],
)
def test_no_message_quotes_more_than_100_characters_of_a_client(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, members: dict[str, Any]
) -> None:
    account = funded_key(1000)
    answer = proxy.client(account.key).post(CHAT, {**chat_request(stream=True), **members})
    assert answer.status in (404, 422), answer.body[:300]
    assert b"y" * 101 not in answer.body and b"_" * 101 not in answer.body, answer.body[:300]
    assert_books(proxy, account, credits=1000)


def test_no_message_quotes_more_than_100_characters_of_a_path_or_a_key(proxy: RunningProxy) -> None:
    for path, key in (("/v1/" + "y" * 4000, "sk-x"), ("/v1/models/" + "y" * 4000, "sk-x"), ("/v1/models", "y" * 4000)):
        answer = proxy.client(key).get(path)
        assert answer.status in (401, 404)
        assert b"y" * 101 not in answer.body


# -- 14. Uploads


def half_sent(port: int, key: str, sent: int, announced: int) -> RawClient:
    """A client that sent some of a body and waits."""
    head = json.dumps(chat_request("x")).encode()[:-5]
    return RawClient(port).send(request_bytes(CHAT, head + b"x" * (sent - len(head)), key, announced))


@pytest.fixture
def in_flight(proxy: RunningProxy, upstream: FakeUpstream) -> Iterator[Account]:
    """An account whose tier allows one request at a time, and that has one."""
    account = proxy.add_account(1000, tier="one-at-a-time")
    upstream.behaviour = StallsMidStream(tokens=2)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b"word", times=2)
        yield account
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE - 2)


def test_who_cannot_be_served_is_told_before_a_large_body_is_taken(
    proxy: RunningProxy, callers: dict[str, tuple[str | None, int, str]], in_flight: Account
) -> None:
    """Only 100 KB of 30 MB are ever sent: who waits for the rest waits in vain."""
    broke = proxy.add_account(0)
    del callers["without a key"]  # which is another test's
    told = {**callers, "at its limit": (in_flight.key, 429, "too_many_parallel_requests")}
    told["without credits"] = (broke.key, 402, "insufficient_credits")
    for who, (key, status, code) in told.items():
        with half_sent(proxy.port, str(key), 100_000, 30 * MB) as client:
            answer = client.read_until(b'"status":')
        assert_refused(who, answer, status, code)
    assert_books(proxy, broke, credits=0)


def refusals(clients: list[RawClient]) -> list[bytes]:
    """What those were told that were told something."""
    told = []
    for client in clients:
        client.socket.setblocking(False)
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            told.append(client.socket.recv(65536))
    return [answer for answer in told if answer]


def test_an_account_holds_a_quarter_of_the_memory_for_bodies(shared_strain: RunningProxy) -> None:
    proxy, account = shared_strain, shared_strain.add_account(1_000_000_000)
    before = memory_mb(proxy)
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(half_sent(proxy.port, account.key, 30 * MB, 31 * MB)) for _ in range(4)]
        told = wait_until(lambda: refusals(clients), "one of 4 uploads of 31 MB is refused")
        assert told[0].startswith(b"HTTP/1.1 429 "), told[0][:300]
        assert b"too_many_parallel_requests" in told[0]
        assert re.search(rb"(?i)retry-after: \d", told[0])
        assert memory_mb(proxy) - before < 200
    wait_until(lambda: proxy.client(account.key).chat().status == 200, "what they held is free again")
    proxy.wait_until_settled(account)
    assert_audit(proxy)


def test_bodies_hold_a_bounded_amount_of_memory_together(shared_strain: RunningProxy) -> None:
    proxy = shared_strain
    accounts = [proxy.add_account(1_000_000_000) for _ in range(6)]
    before = memory_mb(proxy)
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(half_sent(proxy.port, account.key, 30 * MB, 31 * MB))
            for account in accounts
            for _ in range(2)
        ]
        told = wait_until(lambda: refusals(clients), "one of 12 uploads of 31 MB, 6 accounts', is refused")
        assert told[0].startswith(b"HTTP/1.1 503 "), told[0][:300]
        assert b"server_error" in told[0] and re.search(rb"(?i)retry-after: \d", told[0])
        assert memory_mb(proxy) - before < 500
        assert proxy.client(None).get("/health").status == 200
    wait_until(lambda: proxy.client(accounts[0].key).chat().status == 200, "what they held is free again")
    assert_audit(proxy)


# -- 15. Whole answers that nobody takes


def test_an_account_holds_a_quarter_of_the_memory_for_whole_answers(shared_strain: RunningProxy) -> None:
    proxy, account = shared_strain, shared_strain.add_account(10_000, tier="one-at-a-time")
    proxy.upstream.behaviour = AnswersAtLength(24 * MB)
    before = memory_mb(proxy)
    statuses: list[int] = []
    with contextlib.ExitStack() as stack:
        while len(statuses) < 8 and 429 not in statuses:
            answer = stack.enter_context(proxy.client(account.key).start_chat()).answered()
            stack.enter_context(answer)
            statuses.append(answer.status)
        refused = answer.finish()
        assert memory_mb(proxy) - before < 300
    assert statuses[-1] == 429, statuses
    assert_error(refused, 429, "too_many_parallel_requests", "rate_limit_error")
    assert int(refused.headers["retry-after"]) >= 1
    proxy.wait_until_settled(account)
    spent = 10_000 - proxy.account(account.name)["credits"]
    assert spent <= 8 * len(statuses)
    assert_books(proxy, account, credits=10_000 - spent)


def test_whole_answers_whose_clients_left_do_not_stay_in_memory(shared_strain: RunningProxy) -> None:
    proxy, account = shared_strain, shared_strain.add_account(10_000)
    proxy.upstream.behaviour = AnswersAtLength(20 * MB)
    before = memory_mb(proxy)
    for _ in range(15):
        with proxy.client(account.key).start_chat() as pending, pending.answered() as answer:
            assert answer.status == 200
            assert answer.read_some()
    proxy.wait_until_settled(account)
    wait_until(lambda: memory_mb(proxy) - before < 150, "the memory of 15 answers of 20 MB is free again")
    assert_books(proxy, account, credits=10_000 - 15 * 8)


# -- 16. Clients that never read

PIPELINED = {
    "health": request_bytes("/health") * 100,
    "refusals": request_bytes("/v1/models") * 100,
    "nothing there": request_bytes("/v1/nothing") * 100,
}


def test_a_stop_does_not_wait_for_clients_that_never_read(running_proxy: MakeProxy) -> None:
    """The limit is far below the drain that the operator allowed, which no stream here needs."""
    proxy = running_proxy(options={"drain_seconds": 60})
    with contextlib.ExitStack() as stack:
        for requests in PIPELINED.values():
            stack.enter_context(NeverReads(proxy.port)).flood(requests)
        proxy.signal(signal.SIGTERM)
        try:
            assert proxy.wait(5) == 0
        except subprocess.TimeoutExpired:
            proxy.kill()
            pytest.fail("the stop waits for clients that do not read")


def test_a_stop_does_not_wait_for_a_whole_answer_that_nobody_takes(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(options={"drain_seconds": 1}, behaviour=AnswersAtLength(20 * MB))
    account = proxy.add_account(100)
    with proxy.client(account.key).start_chat() as pending, pending.answered() as answer:
        assert answer.status == 200
        proxy.signal(signal.SIGTERM)
        try:
            assert proxy.wait(8) == 0
        except subprocess.TimeoutExpired:
            proxy.kill()
            pytest.fail("the stop waits for a client that does not read")
    assert_books(proxy, account, credits=100 - 8)


@pytest.mark.chaos
@pytest.mark.parametrize("kind", PIPELINED)
def test_a_client_that_never_reads_is_cut_after_a_minute(running_proxy: MakeProxy, kind: str) -> None:
    proxy = running_proxy()
    quiet = sockets_of(proxy)
    with NeverReads(proxy.port) as client:
        client.flood(PIPELINED[kind])
        assert sockets_of(proxy) > quiet
        wait_until(lambda: sockets_of(proxy) <= quiet, "the client that does not read is cut", seconds=90)


@pytest.mark.chaos
def test_a_whole_answer_that_nobody_takes_is_cut_after_a_minute_and_its_memory_is_free(
    running_proxy: MakeProxy,
) -> None:
    proxy = running_proxy(behaviour=AnswersAtLength(20 * MB))
    accounts = [proxy.add_account(100) for _ in range(10)]
    before = memory_mb(proxy)
    with contextlib.ExitStack() as stack:
        for account in accounts:
            stack.enter_context(stack.enter_context(proxy.client(account.key).start_chat()).answered())
        wait_until(lambda: memory_mb(proxy) - before < 60, "the memory of 10 cut answers is free", seconds=90)
    for account in accounts:
        assert_books(proxy, account, credits=100 - 8)


# -- 17. A log that nobody reads


def test_a_log_pipe_that_nobody_reads_stops_nothing_and_the_lost_lines_are_counted(
    running_proxy: MakeProxy, tmp_path: Path
) -> None:
    made = running_proxy()
    account = made.add_account(10_000)
    assert made.terminate() == 0
    port = free_port()
    made.config.write_text(made.config.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))
    with bare_proxy(made.config, port, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as proxy:
        shrink_pipe(proxy.process.stdout)
        shrink_pipe(proxy.process.stderr)
        assert proxy.wait_until_up_or_over()
        client = proxy.client(account.key)
        for _ in range(150):
            assert client.chat().status == 200
        lost = re.search(r"(?m)^\w*(?:lost|dropped)\w*(?:\{.*\})? (\d+)", client.get("/metrics").body.decode())
        assert lost and int(lost[1]) > 0
        assert proxy.end() == 0
    assert_books(made, account, credits=10_000 - 150 * 8)


# -- 18. What is no event


@pytest.mark.parametrize(
    "prelude",
    [
        b": ping\n\n",
        b"\n\n",
        b"\r\n\r\n",
        b"retry: 5000\n\n",
        b"id: 7\n\n",
        b"event: ping\n\n",
        b":\n\n: x\n\nretry: 1\n\n",
    ],
    ids=repr,
)
def test_an_upstream_that_breaks_before_its_first_event_is_replaced_by_the_next(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey, prelude: bytes
) -> None:
    account = funded_key(100)
    upstream.behaviour = SaysNothingAndBreaks(prelude)
    backup.behaviour = Answers(tokens=3)
    answer = proxy.client(account.key).stream_chat(model="pair").finish()
    assert (answer.status, answer.words, answer.clean) == (200, 3, True), answer.body
    assert len(backup.posts) == 1
    assert_books(proxy, account, credits=100 - 8)


@pytest.mark.parametrize("prelude", [b": ping\n\n", b"retry: 5000\n\n", b"\n\n"], ids=repr)
def test_the_only_upstream_that_breaks_before_its_first_event_is_an_honest_502(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, prelude: bytes
) -> None:
    account = funded_key(100)
    upstream.behaviour = SaysNothingAndBreaks(prelude)
    assert_error(proxy.client(account.key).stream_chat().finish(), 502, "upstream_error", "upstream_error")
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=100)


# -- 19. Upstreams that cannot be asked

UNASKABLE = {
    "two dots": "http://a..b/v1",
    "a long label": "http://" + "a" * 64 + ".example/v1",
    "a long name": "http://" + "a." * 200 + "example/v1",
    "a scope that is none": "http://[fe80::1%nowhere]:9/v1",
    "nobody there": "http://127.0.0.1:1/v1",
}
ONES = [f"upstream{number}" for number, _ in enumerate(UNASKABLE)]


@pytest.fixture(scope="module")
def unaskable(module_proxy: MakeProxy) -> RunningProxy:
    """A proxy with a model for each upstream that cannot be asked, alone and before one that can."""
    bad = {name: {"base_url": url} for name, url in zip(ONES, UNASKABLE.values(), strict=True)}
    alone = {f"alone-{name}": {"tier": "one", "upstream": name} for name in bad}
    pairs = {f"pair-{name}": {"tier": "one", "upstream": [name, "main"]} for name in bad}
    return module_proxy(upstreams=bad, models={**alone, **pairs})


def ask(proxy: RunningProxy, model: str) -> tuple[Account, Response]:
    account = proxy.add_account(100)
    return account, proxy.client(account.key).chat(model=model)


@pytest.mark.parametrize("name", ONES, ids=UNASKABLE)
def test_an_upstream_that_cannot_be_asked_moves_on_to_the_next(unaskable: RunningProxy, name: str) -> None:
    account, answer = ask(unaskable, f"pair-{name}")
    assert answer.status == 200, answer.body
    assert_books(unaskable, account, credits=100 - 8)


@pytest.mark.parametrize("name", ONES, ids=UNASKABLE)
def test_the_only_upstream_that_cannot_be_asked_is_unavailable(unaskable: RunningProxy, name: str) -> None:
    account, answer = ask(unaskable, f"alone-{name}")
    assert_error(answer, 503, "upstream_unavailable", "upstream_error")
    assert_books(unaskable, account, credits=100)


def test_check_says_in_a_line_that_an_upstream_cannot_be_asked(unaskable: RunningProxy) -> None:
    done = unaskable.run("check")
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode in (0, 1), done
    lines = (done.stdout + done.stderr).splitlines()
    for name in ONES:
        assert [line for line in lines if re.search(rf"\b{name}\b", line)], (name, lines)
    assert max(map(len, lines)) < 1000
