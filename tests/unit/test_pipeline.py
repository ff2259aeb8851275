"""A request's nine steps, over a whole system of real owners and a provider that does as told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.batcher.policy import Vectors
from actors.ledger.policy import Entry
from forebay.codec import Answer
from forebay.config import SystemConfig
from forebay.errors import (
    GatewayError,
    GatewayTimeout,
    ModelNotFound,
    ProviderError,
    RateLimitError,
)
from forebay.pipeline import Call, Pipeline
from forebay.providers.base import Chunks, Resolve
from forebay.routing import Deployment
from forebay.system import System, open_inline
from tests.support.fake_time import settle

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


Step = GatewayError | asyncio.Event | tuple[asyncio.Event, GatewayError]


class Scripted:
    """A provider that answers "fine" unless told what to do, by deployment model.

    What it is told is a list of steps, one for each call: an error to raise, an event to wait
    for, or both. For streams, `cut` raises after the first chunk.
    """

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.steps: dict[str, list[Step]] = {}
        self.cut: GatewayError | None = None
        self.streams_open = 0

    async def chat(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer:
        await self._step(deployment)
        message = {"role": "assistant", "content": "fine"}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "1", "object": "chat.completion", "choices": [choice], "usage": USAGE}
        return Answer(whole, USAGE, 7, deployment.model)

    completion = chat

    async def _chunks(self, deployment: Deployment) -> AsyncIterator[dict[str, Any]]:
        self.streams_open += 1
        try:
            await self._step(deployment)
            for word in ("one", "two"):
                yield {"choices": [{"index": 0, "delta": {"content": word}}]}
                if self.cut is not None:
                    raise self.cut
            yield {"choices": [], "usage": USAGE}
        finally:
            self.streams_open -= 1

    def chat_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Chunks:
        return self._chunks(deployment)  # type: ignore[return-value]

    completion_stream = chat_stream

    async def embed(
        self,
        deployment: Deployment,
        texts: Sequence[str],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Vectors:
        await self._step(deployment)
        return Vectors(np.ones((len(texts), 4), np.float32), len(texts), 9, deployment.model)

    def price(
        self,
        deployment: Deployment,
        usage: Mapping[str, Any] | None,
        *,
        model: str | None = None,
    ) -> int | None:
        return 7

    async def warm(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def _step(self, deployment: Deployment) -> None:
        self.asked.append(deployment.model)
        steps = self.steps.get(deployment.model) or []
        step = steps.pop(0) if steps else None
        gate, error = step if isinstance(step, tuple) else (step, step)
        if isinstance(gate, asyncio.Event):
            await gate.wait()
        if isinstance(error, GatewayError):
            raise error


class House:
    """A system, its scripted provider, and its books."""

    def __init__(self, system: System, provider: Scripted) -> None:
        self.system = system
        self.provider = provider
        self.pipeline: Pipeline = system.pipeline
        self._number = 0

    def call(self, text: str = "hello", model: str = "m", **details: Any) -> Call:
        self._number += 1
        body = {"model": model, "messages": [{"role": "user", "content": text}]}
        return Call("chat", body, "acme", f"req_{self._number}", **details)

    async def entries(self, call: Call) -> list[Entry]:
        await self.system._ledger.flush()
        found: list[Entry] = await self.system._refs["ledger"].ask("entries", call.request_id)
        return found

    @property
    def at_rest(self) -> bool:
        """Whether nothing is held for anybody: slots, open entries, flights, streams."""
        return (
            self.system.limiter.stats()["slots_used"] == 0
            and self.system._ledger.stats()["open"] == 0
            and self.system.cache.stats()["leading"] == 0
            and self.system.cache.stats()["following"] == 0
            and self.provider.streams_open == 0
        )


Open = Callable[..., Awaitable[House]]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Open]:
    systems: list[System] = []

    async def build(**gateway: Any) -> House:
        groups = {"m": ["a"], "two": ["a", "b"], "spare": ["c"], "e": ["text-embedding-x"]}
        entries = [
            {"model_name": name, "litellm_params": {"model": f"openai/{model}", "api_key": "k"}}
            for name, models in groups.items()
            for model in models
        ]
        whole = {"model_list": entries, "retry_delay": 0.1, **gateway}
        config = SystemConfig.model_validate({"gateway": whole, "data_dir": str(tmp_path)})
        system = await open_inline(config)
        systems.append(system)
        system.provider = provider = Scripted()
        return House(system, provider)

    yield build
    for system in systems:
        await system.close()


LIMITS = {
    "requests_per_minute": 60,
    "requests_per_hour": 1000,
    "burst_size": 5,
    "concurrent_requests": 1,
}


async def test_an_answer_leaves_one_posted_entry_and_nothing_held(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    call = here.call()
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert result.answer.body["choices"][0]["message"]["content"] == "fine"
    assert (entry.status, entry.prompt_tokens, entry.cost_nano) == ("posted", 3, 7)
    assert here.at_rest


async def test_the_check_comes_first_and_counts_nothing(house: Open) -> None:
    here = await house(rate_limit_config={**LIMITS, "burst_size": 1})
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            await here.pipeline.answer(here.call(model="nobody"))

    await here.pipeline.answer(here.call())
    with pytest.raises(RateLimitError):
        await here.pipeline.answer(here.call("more"))


async def test_a_hit_costs_nothing_and_asks_nobody(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(here.call())
    again = here.call()
    result = await here.pipeline.answer(again)

    (entry,) = await here.entries(again)
    assert here.provider.asked == ["openai/a"]
    assert (result.facts.cache, result.facts.cost_nano) == ("hit", 0)
    assert (entry.status, entry.cost_nano) == ("hit", 0)


async def test_every_attempt_has_an_entry(house: Open) -> None:
    here = await house(max_retries=1)
    down = ProviderError("down", upstream_status=500)
    here.provider.steps["openai/a"] = [down]
    here.provider.steps["openai/b"] = [down]
    call = here.call(model="two")
    with pytest.raises(ProviderError, match="down"):
        await here.pipeline.answer(call)

    entries = await here.entries(call)
    assert [(e.attempt, e.status) for e in entries] == [(1, "voided"), (2, "voided")]
    assert sorted(here.provider.asked) == ["openai/a", "openai/b"]


async def test_a_throttled_group_is_left_for_its_fallback_when_the_wait_is_too_long(
    house: Open,
) -> None:
    here = await house(fallbacks=[{"m": ["spare"]}], enable_circuit_breaker=False)
    slow = RateLimitError("slow down", retry_after_s=3600.0, upstream_status=429)
    here.provider.steps["openai/a"] = [slow]
    result = await here.pipeline.answer(here.call())

    assert here.provider.asked == ["openai/a", "openai/c"]
    assert result.facts.fallbacks == 1


async def test_without_a_fallback_the_throttles_own_error_is_what_callers_get(house: Open) -> None:
    here = await house()
    slow = RateLimitError("slow down", retry_after_s=3600.0, upstream_status=429)
    here.provider.steps["openai/a"] = [slow]
    with pytest.raises(RateLimitError) as caught:
        await here.pipeline.answer(here.call())

    assert caught.value.retry_after_s == 3600.0


@pytest.mark.parametrize("caching", [True, False])
async def test_cancelling_gives_everything_back(house: Open, caching: bool) -> None:
    here = await house(rate_limit_config=LIMITS, enable_caching=caching)
    here.provider.steps["openai/a"] = [asyncio.Event()]
    call = here.call()
    task = asyncio.create_task(here.pipeline.answer(call))
    while not here.provider.asked:
        await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    (entry,) = await here.entries(call)
    assert (entry.status, entry.http_status) == ("voided", 499)
    assert here.at_rest
    await here.pipeline.answer(here.call())  # the only slot is free


async def test_a_refusal_for_want_of_a_slot_gives_the_count_back(house: Open) -> None:
    here = await house(rate_limit_config={**LIMITS, "burst_size": 2})
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    first = asyncio.create_task(here.pipeline.answer(here.call("first")))
    while not here.provider.asked:
        await settle()
    for n in range(3):
        with pytest.raises(RateLimitError, match="concurrent"):
            await here.pipeline.answer(here.call(f"second {n}"))
    gate.set()
    await first

    await here.pipeline.answer(here.call("third"))


async def test_followers_of_a_failed_leader_get_its_error(house: Open) -> None:
    here = await house(max_retries=0)
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [(gate, ProviderError("down for all"))]
    tasks = [asyncio.create_task(here.pipeline.answer(here.call())) for _ in range(3)]
    while not here.provider.asked:
        await settle()
    await settle()
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(result) for result in results] == ["down for all"] * 3
    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


async def test_a_leaders_own_deadline_is_not_its_followers(house: Open) -> None:
    here = await house()
    here.provider.steps["openai/a"] = [asyncio.Event()]  # the first call hangs
    hurried = asyncio.create_task(here.pipeline.answer(here.call(timeout_s=0.05)))
    while not here.provider.asked:
        await settle()
    patient = asyncio.create_task(here.pipeline.answer(here.call()))

    with pytest.raises(GatewayTimeout):
        await hurried
    assert (await patient).answer.body["choices"]
    assert len(here.provider.asked) == 2


async def test_an_own_deadline_is_not_retried_and_blames_nobody(house: Open) -> None:
    here = await house(max_retries=5, circuit_breaker_config={"failure_threshold": 1})
    here.provider.steps["openai/a"] = [asyncio.Event()]
    call = here.call(timeout_s=0.01)
    with pytest.raises(GatewayTimeout):
        await here.pipeline.answer(call)

    assert here.provider.asked == ["openai/a"]
    await here.pipeline.answer(here.call())


async def test_a_stream_fails_over_before_its_first_chunk(house: Open) -> None:
    here = await house(fallbacks=[{"m": ["spare"]}], max_retries=0)
    here.provider.steps["openai/a"] = [ProviderError("down", upstream_status=500)]
    call = here.call()
    stream = await here.pipeline.stream(call)
    words = [c["choices"][0]["delta"]["content"] async for c in stream.chunks if c["choices"]]

    assert words == ["one", "two"]
    assert here.provider.asked == ["openai/a", "openai/c"]
    assert [e.status for e in await here.entries(call)] == ["voided", "posted"]
    assert here.at_rest


async def test_a_stream_never_fails_over_after_its_first_chunk(house: Open) -> None:
    here = await house(fallbacks=[{"m": ["spare"]}])
    here.provider.cut = ProviderError("cut", upstream_status=502)
    call = here.call()
    stream = await here.pipeline.stream(call)
    assert (await anext(stream.chunks))["choices"]
    with pytest.raises(ProviderError, match="cut"):
        await anext(stream.chunks)

    (entry,) = await here.entries(call)
    assert here.provider.asked == ["openai/a"]
    assert (entry.status, entry.error) == ("posted", "ProviderError: cut")
    assert here.at_rest


@pytest.mark.parametrize("taken", [0, 1])
async def test_closing_a_stream_settles_it_however_little_was_taken(
    house: Open, taken: int
) -> None:
    here = await house(rate_limit_config=LIMITS)
    call = here.call()
    stream = await here.pipeline.stream(call)
    for _ in range(taken):
        await anext(stream.chunks)
    await stream.chunks.aclose()
    await stream.chunks.aclose()

    assert here.at_rest
    assert [e.status for e in await here.entries(call)] == ["posted"]


async def test_a_stream_that_nobody_ever_takes_settles_when_it_is_dropped(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    stream = await here.pipeline.stream(here.call())
    del stream
    await settle()

    assert here.at_rest


async def test_embeddings_come_in_order_and_are_booked(house: Open) -> None:
    here = await house()
    call = Call("embedding", {"model": "e", "input": ["x", "y"]}, "acme", "req_e")
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert result.answer.array is not None
    assert result.answer.array.shape == (2, 4)
    assert (entry.status, entry.prompt_tokens, entry.cost_nano) == ("posted", 2, 9)
