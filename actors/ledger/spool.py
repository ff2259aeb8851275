"""What this process has begun and recorded, in a file that outlives it.

Rule 1: a record is in the file before what it tells of happens. The file is mapped into memory, so
        writing one is a copy of bytes without a system call, and the kernel has it from then on,
        however the process ends.
Rule 2: a record counts only if its length and its checksum are right. The first that is not ends
        its segment: what was written before it is kept, what a crash tore is dropped.
Rule 3: a file belongs to whoever holds its `flock`. A process's own is locked before the file has
        the name under which others look for it.
Rule 4: no prompts, no answers, no secrets; mode 0600.

A segment is a head (magic, closed, epoch) and records (length, checksum, kind, count, JSON array).
The checksum is of the array, and seeded with the epoch, so that what a former use of the segment
left is no record. Kind and count are changed in place.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote, unquote

import orjson

from actors.holders import is_dead
from actors.ref import Clock

SEGMENT_BYTES = 256 * 1024
SPOOL_BYTES_MAX = 64 * 1024 * 1024
"""Most bytes of one process's spool: some 200,000 entries that wait for the ledger."""
SEGMENTS_FREE_MAX = 4
"""Empty segments that are kept for what comes next; more are given back to the disk."""
RECORD_BYTES_MAX = 64 * 1024
TEXT_CHARS_MAX = 1_000
"""Each text of a record that would be larger is cut to this."""
NO_ROOM_S = 1.0
"""After the disk has refused space, so long passes before it is asked again."""
SUFFIX = ".spool"
NEW = ".new"

_HEAD = struct.Struct("<4sBxxxI")
_RECORD = struct.Struct("<IIcxxxI")
_COUNT = struct.Struct("<I")
_MAGIC = b"FBS1"
_OPEN, _ENTRY, _DONE = b"o", b"e", b"-"
_KIND_AT, _COUNT_AT = 8, 12


