"""Which shard of the Batcher a lane's texts go to.

Rule 1: a lane has one home, by rendezvous hashing, while that one keeps up: texts that are spread
        out find less company.
Rule 2: where a home says that it is busy, the lane gets one shard more, and a process keeps to one
        of them. It gives one back when for CALM_S the others could have carried that one's work.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b

from actors.batcher.policy import Lane

BUSY = 0.7
"""A shard that takes so much of a core has texts wait for it, and not for the provider."""
WIDEN_S = 2.0
CALM_S = 30.0
LANES_MAX = 1000
"""Most lanes that are known to be wide; the one that was so first is narrow again."""


@dataclass(slots=True)
class _Wide:
    """How many shards a lane has, since when, and when it last needed the last of them."""

    width: int
    widened_s: float
    needed_s: float


class Spread:
    """Owns how wide each busy lane is, as this process sees it. Bounded by LANES_MAX.

    Failure behaviour: what is forgotten is said again by the shard that is busy.
    """

    def __init__(self, shards: int, holder: str) -> None:
        assert shards > 0, "there is a shard"
        self._shards = shards
        self._holder = holder
        self._wide: OrderedDict[Lane, _Wide] = OrderedDict()

    def choose(self, lane: Lane, now_s: float) -> int:
        """The shard for a lane's texts of this process."""
        if self._shards == 1:
            return 0
        words = repr((lane.deployment, lane.owner, lane.params))
        ranked = sorted(range(self._shards), key=lambda shard: _rank(f"{shard} {words}"))
        width = self._width(lane, now_s)
        return ranked[_rank(f"{self._holder} {words}") % width]

    def told(self, lane: Lane, busy: float, now_s: float) -> None:
        """A shard has answered, and takes so much of a core."""
        if self._shards == 1 or (busy < BUSY and lane not in self._wide):
            return
        width = self._width(lane, now_s)
        known = self._wide.get(lane)
        if known is not None and busy * width >= BUSY * (width - 1):
            known.needed_s = now_s
        if busy < BUSY or (known is not None and now_s - known.widened_s < WIDEN_S):
            return
        self._wide[lane] = _Wide(min(self._shards, width + 1), now_s, now_s)
        if len(self._wide) > LANES_MAX:
            self._wide.popitem(last=False)

    def _width(self, lane: Lane, now_s: float) -> int:
        known = self._wide.get(lane)
        if known is None:
            return 1
        calm = int((now_s - known.needed_s) / CALM_S)
        if calm > 0:
            known.width = max(1, known.width - calm)
            known.needed_s += calm * CALM_S
        if known.width == 1:
            del self._wide[lane]
            return 1
        return known.width


def _rank(words: str) -> int:
    return int.from_bytes(blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest())
