"""Small awaitables that are run without a task, and clients that hang up.

Rule 1: whoever works for a client is cancelled as soon as it has gone, and nobody else is.
Rule 2: looking out for it costs no task: nearly all clients stay.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import Any, Generic, TypeVar

from starlette.types import Message, Receive

from deployments.http.peer import Peer, peer_behind

T = TypeVar("T")


class ClientGone(Exception):
    """The client hung up; there is nobody to answer."""


class Errand(Generic[T]):
    """An awaitable that is stepped by hand, by the futures that it waits for: a task for it would
    cost ten times as much. It may wait for futures only, and not ask which task it is in.

    Owns the awaitable. Failure behaviour: `error` is what it raised; `close` ends it where it is.
    """

    __slots__ = ("_done", "_steps", "error", "result")

    def __init__(self, work: Awaitable[T], done: Callable[[], object]) -> None:
        self.result: T | None = None
        self.error: Exception | None = None
        self._steps: Generator[Any, None, T] | None = work.__await__()
        self._done = done

    @property
    def is_over(self) -> bool:
        return self._steps is None

    def run(self) -> bool:
        """Begin. Whether it is over already; if not, `done` is called when it is."""
        return self._steps is None or self._step(self._steps)

    def close(self) -> None:
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()

    def _step(self, steps: Generator[Any, None, T]) -> bool:
        """Go on to the next wait; whether there was none."""
        try:
            waits_for = steps.send(None)
        except StopIteration as ended:
            self._steps = None
            self.result = ended.value
        except Exception as error:  # noqa: BLE001 - it is for who sent it
            self._steps = None
            self.error = error
        else:
            if waits_for is None:  # it only lets others go first
                asyncio.get_running_loop().call_soon(self._go_on)
            else:
                waits_for._asyncio_future_blocking = False  # as a task would say
                waits_for.add_done_callback(self._go_on)
            return False
        return True

    def _go_on(self, _: object = None) -> None:
        if self._steps is not None and self._step(self._steps):
            self._done()


class Lookout:
    """Waits for a client to hang up: `leave` is called, once, if it does so later than now.

    Owns the server's `receive`, the body having been read. Failure behaviour: a `receive` that
    fails means that nobody can be answered, which is the same.
    """

    __slots__ = ("_errand", "_gone", "_leave", "_receive")

    def __init__(self, receive: Receive, leave: Callable[[], object]) -> None:
        self._gone = False
        self._receive = receive
        self._leave = leave
        self._errand: Errand[Message] = Errand(receive(), self._heard)
        if self._errand.run():
            self._read()

    def has_left(self) -> bool:
        return self._gone

    def close(self) -> None:
        """Look no longer."""
        self._errand.close()

    def _read(self) -> None:
        while (message := self._errand.result) and message["type"] != "http.disconnect":
            self._errand = Errand(self._receive(), self._heard)
            if not self._errand.run():
                return
        self._gone = True

    def _heard(self) -> None:
        self._read()
        if self._gone:
            self._leave()


class Watch:
    """A `Lookout` where the server says by itself that its client hangs up.

    Owns what `peer` is told to do then. Failure behaviour: none of its own.
    """

    __slots__ = ("_peer",)

    def __init__(self, peer: Peer, leave: Callable[[], object]) -> None:
        self._peer = peer
        peer.watch(leave)

    def has_left(self) -> bool:
        return self._peer.has_left()

    def close(self) -> None:
        """Look no longer."""
        self._peer.unwatch()


async def unless_gone(
    receive: Receive,
    work: Coroutine[Any, Any, T],
    close: Callable[[T], Awaitable[None]] | None = None,
) -> T:
    """The result of `work`, which is cancelled when the client hangs up; then raises ClientGone. A
    result that comes nevertheless is closed."""
    task = asyncio.current_task()
    assert task is not None
    cancelling = task.cancelling()
    peer = peer_behind(receive)
    lookout = Lookout(receive, task.cancel) if peer is None else Watch(peer, task.cancel)
    if lookout.has_left():
        work.close()
        raise ClientGone
    try:
        result = await work
    except BaseException as error:
        left = lookout.has_left() and task.uncancel() <= cancelling
        if left and isinstance(error, asyncio.CancelledError):
            raise ClientGone from None
        raise
    finally:
        lookout.close()
    if lookout.has_left():
        task.uncancel()
        if close is not None:
            await close(result)
        raise ClientGone
    return result
