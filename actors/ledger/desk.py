"""The ledger's desk: entries are written here, at once, and handed in by the batch."""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from actors.ledger.policy import (
    COST_NANO_MAX,
    ERROR_CHARS_MAX,
    NOT_MADE,
    TOKENS_MAX,
    Entry,
    Feedback,
    GroupBy,
    LedgerFull,
    Rating,
    Recorded,
    Spent,
    Status,
    StoreFailed,
)
from actors.ledger.spool import Place, Spool, SpoolFull
from actors.ref import Clock, OwnerRef, OwnerUnavailable

ENTRIES_BUFFERED_MAX = 50_000
"""Most calls under way plus entries not acknowledged; some 25 MB."""
ENTRIES_PER_MESSAGE_MAX = 500
COMMITS_KEPT = 10_000
"""Most acknowledgements whose commit is remembered; over forty minutes at SEND_AFTER_S."""
SEND_AFTER_S = 0.25
ANNOUNCE_AFTER_S = 1.0
"""A call that is under way for so long is announced to the ledger, which then knows of it even if
the whole node is lost, spool and all. At the latest after twice as long."""
BACK_OFF_S = (0.05, 1.0)
CLOSE_WAIT_S = 5.0
INTENT_WAIT_S = 5.0
"""How long a call waits at most for the ledger to have its intent, where that is asked for."""
REFUSAL_KINDS_MAX = 1_000
"""Most kinds of refusals that are counted apart; beyond, they are counted by status only."""
REFUSALS_COUNTED_S = 1.0
OTHERS = "forebay/others"
"""For whom such refusals are counted; no tenant can be called so."""
RESPONSE_ID_CHARS_MAX = 200
FEEDBACK_AGAIN_S = 0.5
"""After so long, what another process has answered is in the ledger."""
PAID = ("posted", "voided", "unsettled", "open")
"""What is never dropped."""


@dataclass(slots=True)
class OpenEntry:
    """An attempt whose outcome is not known yet. It becomes one entry, by `post` or by `void`, or
    none, by `drop`."""

    id: str
    request_id: str
    attempt: int
    tenant: str
    route: str
    model: str
    deployment: str
    stream: bool
    at_ms: int
    started_s: float
    most_nano: int | None
    place: Place | None = None
    told: bool = False
    settled: bool = False
    cache_key: str = ""
    price_version: str = ""

    def values(self) -> tuple[Any, ...]:
        """The fields of an `Entry` that says so, in order."""
        most_nano = self.most_nano
        return (
            self.id,
            self.request_id,
            self.attempt,
            self.tenant,
            self.route,
            self.model,
            self.deployment,
            "open",
            0,
            0,
            most_nano or 0,
            most_nano is None,
            False,
            self.stream,
            0,
            self.at_ms,
            None,
            0,
            "" if most_nano is None else self.price_version,
            0,
            0,
            most_nano or 0,
        )


@dataclass(slots=True)
class _Refusals:
    """Those of one kind in one second, which become one entry."""

    values: list[Any]
    place: Place | None
    count: int = 1


