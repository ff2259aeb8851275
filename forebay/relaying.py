"""A stream on its way: from the provider to its own client, and to those who follow it.

    alone       read when its own client asks for a chunk, and by nobody else
    followed    read by a task, as fast as the provider speaks; its own client takes from a buffer

Rule 1: a stream ends once, whoever wants it: one settlement, one landing.
Rule 2: what its own client does, or has no time for, is no news for the others.
Rule 3: nothing is told to others before that task reads. It begins at once, but not while its own
        client waits for the provider itself: should that one leave before its chunk comes, which
        ends the provider's stream, one of the others leads, and nobody has lost anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from actors.cache.desk import CacheDesk, FlightFailed, Joined, Lead, Listening
from actors.cache.policy import PIECE_OVERHEAD_BYTES, SPEECH_BYTES_MAX
from forebay import codec, replay
from forebay.call import Route
from forebay.codec import Answer
from forebay.errors import GatewayError, GatewayTimeout, Overloaded
from forebay.providers.base import Chunks
from forebay.tally import StreamTally

UNTAKEN_BYTES_MAX = 1024 * 1024
"""Most JSON of a followed stream that waits for its own client, beside what it is in Python. A
client that is further behind is cut off: the others are not to wait for it, nor is the memory."""


class Waiting(Protocol):
    """Notes since when somebody waits for the provider, by the relay's clock."""

    asked_s: float


@dataclass(frozen=True, slots=True)
class Ending:
    """How a stream came to its end.

    `status` is that of the request: "ok", "cancelled" or an HTTP status. `own`: its own client's
    doing, of which neither the provider nor anybody else is to hear.
    """

    status: str
    error: GatewayError | None = None
    own: bool = False


LEFT = Ending("cancelled", own=True)


