"""One owner's counter in a desk: its till, the lines before it, and the talk with the owner."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator

from actors.rate_limiter.agenda import RENEW_S
from actors.rate_limiter.book import Book
from actors.rate_limiter.held import Held, Reservation
from actors.rate_limiter.pace import Pace
from actors.rate_limiter.terms import (
    NOTHING_USED,
    Amount,
    Answer,
    Layout,
    Need,
    Refusal,
    Ticket,
)
from actors.rate_limiter.till import SEED_PAUSE_S, Message, Till
from actors.rate_limiter.waiting import Alarms, End, Line, Waiter
from actors.ref import Clock, OwnerRef, OwnerUnavailable, Packed

ASK_TIMEOUT_S = 1.0  # then callers are told that limits cannot be checked
LENT_WAIT_S = 0.7  # others give back within two of their ticks
LATE_WAIT_S = 3.0  # a process that stands still misses its leases
MONEY_WAIT_S = 10.0  # calls under way may leave some of what they reserved
SEED_WAIT_S = 10.0  # the ledger's desk has answered by then, or said that it cannot
PAUSE_S_MIN = 0.001
WAITING_MAX = 10_000  # requests that wait at one counter, all tenants together
SEEDS_MAX = 500  # tenants that the ledger is asked about at once
QUEUE_KIND = "queue"

Sleep = Callable[[float], Awaitable[None]]

log = logging.getLogger(__name__)


class Counter:
    """Owns a till, and the requests that wait for what is not there yet.

    Bounded by WAITING_MAX. Failure behaviour: see RateLimiterDesk.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        book: Book,
        layout: Layout,
        clock: Clock,
        sleep: Sleep,
        batches: Iterator[int] | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Messages leave as far apart as `pace` says, unless they are about hot tenants."""
        self.till = Till(book, batches)
        self.ref = ref
        self.layout = layout
        self.waiting = 0
        self.away = 0
        self._holder = holder
        self._book = book
        self._clock = clock
        self._sleep = sleep
        self._pace = pace
        self._to_count: dict[str, Line] = {}
        self._to_go_on: dict[str, Line] = {}
        self._alarms = Alarms()
        self._wake = asyncio.Event()
        self._planned_s = float("inf")  # when it wakes up by itself
        self._quiet_until_s = float("-inf")  # after the owner did not answer
        self._task: asyncio.Task[None] | None = None
        self._seeding: asyncio.Task[None] | None = None

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name=f"limits at {self.ref.name}")

    async def close(self, *, give_back: bool = True) -> None:
        """Stop, and give everything back as far as the owner answers."""
        if self._task is None:
            return
        tasks = [task for task in (self._task, self._seeding) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._task = self._seeding = None
        self._end_all(OwnerUnavailable(self.ref.name, "this desk is closed"))
        message = self.till.message(self._clock(), everything=True) if give_back else None
        if message is not None:
            try:
                await self._ask(message)
            except OwnerUnavailable:
                pass  # the leases end by themselves

    # ---- requests --------------------------------------------------------------------------

    async def wait_to_count(
        self, held: Held, amount: Amount, wait_s: float, queue_max: int
    ) -> Ticket | Refusal:
        """Wait for a permit."""
        if not held.need:
            held.ahead = amount
        line = self._to_count.get(held.tenant) or Line(held, to_go_on=False, counter=self)
        end = await self._wait(self._to_count, line, None, amount, wait_s, queue_max)
        assert not isinstance(end, Reservation)
        return end

    async def wait_to_go_on(
        self, held: Held, ticket: Ticket, amount: Amount, wait_s: float
    ) -> Reservation | Refusal:
        """Wait for all that a counted request needs."""
        line = self._to_go_on.get(held.tenant) or Line(held, to_go_on=True, counter=self)
        end = await self._wait(self._to_go_on, line, ticket, amount, wait_s, WAITING_MAX)
        assert not isinstance(end, Ticket)
        return end

    def put_back(self, ticket: Ticket) -> None:
        self.till.put_back(ticket, self._clock())
        self._freed(ticket.tenant)

    def settle(self, taken: Reservation, used: Amount) -> None:
        tells = self.till.settle(taken, used, self._clock())
        if tells or self.waiting:
            self._freed(taken.held.tenant)

    def cancel(self, taken: Reservation) -> None:
        self.till.cancel(taken, self._clock())
        self._freed(taken.held.tenant)

    # ---- a change of layout ----------------------------------------------------------------

    def leave(self, tenant: str) -> tuple[Held | None, list[Line]]:
        """The tenant has another home: what it holds, and who waits for it."""
        lines = [
            line
            for lines in (self._to_count, self._to_go_on)
            if (line := lines.pop(tenant, None)) is not None
        ]
        self.waiting -= sum(len(line.waiters) for line in lines)
        return self.till.leave(tenant, self._clock()), lines

    def join(self, held: Held, lines: list[Line]) -> None:
        """Take over a tenant, with those who wait in their order."""
        self.till.join(held, self._clock())
        for line in lines:
            (self._to_go_on if line.to_go_on else self._to_count)[held.tenant] = line
            line.counter, line.alarm_s = self, float("inf")
            self.waiting += len(line.waiters)
            for waiter in line.waiters:
                self._alarms.add(waiter.until_s, waiter)
        self._wake.set()

    # ----------------------------------------------------------------------------------------

    async def _wait(
        self,
        lines: dict[str, Line],
        line: Line,
        ticket: Ticket | None,
        amount: Amount,
        wait_s: float,
        queue_max: int,
    ) -> End:
        now, held, patient = self._clock(), line.held, wait_s > 0
        need = _need(held, amount) if line.to_go_on else Need()
        if self.waiting >= WAITING_MAX or (patient and line.patient >= queue_max):
            told = line.refusal
            retry_after_s = told.retry_after_s if told is not None else RENEW_S
            return Refusal(QUEUE_KIND, float(queue_max), 0.0, retry_after_s)
        remembered = line.remembered(need, patient, now)
        if remembered is not None:
            return remembered
        future: asyncio.Future[End] = asyncio.get_running_loop().create_future()
        until_s = now + (wait_s if patient else LENT_WAIT_S)
        waiter = Waiter(line, future, now, until_s, patient, ticket, amount, need)
        lines[held.tenant] = line
        if patient:
            held.waited_s = float("inf")
        elif not line.waiters:
            held.waited_s = now
        line.join(waiter)
        self.waiting += 1
        self._alarms.add(until_s, waiter)
        if len(line.waiters) == 1 or not patient:
            self.till.wants(held, line.again_s)
            self._replan()
        try:
            return await future
        except asyncio.CancelledError:
            if future.done() and not future.cancelled() and future.exception() is None:
                line.counter._undo(future.result())
            else:
                line.counter._leave(waiter)
                line.counter._serve(line, self._clock())
                line.counter._replan()
            raise

    def _undo(self, end: End) -> None:
        """It was served and is not there any more: the next has it."""
        if isinstance(end, Ticket):
            self.put_back(end)
        elif isinstance(end, Reservation):
            self.settle(end, NOTHING_USED)

    def _leave(self, waiter: Waiter) -> None:
        line = waiter.line
        if waiter not in line.waiters:
            return
        line.leave(waiter)
        self.waiting -= 1
        lines = self._to_go_on if line.to_go_on else self._to_count
        if not line.waiters and lines.get(line.held.tenant) is line:
            del lines[line.held.tenant]

    async def _run(self) -> None:
        """Say what there is to say, tick by tick, for as long as somebody may want something."""
        while True:
            message: Message | None = None
            now = self._clock()
            try:
                self._ring(now)
                if now >= self._quiet_until_s:
                    message = self.till.message(now)
                if message is not None:
                    hurries = any(ask.hot for ask in message.asks)
                    await self._send(message, now)
                    message = None
                    pause_s = 0.0 if hurries or self._pace is None else self._pace.pause_s()
                    rest_s = now + pause_s - self._clock()
                    if rest_s > 0.0:
                        await self._sleep(rest_s)
                self._seed()
                await self._rest()
            except Exception as error:
                # A fault of ours. Whoever waits gets it; the next message says all that is held.
                log.exception("%s: what was under way is dropped", self.ref.name)
                self._lose(message, now, error)
                await self._sleep(RENEW_S)

    async def _rest(self) -> None:
        """Until somebody wants something, or there is something to say."""
        self._wake.clear()
        now = self._clock()
        wakes = []
        if (alarm_s := self._alarms.next_s()) is not None:
            wakes.append(alarm_s)
        if (due_s := self.till.next_due_s()) is not None:
            wakes.append(max(due_s, self._quiet_until_s))
        self._planned_s = min(wakes, default=float("inf"))
        alarm: asyncio.Task[None] | None = None
        if self._planned_s <= now:
            self._wake.set()
        elif wakes:
            alarm = asyncio.create_task(self._wake_after(self._planned_s - now))
        try:
            await self._wake.wait()
        finally:
            self._planned_s = float("-inf")  # it is awake
            if alarm is not None:
                alarm.cancel()
        await asyncio.sleep(0)  # what else arrives in this tick goes along

    async def _wake_after(self, after_s: float) -> None:
        await self._sleep(after_s)
        self._wake.set()

    async def _ask(self, message: Message) -> Answer:
        answer: Answer = await self.ref.ask(
            "lease",
            self._holder,
            message.seq,
            Packed(message.asks),
            self.layout,
            message.owner,
            timeout_s=ASK_TIMEOUT_S,
        )
        return answer

    async def _send(self, message: Message, sent_s: float) -> None:
        try:
            answer = await self._ask(message)
        except OwnerUnavailable as error:
            self._lose(message, sent_s, error)
            return
        now = self._clock()
        self.till.granted(message, answer, sent_s, now)
        for ask in message.asks:
            for lines in (self._to_count, self._to_go_on):
                line = lines.get(ask.tenant)
                if line is not None:
                    self._serve(line, now)
                    self._refuse(line, now)

    def _lose(self, message: Message | None, sent_s: float, error: Exception) -> None:
        """No answer. Those who can be served by what is held may wait for it, if they want to."""
        self.away += 1
        now = self._clock()
        self._quiet_until_s = now + RENEW_S
        if message is not None:
            self.till.lost(message, sent_s)
        for line in self._lines():
            self._serve(line, now)
            ready_s = self._ready_s(line, now)
            for waiter in list(line.waiters):
                if ready_s is None:
                    self._end(waiter, _copy(error))
                elif not waiter.patient:
                    self._end(waiter, _not_yet(line, ready_s - now))

    def _end_all(self, error: Exception) -> None:
        for line in self._lines():
            for waiter in list(line.waiters):
                self._end(waiter, _copy(error))

    def _lines(self) -> list[Line]:
        return [*self._to_count.values(), *self._to_go_on.values()]

    def _ring(self, now: float) -> None:
        """Serve what the leases have by now; those whose time is up are refused."""
        for what in self._alarms.due(now):
            line = what if isinstance(what, Line) else what.line
            if line.counter is not self:
                continue
            if line is what:
                line.alarm_s = float("inf")
            self._serve(line, now)
            if isinstance(what, Waiter) and not what.future.done():
                self._time_out(what, now)

    def _time_out(self, waiter: Waiter, now: float) -> None:
        line, held = waiter.line, waiter.line.held
        refusal = line.refusal
        if waiter.until_s > now:
            return
        if held.moved:
            self._end(waiter, OwnerUnavailable(self.ref.name, "the tenant is moving"))
        elif refusal is None and held.answered_s < waiter.joined_s:
            self._end(waiter, OwnerUnavailable(self.ref.name, "it did not answer in time"))
        elif refusal is None:
            ready_s = self._ready_s(line, now)
            if ready_s is None and not waiter.patient and self._prolong(waiter, LATE_WAIT_S, now):
                return  # what was lent came when its life was over, and is asked for again
            self._end(waiter, _not_yet(line, RENEW_S if ready_s is None else ready_s - now))
        elif held.unseeded and _of_seed(refusal):
            if waiter.patient or not self._prolong(waiter, SEED_WAIT_S, now):
                self._end(waiter, OwnerUnavailable("ledger", "its word did not come in time"))
        elif waiter.patient or not (
            _of_calls(refusal) and self._prolong(waiter, MONEY_WAIT_S, now)
        ):
            self._end(waiter, line.refused(refusal, now))

    def _prolong(self, waiter: Waiter, wait_s: float, now: float) -> bool:
        """Whether it still waits: until `wait_s` after it came."""
        until_s = waiter.joined_s + wait_s
        if until_s <= now:
            return False
        waiter.until_s = until_s
        self._alarms.add(until_s, waiter)
        return True

    def _serve(self, line: Line, now: float) -> None:
        """In the order they came, as far as it goes."""
        while line.waiters:
            waiter = line.waiters[0]
            if waiter.future.done():
                self._leave(waiter)
                continue
            end: End | None
            if waiter.ticket is None:
                end = self.till.take(line.held, now)
            else:
                end = self.till.reserve(line.held, waiter.ticket, waiter.amount, now)
            if end is None:
                ready_s = self._ready_s(line, now)
                at_s = None if ready_s is None else max(ready_s, now + PAUSE_S_MIN)
                if at_s is not None and at_s < line.alarm_s:
                    line.alarm_s = at_s
                    self._alarms.add(at_s, line)
                return
            self._end(waiter, end)

    def _ready_s(self, line: Line, now: float) -> float | None:
        """When the lease can serve the first in the line by itself."""
        if not line.waiters:
            return None
        if line.to_go_on:
            in_s = self.till.need_in_s(line.held, line.waiters[0].need, now)
        else:
            in_s = self.till.permit_in_s(line.held, now)
        return None if in_s is None else now + in_s

    def _freed(self, tenant: str) -> None:
        """Something came back: whoever waits first has it, or the owner is told."""
        if self.waiting:
            for lines in (self._to_count, self._to_go_on):
                line = lines.get(tenant)
                if line is not None:
                    self._serve(line, self._clock())
                    if line.waiters:
                        self.till.wants(line.held)
        self._replan()

    def _replan(self) -> None:
        """Wake up if there is something to say before the moment that was planned."""
        if self._planned_s == float("-inf"):
            return  # it is awake
        for due_s in (self.till.next_due_s(), self._alarms.next_s()):
            if due_s is not None and due_s < self._planned_s:
                self._wake.set()

    def _refuse(self, line: Line, now: float) -> None:
        """Those who wait only for what others have, and others have none."""
        refusal, held = line.refusal, line.held
        if refusal is None or not line.waiters or held.moved:
            return
        if refusal.never:
            self._end(line.waiters[0], refusal)
            if line.waiters:
                self.till.wants(held)
            return
        if refusal.lent:
            return
        first = line.waiters[0]
        for waiter in list(line.waiters):
            smaller = line.to_go_on and waiter.need.tokens < held.refused_need.tokens
            if not waiter.patient and not smaller:
                self._end(waiter, line.refused(refusal, now))
        if line.waiters and line.waiters[0] is not first:
            self.till.wants(held)  # it may be there for a smaller one

    def _end(self, waiter: Waiter, end: End | Exception) -> None:
        self._leave(waiter)
        if waiter.future.done():
            return
        if isinstance(end, Exception):
            waiter.future.set_exception(end)
        else:
            waiter.future.set_result(end)

    # ---- what the ledger knows -------------------------------------------------------------

    def _seed(self) -> None:
        """Ask the ledger in the background about the tenants that the owner does not know."""
        if not self.till.unseeded or (self._seeding is not None and not self._seeding.done()):
            return
        tenants = list(self.till.unseeded)[:SEEDS_MAX]
        for tenant in tenants:
            del self.till.unseeded[tenant]
        self._seeding = asyncio.create_task(self._fetch(tenants), name=f"seeds {self.ref.name}")

    async def _fetch(self, tenants: list[str]) -> None:
        owner, error = self.till.owner, None
        try:
            seeds = await self._book.seeds(tenants)
        except OwnerUnavailable as away:
            error = away
        except Exception as fault:
            log.exception("what the ledger knows of %d tenants cannot be read", len(tenants))
            error = OwnerUnavailable("ledger", f"{type(fault).__name__}: {fault}")
        if error is None:
            self.till.seeded(owner, dict(zip(tenants, seeds, strict=True)), self._clock())
        else:
            for tenant in tenants:
                for lines in (self._to_count, self._to_go_on):
                    if (line := lines.get(tenant)) is not None:
                        for waiter in list(line.waiters):
                            self._end(waiter, _copy(error))
            await self._sleep(SEED_PAUSE_S)
        self._wake.set()


def _need(held: Held, amount: Amount) -> Need:
    limits = held.limits
    return Need(
        0 if limits.concurrent is None else 1,
        0 if limits.tokens_per_minute is None else amount.tokens,
        0 if limits.nano_most is None else amount.nano,
    )


def _of_calls(refusal: Refusal) -> bool:
    """Whether calls that are under way may leave what is missing."""
    return refusal.lent and refusal.kind.startswith("usd")


def _of_seed(refusal: Refusal) -> bool:
    """Whether the ledger's word may be what is missing."""
    return refusal.lent and (refusal.kind == "requests_per_hour" or _of_calls(refusal))


def _not_yet(line: Line, in_s: float) -> Refusal:
    limits, in_s = line.held.limits, max(0.001, in_s)
    if line.to_go_on and limits.tokens_per_minute is None:
        return Refusal("concurrent_requests", float(limits.concurrent or 0), 0.0, in_s)
    if line.to_go_on:
        return Refusal("tokens_per_minute", float(limits.tokens_per_minute or 0), 0.0, in_s)
    return Refusal("requests_per_minute", limits.requests_per_minute or 0.0, 0.0, in_s)


def _copy(error: Exception) -> Exception:
    """One for each waiter: an exception that is raised in many places grows their tracebacks."""
    if isinstance(error, OwnerUnavailable):
        return OwnerUnavailable(error.owner, error.reason)
    return error
