"""The fixtures: a proxy for the whole run with its scripted upstreams, proxies of a test's own, funded accounts.

The proxy under test is always `python proxy.py`, a process of its own; what the tests are made of stands in
tests/support/, a module an idea.

    def test_something(proxy, upstream, funded_key):  # one proxy for the whole run, its scripted upstream
        account = funded_key(credits=100)
        upstream.behaviour = Answers(tokens=3)
        answer = proxy.client(account.key).chat()
        assert_books(proxy, account, credits=100 - 8)

    def test_another(running_proxy):  # a proxy with a configuration, or a fate, of its own
        proxy = running_proxy(options={"max_body_mb": 1})
"""

import contextlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit
from tests.support.commands import CommandServer
from tests.support.exchange import Behaviour
from tests.support.files import MODELS, OPTIONS, UPSTREAM_KEY, write_files
from tests.support.process import Account, RunningProxy, Shared, proxies
from tests.support.upstream import FakeUpstream, LoopThread, RefusesConnections

pytest_plugins = ["tests.support.fixtures"]


@pytest.fixture(scope="session")
def loop_thread() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.stop()


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CommandServer]:
    server = CommandServer(tmp_path_factory.mktemp("commands"))
    yield server
    server.stop()


@contextlib.contextmanager
def upstreams(thread: LoopThread) -> Iterator[Callable[..., FakeUpstream]]:
    made: list[FakeUpstream] = []

    def make(behaviour: Behaviour | None = None) -> FakeUpstream:
        made.append(FakeUpstream(thread, behaviour))
        return made[-1]

    yield make
    for server in made:
        server.close()
        assert not server.errors, server.errors


@pytest.fixture
def fake_upstream(loop_thread: LoopThread) -> Iterator[Callable[..., FakeUpstream]]:
    """Makes upstreams of a test's own."""
    with upstreams(loop_thread) as make:
        yield make


@pytest.fixture
def running_proxy(
    tmp_path: Path, commands: CommandServer, fake_upstream: Callable[..., FakeUpstream]
) -> Iterator[Callable[..., RunningProxy]]:
    """Starts proxies of a test's own: see `proxies`."""
    with proxies(tmp_path, commands, fake_upstream) as start:
        yield start


@pytest.fixture(scope="module")
def module_proxy(
    tmp_path_factory: pytest.TempPathFactory, commands: CommandServer, loop_thread: LoopThread
) -> Iterator[Callable[..., RunningProxy]]:
    """Starts proxies that the tests of a module share: see `proxies`."""
    with upstreams(loop_thread) as make, proxies(tmp_path_factory.mktemp("module"), commands, make) as start:
        yield start


@pytest.fixture(scope="session")
def shared(
    tmp_path_factory: pytest.TempPathFactory, loop_thread: LoopThread, commands: CommandServer
) -> Iterator[Shared]:
    main, backup, nobody = FakeUpstream(loop_thread), FakeUpstream(loop_thread), RefusesConnections()
    upstreams = {
        "echo": {"builtin": "echo"},
        "main": {"base_url": main.url, "api_key": UPSTREAM_KEY, "headers": {"x-team": "blue"}},
        "backup": {"base_url": backup.url},
        "impatient": {"base_url": main.url, "first_byte_seconds": 0.2, "idle_seconds": 0.2},
        "silent": {"base_url": main.url, "usage_in_stream": "never"},
        "absent": {"base_url": nobody.url},
        "off": {"base_url": main.url, "api_key": "${SURELY_UNSET_VARIABLE}"},
    }
    config = write_files(tmp_path_factory.mktemp("shared"), {**OPTIONS, "upstreams": upstreams}, MODELS)
    proxy = RunningProxy(config, commands, main)
    try:
        yield Shared(proxy.start(), main, backup)
        audit = assert_audit(proxy)
        assert (audit["held"], audit["open_requests"]) == (0, 0), audit
        proxy.close()
    finally:
        if proxy.process.poll() is None:
            proxy.kill()
        for server in (main, backup, nobody):
            server.close()


@pytest.fixture
def proxy(shared: Shared) -> Iterator[RunningProxy]:
    """The shared proxy; its upstreams behave well until a test says otherwise."""
    shared.main.reset()
    shared.backup.reset()
    yield shared.proxy
    shared.proxy.assert_well()
    assert not shared.main.errors and not shared.backup.errors, (shared.main.errors, shared.backup.errors)


@pytest.fixture
def upstream(proxy: RunningProxy, shared: Shared) -> FakeUpstream:
    """The upstream `main` of the shared proxy."""
    return shared.main


@pytest.fixture
def backup(proxy: RunningProxy, shared: Shared) -> FakeUpstream:
    """The upstream `backup` of the shared proxy."""
    return shared.backup


@pytest.fixture
def paused(proxy: RunningProxy, upstream: FakeUpstream) -> Iterator[Callable[..., Answers]]:
    """Makes a behaviour that pauses, and lets it go on after the test whatever happens."""
    made: list[Answers] = []

    def make(**knobs: Any) -> Answers:
        made.append(Answers(**knobs))
        upstream.behaviour = made[-1]
        return made[-1]

    yield make
    for answers in made:
        answers.resume.set()


@pytest.fixture
def funded_key(proxy: RunningProxy) -> Callable[..., Account]:
    """Makes an account of the shared proxy: `funded_key(credits=100, tier="unlimited")`."""

    def make(credits: float = 100.0, tier: str | None = None) -> Account:
        return proxy.add_account(credits, tier)

    return make


@pytest.fixture
def seed() -> str:
    seed = os.environ.get("CHAOS_SEED") or str(random.SystemRandom().randrange(10**6))
    print(f"CHAOS_SEED={seed}")
    return seed


@pytest.fixture
def tell(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Say a line: where everybody sees it in the long form, which runs only if asked for."""
    if request.node.get_closest_marker("chaos") is None:
        return print
    if "chaos" not in request.config.getoption("markexpr"):
        pytest.skip("the long form; run it with `pytest -m chaos`")

    def say(line: str) -> None:
        with capsys.disabled():
            print(f"\n{line}", end="")

    return say
