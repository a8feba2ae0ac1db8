"""What a stream costs and what of it goes on, worked out without a socket: the splitter, the meter, the estimate.

Every meter case runs whole, byte by byte and with trailing data, through `metered`. What a client would read of
a stream is worked out a second time here, by `dispatched`, which follows the specification line by line.
"""

import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.commands import REPOSITORY

sys.path.insert(0, str(REPOSITORY))
from proxy import (
    ENDPOINTS,
    EVENT_BYTES_MAX,
    TOKENS_MAX,
    Ask,
    Bill,
    BrokenStream,
    EventSplitter,
    Model,
    Refusal,
    Upstream,
    Usage,
    UsageMeter,
    estimate_prompt,
    first_event,
    forward_body,
    give_choice,
    parse_request,
    split_events,
)

CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no failure
CHAT, COMPLETIONS, EMBEDDINGS = "chat/completions", "completions", "embeddings"
E = 7  # the estimate of the prompt, wherever it does not matter
DONE = b"data: [DONE]\n\n"
EMPTY_CHOICE = {
    CHAT: b'{"index":0,"delta":{},"finish_reason":null}',
    COMPLETIONS: b'{"index":0,"text":"","logprobs":null,"finish_reason":null}',
}
MODEL = Model("shown", "one", 1000, "chat", ("up",), "real", None, None, 0, None)
UPSTREAM = Upstream(name="up", base_url="http://127.0.0.1:1/v1")


# --------------------------------------------------------------------------------------------------
# One helper for every case


@dataclass(frozen=True)
class Outcome:
    """What became of a stream: the bytes that go on, what is kept back of them, and the meter's judgement."""

    out: bytes
    kept: bytes
    bill: Bill
    flags: tuple[bool, ...]  # ended, over, failed, finished, produced

    @property
    def comparable(self) -> tuple[Any, ...]:
        """The LF of a last CRLF may go on with its event or be kept back: what both hold is what counts."""
        return ((self.out if self.flags[1] else self.out + self.kept).rstrip(b"\r\n"), self.bill, self.flags)


def run(reads: Iterable[bytes], meter: UsageMeter, complete: bool) -> Outcome:
    """What the relay does: whole events to the meter, until one of them ends the stream."""
    splitter, out = EventSplitter(), bytearray()
    for read in reads:
        block = splitter.feed(read)
        done = meter.skim(block, 0, 2**31)
        out += block[:done]
        while done < len(block) and not meter.over:
            event = first_event(block, done)
            out += meter.feed(event)
            done += len(event)
        if meter.over:
            break
    flags = (meter.ended, meter.over, meter.failed, meter.finished, meter.produced)
    return Outcome(bytes(out), bytes(splitter.tail), meter.bill(E, complete), flags)


def metered(
    stream: bytes, *, path: str = CHAT, choices: int = 1, wants_usage: bool = True, complete: bool = True
) -> Outcome:
    """The outcome of a stream, which must not depend on how it was read."""

    def through(*reads: bytes) -> Outcome:
        return run(reads, UsageMeter(ENDPOINTS[path], choices, wants_usage), complete)

    whole = through(stream)
    assert through(*(stream[n : n + 1] for n in range(len(stream)))).comparable == whole.comparable
    if not whole.kept:
        trailing = b"data: unfinished"
        longer = through(stream + trailing)
        assert (longer.out, longer.bill, longer.flags) == (whole.out, whole.bill, whole.flags)
        assert longer.kept == trailing
    return whole


def dispatched(stream: bytes) -> list[bytes]:
    """The data of the events that a client dispatches: WHATWG HTML, 9.2.6, word by word."""
    *lines, _ = re.split(rb"\r\n|\n|\r", stream.removeprefix(b"\xef\xbb\xbf"))
    events, data = [], b""
    for line in lines:
        name, _, value = line.partition(b":")
        if name == b"data":
            data += value.removeprefix(b" ") + b"\n"
        elif not line:
            events += [data[:-1]] if data else []
            data = b""
    return events


def sse(data: Any, newline: bytes = b"\n") -> bytes:
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + newline * 2


def delta(content: str = "word", **members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None}], **members}


def finish(**members: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}], **members}


def used(prompt: Any, completion: Any, **details: Any) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, **details}


def closing(prompt: Any, completion: Any) -> dict[str, Any]:
    return {"choices": [], "usage": used(prompt, completion)}


def words(count: int) -> bytes:
    return sse(delta()) * count


# --------------------------------------------------------------------------------------------------
# Splitting

SPECIFICATION = {  # the examples of WHATWG HTML, 9.2.6, and the data of the events that they dispatch
    "two_lines": (
        b"data: This is the first message.\n\ndata: This is the second message, it\ndata: has two lines.\n\n"
        b"data: This is the third message.\n\n",
        [
            b"This is the first message.",
            b"This is the second message, it\nhas two lines.",
            b"This is the third message.",
        ],
    ),
    "event_names": (
        b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
        [b"73857293", b"2153", b"113411"],
    ),
    "stock": (b"data: YHOO\ndata: +2\ndata: 10\n\n", [b"YHOO\n+2\n10"]),
    "four_blocks": (
        b": test stream\n\ndata: first event\nid: 1\n\ndata:second event\nid\n\ndata:  third event",
        [b"first event", b"second event"],
    ),
    "empty_data": (b"data\n\ndata\ndata\n\ndata:", [b"", b"\n"]),
    "one_space": (b"data:test\n\ndata: test\n\n", [b"test", b"test"]),
}


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", SPECIFICATION)
def test_the_specifications_examples_go_on_as_they_came(name: str, newline: bytes) -> None:
    example, data = SPECIFICATION[name]
    stream = example.replace(b"\n", newline)
    assert dispatched(stream) == data
    outcome = metered(stream, wants_usage=False)
    assert outcome.out + outcome.kept == stream
    assert dispatched(outcome.out) == data, "an event that the specification dispatches is kept back"
    assert outcome.bill == Bill(E, 0, True)


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_unfinished_event_is_kept_back(newline: bytes) -> None:
    first, second = sse(delta(), newline), sse(delta("more"), newline)
    for cut in range(1, len(second) - len(newline)):
        outcome = run([first + second[:cut]], UsageMeter(ENDPOINTS[CHAT], 1, True), complete=False)
        assert (outcome.out, outcome.kept) == (first, second[:cut])
        assert outcome.bill == Bill(E, 1, True)


LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@st.composite
def chunks(draw: st.DrawFn) -> dict[str, Any]:
    """A chunk with content, usage, both or neither."""
    chunk = draw(st.sampled_from([delta(draw(TEXTS)), finish(), {"choices": []}, {"object": "ping"}]))
    if draw(st.booleans()):
        chunk["usage"] = draw(st.sampled_from([None, {}, used(3, 5), used(0, 0), used(None, 2), used(-1, 1.5)]))
    return chunk


@st.composite
def event_lines(draw: st.DrawFn) -> list[bytes]:
    """The lines of an event: a chunk in one data line or several, or none, among comments and other fields."""
    lines = draw(st.lists(st.sampled_from([b": ping", b"id: 5", b"event: message", b"retry: 9", b"what", b":"])))
    if draw(st.integers(0, 4)):
        encoded = json.dumps(draw(chunks()), ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([0, None])))
        space = draw(st.sampled_from([b"data:", b"data: "]))
        lines += [space + line for line in encoded.encode().split(b"\n")]
    return [*lines, b""]


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    """Any event stream: mixed line ends, a byte order mark perhaps, an end that is missing perhaps."""
    lines = [line for event in draw(st.lists(event_lines(), max_size=5)) for line in event]
    one_end = draw(st.one_of(st.none(), LINE_ENDS))
    stream = b"".join(line + (one_end or draw(LINE_ENDS)) for line in lines)
    return draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf"])) + stream[: len(stream) - draw(st.sampled_from([0, 0, 1]))]


def cut(stream: bytes, places: Iterable[int]) -> Iterator[bytes]:
    """The stream in reads that end at these places."""
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    for start, end in itertools.pairwise(edges):
        yield stream[start:end]


def owed(stream: bytes) -> Bill:
    """What a stream that came to its end costs, by what a client can read of it."""
    read = []
    for data in dispatched(stream):
        with contextlib.suppress(json.JSONDecodeError):  # a CR and the LF after it are one line end: two events are one
            read.append(json.loads(data))
    texts = [choice["delta"].get("content") for chunk in read for choice in chunk.get("choices", [])]
    bearing = [text for text in texts if text]
    count = max(len(bearing), math.ceil(sum(len(text.encode()) for text in bearing) / 4))
    usage = [chunk["usage"] for chunk in read if chunk.get("usage")]
    valid = [found for found in usage if any(type(n) is int and n >= 0 for n in found.values())]
    if not valid:
        return Bill(E, count, True)
    if valid[-1]["prompt_tokens"] is None:
        return Bill(E, valid[-1]["completion_tokens"], True)
    return Bill(valid[-1]["prompt_tokens"], valid[-1]["completion_tokens"], False)


@given(streams(), st.lists(st.integers(0, 10**6), max_size=12))
@example(b'data: {"choices":[{"delta":{"content":"word"},"finish_reason":null}]}\rid: 5\n\n', [])
@example(b'data: {"choices":\rdata: [{"delta":{"content":"word"},"finish_reason":null}]}\n\n', [])
@settings(CALM, max_examples=200)
def test_no_split_of_any_stream_changes_its_bytes_or_its_bill(stream: bytes, places: list[int]) -> None:
    whole = run([stream], UsageMeter(ENDPOINTS[CHAT], 1, True), complete=True)
    pieces = run(cut(stream, places), UsageMeter(ENDPOINTS[CHAT], 1, True), complete=True)
    assert whole.out + whole.kept == pieces.out + pieces.kept == stream
    assert whole.bill == pieces.bill == owed(stream)
    assert dispatched(whole.out) == dispatched(pieces.out) == dispatched(stream)


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"\n", b"\r", b"a", b"data:", b"\xff"])).map(b"".join))
@settings(CALM, max_examples=100)
def test_bytes_of_any_kind_go_on_as_they_are_and_never_fail(stream: bytes) -> None:
    outcome = metered(stream, wants_usage=False)
    assert outcome.out + outcome.kept == stream or outcome.flags[1]


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"delta":{"content":"a\xffb"}}]}\n\n',
        b'data: {"choices":[{"delta":{"content":"\xed\xa0\x80"}}]}\n\n',
        b'data: {"choices":[{"delta":\xfe}]}\n\n',
        b"data: " + b"[" * 100_000 + b"\n\n",
        b"data: 7\n\n",
        b'data: {"choices":{}}\n\n',
    ],
    ids=["no_utf8", "surrogate_bytes", "no_json", "deep", "number", "wrong_type"],
)
def test_an_event_that_cannot_be_read_passes_and_does_not_stop_the_meter(event: bytes) -> None:
    stream = event + sse(delta()) + sse(closing(5, 1)) + DONE
    meter = UsageMeter(ENDPOINTS[CHAT], 1, True)
    assert run([stream], meter, complete=True).out == stream
    assert meter.bill(E, complete=True) == Bill(5, 1, False)


