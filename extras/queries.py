"""What people ask of the ledger, one statement for one figure: commands and the console show the same numbers.

Every function takes a database of sqlite3's shape, SQLite or PostgreSQL, and binds by name only. What writes checks
first, raises CommandError with a sentence, and must run inside `proxy.transaction` or as a verb of the ledger's writer.
Times are milliseconds since 1970, days those of UTC, credits thousandths.
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import proxy
from proxy import (
    REQUEST_ID_BITS,
    Catalog,
    CommandError,
    Config,
    Database,
    Tier,
    as_credits,
    iso_time,
)

DAY_MS = 86_400_000
NAMES_MAX = 10_000  # that are looked through for a hint
NAME_MAX = 100  # characters of an account's name


@contextlib.contextmanager
def snapshot(db: Any) -> Iterator[int]:
    """One moment of the database, which nobody waits for; its time."""
    now: int = db.begin([proxy.Entry(lambda db, now: None, writes=False, power_proof=False)])
    try:
        yield now
    finally:
        db.execute("ROLLBACK")


def nearest(name: str, names: Iterable[str], cutoff: float = 0.6) -> str:
    """How a sentence about a name that does not exist ends, if there is one like it."""
    near = difflib.get_close_matches(name[:NAME_MAX], list(names), 1, cutoff)
    return f'; did you mean "{near[0]}"?' if near else ""


# ---- Accounts -------------------------------------------------------------------------------------------------------

# Free credits that lapse now: past their day, those that no open request reserves. `proxy.lapsing` is the same rule.
LAPSING = "CASE WHEN a.free > a.free_held AND a.free_expires_at <= :now THEN a.free - a.free_held ELSE 0 END"

ACCOUNT_NOW = f"""
    SELECT a.id, a.name, a.tier, a.status, a.created_at, a.free - {LAPSING}, a.free_expires_at, a.paid, a.held,
        (SELECT count(*) FROM api_key k WHERE k.account_id = a.id AND k.revoked_at IS NULL)
    FROM account a
"""


class Account(NamedTuple):
    """An account as it stands now: `free` is without what has lapsed, `keys` counts those that are not revoked."""

    id: int
    name: str
    tier: str
    status: str
    created_at: int
    free: int
    free_expires_at: int | None
    paid: int
    held: int
    keys: int

    @property
    def credits(self) -> int:
        return self.free + self.paid

    @property
    def removable(self) -> int:
        """Purchased credits that no open request holds: all that a correction may take."""
        unheld = self.credits - self.held
        return max(0, self.paid if self.paid < unheld else unheld)

    def described(self) -> dict[str, Any]:
        """As `account show` and `account list` print it."""
        return {
            "account": self.name,
            "tier": self.tier,
            "status": self.status,
            "credits": as_credits(self.credits),
            "free": as_credits(self.free),
            "free_expires_at": iso_time(self.free_expires_at) if self.free else None,
            "paid": as_credits(self.paid),
            "held": as_credits(self.held),
            "keys": self.keys,
        }


def list_accounts(db: Database, now: int, search: str = "", limit: int | None = None, skip: int = 0) -> list[Account]:
    """By name; `search` is a part of it, without case."""
    where, page = "", ""
    values: dict[str, Any] = {"now": now}
    if search:
        escaped = "".join(f"!{c}" if c in "!%_" else c for c in search)
        where = "WHERE a.name LIKE :part ESCAPE '!' OR lower(a.name) LIKE :lower ESCAPE '!'"
        values |= {"part": f"%{escaped}%", "lower": f"%{escaped.lower()}%"}
    if limit is not None:
        page = "LIMIT :most OFFSET :skip"
        values |= {"most": limit, "skip": skip}
    return [Account(*row) for row in db.execute(f"{ACCOUNT_NOW} {where} ORDER BY a.name {page}", values)]


def account_of(db: Database, now: int, account_id: int) -> Account | None:
    row = db.execute(f"{ACCOUNT_NOW} WHERE a.id = :id", {"now": now, "id": account_id}).fetchone()
    return Account(*row) if row else None


def find_account(db: Database, now: int, name: str) -> Account:
    """CommandError names the nearest account if there is none of that name."""
    row = db.execute(f"{ACCOUNT_NOW} WHERE a.name = :name", {"now": now, "name": name}).fetchone()
    if row is None:
        names = [other for (other,) in db.execute("SELECT name FROM account LIMIT :most", {"most": NAMES_MAX})]
        raise CommandError(f'there is no account "{name}"{nearest(name, names)}')
    return Account(*row)


def lock_account(db: Database, now: int, account: Account) -> Account:
    """The account as it stands while nobody else can change it: on PostgreSQL other writers wait for its row."""
    db.execute("UPDATE account SET tier = tier WHERE id = :id", {"id": account.id})
    locked = account_of(db, now, account.id)
    assert locked is not None
    return locked


def name_taken(db: Database, name: str) -> str | None:
    """The account that has this name, whatever the case of its letters."""
    folded = name.casefold()
    return next((other for (other,) in db.execute("SELECT name FROM account") if other.casefold() == folded), None)


def check_tier(config: Config, tier: str) -> str:
    if tier in config.tiers:
        return tier
    hint = nearest(tier, config.tiers) or ";"
    raise CommandError(f'there is no account tier "{tier}"{hint} expected one of: {", ".join(config.tiers)}')


def set_tier(db: Database, config: Config, account_id: int, tier: str) -> None:
    """It counts from the account's next request."""
    values = {"id": account_id, "tier": check_tier(config, tier)}
    db.execute("UPDATE account SET tier = :tier WHERE id = :id", values)


