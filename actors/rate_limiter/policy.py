"""The arithmetic of limits: buckets that can be divided and undone, and a rolling hour.

Rule 1: nothing here knows a loop, an actor or a clock; `now` is an argument, in monotonic seconds.
Rule 2: what is lent is moved, never copied. A bucket's rate, capacity and level are the sums over
        its parts, so however the parts are used, in any interval of t seconds at most
        capacity + rate * t is taken. That is what "requests per minute with burst" promises.
Rule 3: whatever gets lost on the way counts as used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable

from actors.rate_limiter.terms import Share

EPSILON = 1e-9
ROOMS_MAX = 64  # of a bucket's past; what is older than that is put back in part only
HOUR_SLOTS = 60
SLOT_S = 60.0


class Bucket:
    """A token bucket that refills lazily, when somebody looks at it (GCRA in another notation).

    What was taken can be put back as if it had never been taken: at most the least room there was
    since. Room shrinks only by refilling, so its minima are at the moments before something else
    happens; `_rooms` has (last mark covered, least room since), both growing, for marks in order.

    Bounds: ROOMS_MAX of these; beyond, the oldest two become one with the smaller room.
    """

    __slots__ = ("_rooms", "at_s", "capacity", "full_s", "level", "mark", "rate_per_s")

    def __init__(self, rate_per_s: float, capacity: float, level: float, now: float) -> None:
        self.rate_per_s = rate_per_s
        self.capacity = capacity
        self.level = min(level, capacity)
        self.at_s = now
        """Refilled until then; in the future while the bucket waits before it begins to refill."""
        self.full_s = float("-inf")
        """Since when it is full, if it is."""
        self.mark = 0
        """That of the latest event. Each take, charge, carve and put has its own."""
        self._rooms: list[tuple[int, float]] = []

    def refill(self, now: float) -> None:
        """Bring the level up to `now`."""
        if now > self.at_s:
            level = self.level + (now - self.at_s) * self.rate_per_s
            if level < self.capacity:
                self.level = level
            elif self.level < self.capacity:
                self.full_s = now - (level - self.capacity) / self.rate_per_s
                self.level = self.capacity
            self.at_s = now

    def take(self, amount: float, now: float, *, debt: bool = False) -> int | None:
        """Take so much if it is there; the take's mark.

        With `debt` a full bucket also gives more than it has, and refills from below zero.
        """
        self.refill(now)
        level = self.level
        if level < amount - EPSILON and not (debt and level >= self.capacity - EPSILON > 0.0):
            return None
        self._remember(self.capacity - level)
        self.level = level - amount
        self.mark += 1
        return self.mark

    def charge(self, amount: float, now: float) -> int:
        """Take so much whether it is there or not; the take's mark."""
        self.refill(now)
        self._remember(self.capacity - self.level)
        self.level -= amount
        self.mark += 1
        return self.mark

    def put_back(self, mark: int, amount: float, now: float) -> float:
        """Undo so much of the take with that mark. How much there was room for ever since."""
        self.refill(now)
        self._remember(self.capacity - self.level)
        rooms = self._rooms
        first = bisect_left(rooms, (mark, -1.0))
        if first == len(rooms):
            return 0.0  # no mark of this bucket
        back = min(amount, rooms[first][1])
        if back <= 0.0:
            return 0.0
        self.level += back
        for place in range(first, len(rooms)):
            rooms[place] = (rooms[place][0], rooms[place][1] - back)
        while first and rooms[first - 1][1] >= rooms[first][1]:
            first -= 1
            del rooms[first]
        return back

    def put(self, share: Share, now: float) -> int:
        """Add a part that was carved off some bucket of the same tenant; the event's mark."""
        self.refill(now)
        room = self.capacity - self.level
        if share.rate_per_s > 0.0 and now + share.after_s > self.at_s:
            self.at_s = now + share.after_s
        self.rate_per_s += share.rate_per_s
        self.capacity += share.capacity
        self.level = min(self.capacity, self.level + share.level)
        self._remember(min(room, self.capacity - self.level))
        self.mark += 1
        return self.mark

    def carve(self, rate_per_s: float, capacity: float, level: float, now: float) -> Share:
        """Take a part off, at most what is there. Where this one waits to refill, the part does."""
        self.refill(now)
        room = self.capacity - self.level
        rate_per_s = min(max(rate_per_s, 0.0), self.rate_per_s)
        capacity = min(max(capacity, 0.0), self.capacity)
        level = min(max(level, 0.0), max(self.level, 0.0))
        self.rate_per_s -= rate_per_s
        self.capacity -= capacity
        self.level = min(self.level - level, self.capacity)
        self._remember(min(room, self.capacity - self.level))
        self.mark += 1
        return Share(rate_per_s, capacity, level, max(0.0, self.at_s - now))

    def level_before(self, ago_s: float, now: float) -> float:
        """The level `ago_s` seconds before `now`, as if nothing was taken or put back since."""
        self.refill(now)
        if self.at_s > now:
            return self.level
        if self.level >= self.capacity:
            ago_s = max(0.0, ago_s - (now - self.full_s))
        return self.level - ago_s * self.rate_per_s

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until so much is there, if nobody takes any; infinite if it never will be."""
        self.refill(now)
        missing = amount - self.level
        if missing <= EPSILON:
            return 0.0
        if self.rate_per_s <= 0.0 or self.capacity < amount - EPSILON:
            return float("inf")
        return missing / self.rate_per_s + max(0.0, self.at_s - now)

    def _remember(self, room: float) -> None:
        """There is so much room now, for all marks so far."""
        rooms = self._rooms
        while rooms and rooms[-1][1] >= room:
            rooms.pop()
        if rooms and rooms[-1][0] == self.mark:
            return  # it had less since
        rooms.append((self.mark, room))
        if len(rooms) > ROOMS_MAX:
            rooms[1] = (rooms[1][0], rooms[0][1])
            del rooms[0]


class RollingHour:
    """Requests of the last hour in one-minute slots, rounded against the caller.

    A booking counts until SLOT_S + 3600 s after the end of its minute, so a request may take place
    up to SLOT_S after it was booked.
    """

    __slots__ = ("_slots", "_total")

    def __init__(self) -> None:
        self._slots: deque[list[int]] = deque()  # [minute, count], oldest first
        self._total = 0

    def used(self, now: float) -> int:
        """How many count now."""
        while self._slots and self._forgotten_s(self._slots[0][0]) <= now:
            self._total -= self._slots.popleft()[1]
        return self._total

    def book(self, count: int, now: float) -> int:
        """Count so many as used now. The minute they are booked in."""
        minute = int(now // SLOT_S)
        if self._slots and self._slots[-1][0] == minute:
            self._slots[-1][1] += count
        else:
            self._slots.append([minute, count])
        self._total += count
        return minute

    def seed(self, minutes: Iterable[tuple[int, int]], now: float) -> None:
        """Count what was used before: (age in whole minutes, count)."""
        counts = {slot[0]: slot[1] for slot in self._slots}
        for age, count in minutes:
            minute = int((now - age * SLOT_S) // SLOT_S)
            counts[minute] = counts.get(minute, 0) + count
        self._slots = deque([minute, counts[minute]] for minute in sorted(counts))
        self._total = sum(counts.values())

    def give_back(self, count: int, minute: int) -> int:
        """So many that were booked in that minute, or later, were not used. How many it had."""
        for slot in self._slots:
            if slot[0] == minute:
                back = min(count, slot[1])
                slot[1] -= back
                self._total -= back
                return back
        return 0

    def wait_s(self, now: float) -> float:
        """Seconds until the oldest slot is forgotten."""
        self.used(now)
        oldest = next((minute for minute, count in self._slots if count), None)
        return 0.0 if oldest is None else self._forgotten_s(oldest) - now

    def _forgotten_s(self, minute: int) -> float:
        return (minute + HOUR_SLOTS + 2) * SLOT_S
