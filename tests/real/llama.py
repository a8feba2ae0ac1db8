"""llama.cpp's own server as a process, and the models that a proxy in front of it offers."""

import json
import re
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from fetch import model_path

MULTIPLIER = 1.5  # of the chat model
CONTEXT_TOKENS = 2048  # of one of the server's slots, see serve_llama.py
MODELS: dict[str, Any] = {
    "smollm2": {
        "tier": "mid",
        "upstream": "llama",
        "upstream_model": "smollm2-135m",
        "context_window": CONTEXT_TOKENS,
    },
    "smollm2-choice": {"tier": "mid", "upstream": "llama-of-choice", "upstream_model": "smollm2-135m"},
    "smollm2-embedding": {"tier": "half", "upstream": "llama", "kind": "embedding", "context_window": 512},
    "down": {"tier": "one", "upstream": "nobody"},
}


class Llama:
    """The server's process. It ends when its standard input does, so also when the tests are killed."""

    def __init__(self, log: Path) -> None:
        self._log = log
        script = Path(__file__).with_name("serve_llama.py")
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, str(script), str(model_path())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if found := re.match(r"listening on (\S+)", line):
                self.url = found[1]
                return
        pytest.fail(f"llama.cpp did not start:\n{log.read_text()}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            return json.load(answer)

    @property
    def busy_slots(self) -> int:
        """How many of its slots are generating."""
        return sum(slot["is_processing"] for slot in self.get("/slots"))

    @property
    def cancelled(self) -> int:
        """How many generations it has cut short, by its log.

        Not by its slots: each look at them restarts the second after which it looks whether a client that waits for
        a whole answer is still there, so that it never looks.
        """
        return self._log.read_text().count("cancel task")

    def stop(self) -> None:
        try:
            self._process.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
