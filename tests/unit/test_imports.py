"""What a process does not import until it needs it: an owner is one of a dozen processes."""

from __future__ import annotations

import subprocess
import sys

from forebay.system import Boot, owners
from tests.support.owners import HEAVY

SERVING = ("starlette", "pyarrow")
LIGHT = ("pydantic", "yaml", "numpy", "asyncio")


def imported_by(*modules: str) -> set[str]:
    """The heavy packages that a fresh process has after importing these modules."""
    code = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    return {name.partition(".")[0] for name in told.split()} & {*HEAVY, *SERVING, *LIGHT, "ray"}


def test_forebay_imports_nothing_until_it_is_used() -> None:
    assert imported_by("forebay") == set()


def test_owners_import_no_client_no_server_and_no_tables() -> None:
    classes = {cls.__module__ for cls, _ in owners(Boot()).values()}
    beside = {"forebay.cache_tier", "forebay.ledger_place", "actors.spawn"}

    assert imported_by(*sorted(classes | beside)) & {*HEAVY, *SERVING} == set()
