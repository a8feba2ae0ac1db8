"""One writer: a verb fails alone, a cancelled request leaves nothing held, a settle is tried until it is in.

What this costs is counted: transactions and verbs a request.
"""

import asyncio
import contextlib
import re
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from tests.support.core_ledger import (
    NOW,
    Bench,
    Refusal,
    adds,
    admission_of,
    at_work,
    breaks_a_constraint,
    came,
    end_without_waiting,
    fails_after_writing,
    hold,
    locked,
    make_impatient,
    refusal_of,
    run_batch,
    turns_of_the_loop,
    under_way,
    use,
    wait_for_no_lock,
    word,
)
from tests.support.core_meter import closing, delta
from tests.support.postgres import WANTED as POSTGRES
from tests.support.waiting import wait_until

MakeBench = Callable[..., Bench]

# --------------------------------------------------------------------------------------------------
# A batch of verbs


def test_a_verb_that_raises_is_alone_in_its_rollback(bench: MakeBench) -> None:
    ann = bench()
    outcomes = run_batch(ann.db, [adds(1), fails_after_writing, adds(10), fails_after_writing, adds(100)])
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [1, 10, 100]
    assert [type(outcomes[n]) for n in (1, 3)] == [ZeroDivisionError] * 2
    assert ann.credits == (0, 0.111, 0)


def test_a_verb_that_breaks_a_constraint_is_alone_in_its_rollback(bench: MakeBench) -> None:
    ann = bench()
    first, second, third = run_batch(ann.db, [adds(1), breaks_a_constraint, adds(10)])
    assert (first, third) == (1, 10)
    assert isinstance(second, sqlite3.IntegrityError)
    assert ann.credits == (0, 0.011, 0)


def test_a_refusal_writes_nothing_and_stands_beside_the_others(bench: MakeBench) -> None:
    ann = bench(paid=5)
    first, second = run_batch(ann.db, [hold(ann.order(estimate=50), NOW), hold(ann.order(tokens=3), NOW)])
    assert refusal_of(first) == "insufficient_credits"
    assert admission_of(second)[:2] == (3, 3)
    assert ann.credits == (0, 5, 3)
    assert ann.audit()["open_requests"] == 1


def test_a_batch_on_a_locked_database_fails_whole_and_leaves_nothing_open(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=5)
    wait_for_no_lock(ann.db)
    with locked(config):
        outcomes = run_batch(ann.db, [adds(1), adds(2)])
    assert [type(outcome) for outcome in outcomes] == [sqlite3.OperationalError] * 2
    assert not ann.db.in_transaction
    assert run_batch(ann.db, [adds(1)]) == [1]


# --------------------------------------------------------------------------------------------------
# On a running loop


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_admission_leaves_nothing_held(turns: int, bench: MakeBench, config: Any) -> None:
    """At any turn of the loop, from before the hold is queued to after it was granted."""
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        waiting = asyncio.create_task(use(clerk.hold(ann.order(tokens=10))))
        await turns_of_the_loop(turns)
        waiting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting
        await clerk.caught_up()
    assert ann.credits == (0, 100, 0)
    assert ann.audit()["open_requests"] == 0


async def test_an_admission_that_is_cancelled_while_it_is_written_leaves_nothing_held(
    bench: MakeBench, config: Any
) -> None:
    ann = bench(paid=100)
    order = ann.order(tokens=10)
    async with at_work(config) as clerk:
        waiting = asyncio.create_task(use(clerk.hold(order)))
        with locked(config):
            before, _ = clerk.work
            await turns_of_the_loop(6)
            assert clerk.work[0] == before + 1, "its transaction has begun, and waits for the lock"
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
        await clerk.caught_up()
    assert ann.db.execute("SELECT id, state, outcome FROM request").fetchall() == [
        (order.request_id, "void", "client_gone")
    ]
    assert ann.credits == (0, 100, 0)
    ann.audit()


