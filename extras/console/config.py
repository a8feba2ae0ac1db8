"""The section `console:` of config.yaml, complete and checked."""

from __future__ import annotations

from typing import Annotated, Any, Literal
from urllib.parse import quote, urlsplit

import msgspec

from proxy import Config, Thousandths, as_credits

ACCOUNT = "{account}"


class Pack(msgspec.Struct, frozen=True):
    """Credits that somebody sells: the console only shows where."""

    name: str
    credits: Thousandths
    price: str
    link: str

    def __post_init__(self) -> None:
        if self.credits <= 0:
            raise ValueError("credits: expected a number above zero")
        if not self.link.startswith(("https://", "http://")):
            raise ValueError('link: expected a URL that begins with "https://"')

    def described(self, account: str) -> dict[str, Any]:
        """As pages and the API show it to an account."""
        link = self.link.replace(ACCOUNT, quote(account, safe=""))
        return {"name": self.name, "credits": as_credits(self.credits), "price": self.price, "link": link}


class Mail(msgspec.Struct, frozen=True):
    """A mail server that takes what the console sends."""

    host: str
    sender: str = msgspec.field(name="from")  # which is a word of Python's
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 25
    user: str = ""
    password: str = ""
    tls: Literal["starttls", "tls", "none"] = "starttls"


class ConsoleConfig(msgspec.Struct, frozen=True, kw_only=True):
    registration: Literal["closed", "open"] = "closed"
    url: str | None = None
    packs: list[Any] = []
    mail: Mail | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.url or "http://localhost")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.path.strip("/") or parts.query:
            raise ValueError("url: expected a URL without a path, such as https://llm.example.com")
        if self.mail is not None and not self.url:
            raise ValueError("mail: needs console.url beside it: the links in mail are made of that alone")

    @property
    def is_open(self) -> bool:
        return self.registration == "open"


def read(config: Config) -> ConsoleConfig:
    """ConfigError says what is wrong, and where."""
    file, raw = config.file, config.console
    console = file.read(("console",), ConsoleConfig, raw)
    packs = [file.read(("console", "packs", str(n)), Pack, pack) for n, pack in enumerate(console.packs)]
    url = console.url.rstrip("/") if console.url else None
    return msgspec.structs.replace(console, url=url, packs=packs)
