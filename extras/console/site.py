"""Answers a request of a person: guards it, finds its page, and brings it to where it may be worked on.

Pages are read and rendered in a thread of their own, on a connection of their own; passwords have another; what is
written goes through the ledger's one writer. The loop, where the relay is, only moves what is ready.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
import sqlite3
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl, quote, unquote

import jinja2
from aiohttp import web

import proxy as core
from extras import queries
from extras.console import accounts, config, guard, mail, operator, pages, people, show
from extras.console.passwords import Passwords
from extras.console.people import Person
from extras.console.show import Answer
from proxy import Exchange, Proxy, Refusal

T = TypeVar("T")
HERE = Path(__file__).parent
BODY_BYTES_MAX = 64 * 1024
BODY_SECONDS = 15
FIELDS_MAX = 50
READERS_MAX = 64  # that wait for the reading thread
FIRST_START_MS = 60_000  # since the owner was made
TOUCH_MS = people.HOUR_MS  # how exactly a session knows when it was last used
KINDS = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


class Route(NamedTuple):
    get: Callable[[Visit], Answer] | None = None
    post: Callable[[Visit], Awaitable[Answer]] | None = None
    who: str = "all"  # or "person", "operator"

    @property
    def allowed(self) -> str:
        return ", ".join((["GET, HEAD"] if self.get else []) + (["POST"] if self.post else []))


class Visit:
    """One request of a person. `db` and `now` are there in the reading thread only."""

    db: Any
    now: int

    def __init__(self, site: Site, exchange: Exchange) -> None:
        self.site, self.exchange, self.request = site, exchange, exchange.request
        self.path = self.request.rel_url.raw_path
        self.query = {key: guard.clean(value) for key, value in self.request.query.items()}
        self.address = guard.address_of(self.request)
        self.tls = guard.is_tls(self.request, site.config.url)
        self.token = guard.clean(self.request.cookies.get(guard.cookie_name(self.tls), ""))
        self.arguments: tuple[str, ...] = ()
        self.form: dict[str, str] = {}
        self.errors: dict[str, str] = {}
        self.person: Person | None = None
        self.new_token: str | None = None  # for the cookie; empty ends it

    @cached_property
    def base_url(self) -> str:
        """What links and snippets show."""
        host = self.request.headers.get("Host", "")
        if self.site.config.url:
            return self.site.config.url
        if not re.fullmatch(r"[A-Za-z0-9.-]+(:\d+)?|\[[0-9A-Fa-f:.]+\](:\d+)?", host):
            return self.site.proxy.base_url
        return f"http{'s' if self.tls else ''}://{host}"

    @property
    def whom(self) -> Person:
        assert self.person is not None, "the route lets nobody in who is not signed in"
        return self.person

    @property
    def form_id(self) -> str:
        return self.form.get("form", "")[:100]

    def text(self, name: str) -> str:
        """A field of the form, without the blanks around it."""
        return self.form.get(name, "").strip()

    async def read(self, work: Callable[[Visit], T]) -> T:
        """Do work that reads, where `self.db` is there."""
        return await self.site.read(self, work)

    async def write(self, verb: Callable[[Any, int], T], account_id: int | None = None) -> T:
        """What a verb of the ledger's writer gives, once it is committed."""
        return await self.site.write(verb, account_id)

    async def again(self, page: Callable[[Visit], Answer], **errors: str) -> Answer:
        """The form once more, with what was typed and what is wrong with it."""
        self.errors |= errors
        answer = await self.read(page)
        return answer._replace(status=422)

    def render(self, template: str, code: int = 200, /, **values: Any) -> Answer:
        body = self.site.templates.get_template(template).render(
            visit=self, person=self.person, site=self.site, **values
        )
        store = (
            "no-store" if self.person or self.new_token is not None or self.path.startswith("/link/") else "no-cache"
        )
        return Answer(body, code, {"Content-Type": "text/html; charset=utf-8", "Cache-Control": store})

    def go(self, path: str, body: str = "") -> Answer:
        headers = {"Location": path, "Cache-Control": "no-store", "Content-Type": "text/plain; charset=utf-8"}
        return Answer(body, 303, headers)

    def fresh_form(self) -> str:
        """The hidden id of a form: kept while it has errors, new with every new form."""
        return self.form_id if self.errors and self.form_id else secrets.token_urlsafe(16)


