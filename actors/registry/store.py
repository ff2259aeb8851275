"""The versions on disk, in SQLite. Everything here blocks; one thread does all of it.

Rule 1: exactly one connection, in the process that holds the lock (SQLite 3.40 in WAL mode can
        damage a file that two connections checkpoint at the same moment).
Rule 2: what was returned is on disk: WAL with `synchronous=FULL` syncs at each commit.
Rule 3: after an error the connection is given up, and the next use opens the file anew: what is
        in memory after a failed fsync is not what is on disk.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from actors.file_lock import FileLock, FileLocked
from actors.ref import Clock
from actors.registry.policy import (
    LOCK_WAIT_S,
    NOTE_CHARS_MAX,
    PUTS_MAX,
    VERSIONS_MAX,
    Head,
    RegistryUnavailable,
    Version,
    VersionConflict,
    digest,
)

FORMAT = 1  # SQLite's user_version
MEMORY = ":memory:"

SCHEMA = f"""
BEGIN;
CREATE TABLE versions (
    version  INTEGER PRIMARY KEY,
    at_ms    INTEGER NOT NULL,
    note     TEXT NOT NULL,
    digest   TEXT NOT NULL,
    document TEXT NOT NULL
);
CREATE TABLE puts (
    number  INTEGER PRIMARY KEY,
    id      TEXT NOT NULL UNIQUE,
    version INTEGER NOT NULL
);
PRAGMA user_version = {FORMAT};
COMMIT;
"""


class Store:
    """Versions in one file, or in memory when `path` is None.

    Owns: the file, its lock, the connection. Bounds: `VERSIONS_MAX` versions and `PUTS_MAX` put
    ids, the oldest forgotten first.
    Failure behaviour: the file is opened on first use, and again after an error. Every failure of
    the file is a `RegistryUnavailable` that says what is wrong with it.
    """

    def __init__(
        self,
        path: str | None,
        clock: Clock = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        self.path = MEMORY if path is None else os.path.abspath(os.path.expanduser(path))
        self._lock = None if path is None else FileLock(self.path, clock, pause)
        self._lock_wait_s = lock_wait_s
        self._locked = False
        self._connection: sqlite3.Connection | None = None

    def head(self) -> Head:
        """The newest version."""
        with self._opened() as connection:
            return _head(connection)

    def put(
        self, text: str, note: str, expected: int | None, put_id: str, at_ms: int
    ) -> tuple[int, Head]:
        """Store canonical JSON as the next version; returns the put's version and the newest one.

        A put id that is known, or a document equal to the newest, stores nothing.

        Raises:
            VersionConflict: neither is the case, and `expected` is not the newest version.
        """
        with self._opened() as connection, _transaction(connection):
            head = _head(connection)
            known = connection.execute("SELECT version FROM puts WHERE id = ?", (put_id,))
            if put_id and (row := known.fetchone()):
                return int(row[0]), head
            if head.version == 0 or head.text != text:
                if expected is not None and expected != head.version:
                    raise VersionConflict(expected, head.version)
                head = Head(head.version + 1, text)
                _insert(connection, head, note[:NOTE_CHARS_MAX], at_ms)
            if put_id:
                _remember(connection, put_id, head.version)
            return head.version, head

    def history(self, limit: int) -> list[Version]:
        """The newest versions, newest first."""
        with self._opened() as connection:
            rows = connection.execute(
                "SELECT version, at_ms, note, digest FROM versions ORDER BY version DESC LIMIT ?",
                (max(0, min(limit, VERSIONS_MAX)),),
            )
            return [Version(*row) for row in rows]

    def close(self) -> None:
        """Close the file and let go of the lock."""
        self._disconnect()
        if self._lock is not None:
            self._lock.release()
        self._locked = False

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        try:
            if self._connection is None:
                self._open()
            assert self._connection is not None
            yield self._connection
        except FileLocked as error:
            hint = "stop the system that has it, or use another data directory"
            raise RegistryUnavailable(self.path, f"{error}; {hint}") from None
        except (sqlite3.Error, OSError) as error:
            if self._lock is not None:  # what is in memory would be lost, and has no such errors
                self._disconnect()
            raise RegistryUnavailable(self.path, str(error)) from error

    def _open(self) -> None:
        if self._lock is not None and not self._locked:
            Path(self.path).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock.acquire(self._lock_wait_s)
            self._locked = True
        if self._lock is not None:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        # Its user is one thread, but closing may come from another after that one has ended.
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            found = connection.execute("PRAGMA user_version").fetchone()[0]
            if found == 0:
                connection.executescript(SCHEMA)
            elif found != FORMAT:
                raise sqlite3.DatabaseError(f"its format is {found}, this Forebay reads {FORMAT}")
        except sqlite3.Error:
            connection.close()
            raise
        self._connection = connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _head(connection: sqlite3.Connection) -> Head:
    rows = connection.execute(
        "SELECT version, document FROM versions ORDER BY version DESC LIMIT 1"
    )
    row = rows.fetchone()
    return Head(*row) if row else Head()


def _insert(connection: sqlite3.Connection, head: Head, note: str, at_ms: int) -> None:
    connection.execute(
        "INSERT INTO versions (version, at_ms, note, digest, document) VALUES (?, ?, ?, ?, ?)",
        (head.version, at_ms, note, digest(head.text), head.text),
    )
    connection.execute("DELETE FROM versions WHERE version <= ?", (head.version - VERSIONS_MAX,))


def _remember(connection: sqlite3.Connection, put_id: str, version: int) -> None:
    number = connection.execute(
        "INSERT INTO puts (id, version) VALUES (?, ?)", (put_id, version)
    ).lastrowid
    connection.execute("DELETE FROM puts WHERE number <= ?", ((number or 0) - PUTS_MAX,))
