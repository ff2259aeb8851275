from __future__ import annotations

import time
import timeit
from collections import deque
from dataclasses import replace

import pytest

from actors.rate_limiter.agenda import ASKS_MAX, LATELY_S, RENEW_S, SOON_S
from actors.rate_limiter.held import Held, Places, Reservation
from actors.rate_limiter.purse import SETTLED_MAX, Purse
from actors.rate_limiter.terms import (
    Amount,
    Answer,
    Ask,
    Grant,
    Limits,
    Need,
    Refusal,
    Seed,
    Share,
    Ticket,
)
from actors.rate_limiter.till import FADE_MAX, IDLE_S, Message, Till

REQUESTS = Limits(60.0, 10)
ALL = Limits(600.0, 10, 100, 4, 6_000, 10_000, 20_000)
FREE = Ticket("acme", ALL, False)


class Book:
    """Commits what was recorded when the test says so."""

    def __init__(self) -> None:
        self.recorded = 0
        self.committed: dict[int, int] = {}

    def mark(self) -> int:
        self.recorded += 1
        return self.recorded

    def commit_of(self, mark: int) -> int | None:
        return self.committed.get(mark)


class World:
    """A till, and an owner's answers made by hand."""

    def __init__(self, limits: Limits = ALL) -> None:
        self.book = Book()
        self.till = Till(self.book)
        self.limits = limits
        self.now = 100.0
        self.owner = "first"

    def arrive(self, tenant: str = "acme", many: int = 1) -> Held:
        held = self.till.of(tenant, self.limits, self.now)
        for _ in range(many):
            self.till.arrive(held, self.now)
        return held

    def hot(self) -> Held:
        held = self.arrive(many=4)
        assert held.hot
        return held

    def say(self, **grant: object) -> Ask:
        """What the till says of its only tenant, answered with this grant."""
        message = self.message()
        self.answer(message, **grant)
        assert len(message.asks) == 1
        return message.asks[0]

    def message(self, *, everything: bool = False) -> Message:
        message = self.till.message(self.now, everything=everything)
        assert message is not None
        return message

    def answer(self, message: Message, **grant: object) -> None:
        grants = tuple(Grant(ask.tenant, **grant) for ask in message.asks)  # type: ignore[arg-type]
        self.till.granted(message, Answer(self.owner, grants), self.now, self.now)

    def need(self, held: Held, **grant: object) -> Ask:
        """One request waits to be counted; what it is answered."""
        held.need = 1
        self.till.wants(held)
        ask = self.say(**grant)
        held.need = 0
        return ask

    def reserve(self, held: Held, tokens: int = 0, nano: int = 0) -> Reservation | None:
        return self.till.reserve(held, FREE, Amount(tokens, nano), self.now)

    def lent(self, held: Held, **more: object) -> None:
        """All that two requests need."""
        grant = {
            "lease": "L1",
            "life_s": 0.5,
            "requests": Share(0.0, 2.0, 2.0),
            "tokens": Share(0.0, 200.0, 200.0),
            "token_mark": 7,
            "slots": 2,
            "nano": 2_000,
            "hours": 2,
            "seed_commit": 0,
        }
        self.need(held, **(grant | more))


@pytest.fixture
def world() -> World:
    return World()


# ---- cold and hot tenants


def test_a_cold_tenant_asks_for_exactly_one_request() -> None:
    world = World(REQUESTS)
    ask = world.need(world.arrive())
    assert (ask.hot, ask.need, ask.over) == (False, 1, False)


def test_a_cold_first_ask_says_what_it_will_reserve(world: World) -> None:
    held = world.arrive()
    held.ahead = Amount(100, 1_000)
    assert world.need(held).ahead == Need(1, 100, 1_000)


def test_requests_that_follow_each_other_closely_make_a_tenant_hot() -> None:
    world = World(REQUESTS)
    for _ in range(3):
        held = world.arrive()
        world.now += 0.4
    assert not held.hot
    assert world.arrive().hot


def test_requests_far_apart_do_not() -> None:
    world = World(REQUESTS)
    for _ in range(10):
        held = world.arrive()
        world.now += 0.6
    assert not held.hot


def test_a_hot_tenant_that_nobody_asks_for_is_given_back() -> None:
    world = World(REQUESTS)
    held = world.hot()
    world.need(held, lease="L1", life_s=9.0, requests=Share(1.0, 5.0, 3.0))
    world.now += IDLE_S
    ask = world.say()
    assert (ask.over, ask.lease, ask.requests_back) == (True, "L1", pytest.approx(4.0))
    assert not held.hot


