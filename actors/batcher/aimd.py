"""How many calls at once: up by one where that does no harm, down by a third where it does.

Harm is a provider that pushes back (429, 503, 529, no answer in time); and one where calls queue
up: of as many as there may be at once none is quick, each takes half as long again as quick ones of
about its size. That alone never leaves fewer than START. What is quick is learnt from few calls at
once: beyond START a call may be slow because of the others.

Source: Chiu and Jain, "Analysis of the Increase and Decrease Algorithms", 1989.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

START = 4.0
LEAST, MOST = 1.0, 64.0
CUT = 0.7
SLOW, CUT_SLOW = 1.5, 0.6
"""Their product is less than 1: after such a cut calls are as quick as they were."""
FADE, FADE_BEYOND = 1.02, 1.0001
"""By how much a quick call's time grows with every call that is slower, with START at once and
beyond, so that a provider which has become slower for good is known by that in time."""
WEIGHT = 0.25
"""How far a quicker call brings that time down to its own: some are quick by luck."""


class Concurrency:
    """Owns the number of calls that may be under way at once. Bounded: one figure per size class.

    Failure behaviour: what is forgotten is learnt again from START.
    """

    def __init__(self) -> None:
        self._limit = START
        self._cut_s = float("-inf")
        self._slow = 0  # calls since the last one that was quick
        self._usual_s: dict[int, float] = {}  # size class → a quick call's time

    @property
    def limit(self) -> int:
        return int(self._limit)

    def answered(self, items: int, began_s: float, now_s: float, *, full: bool) -> None:
        """A call of so many texts was answered. `full`: there was no room for another beside it.

        Slow calls that left before the last cut say nothing.
        """
        kind, took_s = items.bit_length(), now_s - began_s
        usual_s = self._usual_s.get(kind, took_s)
        if took_s < usual_s:
            usual_s += WEIGHT * (took_s - usual_s)
        else:
            fade = FADE if self._limit <= START else FADE_BEYOND
            longer = [known_s for size, known_s in self._usual_s.items() if size > kind]
            usual_s = min(took_s, usual_s * fade, *longer)
        self._usual_s[kind] = usual_s
        if not full:
            return
        if took_s <= SLOW * usual_s:
            self._slow = 0
            self._limit = min(MOST, self._limit + 1 / self._limit)
        elif began_s >= self._cut_s:
            self._slow += 1
            if self._slow >= self._limit:
                self._cut(CUT_SLOW, min(self._limit, START), now_s)

    def pushed_back(self, began_s: float, now_s: float) -> None:
        """A call that began then was refused. Calls that left before the last cut say nothing."""
        if began_s >= self._cut_s:
            self._cut(CUT, LEAST, now_s)

    def _cut(self, by: float, least: float, now_s: float) -> None:
        self._limit = max(least, self._limit * by)
        self._cut_s, self._slow = now_s, 0
