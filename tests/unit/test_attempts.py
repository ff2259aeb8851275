"""Retries and fallbacks as a plan: which deployment is next, and after what pause."""

from __future__ import annotations

import random

import pytest

from actors.circuit_breaker.policy import Verdict
from forebay.attempts import Plan
from forebay.errors import (
    CircuitBreakerOpenError,
    DeploymentsBusy,
    InvalidRequest,
    ProviderError,
    RateLimitError,
)
from forebay.routing import Deployment


def deployment(name: str) -> Deployment:
    return Deployment(id=name, group="g", model=f"openai/{name}", provider="openai", params={})


def plan(groups: dict[str, list[str]], max_retries: int = 2, retry_delay_s: float = 1.0) -> Plan:
    return Plan(
        list(groups),
        lambda group: [deployment(name) for name in groups[group]],
        max_retries=max_retries,
        retry_delay_s=retry_delay_s,
        rng=random.Random(7),
    )


def test_a_retry_goes_to_another_deployment_at_once() -> None:
    attempts = plan({"g": ["a", "b"]})
    first = attempts.next()
    attempts.failed(first.deployment, ProviderError("down"), Verdict.FAILURE)
    second = attempts.next()

    assert (first.deployment.id, second.deployment.id) == ("a", "b")
    assert second.pause_s == 0
    assert second.is_retry


def test_a_second_try_of_the_same_deployment_waits_with_full_jitter() -> None:
    pauses = set()
    for seed in range(50):
        attempts = Plan(
            ["g"],
            lambda _: [deployment("a")],
            max_retries=3,
            retry_delay_s=1.0,
            rng=random.Random(seed),
        )
        attempts.next()
        attempts.failed(deployment("a"), ProviderError("down"), Verdict.FAILURE)
        pauses.add(attempts.next().pause_s)

    assert all(0 <= pause <= 1.0 for pause in pauses)
    assert max(pauses) - min(pauses) > 0.5


def test_retry_after_of_the_provider_is_never_cut_short() -> None:
    attempts = plan({"g": ["a"]}, retry_delay_s=0.1)
    attempts.next()
    attempts.failed(deployment("a"), RateLimitError("slow", retry_after_s=5.0), Verdict.THROTTLED)

    assert attempts.next().pause_s == 5.0


def test_retries_are_bounded_and_the_last_error_is_what_callers_get() -> None:
    attempts = plan({"g": ["a"]}, max_retries=2)
    for number in range(3):
        tried = attempts.next()
        attempts.failed(tried.deployment, ProviderError(f"down {number}"), Verdict.FAILURE)

    with pytest.raises(ProviderError, match="down 2"):
        attempts.next()
    assert attempts.retries == 2


def test_a_fallback_group_has_retries_of_its_own() -> None:
    attempts = plan({"g": ["a"], "h": ["b"]}, max_retries=0)
    attempts.failed(attempts.next().deployment, ProviderError("down"), Verdict.FAILURE)
    fallback = attempts.next()

    assert fallback.deployment.id == "b"
    assert fallback.is_fallback
    assert not fallback.is_retry
    assert attempts.fallbacks == 1


def test_the_callers_own_mistake_is_raised_at_once() -> None:
    attempts = plan({"g": ["a", "b"]})
    tried = attempts.next()

    with pytest.raises(InvalidRequest):
        attempts.failed(tried.deployment, InvalidRequest("bad"), Verdict.IGNORED)


def test_a_bad_credential_is_not_tried_twice() -> None:
    attempts = plan({"g": ["a", "b"]}, max_retries=3)
    attempts.failed(attempts.next().deployment, ProviderError("401"), Verdict.CREDENTIAL)

    assert {attempts.next().deployment.id for _ in range(3)} == {"b"}


def test_when_every_breaker_is_open_the_error_says_when_the_first_closes() -> None:
    attempts = plan({"g": ["a", "b"]})
    for retry_after_s in (9.0, 4.0):
        attempts.refused(attempts.next().deployment, retry_after_s)

    with pytest.raises(CircuitBreakerOpenError, match="is OPEN") as caught:
        attempts.next()
    assert caught.value.retry_after_s == 4.0


def test_an_open_breaker_costs_no_retry() -> None:
    attempts = plan({"g": ["a", "b"]}, max_retries=0)
    attempts.refused(attempts.next().deployment, 1.0)

    assert attempts.next().deployment.id == "b"
    assert attempts.retries == 0


def test_when_every_deployment_is_busy_the_error_says_when_the_first_is_free() -> None:
    attempts = plan({"g": ["a", "b"]})
    for retry_after_s in (9.0, 4.0):
        attempts.refused(attempts.next().deployment, retry_after_s, busy=True)

    with pytest.raises(DeploymentsBusy, match="own rpm or tpm") as caught:
        attempts.next()
    assert caught.value.retry_after_s == 4.0
    assert attempts.retries == 0


def test_a_busy_deployment_goes_before_an_open_breaker() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.refused(attempts.next().deployment, 1.0)
    attempts.refused(attempts.next().deployment, 7.0, busy=True)

    with pytest.raises(DeploymentsBusy) as caught:
        attempts.next()
    assert caught.value.retry_after_s == 7.0


def test_what_failed_is_what_callers_get_even_if_the_rest_was_busy() -> None:
    attempts = plan({"g": ["a", "b"]}, max_retries=1)
    attempts.failed(attempts.next().deployment, ProviderError("down"), Verdict.CREDENTIAL)
    attempts.refused(attempts.next().deployment, 1.0, busy=True)

    with pytest.raises(ProviderError, match="down"):
        attempts.next()


def test_after_a_wait_the_plan_begins_anew_with_the_first_group() -> None:
    attempts = plan({"g": ["a"], "h": ["b"]})
    for _ in range(2):
        attempts.refused(attempts.next().deployment, 1.0, busy=True)
    with pytest.raises(DeploymentsBusy):
        attempts.next()
    attempts.again()
    first = attempts.next()

    assert first.deployment.id == "a"
    assert (first.is_retry, first.is_fallback, first.pause_s) == (False, False, 0.0)
    assert (attempts.retries, attempts.fallbacks) == (0, 0)


def test_a_refusal_of_an_earlier_round_is_forgotten() -> None:
    attempts = plan({"g": ["a"]})
    attempts.refused(attempts.next().deployment, 1.0, busy=True)
    attempts.again()
    attempts.refused(attempts.next().deployment, 5.0, busy=True)

    with pytest.raises(DeploymentsBusy) as caught:
        attempts.next()
    assert caught.value.retry_after_s == 5.0
