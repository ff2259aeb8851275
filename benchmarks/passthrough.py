"""How much a chat completion costs on its way through: Forebay, its parts, and other gateways.

    python -m benchmarks.passthrough            # about 20 minutes
    python -m benchmarks.passthrough --quick    # about 8 minutes
    python -m benchmarks.passthrough --only d2,e

One simulated upstream, all on loopback, load from a process of its own:
  a   the simulator itself
  b   Ray Serve's no-op behind the HAProxy and profile that Forebay uses
  c   bare `litellm.acompletion` in a loop: one process, one core
  c2  Forebay's LiteLLM lane in a loop, likewise; c3 its relay
  d   Forebay over HTTP: 50 tenants with keys and finite limits, breaker, ledger, metrics, caching
      and deduplication on; no answer is stored yet, so all are misses
  d2  the same with caching and deduplication off
  d3  as d2, with `lane: litellm`
  dd  as d, with two replicas
  e   LiteLLM Proxy of the same version, one worker; e2 with two
  f   Portkey's gateway, g ferrogw (Go), h vllm-router (Rust): what each does beside passing on is
      printed

What is compared runs beside each other and takes turns, N rounds in changing order, at concurrency
64 and at 1, where the simulator itself has a turn of each round too. Figures are medians with their
range. At 64 the rate is compared, at 1 the median latency over the simulator's own.

The load is honest: every prompt is unique, keys go round, an answer must hold its own prompt's
digest, all are 200; after each pair the upstream has counted what both were sent, and at the end of
each Forebay its ledger has as many rows as it was sent requests. Exit code 1 when one of these does
not hold; missed goals, and peers that cannot be had, are only told.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import options, peers
from benchmarks.apart import apart
from benchmarks.options import brief, measured, parser_of, say, spread, tell_goal
from benchmarks.system import System, no_op, tenant_keys
from tests.support.loader import Load, in_process
from tests.support.upstream import Upstream

MANY, ONE = 64, 1
NAMES = {
    "a": "simulator directly",
    "b": "Serve no-op, same HAProxy",
    "c": "bare litellm.acompletion",
    "c2": "Forebay's LiteLLM lane, bare",
    "c3": "Forebay's relay lane, bare",
    "d": "Forebay, all concerns on",
    "d2": "Forebay, cache and dedup off",
    "d3": "Forebay, off, LiteLLM lane",
    "dd": "Forebay, on, two replicas",
    "e": "LiteLLM Proxy",
    "e2": "LiteLLM Proxy, two workers",
    "f": "Portkey gateway",
    "g": "ferrogw",
    "h": "vllm-router",
}
PEERS = {
    "e": "litellm-proxy",
    "e2": "litellm-proxy-2",
    "f": "portkey",
    "g": "ferrogw",
    "h": "vllm-router",
}
LOOPS = {"c": "bare", "c2": "litellm", "c3": "relay"}
PAIRS = (
    ("dd", "e2"),
    ("dd", "e"),
    ("d", "e"),
    ("d2", "e"),
    ("d2", "f"),
    ("d2", "b"),
    ("d2", "g"),
    ("d2", "h"),
    ("d3", "c"),
    ("c2", "c"),
    ("c3", "c"),
)
"""In an order in which few of them have to be started twice."""
RATE_GOALS = {
    ("d2", "e"): 30.0,
    ("d", "e"): 25.0,
    ("dd", "e"): 15.0,
    ("d2", "f"): 1.5,
    ("d2", "b"): 0.4,
}
ADDED_MS_GOAL, ADDED_SHARE_GOAL = 0.6, 0.1
LANE_CPU_GOAL, LANE_RATE_GOAL = 1.1, 0.75
MESSAGES_GOALS = {"d2": 0.05, "dd": 0.5}


@dataclass(slots=True)
class Turn:
    """One load on one system. `round` counts the pair's; `cpu_s` is that of who served it."""

    system: str
    pair: tuple[str, str]
    round: int
    concurrency: int
    requests: int
    sent: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s: float | None = None
    messages: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Report(options.Report):
    """`sent` to the upstream, and `calls` that it has counted."""

    turns: list[Turn] = field(default_factory=list)
    sent: int = 0
    calls: int = 0

    def of(self, system: str, concurrency: int) -> list[Turn]:
        return [t for t in self.turns if (t.system, t.concurrency) == (system, concurrency)]

    def per_round(
        self, pair: tuple[str, str], concurrency: int, figure: Callable[[Turn], float]
    ) -> list[dict[str, float]]:
        """Of each round, the figure of each system that took part in it."""
        rounds: dict[int, dict[str, float]] = {}
        for turn in self.turns:
            if (turn.pair, turn.concurrency) == (pair, concurrency):
                rounds.setdefault(turn.round, {})[turn.system] = figure(turn)
        return list(rounds.values())

    def ratios(
        self, pair: tuple[str, str], concurrency: int, figure: Callable[[Turn], float]
    ) -> list[float]:
        """The pair's figures, one over the other, round by round."""
        over, under = pair
        found = self.per_round(pair, concurrency, figure)
        return [one[over] / one[under] for one in found if one.get(under) and over in one]

    def added_ms(self, pair: tuple[str, str], system: str) -> list[float]:
        """The median latency at concurrency 1 over the simulator's own, round by round."""
        found = self.per_round(pair, ONE, lambda turn: turn.p50_ms)
        return [one[system] - one["a"] for one in found if {system, "a"} <= one.keys()]

    def all_added_ms(self, system: str) -> list[float]:
        """The same over all its pairs."""
        pairs = [pair for pair in PAIRS if system in pair]
        return [added for pair in pairs for added in self.added_ms(pair, system)]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long a turn is, how many rounds a pair has, and the first load of a system."""

    seconds: float
    rounds: int
    warmup: int


# -- what takes part ------------------------------------------------------------------------


@dataclass(slots=True)
class Running:
    """What answers: where, with which keys and headers. A `loop` is asked by nobody: it asks."""

    name: str
    url: str = ""
    keys: Sequence[str] = ()
    headers: Mapping[str, str] = field(default_factory=dict)
    check: bool = True
    cpu_s: Callable[[], float] | None = None
    system: System | None = None
    is_warm: bool = False

    @property
    def calls_upstream(self) -> bool:
        return self.name != "b"


FOREBAYS: dict[str, dict[str, Any]] = {
    "d": {"caching": True},
    "d2": {"caching": False},
    "d3": {"caching": False, "server": {"lane": "litellm"}},
    "dd": {"caching": True, "server": {"replicas": 2}},
}


@contextmanager
def started(name: str, report: Report, upstream: Upstream, scratch: Path) -> Iterator[Running]:
    """One of NAMES. Raises NoPeer for a peer that cannot be had."""
    say(f"  starting {name}: {NAMES[name]}")
    if name in PEERS:
        with peers.running(PEERS[name], upstream.url, scratch) as peer:
            yield Running(name, peer.url, peer.keys, peer.headers, cpu_s=peer.child.cpu_s)
    elif name in FOREBAYS:
        with System(name, upstream.url, scratch, **FOREBAYS[name]) as system:
            report.facts[f"{name}: first 200 after forebay up, s"] = round(system.first_s, 1)
            yield Running(name, system.url, system.keys, cpu_s=system.cpu_s, system=system)
            report.audit(name, system)
    elif name == "b":
        with no_op(scratch) as (url, child):
            cpu_s = partial(child.cpu_s, "NoOp")
            yield Running(name, url, tenant_keys(), check=False, cpu_s=cpu_s)
    else:
        yield Running(name, upstream.url, tenant_keys())


class Stage:
    """Owns what runs now: at most the two of a pair. Leaving the context ends all of it."""

    def __init__(self, report: Report, upstream: Upstream, scratch: Path) -> None:
        self._start = partial(started, report=report, upstream=upstream, scratch=scratch)
        self._running: dict[str, tuple[Running, ExitStack]] = {}

    def cast(self, names: Sequence[str]) -> list[Running]:
        """Exactly these run; those of before that are still wanted go on. Raises NoPeer."""
        for name in [name for name in self._running if name not in names]:
            self._running.pop(name)[1].close()
        for name in names:
            if name not in self._running:
                with ExitStack() as stack:
                    running = stack.enter_context(self._start(name))
                    self._running[name] = running, stack.pop_all()
        return [self._running[name][0] for name in names]

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *_: object) -> None:
        self.cast([])


# -- turns ----------------------------------------------------------------------------------


def play(
    report: Report, plan: Plan, pair: tuple[str, str], stage: Stage, upstream: Upstream
) -> None:
    """All rounds of a pair; afterwards the upstream's count is compared with what was sent."""
    one, other = stage.cast(pair)
    direct = Running("a", upstream.url, tenant_keys())
    upstream.reset()
    sent = 0
    concurrencies = (MANY,) if LOOPS.keys() & set(pair) else (MANY, ONE)
    for number in range(plan.rounds):
        for concurrency in concurrencies:
            sides = [one, other] if number % 2 else [other, one]
            for side in [direct, *sides] if concurrency == ONE else sides:
                turn = take(report, plan, side, pair, number, concurrency)
                sent += turn.sent if side.calls_upstream else 0
    calls = upstream.stats()["requests"]
    report.sent += sent
    report.calls += calls
    counts = f"{report.sent} / {report.calls}"
    report.facts["all pairs: requests sent / upstream calls"] = counts
    if sent != calls:
        report.problems.append(
            f"{pair[0]} and {pair[1]}: {sent} requests were sent, the upstream answered {calls}"
        )


