"""The console's tables, and every statement on them: who may sign in, and is; links, forms and mail.

Importable without jinja2, for the commands. Secrets (a session's token, a link's, a form's) stand here as their SHA-256
only. What writes runs inside `proxy.transaction` or as a verb of the ledger's writer.
"""

from __future__ import annotations

import hashlib
import secrets
import unicodedata
from typing import Any, NamedTuple

from proxy import Database, split_statements

HOUR_MS = 3_600_000
LINK_MS = HOUR_MS
SESSION_IDLE_MS = 30 * 24 * HOUR_MS
FORM_MS = 60_000
CLAIM_MS = 10 * 60_000

TABLES = """
CREATE TABLE IF NOT EXISTS console_person (
    account_id INTEGER NOT NULL REFERENCES account (id),
    email TEXT,
    password BLOB,
    operator INTEGER NOT NULL DEFAULT 0 CHECK (operator IN (0, 1)),
    PRIMARY KEY (account_id)
) STRICT;
CREATE TABLE IF NOT EXISTS console_session (
    hash BLOB NOT NULL,
    account_id INTEGER NOT NULL REFERENCES account (id),
    used_at INTEGER NOT NULL,
    PRIMARY KEY (hash)
) STRICT;
CREATE INDEX IF NOT EXISTS console_session_account ON console_session (account_id);
CREATE TABLE IF NOT EXISTS console_link (
    hash BLOB NOT NULL,
    account_id INTEGER NOT NULL REFERENCES account (id),
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (hash)
) STRICT;
CREATE TABLE IF NOT EXISTS console_form (
    hash BLOB NOT NULL,
    account_id INTEGER NOT NULL REFERENCES account (id),
    answer BLOB NOT NULL,
    expires_at INTEGER NOT NULL,
    PRIMARY KEY (hash)
) STRICT;
-- One row a message. What it says, and a link in it, is made when it is sent.
CREATE TABLE IF NOT EXISTS console_mail (
    account_id INTEGER NOT NULL REFERENCES account (id),
    model TEXT NOT NULL,
    occasion TEXT NOT NULL,
    created_at INTEGER NOT NULL,
    due_at INTEGER NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0,
    sent_at INTEGER,
    PRIMARY KEY (account_id, model, occasion)
) STRICT;
"""


class Person(NamedTuple):
    """An account as one who may sign in."""

    account_id: int
    name: str
    status: str
    tier: str
    operator: bool = False
    email: str | None = None
    password: bytes | None = None

    @property
    def is_suspended(self) -> bool:
        return self.status != "active"


PERSON = """
    SELECT a.id, a.name, a.status, a.tier, coalesce(p.operator, 0), p.email, p.password
    FROM account a LEFT JOIN console_person p ON p.account_id = a.id
"""


def create_tables(db: Database) -> None:
    """Make what is not there; account 1, if it is the first start's `owner`, becomes an operator."""
    for statement in split_statements(TABLES):
        db.execute(statement)
    sql = """
        INSERT INTO console_person (account_id, operator) SELECT id, 1 FROM account WHERE id = 1 AND name = 'owner'
        ON CONFLICT DO NOTHING
    """
    db.execute(sql)


