from __future__ import annotations

import asyncio
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher import hedge as hedge_module
from actors.batcher.hedge import CALLS_KEPT, CALLS_MIN, HEDGES_SAVED_MAX, Hedging, kind_of
from actors.batcher.owner import Batcher
from actors.batcher.policy import (
    BadVectors,
    Caps,
    Lane,
    Order,
    Paid,
    Share,
    Spare,
    Vectors,
    split_spare,
)
from tests.support.fake_time import FakeTime

LANE = Lane("d1")
KIND = kind_of(LANE, 100)
HEDGED = Caps(hedge=True)


# ------------------------------------------------------------------------------ what is late


def test_nothing_is_late_before_twenty_calls_of_its_kind_are_known() -> None:
    hedging = Hedging()
    for _ in range(CALLS_MIN - 1):
        hedging.answered(KIND, 0.1)
    assert hedging.late_after_s(KIND) is None
    assert not hedging.take(KIND)
    hedging.answered(KIND, 0.1)
    assert hedging.late_after_s(KIND) == 0.1
    assert hedging.take(KIND)


def test_late_is_later_than_95_in_100_of_the_last_calls() -> None:
    hedging = Hedging()
    for took_s in random.Random(1).sample(range(1, 101), 100):
        hedging.answered(KIND, took_s)
    assert hedging.late_after_s(KIND) == 95
    for _ in range(CALLS_KEPT):
        hedging.answered(KIND, 1.0)
    assert hedging.late_after_s(KIND) == 1.0


@given(st.lists(st.floats(0, 60), min_size=CALLS_MIN, max_size=CALLS_KEPT + 50))
@settings(deadline=None)
def test_the_percentile_is_that_of_the_last_calls(took: list[float]) -> None:
    hedging = Hedging()
    for seconds in took:
        hedging.answered(KIND, seconds)
    last = sorted(took[-CALLS_KEPT:])
    late_s = hedging.late_after_s(KIND)
    assert late_s is not None
    assert sum(seconds <= late_s for seconds in last) * 100 >= 95 * len(last)
    assert sum(seconds < late_s for seconds in last) * 100 < 95 * len(last)


def test_a_long_list_is_not_late_by_the_measure_of_short_ones() -> None:
    hedging = Hedging()
    for _ in range(CALLS_MIN):
        hedging.answered(kind_of(LANE, 2_000), 0.05)
    assert hedging.late_after_s(kind_of(LANE, 10)) == 0.05
    assert hedging.late_after_s(kind_of(LANE, 200_000)) is None
    assert hedging.late_after_s(kind_of(Lane("d2"), 10)) is None


@given(st.lists(st.sampled_from(["answered", "late"]), max_size=500))
@settings(deadline=None)
def test_at_most_one_call_in_twenty_is_doubled(events: list[str]) -> None:
    hedging = Hedging()
    calls = hedges = 0
    for event in events:
        if event == "answered":
            hedging.answered(KIND, 0.1)
            calls += 1
        else:
            hedges += hedging.take(KIND)
        assert hedges * 20 <= calls


def test_a_long_peace_saves_up_a_few_hedges_and_no_more() -> None:
    hedging = Hedging()
    for _ in range(10_000):
        hedging.answered(KIND, 0.1)
    assert sum(hedging.take(KIND) for _ in range(100)) == HEDGES_SAVED_MAX
    assert hedging.late_after_s(KIND) is None


def test_the_kind_that_was_quiet_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge_module, "KINDS_MAX", 2)
    hedging = Hedging()
    for name in ["quiet"] * CALLS_MIN + ["busy"] * CALLS_MIN + ["new"]:
        hedging.answered(kind_of(Lane(name), 10), 0.1)
    assert len(hedging) == 2
    assert hedging.late_after_s(kind_of(Lane("quiet"), 10)) is None
    assert hedging.late_after_s(kind_of(Lane("busy"), 10)) == 0.1


@given(
    st.integers(0, 10**9),
    st.one_of(st.none(), st.integers(0, 10**12)),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=20),
)
@settings(deadline=None)
def test_parts_of_a_spare_sum_exactly(tokens: int, cost: int | None, weights: list[int]) -> None:
    parts = split_spare(Spare(tokens, cost, "m", True), weights)
    assert sum(part.prompt_tokens for part in parts if part) == tokens
    costs = [part.cost_nano for part in parts if part]
    assert costs == [None] * len(weights) if cost is None else sum(c or 0 for c in costs) == cost
    assert split_spare(None, weights) == [None] * len(weights)


