"""What the start-up lines and `check` say of each upstream: whether it is there, serves an API, has the models that
the catalog gives it, and how it counts. It is asked as the relay would ask it, with one token where it must answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import aiohttp
import msgspec
from yarl import URL

from proxy import Catalog, Config, Model, Proxy, Upstream, encode_json

START_SECONDS = 2
CHECK_SECONDS = 5
ANSWER_BYTES_MAX = 8 * 1024**2
NAMES_SHOWN = 10
UNREACHABLE = (aiohttp.ClientError, OSError, TimeoutError, ValueError)  # the last: a URL that is none


class Probe(NamedTuple):
    """What became of asking an upstream for its models. One that is off has not failed; `models` None: it said none."""

    text: str
    ok: bool = True
    reached: bool = False
    models: frozenset[str] | None = None


async def print_upstreams(proxy: Proxy) -> None:
    """A line an upstream, all asked at once; the server knows then which models are there."""

    async def ask(name: str, upstream: Upstream) -> None:
        found = await probe(proxy.session, upstream, START_SECONDS)
        if not upstream.missing:
            upstream.state.reached = found.reached
        print("\n".join(describe(name, found, proxy.catalog)))

    with contextlib.suppress(OSError):  # nobody reads the lines any more
        await asyncio.gather(*(ask(name, upstream) for name, upstream in proxy.config.upstreams.items()))


async def check_upstreams(config: Config, catalog: Catalog) -> list[tuple[bool, str]]:
    """Lines for `check`, each with whether it is well; the last names the models that nobody serves at the moment."""
    upstreams = config.upstreams
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        answers = await asyncio.gather(*(check_upstream(session, upstream, catalog) for upstream in upstreams.values()))
    lines = [line for _, found in answers for line in found]
    there = {name for name, (is_there, _) in zip(upstreams, answers, strict=True) if is_there}
    off = [name for name, model in catalog.models.items() if not there & set(model.upstreams)]
    if off:
        lines.append((True, f"models that are off, because their upstreams are ({len(off)}): {', '.join(off)}"))
    return lines


async def check_upstream(
    session: aiohttp.ClientSession, upstream: Upstream, catalog: Catalog
) -> tuple[bool, list[tuple[bool, str]]]:
    """Whether it can be reached, and the lines that say so."""
    name = upstream.name
    found = await probe(session, upstream, CHECK_SECONDS)
    lines = [(found.ok, line) for line in describe(name, found, catalog)]
    if found.reached and upstream.base_url and (model := find_chat_model(name, found, catalog)):
        lines += [line async for line in learn(session, upstream, model)]
    return found.reached, lines


async def probe(session: aiohttp.ClientSession, upstream: Upstream, seconds: float) -> Probe:
    """Ask an upstream for its models."""
    if upstream.missing:
        return Probe(f"off, the environment variable {upstream.missing[0]} is not set")
    if upstream.builtin:
        return Probe("builtin", reached=True)
    try:
        async with (
            asyncio.timeout(seconds),
            session.get(f"{upstream.url}/models", headers=upstream.request_headers, allow_redirects=False) as response,
        ):
            return judge(upstream, response.status, await read(response))
    except UNREACHABLE as error:
        if isinstance(error, aiohttp.ClientConnectorError) and is_local(upstream):
            return Probe(f"off, nothing listens at {upstream.url}")
        why = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else "cannot be connected to"
        return Probe(f"{upstream.url} not reachable, {why}", ok=False)


async def read(response: aiohttp.ClientResponse) -> bytes:
    """A body, as far as it is not absurd."""
    pieces: list[bytes] = []
    async for piece in response.content.iter_chunked(64 * 1024):
        pieces.append(piece)
        if sum(map(len, pieces)) > ANSWER_BYTES_MAX:
            break
    return b"".join(pieces)


def judge(upstream: Upstream, status: int, body: bytes) -> Probe:
    """What an answer to GET /models says of an upstream."""
    where = upstream.url
    if status in (401, 403):
        return Probe(f"{where} rejects its api_key (status {status})", ok=False)
    if status == 404 or (status == 200 and body.lstrip()[:1] not in (b"{", b"[")):
        question = "" if URL(where).path.rstrip("/").endswith("/v1") else ": is `/v1` missing?"
        return Probe(f"{where} answers, but serves no API (status {status} for /models){question}", ok=False)
    if status >= 500 or 300 <= status < 400:
        return Probe(f"{where} answers with status {status}", ok=False)
    return Probe(f"{where} reachable", reached=True, models=listed_models(body))


def listed_models(body: bytes) -> frozenset[str] | None:
    """The ids of a list of models; None where it is none, is empty, or goes on on another page."""
    try:
        answer = msgspec.json.decode(body)
        if answer.get("has_more"):
            return None
        return frozenset(str(model["id"]) for model in answer["data"]) or None
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError, UnicodeDecodeError):
        return None


def is_local(upstream: Upstream) -> bool:
    """Whether it is a server of this machine's user, which may well not run at the moment."""
    host = URL(upstream.url).host or ""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback and not upstream.api_key
    return host == "localhost" and not upstream.api_key


