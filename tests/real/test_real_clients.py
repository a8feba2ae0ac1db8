"""Real clients against the proxy and a real model: each script of tests/clients must exit with 0.

A client that is not installed is skipped, and said so. litellm needs an older openai than the others take:
LITELLM_PYTHON names the interpreter that has it, ANTHROPIC0_PYTHON one that has `anthropic` 0.x. NODE_PATH names the
folder that has the npm package, CLAUDE_CODE and CODEX the two programs.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.books import assert_books
from tests.support.commands import REPOSITORY, clean_environment
from tests.support.process import Account, RunningProxy

pytest_plugins = ["real_fixtures"]
pytestmark = pytest.mark.real

SCRIPTS = REPOSITORY / "tests" / "clients"
CREDITS = 20_000.0
LITELLM_PYTHON = os.environ.get("LITELLM_PYTHON", sys.executable)
ANTHROPIC0_PYTHON = os.environ.get("ANTHROPIC0_PYTHON", sys.executable)
NODE = shutil.which("node") or "node"
PASSED_ON = ("NODE_PATH", "CLAUDE_CODE", "CODEX")
RUNS = "import os, subprocess as s; s.run([os.environ.get({!r}, {!r}), '--version'], check=True, timeout=30)"
HAS_ANTHROPIC = "import anthropic; assert anthropic.__version__.startswith({!r})"
CLIENTS = {  # script: what runs it, and a program that succeeds where the client is installed
    "openai_sync.py": (sys.executable, ["-c", "import openai"]),
    "openai_async.py": (sys.executable, ["-c", "import openai"]),
    "openai_helpers.py": (sys.executable, ["-c", "import openai"]),
    "llm_command.py": (sys.executable, ["-c", "import llm"]),
    "langchain_client.py": (sys.executable, ["-c", "import langchain_openai"]),
    "litellm_client.py": (LITELLM_PYTHON, ["-c", "import importlib.metadata as m; m.version('litellm')"]),
    "openai_node.cjs": (NODE, ["-e", "require('openai')"]),
    "openai_responses.py": (sys.executable, ["-c", "import openai"]),
    "anthropic_messages.py": (sys.executable, ["-c", HAS_ANTHROPIC.format("2.")]),
    "anthropic_messages.py 0.x": (ANTHROPIC0_PYTHON, ["-c", HAS_ANTHROPIC.format("0.")]),
    "claude_code.py": (sys.executable, ["-c", RUNS.format("CLAUDE_CODE", "claude")]),
    "codex_command.py": (sys.executable, ["-c", RUNS.format("CODEX", "codex")]),
}


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    extra = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", **environment}
    extra |= {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    command = [program, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=clean_environment(extra), check=False
    )


def skip_unless_installed(program: str, check: list[str], script: str) -> None:
    installed = shutil.which(program) is not None and run(program, *check).returncode == 0
    if not installed:
        pytest.skip(f"the client of {script} is not installed for {Path(program).name}")


@pytest.fixture
def account(real_proxy: RunningProxy) -> Account:
    return real_proxy.add_account(CREDITS)


@pytest.fixture
def environment(real_proxy: RunningProxy, account: Account) -> dict[str, str]:
    return {
        "PROXY_BASE_URL": f"{real_proxy.base_url}/v1",
        "PROXY_KEY": account.key,
        "PROXY_MODEL": "smollm2",
        "PROXY_EMBEDDING_MODEL": "smollm2-embedding",
        "PROXY_DOWN_MODEL": "down",
        "PROXY_POOR_KEY": real_proxy.add_account(0).key,
        "PROXY_LIMITED_KEY": real_proxy.add_account(CREDITS, tier="one-a-minute").key,
    }


@pytest.mark.parametrize("script", CLIENTS)
def test_a_client_works_through_the_proxy_and_says_what_is_wrong(
    script: str,
    real_proxy: RunningProxy,
    account: Account,
    environment: dict[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    program, check = CLIENTS[script]
    skip_unless_installed(program, check, script)
    done = run(program, str(SCRIPTS / script.split()[0]), **environment)
    with capsys.disabled():
        print(f"\n{script}\n{done.stdout}", end="")
    assert done.returncode == 0, done.stderr
    left = real_proxy.wait_until_settled(account)["credits"]
    assert 0 < left < CREDITS
    assert_books(real_proxy, account, left)
