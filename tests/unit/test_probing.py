"""Probing open deployments on purpose: only where it is asked for, one at a time, and booked."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batcher.policy import Vectors
from actors.circuit_breaker.owner import CircuitBreaker
from actors.circuit_breaker.policy import Pass, State, Verdict
from actors.rate_limiter.terms import Hold
from actors.ref import InlineRef, OwnerRef
from forebay.codec import Answer
from forebay.config import SystemConfig
from forebay.errors import GatewayError, ProviderConnectionError, RateLimitError
from forebay.probing import PROBER, Prober
from forebay.providers.local import InProcessModels
from forebay.routing import Deployment
from forebay.system import Boot, System, owners
from tests.support.fake_time import FakeTime, settle

OPEN_S = 60.0
RULES = {"failure_threshold": 2, "success_threshold": 1, "timeout": OPEN_S, "active_probe_s": 10}
MODELS = {"m": "openai/a", "e": "openai/text-embedding-x", "openai/*": "openai/*"}


class Upstream:
    """A provider that answers, or fails as it is told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.failure: GatewayError | None = None

    async def chat(self, deployment: Deployment, body: Mapping[str, Any], **_: Any) -> Answer:
        self.asked.append((deployment.model, body))
        if self.failure is not None:
            raise self.failure
        usage = {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}
        return Answer({"choices": []}, usage, 7, deployment.model)

    async def embed(
        self, deployment: Deployment, texts: Sequence[str], params: Any, **_: Any
    ) -> Vectors:
        self.asked.append((deployment.model, texts))
        return Vectors(np.ones((1, 4), np.float32), 2, 3, deployment.model)

    def price_version(self, deployment: Deployment) -> str:
        return "list 1"

    def price_bound(self, deployment: Deployment) -> None:
        return None

    async def warm(self) -> None:
        pass

    def price(self, deployment: Deployment, *_: Any, **__: Any) -> int | None:
        return 1

    def count_tokens(self, deployment: Deployment, text: str) -> int | None:
        return 1

    async def close(self) -> None:
        """Nothing is open."""


class House:
    """A system in which time passes when a test says so."""

    def __init__(self, data_dir: Path, **rules: Any) -> None:
        self.time = FakeTime()
        self.upstream = Upstream()
        models: list[dict[str, Any]] = [
            {"model_name": name, "litellm_params": {"model": model, "api_key": "k"}}
            for name, model in MODELS.items()
        ]
        models[1]["litellm_params"]["rpm"] = 1
        gateway = {"model_list": models, "circuit_breaker_config": RULES | rules}
        config = SystemConfig.model_validate({"gateway": gateway, "data_dir": str(data_dir)})
        refs: dict[str, OwnerRef] = {}
        for name, (cls, arguments) in owners(Boot()).items():
            timed = {"clock": self.time} if cls is CircuitBreaker else {}
            fresh = {"fresh": True} if name.startswith("rate-limiter") else {}
            refs[name] = InlineRef(name, cls(**arguments, **timed, **fresh))
        self.system = System(
            config,
            refs,
            runtime="inline",
            holder="here",
            private=True,
            models=InProcessModels(),
            more=lambda name, cls, arguments: InlineRef(name, cls(**arguments)),
            clock=self.time,
            rng=random.Random(1),
        )
        self.system.provider = self.upstream  # type: ignore[assignment]
        self.prober = Prober(self.system, self.time.sleep)

    def circuit(self, group: str) -> str:
        return next(d.circuit for d in self.system.table.deployments() if d.group == group)

    async def fails(self, group: str, calls: int = 2) -> None:
        for _ in range(calls):
            given = await self.system.breaker.admit(self.circuit(group))
            assert isinstance(given, Pass)
            self.system.breaker.judge(given, Verdict.UNREACHABLE)
        await settle()
        assert self.state(group) is State.OPEN

    def state(self, group: str) -> State:
        return self.system.breaker.standing(self.circuit(group)).state

    async def round(self) -> None:
        """One round, until its probes are over and everybody has heard of it."""
        self.prober.round()
        await asyncio.gather(*self.prober._under_way.values())
        await settle()


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    await house.system.start()
    yield house
    await house.prober.close()
    await house.system.close()


async def test_a_due_deployment_is_asked_for_one_token_and_comes_back(house: House) -> None:
    await house.fails("m")
    await house.time.advance(OPEN_S + 1)
    await house.round()

    [(model, body)] = house.upstream.asked
    assert (model, body["max_tokens"]) == ("openai/a", 1)
    assert house.state("m") is State.CLOSED
    assert house.prober.stats()["success"] == 1


