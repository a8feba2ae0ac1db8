"""What goes wrong in a storm: all that befalls each request, drawn from a seed, and the upstream's part of it."""

import asyncio
import json
import math
import random
from dataclasses import dataclass, field
from typing import Any

from tests.support.api_calls import CHAT
from tests.support.api_chaos import DIALECTS, NONSENSE, NONSENSE_TEXT, Tokens, dialect_of
from tests.support.exchange import Exchange

CLIENTS = 100
CLIENTS_EACH = 10  # of one account; their requests differ in length, so that each row is known by its estimate
SLICE = 20
PATIENCE_SECONDS = 0.5  # of the proxy with the upstream
GROWTH_MB = 12  # what memory may gain from the first third of a storm to its end


BEFORE_HEADERS = ("resets", "hangs up", "stalls", "400", "401", "429", "500", "503")
MIDWAY = ("resets", "breaks mid event", "hangs up", "ends", "stalls", "fails", "talks nonsense")
MANNERS = ("reads",) * 11 + ("reads slowly", "stalls", "leaves", "leaves", "leaves at once")


def estimate(texts: list[str]) -> int:
    """SPEC section 5's count of an answer: the larger of events with content and their bytes / 4."""
    texts = [text for text in texts if text]
    return max(len(texts), math.ceil(sum(len(text.encode()) for text in texts) / 4))


class Plan:
    """One request and all that befalls it, drawn from the seed and its number alone."""

    def __init__(self, seed: str, name: str) -> None:
        number = int(name[:-2])  # of the account's request; the last two digits are the account's
        draw = random.Random(f"{seed}/{name}")
        self.draw, self.name = draw, name
        self.content = name.ljust(8 + 4 * number, "x")
        self.estimate = 6 + number
        self.stream = draw.random() < 0.85
        self.wants_usage = draw.random() < 0.5
        self.model = draw.choice(("plain", "plain", "pair"))
        self.dialect = draw.choice(DIALECTS)
        self.maximum = draw.choice((None, 5, 50, 5000))
        self.manner = draw.choice(MANNERS)
        self.patience = draw.randrange(3000)  # bytes, of a client that stalls or leaves
        # The upstream's part.
        size = draw.choice((0, 1, 5, 30, 30, 30, 200))
        self.words = ["w" * draw.choice((1, 4, 4, 4, 9)) for _ in range(size)]
        self.prompt_tokens = draw.randrange(1, 2 * self.estimate)
        self.usage = draw.choice(self.dialect.usages)
        self.newline = draw.choice((b"\n", b"\n", b"\r\n", b"\r"))
        self.padding = "p" * draw.choice((0, 0, 0, 4000))
        self.deaf = draw.random() < 0.1  # to the maximum
        self.fails_first = draw.choice(BEFORE_HEADERS) if draw.random() < 0.12 else None
        self.fails_midway = draw.choice(MIDWAY) if draw.random() < 0.25 else None
        self.fails_at = draw.randrange(size + 1)

    @property
    def request(self) -> dict[str, Any]:
        options: dict[str, Any] = {"stream": True} if self.stream else {}
        if self.stream and self.wants_usage and self.dialect.path == CHAT:
            options["stream_options"] = {"include_usage": True}
        if self.maximum:
            options[self.dialect.bound] = self.maximum
        return self.dialect.request(self.content, self.model, **options)


# --------------------------------------------------------------------------------------------------
# The upstream's side


@dataclass
class Sent:
    """What an upstream sent in answer to one request."""

    texts: list[str] = field(default_factory=list)
    said: list[int] = field(default_factory=list)  # completion tokens, as usage named them


