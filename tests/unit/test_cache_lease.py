"""Desks that take the key space on a lease and give it back, over a network none too good."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cache import lease as leasing
from actors.cache.desk import Follow, Hit, Joined, Lead, Listening, home
from actors.cache.lease import ALONE_S, LEASE_S, MARGIN_S, RECALL_S, Lease
from actors.cache.owner import Cache
from actors.cache.policy import Ask, Landing, Miss, Searching
from tests.support.cache_world import ACME, KEY, KEYS, PATIENCE_S, World, look, virtually

# ------------------------------------------------------------------------------- the owner's book


class TestLease:
    def test_a_new_owner_lends_nothing_until_leases_of_the_one_before_are_over(self) -> None:
        lease = Lease(now=10.0)
        lease.heard("a", 10.0)
        assert not lease.take("a", 1, 10.0 + LEASE_S)
        assert lease.take("a", 1, 10.0 + LEASE_S + MARGIN_S)

    def test_only_one_who_was_alone_for_a_while_may_take_it(self) -> None:
        lease = Lease(now=0.0)
        lease.heard("a", 50.0)
        lease.heard("b", 51.0)
        assert not lease.take("a", 1, 60.0)
        assert not lease.take("b", 1, 51.0 + ALONE_S - 0.1)
        lease.heard("b", 54.0)
        assert lease.take("b", 1, 51.0 + ALONE_S)

    def test_it_lasts_while_the_holder_is_heard_of(self) -> None:
        lease = held_lease()
        assert lease.renew("a", 1, 102.0)
        assert lease.holder(102.0 + LEASE_S) == ("a", 1)
        assert lease.holder(102.0 + LEASE_S + MARGIN_S) is None
        assert not lease.renew("a", 1, 110.0)

    def test_a_recalled_one_is_not_prolonged(self) -> None:
        lease = held_lease()
        lease.recalled = True
        assert lease.renew("a", 1, 102.0)
        assert lease.holder(100.0 + LEASE_S + MARGIN_S) is None

    def test_a_number_that_is_over_is_never_lent_again(self) -> None:
        lease = held_lease()
        assert lease.take("a", 1, 101.0), "said twice"
        assert lease.end("a", 1)
        assert not lease.take("a", 1, 101.0), "said late"
        assert not lease.end("a", 1)
        assert lease.take("a", 2, 101.0)
        assert not lease.end("a", 1), "said very late"
        assert lease.holder(101.0) == ("a", 2)

    def test_a_lease_given_back_before_it_was_taken_is_never_taken(self) -> None:
        lease = Lease(now=0.0)
        lease.heard("a", 90.0)
        assert not lease.end("a", 5)
        assert not lease.take("a", 5, 100.0)
        assert lease.take("a", 6, 100.0)

    def test_what_is_remembered_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(leasing, "OVER_MAX", 10)
        lease = Lease(now=0.0)
        for number in range(100):
            lease.end(f"d{number}", 1)
        assert len(lease._over) == 10


def held_lease() -> Lease:
    lease = Lease(now=0.0)
    lease.heard("a", 90.0)
    assert lease.take("a", 1, 100.0)
    return lease


# --------------------------------------------------------------------------------------- alone


def test_a_desk_that_is_alone_asks_nobody() -> None:
    async def session() -> None:
        world = World()
        desk = await world.leased("a")
        world.sent.clear()
        for number in range(1000):
            key = number.to_bytes(40, "big")
            lead = await look(desk, key, read=False)
            assert isinstance(lead, Lead)
            desk.land(lead, b"v")
        stored = await look(desk)
        desk.land(stored, b"v", None, 60.0)
        assert await look(desk) == Hit(b"v", 0.0)
        assert world.sent.total() == 0
        began_s = world.now_s
        await asyncio.sleep(20)
        assert set(world.sent) == {"hold"}
        assert world.sent["hold"] <= 1.1 * (world.now_s - began_s)
        await world.close()

    virtually(session)


def test_followers_of_a_desk_that_is_alone_share_its_call() -> None:
    async def session() -> None:
        world = World()
        desk = await world.leased("a")
        world.sent.clear()
        lead = await look(desk)
        followers = [asyncio.create_task(look(desk)) for _ in range(5)]
        await asyncio.sleep(0)
        desk.land(lead, b"v")
        assert await asyncio.gather(*followers) == [Joined(b"v")] * 5
        lost = await look(desk)
        (next_one, other) = [asyncio.create_task(look(desk)) for _ in range(2)]
        await asyncio.sleep(0)
        desk.land(lost)
        await asyncio.sleep(0.01)
        led = [task for task in (next_one, other) if task.done()]
        assert len(led) == 1
        desk.land(led[0].result(), b"w")
        assert {type(await task) for task in (next_one, other)} == {Lead, Joined}
        assert world.sent.total() == 0
        await world.close()

    virtually(session)


def test_what_the_owner_stores_is_found_and_moves_to_the_holder() -> None:
    async def session() -> None:
        world = World()
        first = await world.desk("a")
        for key in KEYS:
            first.land(await look(first, key), key[:1] * 9, None, 600.0)
        await asyncio.sleep(5)
        assert first.stats()["leased"]
        world.sent.clear()
        assert (await look(first, KEYS[2])).value == KEYS[2][:1] * 9
        assert world.sent["find"] == 1
        assert world.owners[0].stats()["entries"] == 0, "the rest came along"
        missing = bytes(40)[:-1] + b"x"
        first.land(await look(first, missing), b"v", None, 60.0)
        assert (await look(first, KEYS[3])).value == KEYS[3][:1] * 9
        assert world.sent.total() - world.sent["hold"] == 1
        await world.close()

    virtually(session)


def test_a_refreshed_answer_replaces_the_one_that_the_owner_has() -> None:
    async def session() -> None:
        world = World()
        desk = await world.desk("a")
        desk.land(await look(desk), b"old", None, 600.0)
        await asyncio.sleep(5)
        await look(desk, KEYS[1], read=False)
        await asyncio.sleep(10)
        assert desk.stats()["leased"]
        assert desk._channels[0]._holding.tenure is not None
        desk.land(await look(desk, read=False), b"new", None, 600.0)
        await asyncio.sleep(0.1)
        desk._channels[0]._holding.tenure.entries.remove(KEY, ACME)  # as if it had to make room
        assert (await look(desk)).value == b"new"
        await world.close()

    virtually(session)


# --------------------------------------------------------------------------- a second one arrives


def test_the_second_desks_first_ask_follows_what_the_first_leads() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        lead = await look(first)
        near = asyncio.create_task(look(first))
        far = asyncio.create_task(look(second))
        await asyncio.sleep(RECALL_S)
        assert not first.stats()["leased"]
        assert not near.done()
        assert not far.done()
        first.land(lead, b"v")
        assert [await near, await far] == [Joined(b"v")] * 2
        await world.close()

    virtually(session)


def test_streams_go_on_for_those_who_listened_and_for_those_who_come() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        ask = {"read": True, "join": True, "patience_s": PATIENCE_S, "stream": True}
        (lead,) = await first.ask([KEY], ACME, **ask)  # type: ignore[arg-type]
        assert isinstance(lead, Lead)
        first.say(lead, b"1")
        (near,) = await first.ask([KEY], ACME, **ask)  # type: ignore[arg-type]
        assert isinstance(near, Follow)
        told: list[bool] = []
        first.on_followed(lead, lambda: told.append(True))
        here = first.listen(near.flight)
        assert told == [True] == [first.is_followed(lead)]
        assert await here.more(1) == [b"1"]
        (far,) = await second.ask([KEY], ACME, **ask)  # type: ignore[arg-type]
        assert far == near
        there = second.listen(near.flight)
        await asyncio.sleep(0.5)
        first.say(lead, b"2")
        assert await here.more(1) == [b"2"]
        assert await there.more(1) == [b"1", b"2"]
        first.land(lead, b"12")
        assert await here.more(1) == await there.more(1) == Joined(b"12")
        here.close()
        there.close()
        await world.close()

    virtually(session)


def test_entries_follow_in_parts_and_the_younger_one_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actors.cache.holding.KEEP_MESSAGE_BYTES", 2000)

    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        for number in range(20):
            key = number.to_bytes(40, "big")
            first.land(await look(first, key), b"v" * 500, None, 600.0)
        first.land(await look(first, KEYS[1]), b"large" * 10_000, None, 600.0)
        await asyncio.sleep(1)
        await look(second, KEYS[2], read=False)
        await asyncio.sleep(2)
        assert world.sent["keep"] > 5
        assert world.owners[0].stats()["entries"] == 21
        hit = await look(second, KEYS[1])
        assert isinstance(hit, Hit)
        assert (len(hit.value), hit.age_s > 2) == (50_000, True)
        kept = (KEYS[1], ACME, Hit(b"older", 100.0, 50.0))
        owner = world.owners[0]
        owner._keeper = ("a", 1)
        assert owner.keep("a", 1, [kept])
        assert (await look(first, KEYS[1])).value == hit.value
        await world.close()

    virtually(session)


def test_the_one_that_remains_has_the_lease_again() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        second.land(await look(second, KEYS[1], read=False), b"w")
        await asyncio.sleep(1)
        assert not first.stats()["leased"]
        for _ in range(30):
            first.land(await look(first, KEYS[2], read=False), b"v")
            await asyncio.sleep(0.5)
        assert first.stats()["leased"]
        assert first.stats()["leases"] == 2
        await world.close()

    virtually(session)


def test_two_that_both_ask_have_no_lease() -> None:
    async def session() -> None:
        world = World()
        desks = [await world.desk("a"), await world.desk("b")]
        for _ in range(40):
            for desk, key in zip(desks, KEYS, strict=False):
                desk.land(await look(desk, key, read=False), b"v")
            await asyncio.sleep(0.5)
            assert not any(desk.stats()["leased"] for desk in desks)
        assert world.sent["lease"] <= 10
        await world.close()

    virtually(session)


# ------------------------------------------------------------------------------- death and freeze


def test_a_dead_holder_costs_one_wait_and_is_forgotten_after_its_lease() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        await look(first)
        world.dead.add("a")
        began_s = world.now_s
        assert (await look(second)).flight is None, "it computes alone"
        assert world.now_s - began_s < RECALL_S + 0.2
        began_s = world.now_s
        assert (await look(second)).flight is None
        assert world.now_s - began_s < 0.1
        await asyncio.sleep(LEASE_S + MARGIN_S)
        assert (await look(second)).flight is not None
        await world.close()

    virtually(session)


def test_a_frozen_holder_notices_by_its_own_clock() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        first.land(await look(first), b"mine", None, 600.0)
        world.frozen["a"] = asyncio.Event()
        await asyncio.sleep(LEASE_S + MARGIN_S + 0.5)
        lead = await look(second, read=False)
        assert lead.flight is not None
        second.land(lead, b"newer", None, 600.0)
        await asyncio.sleep(0.1)
        asked = asyncio.create_task(look(first))  # it wakes up with this
        await asyncio.sleep(0)
        assert not asked.done(), "no answer of its own"
        world.thaw("a")
        assert (await asked).value == b"newer"
        assert first.stats()["leases_run_out"] == 1
        await world.close()

    virtually(session)


def test_without_its_owner_a_holder_goes_on_to_the_end_of_the_lease_then_fails_open() -> None:
    async def session() -> None:
        world = World()
        desk = await world.leased("a")
        world.cut.add("a")
        lead = await look(desk)
        assert lead.flight is not None
        follower = asyncio.create_task(look(desk))
        await asyncio.sleep(1)
        desk.land(lead, b"v")
        assert await follower == Joined(b"v")
        await asyncio.sleep(LEASE_S)
        began_s = world.now_s
        assert (await look(desk)).flight is None
        assert world.now_s == began_s
        world.cut.clear()
        await asyncio.sleep(20)
        assert not desk.stats()["away"]
        await world.close()

    virtually(session)


def test_a_restarted_owner_is_told_what_is_led_and_lends_anew_later() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        lead = await look(first)
        first.land(await look(first, KEYS[1]), b"kept", None, 600.0)
        world.restart(0)
        restarted_s = world.now_s
        await asyncio.sleep(2)
        far = asyncio.create_task(look(second))
        await asyncio.sleep(0.5)
        assert not far.done()
        first.land(lead, b"v")
        assert await far == Joined(b"v")
        assert (await look(second, KEYS[1])).value == b"kept"
        while not first.stats()["leased"]:
            await look(first, KEYS[2], read=False)
            await asyncio.sleep(0.1)
        assert world.now_s - restarted_s >= LEASE_S + MARGIN_S
        await world.close()

    virtually(session)


def test_a_desk_that_closes_leaves_its_entries_and_its_lease_behind() -> None:
    async def session() -> None:
        world = World()
        first = await world.leased("a")
        first.land(await look(first), b"v", None, 600.0)
        await first.close()
        world.dead.add("a")
        second = await world.desk("b")
        assert (await look(second)).value == b"v"
        await world.close()

    virtually(session)


# ------------------------------------------------------------------------------- invalidation


def test_what_is_invalidated_is_gone_from_the_holder_when_that_is_answered() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        first.land(await look(first), b"v", None, 600.0)
        under_way = await look(first, KEYS[1])
        await second.invalidate(ACME, None, None)
        assert first.stats()["leased"]
        assert isinstance(await look(first), Lead)
        first.land(under_way, b"from before", None, 600.0)
        assert isinstance(await look(first, KEYS[1]), Lead)
        await world.close()

    virtually(session)


def test_what_a_silent_holder_kept_is_not_taken_after_an_invalidation() -> None:
    async def session() -> None:
        world = World()
        first, second = await world.leased("a"), await world.desk("b")
        first.land(await look(first), b"v", None, 600.0)
        world.frozen["a"] = asyncio.Event()
        began_s = world.now_s
        await second.invalidate(None, None, KEY)
        assert world.now_s - began_s < LEASE_S + MARGIN_S + 0.2
        world.thaw("a")
        await asyncio.sleep(2)
        assert isinstance(await look(second), Lead)
        assert isinstance(await look(first, patience_s=1), Lead)
        await world.close()

    virtually(session)


# ------------------------------------------------------------------------------------- shards


def test_keys_are_spread_and_stay_where_they_are_when_there_are_more_owners() -> None:
    keys = [n.to_bytes(40, "big") for n in range(3000)]
    three, four = ([home(key, shards) for key in keys] for shards in (3, 4))
    assert all(900 < three.count(shard) < 1100 for shard in range(3))
    moved = [after for before, after in zip(three, four, strict=True) if before != after]
    assert set(moved) == {3}
    assert 650 < len(moved) < 850


def test_a_dead_shard_holds_up_nobody_elses_keys() -> None:
    async def session() -> None:
        world = World(shards=3)
        desk, other = await world.desk("a"), await world.desk("b")
        keys = [n.to_bytes(40, "big") for n in range(30)]
        found = await desk.ask(keys, ACME, read=True, join=True, patience_s=PATIENCE_S)
        assert world.sent["lookup"] == 3
        seen = await other.ask(keys, ACME, read=True, join=True, patience_s=PATIENCE_S)
        assert seen == [Follow(one.flight) for one in found if isinstance(one, Lead) and one.flight]
        for one in found:
            assert isinstance(one, Lead)
            desk.land(one, one.key, None, 60.0)
        flights = [one.flight for one in seen if isinstance(one, Follow)]
        joined = await other.follow_all(flights, PATIENCE_S)
        assert joined == [Joined(key) for key in keys]
        line: Any = other._channels[1]._ref
        line._desk = "gone"
        world.dead.add("gone")
        await asyncio.sleep(2)
        began_s = world.now_s
        answers = {}

        async def ask(key: bytes) -> None:
            answers[key] = (await look(other, key), world.now_s - began_s)

        await asyncio.gather(*(ask(key) for key in keys))
        for key, (answer, took_s) in answers.items():
            if home(key, 3) == 1:
                assert isinstance(answer, Lead)
                assert took_s < 0.3
            else:
                assert answer.value == key
                assert took_s < 0.1
        line._desk = "b"
        await world.close()

    virtually(session)


def test_who_leaves_with_keys_of_several_shards_leads_none() -> None:
    async def session() -> None:
        world = World(shards=3)
        desk = await world.desk("a")
        keys = [n.to_bytes(40, "big") for n in range(30)]
        for delay_s in (0.0, 0.005, 0.01, 0.02, 0.03, 0.05):
            work = desk.ask(keys, ACME, read=True, join=True, patience_s=PATIENCE_S)
            task = asyncio.create_task(work)
            await asyncio.sleep(delay_s)
            if not task.cancel():
                for lead in task.result():
                    assert isinstance(lead, Lead)
                    desk.land(lead)
            await asyncio.sleep(0.5)
            assert desk.stats()["leading"] == 0
            assert [owner.stats()["flights"] for owner in world.owners] == [0, 0, 0]
        await world.close()

    virtually(session)


# --------------------------------------------------------------------------- the owner's verbs


def test_nobody_is_answered_while_the_holder_has_not_given_back() -> None:
    async def session() -> None:
        now = [100.0]
        cache = Cache(1_000_000, clock=lambda: now[0], random=lambda: 0.0)
        cache.lookup([Ask(KEY, ACME, "a-1", True, True, 3.0)])
        now[0] += 10
        assert cache.take("a", 1) is not None
        other = Ask(KEY, ACME, "b-1", True, True, 3.0)
        assert cache.lookup([other]) == [Searching()]
        mine = Ask(KEY, ACME, "a-2", True, True, 3.0)
        assert cache.give_back("a", 1, [(mine, 1.0)], {})
        assert await cache.search([other]) == [Follow("a-2")]
        cache.land([Landing(KEY, ACME, "a-2", b"v", None, None)])
        assert cache.give_back("a", 1, [(mine, 1.0)], {}), "said twice"
        assert cache.lookup([other]) == [Lead(KEY, ACME, "b-1")]

    asyncio.run(session())


def test_a_silent_holder_is_waited_for_once() -> None:
    async def session() -> None:
        loop = asyncio.get_running_loop()
        cache = Cache(1_000_000, clock=loop.time, random=lambda: 0.0)
        cache.lookup([Ask(KEY, ACME, "a-1", True, False, 3.0)])
        await asyncio.sleep(10)
        assert cache.take("a", 1) is not None
        other = Ask(KEY, ACME, "b-1", True, True, 3.0)
        assert cache.lookup([other]) == [Searching()]
        assert await cache.search([other]) == [Miss()]
        assert cache.lookup([other]) == [Miss()]
        await asyncio.sleep(LEASE_S)
        assert cache.lookup([other]) == [Lead(KEY, ACME, "b-1")]

    virtually(session)


# ------------------------------------------------------------------------------ whatever happens


PIECE_BYTES = 30


class Session:
    """Requests that come and go, each of which is watched to its end."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.versions: Counter[bytes] = Counter()
        self.landed: dict[tuple[bytes, int], float] = {}
        self.leading: dict[bytes, int] = {}
        self.waiting: dict[asyncio.Task[None], tuple[str, float]] = {}
        self.failed: BaseException | None = None

    def ask(
        self, name: str, key: bytes, read: bool, work_s: float, end: str, stream: bool = False
    ) -> None:
        request = self._stream if stream else self._request
        task = asyncio.create_task(request(name, key, read, work_s, end))
        self.waiting[task] = (name, self.world.now_s)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.waiting.pop(task, None)
        if not task.cancelled():
            self.failed = self.failed or task.exception()

    async def _request(self, name: str, key: bytes, read: bool, work_s: float, end: str) -> None:
        desk, began_s = self.world.desks[name], self.world.now_s
        found = await desk.lookup(key, ACME, read=read, join=True, patience_s=PATIENCE_S)
        if isinstance(found, Lead):
            await self._lead(name, found, work_s, end)
        else:
            self._judge(key, found, began_s)

    async def _stream(self, name: str, key: bytes, read: bool, work_s: float, end: str) -> None:
        """As `_request`, piece by piece: who has lost its leader begins again."""
        desk, began_s = self.world.desks[name], self.world.now_s
        until_s = began_s + PATIENCE_S
        while self.world.now_s < until_s:
            (found,) = await desk.ask(
                [key], ACME, read=read, join=True, patience_s=PATIENCE_S, stream=True
            )
            if isinstance(found, Lead):
                await self._lead(name, found, work_s, end)
                return
            if isinstance(found, Follow):
                listening = desk.listen(found.flight)
                try:
                    whole = await self._listen(listening, until_s)
                finally:
                    listening.close()
                if whole is None:
                    continue
                found = whole
            self._judge(key, found, began_s)
            return

    async def _listen(self, listening: Listening, until_s: float) -> Joined | None:
        """The whole, of which the pieces must be the beginning, each once and in their order."""
        heard = b""
        while isinstance(news := await listening.more(until_s - self.world.now_s), list):
            assert news, "a piece is nothing"
            heard += b"".join(news)
        if news is not None:
            assert news.value.startswith(heard), "pieces of something else"
        return news

    def _judge(self, key: bytes, found: Hit | Joined, began_s: float) -> None:
        whole_key, version = found.value[:40], int.from_bytes(found.value[40:48], "big")
        assert whole_key == key
        assert found.value == _value(key, version), "not whole"
        assert (key, version) in self.landed, "never landed"
        if isinstance(found, Hit) and not self.world.wild:
            newer_s = [
                at for (of, number), at in self.landed.items() if of == key and number > version
            ]
            assert began_s - min(newer_s, default=began_s) < 1.5, "an old answer came back"

    async def _lead(self, name: str, lead: Lead, work_s: float, end: str) -> None:
        world, desk, key = self.world, self.world.desks[name], lead.key
        self.leading[key] = self.leading.get(key, 0) + 1
        self.versions[key] += 1
        version = self.versions[key]
        value = _value(key, version)
        try:
            if not world.wild:
                assert self.leading[key] == 1, "two lead"
                assert lead.flight is not None
            for start in range(0, len(value), PIECE_BYTES):
                await asyncio.sleep(work_s * PIECE_BYTES / len(value))
                if name not in world.dead:
                    desk.say(lead, value[start : start + PIECE_BYTES])
        finally:
            self.leading[key] -= 1
        if name in world.dead:
            return
        if end == "value":
            self.landed[key, version] = world.now_s
            desk.land(lead, value, None, 300.0)
        else:
            desk.land(lead)

    def check(self) -> None:
        world = self.world
        if self.failed is not None:
            raise self.failed
        for shard in range(len(world.owners)):
            assert len(world.holders(shard)) <= 1, "leases overlap"
        assert world.broken is None, world.broken
        for name, since_s in self.waiting.values():
            if name not in world.dead and name not in world.frozen:
                assert world.now_s - since_s < 3 * PATIENCE_S, "somebody waits for ever"

    async def pass_time(self, seconds: float) -> None:
        until_s = self.world.now_s + seconds
        while self.world.now_s < until_s:
            await asyncio.sleep(0.05)
            self.check()


