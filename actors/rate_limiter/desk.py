"""The limiter's desk: says at once whether a request may go on, from what the owner has lent."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from actors.rate_limiter.policy import Figures, Grant, Hold, Limits, Refusal, Ticket
from actors.rate_limiter.till import RENEW_S, Held, Message, Till
from actors.ref import Clock, OwnerRef, OwnerUnavailable

ASK_TIMEOUT_S = 1.0  # then callers are told that limits cannot be checked
LENT_WAIT_S = 0.7  # others give back within two of their ticks
ASK_PAUSE_S = 0.02  # a need that was refused is not repeated sooner
WAITING_MAX = 10_000  # requests that wait in this process, all tenants together


@dataclass(slots=True)
class _Waiter:
    """A request that waits for a permit or a slot. `until_s` is when it gives up."""

    future: asyncio.Future[bool | Refusal]
    until_s: float
    patient: bool  # waits for the limit itself, not only for what others have lent


class _Counter:
    """One owner's desk: its till, and the requests that wait for what is not there yet."""

    def __init__(self, ref: OwnerRef, holder: str, clock: Clock) -> None:
        self.till = Till(holder)
        self._ref = ref
        self._holder = holder
        self._clock = clock
        self._permits: dict[str, deque[_Waiter]] = {}
        self._slots: dict[str, deque[_Waiter]] = {}
        self._wake = asyncio.Event()
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
        for queue in (*self._permits.values(), *self._slots.values()):
            for waiter in queue:
                waiter.future.cancel()
        message = self.till.message(self._clock(), everything=True)
        if message is not None:
            try:
                await self._ref.ask("lease", self._holder, message.seq, message.asks, timeout_s=1.0)
            except OwnerUnavailable:
                pass  # the leases end by themselves

    async def permit(
        self, held: Held, tenant: str, wait_s: float, queue_max: int
    ) -> Refusal | None:
        """Wait for a permit. None: there it is, taken."""
        return await self._wait(self._permits, held, tenant, wait_s, queue_max)

    async def slot(self, held: Held, tenant: str, wait_s: float, queue_max: int) -> Refusal | None:
        """Wait for a slot. None: there it is, taken."""
        return await self._wait(self._slots, held, tenant, wait_s, queue_max)

    def freed(self, tenant: str, held: Held) -> None:
        """A permit or slot came back: whoever waits first has it."""
        if tenant in self._slots:
            self._serve(self._slots, tenant, held)
        if held.give_slots:
            self._wake.set()

    def queued(self, tenant: str) -> int:
        return len(self._permits.get(tenant, ())) + len(self._slots.get(tenant, ()))

    async def _wait(
        self,
        queues: dict[str, deque[_Waiter]],
        held: Held,
        tenant: str,
        wait_s: float,
        queue_max: int,
    ) -> Refusal | None:
        queue = queues.setdefault(tenant, deque())
        if self.waiting >= WAITING_MAX or (wait_s > 0 and len(queue) >= queue_max > 0):
            last = held.refusal or held.slot_refusal
            retry_after_s = last.retry_after_s if last is not None else RENEW_S
            return Refusal("queue", float(queue_max), 0.0, retry_after_s)
        now = self._clock()
        told = held.refusal if queues is self._permits else held.slot_refusal
        if wait_s <= 0 and told is not None and not told.lent and now < held.ask_again_s:
            retry_after_s = max(0.001, told.retry_after_s - (now - held.refused_s))
            return Refusal(told.kind, told.limit, told.remaining, retry_after_s)
        future: asyncio.Future[bool | Refusal] = asyncio.get_running_loop().create_future()
        waiter = _Waiter(future, now + max(wait_s, LENT_WAIT_S), wait_s > 0)
        queue.append(waiter)
        self.waiting += 1
        self._wake.set()
        try:
            answer = await future
        finally:
            self.waiting -= 1
            if waiter in queue:
                queue.remove(waiter)
            if not queue and queues.get(tenant) is queue:
                del queues[tenant]
        return answer if isinstance(answer, Refusal) else None

    async def _run(self) -> None:
        """Say what there is to say, tick by tick, for as long as somebody may want something."""
        while True:
            await self._sleep()
            now = self._clock()
            self._expire(now)
            self._state_needs()
            message = self.till.message(now)
            if message is None:
                continue
            await self._send(message, now)

    async def _sleep(self) -> None:
        self._wake.clear()
        if self._hungry():
            await asyncio.sleep(0)  # what else arrives in this tick goes along
            return
        due_s = self.till.next_due_s(self._clock())
        waits = [w.until_s for q in (*self._permits.values(), *self._slots.values()) for w in q]
        wakes = [t for t in (due_s, min(waits, default=None), self._again_s()) if t is not None]
        timeout_s = None if not wakes else max(0.0, min(wakes) - self._clock())
        try:
            async with asyncio.timeout(timeout_s):
                await self._wake.wait()
        except TimeoutError:
            pass
        await asyncio.sleep(0)

    def _hungry(self) -> bool:
        """Whether somebody waits that the owner has not been asked for yet."""
        now = self._clock()
        return any(self._may_ask(t, now) for t in (*self._permits, *self._slots))

    def _may_ask(self, tenant: str, now: float) -> bool:
        held = self.till.held.get(tenant)
        return held is not None and now >= held.ask_again_s

    def _again_s(self) -> float | None:
        """When a tenant that was refused may be asked for again."""
        times = [
            self.till.held[t].ask_again_s
            for t in (*self._permits, *self._slots)
            if t in self.till.held
        ]
        return min(times, default=None)

    def _state_needs(self) -> None:
        now = self._clock()
        for tenant, held in self.till.held.items():
            asking = now >= held.ask_again_s
            held.need = len(self._permits.get(tenant, ())) if asking else 0
            held.slots_need = len(self._slots.get(tenant, ())) if asking else 0

    async def _send(self, message: Message, sent_s: float) -> None:
        try:
            grants: list[Grant] = await self._ref.ask(
                "lease", self._holder, message.seq, message.asks, timeout_s=ASK_TIMEOUT_S
            )
        except OwnerUnavailable as error:
            self.away += 1
            self.till.lost(message)
            self._fail_all(error)
            await asyncio.sleep(RENEW_S)
            return
        now = self._clock()
        self.till.granted(message, grants, sent_s, now)
        for ask in message.asks:
            held = self.till.held.get(ask.tenant)
            if held is None:
                continue
            self._serve(self._permits, ask.tenant, held)
            self._serve(self._slots, ask.tenant, held)
            self._refuse(ask.tenant, held, now)

    def _serve(self, queues: dict[str, deque[_Waiter]], tenant: str, held: Held) -> None:
        """In the order they came, as far as it goes."""
        queue = queues.get(tenant)
        now = self._clock()
        while queue:
            waiter = queue[0]
            if waiter.future.done():
                queue.popleft()
                continue
            slots = queues is self._slots
            if not (self.till.take_slot(held) if slots else self.till.take(held, now)):
                return
            queue.popleft()
            waiter.future.set_result(True)

    def _refuse(self, tenant: str, held: Held, now: float) -> None:
        """Those who still wait: refused now, or asked for again later."""
        again_s = []
        for queues, refusal in (
            (self._permits, held.refusal),
            (self._slots, held.slot_refusal),
        ):
            queue = queues.get(tenant)
            if refusal is None:
                continue
            for waiter in list(queue or ()):
                if not (refusal.lent or waiter.patient):
                    self._give_up(waiter, refusal)
            again_s.append(now + min(refusal.retry_after_s, ASK_PAUSE_S))
        held.ask_again_s = min(again_s, default=now)

    def _expire(self, now: float) -> None:
        for queues in (self._permits, self._slots):
            for tenant, queue in queues.items():
                held = self.till.held.get(tenant)
                for waiter in list(queue):
                    if waiter.until_s <= now:
                        last = None
                        if held is not None:
                            last = held.refusal if queues is self._permits else held.slot_refusal
                        self._give_up(waiter, last or Refusal("unknown", 0.0, 0.0, RENEW_S))

    def _give_up(self, waiter: _Waiter, refusal: Refusal) -> None:
        if not waiter.future.done():
            waiter.future.set_result(refusal)

    def _fail_all(self, error: OwnerUnavailable) -> None:
        for queue in (*self._permits.values(), *self._slots.values()):
            for waiter in queue:
                if not waiter.future.done():
                    waiter.future.set_exception(OwnerUnavailable(error.owner, error.reason))


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
        self, refs: Sequence[OwnerRef], holder: str, clock: Clock = time.monotonic
    ) -> None:
        self._clock = clock
        self._refs = list(refs)
        self._counters = [_Counter(ref, holder, clock) for ref in refs]
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
        if counter.queued(tenant) == 0 and counter.till.take(held, self._clock()):
            self._counted += 1
            return Ticket(tenant, limits, True)
        refusal = await counter.permit(held, tenant, wait_s, queue_max)
        if refusal is not None:
            self._refused += 1
            return refusal
        self._counted += 1
        return Ticket(tenant, limits, True)

    def uncount(self, ticket: Ticket) -> None:
        """The request did not take place: its permit is free again."""
        if ticket.counted:
            counter = self._home(ticket.tenant)
            held = counter.till.held.get(ticket.tenant)
            if held is not None:
                counter.till.put_back(held, self._clock())
                counter.freed(ticket.tenant, held)

    async def reserve(self, ticket: Ticket, *, wait_s: float = 0.0) -> Hold | Refusal:
        """A concurrency slot for a counted request, to be given back by `settle`.

        Raises:
            OwnerUnavailable: as `count`.
        """
        if ticket.limits.concurrent is None:
            return Hold(ticket.tenant, 0)
        counter = self._home(ticket.tenant)
        held = counter.till.of(ticket.tenant, ticket.limits, self._clock())
        if counter.queued(ticket.tenant) or not counter.till.take_slot(held):
            refusal = await counter.slot(held, ticket.tenant, wait_s, 0)
            if refusal is not None:
                self._refused += 1
                return refusal
        self._ids += 1
        self._holds[self._ids] = ticket.tenant
        return Hold(ticket.tenant, self._ids)

    def settle(self, hold: Hold) -> None:
        """Give the slot back. Idempotent."""
        if self._holds.pop(hold.id, None) is None:
            return
        counter = self._home(hold.tenant)
        held = counter.till.held[hold.tenant]
        held.used_s = self._clock()
        counter.till.put_slot(held)
        counter.freed(hold.tenant, held)

    def figures(self, tenant: str) -> Figures | None:
        """The owner's last figures, less what this process used since; None if none are known."""
        held = self._home(tenant).till.held.get(tenant)
        if held is None or held.figures is None:
            return None
        last = held.figures
        remaining = max(0.0, last.remaining - held.arrivals)
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


HOMES_MAX = 100_000
_UNLIMITED = Limits()


def _weight(owner: str, tenant: str) -> bytes:
    return hashlib.blake2b(f"{owner}\0{tenant}".encode(), digest_size=8).digest()
