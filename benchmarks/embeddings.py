"""What embeddings cost and how fast they come: Forebay, LiteLLM's function, LiteLLM Proxy.

    python -m benchmarks.embeddings            # about 8 minutes
    python -m benchmarks.embeddings --quick    # about 5 minutes
    python -m benchmarks.embeddings --only lane

  lane     128 texts a call, 1536 dimensions, an upstream that answers at once: vectors per CPU
           second of the one process that calls, through Forebay's LiteLLM lane and with
           `litellm.aembedding` as it comes; turns of each
  clients  an upstream of 50 ms and 0.25 ms a text that does 4 calls at a time, and requests with
           one text each over HTTP: 200 clients who each ask again when they have their answer, and
           then 5, 100 and 1,000 requests a second at random moments, latency measured from the
           moment a request is due. Of three systems: Forebay with 50 tenants, keys, limits and
           ledger; the same with `enable_request_batching` off, so one call per request; and
           LiteLLM Proxy, one worker
  parquet  `forebay embed` over a Parquet file on that upstream, 32 texts a call, from the
           first call's beginning to the last one's end, against what the upstream can do at most in
           that time; and against Ray Data's HttpRequestProcessor with one worker for each of the
           calls that the upstream does at a time, over fewer rows. What starting takes, some ten
           to twenty seconds of either, whatever the number of rows, is told beside it

The load is honest: every text is unique, every vector that comes is compared with its own text's,
all answers are 200, Forebay's ledger has as many rows as requests were sent, and its tokens are
those that the upstream has counted. Exit code 1 when one of these does not hold; missed goals are
only told.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import options, peers
from benchmarks.apart import ROOT, apart
from benchmarks.embedding_lane import DIMENSIONS
from benchmarks.options import measured, parser_of, say, tell_goal
from benchmarks.processes import Child
from benchmarks.system import LEDGER_WAIT_S, LIMITS, START_S, System, await_rest
from tests.support.loader import Load, in_process
from tests.support.simulator.truth import vectors
from tests.support.upstream import Record, Upstream

TEXTS_PER_CALL = 128
CLIENTS = 200
REQUESTS = 10_000
RATES = {5: 8, 100: 100, 1_000: 1_000}
"""Requests/s, and the most connections that carry them."""
UPSTREAM = {"latency": 0.05, "latency_per_text": 0.00025, "concurrency": 4}
BODY = (
    '{"model":"sim","encoding_format":"base64","input":"Question @UNIQUE@: what does a forebay do '
    'for the turbines behind it?"}'
)
JOB_TEXTS, JOB_DIMENSIONS = 32, 256
JOB_ROWS, JOB_ROWS_QUICK = 60_000, 20_000
HTTP_ROWS = 800
JOB_S = 300.0
LANE_GOAL, CLIENTS_GOAL, LIMIT_GOAL, HTTP_GOAL = 25.0, 10.0, 0.95, 10.0
LANES = f"lane / litellm.aembedding, {DIMENSIONS} dimensions"
JOB, LIMIT = "forebay embed, rows/s", "the upstream's own limit, rows/s"
HTTP_JOB = "HttpRequestProcessor, rows/s"
NAMES = {
    "forebay": "Forebay",
    "single": "Forebay, one call per request",
    "peer": "LiteLLM Proxy",
}


@dataclass(slots=True)
class Row:
    """One system under one load; `rate` None: CLIENTS clients in a closed loop."""

    system: str
    rate: int | None
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    requests: int
    upstream_calls: int
    cpu_s: float


@dataclass(slots=True)
class Report(options.Report):
    rows: list[Row] = field(default_factory=list)

    def row(self, system: str, rate: int | None) -> Row | None:
        for row in self.rows:
            if (row.system, row.rate) == (system, rate):
                return row
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn or a figure is, how many turns, how many requests 200 clients make, and how
    many rows the job has."""

    seconds: float
    rounds: int
    requests: int
    rows: int


# --------------------------------------------------------------------------------------- lane


