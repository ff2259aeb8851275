"""A closed-loop HTTP load generator in a process of its own.

    python -m tests.support.loader http://127.0.0.1:8000/v1/chat/completions -c 64 -n 20000 --json

C connections are kept alive; each sends its next request when the last answer is whole. Every
prompt is unique, unless `--distinct D` says that there are only D of them, which loads of one
`--run` share; request i carries key i modulo the number of keys. Latency is measured from the
write of a request to the last byte of its answer; in SSE mode also to the first data chunk.
With `--check` an answer must contain the digest of its own prompt, or its own text's vector in
base64, so that an answer that reached the wrong caller is counted as wrong.

With `--rate R` the loop is open: requests are due at R a second on average, at moments that are
each other's no business (Poisson), and latency is measured from the moment a request was due, also
where all C connections were busy then.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import pybase64
import uvloop

from tests.support.simulator.truth import digest, vector

ROOT = Path(__file__).resolve().parents[2]
NUMBER_DIGITS = 9
ATTEMPT_S = 60.0
RECONNECTS_MAX = 1000
UNIQUE = "@UNIQUE@"
VECTOR_BYTES = 96  # of a vector, compared with its text's own
BODY = (
    '{"model":"%s","messages":[{"role":"user","content":"Question @UNIQUE@: what does a forebay '
    'do for the turbines behind it?"}],"max_tokens":64%s}'
)


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. `requests` or `seconds`, whichever comes first; the first `warmup` answers
    are sent and checked but not measured. `body` holds `@UNIQUE@` where the prompt's own number
    goes; None: a small chat completion of `model`. `distinct`: request n asks what request n modulo
    `distinct` asked; `run` names the questions, so that two loads can ask the same ones. `rate`:
    an open loop of so many requests a second; `dimensions` of the vectors that `check` expects;
    `headers` go with every request."""

    url: str
    concurrency: int = 8
    requests: int | None = None
    seconds: float | None = None
    warmup: int = 0
    keys: Sequence[str] = ()
    model: str = "sim"
    stream: bool = False
    body: str | None = None
    check: bool = False
    method: str = "POST"
    distinct: int | None = None
    run: str = ""
    rate: float | None = None
    dimensions: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Result:
    """What came back. Latencies in ms, None without an answer; `statuses` by HTTP status, and
    by "reset", "refused", "timeout", "cut" for those that have none. `sent` includes warm-up."""

    requests: int
    sent: int
    seconds: float
    requests_per_s: float
    p50_ms: float | None
    p90_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    statuses: dict[str, int]
    wrong: int
    bytes_in: int
    loader_cpu: float
    chunks: int = 0
    chunks_per_s: float = 0.0
    first_chunk_p50_ms: float | None = None
    first_chunk_p99_ms: float | None = None
    errors: list[str] = field(default_factory=list)

    @property
    def ok(self) -> int:
        return self.statuses.get("200", 0)


class _Run:
    """Owns the count of what is sent and all samples of one load."""

    def __init__(self, load: Load) -> None:
        self.load = load
        parts = urlsplit(load.url)
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 80
        body = BODY % (load.model, ',"stream":true' if load.stream else "")
        body = load.body if load.body is not None else body
        self.run_id = load.run or uuid.uuid4().hex[:12]
        mark = f"{self.run_id}-{'0' * NUMBER_DIGITS}"
        before, found, after = body.partition(UNIQUE)
        self.parts = (before.encode(), after.encode()) if found else None
        self.plain_body = body.encode()
        length = len(body.replace(UNIQUE, mark).encode())
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        more = "".join(f"{name}: {value}\r\n" for name, value in load.headers.items())
        self.heads = [
            (
                f"{load.method} {target} HTTP/1.1\r\nhost: {self.host}:{self.port}\r\n"
                "user-agent: forebay-loader\r\ncontent-type: application/json\r\n"
                + more
                + (f"authorization: Bearer {key}\r\n" if key else "")
                + (f"content-length: {length}\r\n" if length else "")
                + "\r\n"
            ).encode()
            for key in (load.keys or [""])
        ]
        self.prompt = None
        if load.check:
            told = json.loads(body)
            self.prompt = told.get("input") or told["messages"][-1]["content"]
        self.dice = random.Random(self.run_id)
        self.due_s = 0.0
        self.sent = 0
        self.answered = 0
        self.latencies_s = array("d")
        self.first_chunks_s = array("d")
        self.statuses: Counter[str] = Counter()
        self.wrong = 0
        self.chunks = 0
        self.bytes_in = 0
        self.errors: list[str] = []
        self.begun_s = time.perf_counter()
        self.measured_from_s = 0.0
        self.until_s = float("inf")
        self.requests_max = float("inf") if load.requests is None else load.requests + load.warmup

    def next_request(self) -> tuple[int, bytes] | None:
        """The number and bytes of the next request; None when the load is over."""
        n = self.sent
        if n >= self.requests_max or time.perf_counter() >= self.until_s:
            return None
        self.sent = n + 1
        if self.load.rate is not None:
            self.due_s = max(self.due_s, self.begun_s) + self.dice.expovariate(self.load.rate)
        head = self.heads[n % len(self.heads)]
        if self.parts is None:
            return n, head + self.plain_body
        before, after = self.parts
        return n, b"%b%b%b-%09d%b" % (head, before, self.run_id.encode(), self._asked(n), after)

    def _asked(self, n: int) -> int:
        return n if self.load.distinct is None else n % self.load.distinct

    def expected(self, n: int) -> bytes:
        assert self.prompt is not None
        mark = f"{self.run_id}-{self._asked(n):0{NUMBER_DIGITS}d}"
        prompt = self.prompt.replace(UNIQUE, mark)
        if not self.load.dimensions:
            return digest(prompt).encode()
        row = vector(prompt, self.load.dimensions).astype("<f4")
        return pybase64.b64encode(row.data.cast("B")[:VECTOR_BYTES])

    def book(
        self, status: str, latency_s: float, first_chunk_s: float | None, chunks: int, size: int
    ) -> None:
        self.answered += 1
        if self.answered <= self.load.warmup:
            if self.answered == self.load.warmup:
                self.measure()
            return
        self.statuses[status] += 1
        self.latencies_s.append(latency_s)
        self.chunks += chunks
        self.bytes_in += size
        if first_chunk_s is not None:
            self.first_chunks_s.append(first_chunk_s)

    def fail(self, kind: str, detail: str) -> None:
        self.answered += 1
        if self.answered > self.load.warmup:
            self.statuses[kind] += 1
        elif self.answered == self.load.warmup:
            self.measure()
        if len(self.errors) < 5:
            self.errors.append(f"{kind}: {detail}"[:500])

    def measure(self) -> None:
        """The measured time begins."""
        self.measured_from_s = time.perf_counter()
        if self.load.seconds is not None:
            self.until_s = self.measured_from_s + self.load.seconds


