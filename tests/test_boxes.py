"""Several boxes on one PostgreSQL: nothing is overspent, nothing is lost, whoever dies or is away.

With the limits of real boxes, so it takes minutes: `pytest -m boxes`.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field

import aiohttp
import pytest

from tests.support.answers import Answers
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE, chat_request
from tests.support.crowd import Wire, ask
from tests.support.exchange import Exchange
from tests.support.ledger import box_program, request_id
from tests.support.postgres import PostgresServer, connected
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import LoopThread
from tests.support.waiting import wait_until

pytestmark = pytest.mark.boxes
MakeBoxes = Callable[..., list[RunningProxy]]
SLICE = 20
LATE = 1 << 11  # in the id of a row that charges what a request owes that was taken for dead


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server of these tests' own: it is stopped in the middle of things."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def boxes(running_proxy: Callable[..., RunningProxy], server: PostgresServer) -> MakeBoxes:
    """Starts boxes on a database of their own; `ahead_ms` are their clocks."""

    def start(count: int, upstream: object = None, ahead_ms: tuple[int, ...] = (0, 0, 0)) -> list[RunningProxy]:
        options = {"database": server.new_database(), "hold_output_tokens": SLICE}
        return [
            running_proxy(options=options, behaviour=upstream, box=box_program({}, ahead_ms[n])) for n in range(count)
        ]

    return start


class Babbles:
    """Streams words at a steady pace, so many or for ever, and keeps count."""

    def __init__(self, words: int | None = None, pause: float = 0.05) -> None:
        self.words, self.pause = words, pause
        self.sent: dict[str, int] = defaultdict(int)

    async def __call__(self, exchange: Exchange) -> None:
        name = exchange.json["messages"][0]["content"]
        await exchange.head()
        for _ in itertools.count() if self.words is None else range(self.words):
            self.sent[name] += 1
            await exchange.send(sse({"choices": [{"index": 0, "delta": {"content": "word"}, "finish_reason": None}]}))
            await asyncio.sleep(self.pause)
        await exchange.send(sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}) + sse(b"[DONE]"))
        await exchange.end()


@dataclass(kw_only=True)
class Listener(Wire):
    """The client of one stream."""

    name: str
    box: RunningProxy
    done: "Future[None]" = field(default_factory=Future)
    leaves: bool = False

    @property
    def words(self) -> int:
        return self.body.count(b'"word"')

    @property
    def id(self) -> int:
        return request_id(self.request_id)

    async def heard(self) -> bool:
        return self.leaves


class Audience:
    """Listeners to many streams, in a thread of their own."""

    def __init__(self, loop: LoopThread) -> None:
        self.loop = loop
        self.listeners: list[Listener] = []

    def join(self, box: RunningProxy, account: Account, count: int) -> list[Listener]:
        """That many more; returns when each has heard something."""
        names = range(len(self.listeners), len(self.listeners) + count)
        fresh = [Listener(name=f"stream {number:03d}", box=box) for number in names]
        self.listeners += fresh
        for one in fresh:
            request = chat_request(one.name, stream=True, max_tokens=100_000)
            call = ask(box.port, account.key, "/v1/chat/completions", request, one, one.heard)
            one.done = asyncio.run_coroutine_threadsafe(call, self.loop.loop)
        wait_until(lambda: all(one.words for one in fresh), "each stream has begun")
        return fresh

    def leave(self) -> None:
        for one in self.listeners:
            one.leaves = True
        self.wait()

    def wait(self, seconds: float = 60) -> None:
        for one in self.listeners:
            one.done.result(seconds)


@pytest.fixture
def audience(loop_thread: LoopThread) -> Audience:
    return Audience(loop_thread)


Rows = dict[int, tuple[str, str, int]]


def rows_of(box: RunningProxy) -> Rows:
    """Of each request: state, outcome and the tokens of its answer that were charged."""
    sql = "SELECT id, state, coalesce(outcome, ''), coalesce(completion_tokens, 0) FROM request"
    return {number: (state, outcome, tokens) for number, state, outcome, tokens in box.ledger.query(sql)}


def open_of(box: RunningProxy, listeners: list[Listener]) -> int:
    """How many of these requests are open."""
    rows = rows_of(box)
    return sum(rows[one.id][0] == "open" for one in listeners)


def charged(rows: Rows, one: Listener) -> int:
    """Tokens of an answer, with what a second row charges."""
    return rows[one.id][2] + (rows[one.id | LATE][2] if one.id | LATE in rows else 0)


def assert_all_charged(box: RunningProxy, listeners: list[Listener], upstreams: list[Babbles]) -> Rows:
    """What clients received is paid, and no more than was sent for them."""
    rows = rows_of(box)
    for one in listeners:
        sent = sum(upstream.sent[one.name] for upstream in upstreams)
        assert one.words <= charged(rows, one) <= sent, (one.name, rows[one.id], one.words, sent)
    return rows


def wait_until_settled(box: RunningProxy) -> None:
    wait_until(lambda: not box.ledger.query("SELECT 1 FROM request WHERE state = 'open'"), "all are settled")
    audit = assert_audit(box)
    assert (audit["held"], audit["open_requests"]) == (0, 0)


# -- Money


@pytest.mark.parametrize("count", [2, 3])
async def test_300_requests_at_once_on_several_boxes_cannot_spend_the_credits_of_20(
    boxes: MakeBoxes, count: int
) -> None:
    found = boxes(count)
    account = found[0].add_account(credits_=20 * (2 * QUESTION_ESTIMATE + 10 + 64))
    answers = Answers(tokens=10, prompt_tokens=QUESTION_ESTIMATE, pause_after=0)
    for box in found:
        box.upstream.behaviour = answers
    headers = {"authorization": f"Bearer {account.key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def one(number: int) -> tuple[int, str]:
            url = f"{found[number % count].base_url}/v1/chat/completions"
            async with session.post(url, json=chat_request(max_tokens=10)) as answer:
                body = await answer.json()
                return answer.status, body.get("error", {}).get("code", "")

        asked = [asyncio.ensure_future(one(number)) for number in range(300)]
        for done, future in enumerate(asyncio.as_completed(asked), start=1):
            await future
            if done == 280:
                answers.resume.set()
        results = [await future for future in asked]
    assert sorted({status for status, _ in results}) == [200, 402]
    assert {code for status, code in results if status != 200} == {"credits_in_use"}
    served = sum(status == 200 for status, _ in results)
    assert served == 20 == sum(len(box.upstream.posts) for box in found)
    assert_books(found[-1], account, credits=account.credits - 20 * (QUESTION_ESTIMATE + 10))


async def test_boxes_with_the_same_accounts_never_wait_for_each_other_in_a_circle(
    boxes: MakeBoxes, server: PostgresServer
) -> None:
    found = boxes(2)
    accounts = [found[0].add_account(1_000_000) for _ in range(6)]
    statuses: dict[int, int] = defaultdict(int)
    end = time.monotonic() + 20
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client(number: int) -> None:
            draw = random.Random(number)
            while time.monotonic() < end:
                headers = {"authorization": f"Bearer {draw.choice(accounts).key}"}
                url = f"{found[number % 2].base_url}/v1/chat/completions"
                async with session.post(url, json=chat_request(max_tokens=10), headers=headers) as answer:
                    await answer.read()
                    statuses[answer.status] += 1

        await asyncio.gather(*(client(number) for number in range(24)))
    assert set(statuses) == {200}, statuses
    wait_until_settled(found[0])
    name = found[0].ledger.address.rpartition("/")[2]
    with connected(server.url("postgres")) as db:
        assert db.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = %s", (name,)).fetchone() == (0,)


def test_boxes_whose_clocks_differ_agree_on_minutes_and_ids(boxes: MakeBoxes) -> None:
    hour = 3_600_000
    found = boxes(3, ahead_ms=(0, hour, -hour))
    account = found[0].add_account(1000, tier="hundred-a-minute")
    while not 2 < time.time() % 60 < 40:
        time.sleep(1)
    statuses = [found[n % 3].client(account.key).chat().status for n in range(105)]
    assert statuses == [200] * 100 + [429] * 5
    numbers = {number >> 12 & 255 for number in rows_of(found[0])}
    assert len(rows_of(found[0])) == 100 and len(numbers) == 3
    wait_until_settled(found[1])


# -- Death


def test_what_a_killed_box_left_open_is_recovered_by_another_within_75_seconds(
    boxes: MakeBoxes, audience: Audience
) -> None:
    upstreams = [Babbles(), Babbles()]
    dying, living = boxes(2)
    dying.upstream.behaviour, living.upstream.behaviour = upstreams
    account = dying.add_account(10_000_000)
    lost = audience.join(dying, account, 60)
    kept = audience.join(living, account, 10)
    dying.kill()
    killed_at = time.monotonic()
    wait_until(lambda: open_of(living, lost) == 0, "all of them are recovered", seconds=90)
    assert 55 < time.monotonic() - killed_at < 75
    assert open_of(living, kept) == 10, "who lives is not recovered"
    audience.leave()
    wait_until_settled(living)
    rows = assert_all_charged(living, kept, upstreams)
    for one in lost:
        assert rows[one.id][1] == "interrupted"
        assert one.words - SLICE <= charged(rows, one) <= upstreams[0].sent[one.name]
    living.wait_for_line("recovered 60 requests of a box that is gone")
    dying.start()
    assert dying.client(account.key).get("/health").status == 200


# -- The database


def test_a_database_that_is_away_for_70_seconds_costs_nobody_anything(
    boxes: MakeBoxes, audience: Audience, server: PostgresServer
) -> None:
    upstreams = [Babbles(), Babbles()]
    found = boxes(2)
    for box, upstream in zip(found, upstreams, strict=True):
        box.upstream.behaviour = upstream
    account = found[0].add_account(10_000_000)
    for box in found:
        audience.join(box, account, 20)
    server.stop()
    try:
        away_at = time.monotonic()
        assert found[0].client(account.key).chat().error["code"] == "ledger_unavailable"
        assert found[1].client(None).get("/health").status == 503
        audience.wait()
        assert time.monotonic() - away_at < 40, "streams end, at the next slice or with the box"
        assert all(b"ledger_unavailable" in one.body for one in audience.listeners)
        time.sleep(70 - (time.monotonic() - away_at))
    finally:
        server.start()
    wait_until_settled(found[0])
    rows = assert_all_charged(found[0], audience.listeners, upstreams)
    assert {outcome for _, outcome, _ in rows.values()} == {"ledger_unavailable"}
    assert found[0].client(None).get("/health").status == found[1].client(None).get("/health").status == 200


@pytest.mark.parametrize("how", ["restart", "immediate"])
def test_a_database_that_restarts_amid_streams_loses_nothing(
    boxes: MakeBoxes, audience: Audience, server: PostgresServer, how: str
) -> None:
    upstreams = [Babbles(words=150, pause=0.02), Babbles(words=150, pause=0.02)]
    found = boxes(2)
    for box, upstream in zip(found, upstreams, strict=True):
        box.upstream.behaviour = upstream
    account = found[0].add_account(10_000_000)
    for _ in range(3):
        for box in found:
            with contextlib.suppress(AssertionError):
                audience.join(box, account, 15)
        if how == "restart":
            server.restart()
        else:
            server.stop("immediate")
            server.start()
    audience.wait()
    wait_until_settled(found[0])
    heard = [one for one in audience.listeners if one.status == 200]
    assert len(heard) >= 30
    rows = assert_all_charged(found[0], heard, upstreams)
    assert {outcome for _, outcome, _ in rows.values()} <= {"ok", "ledger_unavailable"}
