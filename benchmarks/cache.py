"""What the cache gives and what it costs: hits, beside LiteLLM Proxy's, and misses.

    python -m benchmarks.cache            # about 6 minutes
    python -m benchmarks.cache --quick    # about 3 minutes
    python -m benchmarks.cache --only hits,peer

All load comes over HTTP from a process of its own, against one simulated upstream on loopback.

  hits    answers that are stored: requests/s and latency at concurrency 1, 8 and 64, of one
          replica with 50 tenants that have keys and finite limits, ledger and metrics on;
          100 questions in turn, and at 64 also 5,000 of them
  peer    LiteLLM Proxy with its in-memory cache, one worker: the same 100 questions at 1, 8 and
          64, as its cache holds 200 answers at most
  rig     Ray Serve's no-op behind the same HAProxy: what is left when a hit costs nothing
  misses  questions that nobody has asked: caching and deduplication on against both off, turns of
          each, for one replica and for two

The load is honest: an answer must hold its own question's digest, all are 200, the ledger has as
many rows as requests were sent, and of a question that is asked again the upstream hears once.
Exit code 1 when one of these does not hold; missed goals are only told.
"""

from __future__ import annotations

import secrets
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import options, peers
from benchmarks.options import measured, parser_of, say, tell_goal
from benchmarks.system import LEDGER_WAIT_S, System, no_op, tenant_keys
from tests.support.loader import Load, Result, in_process
from tests.support.upstream import Upstream

CONCURRENCIES = (1, 8, 64)
DISTINCT = 100
"""LiteLLM's in-memory cache holds 200 answers; it is asked for what it can have."""
DISTINCT_MANY = 5_000
TTL_S = 3600
LIFETIME = {"cache_ttl": TTL_S}
HITS_GOAL = 4_000.0
NAMES = {"rig": "Serve no-op", "hits": "Forebay, hits", "peer": "LiteLLM Proxy, hits"}


@dataclass(slots=True)
class Row:
    """One system at one concurrency. `cpu_s` is its serving process's CPU time per request."""

    system: str
    distinct: int
    concurrency: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s: float
    messages: float | None = None