class _Caller(asyncio.Protocol):
    """One connection: sends, reads, books, sends again, until the load is over."""

    def __init__(self, run: _Run, done: asyncio.Future[str]) -> None:
        self._run = run
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None
        self._busy = False
        self._n = 0
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._send()

    def _send(self) -> None:
        request = self._run.next_request()
        if request is None:
            self._finish("over")
            return
        self._n, data = request
        if self._run.load.rate is None:
            self._write(data)
            return
        self._sent_s = self._run.due_s
        wait_s = max(0.0, self._sent_s - time.perf_counter())
        asyncio.get_running_loop().call_later(wait_s, self._write, data)

    def _write(self, data: bytes) -> None:
        if self._done.done():
            return  # it was closed before its request was due
        self._busy = True
        self._parser = httptools.HttpResponseParser(self)
        self._first_chunk_s: float | None = None
        self._chunks = 0
        self._size = 0
        self._body: list[bytes] = []
        self._tail = b""
        assert self._transport is not None
        if self._run.load.rate is None:
            self._sent_s = time.perf_counter()
        self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail("malformed", repr(error))

    def on_body(self, body: bytes) -> None:
        run = self._run
        if run.load.stream:
            if self._first_chunk_s is None:
                self._first_chunk_s = time.perf_counter() - self._sent_s
            seen = self._tail + body
            self._chunks += seen.count(b"\ndata:") + (not self._tail and seen.startswith(b"data:"))
            self._tail = seen[-5:]
        if run.load.check:
            self._body.append(body)

    def on_message_complete(self) -> None:
        run = self._run
        self._busy = False
        status = self._parser.get_status_code()
        latency_s = time.perf_counter() - self._sent_s
        if run.load.check and status == 200:
            text = b"".join(self._body)
            if run.load.stream:
                text = _stream_text(text)
            if run.expected(self._n) not in text:
                run.wrong += 1
        elif status != 200 and len(run.errors) < 5:
            run.errors.append(f"status {status}")
        run.book(str(status), latency_s, self._first_chunk_s, self._chunks, self._size)
        if self._parser.should_keep_alive():
            self._send()
        else:
            self._finish("reconnect")

    def connection_lost(self, exc: Exception | None) -> None:
        if self._busy:
            self._fail("reset" if exc is not None or not self._size else "cut", repr(exc))
        elif not self._done.done():
            self._fail("idle", "closed before its request was due")

    def give_up_after(self, age_s: float) -> None:
        if self._busy and time.perf_counter() - self._sent_s > age_s:
            self._fail("timeout", f"no answer in {age_s} s")

    def _fail(self, kind: str, detail: str) -> None:
        self._busy = False
        self._run.fail(kind, detail)
        self._finish("reconnect")

    def _finish(self, how: str) -> None:
        if self._transport is not None:
            self._transport.close()
        if not self._done.done():
            self._done.set_result(how)


