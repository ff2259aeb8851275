"""How soon Forebay answers, what its processes weigh, and what a replica costs that does nothing.

    python -m benchmarks.start                # about four minutes
    python -m benchmarks.start --quick        # one replica only: about a minute
    python -m benchmarks.start --only import

  import    seconds and modules of `import forebay`, the least of five processes
  replicas  `forebay up` with 1, 2 and 4 replicas: seconds to the first answer, CPU seconds until
            then by process; at rest the CPU, the memory (PSS: shared pages count once) and the
            messages a second, and the memory while requests come at concurrency 64

At rest a system has had requests and is asked nothing. Exit code 1 when an answer is wrong or the
ledger has not a row for each request; missed goals are only told.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml

from benchmarks.options import finish, parser_of, wanted_of
from benchmarks.passthrough import at, forebay_document, ledger_rows, owner_messages, tenant_keys
from benchmarks.processes import Child, free_port, machine
from forebay.secrets import new_key
from tests.support.loader import Load, in_process
from tests.support.upstream import Upstream

PARTS = ("import", "replicas")
REPLICAS = (1, 2, 4)
START_S = 180.0
SETTLE_S = 10.0  # LiteLLM's import, the Batcher, Ray's own first tasks
GOALS = {"import_s": 0.3, "first_answer_s": 20.0}
SECRET = "start-" * 8


@dataclass(slots=True)
class Weight:
    """One kind of process: how many, CPU seconds until the first answer, per cent of a core at
    rest, and MB at rest and under load."""

    count: int = 0
    start_cpu_s: float = 0.0
    rest_cpu: float = 0.0
    rest_mb: float = 0.0
    load_mb: float = 0.0


@dataclass(slots=True)
class Figures:
    """All that was measured."""

    machine: dict[str, Any]
    facts: dict[str, float] = field(default_factory=dict)
    weights: dict[str, dict[str, Weight]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def kind_of(process: psutil.Process) -> str:
    """What a process is there for, in a word or two."""
    line = " ".join(process.cmdline()) or process.name()
    if found := re.search(r"ray::(\w+)", line):
        return found[1]
    for word in ("gcs_server", "raylet", "haproxy", "log_monitor", "monitor", "dashboard"):
        if word in line:
            return word
    return "forebay up" if "forebay up" in line else process.name()


def taken(child: Child) -> dict[int, tuple[str, float, float]]:
    """Of each process that lives: its kind, its CPU seconds, its MB."""
    found = {}
    for process in child.family():
        try:
            cpu_s = sum(process.cpu_times()[:2])
            found[process.pid] = kind_of(process), cpu_s, process.memory_full_info().pss / 2**20
        except psutil.Error:
            continue  # it has just ended
    return found


def imported(figures: Figures, _: Path) -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import forebay;"
        "print(time.perf_counter() - t, len(sys.modules))"
    )
    told = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(5)
    ]
    least_s, modules = min(tuple(map(float, run.stdout.split())) for run in told)
    figures.facts |= {"import_s": round(least_s, 3), "import_modules": modules}
    print(f"import forebay: {least_s:.3f} s, {modules:.0f} modules", flush=True)


def replicas(figures: Figures, scratch: Path, *, counts: Sequence[int], seconds: float) -> None:
    with Upstream(log=scratch / "upstream.jsonl", fast=True) as upstream:
        for count in counts:
            upstream.reset()
            _one(figures, scratch, upstream, count, seconds)


def _one(figures: Figures, scratch: Path, upstream: Upstream, count: int, seconds: float) -> None:
    name = f"{count} replica" + "s" * (count > 1)
    keys, admin, port = tenant_keys(), new_key(), free_port()
    url = f"http://127.0.0.1:{port}"
    home = scratch / f"replicas-{count}"
    home.mkdir()
    document = forebay_document(upstream.url, port, keys, admin, SECRET, caching=True)
    document["server"]["replicas"] = count
    (home / "forebay.yaml").write_text(yaml.safe_dump(document))
    environ = {"FOREBAY_KEY_SECRET": SECRET, "FOREBAY_DATA_DIR": str(home / "data")}
    command = [sys.executable, "-m", "forebay", "up", "--config", str(home / "forebay.yaml")]
    first = {"model": "sim", "messages": [{"role": "user", "content": "The first question"}]}
    with Child(command, home / "up.log", environ) as child:
        where = f"{url}/v1/chat/completions"
        took_s = child.await_200(where, START_S, key=keys[0], body=first)
        weights = figures.weights[name] = _weights(taken(child))
        time.sleep(SETTLE_S)
        load = Load(where, concurrency=64, seconds=seconds, warmup=100, keys=list(keys), check=True)
        with ThreadPoolExecutor(1) as thread:
            loading = thread.submit(in_process, load)
            time.sleep(seconds * 0.75)
            for kind, _, mb in taken(child).values():
                weights.setdefault(kind, Weight()).load_mb += mb
            result = loading.result()
        time.sleep(SETTLE_S)
        _rest(figures, name, child, url, seconds)
        calls = int(upstream.stats()["requests"])
        rows = ledger_rows(url, admin, calls)
    figures.facts[f"{name}: first_answer_s"] = round(took_s, 1)
    figures.facts[f"{name}: requests_per_s"] = round(result.requests_per_s)
    if result.ok != result.requests or result.wrong:
        figures.problems.append(f"{name}: not all were right: {result.statuses} {result.errors}")
    if rows != calls:
        figures.problems.append(f"{name}: {calls} upstream calls, {rows} rows in the ledger")
    _show(figures, name)


def _weights(processes: dict[int, tuple[str, float, float]]) -> dict[str, Weight]:
    weights: dict[str, Weight] = {}
    for kind, cpu_s, _ in processes.values():
        weight = weights.setdefault(kind, Weight())
        weight.count += 1
        weight.start_cpu_s += cpu_s
    return weights


def _rest(figures: Figures, name: str, child: Child, url: str, seconds: float) -> None:
    """What happens while nothing is asked."""
    before, messages = taken(child), owner_messages(url)
    time.sleep(2 * seconds)
    after = taken(child)
    spent = Counter(owner_messages(url))
    spent.subtract(messages)
    figures.facts[f"{name}: messages_per_s at rest"] = round(spent.total() / (2 * seconds), 2)
    for kind, count in spent.most_common():
        if count > 1:
            figures.facts[f"{name}:   {kind}"] = round(count / (2 * seconds), 2)
    for pid, (kind, cpu_s, mb) in after.items():
        weight = figures.weights[name].setdefault(kind, Weight())
        weight.rest_mb += mb
        weight.rest_cpu += 100 * (cpu_s - before.get(pid, (kind, cpu_s, mb))[1]) / (2 * seconds)


def _show(figures: Figures, name: str) -> None:
    print(f"\n{name}")
    for fact, value in figures.facts.items():
        if fact.startswith(f"{name}: "):
            print(f"  {fact.removeprefix(f'{name}: '):32}{value:>10}")
    print(f"  {'':24}{'':>6}{'start':>9}{'at rest':>9}{'at rest':>10}{'load':>10}")
    weights = figures.weights[name]
    whole = Weight()
    for kind, weight in sorted(weights.items(), key=lambda pair: -pair[1].rest_mb):
        _row(kind, weight)
        for part in asdict(weight):
            setattr(whole, part, getattr(whole, part) + getattr(weight, part))
    _row("all", whole)
    sys.stdout.flush()


def _row(kind: str, weight: Weight) -> None:
    print(
        f"  {kind:24}{weight.count:>6}{weight.start_cpu_s:>7.1f} s{weight.rest_cpu:>7.2f} %"
        f"{weight.rest_mb:>7.0f} MB{weight.load_mb:>7.0f} MB"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of("start", __doc__, PARTS, "one replica only")
    given = parser.parse_args(argv)
    wanted = wanted_of(parser, given.only, PARTS)
    seconds = given.seconds or 10.0
    counts = REPLICAS[:1] if given.quick else REPLICAS
    runs: dict[str, Callable[[Figures, Path], None]] = {
        "import": imported,
        "replicas": partial(replicas, counts=counts, seconds=seconds),
    }
    figures = Figures(machine())
    print(figures.machine, flush=True)
    with at(given.keep) as scratch:
        for name in wanted:
            runs[name](figures, scratch)
    for fact, value in figures.facts.items():
        goal = GOALS.get(fact.rpartition(": ")[2])
        if goal is not None:
            print(f"{fact}: {value}, goal {goal}: {'met' if value <= goal else 'MISSED'}")
    for problem in figures.problems:
        print(f"PROBLEM {problem}")
    return finish(given.json, asdict(figures), figures.problems)


if __name__ == "__main__":
    sys.exit(main())
