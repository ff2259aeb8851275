from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.rate_limiter.policy import ROOMS_MAX, Bucket, RollingHour
from actors.rate_limiter.terms import Ask, Layout, Limits, Refusal, Share


def test_a_bucket_fills_at_its_rate_and_never_above_its_capacity() -> None:
    bucket = Bucket(1.0, 2.0, 0.0, 0.0)
    assert bucket.take(1, 0.9) is None
    assert bucket.take(1, 1.0) is not None
    bucket.refill(100.0)
    assert bucket.level == 2.0


def test_a_bucket_says_when_so_much_is_there() -> None:
    assert Bucket(2.0, 5.0, 0.5, 0.0).wait_s(1, 0.0) == 0.25
    assert Bucket(2.0, 5.0, 0.5, 0.0).wait_s(3, 0.0) == 1.25
    assert Bucket(2.0, 0.5, 0.5, 0.0).wait_s(1, 0.0) == float("inf")


def test_a_bucket_knows_what_it_had_a_moment_ago() -> None:
    bucket = Bucket(1.0, 2.0, 0.0, 0.0)
    assert bucket.level_before(0.5, 1.0) == pytest.approx(0.5)
    assert bucket.level_before(0.5, 2.25) == pytest.approx(1.75), "full for 0.25 s"
    assert bucket.level_before(0.5, 3.0) == pytest.approx(2.0)


def test_a_full_bucket_gives_more_than_it_has_to_who_may_leave_a_debt() -> None:
    bucket = Bucket(10.0, 100.0, 99.0, 0.0)
    assert bucket.take(150, 0.0) is None
    assert bucket.take(150, 0.0, debt=True) is None
    assert bucket.take(150, 0.1, debt=True) is not None
    assert bucket.level == -50.0
    assert bucket.wait_s(1, 0.1) == pytest.approx(5.1)
    assert Bucket(0.0, 0.0, 0.0, 0.0).take(1, 0.0, debt=True) is None


def test_what_is_charged_may_leave_a_debt() -> None:
    bucket = Bucket(10.0, 100.0, 5.0, 0.0)
    bucket.charge(25, 0.0)
    assert bucket.level == -20.0


def test_a_bucket_that_waits_gives_its_wait_along_with_its_rate() -> None:
    bucket = Bucket(10.0, 10.0, 10.0, 0.0)
    bucket.at_s = 0.1
    share = bucket.carve(4.0, 4.0, 4.0, 0.0)
    assert share.after_s == pytest.approx(0.1)
    desk = Bucket(0.0, 0.0, 0.0, 5.0)
    desk.put(share, 5.0)
    desk.take(4, 5.0)
    assert desk.wait_s(1, 5.0) == pytest.approx(0.1 + 1 / 4.0)
    desk.refill(5.1)
    assert desk.level == 0.0


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


def test_what_was_taken_is_put_back_as_if_it_had_not_been() -> None:
    bucket = Bucket(1.0, 10.0, 5.0, 0.0)
    mark = bucket.take(3, 0.0)
    assert mark is not None
    assert bucket.put_back(mark, 3, 0.0) == 3
    assert bucket.level == 5.0


def test_what_would_have_overflowed_since_is_not_put_back() -> None:
    bucket = Bucket(1.0, 2.0, 2.0, 0.0)
    mark = bucket.take(1, 0.0)
    assert mark is not None
    bucket.take(1, 10.0)
    assert bucket.put_back(mark, 1, 10.0) == 0.0
    assert bucket.level == 1.0


amounts = st.integers(1, 8)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("wait"), st.integers(1, 40)),
        st.tuples(st.just("take"), amounts),
        st.tuples(st.just("back"), st.integers(0, 30)),
    ),
    max_size=60,
)


def replay(rate: float, capacity: float, events: list[tuple[float, float]]) -> list[float]:
    """The levels of a bucket from which so much is taken at each time, naively."""
    level, last, levels = capacity, 0.0, []
    for at_s, amount in events:
        level = min(capacity, level + (at_s - last) * rate) - amount
        last = at_s
        levels.append(level)
    return levels


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5), st.integers(4, 20), steps)
def test_takes_and_undone_takes_leave_the_level_of_a_world_without_the_undone(
    rate: int, capacity: int, steps: list[tuple[str, int]]
) -> None:
    """GCRA against a model that replays the whole history: exact as long as all is remembered."""
    bucket, now = Bucket(float(rate), float(capacity), float(capacity), 0.0), 0.0
    events: list[tuple[float, float]] = []
    taken: list[tuple[int, int]] = []  # mark, place in events
    for what, n in steps:
        if what == "wait":
            now += n / 8
        elif what == "take":
            mark = bucket.take(n, now)
            expected = replay(rate, capacity, [*events, (now, 0.0)])[-1]
            assert (mark is not None) == (expected >= n - 1e-9)
            if mark is not None:
                taken.append((mark, len(events)))
                events.append((now, float(n)))
        elif taken:
            mark, place = taken.pop(n % len(taken))
            at_s, amount = events[place]
            bucket.put_back(mark, amount, now)
            events[place] = (at_s, 0.0)
        bucket.refill(now)
        assert bucket.level == pytest.approx(replay(rate, capacity, [*events, (now, 0.0)])[-1])


