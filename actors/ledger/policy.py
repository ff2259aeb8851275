"""What a ledger entry is, and the arithmetic on entries.

Rule 1: money is an integer number of nano-USD; floats end at `nano`.
Rule 2: a call is opened, then posted, voided or unsettled, under one id. What is settled is never
        changed: a second delivery of the same id is the same entry, and an opening that comes late
        is none.
Rule 3: totals are a plain sum over entries. Each entry counts by itself, so any order, any grouping
        and any batching of the same entries gives the same totals.
Rule 4: the attempts of a request are numbered from 1, and exactly one of its entries is number 1.
        Counting requests is counting those; a client may choose the request id, so it counts none.
        What was announced and not made after all has number NOT_MADE.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date, timedelta
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any, Literal, NamedTuple, get_args

Settled = Literal["posted", "voided", "unsettled", "refused", "hit", "joined", "replay"]
"""posted: a provider was paid or may be. voided: the attempt failed and costs nothing. unsettled:
the outcome was lost with its process, and `cost_nano` is the most that it may have cost. refused:
no provider was asked. hit: answered from the cache. joined: answered by somebody else's call.
replay: the answer that a request with the same key had before."""

Status = Literal["open"] | Settled
"""open: a call is about to be made, and `cost_nano` is the most that it may cost."""

STATUSES: tuple[str, ...] = get_args(Settled)
"""What an entry can be in the end."""
SERVED = ("posted", "hit", "joined", "replay")
"""What ends a request well, when the entry has no error."""
ASKED = ("posted", "voided", "unsettled")
"""What a provider was asked for."""

GroupBy = Literal["model", "day", "tenant", "deployment", "route", "hour"]
GROUPS: tuple[GroupBy, ...] = get_args(GroupBy)
"""What usage may be grouped by. Days and hours are UTC."""

NOT_MADE = 0
"""The number of an attempt that was announced and then not made."""
TOKENS_MAX = 10**12
"""Most tokens one entry can hold. More than that is a provider's nonsense, and is clamped."""
COST_NANO_MAX = 10**15
"""Most money one entry can hold: a million USD."""
ERROR_CHARS_MAX = 500

DAY_MS = 86_400_000
HOUR_MS = 3_600_000
MINUTE_MS = 60_000
MINUTES_TOLD = 62
"""An hour, and what a sum by whole minutes may be late at either end."""
LATENCY_MS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)
"""Served attempts are counted by the first of these that their latency does not exceed."""
LATENCY_MS_MAX = 300_000
"""What is slower than the last of them is told as if it were spread up to here."""
TENANTS_PER_READ_MAX = 1000
"""Most tenants of one `spent`."""


class Entry(NamedTuple):
    """One attempt, or one answer that needed none.

    `model` is the group the caller asked for, `deployment` what was called (empty if nothing was).
    `at_ms` is UTC epoch milliseconds. `unpriced`: the cost is unknown, not zero. `estimated`: the
    provider did not say how much was used. `price_version` names the prices that made the cost,
    and is empty where nothing was priced. `saved_nano` is what a hit or a joined request would
    have cost. `tool_calls` are those that the answer asks for. `most_nano` is the most that it may
    have cost, where an answer was lost or cut. `requests` is more than 1 only where refusals of one
    kind are one entry. `response_id` is the answer's own id, as its caller knows it; `cache_key`,
    in hexadecimal, is what the cache may have it under. `cached_tokens` are those of the prompt
    that the provider had in a cache of its own.
    """

    id: str
    request_id: str
    attempt: int
    tenant: str
    route: str
    model: str
    deployment: str
    status: Status
    prompt_tokens: int
    completion_tokens: int
    cost_nano: int
    unpriced: bool
    estimated: bool
    stream: bool
    latency_ms: int
    at_ms: int
    error: str | None
    http_status: int
    price_version: str = ""
    saved_nano: int = 0
    tool_calls: int = 0
    most_nano: int = 0
    requests: int = 1
    response_id: str = ""
    cache_key: str = ""
    cached_tokens: int = 0

    def values(self) -> tuple[Any, ...]:
        """The fields in order: an SQL row, and what a message or a spool holds of it."""
        return tuple(self)


COLUMNS: tuple[str, ...] = Entry._fields


