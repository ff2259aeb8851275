"""Of which tenants a desk has something to say to the owner, and when."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from itertools import count

from actors.rate_limiter.held import NEVER_S, Held

RENEW_S = 0.2
SOON_S = 0.05  # what has to be told and is not urgent
LATELY_S = 15.0  # so long after it held anything a desk is heard, and hears who has fallen silent
ASKS_MAX = 1_000  # in one message; the rest travels in the next


class Agenda:
    """Owns the order of the day: needs now or later, what is to be told, and the next tick.

    No step looks at a tenant that is not hot, does not wait and has nothing to tell. Bounded by
    the tenants that are held; a need that is repeated later has an entry for each time.
    """

    def __init__(self, held: Mapping[str, Held]) -> None:
        self.hot: dict[Held, None] = {}
        self.sent_s = NEVER_S
        self._held = held
        self._needy: dict[Held, None] = {}  # want something now
        self._later: list[tuple[float, int, Held]] = []  # will want something then
        self._order = count()
        self._dirty: dict[Held, None] = {}  # have something to tell
        self._soon_s: float | None = None  # when that is told at the latest
        self._tick_s = NEVER_S
        self._lately_s = NEVER_S

    def want(self, held: Held) -> None:
        """It needs something now."""
        self._needy[held] = None

    def want_at(self, held: Held, at_s: float) -> None:
        """It needs something then, if it still does."""
        heapq.heappush(self._later, (at_s, next(self._order), held))

    def tell(self, held: Held, now: float, *, at_once: bool = False) -> None:
        """There is something to be told of it."""
        self._dirty[held] = None
        self.speak_by(now if at_once else now + SOON_S)

    def tell_along(self, held: Held) -> None:
        """There is something to be told of it, with the next message."""
        self._dirty[held] = None

    def speak_by(self, at_s: float) -> None:
        """A message leaves then, at the latest."""
        self._soon_s = at_s if self._soon_s is None else min(self._soon_s, at_s)

    def forget(self, held: Held) -> None:
        for where in (self.hot, self._needy, self._dirty):
            where.pop(held, None)

    def ticks(self, now: float) -> bool:
        """Whether it is time for renewals; those that were not told lately are due then."""
        while self._later and self._later[0][0] <= now:
            held = heapq.heappop(self._later)[2]
            if held.waiting and self._is_here(held):
                self._needy[held] = None
        if now < self._tick_s:
            return False
        self._tick_s = now + RENEW_S
        if self._held:
            self._lately_s = now
        nearly_s = now - RENEW_S / 2
        for held in self.hot:
            if held.told_s <= nearly_s:
                self._dirty[held] = None
        return True

    def silent(self, tick: bool, now: float) -> bool:
        """Whether there is nothing to say."""
        if self._needy or (self._dirty and tick):
            return False
        if self._soon_s is not None and now >= self._soon_s:
            return False
        heard = now - self.sent_s < RENEW_S / 2 or now - self._lately_s >= LATELY_S
        return not tick or heard

    def take(self) -> dict[Held, None]:
        """Those to speak of now: who waits first, and not more than one message takes."""
        told: dict[Held, None] = {}
        for source in (self._needy, self._dirty):
            while source and len(told) < ASKS_MAX:
                held = next(iter(source))
                del source[held]
                if self._is_here(held):
                    told[held] = None
        return told

    def spoken(self, now: float, soon: bool) -> None:
        """A message leaves. With `soon` another one is to follow soon."""
        self.sent_s = now
        self._soon_s = now if self._dirty else now + SOON_S if soon else None

    def next_s(self) -> float | None:
        """When there will next be something to say, None if never."""
        if self._needy:
            return NEVER_S
        due = [self._later[0][0]] if self._later else []
        if self._soon_s is not None:
            due.append(self._soon_s)
        if self._held or self._tick_s < self._lately_s + LATELY_S:
            due.append(self._tick_s)
        return min(due, default=None)

    def _is_here(self, held: Held) -> bool:
        return self._held.get(held.tenant) is held
