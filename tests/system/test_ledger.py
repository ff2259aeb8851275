"""Money on a running system: the ledger against the upstream's own log, whatever is killed."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from actors.ledger.policy import Entry
from tests.support.audit import Audit, audit
from tests.support.buyers import IN_FLIGHT_MIN, Buyers
from tests.support.owners import alive_again, handle_of
from tests.support.prometheus_server import prometheus_server
from tests.support.system import ROOT, UpProcess
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

FULL = bool(os.environ.get("FOREBAY_CHAOS_FULL"))
OWNER_KILLS = 300 if FULL else 3
REPLICA_KILLS = 100 if FULL else 1
SETTLED_S = 60.0
"""How soon after the last death every call has its end in the ledger."""
READ_AT_ONCE = 500
ANSWERED = (200, 400, 429, 502, 503, 504)
"""Statuses of requests that have an entry."""
OBEYED_S = 1.0
"""How long a configuration, and a rating, need until every process goes by them."""
FAULTY_ENTRIES = 100_000 if FULL else 5_000
FAULTY_PERCENT = 5 if FULL else 15  # few messages have to meet a fault
SEED = int(os.environ.get("FOREBAY_CHAOS_SEED") or random.SystemRandom().randrange(2**31))


def entries_of(ray: Any, ids: Iterable[str]) -> dict[str, list[Entry]]:
    ledger, names = alive_again(ray, "ledger"), list(ids)
    found: dict[str, list[Entry]] = {}
    for start in range(0, len(names), READ_AT_ONCE):
        part = names[start : start + READ_AT_ONCE]
        told = ray.get([ledger.entries.remote(one) for one in part], timeout=60)
        found.update(zip(part, told, strict=True))
    return found


def judged(ray: Any, buyers: Buyers, upstream: Upstream) -> tuple[Audit, float]:
    """The audit as soon as it finds no fault and no call is open, SETTLED_S from now at the latest;
    and after how many seconds that was."""
    begun_s = time.monotonic()
    while True:
        records, entries = upstream.log(), entries_of(ray, buyers.came)
        found = audit(records, entries, buyers.came)
        found.faults += _unfair(buyers, entries)
        held = ray.get(alive_again(ray, "ledger").holders.remote(), timeout=30)
        if held:
            found.faults.append(f"open: {held}")
        took_s = time.monotonic() - begun_s
        if not found.faults or took_s > SETTLED_S:
            return found, took_s
        time.sleep(0.5)


def _unfair(buyers: Buyers, entries: Mapping[str, list[Entry]]) -> Iterator[str]:
    """Requests in = served + refused + failed."""
    for one in buyers.served:
        ends = [entry for entry in entries[one] if entry.status == "posted" and not entry.error]
        if len(ends) != 1:
            yield f"{one} was served, and has {entries[one]}"
    for one, came in buyers.came.items():
        firsts = sum(entry.attempt == 1 for entry in entries[one])
        if firsts > 1 or (came in ANSWERED and not firsts):
            yield f"{one} came to {came}, and is counted {firsts} times"


async def bought(
    ray: Any, url: str, upstream: Upstream, steps: Callable[[Buyers, random.Random], None]
) -> tuple[Buyers, Audit, float]:
    """Callers buy in every way while `steps` happen; then the books are closed and judged."""
    upstream.script(log_bodies=True, latency=0.2, interval=0.01)
    upstream.script(status=503, probability=0.05)
    buyers = Buyers(url, upstream)
    await buyers.run(lambda: steps(buyers, random.Random(SEED)))
    found, settled_s = await asyncio.to_thread(judged, ray, buyers, upstream)
    return buyers, found, settled_s


async def test_nothing_is_lost_or_doubled_while_the_ledger_is_killed(
    ray_driver: Any, url: str, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(buyers: Buyers, rng: random.Random) -> None:
        for _ in range(OWNER_KILLS):
            buyers.pause(rng.uniform(0.0, 0.5))
            ray_driver.kill(handle_of(ray_driver, "ledger"), no_restart=False)
            alive_again(ray_driver, "ledger")
        buyers.pause(0.5)

    buyers, found, settled_s = await bought(ray_driver, url, upstream, steps)
    with capsys.disabled():
        print(
            f"\n  ledger: owner killed {OWNER_KILLS} times, seed {SEED}, at least "
            f"{buyers.in_flight_min} in flight; {found}; all settled after {settled_s:.1f} s; "
            f"{dict(buyers.statuses)}"
        )

    assert not found.faults, found.faults[:3]
    assert found.posted_nano + found.flagged_log_nano == found.log_nano
    assert buyers.in_flight_min >= IN_FLIGHT_MIN
    assert len(buyers.served) > 2 * IN_FLIGHT_MIN
    # 502 is what three refusals of the upstream in a row are told as.
    assert set(buyers.statuses) <= {200, 502, "left"}


def replicas(up: UpProcess) -> list[psutil.Process]:
    assert up.process is not None
    found = []
    for process in psutil.Process(up.process.pid).children(recursive=True):
        try:
            if any("ServeReplica:forebay:gateway" in part for part in process.cmdline()):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def requests_total(text: str) -> float:
    values = re.findall(r"^forebay_requests_total\{[^}]*\} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for value in values)


async def test_a_killed_replica_leaves_no_call_without_its_entry(
    ray_driver: Any, up: UpProcess, url: str, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between dispatch and answer; whoever is there next hands in what the dead one knew."""
    scraped: list[float] = []

    def scrape() -> None:
        deadline = time.monotonic() + 60
        while True:
            try:
                answer = httpx.get(f"{url}/metrics", timeout=10)
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code == 200:
                scraped.append(requests_total(answer.text))
                return
            assert time.monotonic() < deadline, "no metrics after a minute"
            time.sleep(0.1)

    def steps(buyers: Buyers, rng: random.Random) -> None:
        for _ in range(REPLICA_KILLS):
            buyers.pause(rng.uniform(0.1, 1.0))
            scrape()
            serving = replicas(up)
            assert serving, "no replica is alive"
            rng.choice(serving).send_signal(signal.SIGKILL)
            time.sleep(rng.uniform(0.0, 1.0))
        buyers.pause(1.0)
        scrape()

    buyers, found, settled_s = await bought(ray_driver, url, upstream, steps)
    with capsys.disabled():
        print(
            f"\n  ledger: {REPLICA_KILLS} replicas killed, seed {SEED}, at least "
            f"{buyers.in_flight_min} in flight; {found}; all settled after {settled_s:.1f} s; "
            f"{dict(buyers.statuses)}"
        )

    assert not found.faults, found.faults[:3]
    assert found.flagged >= REPLICA_KILLS
    assert buyers.in_flight_min >= IN_FLIGHT_MIN
    assert scraped == sorted(scraped)


