"""Clocks that were wrong, second servers, and books that somebody edited (issue 11, items 6 to 8)."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.answers import Answers
from tests.support.attackers import BareProxy, Clock, bare_proxy, free_port
from tests.support.books import assert_books, milli
from tests.support.client import QUESTION_ESTIMATE
from tests.support.commands import CommandServer, run_program
from tests.support.misbehaviours import StallsMidStream
from tests.support.process import Account, RunningProxy

pytestmark = pytest.mark.long

MakeProxy = Callable[..., RunningProxy]
FREE_100 = {"free_credits": {"amount": 100, "days": 30}}
MONTH = 30 * 86400 * 1000


def sql(database: Path, *statements: str) -> None:
    """Edit the books behind the proxy's back, with every constraint out of the way."""
    connection = sqlite3.connect(database, isolation_level=None)
    try:
        connection.execute("PRAGMA ignore_check_constraints = ON")
        connection.execute("PRAGMA writable_schema = ON")
        for statement in statements:
            connection.execute(statement)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()


def edit_rows(database: Path, *statements: str) -> None:
    """Edit rows that triggers guard: the triggers are gone meanwhile, and afterwards exactly as they were."""
    triggers = schema_of(database, "trigger")
    drops = [f"DROP TRIGGER {name}" for name in triggers]
    sql(database, *drops, *statements, *triggers.values())
    assert schema_of(database, "trigger") == triggers


def schema_of(database: Path, kind: str) -> dict[str, str]:
    query = "SELECT name, sql FROM sqlite_master WHERE type = ? AND sql IS NOT NULL"
    connection = sqlite3.connect(database)
    try:
        return dict(connection.execute(query, (kind,)).fetchall())
    finally:
        connection.close()


# -- 6. The machine's clock


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


def use_from_the_future(proxy: RunningProxy, clock: Clock) -> None:
    """Somebody made a request while the clock was 60 days ahead; then it was put right."""
    early = proxy.add_account(50, name="early")
    clock.set(days=60)
    assert proxy.client(early.key).chat().status == 200
    clock.set(days=0)


def assert_books_by(clock: Clock, proxy: RunningProxy, account: Account, credits: float) -> None:
    """`assert_books`, by the clock of the machine that the proxy runs on."""
    shown = clock.command(proxy, "account", "show", account.name)
    assert (shown["credits"], shown["held"]) == (credits, 0), shown
    audit = clock.command(proxy, "audit")
    assert audit["ok"] is True, audit
    assert milli(audit["grants"]) - milli(audit["lapsed"]) - milli(audit["charges"]) == milli(audit["balances"]), audit
    assert (audit["held"], audit["open_requests"]) == (0, 0), audit


def test_free_credits_under_a_stream_do_not_lapse_after_the_clock_ran_ahead_and_was_put_right(
    running_proxy: MakeProxy, clock: Clock
) -> None:
    script = Answers(tokens=20, pause_after=5)
    proxy = running_proxy(options=FREE_100, behaviour=Answers(), environment=clock.environment)
    use_from_the_future(proxy, clock)
    account = proxy.add_account(0)
    client = proxy.client(account.key)
    proxy.upstream.behaviour = script
    with client.stream_chat(max_tokens=20) as stream:
        script.reached.wait()
        clock.set(days=31)
        proxy.upstream.behaviour = Answers()
        assert client.chat().status == 402, "what is not held has lapsed"
        script.resume.set()
        answer = stream.finish()
    assert (answer.words, answer.clean) == (20, True)
    assert client.balance == 0, "the stream was paid for by what it had reserved; the rest lapsed"
    assert_books_by(clock, proxy, account, credits=0)


