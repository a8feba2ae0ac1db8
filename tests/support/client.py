"""A plain HTTP client that sees the wire: whether an answer ended cleanly, and what came before it broke."""

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tests.support.sse import event_data, split_events
from tests.support.waiting import WAIT_SECONDS

QUESTION = "Say three words"  # 15 bytes: the estimate E of this prompt is ceil(15 / 4 + 4) = 8
QUESTION_ESTIMATE = 8


@dataclass
class Response:
    """An answer that was read to its end, clean or not."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes
    clean: bool  # ended as HTTP says; False: the connection broke off

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error = self.json()["error"]
        assert isinstance(error, dict), self.body
        return error

    @property
    def events(self) -> list[bytes]:
        return split_events(self.body)

    @property
    def chunks(self) -> list[Any]:
        """What the events carry, without comments."""
        return [data for data in map(event_data, self.events) if data is not None]

    @property
    def words(self) -> int:
        """Events that bear text."""
        return count_words(self.chunks)


def count_words(chunks: list[Any]) -> int:
    choices = [choice for chunk in chunks if isinstance(chunk, dict) for choice in chunk.get("choices") or []]
    return sum(1 for choice in choices if choice.get("text") or choice.get("delta", {}).get("content"))


class Pending:
    """A request that was sent and is not answered yet."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def leave(self) -> None:
        """Hang up."""
        self._connection.close()

    def answered(self) -> "Stream":
        """Wait for status and headers."""
        try:
            return Stream(self._connection, self._connection.getresponse())
        except BaseException:
            self._connection.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Stream:
    """An answer that is read as it comes."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self._connection, self._response = connection, response
        self.status, self.headers = response.status, response.headers
        self.received = bytearray()
        self.clean: bool | None = None  # known once the end was reached

    def read_some(self) -> bool:
        """Read what is there, at least a byte; False at the end."""
        try:
            data = self._response.read1(65536)
        except (http.client.IncompleteRead, ConnectionError):
            self.clean = False
            return False
        self.received += data
        if not data:
            self.clean = self.clean is None and not (self._response.length or 0)
        return bool(data)

    def read_until(self, marker: bytes, times: int = 1) -> bytes:
        """Read until the marker has come this many times."""
        while self.received.count(marker) < times:
            assert self.read_some(), f"ended before {marker!r}: {bytes(self.received)!r}"
        return bytes(self.received)

    def finish(self) -> Response:
        """Read the rest."""
        while self.read_some():
            pass
        self.leave()
        return Response(self.status, self.headers, bytes(self.received), bool(self.clean))

    def leave(self) -> None:
        """Hang up."""
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.leave()


class Client:
    """Speaks to the proxy with a key (None: without one); a connection a request."""

    def __init__(self, port: int, key: str | None) -> None:
        self.port, self.key = port, key

    def send(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Pending:
        """Send a request: a body of bytes as it is, anything else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT_SECONDS)
        sent = {"content-type": "application/json"} if body is not None else {}
        if self.key is not None:
            sent["authorization"] = f"Bearer {self.key}"
        encoded = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, encoded, {**sent, **(headers or {})})
        except (BrokenPipeError, ConnectionResetError):
            pass  # refused before the whole body was sent; the answer may still be there
        except BaseException:
            connection.close()
            raise
        return Pending(connection)

    def request(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Response:
        return self.send(method, path, body, headers).answered().finish()

    def get(self, path: str, headers: Mapping[str, str] | None = None) -> Response:
        return self.request("GET", path, None, headers)

    def post(self, path: str, body: Any, headers: Mapping[str, str] | None = None) -> Response:
        return self.request("POST", path, body, headers)

    def chat(self, content: str = QUESTION, model: str = "plain", **members: Any) -> Response:
        return self.post("/v1/chat/completions", chat_request(content, model, **members))

    def completion(self, prompt: Any = QUESTION, model: str = "plain", **members: Any) -> Response:
        return self.post("/v1/completions", {"model": model, "prompt": prompt, **members})

    def start_chat(self, content: str = QUESTION, model: str = "plain", **members: Any) -> Pending:
        return self.send("POST", "/v1/chat/completions", chat_request(content, model, **members))

    def stream_chat(self, content: str = QUESTION, model: str = "plain", **members: Any) -> Stream:
        """Start a streamed chat; returns when its status is here."""
        return self.start_chat(content, model, stream=True, **members).answered()

    @property
    def balance(self) -> float:
        """The credits, as the API shows them."""
        credits_ = self.get("/api/billing/subscription").json()["credits"]
        assert isinstance(credits_, int | float)
        return credits_


def chat_request(content: str = QUESTION, model: str = "plain", **members: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": content}], **members}
