"""`python -m tests.chaos --full` runs every chaos test at its full count and writes RESULTS.md."""

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


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.chaos", description=__doc__)
    parser.add_argument("--full", action="store_true", help="full counts; writes RESULTS.md")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    arguments = parser.parse_args()
    environ = {**os.environ, "FOREBAY_CHAOS_SEED": str(arguments.seed)}
    if arguments.full:
        environ["FOREBAY_CHAOS_FULL"] = "1"
    begun_s = time.monotonic()
    ran = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            str(HERE),
            "-v",
            "--timeout=1800",
            "-p",
            "no:cacheprovider",
        ],
        cwd=ROOT,
        env=environ,
        text=True,
        stdout=subprocess.PIPE,
        check=False,
    )
    print(ran.stdout)
    if arguments.full:
        lines = [
            line.strip()
            for line in ran.stdout.splitlines()
            if line.startswith("  chaos:") or (line.strip().startswith("=") and "passed" in line)
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
            f"exit code {ran.returncode}.\n\n{told}\n"
        )
    return ran.returncode


if __name__ == "__main__":
    sys.exit(main())
