"""Both files are checked whole at start: a mistake is named with file, line, key and what would be right."""

import os
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import CommandServer, run_program
from tests.support.process import RunningProxy
from tests.support.typed_files import CONFIG, MODELS, type_files


@pytest.fixture
def checked(tmp_path: Path, commands: CommandServer) -> Callable[..., Any]:
    """Runs `check` on these files, in a folder that was in use before the mistake."""

    def run(config: str = CONFIG, models: str = MODELS) -> Any:
        path = type_files(tmp_path)
        assert commands.run("--config", str(path), "account", "add", "ada").returncode == 0
        return commands.run("--config", str(type_files(tmp_path, config, models)), "check")

    return run


def assert_explained(done: Any, *parts: str) -> None:
    """Exit 2, on stderr only, without a traceback, with all these parts."""
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    for part in parts:
        assert re.search(part, done.stderr), (part, done.stderr)


def line_of(text: str, part: str) -> str:
    """A pattern for file:line."""
    number = next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)
    return rf"\b{number}\b"


CONFIG_MISTAKES = {
    "unknown key": ("listen:", "lisen:", ["lisen", "listen"]),
    "unknown key of a tier": ("parallel: 4", "paralel: 4", ["paralel", "parallel"]),
    "unknown key of an upstream": ("base_url:", "base_ulr:", ["base_ulr", "base_url"]),
    "unknown key of the free credits": ("days: 30", "day: 30", ["day", "days"]),
    "unknown default tier": ("default_tier: free", "default_tier: fee", ["default_tier", "fee", "free"]),
    "duplicate key": ("database: proxy.db", "database: proxy.db\ndatabase: other.db", ["database", "(?i)twice|dupl"]),
    "duplicate tier": ("  unlimited: {}", "  unlimited: {}\n  free: {}", ["free", "(?i)twice|dupl"]),
    "a word for a number": ("amount: 1000", "amount: many", ["amount", "many|number|str"]),
    "a negative number": ("parallel: 4", "parallel: -4", ["parallel"]),
    "a number for a word": ("database: proxy.db", "database: 7", ["database"]),
    "a list for a mapping": ("{builtin: echo}", "[builtin]", ["echo"]),
    "an unknown builtin": ("builtin: echo", "builtin: ecko", ["builtin", "echo"]),
    "no port to listen on": ("listen: 127.0.0.1:0", "listen: localhost", ["listen"]),
    "a port that is none": ("listen: 127.0.0.1:0", "listen: 127.0.0.1:99999", ["listen"]),
    "a base_url that is none": ("http://127.0.0.1:1/v1", "127.0.0.1", ["base_url", "http"]),
    "an unknown log format": ("log: text", "log: xml", ["log", "text", "json"]),
    "an unknown metrics": ("models: models.yaml", "models: models.yaml\nmetrics: on", ["metrics", "loopback"]),
}


@pytest.mark.parametrize("mistake", CONFIG_MISTAKES)
def test_a_mistake_in_config_yaml_is_named(checked: Callable[..., Any], mistake: str) -> None:
    right, wrong, parts = CONFIG_MISTAKES[mistake]
    text = CONFIG.replace(right, wrong, 1)
    where = "free: {}" if mistake == "duplicate tier" else wrong.splitlines()[-1]
    assert_explained(checked(config=text), r"config\.yaml", line_of(text, where), *parts)