def lane(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    of = {"forebay": "Forebay's lane", "litellm": "litellm.aembedding"}
    words = ["--url", f"{upstream.url}/v1", "-n", TEXTS_PER_CALL, "-t", plan.seconds]
    for number in range(plan.rounds):
        rates = {}
        for side in of:
            came = apart("embedding_lane", side, *words)
            rates[side] = came["vectors_per_cpu_s"]
            report.add(f"vectors per CPU second, {of[side]}", rates[side])
            say(
                f"  {side:8}{rates[side]:11,.0f} vectors per CPU second"
                f"{came['ms_per_call']:10.2f} ms a call"
            )
            if came["wrong"]:
                report.problems.append(f"lane, {side}, turn {number}: {came['wrong']} wrong calls")
        report.add(LANES, rates["forebay"] / rates["litellm"])


# ------------------------------------------------------------------------------------ clients


@dataclass(frozen=True, slots=True)
class Running:
    """What answers: where, with which keys, and its processes; `system` if it is a Forebay."""

    url: str
    keys: Sequence[str]
    child: Child
    system: System | None = None


def clients(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    sides: dict[str, Callable[[], AbstractContextManager[Running]]] = {
        "forebay": lambda: forebay(upstream, scratch, "forebay"),
        "single": lambda: forebay(upstream, scratch, "single", enable_request_batching=False),
        "peer": lambda: litellm_proxy(upstream, scratch),
    }
    say(HEADER)
    for name, side in sides.items():
        upstream.reset()
        with report.part(NAMES[name]), side() as running:
            upstream.script(dims=DIMENSIONS, **UPSTREAM)
            for rate in (None, *RATES):
                ask(report, plan, name, running, upstream, rate)
            if running.system is not None:
                audit(report, name, running.system, upstream)
    upstream.reset()


def ask(
    report: Report, plan: Plan, name: str, running: Running, upstream: Upstream, rate: int | None
) -> None:
    """One load and its row."""
    before, cpu_before_s = upstream.stats()["requests"], running.child.cpu_s()
    load = Load(
        f"{running.url}/v1/embeddings",
        concurrency=CLIENTS if rate is None else RATES[rate],
        requests=plan.requests if rate is None else None,
        seconds=2 * plan.seconds if rate is None else plan.seconds,
        keys=list(running.keys),
        body=BODY,
        check=True,
        dimensions=DIMENSIONS,
        rate=rate,
    )
    result = in_process(load)
    report.check(f"{name}, {'closed loop' if rate is None else f'{rate} requests/s'}", result)
    if running.system is not None:
        running.system.sent += result.sent
    row = Row(
        name,
        rate,
        result.requests_per_s,
        result.p50_ms or 0.0,
        result.p99_ms or 0.0,
        result.sent,
        upstream.stats()["requests"] - before,
        running.child.cpu_s() - cpu_before_s,
    )
    report.rows.append(row)
    say(told(row))


def audit(report: Report, name: str, system: System, upstream: Upstream) -> None:
    """The ledger against what was sent, and against what the upstream has counted."""
    rows, tokens = system.rows(), system.usage()["prompt_tokens"]
    counted = sum(record.prompt_tokens for record in upstream.log())
    report.facts[f"{name}: requests sent / ledger rows"] = f"{system.sent} / {rows}"
    report.facts[f"{name}: tokens, upstream / ledger"] = f"{counted} / {tokens}"
    if rows != system.sent:
        report.problems.append(
            f"{name}: {system.sent} requests were sent, the ledger has {rows} rows after "
            f"{LEDGER_WAIT_S} s"
        )
    if counted != tokens:
        report.problems.append(
            f"{name}: the upstream counted {counted} tokens, the ledger {tokens}"
        )


def embedder(upstream: Upstream, scratch: Path, name: str, **gateway: Any) -> System:
    """A Forebay that embeds, with as many requests at once as the loads have connections."""
    return System(
        name,
        upstream.url,
        scratch,
        limits={**LIMITS, "concurrent_requests": 2 * max(RATES.values())},
        gateway={"enable_request_batching": True, "timeout": 120, **gateway},
        first=("embeddings", {"model": "sim", "input": "The first text", "dimensions": DIMENSIONS}),
    )


@contextmanager
def forebay(upstream: Upstream, scratch: Path, name: str, **gateway: Any) -> Iterator[Running]:
    with embedder(upstream, scratch, name, **gateway) as system:
        yield Running(system.url, system.keys, system.child, system)


@contextmanager
def litellm_proxy(upstream: Upstream, scratch: Path) -> Iterator[Running]:
    with peers.running("litellm-proxy", upstream.url, scratch) as peer:
        first = {"model": "sim", "input": "The first text"}
        url, key = f"{peer.url}/v1/embeddings", peer.keys[0]
        peer.child.await_200(url, START_S, key=key, body=first)
        await_rest(peer.child)
        yield Running(peer.url, peer.keys, peer.child)


# ------------------------------------------------------------------------------------ parquet


def parquet(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet as files

    src = scratch / "texts.parquet"
    texts = [
        f"Row {n}: what does a forebay do for the turbines behind it?" for n in range(plan.rows)
    ]
    files.write_table(pa.table({"id": range(plan.rows), "text": texts}), src)
    upstream.reset()
    with embedder(upstream, scratch, "parquet", batch_size=JOB_TEXTS) as system:
        before = upstream.stats()["requests"]
        upstream.script(**UPSTREAM)
        dst = scratch / "vectors"
        command = [sys.executable, "-m", "forebay", "embed", str(src), str(dst), "--json"]
        command += ["--model", "sim", "--text-column", "text", "--id-column", "id"]
        command += ["--dimensions", str(JOB_DIMENSIONS)]
        took_s = ran(command, scratch / "job.log", system.environ)
        calls = upstream.log()[before:]
        report.figures[JOB] = rate_of(calls)
    check_vectors(report, dst, texts)
    most = UPSTREAM["latency"] + UPSTREAM["latency_per_text"] * JOB_TEXTS
    report.figures[LIMIT] = UPSTREAM["concurrency"] * JOB_TEXTS / most
    report.facts["parquet: rows / texts sent / calls"] = (
        f"{plan.rows} / {sum(call.texts for call in calls)} / {len(calls)}"
    )
    report.facts["parquet: the whole job, from the command to its end"] = whole(plan.rows, took_s)
    upstream.reset()
    upstream.script(**UPSTREAM)
    command = [sys.executable, "-m", "benchmarks.http_request_job", str(src)]
    command += ["--url", f"{upstream.url}/v1/embeddings", "--rows", str(HTTP_ROWS)]
    command += ["-c", str(UPSTREAM["concurrency"]), "--dimensions", str(JOB_DIMENSIONS)]
    took_s = ran(command, scratch / "http_request_job.log")
    report.facts["HttpRequestProcessor: the same"] = whole(HTTP_ROWS, took_s)
    report.figures[HTTP_JOB] = rate_of(upstream.log())
    upstream.reset()


def ran(command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None) -> float:
    """Seconds that a command took. Raises RuntimeError with the end of its log where it fails."""
    begun_s = time.perf_counter()
    with log.open("w") as out:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **(environ or {})},
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
            timeout=JOB_S,
        )
    if done.returncode != 0:
        raise RuntimeError(f"ended with {done.returncode}: {log.read_text()[-2000:]}")
    return time.perf_counter() - begun_s


def whole(rows: int, took_s: float) -> str:
    return f"{rows:,} rows in {took_s:.1f} s, {rows / took_s:,.0f} rows/s"


def rate_of(calls: Sequence[Record]) -> float:
    """Texts/s from the first call's beginning to the last one's end."""
    ends = [call.end_mono_ns or 0 for call in calls]
    took_ns = max(ends) - min(call.start_mono_ns for call in calls)
    return sum(call.texts for call in calls) / took_ns * 1e9


def check_vectors(report: Report, dst: Path, texts: Sequence[str]) -> None:
    from pyarrow import parquet as files

    found = files.read_table(dst, columns=["id", "embedding"]).to_pydict()
    if sorted(found["id"]) != list(range(len(texts))):
        report.problems.append(f"parquet: {len(texts)} rows went in, {len(found['id'])} came out")
    some = range(0, len(found["id"]), 97)
    want = vectors([texts[found["id"][row]] for row in some], JOB_DIMENSIONS)
    if not np.array_equal([found["embedding"][row] for row in some], want):
        report.problems.append("parquet: vectors of another text")


PARTS: dict[str, Callable[[Report, Plan, Upstream, Path], None]] = {
    "lane": lane,
    "clients": clients,
    "parquet": parquet,
}


# ----------------------------------------------------------------------------------- the report

HEADER = (
    f"  {'':30}{'':>12}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'sent':>8}{'calls':>8}"
    f"{'CPU us':>9}"
)


def told(row: Row) -> str:
    load = f"{CLIENTS} clients" if row.rate is None else f"{row.rate:,}/s"
    return (
        f"  {NAMES[row.system]:30}{load:>12}{row.requests_per_s:12,.1f}{row.p50_ms:10.1f}"
        f"{row.p99_ms:10.1f}{row.requests:8,}{row.upstream_calls:8,}"
        f"{row.cpu_s / max(row.requests, 1) * 1e6:9,.0f}"
    )


def show(report: Report) -> None:
    if report.rows:
        print(HEADER)
    for row in report.rows:
        print(told(row))
    print()
    for name, values in report.rounds.items():
        each = " ".join(f"{value:,.1f}" for value in values)
        print(f"  {name:48}{statistics.median(values):12,.1f}   of {each}")
    ratios = report.rounds.get(LANES, [])
    tell_goal("lane / litellm.aembedding", ratios, ">=", LANE_GOAL)
    ours = report.row("forebay", None)
    for other in ("single", "peer"):
        theirs = report.row(other, None)
        if ours is not None and theirs is not None and theirs.requests_per_s:
            ratio = ours.requests_per_s / theirs.requests_per_s
            name = f"{CLIENTS} clients, Forebay / {NAMES[other]}"
            tell_goal(name, [ratio], ">=", CLIENTS_GOAL)
    for name, rate in report.figures.items():
        print(f"  {name:48}{rate:12,.1f}")
    for name, goal in ((LIMIT, LIMIT_GOAL), (HTTP_JOB, HTTP_GOAL)):
        if name in report.figures:
            ratio = report.figures[JOB] / report.figures[name]
            tell_goal(f"forebay embed / {name.partition(',')[0]}", [ratio], ">=", goal)


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    begun_s = time.monotonic()
    for name in wanted:
        upstream.reset()
        with report.part(name):
            PARTS[name](report, plan, upstream, scratch)
    report.facts["the run took, s"] = round(time.monotonic() - begun_s)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("embeddings", __doc__, PARTS, "3 s a figure in place of 8, fewer turns")
    given = parser.parse_args(argv)
    plan = (
        Plan(given.seconds or 3.0, 2, REQUESTS // 4, JOB_ROWS_QUICK)
        if given.quick
        else Plan(given.seconds or 8.0, 3, REQUESTS, JOB_ROWS)
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), show)


if __name__ == "__main__":
    sys.exit(main())
