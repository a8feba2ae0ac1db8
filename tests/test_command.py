"""`python proxy.py` as a person at a terminal meets it: the commands, the first minute, start and stop."""

import json
import re
import socket
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books, milli
from tests.support.client import QUESTION
from tests.support.commands import CommandServer, clean_environment, run_program
from tests.support.exchange import Exchange
from tests.support.files import MODELS, OPTIONS, write_files
from tests.support.process import RunningProxy
from tests.support.upstream import FakeUpstream

ECHO = {"echo": {"builtin": "echo"}}
NOBODY = {"base_url": "http://127.0.0.1:1/v1"}
FREE_CREDITS = {"amount": 1000, "days": 30}


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Both files, and no database yet."""
    return write_files(tmp_path, {**OPTIONS, "upstreams": ECHO, "free_credits": FREE_CREDITS}, MODELS)


@pytest.fixture(scope="module")
def fresh(module_proxy: Callable[..., RunningProxy]) -> RunningProxy:
    """A proxy in its first minute: the tests below follow it."""
    return module_proxy(options={"free_credits": FREE_CREDITS})


def keys_in(text: str) -> list[str]:
    return re.findall(r"sk-[A-Za-z0-9_-]{43}", text)


def printed(proxy: RunningProxy, begins: str, goes_on: Callable[[str], bool]) -> str:
    """What a user would mark with the mouse: from the line that begins so, as long as it goes on."""
    lines = list(proxy.stdout_lines)
    start = next(number for number, line in enumerate(lines) if line.strip().startswith(begins))
    end = start + 1
    while end < len(lines) and goes_on("\n".join(lines[start:end])):
        end += 1
    return textwrap.dedent("\n".join(lines[start:end]))


def test_the_first_start_creates_an_owner_and_prints_its_key_once(fresh: RunningProxy) -> None:
    owner = fresh.account("owner")
    assert (owner["tier"], owner["credits"], owner["free"], owner["keys"]) == ("unlimited", 1000, 1000, 1)
    (key,) = set(keys_in(fresh.output))
    assert fresh.client(key).balance == 1000


def test_the_printed_curl_line_works_as_pasted(fresh: RunningProxy) -> None:
    line = printed(fresh, "curl", lambda text: text.rstrip().endswith("\\") or text.count("'") % 2 == 1)
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, (line, done.stderr)
    assert "choices" in done.stdout, (line, done.stdout)
    assert fresh.account("owner")["credits"] < 1000
    assert_audit(fresh)


def test_the_printed_openai_snippet_works_as_pasted(fresh: RunningProxy) -> None:
    code = printed(fresh, "from openai import", lambda text: not text.endswith("\n"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment())
    assert done.returncode == 0, (code, done.stderr)
    assert done.stdout.strip(), code
    assert fresh.account("owner")["credits"] < 1000
    assert_audit(fresh)


def test_a_second_start_prints_no_key_and_creates_nobody(fresh: RunningProxy) -> None:
    lines = len(fresh.lines)
    assert fresh.terminate() == 0
    fresh.start()
    assert not keys_in("\n".join(fresh.lines[lines:]))
    assert [account["account"] for account in fresh.command("account", "list")] == ["owner"]


@pytest.fixture(scope="module")
def patchy(module_proxy: Callable[..., RunningProxy]) -> RunningProxy:
    """A proxy with an upstream that answers, one that does not run, and one whose key is not set."""
    off = {**NOBODY, "api_key": "${NOT_SET_ANYWHERE}"}
    return module_proxy(upstreams={"absent": NOBODY, "off": off}, models={"far": {"tier": "one", "upstream": "absent"}})


def test_start_up_says_of_each_upstream_how_it_is(patchy: RunningProxy) -> None:
    patchy.wait_for_line(r"\babsent\b.*127\.0\.0\.1:1\b|127\.0\.0\.1:1\b.*\babsent\b")
    patchy.wait_for_line(r"\boff\b.*NOT_SET_ANYWHERE")
    patchy.wait_for_line(r"\bmain\b")


def test_serve_is_what_happens_without_a_command(config: Path) -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "proxy.py"), "--config", str(config)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=clean_environment()) as process:
        assert process.stdout is not None
        assert any("listening on http://127.0.0.1:" in line for line in process.stdout)
        process.terminate()
        assert process.wait(20) == 0


# -- accounts, keys, credits


def test_a_new_account_gets_a_key_and_the_free_credits(config: Path, commands: CommandServer) -> None:
    done = run_program(config, "account", "add", "ada", "--credits", "250", "--tier", "two-keys", "--json")
    made = json.loads(done.stdout)
    assert set(made) >= {"account", "tier", "credits", "key", "key_id"}
    assert (made["account"], made["tier"], made["credits"]) == ("ada", "two-keys", 1250)
    assert keys_in(made["key"]) == [made["key"]]
    shown = json.loads(commands.run("--config", str(config), "account", "show", "ada", "--json").stdout)
    assert (shown["free"], shown["paid"], shown["credits"], shown["held"]) == (1000, 250, 1250, 0)
    assert shown["free_expires_at"] and shown["status"] and shown["keys"] == 1


def test_account_list_shows_everybody(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key(credits=12.5)
    (shown,) = [row for row in proxy.command("account", "list") if row["account"] == account.name]
    assert shown == proxy.account(account.name)
    assert milli(shown["credits"]) == 12_500


def test_keys_are_listed_by_hint_and_never_in_full(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key()
    added = proxy.command("key", "add", account.name, "--label", "laptop")
    assert set(added) >= {"account", "key", "key_id", "label"} and added["label"] == "laptop"
    listed = proxy.command("key", "list", account.name)
    assert [set(row) >= {"key_id", "label", "hint", "created_at", "last_used_at", "revoked_at"} for row in listed]
    assert [row["key_id"] for row in listed] == [account.key_id, added["key_id"]]
    assert account.key not in json.dumps(listed) and added["key"] not in json.dumps(listed)


def test_the_same_reference_adds_credits_once(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key(credits=10)
    first = proxy.command("credit", "add", account.name, 40, "--ref", f"bill-{account.name}", "--note", "thanks")
    again = proxy.command("credit", "add", account.name, 40, "--ref", f"bill-{account.name}")
    assert (first["account"], first["amount"], first["credits"], first["added"]) == (
        account.name,
        40,
        50,
        True,
    )
    assert (again["credits"], again["added"]) == (50, False)
    text = proxy.run("credit", "add", account.name, 40, "--ref", f"bill-{account.name}")
    assert text.returncode == 0 and text.stdout.strip()
    assert_books(proxy, account, credits=50)


def test_a_reference_with_another_amount_or_account_is_refused(
    proxy: RunningProxy, funded_key: Callable[..., Any]
) -> None:
    account, other = funded_key(credits=10), funded_key(credits=10)
    proxy.command("credit", "add", account.name, 40, "--ref", f"r-{account.name}")
    for arguments in ((account.name, 41), (other.name, 40)):
        done = proxy.run("credit", "add", *arguments, "--ref", f"r-{account.name}")
        assert (done.returncode, done.stdout) == (1, "") and done.stderr.strip()
    assert_books(proxy, account, credits=50)
    assert_books(proxy, other, credits=10)


def test_a_negative_amount_corrects(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key(credits=10)
    done = proxy.run("credit", "add", account.name, "-2.5", "--note", "a correction")
    assert done.returncode == 0, done.stderr
    assert_books(proxy, account, credits=7.5)


COMMANDS = [
    ["account", "list"],
    ["account", "show", "owner"],
    ["account", "suspend", "owner"],
    ["account", "resume", "owner"],
    ["key", "add", "owner", "--label", "second"],
    ["key", "list", "owner"],
    ["credit", "add", "owner", "5", "--ref", "x", "--note", "y"],
    ["usage"],
    ["usage", "owner", "--days", "7"],
    ["check"],
    ["audit"],
    ["audit", "--overruns"],
    ["account", "tier", "owner", "two-keys"],
    ["account", "add", "bob"],
]


def test_every_command_speaks_text_to_people_and_json_to_programs(fresh: RunningProxy) -> None:
    for command in COMMANDS:
        text = fresh.run(*command)
        assert (text.returncode, text.stderr) == (0, ""), (command, text)
        assert text.stdout.strip(), command
        if command[:2] != ["account", "add"]:
            decoded = fresh.command(*command)
            assert isinstance(decoded, dict | list), command
    key_id = fresh.command("key", "list", "owner")[-1]["key_id"]
    assert fresh.run("key", "revoke", key_id).returncode == 0


def test_usage_shows_tokens_and_credits_by_day_and_model(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key(credits=100)
    assert proxy.client(account.key).chat(model="mid").status == 200
    shown = json.dumps(proxy.command("usage", account.name))
    assert '"mid"' in shown and "12" in shown  # (5 + 3) tokens x 1.5
    text = proxy.run("usage", account.name, "--days", "1").stdout
    assert "mid" in text and "12" in text
    assert_books(proxy, account, credits=88)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["account", "show", "nobody"], 1),
        (["account", "add", "owner"], 1),
        (["account", "tier", "owner", "golden"], 1),
        (["account", "suspend", "nobody"], 1),
        (["key", "add", "nobody"], 1),
        (["key", "revoke", "123456"], 1),
        (["credit", "add", "nobody", "5"], 1),
        (["credit", "add", "owner", "0.0001"], None),
        (["credit", "add", "owner", "many"], 2),
        (["account"], 2),
        (["account", "add"], 2),
        (["dance"], 2),
        (["usage", "nobody"], 1),
        (["usage", "--days", "1000000"], 2),
        (["credit", "add", "owner", "1e999999999"], 2),
        (["credit", "add", "owner", "-1e5"], 1),
        (["credit", "add", "owner", "0"], 1),
        (["account", "show", "a\0b"], 2),
        (["account", "show", "\udcff"], 2),
        (["account", "add", "two words"], 1),
        (["account", "add", "eve", "--free", "-1"], 1),
        (["key", "revoke", "9" * 30], 2),
    ],
)
def test_a_mistake_is_explained_on_stderr(arguments: list[str], code: int | None, mistakes_proxy: RunningProxy) -> None:
    for extra in ([], ["--json"]):
        done = mistakes_proxy.run(*arguments, *extra)
        assert done.returncode in ([code] if code else [1, 2]), (done.stdout, done.stderr)
        assert done.stdout == "" and done.stderr.strip()
        assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def mistakes_proxy(tmp_path_factory: pytest.TempPathFactory, commands: Any) -> Any:
    """A database with an owner, and no server."""
    folder = tmp_path_factory.mktemp("mistakes")
    config = write_files(folder, {**OPTIONS, "upstreams": ECHO}, MODELS)
    proxy = RunningProxy(config, commands, None)  # type: ignore[arg-type]
    proxy.command("account", "add", "owner")
    return proxy


def test_a_tier_gives_no_more_keys_than_it_has(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key(tier="two-keys")
    proxy.command("key", "add", account.name)
    done = proxy.run("key", "add", account.name)
    assert done.returncode == 1 and "2" in done.stderr
    proxy.command("key", "revoke", account.key_id)
    proxy.command("key", "add", account.name)  # a revoked key counts no more
    assert proxy.account(account.name)["keys"] == 2


def test_unknown_names_come_with_the_nearest_one(mistakes_proxy: RunningProxy) -> None:
    assert "owner" in mistakes_proxy.run("account", "show", "ownr").stderr
    assert "two-keys" in mistakes_proxy.run("account", "tier", "owner", "two-key").stderr


def test_a_key_may_have_a_limit_a_last_day_and_models(proxy: RunningProxy, funded_key: Callable[..., Any]) -> None:
    account = funded_key(credits=100)
    words = ("--label", "intern", "--credit-limit", "20.5", "--expires", "2999-12-31", "--models", "plain, mid")
    made = proxy.command("key", "add", account.name, *words)
    key = proxy.command("key", "list", account.name)[-1]
    expected = {"credit_limit": 20.5, "spent": 0, "expires_at": "3000-01-01T00:00:00Z", "models": ["plain", "mid"]}
    assert key.items() >= {**expected, "key_id": made["key_id"], "label": "intern", "revoked_at": None}.items()
    assert proxy.client(made["key"]).chat(model="plain").status == 200
    assert proxy.client(made["key"]).chat(model="echo").status == 403
    assert proxy.command("key", "list", account.name)[-1]["spent"] == 8
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize(
    "words",
    [("--expires", "2020-01-01"), ("--expires", "tomorrow"), ("--models", "plian"), ("--models", " , "),
     ("--credit-limit", "-1"), ("--credit-limit", "1e999999999"), ("--label", "a\0b"), ("--label", "x" * 1000)],
)  # fmt: skip
def test_a_key_with_wrong_limits_is_not_made(mistakes_proxy: RunningProxy, words: tuple[str, str]) -> None:
    before = mistakes_proxy.command("key", "list", "owner")
    done = mistakes_proxy.run("key", "add", "owner", *words)
    assert done.returncode in (1, 2) and done.stdout == ""
    assert "Traceback" not in done.stderr and done.stderr.strip()
    assert mistakes_proxy.command("key", "list", "owner") == before


def test_config_may_stand_before_or_after_a_command(config: Path, commands: CommandServer) -> None:
    where = ("--config", str(config))
    for words in (
        (*where, "account", "add", "ada"),
        ("account", *where, "show", "ada"),
        ("account", "show", "ada", *where),
        ("account", "show", *where, "ada", "--json"),
    ):
        done = commands.run(*words)
        assert done.returncode == 0 and "ada" in done.stdout, (words, done)


def test_names_of_accounts_differ_in_more_than_case(mistakes_proxy: RunningProxy) -> None:
    done = mistakes_proxy.run("account", "add", "OWNER")
    assert done.returncode == 1 and '"owner"' in done.stderr


def test_a_command_of_the_console_says_what_it_needs(mistakes_proxy: RunningProxy) -> None:
    """Off or absent, the console leaves one sentence, and nothing behind."""
    done = mistakes_proxy.run("account", "link", "owner")
    assert done.returncode == 1 and "console" in done.stderr and "Traceback" not in done.stderr


# -- the process


def test_a_second_server_on_the_same_database_says_who_has_it(fresh: RunningProxy) -> None:
    done = run_program(fresh.config, "serve")
    assert done.returncode in (1, 2), done.returncode
    assert str(fresh.process.pid) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_port_in_use_takes_one_sentence(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = {**OPTIONS, "upstreams": ECHO, "listen": f"127.0.0.1:{port}"}
        done = run_program(write_files(tmp_path, options, MODELS), "serve")
    assert done.returncode in (1, 2), done.returncode
    assert str(port) in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_database_of_a_newer_version_is_refused(config: Path, commands: CommandServer) -> None:
    assert commands.run("--config", str(config), "account", "add", "ada").returncode == 0
    database = sqlite3.connect(config.parent / "proxy.db")
    (version,) = database.execute("PRAGMA user_version").fetchone()
    database.execute("PRAGMA user_version = 4711")
    database.close()
    ways = [run_program(config, "serve"), *(commands.run("--config", str(config), word) for word in ("audit", "check"))]
    for done in ways:
        assert done.returncode in (1, 2), done
        assert "4711" in done.stderr + done.stdout and "Traceback" not in done.stderr
    assert version > 0


def test_keys_are_never_on_disk_in_clear(fresh: RunningProxy, fake_upstream: Callable[..., FakeUpstream]) -> None:
    account = fresh.add_account(100)
    assert fresh.client(account.key).chat(QUESTION).status == 200
    wrong = f"sk-{'w' * 43}"
    assert fresh.client(wrong).chat(QUESTION).status == 401
    for path in fresh.folder.glob("proxy.db*"):
        content = path.read_bytes()
        for key in (account.key, *keys_in(fresh.output)):
            assert key.encode() not in content and key[3:].encode() not in content, path
    assert account.key not in fresh.output and wrong not in fresh.output
    assert QUESTION not in fresh.output, "prompts are never logged"


def test_check_names_an_upstream_that_does_not_answer(tmp_path: Path, commands: CommandServer) -> None:
    absent = {**NOBODY, "api_key": "a key says that it ought to be there"}
    config = write_files(tmp_path, {**OPTIONS, "upstreams": {**ECHO, "absent": absent}}, MODELS)
    broken = commands.run("--config", str(config), "check")
    assert broken.returncode == 1 and re.search(r"FAIL upstream absent: .*not reachable", broken.stdout)


def test_check_lists_a_server_of_this_machine_that_does_not_run_as_off(patchy: RunningProxy) -> None:
    done = patchy.run("check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "main" in done.stdout and "NOT_SET_ANYWHERE" in done.stdout
    assert re.search(r"upstream absent: off", done.stdout)
    assert re.search(r"models that are off.*: .*\bfar\b", done.stdout)


class CountsOneChoice(Answers):
    def usage_of(self, request: dict[str, Any], choices: int | None = None) -> dict[str, Any]:
        return super().usage_of(request, 1)


class RejectsStreamOptions(Answers):
    async def __call__(self, exchange: Exchange) -> None:
        if "stream_options" in exchange.json:
            await exchange.answer({"error": {"message": "stream_options: unknown field"}}, 422)
        else:
            await super().__call__(exchange)


def test_check_learns_how_an_upstream_counts(
    running_proxy: Callable[..., RunningProxy], fake_upstream: Callable[..., FakeUpstream]
) -> None:
    servers = {"one": fake_upstream(CountsOneChoice()), "old": fake_upstream(RejectsStreamOptions())}
    proxy = running_proxy(
        upstreams={name: {"base_url": server.url} for name, server in servers.items()},
        models={f"of-{name}": {"tier": "one", "upstream": name} for name in servers},
    )
    done = proxy.run("check")
    assert done.returncode == 1, done.stdout
    assert re.search(r"ok +upstream one: .*usage_of: choice", done.stdout), done.stdout
    assert re.search(r"FAIL +upstream old: .*usage_in_stream: never", done.stdout), done.stdout
    assert not re.search(r"upstream main: .*(usage_of|usage_in_stream)", done.stdout), "one that counts as it should"


def test_audit_fails_on_books_that_somebody_cooked(config: Path, commands: CommandServer) -> None:
    """A grant that no balance knows of. The only test that knows a table."""
    assert commands.run("--config", str(config), "account", "add", "ada").returncode == 0
    assert commands.run("--config", str(config), "audit").returncode == 0
    cooked = "INSERT INTO credit_grant (account_id, kind, amount, created_at) SELECT id, 'paid', 1000, 0 FROM account"
    database = sqlite3.connect(config.parent / "proxy.db")
    assert database.execute(cooked).rowcount == 1
    database.commit()
    database.close()
    done = run_program(config, "audit", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["ok"] is False
