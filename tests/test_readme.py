"""README tells the truth: its commands and snippets run as they stand, and what the program has is named in it."""

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import proxy as core
from tests.support.answers import Answers
from tests.support.api_upstreams import AnswersMessages
from tests.support.books import assert_audit
from tests.support.commands import REPOSITORY, CommandServer, run_program
from tests.support.process import RunningProxy
from tests.support.upstream import FakeUpstream

pytestmark = pytest.mark.long

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
LISTENING = "http://127.0.0.1:8000"
HAS_CONSOLE = (REPOSITORY / "extras" / "console").is_dir()
UNDER_UPSTREAMS, UNDER_MODELS = "# config.yaml, under upstreams:\n", "# models.yaml, under models:\n"
SECRETS = {f"{name}_API_KEY": f"secret-of-{name}" for name in ("VLLM", "OPENAI", "ANTHROPIC")}
HTTP_HEADERS = {"server", "content-type", "content-length", "date", "connection", "transfer-encoding", "cache-control"}


# ---- What stands in README


def section(title: str) -> str:
    """From a heading to the next of its level, or of a higher one."""
    found = re.search(rf"^(#+) {re.escape(title)}\n", README, re.MULTILINE)
    assert found, f"README has no section {title}"
    rest = README[found.end() :]
    end = re.search(rf"^#{{1,{len(found[1])}}} ", re.sub(r"(?ms)^```.*?^```", lambda m: "." * len(m[0]), rest), re.M)
    return rest[: end.start()] if end else rest


