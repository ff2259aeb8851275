"""What was used and what it cost: the ledger's figures in the words of those who ask."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Protocol

from actors.ledger.policy import GroupBy, groups_of
from actors.ref import OwnerUnavailable
from forebay.errors import InvalidRequest, Overloaded

HOURS_DAYS_MAX = 7
"""Most days that are told by the hour: the ledger reads their entries one by one."""
IN_USD = {"total_cost": "total_cost_nano", "saved_cost": "saved_cost_nano",
          "unsettled_cost": "unsettled_cost_nano"}  # fmt: skip
"""Floats for people, and the integers of nano-USD that they are made of."""
FIRST_S, LAST_S = -62_135_596_800, 253_402_300_799
"""Epoch seconds where the year 1 begins and the year 9999 ends; a date is between them, too."""
_DIGITS_OF_A_DATE = re.compile(r"[12]\d{3}([01]\d([0-3]\d)?)?")


class Ledger(Protocol):
    """The desk of the ledger, as far as it is asked here."""

    async def usage(
        self,
        tenant: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        group_by: GroupBy | Sequence[GroupBy] | None = None,
    ) -> dict[str, Any]: ...


async def report(
    ledger: Ledger,
    now_s: float,
    *,
    tenant: str | None = None,
    since_s: float | None = None,
    until_s: float | None = None,
    group_by: str | Sequence[str] | None = None,
) -> dict[str, Any]:
    """Totals over `since_s <= t < until_s` (UTC epoch seconds), of one tenant or of all.

    With `by_model` and `by_…` for each group that is asked for, and `data`, a row for each of their
    combinations. Money is exact in `…_nano` and rounded to a float of USD beside it.

    Raises:
        InvalidRequest: what is asked for makes no sense, or is too much.
        Overloaded: the ledger cannot be asked now.
    """
    try:
        groups = groups_of(group_by)
    except ValueError as error:
        raise InvalidRequest.about("group_by", str(error)) from None
    if since_s is not None and until_s is not None and until_s < since_s:
        raise InvalidRequest.about("end", "the end is before the start; exchange them")
    if "hour" in groups:
        _require_few_days(since_s, now_s if until_s is None else until_s)
    try:
        told = await ledger.usage(tenant, _ms(since_s), _ms(until_s), groups)
    except OwnerUnavailable as error:
        raise Overloaded(f"usage cannot be read now: {error}", retry_after_s=1.0) from None
    result: dict[str, Any] = in_usd(told)
    return result


def _require_few_days(since_s: float | None, until_s: float) -> None:
    if since_s is None or until_s - since_s > HOURS_DAYS_MAX * 86_400:
        raise InvalidRequest.about(
            "start",
            f"hours are told of {HOURS_DAYS_MAX} days at most; name a start that is so late,"
            " or group by day",
        )


async def metrics(
    ledger: Ledger, now_s: float, *, tenant: str | None, hours: float
) -> dict[str, Any]:
    """Totals of the last `hours`, by model, by deployment, and by hour or, where that is too much,
    by day; `start` and `end` say of when."""
    since_s = None if hours * 3600 > now_s else now_s - hours * 3600
    time: GroupBy = "hour" if hours <= HOURS_DAYS_MAX * 24 else "day"
    told = await report(
        ledger, now_s, tenant=tenant, since_s=since_s, until_s=now_s, group_by=("deployment", time)
    )
    del told["data"]
    return {"start": None if since_s is None else iso(since_s), "end": iso(now_s), **told}


async def costs(
    ledger: Ledger, now_s: float, *, tenant: str | None, since_s: float | None
) -> dict[str, Any]:
    """Cost in USD since then: the total, by model, by day and, of all tenants, by tenant.

    `saved_cost` is what the cache and shared calls have saved; `unsettled_cost` the most that
    calls without a known outcome may have cost; `unpriced_entries` have a price nobody knows.
    """
    groups: list[GroupBy] = ["day"] if tenant is not None else ["day", "tenant"]
    told = await report(
        ledger, now_s, tenant=tenant, since_s=since_s, until_s=None, group_by=groups
    )
    names = ("total_cost", "total_cost_nano", "saved_cost", "unsettled_cost", "unpriced_entries")
    requests = told["total_requests"]
    return {
        **{name: told[name] for name in names},
        "cost_per_request": told["total_cost"] / requests if requests else 0.0,
        **{
            f"by_{group}": {name: part["total_cost"] for name, part in told[f"by_{group}"].items()}
            for group in ("model", *groups)
        },
    }


def in_usd(value: Any) -> Any:
    """The same figures with USD beside nano-USD."""
    if isinstance(value, Mapping):
        told = {name: in_usd(inner) for name, inner in value.items()}
        for name, nano in IN_USD.items():
            if nano in told:
                told[name] = told[nano] / 1e9
        return told
    return [in_usd(inner) for inner in value] if isinstance(value, list) else value


def moment(given: str) -> float:
    """UTC epoch seconds of a date, a date and time (ISO 8601), or epoch seconds.

    Raises ValueError, in words that a name goes before.
    """
    if _DIGITS_OF_A_DATE.fullmatch(given):
        raise ValueError("must be a date with hyphens, such as 2026-01-31.")
    try:
        seconds = float(given)
    except ValueError:
        try:
            when = datetime.fromisoformat(given)
        except ValueError:
            seconds = math.nan
        else:
            seconds = when.replace(tzinfo=when.tzinfo or UTC).timestamp()
    if not FIRST_S <= seconds <= LAST_S:  # which nan is not, either
        raise ValueError("must be an ISO 8601 date or epoch seconds, before the year 10000.")
    return seconds


def iso(at_s: float) -> str:
    """UTC, to the millisecond. Raises ValueError or OverflowError beyond the year 9999."""
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds")


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
