"""The books are right after any verbs in any order: they are kept here a second time, and compared at each step.

`Books` is a state machine: hypothesis calls the verbs on a real database in orders of its own, while time moves,
and after every step compares the database with what plain arithmetic on SPEC section 6 says it should hold.
"""

import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support import core_ledger as ledger
from tests.support.books import milli
from tests.support.core_ledger import (
    DAY,
    NOW,
    TIERS,
    Admitted,
    Settled,
    admission_of,
    configuration,
    connect,
    fails_after_writing,
    refusal_of,
    run_batch,
)
from tests.support.core_meter import Bill
from tests.support.postgres import WANTED as POSTGRES

UNLIMITED = 10**15

# --------------------------------------------------------------------------------------------------
# The books, kept a second time


@dataclass
class Request:
    """A request that was admitted, as the model has it. Credits in thousandths."""

    id: int
    owner: "Person"
    key: "Key"
    multiplier: int
    estimate: int
    tokens: int  # that are held
    free_held: int  # of the hold, what is reserved of the free credits
    count: int = 0
    state: str = "open"
    charge: int = 0
    free_charge: int = 0

    @property
    def hold(self) -> int:
        return self.tokens * self.multiplier

    @property
    def missed(self) -> int:
        return max(0, self.charge - self.hold)


class Holder:
    """What requests hold: an account, or a key."""

    requests: list[Request]

    @property
    def open(self) -> list[Request]:
        return [request for request in self.requests if request.state == "open"]

    @property
    def held(self) -> int:
        return sum(request.hold for request in self.open)

    @property
    def missed(self) -> int:
        return sum(request.missed for request in self.requests)


@dataclass
class Person(Holder):
    """An account, as the model has it."""

    id: int
    name: str
    tier: str
    free: int
    expires: int
    paid: int = 0
    granted: int = 0
    lapsed: int = 0
    active: bool = True
    admitted: list[int] = field(default_factory=list)  # the minutes of its admissions
    requests: list[Request] = field(default_factory=list)

    @property
    def balance(self) -> int:
        return self.free + self.paid

    @property
    def free_held(self) -> int:
        return sum(request.free_held for request in self.open)

    @property
    def charged(self) -> int:
        return sum(request.charge for request in self.requests)

    def lapse(self, now: int) -> None:
        """Free credits go on their day, but for what open requests reserved of them."""
        if now >= self.expires:
            lost = max(0, self.free - self.free_held)
            self.free -= lost
            self.lapsed += lost

    def reserve(self, hold: int) -> int:
        """How much of a new hold is of the free credits: as much as there is that no other has."""
        return min(hold, max(0, self.free - self.free_held))

    def pay(self, request: Request, now: int) -> None:
        """Free credits first; past their day, only as far as the request's own hold kept them."""
        request.free_charge = min(self.free, request.charge)
        if now >= self.expires:
            request.free_charge = min(request.free_charge, request.free_held)
        self.free -= request.free_charge
        self.paid -= request.charge - request.free_charge


@dataclass
class Key(Holder):
    """A key, as the model has it; it is for the model "plain" or for "other"."""

    id: int
    hash: bytes
    owner: Person
    limit: int | None
    expires: int | None
    models: str | None
    revoked: bool = False
    requests: list[Request] = field(default_factory=list)

    @property
    def spent(self) -> int:
        return sum(request.charge for request in self.requests)

    @property
    def left(self) -> int:
        """What its limit leaves, what it holds not subtracted."""
        return UNLIMITED if self.limit is None else self.limit - self.spent

    @property
    def available(self) -> int:
        return min(self.owner.balance - self.owner.held, self.left - self.held)

    def refusal(self, now: int) -> str | None:
        if self.revoked:
            return "revoked_api_key"
        return "expired_api_key" if self.expires is not None and now >= self.expires else None