def test_a_stream_that_the_clock_is_put_back_under_is_paid_for_by_what_it_reserved(
    running_proxy: MakeProxy, clock: Clock
) -> None:
    script = Answers(tokens=20, pause_after=5)
    clock.set(days=29)
    proxy = running_proxy(options=FREE_100, behaviour=script, environment=clock.environment)
    account = proxy.add_account(0)
    client = proxy.client(account.key)
    with client.stream_chat(max_tokens=20) as stream:
        script.reached.wait()
        clock.set(days=-1)
        assert client.balance == 100
        script.resume.set()
        assert stream.finish().clean
    assert client.balance == 75
    assert_books_by(clock, proxy, account, credits=75)


def test_requests_after_the_clock_was_put_right_are_served_charged_and_listed(
    running_proxy: MakeProxy, clock: Clock
) -> None:
    limits = {"tiers": {"unlimited": {"requests_per_minute": 3, "parallel": 1}}}
    proxy = running_proxy(options={**FREE_100, **limits}, environment=clock.environment)
    use_from_the_future(proxy, clock)
    account = proxy.add_account(0)
    for _ in range(3):
        assert proxy.client(account.key).chat().status == 200
    assert sum(row["requests"] for row in proxy.command("usage", account.name)) == 3
    assert_books_by(clock, proxy, account, credits=100 - 3 * 8)


def test_a_crash_while_the_clock_is_ahead_settles_by_what_was_reserved(running_proxy: MakeProxy, clock: Clock) -> None:
    proxy = running_proxy(options=FREE_100, environment=clock.environment)
    use_from_the_future(proxy, clock)
    account = proxy.add_account(0)
    proxy.upstream.behaviour = StallsMidStream(tokens=2)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b"word", times=2)
        proxy.kill()
    clock.set(days=31)
    proxy.start()
    assert proxy.client(account.key).balance == 0, "E was paid for by what was reserved; the rest lapsed"
    assert_books_by(clock, proxy, account, credits=0)


# -- 7. One server owns a database


@pytest.fixture
def second_config(tmp_path: Path) -> Callable[[RunningProxy, str], Path]:
    """A config in a folder of its own whose database is another name of the proxy's."""

    def write(proxy: RunningProxy, link: str) -> Path:
        folder = tmp_path / "second"
        folder.mkdir()
        shutil.copy(proxy.folder / "models.yaml", folder)
        name = folder / "books.db"
        if link == "a hard link":
            os.link(proxy.database, name)
        elif link == "a symlink":
            name.symlink_to(proxy.database)
        else:
            (folder / "there").symlink_to(proxy.folder, target_is_directory=True)
            name = folder / "there" / "proxy.db"
        options = yaml.safe_load(proxy.config.read_text())
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump({**options, "database": str(name), "listen": f"127.0.0.1:{free_port()}"}))
        return config

    return write


@pytest.mark.parametrize("link", ["a hard link", "a symlink", "a path through a linked folder"])
def test_a_second_server_on_another_name_of_the_database_does_not_start(
    running_proxy: MakeProxy, second_config: Any, link: str
) -> None:
    script = Answers(tokens=20, pause_after=5)
    proxy = running_proxy(behaviour=script)
    account = proxy.add_account(100)
    with proxy.client(account.key).stream_chat() as stream:
        script.reached.wait()
        config = second_config(proxy, link)
        port = int(yaml.safe_load(config.read_text())["listen"].split(":")[1])
        with bare_proxy(config, port) as second:
            assert_does_not_start(second)
        assert proxy.account(account.name)["held"] > 0, "a live request was taken for a crash's"
        script.resume.set()
        assert stream.finish().clean
    assert_books(proxy, account, credits=100 - 25)


def assert_does_not_start(second: BareProxy) -> None:
    assert second.wait_until_up_or_over() is False, "the second server serves the same books"
    assert second.process.returncode not in (None, 0)


# -- 8. Books that somebody edited