class SpoolFull(Exception):
    """The spool takes no more for now, because of `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Segment:
    """A part of the file that is emptied as a whole. `live` records in it are still needed."""

    __slots__ = ("bytes", "epoch", "index", "live")

    def __init__(self, index: int, mapped: mmap.mmap) -> None:
        self.index = index
        self.bytes = mapped
        self.epoch = 0
        self.live = 0


Place = tuple[Segment, int]
"""Where an open record stands."""


class Spool:
    """Owns one file, made with the first record, in `directory`; its name tells the process.

    `begin` writes what is about to happen, `end` strikes it out, `keep` writes an entry that is to
    be handed in, and `acknowledge` says of the oldest of those that they are durable elsewhere.
    Whoever finds both a beginning and its entry believes the entry, and ids make it harmless that
    something is handed in twice.
    Space is taken from the disk by the segment, before it is written to, and used again when
    nothing in it is needed. Bounded by SPOOL_BYTES_MAX.

    Failure behaviour: without space, because the bound is reached or the disk is full, `begin`
    raises SpoolFull, and `keep` leaves the entry to its caller's memory. A process that ends, in
    whatever way, loses nothing that is in the file. A machine that ends loses what its kernel had
    not written out, some 30 s at the most: nothing is synced here. A forked child must not use it,
    and delays the handing in until it has ended too.
    """

    def __init__(
        self, directory: Path, holder: str, nonce: str, clock: Clock, bytes_max: int | None = None
    ) -> None:
        self.path = directory / f"{quote(holder, safe='')}~{nonce}{SUFFIX}"
        self._clock = clock
        self._segments_max = (SPOOL_BYTES_MAX if bytes_max is None else bytes_max) // SEGMENT_BYTES
        self._file: int | None = None
        self._segments: list[Segment] = []
        self._free: list[Segment] = []
        self._current: Segment | None = None
        self._at = SEGMENT_BYTES
        self._epoch = 0
        self._opened = 0
        # Entries that are not acknowledged, oldest first: [where they are, how many, what has begun
        # and is not struck out]; those that are in memory only are nowhere.
        self._runs: deque[list[Any]] = deque()
        self._refused_s: float | None = None
        self._refused = ""
        self._closed = False

    @property
    def refusal(self) -> str:
        """Why `begin` would raise SpoolFull now; empty if it would not, as far as is known."""
        if self._refused_s is None:
            return ""
        if self._clock() - self._refused_s < NO_ROOM_S and not self._free:
            return self._refused
        self._refused_s = None
        return ""

    @property
    def size_bytes(self) -> int:
        """What the file takes of the disk."""
        return len(self._segments) * SEGMENT_BYTES

    def begin(self, values: Sequence[Any]) -> Place:
        """Writes that something is about to happen. Raises SpoolFull."""
        payload = _packed(values)
        place = self._write(_OPEN, payload)
        if place is None:
            raise SpoolFull(self._refused)
        self._opened += 1
        return place

    def end(self, place: Place) -> None:
        """Strikes out what `begin` wrote: it has become an entry, or nothing at all."""
        if self._closed:
            return
        segment, at = place
        kind = at + _KIND_AT
        segment.bytes[kind : kind + 1] = _DONE
        self._opened -= 1
        segment.live -= 1
        if not segment.live:
            self._emptied(segment)

    def keep(self, values: Sequence[Any], begun: Place | None = None) -> None:
        """Writes an entry that is to be handed in, and strikes out what it is the end of.

        Without room only its caller's memory has it, and what has begun stays as it is until the
        entry is acknowledged.
        """
        place = self._write(_ENTRY, _packed(values))
        runs = self._runs
        if place is None:
            runs.append([None, 1, begun])
            return
        if runs and runs[-1][0] is place[0]:
            runs[-1][1] += 1
        else:
            runs.append([place[0], 1, None])
        if begun is not None:
            self.end(begun)

    def tally(self, values: Sequence[Any]) -> Place | None:
        """Writes an entry that stands for one request and may come to stand for more.

        None if there is no room. It is not among those to acknowledge before `tallied`.
        """
        return self._write(_ENTRY, _packed(values))

    def count(self, place: Place, count: int) -> None:
        """What `tally` wrote stands for so many now."""
        if not self._closed:
            segment, at = place
            at += _COUNT_AT
            segment.bytes[at : at + _COUNT.size] = _COUNT.pack(count)

    def tallied(self, place: Place) -> None:
        """It is whole, and to be handed in."""
        self._runs.append([place[0], 1, None])

    def pass_over(self) -> None:
        """Something is handed in of which the spool need not know."""
        self._runs.append([None, 1, None])

    def acknowledge(self, count: int) -> None:
        """The oldest `count` of the entries are durable elsewhere."""
        while count:
            run = self._runs[0]
            segment, waiting, begun = run
            taken = min(count, waiting)
            run[1] -= taken
            count -= taken
            if not run[1]:
                self._runs.popleft()
            if begun is not None:
                self.end(begun)
            if segment is not None and not self._closed:
                segment.live -= taken
                if not segment.live:
                    self._emptied(segment)

    def close(self) -> None:
        """Removes the file, or leaves it to whoever looks for spools if something is still in it.

        Safe to call twice.
        """
        if self._closed:
            return
        self._closed = True
        if self._file is None:
            return
        if self._opened or any(segment is not None for segment, _, _ in self._runs):
            self._segments[0].bytes[4:5] = b"\1"
        else:
            self.path.unlink(missing_ok=True)
        self._let_go()

    def _let_go(self) -> None:
        for segment in self._segments:
            segment.bytes.close()
        self._segments, self._free, self._current, self._at = [], [], None, SEGMENT_BYTES
        self._refused = f"the spool {self.path} is closed"
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)  # the mappings' own handles held it too
            os.close(self._file)
            self._file = None

    def _write(self, kind: bytes, payload: bytes) -> Place | None:
        at = self._at
        end = at + _RECORD.size + len(payload)
        if end > SEGMENT_BYTES:
            if self._closed or not self._next_segment():
                return None
            at = self._at
            end = at + _RECORD.size + len(payload)
        segment = self._current
        assert segment is not None, "there is one when there is room"
        checksum = zlib.crc32(payload, segment.epoch)
        segment.bytes[at:end] = _RECORD.pack(len(payload), checksum, kind, 1) + payload
        segment.live += 1
        self._at = end
        return segment, at

    def _emptied(self, segment: Segment) -> None:
        if segment is not self._current:
            self._free.append(segment)
            self._shrink()

    def _shrink(self) -> None:
        """Gives the end of the file back, where more of it is empty than is kept."""
        while len(self._free) > SEGMENTS_FREE_MAX and self._segments[-1] in self._free:
            last = self._segments.pop()
            self._free.remove(last)
            last.bytes.close()
            assert self._file is not None, "a mapped file is open"
            os.ftruncate(self._file, self.size_bytes)

    def _next_segment(self) -> bool:
        """Makes an empty segment the current one. False, and why is noted, if there is none."""
        if self._current is not None and not self._current.live:
            self._free.append(self._current)
        if self._free:
            segment = min(self._free, key=lambda one: one.index)  # the file's end comes free
            self._free.remove(segment)
        else:
            new = self._new_segment()
            if new is None:
                return False
            segment = new
        self._current, self._refused_s = segment, None
        self._epoch += 1
        segment.epoch = self._epoch
        segment.bytes[: _HEAD.size] = _HEAD.pack(_MAGIC, 0, self._epoch)
        self._at = _HEAD.size
        self._shrink()
        return True

    def _new_segment(self) -> Segment | None:
        if self.refusal:
            return None
        size = self.size_bytes
        if len(self._segments) >= self._segments_max:
            self._refuse(f"the spool {self.path} has its {size} bytes")
            return None
        try:
            if self._file is None:
                self._create()
            assert self._file is not None, "it was just made"
            # Space that is not there must be an error here, not a signal at the first write.
            os.posix_fallocate(self._file, size, SEGMENT_BYTES)
            mapped = mmap.mmap(self._file, SEGMENT_BYTES, offset=size)
        except OSError as error:
            self._refuse(f"the spool {self.path} cannot grow: {error.strerror or error}")
            return None
        segment = Segment(len(self._segments), mapped)
        self._segments.append(segment)
        return segment

    def _refuse(self, reason: str) -> None:
        self._refused, self._refused_s = reason, self._clock()

    def _create(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        new = self.path.with_suffix(NEW)
        file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.rename(new, self.path)
        except BaseException:
            os.close(file)
            raise
        self._file = file


@dataclass(frozen=True, slots=True)
class Left:
    """What a dead process has left: `opened` are calls without an end, `entries` are to hand in."""

    opened: list[list[Any]]
    entries: list[list[Any]]


class Found:
    """A spool whose process is dead, locked by us. `remove` it when what it holds is durable."""

    def __init__(self, path: Path, file: int) -> None:
        self.path = path
        self._file = file

    @classmethod
    def take(cls, path: Path, own: str) -> Self | None:
        """The spool at `path`, None if its process lives, or if somebody else hands it in.

        `own` is the holder id of this process, which says whose process ids mean anything here.
        """
        try:
            file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        if os.fstat(file).st_nlink == 0 or not (_is_closed(file) or _has_died(path, own)):
            os.close(file)
            return None
        return cls(path, file)

    def read(self) -> Left:
        """All whole records. An open call that an entry tells the end of is no open call."""
        return read(os.pread(self._file, os.fstat(self._file).st_size, 0))

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def release(self) -> None:
        """Let go of it; what was not removed is for others to find."""
        os.close(self._file)


def read(data: bytes) -> Left:
    """The whole records of a spool's bytes."""
    opened: dict[str, list[Any]] = {}
    entries: list[list[Any]] = []
    for start in range(0, len(data), SEGMENT_BYTES):
        end = min(start + SEGMENT_BYTES, len(data))
        if end - start < _HEAD.size:
            break
        magic, _, epoch = _HEAD.unpack_from(data, start)
        if magic != _MAGIC:
            continue  # taken from the disk, and never written to
        at = start + _HEAD.size
        while at + _RECORD.size <= end:
            length, checksum, kind, count = _RECORD.unpack_from(data, at)
            at += _RECORD.size
            payload = data[at : at + length]
            if not length or at + length > end or zlib.crc32(payload, epoch) != checksum:
                break
            at += length
            if kind == _OPEN:
                values = orjson.loads(payload)
                opened[values[0]] = values
            elif kind == _ENTRY:
                entries.append(orjson.loads(payload) + [count] * (count > 1))
    for values in entries:
        opened.pop(values[0], None)
    return Left(list(opened.values()), entries)