async def test_a_request_that_is_cancelled_half_way_costs_what_came(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        with pytest.raises(asyncio.CancelledError):
            async with clerk.hold(ann.order(tokens=10, estimate=5)) as held:
                under_way(held)
                came(held, delta())
                raise asyncio.CancelledError
    assert ann.credits == (0, 94, 0)
    ann.audit()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    make_impatient(monkeypatch)


@pytest.mark.usefixtures("impatient")
async def test_a_settle_is_tried_until_it_is_in(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        async with clerk.hold(ann.order(tokens=10)) as held:
            under_way(held, "ok")
            came(held, closing(2, 5))
            with locked(config):
                with pytest.raises(Refusal) as refused:
                    await held.settle()
                assert refused.value.code == "ledger_unavailable"
                assert ann.credits == (0, 100, 10), "nothing is released before it is paid"
                tried, _ = clerk.work
                await asyncio.to_thread(wait_until, lambda: clerk.work[0] > tried + 2, "it is tried again")
            await clerk.caught_up()
        assert ann.credits == (0, 93, 0)
        said = [line.partition(":")[0] for line in clerk.lines]
        assert said[:2] == ["ledger unavailable", "ledger available again"]
        assert said[2:] == [f"the settle of req_{held.order.request_id:016x} is in the ledger now"]
    ann.audit()


async def test_a_settle_that_nobody_awaits_and_that_fails_for_good_is_said_to_have_failed(
    bench: MakeBench, config: Any
) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        for verb in (breaks_a_constraint, adds(1)):
            clerk.submit(verb, must_be_done=f"the settle of {verb.__name__}").cancel()
        await clerk.caught_up()
        (line,) = clerk.lines  # what is done, and nobody waited for, is not worth a line
        assert re.match(r"the settle of breaks_a_constraint FAILED: .*constraint", line)
    assert ann.credits == (0, 100.001, 0)


@pytest.mark.usefixtures("impatient")
async def test_a_settle_that_was_tried_for_long_and_then_fails_for_good_is_said_to_have_failed(
    bench: MakeBench, config: Any
) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        with locked(config), pytest.raises(Refusal) as refused:
            await clerk.submit(breaks_a_constraint, must_be_done="the settle of it")
        assert refused.value.code == "ledger_unavailable"
        await clerk.caught_up()
        said = [line.partition(":")[0] for line in clerk.lines]
        assert said == ["ledger unavailable", "ledger available again", "the settle of it FAILED"]
    assert ann.credits == (0, 100, 0)


@pytest.mark.usefixtures("impatient")
async def test_a_hold_that_cannot_be_written_is_refused_and_not_tried_again(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        with locked(config):
            with pytest.raises(Refusal) as refused:
                await use(clerk.hold(ann.order()))
            assert (refused.value.status, refused.value.code) == (503, "ledger_unavailable")
        await clerk.caught_up()
    assert ann.credits == (0, 100, 0)
    assert ann.db.execute("SELECT count(*) FROM request").fetchone() == (0,)


async def test_closing_waits_for_what_must_be_done(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        await end_without_waiting(clerk.hold(ann.order(tokens=10, estimate=4)))
    assert ann.credits == (0, 96, 0)
    assert ann.audit()["open_requests"] == 0


async def test_opening_settles_what_a_crash_left(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    ann.hold(tokens=10, estimate=4)
    async with at_work(config) as clerk:
        assert ann.credits == (0, 96, 0)
        assert clerk.lines == ["recovered 1 requests that a crash interrupted; `audit` proves the books"]
        assert clerk.next_id() > ann.db.execute("SELECT max(id) FROM request").fetchone()[0]
    ann.audit()


async def test_a_verb_that_raises_fails_its_caller_only(bench: MakeBench, config: Any) -> None:
    ann = bench()
    async with at_work(config) as clerk:
        asked = [clerk.submit(verb) for verb in (adds(1), fails_after_writing, adds(10))]
        first, second, third = await asyncio.gather(*asked, return_exceptions=True)
        assert (first, type(second), third) == (1, ZeroDivisionError, 10)
    assert ann.credits == (0, 0.011, 0)


SLICE = 10


async def test_a_crash_at_any_token_loses_at_most_a_slice(bench: MakeBench, config: Any) -> None:
    """What has been relayed, less what the database knows of it: at every token, however slow the ledger is."""
    ann = bench(paid=1000)
    reader = partial(ann.db.execute, "SELECT count FROM request")
    async with at_work(config) as clerk, clerk.hold(ann.order(tokens=100, slice_tokens=SLICE)) as held:
        under_way(held, "ok")
        lost = []
        for relayed in range(60):
            lost.append(relayed - reader().fetchone()[0])
            await word(held)
    assert max(lost) <= SLICE
    ann.audit()


async def test_a_templates_tokens_serve_the_output_where_no_more_credits_are_to_be_had(
    bench: MakeBench, config: Any
) -> None:
    """The balance pays for 40 tokens, 10 of them are the first slice, 30 the template's."""
    ann = bench(paid=40)
    order = ann.order(tokens=1000, slice_tokens=SLICE, template=64)
    async with at_work(config) as clerk, clerk.hold(order) as held:
        assert ann.credits == (0, 40, 40)
        under_way(held, "insufficient_credits")
        relayed = 0
        while await word(held):
            relayed += 1
        assert relayed == 40
    assert ann.credits == (0, 0, 0)
    ann.audit()


async def test_what_is_not_covered_does_not_go_on_and_costs_nothing(bench: MakeBench, config: Any) -> None:
    """A whole read: either all of it is covered, or none of it is counted."""
    ann = bench(paid=40)
    async with at_work(config) as clerk, clerk.hold(ann.order(tokens=1000, slice_tokens=SLICE)) as held:
        under_way(held, "insufficient_credits")
        assert await word(held)
        assert not await word(held, "word" * 100)
        assert held.meter.count == 1
    assert ann.credits == (0, 39, 0)
    ann.audit()


async def test_past_a_bound_that_is_held_whole_only_what_is_certain_counts(bench: MakeBench, config: Any) -> None:
    """Four bytes a token are an estimate: an answer of eight is honest, and must not be cut before its end."""
    ann = bench(paid=20)
    async with at_work(config) as clerk, clerk.hold(ann.order(tokens=20, slice_tokens=SLICE)) as held:
        under_way(held, "insufficient_credits")
        relayed = 0
        while await word(held, "eight by"):
            relayed += 1
        assert relayed == 20
    ann.audit()


# --------------------------------------------------------------------------------------------------
# What can be counted


async def test_one_request_at_a_time_takes_exactly_two_transactions(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        before = clerk.work
        for _ in range(5):
            await use(clerk.hold(ann.order(tokens=1)), tokens=1)
        assert clerk.work == (before[0] + 10, before[1] + 10)
    assert ann.credits == (0, 95, 0)


async def test_fifty_requests_at_once_take_a_handful_of_transactions(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=100)
    async with at_work(config) as clerk:
        before = clerk.work
        await asyncio.gather(*(use(clerk.hold(ann.order(tokens=1)), tokens=1) for _ in range(50)))
        assert clerk.work[1] - before[1] == 100
        assert clerk.work[0] - before[0] <= 4
    assert ann.credits == (0, 50, 0)


async def test_fifty_verbs_queued_together_take_one_transaction(bench: MakeBench, config: Any) -> None:
    ann = bench()
    async with at_work(config) as clerk:
        before, _ = clerk.work
        await asyncio.gather(*(clerk.submit(adds(1)) for _ in range(50)))
        assert clerk.work[0] - before == 1
    assert ann.credits == (0, 0.05, 0)


@pytest.mark.skipif(POSTGRES, reason="every commit is on the disk there")
async def test_what_somebody_is_told_the_end_of_is_on_the_disk_first(bench: MakeBench, config: Any) -> None:
    """A settle waits for the disk, and so does what shares its transaction; a hold of its own does not."""

    def level(db: Any, now: int) -> int:
        return int(db.execute("PRAGMA synchronous").fetchone()[0])

    ann = bench(paid=100)
    statements: list[str] = []
    async with at_work(config) as clerk:
        await clerk.trace(statements)
        await use(clerk.hold(ann.order(tokens=1)), tokens=1)
        await asyncio.gather(clerk.submit(adds(1), power_proof=False), clerk.submit(adds(1)))
        levels = [await clerk.submit(level, power_proof=waits) for waits in (False, True, False, True)]
    kinds = [s.split()[-1] for s in statements if s.startswith("PRAGMA")]
    assert kinds[:2] == ["NORMAL", "FULL"]
    assert levels == [1, 2, 1, 2]
    assert ann.credits == (0, 99.002, 0)


async def test_a_stream_takes_a_verb_a_slice(bench: MakeBench, config: Any) -> None:
    ann = bench(paid=1000)
    async with at_work(config) as clerk:
        _, before = clerk.work
        await use(clerk.hold(ann.order(tokens=100, slice_tokens=SLICE)), tokens=100)
        assert clerk.work[1] - before <= 2 + 2 * 100 // SLICE
    assert ann.credits == (0, 900, 0)
    ann.audit()
