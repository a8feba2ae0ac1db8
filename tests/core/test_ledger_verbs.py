"""Each verb of the ledger does what it promises, the schema refuses what no verb may do, and `audit` sees what did."""

import re
import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.core_ledger import (
    DAY,
    NOW,
    Admitted,
    Bench,
    Settled,
    admission_of,
    command,
    create_key,
    do,
    find_caller,
    hold,
    order,
    recover,
    refusal_of,
    rows,
    run_batch,
    well,
    without_guards,
)
from tests.support.postgres import WANTED as POSTGRES

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
    first, second, third = run_batch(ann.db, [hold(order, NOW) for order in orders])
    assert [admission_of(outcome).granted for outcome in (first, second)] == [10, 5]
    assert refusal_of(third) == "credits_in_use"
    assert ann.credits == (0, 15, 15)
    ann.audit()


@pytest.mark.parametrize(
    ("paid", "expected"),
    [
        (100, Admitted(max_tokens=10, granted=10, spare=64)),
        (50, Admitted(max_tokens=10, granted=10, spare=32)),  # 8 are twice the estimate
        (18, Admitted(max_tokens=10, granted=10, spare=0)),
        (15, Admitted(max_tokens=7, granted=7, spare=0)),
    ],
)
def test_a_chat_templates_tokens_are_held_as_far_as_the_credits_reach(
    paid: int, expected: Admitted, bench: MakeBench
) -> None:
    """They refuse nothing and lower no maximum."""
    ann = bench(paid=paid)
    assert admission_of(do(ann.db, hold(ann.order(tokens=10, estimate=4, template=64), NOW))) == expected
    assert ann.credits == (0, paid, 8 + expected.granted + expected.spare)
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
    assert ann.extend(request, tokens=100, count=8) == 10
    assert ann.credits == (8, 10, 18)
    assert ann.settle(request, 18) == Settled(18_000, 0)
    assert ann.credits == (0, 0, 0)
    assert ann.audit()["lapsed"] == 12


def test_what_reserves_free_credits_is_noted_apart(bench: MakeBench) -> None:
    """The first holds reserve them; one that came later spends them all the same, as long as they last."""
    ann = bench(free=12, paid=20)
    first, second = ann.hold(tokens=8), ann.hold(tokens=10)
    assert rows(ann.db, "SELECT hold, free_held FROM request ORDER BY id") == [(8000, 8000), (10_000, 4000)]
    assert rows(ann.db, "SELECT held, free_held FROM account") == [(18_000, 12_000)]
    ann.settle(second, 10)
    assert ann.credits == (2, 20, 8)
    assert rows(ann.db, "SELECT held, free_held FROM account") == [(8000, 8000)]
    ann.now = NOW + 31 * DAY
    ann.settle(first, 5)
    assert ann.credits == (0, 17, 0), "the two that were left, then purchased ones"
    charged = rows(ann.db, "SELECT charge, free_charge FROM request ORDER BY id")
    assert charged == [(5000, 2000), (10_000, 10_000)]
    assert ann.audit()["lapsed"] == 0


def test_a_key_spends_and_holds_no_more_than_its_limit(bench: MakeBench) -> None:
    ann = bench(paid=100)
    ann.key_hash, ann.key_id = create_key(ann.db, ann.id, NOW, credit_limit=15_000)
    request = ann.hold(tokens=10)
    assert admission_of(do(ann.db, hold(ann.order(tokens=10), NOW))).granted == 5, "what the limit leaves"
    assert ann.refused(tokens=1) == "credits_in_use"
    assert ann.extend(request, tokens=5, count=3) == 0
    ann.settle(request, 12)  # two more than were held
    assert rows(ann.db, f"SELECT spent, held FROM api_key WHERE id = {ann.key_id}") == [(12_000, 5000)]
    assert recover(ann.db, NOW) == 1
    ann.settle(ann.hold(tokens=5), 3)
    assert ann.refused(tokens=1) == "key_limit_reached"
    assert ann.credits == (0, 85, 0)
    ann.audit()


