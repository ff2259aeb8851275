"""Entries in a database, by one connection, on one thread.

Rule 1: an append is one transaction, and so is a read. What is written in one is the entries, their
        part of the sums, and the calls that they settle.
Rule 2: the statements are the same for SQLite and PostgreSQL (SQLAlchemy Core).
Rule 3: a ledger whose sums are not the fold of its entries is not opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import islice, pairwise
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    FromClause,
    Integer,
    Row,
    Select,
    Table,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal_column,
    select,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DataError, IntegrityError, SQLAlchemyError

from actors.ledger.place import Place, reason
from actors.ledger.policy import (
    ASKED,
    DAY_MS,
    FEEDBACK_PER_RESPONSE_MAX,
    LATENCY_MS,
    MINUTE_MS,
    MINUTES_TOLD,
    NOT_MADE,
    RATING_DAYS_MAX,
    SERVED,
    SUMS,
    Entry,
    Feedback,
    Rating,
    Recorded,
    Spent,
    StoreFailed,
    Totals,
    calendar,
    rating_of,
)
from actors.ledger.rows import (
    ID,
    STATUS,
    Stored,
    clean,
    columns_of,
    entry_of,
    indexed,
    insert_of,
    numbers_of,
    stored,
)
from actors.ledger.schema import (
    CHECKPOINTS,
    ENTRIES,
    FEEDBACK,
    FEEDBACK_SUMS,
    OPENED,
    RATINGS,
    TOTALS,
    ensure,
)

FEEDBACK_SUMS_MAX = 1000
"""Most sums of feedback in one answer."""
CHECKPOINT_ENTRIES = 50_000
"""A start folds about so many entries at most."""
IDS_PER_QUERY = 1024
LOST = "the process that made the call ended before it was answered"
RATING_ROWS_MAX = 50_000
"""Most days of deployments that ratings are made of; the latest ones."""


def _one(condition: ColumnElement[bool]) -> ColumnElement[int]:
    return case((condition, 1), else_=0)


def whole(dividend: ColumnElement[int], divisor: int) -> ColumnElement[int]:
    """How often `divisor` is in it."""
    # A literal, since PostgreSQL does not take two bound values for one expression.
    return dividend // literal_column(str(divisor), Integer)


def figures(t: FromClause) -> dict[str, ColumnElement[int]]:
    """`policy.count`, in SQL. A test compares."""
    posted, lost = t.c.status == "posted", t.c.status == "unsettled"
    served = and_(t.c.status.in_(SERVED), t.c.error.is_(None))
    return {
        "requests": case((t.c.attempt == 1, t.c.requests), else_=0),
        "succeeded": _one(served),
        "refused": case((t.c.status == "refused", t.c.requests), else_=0),
        "hits": _one(t.c.status == "hit"),
        "joined": _one(t.c.status == "joined"),
        "entries": literal_column("1", Integer),
        "prompt_tokens": case((posted, t.c.prompt_tokens), else_=0),
        "completion_tokens": case((posted, t.c.completion_tokens), else_=0),
        "cost_nano": case((posted, t.c.cost_nano), else_=0),
        "unpriced": t.c.unpriced,
        "estimated": t.c.estimated,
        "latency_ms": case((served, t.c.latency_ms), else_=0),
        "unsettled": _one(lost),
        "unsettled_nano": case((lost, t.c.cost_nano), else_=0),
        "saved_nano": t.c.saved_nano,
        "tool_calls": t.c.tool_calls,
        "attempts": _one(and_(t.c.status.in_(ASKED), t.c.attempt != literal_column(str(NOT_MADE)))),
        "cached_tokens": case((posted, t.c.cached_tokens), else_=0),
        **{
            # In this order: most entries fail the first comparison or the second, and `served`
            # costs SQLite a search.
            f"ms_{high}": _one(and_(t.c.latency_ms > low, t.c.latency_ms <= high, served))
            for low, high in pairwise((-1, *LATENCY_MS))
        },
    }


_DAY = whole(ENTRIES.c.at_ms, DAY_MS)
_ADDED = [func.sum(figure).label(name) for name, figure in figures(ENTRIES).items()]
_NUMBERED = bindparam("after", type_=Integer)


def _folded(columns: Mapping[str, ColumnElement[int]]) -> list[ColumnElement[Any]]:
    return [func.coalesce(func.sum(columns[name]), 0).label(name) for name in SUMS]


_FOLD_ENTRIES = select(*_folded(figures(ENTRIES))).where(ENTRIES.c.number > _NUMBERED)
_FOLD_TOTALS = select(*_folded({name: TOTALS.c[name] for name in SUMS}))
_LAST = select(func.coalesce(func.max(ENTRIES.c.number), 0))
_PLACE = {name: ENTRIES.c[name] for name in ("tenant", "model", "deployment", "route")} | {
    "day": _DAY
}
_GROUPS = (
    select(*(column.label(name) for name, column in _PLACE.items()), *_ADDED)
    .where(ENTRIES.c.number > _NUMBERED)
    .group_by(*_PLACE.values())
)


@cache
def _add_to_totals(dialect: str) -> Any:
    make = postgresql.insert if dialect == "postgresql" else sqlite.insert
    added = make(TOTALS).from_select([*_PLACE, *SUMS], _GROUPS)
    return added.on_conflict_do_update(
        index_elements=list(_PLACE),
        set_={name: TOTALS.c[name] + added.excluded[name] for name in SUMS},
    )


Message = tuple[str, Sequence[Entry]]
"""Who sends, and entries, open ones among them, to be stored together."""


class Store:
    """Owns the connection to where the entries are. Bounded by that place.

    Every method blocks, and all are called by the same thread. `append` has returned only when the
    entries are durable. Failures are StoreFailed, SQLAlchemyError or OSError; after one the caller
    calls `close`, and the next use opens the place anew, so that nothing is decided on what a
    failing disk or a lost server may not have kept.

    Entries are numbered from 1 in the order they are stored and are never changed or deleted. Since
    a read sees whole transactions only, one that knows number n knows every message whose last
    entry is numbered n or less, and nothing of any other message.
    """

    def __init__(self, place: Place) -> None:
        self.place = place
        self._connection: Connection | None = None
        self._last = 0
        self._checkpoint = 0
        self.open_count = 0
        self._unsettled = 0

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One transaction, on a connection that is opened first where there is none."""
        connection = self._connection or self._open()
        with connection.begin():
            yield connection

    def _open(self) -> Connection:
        connection = self.place.open()
        try:
            with connection.begin():
                ensure(connection)
            with connection.begin():
                self._checkpoint = self._check(connection)
                opened = select(func.count()).select_from(OPENED)
                self.open_count = int(connection.execute(opened).scalar_one())
        except BaseException:
            self.place.close()
            raise
        self._connection = connection
        return connection

    def _check(self, connection: Connection) -> int:
        """That the sums are the fold of the entries. Returns the number of the last checkpoint.

        Entries up to the last checkpoint were folded when it was made; those after it are now.
        """
        latest = select(CHECKPOINTS).order_by(CHECKPOINTS.c.number.desc()).limit(1)
        found = connection.execute(latest).first()
        number = 0 if found is None else int(found.number)
        counted = Totals() if found is None else _totals(found[1:])
        counted += _totals(connection.execute(_FOLD_ENTRIES, {"after": number}).one())
        last = int(connection.execute(_LAST).scalar_one())
        kept = _totals(connection.execute(_FOLD_TOTALS).one())
        if found is None and kept == Totals():
            connection.execute(_add_to_totals(connection.dialect.name), {"after": 0})
            kept = _totals(connection.execute(_FOLD_TOTALS).one())
            if last >= CHECKPOINT_ENTRIES:
                number = last
                _keep_checkpoint(connection, number, counted)
        self._last, self._unsettled = last, kept.unsettled
        if counted.entries != last or counted != kept:
            raise StoreFailed(
                f"{self.place.name}: its sums say {kept.entries} entries and {kept.cost_nano}"
                f" nano-USD, its entries say {counted.entries} and {counted.cost_nano}, and the"
                f" last of them is numbered {last}. Restore it from a copy; or, to take the entries"
                " as they are, empty the tables ledger_sums and ledger_checkpoints"
            )
        return number

    def close(self) -> None:
        """Safe to call twice. A store in memory loses everything."""
        self._connection = None
        self.place.close()

    def append(self, messages: Sequence[Message]) -> tuple[int, list[int]]:
        """All of them or none. Returns how many entries were new, and a commit for each message.

        The commit is the number of the last of all entries now, or, where some of the message's
        were known before, that of the message's own last one: a read may have been between. A
        message without settled entries gets the former. An open entry is new when it was neither
        opened nor settled before.
        """
        arrived = [(holder, [stored(entry) for entry in entries]) for holder, entries in messages]
        with self.transaction() as connection:
            before = last = self._last
            known = _numbers(connection, [row[ID] for _, rows in arrived for row in rows])
            new: list[Stored] = []
            own: list[int | None] = []
            for _, rows in arrived:
                settled = [row for row in rows if row[STATUS] != "open"]
                count = len(new)
                for row in settled:
                    if row[ID] not in known:
                        last += 1
                        known[row[ID]] = last
                        new.append((last, *row))
                fresh = len(new) - count == len(settled)
                own.append(None if fresh else max(known[row[ID]] for row in settled))
            if new:
                connection.exec_driver_sql(insert_of(ENTRIES, connection.dialect.name), new)
                add = _add_to_totals(connection.dialect.name)
                connection.execute(add, {"after": before})
            closed = self._close_opened(connection, [row[1 + ID] for row in new])
            opened = _open_rows(connection, arrived, known)
            checkpoint = self._mark(connection, last)
        self._last = last
        self.open_count += opened - closed
        self._unsettled += sum(row[1 + STATUS] == "unsettled" for row in new)
        self._checkpoint = checkpoint
        return len(new) + opened, [last if commit is None else commit for commit in own]

    def _close_opened(self, connection: Connection, settled: Sequence[str]) -> int:
        """Takes what is settled now out of what is open. Returns how much that was."""
        if not self.open_count:
            return 0
        closed = 0
        for ids in _chunks(settled):
            closed += connection.execute(delete(OPENED).where(OPENED.c.id.in_(ids))).rowcount
        return closed

    def _mark(self, connection: Connection, last: int) -> int:
        """Makes a checkpoint when it is time for one. Returns the number of the latest."""
        if last - self._checkpoint < CHECKPOINT_ENTRIES:
            return self._checkpoint
        latest = select(CHECKPOINTS).where(CHECKPOINTS.c.number == self._checkpoint)
        found = connection.execute(latest).first()
        counted = Totals() if found is None else _totals(found[1:])
        counted += _totals(connection.execute(_FOLD_ENTRIES, {"after": self._checkpoint}).one())
        _keep_checkpoint(connection, last, counted)
        return last

    def settle_lost(self, holder: str) -> int:
        """Settles what a holder opened and can settle no more. Returns how much that was."""
        with self.transaction() as connection:
            of = select(*columns_of(OPENED)).where(OPENED.c.holder == clean(holder))
            found = [entry_of(row) for row in connection.execute(of.order_by(OPENED.c.at_ms))]
        lost = [
            entry._replace(status="unsettled", error=LOST, http_status=0, latency_ms=0)
            for entry in found
        ]
        self.append([(holder, lost)])
        return len(lost)

    def holders(self, most: int) -> dict[str, int]:
        """Who announced calls that are not settled yet, and how many."""
        many = func.count().label("many")
        found = select(OPENED.c.holder, many).group_by(OPENED.c.holder).limit(most)
        with self.transaction() as connection:
            return {row.holder: row.many for row in connection.execute(found)}

    def last(self) -> int:
        """The number of the last entry, 0 if there is none."""
        with self.transaction():
            return self._last

    def unsettled(self) -> int:
        """How many entries are of calls whose outcome was lost."""
        with self.transaction():
            return self._unsettled

    def entries(self, request_id: str) -> list[Entry]:
        """The settled entries of one request id, in the order they were appended."""
        asked = indexed(request_id)
        of = select(*columns_of(ENTRIES)).where(ENTRIES.c.request_id == asked)
        with self.transaction() as connection:
            return [entry_of(row) for row in connection.execute(of.order_by(ENTRIES.c.number))]

    def spent(self, tenants: Sequence[str], at_ms: int) -> list[Spent]:
        """What each of the tenants had used at `at_ms`, all of the same moment in the ledger."""
        when = calendar(at_ms)
        names = [indexed(tenant) for tenant in tenants]
        days = (
            select(
                TOTALS.c.tenant,
                TOTALS.c.day,
                func.sum(TOTALS.c.cost_nano + TOTALS.c.unsettled_nano),
            )
            .where(TOTALS.c.tenant.in_(names))
            .where(TOTALS.c.day >= when.first_day, TOTALS.c.day < when.end_day)
            .group_by(TOTALS.c.tenant, TOTALS.c.day)
        )
        paid: dict[str, dict[int, int]] = {name: {} for name in names}
        ages: dict[str, list[tuple[int, int, int]]] = {name: [] for name in names}
        # One owner, one connection, one thread: nothing is written between these statements.
        with self.transaction() as connection:
            commit = self._last
            if names:
                for tenant, day, cost_nano in connection.execute(days):
                    paid[tenant][int(day)] = int(cost_nano)
                for tenant, age, others, hits in connection.execute(_minutes(names, at_ms)):
                    ages[tenant].append((int(age), int(others), int(hits)))
        return [
            Spent(
                commit,
                when.day,
                paid[name].get(when.day, 0),
                when.month,
                sum(paid[name].values()),
                tuple((age, others) for age, others, _ in ages[name] if others),
                tuple((age, hits) for age, _, hits in ages[name] if hits),
            )
            for name in names
        ]

    def record(self, feedback: Feedback) -> Recorded | None:
        """Keeps what a tenant thinks of an answer of its own; None where it had no such answer.

        With an id that is known it is the same feedback, and what came first stays.

        Raises:
            OverflowError: the tenant has said enough about this answer.
        """
        tenant, response_id = indexed(feedback.tenant), indexed(feedback.response_id)
        with self.transaction() as connection:
            of_id = select(FEEDBACK).where(FEEDBACK.c.id == indexed(feedback.id))
            known = connection.execute(of_id).first()
            if known is not None:
                same = known.tenant == tenant
                about = (known.model, known.deployment, known.cache_key)
                return Recorded(known.id, *about, new=False) if same else None
            about = ("", "", "")
            before: Sequence[Row[Any]] = ()
            if response_id:
                found = _answer_of(connection, tenant, response_id)
                if found is None:
                    return None
                about = found
                of = (FEEDBACK.c.tenant == tenant, FEEDBACK.c.response_id == response_id)
                earlier = select(FEEDBACK).where(*of).order_by(FEEDBACK.c.number.desc())
                before = connection.execute(earlier.limit(FEEDBACK_PER_RESPONSE_MAX)).all()
                if len(before) == FEEDBACK_PER_RESPONSE_MAX:
                    raise OverflowError
            number = select(func.coalesce(func.max(FEEDBACK.c.number), 0))
            model, deployment, cache_key = about
            row = {
                "number": int(connection.execute(number).scalar_one()) + 1,
                "id": indexed(feedback.id),
                "tenant": tenant,
                "response_id": response_id,
                "type": feedback.type,
                "score": feedback.score,
                "content": clean(feedback.content),
                "query": clean(feedback.query),
                "response": clean(feedback.response),
                "model": model,
                "deployment": deployment,
                "cache_key": cache_key,
                "at_ms": feedback.at_ms,
            }
            connection.execute(insert(FEEDBACK), row)
            _add(
                connection,
                FEEDBACK_SUMS,
                {"tenant": tenant, "model": model, "deployment": deployment, "type": row["type"]},
                {
                    "count": 1,
                    "rated": int(feedback.score is not None),
                    "score": feedback.score or 0,
                },
            )
            if deployment and feedback.score is not None:
                last = next((one for one in before if one.score is not None), None)
                if last is not None:
                    _rate(connection, deployment, last.at_ms, -1, -last.score)
                _rate(connection, deployment, feedback.at_ms, 1, feedback.score)
            return Recorded(indexed(feedback.id), *about, new=True)

    def feedback(self, tenant: str | None = None) -> list[tuple[str, str, str, int, int, int]]:
        """Sums of feedback: (model, deployment, type, count, rated, score), those with the most
        first, FEEDBACK_SUMS_MAX at most."""
        t = FEEDBACK_SUMS.c
        by = (t.model, t.deployment, t.type)
        sums = [func.sum(t[name]) for name in ("count", "rated", "score")]
        of = select(*by, *sums).group_by(*by).order_by(sums[0].desc(), *by).limit(FEEDBACK_SUMS_MAX)
        if tenant is not None:
            of = of.where(t.tenant == indexed(tenant))
        with self.transaction() as connection:
            return [
                (row[0], row[1], row[2], int(row[3]), int(row[4]), int(row[5]))
                for row in connection.execute(of)
            ]

    def ratings(self, at_ms: int) -> dict[str, Rating]:
        """What the deployments were rated, by all tenants, over the last RATING_DAYS_MAX days."""
        today = at_ms // DAY_MS
        of = (
            select(RATINGS.c.deployment, RATINGS.c.day, RATINGS.c.score, RATINGS.c.count)
            .where(RATINGS.c.day > today - RATING_DAYS_MAX)
            .order_by(RATINGS.c.day.desc())
            .limit(RATING_ROWS_MAX)
        )
        days: dict[str, list[tuple[int, int, int]]] = {}
        with self.transaction() as connection:
            for deployment, day, score, count in connection.execute(of):
                days.setdefault(deployment, []).append((int(day), int(score), int(count)))
        return {name: rating_of(of_one, today) for name, of_one in days.items()}


