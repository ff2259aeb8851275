"""One bucket of one tenant, and what of it is lent to whom.

Rule 1: bucket and parts together never have more rate, capacity and level than the limits say.
Rule 2: a part that its desk does not speak of any more comes home empty, as of its lease's end.
Rule 3: who comes often gets a part with a rate; who does not, or where parts would be too coarse
        to be of use, exactly what is needed now, as a part without a rate.
"""

from __future__ import annotations

from dataclasses import dataclass

from actors.rate_limiter.policy import EPSILON, Bucket
from actors.rate_limiter.terms import NOTHING, Figures, Refusal, Share

RESERVE = 0.05  # of a large burst, kept for whoever comes next
SPARE_RATIO = 1.1  # a part so far above its target is about to be cut down
NEEDS_PER_S = 5.0  # what waits counts as so much demand
FINE = 4.0  # so many times what one takes a burst has for each hot desk, where parts have rates
BIG_S = 1.0  # so long parts stay at home after somebody needed more than the burst
SINGLY, SINGLY_S = 1.1, 0.005  # places are so much further apart where permits are lent singly
PLACE_GRACE_S = 0.25  # a place that is not used is forgotten so much after its time
TRAVEL_S = 0.1  # requests that overtake each other on their way do so by less than this


@dataclass(slots=True)
class Part:
    """What one desk was lent, at most."""

    rate_per_s: float = 0.0
    capacity: float = 0.0
    level: float = 0.0  # what its desk had when it last spoke, and what it was lent since
    demand_per_s: float = 0.0
    unit: float = 1.0
    hot: bool = False


