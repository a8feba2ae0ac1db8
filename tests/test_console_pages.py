"""The pages that everybody sees, and what every answer has: headers, statuses, methods, configuration."""

import hashlib
import itertools
import re
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from extras.console import chart, config, docs, guard, passwords, show
from proxy import CODES, ConfigError, load_config
from tests.support.commands import run_program
from tests.support.console import CONSOLE, PASSWORD, Visitor, link_in, text, went_to
from tests.support.errors import assert_error
from tests.support.files import MODELS, write_files
from tests.support.process import RunningProxy

pytestmark = pytest.mark.long

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
PUBLIC = ["/", "/models", "/docs", "/register", "/login"]


@pytest.mark.parametrize("path", [*PUBLIC, "/nothing", "/admin", "/link/x", "/style.css"])
def test_every_answer_has_the_headers_that_keep_a_browser_safe(visitor: Visitor, path: str) -> None:
    headers = visitor.get(path).headers
    assert headers["content-security-policy"] == POLICY
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["server"] == "llm-proxy" and headers["x-request-id"].startswith("req_")
    assert headers["strict-transport-security"] is None


@pytest.mark.parametrize("path", PUBLIC)
def test_a_page_is_whole_html_without_scripts_or_styles_of_its_own(visitor: Visitor, path: str) -> None:
    page = text(visitor.get(path))
    assert page.startswith('<!doctype html>\n<html lang="en">') and page.rstrip().endswith("</html>")
    assert not re.search(
        r"<script(?! src=)|<style|\sstyle=|\son\w+=|https?://(?!127|pay\.example)[^\"]*\.(js|css)", page
    )
    assert len(re.findall(r"<h1[ >]", page)) == 1
    levels = [int(level) for level in re.findall(r"<h([1-6])[ >]", page)]
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels)), levels


def test_the_home_page_has_what_a_newcomer_pastes(site: RunningProxy, visitor: Visitor) -> None:
    page = text(visitor.get("/"))
    assert f"http://127.0.0.1:{site.port}/v1" in page and "1,000 free credits" in page
    for what in ("curl -N", "from openai import OpenAI", "import OpenAI from", "stream=True"):
        assert what in page
    visitor.register("homer")
    assert went_to(visitor.get("/")) == "/dashboard"


def test_a_hostile_host_is_not_shown(site: RunningProxy, visitor: Visitor) -> None:
    page = text(visitor.get("/", headers={"Host": 'x"><script>alert(1)</script>'}))
    assert "<script>alert" not in page and f"http://127.0.0.1:{site.port}/v1" in page


def test_models_are_listed_and_filtered(visitor: Visitor) -> None:
    page = text(visitor.get("/models"))
    assert "vendor/named:7b" in page and "nickname" in page and "1,500" in page
    assert "retiring" in page and "use" in page and "announced-later" in page
    assert page.count("retires 2") == 1  # before its announcement a deprecation is not shown
    filtered = text(visitor.get("/models?q=NICK"))
    assert "vendor/named:7b" in filtered and "gratis" not in filtered
    nothing = visitor.get("/models?q=%3Cscript%3Ealert(1)")
    assert nothing.status == 200 and "<script>alert" not in text(nothing)


def test_the_documentation_is_made_of_the_tables(visitor: Visitor) -> None:
    page = text(visitor.get("/docs"))
    assert all(f">{code}<" in page for code in CODES)
    assert "two-a-minute" in page and "POST /v1/chat/completions" in page
    assert docs.MEANINGS.keys() == CODES.keys()


def test_wrong_paths_and_methods(site: RunningProxy, visitor: Visitor) -> None:
    assert "<h1>Not found" in text(visitor.get("/nothing"))
    assert_error(site.client(None).get("/chat/completions"), 404, "not_found")
    assert_error(site.client(None).post("/chat/completions", {}, {"Sec-Fetch-Site": "same-origin"}), 404, "not_found")
    for method, path, allowed in (
        ("DELETE", "/login", "GET, HEAD, POST"),
        ("PUT", "/models", "GET, HEAD"),
        ("GET", "/logout", "POST"),
    ):
        answer = visitor.request(method, path)
        assert (answer.status, answer.headers["allow"]) == (405, allowed)
    head = visitor.request("HEAD", "/login")
    assert (head.status, head.body) == (200, b"")
    assert_error(site.client(None).get("/v1/models"), 401, "missing_api_key")
    assert site.client(None).get("/health").status == 200