def failure_of(error: Exception) -> tuple[StoreFailed, bool]:
    """What to tell of an error, and whether the store is to blame, not what was asked of it."""
    if isinstance(error, StoreFailed):
        return error, True
    of_store = isinstance(error, SQLAlchemyError | OSError)
    of_asked = isinstance(error, DataError | IntegrityError)
    return StoreFailed(reason(error)), of_store and not of_asked


def _answer_of(
    connection: Connection, tenant: str, response_id: str
) -> tuple[str, str, str] | None:
    """Model, deployment and cache key of a tenant's answer, by its own id or its request's.

    A hit has the id of the answer that was stored; what was called is in the entry of that one.
    """
    t = ENTRIES.c
    served = (t.tenant == tenant, t.status.in_(SERVED), t.error.is_(None))
    for named in (
        (t.response_id == response_id, t.response_id != literal_column("''")),
        (t.request_id == response_id,),
    ):
        of = select(t.model, t.deployment, t.cache_key).where(*named, *served)
        latest = of.order_by(_one(t.deployment == ""), t.number.desc()).limit(1)
        found = connection.execute(latest).first()
        if found is not None:
            return found.model, found.deployment, found.cache_key
    return None


def _rate(connection: Connection, deployment: str, at_ms: int, count: int, score: int) -> None:
    place = {"deployment": deployment, "day": at_ms // DAY_MS}
    _add(connection, RATINGS, place, {"count": count, "score": score})


def _add(
    connection: Connection, table: Table, place: Mapping[str, Any], by: Mapping[str, int]
) -> None:
    """Adds to the row of a place, which is made where there is none."""
    make = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    added = make(table).values({**place, **by})
    connection.execute(
        added.on_conflict_do_update(
            index_elements=list(place),
            set_={name: table.c[name] + added.excluded[name] for name in by},
        )
    )


def _keep_checkpoint(connection: Connection, number: int, counted: Totals) -> None:
    sums = {name: getattr(counted, name) for name in SUMS}
    connection.execute(insert(CHECKPOINTS).values(number=number, **sums))


def _numbers(connection: Connection, ids: Sequence[str]) -> dict[str, int]:
    """The numbers of those entries that are settled already."""
    known: dict[str, int] = {}
    for some in _chunks(ids):
        # Filled up with the last one, so that there are few statements.
        count = 1 << (len(some) - 1).bit_length()
        wanted = (*some, *some[-1:] * (count - len(some)))
        found = connection.exec_driver_sql(numbers_of(count, connection.dialect.name), wanted)
        known.update((id_, number) for id_, number in found)
    return known


def _open_rows(
    connection: Connection,
    arrived: Sequence[tuple[str, Sequence[Stored]]],
    settled: Mapping[str, int],
) -> int:
    """Notes the calls that are about to be made. Returns how many were not known."""
    rows: dict[str, Stored] = {}
    for holder, those in arrived:
        for row in those:
            if row[STATUS] == "open" and row[ID] not in settled:
                rows.setdefault(row[ID], (*row, clean(holder)))
    for ids in _chunks(list(rows)):
        for known in connection.execute(select(OPENED.c.id).where(OPENED.c.id.in_(ids))):
            del rows[known.id]
    if rows:
        sql = insert_of(OPENED, connection.dialect.name)
        connection.exec_driver_sql(sql, list(rows.values()))
    return len(rows)


def _minutes(tenants: Sequence[str], at_ms: int) -> Select[Any]:
    """Requests of each tenant that were not refused, by their age in whole minutes."""
    told_ms = MINUTES_TOLD * MINUTE_MS
    ahead = ENTRIES.c.at_ms > at_ms
    aged = (
        select(
            ENTRIES.c.tenant,
            case((ahead, 0), else_=whole(at_ms - ENTRIES.c.at_ms, MINUTE_MS)).label("age"),
            _one(ENTRIES.c.status.in_(("hit", "replay"))).label("hit"),
        )
        .where(ENTRIES.c.tenant.in_(tenants))
        .where(ENTRIES.c.at_ms > at_ms - told_ms, ENTRIES.c.at_ms < at_ms + told_ms)
        .where(ENTRIES.c.attempt == 1, ENTRIES.c.status != "refused")
        .subquery()
    )
    return (
        select(aged.c.tenant, aged.c.age, func.sum(1 - aged.c.hit), func.sum(aged.c.hit))
        .group_by(aged.c.tenant, aged.c.age)
        .order_by(aged.c.age)
    )


def _totals(sums: Iterable[Any]) -> Totals:
    # PostgreSQL's sums of integers are decimals.
    return Totals(*map(int, sums))


def _chunks(ids: Iterable[str]) -> Iterator[list[str]]:
    every = iter(ids)
    while chunk := list(islice(every, IDS_PER_QUERY)):
        yield chunk
