"""The `llm` command: a prompt, streamed and not, and what it prints and exits with when it is refused.

It learns of the proxy's model from `extra-openai-models.yaml` in its own folder (LLM_USER_PATH);
without `api_key_name` there it sends no key of its user's.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import BASE_URL, KEY, MAX_TOKENS, MODEL, QUESTION, check_refusals, print_versions

LLM = Path(sys.executable).with_name("llm")
KNOWN_MODEL = """
- model_id: through-the-proxy
  model_name: {model}
  api_base: {base_url}
  api_key_name: proxy
"""


class CommandError(Exception):
    """What `llm` wrote to its standard error, having exited with a status that is not 0."""


def llm(base_url: str, key: str, model: str, *options: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "extra-openai-models.yaml")
        file.write_text(KNOWN_MODEL.format(model=model, base_url=base_url))
        command = [
            LLM,
            "-m",
            "through-the-proxy",
            "--key",
            key,
            "-o",
            "max_tokens",
            str(MAX_TOKENS),
            *options,
        ]
        environment = {**os.environ, "LLM_USER_PATH": folder}
        done = subprocess.run([*command, QUESTION], env=environment, capture_output=True, text=True, timeout=60)
    if done.returncode:
        assert "Traceback" not in done.stderr, done.stderr
        raise CommandError(done.stderr.strip())
    return done.stdout.strip()


def main() -> None:
    print_versions("llm", "openai")
    assert llm(BASE_URL, KEY, MODEL)
    assert llm(BASE_URL, KEY, MODEL, "--no-stream")
    names = ("wrong key", "no credits", "unknown model", "upstream down")
    # It has no option against retries, and its rate limit would be a minute's wait.
    os.environ.pop("PROXY_LIMITED_KEY", None)
    check_refusals(lambda *arguments: llm(*arguments[:3]), dict.fromkeys(names, CommandError))


if __name__ == "__main__":
    main()
