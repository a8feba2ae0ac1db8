"""Getting into the console and out of it: registration, passwords, sessions, links, and who is kept out."""

import re
import sqlite3
from typing import Any

import pytest

from tests.support.books import assert_audit
from tests.support.console import (
    PASSWORD,
    Visitor,
    by_id,
    error_of,
    link_in,
    text,
    value_of,
    went_to,
)
from tests.support.postgres import WANTED as POSTGRES
from tests.support.process import RunningProxy

HOSTILE = [
    "<script>alert(1)</script>",
    "\u202eevil",
    "\N{PILE OF POO}" * 64,
    "a b",
    "-dash",
    "x" * 65,
    "",
    "a/b",
    "a\nb",
]

on_sqlite = pytest.mark.skipif(POSTGRES, reason="looks into the file of SQLite")


def test_whoever_registers_is_signed_in_with_the_free_credits(site: RunningProxy, visitor: Visitor) -> None:
    answer = visitor.register("nadia", email="nadia@example.com")
    assert went_to(answer) == "/dashboard"
    cookie = answer.headers["set-cookie"]
    assert re.match(r"session=[A-Za-z0-9_-]{43};", cookie)
    assert "HttpOnly" in cookie and "SameSite=Lax" in cookie and "Secure" not in cookie
    dashboard = visitor.get("/dashboard")
    assert by_id(dashboard, "credits") == "1,000"
    assert dashboard.headers["cache-control"] == "no-store"
    assert site.account("nadia")["credits"] == 1000
    assert_audit(site)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_is_none_is_refused_and_kept_in_its_field(visitor: Visitor, name: str) -> None:
    answer = visitor.register(name, email="kept@example.com")
    assert answer.status == 422
    assert error_of(answer, "name").startswith("A name has")
    assert value_of(answer, "name") == name
    assert value_of(answer, "email") == "kept@example.com"
    assert "<script>alert" not in text(answer)
    assert PASSWORD not in text(answer)


def test_names_are_normalised_and_unique_without_case(visitor: Visitor) -> None:
    assert went_to(visitor.register("\uff2dona")) == "/dashboard"  # a full-width M is an M
    for name in ("Mona", "mona", "MONA", " mona "):
        assert error_of(Visitor(visitor.proxy).register(name), "name") == "This name is taken."
    assert went_to(Visitor(visitor.proxy).login("mOnA")) == "/dashboard"


@pytest.mark.parametrize("password", ["short77", "password", "PASSWORD123", "iloveyou", "x" * 257])
def test_a_password_that_is_too_short_too_long_or_common_is_refused(visitor: Visitor, password: str) -> None:
    answer = visitor.register("weak", password)
    assert answer.status == 422 and error_of(answer, "password")
    assert value_of(answer, "name") == "weak"


def test_an_address_that_is_none_is_refused(visitor: Visitor) -> None:
    for email in ("nobody", "a@b@c", "a b@c.d", "a@b.c\nBcc: x@y.z", '"<x>"@y.z', "@y.z"):
        assert error_of(visitor.register("mailer", email=email), "email") == "This is no e-mail address."


def test_the_same_registration_twice_makes_one_account_and_answers_the_same(
    site: RunningProxy, visitor: Visitor
) -> None:
    form = value_of(visitor.get("/register"), "form")
    assert went_to(visitor.register("twice", form=form)) == "/dashboard"
    again = Visitor(site)
    assert went_to(again.register("twice", form=form)) == "/dashboard"
    assert again.get("/dashboard").status == 200
    assert len([a for a in site.command("account", "list") if a["account"] == "twice"]) == 1
    thief = Visitor(site)
    assert thief.register("twice", "another password", form=form).status == 422
    assert went_to(thief.get("/dashboard")).startswith("/login")


def test_five_accounts_an_hour_from_an_address(site: RunningProxy, visitor: Visitor) -> None:
    for number in range(5):
        assert visitor.register(f"crowd-{number}").status == 303
        visitor.cookies.clear()
    answer = visitor.register("crowd-5")
    assert answer.status == 429
    assert 3500 < int(answer.headers["retry-after"]) <= 3600
    assert Visitor(site).register("crowd-6").status == 303


def test_wrong_passwords_are_limited_by_name_and_address_never_by_name_alone(
    site: RunningProxy, visitor: Visitor
) -> None:
    visitor.register("limited")
    attacker = Visitor(site)
    for _ in range(5):
        wrong = attacker.login("limited", "wrong password")
        assert (wrong.status, error_of(wrong, "password")) == (422, "Name and password do not match.")
    refused = attacker.login("LIMITED", PASSWORD)
    assert refused.status == 429
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert went_to(Visitor(site).login("limited")) == "/dashboard"
    assert attacker.register("limited-too").status == 303


