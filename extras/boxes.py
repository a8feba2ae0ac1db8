"""Several boxes on one PostgreSQL: where the writer's batches run, and who recovers what a lost box left open.

`database: postgresql://…` loads it, as extras/postgres.py. Each box has a row with a counter, which every batch raises,
an empty one every BEAT_SECONDS if there is nothing else to write.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import sqlite3
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import proxy
from extras.postgres import ONE_AT_A_TIME, Connection, connect, is_conflict
from proxy import REQUEST_ID_BITS, Bill, CommandError, Entry, Resolution, Settled

T = TypeVar("T")

BEAT_SECONDS = 5
CUT_OFF_SECONDS = 30  # a box that could not write a beat for this long ends its streams
GONE_SECONDS = 60  # and long after that another recovers them
BOX_BITS, SEQUENCE_BITS = 8, 11  # of a request's id, below the milliseconds; the bit between marks a late charge
LATE = 1 << SEQUENCE_BITS
BATCH_VERBS_MAX = 50  # accounts stay locked for a batch: over a distance a larger one would keep other boxes waiting
TRIES_MAX = 10  # after a deadlock, of which there should be none

BOX_OF = f"(({{}} >> {REQUEST_ID_BITS - BOX_BITS}) & {(1 << BOX_BITS) - 1})"
TAKE_NUMBER = f"""
    INSERT INTO box (number, owner)
    SELECT n, CAST(:owner AS text) FROM generate_series(CAST(0 AS bigint), {(1 << BOX_BITS) - 1}) n
    WHERE NOT EXISTS (SELECT 1 FROM box WHERE number = n AND owner IS NOT NULL)
        AND NOT EXISTS (SELECT 1 FROM request WHERE state = 'open' AND {BOX_OF.format("id")} = n)
        AND NOT EXISTS (SELECT 1 FROM request WHERE id >= :first AND {BOX_OF.format("id")} = n)
    ORDER BY n LIMIT 1
    ON CONFLICT (number) DO UPDATE SET owner = excluded.owner, beat = box.beat + 1 RETURNING number
"""
ORPHANS = f"""
    SELECT r.id, r.account_id, r.prompt_estimate, r.count
    FROM request r LEFT JOIN box b ON b.number = {BOX_OF.format("r.id")}
    WHERE r.state = 'open' AND b.owner IS NULL ORDER BY r.id LIMIT 500
