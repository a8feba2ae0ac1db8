"""What who is signed in sees and does: keys, usage, requests, billing; and never anybody else's."""

import csv
import io
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.support.books import assert_audit
from tests.support.console import Visitor, by_id, error_of, start_site, text, value_of, went_to
from tests.support.errors import assert_error
from tests.support.process import RunningProxy
from tests.support.waiting import wait_until

FORMULAS = ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\u202e=1"]


@pytest.fixture(scope="module")
def site(module_proxy: Callable[..., RunningProxy], tmp_path_factory: pytest.TempPathFactory) -> RunningProxy:
    return start_site(module_proxy, tmp_path_factory.mktemp("site"), default_tier="unlimited")


@pytest.fixture(scope="module")
def nadia(site: RunningProxy) -> Visitor:
    """Somebody with a key and three requests."""
    visitor = Visitor(site)
    visitor.register("nadia")
    client = site.client(visitor.add_key(label="first"))
    for _ in range(2):
        assert client.chat("one two three", model="echo").status == 200
    assert client.chat("one two", model="plain").status == 200
    wait_until(lambda: site.account("nadia")["held"] == 0, "the last settles")
    return visitor


@pytest.fixture(scope="module")
def keyless(site: RunningProxy) -> Visitor:
    visitor = Visitor(site)
    visitor.register("keyless")
    return visitor


@pytest.fixture
def visitor(site: RunningProxy) -> Visitor:
    visitor = Visitor(site)
    visitor.register(f"user-{visitor.address}")
    return visitor


