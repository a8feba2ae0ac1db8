"""The forms of who signs in or is signed in. Each checks what was typed, then writes in one verb."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import proxy as core
from extras import queries
from extras.console import guard, pages, people
from extras.console.people import Person
from extras.console.show import Answer
from proxy import CommandError

if TYPE_CHECKING:
    from extras.console.site import Visit

NAME = re.compile(r"[^\W_][\w.-]{0,63}")
EMAIL = re.compile(r"[^\s@<>()\[\],;:\\\"]{1,64}@[^\s@<>()\[\],;:\\\"]{1,189}")
LABEL_MAX = 100
MODELS_MAX = 2000
LETTERS_AN_HOUR = 3
WRONG = "Name and password do not match."


class Rejected(NamedTuple):
    """What a verb has to say against a form; it wrote nothing."""

    message: str


def name_fault(name: str) -> str | None:
    if NAME.fullmatch(name):
        return None
    return "A name has 1 to 64 letters, digits, “.”, “_” and “-”, and begins with a letter or digit."


def email_fault(email: str) -> str | None:
    return None if not email or (EMAIL.fullmatch(email) and email.isprintable()) else "This is no e-mail address."


def text_fault(text: str, most: int = LABEL_MAX) -> str | None:
    if len(text) > most:
        return f"At most {most} characters."
    return None if text.isprintable() else "Printable characters only."


def parse_credits(text: str, errors: dict[str, str], field: str, least: int | None = 0) -> int | None:
    """An amount in thousandths, or nothing; what is wrong with it goes into `errors`."""
    if not text:
        return None
    if not re.fullmatch(r"-?[0-9]{1,13}(\.[0-9]{1,3})?", text):
        errors[field] = "A number such as 1500 or 0.5, with at most three decimals."
        return None
    try:
        amount = core.to_thousandths(Decimal(text))
    except ValueError:
        errors[field] = "This is too much."
        return None
    if least is not None and amount < least:
        errors[field] = "Not below zero."
    return amount


def found(faults: dict[str, str | None]) -> dict[str, str]:
    return {field: fault for field, fault in faults.items() if fault}


# ---- Getting in and out ---------------------------------------------------------------------------------------------


async def register(visit: Visit) -> Answer:
    site = visit.site
    if not site.config.is_open:
        raise guard.page_not_found()
    name, email, password = people.spelled(visit.text("name")), visit.text("email"), visit.form.get("password", "")
    faults = {"name": name_fault(name), "email": email_fault(email), "password": site.passwords.fault(password)}
    if errors := found(faults):
        return await visit.again(pages.register, **errors)
    site.registrations.take(visit.address)
    made = False
    try:
        secret = await site.passwords.make(password)
        verb = partial(create_person, site.proxy.config, name, email, secret, visit.form_id)
        outcome = await visit.write(verb)
        made = isinstance(outcome, str)
    finally:
        if not made:
            site.registrations.give_back(visit.address)
    if isinstance(outcome, Rejected):
        return await visit.again(pages.register, name=outcome.message)
    if isinstance(outcome, int):
        return await enter_again(visit, outcome, name, password)
    visit.new_token = outcome
    return visit.go("/dashboard")


def create_person(
    config: core.Config, name: str, email: str, secret: bytes, form: str, db: Any, now: int
) -> str | int | Rejected:
    """The token of a new account's session; the account's id if this form made it already."""
    if repeated := people.find_answer(db, now, "register", form):
        return repeated[0]
    if queries.name_taken(db, name):
        return Rejected("This name is taken.")
    free = config.free_credits
    account_id = core.create_account(db, now, name, config.default_tier, free.amount, free.days)
    people.change(db, account_id, "email", email or None)
    people.change(db, account_id, "password", secret)
    people.keep_answer(db, now, account_id, "register", form, name)
    return people.create_session(db, now, account_id)


async def enter_again(visit: Visit, account_id: int, name: str, password: str) -> Answer:
    """The same form once more signs its account in, if it bears its password."""
    person = await visit.read(lambda visit: people.find_person(visit.db, account_id))
    if person is None or person.name != name or not await visit.site.passwords.check(password, person.password):
        return await visit.again(pages.register, name="This name is taken.")
    return await enter(visit, account_id, "/dashboard")


async def enter(visit: Visit, account_id: int, path: str) -> Answer:
    """A new session; the one at hand ends."""

    def verb(db: Any, now: int) -> str:
        people.end_session(db, visit.token)
        return people.create_session(db, now, account_id)

    visit.new_token = await visit.write(verb, account_id)
    return visit.go(path)


async def is_right(visit: Visit, name: str, person: Person | None, password: str) -> bool:
    """Whether it is the person's password. Wrong ones are counted, before they are looked at: many at once are many.
    Stop 429."""
    site, who = visit.site, (name.casefold(), visit.address)
    site.wrong_for_address.take(visit.address)
    right = False
    try:
        site.wrong_for_name.take(who)
        try:
            right = await site.passwords.check(password, person.password if person else None)
        except guard.Stop:
            right = True  # nobody looked at it
            raise
        finally:
            if right:
                site.wrong_for_name.give_back(who)
    finally:
        if right:
            site.wrong_for_address.give_back(visit.address)
    return right


async def login(visit: Visit) -> Answer:
    name, password = people.spelled(visit.text("name")), visit.form.get("password", "")
    if not name or not password:
        faults = {
            "name": "Your account's name." if not name else None,
            "password": "Your password." if not password else None,
        }
        return await visit.again(pages.login, **found(faults))
    person = await visit.read(lambda visit: people.find_by_name(visit.db, name))
    if not await is_right(visit, name, person, password) or person is None:
        return await visit.again(pages.login, password=WRONG)
    return await enter(visit, person.account_id, guard.next_path(visit.form.get("next", "")))


async def logout(visit: Visit) -> Answer:
    await visit.write(lambda db, now: people.end_session(db, visit.token))
    visit.new_token = ""
    return visit.go("/")


async def use_link(visit: Visit) -> Answer:
    """Set a password by a link, which that uses up, and sign in."""
    token, password = visit.arguments[0], visit.form.get("password", "")
    person = await visit.read(lambda visit: people.find_link(visit.db, visit.now, token))
    if person is None:
        return await visit.read(pages.link)
    if fault := visit.site.passwords.fault(password):
        return await visit.again(pages.link, password=fault)
    secret = await visit.site.passwords.make(password)

    def verb(db: Any, now: int) -> str | None:
        if not (person := people.find_link(db, now, token)):  # it was used meanwhile
            return None
        people.set_password(db, person.account_id, secret)
        return people.create_session(db, now, person.account_id)

    session = await visit.write(verb, person.account_id)
    if session is None:
        return await visit.read(pages.link)
    visit.new_token = session
    return visit.go("/dashboard")


async def forgot(visit: Visit) -> Answer:
    """Send a link, where there is an address to send it to; what is said is the same for all."""
    if visit.site.config.mail is None:
        raise guard.page_not_found()
    name = visit.text("name")

    def verb(db: Any, now: int) -> None:
        person = people.find_by_name(db, name)
        since = now - people.HOUR_MS
        if person and person.email and people.count_letters(db, person.account_id, since) < LETTERS_AN_HOUR:
            people.write_letter(db, now, person.account_id, "", f"link {now}")

    await visit.write(verb)
    return visit.go("/forgot?sent=1")


# ---- Keys -----------------------------------------------------------------------------------------------------------


async def add_key(visit: Visit) -> Answer:
    """The key stands in the answer, this once; a double click sees the same one."""
    person, site, errors = visit.whom, visit.site, dict[str, str]()
    label = visit.text("label")
    errors |= found({"label": text_fault(label)})
    credit_limit = parse_credits(visit.text("credit_limit"), errors, "credit_limit")
    asked = visit.text("models")
    if fault := text_fault(asked, MODELS_MAX):
        errors["models"] = fault
    now = core.now_ms()
    expires_at = models = None
    try:
        models = queries.models_of_key(site.proxy.catalog, asked.split(",")) if "models" not in errors else None
    except CommandError as error:
        errors["models"] = sentence(error)
    if day := visit.text("expires_on"):
        try:
            if not re.fullmatch(r"[0-8][0-9]{3}-[0-9]{2}-[0-9]{2}", day):
                raise ValueError
            expires_at = queries.end_of_day(now, datetime.date.fromisoformat(day))
        except CommandError:
            errors["expires_on"] = "This day is over already, by UTC."
        except (ValueError, OverflowError):
            errors["expires_on"] = "A day such as 2027-01-31."
    if errors:
        return await visit.again(pages.keys, **errors)
    scope, limits = f"key {person.account_id}", site.proxy.config.limits(person.tier)

    def verb(db: Any, now: int) -> str | Rejected:
        if repeated := people.find_answer(db, now, scope, visit.form_id):
            return repeated[1]
        account = queries.account_of(db, now, person.account_id)
        assert account is not None
        try:
            key, _ = queries.add_key(db, now, account, limits, label or None, credit_limit, expires_at, models)
        except CommandError as error:
            return Rejected(sentence(error))
        people.keep_answer(db, now, person.account_id, scope, visit.form_id, key)
        return key

    key = await visit.write(verb, person.account_id)
    if isinstance(key, Rejected):
        return await visit.again(pages.keys, form=key.message)
    return await visit.read(partial(pages.keys, new_key=key))


async def revoke_key(visit: Visit) -> Answer:
    await end_key(visit, visit.whom.account_id)
    return visit.go("/keys")


async def end_key(visit: Visit, account_id: int) -> None:
    """Revoke the form's `key_id`; a key of somebody else is not there."""
    asked = visit.text("key_id")
    key_id = int(asked) if re.fullmatch(r"[0-9]{1,18}", asked) else 0

    def verb(db: Any, now: int) -> Rejected | None:
        try:
            queries.revoke_key(db, now, key_id, account_id)
        except CommandError as error:
            return Rejected(str(error))
        return None

    if await visit.write(verb, account_id):
        raise guard.Stop(404, "There is no such key.")


