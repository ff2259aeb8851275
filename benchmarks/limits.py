"""What exact limits cost: requests/s, messages to owners, CPU with many tenants, memory.

    python -m benchmarks.limits            # about 5 minutes
    python -m benchmarks.limits --quick    # about 2 minutes
    python -m benchmarks.limits --only on-off,memory

Caching and deduplication are off. All load comes over HTTP from a process of its own, against one
simulated upstream on loopback; what is compared takes turns, several times, so that whatever else
the machine does meets both sides.

  on-off    one hot tenant with all kinds of limits (requests per minute and hour, burst, tokens
            per minute, concurrent, USD per day and month) against one without any, in one system
  messages  messages to owners per request, by name, while the limited tenant is under load
  tenants   CPU per request, of the serving process and of the limiter's owner: a system with
            10,000 tenants, requests going round all of them, against one with 10
  memory    the owner's class alone, without Ray: memory with 100,000 tenants, and time per ask

The load is honest: every prompt is unique, an answer must hold its own prompt's digest, all are
200, the ledger and the upstream's log have as many rows as requests were sent, and the answers'
headers say that the one tenant is limited and the other is not. Exit code 1 when one of these does
not hold; missed goals are only told.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from actors.spawn import alone
from benchmarks import options
from benchmarks.apart import apart
from benchmarks.options import measured, parser_of, say, tell_figures
from benchmarks.processes import resident_b
from benchmarks.system import LEDGER_WAIT_S, System
from forebay.secrets import new_key
from tests.support.loader import Load, Result, in_process
from tests.support.upstream import Upstream

CONCURRENCY = 64
FEW, MANY, OWNED = 10, 10_000, 100_000
LIMITER = "rate-limiter"
SHORT = 3  # on and off take turns so many times as often: the machine's speed changes by the second
PARTS = ("on-off", "messages", "tenants", "memory")
NO_LIMITS = {"requests_per_minute": None, "requests_per_hour": None}
ALL_LIMITS = {
    "requests_per_minute": 6_000_000,
    "requests_per_hour": 360_000_000,
    "burst_size": 100_000,
    "tokens_per_minute": 1_000_000_000,
    "concurrent_requests": 1_000,
    "usd_per_day": 1_000_000,
    "usd_per_month": 10_000_000,
}
GOALS = {
    "requests/s, limits on / off": (0.95, ">="),
    "owner messages per request": (0.05, "<="),
    "CPU per request, 10,000 / 10 tenants": (1.1, "<="),
}


@dataclass(slots=True)
class Report(options.Report):
    messages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn is, how many there are of each side, and how many tenants are many."""

    seconds: float
    rounds: int
    warmup: int
    many: int = MANY


WARMING = Plan(1.0, 1, 0)
MEET_S = 300.0


@dataclass(slots=True)
class Cost:
    """One turn: what it served, and the CPU seconds per request of who served it."""

    result: Result
    serving_s: float
    owner_s: float

    @property
    def cpu_s(self) -> float:
        return self.serving_s + self.owner_s


class Limited(System):
    """A Forebay with so many tenants that share the default limits, and one that has none.

    `gateway` is what its configuration says otherwise than the other systems'.
    """

    def __init__(
        self,
        name: str,
        tenants: int,
        upstream: Upstream,
        scratch: Path,
        gateway: Mapping[str, Any] | None = None,
    ) -> None:
        self.free = new_key()
        self._turn = 0
        keys = [new_key() for _ in range(tenants)]
        shared = {"rate_limit_config": ALL_LIMITS, **(gateway or {})}
        super().__init__(name, upstream.url, scratch, keys=keys, gateway=shared)

    def document(self, upstream_url: str, caching: bool) -> dict[str, Any]:
        """All tenants but one share the default limits, so that the document stays small."""
        document = super().document(upstream_url, caching)
        price = {"input_cost_per_token": 1e-7, "output_cost_per_token": 4e-7}
        document["model_list"][0]["litellm_params"].update(price)
        document["tenants"] = [
            self.tenant("admin", self.admin, admin=True),
            self.tenant("free", self.free, limits=NO_LIMITS),
            *(self.tenant(f"tenant-{i:05d}", key) for i, key in enumerate(self.keys)),
        ]
        return document

    def headers_of(self, key: str) -> dict[str, str]:
        """The headers of one answer."""
        body = {"model": "sim", "messages": [{"role": "user", "content": "What may I use?"}]}
        request = urllib.request.Request(
            f"{self.url}/v1/chat/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json", "authorization": f"Bearer {key}"},
        )
        self.sent += 1
        with urllib.request.urlopen(request, timeout=30) as response:
            return {name.lower(): value for name, value in response.headers.items()}

    def turn(
        self,
        report: options.Report,
        plan: Plan,
        keys: Sequence[str],
        *,
        requests: int | None = None,
    ) -> Cost:
        """One turn of load with these keys, each time beginning at another one; at most so many."""
        shift = (self._turn * 2_000) % len(keys)
        self._turn += 1
        serving_s, owner_s = self.cpu_s(), self.child.cpu_s("RateLimiter")
        result = in_process(
            Load(
                f"{self.url}/v1/chat/completions",
                concurrency=CONCURRENCY,
                requests=requests,
                seconds=plan.seconds,
                warmup=plan.warmup,
                keys=[*keys[shift:], *keys[:shift]],
                check=True,
            )
        )
        self.sent += result.sent
        report.check(self.name, result)
        sent = max(result.sent, 1)
        return Cost(
            result,
            (self.cpu_s() - serving_s) / sent,
            (self.child.cpu_s("RateLimiter") - owner_s) / sent,
        )


