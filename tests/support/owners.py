"""The owners of a running system, seen from a test, and load while they are killed."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.support.upstream import Upstream

NAMESPACE = "forebay"
OWNERS = ["registry", "rate-limiter-0", "circuit-breaker", "cache", "batcher", "ledger"]
IN_FLIGHT_MIN = 16
HEAVY = ("litellm", "openai", "fastapi", "uvicorn", "pandas", "tiktoken")
"""Packages that cost a process seconds to import, or tens of megabytes. Ray brings pyarrow and a
part of starlette into every worker itself, to serialize what is theirs."""


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
        self.refused_without_retry_after = 0
        self.in_flight_min = 10**9
        self._stopped = asyncio.Event()
        self._number = 0

    def pause(self, seconds: float) -> None:
        """Let the load run for a while, then note that it is still as heavy as it must be.

        Called from the thread of `during`, between its steps.
        """
        time.sleep(seconds)
        deadline = time.monotonic() + 15
        while True:
            running = int(self._upstream.stats()["running"])
            if running >= IN_FLIGHT_MIN:
                break
            assert time.monotonic() < deadline, f"only {running} calls in flight"
            time.sleep(0.05)
        self.in_flight_min = min(self.in_flight_min, running)

    async def run(self, during: Callable[[], None]) -> None:
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
                self.refused_without_retry_after += "retry-after" not in response.headers
                await asyncio.sleep(0.1)

    async def _in_flight(self) -> None:
        """Wait until enough calls are under way at the upstream, by its own count."""
        for _ in range(300):
            stats = await asyncio.to_thread(self._upstream.stats)
            if stats["running"] >= IN_FLIGHT_MIN:
                return
            await asyncio.sleep(0.05)
        raise AssertionError(f"never {IN_FLIGHT_MIN} calls in flight: {stats}")
