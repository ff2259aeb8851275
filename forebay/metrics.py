"""What is counted, under the names of the contract, in this process's own Prometheus registry.

Bounded: label values come from the configuration (models, deployments) or are folded into `other`
(tenants beyond TENANTS_MAX), so that no client can mint time series.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from actors.ref import OwnerRef

TENANTS_MAX = 200
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
OVERHEAD_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)


class _Stored(Collector):
    """What is in the cache, as its owners told it last; nothing while they are away."""

    def __init__(self) -> None:
        self.told: Mapping[str, int] | None = None

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        told = self.told
        if told is None:
            return
        yield GaugeMetricFamily("forebay_cache_entries", "Answers stored.", told["entries"])
        yield GaugeMetricFamily("forebay_cache_bytes", "Memory that they take.", told["bytes"])
        words = "Answers that gave way."
        yield CounterMetricFamily("forebay_cache_evictions", words, told["evicted"])


class PromptCache(Collector):
    """What providers reported of their prompt caches to this process; `told` has its figures."""

    def __init__(self, told: Callable[[], Mapping[str, Any]]) -> None:
        self._told = told

    def collect(self) -> Iterator[CounterMetricFamily | GaugeMetricFamily]:
        told = self._told()
        tokens = CounterMetricFamily(
            "forebay_prompt_cache_tokens",
            "Prompt tokens that providers read from their caches, or wrote there.",
            labels=["kind"],
        )
        tokens.add_metric(["read"], told["cached_tokens"])
        tokens.add_metric(["written"], told["written_tokens"])
        yield tokens
        # No counter: what is written and never read is a loss.
        yield GaugeMetricFamily(
            "forebay_prompt_cache_saved_usd",
            "The usual price of the prompts less what was paid.",
            told["saved_usd"],
        )


class _OwnerMessages(Collector):
    """Messages sent to each owner, by method, read off the lines when somebody asks."""

    def __init__(self, refs: Callable[[], Iterable[OwnerRef]]) -> None:
        self._refs = refs

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(
            "forebay_owner_messages",
            "Messages that desks of this process sent to owners.",
            labels=["owner", "method"],
        )
        for ref in self._refs():
            for method, count in ref.sent.items():
                family.add_metric([ref.name, method], count)
        yield family


class _Counts(Collector):
    """A counter that every request passes: plain integers, until somebody asks."""

    def __init__(self, name: str, documentation: str, labels: Sequence[str]) -> None:
        self._told = (name, documentation)
        self._labels = labels
        self.by: dict[tuple[str, ...], int] = {}

    def count(self, labels: tuple[str, ...]) -> None:
        self.by[labels] = self.by.get(labels, 0) + 1

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(*self._told, labels=self._labels)
        for labels, count in list(self.by.items()):
            family.add_metric(labels, count)
        yield family


class _Spread(Collector):
    """A histogram that every request passes: its buckets by route."""

    def __init__(self, name: str, documentation: str, bounds: Sequence[float]) -> None:
        self._told = (name, documentation)
        self._bounds = bounds
        self._names = [*(str(float(bound)) for bound in bounds), "+Inf"]
        self._by: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, route: str, seconds: float) -> None:
        buckets = self._by.get(route)
        if buckets is None:
            buckets = self._by[route] = [0] * len(self._names)
            self._sums[route] = 0.0
        buckets[bisect_left(self._bounds, seconds)] += 1
        self._sums[route] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        family = HistogramMetricFamily(*self._told, labels=["route"])
        for route, buckets in list(self._by.items()):
            counts = zip(self._names, accumulate(buckets), strict=True)
            family.add_metric([route], list(counts), self._sums[route])
        yield family


class Meter:
    """This process's counters. Incrementing one costs about a microsecond, and less where every
    request does it."""

    def __init__(self, refs: Callable[[], Iterable[OwnerRef]]) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self._requests = _Counts(
            "forebay_requests", "Requests by outcome.", ["route", "model", "tenant", "status"]
        )
        self._seconds = _Spread(
            "forebay_request_seconds", "From the first step of the pipeline to the last.", SECONDS
        )
        self._overhead = _Spread(
            "forebay_overhead_seconds",
            "A request's time less what the provider took.",
            OVERHEAD_SECONDS,
        )
        self._cache = _Counts("forebay_cache", "Look-ups.", ["outcome"])
        self._first_token = Histogram(
            "forebay_time_to_first_token_seconds",
            "Streams only.",
            ["route"],
            buckets=SECONDS,
            registry=registry,
        )
        self._tokens = Counter("forebay_tokens", "Tokens used.", ["kind"], registry=registry)
        self._cost = Counter("forebay_cost_usd", "Cost of posted calls.", registry=registry)
        self._stored = _Stored()
        registry.register(self._stored)
        self.looked_up: Callable[[], None] = lambda: None
        self._coalesced = Counter(
            "forebay_coalesced_texts",
            "Texts that shared a provider call with another caller's.",
            registry=registry,
        )
        self._calls = Counter(
            "forebay_provider_calls",
            "Provider calls by what the breaker learnt from them.",
            ["deployment", "outcome"],
            registry=registry,
        )
        self._limited = Counter(
            "forebay_rate_limited", "Refusals.", ["tenant", "kind"], registry=registry
        )
        self._queue = Histogram(
            "forebay_queue_seconds", "Waiting for a limit.", buckets=SECONDS, registry=registry
        )
        self._breaker = Gauge(
            "forebay_breaker_state",
            "0 closed, 1 half open, 2 open.",
            ["deployment"],
            registry=registry,
        )
        self._breakers_told: set[str] = set()
        self._breakers_shown: set[str] = set()
        for collector in (
            self._requests,
            self._seconds,
            self._overhead,
            self._cache,
            _OwnerMessages(refs),
        ):
            registry.register(collector)
        self._tenants: set[str] = set()

    def request(
        self, route: str, model: str, tenant: str, status: str, total_s: float, provider_s: float
    ) -> None:
        """One request came to its end."""
        self._requests.count((route, model, self._tenant(tenant), status))
        self._seconds.observe(route, total_s)
        self._overhead.observe(route, max(0.0, total_s - provider_s))

    def usage(self, prompt_tokens: int, completion_tokens: int, cost_nano: int | None) -> None:
        """A provider call was posted."""
        self._tokens.labels("prompt").inc(prompt_tokens)
        self._tokens.labels("completion").inc(completion_tokens)
        if cost_nano:
            self._cost.inc(cost_nano / 1e9)

    def first_token(self, route: str, seconds: float) -> None:
        """A stream's first chunk was handed over."""
        self._first_token.labels(route).observe(seconds)

    def cache(self, outcome: str) -> None:
        """A look-up ended as `hit`, `miss` or `joined`."""
        self._cache.count((outcome,))
        self.looked_up()

    def stored(self, told: Mapping[str, int] | None) -> None:
        """`entries`, `bytes` and `evicted` of the cache, for the next `render`; None: unknown."""
        self._stored.told = told

    def lookups(self) -> tuple[int, int, int]:
        """How many look-ups of this process ended as hit, miss and joined."""
        hit, miss, joined = (self._cache.by.get((name,), 0) for name in ("hit", "miss", "joined"))
        return int(hit), int(miss), int(joined)

    def coalesced(self, texts: int) -> None:
        """That many texts of a caller travelled with somebody else's."""
        self._coalesced.inc(texts)

    def provider_call(self, deployment: str, outcome: str) -> None:
        """A provider call ended with this verdict: success, slow, failure, unreachable, …"""
        self._calls.labels(deployment, outcome).inc()

    def limited(self, tenant: str, kind: str) -> None:
        """A limit refused a request."""
        self._limited.labels(self._tenant(tenant), kind).inc()

    def queued(self, seconds: float) -> None:
        """A request waited for a limit before it went on."""
        self._queue.observe(seconds)

    def breaker(self, deployment: str, level: int) -> None:
        """How a breaker stands, for the next `render`: 0 closed, 1 half open, 2 open."""
        self._breaker.labels(deployment).set(level)
        self._breakers_told.add(deployment)

    def render(self) -> bytes:
        """Prometheus text format. A breaker that nobody told of since the last one is gone."""
        for gone in self._breakers_shown - self._breakers_told:
            self._breaker.remove(gone)
        self._breakers_shown, self._breakers_told = self._breakers_told, set()
        return generate_latest(self.registry)

    def _tenant(self, tenant: str) -> str:
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= TENANTS_MAX:
            return "other"
        self._tenants.add(tenant)
        return tenant
