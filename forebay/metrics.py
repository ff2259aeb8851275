"""What is counted, under the names of the contract.

Rule 1: a process counts in plain integers (times in ns, money in nano-USD), so that counts of all
        processes add up exactly; Prometheus's text is made of them when somebody asks.
Rule 2: label values come from the configuration (models, deployments) or are folded into `other`
        (tenants beyond TENANTS_MAX, series beyond SERIES_MAX), so that no client can mint series.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from actors.ref import OwnerRef
from actors.registry.sums import OTHER, Figures, Numbers, Series

TENANTS_MAX = 200
SERIES_MAX = 2_000
"""Of one process. Those that come later are counted with `other` for each label."""
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
OVERHEAD_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
NANO = 1e9
BY_ROUTE = "forebay_route_seconds"

Source = Callable[[], Figures]
"""Counts that are kept elsewhere in this process."""


class Family(NamedTuple):
    """Series that differ in their labels. Their numbers are `per_unit` times what is shown; those
    with `bounds` are histograms: a number per bucket, and the sum of what was observed."""

    name: str
    words: str
    labels: tuple[str, ...] = ()
    per_unit: float = 1
    bounds: tuple[float, ...] = ()
    kind: Literal["counter", "gauge"] = "counter"


FAMILIES = (
    Family("forebay_requests", "Requests by outcome.", ("route", "model", "tenant", "status")),
    Family(
        "forebay_request_seconds",
        "From the first step of the pipeline to the last.",
        (),
        NANO,
        SECONDS,
    ),
    Family(BY_ROUTE, "The same, by route.", ("route",), NANO, SECONDS),
    Family(
        "forebay_overhead_seconds",
        "A request's time less what the provider took, or a call that it shared.",
        (),
        NANO,
        OVERHEAD_SECONDS,
    ),
    Family("forebay_time_to_first_token_seconds", "Streams only.", (), NANO, SECONDS),
    Family("forebay_queue_seconds", "Waiting for a limit.", (), NANO, SECONDS),
    Family("forebay_tokens", "Tokens used.", ("kind",)),
    Family("forebay_cost_usd", "Cost of posted calls.", (), NANO),
    Family("forebay_cache", "Look-ups.", ("outcome",)),
    Family("forebay_coalesced_texts", "Texts that shared a provider call with another caller's."),
    Family(
        "forebay_provider_calls",
        "Provider calls by what the breaker learnt from them.",
        ("deployment", "outcome"),
    ),
    Family(
        "forebay_lane_calls",
        "Calls on their way to a provider: over the relay, over litellm, or to an embedded model.",
        ("deployment", "lane"),
    ),
    Family("forebay_rate_limited", "Refusals.", ("tenant", "kind")),
    Family(
        "forebay_validation_findings",
        "What the validation found in answers: rules broken (error), or only bent (warning).",
        ("rule", "severity"),
    ),
    Family("forebay_owner_messages", "Messages that desks sent to owners.", ("owner",)),
    Family("forebay_owner_calls", "The same, by what was asked.", ("owner", "method")),
    Family(
        "forebay_prompt_cache_tokens",
        "Prompt tokens that providers read from their caches, or wrote there.",
        ("kind",),
    ),
    # No counter: what is written and never read is a loss.
    Family(
        "forebay_prompt_cache_saved_usd",
        "The usual price of the prompts less what was paid.",
        (),
        NANO,
        kind="gauge",
    ),
)


def prompt_cache(told: Callable[[], Mapping[str, Any]]) -> Source:
    """What providers reported of their prompt caches to this process; `told` has its figures."""

    def read() -> Figures:
        now = told()
        return {
            ("forebay_prompt_cache_tokens", "read"): (now["cached_tokens"],),
            ("forebay_prompt_cache_tokens", "written"): (now["written_tokens"],),
            ("forebay_prompt_cache_saved_usd",): (round(now["saved_usd"] * NANO),),
        }

    return read


class Meter:
    """This process's counts. Adding to one costs a fraction of a microsecond.

    Bounds: SERIES_MAX series, TENANTS_MAX tenants by name.
    """

    def __init__(self, refs: Callable[[], Iterable[OwnerRef]]) -> None:
        self._numbers: dict[Series, list[int]] = {}
        self._tenants: set[str] = set()
        self._refs = refs
        self._sources: list[Source] = [self._messages]
        self._breakers: dict[str, int] = {}
        self._stored: Mapping[str, int] | None = None
        self._unsettled: int | None = None
        self.looked_up: Callable[[], None] = lambda: None

    def add(self, source: Source) -> None:
        """Have the counts of `source` among this process's, under names of `FAMILIES`."""
        self._sources.append(source)

    def request(
        self, route: str, model: str, tenant: str, status: str, total_s: float, provider_s: float
    ) -> None:
        """One request came to its end."""
        if tenant not in self._tenants:
            tenant = self._tenant(tenant)
        self._count(("forebay_requests", route, model, tenant, status))
        self._observe((BY_ROUTE, route), SECONDS, total_s)
        own_s = total_s - provider_s if total_s > provider_s else 0.0
        self._observe(("forebay_overhead_seconds",), OVERHEAD_SECONDS, own_s)

    def usage(self, prompt_tokens: int, completion_tokens: int, cost_nano: int | None) -> None:
        """A provider call was posted."""
        self._count(("forebay_tokens", "prompt"), prompt_tokens)
        self._count(("forebay_tokens", "completion"), completion_tokens)
        if cost_nano:
            self._count(("forebay_cost_usd",), cost_nano)

    def first_token(self, seconds: float) -> None:
        """A stream's first chunk was handed over."""
        self._observe(("forebay_time_to_first_token_seconds",), SECONDS, seconds)

    def cache(self, outcome: str) -> None:
        """A look-up ended as `hit`, `miss` or `joined`."""
        self._count(("forebay_cache", outcome))
        self.looked_up()

    def lookups(self) -> tuple[int, int, int]:
        """How many look-ups of this process ended as hit, miss and joined."""
        hits, misses, joined = (
            self._numbers.get(("forebay_cache", outcome), [0])[0]
            for outcome in ("hit", "miss", "joined")
        )
        return hits, misses, joined

    def coalesced(self, texts: int) -> None:
        """That many texts of a caller travelled with somebody else's."""
        self._count(("forebay_coalesced_texts",), texts)

    def provider_call(self, deployment: str, outcome: str) -> None:
        """A provider call ended with this verdict: success, slow, failure, unreachable, …"""
        self._count(("forebay_provider_calls", deployment, outcome))

    def limited(self, tenant: str, kind: str) -> None:
        """A limit refused a request."""
        self._count(("forebay_rate_limited", self._tenant(tenant), kind))

    def queued(self, seconds: float) -> None:
        """A request waited for a limit before it went on."""
        self._observe(("forebay_queue_seconds",), SECONDS, seconds)

    # What is not counted here, but told before each `render`, which forgets it.

    def breaker(self, deployment: str, level: int) -> None:
        """How a breaker stands: 0 closed, 1 half open, 2 open."""
        self._breakers[deployment] = level

    def stored(self, told: Mapping[str, int] | None) -> None:
        """`entries`, `bytes` and `evicted` of the cache; None: unknown."""
        self._stored = told

    def unsettled(self, entries: int | None) -> None:
        """The ledger's entries of which nobody knows what they cost; None: unknown."""
        self._unsettled = entries

    def figures(self) -> dict[Series, Numbers]:
        """All that this process has counted since it began."""
        told: dict[Series, Numbers] = {
            series: tuple(numbers) for series, numbers in self._numbers.items()
        }
        routes = [numbers for series, numbers in told.items() if series[0] == BY_ROUTE]
        if routes:
            told["forebay_request_seconds",] = tuple(map(sum, zip(*routes, strict=True)))
        for source in self._sources:
            told.update(source())
        return told

    def render(self, figures: Figures | None = None) -> bytes:
        """Prometheus text of the figures; None: of this process's."""
        registry = CollectorRegistry()
        registry.register(_Families(self.figures() if figures is None else figures))
        registry.register(_Told(self._breakers, self._stored, self._unsettled))
        self._breakers, self._stored, self._unsettled = {}, None, None
        return generate_latest(registry)

    def _count(self, series: Series, by: int = 1) -> None:
        numbers = self._numbers.get(series)
        if numbers is None:
            if len(self._numbers) >= SERIES_MAX:
                series = (series[0], *[OTHER] * (len(series) - 1))
            numbers = self._numbers.setdefault(series, [0])
        numbers[0] += by

    def _observe(self, series: Series, bounds: tuple[float, ...], seconds: float) -> None:
        numbers = self._numbers.get(series)
        if numbers is None:  # by route at the most, of which there are few
            numbers = self._numbers[series] = [0] * (len(bounds) + 2)
        numbers[bisect_left(bounds, seconds)] += 1
        numbers[-1] += int(seconds * NANO)

    def _messages(self) -> Figures:
        told: dict[Series, Numbers] = {}
        for ref in self._refs():
            sent = ref.sent.copy()
            told["forebay_owner_messages", ref.name] = (sum(sent.values()),)
            for method, count in sent.items():
                told["forebay_owner_calls", ref.name, method] = (count,)
        return told

    @staticmethod
    def messages_of(owner: str, method: str) -> tuple[Series, Series]:
        """The counts that one message changes."""
        return ("forebay_owner_messages", owner), ("forebay_owner_calls", owner, method)

    def _tenant(self, tenant: str) -> str:
        if tenant in self._tenants:
            return tenant
        if len(self._tenants) >= TENANTS_MAX:
            return OTHER
        self._tenants.add(tenant)
        return tenant


