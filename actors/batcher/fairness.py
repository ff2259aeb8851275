"""Whose texts go next: deficit round robin over tenants, by estimated tokens.

A tenant whose turn it is may send QUANTUM_TOKENS, and what it did not use of earlier turns; then
the next one's turn comes. A text counts as TOKENS_LEAST at the least, since it takes a place in the
call too. One tenant's million texts delay another's single one by sixteen.

Source: Shreedhar and Varghese, "Efficient Fair Queuing Using Deficit Round Robin", 1995.

No clock and no event loop here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from actors.batcher.planner import Load

QUANTUM_TOKENS = 256
TOKENS_LEAST = 16
DEAD_MAX = 1000
"""Most forgotten texts that a queue keeps beyond as many as are alive in it."""


class Queued(Protocol):
    """What a queue needs to know of a text."""

    size: int
    tokens: int
    tenant: str
    arrived_s: float
    dead: bool


Q = TypeVar("Q", bound=Queued)


class FairQueue(Generic[Q]):
    """Owns the order of texts that wait. Bounded by who fills it, and by DEAD_MAX.

    `items`, `tokens` and `bytes` count what is alive in it.
    """

    def __init__(self, quantum: int = QUANTUM_TOKENS) -> None:
        self._quantum = quantum
        self._queues: dict[str, deque[Q]] = {}
        self._deficits: dict[str, int] = {}
        self._ring: deque[str] = deque()  # whose turn is next
        self._turn = False  # whether the first of the ring has had its quantum
        self._dead = 0
        self.items = self.tokens = self.bytes = 0

    def __iter__(self) -> Iterator[Q]:
        for queue in self._queues.values():
            yield from (unit for unit in queue if not unit.dead)

    def push(self, unit: Q) -> None:
        """Behind its tenant's other texts."""
        queue = self._queues.get(unit.tenant)
        if queue is None:
            queue = self._open(unit.tenant)
            self._ring.append(unit.tenant)
        queue.append(unit)
        self._count(unit, 1)

    def put_back(self, units: Sequence[Q]) -> None:
        """What was taken and not sent goes first, in its order, and costs its tenants no turn."""
        for unit in reversed(units):
            queue = self._queues.get(unit.tenant)
            if queue is None:
                queue = self._open(unit.tenant)
                self._ring.appendleft(unit.tenant)
                self._turn = False
            queue.appendleft(unit)
            self._deficits[unit.tenant] += cost_of(unit)
            self._count(unit, 1)

    def forget(self, unit: Q) -> None:
        """Nobody wants this text any more, which is in the queue."""
        unit.dead = True
        self._count(unit, -1)
        self._dead += 1
        if self._dead > DEAD_MAX + self.items:
            self._sweep()

    def take(self, load: Load) -> list[Q]:
        """The texts that go next, as many as `load` takes."""
        taken: list[Q] = []
        while self._ring:
            tenant = self._ring[0]
            queue = self._queues[tenant]
            if not self._turn:
                self._deficits[tenant] += self._quantum
                self._turn = True
            while queue:
                unit = queue[0]
                if unit.dead:
                    queue.popleft()
                    self._dead -= 1
                    continue
                cost = cost_of(unit)
                if cost > self._deficits[tenant]:
                    break
                if not load.takes(unit.size, unit.tokens):
                    return taken
                queue.popleft()
                self._deficits[tenant] -= cost
                self._count(unit, -1)
                load.add(unit.size, unit.tokens)
                taken.append(unit)
            self._turn = False
            self._ring.popleft()
            if queue:
                self._ring.append(tenant)
            else:
                self._close(tenant)
        return taken

    def oldest_s(self) -> float:
        """When the text that waits longest came. There must be one."""
        return min(unit.arrived_s for queue in self._queues.values() for unit in _first(queue))

    def _open(self, tenant: str) -> deque[Q]:
        self._deficits[tenant] = 0
        queue: deque[Q] = deque()
        self._queues[tenant] = queue
        return queue

    def _close(self, tenant: str) -> None:
        del self._queues[tenant], self._deficits[tenant]

    def _count(self, unit: Q, sign: int) -> None:
        self.items += sign
        self.tokens += sign * unit.tokens
        self.bytes += sign * unit.size

    def _sweep(self) -> None:
        for tenant in list(self._ring):
            alive = deque(unit for unit in self._queues[tenant] if not unit.dead)
            self._queues[tenant] = alive
            if not alive:
                if tenant == self._ring[0]:
                    self._turn = False
                self._ring.remove(tenant)
                self._close(tenant)
        self._dead = 0


def cost_of(unit: Queued) -> int:
    """What a text counts for its tenant."""
    return max(TOKENS_LEAST, unit.tokens)


def _first(queue: deque[Q]) -> Iterator[Q]:
    for unit in queue:
        if not unit.dead:
            yield unit
            return