# --------------------------------------------------------------------------- two copies race


class Upstream:
    """Answers at once while `easy`; afterwards each call waits to be told what comes of it."""

    def __init__(self) -> None:
        self.easy = True
        self.told: list[asyncio.Future[object]] = []
        self.timeouts_s: list[float] = []
        self.stopped: list[int] = []
        self.given: list[Vectors] = []
        self._arrived = asyncio.Condition()

    async def __call__(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        if not self.easy:
            number = len(self.told)
            told = asyncio.get_running_loop().create_future()
            self.told.append(told)
            self.timeouts_s.append(timeout_s)
            async with self._arrived:
                self._arrived.notify_all()
            try:
                outcome = await told
            except asyncio.CancelledError:
                self.stopped.append(number)
                raise
            if isinstance(outcome, Exception):
                raise outcome
            if isinstance(outcome, Vectors):
                self.given.append(outcome)
                return outcome
        return good(len(texts))

    async def calls(self, number: int) -> None:
        async with self._arrived:
            await self._arrived.wait_for(lambda: len(self.told) >= number)

    def tell(self, number: int, outcome: object = "answer") -> None:
        self.told[number].set_result(outcome)


def good(count: int, tokens: int = 10, cost_nano: int | None = 70) -> Vectors:
    return Vectors(np.ones((count, 2), np.float32), tokens, cost_nano, "m")


def bad() -> Vectors:
    return Vectors(np.full((1, 2), np.nan, np.float32), 10, 70, "m")


async def used_to(upstream: Upstream, calls: int = CALLS_MIN, caps: Caps = HEDGED) -> Batcher:
    """A Batcher that knows how fast the upstream is, which from now on does as it is told."""
    batcher = Batcher(lambda: upstream)
    for number in range(calls):
        await embed(batcher, f"warm {number}", caps=caps)
    upstream.easy = False
    return batcher


minted = 0


async def embed(
    batcher: Batcher,
    *texts: str,
    lane: Lane = LANE,
    caps: Caps = HEDGED,
    coalesce: bool = True,
    timeout_s: float = 60.0,
) -> Share:
    global minted
    minted += 1
    order = Order(timeout_s=timeout_s, coalesce=coalesce, caps=caps)
    return await batcher.embed(f"c{minted}", lane, list(texts), order)


def start(batcher: Batcher, *texts: str, coalesce: bool = True) -> asyncio.Task[Share]:
    return asyncio.create_task(embed(batcher, *texts, coalesce=coalesce))


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@pytest.mark.parametrize("coalesce", [True, False])
async def test_a_late_call_is_made_again_and_the_first_answer_wins(coalesce: bool) -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a", coalesce=coalesce)
    await upstream.calls(2)
    upstream.tell(1, good(1, tokens=3, cost_nano=21))
    share = await task
    await settle()
    assert (share.prompt_tokens, share.cost_nano) == (3, 21)
    assert share.spare == Spare(3, 21, "m", estimated=True)
    assert upstream.stopped == [0]
    assert batcher.stats()["hedges"] == batcher.stats()["hedges_won"] == 1
    assert batcher.stats()["texts_queued"] == batcher.stats()["calls_under_way"] == 0


async def test_a_call_that_is_late_but_first_all_the_same_stops_the_other() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(0)
    assert (await task).spare == Spare(10, 70, "m", estimated=True)
    await settle()
    assert upstream.stopped == [1]
    assert batcher.stats()["hedges_won"] == 0


async def test_two_answers_at_once_are_both_known_exactly() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(0, good(1, tokens=4, cost_nano=28))
    upstream.tell(1, good(1, tokens=5, cost_nano=None))
    share = await task
    assert (share.prompt_tokens, share.cost_nano) == (4, 28)
    assert share.spare == Spare(5, None, "m", estimated=False)


async def test_the_second_copy_has_what_is_left_of_the_deadline() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(0)
    await task
    assert 0 < upstream.timeouts_s[1] < upstream.timeouts_s[0] <= 60


@pytest.mark.parametrize("fails", [0, 1])
@pytest.mark.parametrize("outcome", [ConnectionError("reset"), bad()], ids=["error", "nonsense"])
async def test_when_one_copy_fails_the_other_is_waited_for(fails: int, outcome: object) -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(fails, outcome)
    await settle()
    assert not task.done()
    upstream.tell(1 - fails)
    share = await task
    assert share.spare is None
    assert upstream.stopped == []
    nonsense = 10 if isinstance(outcome, Vectors) else 0
    assert batcher.stats().get("unclaimed_tokens", 0) == nonsense


async def test_when_both_copies_fail_the_first_ones_failure_is_the_callers() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(1, RuntimeError("breaker is open"))
    await settle()
    upstream.tell(0, ConnectionError("reset"))
    with pytest.raises(ConnectionError):
        await task
    assert batcher.stats()["failures"] == 1


def costly(tokens: int) -> ConnectionError:
    error = ConnectionError("in vain")
    error.paid = Paid(tokens, 7 * tokens, "m")  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("fails", [0, 1])
async def test_a_copy_that_fails_and_costs_all_the_same_is_spare(fails: int) -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(fails, costly(4))
    await settle()
    upstream.tell(1 - fails)

    assert (await task).spare == Spare(4, 28, "m", estimated=False)


async def test_two_copies_that_fail_and_cost_are_both_somebodys() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(1, costly(4))
    await settle()
    upstream.tell(0, costly(3))
    with pytest.raises(ConnectionError) as caught:
        await task

    assert caught.value.paid == Paid(3, 21, "m")  # type: ignore[attr-defined]
    stats = batcher.stats()
    assert (stats["unclaimed_tokens"], stats["unclaimed_nano"]) == (4, 28)


async def test_a_call_that_fails_in_time_is_not_made_again() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    hedging = batcher._copies._hedging
    for _ in range(CALLS_KEPT):
        hedging.answered(KIND, 60.0)
    task = start(batcher, "a")
    await upstream.calls(1)
    upstream.tell(0, ConnectionError("reset"))
    with pytest.raises(ConnectionError):
        await task
    assert len(upstream.told) == 1
    assert batcher.stats()["provider_calls"] == CALLS_MIN + 1


@pytest.mark.parametrize("lane", [Lane("d2"), Lane("d1", retry=True)])
async def test_an_unknown_lane_and_a_retry_are_not_doubled(lane: Lane) -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = asyncio.create_task(embed(batcher, "a", lane=lane))
    await upstream.calls(1)
    await settle()
    upstream.tell(0)
    assert (await task).spare is None
    assert len(upstream.told) == 1


async def test_without_hedging_nothing_is_doubled_nor_measured() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream, caps=Caps())
    assert len(batcher._copies._hedging) == 0