class _Families(Collector):
    """Figures as Prometheus's families; those of a family that is not known here are left out."""

    def __init__(self, figures: Figures) -> None:
        self._by_family: dict[str, list[tuple[tuple[str, ...], Numbers]]] = {}
        labels = {family.name: len(family.labels) for family in FAMILIES}
        for series, numbers in figures.items():
            if labels.get(series[0]) != len(series) - 1:
                continue  # of a version with other labels
            self._by_family.setdefault(series[0], []).append((series[1:], numbers))

    def collect(self) -> Iterator[Metric]:
        for family in FAMILIES:
            told = self._by_family.get(family.name) or _nothing(family)
            if family.bounds:
                yield _histogram(family, told)
                continue
            made = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = made(family.name, family.words, labels=family.labels)
            for labels, numbers in told:
                metric.add_metric(labels, numbers[0] / family.per_unit)
            yield metric


def _nothing(family: Family) -> list[tuple[tuple[str, ...], Numbers]]:
    """A family without labels is there from the beginning, so that its first count is seen."""
    return [] if family.labels else [((), (0,) * (len(family.bounds) + 2))]


def _histogram(family: Family, told: Iterable[tuple[tuple[str, ...], Numbers]]) -> Metric:
    metric = HistogramMetricFamily(family.name, family.words, labels=family.labels)
    edges = (*family.bounds, math.inf)
    names = [str(floatToGoString(edge)) for edge in edges]  # type: ignore[no-untyped-call]
    for labels, numbers in told:
        if len(numbers) != len(names) + 1:
            continue  # of a version with other buckets
        buckets = list(zip(names, accumulate(numbers[:-1]), strict=True))
        metric.add_metric(labels, buckets, numbers[-1] / family.per_unit)
    return metric


class _Told(Collector):
    """How things stand now, which does not add up; nothing where it is not known."""

    def __init__(
        self, breakers: Mapping[str, int], stored: Mapping[str, int] | None, unsettled: int | None
    ) -> None:
        self._breakers = breakers
        self._stored = stored
        self._unsettled = unsettled

    def collect(self) -> Iterator[Metric]:
        words = "0 closed, 1 half open, 2 open."
        breakers = GaugeMetricFamily("forebay_breaker_state", words, labels=["deployment"])
        for deployment, level in self._breakers.items():
            breakers.add_metric([deployment], level)
        yield breakers
        if self._unsettled is not None:
            words = "Ledger entries of calls of which nobody knows what they cost."
            yield GaugeMetricFamily("forebay_ledger_unsettled", words, self._unsettled)
        if (told := self._stored) is not None:
            yield GaugeMetricFamily("forebay_cache_entries", "Answers stored.", told["entries"])
            yield GaugeMetricFamily("forebay_cache_bytes", "Memory that they take.", told["bytes"])
            words = "Answers that gave way."
            yield CounterMetricFamily("forebay_cache_evictions", words, told["evicted"])
