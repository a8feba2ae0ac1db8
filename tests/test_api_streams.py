"""Streams of the Responses and Messages APIs: who pays what when one ends, well or badly."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.api_calls import MESSAGES, MESSAGES_API, RESPONSES_API, Api, last_event
from tests.support.api_upstreams import (
    AnswersMessages,
    AnswersResponses,
    EndsInMidAir,
    GoesSilent,
    HangsUp,
    HangsUpMidEvent,
    KeepsTheLineOpen,
    SaysWhatFailed,
    Speaks,
    named,
)
from tests.support.books import assert_audit, assert_books
from tests.support.client import QUESTION_ESTIMATE
from tests.support.process import Account, RunningProxy
from tests.support.sse import event_data, sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS

MakeKey = Callable[..., Account]
PROMPT = 5  # what both upstreams say of it


def upstream_of(api: Api, **members: Any) -> Speaks:
    return (AnswersMessages if api.path == MESSAGES else AnswersResponses)(prompt_tokens=PROMPT, **members)


# An API, and what the prompt of its stream costs if it is cut: messages say it at the start, responses at the end.
CUT = [
    pytest.param(MESSAGES_API, PROMPT, id="messages"),
    pytest.param(RESPONSES_API, QUESTION_ESTIMATE, id="responses"),
]
APIS = [pytest.param(api, id=api.path.rpartition("/")[2]) for api in (MESSAGES_API, RESPONSES_API)]


# -- A good end


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("piece_bytes", [None, 1, 7])
@pytest.mark.parametrize("api", APIS)
def test_every_byte_passes_however_it_comes(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, piece_bytes: int | None, newline: bytes
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = upstream_of(api, newline=newline, piece_bytes=piece_bytes, word="wörd\u2028")
    answer = api.ask(proxy.client(account.key), stream=True)
    assert (answer.status, answer.clean, answer.body) == (200, True, bytes(upstream.posts[0].sent))
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert_books(proxy, account, credits=1000 - PROMPT - 3)


@pytest.mark.parametrize("api", APIS)
def test_a_stream_is_paid_before_its_closing_event_is_seen(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    """And that event ends it, though the upstream keeps its connection open."""
    account = funded_key(credits=1000)
    upstream.behaviour = KeepsTheLineOpen(upstream_of(api))
    closing = b'"message_stop"' if api.path == MESSAGES else b'"type":"response.completed"'
    client = proxy.client(account.key)
    with client.send("POST", api.path, api.request(stream=True)) as sent, sent.answered() as stream:
        stream.read_until(closing)
        assert client.balance == 1000 - PROMPT - 3
        assert stream.finish().clean
    upstream.posts[0].closed.wait(CLOSED_SECONDS)
    assert_books(proxy, account, credits=1000 - PROMPT - 3)


@pytest.mark.parametrize("api", APIS)
def test_an_event_goes_on_as_soon_as_it_is_whole(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = answers = upstream_of(api, tokens=4, pause_after=2)
    client = proxy.client(account.key)
    with client.send("POST", api.path, api.request(stream=True)) as sent, sent.answered() as stream:
        stream.read_until(b'"word"', times=2)
        assert proxy.account(account.name)["held"] > 0
        answers.resume.set()
        assert stream.finish().clean
    assert_books(proxy, account, credits=1000 - PROMPT - 4)


@pytest.mark.parametrize("api", APIS)
def test_comments_and_pings_and_unknown_events_pass_and_cost_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    account = funded_key(credits=1000)
    answers = upstream_of(api)
    odd = b': keepalive\n\nevent: ping\ndata: {"type":"ping"}\n\nevent: new\ndata: {"type":"new","x":[1]}\n\n'

    async def chatters(exchange: Any) -> None:
        await exchange.head()
        await exchange.send(odd)
        await answers.send_tokens(exchange)
        await exchange.send(odd)
        await answers.send(exchange, *answers.closing(exchange.json))
        await exchange.end()

    upstream.behaviour = chatters
    answer = api.ask(proxy.client(account.key), stream=True)
    assert (answer.body, answer.clean) == (bytes(upstream.posts[0].sent), True)
    assert_books(proxy, account, credits=1000 - PROMPT - 3)


@pytest.mark.parametrize("api", APIS)
def test_a_json_answer_to_a_stream_is_relayed_as_json(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    account = funded_key(credits=1000)
    answers = upstream_of(api)

    async def ignores_stream(exchange: Any) -> None:
        await exchange.answer(answers.whole(exchange.json))

    upstream.behaviour = ignores_stream
    answer = api.ask(proxy.client(account.key), stream=True)
    assert (answer.body, answer.clean) == (bytes(upstream.posts[0].sent), True)
    assert answer.headers["content-type"].startswith("application/json")
    assert_books(proxy, account, credits=1000 - PROMPT - 3)


@pytest.mark.parametrize("api", APIS)
def test_a_completion_below_half_of_what_was_seen_is_not_believed(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    account = funded_key(credits=1000)
    for said, charged in ((0, 20), (9, 20), (10, 10), (31, 31)):
        upstream.behaviour = upstream_of(api, tokens=20, output_tokens=said)
        before = proxy.client(account.key).balance
        assert api.ask(proxy.client(account.key), stream=True).clean
        assert before - proxy.client(account.key).balance == PROMPT + charged
    assert_books(proxy, account, credits=1000 - 4 * PROMPT - 81)


# -- The client leaves


@pytest.mark.parametrize("tokens", [1, 7, 150])
@pytest.mark.parametrize(("api", "prompt"), CUT)
def test_leaving_in_the_middle_costs_the_prompt_and_what_came(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, prompt: int, tokens: int
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = answers = upstream_of(api, tokens=500, word="a ", pause_after=tokens)
    request = {**api.request(stream=True), api.bound: 500}
    with proxy.client(account.key).send("POST", api.path, request) as sent, sent.answered() as stream:
        answers.reached.wait()
        stream.read_until(b'"a "', times=tokens)
        stream.leave()
        upstream.posts[0].closed.wait(CLOSED_SECONDS)
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - prompt - tokens)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_leaving_before_the_upstream_answers_costs_the_estimate(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, stream: bool
) -> None:
    account = funded_key(credits=1000)

    async def thinks(exchange: Any) -> None:
        await exchange.stall()

    upstream.behaviour = thinks
    with proxy.client(account.key).send("POST", api.path, api.request(stream=stream)) as pending:
        exchange = upstream.next_exchange()
        pending.leave()
        exchange.closed.wait(CLOSED_SECONDS)
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - QUESTION_ESTIMATE)


def test_leaving_a_cached_prompt_costs_its_cached_tokens(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """The closing usage says only what the answer was: the start's is remembered."""
    account = funded_key(credits=1000)
    upstream.behaviour = answers = AnswersMessages(tokens=9, prompt_tokens=400, cached=390, pause_after=4)
    request = MESSAGES_API.request(stream=True)
    with proxy.client(account.key).send("POST", MESSAGES, request) as sent, sent.answered() as stream:
        answers.reached.wait()
        stream.read_until(b'"word"', times=4)
        stream.leave()
        upstream.posts[0].closed.wait(CLOSED_SECONDS)
    proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=1000 - 400 - 4)


