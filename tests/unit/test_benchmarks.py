"""What benchmarks make of their samples: verdicts, ratios of rounds, and the page of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import footprint, passthrough, peers, results
from benchmarks.options import Report, spread, tell_goal, verdict
from benchmarks.processes import Member
from benchmarks.results import Section
from benchmarks.system import samples

PAIR = ("d2", "e")


def turn(
    system: str, number: int, rate: float, *, at: int = 64, p50_ms: float = 1.0
) -> passthrough.Turn:
    return passthrough.Turn(system, PAIR, number, at, 100, 100, rate, p50_ms, 2.0)


def fail(error: Exception) -> None:
    raise error


def test_a_goal_is_reached_missed_or_not_measured() -> None:
    assert verdict(30.0, ">=", 30.0) == "reached"
    assert verdict(29.9, ">=", 30.0) == "missed"
    assert verdict(0.6, "<=", 0.6) == "reached"
    assert verdict(0.61, "<=", 0.6) == "missed"
    assert verdict(None, "<=", 0.6) == "not measured"


def test_figures_are_medians_with_their_range() -> None:
    assert spread([3.0, 1.0, 2.0]) == "2.00 (1.00-3.00)"
    assert spread([1234.5], ",.0f") == "1,234"
    assert spread([]) == "-"


def test_ratios_are_taken_round_by_round() -> None:
    turns = [turn("d2", 0, 300.0), turn("e", 0, 10.0), turn("e", 1, 20.0), turn("d2", 1, 400.0)]
    alone = turn("d2", 2, 1.0)
    report = passthrough.Report(turns=[*turns, alone])
    assert report.ratios(PAIR, 64, passthrough.rate) == [30.0, 20.0]
    assert report.ratios(("d2", "f"), 64, passthrough.rate) == []


def test_latency_is_told_over_the_upstreams_of_the_same_round() -> None:
    turns = [
        turn("a", 0, 1.0, at=1, p50_ms=0.1),
        turn("d2", 0, 1.0, at=1, p50_ms=0.6),
        turn("d2", 1, 1.0, at=1, p50_ms=9.0),
    ]
    report = passthrough.Report(turns=turns)
    assert report.all_added_ms("d2") == pytest.approx([0.5])


def test_every_pair_and_goal_names_systems_that_there_are() -> None:
    for pair in [*passthrough.PAIRS, *passthrough.RATE_GOALS]:
        assert set(pair) <= passthrough.NAMES.keys()
    assert set(passthrough.RATE_GOALS) <= set(passthrough.PAIRS)
    assert set(passthrough.PEERS.values()) == peers.KNOWN.keys()


def test_memory_of_a_process_that_nobody_knows_is_counted_too() -> None:
    idle = [Member(1, "ray::Ledger", 60.0), Member(2, "/opt/something --else", 5.0)]
    loaded = [*idle, Member(3, "ray::ServeReplica:forebay", 300.0)]
    shares = footprint.shares_of(idle, loaded)
    assert [(one.name, one.processes) for one in shares] == [
        ("replica", 1),
        ("owner: ledger", 1),
        ("others", 1),
    ]
    assert sum(one.idle_mb for one in shares) == 65.0
    assert sum(one.load_mb for one in shares) == 365.0


def test_samples_of_prometheus_text() -> None:
    text = '# HELP a b\nup 1\ncalls_total{owner="cache",method="lookup"} 3.0 1700000000\n'
    assert list(samples(text)) == [
        ("up", {}, 1.0),
        ("calls_total", {"owner": "cache", "method": "lookup"}, 3.0),
    ]


def test_results_gather_the_goals_that_reports_tell(capsys: pytest.CaptureFixture[str]) -> None:
    tell_goal("requests/s, ours / theirs", [31.0, 33.0, 32.0], ">=", 30.0)
    tell_goal("added p50, ms", [], "<=", 0.6)
    told = f"rows\n{capsys.readouterr().out}"
    section = results.section_of("passthrough", "2 cores", "`how`", told)
    assert section.report == "rows"
    assert section.goals == [
        ("requests/s, ours / theirs >= 30", "32 (31-33)", "reached"),
        ("added p50, ms <= 0.6", "-", "not measured"),
    ]
    page = results.document("2 cores", [section])
    assert "| passthrough | requests/s, ours / theirs >= 30 | 32 (31-33) | reached |" in page


def test_results_keep_what_was_measured_before() -> None:
    goals = [("hits/s >= 4", "5 (4-6)", "reached")]
    before = [
        Section("cache", "2 cores", "`cache`, then", "rows\n\n  of it", goals),
        Section("ledger", "2 cores", "`ledger`, then", "more", []),
    ]
    page = results.document("2 cores", before)
    assert results.sections_of(page) == {one.name: one for one in before}
    page = results.document("4 cores", [before[0], Section("ledger", "4 cores", "now", "new", [])])
    after = results.sections_of(page)
    assert after["cache"] == before[0]
    assert after["ledger"].machine == "4 cores"
    assert results.sections_of("# Written by hand\n\n2 cores\n\n## Cache\n\nfast\n") == {}


def test_goals_of_a_quick_run_say_so() -> None:
    one = Section(
        "cache", "2 cores", f"{results.QUICK}`cache`", "rows", [("a >= 1", "2", "reached")]
    )
    page = results.document("2 cores", [one])
    assert "| cache, quick | a >= 1 | 2 | reached |" in page
    assert results.sections_of(page) == {"cache": one}


def test_a_report_is_told_without_the_machine() -> None:
    report = f"rows\n\n\n  cores{'':61}2\n  load_before{'':55}0.5\n"
    told = results.section_of("cache", "2 cores", "`how`", report).report
    assert told == f"rows\n\n  load_before{'':55}0.5"


def test_every_benchmark_says_how_long_it_takes() -> None:
    for name in results.BENCHMARKS:
        assert 0 < results.minutes_of(name, quick=True) < results.minutes_of(name, quick=False)


def test_a_part_that_fails_is_told_and_leaves_the_others_figures() -> None:
    report = Report()
    with report.part("first"):
        report.add("requests/s", 2.0)
    with report.part("second"):
        fail(RuntimeError("no answer\n" + "x" * 1_000 + "\nthe last words"))
    with report.part("peer"):
        fail(peers.NoPeer("no network"))
    with report.part("last"):
        report.add("requests/s", 4.0)
    assert report.rounds == {"requests/s": [2.0, 4.0]}
    assert report.missing == {"peer": "no network"}
    (problem,) = report.problems
    assert problem.startswith("second: RuntimeError: no answer")
    assert problem.endswith("the last words")
    assert len(problem) < 500


def test_what_runs_all_benchmarks_can_be_run() -> None:
    script = Path(results.__file__).with_name("run")
    assert script.stat().st_mode & 0o111
    names = {path.stem for path in script.parent.glob("*.py")}
    assert results.BENCHMARKS.keys() <= names
