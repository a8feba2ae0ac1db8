"""Upstreams that make the count go wrong, and failures of our own: nobody pays for what did not come, and nothing that
came is free (issue 11, items 1 to 5)."""

import sqlite3
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.answers import Answers
from tests.support.attackers import (
    DONE,
    FINISH,
    SendsEventByEvent,
    SendsInOneRead,
    chunk,
    failing_code,
    usage_event,
    whole_answer,
    words,
)
from tests.support.books import assert_audit, assert_books, milli
from tests.support.client import QUESTION, QUESTION_ESTIMATE
from tests.support.errors import assert_error
from tests.support.misbehaviours import Fails, SendsEvents
from tests.support.process import Account, RunningProxy
from tests.support.sse import sse
from tests.support.upstream import FakeUpstream
from tests.support.waiting import wait_until

MakeKey = Callable[..., Account]
CREDITS = 10_000.0


def last_row(proxy: RunningProxy, account: Account) -> dict[str, Any]:
    """The account's last request, as the books have it."""
    query = "SELECT r.* FROM request r JOIN account a ON a.id = account_id WHERE name = ? ORDER BY r.id DESC"
    database = sqlite3.connect(proxy.database)
    database.row_factory = sqlite3.Row
    try:
        return dict(database.execute(query, (account.name,)).fetchone())
    finally:
        database.close()


def charged(proxy: RunningProxy, account: Account) -> float:
    """What the account has paid, once nothing is held any more; the books add up."""
    spent: float = CREDITS - proxy.wait_until_settled(account)["credits"]
    assert_audit(proxy)
    return spent


# -- 1. A usage without a valid completion


@pytest.mark.parametrize(
    "completion", [{}, {"completion_tokens": None}, *({"completion_tokens": n} for n in (-1, 0.0))]
)
def test_an_early_usage_without_a_valid_completion_makes_no_answer_free(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, completion: dict[str, Any]
) -> None:
    account = funded_key(CREDITS)
    early = chunk({"role": "assistant", "content": ""}, usage={"prompt_tokens": 7, **completion})
    upstream.behaviour = SendsEvents(early + words(90) + FINISH + DONE)
    answer = proxy.client(account.key).stream_chat().finish()
    assert (answer.words, answer.clean) == (90, True)
    assert_books(proxy, account, credits=CREDITS - 7 - 90)


