"""Anthropic's route: Messages, whole or as events, over whatever model answers.

Rule 1: a Messages request is a chat request in other words; the same checks and limits hold.
Rule 2: whatever goes wrong on this path is told in Anthropic's shape, with `request-id`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.http.exchange import JSON, Exchange
from deployments.http.openai import answered, told
from deployments.http.service import StreamReply
from deployments.http.sse import close, send_stream
from forebay import anthropic_wire
from forebay.errors import GatewayError

CALL_ID = b"x-litellm-call-id"


async def messages(exchange: Exchange) -> None:
    """POST /v1/messages."""
    identity = exchange.identify()
    asked = anthropic_wire.asked(await exchange.json_body())
    call = exchange.call("chat", asked.body, identity.tenant, stream=asked.stream)
    reply = await answered(exchange, call)
    if isinstance(reply, StreamReply):
        events = _events(reply.chunks, anthropic_wire.Events(asked, exchange.request_id))
        await send_stream(
            exchange,
            told(exchange, reply),
            events,
            event,
            fail=lambda error: event(error_shape(exchange, error)),
            done=b"",
        )
        return
    answer = reply.body if isinstance(reply.body, dict) else orjson.loads(reply.body)
    message = anthropic_wire.message(answer, asked, exchange.request_id)
    await exchange.send(200, orjson.dumps(message), [JSON, *told(exchange, reply)])


def error_shape(exchange: Exchange, error: GatewayError) -> dict[str, Any]:
    """Anthropic's error body."""
    return anthropic_wire.error_body(error, exchange.request_id)


def event(value: dict[str, Any]) -> bytes:
    """One event, named by its type."""
    return b"event: %s\ndata: %s\n\n" % (value["type"].encode(), orjson.dumps(value))


async def _events(
    chunks: AsyncIterator[dict[str, Any]], events: anthropic_wire.Events
) -> AsyncIterator[dict[str, Any]]:
    """The events of a stream of chunks, which is closed with it."""
    try:
        async for chunk in chunks:
            for made in events.add(chunk):
                yield made
        for made in events.end():
            yield made
    finally:
        await close(chunks)


class WithRequestId:
    """An ASGI app around another: the request's id also goes by Anthropic's name, `request-id`.

    Owns nothing. It takes the id from the header that every answer and every refusal has.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message["headers"]
                named = [(b"request-id", value) for name, value in headers if name == CALL_ID]
                message = {**message, "headers": [*headers, *named]}
            await send(message)

        await self._app(scope, receive, sending)
