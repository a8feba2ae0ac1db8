"""What commands and the console show: each figure from the ledger's rows, and an audit that no edit gets past.

The books here are made by the ledger's own verbs; tests/test_attacks_on_the_books.py edits those of a running proxy.
"""

import datetime
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import proxy
from extras import queries
from extras.audit import Audit, prove_books
from tests.support.files import MODELS, OPTIONS, write_files

DAY = 86_400_000
PLAIN = {"one": {"tier": "one", "upstream": "echo", "aliases": ["uno"]}, "two": {"tier": "one", "upstream": "echo"}}


class Books:
    """A database with one account, and requests by the ledger's verbs at moments of the test's choice."""

    def __init__(self, db: Any, catalog: proxy.Catalog, now: int) -> None:
        self.db, self.catalog, self.now = db, catalog, now
        self.id = proxy.create_account(db, now, "ann", "free", 100_000, 30)
        self.key, self.key_id = proxy.create_key(db, now, self.id)

    @property
    def account(self) -> queries.Account:
        account = queries.account_of(self.db, self.now, self.id)
        assert account is not None
        return account

    def open(self, at: int, output: int, name: str = "one", key: str | None = None) -> int:
        """Hold for a prompt of 5 and this much output at a moment; the request's id."""
        (made,) = self.db.execute("SELECT count(*) FROM request").fetchone()
        number: int = (at << proxy.REQUEST_ID_BITS) + made
        model = self.catalog.models[name]
        order = proxy.Order(number, proxy.hash_key(key or self.key), model, model.price, 5, 0, 1, output, None)
        admission = proxy.hold(self.db, at, order, lambda tier: proxy.Tier())
        assert isinstance(admission, proxy.Admission), admission
        return number

    def settle(self, number: int, at: int, tokens: int | None) -> None:
        bill = None if tokens is None else proxy.Bill(5, tokens, False)
        proxy.settle(self.db, at, proxy.Resolution(number, "ok", "echo", bill))

    def use(self, at: int, tokens: int, name: str = "one") -> int:
        number = self.open(at, tokens, name)
        self.settle(number, at + 100, tokens)
        return number

    def audit(self, now: int | None = None, **how: Any) -> Audit:
        return prove_books(self.db, now or self.now, **how)


@pytest.fixture
def config(tmp_path: Path) -> proxy.Config:
    upstreams = {"echo": {"builtin": "echo"}}
    tiers = {"one": {"multiplier": 1.0}}
    files = write_files(tmp_path, {**OPTIONS, "upstreams": upstreams}, {"plain": MODELS["plain"]})
    (tmp_path / "models.yaml").write_text(yaml.safe_dump({"tiers": tiers, "models": PLAIN}))
    return proxy.load_config(files)


@pytest.fixture
def books(config: proxy.Config) -> Iterator[Books]:
    db = proxy.connect(config)
    yield Books(db, proxy.load_catalog(config), proxy.now_ms())
    db.close()


def test_an_account_is_shown_without_what_has_lapsed(books: Books) -> None:
    queries.grant_paid(books.db, books.now, books.account, 7_000)
    before = queries.account_of(books.db, books.now, books.id)
    after = queries.account_of(books.db, books.now + 31 * DAY, books.id)
    assert before is not None and (before.credits, before.free) == (107_000, 100_000)
    assert after is not None and (after.credits, after.free, after.paid) == (7_000, 0, 7_000)
    later = queries.totals(books.db, books.now + 31 * DAY)
    assert (later.lapsed, later.balances) == (100_000, 7_000)


def test_free_credits_under_a_hold_are_shown_until_it_ends(books: Books) -> None:
    number = books.open(books.now, 20)
    late = books.now + 31 * DAY
    account = queries.account_of(books.db, late, books.id)
    assert account is not None and account.free == account.held == 30_000
    books.settle(number, late, None)
    assert books.account.credits == 0
    assert books.audit(late).problems == []


