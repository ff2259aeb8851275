"""The key space on a lease: a desk that is alone in the system holds it, and asks nobody.

Rule 1: leases never overlap. Their holder counts from when it sent what prolongs one, the owner
        from when it heard that, and waits MARGIN_S longer.
Rule 2: a lease is its holder's name and a number that this holder never uses again. What comes
        late, or twice, speaks of a lease that is over.
Rule 3: whoever gives a lease back has stopped answering before it says so, and says which flights
        it leads. Nobody else is answered before.
Rule 4: entries come afterwards, a few at a time. The younger of two wins, and a miss is no harm.
Rule 5: what was begun before a sweep is not kept after it, on whichever side it was begun or ends:
        flights and entries travel with their age, and may have been under way for TRAVEL_S.

No clock and no event loop here: time is an argument.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from actors.cache.policy import Hit, Scope, Sweep

LEASE_S = 3.0
"""How long a holder that is not heard of keeps the others from the key space, and from its own
answers."""
MARGIN_S = 0.25
"""How much longer the owner waits: more than two clocks drift apart in LEASE_S."""
HOLD_S = 1.0
"""How long a holder's message is held; two of them and a delay fit into a lease."""
ALONE_S = 3.0
"""A desk is alone when no other has asked for so long."""
RECALL_S = 0.5
"""The most that a request waits for a holder to give the key space back, once per outage."""
WAIT_S = 10.0
"""How long a desk's wish for a lease is held."""
MORE_BYTES = 64 * 1024
"""What the owner stores moves to the holder as it is asked for, and so much with each answer."""
SWEEPS_MAX = 100
"""Most sweeps that wait for a holder; beyond, they are one of everything, and the lease ends."""
OVER_MAX = 1000
"""Desks whose last lease is remembered as over."""


Kept = tuple[bytes, Scope, Hit]
"""An entry on its way between owner and holder."""


@dataclass(frozen=True, slots=True)
class Grant:
    """The key space is the desk's: what it may keep, and whether the owner stores something still.

    Without `reads` there is a second tier that the holder does not see: the lease is for joining.
    `swept` are the sweeps of late, oldest first, each with its age in seconds: what was begun
    before is under way still.
    """

    bytes_max: int
    scope_share: float
    stores: bool
    reads: bool = True
    swept: tuple[tuple[Sweep, float], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Grant, (self.bytes_max, self.scope_share, self.stores, self.reads, self.swept))


@dataclass(frozen=True, slots=True)
class Told:
    """What a holder is told: to give the lease back (it is not prolonged then), and what to drop
    before anybody hears that it is dropped: sweeps, each with its number."""

    recalled: bool
    sweeps: tuple[tuple[int, Sweep], ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return (Told, (self.recalled, self.sweeps))


class Lease:
    """Owns, at the owner, who holds the key space, and who may have it next.

    Bounded by OVER_MAX. Failure behaviour: a restarted owner grants nothing until every lease of
    the one before is over. A holder that is silent loses its lease when LEASE_S + MARGIN_S have
    passed since it was heard of.
    """

    def __init__(self, now: float) -> None:
        self.recalled = False
        self.unanswered = False  # a recall has been waited for in vain
        self._holder: tuple[str, int] | None = None
        self._until_s = 0.0
        self._first_s = now + LEASE_S + MARGIN_S
        self._speaker = ""
        self._others_s = float("-inf")
        self._over: OrderedDict[str, int] = OrderedDict()

    def heard(self, desk: str, now: float) -> None:
        """This desk has asked for something."""
        if desk != self._speaker:
            self._speaker = desk
            self._others_s = now

    def holder(self, now: float) -> tuple[str, int] | None:
        """Who holds the lease, and its number; None when it is free."""
        if self._holder is not None and now >= self._until_s:
            self.end(*self._holder)
        return self._holder

    def left_s(self, now: float) -> float:
        """Seconds until it is free unless its holder is heard of."""
        return 0.0 if self.holder(now) is None else self._until_s - now

    def due_in_s(self, desk: str, now: float) -> float:
        """Seconds until this desk may take it, as far as is known; 0 for now."""
        if self.holder(now) is not None:
            return self._until_s - now
        if self._speaker != desk:
            return ALONE_S
        return max(0.0, self._first_s - now, self._others_s + ALONE_S - now)

    def take(self, desk: str, number: int, now: float) -> bool:
        """Whether the lease is this desk's, under this number, from now on."""
        if self.holder(now) == (desk, number):
            return True
        if self.due_in_s(desk, now) > 0 or number <= self._over.get(desk, 0):
            return False
        self._holder = (desk, number)
        self._until_s = now + LEASE_S + MARGIN_S
        self.recalled = self.unanswered = False
        return True

    def renew(self, desk: str, number: int, now: float) -> bool:
        """The holder is alive. False when it holds nothing under this number."""
        if self.holder(now) != (desk, number):
            return False
        if not self.recalled:
            self._until_s = now + LEASE_S + MARGIN_S
        return True

    def end(self, desk: str, number: int) -> bool:
        """The lease is over, and cannot be taken again. False when it was not out."""
        self._over[desk] = max(number, self._over.pop(desk, 0))
        while len(self._over) > OVER_MAX:
            self._over.popitem(last=False)
        if self._holder != (desk, number):
            return False
        self._holder = None
        self.recalled = self.unanswered = False
        return True