def hash_of(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def spelled(name: str) -> str:
    """A name as it is stored and looked up."""
    return unicodedata.normalize("NFKC", name.strip())


def find_person(db: Database, account_id: int) -> Person | None:
    row = db.execute(f"{PERSON} WHERE a.id = :id", {"id": account_id}).fetchone()
    return Person(*row) if row else None


def find_by_name(db: Database, name: str) -> Person | None:
    """Without the case of its letters; always as long, whether there is one or not."""
    sql = f"{PERSON} WHERE a.name = :name OR lower(a.name) = :lower ORDER BY CASE WHEN a.name = :name THEN 0 ELSE 1 END"
    row = db.execute(sql, {"name": spelled(name), "lower": spelled(name).lower()}).fetchone()
    return Person(*row) if row else None


def change(db: Database, account_id: int, column: str, value: Any) -> None:
    db.execute("INSERT INTO console_person (account_id) VALUES (:id) ON CONFLICT DO NOTHING", {"id": account_id})
    db.execute(
        f"UPDATE console_person SET {column} = :value WHERE account_id = :id", {"id": account_id, "value": value}
    )


def set_email(db: Database, account_id: int, email: str | None) -> None:
    create_tables(db)
    change(db, account_id, "email", email or None)


def set_operator(db: Database, account_id: int, on: bool) -> None:
    create_tables(db)
    change(db, account_id, "operator", int(on))


def has_operator_password(db: Database) -> bool:
    sql = "SELECT 1 FROM console_person WHERE operator = 1 AND password IS NOT NULL LIMIT 1"
    return db.execute(sql).fetchone() is not None


def set_password(db: Database, account_id: int, password: bytes) -> None:
    """A new password ends every session and every link of the account."""
    change(db, account_id, "password", password)
    end_sessions(db, account_id)
    db.execute("DELETE FROM console_link WHERE account_id = :id", {"id": account_id})


# ---- Links ----------------------------------------------------------------------------------------------------------


def create_link(db: Database, now: int, account_id: int) -> str:
    """As `issue_link`, for a command, which may come before the first start with a console."""
    create_tables(db)
    return issue_link(db, now, account_id)


def issue_link(db: Database, now: int, account_id: int) -> str:
    """The token of a link that sets a password: good once, for an hour, and until there is a newer one."""
    token = secrets.token_urlsafe(32)
    db.execute("DELETE FROM console_link WHERE account_id = :id OR expires_at <= :now", {"id": account_id, "now": now})
    sql = "INSERT INTO console_link (hash, account_id, expires_at) VALUES (:hash, :id, :expires_at)"
    db.execute(sql, {"hash": hash_of(token), "id": account_id, "expires_at": now + LINK_MS})
    return token


def find_link(db: Database, now: int, token: str) -> Person | None:
    """Whose password it sets, as long as it is good."""
    sql = "SELECT account_id FROM console_link WHERE hash = :hash AND expires_at > :now"
    row = db.execute(sql, {"hash": hash_of(token), "now": now}).fetchone()
    return find_person(db, row[0]) if row else None


def has_link(db: Database, now: int, account_id: int) -> bool:
    sql = "SELECT 1 FROM console_link WHERE account_id = :id AND expires_at > :now"
    return db.execute(sql, {"id": account_id, "now": now}).fetchone() is not None


# ---- Sessions -------------------------------------------------------------------------------------------------------


def create_session(db: Database, now: int, account_id: int) -> str:
    """A session's token, which only its cookie holds."""
    db.execute("DELETE FROM console_session WHERE used_at <= :idle", {"idle": now - SESSION_IDLE_MS})
    token = secrets.token_urlsafe(32)
    sql = "INSERT INTO console_session (hash, account_id, used_at) VALUES (:hash, :id, :now)"
    db.execute(sql, {"hash": hash_of(token), "id": account_id, "now": now})
    return token


def find_session(db: Database, now: int, token: str) -> tuple[Person, int] | None:
    """Whose it is, and when it was last used."""
    sql = "SELECT account_id, used_at FROM console_session WHERE hash = :hash AND used_at > :idle"
    row = db.execute(sql, {"hash": hash_of(token), "idle": now - SESSION_IDLE_MS}).fetchone()
    person = find_person(db, row[0]) if row else None
    return (person, row[1]) if person else None


def touch_session(db: Database, now: int, token: str) -> None:
    sql = "UPDATE console_session SET used_at = :now WHERE hash = :hash"
    db.execute(sql, {"hash": hash_of(token), "now": now})


def end_session(db: Database, token: str) -> None:
    db.execute("DELETE FROM console_session WHERE hash = :hash", {"hash": hash_of(token)})


def end_sessions(db: Database, account_id: int) -> None:
    db.execute("DELETE FROM console_session WHERE account_id = :id", {"id": account_id})


# ---- Forms: the same one again within a minute adds nothing, and shows the same answer ------------------------------


def sealed(form: str, answer: bytes) -> bytes:
    """An answer that only who has the form's id can read, or one that was sealed so: a new key is never stored."""
    pad = hashlib.shake_256(b"answer" + form.encode()).digest(len(answer))
    return bytes(a ^ b for a, b in zip(answer, pad, strict=True))


def form_hash(scope: str, form: str) -> bytes:
    return hash_of(f"{scope} {form}")


def keep_answer(db: Database, now: int, account_id: int, scope: str, form: str, answer: str) -> None:
    """`scope` is the kind of the form and who sent it."""
    db.execute("DELETE FROM console_form WHERE expires_at <= :now", {"now": now})
    sql = """
        INSERT INTO console_form (hash, account_id, answer, expires_at) VALUES (:hash, :id, :answer, :expires_at)
        ON CONFLICT DO NOTHING
    """
    values = {"hash": form_hash(scope, form), "id": account_id, "answer": sealed(form, answer.encode())}
    if form:
        db.execute(sql, {**values, "expires_at": now + FORM_MS})


def find_answer(db: Database, now: int, scope: str, form: str) -> tuple[int, str] | None:
    """The account that the form was about, and its answer."""
    sql = "SELECT account_id, answer FROM console_form WHERE hash = :hash AND expires_at > :now"
    row = db.execute(sql, {"hash": form_hash(scope, form), "now": now}).fetchone() if form else None
    return (row[0], sealed(form, bytes(row[1])).decode()) if row else None


# ---- Mail -----------------------------------------------------------------------------------------------------------


class Letter(NamedTuple):
    account_id: int
    model: str
    occasion: str
    created_at: int
    tries: int


def write_letter(db: Database, now: int, account_id: int, model: str, occasion: str) -> None:
    """Unique by account, model and occasion, for several boxes too."""
    sql = """
        INSERT INTO console_mail (account_id, model, occasion, created_at, due_at)
        VALUES (:id, :model, :occasion, :now, :now) ON CONFLICT DO NOTHING
    """
    db.execute(sql, {"id": account_id, "model": model, "occasion": occasion, "now": now})


def count_letters(db: Database, account_id: int, since: int) -> int:
    """Password links that were asked for by mail."""
    sql = "SELECT count(*) FROM console_mail WHERE account_id = :id AND model = '' AND created_at > :since"
    return int(db.execute(sql, {"id": account_id, "since": since}).fetchone()[0])


def claim_letter(db: Database, now: int) -> Letter | None:
    """The next one that is due: nobody else takes it for ten minutes."""
    sql = """
        UPDATE console_mail SET due_at = :until, tries = tries + 1
        WHERE (account_id, model, occasion) IN (
            SELECT account_id, model, occasion FROM console_mail WHERE sent_at IS NULL AND due_at <= :now
            ORDER BY due_at LIMIT 1
        ) AND sent_at IS NULL AND due_at <= :now
        RETURNING account_id, model, occasion, created_at, tries
    """
    row = db.execute(sql, {"now": now, "until": now + CLAIM_MS}).fetchone()
    return Letter(*row) if row else None


def put_back(db: Database, letter: Letter, due_at: int) -> None:
    mark(db, letter, "due_at", due_at)


def put_away(db: Database, now: int, letter: Letter) -> None:
    mark(db, letter, "sent_at", now)


def mark(db: Database, letter: Letter, column: str, value: int) -> None:
    sql = f"""
        UPDATE console_mail SET {column} = :value
        WHERE account_id = :id AND model = :model AND occasion = :occasion
    """
    db.execute(sql, {"id": letter.account_id, "model": letter.model, "occasion": letter.occasion, "value": value})
