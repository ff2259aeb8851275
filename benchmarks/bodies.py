"""Large bodies on their way through: Forebay and LiteLLM Proxy beside the upstream itself.

    python -m benchmarks.bodies            # about four minutes
    python -m benchmarks.bodies --quick    # about two

  prompts  chats whose prompt is 1 MiB
  vectors  embeddings whose answer is 4 MiB of JSON

Forebay has 50 tenants with keys and finite limits, breaker, ledger and metrics on, caching and
deduplication off, coalescing of embeddings on, one replica. 8 callers each; sides take turns. Rates
are of requests, MB/s of the bodies of requests and answers, memory is what is resident, of the
replica and of all processes of a system.

It is honest: texts are unique, answers are compared with what was asked (see
`benchmarks.body_load`), all are 200, and the ledger has as many rows as requests were sent. Exit
code 1 when one of these does not hold.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import peers
from benchmarks.body_load import DIMENSIONS, Bodies, in_process
from benchmarks.options import finish, parser_of, say, spread, tell_facts, wanted_of
from benchmarks.processes import Child, Peak, machine
from benchmarks.system import System, at
from tests.support.upstream import Upstream

PARTS = {"prompts": ("prompt", "chat/completions"), "vectors": ("vectors", "embeddings")}
NAMES = {"direct": "the upstream itself", "forebay": "Forebay", "peer": "LiteLLM Proxy"}
CONCURRENCY = 8
WARMING_S = 1.0
SETTLE_S = 3.0


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
    """How long a turn is, and how many there are of each side."""

    seconds: float
    rounds: int


@dataclass(slots=True)
class Side:
    name: str
    url: str
    keys: Sequence[str]
    child: Child | None = None
    system: System | None = None


def turn(report: Report, side: Side, part: str, seconds: float) -> Bodies:
    kind, route = PARTS[part]
    found = in_process(kind, f"{side.url}/v1/{route}", side.keys, CONCURRENCY, seconds)
    if side.system is not None:
        side.system.sent += found.requests
    of = f"{part}, {NAMES[side.name]}"
    if set(found.statuses) != {"200"}:
        report.problems.append(f"{of}: not all 200: {found.statuses}")
    if found.wrong:
        report.problems.append(f"{of}: {found.wrong} answers to something else")
    return found


def part_of(report: Report, plan: Plan, part: str, sides: Sequence[Side]) -> None:
    for side in sides:
        turn(report, side, part, WARMING_S)
    memory: dict[str, list[Peak]] = {}
    for number in range(plan.rounds):
        rates: dict[str, float] = {}
        for side in sides if number % 2 else sides[::-1]:
            with ExitStack() as stack:
                peaks = {
                    name: stack.enter_context(Peak(side.child.chosen(wanted)))
                    for name, wanted in WHOSE[side.name].items()
                    if side.child is not None
                }
                found = turn(report, side, part, plan.seconds)
                time.sleep(SETTLE_S)
            for name, peak in peaks.items():
                memory.setdefault(f"{NAMES[side.name]}, {name}", []).append(peak)
            rates[side.name] = found.requests_per_s
            report.add(f"{part}: requests/s, {NAMES[side.name]}", found.requests_per_s)
            report.add(f"{part}: MB/s, {NAMES[side.name]}", found.mb_per_s)
            report.add(f"{part}: p50, ms, {NAMES[side.name]}", found.p50_ms)
            say(
                f"  {part:8}{side.name:8}{found.requests_per_s:9.1f} requests/s"
                f"{found.mb_per_s:9.1f} MB/s{found.p50_ms:9.1f} ms p50{found.p99_ms:9.1f} p99"
            )
            if side.name == "direct":
                report.facts[f"{part}: an answer's bytes"] = f"{found.answer_bytes:,}"
        for other in ("direct", "peer"):
            ratio = rates["forebay"] / rates[other]
            report.add(f"{part}: requests/s, Forebay / {NAMES[other]}", ratio)
    for name, peaks_of in memory.items():
        report.facts[f"{part}: memory before / most / after, MB, {name}"] = (
            f"{peaks_of[0].before_mb:.0f} / {max(one.peak_mb for one in peaks_of):.0f} / "
            f"{peaks_of[-1].after_mb:.0f}"
        )


def _of_replica(line: str) -> bool:
    return line.startswith("ray::ServeReplica")


def _of_any(line: str) -> bool:
    return True


WHOSE = {
    "direct": {},
    "forebay": {"replica": _of_replica, "all processes": _of_any},
    "peer": {"all processes": _of_any},
}


def show(report: Report) -> None:
    print("median (range)")
    for name, values in report.rounds.items():
        print(f"  {name:52}{spread(values):>36}")
    tell_facts(report.facts, report.machine, report.problems)


def run(report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, at: Path) -> None:
    upstream.script(dims=DIMENSIONS)
    with ExitStack() as stack:
        system = stack.enter_context(System("bodies", upstream.url, at))
        peer = stack.enter_context(peers.running("litellm-proxy", upstream.url, at))
        sides = [
            Side("direct", upstream.url, []),
            Side("forebay", system.url, system.keys, system.child, system),
            Side("peer", peer.url, peer.keys, peer.child),
        ]
        for part in wanted:
            part_of(report, plan, part, sides)
        told, wrong = system.audit()
        report.facts["Forebay: requests sent / ledger rows / counted"] = told
        report.problems += wrong


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("bodies", __doc__, PARTS, "2 rounds of 3 s in place of 5 of 5 s")
    parser.add_argument("--rounds", type=int, help="turns of each side")
    given = parser.parse_args(argv)
    wanted = wanted_of(parser, given.only, PARTS)
    plan = Plan(
        given.seconds or (3.0 if given.quick else 5.0), given.rounds or (2 if given.quick else 5)
    )
    report = Report(machine())
    with at(given.keep) as scratch, Upstream(log=scratch / "upstream.jsonl", fast=True) as upstream:
        run(report, plan, wanted, upstream, scratch)
    show(report)
    return finish(given.json, asdict(report), report.problems)


if __name__ == "__main__":
    sys.exit(main())