@pytest.fixture(scope="module")
def used_books(module_proxy: MakeProxy) -> Path:
    """The folder of a proxy that was used and killed: free and paid credits, charges on both, an overrun, an open
    request."""
    proxy = module_proxy(options=FREE_100)
    for name in ("ann", "ben"):
        account = proxy.add_account(5000, name=name)
        client = proxy.client(account.key)
        for tokens in (10, 150):
            proxy.upstream.behaviour = Answers(tokens=tokens, prompt_tokens=8)
            assert client.chat(max_tokens=tokens).status == 200
    proxy.add_account(500, name="new")
    proxy.command("credit", "add", "ben", 70, "--ref", "r-1")
    proxy.upstream.behaviour = Answers(prompt_tokens=800, tokens=5)
    assert client.chat(max_tokens=5).status == 200, "an overrun"
    proxy.upstream.behaviour = StallsMidStream(tokens=2)
    with client.stream_chat() as stream:
        stream.read_until(b"word", times=2)
        proxy.kill()
    sql(proxy.database)  # the write-ahead log into the file
    return proxy.folder


@pytest.fixture
def books(used_books: Path, tmp_path: Path) -> Path:
    """A copy for one test; returns the path of the config."""
    for name in ("config.yaml", "models.yaml", "proxy.db"):
        shutil.copy(used_books / name, tmp_path / name)
    return tmp_path / "config.yaml"


def audit_of(commands: CommandServer, config: Path) -> Any:
    done = commands.run("--config", str(config), "audit", "--json")
    assert "Traceback" not in done.stderr, done.stderr
    return done


def assert_audit_fails(commands: CommandServer, config: Path) -> None:
    done = audit_of(commands, config)
    assert (done.returncode, '"ok":false' in done.stdout.replace(" ", "")) == (1, True), done.stdout + done.stderr


def test_books_that_nobody_edited_pass(commands: CommandServer, books: Path) -> None:
    done = audit_of(commands, books)
    assert (done.returncode, '"ok":true' in done.stdout.replace(" ", "")) == (0, True), done.stdout + done.stderr
    edit_rows(books.parent / "proxy.db")
    assert audit_of(commands, books).returncode == 0, "triggers dropped and made again as they were"


NEW, BEN = "WHERE name = 'new'", "WHERE name = 'ben'"
LAST = "WHERE id = (SELECT max(id) FROM request WHERE state = 'settled')"
OPEN = "WHERE state = 'open'"
EDITS = {
    "lapsed is invented": f"UPDATE account SET lapsed = 50000, free = free - 50000 {NEW}",
    "lapsed is invented from paid": f"UPDATE account SET lapsed = 50000, paid = paid - 50000 {BEN}",
    "lapsed is negative": f"UPDATE account SET lapsed = -50000, free = free + 50000 {NEW}",
    "lapsed is negative, paid": f"UPDATE account SET lapsed = -50000, paid = paid + 50000 {BEN}",
    "free becomes paid": f"UPDATE account SET free = free - 50000, paid = paid + 50000 {NEW}",
    "paid becomes free": f"UPDATE account SET free = free + 50000, paid = paid - 50000 {NEW}",
    "paid becomes free again": f"UPDATE account SET free = free + 50000, paid = paid - 50000 {BEN}",
    "free is below zero": f"UPDATE account SET free = free - 200000, paid = paid + 200000 {NEW}",
    "free credits live longer": f"UPDATE account SET free_expires_at = free_expires_at + {MONTH} {NEW}",
    "free credits live a second longer": f"UPDATE account SET free_expires_at = free_expires_at + 1000 {NEW}",
    "free credits die sooner": f"UPDATE account SET free_expires_at = free_expires_at - {MONTH} {NEW}",
    "free credits live for ever": f"UPDATE account SET free_expires_at = NULL {NEW}",
    "a hold is larger": f"UPDATE request SET hold = hold + 1000 {OPEN}",
    "a hold is smaller": f"UPDATE request SET hold = hold - 1000 {OPEN}",
    "what is held is larger": f"UPDATE account SET held = held + 1000 {BEN}",
    "what is held is less than nothing": f"UPDATE account SET held = -1000 {NEW}",
    "an overrun is hidden": f"UPDATE request SET hold = charge + 1000 {LAST}",
    "a hold is negative": f"UPDATE request SET hold = -1000 {LAST}",
    "a charge is smaller": f"UPDATE request SET charge = charge - 1000 {LAST}",
    "a charge and its tokens are smaller": "UPDATE request SET charge = charge - multiplier, "
    f"completion_tokens = completion_tokens - 1 {LAST}",
    "a charge is refunded": f"UPDATE account SET charged = charged - 1000, paid = paid + 1000 {BEN}",
    "credits appear": f"UPDATE account SET granted = granted + 1000, paid = paid + 1000 {BEN}",
    "credits appear in the balance": f"UPDATE account SET paid = paid + 1000 {BEN}",
    "a grant is larger": "UPDATE credit_grant SET amount = amount + 1000 WHERE ref = 'r-1'",
    "a grant is paid that was free": "UPDATE credit_grant SET kind = 'paid' WHERE kind = 'free' AND id = 1",
    "a grant is another account's": "UPDATE credit_grant SET account_id = 1 WHERE ref = 'r-1'",
    "a grant is gone": "DELETE FROM credit_grant WHERE ref = 'r-1'",
    "a request is gone": f"DELETE FROM request {LAST}",
    "a request is another account's": f"UPDATE request SET account_id = 1 {LAST}",
    "a settled request is void": f"UPDATE request SET state = 'void', charge = 0 {LAST}",
}


