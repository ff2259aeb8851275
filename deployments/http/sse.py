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
    pump = _Pump(exchange, chunks, encode, fail)
    reading = asyncio.create_task(pump.run())
    leaving = asyncio.create_task(exchange.gone())
    leaving.add_done_callback(pump.abandon)
    try:
        await exchange.start(200, [*HEADERS, *headers])
        while await pump.ready():
            await exchange.write(pump.take(), more=True)
            await pump.linger(linger_s)
        if not pump.abandoned:
            await exchange.write(pump.take() + done, more=False)
    except OSError:
        pass  # The client hung up while we wrote; what remains is to close the chunks.
    finally:
        leaving.cancel()
        reading.cancel()
        await asyncio.gather(reading, leaving, return_exceptions=True)


class _Pump:
    """Reads chunks into frames, ahead of the writer by at most PENDING_BYTES_MAX.

    Reading has a task of its own, because a chunk that is awaited cannot be put back when it is
    time to write.
    """

    def __init__(
        self,
        exchange: Exchange,
        chunks: AsyncIterator[dict[str, Any]],
        encode: Encode,
        fail: Fail,
    ) -> None:
        self._exchange = exchange
        self._chunks = chunks
        self._encode = encode
        self._fail = fail
        self._frames = bytearray()
        self._changed = asyncio.Event()
        self._over = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()
        self.abandoned = False

    async def run(self) -> None:
        """Read to the end. An error becomes the last frame."""
        try:
            async for chunk in self._chunks:
                self._add(self._encode(chunk))
                await self._room.wait()
        except GatewayError as error:
            self._add(self._fail(error))
        except Exception as error:  # noqa: BLE001 - logged, and told to the client as an event
            log_failure(self._exchange, error)
            self._add(self._fail(internal_error(self._exchange)))
        finally:
            try:
                await close(self._chunks)
            finally:
                self._end()

    def abandon(self, leaving: asyncio.Task[None]) -> None:
        """The client is gone."""
        if not leaving.cancelled():
            self.abandoned = True
            self._end()

    async def ready(self) -> bool:
        """Wait for frames; False when none are to be written any more but the last."""
        await self._changed.wait()
        return not self._over.is_set()

    def take(self) -> bytes:
        frames = bytes(self._frames)
        self._frames.clear()
        self._changed.clear()
        self._room.set()
        return frames

    async def linger(self, seconds: float) -> None:
        """Let frames gather, unless the stream is over."""
        try:
            async with asyncio.timeout(seconds):
                await self._over.wait()
        except TimeoutError:
            pass

    def _add(self, data: bytes) -> None:
        self._frames += data
        if self._frames:
            self._changed.set()
        if len(self._frames) > PENDING_BYTES_MAX:
            self._room.clear()

    def _end(self) -> None:
        self._over.set()
        self._changed.set()
