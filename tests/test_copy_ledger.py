"""copy-ledger moves all of a SQLite ledger into an empty PostgreSQL, or nothing."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.books import assert_audit
from tests.support.commands import run_program
from tests.support.files import write_yaml
from tests.support.ledger import Ledger, box_program
from tests.support.postgres import PostgresServer, the_server
from tests.support.process import RunningProxy

MakeProxy = Callable[..., RunningProxy]
TABLES = ("account", "api_key", "credit_grant", "request")


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    yield the_server()


def on(proxy: RunningProxy, database: str) -> None:
    """Change the line in config.yaml."""
    config = proxy.config.read_text().splitlines()
    write_yaml(proxy.config, "\n".join(f"database: {database}" if "database:" in line else line for line in config))


def test_a_ledger_goes_on_where_it_was(running_proxy: MakeProxy, server: PostgresServer) -> None:
    proxy = running_proxy(options={"database": "old.db"})
    account = proxy.add_account(1000)
    for stream in (False, True):
        assert proxy.client(account.key).chat(stream=stream).status == 200
    url = server.new_database()
    running = run_program(proxy.config, "copy-ledger", "old.db", url)
    assert running.returncode == 1 and str(proxy.process.pid) in running.stderr
    proxy.terminate()
    before = [proxy.ledger.query(f"SELECT * FROM {table} ORDER BY id") for table in TABLES]
    copied = run_program(proxy.config, "copy-ledger", "old.db", url)
    assert copied.returncode == 0, copied.stderr
    on(proxy, url)
    assert [proxy.ledger.query(f"SELECT * FROM {table} ORDER BY id") for table in TABLES] == before
    proxy.program = box_program({})
    proxy.start()
    assert proxy.client(account.key).chat().status == 200
    assert proxy.client(account.key).balance == 1000 - 3 * 8
    assert proxy.add_account(5).credits == 5
    assert_audit(proxy)
    proxy.terminate()
    again = run_program(proxy.config, "copy-ledger", "old.db", url)
    assert again.returncode == 1 and "not empty" in again.stderr


def test_an_unused_owner_counts_as_empty(running_proxy: MakeProxy, server: PostgresServer) -> None:
    old = running_proxy(options={"database": "old.db"})
    account = old.add_account(1000)
    old.terminate()
    new = running_proxy(options={"database": server.new_database()}, box=box_program({}))
    url = Ledger(new.config).address
    refused = run_program(old.config, "copy-ledger", "old.db", url)
    assert refused.returncode == 1 and "a proxy runs on TO" in refused.stderr
    new.terminate()
    assert run_program(old.config, "copy-ledger", "old.db", url).returncode == 0
    new.start()
    assert new.client(account.key).chat().status == 200
    assert_audit(new)