def expected_refusal(key: Key, order: Any, now: int) -> str | None:
    """Why an order must be refused; None if it must be granted."""
    person, tier = key.owner, TIERS[key.owner.tier]
    if why := key.refusal(now):
        return why
    if not person.active:
        return "account_suspended"
    if key.models not in (None, "plain"):
        return "model_not_allowed"
    if tier.requests_per_minute is not None and person.admitted.count(now // 60_000) >= tier.requests_per_minute:
        return "rate_limit_exceeded"
    if tier.parallel is not None and len(person.open) >= tier.parallel:
        return "too_many_parallel_requests"
    least = max(1, (2 * order.prompt_estimate + order.choices) * order.multiplier)
    if not order.multiplier or (person.balance > 0 and key.available >= least):
        return None
    if person.balance <= 0 or person.balance < (2 * order.prompt_estimate + order.choices) * order.multiplier:
        return "insufficient_credits"
    return "key_limit_reached" if key.left < least else "credits_in_use"


def expected_admission(key: Key, order: Any) -> Admitted:
    """The maximum a choice, how many tokens of output are held, and how many for the chat template."""
    maximum = order.max_tokens
    payable = key.available // order.multiplier if order.multiplier else UNLIMITED
    if order.choices:
        maximum = min(maximum, (payable - 2 * order.prompt_estimate) // order.choices)
    output = maximum * order.choices
    if order.slice_tokens is not None:
        output = min(output, order.slice_tokens)
    return Admitted(maximum, output, min(order.template_tokens, payable - 2 * order.prompt_estimate - output))


# --------------------------------------------------------------------------------------------------
# Any verb, in any order

MULTIPLIERS = st.sampled_from([0, 1, 500, 1000, 3500])
CREDITS = st.integers(0, 200).map(lambda tokens: tokens * 500)
PICK = st.integers(0, 10**6)
COLUMNS = {
    "account": "id free free_held paid held granted lapsed charged open_requests",
    "api_key": "id spent held",
    "credit_grant": "id kind amount",
    "request": "id account_id key_id state count hold_tokens hold free_held charge free_charge",
}


class Books(RuleBasedStateMachine):
    """Every verb of the ledger on several accounts, while time moves."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.mkdtemp()
        self.config = configuration(Path(self.folder))
        self.db = connect(self.config)
        ledger.hurry(self.db)
        self.now = NOW
        self.last_id = 0
        self.people: list[Person] = []
        self.keys: list[Key] = []
        self.requests: list[Request] = []

    def teardown(self) -> None:
        self.db.close()
        shutil.rmtree(self.folder)

    def step(self) -> None:
        """Free credits whose day has come lapse."""
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
        account_id = ledger.create_account(self.db, name, self.now, free, days, tier)
        self.people.append(Person(account_id, name, tier, free, self.now + days * DAY, granted=free))
        self.create_key(len(self.people) - 1, None, None, None)

    @rule(
        pick=PICK,
        limit=st.none() | CREDITS,
        lasting=st.none() | st.sampled_from([60_000, DAY]),
        models=st.sampled_from([None, "plain", "other"]),
    )
    def create_key(self, pick: int, limit: int | None, lasting: int | None, models: str | None) -> None:
        person = self.people[pick % len(self.people)]
        expires = None if lasting is None else self.now + lasting
        limits = {"credit_limit": limit, "expires_at": expires, "models": models}
        key_hash, key_id = ledger.create_key(self.db, person.id, self.now, **limits)
        self.keys.append(Key(key_id, key_hash, person, limit, expires, models))

    @rule(pick=PICK)
    def revoke(self, pick: int) -> None:
        key = self.keys[pick % len(self.keys)]
        ledger.revoke(self.config, key.id, self.now)
        key.revoked = True

    @rule(pick=PICK, active=st.booleans())
    def suspend_or_resume(self, pick: int, active: bool) -> None:
        person = self.people[pick % len(self.people)]
        ledger.suspend_or_resume(self.config, person.name, active, self.now)
        person.active = active

    @rule(pick=PICK, amount=CREDITS.filter(bool))
    def grant(self, pick: int, amount: int) -> None:
        person = self.people[pick % len(self.people)]
        ledger.grant(self.config, person.name, amount, self.now)
        person.paid += amount
        person.granted += amount

    @rule(pick=PICK)
    def take_all_purchased_back(self, pick: int) -> None:
        person = self.people[pick % len(self.people)]
        most = min(person.paid, person.balance - person.held)
        if most > 0:
            self.grant(pick, -most)

    # -- requests

    def order(self, key: Key, choices: int, maximum: int, **more: Any) -> Any:
        self.last_id = max(self.last_id + 1, ledger.id_at(self.now))
        return ledger.order(self.last_id, key.hash, choices=choices, max_tokens=maximum if choices else 0, **more)

    def admit(self, key: Key, order: Any, outcome: Any) -> None:
        """Compare an outcome with what must be, and note it."""
        person, why = key.owner, expected_refusal(key, order, self.now)
        if why is not None:
            assert refusal_of(outcome) == why
            return
        expected = expected_admission(key, order)
        assert admission_of(outcome) == expected
        tokens = 2 * order.prompt_estimate + expected.granted + expected.spare
        free_held = person.reserve(tokens * order.multiplier)
        request = Request(
            order.request_id, person, key, order.multiplier, order.prompt_estimate, tokens, free_held=free_held
        )
        person.admitted.append(self.now // 60_000)
        for requests in (person.requests, key.requests, self.requests):
            requests.append(request)

    @rule(
        picks=st.lists(PICK, min_size=1, max_size=3),
        choices=st.integers(0, 3),
        maximum=st.integers(1, 60),
        order=st.fixed_dictionaries(
            {
                "multiplier": MULTIPLIERS,
                "estimate": st.integers(0, 20),
                "slice_tokens": st.none() | st.integers(1, 20),
                "template": st.sampled_from([0, 64]),
            }
        ),
        failing=st.booleans(),
    )
    def hold(self, picks: list[int], choices: int, maximum: int, order: dict[str, Any], failing: bool) -> None:
        """One hold or several in one transaction, beside a verb that fails perhaps."""
        keys = [self.keys[pick % len(self.keys)] for pick in picks]
        orders = [self.order(key, choices, maximum, **order) for key in keys]
        verbs = [ledger.hold(ordered, self.now) for ordered in orders]
        outcomes = run_batch(self.db, [*verbs, fails_after_writing] if failing else verbs)
        assert not failing or isinstance(outcomes.pop(), ZeroDivisionError)
        for key, ordered, outcome in zip(keys, orders, outcomes, strict=True):
            self.admit(key, ordered, outcome)

    @precondition(lambda self: self.requests)
    @rule(pick=PICK, tokens=st.integers(0, 50), count=st.integers(0, 100))
    def extend(self, pick: int, tokens: int, count: int) -> None:
        request = self.requests[pick % len(self.requests)]
        granted = ledger.extend(self.db, request.id, tokens, count, self.now)
        if request.state != "open":
            assert granted == 0
            return
        most = request.key.available // request.multiplier if request.multiplier else tokens
        assert granted == max(0, min(tokens, most))
        request.free_held += request.owner.reserve(granted * request.multiplier)
        request.tokens += granted
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
        request = self.requests[pick % len(self.requests)]
        bill = None if void else Bill(prompt, completion, False)
        outcome = ledger.settle(self.db, request.id, bill, self.now)
        if request.state != "open":
            assert outcome is None
            return
        charge = self.resolve(request, bill)
        assert outcome == Settled(charge, request.owner.balance)

    @rule()
    def recover(self) -> None:
        opened = [request for request in self.requests if request.state == "open"]
        assert ledger.recover(self.db, self.now) == len(opened)
        for request in opened:
            self.resolve(request, Bill(request.estimate, request.count, True))

    @rule(pick=PICK)
    def find_caller(self, pick: int) -> None:
        key = self.keys[pick % len(self.keys)]
        found = ledger.find_caller(self.db, key.hash, self.now)
        if why := key.refusal(self.now):
            assert refusal_of(found) == why
            return
        person = key.owner
        free = found.free - found.lapsing(self.now)
        assert (found.account, free, found.paid) == (person.name, person.free, person.paid)
        assert (found.held, found.free_held, found.open_requests) == (person.held, person.free_held, len(person.open))
        assert (found.key_spent, found.key_held) == (key.spent, key.held)
        assert found.available(self.now) == key.available

    @rule(ms=st.sampled_from([0, 1, 999, 20_000, 60_000, DAY // 2, DAY]))
    def time_passes(self, ms: int) -> None:
        self.now += ms
        self.step()

    # -- what must hold

    def rows(self, table: str) -> dict[int, dict[str, Any]]:
        """All rows, by their ids."""
        names = COLUMNS[table].split()
        found = ledger.rows(self.db, f"SELECT {', '.join(names)} FROM {table}")
        return {row[0]: dict(zip(names, row, strict=True)) for row in found}

    @invariant()
    def every_account_is_as_the_model_has_it(self) -> None:
        rows = self.rows("account")
        assert len(rows) == len(self.people)
        for person in self.people:
            found = rows[person.id]
            due = max(0, found["free"] - found["free_held"]) if self.now >= person.expires else 0
            assert (found["free"] - due, found["lapsed"] + due) == (person.free, person.lapsed)
            assert (found["paid"], found["granted"], found["charged"]) == (person.paid, person.granted, person.charged)
            assert (found["held"], found["free_held"]) == (person.held, person.free_held)
            assert found["open_requests"] == len(person.open)

    @invariant()
    def every_key_is_as_the_model_has_it(self) -> None:
        rows = self.rows("api_key")
        assert len(rows) == len(self.keys)
        for key in self.keys:
            found = rows[key.id]
            assert (found["spent"], found["held"]) == (key.spent, key.held)
            if key.limit is not None:
                assert key.spent + key.held <= key.limit + key.missed, "past its limit by more than estimates missed"

    @invariant()
    def every_request_has_one_row_that_was_resolved_once(self) -> None:
        rows = self.rows("request")
        assert len(rows) == len(self.requests)
        for request in self.requests:
            found = rows[request.id]
            assert (found["account_id"], found["key_id"]) == (request.owner.id, request.key.id)
            assert (found["state"], found["count"]) == (request.state, request.count)
            assert (found["hold_tokens"], found["hold"]) == (request.tokens, request.hold)
            assert found["free_held"] == request.free_held <= request.hold
            charge, free_charge = (None, None) if request.state == "open" else (request.charge, request.free_charge)
            assert (found["charge"], found["free_charge"]) == (charge, free_charge)

    @invariant()
    def grants_less_lapsed_less_charges_are_the_balances(self) -> None:
        """Of free and of purchased credits apart, by the rows alone."""
        accounts, requests = self.rows("account").values(), self.rows("request").values()
        granted = dict.fromkeys(("free", "paid"), 0)
        for grant in self.rows("credit_grant").values():
            granted[grant["kind"]] += grant["amount"]
        charged = sum(row["charge"] or 0 for row in requests)
        charged_free = sum(row["free_charge"] or 0 for row in requests)
        lapsed = sum(row["lapsed"] for row in accounts)
        assert granted["free"] - lapsed - charged_free == sum(row["free"] for row in accounts)
        assert granted["paid"] - (charged - charged_free) == sum(row["paid"] for row in accounts)
        opened = [row for row in requests if row["state"] == "open"]
        for figure, of_requests in (("held", "hold"), ("free_held", "free_held")):
            held = sum(row[figure] for row in accounts)
            assert held == sum(row[of_requests] for row in opened) >= 0
        for person in self.people:
            assert person.balance >= -person.missed, "below zero by more than what estimates missed"

    @invariant()
    def audit_says_the_same(self) -> None:
        done = ledger.audit(self.config, self.now)
        assert done.status == 0, done
        found = done.value
        assert milli(found["charges"]) == sum(person.charged for person in self.people)
        assert milli(found["grants"]) == sum(person.granted for person in self.people)
        assert milli(found["lapsed"]) == sum(person.lapsed for person in self.people)
        assert milli(found["held"]) == sum(person.held for person in self.people)
        assert found["open_requests"] == sum(len(person.open) for person in self.people)
        overruns = [overrun["request_id"] for overrun in found["overruns"]]
        assert overruns == [f"req_{r.id:016x}" for r in sorted(self.requests, key=lambda r: r.id) if r.missed]


PATIENT = settings(stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class TestBooks(Books.TestCase):
    settings = settings(PATIENT, max_examples=12)


@pytest.mark.chaos
class TestBooksAtLength(Books.TestCase):
    settings = settings(PATIENT, max_examples=40 if POSTGRES else 200)
