"""Raw answers of two real servers, replayed byte for byte through the proxy (see data/captures/README.md).

Each goes out as the HTTP chunks that it came in, one byte a packet where it is small, and in one packet; to
a client that asked for usage and to one that did not. What must come out, and what must be charged, is worked
out here from the capture alone.
"""

import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.books import assert_books
from tests.support.client import Response
from tests.support.errors import assert_error, error_frame
from tests.support.exchange import Exchange
from tests.support.process import Account, RunningProxy
from tests.support.sse import event_data, split_events
from tests.support.waiting import Signal

FOLDER = Path(__file__).parent / "data" / "captures"
SMALL_BYTES = 1500
EMPTY_CHOICE = {
    "chat/completions": b'{"index":0,"delta":{},"finish_reason":null}',
    "completions": b'{"index":0,"text":"","logprobs":null,"finish_reason":null}',
}
ABOUT_OUR_KEY = {401, 402, 403, 407}


# --------------------------------------------------------------------------------------------------
# What a capture says


@dataclass
class Capture:
    """One answer as it went over the wire, and the request that it answers."""

    name: str
    raw: bytes
    request: dict[str, Any]
    status: int = 0
    is_stream: bool = False  # by the answer's content type
    packets: list[bytes] = field(default_factory=list)  # the head, then each HTTP chunk, framing and all
    body: bytes = b""  # without HTTP's framing
    whole: bool = True  # ends as HTTP says
    closes: bool = False  # the server closed the connection after it

    @property
    def path(self) -> str:
        if "messages" in self.request:
            return "chat/completions"
        return "completions" if "prompt" in self.request else "embeddings"

    @property
    def events(self) -> list[bytes]:
        return split_events(self.body)

    @property
    def chunks(self) -> list[Any]:
        data = map(event_data, self.events) if self.is_stream else [json.loads(self.body)]
        return [chunk for chunk in data if isinstance(chunk, dict)]

    @property
    def is_broken(self) -> bool:
        """A stream that has no end: the proxy must say so."""
        return self.is_stream and self.body != b"" and b"data: [DONE]\n\n" not in self.body

    @property
    def is_empty(self) -> bool:
        return self.is_stream and self.body == b""


def load_capture(path: Path) -> Capture:
    raw = path.read_bytes()
    head, _, rest = raw.partition(b"\r\n\r\n")
    request = json.loads(path.with_suffix(".req.json").read_bytes())
    name = str(path.relative_to(FOLDER).with_suffix(""))
    capture = Capture(name, raw, request, packets=[head + b"\r\n\r\n"])
    fields = head.decode().lower()
    capture.status = int(fields.split(" ")[1])
    capture.is_stream = "content-type: text/event-stream" in fields
    capture.closes = "connection: close" in fields
    if "transfer-encoding: chunked" in fields:
        capture.whole = False  # until the last chunk is seen
        for frame, data in split_chunks(rest):
            capture.packets.append(frame)
            capture.body += data
            capture.whole = not data
    else:
        capture.packets.append(rest)
        capture.body = rest
    assert b"".join(capture.packets) == raw, path
    return capture


