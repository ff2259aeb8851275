"""A replica's HTTP/1.1: uvicorn's, with less work for each call.

Rule 1: what a call needs of HTTP is uvicorn's or is done as uvicorn does it; all that is no plain
        call to a known path goes uvicorn's own way.
Rule 2: nothing here is public in uvicorn either: `works` tries it on three calls.
Rule 3: a head leaves together with what follows it at once, and waits for nothing that takes time.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from uvicorn.config import Config
from uvicorn.middleware.proxy_headers import ProxyHeadersMiddleware
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from deployments.http.app import CALLS
from deployments.http.peer import Peer, peer_behind

_PATHS = {path.encode(): path for path in CALLS}
_UNPRINTABLE = bytes(set(range(32)) - set(b"\t")) + b"\x7f"
_BUSY = math.inf


class CallProtocol(HttpToolsProtocol):
    """One connection. Calls are answered through a `CallCycle` each.

    Owns what uvicorn's owns; its timer for a connection that lies idle runs on from request to
    request. Bounded by uvicorn's limits. Failure behaviour: uvicorn's.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        unlimited = self.limit_concurrency is None
        self._is_plain = unlimited and not self.root_path and not self.access_log
        # Nobody asks who called: what a proxy says of that need not be read.
        proxied = isinstance(self.app, ProxyHeadersMiddleware)
        self._calls: Any = self.app.app if proxied else self.app
        self._call: CallCycle | None = None
        self._idle_from_s = _BUSY

    def on_headers_complete(self) -> None:
        path = _PATHS.get(self.url)
        parser = self.parser
        if (
            path is None
            or not self._is_plain
            or not (self.cycle is None or self.cycle.response_complete)
            or parser.get_http_version() != "1.1"
            or parser.should_upgrade()
        ):
            super().on_headers_complete()
            return
        scope = self.scope
        scope["method"] = parser.get_method().decode("ascii")
        scope["path"] = path
        scope["raw_path"] = self.url
        scope["query_string"] = b""
        self.cycle = self._call = CallCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue,
            keep_alive=parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._start_asgi_task(self._call, self._calls)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        timer, self.timeout_keep_alive_task = self.timeout_keep_alive_task, None
        if timer is not None:
            timer.cancel()
        call, self._call = self._call, None
        if call is not None:
            call.lose()

    # --- idle connections -----------------------------------------------------------------------

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
            return
        self._idle_from_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_again_in(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        """A connection on which something comes is not idle; the timer finds out when it is due."""
        self._idle_from_s = _BUSY

    def _look_again_in(self, seconds: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(
            seconds, self.timeout_keep_alive_handler
        )

    def timeout_keep_alive_handler(self) -> None:
        self.timeout_keep_alive_task = None
        if self._idle_from_s == _BUSY:
            return
        left_s = self._idle_from_s + self.timeout_keep_alive - self.loop.time()
        if left_s > 0:
            self._look_again_in(left_s)
        else:
            super().timeout_keep_alive_handler()


class CallCycle(RequestResponseCycle, Peer):
    """One call and its answer, over ASGI or, where the application asks for it, as a `Peer`.

    Owns the call's body until it is taken, and whom to tell that the client has left. Bounded by
    uvicorn's limit on what is read ahead. Failure behaviour: uvicorn's; who leaves is told of once.
    """

    _leave: Callable[[], object] | None = None

    def send(self, message: Any) -> Coroutine[Any, Any, None]:
        if not self.response_started and self.scope["method"] != "HEAD":
            self.transport = _HeldHead(self.transport)  # type: ignore[assignment]
        return super().send(message)

    def whole_body(self) -> bytes | None:
        if self.more_body or self.waiting_for_100_continue or self.disconnected:
            return None
        body = bytes(self.body)
        self.body = bytearray()
        self.message_event.clear()
        self.flow.resume_reading()
        return body

    def answer(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        if self.response_started or self.flow.write_paused:
            return False
        if self.disconnected:
            return True
        lines = [b": ".join(header) for header in self.default_headers]
        lines += [b": ".join(header) for header in headers]
        if not self.keep_alive:
            lines.append(b"connection: close")
        head = b"\r\n".join(lines)
        if len(head.translate(None, _UNPRINTABLE)) != len(head) - 2 * (len(lines) - 1):
            return False  # uvicorn says what is wrong
        shown = b"" if self.scope["method"] == "HEAD" else body
        self.response_started = self.response_complete = True
        self.waiting_for_100_continue = False
        self.transport.write(b"".join((STATUS_LINE[status], head, b"\r\n\r\n", shown)))
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()
        return True

    def watch(self, leave: Callable[[], object]) -> None:
        self._leave = leave
        # A body's last piece may have stopped the reading, and only who reads hears of the end.
        self.flow.resume_reading()

    def unwatch(self) -> None:
        self._leave = None

    def has_left(self) -> bool:
        return self.disconnected

    def lose(self) -> None:
        """The client has hung up."""
        if self.response_complete:
            return
        self.disconnected = True
        self.message_event.set()
        leave, self._leave = self._leave, None
        if leave is not None:
            leave()


class _HeldHead:
    """A transport whose first write waits for the second, for two turns of the loop at most.

    Owns that first write. Failure behaviour: the transport's; what nobody reads is dropped.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head: bytes | None = None
        self._is_out = False

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def write(self, data: bytes) -> None:
        if self._is_out:
            self._transport.write(data)
        elif self._head is None:
            self._head = data
            loop = asyncio.get_running_loop()
            # A stream's first chunk is written in the turn after this one.
            loop.call_soon(loop.call_soon, self._flush)
        else:
            self._is_out = True
            self._transport.write(self._head + data)

    def close(self) -> None:
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if not self._is_out and self._head is not None and not self._transport.is_closing():
            self._transport.write(self._head)
        self._is_out = True


# --- a trial ------------------------------------------------------------------------------------


async def works() -> bool:
    """Whether this uvicorn serves calls as it should: one that is answered at once, one that is
    answered in parts, and one whose client leaves. It takes some turns of the loop, no network.

    Raises what uvicorn does, and TimeoutError where a call does not end.
    """
    wire, state = _Wire(), ServerState()
    left = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        peer = peer_behind(receive)
        if peer is None or peer is not peer_behind(send) or peer.has_left():
            return
        if not wire.written:
            peer.answer(200, _TWO_BYTES, peer.whole_body() or b"")
        elif len(wire.written) == 1:
            body = (await receive())["body"]
            await send({"type": "http.response.start", "status": 200, "headers": _TWO_BYTES})
            await send({"type": "http.response.body", "body": body})
        else:
            peer.watch(left.set)
            await left.wait()

    config = Config(app, lifespan="off", log_config=None, access_log=False, ws="none")
    connection = CallProtocol(config, state, {}, asyncio.get_running_loop())
    connection.connection_made(wire)
    async with asyncio.timeout(TRIAL_S):
        for _ in range(2):
            connection.data_received(_TRIAL)
            await asyncio.gather(*state.tasks)
        connection.data_received(_TRIAL)
        await asyncio.sleep(0)
        connection.connection_lost(None)
        await asyncio.gather(*state.tasks)
    return wire.written == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}"] * 2 and left.is_set()


TRIAL_S = 5.0
_TRIAL = b"POST %b HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}" % next(iter(_PATHS))
_TWO_BYTES = [(b"content-length", b"2")]


class _Wire(asyncio.Transport):
    """A transport to nobody. Owns what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: Any) -> None:
        self.written.append(data)

    def close(self) -> None:
        """Nothing is open."""
