"""The limiter's desk: says at once whether a request may go on, from what the owners have lent."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from itertools import count
from typing import Any

from actors.rate_limiter.book import Book, NoBook
from actors.rate_limiter.counter import Counter, Sleep
from actors.rate_limiter.held import Held, Reservation
from actors.rate_limiter.pace import Pace
from actors.rate_limiter.terms import (
    NOTHING_USED,
    Amount,
    Figures,
    Hold,
    Layout,
    Limits,
    Refusal,
    Ticket,
)
from actors.ref import Clock, OwnerRef

HOMES_MAX = 100_000

_UNLIMITED = Limits()


class _Homes(dict[str, Counter]):
    """The counter of each tenant, in one layout. Bounded by HOMES_MAX: when full it begins anew."""

    def __init__(self, layout: Layout, counters: list[Counter]) -> None:
        self._layout = layout
        self._counters = counters

    def __missing__(self, tenant: str) -> Counter:
        if len(self) >= HOMES_MAX:
            self.clear()
        home = self[tenant] = self._counters[self._layout.home(tenant)]
        return home


class RateLimiterDesk:
    """Owns what this process was lent of each tenant's limits, and the requests that wait for more.

    With a live lease a request is counted without waiting. Needs, renewals and returns of all
    tenants travel in one message per owner and tick (RENEW_S). Bounded by the tenants that were
    active within the last second or have requests under way, and by WAITING_MAX waiting requests.

    Failure behaviour: fails closed. Leases are used to their end; then a request waits up to
    ASK_TIMEOUT_S for the owner and gets OwnerUnavailable. Nothing is ever admitted on credit. When
    this process dies, its leases end by themselves; its slots stay taken until it is known dead,
    and what it had reserved of money counts as spent then.
    """

    def __init__(
        self,
        refs: Sequence[OwnerRef],
        holder: str,
        clock: Clock = time.monotonic,
        sleep: Sleep = asyncio.sleep,
        *,
        book: Book | None = None,
        layout: Layout | None = None,
        pace: Pace | None = None,
    ) -> None:
        """Messages leave as far apart as `pace` says, unless they are about hot tenants."""
        self._clock = clock
        self._sleep = sleep
        self._pace = pace
        self._holder = f"{holder}#{secrets.token_hex(4)}"  # another desk of it counts anew
        self._book: Book = book or NoBook()
        self._layout = layout or Layout(shards=len(refs))
        assert self._layout.shards == len(refs)
        self._batches = count(1)
        self._counters = [self._counter(ref) for ref in refs]
        self._homes = _Homes(self._layout, self._counters)
        self._started = False
        self._ids = 0
        self._taken: dict[int, Reservation] = {}
        self._refused = 0
        self._counted = 0

    @property
    def under_way(self) -> int:
        """Requests of this process that hold something now, or wait for it."""
        return len(self._taken) + sum(counter.waiting for counter in self._counters)

    async def start(self) -> None:
        """Begin to renew leases."""
        self._started = True
        for counter in self._counters:
            counter.start()

    async def close(self) -> None:
        """Give everything back and stop."""
        self._started = False
        await asyncio.gather(*(counter.close() for counter in self._counters))

    # ---- requests --------------------------------------------------------------------------

    async def count(
        self,
        tenant: str,
        limits: Limits | None,
        amount: Amount = NOTHING_USED,
        *,
        wait_s: float = 0.0,
        queue_max: int = 100,
    ) -> Ticket | Refusal:
        """Count one request. Waits for up to `wait_s` in the order of arrival.

        `amount` is what it is going to reserve: asked for along with the count.

        Raises:
            OwnerUnavailable: no lease is left and the owner does not answer.
        """
        if limits is None or not limits.counts:
            return Ticket(tenant, limits or _UNLIMITED, False)
        counter, now = self._homes[tenant], self._clock()
        held = counter.till.of(tenant, limits, now)
        counter.till.arrive(held, now)
        answer: Ticket | Refusal | None = None if held.need else counter.till.take(held, now)
        if answer is None:
            answer = await counter.wait_to_count(held, amount, wait_s, queue_max)
        if isinstance(answer, Refusal):
            self._refused += 1
        else:
            self._counted += 1
        return answer

    def count_at_once(self, tenant: str, limits: Limits | None) -> Ticket | None:
        """Count one request with what is here; None, and nothing is counted, where that is not
        enough: `count` may wait, and says why not."""
        if limits is None or not limits.counts:
            return Ticket(tenant, limits or _UNLIMITED, False)
        till, now = self._homes[tenant].till, self._clock()
        held = till.of(tenant, limits, now)
        ticket = None if held.need else till.take(held, now)  # those who wait are first
        if ticket is not None:
            till.arrive(held, now)
            self._counted += 1
        return ticket

    def uncount(self, ticket: Ticket) -> None:
        """The request did not take place: its permit is free again, if its lease still lives."""
        if ticket.counted:
            self._homes[ticket.tenant].put_back(ticket)

    async def reserve(
        self, ticket: Ticket, amount: Amount = NOTHING_USED, *, wait_s: float = 0.0
    ) -> Hold | Refusal:
        """A slot, tokens and money for a counted request: all or nothing, until `settle`.

        Raises:
            OwnerUnavailable: as `count`.
        """
        hold = self.reserve_at_once(ticket, amount)
        if hold is not None:
            return hold
        never = _never(ticket.limits, amount)
        if never is not None:
            self._refused += 1
            return never
        counter, held = self._homes[ticket.tenant], self._held(ticket)
        if not ticket.counted:
            counter.till.arrive(held, self._clock())
        answer = await counter.wait_to_go_on(held, ticket, amount, wait_s)
        if isinstance(answer, Refusal):
            self._refused += 1
            return answer
        return self._hold(answer)

    def reserve_at_once(self, ticket: Ticket, amount: Amount = NOTHING_USED) -> Hold | None:
        """As `reserve`, with what is here; None, and nothing is taken, where that is not enough:
        `reserve` follows, which may wait, and says why not."""
        limits = ticket.limits
        if not limits.reserves and not ticket.hours_batch:
            return Hold(ticket.tenant, 0, amount)
        if amount is not NOTHING_USED and _never(limits, amount) is not None:
            return None
        till, now = self._homes[ticket.tenant].till, self._clock()
        held = till.of(ticket.tenant, limits, now)
        taken = None if held.needs else till.reserve(held, ticket, amount, now)
        if taken is None:
            return None
        if not ticket.counted:
            till.arrive(held, now)
        return self._hold(taken)

    def _hold(self, taken: Reservation) -> Hold:
        self._ids += 1
        self._taken[self._ids] = taken
        return Hold(taken.ticket.tenant, self._ids, taken.amount)

    def settle(self, hold: Hold, used: Amount = NOTHING_USED) -> None:
        """What the request used; the rest is free again. Idempotent."""
        taken = self._taken.pop(hold.id, None)
        if taken is not None:
            self._homes[hold.tenant].settle(taken, used)

    async def admit(
        self, tenant: str, limits: Limits | None, amount: Amount = NOTHING_USED
    ) -> Hold | Refusal:
        """Count and reserve at once; a permit is given back when the rest is refused."""
        ticket = await self.count(tenant, limits, amount)
        if isinstance(ticket, Refusal):
            return ticket
        try:
            hold = await self.reserve(ticket, amount)
        except BaseException:
            self.uncount(ticket)
            raise
        if isinstance(hold, Refusal):
            self.uncount(ticket)
            return hold
        if hold.id == 0 and ticket.counted:
            # Nothing but the permit is held; `cancel` has to find it.
            self._ids += 1
            taken = Reservation(self._held(ticket), ticket, amount, self._clock())
            taken.held.running += 1
            self._taken[self._ids] = taken
            hold = Hold(tenant, self._ids, amount)
        return hold

    def cancel(self, hold: Hold) -> None:
        """What `admit` gave was not used at all: permit and everything go back. Idempotent."""
        taken = self._taken.pop(hold.id, None)
        if taken is not None:
            self._homes[hold.tenant].cancel(taken)

    # ---- what is known ---------------------------------------------------------------------

    def figures(self, tenant: str) -> dict[str, Figures]:
        """What is left of "requests" and "tokens", as far as they are limited and known.

        The owner's last figures, less what this process used since; right after a refusal they
        are what was refused.
        """
        return self._homes[tenant].till.figures(tenant, self._clock())

    async def state(self, tenant: str) -> dict[str, Any]:
        """What the owner knows of a tenant, asked now. Raises OwnerUnavailable."""
        state: dict[str, Any] = await self._homes[tenant].ref.ask("state", tenant, timeout_s=2.0)
        return state

    def silent(self) -> set[str]:
        """Processes that owners named as silent since this was last asked."""
        silent: set[str] = set()
        for counter in self._counters:
            silent |= counter.till.silent
            counter.till.silent = set()
        return silent

    async def holder_gone(self, process: str) -> None:
        """Tell all owners that a process is dead. Raises OwnerUnavailable if one was not told."""
        told = await asyncio.gather(
            *(counter.ref.ask("holder_gone", process) for counter in self._counters),
            return_exceptions=True,
        )
        for outcome in told:
            if isinstance(outcome, BaseException):
                raise outcome

    def stats(self) -> dict[str, Any]:
        return {
            "tenants": sum(len(counter.till.held) for counter in self._counters),
            "waiting": sum(counter.waiting for counter in self._counters),
            "slots_used": sum(taken.slots for taken in self._taken.values()),
            "running": len(self._taken),
            "counted": self._counted,
            "refused": self._refused,
            "owner_away": sum(counter.away for counter in self._counters),
        }

    # ---- where tenants are at home ---------------------------------------------------------

    async def relayout(self, layout: Layout, refs: Sequence[OwnerRef]) -> None:
        """The owners are others from now on; what is in use is told to the new homes at once.

        Counters of shards that go on are kept; those that are gone are closed.
        """
        if layout.version <= self._layout.version:
            return
        assert layout.shards == len(refs)
        before, self._layout = self._counters, layout
        known = {counter.ref.name: counter for counter in before}
        self._counters = [
            known.pop(ref.name) if ref.name in known else self._counter(ref) for ref in refs
        ]
        self._homes = _Homes(layout, self._counters)
        for counter in self._counters:
            counter.layout = layout
            if self._started:
                counter.start()
        for counter in before:
            for tenant in list(counter.till.held):
                home = self._homes[tenant]
                if home is not counter:
                    held, lines = counter.leave(tenant)
                    if held is not None:
                        home.join(held, lines)
        for counter in known.values():
            await counter.close(give_back=False)

    def _counter(self, ref: OwnerRef) -> Counter:
        return Counter(
            ref,
            self._holder,
            self._book,
            self._layout,
            self._clock,
            self._sleep,
            self._batches,
            self._pace,
        )

    def _held(self, ticket: Ticket) -> Held:
        return self._homes[ticket.tenant].till.of(ticket.tenant, ticket.limits, self._clock())


def _never(limits: Limits, amount: Amount) -> Refusal | None:
    """The refusal of what is larger than a limit itself."""
    if limits.tokens_per_minute is not None and amount.tokens > limits.tokens_most:
        most = float(limits.tokens_most)
        return Refusal("tokens_per_minute", most, most, 0.0, never=True)
    for kind, most_nano in (
        ("usd_per_day", limits.day_nano),
        ("usd_per_month", limits.month_nano),
    ):
        if most_nano is not None and amount.nano > most_nano:
            return Refusal(kind, float(most_nano), float(most_nano), 0.0, never=True)
    return None
