"""The gateway's own loop: handed work from threads and other loops, and ended under way."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from forebay.loop import LoopThread


class Numbers:
    """An endless stream whose second item never comes, and whose end takes a few turns."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.ended = threading.Event()

    async def stream(self) -> AsyncIterator[int]:
        try:
            yield 1
            self.waiting.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(10):
                await asyncio.sleep(0)
            self.ended.set()


async def test_a_cancelled_consumer_sees_its_cancellation_and_the_stream_ends() -> None:
    loop, numbers = LoopThread("test"), Numbers()

    async def consume() -> None:
        async with aclosing(loop.iterate(numbers.stream())) as items:
            async for _ in items:
                pass

    task = asyncio.create_task(consume())
    await asyncio.to_thread(numbers.waiting.wait, 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert numbers.ended.is_set()
    loop.close()


def test_closing_ends_those_who_wait_in_other_threads() -> None:
    loop, numbers, told = LoopThread("test"), Numbers(), []

    def consume() -> None:
        try:
            list(loop.iterate_sync(numbers.stream()))
        except RuntimeError as error:
            told.append(str(error))

    thread = threading.Thread(target=consume)
    thread.start()
    assert numbers.waiting.wait(5)
    loop.close()
    thread.join(5)

    assert told == ["this gateway is closed"]
    assert numbers.ended.is_set()


async def test_what_was_left_open_is_closed_before_the_rest_goes_down() -> None:
    loop, numbers = LoopThread("test"), Numbers()
    items = numbers.stream()

    async def first() -> int:
        return await anext(items)

    assert await loop.hand_over(first()) == 1
    await loop.hand_over(loop.end_work())

    assert numbers.ended.is_set()
    loop.close()
    loop.close()


def test_a_closed_loop_takes_no_work() -> None:
    loop = LoopThread("test")
    loop.close()
    with pytest.raises(RuntimeError, match="closed"):
        loop.run(asyncio.sleep(0))
