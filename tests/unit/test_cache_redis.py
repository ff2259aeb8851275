from __future__ import annotations

import asyncio
import fnmatch
import os
import re
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from actors.cache import policy, redis_tier
from actors.cache.desk import CacheDesk, Joined
from actors.cache.owner import Cache
from actors.cache.policy import Ask, Follow, Hit, Landing, Lead, Miss, Scope, Searching, Sweep
from actors.cache.redis_tier import (
    BUDGET_S,
    FAILURES_MAX,
    SEARCH,
    SEARCHES_MAX,
    SWEEPS_MAX,
    VALUE_BYTES_MAX,
    Found,
    Place,
    RedisTier,
    Tell,
    name_of,
    pattern_of,
    unwrap,
    wrap,
)
from actors.ref import InlineRef
from tests.support.fault_proxy import FaultProxy
from tests.support.redis_server import RedisServer, free_port, redis_server

ACME, OTHER, EVERYBODY = Scope("acme"), Scope("other"), Scope(None)
KEY, MORE = b"k" * 32, b"m" * 32
WANTED: Any = {"read": True, "join": True, "patience_s": 60.0}
SLACK_S = 0.7  # what a busy machine adds; a wait for the connection's end would be a second


# --------------------------------------------------------------------------- what is stored there


def test_names_are_scoped_and_begin_with_the_namespace() -> None:
    name = name_of("prod", ACME, KEY)
    assert name.startswith(b"prod:2:")
    assert name.endswith(KEY.hex().encode())
    scopes = [ACME, OTHER, EVERYBODY, Scope("everybody"), Scope("tenant acme"), Scope("")]
    assert len({name_of("prod", scope, KEY) for scope in scopes}) == len(scopes)


def test_a_value_is_believed_only_in_its_own_place() -> None:
    stored = wrap(ACME, KEY, b"answer")
    assert unwrap(ACME, KEY, stored) == b"answer"
    assert unwrap(ACME, KEY, wrap(ACME, KEY, b"")) == b""
    assert unwrap(OTHER, KEY, stored) is None
    assert unwrap(EVERYBODY, KEY, stored) is None
    assert unwrap(ACME, MORE, stored) is None
    assert unwrap(ACME, KEY, stored[:-1] + b"!") is None, "damaged"
    assert unwrap(ACME, KEY, stored[:-1]) is None, "cut"
    for foreign in (b"", b"answer", stored[1:], b"forebay.cache.1\n" + stored[16:], stored[:40]):
        assert unwrap(ACME, KEY, foreign) is None


def test_every_key_of_a_script_is_declared() -> None:
    calls = re.findall(r"redis\.p?call\('\w+', (\w+)", SEARCH)
    assert calls == ["name"] * SEARCH.count("call(")
    assert "for place, name in ipairs(KEYS)" in SEARCH


def matches(sweep: Sweep, scope: Scope, key: bytes, namespace: str = "prod") -> bool:
    pattern = pattern_of(namespace, sweep).decode()
    return fnmatch.fnmatchcase(name_of(namespace, scope, key).decode(), pattern)


def test_a_sweeps_pattern_is_of_the_names_of_all_that_it_takes() -> None:
    keys = [(scope, policy.key(scope, "chat", m, {})) for scope in (ACME, OTHER) for m in "mn"]
    (scope, key), *_ = keys
    sweeps = [
        Sweep(), Sweep.of(scope), Sweep.of(None, "m"), Sweep.of(scope, "m"), Sweep.of(scope, "x"),
        Sweep.of(None, None, key), Sweep.of(scope, "m", key), Sweep.of(scope, "n", key),
        Sweep.of(OTHER, None, key), Sweep.of(EVERYBODY),
    ]  # fmt: skip
    for sweep in sweeps:
        for scope, key in keys:
            assert matches(sweep, scope, key) == sweep.takes(scope.mark, key)


