"""The one shape of an error, as an answer and as the last event of a stream that broke."""

from typing import Any

from tests.support.client import Response
from tests.support.sse import event_data


def assert_error(answer: Response, status: int, code: str, type_: str | None = None) -> dict[str, Any]:
    """An answer in the one error shape."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"].startswith("application/json"), answer.headers.as_string()
    assert answer.headers["x-request-id"], answer.headers.as_string()
    error = answer.error
    assert set(error) >= {"message", "type", "param", "code", "status"}, error
    assert (error["code"], error["status"]) == (code, status), error
    assert isinstance(error["message"], str) and error["message"], error
    assert type_ is None or error["type"] == type_, error
    return error


def error_frame(answer: Response) -> dict[str, Any]:
    """The error event that ends a broken stream: last, whole, no [DONE], no clean end after it."""
    last = event_data(answer.events[-1])
    assert isinstance(last, dict) and isinstance(last.get("error"), dict), answer.body[-500:]
    assert b"[DONE]" not in answer.body, answer.body[-500:]
    assert not answer.clean, "a broken stream must not end cleanly"
    error = last["error"]
    assert set(error) >= {"message", "type", "param", "code", "status"}, error
    return dict(error)
