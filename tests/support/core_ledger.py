"""The one place where the tests know the core's ledger: its verbs on a database, a function each, and its one writer.

Amounts are thousandths of a credit, moments milliseconds. `Bench` is an account with the verbs in short words, for
tests that tell a story; `at_work` is the running ledger, and `use` a request through it.
"""

import asyncio
import contextlib
import io
import itertools
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import proxy
from extras import commands
from tests.support.core_meter import Bill as Bill
from tests.support.core_meter import delta, feed, new_meter, sse
from tests.support.files import MODELS, OPTIONS, write_files
from tests.support.postgres import WANTED as POSTGRES
from tests.support.postgres import connected

Refusal = proxy.Refusal
CONNECT = proxy.connect
PARSER = cache(commands.build_parser)  # which takes longer than most commands
Verb = Callable[[Any, int], Any]  # of a database and its time
NOW = proxy.now_ms()
DAY = 86_400_000
LIMITS: dict[str, dict[str, int]] = {"unlimited": {}, "limited": {"requests_per_minute": 4, "parallel": 2}}
TIERS = {name: proxy.Tier(**limits) for name, limits in LIMITS.items()}
PATIENCE = ("BUSY_SECONDS", "RETRY_SECONDS", "SETTLE_PATIENCE_SECONDS")  # how long the ledger waits for what


class Settled(NamedTuple):
    """What a settle did."""

    charge: int
    balance: int


class Admitted(NamedTuple):
    """What a hold that was granted gives."""

    max_tokens: int  # a choice
    granted: int  # tokens of output that are held
    spare: int = 0  # and those of the chat template


class Done(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str

    @property
    def value(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.out)


# --------------------------------------------------------------------------------------------------
# Configuration and database


def configuration(folder: Path) -> Any:
    """A configuration, read from real files in a folder, with the tiers above."""
    upstreams = {"main": {"base_url": "http://127.0.0.1:1/v1"}}
    options = {**OPTIONS, "upstreams": upstreams, "tiers": LIMITS}
    return proxy.load_config(write_files(folder, options, {"plain": MODELS["plain"]}))


def connect(config: Any) -> Any:
    return CONNECT(config)


def rows(db: Any, sql: str) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in db.execute(sql).fetchall()]


def hurry(db: Any) -> None:
    """No power cut in a test."""
    db.execute("SET synchronous_commit = off" if POSTGRES else "PRAGMA synchronous = OFF")


def wait_for_no_lock(db: Any) -> None:
    db.execute("SET lock_timeout = 1" if POSTGRES else "PRAGMA busy_timeout = 0")


@contextlib.contextmanager
def without_guards(db: Any) -> Iterator[None]:
    """Without the schema's constraints and triggers, which are there again afterwards in SQLite."""
    if not POSTGRES:
        db.execute("PRAGMA ignore_check_constraints = ON")
        triggers = db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
        for trigger, _ in triggers:
            db.execute(f"DROP TRIGGER {trigger}")
        yield
        for _, sql in triggers:
            db.execute(sql)
        return
    find = "SELECT tgname, CAST(CAST(tgrelid AS regclass) AS text) FROM pg_trigger WHERE NOT tgisinternal"
    for name, table in db.execute(find).fetchall():
        db.execute(f"DROP TRIGGER {name} ON {table}")
    find = "SELECT conname, CAST(CAST(conrelid AS regclass) AS text) FROM pg_constraint WHERE contype = 'c'"
    for name, table in db.execute(f"{find} AND conrelid <> 0").fetchall():
        if not table.startswith("information_schema"):
            db.execute(f"ALTER TABLE {table} DROP CONSTRAINT {name}")
    yield


def connect_at(now: int, config: Any) -> Any:
    """A connection to a database whose clock stands still."""
    db = connect(config)
    begin = db.begin

    def begin_then(batch: Any) -> int:
        begin(batch)
        return now

    db.begin = begin_then
    return db


