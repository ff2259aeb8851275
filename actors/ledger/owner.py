"""The ledger's owner: the one process that may say "recorded"."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from actors.ledger.claims import Claims
from actors.ledger.idempotency import Claim, Finish, Outcome
from actors.ledger.policy import (
    DAY_MS,
    FEEDBACK_PER_RESPONSE_MAX,
    TENANTS_PER_READ_MAX,
    Entry,
    Feedback,
    GroupBy,
    Rating,
    Recorded,
    Spent,
    StoreFailed,
    groups_of,
)
from actors.ref import Clock

if TYPE_CHECKING:
    from actors.ledger.store import Store

ROWS_PER_COMMIT_MAX = 5000
"""Most rows that share one fsync, so that no waiter waits for an endless transaction."""
ROWS_QUEUED_MAX = 200_000
"""Most rows between the actor and its disk; beyond, `append` fails and desks keep theirs."""
LOCK_WAIT_S = 10.0
HOLDERS_PER_READ_MAX = 1000
READINGS_MAX = 16
"""Most readings of usage that are under way at a time."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Job:
    """Work for the writer thread, and who waits for it: `entries` to append, or `do` to run."""

    future: asyncio.Future[Any]
    holder: str = ""
    entries: Sequence[Entry] = ()
    do: Callable[[Store], Any] | None = None

    @property
    def closes(self) -> bool:
        return not self.entries and self.do is None


class _Refused(StoreFailed):
    """What was asked cannot be done with this store, which is well."""