def sentence(error: CommandError) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."


# ---- Settings -------------------------------------------------------------------------------------------------------


async def change_settings(visit: Visit) -> Answer:
    person, site, action = visit.whom, visit.site, visit.text("action")
    if action == "sign-out":
        await visit.write(lambda db, now: people.end_sessions(db, person.account_id), person.account_id)
        visit.new_token = ""
        return visit.go("/login")
    password = visit.form.get("password", "")
    sets_password = action == "password" or (action != "email" and bool(password))
    current = "current_password" if sets_password else "email_password"
    typed = visit.form.get("current_password", "")
    faults = (
        {"password": site.passwords.fault(password)} if sets_password else {"email": email_fault(visit.text("email"))}
    )
    if errors := found({**faults, current: None if typed else "Your current password."}):
        return await visit.again(pages.settings, **errors)
    if not await is_right(visit, person.name, person, typed):
        return await visit.again(pages.settings, **{current: "This is not your current password."})
    secret = await site.passwords.make(password) if sets_password else None
    email = visit.text("email") or None

    def verb(db: Any, now: int) -> str:
        if secret is None:
            people.change(db, person.account_id, "email", email)
            people.end_session(db, visit.token)
        else:
            people.set_password(db, person.account_id, secret)
        return people.create_session(db, now, person.account_id)

    visit.new_token = await visit.write(verb, person.account_id)
    return visit.go(f"/settings?changed={'password' if sets_password else 'email'}")
