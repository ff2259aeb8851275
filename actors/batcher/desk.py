"""The Batcher's desk: hands a caller's list over, and again when the owner was lost."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from actors.batcher.policy import Caps, Lane, Share, Text
from actors.ref import Clock, OwnerRef, OwnerUnavailable

GRACE_S = 0.5
"""How much longer than the call's own deadline the owner has to say that it has passed."""
BACK_OFF_S = (0.05, 1.0)
DROP_TIMEOUT_S = 5.0


class BatcherDesk:
    """Owns this process's embedding calls under way. Bounded by its callers.

    Failure behaviour: with the owner away a call is sent again, under the same id, until its
    deadline; then OwnerUnavailable. An owner that was restarted knows nothing of what it had sent,
    so the provider may be paid twice for one call. A cancelled caller tells the owner, which drops
    what it has not sent yet.
    """

    def __init__(
        self,
        ref: OwnerRef,
        holder: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        nonce: str | None = None,
    ) -> None:
        self._ref = ref
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

    async def embed(
        self,
        lane: Lane,
        texts: Sequence[Text],
        *,
        timeout_s: float,
        coalesce: bool,
        caps: Caps | None = None,
    ) -> Share:
        """The vectors of `texts`, in their order, and this caller's part of the price.

        Raises what the provider call raised (with `paid`, see `Paid`, where a part of the list was
        answered and costs, and with `beat` where others shared the call: who waits by it before it
        sends `texts` again, with `lane.retry`, shares a call with them again); TimeoutError,
        BatcherFull, BadVectors; OwnerUnavailable.
        """
        self._minted += 1
        call_id = f"{self._prefix}-{self._minted}"
        self._counts["calls"] += 1
        self._counts["texts"] += len(texts)
        self._under_way += 1
        try:
            return await self._send(call_id, lane, list(texts), timeout_s, coalesce, caps or Caps())
        except asyncio.CancelledError:
            self._counts["cancelled"] += 1
            task = asyncio.get_running_loop().create_task(self._drop(call_id))
            self._dropping.add(task)
            task.add_done_callback(self._dropping.discard)
            raise
        finally:
            self._under_way -= 1

    def stats(self) -> dict[str, Any]:
        return {"under_way": self._under_way, **self._counts}

    async def _send(
        self,
        call_id: str,
        lane: Lane,
        texts: list[Text],
        timeout_s: float,
        coalesce: bool,
        caps: Caps,
    ) -> Share:
        deadline = self._clock() + timeout_s
        back_off_s = BACK_OFF_S[0]
        while True:
            left_s = deadline - self._clock()
            arguments = (call_id, lane, texts, self._holder, left_s, coalesce, caps)
            try:
                share: Share = await self._ref.ask("embed", *arguments, timeout_s=left_s + GRACE_S)
            except OwnerUnavailable:
                self._counts["owner_lost"] += 1
                if self._clock() + back_off_s >= deadline:
                    raise
                await self._pause(back_off_s)
                back_off_s = min(2 * back_off_s, BACK_OFF_S[1])
            else:
                return share

    async def _drop(self, call_id: str) -> None:
        try:
            await self._ref.ask("drop", call_id, timeout_s=DROP_TIMEOUT_S)
        except OwnerUnavailable:
            # An owner that is gone has forgotten the call anyway.
            self._counts["owner_lost"] += 1
