"""The Registry: the configuration's versions, and the keys and tenants made at run time.

All of it is durable before it is acknowledged, and before anybody hears of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from actors.ref import Clock
from actors.registry.policy import (
    ACCESS_KEY,
    CONFIG_KEY,
    LOCK_WAIT_S,
    Access,
    Head,
    InvalidRecord,
    KeyRecord,
    RegistryUnavailable,
    Revocation,
    TenantRecord,
    Version,
    VersionConflict,
    canonical,
    checked_key,
    checked_tenant,
    checked_text,
)
from actors.registry.store import Store
from actors.registry.sums import SAVE_EVERY_S, Figures, Numbers, Series, Sums
from actors.watch import HOLD_S, SnapshotHost, Snapshots

T = TypeVar("T")


class Registry:
    """Keeps the configuration's versions and the access given at run time; tells all the newest.
    It also adds up what all processes have counted.

    Owns: their file (`path`; None keeps them in memory), and in memory the newest version, the
    access and the sums. Documents hold no secrets, and keys come as hashes; who sends them sees to
    that.
    Bounds: a document's bytes, the versions kept, the keys, tenants and revocations, the ids of
    changes (see `policy`), the sums (see `sums`). Full of keys, tenants or revocations, it says
    `RegistryFull`.
    Failure behaviour: nothing acknowledged is lost: a change is on disk before it is answered and
    before anybody hears of it. The file has one owner; a second one waits ten seconds for the
    first to end, then every call of its raises `RegistryUnavailable`, and the next call tries
    again. While the Registry is away everybody obeys the version and the access they have.
    """

    PROTOCOL = 3

    def __init__(
        self,
        path: str | None = None,
        clock: Clock = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], None] = time.sleep,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.snapshots = SnapshotHost("registry")
        self._clock = clock
        self._wall = wall
        self._store = Store(path, clock, pause, lock_wait_s)
        self._writer = ThreadPoolExecutor(1, "registry")
        self._head: Head | None = None
        self._access: Access | None = None
        self._sums = Sums()
        self._saved_s = clock()
        self._saving = asyncio.Lock()
        self._opening: asyncio.Future[None] | None = None
        self._changes: set[asyncio.Future[int]] = set()
        self._counts = {"puts": 0, "conflicts": 0, "keys_added": 0, "keys_revoked": 0}
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
        return await self._finished(self._commit(canonical(document), note, expected, put_id))

    async def current(self) -> tuple[int, dict[str, Any]]:
        """The newest version and its document; (0, {}) while there is none."""
        head = await self._opened()
        return head.version, head.document()

    async def add_key(
        self, record: KeyRecord, tenant: TenantRecord | None = None, op_id: str = ""
    ) -> int:
        """Give a key, and return the access version that has it, once it is on disk.

        With `tenant`, its settings are that tenant's from now on, whether it was here or not. Who
        asks makes sure that the key's tenant exists somewhere. An `op_id` that was taken before
        gives the version of then, and changes nothing. Being cancelled does not undo it.

        Raises:
            KeyExists: the hash is or was a key here, or the tenant has a key of this id here.
            RegistryFull: there is no room for another key or tenant.
            InvalidRecord: a record cannot be kept, or `tenant` is not the key's.
            RegistryUnavailable: the file cannot be used.
        """
        record = checked_key(record)
        if tenant is not None:
            tenant = checked_tenant(tenant)
            if tenant.id != record.tenant:
                raise InvalidRecord(f"key of tenant {record.tenant!r}, settings of {tenant.id!r}")
        if op_id:
            checked_text("an operation's id", op_id)
        return await self._finished(self._give(record, tenant, op_id))

    async def revoke_key(self, tenant: str, key_id: str, key_hash: str, op_id: str = "") -> int:
        """Make a key void for ever, and return the access version that has it so, once on disk.

        The hash decides; `tenant` and `key_id` are for those who read it. Whether there is such a
        key is not looked at: it may stand in the configuration. A key that is revoked stays so,
        and its id may be given again to another. Being cancelled does not undo it.

        Raises:
            RegistryFull: there is no room for another revocation.
            InvalidRecord: a text cannot be kept.
            RegistryUnavailable: the file cannot be used.
        """
        revocation = Revocation(
            checked_text("a key's id", key_id),
            checked_text("a key's tenant", tenant),
            checked_text("a key's hash", key_hash),
            self._now_ms(),
        )
        if op_id:
            checked_text("an operation's id", op_id)
        return await self._finished(self._revoke(revocation, op_id))

    async def access(self) -> Access:
        """All that was given and revoked at run time."""
        await self._opened()
        assert self._access is not None
        return self._access

    async def history(self, limit: int = 20) -> list[Version]:
        """The newest versions, newest first."""
        await self._opened()
        return await self._write(self._store.history, limit)

    async def watch(self, seen: dict[str, int], hold_s: float = HOLD_S) -> Snapshots:
        """The key `access`: an `Access`; and `config`, once there is a version.

        `config` is {"version": int, "document": dict}.
        """
        await self._opened()
        changes = await self.snapshots.watch(seen, hold_s)
        return {key: (number, _said(value)) for key, (number, value) in changes.items()}

    async def tally(
        self, name: str, number: int, since: int, figures: Figures, asked: bool
    ) -> tuple[bool, dict[Series, Numbers] | None]:
        """A process's word about its counts (see `Sums.take`), and for who `asked` the sums of all.

        False, and no sums: it has to tell all of them. Sums that are told are on disk. Safe to
        repeat.

        Raises:
            RegistryUnavailable: the file cannot be used. The word counts all the same.
        """
        await self._opened()
        if not self._sums.take(name, number, since, figures):
            return False, None
        if asked or self._clock() - self._saved_s >= SAVE_EVERY_S:
            async with self._saving:
                sums = self._sums.sums()
                await self._save()
            return True, sums if asked else None
        return True, None

    def stats(self) -> dict[str, Any]:
        access = self._access or Access()
        return {
            **self._counts,
            "version": None if self._head is None else self._head.version,
            "access": None if self._access is None else access.version,
            "keys": len(access.keys),
            "tenants": len(access.tenants),
            "revoked": len(access.revoked),
            "watchers": self.snapshots.waiting,
            "series": len(self._sums),
            "processes": self._sums.processes,
        }

    async def close(self) -> None:
        """Finish what was begun, close the file and let go of its lock."""
        if self._closed:
            return
        self.snapshots.close()
        await asyncio.gather(*self._changes, return_exceptions=True)
        try:
            async with self._saving:
                await self._save()
        except RegistryUnavailable:
            pass  # what nobody was shown; processes that live on tell it again
        await self._write(self._store.close)
        self._closed = True
        self._writer.shutdown(wait=False)

    async def _save(self) -> None:
        """Write the sums down, as far as they have changed."""
        rows, gone = self._sums.unsaved()
        self._saved_s = self._clock()
        if not rows and not gone:
            return
        try:
            await self._write(self._store.keep_sums, rows, gone)
        except BaseException:
            self._sums.unsave([*(row[0] for row in rows), *gone])
            raise

    async def _finished(self, change: Coroutine[Any, Any, int]) -> int:
        # A task of its own: who waits may go away, but what is stored must be published.
        work = asyncio.ensure_future(change)
        self._changes.add(work)
        work.add_done_callback(self._changes.discard)
        return await asyncio.shield(work)

    async def _commit(self, text: str, note: str, expected: int | None, put_id: str) -> int:
        await self._opened()
        put = self._store.put
        try:
            version, head = await self._write(put, text, note, expected, put_id, self._now_ms())
        except VersionConflict:
            self._counts["conflicts"] += 1
            raise
        self._counts["puts"] += 1
        self._take(head)
        return version

    async def _give(self, record: KeyRecord, tenant: TenantRecord | None, op_id: str) -> int:
        await self._opened()
        version, access = await self._write(self._store.add_key, record, tenant, op_id)
        self._counts["keys_added"] += 1
        self._take_access(access)
        return version

    async def _revoke(self, revocation: Revocation, op_id: str) -> int:
        await self._opened()
        version, access = await self._write(self._store.revoke_key, revocation, op_id)
        self._counts["keys_revoked"] += 1
        self._take_access(access)
        return version

    def _now_ms(self) -> int:
        return int(self._wall() * 1000)

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
            access = await self._write(self._store.access)
            head = await self._write(self._store.head)
            self._sums = Sums(await self._write(self._store.sums))
            self._take_access(access)  # first, so that nobody obeys a document without it
            self._take(head)
        finally:
            self._opening = None

    def _take(self, head: Head) -> None:
        # Heads come in the writer's order, but a put that stored nothing may tell an old one.
        if self._head is not None and head.version <= self._head.version:
            return
        self._head = head
        if head.version > 0:
            self.snapshots.publish(CONFIG_KEY, head)

    def _take_access(self, access: Access) -> None:
        if self._access is None or access.version > self._access.version:
            self._access = access
            self.snapshots.publish(ACCESS_KEY, access)

    async def _write(self, work: Callable[..., T], *args: Any) -> T:
        if self._closed:
            raise RegistryUnavailable(self._store.path, "the registry is closed")
        return await asyncio.get_running_loop().run_in_executor(self._writer, work, *args)


def _said(value: Head | Access) -> dict[str, Any] | Access:
    if isinstance(value, Access):
        return value
    return {"version": value.version, "document": value.document()}
