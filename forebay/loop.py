"""An event loop on a thread of its own, so that sync and async callers share one set of desks.

Callers may be plain scripts, any number of threads, Ray tasks, or coroutines of another loop; none
of them can block this loop, so a sync call never deadlocks, not even inside a running loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class LoopThread:
    """One daemon thread with one event loop. Bounded by its callers: it queues nothing itself."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.close()

    @property
    def alive(self) -> bool:
        """Whether work can still be given to it."""
        return self._thread.is_alive() and not self._loop.is_closed()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine on this loop. Cancelling the future cancels it."""
        if not self.alive:
            work.close()
            raise RuntimeError("this gateway is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, waited for by the calling thread."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a sync method was called from the gateway's own loop")
        future = self.submit(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def hand_over(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, awaited from whatever loop the caller runs on."""
        if asyncio.get_running_loop() is self._loop:
            return await work
        return await asyncio.wrap_future(self.submit(work))

    async def iterate(self, items: AsyncIterator[T]) -> AsyncIterator[T]:
        """An async iterator of this loop, consumed on the caller's."""
        try:
            while True:
                try:
                    item = await self.hand_over(_next(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            await self.hand_over(_close(items))

    def iterate_sync(self, items: AsyncIterator[T]) -> Iterator[T]:
        """An async iterator of this loop, consumed by a thread."""
        try:
            while True:
                try:
                    item = self.run(_next(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.run(_close(items))

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        if self.alive:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=5.0)


async def _next(items: AsyncIterator[T]) -> T:
    return await anext(items)


async def _close(items: AsyncIterator[Any]) -> None:
    close = getattr(items, "aclose", None)
    if close is not None:
        await close()