class Pool:
    """Owns what is not lent of a bucket, and knows what is.

    Bounded by the desks that have a lease. Failure behaviour: see the rules; after limits change,
    what comes home above the new ones is dropped.
    """

    __slots__ = (
        "_big_until_s",
        "_lent_capacity",
        "_lent_rate",
        "_places",
        "bucket",
        "burst",
        "kind",
        "limit",
        "parts",
        "rate_per_s",
    )

    def __init__(
        self, kind: str, limit: float, rate_per_s: float, burst: float, level: float, since_s: float
    ) -> None:
        self.kind = kind
        self.limit = limit
        self.rate_per_s = rate_per_s
        self.burst = burst
        self.bucket = Bucket(rate_per_s, burst, level, since_s)
        self.parts: dict[str, Part] = {}
        self._lent_rate = 0.0
        self._lent_capacity = 0.0
        self._big_until_s = float("-inf")
        self._places: dict[str, tuple[float, float]] = {}  # a desk's refused ones come back then

    def relimit(self, limit: float, rate_per_s: float, burst: float, now: float) -> None:
        """What is lent stays lent, the rest is what the new limits leave over."""
        self.bucket.refill(now)
        self.limit, self.rate_per_s, self.burst = limit, rate_per_s, burst
        since_s = max(now, self.bucket.at_s)
        rate = max(0.0, rate_per_s - self._lent_rate)
        capacity = max(0.0, burst - self._lent_capacity)
        self.bucket = Bucket(rate, capacity, self.bucket.level, since_s)

    def full(self, now: float) -> bool:
        """Whether nothing is lent and nothing is missing."""
        self.bucket.refill(now)
        return not self.parts and self.bucket.level >= self.bucket.capacity - EPSILON

    def told(self, holder: str, held: Share, back: float, now: float) -> bool:
        """What a desk has left of its part. Whether it has no capacity of it any more."""
        part = self.parts.get(holder)
        if part is None:
            return True
        rate = max(0.0, part.rate_per_s - held.rate_per_s)
        capacity = max(0.0, part.capacity - held.capacity)
        part.level = held.level
        if rate > 0.0 or capacity > 0.0 or back:
            self._home(part, rate, capacity, back, now)
        return part.capacity <= EPSILON

    def end(self, holder: str, at_s: float, level: float | None = None) -> None:
        """The lease is over: all of the part comes home, empty if its desk says nothing else."""
        part = self.parts.pop(holder, None)
        if part is not None:
            back = min(0.0, part.level) if level is None else level
            self._home(part, part.rate_per_s, part.capacity, back, at_s)
        if not self.parts:
            self._lent_rate = self._lent_capacity = 0.0

    def wants(self, holder: str, hot: bool, demand_per_s: float, unit: float) -> Part:
        """The desk's part, and what it says of its demand."""
        part = self.parts.get(holder)
        if part is None:
            part = self.parts[holder] = Part()
        part.hot, part.demand_per_s, part.unit = hot, demand_per_s, max(unit, 1.0)
        return part

    def targets(self, part: Part, now: float) -> tuple[float, float]:
        """How much rate and capacity this part should have.

        A part that cannot hold what one request takes admits nothing. So each has as much, and of
        the rest its share by demand; none has any where the burst is too small for that.
        """
        if not part.hot or now < self._big_until_s:
            return 0.0, 0.0
        hot = [other for other in self.parts.values() if other.hot]
        unit = max(other.unit for other in hot)
        least = unit if unit <= 1.0 else unit * FINE
        if self.burst < least * len(hot) - EPSILON:
            return 0.0, 0.0
        total = sum(other.demand_per_s for other in hot)
        fraction = part.demand_per_s / total if total > 0.0 else 1.0 / len(hot)
        spare = self.burst * RESERVE if self.burst * RESERVE >= unit else 0.0
        rest = max(0.0, self.burst - unit * len(hot) - spare)
        return self.rate_per_s * fraction, unit + rest * fraction

    def lend_part(self, part: Part, need: float, now: float) -> Share:
        """What the part lacks of its targets, and of the level what is needed at once first."""
        rate, capacity = self.targets(part, now)
        if rate <= 0.0:
            return NOTHING
        rate = max(0.0, rate - part.rate_per_s)
        bucket = self.bucket
        bucket.refill(now)
        capacity = min(max(0.0, capacity - part.capacity), bucket.capacity)
        room = max(0.0, part.capacity + capacity - part.level)
        # The level follows the capacity, and what the rest of the bucket could not hold goes along.
        even = bucket.level * capacity / bucket.capacity if bucket.capacity > EPSILON else 0.0
        overflow = bucket.level - (bucket.capacity - capacity)
        level = min(room, max(even, overflow, need - part.level, 0.0))
        if rate <= 0.0 and capacity <= 0.0 and level <= 0.0:
            return NOTHING
        return self._carve(part, rate, capacity, level, now)

    def lend_exactly(
        self, part: Part, amount: float, now: float, ago_s: float = 0.0
    ) -> Share | None:
        """So much more level, and the capacity to hold it; None if it was not there then."""
        if amount <= 0.0:
            return NOTHING
        bucket = self.bucket
        if bucket.level_before(ago_s, now) < amount - EPSILON:
            return None
        room = max(0.0, part.capacity - max(part.level, 0.0))
        return self._carve(part, 0.0, max(0.0, amount - room), amount, now)

    def lend_big(self, part: Part, amount: float, now: float) -> Share | None:
        """More than the burst, when everything is at home or with the asker; leaves a debt."""
        bucket = self.bucket
        bucket.refill(now)
        self._big_until_s = now + BIG_S
        if (
            bucket.capacity + part.capacity < self.burst - EPSILON * self.burst
            or bucket.level + part.level < self.burst - EPSILON * self.burst
        ):
            return None
        more = amount - part.level
        self._depart(now)
        bucket.charge(more, now)
        moved = bucket.carve(0.0, bucket.capacity, 0.0, now)
        part.capacity += moved.capacity
        self._lent_capacity += moved.capacity
        part.level += more
        return Share(0.0, max(0.0, amount - (part.capacity - moved.capacity)), more)

    def refusal(
        self, holder: str, part: Part, amount: float, spacing: float, many: int, now: float
    ) -> Refusal:
        """Why so much cannot be had now, and when it can; `many` wait, each for about `spacing`."""
        bucket = self.bucket
        bucket.refill(now)
        rate = bucket.rate_per_s + part.rate_per_s
        amount = min(amount, self.burst)
        missing = max(0.0, amount - part.level - bucket.level)
        away = bucket.capacity + part.capacity < amount - EPSILON
        lent = away or any(
            other.level >= min(other.unit, amount)
            or other.rate_per_s > self.targets(other, now)[0] * SPARE_RATIO + EPSILON
            for other in self.parts.values()
            if other is not part
        )
        whole = self.rate_per_s if lent or rate <= EPSILON else rate
        wait_s = missing / whole if whole > 0.0 else 1.0
        wait_s += max(0.0, bucket.at_s - now)
        spacing_s = spacing / self.rate_per_s if self.rate_per_s > 0.0 else 0.0
        soonest_s = wait_s
        if self.burst < sum(other.hot for other in self.parts.values()):
            # What is lent singly is on its way for a while, and nothing refills it there.
            wait_s, spacing_s = wait_s + SINGLY_S, spacing_s * SINGLY + SINGLY_S
        if not lent:
            at_s = self._place(holder, now + wait_s, max(1, many) * spacing_s, now)
            wait_s = at_s - now
        left = max(0.0, part.level + bucket.level)
        wait_s = max(wait_s, 0.001)
        return Refusal(
            self.kind, self.limit, left, wait_s, lent, spacing_s, soonest_s=max(soonest_s, 0.001)
        )

    def _place(self, holder: str, at_s: float, for_s: float, now: float) -> float:
        """When a desk's refused ones may come: after all others', or when they were told before."""
        for other, (_, until_s) in list(self._places.items()):
            if until_s + PLACE_GRACE_S < now:
                del self._places[other]
        own = self._places.get(holder)
        if own is not None and own[0] + PLACE_GRACE_S >= now:
            at_s = max(at_s, own[0])
        else:
            at_s = max([at_s, *(until_s for _, until_s in self._places.values())])
        self._places[holder] = (at_s, at_s + for_s)
        return at_s

    def served(self, holder: str) -> None:
        """The desk was given what it needed: whoever was refused before has come back."""
        if self._places:
            self._places.pop(holder, None)

    def figures(self, level: float) -> Figures:
        """As a desk that holds `level` may see them: that, and what nobody holds."""
        level += self.bucket.level
        missing = max(0.0, self.burst - level)
        reset_s = missing / self.rate_per_s if self.rate_per_s > 0.0 else 0.0
        return Figures(self.limit, max(0.0, level), reset_s)

    def state(self, now: float) -> dict[str, float]:
        """For people."""
        self.bucket.refill(now)
        level = sum(max(0.0, part.level) for part in self.parts.values())
        figures = self.figures(level)
        return {
            "limit": figures.limit,
            "remaining": figures.remaining,
            "reset_s": figures.reset_s,
            "burst": self.burst,
        }

    def _carve(self, part: Part, rate: float, capacity: float, level: float, now: float) -> Share:
        self._depart(now)
        share = self.bucket.carve(rate, capacity, level, now)
        part.rate_per_s += share.rate_per_s
        part.capacity += share.capacity
        part.level += share.level
        self._lent_rate += share.rate_per_s
        self._lent_capacity += share.capacity
        return share

    def _depart(self, now: float) -> None:
        """Who overtake each other after a pause do not look like more than the burst.

        What refills after they left does so as much later as the bucket was full for nothing.
        """
        bucket = self.bucket
        if (
            self._lent_capacity <= EPSILON
            and bucket.at_s <= now
            and bucket.level >= bucket.capacity - EPSILON
        ):
            bucket.at_s = now + min(TRAVEL_S, max(0.0, now - bucket.full_s))

    def _home(self, part: Part, rate: float, capacity: float, level: float, at_s: float) -> None:
        """Put something of a part back, but never more than the limits have room for."""
        part.rate_per_s -= rate
        part.capacity -= capacity
        self._lent_rate -= rate
        self._lent_capacity -= capacity
        bucket = self.bucket
        room_rate = max(0.0, self.rate_per_s - self._lent_rate - bucket.rate_per_s)
        room_capacity = max(0.0, self.burst - self._lent_capacity - bucket.capacity)
        bucket.put(Share(min(rate, room_rate), min(capacity, room_capacity), level), at_s)
