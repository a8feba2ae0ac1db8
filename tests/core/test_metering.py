"""What a stream costs: its last usage that can be true, else what came of it. The event that is changed stays honest.

Every case runs whole, byte by byte and with trailing data, through `metered`.
"""

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.core_meter import (
    CHAT,
    COMPLETIONS,
    DONE,
    EMBEDDINGS,
    MESSAGES,
    RERANK,
    RESPONSES,
    TOKENS_MAX,
    Bill,
    BrokenStream,
    E,
    bill_of,
    bill_of_answer,
    closing,
    delta,
    dispatched,
    feed,
    finish,
    judgement_of,
    metered,
    new_meter,
    run,
    sse,
    typed,
    used,
    words,
)
from tests.support.strategies import CALM, LINE_ENDS, TEXTS, in_pieces

EMPTY_CHOICE = {
    CHAT: b'{"index":0,"delta":{},"finish_reason":null}',
    COMPLETIONS: b'{"index":0,"text":"","logprobs":null,"finish_reason":null}',
}

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
    "broken_calls": ({"tool_calls": [7, None, {"function": None}, {}]}, 0),
    "a_call_that_is_a_text": ({"tool_calls": ["12345678"]}, 2),
}


@pytest.mark.parametrize("name", BEARING)
def test_what_bears_content_is_counted(name: str) -> None:
    part, count = BEARING[name]
    stream = sse({"choices": [{"index": 0, "delta": part, "finish_reason": None}]})
    assert metered(stream, complete=False).bill == Bill(E, count, True)
    answer = {"choices": [{"index": 0, "message": part, "finish_reason": "stop"}]}
    assert bill_of_answer(answer) == Bill(E, count, True)


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
    "zero_is_zero_where_nothing_came": (sse(finish()) + sse(closing(0, 0)), 1, Bill(0, 0, False)),
    "zero_completion_where_nothing_came": (sse(finish()) + sse(closing(5, 0)), 1, Bill(5, 0, False)),
    "zero_is_not_believed": (words(3) + sse(closing(0, 0)), 1, Bill(E, 3, True)),
    "zero_completion_is_not_believed": (words(3) + sse(closing(5, 0)), 1, Bill(5, 3, True)),
    "no_prompt_for_a_completion": (words(3) + sse(closing(0, 3)), 1, Bill(E, 3, True)),
    "half_of_the_events_is_believed": (words(4) + sse(closing(5, 2)), 1, Bill(5, 2, False)),
    "less_than_half_is_not": (words(5) + sse(closing(5, 2)), 1, Bill(5, 5, True)),
    "long_tokens_are_believed": (sse(delta("x" * 100)) + sse(closing(5, 1)), 1, Bill(5, 1, False)),
    "no_completion": (words(3) + sse({"choices": [], "usage": {"prompt_tokens": 5}}), 1, Bill(5, 3, True)),
    "no_prompt": (words(3) + sse({"choices": [], "usage": {"completion_tokens": 9}}), 1, Bill(E, 9, True)),
    "details_are_parts": (
        words(1) + sse({"choices": [], "usage": used(5, 3, completion_tokens_details={"reasoning_tokens": 99},
                                                     prompt_tokens_details={"cached_tokens": 4}, total_tokens=500)}),
        1, Bill(5, 3, False),
    ),
    "two_closings_of_one_choice": (words(4) + sse(closing(5, 2)) + sse(closing(5, 4)), 1, Bill(5, 4, False)),
    "one_closing_of_two_choices": (words(4) + sse(closing(5, 4)), 2, Bill(5, 4, False)),
    "cumulative_of_two_choices": (
        b"".join(sse(delta(usage=used(5, n))) for n in (1, 2, 3, 4)), 2, Bill(5, 4, False),
    ),
    "no_choices_at_all": (words(1) + sse({"usage": used(5, 3)}), 1, Bill(5, 3, False)),
    "choices_null": (words(1) + sse({"choices": None, "usage": used(5, 3)}), 1, Bill(5, 3, False)),
    "before_the_text_without_a_completion": (
        sse({"choices": [], "usage": {"prompt_tokens": 5}}) + words(3), 1, Bill(5, 3, True),
    ),
    "before_the_text_and_after_it": (
        sse({"choices": [], "usage": {"prompt_tokens": 5}}) + words(3) + sse({"usage": {"completion_tokens": 4}}),
        1, Bill(5, 4, False),
    ),
    # Of several choices the last usage may be one choice's: the larger of it and what must have been used.
    "nothing_is_added_up": (sse(closing(4, 2)) + sse(closing(6, 3)) + sse(closing(5, 1)), 3, Bill(5, 1, False)),
    "one_choice_of_two": (words(4) + sse(closing(5, 2)) + sse(closing(5, 3)), 2, Bill(5, 4, True)),
    "one_choice_of_long_texts": (sse(delta("x" * 80)) * 2 + sse(closing(5, 9)), 2, Bill(5, 20, True)),
    "both_choices": (sse(delta("x" * 80)) * 2 + sse(closing(5, 21)), 2, Bill(5, 21, False)),
    "less_than_half_of_two_choices": (words(5) + sse(closing(5, 2)), 2, Bill(5, 5, True)),
    "the_last_of_several_choices": (
        sse(delta(usage=used(5, 7))) + sse(closing(5, 2)) + sse(closing(5, 2)) + sse(finish(usage=used(5, 9))),
        2, Bill(5, 9, False),
    ),
    "as_large_as_can_be": (sse(closing(1, TOKENS_MAX)) * 2, 2, Bill(1, TOKENS_MAX, False)),
}  # fmt: skip


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("name", USAGE)
def test_a_streams_usage_is_what_it_costs(name: str, newline: bytes) -> None:
    events, choices, bill = USAGE[name]
    stream = (events + DONE).replace(b"\n", newline)
    outcome = metered(stream, choices=choices)
    assert outcome.bill == bill
    assert outcome.comparable[0] == stream.rstrip(b"\r\n")
    assert outcome.judgement.over, "[DONE] ends a stream"


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
    stream = sse(delta(usage=used(5, 2))) + words(2)
    assert metered(stream, complete=False).bill == Bill(5, 4, True)
    assert metered(stream, complete=True).bill == Bill(5, 2, False)