async def _connection(run: _Run) -> None:
    """Keep one connection going; a broken one is replaced, RECONNECTS_MAX times."""
    loop = asyncio.get_running_loop()
    for _ in range(RECONNECTS_MAX):
        done: asyncio.Future[str] = loop.create_future()
        try:
            _, caller = await loop.create_connection(
                lambda done=done: _Caller(run, done),  # type: ignore[misc]
                run.host,
                run.port,
            )
        except OSError as error:
            if run.next_request() is None:
                return
            run.fail("refused", repr(error))
            await asyncio.sleep(0.05)
            continue
        while not done.done():
            await asyncio.wait([done], timeout=1.0)
            caller.give_up_after(ATTEMPT_S)
        if done.result() == "over":
            return


async def run(load: Load) -> Result:
    """Do the load on the running loop."""
    if load.requests is None and load.seconds is None:
        raise ValueError("requests or seconds must be given")
    state = _Run(load)
    cpu_from_s = _cpu_s()
    if load.warmup == 0:
        state.measure()
    await asyncio.gather(*(_connection(state) for _ in range(load.concurrency)))
    seconds = time.perf_counter() - state.measured_from_s
    latencies = sorted(state.latencies_s)
    first = sorted(state.first_chunks_s)
    count = sum(state.statuses.values())
    return Result(
        requests=count,
        sent=state.sent,
        seconds=seconds,
        requests_per_s=count / seconds if seconds else 0.0,
        p50_ms=_percentile_ms(latencies, 0.50),
        p90_ms=_percentile_ms(latencies, 0.90),
        p99_ms=_percentile_ms(latencies, 0.99),
        max_ms=_percentile_ms(latencies, 1.0),
        statuses=dict(state.statuses),
        wrong=state.wrong,
        bytes_in=state.bytes_in,
        loader_cpu=(_cpu_s() - cpu_from_s) / seconds if seconds else 0.0,
        chunks=state.chunks,
        chunks_per_s=state.chunks / seconds if seconds else 0.0,
        first_chunk_p50_ms=_percentile_ms(first, 0.50),
        first_chunk_p99_ms=_percentile_ms(first, 0.99),
        errors=state.errors,
    )


def in_process(load: Load, *, cpu: int | None = None, timeout_s: float = 600.0) -> Result:
    """Do the load in a process of its own, on one core if `cpu` says which."""
    with tempfile.TemporaryDirectory(prefix="loader-") as scratch:
        path = Path(scratch, "load.json")
        path.write_text(json.dumps(asdict(load)))
        command = [sys.executable, "-m", "tests.support.loader", "--load", str(path), "--json"]
        if cpu is not None:
            command += ["--cpu", str(cpu)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"the loader failed: {done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout))


def _percentile_ms(samples: Sequence[float], share: float) -> float | None:
    """Nearest rank."""
    if not samples:
        return None
    rank = min(len(samples) - 1, max(0, int(share * len(samples) + 0.999999) - 1))
    return round(samples[rank] * 1000.0, 3)


def _stream_text(body: bytes) -> bytes:
    """The answer of an SSE stream in OpenAI's shape."""
    chunks = [json.loads(line[6:]) for line in body.split(b"\n") if line.startswith(b"data: {")]
    deltas = [choice.get("delta", {}) for chunk in chunks for choice in chunk.get("choices", ())]
    return "".join(delta.get("content") or "" for delta in deltas).encode()


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def main(argv: Sequence[str] | None = None, echo: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(prog="loader", description=__doc__)
    parser.add_argument("url", nargs="?")
    parser.add_argument("-c", "--concurrency", type=int, default=8)
    parser.add_argument("-n", "--requests", type=int)
    parser.add_argument("-t", "--seconds", type=float)
    parser.add_argument("--warmup", type=int, default=0)
    parser.add_argument("--key", dest="keys", action="append", default=[])
    parser.add_argument("--keys-file", type=Path, help="one key a line")
    parser.add_argument("--model", default="sim")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--body", help="with @UNIQUE@ where the number of the request goes")
    parser.add_argument("--method", default="POST")
    parser.add_argument("--distinct", type=int, help="how many prompts there are; all by default")
    parser.add_argument(
        "--run", default="", help="the name of the questions, in place of a new one"
    )
    parser.add_argument("--rate", type=float, help="requests/s of an open loop")
    parser.add_argument("--dimensions", type=int, default=0, help="check vectors, of so many")
    parser.add_argument("--load", type=Path, help="a Load as JSON, in place of all others")
    parser.add_argument("--cpu", type=int, help="run on this core")
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args(argv))
    as_json, cpu, path = given.pop("json"), given.pop("cpu"), given.pop("load")
    keys_file = given.pop("keys_file")
    if keys_file is not None:
        given["keys"] += keys_file.read_text().split()
    if path is None and given["url"] is None:
        parser.error("give a URL or --load")
    load = Load(**(json.loads(path.read_text()) if path is not None else given))
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    result = uvloop.run(run(load))
    if as_json:
        echo(json.dumps(asdict(result)))
        return
    for name, value in asdict(result).items():
        echo(f"{name:20} {value:.3f}" if isinstance(value, float) else f"{name:20} {value}")


if __name__ == "__main__":
    main()