def test_a_cold_lease_ends_with_the_next_message_without_a_word() -> None:
    world = World(REQUESTS)
    held = world.arrive()
    world.need(held, lease="L1", life_s=0.5, requests=Share(0.0, 1.0, 1.0))
    assert world.till.take(held, world.now) is not None
    world.now += SOON_S
    message = world.message()
    assert message.asks == []


def test_what_is_left_of_a_cold_lease_is_told_as_it_ends() -> None:
    world = World(REQUESTS)
    held = world.arrive()
    world.need(held, lease="L1", life_s=0.5, requests=Share(0.0, 1.0, 1.0))
    ticket = world.till.take(held, world.now)
    assert ticket is not None
    world.till.put_back(ticket, world.now)
    world.now += SOON_S
    ask = world.say()
    assert (ask.over, ask.lease, ask.requests_back) == (True, "L1", pytest.approx(1.0))


def test_nothing_of_a_cold_lease_is_used_after_the_next_message() -> None:
    world = World(REQUESTS)
    held = world.arrive()
    world.need(held, lease="L1", life_s=0.5, requests=Share(0.0, 1.0, 1.0))
    world.now += SOON_S
    world.message()
    assert world.till.take(held, world.now) is None


def test_what_is_set_aside_for_a_counted_request_keeps_its_lease_for_a_moment(
    world: World,
) -> None:
    held = world.arrive()
    world.lent(held)
    assert world.till.take(held, world.now) is not None
    world.now += 0.01
    other = world.till.of("other", REQUESTS, world.now)
    other.need = 1
    world.till.wants(other)
    message = world.message()
    told = {ask.tenant: ask for ask in message.asks}
    assert (told["acme"].lease, told["acme"].over) == ("L1", False)
    world.till.lost(message, world.now)
    assert world.reserve(held, 100, 1_000) is not None


def test_it_is_given_back_if_the_request_does_not_go_on(world: World) -> None:
    held = world.arrive()
    world.lent(held)
    assert world.till.take(held, world.now) is not None
    world.now += SOON_S
    ask = world.say()
    assert ask.over
    assert (ask.slots_held, ask.nano_held, ask.tokens_back, ask.hours_back) == (0, 0, 200.0, 1)


def test_a_cold_tenant_is_forgotten_without_a_message_about_it() -> None:
    world = World(REQUESTS)
    held = world.arrive()
    world.need(held, lease="L1", life_s=0.5, requests=Share(0.0, 1.0, 1.0))
    assert world.till.take(held, world.now) is not None
    for _ in range(8):
        world.now += RENEW_S
        message = world.till.message(world.now)
        if message is not None:
            assert message.asks == []
            world.answer(message)
    assert world.till.held == {}


def test_a_tenant_that_waited_for_long_and_in_vain_is_forgotten_too() -> None:
    world = World(REQUESTS)
    held = world.arrive()
    held.need = 1
    world.till.wants(held)
    for tick in range(30):
        world.now += RENEW_S
        held.need = int(tick < 15)
        message = world.till.message(world.now)
        if message is not None:
            world.answer(message, refusal=Refusal("requests_per_minute", 60.0, 0.0, 9.0))
    assert world.till.held == {}


def test_a_till_that_held_something_lets_itself_be_heard_for_a_while_and_then_not() -> None:
    world = World(REQUESTS)
    world.need(world.arrive())
    heard = 0
    for _ in range(int(LATELY_S / RENEW_S) + 20):
        world.now += RENEW_S
        message = world.till.message(world.now)
        if message is not None:
            heard += 1
            world.answer(message)
    assert 5 <= heard <= LATELY_S / RENEW_S + 5
    assert world.till.next_due_s() is None


# ---- leases


def test_a_lease_is_not_used_when_its_life_is_over() -> None:
    world = World(REQUESTS)
    held = world.hot()
    world.need(held, lease="L1", life_s=0.5, requests=Share(1.0, 5.0, 5.0))
    world.now += 0.499
    assert world.till.take(held, world.now) is not None
    world.now += 0.001
    assert world.till.take(held, world.now) is None


def test_all_or_nothing_is_reserved(world: World) -> None:
    held = world.hot()
    world.lent(held)
    assert world.reserve(held, 100, 5_000) is None
    assert world.reserve(held, 500, 1_000) is None
    assert (held.slots_used, held.purse.reserved) == (0, 0)
    assert world.reserve(held, 200, 1_000) is not None
    assert world.reserve(held, 1, 1_000) is None


def test_free_slots_and_money_are_not_taken_when_the_lease_is_over(world: World) -> None:
    world.limits = replace(ALL, tokens_per_minute=None)
    held = world.hot()
    world.lent(held)
    world.now += 0.5
    assert world.reserve(held, 0, 1_000) is None