def test_an_unknown_name_is_told_what_a_wrong_password_is(visitor: Visitor) -> None:
    unknown, wrong = visitor.login("nobody-at-all"), visitor.login("limited", "wrong password 2")
    assert (unknown.status, error_of(unknown, "password")) == (wrong.status, error_of(wrong, "password"))
    assert value_of(unknown, "name") == "nobody-at-all"


def test_a_session_is_new_at_login_and_ends_at_logout(visitor: Visitor) -> None:
    visitor.register("leaver")
    first = visitor.cookies["session"]
    assert went_to(visitor.login("leaver")) == "/dashboard"
    second = visitor.cookies["session"]
    assert first != second
    assert went_to(visitor.post("/logout")) == "/"
    assert "session" not in visitor.cookies
    for token in (first, second):
        visitor.cookies["session"] = token
        assert went_to(visitor.get("/dashboard")).startswith("/login")


@on_sqlite
def test_a_session_that_nobody_used_for_thirty_days_is_over(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("idle")
    with sqlite3.connect(site.folder / "proxy.db") as db:
        db.execute("UPDATE console_session SET used_at = used_at - 29 * 86400000")
    refreshed = visitor.get("/dashboard")
    assert refreshed.status == 200 and "Max-Age=2592000" in refreshed.headers["set-cookie"]
    with sqlite3.connect(site.folder / "proxy.db") as db:
        db.execute("UPDATE console_session SET used_at = used_at - 31 * 86400000")
    db.close()
    assert went_to(visitor.get("/dashboard")).startswith("/login")


def test_a_session_is_no_key_and_a_key_no_session(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("keyless")
    token = visitor.cookies["session"]
    assert site.client(token).get("/v1/models").status == 401
    key = visitor.add_key()
    assert site.client(key).get("/v1/models").status == 200
    assert went_to(Visitor(site).get("/dashboard", headers={"Authorization": f"Bearer {key}"})).startswith("/login")


def test_next_leads_to_a_page_of_ours_only(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("nexter")
    assert went_to(visitor.get("/login?next=/usage?days=7")) == "/usage?days=7"
    for asked in ("//evil.example", "/\\evil.example", "https://evil.example", "/a%0Ab", "/%09/evil.example", ""):
        assert went_to(visitor.get(f"/login?next={asked}")) == "/dashboard"
    assert went_to(Visitor(site).login("nexter", next="/usage?days=7")) == "/usage?days=7"
    assert went_to(Visitor(site).login("nexter", next="//evil.example")) == "/dashboard"


def test_signed_out_a_page_leads_to_the_login_and_back(visitor: Visitor) -> None:
    assert went_to(visitor.get("/usage?days=7")) == "/login?next=%2Fusage%3Fdays%3D7"
    assert value_of(visitor.get("/login?next=%2Fusage%3Fdays%3D7"), "next") == "/usage?days=7"
    for path in ("/dashboard", "/keys", "/usage", "/usage.csv", "/requests", "/billing", "/settings"):
        assert went_to(visitor.get(path)).startswith("/login")
    for path in ("/keys", "/keys/revoke", "/settings"):
        assert went_to(visitor.post(path, label="x", key_id="1")) == "/login"
    for path in ("/admin", "/admin/requests", "/admin/audit", "/admin/accounts/nadia", "/admin/x"):
        assert visitor.get(path).status == 404
        assert visitor.post(path).status == 404


def test_a_form_of_another_site_is_refused(visitor: Visitor) -> None:
    visitor.register("crossed")
    refused: list[dict[str, Any]] = [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": None},
        {"origin": f"http://127.0.0.1:{visitor.proxy.port + 1}"},
        {"headers": {"Sec-Fetch-Site": "cross-site"}},
        {"headers": {"Sec-Fetch-Site": "same-site"}},
    ]
    for path in (
        "/keys",
        "/login",
        "/register",
        "/logout",
        "/settings",
        "/link/x",
        "/forgot",
        "/keys/revoke",
        "/nothing",
    ):
        for options in refused:
            answer = visitor.post(path, options, label="stolen")
            assert answer.status in (403, 404) and (answer.status == 403 or path == "/nothing"), (path, options)
    assert visitor.get("/dashboard").status == 200
    assert "No keys yet" in text(visitor.get("/keys"))
    for site in ("same-origin", "none"):
        assert visitor.post("/keys", {"headers": {"Sec-Fetch-Site": site}, "origin": None}).status == 200


def test_a_changed_password_ends_the_other_sessions(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("changer")
    other = Visitor(site)
    other.login("changer")
    wrong = visitor.post("/settings", action="password", password="a new password", current_password="no")
    assert error_of(wrong, "current_password") == "This is not your current password."
    weak = visitor.post("/settings", action="password", password="password", current_password=PASSWORD)
    assert weak.status == 422 and error_of(weak, "password")
    before = visitor.cookies["session"]
    changed = visitor.post("/settings", action="password", password="a new password", current_password=PASSWORD)
    assert went_to(changed) == "/settings?changed=password"
    assert visitor.cookies["session"] != before
    assert visitor.get("/settings?changed=password").status == 200
    assert went_to(other.get("/dashboard")).startswith("/login")
    assert other.login("changer").status == 422
    assert other.login("changer", "a new password").status == 303


def test_an_address_is_changed_with_the_password_only(visitor: Visitor) -> None:
    visitor.register("mailed", email="old@example.com")
    wrong = visitor.post("/settings", action="email", email="new@example.com", current_password="no")
    assert error_of(wrong, "email_password") and value_of(wrong, "email") == "new@example.com"
    visitor.post("/settings", action="email", email="new@example.com", current_password=PASSWORD)
    assert value_of(visitor.get("/settings"), "email") == "new@example.com"


def test_signing_out_everywhere_ends_every_session(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("everywhere")
    other = Visitor(site)
    other.login("everywhere")
    assert went_to(visitor.post("/settings", action="sign-out")) == "/login"
    assert went_to(other.get("/dashboard")).startswith("/login")


def test_a_link_sets_a_password_once(site: RunningProxy, visitor: Visitor) -> None:
    site.add_account(10, name="linked")
    older, link = (link_in(site.run("account", "link", "linked").stdout) for _ in range(2))
    assert visitor.get(older).status == 404  # there is a newer one
    for _ in range(2):  # looking does not use it up
        assert visitor.get(link).status == 200
    assert visitor.post(link, password="password").status == 422
    assert went_to(visitor.post(link, password=PASSWORD)) == "/dashboard"
    assert by_id(visitor.get("/dashboard"), "credits") == "1,010"
    assert Visitor(site).get(link).status == 404
    assert Visitor(site).post(link, password="another password").status == 404
    assert Visitor(site).login("linked").status == 303
    assert not any(link in line for line in site.lines)


@on_sqlite
def test_a_set_password_ends_links_and_an_hour_does(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("ender")
    link = link_in(site.run("account", "link", "ender").stdout)
    visitor.post("/settings", action="password", password="a new password", current_password=PASSWORD)
    assert visitor.get(link).status == 404
    link = link_in(site.run("account", "link", "ender").stdout)
    with sqlite3.connect(site.folder / "proxy.db") as db:
        db.execute("UPDATE console_link SET expires_at = expires_at - 3600000")
    db.close()
    assert visitor.get(link).status == 404


def test_a_suspended_account_reads_and_changes_nothing(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("suspended")
    site.command("account", "suspend", "suspended")
    visitor.cookies.clear()
    assert went_to(visitor.login("suspended")) == "/dashboard"
    for path in ("/dashboard", "/keys", "/usage", "/requests", "/billing", "/settings"):
        answer = visitor.get(path)
        assert answer.status == 200 and "suspended" in text(answer)
    for path in ("/keys", "/keys/revoke", "/settings"):
        assert visitor.post(path, action="sign-out", key_id="1").status == 403
    assert went_to(visitor.post("/logout")) == "/"


def test_behind_tls_the_cookie_is_secure(visitor: Visitor) -> None:
    behind: dict[str, Any] = {"headers": {"X-Forwarded-Proto": "https"}}
    answer = visitor.request("POST", "/register", {"name": "tls", "password": PASSWORD}, **behind)
    assert answer.headers["set-cookie"].startswith("__Host-session=")
    assert "Secure" in answer.headers["set-cookie"] and "Path=/" in answer.headers["set-cookie"]
    assert answer.headers["strict-transport-security"].startswith("max-age=")
    assert visitor.get("/dashboard", **behind).status == 200
    assert went_to(visitor.get("/dashboard")).startswith("/login")  # not without TLS


@on_sqlite
def test_no_secret_stands_in_the_database(site: RunningProxy, visitor: Visitor) -> None:
    visitor.register("secretive")
    form = "a-form-id-of-my-own"
    key, token = visitor.add_key(form=form), visitor.cookies["session"]
    with sqlite3.connect(site.folder / "proxy.db") as db:
        dump = "\n".join(db.iterdump())
        stored = b"".join(bytes(row[0]) for row in db.execute("SELECT answer FROM console_form"))
    db.close()
    for secret in (key, token, PASSWORD, form):
        assert secret not in dump and secret.encode() not in stored and secret.encode().hex() not in dump.lower()
