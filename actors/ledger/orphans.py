"""What dead processes have left: their spools on this node, and their calls in the ledger.

Rule 1: what a process has written down comes first, and only then what nobody knows.
Rule 2: only certain death counts. Who shares a node with a process sees it; of a node Ray says it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

from actors import holders
from actors.file_lock import FileLock, FileLocked
from actors.ledger.policy import Entry, StoreFailed
from actors.ledger.spool import Found, Left, holder_of, spools
from actors.ref import Clock, OwnerRef, OwnerUnavailable

SWEEP_EVERY_S = 10.0
ENTRIES_PER_MESSAGE_MAX = 500
APPEND_TIMEOUT_S = 30.0
LOST = "the process ended before it could say what came of this"

log = logging.getLogger(__name__)


async def _nobody_says() -> None:
    """Where no Ray tells which nodes live."""


class Orphans:
    """Owns no spool of its own: it looks after those in `directory` whose processes are dead.

    A sweep hands in what they hold and removes them; a call without an end becomes an unsettled
    entry, which holds the most that it may have cost. Then it tells the ledger which of those who
    have announced calls are dead and have no spool here: what they left open is unsettled too. That
    is how the calls of a whole node end, of which only the ledger knows. One process of a node
    sweeps, every SWEEP_EVERY_S: whoever has the lock, and when that process ends, another. Bounded
    by one spool in memory at a time, and by the ledger's HOLDERS_PER_READ_MAX.

    Failure behaviour: what the ledger does not take stays where it is until a later sweep. What is
    handed in twice, because a process ended between the ledger's word and the removal, is known to
    the ledger by its ids. A file that cannot be read is left alone, and logged. Of a process whose
    node nobody else is on, and of whose node nobody says that it is dead, the calls stay open.
    """

    def __init__(
        self,
        directory: Path,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nodes_alive: Callable[[], Awaitable[Collection[str] | None]] = _nobody_says,
    ) -> None:
        """`nodes_alive` are the ids of the nodes that live, None where nobody can say."""
        self._directory = directory
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._pause = pause
        self._nodes_alive = nodes_alive
        self._swept_s: float | None = None
        self._elected = FileLock(str(directory / "sweep"))
        self._sweeping = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._seq = 0
        self._spools = 0
        self._entries = 0
        self._unsettled = 0
        self._gone = 0
        self._failures = 0

    async def start(self) -> None:
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._sweep_for_ever())

    async def close(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        self._elected.release()

    async def sweep(self) -> bool:
        """Hands in all there is now, and says who is dead. False if something had to stay.

        Takes as long as the ledger does. Safe to call at any time, by any process.
        """
        whole = await self._hand_in_all()
        return await self._tell_deaths() and whole

    async def look(self) -> None:
        """Hands in what there is, unless this process has done so within SWEEP_EVERY_S."""
        if self._swept_s is None or self._clock() - self._swept_s >= SWEEP_EVERY_S:
            await self._hand_in_all()

    def stats(self) -> dict[str, Any]:
        """`unsettled` are calls that spools have no end of, `gone` those that no spool tells of."""
        return {
            "spools": self._spools,
            "entries": self._entries,
            "unsettled": self._unsettled,
            "gone": self._gone,
            "failures": self._failures,
        }

    async def _sweep_for_ever(self) -> None:
        while True:
            if await _elsewhere(self._is_elected):
                await self.sweep()
            await self._pause(SWEEP_EVERY_S)

    def _is_elected(self) -> bool:
        if self._elected.held:
            return True
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._elected.acquire(0.0)
        except (FileLocked, OSError):
            return False
        return True

    async def _hand_in_all(self) -> bool:
        async with self._sweeping:
            whole = True
            for path in await _elsewhere(spools, self._directory):
                whole &= await self._hand_in(path)
            self._swept_s = self._clock()
            return whole

    async def _tell_deaths(self) -> bool:
        """What the dead announced, and no spool here tells the end of, is unsettled."""
        try:
            announced: dict[str, int] = await self._ref.ask("holders")
            for holder in await self._dead(set(announced) - {self._holder}):
                lost: int = await self._ref.ask("holder_gone", holder, timeout_s=APPEND_TIMEOUT_S)
                self._gone += lost
                log.info("%s is dead; %d of its calls are unsettled", holder, lost)
        except Exception as error:  # noqa: BLE001
            # Ray may say no in many ways. A sweeper that ended here would hand in nothing any more.
            self._failures += 1
            log.warning("calls of the dead stay open for now: %s: %s", type(error).__name__, error)
            return False
        return True

    async def _dead(self, announced: set[str]) -> set[str]:
        """Who of them is certainly dead and has no spool here. In that order: while a process
        lives it may make one, and one that is left may hold what became of its calls."""
        near = {holder for holder in announced if holders.is_near(holder, self._holder)}
        dead = {holder for holder in near if holders.is_dead(holder)}
        far = announced - near
        alive = await self._nodes_alive() if far else None
        if alive:
            dead |= {holder for holder in far if not holders.is_on_any(holder, alive)}
        if dead:
            dead -= {holder_of(path) for path in await _elsewhere(spools, self._directory)}
        return dead

    async def _hand_in(self, path: Path) -> bool:
        found: Found | None = None
        try:
            found = await _elsewhere(Found.take, path, self._holder)
            if found is None:
                return True
            left: Left = await _elsewhere(found.read)
            entries = [*(Entry(*values) for values in left.entries), *map(_unsettled, left.opened)]
            for start in range(0, len(entries), ENTRIES_PER_MESSAGE_MAX):
                part = [e.values() for e in entries[start : start + ENTRIES_PER_MESSAGE_MAX]]
                self._seq += 1
                await self._ref.ask(
                    "append", self._holder, self._seq, part, timeout_s=APPEND_TIMEOUT_S
                )
            found.remove()
        except (OwnerUnavailable, StoreFailed, OSError, ValueError, TypeError) as error:
            # Of a newer version, or not a spool, or the ledger is away: it stays for a later sweep.
            self._failures += 1
            log.warning("the spool %s stays for now: %s: %s", path, type(error).__name__, error)
            return False
        finally:
            if found is not None:
                found.release()
        self._spools += 1
        self._entries += len(left.entries)
        self._unsettled += len(left.opened)
        if entries:
            log.info("%s was handed in: %d entries", path, len(entries))
        return True


def _unsettled(values: list[Any]) -> Entry:
    return Entry(*values)._replace(status="unsettled", error=LOST)


async def _elsewhere(work: Callable[..., Any], *args: Any) -> Any:
    """Blocking work, off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)
