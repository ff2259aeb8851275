"""Everything is an entry: what each kind of request leaves in the ledger, row by row."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import pytest

from forebay.call import Call
from forebay.errors import GatewayError, GatewayTimeout, ProviderError
from tests.support.fake_time import settle
from tests.support.house import USAGE, House

Open = Callable[..., Awaitable[House]]
Row = dict[str, Any]
Kind = Callable[[House], Awaitable[list[Call]]]

DOWN = ProviderError("down", upstream_status=500)
LOST = GatewayTimeout("the provider said nothing")
ONE_A_MINUTE = {
    "requests_per_minute": 1,
    "requests_per_hour": 1000,
    "burst_size": 1,
    "concurrent_requests": 5,
}


async def answered(here: House, *calls: Call) -> list[Call]:
    """They are made one after the other, and end as they end."""
    for call in calls:
        try:
            await here.pipeline.answer(call)
        except GatewayError:
            continue
    return list(calls)


async def streamed(here: House, *calls: Call, chunks: int = 100) -> list[Call]:
    """The same; the client leaves after so many chunks."""
    for call in calls:
        try:
            stream = await here.pipeline.stream(call)
            async with aclosing(stream.chunks):
                for _ in range(chunks):
                    if await anext(stream.chunks, None) is None:
                        break
        except GatewayError:
            continue
    return list(calls)


async def together(here: House, gate: asyncio.Event, *calls: Call) -> list[Call]:
    """All of them under way at once, until the gate lets their provider answer."""
    tasks = [asyncio.create_task(here.pipeline.answer(call)) for call in calls]
    while not here.provider.asked:
        await settle()
    await settle()
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    return list(calls)


def completion(here: House) -> Call:
    return Call("completion", {"model": "m", "prompt": "hi"}, "acme", here.call().request_id)


# ------------------------------------------------------------------------------- the kinds


async def a_chat(here: House) -> list[Call]:
    return await answered(here, here.call())


async def a_completion(here: House) -> list[Call]:
    return await answered(here, completion(here))


async def an_embedding(here: House) -> list[Call]:
    return await answered(here, here.texts("one"))


async def two_that_share_a_call(here: House) -> list[Call]:
    """Each has its part of the 9 nano-USD, by what it sent: 3 and 8 of 11 bytes."""
    calls = [here.texts("one"), here.texts("two")]
    calls[1].body["input"] = ["two", "three"]
    await together(here, asyncio.Event(), *calls)
    assert [len(texts) for texts in here.provider.texts] == [3]
    return calls


async def two_that_fail_together(here: House) -> list[Call]:
    here.provider.steps["openai/text-embedding-x"] = [DOWN]
    return await together(here, asyncio.Event(), here.texts("one"), here.texts("two"))


async def a_stream(here: House) -> list[Call]:
    return await streamed(here, here.call())


async def a_stream_that_the_provider_cuts(here: House) -> list[Call]:
    here.provider.cut = ProviderError("the line is dead")
    return await streamed(here, here.call())


async def a_stream_whose_client_leaves(here: House) -> list[Call]:
    return await streamed(here, here.call(), chunks=1)


async def a_stream_that_fails_over(here: House) -> list[Call]:
    here.provider.steps["openai/a"] = [DOWN]
    return await streamed(here, here.call())


async def a_failure(here: House) -> list[Call]:
    here.provider.steps["openai/a"] = [DOWN]
    return await answered(here, here.call())


async def a_timeout(here: House) -> list[Call]:
    here.provider.steps["openai/a"] = [LOST]
    return await answered(here, here.call(max_tokens=10))


async def an_own_deadline(here: House) -> list[Call]:
    here.provider.steps["openai/a"] = [asyncio.Event()]
    return await answered(here, here.call(timeout_s=0.02))


async def a_client_that_leaves(here: House) -> list[Call]:
    here.provider.steps["openai/a"] = [asyncio.Event()]
    call = here.call(max_tokens=10)
    task = asyncio.create_task(here.pipeline.answer(call))
    while not here.provider.asked:
        await settle()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return [call]


async def an_invalid_answer(here: House) -> list[Call]:
    here.provider.choices = [
        {"index": 0, "message": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
    ]
    return await answered(here, here.call())


async def a_hit(here: House) -> list[Call]:
    return (await answered(here, here.call(), here.call()))[1:]


async def a_streamed_hit(here: House) -> list[Call]:
    await answered(here, here.call())
    return await streamed(here, here.call())


async def vectors_that_are_stored(here: House) -> list[Call]:
    return (await answered(here, here.texts("one"), here.texts("one")))[1:]


async def two_that_join_a_third(here: House) -> list[Call]:
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    return await together(here, gate, *(here.call() for _ in range(3)))


async def one_that_joins_a_failure(here: House) -> list[Call]:
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [(gate, DOWN)]
    return await together(here, gate, here.call(), here.call())


async def one_that_follows_a_stream(here: House) -> list[Call]:
    here.provider.gates = [asyncio.Event(), asyncio.Event()]
    calls = [here.call(), here.call()]
    tasks = [asyncio.create_task(streamed(here, call)) for call in calls]
    for gate in here.provider.gates:
        await settle()
        gate.set()
    await asyncio.gather(*tasks)
    return calls


async def one_that_asks_for_tools(here: House) -> list[Call]:
    function = {"name": "weather", "arguments": "{}"}
    asked = [{"id": f"c{n}", "type": "function", "function": function} for n in range(2)]
    message = {"role": "assistant", "content": None, "tool_calls": asked}
    here.provider.choices = [{"index": 0, "message": message, "finish_reason": "tool_calls"}]
    plain, stream = here.call(), here.call("again")
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    for call in (plain, stream):
        call.body["tools"] = [tool]
    return [*await answered(here, plain), *await streamed(here, stream)]


async def a_prompt_that_the_provider_has_cached(here: House) -> list[Call]:
    details: Any = {"cached_tokens": 2}
    here.provider.usage = {**USAGE, "prompt_tokens_details": details}
    return await answered(here, here.call())


async def one_without_a_price(here: House) -> list[Call]:
    here.provider.cost_nano = here.provider.token_nano = None
    return await answered(here, here.call())


async def an_unknown_model(here: House) -> list[Call]:
    return await answered(here, here.call(model="nobody"))


async def one_over_its_limit(here: House) -> list[Call]:
    return (await answered(here, *(here.call(f"hello {n}") for n in range(3))))[1:]


async def one_whose_breaker_is_open(here: House) -> list[Call]:
    here.provider.steps["openai/a"] = [DOWN]
    await answered(here, here.call("first"))
    await here.state("openai/a")
    return await answered(here, here.call())


async def one_without_a_key(here: House) -> list[Call]:
    calls = [Call("chat", {}, "forebay/nobody", here.call().request_id) for _ in range(3)]
    for call in calls:
        here.pipeline.refused(call, 401)
    return calls


# ------------------------------------------------------------------- and what they leave


def posted(**fields: Any) -> Row:
    return {"status": "posted", "price_version": "list 1", "cost_nano": 7, **fields}


def free(status: str, **fields: Any) -> Row:
    return {"status": status, "cost_nano": 0, "price_version": "", "deployment": "", **fields}


def voided(**fields: Any) -> Row:
    return {"status": "voided", "cost_nano": 0, "price_version": "", "http_status": 502, **fields}


def refused(http_status: int, **fields: Any) -> Row:
    return free("refused", http_status=http_status, **fields)


CALLED = {"prompt_tokens": 3, "completion_tokens": 2}
OK = {"error": None, "http_status": 200, "estimated": False}
FALLBACK = {"fallbacks": [{"m": ["spare"]}], "max_retries": 0}
TABLE: list[tuple[Kind, dict[str, Any], list[list[Row]]]] = [
    (a_chat, {}, [[posted(**CALLED, **OK, route="chat", model="m", response_id="1")]]),
    (a_completion, {}, [[posted(**CALLED, **OK, route="completion")]]),
    (an_embedding, {}, [[posted(**OK, route="embedding", prompt_tokens=1, cost_nano=9)]]),
    (
        two_that_share_a_call,
        {"enable_request_batching": True, "batch_timeout": 0.02},
        [[posted(prompt_tokens=1, cost_nano=2)], [posted(prompt_tokens=2, cost_nano=7)]],
    ),
    (
        two_that_fail_together,
        {"enable_request_batching": True, "batch_timeout": 0.02, "max_retries": 0},
        [[voided(attempt=1)], [voided(attempt=1)]],
    ),
    (a_stream, {}, [[posted(**CALLED, **OK, stream=True)]]),
    (
        a_stream_that_the_provider_cuts,
        {},
        [[posted(stream=True, estimated=True, http_status=502, error="ProviderError: ")]],
    ),
    (
        a_stream_whose_client_leaves,
        {},
        [[posted(stream=True, estimated=True, completion_tokens=1)]],
    ),
    (
        a_stream_that_fails_over,
        FALLBACK,
        [[voided(attempt=1, stream=True), posted(attempt=2, stream=True, model="m")]],
    ),
    (a_failure, {"max_retries": 1}, [[voided(attempt=1), posted(attempt=2, **CALLED)]]),
    (a_failure, FALLBACK, [[voided(attempt=1), posted(attempt=2, model="m")]]),
    (a_failure, {"max_retries": 0}, [[voided(attempt=1)]]),
    (
        a_timeout,
        {"max_retries": 0},
        [[{"status": "unsettled", "http_status": 504, "price_version": "list 1"}]],
    ),
    (an_own_deadline, {}, [[{"status": "unsettled", "http_status": 504}]]),
    (a_client_that_leaves, {}, [[{"status": "unsettled", "http_status": 499}]]),
    (
        an_invalid_answer,
        {"validation_level": "strict"},
        [[posted(error="ResponseValidationError: ", http_status=502)]],
    ),
    (a_hit, {"enable_caching": True}, [[free("hit", saved_nano=7, response_id="1")]]),
    (a_streamed_hit, {"enable_caching": True}, [[free("hit", saved_nano=7)]]),
    (vectors_that_are_stored, {"enable_caching": True}, [[free("hit", saved_nano=7)]]),
    (
        two_that_join_a_third,
        {},
        [[posted()], [free("joined", saved_nano=7)], [free("joined", saved_nano=7)]],
    ),
    (
        one_that_joins_a_failure,
        {"max_retries": 0},
        [[voided()], [free("joined", http_status=502, saved_nano=0)]],
    ),
    (
        one_that_follows_a_stream,
        {},
        [[posted(stream=True)], [free("joined", saved_nano=7)]],
    ),
    (one_that_asks_for_tools, {}, [[posted(tool_calls=2)], [posted(tool_calls=2, stream=True)]]),
    (a_prompt_that_the_provider_has_cached, {}, [[posted(cached_tokens=2, prompt_tokens=3)]]),
    (one_without_a_price, {}, [[posted(cost_nano=0, unpriced=True, price_version="")]]),
    (an_unknown_model, {}, [[refused(404, model="")]]),
    # Refusals of one kind in one second are one entry, which tells of the first.
    (one_over_its_limit, {"rate_limit_config": ONE_A_MINUTE}, [[refused(429, requests=2)], []]),
    (
        one_whose_breaker_is_open,
        {"max_retries": 0, "circuit_breaker_config": {"failure_threshold": 1}},
        [[refused(503, model="m")]],
    ),
    (one_without_a_key, {}, [[refused(401, tenant="forebay/nobody", requests=3)], [], []]),
]


@pytest.mark.parametrize(
    ("kind", "options", "rows"),
    TABLE,
    ids=[f"{kind.__name__}-{number}" for number, (kind, _, _) in enumerate(TABLE)],
)
async def test_each_kind_of_request_leaves_its_rows(
    house: Open, kind: Kind, options: dict[str, Any], rows: list[list[Row]]
) -> None:
    here = await house(**options)
    calls = await kind(here)
    found = [await here.entries(call) for call in calls]
    told = [
        [
            {name: _told(getattr(entry, name), wanted[name]) for name in wanted}
            for entry, wanted in zip(entries, wants, strict=True)
        ]
        for entries, wants in zip(found, rows, strict=True)
    ]
    assert told == rows
    assert here.at_rest
    # Each request is in the books once, however many attempts it took.
    usage = await here.system.books.usage()
    assert usage["total_requests"] == here._number
    ends = ("successful_requests", "refused_requests", "failed_requests")
    assert usage["total_requests"] == sum(usage[name] for name in ends)


def _told(value: Any, wanted: Any) -> Any:
    """What is to be compared; of an error its beginning only."""
    return value[: len(wanted)] if isinstance(value, str) and isinstance(wanted, str) else value


@pytest.mark.parametrize("when", ["before it opens", "when it settles"])
async def test_what_fails_inside_us_leaves_nothing_open(house: Open, when: str) -> None:
    here = await house()

    def broken(*_: object, **__: object) -> int:
        raise ZeroDivisionError(when)

    here.provider.price = broken  # type: ignore[method-assign]
    here.provider.cost_nano = None
    if when == "before it opens":
        here.provider.chat_stream = broken  # type: ignore[method-assign, assignment]
    call = here.call()
    with pytest.raises(ZeroDivisionError):
        await streamed(here, call)

    (entry,) = await here.entries(call)
    assert entry.status == "unsettled"
    assert entry.cost_nano > 0
    assert here.at_rest
