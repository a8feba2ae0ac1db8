"""The operator's pages: a round through them, and that they are for operators only."""

import re
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest

from tests.support.books import assert_audit
from tests.support.console import (
    CONSOLE,
    PASSWORD,
    Visitor,
    by_id,
    error_of,
    link_in,
    make_operator,
    start_site,
    text,
    value_of,
    went_to,
)
from tests.support.process import RunningProxy


@pytest.fixture(scope="module")
def site(module_proxy: Callable[..., RunningProxy], tmp_path_factory: pytest.TempPathFactory) -> RunningProxy:
    return start_site(
        module_proxy,
        tmp_path_factory.mktemp("site"),
        {**CONSOLE, "registration": "closed"},
        free_credits={"amount": 100, "days": 30},
    )


@pytest.fixture(scope="module")
def operator(site: RunningProxy) -> Visitor:
    return make_operator(site, "boss")


def test_an_operator_makes_an_account_and_its_owner_signs_in(site: RunningProxy, operator: Visitor) -> None:
    form = value_of(operator.get("/admin"), "form")
    answer = operator.post("/admin/accounts", name="newbie", tier="two-keys", credits="50.5", form=form)
    path = went_to(answer)
    assert path.startswith("/admin/accounts/newbie?form=")
    link = by_id(operator.get(path), "new-link")
    assert link in text(answer)
    again = operator.post("/admin/accounts", name="newbie", tier="two-keys", credits="50.5", form=form)
    assert went_to(again) == path and link in text(again)
    assert site.account("newbie")["credits"] == 150.5
    assert site.account("newbie")["tier"] == "two-keys"
    newbie = Visitor(site)
    assert went_to(newbie.post(link_in(link), password=PASSWORD)) == "/dashboard"
    assert by_id(newbie.get("/dashboard"), "credits") == "150.5"
    assert newbie.get("/admin").status == 404
    assert newbie.get(path).status == 404


def test_a_new_account_with_an_error_is_none(site: RunningProxy, operator: Visitor) -> None:
    for field, typed in (("name", "<b>"), ("name", "BOSS"), ("credits", "-1"), ("tier", "gold"), ("email", "x")):
        fields: dict[str, Any] = {"name": "never", "tier": "two-keys", "credits": "5", field: typed}
        answer = operator.post("/admin/accounts", **fields)
        assert answer.status == 422 and error_of(answer, field), field
        assert value_of(answer, "name") == fields["name"]
    assert site.run("account", "show", "never").returncode == 1


def test_credits_are_added_once_a_form_and_once_a_reference(site: RunningProxy, operator: Visitor) -> None:
    site.add_account(0, name="buyer")
    here = "/admin/accounts/buyer"
    form = value_of(operator.get(here), "form")
    for _ in range(2):
        assert went_to(operator.post(here, action="credits", amount="10", note="<i>", form=form)).startswith(here)
    for _ in range(2):
        assert went_to(operator.post(here, action="credits", amount="5", ref="order-1")).startswith(here)
    assert site.account("buyer")["paid"] == 15
    other = operator.post(here, action="credits", amount="6", ref="order-1", note="typed")
    assert other.status == 422 and "another account or amount" in error_of(other, "ref")
    assert value_of(other, "note") == "typed"
    assert operator.post(here, action="credits", amount="-15").status == 303
    assert error_of(operator.post(here, action="credits", amount="-1"), "amount")
    for wrong in ("", "0", "abc", "1,5", "NaN"):
        assert operator.post(here, action="credits", amount=wrong).status == 422
    page = text(operator.get(here))
    assert "order-1" in page and "&lt;i&gt;" in page
    assert_audit(site)


