"""What the ledger costs on PostgreSQL, near and far: `python -m tests.bench.boxes` (two minutes, needs PostgreSQL).

For each distance and size of a batch: holds and settles a second, of as many accounts as the batch has verbs, and what
a batch takes. SQLite is beside it. The distance is a relay in a process of its own that keeps every byte for half a
round trip; every commit is flushed to the disk (`fsync`), as in production.
"""

import asyncio
import multiprocessing
import queue
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msgspec.structs import replace

import proxy
from tests.support import core_ledger as ledger
from tests.support.postgres import PostgresServer

BATCHES = (1, 10, 50, 250)
SECONDS = 3.0
DISTANCES_MS = (0.0, 1.0, 3.0)


def relay(port: int, target: int, half_ms: float) -> None:
    """Listen, and pass on what comes, late."""
    server = socket.create_server(("127.0.0.1", port), backlog=64)
    while True:
        near = server.accept()[0]
        far = socket.create_connection(("127.0.0.1", target))
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            line: queue.Queue[tuple[float, bytes]] = queue.Queue()
            threading.Thread(target=take, args=(one, line, half_ms), daemon=True).start()
            threading.Thread(target=give, args=(other, line), daemon=True).start()


def take(source: socket.socket, line: "queue.Queue[tuple[float, bytes]]", half_ms: float) -> None:
    while data := source.recv(1 << 16):
        line.put((time.monotonic() + half_ms / 1000, data))
    line.put((0, b""))


def give(target: socket.socket, line: "queue.Queue[tuple[float, bytes]]") -> None:
    while True:
        due, data = line.get()
        time.sleep(max(0.0, due - time.monotonic()))
        if not data:
            target.close()
            return
        target.sendall(data)


async def measure(config: Any, verbs: int) -> tuple[float, float, float]:
    """Holds and settles a second, and the ms that a batch of this many verbs takes."""
    db = proxy.connect(config)
    keys = []
    with proxy.transaction(db) as now:
        for number in range(verbs):
            account = proxy.create_account(db, now, f"{verbs}-{number}", "unlimited", 10**12, 30)
            keys.append(proxy.hash_key(proxy.create_key(db, now, account)[0]))
    clerk = proxy.Ledger(config, print)
    await clerk.open()
    times: dict[str, list[float]] = {"hold": [], "settle": []}
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        orders = [ledger.order(clerk.next_id(), key, estimate=5) for key in keys]
        started = time.perf_counter()
        await asyncio.gather(*(clerk.submit(hold_of(order), whose=order.key_hash) for order in orders))
        held = time.perf_counter()
        await asyncio.gather(*(clerk.submit(settle_of(clerk, order), whose=order.key_hash) for order in orders))
        times["hold"].append(held - started)
        times["settle"].append(time.perf_counter() - held)
    await clerk.close()
    db.close()
    hold, settle = (statistics.median(times[name]) for name in ("hold", "settle"))
    return verbs / hold, verbs / settle, 500 * (hold + settle)


def hold_of(order: Any) -> Any:
    return lambda db, now: proxy.hold(db, now, order, ledger.TIERS.__getitem__)


def settle_of(clerk: Any, order: Any) -> Any:
    end = proxy.Resolution(order.request_id, "ok", "main", proxy.Bill(5, 7, False), None, order)
    return lambda db, now: clerk.database.settle(db, now, end)


def show(where: str, config: Any) -> None:
    for verbs in BATCHES:
        holds, settles, ms = asyncio.run(measure(config, verbs))
        print(f"{where:>22} | {verbs:5} | {holds:9,.0f} | {settles:9,.0f} | {ms:8.2f}", flush=True)


def main(distances: Sequence[float]) -> None:
    print("                 where | batch |   holds/s | settles/s | ms a batch")
    with tempfile.TemporaryDirectory() as folder:
        config = ledger.configuration(Path(folder))
        show("SQLite", replace(config, database=str(Path(folder) / "bench.db")))
        server = PostgresServer(fsync=True)
        try:
            show("PostgreSQL, socket", replace(config, database=server.url_of_socket(server.new_name())))
            for ms in distances:
                port = server.free_port()
                far = multiprocessing.Process(target=relay, args=(port, server.port, ms / 2), daemon=True)
                far.start()
                time.sleep(0.5)
                url = f"postgresql://postgres@127.0.0.1:{port}/{server.new_name()}"
                show(f"PostgreSQL, {ms:g} ms away" if ms else "PostgreSQL, relayed", replace(config, database=url))
                far.terminate()
        finally:
            server.close()


if __name__ == "__main__":
    main([float(word) for word in sys.argv[1:]] or DISTANCES_MS)
