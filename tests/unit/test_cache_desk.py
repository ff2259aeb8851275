from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cache import channel as channel_module
from actors.cache import desk as desk_module
from actors.cache.desk import CacheDesk, FlightFailed, Hit, Joined, Lead, Listening
from actors.cache.owner import Cache
from actors.cache.policy import Follow, Scope
from actors.ref import InlineRef, OwnerUnavailable

ACME = Scope("acme")
KEY = b"k" * 32


class World:
    """One owner, desks over lines that can be cut, and a clock that only the test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.owner = Cache(10_000_000, clock=self.clock, random=lambda: 0.0)
        self.down: set[str] = set()
        self.sent: Counter[str] = Counter()
        self.pauses: dict[str, list[asyncio.Future[None]]] = {}

    def clock(self) -> float:
        return self.now_s

    def desk(self, name: str) -> CacheDesk:
        self.pauses[name] = []

        async def pause(_: float) -> None:
            waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.pauses[name].append(waiting)
            await waiting

        return CacheDesk([Line(self, name)], name, clock=self.clock, pause=pause)

    async def pass_time(self, seconds: float, *alive: str) -> None:
        """Moves the clock in steps of a second; only `alive` desks' background tasks run."""
        for _ in range(int(seconds)):
            self.now_s += 1
            for name in alive:
                for waiting in self.pauses[name]:
                    if not waiting.done():
                        waiting.set_result(None)
                self.pauses[name].clear()
            await settle()
        self.owner.renew([])
        await settle()


class Line:
    name = "cache"

    def __init__(self, world: World, desk: str) -> None:
        self._world = world
        self._desk = desk
        self._inner = InlineRef("cache", world.owner)
        self.sent = world.sent

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        if self._desk in self._world.down:
            raise OwnerUnavailable(self.name, "cut")
        return await self._inner.ask(method, *args)


async def settle() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


async def look(desk: CacheDesk, key: bytes = KEY, patience_s: float = 60.0) -> Any:
    return await desk.lookup(key, ACME, read=True, join=True, patience_s=patience_s)


async def test_of_many_identical_asks_one_leads_and_all_get_its_answer() -> None:
    world = World()
    desks = [world.desk(f"d{n}") for n in range(4)]
    for desk in desks:
        await desk.start()
    asks = [asyncio.create_task(look(desks[n % 4])) for n in range(100)]
    await settle()
    (leader,) = [n for n, task in enumerate(asks) if task.done()]
    lead = asks[leader].result()
    assert isinstance(lead, Lead)
    desks[leader % 4].land(lead, b"v", None, 60.0)
    answers = await asyncio.gather(*(task for n, task in enumerate(asks) if n != leader))
    assert answers == [Joined(b"v")] * 99
    assert await look(desks[0]) == Hit(b"v", 0.0)
    # One look-up message per desk, one held message per desk that follows another.
    assert world.sent["lookup"] == 5
    assert world.sent["hear"] == 3
    for desk in desks:
        await desk.close()


async def test_look_ups_of_one_tick_are_one_message() -> None:
    world = World()
    desk = world.desk("d")
    await asyncio.gather(*(look(desk, bytes([n]) * 32) for n in range(100)))
    assert world.sent == {"lookup": 1}
    await desk.close()


async def test_landings_of_one_tick_are_one_message() -> None:
    world = World()
    desk = world.desk("d")
    leads = await asyncio.gather(*(look(desk, bytes([n]) * 32) for n in range(100)))
    for lead in leads:
        desk.land(lead, b"v", None, 60.0)
    await settle()
    assert world.sent == {"lookup": 1, "land": 1}
    assert desk.stats()["landing_bytes"] == 0
    assert world.owner.stats()["entries"] == 100


