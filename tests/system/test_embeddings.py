"""Texts of many callers on a whole system, with the upstream's log as the judge.

With FOREBAY_CHAOS_FULL the full counts. What was measured is printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import pytest

from actors.batcher.callers import BUSY_S
from actors.batcher.courier import Courier
from actors.batcher.desk import BatcherDesk
from actors.batcher.owner import Batcher
from actors.batcher.policy import Lane, Order, Text, Vectors
from actors.batcher.spread import CALM_S
from actors.ref import OwnerRef
from forebay import LiteLLMGateway, errors
from tests.support.loader import Load, in_process
from tests.support.owners import alive_again, handle_of
from tests.support.simulator.truth import vectors
from tests.support.upstream import Record, Upstream

pytestmark = pytest.mark.ray

FULL = bool(os.environ.get("FOREBAY_CHAOS_FULL"))
TEXTS = 10_000 if FULL else 2_000
CLIENTS = 200
PER_CALL = 20
ATTACHED = 64  # callers in a process of their own: more would queue at their tenant's limit
KILLS = 20 if FULL else 4
DIMENSIONS = 8
UPSTREAM = {"concurrency": 4, "latency": 0.05, "latency_per_text": 0.00025}
BODY = json.dumps(
    {
        "model": "sim-embed",
        "input": "text @UNIQUE@",
        "encoding_format": "base64",
        "dimensions": DIMENSIONS,
    }
)
LEDGER_S = 20.0
ACTORS, TASKS_EACH = 3, 100
SHARDS = ("batcher-0", "batcher-1")
CALL_S = 0.03
BUSY_WITHIN_S = 30.0
ON_THE_WAY_S = 0.5
"""How long before a kill a call may have ended whose answer was not handed on yet."""


def calls(upstream: Upstream) -> list[Record]:
    return [record for record in upstream.log() if record.route == "embeddings"]


def tell(capsys: pytest.CaptureFixture[str], what: str) -> None:
    with capsys.disabled():
        print(f"\nembeddings: {what}")


async def usage(client: httpx.AsyncClient) -> tuple[int, int]:
    told = (await client.get("/v1/usage")).json()
    return told["total_requests"], told["prompt_tokens"]


async def usage_of(client: httpx.AsyncClient, requests: int) -> tuple[int, int]:
    """What the ledger has, once it has so many requests."""
    deadline = time.monotonic() + LEDGER_S
    while True:
        told = await usage(client)
        if told[0] >= requests or time.monotonic() > deadline:
            return told
        await asyncio.sleep(0.2)


async def ask(client: httpx.AsyncClient, text: str) -> int:
    """One text; its right vector. The tokens that were charged."""
    body = {"model": "sim-embed", "input": text, "dimensions": DIMENSIONS}
    response = await client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    told = response.json()
    (datum,) = told["data"]
    assert datum["embedding"] == pytest.approx(vectors([text], DIMENSIONS)[0].tolist(), abs=1e-6)
    return int(told["usage"]["prompt_tokens"])


async def test_single_texts_of_two_hundred_clients_are_few_upstream_calls(
    url: str, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await ask(client, "the first one pays for imports")
        upstream.script(**UPSTREAM)
        before, charged_before = await usage(client)
        paid_before = sum(record.prompt_tokens for record in calls(upstream))
        made = len(calls(upstream))
        load = Load(
            f"{url}/v1/embeddings",
            concurrency=CLIENTS,
            requests=TEXTS,
            body=BODY,
            check=True,
            dimensions=DIMENSIONS,
        )
        result = await asyncio.to_thread(in_process, load)
        seen = calls(upstream)[made:]
        rows, charged = await usage_of(client, before + TEXTS)

    tell(
        capsys,
        f"{TEXTS} texts, {CLIENTS} clients: {len(seen)} calls, "
        f"{result.requests_per_s:.0f} requests/s, "
        f"p50 {result.p50_ms} ms, p99 {result.p99_ms} ms",
    )
    assert result.statuses == {"200": TEXTS}, result.errors
    assert result.wrong == 0
    assert sum(record.texts for record in seen) == TEXTS
    assert len(seen) <= TEXTS / PER_CALL
    assert rows == before + TEXTS
    assert charged - charged_before == sum(r.prompt_tokens for r in calls(upstream)) - paid_before


async def test_exactly_the_bad_texts_fail(
    ray_driver: Any, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """One text in a hundred is bad; callers are tasks of a process that is attached."""
    texts = [f"row {n}" + (" [[poison]]" if n % 100 == 37 else "") for n in range(TEXTS)]
    places = asyncio.Semaphore(ATTACHED)
    failed: set[int] = set()
    async with LiteLLMGateway(runtime="ray") as gateway:
        await gateway.embed_async("the first", model="sim-embed", dimensions=DIMENSIONS)
        upstream.script(**UPSTREAM)

        async def embed(number: int) -> None:
            async with places:
                try:
                    told = await gateway.embed_async(
                        texts[number], model="sim-embed", dimensions=DIMENSIONS
                    )
                except errors.InvalidRequest:
                    failed.add(number)
                    return
            right = vectors([texts[number]], DIMENSIONS)
            assert told.array == pytest.approx(right, abs=1e-6)

        await asyncio.gather(*(embed(number) for number in range(TEXTS)))
    seen = calls(upstream)
    refused = sum(record.fault == "poison" for record in seen)
    tell(capsys, f"{TEXTS} texts, {len(failed)} bad: {len(seen)} calls, {refused} of them refused")
    assert failed == {n for n in range(TEXTS) if n % 100 == 37}
    assert len(seen) < TEXTS / 2


async def test_a_batcher_that_is_killed_again_and_again_fails_nobody(
    ray_driver: Any, url: str, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is charged twice: what is paid and not charged was under way at a kill."""
    stopped, killed_ns, charged, asked = asyncio.Event(), list[int](), 0, 0
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=90, limits=limits) as client:
        await ask(client, "the first")
        rows_before, booked_before = await usage(client)
        upstream.script(**UPSTREAM)
        paid_before = sum(record.prompt_tokens for record in calls(upstream))

        async def caller(number: int) -> None:
            nonlocal charged, asked
            while not stopped.is_set():
                asked += 1
                tokens = await ask(client, f"caller {number} asks {asked}")
                charged += tokens

        def kill() -> None:
            for _ in range(KILLS):
                time.sleep(0.7)
                killed_ns.append(time.time_ns())
                ray_driver.kill(handle_of(ray_driver, "batcher"), no_restart=True)
                alive_again(ray_driver, "batcher")
            time.sleep(1.0)

        callers = [asyncio.create_task(caller(number)) for number in range(32)]
        await asyncio.to_thread(kill)
        stopped.set()
        await asyncio.gather(*callers)
        rows, booked = await usage_of(client, rows_before + asked)

    seen = calls(upstream)
    paid = sum(record.prompt_tokens for record in seen) - paid_before
    lost = sum(record.prompt_tokens for record in seen if _was_under_way(record, killed_ns))
    tell(
        capsys,
        f"{KILLS} kills: {asked} requests, {paid} tokens paid, {charged} charged, "
        f"{lost} under way at a kill",
    )
    assert rows == rows_before + asked
    assert booked - booked_before == charged
    assert charged <= paid <= charged + lost


