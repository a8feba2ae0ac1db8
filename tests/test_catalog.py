"""The models: what is shipped, what is listed, what is priced how, and what an edit of models.yaml does."""

import csv
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.answers import Answers
from tests.support.books import assert_books
from tests.support.client import QUESTION_ESTIMATE
from tests.support.commands import REPOSITORY, CommandServer
from tests.support.errors import assert_error
from tests.support.exchange import Exchange
from tests.support.files import MODELS, TODAY, UPSTREAM_KEY, catalog, edit_yaml, write_yaml
from tests.support.misbehaviours import Fails
from tests.support.process import Account, RunningProxy
from tests.support.upstream import FakeUpstream
from tests.support.waiting import Signal, wait_until

MakeKey = Callable[..., Account]
MakeProxy = Callable[..., RunningProxy]
CATALOG_TABLE = Path(__file__).parent / "data" / "catalog.tsv"


# -- What is shipped


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, commands: CommandServer) -> Any:
    """The repository's own two files, served on a free port."""
    folder = tmp_path_factory.mktemp("shipped")
    options = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    write_yaml(folder / "config.yaml", {**options, "listen": "127.0.0.1:0"})
    write_yaml(folder / "models.yaml", (REPOSITORY / "models.yaml").read_text())
    proxy = RunningProxy(folder / "config.yaml", commands, None)  # type: ignore[arg-type]
    yield proxy.start()
    proxy.close()


def test_the_shipped_catalog_is_the_table_and_echo(shipped: RunningProxy) -> None:
    with CATALOG_TABLE.open() as file:
        table = {row["id"]: row for row in csv.DictReader(file, delimiter="\t")}
    account = shipped.add_account(0)
    served = {row["id"]: row for row in shipped.client(account.key).get("/v1/models").json()["data"]}
    assert len(table) == 59 and set(served) == {*table, "echo"}
    for name, row in table.items():
        shown = served[name]
        assert (shown["tier"], shown["kind"]) == (row["tier"], row["kind"]), name
        assert shown["credit_multiplier"] == float(row["multiplier"]), name
        assert str(shown["context_window"] or "") == row["context_window"], name
        assert (shown["object"], shown["owned_by"]) == ("model", "llm-resayil")


def test_the_shipped_models_go_where_the_table_says(shipped: RunningProxy) -> None:
    """By the file itself: what runs behind these names is not on this machine."""
    models = yaml.safe_load((REPOSITORY / "models.yaml").read_text())["models"]
    with CATALOG_TABLE.open() as file:
        for row in csv.DictReader(file, delimiter="\t"):
            model = models[row["id"]]
            names = model["upstream"] if isinstance(model["upstream"], list) else [model["upstream"]]
            assert model.get("upstream_model", row["id"]) == row["upstream_name"]
            assert any("cloud" in name for name in names) == (row["where"] == "cloud"), row["id"]


def test_a_model_of_an_absent_ollama_answers_503_and_names_it_without_its_address(shipped: RunningProxy) -> None:
    account = shipped.add_account(10)
    answer = shipped.client(account.key).chat(model="llama3.2:3b")
    assert '"ollama"' in assert_error(answer, 503, "upstream_unavailable", "upstream_error")["message"]
    assert b"11434" not in answer.body and b"127.0.0.1" not in answer.body
    assert_books(shipped, account, credits=account.credits)


def test_a_cloud_model_without_its_key_says_which_variable_is_missing(shipped: RunningProxy) -> None:
    account = shipped.add_account(10)
    answer = shipped.client(account.key).chat(model="qwen3.5:397b")
    assert "OLLAMA_API_KEY" in assert_error(answer, 503, "upstream_unavailable")["message"]
    shipped.wait_for_line("OLLAMA_API_KEY")


# -- What is listed


def test_a_model_is_shown_with_its_price(proxy: RunningProxy, funded_key: MakeKey) -> None:
    shown = proxy.client(funded_key().key).get("/v1/models/plain").json()
    assert set(shown) >= {"id", "object", "created", "owned_by", "credit_multiplier", "tier", "kind"}
    assert set(shown) >= {"context_window", "deprecated"}
    assert (shown["id"], shown["object"], shown["owned_by"], shown["tier"]) == ("plain", "model", "tests", "one")
    assert (shown["credit_multiplier"], shown["deprecated"]) == (1, None)
    assert isinstance(shown["created"], int)


