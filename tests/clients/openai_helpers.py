"""The official client's helpers: `.stream()`, `with_raw_response`, `with_streaming_response`, `.parse()`."""

from typing import Any

import openai
from common import BASE_URL, KEY, MAX_TOKENS, MODEL, QUESTION, print_versions
from pydantic import BaseModel

MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    },
}


class City(BaseModel):
    name: str


def stream_helper(client: openai.OpenAI, **options: Any) -> None:
    """It puts the chunks together: the empty choice of a usage chunk must not confuse it.

    It also raises where the maximum cuts an answer short, so the maximum is a generous one; and, with any server,
    where the first chunk is not of choice 0 (IndexError, openai 3.54), as llama.cpp's may be with n=2: not asked.
    """
    asked = {"model": MODEL, "messages": MESSAGES, "max_tokens": 200, "temperature": 0, **options}
    with client.chat.completions.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert kinds[0] == "chunk"
    assert "content.delta" in kinds or "tool_calls" in str(kinds), kinds
    assert len(final.choices) == 1
    assert all(choice.finish_reason for choice in final.choices)
    assert all(choice.message.content or choice.message.tool_calls for choice in final.choices)
    assert final.usage and final.usage.completion_tokens > 0


def raw_response(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=MAX_TOKENS)
    assert raw.headers["x-request-id"]
    assert float(raw.headers["x-credits-charged"]) > 0
    assert float(raw.headers["x-credits-remaining"]) > 0
    answer = raw.parse()
    assert answer.choices[0].message.content
    assert answer._request_id == raw.headers["x-request-id"]


def streaming_response(client: openai.OpenAI) -> None:
    create = client.chat.completions.with_streaming_response.create
    with create(model=MODEL, messages=MESSAGES, max_tokens=MAX_TOKENS, stream=True) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert list(response.iter_lines())[-2:] == ["data: [DONE]", ""]


def parse(client: openai.OpenAI) -> None:
    completion = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, max_tokens=200, response_format=City, temperature=0
    )
    assert isinstance(completion.choices[0].message.parsed, City)


def main() -> None:
    print_versions("openai")
    with openai.OpenAI(base_url=BASE_URL, api_key=KEY) as client:
        stream_helper(client)
        stream_helper(client, stream_options={"include_usage": True})
        raw_response(client)
        streaming_response(client)
        if MODEL != "echo":  # what the builtin model does not do
            stream_helper(client, tools=[WEATHER])
            parse(client)


if __name__ == "__main__":
    main()