class Chaos:
    """An upstream that does what the plan of each request says; `calm` ones answer all requests well."""

    def __init__(self, seed: str, sent: dict[str, list[Sent]], calm: bool = False) -> None:
        self.seed, self.sent, self.calm = seed, sent, calm

    async def __call__(self, exchange: Exchange) -> None:
        plan = Plan(self.seed, dialect_of(exchange.path).content(exchange.json)[:8])
        self.sent[plan.name].append(sent := Sent())
        if plan.fails_first and not self.calm:
            await self.fail(exchange, plan.fails_first)
        elif exchange.is_stream and plan.draw.random() < 0.97:
            await self.stream(exchange, plan, sent)
        else:
            await self.answer(exchange, plan, sent)

    async def fail(self, exchange: Exchange, how: str) -> None:
        if how.isdecimal():
            await exchange.answer({"error": {"message": "no", "type": "t"}}, int(how), headers={"retry-after": "1"})
        elif how == "resets":
            exchange.reset()
        elif how == "stalls":
            await exchange.stall()

    def words(self, exchange: Exchange, plan: Plan) -> list[str]:
        """Those that the maximum, which the proxy may have lowered, allows."""
        return plan.words if plan.deaf else plan.words[: exchange.json.get(plan.dialect.bound)]

    def tokens(self, plan: Plan, sent: Sent, usage: bool) -> Tokens:
        """What a usage says now, if there is one."""
        if usage:
            sent.said.append(len(sent.texts))
        return (plan.prompt_tokens, len(sent.texts)) if usage else None

    def encode(self, plan: Plan, events: list[Any]) -> bytes:
        padded = [{**event, "padding": plan.padding} if isinstance(event, dict) else event for event in events]
        return b"".join(plan.dialect.encode(event, plan.newline) for event in padded)

    async def stream(self, exchange: Exchange, plan: Plan, sent: Sent) -> None:
        fails = None if self.calm else plan.fails_midway
        await exchange.head()
        waiting = self.encode(plan, plan.dialect.opening(self.tokens(plan, sent, plan.usage != "none")))
        for number, word in enumerate(self.words(exchange, plan)):
            if fails and number == plan.fails_at:
                await exchange.send(waiting + b": so far\n\n")
                await self.fail_midway(exchange, plan, sent, fails)
                return
            sent.texts.append(word)
            tokens = self.tokens(plan, sent, plan.usage == "every")
            waiting += self.encode(plan, [plan.dialect.word(word, tokens)])
            if plan.draw.random() < 0.4:
                edge = plan.draw.randrange(len(waiting))
                await exchange.send(waiting[: edge + 1])
                waiting = waiting[edge + 1 :]
                await asyncio.sleep(plan.draw.choice((0, 0, 0.001, 0.02)))
        await self.close(exchange, plan, sent, waiting)

    async def fail_midway(self, exchange: Exchange, plan: Plan, sent: Sent, how: str) -> None:
        if how == "breaks mid event":
            await exchange.send(self.encode(plan, [plan.dialect.word("lost", None)])[:-20])
        elif how == "fails":
            await exchange.send(plan.dialect.failure)
            await exchange.end()
        elif how == "talks nonsense":
            sent.texts.append(NONSENSE_TEXT)
            await exchange.send(NONSENSE + b"\n\ndata: \n\nwhat\n\n")
            await exchange.end()
        elif how == "ends":
            await exchange.end()
        else:
            await self.fail(exchange, how)

    async def close(self, exchange: Exchange, plan: Plan, sent: Sent, waiting: bytes) -> None:
        """Finish reason, usage and, mostly, the end itself."""
        *events, end = plan.dialect.closing(plan.usage, self.tokens(plan, sent, plan.usage != "none"))
        if plan.draw.random() < 0.9:
            events.append(end)
        await exchange.send(waiting + self.encode(plan, events))
        await exchange.end()

    async def answer(self, exchange: Exchange, plan: Plan, sent: Sent) -> None:
        """Not streamed: an answer, or the beginning of one."""
        words = self.words(exchange, plan)
        sent.texts.append("".join(words))
        tokens = (plan.prompt_tokens, len(words)) if plan.usage != "none" else None
        sent.said += [len(words)] if tokens else []
        body = json.dumps(plan.dialect.whole(sent.texts[0], tokens)).encode()
        if plan.fails_midway and not self.calm:
            await exchange.head(content_type="application/json", length=len(body) + 9)
            await exchange.send(body)
            return
        await exchange.answer(body)
