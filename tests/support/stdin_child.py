"""A process of the tests' own that ends when its stdin closes, so that it never outlives them."""

from __future__ import annotations

import contextlib
import subprocess
from types import TracebackType
from typing import ClassVar, Self


class StdinChild:
    """Owns one such process, given as `_process`. Leaving the context ends it.

    Failure behaviour: one that does not end within `stop_s` seconds is killed.
    """

    stop_s: ClassVar[float] = 20.0
    _process: subprocess.Popen[str]

    def close(self) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(self.stop_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
