"""What streams cost on their way through: Forebay and LiteLLM Proxy beside the upstream itself.

    python -m benchmarks.streaming            # about four minutes
    python -m benchmarks.streaming --quick    # about two
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
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peers, stream_load
from benchmarks.options import finish, parser_of, say, spread, tell_facts, tell_goal, wanted_of
from benchmarks.processes import Peak, machine
from benchmarks.stream_load import Streams
from benchmarks.system import System, at
from tests.support.loader import Load, Result, in_process
from tests.support.upstream import Upstream

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
NAMES = {"direct": "the upstream itself", "forebay": "Forebay", "peer": "LiteLLM Proxy"}


@dataclass(slots=True)
class Report:
    machine: dict[str, Any]
    rounds: dict[str, list[float]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        self.rounds.setdefault(name, []).append(value)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn is, how many there are of each side, and streams a connection of `many`."""

    seconds: float
    rounds: int
    each: int


@dataclass(slots=True)
class Side:
    name: str
    url: str
    keys: Sequence[str]
    system: System | None = None

    @property
    def chat_url(self) -> str:
        return f"{self.url}/v1/chat/completions"

    def sent(self, count: int) -> None:
        if self.system is not None:
            self.system.sent += count


# -- one turn -------------------------------------------------------------------------------


def load(report: Report, plan: Plan, side: Side, concurrency: int, *, check: bool) -> Result:
    """Streams from an upstream that says all at once."""
    result = in_process(
        Load(
            side.chat_url,
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
    if result.ok != result.requests:
        report.problems.append(f"{of}: not all 200: {result.statuses} {result.errors}")
    if result.wrong:
        report.problems.append(f"{of}: {result.wrong} answers of somebody else's question")
    if result.chunks < result.requests * TOKENS:
        report.problems.append(f"{of}: {result.chunks} chunks of {result.requests} streams")
    return result


def stream(report: Report, side: Side, connections: int, each: int) -> Streams:
    """Streams that take their time."""
    found = stream_load.in_process(side.chat_url, side.keys, connections, each, TOKENS)
    side.sent(found.streams)
    of = f"{NAMES[side.name]}, {connections} streams at once"
    if found.broken:
        report.problems.append(f"{of}: {found.broken}")
    if found.wrong:
        report.problems.append(f"{of}: {found.wrong} answers of somebody else's question")
    say(
        f"  {side.name:8}{connections:4} at once: first {found.first_p50_ms:8.2f} ms p50, from "
        f"chunk to chunk {found.gap_mean_ms:6.2f} ms, {found.gap_p99_ms:7.2f} p99, "
        f"{found.gap_max_ms:8.2f} at most"
    )
    return found


def in_turn(sides: Sequence[Side], number: int) -> Sequence[Side]:
    return sides if number % 2 else sides[::-1]


# -- parts ----------------------------------------------------------------------------------


def chunks(report: Report, plan: Plan, upstream: Upstream, sides: Sequence[Side]) -> None:
    upstream.script(tokens=TOKENS)
    for number in range(plan.rounds):
        for side in in_turn(sides[1:], number):
            result = load(report, plan, side, CONCURRENCY, check=number == 0)
            report.add(f"chunks/s, {NAMES[side.name]}", result.chunks_per_s)
            say(f"  {side.name:8}{result.chunks_per_s:12,.0f} chunks/s at {CONCURRENCY}")
    ours, theirs = (report.rounds[f"chunks/s, {NAMES[side.name]}"] for side in sides[1:])
    for one, other in zip(ours, theirs, strict=True):
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
        replica = side.system.child.chosen(lambda line: line.startswith("ray::ServeReplica"))
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
    print("median (range)")
    for name, values in report.rounds.items():
        print(f"  {name:60}{spread(values):>32}")
    print()
    ratios = report.rounds.get("chunks/s, Forebay / LiteLLM Proxy", [])
    tell_goal("chunks/s, Forebay / LiteLLM Proxy", ratios, ">=", CHUNKS_GOAL)
    longest = report.rounds.get(f"longest gap of {MANY} streams, ms, Forebay", [])
    tell_goal(f"longest gap of {MANY} streams, ms", longest, "<=", STALL_MS)
    tell_facts(report.facts, report.machine, report.problems)


def run(report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, at: Path) -> None:
    with ExitStack() as stack:
        system = stack.enter_context(System("streaming", upstream.url, at))
        sides = [
            Side("direct", upstream.url, [""]),
            Side("forebay", system.url, system.keys, system),
        ]
        if set(wanted) - {"many"}:
            peer = stack.enter_context(peers.running("litellm-proxy", upstream.url, at))
            sides.append(Side("peer", peer.url, peer.keys))
        upstream.script(tokens=TOKENS)
        for side in sides:
            stream(report, side, SOME, 1)  # a system's first ones are slow
        for name in wanted:
            PARTS[name](report, plan, upstream, sides)
        told, wrong = system.audit()
        report.facts["Forebay: streams sent / ledger rows / counted"] = told
        report.problems += wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("streaming", __doc__, PARTS, "2 rounds of 2 s in place of 5 of 4 s")
    parser.add_argument("--rounds", type=int, help="turns of each side")
    given = parser.parse_args(argv)
    wanted = wanted_of(parser, given.only, PARTS)
    plan = Plan(
        given.seconds or (2.0 if given.quick else 4.0),
        given.rounds or (2 if given.quick else 5),
        each=2 if given.quick else 4,
    )
    report = Report(machine())
    with at(given.keep) as scratch, Upstream(log=scratch / "upstream.jsonl", fast=True) as upstream:
        run(report, plan, wanted, upstream, scratch)
    show(report)
    return finish(given.json, asdict(report), report.problems)


if __name__ == "__main__":
    sys.exit(main())