@dataclass(frozen=True, slots=True)
class Totals:
    """The fold of a set of entries. Every field is a sum.

    `attempts` are those that a provider was asked for. `ms_5` and so on count served attempts by
    their latency: how many took so many ms at the most, and more than the one before.
    """

    requests: int = 0
    succeeded: int = 0
    refused: int = 0
    hits: int = 0
    joined: int = 0
    entries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_nano: int = 0
    unpriced: int = 0
    estimated: int = 0
    latency_ms: int = 0
    unsettled: int = 0
    unsettled_nano: int = 0
    saved_nano: int = 0
    tool_calls: int = 0
    attempts: int = 0
    cached_tokens: int = 0
    ms_5: int = 0
    ms_10: int = 0
    ms_20: int = 0
    ms_50: int = 0
    ms_100: int = 0
    ms_200: int = 0
    ms_500: int = 0
    ms_1000: int = 0
    ms_2000: int = 0
    ms_5000: int = 0
    ms_10000: int = 0
    ms_20000: int = 0
    ms_50000: int = 0
    ms_100000: int = 0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(a + b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*(a - b for a, b in zip(self._sums(), other._sums(), strict=True)))

    def _sums(self) -> list[int]:
        return [getattr(self, name) for name in SUMS]

    def as_dict(self, *, by_attempt: bool = False) -> dict[str, Any]:
        """What users read. `success_rate` is 0..1, and 0 where nothing was asked.

        It is that of requests; with `by_attempt`, for what is told of a deployment, that of the
        attempts there: a request counts where its first attempt was, its success where its last.
        """
        # In a range, or an hour, there may be a request's last attempt without its first one.
        asked = max(
            self.attempts if by_attempt and self.attempts else self.requests, self.succeeded
        )
        return {
            "total_requests": self.requests,
            "successful_requests": self.succeeded,
            "refused_requests": self.refused,
            "failed_requests": max(0, self.requests - self.succeeded - self.refused),
            "success_rate": self.succeeded / asked if asked else 0.0,
            "cache_hits": self.hits,
            "joined_requests": self.joined,
            "entries": self.entries,
            "attempts": self.attempts,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "cached_prompt_tokens": self.cached_tokens,
            "total_cost_nano": self.cost_nano,
            "unpriced_entries": self.unpriced,
            "estimated_entries": self.estimated,
            "unsettled_entries": self.unsettled,
            "unsettled_cost_nano": self.unsettled_nano,
            "saved_cost_nano": self.saved_nano,
            "tool_calls": self.tool_calls,
            "latency_ms_mean": self.latency_ms / self.succeeded if self.succeeded else 0.0,
            "latency_ms_p50": self.latency(0.5),
            "latency_ms_p95": self.latency(0.95),
            "latency_ms_p99": self.latency(0.99),
        }

    def latency(self, part: float) -> float:
        """About how many ms the fastest `part` (0..1) of the served attempts took at the most.

        It is right to within the step of LATENCY_MS in which it lies; 0 where nothing was served.
        """
        rank, seen, low = part * self.succeeded, 0, 0
        for high in (*LATENCY_MS, LATENCY_MS_MAX):
            here = self.succeeded - seen if high > LATENCY_MS[-1] else getattr(self, f"ms_{high}")
            if here and seen + here >= rank:
                return round(low + (high - low) * (rank - seen) / here, 1)
            seen, low = seen + here, high
        return 0.0


SUMS: tuple[str, ...] = tuple(field.name for field in fields(Totals))


def count(entry: Entry) -> Totals:
    """What one settled entry adds. Tokens and money are those of posted entries only."""
    posted = entry.status == "posted"
    served = entry.status in SERVED and entry.error is None
    return Totals(
        requests=entry.requests if entry.attempt == 1 else 0,
        succeeded=int(served),
        refused=entry.requests if entry.status == "refused" else 0,
        hits=int(entry.status == "hit"),
        joined=int(entry.status == "joined"),
        entries=1,
        prompt_tokens=entry.prompt_tokens if posted else 0,
        completion_tokens=entry.completion_tokens if posted else 0,
        cost_nano=entry.cost_nano if posted else 0,
        unpriced=int(entry.unpriced),
        estimated=int(entry.estimated),
        latency_ms=entry.latency_ms if served else 0,
        unsettled=int(entry.status == "unsettled"),
        unsettled_nano=entry.cost_nano if entry.status == "unsettled" else 0,
        saved_nano=entry.saved_nano,
        tool_calls=entry.tool_calls,
        attempts=int(entry.status in ASKED and entry.attempt != NOT_MADE),
        cached_tokens=entry.cached_tokens if posted else 0,
        **({_bucket(entry.latency_ms): 1} if served and entry.latency_ms <= LATENCY_MS[-1] else {}),
    )


def _bucket(latency_ms: int) -> str:
    return f"ms_{LATENCY_MS[bisect_left(LATENCY_MS, latency_ms)]}"


def fold(entries: Iterable[Entry]) -> Totals:
    """The totals of settled entries with distinct ids. A test compares it with the store's SQL."""
    totals = Totals()
    for entry in entries:
        totals += count(entry)
    return totals


