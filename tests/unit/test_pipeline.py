"""A request's nine steps, over a whole system of real owners and a provider that does as told."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.batcher import callers as batcher_callers
from actors.batcher.policy import Lane, Paid
from actors.circuit_breaker.policy import State
from actors.rate_limiter.terms import Refusal
from forebay.call import Call
from forebay.errors import (
    BudgetExceeded,
    CircuitBreakerOpenError,
    DeploymentsBusy,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PermissionDenied,
    ProviderConnectionError,
    ProviderError,
    QueueTimeout,
    RateLimitError,
    RequestTooLarge,
    ResponseValidationError,
)
from forebay.providers.base import NO_BASE64, STALLED
from forebay.stalls import StallWatch
from tests.support.fake_time import settle
from tests.support.house import House

Open = Callable[..., Awaitable[House]]


LIMITS = {
    "requests_per_minute": 60,
    "requests_per_hour": 1000,
    "burst_size": 5,
    "concurrent_requests": 1,
}


async def test_an_answer_leaves_one_posted_entry_and_nothing_held(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    call = here.call()
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert result.answer.body["choices"][0]["message"]["content"] == "fine"
    assert (entry.status, entry.prompt_tokens, entry.cost_nano) == ("posted", 3, 7)
    assert here.at_rest


async def test_the_check_comes_first_and_counts_nothing(house: Open) -> None:
    here = await house(rate_limit_config={**LIMITS, "burst_size": 1})
    for _ in range(3):
        with pytest.raises(ModelNotFound):
            await here.pipeline.answer(here.call(model="nobody"))

    await here.pipeline.answer(here.call())
    with pytest.raises(RateLimitError):
        await here.pipeline.answer(here.call("more"))


async def test_a_hit_costs_nothing_and_asks_nobody(house: Open) -> None:
    here = await house(enable_caching=True)
    await here.pipeline.answer(here.call())
    again = here.call()
    result = await here.pipeline.answer(again)

    (entry,) = await here.entries(again)
    assert here.provider.asked == ["openai/a"]
    assert (result.facts.cache, result.facts.cost_nano) == ("hit", 0)
    assert (entry.status, entry.cost_nano) == ("hit", 0)


async def test_every_attempt_has_an_entry(house: Open) -> None:
    here = await house(max_retries=1)
    down = ProviderError("down", upstream_status=500)
    here.provider.steps["openai/a"] = [down]
    here.provider.steps["openai/b"] = [down]
    call = here.call(model="two")
    with pytest.raises(ProviderError, match="down"):
        await here.pipeline.answer(call)

    entries = await here.entries(call)
    assert [(e.attempt, e.status) for e in entries] == [(1, "voided"), (2, "voided")]
    assert sorted(here.provider.asked) == ["openai/a", "openai/b"]


async def test_a_throttled_group_is_left_for_its_fallback_when_the_wait_is_too_long(
    house: Open,
) -> None:
    here = await house(fallbacks=[{"m": ["spare"]}], enable_circuit_breaker=False)
    slow = RateLimitError("slow down", retry_after_s=3600.0, upstream_status=429)
    here.provider.steps["openai/a"] = [slow]
    result = await here.pipeline.answer(here.call())

    assert here.provider.asked == ["openai/a", "openai/c"]
    assert result.facts.fallbacks == 1


async def test_without_a_fallback_the_throttles_own_error_is_what_callers_get(house: Open) -> None:
    here = await house()
    slow = RateLimitError("slow down", retry_after_s=3600.0, upstream_status=429)
    here.provider.steps["openai/a"] = [slow]
    with pytest.raises(RateLimitError) as caught:
        await here.pipeline.answer(here.call())

    assert caught.value.retry_after_s == 3600.0


@pytest.mark.parametrize("caching", [True, False])
async def test_cancelling_gives_everything_back(house: Open, caching: bool) -> None:
    here = await house(rate_limit_config=LIMITS, enable_caching=caching)
    here.provider.steps["openai/a"] = [asyncio.Event()]
    call = here.call()
    task = asyncio.create_task(here.pipeline.answer(call))
    while not here.provider.asked:
        await settle()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    (entry,) = await here.entries(call)
    assert (entry.status, entry.http_status) == ("unsettled", 499)
    assert here.at_rest
    await here.pipeline.answer(here.call())  # the only slot is free


async def test_a_refusal_for_want_of_a_slot_gives_the_count_back(house: Open) -> None:
    here = await house(rate_limit_config={**LIMITS, "burst_size": 2})
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    first = asyncio.create_task(here.pipeline.answer(here.call("first")))
    while not here.provider.asked:
        await settle()
    for n in range(3):
        with pytest.raises(RateLimitError, match="concurrent"):
            await here.pipeline.answer(here.call(f"second {n}"))
    gate.set()
    await first

    await here.pipeline.answer(here.call("third"))


async def test_followers_of_a_failed_leader_get_its_error(house: Open) -> None:
    here = await house(max_retries=0)
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [(gate, ProviderError("down for all"))]
    tasks = [asyncio.create_task(here.pipeline.answer(here.call())) for _ in range(3)]
    while not here.provider.asked:
        await settle()
    await settle()
    gate.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    assert [str(result) for result in results] == ["down for all"] * 3
    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


async def test_a_leaders_own_deadline_is_not_its_followers(house: Open) -> None:
    here = await house()
    here.provider.steps["openai/a"] = [asyncio.Event()]  # the first call hangs
    hurried = asyncio.create_task(here.pipeline.answer(here.call(timeout_s=0.05)))
    while not here.provider.asked:
        await settle()
    patient = asyncio.create_task(here.pipeline.answer(here.call()))

    with pytest.raises(GatewayTimeout):
        await hurried
    assert (await patient).answer.body["choices"]
    assert len(here.provider.asked) == 2


async def test_an_own_deadline_is_not_retried_and_blames_nobody(house: Open) -> None:
    here = await house(max_retries=5, circuit_breaker_config={"failure_threshold": 1})
    here.provider.steps["openai/a"] = [asyncio.Event()]
    call = here.call(timeout_s=0.05)
    with pytest.raises(GatewayTimeout):
        await here.pipeline.answer(call)

    assert here.provider.asked == ["openai/a"]
    await here.pipeline.answer(here.call())


async def test_a_stream_fails_over_before_its_first_chunk(house: Open) -> None:
    here = await house(fallbacks=[{"m": ["spare"]}], max_retries=0)
    here.provider.steps["openai/a"] = [ProviderError("down", upstream_status=500)]
    call = here.call()
    stream = await here.pipeline.stream(call)
    deltas = [c["choices"][0]["delta"] async for c in stream.chunks if c["choices"]]

    assert deltas == [{"content": "one"}, {"content": "two"}, {}]
    assert here.provider.asked == ["openai/a", "openai/c"]
    assert [e.status for e in await here.entries(call)] == ["voided", "posted"]
    assert here.at_rest


async def test_a_stream_never_fails_over_after_its_first_chunk(house: Open) -> None:
    here = await house(fallbacks=[{"m": ["spare"]}])
    here.provider.cut = ProviderError("cut", upstream_status=502)
    call = here.call()
    stream = await here.pipeline.stream(call)
    assert (await anext(stream.chunks))["choices"]
    with pytest.raises(ProviderError, match="cut"):
        await anext(stream.chunks)

    (entry,) = await here.entries(call)
    assert here.provider.asked == ["openai/a"]
    assert (entry.status, entry.error) == ("posted", "ProviderError: cut")
    assert here.at_rest


@pytest.mark.parametrize("taken", [0, 1])
async def test_closing_a_stream_settles_it_however_little_was_taken(
    house: Open, taken: int
) -> None:
    here = await house(rate_limit_config=LIMITS)
    call = here.call()
    stream = await here.pipeline.stream(call)
    for _ in range(taken):
        await anext(stream.chunks)
    await stream.chunks.aclose()
    await stream.chunks.aclose()

    assert here.at_rest
    assert [e.status for e in await here.entries(call)] == ["posted"]


async def test_a_cut_stream_is_paid_whatever_text_it_was_asked(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    call = here.call("half a pair: \ud83d")  # as Python reads bytes that are no UTF-8
    stream = await here.pipeline.stream(call)
    await stream.chunks.aclose()

    assert here.at_rest
    assert [(e.status, e.estimated) for e in await here.entries(call)] == [("posted", True)]


async def test_a_stream_that_nobody_ever_takes_settles_when_it_is_dropped(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    stream = await here.pipeline.stream(here.call())
    del stream
    await settle()

    assert here.at_rest


async def test_a_stream_that_nobody_takes_settles_at_its_deadline(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    await here.pipeline.answer(here.call("first"))  # the ledger is open, the limiter has asked it
    call = here.call(timeout_s=1.0)
    stream = await here.pipeline.stream(call)
    await anext(stream.chunks)
    async with asyncio.timeout(10.0):
        while here.system.limiter.stats()["slots_used"]:
            await asyncio.sleep(0.01)

    (entry,) = await here.entries(call)
    assert (entry.status, entry.http_status) == ("posted", 504)
    with pytest.raises(GatewayTimeout, match="not taken"):
        await anext(stream.chunks)
    assert len(await here.entries(call)) == 1
    assert here.outcomes() == {"success": 1, "ignored": 1}
    assert here.at_rest


async def test_a_streams_probe_is_judged_at_its_first_chunk(house: Open) -> None:
    here = await house(
        circuit_breaker_config={"failure_threshold": 1, "success_threshold": 2, "timeout": 0.01},
        max_retries=0,
    )
    here.provider.steps["openai/a"] = [ProviderConnectionError("refused")]
    with pytest.raises(ProviderConnectionError):
        await here.pipeline.answer(here.call())
    await here.state("openai/a")
    streams = []
    async with asyncio.timeout(5.0):
        while len(streams) < 2:  # until it has cooled
            try:
                call = here.call(f"stream {len(streams)}")
                streams.append(await here.pipeline.stream(call))
            except CircuitBreakerOpenError:
                await asyncio.sleep(0)
            await here.state("openai/a")

    assert await here.state("openai/a") is State.CLOSED, "with both streams under way"
    for stream in streams:
        await stream.chunks.aclose()


async def test_embeddings_come_in_order_and_are_booked(house: Open) -> None:
    here = await house()
    call = Call("embedding", {"model": "e", "input": ["x", "y"]}, "acme", "req_e")
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert result.answer.array is not None
    assert result.answer.array.shape == (2, 4)
    assert (entry.status, entry.prompt_tokens, entry.cost_nano) == ("posted", 2, 9)


@pytest.mark.parametrize("given", [[5, 6, 7], [[5, 6, 7]], [[5], [6, 7], [5]]])
async def test_token_ids_are_embedded_as_texts_are(house: Open, given: list[Any]) -> None:
    here = await house(own={"tpm": 1000})
    call = Call("embedding", {"model": "e", "input": given}, "acme", "req_e")
    result = await here.pipeline.answer(call)

    rows = len(given) if isinstance(given[0], list) else 1
    assert result.answer.array is not None
    assert result.answer.array.shape == (rows, 4)
    sent = [text for texts in here.provider.texts for text in texts]
    assert sorted(sent) == sorted(
        {tuple(one) for one in given} if rows == len(given) else [(5, 6, 7)]
    )


async def test_token_ids_and_words_never_share_a_call(house: Open) -> None:
    here = await house(enable_request_batching=True)
    bodies = [{"model": "e", "input": given} for given in (["a"], [[1, 2]], ["b"], [3, 4])]
    calls = [Call("embedding", body, "acme", f"req_{n}") for n, body in enumerate(bodies)]
    await asyncio.gather(*map(here.pipeline.answer, calls))

    sent = {frozenset(texts) for texts in here.provider.texts}
    assert sent == {frozenset({"a", "b"}), frozenset({(1, 2), (3, 4)})}


async def test_embedded_models_take_no_token_ids(house: Open) -> None:
    here = await house(
        model_list=[{"model_name": "e", "litellm_params": {"model": "local/wordllama-256"}}]
    )
    call = Call("embedding", {"model": "e", "input": [1, 2]}, "acme", "req_e")
    with pytest.raises(InvalidRequest, match="no token ids") as caught:
        await here.pipeline.answer(call)

    assert caught.value.param == "input"


async def test_dimensions_of_null_are_as_if_absent(house: Open) -> None:
    here = await house()
    body = {"model": "e", "input": "x", "dimensions": None}

    assert (await here.pipeline.answer(Call("embedding", body, "acme", "req_e"))).answer


async def test_texts_for_a_deployment_of_a_newer_configuration_are_to_come_back(
    house: Open,
) -> None:
    here = await house()
    with pytest.raises(Overloaded) as caught:
        await here.system.embed_call(Lane("e-of-tomorrow"), ["x"], 5.0)

    assert caught.value.retry_after_s == 1.0


# ------------------------------------------------------------------------------------- limits

PROMPT = 47  # the bound of a prompt that says "hello"
DAY = {"usd_per_day": 0.0002}  # 200 tokens of 1,000 nano-USD


async def test_without_a_limit_of_tokens_or_money_nobodys_answer_is_cut(house: Open) -> None:
    here = await house(rate_limit_config=LIMITS)
    call = here.call(max_tokens=10**6)
    result = await here.pipeline.answer(call)

    assert here.provider.bodies == [call.body]
    assert (result.facts.clamped, result.facts.warnings) == (None, [])


async def test_what_is_sent_fits_the_limit_and_the_answer_says_so(house: Open) -> None:
    here = await house(rate_limit_config={"tokens_per_minute": 600})
    call = here.call(max_tokens=10_000)
    result = await here.pipeline.answer(call)

    assert here.provider.bodies[0]["max_tokens"] == 600 - PROMPT
    assert call.body["max_tokens"] == 10_000
    assert result.facts.clamped == 600 - PROMPT
    assert "553 tokens at most" in result.facts.warnings[0]
    assert here.at_rest


async def test_a_stream_is_clamped_too(house: Open) -> None:
    here = await house(rate_limit_config={"tokens_per_minute": 600})
    stream = await here.pipeline.stream(here.call(max_tokens=10_000))
    assert [chunk async for chunk in stream.chunks]

    assert here.provider.bodies[0]["max_tokens"] == 600 - PROMPT
    assert stream.facts.clamped == 600 - PROMPT
    assert here.at_rest


async def test_tokens_that_were_reserved_and_not_used_come_back(house: Open) -> None:
    here = await house(rate_limit_config={"tokens_per_minute": 6000, "burst_size": 30})
    for number in range(20):  # each reserves 500 of the 1,000 that there are, and uses 5
        await here.pipeline.answer(here.call(f"{number:05}", max_tokens=500 - PROMPT))

    assert len(here.provider.asked) == 20


async def test_a_failed_attempt_uses_nothing(house: Open) -> None:
    here = await house(
        rate_limit_config={"tokens_per_minute": 6000},
        max_retries=0,
        enable_circuit_breaker=False,
    )
    here.provider.steps["openai/a"] = [ProviderError("down", upstream_status=500)] * 5
    for number in range(5):
        with pytest.raises(ProviderError):
            await here.pipeline.answer(here.call(f"{number:05}", max_tokens=1000 - PROMPT))
        assert here.at_rest

    await here.pipeline.answer(here.call(max_tokens=1000 - PROMPT))


async def test_an_answer_without_usage_has_used_all_that_was_reserved(house: Open) -> None:
    here = await house(rate_limit_config={"tokens_per_minute": 6000})
    here.provider.usage = None
    await here.pipeline.answer(here.call(max_tokens=1000 - PROMPT))
    with pytest.raises(RateLimitError, match="tokens per minute") as caught:
        await here.pipeline.answer(here.call("again"))

    assert caught.value.retry_after_s is not None
    assert 1 < caught.value.retry_after_s < 11
    assert caught.value.figures is not None
    assert caught.value.figures["tokens"].limit == 6000
    assert here.at_rest


async def test_a_prompt_that_never_fits_counts_nothing(house: Open) -> None:
    here = await house(rate_limit_config={"tokens_per_minute": 600, "burst_size": 1})
    with pytest.raises(RequestTooLarge):
        await here.pipeline.answer(here.call("x" * 1000))

    await here.pipeline.answer(here.call())


async def test_money_that_is_left_buys_a_shorter_answer_and_then_none(house: Open) -> None:
    here = await house(rate_limit_config=DAY)
    here.provider.cost_nano = 120_000
    first = await here.pipeline.answer(here.call(max_tokens=100))
    here.provider.cost_nano = 50_000
    second = await here.pipeline.answer(here.call("again", max_tokens=100))
    with pytest.raises(BudgetExceeded, match=r"\$0.0002 usd per day") as caught:
        await here.pipeline.answer(here.call("more", max_tokens=100))

    assert first.facts.clamped is None
    assert second.facts.clamped is not None
    assert 0 < second.facts.clamped <= 80 - PROMPT
    assert [b["max_tokens"] for b in here.provider.bodies] == [100, second.facts.clamped]
    assert caught.value.retry_after_s is not None
    assert 0 < caught.value.retry_after_s <= 86_400
    assert here.at_rest


async def test_what_an_answer_cost_is_what_is_spent(house: Open) -> None:
    here = await house(rate_limit_config=DAY)
    for number in range(5):  # each may cost 147,000 of the 200,000, and costs 7
        await here.pipeline.answer(here.call(f"{number:05}", max_tokens=100))

    assert all(body["max_tokens"] == 100 for body in here.provider.bodies)


async def test_an_answer_of_unknown_cost_has_cost_all_that_was_reserved(house: Open) -> None:
    here = await house(rate_limit_config=DAY)
    here.provider.cost_nano = None
    await here.pipeline.answer(here.call(max_tokens=100))
    second = await here.pipeline.answer(here.call("again", max_tokens=100))

    assert second.facts.clamped == 200 - 147 - len("again") + len("hello") - PROMPT


async def test_a_model_of_unknown_price_is_not_for_those_whose_money_is_limited(
    house: Open,
) -> None:
    here = await house(rate_limit_config={**DAY, "burst_size": 1})
    here.provider.token_nano = None
    with pytest.raises(PermissionDenied, match="costs is not known"):
        await here.pipeline.answer(here.call())

    assert here.provider.asked == []
    here.provider.token_nano = 1
    await here.pipeline.answer(here.call())


async def test_what_never_fits_the_budget_is_refused_with_no_time_to_come_back(
    house: Open,
) -> None:
    here = await house(rate_limit_config=DAY)
    here.provider.token_nano = 10**9
    with pytest.raises(BudgetExceeded, match="never fit") as caught:
        await here.pipeline.answer(here.call())

    assert caught.value.retry_after_s is None


async def test_a_refusal_says_what_and_when_and_the_figures(house: Open) -> None:
    limits = {**LIMITS, "requests_per_minute": 6, "burst_size": 1}
    here = await house(rate_limit_config=limits)
    await here.pipeline.answer(here.call())
    with pytest.raises(RateLimitError, match="6 requests per minute") as caught:
        await here.pipeline.answer(here.call("again"))

    assert not isinstance(caught.value, QueueTimeout)
    assert caught.value.retry_after_s is not None
    assert 5 < caught.value.retry_after_s < 10.3
    assert caught.value.figures is not None
    assert caught.value.figures["requests"].remaining < 0.3


async def test_those_who_agreed_to_wait_and_found_no_place_are_told_so(house: Open) -> None:
    here = await house(rate_limit_config={**LIMITS, "burst_size": 1, "max_queue_size": 0})
    await here.pipeline.answer(here.call())
    with pytest.raises(QueueTimeout):
        await here.pipeline.answer(here.call("again", may_wait=True))


async def test_a_cut_answer_is_not_kept_and_a_whole_one_is(house: Open) -> None:
    here = await house(rate_limit_config={"tokens_per_minute": 60_000}, enable_caching=True)
    here.provider.finish_reason = "length"
    await here.pipeline.answer(here.call())
    here.provider.finish_reason = "stop"
    await here.pipeline.answer(here.call())
    third = await here.pipeline.answer(here.call())

    assert len(here.provider.asked) == 2
    assert third.facts.cache == "hit"
    assert third.facts.clamped == 1024, "the answer was made under a clamp, and says so"


async def test_a_doubtful_answer_is_not_kept_under_a_clamp_either(house: Open) -> None:
    here = await house(
        rate_limit_config={"tokens_per_minute": 60_000},
        enable_caching=True,
        validation_level="lenient",
    )
    for number in (1, 2):
        call = here.call()
        call.body["response_format"] = {"type": "json_object"}
        result = await here.pipeline.answer(call)
        assert result.facts.clamped == 1024
        assert len(result.facts.warnings) > 1, "of the clamp, and of what is no JSON"
        assert len(here.provider.asked) == number


async def test_a_busy_deployment_leaves_the_call_to_another(house: Open) -> None:
    here = await house(own={"rpm": 1})
    for number in range(2):
        result = await here.pipeline.answer(here.call(str(number), model="two"))
        assert (result.facts.attempts, result.facts.retries) == (1, 0)

    assert sorted(here.provider.asked) == ["openai/a", "openai/b"]


async def test_when_all_are_busy_the_error_says_when_one_is_free(house: Open) -> None:
    here = await house(own={"rpm": 1})
    await here.pipeline.answer(here.call())
    call = here.call("again")
    with pytest.raises(DeploymentsBusy) as caught:
        await here.pipeline.answer(call)

    assert caught.value.retry_after_s is not None
    assert 50 < caught.value.retry_after_s < 70
    (entry,) = await here.entries(call)
    assert (here.provider.asked, entry.status, entry.requests) == (["openai/a"], "refused", 1)
    assert here.at_rest


async def test_a_fallback_answers_for_those_that_are_busy(house: Open) -> None:
    here = await house(own={"tpm": 1200}, fallbacks=[{"m": ["spare"]}])
    here.provider.usage = {"prompt_tokens": 900, "completion_tokens": 100}
    for number in range(2):
        await here.pipeline.answer(here.call(str(number), max_tokens=10_000))

    assert here.provider.asked == ["openai/a", "openai/c"]
    assert [body["max_tokens"] for body in here.provider.bodies] == [10_000, 10_000]


async def test_a_deployments_own_limits_hold_for_streams_and_come_back_from_them(
    house: Open,
) -> None:
    here = await house(own={"tpm": 60_000})
    for number in range(30):  # each is expected to use 1,071 of 10,000, and uses 5
        stream = await here.pipeline.stream(here.call(f"{number:05}"))
        assert [chunk async for chunk in stream.chunks]

    assert here.at_rest


async def test_a_deployments_own_limits_hold_for_embeddings(house: Open) -> None:
    here = await house(own={"rpm": 1})

    def call(text: str) -> Call:
        return Call("embedding", {"model": "e", "input": [text]}, "acme", f"req_{text}")

    await here.pipeline.answer(call("x"))
    with pytest.raises(DeploymentsBusy):
        await here.pipeline.answer(call("y"))
    assert len(here.provider.asked) == 1


async def test_texts_that_nobody_was_asked_for_are_refused_in_one_entry(house: Open) -> None:
    here = await house(own={"rpm": 1})
    calls = [here.texts(str(number), "ee") for number in range(6)]
    told = await asyncio.gather(*map(here.pipeline.answer, calls), return_exceptions=True)

    assert sum(isinstance(one, DeploymentsBusy) for one in told) == 4
    entries = [entry for call in calls for entry in await here.entries(call)]
    rows = sorted((entry.status, entry.attempt, entry.requests) for entry in entries)
    assert rows == [("posted", 1, 1), ("posted", 1, 1), ("refused", 1, 4)]
    usage = await here.system.books.usage()
    assert (usage["total_requests"], usage["refused_requests"]) == (6, 4)
    assert here.at_rest


# ------------------------------------------------------------------------- breaker and throttles

OPENS_AT_ONCE = {"failure_threshold": 1}
REFUSED = ProviderConnectionError("connection refused")


def throttle() -> RateLimitError:
    return RateLimitError("slow down", retry_after_s=7.0, upstream_status=429)


async def test_when_all_are_open_the_error_says_when_the_first_may_be_tried(house: Open) -> None:
    here = await house(circuit_breaker_config={**OPENS_AT_ONCE, "timeout": 40}, max_retries=0)
    here.provider.steps["openai/a"] = [REFUSED]
    with pytest.raises(ProviderConnectionError):
        await here.pipeline.answer(here.call())
    assert await here.state("openai/a") is State.OPEN
    call = here.call("again")
    with pytest.raises(CircuitBreakerOpenError, match="is OPEN") as caught:
        await here.pipeline.answer(call)

    assert caught.value.retry_after_s is not None
    assert 35 < caught.value.retry_after_s <= 40
    (entry,) = await here.entries(call)
    assert (here.provider.asked, entry.status, entry.requests) == (["openai/a"], "refused", 1)
    assert here.at_rest


async def test_a_cached_answer_is_served_while_all_are_open(house: Open) -> None:
    here = await house(circuit_breaker_config=OPENS_AT_ONCE, enable_caching=True, max_retries=0)
    await here.pipeline.answer(here.call())
    await here.system.breaker.force(here.deployment("openai/a").circuit, State.FORCED_OPEN)
    assert await here.state("openai/a") is State.FORCED_OPEN
    result = await here.pipeline.answer(here.call())
    with pytest.raises(CircuitBreakerOpenError):
        await here.pipeline.answer(here.call("something else"))

    assert (result.facts.cache, result.facts.attempts) == ("hit", 0)
    assert here.provider.asked == ["openai/a"]


async def test_a_throttled_provider_is_left_alone_and_callers_hear_for_how_long(
    house: Open,
) -> None:
    here = await house(max_retries=0)
    here.provider.steps["openai/a"] = [throttle()]
    with pytest.raises(RateLimitError, match="slow down"):
        await here.pipeline.answer(here.call())
    with pytest.raises(RateLimitError, match="asked for a pause") as caught:
        await here.pipeline.answer(here.call("again"))

    assert caught.value.retry_after_s is not None
    assert 6 < caught.value.retry_after_s <= 7
    assert here.provider.asked == ["openai/a"]


async def test_base64_that_was_asked_for_in_vain_is_asked_for_as_floats_and_paid(
    house: Open,
) -> None:
    here = await house(max_retries=0)
    in_vain = ProviderError("no base64 here", code=NO_BASE64)
    in_vain.paid = Paid(2, 5, "x")  # type: ignore[attr-defined]
    here.provider.steps["openai/text-embedding-x"] = [in_vain]
    call = here.texts("x")
    result = await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert len(here.provider.asked) == 2
    assert (entry.prompt_tokens, entry.cost_nano) == (3, 14)
    assert result.facts.attempts == 1


async def test_a_throttle_is_the_same_for_texts(house: Open) -> None:
    here = await house(max_retries=0)
    here.provider.steps["openai/text-embedding-x"] = [throttle()]
    with pytest.raises(RateLimitError, match="slow down"):
        await here.pipeline.answer(here.texts("x"))
    with pytest.raises(RateLimitError, match="asked for a pause") as caught:
        await here.pipeline.answer(here.texts("y"))

    assert caught.value.retry_after_s is not None
    assert 6 < caught.value.retry_after_s <= 7
    assert len(here.provider.asked) == 1


async def test_all_names_of_a_pattern_share_one_breaker(house: Open) -> None:
    here = await house(circuit_breaker_config=OPENS_AT_ONCE, max_retries=0)
    here.provider.steps["openai/x"] = [REFUSED]
    with pytest.raises(ProviderConnectionError):
        await here.pipeline.answer(here.call(model="any/x"))
    assert await here.state("openai/x", "any/x") is State.OPEN
    with pytest.raises(CircuitBreakerOpenError):
        await here.pipeline.answer(here.call(model="any/y"))

    assert here.provider.asked == ["openai/x"]
    labels = {line for line in here.system.metrics().decode().splitlines() if "/x" in line}
    assert not [line for line in labels if line.startswith("forebay_provider")]


async def test_a_call_that_the_deployments_own_limits_refuse_is_no_call(house: Open) -> None:
    here = await house(own={"rpm": 1})
    await here.pipeline.answer(here.call())
    with pytest.raises(DeploymentsBusy):
        await here.pipeline.answer(here.call("again"))

    assert here.outcomes() == {"success": 1}


async def test_texts_that_a_deployment_refuses_leave_the_facts_as_they_are(house: Open) -> None:
    here = await house(own={"rpm": 1})
    told = [(await here.pipeline.answer(here.texts(str(n), "ee"))).facts for n in range(2)]

    assert [(facts.attempts, facts.retries) for facts in told] == [(1, 0), (1, 0)]
    assert len({facts.deployment for facts in told}) == 2


# ------------------------------------------------------------------------------------- retries


@pytest.mark.parametrize("kind", ["whole", "stream", "refused"])
async def test_an_error_carries_the_facts_of_its_request(house: Open, kind: str) -> None:
    here = await house(max_retries=1)
    for model in ("openai/a", "openai/b"):
        here.provider.steps[model] = [ProviderError("down", upstream_status=500)]
    if kind == "refused":
        for model in ("openai/a", "openai/b"):
            circuit = here.deployment(model, "two").circuit
            await here.system.breaker.force(circuit, State.FORCED_OPEN)
        await settle()
    ask = here.pipeline.stream if kind == "stream" else here.pipeline.answer
    with pytest.raises(GatewayError) as caught:
        await ask(here.call(model="two"))

    facts = pickle.loads(pickle.dumps(caught.value)).facts
    attempts, retries = (0, 0) if kind == "refused" else (2, 1)
    assert (facts.group, facts.attempts, facts.retries) == ("two", attempts, retries)
    assert bool(facts.deployment) == bool(attempts)


async def test_an_error_of_no_request_has_no_facts(house: Open) -> None:
    here = await house()
    with pytest.raises(ModelNotFound) as caught:
        await here.pipeline.answer(here.call(model="nobody's"))

    assert caught.value.facts is None


async def test_those_who_share_a_failure_have_facts_of_their_own(house: Open) -> None:
    here = await house(max_retries=0)
    here.provider.steps["openai/a"] = [ProviderError("down", upstream_status=500)]
    told = await asyncio.gather(
        *(here.pipeline.answer(here.call()) for _ in range(2)), return_exceptions=True
    )

    assert sorted(one.facts.cache for one in told if isinstance(one, ProviderError)) == [  # type: ignore[union-attr]
        "joined",
        "miss",
    ]


async def test_the_facts_tell_of_every_attempt(house: Open) -> None:
    here = await house(fallbacks=[{"two": ["spare"]}], max_retries=1)
    for model in ("openai/a", "openai/b"):
        here.provider.steps[model] = [ProviderError("down", upstream_status=500)]
    result = await here.pipeline.answer(here.call(model="two"))

    facts = result.facts
    assert (facts.attempts, facts.retries, facts.fallbacks) == (3, 1, 1)
    assert facts.deployment == here.deployment("openai/c", "spare").id
    assert facts.group == "two"
    assert result.answer.model == "openai/c"
    assert here.outcomes() == {"failure": 2, "success": 1}


async def test_retries_stay_within_their_budget_and_fallback_groups_need_none(house: Open) -> None:
    here = await house(
        fallbacks=[{"two": ["spare"]}],
        max_retries=1,
        retry_budget=0.0,
        enable_circuit_breaker=False,
        enable_request_deduplication=False,
    )
    for model in ("openai/a", "openai/b"):
        here.provider.steps[model] = [ProviderError("down", upstream_status=500)] * 400
    for _ in range(200):
        result = await here.pipeline.answer(here.call(model="two"))
        assert result.answer.model == "openai/c"

    retries = len(here.provider.asked) - 2 * 200
    assert 50 <= retries <= 80, "30 for each of the two, and 3 a second"


async def test_calls_earn_retries_and_open_nothing_where_the_breaker_is_off(house: Open) -> None:
    here = await house(
        fallbacks=[{"two": ["spare"]}],
        max_retries=1,
        retry_budget=1.0,
        enable_circuit_breaker=False,
        enable_request_deduplication=False,
    )
    for model in ("openai/a", "openai/b"):
        here.provider.steps[model] = [REFUSED] * 400
    for _ in range(200):
        await here.pipeline.answer(here.call(model="two"))
        await settle()

    assert len(here.provider.asked) - 2 * 200 > 180
    assert await here.state("openai/a") is State.CLOSED


async def test_texts_for_which_there_is_no_room_are_to_come_back(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batcher_callers, "TEXTS_QUEUED_MAX", 1)
    here = await house(enable_request_batching=True, max_retries=0)
    gate = asyncio.Event()
    here.provider.steps["openai/text-embedding-x"] = [gate]
    here.provider.steps["openai/text-embedding-y"] = [gate]
    first = asyncio.create_task(here.pipeline.answer(here.texts("a", "ee")))
    while not here.provider.asked:
        await settle()
    with pytest.raises(RateLimitError) as caught:
        await here.pipeline.answer(here.texts("b", "ee"))
    gate.set()
    await first

    assert (caught.value.status, caught.value.code) == (429, "texts_queue_full")
    assert caught.value.retry_after_s == 1.0
    assert len(here.provider.asked) == 1


class OnceFull:
    """A deployment's quotas that have no room for the first call."""

    def __init__(self, retry_after_s: float) -> None:
        self.refusals = [Refusal("requests_per_minute", 60, 0, retry_after_s)]

    async def take_texts(self, *_: object) -> Refusal | None:
        return self.refusals.pop() if self.refusals else None


