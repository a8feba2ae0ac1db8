"""Every command but `serve`: what an operator types. Figures come from queries.py and audit.py, as in the console.

A command runs in one transaction and is shown before that ends: a key or an account that nobody could read does not
exist. Commands work while the server runs, and take effect on its next request.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import os
import re
import sqlite3
import sys
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import proxy
from extras import queries
from extras.audit import AMOUNTS, prove_books
from extras.notices import retiring
from extras.probes import check_upstreams
from extras.queries import snapshot
from proxy import CommandError, Config, ConfigError, as_credits, extra, iso_time, quoted, transaction

DAYS_MAX = 36_500
TEXT_MAX = 500  # characters of a label, a reference, a note
LINK_MS = 3_600_000


class Desk(NamedTuple):
    """What a command works with. `now` is the database's time."""

    db: Any
    now: int
    config: Config


class Report(NamedTuple):
    """What a command prints: a JSON value, or lines for people. `ok` False exits 1."""

    value: Any
    lines: Sequence[str]
    ok: bool = True


# ---- Accounts -------------------------------------------------------------------------------------------------------


def account_add(desk: Desk, options: Namespace) -> Report:
    db, now, config = desk
    tier = queries.check_tier(config, options.tier or config.default_tier)
    free = config.free_credits.amount if options.free is None else options.free
    if not options.name.isprintable() or len(options.name.split()) != 1 or len(options.name) > queries.NAME_MAX:
        raise CommandError(f"an account's name must be one printable word of at most {queries.NAME_MAX} characters")
    if options.credits < 0 or free < 0:
        raise CommandError("--credits and --free must not be negative")
    if taken := queries.name_taken(db, options.name):
        raise CommandError(f'there is an account "{taken}" already')
    account_id = proxy.create_account(db, now, options.name, tier, free, config.free_credits.days)
    account = queries.find_account(db, now, options.name)
    if options.credits:
        queries.grant_paid(db, now, account, options.credits)
    if options.email is not None:
        people("--email").set_email(db, account_id, options.email)
    if options.operator:
        people("--operator").set_operator(db, account_id, True)
    key, key_id = proxy.create_key(db, now, account_id)
    credits = as_credits(free + options.credits)
    value = {"account": options.name, "tier": tier, "credits": credits, "key": key, "key_id": key_id}
    lines = [f"account {options.name}, account tier {tier}, {credits:,} credits", f"key (shown once): {key}"]
    return Report(value, lines)


def account_list(desk: Desk, options: Namespace) -> Report:
    accounts = queries.list_accounts(desk.db, desk.now)
    rows: list[list[Any]] = [
        [a.name, a.tier, a.status, f"{as_credits(a.credits):,}", f"{as_credits(a.held):,}", a.keys] for a in accounts
    ]
    total = as_credits(sum(account.credits for account in accounts))
    held = as_credits(sum(account.held for account in accounts))
    rows.append(["total", "", "", f"{total:,}", f"{held:,}", sum(account.keys for account in accounts)])
    header = ["account", "account tier", "status", "credits", "held", "keys"]
    return Report([account.described() for account in accounts], table(header, rows))


def account_show(desk: Desk, options: Namespace) -> Report:
    value = queries.find_account(desk.db, desk.now, options.name).described()
    shown = {key: f"{item:,}" if isinstance(item, Decimal) else item for key, item in value.items()}
    shown = {"account tier" if key == "tier" else key: item for key, item in shown.items()}
    return Report(value, [f"{key + ':':<17} {'-' if item is None else item}" for key, item in shown.items()])


def account_tier(desk: Desk, options: Namespace) -> Report:
    account = queries.find_account(desk.db, desk.now, options.name)
    queries.set_tier(desk.db, desk.config, account.id, options.tier)
    return account_show(desk, options)


def account_status(status: str, desk: Desk, options: Namespace) -> Report:
    account = queries.find_account(desk.db, desk.now, options.name)
    queries.set_status(desk.db, account.id, status)
    return account_show(desk, options)


def account_operator(desk: Desk, options: Namespace) -> Report:
    account = queries.find_account(desk.db, desk.now, options.name)
    people("account operator").set_operator(desk.db, account.id, not options.off)
    value = {"account": account.name, "operator": not options.off}
    return Report(value, [f"{account.name} is {'no operator any more' if options.off else 'an operator'}"])


