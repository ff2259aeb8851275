"""Calls over our own HTTP/1.1: as uvicorn serves them, in fewer writes, and told who leaves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
from uvicorn import Config
from uvicorn.config import HTTP_PROTOCOLS
from uvicorn.protocols.http.httptools_impl import (
    HEADER_VALUE_RE,
    HttpToolsProtocol,
)
from uvicorn.server import ServerState

from deployments.http import build_asgi, protocol
from deployments.http.peer import peer_behind
from deployments.http.protocol import CallProtocol, works
from deployments.http.sse import frame
from deployments.replica import shorten_http
from forebay.errors import GatewayTimeout
from tests.support.fake_time import settle
from tests.support.scripted_service import ScriptedChunks, ScriptedService, chat_body, chunk

PATH = b"/v1/chat/completions"
ASKED = b'{"model":"small","messages":[{"role":"user","content":"hi"}]}'
STREAM = ASKED[:-1] + b',"stream":true}'
ID = b"x-request-id: r1\r\n"
PATIENCE_S = 5.0


def call(body: bytes = ASKED, headers: bytes = b"", path: bytes = PATH) -> bytes:
    """The bytes of a call."""
    head = b"POST %b HTTP/1.1\r\nhost: here\r\n%b%bcontent-length: %d\r\n\r\n"
    return head % (path, ID, headers, len(body)) + body


LAST = b"connection: close\r\n"


class Answers:
    """Reads answers off a connection, one after the other."""

    def __init__(self, reader: asyncio.StreamReader) -> None:
        self._reader = reader
        self.raw = b""

    async def next(self, of: bytes = b"POST") -> bytes:
        """The bytes of the next answer; whatever comes to the end, if it says no length."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        rest = b""
        lines = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        if head.startswith(b"HTTP/1.1 100"):
            return head + await self.next(of)
        if b"transfer-encoding" in lines:
            rest = await self._reader.readuntil(b"0\r\n\r\n")
        elif b"content-length" in lines and of != b"HEAD":
            rest = await self._reader.readexactly(int(lines[b"content-length"]))
        return head + rest


@asynccontextmanager
async def served(
    app: Any, kind: type[HttpToolsProtocol] = CallProtocol, **options: Any
) -> AsyncIterator[SimpleNamespace]:
    """A server on loopback; `open()` connects to it, `state` is uvicorn's."""
    state = ServerState()
    state.default_headers = [(b"date", b"today"), (b"server", b"uvicorn")]
    config = Config(
        app, lifespan="off", log_config=None, access_log=False, **{"ws": "none", **options}
    )
    made: list[Any] = []

    def connected() -> asyncio.Protocol:
        made.append(kind(config, state, {}, asyncio.get_running_loop()))
        return made[-1]  # type: ignore[no-any-return]

    server = await asyncio.get_running_loop().create_server(connected, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    writers: list[asyncio.StreamWriter] = []

    async def connect() -> tuple[Answers, asyncio.StreamWriter, asyncio.StreamReader]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writers.append(writer)
        return Answers(reader), writer, reader

    try:
        async with asyncio.timeout(PATIENCE_S):
            yield SimpleNamespace(connect=connect, state=state, made=made, config=config)
    finally:
        for writer in writers:
            writer.close()
        server.close()
        for task in state.tasks:
            task.cancel()
        await asyncio.gather(*state.tasks, return_exceptions=True)


# --- as uvicorn ---------------------------------------------------------------------------------


async def cut_short(scope: Any, receive: Any, send: Any) -> None:
    """Answers in part, or wrongly, as the request's body says."""
    body = b""
    while True:
        message = await receive()
        body += message["body"]
        if not message["more_body"]:
            break
    start = {"type": "http.response.start", "status": 200, "headers": []}
    match body:
        case b"nothing":
            return
        case b"raise":
            raise ValueError
        case b"head":
            await send(start)
        case b"head, raise":
            await send(start)
            raise ValueError
        case b"chunks":
            await send(start)
            await send({"type": "http.response.body", "body": b"a" * 40, "more_body": True})
            await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"", "more_body": True})
            await send({"type": "http.response.body", "body": b"b"})
        case b"no body":
            await send({**start, "status": 204})
            await send({"type": "http.response.body"})
        case b"close":
            await send({**start, "headers": [(b"connection", b"close")]})
            await send({"type": "http.response.body", "body": b"bye"})
        case b"short" | b"long":
            told = b"3" if body == b"short" else b"1"
            await send({**start, "headers": [(b"content-length", told)]})
            await send({"type": "http.response.body", "body": b"ab"})
        case b"bad name" | b"bad value":
            bad = (b"x y", b"z") if body == b"bad name" else (b"x", b"y\r\nz: 1")
            await send({**start, "headers": [bad]})
        case b"body first":
            await send({"type": "http.response.body", "body": b"ab"})
        case b"twice":
            await send({**start, "headers": [(b"content-length", b"2")]})
            await send({"type": "http.response.body", "body": b"ab"})
            await send({"type": "http.response.body", "body": b"ab"})


