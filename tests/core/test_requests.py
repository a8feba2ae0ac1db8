"""What was priced is what is forwarded: a request is read once, estimated, checked, and written anew."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.core_meter import CHAT, COMPLETIONS, EMBEDDINGS
from tests.support.core_request import (
    MAXIMA,
    PATHS,
    PROMPT,
    Refusal,
    ask,
    chat,
    errors_of,
    forward,
    forwarded,
    longest_answer,
    parse,
    said,
    within_window,
)
from tests.support.strategies import CALM, TEXTS

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "x" * 8}}
ESTIMATES = {
    "nothing": (CHAT, chat(said("")), 4),
    "text": (CHAT, chat(said("x" * 40)), 14),
    "rounded_up": (CHAT, chat(said("x")), 5),
    "rounded_once": (CHAT, chat(said("x"), said("x"), said("xx")), 13),
    "bytes": (CHAT, chat(said("日本語は")), 7),
    "null_content": (CHAT, chat(said(None)), 4),
    "text_parts": (CHAT, chat(said([{"type": "text", "text": "x" * 8}] * 2)), 8),
    "an_image": (CHAT, chat(said([{"type": "text", "text": "x" * 8}, IMAGE])), 1030),
    "tool_calls": (
        CHAT,
        chat({"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}),
        12,
    ),  # ids too
    "function_call": (CHAT, chat(said(None, function_call={"name": "f", "arguments": "x" * 8})), 7),
    "reasoning": (CHAT, chat(said("", reasoning_content="x" * 8)), 6),
    "tools": (CHAT, chat(said(""), tools=[{"a": 1}]), 7),  # [{"a":1}] is 9 bytes
    "functions": (CHAT, chat(said(""), functions=[{"a": 1}], response_format={"a": 1}), 8),
    "null_tools": (CHAT, chat(said(""), tools=None), 4),
    "prompt": (COMPLETIONS, {"prompt": "x" * 41}, 11),
    "empty_prompt": (COMPLETIONS, {"prompt": ""}, 0),
    "prompts": (COMPLETIONS, {"prompt": ["x" * 4, "x" * 5]}, 3),
    "suffix": (COMPLETIONS, {"prompt": "x" * 4, "suffix": "x" * 4}, 2),
    "a_suffix_a_prompt": (COMPLETIONS, {"prompt": ["x", "x"], "suffix": "xxx"}, 2),
    "tokens": (COMPLETIONS, {"prompt": [1, 2, 3]}, 3),
    "token_lists": (COMPLETIONS, {"prompt": [[1, 2, 3], [4]]}, 4),
    "input": (EMBEDDINGS, {"input": ["x" * 6, "x" * 6]}, 3),
}


@pytest.mark.parametrize("name", ESTIMATES)
def test_the_estimate_is_exact(name: str) -> None:
    path, body, expected = ESTIMATES[name]
    assert parse(path, json.dumps({"model": "m", **body}).encode()).prompt_estimate == expected


@pytest.mark.parametrize(
    "window, prompts, expected",
    [(None, 1, 1000), (4096, 1, 1000), (1000, 1, 1000), (999, 1, 999), (400, 2, 800), (400, 3, 1000)],
)
def test_an_estimate_is_at_most_the_context_window_of_each_prompt(
    window: int | None, prompts: int, expected: int
) -> None:
    assert within_window(window, ask(COMPLETIONS, prompt=["x" * (4000 // prompts)] * prompts)) == expected


@pytest.mark.parametrize(
    "window, most, expected", [(None, None, 8192), (4096, None, 3996), (4096, 50, 50), (100, None, 1), (None, 9, 9)]
)
def test_an_answer_without_a_maximum_is_bounded(window: int | None, most: int | None, expected: int) -> None:
    assert longest_answer(window, most, prompt_tokens=100) == expected


# --------------------------------------------------------------------------------------------------
# What was priced is what is forwarded


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
    assert "stream_options" not in forwarded(request, usage_in_stream="never")
    assert not request.wants_usage


def test_usage_is_not_asked_for_where_nothing_is_streamed() -> None:
    assert "stream_options" not in forwarded(ask())
    assert "stream_options" not in forwarded(ask(stream=False))
    assert "stream_options" not in forwarded(ask(EMBEDDINGS))


def test_a_duplicate_member_is_forwarded_once_as_it_was_priced() -> None:
    raw = b'{"model":"a","model":"m","max_tokens":1,"max_tokens":9,"n":1,"n":2,"messages":[{"role":"user"}]}'
    request = parse(CHAT, raw)
    sent = forward(request)
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


@given(GOOD_BODIES, PROMPTS, MESSAGES, st.sampled_from(PATHS), st.one_of(st.none(), st.integers(1, 20)))
@settings(CALM, max_examples=50)
def test_what_is_forwarded_would_be_priced_the_same(
    body: dict[str, Any], prompt: Any, messages: Any, path: str, lowered_to: int | None
) -> None:
    body[PROMPT[path]] = messages if path == CHAT else prompt
    first = parse(path, json.dumps(body).encode())
    again = parse(path, forward(first, lowered_to))
    for name in ("stream", "choices", "prompt_estimate"):
        assert getattr(again, name) == getattr(first, name)
    has_bound = path != EMBEDDINGS
    assert again.max_tokens == (lowered_to if lowered_to is not None and has_bound else first.max_tokens)
    sent = json.loads(forward(first, lowered_to))
    untouched = {name: value for name, value in body.items() if name in ("temperature", "user", "n", PROMPT[path])}
    assert {name: sent[name] for name in untouched} == untouched


@given(st.binary(max_size=80) | st.builds(lambda value: json.dumps(value).encode(), JSON))
@settings(CALM, max_examples=60)
def test_a_body_of_any_kind_is_read_or_refused(raw: bytes) -> None:
    for path in PATHS:
        with pytest.raises(Refusal) as refused:
            parse(path, raw)
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
    assert twin in errors_of(refused.value)


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
        assert next(iter(errors_of(refused.value))).startswith(name), value


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
