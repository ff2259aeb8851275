from __future__ import annotations

import asyncio
import timeit
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from actors.rate_limiter.desk import RateLimiterDesk
from actors.rate_limiter.owner import RateLimiter
from actors.rate_limiter.policy import Hold, Limits, Refusal, Ticket
from actors.ref import InlineRef, OwnerUnavailable
from tests.support.fake_time import FakeTime, settle

PER_SECOND = Limits(60.0, 2)


class Line(InlineRef):
    """A line to an owner that can be away, or at fault."""

    trouble: Exception | None = None

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        if self.trouble is not None:
            raise self.trouble
        return await super().ask(method, *args, timeout_s=timeout_s)


class World:
    def __init__(self) -> None:
        self.time = FakeTime()
        self.owner = RateLimiter(self.time, fresh=True)
        self.line = Line("limiter", self.owner)
        self.desks: list[RateLimiterDesk] = []

    async def desk(self, holder: str = "process") -> RateLimiterDesk:
        desk = RateLimiterDesk([self.line], holder, self.time, self.time.sleep)
        await desk.start()
        self.desks.append(desk)
        return desk

    async def now(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The answer of a call that need not wait for time to pass."""
        task = asyncio.create_task(call)
        await settle()
        assert task.done()
        return task.result()

    async def dry(self, desk: RateLimiterDesk, limits: Limits = PER_SECOND) -> Refusal:
        """Use up what there is. The first refusal."""
        while True:
            answer = await self.now(desk.count("acme", limits))
            if isinstance(answer, Refusal):
                return answer


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    world.line.trouble = None
    for desk in world.desks:
        await desk.close()


async def test_no_limits_keep_nothing(world: World) -> None:
    desk = await world.desk()
    ticket = await desk.count("acme", None)
    assert isinstance(ticket, Ticket)
    assert await desk.reserve(ticket) == Hold("acme", 0)
    assert desk.stats()["tenants"] == 0


async def test_a_burst_is_admitted_and_then_refused(world: World) -> None:
    desk = await world.desk()
    for _ in range(2):
        assert isinstance(await world.now(desk.count("acme", PER_SECOND)), Ticket)
    refusal = await world.now(desk.count("acme", PER_SECOND))
    assert (refusal.kind, refusal.limit, refusal.lent) == ("requests_per_minute", 60.0, False)
    assert refusal.retry_after_s == pytest.approx(1.0)


@pytest.mark.parametrize("rpm", [6.0, 60.0, 600.0])
@pytest.mark.parametrize("burst", [1, 3, 25])
@pytest.mark.parametrize("early_s", [0.0, 0.02])
async def test_a_refusal_says_truly_when_to_come_back(
    world: World, rpm: float, burst: int, early_s: float
) -> None:
    desk, limits = await world.desk(), Limits(rpm, burst)
    refusal = await world.dry(desk, limits)
    await world.time.advance(refusal.retry_after_s - early_s)
    again = await world.now(desk.count("acme", limits))
    assert isinstance(again, Refusal if early_s else Ticket)


async def test_a_repeated_refusal_counts_down(world: World) -> None:
    desk = await world.desk()
    await world.dry(desk)
    await world.time.advance(0.1)
    assert (await world.now(desk.count("acme", PER_SECOND))).retry_after_s == pytest.approx(0.9)


async def test_a_live_lease_needs_no_message(world: World) -> None:
    desk, limits = await world.desk(), Limits(6000.0, 100)
    await world.now(desk.count("acme", limits))
    sent = world.line.sent["lease"]
    for _ in range(50):
        assert isinstance(await desk.count("acme", limits), Ticket)
    assert world.line.sent["lease"] == sent


async def test_an_idle_tenant_is_given_back_and_forgotten(world: World) -> None:
    desk = await world.desk()
    await world.now(desk.count("acme", PER_SECOND))
    await world.time.advance(2.0)
    assert desk.stats()["tenants"] == 0
    assert world.owner.stats()["leases"] == 0


async def test_requests_wait_in_the_order_they_came(world: World) -> None:
    desk, order = await world.desk(), []
    await world.dry(desk)

    async def call(number: int) -> None:
        assert isinstance(await desk.count("acme", PER_SECOND, wait_s=30.0), Ticket)
        order.append((number, world.time.now))

    start = world.time.now
    calls = [asyncio.create_task(call(number)) for number in range(5)]
    await world.time.advance(5.1)
    assert [number for number, _ in order] == [0, 1, 2, 3, 4]
    assert [at_s - start for _, at_s in order] == pytest.approx([1, 2, 3, 4, 5], abs=0.01)
    await asyncio.gather(*calls)


async def test_a_newcomer_does_not_overtake_those_who_wait(world: World) -> None:
    desk = await world.desk()
    await world.dry(desk)
    waiter = asyncio.create_task(desk.count("acme", PER_SECOND, wait_s=30.0))
    await settle()
    await world.time.advance(0.99)
    world.time.now += 0.01
    newcomer = asyncio.create_task(desk.count("acme", PER_SECOND))
    await settle()
    await world.time.advance(0.05)
    assert isinstance(waiter.result(), Ticket)
    assert isinstance(newcomer.result(), Refusal)


async def test_who_waits_too_long_is_refused(world: World) -> None:
    desk, limits = await world.desk(), Limits(1.0, 1)
    await world.dry(desk, limits)
    waiter = asyncio.create_task(desk.count("acme", limits, wait_s=3.0))
    await world.time.advance(2.9)
    assert not waiter.done()
    await world.time.advance(0.2)
    refusal = waiter.result()
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "requests_per_minute"


async def test_a_full_queue_refuses_at_once(world: World) -> None:
    desk = await world.desk()
    await world.dry(desk)
    waiters = [
        asyncio.create_task(desk.count("acme", PER_SECOND, wait_s=9.0, queue_max=2))
        for _ in range(2)
    ]
    await settle()
    refusal = await world.now(desk.count("acme", PER_SECOND, wait_s=9.0, queue_max=2))
    assert refusal.kind == "queue"
    assert desk.stats()["waiting"] == 2
    await world.time.advance(3.0)
    assert all(isinstance(waiter.result(), Ticket) for waiter in waiters)


async def test_a_cancelled_waiter_leaves_the_queue(world: World) -> None:
    desk = await world.desk()
    await world.dry(desk)
    first, second = (
        asyncio.create_task(desk.count("acme", PER_SECOND, wait_s=9.0)) for _ in range(2)
    )
    await settle()
    first.cancel()
    await settle()
    assert desk.stats()["waiting"] == 1
    await world.time.advance(1.01)
    assert isinstance(second.result(), Ticket)


async def test_a_waiter_cancelled_as_it_is_served_gives_the_slot_on(world: World) -> None:
    desk, limits = await world.desk(), Limits(concurrent=1)
    ticket = await world.now(desk.count("acme", limits))
    hold = await world.now(desk.reserve(ticket))
    first, second = (asyncio.create_task(desk.reserve(ticket, wait_s=9.0)) for _ in range(2))
    await settle()
    desk.settle(hold)
    first.cancel()
    await settle()
    assert first.cancelled()
    assert isinstance(second.result(), Hold)


async def test_a_settled_slot_goes_to_who_waits(world: World) -> None:
    desk, limits = await world.desk(), Limits(concurrent=1)
    ticket = await world.now(desk.count("acme", limits))
    hold = await world.now(desk.reserve(ticket))
    refusal = await world.now(desk.reserve(ticket))
    assert refusal.kind == "concurrent_requests"
    waiter = asyncio.create_task(desk.reserve(ticket, wait_s=9.0))
    await settle()
    desk.settle(hold)
    desk.settle(hold)
    await settle()
    assert isinstance(waiter.result(), Hold)
    assert desk.stats()["slots_used"] == 1


async def test_who_waits_for_permits_does_not_delay_who_wants_a_slot(world: World) -> None:
    desk, limits = await world.desk(), Limits(60.0, 2, concurrent=4)
    ticket = await world.now(desk.count("acme", limits))
    await world.dry(desk, limits)
    waiter = asyncio.create_task(desk.count("acme", limits, wait_s=9.0))
    await settle()
    assert isinstance(await world.now(desk.reserve(ticket)), Hold)
    assert not waiter.done()
    waiter.cancel()


async def test_idle_slots_go_to_the_desk_that_lacks_them(world: World) -> None:
    one, other, limits = await world.desk("one"), await world.desk("other"), Limits(concurrent=4)
    ticket = await world.now(one.count("acme", limits))
    holds = [await world.now(one.reserve(ticket)) for _ in range(4)]
    for hold in holds[1:]:
        one.settle(hold)
    wanted = asyncio.create_task(other.reserve(ticket))
    await world.time.advance(0.5)
    assert isinstance(wanted.result(), Hold)


async def test_slots_of_a_dead_process_come_back_when_its_death_is_known(world: World) -> None:
    one, other, limits = await world.desk("one"), await world.desk("other"), Limits(concurrent=1)
    ticket = await world.now(one.count("acme", limits))
    assert isinstance(await world.now(one.reserve(ticket)), Hold)
    assert world.owner.holders() == ["one"]
    wanted = asyncio.create_task(other.reserve(ticket, wait_s=9.0))
    await settle()
    world.desks.remove(one)
    for counter in one._counters:
        counter._task.cancel()  # type: ignore[union-attr]
    await world.time.advance(2.0)
    assert not wanted.done()
    assert world.owner.holder_gone("one") == 1
    await world.time.advance(0.3)
    assert isinstance(wanted.result(), Hold)


async def test_an_uncounted_request_leaves_its_permit(world: World) -> None:
    desk = await world.desk()
    ticket = await world.now(desk.count("acme", PER_SECOND))
    await world.dry(desk)
    desk.uncount(ticket)
    assert isinstance(await world.now(desk.count("acme", PER_SECOND)), Ticket)


async def test_a_permit_of_an_older_lease_is_not_put_into_the_next(world: World) -> None:
    desk = await world.desk()
    ticket = await world.now(desk.count("acme", PER_SECOND))
    await world.time.advance(3.0)
    await world.dry(desk)
    desk.uncount(ticket)
    assert isinstance(await world.now(desk.count("acme", PER_SECOND)), Refusal)


async def test_held_leases_go_on_while_the_owner_is_away_and_then_it_is_unavailable(
    world: World,
) -> None:
    desk, limits = await world.desk(), Limits(600.0, 10)
    await world.now(desk.count("acme", limits))
    world.line.trouble = OwnerUnavailable("limiter", "it is away")
    await world.time.advance(0.3)
    assert isinstance(await world.now(desk.count("acme", limits)), Ticket)
    await world.time.advance(0.3)
    call = asyncio.create_task(desk.count("acme", limits))
    await world.time.advance(1.0)
    with pytest.raises(OwnerUnavailable):
        await call
    world.line.trouble = None
    await world.time.advance(0.7)
    assert isinstance(await world.now(desk.count("acme", limits)), Ticket)


async def test_a_restarted_owner_learns_the_slots_before_it_lends(world: World) -> None:
    one, other, limits = await world.desk("one"), await world.desk("other"), Limits(concurrent=1)
    ticket = await world.now(one.count("acme", limits))
    hold = await world.now(one.reserve(ticket))
    world.line.owner = world.owner = RateLimiter(world.time)
    wanted = asyncio.create_task(other.reserve(ticket, wait_s=9.0))
    await world.time.advance(2.0)
    assert not wanted.done()
    one.settle(hold)
    await world.time.advance(0.5)
    assert isinstance(wanted.result(), Hold)


async def test_a_fault_of_the_owner_reaches_who_waits_and_the_desk_goes_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    desk = await world.desk()
    world.line.trouble = ZeroDivisionError("a fault")
    call = asyncio.create_task(desk.count("acme", PER_SECOND, wait_s=9.0))
    await settle()
    with pytest.raises(ZeroDivisionError):
        await call
    assert "what was under way is dropped" in caplog.text
    world.line.trouble = None
    call = asyncio.create_task(desk.count("acme", PER_SECOND))
    await world.time.advance(0.3)
    assert isinstance(call.result(), Ticket)


async def test_a_second_desk_of_the_same_process_is_heard(world: World) -> None:
    first = await world.desk()
    for _ in range(5):
        await world.now(first.count("acme", PER_SECOND))
        await world.time.advance(1.0)
    await first.close()
    second = await world.desk()
    assert isinstance(await world.now(second.count("acme", PER_SECOND)), Ticket)


async def test_a_closed_desk_leaves_nothing_lent(world: World) -> None:
    desk = await world.desk()
    await world.now(desk.count("acme", PER_SECOND))
    await world.dry(desk)
    waiter = asyncio.create_task(desk.count("acme", PER_SECOND, wait_s=9.0))
    await settle()
    await desk.close()
    with pytest.raises(OwnerUnavailable):
        await waiter
    assert world.owner.stats()["leases"] == 0


async def test_newer_limits_win_over_older_ones(world: World) -> None:
    desk = await world.desk()
    await world.now(desk.count("acme", Limits(60.0, 5, version=2)))
    await world.dry(desk, Limits(60.0, 50, version=1))
    assert desk.stats()["counted"] == 5


async def test_figures_tell_what_is_left(world: World) -> None:
    desk = await world.desk()
    assert desk.figures("acme") is None
    await world.now(desk.count("acme", Limits(60.0, 10)))
    figures = desk.figures("acme")
    assert figures is not None
    assert figures.limit == 60.0
    assert figures.remaining == pytest.approx(9.0)


async def test_tenants_are_spread_over_the_owners() -> None:
    time = FakeTime()
    owners = [RateLimiter(time, fresh=True) for _ in range(3)]
    refs = [InlineRef(f"limiter-{n}", owner) for n, owner in enumerate(owners)]
    desk = RateLimiterDesk(refs, "process", time, time.sleep)
    await desk.start()
    for n in range(30):
        await desk.count(f"tenant-{n}", PER_SECOND)
    assert all(4 <= owner.stats()["tenants"] <= 16 for owner in owners)
    await desk.close()


async def test_what_a_count_costs_is_printed(world: World) -> None:
    desk, limits = await world.desk(), Limits(1e9, 1_000_000)
    await world.now(desk.count("acme", limits))

    def count_once() -> None:
        try:
            desk.count("acme", limits).send(None)
        except StopIteration:
            pass

    print(f"\ncount: {timeit.timeit(count_once, number=20_000) / 20_000 * 1e6:.2f} us")


async def test_renewals_of_many_tenants_travel_together(world: World) -> None:
    desk = await world.desk()
    for number in range(20):
        await world.now(desk.count(f"tenant {number}", PER_SECOND))
        await world.time.advance(0.007)
    before = world.line.sent["lease"]
    for _ in range(10):
        await world.time.advance(0.1)

    assert 0 < world.line.sent["lease"] - before <= 8


async def test_a_late_message_of_a_dead_process_brings_nothing_back(world: World) -> None:
    desk = await world.desk("process")
    ticket = await world.now(desk.count("acme", Limits(concurrent=2)))
    await world.now(desk.reserve(ticket))
    assert world.owner.holder_gone("process") >= 1
    await world.time.advance(1.0)  # its desk goes on renewing

    assert world.owner.holders() == []
