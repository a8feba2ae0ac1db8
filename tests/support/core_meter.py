"""The one place where the tests know the core's splitter and meter; `metered` runs a case in every way it can be read.

What a stream costs and what of it goes on is worked out without a socket. Each thing that the core is asked is a
function here (`new_meter`, `new_splitter`, `feed`, `bill_of`, `judgement_of`, `bill_of_answer`): where its interface
changes, these change and no test does.
"""

import json
import re
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import proxy

CHAT, COMPLETIONS, EMBEDDINGS = "chat/completions", "completions", "embeddings"
RESPONSES, MESSAGES, RERANK = "responses", "messages", "rerank"
EVENT_BYTES_MAX, TOKENS_MAX, BrokenStream = proxy.EVENT_BYTES_MAX, proxy.TOKENS_MAX, proxy.BrokenStream
E = 7  # the estimate of the prompt, wherever it does not matter
DONE = b"data: [DONE]\n\n"


class Bill(NamedTuple):
    """What a request is charged for."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool


class Judgement(NamedTuple):
    """What the meter thinks of a stream."""

    ended: bool  # the upstream may close now
    over: bool  # the event that ends it has come
    broken: bool  # an error of the upstream's own has
    failed: bool  # it ended by saying that it failed
    finished: bool  # a finish reason has passed
    produced: bool  # something came

    @property
    def stops(self) -> bool:
        """Nothing more of it goes on."""
        return self.over or self.broken


# --------------------------------------------------------------------------------------------------
# The core, asked


def new_meter(
    path: str = CHAT, choices: int = 1, wants_usage: bool = True, prompts: int = 1, usage_of: str = "answer"
) -> Any:
    """The meter of a stream; `wants_usage`: its client asked for usage; `usage_of`: what its upstream speaks of."""
    return proxy.Meter(proxy.APIS[path], choices, prompts, wants_usage, usage_of)


def new_splitter() -> Any:
    """`feed(read)` returns the whole events that have come."""
    return proxy.Splitter()


def kept_back(splitter: Any) -> bytes:
    """The unfinished event."""
    return bytes(splitter.tail)


def feed(meter: Any, block: bytes) -> tuple[Any, bytes, bytes]:
    """Whole events: the meter with them counted, which the relay drops if they do not go on; what goes on, and the
    event that ends the stream, which goes on once it is settled."""
    tally = copy(meter)
    out, last = tally.feed(block)
    return tally, out, last


def judgement_of(meter: Any) -> Judgement:
    return Judgement(meter.ended, meter.over, meter.broken, meter.failed, meter.finished, meter.produced)


def bill_of(meter: Any, complete: bool) -> Bill:
    """What is owed now; `complete`: the stream came to its end."""
    return Bill(*meter.bill(E, complete))


def bill_of_answer(answer: dict[str, Any], path: str = CHAT, **more: Any) -> Bill:
    """What an answer costs that is not streamed."""
    meter = new_meter(path, **{"wants_usage": False, **more})
    meter.feed_whole(json.dumps(answer).encode())
    return bill_of(meter, complete=True)


# --------------------------------------------------------------------------------------------------
# One helper for every case


@dataclass(frozen=True)
class Outcome:
    """What became of a stream: the bytes that go on, what is kept back of them, and the meter's judgement."""

    out: bytes
    kept: bytes
    bill: Bill
    judgement: Judgement

    @property
    def comparable(self) -> tuple[Any, ...]:
        """The LF of a last CRLF may go on with its event or be kept back: what both hold is what counts."""
        passed = self.out if self.judgement.stops else self.out + self.kept
        return (passed.rstrip(b"\r\n"), self.bill, self.judgement)


def run(reads: Iterable[bytes], meter: Any, complete: bool) -> Outcome:
    """What the relay does: whole events to the meter, until one of them ends the stream."""
    splitter, passed = new_splitter(), bytearray()
    for read in reads:
        if block := splitter.feed(read):
            meter, out, last = feed(meter, block)
            assert bool(last) == judgement_of(meter).stops, "it is kept back until the settle"
            passed += out + last
        if judgement_of(meter).stops:
            break
    return Outcome(bytes(passed), kept_back(splitter), bill_of(meter, complete), judgement_of(meter))


def metered(stream: bytes, *, complete: bool = True, **more: Any) -> Outcome:
    """The outcome of a stream, which must not depend on how it was read: whole, byte by byte, with trailing data.

    `more` is of `new_meter`."""

    def through(*reads: bytes) -> Outcome:
        return run(reads, new_meter(**more), complete)

    whole = through(stream)
    assert through(*(stream[n : n + 1] for n in range(len(stream)))).comparable == whole.comparable
    if not whole.kept:
        trailing = b"data: unfinished"
        longer = through(stream + trailing)
        assert (longer.out, longer.bill, longer.judgement) == (whole.out, whole.bill, whole.judgement)
        assert longer.kept == trailing
    return whole


# --------------------------------------------------------------------------------------------------
# Streams, and what a client reads of them


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
    """An event as terse as real servers write it."""
    return b"data: " + json.dumps(data, separators=(",", ":")).encode() + newline * 2


def typed(kind: str, **members: Any) -> bytes:
    """An event that bears its type, as those of responses and messages do."""
    return b"event: " + kind.encode() + b"\n" + sse({"type": kind, **members})


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
