"""What everybody may see, and what who is signed in may: each a function that reads and renders, in the reading thread.

Every statement here carries the account's id.
"""

from __future__ import annotations

import datetime
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import proxy as core
from extras import queries
from extras.console import chart, docs, guard, people, show
from extras.console.show import Answer
from extras.queries import DAY_MS, Key, Use

if TYPE_CHECKING:
    from extras.console.site import Visit

DAYS = (7, 30, 90, 365)
CHART_DAYS = 30
REQUESTS_A_PAGE = 50
GRANTS_A_PAGE = 20
REQUESTS_ON_DASHBOARD = 20
LOW_DAYS = 3  # a balance that lasts no longer, at the pace since the first request of the last seven days, is low


def error(visit: Visit, status: int, message: str) -> Answer:
    return visit.render("error.html", status, message=message, status=status)


# ---- Everybody ------------------------------------------------------------------------------------------------------


def home(visit: Visit) -> Answer:
    if visit.person:
        return visit.go("/dashboard")
    free = visit.site.proxy.config.free_credits
    return visit.render("home.html", free=free, model=docs.example_model(visit.site.proxy), key="YOUR_KEY")


def models(visit: Visit) -> Answer:
    wanted = visit.query.get("q", "").strip()
    shown = [row for row in docs.models(visit.site.proxy) if wanted.casefold() in row["search"]]
    return visit.render("models.html", models=shown, wanted=wanted)


def docs_page(visit: Visit) -> Answer:
    return visit.render(
        "docs.html", model=docs.example_model(visit.site.proxy), key="YOUR_KEY", **docs.all_of(visit.site.proxy)
    )


def register(visit: Visit) -> Answer:
    if visit.person and not visit.errors:
        return visit.go("/dashboard")
    if not visit.site.config.is_open:
        raise guard.Stop(404, "Registration is closed here. Ask who runs this service for an account.")
    return visit.render("register.html", free=visit.site.proxy.config.free_credits)


def login(visit: Visit) -> Answer:
    if visit.person and not visit.errors:
        return visit.go(guard.next_path(visit.query.get("next", "")))
    return visit.render("login.html", next=visit.form.get("next") or visit.query.get("next", ""))


def link(visit: Visit) -> Answer:
    """Only shows the form: a mail scanner that opens the link does not use it up."""
    person = people.find_link(visit.db, visit.now, visit.arguments[0])
    if person is None:
        return visit.render("link_over.html", 404)
    return visit.render("link.html", whose=person)


def forgot(visit: Visit) -> Answer:
    if visit.site.config.mail is None:
        raise guard.Stop(404, "This server sends no mail. Ask who runs it for a link that sets a password.")
    return visit.render("forgot.html", sent="sent" in visit.query)


# ---- Who is signed in -----------------------------------------------------------------------------------------------


def dashboard(visit: Visit) -> Answer:
    account_id = visit.whom.account_id
    values = overview(visit, account_id)
    return visit.render("dashboard.html", model=docs.example_model(visit.site.proxy), key="YOUR_KEY", **values)


def overview(visit: Visit, account_id: int) -> dict[str, Any]:
    """What the dashboard shows of an account, and the operator's page of it."""
    db, now = visit.db, visit.now
    account = queries.account_of(db, now, account_id)
    assert account is not None
    since = queries.days_ago(now, CHART_DAYS)
    uses = queries.usage(db, since, account_id)
    return {
        "account": account,
        "chart": draw(uses, now, CHART_DAYS),
        "requests": queries.requests_page(db, account_id, limit=REQUESTS_ON_DASHBOARD),
        "deprecated": queries.deprecated_uses(db, visit.site.proxy.catalog, now, since, account_id),
        "is_low": is_low(account, uses, now),
    }


def is_low(account: queries.Account, uses: list[Use], now: int) -> bool:
    today = now // DAY_MS
    week = [use for use in uses if use.day >= queries.iso_day(today - 6)]
    days = next((back for back in range(7, 0, -1) if week and week[0].day <= queries.iso_day(today - back + 1)), 1)
    spent = sum(use.charge for use in week)
    return account.credits <= 0 or account.credits < spent * LOW_DAYS // days


