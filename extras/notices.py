"""What the server says beyond what it must: a newcomer's first steps, models that retire, what a reload changed."""

from __future__ import annotations

from collections.abc import Iterator

from proxy import RELOADED, SUNSET_NOTICE_DAYS, Catalog, Config, as_credits

FIRST_STEPS = """Created the account "owner". Its key is shown this once; keep it:

    {key}

Try it with curl:

curl -N {url}/v1/chat/completions -H "Authorization: Bearer {key}" \\
  -H "Content-Type: application/json" \\
  -d '{{"model": "echo", "stream": true, "messages": [{{"role": "user", "content": "Hello, who pays for this?"}}]}}'

Or with Python (pip install openai):

from openai import OpenAI
client = OpenAI(base_url="{url}/v1", api_key="{key}")
messages = [{{"role": "user", "content": "Hello, who pays for this?"}}]
for chunk in client.chat.completions.create(model="echo", messages=messages, stream=True):
    print(chunk.choices[0].delta.content or "", end="", flush=True)
"""


def first_steps(url: str, key: str) -> str:
    """What a newcomer needs in the first minute; both snippets work as pasted."""
    return FIRST_STEPS.format(url=url, key=key)


def retiring(catalog: Catalog, now: float) -> Iterator[str]:
    """A line for each model that retires within 30 days, or has."""
    for model in catalog.models.values():
        if model.deprecated and model.deprecated.sunset_within(SUNSET_NOTICE_DAYS * 86400, now):
            verb = "retired" if model.deprecated.sunset_within(0, now) else "retires"
            instead = f"; use {model.deprecated.replacement}" if model.deprecated.replacement else ""
            yield f"model {model.name} {verb} on {model.deprecated.sunset}{instead}"


def changes(old: Config, new: Config, before: Catalog, after: Catalog) -> Iterator[str]:
    """A line for each model or upstream that a reload added, removed or changed, and for what takes a restart."""
    for what, was, now in (("models", before.models, after.models), ("upstreams", old.upstreams, new.upstreams)):
        yield from (f"{what}: added {name}" for name in now if name not in was)
        yield from (f"{what}: removed {name}" for name in was if name not in now)
    for name in sorted(old.upstreams.keys() & new.upstreams.keys()):
        if old.upstreams[name] != new.upstreams[name]:
            yield f"upstreams: changed {name}"
    for name in sorted(before.models.keys() & after.models.keys()):
        was_price, price = before.models[name].price, after.models[name].price
        if was_price != price:
            yield f"models: repriced {name} from {as_credits(was_price)} to {as_credits(price)}"
    for key in new.__struct_fields__:
        if key not in RELOADED and getattr(old, key) != getattr(new, key):
            yield f"{new.path}: {key} changed; that takes a restart"
