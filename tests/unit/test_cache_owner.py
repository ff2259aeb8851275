from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.cache import owner as owner_module
from actors.cache import policy
from actors.cache.owner import Cache
from actors.cache.policy import (
    ENTRY_OVERHEAD_BYTES,
    SHELF_OVERHEAD_BYTES,
    TRAVEL_S,
    Ask,
    Failed,
    Follow,
    Gone,
    Hit,
    Landed,
    Landing,
    Lead,
    Miss,
    News,
    Outcome,
    Scope,
)

ACME = Scope("acme")
KEY = b"k" * 32


class Now:
    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def cache(now: Now) -> Cache:
    return Cache(1_000_000, clock=now, random=lambda: 0.5)


def ask(flight: str, *, key: bytes = KEY, read: bool = True, join: bool = True) -> Ask:
    return Ask(key, ACME, flight, read, join, 2.0)


def landing(
    flight: str | None,
    value: bytes | None = b"v",
    error: bytes | None = None,
    ttl_s: float | None = 60,
) -> Landing:
    return Landing(KEY, ACME, flight, value, error, ttl_s)


async def follow(cache: Cache, flight: str, timeout_s: float) -> Outcome | None:
    (news,) = await cache.hear([(flight, 0)], timeout_s)
    return news.outcome


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_a_landed_value_is_a_hit_for_the_next(cache: Cache, now: Now) -> None:
    assert cache.lookup([ask("a")]) == [Lead(KEY, ACME, "a")]
    cache.land([landing("a")])
    now.s = 5
    assert cache.lookup([ask("b")]) == [Hit(b"v", 5)]


def test_lifetimes_are_cut_by_a_little_and_never_prolonged(cache: Cache, now: Now) -> None:
    cache.land([landing(None, ttl_s=100)])
    now.s = 94.9
    assert isinstance(cache.lookup([ask("a")])[0], Hit)
    now.s = 95
    assert isinstance(cache.lookup([ask("b")])[0], Lead)


def test_a_landing_that_makes_no_sense_spoils_no_other(cache: Cache) -> None:
    other = Landing(b"o" * 32, ACME, None, b"v", None, 60, age_s=0.0)
    absurd: float = 10**400
    cache.land([landing(None, ttl_s=absurd), other])
    assert isinstance(cache.lookup([ask("a", key=other.key)])[0], Hit)
    assert cache.stats()["refused"] == 1


def test_who_must_not_read_leads_and_who_must_not_join_flies_alone(cache: Cache) -> None:
    cache.land([landing(None)])
    assert cache.lookup([ask("a", read=False)]) == [Lead(KEY, ACME, "a")]
    assert cache.lookup([ask("b", read=False)]) == [Follow("a")]
    assert cache.lookup([ask("c", read=False, join=False)]) == [Miss()]
    assert cache.lookup([ask("d", join=False)]) == [Hit(b"v", 0)]


def test_answers_come_in_the_order_of_the_asks(cache: Cache) -> None:
    other = b"o" * 32
    asks = [ask("a"), ask("b", key=other), ask("c"), ask("d", join=False)]
    assert cache.lookup(asks) == [Lead(KEY, ACME, "a"), Lead(other, ACME, "b"), Follow("a"), Miss()]


def test_a_message_that_comes_twice_changes_nothing(cache: Cache) -> None:
    assert cache.lookup([ask("a")]) == cache.lookup([ask("a")])
    cache.land([landing("a")])
    stats = cache.stats()
    cache.land([landing("a")])
    assert stats["entries"] == 1
    assert stats["bytes"] == ENTRY_OVERHEAD_BYTES + SHELF_OVERHEAD_BYTES + 1
    assert cache.stats()["bytes"] == stats["bytes"]


async def test_followers_get_the_leaders_value_even_if_it_is_not_stored(cache: Cache) -> None:
    cache.lookup([ask("a"), ask("b"), ask("c")])
    early = [asyncio.create_task(follow(cache, "a", 60)) for _ in range(2)]
    await settle()
    cache.land([landing("a", ttl_s=None)])
    assert [await task for task in early] == [Landed(b"v")] * 2
    assert await follow(cache, "a", 60) == Landed(b"v")
    assert cache.stats()["entries"] == 0


async def test_followers_of_a_failed_leader_get_its_error_and_the_next_tries_anew(
    cache: Cache,
) -> None:
    cache.lookup([ask("a"), ask("b")])
    follower = asyncio.create_task(follow(cache, "a", 60))
    await settle()
    cache.land([landing("a", None, b"500", None)])
    assert await follower == Failed(b"500")
    assert cache.lookup([ask("c")]) == [Lead(KEY, ACME, "c")]