def take(
    report: Report, plan: Plan, side: Running, pair: tuple[str, str], number: int, concurrency: int
) -> Turn:
    """One turn, which goes into the report and onto the screen."""
    if side.name in LOOPS:
        turn = loop(report, plan, side, pair, number, concurrency)
    else:
        turn = load(report, plan, side, pair, number, concurrency)
    report.turns.append(turn)
    say(
        f"  {'/'.join(pair):7}{number + 1:3}{turn.system:>4} at {concurrency:2}"
        f"{turn.requests_per_s:12,.0f} requests/s{turn.p50_ms:9.2f} ms p50{turn.p99_ms:9.2f} ms p99"
    )
    return turn


def load(
    report: Report, plan: Plan, side: Running, pair: tuple[str, str], number: int, concurrency: int
) -> Turn:
    before_s = side.cpu_s() if side.cpu_s is not None else 0.0
    before = side.system.messages() if side.system is not None else Counter[str]()
    result = in_process(
        Load(
            f"{side.url}/v1/chat/completions",
            concurrency=concurrency,
            seconds=plan.seconds,
            warmup=concurrency if side.is_warm else plan.warmup,
            keys=list(side.keys),
            check=side.check,
            headers=side.headers,
        )
    )
    side.is_warm = True
    turn = Turn(
        side.name,
        pair,
        number,
        concurrency,
        result.requests,
        result.sent,
        result.requests_per_s,
        result.p50_ms or 0.0,
        result.p99_ms or 0.0,
    )
    if side.cpu_s is not None:
        # The warm-up's share is taken off: the figure is per measured request.
        turn.cpu_s = (side.cpu_s() - before_s) * result.requests / max(result.sent, 1)
    if side.system is not None:
        side.system.sent += result.sent
        spent = side.system.messages() - before
        turn.messages = {name: n / result.sent for name, n in spent.items()}
    report.check(f"{side.name} at {concurrency}, round {number + 1}", result)
    return turn


