"""What is counted: names and labels as dashboards expect them."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from actors.circuit_breaker.policy import Verdict
from actors.ref import InlineRef, OwnerUnavailable
from actors.registry.sums import Sums
from forebay.errors import Overloaded
from forebay.metrics import SERIES_MAX, TENANTS_MAX, Meter, prompt_cache
from tests.support.fake_time import settle
from tests.support.house import open_house


def meter() -> Meter:
    return Meter(list)


def lines(meter: Meter, family: str) -> list[str]:
    return [line for line in meter.render().decode().splitlines() if line.startswith(family + "{")]


def test_every_verdict_is_an_outcome_of_provider_calls() -> None:
    counted = meter()
    for verdict in Verdict:
        counted.provider_call("d-1", verdict.value)

    found = lines(counted, "forebay_provider_calls_total")
    assert len(found) == len(Verdict)
    assert 'forebay_provider_calls_total{deployment="d-1",outcome="unreachable"} 1.0' in found
    assert 'forebay_provider_calls_total{deployment="d-1",outcome="slow"} 1.0' in found


def test_breakers_that_left_the_configuration_are_not_shown_any_more() -> None:
    counted = meter()
    counted.breaker("d-1", 2)
    counted.breaker("d-2", 0)
    before = lines(counted, "forebay_breaker_state")
    counted.breaker("d-2", 1)

    assert before == [
        'forebay_breaker_state{deployment="d-1"} 2.0',
        'forebay_breaker_state{deployment="d-2"} 0.0',
    ]
    assert lines(counted, "forebay_breaker_state") == [
        'forebay_breaker_state{deployment="d-2"} 1.0'
    ]


def test_times_are_in_buckets_that_add_up() -> None:
    counted = meter()
    for total_s in (0.0005, 0.001, 0.0011, 400.0):
        counted.request("chat", "m", "t", "ok", total_s, 0.0)
    text = counted.render().decode()

    for line in (
        'forebay_request_seconds_bucket{le="0.001"} 2.0',
        'forebay_request_seconds_bucket{le="0.0025"} 3.0',
        'forebay_request_seconds_bucket{le="300.0"} 3.0',
        'forebay_request_seconds_bucket{le="+Inf"} 4.0',
        "forebay_request_seconds_count 4.0",
        "forebay_request_seconds_sum 400.0026",
        'forebay_requests_total{model="m",route="chat",status="ok",tenant="t"} 4.0',
    ):
        assert line in text.splitlines()


def test_look_ups_are_counted_by_outcome() -> None:
    counted = meter()
    for outcome in ("hit", "miss", "hit"):
        counted.cache(outcome)

    assert lines(counted, "forebay_cache_total") == [
        'forebay_cache_total{outcome="hit"} 2.0',
        'forebay_cache_total{outcome="miss"} 1.0',
    ]


def test_tenants_beyond_the_bound_are_folded_into_one() -> None:
    counted = meter()
    for number in range(TENANTS_MAX + 3):
        counted.request("chat", "m", f"t{number}", "ok", 0.1, 0.1)

    found = lines(counted, "forebay_requests_total")
    assert len(found) == TENANTS_MAX + 1
    assert next(line for line in found if 'tenant="other"' in line).endswith(" 3.0")


def test_series_beyond_the_bound_are_counted_under_other_labels() -> None:
    counted = meter()
    for number in range(SERIES_MAX + 5):
        counted.provider_call(f"d{number}", "success")

    found = lines(counted, "forebay_provider_calls_total")
    assert len(found) == SERIES_MAX + 1
    assert found[-1] == 'forebay_provider_calls_total{deployment="other",outcome="other"} 5.0'


def test_every_name_of_the_contract_is_told_with_its_labels() -> None:
    ref = InlineRef("cache", object())
    ref.sent["lookup"] += 1
    counted = Meter(lambda: [ref])
    counted.request("chat", "m", "t", "ok", 0.2, 0.1)
    counted.first_token(0.1)
    counted.usage(3, 2, 7_000)
    counted.cache("hit")
    counted.coalesced(2)
    counted.provider_call("d", "success")
    counted.breaker("d", 1)
    counted.limited("t", "tokens_per_minute")
    counted.queued(0.5)
    counted.unsettled(4)
    text = counted.render().decode()

    for line in (
        'forebay_requests_total{model="m",route="chat",status="ok",tenant="t"} 1.0',
        "forebay_request_seconds_count 1.0",
        'forebay_route_seconds_count{route="chat"} 1.0',
        "forebay_overhead_seconds_sum 0.1",
        "forebay_time_to_first_token_seconds_count 1.0",
        'forebay_tokens_total{kind="prompt"} 3.0',
        'forebay_tokens_total{kind="completion"} 2.0',
        "forebay_cost_usd_total 7e-06",
        'forebay_cache_total{outcome="hit"} 1.0',
        "forebay_coalesced_texts_total 2.0",
        'forebay_provider_calls_total{deployment="d",outcome="success"} 1.0',
        'forebay_breaker_state{deployment="d"} 1.0',
        'forebay_rate_limited_total{kind="tokens_per_minute",tenant="t"} 1.0',
        'forebay_owner_messages_total{owner="cache"} 1.0',
        'forebay_owner_calls_total{method="lookup",owner="cache"} 1.0',
        "forebay_queue_seconds_count 1.0",
        "forebay_ledger_unsettled 4.0",
    ):
        assert line in text.splitlines()
    assert "forebay_ledger_unsettled 4.0" not in counted.render().decode(), "told once"


def test_two_processes_counts_add_up_to_one_text() -> None:
    sums = Sums()
    both = meter()
    for name, seconds in (("a", (0.1, 0.3)), ("b", (0.2, 70.0, 0.0005))):
        counted = meter()
        for second in seconds:
            for one in (counted, both):
                one.request("chat", "m", "t", "ok", second, 0.0)
                one.usage(5, 7, 123_456_789)
        sums.take(name, 1, 0, counted.figures())

    assert meter().render(sums.sums()) == both.render()


def test_what_this_version_does_not_know_is_left_out() -> None:
    figures = {
        ("forebay_gone", "x"): (1,),
        ("forebay_queue_seconds",): (1, 2, 3),
        ("forebay_owner_messages", "cache", "lookup"): (1,),
    }
    text = meter().render(figures).decode()

    assert "forebay_gone" not in text
    assert "forebay_owner_messages_total{" not in text
    assert "forebay_queue_seconds_count" not in text


def test_what_is_told_of_the_caches() -> None:
    counted = meter()
    counted.add(prompt_cache(lambda: {"cached_tokens": 5, "written_tokens": 2, "saved_usd": -0.25}))
    looked: list[int] = []
    counted.looked_up = lambda: looked.append(1)
    for outcome in ("hit", "joined", "hit"):
        counted.cache(outcome)
    counted.stored({"entries": 3, "bytes": 99, "evicted": 1})
    text = counted.render().decode().splitlines()

    assert counted.lookups() == (2, 0, 1)
    assert len(looked) == 3
    for line in (
        'forebay_prompt_cache_tokens_total{kind="read"} 5.0',
        'forebay_prompt_cache_tokens_total{kind="written"} 2.0',
        "forebay_prompt_cache_saved_usd -0.25",
        "forebay_cache_entries 3.0",
        "forebay_cache_bytes 99.0",
        "forebay_cache_evictions_total 1.0",
    ):
        assert line in text


async def test_the_systems_metrics_are_those_of_all_its_processes(tmp_path: Path) -> None:
    house = await open_house(tmp_path)
    try:
        house.system.meter.request("chat", "m", "t", "ok", 0.1, 0.1)
        other = {("forebay_requests", "chat", "m", "t", "ok"): (41,)}
        await house.system._refs["registry"].ask("tally", "another", 1, 0, other, False)
        text = (await house.system.system_metrics()).decode()

        assert 'forebay_requests_total{model="m",route="chat",status="ok",tenant="t"} 42.0' in text
        assert 'forebay_breaker_state{deployment="' in text
        assert "forebay_ledger_unsettled 0.0" in text
        assert 'forebay_owner_calls_total{method="tally",owner="registry"}' in text
    finally:
        await house.system.close()


async def test_the_wait_for_a_slot_is_told_once(tmp_path: Path) -> None:
    house = await open_house(tmp_path, rate_limit_config={"concurrent_requests": 1})
    system, passed = house.system, [0.0]
    clock = system.clock
    system.clock = lambda: clock() + passed[0]
    gate = asyncio.Event()
    house.provider.steps["openai/a"] = [gate]
    try:
        first = asyncio.create_task(house.pipeline.answer(house.call("a")))
        while not house.provider.asked:
            await asyncio.sleep(0)
        before = system.meter.figures().get(("forebay_queue_seconds",), ())
        second = asyncio.create_task(house.pipeline.answer(house.call("b", may_wait=True)))
        await settle()
        passed[0] = 4.0
        gate.set()
        await asyncio.gather(first, second)
        after = system.meter.figures()["forebay_queue_seconds",]

        assert sum(after[:-1]) - sum(before[:-1]) == 1
        assert after[-1] - sum(before[-1:]) >= 4e9
    finally:
        await system.close()


async def test_metrics_that_cannot_be_summed_are_refused_and_not_made_up(tmp_path: Path) -> None:
    house = await open_house(tmp_path)
    try:
        house.system.sums._ref = Away()
        with pytest.raises(Overloaded, match="metrics cannot be read now"):
            await house.system.system_metrics()
    finally:
        await house.system.close()


class Away:
    name = "registry"

    def __init__(self) -> None:
        self.sent: Counter[str] = Counter()

    async def ask(self, method: str, /, *args: object, timeout_s: float = 5.0) -> object:
        raise OwnerUnavailable(self.name, "it restarts")
