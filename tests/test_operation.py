"""An operator's mistakes, broken standard streams and rude clients: a sentence, never a traceback (issue 11, items 20
to 22)."""

import json
import re
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.attackers import bare_proxy, free_port, pipe_without_reader, program
from tests.support.client import chat_request
from tests.support.commands import PROXY, CommandServer
from tests.support.process import RunningProxy
from tests.support.typed_files import type_files
from tests.support.waiting import WAIT_SECONDS

pytestmark = pytest.mark.long

MakeProxy = Callable[..., RunningProxy]
CHAT = "/v1/chat/completions"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """The config in a folder with both files and nothing else."""
    return type_files(tmp_path)


def listening(home: Path) -> int:
    """Give the config a port that the test knows."""
    port = free_port()
    home.write_text(home.read_text().replace("127.0.0.1:0", f"127.0.0.1:{port}"))
    return port


def assert_is_a_sentence(done: Any, *codes: int) -> None:
    """It failed with an explanation on stderr that a person can read: a few lines, none of Python's."""
    assert done.returncode in codes, (done.returncode, done.stdout, done.stderr)
    assert done.stderr.strip(), done
    for mark in ("Traceback", 'File "', "Error:", "Exception", "object at 0x"):
        assert mark not in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) <= 5, done.stderr


# -- 20. Bodies that say they are compressed and are not


@pytest.fixture(scope="module", params=["text", "json"])
def logging(request: pytest.FixtureRequest, module_proxy: MakeProxy) -> RunningProxy:
    return module_proxy(options={"log": request.param})


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd", "nonsense"])
@pytest.mark.parametrize("keyed", [False, True], ids=["without a key", "with a key"])
def test_a_body_that_is_not_compressed_as_it_says_is_one_line_of_log(
    logging: RunningProxy, encoding: str, keyed: bool
) -> None:
    account = logging.add_account(100)
    client = logging.client(account.key if keyed else None)
    before, body = len(logging.lines), json.dumps(chat_request()).encode()
    for _ in range(5):
        answer = client.post(CHAT, body, {"content-encoding": encoding})
        assert answer.status in ((400, 415, 200) if keyed else (400, 401)), answer.body
    assert logging.client(account.key).chat().status == 200
    marker = logging.client(None).get("/v1/marker").headers["x-request-id"]
    logging.client(account.key).chat(model="marker")
    logging.wait_for_line("marker|model_not_found|" + marker, after=before)
    lines = logging.lines[before:]
    assert len(lines) <= 5 + 3, "\n".join(lines)
    if "log: json" in logging.config.read_text():
        assert all(isinstance(json.loads(line), dict) for line in lines), lines
    logging.assert_well()


# -- 21. Commands

LONG = "1e999999999"
NOT_UTF8 = "\udcff\udcfe"
COMMANDS: dict[str, tuple[str, ...]] = {
    "usage of a million days": ("usage", "--days", "1000000"),
    "usage of no number of days": ("usage", "--days", LONG),
    "an endless amount": ("credit", "add", "ann", LONG),
    "an endless negative amount": ("credit", "add", "ann", f"-{LONG}"),
    "an amount next to nothing": ("credit", "add", "ann", "1e-999999999"),
    "an endless start": ("account", "add", "ben", "--credits", LONG),
    "an amount that is none": ("credit", "add", "ann", "nan"),
    "a key id beyond 64 bits": ("key", "revoke", "9" * 30),
    "days beyond 64 bits": ("usage", "--days", "9" * 30),
}


@pytest.mark.parametrize("mistake", COMMANDS)
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_mistake_in_a_command_is_a_sentence(
    commands: CommandServer, home: Path, mistake: str, form: tuple[str, ...]
) -> None:
    assert commands.run("--config", str(home), "account", "add", "ann").returncode == 0
    done = commands.run("--config", str(home), *COMMANDS[mistake], *form)
    assert_is_a_sentence(done, 1, 2)
    audit = commands.run("--config", str(home), "audit", "--json")
    assert json.loads(audit.stdout)["grants"] == 1000, "the mistake changed something"


