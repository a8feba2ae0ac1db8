"""Brings a ledger of version 1 to version 2, for `serve`, which has the database to itself.

Version 1 knew neither what of a charge was free, nor what an open request reserved of the free credits, nor what a key
spent. All of it follows from what it did know, so that every balance stays what it was and `audit` proves the rest.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

from proxy import REQUEST_ID_BITS, SCHEMA, SCHEMA_VERSION, CommandError, split_statements

TABLES = ("account", "api_key", "credit_grant", "request")

# What an account spent of its free credits is what it got of them, less what lapsed and what is left. It is given to
# its requests in their order until it is used up. What is left is given to the holds that keep it from lapsing.
COPY_REQUESTS = f"""
    INSERT INTO request (id, account_id, key_id, model, multiplier, prompt_estimate, hold_tokens, hold, free_held,
        count, state, upstream, outcome, prompt_tokens, completion_tokens, estimated, charge, free_charge, resolved_at)
    WITH free_grant AS (
        SELECT account_id, sum(amount) AS amount FROM old_credit_grant WHERE kind = 'free' GROUP BY account_id
    ), owed AS (
        SELECT r.*, a.free, coalesce(g.amount, 0) - a.lapsed - a.free AS free_spent,
            CASE WHEN r.state = 'open' AND r.id < coalesce(a.free_expires_at, 0) << {REQUEST_ID_BITS}
                THEN r.hold ELSE 0 END AS reserved
        FROM old_request r JOIN old_account a ON a.id = r.account_id LEFT JOIN free_grant g ON g.account_id = a.id
    ), in_order AS (
        SELECT *, sum(coalesce(charge, 0)) OVER earlier - coalesce(charge, 0) AS charged_before,
            sum(reserved) OVER earlier - reserved AS reserved_before
        FROM owed WINDOW earlier AS (PARTITION BY account_id ORDER BY id)
    )
    SELECT id, account_id, key_id, model, multiplier, prompt_estimate,
        CASE WHEN multiplier > 0 THEN hold / multiplier ELSE 2 * prompt_estimate END, hold,
        max(0, min(reserved, free - reserved_before)), count,
        state, upstream, outcome, prompt_tokens, completion_tokens, estimated, charge,
        CASE WHEN charge IS NOT NULL THEN max(0, min(charge, free_spent - charged_before)) END, resolved_at
    FROM in_order ORDER BY id
"""
COPY_ACCOUNTS = """
    INSERT INTO account (id, name, tier, status, created_at, free, free_expires_at, free_held, paid, held, granted,
        lapsed, charged, open_requests, minute, minute_requests)
    SELECT id, name, tier, status, created_at, free, free_expires_at, coalesce(r.free_held, 0), paid, held, granted,
        lapsed, charged, open_requests, minute, minute_requests
    FROM old_account a LEFT JOIN (
        SELECT account_id, sum(free_held) AS free_held FROM request WHERE state = 'open' GROUP BY account_id
    ) r ON r.account_id = a.id
"""
COPY_KEYS = """
    INSERT INTO api_key (id, account_id, hash, hint, label, created_at, last_used_at, revoked_at, spent, held)
    SELECT k.id, k.account_id, k.hash, k.hint, k.label, k.created_at, k.last_used_at, k.revoked_at,
        coalesce(r.charges, 0), coalesce(r.holds, 0)
    FROM old_api_key k LEFT JOIN (
        SELECT key_id, sum(charge) AS charges, sum(hold) FILTER (WHERE state = 'open') AS holds
        FROM old_request GROUP BY key_id
    ) r ON r.key_id = k.id
"""
COPY_GRANTS = """
    INSERT INTO credit_grant (id, account_id, kind, amount, ref, note, created_at, expires_at)
    SELECT g.id, g.account_id, g.kind, g.amount, g.ref, g.note, g.created_at,
        CASE WHEN g.kind = 'free' THEN a.free_expires_at END
    FROM old_credit_grant g LEFT JOIN old_account a ON a.id = g.account_id
"""


def migrate(path: Path) -> str | None:
    """Bring the ledger at `path` to this version, in one transaction after a copy; the line that says so.

    None where there is nothing to do. CommandError if it cannot be done: then the ledger is as it was.
    """
    if not path.exists() or path.stat().st_size == 0:
        return None
    with contextlib.closing(sqlite3.connect(path, isolation_level=None, timeout=30)) as db:
        if db.execute("PRAGMA user_version").fetchone() != (1,):
            return None
        db.execute("PRAGMA foreign_keys = OFF")
        copy = None
        try:
            db.execute("BEGIN IMMEDIATE")  # what a command of the old program would write now is in both, or in neither
            copy = back_up(path)
            replace_tables(db)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
            db.execute("COMMIT")
        except (OSError, sqlite3.Error) as error:
            if copy is not None:
                copy.unlink(missing_ok=True)  # the ledger is as it was
            raise CommandError(f"{path}: cannot be brought to version {SCHEMA_VERSION}: {error}") from None
    return f"{path} was brought from version 1 to {SCHEMA_VERSION}; what it was is in {copy}"


def back_up(path: Path) -> Path:
    """A copy beside the database, which only its owner may read where only the owner may read that."""
    copy = Path(f"{path}.v1-backup")
    half = Path(f"{copy}.half")
    half.unlink(missing_ok=True)
    os.close(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    with contextlib.closing(sqlite3.connect(path)) as source, contextlib.closing(sqlite3.connect(half)) as target:
        source.backup(target)
    shutil.copymode(path, half)
    number = 1
    while copy.exists():
        number += 1
        copy = Path(f"{path}.v1-backup-{number}")
    return half.rename(copy)


def replace_tables(db: sqlite3.Connection) -> None:
    """The tables of version 2 by their very text, filled from those of version 1, which go. Triggers and indexes go
    first and are made last: none keeps a row from being copied."""
    placed = """
        SELECT type, name FROM sqlite_master WHERE type IN ('trigger', 'index') AND sql IS NOT NULL
            AND tbl_name IN ('account', 'api_key', 'credit_grant', 'request')
    """
    for kind, name in db.execute(placed).fetchall():
        db.execute(f'DROP {kind} "{name}"')
    for table in TABLES:
        db.execute(f"ALTER TABLE {table} RENAME TO old_{table}")
    statements = list(split_statements(SCHEMA))
    for statement in statements:
        if "CREATE TABLE" in statement:
            db.execute(statement)
    for copy in (COPY_REQUESTS, COPY_ACCOUNTS, COPY_KEYS, COPY_GRANTS):
        db.execute(copy)
    for table in TABLES:
        (old,) = db.execute(f"SELECT count(*) FROM old_{table}").fetchone()
        (new,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()
        if old != new:
            raise sqlite3.IntegrityError(f"{old - new} rows of {table} belong to no account")
    for table in reversed(TABLES):
        db.execute(f"DROP TABLE old_{table}")
    for statement in statements:
        if "CREATE TABLE" not in statement:
            db.execute(statement)
