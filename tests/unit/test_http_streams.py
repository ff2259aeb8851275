"""Streams: first chunk at once, the rest together, and nothing left running."""

from __future__ import annotations

import asyncio
import logging
import socket
from typing import Any

import httpx
import pytest
import uvicorn

from deployments.http import build_asgi
from deployments.http.exchange import Exchange
from deployments.http.sse import PENDING_BYTES_MAX, frame, send_stream
from forebay.errors import GatewayTimeout
from tests.support.fake_time import settle
from tests.support.scripted_service import (
    Answered,
    Client,
    ScriptedChunks,
    ScriptedService,
    chunk,
)

STREAM = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "stream": True}
FOR_EVER = 3600.0


class Streamed:
    """`send_stream` on its own, with a linger of choice."""

    def __init__(self, script: list[Any], linger_s: float) -> None:
        self.chunks = ScriptedChunks(script)
        self._linger_s = linger_s
        self.client = Client(self._app)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        exchange = Exchange(
            ScriptedService(), scope, receive, send, arrived_s=0.0, new_id=lambda: "r"
        )
        await exchange.json_body()
        await send_stream(exchange, [], self.chunks, frame, linger_s=self._linger_s)

    def start(self) -> asyncio.Task[Answered]:
        return asyncio.create_task(self.client.post("/", {}))

    @property
    def writes(self) -> list[bytes]:
        return self.client.answered.writes


async def test_the_first_chunk_goes_out_at_once_and_later_ones_together() -> None:
    more, end = asyncio.Event(), asyncio.Event()
    stream = Streamed([chunk("a"), more, chunk("b"), chunk("c"), end], linger_s=FOR_EVER)
    running = stream.start()
    await settle()
    first = list(stream.writes)
    more.set()
    await settle()
    held = list(stream.writes)
    end.set()
    answered = await running

    assert first == held == [frame(chunk("a"))]
    assert answered.writes[1:] == [frame(chunk("b")) + frame(chunk("c")) + b"data: [DONE]\n\n"]


async def test_without_a_linger_each_chunk_goes_out_as_it_comes() -> None:
    events = [asyncio.Event() for _ in range(3)]
    script = [item for event in events for item in (event, chunk("x"))]
    stream = Streamed(script, linger_s=0.0)
    running = stream.start()
    for event in events:
        stream.client.wrote.clear()
        event.set()
        await stream.client.wrote.wait()
    await running

    one = frame(chunk("x"))
    assert stream.writes == [one, one, one + b"data: [DONE]\n\n"]


async def test_an_empty_stream_is_just_done() -> None:
    answered = await Streamed([], linger_s=FOR_EVER).start()

    assert (answered.status, answered.body) == (200, b"data: [DONE]\n\n")


async def test_a_client_that_hangs_up_stops_the_provider() -> None:
    stream = Streamed([chunk("a"), asyncio.Event()], linger_s=0.0)
    running = stream.start()
    await stream.client.wrote.wait()
    stream.client.leave.set()
    answered = await running

    assert stream.chunks.closed.is_set()
    assert answered.events == [chunk("a")]


async def test_a_client_that_hangs_up_during_a_linger_stops_the_provider() -> None:
    stream = Streamed([chunk("a"), asyncio.Event()], linger_s=FOR_EVER)
    running = stream.start()
    await stream.client.wrote.wait()
    stream.client.leave.set()
    await running

    assert stream.chunks.closed.is_set()


async def test_a_server_that_stops_stops_the_provider() -> None:
    stream = Streamed([chunk("a"), asyncio.Event()], linger_s=0.0)
    running = stream.start()
    await stream.client.wrote.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert stream.chunks.closed.is_set()


async def test_nothing_is_left_running_after_a_stream() -> None:
    before = asyncio.all_tasks()
    await Streamed([chunk("a")], linger_s=0.0).start()

    assert asyncio.all_tasks() == before


async def test_a_client_that_reads_slowly_holds_the_provider_back() -> None:
    big = chunk("x" * PENDING_BYTES_MAX)
    read: list[int] = []
    takes = asyncio.Event()

    async def produce() -> Any:
        for number in range(9):
            read.append(number)
            yield big

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def slowly(message: Any) -> None:
            if message["type"] == "http.response.body":
                await takes.wait()
            await send(message)

        exchange = Exchange(
            ScriptedService(), scope, receive, slowly, arrived_s=0.0, new_id=lambda: "r"
        )
        await exchange.json_body()
        await send_stream(exchange, [], produce(), frame, linger_s=0.0)

    running = asyncio.create_task(Client(app).post("/", {}))
    await settle()
    stalled = len(read)
    takes.set()
    answered = await running

    assert stalled < 4
    assert answered.events == [*[big] * 9, "[DONE]"]


