"""An event loop on a thread of its own, so that sync and async callers share one set of desks.

Callers may be plain scripts, any number of threads, Ray tasks, or coroutines of another loop; none
of them can block this loop, so a sync call never deadlocks, not even inside a running loop.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from concurrent.futures import CancelledError, Future
from typing import Any, TypeVar

T = TypeVar("T")
CLOSED = "this gateway is closed"


class LoopThread:
    """One daemon thread with one event loop. Bounded by its callers: it queues nothing itself.

    Failure behaviour: closing it cancels what still runs; whoever waits for that gets RuntimeError.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._given: set[asyncio.Task[Any] | None] = set()
        self._closers: set[asyncio.Task[None]] = set()
        self._closing = False
        self._door = threading.Lock()  # nothing is given to a loop that is about to stop
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(_cancel(asyncio.all_tasks(self._loop)))
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    @property
    def alive(self) -> bool:
        """Whether work can still be given to it."""
        return self._thread.is_alive() and not self._closing

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start the coroutine on this loop. Cancelling the future cancels it."""
        with self._door:
            if self.alive:
                return asyncio.run_coroutine_threadsafe(self._run(work), self._loop)
        work.close()
        raise RuntimeError(CLOSED)

    async def _run(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        self._given.add(task)
        try:
            return await work
        finally:
            self._given.discard(task)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, waited for by the calling thread."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("a sync method was called from the gateway's own loop")
        future = self.submit(work)
        try:
            return future.result()
        except CancelledError:
            raise RuntimeError(CLOSED) from None  # nobody else cancels what a thread waits for
        except BaseException:
            future.cancel()
            raise

    async def hand_over(self, work: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, awaited from whatever loop the caller runs on."""
        if asyncio.get_running_loop() is self._loop:
            return await work
        future = self.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if future.cancelled() and not (task is not None and task.cancelling()):
                raise RuntimeError(CLOSED) from None  # it was ended there, not here
            raise

    async def iterate(self, items: AsyncIterator[T]) -> AsyncGenerator[T, None]:
        """An async iterator of this loop, consumed on the caller's."""
        turn = asyncio.Lock()
        try:
            while True:
                try:
                    item = await self.hand_over(_next(items, turn))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if self.alive:
                await self.hand_over(_close(items, turn))

    def iterate_sync(self, items: AsyncIterator[T]) -> Iterator[T]:
        """An async iterator of this loop, consumed by a thread."""
        turn = asyncio.Lock()
        try:
            while True:
                try:
                    item = self.run(_next(items, turn))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            if threading.current_thread() is self._thread:  # the collector chose this thread
                self._closers.add(closer := self._loop.create_task(_close(items, turn)))
                closer.add_done_callback(self._closers.discard)
            elif self.alive:
                self.run(_close(items, turn))

    async def end_work(self) -> None:
        """Cancel what was given to this loop, close what it left open, and wait for both."""
        given = self._given - {asyncio.current_task()}
        await _cancel({task for task in given if task is not None})
        await self._loop.shutdown_asyncgens()

    def close(self) -> None:
        """Stop the loop and wait for its thread."""
        with self._door:
            if not self.alive:
                return
            self._closing = True
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=5.0)


async def _cancel(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next(items: AsyncIterator[T], turn: asyncio.Lock) -> T:
    async with turn:
        return await anext(items)


async def _close(items: AsyncIterator[Any], turn: asyncio.Lock) -> None:
    """Close the iterator, once it is through with an item that was given up."""
    close = getattr(items, "aclose", None)
    if close is not None:
        async with turn:
            await close()
