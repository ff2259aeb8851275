"""Callers over HTTP that spend money in every way, and what came of each request."""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx

from tests.support.upstream import Upstream

IN_FLIGHT_MIN = 16
IN_FLIGHT_WAIT_S = 60.0
CHAT, STREAM, LEFT, EMBED = "chat", "stream", "left", "embed"
WAYS = (CHAT, CHAT, STREAM, CHAT, EMBED, STREAM, LEFT, EMBED)


class Buyers:
    """`count` callers, each with a way of its own: plain chats, streams, streams that they leave
    after the first chunk, single texts to embed.

    Each request names itself in its text and in `x-request-id`. `came` has what came of it: the
    HTTP status where the gateway answered, else the exception's class.
    """

    def __init__(self, url: str, upstream: Upstream, count: int = 32) -> None:
        self._url = url
        self._upstream = upstream
        self._count = count
        self._run = uuid.uuid4().hex[:8]
        self._numbers = itertools.count()
        self._stopped = asyncio.Event()
        self.came: dict[str, int | str] = {}
        self.in_flight_min = 10**9

    @property
    def statuses(self) -> Counter[int | str]:
        return Counter(self.came.values())

    @property
    def served(self) -> list[str]:
        return [one for one, came in self.came.items() if came == 200]

    def pause(self, seconds: float) -> None:
        """Let them buy for a while, then see to it that enough calls are under way.

        Called from the thread of `during`, between its steps.
        """
        time.sleep(seconds)
        deadline = time.monotonic() + IN_FLIGHT_WAIT_S
        while (running := int(self._upstream.stats()["running"])) < IN_FLIGHT_MIN:
            assert time.monotonic() < deadline, f"only {running} calls in flight"
            time.sleep(0.02)
        self.in_flight_min = min(self.in_flight_min, running)

    async def run(self, during: Callable[[], None]) -> None:
        limits = httpx.Limits(max_connections=self._count, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self._url, timeout=60, limits=limits) as client:
            callers = [
                asyncio.create_task(self._buy(client, WAYS[number % len(WAYS)]))
                for number in range(self._count)
            ]
            try:
                await asyncio.to_thread(during)
            finally:
                self._stopped.set()
                await asyncio.gather(*callers)

    async def _buy(self, client: httpx.AsyncClient, way: str) -> None:
        while not self._stopped.is_set():
            name = f"{self._run}-{next(self._numbers)}"
            try:
                self.came[name] = came = await self._ask(client, way, name)
            except httpx.HTTPError as error:
                self.came[name] = came = type(error).__name__
            if came != 200:
                await asyncio.sleep(0.05)

    async def _ask(self, client: httpx.AsyncClient, way: str, name: str) -> int | str:
        headers = {"x-request-id": name}
        text = f"<{name}> what does a forebay do?"
        if way == EMBED:
            body: dict[str, Any] = {"model": "paid-embed", "input": [text], "dimensions": 8}
            answer = await client.post("/v1/embeddings", json=body, headers=headers)
            return _told(answer)
        body = {"model": "paid", "messages": [{"role": "user", "content": text}], "max_tokens": 32}
        if way == CHAT:
            answer = await client.post("/v1/chat/completions", json=body, headers=headers)
            return _told(answer)
        body["stream"] = True
        url = "/v1/chat/completions"
        async with client.stream("POST", url, json=body, headers=headers) as reply:
            lines = [line async for line in _until(reply, leave=way == LEFT)]
        if reply.status_code == 200 and way == LEFT:
            return "left"
        if reply.status_code == 200 and lines[-1:] != ["data: [DONE]"]:
            return "cut"
        if any(line.startswith('data: {"error"') for line in lines):
            return "error event"
        return _told(reply)


def _told(answer: httpx.Response) -> int | str:
    """Its status, if the gateway gave it; HAProxy, whose replica is gone, names no request."""
    by_gateway = "x-request-id" in answer.headers
    return answer.status_code if by_gateway else f"{answer.status_code} of HAProxy"


async def _until(reply: httpx.Response, leave: bool) -> Any:
    async for line in reply.aiter_lines():
        if line:
            yield line
            if leave:
                return
