"""What a whole system does when providers fail, with the upstream's log as the judge.

A system of its own: two replicas, and a model group for each test, so that no test finds a breaker
that another one opened; four replicas with FOREBAY_CHAOS_FULL, and the full counts
(`python -m tests.chaos --full`). What was measured is printed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import orjson
import psutil  # type: ignore[import-untyped]
import pytest

from tests.support import oracle
from tests.support import system as support
from tests.support.driver import Driver
from tests.support.herd import Herd
from tests.support.tenants import (
    ADMIN,
    SECRET,
    SIM_KEY,
    Tenants,
    chat,
    found,
    limits,
    question,
    running,
    statuses,
    upstream_sockets,
    warm,
)
from tests.support.upstream import Record, Upstream

pytestmark = [pytest.mark.ray, pytest.mark.chaos]

FULL = bool(os.environ.get("FOREBAY_CHAOS_FULL"))
SEED = int(os.environ.get("FOREBAY_CHAOS_SEED") or random.SystemRandom().randrange(2**31))
REPLICAS = 4 if FULL else 2
BREAKER = "circuit-breaker"
THRESHOLD = 5
OPEN_S = 1.0
LEASE_S = 5.0
TOLD_S = 0.15
"""How long it may take until every replica knows what the breaker's owner decided."""
THROTTLE_S = 5 if FULL else 3
STALL_S = 1.0
RETRY_SHARE, RETRIES_PER_S, RETRIES_AT_ONCE = 0.1, 3.0, 30
LEFT_WITHIN_S = 1.0
IN_FLIGHT_MIN = 16

TENANTS: dict[str, dict[str, Any] | None] = {
    "free": None,
    "innocent": None,
    "cut": limits(
        concurrent_requests=100,
        requests_per_minute=600_000,
        burst_size=5_000,
        tokens_per_minute=100_000_000,
    ),
}


def model_list(url: str) -> list[dict[str, Any]]:
    """Groups whose deployments go by the names of their models at the simulator."""

    def one(group: str, model: str, *, name: str | None = None, **more: Any) -> dict[str, Any]:
        params = {"model": f"openai/{model}", "api_base": f"{url}/v1", **more}
        return {
            "model_name": group,
            "litellm_params": {"api_key": "os.environ/SIM_KEY", **params},
            "model_info": {"id": name or model},
        }

    return [
        one("sim", "sim"),
        *(one(f"gone-{kind}", f"gone-{kind}") for kind in ("reset", "status")),
        one("mended", "mended"),
        one("flaps", "flaps-bad", weight=1),
        one("flaps", "flaps-good", weight=1),
        one("blameless", "blameless"),
        one("named/*", "*", name="named"),
        one("forced", "forced"),
        one("forced-embed", "text-embedding-forced"),
        one("half", "half-bad", weight=1),
        one("half", "half-good", weight=1),
        *(one(f"throttled-{kind}", f"throttled-{kind}") for kind in ("seconds", "date")),
        one("revoked", "revoked-key", order=1),
        one("revoked", "revoked-other", order=2),
        one("streams", "streams"),
        one("stalls", "stalls"),
        one("own-stall", "own-stall", timeout=1.0),
        one("ordered", "ordered"),
        one("told", "told"),
    ]


GATEWAY = {
    "max_retries": 2,
    "retry_delay": 0.1,
    "stall_timeout": STALL_S,
    "circuit_breaker_config": {"failure_threshold": THRESHOLD, "timeout": OPEN_S},
}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Tenants, Herd]]:
    data_dir = tmp_path_factory.mktemp("failures")
    env = support.environment(data_dir, SIM_KEY=SIM_KEY, FOREBAY_KEY_SECRET=SECRET)
    with (
        Upstream() as upstream,
        Herd(env) as herd,
        running(
            data_dir,
            TENANTS,
            model_list(upstream.url),
            upstream,
            replicas=REPLICAS,
            gateway=GATEWAY,
        ) as system,
    ):
        herd.attach(system.up.ray_address)
        asyncio.run(warm(system, REPLICAS))
        yield system, herd


@pytest.fixture
def system(parts: tuple[Tenants, Herd]) -> Tenants:
    parts[0].upstream.reset()
    return parts[0]


@pytest.fixture
def herd(parts: tuple[Tenants, Herd]) -> Herd:
    return parts[1]


