"""A minimal reverse proxy for LLM APIs that people can trust with money.

A request's life, in the order of this file's second half (`Proxy.complete` tells the same story):

 1. authenticate   the Authorization header names a key; only its SHA-256 is stored and looked up
 2. parse          the JSON body is decoded once, checked, and later re-encoded: what is priced is what is forwarded
 3. find model     exact id or alias, in the catalog of models.yaml
 4. hold           one transaction checks key, account, limits and balance, reserves credits, inserts the request's row
 5. open upstream  the model's upstreams in order, until one begins an answer
 6. relay, meter   whole SSE events, byte for byte, counted on the way; a stream's hold grows slice by slice
 7. settle         what was used is debited, the rest released, committed before the client sees the end

Every way out of steps 5 to 7 (done, client gone, upstream broken, refused, shutdown) meets the same settle-or-void.
The writer of the ledger keeps a resolution until it is in the database, whatever became of its client.

What it does not do: it has no users' web page, no prompts or answers on disk, no cache, no load balancing, no second
process. It does not translate between APIs: what it does not read, it passes on untouched.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import difflib
import functools
import gc
import hashlib
import io
import itertools
import json
import logging
import os
import re
import secrets
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal, InvalidOperation
from email.utils import formatdate
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

try:
    import aiohttp
    import aiosqlite
    import msgspec
    import prometheus_client
    import yaml
    from aiohttp import web
    from aiohttp.abc import AbstractStreamWriter
    from yarl import URL
except ImportError as missing:
    sys.exit(f"proxy.py needs the package {missing.name!r}: run `pip install .` in the folder of proxy.py.")

if sys.platform != "win32":
    import fcntl
    import resource

    import uvloop

T = TypeVar("T")

# ---- Limits ---------------------------------------------------------------------------------------------------------

KEY_CHECKED_FIRST_BYTES = 64 * 1024  # a larger body is read only for a key that is known
BODY_SECONDS = 30  # a request body gets this long, and a second more for each
BODY_BYTES_PER_SECOND = 16 * 1024  # of its bytes that came: a drip-fed body is cut, a slow line is not
BODY_VALUES_MAX = 500_000  # objects and lists in a body: millions would hold everybody up for seconds
EVENT_BYTES_MAX = 16 * 1024**2  # images travel in one SSE event; past this the stream is broken
ANSWER_BYTES_MAX = 64 * 1024**2  # an answer that is not streamed is kept whole until it is settled
ERROR_BYTES_MAX = 64 * 1024  # of an upstream's error body
READ_BUFFER_BYTES = 32 * 1024  # half of aiohttp's default: a burst stays in the processor's cache
UPLOAD_PIECE_BYTES = 256 * 1024
TOKENS_MAX = 2**31
CHOICES_MAX = 128
OUTPUT_TOKENS_DEFAULT = 8192  # the bound of an answer when neither request nor model names one
MULTIPLIER_MAX = 10_000  # keeps the largest charge (2^31 tokens, 128 choices) within SQLite's 64 bits
CREDITS_MAX = 10**12  # in one grant
SUNSET_NOTICE_DAYS = 30
KEEP_ALIVE_SECONDS = 15  # of silence, then a comment: nginx and many load balancers cut at 60
CLIENT_STALL_SECONDS = 60  # without the client taking a byte
CLIENT_GONE_USAGE_SECONDS = 1  # for the usage that follows a finish reason
FRAME_SECONDS = 5  # for the last frame of a broken stream to leave
POOLED_SECONDS = 4  # llama.cpp and uvicorn close idle connections after 5
COOLDOWN_SECONDS = 5  # an upstream that could not be connected to is skipped while another is there
RETRY_AFTER_SECONDS_MAX = 60  # openai-node sleeps whatever it is told
WATCH_SECONDS = 0.25  # how often waiting streams and models.yaml are looked at
GATHER_SECONDS = 0.001  # under load the ledger's batch gathers this long
BUSY_SECONDS = 1.0  # another process may hold the database's lock this long; then 503
SETTLE_PATIENCE_SECONDS = 3  # a client waits this long for a settle that cannot be written
RETRY_SECONDS = 0.25  # between the tries of a settle that cannot be written
CLIENT_IDLE_SECONDS = 75  # a kept-alive connection without a request, or one that never finishes its headers
OPEN_FILES = 65536  # two descriptors a stream
GARBAGE_THRESHOLDS = (20_000, 20, 50)  # requests leave few cycles; looking for them as often as by default costs 15 %
SCHEMA_VERSION = 1

# ---- Refusals -------------------------------------------------------------------------------------------------------

REFUSALS = {  # code: (status, type)
    "invalid_json": (400, "invalid_request_error"),
    "missing_api_key": (401, "authentication_error"),
    "invalid_api_key": (401, "authentication_error"),
    "revoked_api_key": (401, "authentication_error"),
    "insufficient_credits": (402, "insufficient_credits"),
    "credits_in_use": (402, "insufficient_credits"),
    "account_suspended": (403, "permission_error"),
    "metrics_forbidden": (403, "permission_error"),
    "model_not_found": (404, "invalid_request_error"),
    "not_found": (404, "invalid_request_error"),
    "method_not_allowed": (405, "invalid_request_error"),
    "request_timeout": (408, "invalid_request_error"),
    "model_retired": (410, "invalid_request_error"),
    "body_too_large": (413, "invalid_request_error"),
    "validation_failed": (422, "invalid_request_error"),
    "rate_limit_exceeded": (429, "rate_limit_error"),
    "too_many_parallel_requests": (429, "rate_limit_error"),
    "internal_error": (500, "server_error"),
    "upstream_error": (502, "upstream_error"),
    "upstream_unavailable": (503, "upstream_error"),
    "ledger_unavailable": (503, "server_error"),
    "shutting_down": (503, "server_error"),
    "upstream_timeout": (504, "upstream_error"),
    "upstream_refused": (400, "invalid_request_error"),  # the status is the upstream's own
    "client_stalled": (499, "invalid_request_error"),  # nobody is there to read it
}


class Refusal(Exception):
    """An answer that is no success: a code that programs match, and a sentence that says what to do.

    `detail` goes into the error object, `top` beside it. A ledger verb returns one, so that its transaction
    stands; everything else raises it. `moves_on` says that the model's next upstream is worth asking.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status: int | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        detail: Mapping[str, Any] | None = None,
        top: Mapping[str, Any] | None = None,
        moves_on: bool = False,
        body: bytes | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status or REFUSALS[code][0]
        self.headers = dict(headers or {})
        self.moves_on = moves_on
        self.body = body
        self.caller: Caller | None = None
        kind = REFUSALS[code][1]
        error = {"message": message, "type": kind, "param": param, "code": code, "status": self.status}
        self.content = {"error": {**error, **(detail or {})}, **(top or {})}

    def encoded(self) -> bytes:
        """The body of the answer: an upstream's own where it has our shape, else ours."""
        return self.body if self.body is not None else encode_json(self.content)


def retry_after(seconds: int) -> dict[str, str]:
    return {"Retry-After": str(min(max(seconds, 1), RETRY_AFTER_SECONDS_MAX))}


encode_json = msgspec.json.Encoder(decimal_format="number").encode

# ---- Configuration --------------------------------------------------------------------------------------------------


class ConfigError(Exception):
    """A sentence with file, line, key, what was expected and the nearest valid name."""


class CommandError(Exception):
    """What keeps a command, or the server, from running: a sentence on stderr, and exit 1."""


class YamlFile:
    """One YAML file as plain values, with the line of every key.

    PyYAML alone keeps the last of two equal keys and reads `on:` as True and `3:27:` as 207: here both are
    errors. Numbers with a point become Decimal, because some of them are prices.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, ...], int] = {}
        self.scalars = yaml.SafeLoader("")
        try:
            text = path.read_text(encoding="utf-8")
            node = yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
            self.values = self.plain(node, ()) if node else {}
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8 text") from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"{path}: not valid YAML: {error}") from None
        if not isinstance(self.values, dict):
            raise self.error((), "expected a mapping of keys to values")

    def plain(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item, (*path, str(n))) for n, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self.scalar(node, path)
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            line = key_node.start_mark.line + 1
            if (*path, key) in self.lines and key in values:
                first = self.lines[(*path, key)]
                raise self.error((*path, key), f"duplicate key; it stands on line {first} already", line)
            if key_node.tag != "tag:yaml.org,2002:str":
                raise self.error((*path, key), f'YAML does not read this key as text; quote it: "{key}":', line)
            self.lines[(*path, key)] = line
            values[key] = self.plain(value_node, (*path, key))
        return values

    def scalar(self, node: yaml.Node, path: tuple[str, ...]) -> Any:
        try:
            if node.tag == "tag:yaml.org,2002:float":
                return Decimal(node.value.replace("_", ""))
            return self.scalars.construct_object(node)
        except InvalidOperation:
            raise self.error(path, f"expected a finite number, got {node.value}") from None
        except (ValueError, yaml.YAMLError) as error:
            raise self.error(path, f"cannot be read: {error}") from None

    def error(self, path: Sequence[str], message: str, line: int | None = None) -> ConfigError:
        if line is None:
            known = [path[:n] for n in range(len(path), -1, -1) if tuple(path[:n]) in self.lines]
            line = self.lines[tuple(known[0])] if known else 1
        key = ".".join(path)
        return ConfigError(f"{self.path}:{line}: {key + ': ' if key else ''}{message}")

    def unknown(self, path: Sequence[str], what: str, name: str, valid: Iterable[str]) -> ConfigError:
        names = list(valid)
        nearest = difflib.get_close_matches(name, names, 1, 0.5)
        hint = f"expected one of: {', '.join(names) or 'none'}"
        if nearest:
            hint = f'did you mean "{nearest[0]}"?' + (f" {hint}" if len(names) < 20 else "")
        return self.error(path, f"unknown {what}; {hint}")

    def section(self, path: tuple[str, ...], kind: type[T], value: Any) -> T:
        """`value`, which stands at `path`, as the struct `kind`; unknown keys are named before wrong values."""
        if value is None:
            value = {}
        self.check_keys(path, kind, value)
        try:
            return msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            message, _, where = str(error).partition(" - at `$")
            inner = tuple(a or b for a, b in re.findall(r"\.(\w+)|\[(\d+)\]", where))
            if missing := re.search(r"missing required field `(\w+)`", message):
                message = f'the key "{missing[1]}" is missing'
            if len(inner) == 1 and (literals := literals_of(kind, inner[0])):
                raise self.unknown(
                    (*path, *inner), f'value "{value[inner[0]]}"', str(value[inner[0]]), literals
                ) from None
            raise self.error((*path, *inner), message[0].lower() + message[1:].replace("`", "")) from None

    def check_keys(self, path: tuple[str, ...], kind: Any, value: Any) -> None:
        if not isinstance(value, dict):
            raise self.error(path, "expected a mapping of keys to values")
        for key, inner in value.items():
            if key not in kind.__struct_fields__:
                raise self.unknown((*path, key), "key", key, kind.__struct_fields__)
            if key in NESTED_SECTIONS and isinstance(inner, dict):
                self.check_keys((*path, key), NESTED_SECTIONS[key], inner)

    def mapping(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, dict) or not value:
            raise self.error((key,), "expected a mapping with at least one entry")
        return value


def literals_of(kind: Any, name: str) -> list[str]:
    """The only values that a field may have, if it is one of those."""
    struct = msgspec.inspect.type_info(kind)
    assert isinstance(struct, msgspec.inspect.StructType)
    info = next(field.type for field in struct.fields if field.name == name)
    types = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    return [str(value) for one in types if isinstance(one, msgspec.inspect.LiteralType) for value in one.values]


Count = Annotated[int, msgspec.Meta(ge=1, le=TOKENS_MAX)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]


class Tier(msgspec.Struct, frozen=True):
    """The limits of an account; None is unlimited."""

    requests_per_minute: Count | None = None
    parallel: Count | None = None
    keys: Count | None = None


class FreeCredits(msgspec.Struct, frozen=True):
    amount: Decimal = Decimal(0)
    days: Count = 30


class UpstreamSection(msgspec.Struct, frozen=True):
    """One upstream, as config.yaml has it."""

    base_url: str | None = None
    builtin: Literal["echo"] | None = None
    api_key: str | None = None
    connect_seconds: Seconds = 5
    first_byte_seconds: Seconds = 600
    """To the first byte of the body: servers send headers at once and think afterwards."""
    idle_seconds: Seconds = 60
    headers: dict[str, str] = {}
    usage_in_stream: Literal["ask", "never"] = "ask"


class Upstream(UpstreamSection, frozen=True, kw_only=True):
    name: str
    missing: tuple[str, ...] = ()
    """Environment variables that are not set: the upstream is off."""


class ConfigSection(msgspec.Struct, frozen=True):
    """config.yaml, as it is written."""

    tiers: dict[str, Any]
    upstreams: dict[str, Any]
    listen: str = "127.0.0.1:8000"
    database: str = "proxy.db"
    models: str = "models.yaml"
    free_credits: FreeCredits = FreeCredits()
    default_tier: str = "free"
    hold_output_tokens: Count = 1024
    max_body_mb: Count = 32
    drain_seconds: Annotated[float, msgspec.Meta(ge=0)] = 30
    log: Literal["text", "json"] = "text"
    metrics: Literal["loopback", "any", "off"] = "loopback"


@dataclass(frozen=True)
class Config:
    """config.yaml, checked and converted. Credits are in thousandths."""

    path: Path
    host: str
    port: int
    database: Path
    models: Path
    free_credits: int
    free_days: int
    default_tier: str
    hold_output_tokens: int
    body_bytes_max: int
    drain_seconds: float
    log: str
    metrics: str
    tiers: dict[str, Tier]
    upstreams: dict[str, Upstream]

    def limits(self, tier: str) -> Tier:
        """An account keeps working when its tier was taken out of the file: on the default tier's limits."""
        return self.tiers.get(tier) or self.tiers[self.default_tier]


def load_config(path: Path) -> Config:
    """config.yaml, complete and checked. ConfigError says what is wrong, and where."""
    file = YamlFile(path)
    if file.values.get("metrics") is False:
        file.values["metrics"] = "off"  # YAML reads a plain `off` as a boolean
    upstreams = {name: load_upstream(file, name, raw) for name, raw in file.mapping("upstreams").items()}
    values = substitute_all(file)
    section = file.section((), ConfigSection, values)
    tiers = {name: file.section(("tiers", name), Tier, raw) for name, raw in file.mapping("tiers").items()}
    if section.default_tier not in tiers:
        raise file.unknown(("default_tier",), f'tier "{section.default_tier}"', section.default_tier, tiers)
    host, port = parse_listen(file, section.listen)
    folder = path.parent
    return Config(
        path=path,
        host=host,
        port=port,
        database=folder / section.database,
        models=folder / section.models,
        free_credits=parse_thousandths(file, ("free_credits", "amount"), section.free_credits.amount),
        free_days=section.free_credits.days,
        default_tier=section.default_tier,
        hold_output_tokens=section.hold_output_tokens,
        body_bytes_max=section.max_body_mb * 1024**2,
        drain_seconds=section.drain_seconds,
        log=section.log,
        metrics=section.metrics,
        tiers=tiers,
        upstreams=upstreams,
    )


def load_upstream(file: YamlFile, name: str, raw: Any) -> Upstream:
    missing: list[str] = []
    section = file.section(("upstreams", name), UpstreamSection, substitute(raw, missing))
    path = ("upstreams", name)
    if (section.base_url is None) == (section.builtin is None):
        raise file.error(path, "expected either base_url or builtin: echo")
    if section.base_url is not None and not missing and not is_base_url(section.base_url):
        expected = "expected a URL such as http://127.0.0.1:11434/v1 (a key goes into api_key)"
        raise file.error((*path, "base_url"), f'{expected}, got "{section.base_url}"')
    for header, text in {"Authorization": section.api_key or "", **section.headers}.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+", header) or header.lower() in HEADERS_NOT_FOR_CONFIG:
            raise file.error((*path, "headers"), f'"{header}" is not the name of a header that can be set')
        if not text.isprintable():
            raise file.error(path, "headers and api_key must not hold control characters")
    return Upstream(**msgspec.structs.asdict(section), name=name, missing=tuple(missing))


HEADERS_NOT_FOR_CONFIG = ("host", "content-length", "transfer-encoding", "connection")


def is_base_url(text: str) -> bool:
    try:
        url = URL(text)
        return url.scheme in ("http", "https") and bool(url.host and url.port) and not (url.user or url.query_string)
    except ValueError:
        return False


def substitute_all(file: YamlFile) -> dict[str, Any]:
    """The file's values with ${NAME} replaced; outside `upstreams` a variable that is not set is an error."""
    values = {}
    for key, raw in file.values.items():
        missing: list[str] = []
        values[key] = substitute(raw, missing)
        if missing and key != "upstreams":
            raise file.error((key,), f"the environment variable {missing[0]} is not set")
    return values


def substitute(value: Any, missing: list[str]) -> Any:
    """`value` with ${NAME} and ${NAME:-default} replaced in its strings; unset and empty are the same."""

    def one(match: re.Match[str]) -> str:
        found = os.environ.get(match[1]) or match[2]
        if not found and match[2] is None:
            missing.append(match[1])
        return found or ""

    if isinstance(value, str):
        return re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", one, value)
    if isinstance(value, dict):
        return {key: substitute(inner, missing) for key, inner in value.items()}
    if isinstance(value, list):
        return [substitute(inner, missing) for inner in value]
    return value