ROUTES = {
    "/": Route(pages.home),
    "/models": Route(pages.models),
    "/docs": Route(pages.docs_page),
    "/register": Route(pages.register, accounts.register),
    "/login": Route(pages.login, accounts.login),
    "/logout": Route(None, accounts.logout),
    "/forgot": Route(pages.forgot, accounts.forgot),
    "/dashboard": Route(pages.dashboard, None, "person"),
    "/keys": Route(pages.keys, accounts.add_key, "person"),
    "/keys/revoke": Route(None, accounts.revoke_key, "person"),
    "/usage": Route(pages.usage, None, "person"),
    "/usage.csv": Route(pages.usage_csv, None, "person"),
    "/requests": Route(pages.requests, None, "person"),
    "/billing": Route(pages.billing, None, "person"),
    "/settings": Route(pages.settings, accounts.change_settings, "person"),
    "/admin": Route(operator.overview, None, "operator"),
    "/admin/accounts": Route(operator.overview, operator.add_account, "operator"),
    "/admin/requests": Route(operator.requests, None, "operator"),
    "/admin/audit": Route(operator.audit, None, "operator"),
}
LINK = Route(pages.link, accounts.use_link)
ACCOUNT = Route(operator.account, operator.change_account, "operator")


class Site:
    """The console of one server."""

    def __init__(self, proxy: Proxy) -> None:
        self.proxy = proxy
        self.config = config.read(proxy.config)
        self.passwords = Passwords()
        self.reader = ThreadPoolExecutor(1, "pages")
        self.reading = 0
        self.db: Any = None
        self.wrong_for_name = guard.Limit(5, 60, "Too many wrong passwords for this name.")
        self.wrong_for_address = guard.Limit(30, 60, "Too many wrong passwords from this address.")
        self.registrations = guard.Limit(5, 3600, "Too many new accounts from this address.")
        self.files = {f"/{name}": (HERE / name).read_bytes() for name in ("style.css", "script.js", "icon.svg")}
        self.version = hashlib.sha256(b"".join(self.files.values())).hexdigest()[:12]
        self.templates = jinja2.Environment(
            loader=jinja2.FileSystemLoader(HERE / "templates"),
            autoescape=True,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=jinja2.StrictUndefined,
        )
        self.templates.filters.update(show.FILTERS)
        self.templates.globals["query"] = show.query

    # -- the core's seam

    def packs(self, account: str) -> list[dict[str, Any]]:
        return [pack.described(account) for pack in self.config.packs]

    def greeting(self) -> list[str]:
        """Lines for the start: the way in, while no operator has a password."""
        with contextlib.closing(core.connect(self.proxy.config)) as db, core.transaction(db) as now:
            people.create_tables(db)
            if people.has_operator_password(db):
                return []
            owner = people.find_by_name(db, "owner")
            account = queries.account_of(db, now, owner.account_id) if owner else None
            is_new = account is not None and now - account.created_at < FIRST_START_MS
            if owner is None or not owner.operator or not is_new or people.has_link(db, now, owner.account_id):
                return [
                    "No operator can sign in to the console yet: `python proxy.py account link owner` prints a link."
                ]
            url = self.config.url or self.proxy.base_url
            token = people.issue_link(db, now, owner.account_id)
        return ["Set its password and sign in to the console within an hour:", "", f"    {url}/link/{token}", ""]

    async def answer(self, exchange: Exchange) -> web.StreamResponse:
        answer = self.static(exchange.request) or await self.respond(Visit(self, exchange))
        exchange.status = answer.status
        headers = {**self.proxy.headers(exchange), **guard.HEADERS, **answer.headers}
        tls = guard.is_tls(exchange.request, self.config.url)
        if tls:
            headers["Strict-Transport-Security"] = "max-age=31536000"
        return web.Response(body=answer.body.encode(errors="replace"), status=answer.status, headers=headers)

    # -- a request, step by step

    def static(self, request: web.BaseRequest) -> Answer | None:
        body = self.files.get(request.path)
        if body is None or request.method not in ("GET", "HEAD"):
            return None
        kind = KINDS[Path(request.path).suffix]
        fresh = "public, max-age=31536000, immutable" if request.query.get("v") == self.version else "no-cache"
        return Answer(body.decode(), 200, {"Content-Type": f"{kind}; charset=utf-8", "Cache-Control": fresh})

    async def respond(self, visit: Visit) -> Answer:
        try:
            answer = await self.dispatch(visit, self.find(visit))
        except guard.Stop as stop:
            answer = await self.explain(visit, stop)
        except Refusal as refusal:
            if refusal.code == "shutting_down" or (refusal.code == "not_found" and not self.is_browser(visit)):
                raise
            answer = await self.explain(visit, guard.Stop(refusal.status, refusal.message, refusal.headers))
        except Exception:
            name = visit.exchange.name
            self.proxy.log.say(f"{name} failed\n{traceback.format_exc()}")
            answer = await self.explain(visit, guard.Stop(500, f"The console failed. Its log has more under {name}."))
        return self.with_cookie(visit, answer)

    def is_browser(self, visit: Visit) -> bool:
        """Whether a person looks at what comes: programs that miss a path are told which APIs there are."""
        return visit.person is not None or "text/html" in visit.request.headers.get("Accept", "")

    async def explain(self, visit: Visit, stop: guard.Stop) -> Answer:
        """A page that says what is wrong, without the database: that may be it."""
        answer = await asyncio.to_thread(pages.error, visit, stop.status, stop.message)
        return answer._replace(headers={**answer.headers, **stop.headers})

    def find(self, visit: Visit) -> Route:
        segments = [guard.clean(unquote(segment)) for segment in visit.path.split("/")[1:]]
        if visit.path in ROUTES:
            return ROUTES[visit.path]
        if segments[0] == "link" and len(segments) == 2:
            visit.arguments = (segments[1],)
            return LINK
        if segments[:2] == ["admin", "accounts"] and len(segments) == 3:
            visit.arguments = (segments[2],)
            return ACCOUNT
        if segments[0] == "admin":
            return Route(who="operator")
        raise Refusal("not_found", f"There is nothing at {core.quoted(visit.request.path)}. {core.LIST_OF_APIS}")

    async def dispatch(self, visit: Visit, route: Route) -> Answer:
        """Who may, may; everybody else learns no more than that."""
        method = visit.request.method
        posts = method == "POST"
        if posts and not guard.is_own(visit.request):
            raise guard.Stop(403, "This form was not sent by a page of this site.")
        if visit.token:
            await visit.read(identify)
            if visit.new_token:
                self.proxy.ledger.submit(partial(people.touch_session, token=visit.token))
        person = visit.person
        if route.who == "operator" and not (person and person.operator):
            raise guard.page_not_found()
        if route.who == "person" and person is None:
            here = quote(visit.request.path_qs, safe="") if not posts else ""
            return visit.go(f"/login?next={here}" if here else "/login")
        work = route.post if posts else route.get if method in ("GET", "HEAD") else None
        if work is None:
            if not route.allowed:
                raise guard.page_not_found()
            raise guard.Stop(405, f"This page takes {route.allowed}.", {"Allow": route.allowed})
        if not posts:
            return await visit.read(route.get)  # type: ignore[arg-type]
        await self.read_form(visit)
        if person and person.is_suspended and route.post is not accounts.logout:
            raise guard.Stop(403, "Your account is suspended: you can look around and sign out.")
        return await route.post(visit)  # type: ignore[misc]

    async def read_form(self, visit: Visit) -> None:
        request = visit.request
        if request.content_type != "application/x-www-form-urlencoded":
            raise guard.Stop(415, "A form is sent as application/x-www-form-urlencoded.")
        body = bytearray()
        try:
            with visit.exchange.waiting():
                async with asyncio.timeout(BODY_SECONDS):
                    while piece := await request.content.readany():
                        body += piece
                        if len(body) > BODY_BYTES_MAX:
                            raise guard.Stop(413, f"A form has at most {BODY_BYTES_MAX // 1024} KB.")
            fields = parse_qsl(body.decode(), keep_blank_values=True, max_num_fields=FIELDS_MAX)
        except TimeoutError:
            raise guard.Stop(408, "The form came too slowly. Send it again.") from None
        except ValueError:
            raise guard.Stop(400, "The form cannot be read.") from None
        visit.form = {name: guard.clean(value) for name, value in reversed(fields)}

    def with_cookie(self, visit: Visit, answer: Answer) -> Answer:
        """Sessions live in a cookie that no script reads and no other site sends along."""
        token = visit.new_token
        if token is None:
            return answer
        life = people.SESSION_IDLE_MS // 1000 if token else 0
        secure = "; Secure" if visit.tls else ""
        cookie = f"{guard.cookie_name(visit.tls)}={token}; Path=/; Max-Age={life}; HttpOnly; SameSite=Lax{secure}"
        return answer._replace(headers={**answer.headers, "Set-Cookie": cookie, "Cache-Control": "no-store"})

    # -- where work is done

    async def read(self, visit: Visit, work: Callable[[Visit], T]) -> T:
        if self.reading >= READERS_MAX:
            raise guard.Stop(503, "Too many pages are being made. Try again in a few seconds.", {"Retry-After": "2"})
        self.reading += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.reader, self.read_now, visit, work)
        finally:
            self.reading -= 1

    def read_now(self, visit: Visit, work: Callable[[Visit], T]) -> T:
        def with_database(db: Any, now: int) -> T:
            visit.db, visit.now = db, now
            try:
                return work(visit)
            finally:
                visit.db = None

        return self.read_plainly(with_database)

    def read_plainly(self, work: Callable[[Any, int], T]) -> T:
        """In the reading thread: one moment of the database."""
        try:
            self.db = self.db or core.connect(self.proxy.config)
            with queries.snapshot(self.db) as now:
                return work(self.db, now)
        except (sqlite3.OperationalError, sqlite3.DatabaseError, core.CommandError) as error:
            self.proxy.log.say(f"the console cannot read the ledger: {error}")
            self.forget_connection()
            raise guard.Stop(503, "The ledger does not answer at the moment. Try again shortly.") from None

    def forget_connection(self) -> None:
        with contextlib.suppress(Exception):
            self.db.close()
        self.db = None

    async def write(self, verb: Callable[[Any, int], T], account_id: int | None = None) -> T:
        outcome: T = await self.proxy.ledger.submit(verb, whose=account_id)
        return outcome

    def close(self) -> None:
        self.passwords.close()
        self.reader.submit(self.forget_connection)
        self.reader.shutdown(wait=True)


def identify(visit: Visit) -> None:
    """Who is signed in. The session is touched once an hour, and its cookie with it."""
    found = people.find_session(visit.db, visit.now, visit.token)
    if found is None:
        visit.token, visit.new_token = "", ""
        return
    visit.person, used_at = found
    if visit.now - used_at >= TOUCH_MS:
        visit.new_token = visit.token


async def open_site(proxy: Proxy, stack: contextlib.AsyncExitStack) -> Site:
    site = Site(proxy)
    stack.callback(site.close)
    await site.write(lambda db, now: people.create_tables(db))
    if site.config.mail is not None:
        await stack.enter_async_context(mail.running(site))
    return site
