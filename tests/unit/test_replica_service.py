"""A replica's service over a whole system of real owners: readiness, health, breakers."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.circuit_breaker.policy import State
from actors.ledger.desk import ENTRIES_BUFFERED_MAX
from actors.rate_limiter.terms import Layout
from actors.ref import OwnerUnavailable
from actors.registry.policy import (
    InvalidDocument,
    RegistryFull,
    RegistryUnavailable,
    VersionConflict,
)
from deployments.gateway import PipelineService
from forebay.config import SystemConfig
from forebay.errors import ConfigurationError, InvalidRequest, Overloaded
from forebay.system import System, open_inline
from tests.support.fake_time import settle

KEY = "sk-canary-0123456789abcdef"
Open = Callable[..., Awaitable["House"]]


class House:
    """A service, the system below it, and whether it is told to stop."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.draining = False
        self.service = PipelineService(system, b"s" * 32, "127.0.0.1", lambda: self.draining)

    def circuit(self, model: str) -> str:
        return next(d.circuit for d in self.system.table.deployments() if d.model == model)

    async def rows(self) -> dict[str, dict[str, Any]]:
        """The rows of the board by group and model."""
        rows = (await self.service.breakers())["data"]
        return {f"{row['group']} {row['model']}": row for row in rows}

    def lose_the_breakers_owner(self) -> None:
        class Away:
            name = "circuit-breaker"

            async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
                raise OwnerUnavailable(self.name, "it died")

        self.system.breaker._ref = Away()  # type: ignore[assignment]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Open]:
    systems: list[System] = []

    async def build(**gateway: Any) -> House:
        entries = [
            {"model_name": name, "litellm_params": {"model": model, "api_key": KEY}}
            for name, model in (
                ("m", "openai/a"),
                ("m", "azure/b"),
                ("n", "openai/a"),
                ("openai/*", "openai/*"),
            )
        ]
        config = SystemConfig.model_validate(
            {"gateway": {"model_list": entries, **gateway}, "data_dir": str(tmp_path)}
        )
        systems.append(await open_inline(config))
        return House(systems[-1])

    yield build
    for system in systems:
        await system.close()


# --- breakers ---------------------------------------------------------------------------------


async def test_the_board_has_every_entry_of_the_configuration(house: Open) -> None:
    home = await house()
    rows = await home.rows()

    assert list(rows) == ["m openai/a", "m azure/b", "n openai/a", "openai/* openai/*"]
    assert rows["m openai/a"]["deployment"] == rows["n openai/a"]["deployment"]
    assert {row["state"] for row in rows.values()} == {"closed"}
    assert rows["m azure/b"]["provider"] == "azure"
    assert KEY not in json.dumps(await home.service.breakers())


async def test_rows_have_the_same_figures_whether_anybody_called_or_not(house: Open) -> None:
    home = await house()
    await home.service.set_breaker(home.circuit("openai/a"), "auto")
    rows = await home.rows()

    assert rows["m openai/a"].keys() == rows["m azure/b"].keys()


async def test_an_order_is_obeyed_and_taken_back(house: Open) -> None:
    home = await house()
    name = home.circuit("azure/b")
    states = []
    for order in ("open", "closed", "auto"):
        told = await home.service.set_breaker(name, order)
        await settle()  # the owner pushes it to every process
        assert told["deployment"] == name
        states.append((told["state"], home.system.breaker.standing(name).state))
        assert (await home.rows())["m azure/b"]["state"] == told["state"]

    assert states == [
        ("forced_open", State.FORCED_OPEN),
        ("forced_closed", State.FORCED_CLOSED),
        ("closed", State.CLOSED),
    ]


async def test_a_name_filled_into_a_pattern_is_its_patterns_breaker(house: Open) -> None:
    home = await house()
    filled = home.system.table.group("openai/gpt-9").deployments[0]
    told = await home.service.set_breaker(filled.id, "open")

    assert told["deployment"] == home.circuit("openai/*")


async def test_a_deployment_that_nobody_knows_is_named(house: Open) -> None:
    home = await house()
    with pytest.raises(InvalidRequest) as caught:
        await home.service.set_breaker("nowhere", "open")

    assert (caught.value.status, caught.value.code) == (404, "deployment_not_found")
    assert home.circuit("azure/b") in caught.value.message


async def test_no_order_is_taken_where_none_would_be_obeyed(house: Open) -> None:
    home = await house(enable_circuit_breaker=False)
    with pytest.raises(InvalidRequest) as caught:
        await home.service.set_breaker(home.circuit("azure/b"), "open")

    assert caught.value.status == 409