@pytest.mark.parametrize(("group", "waits"), [("e", True), ("ee", False)])
async def test_texts_wait_for_the_limit_of_a_deployment_only_where_there_is_no_other(
    house: Open, group: str, waits: bool
) -> None:
    here = await house(enable_request_batching=True)
    here.system.quotas = OnceFull(0.03)  # type: ignore[assignment]
    waited = here.system._own_batcher_owner
    call = here.texts("a", group)
    call.may_wait = True
    result = await here.pipeline.answer(call)

    assert result.facts.attempts == 1
    assert waited.stats()["no_permit"] == 1
    assert waited.stats()["callers"] == (1 if waits else 2)


async def test_texts_that_may_not_wait_are_told_when_there_is_room(house: Open) -> None:
    here = await house(enable_request_batching=True)
    here.system.quotas = OnceFull(5.0)  # type: ignore[assignment]
    with pytest.raises(DeploymentsBusy) as caught:
        await here.pipeline.answer(here.texts("a"))

    assert caught.value.retry_after_s == 5.0
    assert here.provider.asked == []


async def test_texts_that_failed_together_go_again_together(house: Open) -> None:
    here = await house(enable_request_batching=True, max_retries=1)
    gate = asyncio.Event()
    for model in ("openai/text-embedding-x", "openai/text-embedding-y"):
        here.provider.steps[model] = [(gate, ProviderError("down", upstream_status=500))]
    calls = [here.texts(str(n), "ee") for n in range(64)]
    tasks = [asyncio.create_task(here.pipeline.answer(call)) for call in calls]
    while len(here.provider.asked) < 2:
        await settle()
    gate.set()
    results = await asyncio.gather(*tasks)

    assert [result.facts.retries for result in results] == [1] * 64
    assert len(here.provider.asked) == 4


