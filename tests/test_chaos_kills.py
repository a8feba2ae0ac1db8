"""kill -9 amid streams of three kinds, again and again: it loses no more than a slice of each, and the books add up."""

import asyncio
import contextlib
import random
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.support.api_chaos import DIALECTS, dialect_of
from tests.support.books import assert_audit
from tests.support.crowd import Wire, ask
from tests.support.exchange import Exchange
from tests.support.ledger import request_name
from tests.support.process import Account, RunningProxy
from tests.support.storm import SLICE

MakeProxy = Callable[..., RunningProxy]


class Babbles:
    """Streams for ever, at a pace of its own, and keeps count."""

    event_bytes = 100  # about

    def __init__(self, seed: str) -> None:
        self.draw = random.Random(seed)
        self.sent: dict[str, int] = defaultdict(int)

    async def __call__(self, exchange: Exchange) -> None:
        dialect = dialect_of(exchange.path)
        name, event = dialect.content(exchange.json), dialect.encode(dialect.word("word", None))
        await exchange.head()
        while True:
            burst = self.draw.choice((1, 1, 2, 5, SLICE + 3))
            self.sent[name] += burst
            await exchange.send(event * burst)
            await asyncio.sleep(self.draw.choice((0, 0.005, 0.02)))


@dataclass(kw_only=True)
class Listener(Wire):
    """One stream's client: what it received until the server died."""

    name: str

    @property
    def words(self) -> int:
        return self.body.count(b'"word"')


class Audience:
    """Listeners to many streams at once; when they have heard enough, the server is killed."""

    def __init__(self, proxy: RunningProxy, account: Account, listeners: list[Listener], enough: int) -> None:
        self.proxy, self.account, self.listeners, self.enough = proxy, account, listeners, enough

    async def listen_and_kill(self) -> None:
        await asyncio.gather(*map(self.listen, self.listeners))

    async def listen(self, listener: Listener) -> None:
        dialect = DIALECTS[self.listeners.index(listener) % len(DIALECTS)]
        request = dialect.request(listener.name, "plain", **{"stream": True, dialect.bound: 1_000_000})
        await ask(self.proxy.port, self.account.key, dialect.path, request, listener, self.heard)

    async def heard(self) -> bool:
        if sum(len(each.raw) for each in self.listeners) >= self.enough:
            self.proxy.process.kill()
        return False


class Office:
    """Somebody who adds credits, makes and revokes keys and looks at the usage, whatever the server does."""

    def __init__(self, proxy: RunningProxy, account: Account) -> None:
        self.proxy, self.account = proxy, account
        self.granted = 0

    def work(self, refs: str) -> None:
        for turn in range(3):
            ref = f"{refs}-{turn}"
            assert self.proxy.command("credit", "add", self.account.name, 7, "--ref", ref)["added"]
            self.granted += 7
            key = self.proxy.command("key", "add", self.account.name)
            self.proxy.command("key", "revoke", key["key_id"])
            self.proxy.command("usage")

    @contextlib.contextmanager
    def open(self, refs: str) -> Iterator[None]:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self.work(refs)
            except BaseException as error:
                errors.append(error)

        clerk = threading.Thread(target=work)
        clerk.start()
        yield
        clerk.join()
        assert not errors, errors


def charged_after_crash(proxy: RunningProxy, listeners: list[Listener], sent: dict[str, int]) -> list[int]:
    """How many tokens each listener received beyond what it was charged for."""
    sql = "SELECT id, completion_tokens FROM request WHERE outcome = 'interrupted'"
    rows = {request_name(number): tokens for number, tokens in proxy.ledger.query(sql)}
    heard = [listener for listener in listeners if listener.request_id]
    assert all(rows[listener.request_id] <= sent[listener.name] for listener in heard)
    return [listener.words - rows[listener.request_id] for listener in heard]


@pytest.mark.parametrize("rounds, streams", [(2, 25), pytest.param(10, 60, marks=pytest.mark.chaos)])
def test_kill_9_in_the_middle_of_streams_loses_no_more_than_a_slice_of_each(
    running_proxy: MakeProxy, seed: str, rounds: int, streams: int, tell: Callable[[str], None]
) -> None:
    babbles = Babbles(seed)
    proxy = running_proxy(options={"hold_output_tokens": SLICE}, behaviour=babbles)
    account = proxy.add_account(10_000_000)
    office = Office(proxy, account)
    beyond: list[int] = []
    for number in range(rounds):
        listeners = [Listener(name=f"{number}/{stream}") for stream in range(streams)]
        enough = babbles.draw.randrange(streams, streams * 5 * SLICE) * babbles.event_bytes
        with office.open(refs=f"round-{number}"):
            asyncio.run(Audience(proxy, account, listeners, enough).listen_and_kill())
            proxy.wait()
        proxy.start()
        audit = assert_audit(proxy)
        assert (audit["held"], audit["open_requests"]) == (0, 0)
        beyond += charged_after_crash(proxy, listeners, babbles.sent)
    assert max(beyond) <= SLICE
    assert audit["grants"] == 10_000_000 + office.granted
    assert proxy.account(account.name)["credits"] == audit["grants"] - audit["charges"]
    tell(
        f"{rounds} kills amid {streams} streams each, seed {seed}: {len(beyond)} streams had begun,"
        f" received beyond what was charged: {max(beyond)} tokens at most, with slices of {SLICE}"
    )