class LedgerDesk:
    """Owns the entries of this process that the ledger has not acknowledged yet.

    With a spool, calls under way and entries are in a file before anything else happens, and
    whoever finds the file after this process has died hands them in. Entries leave in order,
    SEND_AFTER_S after the first one or as soon as ENTRIES_PER_MESSAGE_MAX wait, and are kept until
    the owner says that they are durable. A message that was not acknowledged is sent again with the
    same entries and no others, so that one commit is true of all of them. Of acknowledged messages
    the last COMMITS_KEPT commits are remembered. Calls that take longer than ANNOUNCE_AFTER_S are
    announced meanwhile.

    Bounded by ENTRIES_BUFFERED_MAX, calls under way included, and by the spool: then `full` is
    true and `open` raises LedgerFull; at ENTRIES_BUFFERED_MAX entries of answers that cost nothing
    are dropped and counted. Refusals of one kind, of which there are at most REFUSAL_KINDS_MAX,
    make one entry a second, and while the desk is full one in all.

    Failure behaviour: with the owner away or its store failing, the desk keeps everything and tries
    again for ever, until it is full and paid calls stop. When this process dies, its spool has all
    of it. Without a spool, or when the node is lost with it, the calls that were announced are
    booked as unsettled; lost are, with the owner well, those that were younger than 2 *
    ANNOUNCE_AFTER_S, and at most SEND_AFTER_S of entries.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
        spools: Path | None = None,
    ) -> None:
        """`spools` is the directory of this node's spools; without it there is none."""
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._wall = wall
        self._pause = pause
        # Ids must never come again, not even from a process of the same name.
        nonce = nonce or secrets.token_hex(8)
        self._prefix = f"{holder}-{nonce}"
        self._spool = None if spools is None else Spool(spools, holder, nonce, clock)
        self._refusals: dict[tuple[str, str, str, int], _Refusals] = {}
        self._refusals_s = 0.0
        self._refusals_timer: asyncio.TimerHandle | None = None
        self._minted = 0
        # Calls under way that the ledger has not been told of, oldest first.
        self._unannounced: dict[str, OpenEntry] = {}
        self._announcer: asyncio.TimerHandle | None = None
        self._buffer: list[tuple[Any, ...]] = []
        self._opened = 0
        self._recorded = 0
        self._acknowledged = 0
        self._dropped = 0
        self._failures = 0
        self._last_error: str | None = None
        self._seq = 0
        self._sending = 0
        # (how many were acknowledged by then, the commit that says so), both growing.
        self._commits: deque[tuple[int, int]] = deque(maxlen=COMMITS_KEPT)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._flushers: list[tuple[int, asyncio.Future[None]]] = []

    async def start(self) -> None:
        if self._task is None:
            self._loop = asyncio.get_running_loop()
            self._task = self._loop.create_task(self._send_for_ever())
            if self._buffer:
                self._due.set()

    async def close(self) -> None:
        """Hands in what it can within CLOSE_WAIT_S.

        The rest stays in the spool for others to hand in, with the calls that have not ended; or,
        without one, is lost, and `stats` says how much.
        """
        if self._task is not None:
            await self.flush(CLOSE_WAIT_S)
            task, self._task = self._task, None
            if self._refusals_timer is not None:
                self._refusals_timer.cancel()
                self._refusals_timer = None
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._announcer is not None:
                self._announcer.cancel()
                self._announcer = None
            task.cancel()
            await asyncio.wait([task])
        if self._spool is not None:
            self._spool.close()

    @property
    def full(self) -> bool:
        """True when no further paid call may start."""
        spool = self._spool
        return len(self._buffer) + self._opened >= ENTRIES_BUFFERED_MAX or (
            spool is not None and spool.refusal != ""
        )

    @property
    def _buffered(self) -> int:
        return len(self._buffer) + self._opened

    @property
    def refusal(self) -> str:
        """Why no further paid call may start; empty when one may."""
        if self._buffered >= ENTRIES_BUFFERED_MAX:
            return f"{ENTRIES_BUFFERED_MAX} calls and entries wait for the ledger"
        return "" if self._spool is None else self._spool.refusal

    def open(
        self,
        *,
        request_id: str,
        tenant: str,
        route: str,
        model: str,
        deployment: str,
        attempt: int = 1,
        stream: bool = False,
        most_nano: int | None = None,
        price_version: str = "",
    ) -> OpenEntry:
        """The intent to make a paid attempt, before its bytes leave. Settle it in `finally`.

        Attempts count from 1. `most_nano` is the most that it can cost, None if that is not known;
        `price_version` names the prices. Raises LedgerFull.
        """
        assert attempt >= 1, "attempts are numbered from 1"
        if len(self._buffer) + self._opened >= ENTRIES_BUFFERED_MAX:
            raise LedgerFull(BACK_OFF_S[1], self.refusal)
        entry = OpenEntry(
            self._mint(),
            request_id,
            attempt,
            tenant,
            route,
            model,
            deployment,
            stream,
            int(self._wall() * 1000),
            self._clock(),
            most_nano if most_nano is None else min(max(most_nano, 0), COST_NANO_MAX),
            price_version=price_version,
        )
        if self._spool is not None:
            try:
                entry.place = self._spool.begin(entry.values())
            except SpoolFull as error:
                raise LedgerFull(BACK_OFF_S[1], error.reason) from None
        self._opened += 1
        self._unannounced[entry.id] = entry
        if self._announcer is None and self._loop is not None:
            self._announcer = self._loop.call_later(ANNOUNCE_AFTER_S, self._announce)
        return entry

    async def intend(self, entry: OpenEntry) -> None:
        """Returns when the ledger has the intent. It is to be settled, whatever happens here.

        Raises LedgerFull: INTENT_WAIT_S have passed.
        """
        self._tell(entry)
        mark = self._recorded
        await self.flush(INTENT_WAIT_S)
        if self._acknowledged < mark:
            raise LedgerFull(BACK_OFF_S[1], "the ledger did not take the intent of a call in time")

    def _tell(self, entry: OpenEntry) -> None:
        entry.told = True
        self._unannounced.pop(entry.id, None)
        self._keep(Entry(*entry.values()))

    def _announce(self) -> None:
        """Tells the ledger of the calls that take long, as far as there is room."""
        self._announcer = None
        until_s = self._clock() - ANNOUNCE_AFTER_S
        for entry in list(self._unannounced.values()):
            if entry.started_s > until_s or self._buffered >= ENTRIES_BUFFERED_MAX:
                break
            self._tell(entry)
        if self._unannounced and self._loop is not None:
            self._announcer = self._loop.call_later(ANNOUNCE_AFTER_S, self._announce)

    def post(
        self,
        entry: OpenEntry,
        *,
        prompt_tokens: int,
        completion_tokens: int = 0,
        cost_nano: int | None,
        estimated: bool = False,
        error: str | None = None,
        http_status: int = 200,
        tool_calls: int = 0,
        response_id: str = "",
        cached_tokens: int = 0,
    ) -> Entry | None:
        """The attempt was answered, at least in part: it is paid. None if it is settled already.

        `cost_nano` None means that the price is not known: 0, flagged as unpriced. `error` with a
        posted entry: the money is spent, and the caller got no good answer (a cut stream).
        """
        if entry.settled:
            return None
        cost, unpriced = cost_nano or 0, cost_nano is None
        sane = 0 <= prompt_tokens <= TOKENS_MAX and 0 <= completion_tokens <= TOKENS_MAX
        if not (sane and 0 <= cost <= COST_NANO_MAX):
            prompt_tokens, completion_tokens = _bounded(prompt_tokens), _bounded(completion_tokens)
            cost, estimated = min(max(cost, 0), COST_NANO_MAX), True
        if not 0 <= cached_tokens <= prompt_tokens:
            cached_tokens = min(max(cached_tokens, 0), prompt_tokens)
        return self._settle(
            entry,
            "posted",
            prompt_tokens,
            completion_tokens,
            cost,
            unpriced,
            estimated,
            error,
            http_status,
            tool_calls,
            response_id,
            cached_tokens,
        )

    def void(self, entry: OpenEntry, error: str, http_status: int = 0) -> Entry | None:
        """The attempt failed and costs nothing. None if it is settled already.

        `http_status` is what the caller would be told, 0 where there was no answer to give.
        """
        if entry.settled:
            return None
        return self._settle(entry, "voided", 0, 0, 0, False, False, error, http_status)

    def unsettle(self, entry: OpenEntry, error: str, http_status: int = 0) -> Entry | None:
        """The answer was lost, and the attempt may have cost as much as was reserved for it.

        None if it is settled already.
        """
        if entry.settled:
            return None
        most, unknown = entry.most_nano or 0, entry.most_nano is None
        return self._settle(entry, "unsettled", 0, 0, most, unknown, False, error, http_status)

    def drop(self, entry: OpenEntry) -> None:
        """The attempt was not made after all: nothing is recorded of it.

        One whose intent the ledger may have is voided instead, as none of the request's attempts:
        the next one has its number.
        """
        if entry.settled:
            return
        if entry.told:
            entry.attempt = NOT_MADE
            self.void(entry, "not made")
            return
        entry.settled = True
        self._opened -= 1
        self._unannounced.pop(entry.id, None)
        if self._spool is not None and entry.place is not None:
            self._spool.end(entry.place)

    def note(
        self,
        status: Status,
        *,
        request_id: str,
        tenant: str,
        route: str,
        model: str,
        deployment: str = "",
        attempt: int = 1,
        stream: bool = False,
        latency_ms: int = 0,
        error: str | None = None,
        http_status: int = 200,
        saved_nano: int = 0,
        response_id: str = "",
        cache_key: str = "",
    ) -> None:
        """Records an answer that cost nothing: a hit, a joined request.

        `saved_nano` is what it would have cost.
        """
        self.record(
            Entry(
                self._mint(),
                request_id,
                attempt,
                tenant,
                route,
                model,
                deployment,
                status,
                0,
                0,
                0,
                False,
                False,
                stream,
                latency_ms,
                int(self._wall() * 1000),
                error if error is None else error[:ERROR_CHARS_MAX],
                http_status,
                "",
                min(max(saved_nano, 0), COST_NANO_MAX),
                response_id=response_id[:RESPONSE_ID_CHARS_MAX],
                cache_key=cache_key,
            )
        )

    def refuse(
        self,
        *,
        request_id: str,
        tenant: str,
        route: str,
        model: str,
        error: str,
        http_status: int,
        status: Status = "refused",
    ) -> None:
        """Counts a request for which no provider was asked.

        Those of the same tenant, route, model and status in the same second are one entry, which
        tells of the first of them.
        """
        now = self._clock()
        if now - self._refusals_s >= REFUSALS_COUNTED_S:
            self._count_refusals()
            self._refusals_s = now
        key = (tenant, route, model, http_status)
        if len(self._refusals) >= REFUSAL_KINDS_MAX and key not in self._refusals:
            key = (OTHERS, "", "", http_status)
        same = self._refusals.get(key)
        if same is not None:
            same.count += 1
            if self._spool is not None and same.place is not None:
                self._spool.count(same.place, same.count)
            return
        if self._loop is not None and not self._refusals:
            self._refusals_timer = self._loop.call_later(REFUSALS_COUNTED_S, self._count_refusals)
        values = [
            self._mint(),
            request_id,
            1,
            *key[:3],
            "",
            status,
            *(0, 0, 0, False, False, False, 0),
            int(self._wall() * 1000),
            error[:ERROR_CHARS_MAX],
            http_status,
            "",
            *(0, 0, 0),
        ]
        place = None if self._spool is None else self._spool.tally(values)
        self._refusals[key] = _Refusals(values, place)

    def _count_refusals(self) -> None:
        """What was refused so far becomes entries, if there is room; if not, it is counted on."""
        if self._buffered >= ENTRIES_BUFFERED_MAX:
            return
        counted, self._refusals = self._refusals, {}
        for same in counted.values():
            self._keep(Entry(*[*same.values, same.count]), same.place)

    def record(self, entry: Entry) -> None:
        """Takes a finished entry. Its id must be one that nobody else ever uses."""
        assert entry.attempt >= 1, "attempts are numbered from 1"
        full = self._buffered >= ENTRIES_BUFFERED_MAX
        if full and entry.status not in PAID:
            self._dropped += 1
            return
        self._keep(entry)

    async def flush(self, timeout_s: float = CLOSE_WAIT_S) -> int:
        """Waits until all that is recorded now is durable, or `timeout_s` has passed.

        Returns how many entries are still not acknowledged: 0 means all are durable.
        """
        self._count_refusals()
        if self._acknowledged == self._recorded:
            return 0
        if self._task is None:
            return len(self._buffer)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = (self._recorded, done)
        self._flushers.append(waiting)
        self._due.set()
        await asyncio.wait([done], timeout=timeout_s)
        if waiting in self._flushers:
            self._flushers.remove(waiting)
        return len(self._buffer)

    def mark(self) -> int:
        """How many entries this process has recorded so far: a name for the last of them."""
        return self._recorded

    def commit_of(self, mark: int) -> int | None:
        """The commit of the entry that `mark` names; None until it is acknowledged.

        A `Spent` has that entry in it if, and only if, its own commit is this or a later one. Of a
        mark that is older than COMMITS_KEPT acknowledgements, it is the oldest commit remembered,
        which is later than the true one.
        """
        if mark <= 0:
            return 0
        if mark > self._acknowledged:
            return None
        return self._commits[bisect_left(self._commits, (mark,))][1]

    async def spent(self, tenants: list[str], at_ms: int) -> list[Spent]:
        """What the tenants had used at `at_ms`, in their order, after a flush.

        At most TENANTS_PER_READ_MAX tenants. Raises OwnerUnavailable, also for a store that fails.
        """
        await self.flush()
        try:
            answer: list[Spent] = await self._ref.ask("spent", tenants, at_ms)
        except StoreFailed as error:
            raise OwnerUnavailable(self._ref.name, error.reason) from None
        return answer

    async def usage(
        self,
        tenant: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        group_by: GroupBy | Sequence[GroupBy] | None = None,
    ) -> dict[str, Any]:
        """The owner's totals, this process's own entries included.

        Raises OwnerUnavailable, also for a store that fails.
        """
        await self.flush()
        try:
            answer: dict[str, Any] = await self._ref.ask(
                "usage", tenant, since_ms, until_ms, group_by, timeout_s=30.0
            )
        except StoreFailed as error:
            raise OwnerUnavailable(self._ref.name, error.reason) from None
        return answer

    async def feedback(self, feedback: Feedback) -> Recorded | None:
        """Hands in what a tenant thinks of an answer; durable when it returns.

        None where the tenant has had no such answer. One that another process has just given may
        not be in the ledger yet, so it is asked twice.

        Raises:
            OwnerUnavailable: also for a store that fails; sending it again is safe.
            ValueError: the tenant has said enough about this answer.
        """
        await self.flush()
        try:
            found: Recorded | None = await self._ref.ask("record", feedback)
            if found is None:
                await self._pause(FEEDBACK_AGAIN_S)
                found = await self._ref.ask("record", feedback)
        except StoreFailed as error:
            raise OwnerUnavailable(self._ref.name, error.reason) from None
        return found

    async def feedback_sums(
        self, tenant: str | None = None
    ) -> list[tuple[str, str, str, int, int, int]]:
        """As the owner's `feedback`. Raises OwnerUnavailable, also for a store that fails."""
        return cast(
            "list[tuple[str, str, str, int, int, int]]", await self._read("feedback", tenant)
        )

    async def ratings(self) -> dict[str, Rating]:
        """What the deployments were rated. Raises OwnerUnavailable, also for a store that fails."""
        return cast("dict[str, Rating]", await self._read("ratings", int(self._wall() * 1000)))

    async def _read(self, verb: str, *args: Any) -> Any:
        try:
            return await self._ref.ask(verb, *args)
        except StoreFailed as error:
            raise OwnerUnavailable(self._ref.name, error.reason) from None

    def stats(self) -> dict[str, Any]:
        return {
            "open": self._opened,
            "buffered": len(self._buffer),
            "full": self.full,
            "why_full": self.refusal,
            "spool_bytes": 0 if self._spool is None else self._spool.size_bytes,
            "recorded": self._recorded,
            "acknowledged": self._acknowledged,
            "dropped": self._dropped,
            "messages": self._seq,
            "failures": self._failures,
            "last_error": self._last_error,
        }

    def _mint(self) -> str:
        self._minted += 1
        return f"{self._prefix}-{self._minted}"

    def _settle(
        self,
        entry: OpenEntry,
        status: Status,
        prompt_tokens: int,
        completion_tokens: int,
        cost_nano: int,
        unpriced: bool,
        estimated: bool,
        error: str | None,
        http_status: int,
        tool_calls: int = 0,
        response_id: str = "",
        cached_tokens: int = 0,
    ) -> Entry:
        entry.settled = True
        self._opened -= 1
        self._unannounced.pop(entry.id, None)
        values = (
            entry.id,
            entry.request_id,
            entry.attempt,
            entry.tenant,
            entry.route,
            entry.model,
            entry.deployment,
            status,
            prompt_tokens,
            completion_tokens,
            cost_nano,
            unpriced,
            estimated,
            entry.stream,
            int((self._clock() - entry.started_s) * 1000),
            entry.at_ms,
            error if error is None else error[:ERROR_CHARS_MAX],
            http_status,
            "" if unpriced or status == "voided" else entry.price_version,
            0,
            tool_calls,
            max(entry.most_nano or 0, cost_nano) if estimated or status == "unsettled" else 0,
            1,
            response_id[:RESPONSE_ID_CHARS_MAX],
            entry.cache_key if response_id else "",
            cached_tokens,
        )
        if self._spool is not None:
            self._spool.keep(values, entry.place)
        self._send(values)
        return Entry._make(values)

    def _keep(self, entry: Entry, place: Place | None = None) -> None:
        """`place` is where the spool has it, if it does."""
        values = entry.values()
        if self._spool is not None:
            if place is not None:
                self._spool.tallied(place)
            elif entry.status == "open":
                self._spool.pass_over()
            else:
                self._spool.keep(values)
        self._send(values)

    def _send(self, values: tuple[Any, ...]) -> None:
        self._buffer.append(values)
        self._recorded += 1
        if self._loop is None:
            return
        if len(self._buffer) >= ENTRIES_PER_MESSAGE_MAX:
            self._due.set()
        elif self._timer is None:
            self._timer = self._loop.call_later(SEND_AFTER_S, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self._due.set()

    async def _send_for_ever(self) -> None:
        back_off_s = BACK_OFF_S[0]
        while True:
            await self._due.wait()
            if await self._send_all():
                back_off_s = BACK_OFF_S[0]
                continue
            await self._pause(back_off_s)
            back_off_s = min(2 * back_off_s, BACK_OFF_S[1])

    async def _send_all(self) -> bool:
        """Sends what is due. False, and the rest is kept, when a message is not acknowledged."""
        self._due.clear()
        while self._buffer:
            if self._sending == 0:
                self._sending = min(len(self._buffer), ENTRIES_PER_MESSAGE_MAX)
                self._seq += 1
            batch = self._buffer[: self._sending]
            try:
                commit: int = await self._ref.ask("append", self._holder, self._seq, batch)
            except Exception as error:  # noqa: BLE001
                # Whatever it is, nothing was acknowledged: the batch stays, `stats` tells, and a
                # desk that never gets through fills up and stops paid calls. Dying would hide it.
                self._failures += 1
                self._last_error = f"{type(error).__name__}: {error}"
                self._due.set()
                return False
            del self._buffer[: len(batch)]
            self._sending = 0
            self._acknowledged += len(batch)
            if self._spool is not None:
                self._spool.acknowledge(len(batch))
            self._commits.append((self._acknowledged, commit))
            self._wake_flushers()
            if self._can_wait():
                break
        return True

    def _can_wait(self) -> bool:
        """Whether what came meanwhile may wait for company: a timer then sees to it."""
        if len(self._buffer) >= ENTRIES_PER_MESSAGE_MAX:
            return False
        if any(not done.done() for _, done in self._flushers):
            return False
        if self._buffer and self._timer is None:
            assert self._loop is not None, "entries are sent by a task"
            self._timer = self._loop.call_later(SEND_AFTER_S, self._on_timer)
        return True

    def _wake_flushers(self) -> None:
        for target, done in self._flushers:
            if target <= self._acknowledged and not done.done():
                done.set_result(None)


def _bounded(tokens: int) -> int:
    return min(max(tokens, 0), TOKENS_MAX)
