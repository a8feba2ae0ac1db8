"""A hundred clients that misbehave, and what each of them saw, as it stands on the wire.

They read the socket themselves: aiohttp's client drops what it has received when a connection breaks, and what was
received is what this is about.
"""

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from tests.support.api_chaos import texts_in
from tests.support.process import Account, RunningProxy
from tests.support.storm import CLIENTS, CLIENTS_EACH, Plan


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


async def ask(port: int, key: str, path: str, request: dict[str, Any], wire: Wire, leaves: Misbehaviour) -> None:
    """Send a request and read what comes, as long as it comes; `leaves` is asked after each read."""
    body = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: proxy\r\nAuthorization: Bearer {key}\r\nConnection: close"
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
        return texts_in(self.body, self.plan.dialect) if self.status == 200 else []


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
                    leaves = partial(self.leaves, seen)
                    await ask(self.proxy.port, account.key, plan.dialect.path, plan.request, seen, leaves)
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
