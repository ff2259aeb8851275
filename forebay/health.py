"""How a system is: a check for each concern, judged from what its owners and desks tell.

Rule 1: everything that decides is pure and takes a `Seen`; whoever has a system looks.
Rule 2: a check knows nothing of the one before it, so what recovers is healthy the next time.
Rule 3: no provider is called: a deployment is as good as its breaker's word.

An owner that is away degrades its concern, since every desk goes on without it in a stated way.
`unhealthy` is what keeps every request from being served: no model can be asked, the ledger takes
no more paid calls, or no owner answers at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from time import monotonic
from typing import Any

from actors.circuit_breaker.policy import LETS_THROUGH, Standing, State
from actors.ref import Clock
from forebay.config import GatewayConfig
from forebay.routing import Deployment, ModelTable
from forebay.schemas import HealthCheckResult, HealthStatus

ENTRIES_BEHIND = 1_000  # entries that wait for the ledger: 20 times what a busy desk sends at once
NAMES_SHOWN_MAX = 10
LEDGER_TOLD = ("open", "buffered", "full", "dropped", "failures", "last_error", "idempotency")

Check = dict[str, Any]
"""`status` (healthy, degraded or unhealthy), `message`, and the figures they rest on."""


@dataclass(frozen=True, slots=True)
class Upstream:
    """A deployment of a group, by the name of its breaker, and how it stands now."""

    name: str
    provider: str
    standing: Standing

    @property
    def up(self) -> bool:
        """Whether calls go there as they come."""
        return self.standing.state in LETS_THROUGH and self.standing.retry_after_s <= 0

    @property
    def throttled(self) -> bool:
        """Whether its provider has asked for a pause."""
        return self.standing.state in LETS_THROUGH and self.standing.retry_after_s > 0

    @property
    def may_be_up(self) -> bool:
        """Whether a pause is all that is known against it, or it is being tried, or may be."""
        half_open = self.standing.state is State.HALF_OPEN
        return self.throttled or half_open or self.standing.callable


@dataclass(frozen=True, slots=True)
class Seen:
    """What one look at a system shows.

    `owners` has, by owner, `reachable`, and its figures or the reason; `desks` the figures of this
    process. `shards` names the limiter's owners, all of them asked. `shares_batches` says whether
    embeddings go through the shared Batcher. `problem` is why the newest configuration is not in
    force.
    """

    gateway: GatewayConfig
    groups: Mapping[str, Sequence[Upstream]]
    owners: Mapping[str, Mapping[str, Any]]
    desks: Mapping[str, Mapping[str, Any]]
    shards: Sequence[str] = ()
    config_version: int = 0
    problem: str | None = None
    shares_batches: bool = False


def upstreams(table: ModelTable, standing: Callable[[str], Standing]) -> dict[str, list[Upstream]]:
    """The deployments of every group, patterns included, as `standing` says that they stand."""
    return {
        name: [Upstream(d.circuit, d.provider, standing(d.circuit)) for d in deployments]
        for name, deployments in by_group(table).items()
    }


def by_group(table: ModelTable) -> dict[str, list[Deployment]]:
    """Every entry of the configuration: the deployments of each name, and of each pattern."""
    groups = {name: list(table.group(name).deployments) for name in table.names()}
    for deployment in table.deployments():
        if "*" in deployment.group:
            groups.setdefault(deployment.group, []).append(deployment)
    return groups


def checks(seen: Seen) -> dict[str, Check]:
    """Every check, by the name of its concern."""
    return {
        "router": _router(seen),
        "circuit_breaker": _circuit_breaker(seen),
        "cache": _cache(seen),
        "rate_limiter": _rate_limiter(seen),
        "ledger": _ledger(seen),
        "batcher": _batcher(seen),
        "registry": _registry(seen),
        "providers": _providers(seen),
    }


def conclusion(
    made: Mapping[str, Check], owners: Mapping[str, Mapping[str, Any]]
) -> tuple[HealthStatus, str]:
    """What the checks come to: the worst of them, and why. Without any, nothing is known."""
    if not made:
        return HealthStatus.UNKNOWN, "enable_health_monitoring is off"
    if owners and not any(owner["reachable"] for owner in owners.values()):
        return HealthStatus.UNHEALTHY, "no owner can be reached"
    wrong = {name: check for name, check in made.items() if check["status"] != "healthy"}
    if not wrong:
        return HealthStatus.HEALTHY, "all checks pass"
    found = {check["status"] for check in wrong.values()}
    worst = HealthStatus.UNHEALTHY if "unhealthy" in found else HealthStatus.DEGRADED
    return worst, "; ".join(f"{name}: {check['message']}" for name, check in wrong.items())


def not_closed(seen: Seen) -> dict[str, Standing]:
    """The breakers that are open, half open or forced open, by name."""
    return {
        name: upstream.standing
        for name, upstream in _by_name(seen).items()
        if upstream.standing.state not in LETS_THROUGH
    }


class HealthCheck:
    """Looks at a system when asked, and says how it is.

    Owns: how often it was asked, what it concluded, and when that last changed; none of it counts
    in the next check. Bounded by the look, which waits for no owner longer than its timeout.
    Failure behaviour: an owner that is away is a finding, not a failure.
    """

    def __init__(
        self,
        look: Callable[[], Awaitable[dict[str, Any]]],
        clock: Clock = monotonic,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """`look` gives the details of a system, its `checks` and `owners` among them."""
        self._look = look
        self._clock = clock
        self._now = now
        self._concluded: Counter[str] = Counter()
        self._last: HealthCheckResult | None = None
        self._changed_at: datetime | None = None

    async def run(self) -> HealthCheckResult:
        """One check. Calls no provider."""
        begun_s = self._clock()
        details = await self._look()
        status, message = conclusion(details["checks"], details["owners"])
        result = HealthCheckResult(
            status=status,
            details=details,
            message=message,
            timestamp=self._now(),
            response_time_ms=(self._clock() - begun_s) * 1000,
        )
        if self._last is None or self._last.status is not status:
            self._changed_at = result.timestamp
        self._concluded[status.value] += 1
        self._last = result
        return result

    def stats(self) -> dict[str, Any]:
        last = self._last
        return {
            "checks": self._concluded.total(),
            **self._concluded,
            "last_status": None if last is None else last.status.value,
            "last_took_ms": None if last is None else last.response_time_ms,
            "since": None if self._changed_at is None else self._changed_at.isoformat(),
        }


# ------------------------------------------------------------------------------- the concerns


def _router(seen: Seen) -> Check:
    groups = seen.groups
    dead = [name for name, ups in groups.items() if not any(u.may_be_up for u in ups)]
    waiting = [
        name
        for name, ups in groups.items()
        if name not in dead and not any(upstream.up for upstream in ups)
    ]
    figures = {
        "models": len(groups),
        "deployments": len(_by_name(seen)),
        "unavailable": dead,
        "waiting": waiting,
    }
    if not groups:
        return _check("unhealthy", "no model is configured", **figures)
    if len(dead) == len(groups):
        words = "no model can be asked: the breakers of all their deployments are open"
        return _check("unhealthy", words, **figures)
    wrong = []
    if dead:
        wrong.append(f"no deployment can be called for {_shown(dead)}")
    if waiting:
        wrong.append(f"throttled, or waiting for a probe: every deployment of {_shown(waiting)}")
    return _judged(wrong, "every model has a deployment that can be called", **figures)


def _circuit_breaker(seen: Seen) -> Check:
    desk = seen.desks.get("circuit_breaker", {})
    shut = not_closed(seen)
    figures = {
        "states": dict(Counter(u.standing.state.value for u in _by_name(seen).values())),
        "open": {
            name: {
                "state": standing.state.value,
                "reason": standing.reason.value,
                "retry_after_s": standing.retry_after_s,
            }
            for name, standing in shut.items()
        },
        "buffered": desk.get("buffered", 0),
        "dropped": desk.get("dropped", 0),
    }
    if not seen.gateway.enable_circuit_breaker:
        return _check("healthy", "enable_circuit_breaker is off", **figures)
    wrong = _away(seen, "circuit-breaker", "the states last heard of hold")
    if shut:
        wrong.append(f"not closed: {_shown(shut)}")
    return _judged(wrong, "every breaker is closed", **figures)


def is_cache(name: str) -> bool:
    """Whether an owner of this name is one of the cache's."""
    return name == "cache" or name.startswith("cache-")