def parse_listen(file: YamlFile, listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise file.error(("listen",), f'expected HOST:PORT such as 127.0.0.1:8000, got "{listen}"')
    return host.strip("[]"), int(port)


def parse_thousandths(file: YamlFile, path: tuple[str, ...], value: Decimal, most: int = CREDITS_MAX) -> int:
    try:
        thousandths = to_thousandths(value)
    except ValueError as error:
        raise file.error(path, f"{error}, got {value}") from None
    if not 0 <= thousandths <= most * 1000:
        raise file.error(path, f"expected a number from 0 to {most}, got {value}")
    return thousandths


def to_thousandths(value: Decimal) -> int:
    """Credits, or a multiplier, as an integer of the smallest unit; ValueError if it does not fit exactly."""
    if not value.is_finite() or abs(value) > CREDITS_MAX or (value * 1000) % 1:
        raise ValueError("expected a number with at most three decimals")
    return int(value * 1000)


def as_credits(thousandths: int) -> Decimal:
    """Thousandths of a credit as people and the wire see them: 842500 is 842.5."""
    return Decimal(thousandths) / 1000 if thousandths % 1000 else Decimal(thousandths // 1000)


# ---- Catalog --------------------------------------------------------------------------------------------------------


class CatalogTier(msgspec.Struct, frozen=True):
    multiplier: Decimal
    title: str = ""


class DeprecationSection(msgspec.Struct, frozen=True):
    announced: datetime.date
    sunset: datetime.date
    replacement: str | None = None


class ModelSection(msgspec.Struct, frozen=True):
    """One model, as models.yaml has it."""

    tier: str
    upstream: str | list[str]
    upstream_model: str | None = None
    multiplier: Decimal | None = None
    kind: str = "chat"
    context_window: Count | None = None
    max_output_tokens: Count | None = None
    created: datetime.date | Annotated[int, msgspec.Meta(ge=0)] = 0
    aliases: list[str] = []
    deprecated: DeprecationSection | None = None


class CatalogSection(msgspec.Struct, frozen=True):
    tiers: dict[str, Any]
    models: dict[str, Any]
    owned_by: str = "llm-resayil"


NESTED_SECTIONS = {"free_credits": FreeCredits, "deprecated": DeprecationSection}


@dataclass(frozen=True)
class Deprecation:
    """Unix seconds, at 00:00 UTC of the day."""

    announced: int
    sunset: int
    replacement: str | None


@dataclass(frozen=True)
class Model:
    """A model as the catalog offers it. `multiplier` is thousandths of a credit a token."""

    id: str
    tier: str
    multiplier: int
    kind: str
    upstreams: tuple[str, ...]
    upstream_model: str
    context_window: int | None
    max_output_tokens: int | None
    created: int
    deprecated: Deprecation | None

    def deprecation(self, now: float) -> Deprecation | None:
        """Before its announcement a deprecation is not shown."""
        return self.deprecated if self.deprecated and self.deprecated.announced <= now else None

    def prompt_tokens(self, estimate: int, prompts: int) -> int:
        """No prompt that a model accepts is longer than its context window."""
        return min(estimate, self.context_window * prompts) if self.context_window else estimate

    def output_tokens(self, prompt_tokens: int) -> int:
        """The longest answer to one prompt, where the request names no maximum."""
        if self.max_output_tokens:
            return self.max_output_tokens
        return max(1, self.context_window - prompt_tokens) if self.context_window else OUTPUT_TOKENS_DEFAULT


@dataclass(frozen=True)
class Catalog:
    """models.yaml, checked and converted; replaced whole when the file changes."""

    owned_by: str
    models: dict[str, Model]
    aliases: dict[str, str]

    def find(self, name: str, now: float) -> Model:
        model = self.models.get(self.aliases.get(name, name))
        if model is None:
            near = difflib.get_close_matches(name, [*self.models, *self.aliases], 3, 0.5)
            hint = f"Did you mean {' or '.join(near)}?" if near else "GET /v1/models lists the models."
            raise Refusal("model_not_found", f'There is no model "{name}". {hint}', param="model")
        if model.deprecated and now >= model.deprecated.sunset:
            instead = model.deprecated.replacement
            hint = f"Use {instead} instead." if instead else "GET /v1/models lists the models."
            raise Refusal("model_retired", f'The model "{model.id}" is retired. {hint}', param="model")
        return model

    def retiring(self, now: float) -> Iterator[str]:
        """A line for each model that retires within 30 days, or has."""
        for model in self.models.values():
            if model.deprecated and model.deprecated.sunset - now < SUNSET_NOTICE_DAYS * 86400:
                verb = "retires" if model.deprecated.sunset > now else "retired"
                instead = f"; use {model.deprecated.replacement}" if model.deprecated.replacement else ""
                yield f"{model.id} {verb} on {iso_day(model.deprecated.sunset)}{instead}"


def load_catalog(path: Path, upstreams: Mapping[str, Upstream]) -> Catalog:
    """models.yaml, complete and checked. ConfigError says what is wrong, and where."""
    file = YamlFile(path)
    section = file.section((), CatalogSection, file.values)
    tiers = {name: file.section(("tiers", name), CatalogTier, raw) for name, raw in file.mapping("tiers").items()}
    prices = {
        name: parse_thousandths(file, ("tiers", name, "multiplier"), tier.multiplier, MULTIPLIER_MAX)
        for name, tier in tiers.items()
    }
    models = {}
    aliases: dict[str, str] = {}
    for name, raw in file.mapping("models").items():
        entry = file.section(("models", name), ModelSection, raw)
        models[name] = load_model(file, name, entry, prices, upstreams)
        for alias in entry.aliases:
            if alias in aliases or alias in section.models:
                other = aliases.get(alias, alias)
                raise file.error(("models", name, "aliases"), f'alias "{alias}" is used twice, also for "{other}"')
            aliases[alias] = name
    for name, model in models.items():
        instead = model.deprecated and model.deprecated.replacement
        if instead and aliases.get(instead, instead) not in models:
            path_there = ("models", name, "deprecated", "replacement")
            raise file.unknown(path_there, f'model "{instead}"', instead, models)
    return Catalog(section.owned_by, models, aliases)


def load_model(
    file: YamlFile,
    name: str,
    entry: ModelSection,
    prices: Mapping[str, int],
    upstreams: Mapping[str, Upstream],
) -> Model:
    path = ("models", name)
    if entry.tier not in prices:
        raise file.unknown((*path, "tier"), f'tier "{entry.tier}"', entry.tier, prices)
    names = [entry.upstream] if isinstance(entry.upstream, str) else entry.upstream
    if not names:
        raise file.error((*path, "upstream"), "expected at least one upstream")
    for upstream in names:
        if upstream not in upstreams:
            raise file.unknown((*path, "upstream"), f'upstream "{upstream}"', upstream, upstreams)
    multiplier = prices[entry.tier]
    if entry.multiplier is not None:
        multiplier = parse_thousandths(file, (*path, "multiplier"), entry.multiplier, MULTIPLIER_MAX)
    return Model(
        id=name,
        tier=entry.tier,
        multiplier=multiplier,
        kind=entry.kind,
        upstreams=tuple(names),
        upstream_model=entry.upstream_model or name,
        context_window=entry.context_window,
        max_output_tokens=entry.max_output_tokens,
        created=entry.created if isinstance(entry.created, int) else unix_day(entry.created),
        deprecated=load_deprecation(file, (*path, "deprecated"), entry.deprecated),
    )


def load_deprecation(file: YamlFile, path: tuple[str, ...], entry: DeprecationSection | None) -> Deprecation | None:
    if entry is None:
        return None
    if (entry.sunset - entry.announced).days < SUNSET_NOTICE_DAYS:
        raise file.error((*path, "sunset"), f"expected a date {SUNSET_NOTICE_DAYS} days or more after announced")
    return Deprecation(unix_day(entry.announced), unix_day(entry.sunset), entry.replacement)


def unix_day(day: datetime.date) -> int:
    return int(datetime.datetime(day.year, day.month, day.day, tzinfo=datetime.UTC).timestamp())


def iso_day(unix: float) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).date().isoformat()


def iso_time(ms: int | None) -> str | None:
    return None if ms is None else iso_second(ms // 1000)


@functools.lru_cache(maxsize=16)
def iso_second(unix: int) -> str:
    return datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def cost(tokens: int, multiplier: int) -> int:
    """Thousandths of a credit: exact, because both are integers and the multiplier is in thousandths."""
    assert tokens >= 0 and multiplier >= 0
    return tokens * multiplier


# ---- Request --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Endpoint:
    """A relayed endpoint. `empty_choice` makes a closing usage event safe for loops over `chunk.choices[0]`."""

    path: str
    prompt: str
    empty_choice: bytes = b""


ENDPOINTS = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("chat/completions", "messages", b'{"index":0,"delta":{},"finish_reason":null}'),
        Endpoint("completions", "prompt", b'{"index":0,"text":"","logprobs":null,"finish_reason":null}'),
        Endpoint("embeddings", "input"),
    )
}
MAXIMA = ("max_tokens", "max_completion_tokens")
MEMBERS_READ = frozenset(("model", "stream", "stream_options", "n", "best_of", *MAXIMA, "messages", "prompt", "input"))


def fold(name: str) -> str:
    """How loosely servers match names: Go folds case (ſ is s there), some take `maxTokens` for `max_tokens`."""
    return name.casefold().replace("_", "").replace("-", "")


TWINS = {fold(name): name for name in MEMBERS_READ}
OTHER_MAXIMA = frozenset(map(fold, ("n_predict", "num_predict", "max_new_tokens", "n_cmpl")))


@dataclass(frozen=True)
class Ask:
    """A request, parsed and checked.

    `choices` is the number of answers in all: n (or best_of) times the prompts; 0 for embeddings.
    `max_tokens` is of one answer. `prompt_estimate` is E before the model's context window is known.
    """

    endpoint: Endpoint
    body: dict[str, Any]
    model: str
    stream: bool
    wants_usage: bool
    choices: int
    choices_a_prompt: int
    prompts: int
    max_tokens: int | None
    prompt_estimate: int


def parse_request(endpoint: Endpoint, raw: bytes | bytearray) -> Ask:
    """The body as JSON, decoded once (a duplicate member's last value stands) and checked.

    msgspec refuses NaN and lone surrogates. Members that the proxy does not read pass untouched.
    """
    try:
        body = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Refusal("invalid_json", f"The request body is not valid JSON: {error}") from None
    except RecursionError:
        raise Refusal("invalid_json", "The request body is nested too deeply.") from None
    if not isinstance(body, dict):
        raise Refusal("invalid_json", "The request body must be a JSON object.")
    errors: dict[str, list[str]] = {}
    check_names(body, errors)
    check_values(endpoint, body, errors)
    if errors:
        name, why = next(iter(errors.items()))
        raise Refusal("validation_failed", f"{name}: {why[0]}", param=name, top={"errors": errors})
    prompts, estimate = estimate_prompt(endpoint, body)
    named = [body[name] for name in MAXIMA if body.get(name) is not None]
    n = body.get("n") or 1
    return Ask(
        endpoint=endpoint,
        body=body,
        model=body["model"],
        stream=bool(body.get("stream")) and endpoint.empty_choice != b"",
        wants_usage=bool((body.get("stream_options") or {}).get("include_usage")),
        choices=max(n, body.get("best_of") or 1) * prompts if endpoint.empty_choice else 0,
        choices_a_prompt=n,
        prompts=prompts,
        max_tokens=min(named) if named else None,
        prompt_estimate=estimate,
    )


def check_names(body: dict[str, Any], errors: dict[str, list[str]]) -> None:
    """A member that an upstream could take for one that we read would be unpriced: refused, not dropped."""
    for name in body:
        if name not in MEMBERS_READ:
            folded = fold(name)
            if folded in TWINS:
                errors[name] = [f"is too like {TWINS[folded]}, which some servers would take it for; use that name"]
            elif folded in OTHER_MAXIMA:
                errors[name] = ["is not accepted; use max_tokens for the maximum and n for the number of choices"]
    options = body.get("stream_options")
    for name in options if isinstance(options, dict) else ():
        if name != "include_usage" and fold(name) == "includeusage":
            errors[f"stream_options.{name}"] = ["is too like include_usage; use that name"]


def check_values(endpoint: Endpoint, body: dict[str, Any], errors: dict[str, list[str]]) -> None:
    def expect(right: bool, name: str, what: str) -> None:
        if not right:
            errors.setdefault(name, []).append(f"must be {what}")

    def integer(name: str, most: int) -> bool:
        value = body.get(name)
        return value is None or (type(value) is int and 1 <= value <= most)

    model = body.get("model")
    expect(isinstance(model, str) and model != "", "model", "the id of a model")
    expect(body.get("stream") is None or isinstance(body["stream"], bool), "stream", "a boolean")
    options = body.get("stream_options")
    expect(options is None or isinstance(options, dict), "stream_options", "an object")
    if isinstance(options, dict):
        asked = options.get("include_usage")
        expect(asked is None or isinstance(asked, bool), "stream_options.include_usage", "a boolean")
    for name in ("n", "best_of"):
        expect(integer(name, CHOICES_MAX), name, f"an integer from 1 to {CHOICES_MAX}")
    for name in MAXIMA:
        expect(integer(name, TOKENS_MAX), name, f"an integer from 1 to {TOKENS_MAX}")
    prompt = body.get(endpoint.prompt)
    if endpoint.prompt == "messages":
        expect(valid_messages(prompt), "messages", "a list of messages, each with a role and a content")
    else:
        expect(
            valid_prompt(prompt),
            endpoint.prompt,
            "text, a list of texts, token ids, or a list of lists of token ids",
        )


def valid_messages(messages: Any) -> bool:
    if not isinstance(messages, list) or not messages:
        return False
    for message in messages:
        if not isinstance(message, dict):
            return False
        content = message.get("content")
        if isinstance(content, list):
            if not all(isinstance(part, dict) for part in content):
                return False
        elif content is not None and not isinstance(content, str):
            return False
    return True


def valid_prompt(prompt: Any) -> bool:
    """Text, texts, token ids or lists of token ids; judged by the types alone, at the speed of C."""
    if isinstance(prompt, str):
        return True
    if not isinstance(prompt, list) or not prompt:
        return False
    kinds = set(map(type, prompt))
    if kinds == {list}:
        kinds = set(map(type, itertools.chain.from_iterable(prompt)))
        return kinds == {int} and all(prompt)
    return kinds in ({str}, {int})


