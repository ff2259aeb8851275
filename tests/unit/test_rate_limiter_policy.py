from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.rate_limiter.owner import LEASE_S, MARGIN_S, RateLimiter
from actors.rate_limiter.policy import Ask, Bucket, Grant, Limits, Refusal, RollingHour, Share
from actors.rate_limiter.till import Held, Till
from tests.support.fake_time import FakeTime

LIMITS = Limits(60.0, 10)


def test_a_bucket_fills_at_its_rate_and_never_above_its_capacity() -> None:
    bucket = Bucket(1.0, 2.0, 0.0, 0.0)
    assert not bucket.take(0.9)
    assert bucket.take(1.0)
    bucket.refill(100.0)
    assert bucket.level == 2.0


def test_a_bucket_says_when_one_is_there() -> None:
    assert Bucket(2.0, 5.0, 0.5, 0.0).wait_s(0.0) == 0.25
    assert Bucket(2.0, 0.5, 0.5, 0.0).wait_s(0.0) == float("inf")


@given(*(st.floats(0.0, 20.0) for _ in range(3)))
def test_what_is_carved_off_and_put_back_is_what_there_was(
    rate: float, capacity: float, level: float
) -> None:
    bucket = Bucket(5.0, 10.0, 7.0, 0.0)
    share = bucket.carve(rate, capacity, level, 0.0)
    assert bucket.level <= bucket.capacity
    bucket.put(share, 0.0)
    assert (bucket.rate_per_s, bucket.capacity) == pytest.approx((5.0, 10.0))
    assert bucket.level <= 7.0 + 1e-9


def test_a_token_is_put_back_as_if_it_had_not_been_taken() -> None:
    bucket = Bucket(1.0, 10.0, 5.0, 0.0)
    bucket.take(0.0)
    bucket.put_back(bucket.era, 0.0)
    assert bucket.level == 5.0


def test_a_token_that_would_have_overflowed_since_is_not_put_back() -> None:
    bucket = Bucket(1.0, 2.0, 2.0, 0.0)
    bucket.take(0.0)
    era = bucket.era
    bucket.refill(10.0)
    bucket.take(10.0)
    bucket.put_back(era, 10.0)
    assert bucket.level == 1.0


def test_an_hour_forgets_only_what_cannot_have_happened_within_it() -> None:
    hour = RollingHour()
    hour.book(3, 59.0)
    assert hour.wait_s(59.0) == pytest.approx(3661.0)
    assert hour.used(3719.0) == 3
    assert hour.used(3720.0) == 0


def test_an_hour_takes_back_only_what_was_booked_then() -> None:
    hour = RollingHour()
    minute = hour.book(3, 0.0)
    hour.book(5, 60.0)
    hour.give_back(9, minute)
    assert hour.used(60.0) == 5


def test_a_repeated_message_gets_the_same_answer_and_an_overtaken_one_nothing() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    asks = [Ask("acme", LIMITS, need=1)]
    first = owner.lease("desk", 1, asks)
    assert owner.lease("desk", 1, asks) == first
    owner.lease("desk", 2, asks)
    (late,) = owner.lease("desk", 1, asks)
    assert (late.life_s, late.share) == (0.0, Share())


def test_a_lease_that_nobody_renews_comes_back_empty_but_refills_from_then_on() -> None:
    time = FakeTime()
    owner = RateLimiter(time, fresh=True)
    owner.lease("desk", 1, [Ask("acme", LIMITS, need=1)])
    time.now += LEASE_S + MARGIN_S + 3.0
    assert owner.state("acme")["level"] == pytest.approx(3.0)
    assert owner.state("acme")["leases"] == 0


def test_what_a_desk_never_heard_of_is_lent_again() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    limits = Limits(60.0, 10, concurrent=3)
    asks = [Ask("acme", limits, need=1, slots_need=3)]
    (lost,) = owner.lease("desk", 1, asks)
    (heard,) = owner.lease("desk", 2, asks)
    assert lost.slots == heard.slots == 3
    assert heard.lease != lost.lease
    assert heard.share.capacity == lost.share.capacity == 10.0
    assert heard.share.level == pytest.approx(0.0)  # what got lost counts as used


def test_a_new_owner_lends_nothing_while_it_learns_and_is_empty_then() -> None:
    time = FakeTime()
    owner = RateLimiter(time)
    ask = Ask("acme", Limits(60.0, 10, concurrent=2), need=1, slots_need=1)
    (grant,) = owner.lease("desk", 1, [ask])
    assert (grant.life_s, grant.slots, grant.share) == (0.0, 0, Share())
    assert grant.refusal is not None
    time.now += grant.refusal.retry_after_s
    assert owner.state("acme")["level"] == 0.0
    (grant,) = owner.lease("desk", 2, [ask])
    assert grant.slots == 1
    assert owner.lease("desk", 2, [ask])[0].life_s == LEASE_S


