"""Clients that read streams, and a provider's stream that goes on when a test says so."""

from __future__ import annotations

import asyncio
from typing import Any

from forebay.call import Stream
from tests.support.fake_time import settle
from tests.support.house import House


def words(chunks: list[dict[str, Any]]) -> str:
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


async def drained(stream: Stream) -> list[dict[str, Any]]:
    return [chunk async for chunk in stream.chunks]


async def opened(here: House, **details: Any) -> Stream:
    return await here.pipeline.stream(here.call(**details))


class Slow:
    """A provider's stream that goes on word by word, as the test says."""

    def __init__(self, here: House) -> None:
        self._gates = [asyncio.Event() for _ in range(10)]
        here.provider.words = tuple("abcdefghij")
        here.provider.gates = list(self._gates)

    async def say(self, count: int) -> None:
        """Words that may come by now."""
        for gate in self._gates[:count]:
            gate.set()
        for _ in range(10):
            await settle()


class Reader:
    """A client that reads a stream as it comes."""

    def __init__(self, here: House, **details: Any) -> None:
        self.call = here.call(**details)
        self.stream: Stream | None = None
        self.chunks: list[dict[str, Any]] = []
        self._task = asyncio.create_task(self._read(here))

    async def _read(self, here: House) -> None:
        self.stream = await here.pipeline.stream(self.call)
        async for chunk in self.stream.chunks:
            self.chunks.append(chunk)

    @property
    def heard(self) -> str:
        return words(self.chunks)

    @property
    def cache(self) -> str:
        return "" if self.stream is None else self.stream.facts.cache

    async def hears(self, text: str) -> None:
        """Wait until it has heard so much."""
        async with asyncio.timeout(5):
            while self.heard != text:
                await settle()

    async def end(self) -> None:
        await self._task

    async def leave(self) -> None:
        """As a server's task is cancelled whose client hangs up."""
        self._task.cancel()
        await asyncio.wait([self._task])
        if self.stream is not None:
            await self.stream.chunks.aclose()
