"""A disk for SQLite that loses what was not synced, fills up, and fails: a VFS between the two.

The `sqlite3` module of this process is used as it is; the shim is put under its library (a
`sqlite3_vfs` that hands everything to the usual one) and sees each write and each sync of each
file. What it has seen tells what a machine would find after a power cut at any moment.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import random
import sqlite3
from ctypes import CFUNCTYPE, POINTER, c_char_p, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

SECTOR = 512
_FULL, _IOERR_FSYNC = 13, 10 | 4 << 8

# Names are pointers: SQLite keeps the one it gives to xOpen for as long as the file is open.
_OPEN = CFUNCTYPE(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_DELETE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int)
_CLOSE = CFUNCTYPE(c_int, c_void_p)
_WRITE = CFUNCTYPE(c_int, c_void_p, c_void_p, c_int, c_int64)
_TRUNCATE = CFUNCTYPE(c_int, c_void_p, c_int64)
_SYNC = CFUNCTYPE(c_int, c_void_p, c_int)


class _Vfs(ctypes.Structure):
    _fields_ = [
        ("iVersion", c_int),
        ("szOsFile", c_int),
        ("mxPathname", c_int),
        ("pNext", c_void_p),
        ("zName", c_char_p),
        ("pAppData", c_void_p),
        ("xOpen", _OPEN),
        ("xDelete", _DELETE),
        ("rest", c_void_p * 14),
    ]


class _Methods(ctypes.Structure):
    _fields_ = [
        ("iVersion", c_int),
        ("xClose", _CLOSE),
        ("xRead", c_void_p),
        ("xWrite", _WRITE),
        ("xTruncate", _TRUNCATE),
        ("xSync", _SYNC),
        ("rest", c_void_p * 13),
    ]


@dataclass(frozen=True, slots=True)
class Write:
    at: int
    data: bytes

    def into(self, content: bytearray) -> None:
        if len(content) < self.at:
            content.extend(bytes(self.at - len(content)))
        content[self.at : self.at + len(self.data)] = self.data


@dataclass(frozen=True, slots=True)
class Cut:
    """The file ends here from now on."""

    at: int

    def into(self, content: bytearray) -> None:
        if len(content) < self.at:
            content.extend(bytes(self.at - len(content)))
        del content[self.at :]


@dataclass(slots=True)
class File:
    """What a file is to those who read it, what is on the disk, and what was not synced since."""

    seen: bytearray = field(default_factory=bytearray)
    kept: bytearray = field(default_factory=bytearray)
    waiting: list[Write | Cut] = field(default_factory=list)

    def change(self, what: Write | Cut) -> None:
        what.into(self.seen)
        self.waiting.append(what)

    def sync(self, works: bool) -> None:
        """Linux forgets what a failed sync should have written: a later one is content without."""
        if works:
            for what in self.waiting:
                what.into(self.kept)
        self.waiting = []

    def power_cut(self, rng: random.Random) -> File:
        """Of what was not synced, some is on the disk, some is not, and some in part."""
        left = bytearray(self.kept)
        for what in self.waiting:
            fate = rng.random()
            if fate < 0.4:
                what.into(left)
            elif fate < 0.6 and isinstance(what, Write):
                for start in range(0, len(what.data), SECTOR):
                    if rng.random() < 0.5:
                        Write(what.at + start, what.data[start : start + SECTOR]).into(left)
        return File(bytearray(left), left)

    def copy(self) -> File:
        return File(bytearray(self.seen), bytearray(self.kept), list(self.waiting))


State = dict[str, File]
Event = tuple[str, str, Any]


class Disk:
    """What SQLite does to its files inside the `with`, one event after another, by file name.

    `before` is how the disk was. `full` refuses writes, `broken` fails syncs. Without `keeps`,
    syncs are counted and nothing else is remembered.
    """

    def __init__(self, before: State | None = None, *, keeps: bool = True) -> None:
        self._before = before or {}
        self._keeps = keeps
        self.events: list[Event] = []
        self.full = False
        self.broken = False
        self.syncs = 0
        self._names: dict[int, str] = {}
        self._methods: list[_Methods] = []
        self._library = _library()
        self._usual = self._library.sqlite3_vfs_find(None)

    def state(self, events: int | None = None) -> State:
        """How the disk is after so many events: nothing else is known of it."""
        files = {name: file.copy() for name, file in self._before.items()}
        for kind, name, what in self.events[:events]:
            if kind == "delete":
                files.pop(name, None)
            elif kind == "sync":
                files.setdefault(name, File()).sync(what)
            else:
                files.setdefault(name, File()).change(what)
        return files

    def __enter__(self) -> Self:
        usual = self._usual.contents
        ours = _Vfs.from_buffer_copy(usual)
        ours.zName = b"forebay-failing-disk"
        ours.xOpen, ours.xDelete = _OPEN(self._open), _DELETE(self._delete)
        self._ours = ours
        self._usual_delete, self._usual_open = usual.xDelete, usual.xOpen
        assert self._library.sqlite3_vfs_register(ctypes.byref(ours), 1) == 0
        return self

    def __exit__(self, *_: object) -> None:
        self._library.sqlite3_vfs_register(self._usual, 1)
        self._library.sqlite3_vfs_unregister(ctypes.byref(self._ours))

    def _open(self, vfs: int, name: int | None, file: int, flags: int, out: int) -> int:
        result = int(self._usual_open(ctypes.cast(self._usual, c_void_p), name, file, flags, out))
        pointer = ctypes.cast(file, POINTER(POINTER(_Methods)))
        if result != 0 or not name or not pointer.contents:
            return result
        self._names[file] = _file_name(name)
        usual = pointer.contents.contents
        ours = _Methods.from_buffer_copy(usual)
        write, truncate, sync, close = usual.xWrite, usual.xTruncate, usual.xSync, usual.xClose

        def written(file: int, data: int, size: int, at: int) -> int:
            if self.full:
                return _FULL
            if not self._keeps:
                return int(write(file, data, size, at))
            self.events.append(
                ("write", self._names[file], Write(at, ctypes.string_at(data, size)))
            )
            return int(write(file, data, size, at))

        def truncated(file: int, at: int) -> int:
            self.events.append(("cut", self._names[file], Cut(at)))
            return int(truncate(file, at))

        def synced(file: int, flags: int) -> int:
            self.syncs += 1
            self.events.append(("sync", self._names[file], not self.broken))
            return _IOERR_FSYNC if self.broken else int(sync(file, flags))

        def closed(file: int) -> int:
            self._names.pop(file, None)
            return int(close(file))

        ours.xWrite, ours.xTruncate = _WRITE(written), _TRUNCATE(truncated)
        ours.xSync, ours.xClose = _SYNC(synced), _CLOSE(closed)
        self._methods.append(ours)
        pointer[0] = ctypes.pointer(ours)
        return 0

    def _delete(self, vfs: int, name: int, sync: int) -> int:
        self.events.append(("delete", _file_name(name), None))
        return int(self._usual_delete(ctypes.cast(self._usual, c_void_p), name, sync))


def lay_out(state: State, directory: Path) -> None:
    """Write the files as they are seen into an empty directory."""
    for name, file in state.items():
        (directory / name).write_bytes(file.seen)


def is_whole(path: Path) -> str:
    """SQLite's own word about a database file: "ok" if it is in order."""
    connection = sqlite3.connect(path)
    try:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])
    finally:
        connection.close()


def _file_name(name: int) -> str:
    return Path(ctypes.string_at(name).decode()).name


def _library() -> Any:
    """The SQLite that Python's own module uses."""
    library = ctypes.CDLL(getattr(_sqlite3, "__file__", None))
    library.sqlite3_vfs_find.restype = POINTER(_Vfs)
    library.sqlite3_vfs_find.argtypes = [c_char_p]
    library.sqlite3_vfs_register.argtypes = [c_void_p, c_int]
    library.sqlite3_vfs_unregister.argtypes = [c_void_p]
    return library
