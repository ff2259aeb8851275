"""The command line and the report that all benchmarks have in common.

What goes to stdout is the report; what is told on the way goes to stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def parser_of(
    prog: str, words: str | None, parts: Iterable[str], quick: str
) -> argparse.ArgumentParser:
    """`words` is the module's docstring, `quick` what the option leaves out."""
    parser = argparse.ArgumentParser(
        prog=prog, description=words, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--seconds", type=float, help="seconds a figure, or a turn")
    parser.add_argument("--only", default=",".join(parts), help="parts, separated by commas")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--keep", type=Path, help="leave logs and data in this directory")
    return parser


def wanted_of(parser: argparse.ArgumentParser, only: str, parts: Iterable[str]) -> list[str]:
    """The parts to run; ends with a message where there is no such part."""
    wanted, known = only.split(","), list(parts)
    unknown = sorted(set(wanted) - set(known))
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(known)}")
    return wanted


def say(line: str) -> None:
    """A line on the way."""
    print(line, file=sys.stderr, flush=True)


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


def tell_facts(
    facts: Mapping[str, Any], machine: Mapping[str, Any], problems: Iterable[str]
) -> None:
    print()
    for name, fact in {**facts, **machine}.items():
        print(f"  {name:66} {fact}")
    for problem in problems:
        print(f"  ! {problem}")


def finish(path: Path | None, figures: dict[str, Any], problems: Sequence[Any]) -> int:
    """Write the figures where they are wanted. The exit code."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + os.linesep)
    return 1 if problems else 0
