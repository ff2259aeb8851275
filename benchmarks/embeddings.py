"""What embeddings cost and how fast they come: Forebay, LiteLLM's function, LiteLLM Proxy.

    python -m benchmarks.embeddings            # about eight minutes
    python -m benchmarks.embeddings --quick    # about five
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

import json
import os
import secrets
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import peers
from benchmarks.embedding_lane import DIMENSIONS
from benchmarks.options import finish, parser_of, wanted_of
from benchmarks.processes import ROOT, Child, free_port, get, machine
from benchmarks.system import (
    LEDGER_WAIT_S,
    START_S,
    at,
    await_rest,
    forebay_document,
    ledger_rows,
    tenant_keys,
)
from forebay.secrets import new_key
from tests.support.loader import Load, Result, in_process
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
class Report:
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    jobs: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def row(self, system: str, rate: int | None) -> Row | None:
        for row in self.rows:
            if (row.system, row.rate) == (system, rate):
                return row
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn or a figure is, how many turns, and how many requests 200 clients make."""

    seconds: float
    rounds: int
    requests: int
    rows: int


# --------------------------------------------------------------------------------------- lane


def lane(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    found: dict[str, list[float]] = {"forebay": [], "litellm": []}
    for turn in range(plan.rounds):
        for side, rates in found.items():
            told = in_lane(side, upstream.url, plan.seconds)
            rates.append(told["vectors_per_cpu_s"])
            print(
                f"  {side:8}{told['vectors_per_cpu_s']:11,.0f} vectors per CPU second"
                f"{told['ms_per_call']:10.2f} ms a call",
                flush=True,
            )
            if told["wrong"]:
                report.problems.append(f"lane, {side}, turn {turn}: {told['wrong']} wrong calls")
    report.rounds["vectors per CPU second, Forebay's lane"] = found["forebay"]
    report.rounds["vectors per CPU second, litellm.aembedding"] = found["litellm"]
    report.rounds[f"lane / litellm.aembedding, {DIMENSIONS} dimensions"] = [
        ours / theirs for ours, theirs in zip(found["forebay"], found["litellm"], strict=True)
    ]


def in_lane(side: str, url: str, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.embedding_lane", side, "--url", f"{url}/v1"]
    command += ["-n", str(TEXTS_PER_CALL), "-t", str(seconds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{side} failed: {done.stderr[-2000:]}")
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


# ------------------------------------------------------------------------------------ clients


@dataclass(slots=True)
class Running:
    """A system that answers: where, with which keys, and the process."""

    url: str
    keys: Sequence[str]
    child: Child
    admin: str | None = None
    environ: Mapping[str, str] = field(default_factory=dict)

    def rows(self, expected: int = 0) -> int:
        """Rows of its ledger, if it has one, once they are as many as expected or it is late."""
        return 0 if self.admin is None else ledger_rows(self.url, self.admin, expected)


def clients(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    systems: dict[str, Callable[[], AbstractContextManager[Running]]] = {
        "forebay": lambda: forebay(upstream, scratch, "forebay"),
        "single": lambda: forebay(upstream, scratch, "single", coalesce=False),
        "peer": lambda: litellm_proxy(upstream, scratch),
    }
    print(HEADER, flush=True)
    for name, system in systems.items():
        upstream.reset()
        with system() as running:
            await_rest(running.child)
            upstream.script(dims=DIMENSIONS, **UPSTREAM)
            before = running.rows()
            sent = ask(report, plan, name, running, upstream, None)
            for rate in RATES:
                sent += ask(report, plan, name, running, upstream, rate)
            if running.admin is not None:
                audit(report, name, running, upstream, before, sent)
    upstream.reset()


def ask(
    report: Report, plan: Plan, system: str, running: Running, upstream: Upstream, rate: int | None
) -> int:
    """One load and its row. How many requests were sent."""
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
    wrongs(report, system, rate, result)
    row = Row(
        system,
        rate,
        result.requests_per_s,
        result.p50_ms or 0.0,
        result.p99_ms or 0.0,
        result.sent,
        upstream.stats()["requests"] - before,
        running.child.cpu_s() - cpu_before_s,
    )
    report.rows.append(row)
    show_row(row)
    return result.sent


def wrongs(report: Report, system: str, rate: int | None, result: Result) -> None:
    of = f"{system}, {'closed loop' if rate is None else f'{rate} requests/s'}"
    if result.ok != result.requests:
        report.problems.append(f"{of}: not all 200: {result.statuses} {result.errors}")
    if result.wrong:
        report.problems.append(f"{of}: {result.wrong} vectors of another text")


def audit(
    report: Report, name: str, running: Running, upstream: Upstream, before: int, sent: int
) -> None:
    """The ledger against what was sent, and against what the upstream has counted.

    `before`: the rows that getting to the first answer has left.
    """
    assert running.admin is not None
    rows = running.rows(before + sent) - before
    told = json.loads(get(f"{running.url}/v1/usage", running.admin))
    counted = sum(record.prompt_tokens for record in upstream.log())
    report.facts[f"{name}: requests sent / ledger rows"] = f"{sent} / {rows}"
    report.facts[f"{name}: tokens, upstream / ledger"] = f"{counted} / {told['prompt_tokens']}"
    if rows != sent:
        report.problems.append(
            f"{name}: {sent} requests were sent, the ledger has {rows} rows after {LEDGER_WAIT_S} s"
        )
    if counted != told["prompt_tokens"]:
        report.problems.append(
            f"{name}: the upstream counted {counted} tokens, the ledger {told['prompt_tokens']}"
        )


@contextmanager
def forebay(
    upstream: Upstream,
    scratch: Path,
    name: str,
    *,
    coalesce: bool = True,
    batch_size: int | None = None,
) -> Any:
    keys, admin, secret, port = tenant_keys(), new_key(), secrets.token_hex(32), free_port()
    document = forebay_document(upstream.url, port, keys, admin, secret, caching=False)
    document["gateway"] |= {"enable_request_batching": coalesce, "timeout": 120}
    if batch_size is not None:
        document["gateway"]["batch_size"] = batch_size
    for tenant in document["tenants"]:
        if "limits" in tenant:
            tenant["limits"]["concurrent_requests"] = 2 * max(RATES.values())
    home = scratch / name
    home.mkdir()
    config = home / "forebay.yaml"
    config.write_text(json.dumps(document))
    environ = {
        "FOREBAY_KEY_SECRET": secret,
        "FOREBAY_DATA_DIR": str(home / "data"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command = [sys.executable, "-m", "forebay", "up", "--config", str(config)]
    url = f"http://127.0.0.1:{port}"
    first = {"model": "sim", "input": "The first text", "dimensions": DIMENSIONS}
    with Child(command, scratch / f"{name}.log", environ) as child:
        child.await_200(f"{url}/v1/embeddings", START_S, key=keys[0], body=first)
        yield Running(url, keys, child, admin, environ)


@contextmanager
def litellm_proxy(upstream: Upstream, scratch: Path) -> Any:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with peers.litellm_proxy(upstream.url, port, scratch) as child:
        child.await_200(f"{url}/health/liveliness", START_S)
        first = {"model": "sim", "input": "The first text"}
        child.await_200(f"{url}/v1/embeddings", START_S, key=peers.MASTER_KEY, body=first)
        yield Running(url, [peers.MASTER_KEY], child)


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
    with forebay(upstream, scratch, "parquet", batch_size=JOB_TEXTS) as running:
        await_rest(running.child)
        before = upstream.stats()["requests"]
        upstream.script(**UPSTREAM)
        dst = scratch / "vectors"
        command = [sys.executable, "-m", "forebay", "embed", str(src), str(dst), "--json"]
        command += ["--model", "sim", "--text-column", "text", "--id-column", "id"]
        command += ["--dimensions", str(JOB_DIMENSIONS)]
        took_s = ran(command, scratch / "job.log", running.environ)
        calls = upstream.log()[before:]
        report.jobs["forebay embed, rows/s"] = rate_of(calls)
    check_vectors(report, dst, texts)
    most = UPSTREAM["latency"] + UPSTREAM["latency_per_text"] * JOB_TEXTS
    report.jobs["the upstream's own limit, rows/s"] = UPSTREAM["concurrency"] * JOB_TEXTS / most
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
    report.jobs["HttpRequestProcessor, rows/s"] = rate_of(upstream.log())
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


RUN: dict[str, Callable[[Report, Plan, Upstream, Path], None]] = {
    "lane": lane,
    "clients": clients,
    "parquet": parquet,
}


# ----------------------------------------------------------------------------------- the report

HEADER = (
    f"  {'':30}{'':>12}{'requests/s':>12}{'p50 ms':>10}{'p99 ms':>10}{'sent':>8}{'calls':>8}"
    f"{'CPU us':>9}"
)


def show_row(row: Row) -> None:
    load = f"{CLIENTS} clients" if row.rate is None else f"{row.rate:,}/s"
    print(
        f"  {NAMES[row.system]:30}{load:>12}{row.requests_per_s:12,.1f}{row.p50_ms:10.1f}"
        f"{row.p99_ms:10.1f}{row.requests:8,}{row.upstream_calls:8,}"
        f"{row.cpu_s / max(row.requests, 1) * 1e6:9,.0f}",
        flush=True,
    )


def show(report: Report) -> None:
    print()
    for name, values in report.rounds.items():
        each = " ".join(f"{value:,.1f}" for value in values)
        print(f"  {name:48}{statistics.median(values):12,.1f}   of {each}")
    for name, values in report.rounds.items():
        if name.startswith("lane /"):
            tell_goal("lane / litellm.aembedding", statistics.median(values), LANE_GOAL)
    ours = report.row("forebay", None)
    for other in ("single", "peer"):
        theirs = report.row(other, None)
        if ours is not None and theirs is not None and theirs.requests_per_s:
            ratio = ours.requests_per_s / theirs.requests_per_s
            tell_goal(f"{CLIENTS} clients, Forebay / {NAMES[other]}", ratio, CLIENTS_GOAL)
    jobs = list(report.jobs.items())
    for name, rate in jobs:
        print(f"  {name:48}{rate:12,.1f}")
    for (name, rate), goal in zip(jobs[1:], (LIMIT_GOAL, HTTP_GOAL), strict=False):
        tell_goal(f"forebay embed / {name.partition(',')[0]}", jobs[0][1] / rate, goal)
    print()
    for name, fact in {**report.facts, **report.machine}.items():
        print(f"  {name:62}{fact}")
    for problem in report.problems:
        print(f"  ! {problem}")


def tell_goal(name: str, ratio: float, goal: float) -> None:
    verdict = "reached" if ratio >= goal else "missed"
    print(f"  goal {name} >= {goal:g}: {ratio:.4g}, {verdict}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("embeddings", __doc__, RUN, "3 s a figure in place of 8, fewer turns")
    given = parser.parse_args(argv)
    wanted = wanted_of(parser, given.only, RUN)
    seconds = given.seconds or (3.0 if given.quick else 8.0)
    plan = (
        Plan(seconds, 2, REQUESTS // 4, JOB_ROWS_QUICK)
        if given.quick
        else Plan(seconds, 3, REQUESTS, JOB_ROWS)
    )
    report = Report(machine())
    begun_s = time.monotonic()
    with at(given.keep) as scratch, Upstream(log=scratch / "upstream.jsonl", fast=True) as upstream:
        for name in wanted:
            upstream.reset()
            RUN[name](report, plan, upstream, scratch)
    report.facts["the run took, s"] = round(time.monotonic() - begun_s)
    show(report)
    return finish(given.json, asdict(report), report.problems)


if __name__ == "__main__":
    sys.exit(main())