def _value(key: bytes, version: int) -> bytes:
    return key + version.to_bytes(8, "big") + bytes([version % 251]) * (50 * (version % 7))


EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["ask"] * 3 + ["stream"] * 3 + ["refresh", "drop", "time", "long", "die", "freeze"]
        )
        | st.sampled_from(["thaw", "restart", "arrive"]),
        st.integers(0, 2),
        st.sampled_from(KEYS[:2]),
        st.floats(0, 2),
    ),
    max_size=30,
)


async def live(seed: int, shards: int, events: list[Any], *, wild: bool) -> None:
    world = World(shards, seed, wild=wild)
    session = Session(world)
    born = 1
    await (world.leased("d0") if seed % 2 else world.desk("d0"))
    for event, number, key, seconds in events:
        alive = [name for name in world.desks if name not in world.dead]
        awake = [name for name in alive if name not in world.frozen]
        name = alive[number % len(alive)]
        if event in ("ask", "stream", "refresh", "drop"):
            end = "nothing" if event == "drop" else "value"
            if not awake:
                continue
            session.ask(
                awake[number % len(awake)], key, event != "refresh", seconds, end, event == "stream"
            )
            await session.pass_time(0.05 if number else 0.3)
        elif event == "time":
            await session.pass_time(seconds)
        elif event == "long":
            await session.pass_time(4 * seconds)
        elif event == "arrive" and born < 4:
            await world.desk(f"d{born}")
            born += 1
        elif wild and event == "die" and len(alive) > 1:
            world.dead.add(name)
        elif wild and event == "freeze":
            world.frozen.setdefault(name, asyncio.Event())
        elif wild and event == "thaw" and world.frozen:
            name = next(iter(world.frozen))
            if number:  # it asks before it hears what came meanwhile
                session.ask(name, key, True, seconds, "value")
                await asyncio.sleep(0)
                session.check()
            world.thaw(name)
        elif wild and event == "restart":
            world.restart(number % shards)
    for name in list(world.frozen):
        world.thaw(name)
    await session.pass_time(10.0)
    for _ in range(40):
        waiting = [task for task, (name, _) in session.waiting.items() if name not in world.dead]
        if not waiting:
            break
        await session.pass_time(2.0)
    assert not waiting, "somebody waits for ever"
    for task in list(session.waiting):
        task.cancel()
    await world.close()


def run(seed: int, shards: int, events: list[Any], *, wild: bool) -> None:
    failures: list[dict[str, Any]] = []

    async def session() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        await live(seed, shards, events, wild=wild)

    virtually(session)
    assert not failures, failures[0]


@given(seed=st.integers(0, 2**16), shards=st.sampled_from([1, 1, 2]), events=EVENTS)
@settings(max_examples=60, deadline=None)
def test_while_no_message_is_lost_one_leads_and_answers_are_whole(
    seed: int, shards: int, events: list[Any]
) -> None:
    run(seed, shards, events, wild=False)


@given(seed=st.integers(0, 2**16), shards=st.sampled_from([1, 1, 2]), events=EVENTS)
@settings(max_examples=60, deadline=None)
def test_whatever_is_lost_leases_never_overlap_and_nobody_waits_for_ever(
    seed: int, shards: int, events: list[Any]
) -> None:
    run(seed, shards, events, wild=True)