def chunked(body: bytes) -> bytes:
    head = b"POST %b HTTP/1.1\r\nhost: here\r\n%btransfer-encoding: chunked\r\n\r\n" % (PATH, ID)
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


ODD = [
    call(path=b"/v1/chat/completions?a=b"),
    call(path=b"/v1/chat%2Fcompletions"),
    call(path=b"/v1/nothing"),
    call(b"", b"", b"/health").replace(b"POST", b"GET"),
    call(b"").replace(b"POST", b"HEAD"),
    call(b"").replace(b"POST", b"GET"),
    call(b"{"),
    call(headers=b"upgrade: websocket\r\nconnection: upgrade\r\n"),
    call(headers=b"x-forebay-timeout: -1\r\n"),
    call(STREAM),
    call(path=b"/v1/messages"),
    call(ASKED[:-1] + b" " * 300_000 + b"}"),
    chunked(ASKED),
]


async def exchanged(
    app: Any, kind: type[HttpToolsProtocol], *asked: bytes, **options: Any
) -> list[bytes]:
    """What each request is answered on one connection, and what comes after the last."""
    async with served(app, kind, **options) as server:
        answers, writer, reader = await server.connect()
        found = []
        for request in asked:
            writer.write(request)
            found.append(await answers.next(request.split(b" ")[0]))
        writer.write(call(headers=LAST))
        found.append(await reader.read())
        while server.state.connections or server.state.tasks:
            await asyncio.sleep(0)
        return [*found, b"%d" % server.state.total_requests]


@pytest.mark.parametrize("asked", ODD, ids=range(len(ODD)))
async def test_whatever_is_asked_is_answered_as_by_uvicorn(asked: bytes) -> None:
    app = build_asgi(ScriptedService())
    ours = await exchanged(app, CallProtocol, asked, call(), asked)
    assert ours == await exchanged(app, HttpToolsProtocol, asked, call(), asked)
    assert b"Hello!" in ours[1]


@pytest.mark.parametrize(
    "asked",
    [
        call(headers=LAST),
        call().replace(b"HTTP/1.1", b"HTTP/1.0"),
        call().replace(b"HTTP/1.1", b"HTTP/1.0").replace(ID, b"connection: keep-alive\r\n" + ID),
        call(headers=b"expect: 100-continue\r\n"),
        call() + call(STREAM) + call(b"", path=b"/v1/models").replace(b"POST", b"GET"),
        call(headers=LAST) + call(),
        b"not HTTP\r\n\r\n",
        call().replace(b"content-length: ", b"content-length: x"),
    ],
)
async def test_all_that_is_sent_at_once_is_answered_as_by_uvicorn(asked: bytes) -> None:
    async def all_of(kind: type[HttpToolsProtocol]) -> bytes:
        async with served(build_asgi(ScriptedService()), kind) as server:
            answers, writer, reader = await server.connect()
            writer.write(asked)
            came: bytes = b"" if b"not HTTP" in asked or b"x6" in asked else await answers.next()
            writer.write(b"" if b"lose" in asked or not came else call(headers=LAST))
            rest: bytes = await reader.read()
            return came + rest

    ours = await all_of(CallProtocol)
    assert ours == await all_of(HttpToolsProtocol)
    assert ours


CUTS = [
    "nothing", "raise", "head", "head, raise", "chunks", "no body", "close", "short", "long",
    "bad name", "bad value", "body first", "twice",
]  # fmt: skip


