"""The operator's pages: every account, the totals, the upstreams, the audit. 404 for everybody else."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import proxy as core
from extras import queries
from extras.audit import prove_books
from extras.console import accounts, guard, pages, people, show
from extras.console.accounts import Rejected
from extras.console.show import Answer
from proxy import CommandError

if TYPE_CHECKING:
    from extras.console.site import Site, Visit

ACCOUNTS_A_PAGE = 50


class UpstreamState(NamedTuple):
    name: str
    state: str
    is_well: bool
    models: int


def upstream_states(site: Site) -> list[UpstreamState]:
    """By the last probe or request of each."""
    proxy, found = site.proxy, []
    for name, upstream in proxy.config.upstreams.items():
        served = sum(name in model.upstreams for model in proxy.catalog.models.values())
        if upstream.missing:
            state = f"off: {upstream.missing[0]} is not set"
        elif upstream.builtin:
            state = "builtin"
        else:
            state = {True: "reachable", False: "not reachable", None: "not asked yet"}[upstream.state.reached]
        found.append(UpstreamState(name, state, proxy.is_there(upstream), served))
    return found


def overview(visit: Visit) -> Answer:
    db, now, site = visit.db, visit.now, visit.site
    wanted, page = visit.query.get("q", "").strip(), pages.read_page(visit)
    found = queries.list_accounts(db, now, wanted, ACCOUNTS_A_PAGE + 1, (page - 1) * ACCOUNTS_A_PAGE)
    uses = queries.usage(db, queries.days_ago(now, pages.CHART_DAYS))
    return visit.render(
        "admin.html",
        accounts=found[:ACCOUNTS_A_PAGE],
        wanted=wanted,
        page=page,
        more=len(found) > ACCOUNTS_A_PAGE,
        totals=queries.totals(db, now),
        chart=pages.draw(uses, now, pages.CHART_DAYS),
        by_model=pages.add_up(uses, lambda use: (use.model,)),
        by_day=pages.add_up(uses, lambda use: (use.day, use.model))[::-1],
        upstreams=upstream_states(site),
        tiers=list(site.proxy.config.tiers),
        default_tier=site.proxy.config.default_tier,
    )


async def add_account(visit: Visit) -> Answer:
    """An account, with its free credits; the answer is its link, and a page that shows it for a minute."""
    operator, config = visit.whom, visit.site.proxy.config
    name, tier, email = (
        people.spelled(visit.text("name")),
        visit.text("tier") or config.default_tier,
        visit.text("email"),
    )
    errors = accounts.found({"name": accounts.name_fault(name), "email": accounts.email_fault(email)})
    paid = accounts.parse_credits(visit.text("credits"), errors, "credits") or 0
    if tier not in config.tiers:
        errors["tier"] = "There is no such tier."
    if errors:
        return await visit.again(overview, **errors)
    form = visit.form_id or secrets.token_urlsafe(16)

    def verb(db: Any, now: int) -> tuple[str, str] | Rejected:
        if repeated := people.find_answer(db, now, f"link {operator.account_id}", form):
            person = people.find_person(db, repeated[0])
            assert person is not None
            return person.name, repeated[1]
        if taken := queries.name_taken(db, name):
            return Rejected(f"There is an account “{taken}” already.")
        account_id = core.create_account(db, now, name, tier, config.free_credits.amount, config.free_credits.days)
        if paid:
            queries.grant_paid(db, now, queries.find_account(db, now, name), paid)
        people.change(db, account_id, "email", email or None)
        token = people.issue_link(db, now, account_id)
        people.keep_answer(db, now, account_id, f"link {operator.account_id}", form, token)
        return name, token

    made = await visit.write(verb)
    if isinstance(made, Rejected):
        return await visit.again(overview, name=made.message)
    return show_link(visit, *made, form)


def show_link(visit: Visit, name: str, token: str, form: str) -> Answer:
    """The page that follows can show the link for a minute; it stands in the answer itself, too."""
    path = f"/admin/accounts/{show.path(name)}?{show.query({'form': form})}"
    return visit.go(path, f"{visit.base_url}/link/{token}\n")


def find(visit: Visit) -> queries.Account:
    try:
        return queries.find_account(visit.db, visit.now, visit.arguments[0])
    except CommandError as error:
        raise guard.Stop(404, accounts.sentence(error)) from None


def account(visit: Visit) -> Answer:
    found = find(visit)
    person = people.find_person(visit.db, found.id)
    config = visit.site.proxy.config
    form = visit.query.get("form", "") if not visit.errors else ""
    answer = people.find_answer(visit.db, visit.now, f"link {visit.whom.account_id}", form)
    total, grants = queries.grants_page(visit.db, found.id, pages.read_page(visit), pages.GRANTS_A_PAGE)
    uses = queries.usage(visit.db, queries.days_ago(visit.now, pages.CHART_DAYS), found.id, by_key=True)
    keys = queries.keys_of(visit.db, found.id)
    return visit.render(
        "admin_account.html",
        whose=person,
        link=f"{visit.base_url}/link/{answer[1]}" if answer and answer[0] == found.id else None,
        added="added" in visit.query,
        keys=keys,
        names={key.id: pages.key_name(key) for key in keys},
        by_model=pages.add_up(uses, lambda use: (use.model,)),
        grants=grants,
        page=pages.read_page(visit),
        pages=max(1, -(-total // pages.GRANTS_A_PAGE)),
        tiers=sorted({*config.tiers, found.tier}),
        **pages.overview(visit, found.id),
    )


async def change_account(visit: Visit) -> Answer:
    """One of the forms of an account's page: `action` says which, or the field that only one of them has."""
    forms: dict[str, Callable[[Visit, queries.Account], Awaitable[Answer]]] = {
        "tier": set_tier,
        "suspend": partial(set_status, status="suspended"),
        "resume": partial(set_status, status="active"),
        "credits": add_credits,
        "revoke": revoke_key,
        "link": make_link,
    }
    fields = {"amount": "credits", "key_id": "revoke", "tier": "tier"}
    action = visit.text("action") or next((fields[name] for name in fields if name in visit.form), "")
    found = await visit.read(find)
    if action not in forms:
        raise guard.Stop(404, "There is no such form.")
    return await forms[action](visit, found)


