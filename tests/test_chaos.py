"""Everything goes wrong at once, in streams of three kinds: the books still add up, to the token.

A storm is one proxy, an upstream that misbehaves and a hundred clients that misbehave, all by one seed, which is
printed (CHAOS_SEED repeats it as far as the machine's timing allows). Afterwards each request's row is compared
with what its upstream sent and what its client received. `pytest` runs storms of seconds, `pytest -m chaos` the
long form, which also prints its numbers.
"""

import asyncio
import contextlib
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.api_chaos import NONSENSE_TEXT
from tests.support.books import assert_audit
from tests.support.crowd import Crowd, Seen
from tests.support.ledger import request_name
from tests.support.process import Account, RunningProxy
from tests.support.storm import (
    CLIENTS,
    CLIENTS_EACH,
    GROWTH_MB,
    PATIENCE_SECONDS,
    SLICE,
    Chaos,
    Sent,
    estimate,
)
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS, wait_until

MakeProxy = Callable[..., RunningProxy]
MakeUpstream = Callable[..., FakeUpstream]


@dataclass(frozen=True)
class Row:
    """A request, as the books have it."""

    id: str
    state: str
    prompt: int
    completion: int
    estimated: int
    hold: int
    charge: int
    outcome: str


def rows_of(proxy: RunningProxy) -> dict[tuple[str, int], Row]:
    """Every request's row, by account and prompt estimate."""
    sql = """SELECT a.name, r.prompt_estimate, r.id, r.state, r.prompt_tokens,
        r.completion_tokens, r.estimated, r.hold, r.charge, r.outcome
        FROM request r JOIN account a ON a.id = r.account_id"""
    rows = proxy.ledger.query(sql)
    found = {(name, prompt): Row(request_name(number), *rest) for name, prompt, number, *rest in rows}
    assert len(found) == len(rows), "a request has two rows"
    return found


def reckon(seen: Seen, row: Row | None, sent: list[Sent]) -> int:
    """Check one request's charge; by how many tokens it is above what the client received."""
    texts = seen.texts
    if row is None:
        assert not texts and not sent and (seen.left or seen.status == 402), seen
        return 0
    assert row.state in ("settled", "void"), row
    assert not seen.request_id or seen.request_id == row.id
    if row.state == "void":
        assert not texts and row.charge == 0, (seen, row)
        assert row.outcome != "client_gone" or not sent or seen.plan.fails_first, (seen, row)
        return 0
    assert row.charge == (row.prompt + row.completion) * 1000
    assert sent or row.completion == 0
    if row.estimated:
        assert row.prompt in (seen.plan.estimate, seen.plan.prompt_tokens)
        assert estimate(texts) <= row.completion <= max((estimate(each.texts) for each in sent), default=0), (seen, row)
        assert seen.left or row.completion == estimate(texts), (seen, row)
        return row.completion - estimate(texts)
    assert row.prompt == seen.plan.prompt_tokens
    assert row.completion in [tokens for each in sent for tokens in each.said], (seen, row)
    if seen.body.startswith(b"{") and texts:
        return 0  # a whole answer, which has one text for all its tokens
    tokens = len(texts) - texts.count(NONSENSE_TEXT)  # which no usage speaks of
    assert seen.left or row.completion == tokens, (seen, row)
    return row.completion - tokens


def assert_nobody_overdrawn(proxy: RunningProxy, accounts: list[Account]) -> None:
    """A balance is below zero only by what an estimate missed."""
    overruns: dict[str, float] = defaultdict(float)
    for overrun in assert_audit(proxy)["overruns"]:
        overruns[overrun["account"]] += overrun["charge"] - overrun["hold"]
    for account in accounts:
        shown = proxy.account(account.name)
        assert shown["held"] == 0
        assert shown["credits"] >= -overruns[account.name] - 0.0005, (shown, overruns)