async def test_one_call_in_twenty_may_be_doubled_and_no_more() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream, calls=2 * CALLS_MIN)
    tasks = [start(batcher, f"late {n}", coalesce=False) for n in range(5)]
    await upstream.calls(7)
    await settle()
    assert len(upstream.told) == 5 + 2
    for number in range(7):
        upstream.tell(number)
    shares = await asyncio.gather(*tasks)
    assert sum(share.spare is not None for share in shares) == 2


async def test_all_who_share_a_doubled_call_share_what_the_copy_has_cost() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    tasks = [start(batcher, text) for text in ("a", "b", "c")]
    await upstream.calls(2)
    upstream.tell(1, good(3, tokens=11, cost_nano=100))
    shares = await asyncio.gather(*tasks)
    assert sum(share.prompt_tokens for share in shares) == 11
    spares = [share.spare for share in shares if share.spare is not None]
    assert [spare.prompt_tokens for spare in spares] == [4, 4, 3]
    assert [spare.cost_nano for spare in spares] == [34, 33, 33]


async def test_the_spare_of_a_caller_who_left_is_unclaimed() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    leaver, stayer = start(batcher, "a"), start(batcher, "b")
    await upstream.calls(2)
    leaver.cancel()
    await settle()
    upstream.tell(0, good(2, tokens=20))
    upstream.tell(1, good(2, tokens=30))
    share = await stayer
    assert share.spare is not None
    told = share.prompt_tokens + share.spare.prompt_tokens
    assert told + batcher.stats()["unclaimed_tokens"] == 50


async def test_a_caller_who_leaves_stops_both_copies_of_a_call_of_its_own() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a", coalesce=False)
    await upstream.calls(2)
    task.cancel()
    await settle()
    assert sorted(upstream.stopped) == [0, 1]
    assert batcher.stats()["texts_queued"] == batcher.stats()["calls_under_way"] == 0


async def test_closing_stops_both_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.batcher.owner.CLOSE_WAIT_S", 0.0)
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    await batcher.close()
    assert sorted(upstream.stopped) == [0, 1]
    with pytest.raises(TimeoutError):
        await task