def test_a_bucket_remembers_so_much_of_its_past_and_errs_on_the_safe_side() -> None:
    bucket, marks = Bucket(0.0, 1000.0, 1000.0, 0.0), []
    for _ in range(3 * ROOMS_MAX):
        marks.append(bucket.take(1, 0.0))
    assert len(bucket._rooms) <= ROOMS_MAX
    for mark in reversed(marks):
        assert mark is not None
        bucket.put_back(mark, 1, 0.0)
    assert bucket.level <= 1000.0
    assert bucket.level >= 1000.0 - 2 * ROOMS_MAX - 1


@settings(max_examples=200, deadline=None)
@given(st.randoms(use_true_random=False))
def test_parts_never_give_more_than_the_whole(chance: object) -> None:
    """Carved, used, put together and undone at random: a single bucket admits all of it."""
    rng = chance
    whole = Bucket(5.0, 20.0, 20.0, 0.0)
    parts = [Bucket(0.0, 0.0, 0.0, 0.0) for _ in range(3)]
    naive, last, now = 20.0, 0.0, 0.0
    taken: list[tuple[float, int, int, float]] = []
    log: list[tuple[float, float]] = []
    for _ in range(80):
        now += rng.choice([0.0, 0.0, 0.05, 0.4, 3.0])  # type: ignore[attr-defined]
        n = rng.randrange(3)  # type: ignore[attr-defined]
        part = parts[n]
        what = rng.choice(["lend", "take", "take", "home", "back"])  # type: ignore[attr-defined]
        size = rng.choice([0.5, 1.0, 3.0, 9.0])  # type: ignore[attr-defined]
        if what == "lend":
            part.put(whole.carve(size / 4, size, size, now), now)
        elif what == "home":
            whole.put(part.carve(size / 4, size, size / 2, now), now)
        elif what == "take":
            mark = part.take(size, now)
            if mark is not None:
                log.append((now, size))
                taken.append((size, n, mark, now))
        elif taken:
            size, n, mark, at_s = taken.pop()
            parts[n].put_back(mark, size, now)
            log.remove((at_s, size))
    for at_s, amount in log:
        naive = min(20.0, naive + (at_s - last) * 5.0) - amount
        last = at_s
        assert naive >= -1e-6


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
    assert hour.give_back(9, minute) == 3
    assert hour.used(60.0) == 5


def test_an_hour_can_be_told_what_was_before() -> None:
    hour = RollingHour()
    hour.book(1, 7200.0)
    hour.seed(((0, 2), (59, 4)), 7200.0)
    assert hour.used(7200.0) == 7
    assert hour.used(7200.0 + 119.0) == 7
    assert hour.used(7200.0 + 200.0) == 3
    assert hour.used(7200.0 + 3720.0) == 0


def test_what_travels_survives_pickling() -> None:
    ask = Ask("acme", Limits(60.0), requests=Share(1.0, 2.0, 3.0))
    refusal = Refusal("requests_per_minute", 60.0, 0.0, 1.0)
    assert pickle.loads(pickle.dumps((ask, refusal))) == (ask, refusal)


@pytest.mark.parametrize(
    ("limits", "counts", "meters", "reserves", "nano_most"),
    [
        (Limits(), False, False, False, None),
        (Limits(requests_per_minute=60.0), True, False, False, None),
        (Limits(requests_per_hour=9), True, False, False, None),
        (Limits(concurrent=2), False, False, True, None),
        (Limits(tokens_per_minute=100), False, True, True, None),
        (Limits(day_nano=5), False, True, True, 5),
        (Limits(month_nano=0), False, True, True, 0),
        (Limits(day_nano=5, month_nano=3, requests_per_hour=9), True, True, True, 3),
    ],
)
def test_what_follows_from_limits_is_the_same_wherever_they_are(
    limits: Limits, counts: bool, meters: bool, reserves: bool, nano_most: int | None
) -> None:
    for told in (limits, pickle.loads(pickle.dumps(limits)), replace(limits, version=7)):
        assert told == limits
        assert (told.counts, told.meters, told.reserves) == (counts, meters, reserves)
        assert told.nano_most == nano_most
    assert pickle.loads(pickle.dumps(replace(limits, version=7))).version == 7
    assert replace(limits, day_nano=1, month_nano=None).nano_most == 1


def test_each_tenant_has_one_home_and_few_move_when_there_is_one_more() -> None:
    names = [f"tenant-{n}" for n in range(300)]
    three, four = Layout(1, 3), Layout(2, 4)
    assert {three.home(name) for name in names} == {0, 1, 2}
    moved = [name for name in names if three.home(name) != four.home(name)]
    assert all(four.home(name) == 3 for name in moved)
    assert 40 < len(moved) < 120
