"""The ledger's owner: the one process that may say "recorded"."""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from actors.ledger.policy import TENANTS_PER_READ_MAX, Entry, GroupBy, Spent, StoreFailed
from actors.ledger.store import SqliteStore
from actors.ref import Clock

ROWS_PER_COMMIT_MAX = 5000
"""Most rows that share one fsync, so that no waiter waits for an endless transaction."""
ROWS_QUEUED_MAX = 200_000
"""Most rows between the actor and its disk; beyond, `append` fails and desks keep theirs."""
LOCK_WAIT_S = 10.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    """Work for the writer thread, and who waits for it: `entries` to append, or `read` to run."""

    future: asyncio.Future[Any]
    entries: list[Entry]
    read: Callable[[], Any] | None = None
    last: bool = False


class Ledger:
    """Owns the store of entries: a SQLite file, or memory when `path` is None.

    Appends of all desks that arrive while the disk is busy share the next commit (group commit), in
    the one thread that ever touches the connection; reads go through the same thread, after the
    appends before them. Bounded by ROWS_QUEUED_MAX rows that are not durable yet, and by the disk.

    Failure behaviour: what was acknowledged is on disk and survives the process and the machine.
    What was not acknowledged is still in the desks, which send it again; ids make that harmless. A
    store that cannot be opened or written (locked, full, failing) fails the message with
    StoreFailed, acknowledges nothing, and is opened anew for the next one. In memory, nothing
    survives.
    """

    PROTOCOL = 2

    def __init__(
        self,
        path: str | None = None,
        clock: Clock = time.monotonic,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self._store = SqliteStore(path, clock, lock_wait_s)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._closed = False
        self._rows_queued = 0
        self._messages = 0
        self._rows_new = 0
        self._rows_known = 0
        self._commits = 0
        self._failures = 0
        self._last_error: str | None = None

    def protocol(self) -> int:
        return self.PROTOCOL

    async def append(self, holder: str, seq: int, entries: list[Entry]) -> int:
        """Makes all of the entries durable and returns their commit, a number.

        A `spent` with this `commit` or a later one has all of them in it, one with an earlier
        commit lacks at least one; it has none of them if all came in this message for the first
        time, however often it was sent. Safe to repeat: an id that is known is passed over.
        `holder` and `seq` name the message in the log of a session; the ids decide.
        """
        if not entries:
            return await self._read(self._store.last)
        if self._rows_queued + len(entries) > ROWS_QUEUED_MAX:
            raise StoreFailed(f"{self._rows_queued} rows wait for the disk")
        self._rows_queued += len(entries)
        self._messages += 1
        return int(await self._put(entries))

    async def usage(
        self,
        tenant: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        group_by: GroupBy | None = None,
    ) -> dict[str, Any]:
        """Totals of the entries with `since_ms <= at_ms < until_ms` (UTC epoch ms).

        Raises ValueError for an unknown `group_by`.
        """
        if group_by not in (None, *get_args(GroupBy)):
            raise ValueError(f"group_by is one of {get_args(GroupBy)}, not {group_by!r}")
        return await self._read(lambda: self._store.usage(tenant, since_ms, until_ms, group_by))

    async def spent(self, tenants: list[str], at_ms: int) -> list[Spent]:
        """What each of the tenants had used at `at_ms` (UTC epoch ms), in their order.

        Everything acknowledged before is in it. Raises ValueError for more than
        TENANTS_PER_READ_MAX tenants.
        """
        if len(tenants) > TENANTS_PER_READ_MAX:
            raise ValueError(f"{len(tenants)} tenants in one read, {TENANTS_PER_READ_MAX} may be")
        return await self._read(lambda: self._store.spent(tenants, at_ms))

    async def count(self) -> int:
        """Rows in the store."""
        return await self._read(self._store.count)

    async def entries(self, request_id: str) -> list[Entry]:
        """The entries of one request id, oldest first."""
        return await self._read(lambda: self._store.entries(request_id))

    def stats(self) -> dict[str, Any]:
        return {
            "path": self._store.path,
            "messages": self._messages,
            "rows_new": self._rows_new,
            "rows_known": self._rows_known,
            "rows_queued": self._rows_queued,
            "commits": self._commits,
            "failures": self._failures,
            "last_error": self._last_error,
        }

    async def close(self) -> None:
        """Finishes what is queued, then lets go of the file. Later messages fail."""
        if self._closed:
            return
        if self._writer is not None:
            closing = self._put([], last=True)
            self._closed = True
            await closing
            self._writer.join()
        self._closed = True

    async def _read(self, read: Callable[[], T]) -> T:
        result: T = await self._put([], read)
        return result

    def _put(
        self, entries: list[Entry], read: Callable[[], Any] | None = None, last: bool = False
    ) -> asyncio.Future[Any]:
        if self._closed:
            raise StoreFailed("the ledger is closed")
        if self._writer is None:
            # A daemon: what it has acknowledged is on disk, so a process may leave at any time.
            self._writer = threading.Thread(target=self._write, name="ledger-writer", daemon=True)
            self._writer.start()
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._jobs.put(_Job(future, entries, read, last))
        return future

    def _answer(self, job: _Job, result: Any) -> None:
        self._rows_queued -= len(job.entries)
        if job.future.done():  # the caller gave up
            return
        if isinstance(result, StoreFailed):
            job.future.set_exception(result)
        else:
            job.future.set_result(result)

    # What follows runs in the writer thread.

    def _write(self) -> None:
        last = False
        while not last:
            jobs = self._take()
            last = any(job.last for job in jobs)
            self._commit([job for job in jobs if job.entries])
            for job in jobs:
                if job.read is not None:
                    self._settle(job, self._attempt(job.read))
                elif not job.entries:
                    if job.last:
                        self._close_store()
                    self._settle(job, 0)

    def _take(self) -> list[_Job]:
        """The next job and what waits behind it, up to one commit's worth or the first read."""
        jobs = [self._jobs.get()]
        rows = len(jobs[0].entries)
        while jobs[-1].entries and rows < ROWS_PER_COMMIT_MAX:
            try:
                jobs.append(self._jobs.get_nowait())
            except queue.Empty:
                break
            rows += len(jobs[-1].entries)
        return jobs

    def _commit(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        done = self._attempt(lambda: self._store.append([job.entries for job in jobs]))
        if not isinstance(done, StoreFailed):
            new, commits = done
            self._commits += 1
            self._rows_new += new
            self._rows_known += sum(len(job.entries) for job in jobs) - new
            for job, commit in zip(jobs, commits, strict=True):
                self._settle(job, commit)
        elif len(jobs) > 1:
            # One message that cannot be stored must not fail those that shared its commit.
            for job in jobs:
                self._commit([job])
        else:
            self._settle(jobs[0], done)

    def _attempt(self, work: Callable[[], T]) -> T | StoreFailed:
        """The result, or the failure as a value; after a failure the store starts afresh."""
        try:
            return work()
        except StoreFailed as error:
            failure = error
        except (sqlite3.Error, OSError) as error:
            failure = StoreFailed(f"{type(error).__name__}: {error}")
            if self._store.path is not None:
                self._close_store()
        except Exception as error:  # noqa: BLE001
            # A value that the store cannot take. The waiting caller hears of it; the thread, on
            # which all others depend, must not end.
            failure = StoreFailed(f"{type(error).__name__}: {error}")
        self._failures += 1
        self._last_error = failure.reason
        return failure

    def _close_store(self) -> None:
        try:
            self._store.close()
        except sqlite3.Error as error:
            self._failures += 1
            self._last_error = f"closing failed: {error}"

    def _settle(self, job: _Job, result: Any) -> None:
        try:
            job.future.get_loop().call_soon_threadsafe(self._answer, job, result)
        except RuntimeError:
            # The loop is closed, so nobody waits. What was written stays written.
            return
