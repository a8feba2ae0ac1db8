"""The console in a real browser: a newcomer's way, the operator's round, every page at two widths, what axe finds."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.console import CONSOLE, PASSWORD, Visitor, make_operator
from tests.support.process import RunningProxy

pytestmark = pytest.mark.browser
sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("there is no chromium", allow_module_level=True)

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PUBLIC = ["/", "/models", "/docs", "/register", "/login", "/link/x", "/nothing"]
PRIVATE = ["/dashboard", "/keys", "/usage", "/requests", "/billing", "/settings"]
ADMIN = ["/admin", "/admin/accounts/browser-operator", "/admin/requests", "/admin/audit"]
WIDE = "document.documentElement.scrollWidth > document.documentElement.clientWidth"
LONG = "W" * 64
complaints: list[str] = []  # of the browser, about any page


@pytest.fixture(scope="module")
def site(module_proxy: Callable[..., RunningProxy]) -> RunningProxy:
    proxy = module_proxy({"console": CONSOLE, "free_credits": {"amount": 1000, "days": 30}})
    long = Visitor(proxy)
    long.register(LONG)
    for label in ("W" * 100, "\N{ARABIC LETTER AIN} \N{PILE OF POO}" * 20):
        assert proxy.client(long.add_key(label=label)).chat("hi", model="retiring").status == 200
    return proxy


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def operator(site: RunningProxy) -> Visitor:
    visitor = make_operator(site, "browser-operator")
    assert site.client(visitor.add_key(label="laptop")).chat("one two three", model="echo").status == 200
    return visitor


def new_page(browser: Any, site: RunningProxy, visitor: Visitor | None = None, **options: Any) -> Any:
    """A page whose errors fail the test, signed in as `visitor`."""
    context = browser.new_context(base_url=site.base_url, **options)
    if visitor is not None:
        for name, value in visitor.cookies.items():
            context.add_cookies([{"name": name, "value": value, "url": site.base_url}])
    page = context.new_page()
    page.set_default_timeout(10_000)
    page.on("pageerror", lambda error: pytest.fail(f"a script failed: {error}"))
    page.on("console", lambda message: complaints.append(message.text))
    return page


@pytest.mark.parametrize("script", [True, False])
def test_a_newcomer_registers_and_calls_and_revokes(browser: Any, site: RunningProxy, script: bool) -> None:
    page = new_page(browser, site, java_script_enabled=script)
    page.goto("/")
    page.click("text=Register, with 1,000 free credits")
    page.fill("#name", f"newcomer-{script}")
    page.fill("#password", PASSWORD)
    page.click("text=Make the account")
    page.wait_for_url("**/dashboard")
    assert page.text_content("#credits") == "1,000"
    page.click("text=Make a key")
    page.fill("#label", "from the browser")
    page.click("button:has-text('Make the key')")
    key = page.text_content("#new-key")

    with site.openai(key) as client:
        messages: Any = [{"role": "user", "content": "one two three"}]
        chunks = list(client.chat.completions.create(model="echo", messages=messages, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "one two three"
        page.goto("/dashboard")
        assert page.text_content("#credits") == "994"
        assert page.locator("table.requests tbody tr").count() == 1
        page.goto("/keys")
        page.click("text=Revoke")
        page.click("button.danger")
        page.wait_for_url("**/keys")
        assert page.locator("text=revoked").count() >= 1
        with pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="echo", messages=messages)
    page.click("text=Sign out")
    page.goto("/dashboard")
    assert "/login?next=" in page.url
    page.context.close()


def test_reloading_and_clicking_twice_make_one_key(browser: Any, site: RunningProxy) -> None:
    page = new_page(browser, site)
    page.goto("/register")
    page.fill("#name", "double")
    page.fill("#password", PASSWORD)
    page.dblclick("text=Make the account")
    page.wait_for_url("**/dashboard")
    page.goto("/keys")
    page.fill("#label", "once")
    page.dblclick("button:has-text('Make the key')")
    key = page.text_content("#new-key")
    page.reload()
    assert page.text_content("#new-key") == key
    assert len(site.command("key", "list", "double")) == 1
    page.context.close()


def test_the_operators_round(browser: Any, site: RunningProxy, operator: Visitor) -> None:
    page = new_page(browser, site, operator)
    page.goto("/admin")
    page.fill("#name", "made-by-hand")
    page.select_option("#tier", "two-keys")
    page.click("button:has-text('Make the account')")
    link = page.text_content("#new-link")
    page.fill("#amount", "250")
    page.fill("#ref", "order-7")
    page.click("button:has-text('Add')")
    assert page.text_content("#credits") == "1,250"
    page.click("text=Suspend")
    page.click("button.danger")
    page.wait_for_load_state()
    assert site.account("made-by-hand")["status"] == "suspended"
    page.click("button:has-text('Resume')")
    page.wait_for_load_state()
    page.goto("/admin/audit")
    assert page.locator("text=The books add up").count() == 1
    page.context.close()

    owner = new_page(browser, site)
    owner.goto(link)
    owner.fill("#password", PASSWORD)
    owner.click("text=Set it and sign in")
    owner.wait_for_url("**/dashboard")
    assert owner.text_content("#credits") == "1,250"
    owner.context.close()


@pytest.mark.parametrize("script", [True, False])
@pytest.mark.parametrize("width", [360, 1280])
def test_no_page_is_wider_than_the_window(
    browser: Any, site: RunningProxy, operator: Visitor, width: int, script: bool
) -> None:
    long = Visitor(site)
    long.login(LONG)
    options: Any = {"viewport": {"width": width, "height": 800}, "java_script_enabled": script}
    for visitor, paths in ((None, PUBLIC), (long, PRIVATE), (operator, [*ADMIN, f"/admin/accounts/{LONG}"])):
        page = new_page(browser, site, visitor, **options)
        for path in paths:
            page.goto(path)
            assert not page.evaluate(WIDE), (path, width, script)
        page.context.close()
    assert not [text for text in complaints if "Content Security Policy" in text], complaints


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Any, site: RunningProxy, operator: Visitor, scheme: str) -> None:
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-playwright-python is not installed")
    axe = Path(found.origin).with_name("axe.min.js").read_text(encoding="utf-8")
    problems = []
    for visitor, paths in ((None, PUBLIC), (operator, [*PRIVATE, *ADMIN])):
        page = new_page(browser, site, visitor, color_scheme=scheme)
        for path in paths:
            page.goto(path)
            page.evaluate(axe)
            for violation in page.evaluate("axe.run()")["violations"]:
                if violation["impact"] in ("serious", "critical"):
                    nodes = [node["html"][:150] for node in violation["nodes"]][:3]
                    problems.append((path, violation["id"], nodes))
        page.context.close()
    assert not problems, problems


def test_keyboard_reaches_what_is_there_and_the_focus_shows(browser: Any, site: RunningProxy) -> None:
    page = new_page(browser, site)
    page.goto("/login")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    for _ in range(12):
        page.keyboard.press("Tab")
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        if page.evaluate("document.activeElement === document.body"):
            break
        assert shown == "solid"
    page.context.close()
