"""Raw answers of llama.cpp's server to the Responses, Messages and rerank APIs, replayed byte for byte.

See data/api_captures/README.md. Each goes out in one packet, event by event and byte by byte; each stream also without
its end. What must come out, and what must be charged, is worked out here from the capture alone.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.support.api_calls import MESSAGES, RESPONSES, assert_messages_error, messages_break, responses_break
from tests.support.books import assert_books
from tests.support.client import Response
from tests.support.errors import assert_error
from tests.support.exchange import Exchange
from tests.support.process import Account, RunningProxy
from tests.support.sse import event_data, split_events
from tests.support.waiting import Signal

FOLDER = Path(__file__).parent / "data" / "api_captures"
SMALL_BYTES = 2000  # sent byte by byte; longer ones in pieces of seven


# --------------------------------------------------------------------------------------------------
# What a capture says


@dataclass(frozen=True)
class Capture:
    """One answer as it went over the wire, and the request that it answers."""

    name: str
    head: bytes
    body: bytes  # without HTTP's framing
    request: dict[str, Any]

    @property
    def path(self) -> str:
        if self.name.startswith("count_tokens"):
            return f"{MESSAGES}/count_tokens"
        if self.name == "responses-input_tokens":
            return f"{RESPONSES}/input_tokens"
        return f"/v1/{self.name.partition('-')[0]}"

    @property
    def status(self) -> int:
        return int(self.head.split(b" ")[1])

    @property
    def is_stream(self) -> bool:
        return b"text/event-stream" in self.head

    @property
    def is_messages(self) -> bool:
        return self.path.startswith(MESSAGES)

    @property
    def events(self) -> list[bytes]:
        return split_events(self.body)


def load_capture(path: Path) -> Capture:
    head, request = (path.with_suffix(suffix).read_bytes() for suffix in (".head", ".req.json"))
    return Capture(path.stem, head.rstrip() + b"\r\n\r\n", path.read_bytes(), json.loads(request))


CAPTURES = {path.stem: load_capture(path) for path in sorted(FOLDER.glob("*.raw"))}
STREAMS = {name: capture for name, capture in CAPTURES.items() if capture.is_stream}


# --------------------------------------------------------------------------------------------------
# What it must cost


@dataclass
class Tally:
    """What a server said of tokens so far: the last value of each member, and the text of the deltas."""

    usage: dict[str, int] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)

    def take(self, data: dict[str, Any]) -> None:
        usage = (data.get("message") or data.get("response") or data).get("usage") or {}
        self.usage.update({name: tokens for name, tokens in usage.items() if isinstance(tokens, int)})
        delta: Any = data.get("delta")
        if isinstance(delta, str) and data["type"].endswith(".delta"):
            self.texts.append(delta)
        if data.get("type") == "content_block_delta":
            self.texts.append(delta.get("text") or delta.get("partial_json") or delta.get("thinking") or "")

    @property
    def prompt(self) -> int:
        cached = ("cache_read_input_tokens", "cache_creation_input_tokens")
        rerank = self.usage.get("prompt_tokens", self.usage.get("total_tokens", 0))
        return self.usage.get("input_tokens", rerank) + sum(self.usage.get(name, 0) for name in cached)

    @property
    def count(self) -> int:
        """The running count: the larger of events that bear text and their bytes / 4."""
        texts = [text for text in self.texts if text]
        return max(len(texts), math.ceil(len("".join(texts).encode()) / 4))


def tally(datas: list[dict[str, Any]]) -> Tally:
    result = Tally()
    for data in datas:
        result.take(data)
    return result


def tokens_owed(capture: Capture) -> int:
    """What the capture's own usage says. Errors and counts of tokens are free."""
    if capture.status != 200 or capture.path.endswith("_tokens"):
        return 0
    said = tally(list(map(event_data, capture.events)) if capture.is_stream else [json.loads(capture.body)])
    assert said.prompt > 0, capture.name
    return said.prompt + said.usage.get("output_tokens", 0)


