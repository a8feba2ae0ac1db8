"""The audit: every figure that the books keep, proved from grants and requests in one moment of the database.

It reads only. `audit` in commands.py prints it, the console shows it, and copy_ledger.py asks it of both sides.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import proxy
from extras.queries import LAPSING, Totals
from proxy import REQUEST_ID_BITS, Database, as_credits, iso_time

AMOUNTS = ("grants", "lapsed", "charges", "balances", "held")  # of Totals, in the order in which they are printed

# What a request's row must be by itself; the schema's own constraints say most of it a second time.
FITS = """
    hold = hold_tokens * multiplier AND free_held >= 0 AND free_held <= hold
    AND (multiplier = 0 OR hold_tokens >= 2 * prompt_estimate)
    AND (state = 'open' AND charge IS NULL AND free_charge IS NULL AND resolved_at IS NULL
        OR (state = 'settled' OR state = 'void' AND charge = 0) AND resolved_at IS NOT NULL
        AND charge = (prompt_tokens + completion_tokens) * multiplier AND free_charge >= 0 AND free_charge <= charge)
"""
AUDIT_REQUESTS = f"""
    SELECT account_id, key_id, coalesce(sum(charge), 0), coalesce(sum(free_charge), 0),
        coalesce(sum(hold) FILTER (WHERE state = 'open'), 0),
        coalesce(sum(free_held) FILTER (WHERE state = 'open'), 0), count(*) FILTER (WHERE state = 'open'),
        count(*) FILTER (WHERE charge > hold), coalesce(sum(charge - hold) FILTER (WHERE charge > hold), 0),
        sum(CASE WHEN {FITS} THEN 0 ELSE 1 END),
        max(CASE WHEN resolved_at > id >> {REQUEST_ID_BITS} THEN resolved_at ELSE id >> {REQUEST_ID_BITS} END)
    FROM request GROUP BY key_id, account_id
"""
AUDIT_GRANTS = """
    SELECT account_id, coalesce(sum(amount) FILTER (WHERE kind = 'free'), 0),
        coalesce(sum(amount) FILTER (WHERE kind = 'paid'), 0),
        min(expires_at) FILTER (WHERE kind = 'free'), max(expires_at) FILTER (WHERE kind = 'free')
    FROM credit_grant GROUP BY account_id
"""
AUDIT_ACCOUNTS = f"""
    SELECT a.id, a.name, a.free, a.free_expires_at, a.free_held, a.paid, a.held, a.granted, a.lapsed, a.charged,
        a.open_requests, {LAPSING}
    FROM account a
"""
UNFIT = f"SELECT id FROM request WHERE CASE WHEN {FITS} THEN 0 ELSE 1 END = 1 ORDER BY id LIMIT 10"

# A balance below zero is the doing of each charge above its hold that fell into the life of a request which met or left
# it there: what the one took was what the other had reserved. The purchased credits are added up in the order in which
# they moved.
OVERRUNS = """
    SELECT r.id, a.name, r.model, r.hold, r.charge FROM request r JOIN account a ON a.id = r.account_id
    WHERE r.charge > r.hold
"""
DEBTS = f"""
    WITH moved AS (
        SELECT account_id, created_at AS moment, 0 AS request_id, id AS place, amount FROM credit_grant
        WHERE kind = 'paid'
        UNION ALL
        SELECT account_id, resolved_at, id, id, free_charge - charge FROM request WHERE charge > free_charge
    ), running AS (
        SELECT account_id, request_id, moment,
            sum(amount) OVER (PARTITION BY account_id ORDER BY moment, request_id, place) AS paid
        FROM moved
    ), debt AS MATERIALIZED (
        SELECT account_id, request_id >> {REQUEST_ID_BITS} AS began, moment FROM running
        WHERE paid < 0 AND request_id > 0
    )
    {OVERRUNS} AND EXISTS (
        SELECT 1 FROM debt d
        WHERE d.account_id = r.account_id AND r.resolved_at >= d.began AND r.resolved_at <= d.moment
    )
