"""The one place where the tests know the core's ledger: its verbs on a database, a function each, and its one writer.

Amounts are thousandths of a credit, moments milliseconds. `Bench` is an account with the verbs in short words, for
tests that tell a story; `at_work` is the running ledger, and `use` a request through it.
"""

import argparse
import asyncio
import contextlib
import itertools
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import proxy
from tests.support.core_meter import Bill, delta, new_meter, sse
from tests.support.files import MODELS, OPTIONS, write_files

Refusal = proxy.Refusal
Verb = Callable[[sqlite3.Connection], Any]
NOW = proxy.now_ms()
DAY = 86_400_000
TIERS = {"unlimited": proxy.Tier(), "limited": proxy.Tier(requests_per_minute=4, parallel=2)}
PATIENCE = ("BUSY_SECONDS", "RETRY_SECONDS", "SETTLE_PATIENCE_SECONDS")  # how long the ledger waits for what


class Settled(NamedTuple):
    """What a settle did."""

    charge: int
    balance: int


class Audit(NamedTuple):
    """What `audit` found."""

    ok: bool
    value: dict[str, Any]  # as `--json` prints it
    lines: list[str]


# --------------------------------------------------------------------------------------------------
# Configuration and database


def configuration(folder: Path) -> Any:
    """A configuration, read from real files in a folder, with the tiers above."""
    upstreams = {"main": {"base_url": "http://127.0.0.1:1/v1"}}
    files = write_files(folder, {**OPTIONS, "upstreams": upstreams}, {"plain": MODELS["plain"]})
    return replace(proxy.load_config(files), tiers=TIERS)


def with_database(config: Any, database: Path) -> Any:
    return replace(config, database=database)


def connect(config: Any) -> sqlite3.Connection:
    connection: sqlite3.Connection = proxy.connect(config.database)
    return connection


def command(config: Any, *words: str) -> int:
    """`proxy.py --config FILE WORDS` in this process; its exit code."""
    return int(proxy.main(["--config", str(config.path), *words]) or 0)


