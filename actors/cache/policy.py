"""What a cached answer is called, how long and in how much room it is kept, and who computes what.

Rule 1: a key is made of its scope; there is no way to build one without, and every look-up names
        the scope again. A tenant's entry is not even searched in another's shelf.
Rule 2: fields are length-prefixed and hashed in full, so no field can spell another one.
Rule 3: of those who ask for one key at one time, exactly one leads. It leads while it is heard of;
        when it falls silent, the next who asks leads.
Rule 4: values are opaque bytes, whole and successful by the caller's promise.

No clock and no event loop here: time is an argument.
"""

from __future__ import annotations

import heapq
import json
import math
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import orjson

from actors.cache.tinylfu import Entry, Shelf

ENTRY_OVERHEAD_BYTES = 380
"""What an entry costs beside its value: key, record, and its places in the maps (measured)."""
SHELF_OVERHEAD_BYTES = 1700
"""What a scope with any entries costs beside them (measured)."""
ENTRY_SHARE_MAX = 8
"""No entry is larger than the cache divided by this."""
DIGEST_BYTES = 32
"""A key's digest; what follows it is the mark of its model."""
STEMS_MAX = 4096
"""Beginnings of keys that are remembered: a tenant's, for a route and a model."""
TTL_JITTER = 0.1
"""A lifetime is cut by up to this share, so that what was stored together does not end together."""
FLIGHTS_MAX = 100_000
SWEEP_STEP = 2000
"""Entries that a sweep looks at in one step: two or three milliseconds."""
SWEPT_MAX = 256
SWEPT_KEPT_S = 900.0
"""Longer than any call may take: what lands later than this after a sweep was begun after it."""
TRAVEL_S = 5.0
"""The longest that a landing is under way."""
OUTCOMES_MAX = 10_000
OUTCOMES_BYTES_MAX = 32 * 1024 * 1024
OUTCOMES_KEPT_S = 10.0
SPEECH_BYTES_MAX = 1024 * 1024
"""Most of one stream that is kept while it runs, on either side; beyond, its followers wait for
its end."""
SPEECHES_BYTES_MAX = 64 * 1024 * 1024
PIECE_OVERHEAD_BYTES = 60

TRANSPORT_FIELDS = frozenset(
    {
        "model",  # given to `key` as what the alias means
        "stream",
        "stream_options",
        "encoding_format",
        "user",
        "safety_identifier",
        "metadata",
        "prompt_cache_key",
        "prompt_cache_retention",
        "timeout",
        "request_timeout",
    }
)
"""Fields that change how an answer travels or who is named with it, never what it says."""


@dataclass(frozen=True, slots=True)
class Scope:
    """Who may share an answer: one tenant, or everybody (None), which is only ever chosen."""

    tenant: str | None

    @property
    def mark(self) -> str:
        """The scope as a string: no tenant's name can make it another's, or everybody's."""
        return "everybody" if self.tenant is None else f"tenant {self.tenant}"

    @classmethod
    def of(cls, mark: str) -> Scope:
        """The scope with this mark."""
        return cls(None if mark == "everybody" else mark.removeprefix("tenant "))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Scope, (self.tenant,))


