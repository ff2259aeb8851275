"""What tenants think of answers: whose they are, once, for good, and what deployments are rated."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger.desk import LedgerDesk
from actors.ledger.owner import Ledger
from actors.ledger.policy import (
    DAY_MS,
    FEEDBACK_PER_RESPONSE_MAX,
    RATING_DAYS_MAX,
    RATING_HALF_LIFE_DAYS,
    Feedback,
    Rating,
    Recorded,
    rating_of,
)
from actors.ref import InlineRef, OwnerUnavailable
from tests.unit.test_ledger_owner import NOW_MS, Keep, entry, fresh, keep, with_ledger

__all__ = ["fresh", "keep"]


def feedback(number: int, response_id: str = "a1", **fields: Any) -> Feedback:
    told = {
        "id": f"f{number}",
        "tenant": "acme",
        "response_id": response_id,
        "type": "rating",
        "score": 1000,
        "content": "5",
        "query": "",
        "response": "",
        "at_ms": NOW_MS,
    }
    return Feedback(**{**told, **fields})


def answered(number: int, **fields: Any) -> Any:
    return entry(number, response_id=f"a{number}", cache_key=f"{number:02}", **fields)


async def test_feedback_is_about_a_tenants_own_answer(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [answered(1), answered(2, tenant="zenith")])
        told = await ledger.record(feedback(1))
        assert told == Recorded("f1", "small", "d1", "01", new=True)
        assert await ledger.record(feedback(2, "a2")) is None
        assert await ledger.record(feedback(3, "a9")) is None
        assert await ledger.feedback("zenith") == []
        assert await ledger.feedback("acme") == [("small", "d1", "rating", 1, 1, 1000)]

    await with_ledger(work, keep)
    assert await with_ledger(lambda ledger: ledger.feedback(), keep) == [
        ("small", "d1", "rating", 1, 1, 1000)
    ]


async def test_it_is_recorded_once_however_often_it_is_sent(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [answered(1), answered(2, tenant="zenith")])
        first = await ledger.record(feedback(1))
        assert first is not None
        again = await ledger.record(feedback(1, score=0))
        assert again == first._replace(new=False)
        # Another tenant learns nothing of it.
        assert await ledger.record(feedback(1, "a2", tenant="zenith")) is None
        assert await ledger.feedback() == [("small", "d1", "rating", 1, 1, 1000)]
        assert await ledger.ratings(NOW_MS) == {"d1": Rating(1.0, 0.0)}

    await with_ledger(work, keep)


async def test_an_answer_goes_by_its_own_id_or_by_its_requests(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        failed = answered(3, request_id="r1", attempt=1, status="voided", error="no")
        hit = entry(4, status="hit", deployment="", response_id="a1", request_id="r4")
        await ledger.append("h", 1, [failed, answered(1, attempt=2, deployment="d7"), hit])
        for number, name in enumerate(("a1", "r1", "r4")):
            told = await ledger.record(feedback(number, name))
            assert told is not None
            assert told.deployment == ("" if name == "r4" else "d7")
        assert await ledger.record(feedback(9, "a3")) is None  # which nobody was served with

    await with_ledger(work, keep)


async def test_an_answer_that_nobody_names_is_rated_for_nobody(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(1)])  # one without an id
        told = await ledger.record(feedback(1, "", query="why?", response="so"))
        assert told == Recorded("f1", "", "", "", new=True)
        assert await ledger.feedback("acme") == [("", "", "rating", 1, 1, 1000)]
        assert await ledger.ratings(NOW_MS) == {}

    await with_ledger(work, keep)


async def test_only_the_latest_score_of_an_answer_counts_for_its_deployment(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [answered(1), answered(2, deployment="d2")])
        for number in range(5):
            await ledger.record(feedback(number, score=0, at_ms=NOW_MS - DAY_MS))
        await ledger.record(feedback(6, "a2", score=250))
        await ledger.record(feedback(7, score=1000))
        await ledger.record(feedback(8, type="improvement", score=None))
        assert await ledger.ratings(NOW_MS) == {"d1": (1.0, 0.0), "d2": (0.25, 0.75)}
        # Deletes nothing: all of it is in the sums.
        assert sum(row[3] for row in await ledger.feedback()) == 8

    await with_ledger(work, keep)


async def test_ratings_are_told_anew_when_there_is_more_or_a_day_has_passed(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [answered(1), answered(2)])
        assert await ledger.ratings(NOW_MS) == {}
        await ledger.record(feedback(1))
        assert await ledger.ratings(NOW_MS) == {"d1": (1.0, 0.0)}
        later = NOW_MS + RATING_HALF_LIFE_DAYS * DAY_MS
        assert await ledger.ratings(later) == {"d1": (0.5, 0.0)}
        assert await ledger.ratings(NOW_MS + RATING_DAYS_MAX * DAY_MS) == {}

    await with_ledger(work, keep)


async def test_a_tenant_can_say_only_so_much_about_one_answer(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [answered(1), answered(2)])
        for number in range(FEEDBACK_PER_RESPONSE_MAX):
            await ledger.record(feedback(number))
        with pytest.raises(ValueError, match="which is the most"):
            await ledger.record(feedback(1000))
        assert (await ledger.record(feedback(0))) is not None  # known before
        assert (await ledger.record(feedback(1001, "a2"))) is not None
        assert ledger.stats()["failures"] == 0

    await with_ledger(work, keep)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 3),
            st.sampled_from(["acme", "zenith"]),
            st.sampled_from([None, 0, 250, 1000]),
            st.integers(0, 3),
        ),
        max_size=25,
    )
)
@settings(max_examples=40, deadline=None)
def test_sums_and_ratings_are_the_fold_of_the_feedback(some: list[Any]) -> None:
    async def work(ledger: Ledger) -> None:
        made = [
            entry(10 * n + t, response_id=f"a{n}", tenant=tenant, deployment=f"d{n % 2}")
            for n in (1, 2, 3)
            for t, tenant in enumerate(("acme", "zenith"))
        ]
        await ledger.append("h", 1, made)
        latest: dict[Any, Any] = {}
        for number, (n, tenant, score, day) in enumerate(some):
            at_ms = NOW_MS + day * DAY_MS
            await ledger.record(feedback(number, f"a{n}", tenant=tenant, score=score, at_ms=at_ms))
            if score is not None:
                latest[n, tenant] = (at_ms // DAY_MS, score, 1)
        today = NOW_MS // DAY_MS + 3
        told = await ledger.ratings(today * DAY_MS)
        for name in ("d0", "d1"):
            days = [day for (n, _), day in latest.items() if f"d{n % 2}" == name]
            assert told.get(name, Rating(0, 0)) == pytest.approx(rating_of(days, today))
        for tenant in ("acme", "zenith"):
            rows = await ledger.feedback(tenant)
            own = [score for _, name, score, _ in some if name == tenant]
            assert sum(row[3] for row in rows) == len(own)
            assert sum(row[4] for row in rows) == sum(score is not None for score in own)
            assert sum(row[5] for row in rows) == sum(score or 0 for score in own)

    asyncio.run(with_ledger(work))


async def test_a_desk_asks_again_for_what_another_process_has_just_answered() -> None:
    ledger = Ledger()
    pauses: list[float] = []

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await ledger.append("other", 1, [answered(1)])

    desk = LedgerDesk(InlineRef("ledger", ledger), "h", pause=pause)
    told = await desk.feedback(feedback(1))

    assert told is not None
    assert told.new
    assert len(pauses) == 1
    assert await desk.feedback_sums("acme") == [("small", "d1", "rating", 1, 1, 1000)]
    assert (await desk.ratings()).keys() <= {"d1"}
    await ledger.close()


async def test_a_store_that_fails_takes_no_feedback() -> None:
    ledger = Ledger("/proc/nowhere/ledger.db")
    desk = LedgerDesk(InlineRef("ledger", ledger), "h")
    for asked in (desk.feedback(feedback(1)), desk.feedback_sums(), desk.ratings()):
        with pytest.raises(OwnerUnavailable):
            await asked
    await ledger.close()
