"""What a health check concludes, from what owners, desks and breakers tell."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from actors.circuit_breaker.policy import CLEAN, Reason, Standing, State
from actors.ref import OwnerUnavailable
from forebay.config import GatewayConfig, SystemConfig
from forebay.gateway import LiteLLMGateway
from forebay.health import (
    ENTRIES_BEHIND,
    HealthCheck,
    Seen,
    Upstream,
    by_group,
    checks,
    conclusion,
)
from forebay.routing import ModelTable
from forebay.schemas import HealthStatus
from forebay.system import System, open_inline
from tests.support.fake_time import settle

CONCERNS = ["router", "circuit_breaker", "cache", "rate_limiter"]  # the four of the seed
MORE = ["ledger", "batcher", "registry", "providers"]
OPEN = Standing(State.OPEN, 3, 40.0, Reason.FAILURE_RATE)
DUE = Standing(State.OPEN, 3, 0.0, Reason.FAILURE_RATE)
PROBED = Standing(State.HALF_OPEN, 4, 5.0)
THROTTLED = Standing(State.CLOSED, 0, 7.0)
OWNERS = ("registry", "rate-limiter-0", "circuit-breaker", "cache", "batcher", "ledger")


def entry(name: str, model: str, key: str = "k") -> dict[str, Any]:
    return {"model_name": name, "litellm_params": {"model": model, "api_key": key}}


def with_owner(what: Seen, name: str, told: dict[str, Any]) -> Seen:
    return replace(what, owners={**what.owners, name: told})


def seen(
    groups: dict[str, list[Standing]] | None = None,
    *,
    away: tuple[str, ...] = (),
    desks: dict[str, dict[str, Any]] | None = None,
    problem: str | None = None,
    shares_batches: bool = True,
    **gateway: Any,
) -> Seen:
    """A system whose owners answer, but those that are `away`; by default of one model."""
    groups = {"m": [CLEAN]} if groups is None else groups
    return Seen(
        GatewayConfig(enable_caching=True, enable_request_batching=True, **gateway),
        {
            name: [Upstream(f"{name}-{n}", "openai", stands) for n, stands in enumerate(standings)]
            for name, standings in groups.items()
        },
        {
            name: {"reachable": False, "reason": "it died"} if name in away else {"reachable": True}
            for name in OWNERS
        },
        desks or {},
        shards=["rate-limiter-0"],
        problem=problem,
        shares_batches=shares_batches,
    )


def concluded(what: Seen) -> tuple[HealthStatus, str]:
    return conclusion(checks(what), what.owners)


def status_of(what: Seen, concern: str) -> str:
    status: str = checks(what)[concern]["status"]
    return status


def test_every_concern_is_checked_and_says_why() -> None:
    made = checks(seen())

    assert list(made) == CONCERNS + MORE
    for check in made.values():
        assert check["status"] == "healthy"
        assert check["message"]
    assert concluded(seen()) == (HealthStatus.HEALTHY, "all checks pass")


# --- deployments and their breakers -----------------------------------------------------------


def test_a_model_with_another_deployment_is_fine_while_its_provider_is_not() -> None:
    what = seen({"m": [OPEN, CLEAN]})

    assert status_of(what, "router") == "healthy"
    assert checks(what)["providers"]["message"] == "openai: 1 of 2 deployments can be called"
    assert checks(what)["circuit_breaker"]["open"] == {
        "m-0": {"state": "open", "reason": "failure rate", "retry_after_s": 40.0}
    }
    assert concluded(what)[0] is HealthStatus.DEGRADED


def test_a_model_that_nobody_can_answer_for_degrades_the_whole() -> None:
    what = seen({"m": [OPEN], "n": [CLEAN]})

    assert checks(what)["router"]["unavailable"] == ["m"]
    assert "no deployment can be called for m" in concluded(what)[1]
    assert concluded(what)[0] is HealthStatus.DEGRADED


def test_no_model_to_ask_is_unhealthy() -> None:
    what = seen({"m": [OPEN], "n": [Standing(State.FORCED_OPEN, 1, 60.0, Reason.OPERATOR)]})

    assert concluded(what)[0] is HealthStatus.UNHEALTHY
    assert concluded(seen({}))[0] is HealthStatus.UNHEALTHY


@pytest.mark.parametrize("stands", [DUE, PROBED, THROTTLED], ids=["due", "probed", "throttled"])
def test_a_model_that_is_being_tried_or_waits_is_not_given_up(stands: Standing) -> None:
    what = seen({"m": [stands]})

    assert checks(what)["router"]["waiting"] == ["m"]
    assert concluded(what)[0] is HealthStatus.DEGRADED


def test_a_breaker_that_is_forced_closed_is_closed() -> None:
    forced = Standing(State.FORCED_CLOSED, 5, 0.0, Reason.OPERATOR)

    assert concluded(seen({"m": [forced]}))[0] is HealthStatus.HEALTHY


def test_texts_queued_are_those_of_all_batchers_and_one_that_is_away_is_named() -> None:
    what = seen()
    del what.owners["batcher"]
    what.owners["batcher-0"] = {"reachable": True, "texts_queued": 3}
    what.owners["batcher-1"] = {"reachable": True, "texts_queued": 4}
    assert checks(what)["batcher"]["texts_queued"] == 7
    assert status_of(what, "batcher") == "healthy"
    what.owners["batcher-1"] = {"reachable": False, "reason": "it died"}
    assert checks(what)["batcher"]["texts_queued"] == 3
    assert "it died" in checks(what)["batcher"]["message"]


def test_it_recovers_by_itself() -> None:
    statuses = [concluded(seen({"m": [stands]}))[0].value for stands in (CLEAN, OPEN, DUE, CLEAN)]

    assert statuses == ["healthy", "unhealthy", "degraded", "healthy"]


# --- owners and desks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "concern"),
    [
        ("circuit-breaker", "circuit_breaker"),
        ("cache", "cache"),
        ("rate-limiter-0", "rate_limiter"),
        ("ledger", "ledger"),
        ("batcher", "batcher"),
        ("registry", "registry"),
    ],
)
def test_an_owner_that_is_away_degrades_its_concern_and_no_other(owner: str, concern: str) -> None:
    what = seen(away=(owner,))
    wrong = [name for name, check in checks(what).items() if check["status"] != "healthy"]

    assert wrong == [concern]
    assert concluded(what)[0] is HealthStatus.DEGRADED


def test_nobody_answering_is_unhealthy() -> None:
    assert concluded(seen(away=OWNERS)) == (HealthStatus.UNHEALTHY, "no owner can be reached")


@pytest.mark.parametrize(
    ("owner", "off"),
    [
        ("circuit-breaker", {"enable_circuit_breaker": False}),
        ("rate-limiter-0", {"enable_rate_limiting": False}),
        ("ledger", {"enable_llmops": False}),
        ("batcher", {"shares_batches": False}),
    ],
)
def test_what_is_switched_off_cannot_fail(owner: str, off: dict[str, Any]) -> None:
    assert concluded(seen(away=(owner,), **off))[0] is HealthStatus.HEALTHY


def test_a_ledger_whose_store_fails_is_degraded_and_says_why() -> None:
    well = seen()
    ledger = {"reachable": True, "failing": "disk full"}
    failing = replace(well, owners={**well.owners, "ledger": ledger})
    assert status_of(failing, "ledger") == "degraded"
    assert "disk full" in str(checks(failing)["ledger"])


def test_a_ledger_that_takes_no_more_is_unhealthy() -> None:
    full = seen(desks={"ledger": {"full": True, "buffered": 50_000}})
    behind = seen(desks={"ledger": {"full": False, "buffered": ENTRIES_BEHIND + 1}})

    assert status_of(full, "ledger") == "unhealthy"
    assert status_of(behind, "ledger") == "degraded"


def test_a_redis_that_cannot_be_used_degrades_the_cache_and_is_told() -> None:
    owner = {"reachable": True, "redis": {"state": "degraded", "reason": "no answer in time"}}
    made = checks(with_owner(seen(), "cache", owner))["cache"]

    assert made["status"] == "degraded"
    assert "Redis: no answer in time" in made["message"]
    assert made["redis"]["state"] == "degraded"


@pytest.mark.parametrize("redis", [None, {"state": "healthy", "reason": None}])
def test_a_redis_that_works_and_one_that_is_not_wanted_are_healthy(redis: Any) -> None:
    owner = {"reachable": True, "redis": redis}
    made = checks(with_owner(seen(), "cache", owner))["cache"]

    assert made["status"] == "healthy"
    assert made.get("redis") == redis


def test_a_cache_that_this_process_goes_without_is_degraded() -> None:
    assert status_of(seen(desks={"cache": {"away": True}}), "cache") == "degraded"


def with_cache(*told: dict[str, Any], **gateway: Any) -> Seen:
    """As `seen`, with these owners in place of the cache's one."""
    what = seen(**gateway)
    owners = {name: owner for name, owner in what.owners.items() if name != "cache"}
    owners |= {f"cache-{n}": {"reachable": True, **one} for n, one in enumerate(told)}
    return replace(what, owners=owners)


