"""The examples run as they are, on the embedded models: no key, no network, no cluster."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.support import system as support

LINES_MAX = 60
QUESTIONS = {
    "rag": "When is the library open?",
    "calculate": "What is 12 plus 7?",
    "look_up": "When is the museum open?",
}
RUN = """
import contextlib, io, json, runpy, sys
told = {}
for name, arguments in json.loads(sys.argv[1]).items():
    sys.argv, out = arguments, io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(arguments[0], run_name="__main__")
    told[name] = out.getvalue()
print(json.dumps(told))
"""
"""All of them in one process: what takes longest is the same for each, its imports."""


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each example says."""
    data_dir = tmp_path_factory.mktemp("examples")
    notes = data_dir / "notes"
    notes.mkdir()
    (notes / "library.md").write_text("The library is open from nine to six.\n\nBooks are free.")
    (notes / "boats.txt").write_text("The ferry to the island leaves every hour.")
    for number in range(5):
        (notes / f"cake{number}.txt").write_text(f"Bake the cake with {number} eggs and flour.")
    runs = {
        "rag": ["examples/rag.py", str(notes), QUESTIONS["rag"]],
        "calculate": ["examples/agent.py", QUESTIONS["calculate"]],
        "look_up": ["examples/agent.py", QUESTIONS["look_up"]],
    }
    ran = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(runs)],
        env=support.environment(data_dir, PYTHONPATH=str(support.ROOT)),
        cwd=support.ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    said: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    return said


def test_questions_are_answered_from_a_folder_with_sources(told: dict[str, str]) -> None:
    answer, _, sources = told["rag"].strip().rpartition("Sources: ")

    assert answer.strip()
    assert sources.split(", ")[0] == "library.md"


@pytest.mark.parametrize("tool", ["calculate", "look_up"])
def test_the_agent_calls_the_tool_that_fits(tool: str, told: dict[str, str]) -> None:
    call, _, answer = told[tool].partition("\n")

    assert call.startswith(f"{tool}{{")
    assert "did not work" not in call
    assert answer.strip()


def test_each_is_short() -> None:
    for path in (support.ROOT / "examples").glob("*.py"):
        assert len(path.read_text().splitlines()) < LINES_MAX, path.name
