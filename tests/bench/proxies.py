"""The proxy as a contestant: this checkout's or another's, with a console, or with its ledger on another database."""

import json
import secrets
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.contestants import HERE, Contestant, free_port, started

THIS = HERE.parent.parent / "proxy.py"
SQLITE = "proxy.db"
COMMAND_SECONDS_MAX = 20


@dataclass(frozen=True)
class Proxy:
    """A version of the proxy, and how it is configured."""

    name: str = "proxy"  # of a directory too; without spaces
    file: Path = THIS
    database: str = SQLITE
    console: bool = False

    @property
    def plain(self) -> bool:
        """Without any option: what is measured once is measured on these."""
        return self.database == SQLITE and not self.console

    @contextmanager
    def start(self, upstream_port: int, directory: Path, key: str | None = None) -> Iterator[Contestant]:
        """Run it with its books on; without a key it gets a new account whose credits do not run out."""
        port = free_port()
        self.write_files(upstream_port, port, directory)
        account = account_in(directory)
        if key is None:
            words = ("account", "add", account, "--tier", "unlimited", "--credits", "1000000000")
            key = str(self.command(directory, *words)["key"])
        arguments = [sys.executable, str(self.file), "--config", str(directory / "config.yaml")]
        with started(Contestant(self.name, port, key=key), arguments, directory) as contestant:
            yield contestant

    def write_files(self, upstream_port: int, port: int, directory: Path) -> None:
        """The proxy's two files: one model, one upstream, log and metrics on."""
        (directory / "models.yaml").write_text(
            "tiers:\n  bench: {multiplier: 1.0, title: Bench}\n"
            "models:\n  bench: {tier: bench, upstream: bench, context_window: 131072}\n"
        )
        (directory / "config.yaml").write_text(
            f"listen: 127.0.0.1:{port}\ndatabase: {json.dumps(self.database)}\nmodels: models.yaml\n"
            "default_tier: unlimited\nlog: text\nmetrics: loopback\ntiers:\n  unlimited: {}\n"
            f"upstreams:\n  bench: {{base_url: http://127.0.0.1:{upstream_port}/v1}}\n"
            + ("console: {registration: closed}\n" if self.console else "")
        )

    def command(self, directory: Path, *words: str) -> Any:
        """Run one of the proxy's own commands and return what it prints as JSON."""
        arguments = [sys.executable, str(self.file), "--config", str(directory / "config.yaml"), *words, "--json"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=COMMAND_SECONDS_MAX, cwd=directory)
        if not done.stdout:
            raise RuntimeError(f"{self.name}: proxy.py {' '.join(words)} failed: {done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def verdict_of_audit(self, directory: Path) -> str:
        """What the proxy says about its own books."""
        try:
            return "passes" if self.command(directory, "audit")["ok"] else "FAILS"
        except subprocess.TimeoutExpired:
            return "DOES NOT END"


def account_in(directory: Path) -> str:
    """The name of the account that belongs to a directory; new in every run, since a database may be older."""
    file = directory / "account"
    if not file.exists():
        file.write_text(f"bench-{secrets.token_hex(4)}")
    return file.read_text()


def is_proxy(name: str) -> bool:
    """Whether a contestant is the proxy; the goals are for those."""
    return name.split("-")[0] == "proxy"


def proxies(files: Sequence[Path], console: bool, database: str | None) -> list[Proxy]:
    """Each version of the proxy, and beside it the same with a console, or on another database, as asked for."""
    names = [f"proxy-{number}" for number in range(1, len(files) + 1)] if len(files) > 1 else ["proxy"]
    found = []
    for name, file in zip(names, files, strict=True):
        plain = Proxy(name, file)
        found.append(plain)
        if console:
            found.append(replace(plain, name=f"{name}-console", console=True))
        if database:
            found.append(replace(plain, name=f"{name}-db", database=database))
    return found