def test_static_files_are_kept_by_their_version(visitor: Visitor) -> None:
    href = re.search(r'href="(/style\.css\?v=\w+)"', text(visitor.get("/")))
    assert href
    assert "immutable" in visitor.get(href[1]).headers["cache-control"]
    assert visitor.get("/style.css").headers["cache-control"] == "no-cache"
    assert visitor.get("/script.js").headers["content-type"].startswith("text/javascript")
    assert visitor.get("/icon.svg").headers["content-type"].startswith("image/svg+xml")


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"name=" + b"x" * 70_000, "application/x-www-form-urlencoded", 413),
        (b'{"name": "x"}', "application/json", 415),
        (b"name=%ff%fe&password=x", "application/x-www-form-urlencoded", 422),
        (b"\xff\xfe", "application/x-www-form-urlencoded", 400),
        (b"&".join(b"a%d=1" % n for n in range(60)), "application/x-www-form-urlencoded", 400),
        (b"name=a%00b&password=c%00d", "application/x-www-form-urlencoded", 422),
        (b"", "application/x-www-form-urlencoded", 422),
    ],
)
def test_a_form_that_is_none(site: RunningProxy, body: bytes, kind: str, status: int) -> None:
    headers = {"content-type": kind, "Sec-Fetch-Site": "same-origin"}
    assert site.client(None).post("/login", body, headers).status == status


@pytest.mark.parametrize("line", [b"/link/\xff", b"/login?next=/\xff", b"/models?q=\xff", b"/%ff%00", b"/link/%00"])
def test_bytes_that_are_no_text(site: RunningProxy, line: bytes) -> None:
    with socket.create_connection(("127.0.0.1", site.port)) as connection:
        connection.sendall(b"GET " + line + b" HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\nCookie: session=\xff\r\n")
        connection.sendall(b"Connection: close\r\n\r\n")
        assert re.match(rb"HTTP/1\.[01] (200|303|40[04]) ", connection.recv(100))


def test_too_many_passwords_at_once_are_refused(running_proxy: Callable[..., RunningProxy]) -> None:
    site = running_proxy({"console": CONSOLE})

    def attempt(number: int) -> int:
        return Visitor(site).login(f"crowd-{number}", PASSWORD).status

    with ThreadPoolExecutor(30) as crowd:
        statuses = list(crowd.map(attempt, range(30)))
    assert set(statuses) == {422, 503}
    assert statuses.count(422) >= 17


def test_the_first_start_shows_the_way_in(running_proxy: Callable[..., RunningProxy]) -> None:
    proxy = running_proxy({"console": {}})
    link = link_in(proxy.wait_for_line(r"/link/"))
    before = len(proxy.lines)
    proxy.restart()
    proxy.wait_for_line("account link owner", after=before)
    visitor = Visitor(proxy)
    assert went_to(visitor.post(link, password=PASSWORD)) == "/dashboard"
    assert visitor.get("/admin").status == 200
    before = len(proxy.lines)
    proxy.restart()
    assert "link" not in "\n".join(proxy.lines[before:])


def test_without_the_section_there_is_no_page(proxy: RunningProxy) -> None:
    assert_error(proxy.client(None).get("/login", {"Accept": "text/html"}), 404, "not_found")


MAIL = {"host": "127.0.0.1", "from": "llm@example.com"}