async def test_without_the_owner_the_board_tells_what_was_heard_last(house: Open) -> None:
    home = await house()
    name = home.circuit("azure/b")
    await home.service.set_breaker(name, "open")
    await settle()
    home.lose_the_breakers_owner()
    told = await home.service.breakers()
    with pytest.raises(Overloaded):
        await home.service.set_breaker(name, "auto")

    assert told["source"] == "replica"
    assert [row["state"] for row in told["data"] if row["deployment"] == name] == ["forced_open"]


# --- the configuration ------------------------------------------------------------------------


def three_owners(home: House) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(json.dumps(home.system.registry.document))
    return {**document, "server": {**document.get("server", {}), "limiter_shards": 3}}


def layouts(home: House) -> list[Any]:
    """The layout in force at each of the limiter's owners."""
    refs = [ref for name, ref in home.system._refs.items() if name.startswith("rate-limiter")]
    return [ref.owner._layout for ref in refs]  # type: ignore[attr-defined]


async def test_a_configuration_spreads_the_limiter_before_it_holds(house: Open) -> None:
    home = await house()
    version = await home.service.write_config(three_owners(home), None)

    assert layouts(home) == [Layout(version, 3)] * 3


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (RegistryUnavailable("registry.db", "disk full"), Overloaded),
        (RegistryFull("versions", 1), Overloaded),
        (OwnerUnavailable("registry", "it died"), Overloaded),
        (VersionConflict(0, 1), InvalidRequest),
        (InvalidDocument("too large"), InvalidDocument),
    ],
    ids=lambda given: type(given).__name__,
)
async def test_where_it_is_not_stored_the_limiters_owners_are_as_before(
    house: Open, failure: Exception, told: type[Exception]
) -> None:
    home = await house()
    before = home.system.config.server.limiter_shards
    document = three_owners(home)

    async def put(*_: Any) -> int:
        raise failure

    stored, home.system.registry.put = home.system.registry.put, put  # type: ignore[method-assign, assignment]
    with pytest.raises(told):
        await home.service.write_config(document, None)
    after = {layout.shards for layout in layouts(home)}
    home.system.registry.put = stored  # type: ignore[method-assign]
    version = await home.service.write_config(document, None)

    assert after == {before}
    assert layouts(home) == [Layout(version, 3)] * 3


async def test_a_configuration_that_names_a_validator_of_nobody_is_refused(house: Open) -> None:
    home = await house()
    document = json.loads(json.dumps(home.system.registry.document))
    document.setdefault("gateway", {})["validation"] = {"validators": ["nobodys"]}
    with pytest.raises(ConfigurationError, match="offers 'nobodys'"):
        await home.service.write_config(document, None)

    assert home.system.problem is None


# --- health -----------------------------------------------------------------------------------


async def test_a_replica_is_ready_until_it_drains(house: Open) -> None:
    home = await house()
    before = home.service.ready()
    home.draining = True

    assert before == (True, "ready")
    assert home.service.ready() == (False, "this replica is draining")


async def test_an_outage_of_every_provider_leaves_replicas_ready(house: Open) -> None:
    home = await house()
    for deployment in home.system.table.deployments():
        await home.service.set_breaker(deployment.circuit, "open")
    await settle()

    assert home.service.ready()[0]
    assert (await home.service.health(True))["status"] == "unhealthy"


async def test_a_replica_that_may_start_no_paid_call_is_not_ready(house: Open) -> None:
    home = await house()
    ledger = home.system._ledger
    ledger._opened += ENTRIES_BUFFERED_MAX
    full, _ = home.service.ready()
    status = (await home.service.health(True))["status"]
    ledger._opened -= ENTRIES_BUFFERED_MAX

    assert (full, status) == (False, "unhealthy")
    assert home.service.ready()[0]


async def test_without_a_model_a_replica_is_not_ready(tmp_path: Path) -> None:
    config = SystemConfig.model_validate({"gateway": {}, "data_dir": str(tmp_path)})
    system = await open_inline(config)

    assert House(system).service.ready() == (False, "no model is configured")
    await system.close()


async def test_details_hold_every_check_and_no_key(house: Open) -> None:
    home = await house()
    told = await home.service.health(True)

    assert told["status"] == "healthy"
    assert {"router", "circuit_breaker", "cache", "rate_limiter"} <= told["details"][
        "checks"
    ].keys()
    assert KEY not in json.dumps(told)
    assert await home.service.health(False) == {"status": "ok"}