def test_accounts_are_found_by_a_part_of_their_name(books: Books) -> None:
    for name in ("Anna", "bob_1", "bobx1", "50%"):
        proxy.create_account(books.db, books.now, name, "free", 0, 30)
    found = {text: [a.name for a in queries.list_accounts(books.db, books.now, text)] for text in ("ann", "b_1", "%")}
    assert found == {"ann": ["Anna", "ann"], "b_1": ["bob_1"], "%": ["50%"]}
    assert [a.name for a in queries.list_accounts(books.db, books.now, limit=2, skip=1)] == ["Anna", "ann"]
    assert queries.name_taken(books.db, "ANN") == "ann"
    with pytest.raises(proxy.CommandError, match='did you mean "bob_1"'):
        queries.find_account(books.db, books.now, "bob_2")


def test_a_reference_adds_once_and_a_correction_takes_what_is_not_in_use(books: Books) -> None:
    assert queries.grant_paid(books.db, books.now, books.account, 5_000, "r") is True
    assert queries.grant_paid(books.db, books.now, books.account, 5_000, "r") is False
    with pytest.raises(proxy.CommandError, match="another account or amount"):
        queries.grant_paid(books.db, books.now, books.account, 6_000, "r")
    books.open(books.now, 92)  # holds 102, 2 of them purchased
    with pytest.raises(proxy.CommandError, match="3 purchased credits"):
        queries.grant_paid(books.db, books.now, books.account, -3_001)
    assert queries.grant_paid(books.db, books.now, books.account, -3_000) is True
    total, grants = queries.grants_page(books.db, books.id, page=1, per_page=2)
    assert (total, [grant.amount for grant in grants]) == (3, [-3_000, 5_000])
    assert books.audit().problems == []


def test_a_key_has_the_models_it_was_given_by_id(books: Books) -> None:
    assert queries.models_of_key(books.catalog, ["uno", " two ", "one", ""]) == "one two"
    assert queries.models_of_key(books.catalog, [""]) is None
    with pytest.raises(proxy.CommandError, match='did you mean "two"'):
        queries.models_of_key(books.catalog, ["tow"])


