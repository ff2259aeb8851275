"""Large bodies on their way through: Forebay and LiteLLM Proxy beside the upstream itself.

    python -m benchmarks.bodies            # about 4 minutes
    python -m benchmarks.bodies --quick    # about 2 minutes

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
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from benchmarks.body_load import DIMENSIONS, Bodies, in_process
from benchmarks.options import Report, measured, parser_of, say, tell_rounds
from benchmarks.processes import Peak
from benchmarks.sides import NAMES, Side, in_turn, sides_of
from tests.support.upstream import Upstream

PARTS = {"prompts": ("prompt", "chat/completions"), "vectors": ("vectors", "embeddings")}
CONCURRENCY = 8
WARMING_S = 1.0
SETTLE_S = 3.0
WHOSE = {
    "direct": {},
    "forebay": {"replica": "ServeReplica", "all processes": ""},
    "peer": {"all processes": ""},
}
"""Whose memory is watched of each side: the Ray workers of that title, or all."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn is, and how many there are of each side."""

    seconds: float
    rounds: int


def turn(report: Report, side: Side, part: str, seconds: float) -> Bodies:
    kind, route = PARTS[part]
    found = in_process(kind, f"{side.url}/v1/{route}", side.keys, CONCURRENCY, seconds)
    side.sent(found.requests)
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
        for side in in_turn(sides, number):
            with ExitStack() as stack:
                peaks = {
                    name: stack.enter_context(Peak(side.child.chosen(title)))
                    for name, title in WHOSE[side.name].items()
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
            if other in rates:
                ratio = rates["forebay"] / rates[other]
                report.add(f"{part}: requests/s, Forebay / {NAMES[other]}", ratio)
    for name, peaks_of in memory.items():
        report.facts[f"{part}: memory before / most / after, MB, {name}"] = (
            f"{peaks_of[0].before_mb:.0f} / {max(one.peak_mb for one in peaks_of):.0f} / "
            f"{peaks_of[-1].after_mb:.0f}"
        )


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    upstream.script(dims=DIMENSIONS)
    with sides_of(report, "bodies", upstream, scratch) as sides:
        for part in wanted:
            with report.part(part):
                part_of(report, plan, part, sides)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(
        "bodies", __doc__, PARTS, "2 rounds of 3 s in place of 5 of 5 s", "turns of each side"
    )
    given = parser.parse_args(argv)
    plan = Plan(
        given.seconds or (3.0 if given.quick else 5.0), given.rounds or (2 if given.quick else 5)
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), tell_rounds)


if __name__ == "__main__":
    sys.exit(main())
