"""The ledger's figures in users' words: reports, metrics, costs, and moments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

import pytest

from actors.ledger.owner import Ledger
from actors.ledger.policy import DAY_MS
from actors.ref import OwnerUnavailable
from forebay import usage
from forebay.call import Call
from forebay.errors import InvalidRequest, Overloaded
from tests.support.house import House
from tests.unit.test_ledger_owner import entry

NOW_S = 1_767_225_600.0  # 2026-01-01
NOW_MS = int(NOW_S * 1000)
HOUR_MS = 3_600_000


@pytest.fixture
async def ledger() -> AsyncIterator[Ledger]:
    made = Ledger()
    some = [
        entry(1, at_ms=NOW_MS - 1, cost_nano=1_000),
        entry(2, at_ms=NOW_MS - HOUR_MS, cost_nano=20_000, deployment="d2", model="large"),
        entry(3, at_ms=NOW_MS - 2 * HOUR_MS, tenant="zenith", cost_nano=300_000),
        entry(4, at_ms=NOW_MS - 2 * HOUR_MS, status="hit", saved_nano=5_000_000),
        entry(5, at_ms=NOW_MS - 3 * HOUR_MS, status="unsettled", cost_nano=7, error="lost"),
        entry(6, at_ms=NOW_MS - 3 * HOUR_MS, unpriced=True, cost_nano=0),
        entry(7, at_ms=NOW_MS - 30 * DAY_MS, cost_nano=4_000_000),
        entry(8, at_ms=NOW_MS, cost_nano=10**9),
    ]
    await made.append("h", 1, some)
    yield made
    await made.close()


async def test_a_report_is_exact_in_nano_and_has_usd_beside_it(ledger: Ledger) -> None:
    told = await usage.report(ledger, NOW_S, since_s=NOW_S - 86_400, until_s=NOW_S)

    assert (told["total_cost_nano"], told["total_cost"]) == (321_000, 0.000321)
    assert (told["saved_cost"], told["unsettled_cost"]) == (0.005, 7e-9)
    assert told["by_model"]["large"]["total_cost"] == 0.00002
    assert "data" not in told


async def test_metrics_are_of_the_last_hours_by_the_hour(ledger: Ledger) -> None:
    told = await usage.metrics(ledger, NOW_S, tenant="acme", hours=2.5)

    assert (told["start"], told["end"]) == (
        "2025-12-31T21:30:00.000+00:00",
        "2026-01-01T00:00:00.000+00:00",
    )
    assert (told["total_cost_nano"], told["cache_hits"], told["attempts"]) == (21_000, 1, 2)
    assert list(told["by_hour"]) == ["2025-12-31T22:00Z", "2025-12-31T23:00Z"]
    assert told["by_deployment"]["d2"]["total_cost_nano"] == 20_000
    assert told["latency_ms_p50"] > 0


async def test_metrics_of_long_are_by_the_day(ledger: Ledger) -> None:
    told = await usage.metrics(ledger, NOW_S, tenant=None, hours=31 * 24)

    assert list(told["by_day"]) == ["2025-12-02", "2025-12-31"]
    ever = await usage.metrics(ledger, NOW_S, tenant=None, hours=float("inf"))
    assert (ever["start"], ever["by_day"]) == (None, told["by_day"])


async def test_costs_say_where_the_money_went_and_what_is_not_known(ledger: Ledger) -> None:
    told = await usage.costs(ledger, NOW_S, tenant=None, since_s=NOW_S - 86_400)

    assert told == {
        "total_cost": 1.000321,
        "total_cost_nano": 1_000_321_000,
        "saved_cost": 0.005,
        "unsettled_cost": 7e-9,
        "unpriced_entries": 1,
        "cost_per_request": 1.000321 / 7,
        "by_model": {"large": 0.00002, "small": 1.000301},
        "by_day": {"2025-12-31": 0.000321, "2026-01-01": 1.0},
        "by_tenant": {"acme": 1.000021, "zenith": 0.0003},
    }


async def test_a_tenants_costs_name_no_other_tenant(ledger: Ledger) -> None:
    told = await usage.costs(ledger, NOW_S, tenant="zenith", since_s=None)

    assert told["total_cost"] == 0.0003
    assert "by_tenant" not in told


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"group_by": "colour"}, "group_by"),
        ({"group_by": ["day", "colour"]}, "group_by"),
        ({"since_s": 5.0, "until_s": 4.0}, "end"),
        ({"group_by": "hour"}, "start"),
        ({"group_by": "hour", "since_s": NOW_S - 8 * 86_400}, "start"),
        ({"group_by": "hour", "since_s": 0.0, "until_s": 8 * 86_400.0}, "start"),
    ],
)
async def test_what_makes_no_sense_is_named(
    ledger: Ledger, asked: dict[str, object], param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await usage.report(ledger, NOW_S, **asked)  # type: ignore[arg-type]

    assert (caught.value.param, caught.value.status) == (param, 400)


async def test_a_ledger_that_is_away_is_asked_again_later() -> None:
    class Away(Ledger):
        async def usage(self, *args: object) -> dict[str, object]:
            raise OwnerUnavailable("ledger", "gone")

    with pytest.raises(Overloaded) as caught:
        await usage.report(Away(), NOW_S)

    assert caught.value.retry_after_s == 1.0


@pytest.mark.parametrize(
    ("given", "when"),
    [
        ("2026-01-31", datetime(2026, 1, 31, tzinfo=UTC)),
        ("2026-01-31T12:30", datetime(2026, 1, 31, 12, 30, tzinfo=UTC)),
        ("2026-01-31T00:00:00+02:00", datetime(2026, 1, 30, 22, tzinfo=UTC)),
        ("2026-01-31T00:00:00Z", datetime(2026, 1, 31, tzinfo=UTC)),
        ("1769817600.5", datetime(2026, 1, 31, 0, 0, 0, 500_000, tzinfo=UTC)),
    ],
)
def test_a_moment_is_utc_where_it_does_not_say(given: str, when: datetime) -> None:
    assert usage.moment(given) == when.timestamp()


@pytest.mark.parametrize("given", ["", "soon", "nan", "inf", "20260131", "2026", "1e18"])
def test_what_is_no_moment_is_refused(given: str) -> None:
    with pytest.raises(ValueError, match=r"^must be "):
        usage.moment(given)


# --- what really happened -----------------------------------------------------------------------


@pytest.mark.parametrize(("cached", "told_of_each"), [(20, 20), (99, 30)])
async def test_the_figures_are_those_of_the_calls(
    house: Callable[..., Awaitable[House]], cached: int, told_of_each: int
) -> None:
    here = await house()
    here.provider.usage = {
        "prompt_tokens": 30,
        "completion_tokens": 2,
        "total_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": cached},  # type: ignore[dict-item]
    }
    for number in range(3):
        body = {"model": "m", "messages": [{"role": "user", "content": f"{number}"}]}
        await here.system.pipeline.answer(Call("chat", body, "default", f"r{number}"))
    told = await here.system.books.usage(group_by=("model", "deployment"))

    assert (told["total_requests"], told["attempts"], told["success_rate"]) == (3, 3, 1.0)
    assert (told["prompt_tokens"], told["cached_prompt_tokens"]) == (90, 3 * told_of_each)
    assert told["total_cost_nano"] == 3 * 7
