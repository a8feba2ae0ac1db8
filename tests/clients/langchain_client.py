"""langchain-openai: invoke, stream, asynchronously too, embeddings, and what it raises.

With a base_url of its own it does not ask for usage: that it is charged for its streams is the proxy's doing.
"""

import asyncio

from common import BASE_URL, EMBEDDING_MODEL, KEY, MAX_TOKENS, MODEL, QUESTION, check_refusals, print_versions
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from openai_sync import RAISES
from pydantic import SecretStr


def model_of(base_url: str, key: str, model: str, retries: bool = True) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=base_url,
        api_key=SecretStr(key),
        model=model,
        max_completion_tokens=MAX_TOKENS,
        max_retries=2 if retries else 0,
    )


def ask(base_url: str, key: str, model: str, retries: bool) -> None:
    model_of(base_url, key, model, retries).invoke(QUESTION)


async def stream_async(model: ChatOpenAI) -> None:
    assert "".join([chunk.text async for chunk in model.astream(QUESTION)])


def main() -> None:
    print_versions("langchain-openai", "langchain-core", "openai")
    model = model_of(BASE_URL, KEY, MODEL)
    answer = model.invoke(QUESTION)
    assert answer.text and answer.usage_metadata and answer.usage_metadata["output_tokens"] > 0
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks)
    usage = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert len(usage) == 1 and usage[0]["output_tokens"] > 0, usage
    asyncio.run(stream_async(model))
    if EMBEDDING_MODEL:
        # Without this setting it counts tokens with tiktoken, which fetches its table from the Internet.
        embeddings = OpenAIEmbeddings(
            base_url=BASE_URL, api_key=SecretStr(KEY), model=EMBEDDING_MODEL, check_embedding_ctx_length=False
        )
        assert len(embeddings.embed_documents(["one text", "another"])) == 2
    check_refusals(ask, RAISES)


if __name__ == "__main__":
    main()
