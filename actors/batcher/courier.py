"""Several callers' lists in one message to the Batcher, and its answers as they come.

A message to an actor costs 0.4 ms of a core on either side: as much as all the rest that a request
with one text needs of this process.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.ref import Clock, OwnerRef, OwnerUnavailable

BUSY = 8
"""Lists under way from which on a list waits for company: LINGER_S at most."""
LINGER_S = 0.005
LISTS_MAX = 256
"""Most lists of one message."""
TEXTS_MAX = 16
"""Most texts of a list that is put beside others: what is longer is worth a message, and comes back
in memory that nobody else's vectors keep."""
HELD_S = 10.0
"""How long the owner keeps a list under way whose answer nobody has come back for."""

Message = tuple[Any, ...]
"""The arguments of the owner's `embed`: the call's id, the lane, the texts, and others."""


@dataclass(slots=True, eq=False)
class _List:
    message: Message
    until_s: float
    answer: asyncio.Future[Any]


class Courier:
    """A line to the Batcher that carries several `embed` as one `embed_many`; all else as it is.

    Owns the lists of this process that wait for company or for their answers. Bounded by its
    callers. While fewer than BUSY are under way, a list travels alone and at once.

    Failure behaviour: the line's own. A message that fails fails all lists in it, each of which its
    desk sends again under its old id.
    """

    def __init__(
        self,
        ref: OwnerRef,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.name = ref.name
        self.sent = ref.sent
        self._ref = ref
        self._clock = clock
        self._pause = pause
        self._under_way = 0
        self._waiting: list[_List] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        if method != "embed":
            return await self._ref.ask(method, *args, timeout_s=timeout_s)
        self._under_way += 1
        try:
            if len(args[2]) > TEXTS_MAX or (self._under_way <= BUSY and not self._waiting):
                return await self._ref.ask(method, *args, timeout_s=timeout_s)
            return await self._in_company(args, timeout_s)
        finally:
            self._under_way -= 1

    async def _in_company(self, message: Message, timeout_s: float) -> Any:
        answer = asyncio.get_running_loop().create_future()
        one = _List(message, self._clock() + timeout_s, answer)
        self._waiting.append(one)
        if len(self._waiting) == 1:
            self._spawn(self._collect())
        elif len(self._waiting) >= LISTS_MAX:
            self._post()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError:
            if answer.done() and not answer.cancelled():
                raise  # it is the owner's word
            raise OwnerUnavailable(self.name, "no answer in time") from None

    async def _collect(self) -> None:
        await self._pause(LINGER_S)
        self._post()

    def _post(self) -> None:
        lists, self._waiting = self._waiting, []
        if lists:
            self._spawn(self._carry(lists))

    async def _carry(self, lists: list[_List]) -> None:
        """One message, and others for those lists that its answer has left out."""
        while lists := [one for one in lists if not one.answer.done()]:
            left_s = max(one.until_s for one in lists) - self._clock()
            messages = [one.message for one in lists]
            try:
                came = await self._ref.ask("embed_many", messages, timeout_s=left_s)
            except Exception as error:  # noqa: BLE001 - it is the callers', whatever it is
                for one in lists:
                    if not one.answer.done():
                        one.answer.set_exception(error)
                return
            for place, outcome in came:
                answer = lists[place].answer
                if answer.done():
                    continue
                if isinstance(outcome, BaseException):
                    answer.set_exception(outcome)
                else:
                    # A view would keep all vectors of the message for as long as one is in use.
                    answer.set_result(replace(outcome, array=outcome.array.copy()))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class Many:
    """The owner's end: `embed` for several lists at once, answered as soon as some are done.

    Owns the lists whose answer the sender has yet to come back for. Bounded by those under way.

    Failure behaviour: a list that nobody comes back for in HELD_S is left, as its caller's leaving
    would leave it. A message that comes twice joins the calls it has begun.
    """

    def __init__(self, embed: Callable[..., Awaitable[Any]]) -> None:
        self._embed = embed
        self._held: dict[str, asyncio.Task[Any]] = {}

    async def __call__(self, messages: Sequence[Message]) -> list[tuple[int, Any]]:
        """(place in `messages`, share or exception) of those that are done; at least one is."""
        tasks = [self._take(message) for message in messages]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # the others of the same provider call are done in this tick
        finally:
            for message, task in zip(messages, tasks, strict=True):
                if not task.done():
                    self._hold(message[0], task)
        return [(place, _outcome(task)) for place, task in enumerate(tasks) if task.done()]

    def _take(self, message: Message) -> asyncio.Task[Any]:
        held = self._held.pop(str(message[0]), None)
        return asyncio.ensure_future(self._embed(*message)) if held is None else held

    def _hold(self, call_id: str, task: asyncio.Task[Any]) -> None:
        self._held[call_id] = task
        asyncio.get_running_loop().call_later(HELD_S, self._let_go, call_id, task)

    def _let_go(self, call_id: str, task: asyncio.Task[Any]) -> None:
        if self._held.get(call_id) is task:
            del self._held[call_id]
            task.cancel()


def _outcome(task: asyncio.Task[Any]) -> Any:
    if task.cancelled():
        return TimeoutError("the Batcher was told to stop")
    return task.exception() or task.result()
