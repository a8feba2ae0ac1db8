"""The meter alone: any bytes in, the same bytes out, and a number (issue 11, item 3)."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import proxy

APIS = ["chat/completions", "completions", "embeddings", "rerank", "responses", "messages"]
TOKENS_MAX = 2**31
ESTIMATE = 8
FUZZ = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# Words of the formats, so that what is drawn gets past the first test of each kind.
NAMES_OF_MEMBERS = """
choices delta content usage prompt_tokens completion_tokens input_tokens output_tokens total_tokens text index
finish_reason tool_calls function arguments reasoning_content reasoning refusal error message type response object
cache_read_input_tokens cache_creation_input_tokens thinking partial_json status code detail
"""
TYPES_OF_EVENTS = """
response.completed response.output_text.delta response.failed response.incomplete .delta message_start message_delta
message_stop content_block_delta chat.completion.chunk error [DONE]
"""
NAMES, TYPES = (st.sampled_from(words.split()) for words in (NAMES_OF_MEMBERS, TYPES_OF_EVENTS))
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=8), TYPES, st.just("\ud800")
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(NAMES, inner, max_size=5)),
    max_leaves=20,
)
ENDS = st.sampled_from([b"\n\n", b"\r\n\r\n", b"\r\r", b"\n", b"\r\n", b""])
PREFIXES = st.sampled_from(
    [b"data: ", b"data:", b"", b": ", b"event: message_stop\ndata: ", b"id: 1\nretry: 5\ndata: "]
)


@st.composite
def events(draw: st.DrawFn) -> bytes:
    """What looks like an event, perhaps with some of its bytes changed."""
    data = json.dumps(draw(VALUES), ensure_ascii=draw(st.booleans())).encode(errors="surrogatepass")
    data = draw(st.sampled_from([data, b"[DONE]", b"", data[: len(data) // 2]]))
    event = bytearray(draw(PREFIXES) + data + draw(ENDS))
    for place in draw(st.lists(st.integers(0, max(0, len(event) - 1)), max_size=2)):
        event[place : place + 1] = draw(st.binary(max_size=2))
    return bytes(event)


STREAMS = st.one_of(st.binary(max_size=300), st.lists(events(), max_size=8).map(b"".join))


def meter(api: str, choices: int = 1, wants_usage: bool = True) -> Any:
    return proxy.Meter(api=proxy.APIS[api], choices=choices, wants_usage=wants_usage)


def play(counter: Any, reads: list[bytes]) -> tuple[bytes, bytes]:
    """Feed the reads up to the event that ends the stream; return what went in as whole events, and what came out."""
    splitter, whole, relayed = proxy.Splitter(), b"", b""
    for read in reads:
        block = splitter.feed(read)
        out, last = counter.feed(block)
        whole, relayed = whole + bytes(block), relayed + bytes(out) + bytes(last)
        if last:
            assert whole.startswith(relayed), "what follows the end is not relayed, and nothing else is missing"
            return relayed, relayed
    return whole, relayed


def assert_is_a_bill(bill: Any) -> None:
    prompt, completion, estimated = bill
    for tokens in (prompt, completion):
        assert type(tokens) is int and 0 <= tokens <= TOKENS_MAX, bill
    assert estimated in (True, False), bill


def test_every_api_has_a_row() -> None:
    assert set(APIS) <= set(proxy.APIS)


@pytest.mark.parametrize("api", APIS)
@FUZZ
@given(stream=STREAMS, choices=st.integers(0, 4), complete=st.booleans())
def test_any_bytes_pass_unchanged_and_cost_a_number(api: str, stream: bytes, choices: int, complete: bool) -> None:
    counter = meter(api, choices)
    whole, relayed = play(counter, [stream])
    assert relayed == whole
    assert stream.startswith(whole)
    assert_is_a_bill(counter.bill(ESTIMATE, complete))


@pytest.mark.parametrize("api", APIS)
@FUZZ
@given(stream=STREAMS, complete=st.booleans())
def test_any_bytes_cost_the_same_in_one_read_and_byte_by_byte(api: str, stream: bytes, complete: bool) -> None:
    at_once, slowly = meter(api), meter(api)
    _, relayed = play(at_once, [stream])
    _, relayed_slowly = play(slowly, [stream[n : n + 1] for n in range(len(stream))])
    assert relayed_slowly.rstrip(b"\r\n") == relayed.rstrip(b"\r\n"), "but for a line feed after a carriage return"
    assert slowly.bill(ESTIMATE, complete) == at_once.bill(ESTIMATE, complete)


@pytest.mark.parametrize("api", APIS)
@FUZZ
@given(stream=STREAMS)
def test_a_client_that_asked_for_no_usage_pays_the_same(api: str, stream: bytes) -> None:
    """It may be given an empty choice, which is no token."""
    asked, did_not_ask = meter(api), meter(api, wants_usage=False)
    play(asked, [stream])
    play(did_not_ask, [stream])
    assert did_not_ask.bill(ESTIMATE, True) == asked.bill(ESTIMATE, True)


@pytest.mark.parametrize("api", APIS)
@FUZZ
@given(streams=st.lists(STREAMS, max_size=4))
def test_a_bill_may_be_asked_for_at_any_time_and_changes_nothing(api: str, streams: list[bytes]) -> None:
    asked, left_alone = meter(api), meter(api)
    splitters = proxy.Splitter(), proxy.Splitter()
    for read in streams:
        asked.feed(splitters[0].feed(read))
        left_alone.feed(splitters[1].feed(read))
        assert_is_a_bill(asked.bill(ESTIMATE, False))
    assert asked.bill(ESTIMATE, True) == left_alone.bill(ESTIMATE, True)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("depth", [10, 1000, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"choices":', b"}"), (b'[{"delta":', b"}]")])
def test_no_depth_of_nesting_raises(api: str, depth: int, opening: bytes, closing: bytes) -> None:
    counter = meter(api)
    event = b'data: {"choices":' + opening * depth + b"1" + closing * depth + b"}\n\n"
    whole, relayed = play(counter, [event])
    assert relayed == whole == event
    assert_is_a_bill(counter.bill(ESTIMATE, True))