def set_status(db: Database, account_id: int, status: str) -> None:
    """`active` or `suspended`; it counts from the account's next request."""
    db.execute("UPDATE account SET status = :status WHERE id = :id", {"id": account_id, "status": status})


# ---- Keys -----------------------------------------------------------------------------------------------------------

KEYS_OF = """
    SELECT id, label, hint, created_at, last_used_at, revoked_at, credit_limit, spent, held, expires_at, models
    FROM api_key WHERE account_id = :account_id ORDER BY id
"""


class Key(NamedTuple):
    """A key as its owner may see it. Expired at `expires_at`, the end of its last day."""

    id: int
    label: str | None
    hint: str
    created_at: int
    last_used_at: int | None
    revoked_at: int | None
    credit_limit: int | None
    spent: int
    held: int
    expires_at: int | None
    models: str | None

    def described(self) -> dict[str, Any]:
        """As `key list` prints it."""
        return {
            "key_id": self.id,
            "label": self.label,
            "hint": self.hint,
            "created_at": iso_time(self.created_at),
            "last_used_at": iso_time(self.last_used_at),
            "revoked_at": iso_time(self.revoked_at),
            "credit_limit": None if self.credit_limit is None else as_credits(self.credit_limit),
            "spent": as_credits(self.spent),
            "expires_at": iso_time(self.expires_at),
            "models": None if self.models is None else self.models.split(" "),
        }


def keys_of(db: Database, account_id: int) -> list[Key]:
    return [Key(*row) for row in db.execute(KEYS_OF, {"account_id": account_id})]


def models_of_key(catalog: Catalog, names: Iterable[str]) -> str | None:
    """Ids or aliases as the key's row has them: ids between single spaces. None, for every model, if there are none."""
    ids: dict[str, None] = {}
    for name in filter(None, (name.strip() for name in names)):
        if name not in catalog.names:
            raise CommandError(f'there is no model "{name}"{nearest(name, catalog.names, 0.5)}')
        ids[catalog.names[name]] = None
    return " ".join(ids) or None


def end_of_day(now: int, day: datetime.date) -> int:
    """When a key expires whose last day this is; CommandError if that is over, or has no day after it."""
    if day.year == datetime.MAXYEAR:
        raise CommandError(f"the last day of a key must be before the year {day.year}")
    end = (proxy.unix_day(day) + 86_400) * 1000
    if end <= now:
        raise CommandError(f"the last day of a key must not be over, and {day} is")
    return end


def add_key(
    db: Database,
    now: int,
    account: Account,
    limits: Tier,
    label: str | None = None,
    credit_limit: int | None = None,
    expires_at: int | None = None,
    models: str | None = None,
) -> tuple[str, int]:
    """A new key, which nobody can read again, and its id; CommandError if the account's tier gives no more."""
    account = lock_account(db, now, account)
    if limits.keys is not None and account.keys >= limits.keys:
        keys = f"{limits.keys} key{'s' if limits.keys > 1 else ''}"
        raise CommandError(f"the account tier {account.tier} has {keys} an account; revoke one first")
    if credit_limit is not None and credit_limit < 0:
        raise CommandError("a key's credit limit must not be negative")
    return proxy.create_key(
        db, now, account.id, label=label, credit_limit=credit_limit, expires_at=expires_at, models=models
    )