def test_a_stream_that_was_cut_short_owes_no_less_than_its_count() -> None:
    stream = sse(delta("x" * 100, usage=used(5, 3))) + words(1)
    assert metered(stream, complete=False).bill == Bill(5, 26, True)
    assert metered(sse({"usage": {"prompt_tokens": 5}}) + words(3), complete=False).bill == Bill(5, 3, True)


def test_usage_of_a_block_that_was_refused_is_not_billed() -> None:
    """What does not go on is counted on a copy, which is dropped."""
    meter, _, _ = feed(new_meter(), words(2) + sse(delta(usage=used(5, 3))))
    refused, _, _ = feed(meter, words(10) + sse(delta(usage=used(6, 99))) + sse(finish()) + DONE)
    assert bill_of(refused, complete=True) == Bill(6, 99, False)
    assert bill_of(meter, complete=False) == bill_of(meter, complete=True) == Bill(5, 3, False)
    assert not judgement_of(meter).finished and not judgement_of(meter).over
    again, _, _ = feed(meter, words(1) + sse(closing(5, 4)))
    assert bill_of(again, complete=True) == Bill(5, 4, False)


CHOICES: dict[
    str, tuple[dict[str, Any], Bill]
] = {  # what the meter is told, and what an answer of four words costs whose upstream says 5 and 9
    "an_answers": ({"choices": 2}, Bill(5, 9, False)),
    "an_answers_of_two_prompts": ({"choices": 2, "prompts": 2}, Bill(5, 9, False)),
    "a_choices": ({"choices": 2, "usage_of": "choice"}, Bill(5, 4, True)),
    "a_choices_of_two_prompts": ({"choices": 2, "prompts": 2, "usage_of": "choice"}, Bill(E, 4, True)),
    "the_only_choices": ({"choices": 1, "usage_of": "choice"}, Bill(5, 9, False)),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_upstream_may_speak_of_one_choice_only(name: str) -> None:
    told, bill = CHOICES[name]
    assert metered(words(4) + sse(closing(5, 9)) + DONE, **told).bill == bill
    answer = {"choices": [{"message": {"content": "word"}}] * 4, "usage": used(5, 9)}
    assert bill_of_answer(answer, **told) == bill


def test_cumulative_usage_covers_the_event_that_bears_it() -> None:
    stream = b"".join(sse(delta(usage=used(5, n))) for n in (1, 2, 3))
    assert metered(stream, complete=False).bill == Bill(5, 3, False)


def test_usage_that_a_client_sees_twice_is_charged_once() -> None:
    stream = words(2) + sse(finish(usage=used(5, 2))) + sse(closing(5, 2)) + DONE
    assert metered(stream).bill == Bill(5, 2, False)


def test_an_answer_that_is_not_streamed_costs_its_usage() -> None:
    choices = [{"message": {"content": "word"}}, {"message": {"content": "word"}}]
    assert bill_of_answer({"choices": choices, "usage": used(5, 2)}, choices=2) == Bill(5, 2, False)


def test_an_answer_of_several_choices_costs_what_must_have_been_used() -> None:
    """llama.cpp says what one of them took."""
    choices = [{"message": {"content": "x" * 40}}, {"message": {"content": "x" * 40}}]
    assert bill_of_answer({"choices": choices, "usage": used(5, 6)}, choices=2) == Bill(5, 10, True)
    assert bill_of_answer({"choices": choices, "usage": used(5, 11)}, choices=2) == Bill(5, 11, False)
    assert bill_of_answer({"choices": choices, "usage": used(5, 6)}) == Bill(5, 6, False)


def test_embeddings_and_rankings_cost_their_prompt() -> None:
    answer = {"object": "list", "data": [{"embedding": [0.5]}], "usage": {"prompt_tokens": 5, "total_tokens": 5}}
    assert bill_of_answer(answer, EMBEDDINGS, choices=0) == Bill(5, 0, False)
    ranking = {"results": [{"index": 0, "relevance_score": 0.5}], "usage": {"total_tokens": 6}}
    assert bill_of_answer(ranking, RERANK, choices=0) == Bill(6, 0, False)
    ranking["usage"] = {"prompt_tokens": 5, "total_tokens": 6}
    assert bill_of_answer(ranking, RERANK, choices=0) == Bill(5, 0, False)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"7", b"null", b"{}", b"<html>", b'{"error":{"message":"no"}}', b'{"a":1}']
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, EMBEDDINGS, RERANK, RESPONSES, MESSAGES])
def test_what_is_no_answer_of_an_api_is_not_paid_for(body: bytes, path: str) -> None:
    with pytest.raises(BrokenStream):
        new_meter(path).feed_whole(body)