def test_messages_lost_before_during_and_after_change_no_sum(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """So many per cent each, by Ray's own fault injection, in a Ray of its own."""
    done = subprocess.run(
        [
            sys.executable, "-m", "tests.support.rpc_faults", str(tmp_path),
            "--entries", str(FAULTY_ENTRIES), "--percent", str(FAULTY_PERCENT),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(
            f"\n  ledger: {told['rows']} of {told['written']} entries over messages of which "
            f"{FAULTY_PERCENT} % are lost before, while and after they are read; "
            f"{told['owner']['messages']} of them, {told['failures']} failed, "
            f"{told['owner']['rows_known']} rows came again"
        )

    assert told["written"] == told["acknowledged"] == told["rows"] == FAULTY_ENTRIES
    assert told["usage"]["total_cost_nano"] == 7 * FAULTY_ENTRIES
    assert told["failures"] + told["owner"]["rows_known"] > 0


def test_prometheus_scrapes_the_whole_system(url: str, upstream: Upstream, tmp_path: Path) -> None:
    """Debian's own program, with the configuration and the alerts that we give to users."""
    asked = {"model": "paid", "messages": [{"role": "user", "content": "for the metrics"}]}
    with prometheus_server(tmp_path, url.removeprefix("http://")) as prometheus:
        total = 'sum(forebay_requests_total{model="paid"}) or vector(0)'
        prometheus.wait_for("up == 1")
        before = sum(prometheus.query(total).values())
        for _ in range(5):
            assert httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).is_success
        prometheus.wait_for(f"({total}) >= {before + 5}")
        after = sum(prometheus.query(total).values())

    assert after == before + 5


async def test_what_callers_rate_higher_is_called_more(
    url: str, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 ratings, 9 of 10 good for one deployment, 1 of 10 for the other; then 500 calls."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        held = (await client.get("/admin/config")).json()
        document = held["config"]
        steered = {**document, "gateway": {**document["gateway"], "routing": "feedback"}}
        await _put(client, steered)
        try:
            before = await _asked(client, 200)
            good, bad = sorted(set(before.values()))
            for number, (response_id, deployment) in enumerate(before.items()):
                fine = (number % 10 != 0) == (deployment == good)
                told = {"response_id": response_id, "rating": 5 if fine else 1}
                assert (await client.post("/v1/feedback", json=told)).status_code == 201
            await asyncio.sleep(OBEYED_S)
            after = Counter((await _asked(client, 500)).values())
            stats = (await client.get("/v1/feedback/stats")).text
        finally:
            await _put(client, document)
    with capsys.disabled():
        print(
            f"\n  ledger: of 500 calls after 200 ratings at 90/10 {after[good]} went to the better"
        )

    assert after[good] >= 0.7 * 500
    assert good in stats
    assert bad in stats


async def _put(client: httpx.AsyncClient, document: Any) -> None:
    put = await client.put("/admin/config", json=document)
    assert put.status_code == 200, put.text
    await asyncio.sleep(OBEYED_S)


async def _asked(client: httpx.AsyncClient, count: int) -> dict[str, str]:
    """The ids of so many answers, and the deployments that gave them."""
    found: dict[str, str] = {}
    places = asyncio.Semaphore(16)

    async def ask(number: int) -> None:
        async with places:
            message = {"role": "user", "content": f"steered {number} {random.random()}"}
            answer = await client.post(
                "/v1/chat/completions", json={"model": "pair", "messages": [message]}
            )
        assert answer.status_code == 200, answer.text
        found[answer.json()["id"]] = answer.headers["x-forebay-deployment"]

    await asyncio.gather(*(ask(number) for number in range(count)))
    return found


async def test_a_keyed_request_is_made_once_whatever_is_killed(
    ray_driver: Any, up: UpProcess, url: str, upstream: Upstream
) -> None:
    key = {"idempotency-key": f"order-{random.random()}"}
    message = {"role": "user", "content": f"once {random.random()}"}
    body = {"model": "paid", "messages": [message], "max_tokens": 16}
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        first = await client.post("/v1/chat/completions", json=body, headers=key)
        ray_driver.kill(handle_of(ray_driver, "ledger"), no_restart=True)
        for replica in replicas(up):
            replica.send_signal(signal.SIGKILL)
        await _ready(client)
        again = await client.post("/v1/chat/completions", json=body, headers=key)
        other = await client.post(
            "/v1/chat/completions", json={**body, "max_tokens": 17}, headers=key
        )

    assert (first.status_code, again.status_code, other.status_code) == (200, 200, 409)
    assert again.json() == first.json()
    assert len(upstream.log()) == 1


async def _ready(client: httpx.AsyncClient) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if (await client.get("/health/ready")).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline, "no replica after a minute"
        await asyncio.sleep(0.1)
