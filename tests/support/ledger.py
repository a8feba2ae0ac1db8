"""The ledger of a running proxy, looked at and hindered from outside, whichever database it is on."""

import contextlib
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.support.commands import REPOSITORY
from tests.support.postgres import connected

# Boxes live faster in tests: an hour of waiting for what takes 75 s would prove no more.
WHEN_ALONE = {"BEAT_SECONDS": 0.1, "GONE_SECONDS": 0.5}
BOX = """
import sys
sys.path[0] = {repository!r}
sys.argv[0] = "proxy.py"
import extras.boxes
for name, seconds in {seconds!r}.items():
    setattr(extras.boxes, name, seconds)
import proxy
now_ms = proxy.now_ms
proxy.now_ms = lambda: now_ms() + {ahead_ms}
sys.exit(proxy.main())
"""


def box_program(seconds: Mapping[str, float], ahead_ms: int = 0) -> list[str]:
    """proxy.py on PostgreSQL, with other limits for its box, and a clock that is ahead."""
    values = {"repository": str(REPOSITORY), "seconds": dict(seconds), "ahead_ms": ahead_ms}
    return [sys.executable, "-c", BOX.format(**values)]


class Ledger:
    def __init__(self, config: Path) -> None:
        self.config = config

    @property
    def address(self) -> str:
        return str(yaml.safe_load(self.config.read_text())["database"])

    @property
    def is_postgres(self) -> bool:
        return self.address.startswith("postgres")

    def query(self, sql: str) -> list[tuple[Any, ...]]:
        """Rows of a SELECT that is the same for both."""
        if self.is_postgres:
            with connected(self.address) as db:
                return list(db.execute(sql).fetchall())
        with contextlib.closing(sqlite3.connect(self.config.parent / self.address)) as db:
            return db.execute(sql).fetchall()

    def is_recovered(self) -> bool:
        """One box is left, and nothing is open."""
        alive = "SELECT count(*) FROM box WHERE owner IS NOT NULL"
        opened = "SELECT count(*) FROM request WHERE state = 'open'"
        return self.query(f"SELECT ({alive}), ({opened})") == [(1, 0)]

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Somebody else writes to the database and does not come to an end."""
        if self.is_postgres:
            with connected(self.address) as db, db.transaction():
                db.execute("LOCK TABLE box, account IN EXCLUSIVE MODE")
                yield
            return
        with contextlib.closing(sqlite3.connect(self.config.parent / self.address, isolation_level=None)) as db:
            db.execute("BEGIN IMMEDIATE")
            yield


def request_name(request_id: int) -> str:
    """As answers and logs have it."""
    return f"req_{request_id:016x}"


def request_id(name: str) -> int:
    found = re.fullmatch(r"req_([0-9a-f]{16})", name)
    assert found, name
    return int(found[1], 16)
