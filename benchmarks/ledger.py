"""What an exact ledger costs: entries/s made durable, entries per sync, and a restart's time.

    python -m benchmarks.ledger               # about 2 minutes
    python -m benchmarks.ledger --quick       # about 1 minute
    python -m benchmarks.ledger --only restart
    python -m benchmarks.ledger --url postgresql://USER:PASSWORD@HOST/DATABASE    # an empty one

The owner's class alone, in this process, without Ray: desks that send messages of so many entries,
each as soon as its last one is acknowledged.

  durable  entries/s and entries per sync: 16 desks with full messages of 500 entries, and 16 whose
           messages hold the 8 entries of a tenth of a second
  single   one desk, one entry at a time: the time until it is durable, which is what a call waits
           for with `durability: strict`
  gateway  requests/s over HTTP with the ledger on over those with it off, two systems in turn, all
           limits on, caching and deduplication off
  restart  from opening a store with 1,000,000 entries until its first answer: after a clean end,
           and after a kill that leaves a write-ahead log behind

It is honest: every entry is one of a kind, syncs are counted where SQLite makes them (for
PostgreSQL, commits are), and after each part the totals that the store tells are what was sent, to
the nano-dollar; the gateway's ledger has a row for each request. Exit code 1 when one of these does
not hold; missed goals are only told.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from actors.ledger.owner import Ledger
from actors.ledger.policy import Entry
from benchmarks import limits
from benchmarks.apart import ROOT
from benchmarks.options import Report, measured, parser_of, say, tell_figures
from deployments.request_ids import RequestIds
from tests.support.failing_disk import Disk
from tests.support.upstream import Upstream

DESKS = 16
FULL, USUAL = 500, 8
STORED = 1_000_000
PARTS = ("durable", "single", "gateway", "restart")
START_MS = 1_790_000_000_000
GOALS = {
    f"entries per sync, {DESKS} desks, messages of {FULL}": (50.0, ">="),
    f"entries per sync, {DESKS} desks, messages of {USUAL}": (50.0, ">="),
    "requests/s, ledger on / off": (0.95, ">="),
    "restart, s": (5.0, "<="),
    "restart after a kill, s": (5.0, "<="),
}


@dataclass(slots=True)
class Bench:
    """One store, and what was sent to it."""

    path: Path
    url: str | None
    entries: int = 0
    cost_nano: int = 0
    new_id: Callable[[], str] = field(default_factory=RequestIds)

    def ledger(self) -> Ledger:
        url = None if self.url is None else partial(str, self.url)
        return Ledger(str(self.path), url=url, lock_wait_s=30.0)

    def entry(self) -> Entry:
        """The next one: of a thousand tenants, three models and a month; ids as calls have them."""
        n = self.entries
        self.entries += 1
        self.cost_nano += 1_000 + n % 7_919
        return Entry(
            self.new_id(), f"chatcmpl-{random.getrandbits(96):024x}", 1,
            f"tenant-{n % 1000}", "chat", f"model-{n % 3}",
            "openai/model#1", "posted", 100 + n % 400, 20 + n % 300, 1_000 + n % 7_919, False,
            False, n % 2 == 0, 800, START_MS + n * 2_592, None, 200, "litellm-1.0",
        )  # fmt: skip

    async def check(self, ledger: Ledger, report: Report) -> None:
        usage = await ledger.usage()
        told = (usage["entries"], usage["total_cost_nano"])
        if told != (self.entries, self.cost_nano):
            report.problems.append(f"sent {(self.entries, self.cost_nano)}, stored {told}")


async def load(bench: Bench, ledger: Ledger, size: int, seconds: float) -> tuple[float, float]:
    """All desks at once for so long. Returns entries/s, and messages' median time in ms."""
    ends_s = time.perf_counter() + seconds
    took_s: list[float] = []

    async def desk(name: str) -> int:
        done = 0
        while (begun_s := time.perf_counter()) < ends_s:
            await ledger.append(name, done, [bench.entry() for _ in range(size)])
            took_s.append(time.perf_counter() - begun_s)
            done += size
        return done

    begun_s = time.perf_counter()
    sent = sum(await asyncio.gather(*(desk(f"desk-{n}") for n in range(DESKS))))
    return sent / (time.perf_counter() - begun_s), statistics.median(took_s) * 1e3


async def durable(bench: Bench, report: Report, seconds: float) -> None:
    for size in (FULL, USUAL):
        with Disk(keeps=False) as disk:
            ledger = bench.ledger()
            await ledger.count()
            syncs, commits, before = disk.syncs, ledger.stats()["commits"], bench.entries
            rate, median_ms = await load(bench, ledger, size, seconds)
            made = disk.syncs - syncs or ledger.stats()["commits"] - commits
            await bench.check(ledger, report)
            await ledger.close()
        case = f"{DESKS} desks, messages of {size}"
        report.figures[f"entries/s, {case}"] = rate
        report.figures[f"entries per sync, {case}"] = (bench.entries - before) / made
        report.facts[f"time of a message, {case}, ms"] = round(median_ms, 1)


async def single(bench: Bench, report: Report, seconds: float) -> None:
    ledger = bench.ledger()
    took_ms: list[float] = []
    ends_s = time.perf_counter() + seconds
    while (begun_s := time.perf_counter()) < ends_s:
        await ledger.append("desk", len(took_ms), [bench.entry()])
        took_ms.append((time.perf_counter() - begun_s) * 1e3)
    await bench.check(ledger, report)
    await ledger.close()
    marks = statistics.quantiles(took_ms, n=100)
    report.figures["one entry until it is durable, p50, ms"] = marks[49]
    report.figures["one entry until it is durable, p99, ms"] = marks[98]


