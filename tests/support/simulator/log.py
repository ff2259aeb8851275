"""The oracle: an append-only file with a line when a request has arrived and one when it is over.

Every line is a whole JSON object with all that is known at its time; the `end` line repeats what
the `begin` line said. A `begin` without `end` is a request that the simulator's own death cut off.
With `merged` only the `end` line is written, gathered for up to 10 ms: for speed, not for kills.
"""

from __future__ import annotations

import os
from hashlib import blake2b
from typing import Any

import orjson

FLUSH_S = 0.01
GATHERED_MAX = 1 << 20


def hash_credential(credential: str) -> str:
    """How a key appears in the log; `Bearer ` in front does not matter."""
    bare = credential.removeprefix("Bearer ").removeprefix("bearer ")
    return "blake2b:" + blake2b(bare.encode(), digest_size=12).hexdigest()


class Log:
    """Owns one file, opened O_APPEND. Bounded by GATHERED_MAX unwritten bytes, then it writes.

    Failure behaviour: a full disk raises OSError and ends the simulator; an oracle that forgets
    is worse than none. Without a path nothing is written.
    """

    def __init__(self, path: str | None, *, merged: bool) -> None:
        self.merged = merged
        self._gathered: list[bytes] = []
        self._gathered_bytes = 0
        self._fd: int | None = None
        if path is not None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
            self._fd = os.open(path, flags, 0o644)

    def write(self, record: dict[str, Any]) -> None:
        if self._fd is None:
            return
        line = orjson.dumps(record, option=orjson.OPT_APPEND_NEWLINE)
        if not self.merged:
            _write_all(self._fd, line)
            return
        self._gathered.append(line)
        self._gathered_bytes += len(line)
        if self._gathered_bytes >= GATHERED_MAX:
            self.flush()

    def flush(self) -> None:
        if self._gathered and self._fd is not None:
            lines = b"".join(self._gathered)
            self._gathered.clear()
            self._gathered_bytes = 0
            _write_all(self._fd, lines)

    def size(self) -> int:
        """Bytes in the file; a place to read on from."""
        return 0 if self._fd is None else os.fstat(self._fd).st_size

    def close(self) -> None:
        self.flush()
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]