def back(visit: Visit, found: queries.Account, **query: str) -> Answer:
    more = f"?{show.query(query)}" if query else ""
    return visit.go(f"/admin/accounts/{show.path(found.name)}{more}")


async def set_tier(visit: Visit, found: queries.Account) -> Answer:
    config, tier = visit.site.proxy.config, visit.text("tier")
    if tier not in config.tiers:
        return await visit.again(account, tier="There is no such tier.")
    await visit.write(lambda db, now: queries.set_tier(db, config, found.id, tier), found.id)
    return back(visit, found)


async def set_status(visit: Visit, found: queries.Account, status: str) -> Answer:
    if found.id == visit.whom.account_id and status != "active":
        return await visit.again(account, status="You would lock yourself out. Ask another operator.")
    await visit.write(lambda db, now: queries.set_status(db, found.id, status), found.id)
    return back(visit, found)


async def add_credits(visit: Visit, found: queries.Account) -> Answer:
    """A negative amount corrects. The same reference, or the same form within a minute, adds once."""
    errors: dict[str, str] = {}
    amount = accounts.parse_credits(visit.text("amount"), errors, "amount", least=None)
    ref, note = visit.text("ref") or None, visit.text("note") or None
    if not amount and not errors:
        errors["amount"] = "How many credits?"
    errors |= accounts.found({"ref": accounts.text_fault(ref or ""), "note": accounts.text_fault(note or "", 500)})
    if errors:
        return await visit.again(account, **errors)
    scope = f"grant {found.id} {visit.whom.account_id}"

    def verb(db: Any, now: int) -> Rejected | None:
        if people.find_answer(db, now, scope, visit.form_id):
            return None
        try:
            queries.grant_paid(db, now, found, amount or 0, ref, note)
        except CommandError as error:
            return Rejected(accounts.sentence(error))
        people.keep_answer(db, now, found.id, scope, visit.form_id, "added")
        return None

    if rejected := await visit.write(verb, found.id):
        return await visit.again(account, **{"ref" if "reference" in rejected.message else "amount": rejected.message})
    return back(visit, found, added="1")


async def revoke_key(visit: Visit, found: queries.Account) -> Answer:
    await accounts.end_key(visit, found.id)
    return back(visit, found)


async def make_link(visit: Visit, found: queries.Account) -> Answer:
    form, scope = visit.form_id or secrets.token_urlsafe(16), f"link {visit.whom.account_id}"

    def verb(db: Any, now: int) -> str:
        if repeated := people.find_answer(db, now, scope, form):
            return repeated[1]
        token = people.issue_link(db, now, found.id)
        people.keep_answer(db, now, found.id, scope, form, token)
        return token

    return show_link(visit, found.name, await visit.write(verb, found.id), form)


def requests(visit: Visit) -> Answer:
    before, size = pages.read_before(visit), pages.REQUESTS_A_PAGE
    found = queries.requests_page(visit.db, None, before, size + 1)
    older = found[size - 1].name if len(found) > size else None
    return visit.render("admin_requests.html", requests=found[:size], older=older, first=before is None)


def audit(visit: Visit) -> Answer:
    return visit.render("admin_audit.html", audit=prove_books(visit.db, visit.now), name=core.request_name)
