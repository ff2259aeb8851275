"""HTTP/1.1 with a provider, on one connection: requests go out, one after the other, and answers
come back. httptools parses, asyncio carries; here is what holds the two together.

Rule 1: a request is written once. A connection that breaks after that is a failure, whatever came.
Rule 2: a connection is kept only if its answer came to its end, did not say that it closes, and was
        followed by nothing.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Callable
from typing import Any, cast

import httpx
from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from forebay.errors import ProviderError

READ_BYTES = 256 * 1024
"""Of an answer that nobody has taken yet; then the provider waits."""
HEAD_BYTES_MAX = 256 * 1024
PACKINGS = frozenset({b"gzip", b"x-gzip", b"deflate"})


class ConnectError(OSError):
    """There never was a connection: nothing can have been sent."""


class Disconnected(ConnectionError):
    """The connection broke before the answer was whole, or what came is no HTTP."""


class Response:
    """The answer to one request: where it is handed out, status and headers are there.

    Owns its connection until the answer is whole or closed. Bounded by READ_BYTES that nobody has
    taken, or by what `read` is given.

    Failure behaviour: gives what came before the connection broke, then raises Disconnected, or
    what the connection was failed with (TimeoutError at its deadline).
    """

    __slots__ = (
        *("_connection", "_failure", "_held_bytes", "_loop", "_pieces", "_unpacker"),
        *("_waiter", "_wanted_bytes", "begun", "fields", "status"),
    )

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.fields: list[tuple[bytes, bytes]] = []
        self.begun = False
        self._loop = connection.loop
        self._connection: Connection | None = connection  # None: the answer is whole, or closed
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._wanted_bytes = 1
        self._failure: Exception | None = None
        self._unpacker: _Unpacker | None = None
        self._waiter: asyncio.Future[None] | None = None

    # --- for who asked --------------------------------------------------------------------------

    @property
    def headers(self) -> httpx.Headers:
        return httpx.Headers(self.fields)

    def header(self, name: bytes) -> bytes:
        """The first header of this lower-case name, in lower case; b"" where there is none."""
        size = len(name)
        for given, value in self.fields:
            if len(given) == size and given.lower() == name:
                return value.strip().lower()
        return b""

    async def head(self) -> None:
        """Wait for status and headers."""
        try:
            while not self.begun:
                await self._news()
        except BaseException:
            self.close()
            raise

    async def read(self, bytes_max: int) -> bytes:
        """The whole body, unpacked.

        Raises:
            ProviderError: it has more than `bytes_max` bytes.
        """
        self._want(bytes_max + 1)
        try:
            while self._connection is not None and self._held_bytes <= bytes_max:
                await self._news()
            data = self._take()
            unpacker = self._unpacker_of()
            if unpacker is not None:
                data = unpacker.unpacked(data, bytes_max + 1)
            if len(data) > bytes_max:
                raise ProviderError(f"the answer has more than {bytes_max} bytes")
            return data
        finally:
            self.close()

    async def piece(self) -> bytes:
        """What has come of the body since it was last asked for, unpacked; b"" at its end."""
        unpacker = self._unpacker_of()
        while True:
            if unpacker is not None and unpacker.has_more:
                data = unpacker.unpacked(b"", READ_BYTES)
            elif self._pieces:
                data = self._take()
                self._want(1)
                if unpacker is not None:
                    data = unpacker.unpacked(data, READ_BYTES)
            elif self._connection is None and self._failure is None:
                return b""
            else:
                await self._news()
                continue
            if data:
                return data

    def close(self) -> None:
        """Let go of the connection: it is closed, unless the answer is whole. Who waits for more
        hears that it was."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()
            self.fail(self._failure or Disconnected("its answer was not wanted any more"))

    def leave(self) -> None:
        """Nothing more is wanted of an answer that is all but whole: its connection is kept if the
        end comes before the pool looks for who is late."""
        if self._connection is not None:
            self._connection.due_s = 0.0

    def unhurried(self) -> None:
        """From now on the pool's deadline is not for this answer."""
        if self._connection is not None:
            self._connection.due_s = math.inf

    def _news(self) -> asyncio.Future[None]:
        """Done when there is more to say; raises what it failed with."""
        if self._failure is not None:
            raise self._failure
        waiter = self._waiter = self._loop.create_future()
        return waiter

    def _want(self, size_bytes: int) -> None:
        self._wanted_bytes = size_bytes
        if self._connection is not None:
            self._connection.read_on()

    def _take(self) -> bytes:
        pieces = self._pieces
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        self._held_bytes = 0
        return data

    def _unpacker_of(self) -> _Unpacker | None:
        if self._unpacker is None:
            packing = self.header(b"content-encoding")
            if packing and packing != b"identity":
                self._unpacker = _Unpacker(packing)
        return self._unpacker

    # --- for the connection ---------------------------------------------------------------------

    def add(self, piece: bytes) -> bool:
        """Take a part of the body; whether that is enough for now."""
        self._pieces.append(piece)
        self._held_bytes += len(piece)
        if self._held_bytes >= self._wanted_bytes:
            self.wake()
            return self._held_bytes >= READ_BYTES
        return False

    def end(self) -> None:
        """The answer is whole."""
        self._connection = None
        self.wake()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self.wake()

    def wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def ends_with_its_connection(self) -> bool:
        sized = self.header(b"content-length") or self.header(b"transfer-encoding")
        return self.begun and not sized


