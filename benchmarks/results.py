"""Runs benchmarks, one after the other, and writes RESULTS.md from their reports.

    benchmarks/run                              # all of them, about an hour
    benchmarks/run --quick                      # fewer and shorter turns, about half of that
    benchmarks/run --only passthrough,cache     # these, and what RESULTS.md has of the others stays

The peers are installed first, each in an environment of its own under `benchmarks/.peers`. All load
is on loopback; each benchmark is bounded in time, and ends what it has started. A benchmark that
finds something wrong says so in its report, and the exit code is 1. So it is where one fails.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import peers
from benchmarks.options import say, wanted_of
from benchmarks.processes import ROOT, machine

RESULTS = Path(__file__).with_name("RESULTS.md")
BENCHMARKS = {
    "passthrough": "A chat on its way through",
    "streaming": "Streams",
    "bodies": "Large bodies",
    "footprint": "Start and memory",
    "cache": "Cache",
    "limits": "Limits",
    "ledger": "Ledger",
    "embeddings": "Embeddings",
}
BENCHMARK_S = 3_600.0
HEAD = "# What was measured"
WRITTEN = "Written by `benchmarks/run`, not by hand."
GOAL = re.compile(
    r"^\s*goal (?P<goal>.+?): (?P<told>.*), (?P<verdict>reached|missed|not measured)$"
)
MACHINE_WORDS = ("cpu", "cores", "memory_gb", "kernel", "python", "ray", "litellm")


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark's part of RESULTS.md. `how` is its command, date and commit; `goals` are what
    was to be reached, what was measured, and the verdict."""

    name: str
    how: str
    report: str
    goals: Sequence[tuple[str, ...]] = ()


def document(machine_words: str, sections: Sequence[Section]) -> str:
    """RESULTS.md."""
    lines = [HEAD, "", WRITTEN, "", machine_words, ""]
    goals = [(one.name, *goal) for one in sections for goal in one.goals]
    if goals:
        lines += ["## Goals", "", "| | goal | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(goal)} |" for goal in goals]
        lines.append("")
    for one in sections:
        lines += [f"## {one.name}: {BENCHMARKS[one.name]}", "", one.how, ""]
        lines += [f"    {line}".rstrip() for line in one.report.splitlines()]
        lines.append("")
    return "\n".join(lines)


def sections_of(text: str, machine_words: str) -> dict[str, Section]:
    """The sections of a RESULTS.md that was written for this machine; of another's, none."""
    if WRITTEN not in text or machine_words not in text:
        return {}
    goals: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        if line.startswith("| ") and cells[0] in BENCHMARKS:
            goals.setdefault(cells[0], []).append(tuple(cells[1:]))
    found = {}
    for part in text.split("\n## ")[1:]:
        head, _, rest = part.partition("\n")
        name = head.partition(":")[0]
        if name in BENCHMARKS:
            how, _, report = rest.strip("\n").partition("\n\n")
            lines = [line.removeprefix("    ") for line in report.splitlines()]
            found[name] = Section(name, how, "\n".join(lines), goals.get(name, []))
    return found


def section_of(name: str, how: str, report: str) -> Section:
    """A report without the machine, and with its goals aside."""
    goals, lines = [], []
    for line in report.splitlines():
        goal = GOAL.match(line)
        if goal is not None:
            goals.append((goal["goal"], goal["told"], goal["verdict"]))
        elif not re.match(rf"  ({'|'.join(MACHINE_WORDS)}) {{20,}}\S", line):
            lines.append(line)
    left = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    return Section(name, how, left, goals)


def words_of_machine() -> str:
    told = machine()
    return (
        f"{told['cores']} cores of {told['cpu']}, {told['memory_gb']} GB, Linux {told['kernel']}; "
        f"Python {told['python']}, Ray {told['ray']}, LiteLLM {told['litellm']}. The load, the "
        "simulated upstream and what is measured share these cores, so only figures of one section "
        "compare."
    )


def commit() -> str:
    """The commit, and whether files differ from it."""
    name = _git("rev-parse", "--short", "HEAD") or "no commit"
    changed = [line for line in _git("status", "--porcelain", "-uno").splitlines() if line]
    others = [line for line in changed if not line.endswith(RESULTS.name)]
    return f"commit {name}{' with changes' if others else ''}"


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def ran(name: str, options: Sequence[str]) -> tuple[Section, bool]:
    """One benchmark's section, and whether all was well. What it tells on the way goes on."""
    command = ["python", "-m", f"benchmarks.{name}", *options]
    how = f"`{' '.join(command)}`, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC, {commit()}"
    try:
        done = subprocess.run(
            [sys.executable, *command[1:]],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            timeout=BENCHMARK_S,
            check=False,
        )
        report, code = done.stdout, f"{done.returncode}"
    except subprocess.TimeoutExpired:
        report, code = "", f"nothing in {BENCHMARK_S:.0f} s"
    if code != "0":
        report += f"\n! ended with {code}"
    return section_of(name, how, report), code == "0"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="shorter turns, and fewer of them")
    parser.add_argument(
        "--only", default=",".join(BENCHMARKS), help="benchmarks, separated by commas"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="in place of RESULTS.md")
    given = parser.parse_args(argv)
    wanted = wanted_of(parser, given.only, BENCHMARKS)
    for name, reason in peers.install_all().items():
        say(f"{name} is not measured: {reason}")
    words = words_of_machine()
    sections = sections_of(given.out.read_text() if given.out.exists() else "", words)
    well = True
    for name in wanted:
        say(f"{name}: {BENCHMARKS[name]}")
        sections[name], fine = ran(name, ["--quick"] if given.quick else [])
        well &= fine
        ordered = [sections[one] for one in BENCHMARKS if one in sections]
        given.out.write_text(document(words, ordered))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
