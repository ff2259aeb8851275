"""Errands without a task, and work that ends when its client leaves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from deployments.http.errands import ClientGone, Errand, Lookout, unless_gone

LEFT = {"type": "http.disconnect"}
MORE = {"type": "http.request", "body": b"", "more_body": False}


class Server:
    """Its `receive` gives `messages`, then waits until the client leaves."""

    def __init__(self, *messages: dict[str, Any]) -> None:
        self.leaves = asyncio.Event()
        self.waiting = 0
        self._messages = list(messages)

    async def receive(self) -> Any:
        if self._messages:
            return self._messages.pop(0)
        self.waiting += 1
        try:
            await self.leaves.wait()
        finally:
            self.waiting -= 1
        return LEFT


# --- errands ------------------------------------------------------------------------------------


async def test_an_errand_without_a_wait_is_over_at_once() -> None:
    async def work() -> int:
        return 7

    done: list[int] = []
    errand = Errand(work(), lambda: done.append(1))
    assert errand.run()
    assert (errand.result, errand.error, done) == (7, None, [])


async def test_an_errand_goes_on_with_what_it_waits_for() -> None:
    event = asyncio.Event()

    async def work() -> int:
        await event.wait()
        await asyncio.sleep(0)
        raise OSError("no")

    over = asyncio.Event()
    before = asyncio.all_tasks()
    errand = Errand(work(), over.set)
    assert not errand.run()
    assert asyncio.all_tasks() == before
    event.set()
    await over.wait()
    assert isinstance(errand.error, OSError)


async def test_a_closed_errand_goes_no_further() -> None:
    event, done = asyncio.Event(), []
    stopped = False

    async def work() -> None:
        nonlocal stopped
        try:
            await event.wait()
        finally:
            stopped = True

    errand = Errand(work(), lambda: done.append(1))
    errand.run()
    event.set()  # it is to go on, in the very moment
    errand.close()
    await asyncio.sleep(0)
    assert stopped
    assert (errand.is_over, done) == (True, [])


# --- clients ------------------------------------------------------------------------------------


async def test_work_for_who_stays_is_done() -> None:
    server = Server(MORE)

    async def work() -> str:
        await asyncio.sleep(0)
        assert server.waiting == 1
        return "done"

    assert await unless_gone(server.receive, work()) == "done"
    assert server.waiting == 0


async def test_work_for_who_leaves_is_cancelled() -> None:
    server = Server()
    cancelled = False

    async def work() -> None:
        nonlocal cancelled
        try:
            server.leaves.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled = True
            raise

    with pytest.raises(ClientGone):
        await unless_gone(server.receive, work())
    assert cancelled
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_work_for_who_has_left_does_not_begin() -> None:
    begun = False

    async def work() -> None:
        nonlocal begun
        begun = True

    with pytest.raises(ClientGone):
        await unless_gone(Server(LEFT).receive, work())
    await asyncio.sleep(0)  # nobody is cancelled later on
    assert not begun


async def test_a_result_that_comes_nevertheless_is_closed() -> None:
    server = Server()
    closed: list[str] = []

    async def work() -> str:
        try:
            server.leaves.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass
        return "late"

    async def close(result: str) -> None:
        await asyncio.sleep(0)
        closed.append(result)

    with pytest.raises(ClientGone):
        await unless_gone(server.receive, work(), close)
    assert closed == ["late"]


async def test_a_failure_of_the_work_is_its_own_though_the_client_leaves() -> None:
    server = Server()

    async def work() -> None:
        try:
            server.leaves.set()
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise ValueError("on the way out") from None

    with pytest.raises(ValueError, match="way out"):
        await unless_gone(server.receive, work())
    task = asyncio.current_task()
    assert task is not None
    assert not task.cancelling()


async def test_who_is_cancelled_by_somebody_else_hears_of_it() -> None:
    server = Server()

    async def work() -> None:
        await asyncio.Event().wait()

    working = asyncio.create_task(unless_gone(server.receive, work()))
    await asyncio.sleep(0)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working
    assert server.waiting == 0


async def test_a_server_that_fails_means_that_nobody_is_there() -> None:
    async def receive() -> Any:
        await asyncio.sleep(0)
        raise OSError("gone")

    left: list[int] = []
    lookout = Lookout(receive, lambda: left.append(1))
    assert not lookout.has_left()
    await asyncio.sleep(0)
    assert (lookout.has_left(), left) == (True, [1])
