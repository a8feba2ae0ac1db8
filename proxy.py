# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "aiohttp>=3.14.2,<4", "aiosqlite>=0.20", "jinja2>=3.1", "msgspec>=0.19", "prometheus-client>=0.20", "PyYAML>=6",
#     "uvloop>=0.19; sys_platform != 'win32'",
# ]
# ///
"""A minimal reverse proxy for LLM APIs that people can trust with money.

A request's life, in the order of this file (`Proxy.complete` tells the same story):

 1. authenticate   a header names a key; only its SHA-256 is stored and looked up
 2. parse          the JSON body is decoded once, checked, and later re-encoded: what is priced is what is forwarded
 3. find model     exact id or alias, in the catalog of models.yaml
 4. hold           one transaction checks key, account, limits and balance, reserves credits, inserts the request's row
 5. open upstream  the model's upstreams in order, until one begins an answer
 6. relay, meter   whole events, byte for byte, counted on the way; a stream's hold grows as the answer does
 7. settle         what was used is debited, the rest released, committed before the client sees the end

Every way out of steps 5 to 7 (done, client gone, upstream broken, refused, shutdown) ends in `Hold.settle`, once.
The writer of the ledger keeps a settle until it is in the database, whatever became of its client.

What it can do without stands in extras/, each part loaded when it is asked for: commands, the builtin echo, the
console, PostgreSQL. It does not translate between APIs: what it does not read, it passes on untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import ctypes
import datetime
import difflib
import fcntl
import gc
import hashlib
import importlib
import io
import itertools
import json
import logging
import os
import re
import resource
import secrets
import select
import signal
import sqlite3
import sys
import time
import traceback
import typing
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import copy
from decimal import Decimal
from email.utils import formatdate
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

try:
    import aiohttp
    import aiosqlite
    import msgspec
    import uvloop
    import yaml
    from aiohttp import web
    from aiohttp.abc import AbstractStreamWriter
    from yarl import URL
except ImportError as missing:
    sys.exit(f"proxy.py needs the package {missing.name!r}: run `pip install .` in the folder of proxy.py.")

VERSION = "2.0.0"
T = TypeVar("T")

# ---- Limits ---------------------------------------------------------------------------------------------------------

SMALL_BYTES = 64 * 1024  # larger bodies are read only for an account that may send them; they and larger answers count
BODY_SECONDS = 30  # a request body gets this long, and a second more for each
BODY_BYTES_PER_SECOND = 16 * 1024  # of its bytes that came: a drip-fed body is cut, a slow line is not
BODY_ELEMENTS_MAX = 500_000  # members and elements of a body: millions would hold everybody up for seconds
AT_ONCE_BYTES = 256 * 1024  # a larger body is parsed in a thread, and sent in pieces, as the upstream takes it
MEMORY_BYTES_MAX = 256 * 1024**2  # that large bodies and whole answers hold together; an account: a quarter
EVENT_BYTES_MAX = 16 * 1024**2  # images travel in one SSE event; past this the stream is broken
ANSWER_BYTES_MAX = 64 * 1024**2  # an answer that is not streamed is kept whole until it is settled
ERROR_BYTES_MAX = 64 * 1024  # of an upstream's error body
READ_BUFFER_BYTES = 32 * 1024  # half of aiohttp's default: a burst stays in the processor's cache
MODEL_NAME_MAX = 256
QUOTED_MAX = 100  # characters of a client's text in a message
ERRORS_MAX = 10  # in one answer
TOKENS_MAX = 2**31
CHOICES_MAX = 128
UNLIMITED_TOKENS = 2**40  # more than a request can ask for
OUTPUT_TOKENS_DEFAULT = 8192  # the bound of an answer when neither request nor model names one
TEMPLATE_TOKENS = 64  # what a chat template may add to a prompt
MEDIA_TOKENS = 1024  # an image, a piece of audio
DOCUMENT_TOKENS = 32_768  # a document by URL, for a model without a context window
CREDITS_MAX = 10**12  # in one grant
SUNSET_NOTICE_DAYS = 30
KEEP_ALIVE_SECONDS = 15  # without a byte to the client, then a comment: nginx and many load balancers cut at 60
CLIENT_STALL_SECONDS = 60  # without the client taking a byte
DRAIN_STALL_SECONDS = 2  # the same, once the server is stopping
CLIENT_GONE_USAGE_SECONDS = 1  # for the usage that follows a finish reason
FRAME_SECONDS = 5  # for the last frame of a broken stream to leave
POOLED_SECONDS = 4  # llama.cpp and uvicorn close idle connections after 5
COOLDOWN_SECONDS = 5  # an upstream that could not be connected to is skipped while another is there
RETRY_AFTER_SECONDS_MAX = 60  # openai-node sleeps whatever it is told
WATCH_SECONDS = 0.25  # how often waiting exchanges, connections and the two files are looked at
BUSY_SECONDS = 1.0  # another process may hold the database's lock this long; then 503
SETTLE_PATIENCE_SECONDS = 3  # a client waits this long for a settle that cannot be written
RETRY_SECONDS = 0.25  # between the tries of a settle that cannot be written
CLIENT_IDLE_SECONDS = 75  # a kept-alive connection without a request, or one that never finishes its headers
NO_USAGE_SECONDS = 3600  # how often the log names an upstream that sends no usage
LOG_LINE_BYTES_MAX = 4000  # a pipe takes up to 4,096 bytes whole or not at all
OPEN_FILES = 65536  # two descriptors a stream
SCHEMA_VERSION = 2

# ---- Refusals -------------------------------------------------------------------------------------------------------

REFUSALS = {  # status and type: the codes
    (400, "invalid_request_error"): "invalid_json upstream_refused",  # the latter's status is the upstream's own
    (401, "authentication_error"): "missing_api_key invalid_api_key revoked_api_key expired_api_key",
    (402, "insufficient_credits"): "insufficient_credits credits_in_use key_limit_reached",
    (403, "permission_error"): "account_suspended model_not_allowed metrics_forbidden",
    (404, "invalid_request_error"): "model_not_found not_found",
    (405, "invalid_request_error"): "method_not_allowed",
    (408, "invalid_request_error"): "request_timeout",
    (410, "invalid_request_error"): "model_retired",
    (413, "invalid_request_error"): "body_too_large",
    (422, "invalid_request_error"): "validation_failed",
    (429, "rate_limit_error"): "rate_limit_exceeded too_many_parallel_requests",
    (500, "server_error"): "internal_error",
    (502, "upstream_error"): "upstream_error",
    (503, "upstream_error"): "upstream_unavailable",
    (503, "server_error"): "ledger_unavailable shutting_down overloaded",
    (504, "upstream_error"): "upstream_timeout",
}
CODES = {code: kind for kind, codes in REFUSALS.items() for code in codes.split()}


class Refusal(Exception):
    """An answer that is no success: a code that programs match, and a sentence that says what to do. `detail` goes
    into the error object, `top` beside it. A ledger verb returns one, so that its transaction stands."""

    def __init__(self, code: str, message: str, *, status: int | None = None, param: str | None = None,
                 headers: Mapping[str, str] = {}, top: Mapping[str, Any] = {}, moves_on: bool = False,
                 body: bytes | None = None, **detail: Any) -> None:  # fmt: skip
        super().__init__(message)
        self.code, self.message, self.param = code, message, param
        self.status, self.type = status or CODES[code][0], CODES[code][1]
        self.headers, self.top, self.detail = headers, top, detail
        self.body = body  # an upstream's own, where it has the right shape
        self.moves_on = moves_on  # the model's next upstream is worth asking
        self.caller: Caller | None = None


def openai_error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    error = {"message": refusal.message, "type": refusal.type, "param": refusal.param, "code": refusal.code}
    return {"error": {**error, "status": refusal.status, **refusal.detail}, **refusal.top}


MESSAGES_TYPES = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def messages_error(refusal: Refusal, request_id: str) -> dict[str, Any]:
    """The shape of Anthropic's API; our code, and what stands beside it elsewhere, in `details`."""
    kind = MESSAGES_TYPES.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
    details = {"error_code": refusal.code, **refusal.detail, **refusal.top}
    error = {"type": kind, "message": refusal.message, "details": details}
    return {"type": "error", "error": error, "request_id": request_id}


def retry_after(seconds: int) -> dict[str, str]:
    return {"Retry-After": str(min(max(seconds, 1), RETRY_AFTER_SECONDS_MAX))}


def quoted(text: str) -> str:
    """A client's text in a message of ours, cut where it is long."""
    return f'"{text}"' if len(text) <= QUOTED_MAX else f'"{text[:QUOTED_MAX]}…"'


encode_json = msgspec.json.Encoder(decimal_format="number").encode

# ---- Configuration --------------------------------------------------------------------------------------------------


class ConfigError(Exception):
    """A sentence with file, line, key, what was expected and the nearest valid name."""


class CommandError(Exception):
    """What keeps a command, or the server, from running: a sentence on stderr, and exit 1."""


WORDS = {  # of msgspec's messages
    "int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "date": "a date",
    "datetime": "a time", "array": "a list", "object": "a mapping", "null": "nothing",
}  # fmt: skip


class YamlFile:
    """A YAML file as plain values, with the line of every key. PyYAML alone keeps the last of two equal keys and reads
    `on:` as True and `3:27:` as 207: here both are errors. Numbers with a point become Decimal: some are prices."""

    def __init__(self, path: Path, rewrite: Callable[[str], str] = str) -> None:
        self.path, self.rewrite, self.scalars = path, rewrite, yaml.SafeLoader("")
        self.lines: dict[tuple[str, ...], int] = {}
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            self.values = self.plain(node, ()) if node else {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except (yaml.YAMLError, RecursionError, ValueError) as error:
            mark, why = getattr(error, "problem_mark", None), getattr(error, "problem", error)
            raise ConfigError(f"{path}{f':{mark.line + 1}' if mark else ''}: not valid YAML: {why}") from None

    def plain(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, str(n))) for n, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            values: dict[str, Any] = {}
            for key_node, value_node in node.value:
                key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
                here = (*path, key)
                first, self.lines[here] = self.lines.get(here), key_node.start_mark.line + 1
                if first:
                    raise self.error(here, f"duplicate key; it stands on line {first} already")
                if key_node.tag != "tag:yaml.org,2002:str":
                    raise self.error(here, f'YAML does not read this key as text; quote it: "{key}":')
                values[key] = self.plain(value_node, here)
            return values
        kind, text = node.tag.removeprefix("tag:yaml.org,2002:"), node.value
        try:
            value = Decimal(text.replace("_", "")) if kind == "float" else self.scalars.construct_object(node)
        except Exception:  # PyYAML meets what a wrong tag makes of it with whatever comes; .inf is no Decimal
            raise self.error(path, f'"{text}" cannot be read as {WORDS.get(kind, kind)}') from None
        if isinstance(value, str) and "\0" in value:
            raise self.error(path, "must not hold the character NUL")
        return self.rewrite(value) if isinstance(value, str) else value

    def error(self, path: tuple[str, ...], message: str) -> ConfigError:
        lines = (self.lines[path[:n]] for n in range(len(path), -1, -1) if path[:n] in self.lines)
        return ConfigError(f"{self.path}:{next(lines, 1)}: {'.'.join(path)}{': ' if path else ''}{message}")

    def check_known(self, path: tuple[str, ...], what: str, name: str, known: Collection[str]) -> None:
        if name in known:
            return
        hint = f"expected one of: {', '.join(known) or 'none'}"
        if nearest := difflib.get_close_matches(name, known, 1, 0.5):
            hint = f'did you mean "{nearest[0]}"?' + (f" {hint}" if len(known) < 20 else "")
        raise self.error(path, f'unknown {what} "{name}"; {hint}')

    def read(self, path: tuple[str, ...], kind: type[T], raw: Any, **given: Any) -> T:
        """`raw`, which stands at `path`, as the struct `kind`, with the structs in it; `given` are fields that the
        file does not hold, where it has such. Unknown keys are named before wrong values."""
        if not isinstance(raw, dict | None):
            raise self.error(path, "expected a mapping of keys to values")
        fields = msgspec.structs.fields(kind)  # type: ignore[arg-type]
        types = {field.encode_name: field.type for field in fields if field.name not in given}
        for key in raw or ():
            self.check_known((*path, key), "key", key, types)
        values = {key: self.read_value((*path, key), types[key], value) for key, value in (raw or {}).items()}
        try:
            return msgspec.convert({**values, **given}, kind, dec_hook=thousandths_from)
        except msgspec.ValidationError as error:
            message, _, where = str(error).replace(" | null", "").partition(" - at `$")
        path += tuple(a or b for a, b in re.findall(r"\.(\w+)|\[(\d+)\]", where))
        if named := re.match(r"(\w+): (.+)", message, re.DOTALL):  # a struct's own check
            path, message = (*path, named[1]), named[2]
        message = re.sub(r"^Object missing required field `(\w+)`", r'the key "\1" is missing', message)
        message = re.sub(r"`([^`]*)`", lambda m: " or ".join(WORDS.get(k, k) for k in m[1].split(" | ")), message)
        raise self.error(path, message[0].lower() + message[1:])

    def read_value(self, path: tuple[str, ...], kind: Any, value: Any) -> Any:
        """With the structs in it: one, or a mapping of them, which may know the name that they stand under."""
        if typing.get_origin(kind) is Literal:
            value = "off" if value is False else value  # as YAML reads a plain `off`
            self.check_known(path, "value", str(value), typing.get_args(kind))
        struct = next((one for one in (kind, *typing.get_args(kind)) if hasattr(one, "__struct_fields__")), None)
        if struct is None:
            return value
        if typing.get_origin(kind) is not dict:
            return value if value is None else self.read(path, struct, value)
        if not isinstance(value, dict) or not value:
            raise self.error(path, "expected a mapping with at least one entry")
        return {name: self.read((*path, name), struct, inner, name=name) for name, inner in value.items()}


class Thousandths(int):
    """Credits as an integer of the smallest unit. No float touches money."""

    most = CREDITS_MAX


class Multiplier(Thousandths):
    most = 10_000  # keeps the largest charge (2^31 tokens, 128 choices) within 64 bits


def thousandths_from(kind: type[Thousandths], value: Any) -> Thousandths:
    if isinstance(value, kind):
        return value
    if type(value) not in (int, Decimal):
        raise ValueError("expected a number")
    thousandths = kind(to_thousandths(Decimal(value)))
    if not 0 <= thousandths <= kind.most * 1000:
        raise ValueError(f"expected a number from 0 to {kind.most}, got {value}")
    return thousandths


def to_thousandths(value: Decimal) -> int:
    """ValueError if it does not fit exactly."""
    if not value.is_finite() or abs(value) > CREDITS_MAX or value != value.quantize(Decimal("0.001")):
        raise ValueError(f"expected a number with at most three decimals, up to {CREDITS_MAX}")
    return int(value * 1000)


def as_credits(thousandths: int) -> Decimal:
    """Thousandths of a credit as people and the wire see them: 842500 is 842.5."""
    return Decimal(thousandths) / 1000 if thousandths % 1000 else Decimal(thousandths // 1000)


Count = Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Tier(msgspec.Struct, frozen=True):
    """The limits of an account; None is unlimited."""

    requests_per_minute: Count | None = None
    parallel: Count | None = None
    keys: Count | None = None


class FreeCredits(msgspec.Struct, frozen=True):
    amount: Thousandths = Thousandths(0)
    days: Annotated[int, msgspec.Meta(ge=1, le=36_500)] = 30


class UpstreamState(msgspec.Struct):
    """What the server has seen of an upstream. One that a reload changes is another, of which nothing is known."""

    reached: bool | None = None  # by the last probe or request
    cooling_until: float = 0.0
    no_usage_said: float = -NO_USAGE_SECONDS


class Upstream(msgspec.Struct, frozen=True, dict=True):
    """One upstream, and how it is asked."""

    name: str
    base_url: str | None = None
    builtin: Literal["echo"] | None = None
    api_key: str | None = None
    auth: Literal["bearer", "x-api-key"] = "bearer"
    connect_seconds: Seconds = 5
    first_byte_seconds: Seconds = 600
    """To the first byte of the body: servers send headers at once and think afterwards."""
    idle_seconds: Seconds = 60
    headers: dict[str, str] = {}
    usage_in_stream: Literal["ask", "never"] = "ask"
    usage_of: Literal["answer", "choice"] = "answer"
    """Whether its usage is of all the choices of an answer, or of one (llama.cpp)."""
    serves: list[str] | None = None

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.builtin is None):
            raise ValueError("expected either base_url or builtin: echo")
        if self.base_url is not None and not self.missing and not is_base_url(self.base_url):
            expected = "expected a URL such as http://127.0.0.1:11434/v1 (a key goes into api_key)"
            raise ValueError(f'base_url: {expected}, got "{self.base_url}"')
        for header in self.headers:
            if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", header) or header.lower() in HEADERS_NOT_FOR_CONFIG:
                raise ValueError(f'headers: "{header}" is not the name of a header that can be set')
        if not all(text.isprintable() for text in (self.api_key or "", *self.headers.values())):
            raise ValueError("headers and api_key must not hold control characters")
        for path in self.serves or ():
            if path not in APIS:
                raise ValueError(f'serves: unknown API "{path}"; expected some of: {", ".join(APIS)}')

    @cached_property
    def state(self) -> UpstreamState:
        return UpstreamState()

    @cached_property
    def missing(self) -> list[str]:
        """Environment variables that are not set, so that they were not replaced: the upstream is off."""
        return VARIABLE.findall(" ".join((self.base_url or "", self.api_key or "", *self.headers.values())))

    @cached_property
    def url(self) -> str:
        return (self.base_url or "").rstrip("/")

    @cached_property
    def request_headers(self) -> dict[str, str]:
        """What it is sent of headers, and no others of the client's."""
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if self.api_key:
            bearer = self.auth == "bearer"
            headers["Authorization" if bearer else "x-api-key"] = ("Bearer " if bearer else "") + self.api_key
        return headers | self.headers

    @cached_property
    def timeout(self) -> aiohttp.ClientTimeout:
        return aiohttp.ClientTimeout(total=None, sock_connect=self.connect_seconds)

    def failure(self, code: str, what: str, **more: Any) -> Refusal:
        """A refusal that lets the model's next upstream try."""
        return Refusal(code, f'The upstream "{self.name}" {what}', moves_on=True, **more)


