"""A stream of LiteLLM's as a stream of OpenAI chunk dicts, which can be closed at any time."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from types import AsyncGeneratorType
from typing import Any

import httpx

from forebay.errors import GatewayError, GatewayTimeout, ProviderConnectionError
from forebay.providers import wire
from forebay.providers.base import STALLED

LAYERS_MAX = 16
CLOSE_S = 0.5

_IN_GENERATORS = ("streamwrapper", "response", "iterator", "self")
_IN_OBJECTS = (
    *("completion_stream", "streaming_response", "async_response_iterator"),
    *("response_iterator", "http_response", "response"),
)


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream that has been opened.

    `plain` makes a chunk dict of what it gives (None: it gives such dicts), `error` an error of
    ours of what it raises. `says_end`: its provider ends every answer with a finish reason.
    `stall_s`: how long the deployment itself is given for a chunk.
    """

    stream: AsyncIterator[Any]
    plain: Callable[[Any], dict[str, Any]] | None
    error: Callable[[BaseException], GatewayError]
    says_end: bool = False
    stall_s: float = math.inf


class LiteLLMChunks:
    """One streamed answer; the first `anext` makes the call.

    Owns the upstream connection and one timer. Bounded by `timeout_s` from the first `anext` to the
    end, and by `stall_s` for whoever waits for another chunk; a model may think before its first.

    Failure behaviour: what goes wrong is raised once, as a GatewayError, and the stream is over. A
    deadline that passes while nobody waits closes the upstream connection, by a task. A
    provider that is known to give a finish reason, and does not, has broken off; LiteLLM makes up
    a "stop". Usage that LiteLLM made up is marked `"estimated": true`. `aclose` ends the upstream
    connection at once, whoever is waiting.
    """

    def __init__(
        self,
        begin: Callable[[], Awaitable[Opened]],
        timeout_s: float,
        stall_s: float,
        provider: str,
        model: str,
    ) -> None:
        self._begin = begin
        self._timeout_s = timeout_s
        self._stall_s = stall_s
        self._patience_s = math.inf
        self._deadline_s = 0.0
        self._waiting_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._late: GatewayTimeout | None = None
        self._closing: asyncio.Task[None] | None = None
        self._provider = provider
        self._model = model
        self._opened: Opened | None = None
        self._stream: AsyncIterator[Any] | None = None
        self._begun = False
        self._over = False

    def __aiter__(self) -> LiteLLMChunks:
        return self

    async def __anext__(self) -> dict[str, Any]:
        if self._over:
            raise StopAsyncIteration
        task = asyncio.current_task(self._loop)  # to find the loop out is a system call
        assert task is not None
        loop = self._loop = task.get_loop()
        self._waiting_since_s = loop.time()
        if self._timer is None:
            self._deadline_s = self._waiting_since_s + self._timeout_s
            self._watch(loop)
        cancelling = task.cancelling()
        self._waiting = task
        try:
            return await self._next()
        except BaseException as error:
            await self.aclose()
            if self._late in (None, error) or task.uncancel() > cancelling:
                raise
            raise self._late from None
        finally:
            self._waiting = None

    async def aclose(self) -> None:
        self._over = True
        if self._timer is not None:
            self._timer.cancel()
        if self._closing is not None:
            await asyncio.shield(self._closing)
        await self._close_upstream()

    async def _close_upstream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            await _close(stream)

    def _watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """Look whether time is up, and come again when it may be.

        One timer for the stream, and a time noted per chunk: a timer per chunk would cost as much
        as the chunk's own JSON. Only time that somebody waits counts as a stall: a client that is
        slow to take its chunks is not the provider's fault. Without one who waits, the upstream
        connection is closed here, and the next who comes learns of the deadline.
        """
        now_s = loop.time()
        since_s = now_s if self._waiting is None else self._waiting_since_s
        due_s = min(self._deadline_s, since_s + self._patience_s)
        if now_s < due_s:
            self._timer = loop.call_at(due_s, self._watch, loop)
            return
        if now_s >= self._deadline_s:
            self._late = self._timeout(f"did not end its answer within {self._timeout_s:g} s")
        else:
            self._late = self._timeout(f"sent nothing for {self._patience_s:g} s", STALLED)
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._closing = loop.create_task(self._close_upstream())

    def _hurry(self, patience_s: float) -> None:
        """Wait for a chunk no longer than so, from now on."""
        if patience_s < self._patience_s:
            self._patience_s = patience_s
            assert self._timer is not None
            self._timer.cancel()
            self._watch(asyncio.get_running_loop())

    def _timeout(self, said: str, code: str | None = None) -> GatewayTimeout:
        text = f"{self._provider} {said}"
        return GatewayTimeout(text, provider=self._provider, model=self._model, code=code)

    async def _next(self) -> dict[str, Any]:
        if self._late is not None:
            raise self._late
        if self._opened is None:
            self._opened = await self._begin()
            self._stream = self._opened.stream
            if self._over:  # closed meanwhile
                await self.aclose()
                raise StopAsyncIteration
            self._hurry(self._opened.stall_s)
        opened = self._opened
        try:
            if not self._begun:
                self._begun = True
                await self._watch_wire(opened)
            chunk = await anext(opened.stream)
            told: dict[str, Any] = chunk if opened.plain is None else opened.plain(chunk)
        except (StopAsyncIteration, GatewayError):
            raise
        except Exception as error:  # noqa: BLE001 - all of it is raised again, translated
            raise opened.error(error) from None
        if self._patience_s > self._stall_s:  # the first chunk
            self._waiting_since_s = asyncio.get_running_loop().time()
            self._hurry(self._stall_s)
        if opened.plain is None:
            return told
        if opened.says_end and any(choice.get("finish_reason") for choice in told["choices"]):
            self._check_finished(opened.stream)
        usage = told.get("usage")
        if usage is not None and not _reported(opened.stream):
            usage["estimated"] = True
        return told

    async def _watch_wire(self, opened: Opened) -> None:
        stream: Any = opened.stream
        if getattr(stream, "make_call", None) is not None and stream.completion_stream is None:
            await stream.fetch_stream()  # for some providers LiteLLM calls at the first chunk only
        for layer in _layers(stream):
            if isinstance(layer, httpx.Response):
                wire.watch(layer, opened.error, self._provider)
                return

    def _check_finished(self, stream: Any) -> None:
        """LiteLLM ends every stream with a finish reason; did the provider give one?"""
        for layer in _layers(stream):
            if hasattr(layer, "received_finish_reason"):
                if layer.received_finish_reason is None:
                    raise ProviderConnectionError(
                        f"{self._provider} broke off its answer",
                        provider=self._provider,
                        model=self._model,
                    )
                return