def account_link(desk: Desk, options: Namespace) -> Report:
    """A link that sets a password and signs in."""
    db, now, config = desk
    create_link = people("account link").create_link
    if config.console is None:
        raise CommandError(f"{config.path} has no `console:`, so there is no page that a link could lead to")
    account = queries.find_account(db, now, options.name)
    link = f"{console_url(config)}/link/{create_link(db, now, account.id)}"
    value = {"account": account.name, "link": link, "expires_at": iso_time(now + LINK_MS)}
    return Report(value, [f"{link}", f"sets a password of {account.name}, once, until {value['expires_at']}"])


def console_url(config: Config) -> str:
    """Where people find the console: what config.yaml says, else where this server listens."""
    console = config.console
    url = console.get("url") if isinstance(console, dict) else getattr(console, "url", None)
    if url:
        return str(url).rstrip("/")
    host, port = config.address
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def people(what: str) -> Any:
    """The console's functions on accounts; CommandError says who needs them where they are not there."""
    if module := proxy.extra("console.people"):  # noqa: S610
        return module
    raise CommandError(f"{what} needs extras/console beside proxy.py, and the package jinja2: one of them is missing")


# ---- Keys and credits -----------------------------------------------------------------------------------------------


def key_add(desk: Desk, options: Namespace) -> Report:
    db, now, config = desk
    account = queries.find_account(db, now, options.name)
    names = (options.models or "").split(",")
    models = queries.models_of_key(proxy.load_catalog(config), names) if options.models is not None else None
    if options.models is not None and models is None:
        raise CommandError("--models names no model")
    expires_at = queries.end_of_day(now, options.expires) if options.expires else None
    limits = config.limits(account.tier)
    key, key_id = queries.add_key(db, now, account, limits, options.label, options.credit_limit, expires_at, models)
    value = {"account": account.name, "key": key, "key_id": key_id, "label": options.label}
    credit_limit = None if options.credit_limit is None else as_credits(options.credit_limit)
    value |= {"credit_limit": credit_limit, "expires_at": iso_time(expires_at)}
    value["models"] = models.split(" ") if models else None
    return Report(value, [f"key {key_id} of {account.name} (shown once): {key}"])


def key_list(desk: Desk, options: Namespace) -> Report:
    account = queries.find_account(desk.db, desk.now, options.name)
    value = [key.described() for key in queries.keys_of(desk.db, account.id)]
    names = (
        "key_id", "label", "hint", "created_at", "last_used_at", "revoked_at", "credit_limit", "spent", "expires_at",
        "models",
    )  # fmt: skip
    rows = [[shown(row[name]) for name in names] for row in value]
    return Report(value, table(names, rows))


def key_revoke(desk: Desk, options: Namespace) -> Report:
    revoked_at = iso_time(queries.revoke_key(desk.db, desk.now, options.key_id))
    value = {"key_id": options.key_id, "revoked_at": revoked_at}
    return Report(value, [f"key {options.key_id} is revoked since {revoked_at}"])


def credit_add(desk: Desk, options: Namespace) -> Report:
    db, now, _ = desk
    account = queries.find_account(db, now, options.name)
    added = queries.grant_paid(db, now, account, options.amount, options.ref, options.note)
    account = queries.find_account(db, now, options.name)
    amount, credits = as_credits(options.amount), as_credits(account.credits)
    value = {"account": account.name, "amount": amount, "credits": credits, "added": added}
    done = f"added {amount:,}" if added else f'reference "{options.ref}" was added before; nothing changed'
    return Report(value, [f"{account.name}: {done}; the balance is {credits:,} credits"])


# ---- Usage and the audit --------------------------------------------------------------------------------------------


def usage(desk: Desk, options: Namespace) -> Report:
    """By day and model, and who still calls what is deprecated."""
    db, now, config = desk
    account_id = queries.find_account(db, now, options.name).id if options.name else None
    since = queries.days_ago(now, options.days)
    uses = queries.usage(db, since, account_id)
    callers: dict[str, list[queries.DeprecatedUse]] = {}
    for called in queries.deprecated_uses(db, proxy.load_catalog(config), now, since, account_id):
        callers.setdefault(called.model, []).append(called)
    ends = {
        model: {"sunset": str(found[0].sunset), "accounts": [use.account for use in found]}
        for model, found in callers.items()
    }
    value = [described(use) | {"deprecated": ends.get(use.model)} for use in uses]
    header = ("day", "model", "requests", "prompt_tokens", "completion_tokens", "credits")
    rows = [[shown(row[name]) for name in header] for row in value]
    sums = [sum(getattr(use, name) for use in uses) for name in header[2:5]]
    rows.append(["total", "", *map(shown, sums), shown(as_credits(sum(use.charge for use in uses)))])
    warnings = [
        f"{model} retires on {found[0].sunset}; called by {', '.join(use.account for use in found)}"
        for model, found in callers.items()
    ]
    return Report(value, [*table(header, rows), *warnings])


