"""The callers of the Batcher: their lists from the moment they come to the one answer of each."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from actors.batcher.calls import Call, Part, share_of, with_paid
from actors.batcher.flights import unlist
from actors.batcher.linger import Rate
from actors.batcher.policy import (
    BadVectors,
    BatcherFull,
    Order,
    Paid,
    Share,
    Spare,
    Text,
    Vectors,
)
from actors.ref import Clock

TEXTS_QUEUED_MAX = 100_000
"""Most texts that callers wait for, sent or not; beyond, `embed` raises BatcherFull. One tenant has
half of them at the most, and so has all bulk together."""
CHARS_QUEUED_MAX = 256 * 1024 * 1024
"""Most characters of those texts. A single caller's list is taken whatever its size."""
RETRY_AFTER_S = (1.0, 30.0)
"""Least and most that a caller for whom there is no room is told to wait."""
FINISHED_MAX = 1000
FINISHED_BYTES_MAX = 8 * 1024 * 1024
"""Most vectors kept after their caller was answered, for an answer that got lost on its way."""
BUSY_S = 1.0
"""How often the share of a core is measured."""


class Callers:
    """Owns the lists that wait, the answers kept for a repeated message, and who owes what.

    `counts` are the Batcher's: refused, callers, texts, and what nobody is left to pay for.
    Bounded by TEXTS_QUEUED_MAX and CHARS_QUEUED_MAX, beyond which it refuses, and by FINISHED_MAX
    and FINISHED_BYTES_MAX for answers kept. Failure behaviour: none of its own.
    """

    def __init__(self, counts: Counter[str], clock: Clock, cpu: Clock) -> None:
        self.closed = False
        self._counts = counts
        self._clock = clock
        self._cpu = cpu
        self._calls: dict[str, Call] = {}
        self._finished: deque[tuple[str, int]] = deque()
        self._finished_bytes = 0
        self._texts_queued = 0
        self._chars_queued = 0
        self._bulk_queued = 0
        self._queued_by: Counter[str] = Counter()
        self._answered = Rate()
        self._busy = (0.0, 0.0, 0.0)

    def get(self, call_id: str) -> Call | None:
        """A call that is under way, or was over not long ago."""
        return self._calls.get(call_id)

    def under_way(self) -> list[Call]:
        return [call for call in self._calls.values() if not call.done.done()]

    @property
    def texts_queued(self) -> int:
        return self._texts_queued

    def answered(self, texts: int) -> None:
        """A provider call brought so many vectors: callers for whom there is no room are told when
        to come back by that."""
        self._answered.add(texts, self._clock())

    def accept(self, call_id: str, texts: list[Text], order: Order) -> Call:
        """A new list. Raises BatcherFull; ValueError for an empty one."""
        if not texts:
            raise ValueError("there are no texts to embed")
        chars, count = sum(map(len, texts)), len(texts)
        if self.closed or self._is_full(count, chars, order):
            self._counts["refused"] += 1
            raise BatcherFull(self.retry_after_s())
        now = self._clock()
        deadline_s = now + order.timeout_s
        linger_s = order.caps.lingers_s(bulk=False)
        patience_s = order.timeout_s if order.bulk else max(order.patience_s, linger_s)
        done: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        wait_until_s = min(deadline_s, now + patience_s)
        call = Call(call_id, texts, chars, order, deadline_s, wait_until_s, done, count)
        self._calls[call_id] = call
        self._count(call, 1)
        self._counts["callers"] += 1
        self._counts["texts"] += count
        return call

    def _is_full(self, count: int, chars: int, order: Order) -> bool:
        """Whether there is no room for a list; for one there always is where none is yet."""
        half = TEXTS_QUEUED_MAX // 2
        mine, bulk = self._queued_by[order.tenant], self._bulk_queued
        return (
            (self._texts_queued > 0 and self._texts_queued + count > TEXTS_QUEUED_MAX)
            or (self._chars_queued > 0 and self._chars_queued + chars > CHARS_QUEUED_MAX)
            or (mine > 0 and mine + count > half)
            or (order.bulk and bulk > 0 and bulk + count > half)
        )

    def retry_after_s(self) -> float:
        """How long it takes until half of what waits is done, as things go now."""
        per_s = self._answered.per_s(self._clock())
        least_s, most_s = RETRY_AFTER_S
        return min(most_s, max(least_s, self._texts_queued / 2 / per_s)) if per_s else least_s

    def _count(self, call: Call, sign: int) -> None:
        count = sign * len(call.texts)
        self._texts_queued += count
        self._chars_queued += sign * call.chars
        self._queued_by[call.order.tenant] += count
        if not self._queued_by[call.order.tenant]:
            del self._queued_by[call.order.tenant]
        if call.order.bulk:
            self._bulk_queued += count

    async def wait(self, call: Call) -> Share:
        """The call's end, for one who asks for it. Raises TimeoutError after its deadline."""
        call.waiters += 1
        try:
            left_s = max(0.0, call.deadline_s - self._clock())
            await asyncio.wait([call.done], timeout=left_s)
            if not call.done.done():
                raise TimeoutError("the texts were not embedded within the deadline")
            call.claimed = True
            return call.done.result()
        finally:
            self.leave(call)

    def leave(self, call: Call) -> None:
        """One who asked for it has gone, with or without it."""
        call.waiters -= 1
        if call.waiters or call.claimed:
            return
        if not call.done.done():
            self.finish(call, TimeoutError("the caller went away"))
            return
        self.write_off(call)  # it came just as the last caller left

    def write_off(self, call: Call) -> None:
        """What a call has cost that is over and has nobody to pay for it. Counted once."""
        call.claimed = True
        if not call.written_off:
            call.written_off = True
            error = call.done.exception()
            self.unclaimed(call.done.result() if error is None else getattr(error, "paid", None))

    def finish(self, call: Call, result: Share | Exception) -> None:
        """The call's one end. What it has been brought and cannot be handed on is unclaimed."""
        self._count(call, -1)
        size = 0
        if isinstance(result, Share):
            size = result.array.nbytes
            call.done.set_result(result)
        else:
            call.done.set_exception(result)
            call.done.exception()  # retrieved: it may be that nobody waits
            self.release(call)
            if getattr(result, "paid", None) is None:
                owed: list[Part | Paid] = [*call.parts, *call.debts]
                for part in owed:
                    self.unclaimed(part)
        call.texts = []
        call.units.clear()
        call.parts.clear()
        call.debts.clear()
        call.refused.clear()
        self._finished.append((call.id, size))
        self._finished_bytes += size
        while len(self._finished) > FINISHED_MAX or self._finished_bytes > FINISHED_BYTES_MAX:
            call_id, size = self._finished.popleft()
            self._finished_bytes -= size
            del self._calls[call_id]

    def release(self, call: Call) -> None:
        """The call's texts are not to be sent for its sake any more."""
        for unit in call.units:
            if unit.airborne:
                continue
            before = len(unit.takers)
            unit.takers = [taker for taker in unit.takers if taker[0] is not call]
            call.left -= before - len(unit.takers)
            if unit.queued and not unit.takers and unit.line is not None:
                unit.queued = False
                unit.line.state.queue(unit.bulk).forget(unit)
                unlist(unit.line.queued[unit.bulk], unit)
        call.units = [unit for unit in call.units if unit.airborne]

    def unclaimed(self, part: Part | Share | Paid | Vectors | None) -> None:
        """Nobody is left to pay for this."""
        if part is None:
            return
        self._counts["unclaimed_tokens"] += part.prompt_tokens
        self._counts["unclaimed_nano"] += part.cost_nano or 0
        if isinstance(part, Part | Share):
            self.unclaimed_spare(part.spare)

    def unclaimed_spare(self, spare: Spare | None) -> None:
        if spare is not None and not spare.estimated:
            self._counts["unclaimed_tokens"] += spare.prompt_tokens
            self._counts["unclaimed_nano"] += spare.cost_nano or 0

    def complete_if(self, call: Call) -> None:
        """Answers the call once each of its texts is answered for."""
        if call.left or call.done.done():
            return
        error = call.error
        if error is None and not call.parts:
            error = next(iter(call.refused.values()))  # each of the texts was refused
        if error is None:
            try:
                share = share_of(call, self.busy_share())
            except BadVectors as bad:
                error = bad
            else:
                self.finish(call, share)
                return
        # It failed, and the parts of it that did come back are paid all the same.
        for part in call.parts:
            self.unclaimed_spare(part.spare)  # `Paid` is what the caller owes, and no more
        self.finish(call, with_paid(error, call))

    def busy_share(self) -> float:
        """How much of a core this process has taken lately."""
        at_s, cpu_s, share = self._busy
        now = self._clock()
        if now - at_s >= BUSY_S:
            cpu = self._cpu()
            share = (cpu - cpu_s) / (now - at_s) if at_s else 0.0
            self._busy = (now, cpu, share)
        return share