def test_a_key_ends_after_its_last_day_and_is_for_its_models_only(bench: MakeBench) -> None:
    ann = bench(paid=100)
    ann.key_hash, _ = create_key(ann.db, ann.id, NOW, expires_at=NOW + DAY, models="other plain")
    ann.now = NOW + DAY - 1
    ann.settle(ann.hold(tokens=1), 1)
    unknown = order(12345, ann.key_hash, model="plai")
    assert refusal_of(do(ann.db, hold(unknown, ann.now))) == "model_not_allowed"
    ann.now += 1
    assert ann.refused(tokens=1) == "expired_api_key"
    assert refusal_of(find_caller(ann.db, ann.key_hash, ann.now)) == "expired_api_key"
    ann.audit()


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
    ann.extend(request, tokens=5, count=9)
    assert ann.credits == (0, 100, 43)
    assert recover(ann.db, NOW) == 2
    assert recover(ann.db, NOW) == 0
    assert ann.credits == (0, 82, 0)
    found = rows(ann.db, "SELECT id, outcome, prompt_tokens, completion_tokens, estimated FROM request ORDER BY id")
    assert found == [(request, "interrupted", 4, 9, 1), (other, "interrupted", 5, 0, 1)]
    ann.audit()


# --------------------------------------------------------------------------------------------------
# What the database itself refuses