# -- The upstream breaks


@pytest.mark.parametrize("behaviour", [EndsInMidAir, HangsUp, HangsUpMidEvent], ids=lambda how: how.__name__)
@pytest.mark.parametrize(("api", "prompt"), CUT)
def test_a_stream_without_its_closing_event_is_broken_and_what_came_is_charged(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, prompt: int, behaviour: Any
) -> None:
    """A clean end of HTTP's does not make it whole, nor does a stop reason; nobody invents an end."""
    account = funded_key(credits=1000)
    upstream.behaviour = behaviour(upstream_of(api, tokens=2))
    answer = api.ask(proxy.client(account.key), stream=True)
    assert api.broken_off(answer) == "upstream_error"
    relayed = b"".join(answer.events[:-1])
    assert bytes(upstream.posts[0].sent).startswith(relayed)
    words = [event for event in answer.events if b"delta" in event.splitlines()[0] and b'"word"' in event]
    assert len(words) == 2 and all(isinstance(event_data(event), dict) for event in answer.events)
    assert_books(proxy, account, credits=1000 - prompt - 2)


@pytest.mark.parametrize(
    ("behaviour", "model", "code"),
    [(HangsUp, "plain", "upstream_error"), (GoesSilent, "impatient", "upstream_timeout")],
    ids=["hangs up", "goes silent"],
)
@pytest.mark.parametrize(("api", "prompt"), CUT)
def test_a_break_is_told_in_the_apis_own_event(
    proxy: RunningProxy,
    upstream: FakeUpstream,
    funded_key: MakeKey,
    api: Api,
    prompt: int,
    behaviour: Any,
    model: str,
    code: str,
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = behaviour(upstream_of(api, tokens=2))
    answer = api.ask(proxy.client(account.key), model=model, stream=True)
    assert api.broken_off(answer) == code
    assert answer.body.startswith(bytes(upstream.posts[0].sent))
    assert_books(proxy, account, credits=1000 - prompt - 2)


OVERLOADED = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
FLAT = {"type": "error", "code": "server_error", "message": "the engine died", "param": None, "sequence_number": 9}
NESTED = {"type": "error", "error": {"type": "server_error", "message": "the engine died", "code": None}}


@pytest.mark.parametrize(
    ("api", "prompt", "error", "encode"),
    [
        pytest.param(MESSAGES_API, PROMPT, OVERLOADED, named, id="messages"),
        pytest.param(MESSAGES_API, PROMPT, OVERLOADED, sse, id="messages, without a name"),
        pytest.param(RESPONSES_API, QUESTION_ESTIMATE, FLAT, named, id="responses, flat"),
        pytest.param(RESPONSES_API, QUESTION_ESTIMATE, NESTED, named, id="responses, nested"),
    ],
)
def test_an_upstreams_error_event_passes_as_it_is_and_counts_as_broken(
    proxy: RunningProxy,
    upstream: FakeUpstream,
    funded_key: MakeKey,
    api: Api,
    prompt: int,
    error: dict[str, Any],
    encode: Callable[[Any], bytes],
) -> None:
    account = funded_key(credits=1000)
    upstream.behaviour = SaysWhatFailed(upstream_of(api, tokens=2), encode(error))
    answer = api.ask(proxy.client(account.key), stream=True)
    assert answer.body.startswith(bytes(upstream.posts[0].sent)) and not answer.clean
    assert last_event(answer)[1] == error, "theirs is the only one"
    assert_books(proxy, account, credits=1000 - prompt - 2)


@pytest.mark.parametrize(
    ("api", "members", "kind"),
    [
        pytest.param(MESSAGES_API, {"max_tokens": 5000}, "billing_error", id="messages"),
        pytest.param(RESPONSES_API, {}, "insufficient_credits", id="responses"),
    ],
)
def test_the_end_of_the_credits_is_told_in_the_apis_own_event(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, members: dict[str, Any], kind: str
) -> None:
    account = funded_key(credits=200)
    upstream.behaviour = upstream_of(api, tokens=5000, word="a ", honours_maximum=False)
    answer = api.ask(proxy.client(account.key), stream=True, **members)
    assert api.broken_off(answer) == "insufficient_credits"
    assert last_event(answer)[1]["error"]["type"] == kind
    shown = proxy.wait_until_settled(account)
    assert_books(proxy, account, credits=shown["credits"])
    assert -20 < shown["credits"] < 20


@pytest.mark.parametrize("api", APIS)
def test_a_stream_that_breaks_before_its_first_event_costs_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    account = funded_key(credits=1000)

    async def breaks_at_once(exchange: Any) -> None:
        await exchange.head()
        await exchange.send(b"event: message_start\ndata: {")

    upstream.behaviour = breaks_at_once
    api.assert_refused(api.ask(proxy.client(account.key), stream=True), 502, "upstream_error")
    assert_books(proxy, account, credits=1000)


@pytest.mark.parametrize("api", APIS)
def test_a_chats_done_does_not_end_a_stream_of_another_api(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    account = funded_key(credits=1000)
    answers = upstream_of(api, tokens=2)

    async def says_done(exchange: Any) -> None:
        await exchange.head()
        await answers.send_tokens(exchange)
        await exchange.send(b"data: [DONE]\n\n")
        await exchange.end()

    upstream.behaviour = says_done
    answer = api.ask(proxy.client(account.key), stream=True)
    assert not answer.clean
    shown = proxy.wait_until_settled(account)
    assert_books(proxy, account, shown["credits"])
    assert shown["credits"] in (1000 - PROMPT - 2, 1000 - QUESTION_ESTIMATE - 2)


# -- Long answers and little credit


@pytest.mark.parametrize("api", APIS)
def test_a_long_stream_holds_slices_and_not_its_maximum(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    """Claude Code asks for 32,000 tokens, Codex for no maximum; both must leave the balance to others."""
    account = funded_key(credits=100_000)
    upstream.behaviour = answers = upstream_of(api, tokens=450, word="a ", pause_after=320)
    request = {**api.request(stream=True), api.bound: 32_000}
    with proxy.client(account.key).send("POST", api.path, request) as sent, sent.answered() as stream:
        answers.reached.wait()
        stream.read_until(b'"a "', times=320)
        assert 320 <= proxy.account(account.name)["held"] < 700
        answers.resume.set()
        assert stream.finish().clean
    assert_books(proxy, account, credits=100_000 - PROMPT - 450)


@pytest.mark.parametrize("api", APIS)
def test_an_honest_answer_is_never_cut_before_its_end(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    """Its words have eight bytes a token: the estimate is twice the truth, and there are no credits for that."""
    account = funded_key(credits=2 * QUESTION_ESTIMATE + 200)
    upstream.behaviour = upstream_of(api, tokens=200, word="wordword")
    answer = api.ask(proxy.client(account.key), stream=True, **{api.bound: 200})
    assert answer.clean
    assert_books(proxy, account, credits=2 * QUESTION_ESTIMATE - PROMPT)
    assert_audit(proxy)
