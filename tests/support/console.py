"""A visitor of the console: keeps cookies, sends forms as a browser does, and reads what came."""

import html
import http.cookies
import itertools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from tests.support.client import Client, Response
from tests.support.process import RunningProxy

PASSWORD = "quiet harbour lantern"
QUICK = """
import hashlib
real = hashlib.scrypt
hashlib.scrypt = lambda *arguments, n, **more: real(*arguments, n=n >> 7, **more)
"""
ADDRESSES = itertools.count(1)

CONSOLE: dict[str, Any] = {
    "registration": "open",
    "packs": [
        {
            "name": "Starter",
            "credits": 5000,
            "price": "2 KWD",
            "link": "https://pay.example.com/starter?client_reference_id={account}",
        }
    ],
}


def start_site(
    start: Callable[..., RunningProxy], folder: Path, console: Mapping[str, Any] = CONSOLE, **options: Any
) -> RunningProxy:
    """A console with free credits. It hashes a password in a millisecond: a site's tests set and try hundreds."""
    (folder / "sitecustomize.py").write_text(QUICK)
    options = {"free_credits": {"amount": 1000, "days": 30}, **options}
    return start({"console": console, **options}, environment={"PYTHONPATH": str(folder)})


class Visitor:
    """Somebody at a browser, at an address of their own."""

    def __init__(self, proxy: RunningProxy) -> None:
        self.proxy = proxy
        self.cookies: dict[str, str] = {}
        number = next(ADDRESSES)
        self.address = f"10.{number // 62500}.{number // 250 % 250}.{number % 250 + 1}"

    def request(
        self,
        method: str,
        path: str,
        form: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        origin: str | None = "own",
    ) -> Response:
        sent = {"X-Forwarded-For": self.address, "Accept": "text/html", **(headers or {})}
        if self.cookies:
            sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        if origin is not None and method == "POST":
            sent["Origin"] = f"http://127.0.0.1:{self.proxy.port}" if origin == "own" else origin
        body = None
        if form is not None:
            sent["content-type"] = "application/x-www-form-urlencoded"
            body = urlencode(form).encode()
        answer = Client(self.proxy.port, None).request(method, path, body, sent)
        for line in answer.headers.get_all("set-cookie", []):
            for name, morsel in http.cookies.SimpleCookie(line).items():
                if morsel.value:
                    self.cookies[name] = morsel.value
                else:
                    self.cookies.pop(name, None)
        return answer

    def get(self, path: str, **options: Any) -> Response:
        return self.request("GET", path, **options)

    def post(self, path: str, options: Mapping[str, Any] | None = None, **form: Any) -> Response:
        return self.request("POST", path, form, **(options or {}))

    def register(self, name: str, password: str = PASSWORD, **form: Any) -> Response:
        return self.post("/register", name=name, email=form.pop("email", ""), password=password, **form)

    def login(self, name: str, password: str = PASSWORD, **form: Any) -> Response:
        return self.post("/login", name=name, password=password, **form)

    def add_key(self, **form: Any) -> str:
        answer = self.post("/keys", **form)
        assert answer.status == 200, (answer.status, text(answer)[-2000:])
        return by_id(answer, "new-key")


def text(answer: Response) -> str:
    return answer.body.decode()


def by_id(answer: Response, name: str) -> str:
    """The text of the element with this id."""
    found = re.search(rf'<(\w+)[^>]*\bid="{name}"[^>]*>([^<]*)</\1>', text(answer))
    assert found, f"no element {name} in {text(answer)[:3000]}"
    return html.unescape(found[2])


def error_of(answer: Response, name: str) -> str:
    """What stands at a field that is wrong."""
    found = re.search(rf'<p class="error" id="{name}-note">([^<]*)</p>', text(answer))
    assert found, f"no error at {name} in {text(answer)}"
    return html.unescape(found[1])


def value_of(answer: Response, name: str) -> str:
    """What a field has in it."""
    found = re.search(rf'<input[^>]*\bname="{name}"[^>]*?\bvalue="([^"]*)"', text(answer))
    assert found, f"no field {name} in {text(answer)}"
    return html.unescape(found[1])


def went_to(answer: Response) -> str:
    assert answer.status == 303, (answer.status, text(answer)[-1500:])
    return str(answer.headers["location"])


def link_in(output: str) -> str:
    found = re.search(r"/link/[A-Za-z0-9_-]{43}", output)
    assert found, output
    return found[0]


def make_operator(proxy: RunningProxy, name: str) -> Visitor:
    """An operator who is signed in."""
    visitor = Visitor(proxy)
    made = proxy.run("account", "add", name, "--operator")
    assert made.returncode == 0, made.stderr
    link = link_in(proxy.run("account", "link", name).stdout)
    assert went_to(visitor.post(link, password=PASSWORD)) == "/dashboard"
    return visitor