# ------------------------------------------------------------------------------------ the parts


def on_off(report: Report, plan: Plan, system: Limited) -> None:
    """Limits on and off in turn, for one hot tenant each, and what owners are told meanwhile."""
    limited, free = system.headers_of(system.keys[0]), system.headers_of(system.free)
    for name in ("x-ratelimit-limit-requests", "x-ratelimit-limit-tokens"):
        if name not in limited or name in free:
            report.problems.append(
                f"{name}: {limited.get(name)} with limits, {free.get(name)} without"
            )
    system.turn(report, WARMING, [system.free, system.keys[0]])
    rates: dict[str, list[float]] = {"on": [], "off": []}
    messages: Counter[str] = Counter()
    asked = 0
    sides = [("off", system.free), ("on", system.keys[0])]
    short = replace(plan, seconds=plan.seconds / SHORT)
    for number in range(plan.rounds * SHORT):
        for side, key in sides if number % 2 else reversed(sides):
            before = system.messages()
            cost = system.turn(report, short, [key])
            rates[side].append(cost.result.requests_per_s)
            if side == "on":
                messages.update(system.messages() - before)
                asked += cost.result.sent
            say_cost(f"limits {side:3}", cost)
    ratios = [on / off for on, off in zip(rates["on"], rates["off"], strict=True)]
    report.rounds["limits on / off"] = ratios
    report.figures["requests/s, limits on / off"] = statistics.median(ratios)
    report.messages = {name: n / asked for name, n in sorted(messages.items())}
    report.figures["owner messages per request"] = sum(report.messages.values())
    report.figures["of these, the limiter's"] = sum(
        n for name, n in report.messages.items() if name.startswith(LIMITER)
    )


def tenants(report: Report, plan: Plan, few: Limited, many: Limited) -> None:
    """Ten tenants and ten thousand in turn, once each of them has been served: until then the
    limiter asks the ledger what each has used, which has a figure of its own."""
    few.turn(report, WARMING, few.keys)
    met = many.turn(report, Plan(MEET_S, 1, 0), many.keys, requests=len(many.keys))
    report.facts["many: the first request of each, CPU of both, us"] = round(met.cpu_s * 1e6, 1)
    costs: dict[str, list[Cost]] = {"few": [], "many": []}
    asked: Counter[str] = Counter()
    for _ in range(plan.rounds):
        for side, system in (("few", few), ("many", many)):
            before = system.messages()
            cost = system.turn(report, plan, system.keys)
            costs[side].append(cost)
            spent = system.messages() - before
            asked[side] += sum(n for name, n in spent.items() if name.startswith(LIMITER))
            say_cost(f"{len(system.keys):6} tenants", cost)
    pairs = list(zip(costs["many"], costs["few"], strict=True))
    serving = [a.serving_s / b.serving_s for a, b in pairs if b.serving_s]
    both = [a.cpu_s / b.cpu_s for a, b in pairs if b.cpu_s]
    report.rounds["CPU per request, many / few, serving process"] = serving
    report.rounds["CPU per request, many / few, serving process and owner"] = both
    if not serving or not both:
        report.problems.append("no CPU time was found for the serving process")
        return
    report.figures["CPU per request, 10,000 / 10 tenants"] = statistics.median(both)
    report.figures["of the serving process alone"] = statistics.median(serving)
    for side, found in costs.items():
        sent = sum(cost.result.sent for cost in found)
        report.facts[f"{side}: messages to the limiter's owner per request"] = round(
            asked[side] / sent, 4
        )
        report.facts[f"{side}: owner's CPU per request, us"] = round(
            statistics.median(cost.owner_s for cost in found) * 1e6, 1
        )
        report.facts[f"{side}: serving process's CPU per request, us"] = round(
            statistics.median(cost.serving_s for cost in found) * 1e6, 1
        )


def memory(report: Report) -> None:
    """In a process of its own, so that nothing else is in the figure."""
    found: dict[str, float] = apart("limits", "--owner-alone", OWNED)
    report.facts |= {f"owner alone: {name}": value for name, value in found.items()}
    if found["tenants held"] != OWNED:
        report.problems.append(f"the owner holds {found['tenants held']:.0f} tenants of {OWNED}")


