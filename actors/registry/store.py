"""What the Registry keeps, on disk, in SQLite. Everything here blocks; one thread does all of it.

Rule 1: exactly one connection, in the process that holds the lock (SQLite 3.40 in WAL mode can
        damage a file that two connections checkpoint at the same moment).
Rule 2: what was returned is on disk: WAL with `synchronous=FULL` syncs at each commit.
Rule 3: after an error the connection is given up, and the next use opens the file anew: what is
        in memory after a failed fsync is not what is on disk.
Rule 4: who only reads holds the lock too, for that long (see rule 1), and writes nothing.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from actors.file_lock import FileLock, FileLocked
from actors.ref import Clock
from actors.registry.policy import (
    LOCK_WAIT_S,
    NOTE_CHARS_MAX,
    OPS_MAX,
    PUTS_MAX,
    READ_WAIT_S,
    VERSIONS_MAX,
    Access,
    Head,
    KeyRecord,
    RegistryUnavailable,
    Revocation,
    TenantRecord,
    Version,
    VersionConflict,
    canonical,
    digest,
)

MEMORY = ":memory:"

# From each format to the next. A step that files in the field have gone through never changes.
STEPS = (
    """
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
""",
    """
CREATE TABLE access (
    one     INTEGER PRIMARY KEY CHECK (one = 1),
    version INTEGER NOT NULL
);
INSERT INTO access (one, version) VALUES (1, 0);
CREATE TABLE keys (
    number     INTEGER PRIMARY KEY,
    hash       TEXT NOT NULL UNIQUE,
    tenant     TEXT NOT NULL,
    id         TEXT NOT NULL,
    admin      INTEGER NOT NULL,
    created_ms INTEGER NOT NULL,
    UNIQUE (tenant, id)
);
CREATE TABLE tenants (
    number   INTEGER PRIMARY KEY,
    id       TEXT NOT NULL UNIQUE,
    settings TEXT NOT NULL
);
CREATE TABLE revocations (
    number INTEGER PRIMARY KEY,
    hash   TEXT NOT NULL UNIQUE,
    tenant TEXT NOT NULL,
    id     TEXT NOT NULL,
    at_ms  INTEGER NOT NULL
);
CREATE TABLE ops (
    number  INTEGER PRIMARY KEY,
    id      TEXT NOT NULL UNIQUE,
    version INTEGER NOT NULL
);
""",
    """
CREATE TABLE sums (
    number  INTEGER PRIMARY KEY,
    process TEXT NOT NULL UNIQUE,
    words   INTEGER NOT NULL,
    counts  TEXT NOT NULL
);
""",
)
FORMAT = len(STEPS)  # SQLite's user_version


def read_access(path: str, wait_s: float = READ_WAIT_S) -> Access | None:
    """The access in the file of a system that does not run; None when there is no file.

    Holds the owner's lock while it reads and writes nothing: a file of an older format stays one.

    Raises:
        RegistryUnavailable: a running system has the file, or it cannot be read.
    """
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.exists(path):
        return None
    lock = FileLock(path)
    try:
        lock.acquire(wait_s)
        try:
            return _read_access(path)
        finally:
            lock.release()
    except FileLocked as error:
        raise RegistryUnavailable(path, f"{error}: the system runs, so ask it instead") from None
    except (sqlite3.Error, OSError) as error:
        raise RegistryUnavailable(path, str(error)) from error


class Store:
    """Versions and the access in one file, or in memory when `path` is None.

    Owns: the file, its lock, the connection, and the access as that connection has it. Bounds:
    `VERSIONS_MAX` versions, `PUTS_MAX` put ids and `OPS_MAX` ids of changes of the access, the
    oldest forgotten first; `Access` bounds itself.
    Failure behaviour: the file is opened on first use, and again after an error. Every failure of
    the file is a `RegistryUnavailable` that says what is wrong with it. A file of an older format
    is brought up to this one, each step wholly or not at all; one of a later format is refused.
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
        self._access: Access | None = None

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

    def access(self) -> Access:
        """The newest access."""
        with self._opened() as connection:
            return self._newest(connection)

    def add_key(
        self, record: KeyRecord, tenant: TenantRecord | None, op_id: str
    ) -> tuple[int, Access]:
        """Store a key, and its tenant's settings; the op's version and the newest access.

        An op id that is known stores nothing.

        Raises:
            KeyExists, RegistryFull: see `Access.with_key`.
        """
        return self._change(
            op_id,
            lambda access: access.with_key(record, tenant),
            lambda connection: _give(connection, record, tenant),
        )

    def revoke_key(self, revocation: Revocation, op_id: str) -> tuple[int, Access]:
        """Store that a key is revoked; the op's version and the newest access.

        An op id that is known, or a hash that is revoked, stores nothing new.

        Raises:
            RegistryFull: see `Access.without_key`.
        """
        return self._change(
            op_id,
            lambda access: access.without_key(revocation),
            lambda connection: _take_away(connection, revocation),
        )

    def sums(self) -> list[tuple[str, int, str]]:
        """What `keep_sums` kept, the oldest first."""
        with self._opened() as connection:
            return list(
                connection.execute("SELECT process, words, counts FROM sums ORDER BY number")
            )

    def keep_sums(self, rows: list[tuple[str, int, str]], gone: list[str]) -> None:
        """Keep rows in place of those of their names, and those of `gone` no longer."""
        with self._opened() as connection, _transaction(connection):
            connection.executemany(
                "INSERT OR REPLACE INTO sums (process, words, counts) VALUES (?, ?, ?)", rows
            )
            connection.executemany("DELETE FROM sums WHERE process = ?", [(name,) for name in gone])

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

    def _newest(self, connection: sqlite3.Connection) -> Access:
        if self._access is None:
            self._access = _access(connection)
        return self._access

    def _change(
        self,
        op_id: str,
        decide: Callable[[Access], Access],
        write: Callable[[sqlite3.Connection], None],
    ) -> tuple[int, Access]:
        with self._opened() as connection:
            access = self._newest(connection)
            with _transaction(connection):
                known = connection.execute("SELECT version FROM ops WHERE id = ?", (op_id,))
                if op_id and (row := known.fetchone()):
                    return int(row[0]), access
                after = decide(access)
                if after is not access:
                    write(connection)
                    connection.execute("UPDATE access SET version = ?", (after.version,))
                if op_id:
                    _remember_op(connection, op_id, after.version)
            self._access = after
            return after.version, after

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
            for step in range(_format(connection), FORMAT):
                connection.executescript(
                    f"BEGIN; {STEPS[step]} PRAGMA user_version = {step + 1}; COMMIT;"
                )
        except sqlite3.Error:
            connection.close()
            raise
        self._connection = connection

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        self._access = None
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


