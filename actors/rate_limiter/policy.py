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
    """A token bucket that refills lazily, when somebody looks at it (GCRA in another notation).

    A token is put back as if it had never been taken, as far as the bucket had room for it all the
    while: `room` is the least there was since `era` began.
    """

    __slots__ = ("at_s", "capacity", "era", "level", "rate_per_s", "room")

    def __init__(self, rate_per_s: float, capacity: float, level: float, now: float) -> None:
        self.rate_per_s = rate_per_s
        self.capacity = capacity
        self.level = min(level, capacity)
        self.at_s = now
        self.era = 0
        self.room = 0.0

    def refill(self, now: float) -> None:
        """Bring the level up to `now`."""
        if now > self.at_s:
            self.level = min(self.capacity, self.level + (now - self.at_s) * self.rate_per_s)
            self.at_s = now
        self.room = min(self.room, self.capacity - self.level)

    def take(self, now: float) -> bool:
        """Take one, if it is there."""
        self.refill(now)
        if self.level < 1.0 - EPSILON:
            return False
        self.level -= 1.0
        if self.room < 1.0:
            self.era += 1
            self.room = self.capacity - self.level
        return True

    def put_back(self, era: int, now: float) -> None:
        """Undo a `take` of that era, as far as the bucket would not have overflowed since."""
        self.refill(now)
        if era == self.era:
            back = min(1.0, max(0.0, self.room))
            self.level += back
            self.room -= back

    def put(self, share: Share, now: float) -> None:
        """Add a part that was carved off some bucket of the same tenant."""
        self.refill(now)
        self.rate_per_s += share.rate_per_s
        self.capacity += share.capacity
        self.level = min(self.capacity, self.level + share.level)
        self.room = min(self.room, self.capacity - self.level)

    def carve(self, rate_per_s: float, capacity: float, level: float, now: float) -> Share:
        """Take a part off, at most what is there."""
        self.refill(now)
        rate_per_s = min(max(rate_per_s, 0.0), self.rate_per_s)
        capacity = min(max(capacity, 0.0), self.capacity)
        level = min(max(level, 0.0), self.level)
        self.rate_per_s -= rate_per_s
        self.capacity -= capacity
        self.level = min(self.level - level, self.capacity)
        self.room = min(self.room, self.capacity - self.level)
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

    A booking counts until SLOT_S + 3600 s after the end of its minute, so a request may take place
    up to SLOT_S after it was booked.
    """

    __slots__ = ("_slots",)

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # [minute, count], oldest first

    def used(self, now: float) -> int:
        """How many count now."""
        while self._slots and self._forgotten_s(self._slots[0][0]) <= now:
            self._slots.popleft()
        return sum(count for _, count in self._slots)

    def book(self, count: int, now: float) -> int:
        """Count so many as used now. The minute they are booked in."""
        minute = int(now // SLOT_S)
        if self._slots and self._slots[-1][0] == minute:
            self._slots[-1][1] += count
        else:
            self._slots.append([minute, count])
        return minute

    def give_back(self, count: int, minute: int) -> None:
        """So many that were booked in that minute, or later, were not used."""
        for slot in self._slots:
            if slot[0] == minute:
                slot[1] -= min(count, slot[1])

    def wait_s(self, now: float) -> float:
        """Seconds until the oldest slot is forgotten."""
        self.used(now)
        oldest = next((minute for minute, count in self._slots if count), None)
        return 0.0 if oldest is None else self._forgotten_s(oldest) - now

    def _forgotten_s(self, minute: int) -> float:
        return (minute + HOUR_SLOTS + 2) * SLOT_S


@dataclass(frozen=True, slots=True)
class Ask:
    """What a desk says to the owner about one tenant: what it has, what it needs, what it returns.

    `owner` is the life of the owner that lent what the desk has. `lease` is the lease that `held`
    belongs to, empty if there is none; what the owner lent beyond `held` was returned or never
    arrived, and `level_back` of its level is left. `need` permits are wanted at once,
    `demand_per_s` is the recent rate. `hours_held` of the hourly count are kept; `hours_back`,
    booked in `hours_minute` or later, are returned. The desk has `slots_held` slots, wants
    `slots_need` more at once and could use `slots_ahead` soon. `over` ends the lease.
    """

    tenant: str
    limits: Limits
    owner: str = ""
    lease: str = ""
    held: Share = NOTHING
    level_back: float = 0.0
    need: int = 0
    demand_per_s: float = 0.0
    hours_held: int = 0
    hours_back: int = 0
    hours_minute: int = 0
    slots_held: int = 0
    slots_need: int = 0
    slots_ahead: int = 0
    over: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """The owner's answer to one ask.

    `share` is added to the desk's bucket, or is all of it if `lease` is another than before;
    `hours`, booked in `hours_minute`, to its hourly count, `slots` to its slots. The lease lives
    `life_s`, counted from when the desk sent its ask; 0: nothing of the kind was lent. `owner`
    names the owner's life: another name is an owner that knows nothing. What the desk has above
    `rate_target` and `capacity_target` is to be sent back. `slots_wanted`: others wait for slots.
    `refusal` says that `need` could not be met, `slot_refusal` the same of `slots_need`. `limits`
    are those in force. `figures` are the tenant's, for response headers.
    """

    tenant: str
    owner: str
    lease: str = ""
    life_s: float = 0.0
    share: Share = NOTHING
    hours: int = 0
    hours_minute: int = 0
    slots: int = 0
    rate_target: float = 0.0
    capacity_target: float = 0.0
    slots_wanted: bool = False
    refusal: Refusal | None = None
    slot_refusal: Refusal | None = None
    limits: Limits | None = None
    figures: Figures | None = None


@dataclass(frozen=True, slots=True)
class Ticket:
    """A counted request. `counted` is false where nothing limits the number of requests.

    `lease`, `era` and `hours_batch` say where its permit came from, so that it can go back there.
    """

    tenant: str
    limits: Limits
    counted: bool
    lease: str = ""
    era: int = 0
    hours_batch: int = 0


@dataclass(frozen=True, slots=True)
class Hold:
    """A concurrency slot in use; `id` makes giving it back idempotent. 0: no slot is needed."""

    tenant: str
    id: int