@pytest.mark.parametrize("how", CUTS)
async def test_any_application_is_served_as_by_uvicorn(how: str) -> None:
    async def all_of(kind: type[HttpToolsProtocol]) -> bytes:
        async with served(cut_short, kind) as server:
            _, writer, reader = await server.connect()
            writer.write(call(how.encode(), LAST))
            came: bytes = await reader.read()
            await settle()
            return came + b" tasks %d" % len(server.state.tasks)

    assert await all_of(CallProtocol) == await all_of(HttpToolsProtocol)


async def test_what_uvicorn_is_set_to_holds() -> None:
    app = build_asgi(ScriptedService())
    limited = await exchanged(app, CallProtocol, limit_concurrency=1)
    assert limited[0].startswith(b"HTTP/1.1 503 ")
    below = await exchanged(app, CallProtocol, root_path="/below")
    assert below == await exchanged(app, HttpToolsProtocol, root_path="/below")


async def test_a_header_is_refused_where_uvicorn_refuses_it() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        peer = peer_behind(send)
        assert peer is not None
        for byte in range(256):
            vars(peer).update(response_started=False, response_complete=False)
            value = b"x%c" % byte
            assert peer.answer(200, [(b"x", value)], b"") == (not HEADER_VALUE_RE.search(value))
            found.append(byte)
        assert not peer.answer(200, [(b"x\r\ny: z", b"x")], b"")

    found: list[int] = []
    await Line(app).ask(call())
    assert len(found) == 256


# --- writes -------------------------------------------------------------------------------------


class Wire(asyncio.Transport):
    """A connection in memory: what is written to it, write for write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Loop:
    """A loop with a clock of its own, whose timers are run by hand."""

    def __init__(self) -> None:
        self.now = 100.0
        self.timers: list[Any] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay_s: float, do: Callable[[], None]) -> Any:
        timer = SimpleNamespace(due_s=self.now + delay_s, do=do)
        timer.cancel = lambda: self.timers.remove(timer)
        self.timers.append(timer)
        return timer

    def create_task(self, work: Any) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    def go_to(self, now: float) -> None:
        self.now = now
        for timer in [timer for timer in self.timers if timer.due_s <= now]:
            self.timers.remove(timer)
            timer.do()


class Line:
    """A connection to `app`, in memory."""

    def __init__(self, app: Any) -> None:
        config = Config(app, lifespan="off", log_config=None, access_log=False, ws="none")
        config.timeout_keep_alive = 5
        self.loop = Loop()
        self.wire = Wire()
        self.protocol = CallProtocol(config, ServerState(), {}, self.loop)  # type: ignore[arg-type]
        self.protocol.connection_made(self.wire)

    async def ask(self, raw: bytes) -> None:
        self.protocol.data_received(raw)
        await settle()


async def test_an_answer_leaves_in_one_write() -> None:
    line = Line(build_asgi(ScriptedService()))
    await line.ask(call())
    await line.ask(call(b"{"))
    first, second = line.wire.writes
    assert first.startswith(b"HTTP/1.1 200 ")
    assert b"Hello!" in first
    assert second.startswith(b"HTTP/1.1 400 ")


async def test_a_stream_begins_with_its_first_chunk_in_one_write() -> None:
    line = Line(build_asgi(ScriptedService(chunks=[chunk("a"), asyncio.Event()])))
    await line.ask(call(STREAM))
    (written,) = line.wire.writes
    assert written.startswith(b"HTTP/1.1 200 ")
    assert frame(chunk("a")) in written
    line.protocol.connection_lost(None)
    await settle()


async def test_a_head_waits_for_no_chunk() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.Event().wait()

    line = Line(app)
    await line.ask(call())
    (head,) = line.wire.writes
    assert head.endswith(b"\r\n\r\n")
    for task in line.protocol.tasks:
        task.cancel()
    await settle()


async def test_a_client_that_does_not_read_is_waited_for() -> None:
    big = chat_body("x" * 8_000_000)
    async with served(build_asgi(ScriptedService(answer=big))) as server:
        answers, writer, reader = await server.connect()
        writer.write(call())
        await asyncio.to_thread(lambda: None)
        reader._transport.pause_reading()
        while server.state.total_requests < 1:
            await asyncio.sleep(0)
        writer.write(call())
        while not server.state.tasks:
            await asyncio.sleep(0)
        await settle()
        assert server.state.total_requests == 1, "the second answer waits for room"
        reader._transport.resume_reading()
        reader._limit = 2**25
        first, second = await answers.next(), await answers.next()
        assert first == second
        assert len(first) > 8_000_000


# --- who leaves ---------------------------------------------------------------------------------


class Waits(ScriptedService):
    """A call of it lasts until it is stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.begun, self.stopped = asyncio.Event(), asyncio.Event()

    async def chat(self, call: Any) -> Any:
        self.begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            self.stopped.set()