class Relay:
    """One stream that has begun; owns the provider's chunks from then on.

    Alone, it takes a chunk from the provider when its own client asks for one, so that a client
    that is slow slows the provider. From the moment the cache desk knows of a follower, a task that
    the desk carries reads on whatever its own client does, until the end; that client is then
    handed what waits for it.

    Bounded by the tally, SPEECH_BYTES_MAX of what others may be told, UNTAKEN_BYTES_MAX for its own
    client, and the desk's CARRIED_MAX tasks: where no more fit, a stream goes on as if it were
    alone, and its end tells the others.

    Failure behaviour: `settle` is called once, when the provider's stream is closed, and `finish`
    once, when its own client is done with. A client that leaves, that is late, or that does not
    take its chunks ends the stream only where nobody follows it. At its deadline it may not be
    there to be told that its time is up; a timer settles then.
    """

    def __init__(
        self,
        chunks: Chunks,
        tally: StreamTally,
        waiting: Waiting,
        *,
        lead: Lead | None,
        cache: CacheDesk,
        clock: Callable[[], float],
        left_s: float,
        timeout_s: float,
        outlives: bool,
        slow_s: float,
        late: Callable[[str], GatewayTimeout],
        notice_slow: Callable[[], None],
        settle: Callable[[Ending], None],
        finish: Callable[[str], None],
    ) -> None:
        """`left_s` is what its own client has left of its `timeout_s`; `outlives`: the provider may
        take longer. `late` makes an error of words; `notice_slow` is called for a chunk that took
        longer than `slow_s`."""
        self._chunks = chunks
        self._tally = tally
        self._waiting = waiting
        self._lead = lead if lead is not None and lead.flight is not None else None
        self._cache = cache
        self._clock = clock
        self._left_s = left_s
        self._timeout_s = timeout_s
        self._outlives = outlives
        self._slow_s = slow_s
        self._late = late
        self._notice_slow = notice_slow
        self._settle = settle
        self._finish = finish
        self._own_ends_s: float | None = None  # by the loop's clock, where the provider has longer
        self._own_late = False
        self._followed = False
        self._asking = False  # our own client waits for the provider itself
        self._reading = False  # a task reads
        self._closing = False
        self._over: Ending | None = None
        self._closer: asyncio.Task[None] | None = None
        # Of a stream that others may come to follow: what they would have been told by now.
        self._unsaid: list[bytes] = []
        self._speech_bytes = 0
        # Of a followed stream: what its own client has not taken, and why it gets no more.
        self._untaken: deque[tuple[dict[str, Any], int]] = deque()
        self._untaken_bytes = 0
        self._heard_bytes = 0
        self._more: asyncio.Future[None] | None = None
        self._cut: GatewayError | None = None
        self._done = False

    async def own(self, first: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """Its own client's chunks. The first item is no chunk: from there on, closing or dropping
        the generator settles, even if nobody ever takes one."""
        ending = LEFT
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._left_s, self._expire)
        if self._outlives:
            self._own_ends_s = loop.time() + self._left_s
        try:
            self._hear(first)
            if self._lead is not None:
                self._cache.on_followed(self._lead, self._go_on)
            yield {}
            yield first
            while (chunk := await self._next()) is not None:
                yield chunk
            ending = Ending("ok")
        except GatewayError as error:
            ending = Ending(str(error.status), error, own=self._own_late)
            raise
        finally:
            timer.cancel()
            try:
                if not self._reading:
                    await self._end(ending)
            finally:
                self._part(ending.status)

    # ----------------------------------------------------------------------------- the provider

    async def _pull(self) -> dict[str, Any] | None:
        """The provider's next chunk, noted; None at the end."""
        clock = self._clock
        # Only while we wait: a client that is slow to take a chunk slows nobody down.
        asked_s = self._waiting.asked_s = clock()
        chunk = await anext(self._chunks, None)
        if chunk is not None:
            if clock() - asked_s > self._slow_s:
                self._notice_slow()
            self._hear(chunk)
        return chunk

    def _hear(self, chunk: dict[str, Any]) -> None:
        self._tally.add(chunk)
        if self._lead is not None:
            piece = orjson.dumps(chunk)
            self._heard_bytes = len(piece)
            self._speech_bytes += len(piece) + PIECE_OVERHEAD_BYTES
            if self._speech_bytes > SPEECH_BYTES_MAX:
                return  # the end tells the rest
            if self._reading:
                self._cache.say(self._lead, piece)
            else:
                self._unsaid.append(piece)

    def _go_on(self) -> None:
        """Somebody follows: the provider's pace is the pace from now on."""
        self._followed = True
        if not self._asking:
            self._read_on()

    def _read_on(self) -> None:
        if self._lead is None or self._reading or self._closing or self._over is not None:
            return
        self._reading = self._cache.carry(self._read())
        if self._reading:
            for piece in self._unsaid:
                self._cache.say(self._lead, piece)
            self._unsaid.clear()

    async def _read(self) -> None:
        """The task's: read to the end, for whoever wants it."""
        ending = LEFT
        try:
            while (chunk := await self._pull()) is not None:
                self._hand(chunk)
            ending = Ending("ok")
        except GatewayError as error:
            ending = Ending(str(error.status), error)
        finally:
            try:
                await self._end(ending)
            finally:
                self._wake()

    async def _end(self, ending: Ending) -> None:
        self._closing = True
        try:
            await self._chunks.aclose()
        finally:
            self._settle_as(ending)

    def _settle_as(self, ending: Ending) -> None:
        if self._over is None:
            self._over = ending
            self._settle(ending)

    # --------------------------------------------------------------------------- its own client

    async def _next(self) -> dict[str, Any] | None:
        if self._reading or self._over is not None:
            return await self._take()
        self._asking = True
        try:
            if self._own_ends_s is None:
                chunk = await self._pull()
            else:
                chunk = await self._pull_in_time(self._own_ends_s)
        finally:
            self._asking = False
        if chunk is not None and self._followed:
            self._read_on()
        return chunk

    async def _pull_in_time(self, until_s: float) -> dict[str, Any] | None:
        try:
            async with asyncio.timeout_at(until_s):
                return await self._pull()
        except TimeoutError as error:
            if isinstance(error, GatewayError):
                raise
            self._own_late = True
            raise self._late(f"did not end within {self._timeout_s:g} s") from None

    async def _take(self) -> dict[str, Any] | None:
        """What the task has read; waits for more."""
        while True:
            if self._cut is not None:
                raise self._cut
            if self._untaken:
                chunk, size = self._untaken.popleft()
                self._untaken_bytes -= size
                return chunk
            if self._over is not None:
                if self._over.error is not None:
                    raise self._over.error
                if self._over is LEFT:
                    raise Overloaded("the stream was stopped on its way", retry_after_s=1.0)
                return None
            self._more = asyncio.get_running_loop().create_future()
            try:
                await self._more
            finally:
                self._more = None

    def _hand(self, chunk: dict[str, Any]) -> None:
        if self._done:
            return
        if self._untaken and self._untaken_bytes + self._heard_bytes > UNTAKEN_BYTES_MAX:
            self._cut_off(
                self._late(f"was cut off: {self._untaken_bytes} bytes of it were not taken")
            )
            return
        self._untaken.append((chunk, self._heard_bytes))
        self._untaken_bytes += self._heard_bytes
        self._wake()

    def _cut_off(self, error: GatewayError) -> None:
        """Its own client gets no more; the others go on."""
        self._cut = error
        self._part(str(error.status))
        self._wake()

    def _part(self, status: str) -> None:
        """Its own client is done with."""
        self._untaken.clear()
        self._untaken_bytes = 0
        if not self._done:
            self._done = True
            self._finish(status)

    def _wake(self) -> None:
        if self._more is not None and not self._more.done():
            self._more.set_result(None)

    def _expire(self) -> None:
        """Its own client's time is up. Who waits for the provider itself hears of it there."""
        if self._asking or self._done:
            return
        words = "did not end" if self._more is not None else "was not taken to its end"
        error = self._late(f"{words} within {self._timeout_s:g} s")
        if self._reading:
            self._cut_off(error)
        elif not self._closing:
            self._settle_as(Ending(str(error.status), error, own=True))
            self._part(str(error.status))
            if self._outlives:  # otherwise its own clock closes it
                self._closer = asyncio.get_running_loop().create_task(self._chunks.aclose())


async def replayed(route: Route, answer: Answer) -> AsyncGenerator[dict[str, Any], None]:
    """A whole answer as a stream."""
    for chunk in replay.chunks(route, answer):
        yield chunk


async def followed(
    listening: Listening,
    pieces: list[bytes],
    route: Route,
    asked: dict[str, Any],
    left_s: Callable[[], float],
    lost: Callable[[], GatewayError],
    heard: Callable[[codec.Answer], None],
) -> AsyncGenerator[dict[str, Any], None]:
    """Somebody else's stream, from its first `pieces` on, as it comes.

    What its pieces have not told is in the whole answer at the end. `asked` is the body that asks
    for it; `heard` is told the whole answer. Raises the leader's error, and what `lost` makes of a
    leader that is not heard of.
    """
    news: list[bytes] | Joined | None = pieces
    try:
        while isinstance(news, list):
            for piece in news:
                yield orjson.loads(piece)
            news = await listening.more(left_s())
        if news is None:
            raise lost()
        whole = codec.unpack(news.value)
        heard(whole)
        told = replay.told(route, listening.taken, asked)
        for chunk in replay.chunks(route, whole, told):
            yield chunk
    except FlightFailed as failure:
        raise codec.unpack_error(failure.error) from None
    finally:
        listening.close()