# --------------------------------------------------------------------------------------------------
# Ends

ENDS = {  # stream: may the upstream close, has the end come, has an error of its own
    "done": (DONE, (True, True, False)),
    "done_without_a_space": (b"data:[DONE]\n\n", (True, True, False)),
    "done_of_two_line_ends": (b"data: [DONE]\r\n\r\n", (True, True, False)),
    "done_after_a_comment": (b": ping\ndata: [DONE]\n\n", (True, True, False)),
    "finish_reason": (sse(finish()), (True, False, False)),
    "usage": (sse(closing(5, 3)), (True, False, False)),
    "neither": (words(2), (False, False, False)),
    "nothing": (b"", (False, False, False)),
    "error": (sse({"error": {"message": "no"}}), (False, False, True)),
    "error_text": (sse({"error": "no"}), (False, False, True)),
    "error_with_choices": (sse(finish(error={"message": "no"})), (True, False, True)),
    "error_event": (b'event: error\ndata: {"message":"no"}\n\n', (False, False, True)),
    "error_event_crlf": (b'event:error\r\ndata: {"message":"no"}\r\n\r\n', (False, False, True)),
    "error_event_later": (words(2) + b'event: error\ndata: {"message":"no"}\n\n', (False, False, True)),
    "error_event_with_an_id": (b'id: 1\nevent: error\ndata: {"message":"no"}\n\n', (False, False, True)),
    "error_event_no_json": (b"event: error\ndata: Internal Server Error\n\n", (False, False, True)),
    "no_error": (sse(delta(error=None)), (False, False, False)),
    "another_event": (b'event: errors\ndata: {"message":"no"}\n\n', (False, False, False)),
    "another_typed_event": (b'event: errors\ndata: {"type":"errors"}\n\n', (False, False, False)),
    "done_in_a_text": (sse(delta("[DONE]")), (False, False, False)),
    "done_in_a_comment": (b": [DONE]\n\n", (False, False, False)),
}