def test_hours_are_not_used_when_the_lease_is_over() -> None:
    world = World(Limits(requests_per_hour=10))
    held = world.hot()
    world.need(held, lease="L1", life_s=0.5, hours=3, hours_minute=1)
    assert world.till.take(held, world.now) is not None
    world.now += 0.5
    assert world.till.take(held, world.now) is None


def test_what_is_above_the_targets_is_returned_with_the_next_ask() -> None:
    world = World(REQUESTS)
    held = world.hot()
    world.need(
        held,
        lease="L1",
        life_s=0.5,
        requests=Share(1.0, 10.0, 4.0),
        rate_target=0.5,
        capacity_target=5.0,
    )
    ask = world.need(held)
    assert ask.requests == Share(pytest.approx(0.5), pytest.approx(5.0), pytest.approx(2.0))
    assert ask.requests_back == pytest.approx(2.0)


def test_what_others_lack_is_returned_at_once(world: World) -> None:
    held = world.hot()
    world.lent(held)
    world.need(held, lease="L1", life_s=0.5, wanted=True)
    ask = world.say()
    assert (ask.slots_held, ask.nano_held) == (0, 0)


# ---- tokens


def test_tokens_without_a_rate_go_back_to_the_owner_by_its_mark(world: World) -> None:
    held = world.hot()
    world.lent(held)
    taken = world.reserve(held, 200, 0)
    assert taken is not None
    world.till.settle(taken, Amount(50, 0), world.now)
    world.till.settle(taken, Amount(50, 0), world.now)
    world.now += SOON_S
    ask = world.say()
    assert ask.refunds == ((7, 150),)


def test_tokens_of_a_lease_with_a_rate_go_back_into_it(world: World) -> None:
    held = world.hot()
    world.lent(held, tokens=Share(10.0, 200.0, 200.0))
    taken = world.reserve(held, 200, 0)
    assert taken is not None
    world.till.settle(taken, Amount(50, 0), world.now)
    assert held.tokens is not None
    assert held.tokens.level == pytest.approx(150.0)
    assert held.refunds == []


def test_tokens_above_the_reservation_are_charged(world: World) -> None:
    held = world.hot()
    world.lent(held, tokens=Share(10.0, 200.0, 200.0))
    taken = world.reserve(held, 100, 0)
    assert taken is not None
    world.till.settle(taken, Amount(350, 0), world.now)
    assert held.tokens is not None
    assert held.tokens.level == pytest.approx(-150.0)


def test_they_are_charged_by_the_owner_when_the_lease_is_over(world: World) -> None:
    held = world.hot()
    world.lent(held, tokens=Share(10.0, 200.0, 200.0))
    taken = world.reserve(held, 100, 0)
    assert taken is not None
    world.now += 1.0
    world.till.settle(taken, Amount(350, 0), world.now)
    message = world.message()
    assert message.asks[0].refunds == ((0, -250),)
    world.till.lost(message, world.now)
    world.now += 1.0
    assert world.say().refunds == ((0, -250),)


def test_a_refund_in_a_lost_message_is_not_told_again(world: World) -> None:
    held = world.hot()
    world.lent(held)
    taken = world.reserve(held, 200, 0)
    assert taken is not None
    world.till.settle(taken, Amount(50, 0), world.now)
    world.now += SOON_S
    world.till.lost(world.message(), world.now)
    world.now += 1.0
    assert world.say().refunds == ()


# ---- money over the deaths of owners


def test_settled_money_is_spent_and_the_rest_is_free(world: World) -> None:
    held = world.hot()
    world.lent(held)
    taken = world.reserve(held, 10, 1_500)
    assert taken is not None
    world.till.settle(taken, Amount(10, 400), world.now)
    world.now += RENEW_S
    ask = world.say()
    assert (ask.nano_spent, ask.nano_held, ask.nano_carried) == (400, 1_600, 0)


def test_what_was_spent_outlives_the_tenant_that_is_forgotten() -> None:
    world = World(Limits(day_nano=10_000))
    held = world.arrive()
    world.need(held, lease="L1", life_s=0.5, nano=1_000, seed_commit=0)
    taken = world.reserve(held, 0, 1_000)
    assert taken is not None
    world.till.settle(taken, Amount(0, 700), world.now)
    world.book.committed[1] = 1
    for _ in range(20):
        world.now += RENEW_S
        message = world.till.message(world.now)
        if message is not None:
            world.answer(message, seed_commit=0)
    assert world.till.held == {}
    assert world.need(world.arrive()).nano_spent == 700


