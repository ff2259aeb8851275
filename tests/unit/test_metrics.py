"""What is counted: names and labels as dashboards expect them."""

from __future__ import annotations

from actors.circuit_breaker.policy import Verdict
from forebay.metrics import TENANTS_MAX, Meter, PromptCache


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
        'forebay_request_seconds_bucket{le="0.001",route="chat"} 2.0',
        'forebay_request_seconds_bucket{le="0.0025",route="chat"} 3.0',
        'forebay_request_seconds_bucket{le="300.0",route="chat"} 3.0',
        'forebay_request_seconds_bucket{le="+Inf",route="chat"} 4.0',
        'forebay_request_seconds_count{route="chat"} 4.0',
        'forebay_request_seconds_sum{route="chat"} 400.0026',
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


def test_what_is_in_the_cache_is_told_while_its_owners_do() -> None:
    counted = meter()
    assert "forebay_cache_bytes" not in counted.render().decode()
    counted.stored({"entries": 5, "bytes": 150, "evicted": 1})

    found = counted.render().decode().splitlines()
    assert {"forebay_cache_entries 5.0", "forebay_cache_bytes 150.0"} <= set(found)
    assert "forebay_cache_evictions_total 1.0" in found
    counted.stored(None)
    assert "forebay_cache_bytes" not in counted.render().decode()


def test_look_ups_are_counted_and_whoever_wants_to_know_is_told() -> None:
    counted = meter()
    told: list[int] = []
    counted.looked_up = lambda: told.append(1)
    for outcome in ("hit", "miss", "miss", "joined", "hit", "hit"):
        counted.cache(outcome)

    assert counted.lookups() == (3, 2, 1)
    assert len(told) == 6
    assert 'forebay_cache_total{outcome="hit"} 3.0' in lines(counted, "forebay_cache_total")


def test_prompt_caches_are_told_as_they_are_when_asked() -> None:
    counted = meter()
    figures = {"cached_tokens": 5, "written_tokens": 7, "saved_usd": -0.5}
    counted.registry.register(PromptCache(lambda: figures))
    assert lines(counted, "forebay_prompt_cache_tokens_total") == [
        'forebay_prompt_cache_tokens_total{kind="read"} 5.0',
        'forebay_prompt_cache_tokens_total{kind="written"} 7.0',
    ]
    figures["saved_usd"] = 2.5

    assert "forebay_prompt_cache_saved_usd 2.5" in counted.render().decode()
