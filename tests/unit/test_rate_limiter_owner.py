from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from actors.rate_limiter.account import DAY_S
from actors.rate_limiter.owner import (
    LEASE_S,
    MARGIN_S,
    RELAYOUT_LEARN_S,
    SILENT_S,
    TIDY,
    RateLimiter,
)
from actors.rate_limiter.pool import TRAVEL_S
from actors.rate_limiter.terms import Ask, Grant, Layout, Limits, Need, Seed, Share
from tests.support.fake_time import FakeTime

LIMITS = Limits(60.0, 10)
TOKENS = Limits(tokens_per_minute=6000)  # 1000 at once, 100 per second
MONEY = Limits(day_nano=1000, month_nano=1500)
NOON = 20_000 * DAY_S + DAY_S / 2
ONE = Layout()
SEED = Seed(1)


class World:
    """An owner, and desks that say what a test tells them to."""

    def __init__(self, **kwargs: Any) -> None:
        self.time = FakeTime()
        self.wall = FakeTime()
        self.wall.now = NOON
        kwargs = {"fresh": True, "nonce": "owner"} | kwargs
        self.owner = RateLimiter(self.time, self.wall, **kwargs)
        self.seqs: dict[str, int] = {}

    def ask(self, desk: str, ask: Ask, layout: Layout = ONE, owner: str = "owner") -> Grant:
        self.seqs[desk] = self.seqs.get(desk, 0) + 1
        return self.owner.lease(desk, self.seqs[desk], [ask], layout, owner).grants[0]

    def heartbeat(self, desk: str) -> tuple[str, ...]:
        self.seqs[desk] = self.seqs.get(desk, 0) + 1
        return self.owner.lease(desk, self.seqs[desk], [], Layout(), "owner").silent

    def seeded(self, limits: Limits, seed: Seed = SEED) -> None:
        """The ledger's word is there."""
        assert self.ask("first", Ask("acme", limits)).unseeded
        assert not self.ask("first", Ask("acme", limits, seed=seed)).unseeded


def cold(limits: Limits, need: int = 1, **kwargs: Any) -> Ask:
    return Ask("acme", limits, need=need, **kwargs)


def hot(limits: Limits, **kwargs: Any) -> Ask:
    return Ask("acme", limits, hot=True, **kwargs)


# ---------------------------------------------------------------------------------- messages


def test_a_repeated_message_gets_the_same_answer_and_an_overtaken_one_nothing() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    asks = [cold(LIMITS)]
    first = owner.lease("desk", 1, asks)
    assert owner.lease("desk", 1, asks) == first
    owner.lease("desk", 2, asks)
    (late,) = owner.lease("desk", 1, asks).grants
    assert (late.life_s, late.requests) == (0.0, Share())


def test_equal_limits_of_a_newer_configuration_are_not_undone_by_an_older_one() -> None:
    world = World()
    newer, older = Limits(60.0, 2, version=3), Limits(600.0, 20, version=2)
    world.ask("one", cold(Limits(60.0, 2, version=1)))
    world.ask("two", cold(newer))
    assert world.ask("three", cold(older)).limits == newer


# ---------------------------------------------------------------------------------- requests


def test_who_is_not_hot_is_lent_exactly_what_is_needed() -> None:
    world = World()
    grant = world.ask("desk", cold(LIMITS, 2))
    assert grant.requests[:3] == (0.0, 2.0, 2.0)
    assert grant.refusal is None
    assert grant.requests_figures is not None
    assert grant.requests_figures.remaining == 10.0


def test_what_was_lent_to_be_used_at_once_is_home_with_the_next_message() -> None:
    world = World()
    for _ in range(10):
        assert world.ask("desk", cold(LIMITS)).refusal is None
    world.time.now += TRAVEL_S + 1.0
    assert world.ask("desk", cold(LIMITS)).refusal is None
    assert world.ask("desk", cold(LIMITS)).refusal is not None


