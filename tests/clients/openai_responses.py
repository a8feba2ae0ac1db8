"""The official `openai` client's Responses API: whole, streamed, tools, counting, and what it raises."""

from typing import Any

import openai
from common import BASE_URL, KEY, MAX_TOKENS, MODEL, QUESTION, check_refusals, print_versions
from openai_sync import CODES, RAISES

TOOL = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}


def asked(**members: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": QUESTION, "max_output_tokens": MAX_TOKENS, **members}


def ask(base_url: str, key: str, model: str, retries: bool) -> None:
    with openai.OpenAI(base_url=base_url, api_key=key, max_retries=2 if retries else 0) as client:
        try:
            client.responses.create(**asked(model=model))
        except openai.APIStatusError as error:
            assert error.code == CODES[error.status_code], (error.status_code, error.code)
            assert error.request_id, "no x-request-id"
            raise


def whole(client: openai.OpenAI) -> None:
    answer = client.responses.create(**asked(instructions="Be brief."))
    assert answer.output_text and answer.usage.output_tokens > 0


def stream(client: openai.OpenAI) -> None:
    events = list(client.responses.create(**asked(), stream=True))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].type == "response.completed"
    assert events[-1].response.usage.output_tokens > 0


def tools(client: openai.OpenAI) -> None:
    """That a request with a tool is answered; whether so small a model calls it is its own affair."""
    answer = client.responses.create(**asked(input="Weather in Paris?", max_output_tokens=64, tools=[TOOL]))
    assert answer.output[0].type in ("function_call", "message")


def stores_nothing(client: openai.OpenAI) -> None:
    for refused in ({"previous_response_id": "resp_1"}, {"background": True}, {"conversation": "conv_1"}):
        try:
            client.responses.create(**asked(**refused))
        except openai.UnprocessableEntityError as error:
            assert next(iter(refused)) in str(error), error
        else:
            raise AssertionError(f"not refused: {refused}")
    try:
        client.responses.retrieve("resp_1")
    except openai.NotFoundError as error:
        assert "stored" in str(error), error
    else:
        raise AssertionError("an answer that was not stored was found")


def main() -> None:
    print_versions("openai")
    with openai.OpenAI(base_url=BASE_URL, api_key=KEY) as client:
        whole(client)
        stream(client)
        tools(client)
        assert client.responses.input_tokens.count(model=MODEL, input=QUESTION).input_tokens > 0
        stores_nothing(client)
    check_refusals(ask, RAISES)


if __name__ == "__main__":
    main()
