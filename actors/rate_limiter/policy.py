"""The arithmetic of limits: buckets that can be divided, a rolling hour, and what is said of them.

Rule 1: nothing here knows a loop, an actor or a clock; `now` is an argument, in monotonic seconds.
Rule 2: what is lent is moved, never copied. A bucket's rate, capacity and level are the sums over
        its parts, so however the parts are used, in any interval of t seconds at most
        capacity + rate * t is taken. That is what "requests per minute with burst" promises.
Rule 3: whatever gets lost on the way counts as used.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

EPSILON = 1e-9
HOUR_SLOTS = 60
SLOT_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None means no limit of that kind.

    `burst` is how many requests may come at once when `requests_per_minute` limits. `version` is
    the configuration's that says so: where two processes differ, the newer one wins.
    """

    requests_per_minute: float | None = None
    burst: int = 10
    requests_per_hour: int | None = None
    concurrent: int | None = None
    version: int = field(default=0, compare=False)

    @property
    def rate_per_s(self) -> float:
        return (self.requests_per_minute or 0.0) / 60.0

    @property
    def counts(self) -> bool:
        """Whether the number of requests is limited at all."""
        return self.requests_per_minute is not None or self.requests_per_hour is not None


@dataclass(frozen=True, slots=True)
class Refusal:
    """No, and when to come back. `lent`: others hold the rest and will be asked for it."""

    kind: str
    limit: float
    remaining: float
    retry_after_s: float
    lent: bool = False


@dataclass(frozen=True, slots=True)
class Figures:
    """A limit as its tenant sees it: `remaining` now, and seconds until all of it is there."""

    limit: float
    remaining: float
    reset_s: float


class Bucket:
    """A token bucket that refills lazily, when somebody looks at it (GCRA in another notation)."""

    __slots__ = ("at_s", "capacity", "level", "rate_per_s")

    def __init__(self, rate_per_s: float, capacity: float, level: float, now: float) -> None:
        self.rate_per_s = rate_per_s
        self.capacity = capacity
        self.level = min(level, capacity)
        self.at_s = now

    def refill(self, now: float) -> None:
        """Bring the level up to `now`."""
        if now > self.at_s:
            self.level = min(self.capacity, self.level + (now - self.at_s) * self.rate_per_s)
            self.at_s = now

    def take(self, now: float) -> bool:
        """Take one, if it is there."""
        self.refill(now)
        if self.level < 1.0 - EPSILON:
            return False
        self.level -= 1.0
        return True

    def put(self, share: Share, now: float) -> None:
        """Add a part that was carved off some bucket of the same tenant."""
        self.refill(now)
        self.rate_per_s += share.rate_per_s
        self.capacity += share.capacity
        self.level = min(self.capacity, self.level + share.level)

    def carve(self, rate_per_s: float, capacity: float, level: float, now: float) -> Share:
        """Take a part off, at most what is there."""
        self.refill(now)
        rate_per_s = min(max(rate_per_s, 0.0), self.rate_per_s)
        capacity = min(max(capacity, 0.0), self.capacity)
        level = min(max(level, 0.0), self.level)
        self.rate_per_s -= rate_per_s
        self.capacity -= capacity
        self.level = min(self.level - level, self.capacity)
        return Share(rate_per_s, capacity, level)

    def wait_s(self, now: float) -> float:
        """Seconds until one is there, if nobody else takes it; infinite if it never will be."""
        self.refill(now)
        missing = 1.0 - self.level
        if missing <= EPSILON:
            return 0.0
        if self.rate_per_s <= 0.0 or self.capacity < 1.0 - EPSILON:
            return float("inf")
        return missing / self.rate_per_s


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a bucket on its way from one holder to another."""

    rate_per_s: float = 0.0
    capacity: float = 0.0
    level: float = 0.0


NOTHING = Share()


class RollingHour:
    """Requests of the last hour in one-minute slots, rounded against the caller.

    One slot more than an hour's is kept, so what was booked counts for at least 3600 s after the
    end of the minute it was booked in, and a permit may be used up to a minute after its booking.
    """

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # [minute, count], oldest first

    def used(self, now: float) -> int:
        """How many count now."""
        minute = int(now // SLOT_S)
        while self._slots and self._slots[0][0] < minute - HOUR_SLOTS:
            self._slots.popleft()
        return sum(count for _, count in self._slots)

    def book(self, count: int, now: float) -> None:
        """Count so many as used now."""
        minute = int(now // SLOT_S)
        if self._slots and self._slots[-1][0] == minute:
            self._slots[-1][1] += count
        else:
            self._slots.append([minute, count])

    def give_back(self, count: int) -> None:
        """So many that were booked were not used; the newest slots forget them first."""
        for slot in reversed(self._slots):
            taken = min(count, slot[1])
            slot[1] -= taken
            count -= taken

    def wait_s(self, now: float) -> float:
        """Seconds until the oldest slot is forgotten."""
        self.used(now)
        oldest = next((minute for minute, count in self._slots if count), None)
        if oldest is None:
            return 0.0
        return (oldest + HOUR_SLOTS + 1) * SLOT_S - now


@dataclass(frozen=True, slots=True)
class Ask:
    """What a desk says to the owner about one tenant: needs, returns and renewal in one.

    `lease` names the desk's lease; the same name renews it. `need` permits are wanted at once,
    `demand_per_s` is the recent rate, `level` what the desk has left in its bucket and `hours_held`
    of its hourly count. `back` and `hours_back` are given up for good. `slots_held` is how many
    slots the desk has, which is the truth after every loss; it wants `slots_need` more. `over` ends
    the lease.
    """

    tenant: str
    limits: Limits
    lease: str
    need: int = 0
    demand_per_s: float = 0.0
    level: float = 0.0
    back: Share = NOTHING
    hours_held: int = 0
    hours_back: int = 0
    slots_held: int = 0
    slots_need: int = 0
    over: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The owner's answer to one ask.

    `share` is added to the desk's bucket, `hours` to its hourly count, `slots` to its slots.
    The lease lives `life_s`, counted from when the desk sent its ask; 0 means that it does not go
    on. `owner` names the owner's life: another name is an owner that knows nothing. What the desk
    has above `rate_target` and `capacity_target` is to be sent back. `slots_wanted`: others wait
    for slots. `refusal` says that `need` could not be met, `slot_refusal` the same of `slots_need`.
    `figures` are the tenant's, for response headers.
    """

    tenant: str
    lease: str
    owner: str
    life_s: float
    share: Share = NOTHING
    hours: int = 0
    slots: int = 0
    rate_target: float = 0.0
    capacity_target: float = 0.0
    slots_wanted: bool = False
    refusal: Refusal | None = None
    slot_refusal: Refusal | None = None
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A counted request. `counted` is false where nothing limits the number of requests."""

    tenant: str
    limits: Limits
    counted: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """A concurrency slot in use; `id` makes giving it back idempotent. 0: no slot is needed."""

    tenant: str
    id: int
