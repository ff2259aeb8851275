"""Requests that wait for a tenant's limit, in the order they came."""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from actors.rate_limiter.held import Held, Places, Reservation
from actors.rate_limiter.terms import NOTHING_USED, Amount, Need, Refusal, Ticket

if TYPE_CHECKING:
    from actors.rate_limiter.counter import Counter

End = Ticket | Reservation | Refusal


@dataclass(slots=True, eq=False)
class Waiter:
    """A request that waits. `until_s` is when it gives up."""

    line: Line
    future: asyncio.Future[End]
    joined_s: float
    until_s: float
    patient: bool  # waits for the limit itself, not only for what others have lent
    ticket: Ticket | None = None  # of one that is counted and waits to go on
    amount: Amount = NOTHING_USED
    need: Need = field(default_factory=Need)


class Line:
    """Those who wait for one tenant: to be counted, or to go on. The till knows their needs.

    Bounded by the callers' `queue_max` and the desk's WAITING_MAX.
    """

    __slots__ = ("alarm_s", "counter", "held", "patient", "to_go_on", "waiters")

    def __init__(self, held: Held, to_go_on: bool, counter: Counter) -> None:
        self.counter = counter  # where it stands now
        self.alarm_s = float("inf")  # when the lease may serve the first of it
        self.held = held
        self.to_go_on = to_go_on
        self.waiters: deque[Waiter] = deque()
        self.patient = 0

    @property
    def refusal(self) -> Refusal | None:
        """What the owner said last."""
        return self.held.need_refusal if self.to_go_on else self.held.refusal

    @property
    def again_s(self) -> float:
        """A need that was refused is not repeated before."""
        return self.held.need_again_s if self.to_go_on else self.held.again_s

    @property
    def places(self) -> Places:
        return self.held.need_places if self.to_go_on else self.held.places

    def join(self, waiter: Waiter) -> None:
        self.waiters.append(waiter)
        self.patient += waiter.patient
        if self.to_go_on:
            self.held.needs.append(waiter.need)
        else:
            self.held.need += 1

    def leave(self, waiter: Waiter) -> None:
        """Whatever came of it. Does nothing the second time."""
        if self.waiters and self.waiters[0] is waiter:
            place = 0
        elif waiter in self.waiters:
            place = self.waiters.index(waiter)
        else:
            return
        del self.waiters[place]
        self.patient -= waiter.patient
        if self.to_go_on:
            del self.held.needs[place]
        else:
            self.held.need -= 1

    def refused(self, refusal: Refusal, now: float) -> Refusal:
        """The refusal for one more: each comes back a place after the one before."""
        first_s = self.held.answered_s + refusal.retry_after_s
        if refusal.spacing_s > 0.0 and not refusal.lent:
            first_s = self.places.hand_out(max(first_s, now), refusal.spacing_s, now)
        return refusal._replace(retry_after_s=max(0.001, first_s - now))

    def remembered(self, need: Need, patient: bool, now: float) -> Refusal | None:
        """What the owner said of the same so lately that it need not be asked again."""
        refusal, held = self.refusal, self.held
        if patient or refusal is None or refusal.lent or now >= self.again_s:
            return None
        if self.to_go_on and refusal.kind != "concurrent_requests" and need != held.refused_need:
            return None
        return self.refused(refusal, now)


class Alarms:
    """Moments at which a waiter gives up or a line may be served, soonest first.

    Bounded by WAITING_MAX and what was added since the last `tidy`.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Waiter | Line]] = []
        self._order = count()
        self._tidy_at = 1_000

    def add(self, at_s: float, what: Waiter | Line) -> None:
        heapq.heappush(self._heap, (at_s, next(self._order), what))
        if len(self._heap) >= self._tidy_at:
            self._heap = [entry for entry in self._heap if not _stale(entry[2])]
            heapq.heapify(self._heap)
            self._tidy_at = 2 * len(self._heap) + 1_000

    def next_s(self) -> float | None:
        while self._heap and _stale(self._heap[0][2]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def due(self, now: float) -> Iterator[Waiter | Line]:
        while self._heap and self._heap[0][0] <= now:
            what = heapq.heappop(self._heap)[2]
            if not _stale(what):
                yield what


def _stale(what: Waiter | Line) -> bool:
    return what.future.done() if isinstance(what, Waiter) else not what.waiters