MODEL_MISTAKES = {
    "unknown key": ("aliases: [llama]", "alias: [llama]", ["llama3.2:3b", "alias", "aliases"]),
    "unknown tier": ("{tier: mid", "{tier: midd", ["qwen:7b", "midd", "mid"]),
    "unknown upstream": ("upstream: ollama,", "upstream: olama,", ["llama3.2:3b", "olama", "ollama"]),
    "unknown upstream in a list": ("[ollama, echo]", "[ollama, eco]", ["qwen:7b", "eco", "echo"]),
    "no tier": ("qwen:7b: {tier: mid, ", "qwen:7b: {", ["qwen:7b", "tier"]),
    "no upstream": ("{tier: lightweight, upstream: echo}", "{tier: lightweight}", ["echo", "upstream"]),
    "duplicate model": ("  echo: {", "  echo: {tier: mid, upstream: echo}\n  echo: {", ["echo", "(?i)twice|dupl"]),
    "negative multiplier": ("multiplier: 1.5", "multiplier: -1.5", ["multiplier"]),
    "four decimals": ("multiplier: 1.5", "multiplier: 1.5001", ["multiplier"]),
    "a multiplier that is no number": ("multiplier: 1.5", "multiplier: .nan", ["multiplier"]),
    "an endless multiplier": ("multiplier: 1.5", "multiplier: .inf", ["multiplier"]),
    "a true multiplier": ("multiplier: 1.5", "multiplier: true", ["multiplier"]),
    "negative multiplier of a model": ("{tier: mid,", "{tier: mid, multiplier: -1,", ["qwen:7b", "multiplier"]),
    "four decimals of a model": ("{tier: mid,", "{tier: mid, multiplier: 0.0005,", ["qwen:7b", "multiplier"]),
    "an alias of two models": ("{tier: mid,", "{tier: mid, aliases: [llama],", ["llama", "qwen:7b"]),
    "an alias that is a model": ("{tier: mid,", "{tier: mid, aliases: [echo],", ["echo", "qwen:7b"]),
    "an id that YAML reads as true": ("  qwen:7b:", "  on:", ["(?i)quote"]),
    "an id that YAML reads as a number": ("  qwen:7b:", "  3:27:", ["(?i)quote"]),
    "an id that is a date": ("  qwen:7b:", "  2026-01-01:", ["(?i)quote"]),
    "no room in the window": ("{tier: mid,", "{tier: mid, context_window: 0,", ["qwen:7b", "context_window"]),
    "a window that is text": ("{tier: mid,", "{tier: mid, context_window: big,", ["qwen:7b", "context_window"]),
}


@pytest.mark.parametrize("mistake", MODEL_MISTAKES)
def test_a_mistake_in_models_yaml_is_named(checked: Callable[..., Any], mistake: str) -> None:
    right, wrong, parts = MODEL_MISTAKES[mistake]
    text = MODELS.replace(right, wrong, 1)
    assert text != MODELS
    assert_explained(checked(models=text), r"models\.yaml", line_of(text, wrong.splitlines()[-1]), *parts)


DEPRECATIONS = {
    "too soon": "{announced: 2026-01-01, sunset: 2026-01-30, replacement: echo}",
    "backwards": "{announced: 2026-03-01, sunset: 2026-01-01, replacement: echo}",
    "no date": "{announced: 2026-01-01, sunset: soon, replacement: echo}",
    "unknown replacement": "{announced: 2026-01-01, sunset: 2026-06-01, replacement: ecko}",
}


@pytest.mark.parametrize("mistake", DEPRECATIONS)
def test_a_mistake_in_a_deprecation_is_named(checked: Callable[..., Any], mistake: str) -> None:
    text = MODELS.replace("{tier: mid,", f"{{tier: mid, deprecated: {DEPRECATIONS[mistake]},")
    done = checked(models=text)
    if mistake == "unknown replacement" and done.returncode != 2:
        pytest.skip("the specification does not say that a replacement must be a model of the catalog")
    assert_explained(done, r"models\.yaml", line_of(text, "deprecated"), "qwen:7b")


def test_dates_may_be_yaml_or_iso(running_proxy: Callable[..., RunningProxy]) -> None:
    days = {"announced": "2026-01-01", "sunset": "2026-01-31", "replacement": "plain"}
    dates = {name: date.fromisoformat(day) if day != "plain" else day for name, day in days.items()}
    models = {
        name: {"tier": "one", "upstream": "main", "deprecated": d} for name, d in (("iso", days), ("yaml", dates))
    }
    proxy = running_proxy(models=models)
    account = proxy.add_account()
    assert [proxy.client(account.key).chat(model=name).status for name in models] == [410, 410]  # both are past


