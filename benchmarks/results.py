"""Runs benchmarks, one after the other, and writes RESULTS.md from their reports.

    benchmarks/run                              # all of them, about an hour
    benchmarks/run --quick                      # fewer and shorter turns, about half of that
    benchmarks/run --only passthrough,cache     # these, and what RESULTS.md has of the others stays

RESULTS.md is written after each of them, so that what is measured stays where a later one fails.
Peers are installed when they are first wanted, each in an environment of its own under
`benchmarks/.peers`; one that cannot be had is told in the report, and the rest is measured. All
load is on loopback; each benchmark is bounded in time, and ends what it has started. Where one
finds something wrong, or a part of it fails, its report says so, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import ast
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.apart import ROOT
from benchmarks.options import say, some_of
from benchmarks.processes import machine

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
"""In the order in which they run, and stand in RESULTS.md."""
BENCHMARK_S = 3_600.0
HEAD = "# What was measured"
WRITTEN = (
    "Each section is what a run of that benchmark told last; `benchmarks/run` writes all of them, "
    "and with `--only` those it names."
)
QUICK, ELSEWHERE = "A quick run: ", "Not measured on the above, but on "
TAKES = re.compile(r"python -m benchmarks\.\w+( --quick)? +# about (\d+) minutes?")
GOAL = re.compile(
    r"^\s*goal (?P<goal>.+?): (?P<told>.*), (?P<verdict>reached|missed|not measured)$"
)
MACHINE_WORDS = ("cpu", "cores", "memory_gb", "kernel", "python", "ray", "litellm")


@dataclass(frozen=True, slots=True)
class Section:
    """One benchmark's part of RESULTS.md. `machine` is what it ran on, `how` its command, date and
    commit; `goals` are what was to be reached, what was measured, and the verdict."""

    name: str
    machine: str
    how: str
    report: str
    goals: Sequence[tuple[str, ...]] = ()


def document(machine_words: str, sections: Sequence[Section]) -> str:
    """RESULTS.md; sections of another machine say so."""
    lines = [HEAD, "", WRITTEN, "", machine_words, ""]
    goals = [
        (f"{one.name}, quick" if one.how.startswith(QUICK) else one.name, *goal)
        for one in sections
        for goal in one.goals
    ]
    if goals:
        lines += ["## Goals", "", "| | goal | measured | |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(goal)} |" for goal in goals]
        lines.append("")
    for one in sections:
        lines += [f"## {one.name}: {BENCHMARKS[one.name]}", "", one.how, ""]
        if one.machine != machine_words:
            lines += [f"{ELSEWHERE}{one.machine}", ""]
        lines += [f"    {line}".rstrip() for line in one.report.splitlines()]
        lines.append("")
    return "\n".join(lines)


def sections_of(text: str) -> dict[str, Section]:
    """The sections of a RESULTS.md."""
    head, *parts = text.split("\n## ")
    machine_words = head.strip().rpartition("\n")[2]
    goals: dict[str, list[tuple[str, ...]]] = {}
    for line in text.splitlines():
        cells = line.strip("| ").split(" | ")
        name = cells[0].partition(",")[0]
        if line.startswith("| ") and name in BENCHMARKS:
            goals.setdefault(name, []).append(tuple(cells[1:]))
    found = {}
    for part in parts:
        title, _, rest = part.partition("\n")
        name = title.partition(":")[0]
        if name in BENCHMARKS:
            how, _, report = rest.strip("\n").partition("\n\n")
            words = machine_words
            if report.startswith(ELSEWHERE):
                words, _, report = report.removeprefix(ELSEWHERE).partition("\n\n")
            lines = [line.removeprefix("    ") for line in report.splitlines()]
            found[name] = Section(name, words, how, "\n".join(lines), goals.get(name, []))
    return found


def section_of(name: str, machine_words: str, how: str, report: str) -> Section:
    """A report without the machine, and with its goals aside."""
    goals, lines = [], []
    for line in report.splitlines():
        goal = GOAL.match(line)
        if goal is not None:
            goals.append((goal["goal"], goal["told"], goal["verdict"]))
        elif not re.match(rf"  ({'|'.join(MACHINE_WORDS)}) {{20,}}\S", line):
            lines.append(line)
    left = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip("\n")
    return Section(name, machine_words, how, left, goals)


def minutes_of(name: str, *, quick: bool) -> int:
    """How long a benchmark takes, as the first lines of its file say."""
    words = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text()))
    told = {bool(found[1]): int(found[2]) for found in TAKES.finditer(words or "")}
    return told[quick]


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


def ran(name: str, machine_words: str, *, quick: bool) -> tuple[Section, bool]:
    """One benchmark's section, and whether all was well. What it tells on the way goes on."""
    command = ["python", "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    begun, begun_s = datetime.now(UTC), time.monotonic()
    with subprocess.Popen(
        [sys.executable, *command[1:]], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        ended = ""
        try:
            report, _ = process.communicate(timeout=BENCHMARK_S)
        except subprocess.TimeoutExpired:
            # Then it ends what it has started, and tells what it has.
            process.send_signal(signal.SIGINT)
            report, _ = process.communicate()
            ended = f"\n! not over after {BENCHMARK_S:.0f} s"
    if process.returncode != 0:
        ended += f"\n! ended with {process.returncode}"
    how = (
        f"{QUICK if quick else ''}`{' '.join(command)}`, {begun:%Y-%m-%d %H:%M} UTC, "
        f"{(time.monotonic() - begun_s) / 60:.1f} minutes, {commit()}"
    )
    return section_of(name, machine_words, how, report + ended), not ended


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks/run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    known = list(BENCHMARKS)
    parser.add_argument("--quick", action="store_true", help="shorter turns, and fewer of them")
    parser.add_argument(
        "--only", type=some_of(known), default=known, help="benchmarks, separated by commas"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="in place of RESULTS.md")
    given = parser.parse_args(argv)
    wanted = [name for name in BENCHMARKS if name in given.only]
    takes = {name: minutes_of(name, quick=given.quick) for name in wanted}
    in_order = ", ".join(f"{name} {minutes}" for name, minutes in takes.items())
    say(f"about {sum(takes.values())} minutes, and what peers take to install: {in_order}")
    words = words_of_machine()
    sections = sections_of(given.out.read_text()) if given.out.exists() else {}
    well = True
    for number, name in enumerate(wanted):
        left = sum(takes[one] for one in wanted[number:])
        say(f"{name}: {BENCHMARKS[name]}; about {left} minutes left")
        sections[name], fine = ran(name, words, quick=given.quick)
        well &= fine
        ordered = [sections[one] for one in BENCHMARKS if one in sections]
        given.out.write_text(document(words, ordered))
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
