"""What the console sends: a model's deprecation to who called it, and a link to who forgot a password.

A row is written first, unique by account, model and occasion; then it is claimed for ten minutes, put into words and
sent: at least once, also with several boxes. All of it in the background: a mail server that is away loses nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import smtplib
import ssl
import traceback
from collections.abc import AsyncIterator
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from extras import queries
from extras.console import config, people
from extras.console.guard import Stop
from extras.console.people import HOUR_MS, Letter, Person
from extras.queries import DAY_MS
from proxy import Refusal

if TYPE_CHECKING:
    from extras.console.site import Site

LOOK_SECONDS = 0.5
SEARCH_SECONDS = 600  # between searches for who calls what is deprecated; a changed catalog is searched at once
SMTP_SECONDS = 30
RETRY_MS_MAX = 10 * 60_000
CALLED_DAYS = 30


class Message(NamedTuple):
    to: str
    subject: str
    text: str


@contextlib.asynccontextmanager
async def running(site: Site) -> AsyncIterator[None]:
    task = asyncio.create_task(work(site))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


async def work(site: Site) -> None:
    """Write what is to be sent, and send what is due; it outlives what it meets."""
    searched: Any = None
    next_search = 0.0
    while True:
        now = asyncio.get_running_loop().time()
        try:
            if site.proxy.catalog is not searched or now >= next_search:
                searched, next_search = site.proxy.catalog, now + SEARCH_SECONDS
                await announce(site)
            while letter := await due(site):
                await deliver(site, letter)
        except (Refusal, Stop):
            pass  # the ledger is away, which was said
        except Exception:
            site.proxy.log.say(f"the console's mail failed\n{traceback.format_exc()}")
        await asyncio.sleep(LOOK_SECONDS)


async def due(site: Site) -> Letter | None:
    """A look that writes nothing comes first: it waits for nobody."""
    sql = "SELECT 1 FROM console_mail WHERE sent_at IS NULL AND due_at <= :now LIMIT 1"
    waiting = await site.proxy.ledger.submit(
        lambda db, now: db.execute(sql, {"now": now}).fetchone(), writes=False, power_proof=False
    )
    return await site.write(people.claim_letter) if waiting else None


async def announce(site: Site) -> None:
    """A letter for each account that called a deprecated model in the last 30 days and has an address."""

    def search(db: Any, now: int) -> list[tuple[str, str]]:
        since = now - CALLED_DAYS * DAY_MS
        uses = queries.deprecated_uses(db, site.proxy.catalog, now, since)
        return [(use.account, use.model) for use in uses if str(use.sunset) > queries.iso_day(now // DAY_MS)]

    found = await asyncio.get_running_loop().run_in_executor(site.reader, site.read_plainly, search)

    def verb(db: Any, now: int) -> None:
        for name, model in found:
            person = people.find_by_name(db, name)
            deprecated = site.proxy.catalog.models[model].deprecated if model in site.proxy.catalog.models else None
            if person and person.email and deprecated:
                people.write_letter(db, now, person.account_id, model, f"deprecated {deprecated.announced}")

    if found:
        await site.write(verb)


async def deliver(site: Site, letter: Letter) -> None:
    assert site.config.mail is not None
    message = await site.write(partial(compose, site, letter))
    if message is not None:
        try:
            await asyncio.to_thread(send, site.config.mail, message)
        except (OSError, smtplib.SMTPException) as error:
            site.proxy.log.say(f"mail cannot be sent, and is tried again: {type(error).__name__}")
            wait = min(RETRY_MS_MAX, 1000 * 2 ** min(letter.tries - 1, 20))
            await site.write(lambda db, now: people.put_back(db, letter, now + wait))
            return
    await site.write(lambda db, now: people.put_away(db, now, letter))


def compose(site: Site, letter: Letter, db: Any, now: int) -> Message | None:
    """What it says now; None if there is nothing to say any more."""
    person = people.find_person(db, letter.account_id)
    if person is None or not person.email:
        return None
    if not letter.model:
        return compose_link(site, person, letter, db, now)
    model = site.proxy.catalog.models.get(letter.model)
    deprecated = model.deprecation(now / 1000) if model else None
    if deprecated is None:
        return None
    instead = f"Use {deprecated.replacement} instead." if deprecated.replacement else "There is no named replacement."
    text = f"""Hello {person.name},

the model {letter.model}, which your account called in the last {CALLED_DAYS} days, retires on {deprecated.sunset}
(UTC). Requests for it are refused from then on.

{instead}

{site.config.url}/models has all models, {site.config.url}/usage what you use.
"""
    return Message(person.email, f"{letter.model} retires on {deprecated.sunset}", text)


def compose_link(site: Site, person: Person, letter: Letter, db: Any, now: int) -> Message | None:
    if now - letter.created_at > HOUR_MS:
        return None
    token = people.issue_link(db, now, person.account_id)
    text = f"""Hello {person.name},

somebody, probably you, asked for a link that sets a new password. It is good once, for an hour:

{site.config.url}/link/{token}

If it was not you, there is nothing to do.
"""
    return Message(person.email or "", "Set a new password", text)


def send(server: config.Mail, message: Message) -> None:
    """In a thread. OSError or SMTPException if the server did not take it."""
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = server.sender, message.to, message.subject
    mail["Date"], mail["Message-ID"] = (
        formatdate(),
        make_msgid(domain=server.sender.rpartition("@")[2].strip(">") or None),
    )
    mail["Auto-Submitted"] = "auto-generated"
    mail.set_content(message.text)
    context = ssl.create_default_context()
    if server.tls == "tls":
        client: smtplib.SMTP = smtplib.SMTP_SSL(server.host, server.port, timeout=SMTP_SECONDS, context=context)
    else:
        client = smtplib.SMTP(server.host, server.port, timeout=SMTP_SECONDS)
    with client:
        if server.tls == "starttls":
            client.starttls(context=context)
        if server.user:
            client.login(server.user, server.password)
        client.send_message(mail)