def descriptors(proxy: RunningProxy) -> list[str]:
    """The server's open files and sockets."""
    found = []
    for link in Path(f"/proc/{proxy.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def sockets(proxy: RunningProxy) -> int:
    return sum(1 for name in descriptors(proxy) if name.startswith("socket:"))


def memory_mb(proxy: RunningProxy) -> float:
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


@contextlib.contextmanager
def commands_beside(proxy: RunningProxy, accounts: list[Account]) -> Iterator[None]:
    """Somebody tops accounts up and looks at the books, all the while."""
    over = threading.Event()
    failed: list[str] = []

    def work() -> None:
        turn = 0
        while not over.wait(0.1):
            account = accounts[turn % len(accounts)]
            turn += 1
            for command in (("credit", "add", account.name, 150), ("audit",), ("usage",)):
                done = proxy.run(*command)
                if done.returncode:
                    failed.append(f"{command}: {done.stdout}{done.stderr}")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()
    assert not failed, failed


def weather(proxy: RunningProxy, crowd: Crowd, poor: list[Account], seconds: float) -> float:
    """The storm; how much memory the server gained after the first third of it."""
    with commands_beside(proxy, poor):
        asyncio.run(crowd.storm(seconds / 3))
        before = memory_mb(proxy)
        asyncio.run(crowd.storm(2 * seconds / 3))
    wait_until(lambda: proxy.audit()["open_requests"] == 0, "every request is resolved")
    return memory_mb(proxy) - before


class Scene:
    """A proxy with a storm's upstreams and accounts, and what was open before it."""

    def __init__(self, seed: str, running_proxy: MakeProxy, fake_upstream: MakeUpstream) -> None:
        self.sent: dict[str, list[Sent]] = defaultdict(list)
        self.upstreams = [fake_upstream(Chaos(seed, self.sent, calm)) for calm in (False, True)]
        patience = {"first_byte_seconds": 1, "idle_seconds": PATIENCE_SECONDS}
        main, backup = ({"base_url": upstream.url, **patience} for upstream in self.upstreams)
        options = {"hold_output_tokens": SLICE}
        self.proxy = running_proxy(options=options, upstreams={"main": main, "backup": backup})
        self.proxy.wait_for_line("upstream backup: .* reachable")
        self.open_before = len(descriptors(self.proxy)), sockets(self.proxy)
        credits_ = [300, 300] + [10_000_000] * (CLIENTS // CLIENTS_EACH - 2)
        self.accounts = [self.proxy.add_account(each) for each in credits_]
        self.crowd = Crowd(self.proxy, seed, self.accounts)

    def assert_nothing_left_open(self) -> None:
        posts = [exchange for upstream in self.upstreams for exchange in upstream.posts]
        wait_until(lambda: all(exchange.finished.is_set() for exchange in posts), "no upstream is kept", CLOSED_SECONDS)
        for upstream in self.upstreams:
            upstream.close()  # and with it the connections that wait for the next request
        files_before, sockets_before = self.open_before
        wait_until(lambda: sockets(self.proxy) <= sockets_before, "no socket is left open")
        wait_until(lambda: len(descriptors(self.proxy)) <= files_before, "no file is left open")
        metrics = self.proxy.client(None).get("/metrics").body
        assert re.search(rb"^proxy_open_requests 1\.0$", metrics, re.MULTILINE), "but the one that asks"

    def reckon(self) -> list[int]:
        """Check every request's charge; by how much each is above what was received."""
        rows = rows_of(self.proxy)
        above = []
        for seen in self.crowd.seen:
            row = rows.pop((seen.account.name, seen.plan.estimate), None)
            above.append(reckon(seen, row, self.sent[seen.plan.name]))
        assert not rows, "rows that nobody asked for"
        return above


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.chaos)])
def test_after_a_storm_every_request_is_paid_once_and_nothing_is_left_behind(
    running_proxy: MakeProxy, fake_upstream: MakeUpstream, seed: str, seconds: int, tell: Callable[[str], None]
) -> None:
    scene = Scene(seed, running_proxy, fake_upstream)
    gained = weather(scene.proxy, scene.crowd, scene.accounts[:2], seconds)
    audit = assert_audit(scene.proxy)
    assert (audit["held"], audit["open_requests"]) == (0, 0)
    assert_nobody_overdrawn(scene.proxy, scene.accounts)
    above = list(zip(scene.crowd.seen, scene.reckon(), strict=True))
    scene.assert_nothing_left_open()
    assert gained < GROWTH_MB
    left = [tokens for seen, tokens in above if seen.left]
    stayed = [tokens for seen, tokens in above if not seen.left]
    tell(
        f"storm of {seconds} s, seed {seed}: {len(above)} requests, {len(left)} disconnects;"
        f" charged above what was received, at most: {max(stayed)} tokens where the client stayed,"
        f" {max(left)} where it left; {len(audit['overruns'])} overruns; memory {gained:+.1f} MB"
    )
