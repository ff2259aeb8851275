"""The limiter's desk: says at once whether a request may go on, from what the owner has lent."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from actors.rate_limiter.policy import Figures, Grant, Hold, Limits, Refusal, Ticket
from actors.rate_limiter.till import RENEW_S, Held, Message, Till
from actors.ref import Clock, OwnerRef, OwnerUnavailable

ASK_TIMEOUT_S = 1.0  # then callers are told that limits cannot be checked
LENT_WAIT_S = 0.7  # others give back within two of their ticks
PAUSE_S_MIN = 0.001
WAITING_MAX = 10_000  # requests that wait in this process, all tenants together
HOMES_MAX = 100_000
QUEUE_KIND = "queue"

Sleep = Callable[[float], Awaitable[None]]
_UNLIMITED = Limits()

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Waiter:
    """A request that waits for a permit or a slot. `until_s` is when it gives up."""

    future: asyncio.Future[Ticket | Refusal]
    until_s: float
    patient: bool  # waits for the limit itself, not only for what others have lent


class _Line:
    """Those who wait for one tenant's permits, or for its slots, in the order they came."""

    def __init__(self, held: Held, slots: bool) -> None:
        self.held = held
        self.slots = slots
        self.waiters: deque[_Waiter] = deque()
        self.patient = 0

    @property
    def refusal(self) -> Refusal | None:
        """What the owner said last."""
        return self.held.slot_refusal if self.slots else self.held.refusal

    @property
    def again_s(self) -> float:
        return self.held.slots_again_s if self.slots else self.held.need_again_s

    def join(self, waiter: _Waiter) -> None:
        self.waiters.append(waiter)
        self._count(waiter, 1)

    def leave(self, waiter: _Waiter) -> None:
        """Whatever came of it. Does nothing the second time."""
        if waiter in self.waiters:
            self.waiters.remove(waiter)
            self._count(waiter, -1)

    def _count(self, waiter: _Waiter, by: int) -> None:
        self.patient += by if waiter.patient else 0
        if self.slots:
            self.held.slots_need += by
        else:
            self.held.need += by