@pytest.mark.parametrize("more", [b"", call()], ids=["alone", "with more calls behind it"])
async def test_a_client_that_hangs_up_stops_the_work(more: bytes) -> None:
    service = Waits()
    async with served(build_asgi(service)) as server:
        _, writer, _ = await server.connect()
        writer.write(call() + more)
        await service.begun.wait()
        writer.close()
        await service.stopped.wait()
        await settle()
        assert not server.state.tasks
        assert not server.state.connections


async def test_a_client_that_hangs_up_stops_a_stream() -> None:
    chunks = ScriptedChunks([chunk("a"), asyncio.Event()])
    async with served(build_asgi(ScriptedService(chunks=chunks))) as server:
        _, writer, reader = await server.connect()
        writer.write(call(STREAM))
        await reader.readuntil(frame(chunk("a")))
        writer.close()
        await chunks.closed.wait()


async def test_a_client_that_hangs_up_after_a_long_body_stops_the_work() -> None:
    service = Waits()
    raw = call(ASKED.replace(b"hi", b"x" * 100_000))
    async with served(build_asgi(service)) as server:
        _, writer, _ = await server.connect()
        writer.write(raw[:200])  # the rest comes at once, and is more than uvicorn reads ahead
        while not server.state.tasks:
            await asyncio.sleep(0)
        await settle()
        (connection,) = server.made
        connection.data_received(raw[200:])
        await service.begun.wait()
        writer.close()
        await service.stopped.wait()


async def test_who_leaves_is_told_of_once_and_only_before_the_answer() -> None:
    told: list[bytes] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        peer = peer_behind(receive)
        assert peer is not None
        path = scope["headers"][0][1]
        peer.watch(lambda: told.append(path))
        if path == b"forgotten":
            peer.unwatch()
        if path == b"answered":
            assert peer.answer(200, [(b"content-length", b"0")], b"")
            return
        assert peer.whole_body() == b""
        assert (await receive())["type"] == "http.disconnect"
        assert peer.has_left()
        assert peer.answer(200, [], b"to nobody")

    for name in (b"waiting", b"forgotten", b"answered"):
        line = Line(app)
        await line.ask(b"POST %b HTTP/1.1\r\nname: %b\r\n\r\n" % (PATH, name))
        line.protocol.connection_lost(None)
        line.protocol.connection_lost(None)
        await settle()
        assert not line.protocol.tasks
        assert len(line.wire.writes) == (name == b"answered")
    assert told == [b"waiting"]


async def test_a_body_that_is_not_all_here_is_waited_for() -> None:
    line = Line(build_asgi(ScriptedService()))
    raw = call()
    await line.ask(raw[:-5])
    assert line.wire.writes == []
    await line.ask(raw[-5:])
    assert b"Hello!" in line.wire.writes[0]


async def test_who_still_receives_after_the_answer_hears_the_end() -> None:
    heard: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        peer = peer_behind(receive)
        assert peer is not None
        peer.whole_body()
        receiving = asyncio.create_task(receive())
        await asyncio.sleep(0)
        peer.answer(200, [(b"content-length", b"0")], b"")
        heard.append(await receiving)

    await Line(app).ask(call())
    assert heard == [{"type": "http.disconnect"}]


async def test_who_called_is_asked_for_all_but_calls() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        told = scope["client"][0].encode()
        head = [(b"content-length", b"%d" % len(told))]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": told})

    forwarded = b"x-forwarded-for: 1.2.3.4\r\n"
    asked = [call(b"", forwarded, path) for path in (PATH, b"/health")]
    found = await exchanged(app, CallProtocol, *asked)
    assert [answer.rpartition(b"\r\n")[2] for answer in found[:2]] == [b"127.0.0.1", b"1.2.3.4"]


