"""A database with a history: is the proxy as fast with a million rows as with none?

The rows are the proxy's own. A proxy is started, an account makes ten real requests and the proxy is stopped; then the
account is copied with everything that belongs to it, under new ids and new key hashes, until there are as many as asked
for. Grants, charges and balances add up in every copy, so `audit` still proves the books.
"""

import hashlib
import random
import sqlite3
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.contestants import Contestant
from tests.bench.measure import NOT_STREAMED, Tools, take_turns
from tests.bench.proxies import Proxy, account_in

ROWS_AN_ACCOUNT = 10
KEYS_IN_TURN = 1000
ACCOUNT_TABLES = ("api_key", "credit_grant", "request")


def key_of_copy(number: int) -> str:
    """The API key of a copied account."""
    return f"sk-{number:043d}"


def copy_rows(db: sqlite3.Connection, table: str, owner: int, copies: int) -> None:
    """Copy all of an account's rows in a table, oldest copy first, since that is how a history grows."""
    owner_column = "id" if table == "account" else "account_id"
    lowest, highest, rows = db.execute(
        f"SELECT min(id), max(id), count(*) FROM {table} WHERE {owner_column} = ?", (owner,)
    ).fetchone()
    if not rows:
        return
    # A request's id holds its time: its copies go back from the original. Other ids count upwards, without gaps.
    new_id = f"id - ({copies} + 1 - i) * {highest - lowest + 1}" if table == "request" else f"id + i * {rows}"
    changed = {"id": new_id, "account_id": "account_id + i", "key_id": "key_id + i", "name": "name || '-' || i"}
    changed |= {"hash": "hash_of_copy(i)"}
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    values = ", ".join(changed.get(column, column) for column in columns)
    db.execute(
        f"WITH RECURSIVE copy (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM copy WHERE i < {copies}) "
        f"INSERT INTO {table} ({', '.join(columns)}) SELECT {values} "
        f"FROM copy CROSS JOIN {table} WHERE {owner_column} = {owner} ORDER BY i"
    )


def copy_account(database: Path, account: str, copies: int) -> None:
    """Copy an account and what belongs to it so many times, in one transaction."""
    with closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.create_function("hash_of_copy", 1, lambda i: hashlib.sha256(key_of_copy(i).encode()).digest())
        db.execute("PRAGMA synchronous = OFF")
        db.execute("BEGIN IMMEDIATE")
        (owner,) = db.execute("SELECT id FROM account WHERE name = ?", (account,)).fetchone()
        for table in ("account", *ACCOUNT_TABLES):
            copy_rows(db, table, owner, copies)
        db.execute("COMMIT")
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def requests_of(database: Path) -> int:
    """How many requests a database holds."""
    with closing(sqlite3.connect(database)) as db:
        return int(db.execute("SELECT count(*) FROM request").fetchone()[0])


def fill(proxy: Proxy, upstream_port: int, directory: Path, accounts: int) -> str:
    """Leave a database with a history in a directory; returns the key of the account that was copied."""
    directory.mkdir()
    with proxy.start(upstream_port, directory) as first:
        while requests_of(directory / "proxy.db") < ROWS_AN_ACCOUNT:
            if not first.answers():
                raise RuntimeError("the proxy refused a request of the history")
    copy_account(directory / "proxy.db", account_in(directory), accounts - 1)
    return first.key


@dataclass
class Flatness:
    """CPU in µs a request on an empty database and on a full one, with one key and with many by turns."""

    accounts: int
    rows: int
    fill_seconds: float
    started_seconds: tuple[float, float]  # empty, full
    empty_us: list[float]
    full_us: list[float]
    full_many_keys_us: list[float]
    audit: str


def requests_by_turns(contestant: Contestant, accounts: int) -> list[bytes]:
    """The same request under many keys, chosen at random but the same in every run."""
    numbers = random.Random(1).sample(range(1, accounts), min(KEYS_IN_TURN, accounts - 1))
    return [replace(contestant, key=key_of_copy(number)).request(NOT_STREAMED) for number in numbers]


def flatness(proxy: Proxy, tools: Tools, upstream_port: int, accounts: int, rounds: int, seconds: float) -> Flatness:
    """Load a proxy with an empty database and one with a history in turn, as `request_cpu` does."""
    begin = time.monotonic()
    key = fill(proxy, upstream_port, tools.directory / "full", accounts)
    fill_seconds = time.monotonic() - begin
    (tools.directory / "empty").mkdir()
    found: dict[str, list[float]] = {"empty": [], "full": [], "full-many-keys": []}
    with (
        proxy.start(upstream_port, tools.directory / "empty") as empty,
        proxy.start(upstream_port, tools.directory / "full", key) as full,
    ):
        started = (empty.started_seconds, full.started_seconds)
        loads = [
            (replace(empty, name="empty"), [empty.request(NOT_STREAMED)]),
            (replace(full, name="full"), [full.request(NOT_STREAMED)]),
            (replace(full, name="full-many-keys"), requests_by_turns(full, accounts)),
        ]
        for _ in range(rounds):
            windows = take_turns(tools, loads, seconds, connections=50)
            for name, window in windows.items():
                found[name].append(window.cpu_us("requests"))
    begin = time.monotonic()
    audit_verdict = proxy.verdict_of_audit(tools.directory / "full")
    return Flatness(
        accounts,
        requests_of(tools.directory / "full" / "proxy.db"),
        fill_seconds,
        started,
        found["empty"],
        found["full"],
        found["full-many-keys"],
        f"{audit_verdict} in {time.monotonic() - begin:.1f} s",
    )