def spools(directory: Path) -> list[Path]:
    """The spools of a node, in the order of their names, and files that never became one."""
    try:
        return sorted(p for p in directory.iterdir() if p.suffix in (SUFFIX, NEW))
    except FileNotFoundError:
        return []


def holder_of(path: Path) -> str:
    """Whose spool that is."""
    return unquote(path.stem.rpartition("~")[0])


def _has_died(path: Path, own: str) -> bool:
    holder = holder_of(path)
    if _pids(holder) != _pids(own):
        return True  # its process is not to be seen from here; nobody has its file open, though
    return is_dead(holder)


def _pids(holder: str) -> str:
    """The namespace of process ids in a holder's name."""
    return holder.partition("/")[0].rpartition(".")[2]


def _is_closed(file: int) -> bool:
    head = os.pread(file, _HEAD.size, 0)
    return len(head) == _HEAD.size and head[:5] == _MAGIC + b"\1"


def _packed(values: Sequence[Any]) -> bytes:
    try:
        payload = orjson.dumps(values)
    except TypeError:
        # Lone surrogates, which JSON lets through and UTF-8 has no form for.
        return _packed([_clean(value) for value in values])
    if len(payload) > RECORD_BYTES_MAX:
        return orjson.dumps([v[:TEXT_CHARS_MAX] if type(v) is str else v for v in values])
    return payload


def _clean(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode() if type(value) is str else value
