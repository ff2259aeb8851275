"""Entries in one SQLite file, by one connection, on one thread.

SQLite up to 3.51.2 can corrupt a WAL file that two connections write to, so there is exactly one,
and a lock file beside the database keeps a second system out.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from actors.file_lock import FileLock, FileLocked
from actors.ledger.policy import (
    COLUMNS,
    DAY_MS,
    MINUTE_MS,
    MINUTES_TOLD,
    SERVED,
    SUMS,
    Entry,
    GroupBy,
    Spent,
    StoreFailed,
    Totals,
    calendar,
)
from actors.ref import Clock

SCHEMA_VERSION = 2
GROUPS_MAX = 1000
"""Most groups of one usage answer; what is beyond them is added up as `OTHERS`."""
OTHERS = "(others)"

SCHEMA = """
CREATE TABLE entries (
    id TEXT NOT NULL UNIQUE,
    request_id TEXT NOT NULL,
    attempt INTEGER NOT NULL,
    tenant TEXT NOT NULL,
    route TEXT NOT NULL,
    model TEXT NOT NULL,
    deployment TEXT NOT NULL,
    status TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    completion_tokens INTEGER NOT NULL,
    cost_nano INTEGER NOT NULL,
    unpriced INTEGER NOT NULL,
    estimated INTEGER NOT NULL,
    stream INTEGER NOT NULL,
    latency_ms INTEGER NOT NULL,
    at_ms INTEGER NOT NULL,
    error TEXT,
    http_status INTEGER NOT NULL
);
CREATE INDEX entries_by_tenant ON entries (tenant, at_ms);
CREATE INDEX entries_by_request ON entries (request_id);
"""

# What each tenant paid per UTC day since 1970: a sum over entries, kept so that a month of millions
# of them is read as 31 rows. It is written in the transaction of the entries that it sums.
SCHEMA_DAYS = """
CREATE TABLE days (
    tenant TEXT NOT NULL,
    day INTEGER NOT NULL,
    cost_nano INTEGER NOT NULL,
    PRIMARY KEY (tenant, day)
) WITHOUT ROWID;
"""

# Every name in the SQL of this file is written here; every value is bound.
# ruff: noqa: S608

# Only a known id is passed over: OR IGNORE would also swallow a row that breaks another constraint.
INSERT = (
    f"INSERT INTO entries ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
    " ON CONFLICT (id) DO NOTHING"
)

ADD_TO_DAYS = f"""
INSERT INTO days (tenant, day, cost_nano)
SELECT tenant, at_ms / {DAY_MS} AS day, SUM(cost_nano) FROM entries
WHERE rowid > ? AND status = 'posted' GROUP BY tenant, day
ON CONFLICT (tenant, day) DO UPDATE SET cost_nano = cost_nano + excluded.cost_nano
"""

SELECT_LAST = "SELECT COALESCE(MAX(rowid), 0) FROM entries"
SELECT_NUMBER = "SELECT rowid FROM entries WHERE id = ?"
SELECT_DAYS = "SELECT day, cost_nano FROM days WHERE tenant = ? AND day >= ? AND day < ?"
SELECT_MINUTES = f"""
SELECT MAX(0, ?1 - at_ms) / {MINUTE_MS} AS age, SUM(status != 'hit'), SUM(status = 'hit')
FROM entries
WHERE tenant = ?2 AND at_ms > ?1 - {MINUTES_TOLD * MINUTE_MS}
AND at_ms < ?1 + {MINUTES_TOLD * MINUTE_MS} AND attempt = 1 AND status != 'refused'
GROUP BY age ORDER BY age
"""

SELECT_REQUEST = f"SELECT {', '.join(COLUMNS)} FROM entries WHERE request_id = ? ORDER BY rowid"

_SERVED = f"status IN ({', '.join(repr(status) for status in SERVED)}) AND error IS NULL"

# `policy.count`, in SQL.
_SUMS = {
    "requests": "attempt = 1",
    "succeeded": _SERVED,
    "refused": "status = 'refused'",
    "hits": "status = 'hit'",
    "joined": "status = 'joined'",
    "entries": "1",
    "prompt_tokens": "prompt_tokens * (status = 'posted')",
    "completion_tokens": "completion_tokens * (status = 'posted')",
    "cost_nano": "cost_nano * (status = 'posted')",
    "unpriced": "unpriced",
    "estimated": "estimated",
    "latency_ms": f"latency_ms * ({_SERVED})",
}
SELECT_SUMS = ", ".join(f"COALESCE(SUM({_SUMS[name]}), 0)" for name in SUMS)

GROUP_COLUMNS: dict[GroupBy, str] = {
    "model": "model",
    "tenant": "tenant",
    "day": "strftime('%Y-%m-%d', at_ms / 1000, 'unixepoch')",
}


class SqliteStore:
    """Owns the database file. Bounded by the disk.

    Every method blocks, and all are called by the same thread. `append` has returned only when the
    rows are on disk (WAL, `synchronous=FULL`). Failures are StoreFailed, sqlite3.Error or OSError;
    after one the caller calls `close`, and the next use opens the file anew, so that nothing is
    decided on pages that an fsync failed to write.

    Entries are numbered from 1 in the order they are stored (`rowid`) and are never deleted. Since
    a read sees whole transactions only, one that knows number n knows every message whose last
    entry is numbered n or less, and nothing of any other message.
    """

    def __init__(self, path: str | None, clock: Clock, lock_wait_s: float) -> None:
        self.path = path
        self._lock_wait_s = lock_wait_s
        self._lock = FileLock(path, clock) if path is not None else None
        self._connection: sqlite3.Connection | None = None

    @property
    def connection(self) -> sqlite3.Connection:
        """The open connection, opening it first where needed."""
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def _open(self) -> sqlite3.Connection:
        if self.path is not None and self._lock is not None:
            Path(self.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                self._lock.acquire(self._lock_wait_s)
            except FileLocked as error:
                raise StoreFailed(
                    f"{error}: a ledger file has one owner. Stop that system, or give this one"
                    " another ledger_url"
                ) from None
        connection: sqlite3.Connection | None = None
        try:
            connection = sqlite3.connect(self.path or ":memory:", isolation_level=None)
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            _ensure_schema(connection)
        except BaseException:
            if connection is not None:
                connection.close()
            if self._lock is not None:
                self._lock.release()
            raise
        return connection

    def close(self) -> None:
        """Safe to call twice. An in-memory store loses everything."""
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                connection.close()
        finally:
            if self._lock is not None:
                self._lock.release()

    def append(self, messages: Sequence[Sequence[Entry]]) -> tuple[int, list[int]]:
        """All of them or none. Returns how many entries were new, and a commit for each message.

        The commit is the number of the last of all entries now, or, where some of the message's
        were known before, that of the message's own last one: a read may have been between. An
        empty message gets the former.
        """
        connection = self.connection
        connection.execute("BEGIN IMMEDIATE")
        try:
            before, new = self.last(), [self._insert(entries) for entries in messages]
            last = self.last()
            connection.execute(ADD_TO_DAYS, (before,))
            commits = [
                last if count == len(entries) else self._last_of(entries)
                for entries, count in zip(messages, new, strict=True)
            ]
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        return sum(new), commits

    def _insert(self, entries: Sequence[Entry]) -> int:
        before = self.connection.total_changes
        self.connection.executemany(INSERT, map(_row, entries))
        return self.connection.total_changes - before

    def _last_of(self, entries: Sequence[Entry]) -> int:
        ids = [(_clean(entry.id),) for entry in entries]
        return max(int(self.connection.execute(SELECT_NUMBER, id_).fetchone()[0]) for id_ in ids)

    def last(self) -> int:
        """The number of the last entry, 0 if there is none."""
        return int(self.connection.execute(SELECT_LAST).fetchone()[0])

    def count(self) -> int:
        row = self.connection.execute("SELECT COUNT(*) FROM entries").fetchone()
        return int(row[0])

    def entries(self, request_id: str) -> list[Entry]:
        """The entries of one request id, in the order they were appended."""
        rows = self.connection.execute(SELECT_REQUEST, (_clean(request_id),))
        return [_entry(row) for row in rows]

    def spent(self, tenants: Sequence[str], at_ms: int) -> list[Spent]:
        """What each of the tenants had used at `at_ms`, all of the same moment in the ledger."""
        # One connection on one thread: nothing is written between these statements.
        commit, when = self.last(), calendar(at_ms)
        told: list[Spent] = []
        for name in map(_clean, tenants):
            month = (name, when.first_day, when.end_day)
            paid: dict[int, int] = dict(self.connection.execute(SELECT_DAYS, month))
            ages = self.connection.execute(SELECT_MINUTES, (at_ms, name)).fetchall()
            told.append(
                Spent(
                    commit,
                    when.day,
                    paid.get(when.day, 0),
                    when.month,
                    sum(paid.values()),
                    tuple((age, others) for age, others, _ in ages if others),
                    tuple((age, hits) for age, _, hits in ages if hits),
                )
            )
        return told

    def usage(
        self,
        tenant: str | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        group_by: GroupBy | None = None,
    ) -> dict[str, Any]:
        """Totals over `since_ms <= at_ms < until_ms`, with `by_model` and what else is asked."""
        where, values = _where(tenant, since_ms, until_ms)
        total = self._totals(where, values)
        groups: list[GroupBy] = ["model"] if group_by in (None, "model") else ["model", group_by]
        answer = total.as_dict()
        for group in groups:
            parts = self._grouped(group, where, values)
            rest = total - sum(parts.values(), Totals())
            if rest != Totals():
                parts[OTHERS] = rest
            answer[f"by_{group}"] = {name: part.as_dict() for name, part in parts.items()}
        return answer

    def _totals(self, where: str, values: list[Any]) -> Totals:
        sql = f"SELECT {SELECT_SUMS} FROM entries {where}"
        return Totals(*self.connection.execute(sql, values).fetchone())

    def _grouped(self, group: GroupBy, where: str, values: list[Any]) -> dict[str, Totals]:
        sql = (
            f"SELECT {GROUP_COLUMNS[group]} AS grp, {SELECT_SUMS} FROM entries {where}"
            f" GROUP BY grp ORDER BY COUNT(*) DESC, grp LIMIT {GROUPS_MAX}"
        )
        rows = self.connection.execute(sql, values).fetchall()
        return {row[0]: Totals(*row[1:]) for row in sorted(rows)}


def _ensure_schema(connection: sqlite3.Connection) -> None:
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version == SCHEMA_VERSION:
        return
    if version == 1:
        upgrade = f"{SCHEMA_DAYS} {ADD_TO_DAYS.replace('?', '0')};"
        connection.executescript(
            f"BEGIN; {upgrade} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
        )
        return
    if version != 0 or connection.execute("SELECT 1 FROM sqlite_master").fetchone() is not None:
        raise StoreFailed(
            f"the file is not a ledger of version {SCHEMA_VERSION} (it says {version}); it was left"
            " as it is"
        )
    connection.executescript(
        f"BEGIN; {SCHEMA} {SCHEMA_DAYS} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"
    )


def _where(tenant: str | None, since_ms: int | None, until_ms: int | None) -> tuple[str, list[Any]]:
    terms = [
        ("tenant = ?", None if tenant is None else _clean(tenant)),
        ("at_ms >= ?", since_ms),
        ("at_ms < ?", until_ms),
    ]
    asked = [(sql, value) for sql, value in terms if value is not None]
    clause = " AND ".join(sql for sql, _ in asked)
    return (f"WHERE {clause}" if clause else ""), [value for _, value in asked]


def _clean(text: str) -> str:
    """SQLite stores UTF-8, which has no form for the lone surrogates that JSON lets through."""
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


def _row(entry: Entry) -> tuple[Any, ...]:
    return tuple(_clean(value) if type(value) is str else value for value in entry.values())


def _entry(row: Sequence[Any]) -> Entry:
    entry = dict(zip(COLUMNS, row, strict=True))
    for name in ("unpriced", "estimated", "stream"):
        entry[name] = bool(entry[name])
    return Entry(**entry)