def test_what_is_still_named_is_not_home() -> None:
    world = World()
    limits = Limits(60.0, 1)
    grant = world.ask("desk", cold(limits))
    again = world.ask("desk", Ask("acme", limits, lease=grant.lease, requests=Share(0, 1, 0)))
    assert again.lease == grant.lease
    world.time.now += 5.0  # meanwhile the desk is lost
    (refused,) = world.owner.lease("other", 1, [cold(limits)], Layout(), "owner").grants
    assert refused.refusal is None
    assert world.owner.state("acme")["requests"]["burst"] == 1.0


def test_a_hot_desk_is_lent_a_rate() -> None:
    world = World()
    grant = world.ask("desk", hot(LIMITS, need=1, demand_per_s=5.0))
    assert grant.requests == pytest.approx((1.0, 10.0, 10.0, TRAVEL_S))
    assert (grant.rate_target, grant.capacity_target) == (1.0, 10.0)


def test_a_lease_that_nobody_renews_comes_back_empty_but_refills_from_then_on() -> None:
    world = World()
    world.ask("desk", hot(LIMITS, need=1))
    world.time.now += LEASE_S + MARGIN_S + 3.0
    state = world.owner.state("acme")
    assert state["requests"]["remaining"] == pytest.approx(3.0)
    assert state["leases"] == 0


def test_what_a_desk_never_heard_of_is_lent_again() -> None:
    world = World()
    limits = Limits(60.0, 10, concurrent=3)
    ask = hot(limits, need=1, needs=(Need(1),) * 3)
    lost, heard = world.ask("desk", ask), world.ask("desk", ask)
    assert lost.slots == heard.slots == 3
    assert heard.lease != lost.lease
    assert heard.requests.capacity == lost.requests.capacity == 10.0
    assert heard.requests.level == pytest.approx(0.0)  # what got lost counts as used


def test_a_burst_too_small_for_all_hot_desks_is_lent_one_by_one() -> None:
    world = World()
    limits = Limits(60.0, 1)
    world.ask("one", hot(limits, demand_per_s=1.0))
    grant = world.ask("two", hot(limits, demand_per_s=1.0))
    assert (grant.rate_target, grant.capacity_target) == (0.0, 0.0)


def test_a_refusal_says_when_and_20_ms_earlier_it_is_too_early() -> None:
    world = World()
    for _ in range(10):
        world.ask("desk", cold(LIMITS))
    world.heartbeat("desk")
    refusal = world.ask("desk", cold(LIMITS)).refusal
    assert refusal is not None
    assert not refusal.lent
    world.time.now += refusal.retry_after_s - 0.02
    assert world.ask("desk", cold(LIMITS)).refusal is not None
    world.time.now += 0.02
    assert world.ask("desk", cold(LIMITS)).refusal is None


def test_a_message_that_travels_long_brings_no_one_in_before_their_time() -> None:
    world = World()
    for _ in range(10):
        world.ask("desk", cold(LIMITS))
    world.heartbeat("desk")
    refusal = world.ask("desk", cold(LIMITS)).refusal
    assert refusal is not None
    world.time.now += refusal.retry_after_s + 0.01
    assert world.ask("other", cold(LIMITS, age_s=0.03)).refusal is not None
    assert world.ask("desk", cold(LIMITS, age_s=0.01)).refusal is None


def test_who_comes_to_a_full_bucket_is_served_however_long_the_message_travels() -> None:
    world = World()
    assert world.ask("desk", cold(Limits(60.0, 1), age_s=0.05)).refusal is None


def test_those_refused_at_once_get_successive_places() -> None:
    world = World()
    for _ in range(10):
        world.ask("desk", cold(LIMITS))
    world.heartbeat("desk")
    one = world.ask("one", cold(LIMITS, 2)).refusal
    two = world.ask("two", cold(LIMITS)).refusal
    assert one is not None
    assert two is not None
    assert one.spacing_s == two.spacing_s == 1.0
    assert two.retry_after_s == pytest.approx(one.retry_after_s + 2.0)


def test_who_asks_again_keeps_its_place() -> None:
    world = World()
    for _ in range(10):
        world.ask("desk", cold(LIMITS))
    world.heartbeat("desk")
    for _ in range(20):
        one = world.ask("one", cold(LIMITS)).refusal
        two = world.ask("two", cold(LIMITS)).refusal
        world.time.now += 0.01
    assert one is not None
    assert two is not None
    assert two.retry_after_s == pytest.approx(one.retry_after_s + 1.0)
    assert one.retry_after_s < 1.2