@pytest.mark.parametrize("edit", EDITS)
def test_audit_finds_that(commands: CommandServer, books: Path, edit: str) -> None:
    edit_rows(books.parent / "proxy.db", EDITS[edit])
    assert_audit_fails(commands, books)


def test_audit_finds_any_trigger_that_is_gone_or_does_nothing(commands: CommandServer, books: Path) -> None:
    database = books.parent / "proxy.db"
    triggers = schema_of(database, "trigger")
    assert triggers
    for name, text in triggers.items():
        for statements in ([], [text[: text.index("BEGIN")] + "BEGIN SELECT 1; END"]):
            sql(database, f"DROP TRIGGER {name}", *statements)
            assert_audit_fails(commands, books)
            sql(database, *([f"DROP TRIGGER {name}"] if statements else []), text)
    assert audit_of(commands, books).returncode == 0


SCHEMA_EDITS = {
    "a trigger that was not there": "CREATE TRIGGER gift AFTER UPDATE ON account BEGIN SELECT 1; END",
    "no check of free": "UPDATE sqlite_master SET sql = replace(sql, 'CHECK (free >= 0)', '') WHERE name = 'account'",
    "no check of held": "UPDATE sqlite_master SET sql = replace(sql, ' CHECK (held >= free_held)', '') "
    "WHERE name = 'account'",
}


@pytest.mark.parametrize("edit", SCHEMA_EDITS)
def test_audit_finds_a_schema_that_is_not_its_own(commands: CommandServer, books: Path, edit: str) -> None:
    database = books.parent / "proxy.db"
    before = schema_of(database, "table"), schema_of(database, "trigger")
    sql(database, SCHEMA_EDITS[edit])
    assert (schema_of(database, "table"), schema_of(database, "trigger")) != before, "the edit did something"
    assert_audit_fails(commands, books)


def test_an_audit_that_fails_says_which_account_and_exits_with_1(books: Path) -> None:
    edit_rows(books.parent / "proxy.db", EDITS["lapsed is invented"])
    done = run_program(books, "audit")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "new" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_a_crash_with_honest_books_passes_the_audit_after_the_next_start(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(options=FREE_100, behaviour=StallsMidStream(tokens=2))
    account = proxy.add_account(0)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b"word", times=2)
        proxy.kill()
    proxy.start()
    assert_books(proxy, account, credits=100 - QUESTION_ESTIMATE)
