"""The ledger's desk: entries are written here, at once, and handed in by the batch."""

from __future__ import annotations

import asyncio
import secrets
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from actors.ledger.policy import (
    COST_NANO_MAX,
    ERROR_CHARS_MAX,
    TOKENS_MAX,
    Entry,
    GroupBy,
    LedgerFull,
    Spent,
    Status,
    StoreFailed,
)
from actors.ref import Clock, OwnerRef, OwnerUnavailable

ENTRIES_BUFFERED_MAX = 50_000
"""Most calls under way plus entries not acknowledged; some 25 MB."""
ENTRIES_PER_MESSAGE_MAX = 500
COMMITS_KEPT = 10_000
"""Most acknowledgements whose commit is remembered; over sixteen minutes at SEND_AFTER_S."""
SEND_AFTER_S = 0.1
BACK_OFF_S = (0.05, 1.0)
CLOSE_WAIT_S = 5.0


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
    settled: bool = False


class LedgerDesk:
    """Owns the entries of this process that the ledger has not acknowledged yet.

    They leave in order, SEND_AFTER_S after the first one or as soon as ENTRIES_PER_MESSAGE_MAX
    wait, and are kept until the owner says that they are durable. A message that was not
    acknowledged is sent again with the same entries and no others, so that one commit is true of
    all of them. Of acknowledged messages the last COMMITS_KEPT commits are remembered.

    Bounded by ENTRIES_BUFFERED_MAX, calls under way included: then `full` is true, `open` raises
    LedgerFull, and entries of answers that cost nothing (hits, refusals) are dropped and counted.

    Failure behaviour: with the owner away or its store failing, the desk keeps everything and tries
    again for ever, until it is full and paid calls stop. When this process dies, what it had not
    handed in is lost: at most SEND_AFTER_S of entries with the owner well.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
    ) -> None:
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._wall = wall
        self._pause = pause
        # Ids must never come again, not even from a process of the same name.
        self._prefix = f"{holder}-{nonce or secrets.token_hex(8)}"
        self._minted = 0
        self._buffer: list[Entry] = []
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
        """Hands in what it can within CLOSE_WAIT_S; the rest is lost and `stats` says how much."""
        if self._task is None:
            return
        await self.flush(CLOSE_WAIT_S)
        task, self._task = self._task, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        task.cancel()
        await asyncio.wait([task])

    @property
    def full(self) -> bool:
        """True when no further paid call may start."""
        return len(self._buffer) + self._opened >= ENTRIES_BUFFERED_MAX

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
    ) -> OpenEntry:
        """The intent to make a paid attempt, before its bytes leave. Settle it in `finally`.

        Attempts count from 1. Raises LedgerFull.
        """
        assert attempt >= 1, "attempts are numbered from 1"
        if len(self._buffer) + self._opened >= ENTRIES_BUFFERED_MAX:
            raise LedgerFull(BACK_OFF_S[1])
        self._opened += 1
        return OpenEntry(
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
        )

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
    ) -> Entry | None:
        """The attempt was answered, at least in part: it is paid. None if it is settled already.

        `cost_nano` None means that the price is not known: 0, flagged as unpriced. `error` with a
        posted entry: the money is spent, and the caller got no good answer (a cut stream).
        """
        if entry.settled:
            return None
        prompt, completion = _bounded(prompt_tokens), _bounded(completion_tokens)
        sane = prompt == prompt_tokens and completion == completion_tokens
        cost = cost_nano or 0
        return self._settle(
            entry,
            "posted",
            prompt,
            completion,
            min(max(cost, 0), COST_NANO_MAX),
            cost_nano is None,
            estimated or not sane or not 0 <= cost <= COST_NANO_MAX,
            error,
            http_status,
        )

    def void(self, entry: OpenEntry, error: str, http_status: int = 0) -> Entry | None:
        """The attempt failed and costs nothing. None if it is settled already.

        `http_status` is what the caller would be told, 0 where there was no answer to give.
        """
        if entry.settled:
            return None
        return self._settle(entry, "voided", 0, 0, 0, False, False, error, http_status)

    def drop(self, entry: OpenEntry) -> None:
        """The attempt was not made after all: nothing is recorded of it."""
        if not entry.settled:
            entry.settled = True
            self._opened -= 1

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
    ) -> None:
        """Records an answer that cost nothing: a hit, a joined request, a refusal."""
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
            )
        )

    def record(self, entry: Entry) -> None:
        """Takes a finished entry. Its id must be one that nobody else ever uses."""
        assert entry.attempt >= 1, "attempts are numbered from 1"
        if self.full and entry.status not in ("posted", "voided"):
            self._dropped += 1
            return
        self._keep(entry)

    async def flush(self, timeout_s: float = CLOSE_WAIT_S) -> int:
        """Waits until all that is recorded now is durable, or `timeout_s` has passed.

        Returns how many entries are still not acknowledged: 0 means all are durable.
        """
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
        group_by: GroupBy | None = None,
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

    def stats(self) -> dict[str, Any]:
        return {
            "open": self._opened,
            "buffered": len(self._buffer),
            "full": self.full,
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
    ) -> Entry:
        entry.settled = True
        self._opened -= 1
        final = Entry(
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
        )
        self._keep(final)
        return final

    def _keep(self, entry: Entry) -> None:
        self._buffer.append(entry)
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
