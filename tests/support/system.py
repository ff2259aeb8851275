"""A whole Forebay for system tests: `forebay up` as a process, beside a real upstream."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.support.audit import PRICES

ROOT = Path(__file__).resolve().parents[2]
START_S = 180.0
STOP_S = 60.0


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(data_dir: Path, **more: str) -> dict[str, str]:
    """The environment for processes of one test system: own data directory, own Ray token.

    Provider keys of the machine stay out, so that tests see what a newcomer sees.
    """
    keep = {k: v for k, v in os.environ.items() if not k.endswith("_API_KEY")}
    keep.pop("RAY_ADDRESS", None)
    token = data_dir / "ray_token"
    if not token.exists():
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
    return {
        **keep,
        "FOREBAY_DATA_DIR": str(data_dir),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        **more,
    }


class UpProcess:
    """Owns one `forebay up`. Stops it as a user does, by SIGINT, and by its pid only."""

    def __init__(
        self, data_dir: Path, *arguments: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.data_dir = data_dir
        self.env = environment(data_dir, **(env or {}))
        self.arguments = [sys.executable, "-m", "forebay", "up", "--json", *arguments]
        self.process: subprocess.Popen[str] | None = None
        self.told: dict[str, Any] = {}
        self.errors: list[str] = []

    def start(self) -> Self:
        begun_s = time.monotonic()
        self.process = subprocess.Popen(
            self.arguments,
            env=self.env,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        stderr = self.process.stderr
        self._reader = threading.Thread(target=lambda: self.errors.extend(stderr), daemon=True)
        self._reader.start()
        guard = threading.Timer(START_S, self.process.kill)
        guard.start()
        line = self.process.stdout.readline()
        guard.cancel()
        if not line:
            self.process.wait(STOP_S)
            raise AssertionError("forebay up did not start:\n" + "".join(self.errors))
        self.told = json.loads(line)
        self.started_s = time.monotonic() - begun_s
        return self

    @property
    def url(self) -> str:
        return str(self.told["url"])

    @property
    def ray_address(self) -> str:
        return str(json.loads((self.data_dir / "run.json").read_text())["ray_address"])

    def stop(self) -> int:
        """SIGINT, as Ctrl-C sends it; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            return self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError("forebay up did not stop:\n" + "".join(self.errors)) from None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


def groups(url: str) -> list[dict[str, Any]]:
    """A model list over one simulator: every dialect, several deployments, a dead one."""
    v1 = f"{url}/v1"

    def group(name: str, model: str, base: str, **more: Any) -> dict[str, Any]:
        params = {"model": model, "api_base": base, "api_key": "os.environ/SIM_KEY", **more}
        return {"model_name": name, "litellm_params": params}

    return [
        group("sim", "openai/sim", v1),
        group("pair", "openai/sim", v1, weight=1),
        group("pair", "openai/sim-b", v1, weight=1),
        group("sim-claude", "anthropic/claude-sim", url),
        group("sim-gemini", "gemini/gemini-sim", f"{url}/v1beta"),
        group("sim-cohere", "cohere_chat/command-sim", f"{url}/v2/chat"),
        group("sim-embed", "openai/text-embedding-sim", v1),
        group("priced-embed", "openai/text-embedding-sim", v1, input_cost_per_token=1e-6),
        group("sim-two", "openai/sim", v1, order=1),
        group("paid", "openai/sim", v1, **PRICES),
        group("paid-embed", "openai/text-embedding-sim", v1, **PRICES),
        group("dead", "openai/sim", "http://127.0.0.1:9/v1"),
        group("dead-first", "openai/sim", "http://127.0.0.1:9/v1", order=1),
        group("dead-first", "openai/sim", v1, order=2),
        group("any/*", "openai/*", v1),
        group("cursed", "openai/sim-reset=before+latency=0.1", v1),
        *(group(f"faulty-{n}", f"openai/sim-faulty-{n}", v1) for n in (400, 401, 429, 500)),
    ]
