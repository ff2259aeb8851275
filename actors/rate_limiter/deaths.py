"""Tells the limiter's owners of processes that died, so that what they held is free again.

Rule 1: only processes that were silent are looked at, and only certain death is reported.
Rule 2: whoever shares a node with the dead one can tell; a whole node is dead when Ray says so.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection
from typing import Protocol

from actors import holders

PERIOD_S = 0.15
NODES_PAUSE_S = 2.0  # Ray itself takes seconds to notice that a node is gone

log = logging.getLogger(__name__)


class Limiter(Protocol):
    """The desk, as far as deaths concern it."""

    def silent(self) -> set[str]: ...

    async def holder_gone(self, process: str) -> None: ...


class DeathWatch:
    """Looks after the processes that the owners have not heard of lately.

    Owns nothing but its task. Bounded by what the owners name. Failure behaviour: an owner that
    cannot be told now names the silent one again; a process whose node nobody else is on stays
    unreported until somebody is, or Ray gives the node up.
    """

    def __init__(
        self,
        limiter: Limiter,
        holder: str,
        nodes_alive: Callable[[], Awaitable[Collection[str] | None]],
        *,
        is_dead: Callable[[str], bool] = holders.is_dead,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._limiter = limiter
        self._holder = holder
        self._nodes_alive = nodes_alive
        self._is_dead = is_dead
        self._sleep = sleep
        self._task: asyncio.Task[None] | None = None
        self._rounds_to_nodes = 0
        self.reported = 0

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="deaths")

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def look(self) -> None:
        """One round: who of the silent ones is dead."""
        silent = {process for process in self._limiter.silent() if process != self._holder}
        near = {process for process in silent if holders.is_near(process, self._holder)}
        dead = {process for process in near if self._is_dead(process)}
        far = silent - near
        self._rounds_to_nodes -= 1
        if far and self._rounds_to_nodes <= 0:
            self._rounds_to_nodes = int(NODES_PAUSE_S / PERIOD_S)
            alive = await self._nodes_alive()
            if alive is not None:
                dead |= {p for p in far if not holders.is_on_any(p, alive)}
        for process in dead:
            log.info("%s is dead; what it held is given back", process)
            await self._limiter.holder_gone(process)
            self.reported += 1

    async def _run(self) -> None:
        while True:
            await self._sleep(PERIOD_S)
            try:
                await self.look()
            except Exception:
                # The next round begins anew; ending here would leave slots of the dead taken.
                log.exception("looking for dead processes failed")