def _was_under_way(record: Record, killed_ns: list[int]) -> bool:
    end_ns = record.end_ns or record.start_ns + 60 * 10**9
    slack_ns = int(ON_THE_WAY_S * 1e9)
    return any(record.start_ns <= at_ns <= end_ns + slack_ns for at_ns in killed_ns)


class Asker:
    """A process of its own on the cluster, with a gateway for all tasks that run in it."""

    def __init__(self) -> None:
        self.gateway = LiteLLMGateway(runtime="ray")

    async def embed(self, number: int) -> tuple[int, np.ndarray[Any, Any]]:
        told = await self.gateway.embed_async(
            f"task {number}", model="sim-embed", dimensions=DIMENSIONS
        )
        return number, told.array[0]


def test_hundreds_of_ray_tasks_at_once_share_their_calls(
    ray_driver: Any, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    askers = [ray_driver.remote(num_cpus=0.1)(Asker).remote() for _ in range(ACTORS)]
    ray_driver.get([asker.embed.remote(-1 - which) for which, asker in enumerate(askers)])
    upstream.script(**UPSTREAM)
    made = len(calls(upstream))
    tasks = [
        asker.embed.remote(ACTORS * n + which)
        for n in range(TASKS_EACH)
        for which, asker in enumerate(askers)
    ]
    told = dict(ray_driver.get(tasks))
    for asker in askers:
        ray_driver.kill(asker)
    seen = calls(upstream)[made:]
    tell(capsys, f"{len(tasks)} tasks of {ACTORS} processes: {len(seen)} calls")
    assert sorted(told) == list(range(ACTORS * TASKS_EACH))
    right = vectors([f"task {number}" for number in sorted(told)], DIMENSIONS)
    np.testing.assert_allclose([told[number] for number in sorted(told)], right, atol=1e-6)
    assert sum(record.texts for record in seen) == len(tasks)
    assert len(seen) <= len(tasks) / 5


class Tiring(Batcher):
    """A Batcher whose provider says how much of a core it takes: much, where texts are hard."""

    def __init__(self) -> None:
        super().__init__(lambda: self.provide, cpu=lambda: self.worked_s)
        self.worked_s = 0.0

    async def provide(self, lane: Lane, texts: list[Text], timeout_s: float) -> Vectors:
        if str(texts[0]).startswith("hard"):
            self.worked_s += 10 * CALL_S
        await asyncio.sleep(CALL_S)
        return Vectors(vectors([str(text) for text in texts], DIMENSIONS), len(texts), 1, "m")


class Crowd:
    """Desks of as many processes, on a clock that can be put forward."""

    def __init__(self, lines: Callable[[], list[OwnerRef]]) -> None:
        self.ahead_s = 0.0
        self.asked = 0
        self.desks = [BatcherDesk(lines(), f"process-{number}", self.now) for number in range(8)]

    def now(self) -> float:
        return time.monotonic() + self.ahead_s

    async def ask(self, desk: BatcherDesk, kind: str) -> None:
        self.asked += 1
        text = f"{kind} {self.asked}"
        share = await desk.embed(Lane("busy"), [text], Order(timeout_s=60.0))
        assert share.array == pytest.approx(vectors([text], DIMENSIONS), abs=1e-6)

    async def all_at_once(self, times: int) -> None:
        for _ in range(times):
            await asyncio.gather(*(self.ask(desk, "easy") for desk in self.desks))


async def test_a_busy_lane_spreads_over_shards_and_comes_together_again(
    ray_driver: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from actors.spawn import OwnerSpec, RayRef, remove

    namespace = "shards-of-a-test"
    specs = [OwnerSpec(name, Tiring) for name in SHARDS]
    crowd = Crowd(lambda: [Courier(RayRef(spec, namespace)) for spec in specs])

    async def stats() -> list[dict[str, Any]]:
        return [
            await ray_driver.get_actor(name, namespace=namespace).stats.remote() for name in SHARDS
        ]

    async def texts() -> list[int]:
        return [one.get("texts", 0) for one in await stats()]

    try:
        for spec in specs:
            await RayRef(spec, namespace).ask("protocol", timeout_s=60.0)
        await crowd.all_at_once(10)
        home = (await texts()).index(80)
        assert (await texts())[1 - home] == 0
        made = (await stats())[home]["provider_calls"]

        begun_s, stopped = time.monotonic(), False

        async def caller(desk: BatcherDesk) -> None:
            while not stopped:
                await crowd.ask(desk, "hard")

        busy = [asyncio.create_task(caller(desk)) for desk in crowd.desks for _ in range(4)]
        while (await texts())[1 - home] == 0 and time.monotonic() - begun_s < BUSY_WITHIN_S:
            await asyncio.sleep(0.1)
        spread_s = time.monotonic() - begun_s
        await asyncio.sleep(0.5)
        both, stopped = await texts(), True
        await asyncio.gather(*busy)
        for _ in range(2):  # the shards look at what they took, and at what they take since
            await asyncio.sleep(1.2 * BUSY_S)
            await crowd.all_at_once(1)

        crowd.ahead_s = 3 * CALM_S
        before = await stats()
        await crowd.all_at_once(10)
        after = await stats()
        again = after[home]["provider_calls"] - before[home]["provider_calls"]
        tell(
            capsys,
            f"80 texts: {made} calls; busy after {spread_s:.1f} s, texts on its home and "
            f"elsewhere {both[home]}, {both[1 - home]}; 80 texts then: {again} calls",
        )
        assert min(both) > 0
        assert after[1 - home]["texts"] == before[1 - home]["texts"]
        assert after[home]["texts"] - before[home]["texts"] == 80
        assert sum(await texts()) == crowd.asked
    finally:
        for spec in specs:
            remove(spec, namespace)
