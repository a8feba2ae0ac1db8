"""The scripted upstream: a real HTTP server in a thread of its own that does what its behaviour says.

An upstream outlives a test's event loop, so that a test may be written with or without asyncio.
"""

import asyncio
import queue
import socket
import threading
from collections.abc import Callable
from typing import Any

from tests.support.answers import Answers
from tests.support.exchange import Behaviour, Exchange
from tests.support.waiting import WAIT_SECONDS


class NotingReader(asyncio.StreamReader):
    """Notes that the peer went away, also while nobody reads."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop=loop)
        self.gone = asyncio.Event()
        self.on_gone: Callable[[], None] = lambda: None

    def _note(self) -> None:
        self.gone.set()
        self.on_gone()

    def feed_eof(self) -> None:
        self._note()
        super().feed_eof()

    def set_exception(self, exc: BaseException) -> None:
        self._note()
        super().set_exception(exc)


class LoopThread:
    """An event loop in a thread of its own, for servers that outlive a test's loop."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="upstreams", daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_SECONDS)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(WAIT_SECONDS)
        self.loop.close()


class FakeUpstream:
    """A real HTTP server on 127.0.0.1 that does what its `behaviour` says, and remembers every request."""

    def __init__(self, thread: LoopThread, behaviour: Behaviour | None = None) -> None:
        self.behaviour: Behaviour = behaviour or Answers()
        self.exchanges: list[Exchange] = []
        self.errors: list[BaseException] = []
        self._arrivals: queue.Queue[Exchange] = queue.Queue()
        self._thread = thread
        self._connections: set[asyncio.Task[None]] = set()
        thread.run(self._listen())

    async def _listen(self) -> None:
        loop = asyncio.get_running_loop()

        def protocol() -> asyncio.StreamReaderProtocol:
            return asyncio.StreamReaderProtocol(NotingReader(loop), self._connected, loop=loop)

        self._server = await loop.create_server(protocol, "127.0.0.1", 0, backlog=1024)
        self.port: int = self._server.sockets[0].getsockname()[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def reset(self, behaviour: Behaviour | None = None) -> None:
        """Forget what was, as a test begins."""
        self.behaviour = behaviour or Answers()
        self.exchanges, self.errors, self._arrivals = [], [], queue.Queue()

    def next_exchange(self, seconds: float = WAIT_SECONDS) -> Exchange:
        """The next request, as soon as it is here (a start-up probe's GET is no request)."""
        while True:
            exchange = self._arrivals.get(timeout=seconds)
            if exchange.method == "POST":
                return exchange

    @property
    def posts(self) -> list[Exchange]:
        return [exchange for exchange in self.exchanges if exchange.method == "POST"]

    def close(self) -> None:
        self._thread.run(self._close())

    async def _close(self) -> None:
        self._server.close()
        for task in list(self._connections):
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _connected(self, reader: NotingReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            while (exchange := await self._read_request(reader, writer)) is not None:
                await self._play(exchange, reader)
                if not exchange.complete:
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._connections.discard(task)
            writer.close()

    async def _read_request(self, reader: NotingReader, writer: asyncio.StreamWriter) -> Exchange | None:
        head = await reader.readuntil(b"\r\n\r\n")
        request_line, *header_lines = head.decode("latin-1").rstrip().split("\r\n")
        method, path, _ = request_line.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in header_lines)}
        body = bytearray()
        if headers.get("transfer-encoding") == "chunked":
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            body += await reader.readexactly(int(headers.get("content-length", 0)))
        return Exchange(writer, method, path, headers, bytes(body))

    async def _play(self, exchange: Exchange, reader: NotingReader) -> None:
        """Run the script until it ends or the proxy closes the connection."""
        reader.on_gone = exchange.closed.set
        if reader.gone.is_set():
            exchange.closed.set()
        self.exchanges.append(exchange)
        self._arrivals.put(exchange)
        behaviour = self.behaviour if exchange.method == "POST" else answers_probe
        script = asyncio.ensure_future(behaviour(exchange))
        gone = asyncio.ensure_future(reader.gone.wait())
        try:
            await asyncio.wait({script, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            script.cancel()
            gone.cancel()
            ended, _ = await asyncio.gather(script, gone, return_exceptions=True)
            exchange.finished.set()
            if isinstance(ended, Exception) and not isinstance(ended, ConnectionError):
                self.errors.append(ended)


async def answers_probe(exchange: Exchange) -> None:
    """What a server says to GET /v1/models."""
    await exchange.answer({"object": "list", "data": []})


class RefusesConnections:
    """No behaviour but an address: nothing listens there, and nothing else can take the port."""

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def close(self) -> None:
        self._socket.close()