def revoke_key(db: Database, now: int, key_id: int, account_id: int | None = None) -> int:
    """End a key, of this account if one is named; since when it is revoked. CommandError if there is no such key."""
    values = {"id": key_id, "account_id": account_id, "now": now}
    owned = "" if account_id is None else "AND account_id = :account_id"
    sql = f"UPDATE api_key SET revoked_at = coalesce(revoked_at, :now) WHERE id = :id {owned} RETURNING revoked_at"
    row = db.execute(sql, values).fetchone()
    if row is None:
        raise CommandError(f"there is no key {key_id}; `key list ACCOUNT` shows the ids")
    return int(row[0])


# ---- Grants ---------------------------------------------------------------------------------------------------------

GRANT_PAID = "UPDATE account SET paid = paid + :amount, granted = granted + :amount WHERE id = :id"


class Grant(NamedTuple):
    id: int
    kind: str
    amount: int
    ref: str | None
    note: str | None
    created_at: int
    expires_at: int | None


def grant_paid(
    db: Database, now: int, account: Account, amount: int, ref: str | None = None, note: str | None = None
) -> bool:
    """Add purchased credits; below zero corrects, as far as no request uses them. The same ref twice adds once: False.
    CommandError if the ref stands for another account or amount."""
    account = lock_account(db, now, account)
    if ref is not None:
        sql = "SELECT account_id, amount FROM credit_grant WHERE ref = :ref"
        if known := db.execute(sql, {"ref": ref}).fetchone():
            if tuple(known) == (account.id, amount):
                return False
            raise CommandError(f'the reference "{ref}" stands for another account or amount already')
    if amount == 0:
        raise CommandError("the amount must not be zero")
    if -amount > account.removable:
        most = f"{as_credits(account.removable):,}"
        raise CommandError(f"{account.name} has {most} purchased credits that are not in use; take that or less")
    row = {"account_id": account.id, "kind": "paid", "amount": amount, "ref": ref, "note": note}
    proxy.insert(db, "credit_grant", **row, created_at=now)
    db.execute(GRANT_PAID, {"id": account.id, "amount": amount})
    return True


def grants_page(db: Database, account_id: int, page: int = 1, per_page: int = 20) -> tuple[int, list[Grant]]:
    """How many an account has, and those of a page, the newest first."""
    values = {"account_id": account_id, "most": per_page, "skip": (page - 1) * per_page}
    (total,) = db.execute("SELECT count(*) FROM credit_grant WHERE account_id = :account_id", values).fetchone()
    sql = """
        SELECT id, kind, amount, ref, note, created_at, expires_at FROM credit_grant
        WHERE account_id = :account_id ORDER BY id DESC LIMIT :most OFFSET :skip
    """
    return total, [Grant(*row) for row in db.execute(sql, values)]


# ---- Usage ----------------------------------------------------------------------------------------------------------


class Use(NamedTuple):
    """Resolved requests of one UTC day and model, and of one key where that was asked for."""

    day: str
    model: str
    key_id: int | None
    requests: int
    prompt_tokens: int
    completion_tokens: int
    charge: int


class Request(NamedTuple):
    """A request's row. One that is open has no charge yet."""

    id: int
    account: str
    key_id: int
    key_hint: str
    model: str
    state: str
    outcome: str | None
    upstream: str | None
    prompt_tokens: int | None
    completion_tokens: int | None
    estimated: int | None
    hold: int
    charge: int | None
    first_byte_ms: int | None
    resolved_at: int | None

    @property
    def name(self) -> str:
        return proxy.request_name(self.id)

    @property
    def began_at(self) -> int:
        return self.id >> REQUEST_ID_BITS

    @property
    def total_ms(self) -> int | None:
        return None if self.resolved_at is None else max(0, self.resolved_at - self.began_at)


class DeprecatedUse(NamedTuple):
    """An account that called a deprecated model."""

    model: str
    sunset: datetime.date
    replacement: str | None
    account: str
    requests: int
    last_at: int


