"""`forebay usage`: what was used and what it cost, as a table, JSON or CSV.

Rule 1: money is printed from the integers, every digit of it, never from a float.
"""

from __future__ import annotations

import argparse
import csv
import io
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode

from actors.ledger.policy import GROUPS
from forebay.errors import ConfigurationError
from forebay.usage import IN_USD, moment

FORMATS = ("table", "json", "csv")
SECONDS = {"m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
CENTS = 2
"""Fewest decimals of an amount in USD."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a spreadsheet would take for a formula at the beginning of a name."""
COLUMNS = {
    "REQUESTS": "total_requests",
    "OK": "successful_requests",
    "FAILED": "failed_requests",
    "REFUSED": "refused_requests",
    "HITS": "cache_hits",
    "PROMPT": "prompt_tokens",
    "COMPLETION": "completion_tokens",
    "P50 MS": "latency_ms_p50",
    "P95 MS": "latency_ms_p95",
    "SAVED USD": "saved_cost_nano",
    "COST USD": "total_cost_nano",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `forebay usage` understands, beside what all commands do."""
    parser.add_argument("--tenant", help="whose; an admin may name any, or none for all")
    parser.add_argument(
        "--by", default="model", metavar="GROUP[,GROUP]",
        help=f"one or more of {', '.join(GROUPS)} (default: model)",
    )  # fmt: skip
    parser.add_argument("--start", metavar="TIME", help="from this UTC date or time on")
    parser.add_argument("--end", metavar="TIME", help="until before this UTC date or time")
    parser.add_argument("--since", metavar="AGE", help="the last 90m, 24h, 7d or 4w")
    parser.add_argument("--format", choices=FORMATS, help="default: table")


def path(arguments: argparse.Namespace, now_s: float) -> str:
    """What to ask the gateway for.

    Raises:
        ConfigurationError: an option is wrong, or two are at odds.
    """
    groups = _groups(arguments)
    if arguments.json and arguments.format not in (None, "json"):
        raise ConfigurationError(
            f"--json and --format {arguments.format} are at odds: leave one out", param="format"
        )
    start = arguments.start
    if arguments.since is not None:
        if start is not None:
            raise ConfigurationError("--start and --since: name one of them", param="since")
        start = _since(arguments.since, now_s)
    if start is None and "hour" in groups:
        raise ConfigurationError(
            "--by hour needs --since or --start, a week ago at most", param="by"
        )
    for name in ("start", "end"):
        try:
            moment(getattr(arguments, name) or "0")
        except ValueError as error:
            raise ConfigurationError(f"--{name} {error}", param=name) from None
    asked = {"tenant": arguments.tenant, "start": start, "end": arguments.end}
    query = {"group_by": ",".join(groups), **asked}
    given = {name: value for name, value in query.items() if value}
    return f"/v1/usage?{urlencode(given)}" if given else "/v1/usage"


def _groups(arguments: argparse.Namespace) -> list[str]:
    groups = [group.strip() for group in arguments.by.split(",") if group.strip()]
    for group in groups:
        if group not in GROUPS:
            raise ConfigurationError(f"--by takes {', '.join(GROUPS)}, not {group!r}", param="by")
    return list(dict.fromkeys(groups))


def _since(age: str, now_s: float) -> str:
    found = re.fullmatch(r"(\d{1,6})([mhdw])", age)
    if found is None:
        raise ConfigurationError(
            f"--since takes a number and m, h, d or w, such as 7d, not {age!r}", param="since"
        )
    since_s = max(0.0, now_s - int(found[1]) * SECONDS[found[2]])
    return datetime.fromtimestamp(since_s, UTC).isoformat(timespec="seconds")


def text(arguments: argparse.Namespace, told: Mapping[str, Any]) -> str:
    """The answer as a table or as CSV, its last line without a line break."""
    groups = _groups(arguments)
    rows = told["data"] if groups else [told]
    if arguments.format == "csv":
        return _csv(groups, rows, told)
    total = {**told, **dict.fromkeys(groups, "")}
    if groups:
        total[groups[0]] = "total"
    return _table(groups, [*rows, total] if groups else rows)


def _table(groups: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    lines = [[*(group.upper() for group in groups), *COLUMNS]]
    lines += [[str(row[group]) or "-" for group in groups] for row in rows]
    for line, row in zip(lines[1:], rows, strict=True):
        line += [_cell(name, row[name]) for name in COLUMNS.values()]
    for at, name in enumerate(COLUMNS.values(), len(groups)):
        if name.endswith("_nano"):  # so that the decimal points are one below the other
            amounts = [usd(row[name]) for row in rows]
            decimals = max(len(amount.partition(".")[2]) for amount in amounts)
            for line, row in zip(lines[1:], rows, strict=True):
                line[at] = usd(row[name], decimals)
    if groups:
        lines[-1][1 : len(groups)] = [""] * (len(groups) - 1)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    many = len(groups)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if at < many else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _cell(name: str, value: float) -> str:
    return f"{value:.0f}" if name.startswith("latency") else f"{value}"


def _csv(groups: Sequence[str], rows: Sequence[Mapping[str, Any]], told: Mapping[str, Any]) -> str:
    """Every figure that there is; a spreadsheet takes no name for a formula."""
    figures = [name for name, value in told.items() if not isinstance(value, dict | list)]
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow([*groups, *figures])
    for row in rows:
        names = [str(row[group]) for group in groups]
        safe = ["'" + name if name.startswith(FORMULA) else name for name in names]
        writer.writerow([*safe, *(usd(row[IN_USD[f]]) if f in IN_USD else row[f] for f in figures)])
    return written.getvalue().rstrip("\n")


def usd(nano: int, decimals: int | None = None) -> str:
    """An amount of USD with all its digits, and CENTS or `decimals` of them at least.

    >>> usd(1_234_500_000), usd(28), usd(0)
    ('1.2345', '0.000000028', '0.00')
    """
    whole, part = divmod(abs(nano), 10**9)
    digits = f"{part:09}".rstrip("0").ljust(CENTS if decimals is None else decimals, "0")
    return f"{'-' if nano < 0 else ''}{whole}.{digits}"
