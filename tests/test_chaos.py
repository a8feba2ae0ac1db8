"""Everything goes wrong at once: the books still add up, to the token.

A storm is one proxy, an upstream that misbehaves and a hundred clients that misbehave, all by one seed, which is
printed (CHAOS_SEED repeats it as far as the machine's timing allows). Afterwards each request's row is compared
with what its upstream sent and what its client received. `pytest` runs storms of seconds, `pytest -m chaos` the
long form, which also prints its numbers.
"""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.books import assert_audit
from tests.support.client import Client, chat_request
from tests.support.commands import PROXY, clean_environment
from tests.support.exchange import Exchange
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS, WAIT_SECONDS, wait_until

MakeProxy = Callable[..., RunningProxy]
MakeUpstream = Callable[..., FakeUpstream]
CLIENTS = 100
CLIENTS_EACH = 10  # of one account; their requests differ in length, so that each row is known by its estimate
SLICE = 20
PATIENCE_SECONDS = 0.5  # of the proxy with the upstream
GROWTH_MB = 12  # what memory may gain from the first third of a storm to its end


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


# --------------------------------------------------------------------------------------------------
# What will go wrong

BEFORE_HEADERS = ("resets", "hangs up", "stalls", "400", "401", "429", "500", "503")
MIDWAY = ("resets", "breaks mid event", "hangs up", "ends", "stalls", "fails", "talks nonsense")
MANNERS = ("reads",) * 11 + ("reads slowly", "stalls", "leaves", "leaves", "leaves at once")


def estimate(texts: list[str]) -> int:
    """SPEC section 5's count of an answer: the larger of events with content and their bytes / 4."""
    texts = [text for text in texts if text]
    return max(len(texts), math.ceil(sum(len(text.encode()) for text in texts) / 4))


class Plan:
    """One request and all that befalls it, drawn from the seed and its number alone."""

    def __init__(self, seed: str, name: str) -> None:
        number = int(name[:-2])  # of the account's request; the last two digits are the account's
        draw = random.Random(f"{seed}/{name}")
        self.draw, self.name = draw, name
        self.content = name.ljust(8 + 4 * number, "x")
        self.estimate = 6 + number
        self.stream = draw.random() < 0.85
        self.wants_usage = draw.random() < 0.5
        self.model = draw.choice(("plain", "plain", "pair"))
        self.maximum = draw.choice((None, 5, 50, 5000))
        self.manner = draw.choice(MANNERS)
        self.patience = draw.randrange(3000)  # bytes, of a client that stalls or leaves
        # The upstream's part.
        size = draw.choice((0, 1, 5, 30, 30, 30, 200))
        self.words = ["w" * draw.choice((1, 4, 4, 4, 9)) for _ in range(size)]
        self.prompt_tokens = draw.randrange(1, 2 * self.estimate)
        self.usage = draw.choice(("closing", "closing", "finish", "every", "none"))
        self.newline = draw.choice((b"\n", b"\n", b"\r\n", b"\r"))
        self.padding = "p" * draw.choice((0, 0, 0, 4000))
        self.deaf = draw.random() < 0.1  # to the maximum
        self.fails_first = draw.choice(BEFORE_HEADERS) if draw.random() < 0.12 else None
        self.fails_midway = draw.choice(MIDWAY) if draw.random() < 0.25 else None
        self.fails_at = draw.randrange(size + 1)

    @property
    def request(self) -> dict[str, Any]:
        options = {"stream": True} if self.stream else {}
        if self.stream and self.wants_usage:
            options["stream_options"] = {"include_usage": True}  # type: ignore[assignment]
        if self.maximum:
            options["max_tokens"] = self.maximum  # type: ignore[assignment]
        return chat_request(self.content, self.model, **options)


# --------------------------------------------------------------------------------------------------
# The upstream's side


@dataclass
class Sent:
    """What an upstream sent in answer to one request."""

    texts: list[str] = field(default_factory=list)
    said: list[int] = field(default_factory=list)  # completion tokens, as usage named them