@dataclass(frozen=True, slots=True)
class Sweep:
    """What an invalidation takes: by the mark of its scope, that of its model, its key. None: any.

    Nothing said takes everything.
    """

    scope: str | None = None
    model: bytes | None = None
    key: bytes | None = None

    @classmethod
    def of(
        cls, scope: Scope | None = None, model: str | None = None, key: bytes | None = None
    ) -> Sweep:
        """`model` and `key` are what `key` was given, and gave."""
        mark = None if model is None else model_mark(model)
        return cls(None if scope is None else scope.mark, mark, key)

    def takes(self, mark: str, key: bytes) -> bool:
        return (
            (self.scope is None or self.scope == mark)
            and (self.model is None or self.model == key[DIGEST_BYTES:])
            and (self.key is None or self.key == key)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (Sweep, (self.scope, self.model, self.key))


def model_mark(model: str) -> bytes:
    """The end of every key of a model's answers: 8 bytes."""
    return blake2b(_bytes(model), digest_size=8, person=b"forebay.model.1").digest()


def jittered(ttl_s: float, chance: float) -> float:
    """A lifetime cut by a share of TTL_JITTER: `chance`, from 0 to 1."""
    return ttl_s * (1.0 - TTL_JITTER * chance)


def leader_of(flight: str) -> str:
    """Who minted a flight's name."""
    return flight.rpartition("-")[0]


def key(scope: Scope, route: str, model: str, body: dict[str, Any], meaning: str = "") -> bytes:
    """40 bytes that name the answer to a request: BLAKE2b-256 (RFC 7693) of its canonical form, and
    the model's mark.

    `model` is the name that the alias stands for, `meaning` what that is now, in one process and in
    the next. Bodies that mean the same (field order, 1 and 1.0 and 1e0, a null field and none)
    share a key, and every difference in meaning splits it. Text is taken as it is: no Unicode
    normalisation. Raises TypeError or ValueError for what JSON cannot say.
    """
    digest = _digest(scope, route, model, meaning)
    digest.update(canonical(body))
    return digest.digest() + model_mark(model)


def text_keys(
    scope: Scope,
    route: str,
    model: str,
    body: dict[str, Any],
    texts: Sequence[str | tuple[int, ...]],
    meaning: str = "",
) -> list[bytes]:
    """One key for each of the texts, or token ids, that share `body`, which does not hold them.

    Made like `key`; no key of one kind is a key of another.
    """
    stems: dict[type, blake2b] = {
        kind: _digest(scope, f"{route}/{name}", model, meaning)
        for kind, name in ((str, "text"), (tuple, "tokens"))
    }
    shared = canonical(body)
    for stem in stems.values():
        stem.update(len(shared).to_bytes(8, "big"))
        stem.update(shared)
    mark = model_mark(model)
    keys = []
    for text in texts:
        digest = stems[type(text)].copy()
        digest.update(_bytes(text if isinstance(text, str) else ",".join(map(str, text))))
        keys.append(digest.digest() + mark)
    return keys


def _digest(scope: Scope, route: str, model: str, meaning: str) -> blake2b:
    return _stem(scope.mark, route, model, meaning).copy()


@lru_cache(maxsize=STEMS_MAX)
def _stem(*texts: str) -> blake2b:
    digest = blake2b(digest_size=DIGEST_BYTES, person=b"forebay.cache.2")
    for text in texts:
        field = _bytes(text)
        digest.update(len(field).to_bytes(8, "big"))
        digest.update(field)
    return digest


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def canonical(body: dict[str, Any]) -> bytes:
    """JSON in the spirit of RFC 8785: keys sorted, one form for each number, no spaces."""
    fields = {
        name: _plain(value)
        for name, value in body.items()
        if value is not None and name not in TRANSPORT_FIELDS
    }
    try:
        return b"o" + orjson.dumps(fields, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        # Integers beyond 64 bits and lone surrogates, which JSON lets through and orjson does not.
        # The letter in front keeps the two forms apart.
        return b"j" + json.dumps(fields, sort_keys=True, allow_nan=False).encode()


def _plain(value: Any) -> Any:
    kind = type(value)
    if kind is str or kind is int:
        return value
    if kind is dict:
        return {name: _plain(inner) for name, inner in value.items()}
    if kind is list:
        return [_plain(inner) for inner in value]
    if kind is float:
        if not math.isfinite(value):
            raise ValueError("not a JSON number")
        return int(value) if value.is_integer() and abs(value) < 2**63 else value
    return value


@dataclass(frozen=True, slots=True)
class Ask:
    """One look-up: may a stored answer serve it (`read`), may it share a running call (`join`).

    `flight` is minted by the asker and names its own call, should it lead: the asker's name, a
    hyphen, a number. A leader not heard of for `silence_s` seconds is taken for dead. `stream`: it
    leads, or follows, piece by piece.
    """

    key: bytes
    scope: Scope
    flight: str
    read: bool
    join: bool
    silence_s: float
    stream: bool = False

    def __reduce__(self) -> tuple[Any, ...]:
        flags = (self.read, self.join, self.silence_s, self.stream)
        return (Ask, (self.key, self.scope, self.flight, *flags))


@dataclass(frozen=True, slots=True)
class Hit:
    """A stored answer, `age_s` seconds old, that is good for another `left_s`."""

    value: bytes
    age_s: float
    left_s: float = field(default=0.0, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Hit, (self.value, self.age_s, self.left_s))


@dataclass(frozen=True, slots=True)
class Lead:
    """Compute it, and land it whatever happens. Without a flight nobody waits for the outcome.

    It was handed out at `begun_s`, on the clock of the process that it was handed out in.
    """

    key: bytes
    scope: Scope
    flight: str | None
    begun_s: float | None = field(default=None, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (Lead, (self.key, self.scope, self.flight))


@dataclass(frozen=True, slots=True)
class Follow:
    """Somebody else computes it: wait for this flight."""

    flight: str


@dataclass(frozen=True, slots=True)
class Miss:
    """Nothing stored, and no flight: compute it alone."""


@dataclass(frozen=True, slots=True)
class Searching:
    """Nothing stored here, and nobody computes it; the second tier may know: ask with `search`."""


@dataclass(frozen=True, slots=True)
class Landing:
    """The end of a flight. A value is stored if it has a `ttl_s`; neither value nor error: lost.

    The call began `age_s` seconds before this was sent; None where that is not known.
    """

    key: bytes
    scope: Scope
    flight: str | None
    value: bytes | None
    error: bytes | None
    ttl_s: float | None
    age_s: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        end = (self.value, self.error, self.ttl_s, self.age_s)
        return (Landing, (self.key, self.scope, self.flight, *end))

    @property
    def outcome(self) -> Outcome:
        """What those are told who wait for it."""
        if self.value is not None:
            return Landed(self.value)
        return Gone() if self.error is None else Failed(self.error)


@dataclass(frozen=True, slots=True)
class Landed:
    """The leader's answer."""

    value: bytes


@dataclass(frozen=True, slots=True)
class Failed:
    """The leader's error, for those who waited with it. The next one who asks tries anew."""

    error: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """The leader is lost, or the flight unknown: ask again."""


Answer = Hit | Lead | Follow | Miss
Outcome = Landed | Failed | Gone


@dataclass(frozen=True, slots=True)
class News:
    """What has been heard of a flight since: pieces of a stream, and its end if there is one."""

    pieces: tuple[bytes, ...] = ()
    outcome: Outcome | None = None

    def __bool__(self) -> bool:
        return bool(self.pieces) or self.outcome is not None

    def __reduce__(self) -> tuple[Any, ...]:
        return (News, (self.pieces, self.outcome))


@dataclass(slots=True, eq=False)
class _Hiding:
    """A sweep under way: what it takes is not found, but for what was stored since."""

    sweep: Sweep
    since: set[tuple[str, bytes]] = field(default_factory=set)

    def hides(self, mark: str, key: bytes) -> bool:
        return self.sweep.takes(mark, key) and (mark, key) not in self.since


class Entries:
    """Owns stored answers: one shelf per scope, each with W-TinyLFU's order (see `tinylfu.py`).

    Bounded by `bytes_max`, overhead included, and a scope by `scope_share` of it. A scope over its
    own bound evicts its own entries. When the whole is full, what has expired goes first, of all
    shelves in turn, and then the largest shelf gives way: a scope that holds no more than an equal
    share is never evicted by others.
    """

    def __init__(self, bytes_max: int, scope_share: float = 1.0) -> None:
        self.bytes_max = bytes_max
        self.scope_share = scope_share
        self.bytes = 0
        self.evicted = 0
        self._count = 0
        self._shelf_bytes_max = int(bytes_max * scope_share)
        room = self._shelf_bytes_max - SHELF_OVERHEAD_BYTES
        self._entry_bytes_max = min(bytes_max // ENTRY_SHARE_MAX, room)
        self._shelves: dict[str, Shelf] = {}
        self._hidings: list[_Hiding] = []
        # Shelves by size, largest first; each growth adds a record, stale ones are put right when
        # they come up.
        self._largest: list[tuple[int, str]] = []
        self._turns: list[str] = []  # shelves that are to be looked through for what has expired

    def __len__(self) -> int:
        return self._count

    def scope_bytes(self, scope: Scope) -> int:
        shelf = self._shelves.get(scope.mark)
        return 0 if shelf is None else shelf.bytes

    def get(self, key: bytes, scope: Scope, now: float) -> Hit | None:
        mark = scope.mark
        shelf = self._shelves.get(mark)
        if shelf is None:
            return None
        entry = shelf.entries.get(key)
        if entry is None:
            return None
        if now >= entry.expires_s:
            self._drop(mark, shelf, entry)
            return None
        if self._hidings and self._hides(mark, key):
            return None
        shelf.used(entry)
        return Hit(entry.value, now - entry.stored_s, entry.expires_s - now)

    def put(
        self,
        key: bytes,
        scope: Scope,
        value: bytes,
        ttl_s: float,
        now: float,
        *,
        age_s: float = 0.0,
    ) -> bool:
        """Whether it is kept. Not kept is what is dead already, what is larger than one entry may
        be, and what is larger than the window and was asked for less often than all that would
        have to go for it. Nothing is kept under the key then.

        `age_s` is how old it is.
        """
        mark = scope.mark
        size = len(value) + ENTRY_OVERHEAD_BYTES
        self.remove(key, scope)
        if size > self._entry_bytes_max or ttl_s <= 0:
            return False
        shelf = self._shelves.get(mark)
        if shelf is None:
            shelf = self._shelves[mark] = Shelf()
            shelf.bytes = SHELF_OVERHEAD_BYTES
            self.bytes += SHELF_OVERHEAD_BYTES
        for hiding in self._hidings:
            hiding.since.add((mark, key))
        entry = Entry(key, value, now - age_s, now + ttl_s, size)
        shelf.add(entry)
        self._count += 1
        self.bytes += size
        while shelf.bytes > self._shelf_bytes_max:
            self._evict(mark, now)
        self._note_growth(mark, shelf)
        while self.bytes > self.bytes_max:
            if not self._drop_expired(now):
                self._evict(self._largest_shelf(), now)
        shelf.settle()
        return shelf.entries.get(key) is entry

    def remove(self, key: bytes, scope: Scope) -> None:
        """Keep nothing under the key."""
        mark = scope.mark
        shelf = self._shelves.get(mark)
        entry = None if shelf is None else shelf.entries.get(key)
        if shelf is not None and entry is not None:
            self._drop(mark, shelf, entry)

    def invalidate(self, sweep: Sweep) -> int:
        """Drops what the sweep takes, and says how many entries those are."""
        return sum(self.sweep(sweep))

    def sweep(self, sweep: Sweep) -> Iterator[int]:
        """`invalidate` in steps, each of which says how many it has dropped.

        Nothing of it is found from this call on; what is put in meanwhile is. Go to the end of it:
        half a million entries of one scope take half a second (measured), SWEEP_STEP at a time.
        """
        marks = [sweep.scope] if sweep.scope is not None else list(self._shelves)
        shelves = [(mark, self._shelves[mark]) for mark in marks if mark in self._shelves]
        if sweep.key is not None:
            return iter([self._drop_key(sweep, sweep.key, shelves)])
        if sweep.model is None:
            for mark, shelf in shelves:
                self._clear(mark, shelf)
            return _taken_apart([shelf for _, shelf in shelves])
        hiding = _Hiding(sweep)
        self._hidings.append(hiding)
        return self._drop_model(hiding, [(m, list(one.entries.values())) for m, one in shelves])

    def _drop_key(self, sweep: Sweep, key: bytes, shelves: list[tuple[str, Shelf]]) -> int:
        """Counts neither what has been hidden already, nor what is not the sweep's."""
        dropped = 0
        for mark, shelf in shelves:
            entry = shelf.entries.get(key)
            if entry is not None and sweep.takes(mark, key) and not self._hides(mark, key):
                self._drop(mark, shelf, entry)
                dropped += 1
        return dropped

    def _drop_model(self, hiding: _Hiding, shelves: list[tuple[str, list[Entry]]]) -> Iterator[int]:
        model = hiding.sweep.model
        looked = dropped = 0
        for mark, entries in shelves:
            while entries:  # none of them is held until the last: that would let go of all at once
                entry = entries.pop()
                looked += 1
                if entry.key[DIGEST_BYTES:] == model:
                    shelf = self._shelves.get(mark)
                    if shelf is not None and shelf.entries.get(entry.key) is entry:
                        self._drop(mark, shelf, entry)
                        dropped += 1
                if looked == SWEEP_STEP:
                    yield dropped
                    looked = dropped = 0
        self._hidings.remove(hiding)
        yield dropped

    def _hides(self, mark: str, key: bytes) -> bool:
        return any(hiding.hides(mark, key) for hiding in self._hidings)

    def pop_some(self, bytes_max: int, now: float) -> list[tuple[bytes, Scope, Hit]]:
        """Takes out what fits into `bytes_max`, and one at least if there are any that live."""
        popped: list[tuple[bytes, Scope, Hit]] = []
        size = 0
        while self._shelves:
            mark, shelf = next(iter(self._shelves.items()))
            entry = next(iter(shelf.entries.values()))
            if entry.expires_s > now and not self._hides(mark, entry.key):
                size += entry.bytes
                if popped and size > bytes_max:
                    break
                hit = Hit(entry.value, now - entry.stored_s, entry.expires_s - now)
                popped.append((entry.key, Scope.of(mark), hit))
            self._drop(mark, shelf, entry)
        return popped

    def _clear(self, mark: str, shelf: Shelf) -> int:
        del self._shelves[mark]
        self.bytes -= shelf.bytes
        self._count -= len(shelf.entries)
        return len(shelf.entries)

    def _drop_expired(self, now: float) -> bool:
        """Drop one entry that nobody can be given any more. Looks at one shelf at a time."""
        if not self._turns:
            self._turns = list(self._shelves)
        mark = self._turns[-1]
        shelf = self._shelves.get(mark)
        entry = None if shelf is None else shelf.expired(now)
        if shelf is None or entry is None:
            self._turns.pop()
            return False
        self._drop(mark, shelf, entry)
        return True

    def _evict(self, mark: str, now: float) -> None:
        shelf = self._shelves[mark]
        self._drop(mark, shelf, shelf.worst(now))
        self.evicted += 1

    def _drop(self, mark: str, shelf: Shelf, entry: Entry) -> None:
        shelf.remove(entry)
        self.bytes -= entry.bytes
        self._count -= 1
        if not shelf.entries:
            self._clear(mark, shelf)

    def _note_growth(self, mark: str, shelf: Shelf) -> None:
        if len(self._largest) > 2 * len(self._shelves) + 64:
            self._largest = [(-one.bytes, name) for name, one in self._shelves.items()]
            heapq.heapify(self._largest)
        else:
            heapq.heappush(self._largest, (-shelf.bytes, mark))

    def _largest_shelf(self) -> str:
        while True:
            record, mark = self._largest[0]
            shelf = self._shelves.get(mark)
            if shelf is None:
                heapq.heappop(self._largest)
            elif shelf.bytes != -record:
                heapq.heapreplace(self._largest, (-shelf.bytes, mark))
            else:
                return mark


def _taken_apart(shelves: list[Shelf]) -> Iterator[int]:
    """Lets go of what no map holds any more. Neighbours know each other, so that all of it would
    wait for the garbage collector, and stop everything then."""
    looked = dropped = 0
    for shelf in shelves:
        entries = list(shelf.entries.values())
        shelf.entries.clear()
        while entries:
            del (entry := entries.pop()).before, entry.after
            dropped += 1
            looked += 1
            if looked == SWEEP_STEP:
                yield dropped
                looked = dropped = 0
    yield dropped


class Swept:
    """Owns which sweeps there were of late, so that no answer from before one is kept after it.

    Bounded by SWEPT_MAX and SWEPT_KEPT_S. When there are too many they are taken for one sweep of
    everything: what was begun before is not kept then, and nothing else is lost.
    """

    def __init__(self) -> None:
        self._times: dict[Sweep, float] = {}  # oldest first

    def add(self, sweep: Sweep, now: float) -> None:
        self._times.pop(sweep, None)
        if len(self._times) >= SWEPT_MAX:
            self._forget(now)
        if len(self._times) >= SWEPT_MAX:
            self._times = {Sweep(): now}
        self._times[sweep] = now

    def forbids(self, key: bytes, scope: Scope, begun_s: float, now: float) -> bool:
        """Whether what was begun then must not be kept."""
        if not self._times:
            return False
        self._forget(now)
        mark = scope.mark
        return any(
            swept_s >= begun_s and sweep.takes(mark, key) for sweep, swept_s in self._times.items()
        )

    def recent(self, now: float) -> tuple[tuple[Sweep, float], ...]:
        """The sweeps, oldest first, each with its age in seconds."""
        self._forget(now)
        return tuple((sweep, now - swept_s) for sweep, swept_s in self._times.items())

    def _forget(self, now: float) -> None:
        while self._times:
            sweep = next(iter(self._times))
            if now - self._times[sweep] < SWEPT_KEPT_S:
                return
            del self._times[sweep]


@dataclass(slots=True)
class _Flight:
    id: str
    place: tuple[str, bytes]
    begun_s: float
    silence_s: float
    silent_at_s: float
    streams: bool
    followed: bool = False
    pieces: list[bytes] = field(default_factory=list)
    piece_bytes: int = 0


class Flights:
    """Owns who is computing what: one leader per scope and key; and the streams that are followed,
    as far as they have come.

    Bounded by FLIGHTS_MAX; beyond, `join` answers Miss. Pieces of streams are kept while they run,
    within SPEECH_BYTES_MAX each and SPEECHES_BYTES_MAX in all; what is beyond is left out, and the
    end tells it. The outcome of a flight that somebody was
    told to follow is kept for OUTCOMES_KEPT_S, within OUTCOMES_MAX and OUTCOMES_BYTES_MAX, oldest
    out first: who comes later for it finds it Gone.
    """

    def __init__(self) -> None:
        self._by_place: dict[tuple[str, bytes], _Flight] = {}
        self._by_id: dict[str, _Flight] = {}
        self._silences: list[tuple[float, str]] = []
        self._outcomes: OrderedDict[str, tuple[Outcome, float, int]] = OrderedDict()
        self._outcome_bytes = 0
        self._heard: dict[str, dict[str, None]] = {}  # by leader: streams that are followed
        self._speech_bytes = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def join(self, ask: Ask, now: float) -> Lead | Follow | Miss:
        """Lead, follow, or fly alone. The same ask again gets the same answer."""
        place = (ask.scope.mark, ask.key)
        running = self._by_place.get(place)
        if running is not None and running.id == ask.flight:
            running.silent_at_s = now + running.silence_s
            return Lead(ask.key, ask.scope, ask.flight)
        if running is not None:
            running.followed = True
            if ask.stream and running.streams:
                self._heard.setdefault(leader_of(running.id), {})[running.id] = None
            return Follow(running.id)
        # An id that has landed is not opened again: it is an old message that comes twice.
        if len(self._by_id) >= FLIGHTS_MAX or ask.flight in self._outcomes:
            return Miss()
        flight = _Flight(ask.flight, place, now, ask.silence_s, now + ask.silence_s, ask.stream)
        self._by_place[place] = flight
        self._by_id[flight.id] = flight
        heapq.heappush(self._silences, (flight.silent_at_s, flight.id))
        return Lead(ask.key, ask.scope, ask.flight)

    def begun_s(self, flight: str | None) -> float | None:
        """When this flight began; None when it is not in the air."""
        running = None if flight is None else self._by_id.get(flight)
        return None if running is None else running.begun_s

    def part(self, sweep: Sweep) -> int:
        """Whoever asks from now on leads anew; those who follow already get what they waited for.

        Returns how many flights that concerns.
        """
        parted = [place for place in self._by_place if sweep.takes(*place)]
        for place in parted:
            del self._by_place[place]
        return len(parted)

    def aloft(self) -> list[str]:
        """The flights in the air."""
        return list(self._by_id)

    def leads(self, flight: str) -> bool:
        """Whether those who ask now follow this flight."""
        running = self._by_id.get(flight)
        return running is not None and self._by_place.get(running.place) is running

    def let_go(self, flight: str) -> None:
        """It goes on elsewhere, and may come back."""
        self._close(flight)

    def renew(self, flight: str, now: float) -> bool:
        """The leader is alive. False when it leads no longer."""
        running = self._by_id.get(flight)
        if running is None:
            return False
        running.silent_at_s = now + running.silence_s
        return True

    def heard(self, leader: str) -> list[str]:
        """The streams of this leader that somebody follows piece by piece."""
        return list(self._heard.get(leader, ()))

    def say(self, flight: str, start: int, pieces: Sequence[bytes], now: float) -> bool:
        """Pieces of a stream, the first of which is its number `start`; safe to repeat.

        False when nothing of it is new, or kept.
        """
        running = self._by_id.get(flight)
        if running is None:
            return False
        running.silent_at_s = now + running.silence_s
        known = len(running.pieces)
        if start > known:
            return False
        new = pieces[known - start :]
        size = sum(map(len, new)) + PIECE_OVERHEAD_BYTES * len(new)
        if (
            not new
            or running.piece_bytes + size > SPEECH_BYTES_MAX
            or self._speech_bytes + size > SPEECHES_BYTES_MAX
        ):
            return False
        running.pieces += new
        running.piece_bytes += size
        self._speech_bytes += size
        return True

    def news(self, flight: str, seen: int) -> News:
        """What there is of a flight beyond its first `seen` pieces; Gone when it is not known."""
        running = self._by_id.get(flight)
        if running is None:
            return News(outcome=self.outcome(flight))
        return News(tuple(running.pieces[seen:]))

    def land(self, flight: str, outcome: Outcome, now: float) -> bool:
        """Ends a flight. False when it was over already or never known here."""
        running = self._close(flight)
        if running is None:
            return False
        size = ENTRY_OVERHEAD_BYTES
        if not running.followed:
            outcome = Gone()  # nobody was told to come for it; the id is all there is to remember
        elif isinstance(outcome, Landed):
            size += len(outcome.value)
        elif isinstance(outcome, Failed):
            size += len(outcome.error)
        self._outcomes[flight] = (outcome, now, size)
        self._outcome_bytes += size
        self._forget(now)
        return True

    def _close(self, flight: str) -> _Flight | None:
        running = self._by_id.pop(flight, None)
        if running is None:
            return None
        if self._by_place.get(running.place) is running:
            del self._by_place[running.place]
        self._speech_bytes -= running.piece_bytes
        leader = leader_of(flight)
        heard = self._heard.get(leader, {})
        if heard.pop(flight, 0) is None and not heard:
            del self._heard[leader]
        return running

    def lapse(self, now: float) -> list[str]:
        """Ends the flights whose leaders are silent, and names them."""
        gone = []
        while self._silences and self._silences[0][0] <= now:
            _, flight = heapq.heappop(self._silences)
            running = self._by_id.get(flight)
            if running is None:
                continue
            if running.silent_at_s > now:
                heapq.heappush(self._silences, (running.silent_at_s, flight))
            else:
                self.land(flight, Gone(), now)
                gone.append(flight)
        self._forget(now)
        return gone

    def outcome(self, flight: str) -> Outcome | None:
        """None while it is in the air; Gone when it is not known, or no more."""
        if flight in self._by_id:
            return None
        found = self._outcomes.get(flight)
        return Gone() if found is None else found[0]

    def silent_in_s(self, flight: str, now: float) -> float:
        """Seconds until the leader is taken for dead unless it is heard of."""
        running = self._by_id.get(flight)
        return 0.0 if running is None else max(0.0, running.silent_at_s - now)

    def _forget(self, now: float) -> None:
        while self._outcomes:
            flight, (_, landed_s, size) = next(iter(self._outcomes.items()))
            room = len(self._outcomes) <= OUTCOMES_MAX and self._outcome_bytes <= OUTCOMES_BYTES_MAX
            if room and now - landed_s < OUTCOMES_KEPT_S:
                return
            del self._outcomes[flight]
            self._outcome_bytes -= size
