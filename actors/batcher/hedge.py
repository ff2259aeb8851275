"""When a provider call that is late is made a second time.

Rule 1: late is later than PERCENT of the last calls of its kind were answered: of the same lane,
        and of about as many bytes, since a long list takes longer than a short one.
Rule 2: of the calls of a kind that were answered, one in CALLS_PER_HEDGE may have been doubled.

Source: Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013 (hedged requests).

No clock and no event loop here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict, deque

from actors.batcher.policy import Lane

PERCENT = 95
CALLS_MIN = 20
"""Fewer answered calls of a kind say nothing about what is late."""
CALLS_KEPT = 200
CALLS_PER_HEDGE = 20
HEDGES_SAVED_MAX = 5
"""Most hedges that a kind saves up: so many calls may be doubled when all are late at once."""
KINDS_MAX = 1000
"""Most kinds remembered; the one that was quiet for longest is forgotten."""

BYTES_MIN = 4096
"""Shorter calls are of one kind: the way there takes most of their time."""

Kind = tuple[Lane, int]
"""A lane, and the power of 4 that the bytes of a call reach."""


def kind_of(lane: Lane, size: int) -> Kind:
    """The kind of a call of `size` bytes of text."""
    return lane, max(size, BYTES_MIN).bit_length() // 2


class Hedging:
    """Owns how long the last calls took and the right to hedge, by kind. Bounded by KINDS_MAX kinds
    of CALLS_KEPT figures each.

    Failure behaviour: what is forgotten is learnt again from CALLS_MIN calls; until then no call of
    that kind is doubled.
    """

    def __init__(self) -> None:
        self._kinds: OrderedDict[Kind, _Recent] = OrderedDict()

    def late_after_s(self, kind: Kind) -> float | None:
        """When a call of this kind is late, in seconds; None: it is not to be doubled."""
        recent = self._kinds.get(kind)
        return None if recent is None or not recent.hedges else recent.percentile_s()

    def take(self, kind: Kind) -> bool:
        """Whether one call may be doubled now. Yes is counted."""
        recent = self._kinds.get(kind)
        if recent is None or not recent.hedges:
            return False
        recent.calls_saved -= CALLS_PER_HEDGE
        return True

    def answered(self, kind: Kind, took_s: float) -> None:
        """A call was answered, by whichever copy, so long after its first copy left."""
        recent = self._kinds.get(kind)
        if recent is None:
            if len(self._kinds) >= KINDS_MAX:
                self._kinds.popitem(last=False)
            recent = self._kinds[kind] = _Recent()
        self._kinds.move_to_end(kind)
        recent.add(took_s)

    def __len__(self) -> int:
        return len(self._kinds)


class _Recent:
    """How long the last calls of one kind took, in both orders."""

    __slots__ = ("_by_age", "_by_length", "calls_saved")

    def __init__(self) -> None:
        self.calls_saved = 0
        self._by_age: deque[float] = deque()
        self._by_length: list[float] = []

    @property
    def hedges(self) -> int:
        enough = len(self._by_age) >= CALLS_MIN
        return self.calls_saved // CALLS_PER_HEDGE if enough else 0

    def add(self, took_s: float) -> None:
        self.calls_saved = min(self.calls_saved + 1, CALLS_PER_HEDGE * HEDGES_SAVED_MAX)
        self._by_age.append(took_s)
        insort(self._by_length, took_s)
        if len(self._by_age) > CALLS_KEPT:
            del self._by_length[bisect_left(self._by_length, self._by_age.popleft())]

    def percentile_s(self) -> float:
        """The smallest figure that PERCENT of all do not exceed (nearest rank)."""
        rank = -(-PERCENT * len(self._by_length) // 100)
        return self._by_length[rank - 1]