async def restart(bench: Bench, report: Report, stored: int) -> None:
    ledger = bench.ledger()
    begun_s, before = time.perf_counter(), bench.entries
    while bench.entries < stored:
        batch = [bench.entry() for _ in range(min(5_000, stored - bench.entries))]
        await ledger.append("filler", 0, batch)
    filled_s = time.perf_counter() - begun_s
    if bench.entries > before:
        report.facts["entries/s, one desk, messages of 5,000"] = round(
            (bench.entries - before) / filled_s
        )
    await ledger.close()
    report.figures["restart, s"] = await opening(bench, report)
    if bench.url is None:
        await asyncio.to_thread(leave_a_log, bench)
        report.facts["log left behind, MB"] = round(
            bench.path.with_name(bench.path.name + "-wal").stat().st_size / 2**20, 1
        )
        report.figures["restart after a kill, s"] = await opening(bench, report)
        report.facts["file, MB"] = round(bench.path.stat().st_size / 2**20)
    report.facts["entries stored"] = bench.entries


async def opening(bench: Bench, report: Report) -> float:
    """As a new process would find it: nothing of the file in memory, where that can be had."""
    if bench.url is None:
        forget(bench.path)
    ledger = bench.ledger()
    begun_s = time.perf_counter()
    count = await ledger.count()
    took_s = time.perf_counter() - begun_s
    if count != bench.entries:
        report.problems.append(f"{bench.entries} entries were sent, {count} are there")
    await bench.check(ledger, report)
    await ledger.close()
    return took_s


def forget(path: Path) -> None:
    """Ask the system to drop what it holds of a file in memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def leave_a_log(bench: Bench) -> None:
    """A process that appends 20,000 entries and is killed."""
    command = [sys.executable, "-m", "benchmarks.ledger", "--die-at", str(bench.path)]
    spare = Bench(bench.path, None, bench.entries, bench.cost_nano)
    done = subprocess.run(
        [*command, "--from", str(bench.entries)], cwd=ROOT, check=False, timeout=300
    )
    assert done.returncode == -9, done.returncode
    for _ in range(20_000):
        spare.entry()
    bench.entries, bench.cost_nano = spare.entries, spare.cost_nano


async def die_at(path: Path, first: int) -> None:
    bench = Bench(path, None, first)
    ledger = bench.ledger()
    for _ in range(40):
        await ledger.append("dying", 0, [bench.entry() for _ in range(500)])
    os.kill(os.getpid(), 9)


async def gateway(report: Report, seconds: float, upstream: Upstream, scratch: Path) -> None:
    """Short turns, since the machine's speed changes by the second."""
    plan = limits.Plan(min(2.0, seconds), 5 * round(max(1.0, seconds / 3)), 64)
    with ExitStack() as stack:
        sides = [
            stack.enter_context(
                limits.Limited(f"ledger-{name}", 10, upstream, scratch, {"enable_llmops": kept})
            )
            for name, kept in (("on", True), ("off", False))
        ]
        on, off = sides
        rates: dict[str, list[float]] = {system.name: [] for system in sides}
        for system in sides:
            system.turn(report, limits.WARMING, system.keys)
        for number in range(plan.rounds):
            for system in sides if number % 2 else reversed(sides):
                cost = system.turn(report, plan, system.keys)
                rates[system.name].append(cost.result.requests_per_s)
                limits.say_cost(system.name, cost)
        rows = on.rows()
        if rows != on.sent:
            report.problems.append(f"{on.sent} requests were sent, the ledger has {rows} rows")
    pairs = zip(rates[on.name], rates[off.name], strict=True)
    ratios = [kept / free for kept, free in pairs]
    report.figures["requests/s, ledger on / off"] = statistics.median(ratios)
    report.facts["ledger on / off, turn by turn"] = " ".join(f"{ratio:.2f}" for ratio in ratios)


def show(report: Report) -> None:
    tell_figures(report, GOALS)


def run(report: Report, given: argparse.Namespace, upstream: Upstream, scratch: Path) -> None:
    seconds = given.seconds or (3.0 if given.quick else 15.0)
    stored = given.stored or (200_000 if given.quick else STORED)
    parts: dict[str, Callable[[Bench], Any]] = {
        "durable": lambda bench: durable(bench, report, seconds),
        "single": lambda bench: single(bench, report, seconds),
        "gateway": lambda bench: gateway(report, seconds, upstream, scratch),
        "restart": lambda bench: restart(bench, report, stored),
    }
    report.facts["disk"] = f"{shutil.disk_usage(scratch).total // 2**30} GB"
    bench = Bench(scratch / "ledger.db", given.url)
    for name in PARTS:
        if name in given.only:
            say(f"  {name}")
            with report.part(name):
                asyncio.run(parts[name](bench))


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("ledger", __doc__, PARTS, "3 s a turn, 200,000 entries stored")
    parser.add_argument("--stored", type=int, help=f"in place of {STORED} entries")
    parser.add_argument("--url", help="an empty PostgreSQL database in place of a file")
    parser.add_argument("--die-at", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--from", type=int, dest="first", default=0, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.die_at is not None:
        asyncio.run(die_at(given.die_at, given.first))
    report = Report()
    return measured(given, report, partial(run, report, given), show)


if __name__ == "__main__":
    sys.exit(main())