@pytest.mark.parametrize("name", ENDS)
def test_how_a_stream_ends_is_known_by_its_events(name: str) -> None:
    stream, judgement = ENDS[name]
    assert metered(stream).judgement[:3] == judgement


def test_what_follows_done_neither_goes_on_nor_costs() -> None:
    stream = words(1) + DONE + words(5) + sse(closing(99, 99))
    outcome = run([stream], new_meter(), complete=True)
    assert (outcome.out, outcome.bill) == (words(1) + DONE, Bill(E, 1, True))


# --------------------------------------------------------------------------------------------------
# The other APIs: what `usage` stands in, and what ends a stream


def started(**usage: Any) -> bytes:
    return typed("message_start", message={"role": "assistant", "content": [], "usage": usage})


def block_delta(**delta_: Any) -> bytes:
    return typed("content_block_delta", index=0, delta=delta_)


def message_delta(**usage: Any) -> bytes:
    return typed("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


STARTED = started(input_tokens=5, cache_read_input_tokens=2, cache_creation_input_tokens=1, output_tokens=0)
TEXT = block_delta(type="text_delta", text="word")
STOP = typed("message_stop")
OF_MESSAGES = {  # stream, what it costs to its end, and cut short there
    "start_then_deltas": (STARTED + TEXT * 3 + message_delta(output_tokens=4), Bill(8, 4, False), Bill(8, 4, False)),
    "the_last_delta_counts": (
        STARTED + TEXT * 3 + message_delta(output_tokens=2) + message_delta(output_tokens=4),
        Bill(8, 4, False), Bill(8, 4, False),
    ),
    "the_prompt_once_more": (
        STARTED + TEXT + message_delta(input_tokens=9, cache_read_input_tokens=None, output_tokens=1),
        Bill(12, 1, False), Bill(12, 1, False),
    ),
    "no_delta": (STARTED + TEXT * 3, Bill(8, 3, True), Bill(8, 3, True)),
    "no_usage": (TEXT * 3, Bill(E, 3, True), Bill(E, 3, True)),
    "no_prompt": (
        started(input_tokens=0, output_tokens=0) + TEXT * 3 + message_delta(output_tokens=3), Bill(E, 3, True),
        Bill(E, 3, True),
    ),
    "thinking_and_tools": (
        STARTED + block_delta(type="thinking_delta", thinking="x" * 8)
        + block_delta(type="input_json_delta", partial_json="x" * 8)
        + block_delta(type="signature_delta", signature="x" * 800),
        Bill(8, 4, True), Bill(8, 4, True),
    ),
    "pings": (STARTED + typed("ping") + TEXT + typed("ping"), Bill(8, 1, True), Bill(8, 1, True)),
    "after_a_cumulative_one": (
        STARTED + TEXT + typed("content_block_delta", index=0, delta={"text": "word"}, usage={"output_tokens": 2})
        + TEXT * 2,
        Bill(8, 2, False), Bill(8, 4, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_MESSAGES)
def test_a_message_costs_what_its_start_and_its_deltas_say(name: str) -> None:
    stream, bill, cut_short = OF_MESSAGES[name]
    whole = metered(stream + STOP, path=MESSAGES)
    assert (whole.out, whole.bill) == (stream + STOP, bill)
    assert whole.judgement.over and whole.judgement.ended
    broken_off = metered(stream, path=MESSAGES, complete=False)
    assert broken_off.bill == cut_short
    assert not broken_off.judgement.ended, "no other event ends a message"


def text_delta(text: str = "word") -> bytes:
    return typed("response.output_text.delta", delta=text)


def response_event(kind: str, usage: Any = None, text: str = "word" * 3) -> bytes:
    output = [{"type": "message", "content": [{"type": "output_text", "text": text}]}]
    return typed(f"response.{kind}", response={"status": kind, "output": output, "usage": usage})


RESPONSE_USAGE = {"input_tokens": 5, "output_tokens": 4, "input_tokens_details": {"cached_tokens": 4},
                  "output_tokens_details": {"reasoning_tokens": 99}, "total_tokens": 500}  # fmt: skip
REPEATS = (
    typed("response.output_text.done", text="word" * 3)
    + typed("response.content_part.done", part={"type": "output_text", "text": "word" * 3})
    + typed("response.output_item.done", item={"content": [{"type": "output_text", "text": "word" * 3}]})
)
OF_RESPONSES = {  # the deltas, the event that ends it, and what it costs
    "completed": (text_delta() * 3, response_event("completed", RESPONSE_USAGE), Bill(5, 4, False)),
    "incomplete": (text_delta() * 3, response_event("incomplete", RESPONSE_USAGE), Bill(5, 4, False)),
    "failed": (text_delta() * 3, response_event("failed", RESPONSE_USAGE), Bill(5, 4, False)),
    "failed_without_usage": (text_delta() * 3, response_event("failed"), Bill(E, 3, True)),
    "no_usage": (text_delta() * 3, response_event("completed"), Bill(E, 3, True)),
    "too_little": (text_delta() * 9, response_event("completed", RESPONSE_USAGE), Bill(5, 9, True)),
    "repeats": (text_delta() * 3 + REPEATS, response_event("completed"), Bill(E, 3, True)),
    "arguments_and_reasoning": (
        typed("response.function_call_arguments.delta", delta="x" * 8)
        + typed("response.reasoning_text.delta", delta="x" * 8),
        response_event("completed"), Bill(E, 4, True),
    ),
    "a_delta_that_is_no_text": (
        typed("response.audio.delta", delta={"x": "y"}), response_event("completed"), Bill(E, 0, True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OF_RESPONSES)
def test_a_response_costs_what_its_last_event_says(name: str) -> None:
    deltas, end, bill = OF_RESPONSES[name]
    stream = response_event("created", text="") + deltas + end
    outcome = metered(stream, path=RESPONSES)
    assert (outcome.out, outcome.bill) == (stream, bill)
    assert outcome.judgement.over and outcome.judgement.ended
    assert outcome.judgement.failed == name.startswith("failed")
    cut = metered(deltas, path=RESPONSES, complete=False)
    assert cut.bill == Bill(E, metered(deltas, path=RESPONSES).bill.completion_tokens, True)
    assert not cut.judgement.ended, "no other event ends a response"


def test_an_error_ends_the_streams_of_the_other_apis() -> None:
    for path in (MESSAGES, RESPONSES):
        stream = typed("error", error={"type": "overloaded_error", "message": "no"})
        judgement = metered(stream, path=path).judgement
        assert (judgement.ended, judgement.over, judgement.broken) == (False, False, True)


def test_whole_answers_of_the_other_apis_cost_their_usage() -> None:
    content = [{"type": "thinking", "thinking": "x" * 8}, {"type": "tool_use", "name": "f", "input": {"a": 1}}]
    usage = {"input_tokens": 5, "cache_read_input_tokens": 2, "output_tokens": 4}
    assert bill_of_answer({"content": content, "usage": usage}, MESSAGES) == Bill(7, 4, False)
    assert bill_of_answer({"content": content}, MESSAGES) == Bill(E, 4, True)  # {"a":1} is 7 bytes
    output = [{"type": "message", "content": [{"type": "output_text", "text": "x" * 8}]},
              {"type": "function_call", "name": "f", "arguments": "x" * 5}]  # fmt: skip
    for status in ("completed", "failed"):
        answer = {"status": status, "output": output, "usage": RESPONSE_USAGE}
        assert bill_of_answer(answer, RESPONSES) == Bill(5, 4, False)
        assert bill_of_answer({**answer, "usage": None}, RESPONSES) == Bill(E, 4, True)


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
    event = b'data: {"\\u0063hoices":[],"usage":{"prompt_tokens":5,"completion_tokens":3}}\n\n'
    outcome = metered(event, wants_usage=False)
    assert (outcome.out, outcome.bill) == (event, Bill(5, 3, False))


@given(
    st.lists(st.sampled_from([words(1), sse(finish()), sse(closing(5, 3)), b": ping\n\n"]), max_size=6),
    LINE_ENDS,
    st.lists(st.integers(0, 10**6), max_size=8),
)
@settings(CALM)
def test_bytes_out_are_bytes_in_but_for_closing_usage(events: list[bytes], newline: bytes, places: list[int]) -> None:
    sent = [event.replace(b"\n", newline) for event in events]
    expected = b"".join(event.replace(b'"choices":[]', b'"choices":[%b]' % EMPTY_CHOICE[CHAT]) for event in sent)
    outcome = run(in_pieces(b"".join(sent), places), new_meter(wants_usage=False), complete=True)
    assert outcome.out + outcome.kept == expected
