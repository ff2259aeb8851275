"""Server-sent events: chunks to frames, and frames to the client at a human pace.

Rule 1: the first chunk goes out at once; what follows within LINGER_S of a write goes out together.
Rule 2: a client that hangs up stops the provider: the chunks are closed at once.
Rule 3: after the first byte a failure is an event, and `[DONE]` (`done`) still ends the stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import orjson

from deployments.http.errands import ClientGone, Errand
from deployments.http.exchange import Exchange, Header, internal_error, log_failure
from forebay.errors import GatewayError

LINGER_S = 0.010
PENDING_BYTES_MAX = 256 * 1024
"""Frames held for a client that reads slowly; beyond it the provider is not read on."""

DONE = b"data: [DONE]\n\n"
HEADERS: tuple[Header, ...] = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)

Encode = Callable[[dict[str, Any]], bytes]
"""From a chunk to its frame; b"" drops it."""
Fail = Callable[[GatewayError], bytes]
"""From a failure to its frame."""


def frame(value: Any) -> bytes:
    """One event. JSON has no raw line breaks, so it is always one line."""
    return b"data: " + orjson.dumps(value) + b"\n\n"


def error_frame(error: GatewayError) -> bytes:
    """A failure as an event that OpenAI's clients raise from."""
    return frame({"error": error.body()})


async def close(chunks: AsyncIterator[Any]) -> None:
    """Stop whatever produces `chunks`."""
    aclose = getattr(chunks, "aclose", None)
    if aclose is not None:
        await aclose()


async def send_stream(
    exchange: Exchange,
    headers: list[Header],
    chunks: AsyncIterator[dict[str, Any]],
    encode: Encode,
    *,
    fail: Fail = error_frame,
    done: bytes = DONE,
    linger_s: float = LINGER_S,
) -> None:
    """Send `chunks` as events until they end, fail, or the client is gone. Always closes them.

    `done` is the last frame, after a failure too; b"" where a stream has none.
    """
    writer = _Writer(exchange, linger_s)

    async def tell() -> None:
        await exchange.start(200, [*HEADERS, *headers])
        try:
            async for chunk in chunks:
                writer.add(encode(chunk))
                if writer.is_full:
                    await writer.room()
        except GatewayError as error:
            writer.add(fail(error))
        except ClientGone:
            raise
        except Exception as error:  # noqa: BLE001 - logged, and told to the client as an event
            log_failure(exchange, error)
            writer.add(fail(internal_error(exchange)))
        await close(chunks)
        await writer.end(done)

    try:
        await exchange.unless_gone(tell())
    except (ClientGone, OSError):
        pass  # What remains is to close the chunks.
    finally:
        writer.close()
        await close(chunks)


class _Writer:
    """Frames on their way to the client: written as soon as nothing more comes at once, and no
    sooner than `linger_s` after the write before.

    Owns a timer, and the write that is under way. Bounded by PENDING_BYTES_MAX, if who adds waits
    for room where it is full.

    Failure behaviour: a write that fails means that the client is gone: the next who comes is told.
    """

    def __init__(self, exchange: Exchange, linger_s: float) -> None:
        self._write = exchange.write
        self._linger_s = linger_s
        self._loop = asyncio.get_running_loop()
        self._frames: list[bytes] = []
        self._size = 0
        self._next_s = 0.0
        self._timer: asyncio.Handle | None = None
        self._errand: Errand[None] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._broken = False

    @property
    def is_full(self) -> bool:
        return self._size > PENDING_BYTES_MAX

    def add(self, data: bytes) -> None:
        """Have a frame written.

        Raises:
            ClientGone: one could not be.
        """
        if self._broken:
            raise ClientGone
        if not data:
            return
        self._frames.append(data)
        self._size += len(data)
        if self._timer is None and self._errand is None:
            self._set_timer()

    async def room(self) -> None:
        """Wait until what is held has been written."""
        if self._errand is None:
            self._flush()
        while self._errand is not None:
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    async def end(self, done: bytes) -> None:
        """Write what is left, and `done`."""
        while self._errand is not None:
            await self.room()
        self.close()
        if self._broken:
            raise ClientGone
        await self._write(self._taken() + done, more=False)

    def close(self) -> None:
        """Write nothing more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._errand is not None:
            self._errand.close()
            self._errand = None

    def _set_timer(self) -> None:
        if self._loop.time() >= self._next_s:
            self._timer = self._loop.call_soon(self._flush)
        else:
            self._timer = self._loop.call_at(self._next_s, self._flush)

    def _flush(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._next_s = self._loop.time() + self._linger_s
        self._errand = Errand(self._write(self._taken(), more=True), self._written)
        if self._errand.run():
            self._written()

    def _written(self) -> None:
        errand, self._errand = self._errand, None
        self._broken = errand is not None and errand.error is not None
        if self._frames:
            self._set_timer()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _taken(self) -> bytes:
        frames = self._frames
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        frames.clear()
        self._size = 0
        return data
