"""Usage over ranges and groups, against a naive fold, in both databases."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite

from actors.ledger import store
from actors.ledger import usage as usage_file
from actors.ledger.owner import READINGS_MAX, Ledger
from actors.ledger.policy import (
    DAY_MS,
    GROUPS,
    HOUR_MS,
    LATENCY_MS,
    LATENCY_MS_MAX,
    NOT_MADE,
    Entry,
    GroupBy,
    StoreFailed,
    Totals,
    fold,
    groups_of,
)
from actors.ledger.usage import OTHERS
from tests.unit.test_ledger_owner import Keep, entry, entry_lists, fresh, keep, with_ledger

__all__ = ["fresh", "keep"]


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def value_of(e: Entry, group: GroupBy) -> str:
    when = datetime.fromtimestamp(e.at_ms / 1000, UTC)
    if group == "day":
        return when.strftime("%Y-%m-%d")
    return when.strftime("%Y-%m-%dT%H:00Z") if group == "hour" else str(getattr(e, group))


def naive(
    some: list[Entry], tenant: str | None, since: int | None, until: int | None, groups: Any
) -> dict[str, Any]:
    """The same answer, from the entries one by one."""
    mine = [
        e
        for e in some
        if tenant in (None, e.tenant)
        if (since is None or e.at_ms >= since) and (until is None or e.at_ms < until)
    ]

    def grouped(*by: GroupBy) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
        keys = {tuple(value_of(e, group) for group in by) for e in mine}
        for key in sorted(keys):
            same = fold(e for e in mine if key == tuple(value_of(e, g) for g in by))
            yield key, same.as_dict(by_attempt="deployment" in by)

    told: dict[str, Any] = fold(mine).as_dict()
    for group in dict.fromkeys((*groups, "model")):
        told[f"by_{group}"] = {key[0]: figures for key, figures in grouped(group)}
    if groups:
        told["data"] = [
            {**dict(zip(groups, key, strict=True)), **figures} for key, figures in grouped(*groups)
        ]
    return told


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_file, "STEP_ROWS", 3)


times = st.none() | st.integers(-1, 3 * DAY_MS + 1) | st.sampled_from([0, DAY_MS, 2 * DAY_MS])


@pytest.mark.parametrize("rows", [1, 4, 10_000])
@given(
    some=entry_lists,
    tenant=st.sampled_from([None, "acme", "zenith", "nobody"]),
    since=times,
    until=times,
    groups=st.lists(st.sampled_from(GROUPS), max_size=3, unique=True),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_fold_of_the_entries(
    some: list[Entry],
    tenant: str | None,
    since: int | None,
    until: int | None,
    groups: list[GroupBy],
    rows: int,
) -> None:
    if "hour" in groups and since is None:
        since = 0

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, some)
        told = await ledger.usage(tenant, since, until, groups)
        assert told == naive(some, tenant, since, until, groups)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_file, "STEP_ROWS", rows)
        asyncio.run(with_ledger(work))


SOME = [
    entry(
        number,
        at_ms=ms(when) + shift,
        model=("small", "large")[number % 2],
        tenant=("acme", "zenith", "acme")[number % 3],
        deployment=f"d{number % 4}",
        latency_ms=7 * number,
        cached_tokens=number % 5,
    )
    for number, (when, shift) in enumerate(
        product(
            ["2025-12-31", "2026-01-01", "2026-02-28", "2026-03-01", "2026-03-01T05:00"],
            [-1, 0, 1, HOUR_MS - 1, HOUR_MS],
        )
    )
]
ENDS = [
    "2025-12-31",
    "2025-12-31T23:59:59.999",
    "2026-01-01",
    "2026-01-01T00:00:00.001",
    "2026-02-28T23:00",
    "2026-03-01",
    "2026-03-01T05:00",
    "2026-03-02",
]


async def test_ranges_over_midnight_and_the_ends_of_months_and_years(
    keep: Keep, small_steps: None
) -> None:
    asked: list[tuple[str | None, tuple[GroupBy, ...]]] = [
        (None, ("model", "day")),
        ("acme", ("hour", "deployment")),
    ]

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, SOME)
        for since, until in product(ENDS, ENDS):
            for tenant, groups in asked:
                told = await ledger.usage(tenant, ms(since), ms(until), groups)
                assert told == naive(SOME, tenant, ms(since), ms(until), groups)
        told = await ledger.usage(None, ms("2025-12-31T23:59"), ms("2026-01-01T00:01"), "hour")
        assert list(told["by_hour"]) == ["2025-12-31T23:00Z", "2026-01-01T00:00Z"]

    await with_ledger(work, keep)


@pytest.mark.parametrize("group", GROUPS)
async def test_a_tenants_figures_have_nothing_of_anothers(keep: Keep, group: GroupBy) -> None:
    async def work(ledger: Ledger) -> None:
        since = ms("2025-01-01")
        await ledger.append("h", 1, [e for e in SOME if e.tenant == "acme"])
        alone = await ledger.usage("acme", since, None, group)
        await ledger.append("h", 2, [e for e in SOME if e.tenant != "acme"])
        assert await ledger.usage("acme", since, None, group) == alone
        both = await ledger.usage(None, since, None, group)
        others = await ledger.usage("zenith", since, None, group)
        assert both["total_cost_nano"] == alone["total_cost_nano"] + others["total_cost_nano"]
        assert others["total_cost_nano"] > 0

    await with_ledger(work, keep)


async def test_appends_are_acknowledged_between_the_steps_of_a_reading(
    keep: Keep, small_steps: None
) -> None:
    async def work(ledger: Ledger) -> None:
        first = [entry(n, at_ms=n * DAY_MS) for n in range(40)]
        await ledger.append("h", 1, first)
        reading = asyncio.create_task(ledger.usage(group_by="day"))
        await asyncio.sleep(0)  # its first step is asked for
        assert await ledger.append("h", 2, [entry(40, at_ms=0), entry(41, at_ms=39 * DAY_MS)]) == 42
        assert not reading.done()
        told = await reading
        # What was there before is in the answer, and what came meanwhile may be.
        assert told["entries"] in (40, 41, 42)
        assert sum(day["entries"] for day in told["by_day"].values()) == told["entries"]
        assert (await ledger.usage())["entries"] == 42

    await with_ledger(work, keep)


async def test_what_is_beyond_the_most_groups_is_added_up(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_file, "GROUPS_MAX", 2)
    monkeypatch.setattr(usage_file, "GROUPS_KEPT_MAX", 3)
    some = [
        entry(n * 10 + k, model=f"m{n}", at_ms=n * DAY_MS) for n in range(6) for k in range(n + 1)
    ]

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, some)
        told = await ledger.usage(group_by=["day", "model"])
        for part in (told["by_model"], told["by_day"]):
            assert len(part) == 3
            assert list(part)[-1] == OTHERS
            assert sum(one["entries"] for one in part.values()) == len(some)
        assert [row["model"] for row in told["data"]][-1] == OTHERS
        assert sum(row["total_cost_nano"] for row in told["data"]) == fold(some).cost_nano
        assert told["total_cost_nano"] == fold(some).cost_nano

    await with_ledger(work, keep)


async def test_readings_have_a_bound_and_what_ends_makes_room(small_steps: None) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(1)])
        asked = [ledger.usage() for _ in range(READINGS_MAX + 1)]
        told = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(told[-1], StoreFailed)
        assert all(isinstance(one, dict) for one in told[:-1])
        assert ledger.stats()["failing"] is None
        assert (await ledger.usage())["entries"] == 1

    await with_ledger(work)


async def test_hours_and_groups_that_make_no_sense_are_refused() -> None:
    async def work(ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="since when"):
            await ledger.usage(group_by=["model", "hour"])
        with pytest.raises(ValueError, match="group_by is one of"):
            await ledger.usage(group_by=["model", "colour"])  # type: ignore[list-item]
        assert (await ledger.usage())["entries"] == 0

    await with_ledger(work)


def test_a_group_counts_once_however_often_it_is_named() -> None:
    assert groups_of(["day", "model", "day"]) == ("day", "model")
    assert groups_of("tenant") == ("tenant",)
    assert groups_of(None) == groups_of([]) == ()


async def test_long_texts_are_kept_where_they_are_part_of_an_index(keep: Keep) -> None:
    long = "\U0001f600" * 2000

    async def work(ledger: Ledger) -> None:
        mine = entry(1, tenant=long, model=long, deployment=long, route=long)
        assert await ledger.append("h", 1, [mine]) == 1
        told = await ledger.usage(long, group_by=["tenant", "deployment"])
        assert (told["total_requests"], len(told["data"])) == (1, 1)

    await with_ledger(work, keep)


async def test_a_deployments_rate_of_success_is_that_of_the_attempts_there() -> None:
    async def told(ledger: Ledger) -> dict[str, Any]:
        failed = {"status": "voided", "error": "500", "http_status": 502, "deployment": "down"}
        saved = {"attempt": 2, "deployment": "spare"}
        some = [entry(1, request_id="r", **failed), entry(2, request_id="r", **saved)]
        some += [entry(3, deployment="spare"), entry(4, status="hit", deployment="")]
        await ledger.append("p", 1, some)
        return await ledger.usage(group_by=("model", "deployment"))

    ledger = Ledger()
    try:
        found = await told(ledger)
    finally:
        await ledger.close()
    rates = {name: one["success_rate"] for name, one in found["by_deployment"].items()}
    assert rates == {"": 1.0, "down": 0.0, "spare": 1.0}
    assert [row["success_rate"] for row in found["data"]] == [1.0, 0.0, 1.0]
    assert found["success_rate"] == 1.0


def test_a_rate_of_success_is_never_above_one() -> None:
    # The first attempt of its request was before midnight.
    assert fold([entry(1, attempt=2)]).as_dict()["success_rate"] == 1.0
    assert fold([entry(1, attempt=2), entry(2)]).as_dict()["success_rate"] == 1.0


def test_attempts_are_what_a_provider_was_asked_for() -> None:
    asked = [entry(n, status=status) for n, status in enumerate(("posted", "voided", "unsettled"))]
    free = [entry(n, status=status) for n, status in enumerate(("hit", "joined", "refused"), 3)]
    dropped = entry(9, status="voided", attempt=NOT_MADE)
    told = fold([*asked, *free, dropped])
    assert (told.attempts, told.entries) == (3, 7)


@given(latencies=st.lists(st.integers(0, LATENCY_MS_MAX), min_size=1), part=st.floats(0.01, 1))
def test_a_percentile_is_right_to_within_its_step(latencies: list[int], part: float) -> None:
    told = fold(entry(n, latency_ms=one) for n, one in enumerate(latencies)).latency(part)
    rank = max(1, -int(-part * len(latencies) // 1))
    true = sorted(latencies)[rank - 1]
    steps = (0, *LATENCY_MS, LATENCY_MS_MAX)
    low, high = next((low, high) for low, high in pairwise(steps) if true <= high)
    assert low <= told <= high


def test_nothing_served_took_no_time() -> None:
    assert Totals().latency(0.5) == 0.0
    assert fold([entry(1, status="voided", latency_ms=50)]).latency(0.99) == 0.0


async def test_an_append_looks_at_what_it_brought_and_at_no_older_entry(tmp_path: Path) -> None:
    path = tmp_path / "ledger.db"
    await with_ledger(lambda ledger: ledger.append("h", 1, [entry(1)]), Keep(str(path)))
    for statement in (store._GROUPS, store._FOLD_ENTRIES):
        bound = statement.params(after=1)
        sql = bound.compile(dialect=sqlite.dialect(), compile_kwargs={"literal_binds": True})
        with closing(sqlite3.connect(path)) as connection:
            plan = [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}")]
        assert plan[0] == "SEARCH ledger_entries USING INTEGER PRIMARY KEY (rowid>?)"


async def test_unsettled_entries_are_counted_over_restarts_and_once(keep: Keep) -> None:
    lost = [entry(n, status="unsettled", error="lost") for n in range(3)]

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [*lost, entry(3), entry(9, status="open")])
        assert await ledger.unsettled() == 3
        await ledger.holder_gone("h")
        told = await ledger.usage()
        assert await ledger.unsettled() == told["unsettled_entries"] == 4

    await with_ledger(work, keep)
    assert await with_ledger(lambda ledger: ledger.unsettled(), keep) == 4
