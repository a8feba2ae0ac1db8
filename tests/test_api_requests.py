"""What is refused on the Responses and Messages APIs, what a prompt is estimated at, and how far an answer may go."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.support.api_calls import (
    ASKED,
    BOTH,
    CHAT,
    MESSAGES,
    MESSAGES_API,
    RESPONSES,
    RESPONSES_API,
    Api,
    messages_request,
    responses_request,
)
from tests.support.api_upstreams import AnswersByPath, AnswersMessages, AnswersResponses, Speaks
from tests.support.books import assert_books
from tests.support.client import QUESTION, QUESTION_ESTIMATE, chat_request
from tests.support.errors import assert_error
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream

MakeKey = Callable[..., Account]
APIS = [pytest.param(api, id=api.path.rpartition("/")[2]) for api in BOTH]


def assert_named(api: Api, answer: Any, member: str) -> None:
    """422, and the reasons name the member."""
    errors = api.assert_refused(answer, 422, "validation_failed")["errors"]
    assert any(member in name for name in errors), (member, errors)
    assert all(why and all(isinstance(one, str) and one for one in why) for why in errors.values()), errors


# -- Refused: it would be unpriced, or cross tenants

OTHERS: dict[str, Any] = {  # on every API
    "mcp_servers": [{"type": "url", "url": "http://127.0.0.1", "name": "x"}],
    "container": {"id": "container_1"},
    "vector_store_ids": ["vs_1"],
    "file_id": "file_1",
    "n_predict": 5,
    "num_predict": 5,
    "max_new_tokens": 5,
    "speed": "fast",
}
RESPONSES_ONLY: dict[str, Any] = {
    "previous_response_id": "resp_1",
    "conversation": "conv_1",
    "prompt": {"id": "pmpt_1"},
    "background": True,
    "request_id": "req_1",
    "n": 2,
    "max_tokens": 10,
    "max_completion_tokens": 10,
}
TWINS = [  # taken by some server for a member that the proxy reads or refuses
    *("Model", "mo_del", "Stream", "ſtream", "Input", "INPUT", "maxOutputTokens", "MAX_OUTPUT_TOKENS"),
    *("max-output-tokens", "maxoutputtokens", "MAX_TOKENS", "maxTokens", "Max_Tokens", "max_to\u212aens"),
    *("maxCompletionTokens", "requestId", "N", "nPredict", "N_PREDICT", "npredict", "numPredict", "maxNewTokens"),
    *("Previous_Response_Id", "previousResponseId", "PREVIOUS_RESPONSE_ID", "previous-response-id"),
    *("Conversation", "Prompt", "Background"),
    *("Store", "STORE", "Instructions", "Tools", "Text", "mcpServers", "MCP_SERVERS", "Container", "Speed"),
    *("serviceTier", "SERVICE_TIER", "vectorStoreIds", "fileId"),
]  # fmt: skip
MESSAGES_TWINS = [
    *("Model", "Stream", "Messages", "meſſages", "System", "SYSTEM", "Tools", "MaxTokens", "maxTokens", "MAX_TOKENS"),
    *("max-tokens", "nPredict", "N_Predict", "numPredict", "mcpServers", "Mcp_Servers", "Container", "Speed"),
    *("serviceTier", "Service_Tier", "vectorStoreIds", "fileId", "file-id"),
]


@pytest.mark.parametrize("member", [*OTHERS, *RESPONSES_ONLY])
def test_responses_refuse_what_is_unpriced_or_another_tenants(untouched: Any, member: str) -> None:
    value = {**OTHERS, **RESPONSES_ONLY}[member]
    for stream in (False, True):
        request = responses_request(stream=stream, **{member: value})
        assert_named(RESPONSES_API, untouched.post(RESPONSES, request), member)


@pytest.mark.parametrize("member", OTHERS)
def test_messages_refuse_what_is_unpriced_or_another_tenants(untouched: Any, member: str) -> None:
    request = messages_request(**{member: OTHERS[member]})
    assert_named(MESSAGES_API, untouched.post(MESSAGES, request), member)


@pytest.mark.parametrize("member", OTHERS)
def test_chat_refuses_it_too(untouched: Any, member: str) -> None:
    answer = untouched.post(CHAT, chat_request(**{member: OTHERS[member]}))
    assert_error(answer, 422, "validation_failed", "invalid_request_error")


@pytest.mark.parametrize("twin", TWINS)
def test_responses_refuse_a_member_that_some_server_would_take_for_another(untouched: Any, twin: str) -> None:
    values: list[Any] = [1, True, "x"]
    for value in values:
        assert_named(RESPONSES_API, untouched.post(RESPONSES, responses_request(**{twin: value})), twin)


@pytest.mark.parametrize("twin", MESSAGES_TWINS)
def test_messages_refuse_a_member_that_some_server_would_take_for_another(untouched: Any, twin: str) -> None:
    values: list[Any] = [1, True, "x"]
    for value in values:
        assert_named(MESSAGES_API, untouched.post(MESSAGES, messages_request(**{twin: value})), twin)


TOOLS: list[dict[str, Any]] = [
    {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1"},
    {"type": "file_search", "vector_store_ids": ["vs_1"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
]


@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool["type"])
def test_tools_that_reach_others_objects_or_the_operators_network_are_refused(untouched: Any, tool: Any) -> None:
    for api in BOTH:
        assert_named(api, api.ask(untouched, tools=[{"type": "web_search"}, tool]), "tools")
    answer = untouched.post(CHAT, chat_request(tools=[tool]))
    assert_error(answer, 422, "validation_failed", "invalid_request_error")
    nested = {"type": "namespace", "name": "n", "tools": [tool]}
    assert_named(RESPONSES_API, RESPONSES_API.ask(untouched, tools=[nested]), "tools")


@pytest.mark.parametrize("tier", ["priority", "flex", "batch", "Auto", 7])
def test_a_service_tier_of_another_price_is_refused(untouched: Any, tier: Any) -> None:
    for api in BOTH:
        assert_named(api, api.ask(untouched, service_tier=tier), "service_tier")
    assert_error(untouched.post(CHAT, chat_request(service_tier=tier)), 422, "validation_failed")


REFERENCES: dict[str, Any] = {
    "an item of the store": {"type": "item_reference", "id": "msg_1"},
    "an item without a type": {"id": "msg_1"},
    "an item whose type hides": {"Type": "item_reference", "id": "msg_1"},
    "nothing": {},
}


@pytest.mark.parametrize("name", REFERENCES)
def test_an_item_that_refers_to_a_stored_one_is_refused(untouched: Any, name: str) -> None:
    request = {"model": "plain", "input": [*ASKED, REFERENCES[name]]}
    assert_named(RESPONSES_API, untouched.post(RESPONSES, request), "input")


FILES: list[tuple[Api, dict[str, Any]]] = [
    (RESPONSES_API, {"type": "input_file", "file_id": "file_1"}),
    (RESPONSES_API, {"type": "input_image", "file_id": "file_1"}),
    (RESPONSES_API, {"type": "input_image", "fileId": "file_1"}),
    (MESSAGES_API, {"type": "document", "source": {"type": "file", "file_id": "file_1"}}),
    (MESSAGES_API, {"type": "image", "source": {"type": "file", "file_id": "file_1"}}),
    (MESSAGES_API, {"type": "container_upload", "file_id": "file_1"}),
    (MESSAGES_API, {"type": "document", "source": {"type": "file", "File_Id": "file_1"}}),
]


@pytest.mark.parametrize(("api", "part"), FILES, ids=lambda value: json.dumps(value) if isinstance(value, dict) else "")
def test_a_file_of_the_upstreams_account_is_refused(untouched: Any, api: Api, part: dict[str, Any]) -> None:
    inner = {"type": "tool_result", "tool_use_id": "t", "content": [part]}
    for content in ([part], [{"type": "text", "text": "x"}, part], [inner]):
        api.assert_refused(api.ask(untouched, content=content), 422, "validation_failed")


def test_chat_refuses_a_file_of_the_upstreams_account(untouched: Any) -> None:
    content: Any = [{"type": "file", "file": {"file_id": "file_1"}}]
    assert_error(untouched.post(CHAT, chat_request(content)), 422, "validation_failed")


WRONG: list[tuple[Api, str, Any]] = [
    *[(api, "model", value) for api in BOTH for value in (None, 7, ["plain"])],
    *[(api, "stream", value) for api in BOTH for value in ("true", 1)],
    *[(api, api.bound, value) for api in BOTH for value in (0, -1, True, "9", 1.5, 2**31 + 1)],
    *[(MESSAGES_API, "messages", value) for value in ("hi", 7, {"a": 1}, ["hi"])],
    *[(RESPONSES_API, "input", value) for value in (7, {"a": 1}, ["hi"], [7])],
]


@pytest.mark.parametrize(("api", "member", "value"), WRONG)
def test_a_member_of_a_wrong_type_or_value_is_named(untouched: Any, api: Api, member: str, value: Any) -> None:
    assert_named(api, untouched.post(api.path, {**api.request(), member: value}), member)


@pytest.mark.parametrize("api", APIS)
def test_what_a_call_needs_must_be_there(untouched: Any, api: Api) -> None:
    for member in ("model", "messages" if api.path == MESSAGES else "input"):
        request = api.request()
        del request[member]
        assert_named(api, untouched.post(api.path, request), member)


# -- Not refused

SCHEMA = {"type": "object", "properties": {"file_id": {"type": "string"}, "container": {"type": "object"}}}
CALLED = {"type": "tool_use", "id": "t", "name": "read", "input": {"file_id": "x"}}
RETURNED = {"type": "tool_result", "tool_use_id": "t", "content": "file_id: x"}
INNOCENT: list[tuple[Api, dict[str, Any]]] = [
    *[(api, {"service_tier": tier}) for api in BOTH for tier in ("auto", "default", "standard_only")],
    *[(api, {"tools": [{"type": "web_search"}]}) for api in BOTH],
    *[(api, {"temperature": 0.5, "zzz": {"model": "x", "n": 5}}) for api in BOTH],
    (RESPONSES_API, {"background": False}),
    (RESPONSES_API, {"input": QUESTION}),
    (RESPONSES_API, {"text": {"format": {"type": "text"}}, "instructions": "Be brief."}),
    (RESPONSES_API, {"tools": [{"type": "function", "name": "read", "parameters": SCHEMA}]}),
    (RESPONSES_API, {"input": [*ASKED, {"type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": "x"}]}),
    (RESPONSES_API, {"input": [*ASKED, {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}]}),
    (MESSAGES_API, {"metadata": {"user_id": "u"}, "thinking": {"type": "enabled", "budget_tokens": 1024}}),
    (MESSAGES_API, {"tools": [{"name": "read", "input_schema": SCHEMA}], "tool_choice": {"type": "any"}}),
    (MESSAGES_API, {"messages": [{"role": "assistant", "content": [CALLED]}, {"role": "user", "content": [RETURNED]}]}),
]  # fmt: skip


@pytest.mark.parametrize(("api", "members"), INNOCENT, ids=lambda v: json.dumps(v)[:60] if isinstance(v, dict) else "")
def test_what_only_looks_like_it_passes_as_it_is(
    proxy: RunningProxy, upstream: FakeUpstream, payer: Account, api: Api, members: dict[str, Any]
) -> None:
    """A tool may have a parameter called `file_id`; what a model wrote into it is the model's."""
    upstream.behaviour = AnswersByPath()
    payer.credits = proxy.client(payer.key).balance
    assert api.ask(proxy.client(payer.key), **members).status == 200
    sent = upstream.posts[0].json
    assert sent == {**api.request(**members), **({"store": False} if api.path == RESPONSES else {})}
    assert_books(proxy, payer, payer.credits - 8)