def test_a_text_that_is_no_utf_8_is_not_free() -> None:
    """Browsers' decoders take any bytes."""
    assert metered(b'data: {"choices":[{"delta":{"content":"a\xffb"}}]}\n\n', complete=False).bill == Bill(E, 2, True)


@pytest.mark.parametrize(
    "more",
    [b'"x":NaN', b'"x":-Infinity', b'"x":1e400', b'"x":"\\ud83d"', b'"x":123456789012345678901234567890'],
    ids=["NaN", "infinity", "1e400", "lone_surrogate", "large_integer"],
)
def test_what_clients_forgive_in_an_event_does_not_make_it_free(more: bytes) -> None:
    """Python's json writes NaN and -Infinity (in logprobs, say), and reads them."""
    stream = b'data: {"choices":[{"delta":{"content":"word"}}],' + more + b"}\n\n"
    assert metered(stream, complete=False).bill == Bill(E, 1, True)


SHAPES = [  # events that look alike to the byte, but for one text
    b'{"choices":[{"index":0,"delta":{"content":%s},"finish_reason":null}]}',
    b'{"id":"word","choices":[{"delta":{"content":%s}}],"usage":null}',
    b'{"choices":[{"delta":{"content":%s},"finish_reason":"stop"}]}',
    b'{"choices":[{"delta":{"content":"word"}}],"usage":{"prompt_tokens":3,"completion_tokens":2},"x":%s}',
    b'{"choices":[{"delta":{"content":"word"}}],"x":%s}',
    b'{"x":%s,"choices":[{"delta":{"content":"word"}}]}',
    b'{"choices":[],"x":%s}',
    b'{"x":%s,"choices":[{"delta":{"content":"four more words"}}]}',
]
ALIKE = st.sampled_from(
    ["word", "four more words", "", "x", "d", "0", "null", "content", '"', "\\", "\n", "[DONE]", "日本語", "\u2028"]
)


@given(
    st.lists(st.tuples(st.sampled_from(SHAPES), ALIKE, st.booleans()), max_size=8), st.sampled_from([b"\n", b"\r\n"])
)
@example([(SHAPES[-1], "four more words", True), (SHAPES[-1], "x", True)], b"\n")
@settings(CALM, max_examples=200)
def test_events_that_look_alike_are_counted_each_by_its_own_text(
    events: list[tuple[bytes, str, bool]], newline: bytes
) -> None:
    encoded = [shape % json.dumps(text, ensure_ascii=ascii_only).encode() for shape, text, ascii_only in events]
    stream = b"".join(b"data: " + data + newline * 2 for data in encoded)
    assert metered(stream).bill == owed(stream)


# -- large events


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
def test_an_event_of_megabytes_goes_on_whole_and_is_counted(newline: bytes) -> None:
    event = sse(delta("word" * 2**20), newline)
    splitter, meter = EventSplitter(), UsageMeter(ENDPOINTS[CHAT], 1, True)
    stream = event + DONE
    blocks = (splitter.feed(stream[n : n + 65_536]) for n in range(0, len(stream), 65_536))
    events = [whole for block in blocks for whole in split_events(block)]
    assert b"".join(events) == stream
    assert b"".join(map(meter.feed, events)) == stream
    assert (meter.count, meter.over) == (2**20, True)


def test_an_event_past_16_megabytes_is_a_broken_stream() -> None:
    splitter = EventSplitter()
    assert splitter.feed(b"data: " + b"x" * (EVENT_BYTES_MAX - 6)) == b""
    with pytest.raises(BrokenStream):
        splitter.feed(b"x")


def test_an_event_of_16_megabytes_that_ends_is_none() -> None:
    event = b"data: " + b"x" * (EVENT_BYTES_MAX - 8) + b"\n\n"
    splitter = EventSplitter()
    pieces = [whole for n in range(0, len(event), 2**18) if (whole := splitter.feed(event[n : n + 2**18]))]
    assert pieces == [event]


