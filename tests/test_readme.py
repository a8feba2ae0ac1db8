"""The README's snippets, run as they stand against a fresh server."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.books import assert_audit
from tests.support.process import RunningProxy

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
LISTENING = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    """The code blocks of a language, continued lines joined."""
    found = re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [block.replace("\\\n", " ") for block in found]


def shell_lines(word: str) -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line.startswith(word)]


def run(command: str | list[str], key: str) -> str:
    shell = isinstance(command, str)
    environment = {**os.environ, "KEY": key}
    done = subprocess.run(command, env=environment, shell=shell, capture_output=True, text=True, check=True, timeout=30)
    return done.stdout


@pytest.fixture
def owner(running_proxy: Callable[..., RunningProxy]) -> tuple[RunningProxy, str]:
    """A server as it is shipped, and the key that its first start printed."""
    tiers = {"free": {}, "pro": {"keys": 3}, "unlimited": {}}
    proxy = running_proxy(
        options={"free_credits": {"amount": 1000, "days": 30}, "tiers": tiers, "default_tier": "free"},
        models={"echo": {"tier": "half", "upstream": "echo"}},
    )
    key = re.search(r"sk-[A-Za-z0-9_-]{43}", "\n".join(proxy.stdout_lines))
    assert key
    return proxy, key[0]


def test_the_first_screen_shows_what_happens(owner: tuple[RunningProxy, str]) -> None:
    """A streamed answer, and a balance of 995 after it."""
    proxy, key = owner
    stream, balance = (run(line.replace(LISTENING, proxy.base_url), key) for line in shell_lines("curl"))
    assert stream.endswith("data: [DONE]\n\n") and '"prompt_tokens":5,"completion_tokens":5' in stream
    assert json.loads(balance)["credits"] == 995
    assert_audit(proxy)


def test_the_python_snippet_prints_the_answer(owner: tuple[RunningProxy, str]) -> None:
    proxy, key = owner
    (snippet,) = blocks("python")
    assert (
        run([sys.executable, "-c", snippet.replace(LISTENING, proxy.base_url).replace("sk-...", key)], key) == "Hello"
    )
    assert_audit(proxy)


def test_the_commands_work_in_the_order_of_the_page(owner: tuple[RunningProxy, str]) -> None:
    proxy, _ = owner
    lines = [line.partition("#")[0].split() for line in shell_lines(".venv/bin/python")]
    assert len(lines) == 6
    for words in sorted(lines, key=lambda words: words[2] not in ("account", "credit", "key")):
        done = proxy.run(*words[2:])
        assert words[2] == "check" or done.returncode == 0, done.stderr
