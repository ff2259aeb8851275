"""The Registry: the configuration's versions, durable before they are acknowledged."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from actors.ref import Clock
from actors.registry.policy import (
    CONFIG_KEY,
    LOCK_WAIT_S,
    Head,
    RegistryUnavailable,
    Version,
    VersionConflict,
    canonical,
)
from actors.registry.store import Store
from actors.watch import HOLD_S, SnapshotHost, Snapshots

T = TypeVar("T")


class Registry:
    """Keeps every version of the configuration and tells everybody the newest.

    Owns: the versions' file (`path`; None keeps them in memory), and the newest version in memory.
    Documents hold no secrets; who puts them sees to that.
    Bounds: a document's bytes, the versions and put ids kept (see `policy`).
    Failure behaviour: nothing acknowledged is lost: a version is on disk before `put` returns and
    before anybody hears of it. The file has one owner; a second one waits ten seconds for the
    first to end, then every call of its raises `RegistryUnavailable`, and the next call tries
    again. While the Registry is away everybody obeys the version they have.
    """

    PROTOCOL = 1

    def __init__(
        self,
        path: str | None = None,
        clock: Clock = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.snapshots = SnapshotHost("registry")
        self._wall = wall
        self._store = Store(path, clock, pause, lock_wait_s)
        self._writer = ThreadPoolExecutor(1, "registry")
        self._head: Head | None = None
        self._opening: asyncio.Future[None] | None = None
        self._puts: set[asyncio.Future[int]] = set()
        self._counts = {"puts": 0, "conflicts": 0}
        self._closed = False

    def protocol(self) -> int:
        return self.PROTOCOL

    async def put(
        self,
        document: dict[str, Any],
        note: str = "",
        expected: int | None = None,
        put_id: str = "",
    ) -> int:
        """Make `document` the newest version and return its number, once it is on disk.

        A document equal to the newest one is that version, whatever was expected. A `put_id` that
        was taken before gives the version of then. Being cancelled does not undo it.

        Raises:
            VersionConflict: `expected` is given and is not the newest version.
            InvalidDocument: the document is not plain JSON, or too large.
            RegistryUnavailable: the file cannot be used.
        """
        text = canonical(document)
        # A task of its own: who waits may go away, but what is stored must be published.
        work = asyncio.ensure_future(self._commit(text, note, expected, put_id))
        self._puts.add(work)
        work.add_done_callback(self._puts.discard)
        return await asyncio.shield(work)

    async def current(self) -> tuple[int, dict[str, Any]]:
        """The newest version and its document; (0, {}) while there is none."""
        head = await self._opened()
        return head.version, head.document()

    async def history(self, limit: int = 20) -> list[Version]:
        """The newest versions, newest first."""
        await self._opened()
        return await self._write(self._store.history, limit)

    async def watch(self, seen: dict[str, int], hold_s: float = HOLD_S) -> Snapshots:
        """The key `config`: {"version": int, "document": dict}, once there is a version."""
        await self._opened()
        changes = await self.snapshots.watch(seen, hold_s)
        return {key: (number, self._said(head)) for key, (number, head) in changes.items()}

    def stats(self) -> dict[str, Any]:
        return {
            **self._counts,
            "version": None if self._head is None else self._head.version,
            "watchers": self.snapshots.waiting,
        }

    async def close(self) -> None:
        """Finish what was begun, close the file and let go of its lock."""
        if self._closed:
            return
        self.snapshots.close()
        await asyncio.gather(*self._puts, return_exceptions=True)
        await self._write(self._store.close)
        self._closed = True
        self._writer.shutdown(wait=False)

    def _said(self, head: Head | None) -> dict[str, Any] | None:
        return None if head is None else {"version": head.version, "document": head.document()}

    async def _commit(self, text: str, note: str, expected: int | None, put_id: str) -> int:
        await self._opened()
        at_ms = int(self._wall() * 1000)
        try:
            version, head = await self._write(self._store.put, text, note, expected, put_id, at_ms)
        except VersionConflict:
            self._counts["conflicts"] += 1
            raise
        self._counts["puts"] += 1
        self._take(head)
        return version

    async def _opened(self) -> Head:
        """The newest version; the first callers open the file together."""
        if self._head is None:
            if self._opening is None:
                self._opening = asyncio.ensure_future(self._open())
            await asyncio.shield(self._opening)
        assert self._head is not None
        return self._head

    async def _open(self) -> None:
        try:
            self._take(await self._write(self._store.head))
        finally:
            self._opening = None

    def _take(self, head: Head) -> None:
        # Heads come in the writer's order, but a put that stored nothing may tell an old one.
        if self._head is not None and head.version <= self._head.version:
            return
        self._head = head
        if head.version > 0:
            self.snapshots.publish(CONFIG_KEY, head)

    async def _write(self, work: Callable[..., T], *args: Any) -> T:
        if self._closed:
            raise RegistryUnavailable(self._store.path, "the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *args)