def test_an_owner_that_is_vouched_for_starts_full() -> None:
    owner = RateLimiter(FakeTime())
    owner.vouch()
    (grant,) = owner.lease("desk", 1, [Ask("acme", LIMITS, need=1)])
    assert grant.share.level == 10.0


def test_a_full_tenant_that_nobody_holds_is_forgotten() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    (grant,) = owner.lease("desk", 1, [Ask("acme", LIMITS)])
    over = Ask("acme", LIMITS, grant.owner, grant.lease, level_back=10.0, over=True)
    owner.lease("desk", 2, [over])
    assert owner.state("acme") == {"known": False}


def test_one_desk_does_not_take_the_last_of_the_hour_ahead_of_its_need() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    limits = Limits(requests_per_hour=10)
    (hot,) = owner.lease("hot", 1, [Ask("acme", limits, need=1, demand_per_s=100.0)])
    assert hot.hours <= 5
    (other,) = owner.lease("other", 1, [Ask("acme", limits, need=2)])
    assert other.hours == 2


def test_a_holder_that_lacks_slots_is_not_told_to_give_any() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    limits = Limits(concurrent=2)
    (one,) = owner.lease("one", 1, [Ask("acme", limits, slots_need=2)])
    (short,) = owner.lease("two", 1, [Ask("acme", limits, slots_need=1)])
    (told,) = owner.lease("one", 2, [Ask("acme", limits, slots_held=2)])
    assert one.slots == 2
    assert short.slot_refusal is not None
    assert not short.slots_wanted
    assert told.slots_wanted


def told(till: Till, limits: Limits, grant: Grant, now: float) -> Held:
    """What a till holds once this grant answered its ask."""
    held = till.of("acme", limits, now)
    held.need = 1
    message = till.message(now)
    assert message is not None
    till.granted(message, [grant], now, now)
    held.need = 0
    return held


def test_what_another_lease_held_is_not_kept_beside_the_new_one() -> None:
    till, share = Till(), Share(1.0, 10.0, 10.0)
    told(
        till,
        LIMITS,
        Grant("acme", "owner", "first", 0.5, share, rate_target=1.0, capacity_target=10.0),
        0.0,
    )
    held = told(
        till,
        LIMITS,
        Grant("acme", "owner", "second", 0.5, share, rate_target=1.0, capacity_target=10.0),
        0.1,
    )
    assert held.bucket is not None
    assert (held.bucket.rate_per_s, held.bucket.capacity) == (1.0, 10.0)


def test_a_free_slot_is_not_taken_when_the_owner_was_silent_for_a_lease_life() -> None:
    till, limits = Till(), Limits(concurrent=2)
    held = told(till, limits, Grant("acme", "owner", "lease", 0.5, slots=2), 0.0)
    assert till.take_slot(held, 0.4)
    assert not till.take_slot(held, 0.5)


def test_an_hourly_permit_is_used_within_a_minute_or_goes_back() -> None:
    till, limits = Till(), Limits(requests_per_hour=9)
    held = told(till, limits, Grant("acme", "owner", "lease", 0.5, hours=2, hours_minute=7), 0.0)
    assert till.take(held, 59.9)
    assert not till.take(held, 60.0)
    message = till.message(60.0)
    assert message is not None
    assert (message.asks[0].hours_back, message.asks[0].hours_minute) == (1, 7)


def test_what_travels_survives_pickling() -> None:
    ask = Ask("acme", LIMITS, held=Share(1.0, 2.0, 3.0))
    refusal = Refusal("requests_per_minute", 60.0, 0.0, 1.0)
    assert pickle.loads(pickle.dumps((ask, refusal))) == (ask, refusal)


def test_equal_limits_of_a_newer_configuration_are_not_undone_by_an_older_one() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    newer, older = Limits(60.0, 2, version=3), Limits(600.0, 20, version=2)
    owner.lease("one", 1, [Ask("acme", Limits(60.0, 2, version=1))])
    owner.lease("two", 1, [Ask("acme", newer)])
    (grant,) = owner.lease("three", 1, [Ask("acme", older)])
    assert grant.limits == newer


def test_a_refusal_is_the_tenants_own_doing_when_no_desk_has_any_to_spare() -> None:
    owner = RateLimiter(FakeTime(), fresh=True)
    limits = Limits(60.0, 2)
    owner.lease("one", 1, [Ask("acme", limits, need=1, demand_per_s=5.0)])
    owner.lease("one", 2, [Ask("acme", limits, need=1, demand_per_s=5.0)])
    for seq in (1, 2):
        (grant,) = owner.lease("two", seq, [Ask("acme", limits, need=1, demand_per_s=5.0)])
    assert grant.refusal is not None
