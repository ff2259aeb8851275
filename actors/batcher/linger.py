"""How long a text waits for company while other calls of its lane are under way.

As long as is worth it: a quarter of what a call takes, the time in which the call would be full, or
the bound, whichever is the least; and not at all where less than one more text is to be expected.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

import math

SHARE = 0.25
WEIGHT = 0.2
MEMORY_S = 1.0
USUAL_S = 0.1
"""What a call is taken to last before one has been answered."""


class Rate:
    """Owns a count that fades: about as many per second as came of late. Bounded: two figures."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at_s = float("-inf")

    def add(self, count: int, now_s: float) -> None:
        self._count = self.per_s(now_s) * MEMORY_S + count
        self._at_s = now_s

    def per_s(self, now_s: float) -> float:
        passed_s = now_s - self._at_s
        return 0.0 if passed_s == math.inf else self._count * math.exp(-passed_s / MEMORY_S)


class Linger:
    """Owns how fast texts come and how long calls take. Bounded: three figures.

    Failure behaviour: what is forgotten is learnt again from the next calls.
    """

    def __init__(self) -> None:
        self._arrivals = Rate()
        self._took_s = USUAL_S
        self._known = False

    def came(self, texts: int, now_s: float) -> None:
        self._arrivals.add(texts, now_s)

    def took(self, took_s: float) -> None:
        """A call was answered."""
        weight = WEIGHT if self._known else 1.0
        self._took_s += weight * (took_s - self._took_s)
        self._known = True

    def wait_s(self, room: int, most_s: float, now_s: float) -> float:
        """How long to wait for texts, where a call has room for so many more."""
        per_s = self._arrivals.per_s(now_s)
        wait_s = min(most_s, SHARE * self._took_s)
        if per_s * wait_s < 1.0:
            return 0.0
        return min(wait_s, room / per_s)