def draw(uses: list[Use], now: int, days: int) -> chart.Chart:
    values: defaultdict[str, int] = defaultdict(int)
    for use in uses:
        values[use.day] += use.charge
    return chart.draw(values, datetime.date.fromisoformat(queries.iso_day(now // DAY_MS)), days)


def keys(visit: Visit, new_key: str | None = None) -> Answer:
    proxy, person = visit.site.proxy, visit.whom
    found = queries.keys_of(visit.db, person.account_id)
    limit = proxy.config.limits(person.tier).keys
    if new_key is not None:
        visit.form = {}
    return visit.render(
        "keys.html",
        keys=sorted(found, key=lambda key: (key.revoked_at is not None, -key.id)),
        limit=limit,
        in_use=sum(key.revoked_at is None for key in found),
        new_key=new_key,
        model=docs.example_model(proxy),
        names=sorted(proxy.catalog.models),
    )


def usage(visit: Visit) -> Answer:
    found = read_usage(visit)
    days = found["days"]
    tables: dict[str, Any] = {
        "by_day": add_up(found["uses"], lambda use: (use.day,)),
        "by_model": add_up(found["uses"], lambda use: (use.model,)),
        "by_key": add_up(found["uses"], lambda use: (use.key_id,)),
        "whole": add_up(found["uses"], lambda use: (use.day, use.model, use.key_id)),
    }
    tables["by_day"].reverse()
    tables["whole"].reverse()
    return visit.render("usage.html", chart=draw(found["uses"], visit.now, days), **tables, **found)


def usage_csv(visit: Visit) -> Answer:
    found = read_usage(visit)
    rows: list[tuple[Any, ...]] = [
        ("day", "model", "key_id", "key", "requests", "prompt_tokens", "completion_tokens", "credits")
    ]
    for use in found["uses"]:
        key = found["keys"][use.key_id]
        counts = (use.requests, use.prompt_tokens, use.completion_tokens, core.as_credits(use.charge))
        rows.append((use.day, use.model, use.key_id, key_name(key), *counts))
    headers = {
        "Content-Type": "text/csv; charset=utf-8",
        "Content-Disposition": f'attachment; filename="usage-{queries.iso_day(visit.now // DAY_MS)}.csv"',
        "Cache-Control": "no-store",
    }
    return Answer(show.csv(rows), 200, headers)


def read_usage(visit: Visit) -> dict[str, Any]:
    """The uses that the filters leave. A key of somebody else is not there."""
    account_id = visit.whom.account_id
    keys = {key.id: key for key in queries.keys_of(visit.db, account_id)}
    asked = visit.query.get("days", "")
    days = min(int(asked), DAYS[-1]) if re.fullmatch(r"[1-9][0-9]{0,5}", asked) else CHART_DAYS
    model, key = visit.query.get("model", ""), visit.query.get("key", "")
    key_id = int(key) if re.fullmatch(r"[0-9]{1,18}", key) else None
    if key and key_id not in keys:
        raise guard.Stop(404, "There is no such key.")
    since = queries.days_ago(visit.now, days)
    every = queries.usage(visit.db, since, account_id, by_key=True)
    uses = [use for use in every if (not model or use.model == model) and (key_id is None or use.key_id == key_id)]
    return {
        "uses": uses,
        "keys": keys,
        "names": {key.id: key_name(key) for key in keys.values()},
        "days": days,
        "choices": sorted({*DAYS, days}),
        "model": model,
        "key_id": key_id,
        "models": sorted({use.model for use in every} | ({model} if model else set())),
        "filters": {"days": days, "model": model, "key": key_id},
    }


def key_name(key: Key) -> str:
    return key.label or key.hint


def add_up(uses: list[Use], group: Any) -> list[tuple[Any, ...]]:
    """Groups with their requests, tokens and credits, in the order of the first of each."""
    sums: dict[tuple[Any, ...], list[int]] = {}
    for use in uses:
        row = sums.setdefault(group(use), [0, 0, 0, 0])
        for place, value in enumerate((use.requests, use.prompt_tokens, use.completion_tokens, use.charge)):
            row[place] += value
    return [(*names, *row) for names, row in sums.items()]


def requests(visit: Visit) -> Answer:
    before = read_before(visit)
    found = queries.requests_page(visit.db, visit.whom.account_id, before, REQUESTS_A_PAGE + 1)
    more = found[REQUESTS_A_PAGE - 1].name if len(found) > REQUESTS_A_PAGE else None
    return visit.render(
        "requests.html", requests=found[:REQUESTS_A_PAGE], older=more, first=before is None,
        model=docs.example_model(visit.site.proxy), key="YOUR_KEY",
    )  # fmt: skip


def read_before(visit: Visit) -> int | None:
    """The id that ended the page before: as pages and answers name it, or as a number."""
    asked = visit.query.get("before", "")
    if not asked:
        return None
    if named := re.fullmatch(r"req_([0-9a-f]{16})", asked):
        number = int(named[1], 16)
    elif re.fullmatch(r"[0-9]{1,19}", asked):
        number = int(asked)
    else:
        raise guard.Stop(404, "There is no such request.")
    return min(number, 2**63 - 1)


def billing(visit: Visit) -> Answer:
    account = queries.account_of(visit.db, visit.now, visit.whom.account_id)
    page = read_page(visit)
    total, grants = queries.grants_page(visit.db, visit.whom.account_id, page, GRANTS_A_PAGE)
    pages = max(1, -(-total // GRANTS_A_PAGE))
    packs = visit.site.packs(visit.whom.name)
    return visit.render("billing.html", account=account, packs=packs, grants=grants, page=page, pages=pages)


def read_page(visit: Visit) -> int:
    asked = visit.query.get("page", "1")
    return int(asked) if re.fullmatch(r"[1-9][0-9]{0,6}", asked) else 1


def settings(visit: Visit) -> Answer:
    return visit.render("settings.html", changed=visit.query.get("changed", ""))