@pytest.mark.parametrize("name", ["config.yaml", "models.yaml"])
@pytest.mark.parametrize("text", ["a: [", "\tx: 1\n", "- 1\n- 2\n", "just words", "a: *nobody", "\x00"])
def test_a_file_that_is_no_yaml_mapping_is_named(checked: Callable[..., Any], name: str, text: str) -> None:
    which = "config" if name == "config.yaml" else "models"
    assert_explained(checked(**{which: text}), re.escape(name))


@pytest.mark.parametrize("name", ["config.yaml", "models.yaml"])
def test_an_absent_file_is_named(tmp_path: Path, commands: CommandServer, name: str) -> None:
    path = type_files(tmp_path)
    (tmp_path / name).unlink()
    assert_explained(commands.run("--config", str(path), "check"), re.escape(name))


def test_serve_refuses_what_check_refuses(tmp_path: Path) -> None:
    done = run_program(type_files(tmp_path, CONFIG.replace("listen:", "lisen:")), "serve")
    assert_explained(done, r"config\.yaml", "lisen")
    assert done.stdout == "" and not (tmp_path / "proxy.db").exists()


def test_a_mistake_is_found_before_the_first_start(tmp_path: Path, commands: CommandServer) -> None:
    path = type_files(tmp_path, models=MODELS.replace("{tier: mid,", "{tier: midd,"))
    done = commands.run("--config", str(path), "check")
    assert_explained(done, r"models\.yaml", "midd")


def test_metrics_may_be_off(running_proxy: Callable[..., RunningProxy]) -> None:
    """Also unquoted, as the documentation writes it: YAML reads `off` as false."""
    proxy = running_proxy(options={"metrics": yaml.safe_load("off")})
    assert 400 <= proxy.client(None).get("/metrics").status < 500


def test_the_shortest_config_works(tmp_path: Path, commands: CommandServer) -> None:
    """What is absent has a default."""
    config = "listen: 127.0.0.1:0\ntiers: {free: {}}\nupstreams: {echo: {builtin: echo}}\n"
    models = "tiers: {t: {multiplier: 1}}\nmodels: {echo: {tier: t, upstream: echo}}\n"
    path = type_files(tmp_path, config, models)
    for command in (["account", "add", "ada"], ["check"]):
        done = commands.run("--config", str(path), *command)
        assert done.returncode == 0, done.stdout + done.stderr


def test_variables_are_replaced_in_string_values(
    running_proxy: Callable[..., RunningProxy], fake_upstream: Any
) -> None:
    upstream = fake_upstream()
    door = {"base_url": f"http://${{HOST_OF_IT:-127.0.0.1}}:{upstream.port}/v1", "api_key": "pre-${THE_KEY}"}
    proxy = running_proxy(
        upstreams={"named": door},
        models={"variable": {"tier": "one", "upstream": "named"}},
        environment={"THE_KEY": "s3cret"},
    )
    account = proxy.add_account(tier="unlimited")
    assert proxy.client(account.key).chat(model="variable").status == 200
    assert upstream.posts[0].headers["authorization"] == "Bearer pre-s3cret"
    assert "s3cret" not in proxy.output


def test_an_unset_or_empty_variable_turns_its_upstream_off(
    running_proxy: Callable[..., RunningProxy], fake_upstream: Any
) -> None:
    upstream = fake_upstream()
    variables = ("UNSET_KEY", "EMPTY_KEY")
    doors = {name.lower(): {"base_url": upstream.url, "api_key": f"${{{name}}}"} for name in variables}
    models = {f"by-{door}": {"tier": "one", "upstream": [door, "main"]} for door in doors}
    proxy = running_proxy(upstreams=doors, models=models, environment={"EMPTY_KEY": ""})
    account = proxy.add_account()
    assert [proxy.client(account.key).chat(model=model).status for model in models] == [200, 200]  # by `main`
    assert (upstream.posts, len(proxy.upstream.posts)) == ([], 2)
    for name in variables:
        proxy.wait_for_line(name)
        assert sum(name in line for line in proxy.lines) == 1


def test_paths_are_relative_to_the_config_file(tmp_path: Path, commands: CommandServer) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    done = commands.run("--config", os.path.relpath(type_files(folder)), "account", "add", "ada")
    assert done.returncode == 0, done.stderr
    assert (folder / "proxy.db").exists()
