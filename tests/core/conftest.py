"""Fixtures of the tests that import proxy.py, by way of tests/support/core_*.py alone: no process, no socket."""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.support.core_ledger import Bench, configuration, connect


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """The configuration, also as files for the command line."""
    return configuration(tmp_path)


@pytest.fixture
def db(config: Any) -> Iterator[Any]:
    with contextlib.closing(connect(config)) as connection:
        yield connection


@pytest.fixture
def bench(db: Any, config: Any) -> Callable[..., Bench]:
    """Makes accounts: `bench(free=5, paid=10)`, in whole credits."""
    return partial(Bench, db, config)