def compact(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode())


def estimates(capture: Capture) -> range:
    """E of a Responses request: text / 4, 4 an object of `input`, the JSON of what describes.

    One number; a range where a page of words does not settle what the text of a function call is, or what of `text`
    describes.
    """
    request = capture.request
    items = request["input"] if isinstance(request["input"], list) else []
    quarters = 16 * len(items) + len(request.get("instructions", "")) + len("" if items else request["input"])
    for item in items:
        content = item.get("content", item.get("arguments"))
        quarters += len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
    quarters += compact(request["tools"]) if "tools" in request else 0
    more = sum(compact(item) - len(item["arguments"]) for item in items if "arguments" in item)
    if "text" in request:
        schema = compact(request["text"]["format"]["schema"])
        quarters, more = quarters + schema, more + compact(request["text"]) - schema
    return range(math.ceil(quarters / 4), math.ceil((quarters + more) / 4) + 1)


# --------------------------------------------------------------------------------------------------
# The replay


@dataclass
class Replays:
    """Sends the head, and the body in these pieces. With `ends` false it hangs up, once the client has all of it."""

    capture: Capture
    pieces: list[bytes]
    ends: bool = True
    arrived: Signal = field(default_factory=Signal)

    async def __call__(self, exchange: Exchange) -> None:
        chunked = b"transfer-encoding: chunked" in self.capture.head.lower()
        packets = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in self.pieces] if chunked else self.pieces
        end = [b"0\r\n\r\n"] if chunked and self.ends else []
        if len(packets) == 1:
            packets, end = [self.capture.head, packets[0] + b"".join(end)], []
            packets = [b"".join(packets)]
        else:
            packets = [self.capture.head, *packets]
        for packet in packets + end:
            await exchange.raw(packet)
        if not self.ends:
            await self.arrived.happened()
        exchange.complete = self.ends and b"connection: close" not in self.capture.head.lower()


def in_pieces(body: bytes, size: int) -> list[bytes]:
    return [body[start : start + size] for start in range(0, len(body), size)]


def ways_to_send(capture: Capture) -> dict[str, list[bytes]]:
    ways = {"in one packet": [capture.body]}
    if capture.is_stream:
        ways["chunk by chunk"] = capture.events
    ways["byte by byte"] = in_pieces(capture.body, 1 if len(capture.body) <= SMALL_BYTES else 7)
    return ways


def replay(proxy: RunningProxy, account: Account, behaviour: Replays, until: bytes = b"") -> Response:
    """The answer; with `until`, the upstream hangs up when the client has all of that."""
    proxy.upstream.behaviour = behaviour
    request = {**behaviour.capture.request, "model": "plain"}
    with proxy.client(account.key).send("POST", behaviour.capture.path, request) as sent, sent.answered() as stream:
        while len(stream.received) < len(until):
            assert stream.read_some(), bytes(stream.received)
        behaviour.arrived.set()
        return stream.finish()


def assert_answer(capture: Capture, answer: Response) -> None:
    """Its bytes; an error of the server's own, and one of another API's shape, in the right shape."""
    if capture.status == 200:
        assert (answer.status, answer.body, answer.clean) == (200, capture.body, True)
    elif capture.is_messages and capture.status < 500:
        assert_messages_error(answer, capture.status)
        assert answer.json()["error"]["message"] == json.loads(capture.body)["error"]["message"]
    elif capture.is_messages:
        assert_messages_error(answer, 502, "upstream_error")
    elif capture.status >= 500:
        assert_error(answer, 502, "upstream_error")
    else:
        assert (answer.status, answer.body) == (capture.status, capture.body)


