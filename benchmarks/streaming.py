"""What streams cost on their way through: Forebay and LiteLLM Proxy beside the upstream itself.

    python -m benchmarks.streaming            # about 4 minutes
    python -m benchmarks.streaming --quick    # about 2 minutes
    python -m benchmarks.streaming --only many

Forebay has 50 tenants with keys and finite limits, breaker, ledger and metrics on, caching and
deduplication off, one replica. Answers have 64 tokens, one a chunk. Sides take turns.

  chunks  an upstream that says all at once, 64 callers: chunks/s
  first   likewise, one caller: time to the first token, over the direct one of the same round
  gaps    a chunk every 20 ms, 8 callers: a stream's mean time from chunk to chunk, and the 99th
          percentile of all gaps, over the direct ones of the same round
  many    500 callers who all begin at once, a chunk every 20 ms: the longest gap, how long the
          first token took, how many streams the upstream had at once, and the replica's resident
          memory before, at its most, and afterwards

It is honest: prompts are unique, answers must hold their own prompt's digest and end with [DONE]
(of `chunks` the first turn is checked so, the others are counted), and the ledger has as many rows
as there were streams. Exit code 1 when one of these does not hold; missed goals are only told.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks import stream_load
from benchmarks.options import Report, measured, parser_of, say, tell_goal, tell_rounds
from benchmarks.processes import Peak
from benchmarks.sides import NAMES, Side, in_turn, sides_of
from benchmarks.stream_load import Streams
from tests.support.loader import Load, Result, in_process
from tests.support.upstream import Upstream

ROUTE = "/v1/chat/completions"
TOKENS = 64
INTERVAL_S = 0.02
MANY, SOME = 500, 8
CONCURRENCY = 64
SETTLE_S = 3.0
STALL_MS = 1_000.0
"""Fifty intervals without a chunk are a stall."""
CHUNKS_GOAL = 20.0
BODY = (
    '{"model":"sim","stream":true,"max_tokens":64,"messages":[{"role":"user","content":'
    '"Question @UNIQUE@: what does a forebay do for the turbines behind it?"}]}'
)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn is, how many there are of each side, and streams a connection of `many`."""

    seconds: float
    rounds: int
    each: int


# -- one turn -------------------------------------------------------------------------------


def load(report: Report, plan: Plan, side: Side, concurrency: int, *, check: bool) -> Result:
    """Streams from an upstream that says all at once."""
    result = in_process(
        Load(
            f"{side.url}{ROUTE}",
            concurrency=concurrency,
            seconds=plan.seconds,
            warmup=concurrency,
            keys=list(side.keys),
            stream=True,
            body=BODY,
            check=check,
        )
    )
    side.sent(result.sent)
    of = f"{NAMES[side.name]}, {concurrency} callers"
    report.check(of, result)
    if result.chunks < result.requests * TOKENS:
        report.problems.append(f"{of}: {result.chunks} chunks of {result.requests} streams")
    return result


def stream(report: Report, side: Side, connections: int, each: int) -> Streams:
    """Streams that take their time."""
    found = stream_load.in_process(f"{side.url}{ROUTE}", side.keys, connections, each, TOKENS)
    side.sent(found.streams)
    of = f"{NAMES[side.name]}, {connections} streams at once"
    if found.broken:
        report.problems.append(f"{of}: {found.broken}")
    if found.wrong:
        report.problems.append(f"{of}: {found.wrong} answers to something else")
    say(
        f"  {side.name:8}{connections:4} at once: first {found.first_p50_ms:8.2f} ms p50, from "
        f"chunk to chunk {found.gap_mean_ms:6.2f} ms, {found.gap_p99_ms:7.2f} p99, "
        f"{found.gap_max_ms:8.2f} at most"
    )
    return found


# -- parts ----------------------------------------------------------------------------------


def chunks(report: Report, plan: Plan, upstream: Upstream, sides: Sequence[Side]) -> None:
    upstream.script(tokens=TOKENS)
    for number in range(plan.rounds):
        for side in in_turn(sides[1:], number):
            result = load(report, plan, side, CONCURRENCY, check=number == 0)
            report.add(f"chunks/s, {NAMES[side.name]}", result.chunks_per_s)
            say(f"  {side.name:8}{result.chunks_per_s:12,.0f} chunks/s at {CONCURRENCY}")
    ours, theirs = (report.rounds.get(f"chunks/s, {NAMES[one]}", ()) for one in ("forebay", "peer"))
    for one, other in zip(ours, theirs, strict=False):
        report.add("chunks/s, Forebay / LiteLLM Proxy", one / other)


