"""Usage: the sums of a range of time, by whatever is asked, read step by step.

Rule 1: a step reads STEP_ROWS rows at most, or one day or moment that has more. What is appended in
        the meantime waits for one step, however much there is to read.
Rule 2: whole days come from the sums that the store keeps, the parts of days at the ends of a range
        from its entries, and so do hours, which the store keeps no sums of.
Rule 3: each step is a transaction of its own. What was appended before the reading is in the
        answer, and what comes during it may be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from operator import add
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, Connection, cast, func, select

from actors.ledger.policy import DAY_MS, HOUR_MS, SUMS, GroupBy, Totals
from actors.ledger.rows import indexed
from actors.ledger.schema import ENTRIES, TOTALS
from actors.ledger.store import Store, figures, whole

STEP_ROWS = 5000
GROUPS_MAX = 1000
"""Most groups of one kind in an answer, those with the most entries; the rest are `OTHERS`."""
GROUPS_KEPT_MAX = 10 * GROUPS_MAX
"""Most groups of one kind while reading. What is met after so many counts as `OTHERS`."""
OTHERS = "(others)"

_ENTRIES_AT = SUMS.index("entries")
_EPOCH = date(1970, 1, 1).toordinal()

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class _Source:
    """Rows to add up: when they were, whose, what they may be grouped by, and their figures."""

    period: ColumnElement[int]
    tenant: ColumnElement[str]
    groups: Mapping[GroupBy, ColumnElement[Any]]
    sums: Sequence[ColumnElement[int]]


def _source(
    table: Any,
    period: ColumnElement[int],
    times: Mapping[GroupBy, ColumnElement[int]],
    added: Mapping[str, ColumnElement[int]],
) -> _Source:
    names: tuple[GroupBy, ...] = ("model", "tenant", "deployment", "route")
    return _Source(
        period,
        table.c.tenant,
        {**{name: table.c[name] for name in names}, **times},
        # PostgreSQL's sums of integers are decimals.
        [cast(func.sum(added[name]), BigInteger) for name in SUMS],
    )


_DAYS = _source(TOTALS, TOTALS.c.day, {"day": TOTALS.c.day}, {n: TOTALS.c[n] for n in SUMS})
_MOMENTS = _source(
    ENTRIES,
    ENTRIES.c.at_ms,
    {"day": whole(ENTRIES.c.at_ms, DAY_MS), "hour": whole(ENTRIES.c.at_ms, HOUR_MS)},
    figures(ENTRIES),
)

_Part = tuple[_Source, int | None, int | None]


class Reading:
    """Owns what was added up so far of `since_ms <= at_ms < until_ms`, UTC epoch ms.

    `step` is called by the store's thread until it says that nothing is left; then `answer` tells.
    Bounded by GROUPS_KEPT_MAX groups for each of `groups`, for models, and for all of them
    together.

    Failure behaviour: a step that fails is the reading's end; nothing was changed.
    """

    def __init__(
        self,
        tenant: str | None,
        since_ms: int | None,
        until_ms: int | None,
        groups: tuple[GroupBy, ...],
    ) -> None:
        self._tenant = None if tenant is None else indexed(tenant)
        self._asked = groups
        self._columns: tuple[GroupBy, ...] = tuple(dict.fromkeys((*groups, "model")))
        kinds: dict[tuple[GroupBy, ...], dict[Key, list[int]]] = {}
        for kind in (*((name,) for name in self._columns), groups):
            kinds[kind] = {}
        self._kinds = kinds
        self._parts = deque(_parts(since_ms, until_ms, hourly="hour" in groups))

    def step(self, store: Store) -> bool:
        """Reads on. Whether there is more."""
        if self._parts:
            source, start, end = self._parts.popleft()
            with store.transaction() as connection:
                stop = self._stop(connection, source, start, end)
                self._add(connection, source, start, end if stop is None else stop)
            if stop is not None:
                self._parts.appendleft((source, stop, end))
        return bool(self._parts)

    def _stop(
        self, connection: Connection, source: _Source, start: int | None, end: int | None
    ) -> int | None:
        """Where this step ends, None if that is the end of the part."""
        periods = select(source.period).where(*self._where(source, start, end))
        ordered = periods.order_by(source.period)
        last = connection.execute(ordered.offset(STEP_ROWS).limit(1)).scalar()
        if last is None:
            return None
        first = connection.execute(ordered.limit(1)).scalar_one()
        return max(int(last), int(first) + 1)

    def _add(
        self, connection: Connection, source: _Source, start: int | None, end: int | None
    ) -> None:
        columns = [source.groups[name] for name in self._columns]
        rows = select(*columns, *source.sums).where(*self._where(source, start, end))
        places = [(found, [self._columns.index(name) for name in kind])
                  for kind, found in self._kinds.items()]  # fmt: skip
        many = len(columns)
        for row in connection.execute(rows.group_by(*columns)):
            sums = list(row[many:])
            for found, place in places:
                _merge(found, tuple([row[at] for at in place]), sums)

    def _where(
        self, source: _Source, start: int | None, end: int | None
    ) -> list[ColumnElement[bool]]:
        where = []
        if self._tenant is not None:
            where.append(source.tenant == self._tenant)
        if start is not None:
            where.append(source.period >= start)
        if end is not None:
            where.append(source.period < end)
        return where

    def answer(self) -> dict[str, Any]:
        """Totals, with `by_model` and `by_…` for each group that was asked for.

        Where any was, `data` has a row for each of their combinations, in order.
        """
        models = self._kinds[("model",)]
        total = list(map(sum, zip(*models.values(), strict=True)))
        told = _totals(total).as_dict()
        for kind, found in self._kinds.items():
            if len(kind) == 1:
                told[f"by_{kind[0]}"] = {
                    _name(kind[0], key[0]): sums.as_dict(by_attempt=kind == ("deployment",))
                    for key, sums in _most(found)
                }
        if self._asked:
            by_attempt = "deployment" in self._asked
            told["data"] = [
                {
                    **dict(zip(self._asked, map(_name, self._asked, key), strict=True)),
                    **sums.as_dict(by_attempt=by_attempt),
                }
                for key, sums in _most(self._kinds[self._asked])
            ]
        return told


def _parts(since_ms: int | None, until_ms: int | None, *, hourly: bool) -> Iterable[_Part]:
    """What to read for a range: parts that do not overlap, in order of time."""
    if since_ms is not None and until_ms is not None and since_ms >= until_ms:
        return
    first_day = None if since_ms is None else -(-since_ms // DAY_MS)
    end_day = None if until_ms is None else until_ms // DAY_MS
    if hourly or (first_day is not None and end_day is not None and first_day >= end_day):
        yield _MOMENTS, since_ms, until_ms
        return
    if since_ms is not None and first_day is not None and since_ms < first_day * DAY_MS:
        yield _MOMENTS, since_ms, first_day * DAY_MS
    yield _DAYS, first_day, end_day
    if until_ms is not None and end_day is not None and end_day * DAY_MS < until_ms:
        yield _MOMENTS, end_day * DAY_MS, until_ms


def _merge(found: dict[Key, list[int]], key: Key, sums: list[int]) -> None:
    if key not in found and len(found) >= GROUPS_KEPT_MAX:
        key = (OTHERS,) * len(key)
    known = found.get(key)
    found[key] = sums if known is None else list(map(add, known, sums))


def _most(found: dict[Key, list[int]]) -> list[tuple[Key, Totals]]:
    """The groups that are told, in order, and in the end what the others come to."""
    others = (OTHERS,) * (len(next(iter(found))) if found else 0)
    named = [pair for pair in found.items() if pair[0] != others]
    named.sort(key=lambda pair: (-pair[1][_ENTRIES_AT], pair[0]))
    told: list[tuple[Key, Totals]] = [(key, _totals(sums)) for key, sums in named[:GROUPS_MAX]]
    told.sort(key=lambda pair: pair[0])
    left = [sums for _, sums in named[GROUPS_MAX:]]
    if others in found:
        left.append(found[others])
    if left:
        told.append((others, _totals(map(sum, zip(*left, strict=True)))))
    return told


def _totals(sums: Iterable[int]) -> Totals:
    return Totals(*sums)


def _name(group: GroupBy, value: Any) -> str:
    """Days and hours as ISO 8601 has them, in UTC."""
    if value == OTHERS or group not in ("day", "hour"):
        return str(value)
    days, hour = divmod(int(value), 24) if group == "hour" else (int(value), 0)
    day = date.fromordinal(_EPOCH + days).isoformat()
    return f"{day}T{hour:02}:00Z" if group == "hour" else day