def described(use: queries.Use) -> dict[str, Any]:
    return {
        "day": use.day,
        "model": use.model,
        "requests": use.requests,
        "prompt_tokens": use.prompt_tokens,
        "completion_tokens": use.completion_tokens,
        "credits": as_credits(use.charge),
    }


def audit(desk: Desk, options: Namespace) -> Report:
    """Prove the books in one snapshot."""
    found = prove_books(desk.db, desk.now, options.overruns)
    value = found.described()
    lines = table(("credits", "total"), [[name, shown(value[name])] for name in AMOUNTS])
    lines.append(f"open requests: {found.totals.open_requests}")
    above = as_credits(found.overrun_credits)
    lines.append(f"charges above their hold: {found.overrun_count:,}, by {above:,} credits together")
    whose = "overrun" if options.overruns else "took a balance below zero"
    lines += [
        f"{whose}: {o['request_id']} of {o['account']} was charged {o['charge']:,} on a hold of {o['hold']:,}"
        for o in value["overruns"]
    ]
    verdict = "THE BOOKS DO NOT ADD UP" if found.problems else "the books add up: grants - lapsed - charges = balances"
    return Report(value, [*lines, *found.problems, verdict], ok=not found.problems)


def check(config: Config, options: Namespace) -> Report:
    """Both files, the database, the tiers in use, and each upstream: a line each."""
    catalog = proxy.load_catalog(config)
    lines = [
        (True, f"{config.path}: {len(config.tiers)} account tiers, {len(config.upstreams)} upstreams"),
        (True, f"{config.models_path}: {len(catalog.models)} models"),
        *check_console(config),
        *check_database(config),
        *((True, line) for line in retiring(catalog, time.time())),
        *asyncio.run(check_upstreams(config, catalog)),
    ]
    well = all(ok for ok, _ in lines)
    value = {"ok": well, "checks": [{"ok": ok, "check": line} for ok, line in lines]}
    return Report(value, [f"{'ok  ' if ok else 'FAIL'} {line}" for ok, line in lines], ok=well)


def check_console(config: Config) -> list[tuple[bool, str]]:
    """Its section of config.yaml; ConfigError if it is wrong."""
    section = extra("console.config") if config.console is not None else None
    if section is None:
        return [(True, "console: off")]
    return [(True, f"console: registration {section.read(config).registration}")]


def check_database(config: Config) -> list[tuple[bool, str]]:
    """Whether it answers, and the account tiers in it that the file does not have."""
    name = "the PostgreSQL database" if config.is_postgres else str(config.database_path)
    if not has_database(config):
        return [(True, f"{name}: there is no database yet; `serve` makes it")]
    try:
        with contextlib.closing(proxy.connect(config)) as db, snapshot(db):
            used = db.execute("SELECT tier, count(*) FROM account GROUP BY tier ORDER BY tier").fetchall()
    except (CommandError, sqlite3.Error) as error:
        return [(False, str(error) if isinstance(error, CommandError) else f"{name}: {error}")]
    lines = [(True, f"{name}: {sum(count for _, count in used)} accounts")]
    for tier, count in used:
        if tier not in config.tiers:
            text = f'account tier "{tier}" of {count} accounts is not in {config.path}: they have the default\'s limits'
            lines.append((False, text))
    return lines


def has_database(config: Config) -> bool:
    """Whether there is something to open. What no file can be called is not there."""
    with contextlib.suppress(OSError):
        return config.is_postgres or config.database_path.exists()
    return False


def copy_ledger(config: Config, options: Namespace) -> Report:
    lines = proxy.require_extra("copy_ledger").copy_ledger(config, options.source, options.target)
    return Report({"ok": True, "from": options.source, "lines": lines}, lines)


# ---- Showing --------------------------------------------------------------------------------------------------------


