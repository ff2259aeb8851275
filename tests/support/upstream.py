"""A handle on a simulator process: start it, script it, read its log, stop it.

with Upstream() as upstream:
    upstream.script(status=503, count=2)
    ...  # call upstream.url + "/v1/chat/completions"
    assert [record.status for record in upstream.log()] == [503, 503, 200]
"""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

ROOT = Path(__file__).resolve().parents[2]
START_S = 20.0
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Record:
    """One request as the simulator saw it. `status` 0: it never got as far as an answer.

    `tokens` are those sent, `start_ns`/`end_ns` wall clock, `*_mono_ns` the simulator's own
    monotonic clock; `end_ns` is None for a request that is under way or died with the simulator.
    `fault` names what the script did: status, poison, cut, stall, malformed, reset, over, refused.
    With a `prefix_cache`: tokens that came from it, and the hints given: marks, or a key.
    """

    id: str
    n: int
    dialect: str
    route: str
    path: str
    model: str
    status: int
    stream: bool
    texts: int
    prompt_tokens: int
    completion_tokens: int
    bytes_in: int
    bytes_out: int
    chunks: int
    disconnected: bool
    start_ns: int
    start_mono_ns: int
    request_id: str | None = None
    fault: str | None = None
    credential: str | None = None
    end_ns: int | None = None
    end_mono_ns: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    header_names: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    body: Mapping[str, Any] | None = None
    cached_tokens: int = 0
    cache_marks: int = 0
    cache_key: str | None = None

    @property
    def finished(self) -> bool:
        return self.end_ns is not None

    @property
    def prompt(self) -> str:
        """The last message, prompt or input, where the script says `log_bodies`; else empty."""
        body = self.body or {}
        messages = body.get("messages") or [{}]
        return str(messages[-1].get("content", body.get("prompt", body.get("input", ""))))


_FIELDS = frozenset(f.name for f in fields(Record))


class Upstream:
    """Owns one simulator process on 127.0.0.1 and, unless given a log, a temporary one.

    Failure behaviour: when this process dies the simulator sees its stdin close and ends; `stop`
    ends that process by its id and no other. `kill` is for tests of what a dead upstream does;
    `start` then brings it back on the same port, with the log continued and the script forgotten.
    """

    def __init__(self, *, log: str | Path | None = None, fast: bool = False, port: int = 0) -> None:
        self.port = port
        self.fast = fast
        self._scratch = tempfile.TemporaryDirectory(prefix="upstream-")
        self.log_path = Path(self._scratch.name, "log.jsonl") if log is None else Path(log)
        self._stderr = Path(self._scratch.name, "stderr")
        self._log_from = 0
        self._process: subprocess.Popen[str] | None = None
        self.start()

    def start(self) -> None:
        """Start the process and wait until it answers. Does nothing while it runs."""
        if self._process is not None:
            return
        ready = Path(self._scratch.name, "port")
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-m", "tests.support.simulator", "--with-stdin"]
        command += ["--port", str(self.port), "--log", str(self.log_path)]
        command += ["--ready-file", str(ready)] + (["--fast"] if self.fast else [])
        with self._stderr.open("a") as stderr:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                text=True,
            )
        self._process = process
        deadline = time.monotonic() + START_S
        while not ready.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the simulator did not start: {self.stderr}")
            time.sleep(0.01)
        self.port = int(ready.read_text())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "the simulator is stopped"
        return self._process.pid

    @property
    def stderr(self) -> str:
        """What the process complained of; empty unless the simulator itself is at fault."""
        return self._stderr.read_text()

    def script(self, **words: Any) -> None:
        """Change the base behaviour, or add a rule: see `tests.support.simulator.script`.

        `script(latency=0.1)` holds for all requests; `script(status=503, count=3)` for three.
        Raises ValueError for a word that no script knows.
        """
        self._control("POST", "/control/script", words)

    def reset(self) -> None:
        """Good behaviour, counters at zero, and `log()` begins here."""
        self._log_from = self._control("POST", "/control/reset")["log_bytes"]

    def stats(self) -> dict[str, Any]:
        """Counters since the last reset, beside how many run and wait at this moment."""
        return self._control("GET", "/control/stats")

    def log(self) -> list[Record]:
        """All requests that began since the last reset, in the order they arrived."""
        if self._process is not None:
            self.stats()  # every control call writes out what fast mode has gathered
        found: dict[str, dict[str, Any]] = {}
        if not self.log_path.exists():
            return []
        with self.log_path.open("rb") as lines:
            lines.seek(self._log_from)
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                record = json.loads(line)
                if record["event"] == "begin" or self.fast or record["id"] in found:
                    found[record["id"]] = record
        return [_record(one) for one in found.values()]

    def wait_log(
        self, done: Callable[[list[Record]], object] | int, timeout_s: float = 5.0
    ) -> list[Record]:
        """The log as soon as `done(log)` is true, or so many requests are finished.

        Raises TimeoutError with what there is.
        """
        if isinstance(done, int):
            wanted = done
            done = lambda records: sum(r.finished for r in records) >= wanted  # noqa: E731
        deadline = time.monotonic() + timeout_s
        while True:
            records = self.log()
            if done(records):
                return records
            if time.monotonic() > deadline:
                raise TimeoutError(f"not within {timeout_s} s: {records[-5:]}")
            time.sleep(0.01)

    def stop(self) -> None:
        """End the process, gently at first, and drop the temporary log. May be called twice."""
        if self._process is not None:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_S)
        self.kill()
        self._scratch.cleanup()

    def kill(self) -> None:
        """SIGKILL: requests under way keep their `begin` line and get no `end`."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _control(
        self, method: str, path: str, words: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request(method, path, body=None if words is None else json.dumps(words))
            response = connection.getresponse()
            answer: dict[str, Any] = json.loads(response.read())
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(answer.get("error"))
        return answer


def _record(line: dict[str, Any]) -> Record:
    known = {name: value for name, value in line.items() if name in _FIELDS}
    for name in ("keys", "header_names"):
        known[name] = tuple(known.get(name, ()))
    return Record(**known)