def test_many_small_events_are_no_large_one() -> None:
    splitter = EventSplitter()
    read = words(1000)
    size = sum(len(splitter.feed(read)) for _ in range(EVENT_BYTES_MAX // len(read) + 2))
    assert size > EVENT_BYTES_MAX


# --------------------------------------------------------------------------------------------------
# Counting

BEARING = {
    "content": ({"content": "12345678"}, 2),
    "reasoning_content": ({"reasoning_content": "12345678"}, 2),
    "reasoning": ({"reasoning": "12345678"}, 2),
    "reasoning_under_both_names": ({"reasoning": "12345678", "reasoning_content": "12345678"}, 2),
    "refusal": ({"refusal": "12345678"}, 2),
    "content_and_reasoning": ({"content": "1234", "reasoning": "12345"}, 3),
    "tool_calls": ({"tool_calls": [{"function": {"arguments": "1234"}}, {"function": {"arguments": "12345"}}]}, 3),
    "function_call": ({"function_call": {"name": "f", "arguments": "12345678"}}, 2),
    "bytes_not_characters": ({"content": "日本"}, 2),
    "a_part": ({"content": "a"}, 1),
    "parts": ({"content": [{"type": "text", "text": "x" * 100}]}, 32),
    "no_text": ({"role": "assistant", "content": ""}, 0),
    "null": ({"content": None, "tool_calls": None}, 0),
    "a_number": ({"content": 7}, 0),
    "a_name_only": ({"tool_calls": [{"function": {"name": "f", "arguments": ""}}]}, 0),
    "broken_calls": ({"tool_calls": ["x", 7, None, {"function": None}, {}]}, 0),
}


@pytest.mark.parametrize("name", BEARING)
def test_what_bears_content_is_counted(name: str) -> None:
    part, count = BEARING[name]
    stream = sse({"choices": [{"index": 0, "delta": part, "finish_reason": None}]})
    assert metered(stream, complete=False).bill == Bill(E, count, True)
    whole = UsageMeter(ENDPOINTS[CHAT], 1, True)
    whole.feed(sse({"choices": [{"index": 0, "message": part, "finish_reason": "stop"}]}))
    assert whole.bill(E, complete=True) == Bill(E, count, True)


@given(st.lists(TEXTS, max_size=9))
@settings(CALM, max_examples=40)
def test_the_count_is_the_larger_of_events_and_their_bytes_over_four(texts: list[str]) -> None:
    bearing = [text for text in texts if text]
    expected = max(len(bearing), math.ceil(sum(len(text.encode()) for text in bearing) / 4))
    for path, key in ((CHAT, "delta"), (COMPLETIONS, "text")):
        parts = [{"index": 0, key: {"content": text} if key == "delta" else text} for text in texts]
        stream = b"".join(sse({"choices": [part]}) for part in parts)
        assert metered(stream, path=path, complete=False).bill == Bill(E, expected, True)


def test_several_choices_in_one_event_are_one_event_with_all_their_text() -> None:
    choices = [{"index": n, "delta": {"content": "12345678"}} for n in range(3)]
    assert metered(sse({"choices": choices}), choices=3, complete=False).bill == Bill(E, 6, True)


@pytest.mark.parametrize("word", ["w", "word", "nine char"])
@pytest.mark.parametrize("bear_usage", [(), (1, 2, 3, 4), (1,), (2,), (3,), (4,)], ids=repr)
def test_an_event_that_is_not_sent_on_is_not_charged(word: str, bear_usage: tuple[int, ...]) -> None:
    meter, shorter = (UsageMeter(ENDPOINTS[CHAT], 1, True) for _ in range(2))
    for number in (1, 2, 3, 4):
        event = sse(delta(word, usage=used(5, number) if number in bear_usage else None))
        meter.feed(event)
        if number < 4:
            shorter.feed(event)
    meter.take_back()
    assert meter.bill(E, complete=False) == shorter.bill(E, complete=False)


def chosen(index: int, content: str, completion: int) -> dict[str, Any]:
    return {"choices": [{"index": index, "delta": {"content": content}}], "usage": used(5, completion)}


@pytest.mark.parametrize("refused", [chosen(0, "word" * 1000, 1000), closing(5, 900)], ids=["of a choice", "closing"])
def test_where_each_choice_has_a_usage_what_is_not_sent_on_is_not_charged(refused: dict[str, Any]) -> None:
    meter = UsageMeter(ENDPOINTS[CHAT], 2, True)
    for index in (0, 1):
        meter.feed(sse(chosen(index, "word", 1)))
    before = meter.bill(E, complete=False)
    meter.feed(sse(refused))
    assert meter.bill(E, complete=False) != before
    meter.take_back()
    assert meter.bill(E, complete=False) == before


@pytest.mark.parametrize("completion", [0, None, 1, 50])
def test_taking_an_event_back_never_makes_a_bill_below_zero(completion: int | None) -> None:
    """Nor one above what the upstream has said."""
    meter = UsageMeter(ENDPOINTS[CHAT], 1, True)
    meter.feed(sse(delta("word" * 9, usage=used(5, completion))))
    meter.take_back()
    assert 0 <= meter.bill(E, complete=False).completion_tokens <= (completion or 0)


# --------------------------------------------------------------------------------------------------
# Usage

USAGE = {  # the events before [DONE], the choices, and what the whole stream costs
    "closing": (words(3) + sse(finish()) + sse(closing(5, 3)), 1, Bill(5, 3, False)),
    "on_the_finish_chunk": (words(3) + sse(finish(usage=used(5, 3))), 1, Bill(5, 3, False)),
    "cumulative": (
        b"".join(sse(delta(usage=used(5, n))) for n in (1, 2, 3)) + sse(closing(5, 4)),
        1,
        Bill(5, 4, False),
    ),
    "the_last_one_counts": (sse(closing(9, 9)) + words(1) + sse(closing(5, 3)), 1, Bill(5, 3, False)),
    "null_is_none": (sse(closing(5, 3)) + sse(delta(usage=None)) + sse(finish(usage=None)), 1, Bill(5, 3, False)),
    "null_everywhere": (sse(delta(usage=None)) * 2 + sse(finish(usage=None)), 1, Bill(E, 2, True)),
    "absent": (words(4) + sse(finish()), 1, Bill(E, 4, True)),
    "zero_is_zero": (words(3) + sse(closing(0, 0)), 1, Bill(0, 0, False)),
    "zero_completion": (words(3) + sse(closing(5, 0)), 1, Bill(5, 0, False)),
    "no_completion": (words(3) + sse({"choices": [], "usage": {"prompt_tokens": 5}}), 1, Bill(5, 3, True)),
    "no_prompt": (words(3) + sse({"choices": [], "usage": {"completion_tokens": 9}}), 1, Bill(E, 9, True)),
    "details_are_parts": (
        words(1) + sse({"choices": [], "usage": used(5, 3, completion_tokens_details={"reasoning_tokens": 99},
                                                     prompt_tokens_details={"cached_tokens": 4}, total_tokens=500)}),
        1, Bill(5, 3, False),
    ),
    "two_closings_of_two_choices": (words(4) + sse(closing(5, 2)) + sse(closing(5, 3)), 2, Bill(5, 5, False)),
    "the_largest_prompt": (sse(closing(4, 2)) + sse(closing(6, 3)) + sse(closing(5, 1)), 3, Bill(6, 6, False)),
    "two_closings_of_one_choice": (words(4) + sse(closing(5, 2)) + sse(closing(5, 4)), 1, Bill(5, 4, False)),
    "one_closing_of_two_choices": (words(4) + sse(closing(5, 4)), 2, Bill(5, 4, False)),
    "cumulative_of_two_choices": (
        b"".join(sse(delta(usage=used(5, n))) for n in (1, 2, 3, 4)), 2, Bill(5, 4, False),
    ),
    "closings_win_over_cumulative": (
        sse(delta(usage=used(5, 7))) + sse(closing(5, 2)) + sse(closing(5, 2)) + sse(finish(usage=used(5, 9))),
        2, Bill(5, 4, False),
    ),
    "no_choices_at_all": (words(1) + sse({"usage": used(5, 3)}), 1, Bill(5, 3, False)),
    "choices_null": (words(1) + sse({"choices": None, "usage": used(5, 3)}), 1, Bill(5, 3, False)),
    "sums_stay_within_bounds": (sse(closing(1, TOKENS_MAX)) * 2, 2, Bill(1, TOKENS_MAX, False)),
}  # fmt: skip


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", USAGE)
def test_a_streams_usage_is_what_it_costs(name: str, newline: bytes) -> None:
    events, choices, bill = USAGE[name]
    stream = (events + DONE).replace(b"\n", newline)
    outcome = metered(stream, choices=choices)
    assert outcome.bill == bill
    assert outcome.comparable[0] == stream.rstrip(b"\r\n")
    assert outcome.flags[1], "[DONE] ends a stream"


INVALID = [-1, 1.0, 3.5, True, False, "3", None, [], {}, TOKENS_MAX + 1, 10**30]


@pytest.mark.parametrize("wrong", INVALID, ids=repr)
def test_what_is_no_integer_from_0_to_2_to_the_31_counts_as_absent(wrong: Any) -> None:
    assert metered(words(3) + sse(closing(5, wrong))).bill == Bill(5, 3, True)
    assert metered(words(3) + sse(closing(wrong, 9))).bill == Bill(E, 9, True)
    assert metered(words(3) + sse(closing(5, 2)) + sse(closing(wrong, wrong))).bill == Bill(5, 2, False)
    assert metered(words(3) + sse({"choices": [], "usage": wrong})).bill == Bill(E, 3, True)


def test_the_largest_usage_counts() -> None:
    assert metered(sse(closing(TOKENS_MAX, TOKENS_MAX))).bill == Bill(TOKENS_MAX, TOKENS_MAX, False)


def test_what_came_after_the_last_usage_is_owed_by_a_stream_that_was_cut_short() -> None:
    stream = sse(delta(usage=used(5, 1))) + words(3)
    assert metered(stream, complete=False).bill == Bill(5, 4, True)
    assert metered(stream, complete=True).bill == Bill(5, 1, False)


def test_cumulative_usage_covers_the_event_that_bears_it() -> None:
    stream = b"".join(sse(delta(usage=used(5, n))) for n in (1, 2, 3))
    assert metered(stream, complete=False).bill == Bill(5, 3, False)


def test_usage_that_a_client_sees_twice_is_charged_once() -> None:
    stream = words(2) + sse(finish(usage=used(5, 2))) + sse(closing(5, 2)) + DONE
    assert metered(stream).bill == Bill(5, 2, False)


def test_an_answer_that_is_not_streamed_costs_its_usage() -> None:
    meter = UsageMeter(ENDPOINTS[CHAT], 2, False)
    body = {"choices": [{"message": {"content": "word"}}, {"message": {"content": "word"}}], "usage": used(5, 2)}
    meter.feed(sse(body))
    assert meter.bill(E, complete=True) == Bill(5, 2, False)


def test_embeddings_cost_their_prompt() -> None:
    meter = UsageMeter(ENDPOINTS[EMBEDDINGS], 0, False)
    event = sse({"object": "list", "data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 5, "total_tokens": 5}})
    assert meter.feed(event) == event
    assert meter.bill(E, complete=True) == Bill(5, 0, False)


# --------------------------------------------------------------------------------------------------
# Ends

ENDS = {  # stream: ended, over, failed
    "done": (DONE, (True, True, False)),
    "done_without_a_space": (b"data:[DONE]\n\n", (True, True, False)),
    "done_of_two_line_ends": (b"data: [DONE]\r\n\r\n", (True, True, False)),
    "done_after_a_comment": (b": ping\ndata: [DONE]\n\n", (True, True, False)),
    "finish_reason": (sse(finish()), (True, False, False)),
    "usage": (sse(closing(5, 3)), (True, False, False)),
    "neither": (words(2), (False, False, False)),
    "nothing": (b"", (False, False, False)),
    "error": (sse({"error": {"message": "no"}}), (True, True, True)),
    "error_text": (sse({"error": "no"}), (True, True, True)),
    "error_with_choices": (sse(finish(error={"message": "no"})), (True, True, True)),
    "error_event": (b'event: error\ndata: {"message":"no"}\n\n', (True, True, True)),
    "error_event_crlf": (b'event:error\r\ndata: {"message":"no"}\r\n\r\n', (True, True, True)),
    "error_event_no_json": (b"event: error\ndata: Internal Server Error\n\n", (True, True, True)),
    "no_error": (sse(delta(error=None)), (False, False, False)),
    "another_event": (b'event: errors\ndata: {"message":"no"}\n\n', (False, False, False)),
    "done_in_a_text": (sse(delta("[DONE]")), (False, False, False)),
    "done_in_a_comment": (b": [DONE]\n\n", (False, False, False)),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_stream_ends_is_known_by_its_events(name: str) -> None:
    stream, flags = ENDS[name]
    assert metered(stream).flags[:3] == flags


def test_what_follows_done_neither_goes_on_nor_costs() -> None:
    stream = words(1) + DONE + words(5) + sse(closing(99, 99))
    outcome = run([stream], UsageMeter(ENDPOINTS[CHAT], 1, True), complete=True)
    assert (outcome.out, outcome.bill) == (words(1) + DONE, Bill(E, 1, True))


# --------------------------------------------------------------------------------------------------
# The one event that is changed

CLOSINGS = [
    b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
    b'data: {"usage":{"prompt_tokens":5,"completion_tokens":3},"choices" : [ ] ,"id":"x"}',
    b'data: {"a":"\\"choices\\":[]","b":{"choices":[]},"choices":[],"usage":{"completion_tokens":3,"prompt_tokens":5}}',
    b'data: {"b":[{"choices":[]}],"usage":{"completion_tokens":3,"prompt_tokens":5},"choices":[]}',
    b'event: message\nid: 5\ndata: {"choices":[],\ndata: "usage":{"prompt_tokens":5,"completion_tokens":3}}',
    b'\xef\xbb\xbfdata: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}',
]


@pytest.mark.parametrize("path", EMPTY_CHOICE)
@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("number", range(len(CLOSINGS)))
def test_a_closing_usage_is_given_one_choice_and_no_other_byte_changes(number: int, newline: bytes, path: str) -> None:
    event = (CLOSINGS[number] + b"\n\n").replace(b"\n", newline)
    asked = metered(event, path=path, wants_usage=True)
    given_one = metered(event, path=path, wants_usage=False)
    assert (asked.out + asked.kept, asked.bill) == (event, Bill(5, 3, False))
    assert given_one.bill == asked.bill
    choice = EMPTY_CHOICE[path]
    out = given_one.out + given_one.kept
    assert out.count(choice) == 1
    assert re.sub(rb"\[\s*\]", b"", out.replace(choice, b"")) == re.sub(rb"\[\s*\]", b"", event)
    assert json.loads(dispatched(out)[0])["choices"] == [json.loads(choice)]


@pytest.mark.parametrize(
    "event",
    [
        sse(finish(usage=used(5, 3))),
        sse({"choices": []}),
        sse({"choices": [], "usage": None}),
        sse({"choices": None, "usage": used(5, 3)}),
        sse({"usage": used(5, 3)}),
        sse({"choices": [], "prompt_filter_results": [], "usage": None}),
    ],
)
def test_no_other_event_is_touched(event: bytes) -> None:
    assert metered(event + DONE, wants_usage=False).out == event + DONE


def test_every_closing_usage_of_several_choices_is_made_safe() -> None:
    stream = sse(closing(5, 2)) + sse(closing(5, 3)) + DONE
    out = metered(stream, choices=2, wants_usage=False).out
    assert [len(json.loads(data)["choices"]) for data in dispatched(out)[:2]] == [1, 1]


def test_an_event_that_cannot_be_made_safe_stays_as_it_is() -> None:
    event = b'data: {"\\u0063hoices":[],"usage":{}}\n\n'
    assert give_choice(event, EMPTY_CHOICE[CHAT]) == event


@given(
    st.lists(st.sampled_from([words(1), sse(finish()), sse(closing(5, 3)), b": ping\n\n"]), max_size=6),
    LINE_ENDS,
    st.lists(st.integers(0, 10**6), max_size=8),
)
@settings(CALM)
def test_bytes_out_are_bytes_in_but_for_closing_usage(events: list[bytes], newline: bytes, places: list[int]) -> None:
    sent = [event.replace(b"\n", newline) for event in events]
    expected = b"".join(event.replace(b'"choices":[]', b'"choices":[%b]' % EMPTY_CHOICE[CHAT]) for event in sent)
    outcome = run(cut(b"".join(sent), places), UsageMeter(ENDPOINTS[CHAT], 1, wants_usage=False), complete=True)
    assert outcome.out + outcome.kept == expected


# --------------------------------------------------------------------------------------------------
# The estimate of a prompt


def chat(*messages: dict[str, Any], **members: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **members}


def said(content: Any, **members: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **members}


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "x" * 8}}
ESTIMATES = {
    "nothing": (CHAT, chat(said("")), (1, 4)),
    "text": (CHAT, chat(said("x" * 40)), (1, 14)),
    "rounded_up": (CHAT, chat(said("x")), (1, 5)),
    "rounded_once": (CHAT, chat(said("x"), said("x"), said("xx")), (1, 13)),
    "bytes": (CHAT, chat(said("日本語は")), (1, 7)),
    "null_content": (CHAT, chat(said(None)), (1, 4)),
    "text_parts": (CHAT, chat(said([{"type": "text", "text": "x" * 8}] * 2)), (1, 8)),
    "an_image": (CHAT, chat(said([{"type": "text", "text": "x" * 8}, IMAGE])), (1, 1030)),
    "tool_calls": (CHAT, chat({"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}), (1, 8)),
    "function_call": (CHAT, chat(said(None, function_call={"name": "f", "arguments": "x" * 8})), (1, 6)),
    "reasoning": (CHAT, chat(said("", reasoning_content="x" * 8)), (1, 6)),
    "tools": (CHAT, chat(said(""), tools=[{"a": 1}]), (1, 7)),  # [{"a":1}] is 9 bytes
    "functions": (CHAT, chat(said(""), functions=[{"a": 1}], response_format={"a": 1}), (1, 8)),
    "null_tools": (CHAT, chat(said(""), tools=None), (1, 4)),
    "prompt": (COMPLETIONS, {"prompt": "x" * 41}, (1, 11)),
    "empty_prompt": (COMPLETIONS, {"prompt": ""}, (1, 0)),
    "prompts": (COMPLETIONS, {"prompt": ["x" * 4, "x" * 5]}, (2, 3)),
    "suffix": (COMPLETIONS, {"prompt": "x" * 4, "suffix": "x" * 4}, (1, 2)),
    "a_suffix_a_prompt": (COMPLETIONS, {"prompt": ["x", "x"], "suffix": "xxx"}, (2, 2)),
    "tokens": (COMPLETIONS, {"prompt": [1, 2, 3]}, (1, 3)),
    "token_lists": (COMPLETIONS, {"prompt": [[1, 2, 3], [4]]}, (2, 4)),
    "input": (EMBEDDINGS, {"input": ["x" * 6, "x" * 6]}, (2, 3)),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_estimate_is_exact(name: str) -> None:
    path, body, expected = ESTIMATES[name]
    assert estimate_prompt(ENDPOINTS[path], body) == expected


@pytest.mark.parametrize(
    "window, prompts, expected",
    [(None, 1, 1000), (4096, 1, 1000), (1000, 1, 1000), (999, 1, 999), (400, 2, 800), (400, 3, 1000)],
)
def test_an_estimate_is_at_most_the_context_window_of_each_prompt(
    window: int | None, prompts: int, expected: int
) -> None:
    assert replace(MODEL, context_window=window).prompt_tokens(1000, prompts) == expected


@pytest.mark.parametrize(
    "window, most, expected", [(None, None, 8192), (4096, None, 3996), (4096, 50, 50), (100, None, 1), (None, 9, 9)]
)
def test_an_answer_without_a_maximum_is_bounded(window: int | None, most: int | None, expected: int) -> None:
    model = replace(MODEL, context_window=window, max_output_tokens=most)
    assert model.output_tokens(prompt_tokens=100) == expected


# --------------------------------------------------------------------------------------------------
# What was priced is what is forwarded


def ask(path: str = CHAT, **members: Any) -> Ask:
    body = {CHAT: chat(said("hi")), COMPLETIONS: {"prompt": "hi"}, EMBEDDINGS: {"input": "hi"}}[path]
    return parse_request(ENDPOINTS[path], json.dumps({"model": "m", **body, **members}).encode())


def forwarded(request: Ask, lowered_to: int | None = None, upstream: Upstream = UPSTREAM) -> dict[str, Any]:
    sent = json.loads(forward_body(request, MODEL, upstream, lowered_to))
    assert isinstance(sent, dict)
    return sent


def silent() -> Upstream:
    return Upstream(name="up", base_url="http://127.0.0.1:1/v1", usage_in_stream="never")


MAXIMA = ("max_tokens", "max_completion_tokens")


@pytest.mark.parametrize(
    "members, lowered_to, expected",
    [
        ({}, None, {}),
        ({}, 3, {"max_tokens": 3}),
        ({"max_tokens": 9}, None, {"max_tokens": 9}),
        ({"max_tokens": 9}, 3, {"max_tokens": 3}),
        ({"max_completion_tokens": 9}, 3, {"max_completion_tokens": 3}),
        ({"max_tokens": 9, "max_completion_tokens": 5}, None, {"max_tokens": 5, "max_completion_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 9}, None, {"max_tokens": 5, "max_completion_tokens": 5}),
        ({"max_tokens": 5, "max_completion_tokens": 9}, 3, {"max_tokens": 3, "max_completion_tokens": 3}),
        ({"max_tokens": None}, 3, {"max_tokens": 3}),
        (
            {"max_tokens": None, "max_completion_tokens": 9},
            None,
            {"max_tokens": None, "max_completion_tokens": 9},
        ),
    ],
)
def test_the_maximum_that_was_priced_is_the_one_forwarded(
    members: dict[str, Any], lowered_to: int | None, expected: dict[str, Any]
) -> None:
    sent = forwarded(ask(**members), lowered_to)
    assert {name: sent[name] for name in MAXIMA if name in sent} == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        (None, {"include_usage": True}),
        ({}, {"include_usage": True}),
        ({"include_usage": False}, {"include_usage": True}),
        ({"include_usage": None, "include_obfuscation": False}, {"include_usage": True, "include_obfuscation": False}),
        ({"continuous_usage_stats": True}, {"include_usage": True, "continuous_usage_stats": True}),
    ],
)
def test_usage_is_asked_for_and_other_options_are_kept(options: Any, expected: dict[str, Any]) -> None:
    request = ask(stream=True, stream_options=options)
    assert forwarded(request)["stream_options"] == expected
    assert "stream_options" not in forwarded(request, upstream=silent())
    assert not request.wants_usage


def test_usage_is_not_asked_for_where_nothing_is_streamed() -> None:
    assert "stream_options" not in forwarded(ask())
    assert "stream_options" not in forwarded(ask(stream=False))
    assert "stream_options" not in forwarded(ask(EMBEDDINGS))


def test_a_duplicate_member_is_forwarded_once_as_it_was_priced() -> None:
    raw = b'{"model":"a","model":"m","max_tokens":1,"max_tokens":9,"n":1,"n":2,"messages":[{"role":"user"}]}'
    request = parse_request(ENDPOINTS[CHAT], raw)
    sent = forward_body(request, MODEL, UPSTREAM, None)
    assert (request.model, request.max_tokens, request.choices) == ("m", 9, 2)
    assert [sent.count(name) for name in (b'"model"', b'"max_tokens"', b'"n"')] == [1, 1, 1]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
COUNTS = st.one_of(st.none(), st.integers(1, 128))
GOOD_BODIES = st.fixed_dictionaries(
    {"model": st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)},
    optional={
        "stream": st.sampled_from([None, True, False]),
        "stream_options": st.none() | st.dictionaries(st.sampled_from(["x", "include_obfuscation"]), JSON),
        "n": COUNTS,
        "best_of": COUNTS,
        "max_tokens": COUNTS,
        "max_completion_tokens": COUNTS,
        "temperature": JSON,
        "tools": JSON,
        "user": JSON,
    },
)
PROMPTS = st.one_of(
    TEXTS,
    st.lists(TEXTS, min_size=1, max_size=3),
    st.lists(st.integers(), min_size=1, max_size=3),
    st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=3), min_size=1, max_size=3),
)
MESSAGES = st.lists(st.builds(said, TEXTS | st.none() | st.lists(st.just(IMAGE)), tool_calls=JSON), min_size=1)


@given(GOOD_BODIES, PROMPTS, MESSAGES, st.sampled_from(list(ENDPOINTS)), st.one_of(st.none(), st.integers(1, 20)))
@settings(CALM, max_examples=50)
def test_what_is_forwarded_would_be_priced_the_same(
    body: dict[str, Any], prompt: Any, messages: Any, path: str, lowered_to: int | None
) -> None:
    endpoint = ENDPOINTS[path]
    body[endpoint.prompt] = messages if path == CHAT else prompt
    first = parse_request(endpoint, json.dumps(body).encode())
    again = parse_request(endpoint, forward_body(first, replace(MODEL, id=first.model), UPSTREAM, lowered_to))
    expected = replace(first, max_tokens=first.max_tokens if lowered_to is None else lowered_to)
    for name in ("stream", "choices", "max_tokens", "prompt_estimate"):
        assert getattr(again, name) == getattr(expected, name)
    untouched = {name: value for name, value in body.items() if name in ("temperature", "user", "n", endpoint.prompt)}
    assert {name: again.body[name] for name in untouched} == untouched


@given(st.binary(max_size=80) | st.builds(lambda value: json.dumps(value).encode(), JSON))
@settings(CALM, max_examples=60)
def test_a_body_of_any_kind_is_read_or_refused(raw: bytes) -> None:
    for endpoint in ENDPOINTS.values():
        with pytest.raises(Refusal) as refused:
            parse_request(endpoint, raw)
        assert refused.value.status in (400, 422)


MEMBERS = ("model", "stream", "stream_options", "n", "best_of", *MAXIMA, "messages", "prompt", "input")


@given(st.sampled_from([*MEMBERS, "n_predict", "num_predict", "max_new_tokens"]), st.data())
@settings(CALM, max_examples=60)
def test_a_member_that_another_server_could_take_for_ours_is_refused(name: str, data: st.DataObject) -> None:
    alike = {"s": "sSſ", "k": "kK\N{KELVIN SIGN}", "_": ("_", "", "-", "__")}
    letters = [data.draw(st.sampled_from(alike.get(letter, (letter, letter.upper())))) for letter in name]
    twin = "".join(letters)
    if twin in MEMBERS:
        return
    with pytest.raises(Refusal) as refused:
        ask(**{twin: 5})
    assert (refused.value.status, refused.value.code) == (422, "validation_failed")
    assert twin in refused.value.content["errors"]


WRONG = {
    "stream": [1, 0, 1.0, 0.0, "true", []],
    "n": [0, -1, 129, 1.0, True, "1", []],
    "max_tokens": [0, -1, 2**31 + 1, 1.0, True, "9", {}, 10**30],
    "max_completion_tokens": [0, 5.0, False],
    "best_of": [0, 129, True],
    "model": ["", None, 7, []],
    "messages": ["hi", [], [7], [{"content": 7}], [{"content": ["hi"]}], {}],
    "stream_options": [True, [], "x", {"include_usage": 1}, {"include_usage": "true"}, {"includeUsage": True}],
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_type_or_value_is_refused_and_named(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(Refusal) as refused:
            ask(**{name: value})
        assert refused.value.status == 422, value
        assert next(iter(refused.value.content["errors"])).startswith(name), value


@pytest.mark.parametrize("prompt", [7, None, [], [7, "x"], [True], [[]], [["x"]], [[1], []], [1.5], {}], ids=repr)
def test_a_prompt_of_another_kind_is_refused(prompt: Any) -> None:
    for path, name in ((COMPLETIONS, "prompt"), (EMBEDDINGS, "input")):
        with pytest.raises(Refusal) as refused:
            ask(path, **{name: prompt})
        assert refused.value.code == "validation_failed"


def test_the_choices_are_all_the_answers_that_may_come() -> None:
    assert ask(n=3).choices == 3
    assert ask(COMPLETIONS, prompt=["a", "b"], n=2, best_of=5).choices == 10
    assert ask(COMPLETIONS, prompt=[[1], [2], [3]]).choices == 3
    assert ask(EMBEDDINGS, input=["a", "b"]).choices == 0


def test_usage_has_the_names_of_the_wire() -> None:
    assert (Usage._fields, Bill._fields[:2]) == (("prompt_tokens", "completion_tokens"),) * 2
