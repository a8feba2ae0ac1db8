"""The builtin upstream: answers a chat with its last user message, a word a token, over real HTTP and SSE.

It makes the first request work on a machine without a model. The relay does not know that it is special.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import time
from typing import Any

import msgspec
from aiohttp import web

from proxy import MAXIMA, TOKENS_MAX, encode_json


async def start(stack: contextlib.AsyncExitStack) -> str:
    """Serve on a free port of this machine until `stack` is closed; its base URL."""
    runner = web.ServerRunner(web.Server(answer_echo, handler_cancellation=True, access_log=None))
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    return f"http://127.0.0.1:{runner.addresses[0][1]}/v1"


async def answer_echo(request: web.BaseRequest) -> web.StreamResponse:
    """One request, streamed or not."""
    if request.path != "/v1/chat/completions" or request.method != "POST":
        error = {
            "message": "The builtin echo answers chat completions only.",
            "type": "invalid_request_error",
        }
        return web.Response(status=404, body=encode_json({"error": error}), content_type="application/json")
    body = msgspec.json.decode(await request.content.read())
    texts = [(message.get("role"), message_text(message)) for message in body["messages"]]
    words = re.findall(r"\S+\s*", next((text for role, text in reversed(texts) if role == "user"), ""))
    most = min(body.get(name) or TOKENS_MAX for name in MAXIMA)
    choices = range(body.get("n") or 1)
    finish = "length" if len(words) > most else "stop"
    words = words[:most]
    prompt = sum(len(text.split()) for _, text in texts)
    usage = {"prompt_tokens": prompt, "completion_tokens": len(words) * len(choices)}
    usage["total_tokens"] = sum(usage.values())
    base = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": body["model"]}
    if not body.get("stream"):
        message = {"role": "assistant", "content": "".join(words)}
        whole = [{"index": n, "message": message, "finish_reason": finish} for n in choices]
        answer = {**base, "object": "chat.completion", "choices": whole, "usage": usage}
        return web.Response(body=encode_json(answer), content_type="application/json")
    deltas = [{"role": "assistant", "content": ""}, *({"content": word} for word in words)]
    base["object"] = "chat.completion.chunk"
    chunks = [
        {**base, "choices": [{"index": n, "delta": delta, "finish_reason": None}]} for delta in deltas for n in choices
    ]
    chunks += [{**base, "choices": [{"index": n, "delta": {}, "finish_reason": finish}]} for n in choices]
    if (body.get("stream_options") or {}).get("include_usage"):
        chunks.append({**base, "choices": [], "usage": usage})
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(b"data: " + encode_json(chunk) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


def message_text(message: dict[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else " ".join(part.get("text") or "" for part in content)