@pytest.mark.parametrize(
    "path", ["/v1/models/vendor/named:7b", "/v1/models/vendor%2Fnamed%3A7b", "/api/v1/models/nickname"]
)
def test_an_id_may_hold_slashes_and_colons_and_an_alias_answers_as_its_model(
    proxy: RunningProxy, funded_key: MakeKey, path: str
) -> None:
    shown = proxy.client(funded_key().key).get(path).json()
    assert (shown["id"], shown["kind"], shown["created"]) == ("vendor/named:7b", "code", 1700000000)
    assert shown["credit_multiplier"] == 1.5


def test_the_list_has_every_model_once_and_no_alias(proxy: RunningProxy, funded_key: MakeKey) -> None:
    client = proxy.client(funded_key().key)
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert sorted(row["id"] for row in listed["data"]) == sorted(MODELS)
    assert client.get("/api/v1/models").json() == listed
    with proxy.openai(client.key or "") as official:
        assert sorted(model.id for model in official.models.list()) == sorted(MODELS)
        assert official.models.retrieve("plain").owned_by == "tests"


def test_an_unknown_model_comes_with_names_close_to_it(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=10)
    client = proxy.client(account.key)
    for answer in (client.chat(model="pliain"), client.get("/v1/models/pliain")):
        error = assert_error(answer, 404, "model_not_found", "invalid_request_error")
        assert "plain" in error["message"]
    assert_error(client.chat(model="PLAIN"), 404, "model_not_found")  # exact, or not at all
    assert not upstream.posts
    assert_books(proxy, account, credits=10)


@pytest.mark.parametrize(
    ("asked", "sent"),
    [("vendor/named:7b", "vendor/named:7b"), ("nickname", "vendor/named:7b"), ("renamed", "real-name:latest")],
)
def test_the_upstream_gets_its_own_name_of_the_model(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey, asked: str, sent: str
) -> None:
    account = funded_key()
    assert proxy.client(account.key).chat(model=asked).status == 200
    assert upstream.posts[0].json["model"] == sent


# -- Deprecation


def test_a_deprecated_model_says_when_it_goes(proxy: RunningProxy, funded_key: MakeKey) -> None:
    client = proxy.client(funded_key(credits=1000).key)
    announced, sunset = (datetime.combine(TODAY + timedelta(days=days), time(), UTC) for days in (-10, 50))
    for stream in (False, True):
        answer = client.chat(model="retiring", stream=stream)
        assert answer.status == 200
        assert answer.headers["deprecation"] == f"@{int(announced.timestamp())}"
        assert answer.headers["sunset"] == sunset.strftime("%a, %d %b %Y 00:00:00 GMT")
    shown = client.get("/v1/models/retiring").json()["deprecated"]
    assert shown["replacement"] == "plain"
    assert str(shown["sunset"]).startswith(sunset.date().isoformat())


def test_a_retired_model_is_gone_and_names_its_replacement(
    proxy: RunningProxy, upstream: FakeUpstream, funded_key: MakeKey
) -> None:
    account = funded_key(credits=100)
    answer = proxy.client(account.key).chat(model="retired")
    assert "plain" in assert_error(answer, 410, "model_retired", "invalid_request_error")["message"]
    assert not upstream.posts
    assert_books(proxy, account, credits=100)


def test_a_deprecation_is_not_shown_before_its_announcement(proxy: RunningProxy, funded_key: MakeKey) -> None:
    client = proxy.client(funded_key(credits=100).key)
    answer = client.chat(model="announced-later")
    assert (answer.status, answer.headers["deprecation"], answer.headers["sunset"]) == (200, None, None)
    assert client.get("/v1/models/announced-later").json()["deprecated"] is None


def test_start_up_and_check_list_what_retires_within_30_days(running_proxy: MakeProxy) -> None:
    dates = {"announced": TODAY - timedelta(days=20), "sunset": TODAY + timedelta(days=15), "replacement": "plain"}
    proxy = running_proxy(models={"soon-gone": {"tier": "one", "upstream": "main", "deprecated": dates}})
    proxy.wait_for_line("soon-gone")
    assert "soon-gone" in proxy.run("check").stdout
    assert not any("retiring" in line for line in proxy.lines)  # fifty days are left