"""


def settle(db: Any, now: int, end: Resolution) -> Settled | None:
    """The core's verb, and what is left of two accidents: a request that was recovered, because its box was taken for
    gone, pays what it owes beyond that in a second row; one whose hold the database has lost is entered again."""
    settled = proxy.settle(db, now, end)
    if settled is not None or end.bill is None or end.order is None:
        return settled
    find = "SELECT outcome, prompt_tokens + completion_tokens FROM request WHERE id = :id"
    known = db.execute(find, {"id": end.request_id}).fetchone()
    late = {"id": end.request_id | LATE} if known else {"id": end.request_id}
    if known and (known[0] != "interrupted" or db.execute(find, late).fetchone()):
        return None
    account_id, key_id = db.execute(
        "UPDATE account SET open_requests = open_requests + 1 FROM api_key k"
        " WHERE account.id = k.account_id AND k.hash = :hash RETURNING account.id, k.id",
        {"hash": end.order.key_hash},
    ).fetchone()
    row = {"request_id": late["id"], "account_id": account_id, "key_id": key_id, "model": end.order.model.name}
    row |= {"multiplier": end.order.multiplier, "prompt_estimate": 0, "tokens": 0, "hold": 0, "free_held": 0}
    db.execute(proxy.INSERT_REQUEST, row)
    if known:
        owed = end.bill.prompt_tokens + end.bill.completion_tokens - known[1]
        end = end._replace(outcome="late", bill=Bill(0, max(0, owed), end.bill.estimated))
    return proxy.settle(db, now, end._replace(request_id=late["id"]))


FIRST_QUESTIONS = (proxy.FIND_CALLER, proxy.FIND_OPEN)


class Asked(Exception):
    """What a verb asks first; nothing else of it was done."""

    def __init__(self, sql: str, parameters: dict[str, Any]) -> None:
        self.key = (sql, tuple(parameters.items()))
        self.parameters = parameters


class Asker:
    def execute(self, sql: str, parameters: Any = {}, /) -> Any:  # noqa: B006
        raise Asked(sql, parameters)


class BoxConnection(Connection):
    """Asks what each verb of a batch asks first as the batch begins: one round trip for all of them.

    The accounts are locked, so the answers stay true until a verb of this batch writes to the same account; a later
    one of that account asks for itself. Where not every verb names its account and begins by reading, none does.
    """

    def __init__(self, url: str) -> None:
        self.ahead: dict[Any, tuple[Any, bytes]] = {}
        self.owners: dict[bytes, int] = {}
        self.touched: set[int] = set()
        super().__init__(url)

    def ask_ahead(self, batch: Sequence[Entry]) -> None:
        self.ahead, self.touched = {}, set()
        asked = [(first_question(entry), entry.whose) for entry in batch]
        if not batch or any(question is None or not isinstance(whose, bytes) for question, whose in asked):
            return
        hashes = [whose for _, whose in asked]
        owners = super().execute("SELECT hash, account_id FROM api_key WHERE hash = ANY (:hashes)", {"hashes": hashes})
        for question, whose in asked:
            if question and whose and question.key not in self.ahead:
                self.ahead[question.key] = (super().execute(question.key[0], question.parameters), whose)
        self.owners = {bytes(key_hash): account_id for key_hash, account_id in owners.fetchall()}

    def execute(self, sql: str, parameters: Any = (), /) -> Any:
        if sql in FIRST_QUESTIONS and self.pipeline is not None:
            answer, whose = self.ahead.get((sql, tuple(parameters.items())), (None, b""))
            account = self.owners.get(whose)
            if account is not None and account not in self.touched:
                self.touched.add(account)
                return answer
        return super().execute(sql, parameters)


def first_question(entry: Entry) -> Asked | None:
    """None for what is no hold, extend or settle."""
    try:
        entry.verb(Asker(), 0)
    except Asked as asked:
        return asked if asked.key[0] in FIRST_QUESTIONS else None
    except Exception:  # it does something else first, and will say so in its turn
        return None
    return None


class PostgresLedger:
    """Where the writer's batches run, as `proxy.SqliteLedger`; and a box among others, each of which recovers the
    requests of those that are gone: those whose counter it has read unchanged for GONE_SECONDS of its own clock, in
    which it could write all beats of its own."""

    sequence_bits = SEQUENCE_BITS
    find_last = "SELECT 0"  # a box takes a number that has no ids ahead of it
    settle = staticmethod(settle)

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.box = 0
        self.seen: dict[int, tuple[int, float]] = {}  # of the other boxes: the counter, and since when it is that
        self.looked = 0.0
        self.alarm_until = 0.0
        self.voids: list[Entry] = []

    async def open(self, config: proxy.Config) -> None:
        self.thread = ThreadPoolExecutor(1, "ledger")
        self.db: Connection = await self.call(partial(connect, config, BoxConnection))
        await self.call(self.take_number)
        self.heart = asyncio.create_task(self.live())

    async def call(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function)

    async def run(self, batch: Sequence[Entry]) -> Sequence[Any]:
        return await self.call(partial(self.run_all, batch))

    async def close(self) -> None:
        self.heart.cancel()
        with contextlib.suppress(sqlite3.Error):
            await self.call(self.say_goodbye)
        self.thread.shutdown(wait=False)

    # -- what follows runs in the thread

    def run_all(self, batch: Sequence[Entry]) -> list[Any]:
        voids, self.voids = self.voids, []
        entries = [*voids, *batch]
        outcomes: list[Any] = []
        while part := entries[len(outcomes) : len(outcomes) + BATCH_VERBS_MAX]:
            is_away = outcomes and self.db.raw.closed and proxy.is_unavailable(outcomes[-1])
            outcomes += [outcomes[-1]] * len(part) if is_away else self.run_part(part)
        self.voids += [void for void, outcome in zip(voids, outcomes, strict=False) if proxy.is_unavailable(outcome)]
        return outcomes[len(voids) :]

    def run_part(self, part: Sequence[Entry]) -> list[Any]:
        """A few verbs' outcomes. What met a lost connection or a deadlock runs again, for as long as SQLite waits for a
        lock; whether a commit went through is never guessed at (see `Connection.commit`)."""
        outcomes: list[Any] = [None] * len(part)
        left = list(range(len(part)))
        give_up = time.monotonic() + proxy.BUSY_SECONDS
        self.db.in_doubt = False
        for _ in range(TRIES_MAX):
            for n, outcome in zip(left, self.attempt([part[n] for n in left]), strict=True):
                outcomes[n] = outcome
            left = [n for n in left if proxy.is_unavailable(outcomes[n])]
            is_late = time.monotonic() >= give_up and not all(is_conflict(outcomes[n]) for n in left)
            if not left or is_late or self.db.in_doubt:
                break
            time.sleep(proxy.BUSY_SECONDS / TRIES_MAX)
        if self.db.in_doubt:  # a hold that is refused now may be there all the same
            for order in (getattr(part[n].verb, "keywords", {}).get("order") for n in left):
                if order is not None:
                    end = Resolution(order.request_id, "ledger_unavailable", None, None)
                    self.voids.append(Entry(partial(proxy.settle, end=end), whose=order.key_hash))
        return outcomes

    def attempt(self, part: Sequence[Entry]) -> list[Any]:
        try:
            if self.db.box is None:
                self.take_number()
        except sqlite3.Error as error:
            return [error] * len(part)
        beaten = self.db.beaten
        outcomes = proxy.run_batch(self.db, part)
        if self.db.beaten - beaten > CUT_OFF_SECONDS or self.db.box is None:
            self.alarm_until = time.monotonic() + 1
        return outcomes

    def take_number(self) -> None:
        """The lowest that no box has, none of whose requests is open, and none of whose ids is ahead of this clock."""
        owner = f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {secrets.token_hex(8)}"
        first = proxy.now_ms() << REQUEST_ID_BITS
        with proxy.transaction(self.db):
            self.db.execute(ONE_AT_A_TIME)
            row = self.db.execute(TAKE_NUMBER, {"owner": owner, "first": first}).fetchone()
            if row is None:
                raise CommandError("all numbers of boxes are taken")
        self.box, self.db.box, self.db.beaten = row[0], {"number": row[0], "owner": owner}, time.monotonic()

    def say_goodbye(self) -> None:
        if self.db.box:
            self.db.execute("UPDATE box SET owner = NULL WHERE number = :number AND owner = :owner", self.db.box)
        self.db.close()

    # -- the boxes

    @property
    def is_cut_off(self) -> bool:
        """Whether streams must end: other boxes take this one for gone soon, or have."""
        now = time.monotonic()
        return now - self.db.beaten > CUT_OFF_SECONDS or now < self.alarm_until

    async def live(self) -> None:
        """Beat, also where there is nothing to write, and look at the others."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            (outcome,) = await self.run([Entry(self.look)])
            if isinstance(outcome, Exception):
                self.seen = {}  # whoever cannot write knows nothing of the others
            elif outcome:
                self.say(f"recovered {outcome} requests of a box that is gone; `audit` proves the books")

    def look(self, db: Any, now: int) -> int:
        """Take boxes for gone, and recover what they left open; how many requests that were."""
        clock, before = time.monotonic(), self.seen if time.monotonic() - self.looked < 3 * BEAT_SECONDS else {}
        rows = db.execute("SELECT number, beat FROM box WHERE owner IS NOT NULL AND number <> :box", {"box": self.box})
        counters = dict(rows.fetchall())
        self.looked, self.seen = clock, {}
        for number, beat in counters.items():
            self.seen[number] = before[number] if before.get(number, (None,))[0] == beat else (beat, clock)
            if clock - self.seen[number][1] >= GONE_SECONDS:
                gone = "UPDATE box SET owner = NULL WHERE number = :number AND beat = :beat"
                db.execute(gone, {"number": number, "beat": beat})
        orphans = db.execute(ORPHANS).fetchall()
        lock = "SELECT id FROM account WHERE id = ANY (:ids) ORDER BY id FOR NO KEY UPDATE"
        db.execute(lock, {"ids": [row[1] for row in orphans]})
        ends = [Resolution(row[0], "interrupted", None, Bill(row[2], row[3], True)) for row in orphans]
        return sum(proxy.settle(db, now, end) is not None for end in ends)

    recover = look