def first(report: Report, plan: Plan, upstream: Upstream, sides: Sequence[Side]) -> None:
    upstream.script(tokens=TOKENS)
    for number in range(plan.rounds):
        found: dict[str, float] = {}
        for side in in_turn(sides, number):
            result = load(report, plan, side, 1, check=True)
            found[side.name] = result.first_chunk_p50_ms or 0.0
            say(f"  {side.name:8}{found[side.name]:12.3f} ms to the first token, p50")
        for side in sides[1:]:
            added = found[side.name] - found["direct"]
            report.add(f"added to the first token, ms, {NAMES[side.name]}", added)


def gaps(report: Report, plan: Plan, upstream: Upstream, sides: Sequence[Side]) -> None:
    upstream.script(tokens=TOKENS, interval=INTERVAL_S)
    for number in range(plan.rounds):
        found = {
            side.name: stream(report, side, SOME, plan.each) for side in in_turn(sides, number)
        }
        for side in sides[1:]:
            mine, direct = found[side.name], found["direct"]
            added = {"mean": mine.gap_mean_ms - direct.gap_mean_ms}
            added["99th percentile"] = mine.gap_p99_ms - direct.gap_p99_ms
            for of, ms in added.items():
                report.add(f"added from chunk to chunk, {of}, ms, {NAMES[side.name]}", ms)


def many(report: Report, plan: Plan, upstream: Upstream, sides: Sequence[Side]) -> None:
    for side in sides[:2]:
        upstream.reset()
        upstream.script(tokens=TOKENS, interval=INTERVAL_S)
        if side.system is None:
            tell_many(report, side, stream(report, side, MANY, plan.each), upstream)
            continue
        replica = side.system.child.chosen("ServeReplica")
        with Peak(replica) as peak:
            tell_many(report, side, stream(report, side, MANY, plan.each), upstream)
            time.sleep(SETTLE_S)
        report.facts[f"{MANY} streams: replica's memory before / most / after, MB"] = (
            f"{peak.before_mb:.0f} / {peak.peak_mb:.0f} / {peak.after_mb:.0f}"
        )


def tell_many(report: Report, side: Side, found: Streams, upstream: Upstream) -> None:
    name = NAMES[side.name]
    report.add(f"longest gap of {MANY} streams, ms, {name}", found.gap_max_ms)
    firsts_ms = (found.first_p50_ms, found.first_p99_ms, found.first_max_ms)
    facts = {
        "chunk to chunk mean / p99, ms": f"{found.gap_mean_ms:.1f} / {found.gap_p99_ms:.1f}",
        "first token p50 / p99 / most, ms": " / ".join(f"{ms:.0f}" for ms in firsts_ms),
        "streams / chunks / s": f"{found.streams} / {found.chunks} / {found.seconds:.1f}",
        "most at once at the upstream": upstream.stats()["running_max"],
    }
    report.facts |= {f"{MANY} callers, {name}: {of}": fact for of, fact in facts.items()}


PARTS: dict[str, Callable[[Report, Plan, Upstream, Sequence[Side]], None]] = {
    "chunks": chunks,
    "first": first,
    "gaps": gaps,
    "many": many,
}


# -- the report -----------------------------------------------------------------------------


def show(report: Report) -> None:
    tell_rounds(report)
    print()
    ratios = report.rounds.get("chunks/s, Forebay / LiteLLM Proxy", [])
    tell_goal("chunks/s, Forebay / LiteLLM Proxy", ratios, ">=", CHUNKS_GOAL)
    longest = report.rounds.get(f"longest gap of {MANY} streams, ms, Forebay", [])
    tell_goal(f"longest gap of {MANY} streams, ms", longest, "<=", STALL_MS)


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    with_peer = wanted != ["many"]
    with sides_of(report, "streaming", upstream, scratch, with_peer=with_peer) as sides:
        upstream.script(tokens=TOKENS)
        for side in sides:
            stream(report, side, SOME, 1)  # a system's first ones are slow
        for name in wanted:
            with report.part(name):
                PARTS[name](report, plan, upstream, sides)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "streaming", __doc__, PARTS, "2 rounds of 2 s in place of 5 of 4 s", "turns of each side"
    )
    given = parser.parse_args(argv)
    plan = Plan(
        given.seconds or (2.0 if given.quick else 4.0),
        given.rounds or (2 if given.quick else 5),
        each=2 if given.quick else 4,
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), show)


if __name__ == "__main__":
    sys.exit(main())
