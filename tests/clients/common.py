"""What the client scripts share. Each runs by hand against any proxy:

    PROXY_BASE_URL=http://127.0.0.1:8000/v1 PROXY_KEY=sk-... python tests/clients/openai_sync.py

PROXY_MODEL is the model to talk to (`echo` if unset) and PROXY_EMBEDDING_MODEL one for embeddings. The keys
and the model that the refusals need are PROXY_POOR_KEY (an account without credits), PROXY_LIMITED_KEY (one
request a minute) and PROXY_DOWN_MODEL (a model whose upstream does not answer). What is not set is skipped,
and said so.
"""

import functools
import importlib.metadata
import os
import re
import socket
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

BASE_URL = os.environ["PROXY_BASE_URL"]
KEY = os.environ["PROXY_KEY"]
MODEL = os.environ.get("PROXY_MODEL", "echo")
EMBEDDING_MODEL = os.environ.get("PROXY_EMBEDDING_MODEL", "")
QUESTION = "What is the capital of France? Answer in one sentence."
MAX_TOKENS = 16
CODES = {  # of a refusal, by its status
    401: "invalid_api_key",
    402: "insufficient_credits",
    404: "model_not_found",
    429: "rate_limit_exceeded",
    503: "upstream_unavailable",
}
CLIENT_TRIES = 3  # an official client's first try and its two retries


def print_versions(*packages: str) -> None:
    print("versions:", ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages))


class Counter:
    """A forwarder in front of the proxy that counts what a client posts: its retries show."""

    def __init__(self, target: str = BASE_URL) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.posts = 0
        self.base_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}{parts.path}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._target)
            threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with source, sink:
            try:
                while data := source.recv(65536):
                    self.posts += counts and len(re.findall(rb"^POST /", data, re.MULTILINE))
                    sink.sendall(data)
                sink.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the other pump closed them


class Refusal(NamedTuple):
    """What is wrong with a request, what its message must say, and how often a client may post it."""

    name: str
    status: int
    says: str
    key: str | None
    model: str | None
    posts_max: int


def refusals() -> list[Refusal]:
    setting = os.environ.get
    poor, limited, down = setting("PROXY_POOR_KEY"), setting("PROXY_LIMITED_KEY"), setting("PROXY_DOWN_MODEL")
    return [
        Refusal("wrong key", 401, r"\bkey\b", "sk-" + "0" * 43, MODEL, 1),
        Refusal("no credits", 402, r"\bcredits\b", poor, MODEL, 1),
        Refusal("unknown model", 404, r"no-such-model", KEY, "no-such-model", 1),
        Refusal("rate limit", 429, r"a minute|per minute|seconds?\b", limited, MODEL, 1),
        Refusal("upstream down", 503, r"upstream|reach|connect", KEY, down, CLIENT_TRIES),
    ]


def check_refusals(ask: Callable[[str, str, str, bool], Any], raises: Mapping[str, type[Exception]]) -> None:
    """Each refusal raises the right exception, with a message to act on, after no more tries than can help.

    `ask(base_url, key, model, retries)` is one chat with the client at hand; with `retries` false it must not
    try again: after a rate limit that may help, but a minute is too long to wait for here.
    """
    for refusal in refusals():
        if refusal.key is None or refusal.model is None:
            print(f"{refusal.name}: skipped, its environment variable is not set")
            continue
        counter = Counter()
        arguments = (counter.base_url, refusal.key, refusal.model, refusal.status != 429)
        error = provoke(refusal, functools.partial(ask, *arguments))
        right = raises[refusal.name]
        assert isinstance(error, right), f"{refusal.name}: {error!r} is no {right.__name__}"
        assert re.search(refusal.says, str(error)), f"{refusal.name}: {error} does not say {refusal.says!r}"
        tries = counter.posts if refusal.status != 429 else 1
        assert 1 <= tries <= refusal.posts_max, f"{refusal.name}: posted {tries} times"
        print(f"{refusal.name}: {type(error).__name__} after {tries}: {error}")


def provoke(refusal: Refusal, ask: Callable[[], Any]) -> Exception:
    """The exception. One a minute may take three: the first is admitted, and a minute may begin between."""
    for _ in range(3 if refusal.status == 429 else 1):
        try:
            ask()
        except Exception as error:  # of any class: the caller judges
            return error
    raise AssertionError(f"{refusal.name}: not refused")