async def test_a_list_over_the_caps_has_the_sum_of_its_spares() -> None:
    upstream = Upstream()
    caps = Caps(items_max=1, hedge=True)
    batcher = await used_to(upstream, calls=2 * CALLS_MIN, caps=caps)
    task = asyncio.create_task(embed(batcher, "a", "b", caps=caps))
    await upstream.calls(4)
    for number in range(4):
        upstream.tell(number)
    share = await task
    assert (share.calls, share.prompt_tokens) == (2, 20)
    assert share.spare == Spare(20, 140, "m", estimated=False)


async def test_nonsense_of_both_copies_is_unclaimed_twice() -> None:
    upstream = Upstream()
    batcher = await used_to(upstream)
    task = start(batcher, "a")
    await upstream.calls(2)
    upstream.tell(0, bad())
    upstream.tell(1, bad())
    with pytest.raises(BadVectors):
        await task
    assert batcher.stats()["unclaimed_tokens"] == 20


@given(seed=st.integers(0, 2**32), callers=st.integers(1, 6))
@settings(max_examples=30, deadline=None)
def test_whoever_wins_fails_or_leaves_every_token_is_somebodys(seed: int, callers: int) -> None:
    async def session() -> None:
        dice = random.Random(seed)
        upstream = Upstream()
        batcher = await used_to(upstream)
        coalesce = dice.random() < 0.7
        tasks = [start(batcher, f"t{n}", coalesce=coalesce) for n in range(callers)]
        await upstream.calls(1 if coalesce else callers)
        while not all(task.done() for task in tasks):
            if dice.random() < 0.2:
                dice.choice(tasks).cancel()
            for _ in range(dice.randrange(3)):
                waiting = [told for told in upstream.told if not told.done()]
                if waiting:
                    bad_luck = dice.random() < 0.3
                    tokens = dice.randrange(100)
                    size = 1 if not coalesce else callers
                    outcome = ConnectionError() if bad_luck else good(size, tokens, 7 * tokens)
                    dice.choice(waiting).set_result(outcome)
            await asyncio.sleep(0)
        await batcher.close()
        told = sum(answer.prompt_tokens for answer in upstream.given)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        shares = [answer for answer in answers if isinstance(answer, Share)]
        spares = [share.spare for share in shares if share.spare and not share.spare.estimated]
        found = sum(share.prompt_tokens for share in shares)
        found += sum(spare.prompt_tokens for spare in spares)
        assert found + batcher.stats().get("unclaimed_tokens", 0) == told

    asyncio.run(session())


# ---------------------------------------------------------------------- those who come again


class Failing:
    """Fails the first `failures` calls, and writes down which were retries."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.log: list[tuple[bool, int]] = []

    async def __call__(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        self.log.append((lane.retry, len(texts)))
        if len(self.log) <= self.failures:
            raise ConnectionError("reset")
        return good(len(texts))


async def test_callers_who_failed_together_are_told_one_beat_and_come_back_in_one_call() -> None:
    time = FakeTime()
    upstream = Failing(1)
    batcher = Batcher(lambda: upstream, time, pause=time.sleep, rng=random.Random(7))
    callers = [embed(batcher, f"t{n}", caps=Caps()) for n in range(32)]
    errors = await asyncio.gather(*callers, return_exceptions=True)
    assert {error.beat for error in errors} == {random.Random(7).random()}  # type: ignore[union-attr]
    again = []
    for number in range(32):  # one after the other, as messages from several processes
        lane = Lane("d1", retry=True)
        again.append(asyncio.create_task(embed(batcher, f"t{number}", lane=lane, caps=Caps())))
        await settle()
    assert upstream.log == [(False, 32)]
    await time.advance(0.021)
    assert len(await asyncio.gather(*again)) == 32
    assert upstream.log == [(False, 32), (True, 32)]


async def test_who_failed_alone_has_no_beat_to_keep() -> None:
    batcher = Batcher(lambda: Failing(1))
    with pytest.raises(ConnectionError) as caught:
        await embed(batcher, "a", caps=Caps())
    assert not hasattr(caught.value, "beat")


async def test_first_tries_and_retries_do_not_travel_together() -> None:
    time = FakeTime()
    upstream = Failing(0)
    batcher = Batcher(lambda: upstream, time, pause=time.sleep)
    lanes = (Lane("d1"), Lane("d1", retry=True))
    both = [asyncio.create_task(embed(batcher, "a", lane=lane, caps=Caps())) for lane in lanes]
    await time.advance(1.0)
    await asyncio.gather(*both)
    assert sorted(upstream.log) == [(False, 1), (True, 1)]
