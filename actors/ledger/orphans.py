"""What dead processes of this node have left in their spools, and the handing in of it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.file_lock import FileLock, FileLocked
from actors.ledger.policy import Entry, StoreFailed
from actors.ledger.spool import Found, Left, spools
from actors.ref import Clock, OwnerRef, OwnerUnavailable

SWEEP_EVERY_S = 10.0
ENTRIES_PER_MESSAGE_MAX = 500
APPEND_TIMEOUT_S = 30.0
LOST = "the process ended before it could say what came of this"

log = logging.getLogger(__name__)


class Orphans:
    """Owns no spool of its own: it looks after those in `directory` whose processes are dead.

    A sweep hands in what they hold and removes them; a call without an end becomes an unsettled
    entry, which holds the most that it may have cost. One process of a node sweeps, every
    SWEEP_EVERY_S: whoever has the lock, and when that process ends, another. Bounded by one spool
    in memory at a time.

    Failure behaviour: what the ledger does not take stays where it is until a later sweep. What is
    handed in twice, because a process ended between the ledger's word and the removal, is known to
    the ledger by its ids. A file that cannot be read is left alone, and logged.
    """

    def __init__(
        self,
        directory: Path,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._directory = directory
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._pause = pause
        self._swept_s: float | None = None
        self._elected = FileLock(str(directory / "sweep"))
        self._sweeping = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._seq = 0
        self._spools = 0
        self._entries = 0
        self._unsettled = 0
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
        """Hands in all there is now. False if something had to stay.

        Takes as long as the ledger does. Safe to call at any time, by any process.
        """
        async with self._sweeping:
            whole = True
            for path in await _elsewhere(spools, self._directory):
                whole &= await self._hand_in(path)
            self._swept_s = self._clock()
            return whole

    async def look(self) -> None:
        """A sweep, unless this process has made one within SWEEP_EVERY_S."""
        if self._swept_s is None or self._clock() - self._swept_s >= SWEEP_EVERY_S:
            await self.sweep()

    def stats(self) -> dict[str, Any]:
        return {
            "spools": self._spools,
            "entries": self._entries,
            "unsettled": self._unsettled,
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
        if not self._directory.is_dir():
            return False  # nobody has written anything here
        try:
            self._elected.acquire(0.0)
        except (FileLocked, OSError):
            return False
        return True

    async def _hand_in(self, path: Path) -> bool:
        found: Found | None = None
        try:
            found = await _elsewhere(Found.take, path, self._holder)
            if found is None:
                return True
            left: Left = await _elsewhere(found.read)
            entries = [*(Entry(*values) for values in left.entries), *map(_unsettled, left.opened)]
            for start in range(0, len(entries), ENTRIES_PER_MESSAGE_MAX):
                part = entries[start : start + ENTRIES_PER_MESSAGE_MAX]
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
    return replace(Entry(*values), status="unsettled", error=LOST)


async def _elsewhere(work: Callable[..., Any], *args: Any) -> Any:
    """Blocking work, off the event loop."""
    return await asyncio.get_running_loop().run_in_executor(None, work, *args)