class Chaos:
    """An upstream that does what the plan of each request says; `calm` ones answer all requests well."""

    def __init__(self, seed: str, sent: dict[str, list[Sent]], calm: bool = False) -> None:
        self.seed, self.sent, self.calm = seed, sent, calm

    async def __call__(self, exchange: Exchange) -> None:
        plan = Plan(self.seed, exchange.json["messages"][0]["content"][:8])
        self.sent[plan.name].append(sent := Sent())
        if plan.fails_first and not self.calm:
            await self.fail(exchange, plan.fails_first)
        elif exchange.is_stream and plan.draw.random() < 0.97:
            await self.stream(exchange, plan, sent)
        else:
            await self.answer(exchange, plan, sent)

    async def fail(self, exchange: Exchange, how: str) -> None:
        if how.isdecimal():
            await exchange.answer({"error": {"message": "no", "type": "t"}}, int(how), headers={"retry-after": "1"})
        elif how == "resets":
            exchange.reset()
        elif how == "stalls":
            await exchange.stall()

    def words(self, exchange: Exchange, plan: Plan) -> list[str]:
        """Those that the maximum, which the proxy may have lowered, allows."""
        return plan.words if plan.deaf else plan.words[: exchange.json.get("max_tokens")]

    def chunk(self, plan: Plan, sent: Sent, choices: list[Any], usage: bool) -> bytes:
        data: dict[str, Any] = {"id": "x", "choices": choices, "padding": plan.padding}
        if usage:
            sent.said.append(len(sent.texts))
            tokens = {"prompt_tokens": plan.prompt_tokens, "completion_tokens": len(sent.texts)}
            data["usage"] = tokens
        return sse(data, plan.newline)

    async def stream(self, exchange: Exchange, plan: Plan, sent: Sent) -> None:
        fails = None if self.calm else plan.fails_midway
        await exchange.head()
        waiting = b""
        for number, word in enumerate(self.words(exchange, plan)):
            if fails and number == plan.fails_at:
                await exchange.send(waiting + b": so far\n\n")
                await self.fail_midway(exchange, plan, sent, fails)
                return
            sent.texts.append(word)
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
            waiting += self.chunk(plan, sent, [choice], plan.usage == "every")
            if plan.draw.random() < 0.4:
                edge = plan.draw.randrange(len(waiting))
                await exchange.send(waiting[: edge + 1])
                waiting = waiting[edge + 1 :]
                await asyncio.sleep(plan.draw.choice((0, 0, 0.001, 0.02)))
        await self.close(exchange, plan, sent, waiting)

    async def fail_midway(self, exchange: Exchange, plan: Plan, sent: Sent, how: str) -> None:
        if how == "breaks mid event":
            await exchange.send(b'data: {"choices":[{"delta":{"content":"lost')
        elif how == "fails":
            await exchange.send(sse({"error": {"message": "the engine died"}}, plan.newline) + sse(b"[DONE]"))
            await exchange.end()
        elif how == "talks nonsense":
            await exchange.send(b"data: {\xff\n\ndata: \n\nwhat\n\n")
            await exchange.end()
        elif how == "ends":
            await exchange.end()
        else:
            await self.fail(exchange, how)

    async def close(self, exchange: Exchange, plan: Plan, sent: Sent, waiting: bytes) -> None:
        """Finish reason, usage and, mostly, [DONE]."""
        finish = [{"index": 0, "delta": {}, "finish_reason": "stop"}]
        data = waiting + self.chunk(plan, sent, finish, plan.usage in ("finish", "every"))
        if plan.usage == "closing":
            data += self.chunk(plan, sent, [], usage=True)
        if plan.draw.random() < 0.9:
            data += sse(b"[DONE]", plan.newline)
        await exchange.send(data)
        await exchange.end()

    async def answer(self, exchange: Exchange, plan: Plan, sent: Sent) -> None:
        """Not streamed: an answer, or the beginning of one."""
        words = self.words(exchange, plan)
        sent.texts.append("".join(words))
        data: dict[str, Any] = {"choices": [{"message": {"content": sent.texts[0]}, "finish_reason": "stop"}]}
        if plan.usage != "none":
            sent.said.append(len(words))
            data["usage"] = {"prompt_tokens": plan.prompt_tokens, "completion_tokens": len(words)}
        body = json.dumps(data).encode()
        if plan.fails_midway and not self.calm:
            await exchange.head(content_type="application/json", length=len(body) + 9)
            await exchange.send(body)
            return
        await exchange.answer(body)


# --------------------------------------------------------------------------------------------------
# The clients' side. They read the socket themselves: aiohttp's client drops what it has received when a
# connection breaks, and what was received is what this is about.


