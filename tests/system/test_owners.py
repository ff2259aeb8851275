"""The owners as actors: named, supervised, killed under load, replaced, and rarely asked."""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter
from typing import Any

import httpx
import pytest

from actors.cache.owner import Cache
from tests.support.upstream import Upstream

pytestmark = pytest.mark.ray

NAMESPACE = "forebay"
OWNERS = ["registry", "rate-limiter-0", "circuit-breaker", "cache", "batcher", "ledger"]
IN_FLIGHT_MIN = 16


def handle_of(ray: Any, name: str) -> Any:
    return ray.get_actor(name, namespace=NAMESPACE)


def identity(ray: Any, name: str) -> str:
    return str(handle_of(ray, name)._actor_id.hex())


def alive_again(ray: Any, name: str, timeout_s: float = 30.0) -> Any:
    """The owner's handle once it answers."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            handle = handle_of(ray, name)
            ray.get(handle.protocol.remote(), timeout=5)
            return handle
        except (ValueError, ray.exceptions.RayError):
            assert time.monotonic() < deadline, f"{name} did not come back"
            time.sleep(0.05)


class Load:
    """Requests that keep at least IN_FLIGHT_MIN calls at the upstream, while something happens."""

    def __init__(self, url: str, upstream: Upstream) -> None:
        self._url = url
        self._upstream = upstream
        self.statuses: Counter[int] = Counter()
        self.details: list[str] = []
        self._stopped = asyncio.Event()
        self._number = 0

    async def run(self, during: Any) -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as client:
            callers = [asyncio.create_task(self._caller(client, n)) for n in range(32)]
            try:
                await self._in_flight()
                await asyncio.to_thread(during)
                await asyncio.sleep(1.0)
            finally:
                self._stopped.set()
                await asyncio.gather(*callers)

    async def _caller(self, client: httpx.AsyncClient, caller: int) -> None:
        while not self._stopped.is_set():
            self._number += 1
            text = f"caller {caller} asks question {self._number}"
            if caller % 4 == 0:
                response = await client.post(
                    "/v1/embeddings",
                    json={"model": "sim-embed", "input": [text], "dimensions": 8},
                )
            else:
                response = await client.post(
                    "/v1/chat/completions",
                    json={"model": "sim", "messages": [{"role": "user", "content": text}]},
                )
            self.statuses[response.status_code] += 1
            if response.status_code != 200:
                self.details.append(response.text[:300])

    async def _in_flight(self) -> None:
        """Wait until enough calls are under way at the upstream, by its own count."""
        for _ in range(300):
            stats = await asyncio.to_thread(self._upstream.stats)
            if stats["running"] >= IN_FLIGHT_MIN:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never {IN_FLIGHT_MIN} calls in flight: {stats}")


@pytest.mark.parametrize("owner", OWNERS)
@pytest.mark.parametrize("for_good", [False, True], ids=["restarts", "for good"])
async def test_the_system_goes_on_when_an_owner_is_killed(
    ray_driver: Any, url: str, upstream: Upstream, owner: str, for_good: bool
) -> None:
    upstream.script(latency=0.2)
    before = identity(ray_driver, owner)
    load = Load(url, upstream)

    def kill() -> None:
        ray_driver.kill(handle_of(ray_driver, owner), no_restart=for_good)

    await load.run(kill)
    await asyncio.to_thread(alive_again, ray_driver, owner)

    assert {200} == set(load.statuses), load.details[:3]
    assert load.statuses[200] > IN_FLIGHT_MIN
    assert (identity(ray_driver, owner) != before) == for_good


async def test_what_a_ledger_that_died_had_acknowledged_is_still_there(
    ray_driver: Any, url: str, upstream: Upstream
) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        before = (await client.get("/v1/usage")).json()["total_requests"]
        for number in range(10):
            message = {"role": "user", "content": f"ledger question {number}"}
            await client.post("/v1/chat/completions", json={"model": "sim", "messages": [message]})
        ray_driver.kill(handle_of(ray_driver, "ledger"), no_restart=True)
        after = (await client.get("/v1/usage")).json()["total_requests"]

    assert after == before + 10


async def test_configuration_versions_survive_the_registry(
    ray_driver: Any, url: str, upstream: Upstream
) -> None:
    registry = handle_of(ray_driver, "registry")
    before = ray_driver.get(registry.current.remote())
    ray_driver.kill(registry, no_restart=True)
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        assert (await client.get("/v1/models")).status_code == 200
    registry = await asyncio.to_thread(alive_again, ray_driver, "registry")

    assert ray_driver.get(registry.current.remote()) == before


class OlderCache(Cache):
    """The cache's owner as an older version of the code would have made it."""

    PROTOCOL = Cache.PROTOCOL - 1