def shown(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, list):
        return ",".join(value)
    return f"{value:,}" if isinstance(value, int | Decimal) else "-" if value is None else str(value)


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Aligned columns; numbers to the right."""
    texts = [list(header), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    numeric = [all(re.fullmatch(r"-?[\d,.]*", row[n]) for row in texts[1:]) for n in range(len(header))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ).rstrip()
        for row in texts
    ]


# ---- Arguments ------------------------------------------------------------------------------------------------------


def plain_text(text: str) -> str:
    """What a database and a page can hold."""
    text = text.strip()
    if "\0" in text or not text.isprintable():
        raise ArgumentTypeError("expected printable UTF-8 text")
    if len(text) > TEXT_MAX:
        raise ArgumentTypeError(f"expected at most {TEXT_MAX} characters, got {len(text):,}")
    return text


def parse_amount(text: str) -> int:
    try:
        return proxy.to_thousandths(Decimal(text.strip()))
    except (ArithmeticError, ValueError):
        raise ArgumentTypeError(f"expected credits with at most three decimals, got {quoted(text.strip())}") from None


def parse_count(text: str, most: int = DAYS_MAX) -> int:
    if not text.isascii() or not text.isdecimal() or not 1 <= int(text[:20]) <= most:
        raise ArgumentTypeError(f"expected a whole number from 1 to {most:,}, got {quoted(text)}")
    return int(text)


def parse_day(text: str) -> datetime.date:
    try:
        if re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            return datetime.date.fromisoformat(text)
    except ValueError:
        pass
    raise ArgumentTypeError(f"expected a day such as 2027-01-31, got {quoted(text)}")


def parse_path(text: str) -> Path:
    if "\0" in text:
        raise ArgumentTypeError("expected the path of a file")
    return Path(text)


class Parser(argparse.ArgumentParser):
    """`--config` may stand before or after a command; what a negative number begins with is no option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument(
            "--config", type=parse_path, metavar="FILE", default=argparse.SUPPRESS,
            help="default: config.yaml beside proxy.py",
        )  # fmt: skip


def parse_arguments(given: Sequence[str]) -> Namespace:
    """`config`, a path, and `run`, the command, which is None for `serve`."""
    given = [f" {text}" if re.match(r"-\.?\d", text) else text for text in given]
    path = Path(proxy.__file__).with_name("config.yaml")
    settings = known_settings(given, path) if {"-h", "--help"} & set(given) else None
    return build_parser(settings).parse_args(given, Namespace(config=path, run=None))


def known_settings(given: Sequence[str], default: Path) -> Config | None:
    """The configuration whose defaults and tiers a help shows, if it can be read."""
    early = Parser(add_help=False, prog="proxy.py", exit_on_error=False)
    try:
        options, _ = early.parse_known_args(given, Namespace(config=default))
        return proxy.load_config(options.config)
    except (argparse.ArgumentError, ConfigError, SystemExit):
        return None


