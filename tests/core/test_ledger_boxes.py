"""What befalls a box's ledger on PostgreSQL: commits without an answer, requests that others recovered."""

import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

import proxy
from tests.support.core_ledger import NOW, TIERS, Bench, Bill, Refusal, at_work, create_key, fails_after_writing
from tests.support.postgres import WANTED as POSTGRES
from tests.support.postgres import connected

pytestmark = pytest.mark.skipif(not POSTGRES, reason="PROXY_TEST_DATABASE=postgres asks for it")
MakeBench = Callable[..., Bench]
LATE = 1 << 11


class Accident:
    """A connection that breaks at the next commit, before the server has it or after; `away`: and cannot be made again
    for a while."""

    def __init__(self, db: Any, arrives: bool, away: bool = False) -> None:
        self.db, self.arrives, self.away = db, arrives, away
        self.commit, self.end, self.connect = db.commit, db.end_pipeline, db.connect
        db.commit = self.breaks

    def breaks(self) -> None:
        self.db.commit, self.db.end_pipeline = self.commit, self.ends
        if not self.arrives:
            with connected(self.db.url) as other:
                other.execute("SELECT pg_terminate_backend(%s, 5000)", (self.db.raw.info.backend_pid,))
        if self.away:
            self.db.connect = self.cannot_connect
        self.commit()

    def ends(self) -> None:
        self.db.end_pipeline = self.end
        self.end()
        self.db.close()
        raise sqlite3.OperationalError("the connection broke")

    def cannot_connect(self) -> None:
        raise sqlite3.OperationalError("nobody there")


def hold_of(order: Any) -> Any:
    return partial(proxy.hold, order=order, limits_of=TIERS.__getitem__)


def settle_of(clerk: Any, order: Any, tokens: int) -> Any:
    end = proxy.Resolution(order.request_id, "ok", "main", proxy.Bill(*Bill(0, tokens, False)), None, order)
    return partial(clerk.ledger.database.settle, end=end)


def states(ann: Bench) -> list[tuple[Any, ...]]:
    sql = "SELECT id, state, outcome, completion_tokens, hold FROM request ORDER BY id"
    return [tuple(row) for row in ann.db.execute(sql).fetchall()]


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_commit_whose_answer_is_lost_is_found_out_and_done_once(
    bench: MakeBench, config: Any, arrives: bool
) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        order = ann.order(tokens=10)
        Accident(clerk.ledger.database.db, arrives)
        assert (await clerk.ledger.submit(hold_of(order), whose=order.key_hash)).granted == 10
        assert ann.credits == (0, 100, 10)
        Accident(clerk.ledger.database.db, arrives)
        settled = await clerk.ledger.submit(settle_of(clerk, order, 7), whose=order.key_hash, must_be_done="it")
        assert settled.charge == 7000
    assert ann.credits == (0, 93, 0)
    assert ann.audit()["open_requests"] == 0


@pytest.mark.parametrize("arrives", [True, False])
async def test_a_hold_that_nobody_can_tell_of_is_refused_and_holds_nothing_in_the_end(
    bench: MakeBench, config: Any, arrives: bool
) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        order = ann.order(tokens=10)
        accident = Accident(clerk.ledger.database.db, arrives, away=True)
        with pytest.raises(Refusal) as refused:
            await clerk.ledger.submit(hold_of(order), whose=order.key_hash)
        assert refused.value.code == "ledger_unavailable"
        clerk.ledger.database.db.connect = accident.connect
        await clerk.caught_up()
        found = [(order.request_id, "void", "ledger_unavailable", 0, 10_000)]
        assert states(ann) == (found if arrives else [])
    assert ann.credits == (0, 100, 0)
    ann.audit()


async def test_what_was_recovered_too_early_pays_the_rest_in_a_second_row_once(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        order = ann.order(tokens=10)
        await clerk.ledger.submit(hold_of(order), whose=order.key_hash)
        end = proxy.Resolution(order.request_id, "interrupted", None, proxy.Bill(0, 3, True))
        await clerk.ledger.submit(partial(proxy.settle, end=end), whose=order.key_hash)
        for _ in range(2):
            await clerk.ledger.submit(settle_of(clerk, order, 8), whose=order.key_hash)
    assert states(ann) == [
        (order.request_id, "settled", "interrupted", 3, 10_000),
        (order.request_id | LATE, "settled", "late", 5, 0),
    ]
    assert ann.credits == (0, 92, 0)
    ann.audit()


async def test_a_request_whose_hold_the_database_lost_is_entered_and_charged(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        order = ann.order(tokens=10)
        for _ in range(2):
            await clerk.ledger.submit(settle_of(clerk, order, 8), whose=order.key_hash)
    assert states(ann) == [(order.request_id, "settled", "ok", 8, 0)]
    assert ann.credits == (0, 92, 0)
    ann.audit()


async def test_a_box_that_was_taken_for_gone_takes_another_number_and_ends_its_streams(
    bench: MakeBench, config: Any
) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        database = clerk.ledger.database
        before, first = database.box, clerk.next_id()
        assert not database.is_cut_off
        ann.db.execute("UPDATE box SET owner = 'somebody else'")
        order = ann.order(tokens=10)
        await clerk.ledger.submit(hold_of(order), whose=order.key_hash)
        assert database.box != before and database.is_cut_off
        assert (first >> 12 & 255, clerk.next_id() >> 12 & 255) == (before, database.box)
        await clerk.ledger.submit(settle_of(clerk, order, 8), whose=order.key_hash)
    assert ann.credits == (0, 92, 0)


async def test_a_bug_in_one_verb_costs_no_other_its_transaction(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        orders = [ann.order(tokens=1) for _ in range(60)]
        asked = [clerk.ledger.submit(hold_of(order), whose=order.key_hash) for order in orders]
        wrong = clerk.submit(fails_after_writing)
        assert sum([(await one).granted for one in asked]) == 60
        with pytest.raises(ZeroDivisionError):
            await wrong
    assert ann.credits == (0, 100, 60)


async def test_what_is_asked_ahead_is_asked_again_behind_a_verb_of_the_same_account(
    bench: MakeBench, config: Any
) -> None:
    """Two keys of one account, and one key twice, in one transaction: each sees what the one before has held."""
    ann, bob = bench(paid=25), bench(paid=100, name="bob")
    other_key, _ = create_key(ann.db, ann.id, NOW)
    orders = [ann.order(tokens=10), ann.order(tokens=10)._replace(key_hash=other_key), ann.order(tokens=10)]
    async with at_work(config) as clerk:
        before, _ = clerk.work
        asked = [clerk.ledger.submit(hold_of(order), whose=order.key_hash) for order in (*orders, bob.order(tokens=10))]
        assert [(await one).granted for one in asked] == [10, 10, 5, 10]
        assert clerk.work[0] == before + 1
        ends = [clerk.ledger.submit(settle_of(clerk, order, 4), whose=order.key_hash) for order in orders]
        assert [(await end).credits for end in ends] == [21_000, 17_000, 13_000]
    assert ann.credits == (0, 13, 0)
    ann.audit()