NOT_TEXT: list[tuple[str, ...]] = [
    ("account", "add", NOT_UTF8),
    ("account", "show", NOT_UTF8),
    ("account", "tier", "ann", NOT_UTF8),
    ("key", "add", "ann", "--label", NOT_UTF8),
    ("key", "list", NOT_UTF8),
    ("key", "revoke", NOT_UTF8),
    ("credit", "add", "ann", "1", "--ref", NOT_UTF8),
    ("credit", "add", "ann", "1", "--note", NOT_UTF8),
    ("usage", NOT_UTF8),
    (NOT_UTF8,),
]


@pytest.mark.parametrize("arguments", NOT_TEXT, ids=lambda arguments: ascii(arguments[:2]))
def test_an_argument_that_is_no_text_is_a_sentence(
    commands: CommandServer, home: Path, arguments: tuple[str, ...]
) -> None:
    assert commands.run("--config", str(home), "account", "add", "ann").returncode == 0
    assert_is_a_sentence(commands.run("--config", str(home), *arguments), 1, 2)


def test_an_argument_that_is_no_text_is_a_sentence_on_a_real_command_line(home: Path) -> None:
    assert_is_a_sentence(program(home, "account", "add", NOT_UTF8), 1, 2)


@pytest.mark.parametrize(("amount", "credits"), [("-1e2", 1400), ("1e3", 2500), ("-0.5", 1499.5), ("-.5", 1499.5)])
def test_an_amount_may_be_written_as_any_number(
    commands: CommandServer, home: Path, amount: str, credits: float
) -> None:
    """A minus sign makes no option of it."""
    assert commands.run("--config", str(home), "account", "add", "ann", "--credits", "500").returncode == 0
    done = commands.run("--config", str(home), "credit", "add", "ann", amount, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    shown = json.loads(commands.run("--config", str(home), "account", "show", "ann", "--json").stdout)
    assert (shown["credits"], shown["held"]) == (credits, 0)
    assert json.loads(commands.run("--config", str(home), "audit", "--json").stdout)["ok"] is True


def test_a_correction_beyond_what_an_account_has_is_a_sentence(commands: CommandServer, home: Path) -> None:
    assert commands.run("--config", str(home), "account", "add", "ann").returncode == 0
    done = commands.run("--config", str(home), "credit", "add", "ann", "-1e5")
    if done.returncode:
        assert_is_a_sentence(done, 1, 2)
    audit = json.loads(commands.run("--config", str(home), "audit", "--json").stdout)
    assert audit["ok"] is True
    assert audit["grants"] == (1000 if done.returncode else -99_000)


@pytest.mark.parametrize("path", ["/nowhere/\udcff.yaml", "x" * 300, "/dev/null/config.yaml", "config.yaml/x", "/"])
def test_a_path_of_the_config_that_cannot_be_is_a_sentence(commands: CommandServer, path: str) -> None:
    assert_is_a_sentence(commands.run("--config", path, "check"), 1, 2)


# -- 21. Configuration

MISTAKES: dict[str, tuple[str, str]] = {
    "days without end": ("days: 30", "days: 3000000"),
    "days beyond 64 bits": ("days: 30", f"days: {'9' * 30}"),
    "an endless amount": ("amount: 1000", f"amount: {LONG}"),
    "an endless amount in quotes": ("amount: 1000", f'amount: "{LONG}"'),
    "a database with a NUL": ("database: proxy.db", 'database: "proxy\\0.db"'),
    "a database with a long name": ("database: proxy.db", f"database: {'x' * 300}.db"),
    "a database that is a folder": ("database: proxy.db", "database: /"),
    "models with a NUL": ("models: models.yaml", 'models: "models\\0.yaml"'),
    "models with a long name": ("models: models.yaml", f"models: {'x' * 300}.yaml"),
    "models that are a folder": ("models: models.yaml", "models: ."),
    "half of an IPv6 address": ("listen: 127.0.0.1:0", 'listen: "[::1:0"'),
    "a host with a NUL": ("listen: 127.0.0.1:0", 'listen: "a\\0b:0"'),
    "a host with a long label": ("listen: 127.0.0.1:0", f"listen: {'a' * 64}.example:0"),
    "a host with two dots": ("listen: 127.0.0.1:0", "listen: a..b:0"),
    "a host that is nobody's": ("listen: 127.0.0.1:0", "listen: 192.0.2.1:0"),
    "a port with too many digits": ("listen: 127.0.0.1:0", f"listen: 127.0.0.1:{'9' * 30}"),
    "a bool that is none": ("log: text", "log: !!bool xyz"),
    "a timestamp that is none": ("log: text", "log: !!timestamp xyz"),
    "an int that is none": ("max_body_mb: 32", "max_body_mb: !!int xyz"),
    "a float that is none": ("max_body_mb: 32", "max_body_mb: !!float xyz"),
    "a binary that is none": ("log: text", "log: !!binary xyz"),
    "a tag of Python": ("log: text", "log: !!python/object/apply:os.system [ls]"),
    "a set": ("log: text", "log: !!set {a, b}"),
    "a day that is none": ("log: text", "log: 2026-13-45"),
    "an alias to itself": ("log: text", "log: &a [*a]"),
    "bytes that are no text": ("log: text", "log: \udcff"),
    "a body of more than can be": ("max_body_mb: 32", f"max_body_mb: {'9' * 30}"),
}
MODEL_MISTAKES: dict[str, tuple[str, str]] = {
    "an endless multiplier": ("multiplier: 0.5", f'multiplier: "{LONG}"'),
    "a multiplier next to nothing": ("multiplier: 0.5", 'multiplier: "1e-999999999"'),
    "an endless multiplier without quotes": ("multiplier: 0.5", f"multiplier: {LONG}"),
    "a multiplier of many digits": ("multiplier: 0.5", f"multiplier: {'9' * 5000}"),
    "a bool that is none": ("title: Light", "title: !!bool xyz"),
    "a timestamp that is none": ("created: 1700000000", "created: !!timestamp xyz"),
    "a created that is none": ("created: 1700000000", f"created: {'9' * 30}"),
    "a window beyond 64 bits": ("context_window: 4096", f"context_window: {'9' * 30}"),
    "a sunset without end": (
        "created: 1700000000",
        "deprecated: {announced: 2026-01-01, sunset: '99999-01-01', replacement: echo}",
    ),
    "bytes that are no text": ("title: Light", "title: \udcff"),
}


def with_mistake(path: Path, change: tuple[str, str]) -> None:
    text = path.read_text()
    assert change[0] in text
    path.write_bytes(text.replace(*change, 1).encode(errors="surrogateescape"))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_config_yaml_is_a_sentence(commands: CommandServer, home: Path, mistake: str) -> None:
    """What `check` lets pass, the server must be able to start with."""
    with_mistake(home, MISTAKES[mistake])
    done = commands.run("--config", str(home), "check")
    assert "Traceback" not in done.stderr, done.stderr
    if done.returncode == 2:
        assert_is_a_sentence(done, 2)
        assert str(home) in done.stderr or home.name in done.stderr, done.stderr
        return
    try:
        started = program(home, "serve", wait=3)
    except subprocess.TimeoutExpired as running:
        output = (running.stderr or b"") + (running.stdout or b"")
        pytest.fail(f"it serves: {bytes(output).decode(errors='replace')[:500]}")
    assert_is_a_sentence(started, 1, 2)


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistake_in_models_yaml_is_a_sentence(commands: CommandServer, home: Path, mistake: str) -> None:
    with_mistake(home.parent / "models.yaml", MODEL_MISTAKES[mistake])
    done = commands.run("--config", str(home), "check")
    assert_is_a_sentence(done, 2)
    assert "models.yaml" in done.stderr, done.stderr


def test_free_credits_that_live_long_are_served_or_refused_at_the_start(home: Path) -> None:
    port = listening(home)
    with_mistake(home, ("days: 30", "days: 36500"))
    with bare_proxy(home, port, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as proxy:
        if proxy.wait_until_up_or_over():
            added = json.loads(program(home, "account", "add", "ann", "--json").stdout)
            assert proxy.client(added["key"]).get("/api/billing/subscription").status == 200
            assert proxy.client(added["key"]).chat(model="echo").status == 200
            assert proxy.end() == 0
        assert proxy.process.stderr is not None
        assert b"Traceback" not in proxy.process.stderr.read()


# -- 22. Standard streams that are closed, full or gone


def accounts_of(home: Path) -> int:
    return int(books(home)["account"]) if (home.parent / "proxy.db").exists() else 0


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_server_whose_standard_streams_are_closed_serves_and_stops(home: Path, closed: str) -> None:
    """Its account is there already, so no key has to be shown."""
    port = listening(home)
    key = json.loads(program(home, "account", "add", "ann", "--json").stdout)["key"]
    with bare_proxy(home, port, closed) as proxy:
        assert proxy.wait_until_up_or_over(), proxy.process.returncode
        client = proxy.client(key)
        assert client.chat(model="echo", content="one two").status == 200
        assert client.balance < 1000
        assert proxy.end() == 0
    assert json.loads(program(home, "audit", "--json").stdout)["ok"] is True


@pytest.mark.parametrize("stdout", [">/dev/full", ">&-"])
def test_a_first_start_that_cannot_show_its_key_makes_no_account(home: Path, stdout: str) -> None:
    port = listening(home)
    with bare_proxy(home, port, stdout, stderr=subprocess.PIPE) as proxy:
        if proxy.wait_until_up_or_over():
            proxy.end()
        assert proxy.process.returncode in (0, 1, 2)
        assert proxy.process.stderr is not None
        said = proxy.process.stderr.read().decode()
    assert "Traceback" not in said, said
    assert accounts_of(home) == 0
    shown = first_start(home, port)
    assert re.search(r"sk-[\w-]{43}", shown), "the next start shows a key"


def test_a_first_start_whose_reader_is_gone_makes_no_account(home: Path) -> None:
    port = listening(home)
    with (
        pipe_without_reader() as writer,
        bare_proxy(home, port, stdout=writer, stderr=subprocess.PIPE) as proxy,
    ):
        if proxy.wait_until_up_or_over():
            proxy.end()
        assert proxy.process.stderr is not None
        said = proxy.process.stderr.read().decode()
    assert "Traceback" not in said, said
    assert accounts_of(home) == 0


def first_start(home: Path, port: int) -> str:
    """What the first start says."""
    with bare_proxy(home, port, stdout=subprocess.PIPE) as proxy:
        assert proxy.wait_until_up_or_over()
        proxy.end()
        assert proxy.process.stdout is not None
        return str(proxy.process.stdout.read().decode())


MAKERS = {"account add": ("account", "add", "ben"), "key add": ("key", "add", "ann", "--label", "lost")}


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize(("form", "gone"), [(("--json",), False), ((), True)], ids=["full", "reader gone"])
def test_a_key_that_could_not_be_shown_does_not_exist(
    commands: CommandServer, home: Path, maker: str, form: tuple[str, ...], gone: bool
) -> None:
    assert commands.run("--config", str(home), "account", "add", "ann").returncode == 0
    before = books(home)
    if gone:
        with pipe_without_reader() as writer:
            done = program(home, *MAKERS[maker], *form, stdout=writer)
    else:
        done = commands.run("--config", str(home), *MAKERS[maker], *form, stdout=Path("/dev/full"))
    assert_is_a_sentence(done, 1, 2)
    assert books(home) == before


@pytest.mark.parametrize("maker", MAKERS)
def test_a_key_whose_output_is_closed_does_not_exist(commands: CommandServer, home: Path, maker: str) -> None:
    assert commands.run("--config", str(home), "account", "add", "ann").returncode == 0
    before = books(home)
    command = [sys.executable, str(PROXY), "--config", str(home), *MAKERS[maker]]
    line = ["/bin/sh", "-c", 'exec "$0" "$@" >&-', *command]
    done = subprocess.run(line, stderr=subprocess.PIPE, text=True, timeout=WAIT_SECONDS)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr, done.stderr
    assert books(home) == before


def books(home: Path) -> dict[str, Any]:
    """How many accounts, keys and grants there are."""
    connection = sqlite3.connect(home.parent / "proxy.db")
    try:
        tables = ("account", "api_key", "credit_grant")
        return {table: connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in tables}
    finally:
        connection.close()


def test_a_command_whose_output_nobody_reads_has_done_what_it_says(home: Path) -> None:
    """Credits were added, whoever reads that: only a key is worth nothing when it is lost."""
    assert program(home, "account", "add", "ann").returncode == 0
    with pipe_without_reader() as writer:
        done = program(home, "credit", "add", "ann", "5", "--ref", "r-1", stdout=writer)
    assert "Traceback" not in done.stderr, done.stderr
    again = json.loads(program(home, "credit", "add", "ann", "5", "--ref", "r-1", "--json").stdout)
    assert again["credits"] == 1005