@pytest.fixture(scope="module")
def driver(parts: tuple[Tenants, Herd]) -> Iterator[Driver]:
    with parts[0].driver() as made:
        yield made


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def tell(words: str) -> None:
        with capsys.disabled():
            print(f"\n  failures: {words}")

    return tell


# --------------------------------------------------------------------------------------- callers


async def pound(
    send: Callable[[], Awaitable[httpx.Response]],
    seconds: float,
    callers: int,
    *,
    pause_s: float = 0.1,
    over_s: float = 0.0,
) -> list[httpx.Response]:
    """So many callers for so long, who begin one after another in the first `over_s`.

    Who fails comes back soon, whatever it was told.
    """
    until_s = time.monotonic() + seconds
    answers: list[httpx.Response] = []

    async def caller(number: int) -> None:
        await asyncio.sleep(over_s * number / callers)
        while time.monotonic() < until_s:
            answers.append(await send())
            if answers[-1].status_code != 200:
                await asyncio.sleep(pause_s)

    await asyncio.gather(*(caller(number) for number in range(callers)))
    return answers


async def at_rate(
    send: Callable[[float], Awaitable[httpx.Response]], per_s: float, seconds: float
) -> list[httpx.Response]:
    """Begin so many requests a second for so long, answered or not; `send` is told the time."""
    begun_s = time.monotonic()
    sent: list[asyncio.Task[httpx.Response]] = []

    async def one(at_s: float) -> httpx.Response:
        return await send(at_s)

    while (at_s := len(sent) / per_s) < seconds:
        await asyncio.sleep(begun_s + at_s - time.monotonic())
        sent.append(asyncio.create_task(one(at_s)))
    return list(await asyncio.gather(*sent))


async def force(
    client: httpx.AsyncClient, system: Tenants, deployment: str, state: str
) -> httpx.Response:
    return await client.post(
        f"/admin/breakers/{deployment}", json={"state": state}, headers=system.headers(ADMIN)
    )


async def standing(driver: Driver, deployment: str) -> dict[str, Any]:
    """What the breaker's owner says of a deployment; empty where it never heard of it."""
    board = await asyncio.to_thread(driver.asked, BREAKER, "board")
    told: dict[str, Any] = board.get(deployment, {})
    return told


async def until(done: Callable[[], Awaitable[bool]], timeout_s: float, what: str) -> float:
    """Ask until it is so; the seconds it took."""
    begun_s = time.monotonic()
    while not await done():
        assert time.monotonic() - begun_s < timeout_s, f"not within {timeout_s} s: {what}"
        await asyncio.sleep(0.02)
    return time.monotonic() - begun_s


def of(system: Tenants, *models: str) -> list[Record]:
    return [record for record in system.upstream.log() if record.model in models]


def retry_after_s(response: httpx.Response) -> float:
    assert "retry-after" in response.headers, response.text
    wait_s = float(response.headers["retry-after-ms"]) / 1000
    assert 0 <= float(response.headers["retry-after"]) - wait_s < 1.0
    return wait_s


# ------------------------------------------------------------------------------- a dead upstream


@pytest.mark.parametrize("kind", ["reset", "status"])
async def test_a_dead_upstream_is_left_alone_by_every_replica(
    system: Tenants, say: Callable[[str], None], kind: str
) -> None:
    """The deciding failure is the fifth; what follows was under way, or did not know yet."""
    model, callers = f"gone-{kind}", 16 * REPLICAS
    fault: dict[str, Any] = {"reset": "before"} if kind == "reset" else {"status": 503}
    system.upstream.script(model=model, latency=0.5, **fault)
    async with system.client() as client:
        answers = await pound(
            lambda: chat(client, system, "free", model=model), 2.3, callers, over_s=0.4
        )
    records = of(system, model)
    decided_s = oracle.ends_s(records)[THRESHOLD - 1]
    under_way = oracle.under_way(records, decided_s)
    opens_s = decided_s + OPEN_S
    after = [t - decided_s for t in oracle.starts_s(records) if decided_s < t < opens_s]
    late = [t for t in after if t > TOLD_S]
    probes = [r for r in records if r.start_mono_ns / oracle.NANO >= opens_s]
    refused = [r for r in answers if r.status_code == 503]
    say(
        f"{model}, {REPLICAS} replicas, {callers} callers: {under_way} in flight at the deciding "
        f"failure, {len(after)} began after it, the last {max(after, default=0) * 1000:.0f} ms "
        f"after; then {len(probes)} probes; answers {dict(statuses(answers))}"
    )
    assert under_way >= IN_FLIGHT_MIN
    assert len(after) <= callers
    assert late == []
    assert oracle.most_at_once(probes) <= 1
    assert set(statuses(answers)) <= {502, 503}
    assert refused
    assert {found(r.json(), "code")[0] for r in refused} == {"circuit_open"}
    waits_s = [retry_after_s(r) for r in refused]
    assert 0 < min(waits_s) <= max(waits_s) <= LEASE_S  # while a probe is out, its lease