# -- Edits of models.yaml while the server runs


def edit(proxy: RunningProxy, models: dict[str, Any], replace: bool = False) -> None:
    """Write the file in place, or as editors do: a new file is renamed over the old one."""
    path = proxy.folder / "models.yaml"
    target = path.with_suffix(".new") if replace else path
    usable = {name: model for name, model in MODELS.items() if model["upstream"] in ("main", "echo")}
    write_yaml(target, catalog({**usable, **models}))
    if replace:
        target.rename(path)


def ids(proxy: RunningProxy, account: Account) -> list[str]:
    return [row["id"] for row in proxy.client(account.key).get("/v1/models").json()["data"]]


def price(proxy: RunningProxy, account: Account, model: str) -> float:
    return float(proxy.client(account.key).get(f"/v1/models/{model}").json()["credit_multiplier"])


@pytest.fixture(scope="module")
def edited(module_proxy: MakeProxy) -> RunningProxy:
    """A proxy whose models.yaml these tests edit; each writes the whole file."""
    return module_proxy()


def test_an_edit_is_served_without_a_restart(edited: RunningProxy) -> None:
    account = edited.add_account(100)
    for name, replace in (("added", False), ("added-again", True), ("added-once-more", True)):
        edit(edited, {name: {"tier": "mid", "upstream": "main"}}, replace)
        wait_until(lambda name=name: name in ids(edited, account), f"{name} is listed", seconds=5)  # type: ignore[misc]
        assert edited.client(account.key).chat(model=name).status == 200
        edited.wait_for_line(rf"\b{name}\b")
    assert "added" not in ids(edited, account)
    assert_error(edited.client(account.key).chat(model="added"), 404, "model_not_found")
    assert_books(edited, account, credits=100 - 3 * 12)


def test_a_broken_edit_keeps_the_last_good_catalog_and_is_logged_once(edited: RunningProxy) -> None:
    proxy = edited
    proxy.upstream.behaviour = Answers()
    edit(proxy, {})
    account = proxy.add_account(100)
    before = ids(proxy, account)
    edit(proxy, {"wrong": {"tier": "goldd", "upstream": "main"}})
    line = proxy.wait_for_line("goldd")
    assert "models.yaml" in line
    assert ids(proxy, account) == before
    assert proxy.client(account.key).chat().status == 200
    os.utime(proxy.folder / "models.yaml", None)
    edit(proxy, {"right": {"tier": "mid", "upstream": "main"}})
    wait_until(lambda: "right" in ids(proxy, account), "the next edit is served", seconds=5)
    assert sum("goldd" in line for line in proxy.lines) == 1
    assert_books(proxy, account, credits=92)


def test_a_request_under_way_keeps_its_price(edited: RunningProxy) -> None:
    proxy = edited
    proxy.upstream.behaviour = Answers(pause_after=2)
    account = proxy.add_account(100)
    with proxy.client(account.key).stream_chat() as stream:
        stream.read_until(b'"word"', times=2)
        edit(proxy, {"plain": {"tier": "dear", "upstream": "main"}})
        wait_until(lambda: price(proxy, account, "plain") == 3.5, "the new price is listed", seconds=5)
        proxy.upstream.behaviour.resume.set()  # type: ignore[attr-defined]
        assert stream.finish().clean
    assert_books(proxy, account, credits=92)
    proxy.upstream.behaviour = Answers()
    assert proxy.client(account.key).chat().status == 200
    assert_books(proxy, account, credits=92 - 28)


def test_a_model_that_is_removed_ends_no_stream(edited: RunningProxy) -> None:
    proxy = edited
    proxy.upstream.behaviour = Answers(pause_after=1, usage="none")
    account = proxy.add_account(100)
    with proxy.client(account.key).stream_chat(model="mid") as stream:
        stream.read_until(b'"word"')
        write_yaml(proxy.folder / "models.yaml", catalog({"echo": MODELS["echo"]}))
        wait_until(lambda: ids(proxy, account) == ["echo"], "the model is gone", seconds=5)
        proxy.upstream.behaviour.resume.set()  # type: ignore[attr-defined]
        assert stream.finish().clean
    assert_books(proxy, account, credits=100 - 1.5 * (QUESTION_ESTIMATE + 3))


