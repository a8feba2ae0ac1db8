"""Fixtures that a few modules share: a module's account, an unspent minute, the console's site and its visitor."""

import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.client import Client
from tests.support.console import Visitor, start_site
from tests.support.process import Account, RunningProxy, Shared
from tests.support.upstream import FakeUpstream
from tests.support.waiting import wait_until


@pytest.fixture(scope="module")
def payer(shared: Shared) -> Account:
    """One account of the shared proxy for the tests of a module."""
    return shared.proxy.add_account(1_000_000)


@pytest.fixture
def account(proxy: RunningProxy, payer: Account) -> Account:
    """The module's account, with the credits that are left."""
    payer.credits = proxy.client(payer.key).balance
    return payer


@pytest.fixture
def untouched(account: Account, proxy: RunningProxy, upstream: FakeUpstream) -> Iterator[Client]:
    """A client of the module's account. After the test: no upstream was called and nothing was charged."""
    client = proxy.client(account.key)
    yield client
    assert not upstream.posts
    assert client.balance == account.credits


@pytest.fixture
def early_in_a_minute() -> None:
    """The window is the UTC minute: a test that counts must not meet its end."""
    wait_until(lambda: time.time() % 60 < 55, "the next minute begins")


@pytest.fixture(scope="module")
def site(module_proxy: Callable[..., RunningProxy], tmp_path_factory: pytest.TempPathFactory) -> RunningProxy:
    """A console with free credits where everybody may register."""
    return start_site(module_proxy, tmp_path_factory.mktemp("site"))


@pytest.fixture
def visitor(site: RunningProxy) -> Visitor:
    return Visitor(site)