# --------------------------------------------------------------------------------------- probes


@dataclass(slots=True)
class Recovery:
    """One time that a dead upstream came back, by its log: from its healing to the closing."""

    at_once: int
    wait_s: float
    killed: bool


@pytest.mark.timeout(1800 if FULL else 120)
async def test_one_probe_at_a_time_even_when_the_prober_is_killed(
    system: Tenants, herd: Herd, driver: Driver, say: Callable[[str], None]
) -> None:
    """All processes ask all the time. In every second recovery who holds the probe is killed."""
    count, width = (100, 3) if FULL else (2, 2)
    recoveries: list[Recovery] = []
    pids = await asyncio.to_thread(herd.start, width, model="mended", tenant="free")
    try:
        for number in range(count):
            recoveries.append(await _recover(system, driver, pids if number % 2 == 0 else None))
            if number + 1 < count:
                await asyncio.sleep(OPEN_S)  # well for so long: it does not count as flapping
            if number + 1 < count and len(pids) < width - 1:
                pids += await asyncio.to_thread(herd.start, 1, model="mended", tenant="free")
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    killed = [r.wait_s for r in recoveries if r.killed]
    plain = [r.wait_s for r in recoveries if not r.killed]
    say(
        f"{count} recoveries, {len(killed)} with the prober killed: at most "
        f"{max(r.at_once for r in recoveries)} probe at once; closed within {max(killed):.1f} s "
        f"where it was killed, {max(plain, default=0):.1f} s where not"
    )
    assert max(r.at_once for r in recoveries) == 1
    assert len(killed) >= count // 2


async def _recover(system: Tenants, driver: Driver, pids: list[int] | None) -> Recovery:
    """Break the upstream, heal it, and kill who probes (of `pids`); both ends by the log."""
    system.upstream.reset()
    system.upstream.script(model="mended", reset="before")

    async def is_open() -> bool:
        return (await standing(driver, "mended")).get("state") in ("open", "half_open")

    async def is_closed() -> bool:
        return (await standing(driver, "mended")).get("state") == "closed"

    await until(is_open, 20, "the circuit opens")
    await asyncio.to_thread(_quiet, system, "mended")
    system.upstream.reset()
    system.upstream.script(model="mended", latency=0.3, log_bodies=True)
    healed_s = time.monotonic()
    stopped = asyncio.Event()
    asking: list[asyncio.Task[None]] = []
    async with system.client() as client:

        async def caller() -> None:
            while not stopped.is_set():
                await chat(client, system, "free", model="mended")
                await asyncio.sleep(0.05)

        def ask() -> None:
            asking.extend(asyncio.create_task(caller()) for _ in range(2 * REPLICAS))

        try:
            if pids is None:
                ask()
            else:
                probe = (await asyncio.to_thread(system.upstream.wait_log, bool, 90.0))[0]
                pid = int(probe.prompt.split()[0].removeprefix("pid="))
                os.kill(pid, signal.SIGKILL)
                pids.remove(pid)
                ask()
            await until(is_closed, 90, "the circuit closes")
        finally:
            stopped.set()
            await asyncio.gather(*asking)
    records = of(system, "mended")
    answered = sorted(
        r.end_mono_ns for r in records if r.end_mono_ns is not None and not r.disconnected
    )
    closing_ns = answered[1]  # the second success closes
    probes = [r for r in records if r.start_mono_ns < closing_ns]
    return Recovery(
        oracle.most_at_once(probes), closing_ns / oracle.NANO - healed_s, pids is not None
    )


def _quiet(system: Tenants, model: str) -> None:
    """Wait until no call is under way, so that the next one is a probe."""
    system.upstream.wait_log(lambda log: all(r.finished for r in log if r.model == model), 5.0)