def command(config: Any, *words: object, now: int | None = None) -> Done:
    """`proxy.py --config FILE WORDS` in this process, at this moment of the database's clock."""
    arguments = ["--config", str(config.path), *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(commands, "build_parser", PARSER)
        if now is not None:
            patch.setattr(proxy, "connect", partial(connect_at, now))
        status = proxy.main(arguments)
    return Done(status, out.getvalue(), err.getvalue())


def well(done: Done) -> Done:
    """That command, which must have succeeded."""
    assert done.status == 0, done
    return done


@contextlib.contextmanager
def locked(config: Any) -> Iterator[None]:
    """Another process that writes and does not come to an end."""
    if POSTGRES:
        with connected(config.database) as other, other.transaction():
            other.execute("LOCK TABLE box, account IN EXCLUSIVE MODE")
            yield
        return
    with contextlib.closing(sqlite3.connect(config.database_path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def make_impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's limits, a hundred times shorter."""
    for name in PATIENCE:
        monkeypatch.setattr(proxy, name, getattr(proxy, name) / 100)


# --------------------------------------------------------------------------------------------------
# Verbs


def run_batch(db: Any, verbs: list[Any]) -> list[Any]:
    """Verbs in one transaction, as the writer runs them; of each what it returned or raised."""
    return list(proxy.run_batch(db, [proxy.Entry(verb) for verb in verbs]))


def at(now: int, verb: Callable[..., Any], *more: Any, **named: Any) -> Verb:
    """A verb of the core at a moment, whatever the database's clock says."""
    return lambda db, _: verb(db, now, *more, **named)


def do(db: Any, verb: Verb) -> Any:
    """One verb, as the writer runs it; what it raised is raised, a refusal is returned."""
    (outcome,) = run_batch(db, [verb])
    if isinstance(outcome, Exception) and not isinstance(outcome, Refusal):
        raise outcome
    return outcome


def create_account(db: Any, name: str, now: int, free: int, days: int = 30, tier: str = "unlimited") -> int:
    """The id of a new account with free credits for so many days."""
    return int(do(db, at(now, proxy.create_account, name=name, tier=tier, free=free, free_days=days)))


def create_key(db: Any, account_id: int, now: int, **limits: Any) -> tuple[bytes, int]:
    """The hash and the id of a new key; `limits`: credit_limit, expires_at, models."""
    key, key_id = do(db, at(now, proxy.create_key, account_id=account_id, **limits))
    return sha256(key.encode()).digest(), key_id


def in_credits(amount: int) -> str:
    """As the command line takes an amount."""
    return str(proxy.as_credits(amount))


def grant(config: Any, name: str, amount: int, now: int) -> None:
    """Purchased credits; a negative amount takes some back."""
    well(command(config, "credit", "add", name, in_credits(amount), now=now))


def revoke(config: Any, key_id: int, now: int) -> None:
    well(command(config, "key", "revoke", key_id, now=now))


def suspend_or_resume(config: Any, name: str, active: bool, now: int) -> None:
    well(command(config, "account", "resume" if active else "suspend", name, now=now))


def audit(config: Any, now: int) -> Done:
    """Every charge above its hold is listed."""
    return command(config, "audit", "--json", "--overruns", now=now)


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
    template: int = 0,
    model: str = "plain",
) -> Any:
    """What a hold is asked for: `slice_tokens` is None where nothing is streamed, `template` what a chat's may add."""
    priced = proxy.Model(name=model, tier="one", upstream="main", multiplier=proxy.Thousandths(multiplier))
    return proxy.Order(request_id, key_hash, priced, multiplier, estimate, template, choices, max_tokens, slice_tokens)


def hold(ordered: Any, now: int) -> Verb:
    """The verb that admits a request, or refuses it."""
    return at(now, proxy.hold, order=ordered, limits_of=TIERS.__getitem__)


def admission_of(outcome: Any) -> Admitted:
    """Of a hold that was granted."""
    assert isinstance(outcome, proxy.Admission), outcome
    return Admitted(outcome.max_tokens, outcome.granted, outcome.spare)


def refusal_of(outcome: Any) -> str:
    """Of a hold that was refused: the code."""
    assert isinstance(outcome, Refusal), outcome
    return str(outcome.code)


def extend(db: Any, request_id: int, tokens: int, count: int, now: int) -> int:
    """How many of these tokens are held in addition; the count so far is noted."""
    return int(do(db, at(now, proxy.extend, request_id=request_id, tokens=tokens, count=count)))


def settle(db: Any, request_id: int, bill: Bill | None, now: int) -> Settled | None:
    """Settle for a bill, void for None; None if there was nothing to resolve."""
    charged = proxy.Bill(*bill) if bill else None
    outcome = do(db, at(now, proxy.settle, end=proxy.Resolution(request_id, "ok", "main", charged)))
    return None if outcome is None else Settled(*outcome)


def recover(db: Any, now: int) -> int:
    """How many requests were open and are settled now."""
    return int(do(db, at(now, proxy.recover)))


def find_caller(db: Any, key_hash: bytes, now: int) -> Any:
    """Who has a key: `account`, `free`, `paid`, `held`, `lapsing(now)` and more; or a refusal."""
    return do(db, at(now, proxy.find_caller, key_hash=key_hash))


def adds(amount: int) -> Verb:
    """A verb that writes, and returns its amount."""

    def verb(db: Any, now: int) -> int:
        db.execute("UPDATE account SET paid = paid + :n, granted = granted + :n", {"n": amount})
        return amount

    return verb


def fails_after_writing(db: Any, now: int) -> None:
    """A verb with a bug."""
    db.execute("UPDATE account SET paid = paid + 1000000, granted = granted + 1000000")
    raise ZeroDivisionError


def breaks_a_constraint(db: Any, now: int) -> None:
    """A verb that the schema does not allow: an account with credits that nobody granted."""
    db.execute("UPDATE account SET paid = paid + 1")


# --------------------------------------------------------------------------------------------------
# An account with the verbs in short words

NUMBERS = itertools.count(1)


class Bench:
    """An account on a database, and the verbs on it with short words. Credits are whole ones, a token costs one."""

    def __init__(self, db: Any, config: Any, free: int = 0, paid: int = 0, name: str = "ann") -> None:
        self.db, self.config, self.name, self.now = db, config, name, NOW
        self.id = create_account(db, name, NOW, free * 1000)
        self.key_hash, self.key_id = create_key(db, self.id, NOW)
        if paid:
            self.grant(paid)

    def grant(self, credits_: int) -> None:
        grant(self.config, self.name, credits_ * 1000, self.now)

    def order(self, tokens: int = 10, estimate: int = 0, slice_tokens: int | None = None, template: int = 0) -> Any:
        request_id = id_at(self.now) + next(NUMBERS)
        more: dict[str, Any] = {"max_tokens": tokens, "slice_tokens": slice_tokens, "template": template}
        return order(request_id, self.key_hash, estimate=estimate, **more)

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
        row = self.db.execute("SELECT free, paid, held FROM account WHERE id = :id", {"id": self.id}).fetchone()
        free, paid, held = (number / 1000 for number in row)
        return free, paid, held

    def audit(self) -> Mapping[str, Any]:
        """What `audit` says, which must be that all is well."""
        found: Mapping[str, Any] = well(audit(self.config, self.now)).value
        assert found["ok"] is True
        return found


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

    def submit(self, verb: Verb, power_proof: bool = True, must_be_done: str = "") -> Any:
        """Queue a verb; await what it returned. `power_proof`: not before it is on the disk. `must_be_done`: what the
        log calls it, if it is tried until it is done."""
        return self.ledger.submit(verb, power_proof=power_proof, must_be_done=must_be_done)

    def next_id(self) -> int:
        """The id of the next request."""
        return int(self.ledger.next_id())

    async def caught_up(self) -> None:
        """Whatever is in the queue is in the database."""
        await self.submit(lambda db, now: None)

    async def trace(self, statements: list[str]) -> None:
        """Note every statement from now on."""
        await self.submit(lambda db, now: db.set_trace_callback(statements.append))

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
    """An event came from the upstream, was counted, and goes on."""
    hold_.meter, _, _ = feed(hold_.meter, sse(data))


async def word(hold_: Any, content: str = "word") -> bool:
    """A token came; whether credits for it are held, so that it goes on."""
    tally, _, _ = feed(hold_.meter, sse(delta(content)))
    covered: bool = await hold_.cover(tally)
    if covered:
        hold_.meter = tally
    return covered


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