def test_a_desk_that_has_all_of_it_does_not_make_others_wait_for_nothing() -> None:
    world = World()
    limits = Limits(60.0, 2)
    held: Share = Share()
    lease = ""
    for _ in range(3):
        ask = hot(limits, need=1, demand_per_s=5.0, lease=lease, requests=held)
        grant = world.ask("one", ask)
        held = Share(1.0, grant.capacity_target, 0.0)
        lease = grant.lease
    grant = world.ask("two", hot(limits, need=1, demand_per_s=5.0))
    assert grant.refusal is not None
    assert grant.refusal.lent  # the other is told to give a part of the rate
    assert world.ask("one", hot(limits, lease=lease, requests=held)).rate_target < 1.0


# ---------------------------------------------------------------------------------- tokens


def test_tokens_are_lent_exactly_to_who_is_not_hot_and_what_is_not_used_comes_back() -> None:
    world = World()
    grant = world.ask("desk", cold(TOKENS, 0, needs=(Need(tokens=900),)))
    assert grant.admitted == 1
    assert grant.tokens.level == 900.0
    world.time.now += 2.0
    world.ask("desk", Ask("acme", TOKENS, refunds=((grant.token_mark, 700),)))
    # 100 + 2 s of 100, of which the capacity that was away had no room for any, or + 190
    assert 800.0 <= world.owner.state("acme")["tokens"]["remaining"] <= 1000.0


def test_a_refund_finds_no_room_where_the_bucket_was_full_since() -> None:
    world = World()
    grant = world.ask("desk", cold(TOKENS, 0, needs=(Need(tokens=500),)))
    world.heartbeat("desk")
    world.time.now += 60.0
    later = world.ask("desk", cold(TOKENS, 0, needs=(Need(tokens=500),)))
    assert later.admitted == 1
    world.ask("desk", Ask("acme", TOKENS, refunds=((grant.token_mark, 500),)))
    assert world.owner.state("acme")["tokens"]["remaining"] == pytest.approx(500.0)


def test_actual_use_above_the_reservation_is_charged() -> None:
    world = World()
    world.ask("desk", Ask("acme", TOKENS, refunds=((7, -1500),)))
    refusal = world.ask("desk", cold(TOKENS, 0, needs=(Need(tokens=100),))).need_refusal
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(6.0)


def test_a_request_above_the_burst_takes_all_and_leaves_a_debt() -> None:
    world = World()
    ask = cold(TOKENS, 0, needs=(Need(tokens=2500),))
    grant = world.ask("desk", ask)
    assert (grant.admitted, grant.tokens.level, grant.tokens.capacity) == (1, 2500.0, 2500.0)
    world.heartbeat("desk")
    refusal = world.ask("desk", cold(TOKENS, 0, needs=(Need(tokens=100),))).need_refusal
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(16.0 + TRAVEL_S)
    refusal = world.ask("desk", ask).need_refusal
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(25.0 + TRAVEL_S)
    world.time.now += refusal.retry_after_s
    assert world.ask("desk", ask).admitted == 1


def test_a_request_above_the_limit_never_is() -> None:
    refusal = World().ask("desk", cold(TOKENS, 0, needs=(Need(tokens=6001),))).need_refusal
    assert refusal is not None
    assert refusal.never


def test_hot_desks_have_a_part_of_the_tokens_where_these_are_fine_grained() -> None:
    world = World()
    fine = hot(TOKENS, token_unit=50.0, token_demand_per_s=10.0)
    assert world.ask("desk", fine).tokens.rate_per_s == 100.0
    coarse = World().ask("desk", hot(TOKENS, token_unit=500.0, needs=(Need(tokens=500),)))
    assert coarse.tokens[:3] == (0.0, 500.0, 500.0)


def test_needs_are_met_in_order_and_each_wholly_or_not_at_all() -> None:
    world = World()
    limits = replace(TOKENS, concurrent=2)
    needs = (Need(1, 600), Need(1, 600), Need(0, 10))
    grant = world.ask("desk", cold(limits, 0, needs=needs))
    assert (grant.admitted, grant.slots, grant.tokens.level) == (1, 1, 600.0)
    assert grant.need_refusal is not None
    assert grant.need_refusal.kind == "tokens_per_minute"


