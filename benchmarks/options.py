"""The command line that all benchmarks have in common."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Sequence
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


def finish(path: Path | None, figures: dict[str, Any], problems: Sequence[Any]) -> int:
    """Write the figures where they are wanted. The exit code."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + os.linesep)
    return 1 if problems else 0
