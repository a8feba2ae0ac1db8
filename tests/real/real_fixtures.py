"""llama.cpp's own server with a small model, and a proxy in front of it: fixtures of the tests marked `real`."""

import contextlib
import importlib.util
from collections.abc import Iterator

import pytest
from fetch import model_path
from llama import MODELS, Llama

from tests.support.books import assert_audit
from tests.support.commands import CommandServer
from tests.support.files import OPTIONS, write_files
from tests.support.process import RunningProxy
from tests.support.upstream import FakeUpstream, LoopThread, RefusesConnections


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Llama]:
    if importlib.util.find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp, which holds llama.cpp's server, is not installed: pip install xllamacpp")
    if not model_path().exists():
        pytest.skip(f"the model {model_path()} is not there: `python -m tests.real.fetch` fetches it")
    server = Llama(tmp_path_factory.mktemp("llama") / "llama.log")
    yield server
    server.stop()


@pytest.fixture(scope="session")
def started_proxy(
    llama: Llama, tmp_path_factory: pytest.TempPathFactory, loop_thread: LoopThread, commands: CommandServer
) -> Iterator[RunningProxy]:
    nobody, spare = RefusesConnections(), FakeUpstream(loop_thread)
    tiers = {"unlimited": {}, "one-a-minute": {"requests_per_minute": 1}}
    upstreams = {
        "llama": {"base_url": f"{llama.url}/v1"},
        "llama-of-choice": {"base_url": f"{llama.url}/v1", "usage_of": "choice"},
        "nobody": {"base_url": nobody.url},
        "echo": {"builtin": "echo"},
    }
    options = {**OPTIONS, "tiers": tiers, "upstreams": upstreams}
    config = write_files(tmp_path_factory.mktemp("real"), options, MODELS)
    proxy = RunningProxy(config, commands, spare)
    with contextlib.ExitStack() as stack:
        stack.callback(nobody.close)
        stack.callback(spare.close)
        stack.callback(lambda: proxy.process.poll() is None and proxy.kill())
        yield proxy.start()
        audit = assert_audit(proxy)
        assert (audit["held"], audit["open_requests"]) == (0, 0), audit
        proxy.close()


@pytest.fixture
def real_proxy(started_proxy: RunningProxy) -> Iterator[RunningProxy]:
    """The proxy in front of llama.cpp."""
    started_proxy.assert_well()
    yield started_proxy
    started_proxy.assert_well()