def test_the_caches_owners_are_judged_together() -> None:
    held = {"held_entries": 4, "held_bytes": 20, "held_evicted": 0}
    what = with_cache({"entries": 2, "bytes": 10, **held}, {"entries": 3, "bytes": 5})
    check = checks(what)["cache"]
    assert (check["status"], check["entries"], check["bytes"]) == ("healthy", 9, 35)
    assert "redis" not in check

    what = with_cache({"entries": 2}, {"reachable": False, "reason": "it died"})
    check = checks(what)["cache"]
    assert (check["status"], check["entries"]) == ("degraded", 2)
    assert "it died" in check["message"]


def test_a_redis_that_is_away_is_degraded_and_says_why() -> None:
    well = {"redis": {"state": "healthy", "reason": None, "found": 2}}
    away = {"redis": {"state": "degraded", "reason": "no answer in 25 ms", "found": 1}}
    check = checks(with_cache(well, well))["cache"]
    assert (check["status"], check["redis"]["found"]) == ("healthy", 4)

    check = checks(with_cache(well, away, well))["cache"]
    assert (check["status"], check["redis"]["state"]) == ("degraded", "degraded")
    assert "no answer in 25 ms" in check["message"]
    assert check["redis"]["found"] == 5
    assert concluded(with_cache(well, away))[0] is HealthStatus.DEGRADED
    assert status_of(with_cache(well, {"redis": None}), "cache") == "healthy"


