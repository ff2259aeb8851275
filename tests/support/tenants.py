"""A Forebay with tenants, keys and limits of its own, for the tests of limits."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil  # type: ignore[import-untyped]
import yaml

from forebay.secrets import hash_key, new_key
from tests.support import system as support
from tests.support.driver import Driver
from tests.support.upstream import Upstream

SECRET = "a-secret-of-the-tests-and-of-nothing-else"
SIM_KEY = "sk-simulated-key-of-the-tests"
ADMIN = "boss"


def limits(**given: Any) -> dict[str, Any]:
    """These limits and no others: without a word there would be 60 a minute and 1000 an hour."""
    return {"requests_per_minute": None, "requests_per_hour": None, **given}


def deployment(group: str, model: str, base: str, **more: Any) -> dict[str, Any]:
    params = {"model": model, "api_base": base, "api_key": "os.environ/SIM_KEY", **more}
    return {"model_name": group, "litellm_params": params}


@dataclass(slots=True)
class Tenants:
    """A running system, a key for each of its tenants, and the ways to reach it."""

    up: support.UpProcess
    upstream: Upstream
    keys: dict[str, str]
    config_path: Path

    @property
    def url(self) -> str:
        return self.up.url

    def client(self, connections: int = 100) -> httpx.AsyncClient:
        """For use within one test's loop."""
        most = httpx.Limits(max_connections=connections, max_keepalive_connections=connections)
        return httpx.AsyncClient(base_url=self.url, timeout=60, limits=most)

    def headers(self, tenant: str, **more: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys[tenant]}", **more}

    @contextmanager
    def driver(self) -> Iterator[Driver]:
        """A Ray driver of this system. Not to be kept over a restart."""
        with Driver(self.up.ray_address, self.up.env) as made:
            yield made

    def replicas(self) -> list[psutil.Process]:
        """The processes that answer HTTP."""
        assert self.up.process is not None
        family = psutil.Process(self.up.process.pid).children(recursive=True)
        return [p for p in family if any("ServeReplica" in part for part in p.cmdline())]

    def forebay(self, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """The command, as the operator runs it: with the admin's key in its environment."""
        return subprocess.run(
            [sys.executable, "-m", "forebay", *arguments],
            env={**self.up.env, "FOREBAY_API_KEY": self.keys[ADMIN]},
            cwd=support.ROOT,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def forebay_json(self, *arguments: str) -> Any:
        done = self.forebay(*arguments, "--json")
        assert done.returncode == 0, done.stderr or done.stdout
        return json.loads(done.stdout)

    def restart(self) -> None:
        """`forebay down`, and up again with the same data."""
        assert self.up.process is not None
        with ThreadPoolExecutor(1) as thread:  # it waits for our child, which we have to reap
            down = thread.submit(self.forebay, "down", timeout_s=support.STOP_S)
            self.up.process.wait(support.STOP_S)
            done = down.result()
        assert done.returncode == 0, done.stderr
        self.up.start()


@contextmanager
def running(
    data_dir: Path,
    tenants: Mapping[str, Mapping[str, Any] | None],
    model_list: list[dict[str, Any]],
    upstream: Upstream,
    *,
    replicas: int,
    gateway: Mapping[str, Any] | None = None,
) -> Iterator[Tenants]:
    """A system with these tenants (id → limits), a key for each, and an admin."""
    keys = {name: new_key() for name in [*tenants, ADMIN]}
    entries: list[dict[str, Any]] = [
        {
            "id": name,
            "keys": [{"id": f"key-of-{name}", "hash": hash_key(key, SECRET.encode())}],
            "admin": name == ADMIN,
        }
        for name, key in keys.items()
    ]
    for entry in entries:
        told = tenants.get(entry["id"])
        if told is not None:
            entry["limits"] = dict(told)
    document = {
        "model_list": model_list,
        "tenants": entries,
        "gateway": {
            "enable_request_deduplication": False,
            "max_retries": 0,
            "circuit_breaker_config": {"failure_threshold": 5, "timeout": 1.0},
            **(gateway or {}),
        },
        "server": {"port": support.free_port(), "replicas": replicas},
    }
    path = data_dir / "forebay.yaml"
    path.write_text(yaml.safe_dump(document))
    env = {"SIM_KEY": SIM_KEY, "FOREBAY_KEY_SECRET": SECRET}
    with support.UpProcess(data_dir, "--config", str(path), env=env) as up:
        yield Tenants(up, upstream, keys, path)


def found(value: Any, name: str) -> list[Any]:
    """Every value of this name, at whatever depth."""
    if isinstance(value, Mapping):
        here = [value[name]] if name in value else []
        return here + [one for inner in value.values() for one in found(inner, name)]
    if isinstance(value, list):
        return [one for inner in value for one in found(inner, name)]
    return []