RESOLVE, OPEN = "UPDATE request SET prompt_tokens = 1,", "WHERE state = 'open'"
SETTLE = f"{RESOLVE} state = 'settled',"
REST = "model, multiplier, prompt_estimate, hold_tokens, hold, free_held"
ROW = f"id, account_id, key_id, {REST}"
WRONG_STATEMENTS = {
    "a_resolved_row_is_edited": "UPDATE request SET charge = 0, completion_tokens = 0 WHERE state = 'settled'",
    "a_resolved_row_is_opened": "UPDATE request SET state = 'open', charge = NULL WHERE state = 'settled'",
    "a_request_is_deleted": "DELETE FROM request WHERE state = 'open'",
    "a_grant_is_edited": "UPDATE credit_grant SET amount = amount + 1",
    "a_grant_is_deleted": "DELETE FROM credit_grant",
    "a_balance_is_edited": "UPDATE account SET paid = paid + 1",
    "a_charge_that_nobody_pays": "UPDATE account SET charged = charged + 1",
    "free_below_zero": "UPDATE account SET free = -1, granted = granted - free - 1",
    "held_below_zero": "UPDATE account SET held = -1, free_held = -1",
    "more_reserved_than_held": "UPDATE account SET free_held = held + 1",
    "reserved_below_zero": "UPDATE account SET free_held = -1",
    "lapsed_below_zero": "UPDATE account SET lapsed = -1, paid = paid + 1",
    "open_requests_below_zero": "UPDATE account SET open_requests = -1",
    "an_unknown_status": "UPDATE account SET status = 'closed'",
    "credits_that_are_no_integer": "UPDATE account SET paid = paid + 0.5, granted = granted + 0.5",
    "a_key_that_spent_less_than_nothing": "UPDATE api_key SET spent = -1",
    "a_key_that_holds_less_than_nothing": "UPDATE api_key SET held = -1",
    "a_limit_below_zero": "UPDATE api_key SET credit_limit = -1",
    "a_wrong_price": f"{SETTLE} completion_tokens = 1, charge = 1999, free_charge = 0 {OPEN}",
    "a_charge_that_is_void": f"{RESOLVE} state = 'void', "
    f"completion_tokens = 0, charge = 1000, free_charge = 0 {OPEN}",
    "more_from_free_credits_than_was_charged": f"{SETTLE} completion_tokens = 0, "
    f"charge = 1000, free_charge = 1001 {OPEN}",
    "a_charge_of_whose_credits_nothing_is_known": f"{SETTLE} completion_tokens = 0, charge = 1000 {OPEN}",
    "a_settled_row_without_a_charge": "UPDATE request SET state = 'settled' WHERE state = 'open'",
    "an_open_row_with_a_charge": "UPDATE request SET charge = 0, free_charge = 0 WHERE state = 'open'",
    "a_hold_below_zero": "UPDATE request SET hold = -1000, hold_tokens = -1, free_held = -1000 WHERE state = 'open'",
    "a_hold_that_is_not_its_tokens": "UPDATE request SET hold = hold + 1 WHERE state = 'open'",
    "a_hold_that_reserves_more": "UPDATE request SET free_held = hold + 1 WHERE state = 'open'",
    "a_hold_that_reserves_less_than_nothing": "UPDATE request SET free_held = -1 WHERE state = 'open'",
    "a_count_below_zero": "UPDATE request SET count = -1 WHERE state = 'open'",
    "tokens_below_zero": "UPDATE request SET state = 'settled', prompt_tokens = -1, completion_tokens = 1, charge = 0, "
    f"free_charge = 0 {OPEN}",
    "a_request_of_nobody": f"INSERT INTO request ({ROW}) SELECT 1, 99, key_id, {REST} FROM request LIMIT 1",
    "a_request_of_no_key": f"INSERT INTO request ({ROW}) SELECT 1, account_id, 99, {REST} FROM request LIMIT 1",
    "a_charge_below_zero": "UPDATE account SET charged = -1, paid = granted - lapsed + 1 - free",
    "an_estimate_below_zero": "UPDATE request SET prompt_estimate = -1 WHERE state = 'open'",
    "a_price_below_zero": "UPDATE request SET multiplier = -1 WHERE state = 'open'",
    "an_unknown_state": f"{RESOLVE} state = 'gone', completion_tokens = 0, charge = 1000, free_charge = 0 {OPEN}",
    "output_below_zero": f"{SETTLE} completion_tokens = -1, charge = 0, free_charge = 0 {OPEN}",
    "half_an_estimate": f"{SETTLE} completion_tokens = 0, charge = 1000, free_charge = 0, estimated = 2 {OPEN}",
    "an_unknown_kind": "INSERT INTO credit_grant (account_id, kind, amount, created_at) VALUES (1, 'gift', 1, 0)",
    "a_key_of_another_length": "UPDATE api_key SET hash = substr(hash, 2)",
    "a_key_of_nobody": "UPDATE api_key SET account_id = 99",
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
    if name == "credits_that_are_no_integer" and POSTGRES:
        pytest.skip("PostgreSQL rounds them to integers")
    with pytest.raises(sqlite3.IntegrityError):
        do(ann.db, lambda db, now: db.execute(WRONG_STATEMENTS[name]))
    assert ann.audit() == before


@pytest.mark.skipif(POSTGRES, reason="reads SQLite's schema")
def test_every_check_of_the_schema_is_met_by_a_statement_above(bench: MakeBench) -> None:
    ann = bench(free=5, paid=100)
    ann.settle(ann.hold(tokens=10), 7)
    ann.hold(tokens=10)
    met = set()
    for statement in WRONG_STATEMENTS.values():
        with pytest.raises(sqlite3.IntegrityError) as stopped:
            ann.db.execute(statement)
        met.add(str(stopped.value).removeprefix("CHECK constraint failed: "))
    (schema,) = ann.db.execute("SELECT group_concat(sql, char(10)) FROM sqlite_master").fetchone()
    assert set(re.findall(r"CHECK \((.*)\)", schema)) - met == set()


SWAP = "(CASE id WHEN 1 THEN 5 ELSE -5 END)"  # each total is right, and no account is
CORRUPTIONS = {
    "a_balance": "UPDATE account SET paid = paid + 1",
    "a_balance_with_its_total": "UPDATE account SET paid = paid + 1, granted = granted + 1",
    "a_charge": "UPDATE request SET charge = charge - 1 WHERE state = 'settled'",
    "a_priced_charge": "UPDATE request SET charge = charge + 1000, prompt_tokens = 1 WHERE state = 'settled'",
    "a_charge_with_its_total": "UPDATE account SET charged = charged + 1, paid = paid - 1",
    "a_hold": "UPDATE request SET hold = hold + 1 WHERE state = 'open'",
    "a_held_total": "UPDATE account SET held = 0",
    "a_reserved_total": "UPDATE account SET free_held = free_held + 1",
    "what_a_hold_reserves": "UPDATE request SET free_held = free_held + 1 WHERE state = 'open'",
    "the_tokens_of_a_hold": "UPDATE request SET hold_tokens = hold_tokens + 1 WHERE state = 'open'",
    "what_a_key_spent": "UPDATE api_key SET spent = spent + 1",
    "what_a_key_holds": "UPDATE api_key SET held = 0",
    "whose_credits_were_charged": "UPDATE request SET free_charge = free_charge - 1 WHERE state = 'settled'",
    "whose_credits_are_left": "UPDATE account SET free = free + 1, paid = paid - 1",
    "two_keys_that_swap_what_they_spent": "UPDATE api_key SET spent = 7000 - spent",
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
def test_audit_exits_1_on_a_wrong_row(name: str, bench: MakeBench, config: Any) -> None:
    """The row is put there past the schema's own guards, which stand there again before `audit` looks."""
    ann = bench(free=5, paid=100)
    bench(paid=100, name="bob")
    ann.settle(ann.hold(tokens=10), 7)
    ann.hold(tokens=10)
    assert command(config, "audit").status == 0
    with without_guards(ann.db):
        ann.db.execute(CORRUPTIONS[name])
    found = command(config, "audit")
    assert found.status == 1
    assert "DO NOT ADD UP" in found.out


@pytest.mark.skipif(POSTGRES, reason="a trigger is dropped otherwise there")
def test_audit_exits_1_where_a_guard_of_the_schema_is_missing(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    well(command(config, "audit"))
    ann.db.execute("DROP TRIGGER request_is_resolved_once")
    assert command(config, "audit").status == 1