class _Counter:
    """One owner's desk: its till, and the requests that wait for what is not there yet."""

    def __init__(self, ref: OwnerRef, holder: str, clock: Clock, sleep: Sleep) -> None:
        self.till = Till()
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._sleep = sleep
        self._permits: dict[str, _Line] = {}
        self._slots: dict[str, _Line] = {}
        self._wake = asyncio.Event()
        self._quiet_until_s = 0.0  # after the owner did not answer
        self._task: asyncio.Task[None] | None = None
        self.waiting = 0
        self.away = 0

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"limits at {self._ref.name}")

    async def close(self) -> None:
        """Give everything back, as far as the owner answers."""
        if self._task is None:
            return
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._task = None
        for line in self._lines():
            for waiter in list(line.waiters):
                self._end(line, waiter, OwnerUnavailable(self._ref.name, "this desk is closed"))
        message = self.till.message(self._clock(), everything=True)
        if message is not None:
            try:
                await self._ref.ask("lease", self._holder, message.seq, message.asks, timeout_s=1.0)
            except OwnerUnavailable:
                pass  # the leases end by themselves

    def permit(self, held: Held) -> Ticket | None:
        """A permit without waiting, unless others wait for one."""
        return None if held.need else self.till.take(held, self._clock())

    def slot(self, held: Held) -> bool:
        """A slot without waiting, unless others wait for one."""
        return not held.slots_need and self.till.take_slot(held, self._clock())

    async def wait_permit(self, held: Held, wait_s: float, queue_max: int) -> Ticket | Refusal:
        return await self._wait(self._permits, held, wait_s, queue_max)

    async def wait_slot(self, held: Held, wait_s: float) -> Ticket | Refusal:
        """Wait for a slot. A ticket: there it is, taken."""
        return await self._wait(self._slots, held, wait_s, WAITING_MAX)

    def put_back(self, ticket: Ticket) -> None:
        held = self.till.held.get(ticket.tenant)
        if held is not None:
            self.till.put_back(held, ticket, self._clock())
            self._freed(self._permits, held)

    def put_slot(self, tenant: str) -> None:
        held = self.till.held[tenant]
        self.till.put_slot(held, self._clock())
        self._freed(self._slots, held)
        if held.slots_wanted:
            self._wake.set()

    # ----------------------------------------------------------------------------------------

    def _lines(self) -> list[_Line]:
        return [*self._permits.values(), *self._slots.values()]

    async def _wait(
        self, lines: dict[str, _Line], held: Held, wait_s: float, queue_max: int
    ) -> Ticket | Refusal:
        now, tenant = self._clock(), held.tenant
        line = lines.get(tenant) or _Line(held, lines is self._slots)
        told, patient = line.refusal, wait_s > 0
        if self.waiting >= WAITING_MAX or (patient and line.patient >= queue_max):
            retry_after_s = told.retry_after_s if told is not None else RENEW_S
            return Refusal(QUEUE_KIND, float(queue_max), 0.0, retry_after_s)
        if not patient and told is not None and not told.lent and now < line.again_s:
            retry_after_s = max(0.001, told.retry_after_s - (now - held.answered_s))
            return Refusal(told.kind, told.limit, told.remaining, retry_after_s)
        future: asyncio.Future[Ticket | Refusal] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(future, now + (wait_s if patient else LENT_WAIT_S), patient)
        lines[tenant] = line
        line.join(waiter)
        self.waiting += 1
        self._wake.set()
        try:
            return await future
        except asyncio.CancelledError:
            served = future.done() and not future.cancelled() and future.exception() is None
            if served and isinstance(ticket := future.result(), Ticket):
                if line.slots:
                    self.put_slot(tenant)
                else:
                    self.put_back(ticket)
            raise
        finally:
            self.waiting -= 1
            line.leave(waiter)
            if not line.waiters and lines.get(tenant) is line:
                del lines[tenant]

    async def _run(self) -> None:
        """Say what there is to say, tick by tick, for as long as somebody may want something."""
        while True:
            message: Message | None = None
            now = self._clock()
            try:
                self._look(now)
                if now >= self._quiet_until_s:
                    message = self.till.message(now)
                if message is not None:
                    await self._send(message, now)
                    message = None
                await self._rest()
            except Exception as error:
                # A fault of ours. Whoever waits gets it; the next message says all that is held.
                log.exception("%s: what was under way is dropped", self._ref.name)
                self._lose(message, now, error)
                await self._sleep(RENEW_S)

    async def _rest(self) -> None:
        """Until somebody wants something, or there is something to say."""
        self._wake.clear()
        wakes = [waiter.until_s for line in self._lines() for waiter in line.waiters]
        due_s = self.till.next_due_s()
        if due_s is not None:
            wakes.append(max(due_s, self._quiet_until_s))
        now = self._clock()
        for line in self._permits.values():
            permit_in_s = self.till.permit_in_s(line.held, now)
            if permit_in_s is not None:
                wakes.append(now + max(PAUSE_S_MIN, permit_in_s))
        alarm: asyncio.Task[None] | None = None
        if wakes and min(wakes) <= now:
            self._wake.set()
        elif wakes:
            alarm = asyncio.create_task(self._ring(min(wakes) - now))
        try:
            await self._wake.wait()
        finally:
            if alarm is not None:
                alarm.cancel()
        await asyncio.sleep(0)  # what else arrives in this tick goes along

    async def _ring(self, after_s: float) -> None:
        await self._sleep(after_s)
        self._wake.set()

    async def _send(self, message: Message, sent_s: float) -> None:
        try:
            grants: list[Grant] = await self._ref.ask(
                "lease", self._holder, message.seq, message.asks, timeout_s=ASK_TIMEOUT_S
            )
        except OwnerUnavailable as error:
            self._lose(message, sent_s, error)
            return
        now = self._clock()
        self.till.granted(message, grants, sent_s, now)
        for ask in message.asks:
            for lines in (self._permits, self._slots):
                line = lines.get(ask.tenant)
                if line is not None:
                    self._serve(line, now)
                    self._refuse(line)

    def _lose(self, message: Message | None, sent_s: float, error: Exception) -> None:
        """No answer. Those who can be served by what is held may wait for it, if they want to."""
        self.away += 1
        now = self._clock()
        self._quiet_until_s = now + RENEW_S
        if message is not None:
            self.till.lost(message, sent_s)
        for line in self._lines():
            self._serve(line, now)
            permit_in_s = None if line.slots else self.till.permit_in_s(line.held, now)
            for waiter in list(line.waiters):
                if permit_in_s is None:
                    self._end(line, waiter, _copy(error))
                elif not waiter.patient:
                    limit = line.held.limits.requests_per_minute or 0.0
                    refusal = Refusal("requests_per_minute", limit, 0.0, max(0.001, permit_in_s))
                    self._end(line, waiter, refusal)

    def _look(self, now: float) -> None:
        """Serve what the leases have by now; those whose time is up are refused."""
        for line in self._lines():
            self._serve(line, now)
            for waiter in list(line.waiters):
                if waiter.until_s <= now:
                    self._end(line, waiter, line.refusal or _unknown())

    def _serve(self, line: _Line, now: float) -> None:
        """In the order they came, as far as it goes."""
        while line.waiters:
            waiter = line.waiters[0]
            if waiter.future.done():
                line.leave(waiter)
                continue
            ticket = self._take(line, now)
            if ticket is None:
                return
            self._end(line, waiter, ticket)

    def _take(self, line: _Line, now: float) -> Ticket | None:
        held = line.held
        if not line.slots:
            return self.till.take(held, now)
        return Ticket(held.tenant, held.limits, False) if self.till.take_slot(held, now) else None

    def _freed(self, lines: dict[str, _Line], held: Held) -> None:
        """A permit or slot came back: whoever waits first has it."""
        line = lines.get(held.tenant)
        if line is not None:
            self._serve(line, self._clock())

    def _refuse(self, line: _Line) -> None:
        """Those who wait only for what others have, and others have none."""
        refusal = line.refusal
        if refusal is None or refusal.lent:
            return
        for waiter in list(line.waiters):
            if not waiter.patient:
                self._end(line, waiter, refusal)

    def _end(self, line: _Line, waiter: _Waiter, end: Ticket | Refusal | Exception) -> None:
        line.leave(waiter)
        if waiter.future.done():
            return
        if isinstance(end, Exception):
            waiter.future.set_exception(end)
        else:
            waiter.future.set_result(end)