# --------------------------------------------------------------------------------------- flapping


async def test_a_flapping_deployment_wastes_few_calls(
    system: Tenants, say: Callable[[str], None]
) -> None:
    """It is reset and well by turns, five seconds each in full. Its neighbour is always well."""
    per_s, seconds, turn_s = (80.0, 60.0, 5.0) if FULL else (40.0, 4.5, 1.5)
    system.upstream.script(model="flaps-bad", text="phase=bad", reset="before")
    async with system.client(200) as client:

        async def send(at_s: float) -> httpx.Response:
            phase = "good" if at_s // turn_s % 2 else "bad"
            return await chat(client, system, "free", f"phase={phase}", model="flaps")

        answers = await at_rate(send, per_s, seconds)
    records = of(system, "flaps-bad", "flaps-good")
    wasted = sum(r.fault == "reset" for r in records)
    turns = -(-seconds // (2 * turn_s))
    say(
        f"flapping each {turn_s:g} s for {seconds:g} s at {per_s:g} requests/s: {wasted} of "
        f"{len(records)} calls wasted, {wasted / len(records):.1%}; "
        f"answers {dict(statuses(answers))}"
    )
    assert {r.model for r in records} == {"flaps-bad", "flaps-good"}
    if FULL:
        assert wasted / len(records) <= 0.02
    else:  # at most what decides, as many in flight, and a probe or two
        assert wasted <= turns * (2 * THRESHOLD + 2)
    assert statuses(answers)[200] >= 0.99 * len(answers)


# ---------------------------------------------------------------------------- the callers' doing


async def _blameless(client: httpx.AsyncClient, system: Tenants, number: int) -> str:
    """One request that ends badly, and not by the provider's fault."""
    way = number % 9
    rng = random.Random(f"{SEED} {number}")
    if way < 5:
        words = f"[[status={(400, 404, 409, 413, 422)[way]}]]"
    elif way == 5:
        words = "[[status=400 code=content_filter]]"
    else:
        words = "[[latency=5]]"
    headers = {"x-forebay-timeout": "0.1"} if way == 6 else {}
    asking = chat(client, system, "free", words, model="blameless", headers=headers)
    if way == 7:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asking, rng.uniform(0.02, 0.1))
        return "gone"
    if way == 8:
        asking.close()
        response = await chat(client, system, "free", "[[status=404]]", model=f"named/{number}")
    else:
        response = await asking
    return str(response.status_code)


@pytest.mark.timeout(1800)
async def test_what_callers_do_wrong_changes_no_breaker(
    system: Tenants, driver: Driver, say: Callable[[str], None]
) -> None:
    count = 10_000 if FULL else 180
    outcomes: Counter[str] = Counter()
    numbers = iter(range(count))
    innocent: list[httpx.Response] = []
    before = await asyncio.to_thread(driver.asked, BREAKER, "board")
    async with system.client() as client:

        async def caller() -> None:
            for number in numbers:
                outcomes[await _blameless(client, system, number)] += 1
                if number % 10 == 0:
                    innocent.append(await chat(client, system, "innocent", model="blameless"))

        await asyncio.gather(*(caller() for _ in range(32)))
    after = await asyncio.to_thread(driver.asked, BREAKER, "board")
    say(f"{count} errors of callers {dict(outcomes)}, {len(innocent)} others beside them")
    assert set(outcomes) == {"400", "404", "413", "422", "504", "gone"}, outcomes
    for deployment in ("blameless", "named"):
        told = after.get(deployment, {"state": "closed"})
        assert told["state"] == "closed"
        assert told.get("generation") == before.get(deployment, told).get("generation")
    assert statuses(innocent) == {200: len(innocent)}


# ---------------------------------------------------------------------------------------- retries


