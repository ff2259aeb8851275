"""The command line and the report that all benchmarks have in common.

What goes to stdout is the report; what is told on the way goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.peers import NoPeer
from benchmarks.processes import machine
from benchmarks.system import System, at
from tests.support.loader import Result
from tests.support.upstream import Upstream

TOLD_CHARS = 400

# -- the command line -----------------------------------------------------------------------


def parser_of(
    prog: str, words: str | None, parts: Iterable[str], quick: str, rounds: str = ""
) -> argparse.ArgumentParser:
    """`words` is the module's docstring, `quick` what the option leaves out, and `rounds` what is
    done so many times, where that can be said."""
    parser = argparse.ArgumentParser(
        prog=prog, description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(parts)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seconds", type=float, help="seconds a figure, or a turn")
    if rounds:
        parser.add_argument("--rounds", type=int, help=rounds)
    parser.add_argument(
        "--only", type=some_of(known), default=known, help="parts, separated by commas"
    )
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--keep", type=Path, help="leave logs and data in this directory")
    return parser


def some_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    """An option's type: some of these, separated by commas."""

    def chosen(text: str) -> list[str]:
        wanted = text.split(",")
        unknown = sorted(set(wanted) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(
                f"no such part: {', '.join(unknown)}; there are {', '.join(known)}"
            )
        return wanted

    return chosen


def say(line: str) -> None:
    """A line on the way."""
    print(line, file=sys.stderr, flush=True)


# -- the report -----------------------------------------------------------------------------


@dataclass(slots=True)
class Report:
    """Owns what a benchmark has found. `rounds` are figures that were taken several times, and
    `figures` what was taken once or is a median of its own; `missing` says what could not be had,
    and why; with `problems` the exit code is 1.

    Failure behaviour: what a part raises is told as a problem, and all other figures stay.
    """

    machine: dict[str, Any] = field(default_factory=machine)
    rounds: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def add(self, name: str, value: float) -> None:
        self.rounds.setdefault(name, []).append(value)

    def check(self, of: str, result: Result) -> None:
        """All answers are 200, and to what was asked."""
        if result.ok != result.requests:
            self.problems.append(f"{of}: not all 200: {result.statuses} {result.errors}")
        if result.wrong:
            self.problems.append(f"{of}: {result.wrong} answers to something else")

    def audit(self, of: str, system: System) -> None:
        """The ledger and the metrics have what was sent."""
        with self.part(of):
            told, wrong = system.audit()
            self.facts[f"{of}: requests sent / ledger rows / counted"] = told
            self.problems += wrong

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What fails in here is told, and what comes after it is measured all the same."""
        try:
            yield
        except NoPeer as error:
            self.missing[name] = brief(error)
            say(f"  {name} is not measured: {error}")
        except Exception as error:  # noqa: BLE001 - it is told, and the exit code is 1
            self.problems.append(f"{name}: {type(error).__name__}: {brief(error)}")
            traceback.print_exc()


def brief(error: Exception) -> str:
    """What it says, on one line of at most TOLD_CHARS: the beginning and the last words."""
    told = " ".join(str(error).split())
    half = TOLD_CHARS // 2
    return told if len(told) <= TOLD_CHARS else f"{told[: half - 5]} ... {told[-half:]}"


def spread(values: Sequence[float], form: str = ",.2f") -> str:
    """The median, and from where to where it goes: `2.10 (1.90-2.40)`."""
    if not values:
        return "-"
    middle = format(statistics.median(values), form)
    if len(values) == 1:
        return middle
    return f"{middle} ({format(min(values), form)}-{format(max(values), form)})"


def verdict(value: float | None, sign: str, goal: float) -> str:
    """Whether a figure reaches its goal; `sign` is >= or <=. None: there is no figure."""
    if value is None:
        return "not measured"
    return "reached" if (value >= goal if sign == ">=" else value <= goal) else "missed"


def tell_goal(name: str, values: Sequence[float], sign: str, goal: float) -> None:
    """One line on a goal. Its figure is the median of `values`; without any it is not measured."""
    value = statistics.median(values) if values else None
    told = spread(values, ",.4g")
    print(f"  goal {name} {sign} {goal:g}: {told}, {verdict(value, sign, goal)}")


def tell_rounds(report: Report, form: str = ",.2f") -> None:
    print("median (range)")
    for name, values in report.rounds.items():
        print(f"  {name:60}{spread(values, form):>32}")


def tell_figures(
    report: Report, goals: Mapping[str, tuple[float, str]], form: str = ",.2f"
) -> None:
    """Figures, against their goals where they have one."""
    for name, value in report.figures.items():
        if name in goals:
            goal, sign = goals[name]
            tell_goal(name, [value], sign, goal)
        else:
            print(f"  {name:66} {value:{form}}")


R = TypeVar("R", bound=Report)


def measured(
    given: Any,
    report: R,
    run: Callable[[Upstream, Path], None],
    show: Callable[[R], None],
) -> int:
    """Runs a benchmark in front of a simulated upstream and tells what it has found, also where
    it fails or is interrupted. The exit code."""
    try:
        with (
            report.part("the run"),
            at(given.keep) as scratch,
            Upstream(log=scratch / "upstream.jsonl", fast=True) as upstream,
        ):
            run(upstream, scratch)
    except KeyboardInterrupt:
        report.problems.append("interrupted; what has been measured by then is told")
    with report.part("the report"):
        show(report)
    print()
    for name, fact in {**report.facts, **report.machine}.items():
        print(f"  {name:66} {fact}")
    for name, reason in report.missing.items():
        print(f"  {name}: not measured: {reason}")
    for problem in report.problems:
        print(f"  ! {problem}")
    if given.json is not None:
        given.json.write_text(json.dumps(asdict(report), indent=2) + "\n")
    return 1 if report.problems else 0
