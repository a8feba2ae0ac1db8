"""The console: web pages for people, on the same address as the API. Off where config.yaml has no `console:`.

    config.py     its section of config.yaml          site.py      answers a request: guards it, finds its page
    people.py     its tables: who may sign in         pages.py     what everybody and who is signed in may see
    passwords.py  slow on purpose, one at a time      accounts.py  the forms of who is signed in
    guard.py      who asks, from where, how often     operator.py  the operator's pages
    mail.py       what it sends, when, and how often  docs.py      the API in words, from the core's own tables
    chart.py      credits a day, as SVG               show.py      how figures, times and names look

The core knows `mount`, and what that gives: `answer`, `packs` and `greeting`.
"""

from __future__ import annotations

import contextlib
from typing import Any

from proxy import Proxy, extra


async def mount(proxy: Proxy, stack: contextlib.AsyncExitStack) -> Any:
    """The console of a server that is about to listen; None where jinja2 is missing."""
    site = extra("console.site")
    return await site.open_site(proxy, stack) if site else None
