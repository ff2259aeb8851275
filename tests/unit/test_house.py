"""The house's rules, kept by a machine: which way imports point, and what may not be written."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "forebay", "deployments")  # each may import those before it
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    later = PACKAGES[PACKAGES.index(package) + 1 :]
    named = set(imports(ast.parse(path.read_text())))

    assert not {name for name in named if name.split(".")[0] in later}


def importers(module: str) -> set[str]:
    return {
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(name.split(".")[0] == module for name in imports(ast.parse(path.read_text())))
    }


def test_litellm_is_imported_by_the_lane_only() -> None:
    assert {p for p in importers("litellm") if not p.startswith("forebay/providers/")} == set()


def test_actors_know_ray_in_one_file_only() -> None:
    assert {p for p in importers("ray") if p.startswith("actors/")} == {"actors/spawn.py"}


def test_owners_never_import_each_other() -> None:
    concerns = [path.name for path in (ROOT / "actors").iterdir() if (path / "owner.py").exists()]
    assert len(concerns) == 6
    for concern in concerns:
        for path in (ROOT / "actors" / concern).glob("*.py"):
            others = {f"actors.{other}" for other in concerns if other != concern}
            named = {".".join(n.split(".")[:2]) for n in imports(ast.parse(path.read_text()))}
            assert not others & named, path


def test_every_concern_has_the_same_three_rooms() -> None:
    for concern in ("rate_limiter", "circuit_breaker", "cache", "batcher", "ledger", "registry"):
        for room in ("policy.py", "owner.py", "desk.py"):
            assert (ROOT / "actors" / concern / room).exists()


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_globals_and_no_unfinished_work(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)

    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    assert "NotImplementedError" not in text
    assert "TODO" not in text
