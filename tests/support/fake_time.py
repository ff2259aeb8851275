"""Time that passes when a test says so."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Awaitable, Callable
from itertools import count


async def settle(rounds: int = 25) -> None:
    """Let every task that can go on, go on."""
    for _ in range(rounds):
        await asyncio.sleep(0)


class FakeTime:
    """A clock (call it) and a `sleep` that ends when `advance` has come by.

    `advance` stops at each moment somebody sleeps until, so that what happens then happens then,
    and lets all tasks go on by `settled`.
    """

    def __init__(
        self, now: float = 1_000.0, settled: Callable[[], Awaitable[None]] = settle
    ) -> None:
        self.now = now
        self._settled = settled
        self._order = count()
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, for_s: float) -> None:
        woken = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + for_s, next(self._order), woken))
        await woken

    async def advance(self, by_s: float) -> None:
        end = self.now + by_s
        await self._settled()
        while self._sleepers and self._sleepers[0][0] <= end:
            self.now, _, woken = heapq.heappop(self._sleepers)
            if not woken.done():
                woken.set_result(None)
                await self._settled()
        self.now = end
        await self._settled()
