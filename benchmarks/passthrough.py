"""How much a chat completion costs on its way through: Forebay, its parts, and LiteLLM Proxy.

    python -m benchmarks.passthrough            # about five minutes
    python -m benchmarks.passthrough --quick    # about two
    python -m benchmarks.passthrough --only a,c,d

Rows, one at a time against one simulated upstream, all on loopback:
  a   the simulator itself
  b   Ray Serve's no-op behind the HAProxy and profile that Forebay uses
  c   bare `litellm.acompletion` in a loop: one process, one core
  d   Forebay over HTTP: 50 tenants with keys and finite limits, breaker, ledger, metrics,
      caching and deduplication on
  d2  the same with caching and deduplication off
  e   LiteLLM Proxy of the same version, one worker, in an environment of its own

The load is honest: every prompt is unique, keys go round, an answer must hold its own prompt's
digest, and after each Forebay row the ledger has as many rows as requests were sent, as has the
upstream's log. Exit code 1 when one of these does not hold.
"""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks import peers
from benchmarks.options import finish, parser_of, wanted_of
from benchmarks.processes import ROOT, Child, free_port, get, machine
from forebay.secrets import hash_key, new_key
from tests.support.loader import Load, Result, in_process
from tests.support.upstream import Upstream

CONCURRENCIES = (1, 8, 64)
TENANTS = 50
LEDGER_WAIT_S = 15.0
START_S = 180.0
IDLE_S = 5.0
NAMES = {
    "a": "simulator directly",
    "b": "Serve no-op, same HAProxy",
    "c": "bare litellm.acompletion",
    "d": "Forebay, all concerns on",
    "d2": "Forebay, cache and dedup off",
    "e": "LiteLLM Proxy",
}
GOALS = (("d", "e", 3.0), ("d", "c", 0.6))


@dataclass(slots=True)
class Row:
    """One system at one concurrency. `cpu_s` are those of its own serving process, where known."""

    system: str
    concurrency: int
    requests: int
    sent: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_s: float | None = None
    messages: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def per_core(self) -> float | None:
        """Requests per CPU second of the serving process."""
        return self.requests / self.cpu_s if self.cpu_s else None


