"""The ledger: its verbs alone, in any order, against books that are kept here a second time; then its one writer.

`Books` is a state machine: hypothesis calls the verbs on a real database in orders of its own, while time moves,
and after every step compares the database with what plain arithmetic on SPEC section 6 says it should hold.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import re
import shutil
import sqlite3
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.answers import Answers
from tests.support.commands import REPOSITORY
from tests.support.exchange import Exchange
from tests.support.files import MODELS, OPTIONS
from tests.support.files import write_files as write_yaml_files
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import Signal, wait_until

sys.path.insert(0, str(REPOSITORY))
import proxy as program
from proxy import (
    ENDPOINTS,
    REQUEST_ID_BITS,
    Admission,
    Bill,
    Caller,
    Config,
    Hold,
    Ledger,
    Order,
    Refusal,
    Resolution,
    Settled,
    Tier,
    UsageMeter,
    connect,
    load_config,
    run_batch,
)

NOW = program.now_ms()
DAY = 86_400_000
UNLIMITED, LIMITED = Tier(), Tier(requests_per_minute=4, parallel=2)
TIERS = {"unlimited": UNLIMITED, "limited": LIMITED}
HUGE = 10**9


@functools.cache
def settings_of_config() -> Config:
    """A configuration, read once from real files."""
    with tempfile.TemporaryDirectory() as folder:
        upstreams = {"main": {"base_url": "http://127.0.0.1:1/v1"}}
        files = write_yaml_files(Path(folder), {**OPTIONS, "upstreams": upstreams}, {"plain": MODELS["plain"]})
        return replace(load_config(files), tiers=TIERS)


def do(db: sqlite3.Connection, verb: Callable[[sqlite3.Connection], Any]) -> Any:
    """One verb, as the writer runs it; what it raised is raised."""
    (outcome,) = run_batch(db, [verb])
    if isinstance(outcome, Exception) and not isinstance(outcome, Refusal):
        raise outcome
    return outcome


def options(**values: Any) -> argparse.Namespace:
    return argparse.Namespace(**values)


# --------------------------------------------------------------------------------------------------
# The books, kept a second time


@dataclass
class Request:
    """A request that was admitted, as the model has it."""

    id: int
    owner: "Person"
    multiplier: int
    estimate: int
    hold: int
    opened: int
    count: int = 0
    state: str = "open"
    charge: int = 0


@dataclass
class Person:
    """An account, as the model has it. Credits in thousandths."""

    id: int
    name: str
    tier: str
    free: int
    expires: int
    paid: int = 0
    granted: int = 0
    lapsed: int = 0
    charged: int = 0
    active: bool = True
    admitted: list[int] = field(default_factory=list)  # the minutes of its admissions
    requests: list[Request] = field(default_factory=list)

    @property
    def open(self) -> list[Request]:
        return [request for request in self.requests if request.state == "open"]

    @property
    def held(self) -> int:
        return sum(request.hold for request in self.open)

    @property
    def available(self) -> int:
        return self.free + self.paid - self.held

    def lapse(self, now: int) -> None:
        """Free credits go on their day, but for what older holds reserve."""
        if now >= self.expires:
            reserved = sum(request.hold for request in self.open if request.opened < self.expires)
            lost = max(0, self.free - reserved)
            self.free -= lost
            self.lapsed += lost

    def pay(self, request: Request, now: int) -> None:
        """Free credits first; past their day, only as far as the request's own hold kept them."""
        charge = request.charge
        kept = request.hold if request.opened < self.expires else 0
        from_free = min(self.free, charge, charge if now < self.expires else kept)
        self.free -= from_free
        self.paid -= charge - from_free
        self.charged += charge


@dataclass
class Key:
    id: int
    hash: bytes
    owner: Person
    revoked: bool = False


