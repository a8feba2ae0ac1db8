"""Claude Code (npm: @anthropic-ai/claude-code): one prompt. CLAUDE_CODE is its program, `claude` if unset.

A system prompt of its user's and no tools make its request some hundred tokens, instead of 20,000: a small model's
context holds it. HOME is a folder of its own, so that nobody's settings or log-in matter.
"""

import json
import os
import subprocess
import tempfile

from common import BASE_URL, KEY, MODEL, QUESTION, Counter

CLAUDE_CODE = os.environ.get("CLAUDE_CODE", "claude")
MINIMAL = ["--system-prompt", "Answer briefly.", "--tools", "", "--output-format", "json"]


def claude(base_url: str, key: str, model: str) -> subprocess.CompletedProcess[str]:
    command = [CLAUDE_CODE, "-p", QUESTION, "--model", model, *MINIMAL]
    with tempfile.TemporaryDirectory() as home:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": home,
            "ANTHROPIC_BASE_URL": base_url.removesuffix("/v1"),
            "ANTHROPIC_API_KEY": key,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        }
        options = {"capture_output": True, "text": True, "timeout": 100}
        return subprocess.run(command, env=environment, cwd=home, stdin=subprocess.DEVNULL, check=False, **options)


def main() -> None:
    print("versions: Claude Code", subprocess.check_output([CLAUDE_CODE, "--version"], text=True).strip())
    counter = Counter()
    done = claude(counter.base_url, KEY, MODEL)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["result"] and not said["is_error"], said
    usage = said["usage"]
    print(f"posted {counter.posts}; {usage['input_tokens']} + {usage['output_tokens']} tokens: {said['result'][:60]!r}")
    refused = claude(BASE_URL, KEY, "no-such-model")
    assert refused.returncode != 0 and "no-such-model" in refused.stdout + refused.stderr, refused
    print(f"unknown model: exit {refused.returncode}: {json.loads(refused.stdout)['result'][:120]}")


if __name__ == "__main__":
    main()