async def test_an_owner_of_an_older_protocol_is_replaced_in_a_running_system(
    ray_driver: Any, url: str, upstream: Upstream
) -> None:
    from actors import spawn

    upstream.script(latency=0.1)
    ours = spawn.OwnerSpec("cache", Cache, {"max_bytes": 256 * 1024 * 1024})
    load = Load(url, upstream)

    def replace() -> None:
        ray_driver.kill(handle_of(ray_driver, "cache"), no_restart=True)
        older = spawn.OwnerSpec("cache", OlderCache, ours.kwargs)
        deadline = time.monotonic() + 20
        while True:  # the system creates a missing owner itself: be the first once
            try:
                handle = spawn.ensure(older, NAMESPACE, False)
                break
            except spawn.ProtocolMismatch:
                ray_driver.kill(handle_of(ray_driver, "cache"), no_restart=True)
                assert time.monotonic() < deadline
        assert ray_driver.get(handle.protocol.remote()) == OlderCache.PROTOCOL
        replaced = spawn.ensure(ours, NAMESPACE, True)
        assert ray_driver.get(replaced.protocol.remote()) == Cache.PROTOCOL

    await load.run(replace)

    assert {200} == set(load.statuses), load.details[:3]


def owner_messages(text: str) -> Counter[str]:
    pattern = r'forebay_owner_messages_total\{method="([^"]+)",owner="([^"]+)"\} ([\d.e+]+)'
    return Counter(
        {f"{owner}.{method}": int(float(n)) for method, owner, n in re.findall(pattern, text)}
    )


async def test_owners_are_asked_rarely(
    ray_driver: Any, url: str, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """At concurrency 64, unique prompts, dedup on (its default): at most one call a request."""
    requests = 1280
    messages = [[{"role": "user", "content": f"rarely {n}"}] for n in range(requests)]
    limits = httpx.Limits(max_connections=64)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        before = owner_messages((await client.get("/metrics")).text)
        places = asyncio.Semaphore(64)

        async def ask(number: int) -> int:
            async with places:
                body = {"model": "sim", "messages": messages[number]}
                return (await client.post("/v1/chat/completions", json=body)).status_code

        begun_s = time.monotonic()
        statuses = await asyncio.gather(*(ask(number) for number in range(requests)))
        took_s = time.monotonic() - begun_s
        after = owner_messages((await client.get("/metrics")).text)

    sent = after - before
    with capsys.disabled():
        print(f"\n  owner messages for {requests} requests at concurrency 64, in {took_s:.1f} s")
        for name, count in sorted(sent.items()):
            print(f"    {name:32} {count:6d}  {count / requests:.3f} per request")
        print(f"    {'all':32} {sum(sent.values()):6d}  {sum(sent.values()) / requests:.3f}")

    waited_for = {"cache.lookup"}
    per_request = {"cache.land"}
    by_the_clock = sum(n for name, n in sent.items() if name not in waited_for | per_request)
    assert {200} == set(statuses)
    assert 0 < sent["cache.lookup"] <= requests
    assert sent["cache.land"] <= requests
    assert by_the_clock <= 50 * took_s + 10