class RateLimiterDesk:
    """Owns what this process was lent of each tenant's limits, and the requests that wait for more.

    With a live lease a request is counted without waiting. Needs, renewals and returns of all
    tenants travel in one message per owner and tick (RENEW_S). Bounded by the tenants that were
    active within the last second, and by WAITING_MAX waiting requests.

    Failure behaviour: fails closed. Leases are used to their end; then a request waits up to
    ASK_TIMEOUT_S for the owner and gets OwnerUnavailable. Nothing is ever admitted on credit. When
    this process dies, its leases end by themselves; its slots stay taken until it is known dead.
    """

    def __init__(
        self,
        refs: Sequence[OwnerRef],
        holder: str,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._clock = clock
        self._refs = list(refs)
        name = f"{holder}#{secrets.token_hex(4)}"  # another desk of this process counts anew
        self._counters = [_Counter(ref, name, clock, sleep) for ref in refs]
        self._homes: dict[str, _Counter] = {}
        self._ids = 0
        self._holds: dict[int, str] = {}
        self._refused = 0
        self._counted = 0

    async def start(self) -> None:
        """Begin to renew leases."""
        for counter in self._counters:
            counter.start()

    async def close(self) -> None:
        """Give everything back and stop."""
        for counter in self._counters:
            await counter.close()

    async def count(
        self, tenant: str, limits: Limits | None, *, wait_s: float = 0.0, queue_max: int = 100
    ) -> Ticket | Refusal:
        """Count one request. Waits for up to `wait_s` in the order of arrival.

        Raises:
            OwnerUnavailable: no lease is left and the owner does not answer.
        """
        if limits is None or not limits.counts:
            return Ticket(tenant, limits or _UNLIMITED, False)
        counter = self._home(tenant)
        held = counter.till.of(tenant, limits, self._clock())
        held.arrivals += 1
        answer: Ticket | Refusal | None = counter.permit(held)
        if answer is None:
            answer = await counter.wait_permit(held, wait_s, queue_max)
        if isinstance(answer, Refusal):
            self._refused += 1
        else:
            self._counted += 1
        return answer

    def uncount(self, ticket: Ticket) -> None:
        """The request did not take place: its permit is free again, if its lease still lives."""
        if ticket.counted:
            self._home(ticket.tenant).put_back(ticket)

    async def reserve(self, ticket: Ticket, *, wait_s: float = 0.0) -> Hold | Refusal:
        """A concurrency slot for a counted request, to be given back by `settle`.

        Raises:
            OwnerUnavailable: as `count`.
        """
        if ticket.limits.concurrent is None:
            return Hold(ticket.tenant, 0)
        counter = self._home(ticket.tenant)
        held = counter.till.of(ticket.tenant, ticket.limits, self._clock())
        if not counter.slot(held):
            answer = await counter.wait_slot(held, wait_s)
            if isinstance(answer, Refusal):
                self._refused += 1
                return answer
        self._ids += 1
        self._holds[self._ids] = ticket.tenant
        return Hold(ticket.tenant, self._ids)

    def settle(self, hold: Hold) -> None:
        """Give the slot back. Idempotent."""
        if self._holds.pop(hold.id, None) is None:
            return
        self._home(hold.tenant).put_slot(hold.tenant)

    def figures(self, tenant: str) -> Figures | None:
        """The owner's last figures, less what this process used since; None if none are known."""
        held = self._home(tenant).till.held.get(tenant)
        if held is None or held.figures is None:
            return None
        last = held.figures
        remaining = max(0.0, last.remaining - held.taken)
        return Figures(last.limit, remaining, last.reset_s)

    def stats(self) -> dict[str, Any]:
        return {
            "tenants": sum(len(counter.till.held) for counter in self._counters),
            "waiting": sum(counter.waiting for counter in self._counters),
            "slots_used": len(self._holds),
            "counted": self._counted,
            "refused": self._refused,
            "owner_away": sum(counter.away for counter in self._counters),
        }

    def _home(self, tenant: str) -> _Counter:
        """The tenant's owner, by rendezvous hash: the highest of all hashes of tenant and owner."""
        if len(self._counters) == 1:
            return self._counters[0]
        home = self._homes.get(tenant)
        if home is None:
            if len(self._homes) >= HOMES_MAX:
                self._homes.clear()
            best = max(range(len(self._refs)), key=lambda n: _weight(self._refs[n].name, tenant))
            home = self._homes[tenant] = self._counters[best]
        return home


def _unknown() -> Refusal:
    return Refusal("unknown", 0.0, 0.0, RENEW_S)


def _copy(error: Exception) -> Exception:
    """One for each waiter: an exception that is raised in many places grows their tracebacks."""
    if isinstance(error, OwnerUnavailable):
        return OwnerUnavailable(error.owner, error.reason)
    return error


def _weight(owner: str, tenant: str) -> bytes:
    return hashlib.blake2b(f"{owner}\0{tenant}".encode(), digest_size=8).digest()
