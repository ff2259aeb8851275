"""What is forgotten stays so, whichever message is lost, doubled or late; and what is near."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.cache import owner as owner_module
from actors.cache import policy
from actors.cache.desk import CacheDesk, Follow, Hit, Joined, Lead
from actors.cache.lease import ALONE_S, LEASE_S, MARGIN_S, Told
from actors.cache.owner import Cache
from actors.cache.policy import TRAVEL_S, Ask, Landing, Scope, Sweep, model_mark
from tests.support.cache_world import ACME, KEY, KEYS, PATIENCE_S, World, look, virtually

STREAM = {"read": True, "join": True, "patience_s": PATIENCE_S, "stream": True}


async def store(desk: CacheDesk, key: bytes = KEY, value: bytes = b"v") -> None:
    desk.land(await look(desk, key, read=False), value, None, 600.0)


async def lend(desk: CacheDesk) -> None:
    """It asks, with nobody else, until it has the lease."""
    for _ in range(200):
        if desk.stats()["leased"]:
            return
        desk.land(await look(desk, b"x" * 40, read=False))
        await asyncio.sleep(0.1)
    raise AssertionError("no lease")


def owner() -> Cache:
    return Cache(1_000_000, clock=asyncio.get_running_loop().time, random=lambda: 0.0)


def asked(flight: str, key: bytes = KEY) -> Ask:
    return Ask(key, ACME, flight, True, True, 3.0)


async def lent(desk: str = "a") -> Cache:
    """An owner whose key space this desk has on a lease."""
    cache = owner()
    cache.lookup([asked(f"{desk}-0", b"x" * 40)])
    await asyncio.sleep(ALONE_S + LEASE_S + MARGIN_S)
    assert cache.take(desk, 1) is not None
    return cache


# --------------------------------------------------------------------------------- how many


def test_the_count_has_what_a_holder_elsewhere_dropped() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        for key in KEYS:
            await store(first, key)
        assert await second.invalidate(None, None, KEY) == 1
        assert await second.invalidate(ACME, None, None) == len(KEYS) - 1
        assert await second.invalidate(None, None, None) == 0
        await store(first)
        assert await first.invalidate(None, None, None) == 1, "and one's own, once"
        assert world.owners[0].stats()["invalidated"] == len(KEYS) + 1
        assert first.stats()["leased"]
        await world.close()

    virtually(session)


def test_the_count_has_what_a_holder_dropped_while_it_gave_back() -> None:
    async def session() -> None:
        cache = await lent()
        clearing = asyncio.create_task(cache.invalidate(ACME))
        await asyncio.sleep(0)
        assert cache.lookup([asked("b-1")]), "it is recalled meanwhile"
        told = await cache.hold("a", 1, {}, 1.0)
        assert told == Told(True, ((1, Sweep(ACME.mark)),))
        assert cache.give_back("a", 1, [], {1: 7})
        assert await clearing == 7

    virtually(session)


def test_a_sweep_whose_report_is_lost_is_reported_again_and_made_once() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        await store(first)
        reports: list[Any] = []

        def first_report(method: str, args: tuple[Any, ...]) -> bool:
            if method == "hold" and args[2]:
                reports.append(args[2])
            return method == "hold" and bool(args[2]) and len(reports) == 1

        world.unheard = first_report
        clearing = asyncio.create_task(second.invalidate(ACME, None, None))
        while not reports:
            await asyncio.sleep(0.01)
        lead = await look(first)
        await asyncio.sleep(0)
        assert await clearing == 1
        follower = asyncio.create_task(look(first))
        await asyncio.sleep(0.01)
        first.land(lead, b"new", None, 60.0)
        assert await follower == Joined(b"new"), "what was begun since is not swept again"
        assert (await look(first)).value == b"new"
        assert reports == [{1: 1}, {1: 1}]
        assert first.stats()["leases"] == 1
        await world.close()

    virtually(session)


# ---------------------------------------------------------------------------------- in steps


def test_an_owner_answers_while_it_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "SWEEP_STEP", 10)

    async def session() -> None:
        now_s = 0.0
        cache = Cache(1_000_000, clock=lambda: now_s, random=lambda: 0.0)
        keys = [bytes([n]) * 32 + model_mark("mn"[n % 2]) for n in range(100)]
        for key in keys:
            cache.land([Landing(key, ACME, None, b"v", None, 60.0)])
        clearing = asyncio.create_task(cache.invalidate(None, "m"))
        await asyncio.sleep(0)
        assert 50 < cache.stats()["entries"] < 100
        now_s = 1.0
        answers = cache.lookup([asked(f"a-{n}", key) for n, key in enumerate(keys)])
        assert [isinstance(one, Hit) for one in answers] == [False, True] * 50
        cache.land([Landing(keys[0], ACME, "a-0", b"new", None, 60.0)])
        assert cache.lookup([asked("b-1", keys[0])]) == [Hit(b"new", 0.0)]
        assert await clearing == 49, "all but the one that is replaced"
        assert cache.stats()["entries"] == 51
        assert cache._entries._hidings == []
        assert cache.lookup([asked("b-1", keys[0])]) == [Hit(b"new", 0.0)]

    virtually(session)


def test_an_invalidation_whose_caller_leaves_is_carried_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(policy, "SWEEP_STEP", 10)

    async def session() -> None:
        cache = owner()
        for n in range(100):
            key = bytes([n]) * 32 + model_mark("m")
            cache.land([Landing(key, ACME, None, b"v", None, 60.0)])
        clearing = asyncio.create_task(cache.invalidate(None, "m"))
        await asyncio.sleep(0)
        clearing.cancel()
        await asyncio.wait([clearing])
        assert (cache.stats()["entries"], cache.stats()["invalidated"]) == (0, 100)

    virtually(session)


# ------------------------------------------------------------------------- late, lost, doubled


def test_an_entry_that_comes_late_from_before_a_sweep_is_not_kept() -> None:
    async def session() -> None:
        cache = await lent()
        clearing = asyncio.create_task(cache.invalidate(ACME))
        await asyncio.sleep(0)
        await cache.hold("a", 1, {1: 1}, 0.0)
        await clearing
        assert cache.keep("a", 1, [(KEY, ACME, Hit(b"from before", 0.0, 60.0))])
        assert cache.find("a", 1, [(ACME, KEY)])[0] == [None]
        await asyncio.sleep(TRAVEL_S + 0.1)
        assert cache.take("a", 1) is None, "it is over"
        assert cache.take("a", 2) is not None
        assert cache.keep("a", 2, [(KEY, ACME, Hit(b"from after", 0.0, 60.0))])
        assert cache.find("a", 2, [(ACME, KEY)])[0] != [None]

    virtually(session)


def test_what_an_owner_has_sent_before_a_sweep_is_not_taken_in_after_it() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.desk("a"), await world.desk("b")
        await store(first, KEYS[1])
        await asyncio.sleep(0.1)
        await lend(first)
        world.owners[0]._entries.put(KEY, ACME, b"v", 60.0, world.now_s)  # by a late landing
        world.late["find"] = 0.2
        finding = asyncio.create_task(look(first))
        await asyncio.sleep(0.03)
        await second.invalidate(ACME, None, None)
        assert not finding.done()
        await finding
        assert isinstance(await look(first), Lead)
        await world.close()

    virtually(session)


def test_a_call_that_was_swept_before_the_lease_is_neither_joined_nor_stored_under_it() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.desk("a"), await world.desk("b")
        old = await look(first)
        await second.invalidate(ACME, None, None)
        await lend(first)
        began_s = world.now_s
        new = await look(first)
        assert isinstance(new, Lead)
        assert world.now_s == began_s, "nobody was waited for"
        first.land(old, b"old", None, 600.0)
        assert isinstance(await first.ask([KEY], ACME, **STREAM), list)  # type: ignore[arg-type]
        first.land(new, b"new", None, 600.0)
        assert (await look(first)).value == b"new"
        await world.close()

    virtually(session)


def test_a_call_from_before_a_sweep_that_its_holder_never_heard_of_is_not_passed_on() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        old = await look(first)
        world.lost.add("hold")
        await second.invalidate(ACME, None, None)
        world.lost.clear()
        assert first.stats()["leases_run_out"] == 1
        began_s = world.now_s
        new = await look(second)
        assert isinstance(new, Lead)
        assert world.now_s - began_s < 1, "nobody was waited for"
        first.land(old, b"old", None, 600.0)
        await asyncio.sleep(0.1)
        second.land(new)
        await asyncio.sleep(0.1)
        assert isinstance(await look(second), Lead)
        await world.close()

    virtually(session)


def test_flights_that_come_back_twice_are_nobodys_while_another_has_the_lease() -> None:
    async def session() -> None:
        cache = await lent()
        mine = (asked("a-1"), 0.5)
        cache.give_back("a", 1, [mine], {})
        cache.land([Landing(KEY, ACME, "a-1", None, None, None)])
        cache.lookup([asked("b-1", KEYS[1])])
        cache.land([Landing(KEYS[1], ACME, "b-1", None, None, None)])
        await asyncio.sleep(20)
        cache.renew([])  # which forgets what has landed long ago
        assert cache.take("b", 1) is not None
        cache.give_back("a", 1, [mine], {})
        assert cache.stats()["flights"] == 0

    virtually(session)


def test_beyond_the_bound_of_sweeps_nothing_of_the_holder_is_taken_that_it_did_not_sweep(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(owner_module, "SWEEPS_MAX", 3)

    async def session() -> None:
        cache = await lent()
        tasks = [asyncio.create_task(cache.invalidate(None, f"m{n}")) for n in range(4)]
        await asyncio.sleep(0)
        told = await cache.hold("a", 1, {1: 0, 2: 0, 3: 0}, 0.0)
        assert told == Told(True, ((4, Sweep()),))
        assert not cache.give_back("a", 1, [], {1: 0, 2: 0, 3: 0}), "it has not made the fourth"
        assert not cache.keep("a", 1, [(KEY, ACME, Hit(b"v", 0.0, 60.0))])
        assert await asyncio.gather(*tasks) == [0] * 4

    virtually(session)


def test_a_stream_is_told_from_its_beginning_to_who_comes_after_a_lease() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.desk("a"), await world.desk("b")
        options: Any = STREAM | {"patience_s": 60.0}
        (lead,) = await first.ask([KEY], ACME, **options)
        assert isinstance(lead, Lead)
        (follow,) = await second.ask([KEY], ACME, **options)
        assert isinstance(follow, Follow)
        there = second.listen(follow.flight)
        await asyncio.sleep(0.2)
        first.say(lead, b"1")
        assert await there.more(1) == [b"1"]
        there.close()
        await asyncio.sleep(10)  # its held message is over
        await lend(first)
        assert (await second.ask([KEY], ACME, **options)) == [follow]
        there = second.listen(follow.flight)
        await asyncio.sleep(0.2)
        first.say(lead, b"2")
        assert await there.more(1) == [b"1", b"2"]
        first.land(lead, b"12")
        assert await there.more(1) == Joined(b"12")
        there.close()
        await world.close()

    virtually(session)


def test_streams_are_told_after_the_word_that_they_are_followed_was_lost() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.desk("a"), await world.desk("b")
        options: Any = STREAM | {"patience_s": 120.0}
        world.lost.add("followed")
        (lead,) = await first.ask([KEY], ACME, **options)
        assert isinstance(lead, Lead)
        (follow,) = await second.ask([KEY], ACME, **options)
        assert isinstance(follow, Follow)
        there = second.listen(follow.flight)
        await asyncio.sleep(14)
        world.lost.clear()
        await asyncio.sleep(4)
        first.say(lead, b"1")
        assert await there.more(1) == [b"1"]
        there.close()
        first.land(lead)
        await world.close()

    virtually(session)


# ------------------------------------------------------------------------------ what is near


def test_what_an_invalidation_overtakes_is_not_near_afterwards() -> None:
    async def session() -> None:
        world = World()
        desk, other = await world.desk("a"), await world.desk("b")
        await store(desk)
        await asyncio.sleep(0.1)
        world.late["lookup"] = 0.2
        late = asyncio.create_task(look(desk))
        await asyncio.sleep(0.05)
        await desk.invalidate(None, None, KEY)
        assert not late.done()
        assert (await late).value == b"v", "it was asked for before"
        assert desk.near(KEY, ACME) is None
        assert isinstance(await look(desk), Lead)
        await world.close()
        assert other.near(KEY, ACME) is None

    virtually(session)


@pytest.mark.parametrize(
    "named", [(ACME, None, None), (None, "m", None), (None, None, KEY), (None, None, None)]
)
def test_what_is_invalidated_is_not_near(named: tuple[Scope | None, str | None, Any]) -> None:
    async def session() -> None:
        world = World()
        desk = await world.desk("a")
        scope, model, key = named
        mine = bytes(32) + model_mark("m") if key is None else KEY
        await store(desk, mine)
        await asyncio.sleep(0.1)
        await look(desk, mine)
        assert desk.near(mine, ACME) == Hit(b"v", desk.near(mine, ACME).age_s)  # type: ignore[union-attr]
        await desk.invalidate(scope, model, key)
        assert desk.near(mine, ACME) is None
        await lend(desk)
        await store(desk, mine)
        assert desk.near(mine, ACME) is not None
        await desk.invalidate(scope, model, key)
        assert desk.near(mine, ACME) is None
        await world.close()

    virtually(session)


def test_what_is_near_on_a_lease_ends_with_its_entry_and_with_the_lease() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        first.land(await look(first, KEYS[1], read=False), b"short", None, 1.0)
        await store(first)
        assert first.near(KEY, ACME) == Hit(b"v", 0.0)
        assert first.near(KEYS[1], ACME) == Hit(b"short", 0.0)
        assert first.near(KEY, Scope("other")) is first.near(KEY, Scope(None)) is None
        await asyncio.sleep(1)
        assert first.near(KEYS[1], ACME) is None
        second.land(await look(second, KEYS[2], read=False))  # it is recalled for this
        assert not first.stats()["leased"]
        assert first.near(KEY, ACME) is None, "another may store a newer one from now on"
        await world.close()

    virtually(session)


def test_a_holder_that_is_late_has_nothing_near() -> None:
    async def session() -> None:
        world = World()
        desk = await world.leased("a")
        await store(desk)
        world.cut.add("a")
        await asyncio.sleep(LEASE_S - 1.1)
        assert desk.near(KEY, ACME) is not None
        world.frozen["a"] = asyncio.Event()  # it does nothing, and its lease is over meanwhile
        await asyncio.sleep(LEASE_S)
        assert desk.near(KEY, ACME) is None
        assert desk.stats()["leases_run_out"] == 1
        world.thaw("a")
        world.cut.clear()
        await world.close()

    virtually(session)


def test_what_everybody_shares_is_near_to_everybody_and_nobodys_own() -> None:
    async def session() -> None:
        world = World()
        desk = await world.desk("a")
        everybody = Scope(None)

        async def shared() -> Any:
            return await desk.lookup(KEY, everybody, read=True, join=True, patience_s=PATIENCE_S)

        desk.land(await shared(), b"v", None, 600.0)
        await asyncio.sleep(0.1)
        assert (await shared()).value == b"v"
        assert desk.near(KEY, everybody) is not None
        assert desk.near(KEY, ACME) is None
        assert await desk.invalidate(ACME, None, None) == 0
        assert isinstance(await shared(), Hit)
        assert await desk.invalidate(everybody, None, None) == 1
        assert desk.near(KEY, everybody) is None
        await world.close()

    virtually(session)
