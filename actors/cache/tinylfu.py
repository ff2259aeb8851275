"""Which of a scope's answers is kept when not all of them fit: W-TinyLFU, weighed by bytes.

After Einziger, Friedman and Manes, "TinyLFU: A Highly Efficient Cache Admission Policy" (ACM ToS
2017); its adaptive window after Einziger, Eytan, Friedman and Manes, "Adaptive Software Cache
Management" (Middleware 2018); aggregated victims for entries of unequal size after "Lightweight
Robust Size Aware Cache Management" (ACM ToS 2022) by the same.

Rule 1: what is new waits in a window, least recently used out first. What drops out of it is kept
        only if it was asked for more often than all that would have to go for it.
Rule 2: what is asked for again while on probation is protected; protected entries are four fifths.
Rule 3: how often is estimated, and fades: all counts are halved when a sample is full.
Rule 4: after each sample the window grows or shrinks, whichever has led to more hits.
Rule 5: what has expired goes before what has not.
"""

from __future__ import annotations

WINDOW_SHARE = (0.01, 0.8)
"""The window's share of a shelf's bytes: at first, and at the most."""
WINDOW_BYTES_MIN = 16 * 1024
"""No window is smaller, unless this would be more than an eighth of the shelf."""
WINDOW_STEP = 0.0625
WINDOW_STEP_DECAY = 0.98
SAME_TIMES, NEW_TIMES = 0.004, 0.05
"""A hit ratio that has changed by less says nothing of the window; by more, that the traffic is of
another kind."""
PROTECTED_SHARE = 0.8
SAMPLE = 10
"""Requests in a sample, for each entry; after the first one half of them are new."""
VICTIMS_MAX = 32
"""Most victims that are weighed against a candidate; the rest are taken to be like them."""
COUNT_MAX = 15
_COLUMNS_MIN = 64
_COLUMNS_MAX = 1 << 21
_HALVED = bytes(count >> 1 for count in range(256))


