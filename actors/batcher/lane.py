"""What is to be sent next, and when: the state of lanes and of the upstreams behind them.

    nothing of the lane under way          now (retries: when those who failed with them are there)
    something is, and a call would be full now
    something is                           when the oldest text has lingered
    parts of a refused call                now, before all else of their kind
    no free place, or no permit            not now: the answer, or the permit's time, is awaited

Rule 1: interactive texts and bulk do not share calls: a long call would delay who waits.
Rule 2: interactive goes first, whichever lane of the upstream it waits in, but after
        INTERACTIVE_IN_A_ROW calls it is bulk's turn.
Rule 3: where there is more than one place, bulk leaves one free.
Rule 4: interactive texts that are many share out among the free places, SPREAD_FROM to each at
        least: beyond that a call's own overhead is small beside its texts, and several are quicker
        than one. Bulk wants few calls and fills each.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from actors.batcher.aimd import Concurrency
from actors.batcher.fairness import FairQueue, Queued
from actors.batcher.limits import LearntCaps
from actors.batcher.linger import Linger
from actors.batcher.planner import Load
from actors.batcher.policy import Caps, Room

INTERACTIVE_IN_A_ROW = 4
SPREAD_FROM = 256
PAUSE_S_MAX = 1.0
"""Longest pause that a provider's headers bring about; then the next call asks it again."""

Q = TypeVar("Q", bound=Queued)


@dataclass(slots=True)
class Upstream:
    """What the lanes of one deployment share. Bounded: a few figures.

    `in_flight` counts its calls under way, `bulk` those of them that are bulk; `in_a_row` the
    interactive ones since the last bulk. Until `shut_s` there is no permit, as `refusal` says;
    until `pause_s` the provider has asked for quiet.
    """

    concurrency: Concurrency = field(default_factory=Concurrency)
    learnt: LearntCaps = field(default_factory=LearntCaps)
    in_flight: int = 0
    bulk: int = 0
    in_a_row: int = 0
    pause_s: float = float("-inf")
    shut_s: float = float("-inf")
    refusal: Exception | None = None

    @property
    def opens_s(self) -> float:
        return max(self.pause_s, self.shut_s)

    @property
    def is_full(self) -> bool:
        return self.in_flight >= self.concurrency.limit

    def is_full_of(self, bulk: bool) -> bool:
        """Whether there is no place for one more call of this kind."""
        return self.is_full or (bulk and self.bulk >= max(1, self.concurrency.limit - 1))

    @property
    def turns(self) -> tuple[bool, bool]:
        """Whether bulk goes, first and then."""
        return (True, False) if self.in_a_row >= INTERACTIVE_IN_A_ROW else (False, True)

    def went(self, bulk: bool) -> None:
        self.in_a_row = 0 if bulk else self.in_a_row + 1

    def shut(self, until_s: float, refusal: Exception) -> None:
        """There is no permit until then."""
        self.shut_s, self.refusal = until_s, refusal

    def pause(self, for_s: float, now_s: float) -> None:
        """The provider wants no call for so long; PAUSE_S_MAX at the most."""
        self.pause_s = max(self.pause_s, now_s + min(for_s, PAUSE_S_MAX))

    def told(self, room: Room, now_s: float) -> None:
        """What the provider has said is left of its limits."""
        if (room.requests is not None and room.requests < 1) or room.tokens == 0:
            self.pause(room.resets_s, now_s)


@dataclass(frozen=True, slots=True, eq=False)
class Go(Generic[Q]):
    """One call to make now. `tree` is the search that it is a part of, where it is one."""

    units: list[Q]
    bulk: bool
    tree: Hashable | None = None


class LaneState(Generic[Q]):
    """Owns the texts of one lane that wait, and the halves of its refused calls.

    Bounded by who fills it. Failure behaviour: none of its own.
    """

    def __init__(self, caps: Caps, *, idle_linger_s: float = 0.0) -> None:
        self.caps = caps
        self.linger = Linger()
        self._idle_linger_s = idle_linger_s
        self._queues: dict[bool, FairQueue[Q]] = {False: FairQueue(), True: FairQueue()}
        self._flying = {False: 0, True: 0}
        self._urgent: dict[bool, deque[Go[Q]]] = {False: deque(), True: deque()}

    @property
    def waits(self) -> bool:
        return any(self._urgent.values()) or any(queue.items for queue in self._queues.values())

    @property
    def is_idle(self) -> bool:
        return not self.waits and not any(self._flying.values())

    def queue(self, bulk: bool) -> FairQueue[Q]:
        return self._queues[bulk]

    def units(self) -> Iterator[Q]:
        """All that waits."""
        for queue in self._queues.values():
            yield from queue
        for parts in self._urgent.values():
            for go in parts:
                yield from go.units

    def add(self, unit: Q, bulk: bool) -> None:
        self._queues[bulk].push(unit)

    def came(self, texts: int, now_s: float) -> None:
        self.linger.came(texts, now_s)

    def hurry(self, go: Go[Q]) -> None:
        """A part of a refused call goes before all else of its kind, other parts included."""
        self._urgent[go.bulk].appendleft(go)

    def began(self, bulk: bool, upstream: Upstream) -> None:
        self._flying[bulk] += 1
        upstream.in_flight += 1
        upstream.bulk += bulk

    def ended(self, bulk: bool, upstream: Upstream) -> None:
        self._flying[bulk] -= 1
        upstream.in_flight -= 1
        upstream.bulk -= bulk

    def next_of(self, bulk: bool, upstream: Upstream, now_s: float) -> Go[Q] | float | None:
        """A call of a kind to make now; or when to ask again; None: when something has happened."""
        queue, urgent = self._queues[bulk], self._urgent[bulk]
        if not (queue.items or urgent) or upstream.is_full_of(bulk):
            return None
        if now_s < upstream.opens_s:
            return upstream.opens_s
        if urgent:
            upstream.went(bulk)
            return urgent.popleft()
        caps = upstream.learnt.under(self.caps, now_s)
        due_s = self._due_s(queue, bulk, caps, now_s)
        if due_s > now_s:
            return due_s
        upstream.went(bulk)
        if not bulk:
            places = upstream.concurrency.limit - upstream.in_flight
            share = max(SPREAD_FROM, -(-queue.items // places))
            caps = replace(caps, items_max=min(caps.items_max, share))
        return Go(queue.take(Load(caps)), bulk)

    def _due_s(self, queue: FairQueue[Q], bulk: bool, caps: Caps, now_s: float) -> float:
        room = caps.items_max - queue.items
        if room <= 0 or queue.tokens >= caps.tokens_max or queue.bytes >= caps.bytes_max:
            return now_s
        if self._idle_linger_s:
            return queue.oldest_s() + self._idle_linger_s
        if not self._flying[bulk]:
            return now_s
        return queue.oldest_s() + self.linger.wait_s(room, caps.lingers_s(bulk), now_s)


def sooner(one_s: float | None, other_s: float | None) -> float | None:
    """The earlier of two moments, where there is one."""
    if one_s is None or other_s is None:
        return other_s if one_s is None else one_s
    return min(one_s, other_s)