async def test_many_keys_are_answered_together_in_their_order() -> None:
    world = World()
    desk, other = world.desk("d"), world.desk("other")
    keys = [bytes([n % 256, n // 256]) * 16 for n in range(600)]
    led = await look(other, keys[500])
    desk.land(await look(desk, keys[3]), b"v", None, 60.0)
    await settle()
    world.sent.clear()
    found = await desk.ask(keys, ACME, read=True, join=True, patience_s=60)
    assert world.sent == {"lookup": 3}
    assert [n for n, one in enumerate(found) if not isinstance(one, Lead)] == [3, 500]
    assert (found[3], found[500]) == (Hit(b"v", 0.0), Follow(led.flight))
    for one in found:
        if isinstance(one, Lead):
            desk.land(one, b"w")
    await settle()
    assert desk.stats()["leading"] == 0


async def test_a_caller_of_many_that_is_cancelled_leaves_no_lead_behind() -> None:
    world = World()
    desk = world.desk("d")
    keys = [bytes([n % 256, n // 256]) * 16 for n in range(600)]
    for steps in range(12):
        task = asyncio.create_task(desk.ask(keys, ACME, read=True, join=True, patience_s=60))
        for _ in range(steps):
            await asyncio.sleep(0)
        if not task.cancel():
            break  # it has its leads
        await settle()
        await settle()
        assert world.owner.stats()["flights"] == 0, steps
        assert desk.stats()["leading"] == 0


async def test_a_long_list_of_values_lands_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel_module, "LANDING_MESSAGE_BYTES", 25)
    world = World()
    desk = world.desk("d")
    found = await desk.ask(
        [bytes([n]) * 32 for n in range(7)], ACME, read=True, join=True, patience_s=60
    )
    for lead in found:
        assert isinstance(lead, Lead)
        desk.land(lead, b"0123456789", None, 60.0)
    await settle()
    await settle()
    assert world.sent == {"lookup": 1, "land": 4}
    assert world.owner.stats()["entries"] == 7


async def test_with_nothing_to_read_or_join_nobody_is_asked() -> None:
    world = World()
    desk = world.desk("d")
    lead = await desk.lookup(KEY, ACME, read=False, join=False, patience_s=60)
    assert lead == Lead(KEY, ACME, None)
    desk.land(lead, b"v", None, None)
    await settle()
    assert world.sent == {}


async def test_a_leaders_error_goes_to_those_who_waited_and_the_next_leads() -> None:
    world = World()
    desk = world.desk("d")
    lead = await look(desk)
    followers = [asyncio.create_task(look(desk)) for _ in range(3)]
    await settle()
    desk.land(lead, None, b"boom")
    for task in followers:
        with pytest.raises(FlightFailed) as caught:
            await task
        assert caught.value.error == b"boom"
    assert isinstance(await look(desk), Lead)
    await desk.close()


async def test_a_leader_that_lands_nothing_hands_over_to_one_follower() -> None:
    world = World()
    desk = world.desk("d")
    lead = await look(desk)
    followers = [asyncio.create_task(look(desk)) for _ in range(5)]
    await settle()
    desk.land(lead)
    await settle()
    done = [task for task in followers if task.done()]
    assert [type(task.result()) for task in done] == [Lead]
    desk.land(done[0].result(), b"v")
    assert await asyncio.gather(*set(followers) - set(done)) == [Joined(b"v")] * 4
    await desk.close()


async def test_a_slow_leader_keeps_the_lead_and_a_dead_one_loses_it() -> None:
    world = World()
    leading, following = world.desk("leading"), world.desk("following")
    await leading.start()
    await following.start()
    lead = await look(leading)
    follower = asyncio.create_task(look(following))
    await settle()
    await world.pass_time(20, "leading", "following")
    assert not follower.done()
    await world.pass_time(4, "following")  # the leader's process is dead
    assert isinstance(await follower, Lead)
    leading.land(lead, b"late but whole", None, 60.0)
    await settle()
    assert await look(following) == Hit(b"late but whole", 0.0)
    await leading.close()
    await following.close()


async def test_a_leader_beyond_its_patience_is_given_up() -> None:
    world = World()
    leading, following = world.desk("leading"), world.desk("following")
    await leading.start()
    await look(leading, patience_s=5)
    follower = asyncio.create_task(look(following))
    await settle()
    await world.pass_time(4, "leading")
    assert not follower.done()
    await world.pass_time(6, "leading")
    assert isinstance(await follower, Lead)
    assert leading.stats()["given_up"] == 1
    await leading.close()
    await following.close()


async def test_a_cancelled_caller_leaves_no_lead_behind() -> None:
    world = World()
    desk = world.desk("d")
    caller = asyncio.create_task(look(desk))
    await asyncio.sleep(0)
    caller.cancel()
    await settle()
    assert world.owner.stats()["flights"] == 0
    assert desk.stats()["leading"] == 0
    assert isinstance(await look(desk), Lead)


async def test_a_caller_cancelled_with_the_lead_in_its_hands_gives_it_back() -> None:
    world = World()
    desk = world.desk("d")
    caller = asyncio.create_task(look(desk))
    while not desk.stats()["leading"]:
        await asyncio.sleep(0)
    caller.cancel()
    await settle()
    assert caller.cancelled()
    assert world.owner.stats()["flights"] == 0


async def test_a_cancelled_follower_does_not_disturb_the_others() -> None:
    world = World()
    desk = world.desk("d")
    lead = await look(desk)
    leaver, stayer = (asyncio.create_task(look(desk)) for _ in range(2))
    await settle()
    leaver.cancel()
    await settle()
    desk.land(lead, b"v")
    assert await stayer == Joined(b"v")


async def test_without_an_owner_everybody_leads_at_once_and_it_is_asked_only_once() -> None:
    world = World()
    desk = world.desk("d")
    await desk.start()
    world.down.add("d")
    assert isinstance(await look(desk), Lead)
    for _ in range(50):
        lead = await look(desk)
        assert lead.flight is None
        desk.land(lead, b"v", None, 60.0)
    await settle()
    assert world.sent["lookup"] == 1
    assert desk.stats()["landings_dropped"] == 50
    world.down.clear()
    await world.pass_time(1, "d")
    assert desk.stats()["away"] is False
    assert (await look(desk)).flight is not None
    await desk.close()


async def test_an_answer_that_was_lost_still_lands() -> None:
    world = World()
    desk, other = world.desk("d"), world.desk("other")
    await desk.start()
    ask = Line.ask

    class Deaf(Line):
        async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
            answer = await ask(self, method, *args)
            if method == "lookup":
                raise OwnerUnavailable("cache", "too slow")
            return answer

    desk._channels[0]._ref = Deaf(world, "d")
    lead = await look(desk)
    follower = asyncio.create_task(look(other))
    await settle()
    assert not follower.done()
    await world.pass_time(1, "d")  # the owner is found again
    desk.land(lead, b"v")
    assert await follower == Joined(b"v")
    await desk.close()


async def test_a_flood_of_values_lands_empty_instead_of_filling_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "LANDING_BYTES_MAX", 10)
    world = World()
    desk = world.desk("d")
    leads = [await look(desk, bytes([n]) * 32) for n in range(3)]
    for lead in leads:
        desk.land(lead, b"12345", None, 60.0)
    await settle()
    assert world.owner.stats()["entries"] == 2
    assert world.owner.stats()["flights"] == 0
    assert desk.stats()["landings_emptied"] == 1


async def test_two_desks_of_one_process_do_not_share_flight_names() -> None:
    world = World()
    one, other = world.desk("same"), world.desk("same")
    first = await look(one)
    follower = asyncio.create_task(look(other))
    await settle()
    assert not follower.done()
    one.land(first, b"v")
    assert await follower == Joined(b"v")


# ------------------------------------------------------------------------------------ streams


async def stream(desk: CacheDesk, key: bytes = KEY) -> Any:
    (found,) = await desk.ask([key], ACME, read=True, join=True, patience_s=60, stream=True)
    return found


async def begun(world: World, leading: CacheDesk, following: CacheDesk) -> tuple[Lead, Listening]:
    """A stream that is led, and followed, and whose leader knows it."""
    lead = await stream(leading)
    await settle()
    found = await stream(following)
    assert isinstance(found, Follow)
    await settle()
    assert leading.is_followed(lead)
    return lead, following.listen(found.flight)


async def test_followers_hear_a_stream_from_its_beginning_and_to_its_end() -> None:
    world = World()
    one, other = world.desk("one"), world.desk("other")
    lead = await stream(one)
    one.say(lead, b"1")
    await settle()
    assert not one.is_followed(lead)
    assert world.sent["say"] == 0, "nobody listens"
    early = other.listen((await stream(other)).flight)
    await settle()
    one.say(lead, b"2")
    await settle()
    assert await early.more(60) == [b"1", b"2"]
    late = one.listen((await stream(one)).flight)
    await settle()
    one.say(lead, b"3")
    one.say(lead, b"4")
    await settle()
    assert await early.more(60) == [b"3", b"4"]
    assert await late.more(60) == [b"1", b"2", b"3", b"4"] == late.taken
    one.land(lead, b"whole")
    assert await early.more(60) == await late.more(60) == Joined(b"whole")
    early.close()
    late.close()
    assert other.stats()["following"] == one.stats()["following"] == 0
    assert world.sent["say"] == 2
    await one.close()
    await other.close()


async def test_pieces_of_one_tick_and_of_several_streams_are_one_message() -> None:
    world = World()
    one, other = world.desk("one"), world.desk("other")
    keys = [bytes([n]) * 32 for n in range(5)]
    leads = [await stream(one, key) for key in keys]
    heard = [other.listen((await stream(other, key)).flight) for key in keys]
    await settle()
    for lead in leads:
        one.say(lead, b"a")
        one.say(lead, b"b")
    await settle()
    assert [await ear.more(60) for ear in heard] == [[b"a", b"b"]] * 5
    assert world.sent["say"] == 1
    await one.close()
    await other.close()


async def test_a_streams_failure_comes_after_what_was_heard() -> None:
    world = World()
    one, other = world.desk("one"), world.desk("other")
    lead, ear = await begun(world, one, other)
    one.say(lead, b"1")
    await settle()
    one.land(lead, None, b"boom")
    await settle()
    assert await ear.more(60) == [b"1"]
    with pytest.raises(FlightFailed):
        await ear.more(60)
    await one.close()
    await other.close()


async def test_a_stream_whose_leader_dies_is_lost() -> None:
    world = World()
    one, other = world.desk("one"), world.desk("other")
    await one.start()
    await other.start()
    _, ear = await begun(world, one, other)
    await world.pass_time(5, "other")
    assert await ear.more(60) is None
    assert isinstance(await stream(other), Lead)
    await one.close()
    await other.close()


async def test_a_stream_goes_silently_where_its_pieces_are_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(channel_module, "SPEECH_BYTES_MAX", 200)
    world = World()
    one, other = world.desk("one"), world.desk("other")
    lead, ear = await begun(world, one, other)
    for _ in range(10):
        one.say(lead, b"0123456789")
    await settle()
    assert await ear.more(60) == [b"0123456789"] * 2
    one.land(lead, b"whole")
    assert await ear.more(60) == Joined(b"whole")
    await one.close()
    await other.close()


async def test_what_nobody_listens_to_any_more_is_not_asked_for_again() -> None:
    world = World()
    one, other = world.desk("one"), world.desk("other")
    lead, ear = await begun(world, one, other)
    await settle()
    ear.close()
    ear.close()
    one.say(lead, b"1")
    await settle()
    asked = world.sent["hear"]
    one.say(lead, b"2")
    await settle()
    assert world.sent["hear"] == asked
    assert other.stats()["following"] == 0
    await one.close()
    await other.close()


async def test_when_the_owner_is_lost_followers_are_told_so() -> None:
    world = World()
    one, other = world.desk("one"), world.desk("other")
    await stream(one)
    found = await stream(other)
    world.down.add("other")
    ear = other.listen(found.flight)
    assert await ear.more(60) is None
    ear.close()


async def test_streams_that_are_carried_are_bounded_and_end_with_the_desk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(desk_module, "CARRIED_MAX", 1)
    desk = World().desk("d")
    ended = []

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    assert desk.carry(work())
    assert not desk.carry(work())
    await settle()
    await desk.close()
    assert ended == [True]


# ------------------------------------------------------------------------------ what is near


async def test_a_hit_is_told_again_without_asking_for_a_moment() -> None:
    world = World()
    desk = world.desk("d")
    desk.land(await look(desk), b"v", None, 60.0)
    await settle()
    world.now_s = 5
    assert await look(desk) == Hit(b"v", 5.0)
    assert await look(desk) == Hit(b"v", 5.0)
    world.now_s = 5.9
    assert await look(desk) == Hit(b"v", 5.9)
    assert (world.sent["lookup"], desk.stats()["near_hits"]) == (2, 2)
    world.now_s = 6
    assert await look(desk) == Hit(b"v", 6.0)
    assert world.sent["lookup"] == 3
    assert await desk.lookup(KEY, Scope("other"), read=True, join=False, patience_s=1) == Lead(
        KEY, Scope("other"), None
    )
    assert isinstance(await desk.lookup(KEY, ACME, read=False, join=True, patience_s=1), Lead)
    await desk.close()


async def test_what_is_near_lives_no_longer_than_the_entry() -> None:
    world = World()
    desk = world.desk("d")
    desk.land(await look(desk), b"v", None, 1.0)
    await settle()
    world.now_s = 0.75
    assert await look(desk) == Hit(b"v", 0.75)
    world.now_s = 1.0
    assert isinstance(await look(desk), Lead)
    await desk.close()


async def test_what_is_landed_anew_is_near_no_more() -> None:
    world = World()
    desk = world.desk("d")
    desk.land(await look(desk), b"old", None, 60.0)
    await settle()
    assert (await look(desk)).value == b"old"
    desk.land(Lead(KEY, ACME, None), b"new", None, 60.0)
    await settle()
    assert (await look(desk)).value == b"new"
    await desk.close()


@given(
    events=st.lists(
        st.tuples(
            st.sampled_from(["ask", "land", "fail", "drop", "die", "time"]), st.integers(0, 9)
        ),
        max_size=40,
    )
)
@settings(max_examples=60, deadline=None)
def test_whatever_happens_one_leads_and_everybody_is_answered(
    events: list[tuple[str, int]],
) -> None:
    async def session() -> None:
        world = World()
        names = [f"d{n}" for n in range(3)]
        desks = {name: world.desk(name) for name in names}
        for desk in desks.values():
            await desk.start()
        alive = set(names)
        asked: list[tuple[str, asyncio.Task[Any]]] = []
        leads: dict[str, Lead] = {}  # flight → lead, of living desks

        async def collect() -> None:
            await settle()
            for name, task in list(asked):
                if not task.done():
                    continue
                asked.remove((name, task))
                error = task.exception()
                assert error is None or isinstance(error, FlightFailed)
                if error is None and isinstance(task.result(), Lead):
                    leads[name] = task.result()
                    assert len(leads) == 1, "two lead at one time"

        for event, number in events:
            name = sorted(alive)[number % len(alive)] if alive else ""
            if event == "ask" and name:
                asked.append((name, asyncio.create_task(look(desks[name], patience_s=1000))))
            elif event == "die" and name and len(alive) > 1:
                alive.discard(name)
                for task in [task for owner, task in asked if owner == name]:
                    world.down.add(name)
                    task.cancel()
                asked = [(owner, task) for owner, task in asked if owner != name]
                world.down.add(name)
                leads.pop(name, None)
            elif event == "time":
                await world.pass_time(number, *alive)
            elif leads and event in ("land", "fail", "drop"):
                leader, lead = leads.popitem()
                value = b"v" if event == "land" else None
                desks[leader].land(lead, value, b"e" if event == "fail" else None)
            await collect()
        for _ in range(200):
            if leads:
                leader, lead = leads.popitem()
                desks[leader].land(lead, b"v")
            await world.pass_time(1, *alive)
            await collect()
            if not asked and not leads:
                break
        assert not asked, "somebody waits for ever"
        for desk in desks.values():
            await desk.close()

    asyncio.run(session())