class Sketch:
    """Owns how often each key was asked for, as far as three rows of small counters know.

    A count-min sketch with conservative update: too high where a key collides in every row.
    Python's keyed hash of bytes chooses the columns, so nobody can aim at them. Bounded by three
    bytes a column; columns are four to eight times as many as there ever were entries.
    """

    __slots__ = ("_first", "_mask", "_second", "_third", "begun", "sample", "since")

    def __init__(self) -> None:
        self._first = bytearray(_COLUMNS_MIN)
        self._second = bytearray(_COLUMNS_MIN)
        self._third = bytearray(_COLUMNS_MIN)
        self._mask = _COLUMNS_MIN - 1
        self.begun = self.since = 0  # of the sample, the part that was there already, and all
        self.sample = SAMPLE * _COLUMNS_MIN // 2

    def add(self, key: bytes) -> bool:
        """One more time. Whether the sample is full, and it is time to `fade`."""
        place = hash(key)
        mask = self._mask
        first, second, third = place & mask, place >> 21 & mask, place >> 42 & mask
        one, two, three = self._first[first], self._second[second], self._third[third]
        low = one if one < two else two
        if three < low:
            low = three
        if low < COUNT_MAX:
            if one == low:
                self._first[first] = low + 1
            if two == low:
                self._second[second] = low + 1
            if three == low:
                self._third[third] = low + 1
        self.since += 1
        return self.since >= self.sample

    def count(self, key: bytes) -> int:
        place = hash(key)
        mask = self._mask
        one, two = self._first[place & mask], self._second[place >> 21 & mask]
        return min(one, two, self._third[place >> 42 & mask])

    def fade(self, entries: int) -> None:
        """Halve all counts. The next sample is for so many entries."""
        self._first = self._first.translate(_HALVED)
        self._second = self._second.translate(_HALVED)
        self._third = self._third.translate(_HALVED)
        self.sample = SAMPLE * max(entries, _COLUMNS_MIN // 2)
        self.begun = self.since = self.sample // 2

    def fit(self, entries: int) -> None:
        """Twice the columns, if there are too few; a key's new ones have what its old ones had."""
        if 4 * entries > self._mask and self._mask + 1 < _COLUMNS_MAX:
            self._first *= 2
            self._second *= 2
            self._third *= 2
            self._mask = 2 * self._mask + 1
            self.sample = SAMPLE * entries


class Entry:
    """A stored answer, in one segment's order."""

    __slots__ = ("after", "before", "bytes", "expires_s", "key", "segment", "stored_s", "value")

    after: Entry
    before: Entry
    segment: Segment

    def __init__(
        self, key: bytes, value: bytes, stored_s: float, expires_s: float, size: int
    ) -> None:
        self.key = key
        self.value = value
        self.stored_s = stored_s
        self.expires_s = expires_s
        self.bytes = size


class Segment(Entry):
    """Entries from least to most recently used; it is its own first and last neighbour."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(b"", b"", 0.0, 0.0, 0)
        self.after = self.before = self

    @property
    def oldest(self) -> Entry | None:
        return None if self.after is self else self.after

    def append(self, entry: Entry) -> None:
        self._insert(entry, self.before, self)

    def append_left(self, entry: Entry) -> None:
        self._insert(entry, self, self.after)

    def _insert(self, entry: Entry, before: Entry, after: Entry) -> None:
        entry.before, entry.after = before, after
        before.after = after.before = entry
        entry.segment = self
        self.bytes += entry.bytes

    def remove(self, entry: Entry) -> None:
        entry.before.after = entry.after
        entry.after.before = entry.before
        self.bytes -= entry.bytes


class Shelf:
    """Owns one scope's entries: which of them there are, and which of them goes next.

    Bounded by who owns it: it says what goes, not when.
    """

    __slots__ = (
        "_added",
        "_hit_ratio",
        "_probation",
        "_protected",
        "_sketch",
        "_step",
        "_window",
        "_window_share",
        "bytes",
        "entries",
    )

    def __init__(self) -> None:
        self.entries: dict[bytes, Entry] = {}
        self.bytes = 0
        self._window = Segment()
        self._probation = Segment()
        self._protected = Segment()
        self._sketch = Sketch()
        self._window_share = WINDOW_SHARE[0]
        self._step = -WINDOW_STEP
        self._hit_ratio = 0.0
        self._added = 0  # since the last sample

    def used(self, entry: Entry) -> None:
        """It was asked for, and is served."""
        segment, before, after = entry.segment, entry.before, entry.after
        before.after, after.before = after, before
        if segment is self._probation:
            segment.bytes -= entry.bytes
            self._protect(entry)
        else:  # to the end of its own; written out, since it is most of what a hit costs
            last = segment.before
            entry.before, entry.after = last, segment
            last.after = segment.before = entry
        if self._sketch.add(entry.key):
            self._review()

    def add(self, entry: Entry) -> None:
        """It was asked for, and is here from now on; its key was not."""
        self.entries[entry.key] = entry
        self.bytes += entry.bytes
        self._added += 1
        self._sketch.fit(len(self.entries))
        if self._sketch.add(entry.key):
            self._review()
        if entry.bytes > self._window_bytes():
            self._window.append_left(entry)  # it is measured at once, and takes nobody's place
        else:
            self._window.append(entry)

    def settle(self) -> None:
        """Everything fits: what drops out of the window need not be measured."""
        window, bytes_max = self._window, self._window_bytes()
        while window.bytes > bytes_max:
            entry = window.after
            window.remove(entry)
            self._probation.append(entry)

    def remove(self, entry: Entry) -> None:
        del self.entries[entry.key]
        self.bytes -= entry.bytes
        entry.segment.remove(entry)

    def expired(self, now: float) -> Entry | None:
        """One whose time is over, if one of those that have waited longest is."""
        for entry in (self._victim(), self._protected.oldest, self._window.oldest):
            if entry is not None and entry.expires_s <= now:
                return entry
        return None

    def worst(self, now: float) -> Entry:
        """The entry that goes next; there must be one."""
        expired = self.expired(now)
        if expired is not None:
            return expired
        window, victim = self._window, self._victim()
        candidate = window.oldest
        if victim is None:
            assert candidate is not None, "an empty shelf is asked for an entry"
            return candidate
        if candidate is None or window.bytes <= self._window_bytes():
            return victim
        if not self._deserves(candidate, victim):
            return candidate
        window.remove(candidate)
        self._probation.append(candidate)
        return victim

    def _victim(self) -> Entry | None:
        return self._probation.oldest or self._protected.oldest

    def _deserves(self, candidate: Entry, victim: Entry) -> bool:
        """Whether it was asked for more often than all that make room for it."""
        count, weighed_bytes, counted = self._sketch.count(candidate.key), 0, 0
        segment = victim.segment
        for _ in range(VICTIMS_MAX):
            counted += self._sketch.count(victim.key)
            weighed_bytes += victim.bytes
            if counted >= count:
                return False
            victim = victim.after
            if weighed_bytes >= candidate.bytes or victim is segment:
                return True
        return counted * candidate.bytes < count * weighed_bytes

    def _protect(self, entry: Entry) -> None:
        protected = self._protected
        protected.append(entry)
        bytes_max = PROTECTED_SHARE * (self.bytes - self._window.bytes)
        while protected.bytes > bytes_max and protected.after is not entry:
            demoted = protected.after
            protected.remove(demoted)
            self._probation.append(demoted)

    def _review(self) -> None:
        """A sample is full: forget half of it, and climb towards more hits."""
        hit_ratio = 1.0 - self._added / (self._sketch.since - self._sketch.begun)
        change, self._hit_ratio, self._added = hit_ratio - self._hit_ratio, hit_ratio, 0
        self._sketch.fade(len(self.entries))
        if abs(change) < SAME_TIMES:
            return
        if change < 0:
            self._step = -self._step
        if abs(change) >= NEW_TIMES:
            self._step = WINDOW_STEP if self._step > 0 else -WINDOW_STEP
        share = self._window_share + self._step
        self._window_share = min(max(share, WINDOW_SHARE[0]), WINDOW_SHARE[1])
        self._step *= WINDOW_STEP_DECAY

    def _window_bytes(self) -> int:
        return max(int(self._window_share * self.bytes), min(WINDOW_BYTES_MIN, self.bytes // 8))
