"""Requests of the Responses and the Messages API, and what is asserted of their answers and errors."""

from dataclasses import dataclass
from typing import Any

from tests.support.client import QUESTION, Client, Response
from tests.support.errors import assert_error
from tests.support.sse import event_data

ASKED = [{"role": "user", "content": QUESTION}]  # estimated at QUESTION_ESTIMATE in both
MESSAGES, RESPONSES, CHAT = "/v1/messages", "/v1/responses", "/v1/chat/completions"
TYPES = {  # of an error of the Messages API, by status
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
BREAKS = {"upstream_error": 502, "upstream_timeout": 504, "insufficient_credits": 402, "shutting_down": 503}


def messages_request(content: Any = QUESTION, model: str = "plain", **members: Any) -> dict[str, Any]:
    return {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": content}], **members}


def responses_request(content: Any = QUESTION, model: str = "plain", **members: Any) -> dict[str, Any]:
    return {"model": model, "input": [{"role": "user", "content": content}], **members}


@dataclass(frozen=True)
class Api:
    """One of the two: how it is asked, and how its errors look."""

    path: str
    bound: str  # the member that bounds its answer

    def request(self, content: Any = QUESTION, model: str = "plain", **members: Any) -> dict[str, Any]:
        make = messages_request if self.path == MESSAGES else responses_request
        return make(content, model, **members)

    def ask(self, client: Client, **members: Any) -> Response:
        return client.post(self.path, self.request(**members))

    def assert_refused(self, answer: Response, status: int, code: str) -> dict[str, Any]:
        """The error in this API's shape; what stands beside its message."""
        if self.path != MESSAGES:
            return {**assert_error(answer, status, code), **answer.json()}
        return assert_messages_error(answer, status, code)

    def broken_off(self, answer: Response) -> str:
        """The code of the error event that ends a broken stream: last, whole, and no clean end after it."""
        return messages_break(answer) if self.path == MESSAGES else responses_break(answer)


MESSAGES_API, RESPONSES_API = Api(MESSAGES, "max_tokens"), Api(RESPONSES, "max_output_tokens")
BOTH = [MESSAGES_API, RESPONSES_API]


def messages_type(status: int) -> str:
    return TYPES.get(status) or ("api_error" if status >= 500 else "invalid_request_error")


def assert_messages_error(answer: Response, status: int, code: str | None = None) -> dict[str, Any]:
    """An error in the shape of the Messages API; its details."""
    assert answer.status == status, (answer.status, answer.body)
    assert answer.headers["content-type"].startswith("application/json"), answer.headers.as_string()
    body = answer.json()
    assert set(body) == {"type", "error", "request_id"} and body["type"] == "error", body
    assert body["request_id"] == answer.headers["x-request-id"] == answer.headers["request-id"], body
    return messages_details(body["error"], status, code)


def messages_details(error: dict[str, Any], status: int, code: str | None = None) -> dict[str, Any]:
    assert set(error) == {"type", "message", "details"}, error
    assert error["type"] == messages_type(status), error
    assert isinstance(error["message"], str) and error["message"], error
    details = error["details"]
    assert isinstance(details["error_code"], str), error
    assert code is None or details["error_code"] == code, error
    return dict(details)


def last_event(answer: Response) -> tuple[bytes, dict[str, Any]]:
    """The line that names the last event, and what it carries."""
    event = answer.events[-1]
    data = event_data(event)
    assert isinstance(data, dict), answer.body[-500:]
    return event.splitlines()[0], data


def messages_break(answer: Response) -> str:
    name, data = last_event(answer)
    assert name == b"event: error" and data["type"] == "error", answer.body[-500:]
    assert data["request_id"] == answer.headers["x-request-id"]
    assert b"message_stop" not in answer.body and not answer.clean, "a broken stream must not look whole"
    code: str = data["error"]["details"]["error_code"]
    messages_details(data["error"], BREAKS[code])
    return code


def responses_break(answer: Response) -> str:
    name, data = last_event(answer)
    assert name == b"event: error" and data["type"] == "error", answer.body[-500:]
    assert set(data["error"]) >= {"message", "type", "param", "code", "status"}, data
    assert not answer.clean, "a broken stream must not end cleanly"
    for closing in (b"response.completed", b"response.incomplete", b"response.failed"):
        assert closing not in answer.body, "a broken stream must not look whole"
    code = str(data["error"]["code"])
    assert data["error"]["status"] == BREAKS[code], data
    return code
