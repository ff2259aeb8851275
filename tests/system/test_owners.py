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
from tests.support.owners import HEAVY, NAMESPACE, OWNERS, Load, alive_again, handle_of
from tests.support.upstream import Upstream

pytestmark = pytest.mark.ray


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


def test_owners_have_neither_litellm_nor_serve_in_their_processes(
    ray_driver: Any, url: str
) -> None:
    """Only the Batcher calls providers, from its first embedding on."""

    def modules(owner: Any) -> list[str]:
        import sys

        return list(sys.modules)

    for name in OWNERS:
        if name != "batcher":
            owner = alive_again(ray_driver, name)
            have = ray_driver.get(owner.__ray_call__.remote(modules), timeout=30)
            assert (name, {*HEAVY, "ray.serve"} & set(have)) == (name, set())


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
    pattern = r'forebay_owner_calls_total\{method="([^"]+)",owner="([^"]+)"\} ([\d.e+]+)'
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