def estimate_prompt(endpoint: Endpoint, body: dict[str, Any]) -> tuple[int, int]:
    """How many prompts a request has, and E, the estimate of their tokens in all.

    Text counts its UTF-8 bytes / 4, a message 4 more, a part that is no text 1,024, a token array its length.
    """
    if endpoint.prompt == "messages":
        quarters = sum(map(message_quarters, body["messages"]))
        for name in ("tools", "functions", "response_format"):
            if body.get(name) is not None:
                quarters += len(encode_json(body[name]))
        return 1, -(-quarters // 4)
    prompt = body[endpoint.prompt]
    suffix = text_bytes(body.get("suffix"))
    if isinstance(prompt, str):
        return 1, -(-(text_bytes(prompt) + suffix) // 4)
    if isinstance(prompt[0], int):
        return 1, len(prompt) + -(-suffix // 4)
    if isinstance(prompt[0], list):
        return len(prompt), sum(map(len, prompt))
    return len(prompt), -(-(sum(map(text_bytes, prompt)) + suffix * len(prompt)) // 4)


def message_quarters(message: dict[str, Any]) -> int:
    """A message's share of E, in quarters of a token, so that only the sum is rounded."""
    quarters = 4 * 4
    for name, value in message.items():
        if name == "content" and isinstance(value, list):
            for part in value:
                quarters += text_bytes(part.get("text")) + (0 if part.get("type") == "text" else 4 * 1024)
        elif name in ("tool_calls", "function_call"):
            quarters += sum(len(encode_json(arguments)) if isinstance(arguments, dict) else text_bytes(arguments)
                            for arguments in call_arguments(value))  # fmt: skip
        elif name not in ("role", "name", "tool_call_id"):
            quarters += text_bytes(value)
    return quarters


def call_arguments(calls: Any) -> Iterator[Any]:
    """The arguments of tool calls (a list), or of one function call (an object) of the older form."""
    for call in calls if isinstance(calls, list) else [calls]:
        if isinstance(call, dict):
            function = call.get("function", call)
            yield function.get("arguments") if isinstance(function, dict) else None


def text_bytes(value: Any) -> int:
    """The UTF-8 length of a text; what is no text has none."""
    if not isinstance(value, str):
        return 0
    return len(value) if value.isascii() else len(value.encode(errors="surrogatepass"))


def forward_body(ask: Ask, model: Model, upstream: Upstream, max_tokens: int | None) -> bytes:
    """The body for the upstream: the one that was priced. `max_tokens` is a maximum that credits lowered, or None."""
    body = {**ask.body, "model": model.upstream_model}
    used = [name for name in MAXIMA if body.get(name) is not None]
    lowest = ask.max_tokens if max_tokens is None else max_tokens
    for name in used or (["max_tokens"] if max_tokens is not None else []):
        body[name] = lowest
    if upstream.usage_in_stream == "never":
        body.pop("stream_options", None)
    elif ask.stream:
        body["stream_options"] = {**(body.get("stream_options") or {}), "include_usage": True}
    try:
        return encode_json(body)
    except RecursionError:
        raise Refusal("invalid_json", "The request body is nested too deeply.") from None


# ---- Metering -------------------------------------------------------------------------------------------------------


class BrokenStream(Exception):
    """The upstream's bytes are no event stream that can be relayed."""


class EventSplitter:
    """Reads in, whole server-sent events out, joined again they are the bytes that came.

    A line ends with LF, CRLF or CR (WHATWG HTML, 9.2.5), an event with an empty line. An event is passed on as soon
    as its empty line has begun; should that be the CR of a CRLF, the LF leads the next event, where it means nothing.
    """

    def __init__(self) -> None:
        self.tail = bytearray()

    def feed(self, read: bytes) -> bytes:
        """The whole events that a read completes; what is left is kept for the next."""
        if not self.tail and read.endswith(b"\n\n") and b"\r" not in read:
            return read
        if self.tail:
            scanned = len(self.tail) - 1  # the two bytes that end an event may come in two reads
            self.tail += read
            if find_last_end(self.tail, scanned) == 0:
                self.check_length()
                return b""
            read = bytes(self.tail)
            self.tail.clear()
        end = find_last_end(read, 0)
        if end == len(read):
            return read
        self.tail += read[end:]
        self.check_length()
        return read[:end]

    def check_length(self) -> None:
        if len(self.tail) > EVENT_BYTES_MAX:
            raise BrokenStream(f"an event of more than {EVENT_BYTES_MAX} bytes")


EMPTY_LINE = re.compile(rb"\n\n|\n\r\n?|\r\r\n?")


def find_last_end(data: bytes | bytearray, start: int) -> int:
    """Where the last whole event ends, or 0 if none does after `start`."""
    if data.find(b"\r", start) < 0:
        found = data.rfind(b"\n\n", start)
        return found + 2 if found >= 0 else 0
    end = 0
    for match in EMPTY_LINE.finditer(data, start):
        end = match.end()
    return end


def first_event(block: bytes, start: int) -> bytes:
    """The event that begins at `start` of whole ones. An empty line too many at their end stands alone."""
    if block.find(b"\r", start) < 0:
        found = block.find(b"\n\n", start)
        return block[start : found + 2] if found >= 0 else block[start:]
    match = EMPTY_LINE.search(block, start)
    return block[start : match.end()] if match else block[start:]


def split_events(block: bytes) -> Iterator[bytes]:
    """Whole events, one by one."""
    done = 0
    while done < len(block):
        event = first_event(block, done)
        done += len(event)
        yield event


class Delta(msgspec.Struct, gc=False):
    """The members of a delta or message that bear content. Some servers send other types than text."""

    content: Any = None
    reasoning_content: Any = None
    reasoning: Any = None
    refusal: Any = None
    tool_calls: Any = None
    function_call: Any = None


class Choice(msgspec.Struct, gc=False):
    index: Any = 0
    delta: Delta | None = None
    message: Delta | None = None
    text: Any = None
    finish_reason: Any = None


class Chunk(msgspec.Struct, gc=False):
    """What is read of an event, and of an answer that is not streamed."""

    choices: list[Choice] | None = None
    usage: Any = None
    error: Any = None


decode_chunk = msgspec.json.Decoder(Chunk).decode
PROBE = secrets.token_hex(16).encode()  # a text that no model wrote
match_plain_text = re.compile(rb'[^"\\\r\n]+').match  # of a JSON string, as long as it is without escapes


class Usage(NamedTuple):
    """What an upstream says it used; None where it does not say. Details (cached, reasoning) are parts of these."""

    prompt_tokens: int | None
    completion_tokens: int | None


class Bill(NamedTuple):
    """What a request is charged for; `estimated` where the upstream's word was not enough."""

    prompt_tokens: int
    completion_tokens: int
    estimated: bool


def read_usage(value: Any) -> Usage | None:
    """Usage by the names of the chat and completions API; what is not an integer from 0 to 2^31 counts as absent."""
    if not isinstance(value, dict):
        return None
    numbers = [value.get(name) for name in Usage._fields]
    valid = [n if type(n) is int and 0 <= n <= TOKENS_MAX else None for n in numbers]
    return Usage(*valid) if valid != [None, None] else None


def running_count(events: int, text_bytes: int) -> int:
    """The estimate of an output: the larger of events that bear content and their text's bytes / 4."""
    return max(events, (text_bytes + 3) // 4)


class UsageMeter:
    """Counts what an answer costs, event by event. Knows no sockets; keeps no text.

    `count` is the running estimate of the output, `count_certain` what even a text of very long tokens must have used.
    """

    def __init__(self, endpoint: Endpoint, choices: int, wants_usage: bool, choices_a_prompt: int = 1) -> None:
        self.several = choices > 1
        self.choices_a_prompt = choices_a_prompt
        self.closing_choice = b"" if wants_usage else endpoint.empty_choice
        self.events = 0
        self.text_bytes = 0
        self.usage: Usage | None = None
        self.count_at_usage = 0
        self.closing: Usage | None = None
        self.by_choice: dict[int, Usage] = {}
        self.finished = False  # a finish reason has passed
        self.over = False  # [DONE], or
        self.failed = False  # an error event of the upstream's own
        self.before = self.state()  # the last event that was fed
        self.prefix = self.suffix = self.between = PROBE  # of no event yet

    def state(self) -> tuple[int, int, int, Usage | None, Usage | None, dict[int, Usage]]:
        """All that a bill is made of."""
        return (self.events, self.text_bytes, self.count_at_usage, self.usage, self.closing, self.by_choice)

    @property
    def count(self) -> int:
        return running_count(self.events, self.text_bytes)

    @property
    def count_certain(self) -> int:
        return max(self.events, self.text_bytes // 8)

    @property
    def count_before(self) -> int:
        """The count without the last event that was fed, which is not sent on yet."""
        return running_count(*self.before[:2])

    @property
    def ended(self) -> bool:
        """Whether the upstream may close now without having broken off."""
        return self.over or self.finished or self.usage is not None

    @property
    def produced(self) -> bool:
        return self.count > 0 or bool(self.usage and self.usage.completion_tokens)

    def skim(self, block: bytes, start: int, count_max: int) -> int:
        """Count events that differ from an earlier one in their text alone, without parsing them.

        Where they end: before one that may be of another kind, or that would make the count pass `count_max`.
        """
        if not block.startswith(self.prefix, start):
            return start
        between, frame = self.between, len(self.between)
        events, text_bytes, bytes_max = self.events, self.text_bytes, 4 * count_max  # by the rule of running_count
        text_start = start + len(self.prefix)
        goes_on = True
        while goes_on and (text := match_plain_text(block, text_start)):
            text_end = text.end()
            goes_on = block.startswith(between, text_end)
            total = text_bytes + text_end - text_start
            if total > bytes_max or events >= count_max or not (goes_on or block.startswith(self.suffix, text_end)):
                break
            events += 1
            text_bytes = total
            text_start = text_end + frame
        self.events, self.text_bytes = events, text_bytes
        return text_start - len(self.prefix)

    def feed(self, event: bytes) -> bytes:
        """Count one whole event; the bytes to send on, which differ for a closing usage event only."""
        self.before = self.state()
        if self.skim(event, 0, TOKENS_MAX):
            return event
        chunk = decode_event(event)
        if chunk is None:
            self.failed = is_error_event(event)
            self.over = self.failed or join_data_lines(event).lstrip().startswith(b"[DONE]")
            return event
        self.add(chunk)
        if chunk.error is not None or (event[:5] != b"data:" and is_error_event(event)):
            self.over = self.failed = True
        if chunk.usage is not None and chunk.choices == [] and self.closing_choice:
            return give_choice(event, self.closing_choice)
        self.learn(event, chunk)
        return event

    def learn(self, event: bytes, chunk: Chunk) -> None:
        """Remember what surrounds the text of an event that bears nothing else: servers repeat it to the byte.

        Between the same bytes in another event is its text, if no quote or escape is in it. That it is the text is
        proved by decoding the event with another one in its place.
        """
        known = event.startswith(self.prefix) and event.endswith(self.suffix)
        if known or not chunk.choices or not chunk.choices[0].delta:
            return
        text = chunk.choices[0].delta.content
        if not text or not isinstance(text, str):
            return
        with contextlib.suppress(msgspec.DecodeError, UnicodeEncodeError):
            prefix, found, suffix = event.partition(encode_json(text)[1:-1])
            alone = Chunk([Choice(index=chunk.choices[0].index, delta=Delta(PROBE.decode()))])
            if found and decode_chunk(prefix[5:] + PROBE + suffix) == alone:
                self.prefix, self.suffix, self.between = prefix, suffix, suffix + prefix

    def add(self, chunk: Chunk) -> None:
        """Count a chunk of a stream, or a whole answer."""
        text = 0
        for choice in chunk.choices or ():
            part = choice.delta or choice.message
            if part is not None:
                text += content_bytes(part)
            if choice.text:
                text += text_bytes(choice.text)
            if choice.finish_reason:
                self.finished = True
        self.events += text > 0
        self.text_bytes += text
        if chunk.usage is not None and (usage := read_usage(chunk.usage)):
            self.usage = usage
            self.count_at_usage = self.count
            if self.several and chunk.choices:
                index = chunk.choices[0].index
                self.by_choice = {**self.by_choice, index if type(index) is int else 0: usage}
            elif self.several:
                self.closing = add_closing(self.closing, usage)

    def take_back(self) -> None:
        """The last event that was fed is not sent on after all."""
        self.events, self.text_bytes, self.count_at_usage = self.before[:3]
        self.usage, self.closing, self.by_choice = self.before[3:]

    def bill(self, prompt_estimate: int, complete: bool) -> Bill:
        """What is owed. Of an answer that was cut short, what came after the last usage is owed too."""
        usage = self.closing or self.usage_of_choices() or self.usage
        if usage is None:
            return Bill(prompt_estimate, self.count, True)
        prompt, completion = usage
        uncounted = 0 if complete else self.count - self.count_at_usage
        estimated = prompt is None or (completion is None and self.count > 0) or uncounted > 0
        return Bill(
            prompt_estimate if prompt is None else prompt,
            min((self.count_at_usage if completion is None else completion) + uncounted, TOKENS_MAX),
            estimated,
        )

    def usage_of_choices(self) -> Usage | None:
        """The sum, where each choice closes with a usage of its own, as llama.cpp's completions do.

        It is known by the last one: a total is no less than the events that bore content.
        """
        if not self.by_choice or self.usage is None or (self.usage.completion_tokens or 0) >= self.events:
            return None
        prompts = {index // self.choices_a_prompt: usage.prompt_tokens or 0 for index, usage in self.by_choice.items()}
        completions = sum(usage.completion_tokens or 0 for usage in self.by_choice.values())
        return Usage(min(sum(prompts.values()), TOKENS_MAX), min(completions, TOKENS_MAX))


def decode_event(event: bytes) -> Chunk | None:
    """What an event says, or None if that is nothing to be counted: a comment, [DONE], or what is no JSON object."""
    if event.startswith(b"data:"):  # white space is the same to JSON, so an event of one line needs no splitting
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return decode_chunk(event[5:])
    data = join_data_lines(event).lstrip()
    return decode_answer(data) if data.startswith(b"{") else None


def decode_answer(data: bytes) -> Chunk | None:
    """An answer, or None if it is none.

    Clients also read NaN, infinities and lone surrogates, which some servers send in log probabilities, and bytes that
    are no UTF-8.
    """
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return decode_chunk(data)
    with contextlib.suppress(ValueError, RecursionError):
        return msgspec.convert(json.loads(data.decode("utf-8-sig", "replace")), Chunk)
    return None


def join_data_lines(event: bytes) -> bytes:
    """The data of an event of several lines, as a client reads it (WHATWG HTML, 9.2.6)."""
    lines = (line for line in event.removeprefix(b"\xef\xbb\xbf").splitlines() if line.startswith(b"data:"))
    return b"\n".join(line[5:].removeprefix(b" ") for line in lines)


def is_error_event(event: bytes) -> bool:
    return any(line.partition(b":")[2].strip() == b"error" for line in event.splitlines() if line.startswith(b"event"))


def content_bytes(part: Delta) -> int:
    """The bytes of a delta's text. A server that is renaming `reasoning_content` sends the same text twice."""
    total = 0
    if part.content:
        total += len(encode_json(part.content)) if isinstance(part.content, list) else text_bytes(part.content)
    if part.reasoning_content:
        total += text_bytes(part.reasoning_content)
    if part.reasoning and part.reasoning != part.reasoning_content:
        total += text_bytes(part.reasoning)
    if part.refusal:
        total += text_bytes(part.refusal)
    if part.tool_calls:
        total += sum(map(text_bytes, call_arguments(part.tool_calls)))
    if part.function_call:
        total += sum(map(text_bytes, call_arguments(part.function_call)))
    return total


def add_closing(closing: Usage | None, usage: Usage) -> Usage:
    """llama.cpp closes each of several choices with a usage of its own, each with the whole prompt."""
    if closing is None:
        return usage
    prompts = [n for n in (closing.prompt_tokens, usage.prompt_tokens) if n is not None]
    completions = [n for n in (closing.completion_tokens, usage.completion_tokens) if n is not None]
    return Usage(max(prompts, default=None), min(sum(completions), TOKENS_MAX) if completions else None)


def give_choice(event: bytes, choice: bytes) -> bytes:
    """The event with `choice` in its empty list of choices, and no other byte changed."""
    for match in re.finditer(rb'"choices"\s*:\s*\[(\s*)\]', event):
        given = event[: match.start(1)] + choice + event[match.end(1) :]
        with contextlib.suppress(msgspec.DecodeError):
            if decode_chunk(join_data_lines(given)).choices:
                return given
    return event


# ---- Ledger ---------------------------------------------------------------------------------------------------------

SCHEMA = """
CREATE TABLE account (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    tier TEXT NOT NULL,
    status TEXT NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'suspended')),
    created_at INTEGER NOT NULL,
    -- Thousandths of a credit. `free` lapses, `paid` does not and is below zero where a charge was above its hold.
    free INTEGER NOT NULL DEFAULT 0 CHECK (free >= 0),
    free_expires_at INTEGER,
    paid INTEGER NOT NULL DEFAULT 0,
    held INTEGER NOT NULL DEFAULT 0 CHECK (held >= 0),
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
    revoked_at INTEGER
) STRICT;
CREATE INDEX api_key_account ON api_key (account_id);

CREATE TABLE credit_grant (
    id INTEGER PRIMARY KEY,
    account_id INTEGER NOT NULL REFERENCES account (id),
    kind TEXT NOT NULL CHECK (kind IN ('free', 'paid')),
    amount INTEGER NOT NULL,
    ref TEXT UNIQUE,
    note TEXT,
    created_at INTEGER NOT NULL
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
    hold INTEGER NOT NULL CHECK (hold >= 0),
    count INTEGER NOT NULL DEFAULT 0 CHECK (count >= 0),
    state TEXT NOT NULL DEFAULT 'open' CHECK (state IN ('open', 'settled', 'void')),
    upstream TEXT,
    outcome TEXT,
    prompt_tokens INTEGER CHECK (prompt_tokens >= 0),
    completion_tokens INTEGER CHECK (completion_tokens >= 0),
    estimated INTEGER CHECK (estimated IN (0, 1)),
    charge INTEGER,
    resolved_at INTEGER,
    CHECK ((state = 'open') = (charge IS NULL)),
    CHECK (charge = (prompt_tokens + completion_tokens) * multiplier),
    CHECK (state <> 'void' OR charge = 0)
) STRICT;
CREATE INDEX request_open ON request (account_id) WHERE state = 'open';

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

# Free credits that lapse now: those past their day, but for what holds from before that day still reserve.
LAPSING = f"""
    CASE WHEN free > 0 AND free_expires_at <= :now THEN max(0, free - (
        SELECT coalesce(sum(hold), 0) FROM request
        WHERE account_id = account.id AND state = 'open' AND id < account.free_expires_at << {REQUEST_ID_BITS}
    )) ELSE 0 END
"""
LAPSE = f"""
    UPDATE account SET lapsed = lapsed + {LAPSING}, free = free - {LAPSING}
    WHERE id = :account_id AND free > 0 AND free_expires_at <= :now
"""
FIND_AVAILABLE = f"""
    SELECT account.id, multiplier, free + paid - held, {LAPSING} FROM request JOIN account ON account.id = account_id
    WHERE request.id = :request_id AND state = 'open'
"""
FIND_CALLER = """
    SELECT k.id, k.hint, k.revoked_at, k.last_used_at, a.id, a.name, a.tier, a.status,
           a.free, a.free_expires_at, a.paid, a.held, a.open_requests, a.minute, a.minute_requests
    FROM api_key k JOIN account a ON a.id = k.account_id WHERE k.hash = ?
"""
COUNT_ADMITTED = """
    UPDATE account SET held = held + ?, open_requests = open_requests + 1, minute = ?, minute_requests = ? WHERE id = ?
"""
INSERT_REQUEST = """
    INSERT INTO request (id, account_id, key_id, model, multiplier, prompt_estimate, hold) VALUES (?, ?, ?, ?, ?, ?, ?)
"""
RESOLVE_REQUEST = """
    UPDATE request SET state = ?, outcome = ?, upstream = ?, prompt_tokens = ?, completion_tokens = ?, estimated = ?,
        charge = (? + ?) * multiplier, resolved_at = ?
    WHERE id = ? AND state = 'open' RETURNING account_id, hold, charge
"""
# Free credits go first; past their day, only to a request whose hold is from before it, and as far as that reserves.
FREE_SPENT = f"""
    min(free, :charge, CASE WHEN free_expires_at > :now THEN :charge
        WHEN :request_id < free_expires_at << {REQUEST_ID_BITS} THEN :hold ELSE 0 END)
"""
CHARGE_ACCOUNT = f"""
    UPDATE account SET held = held - :hold, open_requests = open_requests - 1, charged = charged + :charge,
        free = free - {FREE_SPENT}, paid = paid - (:charge - {FREE_SPENT})
    WHERE id = :account_id RETURNING free, paid, free_expires_at
"""


class Caller(msgspec.Struct):
    """The key that a request bears, and its account as it stands. Times in ms, credits in thousandths."""

    key_id: int
    hint: str
    revoked_at: int | None
    last_used_at: int | None
    account_id: int
    account: str
    tier: str
    status: str
    free: int
    free_expires_at: int | None
    paid: int
    held: int
    open_requests: int
    minute: int
    minute_requests: int

    def refuse(self, code: str, message: str, **more: Any) -> Refusal:
        refusal = Refusal(code, message, **more)
        refusal.caller = self
        return refusal

    def requests_in(self, minute: int) -> int:
        return self.minute_requests if self.minute == minute else 0


class Order(NamedTuple):
    """What a request asks of the ledger. `max_tokens` is of one choice; `slice_tokens` None holds the whole output."""

    request_id: int
    key_hash: bytes
    model: str
    multiplier: int
    prompt_estimate: int
    choices: int
    max_tokens: int
    slice_tokens: int | None

    @property
    def least(self) -> int:
        """What the prompt and one token of each choice cost, in thousandths, with the prompt's estimate doubled."""
        return cost(2 * self.prompt_estimate + self.choices, self.multiplier)

    def affordable(self, available: int) -> int:
        """The largest maximum a choice that `available` thousandths pay for, if it pays for the least."""
        if self.multiplier == 0 or self.choices == 0:
            return self.max_tokens
        tokens = available // self.multiplier - 2 * self.prompt_estimate
        return min(self.max_tokens, tokens // self.choices)


class Admission(NamedTuple):
    """An order that was granted: the maximum a choice, and how many tokens of output are held for now."""

    caller: Caller
    max_tokens: int
    granted: int


class Resolution(NamedTuple):
    """How a request ended. `bill` None voids its hold."""

    request_id: int
    outcome: str
    upstream: str | None
    bill: Bill | None


class Settled(NamedTuple):
    charge: int
    credits: int


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def find_caller(db: sqlite3.Connection, key_hash: bytes, now: int) -> Caller | Refusal:
    """Keys are found by their hash, never compared; one that was never issued takes as long as any other."""
    row = db.execute(FIND_CALLER, (key_hash,)).fetchone()
    if row is None:
        return Refusal("invalid_api_key", "The API key is not valid. Ask who runs this service for a new one.")
    caller = Caller(*row)
    if caller.revoked_at is not None:
        return caller.refuse("revoked_api_key", "The API key was revoked. Ask who runs this service for a new one.")
    if now - (caller.last_used_at or 0) >= 60_000:
        db.execute("UPDATE api_key SET last_used_at = ? WHERE id = ?", (now, caller.key_id))
    if caller.free and now >= (caller.free_expires_at or 0):
        db.execute(LAPSE, {"now": now, "account_id": caller.account_id})
        caller = Caller(*db.execute(FIND_CALLER, (key_hash,)).fetchone())
    return caller


def hold(db: sqlite3.Connection, order: Order, limits_of: Callable[[str], Tier], now: int) -> Admission | Refusal:
    """Admit a request and reserve its credits, or say why not."""
    caller = find_caller(db, order.key_hash, now)
    if isinstance(caller, Refusal):
        return caller
    minute = now // 60_000
    credits = caller.free + caller.paid
    refusal = over_limits(caller, limits_of(caller.tier), now) or cannot_pay(caller, order, credits)
    if refusal:
        return refusal
    max_tokens = order.affordable(credits - caller.held)
    output = max_tokens * order.choices
    granted = output if order.slice_tokens is None else min(output, order.slice_tokens)
    amount = cost(2 * order.prompt_estimate + granted, order.multiplier)

    # From here on nothing can be refused.
    count = caller.requests_in(minute) + 1
    db.execute(COUNT_ADMITTED, (amount, minute, count, caller.account_id))
    row = (
        order.request_id,
        caller.account_id,
        caller.key_id,
        order.model,
        order.multiplier,
        order.prompt_estimate,
    )
    db.execute(INSERT_REQUEST, (*row, amount))
    caller.minute, caller.minute_requests = minute, count
    return Admission(caller, max_tokens, granted)


def over_limits(caller: Caller, limits: Tier, now: int) -> Refusal | None:
    if caller.status != "active":
        return caller.refuse("account_suspended", "The account is suspended. Ask who runs this service.")
    minute = now // 60_000
    if limits.requests_per_minute is not None and caller.requests_in(minute) >= limits.requests_per_minute:
        wait = 60 - now // 1000 % 60
        message = f"The limit is {limits.requests_per_minute} a minute for this account. Try again in {wait} seconds."
        return caller.refuse("rate_limit_exceeded", message, headers=retry_after(wait), top={"retry_after": wait})
    if limits.parallel is not None and caller.open_requests >= limits.parallel:
        message = f"The limit is {limits.parallel} at once for this account. Wait for a request to end."
        return caller.refuse("too_many_parallel_requests", message, headers=retry_after(1), top={"retry_after": 1})
    return None


def cannot_pay(caller: Caller, order: Order, credits: int) -> Refusal | None:
    """Affordability: the balance, less what other requests hold, must pay for the least. A free model always does."""
    if order.multiplier == 0 or (credits > 0 and credits - caller.held >= order.least):
        return None
    detail = {"credits": as_credits(credits), "required": as_credits(order.least)}
    if credits > 0 and credits >= order.least:
        message = "Requests under way hold the credits that this one needs. Try again when one of them has ended."
        return caller.refuse(
            "credits_in_use", message, headers={**retry_after(1), "x-should-retry": "true"}, detail=detail
        )
    message = f"This request needs {detail['required']} credits, and the account has {detail['credits']}. Add credits."
    return caller.refuse("insufficient_credits", message, detail=detail)


def extend(db: sqlite3.Connection, request_id: int, tokens: int, count: int, now: int) -> int:
    """Reserve up to `tokens` more tokens of output and note how many came so far; how many were granted, 0 if none."""
    row = db.execute(FIND_AVAILABLE, {"request_id": request_id, "now": now}).fetchone()
    if row is None:
        return 0
    account_id, multiplier, unheld, lapsing = row
    if lapsing:  # before the hold grows, which would reserve them
        db.execute(LAPSE, {"now": now, "account_id": account_id})
    granted = tokens if multiplier == 0 else max(0, min(tokens, (unheld - lapsing) // multiplier))
    amount = cost(granted, multiplier)

    db.execute("UPDATE account SET held = held + ? WHERE id = ?", (amount, account_id))
    db.execute("UPDATE request SET hold = hold + ?, count = ? WHERE id = ?", (amount, count, request_id))
    return granted


def settle(db: sqlite3.Connection, end: Resolution, now: int) -> Settled | None:
    """Resolve a request's hold: debit its bill, or nothing if it has none, and release the rest.

    None if there is no open hold of that id: it was never granted, or is resolved already.
    """
    state = "void" if end.bill is None else "settled"
    prompt, completion, estimated = end.bill or (0, 0, False)
    tokens = (prompt, completion, int(estimated), prompt, completion)
    values = (state, end.outcome, end.upstream, *tokens, now, end.request_id)
    row = db.execute(RESOLVE_REQUEST, values).fetchone()
    if row is None:
        return None
    account_id, amount, charge = row
    changes = {"hold": amount, "charge": charge, "account_id": account_id, "now": now, "request_id": end.request_id}
    free, paid, expires_at = db.execute(CHARGE_ACCOUNT, changes).fetchone()
    if free and now >= (expires_at or 0):
        db.execute(LAPSE, {"now": now, "account_id": account_id})
        (free,) = db.execute("SELECT free FROM account WHERE id = ?", (account_id,)).fetchone()
    return Settled(charge, free + paid)


def recover(db: sqlite3.Connection, now: int) -> int:
    """Settle what a crash left open, at the prompt's estimate and the count of the last extend; how many there were."""
    rows = db.execute(
        "SELECT id, prompt_estimate, count FROM request INDEXED BY request_open WHERE state = 'open'"
    ).fetchall()
    for request_id, prompt, count in rows:
        settle(db, Resolution(request_id, "interrupted", None, Bill(prompt, count, True)), now)
    return len(rows)


def connect(path: Path) -> sqlite3.Connection:
    """The database for one command: made or checked, and waiting for the server's short transactions."""
    db = sqlite3.connect(path, isolation_level=None, timeout=30)
    prepare(db, path)
    return db


def prepare(db: sqlite3.Connection, path: Path) -> None:
    """Set a new connection up. FULL: a commit is on the disk before anybody hears of it (see `Entry`)."""
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = FULL")
    db.execute("PRAGMA foreign_keys = ON")
    with transaction(db):
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise CommandError(f"{path}: was made by a newer proxy (schema {version}, this one knows {SCHEMA_VERSION})")
        if version == 0:
            for statement in split_statements(SCHEMA):
                db.execute(statement)
            db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection, mode: str = "IMMEDIATE") -> Iterator[sqlite3.Connection]:
    db.execute(f"BEGIN {mode}")
    try:
        yield db
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def split_statements(script: str) -> Iterator[str]:
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


Verb = Callable[[sqlite3.Connection], Any]


def run_batch(db: sqlite3.Connection, verbs: Sequence[Verb]) -> list[Any]:
    """Run ledger verbs in one transaction; each one's outcome, or the exception that it met.

    A verb that fails is alone in it: the batch is rolled back and every verb gets a transaction of its own.
    """
    try:
        db.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        return [error] * len(verbs)
    try:
        outcomes = [verb(db) for verb in verbs]
        db.execute("COMMIT")
        return outcomes
    except Exception as error:
        if db.in_transaction:
            db.execute("ROLLBACK")
        if len(verbs) == 1:
            return [error]
    return [outcome for verb in verbs for outcome in run_batch(db, [verb])]


class LedgerConnection(sqlite3.Connection):
    """aiosqlite calls `commit` in the connection's own thread: one hop there runs the whole batch."""

    verbs: Sequence[Verb] = ()
    outcomes: Sequence[Any] = ()
    synchronous = wanted = "FULL"

    def commit(self) -> None:
        if self.synchronous != self.wanted:
            self.execute(f"PRAGMA synchronous = {self.wanted}")
            self.synchronous = self.wanted
        self.outcomes = run_batch(self, self.verbs)


@dataclass(slots=True)
class Entry:
    """A verb in the ledger's queue. One that must be done stays there until it is in the database.

    Every commit outlives the process; one that is power-proof is on the disk before anybody hears of it. Holds and
    extends need not be: should the power fail, an answer that was under way may be forgotten, none that ended.
    """

    verb: Verb
    future: asyncio.Future[Any]
    must_be_done: bool
    power_proof: bool
    queued: float


class Ledger:
    """The one writer. All that is queued runs in one transaction and one hop to the connection's thread.

    Nothing here is tied to the task that asked: an answer that nobody awaits any more is dropped.
    """

    def __init__(self, config: Config, say: Callable[[str], None]) -> None:
        self.config = config
        self.say = say
        self.queue: list[Entry] = []
        self.wake = asyncio.Event()
        self.closing = False
        self.unavailable = False
        self.transactions = 0
        self.verbs = 0
        self.last_id = 0
        self.database: aiosqlite.Connection | None = None
        self.writer: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Open the database, make it if it is new, and settle what a crash left open."""
        path = self.config.database

        def factory(*args: Any, **options: Any) -> LedgerConnection:
            self.connection = LedgerConnection(*args, **options)
            prepare(self.connection, path)
            return self.connection

        self.database = await aiosqlite.connect(path, isolation_level=None, timeout=BUSY_SECONDS, factory=factory)
        self.writer = asyncio.create_task(self.write())
        recovered = await self.submit(partial(recover, now=now_ms()))
        if recovered:
            self.say(f"recovered {recovered} requests that a crash interrupted; `audit` proves the books")
        self.last_id = await self.submit(lambda db: db.execute("SELECT max(id) FROM request").fetchone()[0] or 0)

    async def close(self) -> None:
        """Wait for what must be done, but not for ever: recovery settles at the next start what cannot be written."""
        self.closing = True
        self.wake.set()
        if self.writer is not None:
            await asyncio.wait([self.writer], timeout=SETTLE_PATIENCE_SECONDS)
            self.writer.cancel()
        if self.database is not None:
            await self.database.close()

    def next_id(self) -> int:
        self.last_id = max(self.last_id + 1, now_ms() << REQUEST_ID_BITS)
        return self.last_id

    def submit(self, verb: Verb, *, must_be_done: bool = False, power_proof: bool = True) -> asyncio.Future[Any]:
        """Queue a verb. The future has its outcome once it is committed; a Refusal is raised."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()
        self.queue.append(Entry(verb, future, must_be_done, power_proof, loop.time()))
        self.wake.set()
        return future

    async def write(self) -> None:
        """Run batches until the ledger is closed. Under load a batch gathers for a millisecond first."""
        assert self.database is not None
        gather = False
        while self.queue or not self.closing:
            if not self.queue:
                self.wake.clear()
                await self.wake.wait()
                continue
            if gather:
                await asyncio.sleep(GATHER_SECONDS)
            batch, self.queue = self.queue, []
            gather = len(batch) > 1
            self.transactions += 1
            self.verbs += len(batch)
            self.connection.verbs = [entry.verb for entry in batch]
            self.connection.wanted = "FULL" if any(entry.power_proof for entry in batch) else "NORMAL"
            try:
                await self.database.commit()
            except Exception as error:
                self.connection.outcomes = [error] * len(batch)
            left = [entry for entry, outcome in zip(batch, self.connection.outcomes, strict=True)
                    if not self.deliver(entry, outcome)]  # fmt: skip
            if left:
                self.queue[:0] = left
                await asyncio.sleep(RETRY_SECONDS)

    def deliver(self, entry: Entry, outcome: Any) -> bool:
        """Hand an outcome to who awaits it; False if the verb must be tried again."""
        failed = type(outcome) in (sqlite3.OperationalError, sqlite3.DatabaseError)  # not IntegrityError, a bug of ours
        if failed != self.unavailable:
            self.unavailable = failed
            self.say(f"ledger unavailable: {outcome}" if failed else "ledger available again")
        again = failed and entry.must_be_done
        if failed:
            waited = asyncio.get_running_loop().time() - entry.queued
            if again and waited < SETTLE_PATIENCE_SECONDS:
                return False
            outcome = Refusal("ledger_unavailable", "The ledger cannot be written at the moment. Try again shortly.")
        if entry.future.done():
            return not again
        if isinstance(outcome, Exception):
            entry.future.set_exception(outcome)
            entry.future.exception()  # whoever awaits it sees it; where nobody does, nothing is to be said
        else:
            entry.future.set_result(outcome)
        return not again

    async def identify(self, key_hash: bytes) -> Caller:
        """The key's account; Refusal 401 if there is none."""
        verb = partial(find_caller, key_hash=key_hash, now=now_ms())
        caller: Caller = await self.submit(verb, power_proof=False)
        return caller

    async def ping(self) -> None:
        """Refusal 503 unless the database answers and its write lock can be had."""
        await self.submit(lambda db: None, power_proof=False)


class Hold:
    """The credits that one request reserves, from admission to settle-or-void.

    `async with` takes it, and every way out of the block resolves it, once. `sent` says that an upstream has
    the request, `outcome` how it ended; both and the meter decide what is owed.
    """

    def __init__(self, ledger: Ledger, order: Order, meter: UsageMeter) -> None:
        self.ledger = ledger
        self.order = order
        self.meter = meter
        self.sent = False
        self.outcome = ""
        self.upstream: str | None = None
        self.resolution: Resolution | None = None
        self.settled: Settled | None = None
        self.at_limit = False  # past the bound, with no more credits to be had
        self.next_slice: asyncio.Future[int] | None = None

    async def __aenter__(self) -> Hold:
        config = self.ledger.config
        try:
            verb = partial(hold, order=self.order, limits_of=config.limits, now=now_ms())
            admission: Admission = await self.ledger.submit(verb, power_proof=False)
        except asyncio.CancelledError:
            self.outcome = "client_gone"
            self.submit_resolution()  # behind the hold in the queue, so it finds what that did
            raise
        self.caller = admission.caller
        self.max_tokens = admission.max_tokens
        self.bound = admission.max_tokens * self.order.choices
        self.granted = admission.granted
        self.set_watermark()
        return self

    async def __aexit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if self.resolution is None:
            if isinstance(error, Refusal):
                self.outcome = error.code
            elif error is not None:
                self.outcome = "client_gone" if isinstance(error, asyncio.CancelledError) else "internal_error"
            with contextlib.suppress(Refusal):  # the ledger keeps trying; the error on its way out matters more
                await self.settle()

    @property
    def lowered_to(self) -> int | None:
        """The maximum a choice, if the balance pays for less than was asked for."""
        return self.max_tokens if self.max_tokens < self.order.max_tokens else None

    def bill(self) -> Bill | None:
        """What is owed by how it ended. None voids: nothing went to an upstream, or it failed and produced nothing."""
        complete = self.outcome == "ok"
        by_client = self.outcome in ("client_gone", "client_stalled")
        if not self.sent or not (complete or by_client or self.meter.produced):
            return None
        return self.meter.bill(self.order.prompt_estimate, complete)

    async def settle(self) -> None:
        """Resolve the hold by `outcome`, and wait until that is committed. Refusal 503 if it cannot be, for now."""
        if self.resolution is None:
            future = self.submit_resolution()
            self.settled = await future

    def submit_resolution(self) -> asyncio.Future[Any]:
        self.resolution = Resolution(self.order.request_id, self.outcome, self.upstream, self.bill())
        return self.ledger.submit(partial(settle, end=self.resolution, now=now_ms()), must_be_done=True)

    def set_watermark(self) -> None:
        """The count at which to look again: half a slice before the end, or at the bound, where the answer ends."""
        ahead = (self.order.slice_tokens or 0) // 2 if self.granted < self.bound else 0
        self.watermark = self.granted - ahead

    def uncovered(self) -> bool:
        """Whether the answer has outrun the hold."""
        return self.needed() > self.granted

    def needed(self) -> int:
        """How many tokens of output must be held.

        The upstream was told to stop at the bound, so an estimate that passes it may be too high: where no more credits
        are to be had, only the count that is certain says that the upstream goes on regardless.
        """
        return self.meter.count_certain if self.at_limit else self.meter.count

    async def cover(self) -> bool:
        """Whether credits for what the meter counted are held; asks ahead, and waits only when the slice is used up.

        False if the account cannot pay for more. Refusal 503 if the ledger cannot be written.
        """
        while self.uncovered():
            ahead, self.next_slice = self.next_slice, None
            try:
                tokens = await (ahead or self.ask_slice(self.needed() - self.granted))
            except Refusal:
                if ahead is None:
                    raise
                tokens = 0
            self.granted += tokens
            if tokens == 0 and ahead is None:
                if self.at_limit or self.granted < self.bound:
                    return False
                self.at_limit = True
        if self.next_slice is not None and self.next_slice.done():
            self.granted += 0 if self.next_slice.exception() else self.next_slice.result()
            self.next_slice = None
        self.set_watermark()
        if self.meter.count > self.watermark and self.granted < self.bound:
            self.next_slice = self.next_slice or self.ask_slice()
            self.watermark = self.granted
        return True

    async def cover_bill(self) -> bool:
        """Whether the credits for a whole answer are held: where a stream was asked for, only a slice is."""
        bill = self.bill()
        if bill is None or self.order.slice_tokens is None:
            return True
        short = bill.prompt_tokens + bill.completion_tokens - 2 * self.order.prompt_estimate - self.granted
        return short <= 0 or await self.ask_slice(short) >= short

    def ask_slice(self, least: int = 1) -> asyncio.Future[int]:
        """Ask for what makes a slice beyond the count, which is noted: a crash loses no more than a slice.

        That is half a slice if it is asked ahead, and at least what the last event needs.
        """
        size = self.order.slice_tokens or self.ledger.config.hold_output_tokens
        count = self.meter.count_before
        tokens = min(size, count + size - self.granted)
        if self.granted < self.bound:
            tokens = min(tokens, self.bound - self.granted)
        tokens = max(tokens, least)
        verb = partial(extend, request_id=self.order.request_id, tokens=tokens, count=count, now=now_ms())
        return self.ledger.submit(verb, power_proof=False)


# ---- Relay ----------------------------------------------------------------------------------------------------------

TO_CLIENT = ("Cache-Control", "Retry-After", "openai-processing-ms", "X-Accel-Buffering")
KEEP_ALIVE = b": keep-alive\n"  # no empty line: after an `id:` openai-python takes one for an event


class Upload(aiohttp.Payload):
    """A request body that knows whether its sending has begun: before that a request costs nothing."""

    def __init__(self, body: bytes) -> None:
        super().__init__(body, content_type="application/json")
        self._size = len(body)
        self.begun = False

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return str(self._value, encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        """In pieces, so that a large body waits for the upstream to take it."""
        self.begun = True
        for start in range(0, len(self._value), UPLOAD_PIECE_BYTES):
            await writer.write(self._value[start : start + UPLOAD_PIECE_BYTES])

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        await self.write(writer)


class Target:
    """Where and how an upstream is asked: built once. Headers are these and no others of the client's."""

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.urls = {path: URL(f"{(upstream.base_url or '').rstrip('/')}/{path}") for path in (*ENDPOINTS, "models")}
        first = self.urls["models"]
        self.address = f"{first.host}:{first.port}"
        headers = {"Accept-Encoding": "identity", "Content-Type": "application/json"}
        if upstream.api_key:
            headers["Authorization"] = f"Bearer {upstream.api_key}"
        self.headers = {**headers, **upstream.headers}
        self.timeout = aiohttp.ClientTimeout(total=None, sock_connect=upstream.connect_seconds)
        self.cooling_until = 0.0

    def redact(self, body: bytes) -> bytes:
        """An error of an upstream's, without our key for it."""
        key = self.upstream.api_key
        return body.replace(key.encode(), b"[redacted]") if key else body

    def failure(self, code: str, what: str, **more: Any) -> Refusal:
        """A refusal that lets the model's next upstream try."""
        return Refusal(code, f'The upstream "{self.upstream.name}" {what}', moves_on=True, **more)


def judge_status(target: Target, status: int, retry: str | None, body: bytes) -> Refusal:
    """What an upstream's refusal means for the client. 401, 402, 403 and 407 are about our key, not the client's."""
    wait = retry_after(int(retry)) if retry and re.fullmatch(r"[0-9]{1,9}", retry) else {}
    if status == 503:
        return target.failure("upstream_unavailable", "is not available at the moment. Try again later.", headers=wait)
    if status < 400 or status >= 500 or status in (401, 402, 403, 407):
        return target.failure("upstream_error", f"answered with status {status}. Try again later.")
    code = "rate_limit_exceeded" if status == 429 else "upstream_refused"
    return Refusal(
        code,
        f'The upstream "{target.upstream.name}" refused the request with status {status}.',
        status=status,
        headers=wait,
        body=own_error_body(target, body),
        moves_on=status == 429,
    )


def own_error_body(target: Target, body: bytes) -> bytes | None:
    """An upstream's error body, if it has the shape that clients read: an object with a message."""
    try:
        error = msgspec.json.decode(body)["error"]
        return target.redact(body) if isinstance(error["message"], str) else None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        return None


class Answer:
    """An upstream's answer that has begun: a stream with its first events, or a whole body. Owns the response's end."""

    def __init__(self, response: aiohttp.ClientResponse, target: Target) -> None:
        self.response = response
        self.target = target
        self.idle_seconds = target.upstream.idle_seconds
        self.splitter = EventSplitter()
        self.is_stream = response.content_type == "text/event-stream"
        self.first_block = b""
        self.body = b""

    async def __aenter__(self) -> Answer:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Back to the pool if the answer was read to its end, else cut: the upstream stops generating."""
        if self.response.content.is_eof():
            self.response.release()
        else:
            self.response.close()

    async def read(self, exchange: Exchange) -> bytes:
        """The next bytes; none at the end. From here on silence is measured by the upstream's idle time."""
        exchange.waiting_for = "upstream"
        read = await self.response.content.readany()
        exchange.activity += 1
        exchange.patience = self.idle_seconds
        return read

    async def next_block(self, exchange: Exchange) -> bytes:
        """The whole events of the next read that completes one; nothing at the end of the answer."""
        while read := await self.read(exchange):
            if block := self.splitter.feed(read):
                return block
        return b""

    async def read_whole(self, exchange: Exchange, bytes_max: int) -> bytes:
        """The body, read piece by piece so that silence can be told from a long answer."""
        pieces = []
        size = 0
        while read := await self.read(exchange):
            pieces.append(read)
            size += len(read)
            if size > bytes_max:
                raise BrokenStream(f"a body of more than {bytes_max} bytes")
        return b"".join(pieces)


@dataclass(slots=True, eq=False)
class Exchange:
    """One request and what became of it, from the first header to its log line.

    `waiting_for` says whom it waits for while it may be interrupted; the watch reads it and `activity`.
    """

    id: int
    request: web.BaseRequest
    started: float
    task: asyncio.Task[Any]
    caller: Caller | None = None
    model: Model | None = None
    ask: Ask | None = None
    hold: Hold | None = None
    client: web.StreamResponse | None = None
    writer: AbstractStreamWriter | None = None
    status: int = 499
    outcome: str = "client_gone"
    first_byte: float | None = None
    waiting_for: Literal["", "upstream", "client"] = ""
    patience: float = 0
    activity: int = 0
    activity_seen: int = -1
    still_since: float = 0
    commented: float = 0
    unsent: int = 0
    interruption: Refusal | None = None

    @property
    def request_id(self) -> str:
        return f"req_{self.id:016x}"

    def still_seconds(self, now: float) -> float:
        """For how long there was no activity; 0 if there was some since the last look."""
        if self.activity != self.activity_seen:
            self.activity_seen = self.activity
            self.still_since = self.commented = now
        return now - self.still_since

    def interrupt(self, why: Refusal) -> None:
        """End the wait that the exchange is in; `why` is raised there."""
        if self.waiting_for and self.interruption is None:
            self.interruption = why
            self.task.cancel()

    def __enter__(self) -> None:
        """From here on the watch may interrupt."""
        self.activity += 1
        self.waiting_for = "upstream"

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self.waiting_for = ""
        if isinstance(error, asyncio.CancelledError) and self.interruption is not None:
            self.task.uncancel()
            why, self.interruption = self.interruption, None
            raise why from None

    def watched(self, patience: float) -> Exchange:
        self.patience = patience
        return self

    async def send(self, data: bytes) -> None:
        """Write to the client, its headers first. A client that is gone is a cancellation, however it is noticed."""
        if not data:
            return
        self.waiting_for = "client"
        try:
            await (self.writer or await self.begin()).write(data)
        except ConnectionError:
            raise asyncio.CancelledError from None

    async def begin(self) -> AbstractStreamWriter:
        """Write the headers. A body is written past `web.StreamResponse`, which is a layer less a chunk."""
        assert self.client is not None
        self.first_byte = time.perf_counter()
        self.writer = await self.client.prepare(self.request)
        assert self.writer is not None
        return self.writer

    async def send_end(self, data: bytes = b"") -> None:
        """Write the rest of the answer and its end in one piece."""
        assert self.client is not None
        self.waiting_for = "client"
        try:
            if self.writer is None:
                await self.begin()
            await self.client.write_eof(data)
        except ConnectionError:
            raise asyncio.CancelledError from None

    def headers(self, proxy: Proxy) -> dict[str, str]:
        """The headers of every answer: what is known of key and model by now."""
        headers = {"x-request-id": self.request_id}
        if self.caller is not None:
            limit = proxy.config.limits(self.caller.tier).requests_per_minute
            if limit is not None:
                minute = int(time.time()) // 60
                headers["X-RateLimit-Limit"] = str(limit)
                headers["X-RateLimit-Remaining"] = str(max(0, limit - self.caller.requests_in(minute)))
                headers["X-RateLimit-Reset"] = str((minute + 1) * 60)
        if self.model and (deprecated := self.model.deprecation(time.time())):
            headers["Deprecation"] = f"@{deprecated.announced}"  # RFC 9745
            headers["Sunset"] = formatdate(deprecated.sunset, usegmt=True)  # RFC 8594
        if self.hold and self.hold.lowered_to is not None:
            headers["x-max-tokens-limited"] = str(self.hold.lowered_to)
        return headers


# ---- Handlers -------------------------------------------------------------------------------------------------------


def authenticate(request: web.BaseRequest) -> bytes:
    """The SHA-256 of the key that the request bears. `Bearer` is case-sensitive."""
    values = request.headers.getall("Authorization", [])
    scheme, _, key = values[0].partition(" ") if len(values) == 1 else ("", "", "")
    if scheme != "Bearer" or not key or " " in key or not (key.isascii() and key.isprintable()):
        raise Refusal("missing_api_key", "Send the header `Authorization: Bearer KEY` with your API key.")
    return hashlib.sha256(key.encode()).digest()


class Proxy:
    """The server: its parts, and the handlers that use them."""

    def __init__(self, config: Config, catalog: Catalog, log: Log) -> None:
        self.config = config
        self.catalog = catalog
        self.log = log
        self.ledger = Ledger(config, log.say)
        self.metrics = Metrics(self)
        self.targets = {name: Target(up) for name, up in config.upstreams.items()}
        self.exchanges: set[Exchange] = set()
        self.draining = False
        self.models_file = file_state(config.models)
        self.session: aiohttp.ClientSession
        self.base_url = ""

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Every request: route it, turn a refusal into its answer, and leave one log line."""
        task = asyncio.current_task()
        assert task is not None
        exchange = Exchange(self.ledger.next_id(), request, time.perf_counter(), task)
        self.exchanges.add(exchange)
        try:
            response = await self.route(exchange)
            exchange.outcome = exchange.hold.outcome if exchange.hold else "ok"
        except Refusal as refusal:
            exchange.outcome = refusal.code
            response = self.refuse(exchange, refusal)
        except Exception:
            self.log.say(f"{exchange.request_id} failed\n{traceback.format_exc()}")
            exchange.outcome = "internal_error"
            message = f"The proxy failed. Its log has more under {exchange.request_id}."
            if exchange.client is not None and exchange.client.prepared:
                self.end_uncleanly(exchange)
                return exchange.client
            response = self.refuse(exchange, Refusal("internal_error", message))
        finally:
            self.exchanges.discard(exchange)
            self.record(exchange)
        return response

    def refuse(self, exchange: Exchange, refusal: Refusal) -> web.StreamResponse:
        exchange.caller = exchange.caller or refusal.caller
        exchange.status = refusal.status
        headers = {**exchange.headers(self), **refusal.headers, "Content-Type": "application/json"}
        response = web.Response(status=refusal.status, body=refusal.encoded(), headers=headers)
        if self.draining:
            response.force_close()  # so that the client's next connection finds another server, or the next one
        return response

    async def route(self, exchange: Exchange) -> web.StreamResponse:
        """Find the handler by path and method. Under /v1 an unknown key sees 401, whatever else is wrong."""
        path = exchange.request.path
        method = "GET" if exchange.request.method == "HEAD" else exchange.request.method
        private = path.startswith(("/v1/", "/api/"))
        name = path.removeprefix("/api" if path.startswith("/api/v1/") else "").removeprefix("/v1/")
        if private and name in ENDPOINTS and method == "POST" and not self.draining:
            return await self.complete(exchange, ENDPOINTS[name])
        if private:
            await self.identify(exchange, authenticate(exchange.request))
        if self.draining:
            raise Refusal("shutting_down", "The server is shutting down. Try again shortly.", headers=retry_after(1))
        public = {"/health": self.show_health, "/metrics": self.show_metrics}
        handler = public.get(path)
        if path == "/api/billing/subscription":
            handler = self.show_subscription
        elif private and name == "models":
            handler = self.list_models
        elif private and name.startswith("models/"):
            handler = partial(self.show_model, name=name.removeprefix("models/"))
        allowed = "POST" if private and name in ENDPOINTS else "GET, HEAD"
        if handler is None and not (private and name in ENDPOINTS):
            hint = "GET /v1/models lists the models." if private else "Set the client's base_url to end with /v1."
            raise Refusal("not_found", f"There is nothing at {path}. {hint}")
        if handler is None or method != "GET":
            message = f"{path} takes {allowed}, not {exchange.request.method}."
            raise Refusal("method_not_allowed", message, headers={"Allow": allowed})
        return await handler(exchange)

    async def complete(self, exchange: Exchange, endpoint: Endpoint) -> web.StreamResponse:
        """A request's life; the numbers are those of the story at the top of this file."""
        key_hash = authenticate(exchange.request)  # 1
        try:
            ask = parse_request(endpoint, await self.read_body(exchange, key_hash))  # 2
            model = self.catalog.find(ask.model, time.time())  # 3
        except Refusal:
            await self.identify(exchange, key_hash)
            raise
        exchange.ask, exchange.model = ask, model
        meter = UsageMeter(endpoint, ask.choices, ask.wants_usage, ask.choices_a_prompt)
        async with Hold(self.ledger, self.order(exchange, ask, model, key_hash), meter) as hold:  # 4
            exchange.hold, exchange.caller = hold, hold.caller
            try:
                async with await self.open_upstream(exchange, ask, model, hold) as answer:  # 5
                    if answer.is_stream:
                        await self.relay_stream(exchange, answer, hold)  # 6, 7
                    else:
                        await self.relay_whole(exchange, answer, hold)
            except Refusal as refusal:
                if exchange.client is None or not exchange.client.prepared:
                    raise
                await self.break_off(exchange, hold, refusal)
        assert exchange.client is not None
        return exchange.client

    def order(self, exchange: Exchange, ask: Ask, model: Model, key_hash: bytes) -> Order:
        prompt = model.prompt_tokens(ask.prompt_estimate, ask.prompts)
        most = ask.max_tokens or model.output_tokens(-(-prompt // ask.prompts))
        return Order(
            request_id=exchange.id,
            key_hash=key_hash,
            model=model.id,
            multiplier=model.multiplier,
            prompt_estimate=prompt,
            choices=ask.choices,
            max_tokens=most if ask.choices else 0,
            slice_tokens=self.config.hold_output_tokens if ask.stream else None,
        )

    async def identify(self, exchange: Exchange, key_hash: bytes) -> Caller:
        """Look the key up, for what is refused before the hold, and for what needs none."""
        if exchange.caller is None:
            exchange.caller = await self.ledger.identify(key_hash)
        return exchange.caller

    async def read_body(self, exchange: Exchange, key_hash: bytes) -> bytes | bytearray:
        """The whole body. A large one is read for a known key only; one that comes too slowly is given up."""
        content = exchange.request.content
        if content.is_eof() and content.total_bytes <= KEY_CHECKED_FIRST_BYTES:
            return content.read_nowait()
        body = bytearray()
        values = 0
        expected = exchange.request.content_length or 0
        started = asyncio.get_running_loop().time()
        try:
            with exchange.watched(float("inf")):
                async with asyncio.timeout(BODY_SECONDS) as limit:
                    while True:
                        self.check_size(max(expected, len(body)))
                        if max(expected, len(body)) > KEY_CHECKED_FIRST_BYTES:
                            await self.identify(exchange, key_hash)
                        if not body and exchange.request.headers.get("Expect", "").lower() == "100-continue":
                            await exchange.request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                            exchange.request.writer.output_size = 0
                        read = await content.readany()
                        if not read:
                            return body
                        body += read
                        values += read.count(b"{") + read.count(b"[")
                        if values > BODY_VALUES_MAX:
                            message = f"The request body has more than {BODY_VALUES_MAX} objects and lists."
                            raise Refusal("invalid_json", message)
                        limit.reschedule(started + BODY_SECONDS + len(body) / BODY_BYTES_PER_SECOND)
        except TimeoutError:
            raise Refusal("request_timeout", "The request body came too slowly. Send it again.") from None
        except (web.RequestPayloadError, aiohttp.ClientPayloadError) as error:
            raise Refusal("invalid_json", f"The request body cannot be decoded: {error}") from None

    def check_size(self, body_bytes: int) -> None:
        if body_bytes > self.config.body_bytes_max:
            most = self.config.body_bytes_max // 1024**2
            raise Refusal("body_too_large", f"The request body is larger than {most} MB.")

    # -- opening an upstream

    async def open_upstream(self, exchange: Exchange, ask: Ask, model: Model, hold: Hold) -> Answer:
        """The first answer that begins, of the model's upstreams in order. An upstream that just failed to connect
        is left out while there is another. The last refusal is the client's."""
        now = asyncio.get_running_loop().time()
        targets = [self.targets[name] for name in model.upstreams]
        last: Refusal | None = None
        for target in [t for t in targets if t.cooling_until <= now] or targets:
            try:
                return await self.ask_upstream(
                    exchange, target, forward_body(ask, model, target.upstream, hold.lowered_to)
                )
            except Refusal as refusal:
                self.metrics.upstream_failed(target.upstream.name, refusal.code)
                last = refusal
                hold.sent = False
                if not refusal.moves_on or (exchange.client and exchange.client.prepared):
                    break
                exchange.client = None  # of an answer that did not begin
        assert last is not None
        raise last

    async def ask_upstream(self, exchange: Exchange, target: Target, body: bytes) -> Answer:
        """One upstream's answer, begun; a Refusal that moves on if there is none."""
        upstream = target.upstream
        assert exchange.hold is not None and exchange.ask is not None
        exchange.hold.upstream = upstream.name
        if upstream.missing:
            name = upstream.missing[0]
            why = f"is off: the environment variable {name} is not set."
            raise target.failure("upstream_unavailable", why, headers={"x-should-retry": "false"})
        try:
            with exchange.watched(upstream.first_byte_seconds):
                response = await self.post(exchange, target, body)
                return await self.begin_answer(exchange, Answer(response, target))
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
            self.cool(target, error)
            raise target.failure("upstream_unavailable", f"at {target.address} did not answer.") from None
        except (aiohttp.ClientError, OSError, BrokenStream) as error:
            self.log.broken(exchange, error)
            raise target.failure("upstream_error", "broke before it began to answer. Try again.") from None

    def cool(self, target: Target, error: Exception) -> None:
        target.cooling_until = asyncio.get_running_loop().time() + COOLDOWN_SECONDS
        self.log.say(
            f"upstream {target.upstream.name} skipped for {COOLDOWN_SECONDS} s where another is there: {error}"
        )

    async def post(self, exchange: Exchange, target: Target, body: bytes) -> aiohttp.ClientResponse:
        """Send the request; once more if the connection, which was pooled, turns out to be dead."""
        assert exchange.hold is not None and exchange.ask is not None
        url = target.urls[exchange.ask.endpoint.path]
        headers = {"Accept": exchange.request.headers.get("Accept", "*/*"), **target.headers}
        for last_try in (False, True):
            upload = Upload(body)
            try:
                return await self.session.post(
                    url, data=upload, headers=headers, timeout=target.timeout, allow_redirects=False
                )
            except aiohttp.ClientConnectorError:
                raise
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                if last_try:
                    raise
            finally:
                exchange.hold.sent = exchange.hold.sent or upload.begun
        raise AssertionError("the last try returns or raises")

    async def begin_answer(self, exchange: Exchange, answer: Answer) -> Answer:
        """Wait for what shows that an answer is one: its first whole event, or its whole body."""
        response = answer.response
        try:
            if response.status != 200:
                body = b""
                with contextlib.suppress(BrokenStream):  # a body too long to pass on; the status says enough
                    body = await answer.read_whole(exchange, ERROR_BYTES_MAX)
                refusal = judge_status(answer.target, response.status, response.headers.get("Retry-After"), body)
                if refusal.moves_on:  # what is the client's own fault is told to the client alone
                    name = answer.target.upstream.name
                    self.log.say(f"{exchange.request_id} upstream {name} answered with status {response.status}")
                raise refusal
            if answer.is_stream:
                exchange.client = self.start_response(exchange, answer)
                answer.first_block = await answer.next_block(exchange)
                if not answer.first_block:
                    raise BrokenStream("it ended before its first event")
            else:
                answer.body = await answer.read_whole(exchange, ANSWER_BYTES_MAX)
                self.meter_whole(exchange, answer)
        except BaseException:
            answer.close()
            raise
        return answer

    def meter_whole(self, exchange: Exchange, answer: Answer) -> None:
        """Count an answer that is not streamed; one that is no answer to be paid for is broken."""
        assert exchange.hold is not None
        chunk = decode_answer(answer.body)
        if chunk is None:
            raise BrokenStream("its body is no answer")
        if chunk.error is not None and not chunk.choices:
            raise BrokenStream("its body is an error")
        exchange.hold.meter.add(chunk)

    def start_response(self, exchange: Exchange, answer: Answer) -> web.StreamResponse:
        """The client's response, whose headers go out with its first byte."""
        upstream = answer.response.headers
        headers = exchange.headers(self)
        kind = upstream.get("Content-Type", "")
        headers["Content-Type"] = kind if kind and kind.isprintable() else "application/json"
        if answer.is_stream:
            headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        for name in TO_CLIENT:
            if name in upstream and upstream[name].isprintable():
                headers[name] = upstream[name]
        exchange.status = 200
        if not answer.is_stream:
            return web.Response(headers=headers)
        response = web.StreamResponse(headers=headers)
        if exchange.request.version < aiohttp.HttpVersion11:
            response.force_close()  # which knows of no chunks, so only that ends the body
        return response

    # -- relaying

    async def relay_whole(self, exchange: Exchange, answer: Answer, hold: Hold) -> None:
        """An answer that came whole: covered, settled, then handed over."""
        response = self.start_response(exchange, answer)
        assert isinstance(response, web.Response)
        hold.outcome = "ok"
        if not await hold.cover_bill():
            hold.sent = False  # nobody gets the answer, so nobody pays for it
            raise self.used_up(hold)
        await hold.settle()
        assert hold.settled is not None
        response.headers["x-credits-charged"] = str(as_credits(hold.settled.charge))
        response.headers["x-credits-remaining"] = str(as_credits(hold.settled.credits))
        response.body = answer.body
        exchange.client = response
        with exchange.watched(CLIENT_STALL_SECONDS):
            await exchange.send_end()

    async def relay_stream(self, exchange: Exchange, answer: Answer, hold: Hold) -> None:
        """Whole events as they come, one write a read, until [DONE], the upstream's end, or a failure."""
        meter, splitter, content = hold.meter, answer.splitter, answer.response.content
        try:
            with exchange.watched(answer.target.upstream.idle_seconds):
                block, last = await self.meter_events(exchange, hold, answer.first_block, 0)
                await exchange.send(block)
                while not meter.over:
                    exchange.waiting_for = "upstream"  # `answer.read`, in place: the call is 2 % of a chunk
                    block = await content.readany()
                    if not block:
                        break
                    exchange.activity += 1
                    # Most reads are whole events that are alike: one look, and they go on.
                    counted = 0 if splitter.tail else meter.skim(block, 0, hold.watermark)
                    if counted < len(block):
                        block, last = await self.meter_events(exchange, hold, splitter.feed(block), counted)
                    await exchange.send(block)
        except (aiohttp.ClientError, OSError, BrokenStream) as error:
            self.log.broken(exchange, error)
            raise answer.target.failure("upstream_error", "broke off its answer.") from None
        except asyncio.CancelledError:
            if meter.finished and meter.usage is None:
                await self.read_usage(exchange, answer, meter)
            raise
        if not meter.ended:
            raise answer.target.failure("upstream_error", "ended its answer without finishing it.")
        await self.end_stream(exchange, answer, hold, last)

    async def meter_events(self, exchange: Exchange, hold: Hold, block: bytes, done: int) -> tuple[bytes, bytes]:
        """Meter a block of events from `done` on, one by one where they are not alike and covered.

        What to send on, and the event that ends the stream, if it is among them.
        """
        meter, out = hold.meter, [block[:done]]
        while done < len(block):
            event = first_event(block, done)
            out.append(meter.feed(event))
            if meter.count > hold.watermark:
                await self.cover(exchange, hold, out)
            if meter.over:
                last = out.pop()
                return b"".join(out), last
            done += len(event)
            counted = meter.skim(block, done, hold.watermark)
            out.append(block[done:counted])
            done = counted
        return b"".join(out), b""

    async def cover(self, exchange: Exchange, hold: Hold, out: list[bytes]) -> None:
        """Have credits held for the last event in `out`; if they run out, send what comes before it and refuse."""
        last = out.pop()
        covered = False
        try:
            if hold.uncovered():
                await exchange.send(b"".join(out))
                out.clear()
            exchange.waiting_for = ""  # for nobody but the ledger, which has limits of its own
            covered = await hold.cover()
        finally:
            if not covered:
                hold.meter.take_back()
        if not covered:
            raise self.used_up(hold)
        out.append(last)

    def used_up(self, hold: Hold) -> Refusal:
        message = "The account's credits are used up, so the answer ends here. Add credits."
        credits = as_credits(hold.caller.free + hold.caller.paid)
        detail = {"credits": credits, "required": as_credits(hold.order.least)}
        return Refusal("insufficient_credits", message, detail=detail)

    async def end_stream(self, exchange: Exchange, answer: Answer, hold: Hold, last: bytes) -> None:
        """Settle, then send the event that ends the stream: [DONE], an error of the upstream's own, or none."""
        hold.outcome = "upstream_error" if hold.meter.failed else "ok"
        if last.endswith(b"\r\n\r"):
            last += b"\n"  # of the empty line's CRLF, which may come in another read: none is awaited after this event
        await hold.settle()
        with exchange.watched(CLIENT_STALL_SECONDS):
            if hold.meter.failed:
                await exchange.send(answer.target.redact(last))
                self.end_uncleanly(exchange)
            else:
                await exchange.send_end(last)

    async def read_usage(self, exchange: Exchange, answer: Answer, meter: UsageMeter) -> None:
        """The client is gone but the answer had finished: its usage is about to come."""
        with contextlib.suppress(TimeoutError, aiohttp.ClientError, OSError, BrokenStream):
            async with asyncio.timeout(CLIENT_GONE_USAGE_SECONDS):
                while meter.usage is None and not meter.over and (block := await answer.next_block(exchange)):
                    for event in split_events(block):
                        meter.feed(event)

    async def break_off(self, exchange: Exchange, hold: Hold, refusal: Refusal) -> None:
        """After the headers went out nothing can be repaired: settle, say why in an error frame, end uncleanly."""
        hold.outcome = refusal.code
        if hold.resolution is None:
            with contextlib.suppress(Refusal):
                await hold.settle()
        if hold.settled is not None and "credits" in refusal.content["error"]:
            refusal.content["error"]["credits"] = as_credits(hold.settled.credits)
        transport = exchange.request.transport
        if refusal.code == "client_stalled":
            if transport is not None:
                transport.abort()
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FRAME_SECONDS):
                await exchange.send(b"data: " + encode_json(refusal.content) + b"\n\n")
        self.end_uncleanly(exchange)

    def end_uncleanly(self, exchange: Exchange) -> None:
        """Close the connection without the body's last chunk, which every client sees as broken; flush first."""
        transport = exchange.request.transport
        if transport is not None:
            transport.close()
            asyncio.get_running_loop().call_later(FRAME_SECONDS, transport.abort)

    # -- the other endpoints

    def respond(self, exchange: Exchange, value: Any) -> web.Response:
        exchange.status = 200
        headers = {**exchange.headers(self), "Content-Type": "application/json"}
        return web.Response(body=encode_json(value), headers=headers)

    def active(self, exchange: Exchange) -> Caller:
        caller = exchange.caller
        assert caller is not None
        if caller.status != "active":
            raise caller.refuse("account_suspended", "The account is suspended. Ask who runs this service.")
        return caller

    async def list_models(self, exchange: Exchange) -> web.StreamResponse:
        self.active(exchange)
        now = time.time()
        data = [describe_model(self.catalog, model, now) for model in self.catalog.models.values()]
        return self.respond(exchange, {"object": "list", "data": data})

    async def show_model(self, exchange: Exchange, name: str) -> web.StreamResponse:
        self.active(exchange)
        exchange.model = self.catalog.find(name, time.time())
        return self.respond(exchange, describe_model(self.catalog, exchange.model, time.time()))

    async def show_subscription(self, exchange: Exchange) -> web.StreamResponse:
        caller = self.active(exchange)
        expires_at = iso_time(caller.free_expires_at) if caller.free else None
        value = {"tier": caller.tier, "status": caller.status, "expires_at": expires_at}
        return self.respond(exchange, {**value, "credits": as_credits(caller.free + caller.paid)})

    async def show_health(self, exchange: Exchange) -> web.StreamResponse:
        await self.ledger.ping()
        return self.respond(exchange, {"status": "ok"})

    async def show_metrics(self, exchange: Exchange) -> web.StreamResponse:
        """For this machine only, unless config says otherwise; a proxy in front makes everybody look local."""
        request = exchange.request
        local = request.remote in ("127.0.0.1", "::1", None)
        forwarded = "X-Forwarded-For" in request.headers or "Forwarded" in request.headers
        if self.config.metrics == "off":
            raise Refusal("not_found", "Metrics are off. Set `metrics` in config.yaml to turn them on.")
        if self.config.metrics == "loopback" and (forwarded or not local):
            raise Refusal("metrics_forbidden", "Metrics are for this machine only. See `metrics` in config.yaml.")
        exchange.status = 200
        headers = {**exchange.headers(self), "Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=prometheus_client.generate_latest(self.metrics.registry), headers=headers)

    # -- what goes on beside the requests

    def record(self, exchange: Exchange) -> None:
        """The one log line of a request, and its share of the metrics."""
        now = time.perf_counter()
        self.metrics.count(exchange, now)
        self.log.request(exchange, now)

    async def watch(self) -> None:
        """Look after what waits: silence, stalled clients, and the catalog's file."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            now = asyncio.get_running_loop().time()
            for exchange in list(self.exchanges):
                if exchange.waiting_for and (still := exchange.still_seconds(now)):
                    await self.guard(self.look_after(exchange, now, still))
            if (state := file_state(self.config.models)) != self.models_file:
                self.models_file = state
                await self.guard(self.reload_catalog())

    async def guard(self, work: Coroutine[Any, Any, None]) -> None:
        """The watch outlives what it stumbles over."""
        try:
            await work
        except Exception:
            self.log.say(f"the watch failed\n{traceback.format_exc()}")

    async def look_after(self, exchange: Exchange, now: float, still: float) -> None:
        transport = exchange.request.transport
        unsent = transport.get_write_buffer_size() if transport else 0
        if exchange.waiting_for == "client":
            if unsent != exchange.unsent:
                exchange.unsent = unsent
                exchange.still_since = now
            elif still >= CLIENT_STALL_SECONDS:
                exchange.interrupt(Refusal("client_stalled", "The client does not read its answer."))
        elif still >= exchange.patience:
            what = f"sent nothing for {exchange.patience:g} seconds."
            name = exchange.hold.upstream if exchange.hold else ""
            exchange.interrupt(Refusal("upstream_timeout", f'The upstream "{name}" {what}', moves_on=True))
        elif exchange.client is not None and now - exchange.commented >= KEEP_ALIVE_SECONDS and unsent == 0:
            exchange.commented = now
            with contextlib.suppress(ConnectionError):
                if not exchange.client.prepared:
                    await exchange.client.prepare(exchange.request)
                await exchange.client.write(KEEP_ALIVE)

    async def reload_catalog(self) -> None:
        """Take a changed models.yaml whole, or keep the last good catalog and say once what is wrong."""
        try:
            catalog = await asyncio.to_thread(load_catalog, self.config.models, self.config.upstreams)
        except ConfigError as error:
            self.log.say(f"the models stay as they were: {error}")
            return
        for line in compare_catalogs(self.catalog, catalog):
            self.log.say(f"models: {line}")
        self.catalog = catalog

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let running requests finish, for `drain_seconds` or until told to hurry; then end them, settled."""
        self.draining = True
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self.config.drain_seconds
        while self.exchanges and loop.time() < give_up and not hurry.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(hurry.wait(), min(WATCH_SECONDS, max(0.0, give_up - loop.time())))
        give_up = loop.time() + 2 * FRAME_SECONDS
        while self.exchanges and loop.time() < give_up:
            for exchange in list(self.exchanges):
                message = "The server is shutting down. Try again shortly."
                exchange.interrupt(Refusal("shutting_down", message, headers=retry_after(1)))
            await asyncio.sleep(WATCH_SECONDS / 10)


def describe_model(catalog: Catalog, model: Model, now: float) -> dict[str, Any]:
    """A model as GET /v1/models shows it."""
    deprecated = model.deprecation(now)
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": catalog.owned_by,
        "credit_multiplier": as_credits(model.multiplier),
        "tier": model.tier,
        "kind": model.kind,
        "context_window": model.context_window,
        "deprecated": deprecated
        and {
            "announced": iso_day(deprecated.announced),
            "sunset": iso_day(deprecated.sunset),
            "replacement": deprecated.replacement,
        },
    }


def compare_catalogs(old: Catalog, new: Catalog) -> Iterator[str]:
    """A line for each model that was added, removed or repriced; one line if none was."""
    lines = [f"added {name}" for name in new.models if name not in old.models]
    lines += [f"removed {name}" for name in old.models if name not in new.models]
    for name in new.models.keys() & old.models.keys():
        before, after = old.models[name].multiplier, new.models[name].multiplier
        if before != after:
            lines.append(f"repriced {name} from {as_credits(before)} to {as_credits(after)}")
    return iter(sorted(lines) or ["read again; none added, removed or repriced"])


def file_state(path: Path) -> tuple[int, ...]:
    """What changes when a file is edited or replaced; empty if it is not there."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return (found.st_mtime_ns, found.st_size, found.st_ino)


# ---- Log and metrics ------------------------------------------------------------------------------------------------


class Log:
    """Lines on stderr, one a request; no prompt, answer or key is in them."""

    def __init__(self, form: str) -> None:
        self.form = form

    def say(self, message: str) -> None:
        at = iso_time(now_ms())
        emit(encode_json({"time": at, "message": message}).decode() if self.form == "json" else f"{at} {message}")

    def broken(self, exchange: Exchange, error: Exception) -> None:
        name = exchange.hold.upstream if exchange.hold else None
        self.say(f"{exchange.request_id} upstream {name} broke: {type(error).__name__}: {error}")

    def request(self, exchange: Exchange, now: float) -> None:
        hold = exchange.hold
        prompt, completion, estimated = (hold.resolution and hold.resolution.bill if hold else None) or (0, 0, False)
        first, caller, model = exchange.first_byte, exchange.caller, exchange.model
        fields = {
            "time": iso_time(now_ms()),
            "request_id": exchange.request_id,
            "account": caller.account if caller else None,
            "key": caller.hint if caller else None,
            "model": model.id if model else None,
            "upstream": hold.upstream if hold else None,
            "status": exchange.status,
            "outcome": exchange.outcome,
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "estimated": estimated if self.form == "json" else " estimated" * estimated,
            "credits": as_credits(hold.settled.charge) if hold and hold.settled else 0,
            "first_byte_ms": round(1000 * (first - exchange.started)) if first else None,
            "ms": round(1000 * (now - exchange.started)),
        }
        if self.form == "json":
            emit(encode_json(fields).decode())
        else:
            emit(LOG_LINE % tuple("-" if value is None else value for value in fields.values()))


LOG_LINE = "%s %s %s %s %s %s %s %s %s+%s tokens%s %s credits %s/%s ms"


def emit(line: str) -> None:
    """A log that cannot be written (a full disk, a closed pipe) must not stop the books.

    Past the buffer of `sys.stderr`, which would keep what it cannot write, and fail with it at the exit.
    """
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), f"{line}\n".encode(errors="backslashreplace"))


class Metrics:
    """Counters for Prometheus. Labels are models and upstreams of the files, and our own codes: bounded sets."""

    def __init__(self, proxy: Proxy) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = prometheus_client.CollectorRegistry()
        by_model = ("model", "upstream", "outcome")
        counter = partial(prometheus_client.Counter, registry=self.registry)
        histogram = partial(prometheus_client.Histogram, registry=self.registry)
        gauge = partial(prometheus_client.Gauge, registry=self.registry)
        seconds = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
        self.requests = counter("proxy_requests", "Requests by outcome.", by_model)
        self.prompt_tokens = counter("proxy_prompt_tokens", "Prompt tokens charged.", ("model",))
        self.completion_tokens = counter("proxy_completion_tokens", "Completion tokens charged.", ("model",))
        self.credits = counter("proxy_credits", "Credits charged.", ("model",))
        # Looked up once for each set of labels, since that costs more than counting.
        self.requests_by = functools.lru_cache(maxsize=None)(self.requests.labels)
        self.charged_by = functools.lru_cache(maxsize=None)(self.label_charged)
        self.first_byte = histogram("proxy_first_byte_seconds", "To the answer's first byte.", buckets=seconds)
        self.duration = histogram("proxy_duration_seconds", "To the answer's end.", buckets=seconds)
        self.failures = counter("proxy_upstream_failures", "Attempts that failed.", ("upstream", "code"))
        gauge("proxy_open_requests", "Requests under way.").set_function(lambda: len(proxy.exchanges))
        gauge("proxy_ledger_transactions", "Transactions committed.").set_function(lambda: proxy.ledger.transactions)
        gauge("proxy_ledger_verbs", "Holds, settles and the like in them.").set_function(lambda: proxy.ledger.verbs)
        cooling = gauge("proxy_upstream_cooling", "1 while an upstream is skipped.", ("upstream",))
        for name in proxy.config.upstreams:
            cooling.labels(name).set_function(partial(is_cooling, proxy, name))

    def upstream_failed(self, upstream: str, code: str) -> None:
        self.failures.labels(upstream, code).inc()

    def label_charged(self, model: str) -> list[prometheus_client.Counter]:
        return [counter.labels(model) for counter in (self.prompt_tokens, self.completion_tokens, self.credits)]

    def count(self, exchange: Exchange, now: float) -> None:
        hold = exchange.hold
        model = exchange.model.id if exchange.model else ""
        self.requests_by(model, (hold.upstream or "") if hold else "", exchange.outcome).inc()
        if hold is None:
            return
        self.duration.observe(now - exchange.started)
        if exchange.first_byte is not None:
            self.first_byte.observe(exchange.first_byte - exchange.started)
        if hold.resolution and hold.resolution.bill and hold.settled:
            bill = hold.resolution.bill
            charged = (bill.prompt_tokens, bill.completion_tokens, hold.settled.charge / 1000)
            for counter, amount in zip(self.charged_by(model), charged, strict=True):
                counter.inc(amount)


def is_cooling(proxy: Proxy, name: str) -> bool:
    return proxy.targets[name].cooling_until > asyncio.get_running_loop().time()


# ---- Echo -----------------------------------------------------------------------------------------------------------


async def answer_echo(request: web.BaseRequest) -> web.StreamResponse:
    """The builtin upstream: answers a chat with its last user message, a word a token, over real HTTP and SSE."""
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


# ---- Application ----------------------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def running(config: Config, hurry: asyncio.Event | None = None) -> AsyncIterator[Proxy]:
    """The whole server, listening; on the way out it drains, settles and closes everything, in that order."""
    catalog = load_catalog(config.models, config.upstreams)
    async with contextlib.AsyncExitStack() as stack:
        stack.enter_context(own_database(config.database))
        connect(config.database).close()  # what is wrong with it is said here, before there are threads
        config = await start_echo(config, stack)
        proxy = Proxy(config, catalog, Log(config.log))
        stack.push_async_callback(proxy.ledger.close)
        await proxy.ledger.open()
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=POOLED_SECONDS)
        proxy.session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent",),
            read_bufsize=READ_BUFFER_BYTES,
        )
        await stack.enter_async_context(proxy.session)
        aiohttp.log.server_logger.addFilter(is_worth_a_traceback)
        server = web.Server(
            proxy.answer, handler_cancellation=True, access_log=None, keepalive_timeout=CLIENT_IDLE_SECONDS
        )
        runner = web.ServerRunner(server, shutdown_timeout=FRAME_SECONDS)
        await runner.setup()
        stack.push_async_callback(runner.cleanup)
        site = await listen(runner, config)
        proxy.base_url = f"http://{url_host(config.host)}:{bound_port(site)}"
        watch = asyncio.create_task(proxy.watch())
        try:
            yield proxy
        finally:
            await site.stop()
            await proxy.drain(hurry or asyncio.Event())
            watch.cancel()
            await asyncio.wait([watch])


def is_worth_a_traceback(record: logging.LogRecord) -> bool:
    """Bytes that are no HTTP get their 400 from aiohttp; anybody could fill the log with them."""
    error = record.exc_info[1] if record.exc_info else None
    return not isinstance(error, aiohttp.http_exceptions.HttpProcessingError)


async def listen(runner: web.ServerRunner, config: Config) -> web.TCPSite:
    site = web.TCPSite(runner, config.host, config.port, backlog=2048)
    try:
        await site.start()
    except OSError as error:
        why = error.strerror or str(error)
        raise CommandError(f"cannot listen on {config.host}:{config.port}: {why}. Is another server running?") from None
    return site


def bound_port(site: web.TCPSite) -> int:
    return int(site._server.sockets[0].getsockname()[1])  # type: ignore[union-attr]


def url_host(host: str) -> str:
    """An address that a client on this machine can use."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host


async def start_echo(config: Config, stack: contextlib.AsyncExitStack) -> Config:
    """Start the builtin upstream, if config has one; it stops last, after the drain."""
    names = [name for name, upstream in config.upstreams.items() if upstream.builtin]
    if not names:
        return config
    runner = web.ServerRunner(web.Server(answer_echo, handler_cancellation=True, access_log=None))
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    base_url = f"http://127.0.0.1:{bound_port(site)}/v1"
    echoes = {name: msgspec.structs.replace(config.upstreams[name], base_url=base_url) for name in names}
    return replace(config, upstreams={**config.upstreams, **echoes})


@contextlib.contextmanager
def own_database(path: Path) -> Iterator[None]:
    """One server owns a database: an exclusive lock on a file beside it, which holds the owner's pid."""
    try:
        file = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise CommandError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        if sys.platform != "win32":
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.truncate(file, 0)
        os.write(file, str(os.getpid()).encode())
        yield
    except BlockingIOError:
        owner = os.read(file, 20).decode() or "unknown"
        raise CommandError(f"{path}: the server with pid {owner} has it; stop that one first") from None
    finally:
        os.close(file)


async def serve(config: Config) -> int:
    """Run until SIGTERM or SIGINT; a second one hurries the drain."""
    stop, hurry = asyncio.Event(), asyncio.Event()

    def stop_or_hurry() -> None:
        (hurry if stop.is_set() else stop).set()

    if sys.platform != "win32":
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop_or_hurry)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))
    async with running(config, hurry) as proxy:
        gc.collect()
        gc.freeze()
        gc.set_threshold(*GARBAGE_THRESHOLDS)
        owner = await proxy.ledger.submit(partial(create_owner, config=proxy.config, now=now_ms()))
        if owner is not None:
            print(first_steps(proxy.base_url, owner))
            if not proxy.config.free_credits:
                print("It has no credits yet. Give it some: python proxy.py credit add owner 1000\n")
        print(f"listening on {proxy.base_url}")
        for line in proxy.catalog.retiring(time.time()):
            print(f"model {line}")
        probes = asyncio.create_task(print_upstreams(proxy))
        await stop.wait()
        print("stopping: running requests may finish")
        probes.cancel()
        await asyncio.wait([probes])
    return 0


def first_steps(base_url: str, key: str) -> str:
    """What a newcomer needs in the first minute; both snippets work as pasted."""
    return f"""Created the account "owner". Its key is shown this once; keep it:

    {key}

Try it with curl:

curl -N {base_url}/v1/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "echo", "stream": true, "messages": [{{"role": "user", "content": "Hello, who pays for this?"}}]}}'

Or with Python (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{base_url}/v1", api_key="{key}")
messages = [{{"role": "user", "content": "Hello, who pays for this?"}}]
for chunk in client.chat.completions.create(model="echo", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""


async def print_upstreams(proxy: Proxy) -> None:
    """A line an upstream, asked after listening."""

    async def one(target: Target) -> None:
        _, line = await probe(proxy.session, target, 2)
        print(line)

    await asyncio.gather(*map(one, proxy.targets.values()))


async def probe(session: aiohttp.ClientSession, target: Target, seconds: float) -> tuple[bool, str]:
    """Ask an upstream for its models: whether all is well, and a line that says so. One that is off is no failure."""
    upstream = target.upstream
    name = f"upstream {upstream.name}:"
    if upstream.missing:
        return True, f"{name} off, the environment variable {upstream.missing[0]} is not set"
    if upstream.builtin:
        return True, f"{name} builtin"
    try:
        async with asyncio.timeout(seconds):
            async with session.get(target.urls["models"], headers=target.headers, allow_redirects=False) as response:
                status = response.status
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        why = f"no answer within {seconds:g} s" if isinstance(error, TimeoutError) else "cannot be connected to"
        return False, f"{name} {target.address} not reachable, {why}"
    if status in (401, 403):
        return False, f"{name} {target.address} rejects its api_key (status {status})"
    return (
        status < 500,
        f"{name} {target.address} {'reachable' if status < 500 else f'answers with status {status}'}",
    )


# ---- Commands -------------------------------------------------------------------------------------------------------


class Report(NamedTuple):
    """What a command prints: a JSON value, or lines for people. `ok` False exits 1."""

    value: Any
    lines: Sequence[str]
    ok: bool = True


ACCOUNT_NOW = f"""
    SELECT id, name, tier, status, free - {LAPSING} AS free, free_expires_at, paid, held,
        (SELECT count(*) FROM api_key WHERE account_id = account.id AND revoked_at IS NULL) AS keys
    FROM account
"""


class AccountNow(NamedTuple):
    id: int
    name: str
    tier: str
    status: str
    free: int
    free_expires_at: int | None
    paid: int
    held: int
    keys: int

    def described(self) -> dict[str, Any]:
        return {
            "account": self.name,
            "tier": self.tier,
            "status": self.status,
            "credits": as_credits(self.free + self.paid),
            "free": as_credits(self.free),
            "free_expires_at": iso_time(self.free_expires_at) if self.free else None,
            "paid": as_credits(self.paid),
            "held": as_credits(self.held),
            "keys": self.keys,
        }


def find_account(db: sqlite3.Connection, name: str) -> AccountNow:
    row = db.execute(f"{ACCOUNT_NOW} WHERE name = :name", {"now": now_ms(), "name": name}).fetchone()
    if row is None:
        names = [other for (other,) in db.execute("SELECT name FROM account")]
        near = difflib.get_close_matches(name, names, 1)
        raise CommandError(f'there is no account "{name}"' + (f'; did you mean "{near[0]}"?' if near else ""))
    return AccountNow(*row)


def create_owner(db: sqlite3.Connection, config: Config, now: int) -> str | None:
    """The first account of a new database, and its key; None if there is an account already."""
    if db.execute("SELECT 1 FROM account").fetchone():
        return None
    tier = "unlimited" if "unlimited" in config.tiers else config.default_tier
    account_id = create_account(db, config, "owner", tier, now)
    return create_key(db, account_id, None, now)[0]


def create_account(db: sqlite3.Connection, config: Config, name: str, tier: str, now: int) -> int:
    """An account with its free credits."""
    expires_at = now + config.free_days * 86_400_000
    free = (config.free_credits, expires_at if config.free_credits else None, config.free_credits)
    sql = "INSERT INTO account (name, tier, created_at, free, free_expires_at, granted) VALUES (?, ?, ?, ?, ?, ?)"
    account_id = db.execute(sql, (name, tier, now, *free)).lastrowid
    assert account_id is not None
    if config.free_credits:
        insert_grant(db, account_id, "free", config.free_credits, None, None, now)
    return account_id


def insert_grant(
    db: sqlite3.Connection,
    account_id: int,
    kind: str,
    amount: int,
    ref: str | None,
    note: str | None,
    now: int,
) -> None:
    sql = "INSERT INTO credit_grant (account_id, kind, amount, ref, note, created_at) VALUES (?, ?, ?, ?, ?, ?)"
    db.execute(sql, (account_id, kind, amount, ref, note, now))


def grant_paid(
    db: sqlite3.Connection, account_id: int, amount: int, ref: str | None, note: str | None, now: int
) -> None:
    insert_grant(db, account_id, "paid", amount, ref, note, now)
    db.execute("UPDATE account SET paid = paid + ?, granted = granted + ? WHERE id = ?", (amount, amount, account_id))


def create_key(db: sqlite3.Connection, account_id: int, label: str | None, now: int) -> tuple[str, int]:
    """A new key, which nobody can read again, and its id."""
    key = f"sk-{secrets.token_urlsafe(32)}"
    row = (account_id, hashlib.sha256(key.encode()).digest(), f"…{key[-4:]}", label, now)
    sql = "INSERT INTO api_key (account_id, hash, hint, label, created_at) VALUES (?, ?, ?, ?, ?)"
    key_id = db.execute(sql, row).lastrowid
    assert key_id is not None
    return key, key_id


def check_tier(config: Config, tier: str) -> str:
    if tier not in config.tiers:
        raise CommandError(f'there is no tier "{tier}"; expected one of: {", ".join(config.tiers)}')
    return tier


def parse_amount(text: str) -> int:
    try:
        return to_thousandths(Decimal(text))
    except (InvalidOperation, ValueError):
        raise argparse.ArgumentTypeError(f"expected credits with at most three decimals, got {text!r}") from None


def parse_count(text: str, most: int = 10**6) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:20]) <= most:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {most:,}, got {text!r}")
    return int(text)


def account_add(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    tier = check_tier(config, options.tier or config.default_tier)
    if not options.name.isprintable() or len(options.name.split()) != 1:
        raise CommandError("an account's name must be one printable word")
    if options.credits < 0:
        raise CommandError("--credits must not be negative")
    with transaction(db):
        if db.execute("SELECT 1 FROM account WHERE name = ?", (options.name,)).fetchone():
            raise CommandError(f'there is an account "{options.name}" already')
        account_id = create_account(db, config, options.name, tier, now_ms())
        if options.credits:
            grant_paid(db, account_id, options.credits, None, None, now_ms())
        key, key_id = create_key(db, account_id, None, now_ms())
    credits = as_credits(config.free_credits + options.credits)
    value = {"account": options.name, "tier": tier, "credits": credits, "key": key, "key_id": key_id}
    lines = [f"account {options.name}, tier {tier}, {credits:,} credits", f"key (shown once): {key}"]
    return Report(value, lines)


def account_list(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    accounts = [AccountNow(*row) for row in db.execute(f"{ACCOUNT_NOW} ORDER BY name", {"now": now_ms()})]
    value = [account.described() for account in accounts]
    rows = [[row["account"], row["tier"], row["status"], f"{row['credits']:,}", f"{row['held']:,}", row["keys"]]
            for row in value]  # fmt: skip
    total = as_credits(sum(account.free + account.paid for account in accounts))
    held = as_credits(sum(account.held for account in accounts))
    rows.append(["total", "", "", f"{total:,}", f"{held:,}", sum(account.keys for account in accounts)])
    return Report(value, table(["account", "tier", "status", "credits", "held", "keys"], rows))


def account_show(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    value = find_account(db, options.name).described()
    shown = {key: f"{item:,}" if isinstance(item, Decimal) else item for key, item in value.items()}
    return Report(value, [f"{key + ':':<17} {'-' if item is None else item}" for key, item in shown.items()])


def account_change(column: str, db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    """Set an account's tier or status; it counts from the account's next request."""
    with transaction(db):
        account = find_account(db, options.name)
        if column == "tier":
            check_tier(config, options.value)
        db.execute(f"UPDATE account SET {column} = ? WHERE id = ?", (options.value, account.id))
    return account_show(db, config, options)


def key_add(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    with transaction(db):
        account = find_account(db, options.name)
        most = config.limits(account.tier).keys
        if most is not None and account.keys >= most:
            raise CommandError(f"the tier {account.tier} has {most} keys an account; revoke one first")
        key, key_id = create_key(db, account.id, options.label, now_ms())
    value = {"account": options.name, "key": key, "key_id": key_id, "label": options.label}
    return Report(value, [f"key {key_id} of {options.name} (shown once): {key}"])


def key_list(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    account = find_account(db, options.name)
    names = ("key_id", "label", "hint", "created_at", "last_used_at", "revoked_at")
    sql = "SELECT id, label, hint, created_at, last_used_at, revoked_at FROM api_key WHERE account_id = ? ORDER BY id"
    value = []
    for key_id, label, hint, *times in db.execute(sql, (account.id,)):
        value.append(dict(zip(names, (key_id, label, hint, *map(iso_time, times)), strict=True)))
    return Report(value, table(names, [[row[name] for name in names] for row in value]))


def key_revoke(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    with transaction(db):
        row = db.execute("SELECT revoked_at FROM api_key WHERE id = ?", (options.key_id,)).fetchone()
        if row is None:
            raise CommandError(f"there is no key {options.key_id}; `key list ACCOUNT` shows the ids")
        revoked_at = row[0] or now_ms()
        db.execute("UPDATE api_key SET revoked_at = ? WHERE id = ?", (revoked_at, options.key_id))
    value = {"key_id": options.key_id, "revoked_at": iso_time(revoked_at)}
    return Report(value, [f"key {options.key_id} is revoked since {value['revoked_at']}"])


def credit_add(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    """Grant credits, or correct a grant. The same reference twice adds once."""
    amount = options.amount
    with transaction(db):
        account = find_account(db, options.name)
        same = (
            options.ref is not None
            and db.execute("SELECT account_id, amount FROM credit_grant WHERE ref = ?", (options.ref,)).fetchone()
        )
        if same and same != (account.id, amount):
            raise CommandError(f'the reference "{options.ref}" stands for another account or amount already')
        if not same:
            check_correction(account, amount)
            grant_paid(db, account.id, amount, options.ref, options.note, now_ms())
        account = find_account(db, options.name)
    credits = as_credits(account.free + account.paid)
    value = {"account": options.name, "amount": as_credits(amount), "credits": credits, "added": not same}
    done = f'reference "{options.ref}" was added before; nothing changed' if same else f"added {value['amount']:,}"
    return Report(value, [f"{options.name}: {done}; the balance is {credits:,} credits"])


def check_correction(account: AccountNow, amount: int) -> None:
    """A correction takes purchased credits only, and none that a running request holds."""
    free_to_take = min(account.paid, account.free + account.paid - account.held)
    if amount < 0 and -amount > max(0, free_to_take):
        most = as_credits(max(0, free_to_take))
        raise CommandError(f"{account.name} has {most:,} purchased credits that are not in use; take that or less")
    if not amount:
        raise CommandError("the amount must not be zero")


USAGE = """
    SELECT date((r.id >> :bits) / 1000, 'unixepoch') AS day, r.model, count(*),
        sum(r.prompt_tokens), sum(r.completion_tokens), sum(r.charge)
    FROM request r WHERE r.id >= :since AND r.state <> 'open' AND (:account_id IS NULL OR r.account_id = :account_id)
    GROUP BY day, r.model ORDER BY day, r.model
"""
CALLERS_OF = """
    SELECT DISTINCT a.name FROM request r JOIN account a ON a.id = r.account_id
    WHERE r.model = ? AND r.id >= ? AND (? IS NULL OR a.id = ?) ORDER BY a.name
"""


def usage(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    """Requests, tokens and credits by day and model, and who still calls what is deprecated."""
    account_id = find_account(db, options.name).id if options.name else None
    today = now_ms() // 86_400_000
    since = (today - options.days + 1) * 86_400_000 << REQUEST_ID_BITS
    catalog = load_catalog(config.models, config.upstreams)
    numbers = ("requests", "prompt_tokens", "completion_tokens", "credits")
    value, rows, warnings = [], [], {}
    totals = [0, 0, 0, 0]
    for day, model, *counts in db.execute(USAGE, {"bits": REQUEST_ID_BITS, "since": since, "account_id": account_id}):
        totals = [a + b for a, b in zip(totals, counts, strict=True)]
        shown = [*counts[:3], as_credits(counts[3])]
        found = catalog.models.get(model)
        deprecated = found.deprecation(time.time()) if found else None
        accounts: list[str] = []
        if deprecated:
            accounts = [name for (name,) in db.execute(CALLERS_OF, (model, since, account_id, account_id))]
            warnings[model] = f"{model} retires on {iso_day(deprecated.sunset)}; called by {', '.join(accounts)}"
        ends = {"sunset": iso_day(deprecated.sunset), "accounts": accounts} if deprecated else None
        value.append({"day": day, "model": model, **dict(zip(numbers, shown, strict=True)), "deprecated": ends})
        rows.append([day, model, *(f"{n:,}" for n in shown)])
    rows.append(["total", "", *(f"{n:,}" for n in (*totals[:3], as_credits(totals[3])))])
    return Report(value, [*table(("day", "model", *numbers), rows), *warnings.values()])


AUDIT = f"""
    SELECT
        (SELECT coalesce(sum(amount), 0) FROM credit_grant),
        sum(lapsed + {LAPSING}), sum(free + paid - {LAPSING}), sum(held), sum(open_requests),
        (SELECT coalesce(sum(charge), 0) FROM request),
        (SELECT coalesce(sum(hold), 0) FROM request WHERE state = 'open'),
        (SELECT count(*) FROM request WHERE state = 'open')
    FROM account
"""
AUDIT_ACCOUNTS = """
    SELECT name, granted, charged, held, open_requests, granted - lapsed - charged - free - paid,
        (SELECT coalesce(sum(amount), 0) FROM credit_grant g WHERE g.account_id = account.id),
        coalesce(r.charges, 0), coalesce(r.holds, 0), coalesce(r.open, 0)
    FROM account LEFT JOIN (
        SELECT account_id, sum(charge) AS charges, sum(hold) FILTER (WHERE state = 'open') AS holds,
            count(*) FILTER (WHERE state = 'open') AS open FROM request GROUP BY account_id
    ) r ON r.account_id = account.id
"""
AUDIT_ROWS = """
    SELECT id FROM request WHERE (state = 'open') <> (charge IS NULL) OR (state = 'void' AND charge <> 0)
        OR (state <> 'open' AND charge IS NOT (prompt_tokens + completion_tokens) * multiplier)
"""
OVERRUNS = """
    SELECT r.id, a.name, r.model, r.hold, r.charge FROM request r JOIN account a ON a.id = r.account_id
    WHERE r.charge > r.hold ORDER BY r.id
"""


def audit(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    """Prove the books in one snapshot: each account's totals against its grants and requests, and the sums."""
    with transaction(db, "DEFERRED"):
        sums = db.execute(AUDIT, {"now": now_ms()}).fetchone()
        wrong = [problem for row in db.execute(AUDIT_ACCOUNTS) for problem in audit_account(*row)]
        wrong += [f"request req_{request_id:016x} is priced wrongly" for (request_id,) in db.execute(AUDIT_ROWS)]
        overruns = [
            {"request_id": f"req_{n:016x}", "account": name, "model": model,
             "hold": as_credits(amount), "charge": as_credits(charge)}
            for n, name, model, amount, charge in db.execute(OVERRUNS)
        ]  # fmt: skip
    grants, lapsed, balances, held, opened, charges, holds, rows_open = (number or 0 for number in sums)
    if grants - lapsed - charges != balances:
        wrong.append("grants - lapsed - charges is not the sum of the balances")
    if (held, opened) != (holds, rows_open):
        wrong.append("what accounts hold is not the sum of the open holds")
    totals = {"grants": grants, "lapsed": lapsed, "charges": charges, "balances": balances, "held": held}
    value = {"ok": not wrong, **{name: as_credits(n) for name, n in totals.items()}}
    value |= {"open_requests": opened, "overruns": overruns, "problems": wrong}
    lines = table(("credits", "total"), [[name, f"{as_credits(n):,}"] for name, n in totals.items()])
    lines.append(f"open requests: {opened}, with holds of {as_credits(holds):,}")
    lines += [f"overrun: {o['request_id']} of {o['account']} was charged {o['charge']:,} on a hold of {o['hold']:,}"
              for o in overruns]  # fmt: skip
    verdict = "the books add up: grants - lapsed - charges = balances" if not wrong else "THE BOOKS DO NOT ADD UP"
    return Report(value, [*lines, *wrong, verdict], ok=not wrong)


def audit_account(
    name: str, granted: int, charged: int, held: int, opened: int, gap: int, grants: int, charges: int,
    holds: int, rows_open: int,
) -> Iterator[str]:  # fmt: skip
    """What does not add up in one account."""
    if granted != grants:
        yield f"account {name}: granted {as_credits(granted)}, but its grants are {as_credits(grants)}"
    if charged != charges:
        yield f"account {name}: charged {as_credits(charged)}, but its requests cost {as_credits(charges)}"
    if held != holds or opened != rows_open:
        yield f"account {name}: holds {as_credits(held)}, but its open requests hold {as_credits(holds)}"
    if gap:
        yield f"account {name}: its balance is off by {as_credits(gap)}"


def check(db: sqlite3.Connection, config: Config, options: argparse.Namespace) -> Report:
    """Both files (they are good, or this would not run), the database, the tiers in use, and each upstream."""
    catalog = load_catalog(config.models, config.upstreams)
    (accounts,) = db.execute("SELECT count(*) FROM account").fetchone()
    lines = [
        (True, f"{config.path}: {len(config.tiers)} tiers, {len(config.upstreams)} upstreams"),
        (True, f"{config.models}: {len(catalog.models)} models"),
        (True, f"{config.database}: {accounts} accounts" if config.database.exists() else "no database yet"),
    ]
    for (tier,) in db.execute("SELECT DISTINCT tier FROM account"):
        if tier not in config.tiers:
            lines.append((False, f'tier "{tier}" of some accounts is not in {config.path}; they have the default\'s'))
    lines += [(True, f"model {line}") for line in catalog.retiring(time.time())]
    lines += asyncio.run(check_upstreams(config, catalog))
    well = all(ok for ok, _ in lines)
    value = {"ok": well, "checks": [{"ok": ok, "check": line} for ok, line in lines]}
    return Report(value, [f"{'ok  ' if ok else 'FAIL'} {line}" for ok, line in lines], ok=well)


async def check_upstreams(config: Config, catalog: Catalog) -> list[tuple[bool, str]]:
    lines = []
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as session:
        for target in map(Target, config.upstreams.values()):
            lines.append(await probe(session, target, 5))
            upstream = target.upstream
            if lines[-1][0] and upstream.base_url and not upstream.missing and upstream.usage_in_stream == "ask":
                lines += await check_stream_options(session, target, catalog)
    return lines


async def check_stream_options(
    session: aiohttp.ClientSession, target: Target, catalog: Catalog
) -> list[tuple[bool, str]]:
    """Ask for one token with stream_options, and without them if that is refused: does the server reject them?"""
    name = target.upstream.name
    chat = (m for m in catalog.models.values() if name in m.upstreams and m.kind != "embedding")
    model = next(chat, None)
    if model is None:
        return []
    body: dict[str, Any] = {"model": model.upstream_model, "messages": [{"role": "user", "content": "Hi"}]}
    body |= {"max_tokens": 1, "stream": True}
    statuses = []
    try:
        for options in ({"stream_options": {"include_usage": True}}, {}):
            async with (
                asyncio.timeout(5),
                session.post(
                    target.urls["chat/completions"],
                    data=encode_json({**body, **options}),
                    headers=target.headers,
                    allow_redirects=False,
                ) as response,
            ):
                statuses.append(response.status)
    except (aiohttp.ClientError, OSError, TimeoutError):
        return []
    if statuses[0] in (400, 422) and statuses[1] == 200:
        return [(False, f"upstream {name}: rejects stream_options; set usage_in_stream: never")]
    return []


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns; numbers to the right."""
    texts = [list(header), *(["-" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numeric = [all(re.fullmatch(r"-?[\d,.]*", row[n]) for row in texts[1:]) for n in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in texts
    ]


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="proxy.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config", type=Path, metavar="FILE", default=Path(__file__).with_name("config.yaml"),
        help="config.yaml beside proxy.py, if not given",
    )  # fmt: skip
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    parser.set_defaults(run=None)
    commands.add_parser("serve", help="run the server (the default)")

    def command(group: Any, name: str, run: Callable[..., Report], **more: Any) -> argparse.ArgumentParser:
        made: argparse.ArgumentParser = group.add_parser(name, **more)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON document")
        return made

    def account_command(*what: Any, **more: Any) -> argparse.ArgumentParser:
        made = command(*what, **more)
        made.add_argument("name", metavar="ACCOUNT")
        return made

    account = commands.add_parser("account", help="people").add_subparsers(required=True, metavar="COMMAND")
    add = account_command(account, "add", account_add, help="create one and print its key, once")
    add.add_argument("--tier", metavar="T")
    add.add_argument("--credits", type=parse_amount, default=0, metavar="N", help="purchased, on top of the free ones")
    command(account, "list", account_list, help="all of them, with their credits")
    account_command(account, "show", account_show, help="one of them")
    tier = account_command(account, "tier", partial(account_change, "tier"), help="change its limits")
    tier.add_argument("value", metavar="TIER")
    for verb, status, what in (("suspend", "suspended", "refuse its requests"), ("resume", "active", "undo that")):
        change = account_command(account, verb, partial(account_change, "status"), help=what)
        change.set_defaults(value=status)
    key = commands.add_parser("key", help="their keys").add_subparsers(required=True, metavar="COMMAND")
    account_command(key, "add", key_add, help="print a new one, once").add_argument("--label", metavar="L")
    account_command(key, "list", key_list, help="of an account: ids, hints and when they were used")
    revoke = command(key, "revoke", key_revoke, help="end one for ever, at once")
    revoke.add_argument("key_id", type=partial(parse_count, most=2**63 - 1), metavar="KEY_ID")
    credit = commands.add_parser("credit", help="their credits").add_subparsers(required=True, metavar="COMMAND")
    grant = account_command(credit, "add", credit_add, help="grant some; a negative amount corrects")
    grant.add_argument("amount", type=parse_amount, metavar="AMOUNT")
    grant.add_argument("--ref", metavar="R", help="the same reference twice adds once")
    grant.add_argument("--note", metavar="N")
    used = command(commands, "usage", usage, help="requests, tokens and credits by day and model")
    used.add_argument("name", nargs="?", metavar="ACCOUNT")
    used.add_argument("--days", type=parse_count, default=30, metavar="N")
    command(commands, "check", check, help="both files, the database, each upstream")
    command(commands, "audit", audit, help="prove the books")
    return parser.parse_args(arguments)


def run_command(config: Config, options: argparse.Namespace) -> int:
    database = config.database
    if options.run is check and not database.exists():
        database = Path(":memory:")
    elif options.run is not account_add and not database.exists():
        raise CommandError(f"{database}: there is no database yet; `serve` or `account add` makes it")
    with contextlib.closing(connect(database)) as db:
        report = options.run(db, config, options)
    print(encode_json(report.value).decode() if options.json else "\n".join(report.lines))
    return 0 if report.ok else 1


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_arguments(arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", line_buffering=True)
    try:
        config = load_config(options.config)
        if options.run is not None:
            return run_command(config, options)
        loop_factory = None if sys.platform == "win32" else uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(serve(config))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except (CommandError, Refusal, sqlite3.Error) as error:
        print(f"proxy.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