async def test_a_leader_that_gives_up_leaves_the_lead_to_one_follower(cache: Cache) -> None:
    cache.lookup([ask("a"), ask("b"), ask("c")])
    followers = [asyncio.create_task(follow(cache, "a", 60)) for _ in range(2)]
    await settle()
    cache.land([landing("a", None, None, None)])
    assert [await task for task in followers] == [Gone()] * 2
    assert cache.lookup([ask("b2"), ask("c2")]) == [Lead(KEY, ACME, "b2"), Follow("b2")]


async def test_a_leader_that_falls_silent_is_gone(cache: Cache, now: Now) -> None:
    cache.lookup([ask("a"), ask("b")])
    follower = asyncio.create_task(follow(cache, "a", 60))
    await settle()
    now.s = 1.5
    assert cache.renew(["a", "nobody"]) == ["nobody"]
    now.s = 3
    cache.renew([])
    await settle()
    assert not follower.done()
    now.s = 3.5
    cache.renew([])
    assert await follower == Gone()
    assert cache.stats()["leaders_lost"] == 1


async def test_a_follower_is_told_to_go_on_waiting_after_its_time(cache: Cache, now: Now) -> None:
    cache.lookup([ask("a"), ask("b")])
    assert await follow(cache, "a", 0) is None
    assert await follow(cache, "never heard of", 60) == Gone()


async def test_too_many_followers_are_sent_away(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner_module, "FOLLOWS_MAX", 1)
    cache.lookup([ask("a"), ask("b")])
    follower = asyncio.create_task(follow(cache, "a", 60))
    await settle()
    assert await follow(cache, "a", 60) == Gone()
    await cache.close()
    assert await follower == Gone()


async def test_a_follower_that_leaves_does_not_disturb_the_others(cache: Cache) -> None:
    cache.lookup([ask("a"), ask("b")])
    leaver, stayer = (asyncio.create_task(follow(cache, "a", 60)) for _ in range(2))
    await settle()
    leaver.cancel()
    await settle()
    cache.land([landing("a")])
    assert await stayer == Landed(b"v")
    assert cache.stats()["followers"] == 0


def test_an_owner_that_was_restarted_stores_what_lands_from_before(cache: Cache) -> None:
    cache.land([landing("from another life")])
    assert cache.lookup([ask("a")]) == [Hit(b"v", 0)]


def test_a_cache_is_made_without_an_event_loop() -> None:
    assert Cache().protocol() == Cache.PROTOCOL


# ------------------------------------------------------------------------------- invalidation


def of(scope: Scope, model: str, number: int = 0) -> bytes:
    return policy.key(scope, "chat", model, {"seed": number})


def keep(cache: Cache, scope: Scope, model: str, number: int = 0) -> None:
    cache.land([Landing(of(scope, model, number), scope, None, b"v", None, 60, 0.0)])


@pytest.mark.parametrize(
    ("named", "left"),
    [
        ({"scope": ACME}, {("other", "m"), ("other", "n")}),
        ({"model": "m"}, {("acme", "n"), ("other", "n")}),
        ({"scope": ACME, "model": "m"}, {("acme", "n"), ("other", "m"), ("other", "n")}),
        ({"key": of(ACME, "m")}, {("acme", "n"), ("other", "m"), ("other", "n")}),
        ({"model": "unknown"}, {("acme", "m"), ("acme", "n"), ("other", "m"), ("other", "n")}),
        ({}, set()),
    ],
)
async def test_what_is_named_is_forgotten_and_nothing_else(
    cache: Cache, named: dict[str, Any], left: set[tuple[str, str]]
) -> None:
    all_of_them = {(tenant, model) for tenant in ("acme", "other") for model in "mn"}
    for tenant, model in all_of_them:
        keep(cache, Scope(tenant), model)
    assert await cache.invalidate(**named) == 4 - len(left)
    assert await cache.invalidate(**named) == 0
    for tenant, model in all_of_them:
        asked = Ask(of(Scope(tenant), model), Scope(tenant), "f", True, False, 2.0)
        assert isinstance(cache.lookup([asked])[0], Hit) == ((tenant, model) in left)
    assert cache.stats()["invalidated"] == 4 - len(left)