def test_an_upstream_may_go_while_a_request_waits_for_its_headers(
    running_proxy: MakeProxy, fake_upstream: Callable[..., FakeUpstream]
) -> None:
    """The request is answered, and the next edit is taken over as ever."""
    leaving = fake_upstream(script := Answers(pause_after=0))
    model = {"tier": "one", "upstream": "leaving"}
    proxy = running_proxy(upstreams={"leaving": {"base_url": leaving.url}}, models={"stays-not": model})
    account = proxy.add_account(100)
    with proxy.client(account.key).start_chat(model="stays-not") as pending:
        script.reached.wait()
        edit(proxy, {})
        edit_yaml(proxy.config, lambda config: config["upstreams"].pop("leaving"))
        proxy.wait_for_line("upstreams: removed leaving")
        script.resume.set()
        assert pending.answered().finish().status == 200
    edit(proxy, {"added": {"tier": "one", "upstream": "main"}})
    wait_until(lambda: "added" in ids(proxy, account), "the next edit is served", seconds=5)
    assert_books(proxy, account, credits=92)


@dataclass
class FailsWhenTold(Fails):
    """Takes the request, and answers with its status when it may go on."""

    status: int = 500

    def __post_init__(self) -> None:
        self.resume = Signal()

    async def __call__(self, exchange: Exchange) -> None:
        await self.resume.happened()
        await super().__call__(exchange)


def test_a_key_that_is_replaced_while_it_is_in_use_reaches_nobody(
    running_proxy: MakeProxy, fake_upstream: Callable[..., FakeUpstream]
) -> None:
    """An upstream quotes the key that it was sent, when config.yaml has another by then."""
    script = FailsWhenTold(400, {"error": {"message": f"Incorrect API key provided: Bearer {UPSTREAM_KEY}"}})
    keyed = fake_upstream(script)
    model = {"tier": "one", "upstream": "keyed"}
    upstream = {"base_url": keyed.url, "api_key": UPSTREAM_KEY}
    proxy = running_proxy(upstreams={"keyed": upstream}, models={"keyed": model})
    account = proxy.add_account(100)
    with proxy.client(account.key).start_chat(model="keyed") as pending:
        keyed.next_exchange()
        edit_yaml(proxy.config, lambda config: config["upstreams"]["keyed"].update(api_key="another-secret-key"))
        proxy.wait_for_line("upstreams: changed keyed")
        script.resume.set()
        answer = pending.answered().finish()
    assert answer.status == 400
    assert UPSTREAM_KEY not in answer.body.decode() + proxy.output
    assert_books(proxy, account, credits=100)


def test_a_request_under_way_keeps_its_upstreams_and_their_addresses(
    running_proxy: MakeProxy, fake_upstream: Callable[..., FakeUpstream]
) -> None:
    """While its first upstream is asked, its second one moves and its model goes elsewhere, at another price."""
    found, moved = fake_upstream(), fake_upstream(Answers(tokens=7))
    pair = {"tier": "one", "upstream": ["main", "second"]}
    script = FailsWhenTold()
    proxy = running_proxy(upstreams={"second": {"base_url": found.url}}, models={"pair": pair}, behaviour=script)
    account = proxy.add_account(100)
    with proxy.client(account.key).start_chat(model="pair") as pending:
        proxy.upstream.next_exchange()
        edit_yaml(proxy.config, lambda config: config["upstreams"].update(second={"base_url": moved.url}))
        edit(proxy, {"pair": {"tier": "dear", "upstream": "second"}})
        wait_until(lambda: price(proxy, account, "pair") == 3.5, "the new price is listed", seconds=5)
        script.resume.set()
        answer = pending.answered().finish()
    assert (answer.status, answer.headers["x-credits-charged"]) == (200, "8")
    assert (len(found.posts), len(moved.posts)) == (1, 0)
    assert_books(proxy, account, credits=92)
    assert proxy.client(account.key).chat(model="pair").status == 200
    assert (len(found.posts), len(moved.posts)) == (1, 1), "the next request goes where the files say now"
    assert_books(proxy, account, credits=92 - 3.5 * 12)
