"""The Batcher's owner: one coalescing point per lane, for every process."""

from __future__ import annotations

import asyncio
import copy
import inspect
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from actors.batcher.hedge import Hedging, Kind, kind_of
from actors.batcher.policy import (
    WEIGHT_UNIT,
    BadVectors,
    Batch,
    BatcherFull,
    Caps,
    Lane,
    Paid,
    Share,
    Spare,
    Take,
    Text,
    Vectors,
    plan,
    regroup,
    split,
    split_spare,
)
from actors.ref import Clock

TEXTS_QUEUED_MAX = 100_000
"""Most texts that callers wait for, sent or not; beyond, `embed` raises BatcherFull."""
CHARS_QUEUED_MAX = 256 * 1024 * 1024
"""Most characters of those texts. A single caller's list is taken whatever its size."""
RETRY_AFTER_S = 1.0
FINISHED_MAX = 1000
FINISHED_BYTES_MAX = 8 * 1024 * 1024
"""Most vectors kept after their caller was answered, for an answer that got lost on its way."""
CLOSE_WAIT_S = 5.0
RETRY_LINGER_S = 0.02
"""How long texts that are sent again wait for those that failed with them: they come from several
processes, each of which heard of it a moment sooner or later."""
BAD_INPUT = (400, 413, 422)
"""What a provider says to a list that one text spoils."""

T = TypeVar("T")
EmbedCall = Callable[[Lane, list[Text], float], Awaitable[Vectors]]
"""One provider call: the lane, distinct texts, and the seconds it may take."""


@dataclass(slots=True, eq=False)
class _Call:
    """One caller's list, until all the batches that carry parts of it are back."""

    id: str
    texts: list[Text]
    deadline_s: float
    done: asyncio.Future[Share]
    waiters: int = 0
    parts_left: int = 0
    parts: list[_Part] = field(default_factory=list)
    debts: list[Paid] = field(default_factory=list)  # for provider calls that brought nothing
    error: Exception | None = None
    claimed: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """What one batch brought a caller."""

    take: Take
    vectors: Vectors
    prompt_tokens: int
    cost_nano: int | None
    call_id: str
    texts: int
    spare: Spare | None = None