def test_a_first_ask_is_lent_all_that_its_request_will_reserve_or_none_of_it() -> None:
    world = World()
    limits = replace(TOKENS, requests_per_minute=60.0, concurrent=2)
    grant = world.ask("desk", cold(limits, ahead=Need(1, 600)))
    assert (grant.requests.level, grant.slots, grant.tokens.level) == (1.0, 1, 600.0)
    grant = world.ask("desk", cold(limits, slots_held=1, ahead=Need(1, 600)))
    assert (grant.requests.level, grant.slots, grant.tokens.level) == (1.0, 0, 0.0)


# ---------------------------------------------------------------------------------- hours


def test_the_hour_is_lent_when_the_ledger_has_spoken() -> None:
    world = World()
    limits = Limits(requests_per_hour=10)
    refused = world.ask("desk", cold(limits))
    assert refused.unseeded
    assert refused.refusal is not None
    assert refused.refusal.lent
    grant = world.ask("desk", cold(limits, 9, seed=Seed(4, minutes=((3, 8),))))
    assert (grant.hours, grant.unseeded) == (2, False)
    world.ask("other", cold(limits, seed=Seed(9, minutes=((3, 1),))))  # the first word counts
    assert world.owner.state("acme")["hour"] == {"limit": 10, "used": 10, "remaining": 0}


def test_a_seed_that_was_read_for_another_owner_is_not_taken() -> None:
    world = World()
    limits = Limits(requests_per_hour=10)
    assert world.ask("desk", cold(limits, seed=Seed(4))).unseeded
    assert world.ask("desk", cold(limits, seed=Seed(4)), owner="before").unseeded
    assert not world.ask("desk", cold(limits, seed=Seed(4))).unseeded


def test_what_was_counted_under_another_owner_is_booked_once() -> None:
    world = World()
    limits = Limits(requests_per_hour=10)
    world.seeded(limits)
    for _ in range(2):
        world.ask("desk", Ask("acme", limits, hours_open=3))
    assert world.owner.state("acme")["hour"]["used"] == 3


def test_one_desk_does_not_take_the_last_of_the_hour_ahead_of_its_need() -> None:
    world = World()
    limits = Limits(requests_per_hour=10)
    world.seeded(limits)
    taken = world.ask("hot", hot(limits, need=1, demand_per_s=100.0))
    assert taken.hours <= 5
    assert world.ask("other", cold(limits, 2)).hours == 2


# ---------------------------------------------------------------------------------- slots


def test_who_lacks_slots_is_not_told_to_give_any_but_others_are() -> None:
    world = World()
    limits = Limits(concurrent=2)
    one = world.ask("one", hot(limits, needs=(Need(1),) * 2))
    short = world.ask("two", cold(limits, 0, needs=(Need(1),)))
    told = world.ask("one", hot(limits, lease=one.lease, slots_held=2))
    assert one.slots == 2
    assert short.need_refusal is not None
    assert short.need_refusal.lent
    assert not short.wanted
    assert told.wanted
    world.time.now += 0.02  # the other has spoken, and had none that was free
    again = world.ask("two", cold(limits, 0, needs=(Need(1),))).need_refusal
    assert again is not None


def test_slots_are_free_when_their_process_is_dead_and_not_when_it_is_silent() -> None:
    world = World()
    limits = Limits(concurrent=2)
    need = cold(limits, 0, needs=(Need(1),))
    for _ in range(2):
        held = world.seqs.get("node/1/1#a", 0)
        world.ask("node/1/1#a", replace_ask(need, slots_held=held))
    world.time.now += 3600.0
    assert world.ask("two", need).admitted == 0
    assert world.heartbeat("two") == ("node/1/1",)
    assert world.owner.holder_gone("node/1/1") == 2
    assert world.heartbeat("two") == ()
    assert world.ask("two", need).admitted == 1
    late = world.ask("node/1/1#a", replace_ask(need, slots_held=2))
    assert (late.admitted, late.slots) == (0, 0)
    assert world.owner.state("acme")["concurrent"] == {"limit": 2, "in_use": 1}