@pytest.mark.timeout(300)
@pytest.mark.parametrize("route", ["chat", "embeddings"])
async def test_retries_stay_within_the_clusters_budget(
    system: Tenants, say: Callable[[str], None], route: str
) -> None:
    """503 to everything, the breaker forced closed: one budget for all replicas, on each route."""
    per_s, seconds = (50.0, 60.0) if FULL else (40.0, 3.0)
    model = "forced" if route == "chat" else "text-embedding-forced"
    async with system.client(300) as client:
        assert (await force(client, system, model, "closed")).status_code == 200

        async def send(_: float) -> httpx.Response:
            if route == "chat":
                return await chat(client, system, "free", model="forced")
            body = {"model": "forced-embed", "input": question()[0]["content"]}
            return await client.post("/v1/embeddings", json=body, headers=system.headers("free"))

        assert (await send(0)).status_code == 200  # the Batcher's first call takes seconds
        system.upstream.reset()
        system.upstream.script(model=model, status=503)
        answers = await at_rate(send, per_s, seconds)
        assert (await force(client, system, model, "auto")).status_code == 200
    records = of(system, model)
    starts = oracle.starts_s(records)
    share = len(records) / len(answers)
    # A retry's own outcome earns, too.
    earned = len(answers) * RETRY_SHARE * (1 + RETRY_SHARE + RETRY_SHARE**2)
    by_time = RETRIES_AT_ONCE + RETRIES_PER_S * (starts[-1] - starts[0])
    allowed = len(answers) + earned + by_time
    say(
        f"{route}: 503 for {seconds:g} s at {per_s:g} requests/s: {len(records)} calls for "
        f"{len(answers)} requests, {share:.3f} each; {allowed:.0f} allowed"
    )
    assert len(records) <= allowed
    if route == "chat":  # embeddings of several callers share calls
        assert len(records) > len(answers)
    if FULL:
        assert share <= 1.2
    assert set(statuses(answers)) == {502}


async def test_a_deployment_that_fails_half_its_calls_is_hardly_noticed(
    system: Tenants, say: Callable[[str], None]
) -> None:
    per_s, seconds = (40.0, 60.0) if FULL else (40.0, 4.0)
    system.upstream.script(seed=SEED)
    system.upstream.script(model="half-bad", probability=0.5, status=503)
    async with system.client(200) as client:
        answers = await at_rate(
            lambda _: chat(client, system, "free", model="half"), per_s, seconds
        )
    records = of(system, "half-bad", "half-good")
    served = statuses(answers)[200] / len(answers)
    wrong = [r for r in answers if not _tells_the_truth(r)]
    say(
        f"one of two fails half its calls, seed {SEED}: {served:.1%} of {len(answers)} served, "
        f"{len(records)} calls, {sum(r.status == 503 for r in records)} failed, "
        f"answers {dict(statuses(answers))}"
    )
    assert any(r.status == 503 for r in records)
    assert served >= 0.99
    assert wrong == []


def _tells_the_truth(response: httpx.Response) -> bool:
    """Whether an answer's headers say who gave it, and after how many attempts."""
    if response.status_code != 200:
        return True
    told = response.headers
    attempts = int(told["x-forebay-attempts"])
    return (
        told["x-forebay-deployment"] == response.json()["model"]
        and told["x-litellm-attempted-retries"] == str(attempts - 1)
        and told["x-litellm-attempted-fallbacks"] == "0"
    )


# --------------------------------------------------------------------------------------- throttles


async def test_nobody_calls_before_the_retry_after_is_over(
    system: Tenants, herd: Herd, say: Callable[[str], None]
) -> None:
    """One 429 that asks for some seconds, as a number and as a date; every process keeps asking."""
    kinds = {"seconds": f"{THROTTLE_S}", "date": f"date+{THROTTLE_S}"}
    pids = await asyncio.to_thread(herd.start, 1, model="throttled-seconds", tenant="free")
    answers: dict[str, list[httpx.Response]] = {}
    try:
        for kind, told in kinds.items():
            model = f"throttled-{kind}"
            system.upstream.script(model=model, count=1, status=429, retry_after=told)
        async with system.client() as client:

            async def ask(kind: str) -> None:
                model = f"throttled-{kind}"
                answers[kind] = await pound(
                    lambda: chat(client, system, "free", model=model),
                    THROTTLE_S + 1.8, 4 * REPLICAS, pause_s=0.2,
                )  # fmt: skip

            await asyncio.gather(*(ask(kind) for kind in kinds))
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    for kind in kinds:
        records = of(system, f"throttled-{kind}")
        (throttle,) = [r for r in records if r.status == 429]
        assert throttle.end_mono_ns is not None
        at_s = throttle.end_mono_ns / oracle.NANO
        # A date has whole seconds: up to one less than what was meant.
        least_s = THROTTLE_S if kind == "seconds" else _until_date(throttle, THROTTLE_S)
        after = [t - at_s for t in oracle.starts_s(records) if t > at_s]
        early = [t for t in after if TOLD_S < t < least_s]
        back_s = min((t for t in after if t >= least_s), default=99.0)
        refused = [r for r in answers[kind] if r.status_code != 200]
        say(
            f"429 with Retry-After in {kind}: {len(after) - len([t for t in after if t > TOLD_S])} "
            f"calls within {TOLD_S * 1000:.0f} ms, {len(early)} then until {least_s:.2f} s, the "
            f"next after {back_s:.2f} s; answers {dict(statuses(answers[kind]))}"
        )
        assert early == []
        assert back_s <= THROTTLE_S + 1.5
        assert set(statuses(answers[kind])) <= {200, 429, 503}
        assert refused
        assert all(0 < retry_after_s(r) <= THROTTLE_S + 0.05 for r in refused)


