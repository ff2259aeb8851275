"""Requests with large bodies, or with large answers, in a closed loop; in a process of its own.

    python -m benchmarks.body_load prompt http://127.0.0.1:8000/v1/chat/completions -c 8 -t 5

prompt   a chat of one message of 1 MiB; the answer must hold its digest
vectors  as many texts as make an answer of 4 MiB of JSON, with 1536 numbers each; one answer of
         CHECKED_EVERY is compared with its texts' own vectors, number by number, and the others
         must be within a tenth as long

Every text is unique.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import aiohttp
import numpy as np
import orjson
import uvloop

from benchmarks.apart import apart, ms_at
from tests.support.simulator.truth import digest, vectors

PROMPT_BYTES = 1 << 20
ANSWER_BYTES = 4 << 20
DIMENSIONS = 1536
TEXTS = 228
"""Numbers have some twelve digits, so that is 4 MiB."""
CHECKED_EVERY = 8
LINE = "What does a forebay do for the turbines behind it, and what for the river before it?\n"
FILLING = (LINE * (PROMPT_BYTES // len(LINE) + 1))[: PROMPT_BYTES - 40]
REQUEST_S = 120.0


@dataclass(frozen=True, slots=True)
class Bodies:
    """What came. `mb_per_s` counts the bodies of requests and answers."""

    requests: int
    requests_per_s: float
    mb_per_s: float
    p50_ms: float
    p99_ms: float
    answer_bytes: int
    statuses: dict[str, int]
    wrong: int


class _Bodies:
    """Owns the samples of one load."""

    def __init__(self, kind: str, url: str, keys: Sequence[str]) -> None:
        self.kind, self.url, self.keys = kind, url, list(keys)
        self.run_id = uuid.uuid4().hex[:12]
        self.sent = 0
        self.took_s: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.bytes = self.answer_bytes = self.wrong = 0

    async def call(self, session: aiohttp.ClientSession) -> None:
        n = self.sent
        self.sent += 1
        body, texts = self._body(n)
        headers = {"content-type": "application/json"}
        if self.keys:
            headers["authorization"] = f"Bearer {self.keys[n % len(self.keys)]}"
        begun_s = time.perf_counter()
        try:
            async with session.post(self.url, data=body, headers=headers) as response:
                answer, status = await response.read(), str(response.status)
        except (aiohttp.ClientError, TimeoutError) as error:
            answer, status = b"", type(error).__name__
        self.took_s.append(time.perf_counter() - begun_s)
        self.statuses[status] += 1
        self.bytes += len(body) + len(answer)
        self.answer_bytes = max(self.answer_bytes, len(answer))
        if status == "200":
            self.wrong += not self._is_right(n, texts, answer)

    def _body(self, n: int) -> tuple[bytes, list[str]]:
        mark = f"{self.run_id}-{n:06d}"
        if self.kind == "prompt":
            texts = [f"Question {mark}. {FILLING}"]
            messages = [{"role": "user", "content": texts[0]}]
            return orjson.dumps({"model": "sim", "messages": messages, "max_tokens": 64}), texts
        texts = [f"Text {i} of call {mark}, on forebays" for i in range(TEXTS)]
        return orjson.dumps({"model": "sim", "input": texts, "encoding_format": "float"}), texts

    def _is_right(self, n: int, texts: list[str], answer: bytes) -> bool:
        if self.kind == "prompt":
            return digest(texts[0]).encode() in answer
        if n % CHECKED_EVERY:
            return abs(len(answer) - ANSWER_BYTES) < ANSWER_BYTES / 10
        found = np.array([one["embedding"] for one in orjson.loads(answer)["data"]])
        want = vectors(texts, DIMENSIONS)
        return found.shape == want.shape and bool(np.allclose(found, want, atol=1e-6))


async def run(kind: str, url: str, keys: Sequence[str], concurrency: int, seconds: float) -> Bodies:
    load = _Bodies(kind, url, keys)
    timeout = aiohttp.ClientTimeout(total=REQUEST_S)
    begun_s = time.perf_counter()
    async with aiohttp.ClientSession(timeout=timeout) as session:

        async def caller() -> None:
            while time.perf_counter() < begun_s + seconds:
                await load.call(session)

        await asyncio.gather(*(caller() for _ in range(concurrency)))
    took_s = time.perf_counter() - begun_s
    ordered = sorted(load.took_s)
    return Bodies(
        requests=load.sent,
        requests_per_s=load.sent / took_s,
        mb_per_s=load.bytes / took_s / 2**20,
        p50_ms=ms_at(ordered, 0.5),
        p99_ms=ms_at(ordered, 0.99),
        answer_bytes=load.answer_bytes,
        statuses=dict(load.statuses),
        wrong=load.wrong,
    )


def in_process(
    kind: str, url: str, keys: Sequence[str], concurrency: int, seconds: float
) -> Bodies:
    """Do the load in a process of its own. Raises RuntimeError with its last words."""
    return Bodies(**apart("body_load", kind, url, "-c", concurrency, "-t", seconds, keys=keys))


def main() -> None:
    parser = argparse.ArgumentParser(prog="body_load", description=__doc__)
    parser.add_argument("kind", choices=("prompt", "vectors"))
    parser.add_argument("url")
    parser.add_argument("-c", "--concurrency", type=int, default=8)
    parser.add_argument("-t", "--seconds", type=float, default=5.0)
    given = parser.parse_args()
    keys = sys.stdin.read().split()
    found = uvloop.run(run(given.kind, given.url, keys, given.concurrency, given.seconds))
    print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