def test_a_new_owner_is_told_at_once_of_all_that_is_in_use(world: World) -> None:
    held = world.hot()
    world.lent(held)
    assert world.reserve(held, 10, 1_500) is not None
    world.owner = "second"
    world.now += RENEW_S
    world.say()
    assert world.till.next_due_s() is not None
    message = world.message()
    ask = message.asks[0]
    assert message.owner == "second"
    assert (ask.lease, ask.slots_held, ask.hours_held) == ("", 1, 0)
    assert (ask.nano_spent, ask.nano_held, ask.nano_carried) == (0, 0, 1_500)


def restarted(world: World) -> tuple[Held, Reservation]:
    """A call of 400 was settled and one of 500 is under way when another owner takes over."""
    held = world.hot()
    world.lent(held)
    first, second = world.reserve(held, 10, 1_000), world.reserve(held, 10, 500)
    assert first is not None
    assert second is not None
    world.till.settle(first, Amount(10, 400), world.now)
    world.owner = "second"
    world.now += RENEW_S
    world.say()
    return held, second


def test_settled_money_is_carried_until_the_ledger_has_it(world: World) -> None:
    restarted(world)
    assert world.say(seed_commit=5).nano_carried == 900


def test_what_the_seed_has_is_not_told_again(world: World) -> None:
    restarted(world)
    world.say(seed_commit=5)
    world.book.committed[1] = 5
    world.now += RENEW_S
    ask = world.say(seed_commit=5)
    assert (ask.nano_spent, ask.nano_carried) == (0, 500)


def test_what_the_seed_does_not_have_is_told(world: World) -> None:
    restarted(world)
    world.say(seed_commit=5)
    world.book.committed[1] = 6
    world.now += RENEW_S
    ask = world.say(seed_commit=5)
    assert (ask.nano_spent, ask.nano_carried) == (400, 500)


def test_a_call_that_ends_under_another_owner_is_told_once_the_ledger_has_it(
    world: World,
) -> None:
    held, second = restarted(world)
    world.say(seed_commit=5)
    world.book.committed[1] = 5
    world.till.settle(second, Amount(10, 100), world.now)
    world.now += RENEW_S
    assert world.say(seed_commit=5).nano_carried == 100
    world.book.committed[2] = 9
    world.now += RENEW_S
    ask = world.say(seed_commit=5)
    assert (ask.nano_spent, ask.nano_carried) == (100, 0)
    world.now += RENEW_S
    world.till.message(world.now)
    assert held.purse.reserved == 0


def test_money_is_remembered_until_a_living_owner_has_answered_after_its_commit(
    world: World,
) -> None:
    held = world.hot()
    world.lent(held)
    taken = world.reserve(held, 10, 1_000)
    assert taken is not None
    world.till.settle(taken, Amount(10, 400), world.now)
    world.book.committed[1] = 5
    world.now += RENEW_S
    message = world.message()
    assert held.purse.settled != []
    world.answer(message, seed_commit=0)
    assert held.purse.settled == []


def test_an_owner_that_died_unnoticed_does_not_make_it_forgotten(world: World) -> None:
    held = world.hot()
    world.lent(held)
    taken = world.reserve(held, 10, 1_000)
    assert taken is not None
    world.till.settle(taken, Amount(10, 400), world.now)
    world.book.committed[1] = 5
    world.owner = "second"  # seeded with commit 3, before that
    world.now += RENEW_S
    world.say(seed_commit=3)
    world.now += RENEW_S
    ask = world.say(seed_commit=3)
    assert (ask.nano_spent, ask.nano_carried) == (400, 0)


def test_more_settled_calls_than_are_remembered_become_one_that_commits_last() -> None:
    purse = Purse(free=10_000)
    for mark in range(SETTLED_MAX + 10):
        purse.take(1)
        purse.settle(0, 1, 1, mark, 0)
    assert len(purse.settled) == SETTLED_MAX
    purse.orphan()
    assert purse.carried == SETTLED_MAX + 10
    purse.look(lambda mark: 5 if mark < SETTLED_MAX else None)
    purse.learn(5)
    assert purse.carried == 11


# ---- seeds


def test_an_owner_that_does_not_know_a_tenant_gets_the_ledgers_word(world: World) -> None:
    held = world.hot()
    refusal = Refusal("usd_per_day", 1.0, 0.0, 0.05, lent=True)
    world.need(held, unseeded=True, refusal=refusal)
    assert list(world.till.unseeded) == ["acme"]
    world.till.seeded("first", {"acme": Seed(3, day_nano=5)}, world.now)
    assert world.say().seed == Seed(3, day_nano=5)
    world.now += RENEW_S
    assert world.say().seed is None


