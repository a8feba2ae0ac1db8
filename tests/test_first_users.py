"""What its first users found (issue 12: items 1, 4 to 14 and 16)."""

import itertools
import json
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.attackers import AnswersOneChoicesUsage, PlainServer, RawClient, bare_proxy, free_port
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE
from tests.support.commands import PROXY, REPOSITORY, CommandServer, clean_environment, run_program
from tests.support.errors import assert_error
from tests.support.files import edit_yaml
from tests.support.misbehaviours import Fails
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream, RefusesConnections
from tests.support.waiting import WAIT_SECONDS, wait_until

pytestmark = pytest.mark.long

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]
CHAT = "/v1/chat/completions"


def served(proxy: RunningProxy, key: str, model: str) -> bool:
    return proxy.client(key).get(f"/v1/models/{model}").status == 200


# -- 1. Several choices


def test_several_choices_are_not_billed_as_one(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """3 choices of 80 bytes are 30 tokens at the least; the usage says 20, which are one choice's."""
    account = funded_key(1000)
    upstream.behaviour = AnswersOneChoicesUsage("word" * 20, tokens=20)
    assert proxy.client(account.key).chat(n=3).status == 200
    assert_books(proxy, account, credits=1000 - 5 - 30)


def test_a_usage_of_all_choices_is_believed(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(1000)
    upstream.behaviour = AnswersOneChoicesUsage("word" * 20, tokens=60)
    assert proxy.client(account.key).chat(n=3).status == 200
    assert_books(proxy, account, credits=1000 - 5 - 60)


def test_an_upstream_that_reports_one_choice_is_billed_by_the_count(
    running_proxy: MakeProxy, fake_upstream: Callable[..., FakeUpstream]
) -> None:
    llama = fake_upstream(AnswersOneChoicesUsage("word" * 20, tokens=20))
    proxy = running_proxy(
        upstreams={"llama": {"base_url": llama.url, "usage_of": "choice"}},
        models={"llama": {"tier": "one", "upstream": "llama"}},
    )
    account = proxy.add_account(1000)
    assert proxy.client(account.key).chat(model="llama", n=3).status == 200
    assert_books(proxy, account, credits=1000 - 5 - 60)
    assert proxy.client(account.key).chat(model="llama").status == 200
    assert_books(proxy, account, credits=1000 - 5 - 60 - 5 - 20)


# -- 4. 5. 14. Files that change while the server runs


def test_an_upstream_and_its_model_are_added_without_a_restart(
    running_proxy: MakeProxy, fake_upstream: Callable[..., FakeUpstream]
) -> None:
    proxy, fresh = running_proxy(), fake_upstream(Answers(tokens=7))
    account = proxy.add_account(100)
    edit_yaml(proxy.config, lambda config: config["upstreams"].update(fresh={"base_url": fresh.url}))
    new = {"tier": "one", "upstream": "fresh"}
    edit_yaml(proxy.folder / "models.yaml", lambda catalog: catalog["models"].update(new=new))
    wait_until(lambda: served(proxy, account.key, "new"), "the new model is served")
    assert proxy.client(account.key).chat(model="new").status == 200
    assert len(fresh.posts) == 1
    assert_books(proxy, account, credits=100 - 5 - 7)


def test_a_builtin_upstream_may_come_with_a_reload(running_proxy: MakeProxy) -> None:
    proxy = running_proxy()
    account = proxy.add_account(100)
    edit_yaml(proxy.config, lambda config: config["upstreams"].update(words={"builtin": "echo"}))
    new = {"tier": "one", "upstream": "words"}
    edit_yaml(proxy.folder / "models.yaml", lambda catalog: catalog["models"].update(new=new))
    wait_until(lambda: served(proxy, account.key, "new"), "the new model is served")
    usage = proxy.client(account.key).chat(model="new").json()["usage"]
    assert_books(proxy, account, credits=100 - usage["prompt_tokens"] - usage["completion_tokens"])


def test_an_upstream_that_moved_is_asked_at_its_new_address(
    running_proxy: MakeProxy, fake_upstream: Callable[..., FakeUpstream]
) -> None:
    """A request under way stays where it is."""
    script = Answers(tokens=3, pause_after=1)
    proxy, moved = running_proxy(behaviour=script), fake_upstream(Answers(tokens=7))
    account = proxy.add_account(100_000)
    with proxy.client(account.key).stream_chat() as stream:
        script.reached.wait()
        edit_yaml(proxy.config, lambda config: config["upstreams"].update(main={"base_url": moved.url}))
        proxy.signal(signal.SIGHUP)
        wait_until(lambda: proxy.client(account.key).chat().status == 200 and moved.posts, "the new address is asked")
        script.resume.set()
        assert stream.finish().words == 3
    assert_books(proxy, account, credits=100_000 - 8 * len(proxy.upstream.posts) - 12 * len(moved.posts))


def test_a_tiers_limits_change_without_a_restart(running_proxy: MakeProxy) -> None:
    proxy = running_proxy()
    account = proxy.add_account(100_000)
    edit_yaml(proxy.config, lambda config: config["tiers"].update(unlimited={"requests_per_minute": 1}))
    proxy.signal(signal.SIGHUP)
    wait_until(lambda: proxy.client(account.key).chat().status == 429, "the new limit holds")
    assert_audit(proxy)


def test_a_broken_edit_keeps_the_last_good_pair(running_proxy: MakeProxy) -> None:
    proxy = running_proxy()
    account = proxy.add_account(100)
    edit_yaml(
        proxy.folder / "models.yaml", lambda catalog: catalog["models"].update(new={"tier": "one", "upstream": "nix"})
    )
    proxy.signal(signal.SIGHUP)
    proxy.wait_for_line("nix")
    assert proxy.client(account.key).chat().status == 200
    edit_yaml(proxy.config, lambda config: config["upstreams"].update(nix={"base_url": proxy.upstream.url}))
    wait_until(lambda: served(proxy, account.key, "new"), "the pair is good again, and served")
    assert_books(proxy, account, credits=100 - 8)


def test_a_setting_that_needs_a_restart_is_named(running_proxy: MakeProxy) -> None:
    proxy = running_proxy()
    edit_yaml(proxy.config, lambda config: config.update(listen="127.0.0.1:1"))
    proxy.signal(signal.SIGHUP)
    assert re.search(r"(?i)restart", proxy.wait_for_line(r"\blisten\b.*"))


def test_a_closed_terminal_ends_neither_the_server_nor_a_stream(running_proxy: MakeProxy) -> None:
    script = Answers(tokens=5, pause_after=2)
    proxy = running_proxy(behaviour=script)
    account = proxy.add_account(100)
    with proxy.client(account.key).stream_chat() as stream:
        script.reached.wait()
        for _ in range(3):
            proxy.signal(signal.SIGHUP)
        assert proxy.client(None).get("/health").status == 200
        script.resume.set()
        answer = stream.finish()
    assert (answer.words, answer.clean) == (5, True)
    assert_books(proxy, account, credits=100 - 10)


def test_a_models_file_caught_in_mid_write_is_not_taken(running_proxy: MakeProxy) -> None:
    """Its beginning is a valid file too. It is written over and over, and asked about after each piece."""
    proxy = running_proxy()
    account = proxy.add_account(100)
    path = proxy.folder / "models.yaml"
    whole = path.read_text() + "".join(f"  late-{n}: {{tier: one, upstream: main}}\n" for n in range(50))
    lines = whole.splitlines(keepends=True)
    plain = next(number for number, line in enumerate(lines) if line.startswith("  plain:"))
    end = time.monotonic() + 1.5  # it is looked at four times a second
    for number in itertools.takewhile(lambda _: time.monotonic() < end, itertools.count()):
        path.write_text("".join(lines[: plain - number % 5]) + "  pl" * (number % 2))
        assert served(proxy, account.key, "plain"), "a truncated file was taken"
    path.write_text(whole)
    wait_until(lambda: served(proxy, account.key, "late-49"), "the whole file is taken")
    assert not [line for line in proxy.lines if re.search(r"models\.yaml:\d+", line)], proxy.output


# -- 6. An upstream's address without /v1


@pytest.fixture
def local_server() -> Iterator[PlainServer]:
    models = {"object": "list", "data": [{"id": "zeta", "object": "model"}]}
    server = PlainServer({"/v1/models": models})
    yield server
    server.close()


def test_an_address_that_serves_no_api_is_told_from_one_that_does(
    running_proxy: MakeProxy, local_server: PlainServer
) -> None:
    proxy = running_proxy(
        upstreams={"wrong": {"base_url": local_server.url}, "right": {"base_url": local_server.url + "/v1"}},
        models={"zeta": {"tier": "one", "upstream": "right"}, "omega": {"tier": "one", "upstream": "right"}},
    )
    assert re.search(r"/v1", proxy.wait_for_line(r"upstream wrong\b.*"))
    proxy.wait_for_line(r"upstream right\b.*")
    done = proxy.run("check")
    wrong = [line for line in done.stdout.splitlines() if re.search(r"\bwrong\b", line)]
    assert done.returncode == 1, done.stdout
    assert [line for line in wrong if "/v1" in line and "404" in line], done.stdout
    assert [line for line in done.stdout.splitlines() if "omega" in line and "right" in line], done.stdout
    assert "zeta" not in done.stdout, "a model that it has"


# -- 7. Overruns that mean something


def test_a_chat_templates_own_tokens_are_no_overrun(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """The hold has room for 64 of them."""
    account = funded_key(1000)
    upstream.behaviour = Answers(tokens=10, prompt_tokens=QUESTION_ESTIMATE + 64)
    for stream in (False, True, False, True):
        assert proxy.client(account.key).chat(max_tokens=10, stream=stream).status == 200
    done = proxy.run("audit", "--overruns", "--json")
    assert done.returncode == 0, done.stderr
    assert account.name not in done.stdout
    assert_books(proxy, account, credits=1000 - 4 * (10 + QUESTION_ESTIMATE + 64))


def test_audit_lists_the_overruns_that_took_a_balance_below_zero_and_counts_the_others(
    running_proxy: MakeProxy,
) -> None:
    proxy = running_proxy(behaviour=Answers(tokens=3, prompt_tokens=900))
    rich, poor = proxy.add_account(5000, name="richard"), proxy.add_account(500, name="pauper")
    for account in (rich, poor):
        assert proxy.client(account.key).chat(max_tokens=3).status == 200
    short, full = proxy.run("audit"), proxy.run("audit", "--overruns")
    assert (short.returncode, full.returncode) == (0, 0), short.stderr + full.stderr
    assert "pauper" in short.stdout and "richard" not in short.stdout, short.stdout
    assert "pauper" in full.stdout and "richard" in full.stdout, full.stdout
    assert re.search(r"(?i)\b2\b.*(above|overrun|hold)|(above|overrun|hold).*\b2\b", short.stdout), short.stdout
    assert_books(proxy, rich, credits=5000 - 903)
    assert_books(proxy, poor, credits=500 - 903)


# -- 8. 9. What an upstream says, and what it does not


def test_the_text_of_an_upstreams_failure_is_in_the_log(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account, before = funded_key(100), len(proxy.lines)
    message = "tensor shapes disagree in layer 7; key upstream-secret-key; " + "x" * 1000
    upstream.behaviour = Fails(500, {"error": {"message": message}})
    answer = proxy.client(account.key).chat()
    assert_error(answer, 502, "upstream_error", "upstream_error")
    line = proxy.wait_for_line("tensor shapes disagree in layer 7", after=before)
    assert answer.headers["x-request-id"] in line
    assert "upstream-secret-key" not in line and "x" * 301 not in line
    assert_books(proxy, account, credits=100)


def test_an_upstream_that_never_sends_usage_is_named_once_and_counted(running_proxy: MakeProxy) -> None:
    proxy = running_proxy(behaviour=Answers(usage="none"))
    account = proxy.add_account(100)
    for _ in range(3):
        assert proxy.client(account.key).chat(stream=True).status == 200
    assert re.search(r"(?i)\bmain\b", proxy.wait_for_line("(?i)(no|without) usage"))
    named = [line for line in proxy.lines if re.search("(?i)(no|without) usage", line)]
    assert len(named) == 1, named
    metrics = proxy.client(None).get("/metrics").body.decode()
    assert re.search(r'(?m)^\w*usage\w*\{.*"main".*\} 3', metrics), metrics[-3000:]
    assert_books(proxy, account, credits=100 - 3 * (QUESTION_ESTIMATE + 3))


@pytest.fixture(scope="module")
def kinds(module_proxy: MakeProxy) -> RunningProxy:
    stated = {kind: {"tier": "one", "upstream": "main", "kind": kind} for kind in ("embedding", "chat", "code")}
    return module_proxy(models={**stated, "any": {"tier": "one", "upstream": "main"}})


PROMPTS: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "hi"},
}


@pytest.mark.parametrize(
    ("model", "paths"),
    [
        ("embedding", ["/v1/embeddings"]),
        ("chat", [CHAT, "/v1/completions"]),
        ("code", [CHAT, "/v1/completions"]),
        ("any", [CHAT, "/v1/completions", "/v1/embeddings"]),
    ],
)
def test_a_model_is_asked_only_for_what_its_kind_can_do(kinds: RunningProxy, model: str, paths: list[str]) -> None:
    kinds.upstream.reset()
    account = kinds.add_account(1000)
    for path, prompt in PROMPTS.items():
        answer = kinds.client(account.key).post(path, {"model": model, **prompt})
        if path in paths:
            assert answer.status == 200, (path, answer.body)
        else:
            assert model in assert_error(answer, 422, "validation_failed")["message"]
    assert len(kinds.upstream.posts) == len(paths)
    embeddings = "/v1/embeddings" in paths
    assert_books(kinds, account, credits=1000 - 8 * (len(paths) - embeddings) - 5 * embeddings)


# -- 10. 12. The shipped files


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """Both files as they are shipped, on a port of the test's own."""
    for name in ("config.yaml", "models.yaml"):
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path / "config.yaml"


def test_check_on_the_shipped_files_exits_with_0(shipped: Path) -> None:
    done = run_program(shipped, "check")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"(?i)ollama\b.*\boff\b", done.stdout), done.stdout


def test_the_shipped_models_that_cannot_be_served_say_so(shipped: Path) -> None:
    port = free_port()
    shipped.write_text(shipped.read_text().replace("127.0.0.1:8000", f"127.0.0.1:{port}"))
    key = json.loads(run_program(shipped, "account", "add", "ann", "--json").stdout)["key"]
    with bare_proxy(shipped, port) as proxy:
        assert proxy.wait_until_up_or_over()

        def available() -> set[str]:
            models = proxy.client(key).get("/v1/models").json()["data"]
            assert len(models) == 60
            return {model["id"] for model in models if model["available"]}

        wait_until(lambda: available() == {"echo"}, "only echo is available")
        assert proxy.end() == 0


def test_a_model_is_available_when_one_of_its_upstreams_is_there(running_proxy: MakeProxy) -> None:
    nobody = RefusesConnections()
    proxy = running_proxy(
        upstreams={"nobody": {"base_url": nobody.url}},
        models={"absent": {"tier": "one", "upstream": "nobody"}},
    )
    key = proxy.add_account(100).key

    def available() -> dict[str, bool]:
        return {model["id"]: model["available"] for model in proxy.client(key).get("/v1/models").json()["data"]}

    wait_until(lambda: available()["plain"] and not available()["absent"], "the probe's findings are shown")
    assert available()["echo"] is True
    nobody.close()


def test_a_new_account_of_the_shipped_files_may_have_a_second_key(commands: CommandServer, shipped: Path) -> None:
    def run(*arguments: str) -> Any:
        done = commands.run("--config", str(shipped), *arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert run("account", "add", "ann", "--credits", "5000")["credits"] == 6000
    assert run("account", "add", "ben", "--credits", "5000", "--free", "0")["credits"] == 5000
    assert run("account", "add", "cat", "--free", "70")["credits"] == 70
    assert run("account", "show", "ben")["free"] == 0
    assert run("key", "add", "ann")["key"].startswith("sk-")
    assert commands.run("--config", str(shipped), "key", "add", "ann").returncode == 1, "two are the limit"
    assert run("audit")["ok"] is True


# -- 11. What a stranger is told


def test_a_path_that_is_none_is_told_which_apis_there_are(proxy: RunningProxy, funded_key: MakeKey) -> None:
    answer = proxy.client(funded_key(1).key).post("/v1/foo", {})
    message = assert_error(answer, 404, "not_found", "invalid_request_error")["message"]
    for path in (CHAT, "/v1/completions", "/v1/embeddings", "/v1/models"):
        assert path in message, message


def test_no_answer_tells_what_software_or_address_is_behind(proxy: RunningProxy, funded_key: MakeKey) -> None:
    client = proxy.client(funded_key(100).key)
    answers = [
        client.chat(),
        client.chat(stream=True),
        client.get("/v1/models"),
        client.get("/health"),
        client.get("/x"),
    ]
    answers += [client.chat(model=model) for model in ("absent", "off", "nothing")]
    for answer in answers:
        assert answer.headers["server"] == "llm-proxy", answer.headers.as_string()
        everything = answer.headers.as_string() + answer.body.decode()
        assert not re.search(r"127\.0\.0\.1|localhost|aiohttp|Python", everything), everything
    assert "absent" in answers[-3].error["message"]


# -- 13. Commands


@pytest.mark.parametrize("place", ["before", "after", "at the end"])
def test_config_may_stand_before_and_after_the_command(home: Path, place: str) -> None:
    option, command = ["--config", str(home)], ["account", "list"]
    arguments = {
        "before": [*option, *command],
        "after": ["account", *option, "list"],
        "at the end": [*command, *option],
    }
    done = plainly(*arguments[place])
    assert done.returncode == 0, done.stderr
    assert "ann" in done.stdout


@pytest.fixture
def home(commands: CommandServer, tmp_path: Path) -> Path:
    """A config in use."""
    shutil.copy(REPOSITORY / "models.yaml", tmp_path)
    shutil.copy(REPOSITORY / "config.yaml", tmp_path)
    assert commands.run("--config", str(tmp_path / "config.yaml"), "account", "add", "ann").returncode == 0
    return tmp_path / "config.yaml"


def plainly(*arguments: str) -> Any:
    """`python proxy.py ARGUMENTS`, with no `--config` of the helpers' own."""
    command = [sys.executable, str(PROXY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=WAIT_SECONDS, env=clean_environment())


def test_the_version_is_told() -> None:
    done = plainly("--version")
    assert (done.returncode, bool(re.search(r"\d+\.\d+\.\d+", done.stdout))) == (0, True), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (("account", "add"), ["--tier", "--credits", "--free", "starter", "enterprise", "free"]),
        (("account", "tier"), ["starter", "enterprise"]),
        (("usage",), ["--days", "30"]),
        (("audit",), ["--overruns"]),
        (("serve",), ["config.yaml"]),
        (("key", "add"), ["--label"]),
        (("credit", "add"), ["--ref", "--note", "negative"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_the_help_of_a_command_tells_its_defaults_and_the_tiers(
    commands: CommandServer, home: Path, command: tuple[str, ...], words: list[str]
) -> None:
    done = commands.run("--config", str(home), *command, "--help")
    assert done.returncode == 0, done.stderr
    assert not [word for word in words if word not in done.stdout], done.stdout


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("amount: 1000", "amount: many"),
        ("days: 30", "days: [1]"),
        ("max_body_mb: 32", "max_body_mb: large"),
        ("requests_per_minute: 10,", "requests_per_minute: ten,"),
        ("log: text", "log: 7"),
    ],
)
def test_a_mistake_is_named_in_plain_words(commands: CommandServer, home: Path, right: str, wrong: str) -> None:
    home.write_text(home.read_text().replace(right, wrong, 1))
    done = commands.run("--config", str(home), "check")
    assert done.returncode == 2
    assert not re.search(r"\| null|\bint\b|\bstr\b|\barray\b|invalid decimal|ssl:default|`", done.stderr), done.stderr


# -- 16. What was not closed yet


def test_a_foreign_lock_does_not_keep_a_key_from_being_looked_up(running_proxy: MakeProxy) -> None:
    proxy = running_proxy()
    account = proxy.add_account(100)
    other = sqlite3.connect(proxy.database, isolation_level=None)
    try:
        other.execute("BEGIN IMMEDIATE")
        client = proxy.client(account.key)
        assert client.get("/v1/models").status == 200
        assert client.balance == 100
        assert_error(client.chat(model="nothing"), 404, "model_not_found")
        assert_error(proxy.client("sk-unknown").get("/v1/models"), 401, "invalid_api_key")
        other.execute("ROLLBACK")
    finally:
        other.close()
    assert proxy.client(account.key).chat().status == 200
    assert_books(proxy, account, credits=100 - 8)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nno colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
    ids=lambda data: repr(data)[:30],
)
def test_bytes_that_are_no_http_are_refused_in_the_one_shape(proxy: RunningProxy, request_: bytes) -> None:
    with RawClient(proxy.port) as client:
        head, _, body = client.send(request_).read_all().partition(b"\r\n\r\n")
    assert re.match(rb"HTTP/1\.[01] 400 ", head), head
    assert b"application/json" in head.lower(), head
    error = json.loads(body)["error"]
    assert (error["type"], error["status"]) == ("invalid_request_error", 400), error
