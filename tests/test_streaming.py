"""What comes out of a stream is what went in, event by event; what breaks says so."""

import json
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import openai
import pytest

from tests.support.answers import Answers
from tests.support.books import assert_books
from tests.support.client import chat_request
from tests.support.errors import assert_error, error_frame
from tests.support.exchange import Exchange
from tests.support.misbehaviours import (
    AnswersJsonToAStream,
    BreaksBeforeFirstEvent,
    BreaksBetweenEvents,
    BreaksMidEvent,
    ClosesBeforeHeaders,
    EmptyBody,
    EndsInMidAir,
    EndsWithoutDone,
    ErrorEventThenDone,
    Fails,
    ResetsBeforeHeaders,
    SendsEvents,
    SendsGarbage,
    SendsGzip,
    StallsBeforeFirstByte,
    StallsBeforeHeaders,
    StallsMidStream,
    WrongContentLength,
)
from tests.support.process import Account, RunningProxy
from tests.support.sse import event_data, split_events, sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import CLOSED_SECONDS, WAIT_SECONDS

MakeKey = Callable[..., Account]
ASKED = {"stream": True, "stream_options": {"include_usage": True}}
CHAT_CHOICE = {"index": 0, "delta": {}, "finish_reason": None}
COMPLETION_CHOICE = {"index": 0, "text": "", "logprobs": None, "finish_reason": None}


