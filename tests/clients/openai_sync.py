"""The official client, blocking: models, chat, streams, completions, embeddings, and what it raises."""

from typing import Any

import openai
from common import (
    BASE_URL,
    CODES,
    EMBEDDING_MODEL,
    KEY,
    MAX_TOKENS,
    MODEL,
    QUESTION,
    check_refusals,
    print_versions,
)

RAISES: dict[str, type[Exception]] = {
    "wrong key": openai.AuthenticationError,
    "no credits": openai.APIStatusError,
    "unknown model": openai.NotFoundError,
    "rate limit": openai.RateLimitError,
    "upstream down": openai.InternalServerError,
}


def messages() -> list[Any]:
    return [{"role": "user", "content": QUESTION}]


def ask(base_url: str, key: str, model: str, retries: bool) -> None:
    with openai.OpenAI(base_url=base_url, api_key=key, max_retries=2 if retries else 0) as client:
        try:
            client.chat.completions.create(model=model, messages=messages(), max_tokens=1)
        except openai.APIStatusError as error:
            assert error.code == CODES[error.status_code], (error.status_code, error.code)
            assert error.request_id, "no x-request-id"
            raise


def chat(client: openai.OpenAI) -> None:
    assert MODEL in [model.id for model in client.models.list()]
    assert client.models.retrieve(MODEL).id == MODEL
    answer = client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=MAX_TOKENS)
    assert answer.choices[0].message.content
    assert answer.usage and answer.usage.completion_tokens > 0


def stream(client: openai.OpenAI) -> None:
    """The loop of every tutorial, which must not trip over a chunk without choices."""
    text = ""
    chunks = client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=MAX_TOKENS, stream=True)
    for chunk in chunks:
        if chunk.choices[0].delta.content:
            text += chunk.choices[0].delta.content
    assert text


def stream_with_usage(client: openai.OpenAI) -> None:
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=MAX_TOKENS, **options))
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens > 0
    assert chunks[-1].choices == []


def completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=MAX_TOKENS)
    assert answer.choices[0].text
    texts = client.completions.create(model=MODEL, prompt="Once upon", max_tokens=MAX_TOKENS, stream=True)
    assert "".join(chunk.choices[0].text for chunk in texts)


def embeddings(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model=EMBEDDING_MODEL, input=["one text", "another text"])
    assert len(answer.data) == 2 and all(item.embedding for item in answer.data)
    assert answer.usage.prompt_tokens > 0


def main() -> None:
    print_versions("openai")
    with openai.OpenAI(base_url=BASE_URL, api_key=KEY) as client:
        chat(client)
        stream(client)
        stream_with_usage(client)
        if MODEL != "echo":
            completions(client)
        if EMBEDDING_MODEL:
            embeddings(client)
    check_refusals(ask, RAISES)


if __name__ == "__main__":
    main()