async def test_a_websocket_on_a_path_of_calls_is_handed_on() -> None:
    class Sockets(asyncio.Protocol):
        def __init__(self, **_: Any) -> None: ...

        def data_received(self, data: bytes) -> None:
            handed.append(data.partition(b"\r\n")[0])

    handed: list[bytes] = []
    asked = call(b"", b"upgrade: websocket\r\nconnection: upgrade\r\n").replace(b"POST", b"GET")
    async with served(build_asgi(ScriptedService()), ws=Sockets) as server:
        _, writer, _ = await server.connect()
        writer.write(asked)
        while not handed:
            await asyncio.sleep(0)
        assert not server.state.tasks, "it is no call"
    assert handed == [b"GET %b HTTP/1.1" % PATH]


async def test_what_is_wrapped_is_not_passed_by() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def wrapped(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-wrapped", b"yes"))
            await send(message)

        await build_asgi(ScriptedService())(scope, receive, wrapped)

    line = Line(app)
    await line.ask(call())
    (written,) = line.wire.writes
    assert b"x-wrapped: yes\r\n" in written


# --- idle connections, and the end --------------------------------------------------------------


async def test_a_connection_that_lies_idle_is_closed_after_its_time_and_not_before() -> None:
    line = Line(build_asgi(ScriptedService()))
    await line.ask(call())
    assert len(line.loop.timers) == 1
    line.loop.go_to(104.0)
    await line.ask(call())
    assert len(line.loop.timers) == 1, "one timer is enough"
    line.loop.go_to(105.0)
    assert not line.wire.closed
    line.loop.go_to(108.9)
    assert not line.wire.closed
    line.loop.go_to(109.0)
    assert line.wire.closed


async def test_a_connection_with_a_call_under_way_is_not_idle() -> None:
    answer = asyncio.Event()
    service = ScriptedService()
    line = Line(build_asgi(service))
    await line.ask(call())
    service.answer = answer
    await line.ask(call())
    line.loop.go_to(1000.0)
    assert not line.wire.closed
    service.answer = GatewayTimeout("late")
    answer.set()
    await settle()
    assert len(line.wire.writes) == 2
    assert [timer.due_s for timer in line.loop.timers] == [1005.0]


async def test_a_connection_that_is_gone_leaves_no_timer() -> None:
    line = Line(build_asgi(ScriptedService()))
    await line.ask(call())
    line.protocol.connection_lost(ConnectionResetError())
    assert line.loop.timers == []


async def test_a_server_that_stops_ends_the_call_first() -> None:
    answer = asyncio.Event()

    class Waits(ScriptedService):
        async def chat(self, call: Any) -> Any:
            await answer.wait()
            return await super().chat(call)

    idle, busy = Line(build_asgi(ScriptedService())), Line(build_asgi(Waits()))
    await idle.ask(call())
    await busy.ask(call())
    idle.protocol.shutdown()
    busy.protocol.shutdown()
    assert (idle.wire.closed, busy.wire.closed) == (True, False)
    answer.set()
    await settle()
    assert busy.wire.closed
    assert b"connection: close\r\n" in busy.wire.writes[0]


# --- where it is installed ----------------------------------------------------------------------


async def test_servers_of_a_replica_take_calls_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(HTTP_PROTOCOLS, "auto", HTTP_PROTOCOLS["auto"])  # put back in the end
    await shorten_http()
    config = Config(build_asgi(ScriptedService()), log_config=None, ws="none")
    config.load()
    assert config.http_protocol_class is CallProtocol


@pytest.mark.parametrize("used", ["CallCycle", "ServerState", "Config"])
async def test_a_uvicorn_that_is_another_is_left_as_it_is(
    used: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Another:
        def __init__(self, *_: Any, **__: Any) -> None:
            raise ValueError("unknown argument")

    before = HTTP_PROTOCOLS["auto"]
    monkeypatch.setattr(protocol, used, Another)
    await shorten_http()
    assert HTTP_PROTOCOLS["auto"] == before
    (record,) = [record for record in caplog.records if record.name == "deployments.replica"]
    assert "its own way" in record.getMessage()


async def test_a_trial_takes_nothing_along() -> None:
    before = asyncio.all_tasks()
    assert await works()
    assert asyncio.all_tasks() == before