def blocks(language: str) -> list[str]:
    """The code blocks of a language, continued lines joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def shell_lines(word: str) -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith(word)]


def examples() -> list[tuple[str, str]]:
    """Of each upstream that README describes, the lines for the two files."""
    found = [block for block in blocks("yaml") if block.startswith(UNDER_UPSTREAMS)]
    pairs = [block.removeprefix(UNDER_UPSTREAMS).split(UNDER_MODELS) for block in found]
    return [(upstream, model) for upstream, model in pairs]


def insert(text: str, key: str, lines: str) -> str:
    """`lines` under a top-level `key` of a file, in place of what stands there under the same name."""
    for name in yaml.safe_load(lines):
        text = re.sub(rf"(?m)^  {re.escape(name)}: .*\n", "", text)
    assert f"\n{key}:\n" in text
    return text.replace(f"\n{key}:\n", f"\n{key}:\n{lines}")


def names_missing(title: str, names: Any) -> list[str]:
    """Those that the section does not have in backticks."""
    text = section(title)
    return [name for name in names if f"`{name}`" not in text]


def fields(kind: Any, *without: str) -> list[str]:
    return [name for name in kind.__struct_fields__ if name not in without]


# ---- A server as README describes it


@pytest.fixture
def server(
    tmp_path: Path, commands: CommandServer, fake_upstream: Callable[..., FakeUpstream]
) -> Iterator[RunningProxy]:
    """The shipped files with every example in them; all upstreams are one that is scripted."""
    upstream = fake_upstream()
    config, models = ((REPOSITORY / name).read_text(encoding="utf-8") for name in ("config.yaml", "models.yaml"))
    for of_upstream, of_model in examples():
        config, models = insert(config, "upstreams", of_upstream), insert(models, "models", of_model)
    config = re.sub(r"base_url: [^,}\s]+", f"base_url: {upstream.url}", config)
    config = config.replace("listen: 127.0.0.1:8000", "listen: 127.0.0.1:0").replace("log: text", "log: json")
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    (tmp_path / "models.yaml").write_text(models, encoding="utf-8")
    running = RunningProxy(tmp_path / "config.yaml", commands, upstream, SECRETS)
    try:
        yield running.start()
        assert_audit(running)
        running.close()
    finally:
        if running.process.poll() is None:
            running.kill()


@pytest.fixture
def key(server: RunningProxy) -> str:
    """What the first start printed."""
    found = re.search(r"sk-[A-Za-z0-9_-]{43}", "\n".join(server.stdout_lines))
    assert found
    return found[0]


def run(server: RunningProxy, key: str, command: str | list[str], **options: Any) -> str:
    """What a command of README prints, with its address and its key."""
    words = [command] if isinstance(command, str) else command
    words = [word.replace(LISTENING, server.base_url).replace("sk-...", key) for word in words]
    environment = {**os.environ, "KEY": key}
    done = subprocess.run(
        words[0] if isinstance(command, str) else words,
        env=environment, shell=isinstance(command, str), capture_output=True, text=True, timeout=30, **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_the_first_screen_shows_what_happens(server: RunningProxy, key: str) -> None:
    """A balance of 1,000, a streamed answer, and a balance of 995."""
    before, stream, after = (run(server, key, line) for line in shell_lines("curl")[:3])
    assert stream.endswith("data: [DONE]\n\n") and '"prompt_tokens":5,"completion_tokens":5' in stream
    assert (json.loads(before)["credits"], json.loads(after)["credits"]) == (1000, 995)
    assert list(json.loads(after)) == list(json.loads(re.findall(r'^\{"tier".*\}$', README, re.M)[0]))


def test_ci_finds_the_two_commands() -> None:
    for end in (r"python proxy\.py", "pytest -q"):
        assert len(re.findall(rf"(?m)^python3 -m venv .*{end}$", README)) == 1


def test_the_openai_snippet_prints_the_answer(server: RunningProxy, key: str) -> None:
    (snippet,) = (block for block in blocks("python") if "import OpenAI" in block)
    assert run(server, key, [sys.executable, "-c", snippet]) == "Hello"


def test_the_anthropic_snippet_prints_the_answer(server: RunningProxy, key: str) -> None:
    server.upstream.behaviour = AnswersMessages(tokens=3)
    (snippet,) = (block for block in blocks("python") if "import Anthropic" in block)
    assert run(server, key, [sys.executable, "-c", snippet]) == "wordwordword"


def test_the_javascript_snippet_prints_the_answer(server: RunningProxy, key: str, tmp_path: Path) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llm-reverse-proxy"
    modules = Path(os.environ.get("NODE_PATH") or cache / "node" / "node_modules")
    if not (modules / "openai").is_dir():
        pytest.skip("the npm package openai is not installed: tests/real/ci.sh does that")
    (snippet,) = blocks("javascript")
    (tmp_path / "node_modules").symlink_to(modules)
    snippet = snippet.replace(LISTENING, server.base_url).replace("sk-...", key)
    (tmp_path / "snippet.mjs").write_text(snippet)
    assert run(server, key, ["node", "snippet.mjs"], cwd=tmp_path) == "Hello\n"


def test_codex_is_configured_as_it_is_tested() -> None:
    (text,) = blocks("toml")
    tested = (REPOSITORY / "tests" / "clients" / "codex_command.py").read_text(encoding="utf-8")
    for name, value in tomllib.loads(text)["model_providers"]["proxy"].items():
        assert f'{name} = "{value}"' in tested or name in ("base_url", "env_key"), name


def test_each_upstream_that_is_described_answers_its_models_call(server: RunningProxy, key: str) -> None:
    chat, messages = shell_lines("curl")[3:]
    assert len(examples()) == 5
    server.command("credit", "add", "owner", 10_000)
    for of_upstream, of_model in examples():
        (upstream,), (model,) = (yaml.safe_load(lines) for lines in (of_upstream, of_model))
        speaks_messages = upstream == "anthropic"
        server.upstream.reset(AnswersMessages() if speaks_messages else Answers())
        call = re.sub(r'"model": "[^"]*"', f'"model": "{model}"', messages if speaks_messages else chat)
        assert "usage" in json.loads(run(server, key, call))
        asked = server.upstream.next_exchange()
        assert asked.json["model"] == (yaml.safe_load(of_model)[model].get("upstream_model") or model)
        secret = SECRETS.get(f"{upstream.upper()}_API_KEY")
        header = "x-api-key" if speaks_messages else "authorization"
        assert asked.headers.get(header, "").removeprefix("Bearer ") == (secret or "")
        assert not speaks_messages or asked.headers["anthropic-version"] == "2023-06-01"


def test_models_that_reason_out_of_sight_reserve_their_whole_answer() -> None:
    for of_upstream, of_model in examples():
        if "https://" in of_upstream:
            ((_, model),) = yaml.safe_load(of_model).items()
            assert model["hold_output_tokens"] == model["max_output_tokens"]


def test_the_commands_work_in_the_order_of_the_page(server: RunningProxy) -> None:
    lines = [line for line in shell_lines(".venv/bin/python") if "copy-ledger" not in line]
    assert len(lines) == 16
    for line in lines:
        next_year = str(date.today() + timedelta(days=365))
        line = re.sub(r"(?<=--expires )\S+", next_year, line.partition("  #")[0])
        words = [word.strip('"') for word in re.findall(r'"[^"]*"|\S+', line)][2:]
        if words[:2] in (["account", "link"], ["account", "operator"]) and not HAS_CONSOLE:
            continue
        done = server.run(*words)
        assert done.returncode == 0, (line, done.stdout, done.stderr)


def test_check_says_of_the_shipped_files_that_they_are_well(tmp_path: Path) -> None:
    for name in ("config.yaml", "models.yaml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    done = run_program(tmp_path / "config.yaml", "check")
    assert done.returncode == 0, done.stdout + done.stderr


# ---- The reference is complete


def test_every_key_of_the_two_files_is_named() -> None:
    of_config = [
        *fields(core.Config, "file"), *fields(core.Tier), *fields(core.FreeCredits), *fields(core.Upstream, "name"),
    ]  # fmt: skip
    of_models = [
        *fields(core.Catalog), *fields(core.PriceTier), *fields(core.Model, "name"), *fields(core.Deprecation),
    ]  # fmt: skip
    assert names_missing("config.yaml", of_config) == []
    assert names_missing("models.yaml", of_models) == []


def test_every_api_that_an_upstream_may_serve_is_named() -> None:
    assert names_missing("config.yaml", [path for path, api in core.APIS.items() if not api.part_of]) == []
    assert names_missing("Endpoints", [f"/v1/{path}" for path in core.APIS if "/" not in path]) == []


def test_every_key_of_the_console_is_named() -> None:
    config = pytest.importorskip("extras.console.config")
    names = [*fields(config.ConsoleConfig), *fields(config.Pack), *fields(config.Mail)]
    assert names_missing("config.yaml", ["from" if name == "sender" else name for name in names]) == []


@pytest.mark.parametrize(
    ("kind", "title"), [(core.Config, "config.yaml"), (core.Upstream, "config.yaml"), (core.Catalog, "models.yaml")]
)
def test_defaults_are_what_the_table_says(kind: Any, title: str) -> None:
    """Of plain values; each has a row of its own, with the default in its second column."""
    for field in msgspec.structs.fields(kind):
        if isinstance(field.default, str | int | float):
            row = re.search(rf"^\| `{field.name}` \| ([^|]*) \|", section(title), re.MULTILINE)
            assert row and row[1].strip("`") == str(field.default), (field.name, row and row[1])


def test_every_error_code_is_named_with_its_status() -> None:
    rows = section("Errors").splitlines()
    for code, (status, _) in core.CODES.items():
        (row,) = (row for row in rows if row.startswith("|") and f"`{code}`" in row.split("|")[2])
        assert row.split("|")[1].strip() == ("any 4xx" if code == "upstream_refused" else str(status)), code


def test_every_column_of_the_log_is_named_in_its_order(server: RunningProxy, key: str) -> None:
    server.client(key).get("/v1/models")
    columns = list(json.loads(server.wait_for_line(r'"request_id"')))
    assert re.findall(r"`(\w+)`", " ".join(re.findall(r"(?m)^\| (`[^|]*) \|", section("The log")))) == columns


def test_every_metric_is_named(server: RunningProxy, key: str) -> None:
    text = server.client(None).get("/metrics").body.decode()
    names = re.findall(r"(?m)^# TYPE (\S+)", text)
    assert len(names) > 10 and names_missing("Metrics", names) == []


def test_every_header_of_an_answer_is_named(server: RunningProxy) -> None:
    alice = server.add_account(100, tier="pro")
    request = {"model": "echo", "messages": [{"role": "user", "content": "Hello"}]}
    answer = server.client(alice.key).post("/v1/chat/completions", request)
    named = section("Response headers").lower()
    missing = [name for name in answer.headers if name.lower() not in HTTP_HEADERS and f"`{name.lower()}`" not in named]
    assert missing == [] and "x-credits-charged" in {name.lower() for name in answer.headers}


def test_every_marker_of_the_tests_is_named() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    markers = [line.partition(":")[0] for line in project["tool"]["pytest"]["ini_options"]["markers"]]
    assert names_missing("Tests", [f"pytest -m {marker}" for marker in markers]) == []