def groups_of(group_by: str | Iterable[str] | None) -> tuple[GroupBy, ...]:
    """What is asked for, each once. Raises ValueError for what is not in GROUPS."""
    asked = (group_by,) if isinstance(group_by, str) else tuple(group_by or ())
    for one in asked:
        if one not in GROUPS:
            raise ValueError(f"group_by is one of {GROUPS}, or several of them, not {one!r}")
    return tuple(group for group in dict.fromkeys(asked) if group in GROUPS)


class Spent(NamedTuple):
    """What one tenant used of its limits over time, as far as the ledger knows at one moment.

    `commit` is the number of the last entry known then. `day` counts UTC days since 1970, `month`
    is year * 12 + month - 1; `day_nano` and `month_nano` were paid in them, or may have been where
    the outcome was lost. `minutes` are requests that were not refused, as (age in whole minutes,
    how many) of the last MINUTES_TOLD, those answered from the cache, or with what their key was
    answered before, in `hit_minutes` instead. What comes from a clock that is ahead has age 0.
    """

    commit: int
    day: int
    day_nano: int
    month: int
    month_nano: int
    minutes: tuple[tuple[int, int], ...] = ()
    hit_minutes: tuple[tuple[int, int], ...] = ()


class Calendar(NamedTuple):
    """Where a time lies: its UTC day and month, and the month's days `first_day <= day < end_day`.

    Days count from 1970, months from the year 0.
    """

    day: int
    month: int
    first_day: int
    end_day: int


_EPOCH = date(1970, 1, 1).toordinal()


def calendar(at_ms: int) -> Calendar:
    """Raises ValueError or OverflowError beyond the year 9999."""
    day = at_ms // DAY_MS
    first = date.fromordinal(_EPOCH + day).replace(day=1)
    end = (first + timedelta(days=31)).replace(day=1)
    month = first.year * 12 + first.month - 1
    return Calendar(day, month, first.toordinal() - _EPOCH, end.toordinal() - _EPOCH)


def nano(usd: float | Decimal) -> int:
    """USD to nano-USD, rounded half to even.

    A float counts as the shortest decimal that prints like it, so `nano(0.1) == 100_000_000`.
    Raises ValueError for what is not a finite number.
    """
    exact = usd if isinstance(usd, Decimal) else Decimal(repr(usd))
    if not exact.is_finite():
        raise ValueError(f"not an amount of money: {usd!r}")
    return int(exact.scaleb(9).to_integral_value(ROUND_HALF_EVEN))


FeedbackType = Literal["correction", "rating", "useful", "improvement", "error"]
FEEDBACK_PER_RESPONSE_MAX = 100
"""Most feedback of a tenant on one response."""
SCORE_MAX = 1000
RATING_HALF_LIFE_DAYS = 7
"""A rating that is so many days old counts half, one twice as old a quarter."""
RATING_DAYS_MAX = 8 * RATING_HALF_LIFE_DAYS


@dataclass(frozen=True, slots=True)
class Feedback:
    """What somebody thinks of an answer. `score` is 0 to SCORE_MAX, None where it says nothing of
    how good the answer was. `response_id` is empty where nobody knows which answer it is about."""

    id: str
    tenant: str
    response_id: str
    type: FeedbackType
    score: int | None
    content: str
    query: str
    response: str
    at_ms: int


class Recorded(NamedTuple):
    """Feedback that is in the ledger: about which model and deployment, empty where unknown, and
    what the cache may have the answer under. `new`: it was not there before."""

    id: str
    model: str
    deployment: str
    cache_key: str
    new: bool


class Rating(NamedTuple):
    """What a deployment's answers were rated: so many good ones and so many bad ones, the older
    the less they count."""

    good: float
    bad: float


def rating_of(days: Iterable[tuple[int, int, int]], today: int) -> Rating:
    """The rating that days' (day, sum of scores, ratings) come to. Days count from 1970."""
    good = bad = 0.0
    for day, score, count in days:
        weight = 0.5 ** (max(0, today - day) / RATING_HALF_LIFE_DAYS)
        good += weight * score / SCORE_MAX
        bad += weight * (count - score / SCORE_MAX)
    return Rating(good, bad)


class StoreFailed(Exception):
    """The store did not make the entries durable, or could not be read. Asking again is safe."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class LedgerFull(Exception):
    """No paid call may start, because it could not be recorded. Come back in `retry_after_s`."""

    def __init__(self, retry_after_s: float, reason: str) -> None:
        super().__init__(retry_after_s, reason)
        self.retry_after_s = retry_after_s
        self.reason = reason

    def __str__(self) -> str:
        return f"the ledger cannot record more calls: {self.reason}"