class Batcher:
    """Owns the texts that wait to be sent, by lane, and the provider calls under way.

    What arrives in one tick of the event loop in one lane is sent together when the tick ends, in
    as few calls as the caps allow; with `coalesce` off a caller's list goes out at once and alone.
    A call of several callers that the provider calls bad input is sent again in halves, until only
    the guilty caller fails. Callers whose call failed for all of them are told the same `beat`, so
    that they come back together: with Lane.retry they wait RETRY_LINGER_S for each other and are
    one provider call again.

    With Caps.hedge a call that is late (see `hedge`) is made a second time; the first good answer
    is handed out and the other copy is stopped. What that one has cost is in Share.spare.

    Bounded by TEXTS_QUEUED_MAX and CHARS_QUEUED_MAX, beyond which it
    refuses, and by FINISHED_MAX and FINISHED_BYTES_MAX for answers kept for a repeated message.

    Failure behaviour: nothing survives a restart. Callers' desks send again what had no answer, so
    a call that was on its way is paid for twice. A caller that leaves before its texts are sent
    costs nothing; one that leaves later does not disturb the others, and its part of the price is
    counted as unclaimed, its spare only where that is no estimate. A provider call that fails and
    costs all the same (`paid` on its exception) is paid by its callers in the same parts.
    """

    PROTOCOL = 3

    def __init__(
        self,
        factory: Callable[[], EmbedCall],
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
    ) -> None:
        self._factory = factory
        self._clock = clock
        self._pause = pause
        self._rng = rng or random.Random()
        self._hedging = Hedging()
        self._provider: EmbedCall | None = None
        self._open: dict[tuple[Lane, Caps], list[_Call]] = {}
        self._calls: dict[str, _Call] = {}
        self._finished: deque[tuple[str, int]] = deque()
        self._finished_bytes = 0
        self._texts_queued = 0
        self._chars_queued = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sent = 0
        self._closed = False
        self._counts: Counter[str] = Counter()

    def protocol(self) -> int:
        return self.PROTOCOL

    async def embed(
        self,
        call_id: str,
        lane: Lane,
        texts: list[Text],
        caller: str,
        timeout_s: float,
        coalesce: bool,
        caps: Caps,
    ) -> Share:
        """The vectors of `texts`, in their order, and this caller's part of the price.

        A `call_id` that is known joins its call. `caller` is the asking process. Raises what the
        provider call raised, with `paid` set where a part of the list was answered, and with
        `beat`, a number in [0, 1), the same for all whom that failure hit; TimeoutError after
        `timeout_s` seconds; BatcherFull; BadVectors; ValueError for an empty list.
        """
        call = self._calls.get(call_id)
        if call is not None:
            return await self._wait(call)
        call = self._accept(call_id, texts, timeout_s)
        if coalesce:
            self._enqueue(call, lane, caps)
            return await self._wait(call)
        batches = plan([texts], caps)
        call.parts_left = len(batches)
        if len(batches) > 1:
            for batch in batches:
                self._spawn(self._send(lane, caps, batch, [call]))
            return await self._wait(call)
        call.waiters += 1
        try:
            await self._send(lane, caps, batches[0], [call])  # in this very tick
            call.claimed = True
            return call.done.result()
        finally:
            self._leave(call)

    def drop(self, call_id: str) -> None:
        """Nobody waits for this call any more. Safe to repeat."""
        call = self._calls.get(call_id)
        if call is not None and not call.done.done():
            self._finish(call, TimeoutError("the caller went away"))

    def stats(self) -> dict[str, Any]:
        return {
            "texts_queued": self._texts_queued,
            "calls_under_way": sum(not call.done.done() for call in self._calls.values()),
            "provider_calls": self._sent + self._counts["hedges"],
            **self._counts,
        }

    async def close(self) -> None:
        """Lets what was sent come back for CLOSE_WAIT_S, then lets go of the provider."""
        self._closed = True
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_WAIT_S)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        provider, self._provider = self._provider, None
        close = getattr(provider, "close", None)
        if close is not None:
            closing = close()
            if inspect.isawaitable(closing):
                await closing

    # --------------------------------------------------------------------------------- callers

    def _accept(self, call_id: str, texts: list[Text], timeout_s: float) -> _Call:
        if not texts:
            raise ValueError("there are no texts to embed")
        chars = sum(map(len, texts))
        over = self._texts_queued > 0 and (
            self._texts_queued + len(texts) > TEXTS_QUEUED_MAX
            or self._chars_queued + chars > CHARS_QUEUED_MAX
        )
        if over or self._closed:
            self._counts["refused"] += 1
            raise BatcherFull(RETRY_AFTER_S)
        done: asyncio.Future[Share] = asyncio.get_running_loop().create_future()
        call = _Call(call_id, texts, self._clock() + timeout_s, done)
        self._calls[call_id] = call
        self._texts_queued += len(texts)
        self._chars_queued += chars
        self._counts["callers"] += 1
        self._counts["texts"] += len(texts)
        return call

    async def _wait(self, call: _Call) -> Share:
        call.waiters += 1
        try:
            left_s = max(0.0, call.deadline_s - self._clock())
            await asyncio.wait([call.done], timeout=left_s)
            if not call.done.done():
                raise TimeoutError("the texts were not embedded within the deadline")
            call.claimed = True
            return call.done.result()
        finally:
            self._leave(call)

    def _leave(self, call: _Call) -> None:
        call.waiters -= 1
        if call.waiters or call.claimed:
            return
        if not call.done.done():
            self._finish(call, TimeoutError("the caller went away"))
            return
        # It came just as the last caller left.
        call.claimed = True
        error = call.done.exception()
        cost = call.done.result() if error is None else getattr(error, "paid", None)
        self._unclaimed(cost)

    def _finish(self, call: _Call, result: Share | Exception) -> None:
        """The call's one end. What it has been brought and cannot be handed on is unclaimed."""
        self._texts_queued -= len(call.texts)
        self._chars_queued -= sum(map(len, call.texts))
        call.texts = []
        size = 0
        if isinstance(result, Share):
            size = result.array.nbytes
            call.done.set_result(result)
        else:
            call.done.set_exception(result)
            call.done.exception()  # retrieved: it may be that nobody waits
            if getattr(result, "paid", None) is None:
                owed: list[_Part | Paid] = [*call.parts, *call.debts]
                for part in owed:
                    self._unclaimed(part)
        call.parts.clear()
        call.debts.clear()
        self._finished.append((call.id, size))
        self._finished_bytes += size
        while len(self._finished) > FINISHED_MAX or self._finished_bytes > FINISHED_BYTES_MAX:
            call_id, size = self._finished.popleft()
            self._finished_bytes -= size
            del self._calls[call_id]

    def _unclaimed(self, part: _Part | Share | Paid | Vectors | None) -> None:
        if part is None:
            return
        self._counts["unclaimed_tokens"] += part.prompt_tokens
        self._counts["unclaimed_nano"] += part.cost_nano or 0
        if isinstance(part, _Part | Share):
            self._unclaimed_spare(part.spare)

    def _unclaimed_spare(self, spare: Spare | None) -> None:
        if spare is not None and not spare.estimated:
            self._counts["unclaimed_tokens"] += spare.prompt_tokens
            self._counts["unclaimed_nano"] += spare.cost_nano or 0

    # --------------------------------------------------------------------------------- sending

    def _enqueue(self, call: _Call, lane: Lane, caps: Caps) -> None:
        waiting = self._open.get((lane, caps))
        if waiting is None:
            self._open[lane, caps] = [call]
            self._spawn(self._send_tick(lane, caps))
        else:
            waiting.append(call)

    async def _send_tick(self, lane: Lane, caps: Caps) -> None:
        """Starts when the tick that opened the lane has ended."""
        if lane.retry:
            await self._pause(RETRY_LINGER_S)
        calls = [call for call in self._open.pop((lane, caps)) if not call.done.done()]
        if not calls:
            return
        batches = plan([call.texts for call in calls], caps)
        for batch in batches:
            for take in batch.takes:
                calls[take.caller].parts_left += 1
        for batch in batches[1:]:
            self._spawn(self._send(lane, caps, batch, calls))
        await self._send(lane, caps, batches[0], calls)

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send(self, lane: Lane, caps: Caps, batch: Batch, calls: list[_Call]) -> None:
        """Makes one provider call and hands every caller in it its part, or the failure."""
        takers = [calls[take.caller] for take in batch.takes]
        self._sent += 1
        call_id = f"call-{self._sent}"
        self._counts["texts_sent"] += len(batch.texts)
        self._counts["callers_coalesced"] += len(takers) if len(takers) > 1 else 0
        try:
            vectors, spare = await self._ask_provider(lane, caps, batch, takers)
        except Exception as error:  # noqa: BLE001
            # It is the callers', whatever it is: each of them gets it, or another try without the
            # others.
            self._counts["failures"] += 1
            self._owe(batch, takers, getattr(error, "paid", None))
            if len(takers) > 1 and getattr(error, "upstream_status", None) in BAD_INPUT:
                self._send_halves(lane, caps, batch, calls)
                return
            if len(takers) > 1:
                error.beat = self._rng.random()  # type: ignore[attr-defined]
            for call in takers:
                call.error = error
                self._arrived(call)
            return
        except asyncio.CancelledError:
            for call in takers:
                if not call.done.done():
                    self._finish(call, TimeoutError("the Batcher was told to stop"))
            raise
        self._hand_out(batch, takers, vectors, spare, call_id)

    async def _ask_provider(
        self, lane: Lane, caps: Caps, batch: Batch, takers: list[_Call]
    ) -> tuple[Vectors, Spare | None]:
        """The vectors of a batch, and what a second copy has cost, if there was one."""
        begun_s = self._clock()
        ends_s = max(call.deadline_s for call in takers)
        timeout_s = max(0.0, ends_s - begun_s)
        # A provider that has just failed is not helped by two calls in place of one.
        if not caps.hedge or lane.retry:
            async with asyncio.timeout(timeout_s):
                return await self._copy(lane, batch, ends_s), None
        kind = kind_of(lane, sum(take.weight for take in batch.takes) // WEIGHT_UNIT)
        late_after_s = self._hedging.late_after_s(kind)
        spare: Spare | None = None
        async with asyncio.timeout(timeout_s):
            if late_after_s is None:
                vectors = await self._copy(lane, batch, ends_s)
            else:
                vectors, spare = await self._race(lane, kind, batch, late_after_s, ends_s)
        self._hedging.answered(kind, self._clock() - begun_s)
        return vectors, spare

    async def _copy(self, lane: Lane, batch: Batch, ends_s: float) -> Vectors:
        """One provider call, and whether its vectors are any good."""
        if self._provider is None:
            self._provider = self._factory()
        timeout_s = max(0.0, ends_s - self._clock())
        vectors = await self._provider(lane, list(batch.texts), timeout_s)
        try:
            return _checked(vectors, len(batch.texts))
        except BadVectors:
            self._unclaimed(vectors)
            raise

    async def _race(
        self, lane: Lane, kind: Kind, batch: Batch, late_after_s: float, ends_s: float
    ) -> tuple[Vectors, Spare | None]:
        """The first good answer of two copies, where the budget has a second one.

        With none the failure of the first copy is raised: the second may not even have left.
        """
        first = self._spawn(self._copy(lane, batch, ends_s))
        copies = [first]
        try:
            await asyncio.wait(copies, timeout=late_after_s)
            if first.done() or not self._hedging.take(kind):
                return await first, None
            self._counts["hedges"] += 1
            second = self._spawn(self._copy(lane, batch, ends_s))
            copies.append(second)
            await asyncio.wait(copies, return_when=asyncio.FIRST_COMPLETED)
            if not any(map(_is_good, copies)):
                await asyncio.wait(copies)
            if not _is_good(first) and not _is_good(second):
                self._unclaimed(_cost_of(second))
                return await first, None
            winner, loser = (first, second) if _is_good(first) else (second, first)
            self._counts["hedges_won"] += winner is second
            return winner.result(), _spare(winner.result(), loser)
        except asyncio.CancelledError:
            # The deadline, or a caller who leaves, may come a tick after the answer.
            for one in copies:
                self._unclaimed(_cost_of(one))
            raise
        finally:
            for one in copies:
                one.cancel()

    def _send_halves(self, lane: Lane, caps: Caps, batch: Batch, calls: list[_Call]) -> None:
        self._counts["halved"] += 1
        there = [take for take in batch.takes if not calls[take.caller].done.done()]
        middle = len(there) // 2
        for half in (there[:middle], there[middle:]):
            if half:
                part = regroup([call.texts for call in calls], half)
                self._spawn(self._send(lane, caps, part, calls))

    def _owe(self, batch: Batch, takers: list[_Call], paid: Paid | None) -> None:
        """A provider call has brought nothing, and costs: each of its callers pays a part."""
        if paid is None:
            return
        weights = [take.weight for take in batch.takes]
        tokens = split(paid.prompt_tokens, weights)
        costs = _split_cost(paid.cost_nano, weights)
        for call, part, cost in zip(takers, tokens, costs, strict=True):
            debt = Paid(part, cost, paid.model)
            if call.done.done():
                self._unclaimed(debt)
            else:
                call.debts.append(debt)

    def _hand_out(
        self,
        batch: Batch,
        takers: list[_Call],
        vectors: Vectors,
        spare: Spare | None,
        call_id: str,
    ) -> None:
        weights = [take.weight for take in batch.takes]
        tokens = split(vectors.prompt_tokens, weights)
        costs = _split_cost(vectors.cost_nano, weights)
        spares = split_spare(spare, weights)
        for call, take, part_tokens, cost, part_spare in zip(
            takers, batch.takes, tokens, costs, spares, strict=True
        ):
            part = _Part(take, vectors, part_tokens, cost, call_id, len(batch.texts), part_spare)
            if call.done.done():
                self._unclaimed(part)
                continue
            call.parts.append(part)
            self._arrived(call)

    def _arrived(self, call: _Call) -> None:
        call.parts_left -= 1
        if call.parts_left or call.done.done():
            return
        if call.error is not None:
            self._fail(call, call.error)
            return
        try:
            share = _share(call)
        except BadVectors as error:
            self._fail(call, error)
        else:
            self._finish(call, share)

    def _fail(self, call: _Call, error: Exception) -> None:
        """The call failed, and the parts of it that did come back are paid all the same."""
        for part in call.parts:
            self._unclaimed_spare(part.spare)  # `Paid` is what the caller owes, and no more
        self._finish(call, _with_paid(error, call))


def _checked(vectors: Vectors, count: int) -> Vectors:
    array = np.ascontiguousarray(vectors.array, dtype=np.float32)
    if array.ndim != 2 or array.shape[0] != count:
        raise BadVectors(f"{count} texts were answered with vectors of shape {array.shape}")
    if not np.isfinite(array).all():
        raise BadVectors("some of the provider's vectors are not finite")
    return Vectors(
        array, vectors.prompt_tokens, vectors.cost_nano, vectors.model, vectors.estimated
    )


def _is_good(call: asyncio.Task[Vectors]) -> bool:
    return call.done() and not call.cancelled() and call.exception() is None


def _cost_of(call: asyncio.Task[Vectors]) -> Vectors | Paid | None:
    """What a copy of a call has cost, as far as is known by now."""
    if not call.done() or call.cancelled():
        return None
    error = call.exception()
    return call.result() if error is None else getattr(error, "paid", None)


def _spare(won: Vectors, loser: asyncio.Task[Vectors]) -> Spare | None:
    """What the copy whose answer is not used has cost; nothing where it failed for nothing."""
    if not loser.done():
        return Spare(won.prompt_tokens, won.cost_nano, won.model, estimated=True)
    lost = _cost_of(loser)
    if lost is None:
        return None
    return Spare(lost.prompt_tokens, lost.cost_nano, lost.model, getattr(lost, "estimated", False))


def _split_cost(cost_nano: int | None, weights: Sequence[int]) -> list[int] | list[None]:
    return [None] * len(weights) if cost_nano is None else split(cost_nano, weights)


def _share(call: _Call) -> Share:
    first = call.parts[0]
    paid = _paid(call)
    return Share(
        _assembled(call),
        paid.prompt_tokens,
        paid.cost_nano,
        first.vectors.model,
        first.call_id,
        sum(part.texts for part in call.parts),
        any(part.vectors.estimated for part in call.parts),
        len(call.parts),
        _sum_of([part.spare for part in call.parts if part.spare is not None]),
    )


def _sum_of(spares: list[Spare]) -> Spare | None:
    if not spares:
        return None
    costs = [spare.cost_nano for spare in spares]
    known = [cost for cost in costs if cost is not None]
    return Spare(
        sum(spare.prompt_tokens for spare in spares),
        sum(known) if len(known) == len(costs) else None,
        spares[0].model,
        any(spare.estimated for spare in spares),
    )


def _assembled(call: _Call) -> NDArray[np.float32]:
    """The caller's rows in its own order: a copy, unless it had the whole provider call."""
    first = call.parts[0]
    array = first.vectors.array
    in_order = tuple(range(len(call.texts)))
    if len(array) == len(call.texts) and first.take.rows == in_order == first.take.positions:
        return array
    dimensions = {part.vectors.array.shape[1] for part in call.parts}
    if len(dimensions) > 1:
        raise BadVectors(f"parts of one list came back with {sorted(dimensions)} dimensions")
    whole = np.empty((len(call.texts), dimensions.pop()), dtype=np.float32)
    for part in call.parts:
        whole[list(part.take.positions)] = part.vectors.array[list(part.take.rows)]
    return whole


def _paid(call: _Call) -> Paid:
    """What a caller owes for all that was sent for it, in vain or not."""
    owed = [Paid(part.prompt_tokens, part.cost_nano, part.vectors.model) for part in call.parts]
    owed += call.debts
    costs = [one.cost_nano for one in owed]
    known = [cost for cost in costs if cost is not None]
    tokens = sum(one.prompt_tokens for one in owed)
    return Paid(tokens, sum(known) if len(known) == len(costs) else None, owed[0].model)


def _with_paid(error: Exception, call: _Call) -> Exception:
    """The error, and with it what its caller pays all the same."""
    if not (call.parts or call.debts):
        return error
    error = copy.copy(error)  # others may have got the same one
    error.paid = _paid(call)  # type: ignore[attr-defined]
    return error
