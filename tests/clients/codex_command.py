"""Codex (npm: @openai/codex): one prompt. CODEX is its program, `codex` if unset.

Instructions of its user's and no tools make its request some hundred tokens, instead of 6,500: a small model's context
holds it. CODEX_HOME and HOME are a folder of its own, so that nobody's settings or log-in matter.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from common import BASE_URL, KEY, MODEL, QUESTION, Counter

CODEX = os.environ.get("CODEX", "codex")
CONFIG = """
model = "{model}"
model_provider = "proxy"
model_instructions_file = "{home}/instructions.md"
web_search = "disabled"
include_permissions_instructions = false
include_environment_context = false

[skills.bundled]
enabled = false

[model_providers.proxy]
name = "proxy"
base_url = "{base_url}"
env_key = "PROXY_KEY"
wire_api = "responses"
request_max_retries = 0
stream_max_retries = 0
"""
OFF = ["shell_tool", "unified_exec", "multi_agent", "plugins", "apps", "goals", "image_generation", "view_image"]
MINIMAL = [option for feature in OFF for option in ("--disable", feature)]


def codex(base_url: str, key: str, model: str) -> subprocess.CompletedProcess[str]:
    command = [CODEX, "exec", "--ephemeral", "--skip-git-repo-check", "--sandbox", "read-only", *MINIMAL, QUESTION]
    with tempfile.TemporaryDirectory() as home:
        Path(home, "config.toml").write_text(CONFIG.format(model=model, home=home, base_url=base_url))
        Path(home, "instructions.md").write_text("Answer briefly.\n")
        environment = {"PATH": os.environ["PATH"], "HOME": home, "CODEX_HOME": home, "PROXY_KEY": key}
        options = {"capture_output": True, "text": True, "timeout": 100}
        return subprocess.run(command, env=environment, cwd=home, stdin=subprocess.DEVNULL, check=False, **options)


def main() -> None:
    print("versions:", subprocess.check_output([CODEX, "--version"], text=True).strip())
    counter = Counter()
    done = codex(counter.base_url, KEY, MODEL)
    assert done.returncode == 0 and done.stdout.strip(), done.stdout + done.stderr
    print(f"posted {counter.posts}: {done.stdout.strip()[:60]!r}")
    refused = codex(BASE_URL, KEY, "no-such-model")
    assert refused.returncode != 0 and "no-such-model" in refused.stderr, refused
    print(f"unknown model: exit {refused.returncode}: {refused.stderr.strip().splitlines()[-1][:120]}")


if __name__ == "__main__":
    main()