class _Unpacker:
    """A packed body, unpacked piece by piece, and of a piece no more than is asked for.

    Raises ValueError for a packing that is not known, Disconnected for what cannot be unpacked.
    """

    def __init__(self, packing: bytes) -> None:
        if packing not in PACKINGS:
            raise ValueError(f"an answer packed as {packing[:32]!r}, for which nobody asked")
        self._packing = packing
        self._inflate: Any = None

    @property
    def has_more(self) -> bool:
        return self._inflate is not None and bool(self._inflate.unconsumed_tail)

    def unpacked(self, data: bytes, bytes_max: int) -> bytes:
        if self._inflate is None:
            # `deflate` is zlib's format (RFC 9110, 8.4.1.2); some servers send it bare.
            bare = self._packing == b"deflate" and data[:1] and data[0] & 15 != zlib.DEFLATED
            self._inflate = zlib.decompressobj(-zlib.MAX_WBITS if bare else zlib.MAX_WBITS | 32)
        try:
            unpacked: bytes = self._inflate.decompress(
                self._inflate.unconsumed_tail + data, bytes_max
            )
        except zlib.error as error:
            raise Disconnected(f"its answer cannot be unpacked: {error}") from None
        return unpacked


class Connection(asyncio.Protocol):
    """One connection, which carries one request at a time.

    Owns its transport. Bounded by the response that it reads for, and HEAD_BYTES_MAX.

    Failure behaviour: whatever goes wrong closes it and fails the response that is under way; its
    holder is told once that it is `free` again, or `gone`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        free: Callable[[Connection], None],
        gone: Callable[[Connection], None],
    ) -> None:
        self.loop = loop
        self.due_s = math.inf  # until when its answer may take, by the loop's clock
        self.idle_since_s = 0.0
        self._free = free
        self._gone = gone
        self._parser = HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._response: Response | None = None
        self._head_bytes = 0
        self._paused = False
        self._strayed = False

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, request: bytes) -> Response:
        """Write a request. Only on a connection that is open and free."""
        assert self._transport is not None
        assert self._response is None
        response = self._response = Response(self)
        self._head_bytes = 0
        self._transport.write(request)
        return response

    def read_on(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def fail(self, error: Exception) -> None:
        """Close it; `error` is raised to who waits for its answer."""
        response, self._response = self._response, None
        if response is not None:
            response.fail(error)
        self.close()

    def close(self) -> None:
        transport, self._transport = self._transport, None
        self._response = None
        if transport is not None:
            transport.abort()
            self._gone(self)

    # --- asyncio's calls ------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._transport is None:
            return
        try:
            self._parser.feed_data(data)
        except HttpParserUpgrade:
            self.fail(Disconnected("it wants to speak another protocol"))
        except HttpParserError as error:
            self.fail(Disconnected(f"what it said is no HTTP: {error}"))
        if self._strayed:
            self.close()
        elif self._response is not None and not self._response.begun:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.fail(Disconnected(f"its headers have more than {HEAD_BYTES_MAX} bytes"))

    def connection_lost(self, error: Exception | None) -> None:
        response = self._response
        if error is None and response is not None and response.ends_with_its_connection():
            self._response = None
            response.end()
        self.fail(Disconnected(f"it closed the connection{f': {error}' if error else ''}"))

    # --- httptools's calls ----------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._response is None:
            self._strayed = True  # it says what nobody asked for

    def on_header(self, name: bytes, value: bytes) -> None:
        response = self._response
        if response is not None and not response.begun:  # what follows a body is for nobody
            response.fields.append((name, value))

    def on_headers_complete(self) -> None:
        response = self._response
        if response is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            response.fields.clear()  # it lets us know that it works
            return
        response.status = status
        response.begun = True
        response.wake()

    def on_body(self, piece: bytes) -> None:
        response = self._response
        if response is not None and response.add(piece) and not self._paused:
            self._paused = True
            if self._transport is not None:
                self._transport.pause_reading()

    def on_message_complete(self) -> None:
        response = self._response
        if response is None or not response.begun:
            return
        self._response = None
        response.end()
        if self._parser.should_keep_alive() and self.is_open:
            self.read_on()
            self._free(self)
        else:
            self.close()
