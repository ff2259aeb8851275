"""What is measured apart: a module of this folder, in a process of its own, that prints JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
APART_S = 600.0


def apart(module: str, *words: object, keys: Iterable[str] = ()) -> Any:
    """Its last line; `keys` are its stdin, one a line.

    Raises RuntimeError with its last words where it fails, TimeoutExpired after APART_S.
    """
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", *map(str, words)],
        cwd=ROOT,
        input="\n".join(keys),
        capture_output=True,
        text=True,
        timeout=APART_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{module} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ms_at(ordered_s: Sequence[float], share: float) -> float:
    """Milliseconds at that share of the ordered samples; 0 where there are none."""
    if not ordered_s:
        return 0.0
    return ordered_s[min(len(ordered_s) - 1, int(len(ordered_s) * share))] * 1e3
