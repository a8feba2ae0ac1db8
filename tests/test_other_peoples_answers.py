"""An answer goes to who asked for it, and no secret of the operator's to anybody (issue 11, items 9 to 11)."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from tests.support.answers import Answers
from tests.support.attackers import (
    DONE,
    AnswersAgainLater,
    AnswersTwice,
    RawClient,
    SendsRaw,
    chunk,
    request_bytes,
    whole_answer,
    words,
)
from tests.support.books import assert_audit, assert_books
from tests.support.client import Response
from tests.support.errors import assert_error
from tests.support.files import write_yaml
from tests.support.misbehaviours import Fails, SendsEvents
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import wait_until

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]

# -- 9. An upstream that answers twice


def assert_is_mine(answer: Response, question: str) -> None:
    assert answer.status == 200, answer.body
    found = re.findall(rb"answer to (\w+)", answer.body)
    assert found == [question.encode()], answer.body


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_the_second_of_two_answers_goes_to_nobody(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    ann, ben = funded_key(100), funded_key(100)
    upstream.behaviour = AnswersTwice()
    for number in range(3):
        for account, question in ((ann, f"secret{number}"), (ben, f"other{number}")):
            answer = proxy.client(account.key).chat(question, stream=stream)
            assert_is_mine(answer, question)
    asked = [exchange.json["messages"][-1]["content"] for exchange in upstream.posts]
    assert asked == ["secret0", "other0", "secret1", "other1", "secret2", "other2"], "each is asked once"
    assert_books(proxy, ann, credits=100 - 3 * 8)
    assert_books(proxy, ben, credits=100 - 3 * 8)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_answer_that_comes_again_while_nobody_asks_goes_to_nobody(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, stream: bool
) -> None:
    ann, ben = funded_key(100), funded_key(100)
    upstream.behaviour = script = AnswersAgainLater()
    assert_is_mine(proxy.client(ann.key).chat("secret", stream=stream), "secret")
    script.again.set()
    script.sent.wait()
    upstream.behaviour = AnswersAgainLater()
    upstream.behaviour.sent.set()
    assert_is_mine(proxy.client(ben.key).chat("other", stream=stream), "other")
    assert_books(proxy, ann, credits=100 - 8)
    assert_books(proxy, ben, credits=100 - 8)


@pytest.mark.parametrize("rest", [b"x", b"\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 500 Oh\r\n\r\n"])
def test_bytes_after_the_end_of_an_answer_spoil_no_other(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, rest: bytes
) -> None:
    account = funded_key(100)
    body = json.dumps(whole_answer({"content": "fine"}, {"prompt_tokens": 5, "completion_tokens": 3})).encode()
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    answered = 0
    for _ in range(2):
        upstream.behaviour = SendsRaw(head + body + rest)
        answer = proxy.client(account.key).chat()
        assert answer.status == 502 or answer.body == body
        upstream.behaviour = Answers()
        assert proxy.client(account.key).chat().json()["choices"][0]["message"]["content"] == "wordwordword"
        answered += 1 + (answer.status == 200)
    assert_books(proxy, account, credits=100 - answered * 8)


# -- 10. An upstream that tells the operator's secrets

UPSTREAM_KEY = "sk-up/stream+key-0123456789"
HEADER_SECRET = "team/secret:4711=abcdef"
SECRETS = (UPSTREAM_KEY, HEADER_SECRET)
ESCAPES: dict[str, Callable[[str], str]] = {
    "plain": lambda text: text,
    "slashes escaped": lambda text: text.replace("/", "\\/"),
    "all in unicode escapes": lambda text: "".join(f"\\u{ord(letter):04x}" for letter in text),
    "unicode escapes in capitals": lambda text: "".join(f"\\u{ord(letter):04X}" for letter in text),
}


@pytest.fixture(scope="module")
def telling(module_proxy: MakeProxy) -> RunningProxy:
    """A proxy whose upstream gets two secrets."""
    proxy = module_proxy()
    content = yaml.safe_load(proxy.config.read_text())
    section = {"base_url": proxy.upstream.url, "api_key": UPSTREAM_KEY, "headers": {"x-team": HEADER_SECRET}}
    content["upstreams"]["main"] = section
    write_yaml(proxy.config, content)
    return proxy.restart()


@pytest.fixture
def telltale(telling: RunningProxy) -> Any:
    """After the test: no secret is in the log, and the books add up."""
    before = len(telling.lines)
    yield telling
    telling.upstream.reset()
    assert telling.client(telling.add_account(100).key).chat().status == 200
    for line in telling.lines[before:]:
        assert_has_no_secret(line)
    assert_audit(telling)


def assert_has_no_secret(text: str) -> None:
    """Neither as it is, nor under JSON's escapes."""
    decoded = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text).replace("\\/", "/")
    for secret in SECRETS:
        assert secret not in text and secret not in decoded, text[:500]


