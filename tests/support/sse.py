"""Server-sent events: writing them, and taking a body apart as a client does."""

import json
import re
from typing import Any


def split_events(body: bytes) -> list[bytes]:
    """The events of a body, each with its line ends, for any of the three line ends."""
    return [match.group() for match in re.finditer(rb".+?(?:\r\n\r\n|\n\n|\r\r|\Z)", body, re.DOTALL)]


def event_data(event: bytes) -> Any:
    """What an event carries: decoded JSON, `"[DONE]"`, or None for a comment."""
    lines = [line[5:].strip() for line in re.split(rb"\r\n|\n|\r", event) if line.startswith(b"data:")]
    if not lines:
        return None
    data = b"\n".join(lines)
    return "[DONE]" if data == b"[DONE]" else json.loads(data)


def sse(data: Any, newline: bytes = b"\n") -> bytes:
    encoded = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode()
    return b"data: " + encoded + newline * 2