def test_a_namespace_is_no_pattern() -> None:
    name = name_of("a*b", ACME, KEY)
    assert pattern_of("a*b", Sweep()) == b"a\\*b:2:*:*:*"
    assert pattern_of("[a]?\\", Sweep()).startswith(b"\\[a\\]\\?\\\\:2:")
    assert name.startswith(b"a*b:2:")


# -------------------------------------------------------------------------------- with a real one


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with redis_server(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def client(server: RedisServer) -> Iterator[redis.Redis]:
    with redis.Redis(port=server.port) as direct:
        direct.flushall()
        direct.config_set("maxmemory", 0)
        yield direct


@pytest.fixture
async def proxy(server: RedisServer) -> AsyncIterator[FaultProxy]:
    between = FaultProxy(server.port)
    await between.start()
    yield between
    await between.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time does not matter in this test: what Redis has is found on a busy machine too."""
    monkeypatch.setattr(redis_tier, "BUDGET_S", 5.0)


@pytest.fixture
async def hasty(client: redis.Redis, proxy: FaultProxy) -> AsyncIterator[RedisTier]:
    tier = await running(proxy.url)
    yield tier
    await tier.close()


@pytest.fixture
async def tier(patient: None, hasty: RedisTier) -> RedisTier:
    return hasty


async def running(url: str) -> RedisTier:
    tier = RedisTier(Place(url))
    tier.start()
    await until(lambda: tier.up)
    return tier


async def until(true: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


async def kept(tier: RedisTier, key: bytes = KEY, value: bytes = b"answer") -> None:
    before = tier.stats().get("stored", 0)
    tier.store(ACME, key, value, 60)
    await until(lambda: tier.stats().get("stored", 0) > before)


async def test_what_is_stored_is_found_with_its_time_to_live(
    tier: RedisTier, client: redis.Redis
) -> None:
    await kept(tier)
    (found,) = await tier.find([(ACME, KEY)])
    assert isinstance(found, Found)
    assert found.value == b"answer"
    assert 59 < found.ttl_s <= 60
    client.pexpire(name_of("forebay", ACME, KEY), 5_000)
    (found,) = await tier.find([(ACME, KEY)])
    assert found is not None
    assert found.ttl_s <= 5


async def test_one_search_asks_for_everything_and_answers_in_order(tier: RedisTier) -> None:
    await kept(tier)
    await kept(tier, MORE, bytes(range(256)) * 100)
    wanted = [(OTHER, KEY), (ACME, MORE), (ACME, b"x" * 32), (ACME, KEY), (EVERYBODY, KEY)]
    found = await tier.find(wanted)
    assert [one and one.value for one in found] == [
        None, bytes(range(256)) * 100, None, b"answer", None,
    ]  # fmt: skip
    assert tier.stats()["searches"] == 1


async def test_what_somebody_else_wrote_there_is_not_found(
    tier: RedisTier, client: redis.Redis
) -> None:
    name = name_of("forebay", ACME, KEY)
    client.set(name, wrap(OTHER, KEY, b"not for acme"), px=60_000)
    assert await tier.find([(ACME, KEY)]) == [None]
    client.set(name, wrap(ACME, KEY, b"lives for ever"))
    assert await tier.find([(ACME, KEY)]) == [None]
    client.delete(name)
    client.lpush(name, "a list")
    await kept(tier, MORE)
    first, second = await tier.find([(ACME, KEY), (ACME, MORE)])
    assert first is None
    assert second is not None
    assert tier.stats()["not_ours"] == 2


async def test_two_namespaces_know_nothing_of_each_other(
    tier: RedisTier, server: RedisServer
) -> None:
    await kept(tier)
    other = RedisTier(Place(server.url, "staging"))
    other.start()
    await until(lambda: other.up)
    assert await other.find([(ACME, KEY)]) == [None]
    await other.close()


async def test_large_values_stay_where_they_are_quick(tier: RedisTier) -> None:
    tier.store(ACME, KEY, bytes(VALUE_BYTES_MAX), 60)
    tier.store(ACME, KEY, b"dead already", 0)
    assert tier.stats()["not_stored"] == 2
    assert tier.stats()["queued"] == 0


async def test_a_search_takes_as_much_as_fits_into_its_bound(
    tier: RedisTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    await kept(tier, KEY, bytes(600))
    await kept(tier, MORE, bytes(600))
    monkeypatch.setattr(redis_tier, "FOUND_BYTES_MAX", 1000)
    first, second = await tier.find([(ACME, KEY), (ACME, MORE)])
    assert first is not None
    assert second is None


async def test_stores_beyond_the_bounds_of_the_queue_are_dropped(
    tier: RedisTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_tier, "STORES_MAX", 2)
    for number in range(3):
        tier.store(ACME, number.to_bytes(32, "big"), b"v", 60)
    assert tier.stats()["queued"] == 2
    monkeypatch.setattr(redis_tier, "STORES_MAX", 4096)
    monkeypatch.setattr(redis_tier, "STORE_BYTES_MAX", tier.stats()["queued_bytes"])
    tier.store(ACME, KEY, b"v", 60)
    assert tier.stats()["not_stored"] == 2
    await until(lambda: tier.stats()["queued_bytes"] == 0)
    # Two were in the queue; on a busy machine they may have come too late to be stored.
    await until(lambda: tier.stats().get("stored", 0) + tier.stats()["not_stored"] == 4)


# ---------------------------------------------------------------------------------- when it fails


async def asked(tier: RedisTier, times: int = 1) -> list[float]:
    """Searches one after the other, without success; the seconds that each took."""
    took = []
    for _ in range(times):
        begun = time.monotonic()
        assert await tier.find([(ACME, KEY)]) == [None]
        took.append(time.monotonic() - begun)
    return took


async def found_again(tier: RedisTier) -> bytes:
    """What is found as soon as something is: a busy machine may be late now and then."""
    deadline = time.monotonic() + 10
    while True:
        (found,) = await tier.find([(ACME, KEY)])
        if found is not None:
            return found.value
        assert time.monotonic() < deadline
        await asyncio.sleep(0.002)


@pytest.mark.parametrize("fault", ["latency", "blackhole", "reset", "half_close", "refuse"])
async def test_whatever_happens_is_a_miss_in_time_and_it_comes_back_by_itself(
    hasty: RedisTier, proxy: FaultProxy, fault: Any
) -> None:
    await kept(hasty)
    await proxy.set(fault, 30.0)
    assert max(await asked(hasty, FAILURES_MAX)) < BUDGET_S + SLACK_S
    assert not hasty.up
    assert hasty.stats()["state"] == "degraded"
    assert hasty.stats()["reason"]
    searches = hasty.stats()["searches"]
    await asked(hasty, 20)
    hasty.store(ACME, MORE, b"v", 60)
    assert hasty.stats()["searches"] == searches  # nobody is asked, nor told
    assert hasty.stats()["queued"] == 0
    await proxy.set("pass")
    await until(lambda: hasty.up)
    assert hasty.stats()["state"] == "healthy"
    assert hasty.stats()["reason"] is None
    assert await found_again(hasty) == b"answer"


async def test_a_late_answer_is_nobody_elses(hasty: RedisTier, proxy: FaultProxy) -> None:
    await kept(hasty, KEY, b"for the first")
    await kept(hasty, MORE, b"for the second")
    await proxy.set("latency", 0.04)
    assert await hasty.find([(ACME, KEY)]) == [None]
    await proxy.set("pass")
    for _ in range(20):
        (found,) = await hasty.find([(ACME, MORE)])
        assert found is None or found.value == b"for the second"
        await asyncio.sleep(0.005)
    assert hasty.stats()["late"] >= 1


async def test_failures_count_in_a_row_only(hasty: RedisTier, proxy: FaultProxy) -> None:
    await kept(hasty)
    for _ in range(2):
        await proxy.set("reset")
        await asked(hasty, FAILURES_MAX - 1)
        await proxy.set("pass")
        assert hasty.up
        assert await found_again(hasty) == b"answer"


async def test_it_comes_back_with_a_clean_sheet(hasty: RedisTier, proxy: FaultProxy) -> None:
    await proxy.set("reset")
    await asked(hasty, FAILURES_MAX)
    await proxy.set("pass")
    await until(lambda: hasty.up)
    await proxy.set("reset")
    await asked(hasty, FAILURES_MAX - 1)
    assert hasty.up


async def test_what_hung_in_an_outage_does_not_count_after_it(
    hasty: RedisTier, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await proxy.set("blackhole")
    await asyncio.gather(*(hasty.find([(ACME, KEY)]) for _ in range(SEARCHES_MAX)))
    assert hasty.stats()["searching"] == SEARCHES_MAX
    await proxy.set("pass")
    await until(lambda: hasty.up)
    monkeypatch.setattr(redis_tier, "BUDGET_S", 5.0)
    await until(lambda: hasty.stats()["searching"] == 0)
    assert hasty.up
    assert hasty.stats()["failures"] == SEARCHES_MAX


async def test_searches_that_hang_are_bounded(hasty: RedisTier, proxy: FaultProxy) -> None:
    await proxy.set("blackhole")
    await asyncio.gather(*(hasty.find([(ACME, KEY)]) for _ in range(3 * SEARCHES_MAX)))
    stats = hasty.stats()
    assert stats["searching"] <= SEARCHES_MAX
    assert stats["not_asked"] == 2 * SEARCHES_MAX


async def test_a_full_redis_is_still_read_and_says_so(tier: RedisTier, client: redis.Redis) -> None:
    await kept(tier)
    client.config_set("maxmemory-policy", "noeviction")
    client.config_set("maxmemory", 1)
    tier.store(ACME, MORE, b"no room", 60)
    await until(lambda: tier.stats()["state"] == "degraded")
    assert "does not store" in tier.stats()["reason"]
    assert tier.up
    (found,) = await tier.find([(ACME, KEY)])
    assert found is not None
    client.config_set("maxmemory", 0)
    await kept(tier, MORE)
    assert tier.stats()["state"] == "healthy"


async def test_it_may_be_started_before_redis_is(patient: None, tmp_path: Path) -> None:
    server = RedisServer(tmp_path)
    tier = RedisTier(Place(server.url))
    tier.start()
    assert tier.stats()["reason"] == "not connected yet"
    await until(lambda: "ConnectionError" in (tier.stats()["reason"] or ""))
    assert await tier.find([(ACME, KEY)]) == [None]
    server.start()
    try:
        await until(lambda: tier.up)
        await kept(tier)
        server.kill()
        await asked(tier, FAILURES_MAX)
        assert not tier.up
        server.start()
        await until(lambda: tier.up)
        assert await tier.find([(ACME, KEY)]) == [None]  # it kept nothing on disk
    finally:
        await tier.close()
        server.kill()


async def test_probes_become_rare_while_it_stays_away() -> None:
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await asyncio.sleep(0 if len(pauses) < 8 else 60)

    tier = RedisTier(Place("redis://127.0.0.1:1"), pause=pause)
    tier.start()
    await until(lambda: len(pauses) == 8)
    assert pauses == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0, 2.0]
    await tier.close()


async def test_every_kind_of_url_is_understood(patient: None, server: RedisServer) -> None:
    for url in (
        f"redis://127.0.0.1:{server.port}/0",
        f"dragonfly://127.0.0.1:{server.port}",
        f"unix://{server.socket}",
    ):
        tier = await running(url)
        await kept(tier)
        await tier.close()


async def test_a_password_opens_and_is_never_told(patient: None, tmp_path: Path) -> None:
    with redis_server(tmp_path, "--requirepass", "pa:ss/word") as server:
        host = f"127.0.0.1:{server.port}"
        tier = await running(f"redis://:pa%3Ass%2Fword@{host}")
        await kept(tier)
        await tier.close()
        for url in (
            f"redis://:canary@{host}",
            f"redis://:ca%6Eary@{host}",
            f"redis://:canary/more@{host}",
            f"redis://canary#more@{host}",
            f"redis://{host}?password=canary",
            f"redis://{host}",
            f"rediss://:canary@{host}",
            "redis://:canary@no-such-host.invalid",
            "memcached://canary@host",
        ):
            tier = RedisTier(Place(url))
            tier.start()
            await until(lambda tier=tier: tier.stats()["reason"] != "not connected yet")
            assert not tier.up
            assert "canary" not in repr(tier.stats()) + repr(Place(url)) + repr(tier), url
            await tier.close()


async def degraded(tier: RedisTier, words: str) -> None:
    await until(lambda: words in (tier.stats()["reason"] or ""))
    assert tier.stats()["state"] == "degraded"


async def test_a_replica_that_only_reads_is_read_and_says_so(
    patient: None, server: RedisServer, client: redis.Redis
) -> None:
    tier = await running(server.url)
    await kept(tier)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        tier.store(ACME, MORE, b"no", 60)
        await degraded(tier, "does not store: ReadOnlyError")
        (found,) = await tier.find([(ACME, KEY)])
        assert found is not None
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")
    await kept(tier, MORE)
    assert tier.stats()["state"] == "healthy"
    await tier.close()


async def test_a_redis_that_is_still_loading_is_waited_for(patient: None, tmp_path: Path) -> None:
    server = RedisServer(tmp_path, "--loading-process-events-interval-bytes", "1024")
    server.start()
    try:
        tier = await running(server.url)
        await kept(tier)
        with redis.Redis(port=server.port) as direct:
            for number in range(300):
                direct.set(f"else {number}", os.urandom(1000))
            direct.save()
            server.kill()
            await asked(tier, FAILURES_MAX)
            await until(lambda: not tier.up)
            server.start("--key-load-delay", "50000")
            await degraded(tier, "BusyLoadingError")
            assert await tier.find([(ACME, KEY)]) == [None]
            direct.config_set("key-load-delay", 0)
        await until(lambda: tier.up)
        assert await found_again(tier) == b"answer"
        await tier.close()
    finally:
        server.kill()


async def test_a_password_that_is_put_right_there_lets_it_in(
    patient: None, server: RedisServer, client: redis.Redis
) -> None:
    client.config_set("requirepass", "another")
    try:
        tier = RedisTier(Place(f"redis://:canary@127.0.0.1:{server.port}"))
        tier.start()
        await degraded(tier, "AuthenticationError")
        assert await tier.find([(ACME, KEY)]) == [None]
        client.config_set("requirepass", "canary")
        await until(lambda: tier.up)
        await kept(tier)
        assert tier.stats()["state"] == "healthy"
    finally:
        client.config_set("requirepass", "")
    await tier.close()


async def test_tls_is_spoken_and_the_certificate_is_checked(patient: None, tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
            "-nodes", "-keyout", key, "-out", cert, "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
        ],
        check=True,
        capture_output=True,
    )  # fmt: skip
    port = free_port()
    options = ["--tls-port", str(port), "--tls-cert-file", str(cert), "--tls-key-file", str(key)]
    with redis_server(tmp_path, *options, "--tls-auth-clients", "no"):
        tier = await running(f"rediss://127.0.0.1:{port}?ssl_ca_certs={cert}")
        await kept(tier)
        await tier.close()
        stranger = RedisTier(Place(f"rediss://127.0.0.1:{port}"))
        stranger.start()
        await degraded(stranger, "CERTIFICATE_VERIFY_FAILED")
        assert not stranger.up
        await stranger.close()


# --------------------------------------------------------------------------------------- sweeping


async def swept(tier: RedisTier) -> None:
    await until(lambda: tier.stats()["sweeping"] == 0)


async def test_a_sweep_deletes_what_it_takes_and_nothing_else(
    tier: RedisTier, client: redis.Redis
) -> None:
    one, two = policy.key(ACME, "chat", "one", {}), policy.key(ACME, "chat", "two", {})
    client.set("forebay:else", "not ours")
    client.set("other:2:a:b:c", "another namespace")
    for number in range(2000):
        client.set(name_of("forebay", OTHER, number.to_bytes(32, "big")), "x")
    await kept(tier, one)
    await kept(tier, two)
    tier.sweep(Sweep.of(ACME, "one"))
    assert await tier.find([(ACME, one)]) == [None]  # at once, whether or not it is deleted yet
    await swept(tier)
    assert client.exists(name_of("forebay", ACME, one)) == 0
    assert client.exists(name_of("forebay", ACME, two)) == 1
    assert client.dbsize() == 2003
    tier.sweep(Sweep.of(OTHER))
    await swept(tier)
    assert client.dbsize() == 3
    tier.sweep(Sweep())
    await swept(tier)
    assert client.dbsize() == 2
    assert tier.stats()["swept"] == 2002
    await kept(tier, one)
    (found,) = await tier.find([(ACME, one)])
    assert found is not None


async def test_what_waits_to_be_stored_is_swept_too(tier: RedisTier, client: redis.Redis) -> None:
    for number in range(300):
        tier.store(ACME, number.to_bytes(32, "big"), b"old", 60)
    tier.store(OTHER, KEY, b"stays", 60)
    tier.sweep(Sweep.of(ACME))
    assert tier.stats()["queued"] == 1
    await swept(tier)
    await until(lambda: tier.stats().get("stored"))
    assert client.dbsize() == 1


async def test_a_sweep_waits_until_redis_is_back_and_hides_what_it_takes(
    tier: RedisTier, proxy: FaultProxy, client: redis.Redis
) -> None:
    await kept(tier)
    await proxy.set("reset")
    await asked(tier, FAILURES_MAX)
    tier.sweep(Sweep.of(ACME))
    assert tier.stats()["sweeping"] == 1
    await proxy.set("pass")
    await until(lambda: tier.up)
    assert await tier.find([(ACME, KEY)]) == [None]
    await swept(tier)
    assert client.dbsize() == 0


async def test_what_may_not_be_deleted_is_not_found(
    server: RedisServer, client: redis.Redis, patient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_tier, "SWEEP_PAUSE_S", 0.01)
    tier = await running(server.url)
    await kept(tier)
    client.execute_command("REPLICAOF", "127.0.0.1", "1")
    try:
        tier.sweep(Sweep.of(ACME))
        await degraded(tier, "does not forget: ReadOnlyError")
        assert await tier.find([(ACME, KEY)]) == [None]
        assert tier.up
    finally:
        client.execute_command("REPLICAOF", "NO", "ONE")
    await swept(tier)
    assert client.dbsize() == 0
    assert tier.stats()["state"] == "healthy"
    await tier.close()


async def test_too_many_sweeps_are_one_of_everything() -> None:
    tier = RedisTier(Place("redis://127.0.0.1:1"))
    for number in range(SWEEPS_MAX + 1):
        tier.sweep(Sweep.of(Scope(f"t{number}")))
    assert tier.unswept == [Sweep()]


# ------------------------------------------------------------------------------ behind its owner


class Told:
    """Says where the tier is when a test does."""

    def __init__(self, place: Place | None) -> None:
        self.place = place
        self.tell: Tell | None = None

    async def follow(self, tell: Tell) -> None:
        self.tell = tell
        tell(self.place)


@pytest.fixture
async def cache(patient: None, client: redis.Redis, proxy: FaultProxy) -> AsyncIterator[Cache]:
    owner = await owner_at(proxy.url)
    yield owner
    await owner.close()


async def owner_at(url: str) -> Cache:
    owner = Cache(1_000_000, random=lambda: 0.5, places=Told(Place(url)))
    owner.protocol()
    await until(lambda: state(owner) == "healthy")
    return owner


def state(cache: Cache) -> Any:
    redis_stats = cache.stats()["redis"]
    return redis_stats and redis_stats["state"]


def ask(flight: str, key: bytes = KEY, *, read: bool = True, join: bool = True) -> Ask:
    return Ask(key, ACME, flight, read, join, 2.0)


def landing(flight: str | None, value: bytes = b"v", ttl_s: float | None = 60) -> Landing:
    return Landing(KEY, ACME, flight, value, None, ttl_s)


async def landed(cache: Cache, value: bytes = b"v") -> None:
    before = cache.stats()["redis"].get("stored", 0)
    cache.land([landing(None, value)])
    await until(lambda: cache.stats()["redis"].get("stored", 0) > before)


async def test_answers_survive_their_owner(cache: Cache, proxy: FaultProxy) -> None:
    await landed(cache)
    heir = await owner_at(proxy.url)
    assert heir.lookup([ask("a")]) == [Searching()]
    (hit,) = await heir.search([ask("a")])
    assert isinstance(hit, Hit)
    assert hit.value == b"v"
    (hit,) = heir.lookup([ask("b")])
    assert isinstance(hit, Hit)
    assert heir.stats()["flights"] == 0
    await heir.close()


async def test_a_search_that_finds_nothing_leaves_the_lead_where_it_was(cache: Cache) -> None:
    other = b"o" * 32
    asks = [ask("a"), ask("b"), ask("c", other, join=False)]
    assert cache.lookup(asks) == [Searching(), Follow("a"), Searching()]
    searching = [asks[0], asks[2]]
    assert await cache.search(searching) == [Lead(KEY, ACME, "a"), Miss()]
    assert await cache.search(searching) == [Lead(KEY, ACME, "a"), Miss()]
    cache.land([landing("a")])
    (hit,) = cache.lookup([ask("d")])
    assert isinstance(hit, Hit)


async def test_who_follows_a_search_gets_what_it_finds(cache: Cache, proxy: FaultProxy) -> None:
    await landed(cache)
    heir = await owner_at(proxy.url)
    desks = [CacheDesk([InlineRef("cache", heir)], name) for name in ("one", "two")]
    hit, joined = await asyncio.gather(*(desk.lookup(KEY, ACME, **WANTED) for desk in desks))
    assert (type(hit), hit.value) == (Hit, b"v")
    assert joined == Joined(b"v")
    for desk in desks:
        await desk.close()
    await heir.close()


async def test_who_must_not_read_is_not_searched_for(cache: Cache) -> None:
    assert cache.lookup([ask("a", read=False)]) == [Lead(KEY, ACME, "a")]
    assert cache.lookup([ask("b", read=False, join=False)]) == [Miss()]


async def test_what_is_not_to_be_stored_is_not_stored_there_either(
    cache: Cache, client: redis.Redis
) -> None:
    too_large = bytes(200_000)  # for a cache of a million
    cache.land([landing(None, b"only for those who wait", None), landing(None, too_large)])
    await landed(cache)
    assert client.dbsize() == 1
    assert 50_000 < client.pttl(name_of("forebay", ACME, KEY)) <= 57_000  # cut by the jitter


async def test_without_redis_nobody_searches(cache: Cache, proxy: FaultProxy) -> None:
    await proxy.set("refuse")
    for number in range(FAILURES_MAX):
        await cache.search([ask(f"s{number}")])
    assert state(cache) == "degraded"
    assert cache.lookup([ask("a"), ask("b")])[1:] == [Follow("s0")]
    assert cache.lookup([ask("c", MORE)]) == [Lead(MORE, ACME, "c")]
    cache.land([landing("s0")])
    (hit,) = cache.lookup([ask("d")])
    assert isinstance(hit, Hit)


async def test_it_moves_when_it_is_told_to(
    patient: None, client: redis.Redis, server: RedisServer
) -> None:
    told = Told(None)
    cache = Cache(1_000_000, places=told)
    assert cache.stats()["redis"] is None
    assert cache.lookup([ask("a")]) == [Lead(KEY, ACME, "a")]
    await until(lambda: told.tell is not None)
    assert told.tell is not None
    told.tell(None, "CACHE_AT is not set")
    assert cache.stats()["redis"] == {"state": "degraded", "reason": "CACHE_AT is not set"}
    told.tell(Place(server.url))
    await until(lambda: state(cache) == "healthy")
    await landed(cache)
    told.tell(Place(server.url, "elsewhere"))
    await until(lambda: state(cache) == "healthy")
    cache.land([landing(None)])
    await until(lambda: client.dbsize() == 2)
    told.tell(None)
    assert cache.stats()["redis"] is None
    await cache.close()


async def test_a_desk_gets_what_redis_has(cache: Cache, proxy: FaultProxy) -> None:
    await landed(cache)
    heir = await owner_at(proxy.url)
    ref = InlineRef("cache", heir)
    desk = CacheDesk([ref], "here")
    hits = await asyncio.gather(*(desk.lookup(KEY, ACME, **WANTED) for _ in range(3)))
    assert [hit.value for hit in hits] == [b"v"] * 3
    assert ref.sent["search"] == 1
    lead = await desk.lookup(MORE, ACME, **WANTED)
    assert isinstance(lead, Lead)
    assert lead.flight is not None
    desk.land(lead, b"new", ttl_s=60)
    await desk.close()
    await heir.close()


async def test_a_slow_redis_holds_up_nobody_but_who_searches(
    cache: Cache, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await landed(cache)
    monkeypatch.setattr(redis_tier, "BUDGET_S", BUDGET_S)
    await proxy.set("blackhole")
    desk = CacheDesk([InlineRef("cache", cache)], "here")
    begun = time.monotonic()
    searching = asyncio.create_task(desk.lookup(MORE, ACME, **WANTED))
    beside = await desk.lookup(KEY, ACME, **WANTED)
    after = await desk.lookup(KEY, ACME, **WANTED)
    assert isinstance(beside, Hit)
    assert isinstance(after, Hit)
    assert not searching.done()
    assert isinstance(await searching, Lead)
    assert time.monotonic() - begun < BUDGET_S + SLACK_S
    await desk.close()


async def test_an_invalidation_reaches_redis_and_no_heir_finds_it(
    cache: Cache, proxy: FaultProxy, client: redis.Redis
) -> None:
    await landed(cache)
    assert await cache.invalidate(ACME) == 1
    (answer,) = await cache.search([ask("a")])
    assert answer == Lead(KEY, ACME, "a")
    cache.land([landing("a", b"new")])
    await until(lambda: cache.stats()["redis"]["sweeping"] == 0)
    heir = await owner_at(proxy.url)
    (found,) = await heir.search([ask("b")])
    assert not isinstance(found, Hit) or found.value == b"new"
    await heir.close()


async def test_a_search_that_an_invalidation_overtakes_finds_nothing(
    cache: Cache, proxy: FaultProxy
) -> None:
    await landed(cache)
    heir = await owner_at(proxy.url)
    await proxy.set("latency", 0.1)
    searching = asyncio.create_task(heir.search([ask("a")]))
    await asyncio.sleep(0.02)
    await heir.invalidate()
    assert await searching == [Lead(KEY, ACME, "a")]
    await heir.close()


async def test_what_is_found_is_told_even_if_there_is_no_room_for_it(
    cache: Cache, proxy: FaultProxy
) -> None:
    await landed(cache, bytes(10_000))
    small = Cache(20_000, places=Told(Place(proxy.url)))
    small.protocol()
    await until(lambda: state(small) == "healthy")
    (hit,) = await small.search([ask("a")])
    assert isinstance(hit, Hit)
    assert small.stats()["entries"] == 0
    await small.close()
