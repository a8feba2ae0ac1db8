"""GET /metrics: counters and gauges for Prometheus. Labels are the files' names and our own codes: bounded sets."""

from __future__ import annotations

import functools
import time
from functools import partial

import prometheus_client
from aiohttp import web

from proxy import Exchange, Proxy, Refusal

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


def mount(proxy: Proxy) -> None:
    proxy.metrics = Metrics(proxy)
    proxy.companions["/metrics"] = proxy.metrics.show


class Metrics:
    """What is counted of a running server."""

    def __init__(self, proxy: Proxy) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.proxy = proxy
        self.registry = prometheus_client.CollectorRegistry()
        counter = partial(prometheus_client.Counter, registry=self.registry)
        histogram = partial(prometheus_client.Histogram, registry=self.registry, buckets=SECONDS)
        self.requests = counter("proxy_requests", "Requests by outcome.", ("model", "upstream", "outcome"))
        self.prompt_tokens = counter("proxy_prompt_tokens", "Prompt tokens charged.", ("model",))
        self.completion_tokens = counter("proxy_completion_tokens", "Completion tokens charged.", ("model",))
        self.credits = counter("proxy_credits", "Credits charged.", ("model",))
        # Looked up once for each set of labels, since that costs more than counting.
        self.requests_by = functools.lru_cache(maxsize=None)(self.requests.labels)
        self.charged_by = functools.lru_cache(maxsize=None)(self.label_charged)
        self.first_byte = histogram("proxy_first_byte_seconds", "To the answer's first byte.")
        self.duration = histogram("proxy_duration_seconds", "To the answer's end.")
        self.failures = counter("proxy_upstream_failures", "Attempts that failed.", ("upstream", "code"))
        self.no_usage = counter("proxy_upstream_no_usage", "Answers charged by estimates.", ("upstream",))
        self.add_gauges(proxy)

    def add_gauges(self, proxy: Proxy) -> None:
        gauge = partial(prometheus_client.Gauge, registry=self.registry)
        gauge("proxy_open_requests", "Requests under way.").set_function(lambda: len(proxy.exchanges))
        gauge("proxy_kept_bytes", "Of large bodies and whole answers.").set_function(
            lambda: sum(exchange.memory for exchange in list(proxy.exchanges))
        )
        gauge("proxy_log_lines_dropped", "That could not be written yet.").set_function(lambda: proxy.log.dropped)
        gauge("proxy_ledger_transactions", "Transactions committed.").set_function(lambda: proxy.ledger.transactions)
        gauge("proxy_ledger_verbs", "Holds, settles and the like in them.").set_function(lambda: proxy.ledger.verbs)
        self.cooling = gauge("proxy_upstream_cooling", "1 while an upstream is skipped.", ("upstream",))

    def label_charged(self, model: str) -> list[prometheus_client.Counter]:
        return [counter.labels(model) for counter in (self.prompt_tokens, self.completion_tokens, self.credits)]

    def count(self, exchange: Exchange) -> None:
        """One request that has ended."""
        hold = exchange.hold
        model = exchange.model.name if exchange.model else ""
        self.requests_by(model, (hold.upstream or "") if hold else "", exchange.outcome).inc()
        if hold is None:
            return
        self.duration.observe(time.monotonic() - exchange.started)
        if exchange.first_byte_ms is not None:
            self.first_byte.observe(exchange.first_byte_ms / 1000)
        if hold.resolution and hold.resolution.bill and hold.settled:
            bill = hold.resolution.bill
            charged = (bill.prompt_tokens, bill.completion_tokens, hold.settled.charge / 1000)
            for counter, amount in zip(self.charged_by(model), charged, strict=True):
                counter.inc(amount)

    async def show(self, exchange: Exchange) -> web.StreamResponse:
        """For this machine only, unless config says otherwise; a proxy in front makes everybody look local."""
        request, who = exchange.request, self.proxy.config.metrics
        forwarded = "X-Forwarded-For" in request.headers or "Forwarded" in request.headers
        if who == "off":
            raise Refusal("not_found", "Metrics are off. Set `metrics` in config.yaml to turn them on.")
        if who == "loopback" and (forwarded or request.remote not in ("127.0.0.1", "::1", None)):
            raise Refusal("metrics_forbidden", "Metrics are for this machine only. See `metrics` in config.yaml.")
        now = time.monotonic()
        for name, upstream in self.proxy.config.upstreams.items():
            self.cooling.labels(name).set(upstream.state.cooling_until > now)
        exchange.status = 200
        headers = {**self.proxy.headers(exchange), "Content-Type": prometheus_client.CONTENT_TYPE_LATEST}
        return web.Response(body=prometheus_client.generate_latest(self.registry), headers=headers)
