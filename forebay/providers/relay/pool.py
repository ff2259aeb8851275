"""Connections to providers, kept for the next request.

Rule 1: nothing is asked twice: a connection is taken only if it is open, and written to once.
Rule 2: one timer for all: the pool wakes at the earliest deadline, not once for each request.
"""

from __future__ import annotations

import asyncio
import math
import socket
import ssl
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from forebay.providers.relay.connection import ConnectError, Connection, Response

CONNECTIONS_MAX = 4_096
KEEPALIVE_S = 60.0
DNS_S = 300.0
ORIGINS_MAX = 1_000
"""Names whose addresses are remembered; above it all of them are forgotten."""
EYEBALLS_S = 0.25
"""Then the next address is tried beside the one before (RFC 8305)."""


class Origin(NamedTuple):
    """Where connections go. `tls` is None for plain text."""

    host: str
    port: int
    tls: ssl.SSLContext | None


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """Where requests of one kind go, and their first bytes, up to the length of the body. They may
    hold a credential."""

    origin: Origin
    head: bytes

    @classmethod
    def of(cls, origin: Origin, path: bytes, headers: Mapping[bytes, bytes]) -> Target:
        """
        Raises:
            ValueError: a header would end before its value does.
        """
        lines = [b"POST " + path + b" HTTP/1.1"]
        for name, value in headers.items():
            if any(end in part for end in (b"\r", b"\n", b"\0") for part in (name, value)):
                raise ValueError("a header may not have line breaks")
            lines.append(name + b": " + value)
        return cls(origin, b"\r\n".join(lines) + b"\r\ncontent-length: ")

    def __repr__(self) -> str:
        return f"Target({self.origin.host}:{self.origin.port})"