HEADERS_NOT_FOR_CONFIG = ("host", "content-length", "transfer-encoding", "connection")
VARIABLE = re.compile(r"\$\{(\w+)\}")


def is_base_url(text: str) -> bool:
    try:
        url = URL(text)
        return url.scheme in ("http", "https") and bool(url.host and url.port) and not (url.user or url.query_string)
    except ValueError:
        return False


class Config(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """config.yaml, complete and checked."""

    file: YamlFile
    tiers: dict[str, Tier]
    upstreams: dict[str, Upstream]
    listen: str = "127.0.0.1:8000"
    database: str = "proxy.db"
    models: str = "models.yaml"
    free_credits: FreeCredits = FreeCredits()
    default_tier: str = "free"
    hold_output_tokens: Count = 1024
    max_body_mb: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    drain_seconds: Annotated[float, msgspec.Meta(ge=0)] = 30
    log: Literal["text", "json"] = "text"
    metrics: Literal["loopback", "any", "off"] = "loopback"
    console: Any = None

    def __post_init__(self) -> None:
        with contextlib.suppress(ValueError):  # a UnicodeError, of what is no name of a host, is one
            self.address[0].encode("idna")
            if re.fullmatch(r"(\[[0-9A-Za-z:.%]+\]|[^\[\]\s]+):\d{1,5}", self.listen) and self.address[1] <= 65535:
                return
        raise ValueError(f'listen: expected HOST:PORT such as 127.0.0.1:8000, got "{self.listen}"')

    @property
    def path(self) -> Path:
        return self.file.path

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.listen.rpartition(":")
        return host.strip("[]"), int(port)

    @cached_property
    def is_postgres(self) -> bool:
        return self.database.startswith(("postgresql://", "postgres://"))

    @cached_property
    def database_path(self) -> Path:
        """The file itself, whatever links lead to it."""
        return (self.path.parent / self.database).resolve()

    @property
    def models_path(self) -> Path:
        return self.path.parent / self.models

    def limits(self, tier: str) -> Tier:
        """An account keeps working when its tier was taken out of the file: on the default tier's limits."""
        return self.tiers.get(tier) or self.tiers[self.default_tier]


def load_config(path: Path) -> Config:
    """ConfigError says what is wrong, and where."""
    file = YamlFile(path, substitute)
    config = file.read((), Config, file.values, file=file)
    for key, value in file.values.items():
        if key != "upstreams" and (unset := VARIABLE.search(str(value))):
            raise file.error((key,), f"the environment variable {unset[1]} is not set")
    file.check_known(("default_tier",), "tier", config.default_tier, config.tiers)
    return config


def substitute(text: str) -> str:
    """With ${NAME} and ${NAME:-default} replaced; unset and empty are the same, and stay."""
    known, named = os.environ, r"\$\{(\w+)(?::-([^}]*))?\}"
    return re.sub(named, lambda m: known.get(m[1]) or (m[0] if m[2] is None else m[2]), text)


# ---- Catalog --------------------------------------------------------------------------------------------------------


class PriceTier(msgspec.Struct, frozen=True):
    multiplier: Multiplier
    title: str = ""


class Deprecation(msgspec.Struct, frozen=True):
    """Both days begin at 00:00 UTC."""

    announced: datetime.date
    sunset: datetime.date
    replacement: str | None = None

    def __post_init__(self) -> None:
        if (self.sunset - self.announced).days < SUNSET_NOTICE_DAYS:
            raise ValueError(f"sunset: expected a date {SUNSET_NOTICE_DAYS} days or more after announced")

    def sunset_within(self, seconds: float, now: float) -> bool:
        return unix_day(self.sunset) - now <= seconds


class Model(msgspec.Struct, frozen=True):
    """A model as the catalog offers it. `multiplier` is thousandths of a credit a token, the tier's where none is."""

    name: str
    tier: str
    upstream: Annotated[str, msgspec.Meta(min_length=1)] | Annotated[list[str], msgspec.Meta(min_length=1)]
    upstream_model: str | None = None
    multiplier: Multiplier | None = None
    kind: str | None = None
    context_window: Count | None = None
    max_output_tokens: Count | None = None
    hold_output_tokens: Count | None = None
    created: datetime.date | Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    aliases: list[str] = []
    deprecated: Deprecation | None = None

    @property
    def upstreams(self) -> list[str]:
        return [self.upstream] if isinstance(self.upstream, str) else self.upstream

    @property
    def price(self) -> int:
        assert self.multiplier is not None
        return self.multiplier

    def deprecation(self, now: float) -> Deprecation | None:
        """Before its announcement a deprecation is not shown."""
        return self.deprecated if self.deprecated and unix_day(self.deprecated.announced) <= now else None

    def takes(self, api: Api) -> bool:
        """Embeddings and reranking are for models of that kind, and these for nothing else; no kind takes all."""
        return self.kind is None or api.kind == (self.kind if self.kind in ("embedding", "rerank") else None)

    def prompt_tokens(self, ask: Ask) -> int:
        """E, which no prompt that a model accepts is above: it is no longer than the context window."""
        tokens = ask.prompt_estimate + ask.documents_by_url * (self.context_window or DOCUMENT_TOKENS)
        return min(tokens, self.context_window * ask.prompts) if self.context_window else tokens

    def output_tokens(self, prompt_tokens: int) -> int:
        """The longest answer to one prompt, where the request names no maximum."""
        rest_of_window = self.context_window and max(1, self.context_window - prompt_tokens)
        return self.max_output_tokens or rest_of_window or OUTPUT_TOKENS_DEFAULT


class Catalog(msgspec.Struct, frozen=True, dict=True):
    """models.yaml, checked and converted; replaced whole when the file changes."""

    tiers: dict[str, PriceTier]
    models: dict[str, Model]
    owned_by: str = "llm-resayil"

    @cached_property
    def names(self) -> dict[str, str]:
        """What clients may say: ids and aliases, and the id that each means."""
        return {name: model.name for model in self.models.values() for name in (model.name, *model.aliases)}

    def find(self, name: str, now: float) -> Model:
        model = self.models.get(self.names.get(name, ""))
        if model is None:
            near = difflib.get_close_matches(name[:QUOTED_MAX], list(self.names), 3, 0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "GET /v1/models lists the models."
            raise Refusal("model_not_found", f"There is no model {quoted(name)}. {hint}", param="model")
        if model.deprecated and model.deprecated.sunset_within(0, now):
            instead = model.deprecated.replacement
            hint = f"Use {instead} instead." if instead else "GET /v1/models lists the models."
            raise Refusal("model_retired", f'The model "{model.name}" is retired. {hint}', param="model")
        return model


def load_catalog(config: Config) -> Catalog:
    """ConfigError says what is wrong, and where."""
    if not os.path.isfile(config.models_path):  # noqa: PTH113 -- which a name that is too long does not break
        raise config.file.error(("models",), f"there is no file {config.models_path}")
    file = YamlFile(config.models_path)
    catalog = file.read((), Catalog, file.values)
    taken = {name: name for name in catalog.models}
    for name, model in catalog.models.items():
        here = ("models", name)
        file.check_known((*here, "tier"), "tier", model.tier, catalog.tiers)
        for upstream in model.upstreams:
            file.check_known((*here, "upstream"), "upstream", upstream, config.upstreams)
        if model.deprecated and (instead := model.deprecated.replacement):
            file.check_known((*here, "deprecated", "replacement"), "model", instead, catalog.names)
        for alias in model.aliases:
            if alias in taken:
                raise file.error((*here, "aliases"), f'alias "{alias}" is used twice, also for "{taken[alias]}"')
            taken[alias] = name
        if model.multiplier is None:
            catalog.models[name] = msgspec.structs.replace(model, multiplier=catalog.tiers[model.tier].multiplier)
    return catalog


def unix_day(day: datetime.date) -> int:
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp())


def iso_time(ms: int | None) -> str | None:
    return None if ms is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(ms // 1000))


def cost(tokens: int, multiplier: int) -> int:
    """Thousandths of a credit: exact, because both are integers and the multiplier is in thousandths."""
    assert tokens >= 0 and multiplier >= 0
    return tokens * multiplier


# ---- APIs: what is read of a request --------------------------------------------------------------------------------

MAXIMA = ("max_tokens", "max_completion_tokens")
OTHER_MAXIMA = ("n_predict", "num_predict", "max_new_tokens", "n_cmpl")  # llama.cpp and others obey these first
USE_MAXIMUM = "is not accepted; use the maximum of this API"
OF_OTHERS = "is not accepted: it would reach what belongs to others, or be unpriced"
STATELESS = "is not accepted: nothing is stored here. Send the whole conversation"
REFUSED = {
    **dict.fromkeys(OTHER_MAXIMA, USE_MAXIMUM),
    **dict.fromkeys(("mcp_servers", "file_id", "vector_store_ids", "container"), OF_OTHERS),
    **dict.fromkeys(("service_tier", "speed"), "is not accepted: it has another price"),
}
PASSES: Mapping[str, Callable[[Any], bool]] = {  # which values of refused members pass; of the others, null
    **dict.fromkeys(OTHER_MAXIMA, lambda value: False),
    "container": lambda value: value is None or (isinstance(value, dict) and not value.get("id")),
    "service_tier": lambda value: value in (None, "auto", "default", "standard_only"),
    "background": lambda value: value is None or value is False,
}
MEDIA = ("data", "image_url", "file_data", "video_url", "input_audio", "audio_url")
DESCRIBES = ("arguments", "input", "parameters", "input_schema", "schema", "text")  # within a prompt: counts its JSON


def fold(name: str) -> str:
    """How loosely servers match names: Go folds case (ſ is s there), some take `maxTokens` for `max_tokens`."""
    return name.casefold().replace("_", "").replace("-", "")


def by_any_name(names: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Names, and why each is refused, or "", to be found by what servers may take for them too."""
    return {key: (name, why) for name, why in names.items() for key in (name, fold(name))}


NAMES_WITHIN = by_any_name({
    **dict.fromkeys(("type", "role", "content", "url", "source", "file", "file_url", *MEDIA, *DESCRIBES), ""),
    **dict.fromkeys(("file_id", "vector_store_ids"), OF_OTHERS),
})  # fmt: skip


class Api(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What an API is. A column for each thing in which they differ, so that no other place asks which one it is."""

    path: str
    prompt: tuple[str, ...]  # the members that carry the prompt; the first must be there,
    expects: Callable[[Any], str]  # and this says what it should be, "" if it is
    bounds: tuple[str, ...] = ()  # the members that name the maximum of an answer; none: there is no answer to bound
    choices: tuple[str, ...] = ()  # the members that ask for several answers to a prompt
    refused: Mapping[str, str] = {}  # beside REFUSED: would be unpriced, or cross from one customer to another
    forced: Mapping[str, Any] = {}  # members that are always forwarded so
    part_of: str = ""  # the API that an upstream's `serves` names, where it is not this one
    kind: str | None = None  # of the models that take it, where it is not text
    priced: bool = True
    template_tokens: int = 0
    empty_choice: bytes = b""  # makes a closing usage event safe for `chunk.choices[0]`; with it, usage is asked for
    whole: tuple[str, ...]  # a whole answer has one of these, or it is none
    text: Callable[[Chunk], int] = lambda chunk: 0  # the bytes of text that an event, or a whole answer, bears
    usage_prompt: tuple[tuple[str, ...], ...] = (("prompt_tokens",),)  # the first group that is there is added up
    usage_output: str = "completion_tokens"
    ends: tuple[str, ...] = ("[DONE]",)  # a stream without is broken, but for [DONE] after a finish reason or usage
    passes_query: bool = False
    id_headers: tuple[str, ...] = ("x-request-id",)
    error: Callable[[Refusal, str], dict[str, Any]] = openai_error
    is_error: Callable[[Any], bool] = lambda body: isinstance(body["error"]["message"], str)  # its clients' shape

    @cached_property
    def names(self) -> dict[str, tuple[str, str]]:
        """Of members that are read or refused, as NAMES_WITHIN is of those within a prompt."""
        everywhere = ("model", "stream", "stream_options", "stream_options.include_usage", "n", "best_of", *MAXIMA)
        read = dict.fromkeys((*everywhere, "messages", "prompt", "input", *self.prompt, *self.bounds, *self.forced), "")
        return by_any_name({**read, **REFUSED, **self.refused})

    def error_event(self, refusal: Refusal, request_id: str) -> bytes:
        """Ends a stream. Where events bear their type, openai-python raises only on an inner error object."""
        line, error = b"", self.error(refusal, request_id)
        if "[DONE]" not in self.ends:
            line, error = b"event: error\n", {"type": "error", **error}
        return line + b"data: " + encode_json(error) + b"\n\n"


def types_in(value: Any) -> set[type]:
    """The types of a list's elements, gathered at the speed of C; none, where it is no list."""
    return set(map(type, value)) if isinstance(value, list) else set()


def expect_messages(messages: Any) -> str:
    contents = [message.get("content") for message in messages] if types_in(messages) == {dict} else [0]
    right = all(c is None or isinstance(c, str) or (isinstance(c, list) and types_in(c) <= {dict}) for c in contents)
    return "" if right else "a list of messages, each with a role and a content"


def expect_items(items: Any) -> str:
    """An item without a type and a role is a reference to what was said in somebody's conversation."""
    right = isinstance(items, str) or (
        types_in(items) == {dict}
        and all((item.get("type") or item.get("role") or "item_reference") != "item_reference" for item in items)
    )
    return "" if right else "text, or a list of items, each with a type or a role, and none of them a reference"


def expect_prompt(prompt: Any) -> str:
    kinds = types_in(prompt)
    right = isinstance(prompt, str) or kinds in ({str}, {int})
    if kinds == {list} and all(prompt):
        right = set(map(type, itertools.chain.from_iterable(prompt))) == {int}
    return "" if right else "text, a list of texts, token ids, or a list of lists of token ids"


def choices_text(chunk: Chunk) -> int:
    """Of chat and completions, streamed and whole. A null choice, or one of odd shape, takes nothing from the others.
    A finish reason is noted as the chunk's status."""
    total = 0
    for choice in chunk.choices if type(chunk.choices) is list else (chunk.choices,):
        if type(choice) is not Choice:
            total += size(choice)
            continue
        if choice.finish_reason:
            chunk.status = choice.finish_reason
        for part in (choice.delta, choice.text, choice.message):
            if type(part) is not Choice:
                total += size(part) if part else 0
                continue
            if part.content:
                total += size(part.content)
            if part.reasoning_content or part.reasoning or part.refusal or part.tool_calls or part.function_call:
                total += size(part.reasoning_content) + size(part.refusal)
                if part.reasoning != part.reasoning_content:  # a server that is renaming it sends the same text twice
                    total += size(part.reasoning)
                for calls in (part.tool_calls, part.function_call):
                    for call in calls if type(calls) is list else (calls,):
                        function = call.get("function", call) if type(call) is dict else call
                        total += size(function.get("arguments") if type(function) is dict else function)
    return total


def blocks_text(chunk: Chunk) -> int:
    """Of responses and messages: of a stream's events only the deltas, whose text others repeat; of a whole answer all
    its blocks, however they are nested."""
    total, stack = 0, [chunk.output, chunk.content]
    if chunk.type == "content_block_delta":
        stack.append(chunk.delta)
    elif type(chunk.delta) is type(chunk.type) is str and chunk.type.endswith(".delta"):
        total += size(chunk.delta)
    while stack:
        inner = stack.pop()
        if type(inner) is list:
            stack += inner
        elif type(inner) is dict:
            for name, text in inner.items():
                if name in ("text", "thinking", "refusal", "arguments", "input", "partial_json"):
                    total += size(text)
                elif type(text) in (list, dict):
                    stack.append(text)
    return total


# fmt: off
CHAT = Api(
    path="chat/completions", prompt=("messages", "tools", "functions", "response_format"), expects=expect_messages,
    bounds=MAXIMA, choices=("n", "best_of"), template_tokens=TEMPLATE_TOKENS, whole=("choices",), text=choices_text,
    empty_choice=b'{"index":0,"delta":{},"finish_reason":null}',
)
RESPONSES = Api(
    path="responses", prompt=("input", "instructions", "tools", "text"), expects=expect_items,
    bounds=("max_output_tokens",), template_tokens=TEMPLATE_TOKENS, whole=("output",), text=blocks_text,
    refused={
        **dict.fromkeys(("previous_response_id", "conversation", "prompt", "background"), STATELESS),
        **dict.fromkeys(("n", *MAXIMA), USE_MAXIMUM), "request_id": OF_OTHERS,
    },
    forced={"store": False}, usage_prompt=(("input_tokens",),), usage_output="output_tokens",
    ends=("response.completed", "response.incomplete", "response.failed"),
)
MESSAGES = Api(
    path="messages", prompt=("messages", "system", "tools"), expects=expect_messages, bounds=("max_tokens",),
    template_tokens=TEMPLATE_TOKENS, whole=("content",), text=blocks_text, usage_output="output_tokens",
    usage_prompt=(("input_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),),
    ends=("message_stop",), passes_query=True, id_headers=("x-request-id", "request-id"), error=messages_error,
    is_error=lambda body: body["type"] == "error" and isinstance(body["error"]["message"], str),
)
FREE = {"priced": False, "bounds": (), "whole": ("input_tokens",)}
APIS = {api.path: api for api in (
    CHAT,
    msgspec.structs.replace(
        CHAT, path="completions", prompt=("prompt", "suffix"), expects=expect_prompt, template_tokens=0,
        empty_choice=b'{"index":0,"text":"","logprobs":null,"finish_reason":null}',
    ),
    Api(path="embeddings", prompt=("input",), expects=expect_prompt, kind="embedding", whole=("data",)),
    Api(
        path="rerank", prompt=("documents", "query"), kind="rerank", whole=("results", "data"),
        expects=lambda documents: "" if types_in(documents) else "a list of documents",
        usage_prompt=(("prompt_tokens",), ("total_tokens",)),
    ),
    RESPONSES,
    msgspec.structs.replace(RESPONSES, path="responses/input_tokens", part_of="responses", forced={}, **FREE),
    MESSAGES,
    msgspec.structs.replace(MESSAGES, path="messages/count_tokens", part_of="messages", **FREE),
)}
# fmt: on


class Ask:
    """A request, checked and estimated. Members that are not read here pass untouched.

    `max_tokens` is of one answer, `choices` the number of all: n (or best_of) times the prompts, 0 where none is
    generated. `prompt_estimate` is E before the model's context window is known, from one walker for every API: text
    under any name counts its UTF-8 bytes / 4, a token array its length, an object in `messages` or `input` 4 more, an
    image or piece of audio 1,024, what describes (tools, schemas, arguments) its JSON."""

    def __init__(self, api: Api, body: dict[str, Any]) -> None:
        self.api, self.body = api, body
        self.errors: dict[str, list[str]] = {}
        self.quarters = 0  # of a token, so that only the sum is rounded
        self.documents_by_url = 0
        model, options, main = body.get("model"), body.get("stream_options"), body.get(api.prompt[0])
        within = options if isinstance(options, dict) else {}
        for name, value in (*body.items(), *((f"stream_options.{name}", None) for name in within)):
            self.check_name(name, api.names, value)
        right = isinstance(model, str) and 0 < len(model) <= MODEL_NAME_MAX
        self.expect(right, "model", f"must be the id of a model, of at most {MODEL_NAME_MAX} characters")
        self.expect(isinstance(body.get("stream"), bool | None), "stream", "must be a boolean")
        self.expect(isinstance(options, dict | None), "stream_options", "must be an object")
        asked = within.get("include_usage")
        self.expect(isinstance(asked, bool | None), "stream_options.include_usage", "must be a boolean")
        for name in (*api.choices, *api.bounds):
            value, most = body.get(name), CHOICES_MAX if name in api.choices else TOKENS_MAX
            right = value is None or (type(value) is int and 1 <= value <= most)
            self.expect(right, name, f"must be an integer from 1 to {most}")
        expected = api.expects(main)
        self.expect(not expected, api.prompt[0], f"must be {expected}")
        tools = [body]
        for tool in tools:  # which may be a namespace of others
            inner = tool.get("tools")
            tools += [one for one in inner if isinstance(one, dict)] if isinstance(inner, list) else []
            if tool.get("type") in ("mcp", "file_search", "code_interpreter"):
                self.expect(False, "tools", f"{quoted(tool['type'])} {OF_OTHERS}")
        self.prompts = len(main) if isinstance(main, list) and main and isinstance(main[0], str | list) else 1
        self.estimate()
        if self.errors:
            name, why = next(iter(self.errors.items()))
            raise Refusal("validation_failed", f"{name}: {why[0]}", param=name, top={"errors": self.errors})

        self.model: str = body["model"]
        self.stream = bool(body.get("stream") and api.bounds)
        self.wants_usage = bool(asked)
        self.choices = max((body.get(n) or 1 for n in api.choices), default=1) * self.prompts if api.bounds else 0
        self.max_tokens: int | None = min((body[name] for name in api.bounds if body.get(name)), default=None)
        self.prompt_estimate = -(-self.quarters // 4) if api.priced else 0
        self.documents_by_url *= api.priced

    def expect(self, right: bool, name: str, why: str) -> None:
        """Note what is wrong with a field: the first ten."""
        if not right and len(self.errors) < ERRORS_MAX:
            self.errors.setdefault(name if len(name) <= QUOTED_MAX else f"{name[:QUOTED_MAX]}…", []).append(why)

    def check_name(self, name: str, names: dict[str, tuple[str, str]], value: Any = True) -> None:
        """A member that an upstream could take for one that we read would be unpriced: refused, not dropped."""
        meant, why = names.get(name) or names.get(fold(name)) or (name, "")
        if why:
            self.expect(PASSES[meant](value) if meant in PASSES else value is None, name, why)
        elif meant != name:
            self.expect(False, name, f"is too like {meant}, which some servers would take it for; use that name")

    def estimate(self) -> None:
        for name in self.api.prompt:
            stack: list[Any] = [self.body.get(name)]
            before = self.quarters
            if name in ("tools", "functions", "response_format", "text"):  # what describes
                self.quarters += size(stack.pop())
            elif name in ("messages", "input") and isinstance(stack[0], list):
                self.quarters += 16 * sum(isinstance(item, dict) for item in stack[0])
            while stack:
                value = stack.pop()
                if isinstance(value, str):
                    self.quarters += size(value)
                elif isinstance(value, dict):
                    self.estimate_object(value, stack)
                elif (kinds := types_in(value)) == {int}:
                    self.quarters += 4 * len(value)
                elif kinds == {str}:
                    self.quarters += sum(map(size, value))
                elif kinds:
                    stack += value
            if name == "suffix":  # which follows each prompt
                self.quarters += (self.quarters - before) * (self.prompts - 1)

    def estimate_object(self, value: dict[str, Any], stack: list[Any]) -> None:
        """An image or piece of audio, a document, or what else has members: those to be read are left on the stack."""
        kind = value.get("type")
        done: tuple[str, ...] = ()
        if kind in ("document", "file", "input_file"):
            done = ("source", "file", "data", "file_data", "file_url")
            source = next((value[name] for name in ("source", "file") if isinstance(value.get(name), dict)), value)
            data = source.get("data") or source.get("file_data")
            if source.get("type") in ("text", "content"):
                stack.append(data or source.get("content"))
            elif isinstance(data, str) and not data.startswith("http"):
                self.quarters += 4 * max(MEDIA_TOKENS, -(-len(data) // 16))  # of its base64 bytes
            else:
                self.documents_by_url += 1  # each counts what the model can read at the most
        elif isinstance(kind, str) and ("image" in kind or "audio" in kind or "video" in kind):
            self.quarters += 4 * MEDIA_TOKENS
            done = (*MEDIA, "source", "detail", "result")
        for name, inner in value.items():
            self.check_name(name, NAMES_WITHIN)
            if name in done:
                for one in inner if isinstance(inner, dict) else ():
                    self.check_name(one, NAMES_WITHIN)
            elif name in ("type", "role") and isinstance(inner, str) and len(inner) <= QUOTED_MAX:
                continue
            elif (name == "url" and isinstance(inner, str) and inner.startswith("data:")) or (name in MEDIA and inner):
                self.quarters += 4 * MEDIA_TOKENS
            elif name in DESCRIBES:
                self.quarters += size(inner)
            else:
                stack.append(inner)


def size(value: Any) -> int:
    """The UTF-8 length of a text; of what should be one and has another shape, the length of its JSON."""
    if type(value) is str:
        return len(value) if value.isascii() else len(value.encode())
    with contextlib.suppress(RecursionError):  # a request that is too deep to be encoded is refused by `forward_body`
        return len(encode_json(value)) if value and type(value) not in (int, float, bool) else 0
    return 0


def parse_request(api: Api, raw: bytes | bytearray) -> Ask:
    """The body as JSON, decoded once: a duplicate member's last value stands, NaN and lone surrogates are refused."""
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        why = "is nested too deeply" if isinstance(error, RecursionError) else f"is not valid JSON: {error}"
        raise Refusal("invalid_json", f"The request body {why}.") from None
    if not isinstance(body, dict):
        raise Refusal("invalid_json", "The request body must be a JSON object.")
    return Ask(api, body)


def forward_body(ask: Ask, model: Model, upstream: Upstream, max_tokens: int | None) -> bytes:
    """The body for the upstream: the one that was priced. `max_tokens` is a maximum that credits lowered, or None."""
    body = {**ask.body, "model": model.upstream_model or model.name, **ask.api.forced}
    used = [name for name in ask.api.bounds if body.get(name) is not None]
    lowest = ask.max_tokens if max_tokens is None else max_tokens
    for name in used or (ask.api.bounds[:1] if max_tokens is not None else ()):
        body[name] = lowest
    if upstream.usage_in_stream == "never":
        body.pop("stream_options", None)
    elif ask.stream and ask.api.empty_choice:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    try:
        return encode_json(body)
    except RecursionError:  # a little less deep than what cannot be decoded
        raise Refusal("invalid_json", "The request body is nested too deeply.") from None


# ---- APIs: what is counted of an answer -----------------------------------------------------------------------------


class BrokenStream(Exception):
    """The upstream's bytes are no answer that can be relayed. Says why in our words: the bytes are somebody's text."""


EMPTY_LINE = re.compile(rb"\n\n|\n\r\n?|\r\r\n?")
DATA_LINE = re.compile(rb"(?:^|[\r\n])data:[^\r\n]")
Odd = str | list[Any] | float | bool | None  # what stands where an object should


class Splitter:
    """Reads in, whole server-sent events out; joined again they are the bytes that came. A line ends with LF, CRLF or
    CR (WHATWG HTML, 9.2.5), an event with an empty line. An event is passed on as soon as its empty line has begun;
    should that be the CR of a CRLF, the LF leads the next event, where it means nothing."""

    def __init__(self) -> None:
        self.tail = bytearray()  # an event that is not whole yet

    def feed(self, read: bytes) -> bytes:
        """The whole events that a read completes."""
        if not self.tail and read.endswith(b"\n\n") and b"\r" not in read:
            return read
        scanned = max(0, len(self.tail) - 1)  # the two bytes that end an event may come in two reads
        self.tail += read
        end = self.tail.rfind(b"\n\n", scanned) + 2
        if self.tail.find(b"\r", scanned) >= 0:
            end = max((match.end() for match in EMPTY_LINE.finditer(self.tail, scanned)), default=1)
        end = end if end > 1 else 0
        if len(self.tail) - end > EVENT_BYTES_MAX:
            raise BrokenStream(f"an event of more than {EVENT_BYTES_MAX} bytes")
        whole = bytes(self.tail[:end])
        del self.tail[:end]
        return whole


class Choice(msgspec.Struct, gc=False):
    """A choice, and the delta or message in it, which bear its content. Some servers send other types than text."""

    delta: Choice | Odd = None
    message: Choice | Odd = None
    finish_reason: Any = None
    text: Any = None
    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None


class Holder(msgspec.Struct, gc=False):
    """What usage may stand in: `response` of a closing event, `message` of a starting one."""

    usage: Any = None


class Chunk(msgspec.Struct, gc=False):
    """What is read of an event, and of an answer that is not streamed, of any API and of any shape."""

    choices: list[Choice | Odd] | str | dict[str, Any] | float | bool | None = None
    usage: Any = None
    error: Any = None
    type: Any = None
    delta: Any = None
    response: Holder | Odd = None
    message: Holder | Odd = None
    status: Any = None
    output: Any = None
    content: Any = None
    input_tokens: Any = None
    data: msgspec.Raw = msgspec.Raw()
    results: msgspec.Raw = msgspec.Raw()


decode_chunk = msgspec.json.Decoder(Chunk).decode


def decode_answer(data: bytes) -> Chunk | None:
    """An answer, or None if it is none. Clients also read NaN, infinities and lone surrogates, which some servers send
    in log probabilities, and bytes that are no UTF-8."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return decode_chunk(data)
    with contextlib.suppress(ValueError, RecursionError):
        value = json.loads(data.decode("utf-8-sig", "replace"), parse_float=str, parse_constant=str)
        return decode_chunk(json.dumps(value, ensure_ascii=False).encode(errors="replace"))
    return None


def read_odd(event: bytes) -> tuple[Chunk, int]:
    """An event of several lines, an error's, [DONE], a comment, or one whose JSON only clients read; where nobody can
    read it, it is empty, and has that many bytes."""
    fields = [line.partition(b":") for line in event.removeprefix(b"\xef\xbb\xbf").splitlines()]
    data = b"\n".join(value.removeprefix(b" ") for name, _, value in fields if name == b"data").lstrip()
    nothing = Chunk(type="[DONE]" if data.startswith(b"[DONE]") else None)
    parsed = decode_answer(data) if data.startswith(b"{") else nothing
    chunk = parsed or nothing
    if any(name == b"event" and value.strip() == b"error" for name, _, value in fields):
        chunk.error = chunk.error or True
    return chunk, 0 if parsed else len(data)


def give_choice(event: bytes, choice: bytes) -> bytes:
    """The event with `choice` in its empty list of choices, and no other byte changed."""
    for match in re.finditer(rb'"choices"\s*:\s*\[(\s*)\]', event):
        given = event[: match.start(1)] + choice + event[match.end(1) :]
        if read_odd(given)[0].choices:
            return given
    return event


class Bill(NamedTuple):
    """What a request is charged for; `estimated` where the upstream's word was not enough."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool


class Meter(msgspec.Struct):
    """Counts what an answer costs, block by block. Knows no sockets, keeps no text, never raises, on any bytes.
    A copy is fed, and takes the place of its original once its block goes on: what is not sent is not charged."""

    api: Api
    choices: int = 1
    prompts: int = 1
    wants_usage: bool = False
    usage_of: str = "answer"
    events: int = 0  # that bear content,
    text_bytes: int = 0  # and the bytes of its text
    usage: dict[str, int] = {}  # the last valid value of each member; replaced, never changed
    count_at_usage: int = 0
    finished: bool = False  # a finish reason has passed
    over: bool = False  # the event that ends the stream has come, or
    broken: bool = False  # an error of the upstream's own in its place
    failed: bool = False  # it ended by saying that it failed

    @property
    def count(self) -> int:
        """The running estimate of the output: the larger of events that bear content and their text's bytes / 4."""
        return max(self.events, (self.text_bytes + 3) // 4)

    @property
    def count_certain(self) -> int:
        """What even a text of very long tokens must have used."""
        return max(self.events, self.text_bytes // 8)

    @property
    def ended(self) -> bool:
        """Whether the upstream may close now without having broken off."""
        return self.over or ("[DONE]" in self.api.ends and (self.finished or bool(self.usage)))

    @property
    def produced(self) -> bool:
        return self.count > 0 or any(self.usage.values())

    def feed(self, block: bytes) -> tuple[bytes, bytes]:
        """Count whole events. What to send on now, and the event that ends the stream, to be sent when it is settled.
        One flat loop: with a hundred streams each layer costs three times what it costs when measured alone."""
        text_of, events, text_bytes, only_lf = self.api.text, self.events, self.text_bytes, b"\r" not in block
        pieces = block.split(b"\n\n") if only_lf else EMPTY_LINE.split(block)
        pieces.pop()  # the last empty line ends the block
        for number, event in enumerate(pieces):
            at = 0
            if not event.startswith(b"data:"):  # what stands before it may say that it is an error: read_odd looks
                at = event.find(b"\ndata:") + 1 if only_lf else 0
                at = at if at and b"error" not in event[:at] else len(event)
            unread = 0
            try:
                chunk = decode_chunk(event[at + 5 :])
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                chunk, unread = read_odd(event)
            if text := text_of(chunk) + unread:
                events += 1
                text_bytes += text
            if chunk.usage is not None or chunk.type or chunk.status or chunk.error:
                self.events, self.text_bytes = events, text_bytes
                self.note(chunk)
                is_closing = chunk.usage is not None and chunk.choices == [] and not self.wants_usage
                if self.over or self.broken or (is_closing and self.api.empty_choice):
                    ends = [0, *(found.end() for found in EMPTY_LINE.finditer(block))]
                    start, end = ends[number : number + 2]
                    if self.over or self.broken:
                        return block[:start], block[start:end]
                    block = block[:start] + give_choice(block[start:end], self.api.empty_choice) + block[end:]
        self.events, self.text_bytes = events, text_bytes
        return block, b""

    def note(self, chunk: Chunk) -> None:
        """What an event says beside its text: usage, wherever it stands, an error, the end. Of usage, what is not an
        integer from 0 to 2^31 counts as absent, and what is absent keeps what was there."""
        for holder in (chunk, chunk.response, chunk.message):
            usage = holder.usage if isinstance(holder, Chunk | Holder) else None
            if type(usage) is dict:
                names = (self.api.usage_output, *itertools.chain.from_iterable(self.api.usage_prompt))
                valid = {n: v for n in names if type(v := usage.get(n)) is int and 0 <= v <= TOKENS_MAX}
                self.usage = {**self.usage, **valid}
                if self.api.usage_output in valid:
                    self.count_at_usage = self.count
        self.finished = self.finished or bool(chunk.status)
        if chunk.type in self.api.ends:
            self.over = True
            self.failed = chunk.type.endswith(".failed")
        elif chunk.error or chunk.type == "error":
            self.broken = True

    def feed_whole(self, body: bytes) -> bool:
        """Count an answer that is not streamed; whether it speaks of an error. BrokenStream: none to be paid for."""
        chunk = decode_answer(body) or Chunk()
        is_answer = any(getattr(chunk, name) for name in self.api.whole)
        if not is_answer and (chunk.error or type(chunk.usage) is not dict):
            raise BrokenStream("its body is an error" if chunk.error else "its body is no answer")
        self.text_bytes += (text := self.api.text(chunk))
        self.events += text > 0
        self.note(chunk)
        self.broken, self.failed = False, chunk.status == "failed"
        return bool(chunk.error)

    def bill(self, prompt_estimate: int, complete: bool) -> Bill:
        """What is owed. Of an answer that was cut short, what came after the last usage is owed too."""
        groups = ([self.usage[n] for n in group if n in self.usage] for group in self.api.usage_prompt)
        prompt = next((sum(group) for group in groups if group), None)
        output, count = self.usage.get(self.api.usage_output), self.count
        if (prompt == 0 and (output or count)) or (self.usage_of == "choice" and self.prompts > 1):
            prompt = None
        by_choice = self.usage_of == "choice" and self.choices > 1
        if output is None or 2 * output < self.events or (by_choice and complete):
            owed = count
        elif not complete:
            owed = max(count, output + count - self.count_at_usage)
        else:
            owed = max(output, self.count_certain) if self.choices > 1 else output
        estimated = self.api.priced and (prompt is None or by_choice or owed != (output or 0))
        return Bill(prompt_estimate if prompt is None else min(prompt, TOKENS_MAX), min(owed, TOKENS_MAX), estimated)


# ---- Ledger ---------------------------------------------------------------------------------------------------------

SCHEMA = """
CREATE TABLE account (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    tier TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    created_at INTEGER NOT NULL,
    -- Thousandths of a credit. `free` lapses, but for what open requests reserve of it (`free_held`); `paid` does not,
    -- and is below zero where a charge was above its hold.
    free INTEGER NOT NULL DEFAULT 0 CHECK (free >= 0),
    free_expires_at INTEGER,
    free_held INTEGER NOT NULL DEFAULT 0 CHECK (free_held >= 0),
    paid INTEGER NOT NULL DEFAULT 0,
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= free_held),
    granted INTEGER NOT NULL DEFAULT 0,
    lapsed INTEGER NOT NULL DEFAULT 0 CHECK (lapsed >= 0),
    charged INTEGER NOT NULL DEFAULT 0 CHECK (charged >= 0),
    -- What the limits look at.
    open_requests INTEGER NOT NULL DEFAULT 0 CHECK (open_requests >= 0),
    minute INTEGER NOT NULL DEFAULT 0,
    minute_requests INTEGER NOT NULL DEFAULT 0,
    CHECK (granted - lapsed - charged = free + paid)
) STRICT;

CREATE TABLE api_key (
    id INTEGER PRIMARY KEY,
    account_id INTEGER NOT NULL REFERENCES account (id),
    hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    hint TEXT NOT NULL,
    label TEXT,
    created_at INTEGER NOT NULL,
    last_used_at INTEGER,
    revoked_at INTEGER,
    -- Its own limits: thousandths of a credit, the end of its last day, model ids between spaces; NULL is none.
    credit_limit INTEGER CHECK (credit_limit >= 0),
    expires_at INTEGER,
    models TEXT,
    spent INTEGER NOT NULL DEFAULT 0 CHECK (spent >= 0),
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0)
) STRICT;
CREATE INDEX api_key_account ON api_key (account_id);

CREATE TABLE credit_grant (
    id INTEGER PRIMARY KEY,
    account_id INTEGER NOT NULL REFERENCES account (id),
    kind TEXT NOT NULL CHECK (kind IN ('free', 'paid')),
    amount INTEGER NOT NULL,
    ref TEXT UNIQUE,
    note TEXT,
    created_at INTEGER NOT NULL,
    expires_at INTEGER
) STRICT;
CREATE INDEX credit_grant_account ON credit_grant (account_id);

-- One row a request, resolved once. The id is the request id; its upper bits are the milliseconds since 1970.
CREATE TABLE request (
    id INTEGER PRIMARY KEY,
    account_id INTEGER NOT NULL REFERENCES account (id),
    key_id INTEGER NOT NULL REFERENCES api_key (id),
    model TEXT NOT NULL,
    multiplier INTEGER NOT NULL CHECK (multiplier >= 0),
    prompt_estimate INTEGER NOT NULL CHECK (prompt_estimate >= 0),
    hold_tokens INTEGER NOT NULL CHECK (hold_tokens >= 0),
    hold INTEGER NOT NULL,
    free_held INTEGER NOT NULL CHECK (free_held >= 0 AND free_held <= hold),
    count INTEGER NOT NULL DEFAULT 0 CHECK (count >= 0),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'void')),
    upstream TEXT,
    outcome TEXT,
    prompt_tokens INTEGER CHECK (prompt_tokens >= 0),
    completion_tokens INTEGER CHECK (completion_tokens >= 0),
    estimated INTEGER CHECK (estimated IN (0, 1)),
    charge INTEGER,
    free_charge INTEGER CHECK (free_charge >= 0 AND free_charge <= charge),
    first_byte_ms INTEGER,
    resolved_at INTEGER,
    CHECK (hold = hold_tokens * multiplier),
    CHECK ((state = 'open') = (charge IS NULL)),
    CHECK ((charge IS NULL) = (free_charge IS NULL)),
    CHECK (charge = (prompt_tokens + completion_tokens) * multiplier),
    CHECK (state <> 'void' OR charge = 0)
) STRICT;
CREATE INDEX request_open ON request (account_id) WHERE state = 'open';
CREATE INDEX request_account ON request (account_id, id);

CREATE TRIGGER request_is_resolved_once BEFORE UPDATE ON request WHEN OLD.state <> 'open'
BEGIN SELECT RAISE(ABORT, 'a resolved request is never edited'); END;
CREATE TRIGGER request_is_never_deleted BEFORE DELETE ON request
BEGIN SELECT RAISE(ABORT, 'a request is never deleted'); END;
CREATE TRIGGER grant_is_never_edited BEFORE UPDATE ON credit_grant
BEGIN SELECT RAISE(ABORT, 'a grant is never edited; add a correcting one'); END;
CREATE TRIGGER grant_is_never_deleted BEFORE DELETE ON credit_grant
BEGIN SELECT RAISE(ABORT, 'a grant is never deleted; add a correcting one'); END;
"""

REQUEST_ID_BITS = 20  # below the milliseconds; a million requests in one of them
BOX_SHIFT = 12  # where several boxes share a ledger, the number of one is the upper 8 of these bits

CALLER = f"""
    k.id, k.hint, k.revoked_at, k.expires_at, k.models, coalesce(k.credit_limit, {2**62}), k.spent, k.held,
    a.id, a.name, a.tier, a.status, a.free, a.free_expires_at, a.free_held, a.paid, a.held,
    a.open_requests, a.minute, a.minute_requests
"""
FIND_CALLER = f"SELECT {CALLER} FROM api_key k JOIN account a ON a.id = k.account_id WHERE k.hash = :key_hash"
FIND_OPEN = f"""
    SELECT r.multiplier, r.hold, r.free_held, {CALLER}
    FROM request r JOIN api_key k ON k.id = r.key_id JOIN account a ON a.id = r.account_id
    WHERE r.id = :request_id AND r.state = 'open'
"""
MOVE_ACCOUNT = """
    UPDATE account SET held = held + :hold, free_held = free_held + :free_held, charged = charged + :charge,
        free = free - :free_charge - :lapsing, paid = paid - (:charge - :free_charge), lapsed = lapsed + :lapsing,
        open_requests = open_requests + :opened, minute = :minute, minute_requests = :minute_requests
    WHERE id = :account_id
"""
MOVE_KEY = "UPDATE api_key SET held = held + :hold, spent = spent + :charge, last_used_at = :now WHERE id = :key_id"
INSERT_REQUEST = """
    INSERT INTO request (id, account_id, key_id, model, multiplier, prompt_estimate, hold_tokens, hold, free_held)
    VALUES (:request_id, :account_id, :key_id, :model, :multiplier, :prompt_estimate, :tokens, :hold, :free_held)
"""
EXTEND_REQUEST = """
    UPDATE request SET hold = hold + :hold, hold_tokens = hold_tokens + :tokens, free_held = free_held + :free_held,
        count = :count WHERE id = :request_id
"""
RESOLVE_REQUEST = """
    UPDATE request SET state = :state, outcome = :outcome, upstream = :upstream, prompt_tokens = :prompt_tokens,
        completion_tokens = :completion_tokens, estimated = :estimated, charge = :charge, free_charge = :free_charge,
        first_byte_ms = :first_byte_ms, resolved_at = :now WHERE id = :request_id AND state = 'open'
"""

Database = Any  # a connection to the ledger, of sqlite3's shape and with its errors
Verb = Callable[[Any, int], Any]  # a plain function of the database and its time in ms; a Refusal it returns is raised


class Caller(msgspec.Struct):
    """The key that a request bears, and its account as it stands. Times in ms, credits in thousandths."""

    key_id: int
    hint: str
    revoked_at: int | None
    expires_at: int | None
    models: str | None
    credit_limit: int
    key_spent: int
    key_held: int
    account_id: int
    account: str
    tier: str
    status: str
    free: int
    free_expires_at: int | None
    free_held: int
    paid: int
    held: int
    open_requests: int
    minute: int
    minute_requests: int

    @property
    def credits(self) -> int:
        return self.free + self.paid

    def free_is_past(self, now: int) -> bool:
        return self.free_expires_at is not None and now >= self.free_expires_at

    def lapsing(self, now: int) -> int:
        """Free credits that lapse now: past their day, those that no open request reserves. The one rule of it."""
        return max(0, self.free - self.free_held) if self.free_is_past(now) else 0

    def available(self, now: int) -> int:
        """What no open request holds, of the account's credits and of what the key may spend."""
        key_left = self.credit_limit - self.key_spent - self.key_held
        return min(self.credits - self.lapsing(now) - self.held, key_left)

    def may_use(self, model: Model) -> bool:
        return self.models is None or model.name in self.models.split(" ")

    def requests_in(self, minute: int) -> int:
        return self.minute_requests if self.minute == minute else 0

    def refuse(self, code: str, message: str, **more: Any) -> Refusal:
        refusal = Refusal(code, message, **more)
        refusal.caller = self
        return refusal


class Order(NamedTuple):
    request_id: int
    key_hash: bytes
    model: Model
    multiplier: int
    prompt_estimate: int
    template_tokens: int
    choices: int
    max_tokens: int  # of one choice
    slice_tokens: int | None  # held at a time; None holds the whole output


class Admission(NamedTuple):
    caller: Caller
    max_tokens: int  # of one choice
    granted: int  # tokens of output that are held for now,
    spare: int  # and beside them for the chat template: they serve the output where no more are to be had


class Resolution(NamedTuple):
    request_id: int
    outcome: str
    upstream: str | None
    bill: Bill | None  # None voids the hold
    first_byte_ms: int | None = None
    order: Order | None = None


class Settled(NamedTuple):
    charge: int
    credits: int


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def find_caller(db: Database, now: int, key_hash: bytes) -> Caller | Refusal:
    """Reads only. Keys are found by their hash, never compared; one never issued takes as long as any other."""
    row = db.execute(FIND_CALLER, {"key_hash": key_hash}).fetchone()
    if row is None:
        return Refusal("invalid_api_key", "The API key is not valid. Ask who runs this service for a new one.")
    caller = Caller(*row)
    if caller.revoked_at is not None:
        return caller.refuse("revoked_api_key", "The API key was revoked. Ask who runs this service for a new one.")
    if caller.expires_at is not None and now >= caller.expires_at:
        return caller.refuse("expired_api_key", "The API key has expired. Ask who runs this service for a new one.")
    return caller


def is_suspended(caller: Caller) -> Refusal | None:
    message = "The account is suspended. Ask who runs this service."
    return None if caller.status == "active" else caller.refuse("account_suspended", message)


def cannot_use(caller: Caller, model: Model) -> Refusal | None:
    if caller.may_use(model):
        return None
    message = f'This API key is not for the model "{model.name}". GET /v1/models lists those that it may use.'
    return caller.refuse("model_not_allowed", message, param="model")


def over_limits(caller: Caller, limits: Tier, now: int) -> Refusal | None:
    if limits.requests_per_minute is not None and caller.requests_in(now // 60_000) >= limits.requests_per_minute:
        wait = 60 - now // 1000 % 60
        message = f"The limit is {limits.requests_per_minute} a minute for this account. Try again in {wait} seconds."
        return caller.refuse("rate_limit_exceeded", message, headers=retry_after(wait), top={"retry_after": wait})
    if limits.parallel is not None and caller.open_requests >= limits.parallel:
        message = f"The limit is {limits.parallel} at once for this account. Wait for a request to end."
        return caller.refuse("too_many_parallel_requests", message, headers=retry_after(1), top={"retry_after": 1})
    return None


def hold(db: Database, now: int, order: Order, limits_of: Callable[[str], Tier]) -> Admission | Refusal:
    """Admit a request and reserve its credits, or say why not."""
    caller = find_caller(db, now, order.key_hash)
    if isinstance(caller, Refusal):
        return caller
    refusal = (
        is_suspended(caller) or cannot_use(caller, order.model) or over_limits(caller, limits_of(caller.tier), now)
    )
    if refusal:
        return refusal
    # Affordability: what no other request holds must pay for the least. A free model always does.
    prompt, credits, available = 2 * order.prompt_estimate, caller.credits - caller.lapsing(now), caller.available(now)
    least = cost(prompt + order.choices, order.multiplier)
    if order.multiplier and (credits <= 0 or available < max(1, least)):
        detail = {"credits": as_credits(credits), "required": as_credits(least)}
        needs = f"This request needs {detail['required']} credits"
        if credits <= 0 or credits < least:
            why = f"{needs}, and the account has {detail['credits']}. Add credits."
            return caller.refuse("insufficient_credits", why, **detail)
        if caller.credit_limit - caller.key_spent < max(1, least):
            why = f"{needs}, more than the limit of this API key leaves. Ask for a higher limit, or use another key."
            return caller.refuse("key_limit_reached", why, **detail)
        why = "Requests under way hold the credits that this one needs. Try again when one of them has ended."
        return caller.refuse("credits_in_use", why, headers={**retry_after(1), "x-should-retry": "true"}, **detail)
    payable = available // order.multiplier if order.multiplier else UNLIMITED_TOKENS
    max_tokens = min(order.max_tokens, (payable - prompt) // (order.choices or 1))
    granted = min(max_tokens * order.choices, order.slice_tokens or UNLIMITED_TOKENS)
    spare = max(0, min(order.template_tokens, payable - prompt - granted))
    tokens = prompt + granted + spare

    # From here on nothing can be refused.
    caller.minute_requests, caller.minute = caller.requests_in(now // 60_000) + 1, now // 60_000
    changes = {"hold": cost(tokens, order.multiplier), "tokens": tokens, "opened": 1, "model": order.model.name}
    move(db, now, caller, INSERT_REQUEST, order._asdict() | changes)
    return Admission(caller, max_tokens, granted, spare)


def move(db: Database, now: int, caller: Caller, request_sql: str, changes: dict[str, Any]) -> None:
    """The one place where figures change: the account's, the key's, and those of the request's row by `request_sql`.
    Each is a difference: a settle's hold is negative. What is held is held of the free credits first."""
    lapsing = caller.lapsing(now)
    reserved = max(0, min(changes["hold"], caller.free - lapsing - caller.free_held))
    values = {"charge": 0, "free_charge": 0, "free_held": reserved, "lapsing": lapsing, "opened": 0, "now": now}
    values |= {"account_id": caller.account_id, "key_id": caller.key_id}
    values |= {"minute": caller.minute, "minute_requests": caller.minute_requests, **changes}
    for sql in (MOVE_ACCOUNT, MOVE_KEY, request_sql):
        db.execute(sql, values)


def extend(db: Database, now: int, request_id: int, tokens: int, count: int) -> int:
    """Reserve up to `tokens` more tokens of output and note how many came so far; how many were granted, 0 if none."""
    row = db.execute(FIND_OPEN, {"request_id": request_id}).fetchone()
    if row is None:
        return 0
    multiplier, caller = row[0], Caller(*row[3:])
    granted = max(0, min(tokens, caller.available(now) // multiplier)) if multiplier else tokens

    changes = {"request_id": request_id, "hold": cost(granted, multiplier), "tokens": granted, "count": count}
    move(db, now, caller, EXTEND_REQUEST, changes)
    return granted


def settle(db: Database, now: int, end: Resolution) -> Settled | None:
    """Debit a request's bill and release the rest of its hold. Free credits go first; past their day, as far as this
    request reserved them. None if there is no open hold of that id: it was never granted, or is resolved already."""
    row = db.execute(FIND_OPEN, {"request_id": end.request_id}).fetchone()
    if row is None:
        return None
    (multiplier, held, reserved), caller = row[:3], Caller(*row[3:])
    prompt, completion, estimated = end.bill or Bill(0, 0, False)
    charge = cost(prompt + completion, multiplier)
    # The caller is brought up to date first, so that `move` sees what lapses now.
    from_free = min(caller.free, charge, reserved if caller.free_is_past(now) else charge)
    caller.free -= from_free
    caller.free_held -= reserved

    changes = {"hold": -held, "free_held": -reserved, "opened": -1, "charge": charge, "free_charge": from_free}
    used = {"prompt_tokens": prompt, "completion_tokens": completion, "estimated": int(estimated)}
    state = "void" if end.bill is None else "settled"
    move(db, now, caller, RESOLVE_REQUEST, {**end._asdict(), **used, **changes, "state": state})
    return Settled(charge, caller.credits - caller.lapsing(now) - (charge - from_free))


def recover(db: Database, now: int) -> int:
    """Settle what a crash left open, at the prompt's estimate and the count of the last extend; how many there were."""
    rows = db.execute("SELECT id, prompt_estimate, count FROM request WHERE state = 'open'").fetchall()
    for request_id, prompt, count in rows:
        settle(db, now, Resolution(request_id, "interrupted", None, Bill(prompt, count, True)))
    return len(rows)


def insert(db: Database, table: str, **row: Any) -> int:
    """A new row, its columns as they are called here; its id."""
    sql = f"INSERT INTO {table} ({', '.join(row)}) VALUES (:{', :'.join(row)}) RETURNING id"
    return int(db.execute(sql, row).fetchone()[0])


def create_account(db: Database, now: int, name: str, tier: str, free: int, free_days: int) -> int:
    """An account with its free credits; its id."""
    end = now + free_days * 86_400_000 if free else None
    given = {"free": free, "granted": free, "free_expires_at": end}
    account_id = insert(db, "account", name=name, tier=tier, created_at=now, **given)
    if free:
        grant = {"account_id": account_id, "kind": "free", "amount": free}
        insert(db, "credit_grant", **grant, created_at=now, expires_at=end)
    return account_id


def create_key(db: Database, now: int, account_id: int, **more: Any) -> tuple[str, int]:
    """A new key, which nobody can read again, and its id; `more` are its label and its own limits."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    row = {"account_id": account_id, "hash": hash_key(key), "hint": f"…{key[-4:]}", "created_at": now}
    return key, insert(db, "api_key", **row, **more)


def hash_key(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def create_owner(db: Database, now: int, config: Config) -> str | None:
    """The first account of a new database, and its key; None if there is an account already."""
    if db.execute("SELECT 1 FROM account").fetchone():
        return None
    tier = "unlimited" if "unlimited" in config.tiers else config.default_tier
    account_id = create_account(db, now, "owner", tier, config.free_credits.amount, config.free_credits.days)
    return create_key(db, now, account_id)[0]


# ---- Ledger: the one writer -----------------------------------------------------------------------------------------


class Entry(msgspec.Struct, eq=False):
    """A verb in the ledger's queue; one that must be done stays there until it is in the database. A commit outlives
    the process; one that is power-proof is on the disk before anybody hears of it. Holds and extends need not be:
    should the power fail, an answer that was under way may be forgotten, none that ended."""

    verb: Verb
    future: Any = None
    whose: Any = None  # the account's id or the key's hash: several boxes lock their accounts in order
    must_be_done: str = ""  # what the log calls it, if it is done only after nobody waits any more
    power_proof: bool = True
    writes: bool = True
    queued: float = 0


class Connection(sqlite3.Connection):
    """SQLite's, whose `commit`, which aiosqlite calls in its thread, runs a whole batch: one hop for all of it."""

    batch: Sequence[Entry] = ()
    outcomes: Sequence[Any] = ()

    def commit(self) -> None:
        self.outcomes = run_batch(self, self.batch)

    def begin(self, batch: Sequence[Entry]) -> int:
        """Begin a transaction, which only waits for the write lock if a verb writes; the database's time in ms."""
        self.execute(f"PRAGMA synchronous = {'FULL' if any(entry.power_proof for entry in batch) else 'NORMAL'}")
        self.execute("BEGIN IMMEDIATE" if any(entry.writes for entry in batch) else "BEGIN")
        return now_ms()


def connect(config: Config, busy_seconds: float = 30) -> Any:
    """A connection to the ledger, which is made if it is new. A command waits for the server's short transactions."""
    if config.is_postgres:
        return require_extra("postgres").connect(config)
    path = config.database_path
    db = sqlite3.connect(path, isolation_level=None, timeout=busy_seconds, factory=Connection)
    for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        db.execute(f"PRAGMA {pragma}")
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version not in (0, SCHEMA_VERSION):
        why = "a newer proxy made it" if version > SCHEMA_VERSION else "`serve` brings it up to date"
        raise CommandError(f"{path}: has the schema {version}, this proxy knows {SCHEMA_VERSION}: {why}")
    if version == 0:
        with transaction(db):
            if db.execute("PRAGMA user_version").fetchone() == (0,):  # nobody else made it meanwhile
                for statement in split_statements(SCHEMA):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    return db


def split_statements(script: str) -> list[str]:
    """A statement, also a trigger with others in it, ends with a `;` at the end of a line."""
    return [statement for part in script.split(";\n") if (statement := part.strip())]


@contextlib.contextmanager
def transaction(db: Any, batch: Sequence[Entry] = ()) -> Iterator[int]:
    """All or nothing; gives the database's time in ms."""
    try:
        yield db.begin(batch or [Entry(lambda db, now: None)])
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def run_batch(db: Any, batch: Sequence[Entry]) -> list[Any]:
    """Run verbs in one transaction; each one's outcome, or the exception that it met. A verb that fails is alone in it:
    the batch is rolled back, and each gets a transaction of its own. Those that only read wait for no write lock."""
    try:
        with transaction(db, batch) as now:
            return [entry.verb(db, now) for entry in batch]
    except Exception as error:
        if len(batch) == 1:
            return [error]
        if is_unavailable(error):
            return [error if entry.writes else run_batch(db, [entry])[0] for entry in batch]
    return [outcome for entry in batch for outcome in run_batch(db, [entry])]


def ledger_unavailable() -> Refusal:
    return Refusal("ledger_unavailable", "The ledger cannot be written at the moment. Try again shortly.")


def is_unavailable(outcome: Any) -> bool:
    """Whether the database could not do it: locked, full, gone. An IntegrityError is a bug of ours."""
    return type(outcome) in (sqlite3.OperationalError, sqlite3.DatabaseError)


class SqliteLedger:
    """Where the writer's batches run: SQLite in aiosqlite's thread. extras/boxes.py has one of the same shape."""

    box = 0
    sequence_bits = REQUEST_ID_BITS
    is_cut_off = False
    find_last = "SELECT coalesce(max(id), 0) FROM request"
    settle = staticmethod(settle)
    recover = staticmethod(recover)
    db: Connection

    async def open(self, config: Config) -> None:
        def connector() -> Connection:
            self.db = connect(config, BUSY_SECONDS)
            return self.db

        self.thread = await aiosqlite.Connection(connector, iter_chunk_size=1)

    async def run(self, batch: Sequence[Entry]) -> Sequence[Any]:
        self.db.batch = batch
        await self.thread.commit()
        return self.db.outcomes

    async def close(self) -> None:
        await self.thread.close()


class Ledger:
    """The one writer. All that is queued runs in one transaction and one hop to the database's thread; the next batch
    forms meanwhile, without a timer. Nothing is tied to the task that asked: an answer nobody awaits is dropped."""

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config, self.say = config, say
        self.database = require_extra("boxes").PostgresLedger(say) if config.is_postgres else SqliteLedger()
        self.queue: list[Entry] = []
        self.unavailable = False
        self.transactions = self.verbs = self.ticks = 0
        self.writer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the database, make it if it is new, and settle what a crash left open."""
        await self.database.open(self.config)
        if recovered := await self.submit(self.database.recover):
            self.say(f"recovered {recovered} requests that a crash interrupted; `audit` proves the books")
        find_last = self.database.find_last
        last_id = await self.submit(lambda db, now: db.execute(find_last).fetchone()[0])
        self.ticks = (last_id >> REQUEST_ID_BITS) + 1 << self.database.sequence_bits

    async def close(self) -> None:
        """Wait for what must be done, but not for ever: recovery settles at the next start what cannot be written."""
        give_up = time.monotonic() + SETTLE_PATIENCE_SECONDS
        if self.writer is not None:
            while not self.writer.done() and (left := give_up - time.monotonic()) > 0:  # a submit may start another
                await asyncio.wait([self.writer], timeout=left)
            self.writer.cancel()
            await self.database.close()

    def next_id(self) -> int:
        """Milliseconds, the number of the box, a sequence; a full millisecond takes the next."""
        bits = self.database.sequence_bits
        self.ticks = max(self.ticks + 1, now_ms() << bits)
        ms, sequence = divmod(self.ticks, 1 << bits)
        return ms << REQUEST_ID_BITS | self.database.box << BOX_SHIFT | sequence

    def submit(self, verb: Verb, **how: Any) -> asyncio.Future[Any]:
        """Queue a verb (`how`: see `Entry`). The future has its outcome once it is committed; a Refusal is raised."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.queue.append(Entry(verb, future, queued=time.monotonic(), **how))
        if self.writer is None or self.writer.done():
            self.writer = asyncio.create_task(self.write())
        return future

    async def write(self) -> None:
        while self.queue:
            waiting = 0
            while waiting < len(self.queue):  # whoever is ready in this pass of the loop comes along
                waiting = len(self.queue)
                await asyncio.sleep(0)
            batch, self.queue = self.queue, []
            self.transactions += 1
            self.verbs += len(batch)
            try:
                outcomes = await self.database.run(batch)
            except Exception as error:
                outcomes = [error] * len(batch)
            left = [entry for entry, outcome in zip(batch, outcomes, strict=True) if not self.deliver(entry, outcome)]
            if left:
                self.queue[:0] = left
                await asyncio.sleep(RETRY_SECONDS)

    def deliver(self, entry: Entry, outcome: Any) -> bool:
        """Hand an outcome to who awaits it; False if the verb must be tried again."""
        failed = is_unavailable(outcome)
        if failed != self.unavailable and entry.writes:
            self.unavailable = failed
            self.say(f"ledger unavailable: {outcome}" if failed else "ledger available again")
        if failed:
            if entry.must_be_done and time.monotonic() - entry.queued < SETTLE_PATIENCE_SECONDS:
                return False
            outcome = ledger_unavailable()
        if not entry.future.done():
            if isinstance(outcome, Exception):
                entry.future.set_exception(outcome)
                entry.future.exception()  # whoever awaits it sees it; where nobody does, nothing is to be said
            else:
                entry.future.set_result(outcome)
        elif entry.must_be_done and not failed and (isinstance(outcome, Exception) or not entry.future.cancelled()):
            how = "FAILED" if isinstance(outcome, Exception) else "is in the ledger now"
            self.say(f"{entry.must_be_done} {how}: {outcome}")
        return not (failed and entry.must_be_done)

    def identify(self, key_hash: bytes) -> asyncio.Future[Caller]:
        """The key's account; Refusal 401 if there is none."""
        verb = partial(find_caller, key_hash=key_hash)
        return self.submit(verb, whose=key_hash, power_proof=False, writes=False)

    def ping(self) -> asyncio.Future[None]:
        """Refusal 503 unless the database answers and its write lock can be had."""
        return self.submit(lambda db, now: None, power_proof=False)


class Hold:
    """The credits that one request reserves. `async with` takes it, and every way out of the block resolves it, once.

    What is owed: nothing, if no upstream was `sent` the request. Else, by `outcome`: "ok" owes the usage, a client that
    is gone or stalled the prompt and what came, anything else the same if something came, and nothing if not."""

    def __init__(self, ledger: Ledger, order: Order, meter: Meter) -> None:
        self.ledger, self.order, self.meter = ledger, order, meter
        self.sent = False
        self.outcome = "client_gone"
        self.upstream: str | None = None
        self.first_byte_ms: int | None = None
        self.resolution: Resolution | None = None
        self.settled: Settled | None = None
        self.lowered_to: int | None = None  # the maximum a choice, where the balance pays for less than was asked for
        self.watermark = self.granted = self.spare = 0  # a count past `watermark` is for `cover`
        self.at_limit = False  # past the bound, with no more credits to be had
        self.next_slice: asyncio.Future[int] | None = None  # asked ahead

    async def __aenter__(self) -> Hold:
        verb = partial(hold, order=self.order, limits_of=self.ledger.config.limits)
        try:
            admission: Admission = await self.ledger.submit(verb, whose=self.order.key_hash, power_proof=False)
        except asyncio.CancelledError:
            self.submit_resolution()  # behind the hold in the queue, so it finds what that did
            raise
        self.caller, max_tokens, self.granted, self.spare = admission
        self.bound = max_tokens * self.order.choices
        self.lowered_to = max_tokens if max_tokens < self.order.max_tokens else None
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.resolution is None and isinstance(error, Exception):
            self.outcome = error.code if isinstance(error, Refusal) else "internal_error"
        with contextlib.suppress(Refusal):  # the ledger keeps trying; the error on its way out matters more
            await self.settle()

    async def settle(self) -> None:
        """Resolve the hold by `outcome`, and wait until that is committed. Refusal 503 if it cannot be, for now."""
        if self.resolution is None:
            self.settled = await self.submit_resolution()

    def submit_resolution(self) -> asyncio.Future[Any]:
        """Queue the settle: a bill of what is owed, or none, which voids the hold."""
        complete = self.outcome == "ok"
        is_owed = complete or self.outcome in ("client_gone", "client_stalled") or self.meter.produced
        bill = self.meter.bill(self.order.prompt_estimate, complete) if self.sent and is_owed else None
        request_id = self.order.request_id
        end = Resolution(request_id, self.outcome, self.upstream, bill, self.first_byte_ms, self.order)
        self.resolution = end
        verb = partial(self.ledger.database.settle, end=end)
        name = f"the settle of {request_name(request_id)}"
        return self.ledger.submit(verb, whose=self.order.key_hash, must_be_done=name)

    def needed(self, tally: Meter) -> int:
        """How many tokens of output must be held. The upstream was told to stop at the bound, so an estimate past it
        may be too high: where credits end there, only the certain count says that the upstream goes on regardless."""
        return tally.count_certain if self.at_limit else tally.count

    async def cover(self, tally: Meter) -> bool:
        """Whether credits for what `tally` counted are held; False if the account cannot pay for more, Refusal 503 if
        the ledger cannot be written. In this order: the slice that was asked ahead; more credits; what was spared for
        the template; past the bound, where the upstream stops, the count that is certain is enough."""
        if self.next_slice is not None:  # `watermark` is the slice's end since it was asked for: now it is needed
            with contextlib.suppress(Refusal):  # then it is asked for again
                self.granted += await self.next_slice
            self.next_slice = None
        while (needed := self.needed(tally)) > self.granted:
            tokens = await self.ask_slice(tally, needed - self.granted)
            if tokens == 0:
                tokens, self.spare = self.spare, 0
            if tokens == 0:
                if self.at_limit or self.granted < self.bound:
                    return False
                self.at_limit = True
            self.granted += tokens
        self.watermark = self.granted
        if self.granted < self.bound:  # there the answer ends, and nothing more is asked ahead
            self.watermark -= (self.order.slice_tokens or 0) // 2
            if tally.count > self.watermark:
                self.next_slice, self.watermark = self.ask_slice(tally), self.granted
        return True

    async def cover_bill(self, tally: Meter) -> bool:
        """Whether the credits for a whole answer are held: where a stream was asked for, only a slice is."""
        if self.order.slice_tokens is None:
            return True
        bill = tally.bill(self.order.prompt_estimate, complete=True)
        short = bill.prompt_tokens + bill.completion_tokens - 2 * self.order.prompt_estimate - self.granted
        return short <= 0 or await self.ask_slice(tally, short) >= short

    def ask_slice(self, tally: Meter, least: int = 1) -> asyncio.Future[int]:
        """Ask for what makes a slice beyond the count, which is noted before it is sent: a crash loses no more than a
        slice. That is half a slice if it is asked ahead, and at least what the read needs."""
        size = self.order.slice_tokens or self.ledger.config.hold_output_tokens
        tokens = min(size, tally.count + size - self.granted)
        if self.granted < self.bound:
            tokens = min(tokens, self.bound - self.granted)
        verb = partial(extend, request_id=self.order.request_id, tokens=max(tokens, least), count=tally.count)
        return self.ledger.submit(verb, whose=self.order.key_hash, power_proof=False)


def request_name(request_id: int) -> str:
    return f"req_{request_id:016x}"


def extra(name: str) -> Any:
    """A companion of extras/, or None where it, or a package that it needs, is not there."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(f"extras.{name}")
    return None


def require_extra(name: str) -> Any:
    if module := extra(name):
        return module
    raise CommandError(f"extras/{name} is missing beside proxy.py, or a package that it needs is not installed")


# ---- Relay: asking an upstream --------------------------------------------------------------------------------------

TO_CLIENT = ("Content-Type", "Cache-Control", "Retry-After", "openai-processing-ms", "X-Accel-Buffering")
KEEP_ALIVE = b": keep-alive\n"  # no empty line: after an `id:` openai-python takes one for an event
ESCAPES = {"/": r"\\?/", '"': r'\\?"', "\\": r"\\{1,2}"}

asking: contextvars.ContextVar[Hold | None] = contextvars.ContextVar("asking", default=None)


class Connector(aiohttp.TCPConnector):
    """A pooled connection that is closed, or holds bytes that nobody asked for, is not used."""

    async def connect(self, *args: Any, **options: Any) -> Any:
        while True:
            connection = await super().connect(*args, **options)
            protocol = connection.protocol
            transport = protocol.transport if protocol is not None and not protocol.should_close else None
            if transport and not is_ready(transport.get_extra_info("socket").fileno(), select.POLLIN):
                if hold := asking.get():
                    hold.sent = True  # from here on the request may cost something
                return connection
            connection.close()


def is_ready(descriptor: int, what: int) -> bool:
    """Whether it can be read, or written, without waiting."""
    poll = select.poll()
    poll.register(descriptor, what)
    return bool(poll.poll(0))


def secret_pattern(upstreams: Iterable[Upstream]) -> re.Pattern[bytes]:
    """Finds what must reach nobody: keys and the values of headers, with and without their scheme, also as JSON may
    escape them."""
    values = [value for upstream in upstreams for value in (upstream.api_key or "", *upstream.headers.values())]
    secrets = {part for value in values for part in (value, value.split(" ")[-1]) if len(part) >= 4}
    spelled = (
        "".join(f"(?:{ESCAPES.get(c, re.escape(c))}|\\\\u{ord(c):04x})" for c in secret)
        for secret in sorted(secrets, key=len, reverse=True)
    )
    return re.compile("|".join(spelled).encode() or rb"(?!)", re.IGNORECASE)


def read_error(api: Api, body: bytes) -> tuple[str, bytes | None]:
    """The sentence in an upstream's error, whatever its shape; and the body itself, if the API's clients read it."""
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return "", None
    own = None
    with contextlib.suppress(LookupError, TypeError):
        own = body if api.is_error(value) else None
    error = value.get("error") or value.get("detail") or value.get("message") if isinstance(value, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return (said if isinstance(said, str) else ""), own


class Answer:
    """An upstream's answer that has begun: a stream with its first events, or a whole body. Owns the response's end."""

    def __init__(self, exchange: Exchange, response: aiohttp.ClientResponse, upstream: Upstream) -> None:
        self.exchange = exchange
        self.response = response
        self.upstream = upstream
        self.is_stream = response.content_type == "text/event-stream"
        self.splitter = Splitter()
        self.begun = b""  # a stream's first events; of what is no stream all of it,
        self.tally: Meter  # and what was counted of that

    def close(self) -> None:
        """Back to the pool if the answer was read to its end, else cut: the upstream stops generating."""
        if self.response.content.is_eof():
            self.response.release()
        else:
            self.response.close()

    async def read(self) -> bytes:
        """What came; nothing at the end. After the first byte an upstream may be silent for less long."""
        read = await self.response.content.readany()
        self.exchange.heard_at, self.exchange.patience = time.monotonic(), self.upstream.idle_seconds
        return read

    async def next_block(self) -> bytes:
        """The whole events of the next read that completes one; nothing at the end of the answer."""
        while read := await self.read():
            if block := self.splitter.feed(read):
                return block
        return b""

    async def read_whole(self, bytes_max: int, keep: Callable[[int], None]) -> bytes:
        """The body, read piece by piece so that silence can be told from a long answer."""
        pieces, size = [], 0
        while read := await self.read():
            pieces.append(read)
            size += len(read)
            if size > bytes_max:
                raise BrokenStream(f"a body of more than {bytes_max} bytes")
            if size > SMALL_BYTES:  # what is small is not counted
                keep(len(read))
        return b"".join(pieces)


class ClientGone(asyncio.CancelledError):
    """A write found that nobody is there: what was to be written was not sent."""


class Exchange:
    """One request and what became of it, from the first header to its log line."""

    def __init__(self, request_id: int, request: web.BaseRequest) -> None:
        self.id, self.name = request_id, request_name(request_id)
        self.request = request
        self.task = asyncio.current_task()
        self.started = time.monotonic()
        self.api = CHAT  # whose shape an error has
        self.caller: Caller | None = None
        self.model: Model | None = None
        self.hold: Hold | None = None
        self.client: web.StreamResponse | None = None
        self.writer: AbstractStreamWriter | None = None
        self.status = 499
        self.outcome = "client_gone"
        self.first_byte_ms: int | None = None
        self.memory = 0  # bytes of a large body and a large whole answer
        # What the watch looks at.
        self.waits = False  # for the upstream or the client, and may be interrupted
        self.patience = float("inf")  # seconds without a byte of the upstream's
        self.heard_at = self.sent_at = self.started
        self.interruption: Refusal | None = None

    def interrupt(self, why: Refusal) -> None:
        """End the wait that the exchange is in; `why` is raised there."""
        if self.waits and self.interruption is None and self.task is not None:
            self.interruption = why
            self.task.cancel()

    def waiting(self, patience: float = float("inf")) -> Exchange:
        """`with` it, the exchange waits for others, and may be interrupted."""
        self.patience, self.heard_at = patience, time.monotonic()
        return self

    def __enter__(self) -> None:
        self.waits = True

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.waits = False
        why, self.interruption = self.interruption, None
        if why is not None and self.task is not None:
            self.task.uncancel()
            if isinstance(error, asyncio.CancelledError):
                raise why from None

    async def send(self, data: bytes, is_end: bool = False) -> None:
        """Write to the client, its headers first; past `web.StreamResponse`, which is a layer less a chunk. A client
        that is gone is a cancellation, however it is noticed."""
        assert self.client is not None
        try:
            if self.writer is None:
                self.writer = await self.client.prepare(self.request)
                assert self.writer is not None
                self.first_byte_ms = round(1000 * (time.monotonic() - self.started))
                if self.hold is not None:
                    self.hold.first_byte_ms = self.first_byte_ms
            await (self.client.write_eof(data) if is_end else self.writer.write(data))
        except ConnectionError as error:
            traceback.clear_frames(error.__traceback__)  # as in `Proxy.answer`
            raise ClientGone from None
        self.sent_at = time.monotonic()

    def end_uncleanly(self) -> None:
        """Close the connection without the body's last chunk, which every client sees as broken; flush first."""
        transport = self.request.transport
        if transport is not None:
            transport.close()
            asyncio.get_running_loop().call_later(FRAME_SECONDS, transport.abort)


# ---- Server ---------------------------------------------------------------------------------------------------------


def authenticate(request: web.BaseRequest) -> bytes:
    """The SHA-256 of the key that the request bears. `Bearer` is case-sensitive."""
    keys = request.headers.getall("x-api-key", [])
    for value in request.headers.getall("Authorization", []):
        scheme, _, key = value.partition(" ")
        keys = [*keys, key if scheme == "Bearer" else ""]
    if not keys or not all(key and " " not in key and key.isascii() and key.isprintable() for key in keys):
        message = "Send the header `Authorization: Bearer KEY`, or `x-api-key: KEY`, with your API key."
        raise Refusal("missing_api_key", message)
    if len(set(keys)) > 1:
        raise Refusal("invalid_api_key", "The request bears two different API keys. Send one.")
    return hash_key(keys[0])


class Handler(web.RequestHandler):
    """aiohttp's, with our shape for bytes that are no HTTP."""

    __slots__ = ()

    def handle_error(self, request: Any, status: int = 500, exc: Any = None, message: Any = None) -> web.StreamResponse:
        code, said = "internal_error", "The proxy failed."
        if status < 500:
            code, said = "invalid_json", "These bytes are no HTTP request that can be read."
        refusal = Refusal(code, said, status=status)
        headers = {"Content-Type": "application/json", "Server": "llm-proxy"}
        response = web.Response(status=status, body=encode_json(openai_error(refusal, "")), headers=headers)
        response.force_close()
        return response


class Server(web.Server):
    def __init__(self, answer: Callable[[web.BaseRequest], Any], **options: Any) -> None:
        super().__init__(answer, handler_cancellation=True, **options)
        self.options = options
        self.stalls: dict[asyncio.Transport, tuple[int, float]] = {}

    def __call__(self) -> web.RequestHandler:
        return Handler(self, loop=asyncio.get_running_loop(), **self.options)

    def stalled(self, now: float, seconds: float) -> list[asyncio.Transport]:
        """Connections whose client has taken nothing for that long, of any answer."""
        found: dict[asyncio.Transport, tuple[int, float]] = {}
        for handler in self.connections:
            transport = handler.transport
            if transport is not None and (unsent := transport.get_write_buffer_size()):
                least, since = self.stalls.get(transport, (unsent + 1, now))
                found[transport] = (unsent, now) if unsent < least else (least, since)
        self.stalls = found
        return [transport for transport, (_, since) in found.items() if now - since >= seconds]


class Proxy:
    """The server: its parts, and the handlers that use them."""

    def __init__(self, config: Config, catalog: Catalog, log: Log, echo_url: str = "") -> None:
        self.config, self.catalog = config, catalog
        self.log = log
        self.echo_url = echo_url
        self.ledger = Ledger(config, log.say)
        self.seen = list(config.upstreams.values())  # since the start: a request may still use what a reload took out
        self.secrets = secret_pattern(self.seen)
        self.companions: dict[str, Callable[[Exchange], Any]] = {}  # pages of extras/, by path
        self.metrics: Any = None
        self.console: Any = None
        self.exchanges: set[Exchange] = set()
        self.draining = False
        self.files = self.files_seen = file_state(config)
        self.server: Server
        self.session: aiohttp.ClientSession
        self.base_url = ""

    def redact(self, data: bytes) -> bytes:
        """What came from an upstream and is no answer, without any secret of config.yaml."""
        return self.secrets.sub(b"[redacted]", data)

    def why_off(self, upstream: Upstream) -> str:
        """Why an upstream is never asked, if it is not."""
        if upstream.missing:
            return f"the environment variable {upstream.missing[0]} is not set"
        return "extras/echo.py is not there" if upstream.builtin and not self.echo_url else ""

    def is_there(self, upstream: Upstream) -> bool:
        return not self.why_off(upstream) and upstream.state.reached is not False

    def is_available(self, model: Model) -> bool:
        return any(map(self.is_there, self.upstreams_of(model)))

    def upstreams_of(self, model: Model) -> list[Upstream]:
        return [self.config.upstreams[name] for name in model.upstreams if name in self.config.upstreams]

    def count(self, what: str, *labels: str) -> None:
        if self.metrics is not None:
            getattr(self.metrics, what).labels(*labels).inc()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request: route it, turn a refusal into its answer, send it, and leave one log line."""
        exchange = Exchange(self.ledger.next_id(), request)
        self.exchanges.add(exchange)
        try:
            response = exchange.client = await self.respond(exchange)
            if not response.prepared:
                with exchange.waiting():
                    await exchange.send(b"", is_end=True)
            return response
        except Refusal:  # the server stops, and the client does not read
            exchange.end_uncleanly()
            raise asyncio.CancelledError from None
        except asyncio.CancelledError as gone:
            traceback.clear_frames(gone.__traceback__)  # which asyncio keeps, and with them a cut answer's bytes
            raise
        finally:
            self.exchanges.discard(exchange)
            exchange.client = exchange.task = None
            self.log.request(exchange)
            if self.metrics is not None:
                self.metrics.count(exchange)

    async def respond(self, exchange: Exchange) -> web.StreamResponse:
        try:
            response = await self.route(exchange)
            exchange.outcome = exchange.hold.outcome if exchange.hold else "ok"
            return response
        except Refusal as error:
            refusal = error.with_traceback(None)  # whose frames hold the body, and this one the error: a cycle
        except Exception:
            self.log.say(f"{exchange.name} failed\n{traceback.format_exc()}")
            message = f"The proxy failed. Its log has more under {exchange.name}."
            refusal = Refusal("internal_error", message)
        exchange.outcome = refusal.code
        if exchange.client is not None and exchange.client.prepared:
            exchange.end_uncleanly()
            return exchange.client
        exchange.caller = exchange.caller or refusal.caller
        body = refusal.body or encode_json(exchange.api.error(refusal, exchange.name))
        return self.show(exchange, body, refusal.status, refusal.headers)

    def show(self, exchange: Exchange, value: Any, status: int = 200, more: Mapping[str, str] = {}) -> web.Response:
        """A whole answer of ours: bytes, or a value as JSON."""
        exchange.status = status
        headers = {**self.headers(exchange), "Content-Type": "application/json", **more}
        body = value if isinstance(value, bytes) else encode_json(value)
        return web.Response(status=status, body=body, headers=headers)

    def headers(self, exchange: Exchange) -> dict[str, str]:
        """The headers of every answer: what is known of key and model by now."""
        headers = {"Server": "llm-proxy", **dict.fromkeys(exchange.api.id_headers, exchange.name)}
        if exchange.caller is not None:
            limit = self.config.limits(exchange.caller.tier).requests_per_minute
            if limit is not None:
                minute = int(time.time()) // 60
                headers["X-RateLimit-Limit"] = str(limit)
                headers["X-RateLimit-Remaining"] = str(max(0, limit - exchange.caller.requests_in(minute)))
                headers["X-RateLimit-Reset"] = str((minute + 1) * 60)
        if exchange.model and (deprecated := exchange.model.deprecation(time.time())):
            headers["Deprecation"] = f"@{unix_day(deprecated.announced)}"  # RFC 9745
            headers["Sunset"] = formatdate(unix_day(deprecated.sunset), usegmt=True)  # RFC 8594
        if exchange.hold and exchange.hold.lowered_to is not None:
            headers["x-max-tokens-limited"] = str(exchange.hold.lowered_to)
        if self.draining:
            headers["Connection"] = "close"  # so that the client's next connection finds another server
        return headers

    async def route(self, exchange: Exchange) -> web.StreamResponse:
        """Find the handler by path and method. Under /v1 an unknown key sees 401, whatever else is wrong."""
        path, method = exchange.request.path, exchange.request.method
        private = path.startswith(("/v1/", "/api/"))
        plain = path.removeprefix("/api") if path.startswith("/api/v1/") else path
        name = plain.removeprefix("/v1/")
        api = APIS.get(name) if private else None
        exchange.api = api or exchange.api
        if api and method == "POST" and not self.draining:
            return await self.complete(exchange, api)
        if private:
            await self.identify(exchange, authenticate(exchange.request))
        if self.draining:
            raise shutting_down()
        handler: Callable[[Exchange], Any] | None = {
            "/health": self.show_health,
            "/v1/models": self.list_models,
            "/api/billing/subscription": self.show_subscription,
            **self.companions,
        }.get(plain)
        if private and name.startswith("models/"):
            handler = partial(self.show_model, name=name.removeprefix("models/"))
        if handler is None and not private and self.console is not None:
            handler = self.console.answer
        elif api or (handler is not None and method not in ("GET", "HEAD")):
            allowed = "POST" if api else "GET, HEAD"
            message = f"{path} takes {allowed}, not {quoted(method)}."
            raise Refusal("method_not_allowed", message, headers={"Allow": allowed})
        if handler is None:
            stored = "Responses are not stored here, so there is none to get or delete."
            message = f"There is nothing at {quoted(path)}. {LIST_OF_APIS}"
            raise Refusal("not_found", stored if private and name.startswith("responses/") else message)
        response: web.StreamResponse = await handler(exchange)
        return response

    async def complete(self, exchange: Exchange, api: Api) -> web.StreamResponse:
        """A request's life; the numbers are those of the story at the top of this file."""
        key_hash = authenticate(exchange.request)  # 1
        try:
            raw = await self.read_body(exchange, key_hash)
            aside = len(raw) > AT_ONCE_BYTES
            ask = await asyncio.to_thread(parse_request, api, raw) if aside else parse_request(api, raw)  # 2
            if ask.model not in self.catalog.names:
                await self.identify(exchange, key_hash)  # before near names are looked for
            model, upstreams = self.find_model(ask)  # 3, and a reload changes them for nobody who has them
        except Refusal:
            await self.identify(exchange, key_hash)
            raise
        exchange.model = model
        meter = Meter(api, ask.choices, ask.prompts, ask.wants_usage)  # whose usage_of is the asked upstream's
        async with Hold(self.ledger, self.order(exchange, ask, model, key_hash), meter) as hold:  # 4
            exchange.hold, exchange.caller = hold, hold.caller
            try:
                with contextlib.closing(await self.open_upstream(exchange, ask, upstreams, hold)) as answer:  # 5
                    del raw, ask
                    if answer.is_stream:
                        last = await self.relay(exchange, answer, hold)  # 6
                    elif await hold.cover_bill(answer.tally):
                        hold.meter, last = answer.tally, answer.begun
                    else:
                        hold.sent = False  # nobody gets the answer, so nobody pays for it
                        raise used_up(hold)
                    await self.finish(exchange, answer, hold, last)  # 7
            except Refusal as refusal:
                if exchange.client is None or not exchange.client.prepared:
                    raise
                await self.break_off(exchange, hold, refusal.with_traceback(None))
        assert exchange.client is not None
        return exchange.client

    def find_model(self, ask: Ask) -> tuple[Model, list[Upstream]]:
        """The model, and those of its upstreams that serve the API."""
        model = self.catalog.find(ask.model, time.time())
        if not model.takes(ask.api):
            kind = f'The model "{model.name}" is of the kind {model.kind}, which /v1/{ask.api.path} is not for.'
            raise Refusal("validation_failed", kind, param="model", top={"errors": {"model": [kind]}})
        upstreams, names = self.upstreams_of(model), {ask.api.path, ask.api.part_of}
        serving = [upstream for upstream in upstreams if upstream.serves is None or names & set(upstream.serves)]
        if not serving:
            served = sorted({path for upstream in upstreams for path in upstream.serves or ()})
            message = f'The model "{model.name}" does not take /v1/{ask.api.path}. It takes {", ".join(served)}.'
            raise Refusal("not_found", message, param="model")
        return model, serving

    def order(self, exchange: Exchange, ask: Ask, model: Model, key_hash: bytes) -> Order:
        prompt = model.prompt_tokens(ask)
        most = ask.max_tokens or model.output_tokens(-(-prompt // ask.prompts))
        return Order(
            request_id=exchange.id,
            key_hash=key_hash,
            model=model,
            multiplier=model.price if ask.api.priced else 0,
            prompt_estimate=prompt,
            template_tokens=ask.api.template_tokens if ask.api.priced else 0,
            choices=ask.choices,
            max_tokens=most if ask.choices else 0,
            slice_tokens=(model.hold_output_tokens or self.config.hold_output_tokens) if ask.stream else None,
        )

    async def identify(self, exchange: Exchange, key_hash: bytes) -> Caller:
        """Look the key up, for what is refused before the hold, and for what needs none."""
        if exchange.caller is None:
            exchange.caller = await self.ledger.identify(key_hash)
        return exchange.caller

    async def read_body(self, exchange: Exchange, key_hash: bytes) -> bytes | bytearray:
        """The whole body. A large one is read for an account that may send one; one that comes too slowly is given
        up."""
        request, content = exchange.request, exchange.request.content
        if content.is_eof() and content.total_bytes <= SMALL_BYTES:
            return content.read_nowait()
        body, elements, most = bytearray(), 0, self.config.max_body_mb
        started = asyncio.get_running_loop().time()
        try:
            with exchange.waiting():
                async with asyncio.timeout(BODY_SECONDS) as limit:
                    while True:
                        expected = max(request.content_length or 0, len(body))
                        if expected > most * 1024**2:
                            raise Refusal("body_too_large", f"The request body is larger than {most} MB.")
                        if expected > SMALL_BYTES:
                            await self.admit_large(exchange, key_hash, len(body))
                        if not body and request.headers.get("Expect", "").lower() == "100-continue":
                            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                            request.writer.output_size = 0
                        if not (read := await content.readany()):
                            return body
                        body += read
                        elements += sum(map(read.count, (b"{", b"[", b",")))
                        if elements > BODY_ELEMENTS_MAX:
                            message = f"The request body has more than {BODY_ELEMENTS_MAX} members and elements."
                            raise Refusal("invalid_json", message)
                        limit.reschedule(started + BODY_SECONDS + len(body) / BODY_BYTES_PER_SECOND)
        except TimeoutError:
            raise Refusal("request_timeout", "The request body came too slowly. Send it again.") from None
        except (web.RequestPayloadError, aiohttp.ClientPayloadError):
            message = "The request body cannot be decoded. Does its Content-Encoding say what it is?"
            raise Refusal("invalid_json", message) from None

    async def admit_large(self, exchange: Exchange, key_hash: bytes, size: int) -> None:
        """Look at the account before its large body is taken, and count what is kept of it."""
        if exchange.caller is None:
            caller = await self.identify(exchange, key_hash)
            refusal = is_suspended(caller) or over_limits(caller, self.config.limits(caller.tier), now_ms())
            if refusal is None and caller.credits <= 0:
                refusal = caller.refuse("insufficient_credits", "The account has no credits. Add some.", credits=0)
            if refusal:
                raise refusal
        self.keep(exchange, size - exchange.memory)

    def keep(self, exchange: Exchange, size: int) -> None:
        """Count bytes that are kept for an exchange; refused where all together, or the account's, are too many."""
        assert exchange.caller is not None
        account_id, kept = exchange.caller.account_id, exchange.memory + size
        others = [other for other in self.exchanges if other.memory and other is not exchange]
        mine = sum(other.memory for other in others if other.caller and other.caller.account_id == account_id)
        if mine and mine + kept > MEMORY_BYTES_MAX // 4:
            message = "Large requests of this account are under way. Wait for one to end."
            raise Refusal("too_many_parallel_requests", message, headers=retry_after(1), top={"retry_after": 1})
        if others and sum(other.memory for other in others) + kept > MEMORY_BYTES_MAX:
            raise Refusal("overloaded", "Too many large requests are under way. Try again.", headers=retry_after(1))
        exchange.memory = kept

    # -- opening an upstream

    async def open_upstream(self, exchange: Exchange, ask: Ask, upstreams: list[Upstream], hold: Hold) -> Answer:
        """The first answer that begins, of the model's upstreams in order. An upstream that just failed to connect
        is left out while there is another. The last refusal is the client's."""
        now = time.monotonic()
        for upstream in [u for u in upstreams if u.state.cooling_until <= now] or upstreams:
            hold.upstream, state = upstream.name, upstream.state
            hold.meter.usage_of = upstream.usage_of
            body = forward_body(ask, hold.order.model, upstream, hold.lowered_to)
            try:
                if off := self.why_off(upstream):
                    headers = {"x-should-retry": "false"}
                    raise upstream.failure("upstream_unavailable", f"is off: {off}.", headers=headers)
                with exchange.waiting(upstream.first_byte_seconds):
                    response = await self.post(exchange, upstream, hold, body)
                    state.reached = True
                    answer = await self.begin_answer(exchange, Answer(exchange, response, upstream), hold)
                if answer.is_stream:
                    exchange.memory = 0
                return answer
            except Refusal as error:
                refusal = error.with_traceback(None)
            except Exception as error:
                self.log.broken(exchange, error)
                if hold.sent:
                    refusal = upstream.failure("upstream_error", "broke before it began to answer. Try again.")
                else:
                    state.reached, state.cooling_until = False, time.monotonic() + COOLDOWN_SECONDS
                    self.log.say(f"upstream {upstream.name} skipped for {COOLDOWN_SECONDS} s where another is there")
                    refusal = upstream.failure("upstream_unavailable", "cannot be connected to. Try again later.")
            self.count("failures", upstream.name, refusal.code)
            hold.sent = False  # an attempt that failed costs nothing
            if not refusal.moves_on or (exchange.client and exchange.client.prepared):
                break
            exchange.client = None  # of an answer that did not begin
        raise refusal

    async def post(self, exchange: Exchange, upstream: Upstream, hold: Hold, body: bytes) -> aiohttp.ClientResponse:
        """Send the request; once more if the connection, which was pooled, turns out to be dead."""
        request, api = exchange.request, exchange.api
        url = f"{self.echo_url if upstream.builtin else upstream.url}/{api.path}"
        if api.passes_query and (query := request.rel_url.raw_query_string):
            url += f"?{query}"
        headers = {"Accept": request.headers.get("Accept", "*/*")}
        headers |= {n: v for n, v in request.headers.items() if n.lower().startswith("anthropic-") and v.isprintable()}
        send = partial(
            self.session.post,
            URL(url, encoded=True),
            headers=headers | upstream.request_headers,
            timeout=upstream.timeout,
            allow_redirects=False,
        )
        asking.set(hold)
        for tries_left in (1, 0):
            try:
                return await send(data=body if len(body) <= AT_ONCE_BYTES else io.BytesIO(body))
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                if not tries_left or isinstance(error, aiohttp.ClientConnectorError):
                    raise
        raise AssertionError("the last try returns or raises")

    async def begin_answer(self, exchange: Exchange, answer: Answer, hold: Hold) -> Answer:
        """Wait for what shows that an answer is one: its first event that says something, or its whole body."""
        try:
            if answer.response.status != 200:
                raise await self.refused(exchange, answer)
            if not answer.is_stream:
                answer.begun = await answer.read_whole(ANSWER_BYTES_MAX, partial(self.keep, exchange))
                answer.tally = copy(hold.meter)
                if answer.tally.feed_whole(answer.begun):
                    answer.begun = self.redact(answer.begun)
                return answer
            stream = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
            headers = {**self.headers(exchange), **stream, **self.passed_on(answer)}
            exchange.status, exchange.client = 200, web.StreamResponse(headers=headers)
            if exchange.request.version < aiohttp.HttpVersion11:
                exchange.client.force_close()  # which knows of no chunks, so only that ends the body
            while not DATA_LINE.search(answer.begun):
                if not (block := await answer.next_block()):
                    raise BrokenStream("it ended before its first event")
                answer.begun += block
                if len(answer.begun) > EVENT_BYTES_MAX:
                    raise BrokenStream("it sends comments only")
        except BaseException:
            answer.close()
            raise
        return answer

    async def refused(self, exchange: Exchange, answer: Answer) -> Refusal:
        """What an upstream's status that is no success means for the client; what it says goes to the client, or where
        another upstream may answer into the log. 401, 402, 403 and 407 are about our key, not the client's."""
        status, upstream, body = answer.response.status, answer.upstream, b""
        with contextlib.suppress(BrokenStream):  # a body too long to pass on; the status says enough
            body = self.redact(await answer.read_whole(ERROR_BYTES_MAX, lambda size: None))
        said, own = read_error(exchange.api, body)
        retry = answer.response.headers.get("Retry-After", "")
        wait = retry_after(int(retry)) if re.fullmatch(r"[0-9]{1,9}", retry) else {}
        if 400 <= status < 500 and status not in (401, 402, 403, 407):
            code = "rate_limit_exceeded" if status == 429 else "upstream_refused"
            message = said or f'The upstream "{upstream.name}" refused the request with status {status}.'
            if status == 404 and own is None:
                where = f'The upstream "{upstream.name}" has nothing at /{exchange.api.path}'
                message = f"{where}: it may not serve this API. {said}"
            refusal = Refusal(code, message, status=status, headers=wait, body=own, moves_on=status == 429)
        elif status == 503:
            what = "is not available at the moment. Try again later."
            refusal = upstream.failure("upstream_unavailable", what, headers=wait)
        else:
            refusal = upstream.failure("upstream_error", f"answered with status {status}. Try again later.")
        if refusal.moves_on:
            words = " ".join((said or body.decode(errors="replace")).split())[:300]
            self.log.say(f"{exchange.name} upstream {upstream.name} answered with status {status}: {words}")
        return refusal

    def passed_on(self, answer: Answer) -> dict[str, str]:
        """The headers of an upstream's answer that reach the client."""
        found = {name: answer.response.headers.get(name, "") for name in TO_CLIENT}
        wait = found["Retry-After"]
        if not re.fullmatch(r"[0-9]{1,2}", wait) or int(wait) > RETRY_AFTER_SECONDS_MAX:
            found["Retry-After"] = ""
        return {n: v for n, v in found.items() if v and v.isprintable() and not self.secrets.search(v.encode())}

    # -- relaying

    async def relay(self, exchange: Exchange, answer: Answer, hold: Hold) -> bytes:
        """Whole events as they come, one write a read; the one that ends the stream, to be sent when it is settled. A
        block is counted on a copy of the meter, covered, and sent; then the copy stands for what is owed."""
        block, content, splitter = answer.begun, answer.response.content, answer.splitter
        try:
            with exchange.waiting(answer.upstream.idle_seconds):
                while True:
                    tally = copy(hold.meter)
                    out, last = tally.feed(block)
                    if tally.count > hold.watermark:
                        exchange.waits = False  # for nobody but the ledger, which has limits of its own
                        if not await hold.cover(tally):
                            raise await self.send_covered(exchange, hold, block)
                        exchange.waits = True
                    before, hold.meter = hold.meter, tally
                    try:
                        if out:
                            await exchange.send(out)
                    except (ClientGone, Exception):  # nothing of it was sent; a cancellation may come after it was
                        hold.meter = tally if before.finished else before  # usage stands, which is no text
                        raise
                    if tally.over or tally.broken:
                        break
                    block = b""
                    while not block and (read := await content.readany()):  # `answer.next_block`, two layers less
                        exchange.heard_at = time.monotonic()
                        block = splitter.feed(read)
                    if not block:
                        break
        except Refusal:
            raise
        except asyncio.CancelledError:
            if hold.meter.finished and not hold.meter.usage:
                await self.read_usage(answer, hold.meter)
            raise
        except (aiohttp.ClientError, OSError, BrokenStream) as error:
            self.log.broken(exchange, error)
            raise answer.upstream.failure("upstream_error", "broke off its answer.") from None
        if not hold.meter.ended and not hold.meter.broken:
            raise answer.upstream.failure("upstream_error", "ended its answer without finishing it.")
        return last

    async def send_covered(self, exchange: Exchange, hold: Hold, block: bytes) -> Refusal:
        """Credits are used up within a block: what of it is covered is sent, event by event."""
        start = 0
        for match in EMPTY_LINE.finditer(block):
            tally = copy(hold.meter)
            out, _ = tally.feed(block[start : match.end()])
            if hold.needed(tally) > hold.granted:
                break
            await exchange.send(out)
            hold.meter = tally
            start = match.end()
        return used_up(hold)

    async def finish(self, exchange: Exchange, answer: Answer, hold: Hold, last: bytes) -> None:
        """Settle, then send what ends the answer: all of it, where it came whole; of a stream the closing event, an
        error of the upstream's, or nothing. An upstream that sends no usage is named: its charges are estimates."""
        hold.outcome = "upstream_error" if hold.meter.broken or hold.meter.failed else "ok"
        if hold.outcome == "ok" and not hold.meter.usage and hold.meter.api.priced:
            name, state, now = answer.upstream.name, answer.upstream.state, time.monotonic()
            self.count("no_usage", name)
            if now - state.no_usage_said >= NO_USAGE_SECONDS:
                state.no_usage_said = now
                self.log.say(f"upstream {name} sends no usage: what it answers is charged by estimates")
        await hold.settle()
        if not answer.is_stream:
            assert hold.settled is not None
            charged, left = str(as_credits(hold.settled.charge)), str(as_credits(hold.settled.credits))
            more = {**self.passed_on(answer), "x-credits-charged": charged, "x-credits-remaining": left}
            exchange.client, last = self.show(exchange, last, more=more), b""
        elif last.endswith(b"\r\n\r"):
            last += b"\n"  # of the empty line's CRLF, which may come in another read: none is awaited after this event
        with exchange.waiting():
            if not hold.meter.broken:
                await exchange.send(last, is_end=True)
                return
            await exchange.send(self.redact(last))
            exchange.end_uncleanly()

    async def read_usage(self, answer: Answer, meter: Meter) -> None:
        """The client is gone but the answer had finished: its usage is about to come."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, BrokenStream):
            async with asyncio.timeout(CLIENT_GONE_USAGE_SECONDS):
                while not meter.usage and not meter.over and (block := await answer.next_block()):
                    meter.feed(block)

    async def break_off(self, exchange: Exchange, hold: Hold, refusal: Refusal) -> None:
        """After the headers went out nothing can be repaired: settle, say why in an error frame, end uncleanly."""
        hold.outcome = refusal.code
        with contextlib.suppress(Refusal):
            await hold.settle()
        if hold.settled is not None and "credits" in refusal.detail:
            refusal.detail["credits"] = as_credits(hold.settled.credits)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FRAME_SECONDS):
                await exchange.send(exchange.api.error_event(refusal, exchange.name))
        exchange.end_uncleanly()

    # -- the other endpoints

    def active(self, exchange: Exchange) -> Caller:
        assert exchange.caller is not None
        if refusal := is_suspended(exchange.caller):
            raise refusal
        return exchange.caller

    async def list_models(self, exchange: Exchange) -> web.StreamResponse:
        caller = self.active(exchange)
        data = [self.describe(model) for model in self.catalog.models.values() if caller.may_use(model)]
        return self.show(exchange, {"object": "list", "data": data})

    async def show_model(self, exchange: Exchange, name: str) -> web.StreamResponse:
        caller = self.active(exchange)
        exchange.model = self.catalog.find(name, time.time())
        if refusal := cannot_use(caller, exchange.model):
            raise refusal
        return self.show(exchange, self.describe(exchange.model))

    def describe(self, model: Model) -> dict[str, Any]:
        """A model as GET /v1/models shows it."""
        return {
            "id": model.name,
            "object": "model",
            "created": model.created if isinstance(model.created, int) else unix_day(model.created),
            "owned_by": self.catalog.owned_by,
            "credit_multiplier": as_credits(model.price),
            "tier": model.tier,
            "kind": model.kind or "chat",
            "context_window": model.context_window,
            "deprecated": model.deprecation(time.time()),
            "available": self.is_available(model),
        }

    async def show_subscription(self, exchange: Exchange) -> web.StreamResponse:
        caller = self.active(exchange)
        expires_at = iso_time(caller.free_expires_at) if caller.free else None
        value = {"tier": caller.tier, "status": caller.status, "expires_at": expires_at}
        return self.show(exchange, {**value, "credits": as_credits(caller.credits)})

    async def show_health(self, exchange: Exchange) -> web.StreamResponse:
        await self.ledger.ping()
        return self.show(exchange, {"status": "ok"})

    # -- what goes on beside the requests

    async def watch(self) -> None:
        """Look after what waits: silence, clients that do not read, and the two files. It outlives what it meets."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                now = time.monotonic()
                for exchange in list(self.exchanges):
                    if self.ledger.database.is_cut_off:
                        exchange.interrupt(ledger_unavailable())
                    if exchange.waits:
                        await self.look_after(exchange, now)
                patience = DRAIN_STALL_SECONDS if self.draining else CLIENT_STALL_SECONDS
                for transport in self.server.stalled(now, patience):
                    self.cut(transport)
                state = file_state(self.config)
                if state != self.files and state == self.files_seen:  # still for a moment: nobody writes at it
                    self.files = state
                    await self.reload()
                self.files_seen = state
            except Exception:
                self.log.say(f"the watch failed\n{traceback.format_exc()}")

    async def look_after(self, exchange: Exchange, now: float) -> None:
        """End the wait for a silent upstream, and keep a quiet connection open; not where the client does not read."""
        transport = exchange.request.transport
        if transport is not None and transport.get_write_buffer_size():
            return
        if now - exchange.heard_at >= exchange.patience:
            name = exchange.hold.upstream if exchange.hold else ""
            what = f'The upstream "{name}" sent nothing for {exchange.patience:g} seconds.'
            exchange.interrupt(Refusal("upstream_timeout", what, moves_on=True))
        elif now - exchange.sent_at >= KEEP_ALIVE_SECONDS and type(exchange.client) is web.StreamResponse:
            with contextlib.suppress(ClientGone):
                await exchange.send(KEEP_ALIVE)

    def cut(self, transport: asyncio.Transport) -> None:
        """End the connection of a client that does not read; what it was sent is charged."""
        for exchange in self.exchanges:
            if exchange.request.transport is transport:
                exchange.outcome = "client_stalled"
                if exchange.hold is not None and exchange.hold.resolution is None:
                    exchange.hold.outcome = "client_stalled"
        transport.abort()

    async def reload(self) -> None:
        """Take changed files over as a pair, or keep the last good ones and say once what is wrong."""
        try:
            new = await asyncio.to_thread(load_config, self.config.path)
            catalog = await asyncio.to_thread(load_catalog, new)
        except ConfigError as error:
            self.log.say(f"the models and upstreams stay as they were: {error}")
            return
        old, before = self.config, self.catalog
        for name, upstream in new.upstreams.items():
            if old.upstreams.get(name) == upstream:  # what was seen of it still holds
                new.upstreams[name] = old.upstreams[name]
        self.config = msgspec.structs.replace(old, **{name: getattr(new, name) for name in RELOADED})
        self.ledger.config, self.catalog = self.config, catalog
        self.seen += [upstream for upstream in new.upstreams.values() if upstream not in self.seen]
        self.secrets = secret_pattern(self.seen)
        notices = extra("notices")
        for line in notices.changes(old, new, before, catalog) if notices else ():
            self.log.say(line)
        self.log.say("models and upstreams: read again")

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let running requests finish, for `drain_seconds` or until told to hurry; then end them, settled. Whoever does
        not read is not waited for."""
        self.draining = True
        give_up = time.monotonic() + self.config.drain_seconds
        while (self.exchanges or self.server.stalls) and (now := time.monotonic()) < give_up + 2 * FRAME_SECONDS:
            give_up = min(give_up, now) if hurry.is_set() else give_up
            for exchange in list(self.exchanges) if now >= give_up else ():
                exchange.interrupt(shutting_down())
            await asyncio.sleep(WATCH_SECONDS / 10)


RELOADED = ("file", "tiers", "default_tier", "upstreams")  # of config.yaml; what else changes takes a restart
LIST_OF_APIS = f"There are POST {', '.join(f'/v1/{path}' for path in APIS)}, GET /v1/models and /v1/models/ID."


def used_up(hold: Hold) -> Refusal:
    message = "The account's credits are used up, so the answer ends here. Add credits."
    required = as_credits(cost(2 * hold.order.prompt_estimate + hold.order.choices, hold.order.multiplier))
    return Refusal("insufficient_credits", message, credits=as_credits(hold.caller.credits), required=required)


def shutting_down() -> Refusal:
    return Refusal("shutting_down", "The server is shutting down. Try again shortly.", headers=retry_after(1))


def file_state(config: Config) -> tuple[int, ...]:
    """What changes when one of the two files is edited or replaced."""
    state: list[int] = []
    for path in (config.path, config.models_path):
        with contextlib.suppress(OSError):
            found = path.stat()
            state += (found.st_mtime_ns, found.st_size, found.st_ino)
    return tuple(state)


# ---- Log ------------------------------------------------------------------------------------------------------------

LOG_LINE = "%s %s %s %s %s %s %s %s %s+%s tokens%s %s credits %s/%s ms"


class Log(logging.Handler):
    """Lines on stderr, one a request; no prompt, answer or key is in them. What libraries log is a line as well."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.dropped = 0

    def say(self, message: str) -> None:
        at = iso_time(now_ms())
        self.write(encode_json({"time": at, "message": message}).decode() if self.form == "json" else f"{at} {message}")

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if record.name == "asyncio" and isinstance(error, Exception):
            self.say(f"{record.getMessage()}\n{''.join(traceback.format_exception(error))}")
        elif not isinstance(error, (aiohttp.http_exceptions.HttpProcessingError, web.RequestPayloadError)):
            # Those are of bytes that are no HTTP, or not compressed as they say; anybody can send them.
            self.say(f"{record.name}: {record.getMessage()}{f' ({type(error).__name__})' if error else ''}")

    def broken(self, exchange: Exchange, error: Exception) -> None:
        """An upstream's failure in our words: a parser's quotes the bytes that it met, which are somebody's."""
        why = error.strerror if isinstance(error, OSError) else None
        what = str(error) if isinstance(error, BrokenStream) else f"{type(error).__name__}{f': {why}' if why else ''}"
        upstream = exchange.hold.upstream if exchange.hold else None
        self.say(f"{exchange.name} upstream {upstream} broke: {what}")

    def request(self, exchange: Exchange) -> None:
        hold, caller, model = exchange.hold, exchange.caller, exchange.model
        prompt, completion, estimated = (hold.resolution and hold.resolution.bill if hold else None) or (0, 0, False)
        fields = {
            "time": iso_time(now_ms()),
            "request_id": exchange.name,
            "account": caller.account if caller else None,
            "key": caller.hint if caller else None,
            "model": model.name if model else None,
            "upstream": hold.upstream if hold else None,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "estimated": estimated if self.form == "json" else " estimated" * estimated,
            "credits": as_credits(hold.settled.charge) if hold and hold.settled else 0,
            "first_byte_ms": exchange.first_byte_ms,
            "ms": round(1000 * (time.monotonic() - exchange.started)),
        }
        if self.form == "json":
            self.write(encode_json(fields).decode())
        else:
            self.write(LOG_LINE % tuple("-" if value is None else value for value in fields.values()))

    def write(self, line: str) -> None:
        """A log that cannot be written (a full disk, a closed or a full pipe) must not stop the books.

        Past the buffer of `sys.stderr`, which would keep what it cannot write, and fail with it at the exit.
        """
        try:
            if not is_ready(2, select.POLLOUT):
                raise BlockingIOError
            os.write(2, line.encode(errors="backslashreplace")[:LOG_LINE_BYTES_MAX] + b"\n")
            dropped, self.dropped = self.dropped, 0
            if dropped:
                self.say(f"{dropped} lines of this log could not be written")
        except (OSError, ValueError):
            self.dropped += 1


# ---- Application ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def running(config: Config, hurry: asyncio.Event | None = None) -> AsyncIterator[Proxy]:
    """The whole server, listening; on the way out it drains, settles and closes everything, in that order."""
    catalog = load_catalog(config)
    async with contextlib.AsyncExitStack() as stack:
        if not config.is_postgres:
            stack.enter_context(own_database(config.database_path))
            if (migration := extra("migration")) and (done := migration.migrate(config.database_path)):
                tell(done)
        connect(config).close()  # what is wrong with it is said here, before there are threads
        log = Log(config.log)
        for name in ("aiohttp", "asyncio"):
            logging.getLogger(name).addHandler(log)
        echo = extra("echo")  # also where no upstream is builtin yet: a reload may bring one
        proxy = Proxy(config, catalog, log, await echo.start(stack) if echo else "")
        stack.push_async_callback(proxy.ledger.close)
        await proxy.ledger.open()
        proxy.session = aiohttp.ClientSession(
            connector=Connector(limit=0, keepalive_timeout=POOLED_SECONDS),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent",),
            read_bufsize=READ_BUFFER_BYTES,
        )
        await stack.enter_async_context(proxy.session)
        for name in ("metrics", "topups"):
            if companion := extra(name):
                companion.mount(proxy)
        if config.console is not None and (console := extra("console")):
            proxy.console = await console.mount(proxy, stack)
        proxy.server = Server(proxy.answer, access_log=None, keepalive_timeout=CLIENT_IDLE_SECONDS)
        runner = web.ServerRunner(proxy.server, shutdown_timeout=DRAIN_STALL_SECONDS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = web.TCPSite(runner, *config.address, backlog=2048)
        try:
            await site.start()
        except OSError as error:
            why = error.strerror or str(error)
            raise CommandError(f"cannot listen on {config.listen}: {why}. Is another server running?") from None
        host, port = runner.addresses[0][:2]
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 -- for clients on this machine
        proxy.base_url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        watch = asyncio.create_task(proxy.watch())
        try:
            yield proxy
        finally:
            await site.stop()
            await proxy.drain(hurry or asyncio.Event())
            watch.cancel()
            await asyncio.wait([watch])


@contextlib.contextmanager
def own_database(path: Path) -> Iterator[None]:
    """One server owns a database: exclusive locks on the file itself, whatever its names are, and on one beside it that
    holds the owner's pid. The file's descriptor stays open: closing it would take SQLite's own locks away."""
    try:
        files = [os.open(name, os.O_RDWR | os.O_CREAT, 0o600) for name in (f"{path}.lock", path)]
    except OSError as error:
        raise CommandError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        for file in files:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(files[0], 0)
        os.write(files[0], str(os.getpid()).encode())
        yield
    except BlockingIOError:
        owner = os.read(files[0], 20).decode() or "unknown"
        raise CommandError(f"{path}: the server with pid {owner} has it; stop that one first") from None
    finally:
        for file in files:
            os.close(file)


async def serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT; a second one hurries the drain."""
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    with contextlib.suppress(AttributeError):  # glibc's: large bodies and answers go back to the system at once
        ctypes.CDLL(None).mallopt(-3, 1024**2)  # M_MMAP_THRESHOLD
    async with running(config, hurry) as proxy:
        loop.add_signal_handler(signal.SIGHUP, setattr, proxy, "files", ())  # the watch reads them again
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 50)  # requests leave few cycles; looking as often as by default costs 15 %
        await asyncio.to_thread(greet, proxy)
        probes = extra("probes")
        probing = asyncio.create_task(probes.print_upstreams(proxy) if probes else asyncio.sleep(0))
        await stop.wait()
        tell("stopping: running requests may finish")
        probing.cancel()
        await asyncio.wait([probing])
    return 0


def greet(proxy: Proxy) -> None:
    """Create the owner of a new database and show the key: one that could not be shown does not exist. Then say where
    the server listens, and what is off."""
    notices = extra("notices")
    try:
        with contextlib.closing(connect(proxy.config)) as db, transaction(db) as now:
            key = create_owner(db, now, proxy.config)
            if key is not None:
                alone = f"The key of the new account owner: {key}"
                show(notices.first_steps(proxy.base_url, key) if notices else alone)
    except OSError as error:
        why = f"the owner's key could not be shown ({error}), so there is none"
        proxy.log.say(f"{why}; `account add` makes an account")
    lines = proxy.console.greeting() if proxy.console is not None else []
    lines.append(f"listening on {proxy.base_url}")
    lines += notices.retiring(proxy.catalog, time.time()) if notices else []
    for name, upstream in proxy.config.upstreams.items():
        if upstream.builtin and (off := proxy.why_off(upstream)):
            lines.append(f"upstream {name}: off, {off}")
    if proxy.config.console is not None and proxy.console is None:
        lines.append("console: off, extras/console or a package that it needs is not there")
    tell("\n".join(lines))


def show(text: str) -> None:
    """Print what must be seen. OSError if it could not be; what is left of it then goes nowhere, also at the exit."""
    if sys.stdout is None:
        raise OSError("standard output is closed")
    try:
        print(text, flush=True)
    except OSError:
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def tell(text: str) -> None:
    """Print what may be missed."""
    with contextlib.suppress(OSError):
        show(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit's status: 0, 1 if that failed, 2 if a file or the line is wrong."""
    for number in range(3):  # closed at the start? Then opened on nothing, before a socket or the database is there
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)
    commands = extra("commands")
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if commands is not None:
            options = commands.parse_arguments(given)
            config, run = load_config(options.config), options.run
            if run is not None:
                return int(commands.run_command(config, options))
        elif given in ([], ["serve"]) or (given[:1] == ["--config"] and len(given) == 2):
            config = load_config(Path(given[1]) if len(given) == 2 else Path(__file__).with_name("config.yaml"))
        else:
            raise CommandError("extras/commands.py is missing beside proxy.py: it can only `serve`")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(serve(config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (CommandError, Refusal, sqlite3.Error) as error:
        print(f"proxy.py: {error}", file=sys.stderr)
    except OSError as error:
        print(f"proxy.py: {error.filename or given}: {error.strerror or error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 1


if __name__ == "__main__":
    sys.modules["proxy"] = sys.modules[__name__]  # what extras import by that name is this program
    sys.exit(main())