"""


class Sums(NamedTuple):
    """What the requests of a key, of an account, or all of them, add up to."""

    charge: int = 0
    free_charge: int = 0
    hold: int = 0
    free_held: int = 0
    open: int = 0
    overruns: int = 0
    above_hold: int = 0
    unfit: int = 0
    seen_at: int = 0
    """The latest moment that the rows know: a clock that ran ahead and was put right has lapsed credits honestly."""


def add_up(parts: Collection[Sums]) -> Sums:
    if len(parts) < 2:  # most accounts have one key
        return next(iter(parts), Sums())
    *columns, seen_at = zip(*parts, strict=True)
    return Sums._make([*map(sum, columns), max(seen_at)])


class Grants(NamedTuple):
    """What the grants of an account add up to, and the first and last day of its free ones."""

    free: int = 0
    paid: int = 0
    expires_first: int | None = None
    expires_last: int | None = None


class AuditedAccount(NamedTuple):
    id: int
    name: str
    free: int
    free_expires_at: int | None
    free_held: int
    paid: int
    held: int
    granted: int
    lapsed: int
    charged: int
    open_requests: int
    lapsing: int


class Overrun(NamedTuple):
    """A charge above its hold."""

    request_id: int
    account: str
    model: str
    hold: int
    charge: int

    def described(self) -> dict[str, Any]:
        return {
            "request_id": proxy.request_name(self.request_id),
            "account": self.account,
            "model": self.model,
            "hold": as_credits(self.hold),
            "charge": as_credits(self.charge),
        }


class Audit(NamedTuple):
    """What the books say, and what is wrong with them. `overruns` are those that took a balance below zero, or all."""

    totals: Totals
    overrun_count: int
    overrun_credits: int
    overruns: list[Overrun]
    problems: list[str]

    def described(self) -> dict[str, Any]:
        """As `audit` prints it."""
        return {
            "ok": not self.problems,
            **{name: as_credits(getattr(self.totals, name)) for name in AMOUNTS},
            "open_requests": self.totals.open_requests,
            "overruns": [overrun.described() for overrun in self.overruns],
            "charged_above_hold": {"requests": self.overrun_count, "credits": as_credits(self.overrun_credits)},
            "problems": self.problems,
        }


def prove_books(db: Database, now: int, all_overruns: bool = False) -> Audit:
    """Prove the books of one moment (run it inside `snapshot`): every figure that is kept, from grants and requests,
    free and purchased credits apart; every request by itself; the schema by its text."""
    accounts = [AuditedAccount(*row) for row in db.execute(AUDIT_ACCOUNTS, {"now": now})]
    grants = {account_id: Grants(*row) for account_id, *row in db.execute(AUDIT_GRANTS)}
    of_keys = {(account_id, key_id): Sums(*row) for account_id, key_id, *row in db.execute(AUDIT_REQUESTS)}
    of_accounts: defaultdict[int, list[Sums]] = defaultdict(list)
    for (account_id, _), sums in of_keys.items():
        of_accounts[account_id].append(sums)
    whole = add_up(of_keys.values())

    problems = schema_problems(db)
    for account in accounts:
        requests = add_up(of_accounts.pop(account.id, ()))
        problems += account_problems(account, grants.pop(account.id, Grants()), requests, now)
    problems += key_problems(db, of_keys)
    problems += [f"account {number}: has grants or requests, and does not exist" for number in {*grants, *of_accounts}]
    if whole.unfit:
        unfit = ", ".join(proxy.request_name(number) for (number,) in db.execute(UNFIT))
        problems.append(f"{whole.unfit} requests are not what they must be by themselves, among them: {unfit}")
    listed = OVERRUNS if all_overruns else DEBTS
    overruns = [Overrun(*row) for row in db.execute(f"{listed} ORDER BY r.id")] if whole.overruns else []
    return Audit(totals_of(accounts, whole), whole.overruns, whole.above_hold, overruns, problems)


def totals_of(accounts: Sequence[AuditedAccount], requests: Sums) -> Totals:
    return Totals(
        accounts=len(accounts),
        grants=sum(account.granted for account in accounts),
        lapsed=sum(account.lapsed + account.lapsing for account in accounts),
        charges=requests.charge,
        balances=sum(account.free + account.paid - account.lapsing for account in accounts),
        held=sum(account.held for account in accounts),
        open_requests=requests.open,
    )


def account_problems(account: AuditedAccount, grants: Grants, sums: Sums, now: int) -> Iterator[str]:
    """What an account's row says otherwise than its grants and requests."""
    proofs = {
        "free": (account.free, grants.free - account.lapsed - sums.free_charge),
        "paid": (account.paid, grants.paid - (sums.charge - sums.free_charge)),
        "granted": (account.granted, grants.free + grants.paid),
        "charged": (account.charged, sums.charge),
        "held": (account.held, sums.hold),
        "free_held": (account.free_held, sums.free_held),
    }
    for what, (kept, proved) in proofs.items():
        if kept != proved:
            made = f"{as_credits(proved):,}"
            yield f"account {account.name}: {what} is {as_credits(kept):,}, but its grants and requests make {made}"
    if account.open_requests != sums.open:
        yield f"account {account.name}: open_requests is {account.open_requests}, but {sums.open} are open"
    day = account.free_expires_at
    if not grants.expires_first == grants.expires_last == day:
        yield f"account {account.name}: its free credits lapse at {iso_time(day)}, but by their grant at another time"
    if account.lapsed < 0 or (account.lapsed and (day is None or day > max(now, sums.seen_at))):
        yield f"account {account.name}: {as_credits(account.lapsed):,} credits lapsed that could not yet"


def key_problems(db: Database, of_keys: dict[tuple[int, int], Sums]) -> Iterator[str]:
    """What a key's row says otherwise than its requests, and requests whose key is another account's, or none."""
    for key_id, account_id, spent, held in db.execute("SELECT id, account_id, spent, held FROM api_key ORDER BY id"):
        sums = of_keys.pop((account_id, key_id), Sums())
        for what, kept, proved in (("spent", spent, sums.charge), ("held", held, sums.hold)):
            if kept != proved:
                yield f"key {key_id}: {what} is {as_credits(kept):,}, but its requests make {as_credits(proved):,}"
    for account_id, key_id in of_keys:
        yield f"account {account_id}: has requests of key {key_id}, which is not its own"


def schema_problems(db: Any) -> list[str]:
    """What of the schema is missing, not by its text, or added. PostgreSQL keeps no text to compare."""
    if not isinstance(db, sqlite3.Connection):
        return []
    sql = """
        SELECT sql FROM sqlite_master WHERE sql IS NOT NULL
            AND tbl_name IN ('account', 'api_key', 'credit_grant', 'request')
    """
    found = {in_one_line(text) for (text,) in db.execute(sql)}
    statements = proxy.split_statements(proxy.SCHEMA)
    meant = {in_one_line(text[text.index("CREATE ") :].rstrip(";")) for text in statements}
    return [
        f"the schema's {' '.join(text.split(' ')[1:3]).lower()} {what}"
        for texts, what in ((meant - found, "is missing or was changed"), (found - meant, "is not of this program"))
        for text in sorted(texts)
    ]


def in_one_line(text: str) -> str:
    return " ".join(text.split())