def everything(answer: Response) -> str:
    return answer.headers.as_string() + answer.body.decode()


def tells(escape: str) -> str:
    """A JSON string's inside that bears both secrets."""
    return "not allowed: " + " ".join(ESCAPES[escape](secret) for secret in SECRETS)


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize(
    "body",
    [
        '{"error": {"message": "%s", "type": "bad", "code": 7}}',
        '{"error": {"message": "no", "type": "%s", "param": "%s", "details": ["%s"]}}',
        '{"error": {"message": "no", "%s": 1}}',
        '{"error": "%s"}',
        '{"detail": "%s"}',
        "%s",
    ],
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_error_that_echoes_a_secret_reaches_the_client_without_it(
    telltale: RunningProxy, body: str, escape: str, stream: bool
) -> None:
    account = telltale.add_account(100)
    telltale.upstream.behaviour = Fails(400, body.replace("%s", tells(escape)).encode())
    answer = telltale.client(account.key).chat(stream=stream)
    assert answer.status == 400
    assert answer.error["message"]
    assert_has_no_secret(everything(answer))
    assert_books(telltale, account, credits=100)


@pytest.mark.parametrize("escape", ESCAPES)
def test_an_error_event_that_echoes_a_secret_reaches_the_client_without_it(telltale: RunningProxy, escape: str) -> None:
    account = telltale.add_account(100)
    error = sse(f'{{"error": {{"message": "{tells(escape)}", "code": 500}}}}'.encode())
    telltale.upstream.behaviour = SendsEvents(words(3) + error + DONE)
    answer = telltale.client(account.key).stream_chat().finish()
    assert answer.body.startswith(words(3))
    assert b'"error"' in answer.body
    assert_has_no_secret(everything(answer))
    assert_books(telltale, account, credits=100 - 8 - 3)


@pytest.mark.parametrize("escape", ESCAPES)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_200_with_an_error_beside_choices_reaches_the_client_without_the_secret(
    telltale: RunningProxy, escape: str, stream: bool
) -> None:
    account = telltale.add_account(100)
    body = json.dumps(whole_answer({"content": "part"})).replace('"choices"', '"error": {"message": "%s"}, "choices"')
    told = body.replace("%s", tells(escape)).encode()
    telltale.upstream.behaviour = Fails(200, told)
    if stream:
        telltale.upstream.behaviour = SendsEvents(sse(told.replace(b'"message": {', b'"delta": {')) + DONE)
    assert_has_no_secret(everything(telltale.client(account.key).chat(stream=stream)))
    assert telltale.wait_until_settled(account)["credits"] <= 100


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("name", ["content-type", "cache-control", "x-accel-buffering", "openai-processing-ms"])
def test_a_header_that_echoes_a_secret_reaches_the_client_without_it(
    telltale: RunningProxy, name: str, status: int
) -> None:
    account = telltale.add_account(100)
    told = f"application/json; x={UPSTREAM_KEY}; y={HEADER_SECRET}"
    body = json.dumps(
        whole_answer({"content": "x"}, {"prompt_tokens": 5, "completion_tokens": 3}) if status == 200 else {}
    )
    headers = {"content-type": "application/json", "content-length": str(len(body)), name: told}
    lines = "".join(f"{header}: {value}\r\n" for header, value in headers.items())
    telltale.upstream.behaviour = SendsRaw(f"HTTP/1.1 {status} Whatever\r\n{lines}\r\n{body}".encode())
    answer = telltale.client(account.key).chat()
    assert answer.status == status
    assert_has_no_secret(everything(answer))
    assert_books(telltale, account, credits=100 - 8 * (status == 200))


@pytest.mark.parametrize("value", ["99999999999", "61", "-1", "Fri, 31 Dec 2099 23:59:59 GMT", "soon"])
@pytest.mark.parametrize("status", [200, 400, 429, 503])
def test_no_answer_tells_a_client_to_wait_longer_than_a_minute(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, status: int, value: str
) -> None:
    account = funded_key(100)
    usage = {"prompt_tokens": 5, "completion_tokens": 3}
    body = whole_answer({"content": "x"}, usage) if status == 200 else {"error": {"message": "no"}}
    upstream.behaviour = Fails(status, body, headers={"retry-after": value})
    answer = proxy.client(account.key).chat()
    assert answer.status == status
    told = answer.headers.get("retry-after")
    assert told is None or 1 <= int(told) <= 60, told
    assert_books(proxy, account, credits=100 - 8 * (status == 200))


# -- 11. An upstream that speaks no HTTP, and the log

PRIVATE = "my-private-diagnosis"
STREAMED = "HTTP/1.1 200 OK\r\ncontent-type: %c\r\n"
CHUNKED = STREAMED + "transfer-encoding: chunked\r\n\r\n"
MALFORMED = {
    "no status line": "%s\r\n\r\n",
    "a status that is no number": "HTTP/1.1 %s OK\r\n\r\n",
    "a header without a colon": "HTTP/1.1 200 OK\r\n%s\r\n\r\n",
    "a header's name with a blank": "HTTP/1.1 200 OK\r\nx %s: 1\r\n\r\n",
    "a length that is no number": "HTTP/1.1 200 OK\r\ncontent-length: %s\r\n\r\n",
    "a chunk's size that is no number": CHUNKED + "%s\r\nxx",
    "a chunk longer than it says": CHUNKED + "2\r\n%s\r\n",
    "gzip that is none": STREAMED + "content-encoding: gzip\r\ncontent-length: 100\r\n\r\n%s",
    "an unknown encoding": STREAMED + "content-encoding: %s\r\ncontent-length: 2\r\n\r\n{}",
    "a content-type that is none": "HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: 9999\r\n\r\n{}",
}


@pytest.mark.parametrize("kind", MALFORMED)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bytes_of_a_malformed_answer_stand_neither_in_the_log_nor_in_the_error(
    telltale: RunningProxy, kind: str, stream: bool
) -> None:
    account = telltale.add_account(100)
    before = len(telltale.lines)
    content_type = "text/event-stream" if stream else "application/json"
    raw = MALFORMED[kind].replace("%c", content_type).replace("%s", f"{PRIVATE} {UPSTREAM_KEY} {PRIVATE}" * 3)
    telltale.upstream.behaviour = SendsRaw(raw.encode())
    answer = telltale.client(account.key).chat("tell me about " + PRIVATE, stream=stream)
    request_id = answer.headers["x-request-id"]
    telltale.wait_for_line(request_id, after=before)
    logged = "\n".join(telltale.lines[before:])
    assert PRIVATE not in logged and UPSTREAM_KEY not in logged, logged
    if answer.status != 200:
        assert_error(answer, 502, "upstream_error", "upstream_error")
        assert PRIVATE not in everything(answer)
        assert_books(telltale, account, credits=100)


def test_bytes_of_a_malformed_request_do_not_stand_in_the_log(proxy: RunningProxy) -> None:
    before = len(proxy.lines)
    lines = [f"GET /{PRIVATE} {PRIVATE}\r\n\r\n", f"GET / HTTP/1.1\r\n{PRIVATE}\r\n\r\n", f"{PRIVATE}\x00\xff\r\n\r\n"]
    for line in lines:
        with RawClient(proxy.port) as client:
            answer = client.send(line.encode("latin-1")).read_all()
        assert answer == b"" or re.match(rb"HTTP/1\.[01] 400 ", answer), answer
    with RawClient(proxy.port) as client:
        client.send(request_bytes("/v1/models", key="sk-" + PRIVATE))
        assert client.status() == 401
    wait_until(lambda: proxy.client(None).get("/health").status == 200, "the proxy is well")
    assert PRIVATE not in "\n".join(proxy.lines[before:])


def test_a_stream_that_turns_malformed_is_charged_for_what_came_and_not_quoted(telltale: RunningProxy) -> None:
    account = telltale.add_account(100)
    before = len(telltale.lines)
    events = words(3) + chunk({"content": ""})
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    raw = head + b"%x\r\n%s\r\n" % (len(events), events) + f"{PRIVATE} {UPSTREAM_KEY}\r\n".encode()
    telltale.upstream.behaviour = SendsRaw(raw)
    answer = telltale.client(account.key).stream_chat().finish()
    telltale.wait_for_line(answer.headers["x-request-id"], after=before)
    logged = "\n".join(telltale.lines[before:])
    assert PRIVATE not in logged and UPSTREAM_KEY not in logged, logged
    assert PRIVATE not in everything(answer)
    charge = (8 + answer.words) if answer.status == 200 else 0
    telltale.wait_until_settled(account)
    assert_books(telltale, account, credits=100 - charge)
