"""A Forebay with tenants, keys and limits of its own, for the tests of limits."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
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
NUMBER = iter(range(10**9))
WARM_S = 60.0


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
        found_replicas = []
        for process in psutil.Process(self.up.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):  # some live for a moment only
                if any("ServeReplica" in part for part in process.cmdline()):
                    found_replicas.append(process)
        return found_replicas

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
            code = self.up.process.wait(support.STOP_S)
            done = down.result()
        assert done.returncode == 0, done.stderr
        assert self.url in done.stdout
        assert code == 0, "it stopped as Ctrl-C stops it"
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


# --------------------------------------------------------------------------------------- callers


def question(text: str = "") -> list[dict[str, str]]:
    """Messages that nobody sent before."""
    return [{"role": "user", "content": f"{text} question {next(NUMBER)}".strip()}]


async def chat(
    client: httpx.AsyncClient,
    system: Tenants,
    tenant: str,
    text: str = "",
    *,
    model: str = "sim",
    headers: dict[str, str] | None = None,
    **more: Any,
) -> httpx.Response:
    return await client.post(
        "/v1/chat/completions",
        json={"model": model, "messages": question(text), **more},
        headers=system.headers(tenant, **(headers or {})),
    )


def statuses(answers: Iterable[httpx.Response]) -> Counter[int]:
    return Counter(response.status_code for response in answers)


async def warm(system: Tenants, replicas: int) -> None:
    """So many replicas have called the upstream as tenant `free`: no first call is slow later."""
    system.upstream.script(latency=0.05)
    deadline = time.monotonic() + WARM_S
    async with system.client() as client:
        while True:
            await asyncio.gather(*(chat(client, system, "free") for _ in range(32)))
            if len(serving(system)) >= replicas:
                return
            assert time.monotonic() < deadline, "not every replica answers"


def serving(system: Tenants) -> set[int]:
    """The replicas that have a connection to the upstream: those that called it."""
    return {pid for pid, sockets in upstream_sockets(system).items() if sockets}


def upstream_sockets(system: Tenants) -> dict[int, int]:
    """Replica by replica: how many connections to the upstream it has."""
    found_sockets = {}
    for process in system.replicas():
        with contextlib.suppress(psutil.NoSuchProcess):
            found_sockets[process.pid] = sum(
                bool(c.raddr) and c.raddr.port == system.upstream.port
                for c in process.net_connections("tcp")
            )
    return found_sockets
