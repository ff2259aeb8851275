"""A stream's clock: its deadline, and how long a provider may keep silent. Time is virtual."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import AsyncIterator, Callable, Coroutine
from contextvars import Context
from typing import Any, TypeVarTuple

import pytest

from forebay.errors import GatewayError, GatewayTimeout, ProviderError
from forebay.providers.base import STALLED
from forebay.providers.streams import LiteLLMChunks, Opened

_Args = TypeVarTuple("_Args")
CHUNK: dict[str, Any] = {"choices": []}


class Skipping(selectors.SelectSelector):
    """Where a loop would wait for a time, the time has come."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1_000.0

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits for ever"
        self.now_s += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop that never waits, and counts the timers that are set."""

    def __init__(self) -> None:
        self.clock = Skipping()
        self.timers = 0
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s

    def call_at(
        self,
        when: float,
        callback: Callable[[*_Args], object],
        *args: *_Args,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        self.timers += 1
        return super().call_at(when, callback, *args, context=context)


def run(play: Callable[[VirtualLoop], Coroutine[Any, Any, None]]) -> None:
    loop = VirtualLoop()
    try:
        loop.run_until_complete(play(loop))
    finally:
        loop.close()


class Upstream:
    """Gives a chunk after each of `gaps_s`, then ends; after an infinite gap, never."""

    def __init__(
        self,
        *gaps_s: float,
        opening_s: float = 0.0,
        patience_s: float = 1e9,
        closing_s: float = 0.0,
    ) -> None:
        self.closed = 0
        self._gaps_s = gaps_s
        self._opening_s = opening_s
        self._patience_s = patience_s
        self._closing_s = closing_s

    async def begin(self) -> Opened:
        await asyncio.sleep(self._opening_s)
        return Opened(self._chunks(), None, self._error, stall_s=self._patience_s)

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        try:
            for gap_s in self._gaps_s:
                await asyncio.sleep(gap_s)
                yield CHUNK
        finally:
            if self._closing_s:
                await asyncio.sleep(self._closing_s)
            self.closed += 1

    def _error(self, error: BaseException) -> GatewayError:
        return ProviderError(str(error))

    def chunks(self, timeout_s: float = 600.0, stall_s: float = 30.0) -> LiteLLMChunks:
        return LiteLLMChunks(self.begin, timeout_s, stall_s, "acme", "m")


NEVER = 1e6


async def silence(loop: VirtualLoop, chunks: LiteLLMChunks) -> tuple[str | None, float]:
    """The code of the timeout that the next chunk ends with, and how long it took."""
    began_s = loop.time()
    with pytest.raises(GatewayTimeout) as caught:
        await anext(chunks)
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0, "the timeout was not told as a cancellation of the task"
    assert (caught.value.provider, caught.value.model) == ("acme", "m")
    with pytest.raises(StopAsyncIteration):
        await anext(chunks)
    return caught.value.code, round(loop.time() - began_s, 6)


def test_silence_in_the_middle_ends_a_stream() -> None:
    async def play(loop: VirtualLoop) -> None:
        upstream = Upstream(1.0, NEVER)
        chunks = upstream.chunks(stall_s=30.0)
        assert await anext(chunks) == CHUNK
        assert await silence(loop, chunks) == (STALLED, 30.0)
        assert upstream.closed == 1

    run(play)


def test_a_model_may_think_before_its_first_chunk_and_not_after_it() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(500.0, NEVER).chunks(timeout_s=600.0, stall_s=30.0)
        assert await anext(chunks) == CHUNK
        assert await silence(loop, chunks) == (STALLED, 30.0)

    run(play)


def test_a_deployments_own_patience_covers_opening_and_the_first_chunk() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(NEVER, opening_s=20.0, patience_s=25.0).chunks(stall_s=30.0)
        assert await silence(loop, chunks) == (STALLED, 25.0)

    run(play)


def test_pauses_within_the_bound_are_no_stall() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(*[9.9] * 50).chunks(stall_s=10.0)
        assert [one async for one in chunks] == [CHUNK] * 50

    run(play)


def test_a_client_that_is_slow_to_take_its_chunks_is_no_stall() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(1.0, 1.0, NEVER).chunks(stall_s=10.0)
        for _ in range(2):
            await anext(chunks)
            await asyncio.sleep(77.0)
        assert await silence(loop, chunks) == (STALLED, 10.0)

    run(play)


def test_the_deadline_ends_a_stream_that_never_stalls() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(*[9.0] * 50).chunks(timeout_s=60.0, stall_s=10.0)
        for _ in range(6):
            await anext(chunks)
        assert await silence(loop, chunks) == ("timeout", 6.0)

    run(play)


def test_a_deadline_that_passes_between_chunks_is_told_to_the_next_who_comes() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(1.0, 1.0).chunks(timeout_s=60.0)
        await anext(chunks)
        await asyncio.sleep(100.0)
        assert await silence(loop, chunks) == ("timeout", 0.0)

    run(play)


def test_a_deadline_closes_the_upstream_though_nobody_waits() -> None:
    async def play(loop: VirtualLoop) -> None:
        upstream = Upstream(1.0, 1.0)
        chunks = upstream.chunks(timeout_s=60.0)
        await anext(chunks)
        await asyncio.sleep(58.0)
        assert upstream.closed == 0
        await asyncio.sleep(2.0)
        assert upstream.closed == 1
        await chunks.aclose()
        assert upstream.closed == 1
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)

    run(play)


def test_who_closes_a_stream_that_is_being_closed_waits_for_that() -> None:
    async def play(loop: VirtualLoop) -> None:
        upstream = Upstream(1.0, 1.0, closing_s=0.3)
        chunks = upstream.chunks(timeout_s=60.0)
        await anext(chunks)
        await asyncio.sleep(59.1)
        assert upstream.closed == 0
        await chunks.aclose()
        assert upstream.closed == 1

    run(play)


def test_a_deployment_may_have_less_patience() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(1.0, NEVER, patience_s=5.0).chunks(stall_s=30.0)
        await anext(chunks)
        assert await silence(loop, chunks) == (STALLED, 5.0)

    run(play)


def test_chunks_do_not_cost_a_timer_each() -> None:
    async def play(loop: VirtualLoop) -> None:
        chunks = Upstream(*[0.0] * 5_000).chunks(stall_s=30.0)
        assert len([one async for one in chunks]) == 5_000
        assert loop.timers <= 4, "one for the stream, set anew twice, and one for its closing"

    run(play)


def test_a_stream_that_is_over_leaves_no_timer() -> None:
    async def play(loop: VirtualLoop) -> None:
        for upstream in (Upstream(1.0), Upstream(1.0, 1.0)):
            chunks = upstream.chunks()
            await anext(chunks)
            await chunks.aclose()
        began_s = loop.time()
        await asyncio.sleep(10_000.0)
        assert loop.time() - began_s == 10_000.0

    run(play)


def test_who_cancels_the_waiting_hears_of_a_cancellation_not_of_a_timeout() -> None:
    async def play(loop: VirtualLoop) -> None:
        upstream = Upstream(1.0, NEVER)
        chunks = upstream.chunks(stall_s=30.0)
        await anext(chunks)
        with pytest.raises(TimeoutError) as caught:
            async with asyncio.timeout(5.0):
                await anext(chunks)
        assert not isinstance(caught.value, GatewayTimeout)
        assert upstream.closed == 1

    run(play)