def _read_access(path: str) -> Access:
    # What an owner that was killed left is in the log beside the file. Without one, a connection
    # that takes the file for immutable makes no files of its own.
    log = f"{path}-wal"
    killed = os.path.exists(log) and os.path.getsize(log) > 0
    mode = "mode=ro" if killed else "mode=ro&immutable=1"
    with closing(sqlite3.connect(f"{Path(path).as_uri()}?{mode}", uri=True)) as connection:
        return Access() if _format(connection) < 2 else _access(connection)


def _format(connection: sqlite3.Connection) -> int:
    found = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if not 0 <= found <= FORMAT:
        raise sqlite3.DatabaseError(f"its format is {found}, this Forebay reads {FORMAT}")
    return found


def _access(connection: sqlite3.Connection) -> Access:
    version = connection.execute("SELECT version FROM access").fetchone()[0]
    keys = connection.execute(
        "SELECT id, tenant, hash, admin, created_ms FROM keys ORDER BY number"
    )
    tenants = connection.execute("SELECT id, settings FROM tenants ORDER BY number")
    revoked = connection.execute("SELECT id, tenant, hash, at_ms FROM revocations ORDER BY number")
    return Access(
        int(version),
        {row[2]: KeyRecord(row[0], row[1], row[2], bool(row[3]), row[4]) for row in keys},
        {row[0]: TenantRecord(row[0], json.loads(row[1])) for row in tenants},
        {row[2]: Revocation(*row) for row in revoked},
    )


def _give(connection: sqlite3.Connection, record: KeyRecord, tenant: TenantRecord | None) -> None:
    connection.execute(
        "INSERT INTO keys (id, tenant, hash, admin, created_ms) VALUES (?, ?, ?, ?, ?)",
        (record.id, record.tenant, record.hash, record.admin, record.created_ms),
    )
    if tenant is not None:
        connection.execute(
            "INSERT INTO tenants (id, settings) VALUES (?, ?) "
            "ON CONFLICT (id) DO UPDATE SET settings = excluded.settings",
            (tenant.id, canonical(tenant.settings)),
        )


def _take_away(connection: sqlite3.Connection, revocation: Revocation) -> None:
    connection.execute("DELETE FROM keys WHERE hash = ?", (revocation.hash,))
    connection.execute(
        "INSERT INTO revocations (id, tenant, hash, at_ms) VALUES (?, ?, ?, ?)",
        (revocation.id, revocation.tenant, revocation.hash, revocation.at_ms),
    )


def _remember_op(connection: sqlite3.Connection, op_id: str, version: int) -> None:
    number = connection.execute(
        "INSERT INTO ops (id, version) VALUES (?, ?)", (op_id, version)
    ).lastrowid
    connection.execute("DELETE FROM ops WHERE number <= ?", ((number or 0) - OPS_MAX,))