@pytest.mark.parametrize("name", CAPTURES)
def test_a_real_servers_bytes_pass_unchanged_and_cost_what_it_says(
    name: str, proxy: RunningProxy, account: Account
) -> None:
    """However the network cuts them."""
    capture = CAPTURES[name]
    owed = tokens_owed(capture)
    for way, pieces in ways_to_send(capture).items():
        answer = replay(proxy, account, Replays(capture, pieces))
        assert_answer(capture, answer)
        account.credits -= owed
        assert proxy.client(account.key).balance == account.credits, way
        if capture.status == 200 and not capture.is_stream:
            assert answer.headers["x-credits-charged"] == str(owed)
    assert_books(proxy, account, account.credits)


@pytest.mark.parametrize("name", STREAMS)
def test_the_capture_of_a_cached_prompt_is_charged_with_its_cached_tokens(name: str) -> None:
    """A check of the check: 43 cached tokens and one are 44, the same as the other API says."""
    said = tally(list(map(event_data, STREAMS[name].events)))
    assert said.prompt > 1 and said.usage["output_tokens"] >= 1
    if name in ("messages-stream", "responses-stream"):
        assert (said.prompt, said.usage["output_tokens"]) == (44, 8)


# --------------------------------------------------------------------------------------------------
# Without an end


def owed_when_cut(capture: Capture, events: list[bytes]) -> range:
    """The prompt of the usage that came, else E; of its usage the answer, and what the count grew by since."""
    prompt, output, at_usage = None, 0, 0
    so_far = Tally()
    for data in map(event_data, events):
        so_far.usage = {}
        so_far.take(data)
        if "input_tokens" in so_far.usage:
            prompt = so_far.prompt
        if "output_tokens" in so_far.usage:
            output, at_usage = so_far.usage["output_tokens"], so_far.count
    answer = max(output + so_far.count - at_usage, so_far.count)
    prompts = estimates(capture) if prompt is None else range(prompt, prompt + 1)
    return range(prompts.start + answer, prompts.stop + answer)


def assert_charged(proxy: RunningProxy, account: Account, owed: range) -> None:
    proxy.wait_until_settled(account)
    before, account.credits = account.credits, proxy.client(account.key).balance
    assert before - account.credits in owed


def assert_cut(capture: Capture, answer: Response, events: list[bytes]) -> None:
    code = (messages_break if capture.is_messages else responses_break)(answer)
    assert code == "upstream_error"
    assert b"".join(answer.events[:-1]) == b"".join(events)


@pytest.mark.parametrize("ends", [True, False], ids=["a clean end", "no end"])
@pytest.mark.parametrize("name", STREAMS)
def test_without_its_closing_event_a_stream_is_broken_and_what_came_is_charged(
    name: str, ends: bool, proxy: RunningProxy, account: Account
) -> None:
    """The whole of it is missing, or its last byte."""
    capture = STREAMS[name]
    events = capture.events[:-1]
    for rest in ([], [capture.events[-1].rstrip()[:-1]]):
        behaviour = Replays(capture, [*events, *rest], ends)
        answer = replay(proxy, account, behaviour, b"".join(events) if not ends else b"")
        assert_cut(capture, answer, events)
        assert_charged(proxy, account, owed_when_cut(capture, events))
    assert_books(proxy, account, account.credits)


@pytest.mark.parametrize("name", ["messages-stream", "messages-tools-choice-any-stream", "responses-stream"])
def test_wherever_a_stream_is_cut_what_came_is_charged(name: str, proxy: RunningProxy, account: Account) -> None:
    capture = STREAMS[name]
    first = next(number for number, event in enumerate(capture.events) if b"delta" in event.splitlines()[0])
    for number in range(first + 1, len(capture.events)):
        events = capture.events[:number]
        behaviour = Replays(capture, [*events, capture.events[number][:30]], ends=False)
        answer = replay(proxy, account, behaviour, b"".join(events))
        assert_cut(capture, answer, events)
        assert_charged(proxy, account, owed_when_cut(capture, events))
    assert_books(proxy, account, account.credits)
