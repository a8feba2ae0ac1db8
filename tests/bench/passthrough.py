"""The yardstick: the least that a reverse proxy made of aiohttp can do. It checks, books and logs nothing.

    python tests/bench/passthrough.py PORT UPSTREAM_BASE_URL

The request's body is read whole and sent on; an answer of known length goes back in one piece, a stream as it comes,
one write for each read.
"""

import sys

import aiohttp
import uvloop
from aiohttp import web
from yarl import URL


async def relay(request: web.Request) -> web.StreamResponse:
    """Send the request on, and the answer back."""
    upstream: aiohttp.ClientSession = request.app["upstream"]
    headers = {"Content-Type": "application/json"}
    async with upstream.post(request.app["url"], data=await request.read(), headers=headers) as answer:
        if answer.content_length is not None:
            return web.Response(status=answer.status, body=await answer.read(), content_type=answer.content_type)
        response = web.StreamResponse(status=answer.status, headers={"Content-Type": answer.content_type})
        await response.prepare(request)
        async for read in answer.content.iter_any():
            await response.write(read)
        await response.write_eof()
        return response


async def health(request: web.Request) -> web.Response:
    """Answer at once: how late this comes is how long the loop was blocked."""
    return web.json_response({"status": "ok"})


async def build_app() -> web.Application:
    """Tie the two routes to one pooled session without limits or time-outs."""
    app = web.Application(client_max_size=64 * 1024**2)
    app["url"] = URL(sys.argv[2] + "/chat/completions")
    app["upstream"] = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        timeout=aiohttp.ClientTimeout(total=None),
    )
    app.router.add_post("/v1/chat/completions", relay)
    app.router.add_get("/health", health)
    return app


if __name__ == "__main__":
    uvloop.install()
    web.run_app(build_app(), host="127.0.0.1", port=int(sys.argv[1]), access_log=None, print=None, backlog=4096)
