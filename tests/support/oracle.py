"""Judges of what the upstream saw: whether a limit was exceeded, and how much of it was used.

They know nothing of Forebay: they read times and tokens from the simulator's log and replay the
definition of each limit. Times are seconds on the simulator's monotonic clock, in any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from itertools import pairwise

from tests.support.upstream import Record

NANO = 1_000_000_000


def overrun(times_s: Iterable[float], rate_per_s: float, burst: float) -> float:
    """The worst excess of any closed interval t over burst + rate·t, in requests.

    Zero or less: the limit was held. O(n): a bucket that is allowed to overflow is replayed, and
    what it holds after a request is the most that any interval that ends there has above its rate.
    """
    return token_overrun([(t, 1.0) for t in times_s], rate_per_s, burst)


def overrun_by_definition(times_s: Iterable[float], rate_per_s: float, burst: float) -> float:
    """The same, by looking at every interval there is: for the test of the other."""
    times = sorted(times_s)
    worst = -burst
    for first, begin_s in enumerate(times):
        for last in range(first, len(times)):
            allowed = burst + rate_per_s * (times[last] - begin_s)
            worst = max(worst, last - first + 1 - allowed)
    return worst


def token_overrun(
    events: Iterable[tuple[float, float]], rate_per_s: float, burst: float | None
) -> float:
    """The worst excess of any closed interval over burst + rate·t, in tokens.

    `events` are (time, tokens). One request may be larger than the burst, so the larger of the two
    counts as the burst. Nothing happened: minus the burst.
    """
    ordered = sorted(events)
    most = max([burst or 0.0, *(tokens for _, tokens in ordered)])
    level, worst, before_s = 0.0, 0.0, 0.0
    for at_s, tokens in ordered:
        level = max(0.0, level - rate_per_s * (at_s - before_s)) + tokens
        worst, before_s = max(worst, level), at_s
    return worst - most


def most_at_once(records: Iterable[Record]) -> int:
    """The most requests that were under way at one moment. One without an end never ended."""
    changes: list[tuple[float, int]] = []
    for record in records:
        changes.append((record.start_mono_ns, 1))
        if record.end_mono_ns is not None:
            changes.append((record.end_mono_ns, -1))
    running = most = 0
    for _, change in sorted(changes):  # at the same moment ends go first
        running += change
        most = max(most, running)
    return most


def under_way(records: Iterable[Record], at_s: float) -> int:
    """How many requests were under way at a moment, both ends included."""
    at_ns = at_s * NANO
    return sum(
        r.start_mono_ns <= at_ns and (r.end_mono_ns is None or r.end_mono_ns >= at_ns)
        for r in records
    )


def ends_s(records: Iterable[Record]) -> list[float]:
    """When the requests were over, as far as they are."""
    return sorted(r.end_mono_ns / NANO for r in records if r.end_mono_ns is not None)


def most_in(
    times_s: Iterable[float], window_s: float, amounts: Sequence[float] | None = None
) -> float:
    """The most requests (or what they used, in `amounts`) within any time shorter than window_s."""
    times = list(times_s)
    events = sorted(zip(times, amounts or [1.0] * len(times), strict=True))
    first, inside, most = 0, 0.0, 0.0
    for at_s, amount in events:
        inside += amount
        while at_s - events[first][0] >= window_s:
            inside -= events[first][1]
            first += 1
        most = max(most, inside)
    return most


def utilisation(
    times_s: Iterable[float],
    rate_per_s: float,
    burst: float,
    from_s: float,
    to_s: float,
    outages: Sequence[tuple[float, float]] = (),
) -> float:
    """What share of rate × (time − outages) was used between two moments.

    What the bucket had saved up by `from_s` is not counted as used: it would pay for idling later.
    Outages are (begin, end); they may overlap each other and the ends.
    """
    times = sorted(times_s)
    saved, before_s = burst, None
    for at_s in (t for t in times if t < from_s):
        refill = 0.0 if before_s is None else rate_per_s * (at_s - before_s)
        saved, before_s = max(0.0, min(burst, saved + refill) - 1.0), at_s
    if before_s is not None:
        saved = min(burst, saved + rate_per_s * (from_s - before_s))
    used = sum(from_s <= t <= to_s for t in times) - saved
    possible = rate_per_s * (to_s - from_s - covered(outages, from_s, to_s))
    return used / possible if possible > 0 else 1.0


def covered(spans: Iterable[tuple[float, float]], from_s: float, to_s: float) -> float:
    """Seconds between two moments that lie within any of the spans."""
    total, until_s = 0.0, from_s
    for begin_s, end_s in sorted(spans):
        begin_s, end_s = max(begin_s, until_s), min(end_s, to_s)
        if end_s > begin_s:
            total, until_s = total + end_s - begin_s, end_s
    return total


def longest_pause(times_s: Iterable[float], from_s: float, to_s: float) -> float:
    """The longest time without a request between two moments, both ends included."""
    inside = [from_s, *sorted(t for t in times_s if from_s <= t <= to_s), to_s]
    return max(after - before for before, after in pairwise(inside))


def spent(records: Sequence[Record], prompt_usd: str, completion_usd: str) -> int:
    """What the log's tokens cost at these prices per token, in nano-USD, without rounding."""
    return _sum(records, lambda r: r.prompt_tokens, prompt_usd) + _sum(
        records, lambda r: r.completion_tokens, completion_usd
    )


def _sum(records: Iterable[Record], tokens: Callable[[Record], int], usd: str) -> int:
    nano = Fraction(usd) * NANO * sum(tokens(record) for record in records)
    return -(-nano.numerator // nano.denominator)


def starts_s(records: Iterable[Record]) -> list[float]:
    """When the requests arrived."""
    return sorted(record.start_mono_ns / NANO for record in records)


def tokens_at(records: Iterable[Record]) -> list[tuple[float, float]]:
    """When the requests arrived and what they used in all."""
    return sorted(
        (r.start_mono_ns / NANO, float(r.prompt_tokens + r.completion_tokens)) for r in records
    )
