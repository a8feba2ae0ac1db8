"""`python proxy.py copy-ledger FROM TO`: move a SQLite ledger, all of it, into an empty PostgreSQL.

The server must be stopped: its lock is taken meanwhile. All is one transaction, and `audit` must find the same on both
sides before it is committed; FROM is only read. A target counts as empty where nobody has used more than an `owner`.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import proxy
from extras.audit import prove_books
from extras.queries import snapshot
from proxy import CommandError, Config

UNUSED = {"account": "name <> 'owner'", "api_key": "last_used_at IS NOT NULL", "credit_grant": "kind <> 'free'"}
IDENTITY = "SELECT setval(pg_get_serial_sequence('{table}', 'id'), (SELECT max(id) FROM {table}))"


def copy_ledger(config: Config, source: str, target: str) -> list[str]:
    """Lines that say what was copied; CommandError if it was not, and then nothing was."""
    path, url = Path(source).resolve(), replace(config, database=target)
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file; FROM is a SQLite ledger such as proxy.db")
    if not url.is_postgres:
        raise CommandError("TO is a URL such as postgresql://proxy@localhost/proxy")
    with (
        proxy.own_database(path),
        contextlib.closing(proxy.connect(replace(config, database=str(path)))) as here,
        contextlib.closing(proxy.connect(url)) as there,
    ):
        counts = there.guard(lambda: copy_all(here, there))
    return [*(f"{table}: {count:,} rows" for table, count in counts.items()), "audit finds the same on both sides"]


def copy_all(here: Any, there: Any) -> dict[str, int]:
    """How many rows each table has. psycopg's own transaction: COPY does not go with a pipeline."""
    with there.raw.transaction(), snapshot(here) as now:
        tables = dict(objects(here, "table"))
        for table, sql in tables.items():
            if not exists(there, table):
                for statement in (sql, *(text for _, text in objects(here, "index", "trigger", of=table))):
                    there.execute(statement)
            check_unused(there, table)
        if there.execute("SELECT 1 FROM box WHERE owner IS NOT NULL").fetchone():
            raise CommandError("a proxy runs on TO, or was killed a moment ago; stop it first")
        there.execute(f"TRUNCATE {', '.join(tables)}")
        counts = {table: copy_table(here, there, table) for table in tables}
        found = [prove_books(db, now).described() for db in (here, there)]
        if found[0] != found[1]:
            raise CommandError(f"nothing was copied: audit finds {found[0]} here, and there {found[1]}")
    return counts


def objects(db: Any, *kinds: str, of: str | None = None) -> list[tuple[str, str]]:
    """Name and text of what a SQLite database has, in the order in which it was made."""
    sql = "SELECT type, tbl_name, name, sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT LIKE 'sqlite~_%'"
    rows = db.execute(f"{sql} ESCAPE '~' ORDER BY rowid").fetchall()
    return [(name, text) for kind, table, name, text in rows if kind in kinds and of in (None, table)]


def exists(there: Any, table: str) -> bool:
    return bool(there.execute("SELECT to_regclass(:name) IS NOT NULL", {"name": table}).fetchone()[0])


def check_unused(there: Any, table: str) -> None:
    where = UNUSED.get(table, "1 = 1")
    if there.execute(f"SELECT 1 FROM {table} WHERE {where} LIMIT 1").fetchone():
        raise CommandError(f"TO is not empty: its table {table} is in use")


def copy_table(here: Any, there: Any, table: str) -> int:
    rows = here.execute(f"SELECT * FROM {table}")
    columns = [column[0] for column in rows.description]
    count = 0
    with there.raw.cursor() as cursor, cursor.copy(f"COPY {table} ({', '.join(columns)}) FROM STDIN") as copy:
        for count, row in enumerate(rows, start=1):  # noqa: B007
            copy.write_row(row)
    if "id" in columns:
        there.execute(IDENTITY.format(table=table)).fetchone()
    return count