def test_a_key_expires_at_the_end_of_its_last_day(books: Books) -> None:
    noon = int(datetime.datetime(2026, 12, 1, 12, tzinfo=datetime.UTC).timestamp() * 1000)
    day = datetime.date(2026, 12, 1)
    assert queries.end_of_day(noon, day) == noon + DAY // 2
    with pytest.raises(proxy.CommandError, match="2026-12-01"):
        queries.end_of_day(noon + DAY // 2, day)


def test_a_key_is_revoked_by_its_own_account_only(books: Books) -> None:
    other = proxy.create_account(books.db, books.now, "bob", "free", 0, 30)
    with pytest.raises(proxy.CommandError, match="there is no key"):
        queries.revoke_key(books.db, books.now, books.key_id, other)
    assert queries.revoke_key(books.db, books.now, books.key_id, books.id) == books.now
    assert queries.revoke_key(books.db, books.now + 5, books.key_id) == books.now, "it stays revoked since then"


def test_usage_is_by_day_model_and_key(books: Books) -> None:
    today = books.now // DAY * DAY
    books.use(today - 1, 10)
    books.use(today, 20)
    books.use(today, 3, "two")
    books.open(today, 1)
    days = [str(datetime.datetime.fromtimestamp(ms / 1000, datetime.UTC).date()) for ms in (today - 1, today)]
    uses = queries.usage(books.db, today - DAY, account_id=books.id, by_key=True)
    assert [(use.day, use.model, use.key_id, use.requests, use.charge) for use in uses] == [
        (days[0], "one", books.key_id, 1, 15_000),
        (days[1], "one", books.key_id, 1, 25_000),
        (days[1], "two", books.key_id, 1, 8_000),
    ]
    assert [use.completion_tokens for use in queries.usage(books.db, today) if use.model == "one"] == [20]
    assert queries.usage(books.db, today, account_id=books.id + 1) == []
    assert queries.days_ago(books.now, 1) == today


def test_requests_are_paged_from_the_newest(books: Books) -> None:
    numbers = [books.use(books.now + second, 1) for second in range(5)]
    first = queries.requests_page(books.db, books.id, limit=2)
    assert [request.id for request in first] == numbers[:2:-1]
    assert [r.id for r in queries.requests_page(books.db, books.id, before=first[-1].id)] == numbers[2::-1]
    assert (first[0].total_ms, first[0].account, first[0].charge) == (100, "ann", 6_000)


# -- the audit


def test_a_covered_overrun_is_counted_and_only_listed_when_asked(books: Books) -> None:
    number = books.open(books.now, 10)
    books.settle(number, books.now, 40)  # 45 charged on a hold of 20
    found = books.audit()
    assert (found.problems, found.overrun_count, found.overrun_credits, found.overruns) == ([], 1, 25_000, [])
    assert [overrun.request_id for overrun in books.audit(all_overruns=True).overruns] == [number]


def test_an_overrun_that_takes_a_balance_below_zero_is_listed(books: Books) -> None:
    number = books.open(books.now, 10)
    books.settle(number, books.now, 140)
    assert books.account.credits == -45_000
    assert [overrun.request_id for overrun in books.audit().overruns] == [number]
    queries.grant_paid(books.db, books.now + 1, books.account, 90_000)
    assert [overrun.request_id for overrun in books.audit().overruns] == [number], "a top-up hides nothing"


def test_an_overrun_is_listed_that_took_what_another_request_had_reserved(books: Books) -> None:
    """It met a balance above zero; the one that went below paid no more than it held."""
    honest = books.open(books.now, 60)
    number = books.open(books.now, 10)
    books.settle(number, books.now + 1, 60)
    assert books.account.credits > 0
    books.settle(honest, books.now + 2, 60)
    assert books.account.credits < 0
    assert [overrun.request_id for overrun in books.audit().overruns] == [number]


def test_credits_that_a_fast_clock_lapsed_are_no_fault(books: Books) -> None:
    """The clock ran ahead by two months, a request was made, and the clock was put right."""
    queries.grant_paid(books.db, books.now, books.account, 50_000)
    books.use(books.now + 60 * DAY, 1)
    assert books.account.free == 0
    assert books.audit(books.now).problems == []


EDITS = {
    "lapsed is invented": "UPDATE account SET lapsed = lapsed + 1, free = free - 1",
    "free becomes purchased": "UPDATE account SET free = free - 5000, paid = paid + 5000",
    "the day of the free credits": "UPDATE account SET free_expires_at = free_expires_at + 1",
    "what is held": "UPDATE account SET held = held + 1",
    "what is held of the free ones": "UPDATE account SET free_held = free_held - 1",
    "open requests": "UPDATE account SET open_requests = 0",
    "what a key spent": "UPDATE api_key SET spent = 0",
    "what a key holds": "UPDATE api_key SET held = held + 1",
    "another's key": "UPDATE request SET key_id = 99 WHERE state = 'open'",
    "a hold": "UPDATE request SET hold = hold + 1 WHERE state <> 'open'",
    "a hold below the prompt": "UPDATE request SET hold_tokens = 9, hold = 9000 WHERE state <> 'open'",
    "free and charge": "UPDATE request SET free_charge = free_charge - 1 WHERE charge > 0",
    "a missing index": "DROP INDEX request_account",
    "a grant": "UPDATE credit_grant SET amount = amount + 1",
    "a grant of nobody": "INSERT INTO credit_grant (account_id, kind, amount, created_at) VALUES (99, 'paid', 1, 0)",
}


@pytest.mark.parametrize("edit", EDITS)
def test_audit_finds_what_somebody_edited(books: Books, edit: str) -> None:
    books.use(books.now, 10)
    books.open(books.now, 10)
    assert books.audit().problems == []
    triggers = books.db.execute("SELECT name, sql FROM sqlite_master WHERE type = 'trigger'").fetchall()
    for pragma in ("ignore_check_constraints = ON", "foreign_keys = OFF"):
        books.db.execute(f"PRAGMA {pragma}")
    for name, _ in triggers:
        books.db.execute(f"DROP TRIGGER {name}")
    assert books.db.execute(EDITS[edit]).rowcount
    for _, text in triggers:
        books.db.execute(text)
    assert books.audit().problems


def test_an_audit_sees_one_moment_and_stops_nobody(books: Books, config: proxy.Config) -> None:
    with queries.snapshot(books.db) as now:
        assert prove_books(books.db, now).problems == []
        other = sqlite3.connect(config.database_path, timeout=0)
        other.execute("UPDATE account SET tier = 'pro'")
        other.commit()
        other.close()
        assert books.account.tier == "free"
    assert books.account.tier == "pro"