@contextlib.contextmanager
def locked(config: Any) -> Iterator[None]:
    """Another process that writes and does not come to an end."""
    with contextlib.closing(sqlite3.connect(config.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def make_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's limits, a hundred times shorter."""
    for name in PATIENCE:
        monkeypatch.setattr(proxy, name, getattr(proxy, name) / 100)


# --------------------------------------------------------------------------------------------------
# Verbs


def run_batch(db: sqlite3.Connection, verbs: list[Any]) -> list[Any]:
    """Verbs in one transaction, as the writer runs them; of each what it returned or raised."""
    return list(proxy.run_batch(db, verbs))


def do(db: sqlite3.Connection, verb: Verb) -> Any:
    """One verb, as the writer runs it; what it raised is raised, a refusal is returned."""
    (outcome,) = run_batch(db, [verb])
    if isinstance(outcome, Exception) and not isinstance(outcome, Refusal):
        raise outcome
    return outcome


def options(**values: Any) -> argparse.Namespace:
    """Of a command, as its parser gives them."""
    return argparse.Namespace(**values)


def create_account(
    db: sqlite3.Connection, config: Any, name: str, now: int, free: int, days: int = 30, tier: str = "unlimited"
) -> int:
    """The id of a new account with free credits for so many days."""
    config = replace(config, free_credits=free, free_days=days)
    return int(do(db, partial(proxy.create_account, config=config, name=name, tier=tier, now=now)))


def create_key(db: sqlite3.Connection, account_id: int, now: int) -> tuple[bytes, int]:
    """The hash and the id of a new key."""
    key, key_id = do(db, partial(proxy.create_key, account_id=account_id, label=None, now=now))
    return sha256(key.encode()).digest(), key_id


def grant(db: sqlite3.Connection, account_id: int, amount: int, now: int) -> None:
    """Purchased credits; a negative amount takes some back."""
    do(db, partial(proxy.grant_paid, account_id=account_id, amount=amount, ref=None, note=None, now=now))


def revoke(db: sqlite3.Connection, config: Any, key_id: int) -> None:
    proxy.key_revoke(db, config, options(key_id=key_id))


def suspend_or_resume(db: sqlite3.Connection, config: Any, name: str, active: bool) -> None:
    proxy.account_change("status", db, config, options(name=name, value="active" if active else "suspended"))


def audit(db: sqlite3.Connection, config: Any) -> Audit:
    report = proxy.audit(db, config, options())
    return Audit(report.ok, report.value, list(report.lines))


def id_at(now: int) -> int:
    """The first id that a request of this moment can have."""
    return int(now << proxy.REQUEST_ID_BITS)


def order(
    request_id: int,
    key_hash: bytes,
    multiplier: int = 1000,
    estimate: int = 0,
    choices: int = 1,
    max_tokens: int = 10,
    slice_tokens: int | None = None,
) -> Any:
    """What a hold is asked for: `slice_tokens` is None where nothing is streamed."""
    return proxy.Order(request_id, key_hash, "plain", multiplier, estimate, choices, max_tokens, slice_tokens)


def hold(ordered: Any, now: int) -> Verb:
    """The verb that admits a request, or refuses it."""
    return partial(proxy.hold, order=ordered, limits_of=TIERS.__getitem__, now=now)


def admission_of(outcome: Any) -> tuple[int, int]:
    """Of a hold that was granted: the maximum a choice, and how many tokens of output are held."""
    assert isinstance(outcome, proxy.Admission), outcome
    return outcome.max_tokens, outcome.granted


def refusal_of(outcome: Any) -> str:
    """Of a hold that was refused: the code."""
    assert isinstance(outcome, Refusal), outcome
    return str(outcome.code)


def extend(db: sqlite3.Connection, request_id: int, tokens: int, count: int, now: int) -> int:
    """How many of these tokens are held in addition; the count so far is noted."""
    return int(do(db, partial(proxy.extend, request_id=request_id, tokens=tokens, count=count, now=now)))


def settle(db: sqlite3.Connection, request_id: int, bill: Bill | None, now: int) -> Settled | None:
    """Settle for a bill, void for None; None if there was nothing to resolve."""
    charged = proxy.Bill(*bill) if bill else None
    outcome = do(db, partial(proxy.settle, end=proxy.Resolution(request_id, "ok", "main", charged), now=now))
    return None if outcome is None else Settled(*outcome)


def recover(db: sqlite3.Connection, now: int) -> int:
    """How many requests were open and are settled now."""
    return int(do(db, partial(proxy.recover, now=now)))


def find_caller(db: sqlite3.Connection, key_hash: bytes, now: int) -> Any:
    """Who has a key: `account`, `free`, `paid`, `held`, `open_requests`; or a refusal."""
    return do(db, partial(proxy.find_caller, key_hash=key_hash, now=now))


def adds(amount: int) -> Verb:
    """A verb that writes, and returns its amount."""

    def verb(db: sqlite3.Connection) -> int:
        db.execute("UPDATE account SET paid = paid + ?, granted = granted + ?", (amount, amount))
        return amount

    return verb


def fails_after_writing(db: sqlite3.Connection) -> None:
    """A verb with a bug."""
    db.execute("UPDATE account SET paid = paid + 1000000, granted = granted + 1000000")
    raise ZeroDivisionError


# --------------------------------------------------------------------------------------------------
# An account with the verbs in short words

NUMBERS = itertools.count(1)


class Bench:
    """An account on a database, and the verbs on it with short words. Credits are whole ones, a token costs one."""

    def __init__(self, db: sqlite3.Connection, config: Any, free: int = 0, paid: int = 0, name: str = "ann") -> None:
        self.db, self.config, self.now = db, config, NOW
        self.id = create_account(db, config, name, NOW, free * 1000)
        self.key_hash, self.key_id = create_key(db, self.id, NOW)
        if paid:
            self.grant(paid)

    def grant(self, credits_: int) -> None:
        grant(self.db, self.id, credits_ * 1000, self.now)

    def order(self, tokens: int = 10, estimate: int = 0, slice_tokens: int | None = None) -> Any:
        request_id = id_at(self.now) + next(NUMBERS)
        return order(request_id, self.key_hash, estimate=estimate, max_tokens=tokens, slice_tokens=slice_tokens)

    def hold(self, tokens: int = 10, estimate: int = 0) -> int:
        """The id of a request that was admitted."""
        ordered = self.order(tokens, estimate)
        admission_of(do(self.db, hold(ordered, self.now)))
        return int(ordered.request_id)

    def refused(self, tokens: int = 10, estimate: int = 0) -> str:
        """The code with which a request is refused."""
        return refusal_of(do(self.db, hold(self.order(tokens, estimate), self.now)))

    def extend(self, request_id: int, tokens: int, count: int) -> int:
        return extend(self.db, request_id, tokens, count, self.now)

    def settle(self, request_id: int, tokens: int | None) -> Settled | None:
        """Settle for so many tokens; None voids."""
        return settle(self.db, request_id, None if tokens is None else Bill(0, tokens, False), self.now)

    @property
    def credits(self) -> tuple[float, float, float]:
        """Free, purchased and held."""
        row = self.db.execute("SELECT free, paid, held FROM account WHERE id = ?", (self.id,)).fetchone()
        free, paid, held = (number / 1000 for number in row)
        return free, paid, held

    def audit(self) -> Mapping[str, Any]:
        found = audit(self.db, self.config)
        assert found.ok, found.lines
        return found.value


# --------------------------------------------------------------------------------------------------
# The one writer, on a running loop


class Clerk:
    """The real ledger at work, and what it said."""

    def __init__(self, config: Any) -> None:
        self.lines: list[str] = []
        self.ledger = proxy.Ledger(config, self.lines.append)

    @property
    def work(self) -> tuple[int, int]:
        """Transactions and verbs so far."""
        return self.ledger.transactions, self.ledger.verbs

    def submit(self, verb: Verb, power_proof: bool = True) -> Any:
        """Queue a verb; await what it returned. `power_proof`: not before it is on the disk."""
        return self.ledger.submit(verb, power_proof=power_proof)

    def next_id(self) -> int:
        """The id of the next request."""
        return int(self.ledger.next_id())

    async def caught_up(self) -> None:
        """Whatever is in the queue is in the database."""
        await self.submit(lambda db: None)

    async def trace(self, statements: list[str]) -> None:
        """Note every statement from now on."""
        assert self.ledger.database
        await self.ledger.database.set_trace_callback(statements.append)

    def hold(self, ordered: Any) -> Any:
        """The hold of a streamed request: `async with`, then `under_way`, `came` and `word`."""
        return proxy.Hold(self.ledger, ordered, new_meter(choices=ordered.choices))


@contextlib.asynccontextmanager
async def at_work(config: Any) -> AsyncIterator[Clerk]:
    clerk = Clerk(config)
    await clerk.ledger.open()
    try:
        yield clerk
    finally:
        await clerk.ledger.close()


def under_way(hold_: Any, outcome: str = "") -> None:
    """An upstream has the request, and so it will have ended."""
    hold_.sent, hold_.outcome = True, outcome


def came(hold_: Any, data: Any) -> None:
    """An event came from the upstream, and was counted."""
    hold_.meter.feed(sse(data))


async def word(hold_: Any) -> None:
    """A token came, and credits for it are held."""
    came(hold_, delta())
    await hold_.cover()


async def use(hold_: Any, tokens: int = 0) -> None:
    """A request from admission to settle: so many tokens came and all went well."""
    async with hold_:
        under_way(hold_, "ok")
        for _ in range(tokens):
            await word(hold_)


async def end_without_waiting(hold_: Any) -> None:
    """A request whose settle is queued, and nobody waits for it."""
    await hold_.__aenter__()
    under_way(hold_, "ok")
    hold_.submit_resolution()


async def turns_of_the_loop(count: int) -> None:
    """Let everything that is ready run, so many times."""
    for _ in range(count):
        await asyncio.sleep(0)
