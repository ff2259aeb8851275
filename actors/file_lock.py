"""The right to be the only owner of a file."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable

from actors.ref import Clock

PAUSE_S = 0.05


class FileLocked(Exception):
    """Somebody else owns the file; `pid` is their process id, where it could be read."""

    def __init__(self, path: str, pid: int | None) -> None:
        super().__init__(path, pid)
        self.path, self.pid = path, pid

    def __str__(self) -> str:
        return f"{self.path} is in use by process {self.pid or 'unknown'}"


class FileLock:
    """A `flock` on `path`.lock, held until `release` or the end of the process.

    It is a file of its own because SQLite's locks on the database must not be touched. The kernel
    lets go of it however the process ends, and it holds against other owners in this process too.
    Local file systems only: NFS may not keep it.
    """

    def __init__(
        self,
        path: str,
        clock: Clock = time.monotonic,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = f"{path}.lock"
        self._clock = clock
        self._pause = pause
        self._handle: int | None = None

    @property
    def held(self) -> bool:
        return self._handle is not None

    def acquire(self, wait_s: float) -> None:
        """Take the lock; blocks for up to `wait_s` seconds while somebody else has it.

        Raises:
            FileLocked: somebody else still has it.
            OSError: the lock file cannot be made.
        """
        assert self._handle is None
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = self._clock() + wait_s
        while not _taken(handle):
            if self._clock() >= deadline:
                pid = _pid_in(handle)
                os.close(handle)
                raise FileLocked(self.path, pid)
            self._pause(PAUSE_S)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        self._handle = handle

    def release(self) -> None:
        """Let go of the lock; nothing happens if it is not held."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def _taken(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _pid_in(handle: int) -> int | None:
    text = os.pread(handle, 20, 0).decode("ascii", errors="replace").strip()
    return int(text) if text.isdecimal() else None
