"""litellm as a client (`openai/MODEL` with an api_base): chat, stream, embeddings, and what it raises.

LITELLM_LOCAL_MODEL_COST_MAP=True keeps its import from asking the Internet for prices.
"""

import litellm
from common import BASE_URL, EMBEDDING_MODEL, KEY, MAX_TOKENS, MODEL, QUESTION, check_refusals, print_versions

RAISES: dict[str, type[Exception]] = {
    "wrong key": litellm.AuthenticationError,
    "no credits": litellm.APIError,
    "unknown model": litellm.NotFoundError,
    "rate limit": litellm.RateLimitError,
    "upstream down": litellm.ServiceUnavailableError,
}


def options(base_url: str = BASE_URL, key: str = KEY, model: str = MODEL) -> dict[str, object]:
    messages = [{"role": "user", "content": QUESTION}]
    return {"model": f"openai/{model}", "api_base": base_url, "api_key": key, "messages": messages}


def ask(base_url: str, key: str, model: str, retries: bool) -> None:
    tries = {} if retries else {"max_retries": 0}
    litellm.completion(**options(base_url, key, model), max_tokens=1, **tries)


def main() -> None:
    print_versions("litellm", "openai")
    litellm.suppress_debug_info = True
    answer = litellm.completion(**options(), max_tokens=MAX_TOKENS)
    assert answer.choices[0].message.content and answer.usage.completion_tokens > 0
    chunks = list(litellm.completion(**options(), max_tokens=MAX_TOKENS, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**options(), max_tokens=MAX_TOKENS, **asked))
    assert chunks[-1].usage.completion_tokens > 0
    if EMBEDDING_MODEL:
        made = litellm.embedding(
            model=f"openai/{EMBEDDING_MODEL}", api_base=BASE_URL, api_key=KEY, input=["one text", "another"]
        )
        assert len(made.data) == 2
    check_refusals(ask, RAISES)


if __name__ == "__main__":
    main()