def owner_alone(count: int) -> dict[str, float]:
    """The owner's class with so many tenants that each have one request under way.

    All kinds are limited; each tenant is asked about twice, without and with the ledger's word.
    """
    from actors.rate_limiter.owner import RateLimiter
    from actors.rate_limiter.terms import Ask, Layout, Limits, Need, Seed

    clock = [1_000.0]
    day = 1_700_000_000.0
    limits = Limits(600.0, 20, 10_000, 32, 100_000, 10**12, 10**13)
    owner = alone(RateLimiter)(clock=lambda: clock[0], wall=lambda: day, fresh=True)
    first = Ask("", limits, need=1, ahead=Need(1, 500, 10_000))
    seeded = first._replace(needs=(Need(1, 500, 10_000),), seed=Seed(0))
    layout, name, seq, slowest_s = Layout(), "", 0, 0.0

    def send(asks: list[Ask]) -> None:
        nonlocal name, seq, slowest_s
        seq += 1
        sent_s = time.thread_time()
        name = owner.lease("node/1/1#0", seq, asks, layout, name).owner
        slowest_s = max(slowest_s, time.thread_time() - sent_s)

    gc.collect()
    before_b, begun_s = resident_b(), time.thread_time()
    send([])
    for start in range(0, count, 100):
        tenants = [f"tenant-{number:06d}" for number in range(start, min(start + 100, count))]
        clock[0] += 0.001
        for ask in (first, seeded):
            send([ask._replace(tenant=tenant) for tenant in tenants])
    took_s = time.thread_time() - begun_s
    gc.collect()
    full_b = resident_b()
    held = float(owner.stats()["tenants"])
    owner.holder_gone("node/1/1")
    return {
        "tenants held": held,
        "memory, MB": round((full_b - before_b) / 2**20, 1),
        "bytes per tenant": round((full_b - before_b) / held),
        "CPU per ask, us": round(took_s / count / 2 * 1e6, 1),
        "slowest message of 100 asks, ms": round(slowest_s * 1e3, 2),
    }


# ----------------------------------------------------------------------------------- the report


def say_cost(side: str, cost: Cost) -> None:
    result = cost.result
    say(
        f"  {side:15}{result.requests_per_s:10,.0f} requests/s{result.p50_ms or 0:9.1f} ms p50"
        f"{cost.serving_s * 1e6:9.0f} us CPU serving{cost.owner_s * 1e6:8.1f} us CPU owner"
    )


def check_counts(report: Report, systems: Sequence[Limited], upstream: Upstream) -> None:
    """What was sent, what the ledgers have and what the upstream answered are one number."""
    sent = sum(system.sent for system in systems)
    rows = sum(system.rows() for system in systems)
    calls = upstream.stats()["requests"]
    report.facts["requests sent / ledger rows / upstream calls"] = f"{sent} / {rows} / {calls}"
    if len({sent, rows, calls}) != 1:
        report.problems.append(
            f"{sent} requests were sent, the ledgers have {rows} rows after {LEDGER_WAIT_S} s, "
            f"the upstream answered {calls}"
        )


def show(report: Report) -> None:
    tell_figures(report, GOALS, ".3f")
    for name, values in report.rounds.items():
        print(f"  {name:58}" + " ".join(f"{value:.3f}" for value in values))
    if report.messages:
        print("\n  owner messages per request, limits on, at 64")
        for name, value in sorted(report.messages.items(), key=lambda item: -item[1]):
            print(f"    {name:40}{value:10.5f}")


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    if "memory" in wanted:
        with report.part("memory"):
            memory(report)
    if not {"on-off", "messages", "tenants"} & set(wanted):
        return
    with Limited("few", FEW, upstream, scratch) as few, ExitStack() as stack:
        systems = [few]
        if {"on-off", "messages"} & set(wanted):
            with report.part("on-off"):
                on_off(report, plan, few)
        if "tenants" in wanted:
            with report.part("tenants"):
                many = stack.enter_context(Limited("many", plan.many, upstream, scratch))
                systems.append(many)
                tenants(report, plan, few, many)
        check_counts(report, systems, upstream)


def main(argv: Sequence[str] | None = None) -> int:
    quick = "2 turns of 2 s in place of 5 of 6 s"
    parser = parser_of("limits", __doc__, PARTS, quick, "turns of each side")
    parser.add_argument("--many", type=int, default=MANY, help=f"in place of {MANY} tenants")
    parser.add_argument("--owner-alone", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.owner_alone is not None:
        print(json.dumps(owner_alone(given.owner_alone)))
        return 0
    plan = Plan(
        given.seconds or (2.0 if given.quick else 6.0),
        given.rounds or (2 if given.quick else 5),
        warmup=64 if given.quick else 200,
        many=given.many,
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), show)


if __name__ == "__main__":
    sys.exit(main())