@pytest.mark.parametrize(
    "completion", [{}, {"completion_tokens": None}, *({"completion_tokens": n} for n in (-1, 0.0))]
)
def test_a_closing_usage_without_a_valid_completion_bills_what_was_counted(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, completion: dict[str, Any]
) -> None:
    account = funded_key(CREDITS)
    closing = chunk(usage={"prompt_tokens": 7, **completion})
    upstream.behaviour = SendsEvents(words(90) + FINISH + closing + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert_books(proxy, account, credits=CREDITS - 7 - 90)


@pytest.mark.parametrize(("said", "billed"), [(0, 90), (1, 90), (44, 90), (45, 45), (95, 95)])
def test_a_closing_completion_below_half_of_what_was_seen_is_not_believed(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, said: int, billed: int
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = SendsEvents(words(90) + FINISH + usage_event(7, said) + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert_books(proxy, account, credits=CREDITS - 7 - billed)
    assert last_row(proxy, account)["estimated"] == (said != billed)


@pytest.mark.parametrize("said", [0, 1, 44])
def test_an_early_completion_below_half_of_what_was_seen_is_not_believed(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, said: int
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = SendsEvents(usage_event(7, said) + words(90) + FINISH + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert_books(proxy, account, credits=CREDITS - 7 - 90)
    assert last_row(proxy, account)["estimated"] == 1


def test_a_whole_answer_with_text_and_a_completion_of_zero_is_billed_by_its_text(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = Fails(200, whole_answer({"content": "x" * 400}, {"prompt_tokens": 7, "completion_tokens": 0}))
    assert proxy.client(account.key).chat().status == 200
    assert_books(proxy, account, credits=CREDITS - 7 - 100)
    assert last_row(proxy, account)["estimated"] == 1


def test_a_completion_of_zero_is_believed_where_nothing_came(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = SendsEvents(FINISH + usage_event(7, 0) + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert_books(proxy, account, credits=CREDITS - 7)
    assert last_row(proxy, account)["estimated"] == 0


# -- 2. Failures of our own


@pytest.fixture(scope="module")
def failing(module_proxy: Callable[..., RunningProxy], tmp_path_factory: pytest.TempPathFactory) -> RunningProxy:
    """A proxy whose own code fails where a test wants it to."""
    return module_proxy(environment=failing_code(tmp_path_factory.mktemp("failing")))


@pytest.fixture
def failed(failing: RunningProxy) -> Any:
    """After the test: the log has a traceback, since the failure was ours, and the process runs on."""
    before = len(failing.lines)
    yield failing
    failing.wait_for_line("RuntimeError: a failure of our own", after=before)
    assert failing.client(None).get("/health").status == 200
    with pytest.raises(pytest.fail.Exception, match="a traceback"):
        failing.assert_well()


def test_a_failure_of_ours_before_anything_was_sent_costs_nothing(failed: RunningProxy) -> None:
    account = failed.add_account(CREDITS)
    failed.upstream.reset(SendsInOneRead(words(1000) + FINISH + usage_event(5, 1000) + DONE))
    with failed.client(account.key).send(
        "POST",
        "/v1/chat/completions",
        {"model": "plain", "stream": True, "messages": [{"role": "user", "content": QUESTION}]},
        {"x-poison": "yes"},
    ) as pending:
        assert_error(pending.answered().finish(), 500, "internal_error", "server_error")
    failed.wait_until_settled(account)
    assert_books(failed, account, credits=CREDITS)


def test_a_failure_of_ours_in_mid_stream_costs_what_was_sent_before(failed: RunningProxy) -> None:
    account = failed.add_account(CREDITS)
    script = SendsInOneRead(words(50) + chunk({"content": "POISON"}) + FINISH + DONE, before=words(3))
    failed.upstream.reset(script)
    with failed.client(account.key).stream_chat() as stream:
        stream.read_until(b"\n\n", times=3)
        script.resume.set()
        answer = stream.finish()
    assert not answer.clean and b"POISON" not in answer.body
    failed.wait_until_settled(account)
    assert_books(failed, account, credits=CREDITS - QUESTION_ESTIMATE - answer.words)


# -- 3. Bytes that nobody can read

SURROGATE = b'{"choices":[{"index":0,"delta":{"content":[{"type":"text","text":"\\ud800%s"}]}}]}'
BAD_ARGUMENTS = (
    b'{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"name":"f","arguments":"\xff%s"}}]}}]}'
)
UNREADABLE = {
    "invalid UTF-8 in tool arguments": BAD_ARGUMENTS,
    "invalid UTF-8 in a usage": b'{"choices":[],"usage":{"prompt_tokens":5,"note":"\xff\xfe%s"}}',
    "invalid UTF-8 in content": b'{"choices":[{"index":0,"delta":{"content":"\xc3%s"}}]}',
    "a lone surrogate in list content": SURROGATE,
    "a lone surrogate in a name": b'{"choices":[{"index":0,"delta":{"\\udfff":"%s","content":"x"}}]}',
    "a number that is none": b'{"choices":[{"index":-1e999999,"delta":{"content":"%s"}}]}',
    "half of an event": b'{"choices":[{"index":0,"delta":{"content":"%s',
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_bytes_that_cannot_be_read_pass_untouched_and_the_stream_goes_on(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, kind: str
) -> None:
    account = funded_key(CREDITS)
    body = words(3) + sse(UNREADABLE[kind].replace(b"%s", b"")) + words(3) + FINISH + usage_event(5, 7) + DONE
    upstream.behaviour = SendsEvents(body)
    answer = proxy.client(account.key).stream_chat(stream_options={"include_usage": True}).finish()
    assert answer.body == body
    assert answer.clean
    assert_books(proxy, account, credits=CREDITS - 5 - 7)


PLACES: dict[str, Any] = {
    "content": {"content": "TEXT"},
    "list content": {"content": [{"type": "text", "text": "TEXT"}]},
    "reasoning": {"reasoning_content": "TEXT"},
    "tool arguments": {"tool_calls": [{"index": 0, "function": {"arguments": "TEXT"}}]},
}


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\\ud800", b"\\udc00\\ud800"], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_one_of_many_like_events_that_cannot_be_read_ends_no_stream(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, place: str, text: bytes
) -> None:
    """They come one by one, and all in one read."""
    account = funded_key(CREDITS)
    event = chunk(PLACES[place])
    events = [event.replace(b"TEXT", words_) for words_ in (b"good", b"good", text, b"good", text, text, b"good")]
    ends = [FINISH, usage_event(5, 7), DONE]
    for behaviour in (SendsInOneRead(b"".join(events + ends)), SendsEventByEvent([*events, *ends])):
        upstream.behaviour = behaviour
        answer = proxy.client(account.key).stream_chat().finish()
        assert answer.clean
        assert answer.body.startswith(b"".join(events)) and answer.body.endswith(DONE)
    assert_books(proxy, account, credits=CREDITS - 2 * 12)


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\\ud800", b"\xed\xa0\x80"], ids=repr)
@pytest.mark.parametrize("asked", [False, True], ids=["not asked for", "asked for"])
def test_a_usage_with_a_note_that_cannot_be_read_counts(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, text: bytes, asked: bool
) -> None:
    account = funded_key(CREDITS)
    usage = {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12, "note": "TEXT"}
    closing = chunk(usage=usage).replace(b"TEXT", text)
    upstream.behaviour = SendsEvents(words(7) + FINISH + closing + DONE)
    options: dict[str, Any] = {"stream_options": {"include_usage": True}} if asked else {}
    answer = proxy.client(account.key).stream_chat(**options).finish()
    assert answer.clean and answer.body.endswith(DONE)
    assert_books(proxy, account, credits=CREDITS - 12)


@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_cannot_be_read_is_counted_by_its_length(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, kind: str
) -> None:
    account = funded_key(CREDITS)
    event = sse(UNREADABLE[kind].replace(b"%s", b"x" * 4000))
    upstream.behaviour = SendsEvents(words(3) + event + words(3) + FINISH + DONE)
    answer = proxy.client(account.key).stream_chat().finish()
    assert answer.clean
    text = 0 if "usage" in kind or "in a name" in kind else 1000  # no text of an answer stands there
    assert QUESTION_ESTIMATE - 3 + 6 + text <= charged(proxy, account) <= QUESTION_ESTIMATE + 6 + len(event) / 4 + 1


@pytest.mark.parametrize("kind", [kind for kind in UNREADABLE if kind != "half of an event"])
def test_a_whole_answer_that_cannot_be_read_passes_untouched(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, kind: str
) -> None:
    account = funded_key(CREDITS)
    body = UNREADABLE[kind].replace(b"%s", b"x" * 4000).replace(b'"delta"', b'"message"')
    upstream.behaviour = Fails(200, body)
    answer = proxy.client(account.key).chat()
    assert (answer.status, answer.body) == (200, body)
    assert charged(proxy, account) <= QUESTION_ESTIMATE + len(body) / 4 + 1


# -- 4. Text that the estimate did not see

TEXT = "x" * 4000  # 1,000 tokens


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "hi", "name": TEXT},
        {"role": "user", "content": "hi", "thoughts": TEXT},
        {"role": "user", "content": "hi", "extra": {"deep": [{"deeper": [TEXT]}]}},
        {"role": "user", "content": [{"type": "text", "text": "hi", "note": TEXT}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "input_text", "value": TEXT}]},
        {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image_url", "caption": TEXT}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"id": TEXT, "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"a": TEXT}}}]},
    ],
    ids=lambda message: repr([name for name in message if name != "role"]),
)
def test_every_text_under_a_message_is_paid_for_whatever_its_name(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, message: dict[str, Any]
) -> None:
    account = funded_key(1)
    answer = proxy.client(account.key).chat(messages=[message])
    error = assert_error(answer, 402, "insufficient_credits", "insufficient_credits")
    assert 2 * 1000 + 1 <= error["required"] <= 2 * 2100 + 1
    assert not upstream.posts
    assert_books(proxy, account, credits=1)


