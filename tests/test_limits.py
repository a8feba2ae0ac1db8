"""Limits per tier: requests a minute, requests at once, keys an account."""

import time
from collections.abc import Callable

import openai
import pytest

from tests.support.answers import Answers
from tests.support.books import assert_books
from tests.support.client import Response
from tests.support.errors import assert_error
from tests.support.files import edit_yaml
from tests.support.misbehaviours import Fails, StallsBeforeHeaders
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]


def limits(answer: Response) -> tuple[str | None, str | None]:
    return answer.headers["x-ratelimit-limit"], answer.headers["x-ratelimit-remaining"]


@pytest.mark.usefixtures("early_in_a_minute")
def test_a_tier_admits_so_many_requests_a_minute(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100, tier="two-a-minute")
    client = proxy.client(account.key)
    assert [limits(client.chat(stream=stream)) for stream in (False, True)] == [("2", "1"), ("2", "0")]
    refused = client.chat()
    assert_error(refused, 429, "rate_limit_exceeded", "rate_limit_error")
    seconds = int(refused.headers["retry-after"])
    assert 1 <= seconds <= 60 and refused.json()["retry_after"] == seconds
    assert limits(refused) == ("2", "0")
    reset = int(refused.headers["x-ratelimit-reset"])
    assert reset % 60 == 0 and 0 < reset - time.time() <= 60
    assert len(upstream.posts) == 2
    assert_books(proxy, account, credits=84)


@pytest.mark.usefixtures("early_in_a_minute")
def test_gets_and_refused_requests_do_not_count(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100, tier="two-a-minute")
    client = proxy.client(account.key)
    for _ in range(3):
        assert client.get("/v1/models").status == 200
        assert client.post("/v1/chat/completions", b"{").status == 400
        assert client.chat(model="nothing").status == 404
        assert client.chat("x" * 4000).status == 402
    assert limits(client.get("/v1/models")) == ("2", "2")
    assert [client.chat().status for _ in range(3)] == [200, 200, 429]
    assert_books(proxy, account, credits=84)


@pytest.mark.usefixtures("early_in_a_minute")
def test_every_answer_to_a_known_key_shows_its_limit(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100, tier="two-a-minute")
    client = proxy.client(account.key)
    answers = [client.get("/v1/models"), client.get("/v1/models/plain"), client.get("/api/billing/subscription")]
    answers += [client.post("/v1/embeddings", b"{"), client.chat(model="nothing"), client.chat("x" * 4000)]
    upstream.behaviour = Fails(500)
    answers += [client.chat()]
    assert [limits(answer)[0] for answer in answers] == ["2"] * len(answers)
    assert all(int(answer.headers["x-ratelimit-reset"]) > 0 for answer in answers)


def test_a_tier_without_limits_shows_none(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100, tier="unlimited")
    assert limits(proxy.client(account.key).chat()) == (None, None)


@pytest.mark.usefixtures("early_in_a_minute")
def test_all_keys_of_an_account_share_its_limit(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account, other = funded_key(credits=100, tier="two-a-minute"), funded_key(credits=100, tier="two-a-minute")
    second = proxy.command("key", "add", account.name)["key"]
    statuses = [proxy.client(key).chat().status for key in (account.key, second, account.key, second, other.key)]
    assert statuses == [200, 200, 429, 429, 200]
    assert_books(proxy, account, credits=84)


@pytest.mark.usefixtures("early_in_a_minute")
def test_many_at_once_cannot_pass_the_limit_together(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=1_000_000, tier="two-a-minute")
    pending = [proxy.client(account.key).start_chat() for _ in range(20)]
    statuses = [one.answered().finish().status for one in pending]
    assert sorted(statuses) == [200] * 2 + [429] * 18
    assert len(upstream.posts) == 2
    assert_books(proxy, account, credits=1_000_000 - 16)


def test_a_tier_admits_so_many_requests_at_once(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100_000, tier="one-at-a-time")
    client = proxy.client(account.key)
    answers = Answers(pause_after=1)
    upstream.behaviour = answers
    with client.stream_chat() as stream:
        stream.read_until(b'"word"')
        refused = client.chat()
        assert_error(refused, 429, "too_many_parallel_requests", "rate_limit_error")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert refused.json()["retry_after"] == int(refused.headers["retry-after"])
        assert client.get("/v1/models").status == 200
        answers.resume.set()
        assert stream.finish().clean
    assert client.chat().status == 200
    assert len(upstream.posts) == 2
    assert_books(proxy, account, credits=100_000 - 16)


def test_whoever_left_makes_room(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=100_000, tier="one-at-a-time")
    client = proxy.client(account.key)
    for behaviour in (StallsBeforeHeaders(), Fails(500), Answers()):
        upstream.behaviour = behaviour
        with client.start_chat() as pending:
            exchange = upstream.next_exchange()
            if isinstance(behaviour, StallsBeforeHeaders):
                pending.leave()
                exchange.closed.wait()
                proxy.wait_until_settled(account)
            else:
                pending.answered().finish()
    assert proxy.account(account.name)["held"] == 0


def test_the_official_client_raises_its_rate_limit_error(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100_000, tier="one-at-a-time")
    upstream.behaviour = StallsBeforeHeaders()
    with proxy.client(account.key).start_chat(), proxy.openai(account.key) as client:
        upstream.next_exchange()
        with pytest.raises(openai.RateLimitError) as raised:
            client.embeddings.create(model="embedder", input="hi")
    assert raised.value.code == "too_many_parallel_requests"
    proxy.wait_until_settled(account)


def test_a_change_of_tier_acts_on_the_next_request(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100, tier="hundred-a-minute")
    client = proxy.client(account.key)
    assert limits(client.chat())[0] == "100"
    proxy.command("account", "tier", account.name, "unlimited")
    assert limits(client.chat()) == (None, None)
    assert client.get("/api/billing/subscription").json()["tier"] == "unlimited"
    assert_books(proxy, account, credits=84)


@pytest.mark.usefixtures("early_in_a_minute")
def test_an_account_whose_tier_is_gone_works_on_the_limits_of_the_new_default_tier(running_proxy: MakeProxy) -> None:
    """Without a restart."""
    proxy = running_proxy(options={"tiers": {"old": {}}, "default_tier": "old"})
    account = proxy.add_account(100)
    client = proxy.client(account.key)
    assert limits(client.chat()) == (None, None)
    edit_yaml(proxy.config, lambda c: c.update(tiers={"new": {"requests_per_minute": 3}}, default_tier="new"))
    proxy.wait_for_line("read again")
    assert limits(client.get("/v1/models")) == ("3", "2")
    assert [client.chat().status for _ in range(3)] == [200, 200, 429]
    assert_books(proxy, account, credits=100 - 3 * 8)


@pytest.mark.usefixtures("early_in_a_minute")
def test_a_limit_survives_a_restart_and_a_crashed_stream_counts_no_more(running_proxy: MakeProxy) -> None:
    tiers = {"unlimited": {}, "small": {"requests_per_minute": 2, "parallel": 1}}
    proxy = running_proxy(options={"tiers": tiers})
    account = proxy.add_account(100_000, "small")
    assert proxy.client(account.key).chat().status == 200
    proxy.upstream.behaviour = StallsBeforeHeaders()
    with proxy.client(account.key).start_chat():
        proxy.upstream.next_exchange()
        proxy.upstream.next_exchange()
        proxy.kill()
    proxy.upstream.behaviour = Answers()
    proxy.start()
    assert_error(proxy.client(account.key).chat(), 429, "rate_limit_exceeded")  # and not: too many at once
    assert proxy.account(account.name)["held"] == 0
