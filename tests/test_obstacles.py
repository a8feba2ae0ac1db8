"""A locked database, a full disk, a log that cannot be written: what is not paid is not given, and all recovers."""

import contextlib
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import Client
from tests.support.commands import PROXY, proxy_environment
from tests.support.errors import assert_error, error_frame
from tests.support.process import RunningProxy
from tests.support.waiting import WAIT_SECONDS, wait_until

pytestmark = pytest.mark.long

MakeProxy = Callable[..., RunningProxy]


# -- The database


@contextlib.contextmanager
def locked(proxy: RunningProxy) -> Iterator[None]:
    """Somebody else writes to the database and does not come to an end."""
    with proxy.ledger.locked():
        yield


@contextlib.contextmanager
def full_disk(proxy: RunningProxy) -> Iterator[None]:
    """No file of the server can grow: what a full disk looks like to it."""
    if proxy.ledger.is_postgres:
        pytest.skip("the disk is another machine's")
    before = resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE)
    resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        yield
    finally:
        resource.prlimit(proxy.process.pid, resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def hindered(module_proxy: MakeProxy) -> RunningProxy:
    """A proxy whose database these tests hinder."""
    return module_proxy()


OBSTACLES = {"locked": locked, "full disk": full_disk}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_ledger_that_takes_no_writes_relays_nothing_and_recovers(hindered: RunningProxy, obstacle: str) -> None:
    proxy = hindered
    proxy.upstream.reset()
    account = proxy.add_account(100)
    client = proxy.client(account.key)
    assert client.chat().status == 200
    with OBSTACLES[obstacle](proxy):
        for stream in (False, True):
            assert_error(client.chat(stream=stream), 503, "ledger_unavailable", "server_error")
    assert len(proxy.upstream.posts) == 1
    assert client.chat().status == 200
    assert_books(proxy, account, credits=100 - 16)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_cannot_be_written_down_is_withheld_and_charged_later(hindered: RunningProxy, obstacle: str) -> None:
    """Neither the end of a stream nor a whole answer is given before it is paid. The late settle has a line of log."""
    proxy, answers = hindered, Answers(pause_after=0)
    proxy.upstream.reset(answers)
    account = proxy.add_account(20_000)
    client = proxy.client(account.key)
    with client.start_chat() as whole, client.stream_chat() as stream:
        stream.read_until(b"assistant")
        wait_until(lambda: len(proxy.upstream.posts) == 2, "both are under way")
        with OBSTACLES[obstacle](proxy):
            answers.resume.set()
            answer = stream.finish()
            assert error_frame(answer)["code"] == "ledger_unavailable"
            assert_error(whole.answered().finish(), 503, "ledger_unavailable", "server_error")
            proxy.wait_for_line(request_id := answer.headers["x-request-id"])
            before = len(proxy.lines)
    left = proxy.wait_until_settled(account)["credits"]
    assert left in (20_000 - 16, 20_000 - 8)  # the stream is paid; the answer that nobody got may be void
    assert re.search(r"(?i)settled", proxy.wait_for_line(request_id, after=before))
    assert_audit(proxy)


def test_a_lock_of_a_moment_is_waited_out(hindered: RunningProxy) -> None:
    proxy = hindered
    proxy.upstream.reset()
    account = proxy.add_account(100)
    with contextlib.ExitStack() as lock:
        lock.enter_context(locked(proxy))
        with proxy.client(account.key).start_chat() as pending:
            lock.close()
            assert pending.answered().finish().status == 200
    assert_books(proxy, account, credits=92)


# -- The log


@contextlib.contextmanager
def started_with_stderr(proxy: RunningProxy, stderr: Any) -> Iterator[int]:
    """`proxy.py serve` on the same files; its port. It must end well."""
    command = [sys.executable, str(PROXY), "--config", str(proxy.config)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=proxy_environment(), cwd=proxy.folder
    )
    assert process.stdout is not None
    try:
        lines = iter(process.stdout.readline, "")
        yield int(next(line for line in lines if line.startswith("listening on")).rpartition(":")[2])
        process.terminate()
        assert process.wait(WAIT_SECONDS) == 0
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def test_a_log_that_cannot_be_written_stops_nobody(running_proxy: MakeProxy) -> None:
    """The disk that is full is often the one with the log on it, and the one with the database too."""
    proxy = running_proxy()
    account = proxy.add_account(1000)
    proxy.terminate()
    with Path("/dev/full").open("w") as full, started_with_stderr(proxy, full) as port:
        client = Client(port, account.key)
        assert client.chat().status == 200
        assert client.chat(stream=True).clean
        with proxy.ledger.locked():
            assert client.get("/health").status == 503
        assert client.get("/health").status == 200
        assert client.balance == 1000 - 16
    assert_audit(proxy)