class Ledger:
    """Owns the store of entries: a PostgreSQL database where `url` is given, and says which; else
    the SQLite file `path`, or memory when that is None.

    Appends of all desks that arrive while the disk is busy share the next commit (group commit), in
    the one thread that ever touches the connection; reads go through the same thread, after the
    appends before them. Bounded by ROWS_QUEUED_MAX rows that are not durable yet, and by the disk.

    Failure behaviour: what was acknowledged is on disk and survives the process and the machine.
    What was not acknowledged is still in the desks, which send it again; ids make that harmless. A
    store that cannot be opened or written (locked, full, failing, away) fails the message and all
    that wait behind it with StoreFailed, acknowledges nothing, says why in `stats`, and is opened
    anew for the next one. In memory, nothing survives.
    """

    PROTOCOL = 6

    def __init__(
        self,
        path: str | None = None,
        clock: Clock = time.monotonic,
        lock_wait_s: float = LOCK_WAIT_S,
        url: Callable[[], str] | None = None,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._url = url
        self._clock = clock
        self._lock_wait_s = lock_wait_s
        self._store: Store | None = None
        self._claims = Claims(self._do, clock, wall)
        self._jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._closed = False
        self._rows_queued = 0
        self._messages = 0
        self._rows_new = 0
        self._rows_known = 0
        self._commits = 0
        self._readings = 0
        self._reading = asyncio.Lock()  # so that an append waits for one step of one reading
        self._doomed: list[_Job] = []
        # Of which day, and after how much feedback.
        self._ratings: tuple[int, int, dict[str, Rating]] | None = None
        self._feedback = 0
        self._failures = 0
        self._failing: str | None = None
        self._last_error: str | None = None
        # It takes a busy machine a second, for which the first request of each tenant would wait.
        threading.Thread(target=_load, name="ledger-load", daemon=True).start()

    def protocol(self) -> int:
        return self.PROTOCOL

    async def append(self, holder: str, seq: int, entries: Sequence[Sequence[Any]]) -> int:
        """Makes all of the entries durable, or none, and returns their commit, a number.

        Each is given by its `values`. An open entry announces a call; it counts for nothing, and
        the entry with its id that is settled takes its place. What is settled stays so: whatever
        comes later under the same id is passed over.

        A `spent` with this `commit` or a later one has all of them in it, one with an earlier
        commit lacks at least one; it has none of them if all came in this message for the first
        time, however often it was sent. Safe to repeat: an id that is known is passed over.
        `holder` and `seq` name the message in the log of a session; the ids decide.
        """
        if not entries:
            return await self._do(lambda store: store.last())
        if self._rows_queued + len(entries) > ROWS_QUEUED_MAX:
            raise StoreFailed(f"{self._rows_queued} rows wait for the disk")
        self._rows_queued += len(entries)
        self._messages += 1
        job = _Job(self._future(), holder, [Entry(*values) for values in entries])
        return int(await self._put(job))

    async def holders(self) -> dict[str, int]:
        """Who announced calls that are not settled yet, or has keys of such calls, and how many:
        HOLDERS_PER_READ_MAX of each at most."""
        most = HOLDERS_PER_READ_MAX
        announced: dict[str, int] = await self._do(lambda store: store.holders(most))
        return {**await self._claims.holders(), **announced}

    async def holder_gone(self, holder: str) -> int:
        """A process has ended, and what it left is handed in or lost.

        What it announced and did not settle is unsettled from now on, at the most that it may have
        cost, and stays so: should its node come back with an entry that says more, that one is
        passed over, and the flagged one holds more than the call has cost. Returns how many
        entries that are. Safe to repeat.
        """
        lost: int = await self._do(lambda store: store.settle_lost(holder))
        await self._claims.gone(holder)  # last: a repeat of what it left is a call of its own
        return lost

    async def claim(self, claim: Claim, wait_s: float) -> Outcome:
        """Whether a request that has a key may make its call, or the answer that was given before;
        durable when it returns. See `Claims.claim`."""
        return await self._claims.claim(claim, wait_s)

    async def finish(self, finish: Finish) -> bool:
        """What became of that call; see `Claims.finish`."""
        return await self._claims.finish(finish)

    async def usage(
        self,
        tenant: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        group_by: GroupBy | Sequence[GroupBy] | None = None,
    ) -> dict[str, Any]:
        """Totals of the entries with `since_ms <= at_ms < until_ms` (UTC epoch ms).

        With `by_model` and `by_…` for each group that is asked for, and `data`, their combinations.
        It is read step by step, with appends in between. Raises ValueError for an unknown group and
        for hours without their beginning, StoreFailed also when READINGS_MAX are under way.
        """
        groups = groups_of(group_by)
        if "hour" in groups and since_ms is None:
            raise ValueError("hours are read from the entries: say since when")
        if self._readings >= READINGS_MAX:
            raise StoreFailed(f"{READINGS_MAX} readings of usage are under way")
        from actors.ledger.usage import Reading

        self._readings += 1
        try:
            reading = Reading(tenant, since_ms, until_ms, groups)
            more = True
            while more:
                async with self._reading:
                    more = await self._do(reading.step)
        finally:
            self._readings -= 1
        return reading.answer()

    async def spent(self, tenants: list[str], at_ms: int) -> list[Spent]:
        """What each of the tenants had used at `at_ms` (UTC epoch ms), in their order.

        Everything acknowledged before is in it. Raises ValueError for more than
        TENANTS_PER_READ_MAX tenants.
        """
        if len(tenants) > TENANTS_PER_READ_MAX:
            raise ValueError(f"{len(tenants)} tenants in one read, {TENANTS_PER_READ_MAX} may be")
        return await self._do(lambda store: store.spent(tenants, at_ms))

    async def record(self, feedback: Feedback) -> Recorded | None:
        """Makes feedback durable; None where the tenant has had no such answer.

        Safe to repeat: with an id that is known, what came first stays.

        Raises:
            ValueError: there are FEEDBACK_PER_RESPONSE_MAX of this tenant on this answer.
        """
        recorded = await self._do(lambda store: _recorded(store, feedback))
        self._feedback += 1
        if isinstance(recorded, str):
            raise ValueError(recorded)
        return recorded

    async def feedback(
        self, tenant: str | None = None
    ) -> list[tuple[str, str, str, int, int, int]]:
        """Feedback of a tenant, or of all: (model, deployment, type, how many, how many of them
        with a score, the sum of the scores)."""
        return await self._do(lambda store: store.feedback(tenant))

    async def ratings(self, at_ms: int) -> dict[str, Rating]:
        """What the deployments were rated until `at_ms` (UTC epoch ms), by all tenants."""
        day, known = at_ms // DAY_MS, self._feedback
        if self._ratings is None or self._ratings[:2] != (day, known):
            self._ratings = (day, known, await self._do(lambda store: store.ratings(at_ms)))
        return self._ratings[2]

    async def count(self) -> int:
        """Settled entries in the store."""
        return await self._do(lambda store: store.last())

    async def unsettled(self) -> int:
        """Entries of calls whose outcome was lost. Nothing is read for it."""
        return await self._do(lambda store: store.unsettled())

    async def entries(self, request_id: str) -> list[Entry]:
        """The settled entries of one request id, oldest first."""
        return await self._do(lambda store: store.entries(request_id))

    def stats(self) -> dict[str, Any]:
        """`failing` says why the store takes nothing now, and is None when it is well."""
        return {
            "store": self._name(),
            "failing": self._failing,
            "open": 0 if self._store is None else self._store.open_count,
            "messages": self._messages,
            "rows_new": self._rows_new,
            "rows_known": self._rows_known,
            "rows_queued": self._rows_queued,
            "claims": self._claims.stats(),
            "commits": self._commits,
            "failures": self._failures,
            "last_error": self._last_error,
        }

    async def close(self) -> None:
        """Finishes what is queued, then lets go of the store. Later messages fail."""
        if self._closed:
            return
        if self._writer is not None:
            closing = self._put(_Job(self._future()))
            self._closed = True
            await closing
            self._writer.join()
        self._closed = True

    async def _do(self, work: Callable[[Store], T]) -> T:
        result: T = await self._put(_Job(self._future(), do=work))
        return result

    def _future(self) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().create_future()

    def _put(self, job: _Job) -> asyncio.Future[Any]:
        if self._closed:
            self._rows_queued -= len(job.entries)
            raise StoreFailed("the ledger is closed")
        if self._writer is None:
            # A daemon: what it has acknowledged is durable, so a process may leave at any time.
            self._writer = threading.Thread(target=self._write, name="ledger-writer", daemon=True)
            self._writer.start()
        self._jobs.put(job)
        return job.future

    def _answer(self, job: _Job, result: Any) -> None:
        self._rows_queued -= len(job.entries)
        if job.future.done():  # the caller gave up
            return
        if isinstance(result, StoreFailed):
            job.future.set_exception(StoreFailed(result.reason))
        else:
            job.future.set_result(result)

    def _name(self) -> str:
        if self._store is not None:
            return self._store.place.name
        return "postgresql" if self._url is not None else self._path or "memory"

    # What follows runs in the writer thread.

    def _write(self) -> None:
        while True:
            appends, other = self._take()
            failure = self._commit(appends)
            if other is not None and other.closes:
                self._close_store()
                self._settle(other, None)
                return
            if other is not None and failure is None:
                assert other.do is not None, "neither an append nor the end"
                result = self._attempt(other.do)
                self._settle(other, result)
                failure = _of_store(result)
            elif other is not None:
                self._settle(other, failure)
            doomed, self._doomed = self._doomed, []
            self._settle_all(doomed, failure)

    def _take(self) -> tuple[list[_Job], _Job | None]:
        """The appends that wait, up to one commit's worth, and what comes next if it is no append.

        Blocks until there is something."""
        appends: list[_Job] = []
        rows = 0
        job = self._jobs.get()
        while job.entries:
            appends.append(job)
            rows += len(job.entries)
            if rows >= ROWS_PER_COMMIT_MAX:
                return appends, None
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return appends, None
        return appends, job

    def _commit(self, jobs: list[_Job]) -> StoreFailed | None:
        """Stores the entries of the jobs together. Returns why the store takes nothing now."""
        if not jobs:
            return None
        messages = [(job.holder, job.entries) for job in jobs]
        done = self._attempt(lambda store: store.append(messages))
        if not isinstance(done, StoreFailed):
            new, commits = done
            self._commits += 1
            self._rows_new += new
            self._rows_known += sum(len(job.entries) for job in jobs) - new
            for job, commit in zip(jobs, commits, strict=True):
                self._settle(job, commit)
            return None
        failure = _of_store(done)
        if failure is None and len(jobs) > 1:
            # One message that cannot be stored must not fail those that shared its commit.
            for number, job in enumerate(jobs):
                failure = self._commit([job])
                if failure is not None:
                    self._settle_all(jobs[number + 1 :], failure)
                    break
        else:
            self._settle_all(jobs, done)
        return failure

    def _attempt(self, work: Callable[[Store], T]) -> T | StoreFailed:
        """The result, or the failure as a value; after one of the store it starts afresh."""
        # Imported here, since every process that has a desk imports this file.
        from actors.ledger.store import failure_of

        try:
            result = work(self._open_store())
        except Exception as error:  # noqa: BLE001
            # The waiting caller hears of it; the thread, on which all others depend, must not end.
            failure, is_stores = failure_of(error)
        else:
            self._failing = None
            return result
        self._failures += 1
        self._last_error = failure.reason
        if not is_stores:
            return _Refused(failure.reason)
        self._failing = failure.reason
        self._close_store(afresh=True)
        self._doom()
        return failure

    def _open_store(self) -> Store:
        from actors.ledger.place import PostgresPlace, SqlitePlace
        from actors.ledger.store import Store

        if self._store is None:
            if self._url is not None:
                self._store = Store(PostgresPlace(self._url, self._clock, self._lock_wait_s))
            else:
                self._store = Store(SqlitePlace(self._path, self._clock, self._lock_wait_s))
        return self._store

    def _close_store(self, afresh: bool = False) -> None:
        """`afresh`: it is opened again, so what would be lost by closing stays open."""
        store = self._store
        if store is None or (afresh and not store.place.durable):
            return
        try:
            store.close()
        except Exception as error:  # noqa: BLE001 - it is given up either way
            self._failures += 1
            self._last_error = f"closing failed: {type(error).__name__}"

    def _doom(self) -> None:
        """What came while the store was failing has waited long enough. Its senders come again."""
        for _ in range(self._jobs.qsize()):
            job = self._jobs.get()
            if job.closes:  # nothing comes after it
                self._jobs.put(job)
                return
            self._doomed.append(job)

    def _settle_all(self, jobs: list[_Job], result: Any) -> None:
        for job in jobs:
            self._settle(job, result)

    def _settle(self, job: _Job, result: Any) -> None:
        try:
            job.future.get_loop().call_soon_threadsafe(self._answer, job, result)
        except RuntimeError:
            # The loop is closed, so nobody waits. What was written stays written.
            return


def _load() -> None:
    import actors.ledger.store  # noqa: F401


def _recorded(store: Store, feedback: Feedback) -> Recorded | str | None:
    try:
        return store.record(feedback)
    except OverflowError:
        return f"there are {FEEDBACK_PER_RESPONSE_MAX} of them on this answer, which is the most"


def _of_store(result: object) -> StoreFailed | None:
    """The failure, if it is one of the store and not of what was asked."""
    if isinstance(result, StoreFailed) and not isinstance(result, _Refused):
        return result
    return None
