"""A TCP proxy that misbehaves as it is told, between a client and a server on loopback."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Fault = Literal["pass", "latency", "blackhole", "reset", "half_close", "refuse"]
CHUNK_BYTES = 65536


class FaultProxy:
    """Owns a listening port and the connections through it; all of them obey the present fault.

    `pass` hands on as it comes. `latency` hands the server's bytes on `latency_s` later.
    `blackhole` takes everything and hands on nothing, and nothing is closed. `reset` ends every
    connection with a TCP reset as soon as it sends something. `half_close` hands on what the client
    sends and ends the server's side at once. `refuse` listens no longer. What was swallowed stays
    so: a connection that has met the black hole is useless afterwards, as in life.
    """

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port = 0
        self.fault: Fault = "pass"
        self.latency_s = 0.0
        self.connections = 0
        self._upstream = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        await self._stop_listening()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def set(self, fault: Fault, latency_s: float = 0.0) -> None:
        """From now on; `refuse` also ends the connections there are."""
        self.fault, self.latency_s = fault, latency_s
        if fault == "refuse":
            await self.close()
        elif self._server is None:
            await self.start()

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await asyncio.open_connection(*self._upstream)
            await asyncio.gather(
                self._relay(reader, far, writer, from_server=False),
                self._relay(far_reader, writer, writer, from_server=True),
            )
        except (OSError, asyncio.CancelledError):
            pass  # either side has gone, or the proxy has
        finally:
            self._tasks.discard(task)
            for one in (writer, far):
                if one is not None:
                    one.close()

    async def _relay(
        self,
        reader: asyncio.StreamReader,
        to: asyncio.StreamWriter,
        client: asyncio.StreamWriter,
        *,
        from_server: bool,
    ) -> None:
        while True:
            data = await reader.read(CHUNK_BYTES)
            if not data:
                if to.can_write_eof():
                    to.write_eof()
                return
            if self.fault == "reset":
                _reset(client)
                raise ConnectionResetError
            if self.fault == "blackhole":
                continue
            if from_server and self.fault == "half_close":
                to.write_eof()
                return
            if from_server and self.fault == "latency":
                await asyncio.sleep(self.latency_s)
            to.write(data)
            await to.drain()


class ProxyThread:
    """A `FaultProxy` on an event loop of its own, told what to do from any thread."""

    def __init__(self, proxy: FaultProxy, loop: asyncio.AbstractEventLoop) -> None:
        self._proxy = proxy
        self._loop = loop

    @property
    def url(self) -> str:
        return self._proxy.url

    def set(self, fault: Fault, latency_s: float = 0.0) -> None:
        setting = self._proxy.set(fault, latency_s)
        asyncio.run_coroutine_threadsafe(setting, self._loop).result(5)


@contextmanager
def fault_proxy(port: int) -> Iterator[ProxyThread]:
    """A running proxy in front of a port of this machine, for tests that share it."""
    proxy, loop = FaultProxy(port), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(proxy.start(), loop).result(5)
        yield ProxyThread(proxy, loop)
    finally:
        asyncio.run_coroutine_threadsafe(proxy.close(), loop).result(5)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST in place of FIN."""
    raw = writer.get_extra_info("socket")
    if raw is not None:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