def cells(page: str) -> list[str]:
    return [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<t[dh]\b[^>]*>(.*?)</t[dh]>", page, re.S)]


def test_a_new_key_is_shown_once_and_works(site: RunningProxy, visitor: Visitor) -> None:
    answer = visitor.post(
        "/keys", label="laptop", credit_limit="112.5", expires_on="2099-12-31", models="echo, nickname"
    )
    key = by_id(answer, "new-key")
    assert (answer.status, answer.headers["cache-control"]) == (200, "no-store")
    assert re.fullmatch(r"sk-[A-Za-z0-9_-]{43}", key)
    assert text(answer).count(key) > 1  # the snippet uses it
    assert key not in text(visitor.get("/keys"))
    assert site.client(key).chat("hello", model="echo").status == 200
    assert_error(site.client(key).chat("hello", model="plain"), 403, "model_not_allowed")
    (listed,) = site.command("key", "list", f"user-{visitor.address}")
    assert (listed["label"], listed["credit_limit"], listed["models"]) == ("laptop", 112.5, ["echo", "vendor/named:7b"])
    assert listed["expires_at"] == "2100-01-01T00:00:00Z"
    assert "2099-12-31" in cells(text(visitor.get("/keys")))


@pytest.mark.parametrize(
    ("field", "typed"),
    [
        ("credit_limit", "abc"),
        ("credit_limit", "-1"),
        ("credit_limit", "1.0005"),
        ("credit_limit", "1e3"),
        ("credit_limit", "9999999999999"),
        ("expires_on", "yesterday"),
        ("expires_on", "2020-01-01"),
        ("expires_on", "2026-02-30"),
        ("expires_on", "9999-12-31"),
        ("models", "ech"),
        ("label", "x" * 101),
        ("label", "a\u202eb"),
    ],
)
def test_a_wrong_field_says_so_and_keeps_all_that_was_typed(keyless: Visitor, field: str, typed: str) -> None:
    form = value_of(keyless.get("/keys"), "form")
    fields: Mapping[str, Any] = {"label": "kept", "models": "echo", field: typed}
    answer = keyless.post("/keys", form=form, **fields)
    assert answer.status == 422 and error_of(answer, field)
    assert all(value_of(answer, name) == value for name, value in fields.items())
    assert value_of(answer, "form") == form
    assert "No keys yet" in text(keyless.get("/keys"))


def test_the_same_form_twice_makes_one_key_and_shows_it_again(site: RunningProxy, visitor: Visitor) -> None:
    form = value_of(visitor.get("/keys"), "form")
    first, second = (visitor.add_key(form=form, label="once") for _ in range(2))
    assert first == second
    assert len(site.command("key", "list", f"user-{visitor.address}")) == 1
    assert value_of(visitor.get("/keys"), "form") != form
    other = Visitor(site)
    other.register("form-thief")
    assert other.add_key(form=form) != first


def test_a_tier_that_gives_no_more_keys_says_so(site: RunningProxy, visitor: Visitor) -> None:
    site.command("account", "tier", f"user-{visitor.address}", "two-keys")
    visitor.add_key()
    visitor.add_key()
    answer = visitor.post("/keys", label="third")
    assert answer.status == 422 and "revoke one first" in text(answer)


def test_a_revoked_key_ends_at_once(site: RunningProxy, visitor: Visitor) -> None:
    key = visitor.add_key()
    key_id = re.search(r'name="key_id" value="(\d+)"', text(visitor.get("/keys")))
    assert key_id
    assert visitor.get("/keys/revoke").status == 405
    assert went_to(visitor.post("/keys/revoke", key_id=key_id[1])) == "/keys"
    assert_error(site.client(key).chat(model="echo"), 401, "revoked_api_key")
    assert "revoked" in text(visitor.get("/keys"))
    assert visitor.post("/keys/revoke", key_id=key_id[1]).status == 303


def test_somebody_elses_key_is_not_there(site: RunningProxy, nadia: Visitor, visitor: Visitor) -> None:
    key_id = site.command("key", "list", "nadia")[0]["key_id"]
    for wrong in (str(key_id), "0", "abc", "", "9" * 30, "-1"):
        assert visitor.post("/keys/revoke", key_id=wrong).status == 404
    assert visitor.get(f"/usage?key={key_id}").status == 404
    assert visitor.get(f"/usage.csv?key={key_id}").status == 404
    assert site.command("key", "list", "nadia")[0]["revoked_at"] is None
    for path in ("/dashboard", "/usage", "/requests", "/billing", "/keys", "/usage.csv"):
        assert "first" not in text(visitor.get(path)).replace("first one", "").replace("First byte", "")
    assert "nadia" not in text(visitor.get("/dashboard"))


def test_every_figure_is_what_the_commands_say(site: RunningProxy, nadia: Visitor) -> None:
    shown, used = site.account("nadia"), site.command("usage", "nadia")
    assert by_id(nadia.get("/dashboard"), "credits") == f"{shown['credits']:,}"
    assert by_id(nadia.get("/billing"), "credits") == f"{shown['credits']:,}"
    rows = list(csv.DictReader(io.StringIO(text(nadia.get("/usage.csv")))))
    assert sum(float(row["credits"]) for row in rows) == sum(row["credits"] for row in used) == 1000 - shown["credits"]
    assert {(row["day"], row["model"], int(row["requests"])) for row in rows} == {
        (row["day"], row["model"], row["requests"]) for row in used
    }
    total = f"{sum(row['credits'] for row in used):,}"
    assert cells(text(nadia.get("/usage"))).count(total) >= 4  # every table has its sum
    assert_audit(site)


def test_usage_is_filtered_by_days_model_and_key(nadia: Visitor) -> None:
    everything, one = text(nadia.get("/usage")), text(nadia.get("/usage?days=7&model=echo"))
    assert "plain" in cells(everything) and "plain" not in cells(one) and "echo" in cells(one)
    assert "UTC" in one
    assert nadia.get("/usage?days=abc&model=nothing").status == 200
    assert "Nothing was used" in text(nadia.get("/usage?model=%3Cscript%3Ealert(1)%3C/script%3E"))
    assert "<script>alert" not in text(nadia.get("/usage?model=%3Cscript%3Ealert(1)%3C/script%3E"))


def test_the_chart_has_a_title_and_a_table(nadia: Visitor) -> None:
    page = text(nadia.get("/dashboard"))
    assert re.search(
        r'<svg[^>]*role="img" aria-labelledby="chart-title">\s*<title id="chart-title">Credits a day: ', page
    )
    today = datetime.now(UTC).date()
    assert {str(today), str(today - timedelta(days=29))} <= set(cells(page))


def test_requests_are_paged_and_lose_none(site: RunningProxy, visitor: Visitor) -> None:
    client = site.client(visitor.add_key())
    for _ in range(53):
        assert client.chat("hi", model="echo").status == 200
    first = text(visitor.get("/requests"))
    older = re.search(r'href="(/requests\?before=req_[0-9a-f]{16})">Older', first)
    assert older
    second = text(visitor.get(older[1]))
    names = re.findall(r">(req_[0-9a-f]{16})<", first + second)
    assert len(names) == 53 == len(set(names)) and names == sorted(names, reverse=True)
    assert "Older" not in second and "Newest" in second
    for wrong in ("abc", "req_1", "1.5", "%00"):
        assert visitor.get(f"/requests?before={wrong}").status in (200, 404)
    assert visitor.get("/requests?before=" + "9" * 19).status == 200


def test_packs_and_history_are_on_the_page_and_in_the_api(site: RunningProxy, visitor: Visitor) -> None:
    name, key = f"user-{visitor.address}", visitor.add_key()
    for number in range(21):
        site.command("credit", "add", name, "10", "--ref", f"{name}-{number}", "--note", "<b>thanks</b>")
    page = text(visitor.get("/billing"))
    assert f"client_reference_id={name}" in page and "5,000" in page and "2 KWD" in page
    assert "&lt;b&gt;thanks&lt;/b&gt;" in page and "Page 1 of 2" in page
    assert "Page 2 of 2" in text(visitor.get("/billing?page=2"))
    packs = site.client(key).get("/api/billing/topup-packs").json()["data"]["packs"]
    link = f"https://pay.example.com/starter?client_reference_id={name}"
    assert packs == [{"name": "Starter", "credits": 5000, "price": "2 KWD", "link": link}]
    history = site.client(key).get("/api/billing/topup-history?page=2").json()["data"]
    assert (history["total"], history["per_page"], history["current_page"]) == (21, 20, 2)
    assert [pack["transaction_id"] for pack in history["packs"]] == [f"{name}-0"]


def test_a_spreadsheet_takes_no_label_for_a_formula(site: RunningProxy, visitor: Visitor) -> None:
    for label in (label for label in FORMULAS if label.isprintable()):
        assert site.client(visitor.add_key(label=label)).chat("hi", model="echo").status == 200
    answer = visitor.get("/usage.csv?days=1")
    assert answer.headers["content-type"].startswith("text/csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    rows = list(csv.DictReader(io.StringIO(text(answer))))
    assert {row["key"] for row in rows} == {"'=1+1", "'+1", "'-1", "'@SUM(A1)", "'=1"}


def test_what_was_typed_is_escaped_wherever_it_stands(site: RunningProxy, visitor: Visitor) -> None:
    label = '"><script>alert(1)</script>'
    assert site.client(visitor.add_key(label=label)).chat("hi", model="echo").status == 200
    for path in ("/keys", "/usage", "/dashboard"):
        page = text(visitor.get(path))
        assert "<script>alert" not in page
    assert "&lt;script&gt;" in text(visitor.get("/keys"))


def test_alerts_stand_on_the_dashboard(site: RunningProxy, visitor: Visitor) -> None:
    name, key = f"user-{visitor.address}", visitor.add_key()
    assert "note warn" not in text(visitor.get("/dashboard"))
    assert site.client(key).chat("hi", model="retiring").status == 200
    page = text(visitor.get("/dashboard"))
    assert "retiring</b> retires on" in page and "plain</b> instead" in page
    assert site.client(key).chat("word " * 330, model="echo").status == 200
    assert "less than three more days" in text(visitor.get("/dashboard")), site.account(name)


def test_an_empty_balance_locks_nobody_out(site: RunningProxy) -> None:
    site.add_account(0, name="empty")
    site.command("account", "operator", "empty")
    visitor = Visitor(site)
    link = re.search(r"/link/\S+", site.run("account", "link", "empty").stdout)
    assert link
    visitor.post(link[0], password="a fine password")
    for path in ("/dashboard", "/keys", "/usage", "/requests", "/billing", "/settings"):
        assert visitor.get(path).status == 200