def loop(
    report: Report, plan: Plan, side: Running, pair: tuple[str, str], number: int, concurrency: int
) -> Turn:
    words = ["--url", f"{side.url}/v1", "-c", concurrency, "-t", plan.seconds]
    found = apart("chat_lane", LOOPS[side.name], *words)
    if found.pop("failed"):
        report.problems.append(f"{side.name}, round {number + 1}: not all calls were answered")
    return Turn(side.name, pair, number, concurrency, **found)


# -- the report -----------------------------------------------------------------------------


def cpu_per_request(turn: Turn) -> float:
    return (turn.cpu_s or 0.0) / max(turn.requests, 1)


def per_cpu_second(turn: Turn) -> float:
    return turn.requests / turn.cpu_s if turn.cpu_s else 0.0


def rate(turn: Turn) -> float:
    return turn.requests_per_s


def show(report: Report) -> None:
    print(
        f"{'':35}{'c':>3}{'requests/s, median (range)':>28}{'p50 ms':>9}{'p99 ms':>9}"
        f"{'per CPU s':>11}{'msg/req':>9}"
    )
    for name, words in NAMES.items():
        for concurrency in (ONE, MANY):
            turns = report.of(name, concurrency)
            if turns:
                show_row(f"{name:>3}  {words:30}{concurrency:3}", turns)
    show_ratios(report)
    show_goals(report)
    for name in MESSAGES_GOALS:
        turns = report.of(name, MANY)
        if turns:
            print(f"\nowner messages per request, {NAMES[name]}, at {MANY}, the last turn")
            for message, value in sorted(turns[-1].messages.items(), key=lambda item: -item[1]):
                print(f"  {message:40}{value:10.5f}")
    print("\nwhat is on")
    print("  d    keys, finite limits, breaker, ledger, metrics, caching, dedup; one replica")
    for name, peer in PEERS.items():
        print(f"  {name:5}{peers.KNOWN[peer].name}: {peers.KNOWN[peer].on}")