def _reported(stream: Any) -> bool:
    """Whether the provider itself said what it used; where it did not, LiteLLM counts words."""
    for layer in _layers(stream):
        chunks = getattr(layer, "chunks", None)
        if isinstance(chunks, list):
            return any(getattr(chunk, "usage", None) is not None for chunk in reversed(chunks))
    return True


def _layers(stream: Any) -> list[Any]:
    """A stream and what it reads from, down to the HTTP response that has the connection.

    LiteLLM's wrappers close what is just below them, if at all; below that are iterators and
    generators that keep the response to themselves.
    """
    found: list[Any] = []
    waiting = [stream]
    while waiting and len(found) < LAYERS_MAX:
        layer = waiting.pop(0)
        if layer is None or any(layer is known for known in found):
            continue
        found.append(layer)
        if isinstance(layer, AsyncGeneratorType):
            held = {} if layer.ag_frame is None else layer.ag_frame.f_locals
            waiting += [held.get(name) for name in _IN_GENERATORS]
        elif not isinstance(layer, httpx.Response):
            waiting += [getattr(layer, name, None) for name in _IN_OBJECTS]
    return found


async def _close(stream: Any) -> None:
    """Close what has the connection first, then what read from it."""
    for layer in reversed(_layers(stream)):
        close = getattr(layer, "aclose", None)
        if close is None:
            continue
        # What fails here was thrown away already.
        with contextlib.suppress(Exception):
            async with asyncio.timeout(CLOSE_S):
                await close()