def expected_refusal(key: Key, order: Order, now: int) -> str | None:
    """Why an order must be refused; None if it must be granted."""
    person, tier = key.owner, TIERS[key.owner.tier]
    if key.revoked:
        return "revoked_api_key"
    if not person.active:
        return "account_suspended"
    if tier.requests_per_minute is not None and person.admitted.count(now // 60_000) >= tier.requests_per_minute:
        return "rate_limit_exceeded"
    if tier.parallel is not None and len(person.open) >= tier.parallel:
        return "too_many_parallel_requests"
    least = (2 * order.prompt_estimate + order.choices) * order.multiplier
    balance = person.free + person.paid
    if not order.multiplier or (balance > 0 and person.available >= least):
        return None
    return "credits_in_use" if balance > 0 and balance >= least else "insufficient_credits"


def expected_output(person: Person, order: Order) -> tuple[int, int]:
    """The maximum a choice, and how many tokens of output are held."""
    maximum = order.max_tokens
    if order.multiplier and order.choices:
        maximum = min(maximum, (person.available // order.multiplier - 2 * order.prompt_estimate) // order.choices)
    output = maximum * order.choices
    return maximum, output if order.slice_tokens is None else min(output, order.slice_tokens)


# --------------------------------------------------------------------------------------------------
# Any verb, in any order

MULTIPLIERS = st.sampled_from([0, 1, 500, 1000, 3500])
CREDITS = st.integers(0, 200).map(lambda tokens: tokens * 500)
PICK = st.integers(0, 10**6)


class Books(RuleBasedStateMachine):
    """Every verb of the ledger on several accounts, while time moves."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.config = replace(settings_of_config(), database=Path(self.folder) / "books.db")
        self.db = connect(self.config.database)
        self.db.execute("PRAGMA synchronous = OFF")  # no power cut in a test
        self.now = NOW
        self.last_id = 0
        self.people: list[Person] = []
        self.keys: list[Key] = []
        self.requests: list[Request] = []

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    def step(self) -> None:
        """The moment of a verb: free credits whose day has come lapse."""
        for person in self.people:
            person.lapse(self.now)

    # -- accounts

    @initialize(free=CREDITS, days=st.integers(1, 3))
    def a_first_account(self, free: int, days: int) -> None:
        self.create_account(free, days, "unlimited")
        self.grant(0, 20_000)

    @precondition(lambda self: len(self.people) < 4)
    @rule(free=CREDITS, days=st.integers(1, 3), tier=st.sampled_from(["unlimited", "limited"]))
    def create_account(self, free: int, days: int, tier: str) -> None:
        name = f"person-{len(self.people)}"
        config = replace(self.config, free_credits=free, free_days=days)
        account_id = do(self.db, partial(program.create_account, config=config, name=name, tier=tier, now=self.now))
        self.people.append(Person(account_id, name, tier, free, self.now + days * DAY, granted=free))
        self.create_key(len(self.people) - 1)

    @rule(pick=PICK)
    def create_key(self, pick: int) -> None:
        person = self.people[pick % len(self.people)]
        key, key_id = do(self.db, partial(program.create_key, account_id=person.id, label=None, now=self.now))
        self.keys.append(Key(key_id, sha256(key.encode()).digest(), person))

    @rule(pick=PICK)
    def revoke(self, pick: int) -> None:
        key = self.keys[pick % len(self.keys)]
        program.key_revoke(self.db, self.config, options(key_id=key.id))
        key.revoked = True

    @rule(pick=PICK, active=st.booleans())
    def suspend_or_resume(self, pick: int, active: bool) -> None:
        person = self.people[pick % len(self.people)]
        value = "active" if active else "suspended"
        program.account_change("status", self.db, self.config, options(name=person.name, value=value))
        person.active = active

    @rule(pick=PICK, amount=CREDITS)
    def grant(self, pick: int, amount: int) -> None:
        person = self.people[pick % len(self.people)]
        verb = partial(program.grant_paid, account_id=person.id, amount=amount, ref=None, note=None, now=self.now)
        do(self.db, verb)
        person.paid += amount
        person.granted += amount

    @rule(pick=PICK)
    def take_all_purchased_back(self, pick: int) -> None:
        self.step()
        person = self.people[pick % len(self.people)]
        most = min(person.paid, person.available)
        if most > 0:
            self.grant(pick, -most)

    # -- requests

    def order(self, key: Key, estimate: int, choices: int, maximum: int, size: int | None, multiplier: int) -> Order:
        self.last_id = max(self.last_id + 1, self.now << REQUEST_ID_BITS)
        most = maximum if choices else 0
        return Order(self.last_id, key.hash, "plain", multiplier, estimate, choices, most, size)

    def admit(self, key: Key, order: Order, outcome: Any) -> None:
        """Compare an outcome with what must be, and note it."""
        person, why = key.owner, expected_refusal(key, order, self.now)
        if why is not None:
            assert isinstance(outcome, Refusal) and outcome.code == why
            return
        maximum, granted = expected_output(person, order)
        assert isinstance(outcome, Admission), outcome
        assert (outcome.max_tokens, outcome.granted) == (maximum, granted)
        amount = (2 * order.prompt_estimate + granted) * order.multiplier
        request = Request(order.request_id, person, order.multiplier, order.prompt_estimate, amount, self.now)
        person.admitted.append(self.now // 60_000)
        person.requests.append(request)
        self.requests.append(request)

    @rule(
        picks=st.lists(PICK, min_size=1, max_size=3),
        estimate=st.integers(0, 20),
        choices=st.integers(0, 3),
        maximum=st.integers(1, 60),
        size=st.one_of(st.none(), st.integers(1, 20)),
        multiplier=MULTIPLIERS,
        failing=st.booleans(),
    )
    def hold(
        self,
        picks: list[int],
        estimate: int,
        choices: int,
        maximum: int,
        size: int | None,
        multiplier: int,
        failing: bool,
    ) -> None:
        """One hold or several in one transaction, beside a verb that fails perhaps."""
        self.step()
        keys = [self.keys[pick % len(self.keys)] for pick in picks]
        orders = [self.order(key, estimate, choices, maximum, size, multiplier) for key in keys]
        verbs = [partial(program.hold, order=order, limits_of=TIERS.__getitem__, now=self.now) for order in orders]
        outcomes = run_batch(self.db, [*verbs, fails_after_writing] if failing else verbs)
        assert not failing or isinstance(outcomes.pop(), ZeroDivisionError)
        for key, order, outcome in zip(keys, orders, outcomes, strict=True):
            self.admit(key, order, outcome)

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, tokens=st.integers(0, 50), count=st.integers(0, 100))
    def extend(self, pick: int, tokens: int, count: int) -> None:
        self.step()
        request = self.requests[pick % len(self.requests)]
        verb = partial(program.extend, request_id=request.id, tokens=tokens, count=count, now=self.now)
        granted = do(self.db, verb)
        if request.state != "open":
            assert granted == 0
            return
        most = request.owner.available // request.multiplier if request.multiplier else tokens
        assert granted == max(0, min(tokens, most))
        request.hold += granted * request.multiplier
        request.count = count

    def resolve(self, request: Request, bill: Bill | None) -> int:
        """The model's side of settle-or-void; the charge."""
        person = request.owner
        request.charge = (bill.prompt_tokens + bill.completion_tokens) * request.multiplier if bill else 0
        person.pay(request, self.now)
        request.state = "settled" if bill else "void"
        person.lapse(self.now)
        return request.charge

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, prompt=st.integers(0, 60), completion=st.integers(0, 90), void=st.booleans())
    def settle_or_void(self, pick: int, prompt: int, completion: int, void: bool) -> None:
        """Any request there ever was: one that is resolved already stays as it is."""
        self.step()
        request = self.requests[pick % len(self.requests)]
        bill = None if void else Bill(prompt, completion, False)
        end = Resolution(request.id, "ok", "main", bill)
        outcome = do(self.db, partial(program.settle, end=end, now=self.now))
        if request.state != "open":
            assert outcome is None
            return
        charge = self.resolve(request, bill)
        assert outcome == Settled(charge, request.owner.free + request.owner.paid)

    @rule()
    def recover(self) -> None:
        self.step()
        opened = [request for request in self.requests if request.state == "open"]
        assert do(self.db, partial(program.recover, now=self.now)) == len(opened)
        for request in opened:
            self.resolve(request, Bill(request.estimate, request.count, True))

    @rule(pick=PICK)
    def find_caller(self, pick: int) -> None:
        self.step()
        key = self.keys[pick % len(self.keys)]
        found = do(self.db, partial(program.find_caller, key_hash=key.hash, now=self.now))
        if key.revoked:
            assert isinstance(found, Refusal) and found.code == "revoked_api_key"
            return
        assert isinstance(found, Caller)
        assert (found.account, found.free, found.paid) == (key.owner.name, key.owner.free, key.owner.paid)
        assert (found.held, found.open_requests) == (key.owner.held, len(key.owner.open))

    @rule(ms=st.sampled_from([0, 1, 999, 20_000, 60_000, DAY // 2, DAY]))
    def time_passes(self, ms: int) -> None:
        self.now += ms

    # -- what must hold

    @invariant()
    def every_account_is_as_the_model_has_it(self) -> None:
        self.step()
        for person in self.people:
            row = self.db.execute("SELECT * FROM account WHERE id = ?", (person.id,))
            found = dict(zip([column[0] for column in row.description], row.fetchone(), strict=True))
            reserved = sum(request.hold for request in person.open if request.opened < person.expires)
            due = max(0, found["free"] - reserved) if self.now >= person.expires else 0
            assert (found["free"] - due, found["lapsed"] + due) == (person.free, person.lapsed)
            assert (found["paid"], found["granted"], found["charged"]) == (person.paid, person.granted, person.charged)
            assert (found["held"], found["open_requests"]) == (person.held, len(person.open))

    @invariant()
    def every_request_has_one_row_that_was_resolved_once(self) -> None:
        rows = self.db.execute("SELECT id, state, hold, coalesce(charge, 0), account_id FROM request ORDER BY id")
        model = [(r.id, r.state, r.hold, r.charge, r.owner.id) for r in self.requests]
        assert rows.fetchall() == sorted(model)

    @invariant()
    def grants_less_lapsed_less_charges_are_the_balances(self) -> None:
        (grants,) = self.db.execute("SELECT coalesce(sum(amount), 0) FROM credit_grant").fetchone()
        (charges,) = self.db.execute("SELECT coalesce(sum(charge), 0) FROM request").fetchone()
        (holds,) = self.db.execute("SELECT coalesce(sum(hold), 0) FROM request WHERE state = 'open'").fetchone()
        balances, lapsed, held = self.db.execute(
            "SELECT sum(free + paid), sum(lapsed), sum(held) FROM account"
        ).fetchone()
        assert grants - lapsed - charges == balances
        assert held == holds >= 0
        for person in self.people:
            missed = sum(request.charge - request.hold for request in person.requests if request.charge > request.hold)
            assert person.free + person.paid >= -missed, "below zero by more than what estimates missed"

    @invariant()
    def audit_says_the_same(self) -> None:
        report = program.audit(self.db, self.config, options())
        assert report.ok, report.lines
        assert int(report.value["charges"] * 1000) == sum(person.charged for person in self.people)
        assert int(report.value["grants"] * 1000) == sum(person.granted for person in self.people)
        assert int(report.value["held"] * 1000) == sum(person.held for person in self.people)
        assert report.value["open_requests"] == sum(len(person.open) for person in self.people)
        overruns = [overrun["request_id"] for overrun in report.value["overruns"]]
        assert overruns == [f"req_{r.id:016x}" for r in sorted(self.requests, key=lambda r: r.id) if r.charge > r.hold]


def fails_after_writing(db: sqlite3.Connection) -> None:
    """A verb with a bug."""
    db.execute("UPDATE account SET paid = paid + 1000000, granted = granted + 1000000")
    raise ZeroDivisionError


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


# --------------------------------------------------------------------------------------------------
# Named situations


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The configuration, also as files for the command line."""
    upstreams = {"main": {"base_url": "http://127.0.0.1:1/v1"}}
    files = write_yaml_files(tmp_path, {**OPTIONS, "upstreams": upstreams}, {"plain": MODELS["plain"]})
    return load_config(files)


@pytest.fixture
def db(config: Config) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(connect(config.database)) as connection:
        yield connection


NUMBERS = itertools.count(1)


class Bench:
    """An account on a database, and the verbs on it with short words. Credits are whole ones, a token costs one."""

    def __init__(self, db: sqlite3.Connection, config: Config, free: int = 0, paid: int = 0, name: str = "ann") -> None:
        self.db, self.config = db, replace(config, free_credits=free * 1000)
        self.id = do(db, partial(program.create_account, config=self.config, name=name, tier="unlimited", now=NOW))
        key, self.key_id = do(db, partial(program.create_key, account_id=self.id, label=None, now=NOW))
        self.key_hash = sha256(key.encode()).digest()
        self.now = NOW
        if paid:
            self.grant(paid)

    def grant(self, credits_: int) -> None:
        amount = credits_ * 1000
        verb = partial(program.grant_paid, account_id=self.id, amount=amount, ref=None, note=None, now=self.now)
        do(self.db, verb)

    def order(self, tokens: int = 10, estimate: int = 0, slice_tokens: int | None = None) -> Order:
        request_id = (self.now << REQUEST_ID_BITS) + next(NUMBERS)
        return Order(request_id, self.key_hash, "plain", 1000, estimate, 1, tokens, slice_tokens)

    def hold(self, tokens: int = 10, estimate: int = 0) -> int:
        """The id of a request that was admitted."""
        order = self.order(tokens, estimate)
        outcome = do(self.db, partial(program.hold, order=order, limits_of=TIERS.__getitem__, now=self.now))
        assert isinstance(outcome, Admission), outcome
        return order.request_id

    def refused(self, tokens: int = 10, estimate: int = 0) -> str:
        """The code with which a request is refused."""
        order = self.order(tokens, estimate)
        outcome = do(self.db, partial(program.hold, order=order, limits_of=TIERS.__getitem__, now=self.now))
        assert isinstance(outcome, Refusal), outcome
        return outcome.code

    def settle(self, request_id: int, tokens: int | None) -> Settled | None:
        """Settle for so many tokens; None voids."""
        bill = None if tokens is None else Bill(0, tokens, False)
        end = Resolution(request_id, "ok", "main", bill)
        outcome: Settled | None = do(self.db, partial(program.settle, end=end, now=self.now))
        return outcome

    @property
    def credits(self) -> tuple[float, float, float]:
        """Free, purchased and held."""
        row = self.db.execute("SELECT free, paid, held FROM account WHERE id = ?", (self.id,)).fetchone()
        free, paid, held = (number / 1000 for number in row)
        return free, paid, held

    def audit(self) -> Any:
        report = program.audit(self.db, self.config, options())
        assert report.ok, report.lines
        return report.value


@pytest.fixture
def bench(db: sqlite3.Connection, config: Config) -> Callable[..., Bench]:
    return partial(Bench, db, config)


MakeBench = Callable[..., Bench]


def test_settling_twice_charges_once(bench: MakeBench) -> None:
    ann = bench(paid=100)
    request = ann.hold(tokens=10)
    assert ann.settle(request, 7) == Settled(7000, 93_000)
    assert ann.settle(request, 7) is None
    assert ann.settle(request, None) is None
    assert ann.credits == (0, 93, 0)
    assert ann.audit()["open_requests"] == 0


def test_a_request_that_is_void_costs_nothing_for_ever(bench: MakeBench) -> None:
    ann = bench(paid=100)
    request = ann.hold(tokens=10)
    assert ann.settle(request, None) == Settled(0, 100_000)
    assert ann.settle(request, 7) is None
    assert ann.credits == (0, 100, 0)
    ann.audit()


def test_settling_what_was_never_held_does_nothing(bench: MakeBench) -> None:
    ann = bench(paid=100)
    assert ann.settle(12345, 7) is None
    assert ann.credits == (0, 100, 0)
    ann.audit()


def test_two_requests_cannot_spend_the_same_credits(bench: MakeBench) -> None:
    ann = bench(paid=10)
    request = ann.hold(tokens=10)
    assert ann.refused(tokens=10) == "credits_in_use"
    assert ann.credits == (0, 10, 10)
    ann.settle(request, 10)
    assert ann.refused(tokens=1) == "insufficient_credits"
    assert ann.credits == (0, 0, 0)
    ann.audit()


def test_two_requests_in_one_transaction_cannot_spend_the_same_credits(bench: MakeBench) -> None:
    ann = bench(paid=15)
    orders = [ann.order(tokens=10) for _ in range(3)]
    verbs = [partial(program.hold, order=order, limits_of=TIERS.__getitem__, now=NOW) for order in orders]
    first, second, third = run_batch(ann.db, verbs)
    assert (first.granted, second.granted) == (10, 5)
    assert third.code == "credits_in_use"
    assert ann.credits == (0, 15, 15)
    ann.audit()


def test_free_credits_are_spent_before_purchased_ones(bench: MakeBench) -> None:
    ann = bench(free=5, paid=10)
    ann.settle(ann.hold(), 3)
    assert ann.credits == (2, 10, 0)
    ann.settle(ann.hold(), 6)
    assert ann.credits == (0, 6, 0)
    ann.audit()


def test_unused_free_credits_lapse_on_their_day(bench: MakeBench) -> None:
    ann = bench(free=5, paid=10)
    ann.now = NOW + 30 * DAY - 1
    ann.settle(ann.hold(), 1)
    assert ann.credits == (4, 10, 0)
    ann.now += 1
    ann.settle(ann.hold(), 1)
    assert ann.credits == (0, 9, 0)
    assert ann.audit()["lapsed"] == 4


def test_free_credits_under_a_hold_lapse_when_it_resolves(bench: MakeBench) -> None:
    ann = bench(free=20, paid=10)
    request = ann.hold(tokens=8)
    ann.now = NOW + 31 * DAY
    ann.settle(ann.hold(tokens=1), None)
    assert ann.credits == (8, 10, 8), "what a hold from before their day reserves is still there"
    assert ann.settle(request, 3) == Settled(3000, 10_000)
    assert ann.credits == (0, 10, 0)
    assert ann.audit()["lapsed"] == 17


def test_a_hold_that_grows_past_the_day_does_not_save_free_credits(bench: MakeBench) -> None:
    ann = bench(free=20, paid=10)
    request = ann.hold(tokens=8)
    ann.now = NOW + 31 * DAY
    extension = partial(program.extend, request_id=request, tokens=100, count=8, now=ann.now)
    assert do(ann.db, extension) == 10
    assert ann.credits == (8, 10, 18)
    assert ann.settle(request, 18) == Settled(18_000, 0)
    assert ann.credits == (0, 0, 0)
    assert ann.audit()["lapsed"] == 12


def test_lapsed_free_credits_do_not_pay_for_what_an_estimate_missed(bench: MakeBench) -> None:
    """Whether somebody looked at the account in between must not matter."""
    for name, looked_at in (("ann", True), ("bob", False)):
        person = bench(free=20, paid=10, name=name)
        request = person.hold(tokens=8)
        person.now = NOW + 31 * DAY
        if looked_at:
            person.settle(person.hold(tokens=1), None)
        person.settle(request, 12)
        assert person.credits == (0, 6, 0)
    assert person.audit()["lapsed"] == 24


def test_a_charge_above_its_hold_is_charged_in_full_and_audit_lists_it(bench: MakeBench) -> None:
    ann = bench(paid=10)
    request = ann.hold(tokens=10)
    assert ann.settle(request, 25) == Settled(25_000, -15_000)
    assert ann.credits == (0, -15, 0)
    (overrun,) = ann.audit()["overruns"]
    assert overrun == {
        "request_id": f"req_{request:016x}", "account": "ann", "model": "plain", "hold": 10, "charge": 25,
    }  # fmt: skip
    assert ann.refused(tokens=1) == "insufficient_credits"
    ann.grant(16)
    ann.settle(ann.hold(tokens=1), 1)
    assert ann.credits == (0, 0, 0)


def test_what_a_crash_left_open_costs_its_prompt_and_what_was_counted(bench: MakeBench) -> None:
    ann = bench(paid=100)
    request, other = ann.hold(tokens=10, estimate=4), ann.hold(tokens=10, estimate=5)
    do(ann.db, partial(program.extend, request_id=request, tokens=5, count=9, now=NOW))
    assert ann.credits == (0, 100, 43)
    assert do(ann.db, partial(program.recover, now=NOW)) == 2
    assert do(ann.db, partial(program.recover, now=NOW)) == 0
    assert ann.credits == (0, 82, 0)
    rows = ann.db.execute("SELECT id, outcome, prompt_tokens, completion_tokens, estimated FROM request").fetchall()
    assert rows == [(request, "interrupted", 4, 9, 1), (other, "interrupted", 5, 0, 1)]
    ann.audit()


# --------------------------------------------------------------------------------------------------
# What the database itself refuses

WRONG_STATEMENTS = {
    "a_resolved_row_is_edited": "UPDATE request SET charge = 0, completion_tokens = 0 WHERE state = 'settled'",
    "a_resolved_row_is_opened": "UPDATE request SET state = 'open', charge = NULL WHERE state = 'settled'",
    "a_request_is_deleted": "DELETE FROM request WHERE state = 'open'",
    "a_grant_is_edited": "UPDATE credit_grant SET amount = amount + 1",
    "a_grant_is_deleted": "DELETE FROM credit_grant",
    "a_balance_is_edited": "UPDATE account SET paid = paid + 1",
    "a_charge_that_nobody_pays": "UPDATE account SET charged = charged + 1",
    "free_below_zero": "UPDATE account SET free = -1, granted = granted - free - 1",
    "held_below_zero": "UPDATE account SET held = -1",
    "lapsed_below_zero": "UPDATE account SET lapsed = -1, paid = paid + 1",
    "open_requests_below_zero": "UPDATE account SET open_requests = -1",
    "an_unknown_status": "UPDATE account SET status = 'closed'",
    "credits_that_are_no_integer": "UPDATE account SET paid = paid + 0.5, granted = granted + 0.5",
    "a_wrong_price": """UPDATE request SET state = 'settled', prompt_tokens = 1, completion_tokens = 1, charge = 1999
        WHERE state = 'open'""",
    "a_charge_that_is_void": """UPDATE request SET state = 'void', prompt_tokens = 1, completion_tokens = 0,
        charge = 1000 WHERE state = 'open'""",
    "a_settled_row_without_a_charge": "UPDATE request SET state = 'settled' WHERE state = 'open'",
    "an_open_row_with_a_charge": "UPDATE request SET charge = 0 WHERE state = 'open'",
    "a_hold_below_zero": "UPDATE request SET hold = -1 WHERE state = 'open'",
    "tokens_below_zero": """UPDATE request SET state = 'settled', prompt_tokens = -1, completion_tokens = 1, charge = 0
        WHERE state = 'open'""",
    "a_request_of_nobody": "INSERT INTO request SELECT 1, 99, key_id, model, multiplier, prompt_estimate, hold, count, "
    "state, upstream, outcome, prompt_tokens, completion_tokens, estimated, charge, resolved_at FROM request LIMIT 1",
    "a_key_of_nobody": "INSERT INTO api_key (account_id, hash, hint, created_at) VALUES (99, zeroblob(32), '', 0)",
    "a_key_that_is_no_hash": "INSERT INTO api_key (account_id, hash, hint, created_at) VALUES (1, 'sk-x', '', 0)",
    "the_same_reference_twice": "INSERT INTO credit_grant (account_id, kind, amount, ref, created_at) "
    "VALUES (1, 'paid', 1, 'r', 0), (1, 'paid', 1, 'r', 0)",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_STATEMENTS)
def test_the_schema_stops(name: str, bench: MakeBench) -> None:
    ann = bench(free=5, paid=100)
    ann.settle(ann.hold(tokens=10), 7)
    ann.hold(tokens=10)
    before = ann.audit()
    with pytest.raises(sqlite3.IntegrityError):
        do(ann.db, lambda db: db.execute(WRONG_STATEMENTS[name]))
    assert ann.audit() == before


SWAP = "(CASE id WHEN 1 THEN 5 ELSE -5 END)"  # each total is right, and no account is
CORRUPTIONS = {
    "a_balance": "UPDATE account SET paid = paid + 1",
    "a_balance_with_its_total": "UPDATE account SET paid = paid + 1, granted = granted + 1",
    "a_charge": "UPDATE request SET charge = charge - 1 WHERE state = 'settled'",
    "a_priced_charge": "UPDATE request SET charge = charge + 1000, prompt_tokens = 1 WHERE state = 'settled'",
    "a_charge_with_its_total": "UPDATE account SET charged = charged + 1, paid = paid - 1",
    "a_hold": "UPDATE request SET hold = hold + 1 WHERE state = 'open'",
    "a_held_total": "UPDATE account SET held = 0",
    "an_open_request": "UPDATE account SET open_requests = 7",
    "a_lost_grant": "DELETE FROM credit_grant WHERE kind = 'paid'",
    "a_changed_grant": "UPDATE credit_grant SET amount = amount + 5",
    "a_lost_request": "DELETE FROM request WHERE state = 'settled'",
    "a_lapse": "UPDATE account SET lapsed = lapsed + 1",
    "an_open_row_that_was_paid": "UPDATE request SET charge = 1000 WHERE state = 'open'",
    "a_void_row_that_was_paid": "UPDATE request SET state = 'void' WHERE state = 'settled'",
    "two_accounts_that_swap_credits": f"UPDATE account SET paid = paid + {SWAP}",
    "two_accounts_that_swap_charges": f"UPDATE account SET paid = paid - {SWAP}, charged = charged + {SWAP}",
    "two_accounts_that_swap_grants": f"UPDATE account SET paid = paid + {SWAP}, granted = granted + {SWAP}",
    "two_accounts_that_swap_holds": f"UPDATE account SET held = held + {SWAP}",
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_audit_exits_1_on_a_wrong_row(
    name: str, bench: MakeBench, capsys: pytest.CaptureFixture[str], config: Config
) -> None:
    """The row is put there past the schema's own guards."""
    ann = bench(free=5, paid=100)
    bench(paid=100, name="bob")
    ann.settle(ann.hold(tokens=10), 7)
    ann.hold(tokens=10)
    assert program.main(["--config", str(config.path), "audit"]) == 0
    ann.db.execute("PRAGMA ignore_check_constraints = ON")
    for (trigger,) in ann.db.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
        ann.db.execute(f"DROP TRIGGER {trigger}")
    ann.db.execute(CORRUPTIONS[name])
    assert program.main(["--config", str(config.path), "audit"]) == 1
    assert "DO NOT ADD UP" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Batches


def adds(amount: int) -> Callable[[sqlite3.Connection], int]:
    def verb(db: sqlite3.Connection) -> int:
        db.execute("UPDATE account SET paid = paid + ?, granted = granted + ?", (amount, amount))
        return amount

    return verb


def test_a_verb_that_raises_is_alone_in_its_rollback(bench: MakeBench) -> None:
    ann = bench()
    outcomes = run_batch(ann.db, [adds(1), fails_after_writing, adds(10), fails_after_writing, adds(100)])
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [1, 10, 100]
    assert [type(outcomes[n]) for n in (1, 3)] == [ZeroDivisionError] * 2
    assert ann.credits == (0, 0.111, 0)


def test_a_verb_that_breaks_a_constraint_is_alone_in_its_rollback(bench: MakeBench) -> None:
    ann = bench()
    wrong = WRONG_STATEMENTS["a_balance_is_edited"]
    first, second, third = run_batch(ann.db, [adds(1), lambda db: db.execute(wrong), adds(10)])
    assert (first, third) == (1, 10)
    assert isinstance(second, sqlite3.IntegrityError)
    assert ann.credits == (0, 0.011, 0)


def test_a_refusal_writes_nothing_and_stands_beside_the_others(bench: MakeBench) -> None:
    ann = bench(paid=5)
    refused = partial(program.hold, order=ann.order(estimate=50), limits_of=TIERS.__getitem__, now=NOW)
    held = partial(program.hold, order=ann.order(tokens=3), limits_of=TIERS.__getitem__, now=NOW)
    first, second = run_batch(ann.db, [refused, held])
    assert first.code == "insufficient_credits"
    assert second.granted == 3
    assert ann.credits == (0, 5, 3)
    assert ann.audit()["open_requests"] == 1


def test_a_batch_on_a_locked_database_fails_whole_and_leaves_nothing_open(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=5)
    ann.db.execute("PRAGMA busy_timeout = 0")
    with locked(config):
        outcomes = run_batch(ann.db, [adds(1), adds(2)])
    assert [type(outcome) for outcome in outcomes] == [sqlite3.OperationalError] * 2
    assert not ann.db.in_transaction
    assert run_batch(ann.db, [adds(1)]) == [1]


@contextlib.contextmanager
def locked(config: Config) -> Iterator[None]:
    """Another process that writes and does not come to an end."""
    with contextlib.closing(sqlite3.connect(config.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


# --------------------------------------------------------------------------------------------------
# The one writer, on a running loop


class Clerk:
    """The real ledger, and what it said."""

    def __init__(self, config: Config) -> None:
        self.lines: list[str] = []
        self.spoke = asyncio.Event()
        self.ledger = Ledger(config, self.say)

    def say(self, line: str) -> None:
        self.lines.append(line)
        self.spoke.set()

    async def caught_up(self) -> None:
        """Whatever is in the queue is in the database."""
        await self.ledger.submit(lambda db: None)

    def hold(self, order: Order) -> Hold:
        return Hold(self.ledger, order, UsageMeter(ENDPOINTS["chat/completions"], order.choices, True))


@contextlib.asynccontextmanager
async def at_work(config: Config) -> AsyncIterator[Clerk]:
    clerk = Clerk(config)
    await clerk.ledger.open()
    try:
        yield clerk
    finally:
        await clerk.ledger.close()


async def use(hold: Hold, tokens: int = 0) -> Hold:
    """A request from admission to settle: so many tokens came and all went well."""
    async with hold:
        hold.sent, hold.outcome = True, "ok"
        for _ in range(tokens):
            hold.meter.feed(sse({"choices": [{"delta": {"content": "word"}}]}))
            await hold.cover()
    return hold


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_admission_leaves_nothing_held(turns: int, bench: MakeBench, config: Config) -> None:
    """At any turn of the loop, from before the hold is queued to after it was granted."""
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        waiting = asyncio.create_task(use(clerk.hold(ann.order(tokens=10))))
        for _ in range(turns):
            await asyncio.sleep(0)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await clerk.caught_up()
    assert ann.credits == (0, 100, 0)
    assert ann.audit()["open_requests"] == 0


async def test_an_admission_that_is_cancelled_while_it_is_written_leaves_nothing_held(
    bench: MakeBench, config: Config
) -> None:
    ann = bench(paid=100)
    order = ann.order(tokens=10)
    async with at_work(config) as clerk:
        waiting = asyncio.create_task(use(clerk.hold(order)))
        with locked(config):
            before = clerk.ledger.transactions
            for _ in range(6):
                await asyncio.sleep(0)
            assert clerk.ledger.transactions == before + 1, "its transaction has begun, and waits for the lock"
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await clerk.caught_up()
    assert ann.db.execute("SELECT id, state, outcome FROM request").fetchall() == [
        (order.request_id, "void", "client_gone")
    ]
    assert ann.credits == (0, 100, 0)
    ann.audit()


async def test_a_request_that_is_cancelled_half_way_costs_what_came(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        with pytest.raises(asyncio.CancelledError):
            async with clerk.hold(ann.order(tokens=10, estimate=5)) as hold:
                hold.sent = True
                hold.meter.feed(sse({"choices": [{"delta": {"content": "word"}}]}))
                raise asyncio.CancelledError
    assert ann.credits == (0, 94, 0)
    ann.audit()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ledger's limits, a hundred times shorter."""
    for name in ("BUSY_SECONDS", "RETRY_SECONDS", "SETTLE_PATIENCE_SECONDS"):
        monkeypatch.setattr(program, name, getattr(program, name) / 100)


@pytest.mark.usefixtures("impatient")
async def test_a_settle_is_tried_until_it_is_in(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        hold = clerk.hold(ann.order(tokens=10))
        async with hold:
            hold.sent, hold.outcome = True, "ok"
            hold.meter.feed(sse({"choices": [], "usage": {"prompt_tokens": 2, "completion_tokens": 5}}))
            with locked(config):
                with pytest.raises(Refusal) as refused:
                    await hold.settle()
                assert refused.value.code == "ledger_unavailable"
                assert ann.credits == (0, 100, 10), "nothing is released before it is paid"
                tried = clerk.ledger.transactions
                await asyncio.to_thread(wait_until, lambda: clerk.ledger.transactions > tried + 2, "it is tried again")
            await clerk.caught_up()
        assert ann.credits == (0, 93, 0)
        assert [line.partition(":")[0] for line in clerk.lines] == ["ledger unavailable", "ledger available again"]
    ann.audit()


@pytest.mark.usefixtures("impatient")
async def test_a_hold_that_cannot_be_written_is_refused_and_not_tried_again(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        with locked(config):
            with pytest.raises(Refusal) as refused:
                await use(clerk.hold(ann.order()))
            assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
        await clerk.caught_up()
    assert ann.credits == (0, 100, 0)
    assert ann.db.execute("SELECT count(*) FROM request").fetchone() == (0,)


async def test_closing_waits_for_what_must_be_done(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        hold = clerk.hold(ann.order(tokens=10, estimate=4))
        await hold.__aenter__()
        hold.sent, hold.outcome = True, "ok"
        hold.submit_resolution()
    assert ann.credits == (0, 96, 0)
    assert ann.audit()["open_requests"] == 0


async def test_opening_settles_what_a_crash_left(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    ann.hold(tokens=10, estimate=4)
    async with at_work(config) as clerk:
        assert ann.credits == (0, 96, 0)
        assert clerk.lines == ["recovered 1 requests that a crash interrupted; `audit` proves the books"]
        assert clerk.ledger.next_id() > ann.db.execute("SELECT max(id) FROM request").fetchone()[0]
    ann.audit()


async def test_a_verb_that_raises_fails_its_caller_only(bench: MakeBench, config: Config) -> None:
    ann = bench()
    async with at_work(config) as clerk:
        asked = [clerk.ledger.submit(verb) for verb in (adds(1), fails_after_writing, adds(10))]
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
        assert (first, type(second), third) == (1, ZeroDivisionError, 10)
    assert ann.credits == (0, 0.011, 0)


SLICE = 10


async def test_a_crash_at_any_token_loses_at_most_a_slice(bench: MakeBench, config: Config) -> None:
    """What has been relayed, less what the database knows of it: at every token, however slow the ledger is."""
    ann = bench(paid=1000)
    reader = partial(ann.db.execute, "SELECT count FROM request")
    async with at_work(config) as clerk:
        hold = clerk.hold(ann.order(tokens=100, slice_tokens=SLICE))
        async with hold:
            hold.sent, hold.outcome, lost = True, "ok", []
            for relayed in range(60):
                lost.append(relayed - reader().fetchone()[0])
                hold.meter.feed(sse({"choices": [{"delta": {"content": "word"}}]}))
                await hold.cover()
    assert max(lost) <= SLICE
    ann.audit()


# --------------------------------------------------------------------------------------------------
# What can be counted


async def test_one_request_at_a_time_takes_exactly_two_transactions(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        before = (clerk.ledger.transactions, clerk.ledger.verbs)
        for _ in range(5):
            await use(clerk.hold(ann.order(tokens=1)), tokens=1)
        assert (clerk.ledger.transactions - before[0], clerk.ledger.verbs - before[1]) == (10, 10)
    assert ann.credits == (0, 95, 0)


async def test_fifty_requests_at_once_take_a_handful_of_transactions(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        before = (clerk.ledger.transactions, clerk.ledger.verbs)
        await asyncio.gather(*(use(clerk.hold(ann.order(tokens=1)), tokens=1) for _ in range(50)))
        assert clerk.ledger.verbs - before[1] == 100
        assert clerk.ledger.transactions - before[0] <= 4
    assert ann.credits == (0, 50, 0)


async def test_fifty_verbs_queued_together_take_one_transaction(bench: MakeBench, config: Config) -> None:
    ann = bench()
    async with at_work(config) as clerk:
        before = clerk.ledger.transactions
        await asyncio.gather(*(clerk.ledger.submit(adds(1)) for _ in range(50)))
        assert clerk.ledger.transactions - before == 1
    assert ann.credits == (0, 0.05, 0)


async def test_what_somebody_is_told_the_end_of_is_on_the_disk_first(bench: MakeBench, config: Config) -> None:
    """A settle waits for the disk, and so does what shares its transaction; a hold of its own does not."""

    def level(db: sqlite3.Connection) -> int:
        return int(db.execute("PRAGMA synchronous").fetchone()[0])

    ann = bench(paid=100)
    statements: list[str] = []
    async with at_work(config) as clerk:
        assert clerk.ledger.database
        await clerk.ledger.database.set_trace_callback(statements.append)
        await use(clerk.hold(ann.order(tokens=1)), tokens=1)
        await asyncio.gather(clerk.ledger.submit(adds(1), power_proof=False), clerk.ledger.submit(adds(1)))
        levels = [await clerk.ledger.submit(level, power_proof=waits) for waits in (False, True, False, True)]
    kinds = [s.split()[-1] for s in statements if s.startswith("PRAGMA")]
    assert kinds[:2] == ["NORMAL", "FULL"]
    assert levels == [1, 2, 1, 2]
    assert ann.credits == (0, 99.002, 0)


async def test_a_stream_takes_a_verb_a_slice(bench: MakeBench, config: Config) -> None:
    ann = bench(paid=1000)
    async with at_work(config) as clerk:
        before = clerk.ledger.verbs
        await use(clerk.hold(ann.order(tokens=100, slice_tokens=SLICE)), tokens=100)
        assert clerk.ledger.verbs - before <= 2 + 2 * 100 // SLICE
    assert ann.credits == (0, 900, 0)
    ann.audit()


def counters(proxy: RunningProxy) -> dict[str, int]:
    """The gauges that the server shows of its ledger."""
    text = proxy.client(None).get("/metrics").body.decode()
    return {name: int(float(value)) for name, value in re.findall(r"^proxy_ledger_(\w+) (\S+)$", text, re.MULTILINE)}


def test_a_request_over_http_takes_exactly_two_transactions(
    proxy: RunningProxy, funded_key: Callable[..., Account]
) -> None:
    client = proxy.client(funded_key().key)
    before = counters(proxy)
    for stream in (False, True, False):
        assert client.chat(stream=stream).status == 200
    after = counters(proxy)
    assert {name: after[name] - before[name] for name in after} == {"transactions": 6, "verbs": 6}


@dataclass
class SendsInStep:
    """One packet at a time, each of many events; the next when somebody says so."""

    packets: int
    answers: Answers = field(default_factory=Answers)

    def __post_init__(self) -> None:
        self.steps = [Signal() for _ in range(self.packets)]

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        for step in self.steps:
            await exchange.send(self.answers.token(exchange) * 20)
            await step.happened()
        await self.answers.send_closing(exchange)
        await exchange.end()


def test_one_read_of_the_upstream_is_one_write_to_the_client(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: Callable[..., Account]
) -> None:
    """A write is an HTTP chunk: the client sees how many there were. A packet goes out when the last has arrived."""
    script = upstream.behaviour = SendsInStep(packets=6)
    with proxy.client(funded_key(1000).key).stream_chat() as stream:
        # Each `read1` of http.client ends with a chunk, so that none is longer than what one write was.
        for number, step in enumerate(script.steps, 1):
            sizes = []
            while stream.received.count(b'"word"') < 20 * number:
                before = len(stream.received)
                assert stream.read_some()
                sizes.append(len(stream.received) - before)
            assert len(sizes) == 1
            step.set()
        assert stream.finish().clean
