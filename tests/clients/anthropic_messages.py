"""The official `anthropic` client, 2.x and 0.x: messages, streams, tools, counting, and what it raises.

2.x sends its key as `Authorization: Bearer`, 0.x as `X-Api-Key`. ANTHROPIC_MAJOR, if set, is the version that must run.
"""

import os
from typing import Any

import anthropic
from common import BASE_URL, CODES, KEY, MAX_TOKENS, MODEL, QUESTION, check_refusals, print_versions

RAISES: dict[str, type[Exception]] = {
    "wrong key": anthropic.AuthenticationError,
    "no credits": anthropic.APIStatusError,
    "unknown model": anthropic.NotFoundError,
    "rate limit": anthropic.RateLimitError,
    "upstream down": anthropic.InternalServerError,
}
TOOL = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def asked() -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": MAX_TOKENS, "messages": [{"role": "user", "content": QUESTION}]}


def client_of(base_url: str, key: str, retries: int = 2) -> Any:
    """It puts /v1 behind its base_url by itself."""
    return anthropic.Anthropic(base_url=base_url.removesuffix("/v1"), api_key=key, max_retries=retries)


def ask(base_url: str, key: str, model: str, retries: bool) -> None:
    with client_of(base_url, key, 2 if retries else 0) as client:
        try:
            client.messages.create(**{**asked(), "model": model})
        except anthropic.APIStatusError as error:
            body: Any = error.body
            assert body["error"]["details"]["error_code"] == CODES[error.status_code], body
            assert error.request_id == body["request_id"], "no request-id"
            raise


def whole(client: Any) -> None:
    answer = client.messages.create(**asked())
    assert answer.content[0].text
    assert answer.usage.output_tokens > 0


def stream(client: Any) -> None:
    with client.messages.stream(**asked(), system="Be brief.") as events:
        assert "".join(events.text_stream)
        message = events.get_final_message()
    assert message.stop_reason in ("end_turn", "max_tokens") and message.usage.output_tokens > 0
    kinds = [event.type for event in client.messages.create(**asked(), stream=True)]
    assert kinds[0] == "message_start" and kinds[-1] == "message_stop"


def tools(client: Any) -> None:
    """That a request with a tool is answered; whether so small a model calls it is its own affair."""
    members = {**asked(), "max_tokens": 64, "tools": [TOOL], "tool_choice": {"type": "any"}}
    with client.messages.stream(**members) as events:
        message = events.get_final_message()
    assert message.content[0].type in ("tool_use", "text"), message


def count(client: Any) -> None:
    members = {name: value for name, value in asked().items() if name != "max_tokens"}
    assert client.messages.count_tokens(**members).input_tokens > 0


def main() -> None:
    print_versions("anthropic")
    assert anthropic.__version__.startswith(os.environ.get("ANTHROPIC_MAJOR", "")), anthropic.__version__
    with client_of(BASE_URL, KEY) as client:
        whole(client)
        stream(client)
        tools(client)
        count(client)
    check_refusals(ask, RAISES)


if __name__ == "__main__":
    main()
