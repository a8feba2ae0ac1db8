"""One request as a scripted upstream got it, and the means to answer it, well or badly."""

import asyncio
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from tests.support.waiting import Signal

Behaviour = Callable[["Exchange"], Awaitable[None]]


class Exchange:
    """One request as the upstream got it, and the means to answer it, well or badly."""

    def __init__(self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes):
        self.method, self.path, self.headers, self.body = method, path, headers, body
        self.sent = bytearray()  # the body that was sent, without HTTP's own framing
        self.closed = Signal()  # the proxy closed the connection
        self.finished = Signal()  # the script ended, or was cut off
        self.complete = False  # the answer ended as HTTP says: the connection may be used again
        self._writer = writer
        self._chunked = False

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def is_stream(self) -> bool:
        return bool(self.json.get("stream"))

    async def raw(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def head(
        self,
        status: int = 200,
        content_type: str = "text/event-stream",
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
    ) -> None:
        """Send status and headers: with a length if one is given, else chunked."""
        self._chunked = length is None
        framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"content-type: {content_type}", framing]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        await self.raw("\r\n".join([*lines, "", ""]).encode())

    async def send(self, data: bytes) -> None:
        """Send a piece of the body, in one HTTP chunk."""
        self.sent += data
        await self.raw(b"%x\r\n%s\r\n" % (len(data), data) if self._chunked else data)

    async def end(self) -> None:
        if self._chunked:
            await self.raw(b"0\r\n\r\n")
        self.complete = True

    async def answer(
        self,
        body: Any,
        status: int = 200,
        content_type: str = "application/json",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """A whole answer at once."""
        encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
        await self.head(status, content_type, headers, length=len(encoded))
        await self.send(encoded)
        await self.end()

    async def stall(self) -> None:
        """Say nothing more, for ever, and keep the connection open."""
        await asyncio.Event().wait()

    def reset(self) -> None:
        """Break the connection with a TCP reset."""
        connection = self._writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()
