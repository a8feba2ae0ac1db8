"""Mail, against a real SMTP server: deprecations and password links, at least once, whatever the server does."""

import email
import email.policy
from collections.abc import Callable, Iterator
from datetime import timedelta
from email.message import EmailMessage
from typing import Any

import pytest

from tests.support.console import CONSOLE, PASSWORD, Visitor, link_in, start_site, text, went_to
from tests.support.files import TODAY, catalog, write_yaml
from tests.support.process import RunningProxy
from tests.support.waiting import wait_until

pytestmark = pytest.mark.long

smtp = pytest.importorskip("aiosmtpd.controller")


class Postbox:
    """Keeps what comes; refuses the first `refusals`."""

    def __init__(self) -> None:
        self.messages: list[EmailMessage] = []
        self.refusals = 0

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802
        if self.refusals:
            self.refusals -= 1
            return "451 Try again later"
        parsed = email.message_from_bytes(envelope.content, policy=email.policy.default)
        assert isinstance(parsed, EmailMessage)
        self.messages.append(parsed)
        return "250 OK"

    def to(self, address: str, subject: str = "") -> list[EmailMessage]:
        return [m for m in self.messages if m["To"] == address and subject in m["Subject"]]


@pytest.fixture(scope="module")
def postbox() -> Iterator[tuple[Postbox, int]]:
    box = Postbox()
    controller = smtp.Controller(box, hostname="127.0.0.1", port=0)
    controller.port = free_port()
    controller.start()
    yield box, controller.port
    controller.stop()


def free_port() -> int:
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="module")
def site(
    module_proxy: Callable[..., RunningProxy], tmp_path_factory: pytest.TempPathFactory, postbox: tuple[Postbox, int]
) -> RunningProxy:
    mail = {"host": "127.0.0.1", "port": postbox[1], "from": "llm@example.com", "tls": "none"}
    console = {**CONSOLE, "url": "http://llm.example.com", "mail": mail}
    return start_site(module_proxy, tmp_path_factory.mktemp("site"), console)


def body(message: EmailMessage) -> str:
    return str(message.get_content())


def test_who_forgot_a_password_is_sent_a_link_three_times_an_hour(
    site: RunningProxy, postbox: tuple[Postbox, int]
) -> None:
    box, _ = postbox
    visitor = Visitor(site)
    visitor.register("forgetful", email="forgetful@example.com")
    visitor.cookies.clear()
    answers = [
        visitor.post("/forgot", name=name) for name in ("forgetful", "nobody", "forgetful", "forgetful", "forgetful")
    ]
    assert {went_to(answer) for answer in answers} == {"/forgot?sent=1"}
    assert len({text(answer) for answer in answers}) == 1
    wait_until(lambda: len(box.to("forgetful@example.com")) >= 3, "three links come")
    assert visitor.post("/forgot", name="forgetful").status == 303
    messages = box.to("forgetful@example.com")
    assert len(messages) == 3
    links = [link_in(body(message)) for message in messages]
    assert all(f"http://llm.example.com{link}" in body(m) for link, m in zip(links, messages, strict=True))
    assert [visitor.get(link).status for link in links] == [404, 404, 200]
    assert went_to(visitor.post(links[-1], password="remembered now")) == "/dashboard"


def test_a_deprecation_is_mailed_once_to_who_called_the_model(site: RunningProxy, postbox: tuple[Postbox, int]) -> None:
    box, _ = postbox
    users = {name: Visitor(site) for name in ("caller", "bystander", "no-address")}
    for name, visitor in users.items():
        visitor.register(name, email="" if name == "no-address" else f"{name}@example.com")
    for name in ("caller", "no-address"):
        assert site.client(users[name].add_key()).chat("hi", model="plain").status == 200
    box.refusals = 1  # it is tried again
    sunset = TODAY + timedelta(days=60)
    models: dict[str, dict[str, Any]] = {
        "echo": {"tier": "one", "upstream": "echo"},
        "half": {"tier": "half", "upstream": "main"},
        "plain": {
            "tier": "one",
            "upstream": "main",
            "deprecated": {"announced": TODAY - timedelta(days=1), "sunset": sunset, "replacement": "half"},
        },
    }
    write_yaml(site.folder / "models.yaml", catalog(models))
    wait_until(lambda: box.to("caller@example.com"), "the announcement comes")
    (message,) = box.to("caller@example.com")
    assert str(sunset) in message["Subject"] and "Use half instead" in body(message)
    assert "http://llm.example.com/models" in body(message)
    seen = len(site.lines)
    models["half"]["tier"] = "one"
    write_yaml(site.folder / "models.yaml", catalog(models))
    site.wait_for_line("repriced half", after=seen)
    site.restart()
    assert "plain</b> retires" in text(users["caller"].get("/dashboard"))
    assert len(box.to("caller@example.com")) == 1
    assert not box.to("bystander@example.com")


def test_a_mail_server_that_is_away_loses_nothing(running_proxy: Callable[..., RunningProxy]) -> None:
    port, box = free_port(), Postbox()
    mail = {"host": "127.0.0.1", "port": port, "from": "LLM <llm@example.com>", "tls": "none"}
    proxy = running_proxy({"console": {**CONSOLE, "url": "http://llm.example.com", "mail": mail}})
    visitor = Visitor(proxy)
    visitor.register("patient", email="patient@example.com")
    assert visitor.post("/forgot", name="patient").status == 303
    proxy.wait_for_line("mail cannot be sent")
    controller = smtp.Controller(box, hostname="127.0.0.1", port=port)
    controller.start()
    try:
        wait_until(lambda: box.to("patient@example.com", "password"), "the link comes")
        assert Visitor(proxy).post(link_in(body(box.messages[0])), password=PASSWORD).status == 303
    finally:
        controller.stop()
