"""The API as this server runs it, in words: made of the core's own tables, so that it cannot go stale."""

from __future__ import annotations

import time
from typing import Any

import proxy as core
from proxy import APIS, REFUSALS, Proxy, as_credits

MEANINGS = {  # a test says that no code is missing
    "invalid_json": "The body is not a JSON object, or too deep or large to be one.",
    "upstream_refused": "The model's server refused the request; its message and status pass on.",
    "missing_api_key": "No header `Authorization: Bearer KEY`, or one that is not of this form.",
    "invalid_api_key": "There is no such key.",
    "revoked_api_key": "The key was revoked.",
    "expired_api_key": "The key's last day is over.",
    "insufficient_credits": "The balance cannot pay for the prompt and one token of the answer. Nothing was charged.",
    "credits_in_use": "It could, but requests under way hold the credits. Try again when they end.",
    "key_limit_reached": "The key's own credit limit cannot pay.",
    "account_suspended": "The account is suspended. Ask who runs this service.",
    "model_not_allowed": "The key is limited to other models.",
    "metrics_forbidden": "Metrics are for the machine of the server only.",
    "model_not_found": "There is no such model; the message names close ones.",
    "not_found": "There is nothing at this path.",
    "method_not_allowed": "The path takes another method; the header `Allow` names it.",
    "request_timeout": "The body came too slowly.",
    "model_retired": "The model is past its last day; the message names the replacement.",
    "body_too_large": "The body is larger than this server takes.",
    "validation_failed": "A member of the body is missing or wrong; `errors` names it.",
    "rate_limit_exceeded": "Too many requests this minute. `Retry-After` says how long to wait.",
    "too_many_parallel_requests": "Too many requests of the account at once. Wait for one to end.",
    "internal_error": "Our fault. The request id finds it in the log.",
    "upstream_error": "The model's server broke. What had been streamed is charged, nothing else.",
    "upstream_unavailable": "No server of the model can be reached at the moment.",
    "ledger_unavailable": "The books cannot be written at the moment, so nothing is served.",
    "shutting_down": "The server is restarting. Try again in a second.",
    "overloaded": "Too much is under way. Try again shortly.",
    "upstream_timeout": "The model's server said nothing for too long.",
}
WHAT = {
    "chat/completions": "chat, whole or streamed",
    "completions": "text from a prompt, whole or streamed",
    "embeddings": "vectors of texts",
    "responses": "the Responses API, stateless",
    "messages": "the Messages API",
    "messages/count_tokens": "how many tokens a message has",
    "rerank": "documents by how well they answer",
}


def example_model(proxy: Proxy) -> str:
    """A model that snippets can name and that works as pasted: the builtin one, else one that is there."""
    chat = [model for model in proxy.catalog.models.values() if model.kind not in ("embedding", "rerank")]
    doors = proxy.config.upstreams
    builtin = [model for model in chat if any(doors[name].builtin for name in model.upstreams if name in doors)]
    there = [model for model in chat if proxy.is_available(model)]
    return next((model.name for model in (*builtin, *there, *chat)), "MODEL")


def models(proxy: Proxy) -> list[dict[str, Any]]:
    """The catalog, a row a model."""
    now = time.time()
    rows: list[dict[str, Any]] = []
    for model in proxy.catalog.models.values():
        tier = proxy.catalog.tiers[model.tier]
        deprecated = model.deprecation(now)
        row: dict[str, Any] = {
            "model": model,
            "tier": tier.title or model.tier,
            "multiplier": as_credits(model.price),
            "thousand": as_credits(core.cost(1000, model.price)),
            "deprecated": deprecated,
            "retired": deprecated is not None and deprecated.sunset_within(0, now),
            "there": proxy.is_available(model),
        }
        row["search"] = " ".join((model.name, *model.aliases, row["tier"], model.kind or "chat")).casefold()
        rows.append(row)
    return rows


def all_of(proxy: Proxy) -> dict[str, Any]:
    """What the page of the API is made of."""
    errors = [
        (status, code, kind, MEANINGS.get(code, ""))
        for (status, kind), codes in sorted(REFUSALS.items())
        for code in codes.split()
    ]
    tiers = [(name, tier) for name, tier in proxy.config.tiers.items()]
    prices = [(tier.title or name, as_credits(tier.multiplier)) for name, tier in proxy.catalog.tiers.items()]
    return {
        "apis": [(path, WHAT.get(path, "")) for path in APIS],
        "errors": errors,
        "tiers": tiers,
        "default_tier": proxy.config.default_tier,
        "prices": prices,
        "free": proxy.config.free_credits,
        "body_mb": proxy.config.max_body_mb,
        "slice": proxy.config.hold_output_tokens,
        "model_count": len(proxy.catalog.models),
        "keep_alive": core.KEEP_ALIVE_SECONDS,
        "stall": core.CLIENT_STALL_SECONDS,
    }
