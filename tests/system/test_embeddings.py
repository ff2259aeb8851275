"""Texts of many callers on a whole system, with the upstream's log as the judge.

With FOREBAY_CHAOS_FULL the full counts. What was measured is printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from typing import Any

import httpx
import pytest

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
ON_THE_WAY_S = 0.5
"""How long before a kill a call may have ended whose answer was not handed on yet."""


def calls(upstream: Upstream) -> list[Record]:
    return [record for record in upstream.log() if record.route == "embeddings"]


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

    with capsys.disabled():
        print(
            f"\n{TEXTS} texts, {CLIENTS} clients: {len(seen)} calls, "
            f"{result.requests_per_s:.0f} requests/s, "
            f"p50 {result.p50_ms} ms, p99 {result.p99_ms} ms"
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
    with capsys.disabled():
        print(f"\n{TEXTS} texts, {len(failed)} bad: {len(seen)} calls, {refused} of them refused")
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
    with capsys.disabled():
        print(
            f"\n{KILLS} kills: {asked} requests, {paid} tokens paid, {charged} charged, "
            f"{lost} under way at a kill"
        )
    assert rows == rows_before + asked
    assert booked - booked_before == charged
    assert charged <= paid <= charged + lost


def _was_under_way(record: Record, killed_ns: list[int]) -> bool:
    end_ns = record.end_ns or record.start_ns + 60 * 10**9
    slack_ns = int(ON_THE_WAY_S * 1e9)
    return any(record.start_ns <= at_ns <= end_ns + slack_ns for at_ns in killed_ns)