def _until_date(record: Record, meant_s: float) -> float:
    """Seconds from the end of a call to the date it named: whole seconds after it began."""
    assert record.end_ns is not None
    named_s = int(record.start_ns / oracle.NANO + meant_s)
    return named_s - record.end_ns / oracle.NANO


async def test_a_refused_credential_is_taken_out_at_once(
    system: Tenants, driver: Driver, say: Callable[[str], None]
) -> None:
    """Going to the other deployment spends of the retry budget: fewer ask than it has at once."""
    system.upstream.script(model="revoked-key", status=401, leak=True)
    callers = 6 * REPLICAS
    assert callers < RETRIES_AT_ONCE
    async with system.client() as client:
        answers = await pound(lambda: chat(client, system, "free", model="revoked"), 0.9, callers)
    records = of(system, "revoked-key")
    decided_s = oracle.ends_s(records)[0]
    late = [t for t in oracle.starts_s(records) if t > decided_s + TOLD_S]
    told = await standing(driver, "revoked-key")
    say(f"401: {len(records)} calls with that key, {len(late)} of them late; "
        f"answers {dict(statuses(answers))}")  # fmt: skip
    assert late == []
    assert statuses(answers) == {200: len(answers)}
    assert told["state"] in ("open", "half_open")
    assert "credential" in told["reason"]


# ---------------------------------------------------------------------------------------- streams


@dataclass(slots=True)
class Cuts:
    """What came of many streams: how they ended here, and when this side hung up."""

    ends: Counter[str] = field(default_factory=Counter)
    left_s: dict[str, float] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


async def _cut(client: httpx.AsyncClient, system: Tenants, number: int, told: Cuts) -> None:
    """One stream: left by us (even numbers) or broken off by the upstream at a random chunk."""
    rng = random.Random(f"{SEED} {number}")
    at, ours = rng.randrange(2, 16), number % 2 == 0
    words = f"cut={number} [[tokens=20 interval=0.03{'' if ours else f' cut-after={at}'}]]"
    body = {
        "model": "streams",
        "stream": True,
        "messages": [{"role": "user", "content": words}],
    }
    events: list[bytes] = []
    async with client.stream(
        "POST", "/v1/chat/completions", json=body, headers=system.headers("cut")
    ) as response:
        if response.status_code != 200:
            told.wrong.append(f"{number}: {response.status_code} {await response.aread()!r}")
            return
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: ").encode())
                if ours and len(events) == at:
                    break
    if ours:
        told.left_s[f"cut={number}"] = time.monotonic()
        told.ends["left"] += 1
        return
    parsed = [orjson.loads(event) for event in events if event != b"[DONE]"]
    ended_well = events[-1] == b"[DONE]" and "error" in parsed[-1]
    merged = len({chunk["id"] for chunk in parsed if "id" in chunk}) != 1
    told.ends["broken off"] += 1
    if not ended_well or merged or any("error" in chunk for chunk in parsed[:-1]):
        told.wrong.append(f"{number}: {events[-2:]!r}")