def split_chunks(rest: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The HTTP chunks of a body: each with its framing, and its data alone."""
    while rest:
        line, _, after = rest.partition(b"\r\n")
        size = int(line, 16)
        end = len(line) + 2 + size + 2
        yield rest[:end], after[:size]
        rest = rest[end:]


CAPTURES = {capture.name: capture for capture in map(load_capture, sorted(FOLDER.glob("*/*.raw")))}


# --------------------------------------------------------------------------------------------------
# What it must cost, and look like


def estimate(request: dict[str, Any]) -> int:
    """E: text bytes / 4, 4 a message, the text of tools and of response_format."""
    quarters = 0
    for message in request.get("messages", ()):
        quarters += 4 * 4 + len(message["content"].encode())
    for name in ("tools", "response_format"):
        if name in request:
            quarters += len(json.dumps(request[name], separators=(",", ":"), ensure_ascii=False).encode())
    quarters += len(request.get("prompt", "").encode())
    return math.ceil(quarters / 4)


def texts_of(chunk: dict[str, Any]) -> str:
    """All the text that a chunk bears, of all its choices."""
    text = ""
    for choice in chunk.get("choices", ()):
        part = choice.get("delta") or choice.get("message") or {}
        text += (part.get("content") or "") + (choice.get("text") or "")
        text += "".join(call["function"].get("arguments", "") for call in part.get("tool_calls") or ())
    return text


def running_count(chunks: list[dict[str, Any]]) -> int:
    texts = [text for text in map(texts_of, chunks) if text]
    return max(len(texts), math.ceil(len("".join(texts).encode()) / 4))


def count_certain(chunks: list[dict[str, Any]]) -> int:
    """What an answer must have used, however long its tokens are."""
    texts = [text for text in map(texts_of, chunks) if text]
    return max(len(texts), len("".join(texts).encode()) // 8)


def tokens_owed(capture: Capture) -> int:
    """What the capture's own usage says; the documented estimate where it says nothing."""
    if capture.status != 200 or capture.is_empty:
        return 0
    reports = [chunk for chunk in capture.chunks if chunk.get("usage")]
    if reports:
        usage = reports[-1]["usage"]
        completion = usage.get("completion_tokens", 0)
        if capture.request.get("n", 1) > 1:  # it may be one choice's
            completion = max(completion, count_certain(capture.chunks))
        return int(usage["prompt_tokens"] + completion)
    return estimate(capture.request) + running_count(capture.chunks)


def expected_body(capture: Capture, asks: bool) -> bytes:
    """The capture's bytes, but for the one event that a client who did not ask gets made safe."""
    if asks or not capture.is_stream:
        return capture.body
    return b"".join(map(made_safe, itertools.repeat(capture.path), capture.events))


def made_safe(path: str, event: bytes) -> bytes:
    data = event_data(event)
    if not isinstance(data, dict) or not data.get("usage") or data.get("choices") != []:
        return event
    return re.sub(rb'("choices": ?\[)(\])', lambda m: m[1] + EMPTY_CHOICE[path] + m[2], event, count=1)


def ways_to_ask(capture: Capture) -> tuple[bool, ...]:
    """Whether the client asks for usage: a question for streams only."""
    return (True, False) if capture.request.get("stream") else (False,)


def as_asked(request: dict[str, Any], asks: bool) -> dict[str, Any]:
    """The request of a client that asks for usage, or of one that does not."""
    if not request.get("stream"):
        return request
    others = {name: v for name, v in (request.get("stream_options") or {}).items() if name != "include_usage"}
    return {**request, "stream_options": {**others, "include_usage": asks}}


# --------------------------------------------------------------------------------------------------
# The replay


@dataclass
class Replays:
    """Sends these packets. After a capture that breaks off it hangs up, once the client has all of it."""

    capture: Capture
    packets: list[bytes]
    arrived: Signal = field(default_factory=Signal)

    async def __call__(self, exchange: Exchange) -> None:
        for packet in self.packets:
            await exchange.raw(packet)
        if self.capture.is_broken:
            await self.arrived.happened()
        exchange.complete = self.capture.whole and not self.capture.closes


def ways_to_send(capture: Capture) -> dict[str, list[bytes]]:
    ways = {"chunk by chunk": capture.packets, "in one packet": [capture.raw]}
    if len(capture.raw) <= SMALL_BYTES:
        ways["byte by byte"] = [capture.raw[i : i + 1] for i in range(len(capture.raw))]
    return ways


def replay(proxy: RunningProxy, key: str, capture: Capture, packets: list[bytes], asks: bool) -> Response:
    behaviour = Replays(capture, packets)
    proxy.upstream.behaviour = behaviour
    request = {**as_asked(capture.request, asks), "model": "plain"}
    sent = proxy.client(key).send("POST", f"/v1/{capture.path}", request)
    with sent, sent.answered() as stream:
        if capture.is_broken:
            last = capture.events[-1]
            stream.read_until(last, capture.events.count(last))  # a model says a word twice, to the byte
            behaviour.arrived.set()
        return stream.finish()


def assert_answer(capture: Capture, answer: Response, asks: bool) -> None:
    if capture.is_empty or capture.status >= 500 or capture.status in ABOUT_OUR_KEY:
        assert_error(answer, 502, "upstream_error")
    elif capture.status >= 400 and "message" not in (capture.chunks[0].get("error") or {}):
        assert answer.status == capture.status
        assert set(answer.error) >= {"message", "type", "param", "code", "status"}
    else:
        assert answer.status == capture.status
        if capture.is_broken:
            assert error_frame(answer)["code"] == "upstream_error"
            assert b"".join(answer.events[:-1]) == expected_body(capture, asks)
        else:
            assert answer.body == expected_body(capture, asks)
            assert answer.clean


@pytest.mark.parametrize("name", CAPTURES)
def test_a_real_servers_bytes_pass_unchanged_and_cost_what_it_says(
    name: str, proxy: RunningProxy, account: Account
) -> None:
    """However the network cuts them."""
    capture = CAPTURES[name]
    for (way, packets), asks in itertools.product(ways_to_send(capture).items(), ways_to_ask(capture)):
        answer = replay(proxy, account.key, capture, packets, asks)
        assert_answer(capture, answer, asks)
        account.credits -= tokens_owed(capture)
        assert proxy.client(account.key).balance == account.credits, (way, asks)
    assert_books(proxy, account, account.credits)


# --------------------------------------------------------------------------------------------------
# The official client


def read_with_openai(client: openai.OpenAI, capture: Capture, asks: bool) -> list[Any] | openai.OpenAIError:
    """What a program gets: the answer, or all chunks of it, as plain data; or the exception."""
    calls: dict[str, Any] = {
        "chat/completions": client.chat.completions.create,
        "completions": client.completions.create,
        "embeddings": client.embeddings.create,
    }
    try:
        result = calls[capture.path](**{**as_asked(capture.request, asks), "model": "plain"})
        if not isinstance(result, openai.Stream):
            return [result.to_dict(warnings=False)]  # one server nests embeddings deeper
        with result:
            return [chunk.to_dict() for chunk in result]
    except openai.OpenAIError as error:
        return error


def without_empty_choice(chunks: list[Any]) -> list[Any]:
    """The chunks with a usage chunk that was made safe as it was."""
    safe = {json.dumps(json.loads(choice), sort_keys=True) for choice in EMPTY_CHOICE.values()}

    def is_safe(chunk: dict[str, Any]) -> bool:
        return bool(chunk.get("usage")) and {json.dumps(c, sort_keys=True) for c in chunk.get("choices") or ()} <= safe

    return [{**chunk, "choices": []} if is_safe(chunk) else chunk for chunk in chunks]


@pytest.fixture(scope="module")
def clients(shared: Any, payer: Account) -> Iterator[tuple[openai.OpenAI, openai.OpenAI]]:
    """The official client, straight to the server of the captures, and through the proxy."""
    proxy: RunningProxy = shared.proxy
    direct = openai.OpenAI(base_url=proxy.upstream.url, api_key="any", max_retries=0, timeout=20)
    with direct, proxy.openai(payer.key) as through:
        yield direct, through


@pytest.mark.parametrize("name", CAPTURES)
def test_the_official_client_reads_through_the_proxy_what_it_reads_directly(
    name: str, proxy: RunningProxy, account: Account, clients: tuple[openai.OpenAI, openai.OpenAI]
) -> None:
    """Where it fails directly it fails here, and an empty stream is an error too."""
    capture = CAPTURES[name]
    for asks in ways_to_ask(capture):
        results = []
        for client in clients:
            proxy.upstream.behaviour = behaviour = Replays(capture, capture.packets)
            behaviour.arrived.set()
            results.append(read_with_openai(client, capture, asks))
        direct, through = results
        if isinstance(direct, openai.OpenAIError) or capture.is_empty:
            assert isinstance(through, openai.OpenAIError), (direct, through)
        else:
            assert not isinstance(through, openai.OpenAIError), through
            same = (lambda chunks: chunks) if asks else without_empty_choice
            assert same(through) == same(direct)
        account.credits -= tokens_owed(capture)
    if capture.is_broken:  # how much of it came before the break is the network's affair
        proxy.wait_until_settled(account)
        account.credits = proxy.client(account.key).balance
    assert_books(proxy, account, account.credits)