@pytest.mark.parametrize(
    ("console", "message"),
    [
        ({"registration": "maybe"}, r'console\.registration: unknown value "maybe"'),
        ({"registratoin": "open"}, r'console\.registratoin: unknown key.*"registration"'),
        ({"mail": MAIL}, r"console\.mail: needs console\.url"),
        ({"mail": MAIL, "url": ""}, r"console\.mail: needs console\.url"),
        ({"url": "https://a.example", "mail": {**MAIL, "port": -1}}, r"console\.mail\.port: expected"),
        ({"url": "https://a.example", "mail": {"host": "x"}}, r'console\.mail: the key "from" is missing'),
        ({"url": "https://a.example", "mail": {**MAIL, "tls": "ssl"}}, r'console\.mail\.tls: unknown value "ssl"'),
        ({"url": "https://a.example", "mail": {**MAIL, "prot": 1}}, r"console\.mail\.prot: unknown key"),
        ({"url": "llm.example.com"}, r"console\.url: expected a URL"),
        ({"packs": [{"name": "A"}]}, r"console\.packs\.0: the key .* is missing"),
        ({"packs": [{**CONSOLE["packs"][0], "link": "javascript:x"}]}, r"console\.packs\.0\.link: expected"),
        ({"packs": 5}, r"console\.packs: expected a list"),
        ("open", r"console: expected a mapping"),
    ],
)
def test_a_wrong_section_names_file_line_and_key(tmp_path: Path, console: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config.read(load_config(config_with(tmp_path, console)))
    assert re.search(rf"config\.yaml:\d+: {message}", str(error.value)), error.value


def test_a_wrong_section_keeps_the_server_from_starting(tmp_path: Path) -> None:
    ended = run_program(config_with(tmp_path, {"registration": "maybe"}), "serve")
    assert ended.returncode == 2 and "Traceback" not in ended.stderr
    assert "console.registration" in ended.stderr


def config_with(folder: Path, console: Any) -> Path:
    options = {"listen": "127.0.0.1:0", "default_tier": "one", "tiers": {"one": {}}, "console": console}
    return write_files(folder, {**options, "upstreams": {"echo": {"builtin": "echo"}}}, MODELS)


# ---- Parts that need no server


def test_a_password_is_as_slow_to_guess_as_owasp_asks_for() -> None:
    """Most tests' sites make it quick."""
    stored = passwords.hash_new(b"quiet")
    assert stored[16:] == hashlib.scrypt(b"quiet", salt=stored[:16], n=2**14, r=8, p=5, maxmem=2**26)
    assert passwords.matches(b"quiet", stored) and not passwords.matches(b"Quiet", stored)


def test_common_passwords_are_three_thousand() -> None:
    common = passwords.COMMON.read_text().split()
    assert len(set(common)) == 3000 and all(len(word) >= passwords.LENGTH_MIN for word in common)
    assert {"password", "12345678", "qwertyuiop", "password123"} <= set(common)


@pytest.mark.parametrize(
    ("asked", "path"),
    [
        ("/a", "/a"),
        ("/", "/"),
        ("//a", "/dashboard"),
        ("/\\a", "/dashboard"),
        ("a", "/dashboard"),
        ("/\xe9", "/%C3%A9"),
    ],
)
def test_next_path(asked: str, path: str) -> None:
    assert guard.next_path(asked) == path


def test_a_limit_lets_go_of_what_is_over() -> None:
    limit = guard.Limit(2, 0.05, "Too many.")
    limit.take("a")
    limit.take("a")
    limit.give_back("a")
    limit.take("a")
    with pytest.raises(guard.Stop):
        limit.take("a")
    limit.take("b")


def test_a_chart_of_nothing_and_of_something() -> None:
    day = __import__("datetime").date(2026, 3, 1)
    assert chart.draw({}, day, 30).most == 0
    drawn = chart.draw({"2026-03-01": 2000, "2026-02-28": 1, "2020-01-01": 9}, day, 7)
    assert (drawn.total, drawn.most, drawn.most_day, drawn.first) == (2001, 2000, "2026-03-01", "2026-02-23")
    assert all(0 <= bar.y <= 100 and bar.y + bar.height == 100 for bar in drawn.bars if bar.value)


def test_figures_look_the_same_everywhere() -> None:
    assert [show.credits(value) for value in (842_500, 1_000_000, 1, -95_500, 0)] == [
        "842.5",
        "1,000",
        "0.001",
        "-95.5",
        "0",
    ]
    assert show.time(0) == "1970-01-01 00:00 UTC"
    assert show.csv([["=a", 'b"c', "d\r\ne"]]) == '\'=a,"b""c","d\r\ne"\r\n'