def test_a_redis_of_old_answers_is_nobodys_trouble_with_the_cache_off() -> None:
    away = {"redis": {"state": "degraded", "reason": "no answer in 25 ms"}}
    what = with_cache(away)
    off = what.gateway.model_copy(update={"enable_caching": False})
    assert status_of(replace(what, gateway=off), "cache") == "healthy"


def test_a_configuration_that_is_not_in_force_is_told() -> None:
    what = seen(problem="configuration version 4 was not applied: no model is named 'x'")

    assert status_of(what, "registry") == "degraded"
    assert "version 4 was not applied" in concluded(what)[1]


def test_many_names_are_not_all_told() -> None:
    what = seen({f"m{n}": [OPEN] for n in range(30)} | {"good": [CLEAN]})

    assert "m9 and 20 more" in checks(what)["router"]["message"]


def test_without_checks_nothing_is_known() -> None:
    assert conclusion({}, {})[0] is HealthStatus.UNKNOWN


# --- a whole system ---------------------------------------------------------------------------


@pytest.fixture
async def system(tmp_path: Path) -> AsyncIterator[System]:
    models = [entry("m", "openai/a"), entry("m", "openai/b"), entry("openai/*", "openai/*")]
    config = SystemConfig.model_validate(
        {"gateway": {"model_list": models}, "data_dir": str(tmp_path)}
    )
    system = await open_inline(config)
    yield system
    await system.close()


@pytest.fixture
def clock() -> Any:
    """Each look at it takes a millisecond."""
    ticks = count(100)
    return lambda: next(ticks) / 1000


async def test_a_system_tells_all_of_it(system: System, clock: Any) -> None:
    health = HealthCheck(system.health, clock, lambda: datetime(2026, 1, 1, tzinfo=UTC))
    result = await health.run()

    assert result.status is HealthStatus.HEALTHY, result.message
    assert set(result.details["checks"]) == {*CONCERNS, *MORE}
    assert set(result.details["owners"]) == set(OWNERS)
    assert result.details["checks"]["router"]["models"] == 2
    assert result.response_time_ms == pytest.approx(1.0)
    assert result.model_dump_json()


async def test_the_word_of_an_operator_shows_and_goes(system: System) -> None:
    health = HealthCheck(system.health)
    name = system.table.group("m").deployments[0].circuit
    statuses = []
    for state in (None, State.FORCED_OPEN, None):
        await system.breaker.force(name, state)
        await settle()  # the owner pushes it
        statuses.append((await health.run()).status.value)

    assert statuses == ["healthy", "degraded", "healthy"]
    assert health.stats() | {"last_took_ms": 0, "since": ""} == {
        "checks": 3,
        "healthy": 2,
        "degraded": 1,
        "last_status": "healthy",
        "last_took_ms": 0,
        "since": "",
    }


async def test_an_owner_that_does_not_answer_is_a_finding(system: System) -> None:
    class Away:
        name = "cache"

        async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
            raise OwnerUnavailable("cache", "no answer in time")

    cache, system._refs["cache"] = system._refs["cache"], Away()  # type: ignore[assignment]
    result = await HealthCheck(system.health).run()
    system._refs["cache"] = cache

    assert result.status is HealthStatus.DEGRADED
    assert result.details["owners"]["cache"] == {
        "reachable": False,
        "reason": "no answer in time",
    }
    assert (await HealthCheck(system.health).run()).status is HealthStatus.HEALTHY


def test_patterns_have_deployments_too() -> None:
    models = [entry("m", "openai/a"), entry("openai/*", "openai/*"), entry("n", "openai/a")]
    groups = by_group(ModelTable.build(GatewayConfig(model_list=models)))

    assert {name: len(found) for name, found in groups.items()} == {"m": 1, "n": 1, "openai/*": 1}


# --- from Python ------------------------------------------------------------------------------


def test_a_gateway_says_how_it_is() -> None:
    config = GatewayConfig(model_list=[entry("m", "openai/a")])
    with LiteLLMGateway(config, runtime="inline") as gateway:
        result = gateway.check_health()
        told = gateway.run(gateway.get_health())
        stats = gateway.health_check.stats()

    assert result.status == "healthy", result.message
    assert told["details"]["checks"].keys() == {*CONCERNS, *MORE}
    assert (stats["checks"], stats["last_status"]) == (2, "healthy")


def test_where_health_is_not_monitored_nothing_is_claimed() -> None:
    config = GatewayConfig(model_list=[entry("m", "openai/a")], enable_health_monitoring=False)
    with LiteLLMGateway(config, runtime="inline") as gateway:
        result = gateway.check_health()
        attribute = gateway.health_check

    assert result.status == "unknown"
    assert attribute is None
