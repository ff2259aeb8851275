"""What Forebay takes to be there: time to import, time to the first answer, memory.

    python -m benchmarks.footprint            # about 4 minutes
    python -m benchmarks.footprint --quick    # about 2 minutes

  import  `import forebay` in a new interpreter, several times; its names are loaded when they are
          first used, so also all of them at once
  start   from `forebay up` to the first answer of a chat, upstream and LiteLLM included
  memory  of each process of the system that was started last, at rest and under load: 64 callers
          for some seconds, 50 tenants, all concerns on. Pages that processes share are counted in
          parts (PSS), so the sum is what the machine gives
  rest    of systems with 1, 2 and 4 replicas (quick: 2) that are asked nothing: CPU, messages to
          owners, memory

It is honest: the ledger has as many rows as requests were sent, and each process is in the sum,
also one that has no name here. Exit code 1 when that does not hold; missed goals are only told.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks import options
from benchmarks.apart import ROOT
from benchmarks.options import measured, parser_of, say, tell_goal, tell_rounds
from benchmarks.processes import Member
from benchmarks.system import System
from tests.support.loader import Load, in_process
from tests.support.upstream import Upstream

PARTS = ("import", "start", "memory", "rest")
REPLICAS = (1, 2, 4)
CONCURRENCY = 64
IMPORT_GOAL_S, START_GOAL_S = 0.3, 20.0
HEAVY = ("aiohttp", "litellm", "numpy", "openai", "pyarrow", "pydantic", "ray", "starlette")
IMPORTING = (
    "import json, sys, time; begun = time.perf_counter(); {}; took = time.perf_counter() - begun; "
    f"print(json.dumps([took, sorted(set({HEAVY!r}) & set(sys.modules))]))"
)
KNOWN = (
    (r"ray::ServeReplica", "replica", "answers HTTP; LiteLLM is two thirds of it"),
    (r"ray::ServeController", "Serve's controller", "starts and watches replicas and ingress"),
    (r"ray::\S*Proxy", "Serve's ingress actor", "writes HAProxy's configuration"),
    (r"haproxy", "HAProxy", "the port that callers see"),
    (r"ray::Ledger", "owner: ledger", "entries on disk, exact sums"),
    (r"ray::RateLimiter", "owner: rate limiter", "what tenants have left"),
    (r"ray::CircuitBreaker", "owner: circuit breaker", "which deployments are well"),
    (r"ray::Cache", "owner: cache", "keys and stored answers"),
    (r"ray::Batcher", "owner: batcher", "sends embedding texts; loads LiteLLM with the first"),
    (r"ray::Registry", "owner: registry", "configuration, and metrics of the whole system"),
    (r"ray::LocalModels", "embedded models", "loaded on first use"),
    (r"ray::IDLE", "idle Ray workers", "kept by Ray for the next actor"),
    (r"-m forebay up", "forebay up", "the driver: starts the rest and waits"),
    (r"gcs_server", "Ray: GCS", "the cluster's directory"),
    (r"raylet/raylet|/raylet ", "Ray: raylet", "workers and object store of this node"),
    (r"log_monitor", "Ray: log monitor", "Python; reads workers' logs"),
    (r"[Aa]gent", "Ray: agents", "Python; runtime environments, and metrics of the node"),
    (r"dashboard|monitor\.py", "Ray: monitors", "Python; job and node state"),
)
OTHER = "others"


@dataclass(slots=True)
class Share:
    """Processes of one kind."""

    name: str
    why: str
    processes: int = 0
    idle_mb: float = 0.0
    load_mb: float = 0.0


@dataclass(slots=True)
class Report(options.Report):
    shares: list[Share] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Plan:
    """How long the load is, how many imports, and how many starts."""

    seconds: float
    imports: int
    starts: int
    rest_s: float
    replicas: Sequence[int] = REPLICAS


IMPORT, START = "import forebay, s", "forebay up to the first answer, s"
IMPORTS = {IMPORT: "import forebay", "all its public names, s": "from forebay import *"}


def importing(report: Report, plan: Plan) -> None:
    for name, statement in IMPORTS.items():
        for _ in range(plan.imports):
            took_s, loaded = imported(statement)
            report.add(name, took_s)
            report.facts[f"{statement}: heavy libraries it loads"] = ", ".join(loaded) or "none"


def imported(statement: str) -> tuple[float, list[str]]:
    """Seconds that it takes a new interpreter, and which of HEAVY are loaded then."""
    command = [sys.executable, "-c", IMPORTING.replace("{}", statement, 1)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    took_s, loaded = json.loads(done.stdout)
    return took_s, loaded


def starting(
    report: Report, plan: Plan, upstream: Upstream, scratch: Path, *, is_loaded: bool
) -> None:
    for number in range(plan.starts):
        with System("footprint", upstream.url, scratch, caching=True) as system:
            report.add(START, system.first_s)
            say(f"  first answer after {system.first_s:.1f} s")
            if is_loaded and number == plan.starts - 1:
                memory(report, plan, system)
            report.audit("Forebay", system)


def memory(report: Report, plan: Plan, system: System) -> None:
    idle = system.child.members()
    load = Load(
        f"{system.url}/v1/chat/completions",
        concurrency=CONCURRENCY,
        seconds=plan.seconds,
        keys=system.keys,
        check=True,
    )
    with ThreadPoolExecutor(1) as thread:
        under_way = thread.submit(in_process, load)
        time.sleep(plan.seconds * 0.8)
        loaded = system.child.members()
        result = under_way.result()
    system.sent += result.sent
    report.check("under load", result)
    report.shares = shares_of(idle, loaded)
    report.facts["requests under load"] = f"{result.sent:,}"
    report.add("whole system at idle, MB", sum(member.pss_mb for member in idle))
    report.add("whole system under load, MB", sum(member.pss_mb for member in loaded))


def resting(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    """What systems cost that are asked nothing, by how many replicas they have."""
    for count in plan.replicas:
        server = {"replicas": count}
        with System("rest", upstream.url, scratch, caching=True, server=server) as system:
            named = f"{count} replica" + "s" * (count > 1)
            messages, cpu_s = system.messages(), system.child.cpu_s()
            time.sleep(plan.rest_s)
            cpu_s = system.child.cpu_s() - cpu_s
            sent = sum((system.messages() - messages).values())
            report.add(f"{named}: first answer, s", system.first_s)
            report.add(f"{named}: CPU at rest, % of a core", 100 * cpu_s / plan.rest_s)
            report.add(f"{named}: messages/s at rest", sent / plan.rest_s)
            pss_mb = sum(member.pss_mb for member in system.child.members())
            report.add(f"{named}: whole system, MB", pss_mb)


def shares_of(idle: Sequence[Member], loaded: Sequence[Member]) -> list[Share]:
    """What each kind of process has, the largest first; what nobody knows is OTHER."""
    found: dict[str, Share] = {}

    def share(member: Member) -> Share:
        for pattern, name, why in KNOWN:
            if re.search(pattern, member.line):
                return found.setdefault(name, Share(name, why))
        return found.setdefault(OTHER, Share(OTHER, member.line[:60]))

    for member in idle:
        share(member).idle_mb += member.pss_mb
    for member in loaded:
        one = share(member)
        one.load_mb += member.pss_mb
        one.processes += 1
    return sorted(found.values(), key=lambda one: -one.load_mb)


def show(report: Report) -> None:
    tell_rounds(report, ",.4g")
    if report.shares:
        print(f"\n  {'':24}{'processes':>10}{'idle MB':>10}{'loaded MB':>10}")
    for one in report.shares:
        print(
            f"  {one.name:24}{one.processes:10}{one.idle_mb:10.0f}{one.load_mb:10.0f}   {one.why}"
        )
    print()
    tell_goal(IMPORT, report.rounds.get(IMPORT, []), "<=", IMPORT_GOAL_S)
    tell_goal(START, report.rounds.get(START, []), "<=", START_GOAL_S)


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    if "import" in wanted:
        with report.part("import"):
            importing(report, plan)
    if {"start", "memory"} & set(wanted):
        with report.part("start"):
            starting(report, plan, upstream, scratch, is_loaded="memory" in wanted)
    if "rest" in wanted:
        with report.part("rest"):
            resting(report, plan, upstream, scratch)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("footprint", __doc__, PARTS, "one start in place of three, 3 s of load")
    given = parser.parse_args(argv)
    plan = Plan(
        given.seconds or (3.0 if given.quick else 10.0),
        imports=3 if given.quick else 7,
        starts=1 if given.quick else 3,
        rest_s=5.0 if given.quick else 20.0,
        replicas=(2,) if given.quick else REPLICAS,
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), show)


if __name__ == "__main__":
    sys.exit(main())