@pytest.mark.timeout(900)
async def test_streams_that_are_cut_leave_one_entry_each_and_nothing_else(
    system: Tenants, driver: Driver, say: Callable[[str], None]
) -> None:
    count, callers = (1000, 48) if FULL else (100, 25)
    told = Cuts()
    numbers = iter(range(count))
    system.upstream.script(log_bodies=True)

    async def entries() -> dict[str, Any]:
        usage: dict[str, Any] = await asyncio.to_thread(driver.asked, "ledger", "usage", "cut")
        return usage

    async with system.client() as client:
        assert (await force(client, system, "streams", "closed")).status_code == 200
        await asyncio.gather(
            *(
                chat(client, system, "free", "[[latency=0.2]]", model="streams")
                for _ in range(callers)
            )
        )
        before, base = await entries(), _open_files(system)
        sockets = upstream_sockets(system)

        async def caller() -> None:
            for number in numbers:
                await _cut(client, system, number, told)

        await asyncio.gather(*(caller() for _ in range(callers)))
    records = [
        r for r in await asyncio.to_thread(_all_over, system, count) if r.prompt.startswith("cut=")
    ]
    wanted = int(before["entries"]) + count

    async def booked() -> bool:
        return int((await entries())["entries"]) >= wanted

    await until(booked, 10, f"{count} entries")
    await asyncio.sleep(1.0)  # were there more, they would be here by now
    after = await entries()
    async with system.client() as client:
        state = await client.get(
            "/api/v1/gateway/rate-limits?tenant=cut", headers=system.headers(ADMIN)
        )
        await force(client, system, "streams", "auto")
    late = {
        r.prompt.split()[0]: r.end_mono_ns / oracle.NANO - told.left_s[r.prompt.split()[0]]
        for r in records
        if r.end_mono_ns is not None and r.prompt.split()[0] in told.left_s
    }
    estimated = after["estimated_entries"] - before["estimated_entries"]
    left_open = {p: n - sockets.get(p, 0) for p, n in upstream_sockets(system).items()}
    grown = {p: n - base[p] for p, n in _open_files(system).items() if p in base}
    say(
        f"{count} streams {dict(told.ends)}, seed {SEED}: {after['entries'] - before['entries']} "
        f"entries, {estimated} estimated; upstream closed at most {max(late.values()):.2f} s "
        f"after the client; sockets {left_open} and "
        f"files {grown} more than before"
    )
    assert told.wrong == []
    assert len(records) == count
    assert after["entries"] == wanted
    assert estimated == count
    assert max(late.values()) <= LEFT_WITHIN_S
    held = state.json()["data"]["now"]  # forgotten, where nothing is held
    assert not held["known"] or found(held, "in_use") + found(held, "reserved") == [0, 0], held
    assert max(left_open.values()) <= 2
    assert max(grown.values()) <= 4


def _all_over(system: Tenants, count: int) -> list[Record]:
    return system.upstream.wait_log(
        lambda log: (
            sum(r.prompt.startswith("cut=") for r in log) >= count and all(r.finished for r in log)
        ),
        10.0,
    )


def _open_files(system: Tenants) -> dict[int, int]:
    files = {}
    for process in system.replicas():
        with contextlib.suppress(psutil.NoSuchProcess):
            files[process.pid] = process.num_fds()
    return files


async def test_a_stream_that_stalls_is_ended_in_time(
    system: Tenants, say: Callable[[str], None]
) -> None:
    body = {"model": "stalls", "stream": True, "messages": question("[[stall-after=4]]")}
    begun_s = time.monotonic()
    async with system.client() as client:
        response = await client.post(
            "/v1/chat/completions", json=body, headers=system.headers("free")
        )
    took_s = time.monotonic() - begun_s
    (record,) = await asyncio.to_thread(system.upstream.wait_log, 1)
    events = [e.removeprefix("data: ") for e in response.text.split("\n\n") if e]
    say(f"a stream that stalls is ended after {took_s:.2f} s")
    assert events[-1] == "[DONE]"
    assert orjson.loads(events[-2])["error"]["code"] == "stream_stalled"
    assert STALL_S <= took_s <= STALL_S + 1.0
    assert record.disconnected


# ----------------------------------------------------------------------------- our own standstill