def show_row(words: str, turns: Sequence[Turn]) -> None:
    told = spread([turn.requests_per_s for turn in turns], ",.0f")
    p50_ms = statistics.median(turn.p50_ms for turn in turns)
    p99_ms = statistics.median(turn.p99_ms for turn in turns)
    each = [per_cpu_second(turn) for turn in turns if turn.cpu_s]
    per_cpu = f"{statistics.median(each):11,.0f}" if each else f"{'':11}"
    messages = f"{statistics.median(sum(turn.messages.values()) for turn in turns):9.4f}"
    has_messages = any(turn.messages for turn in turns)
    print(f"{words}{told:>28}{p50_ms:9.2f}{p99_ms:9.2f}{per_cpu}{messages if has_messages else ''}")


def show_ratios(report: Report) -> None:
    print(f"\nratios of requests/s at {MANY}, and of CPU per request of who serves; median (range)")
    for pair in PAIRS:
        rates = report.ratios(pair, MANY, rate)
        if rates:
            cpus = report.ratios(pair, MANY, cpu_per_request)
            print(f"  {' / '.join(pair):9}{spread(rates):>24}{spread(cpus):>26}")
    print("\nadded p50 at concurrency 1, ms; median (range)")
    for name, words in NAMES.items():
        added = report.all_added_ms(name)
        if added:
            print(f"  {words:32}{spread(added):>24}")


def show_goals(report: Report) -> None:
    print()
    for pair, goal in RATE_GOALS.items():
        name = f"requests/s at {MANY}, {NAMES[pair[0]]} / {NAMES[pair[1]]}"
        tell_goal(name, report.ratios(pair, MANY, rate), ">=", goal)
    added = report.all_added_ms("d2")
    tell_goal("added p50 at 1, cache and dedup off, ms", added, "<=", ADDED_MS_GOAL)
    pair = ("d2", "e")
    both = zip(*(report.added_ms(pair, name) for name in pair), strict=True)
    shares = [ours / theirs for ours, theirs in both if theirs > 0]
    tell_goal("added p50 at 1 / LiteLLM Proxy's", shares, "<=", ADDED_SHARE_GOAL)
    lane = report.ratios(("c2", "c"), MANY, cpu_per_request)
    tell_goal("CPU per call, LiteLLM lane / bare", lane, "<=", LANE_CPU_GOAL)
    http = report.ratios(("d3", "c"), MANY, per_cpu_second)
    tell_goal("requests per CPU s over HTTP, LiteLLM lane / bare", http, ">=", LANE_RATE_GOAL)
    for name, goal in MESSAGES_GOALS.items():
        messages = [sum(turn.messages.values()) for turn in report.of(name, MANY)]
        tell_goal(f"owner messages per request at {MANY}, {NAMES[name]}", messages, "<=", goal)


def run(
    report: Report, plan: Plan, wanted: Sequence[str], upstream: Upstream, scratch: Path
) -> None:
    with Stage(report, upstream, scratch) as stage:
        for pair in PAIRS:
            if not set(pair) <= set(wanted) or set(pair) & report.missing.keys():
                continue
            with report.part("/".join(pair)):
                try:
                    play(report, plan, pair, stage, upstream)
                except peers.NoPeer as error:
                    report.missing[next(name for name in pair if name in PEERS)] = brief(error)
                except Exception:
                    stage.cast([])  # the next pair begins with systems that are well
                    raise


def main(argv: Sequence[str] | None = None) -> int:
    quick, rounds = "2 rounds of 2 s in place of 5 of 4 s", "turns of each side of a pair"
    parser = parser_of("passthrough", __doc__, NAMES, quick, rounds)
    given = parser.parse_args(argv)
    plan = Plan(
        given.seconds or (2.0 if given.quick else 4.0),
        given.rounds or (2 if given.quick else 5),
        warmup=100 if given.quick else 500,
    )
    report = Report()
    return measured(given, report, partial(run, report, plan, given.only), show)


if __name__ == "__main__":
    sys.exit(main())
