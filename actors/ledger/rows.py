"""Entries as a database has them, and statements that take them by position.

Rule 1: what is in an index is no longer than PostgreSQL takes, and every text is UTF-8 without NUL.
Rule 2: the statements are SQLAlchemy's own, compiled once. To have it bind the values of each row
        by name costs more than to store them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from operator import itemgetter
from typing import Any

from sqlalchemy import ClauseElement, ColumnElement, Table, insert, select
from sqlalchemy.dialects import postgresql, sqlite

from actors.ledger.policy import COLUMNS, Entry
from actors.ledger.schema import ENTRIES, FLAGS, TEXTS

TEXT_BYTES_MAX = 600
"""Longest text that is part of an index, in UTF-8: one has four of them, and PostgreSQL takes 2,700
bytes."""
INDEXED = frozenset(("request_id", "tenant", "model", "deployment", "route", "response_id"))

Stored = tuple[Any, ...]
"""The values of an entry, in the order of COLUMNS."""
ID, STATUS = COLUMNS.index("id"), COLUMNS.index("status")
_FLAGS = [COLUMNS.index(name) for name in FLAGS]
# All but the one that may be None.
_texts = itemgetter(*(COLUMNS.index(name) for name in COLUMNS if name in TEXTS and name != "error"))

_BY_POSITION: dict[str, Any] = {
    "sqlite": (sqlite.dialect, "qmark"),
    "postgresql": (postgresql.psycopg.dialect, "format"),
}


def clean(text: str) -> str:
    """Databases store UTF-8, which has no form for the lone surrogates that JSON lets through, and
    PostgreSQL has none for NUL."""
    if text.isascii() and "\0" not in text:
        return text
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def indexed(text: str) -> str:
    """The text as it is where it is part of an index."""
    return clean(text).encode()[:TEXT_BYTES_MAX].decode(errors="ignore")


def stored(entry: Entry) -> Stored:
    """The entry as it is stored, in the order of COLUMNS."""
    row: list[Any] = list(entry)
    for at in _FLAGS:
        row[at] = int(row[at])
    # All at once, since nearly always none of them needs anything.
    text = "".join(_texts(entry)) + (entry.error or "")
    if not (len(text) <= TEXT_BYTES_MAX and text.isascii() and "\0" not in text):
        for at, name in enumerate(COLUMNS):
            value = row[at]
            if type(value) is str:
                row[at] = indexed(value) if name in INDEXED else clean(value)
    return tuple(row)


def entry_of(row: Sequence[Any]) -> Entry:
    entry = dict(zip(COLUMNS, row, strict=True))
    for name in FLAGS:
        entry[name] = bool(entry[name])
    return Entry(**entry)


def columns_of(table: Table) -> list[ColumnElement[Any]]:
    return [table.c[name] for name in COLUMNS]


@cache
def insert_of(table: Table, dialect: str) -> str:
    """Stores rows of a table, each with its values in the order of the table's columns."""
    return _by_position(insert(table), dialect)


@cache
def numbers_of(count: int, dialect: str) -> str:
    """Finds id and number of the entries that have one of so many ids."""
    of = select(ENTRIES.c.id, ENTRIES.c.number).where(ENTRIES.c.id.in_([""] * count))
    return _by_position(of, dialect)


def _by_position(statement: ClauseElement, dialect: str) -> str:
    """The statement as the driver takes it, with its values in order."""
    make, style = _BY_POSITION[dialect]
    by_position = make(paramstyle=style)
    return str(statement.compile(dialect=by_position, compile_kwargs={"render_postcompile": True}))
