"""One `forebay up` for a benchmark: how it is configured, and what it says of itself afterwards."""

from __future__ import annotations

import json
import re
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from benchmarks.processes import Child, free_port, get
from forebay.secrets import hash_key, new_key

TENANTS = 50
START_S = 180.0
LEDGER_WAIT_S = 15.0
REST_CPU, REST_WAIT_S = 0.25, 30.0
FIRST_CHAT = {"model": "sim", "messages": [{"role": "user", "content": "The first question"}]}
LIMITS = {
    "requests_per_minute": 120_000,
    "requests_per_hour": 7_200_000,
    "burst_size": 4_000,
    "concurrent_requests": 128,
}
"""Finite, and never reached by these loads."""


class System:
    """Owns one `forebay up` whose tenants have a key and finite limits each. Leaving the context
    ends it.

    `gateway` and `server` are what its configuration says otherwise than `forebay_document`.
    `sent` is how many requests it has got; whoever loads it adds to that. `first_s` is the time
    from the start of the process to its first answer.

    Failure behaviour: RuntimeError with the end of its log when no answer comes in START_S.
    """

    def __init__(
        self,
        name: str,
        upstream_url: str,
        scratch: Path,
        *,
        caching: bool = False,
        keys: Sequence[str] | None = None,
        gateway: Mapping[str, Any] | None = None,
        server: Mapping[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.keys = list(tenant_keys() if keys is None else keys)
        self.admin, self.secret = new_key(), secrets.token_hex(32)
        self.sent = 0
        self.first_s = 0.0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
        document = self.document(upstream_url, caching)
        document["gateway"].update(gateway or {})
        document["server"].update(server or {})
        config = home / "forebay.yaml"
        config.write_text(json.dumps(document))
        self.environ = environ_of(home, self.secret)
        self._command = command_of(config)
        self._log = home / "log"

    def document(self, upstream_url: str, caching: bool) -> dict[str, Any]:
        """Its configuration."""
        return forebay_document(
            upstream_url, self.port, self.keys, self.admin, self.secret, caching
        )

    def __enter__(self) -> Self:
        self.child = Child(self._command, self._log, self.environ)
        try:
            self.first_s = self.child.await_200(
                f"{self.url}/v1/chat/completions", START_S, key=self.keys[0], body=FIRST_CHAT
            )
            self.sent += 1
            await_rest(self.child)
        except BaseException:
            self.child.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.child.stop()

    def cpu_s(self) -> float:
        """CPU seconds so far of all replicas."""
        return serving_cpu(self.child, "ServeReplica")()

    def messages(self) -> Counter[str]:
        """Messages to owners so far, by owner and method."""
        return owner_messages(self.url)

    def usage(self) -> dict[str, Any]:
        """The ledger's sums over all tenants."""
        told: dict[str, Any] = json.loads(get(f"{self.url}/v1/usage", self.admin))
        return told

    def rows(self) -> int:
        """Rows of the ledger, once they are as many as were sent or it is late."""
        return ledger_rows(self.url, self.admin, self.sent)

    def audit(self) -> tuple[str, list[str]]:
        """What was sent, what the ledger has and what is counted; and what is wrong with it."""
        rows, counted = self.rows(), requests_counted(self.url, self.sent)
        told = f"{self.sent} / {rows} / {counted}"
        if len({self.sent, rows, counted}) == 1:
            return told, []
        return told, [
            f"{self.name}: {self.sent} requests were sent, the ledger has {rows} rows after "
            f"{LEDGER_WAIT_S} s, forebay_requests_total says {counted}"
        ]


def environ_of(home: Path, secret: str) -> dict[str, str]:
    """What `forebay up` reads from its environment; its data go below `home`."""
    return {
        "FOREBAY_KEY_SECRET": secret,
        "FOREBAY_DATA_DIR": str(home / "data"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }


def command_of(config: Path) -> list[str]:
    return [sys.executable, "-m", "forebay", "up", "--config", str(config)]


def forebay_document(
    upstream_url: str,
    port: int,
    keys: Sequence[str],
    admin: str,
    secret: str,
    caching: bool,
) -> dict[str, Any]:
    """The configuration: one model, one replica, and a tenant with LIMITS for each key."""
    tenants: list[dict[str, Any]] = [
        {
            "id": f"tenant-{i:02d}",
            "keys": [{"id": "bench", "hash": hash_key(key, secret.encode())}],
            "limits": dict(LIMITS),
        }
        for i, key in enumerate(keys)
    ]
    admin_key = {"id": "admin", "hash": hash_key(admin, secret.encode())}
    tenants.append({"id": "admin", "keys": [admin_key], "admin": True})
    sim = {"model": "openai/sim", "api_base": f"{upstream_url}/v1", "api_key": "sk-upstream"}
    return {
        "model_list": [{"model_name": "sim", "litellm_params": sim}],
        "tenants": tenants,
        "gateway": {
            "enable_caching": caching,
            "enable_request_deduplication": caching,
            "max_retries": 0,
        },
        "server": {"host": "127.0.0.1", "port": port, "replicas": 1},
    }


def tenant_keys() -> list[str]:
    return [new_key() for _ in range(TENANTS)]


def await_rest(child: Child) -> None:
    """What comes after the first answer, such as imports, is over: little of a core is used."""
    deadline_s = time.monotonic() + REST_WAIT_S
    while time.monotonic() < deadline_s:
        before_s = child.cpu_s()
        time.sleep(1.0)
        if child.cpu_s() - before_s < REST_CPU:
            return


def serving_cpu(child: Child, title: str) -> Callable[[], float]:
    """CPU seconds of the replicas: the Ray workers whose title holds this word."""
    return lambda: child.cpu_s(lambda line: title in line and line.startswith("ray::"))


def ledger_rows(url: str, admin_key: str, expected: int) -> int:
    """Rows in the ledger, one an attempt, once they are as many as expected or it is late."""
    return _settled(lambda: int(json.loads(get(f"{url}/v1/usage", admin_key))["entries"]), expected)


def requests_counted(url: str, expected: int) -> int:
    """Requests of all routes, tenants and outcomes, as `forebay_requests_total` has them, once
    they are as many as expected or it is late."""

    def count() -> int:
        return sum(
            int(value)
            for name, _, value in samples(get(f"{url}/metrics").decode())
            if name == "forebay_requests_total"
        )

    return _settled(count, expected)


def _settled(count: Callable[[], int], expected: int) -> int:
    deadline_s = time.monotonic() + LEDGER_WAIT_S
    while True:
        found = count()
        if found >= expected or time.monotonic() > deadline_s:
            return found
        time.sleep(0.2)


def owner_messages(url: str) -> Counter[str]:
    """Messages to owners so far, by owner and method."""
    found: Counter[str] = Counter()
    for name, labels, value in samples(get(f"{url}/metrics").decode()):
        if name == "forebay_owner_calls_total":
            owner = labels["owner"]
            method = labels.get("method")
            found[f"{owner}.{method}" if method else owner] += int(value)
    return found


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """The samples of Prometheus text: name, labels, value."""
    for line in text.splitlines():
        found = re.fullmatch(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?", line)
        if found is not None:
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
            yield found[1], labels, float(found[3])


@contextmanager
def at(path: Path | None) -> Iterator[Path]:
    """A directory for logs and data: the one given, or a temporary one."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        yield Path(scratch)
