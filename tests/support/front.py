"""A real HAProxy as Serve would start it, before an HTTP server of the tests' own, without Ray.

As a program: `render` writes the file that Serve renders for one replica, by the environment it is
run in; `serve` is the replica.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from deployments import ingress
from tests.support.system import ROOT, free_port

START_S = 30.0
STOP_S = 5.0


class Front:
    """Owns one HAProxy on `url`, those that it replaced, and the server on `replica_port`.

    `settings` are variables over the profile's. Leaving the context ends all of them.
    """

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder = folder
        self.port = free_port()
        self.replica_port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.config = folder / "haproxy.cfg"
        self.socket = folder / "admin.sock"
        self._environ = {**os.environ, **settings}
        ingress.prepare(self._environ)
        self._proxies: list[subprocess.Popen[bytes]] = []
        self._replica: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._render()
        self.start_replica()
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in [*self._proxies, *([self._replica] if self._replica else [])]:
            if process.poll() is None:
                process.kill()
            process.wait(STOP_S)

    @property
    def process(self) -> psutil.Process:
        """The HAProxy that listens now."""
        return psutil.Process(self._proxies[-1].pid)

    def start_replica(self) -> None:
        self._replica = self._program("serve", str(self.replica_port))
        _await_listener(self.replica_port)

    def kill_replica(self) -> None:
        assert self._replica is not None
        self._replica.kill()
        self._replica.wait(STOP_S)

    def freeze_replica(self) -> None:
        assert self._replica is not None
        self._replica.send_signal(signal.SIGSTOP)

    def thaw_replica(self) -> None:
        assert self._replica is not None
        self._replica.send_signal(signal.SIGCONT)

    def reload(self) -> None:
        """As Serve does when replicas come or go; the old one ends when its streams have."""
        old = self._proxies[-1].pid
        self._start("-sf", str(old), "-x", str(self.socket))

    def _start(self, *more: str) -> None:
        command = [str(ingress.WRAPPER), "-db", "-f", str(self.config), "-dR", *more]
        log = (self.folder / f"haproxy-{len(self._proxies)}.log").open("wb")
        with log:
            self._proxies.append(
                subprocess.Popen(command, env=self._environ, stdout=log, stderr=log)
            )
        deadline_s = time.monotonic() + START_S
        while self._asked("show info").get("Pid") != str(self._proxies[-1].pid):
            assert self._proxies[-1].poll() is None, Path(log.name).read_text()
            assert time.monotonic() < deadline_s, Path(log.name).read_text()
            time.sleep(0.01)

    def _asked(self, command: str) -> dict[str, str]:
        """What the admin socket tells, as Serve's manager asks it; empty while nobody is there."""
        try:
            with socket.socket(socket.AF_UNIX) as line:
                line.connect(str(self.socket))
                line.sendall(f"{command}\n".encode())
                told = b"".join(iter(lambda: line.recv(65536), b""))
        except OSError:
            return {}
        pairs = (row.partition(": ") for row in told.decode().splitlines())
        return {name: value for name, _, value in pairs}

    def _render(self) -> None:
        ports = [str(self.port), str(self.replica_port)]
        rendering = self._program("render", str(self.folder), *ports)
        assert rendering.wait(START_S) == 0

    def _program(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.support.front", *arguments]
        return subprocess.Popen(command, env=self._environ, cwd=ROOT)


def _await_listener(port: int) -> None:
    deadline_s = time.monotonic() + START_S
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        else:
            return


def _rendered(folder: Path, port: int, replica_port: int) -> None:
    """Serve's own template, with what Serve reads of the environment."""
    from ray.serve._private import haproxy
    from ray.serve.config import HTTPOptions

    config = haproxy.HAProxyConfig(
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_port=free_port(),
        stats_port=free_port(),
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
    )
    backend = haproxy.BackendConfig(
        name="forebay",
        path_prefix="/",
        app_name="forebay",
        timeout_http_keep_alive_s=90,
        servers=[haproxy.ServerConfig("replica", "127.0.0.1", replica_port)],
    )
    made = haproxy.HAProxyApi(config, {"forebay": backend}, str(folder / "haproxy.cfg"))
    made._generate_config_file_internal()


async def _app(scope: Any, receive: Any, send: Any) -> None:
    """GET /stream?chunks=N&gap=SECONDS: N lines, a gap after each; else: what came, in numbers."""
    assert scope["type"] == "http"
    headers = [(b"content-type", b"application/json")]
    if scope["path"] == "/stream":
        pairs = (pair.split("=", 1) for pair in scope["query_string"].decode().split("&"))
        asked: Mapping[str, str] = dict(pairs)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(int(asked["chunks"])):
            line = f"data: {number}\n\n".encode()
            await send({"type": "http.response.body", "body": line, "more_body": True})
            await asyncio.sleep(float(asked["gap"]))
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        return
    count, more = 0, True
    while more:
        message = await receive()
        count += len(message.get("body", b""))
        more = message.get("more_body", False)
    sizes = {"body": count, "headers": sum(len(n) + len(v) for n, v in scope["headers"])}
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(sizes).encode()})


def _serve(port: int) -> None:
    import uvicorn

    uvicorn.run(_app, port=port, lifespan="off", log_level="error", access_log=False)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["render", folder, port, replica_port]:
            _rendered(Path(folder), int(port), int(replica_port))
        case ["serve", port]:
            _serve(int(port))
