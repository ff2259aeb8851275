"""Which shard of the Batcher a lane's texts go to.

Rule 1: a lane has one home, by rendezvous hashing, while that one keeps up: texts that are spread
        out find less company.
Rule 2: where a home says that it is busy, the lane gets one shard more, and a process keeps to one
        of them; after CALM_S without such word it gives one back.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

from collections import OrderedDict
from hashlib import blake2b

from actors.batcher.policy import Lane

BUSY = 0.7
"""A shard that takes so much of a core has texts wait for it, and not for the provider."""
WIDEN_S = 2.0
CALM_S = 30.0
LANES_MAX = 1000
"""Most lanes that are known to be wide; the one that was so first is narrow again."""


class Spread:
    """Owns how wide each busy lane is, as this process sees it. Bounded by LANES_MAX.

    Failure behaviour: what is forgotten is said again by the shard that is busy.
    """

    def __init__(self, shards: int, holder: str) -> None:
        assert shards > 0, "there is a shard"
        self._shards = shards
        self._holder = holder
        self._wide: OrderedDict[Lane, tuple[int, float]] = OrderedDict()  # width, told when

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
        if self._shards == 1 or busy < BUSY:
            return
        width, since_s = self._width(lane, now_s), self._wide.get(lane, (1, float("-inf")))[1]
        if now_s - since_s >= WIDEN_S:
            self._wide[lane] = (min(self._shards, width + 1), now_s)
            if len(self._wide) > LANES_MAX:
                self._wide.popitem(last=False)

    def _width(self, lane: Lane, now_s: float) -> int:
        known = self._wide.get(lane)
        if known is None:
            return 1
        width, since_s = known
        calm = int((now_s - since_s) / CALM_S)
        if calm:
            width = max(1, width - calm)
            if width == 1:
                del self._wide[lane]
            else:
                self._wide[lane] = (width, since_s + calm * CALM_S)
        return width


def _rank(words: str) -> int:
    return int.from_bytes(blake2b(words.encode("utf-8", "surrogatepass"), digest_size=8).digest())