@dataclass
class Wire:
    """All that came back for one request, as it stands on the wire."""

    raw: bytearray = field(default_factory=bytearray)

    @property
    def status(self) -> int:
        """0 until it is known."""
        return int(self.raw[9:12] or b"0")

    @property
    def request_id(self) -> str:
        match = re.search(rb"\r\nx-request-id: (\S+)\r\n", self.raw, re.IGNORECASE)
        return match[1].decode() if match else ""

    @property
    def body(self) -> bytes:
        """What came of the body, without HTTP's framing."""
        head, _, body = bytes(self.raw).partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" not in head.lower():
            return body
        plain, at = bytearray(), 0
        while match := re.compile(rb"([0-9a-fA-F]+)\r\n").match(body, at):
            end = match.end() + int(match[1], 16)
            plain += body[match.end() : end]
            at = end + 2
        return bytes(plain)


Misbehaviour = Callable[[], Awaitable[bool]]


async def ask(port: int, key: str, request: dict[str, Any], wire: Wire, leaves: Misbehaviour) -> None:
    """Send a chat and read what comes, as long as it comes; `leaves` is asked after each read."""
    body = json.dumps(request).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {key}\r\nConnection: close"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=4096)
    try:
        writer.write(f"{head}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        while read := await reader.read(65536):
            wire.raw += read
            if await leaves():
                break
    except ConnectionError:
        pass
    finally:
        writer.transport.abort()


@dataclass(kw_only=True)
class Seen(Wire):
    """One client's request and what it saw of the answer."""

    plan: Plan
    account: Account
    left: bool = False

    @property
    def texts(self) -> list[str]:
        """The text of each whole event, or of a whole answer."""
        body = self.body
        if self.status != 200:
            return []
        if body.startswith(b"{"):
            with contextlib.suppress(json.JSONDecodeError):
                return [json.loads(body)["choices"][0]["message"]["content"]]
            return []
        found = []
        for event in re.split(rb"\r\n\r\n?|\n\n|\r\r", body)[:-1]:
            if match := re.match(rb'data: (\{"id".*\})$', event.strip()):
                found += [choice["delta"].get("content") for choice in json.loads(match[1])["choices"]]
        return [text for text in found if text]


class Crowd:
    """The clients: each sends one request after the other until time is up."""

    def __init__(self, proxy: RunningProxy, seed: str, accounts: list[Account]) -> None:
        self.proxy, self.seed, self.accounts = proxy, seed, accounts
        self.seen: list[Seen] = []
        self.turn = 0

    async def storm(self, seconds: float) -> None:
        end = asyncio.get_running_loop().time() + seconds
        self.turn = max(await asyncio.gather(*(self.client(n, self.turn, end) for n in range(CLIENTS))))

    async def client(self, number: int, turn: int, end: float) -> int:
        group, place = divmod(number, CLIENTS_EACH)
        account = self.accounts[group]
        while asyncio.get_running_loop().time() < end:
            plan = Plan(self.seed, f"{turn * CLIENTS_EACH + place:06d}{group:02d}")
            self.seen.append(seen := Seen(plan=plan, account=account))
            turn += 1
            limit = plan.draw.random() / 20 if plan.manner == "leaves at once" else None
            try:
                async with asyncio.timeout(limit):
                    await ask(self.proxy.port, account.key, plan.request, seen, partial(self.leaves, seen))
            except TimeoutError:
                seen.left = True
            if seen.status == 402:
                await asyncio.sleep(0.1)
        return turn

    async def leaves(self, seen: Seen) -> bool:
        """Whether the client leaves now; before that it may take its time."""
        plan = seen.plan
        if plan.manner == "reads slowly":
            await asyncio.sleep(plan.draw.choice((0, 0, 0.005)))
        if plan.manner in ("stalls", "leaves") and len(seen.raw) >= plan.patience:
            seen.left = plan.manner == "leaves" or plan.draw.random() < 0.5
            if plan.manner == "stalls":
                await asyncio.sleep(plan.draw.random() / 2)
            plan.manner = "reads"
        return seen.left


# --------------------------------------------------------------------------------------------------
# The reckoning


@dataclass(frozen=True)
class Row:
    """A request, as the books have it."""

    id: str
    state: str
    prompt: int
    completion: int
    estimated: int
    hold: int
    charge: int
    outcome: str


def rows_of(proxy: RunningProxy) -> dict[tuple[str, int], Row]:
    """Every request's row, by account and prompt estimate."""
    sql = """SELECT a.name, r.prompt_estimate, printf('req_%016x', r.id), r.state, r.prompt_tokens,
        r.completion_tokens, r.estimated, r.hold, r.charge, r.outcome
        FROM request r JOIN account a ON a.id = r.account_id"""
    with contextlib.closing(sqlite3.connect(proxy.database)) as db:
        rows = db.execute(sql).fetchall()
    found = {(name, prompt): Row(*rest) for name, prompt, *rest in rows}
    assert len(found) == len(rows), "a request has two rows"
    return found


def reckon(seen: Seen, row: Row | None, sent: list[Sent]) -> int:
    """Check one request's charge; by how many tokens it is above what the client received."""
    texts = seen.texts
    if row is None:
        assert not texts and not sent and (seen.left or seen.status == 402), seen
        return 0
    assert row.state in ("settled", "void"), row
    assert not seen.request_id or seen.request_id == row.id
    if row.state == "void":
        assert not texts and row.charge == 0, (seen, row)
        assert row.outcome != "client_gone" or not sent or seen.plan.fails_first, (seen, row)
        return 0
    assert row.charge == (row.prompt + row.completion) * 1000
    assert sent or row.completion == 0
    if row.estimated:
        assert row.prompt in (seen.plan.estimate, seen.plan.prompt_tokens)
        assert estimate(texts) <= row.completion <= max((estimate(each.texts) for each in sent), default=0), (seen, row)
        assert seen.left or row.completion == estimate(texts), (seen, row)
        return row.completion - estimate(texts)
    assert row.prompt == seen.plan.prompt_tokens
    assert row.completion in [tokens for each in sent for tokens in each.said], (seen, row)
    if seen.body.startswith(b"{") and texts:
        return 0  # a whole answer, which has one text for all its tokens
    assert seen.left or row.completion == len(texts), (seen, row)
    return row.completion - len(texts)


def assert_nobody_overdrawn(proxy: RunningProxy, accounts: list[Account]) -> None:
    """A balance is below zero only by what an estimate missed."""
    overruns: dict[str, float] = defaultdict(float)
    for overrun in assert_audit(proxy)["overruns"]:
        overruns[overrun["account"]] += overrun["charge"] - overrun["hold"]
    for account in accounts:
        shown = proxy.account(account.name)
        assert shown["held"] == 0
        assert shown["credits"] >= -overruns[account.name] - 0.0005, (shown, overruns)


def descriptors(proxy: RunningProxy) -> list[str]:
    """The server's open files and sockets."""
    found = []
    for link in Path(f"/proc/{proxy.process.pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(str(link.readlink()))
    return found


def sockets(proxy: RunningProxy) -> int:
    return sum(1 for name in descriptors(proxy) if name.startswith("socket:"))


def memory_mb(proxy: RunningProxy) -> float:
    status = Path(f"/proc/{proxy.process.pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match is not None
    return int(match[1]) / 1024


@contextlib.contextmanager
def commands_beside(proxy: RunningProxy, accounts: list[Account]) -> Iterator[None]:
    """Somebody tops accounts up and looks at the books, all the while."""
    over = threading.Event()
    failed: list[str] = []

    def work() -> None:
        turn = 0
        while not over.wait(0.1):
            account = accounts[turn % len(accounts)]
            turn += 1
            for command in (("credit", "add", account.name, 150), ("audit",), ("usage",)):
                done = proxy.run(*command)
                if done.returncode:
                    failed.append(f"{command}: {done.stdout}{done.stderr}")

    worker = threading.Thread(target=work)
    worker.start()
    try:
        yield
    finally:
        over.set()
        worker.join()
    assert not failed, failed


def weather(proxy: RunningProxy, crowd: Crowd, poor: list[Account], seconds: float) -> float:
    """The storm; how much memory the server gained after the first third of it."""
    with commands_beside(proxy, poor):
        asyncio.run(crowd.storm(seconds / 3))
        before = memory_mb(proxy)
        asyncio.run(crowd.storm(2 * seconds / 3))
    wait_until(lambda: proxy.audit()["open_requests"] == 0, "every request is resolved")
    return memory_mb(proxy) - before


class Scene:
    """A proxy with a storm's upstreams and accounts, and what was open before it."""

    def __init__(self, seed: str, running_proxy: MakeProxy, fake_upstream: MakeUpstream) -> None:
        self.sent: dict[str, list[Sent]] = defaultdict(list)
        self.upstreams = [fake_upstream(Chaos(seed, self.sent, calm)) for calm in (False, True)]
        patience = {"first_byte_seconds": 1, "idle_seconds": PATIENCE_SECONDS}
        main, backup = ({"base_url": upstream.url, **patience} for upstream in self.upstreams)
        options = {"hold_output_tokens": SLICE}
        self.proxy = running_proxy(options=options, upstreams={"main": main, "backup": backup})
        self.proxy.wait_for_line("upstream backup: .* reachable")
        self.open_before = len(descriptors(self.proxy)), sockets(self.proxy)
        credits_ = [300, 300] + [10_000_000] * (CLIENTS // CLIENTS_EACH - 2)
        self.accounts = [self.proxy.add_account(each) for each in credits_]
        self.crowd = Crowd(self.proxy, seed, self.accounts)

    def assert_nothing_left_open(self) -> None:
        posts = [exchange for upstream in self.upstreams for exchange in upstream.posts]
        wait_until(lambda: all(exchange.finished.is_set() for exchange in posts), "no upstream is kept", CLOSED_SECONDS)
        for upstream in self.upstreams:
            upstream.close()  # and with it the connections that wait for the next request
        files_before, sockets_before = self.open_before
        wait_until(lambda: sockets(self.proxy) <= sockets_before, "no socket is left open")
        wait_until(lambda: len(descriptors(self.proxy)) <= files_before, "no file is left open")
        metrics = self.proxy.client(None).get("/metrics").body
        assert re.search(rb"^proxy_open_requests 1\.0$", metrics, re.MULTILINE), "but the one that asks"

    def reckon(self) -> list[int]:
        """Check every request's charge; by how much each is above what was received."""
        rows = rows_of(self.proxy)
        above = []
        for seen in self.crowd.seen:
            row = rows.pop((seen.account.name, seen.plan.estimate), None)
            above.append(reckon(seen, row, self.sent[seen.plan.name]))
        assert not rows, "rows that nobody asked for"
        return above


@pytest.mark.parametrize("seconds", [2, pytest.param(20, marks=pytest.mark.chaos)])
def test_after_a_storm_every_request_is_paid_once_and_nothing_is_left_behind(
    running_proxy: MakeProxy, fake_upstream: MakeUpstream, seed: str, seconds: int, tell: Callable[[str], None]
) -> None:
    scene = Scene(seed, running_proxy, fake_upstream)
    gained = weather(scene.proxy, scene.crowd, scene.accounts[:2], seconds)
    audit = assert_audit(scene.proxy)
    assert (audit["held"], audit["open_requests"]) == (0, 0)
    assert_nobody_overdrawn(scene.proxy, scene.accounts)
    above = list(zip(scene.crowd.seen, scene.reckon(), strict=True))
    scene.assert_nothing_left_open()
    assert gained < GROWTH_MB
    left = [tokens for seen, tokens in above if seen.left]
    stayed = [tokens for seen, tokens in above if not seen.left]
    tell(
        f"storm of {seconds} s, seed {seed}: {len(above)} requests, {len(left)} disconnects;"
        f" charged above what was received, at most: {max(stayed)} tokens where the client stayed,"
        f" {max(left)} where it left; {len(audit['overruns'])} overruns; memory {gained:+.1f} MB"
    )


# --------------------------------------------------------------------------------------------------
# kill -9


class Babbles:
    """Streams for ever, at a pace of its own, and keeps count."""

    event = sse({"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]})

    def __init__(self, seed: str) -> None:
        self.draw = random.Random(seed)
        self.sent: dict[str, int] = defaultdict(int)

    async def __call__(self, exchange: Exchange) -> None:
        name = exchange.json["messages"][0]["content"]
        await exchange.head()
        while True:
            burst = self.draw.choice((1, 1, 2, 5, SLICE + 3))
            self.sent[name] += burst
            await exchange.send(self.event * burst)
            await asyncio.sleep(self.draw.choice((0, 0.005, 0.02)))


@dataclass(kw_only=True)
class Listener(Wire):
    """One stream's client: what it received until the server died."""

    name: str

    @property
    def words(self) -> int:
        return self.body.count(b'"word"')


class Audience:
    """Listeners to many streams at once; when they have heard enough, the server is killed."""

    def __init__(self, proxy: RunningProxy, account: Account, listeners: list[Listener], enough: int) -> None:
        self.proxy, self.account, self.listeners, self.enough = proxy, account, listeners, enough

    async def listen_and_kill(self) -> None:
        await asyncio.gather(*map(self.listen, self.listeners))

    async def listen(self, listener: Listener) -> None:
        request = chat_request(listener.name, stream=True, max_tokens=1_000_000)
        await ask(self.proxy.port, self.account.key, request, listener, self.heard)

    async def heard(self) -> bool:
        if sum(len(each.raw) for each in self.listeners) >= self.enough:
            self.proxy.process.kill()
        return False


class Office:
    """Somebody who adds credits, makes and revokes keys and looks at the usage, whatever the server does."""

    def __init__(self, proxy: RunningProxy, account: Account) -> None:
        self.proxy, self.account = proxy, account
        self.granted = 0

    def work(self, refs: str) -> None:
        for turn in range(3):
            ref = f"{refs}-{turn}"
            assert self.proxy.command("credit", "add", self.account.name, 7, "--ref", ref)["added"]
            self.granted += 7
            key = self.proxy.command("key", "add", self.account.name)
            self.proxy.command("key", "revoke", key["key_id"])
            self.proxy.command("usage")

    @contextlib.contextmanager
    def open(self, refs: str) -> Iterator[None]:
        errors: list[BaseException] = []

        def work() -> None:
            try:
                self.work(refs)
            except BaseException as error:
                errors.append(error)

        clerk = threading.Thread(target=work)
        clerk.start()
        yield
        clerk.join()
        assert not errors, errors


def charged_after_crash(proxy: RunningProxy, listeners: list[Listener], sent: dict[str, int]) -> list[int]:
    """How many tokens each listener received beyond what it was charged for."""
    with contextlib.closing(sqlite3.connect(proxy.database)) as db:
        sql = "SELECT printf('req_%016x', id), completion_tokens FROM request WHERE outcome = 'interrupted'"
        rows = dict(db.execute(sql).fetchall())
    heard = [listener for listener in listeners if listener.request_id]
    assert all(rows[listener.request_id] <= sent[listener.name] for listener in heard)
    return [listener.words - rows[listener.request_id] for listener in heard]


@pytest.mark.parametrize("rounds, streams", [(2, 25), pytest.param(10, 60, marks=pytest.mark.chaos)])
def test_kill_9_in_the_middle_of_streams_loses_no_more_than_a_slice_of_each(
    running_proxy: MakeProxy, seed: str, rounds: int, streams: int, tell: Callable[[str], None]
) -> None:
    babbles = Babbles(seed)
    proxy = running_proxy(options={"hold_output_tokens": SLICE}, behaviour=babbles)
    account = proxy.add_account(10_000_000)
    office = Office(proxy, account)
    beyond: list[int] = []
    for number in range(rounds):
        listeners = [Listener(name=f"{number}/{stream}") for stream in range(streams)]
        enough = babbles.draw.randrange(streams, streams * 5 * SLICE) * len(babbles.event)
        with office.open(refs=f"round-{number}"):
            asyncio.run(Audience(proxy, account, listeners, enough).listen_and_kill())
            proxy.wait()
        proxy.start()
        audit = assert_audit(proxy)
        assert (audit["held"], audit["open_requests"]) == (0, 0)
        beyond += charged_after_crash(proxy, listeners, babbles.sent)
    assert max(beyond) <= SLICE
    assert audit["grants"] == 10_000_000 + office.granted
    assert proxy.account(account.name)["credits"] == audit["grants"] - audit["charges"]
    tell(
        f"{rounds} kills amid {streams} streams each, seed {seed}: {len(beyond)} streams had begun,"
        f" received beyond what was charged: {max(beyond)} tokens at most, with slices of {SLICE}"
    )


# --------------------------------------------------------------------------------------------------
# A log that cannot be written


@contextlib.contextmanager
def started_with_stderr(proxy: RunningProxy, stderr: Any) -> Iterator[int]:
    """`proxy.py serve` on the same files; its port. It must end well."""
    command = [sys.executable, str(PROXY), "--config", str(proxy.config)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=stderr, text=True, env=clean_environment(), cwd=proxy.folder
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
        with contextlib.closing(sqlite3.connect(proxy.database, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert client.get("/health").status == 503
            other.execute("ROLLBACK")
        assert client.get("/health").status == 200
        assert client.balance == 1000 - 16
    assert_audit(proxy)