@dataclass(slots=True)
class Report:
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def row(self, system: str, concurrency: int) -> Row | None:
        for row in self.rows:
            if (row.system, row.concurrency) == (system, concurrency):
                return row
        return None


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how often."""

    seconds: float
    warmup: int
    concurrencies: Sequence[int] = CONCURRENCIES


# -- rows -----------------------------------------------------------------------------------


def over_http(
    report: Report,
    plan: Plan,
    system: str,
    url: str,
    keys: Sequence[str],
    *,
    check: bool = True,
    cpu_s: Callable[[], float] | None = None,
    messages: Callable[[], Counter[str]] | None = None,
) -> int:
    """Load `url` at each concurrency, add the rows, and give back how many requests were sent."""
    sent = 0
    for concurrency in plan.concurrencies:
        before_s = cpu_s() if cpu_s is not None else 0.0
        before = messages() if messages is not None else Counter[str]()
        load = Load(
            f"{url}/v1/chat/completions",
            concurrency=concurrency,
            seconds=plan.seconds,
            warmup=plan.warmup,
            keys=list(keys),
            check=check,
        )
        result = in_process(load)
        row = _row(system, concurrency, result)
        if cpu_s is not None:
            # The warm-up's share is taken off: the figure is per measured request.
            row.cpu_s = (cpu_s() - before_s) * result.requests / max(result.sent, 1)
        if messages is not None:
            spent = messages()
            spent.subtract(before)
            row.messages = {name: n / result.sent for name, n in spent.items() if n}
        report.rows.append(row)
        sent += result.sent
        show_row(row)
    return sent


def _row(system: str, concurrency: int, result: Result) -> Row:
    problems = []
    if result.ok != result.requests:
        problems.append(f"not all 200: {result.statuses} {result.errors}")
    if result.wrong:
        problems.append(f"{result.wrong} answers of somebody else's question")
    return Row(
        system,
        concurrency,
        result.requests,
        result.sent,
        result.requests_per_s,
        result.p50_ms or 0.0,
        result.p99_ms or 0.0,
        problems=problems,
    )


def direct(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    over_http(report, plan, "a", upstream.url, tenant_keys())


def noop(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.noop", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with Child(command, scratch / "noop.log") as child:
        child.await_200(f"{url}/", START_S)
        cpu_s = serving_cpu(child, "NoOp")
        over_http(report, plan, "b", url, tenant_keys(), check=False, cpu_s=cpu_s)


def bare(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    for concurrency in plan.concurrencies:
        command = [sys.executable, "-m", "benchmarks.bare_litellm"]
        command += ["--url", f"{upstream.url}/v1", "-c", str(concurrency)]
        command += ["-t", str(plan.seconds), "--warmup", str(min(plan.warmup, 100))]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"bare litellm failed: {done.stderr[-2000:]}")
        found = json.loads(done.stdout.splitlines()[-1])
        row = Row(
            "c",
            concurrency,
            found["requests"],
            found["sent"],
            found["requests_per_s"],
            found["p50_ms"],
            found["p99_ms"],
            found["cpu_s"],
        )
        if found["failed"]:
            row.problems.append(f"{found['failed']} failed")
        report.rows.append(row)
        show_row(row)


def forebay_on(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    forebay(report, plan, upstream, scratch, "d", caching=True)


def forebay_off(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    forebay(report, plan, upstream, scratch, "d2", caching=False)


def forebay(
    report: Report, plan: Plan, upstream: Upstream, scratch: Path, system: str, *, caching: bool
) -> None:
    keys = tenant_keys()
    admin = new_key()
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    home = scratch / system
    home.mkdir()
    secret = secrets.token_hex(32)
    config = home / "forebay.yaml"
    document = forebay_document(upstream.url, port, keys, admin, secret, caching)
    config.write_text(yaml.safe_dump(document))
    environ = {
        "FOREBAY_KEY_SECRET": secret,
        "FOREBAY_DATA_DIR": str(home / "data"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    }
    command = [sys.executable, "-m", "forebay", "up", "--config", str(config)]
    first = {"model": "sim", "messages": [{"role": "user", "content": "The first question"}]}
    upstream.reset()
    with Child(command, scratch / f"{system}.log", environ) as child:
        took_s = child.await_200(f"{url}/v1/chat/completions", START_S, key=keys[0], body=first)
        report.facts[f"{system}: first 200 after forebay up, s"] = round(took_s, 1)
        time.sleep(IDLE_S)
        report.facts[f"{system}: idle memory of the whole system, MB"] = round(child.memory_mb())
        sent = 1 + over_http(
            report,
            plan,
            system,
            url,
            keys,
            cpu_s=serving_cpu(child, "ServeReplica"),
            messages=lambda: owner_messages(url),
        )
        rows = ledger_rows(url, admin, sent)
        calls = upstream.stats()["requests"]
        counted = requests_counted(url)
    report.facts[f"{system}: requests sent / ledger rows / upstream calls / counted"] = (
        f"{sent} / {rows} / {calls} / {counted}"
    )
    if len({sent, rows, calls, counted}) != 1:
        report.problems.append(
            f"{system}: {sent} requests were sent, the ledger has {rows} rows, the upstream "
            f"answered {calls}, forebay_requests_total says {counted}"
        )


def litellm_proxy(report: Report, plan: Plan, upstream: Upstream, scratch: Path) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    with peers.litellm_proxy(upstream.url, port, scratch) as child:
        child.await_200(f"{url}/health/liveliness", START_S)
        over_http(report, plan, "e", url, [peers.MASTER_KEY], cpu_s=child.cpu_s)


ROWS: dict[str, Callable[[Report, Plan, Upstream, Path], None]] = {
    "a": direct,
    "b": noop,
    "c": bare,
    "d": forebay_on,
    "d2": forebay_off,
    "e": litellm_proxy,
}


# -- Forebay's own figures ------------------------------------------------------------------


def forebay_document(
    upstream_url: str,
    port: int,
    keys: Sequence[str],
    admin: str,
    secret: str,
    caching: bool,
) -> dict[str, Any]:
    """The configuration: limits that are finite and that this load never reaches."""
    limits = {
        "requests_per_minute": 120_000,
        "requests_per_hour": 7_200_000,
        "burst_size": 4_000,
        "concurrent_requests": 128,
    }
    tenants: list[dict[str, Any]] = [
        {
            "id": f"tenant-{i:02d}",
            "keys": [{"id": "bench", "hash": hash_key(key, secret.encode())}],
            "limits": limits,
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


def ledger_rows(url: str, admin_key: str, expected: int) -> int:
    """Rows in the ledger, once they are as many as expected or LEDGER_WAIT_S has passed.

    Adapt this when GET /v1/usage changes: `entries` is the count of rows, one an attempt.
    """
    deadline_s = time.monotonic() + LEDGER_WAIT_S
    while True:
        rows = int(json.loads(get(f"{url}/v1/usage", admin_key))["entries"])
        if rows >= expected or time.monotonic() > deadline_s:
            return rows
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


def requests_counted(url: str) -> int:
    """Requests of all routes, tenants and outcomes, as `forebay_requests_total` has them."""
    return sum(
        int(value)
        for name, _, value in samples(get(f"{url}/metrics").decode())
        if name == "forebay_requests_total"
    )


def samples(text: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """The samples of Prometheus text: name, labels, value."""
    for line in text.splitlines():
        found = re.fullmatch(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?", line)
        if found is not None:
            labels = dict(re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', found[2] or ""))
            yield found[1], labels, float(found[3])


def serving_cpu(child: Child, title: str) -> Callable[[], float]:
    """CPU seconds of the replica: the Ray worker whose title holds this word."""
    return lambda: child.cpu_s(lambda line: title in line and line.startswith("ray::"))


def tenant_keys() -> list[str]:
    return [new_key() for _ in range(TENANTS)]


# -- the report -----------------------------------------------------------------------------

HEADER = (
    f"{'':34}{'c':>4}{'requests/s':>12}{'p50 ms':>9}{'p99 ms':>9}{'per CPU s':>11}{'msg/req':>9}"
)


def show_row(row: Row) -> None:
    per_core = f"{row.per_core:11,.0f}" if row.per_core is not None else f"{'':11}"
    messages = f"{sum(row.messages.values()):9.4f}" if row.messages else f"{'':9}"
    print(
        f"{row.system:>3}  {NAMES[row.system]:29}{row.concurrency:4}{row.requests_per_s:12,.0f}"
        f"{row.p50_ms:9.2f}{row.p99_ms:9.2f}{per_core}{messages}"
        + "".join(f"\n     ! {problem}" for problem in row.problems),
        flush=True,
    )


def show(report: Report) -> None:
    print("\nratios of requests/s")
    for over, under in (("d", "e"), ("d2", "e"), ("d", "c"), ("d2", "c"), ("d", "b"), ("d2", "b")):
        cells = []
        for concurrency in CONCURRENCIES:
            first, second = report.row(over, concurrency), report.row(under, concurrency)
            if first is not None and second is not None and second.requests_per_s:
                cells.append(f"{first.requests_per_s / second.requests_per_s:8.2f}")
        if cells:
            print(f"  {over + '/' + under:8}{''.join(cells)}   at concurrency 1, 8, 64")
    for over in ("d", "d2"):
        first, second = report.row(over, 64), report.row("c", 64)
        if first is not None and second is not None and first.per_core and second.per_core:
            ratio = first.per_core / second.per_core
            print(f"  {over}/c per CPU second of the serving process, at 64: {ratio:.2f}")
    for over, under, goal in GOALS:
        first, second = report.row(over, 64), report.row(under, 64)
        if first is not None and second is not None and second.requests_per_s:
            ratio = first.requests_per_s / second.requests_per_s
            verdict = "reached" if ratio >= goal else "missed"
            print(f"  goal {over} >= {goal} x {under} at 64: {ratio:.2f}, {verdict}")
    for system in ("d", "d2"):
        row = report.row(system, 64)
        if row is not None and row.messages:
            print(f"\nowner messages per request, {NAMES[system]}, at 64")
            for name, value in sorted(row.messages.items(), key=lambda item: -item[1]):
                print(f"  {name:40}{value:10.5f}")
    print()
    for name, value in {**report.facts, **report.machine}.items():
        print(f"  {name:66}{value}")
    for problem in report.problems:
        print(f"  ! {problem}")


@contextmanager
def at(path: Path | None) -> Iterator[Path]:
    """A directory for logs and data: the one given, or a temporary one."""
    if path is not None:
        path.mkdir(parents=True, exist_ok=True)
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="passthrough-") as scratch:
        yield Path(scratch)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("passthrough", __doc__, ROWS, "2 s a figure in place of 10 s")
    given = parser.parse_args(argv)
    wanted = wanted_of(parser, given.only, ROWS)
    seconds = given.seconds or (2.0 if given.quick else 10.0)
    plan = Plan(seconds, warmup=100 if given.quick else 500)
    report = Report(machine())
    print(HEADER, flush=True)
    with at(given.keep) as scratch, Upstream(log=scratch / "upstream.jsonl", fast=True) as upstream:
        for name in wanted:
            upstream.reset()
            ROWS[name](report, plan, upstream, scratch)
    show(report)
    problems = [*report.problems, *(problem for row in report.rows for problem in row.problems)]
    return finish(given.json, asdict(report), problems)


if __name__ == "__main__":
    sys.exit(main())
