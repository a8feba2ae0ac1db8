"""Waiting for what must happen: a signal between threads, and asking until the answer is yes."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

WAIT_SECONDS = 20.0  # how long anything may take that must happen; a test that waits this long fails
CLOSED_SECONDS = 3.0  # "the upstream is closed within a second", on a busy machine


class Signal:
    """Something that happens once: set in any thread, waited for in a test or inside any event loop."""

    def __init__(self) -> None:
        self._future: Future[None] = Future()

    def set(self) -> None:
        with contextlib.suppress(Exception):
            self._future.set_result(None)

    def is_set(self) -> bool:
        return self._future.done()

    def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait in a test; a TimeoutError is a failed test."""
        self._future.result(seconds)

    async def happened(self) -> None:
        """Wait in an event loop."""
        await asyncio.shield(asyncio.wrap_future(self._future))


def wait_until(condition: Callable[[], Any], what: str, seconds: float = WAIT_SECONDS) -> Any:
    """Ask until the answer is true, and return it."""
    deadline = time.monotonic() + seconds
    while not (answer := condition()):
        if time.monotonic() > deadline:
            pytest.fail(f"waited {seconds:g} s in vain: {what}")
        time.sleep(0.005)
    return answer
