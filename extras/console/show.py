"""How figures, times and names look on a page: filters and helpers of the templates."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from proxy import as_credits


class Answer(NamedTuple):
    """What goes back, apart from the headers of every answer."""

    body: str = ""
    status: int = 200
    headers: Mapping[str, str] = {}


OUTCOMES = {
    "ok": "complete",
    "client_gone": "left early",
    "client_stalled": "not read",
    "interrupted": "interrupted",
    None: "under way",
}


def credits(thousandths: int | None) -> str:
    """842500 is 842.5, with thousands separators."""
    return "–" if thousandths is None else f"{as_credits(thousandths):,}"  # noqa: RUF001


def number(value: int | decimal.Decimal | None) -> str:
    return "–" if value is None else f"{value:,}"  # noqa: RUF001


def day(ms: int | None) -> str:
    return "–" if ms is None else moment(ms).strftime("%Y-%m-%d")  # noqa: RUF001


def last_day(ms: int | None) -> str:
    """Of what ends at 24:00 UTC."""
    return "no end" if ms is None else day(ms - 1)


def time(ms: int | None) -> str:
    return "never" if ms is None else moment(ms).strftime("%Y-%m-%d %H:%M UTC")


def moment(ms: int) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(ms // 1000, datetime.UTC)


def seconds(ms: int | None) -> str:
    if ms is None:
        return "–"  # noqa: RUF001
    return f"{ms:,} ms" if ms < 1000 else f"{ms / 1000:,.1f} s"


def outcome(code: str | None) -> str:
    return OUTCOMES.get(code) or str(code).replace("_", " ")


def path(name: str) -> str:
    """A name as one segment of a path."""
    return quote(name, safe="")


def query(values: Mapping[str, Any], **more: Any) -> str:
    """What stands behind the question mark, without what is empty."""
    return urlencode({key: value for key, value in {**values, **more}.items() if value not in (None, "")})


def csv_cell(value: Any) -> str:
    """A spreadsheet must not take what somebody typed for a formula."""
    text = str(value)
    text = f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") or text[:1] in ("\t", "\r") else text
    return '"' + text.replace('"', '""') + '"' if any(c in text for c in ',"\r\n') else text


def csv(rows: Sequence[Sequence[Any]]) -> str:
    return "".join(",".join(map(csv_cell, row)) + "\r\n" for row in rows)


FILTERS = {
    "credits": credits,
    "number": number,
    "day": day,
    "last_day": last_day,
    "time": time,
    "seconds": seconds,
    "outcome": outcome,
    "path": path,
}
