"""The proxy under test: `python proxy.py serve`, a process of its own, reached over sockets.

Nothing here looks inside proxy.py. A proxy that prints a traceback, or ends without being told to, fails its test.
"""

import contextlib
import itertools
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
from openai import AsyncOpenAI, OpenAI

from tests.support.client import Client
from tests.support.commands import PROXY, CommandServer, proxy_environment
from tests.support.exchange import Behaviour
from tests.support.files import MODELS, OPTIONS, write_files
from tests.support.ledger import WHEN_ALONE, Ledger, box_program
from tests.support.upstream import FakeUpstream
from tests.support.waiting import WAIT_SECONDS, wait_until


@dataclass
class Account:
    """Somebody who may use the proxy."""

    name: str
    key: str
    key_id: Any
    credits: float


class RunningProxy:
    """`python proxy.py serve` on files of its own: a test may ask, stop, kill and start it again."""

    def __init__(
        self,
        config: Path,
        commands: CommandServer,
        upstream: FakeUpstream,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.commands, self.upstream = config, commands, upstream
        self.environment = dict(environment or {})
        self.ledger = Ledger(config)
        self.alone = True  # no other box is on its database
        self.program = box_program(WHEN_ALONE) if self.ledger.is_postgres else [sys.executable, str(PROXY)]
        self.was_killed = False
        self.lines: list[str] = []  # of both outputs, of every start
        self.stdout_lines: list[str] = []
        self.port = 0
        self._names = itertools.count(1)
        self._readers: list[threading.Thread] = []
        self._dead_on_purpose = False
        self._seen = 0  # lines that assert_well has looked at

    # -- the process

    def start(self) -> Self:
        self._dead_on_purpose = False
        lines_before = len(self.stdout_lines)
        command = [*self.program, "--config", str(self.config), "serve"]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=proxy_environment(self.environment),
            cwd=self.config.parent,
        )
        streams = (self.process.stdout, self.process.stderr)
        self._readers = [threading.Thread(target=self._read, args=(stream,), daemon=True) for stream in streams]
        for reader in self._readers:
            reader.start()

        def listening() -> re.Match[str] | None:
            if self.process.poll() is not None:
                pytest.fail(f"proxy.py ended with {self.process.returncode} at start:\n{self.output}")
            found = (re.search(r"listening on http://[^ :]+:(\d+)", line) for line in self.stdout_lines[lines_before:])
            return next(filter(None, found), None)

        self.port = int(wait_until(listening, "the line `listening on http://HOST:PORT`").group(1))
        if self.was_killed and self.ledger.is_postgres and self.alone:
            wait_until(self.ledger.is_recovered, "what was killed is recovered")
        return self

    def _read(self, stream: Any) -> None:
        with stream:
            for line in stream:
                if stream is self.process.stdout:
                    self.stdout_lines.append(line.rstrip("\n"))
                self.lines.append(line.rstrip("\n"))

    def wait(self, seconds: float = WAIT_SECONDS) -> int:
        """Wait for the end of the process; return its exit code (minus the signal that killed it)."""
        code = self.process.wait(seconds)
        for reader in self._readers:
            reader.join(WAIT_SECONDS)
        self._dead_on_purpose = True
        self.was_killed = code == -signal.SIGKILL
        return code

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def terminate(self) -> int:
        self.signal(signal.SIGTERM)
        return self.wait()

    def kill(self) -> int:
        self.signal(signal.SIGKILL)
        return self.wait()

    def restart(self) -> Self:
        """Stop it, if it runs, and start it again on the same files (on another port)."""
        if self.process.poll() is None:
            assert self.terminate() == 0, self.output
        return self.start()

    def assert_well(self) -> None:
        """It runs, unless the test ended it, and printed no traceback since the last time somebody asked."""
        fresh, self._seen = self.lines[self._seen :], len(self.lines)
        tracebacks = [number for number, line in enumerate(fresh) if line.startswith("Traceback (most recent call")]
        if tracebacks:
            pytest.fail("proxy.py printed a traceback:\n" + "\n".join(fresh[max(0, tracebacks[0] - 3) :][:60]))
        assert self._dead_on_purpose or self.process.poll() is None, f"proxy.py died:\n{self.output}"

    def close(self) -> None:
        if self.process.poll() is None:
            self.assert_well()
            assert self.terminate() == 0, self.output
        elif not self._dead_on_purpose:
            self.wait()
            pytest.fail(f"proxy.py died with {self.process.returncode}:\n{self.output}")
        self.assert_well()

    # -- what it says

    @property
    def output(self) -> str:
        return "\n".join(self.lines)

    def wait_for_line(self, pattern: str, after: int = 0) -> str:
        """A line of output that matches, the first `after` lines not counted."""

        def found() -> str | None:
            return next((line for line in self.lines[after:] if re.search(pattern, line)), None)

        return str(wait_until(found, f"a line like {pattern!r} in:\n{self.output}"))

    # -- the ways to talk to it

    @property
    def folder(self) -> Path:
        return self.config.parent

    @property
    def database(self) -> Path:
        """Its file, where the ledger is SQLite's."""
        return self.folder / "proxy.db"

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, key: str | None) -> Client:
        return Client(self.port, key)

    def openai(self, key: str, **options: Any) -> OpenAI:
        """The official client; `with` closes it."""
        return OpenAI(base_url=f"{self.base_url}/v1", api_key=key, max_retries=0, timeout=WAIT_SECONDS, **options)

    def async_openai(self, key: str, **options: Any) -> AsyncOpenAI:
        base_url = f"{self.base_url}/v1"
        return AsyncOpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=WAIT_SECONDS, **options)

    def run(self, *arguments: object) -> subprocess.CompletedProcess[str]:
        """A command on the same files, with its exit code and outputs."""
        return self.commands.run("--config", str(self.config), *map(str, arguments))

    def command(self, *arguments: object) -> Any:
        """A command that must succeed, with --json, decoded."""
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        return json.loads(done.stdout)

    def audit(self) -> dict[str, Any]:
        audit = self.command("audit")
        assert isinstance(audit, dict)
        return audit

    def account(self, name: str) -> dict[str, Any]:
        shown = self.command("account", "show", name)
        assert isinstance(shown, dict)
        return shown

    def add_account(self, credits_: float = 100.0, tier: str | None = None, name: str | None = None) -> Account:
        name = name or f"user-{next(self._names)}"
        options: list[object] = (
            ["--credits", f"{credits_:g}" if credits_ < 1e6 else str(int(credits_))] if credits_ else []
        )
        options += ["--tier", tier] if tier else []
        made = self.command("account", "add", name, *options)
        return Account(name, made["key"], made["key_id"], made["credits"])

    def wait_until_settled(self, account: Account) -> dict[str, Any]:
        """The account, as soon as nothing of it is held."""
        what = f"the holds of {account.name} resolve"
        return dict(wait_until(lambda: (s := self.account(account.name))["held"] == 0 and s, what))


