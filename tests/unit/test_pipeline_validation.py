"""What becomes of answers that are not valid: refused, repaired, moderated, never stored."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from actors.cache import desk
from forebay.call import Call
from forebay.codec import Answer
from forebay.errors import InvalidRequest, ProviderError, ResponseValidationError
from forebay.providers.base import Resolve
from forebay.reckoning import Reckoner
from forebay.routing import Deployment
from tests.support.fake_time import settle
from tests.support.house import USAGE, House, Scripted, open_house

JSON = {"response_format": {"type": "json_object"}}
Open = Callable[..., Awaitable[House]]


class Saying(Scripted):
    """A provider whose models say one thing after the other; the last is said for ever."""

    def __init__(self, **says: list[str]) -> None:
        super().__init__()
        self.says = says

    async def chat(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer:
        self.bodies.append(body)
        await self._step(deployment)
        says = self.says[deployment.model.removeprefix("openai/")]
        text = says.pop(0) if len(says) > 1 else says[0]
        message = {"role": "assistant", "content": text}
        said = {"text": text} if "prompt" in body else {"message": message}
        choice = {"index": 0, **said, "finish_reason": "stop"}
        whole = {"id": "x1", "object": "chat.completion", "choices": [choice], "usage": USAGE}
        return Answer(whole, USAGE, self.cost_nano, deployment.model)

    completion = chat


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[Open]:
    houses: list[House] = []

    async def build(says: dict[str, list[str]], **gateway: Any) -> House:
        here = await open_house(tmp_path, max_retries=0, **gateway)
        here.provider = here.system.provider = Saying(**says)
        here.system.bounds = Reckoner(here.provider, here.system._candidates)
        houses.append(here)
        return here

    yield build
    for one in houses:
        await one.system.close()


def wanting_json(here: House, **details: Any) -> Call:
    call = here.call(**details)
    call.body |= JSON
    return call


REPAIR = {"validation": {"repair": True}}


async def test_an_invalid_answer_is_asked_for_once_more_and_both_are_paid(house: Open) -> None:
    here = await house({"a": ["no json", '{"a": 1}']}, **REPAIR)
    call = wanting_json(here)
    result = await here.pipeline.answer(call)

    entries = await here.entries(call)
    sent = here.provider.bodies[1]["messages"]
    totals = await here.system.books.usage()
    assert result.answer.body["choices"][0]["message"]["content"] == '{"a": 1}'
    assert result.facts.cost_nano == 14
    assert result.facts.warnings == [
        "the answer is a second one; the first was not valid: "
        "the answer is not the JSON that was asked for"
    ]
    assert [(e.attempt, e.status, e.cost_nano, e.error is None) for e in entries] == [
        (1, "posted", 7, False),
        (2, "posted", 7, True),
    ]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert sent[1]["content"] == "no json"
    assert "not the JSON" in sent[2]["content"]
    assert (totals["total_requests"], totals["success_rate"]) == (1, 1.0)
    assert here.at_rest


async def test_a_second_answer_that_is_not_valid_replaces_nothing(house: Open) -> None:
    here = await house({"a": ["one", "two", '{"a": 1}']}, **REPAIR)
    call = wanting_json(here)
    with pytest.raises(ResponseValidationError, match="not the JSON"):
        await here.pipeline.answer(call)

    entries = await here.entries(call)
    assert [e.cost_nano for e in entries] == [7, 7]
    assert len(here.provider.asked) == 2
    assert here.at_rest


async def test_a_repair_that_fails_leaves_the_first_error(house: Open) -> None:
    here = await house({"a": ["one"]}, **REPAIR)
    here.provider.steps["openai/a"] = [None, ProviderError("down", upstream_status=500)]
    with pytest.raises(ResponseValidationError, match="not the JSON"):
        await here.pipeline.answer(wanting_json(here))

    assert here.at_rest


async def test_nothing_is_asked_twice_unless_it_is_configured(house: Open) -> None:
    here = await house({"a": ["one", '{"a": 1}']})
    with pytest.raises(ResponseValidationError):
        await here.pipeline.answer(wanting_json(here))

    assert len(here.provider.asked) == 1


async def test_a_repair_needs_leave_of_the_limits(house: Open) -> None:
    limits = {"usd_per_day": 1e-6, "burst_size": 10}
    here = await house({"a": ["one", '{"a": 1}']}, rate_limit_config=limits, **REPAIR)
    here.provider.token_nano = 1
    here.provider.cost_nano = 1000
    call = wanting_json(here, max_tokens=1)
    call.body["messages"][0]["content"] = "x"
    with pytest.raises(ResponseValidationError):
        await here.pipeline.answer(call)

    assert len(here.provider.asked) == 1
    assert here.at_rest


async def test_a_slot_serves_both(house: Open) -> None:
    limits = {"concurrent_requests": 1, "tokens_per_minute": 100_000}
    here = await house({"a": ["one", '{"a": 1}']}, rate_limit_config=limits, **REPAIR)
    await here.pipeline.answer(wanting_json(here, max_tokens=5))

    assert len(here.provider.asked) == 2
    assert here.at_rest


async def test_a_warning_is_told_and_the_answer_is_not_stored(house: Open) -> None:
    here = await house({"a": ["mail me: a@b.io", "fine"]}, enable_caching=True)
    first = await here.pipeline.answer(here.call())
    second = await here.pipeline.answer(here.call())
    third = await here.pipeline.answer(here.call())

    assert first.facts.warnings == ["the answer holds an e-mail address"]
    assert [r.facts.cache for r in (first, second, third)] == ["miss", "miss", "hit"]


MODERATION = {"validation": {"moderation_model": "spare"}}


async def test_the_moderations_model_is_asked_and_paid(house: Open) -> None:
    here = await house({"a": ["harmless"], "c": ["safe"]}, **MODERATION)
    call = here.call()
    result = await here.pipeline.answer(call)

    entries = await here.entries(call)
    totals = await here.system.books.usage()
    assert result.facts.warnings == []
    assert (result.facts.cost_nano, result.facts.group, result.facts.deployment) == (
        14,
        "m",
        here.deployment("openai/a").id,
    )
    assert [(e.attempt, e.model) for e in sorted(entries, key=lambda e: e.attempt)] == [
        (1, "m"),
        (2, "spare"),
    ]
    assert (totals["total_requests"], totals["successful_requests"]) == (1, 1)
    assert "harmless" in here.provider.bodies[1]["messages"][0]["content"]
    assert here.at_rest


async def test_what_the_moderation_calls_unsafe_is_not_handed_on(house: Open) -> None:
    here = await house({"a": ["bad"], "c": ["unsafe\nS1, S2"]}, **MODERATION)
    call = here.call()
    with pytest.raises(ResponseValidationError, match="calls the answer unsafe: S1, S2"):
        await here.pipeline.answer(call)

    assert sum(e.cost_nano for e in await here.entries(call)) == 14
    assert here.at_rest


async def test_a_moderation_that_fails_is_a_warning_and_nothing_is_stored(house: Open) -> None:
    here = await house({"a": ["fine"], "c": ["who knows"]}, enable_caching=True, **MODERATION)
    here.provider.steps["openai/c"] = [ProviderError("down", upstream_status=500)]
    first = await here.pipeline.answer(here.call())
    second = await here.pipeline.answer(here.call())

    assert first.facts.warnings == ["the answer is not moderated: ProviderError"]
    assert second.facts.warnings == ["the moderation said neither safe nor unsafe"]
    assert second.facts.cache == "miss"
    assert here.at_rest


async def test_streams_are_judged_at_their_end_and_an_invalid_one_is_not_stored(
    house: Open,
) -> None:
    here = await house({"a": ["x"]}, enable_caching=True)
    heard: list[str] = []
    here.system.validation.listener = lambda event: heard.append(f"{event.name} {event.label}")

    async def streamed(**more: Any) -> str:
        call = here.call()
        call.body |= {"stream": True, **more}
        stream = await here.pipeline.stream(call)
        async for _ in stream.chunks:
            pass
        return stream.facts.cache

    assert [await streamed(**JSON) for _ in range(2)] == ["miss", "miss"]
    assert heard == ["json fail", "validation fail"] * 2
    assert [await streamed() for _ in range(2)] == ["miss", "hit"]
    assert heard[4:] == ["validation pass"]


async def test_streams_are_judged_where_nothing_is_shared_either(house: Open) -> None:
    here = await house({"a": ["x"]}, enable_request_deduplication=False)
    call = wanting_json(here)
    call.body["stream"] = True
    async for _ in (await here.pipeline.stream(call)).chunks:
        pass

    assert here.system.validation.stats()["findings"] == {"json": 1}


async def streamed(here: House, **more: Any) -> tuple[Call, str | None]:
    """A stream taken to its end: its call, and where it came from."""
    call = here.call()
    call.body |= {"stream": True, **more}
    stream = await here.pipeline.stream(call)
    async for _ in stream.chunks:
        pass
    await settle()
    return call, stream.facts.cache


async def test_a_stream_is_moderated_at_its_end_and_stored_if_it_is_safe(house: Open) -> None:
    limits = {"concurrent_requests": 2, "tokens_per_minute": 100_000}
    here = await house(
        {"a": ["x"], "c": ["safe"]}, enable_caching=True, rate_limit_config=limits, **MODERATION
    )
    heard: list[str] = []
    here.system.validation.listener = lambda event: heard.append(f"{event.name} {event.label}")
    call, first = await streamed(here)
    _, second = await streamed(here)

    entries = sorted(await here.entries(call), key=lambda entry: entry.attempt)
    totals = await here.system.books.usage()
    assert (first, second) == ("miss", "hit")
    assert heard == ["validation pass"]
    assert [(e.attempt, e.model, e.cost_nano) for e in entries] == [(1, "m", 7), (2, "spare", 7)]
    assert totals["total_requests"] == 2
    assert "onetwo" in here.provider.bodies[1]["messages"][0]["content"]
    assert here.at_rest


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("unsafe", ["moderation fail", "validation fail"]),
        ("who knows", ["moderation warn", "validation warn"]),
    ],
)
async def test_a_stream_that_is_not_called_safe_is_told_of_and_not_stored(
    house: Open, said: str, told: list[str]
) -> None:
    here = await house({"a": ["x"], "c": [said]}, enable_caching=True, **MODERATION)
    heard: list[str] = []
    here.system.validation.listener = lambda event: heard.append(f"{event.name} {event.label}")

    assert [(await streamed(here))[1] for _ in range(2)] == ["miss", "miss"]
    assert heard == told * 2
    assert here.at_rest


async def test_a_stream_that_is_wrong_anyway_is_not_moderated(house: Open) -> None:
    here = await house({"a": ["x"], "c": ["safe"]}, **MODERATION)
    await streamed(here, **JSON)

    assert here.provider.asked == ["openai/a"]
    assert here.system.validation.stats()["findings"] == {"json": 1}
    assert here.at_rest


async def test_where_too_many_streams_wait_for_the_moderation_one_is_not_asked_about(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house({"a": ["x"], "c": ["safe"]}, enable_caching=True, **MODERATION)
    monkeypatch.setattr(desk, "CARRIED_MAX", 0)

    assert [(await streamed(here))[1] for _ in range(2)] == ["miss", "miss"]
    assert here.provider.asked == ["openai/a"] * 2
    assert here.system.validation.stats()["findings"] == {"moderation": 2}
    assert here.at_rest


async def test_a_system_that_closes_waits_for_no_moderation(house: Open) -> None:
    limits = {"concurrent_requests": 2}
    here = await house({"a": ["x"], "c": ["safe"]}, rate_limit_config=limits, **MODERATION)
    here.provider.steps["openai/c"] = [asyncio.Event()]
    await streamed(here)
    assert not here.at_rest

    await here.system.cache.close()

    assert here.at_rest


async def test_who_wants_a_stream_whole_has_it_moderated_before_it_is_handed_on(
    house: Open,
) -> None:
    here = await house({"a": ["bad"], "c": ["unsafe"]}, **MODERATION)
    gate = asyncio.Event()
    here.provider.gates = [asyncio.Event(), gate]
    here.provider.gates[0].set()
    call = here.call()
    call.body["stream"] = True
    stream = await here.pipeline.stream(call)
    whole = asyncio.create_task(here.pipeline.answer(here.call()))
    await settle()
    gate.set()
    said = [chunk async for chunk in stream.chunks]
    with pytest.raises(ResponseValidationError, match="unsafe"):
        await whole
    await settle()

    assert said
    assert sorted(here.provider.asked) == ["openai/a", "openai/a", "openai/c", "openai/c"]
    assert here.at_rest


async def test_who_joins_an_answer_that_was_called_safe_asks_nobody(house: Open) -> None:
    here = await house({"a": ["good"], "c": ["safe"]}, **MODERATION)
    results = await asyncio.gather(*(here.pipeline.answer(here.call()) for _ in range(3)))

    assert sorted(str(r.facts.cache) for r in results) == ["joined", "joined", "miss"]
    assert here.provider.asked == ["openai/a", "openai/c"]


async def test_a_completion_is_asked_for_once_more_too(house: Open) -> None:
    here = await house({"a": ["ant", "cod"]}, validation={"repair": True})
    here.system.validation.add_blocked_pattern("insects", "ant")
    body = {"model": "m", "prompt": "a fish:"}
    result = await here.pipeline.answer(Call("completion", body, "acme", "req_c"))

    assert result.answer.body["choices"][0]["text"] == "cod"
    assert here.provider.bodies[1]["prompt"].startswith("a fish:ant\n\nThis is not valid: ")
    assert result.facts.cost_nano == 14
    assert here.at_rest


async def test_a_completion_that_cannot_be_asked_again_is_not(house: Open) -> None:
    here = await house({"a": ["ant", "cod"]}, validation={"repair": True})
    here.system.validation.add_blocked_pattern("insects", "ant")
    body = {"model": "m", "prompt": [1, 2]}
    with pytest.raises(ResponseValidationError, match="'insects' blocks"):
        await here.pipeline.answer(Call("completion", body, "acme", "req_c"))

    assert len(here.provider.asked) == 1
    assert here.at_rest


async def test_a_blocked_pattern_of_the_configuration_holds(house: Open) -> None:
    patterns = {"projects": "(?i)bluebird"}
    here = await house({"a": ["BlueBird"]}, validation={"blocked_patterns": patterns})
    with pytest.raises(ResponseValidationError, match="what 'projects' blocks"):
        await here.pipeline.answer(here.call())


async def test_an_answer_that_was_stored_under_other_rules_is_not_served(house: Open) -> None:
    here = await house({"a": ["BlueBird"]}, enable_caching=True)
    stored = [(await here.pipeline.answer(here.call())).facts.cache for _ in range(2)]
    here.system.validation.add_blocked_pattern("projects", "(?i)bluebird")
    assert here.pipeline.at_once(here.call()) is None
    with pytest.raises(ResponseValidationError, match="what 'projects' blocks"):
        await here.pipeline.answer(here.call())
    here.system.validation.remove("projects")

    assert stored == ["miss", "hit"]
    assert (await here.pipeline.answer(here.call())).facts.cache == "hit"


async def test_findings_are_among_the_metrics(house: Open) -> None:
    here = await house({"a": [json.dumps("a@b.io")]})
    await here.pipeline.answer(here.call())

    line = b'forebay_validation_findings_total{rule="pii",severity="warning"} 1.0'
    assert line in here.system.metrics()


async def test_what_no_json_can_say_is_refused_before_anybody_is_asked(house: Open) -> None:
    here = await house({"a": ["fine"]}, enable_caching=True)
    for odd in ({"a": {1: {}, "b": {}}}, {"a": object()}, {"a": float("nan")}):
        call = here.call()
        schema = {"name": "s", "schema": odd}
        call.body["response_format"] = {"type": "json_schema", "json_schema": schema}
        assert here.pipeline.at_once(call) is None
        with pytest.raises(InvalidRequest, match="cannot be sent as JSON"):
            await here.pipeline.answer(call)

    assert here.provider.asked == []
    assert here.at_rest
