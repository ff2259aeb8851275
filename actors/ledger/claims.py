"""The ledger's keys: claims and answers, handed to the store by the batch."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.ledger.idempotency import (
    ANSWER_BYTES_MAX,
    Claim,
    Finish,
    Gone,
    Outcome,
    Running,
)
from actors.ledger.policy import StoreFailed
from actors.ref import Clock

if TYPE_CHECKING:
    from actors.ledger.claim_store import Bounds, Held, Order, Told
    from actors.ledger.store import Store

ORDERS_PER_COMMIT_MAX = 500
ORDERS_QUEUED_MAX = 10_000
BYTES_QUEUED_MAX = 64 * 1024 * 1024
WAIT_S_MAX = 2.0
"""How long a claim waits at most for another's answer; whoever asks may ask again."""
WAITERS_MAX = 1_000
HOLDERS_PER_READ_MAX = 1_000

Do = Callable[[Callable[["Store"], Any]], Awaitable[Any]]


class Claims:
    """Owns the claims of all processes, in the ledger's store.

    Orders that come while the store is busy share the next commit. Bounded by ORDERS_QUEUED_MAX and
    BYTES_QUEUED_MAX of orders that wait for the store, WAITERS_MAX claims that wait for another's
    answer, and the store's own bounds on what it keeps.

    Failure behaviour: what was acknowledged is durable, and survives the process and the machine. A
    store that fails fails the orders that wait with StoreFailed; sending them again is safe. Those
    who wait for an answer are lost with this process, and ask again.
    """

    def __init__(
        self,
        do: Do,
        clock: Clock,
        wall: Callable[[], float],
        bounds: Bounds | None = None,
    ) -> None:
        """`do` runs work on the store's thread."""
        self._do = do
        self._clock = clock
        self._wall = wall
        self._bounds = bounds
        self._held: Held | None = None
        self._orders: list[tuple[Order, asyncio.Future[Any]]] = []
        self._bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._waiting: dict[str, set[asyncio.Future[None]]] = {}
        self._waiters = 0
        self._commits = 0

    async def claim(self, claim: Claim, wait_s: float) -> Outcome:
        """How the claim stands. Where another's call is under way it waits for that, for `wait_s`
        and WAIT_S_MAX at most. Safe to repeat with the same token."""
        ends_s = self._clock() + min(wait_s, WAIT_S_MAX)
        while True:
            # Before the store is asked, so that no end is missed between its word and the waiting.
            news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            same = self._waiting.setdefault(claim.name, set())
            same.add(news)
            try:
                told: Outcome = await self._order(claim)
                left_s = ends_s - self._clock()
                if not isinstance(told, Running) or left_s <= 0:
                    return told
                if self._waiters >= WAITERS_MAX:
                    return Running(told.lapses_s, patient=False)
                self._waiters += 1
                try:
                    await asyncio.wait([news], timeout=min(left_s, told.lapses_s))
                finally:
                    self._waiters -= 1
            finally:
                same.discard(news)
                if not same and self._waiting.get(claim.name) is same:
                    del self._waiting[claim.name]

    async def finish(self, finish: Finish) -> bool:
        """Keeps an answer, or gives the key back. False where the key is not the claim's any more.

        Safe to repeat. Raises ValueError for an answer over ANSWER_BYTES_MAX.
        """
        if finish.answer is not None and len(finish.answer) > ANSWER_BYTES_MAX:
            raise ValueError(f"{len(finish.answer)} bytes of answer, {ANSWER_BYTES_MAX} may be")
        done: bool = await self._order(finish)
        self._wake(finish.name)
        return done

    async def gone(self, holder: str) -> None:
        """What a process that is dead had claimed is free. Safe to repeat."""
        names: tuple[str, ...] = await self._order(Gone(holder))
        for name in names:
            self._wake(name)

    async def holders(self) -> dict[str, int]:
        """Who has claims that are not finished yet, and how many."""
        found: dict[str, int] = await self._do(_holders)
        return found

    def stats(self) -> dict[str, int]:
        held = self._held
        return {
            "keys": 0 if held is None else held.keys,
            "bytes": 0 if held is None else held.size,
            "waiting": self._waiters,
            "commits": self._commits,
        }

    def _wake(self, name: str) -> None:
        for news in self._waiting.get(name, ()):
            if not news.done():
                news.set_result(None)

    def _order(self, order: Order) -> asyncio.Future[Any]:
        size = _size(order)
        if len(self._orders) >= ORDERS_QUEUED_MAX or self._bytes + size > BYTES_QUEUED_MAX:
            raise StoreFailed(f"{len(self._orders)} claims and answers wait for the disk")
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        self._orders.append((order, done))
        self._bytes += size
        if self._task is None:
            self._task = loop.create_task(self._hand_over())
        return done

    async def _hand_over(self) -> None:
        try:
            while self._orders:
                batch = self._orders[:ORDERS_PER_COMMIT_MAX]
                del self._orders[: len(batch)]
                work = partial(
                    _obeyed,
                    orders=[order for order, _ in batch],
                    now_ms=int(self._wall() * 1000),
                    held=self._held,
                    bounds=self._bounds,
                )
                told: list[Told] | StoreFailed
                try:
                    told, self._held = await self._do(work)
                    self._commits += 1
                except StoreFailed as error:
                    told, self._held = error, None  # what it holds is counted anew
                finally:
                    self._bytes -= sum(_size(order) for order, _ in batch)
                for number, (_, done) in enumerate(batch):
                    if done.done():  # the caller gave up
                        continue
                    if isinstance(told, StoreFailed):
                        done.set_exception(StoreFailed(told.reason))
                    else:
                        done.set_result(told[number])
        finally:
            self._task = None


def _size(order: Order) -> int:
    return len(order.answer or b"") if isinstance(order, Finish) else 0


# What follows runs on the store's thread. Every process that has a desk imports this file, and only
# the owner's is to import SQLAlchemy.


def _obeyed(
    store: Store, orders: list[Order], now_ms: int, held: Held | None, bounds: Bounds | None
) -> tuple[list[Told], Held]:
    from actors.ledger import claim_store

    with store.transaction() as connection:
        return claim_store.obey(connection, orders, now_ms, held, bounds or claim_store.Bounds())


def _holders(store: Store) -> dict[str, int]:
    from actors.ledger import claim_store

    with store.transaction() as connection:
        return claim_store.holders(connection, HOLDERS_PER_READ_MAX)