def build_parser(settings: Config | None) -> Parser:
    parser = Parser(prog="proxy.py", description=(proxy.__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"proxy.py {proxy.VERSION}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    commands.add_parser("serve", help="run the server (the default)", description="Run the server, until SIGTERM.")
    add_account_commands(commands, settings)
    add_key_commands(commands)
    add_credit_commands(commands)
    used = command(commands, "usage", snapshot, usage, "Requests, tokens and credits by day and model.")
    used.add_argument("name", nargs="?", type=plain_text, metavar="ACCOUNT", help="default: all accounts")
    used.add_argument(
        "--days", type=parse_count, default=30, metavar="N", help="UTC days, of which today is the last; default: 30"
    )
    command(commands, "check", None, check, "Both files, the database and each upstream, a line each.")
    proved = command(
        commands, "audit", snapshot, audit, "Prove the books from grants and requests; exit 1 if they lie."
    )
    proved.add_argument(
        "--overruns", action="store_true",
        help="list every charge above its hold; default: those that took a balance below zero",
    )  # fmt: skip
    copied = command(commands, "copy-ledger", None, copy_ledger, "Move a SQLite ledger into an empty PostgreSQL.")
    copied.add_argument("source", type=plain_text, metavar="FROM", help="the path of proxy.db; its server is stopped")
    copied.add_argument("target", type=plain_text, metavar="TO", help="postgresql://USER@HOST/DATABASE")
    return parser


def command(group: Any, name: str, moment: Any, run: Callable[..., Report], what: str) -> argparse.ArgumentParser:
    """A command that runs inside `moment`: a transaction, a snapshot, or None for one that opens what it needs."""
    made: argparse.ArgumentParser = group.add_parser(
        name, help=what[0].lower() + what[1:].rstrip("."), description=what
    )
    made.set_defaults(run=run, moment=moment)
    made.add_argument("--json", action="store_true", help="print one JSON document")
    return made


def of_account(*arguments: Any) -> argparse.ArgumentParser:
    made = command(*arguments)
    made.add_argument("name", type=plain_text, metavar="ACCOUNT")
    return made


def subcommands(commands: Any, name: str, what: str) -> Any:
    group = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
    return group.add_subparsers(required=True, title="commands", metavar="COMMAND")


def add_account_commands(commands: Any, settings: Config | None) -> None:
    """Help names the account tiers and the free credits of the configuration."""
    tiers = f"one of: {', '.join(settings.tiers)}" if settings else "as config.yaml has them"
    default = f"; default: {settings.default_tier}" if settings else ""
    free = f"; default: {as_credits(settings.free_credits.amount):,}" if settings else ""
    account = subcommands(commands, "account", "people and their balances")
    add = of_account(account, "add", transaction, account_add, "Create an account and print its first key, once.")
    add.add_argument("--tier", type=plain_text, metavar="T", help=f"its account tier, {tiers}{default}")
    add.add_argument(
        "--credits", type=parse_amount, default=0, metavar="N",
        help="purchased credits, on top of the free ones; default: 0",
    )  # fmt: skip
    add.add_argument("--free", type=parse_amount, metavar="N", help=f"free credits{free}")
    add.add_argument("--email", type=plain_text, metavar="E", help="for the console's mail; default: none")
    add.add_argument("--operator", action="store_true", help="may use the console's pages of the operator")
    command(account, "list", snapshot, account_list, "All accounts, with their credits.")
    of_account(account, "show", snapshot, account_show, "One account.")
    tier = of_account(account, "tier", transaction, account_tier, "Change an account's tier, and so its limits.")
    tier.add_argument("tier", type=plain_text, metavar="TIER", help=tiers)
    suspend, resume = partial(account_status, "suspended"), partial(account_status, "active")
    of_account(account, "suspend", transaction, suspend, "Refuse an account's requests.")
    of_account(account, "resume", transaction, resume, "Take a suspended account's requests again.")
    of_account(
        account, "link", transaction, account_link, "Print a link, good once and for an hour, to set a password."
    )
    operator = of_account(
        account, "operator", transaction, account_operator, "Let an account use the operator's pages."
    )
    operator.add_argument("--off", action="store_true", help="no more")


def add_key_commands(commands: Any) -> None:
    key = subcommands(commands, "key", "the keys of accounts")
    add = of_account(key, "add", transaction, key_add, "Make a key and print it, once.")
    add.add_argument("--label", type=plain_text, metavar="L", help="what it is for")
    add.add_argument(
        "--credit-limit", type=parse_amount, metavar="N", help="credits that it may spend; default: no limit"
    )
    add.add_argument("--expires", type=parse_day, metavar="DATE", help="its last day, to 24:00 UTC; default: none")
    add.add_argument("--models", type=plain_text, metavar="A,B", help="the models that it may use; default: all")
    of_account(key, "list", snapshot, key_list, "An account's keys: ids, hints, limits, and when they were used.")
    revoke = command(key, "revoke", transaction, key_revoke, "End a key, for ever and at once.")
    revoke.add_argument("key_id", type=partial(parse_count, most=2**63 - 1), metavar="KEY_ID", help="see `key list`")


def add_credit_commands(commands: Any) -> None:
    credit = subcommands(commands, "credit", "purchased credits")
    add = of_account(credit, "add", transaction, credit_add, "Add purchased credits; a negative amount corrects.")
    add.add_argument("amount", type=parse_amount, metavar="AMOUNT", help="credits, with at most three decimals")
    add.add_argument("--ref", type=plain_text, metavar="R", help="a reference; the same one twice adds once")
    add.add_argument("--note", type=plain_text, metavar="N", help="what it was for")


def run_command(config: Config, options: Namespace) -> int:
    """Run a command in its transaction, and show what it did before that ends; the exit status."""
    if options.moment is None:
        report = options.run(config, options)
        present(report, options.json)
        return 0 if report.ok else 1
    if options.run is not account_add and not has_database(config):
        raise CommandError(f"{config.database_path}: there is no database yet; `serve` or `account add` makes it")
    with contextlib.closing(proxy.connect(config)) as db, options.moment(db) as now:
        report = options.run(Desk(db, now, config), options)
        present(report, options.json)
    return 0 if report.ok else 1


def present(report: Report, as_json: bool) -> None:
    """Print a report; CommandError, which ends its transaction, if that cannot be."""
    try:
        proxy.show(proxy.encode_json(report.value).decode() if as_json else "\n".join(report.lines))
    except OSError as error:
        if sys.stdout is not None:  # what is left in its buffer would fail once more at the end of the program
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise CommandError(f"the answer could not be shown, so nothing was changed: {error}") from None
