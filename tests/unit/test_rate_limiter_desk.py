from __future__ import annotations

import asyncio
import random
import timeit
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from actors.rate_limiter.counter import ASK_TIMEOUT_S, LENT_WAIT_S, MONEY_WAIT_S, SEED_WAIT_S
from actors.rate_limiter.desk import RateLimiterDesk
from actors.rate_limiter.owner import RateLimiter
from actors.rate_limiter.pace import Pace
from actors.rate_limiter.pool import TRAVEL_S
from actors.rate_limiter.terms import Amount, Hold, Layout, Limits, Refusal, Seed, Ticket
from actors.ref import InlineRef, OwnerUnavailable
from tests.support.bad_wire import Fate, House
from tests.support.fake_time import FakeTime, settle

PER_SECOND = Limits(60.0, 2)
WALL_S = 1_700_000_000.0


class Line(InlineRef):
    """A line to an owner that can be away, or at fault."""

    trouble: Exception | None = None
    gate: asyncio.Event | None = None  # answers wait for it

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        if self.trouble is not None:
            raise self.trouble
        answer = await super().ask(method, *args, timeout_s=timeout_s)
        if self.gate is not None:
            await self.gate.wait()
        return answer


class World:
    def __init__(self) -> None:
        self.time = FakeTime()
        self.owner = RateLimiter(self.time, lambda: WALL_S, fresh=True)
        self.ledger = Ledger()
        self.line = Line("limiter", self.owner)
        self.desks: list[RateLimiterDesk] = []

    async def desk(self, holder: str = "process", pace_s: float = 0.0) -> RateLimiterDesk:
        line, time = [self.line], self.time
        pace = Pace(pace_s, pace_s, time, lambda: 0.0, lambda: 0)
        desk = RateLimiterDesk(line, holder, time, time.sleep, book=self.ledger, pace=pace)
        await desk.start()
        self.desks.append(desk)
        return desk

    async def now(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The answer of a call that need not wait for time to pass."""
        task = asyncio.create_task(call)
        await settle()
        assert task.done()
        return task.result()

    async def hot(self, desk: RateLimiterDesk, limits: Limits) -> None:
        """So many requests that the desk has a lease with a rate."""
        for _ in range(5):
            assert isinstance(await self.now(desk.count("acme", limits)), Ticket)

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
    assert refusal.retry_after_s == pytest.approx(1.0 + TRAVEL_S)


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


async def test_who_comes_early_is_refused_also_where_messages_are_paced(world: World) -> None:
    desk, paced = await world.desk(), await world.desk("another", pace_s=0.05)
    refusal = await world.dry(desk)
    await world.time.advance(refusal.retry_after_s - 0.02)
    assert isinstance(await world.now(paced.count("else", PER_SECOND)), Ticket)
    early = asyncio.create_task(paced.count("acme", PER_SECOND))
    await settle()
    assert not early.done(), "its message waits for its turn"
    await world.time.advance(0.05)
    assert isinstance(await early, Refusal)


async def test_a_repeated_refusal_counts_down_from_the_next_place(world: World) -> None:
    desk = await world.desk()
    await world.dry(desk)
    await world.time.advance(0.1)
    assert (await world.now(desk.count("acme", PER_SECOND))).retry_after_s == pytest.approx(
        2.0 + TRAVEL_S - 0.1
    )


async def test_a_live_lease_needs_no_message(world: World) -> None:
    desk, limits = await world.desk(), Limits(6000.0, 100)
    await world.hot(desk, limits)
    sent = world.line.sent["lease"]
    for _ in range(50):
        assert isinstance(await desk.count("acme", limits), Ticket)
    assert world.line.sent["lease"] == sent


async def test_what_is_lent_is_counted_at_once_and_no_more(world: World) -> None:
    desk, limits = await world.desk(), Limits(60.0, 10)
    assert desk.count_at_once("acme", limits) is None, "nothing is lent yet"
    await world.hot(desk, limits)
    tickets = [desk.count_at_once("acme", limits) for _ in range(10)]

    counted = sum(ticket is not None for ticket in tickets)
    assert 0 < counted <= 5, "the burst is ten, and five are used"
    assert desk.stats()["counted"] == 5 + counted
    assert desk.stats()["refused"] == 0
    assert desk.count_at_once("other", None) is not None


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
    await world.time.advance(5.2)
    assert [number for number, _ in order] == [0, 1, 2, 3, 4]
    assert [at_s - start for _, at_s in order] == pytest.approx(
        [number + TRAVEL_S for number in (1, 2, 3, 4, 5)], abs=0.01
    )
    await asyncio.gather(*calls)


async def test_a_newcomer_does_not_overtake_those_who_wait(world: World) -> None:
    desk = await world.desk()
    await world.dry(desk)
    waiter = asyncio.create_task(desk.count("acme", PER_SECOND, wait_s=30.0))
    await settle()
    await world.time.advance(0.99 + TRAVEL_S)
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
    await world.time.advance(1.01 + TRAVEL_S)
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
    await world.now(desk.count("acme", PER_SECOND))
    ticket = await world.now(desk.count("acme", PER_SECOND))
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
    await world.hot(desk, limits)
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
    assert desk.figures("acme") == {}
    await world.now(desk.count("acme", Limits(60.0, 10)))
    figures = desk.figures("acme")["requests"]
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


# ---- tokens, money, the ledger's word

MONEY = Limits(day_nano=1_000, month_nano=10_000)


class Ledger:
    """A ledger whose word comes when the test lets it."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.trouble: Exception | None = None
        self.open = asyncio.Event()
        self.open.set()
        self.spent = 0
        self.commit: int | None = 1

    def mark(self) -> int:
        return 1

    def commit_of(self, mark: int) -> int | None:
        return self.commit

    async def seeds(self, tenants: list[str]) -> list[Seed]:
        self.asked.append(tenants)
        await self.open.wait()
        if self.trouble is not None:
            raise self.trouble
        day = int(WALL_S // 86_400)
        return [Seed(1, day, self.spent, 0, self.spent) for _ in tenants]


async def held(
    world: World, desk: RateLimiterDesk, limits: Limits, tokens: int = 0, nano: int = 0
) -> Hold:
    amount = Amount(tokens, nano)
    ticket = await world.now(desk.count("acme", limits, amount))
    hold = await world.now(desk.reserve(ticket, amount))
    assert isinstance(hold, Hold)
    return hold


async def test_a_cold_request_asks_once_for_all_that_it_needs(world: World) -> None:
    desk = await world.desk()
    limits = Limits(60.0, 5, concurrent=2, tokens_per_minute=6_000)
    await held(world, desk, limits, tokens=300)
    assert world.line.sent["lease"] == 1


async def test_tokens_that_were_not_used_can_be_used(world: World) -> None:
    desk, limits = await world.desk(), Limits(tokens_per_minute=6_000)
    hold = await held(world, desk, limits, tokens=1_000)
    refusal = await world.now(desk.admit("acme", limits, Amount(500)))
    assert (refusal.kind, refusal.limit) == ("tokens_per_minute", 6_000.0)
    desk.settle(hold, Amount(100))
    await world.time.advance(0.3)
    assert isinstance(await world.now(desk.admit("acme", limits, Amount(800))), Hold)


async def test_a_refusal_of_tokens_says_truly_when_to_come_back(world: World) -> None:
    desk, limits = await world.desk(), Limits(tokens_per_minute=6_000)
    await held(world, desk, limits, tokens=1_000)
    await world.time.advance(0.2)
    refusal = await world.now(desk.admit("acme", limits, Amount(500)))
    await world.time.advance(refusal.retry_after_s)
    assert isinstance(await world.now(desk.admit("acme", limits, Amount(500))), Hold)


@pytest.mark.parametrize(
    ("limits", "amount", "kind"),
    [
        (Limits(tokens_per_minute=600), Amount(601), "tokens_per_minute"),
        (MONEY, Amount(0, 1_001), "usd_per_day"),
        (Limits(month_nano=10), Amount(0, 11), "usd_per_month"),
    ],
)
async def test_more_than_a_limit_allows_is_refused_for_good(
    world: World, limits: Limits, amount: Amount, kind: str
) -> None:
    desk = await world.desk()
    refusal = await world.now(desk.admit("acme", limits, amount))
    assert (refusal.kind, refusal.never) == (kind, True)
    assert world.line.sent["lease"] == 0


async def test_those_who_are_refused_together_come_back_one_after_the_other(world: World) -> None:
    desk = await world.desk()
    for _ in range(2):
        await world.now(desk.count("acme", PER_SECOND))
    calls = [asyncio.create_task(desk.count("acme", PER_SECOND)) for _ in range(4)]
    await settle()
    waits = sorted(call.result().retry_after_s for call in calls)  # type: ignore[union-attr]
    assert waits == pytest.approx([number + TRAVEL_S for number in (1, 2, 3, 4)])


async def test_money_is_lent_when_the_ledgers_word_is_there(world: World) -> None:
    world.ledger.spent = 900
    desk = await world.desk()
    assert isinstance(await world.now(desk.admit("acme", MONEY, Amount(0, 100))), Hold)
    refusal = await world.now(desk.admit("acme", MONEY, Amount(0, 101)))
    assert (refusal.kind, refusal.lent) == ("usd_per_day", False)
    assert world.ledger.asked == [["acme"]]


async def test_without_the_ledger_money_is_not_lent(world: World) -> None:
    world.ledger.trouble = OwnerUnavailable("ledger", "it is away")
    desk = await world.desk()
    with pytest.raises(OwnerUnavailable, match="ledger"):
        await world.now(desk.admit("acme", MONEY, Amount(0, 100)))
    world.ledger.trouble = None
    await world.time.advance(0.2)
    assert isinstance(await world.now(desk.admit("acme", MONEY, Amount(0, 100))), Hold)


HOURLY = Limits(600.0, 10, requests_per_hour=1_000)


@pytest.mark.parametrize("limits", [HOURLY, MONEY])
async def test_a_slow_word_of_the_ledger_is_waited_for(world: World, limits: Limits) -> None:
    world.ledger.open.clear()
    desk = await world.desk()
    call = asyncio.create_task(desk.admit("acme", limits, Amount(0, 100)))
    await world.time.advance(LENT_WAIT_S + 1.0)
    assert not call.done()
    world.ledger.open.set()
    await world.time.advance(0.3)
    assert isinstance(call.result(), Hold)


@pytest.mark.parametrize("limits", [HOURLY, MONEY])
@pytest.mark.parametrize(("wait_s", "given_s"), [(0.0, SEED_WAIT_S), (2.0, 2.0)])
async def test_a_word_that_does_not_come_is_not_a_limit_that_is_used_up(
    world: World, limits: Limits, wait_s: float, given_s: float
) -> None:
    world.ledger.open.clear()
    desk, amount = await world.desk(), Amount(0, 100)

    async def admit() -> None:
        ticket = await desk.count("acme", limits, amount, wait_s=wait_s)
        assert isinstance(ticket, Ticket), ticket
        await desk.reserve(ticket, amount, wait_s=wait_s)

    call = asyncio.create_task(admit())
    await world.time.advance(given_s - 0.1)
    assert not call.done()
    await world.time.advance(0.2)
    with pytest.raises(OwnerUnavailable, match="ledger"):
        await call


async def test_a_lease_that_comes_when_its_life_is_over_is_asked_for_again(world: World) -> None:
    """A process that stood still for longer than leases live was not refused anything."""
    desk = await world.desk()
    world.line.gate = asyncio.Event()
    call = asyncio.create_task(desk.count("acme", PER_SECOND))
    await settle()
    world.time.now += LENT_WAIT_S + 0.1  # nothing wakes up meanwhile
    world.line.gate.set()
    await world.time.advance(0.3)
    assert isinstance(call.result(), Ticket)


async def test_a_fault_of_the_ledger_closes_too(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.ledger.trouble = ZeroDivisionError("a fault")
    desk = await world.desk()
    with pytest.raises(OwnerUnavailable, match="ZeroDivisionError"):
        await world.now(desk.admit("acme", MONEY, Amount(0, 100)))
    assert "cannot be read" in caplog.text


async def test_what_calls_under_way_may_leave_is_waited_for(world: World) -> None:
    desk = await world.desk()
    hold = await held(world, desk, MONEY, nano=800)
    call = asyncio.create_task(desk.admit("acme", MONEY, Amount(0, 500)))
    await world.time.advance(5.0)
    assert not call.done()
    desk.settle(hold, Amount(0, 100))
    await world.time.advance(0.3)
    assert isinstance(call.result(), Hold)


async def test_but_not_for_ever(world: World) -> None:
    desk = await world.desk()
    await held(world, desk, MONEY, nano=800)
    call = asyncio.create_task(desk.admit("acme", MONEY, Amount(0, 500)))
    await world.time.advance(MONEY_WAIT_S + 0.1)
    refusal = call.result()
    assert isinstance(refusal, Refusal)
    assert refusal.kind == "usd_per_day"


async def test_sixty_four_calls_share_the_last_dollar_exactly(world: World) -> None:
    """Each reserves 50 and uses 10: nobody is refused while something may come back."""
    desk = await world.desk()
    limits = Limits(day_nano=1_000)
    spent, most = 0, 0

    async def call() -> bool:
        nonlocal spent, most
        hold = await desk.admit("acme", limits, Amount(0, 50))
        if isinstance(hold, Refusal):
            return False
        most = max(most, spent + 50)
        await world.time.sleep(0.5)
        desk.settle(hold, Amount(0, 10))
        spent += 10
        return True

    calls = [asyncio.create_task(call()) for _ in range(64)]
    await world.time.advance(12.0)
    assert all(task.result() for task in calls)
    assert spent == 640
    assert (await desk.state("acme"))["usd_per_day"]["remaining"] == pytest.approx(360e-9)


async def test_idle_money_goes_to_the_desk_that_lacks_it(world: World) -> None:
    one, other = await world.desk("one"), await world.desk("other")
    for _ in range(12):
        hold = await held(world, one, MONEY, nano=100)
        one.settle(hold, Amount(0, 0))
        await world.time.advance(0.1)
    wanted = asyncio.create_task(other.admit("acme", MONEY, Amount(0, 1_000)))
    await world.time.advance(1.0)
    assert isinstance(wanted.result(), Hold)


async def test_a_settled_reservation_is_settled_once(world: World) -> None:
    desk = await world.desk()
    hold = await held(world, desk, MONEY, nano=500)
    desk.settle(hold, Amount(0, 100))
    desk.settle(hold, Amount(0, 100))
    await world.time.advance(0.5)
    day = (await desk.state("acme"))["usd_per_day"]
    assert (day["spent"], day["reserved"]) == (pytest.approx(100e-9), 0.0)


async def test_money_in_use_stays_taken_when_the_owner_restarts(world: World) -> None:
    desk = await world.desk()
    hold = await held(world, desk, MONEY, nano=800)
    world.line.owner = world.owner = RateLimiter(world.time, lambda: WALL_S)
    await world.time.advance(2.0)
    call = asyncio.create_task(desk.admit("acme", MONEY, Amount(0, 500)))
    await world.time.advance(1.0)
    assert not call.done()
    assert (await desk.state("acme"))["usd_per_day"]["reserved"] == pytest.approx(800e-9)
    world.ledger.commit = 2  # after the seed's
    desk.settle(hold, Amount(0, 300))
    await world.time.advance(0.6)
    assert isinstance(call.result(), Hold)
    assert (await desk.state("acme"))["usd_per_day"]["spent"] == pytest.approx(300e-9)


# ---- admit and cancel, waiting to go on


async def test_a_refused_reservation_gives_its_permit_back(world: World) -> None:
    desk, limits = await world.desk(), Limits(6.0, 2, tokens_per_minute=600)
    assert isinstance(await world.now(desk.admit("acme", limits, Amount(100))), Hold)
    refusal = await world.now(desk.admit("acme", limits, Amount(100)))
    assert refusal.kind == "tokens_per_minute"
    await world.time.advance(0.3)
    assert isinstance(await world.now(desk.count("acme", limits)), Ticket)


async def test_a_cancelled_hold_gives_its_permit_back(world: World) -> None:
    desk, limits = await world.desk(), Limits(6.0, 1)
    hold = await world.now(desk.admit("acme", limits))
    assert isinstance(hold, Hold)
    desk.cancel(hold)
    desk.cancel(hold)
    assert isinstance(await world.now(desk.admit("acme", limits)), Hold)


async def test_requests_wait_to_go_on_in_the_order_they_came(world: World) -> None:
    desk, limits, order = await world.desk(), Limits(tokens_per_minute=6_000), []
    await held(world, desk, limits, tokens=1_000)
    ticket = await desk.count("acme", limits)
    assert isinstance(ticket, Ticket)

    async def call(number: int, tokens: int) -> None:
        assert isinstance(await desk.reserve(ticket, Amount(tokens), wait_s=60.0), Hold)
        order.append(number)

    calls = [
        asyncio.create_task(call(number, tokens)) for number, tokens in enumerate((900, 10, 500))
    ]
    await world.time.advance(20.0)
    await asyncio.gather(*calls)
    assert order == [0, 1, 2]


async def test_what_a_cancelled_waiter_had_been_given_goes_to_the_next(world: World) -> None:
    desk = await world.desk()
    hold = await held(world, desk, MONEY, nano=1_000)
    ticket = await desk.count("acme", MONEY)
    assert isinstance(ticket, Ticket)
    first, second = (
        asyncio.create_task(desk.reserve(ticket, Amount(0, 1_000), wait_s=60.0)) for _ in range(2)
    )
    await settle()
    desk.settle(hold)
    first.cancel()
    await world.time.advance(0.5)
    assert first.cancelled()
    assert isinstance(second.result(), Hold)


async def test_a_refused_slot_says_how_long_slots_are_usually_used(world: World) -> None:
    desk, limits = await world.desk(), Limits(concurrent=2)
    hold = await held(world, desk, limits)
    await world.time.advance(3.0)
    desk.settle(hold)
    for _ in range(2):
        await held(world, desk, limits)
    refusal = await world.now(desk.reserve(Ticket("acme", limits, False)))
    assert refusal.retry_after_s == pytest.approx(1.5)


# ---- deaths, layouts


async def test_silent_processes_are_named_and_their_holdings_come_back(world: World) -> None:
    one, other = await world.desk("one"), await world.desk("other")
    await held(world, one, MONEY, nano=800)
    one._counters[0]._task.cancel()  # type: ignore[union-attr]
    world.desks.remove(one)
    await world.now(other.count("another", PER_SECOND))
    await world.time.advance(1.0)
    assert other.silent() == {"one"}
    assert other.silent() == set()
    await other.holder_gone("one")
    day = (await other.state("acme"))["usd_per_day"]
    assert (day["spent"], day["reserved"]) == (pytest.approx(800e-9), 0.0)


class Shards:
    def __init__(self, world: World, shards: int) -> None:
        self.layout = Layout(1, shards)
        self.owners = [
            RateLimiter(world.time, lambda: WALL_S, shard=n, layout=self.layout, fresh=True)
            for n in range(shards)
        ]
        self.refs = [InlineRef(f"limiter-{n}", owner) for n, owner in enumerate(self.owners)]


async def test_a_tenant_that_moves_takes_its_slots_and_waiters_along(world: World) -> None:
    before = Shards(world, 1)
    desk = RateLimiterDesk(
        before.refs, "process", world.time, world.time.sleep, layout=before.layout
    )
    await desk.start()
    world.desks.append(desk)
    limits, layout = Limits(concurrent=1), Layout(2, 3)
    tenant = next(name for name in "abcdefgh" if layout.home(name) == 2)
    ticket = Ticket(tenant, limits, False)
    hold = await world.now(desk.reserve(ticket))
    assert isinstance(hold, Hold)
    waiter = asyncio.create_task(desk.reserve(ticket, wait_s=30.0))
    await settle()
    refs = [
        *before.refs,
        *(
            InlineRef(
                f"limiter-{n}", RateLimiter(world.time, shard=n, layout=before.layout, fresh=True)
            )
            for n in (1, 2)
        ),
    ]
    await desk.relayout(layout, refs)
    await world.time.advance(5.0)
    assert not waiter.done()
    assert (await desk.state(tenant))["concurrent"] == {"limit": 1, "in_use": 1}
    assert desk.stats()["waiting"] == 1
    desk.settle(hold)
    await world.time.advance(0.5)
    assert isinstance(waiter.result(), Hold)
    assert desk.stats()["waiting"] == 0


async def test_a_waiter_that_moved_and_is_cancelled_leaves(world: World) -> None:
    before = Shards(world, 1)
    desk = RateLimiterDesk(
        before.refs, "process", world.time, world.time.sleep, layout=before.layout
    )
    await desk.start()
    world.desks.append(desk)
    layout = Layout(2, 2)
    tenant = next(name for name in "abcdefgh" if layout.home(name) == 1)
    ticket = Ticket(tenant, Limits(concurrent=1), False)
    assert isinstance(await world.now(desk.reserve(ticket)), Hold)
    waiter = asyncio.create_task(desk.reserve(ticket, wait_s=30.0))
    await settle()
    other = InlineRef("limiter-1", RateLimiter(world.time, shard=1, layout=before.layout))
    await desk.relayout(layout, [*before.refs, other])
    waiter.cancel()
    await settle()
    assert desk.stats()["waiting"] == 0


async def test_a_desk_with_the_older_layout_waits_for_its_own_to_change(world: World) -> None:
    before = Shards(world, 1)
    desk = RateLimiterDesk(
        before.refs, "process", world.time, world.time.sleep, layout=before.layout
    )
    await desk.start()
    world.desks.append(desk)
    layout = Layout(2, 2)
    tenant = next(name for name in "abcdefgh" if layout.home(name) == 1)
    before.owners[0].adopt(layout)
    call = asyncio.create_task(desk.count(tenant, PER_SECOND))
    await world.time.advance(ASK_TIMEOUT_S)
    with pytest.raises(OwnerUnavailable, match="moving"):
        await call


async def test_what_goes_over_the_line_can_be_lost_doubled_and_late(world: World) -> None:
    house = House(lambda: world.owner)
    desks = []
    for number in range(2):
        wire = house.line()
        desk = RateLimiterDesk([wire], f"process {number}", world.time, world.time.sleep)
        await desk.start()
        desks.append((desk, wire))
    chance, limits, holds = random.Random(7), Limits(600.0, 10, concurrent=3), 0
    most = 0

    async def call(desk: RateLimiterDesk) -> None:
        nonlocal holds, most
        try:
            hold = await desk.admit("acme", limits)
        except OwnerUnavailable:
            return
        if isinstance(hold, Hold):
            holds += 1
            most = max(most, holds)
            await world.time.sleep(chance.choice([0.01, 0.3]))
            holds -= 1
            desk.settle(hold)

    for _ in range(200):
        desk, wire = chance.choice(desks)
        wire.fates.append(chance.choice([Fate.ARRIVES] * 4 + list(Fate)))
        calls = [asyncio.create_task(call(desk)) for _ in range(chance.randrange(5))]
        await world.time.advance(chance.choice([0.0, 0.01, 0.1]))
        if chance.random() < 0.1:
            await wire.deliver_late()
        del calls
    await world.time.advance(15.0)
    assert 1 <= most <= 3
    assert holds == 0
    for desk, wire in desks:
        wire.fates.clear()
        await desk.close()
    assert world.owner.stats()["slots_lent"] == 0
