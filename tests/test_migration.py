"""A ledger of the version before becomes one of this version: nobody's balance moves, and the books still add up."""

import json
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

import proxy
from extras.migration import migrate
from tests.support.commands import run_program
from tests.support.files import MODELS, OPTIONS, write_files

VERSION_1 = Path(__file__).parent / "data" / "version1.db"  # version1.md says how it was made
BALANCES = "SELECT id, name, tier, status, free, free_expires_at, paid, held, granted, lapsed, charged FROM account"
REQUESTS = "SELECT id, account_id, key_id, model, multiplier, hold, state, outcome, charge, resolved_at FROM request"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Both files beside a ledger of version 1."""
    shutil.copy(VERSION_1, tmp_path / "proxy.db")
    return write_files(tmp_path, {**OPTIONS, "upstreams": {"echo": {"builtin": "echo"}}}, MODELS)


@pytest.fixture
def ledger(config: Path) -> Path:
    return config.parent / "proxy.db"


def rows(database: Path, sql: str) -> list[Any]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(sql).fetchall()
    finally:
        connection.close()


def audit(config: Path) -> dict[str, Any]:
    done = run_program(config, "audit", "--json", "--overruns")
    assert done.returncode == 0, done.stdout + done.stderr
    value: dict[str, Any] = json.loads(done.stdout)
    return value


def test_a_migration_leaves_every_balance_and_request_as_it_was(config: Path, ledger: Path) -> None:
    before = [rows(ledger, sql) for sql in (BALANCES, REQUESTS)]
    assert migrate(ledger)
    assert [rows(ledger, sql) for sql in (BALANCES, REQUESTS)] == before
    found = audit(config)
    assert (found["grants"], found["charges"], found["held"], found["open_requests"]) == (1237.5, 562, 105, 3)
    assert [overrun["account"] for overrun in found["overruns"]] == ["over"]


def test_a_migration_tells_free_credits_from_purchased_ones(config: Path, ledger: Path) -> None:
    migrate(ledger)
    spent = """
        SELECT a.name, sum(r.free_charge), sum(r.charge) FROM request r JOIN account a ON a.id = r.account_id
        WHERE r.charge > 0 GROUP BY a.name ORDER BY a.name
    """
    assert rows(ledger, spent) == [("ann", 100_000, 282_000), ("lapse", 20_000, 30_000), ("over", 100_000, 250_000)]
    held = "SELECT name, free_held FROM account WHERE free_held > 0 ORDER BY name"
    assert rows(ledger, held) == [("held", 35_000), ("open", 70_000)]
    keys = "SELECT label, spent FROM api_key k JOIN account a ON a.id = k.account_id WHERE a.name = 'ann' ORDER BY k.id"
    assert rows(ledger, keys) == [(None, 182_000), ("second", 100_000)]


def test_a_migrated_schema_is_that_of_a_new_database(config: Path, ledger: Path, tmp_path: Path) -> None:
    migrate(ledger)
    proxy.connect(replace(proxy.load_config(config), database="new.db")).close()
    schema = "SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name"
    assert rows(ledger, schema) == rows(tmp_path / "new.db", schema)
    assert rows(ledger, "PRAGMA user_version") == [(proxy.SCHEMA_VERSION,)]
    assert rows(ledger, "PRAGMA foreign_key_check") == []


def test_a_migration_keeps_a_copy_and_happens_once(ledger: Path) -> None:
    before = rows(ledger, BALANCES)
    line = migrate(ledger)
    copies = list(ledger.parent.glob("proxy.db.v1-backup*"))
    assert len(copies) == 1 and line is not None and str(copies[0]) in line
    assert (rows(copies[0], BALANCES), rows(copies[0], "PRAGMA user_version")) == (before, [(1,)])
    assert migrate(ledger) is None
    assert list(ledger.parent.glob("proxy.db.v1-backup*")) == copies


def test_a_second_migration_of_an_older_copy_keeps_the_first_backup(ledger: Path) -> None:
    migrate(ledger)
    shutil.copy(VERSION_1, ledger)
    migrate(ledger)
    assert len(list(ledger.parent.glob("proxy.db.v1-backup*"))) == 2


def test_what_a_crash_left_open_is_settled_after_a_migration(config: Path, ledger: Path) -> None:
    migrate(ledger)
    db = proxy.connect(proxy.load_config(config))
    with proxy.transaction(db) as now:
        assert proxy.recover(db, now) == 3
    db.close()
    found = audit(config)
    assert (found["held"], found["open_requests"]) == (0, 0)


def test_a_ledger_that_does_not_fit_stays_as_it_was(ledger: Path) -> None:
    connection = sqlite3.connect(ledger)
    connection.execute("UPDATE request SET hold = hold + 1 WHERE state = 'open'")
    connection.commit()
    connection.close()
    before = rows(ledger, "SELECT * FROM sqlite_master"), rows(ledger, REQUESTS)
    with pytest.raises(proxy.CommandError, match=r"proxy\.db: cannot be brought to version 2"):
        migrate(ledger)
    assert (rows(ledger, "SELECT * FROM sqlite_master"), rows(ledger, REQUESTS)) == before
    assert rows(ledger, "PRAGMA user_version") == [(1,)]
    assert not list(ledger.parent.glob("proxy.db.v1-backup*"))


@pytest.mark.parametrize("command", [("audit",), ("account", "list"), ("credit", "add", "ann", "5"), ("check",)])
def test_a_command_on_a_ledger_of_version_1_says_who_brings_it_up(
    config: Path, ledger: Path, command: tuple[str, ...]
) -> None:
    before = rows(ledger, BALANCES)
    done = run_program(config, *command)
    assert done.returncode == 1 and "`serve`" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert rows(ledger, BALANCES) == before
