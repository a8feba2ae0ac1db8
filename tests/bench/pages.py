"""The console beside the relay: do ten people who click through pages and log in slow anybody's stream?"""

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlencode, urlsplit

from tests.bench.contestants import Contestant, say
from tests.bench.measure import NOT_STREAMED, Load, Tools, load
from tests.bench.proxies import Proxy, account_in
from tests.bench.report import Cell, percentile

VISITORS, PAUSE_SECONDS = 10, 0.5
STREAMS, PACE_MS, RATE = 50, 20, 25
WINDOW_SECONDS = 3
PASSWORD = "correct horse battery bench"


class Visitors:
    """Ten threads; each opens a page, pauses, opens the next."""

    def __init__(self, port: int, name: str) -> None:
        """Nobody is there yet."""
        self.port, self.name = port, name
        self.answers: Counter[str] = Counter()  # by path and status
        self.gone = threading.Event()

    def ask(self, connection: http.client.HTTPConnection, path: str, form: dict[str, str] | None = None) -> None:
        """Open a page, or send a form as a browser does."""
        headers = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/x-www-form-urlencoded"}
        if form is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, urlencode(form), headers)
        answer = connection.getresponse()
        answer.read()
        self.answers[f"{'GET' if form is None else 'POST'} /{path.split('/')[1]} {answer.status}"] += 1

    def visit(self, number: int) -> None:
        """Be one of them until they are sent away."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        steps = (("/login", None), ("/login", {"name": self.name, "password": PASSWORD}), ("/models", None))
        self.gone.wait(number * PAUSE_SECONDS / VISITORS)
        while not self.gone.is_set():
            for path, form in (*steps, ("/docs", None)):
                try:
                    self.ask(connection, path, form)
                except (OSError, http.client.HTTPException) as error:
                    self.answers[f"{path} {type(error).__name__}"] += 1
                    connection.close()
                if self.gone.wait(PAUSE_SECONDS):
                    break
        connection.close()

    @contextmanager
    def inside(self) -> Iterator[None]:
        """All of them, while the block lasts."""
        self.gone.clear()
        threads = [threading.Thread(target=self.visit, args=(number,)) for number in range(VISITORS)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.gone.set()
            for thread in threads:
                thread.join()


def set_password(proxy: Proxy, visitors: Visitors, tools: Tools) -> None:
    """Use the account's link as its owner would."""
    directory = tools.directory / proxy.name
    try:
        link = str(proxy.command(directory, "account", "link", account_in(directory))["link"])
    except (RuntimeError, KeyError, TypeError) as error:
        say(f"no password could be set, logins will fail: {error}")
        return
    connection = http.client.HTTPConnection("127.0.0.1", visitors.port, timeout=10)
    visitors.ask(connection, urlsplit(link).path, {"password": PASSWORD})
    connection.close()


def window(requests: Load, streams: Load) -> tuple[float, float]:
    """p99 of a request's time, and of the lateness of a stream's events, over a few seconds, in ms."""
    requests.snapshot()
    streams.snapshot()
    time.sleep(WINDOW_SECONDS)
    latency_us, gap_us = requests.snapshot().latency_us, streams.snapshot().gap_us
    return percentile(latency_us, 99) / 1000, percentile(gap_us, 99) / 1000 - PACE_MS


def beside_visitors(proxy: Proxy, contestant: Contestant, tools: Tools, pairs: int) -> tuple[dict[str, Cell], str]:
    """50 streams and 25 requests a second, with visitors and without by turns; and what the visitors got."""
    say(f"{VISITORS} visitors at the console of {proxy.name}")
    visitors = Visitors(contestant.port, account_in(tools.directory / proxy.name))
    set_password(proxy, visitors, tools)
    events = int((pairs * 2 * (WINDOW_SECONDS + 1.5) + 5) * 1000 / PACE_MS)
    stream = contestant.request(f"[events={events} pace_ms={PACE_MS}]", stream=True)
    found: dict[str, list[tuple[float, float]]] = {"quiet": [], "visited": []}
    with (
        load(tools, contestant, stream, connections=STREAMS, spread_ms=500, once=1, events=events) as streams,
        load(tools, contestant, contestant.request(NOT_STREAMED), connections=200, rate=RATE) as requests,
    ):
        time.sleep(1)
        streams.wait_for_open(STREAMS, 5)
        for _ in range(pairs):
            found["quiet"].append(window(requests, streams))
            with visitors.inside():
                time.sleep(0.5)
                found["visited"].append(window(requests, streams))
    cells = {}
    for place, key in enumerate(("pages_request", "pages_event")):
        both = [(quiet[place], visited[place]) for quiet, visited in zip(*found.values(), strict=True)]
        cells[key] = Cell([visited for _, visited in both], [visited / quiet for quiet, visited in both])
    got = ", ".join(f"{what}: {count}" for what, count in sorted(visitors.answers.items()))
    return cells, f"The visitors of {proxy.name} got {got}."