def replace_ask(ask: Ask, **kwargs: Any) -> Ask:
    return ask._replace(**kwargs)


def test_a_process_that_holds_nothing_is_not_called_silent() -> None:
    world = World()
    world.ask("one", cold(LIMITS))
    world.time.now += SILENT_S + 1.0
    assert world.heartbeat("two") == ()


# ---------------------------------------------------------------------------------- money


def money(nano: int, **kwargs: Any) -> Ask:
    return cold(MONEY, 0, needs=(Need(nano=nano),) if nano else (), **kwargs)


def test_money_is_lent_when_the_ledger_has_spoken_and_never_more_than_is_left() -> None:
    world = World()
    refusal = world.ask("desk", money(10)).need_refusal
    assert refusal is not None
    assert refusal.lent
    world.seeded(MONEY, Seed(7, 20_000, 300, 24_297, 300))
    grant = world.ask("desk", money(600))
    assert (grant.nano, grant.admitted, grant.seed_commit) == (600, 1, 7)
    refusal = world.ask("other", money(101)).need_refusal
    assert refusal is not None
    assert (refusal.kind, refusal.lent, refusal.remaining) == ("usd_per_day", True, 100.0)
    assert world.ask("other", money(100)).nano == 100


def test_what_is_settled_counts_once_and_what_was_not_used_is_free_again() -> None:
    world = World()
    world.seeded(MONEY)
    world.ask("desk", money(600))
    for _ in range(2):
        world.ask("desk", money(0, nano_spent=200))
    assert world.ask("other", money(800)).nano == 800
    refusal = world.ask("desk", money(1, nano_spent=200)).need_refusal
    assert refusal is not None
    assert refusal.lent  # the other's call may leave some
    world.ask("other", money(0, nano_spent=800))
    refusal = world.ask("desk", money(1, nano_spent=200)).need_refusal
    assert refusal is not None
    assert (refusal.lent, refusal.retry_after_s) == (False, DAY_S / 2)


def test_a_new_day_has_all_of_its_money_but_the_month_goes_on() -> None:
    world = World()
    world.seeded(MONEY)
    world.ask("desk", money(1000))
    world.ask("desk", money(0, nano_spent=1000))
    world.wall.now += DAY_S / 2
    assert world.ask("desk", money(500, nano_spent=1000)).nano == 500
    refusal = world.ask("other", money(1)).need_refusal
    assert refusal is not None
    assert refusal.kind == "usd_per_month"


def test_what_the_dead_held_counts_as_spent() -> None:
    world = World()
    world.seeded(MONEY)
    world.ask("node/1/1#a", money(400))
    world.owner.holder_gone("node/1/1")
    assert world.ask("desk", money(601)).need_refusal is not None
    state = world.owner.state("acme")["usd_per_day"]
    assert (state["spent"], state["reserved"]) == (400 / 1e9, 0.0)


def test_money_of_another_owner_is_held_until_its_desk_says_what_became_of_it() -> None:
    world = World()
    world.seeded(MONEY)
    world.ask("desk", money(0, nano_spent=100, nano_held=200), owner="before")
    assert world.owner.state("acme")["usd_per_day"]["reserved"] == 300 / 1e9
    world.ask("desk", money(0, nano_carried=250))
    assert world.owner.state("acme")["usd_per_day"]["reserved"] == 250 / 1e9
    world.ask("desk", money(0, nano_spent=40))
    state = world.owner.state("acme")["usd_per_day"]
    assert (state["spent"], state["reserved"]) == (40 / 1e9, 0.0)


def test_more_than_the_limit_is_refused_for_good() -> None:
    world = World()
    world.seeded(MONEY)
    refusal = world.ask("desk", money(1001)).need_refusal
    assert refusal is not None
    assert refusal.never


# ---------------------------------------------------------------------------------- lives