# ---------------------------------------------------------------------------- special fallbacks


@pytest.mark.parametrize("streams", [True, False])
async def test_a_prompt_that_is_too_long_goes_to_a_model_that_takes_it(
    house: Open, streams: bool
) -> None:
    here = await house(context_window_fallbacks=[{"m": ["spare"]}], fallbacks=["two"])
    too_long = InvalidRequest("too long", code="context_length_exceeded", upstream_status=400)
    here.provider.steps["openai/a"] = [too_long]
    call = here.call()
    if streams:
        stream = await here.pipeline.stream(call)
        assert [chunk async for chunk in stream.chunks]
        facts = stream.facts
    else:
        facts = (await here.pipeline.answer(call)).facts

    assert here.provider.asked == ["openai/a", "openai/c"]
    assert (facts.attempts, facts.retries, facts.fallbacks) == (2, 0, 1)
    assert here.outcomes() == {"ignored": 1, "success": 1}
    assert here.at_rest


async def test_an_answer_that_a_filter_kept_back_is_asked_for_elsewhere_and_paid(
    house: Open,
) -> None:
    here = await house(content_policy_fallbacks=[{"m": ["spare"]}])
    here.provider.finish_reason = "content_filter"
    call = here.call()
    result = await here.pipeline.answer(call)

    assert here.provider.asked == ["openai/a", "openai/c"]
    assert [entry.status for entry in await here.entries(call)] == ["posted", "posted"]
    assert (result.facts.cost_nano, result.facts.fallbacks) == (14, 1)
    assert result.answer.body["choices"][0]["finish_reason"] == "content_filter"