# -- The estimate of a prompt. Without usage, an answer costs it and three words.

DATA = "A" * 100_000
PNG = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}}
PNG_BY_URL = {"type": "image", "source": {"type": "url", "url": "https://example.com/" + "x" * 400}}
INPUT_IMAGE = {"type": "input_image", "image_url": "data:image/png;base64," + DATA}
PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": DATA}}
SMALL_PDF = {"type": "document", "source": {"type": "base64", "media_type": "application/pdf", "data": "A" * 400}}
PLAIN_DOCUMENT = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "x" * 8000}}
PDF_BY_URL = {"type": "document", "source": {"type": "url", "url": "https://example.com/a.pdf"}}
INPUT_FILE = {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64," + DATA}
INPUT_FILE_BY_URL = {"type": "input_file", "file_url": "https://example.com/a.pdf"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
TEXT = {"type": "text", "text": "x" * 8}
INPUT_TEXT = {"type": "input_text", "text": "x" * 8}


def compact(value: Any) -> int:
    return len(json.dumps(value, separators=(",", ":")))


def said(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


ESTIMATES: dict[str, tuple[Api, dict[str, Any], int]] = {
    "a message": (MESSAGES_API, {"messages": [said("x" * 40)]}, 14),
    "rounded up, once": (MESSAGES_API, {"messages": [said("x"), said("x"), said("xx")]}, 13),
    "bytes, not characters": (MESSAGES_API, {"messages": [said("日本語は")]}, 7),
    "system": (MESSAGES_API, {"messages": [said("")], "system": "x" * 40}, 14),
    "system in blocks": (MESSAGES_API, {"messages": [said("")], "system": [TEXT, TEXT]}, 8),
    "text blocks": (MESSAGES_API, {"messages": [said([TEXT, TEXT])]}, 8),
    "tools": (MESSAGES_API, {"messages": [said("")], "tools": [TOOL]}, 4 + -(-compact([TOOL]) // 4)),
    "an image": (MESSAGES_API, {"messages": [said([TEXT, PNG])]}, 4 + 2 + 1024),
    "two images": (MESSAGES_API, {"messages": [said([PNG]), said([PNG])]}, 2 * 1028),
    "an image by URL": (MESSAGES_API, {"messages": [said([PNG_BY_URL])]}, 1028),
    "a document": (MESSAGES_API, {"messages": [said([PDF])]}, 4 + 100_000 // 16),
    "a small document": (MESSAGES_API, {"messages": [said([SMALL_PDF])]}, 1028),
    "a document of text": (MESSAGES_API, {"messages": [said([PLAIN_DOCUMENT])]}, 4 + 2000),
    "a document by URL": (MESSAGES_API, {"messages": [said([PDF_BY_URL])]}, 4 + 32_768),
    "a tool's result": (
        MESSAGES_API,
        {"messages": [said([{"type": "tool_result", "tool_use_id": "t", "content": "x" * 40}])]},
        14,
    ),
    "a tool's result in blocks": (
        MESSAGES_API,
        {"messages": [said([{"type": "tool_result", "tool_use_id": "t", "content": [TEXT, PNG]}])]},
        4 + 2 + 1024,
    ),
    "input": (RESPONSES_API, {"input": "x" * 41}, 11),
    "an input message": (RESPONSES_API, {"input": [said("x" * 40)]}, 14),
    "instructions": (RESPONSES_API, {"input": "x" * 4, "instructions": "x" * 40}, 11),
    "input text": (RESPONSES_API, {"input": [said([INPUT_TEXT, INPUT_TEXT])]}, 8),
    "an input image": (RESPONSES_API, {"input": [said([INPUT_TEXT, INPUT_IMAGE])]}, 4 + 2 + 1024),
    "an input file": (RESPONSES_API, {"input": [said([INPUT_FILE])]}, 4 + 100_000 // 16),
    "an input file by URL": (RESPONSES_API, {"input": [said([INPUT_FILE_BY_URL])]}, 4 + 32_768),
    "responses tools": (
        RESPONSES_API,
        {"input": "", "tools": [{"type": "function", **TOOL}]},
        -(-compact([{"type": "function", **TOOL}]) // 4),
    ),
    "a call's output": (
        RESPONSES_API,
        {"input": [{"type": "function_call_output", "call_id": "c", "output": "x" * 40}]},
        14,
    ),
}
HEAD_BYTES = 64  # what is nobody's bill: `data:…;base64,`, the name of a file; the one letter that names a call


def estimated(proxy: RunningProxy, upstream: FakeUpstream, account: Account, api: Api, **members: Any) -> float:
    """What a prompt alone costs, by the charge for an answer of three words without usage."""
    upstream.behaviour = (AnswersMessages if api.path == MESSAGES else AnswersResponses)(tokens=3, usage=False)
    before = proxy.client(account.key).balance
    assert api.ask(proxy.client(account.key), **members).status == 200
    return before - proxy.client(account.key).balance - 3


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_prompt_is_estimated_by_one_rule(
    proxy: RunningProxy, upstream: FakeUpstream, payer: Account, name: str
) -> None:
    api, members, expected = ESTIMATES[name]
    slack = HEAD_BYTES // 4 if "file" in name else 1 if "'s " in name else 0
    assert expected <= estimated(proxy, upstream, payer, api, **members) <= expected + slack
    assert_books(proxy, payer, proxy.client(payer.key).balance)


def test_a_models_call_of_a_tool_is_no_free_text(proxy: RunningProxy, upstream: FakeUpstream, payer: Account) -> None:
    """Its arguments count, as an object and as a string."""
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {"city": "x" * 400}}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "x" * 400}
    messages = [{"role": "assistant", "content": [use]}]
    assert 104 <= estimated(proxy, upstream, payer, MESSAGES_API, messages=messages) <= 104 + compact(use) - 400
    assert 104 <= estimated(proxy, upstream, payer, RESPONSES_API, input=[call]) <= 104 + compact(call) - 400
    thought = {"type": "thinking", "thinking": "x" * 400, "signature": "s"}
    messages = [{"role": "assistant", "content": [thought]}]
    assert 104 <= estimated(proxy, upstream, payer, MESSAGES_API, messages=messages) <= 106
    assert_books(proxy, payer, proxy.client(payer.key).balance)


def test_an_estimate_is_at_most_the_context_window(proxy: RunningProxy, upstream: FakeUpstream, payer: Account) -> None:
    """A document by URL is estimated at it."""
    for part in (PDF_BY_URL, TEXT | {"text": "x" * 100_000}):
        members: dict[str, Any] = {"model": "windowed", "messages": [said([part])]}
        assert estimated(proxy, upstream, payer, MESSAGES_API, **members) == 4096
    assert_books(proxy, payer, proxy.client(payer.key).balance)


# -- How far an answer may go


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("asked", [None, 5000])
@pytest.mark.parametrize("api", APIS)
def test_a_balance_that_pays_for_300_tokens_asks_for_300_in_the_apis_own_member(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api, asked: int | None, stream: bool
) -> None:
    account = funded_key(credits=300 + 2 * QUESTION_ESTIMATE)
    answers: type[Speaks] = AnswersMessages if api.path == MESSAGES else AnswersResponses
    upstream.behaviour = answers(tokens=10_000, word="a ", prompt_tokens=QUESTION_ESTIMATE)
    request = {**api.request(stream=stream), api.bound: asked}
    if asked is None:
        del request[api.bound]
    answer = proxy.client(account.key).post(api.path, request)
    assert answer.status == 200 and answer.clean
    sent = upstream.posts[0].json
    assert {name: sent[name] for name in sent if name.startswith("max_")} == {api.bound: 300}
    assert answer.headers["x-max-tokens-limited"] == "300"
    assert_books(proxy, account, credits=QUESTION_ESTIMATE)


@pytest.mark.parametrize("api", APIS)
def test_a_balance_that_is_enough_changes_no_maximum(
    proxy: RunningProxy, upstream: FakeUpstream, payer: Account, api: Api
) -> None:
    upstream.behaviour = AnswersByPath()
    before = proxy.client(payer.key).balance
    for maximum in ({api.bound: 32_000}, {}):
        request = {name: value for name, value in api.request().items() if name != api.bound}
        answer = proxy.client(payer.key).post(api.path, {**request, **maximum})
        sent = upstream.posts[-1].json
        assert {name: sent[name] for name in sent if name.startswith("max_")} == maximum
        assert answer.headers["x-max-tokens-limited"] is None
    assert_books(proxy, payer, before - 16)


@pytest.mark.parametrize("api", APIS)
def test_who_cannot_pay_for_one_token_is_refused_and_who_can_is_served_one(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, api: Api
) -> None:
    poor, rich = (funded_key(credits=2 * QUESTION_ESTIMATE + more) for more in (0, 1))
    upstream.behaviour = AnswersByPath(tokens=50, prompt_tokens=QUESTION_ESTIMATE)
    api.assert_refused(api.ask(proxy.client(poor.key)), 402, "insufficient_credits")
    assert not upstream.posts
    assert api.ask(proxy.client(rich.key)).status == 200
    assert upstream.posts[0].json[api.bound] == 1
    assert_books(proxy, rich, credits=QUESTION_ESTIMATE)
    assert_books(proxy, poor, credits=2 * QUESTION_ESTIMATE)
