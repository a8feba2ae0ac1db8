"""A stream goes on as it came, event by event, however its bytes are cut, and only whole events are counted.

What a client would read of a stream is worked out a second time, by `dispatched`, which follows the specification.
"""

import json
import math
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.core_meter import (
    DONE,
    EVENT_BYTES_MAX,
    Bill,
    BrokenStream,
    E,
    closing,
    delta,
    dispatched,
    finish,
    metered,
    new_meter,
    new_splitter,
    run,
    sse,
    used,
    words,
)
from tests.support.strategies import CALM, LINE_ENDS, TEXTS, in_pieces

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
        outcome = run([first + second[:cut]], new_meter(), complete=False)
        assert (outcome.out, outcome.kept) == (first, second[:cut])
        assert outcome.bill == Bill(E, 1, True)


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


def owed(stream: bytes) -> Bill:
    """What a stream that came to its end costs, by what a client can read of it.

    What looks like JSON and cannot be read here may be read elsewhere, so all of it is text.
    """
    read, sizes = [], []
    for data in dispatched(stream):
        try:
            read.append(json.loads(data))
        except json.JSONDecodeError:  # a CR and the LF after it are one line end: two events are one
            sizes += [len(data)] if data.startswith(b"{") else []
    texts = [choice["delta"].get("content") for chunk in read for choice in chunk.get("choices", [])]
    sizes += [len(text.encode()) for text in texts if text]
    count = max(len(sizes), math.ceil(sum(sizes) / 4))
    usage = [chunk["usage"] for chunk in read if chunk.get("usage")]
    prompt, completion = (
        next((found[name] for found in reversed(usage) if type(found.get(name)) is int and found[name] >= 0), None)
        for name in ("prompt_tokens", "completion_tokens")
    )
    if prompt == 0 and (completion or count):
        prompt = None
    believed = completion is not None and 2 * completion >= len(sizes)
    output = completion if completion is not None and believed else count
    return Bill(E if prompt is None else prompt, output, prompt is None or output != (completion or 0))


@given(streams(), st.lists(st.integers(0, 10**6), max_size=12))
@example(b'data: {"choices":[{"delta":{"content":"word"},"finish_reason":null}]}\rid: 5\n\n', [])
@example(b'data: {"choices":\rdata: [{"delta":{"content":"word"},"finish_reason":null}]}\n\n', [])
@settings(CALM, max_examples=200)
def test_no_split_of_any_stream_changes_its_bytes_or_its_bill(stream: bytes, places: list[int]) -> None:
    whole = run([stream], new_meter(), complete=True)
    pieces = run(in_pieces(stream, places), new_meter(), complete=True)
    assert whole.out + whole.kept == pieces.out + pieces.kept == stream
    assert whole.bill == pieces.bill == owed(stream)
    assert dispatched(whole.out) == dispatched(pieces.out) == dispatched(stream)


@given(st.binary(max_size=200) | st.lists(st.sampled_from([b"\n", b"\r", b"a", b"data:", b"\xff"])).map(b"".join))
@example(b"\n\r\n\n")  # ends with two line feeds, the last of which ends no event
@settings(CALM, max_examples=100)
def test_bytes_of_any_kind_go_on_as_they_are_and_never_fail(stream: bytes) -> None:
    outcome = metered(stream, wants_usage=False)
    assert outcome.out + outcome.kept == stream or outcome.judgement.stops


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
    outcome = run([stream], new_meter(), complete=True)
    assert (outcome.out, outcome.bill) == (stream, Bill(5, 1, False))


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
    stream = event + DONE
    outcome = run((stream[n : n + 65_536] for n in range(0, len(stream), 65_536)), new_meter(), complete=False)
    assert (outcome.out, outcome.bill) == (stream, Bill(E, 2**20, True))
    assert outcome.judgement.over


def test_an_event_past_16_megabytes_is_a_broken_stream() -> None:
    splitter = new_splitter()
    assert splitter.feed(b"data: " + b"x" * (EVENT_BYTES_MAX - 6)) == b""
    with pytest.raises(BrokenStream):
        splitter.feed(b"x")


def test_an_event_of_16_megabytes_that_ends_is_none() -> None:
    event = b"data: " + b"x" * (EVENT_BYTES_MAX - 8) + b"\n\n"
    splitter = new_splitter()
    pieces = [whole for n in range(0, len(event), 2**18) if (whole := splitter.feed(event[n : n + 2**18]))]
    assert pieces == [event]


def test_many_small_events_are_no_large_one() -> None:
    splitter = new_splitter()
    read = words(1000)
    size = sum(len(splitter.feed(read)) for _ in range(EVENT_BYTES_MAX // len(read) + 2))
    assert size > EVENT_BYTES_MAX
