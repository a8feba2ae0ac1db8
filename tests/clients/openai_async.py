"""The official client under asyncio: chats at once, a stream that is left early, what it raises."""

import asyncio
from typing import Any

import openai
from common import BASE_URL, EMBEDDING_MODEL, KEY, MAX_TOKENS, MODEL, QUESTION, check_refusals, print_versions
from openai_sync import RAISES


def messages() -> list[Any]:
    return [{"role": "user", "content": QUESTION}]


async def refused(base_url: str, key: str, model: str, retries: bool) -> None:
    async with openai.AsyncOpenAI(base_url=base_url, api_key=key, max_retries=2 if retries else 0) as client:
        await client.chat.completions.create(model=model, messages=messages(), max_tokens=1)


async def chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=MAX_TOKENS)
    assert answer.choices[0].message.content


async def stream(client: openai.AsyncOpenAI) -> None:
    text = ""
    chunks = await client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=MAX_TOKENS, stream=True)
    async for chunk in chunks:
        text += chunk.choices[0].delta.content or ""
    assert text


async def stream_left_early(client: openai.AsyncOpenAI) -> None:
    chunks = await client.chat.completions.create(model=MODEL, messages=messages(), max_tokens=MAX_TOKENS, stream=True)
    async with chunks:
        async for chunk in chunks:
            if chunk.choices[0].delta.content:
                break


async def main() -> None:
    async with openai.AsyncOpenAI(base_url=BASE_URL, api_key=KEY) as client:
        assert MODEL in [model.id async for model in client.models.list()]
        await asyncio.gather(chat(client), stream(client), stream(client), stream_left_early(client))
        if EMBEDDING_MODEL:
            assert (await client.embeddings.create(model=EMBEDDING_MODEL, input="a text")).data[0].embedding


if __name__ == "__main__":
    print_versions("openai")
    asyncio.run(main())
    check_refusals(lambda *arguments: asyncio.run(refused(*arguments)), RAISES)
