"""`python -m tests.chaos --full` runs every chaos test at its full count and writes RESULTS.md.

Owners killed under load first, then limits under everything, then failing providers, then herds and
a failing Redis, then money while the ledger, replicas and messages are lost.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SYSTEM = ROOT / "tests" / "system"
SUITES = (HERE, *(SYSTEM / f"test_{name}.py" for name in ("limits", "failures", "cache", "ledger")))
NOTHING_COLLECTED = 5
TELLING = ("  chaos:", "  limits:", "  failures:", "  cache:", "  ledger:")


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--full", action="store_true", help="full counts; writes RESULTS.md")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--only", default="", help="tests whose names match, as pytest's -k")
    arguments = parser.parse_args()
    environ = {**os.environ, "FOREBAY_CHAOS_SEED": str(arguments.seed)}
    if arguments.full:
        environ["FOREBAY_CHAOS_FULL"] = "1"
    begun_s = time.monotonic()
    runs = [_run(suite, environ, arguments.only) for suite in SUITES]
    code = max(ran.returncode for ran in runs)
    if arguments.full:
        lines = [
            line.strip()
            for ran in runs
            for line in ran.stdout.splitlines()
            if line.startswith(TELLING) or _is_sum(line)
        ]
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        ).stdout.strip()
        took_s = time.monotonic() - begun_s
        told = "\n".join(f"    {line}" for line in lines)
        (HERE / "RESULTS.md").write_text(
            "# Chaos in full\n\n"
            f"`python -m tests.chaos --full --seed {arguments.seed}`, "
            f"{datetime.now(UTC):%Y-%m-%d}, after commit {commit}, "
            f"{os.cpu_count()} cores, Python {platform.python_version()}, {took_s:.0f} s, "
            f"exit code {code}.\n\n{told}\n"
        )
    return code


def _run(suite: Path, environ: dict[str, str], only: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", str(suite), "-v", "--timeout=1800"]
    command += ["-p", "no:cacheprovider", *(["-k", only] if only else [])]
    with subprocess.Popen(
        command, cwd=ROOT, env=environ, text=True, stdout=subprocess.PIPE, bufsize=1
    ) as running:
        assert running.stdout is not None
        said = []
        for line in running.stdout:
            print(line, end="", flush=True)
            said.append(line)
    returned = 0 if running.returncode == NOTHING_COLLECTED and only else running.returncode
    return subprocess.CompletedProcess(command, returned, "".join(said))


def _is_sum(line: str) -> bool:
    """pytest's last line."""
    return line.strip().startswith("=") and ("passed" in line or "failed" in line)


if __name__ == "__main__":
    sys.exit(main())
