"""The books are right after any verbs in any order: they are kept here a second time, and compared at each step.

`Books` is a state machine: hypothesis calls the verbs on a real database in orders of its own, while time moves,
and after every step compares the database with what plain arithmetic on SPEC section 6 says it should hold.
"""

import functools
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support import core_ledger as ledger
from tests.support.core_ledger import (
    DAY,
    NOW,
    TIERS,
    Settled,
    admission_of,
    configuration,
    connect,
    fails_after_writing,
    refusal_of,
    run_batch,
    with_database,
)
from tests.support.core_meter import Bill


@functools.cache
def a_configuration() -> Any:
    """Read once."""
    with tempfile.TemporaryDirectory() as folder:
        return configuration(Path(folder))


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


def expected_refusal(key: Key, order: Any, now: int) -> str | None:
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


def expected_output(person: Person, order: Any) -> tuple[int, int]:
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
        self.config = with_database(a_configuration(), Path(self.folder) / "books.db")
        self.db = connect(self.config)
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
        account_id = ledger.create_account(self.db, self.config, name, self.now, free, days, tier)
        self.people.append(Person(account_id, name, tier, free, self.now + days * DAY, granted=free))
        self.create_key(len(self.people) - 1)

    @rule(pick=PICK)
    def create_key(self, pick: int) -> None:
        person = self.people[pick % len(self.people)]
        key_hash, key_id = ledger.create_key(self.db, person.id, self.now)
        self.keys.append(Key(key_id, key_hash, person))

    @rule(pick=PICK)
    def revoke(self, pick: int) -> None:
        key = self.keys[pick % len(self.keys)]
        ledger.revoke(self.db, self.config, key.id)
        key.revoked = True

    @rule(pick=PICK, active=st.booleans())
    def suspend_or_resume(self, pick: int, active: bool) -> None:
        person = self.people[pick % len(self.people)]
        ledger.suspend_or_resume(self.db, self.config, person.name, active)
        person.active = active

    @rule(pick=PICK, amount=CREDITS)
    def grant(self, pick: int, amount: int) -> None:
        person = self.people[pick % len(self.people)]
        ledger.grant(self.db, person.id, amount, self.now)
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

    def order(self, key: Key, estimate: int, choices: int, maximum: int, size: int | None, multiplier: int) -> Any:
        self.last_id = max(self.last_id + 1, ledger.id_at(self.now))
        most = maximum if choices else 0
        return ledger.order(self.last_id, key.hash, multiplier, estimate, choices, most, size)

    def admit(self, key: Key, order: Any, outcome: Any) -> None:
        """Compare an outcome with what must be, and note it."""
        person, why = key.owner, expected_refusal(key, order, self.now)
        if why is not None:
            assert refusal_of(outcome) == why
            return
        maximum, granted = expected_output(person, order)
        assert admission_of(outcome) == (maximum, granted)
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
        verbs = [ledger.hold(order, self.now) for order in orders]
        outcomes = run_batch(self.db, [*verbs, fails_after_writing] if failing else verbs)
        assert not failing or isinstance(outcomes.pop(), ZeroDivisionError)
        for key, order, outcome in zip(keys, orders, outcomes, strict=True):
            self.admit(key, order, outcome)

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, tokens=st.integers(0, 50), count=st.integers(0, 100))
    def extend(self, pick: int, tokens: int, count: int) -> None:
        self.step()
        request = self.requests[pick % len(self.requests)]
        granted = ledger.extend(self.db, request.id, tokens, count, self.now)
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
        outcome = ledger.settle(self.db, request.id, bill, self.now)
        if request.state != "open":
            assert outcome is None
            return
        charge = self.resolve(request, bill)
        assert outcome == Settled(charge, request.owner.free + request.owner.paid)

    @rule()
    def recover(self) -> None:
        self.step()
        opened = [request for request in self.requests if request.state == "open"]
        assert ledger.recover(self.db, self.now) == len(opened)
        for request in opened:
            self.resolve(request, Bill(request.estimate, request.count, True))

    @rule(pick=PICK)
    def find_caller(self, pick: int) -> None:
        self.step()
        key = self.keys[pick % len(self.keys)]
        found = ledger.find_caller(self.db, key.hash, self.now)
        if key.revoked:
            assert refusal_of(found) == "revoked_api_key"
            return
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
        report = ledger.audit(self.db, self.config)
        assert report.ok, report.lines
        assert int(report.value["charges"] * 1000) == sum(person.charged for person in self.people)
        assert int(report.value["grants"] * 1000) == sum(person.granted for person in self.people)
        assert int(report.value["held"] * 1000) == sum(person.held for person in self.people)
        assert report.value["open_requests"] == sum(len(person.open) for person in self.people)
        overruns = [overrun["request_id"] for overrun in report.value["overruns"]]
        assert overruns == [f"req_{r.id:016x}" for r in sorted(self.requests, key=lambda r: r.id) if r.charge > r.hold]


TestBooks = Books.TestCase
TestBooks.settings = settings(
    max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
