"""How many calls at once: up by one where that does no harm, down by a third where it does.

Harm is a provider that pushes back (429, 503, 529, no answer in time). Calls that take half as long
again as the quickest of about their size do no harm, but more of them would only queue up there.

Source: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms", 1989.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

START = 4.0
LEAST, MOST = 1.0, 64.0
CUT = 0.7
SLOW = 1.5
FADE = 1.02
"""By how much the quickest call's time grows with every call that is slower, so that a provider
which has become slower for good is known by that after some dozen calls."""


class Concurrency:
    """Owns the number of calls that may be under way at once. Bounded: one figure per size class.

    Failure behaviour: what is forgotten is learnt again from START.
    """

    def __init__(self) -> None:
        self._limit = START
        self._cut_s = float("-inf")
        self._usual_s: dict[int, float] = {}  # size class → the quickest call's time

    @property
    def limit(self) -> int:
        return int(self._limit)

    def answered(self, items: int, took_s: float, *, full: bool) -> None:
        """A call of so many texts was answered. `full`: there was no room for another beside it."""
        kind = items.bit_length()
        usual_s = min(took_s, self._usual_s.get(kind, took_s) * FADE)
        self._usual_s[kind] = usual_s
        if full and took_s <= SLOW * usual_s:
            self._limit = min(MOST, self._limit + 1 / self._limit)

    def pushed_back(self, began_s: float, now_s: float) -> None:
        """A call that began then was refused. Calls that left before the last cut say nothing."""
        if began_s >= self._cut_s:
            self._limit = max(LEAST, self._limit * CUT)
            self._cut_s = now_s