@pytest.mark.parametrize("why", ["open", "down", "refused"])
async def test_a_filtered_answer_is_better_than_none(house: Open, why: str) -> None:
    here = await house(content_policy_fallbacks=[{"m": ["spare"]}], max_retries=0)
    here.provider.finish_reason = "content_filter"
    if why == "open":
        circuit = here.deployment("openai/c", "spare").circuit
        await here.system.breaker.force(circuit, State.FORCED_OPEN)
        await settle()
    else:
        down = ProviderError("down", upstream_status=500)
        here.provider.steps["openai/c"] = [InvalidRequest("no") if why == "refused" else down]
    call = here.call()
    result = await here.pipeline.answer(call)

    assert result.answer.body["choices"][0]["finish_reason"] == "content_filter"
    assert result.facts.deployment == here.deployment("openai/a").id
    assert result.facts.cost_nano == 7
    assert (await here.entries(call))[0].status == "posted"
    assert here.at_rest


async def test_a_filtered_answer_does_not_wait_for_a_busy_group_and_is_not_asked_for_again(
    house: Open,
) -> None:
    here = await house(
        own_spare={"rpm": 2},
        content_policy_fallbacks=[{"m": ["spare"]}],
        enable_caching=True,
        rate_limit_config={**LIMITS, "enable_queuing": True, "queue_timeout": 50},
    )
    await here.pipeline.answer(here.call(model="spare"))
    here.provider.finish_reason = "content_filter"
    here.provider.asked.clear()
    async with asyncio.timeout(5.0):
        result = await here.pipeline.answer(here.call("x", may_wait=True))

    assert here.provider.asked == ["openai/a"]
    assert result.answer.body["choices"][0]["finish_reason"] == "content_filter"
    await here.pipeline.answer(here.call("x"))
    assert here.provider.asked == ["openai/a", "openai/a"], "it was kept for nobody"


