"""The Batcher's desk: hands a caller's list over, and again when the owner was lost."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.batcher.policy import BatcherFull, Lane, Order, Share, Text
from actors.batcher.spread import Spread
from actors.ref import Clock, OwnerRef, OwnerUnavailable

GRACE_S = 0.5
"""How much longer than the call's own deadline the owner has to say that it has passed."""
BACK_OFF_S = (0.05, 1.0)
DROP_TIMEOUT_S = 5.0


class BatcherDesk:
    """Owns this process's embedding calls under way. Bounded by its callers.

    Failure behaviour: with the owner away a call is sent again, under the same id, until its
    deadline; then OwnerUnavailable. An owner that was restarted knows nothing of what it had sent,
    so the provider may be asked twice for one call; its caller pays for the answer that it got.
    Bulk for which the owner has no room waits here. A cancelled caller tells the owner, which
    drops what it has not sent yet.
    """

    def __init__(
        self,
        refs: Sequence[OwnerRef],
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
        rng: random.Random | None = None,
    ) -> None:
        """`refs` are the Batcher's shards, in the same order for every desk."""
        self._refs = list(refs)
        self._spread = Spread(len(self._refs), holder)
        self._rng = rng or random.Random()
        self._holder = holder
        self._clock = clock
        self._pause = pause
        # Ids that no other desk has, not even one of this process.
        self._prefix = f"{holder}-{nonce or secrets.token_hex(8)}"
        self._minted = 0
        self._under_way = 0
        self._dropping: set[asyncio.Task[None]] = set()
        self._counts: Counter[str] = Counter()

    async def start(self) -> None:
        """Nothing to prepare: the owner is found by the first call."""

    async def close(self) -> None:
        """Waits for the word of cancelled calls to get out."""
        if self._dropping:
            await asyncio.wait(self._dropping)

    async def embed(self, lane: Lane, texts: Sequence[Text], order: Order) -> Share:
        """The vectors of `texts`, in their order, and this caller's part of the price.

        Raises what the provider call raised (with `paid`, see `Paid`, where a part of the list was
        answered and costs, and with `beat` where others shared the call: who waits by it before it
        sends `texts` again, with `lane.retry`, shares a call with them again); TimeoutError,
        BatcherFull, BadVectors; OwnerUnavailable.
        """
        ref = self._refs[self._spread.choose(lane, self._clock())]
        self._minted += 1
        call_id = f"{self._prefix}-{self._minted}"
        self._counts["calls"] += 1
        self._counts["texts"] += len(texts)
        self._under_way += 1
        try:
            share = await self._send(ref, call_id, lane, list(texts), order)
            self._spread.told(lane, share.busy, self._clock())
            return share
        except asyncio.CancelledError:
            self._counts["cancelled"] += 1
            task = asyncio.get_running_loop().create_task(self._drop(ref, call_id))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
            raise
        finally:
            self._under_way -= 1

    def stats(self) -> dict[str, Any]:
        return {"under_way": self._under_way, **self._counts}

    async def _send(
        self, ref: OwnerRef, call_id: str, lane: Lane, texts: list[Text], order: Order
    ) -> Share:
        deadline = self._clock() + order.timeout_s
        back_off_s = BACK_OFF_S[0]
        while True:
            left_s = deadline - self._clock()
            arguments = (call_id, lane, texts, replace(order, timeout_s=left_s))
            try:
                share: Share = await ref.ask("embed", *arguments, timeout_s=left_s + GRACE_S)
                return share
            except OwnerUnavailable:
                self._counts["owner_lost"] += 1
                wait_s = back_off_s
                back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
                if self._clock() + wait_s >= deadline:
                    raise
            except BatcherFull as full:
                if not order.bulk:
                    raise
                self._counts["held_back"] += 1
                wait_s = full.retry_after_s * (0.5 + self._rng.random())
                if self._clock() + wait_s >= deadline:
                    raise
            await self._pause(wait_s)

    async def _drop(self, ref: OwnerRef, call_id: str) -> None:
        try:
            await ref.ask("drop", call_id, timeout_s=DROP_TIMEOUT_S)
        except OwnerUnavailable:
            # An owner that is gone has forgotten the call anyway.
            self._counts["owner_lost"] += 1
