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
FIRST_CHAT = (
    "chat/completions",
    {"model": "sim", "messages": [{"role": "user", "content": "The first question"}]},
)
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

    `gateway` and `server` are what its configuration says otherwise than `document`, `limits` are
    each tenant's, and `first` is a route with the body of its first request. `sent` is how many
    requests it has got; whoever loads it adds to that. `first_s` is the time from the start of the
    process to its first answer.

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
        limits: Mapping[str, int] = LIMITS,
        gateway: Mapping[str, Any] | None = None,
        server: Mapping[str, Any] | None = None,
        first: tuple[str, Mapping[str, Any]] = FIRST_CHAT,
    ) -> None:
        self.name = name
        self.keys = list(tenant_keys() if keys is None else keys)
        self.limits = limits
        self.admin, self.secret = new_key(), secrets.token_hex(32)
        self.sent = 0
        self.first_s = 0.0
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._first = first
        home = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=scratch))
        document = self.document(upstream_url, caching)
        document["gateway"].update(gateway or {})
        document["server"].update(server or {})
        config = home / "forebay.yaml"
        config.write_text(json.dumps(document))
        self.environ = {
            "FOREBAY_KEY_SECRET": self.secret,
            "FOREBAY_DATA_DIR": str(home / "data"),
            "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        }
        self._command = [sys.executable, "-m", "forebay", "up", "--config", str(config)]
        self._log = home / "log"

    def document(self, upstream_url: str, caching: bool) -> dict[str, Any]:
        """Its configuration: one model, one replica, and a tenant for each key."""
        tenants = [
            self.tenant(f"tenant-{i:02d}", key, limits=dict(self.limits))
            for i, key in enumerate(self.keys)
        ]
        sim = {"model": "openai/sim", "api_base": f"{upstream_url}/v1", "api_key": "sk-upstream"}
        return {
            "model_list": [{"model_name": "sim", "litellm_params": sim}],
            "tenants": [*tenants, self.tenant("admin", self.admin, admin=True)],
            "gateway": {
                "enable_caching": caching,
                "enable_request_deduplication": caching,
                "max_retries": 0,
            },
            "server": {"host": "127.0.0.1", "port": self.port, "replicas": 1},
        }

    def tenant(self, name: str, key: str, **more: Any) -> dict[str, Any]:
        """One with that key."""
        keys = [{"id": "bench", "hash": hash_key(key, self.secret.encode())}]
        return {"id": name, "keys": keys, **more}

    def __enter__(self) -> Self:
        route, body = self._first
        self.child = Child(self._command, self._log, self.environ)
        try:
            self.first_s = self.child.await_200(
                f"{self.url}/v1/{route}", START_S, key=self.keys[0], body=body
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
        return self.child.cpu_s("ServeReplica")

    def messages(self) -> Counter[str]:
        """Messages to owners so far, by owner and method."""
        found: Counter[str] = Counter()
        for name, labels, value in samples(get(f"{self.url}/metrics").decode()):
            if name == "forebay_owner_calls_total":
                owner = labels["owner"]
                method = labels.get("method")
                found[f"{owner}.{method}" if method else owner] += int(value)
        return found

    def usage(self) -> dict[str, Any]:
        """The ledger's sums over all tenants."""
        told: dict[str, Any] = json.loads(get(f"{self.url}/v1/usage", self.admin))
        return told

    def rows(self) -> int:
        """Rows of the ledger, once they are as many as were sent or it is late."""
        return _settled(lambda: int(self.usage()["entries"]), self.sent)

    def counted(self) -> int:
        """Requests of all routes, tenants and outcomes, as `forebay_requests_total` has them, once
        they are as many as were sent or it is late."""

        def count() -> int:
            return sum(
                int(value)
                for name, _, value in samples(get(f"{self.url}/metrics").decode())
                if name == "forebay_requests_total"
            )

        return _settled(count, self.sent)

    def audit(self) -> tuple[str, list[str]]:
        """What was sent, what the ledger has and what is counted; and what is wrong with it."""
        rows, counted = self.rows(), self.counted()
        told = f"{self.sent} / {rows} / {counted}"
        if len({self.sent, rows, counted}) == 1:
            return told, []
        return told, [
            f"{self.name}: {self.sent} requests were sent, the ledger has {rows} rows after "
            f"{LEDGER_WAIT_S} s, forebay_requests_total says {counted}"
        ]


def tenant_keys() -> list[str]:
    return [new_key() for _ in range(TENANTS)]


@contextmanager
def no_op(scratch: Path) -> Iterator[tuple[str, Child]]:
    """`benchmarks.noop` while the context lasts: where it answers, and its process."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "benchmarks.noop", "--port", str(port)]
    with Child(command, scratch / "noop.log") as child:
        child.await_200(f"{url}/", START_S)
        yield url, child


def await_rest(child: Child) -> None:
    """What comes after the first answer, such as imports, is over: little of a core is used."""
    deadline_s = time.monotonic() + REST_WAIT_S
    while time.monotonic() < deadline_s:
        before_s = child.cpu_s()
        time.sleep(1.0)
        if child.cpu_s() - before_s < REST_CPU:
            return


def _settled(count: Callable[[], int], expected: int) -> int:
    deadline_s = time.monotonic() + LEDGER_WAIT_S
    while True:
        found = count()
        if found >= expected or time.monotonic() > deadline_s:
            return found
        time.sleep(0.2)


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
