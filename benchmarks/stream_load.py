"""Streams, one after the other on each of so many connections, and when each chunk arrived.

    python -m benchmarks.stream_load http://127.0.0.1:8000/v1/chat/completions -c 500

All connections begin at once. A chunk is an event with data that is not `[DONE]`; events that
arrive in one read have no gap between them. Every prompt is unique and every answer must hold its
own prompt's digest. A stream that does not end with `[DONE]` is broken.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import uvloop

from benchmarks.apart import apart, ms_at
from tests.support.simulator.truth import digest

PROMPT = "Question %s-%06d: what does a forebay do for the turbines behind it?"
STREAM_S = 120.0


@dataclass(frozen=True, slots=True)
class Streams:
    """What came. Times in ms; `gap_mean_ms` is a stream's time from its first chunk to its last by
    the chunks between, the median of all streams. `broken` says why, of the first few."""

    streams: int
    chunks: int
    first_p50_ms: float
    first_p99_ms: float
    first_max_ms: float
    gap_mean_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    seconds: float
    wrong: int
    broken: list[str]


class _Streams:
    """Owns the samples of one load."""

    def __init__(self, url: str, keys: Sequence[str], tokens: int) -> None:
        self.parts = urlsplit(url)
        self.keys = list(keys) or [""]
        self.tokens = tokens
        self.run_id = uuid.uuid4().hex[:12]
        self.sent = 0
        self.firsts_s: list[float] = []
        self.means_s: list[float] = []
        self.gaps_s: list[float] = []
        self.chunks = 0
        self.wrong = 0
        self.broken: list[str] = []

    def request(self) -> tuple[bytes, str]:
        """The next request, and its prompt's digest."""
        n = self.sent
        self.sent += 1
        prompt = PROMPT % (self.run_id, n)
        messages = [{"role": "user", "content": prompt}]
        body = json.dumps(
            {"model": "sim", "messages": messages, "stream": True, "max_tokens": self.tokens}
        ).encode()
        key = self.keys[n % len(self.keys)]
        head = (
            f"POST {self.parts.path} HTTP/1.1\r\nhost: {self.parts.netloc}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
            + (f"authorization: Bearer {key}\r\n" if key else "")
            + "\r\n"
        )
        return head.encode() + body, digest(prompt)

    def book(self, sent_s: float, arrived_s: Sequence[float], text: bytes, mark: str) -> None:
        events = [line[6:] for line in text.split(b"\n") if line.startswith(b"data: ")]
        if not events or events[-1].strip() != b"[DONE]":
            self.broken.append(f"no [DONE] after {len(events)} events")
            return
        chunks = [json.loads(event) for event in events[:-1]]
        said = "".join(
            choice["delta"].get("content") or "" for one in chunks for choice in one["choices"]
        )
        self.wrong += mark not in said
        self.chunks += len(chunks)
        times_s = arrived_s[: len(chunks)]
        self.firsts_s.append(times_s[0] - sent_s)
        self.means_s.append((times_s[-1] - times_s[0]) / max(len(times_s) - 1, 1))
        self.gaps_s += [b - a for a, b in pairwise(times_s)]


class _Caller(asyncio.Protocol):
    """One connection with one stream after the other."""

    def __init__(self, load: _Streams, streams: int, done: asyncio.Future[None]) -> None:
        self._load, self._left, self._done = load, streams, done
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._next()

    def _next(self) -> None:
        if not self._left:
            self._end()
            return
        self._left -= 1
        self._parser: Any = httptools.HttpResponseParser(self)
        self._text: list[bytes] = []
        self._tail = b"\n"
        self._arrived_s: list[float] = []
        data, self._mark = self._load.request()
        self._sent_s = time.perf_counter()
        assert self._transport is not None
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._text.append(body)
        seen = self._tail + body
        self._arrived_s += [self._now_s] * seen.count(b"\ndata:")
        self._tail = seen[-5:]

    def on_message_complete(self) -> None:
        status = self._parser.get_status_code()
        text = b"".join(self._text)
        if status == 200:
            self._load.book(self._sent_s, self._arrived_s, text, self._mark)
        else:
            self._load.broken.append(f"status {status}: {text[:200]!r}")
        if self._parser.should_keep_alive():
            self._next()
        elif self._left:
            self._end(f"the connection was closed with {self._left} streams to come")
        else:
            self._end()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(f"the connection was lost: {exc!r}")

    def _end(self, broken: str = "") -> None:
        if self._done.done():
            return
        if broken:
            self._load.broken.append(broken)
        self._done.set_result(None)
        if self._transport is not None:
            self._transport.close()


async def run(url: str, keys: Sequence[str], connections: int, each: int, tokens: int) -> Streams:
    load = _Streams(url, keys, tokens)
    loop = asyncio.get_running_loop()
    host, port = load.parts.hostname or "127.0.0.1", load.parts.port or 80
    begun_s = time.perf_counter()

    async def caller() -> None:
        done: asyncio.Future[None] = loop.create_future()
        await loop.create_connection(lambda: _Caller(load, each, done), host, port)
        try:
            async with asyncio.timeout(STREAM_S * each):
                await done
        except TimeoutError:
            load.broken.append(f"not over after {STREAM_S * each:.0f} s")

    await asyncio.gather(*(caller() for _ in range(connections)))
    firsts_s, gaps_s = sorted(load.firsts_s), sorted(load.gaps_s)
    return Streams(
        streams=load.sent,
        chunks=load.chunks,
        first_p50_ms=ms_at(firsts_s, 0.5),
        first_p99_ms=ms_at(firsts_s, 0.99),
        first_max_ms=ms_at(firsts_s, 1.0),
        gap_mean_ms=ms_at(sorted(load.means_s), 0.5),
        gap_p99_ms=ms_at(gaps_s, 0.99),
        gap_max_ms=ms_at(gaps_s, 1.0),
        seconds=time.perf_counter() - begun_s,
        wrong=load.wrong,
        broken=load.broken[:5] + ([f"{len(load.broken)} in all"] if len(load.broken) > 5 else []),
    )


def in_process(url: str, keys: Sequence[str], connections: int, each: int, tokens: int) -> Streams:
    """Do the load in a process of its own. Raises RuntimeError with its last words."""
    words = ["-c", connections, "-n", each, "--tokens", tokens]
    return Streams(**apart("stream_load", url, *words, keys=keys))


def main() -> None:
    parser = argparse.ArgumentParser(prog="stream_load", description=__doc__)
    parser.add_argument("url")
    parser.add_argument("-c", "--connections", type=int, default=8)
    parser.add_argument("-n", "--each", type=int, default=1, help="streams a connection")
    parser.add_argument("--tokens", type=int, default=64, help="max_tokens of each")
    given = parser.parse_args()
    keys = sys.stdin.read().split()
    found = uvloop.run(run(given.url, keys, given.connections, given.each, given.tokens))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