@dataclass
class Shared:
    """The proxy that most tests share, and its upstreams."""

    proxy: RunningProxy
    main: FakeUpstream
    backup: FakeUpstream


@contextlib.contextmanager
def proxies(
    folder: Path, commands: CommandServer, make_upstream: Callable[..., FakeUpstream]
) -> Iterator[Callable[..., RunningProxy]]:
    """Starts proxies: `options` are laid over OPTIONS, `models` over MODELS, `upstreams` over `main`
    (`proxy.upstream`, scripted) and `echo`. Asserts that each ended well, with no traceback."""
    started: list[RunningProxy] = []

    def start(
        options: Mapping[str, Any] | None = None,
        models: Mapping[str, Any] | None = None,
        upstreams: Mapping[str, Any] | None = None,
        behaviour: Behaviour | None = None,
        environment: Mapping[str, str] | None = None,
        box: list[str] | None = None,
    ) -> RunningProxy:
        upstream = make_upstream(behaviour)
        home = folder / f"proxy-{len(started)}"
        home.mkdir()
        doors = {"echo": {"builtin": "echo"}, "main": {"base_url": upstream.url}, **(upstreams or {})}
        config = write_files(home, {**OPTIONS, "upstreams": doors, **(options or {})}, {**MODELS, **(models or {})})
        proxy = RunningProxy(config, commands, upstream, environment)
        if box is not None:  # one of several on its database
            proxy.alone, proxy.program = False, box
        started.append(proxy)
        return proxy.start()

    try:
        yield start
        for proxy in started:
            proxy.close()
    finally:
        for proxy in started:
            if proxy.process.poll() is None:
                proxy.kill()