@pytest.mark.parametrize(
    "message",
    [
        *({"role": "user", "content": "hi", name: TEXT} for name in ("Content", "CONTENT", "con_tent", "contenT")),
        {"role": "user", "Content": TEXT},
        *(
            {"role": "user", "content": [{"type": "text", "text": "hi", name: TEXT}]}
            for name in ("Text", "TEXT", "te_xt")
        ),
    ],
    ids=repr,
)
def test_a_look_alike_of_a_member_that_is_read_is_refused_at_every_depth(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, message: dict[str, Any]
) -> None:
    account = funded_key(CREDITS)
    answer = proxy.client(account.key).chat(messages=[{"role": "user", "content": "hi"}, message])
    assert_error(answer, 422, "validation_failed", "invalid_request_error")
    assert len(answer.body) < 2000
    assert not upstream.posts
    assert_books(proxy, account, credits=CREDITS)


def test_a_long_text_under_an_unknown_name_cannot_overdraw_the_balance(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(1000)
    upstream.behaviour = Answers(prompt_tokens=100_001)
    message = {"role": "user", "content": "hi", "name": "x" * 400_000}
    assert_error(proxy.client(account.key).chat(messages=[message]), 402, "insufficient_credits")
    assert not upstream.posts
    assert_books(proxy, account, credits=1000)


# -- 5. Text and usage in odd shapes

SHAPES: dict[str, Any] = {
    "tool arguments as an object": {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": {"a": TEXT}}}]},
    "content as an object": {"content": {"parts": [TEXT]}},
    "content as a list of texts": {"content": [TEXT]},
    "a delta that is a text": TEXT,
    "a function call as an object": {"function_call": {"name": "f", "arguments": {"a": TEXT}}},
    "reasoning as an object": {"reasoning": {"text": TEXT}},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_text_in_an_odd_shape_is_counted_when_no_usage_comes(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, shape: str
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = SendsEvents(words(3) + chunk(SHAPES[shape]) + FINISH + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert QUESTION_ESTIMATE + 1000 <= charged(proxy, account) <= QUESTION_ESTIMATE + 1100


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "delta" not in shape])
def test_text_in_an_odd_shape_is_counted_in_a_whole_answer(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, shape: str
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = Fails(200, whole_answer(SHAPES[shape]))
    assert proxy.client(account.key).chat().status == 200
    assert QUESTION_ESTIMATE + 1000 <= charged(proxy, account) <= QUESTION_ESTIMATE + 1100


GOOD = {"index": 0, "delta": {"content": TEXT}, "finish_reason": None}


@pytest.mark.parametrize(
    "choices", [[None, GOOD], [GOOD, None], [7, GOOD], [[], GOOD], ["x", GOOD]], ids=lambda c: repr(c)[:12]
)
def test_a_good_choice_beside_a_broken_one_is_counted(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, choices: list[Any]
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = SendsEvents(chunk(choices=choices) + FINISH + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert QUESTION_ESTIMATE + 1000 <= charged(proxy, account) <= QUESTION_ESTIMATE + 1100


@pytest.mark.parametrize("choices", [[None], None, {}, "none", 0, [7], [[]], [{"delta": 7}]], ids=repr)
def test_a_usage_beside_odd_choices_counts(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, choices: Any
) -> None:
    account = funded_key(CREDITS)
    usage = {"prompt_tokens": 70, "completion_tokens": 4, "total_tokens": 74}
    upstream.behaviour = SendsEvents(words(3) + FINISH + chunk(choices=choices, usage=usage) + DONE)
    assert proxy.client(account.key).stream_chat().finish().clean
    assert_books(proxy, account, credits=CREDITS - 74)


@pytest.mark.parametrize("error", ["", False, None, 0, {}, []], ids=repr)
def test_an_empty_error_is_none(proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, error: Any) -> None:
    account = funded_key(CREDITS)
    token = chunk({"content": "word"}, error=error)
    upstream.behaviour = SendsEvents(token * 3 + FINISH + usage_event(5, 3) + DONE)
    answer = proxy.client(account.key).stream_chat().finish()
    assert (answer.words, answer.clean) == (3, True)
    assert last_row(proxy, account)["outcome"] not in ("upstream_error", "broken")
    assert_books(proxy, account, credits=CREDITS - 8)


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"detail": "model is loading"},
        {"object": "error", "message": "no", "code": 400},
        {"error": {"message": "no"}},
        [],
    ],
    ids=repr,
)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_200_that_is_no_answer_costs_nothing(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, body: Any, stream: bool
) -> None:
    account = funded_key(CREDITS)
    upstream.behaviour = Fails(200, body)
    answer = proxy.client(account.key).chat(stream=stream)
    assert answer.status in (200, 502), answer.body
    wait_until(lambda: last_row(proxy, account)["state"] != "open", "the request resolves")
    assert last_row(proxy, account)["state"] == "void"
    assert milli(charged(proxy, account)) == 0
    assert_books(proxy, account, credits=CREDITS)