def test_a_new_owner_lends_nothing_while_it_learns_and_is_empty_then() -> None:
    world = World(fresh=False)
    ask = hot(Limits(60.0, 10, concurrent=2), need=1, needs=(Need(1),))
    grant = world.ask("desk", ask)
    assert (grant.life_s, grant.slots, grant.requests, grant.unseeded) == (0.0, 0, Share(), False)
    assert grant.refusal is not None
    assert grant.need_refusal is not None
    world.time.now += grant.refusal.retry_after_s
    assert world.owner.state("acme")["requests"]["remaining"] == 0.0
    grant = world.ask("desk", ask)
    assert (grant.slots, grant.life_s) == (1, LEASE_S)


def test_an_owner_that_is_vouched_for_starts_full() -> None:
    world = World(fresh=False)
    world.owner.vouch()
    assert world.ask("desk", hot(LIMITS, need=1)).requests.level == 10.0


def test_full_tenants_that_nobody_holds_are_forgotten_a_few_with_each_message() -> None:
    world = World()
    for n in range(20):
        world.ask("desk", cold(LIMITS)._replace(tenant=f"tenant-{n}"))
    assert world.owner.stats()["tenants"] == 20
    world.time.now += 60.0
    for _ in range(20 // TIDY):
        world.heartbeat("other")
    assert world.owner.stats()["tenants"] == 0
    assert world.owner.stats()["leases"] == 0


def test_a_layout_that_was_announced_can_be_taken_back() -> None:
    names = [f"tenant-{n}" for n in range(40)]
    one, two, back = Layout(1, 1), Layout(2, 2), Layout(2, 1)
    goes = next(name for name in names if two.home(name) == 1)
    ask = cold(LIMITS)._replace(tenant=goes)
    first = World(shard=0, layout=one)
    second = World(shard=1, layout=one)
    for owner in (first.owner, second.owner):
        assert owner.adopt(two)
        assert not owner.adopt(one), "it is older"
        assert owner.adopt(back)
        assert not owner.adopt(back)
        assert not owner.adopt(Layout(0, 2)), "no configuration says so"
    assert not first.ask("desk", ask, one).moved
    first.time.now += RELAYOUT_LEARN_S + 1.0
    assert first.ask("desk", ask, one).requests.level == 1.0
    assert second.ask("desk", ask, one).moved


def test_who_left_by_a_layout_that_was_taken_back_is_not_remembered_there() -> None:
    names = [f"tenant-{n}" for n in range(40)]
    two = Layout(2, 2)
    goes = next(name for name in names if two.home(name) == 1)
    ask = cold(LIMITS)._replace(tenant=goes)
    second = World(shard=1, layout=Layout(1, 1))
    second.ask("desk", ask, two)
    second.time.now += RELAYOUT_LEARN_S + 1.0
    assert second.ask("desk", ask, two).refusal is None
    second.owner.adopt(Layout(2, 1))
    second.owner.adopt(two)
    assert second.ask("desk", ask, two).refusal is not None, "it may be lent elsewhere by now"


def test_tenants_that_come_by_a_new_layout_start_empty_and_those_that_go_are_told() -> None:
    names = [f"tenant-{n}" for n in range(40)]
    one, two = Layout(1, 1), Layout(2, 2)
    stays = next(name for name in names if two.home(name) == 0)
    goes = next(name for name in names if two.home(name) == 1)
    first = World(shard=0, layout=one)
    second = World(shard=1, layout=one)
    for name in (stays, goes):
        assert not first.ask("desk", cold(LIMITS)._replace(tenant=name), one).moved
    assert second.ask("desk", cold(LIMITS)._replace(tenant=goes), one).moved
    assert first.ask("desk", cold(LIMITS)._replace(tenant=goes), two).moved
    assert first.ask("desk", cold(LIMITS)._replace(tenant=stays), one).requests.level == 1.0
    grant = second.ask("desk", cold(LIMITS)._replace(tenant=goes), two)
    assert grant.refusal is not None
    assert grant.refusal.retry_after_s == pytest.approx(RELAYOUT_LEARN_S)
    second.time.now += RELAYOUT_LEARN_S + 1.0
    assert second.ask("desk", cold(LIMITS)._replace(tenant=goes), two).requests.level == 1.0
    assert second.ask("desk", cold(LIMITS)._replace(tenant=goes), two).refusal is not None