async def test_an_invalid_answer_is_paid_and_neither_retried_nor_blamed(house: Open) -> None:
    here = await house(max_retries=3, circuit_breaker_config=OPENS_AT_ONCE)
    call = here.call(model="two")
    call.body["response_format"] = {"type": "json_object"}
    with pytest.raises(ResponseValidationError):
        await here.pipeline.answer(call)

    (entry,) = await here.entries(call)
    assert (entry.status, entry.cost_nano, entry.http_status) == ("posted", 7, 502)
    assert here.outcomes() == {"success": 1}
    assert here.at_rest


# --------------------------------------------------------------------- slow, late, and whose fault


class Hands:
    """A clock whose hands a test moves."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now

    def moved(self, by_s: float, error: GatewayError | None = None) -> Callable[[], object]:
        """A step: so much time passes, then the error."""

        def step() -> None:
            self.now += by_s
            if error is not None:
                raise error

        return step


def standing_still(clock: Hands) -> StallWatch:
    """A watch over a loop that never gets to its heartbeat."""

    class Nothing:
        def cancel(self) -> None:
            pass

    watch = StallWatch(clock)
    watch.start(lambda delay_s, callback: Nothing())
    return watch


SLOW = {"slow_call_s": 2.0}


async def told_by_hand(house: Open, **gateway: Any) -> tuple[House, Hands]:
    here = await house(max_retries=0, **gateway)
    clock = Hands()
    here.system.clock = clock
    here.system.stalls.close()
    return here, clock


async def test_a_stream_that_begins_late_is_slow(house: Open) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=SLOW)
    here.provider.steps["openai/a"] = [clock.moved(1.9), clock.moved(2.1)]
    for text in ("in time", "late"):
        stream = await here.pipeline.stream(here.call(text))
        assert [chunk async for chunk in stream.chunks]

    assert here.outcomes() == {"success": 1, "slow": 1}


async def test_a_stream_that_pauses_is_slow(house: Open) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=SLOW)
    here.provider.between = clock.moved(2.1)
    stream = await here.pipeline.stream(here.call())
    assert [chunk async for chunk in stream.chunks]

    assert here.outcomes() == {"slow": 1}


async def test_a_client_that_is_slow_to_take_its_chunks_slows_nobody(house: Open) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=SLOW)
    stream = await here.pipeline.stream(here.call())
    async for _ in stream.chunks:
        clock.now += 9.0

    assert here.outcomes() == {"success": 1}


async def test_a_whole_answer_may_take_its_time(house: Open) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=SLOW)
    here.provider.steps["openai/a"] = [clock.moved(50.0)]
    await here.pipeline.answer(here.call())

    assert here.outcomes() == {"success": 1}


async def test_what_is_late_because_we_stood_still_is_not_slow(house: Open) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=SLOW)
    here.system.stalls = standing_still(clock)
    here.provider.steps["openai/a"] = [clock.moved(3.0)]
    stream = await here.pipeline.stream(here.call())
    assert [chunk async for chunk in stream.chunks]

    assert here.outcomes() == {"success": 1}


LATE = GatewayTimeout("late")


async def test_a_provider_that_has_all_the_time_there_is_and_does_not_answer_is_to_blame(
    house: Open,
) -> None:
    here, clock = await told_by_hand(house)
    here.provider.steps["openai/a"] = [clock.moved(60.0, LATE)]
    with pytest.raises(GatewayTimeout, match="late"):
        await here.pipeline.answer(here.call())

    assert here.outcomes() == {"unreachable": 1}


async def test_a_timeout_while_we_stood_still_blames_nobody(house: Open) -> None:
    here, clock = await told_by_hand(house)
    here.system.stalls = standing_still(clock)
    here.provider.steps["openai/a"] = [clock.moved(60.0, LATE)]
    with pytest.raises(GatewayTimeout, match="late"):
        await here.pipeline.answer(here.call())

    assert here.outcomes() == {"ignored": 1}


async def test_an_error_counts_whether_we_stood_still_or_not(house: Open) -> None:
    here, clock = await told_by_hand(house)
    here.system.stalls = standing_still(clock)
    here.provider.steps["openai/a"] = [
        clock.moved(3.0, ProviderError("down", upstream_status=500)),
        clock.moved(3.0, REFUSED),
    ]
    for text in ("one", "two"):
        with pytest.raises(ProviderError):
            await here.pipeline.answer(here.call(text))

    assert here.outcomes() == {"failure": 1, "unreachable": 1}


async def test_a_second_attempt_with_little_time_left_blames_nobody_for_being_late(
    house: Open,
) -> None:
    here, clock = await told_by_hand(house, fallbacks=[{"m": ["spare"]}])
    here.provider.steps["openai/a"] = [clock.moved(50.0, REFUSED)]
    here.provider.steps["openai/c"] = [clock.moved(10.0, LATE)]
    with pytest.raises(GatewayTimeout, match="late"):
        await here.pipeline.answer(here.call())

    assert here.outcomes() == {"unreachable": 1, "ignored": 1}


async def test_a_clients_own_deadline_blames_nobody_but_a_stall_before_it_does(
    house: Open,
) -> None:
    here, clock = await told_by_hand(house)
    here.provider.steps["openai/a"] = [clock.moved(40.0, LATE)]
    with pytest.raises(GatewayTimeout):
        await here.pipeline.stream(here.call(timeout_s=40.0))
    assert here.outcomes() == {"ignored": 1}

    here.provider.steps["openai/a"] = [clock.moved(30.0, GatewayTimeout("stuck", code=STALLED))]
    with pytest.raises(GatewayTimeout):
        await here.pipeline.stream(here.call(timeout_s=40.0))
    assert here.outcomes() == {"ignored": 1, "unreachable": 1}


async def test_a_stream_that_speaks_until_its_time_is_up_has_done_nothing_wrong(
    house: Open,
) -> None:
    here, clock = await told_by_hand(house)
    here.provider.cut = LATE
    stream = await here.pipeline.stream(here.call())
    await anext(stream.chunks)
    clock.now += 60.0
    with pytest.raises(GatewayTimeout):
        await anext(stream.chunks)

    assert here.outcomes() == {"ignored": 1}
    assert here.at_rest


async def test_a_stream_that_was_silent_until_its_time_was_up_is_to_blame(house: Open) -> None:
    here, clock = await told_by_hand(house)
    here.provider.between, here.provider.cut = clock.moved(60.0), LATE
    stream = await here.pipeline.stream(here.call())
    await anext(stream.chunks)
    with pytest.raises(GatewayTimeout):
        await anext(stream.chunks)

    assert here.outcomes() == {"unreachable": 1}
    assert here.at_rest


async def test_a_client_that_leaves_a_stream_blames_nobody(house: Open) -> None:
    here = await house()
    stream = await here.pipeline.stream(here.call())
    await anext(stream.chunks)
    await stream.chunks.aclose()

    assert here.outcomes() == {"ignored": 1}


@pytest.mark.parametrize(("passed_s", "expected"), [(60.0, State.OPEN), (1.0, State.CLOSED)])
async def test_texts_cancelled_at_their_deadline_are_late_and_before_it_given_up(
    house: Open, passed_s: float, expected: State
) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=OPENS_AT_ONCE)
    deployment = here.deployment("openai/text-embedding-x", "e")
    here.provider.steps[deployment.model] = [asyncio.Event()]
    call = asyncio.create_task(here.system.embed_call(Lane(deployment.id, ()), ["x"], 60.0))
    await settle()
    clock.now += passed_s
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert await here.state(deployment.model, "e") is expected


@pytest.mark.parametrize(("given_s", "expected"), [(60.0, State.OPEN), (5.0, State.CLOSED)])
async def test_texts_of_callers_in_a_hurry_blame_nobody(
    house: Open, given_s: float, expected: State
) -> None:
    here, clock = await told_by_hand(house, circuit_breaker_config=OPENS_AT_ONCE)
    deployment = here.deployment("openai/text-embedding-x", "e")
    here.provider.steps[deployment.model] = [clock.moved(given_s, LATE)]
    with pytest.raises(GatewayTimeout):
        await here.system.embed_call(Lane(deployment.id, ()), ["x"], given_s)

    assert await here.state(deployment.model, "e") is expected


async def test_calls_in_flight_are_counted_while_they_last(house: Open) -> None:
    here = await house()
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    circuit = here.deployment("openai/a").circuit
    task = asyncio.create_task(here.pipeline.answer(here.call()))
    while not here.provider.asked:
        await settle()
    during = here.system.router.stats()["deployments"][circuit]["in_flight"]
    gate.set()
    await task
    stream = await here.pipeline.stream(here.call("a stream"))
    streaming = here.system.router.stats()["deployments"][circuit]["in_flight"]
    await stream.chunks.aclose()

    after = here.system.router.stats()["deployments"][circuit]
    assert (during, streaming, after["in_flight"]) == (1, 1, 0)
    assert after["latency_s"] is not None


async def test_a_second_copy_of_late_texts_is_booked_and_charged_to_nobody(house: Open) -> None:
    here = await house(hedge_embeddings=True)
    for number in range(20):
        await here.pipeline.answer(here.texts(str(number)))
    here.provider.steps["openai/text-embedding-x"] = [asyncio.Event()]
    call = here.texts("late")
    result = await here.pipeline.answer(call)

    own, spare = sorted(await here.entries(call), key=lambda entry: entry.tenant)
    assert (own.tenant, own.status, own.cost_nano, own.estimated) == ("acme", "posted", 9, False)
    assert (spare.tenant, spare.status, spare.cost_nano) == ("forebay/hedging", "posted", 9)
    assert spare.estimated, "nobody knows whether the provider asks anything for it"
    assert (result.facts.cost_nano, result.facts.attempts) == (9, 1)
    assert here.at_rest
