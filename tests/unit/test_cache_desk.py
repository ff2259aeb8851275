from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.cache import desk as desk_module
from actors.cache.desk import CacheDesk, FlightFailed, Hit, Joined, Lead
from actors.cache.owner import Cache
from actors.cache.policy import Scope
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

        return CacheDesk(Line(self, name), name, clock=self.clock, pause=pause)

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
    # One look-up message per desk, one held message per desk that follows.
    assert world.sent["lookup"] == 5
    assert world.sent["follow"] == 4
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

    desk._ref = Deaf(world, "d")
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
    monkeypatch.setattr(desk_module, "LANDING_BYTES_MAX", 10)
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