async def test_what_is_under_way_when_it_is_invalidated_is_not_stored(
    cache: Cache, now: Now
) -> None:
    cache.lookup([ask("a"), ask("b")])
    await cache.invalidate(ACME)
    now.s = 1
    assert cache.lookup([ask("c")]) == [Lead(KEY, ACME, "c")]
    cache.land([landing("a", b"old")])
    assert await follow(cache, "a", 60) == Landed(b"old")
    assert cache.lookup([ask("d")]) == [Follow("c")]
    cache.land([landing("a", b"old")])  # and once more, by a line that repeats itself
    cache.land([landing("c", b"new")])
    assert cache.lookup([ask("e")]) == [Hit(b"new", 0)]
    assert cache.stats()["invalidated_under_way"] == 2


async def test_what_lands_without_a_flight_is_judged_by_its_age(cache: Cache, now: Now) -> None:
    now.s = 100
    await cache.invalidate(ACME)

    def stored(age_s: float | None) -> bool:
        cache.land([Landing(KEY, ACME, None, b"v", None, 60, age_s)])
        return isinstance(cache.lookup([ask("x", join=False)])[0], Hit)

    now.s = 110
    assert not stored(None)
    assert not stored(10.5)
    assert not stored(10.0 - TRAVEL_S / 2)  # it may have been under way for so long
    assert stored(9.5 - TRAVEL_S)


async def test_an_invalidation_concerns_nobody_else_who_is_under_way(cache: Cache) -> None:
    cache.lookup([ask("a")])
    await cache.invalidate(Scope("other"))
    assert cache.lookup([ask("b")]) == [Follow("a")]
    cache.land([landing("a")])
    assert cache.lookup([ask("c")]) == [Hit(b"v", 0)]


# ------------------------------------------------------------------------------------ streams


def stream(flight: str, key: bytes = KEY) -> Ask:
    return Ask(key, ACME, flight, True, True, 2.0, True)


async def test_pieces_are_heard_once_and_in_order(cache: Cache) -> None:
    cache.lookup([stream("d-1"), stream("e-1")])
    waiting = asyncio.create_task(cache.hear([("d-1", 0)], 60))
    await settle()
    cache.say([("d-1", 0, [b"a", b"b"])])
    assert await waiting == [News((b"a", b"b"))]
    cache.say([("d-1", 0, [b"a", b"b"]), ("d-1", 1, [b"b", b"c"]), ("nobody", 0, [b"x"])])
    assert await cache.hear([("d-1", 2)], 60) == [News((b"c",))]
    cache.say([("d-1", 7, [b"z"])])  # what comes before it is missing
    assert await cache.hear([("d-1", 3)], 0) == [News()]
    cache.land([landing("d-1")])
    assert await cache.hear([("d-1", 3), ("nobody", 0)], 60) == [
        News((), Landed(b"v")),
        News((), Gone()),
    ]


async def test_one_message_hears_of_many_flights(cache: Cache) -> None:
    keys = [bytes([n]) * 32 for n in range(3)]
    cache.lookup([ask(f"a{n}", key=key) for n, key in enumerate(keys)])
    cache.lookup([ask(f"b{n}", key=key) for n, key in enumerate(keys)])
    waiting = asyncio.create_task(cache.hear([(f"a{n}", 0) for n in range(3)], 60))
    await settle()
    cache.land([landing("a1", b"v", ttl_s=None)])
    assert await waiting == [News(), News((), Landed(b"v")), News()]


async def test_leaders_learn_who_of_theirs_is_followed(cache: Cache) -> None:
    other = b"o" * 32
    cache.lookup([stream("d-1"), stream("d-2", other)])
    waiting = asyncio.create_task(cache.followed("d", [], 60))
    await settle()
    cache.lookup([ask("e-1"), stream("e-2", b"x" * 32)])  # a plain follower waits for the end
    await settle()
    assert not waiting.done()
    cache.lookup([stream("e-3")])
    assert await waiting == ["d-1"]
    waiting = asyncio.create_task(cache.followed("d", ["d-1"], 60))
    await settle()
    assert not waiting.done()
    cache.lookup([stream("e-4", other)])
    assert await waiting == ["d-1", "d-2"]
    cache.land([landing("d-1")])
    assert await cache.followed("d", ["d-1"], 60) == ["d-2"]
    assert await cache.followed("nobody", [], 0) == []


async def test_who_says_something_is_alive(cache: Cache, now: Now) -> None:
    cache.lookup([stream("d-1"), stream("e-1")])
    now.s = 1.5
    cache.say([("d-1", 0, [b"a"])])
    now.s = 3.0
    assert await cache.hear([("d-1", 1)], 0) == [News()]
    now.s = 3.5
    assert await cache.hear([("d-1", 1)], 0) == [News((), Gone())]