def test_a_word_that_was_asked_for_by_another_owner_is_not_used(world: World) -> None:
    held = world.hot()
    world.need(held, unseeded=True)
    world.till.seeded("before", {"acme": Seed(3)}, world.now)
    assert held.seed is None


def test_a_seed_that_came_too_early_is_read_again(world: World) -> None:
    held = world.hot()
    world.need(held, unseeded=True)
    world.till.unseeded.clear()
    world.till.seeded("first", {"acme": Seed(3)}, world.now)
    world.say(unseeded=True)
    assert list(world.till.unseeded) == ["acme"]


def test_hours_that_the_ledger_may_not_have_are_told_to_a_new_owner() -> None:
    world = World(Limits(requests_per_hour=10))
    held = world.hot()
    world.need(held, lease="L1", life_s=0.5, hours=5, hours_minute=1)
    tickets = [world.till.take(held, world.now) for _ in range(3)]
    ticket = tickets[0]
    assert ticket is not None
    taken = world.till.reserve(held, ticket, Amount(), world.now)
    assert taken is not None
    world.till.settle(taken, Amount(), world.now)
    world.owner = "second"
    world.now += RENEW_S
    world.say()
    assert world.say().hours_open == 3


# ---- needs, messages, bounds


def test_needs_are_told_less_the_slots_that_are_free_here_and_free_money_goes_back(
    world: World,
) -> None:
    held = world.hot()
    world.lent(held)
    held.needs = deque([Need(1, 500, 1_500), Need(1, 10, 1_000), Need(1, 10, 10)])
    world.till.wants(held)
    ask = world.say()
    assert ask.needs == (Need(0, 500, 1_500), Need(0, 10, 1_000), Need(1, 10, 10))
    assert ask.nano_held == 0


def test_a_lost_message_leaves_the_next_to_say_it_all(world: World) -> None:
    held = world.hot()
    world.lent(held)
    assert world.reserve(held, 10, 500) is not None
    world.now += RENEW_S
    lost = world.message()
    world.till.lost(lost, world.now)
    world.now += RENEW_S
    again = world.message()
    assert again.seq == lost.seq + 1
    assert (again.asks[0].slots_held, again.asks[0].nano_held) == (2, 2_000)


def test_a_message_has_not_more_asks_than_one_owner_bears_and_the_rest_follows() -> None:
    world = World(REQUESTS)
    for number in range(ASKS_MAX + 7):
        held = world.arrive(f"tenant {number}")
        held.need = 1
        world.till.wants(held)
    assert len(world.message().asks) == ASKS_MAX
    assert len(world.message().asks) == 7


def test_a_tenant_that_moves_takes_along_what_is_in_use(world: World) -> None:
    held = world.hot()
    world.lent(held)
    taken = world.reserve(held, 10, 1_500)
    assert taken is not None
    home = Till(world.book)
    moved = world.till.leave("acme", world.now)
    assert moved is held
    home.join(held, world.now)
    message = home.message(world.now)
    assert message is not None
    ask = message.asks[0]
    assert (ask.lease, ask.slots_held, ask.nano_held, ask.nano_carried) == ("", 1, 0, 1_500)
    home.granted(message, Answer("other", (Grant("acme", seed_commit=0),)), world.now, world.now)
    home.settle(taken, Amount(5, 300), world.now)
    message = home.message(world.now + RENEW_S)
    assert message is not None
    assert (message.asks[0].slots_held, message.asks[0].nano_carried) == (0, 300)


def test_an_owner_that_is_not_its_home_any_more_lends_nothing(world: World) -> None:
    held = world.hot()
    world.lent(held)
    world.need(held, moved=True)
    assert held.moved
    assert world.till.take(held, world.now) is None


def test_places_are_successive_and_forgotten_after_their_time() -> None:
    places = Places()
    assert [places.hand_out(10.0, 1.0, 9.0) for _ in range(3)] == [10.0, 11.0, 12.0]
    places.used()
    assert places.hand_out(10.5, 1.0, 9.5) == 13.0
    assert places.hand_out(20.0, 1.0, 19.0) == 20.0


def test_what_a_tick_looks_at_does_not_grow_with_the_tenants() -> None:
    world = World(REQUESTS)
    for number in range(20_000):
        world.till.of(f"tenant {number}", REQUESTS, world.now)
    few = timeit.timeit(lambda: world.till.message(world.now), number=1, timer=time.thread_time)
    world.now += RENEW_S
    assert world.message().asks == []
    assert few < 0.01
    world.now += IDLE_S
    before = len(world.till.held)
    world.till.message(world.now)
    assert before - len(world.till.held) == FADE_MAX
