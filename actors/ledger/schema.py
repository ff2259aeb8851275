"""The ledger's tables, the same in SQLite and PostgreSQL, and the way to them from older ones.

Rule 1: `ledger_entries` and `ledger_feedback` are the truth and only grow. Everything else is
        derived from them, but for `ledger_opened`, the calls that have no entry yet, and
        `ledger_claims`, what is answered once and kept for a day.
Rule 2: a new version gets a step in `UPGRADES`; a fresh ledger is made by `METADATA` at once.
Rule 3: a flag is 0 or 1, since only PostgreSQL has booleans.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    delete,
    insert,
    inspect,
    literal_column,
    select,
    text,
)

from actors.ledger.policy import COLUMNS, SUMS, StoreFailed

VERSION = 5
METADATA = MetaData()

TEXTS = frozenset(
    ("id", "request_id", "tenant", "route", "model", "deployment", "status", "error")
) | {"price_version", "response_id", "cache_key"}
_NEW_IN_4 = ("response_id", "cache_key")
_DEFAULTS = {**dict.fromkeys(_NEW_IN_4, ""), "cached_tokens": "0"}
FLAGS = ("unpriced", "estimated", "stream")
# In SQLite only INTEGER makes a primary key that is the row's own number.
_NUMBER = BigInteger().with_variant(Integer, "sqlite")


def _columns() -> list[Column[object]]:
    kinds = {**dict.fromkeys(TEXTS, Text), **dict.fromkeys(FLAGS, SmallInteger)}
    return [
        Column(
            name,
            kinds.get(name, BigInteger),
            nullable=name == "error",
            server_default=_DEFAULTS.get(name),
        )
        for name in COLUMNS
    ]


def _sums() -> list[Column[int]]:
    return [Column(name, BigInteger, nullable=False) for name in SUMS]


ENTRIES = Table(
    "ledger_entries",
    METADATA,
    Column("number", _NUMBER, primary_key=True, autoincrement=False),
    *_columns(),
    UniqueConstraint("id", name="ledger_entries_id"),
    Index("ledger_entries_by_tenant", "tenant", "at_ms"),
    Index("ledger_entries_by_time", "at_ms"),
    Index("ledger_entries_by_request", "request_id"),
)
RESPONSES = Index(
    "ledger_entries_by_response",
    ENTRIES.c.response_id,
    sqlite_where=ENTRIES.c.response_id != literal_column("''"),
    postgresql_where=ENTRIES.c.response_id != literal_column("''"),
)
"""Settled entries, numbered from 1 without a gap in the order they became durable."""

OPENED = Table(
    "ledger_opened",
    METADATA,
    *_columns(),
    Column("holder", Text, nullable=False),
    UniqueConstraint("id", name="ledger_opened_id"),
    Index("ledger_opened_by_holder", "holder"),
)
"""Calls whose outcome is not known yet, and who makes them. Settling one takes it out."""

TOTALS = Table(
    "ledger_sums",
    METADATA,
    Column("tenant", Text, primary_key=True),
    Column("day", BigInteger, primary_key=True, autoincrement=False),
    Column("model", Text, primary_key=True),
    Column("deployment", Text, primary_key=True),
    Column("route", Text, primary_key=True),
    *_sums(),
    Index("ledger_sums_by_day", "day"),
)
"""The fold of all entries by tenant, UTC day since 1970, model, deployment and route, written with
the entries."""

CHECKPOINTS = Table(
    "ledger_checkpoints",
    METADATA,
    Column("number", _NUMBER, primary_key=True, autoincrement=False),
    *_sums(),
)
"""The fold of all entries up to a number, so that a start folds only what came later."""

FEEDBACK = Table(
    "ledger_feedback",
    METADATA,
    Column("number", _NUMBER, primary_key=True, autoincrement=False),
    Column("id", Text, nullable=False),
    Column("tenant", Text, nullable=False),
    Column("response_id", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("score", BigInteger),
    Column("content", Text, nullable=False),
    Column("query", Text, nullable=False),
    Column("response", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("deployment", Text, nullable=False),
    Column("cache_key", Text, nullable=False),
    Column("at_ms", BigInteger, nullable=False),
    UniqueConstraint("id", name="ledger_feedback_id"),
    Index("ledger_feedback_by_response", "tenant", "response_id", "number"),
)
"""What tenants think of answers, numbered from 1 in the order it came."""

FEEDBACK_SUMS = Table(
    "ledger_feedback_sums",
    METADATA,
    Column("tenant", Text, primary_key=True),
    Column("model", Text, primary_key=True),
    Column("deployment", Text, primary_key=True),
    Column("type", Text, primary_key=True),
    Column("count", BigInteger, nullable=False),
    Column("rated", BigInteger, nullable=False),
    Column("score", BigInteger, nullable=False),
)
"""The fold of all feedback. `rated` is how many have a score, `score` the sum of those."""

RATINGS = Table(
    "ledger_ratings",
    METADATA,
    Column("deployment", Text, primary_key=True),
    Column("day", BigInteger, primary_key=True, autoincrement=False),
    Column("count", BigInteger, nullable=False),
    Column("score", BigInteger, nullable=False),
)
"""The same by deployment and UTC day, of each response's latest score only: who rates an answer a
hundred times counts once."""

CLAIMS = Table(
    "ledger_claims",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("fingerprint", Text, nullable=False),
    Column("token", Text, nullable=False),
    Column("holder", Text, nullable=False),
    Column("until_ms", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("answer", LargeBinary),
    Index("ledger_claims_by_time", "until_ms"),
)
"""Requests that have a key: who makes the call, and its answer; `size` is 0 until that is there."""

_VERSION = Table("ledger_version", METADATA, Column("version", Integer, nullable=False))


def ensure(connection: Connection) -> None:
    """Bring the tables to VERSION, within the transaction that is open.

    Raises:
        StoreFailed: there is something else, or a ledger of a newer version; it is left alone.
    """
    found = _version_of(connection)
    if found == VERSION:
        return
    if found is None:
        METADATA.create_all(connection)
    elif found in UPGRADES:
        while found != VERSION:
            found = UPGRADES[found](connection)
    else:
        raise StoreFailed(
            f"the ledger is of version {found}, newer than {VERSION}, which this program knows; it"
            " was left as it is: start the newer program"
        )
    connection.execute(delete(_VERSION))
    connection.execute(insert(_VERSION).values(version=VERSION))


def _version_of(connection: Connection) -> int | None:
    """None where there is nothing yet."""
    names = set(inspect(connection).get_table_names())
    if _VERSION.name in names:
        return int(connection.execute(select(_VERSION.c.version)).scalar_one())
    if connection.dialect.name == "sqlite":
        version = int(connection.exec_driver_sql("PRAGMA user_version").scalar_one())
        if version in UPGRADES and "entries" in names:
            return version
        strange = version != 0 or bool(names)
    else:
        strange = not names.isdisjoint(METADATA.tables)
    if strange:
        raise StoreFailed("what is there is not a ledger; it was left as it is")
    return None


def _from_first(connection: Connection) -> int:
    """Versions 1 and 2 were in SQLite only, with the row's own number in no column."""
    METADATA.create_all(connection)
    new = {"price_version", "saved_nano", "tool_calls", "most_nano", "requests", *_DEFAULTS}
    old = ", ".join(name for name in COLUMNS if name not in new)
    connection.execute(
        text(
            "INSERT INTO ledger_entries"  # noqa: S608
            f" (number, {old}, price_version, saved_nano, tool_calls, most_nano, requests)"
            f" SELECT ROW_NUMBER() OVER (ORDER BY rowid), {old}, '', 0, 0, 0, 1"
            " FROM entries ORDER BY rowid"
        )
    )
    connection.execute(text("DROP TABLE entries"))
    connection.execute(text("DROP TABLE IF EXISTS days"))
    connection.execute(text("PRAGMA user_version = 0"))
    return VERSION


def _from_third(connection: Connection) -> int:
    """Entries did not say which answer they were for, and there was no feedback."""
    for table in (ENTRIES, OPENED):
        for name in _NEW_IN_4:
            ddl = f"ALTER TABLE {table.name} ADD COLUMN {name} TEXT NOT NULL DEFAULT ''"
            connection.execute(text(ddl))
    METADATA.create_all(connection)
    RESPONSES.create(connection)
    return 4


def _from_fourth(connection: Connection) -> int:
    """Sums were by tenant, day and model only, and of fewer figures; the store makes them anew.
    Nothing was answered once only."""
    for table in (ENTRIES, OPENED):
        ddl = f"ALTER TABLE {table.name} ADD COLUMN cached_tokens BIGINT NOT NULL DEFAULT '0'"
        connection.execute(text(ddl))
    for derived in (TOTALS, CHECKPOINTS):
        connection.execute(text(f"DROP TABLE {derived.name}"))
    METADATA.create_all(connection)
    return VERSION


UPGRADES: dict[int, Callable[[Connection], int]] = {
    1: _from_first,
    2: _from_first,
    3: _from_third,
    4: _from_fourth,
}
"""By version: what makes it a later one, and says which."""
