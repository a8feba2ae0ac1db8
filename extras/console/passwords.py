"""Passwords: slow on purpose, in a thread, one at once, and never in a request's way."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import unicodedata
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from extras.console.guard import Stop

LENGTH_MIN, LENGTH_MAX = 8, 256
WAITING_MAX = 16
SALT_BYTES = 16
T = TypeVar("T")
COMMON = Path(__file__).with_name("passwords.txt")


def normal(password: str) -> bytes:
    """The same letters, whatever keyboard they came from."""
    return unicodedata.normalize("NFC", password).encode()


def scrypt(password: bytes, salt: bytes) -> bytes:
    return hashlib.scrypt(password, salt=salt, n=2**14, r=8, p=5, maxmem=64 * 1024**2)


def hash_new(password: bytes) -> bytes:
    salt = secrets.token_bytes(SALT_BYTES)
    return salt + scrypt(password, salt)


def matches(password: bytes, stored: bytes | None) -> bool:
    """Where nothing is stored it takes as long."""
    salt, known = (stored or bytes(SALT_BYTES))[:SALT_BYTES], (stored or b"")[SALT_BYTES:]
    return hmac.compare_digest(scrypt(password, salt), known) and bool(stored)


class Passwords:
    """The thread that hashes and compares them."""

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(1, "passwords")
        self.waiting = 0
        self.common = frozenset(COMMON.read_text(encoding="utf-8").split())

    def close(self) -> None:
        self.thread.shutdown(wait=False, cancel_futures=True)

    def fault(self, password: str) -> str | None:
        """What is wrong with a new one."""
        if not LENGTH_MIN <= len(password) <= LENGTH_MAX:
            return f"A password has {LENGTH_MIN} to {LENGTH_MAX} characters."
        if password.casefold() in self.common:
            return "This is one of the commonest passwords, which are tried first. Choose another."
        return None

    async def make(self, password: str) -> bytes:
        """What is stored of a new one. Stop 503 if too many wait."""
        return await self.run(hash_new, normal(password))

    async def check(self, password: str, stored: bytes | None) -> bool:
        return await self.run(matches, normal(password[: LENGTH_MAX + 1]), stored)

    async def run(self, work: Callable[..., T], *values: bytes | None) -> T:
        if self.waiting > WAITING_MAX:  # one is being worked on
            raise Stop(503, "Too many people are signing in. Try again in a few seconds.", {"Retry-After": "3"})
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.thread, work, *values)
        finally:
            self.waiting -= 1