async def test_a_client_that_cannot_be_written_to_stops_the_provider() -> None:
    stream = Streamed(
        [chunk("a"), chunk("b"), asyncio.Event(), chunk("c"), asyncio.Event()], linger_s=0.0
    )
    waits = stream.chunks._script[2]

    async def app(scope: Any, receive: Any, send: Any) -> None:
        async def broken(message: Any) -> None:
            if message["type"] == "http.response.body":
                raise OSError("nobody there")
            await send(message)

        exchange = Exchange(
            ScriptedService(), scope, receive, broken, arrived_s=0.0, new_id=lambda: "r"
        )
        await exchange.json_body()
        await send_stream(exchange, [], stream.chunks, frame, linger_s=0.0)

    running = asyncio.create_task(Client(app).post("/", {}))
    await settle()
    waits.set()
    await running

    assert stream.chunks.closed.is_set()


async def test_a_failure_in_mid_stream_is_an_event_and_then_done() -> None:
    error = GatewayTimeout("too slow")
    answered = await Streamed([chunk("a"), error], linger_s=0.0).start()

    assert answered.status == 200
    assert answered.events == [chunk("a"), {"error": error.body()}, "[DONE]"]


@pytest.mark.parametrize("script", [[chunk("a")], [chunk("a"), GatewayTimeout("too slow")]])
async def test_a_dialect_without_a_last_frame_sends_none(script: list[Any]) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        exchange = Exchange(
            ScriptedService(), scope, receive, send, arrived_s=0.0, new_id=lambda: "r"
        )
        await exchange.json_body()
        await send_stream(exchange, [], ScriptedChunks(script), frame, done=b"", linger_s=0.0)

    answered = await Client(app).post("/", {})
    assert b"DONE" not in answered.body
    assert len(answered.events) == len(script)


async def test_an_unforeseen_failure_in_mid_stream_tells_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stream = Streamed([chunk("a"), RuntimeError("token=abc123")], linger_s=0.0)
    with caplog.at_level(logging.ERROR):
        answered = await stream.start()

    assert answered.events[1]["error"]["code"] == "internal_error"
    assert b"RuntimeError" not in answered.body
    assert "RuntimeError" in caplog.text
    assert "abc123" not in caplog.text


async def test_line_breaks_in_a_text_do_not_break_the_framing() -> None:
    text = "a\n\ndata: [DONE]\n\n\u2028\r"
    answered = await Streamed([chunk(text)], linger_s=0.0).start()

    assert answered.events == [chunk(text), "[DONE]"]


async def test_a_client_that_hangs_up_before_the_first_chunk_cancels_the_call() -> None:
    cancelled = asyncio.Event()

    class Slow(ScriptedService):
        async def _before(self) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                cancelled.set()

    client = Client(build_asgi(Slow()))
    running = asyncio.create_task(client.post("/v1/chat/completions", STREAM))
    await settle()
    client.leave.set()
    answered = await running

    assert cancelled.is_set()
    assert answered.status == 0


async def test_a_stream_that_begins_as_the_client_leaves_is_closed() -> None:
    chunks = ScriptedChunks([chunk("a")])

    class Stubborn(ScriptedService):
        async def _before(self) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass  # The provider's first chunk arrived in this very moment.

    client = Client(build_asgi(Stubborn(chunks=chunks)))
    running = asyncio.create_task(client.post("/v1/chat/completions", STREAM))
    await settle()
    client.leave.set()
    await running

    assert chunks.closed.is_set()


async def test_over_a_socket_too_a_client_that_hangs_up_stops_the_provider() -> None:
    chunks = ScriptedChunks([chunk("a"), asyncio.Event()])
    config = uvicorn.Config(
        build_asgi(ScriptedService(chunks=chunks)), port=0, log_level="error", lifespan="off"
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        serving = asyncio.create_task(server.serve([listening]))
        async with (
            httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
            client.stream("POST", "/v1/chat/completions", json=STREAM) as response,
        ):
            first = await anext(response.aiter_bytes())
        await asyncio.wait_for(chunks.closed.wait(), 5)
        server.should_exit = True
        await serving

    assert first == frame(chunk("a"))