# -- What went in comes out


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("piece_bytes", [None, 1, 7, 100_000])
def test_who_asked_for_usage_gets_every_byte(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, newline: bytes, piece_bytes: int | None
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Answers(tokens=4, newline=newline, piece_bytes=piece_bytes, word="Grüße, \u2028 🌍 ")
    answer = proxy.client(account.key).chat(**ASKED)
    assert answer.status == 200 and answer.clean
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.body == bytes(upstream.posts[0].sent)
    assert_books(proxy, account, credits=100 - 9)


@pytest.mark.parametrize("usage", ["closing", "finish", "every", "each_choice", "none"])
@pytest.mark.parametrize("n", [1, 3])
def test_usage_comes_through_wherever_it_stands(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, usage: str, n: int
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Answers(usage=usage)
    answer = proxy.client(account.key).chat(**ASKED, n=n)
    assert answer.clean and answer.body == bytes(upstream.posts[0].sent)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("piece_bytes", [None, 1])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_who_did_not_ask_for_usage_gets_it_with_an_empty_choice(
    proxy: RunningProxy,
    upstream: FakeUpstream,
    funded_key: MakeKey,
    newline: bytes,
    piece_bytes: int,
    path: str,
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Answers(newline=newline, piece_bytes=piece_bytes)
    prompt: dict[str, Any] = {"prompt": "hi"} if path == "/v1/completions" else {"messages": []}
    if "messages" in prompt:
        prompt["messages"] = [{"role": "user", "content": "hi"}]
    answer = proxy.client(account.key).post(path, {"model": "plain", "stream": True, **prompt})
    sent, got = split_events(bytes(upstream.posts[0].sent)), answer.events
    assert answer.clean and len(got) == len(sent)
    (changed,) = [number for number, event in enumerate(sent) if got[number] != event]
    choice = COMPLETION_CHOICE if path == "/v1/completions" else CHAT_CHOICE
    assert event_data(got[changed]) == {**event_data(sent[changed]), "choices": [choice]}
    assert got[changed].endswith(newline * 2)
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize("usage", ["finish", "every"])
def test_usage_on_events_with_choices_is_nobodys_business(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, usage: str
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Answers(usage=usage)
    answer = proxy.client(account.key).chat(stream=True)
    assert answer.clean and answer.body == bytes(upstream.posts[0].sent)
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize(
    "options",
    [
        None,
        {},
        {"include_usage": False},
        {"include_obfuscation": False},
        {"include_usage": True, "other": [1]},
    ],
)
def test_usage_is_asked_for_and_other_stream_options_are_kept(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, options: dict[str, Any] | None
) -> None:
    members = {} if options is None else {"stream_options": options}
    assert proxy.client(funded_key().key).chat(stream=True, **members).status == 200
    assert upstream.posts[0].json["stream_options"] == {**(options or {}), "include_usage": True}


def test_usage_is_not_asked_for_where_it_would_be_refused(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    """`stream_options` without `stream` is a 400 at vLLM; `never` is for servers that do not know it."""
    account = funded_key(credits=100)
    client = proxy.client(account.key)
    assert client.chat().status == 200
    assert client.chat(stream=True, model="silent").clean
    assert client.post("/v1/embeddings", {"model": "embedder", "input": "hi"}).status == 200
    assert not any("stream_options" in exchange.json for exchange in upstream.posts)
    assert_books(proxy, account, credits=100 - 8 - (8 + 3) - 2.5)


def test_the_loop_of_every_tutorial_survives(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key()
    messages: Any = [{"role": "user", "content": "hi"}]
    with proxy.openai(account.key) as client:
        for usage in ("closing", "finish", "every", "each_choice", "none"):
            upstream.behaviour = Answers(usage=usage)
            words = []
            for chunk in client.chat.completions.create(model="plain", messages=messages, stream=True):
                if chunk.choices[0].delta.content:
                    words.append(chunk.choices[0].delta.content)
            assert words == ["word"] * 3
        text = client.completions.create(model="plain", prompt="hi", stream=True)
        assert "".join(chunk.choices[0].text for chunk in text) == "wordwordword"


async def test_the_async_client_streams_and_finds_the_usage(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key()
    messages: Any = [{"role": "user", "content": "hi"}]
    async with proxy.async_openai(account.key) as client:
        stream = await client.chat.completions.create(model="plain", messages=messages, stream=True)
        chunks = [chunk async for chunk in stream]
    assert [chunk.usage.total_tokens for chunk in chunks if chunk.usage] == [8]
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content] == ["word"] * 3


def test_comments_other_fields_and_odd_events_pass(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key()
    choice = {"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}
    body = b": ping\n\nevent: message\nid: 7\n" + sse({"choices": [choice]}) + b"retry: 3\n\n"
    body += b'data: {"choices":\ndata: []}\n\n' + b": bye\n\n" + sse(b"[DONE]")
    upstream.behaviour = SendsEvents(body, piece_bytes=5)
    answer = proxy.client(account.key).chat(**ASKED)
    assert answer.clean and answer.body == body


def test_an_event_may_be_megabytes(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=5_000_000)
    upstream.behaviour = Answers(tokens=2, word="x" * 3_000_000)
    answer = proxy.client(account.key).chat(**ASKED)
    assert answer.clean and answer.body == bytes(upstream.posts[0].sent)


def test_an_event_past_16_megabytes_ends_the_stream_as_broken(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=5_000_000)
    body = Answers().token
    upstream.behaviour = sends_a_word_and_then(b"data: " + b"x" * (17 << 20), body)
    answer = proxy.client(account.key).chat(**ASKED)
    assert error_frame(answer)["code"] == "upstream_error"
    assert answer.words == 1 and len(answer.body) < 10_000
    assert proxy.account(account.name)["held"] == 0


def sends_a_word_and_then(rest: bytes, word: Callable[[Exchange], bytes]) -> Any:
    async def behaviour(exchange: Exchange) -> None:
        await exchange.head()
        await exchange.send(word(exchange))
        await exchange.send(rest)
        await exchange.stall()

    return behaviour


def test_an_event_goes_on_as_soon_as_it_is_whole(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key()
    answers = Answers(pause_after=2)
    upstream.behaviour = answers
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"word"', times=2)  # while the upstream waits for us
        answers.resume.set()
        assert stream.finish().clean
    assert_books(proxy, account, credits=92)


def test_done_ends_a_stream_though_the_upstream_goes_on(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key()

    async def behaviour(exchange: Exchange) -> None:
        await exchange.head()
        await Answers().send_tokens(exchange)
        await Answers().send_closing(exchange)
        await exchange.stall()

    upstream.behaviour = behaviour
    answer = proxy.client(account.key).chat(stream=True)
    assert answer.clean and answer.body.endswith(b"data: [DONE]\n\n")
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize("connection", ["keep-alive", "close"])
def test_a_client_of_http_1_0_sees_the_end_of_a_stream(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, connection: str
) -> None:
    """Without chunks nothing but the connection's end tells it."""
    account = funded_key(credits=100)
    body = json.dumps(chat_request(**ASKED)).encode()
    head = f"POST /v1/chat/completions HTTP/1.0\r\nAuthorization: Bearer {account.key}\r\nConnection: {connection}\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=WAIT_SECONDS) as client:
        client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        answer = b"".join(iter(partial(client.recv, 65536), b""))
    assert answer.partition(b"\r\n\r\n")[2] == bytes(upstream.posts[0].sent)
    assert_books(proxy, account, credits=100 - 8)


# -- Headers, and answers that are no stream


def test_a_stream_has_headers_that_keep_buffers_away(proxy: RunningProxy, funded_key: MakeKey) -> None:
    answer = proxy.client(funded_key().key).chat(stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-request-id"]
    assert answer.headers["content-length"] is None


@pytest.mark.parametrize("behaviour", [BreaksBeforeFirstEvent(), EmptyBody()])
def test_the_status_is_not_committed_before_the_first_event(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, behaviour: Any
) -> None:
    """The upstream said 200 and then nothing of use: the client still gets an honest status."""
    account = funded_key(credits=100)
    upstream.behaviour = behaviour
    assert_error(proxy.client(account.key).chat(stream=True), 502, "upstream_error", "upstream_error")
    assert_books(proxy, account, credits=100)


def test_a_json_answer_to_a_stream_is_relayed_as_json(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = AnswersJsonToAStream()
    answer = proxy.client(account.key).chat(stream=True)
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.body == bytes(upstream.posts[0].sent)
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize("stream", [False, True])
def test_gzip_is_neither_asked_for_nor_passed_on(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = SendsGzip()
    answer = proxy.client(account.key).chat(stream=stream)
    assert "gzip" not in upstream.posts[0].headers.get("accept-encoding", "identity")
    assert answer.headers["content-encoding"] is None
    assert answer.words == 3 if stream else answer.json()["choices"][0]["message"]["content"]
    assert_books(proxy, account, credits=92)


def test_a_whole_answer_is_relayed_byte_for_byte(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    answer = proxy.client(account.key).chat()
    assert answer.body == bytes(upstream.posts[0].sent)
    assert answer.headers["content-length"] == str(len(answer.body))


# -- Streams that end badly


def test_a_clean_end_without_done_is_an_end(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = EndsWithoutDone()
    answer = proxy.client(account.key).chat(**ASKED)
    assert answer.clean and answer.body == bytes(upstream.posts[0].sent)
    assert b"error" not in answer.body
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize("behaviour", [BreaksMidEvent(), BreaksBetweenEvents(), EndsInMidAir(), WrongContentLength()])
def test_a_break_is_told_at_an_event_boundary_and_never_looks_like_an_end(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, behaviour: Any
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = behaviour
    answer = proxy.client(account.key).chat(stream=True)
    error = error_frame(answer)
    assert (error["code"], error["type"], error["status"]) == ("upstream_error", "upstream_error", 502)
    whole = answer.events[:-1]
    assert b"".join(whole) == bytes(upstream.posts[0].sent)[: sum(map(len, whole))]
    assert all(event.endswith(b"\n\n") for event in answer.events)
    assert proxy.account(account.name)["held"] == 0


@pytest.mark.parametrize("newline", [b"\r\n", b"\r"], ids=["CRLF", "CR"])
def test_an_error_frame_stands_alone_in_a_stream_with_other_line_ends(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, newline: bytes
) -> None:
    account = funded_key(credits=100)

    async def behaviour(exchange: Exchange) -> None:
        await exchange.head()
        await Answers(newline=newline).send_tokens(exchange)
        await exchange.send(b'data: {"half')

    upstream.behaviour = behaviour
    answer = proxy.client(account.key).chat(stream=True)
    assert error_frame(answer)["code"] == "upstream_error"
    assert answer.words == 3


def test_the_official_client_raises_at_a_break_and_shows_what_came(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = BreaksMidEvent(tokens=2)
    words = []
    with proxy.openai(account.key) as client, pytest.raises(openai.APIError) as raised:
        messages: Any = [{"role": "user", "content": "hi"}]
        for chunk in client.chat.completions.create(model="plain", messages=messages, stream=True):
            words += [chunk.choices[0].delta.content] if chunk.choices[0].delta.content else []
    assert words == ["word", "word"]
    assert raised.value.code == "upstream_error"


def test_an_error_event_of_the_upstream_passes_as_it_is(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    upstream.behaviour = ErrorEventThenDone()
    answer = proxy.client(funded_key(credits=100).key).chat(stream=True)
    assert answer.body.startswith(bytes(upstream.posts[0].sent).removesuffix(sse(b"[DONE]")))
    assert answer.body.count(b'"error"') == 1
    assert b"[DONE]" not in answer.body or not answer.clean, "counts as broken"


def test_silence_in_the_middle_ends_with_a_timeout(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = StallsMidStream(tokens=2)
    answer = proxy.client(account.key).chat(stream=True, model="impatient")
    error = error_frame(answer)
    assert (error["code"], error["type"], error["status"]) == ("upstream_timeout", "upstream_error", 504)
    assert answer.words == 2
    upstream.posts[0].closed.wait(CLOSED_SECONDS)
    assert proxy.account(account.name)["held"] == 0


@pytest.mark.parametrize("behaviour", [StallsBeforeHeaders(), StallsBeforeFirstByte()])
@pytest.mark.parametrize("stream", [False, True])
def test_silence_from_the_start_is_a_504(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, behaviour: Any, stream: bool
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = behaviour
    answer = proxy.client(account.key).chat(stream=stream, model="impatient")
    assert_error(answer, 504, "upstream_timeout", "upstream_error")
    upstream.posts[0].closed.wait(CLOSED_SECONDS)
    assert proxy.account(account.name)["held"] == 0


def test_garbage_never_looks_like_a_clean_end(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey) -> None:
    upstream.behaviour = SendsGarbage()
    answer = proxy.client(funded_key(credits=100).key).chat(stream=True)
    assert answer.status == 502 or error_frame(answer)["code"] == "upstream_error"


# -- Several upstreams

MOVES_ON = {
    "resets": ResetsBeforeHeaders(),
    "hangs up": ClosesBeforeHeaders(),
    "breaks before the first event": BreaksBeforeFirstEvent(),
    "empty body": EmptyBody(),
    "401": Fails(401),
    "403": Fails(403),
    "429": Fails(429),
    "500": Fails(500),
    "503": Fails(503),
}


@pytest.mark.parametrize("name", MOVES_ON)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_first_upstream_cannot_do_the_second_does(
    proxy: RunningProxy,
    upstream: FakeUpstream,
    backup: FakeUpstream,
    funded_key: MakeKey,
    name: str,
    stream: bool,
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = MOVES_ON[name]
    answer = proxy.client(account.key).chat(model="pair", stream=stream)
    assert answer.status == 200 and answer.clean
    assert len(backup.posts) == 1 and upstream.posts
    assert answer.body == bytes(backup.posts[0].sent) or stream
    said = rf"status {name}" if name.isdigit() else "upstream main broke"
    proxy.wait_for_line(rf"^\S+ {answer.headers['x-request-id']} .*{said}")
    assert_books(proxy, account, credits=92)


def test_who_refuses_connections_is_passed_over(proxy: RunningProxy, backup: FakeUpstream, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    for _ in range(3):
        assert proxy.client(account.key).chat(model="absent-pair", stream=True).clean
    assert len(backup.posts) == 3
    assert_books(proxy, account, credits=100 - 24)


def test_a_silent_first_upstream_is_passed_over(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = StallsBeforeFirstByte()
    assert proxy.client(account.key).chat(model="impatient-pair", stream=True).clean
    assert len(upstream.posts) == len(backup.posts) == 1
    assert_books(proxy, account, credits=92)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_mistake_of_the_request_is_not_tried_elsewhere(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey, status: int
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Fails(status)
    answer = proxy.client(account.key).chat(model="pair")
    assert (answer.status, backup.posts) == (status, [])
    assert_books(proxy, account, credits=100)


def test_after_the_first_event_there_is_no_second_upstream(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey
) -> None:
    upstream.behaviour = BreaksBetweenEvents(tokens=1)
    answer = proxy.client(funded_key(credits=100).key).chat(model="pair", stream=True)
    assert error_frame(answer)["code"] == "upstream_error"
    assert not backup.posts


def test_when_all_fail_the_last_answer_counts(
    proxy: RunningProxy, upstream: FakeUpstream, backup: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour, backup.behaviour = Fails(500), Fails(429, headers={"retry-after": "7"})
    answer = proxy.client(account.key).chat(model="pair", stream=True)
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")
    upstream.behaviour, backup.behaviour = Fails(429), Fails(500)
    assert_error(proxy.client(account.key).chat(model="pair"), 502, "upstream_error")
    assert_books(proxy, account, credits=100)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("value", ["1", "60", "61", "3600", "99999999", "Wed, 21 Oct 2099 07:28:00 GMT", "-5", "soon"])
def test_an_upstream_cannot_put_a_client_to_sleep(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: int, value: str
) -> None:
    upstream.behaviour = Fails(status, headers={"retry-after": value})
    answer = proxy.client(funded_key(credits=100).key).chat()
    assert answer.status == status
    seconds = answer.headers["retry-after"]
    assert seconds == value if value in ("1", "60") else seconds is None or 0 <= int(seconds) <= 60


# -- Errors of an upstream that are the client's to know


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422, 429])
def test_an_error_in_our_shape_passes_with_its_body(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: int
) -> None:
    account = funded_key(credits=100)
    body = {"error": {"message": "the context is too long", "type": "x", "code": "context_length_exceeded"}}
    upstream.behaviour = Fails(status, body)
    for stream in (False, True):
        answer = proxy.client(account.key).chat(stream=stream)
        assert (answer.status, answer.json()) == (status, body)
        assert answer.headers["x-request-id"]
    assert_books(proxy, account, credits=100)


@pytest.mark.parametrize(
    "body",
    [{"error": "model not found"}, {"detail": "no"}, b"<html>no</html>", b"", {"error": {"code": 7}}, b"[]"],
)
def test_an_error_of_another_shape_is_put_into_ours(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, body: Any
) -> None:
    account = funded_key(credits=100)
    upstream.behaviour = Fails(404, body)
    answer = proxy.client(account.key).chat()
    assert answer.status == 404 and answer.error["message"] and answer.error["status"] == 404
    assert isinstance(answer.error["code"], str)
    assert_books(proxy, account, credits=100)


def test_an_unreachable_upstream_is_named(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    for stream in (False, True):
        answer = proxy.client(account.key).chat(model="absent", stream=stream)
        error = assert_error(answer, 503, "upstream_unavailable", "upstream_error")
        assert '"absent"' in error["message"], "says which upstream did not answer"
        assert "127.0.0.1" not in json.dumps(error), "and not where it is"
    assert_books(proxy, account, credits=100)


def test_an_upstream_without_its_key_is_off_and_says_what_is_missing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    error = assert_error(proxy.client(account.key).chat(model="off"), 503, "upstream_unavailable", "upstream_error")
    assert "SURELY_UNSET_VARIABLE" in error["message"]
    assert not upstream.posts
    assert_books(proxy, account, credits=100)


# -- The echo model, which speaks the same protocol


def test_echo_says_what_was_said_word_by_word(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    answer = proxy.client(account.key).chat("one two  three", model="echo", **ASKED)
    usage = answer.chunks[-2]["usage"]
    said = [choice["delta"].get("content") or "" for chunk in answer.chunks[:-1] for choice in chunk["choices"]]
    assert "".join(said).split() == ["one", "two", "three"]
    assert usage["completion_tokens"] == sum(bool(text) for text in said) == 3
    assert_books(proxy, account, credits=100 - usage["prompt_tokens"] - 3)


def test_echo_honours_the_maximum(proxy: RunningProxy, funded_key: MakeKey) -> None:
    account = funded_key(credits=100)
    answer = proxy.client(account.key).chat("one two three", model="echo", max_tokens=2)
    choice, usage = answer.json()["choices"][0], answer.json()["usage"]
    assert choice["message"]["content"].split() == ["one", "two"]
    assert (choice["finish_reason"], usage["completion_tokens"]) == ("length", 2)
    assert json.loads(answer.headers["x-credits-charged"]) == usage["total_tokens"]
    assert_books(proxy, account, credits=100 - usage["total_tokens"])
