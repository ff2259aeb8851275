"""A Prometheus of one's own, for the length of a test: Debian's `prometheus`, with `promtool`.

Nothing is installed here. Where there is none, tests that need one fail and name the remedy.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

REMEDY = "no {}: on Debian `scripts/setup dev` brings it, elsewhere install Prometheus"
UNPACKED = Path(sys.prefix) / "debian" / "usr" / "bin"
START_S = 30.0
HERE = Path(__file__).parents[2] / "observability"


def program(name: str) -> str:
    """The path of `prometheus` or `promtool`."""
    found = shutil.which(name) or shutil.which(name, path=str(UNPACKED))
    if found is None:
        pytest.fail(REMEDY.format(name))
    return found


def promtool(*arguments: str, given: bytes = b"") -> str:
    """What promtool says. Fails the test where it finds fault."""
    done = subprocess.run(
        [program("promtool"), *arguments], input=given, capture_output=True, check=False
    )
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


class PrometheusServer:
    """One server process on a port of its own, on loopback, that scrapes `target` each half second
    by `observability/prometheus.yml`, with the alerts of that folder.
    """

    def __init__(self, directory: Path, target: str) -> None:
        self.port = _free_port()
        self._directory = directory
        config = yaml.safe_load((HERE / "prometheus.yml").read_text())
        config["global"] |= {"scrape_interval": "500ms", "scrape_timeout": "500ms"}
        config["global"]["evaluation_interval"] = "500ms"
        config["rule_files"] = [str(HERE / name) for name in config["rule_files"]]
        config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it is ready."""
        path = program("prometheus")
        log = (self._directory / "prometheus.log").open("ab")
        self._process = subprocess.Popen(
            [
                path, f"--config.file={self._directory / 'prometheus.yml'}",
                f"--storage.tsdb.path={self._directory / 'data'}",
                f"--web.listen-address=127.0.0.1:{self.port}", "--log.level=warn",
            ],
            stdout=log, stderr=log, cwd=self._directory,
        )  # fmt: skip
        log.close()
        deadline = time.monotonic() + START_S
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/-/ready", timeout=1):
                    return
            except OSError as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    text = (self._directory / "prometheus.log").read_text()[-2000:]
                    raise AssertionError(f"{path} did not start: {error} {text}") from None
                time.sleep(0.05)

    def get(self, path: str, **query: str) -> Any:
        """`data` of an answer of its API. What it refuses fails the test, in its own words."""
        url = f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{query}: {error.read().decode()}") from None

    def query(self, expression: str) -> dict[tuple[tuple[str, str], ...], float]:
        """Values now, by their labels without the target's own."""
        return {
            tuple(sorted((k, v) for k, v in one["metric"].items() if k not in ("job", "instance"))):
            float(one["value"][1])
            for one in self.get("query", query=expression)["result"]
        }  # fmt: skip

    def wait_for(self, expression: str, timeout_s: float = 20.0) -> None:
        """Return once the expression has a value."""
        deadline = time.monotonic() + timeout_s
        while not self.query(expression):
            assert time.monotonic() < deadline, f"{expression} has no value"
            time.sleep(0.1)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@contextmanager
def prometheus_server(directory: Path, target: str) -> Iterator[PrometheusServer]:
    """A running server that scrapes `target`, HOST:PORT."""
    server = PrometheusServer(directory, target)
    server.start()
    try:
        yield server
    finally:
        server.end()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