async def test_our_own_standstill_blames_nobody(
    system: Tenants, driver: Driver, say: Callable[[str], None]
) -> None:
    """All replicas stand still while 16 calls are under way, past their deadlines."""
    system.upstream.script(model="own-stall", latency=0.6)
    async with system.client() as client:
        asking = [
            asyncio.create_task(chat(client, system, "free", model="own-stall"))
            for _ in range(IN_FLIGHT_MIN)
        ]
        await asyncio.to_thread(
            system.upstream.wait_log, lambda log: len(log) >= IN_FLIGHT_MIN, 5.0
        )
        replicas = [process.pid for process in system.replicas()]
        for pid in replicas:
            os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(1.5)
        finally:
            for pid in replicas:
                os.kill(pid, signal.SIGCONT)
        stood = await asyncio.gather(*asking)
        told = await standing(driver, "own-stall")
        system.upstream.reset()
        after = await asyncio.gather(
            *(chat(client, system, "free", model="own-stall") for _ in range(IN_FLIGHT_MIN))
        )
    say(f"1.5 s without a loop: {dict(statuses(stood))}, then {dict(statuses(after))}, {told}")
    assert told.get("state", "closed") == "closed"
    assert statuses(after) == {200: IN_FLIGHT_MIN}


# --------------------------------------------------------------------------------- operators' door


async def test_every_replica_obeys_the_operator_within_a_second(
    system: Tenants, say: Callable[[str], None]
) -> None:
    async def everywhere(client: httpx.AsyncClient) -> set[int]:
        asked = (chat(client, system, "free", model="ordered") for _ in range(8 * REPLICAS))
        return set(statuses(await asyncio.gather(*asked)))

    took_s = []
    async with system.client() as client:
        for state, status in (("open", 503), ("closed", 200), ("open", 503), ("auto", 200)):
            assert (await force(client, system, "ordered", state)).status_code == 200
            begun_s = time.monotonic()
            while await everywhere(client) != {status}:
                assert time.monotonic() - begun_s < 5.0
            took_s.append(time.monotonic() - begun_s)
            again = await everywhere(client)
            assert again == {status}
        unknown = await force(client, system, "no-such-deployment", "open")
        wrong = await force(client, system, "ordered", "ajar")
        mere = await client.post(
            "/admin/breakers/ordered", json={"state": "open"}, headers=system.headers("free")
        )
    say(f"open, closed, open, auto: all {REPLICAS} replicas after at most {max(took_s):.2f} s")
    assert max(took_s) <= 1.0
    assert [r.status_code for r in (unknown, wrong, mere)] == [404, 400, 403]
    assert found(wrong.json(), "param") == ["state"]


async def test_breakers_and_health_are_told_and_recover(
    system: Tenants, driver: Driver, say: Callable[[str], None]
) -> None:
    async with system.client() as client:

        async def health() -> dict[str, Any]:
            response = await client.get("/health/detail", headers=system.headers(ADMIN))
            told: dict[str, Any] = response.json()
            return told

        async def is_healthy() -> bool:
            return bool((await health())["status"] == "healthy")

        async def is_degraded() -> bool:
            return bool((await health())["status"] == "degraded")

        for name in await asyncio.to_thread(driver.asked, BREAKER, "board"):
            for state in ("closed", "auto"):  # what other tests have left open
                await force(client, system, name, state)
        await until(is_healthy, 5, "healthy before")
        await force(client, system, "ordered", "open")
        degraded_s = await until(is_degraded, 5, "degraded")
        board = await client.get("/admin/breakers", headers=system.headers(ADMIN))
        mere = await client.get("/admin/breakers", headers=system.headers("free"))
        await force(client, system, "ordered", "auto")
        healthy_s = await until(is_healthy, 5, "healthy again")
        ready = await client.get("/health/ready")
    say(f"health: degraded after {degraded_s:.2f} s, healthy again after {healthy_s:.2f} s")
    assert board.status_code == 200
    assert mere.status_code == 403
    assert "ordered" in board.text
    assert "forced_open" in board.text
    assert SIM_KEY not in board.text
    assert ready.status_code == 200


async def test_waiting_as_told_by_an_open_breaker_succeeds(
    system: Tenants, say: Callable[[str], None]
) -> None:
    system.upstream.script(model="told", reset="before")
    async with system.client() as client:
        answer = await chat(client, system, "free", model="told")
        begun_s = time.monotonic()
        while answer.status_code != 503:
            assert time.monotonic() - begun_s < 10
            answer = await chat(client, system, "free", model="told")
        wait_s = retry_after_s(answer)
        system.upstream.reset()
        await asyncio.sleep(wait_s)
        again = await chat(client, system, "free", model="told")
    say(f"told to come back in {wait_s:.2f} s, and then {again.status_code}")
    assert again.status_code == 200, again.text
