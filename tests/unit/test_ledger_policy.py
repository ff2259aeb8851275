from __future__ import annotations

import pickle
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.ledger.policy import STATUSES, Entry, LedgerFull, StoreFailed, Totals, fold, nano


def entry(number: int = 1, **fields: object) -> Entry:
    values: dict[str, object] = {
        "id": f"e{number}",
        "request_id": f"r{number}",
        "attempt": 1,
        "tenant": "acme",
        "route": "chat",
        "model": "small",
        "deployment": "d1",
        "status": "posted",
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "cost_nano": 300,
        "unpriced": False,
        "estimated": False,
        "stream": False,
        "latency_ms": 12,
        "at_ms": 1_700_000_000_000,
        "error": None,
        "http_status": 200,
    }
    return Entry(**{**values, **fields})  # type: ignore[arg-type]


entries = st.builds(
    entry,
    number=st.integers(0, 10**6),
    attempt=st.integers(1, 3),
    tenant=st.sampled_from(["acme", "zenith"]),
    model=st.sampled_from(["small", "large"]),
    status=st.sampled_from(STATUSES),
    prompt_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
    cost_nano=st.integers(0, 10**12),
    unpriced=st.booleans(),
    estimated=st.booleans(),
    error=st.sampled_from([None, "cut"]),
    at_ms=st.integers(0, 3 * 86_400_000),
)


def test_a_float_of_usd_counts_as_the_decimal_it_prints() -> None:
    assert nano(0.1) == 100_000_000
    assert nano(1.5e-7) == 150
    assert nano(0.1 + 0.2) == 300_000_000
    assert nano(Decimal("0.0000000015")) == nano(Decimal("0.0000000025")) == 2
    assert nano(0) == 0


@pytest.mark.parametrize("usd", [float("nan"), float("inf"), Decimal("NaN")])
def test_what_is_no_amount_of_money_is_an_error(usd: float | Decimal) -> None:
    with pytest.raises(ValueError, match="not an amount of money"):
        nano(usd)


@given(st.integers(0, 10**15))
def test_nano_usd_survive_a_trip_through_decimal_usd(amount: int) -> None:
    assert nano(Decimal(amount).scaleb(-9)) == amount


@given(st.lists(entries), st.randoms(use_true_random=False))
def test_totals_do_not_depend_on_order_or_grouping(some: list[Entry], random: object) -> None:
    whole = fold(some)
    shuffled = list(some)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = len(some) // 2
    assert fold(shuffled[:cut]) + fold(shuffled[cut:]) == whole
    assert whole - fold(some[:cut]) == fold(some[cut:])


@given(st.lists(entries))
def test_money_is_the_sum_of_the_posted_entries_only(some: list[Entry]) -> None:
    assert fold(some).cost_nano == sum(e.cost_nano for e in some if e.status == "posted")


def test_a_request_with_three_attempts_counts_once() -> None:
    attempts = [
        entry(1, request_id="r", attempt=1, status="voided", error="500", http_status=502),
        entry(2, request_id="r", attempt=2, status="voided", error="500", http_status=502),
        entry(3, request_id="r", attempt=3),
    ]
    figures = fold(attempts).as_dict()
    assert figures["total_requests"] == figures["successful_requests"] == 1
    assert figures["success_rate"] == 1.0
    assert figures["failed_requests"] == 0
    assert figures["total_tokens"] == 15
    assert figures["latency_ms_mean"] == 12


def test_two_requests_that_chose_one_id_are_two_requests() -> None:
    assert fold([entry(1, request_id="mine"), entry(2, request_id="mine")]).requests == 2


def test_a_cut_stream_is_paid_and_not_a_success() -> None:
    figures = fold([entry(1, error="client went away")]).as_dict()
    assert figures["total_cost_nano"] == 300
    assert figures["success_rate"] == 0.0
    assert figures["failed_requests"] == 1


def test_nothing_has_a_success_rate_of_zero_and_no_division_by_it() -> None:
    assert Totals().as_dict()["success_rate"] == 0.0


@given(entries)
def test_entries_survive_pickling(some: Entry) -> None:
    assert pickle.loads(pickle.dumps(some)) == some


def test_failures_survive_pickling() -> None:
    assert pickle.loads(pickle.dumps(StoreFailed("disk full"))).reason == "disk full"
    assert pickle.loads(pickle.dumps(LedgerFull(2.0, "full"))).retry_after_s == 2.0
