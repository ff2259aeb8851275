"""Where a ledger is kept: one connection to it, and the right to be its only owner.

Rule 1: a commit on the connection that `open` returns has returned only when it is durable.
Rule 2: whoever has not that right gets no connection, and the message names who has.
Rule 3: what may hold a password is asked for when it is needed, and is in no message.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from sqlalchemy import URL, Connection, Engine, Row, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from actors.file_lock import FileLock, FileLocked
from actors.ledger.policy import StoreFailed
from actors.ref import Clock

CACHE_KIB = 32 * 1024
"""What SQLite keeps of the file in memory. Ids lie anywhere in their index, so a commit of hundreds
of entries changes hundreds of pages; what does not fit is written and read again before it ends."""
LOG_PAGES = 8_000
"""The write-ahead log goes into the file when it has so many pages (32 MB), and a page that many
commits have changed goes there once. Who opens the file after a crash reads all of the log."""
PAUSE_S = 0.05
CONNECT_TIMEOUT_S = 5
SILENCE_MAX_MS = 10_000
"""A server that does not acknowledge what was sent for so long is taken for gone, and a statement
that waits so long for somebody else's lock fails."""


class Place(Protocol):
    """One connection at a time. `durable`: what was committed survives `close`."""

    durable: bool

    @property
    def name(self) -> str:
        """Where it is, without a password."""

    def open(self) -> Connection:
        """Raises StoreFailed, SQLAlchemyError or OSError."""

    def close(self) -> None:
        """Safe to call twice."""