class Pool:
    """The connections of the event loop that it is made on.

    Owns them, and one timer. Bounded by `connections_max`, then requests wait, those that came
    first before the others, within their deadlines; one that is idle makes room for another origin.

    Failure behaviour: a connection that cannot be had raises ConnectError; one that breaks, what
    its response says; a deadline TimeoutError, and the connection is closed.
    """

    def __init__(
        self, connections_max: int = CONNECTIONS_MAX, keepalive_s: float = KEEPALIVE_S
    ) -> None:
        # Asked for once: in Python 3.11 it is a system call.
        self._loop = asyncio.get_running_loop()
        self._connections_max = connections_max
        self._keepalive_s = keepalive_s
        self._idle: dict[Origin, deque[Connection]] = {}
        self._origin_of: dict[Connection, Origin] = {}
        self._busy: set[Connection] = set()
        self._opening = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._addresses: dict[tuple[str, int], tuple[float, list[Any]]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_s = math.inf
        self._closed = False

    @property
    def busy(self) -> int:
        """Connections that carry a request."""
        return len(self._busy)

    @property
    def idle(self) -> int:
        """Connections that wait for one."""
        return sum(map(len, self._idle.values()))

    async def post(self, target: Target, data: bytes, limit_s: float) -> Response:
        """Send a request, and wait for the head of its answer, the body of which has as long too.

        Raises:
            ConnectError: there is no connection to be had.
            Disconnected: it broke.
            TimeoutError: it took longer than `limit_s`.
        """
        response = self.send(target, data, limit_s)
        if response is None:
            response = await self.open_and_send(target, data, limit_s)
        await response.head()
        return response

    def send(self, target: Target, data: bytes, limit_s: float) -> Response | None:
        """Send a request over a connection that is idle, for an answer that has so long to be
        whole; None: there is none."""
        idle = self._idle.get(target.origin)
        connection = idle.pop() if idle and not self._waiting else None
        if connection is None or not connection.is_open:
            return None
        return self._send(connection, target, data, self._loop.time() + limit_s)

    async def open_and_send(self, target: Target, data: bytes, limit_s: float) -> Response:
        """As `send`, over a connection that is to be had first.

        Raises:
            ConnectError, TimeoutError: see `post`.
        """
        due_s = self._loop.time() + limit_s
        async with asyncio.timeout_at(due_s):
            connection = await self._opened(target.origin)
        return self._send(connection, target, data, due_s)

    def close(self) -> None:
        """Close all of them."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        for connection in list(self._origin_of):
            connection.close()

    def _send(self, connection: Connection, target: Target, data: bytes, due_s: float) -> Response:
        connection.due_s = due_s
        self._busy.add(connection)
        if due_s < self._wakes_s:
            self._wake_at(due_s)
        # One piece: of several, uvloop makes more work than a copy is.
        return connection.send(b"%b%d\r\n\r\n%b" % (target.head, len(data), data))

    # --- connections come and go ----------------------------------------------------------------

    async def _opened(self, origin: Origin) -> Connection:
        if self._waiting:  # those who came first go first
            await self._room()
        while len(self._origin_of) + self._opening >= self._connections_max:
            idle = self._idle.get(origin)
            if idle:  # somebody has given one back meanwhile
                connection = idle.pop()
                if connection.is_open:
                    return connection
                continue
            if not self._close_an_idle_one():
                await self._room()
        self._opening += 1
        try:
            try:
                sock = await self._dial(origin)
                _, connection = await self._loop.create_connection(
                    lambda: Connection(self._loop, self._free, self._gone),
                    sock=sock,
                    ssl=origin.tls,
                    server_hostname=origin.host if origin.tls else None,
                )
            except OSError as error:
                self._addresses.pop(origin[:2], None)
                raise ConnectError(f"{origin.host}:{origin.port}: {error}") from error
        except BaseException:
            self._tell_next()
            raise
        finally:
            self._opening -= 1
        if not connection.is_open:
            self._tell_next()
            raise ConnectError(f"{origin.host}:{origin.port}: closed as soon as it was open")
        self._origin_of[connection] = origin
        return connection

    async def _dial(self, origin: Origin) -> socket.socket:
        from aiohappyeyeballs import start_connection

        loop = self._loop
        place = origin[:2]
        until_s, addresses = self._addresses.get(place, (0.0, []))
        if loop.time() >= until_s:
            addresses = await loop.getaddrinfo(*place, type=socket.SOCK_STREAM)
            if len(self._addresses) >= ORIGINS_MAX:
                self._addresses.clear()
            self._addresses[place] = loop.time() + DNS_S, addresses
        sock = await start_connection(
            addresses, happy_eyeballs_delay=EYEBALLS_S, interleave=1, loop=loop
        )
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock

    async def _room(self) -> None:
        """Wait until a connection is free or gone."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._tell_next()
            raise

    def _tell_next(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    def _close_an_idle_one(self) -> bool:
        for idle in self._idle.values():
            if idle:
                idle.popleft().close()
                return True
        return False

    def _free(self, connection: Connection) -> None:
        self._busy.discard(connection)
        if self._closed:
            connection.close()
            return
        origin = self._origin_of[connection]
        idle = self._idle.get(origin)
        if idle is None:
            idle = self._idle[origin] = deque()
        idle.append(connection)
        connection.idle_since_s = now_s = self._loop.time()
        if now_s + self._keepalive_s < self._wakes_s:
            self._wake_at(now_s + self._keepalive_s)
        if self._waiting:
            self._tell_next()

    def _gone(self, connection: Connection) -> None:
        self._busy.discard(connection)
        origin = self._origin_of.pop(connection, None)
        idle = None if origin is None else self._idle.get(origin)
        if idle is not None and connection in idle:
            idle.remove(connection)
        self._tell_next()

    # --- time -------------------------------------------------------------------------------------

    def _wake_at(self, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_s = when_s
        self._timer = self._loop.call_at(when_s, self._look)

    def _look(self) -> None:
        """Fail what is late, close what was idle for long, and come again when there is more."""
        now_s = self._loop.time() + 0.001  # uvloop's clock has milliseconds
        self._timer = None
        self._wakes_s = math.inf
        for connection in [one for one in self._busy if one.due_s <= now_s]:
            connection.fail(TimeoutError())
        for idle in list(self._idle.values()):
            while idle and idle[0].idle_since_s + self._keepalive_s <= now_s:
                idle.popleft().close()
        self._idle = {origin: idle for origin, idle in self._idle.items() if idle}
        next_s = [one.due_s for one in self._busy]
        next_s += [idle[0].idle_since_s + self._keepalive_s for idle in self._idle.values() if idle]
        wakes_s = min(next_s, default=math.inf)
        if wakes_s < math.inf:
            self._wake_at(wakes_s)