def is_batcher(name: str) -> bool:
    """Whether an owner of this name is one of the Batcher's."""
    return name == "batcher" or name.startswith("batcher-")


def stored_in(owners: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Answers in the cache, their bytes, how many gave way; those that desks hold on lease too."""
    return {
        name: sum(one.get(name, 0) + one.get(f"held_{name}", 0) for one in owners)
        for name in ("entries", "bytes", "evicted")
    }


def redis_of(owners: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The cache's second tier as its owners see it; None where none is configured.

    Degraded where one of them says so; their counts are added up.
    """
    tiers = [one["redis"] for one in owners if one.get("redis") is not None]
    if not tiers:
        return None
    worst = min(tiers, key=lambda tier: tier["state"] == "healthy")
    counts: Counter[str] = Counter()
    for tier in tiers:
        counts.update({name: value for name, value in tier.items() if type(value) is int})
    return {**worst, **counts}


def _cache(seen: Seen) -> Check:
    gateway = seen.gateway
    desk = seen.desks.get("cache", {})
    names = [name for name in seen.owners if is_cache(name)]
    here = [seen.owners[name] for name in names if seen.owners[name]["reachable"]]
    figures: dict[str, Any] = {**stored_in(here), "max_bytes": 0, "flights": 0}
    for name in ("max_bytes", "flights"):
        figures[name] = sum(owner.get(name, 0) for owner in here)
    redis = redis_of(here)
    if redis is not None:
        figures["redis"] = redis
    if not (gateway.enable_caching or gateway.enable_request_deduplication):
        words = "enable_caching and enable_request_deduplication are off"
        return _check("healthy", words, **figures)
    meanwhile = "requests are answered without it"
    wrong = [words for name in names for words in _away(seen, name, meanwhile)]
    if not wrong and desk.get("away"):
        wrong.append("this process goes on without it until it answers again")
    if gateway.enable_caching and redis is not None and redis["state"] != "healthy":
        wrong.append(f"its Redis: {redis['reason']}; answers are kept in memory meanwhile")
    return _judged(wrong, "available", **figures)


def _rate_limiter(seen: Seen) -> Check:
    desk = seen.desks.get("rate_limiter", {})
    away = [name for name in seen.shards if not seen.owners[name]["reachable"]]
    figures = {
        "shards": len(seen.shards),
        "away": away,
        **{name: desk[name] for name in ("tenants", "running", "waiting") if name in desk},
    }
    if not seen.gateway.enable_rate_limiting:
        return _check("healthy", "enable_rate_limiting is off", **figures)
    wrong = []
    if away:
        words = "what is not lent yet is refused to tenants with limits"
        wrong.append(f"unreachable: {_shown(away)}; {words}")
    return _judged(wrong, "limits can be checked", **figures)


def _ledger(seen: Seen) -> Check:
    desk = seen.desks.get("ledger", {})
    figures = {name: desk[name] for name in (*LEDGER_TOLD, "idempotency") if name in desk}
    if not seen.gateway.enable_llmops:
        return _check("healthy", "enable_llmops is off", **figures)
    wrong = _away(seen, "ledger", "entries are kept here until it answers")
    failing = seen.owners.get("ledger", {}).get("failing")
    if failing:
        wrong.append(f"its store takes nothing, entries are kept here: {failing}")
    if desk.get("full"):
        words = "as many entries as may wait here do: no further paid call may start"
        return _check("unhealthy", "; ".join([*wrong, words]), **figures)
    if desk.get("buffered", 0) > ENTRIES_BEHIND:
        wrong.append(f"{desk['buffered']} entries wait to be taken")
    return _judged(wrong, "entries are taken", **figures)


def _batcher(seen: Seen) -> Check:
    desk, names = seen.desks.get("batcher", {}), [name for name in seen.owners if is_batcher(name)]
    here = [seen.owners[name] for name in names if seen.owners[name]["reachable"]]
    figures = {
        **{
            figure: sum(owner.get(figure, 0) for owner in here)
            for figure in ("texts_queued", "calls_under_way")
        },
        **{name: desk[name] for name in ("under_way",) if name in desk},
    }
    if not seen.shares_batches:
        return _check("healthy", "this process sends its texts by itself", **figures)
    meanwhile = "embeddings wait for it until their deadlines"
    wrong = [words for name in names for words in _away(seen, name, meanwhile)]
    return _judged(wrong, "available", **figures)


def _registry(seen: Seen) -> Check:
    wrong = _away(seen, "registry", "what was configured last holds, and nothing can be changed")
    if seen.problem is not None:
        wrong.append(seen.problem)
    words = "the newest configuration is in force"
    return _judged(wrong, words, version=seen.config_version)


def _providers(seen: Seen) -> Check:
    found: dict[str, dict[str, int]] = {}
    for upstream in _by_name(seen).values():
        one = found.setdefault(
            upstream.provider, {"deployments": 0, "callable": 0, "throttled": 0, "open": 0}
        )
        one["deployments"] += 1
        kind = "callable" if upstream.up else "throttled" if upstream.throttled else "open"
        one[kind] += 1
    wrong = [
        f"{provider}: {one['callable']} of {one['deployments']} deployments can be called"
        for provider, one in found.items()
        if one["callable"] < one["deployments"]
    ]
    return _judged(wrong, "every deployment can be called", providers=found)


# ------------------------------------------------------------------------------- small things


def _check(status: str, message: str, **figures: Any) -> Check:
    return {"status": status, "message": message, **figures}


def _judged(wrong: Sequence[str], good: str, **figures: Any) -> Check:
    """Degraded for each thing that is wrong; healthy when nothing is."""
    return _check("degraded" if wrong else "healthy", "; ".join(wrong) or good, **figures)


def _away(seen: Seen, name: str, meanwhile: str) -> list[str]:
    owner = seen.owners.get(name, {"reachable": True})
    return [] if owner["reachable"] else [f"the owner is away ({owner['reason']}); {meanwhile}"]


def _by_name(seen: Seen) -> dict[str, Upstream]:
    """Every deployment once, however many groups it is in."""
    return {upstream.name: upstream for ups in seen.groups.values() for upstream in ups}


def _shown(names: Iterable[str]) -> str:
    told = list(names)
    more = len(told) - NAMES_SHOWN_MAX
    return ", ".join(told[:NAMES_SHOWN_MAX]) + (f" and {more} more" if more > 0 else "")