def reason(error: BaseException) -> str:
    """An error in one line, without the statement and what was bound to it."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        error = error.orig
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"


class SqlitePlace:
    """A file, or memory where `path` is None.

    SQLite up to 3.51.2 can corrupt a WAL file that two connections write to, so there is exactly
    one, and a lock file beside the database keeps a second system out.
    """

    def __init__(
        self, path: str | None, clock: Clock = time.monotonic, lock_wait_s: float = 0.0
    ) -> None:
        self._path = path
        self._lock_wait_s = lock_wait_s
        self._lock = None if path is None else FileLock(path, clock)
        self._connection: Connection | None = None
        self.durable = path is not None

    @property
    def name(self) -> str:
        return self._path or "memory"

    def open(self) -> Connection:
        if self._lock is None:
            self._connection = self._engine().connect()
            return self._connection
        assert self._path is not None, "what has a lock has a path"
        Path(self._path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            self._lock.acquire(self._lock_wait_s)
        except FileLocked as error:
            raise StoreFailed(
                f"{error}: a ledger has one owner. Stop that system, or give this one another"
                " ledger_url"
            ) from None
        try:
            # It holds answers and what people say of them; its log takes its mode.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = self._engine().connect()
            self._make_durable(self._connection)
        except BaseException:
            self.close()
            raise
        return self._connection

    def _engine(self) -> Engine:
        url = URL.create("sqlite", database=self._path or ":memory:")
        engine = create_engine(
            url, poolclass=NullPool, hide_parameters=True, pool_reset_on_return=None
        )

        @event.listens_for(engine, "connect")
        def connected(connection: Any, record: Any) -> None:
            connection.isolation_level = None  # transactions begin where we say so
            if self._path is not None:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
                connection.execute(f"PRAGMA wal_autocheckpoint = {LOG_PAGES}")

        @event.listens_for(engine, "begin")
        def begun(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

        return engine

    def _make_durable(self, connection: Connection) -> None:
        """See to it that what can be read is on the disk, and not in the system's memory alone.

        A process that ends, or a disk that fails, between writing a commit and syncing it leaves
        one that the next owner reads, and would acknowledge when it is sent again. Writing all of
        it to the database file, and syncing that, is what makes it so.
        """
        raw = connection.connection.driver_connection
        assert raw is not None, "the connection is open"
        mode = str(raw.execute("PRAGMA journal_mode").fetchone()[0])
        if mode != "wal":
            raise StoreFailed(
                f"{self._path}: this file system cannot keep a write-ahead log (it says {mode});"
                " give another ledger_url"
            )
        busy = int(raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0])
        if busy:
            raise StoreFailed(f"{self._path} is open elsewhere; end the program that reads it")

    def close(self) -> None:
        connection, self._connection = self._connection, None
        try:
            if connection is not None:
                connection.close()
        finally:
            if self._lock is not None:
                self._lock.release()


class PostgresPlace:
    """A PostgreSQL database, in the first schema of its search path.

    `url` says where, `postgresql://USER:PASSWORD@HOST/DATABASE`, and is asked at each `open`. An
    advisory lock of the session keeps a second system out, so the connection must be a session's
    own: through PgBouncer, session pooling. The server lets go of the lock when the session ends,
    and a session whose lock is gone is gone itself, with what it had not committed.
    """

    durable = True

    def __init__(
        self,
        url: Callable[[], str],
        clock: Clock = time.monotonic,
        lock_wait_s: float = 0.0,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._url = url
        self._clock = clock
        self._lock_wait_s = lock_wait_s
        self._pause = pause
        self._connection: Connection | None = None
        self.name = "postgresql"

    def open(self) -> Connection:
        try:
            url = make_url(self._url())
            if url.get_backend_name() not in ("postgresql", "postgres"):
                raise ArgumentError
        except ArgumentError:
            raise StoreFailed("ledger_url is not a postgresql:// URL") from None
        self.name = f"postgresql://{url.host or 'localhost'}/{url.database or ''}"
        usual = {
            "connect_timeout": CONNECT_TIMEOUT_S,
            "tcp_user_timeout": SILENCE_MAX_MS,
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "application_name": f"forebay ledger, process {os.getpid()} on {socket.gethostname()}",
        }
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            poolclass=NullPool,
            pool_reset_on_return=None,
            hide_parameters=True,
            connect_args={name: usual[name] for name in usual.keys() - url.query.keys()},
        )
        try:
            self._connection = engine.connect()
            self._take(self._connection)
        except BaseException as error:
            self.close()
            if not isinstance(error, SQLAlchemyError):
                raise
            said = reason(error)
            if url.password:
                said = said.replace(str(url.password), "***")
            raise StoreFailed(f"{self.name}: {said}") from None
        return self._connection

    def _take(self, connection: Connection) -> None:
        """The lock, and what makes a commit durable."""
        deadline = self._clock() + self._lock_wait_s
        while True:
            with connection.begin():
                if connection.execute(text(f"SELECT pg_try_advisory_lock({_KEY})")).scalar_one():
                    break
                owner = connection.execute(_OWNER).first()
            if self._clock() >= deadline:
                raise StoreFailed(
                    f"{self.name} is in use by {_told(owner)}: a ledger has one owner. Stop that"
                    " system, or give this one another ledger_url"
                )
            self._pause(PAUSE_S)
        with connection.begin():
            if connection.execute(text("SHOW fsync")).scalar_one() != "on":
                raise StoreFailed(
                    f"{self.name}: the server runs with fsync = off, so nothing it says is durable;"
                    " switch it on"
                )
            connection.execute(
                text(
                    "SELECT set_config('synchronous_commit', 'on', false)"
                    " WHERE current_setting('synchronous_commit') = 'off'"
                )
            )
            connection.execute(
                text("SELECT set_config('lock_timeout', :ms, false)"), {"ms": str(SILENCE_MAX_MS)}
            )

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


# One lock for each schema of a database; the first number is ours alone.
_CLASS = 0x0F0BEBA1
_KEY = f"{_CLASS}, hashtext(current_schema())"
_OWNER = text(
    "SELECT a.application_name, a.pid FROM pg_locks l JOIN pg_stat_activity a USING (pid)"  # noqa: S608
    f" WHERE l.locktype = 'advisory' AND l.granted AND l.classid = {_CLASS}"
    " AND l.objid = (hashtext(current_schema())::bigint & 4294967295)::oid AND l.database ="
    " (SELECT oid FROM pg_database WHERE datname = current_database())"
)


def _told(owner: Row[Any] | None) -> str:
    if owner is None:
        return "somebody"
    said = f" ({owner.application_name})" if owner.application_name else ""
    return f"the session {owner.pid} of the server{said}"