async def test_nothing_is_asked_of_those_that_are_closed_or_not_due(house: House) -> None:
    await house.fails("m")
    await house.time.advance(OPEN_S / 2)
    await house.round()

    assert not house.upstream.asked


async def test_what_an_operator_keeps_open_is_left_alone(house: House) -> None:
    await house.system.breaker.force(house.circuit("m"), State.FORCED_OPEN)
    await settle()
    await house.time.advance(1000)
    await house.round()

    assert not house.upstream.asked


async def test_a_probe_that_fails_opens_it_for_longer(house: House) -> None:
    await house.fails("m")
    house.upstream.failure = ProviderConnectionError("refused", upstream_status=None)
    await house.time.advance(OPEN_S + 1)
    await house.round()

    assert house.state("m") is State.OPEN
    assert house.system.breaker.standing(house.circuit("m")).retry_after_s > OPEN_S
    assert house.prober.stats()["unreachable"] == 1


async def test_a_probe_is_in_the_ledger_and_under_nobodys_name(house: House) -> None:
    await house.fails("m")
    await house.time.advance(OPEN_S + 1)
    await house.round()
    books = house.system.books
    booked, default = await books.usage(tenant=PROBER), await books.usage(tenant="default")

    assert (booked["total_requests"], booked["total_cost_nano"]) == (1, 7)
    assert booked["total_tokens"] == 6
    assert default["total_requests"] == 0


async def test_a_failed_probe_costs_nothing_and_is_booked_all_the_same(house: House) -> None:
    await house.fails("m")
    house.upstream.failure = ProviderConnectionError("refused")
    await house.time.advance(OPEN_S + 1)
    await house.round()
    booked = await house.system.books.usage(tenant=PROBER)

    assert booked["total_cost_nano"] == 0
    assert house.system._ledger.stats()["recorded"] == 1
    assert house.system._ledger.stats()["open"] == 0


async def test_a_probe_obeys_what_the_provider_asks_for(house: House) -> None:
    await house.fails("m")
    house.upstream.failure = RateLimitError("slow down", upstream_status=429, retry_after_s=30.0)
    await house.time.advance(OPEN_S + 1)
    await house.round()
    await house.time.advance(20)
    await house.round()

    assert len(house.upstream.asked) == 1


async def test_embeddings_are_probed_with_a_word(house: House) -> None:
    await house.fails("e")
    await house.time.advance(OPEN_S + 1)
    await house.round()

    assert house.upstream.asked == [("openai/text-embedding-x", ["ping"])]
    assert house.state("e") is State.CLOSED


async def test_a_probe_keeps_to_the_deployments_own_limits(house: House) -> None:
    await house.fails("e")
    await house.time.advance(OPEN_S + 1)
    deployment = house.system.table.group("e").deployments[0]
    assert isinstance(await house.system.quotas.take_texts(deployment, ["the minute's one"]), Hold)
    await house.round()

    assert not house.upstream.asked
    assert house.prober.stats()["limited"] == 1
    assert house.state("e") is State.HALF_OPEN, "the lease went back, and nobody is to blame"


async def test_there_is_one_probe_however_many_look(house: House) -> None:
    await house.fails("m")
    await house.time.advance(OPEN_S + 1)
    other = Prober(house.system, house.time.sleep)
    house.prober.round()
    other.round()
    house.prober.round()
    await settle(100)

    assert len(house.upstream.asked) == 1


async def test_names_that_callers_fill_in_are_left_to_callers(house: House) -> None:
    await house.fails("openai/*")
    await house.time.advance(OPEN_S + 1)
    await house.round()

    assert not house.upstream.asked


async def test_it_goes_by_the_period_and_stops(house: House) -> None:
    await house.prober.start()
    await house.fails("m")
    await house.time.advance(OPEN_S + 21)
    await settle(100)
    asked = len(house.upstream.asked)
    await house.prober.close()
    await house.fails("m")
    await house.time.advance(10 * OPEN_S)

    assert asked == 1
    assert len(house.upstream.asked) == 1


async def test_nobody_who_did_not_ask_for_it_pays(tmp_path: Path) -> None:
    house = House(tmp_path, active_probe_s=None)
    await house.system.start()
    await house.prober.start()
    await house.fails("m")
    await house.time.advance(10 * OPEN_S)

    assert house.prober.stats()["period_s"] is None
    assert not house.upstream.asked
    await house.prober.close()
    await house.system.close()