def describe(name: str, found: Probe, catalog: Catalog) -> list[str]:
    """The lines of an upstream: how it is, and which models of the catalog it does not have."""
    lines = [f"upstream {name}: {found.text}"]
    absent = [
        model.name
        for model in catalog.models.values()
        if found.models is not None and name in model.upstreams and not has(found.models, model)
    ]
    if absent:
        more = f" and {len(absent) - NAMES_SHOWN} more" if len(absent) > NAMES_SHOWN else ""
        lines.append(f"upstream {name}: does not list these models: {', '.join(absent[:NAMES_SHOWN])}{more}")
    return lines


def has(models: frozenset[str], model: Model) -> bool:
    """Ollama lists `llama3:latest` for what it also takes as `llama3`."""
    name = model.upstream_model or model.name
    return name in models or f"{name}:latest" in models


def find_chat_model(name: str, found: Probe, catalog: Catalog) -> Model | None:
    chat = (m for m in catalog.models.values() if name in m.upstreams and m.kind not in ("embedding", "rerank"))
    return next((model for model in chat if found.models is None or has(found.models, model)), None)


async def learn(session: aiohttp.ClientSession, upstream: Upstream, model: Model) -> AsyncIterator[tuple[bool, str]]:
    """Ask for one token, streamed and in two choices: what of config.yaml should say how this server counts."""
    if upstream.serves is not None and "chat/completions" not in upstream.serves:
        return
    name = model.upstream_model or model.name
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    stream = {**body, "stream": True}
    if upstream.usage_in_stream == "ask":
        status, _ = await ask(session, upstream, {**stream, "stream_options": {"include_usage": True}})
        if status in (400, 422) and (await ask(session, upstream, stream))[0] == 200:
            yield False, f"upstream {upstream.name}: rejects stream_options; set usage_in_stream: never"
    status, answer = await ask(session, upstream, {**body, "n": 2})
    learnt = usage_of(answer) if status == 200 else None
    if learnt is not None and learnt != upstream.usage_of:
        whose = "one choice" if learnt == "choice" else "all choices"
        yield True, f"upstream {upstream.name}: reports the usage of {whose} of an answer; set usage_of: {learnt}"


def usage_of(answer: bytes) -> str | None:
    """Whose tokens the usage of an answer with two choices of one token counts; None where it does not tell."""
    try:
        decoded: Any = msgspec.json.decode(answer)
        tokens, choices = decoded["usage"]["completion_tokens"], len(decoded["choices"])
    except (msgspec.DecodeError, KeyError, TypeError, UnicodeDecodeError):
        return None
    return {1: "choice", 2: "answer"}.get(tokens) if choices == 2 and isinstance(tokens, int) else None


async def ask(session: aiohttp.ClientSession, upstream: Upstream, body: dict[str, Any]) -> tuple[int, bytes]:
    """The status and the body of an answer to a chat; 0 if there is none in time."""
    try:
        async with (
            asyncio.timeout(CHECK_SECONDS),
            session.post(
                f"{upstream.url}/chat/completions",
                data=encode_json(body),
                headers=upstream.request_headers,
                allow_redirects=False,
            ) as response,
        ):
            return response.status, await read(response)
    except UNREACHABLE:
        return 0, b""
