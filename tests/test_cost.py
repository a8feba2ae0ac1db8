"""What a request may cost: two transactions, and one write to the client for each read of the upstream."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field

from tests.support.answers import Answers
from tests.support.exchange import Exchange
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream
from tests.support.waiting import Signal


def counters(proxy: RunningProxy) -> dict[str, int]:
    """The gauges that the server shows of its ledger."""
    text = proxy.client(None).get("/metrics").body.decode()
    return {name: int(float(value)) for name, value in re.findall(r"^proxy_ledger_(\w+) (\S+)$", text, re.MULTILINE)}


def test_a_request_over_http_takes_exactly_two_transactions(
    proxy: RunningProxy, funded_key: Callable[..., Account]
) -> None:
    client = proxy.client(funded_key().key)
    before = counters(proxy)
    for stream in (False, True, False):
        assert client.chat(stream=stream).status == 200
    after = counters(proxy)
    assert {name: after[name] - before[name] for name in after} == {"transactions": 6, "verbs": 6}


@dataclass
class SendsInStep:
    """One packet at a time, each of many events; the next when somebody says so."""

    packets: int
    answers: Answers = field(default_factory=Answers)

    def __post_init__(self) -> None:
        self.steps = [Signal() for _ in range(self.packets)]

    async def __call__(self, exchange: Exchange) -> None:
        await exchange.head()
        for step in self.steps:
            await exchange.send(self.answers.token(exchange) * 20)
            await step.happened()
        await self.answers.send_closing(exchange)
        await exchange.end()


def test_one_read_of_the_upstream_is_one_write_to_the_client(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: Callable[..., Account]
) -> None:
    """A write is an HTTP chunk: the client sees how many there were. A packet goes out when the last has arrived."""
    script = upstream.behaviour = SendsInStep(packets=6)
    with proxy.client(funded_key(1000).key).stream_chat() as stream:
        # Each `read1` of http.client ends with a chunk, so that none is longer than what one write was.
        for number, step in enumerate(script.steps, 1):
            sizes = []
            while stream.received.count(b'"word"') < 20 * number:
                before = len(stream.received)
                assert stream.read_some()
                sizes.append(len(stream.received) - before)
            assert len(sizes) == 1
            step.set()
        assert stream.finish().clean
