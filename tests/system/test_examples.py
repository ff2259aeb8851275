"""The examples run as they are, on the embedded models: no key, no network, no cluster."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import system as support

LINES_MAX = 60


def run(name: str, *arguments: object, data_dir: Path) -> str:
    ran = subprocess.run(
        [sys.executable, f"examples/{name}", *map(str, arguments)],
        env=support.environment(data_dir, PYTHONPATH=str(support.ROOT)),
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_questions_are_answered_from_a_folder_with_sources(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "library.md").write_text("The library is open from nine to six.\n\nBooks are free.")
    (notes / "boats.txt").write_text("The ferry to the island leaves every hour.")
    for number in range(5):
        (notes / f"cake{number}.txt").write_text(f"Bake the cake with {number} eggs and flour.")
    told = run("rag.py", notes, "When is the library open?", data_dir=tmp_path)
    answer, _, sources = told.strip().rpartition("Sources: ")

    assert answer.strip()
    assert sources.split(", ")[0] == "library.md"


@pytest.mark.parametrize(
    ("question", "tool"),
    [("What is 12 plus 7?", "calculate"), ("When is the museum open?", "look_up")],
)
def test_the_agent_calls_the_tool_that_fits(question: str, tool: str, tmp_path: Path) -> None:
    call, _, answer = run("agent.py", question, data_dir=tmp_path).partition("\n")

    assert call.startswith(f"{tool}{{")
    assert "did not work" not in call
    assert answer.strip()


def test_each_is_short() -> None:
    for path in (support.ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < LINES_MAX, path.name
