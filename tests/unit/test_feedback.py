"""The feedback loop: from an answer to its rating, and from there to routing and cache."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

from actors.ledger.desk import LedgerDesk
from actors.ledger.owner import Ledger
from actors.ledger.policy import Rating
from actors.ref import InlineRef, OwnerUnavailable
from deployments.gateway import PipelineService
from forebay.call import Call
from forebay.errors import InvalidRequest, Overloaded
from forebay.feedback import (
    CONTENT_CHARS_MAX,
    INSIGHT_RATED_MIN,
    RATINGS_EVERY_S,
    FeedbackLoop,
    FeedbackType,
    insights,
    score_of,
)
from forebay.schemas import GenerateResponse
from forebay.strategies import Router
from forebay.validation import Evaluation
from tests.support.fake_time import settle
from tests.support.house import House, open_house
from tests.unit.test_ledger_owner import entry

Open = Callable[..., Awaitable[House]]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Open]:
    houses: list[House] = []

    async def build(**how: Any) -> House:
        houses.append(await open_house(tmp_path, **how))
        return houses[-1]

    yield build
    for one in houses:
        await one.system.close()


@pytest.mark.parametrize(
    ("content", "score"),
    [
        *((1, 0), (2, 250), (3.0, 500), (5, 1000), ("4", 750), (True, 1000), (False, 0)),
        *(("up", 1000), (" Down", 0), ("no", 0)),
    ],
)
def test_a_rating_is_a_score(content: Any, score: int) -> None:
    assert score_of(FeedbackType.RATING, content) == score


@pytest.mark.parametrize("content", [0, 6, -1, "great", None, float("nan"), [5], {}])
def test_what_is_no_rating_is_refused(content: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        score_of(FeedbackType.RATING, content)

    assert caught.value.param == "rating"


def test_other_types_have_a_score_of_their_own_or_none() -> None:
    assert score_of(FeedbackType.CORRECTION, "it is 7") == 0
    assert score_of(FeedbackType.ERROR, None) == 0
    assert score_of(FeedbackType.IMPROVEMENT, "shorter") is None
    assert score_of(FeedbackType.USEFUL, "it helped me") == 1000
    assert score_of(FeedbackType.USEFUL, False) == 0
    assert score_of(FeedbackType.USEFUL, 2) == 250
    with pytest.raises(InvalidRequest):
        score_of(FeedbackType.USEFUL, 0)


async def test_stars_are_stars_whatever_they_are_sent_as(house: Open) -> None:
    here = await house()
    told = await here.system.feedback.record("useful", "hm", tenant="acme", rating=1)

    assert told is not None
    assert told["score"] == 0.0
    with pytest.raises(InvalidRequest, match="a rating is"):
        await here.system.feedback.record("useful", tenant="acme", rating="blah")


async def answered(here: House, text: str = "hello", model: str = "m") -> Call:
    call = here.call(text, model)
    await here.pipeline.answer(call)
    return call


async def test_an_answer_is_rated_by_the_id_that_its_caller_sees(house: Open) -> None:
    here = await house()
    call = await answered(here)
    (row,) = await here.entries(call)
    told = await here.system.feedback.record("rating", 4, tenant="acme", response_id="1")

    assert row.response_id == "1"
    assert told is not None
    assert (told["score"], told["model"], told["duplicate"]) == (0.75, "m", False)
    assert told["deployment"] == here.deployment("openai/a").id
    by_request = await here.system.feedback.record(
        "useful", tenant="acme", response_id=call.request_id
    )
    assert by_request is not None
    stats = await here.system.feedback.statistics("acme")
    assert (stats["total"], stats["rated"], stats["mean_score"]) == (2, 2, 0.875)
    assert stats["by_type"]["useful"] == 1
    assert stats["by_model"]["m"]["total"] == 2
    assert "ratings" not in stats  # those are of all tenants


async def test_nobody_rates_another_tenants_answer(house: Open) -> None:
    here = await house()
    waits: list[float] = []

    async def pause(seconds: float) -> None:
        waits.append(seconds)

    await answered(here)
    here.system._ledger._pause = pause
    with pytest.raises(InvalidRequest) as caught:
        await here.system.feedback.record("rating", 1, tenant="zenith", response_id="1")

    assert len(waits) == 1

    assert (caught.value.status, caught.value.code) == (404, "response_not_found")
    assert (await here.system.feedback.statistics())["total"] == 0


async def test_with_an_id_of_ones_own_it_is_recorded_once_and_ids_are_each_tenants(
    house: Open,
) -> None:
    here = await house()
    await answered(here)
    loop = here.system.feedback
    for _ in range(2):
        await loop.record("rating", 1, tenant="acme", response_id="1", feedback_id="f")
    await loop.record("rating", 5, tenant="zenith", feedback_id="f")

    assert (await loop.statistics("acme"))["total"] == 1
    assert (await loop.statistics("zenith"))["mean_score"] == 1.0
    assert loop.stats()["known"] == 1


async def test_a_streams_answer_and_a_hit_can_be_rated(house: Open) -> None:
    here = await house(enable_caching=True)
    for _ in range(2):
        await answered(here)
    hit = await here.system.feedback.record("rating", 5, tenant="acme", response_id="req_2")
    call = here.call("stream it")
    call.body["stream"] = True
    async for _ in (await here.pipeline.stream(call)).chunks:
        pass
    streamed = await here.system.feedback.record(
        "rating", 5, tenant="acme", response_id=call.request_id
    )

    assert hit is not None
    assert streamed is not None
    assert streamed["deployment"] == here.deployment("openai/a").id


async def test_a_correction_has_the_answer_forgotten(house: Open) -> None:
    here = await house(enable_caching=True)
    forgotten: list[bytes] = []

    async def forget(key: bytes) -> None:
        forgotten.append(key)

    here.system.feedback.forget = forget
    call = await answered(here)
    for number, kind in enumerate(("rating", "improvement", "correction", "correction")):
        content = 1 if kind == "rating" else "it is 7"
        await here.system.feedback.record(
            kind, content, tenant="acme", response_id="1", feedback_id=f"f{min(number, 2)}"
        )
    (row,) = await here.entries(call)

    assert forgotten == [bytes.fromhex(row.cache_key)]
    assert here.system.feedback.stats()["forgotten"] == 1


async def test_who_was_given_a_stored_answer_can_have_it_forgotten(house: Open) -> None:
    here = await house(enable_caching=True)
    for _ in range(2):
        await answered(here)
    at_once = here.call()
    assert here.pipeline.at_once(at_once) is not None
    loop = here.system.feedback
    await loop.record("correction", "no", tenant="acme", response_id=at_once.request_id)

    assert loop.stats()["forgotten"] == 1
    assert (await here.pipeline.answer(here.call())).facts.cache == "miss"


async def test_without_a_cache_there_is_nothing_to_forget(house: Open) -> None:
    here = await house()
    (row,) = await here.entries(await answered(here))

    assert row.cache_key == ""


async def test_a_cache_that_cannot_forget_does_not_lose_the_feedback(house: Open) -> None:
    here = await house(enable_caching=True)

    async def forget(key: bytes) -> None:
        raise OwnerUnavailable("cache", "it died")

    here.system.feedback.forget = forget
    await answered(here)
    told = await here.system.feedback.record("correction", "no", tenant="acme", response_id="1")

    assert told is not None
    assert here.system.feedback.stats()["failures"] == 1


async def test_a_response_object_names_its_answer(house: Open) -> None:
    here = await house()
    await answered(here)
    response = GenerateResponse.of(
        {"id": "1", "model": "m", "choices": [{"message": {"content": "fine"}}]}
    )
    loop = here.system.feedback
    told = await loop.record("useful", True, tenant="acme", response=response)
    named = await loop.record("useful", True, tenant="acme", response=response, response_id="req_1")

    assert told is not None
    assert named is not None
    assert (told["response_id"], named["response_id"]) == ("1", "req_1")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"feedback_type": "praise"}, "type"),
        ({"content": "x" * (CONTENT_CHARS_MAX + 1)}, "content"),
        ({"content": object()}, "content"),
        ({"response_id": "x" * 1000}, "response_id"),
        ({"feedback_id": ""}, "id"),
        ({"query": 5}, "query"),
    ],
)
async def test_what_is_wrong_is_named(house: Open, fields: dict[str, Any], param: str) -> None:
    here = await house()
    given = {"feedback_type": "improvement", "content": "x", "tenant": "acme", **fields}
    with pytest.raises(InvalidRequest) as caught:
        await here.system.feedback.record(**given)

    assert caught.value.param == param


async def test_where_it_is_off_nothing_is_kept(house: Open) -> None:
    here = await house(enable_feedback_loop=False)
    service = PipelineService(here.system, b"s" * 32, "127.0.0.1")
    assert await here.system.feedback.record("useful", tenant="acme") is None
    with pytest.raises(InvalidRequest) as caught:
        await service.record_feedback(
            "acme", kind="useful", content=None, rating=None, response_id="1", feedback_id=None
        )

    assert caught.value.status == 409


async def test_feedback_is_told_as_an_evaluation(house: Open) -> None:
    here = await house()
    heard: list[Evaluation] = []
    await answered(here)
    here.system.tell_evaluations(heard.append)
    await here.system.feedback.record("rating", 5, tenant="acme", response_id="1")
    await here.system.feedback.record("improvement", "x", tenant="acme", response_id="1")

    assert [(e.name, e.label, e.score, e.model) for e in heard] == [
        ("feedback.rating", "pass", 1.0, "m"),
        ("feedback.improvement", "none", None, "m"),
    ]


class _Away:
    name = "ledger"

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        raise OwnerUnavailable(self.name, "it died")


async def test_with_the_ledger_away_feedback_is_refused_and_ratings_stay() -> None:
    loop = FeedbackLoop(LedgerDesk(_Away(), "h"))  # type: ignore[arg-type]
    loop.ratings = {"a": Rating(1, 0)}
    with pytest.raises(Overloaded):
        await loop.record("useful", tenant="acme")
    with pytest.raises(Overloaded):
        await loop.statistics()

    assert loop.stats()["ratings"]["a"]["good"] == 1


def test_insights_say_what_stands_out() -> None:
    enough = INSIGHT_RATED_MIN
    rows = [
        ("m", "a", "rating", enough, enough, enough * 900),
        ("m", "b", "rating", enough, enough, enough * 300),
        ("n", "c", "rating", 1, 1, 0),
        ("m", "b", "correction", 20, 20, 0),
    ]

    assert insights(rows[:1]) == []
    assert insights(rows) == [
        "b of m is rated 0.06 of 1 over 25 ratings",
        "for m, a (0.90) is rated above b (0.06)",
        "20 of 31 say that an answer was wrong",
    ]


# --- routing ------------------------------------------------------------------------------------


def chosen(router: Router, here: House, times: int) -> Counter[str]:
    group, standing = here.system.table.group("two"), here.system.breaker.standing
    return Counter(router.order(group, standing)[0].model for _ in range(times))


async def test_after_200_ratings_the_better_deployment_gets_most_calls(house: Open) -> None:
    here = await house(routing="feedback")
    rng = Random(7)
    good = {"openai/a": 0.9, "openai/b": 0.1}
    before = chosen(here.system.router, here, 500)
    for number in range(200):
        call = await answered(here, f"question {number}", "two")
        (row,) = await here.entries(call)
        model = here.system.table.deployment(row.deployment).model
        liked = rng.random() < good[model]
        await here.system.feedback.record(
            "rating", liked, tenant="acme", response_id=call.request_id
        )
    after = Counter[str]()
    for number in range(500):
        here.provider.asked.clear()
        await answered(here, f"another {number}", "two")
        after[here.provider.asked[0]] += 1
    service = PipelineService(here.system, b"s" * 32, "127.0.0.1")
    told = await service.feedback_stats(None)

    assert 200 <= before["openai/a"] <= 300
    assert after["openai/a"] >= 0.7 * 500
    best = here.deployment("openai/a", "two").id
    assert told["routing"] == "feedback"
    assert told["ratings"][best]["mean"] > 0.8
    assert told["by_deployment"][best]["rated"] > 100


async def test_feedback_outlives_a_restart(tmp_path: Path) -> None:
    how = {"ledger_url": f"sqlite:///{tmp_path}/ledger.db", "routing": "feedback"}
    here = await open_house(tmp_path, **how)
    await answered(here)
    loop = here.system.feedback
    await loop.record("rating", 2, tenant="acme", response_id="1", feedback_id="f")
    await loop.record("improvement", "shorter", tenant="acme", response_id="1")
    before = await loop.statistics()
    await here.system.close()
    again = await open_house(tmp_path, **how)
    loop = again.system.feedback
    told = await loop.record("rating", 2, tenant="acme", response_id="1", feedback_id="f")
    after = await loop.statistics()
    await again.system.close()

    assert told is not None
    assert told["duplicate"]
    assert (before["total"], before["mean_score"]) == (2, 0.25)
    assert list(before["ratings"]) == [again.deployment("openai/a").id]
    assert after == before


async def test_other_processes_learn_of_ratings_from_the_ledger(house: Open) -> None:
    here = await house(routing="feedback")
    ledger = Ledger()
    rows = []
    for name in ("openai/a", "openai/b"):
        told = here.deployment(name, "two").id
        rows += [
            entry(len(rows) + n, deployment=told, response_id=f"{name}{n}", tenant="acme")
            for n in range(100)
        ]
    await ledger.append("h", 1, rows)
    one = FeedbackLoop(LedgerDesk(InlineRef("ledger", ledger), "one"))
    for name, likes in (("openai/a", 10), ("openai/b", 90)):
        for n in range(100):
            await one.record("rating", n < likes, tenant="acme", response_id=f"{name}{n}")
    gates: list[tuple[float, asyncio.Event]] = []

    async def pause(seconds: float) -> None:
        gates.append((seconds, asyncio.Event()))
        await gates[-1][1].wait()

    router = Router(Random(3), lambda: 0.0, lambda deployment: None)
    router.learn_table(here.system.table)

    def take(ratings: Any) -> None:
        router.ratings = ratings

    other = FeedbackLoop(LedgerDesk(InlineRef("ledger", ledger), "other"), told=take, pause=pause)
    other.configure(enabled=True, follows=True)
    await other.start()
    while not gates:
        await asyncio.sleep(0)
    assert chosen(router, here, 500)["openai/b"] >= 0.7 * 500
    # What is rated from now on is known after the next pause.
    for n in range(100):
        await one.record("rating", False, tenant="acme", response_id=f"openai/b{n}")
        await one.record("rating", True, tenant="acme", response_id=f"openai/a{n}")
    assert chosen(router, here, 500)["openai/b"] >= 0.7 * 500
    gates[0][1].set()
    while len(gates) < 2:
        await asyncio.sleep(0)
    assert chosen(router, here, 500)["openai/a"] >= 0.7 * 500
    assert gates[0][0] == RATINGS_EVERY_S
    await other.close()
    await ledger.close()


async def test_ratings_are_fetched_only_while_routing_goes_by_them() -> None:
    ledger = Ledger()
    ref = InlineRef("ledger", ledger)
    loop = FeedbackLoop(LedgerDesk(ref, "h"))
    await loop.start()
    await settle()
    assert ref.sent["ratings"] == 0
    loop.configure(enabled=True, follows=True)
    while not ref.sent["ratings"]:
        await asyncio.sleep(0)
    loop.configure(enabled=True, follows=False)
    assert loop._task is None
    await loop.close()
    await ledger.close()