def test_an_account_is_suspended_resumed_and_given_another_tier(site: RunningProxy, operator: Visitor) -> None:
    account = site.add_account(5, name="changing")
    here = "/admin/accounts/changing"
    assert went_to(operator.post(here, action="suspend")) == here
    assert site.client(account.key).chat(model="echo").status == 403
    assert went_to(operator.post(here, action="resume")) == here
    assert site.client(account.key).chat("hi", model="echo").status == 200
    assert went_to(operator.post(here, action="tier", tier="one-at-a-time")) == here
    assert site.account("changing")["tier"] == "one-at-a-time"
    assert operator.post(here, tier="gold").status == 422
    assert operator.post("/admin/accounts/boss", action="suspend").status == 422
    assert operator.post(here, action="nothing").status == operator.post(here).status == 404
    assert operator.get(f"{here}/nothing").status == operator.post("/admin/accounts/nobody", amount="1").status == 404
    assert "hi" not in text(operator.get("/admin/requests"))


def test_an_operator_revokes_a_key_of_the_account_at_hand_only(site: RunningProxy, operator: Visitor) -> None:
    one, other = site.add_account(5, name="key-owner"), site.add_account(5, name="other-owner")
    wrong = operator.post("/admin/accounts/key-owner", key_id=other.key_id)
    assert wrong.status == 404
    assert operator.post("/admin/accounts/key-owner", key_id=one.key_id).status == 303
    assert site.client(one.key).chat(model="echo").status == 401
    assert site.client(other.key).chat("hi", model="echo").status == 200


def test_a_link_of_the_operator_sets_a_password(site: RunningProxy, operator: Visitor) -> None:
    site.add_account(5, name="forgetful")
    path = went_to(operator.post("/admin/accounts/forgetful", action="link"))
    link = by_id(operator.get(path), "new-link")
    assert link.startswith(f"http://127.0.0.1:{site.port}/link/")
    assert "new-link" not in text(operator.get("/admin/accounts/forgetful"))
    assert Visitor(site).post(link_in(link), password=PASSWORD).status == 303


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "‮evil", "💩" * 64, "a/b?c#d", '"quoted"', "100%"])
def test_whatever_an_account_is_called_its_page_is_found(site: RunningProxy, operator: Visitor, name: str) -> None:
    made = site.run("account", "add", name, "--credits", "5")
    if made.returncode:  # the command takes printable words only
        assert "printable" in made.stderr
        return
    found = text(operator.get(f"/admin?q={quote(name, safe='')}"))
    assert f'href="/admin/accounts/{quote(name, safe="")}"' in found
    for path in (f"/admin/accounts/{quote(name, safe='')}", "/admin"):
        page = operator.get(path)
        assert page.status == 200 and "<script>alert" not in text(page)
    assert operator.post(f"/admin/accounts/{quote(name, safe='')}", action="suspend").status == 303
    assert site.account(name)["status"] == "suspended"


def test_totals_upstreams_and_the_audit_are_what_the_commands_say(site: RunningProxy, operator: Visitor) -> None:
    audit = site.audit()
    for path in ("/admin", "/admin/audit"):
        assert f"<dd>{audit['balances']:,}</dd>" in text(operator.get(path))
    assert "The books add up" in text(operator.get("/admin/audit"))
    page = text(operator.get("/admin"))
    assert re.search(r'<td class="id">echo</td><td><span class="tag ok">builtin', page)
    assert operator.get("/admin?page=99").status == 200


def test_nobody_else_learns_that_there_is_anything(site: RunningProxy) -> None:
    site.add_account(5, name="curious")
    curious = Visitor(site)
    curious.post(link_in(site.run("account", "link", "curious").stdout), password=PASSWORD)
    for path in ("/admin", "/admin/requests", "/admin/audit", "/admin/accounts/boss", "/admin/accounts/nobody"):
        assert curious.get(path).status == 404
    assert curious.post("/admin/accounts", name="x", credits="1", tier="unlimited").status == 404
    for action in ("credits", "tier", "link", "suspend", ""):
        answer = curious.post("/admin/accounts/boss", action=action, amount="1", tier="unlimited")
        assert answer.status == 404
    site.command("account", "operator", "curious")
    assert curious.get("/admin").status == 200
    site.command("account", "operator", "curious", "--off")
    assert curious.get("/admin").status == 404


def test_where_registration_is_closed_nobody_registers(site: RunningProxy) -> None:
    visitor = Visitor(site)
    assert visitor.get("/register").status == 404
    assert visitor.register("intruder").status == 404
    assert "Register" not in text(visitor.get("/"))