@dataclass(slots=True)
class Report(options.Report):
    rows: list[Row] = field(default_factory=list)

    def rate(self, system: str, concurrency: int) -> float | None:
        """Requests/s of the DISTINCT questions."""
        for row in self.rows:
            if (row.system, row.concurrency, row.distinct) == (system, concurrency, DISTINCT):
                return row.requests_per_s
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a figure or a turn is, and how many turns each side of the misses has."""

    seconds: float
    warmup: int
    rounds: int


# ------------------------------------------------------------------------------------ the parts


def ask(
    report: Report,
    plan: Plan,
    name: str,
    url: str,
    keys: Sequence[str],
    concurrency: int,
    *,
    distinct: int | None = None,
    run: str = "",
    seconds: float | None = None,
    check: bool = True,
) -> Result:
    """One load; what is wrong with its answers goes into the report. Without `distinct` every
    question is new; with `seconds` 0 each of the distinct ones is asked once, and not measured."""
    load = Load(
        f"{url}/v1/chat/completions",
        concurrency=concurrency,
        requests=distinct if seconds == 0 else None,
        seconds=plan.seconds if seconds is None else seconds or None,
        warmup=0 if seconds == 0 else plan.warmup,
        keys=list(keys),
        check=check,
        distinct=distinct,
        run=run,
    )
    result = in_process(load)
    report.check(name, result)
    return result


def row_of(
    report: Report,
    plan: Plan,
    name: str,
    url: str,
    keys: Sequence[str],
    cpu_s: Callable[[], float],
    *,
    concurrency: int,
    distinct: int = DISTINCT,
    run: str = "",
    system: System | None = None,
) -> None:
    """One row. Every question of the load has been asked before, or none of them is stored."""
    before_s = cpu_s()
    before = system.messages() if system is not None else None
    result = ask(
        report,
        plan,
        name,
        url,
        keys,
        concurrency,
        distinct=distinct,
        run=run,
        check=name != "rig",
    )
    row = Row(
        name,
        distinct,
        concurrency,
        result.requests_per_s,
        result.p50_ms or 0.0,
        result.p99_ms or 0.0,
        (cpu_s() - before_s) / max(result.sent, 1),
    )
    if system is not None and before is not None:
        system.sent += result.sent
        row.messages = (system.messages() - before).total() / max(result.sent, 1)
    report.rows.append(row)
    say(told(row))


def told(row: Row) -> str:
    messages = "" if row.messages is None else f"{row.messages:9.4f}"
    return (
        f"  {NAMES[row.system]:22}{row.distinct:7,}{row.concurrency:4}{row.requests_per_s:12,.0f}"
        f"{row.p50_ms:9.2f}{row.p99_ms:9.2f}{row.cpu_s * 1e6:9.0f}{messages}"
    )


HEADER = (
    f"  {'':22}{'asked':>7}{'c':>4}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'CPU us':>9}"
    f"{'msg/req':>9}"
)


def rig(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    with no_op(scratch) as (url, child):
        cpu_s, keys = partial(child.cpu_s, "NoOp"), tenant_keys()
        for concurrency in CONCURRENCIES:
            row_of(report, plan, "rig", url, keys, cpu_s, concurrency=concurrency)


def hits(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    upstream.reset()
    with System("hits", upstream.url, scratch, caching=True, gateway=LIFETIME) as system:
        asked = 1
        loads = [(DISTINCT, c) for c in CONCURRENCIES] + [(DISTINCT_MANY, CONCURRENCIES[-1])]
        runs = {count: secrets.token_hex(6) for count, _ in loads}
        for count, run in runs.items():
            stored = ask(
                report,
                plan,
                "hits",
                system.url,
                system.keys,
                8,
                distinct=count,
                run=run,
                seconds=0,
            )
            system.sent += stored.sent
            asked += stored.sent
        for count, concurrency in loads:
            row_of(
                report,
                plan,
                "hits",
                system.url,
                system.keys,
                system.cpu_s,
                concurrency=concurrency,
                distinct=count,
                run=runs[count],
                system=system,
            )
        rows, calls = system.rows(), upstream.stats()["requests"]
        found = int(system.usage()["cache_hits"])
    report.facts["hits: requests sent / ledger rows / of these hits"] = (
        f"{system.sent} / {rows} / {found}"
    )
    report.facts["hits: questions / upstream calls"] = f"{asked} / {calls}"
    if rows != system.sent:
        report.problems.append(
            f"hits: {system.sent} requests were sent, the ledger has {rows} rows after "
            f"{LEDGER_WAIT_S} s"
        )
    if not asked == calls == system.sent - found:
        report.problems.append(
            f"hits: {asked} questions, {calls} upstream calls, {system.sent - found} rows that "
            "are no hits"
        )


def peer(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    upstream.reset()
    run = secrets.token_hex(6)
    proxy = peers.running("litellm-proxy", upstream.url, scratch, cache_ttl_s=TTL_S)
    with proxy as running:
        url, keys, cpu_s = running.url, running.keys, running.child.cpu_s
        ask(report, plan, "peer", url, keys, 1, distinct=DISTINCT, run=run, seconds=0)
        for concurrency in CONCURRENCIES:
            row_of(report, plan, "peer", url, keys, cpu_s, concurrency=concurrency, run=run)
    calls = upstream.stats()["requests"]
    report.facts["peer: questions / upstream calls"] = f"{DISTINCT} / {calls}"


def misses(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    for replicas in (1, 2):
        upstream.reset()
        of = f"{replicas} replica{'s' if replicas > 1 else ''}"
        with ExitStack() as stack:
            sides = {
                side: stack.enter_context(
                    System(
                        f"{side}-{replicas}",
                        upstream.url,
                        scratch,
                        caching=side == "on",
                        gateway=LIFETIME,
                        server={"replicas": replicas},
                    )
                )
                for side in ("on", "off")
            }
            rates: dict[str, list[float]] = {side: [] for side in sides}
            for turn in range(plan.rounds + 1):
                for side, system in sides.items():
                    result = ask(report, plan, "misses", system.url, system.keys, CONCURRENCIES[-1])
                    system.sent += result.sent
                    if turn == 0:
                        continue  # the first requests of a system are slow
                    rates[side].append(result.requests_per_s)
                    say(
                        f"  misses, {of}, caching {side:4}{result.requests_per_s:11,.0f} "
                        f"requests/s{result.p50_ms or 0:9.1f} ms p50"
                    )
            sent = sum(system.sent for system in sides.values())
            rows = sum(one.rows() for one in sides.values())
        calls = upstream.stats()["requests"]
        ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
        report.rounds[f"misses, caching on / off, {of}"] = ratios
        report.facts[f"misses, {of}: requests sent / ledger rows / upstream calls"] = (
            f"{sent} / {rows} / {calls}"
        )
        if len({sent, rows, calls}) != 1:
            report.problems.append(
                f"misses, {of}: {sent} requests were sent, the ledgers have {rows} rows, the "
                f"upstream answered {calls}"
            )


PARTS: dict[str, Callable[[Report, Plan, Upstream, Path], None]] = {
    "rig": rig,
    "hits": hits,
    "peer": peer,
    "misses": misses,
}


# ----------------------------------------------------------------------------------- the report


def show(report: Report) -> None:
    if report.rows:
        print(HEADER)
    for row in report.rows:
        print(told(row))
    for over, under in (("hits", "peer"), ("hits", "rig")):
        cells = []
        for concurrency in CONCURRENCIES:
            first, second = report.rate(over, concurrency), report.rate(under, concurrency)
            if first and second:
                cells.append(f"{first / second:8.2f}")
        if cells:
            at_each = ", ".join(map(str, CONCURRENCIES))
            print(f"  {over} / {under:10}{''.join(cells)}   requests/s at {at_each}")
    rate = report.rate("hits", CONCURRENCIES[-1])
    if rate is not None:
        tell_goal(f"hits/s at {CONCURRENCIES[-1]}", [rate], ">=", HITS_GOAL)
    for name, values in report.rounds.items():
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"  {name:44}{statistics.median(values):8.3f}   of {each}")


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    for name in wanted:
        with report.part(name):
            PARTS[name](report, plan, upstream, scratch)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "cache", __doc__, PARTS, "2 s a figure in place of 8", "turns of each side of the misses"
    )
    given = parser.parse_args(argv)
    plan = Plan(
        given.seconds or (2.0 if given.quick else 8.0),
        warmup=100 if given.quick else 500,
        rounds=given.rounds or (2 if given.quick else 5),
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), show)


if __name__ == "__main__":
    sys.exit(main())
