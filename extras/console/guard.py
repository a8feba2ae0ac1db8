"""Who asks, from where and how often; what a page may do in a browser. Decides on headers alone."""

from __future__ import annotations

import collections
import ipaddress
import re
import time
from collections.abc import Mapping
from urllib.parse import quote, urlsplit

from aiohttp import web

POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; form-action 'self'; "
    "frame-ancestors 'none'; base-uri 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
}
KEPT_MAX = 10_000  # addresses that a limit remembers
DEFAULT_PORTS = {"http": 80, "https": 443}


def is_loopback(peer: str | None) -> bool:
    try:
        return peer is None or ipaddress.ip_address(peer.partition("%")[0]).is_loopback
    except ValueError:
        return False


def last_of(request: web.BaseRequest, header: str) -> str:
    """The last element of a header that each proxy on the way adds one to: what the nearest one says."""
    return ",".join(request.headers.getall(header, [])).rpartition(",")[2].strip()


def address_of(request: web.BaseRequest) -> str:
    """Who is limited: the peer, or whom a proxy on this machine speaks for; of an IPv6 address its /64."""
    address = (is_loopback(request.remote) and last_of(request, "X-Forwarded-For")) or request.remote or "local"
    try:
        found = ipaddress.ip_address(address.strip("[]").partition("%")[0])
    except ValueError:
        return address[:100]
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((found, 64), strict=False))
    return str(found)


def is_tls(request: web.BaseRequest, url: str | None) -> bool:
    """Whether the browser speaks TLS: config says so, or a proxy on this machine does."""
    forwarded = is_loopback(request.remote) and last_of(request, "X-Forwarded-Proto") == "https"
    return forwarded or (url is not None and url.startswith("https:"))


def cookie_name(tls: bool) -> str:
    return "__Host-session" if tls else "session"


def is_own(request: web.BaseRequest) -> bool:
    """Whether a form comes from a page of ours. A browser says so by itself; what is no browser must say it too."""
    if sites := request.headers.getall("Sec-Fetch-Site", []):
        return all(site in ("same-origin", "none") for site in sites)
    origins, hosts = request.headers.getall("Origin", []), request.headers.getall("Host", [])
    if len(origins) != 1 or len(hosts) != 1:
        return False
    try:
        origin = urlsplit(origins[0])
        default = DEFAULT_PORTS[origin.scheme]
        host = urlsplit(f"//{hosts[0]}")
        return (origin.hostname, origin.port or default) == (host.hostname, host.port or default)
    except (ValueError, KeyError):
        return False


def next_path(asked: str) -> str:
    """Where to go after signing in: a path of ours, and nothing that a browser could read as another host's."""
    if re.fullmatch(r"/(?![/\\])[^\x00-\x1f\x7f]*", asked):
        return quote(asked, safe="/?&=%:@!$'()*+,;~#")
    return "/dashboard"


def clean(text: str) -> str:
    """What came in a request line as a database and a page can hold it."""
    return text.encode(errors="replace").decode().replace("\0", "")


class Stop(Exception):
    """A page that says no, and why."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def page_not_found() -> Stop:
    return Stop(404, "There is no such page, or it is not for you. Are you signed in?")


class Limit:
    """At most `most` within `seconds`, for each of what is counted. Kept in memory: a restart forgets."""

    def __init__(self, most: int, seconds: float, what: str) -> None:
        self.most, self.seconds, self.what = most, seconds, what
        self.times: dict[object, collections.deque[float]] = {}

    def take(self, who: object) -> None:
        """Count one more. Stop 429 if that is too many."""
        now = time.monotonic()
        if len(self.times) >= KEPT_MAX:
            self.times = {key: times for key, times in self.times.items() if times[-1] > now - self.seconds}
        times = self.times.setdefault(who, collections.deque())
        while times and times[0] <= now - self.seconds:
            times.popleft()
        if len(times) >= self.most:
            wait = int(times[0] + self.seconds - now) + 1
            raise Stop(429, f"{self.what} Try again in {in_words(wait)}.", {"Retry-After": str(wait)})
        times.append(now)

    def give_back(self, who: object) -> None:
        """What was counted has turned out well."""
        if times := self.times.get(who):
            times.pop()
            if not times:
                del self.times[who]


def in_words(seconds: int) -> str:
    return f"{seconds} seconds" if seconds < 120 else f"{-(-seconds // 60)} minutes"