def which(**filters: int | None) -> tuple[str, dict[str, int]]:
    """What stands behind WHERE for the filters that are given, and their values."""
    clauses = {"since": "r.id >= :since", "before": "r.id < :before", "account_id": "r.account_id = :account_id"}
    given = {name: value for name, value in filters.items() if value is not None}
    return " AND ".join(["1 = 1", *(clauses[name] for name in given)]), given


def first_id(ms: int) -> int:
    """No request that began at `ms` or later has an id below this."""
    return max(0, ms) << REQUEST_ID_BITS


def days_ago(now: int, days: int) -> int:
    """The beginning of the first of `days` UTC days, of which today is the last."""
    return max(0, (now // DAY_MS - days + 1) * DAY_MS)


def usage(db: Database, since: int, account_id: int | None = None, by_key: bool = False) -> list[Use]:
    """What was used since, by day and model, and by key; requests that are under way are not in it yet."""
    where, values = which(since=first_id(since), account_id=account_id)
    columns = f"(r.id >> {REQUEST_ID_BITS}) / {DAY_MS}, r.model, " + ("r.key_id" if by_key else "NULL")
    groups = "1, 2, 3" if by_key else "1, 2"
    sql = f"""
        SELECT {columns}, count(*), coalesce(sum(r.prompt_tokens), 0), coalesce(sum(r.completion_tokens), 0),
            coalesce(sum(r.charge), 0)
        FROM request r WHERE {where} AND r.state <> 'open' GROUP BY {groups} ORDER BY {groups}
    """
    return [Use(iso_day(day), *row) for day, *row in db.execute(sql, values)]


def iso_day(day: int) -> str:
    """A day counted from 1970 as people write it."""
    return str(datetime.date(1970, 1, 1) + datetime.timedelta(days=day))


def requests_page(
    db: Database, account_id: int | None = None, before: int | None = None, limit: int = 50
) -> list[Request]:
    """The newest first; `before` is the id that ended the page before."""
    where, values = which(before=before, account_id=account_id)
    sql = f"""
        SELECT r.id, a.name, r.key_id, k.hint, r.model, r.state, r.outcome, r.upstream, r.prompt_tokens,
            r.completion_tokens, r.estimated, r.hold, r.charge, r.first_byte_ms, r.resolved_at
        FROM request r JOIN account a ON a.id = r.account_id JOIN api_key k ON k.id = r.key_id
        WHERE {where} ORDER BY r.id DESC LIMIT :most
    """
    return [Request(*row) for row in db.execute(sql, {**values, "most": limit})]


def deprecated_uses(
    db: Database, catalog: Catalog, now: int, since: int, account_id: int | None = None
) -> list[DeprecatedUse]:
    """Who called a deprecated model since; one account's if it is named."""
    deprecated = {name: found for name, model in catalog.models.items() if (found := model.deprecation(now / 1000))}
    if not deprecated:
        return []
    names = {f"model{number}": name for number, name in enumerate(deprecated)}
    where, values = which(since=first_id(since), account_id=account_id)
    sql = f"""
        SELECT r.model, a.name, count(*), max(r.id) FROM request r JOIN account a ON a.id = r.account_id
        WHERE {where} AND r.model IN ({", ".join(f":{name}" for name in names)})
        GROUP BY r.model, a.name ORDER BY r.model, a.name
    """
    return [
        DeprecatedUse(
            name, deprecated[name].sunset, deprecated[name].replacement, account, count, last_id >> REQUEST_ID_BITS
        )
        for name, account, count, last_id in db.execute(sql, {**values, **names})
    ]


# ---- Totals ---------------------------------------------------------------------------------------------------------


class Totals(NamedTuple):
    """The sums over all accounts, what has lapsed by now taken off."""

    accounts: int
    grants: int
    lapsed: int
    charges: int
    balances: int
    held: int
    open_requests: int


def totals(db: Database, now: int) -> Totals:
    sql = f"""
        SELECT count(*), coalesce(sum(a.granted), 0), coalesce(sum(a.lapsed + {LAPSING}), 0),
            coalesce(sum(a.charged), 0), coalesce(sum(a.free + a.paid - {LAPSING}), 0), coalesce(sum(a.held), 0),
            coalesce(sum(a.open_requests), 0)
        FROM account a
    """
    return Totals(*db.execute(sql, {"now": now}).fetchone())
