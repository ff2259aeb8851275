"""Retries and fallbacks as a plan: which deployment is next, and after what pause."""

from __future__ import annotations

import random

import pytest

from actors.circuit_breaker.policy import Refusal, State, Verdict
from forebay.attempts import THROTTLED_CODE, Plan, refusal_error, refused_by
from forebay.errors import (
    CircuitBreakerOpenError,
    DeploymentsBusy,
    GatewayTimeout,
    InvalidRequest,
    ProviderError,
    RateLimitError,
)
from forebay.routing import Deployment


def deployment(name: str) -> Deployment:
    return Deployment(id=name, group="g", model=f"openai/{name}", provider="openai", params={})


def plan(
    groups: dict[str, list[str]],
    max_retries: int = 2,
    retry_delay_s: float = 1.0,
    special: dict[str, list[str]] | None = None,
    usual: int | None = None,
) -> Plan:
    """`special` holds lists by "kind group"; only the first `usual` groups are usual ones."""
    lists = special or {}
    return Plan(
        list(groups)[:usual],
        lambda group: [deployment(name) for name in groups[group]],
        max_retries=max_retries,
        retry_delay_s=retry_delay_s,
        rng=random.Random(7),
        special=lambda kind, group: lists.get(f"{kind} {group}", []),
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


def test_a_fallback_begins_with_one_that_has_not_asked_for_a_pause() -> None:
    attempts = plan({"g": ["a"], "h": ["a", "b"]}, max_retries=0)
    first = attempts.next()
    error = RateLimitError("slow down", retry_after_s=5.0)
    attempts.failed(first.deployment, error, Verdict.THROTTLED)
    second = attempts.next()

    assert (first.deployment.id, second.deployment.id) == ("a", "b")
    assert second.is_fallback


def test_retry_after_of_the_provider_is_never_cut_short() -> None:
    attempts = plan({"g": ["a"]}, retry_delay_s=0.1)
    attempts.next()
    attempts.failed(deployment("a"), RateLimitError("slow", retry_after_s=5.0), Verdict.THROTTLED)

    assert 5.0 < attempts.next().pause_s <= 5.5


def test_retries_are_bounded_and_the_last_error_is_what_callers_get() -> None:
    attempts = plan({"g": ["a"]}, max_retries=2)
    for number in range(3):
        tried = attempts.next()
        attempts.failed(tried.deployment, ProviderError(f"down {number}"), Verdict.FAILURE)

    with pytest.raises(ProviderError, match="down 2"):
        attempts.next()
    assert attempts.retries == 2


def test_of_two_that_failed_the_one_that_may_be_called_sooner_is_next() -> None:
    attempts = plan({"g": ["a", "b"]}, max_retries=2)
    throttled = RateLimitError("slow", retry_after_s=30.0, upstream_status=429)
    attempts.failed(attempts.next().deployment, throttled, Verdict.THROTTLED)
    attempts.failed(attempts.next().deployment, ProviderError("503"), Verdict.FAILURE)
    third = attempts.next(60.0)

    assert third.deployment.id == "b"
    assert third.pause_s <= 1.0


def test_a_group_is_not_left_while_one_of_it_can_be_called_in_time() -> None:
    attempts = plan({"g": ["a", "b"], "h": ["c"]}, max_retries=3)
    for error in (
        ProviderError("503"),
        RateLimitError("slow", retry_after_s=9.0, upstream_status=429),
        ProviderError("503", retry_after_s=90.0),
    ):
        tried = attempts.next(60.0)
        attempts.failed(tried.deployment, error, Verdict.FAILURE)

    assert tried.deployment.id == "a", "and now it has been tried more often, and waits longer"
    assert attempts.next(60.0).deployment.id == "b"

    attempts = plan({"g": ["a", "b"], "h": ["c"]}, max_retries=3)
    for asked_s in (0.0, 90.0, 0.0):
        error = ProviderError("503", retry_after_s=asked_s)
        attempts.failed(attempts.next(60.0).deployment, error, Verdict.FAILURE)
    assert attempts.next(60.0).deployment.id == "a", "though b was tried less"


def test_max_retries_counts_over_all_groups() -> None:
    attempts = plan({"g": ["a", "b"], "h": ["c", "d"]}, max_retries=2)
    made = []
    with pytest.raises(ProviderError):
        while True:
            made.append(attempts.next())
            attempts.failed(made[-1].deployment, ProviderError("down"), Verdict.FAILURE)

    assert [(t.deployment.id, t.is_retry) for t in made] == [
        ("a", False),
        ("b", True),
        ("a", True),
        ("c", False),
    ]


def test_the_first_attempt_of_a_fallback_group_is_no_retry() -> None:
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
        attempts.refused(attempts.next().deployment, retry_after_s, "open")

    with pytest.raises(CircuitBreakerOpenError, match="is OPEN") as caught:
        attempts.next()
    assert caught.value.retry_after_s == 4.0


def test_an_open_breaker_costs_no_retry() -> None:
    attempts = plan({"g": ["a", "b"]}, max_retries=0)
    attempts.refused(attempts.next().deployment, 1.0, "open")

    assert attempts.next().deployment.id == "b"
    assert attempts.retries == 0


def test_when_every_deployment_is_busy_the_error_says_when_the_first_is_free() -> None:
    attempts = plan({"g": ["a", "b"]})
    for retry_after_s in (9.0, 4.0):
        attempts.refused(attempts.next().deployment, retry_after_s, "busy")

    with pytest.raises(DeploymentsBusy, match="own rpm or tpm") as caught:
        attempts.next()
    assert caught.value.retry_after_s == 4.0
    assert attempts.retries == 0


def test_a_busy_deployment_goes_before_an_open_breaker() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.refused(attempts.next().deployment, 1.0, "open")
    attempts.refused(attempts.next().deployment, 7.0, "busy")

    with pytest.raises(DeploymentsBusy) as caught:
        attempts.next()
    assert caught.value.retry_after_s == 1.0, "when the first of all may be tried"


def test_what_failed_is_what_callers_get_even_if_the_rest_was_busy() -> None:
    attempts = plan({"g": ["a", "b"]}, max_retries=1)
    attempts.failed(attempts.next().deployment, ProviderError("down"), Verdict.CREDENTIAL)
    attempts.refused(attempts.next().deployment, 1.0, "busy")

    with pytest.raises(ProviderError, match="down"):
        attempts.next()


def test_after_a_wait_the_plan_begins_anew_with_the_first_group() -> None:
    attempts = plan({"g": ["a"], "h": ["b"]})
    for _ in range(2):
        attempts.refused(attempts.next().deployment, 1.0, "busy")
    with pytest.raises(DeploymentsBusy):
        attempts.next()
    attempts.again()
    first = attempts.next()

    assert first.deployment.id == "a"
    assert (first.is_retry, first.is_fallback, first.pause_s) == (False, False, 0.0)
    assert (attempts.retries, attempts.fallbacks) == (0, 0)


def test_a_refusal_of_an_earlier_round_is_forgotten() -> None:
    attempts = plan({"g": ["a"]})
    attempts.refused(attempts.next().deployment, 1.0, "busy")
    attempts.again()
    attempts.refused(attempts.next().deployment, 5.0, "busy")

    with pytest.raises(DeploymentsBusy) as caught:
        attempts.next()
    assert caught.value.retry_after_s == 5.0


# ------------------------------------------------------------------------- what each refusal is


def test_throttled_deployments_make_a_429_and_not_an_open_breaker() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.refused(attempts.next().deployment, 9.0, "open")
    attempts.refused(attempts.next().deployment, 4.0, "throttled")

    with pytest.raises(RateLimitError, match="asked for a pause") as caught:
        attempts.next()
    assert (caught.value.retry_after_s, caught.value.code) == (4.0, THROTTLED_CODE)


def test_of_an_open_and_a_throttled_deployment_the_sooner_one_counts() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.refused(attempts.next().deployment, 2.0, "open")
    attempts.refused(attempts.next().deployment, 40.0, "throttled")

    with pytest.raises(RateLimitError) as caught:
        attempts.next()
    assert caught.value.retry_after_s == 2.0


def test_of_a_busy_and_a_throttled_deployment_the_sooner_one_counts() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.refused(attempts.next().deployment, 9.0, "busy")
    attempts.refused(attempts.next().deployment, 4.0, "throttled")

    with pytest.raises(DeploymentsBusy) as caught:
        attempts.next()
    assert caught.value.retry_after_s == 4.0


@pytest.mark.parametrize(
    ("state", "why"),
    [(State.OPEN, "open"), (State.FORCED_OPEN, "open"), (State.CLOSED, "throttled")],
)
def test_a_refusal_is_the_same_after_its_way_through_the_batcher(state: State, why: str) -> None:
    error = refusal_error(deployment("a"), Refusal("a", 4.0, state))

    assert (refused_by(error), error.retry_after_s) == (why, 4.0)
    assert ("is OPEN" in str(error)) == (why == "open")


def test_a_providers_own_429_is_no_refusal_of_ours() -> None:
    assert refused_by(RateLimitError("slow down", upstream_status=429)) is None
    assert refused_by(ProviderError("down")) is None


# ------------------------------------------------------------------------------------ the budget


def test_without_budget_the_group_is_over_and_its_fallback_goes_on() -> None:
    attempts = plan({"g": ["a", "b"], "h": ["c"]})
    attempts.failed(attempts.next().deployment, ProviderError("down"), Verdict.FAILURE)
    assert attempts.next().is_retry
    attempts.spent()
    fallback = attempts.next()

    assert (fallback.deployment.id, fallback.is_retry) == ("c", False)
    assert (attempts.retries, attempts.fallbacks) == (0, 1)


def test_without_budget_and_fallback_callers_get_what_happened() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.failed(attempts.next().deployment, ProviderError("down"), Verdict.FAILURE)
    attempts.next()
    attempts.spent()

    with pytest.raises(ProviderError, match="down"):
        attempts.next()
    assert attempts.retries == 0


# --------------------------------------------------------------------------- special fallbacks

TOO_LONG = InvalidRequest("too long", code="context_length_exceeded")


def test_a_prompt_that_is_too_long_goes_to_the_groups_for_it_and_no_others() -> None:
    groups = {"g": ["a", "b"], "h": ["c"], "big": ["d"]}
    attempts = plan(groups, special={"context_window g": ["big"]}, usual=2)
    attempts.failed(attempts.next().deployment, TOO_LONG, Verdict.IGNORED)
    tried = attempts.next()

    assert (tried.deployment.id, tried.is_fallback, tried.is_retry) == ("d", True, False)
    attempts.failed(tried.deployment, ProviderError("down"), Verdict.CREDENTIAL)
    with pytest.raises(ProviderError, match="down"):
        attempts.next()
    assert attempts.fallbacks == 1


def test_a_group_that_refuses_too_goes_on_with_its_own_list_but_never_in_a_circle() -> None:
    lists = {"context_window g": ["big"], "context_window big": ["g", "bigger"]}
    attempts = plan({"g": ["a"], "big": ["b"], "bigger": ["c"]}, special=lists, usual=1)
    for expected in ("a", "b"):
        tried = attempts.next()
        assert tried.deployment.id == expected
        attempts.failed(tried.deployment, TOO_LONG, Verdict.IGNORED)
    assert attempts.next().deployment.id == "c"

    with pytest.raises(InvalidRequest, match="too long"):
        attempts.failed(deployment("c"), TOO_LONG, Verdict.IGNORED)


def test_a_fallback_that_finds_the_prompt_too_long_uses_the_first_groups_list() -> None:
    groups = {"g": ["a"], "h": ["b"], "big": ["c"]}
    attempts = plan(groups, 0, special={"context_window g": ["big"]}, usual=2)
    attempts.failed(attempts.next().deployment, ProviderError("down"), Verdict.FAILURE)
    attempts.failed(attempts.next().deployment, TOO_LONG, Verdict.IGNORED)

    assert attempts.next().deployment.id == "c"


@pytest.mark.parametrize("code", ["content_filter", "content_policy_violation"])
def test_what_a_filter_refuses_goes_to_groups_with_another_policy(code: str) -> None:
    lists = {"content_policy g": ["h"]}
    attempts = plan({"g": ["a"], "h": ["b"]}, special=lists, usual=1)
    refused = InvalidRequest("no", code=code)
    attempts.failed(attempts.next().deployment, refused, Verdict.IGNORED)

    assert attempts.next().deployment.id == "b"


def test_without_a_list_for_it_a_refusal_is_final_whatever_fallbacks_there_are() -> None:
    attempts = plan({"g": ["a"], "h": ["b"]}, special={"content_policy g": ["h"]})
    tried = attempts.next()

    with pytest.raises(InvalidRequest, match="too long"):
        attempts.failed(tried.deployment, TOO_LONG, Verdict.IGNORED)


def test_beginning_anew_forgets_the_turn() -> None:
    lists = {"context_window g": ["big"]}
    attempts = plan({"g": ["a"], "big": ["b"]}, special=lists, usual=1)
    attempts.failed(attempts.next().deployment, TOO_LONG, Verdict.IGNORED)
    attempts.again()

    assert attempts.next().deployment.id == "a"


# --------------------------------------------------------------------------------------- timeouts


def test_a_timeout_that_blames_nobody_is_tried_elsewhere_while_there_is_time() -> None:
    attempts = plan({"g": ["a", "b"]})
    attempts.failed(attempts.next().deployment, GatewayTimeout("slow"), Verdict.IGNORED)

    assert attempts.next(left_s=5.0).deployment.id == "b"


def test_when_time_is_up_callers_get_what_happened_last() -> None:
    attempts = plan({"g": ["a", "b"], "h": ["c"]})
    attempts.failed(attempts.next().deployment, GatewayTimeout("slow"), Verdict.IGNORED)

    with pytest.raises(GatewayTimeout, match="slow"):
        attempts.next(left_s=0.0)
    assert attempts.fallbacks == 0
