"""The breaker's owner killed under load: what was open stays open, one probe at a time."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.support import oracle
from tests.support.owners import Load, alive_again, handle_of
from tests.support.upstream import Record, Upstream

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

FULL = bool(os.environ.get("FOREBAY_CHAOS_FULL"))
KILLS = 10 if FULL else 1
SEED = int(os.environ.get("FOREBAY_CHAOS_SEED") or random.SystemRandom().randrange(2**31))
OWNER = "circuit-breaker"
CURSED = "sim-reset=before+latency=0.1"  # as its model is called at the simulator
CALLERS = 8
OPEN_S = 1.0
OPEN_S_MOST = 8.0  # after the few probes of this test
LEASE_S = 5.0
PROBES_AT_FIRST = 4  # until opening again has doubled the time twice


@pytest.mark.parametrize("for_good", [False, True], ids=["restarts", "for good"])
async def test_an_open_circuit_outlives_its_owner(
    ray_driver: Any,
    url: str,
    upstream: Upstream,
    capsys: pytest.CaptureFixture[str],
    for_good: bool,
) -> None:
    """Callers ask a dead deployment all the time, and 16 calls to a good one are under way."""
    rng = random.Random(f"{SEED} {for_good}")
    upstream.script(latency=0.2)
    load = Load(url, upstream)
    stopped = asyncio.Event()
    told: Counter[int] = Counter()

    async def caller(client: httpx.AsyncClient, number: int) -> None:
        asked = 0
        while not stopped.is_set():
            asked += 1
            text = f"cursed {number} {asked}"
            body = {"model": "cursed", "messages": [{"role": "user", "content": text}]}
            response = await client.post("/v1/chat/completions", json=body)
            told[response.status_code] += 1
            await asyncio.sleep(0.1)

    def kill() -> None:
        for _ in range(KILLS):
            load.pause(rng.uniform(0.5, 1.0))
            ray_driver.kill(handle_of(ray_driver, OWNER), no_restart=for_good)
            alive_again(ray_driver, OWNER)
            load.pause(2.0)

    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        await _release(client)
        asking = [asyncio.create_task(caller(client, number)) for number in range(CALLERS)]
        try:
            await asyncio.sleep(1.0)  # it opens
            await load.run(kill)
            seen = sum(r.model == CURSED for r in upstream.log())
            await asyncio.to_thread(  # nor is it forgotten that it may be well again
                upstream.wait_log,
                lambda log: sum(r.model == CURSED for r in log) > seen,
                LEASE_S + OPEN_S_MOST,
            )
        finally:
            stopped.set()
            await asyncio.gather(*asking)
    calls = [r for r in upstream.log() if r.model == CURSED]
    probes, took_s = _after_opening(calls)
    most = oracle.most_at_once(probes)
    with capsys.disabled():
        print(
            f"\n  chaos: a breaker open while its owner is killed {KILLS} times "
            f"({'for good' if for_good else 'restarts'}), seed {SEED}, at least "
            f"{load.in_flight_min} in flight at each: {len(probes)} probes in {took_s:.0f} s, "
            f"at most {most} at once, answers {dict(told)}"
        )
    assert set(told) <= {502, 503}
    assert told[503] > told[502]
    assert most <= 1
    assert len(probes) <= PROBES_AT_FIRST + took_s / (4 * OPEN_S)
    assert set(load.statuses) == {200}, load.details[:3]


async def _release(client: httpx.AsyncClient) -> None:
    """Have the circuit closed, whatever it went through before."""
    board = (await client.get("/admin/breakers")).json()["data"]
    (name,) = [one["deployment"] for one in board if one["group"] == "cursed"]
    for state in ("closed", "auto"):
        told = await client.post(f"/admin/breakers/{name}", json={"state": state})
        assert told.status_code == 200, told.text


def _after_opening(calls: list[Record]) -> tuple[list[Record], float]:
    """The calls that were probes, and the seconds from the opening to the last of them."""
    opened_s = oracle.ends_s(calls)[4] + OPEN_S / 2
    probes = [r for r in calls if r.start_mono_ns / oracle.NANO > opened_s]
    return probes, oracle.starts_s(calls)[-1] - opened_s
