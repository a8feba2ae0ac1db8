"""GET /api/billing/topup-packs and /topup-history: what there is to buy, and what an account bought."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from aiohttp import web

from proxy import Database, Exchange, Proxy, as_credits, iso_time

A_PAGE = 20


def mount(proxy: Proxy) -> None:
    proxy.companions["/api/billing/topup-packs"] = partial(list_packs, proxy)
    proxy.companions["/api/billing/topup-history"] = partial(list_history, proxy)


async def list_packs(proxy: Proxy, exchange: Exchange) -> web.StreamResponse:
    caller = proxy.active(exchange)
    packs = proxy.console.packs(caller.account) if proxy.console is not None else []
    return proxy.show(exchange, {"status": "success", "data": {"packs": packs}})


async def list_history(proxy: Proxy, exchange: Exchange) -> web.StreamResponse:
    """Purchased credits, newest first."""
    caller = proxy.active(exchange)
    asked = exchange.request.query.get("page", "1")
    page = int(asked) if re.fullmatch(r"[1-9][0-9]{0,8}", asked) else 1
    verb = partial(find_history, account_id=caller.account_id, page=page)
    total, rows = await proxy.ledger.submit(verb, whose=caller.account_id, power_proof=False, writes=False)
    packs = [describe(*row) for row in rows]
    data = {"total": total, "per_page": A_PAGE, "current_page": page, "packs": packs}
    return proxy.show(exchange, {"status": "success", "data": data})


def describe(grant_id: int, amount: int, ref: str | None, created_at: int) -> dict[str, Any]:
    at = iso_time(created_at)
    paid = {"status": "paid", "transaction_id": ref, "paid_at": at, "created_at": at}
    return {"id": grant_id, "credits": as_credits(amount), **paid}


def find_history(db: Database, now: int, account_id: int, page: int) -> tuple[int, list[Any]]:
    which = "FROM credit_grant WHERE account_id = :account_id AND kind = 'paid'"
    values = {"account_id": account_id, "most": A_PAGE, "skip": (page - 1) * A_PAGE}
    (total,) = db.execute(f"SELECT count(*) {which}", values).fetchone()
    sql = f"SELECT id, amount, ref, created_at {which} ORDER BY id DESC LIMIT :most OFFSET :skip"
    return total, db.execute(sql, values).fetchall()
