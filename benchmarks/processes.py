"""Child processes of a benchmark: started, waited for, measured and ended by their ids."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import psutil  # type: ignore[import-untyped]

from benchmarks.apart import ROOT

STOP_S = 60.0


@dataclass(frozen=True, slots=True)
class Member:
    """One process of a family; `pss_mb` has pages that are shared counted in parts."""

    pid: int
    line: str
    pss_mb: float


class Peak:
    """Watches the resident memory of processes, added up. While the context lasts a thread looks
    every EVERY_S; `before_mb` and `after_mb` are what it was at the context's ends."""

    EVERY_S = 0.1

    def __init__(self, processes: Sequence[psutil.Process]) -> None:
        self._processes = processes
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.before_mb = self.peak_mb = self.after_mb = 0.0

    def _look(self) -> float:
        total = 0
        for process in self._processes:
            with contextlib.suppress(psutil.Error):
                total += process.memory_info().rss
        return total / 2**20

    def _watch(self) -> None:
        while not self._over.wait(self.EVERY_S):
            self.peak_mb = max(self.peak_mb, self._look())

    def __enter__(self) -> Self:
        self.before_mb = self.peak_mb = self._look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self.after_mb = self._look()


class Child:
    """One process and its descendants. Leaving the context ends them and nothing else.

    Failure behaviour: SIGINT first, which drains; after STOP_S SIGKILL to the child and to those
    descendants that were seen while it lived.
    """

    def __init__(
        self, command: Sequence[str], log: Path, environ: Mapping[str, str] | None = None
    ) -> None:
        self.log = log
        self.begun_s = time.perf_counter()
        with log.open("w") as out:
            self._process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env={**os.environ, **(environ or {})},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._seen: dict[int, psutil.Process] = {}
        self._spent: dict[int, tuple[str, float]] = {}

    @property
    def pid(self) -> int:
        return self._process.pid

    def await_200(
        self, url: str, timeout_s: float, *, key: str = "", body: Mapping[str, Any] | None = None
    ) -> float:
        """Seconds from the start of the process to the first 200 of `url`.

        Raises RuntimeError with the end of its log when it dies or takes too long.
        """
        deadline_s = self.begun_s + timeout_s
        while time.perf_counter() < deadline_s:
            if self._process.poll() is not None:
                raise RuntimeError(f"ended with {self._process.returncode}: {self.tail()}")
            if _is_200(url, key, body):
                return time.perf_counter() - self.begun_s
            time.sleep(0.05)
        raise RuntimeError(f"no 200 from {url} in {timeout_s} s: {self.tail()}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]

    def family(self) -> list[psutil.Process]:
        """The process and all its descendants that live now."""
        with contextlib.suppress(psutil.NoSuchProcess):
            parent = psutil.Process(self.pid)
            for process in [parent, *parent.children(recursive=True)]:
                self._seen.setdefault(process.pid, process)
        return [process for process in self._seen.values() if process.is_running()]

    def cpu_s(self, title: str = "") -> float:
        """CPU seconds so far of the family, or of its Ray workers whose title holds this word; of
        those that have ended, as far as they were seen."""
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._spent[process.pid] = " ".join(process.cmdline()), times.user + times.system
        return sum(spent_s for line, spent_s in self._spent.values() if _is_called(line, title))

    def members(self) -> list[Member]:
        """The processes of the family that live now."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                memory = process.memory_full_info()
                line = " ".join(process.cmdline()) or process.name()
                found.append(Member(process.pid, line, memory.pss / 2**20))
        return found

    def chosen(self, title: str = "") -> list[psutil.Process]:
        """The family's members, or its Ray workers whose title holds this word."""
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if _is_called(" ".join(process.cmdline()), title):
                    found.append(process)
        return found

    def stop(self) -> None:
        family = self.family()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def _is_called(line: str, title: str) -> bool:
    return not title or (title in line and line.startswith("ray::"))


def _is_200(url: str, key: str, body: Mapping[str, Any] | None) -> bool:
    try:
        with urllib.request.urlopen(_request(url, key, body), timeout=60) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def get(url: str, key: str = "") -> bytes:
    """The body of a GET. Raises HTTPError for anything but 2xx."""
    with urllib.request.urlopen(_request(url, key, None), timeout=30) as response:
        return bytes(response.read())


def _request(url: str, key: str, body: Mapping[str, Any] | None) -> urllib.request.Request:
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.Request(url, data=data, headers=headers)


def resident_b() -> int:
    """Bytes of this process that are resident."""
    return int(psutil.Process().memory_info().rss)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "load_before": round(os.getloadavg()[0], 2),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "ray": metadata.version("ray"),
        "litellm": metadata.version("litellm"),
    }
