"""The ledger's store: openings, totals, upgrades, owners, and a server that goes away."""

from __future__ import annotations

import asyncio
import logging
import os
import sqlite3
import traceback
from pathlib import Path

import pytest
from sqlalchemy import create_engine, inspect

from actors.ledger import store
from actors.ledger.owner import Ledger
from actors.ledger.policy import COLUMNS, DAY_MS, SUMS, Entry, StoreFailed, fold
from actors.ledger.rows import TEXT_BYTES_MAX
from tests.support.postgres_server import PASSWORD, PostgresServer, postgres_server
from tests.unit.test_ledger_owner import NOW_MS, Keep, entry, fresh, keep, with_ledger

__all__ = ["fresh", "keep"]


def opened(number: int, **fields: object) -> Entry:
    return entry(number, status="open", **fields)


def statement(keep: Keep, sql: str) -> None:
    """What somebody else does to the tables while no ledger is open."""
    if keep.path is not None:
        connection = sqlite3.connect(keep.path)
        connection.execute(sql)
        connection.commit()
        connection.close()
    else:
        engine = create_engine(str(keep.url).replace("postgresql:", "postgresql+psycopg:"))
        with engine.begin() as other:
            other.exec_driver_sql(sql)
        engine.dispose()


async def test_an_announced_call_counts_when_it_is_settled_and_once(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        assert await ledger.append("p1", 1, [opened(1, cost_nano=900), opened(2)]) == 0
        assert await ledger.append("p1", 1, [opened(1, cost_nano=900), opened(2)]) == 0
        assert (await ledger.usage())["entries"] == await ledger.count() == 0
        assert await ledger.holders() == {"p1": 2}
        assert ledger.stats()["open"] == 2
        # Its end may come with company, from another process, and before its own announcement.
        assert await ledger.append("p2", 1, [entry(1), opened(3), entry(4), opened(4)]) == 2
        assert await ledger.holders() == {"p1": 1, "p2": 1}
        assert await ledger.append("p1", 2, [opened(1), opened(4)]) == 2
        assert await ledger.holders() == {"p1": 1, "p2": 1}
        assert (await ledger.usage())["total_cost_nano"] == 301 + 304

    await with_ledger(work, keep)
    assert await with_ledger(lambda ledger: ledger.holders(), keep) == {"p1": 1, "p2": 1}


async def test_what_is_known_is_found_in_messages_of_any_size(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "IDS_PER_QUERY", 8)

    async def work(ledger: Ledger) -> None:
        last = 0
        for first, size in ((100, 1), (200, 7), (300, 8), (400, 9), (500, 20)):
            some = [entry(first + n) for n in range(size)]
            kept = await ledger.append("h", 1, some[::2])
            assert await ledger.append("h", 2, [opened(99), *some, opened(first)]) == last + size
            assert await ledger.append("h", 1, some[::2]) == kept
            last += size
            assert await ledger.count() == last
        assert ledger.stats()["open"] == 1

    await with_ledger(work, keep)


async def test_texts_are_cut_where_they_are_indexed_and_kept_whole_elsewhere(keep: Keep) -> None:
    long = "x" * TEXT_BYTES_MAX
    some = [
        entry(1, tenant=long + "y", request_id="r", error=long + "y", price_version=long + "y"),
        entry(2, tenant=long, request_id="r", error="ü", model="é" * TEXT_BYTES_MAX),
    ]

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, some)
        first, second = await ledger.entries("r")
        assert first == some[0]._replace(tenant=long)
        assert second == some[1]._replace(model="é" * (TEXT_BYTES_MAX // 2))

    await with_ledger(work, keep)


async def test_what_a_dead_process_announced_is_unsettled_at_the_most_it_may_cost(
    keep: Keep,
) -> None:
    async def work(ledger: Ledger) -> None:
        mine = [opened(n, cost_nano=1000 * n, at_ms=NOW_MS) for n in (1, 2)]
        await ledger.append("dead", 1, [*mine, opened(3, tenant="zenith")])
        await ledger.append("alive", 1, [opened(4)])
        await ledger.append("dead", 2, [entry(3, tenant="zenith")])
        assert await ledger.holder_gone("dead") == 2
        assert await ledger.holder_gone("dead") == 0
        assert await ledger.holders() == {"alive": 1}
        usage = await ledger.usage("acme")
        assert (usage["unsettled_entries"], usage["unsettled_cost_nano"]) == (2, 3000)
        assert (usage["total_cost_nano"], usage["failed_requests"]) == (0, 2)
        (lost,) = await ledger.entries("r1")
        assert (lost.status, lost.cost_nano, lost.error) == ("unsettled", 1000, store.LOST)
        # Limits count what may have been spent.
        (spent,) = await ledger.spent(["acme"], NOW_MS)
        assert (spent.day_nano, spent.month_nano) == (3000, 3000)
        # What is settled stays so.
        await ledger.append("dead", 3, [entry(1)])
        assert await ledger.entries("r1") == [lost]

    await with_ledger(work, keep)


async def test_sums_of_whole_days_and_of_their_parts_are_one_answer(keep: Keep) -> None:
    some = [
        entry(n, at_ms=n * DAY_MS // 7, model=f"m{n % 3}", tenant=f"t{n % 2}") for n in range(60)
    ]
    marks = [None, 0, 1, DAY_MS - 1, DAY_MS, DAY_MS + 1, 3 * DAY_MS, 5 * DAY_MS + 77, 9 * DAY_MS]

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, some)
        for since in marks:
            for until in marks:
                told = await ledger.usage("t1", since, until, "day")
                mine = [
                    e
                    for e in some
                    if e.tenant == "t1" and e.at_ms >= (since or 0)
                    if until is None or e.at_ms < until
                ]
                by_model, by_day = told.pop("by_model"), told.pop("by_day")
                assert [row["day"] for row in told.pop("data")] == list(by_day)
                assert told == fold(mine).as_dict()
                assert set(by_model) == {e.model for e in mine}
                assert set(by_day) == {f"1970-01-{e.at_ms // DAY_MS + 1:02}" for e in mine}

    await with_ledger(work, keep)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE ledger_sums SET cost_nano = cost_nano + 1 WHERE model = 'small'",
        "UPDATE ledger_entries SET cost_nano = cost_nano - 1 WHERE number = 7",
        "DELETE FROM ledger_entries WHERE number = 7",
        "DELETE FROM ledger_entries WHERE number = 9",
        "DELETE FROM ledger_sums",
    ],
)
async def test_a_ledger_whose_totals_are_not_its_entries_is_not_opened(
    keep: Keep, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHECKPOINT_ENTRIES", 5)

    async def fill(ledger: Ledger) -> None:
        for number in range(1, 10):
            await ledger.append("h", number, [entry(number)])

    await with_ledger(fill, keep)
    statement(keep, damage)

    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="ledger_sums") as failure:
            await ledger.append("h", 10, [entry(10)])
        assert ledger.stats()["failing"] == failure.value.reason

    await with_ledger(work, keep)


async def test_sums_that_are_emptied_are_made_again_from_the_entries(keep: Keep) -> None:
    some = [entry(n) for n in range(1, 10)]
    await with_ledger(lambda ledger: ledger.append("h", 1, some), keep)
    statement(keep, "UPDATE ledger_entries SET cost_nano = 1 WHERE number = 7")
    statement(keep, "DELETE FROM ledger_sums")
    usage = await with_ledger(lambda ledger: ledger.usage(), keep)
    assert usage["total_cost_nano"] == fold(some).cost_nano - 307 + 1


async def test_a_start_that_made_the_sums_anew_has_folded_for_those_that_come(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = [entry(n) for n in range(1, 10)]
    await with_ledger(lambda ledger: ledger.append("h", 1, some), keep)
    statement(keep, "DELETE FROM ledger_sums")
    monkeypatch.setattr(store, "CHECKPOINT_ENTRIES", 5)
    await with_ledger(lambda ledger: ledger.count(), keep)
    # What is before the checkpoint is not looked at again, by starts or by appends.
    statement(keep, "UPDATE ledger_entries SET cost_nano = 1 WHERE number = 9")
    assert await with_ledger(lambda ledger: ledger.append("h", 2, [entry(10)]), keep) == 10
    usage = await with_ledger(lambda ledger: ledger.usage(), keep)
    assert usage["total_cost_nano"] == fold([*some, entry(10)]).cost_nano


async def test_a_start_folds_what_came_after_the_last_checkpoint(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "CHECKPOINT_ENTRIES", 10)

    async def fill(ledger: Ledger) -> None:
        for start in range(1, 36, 7):
            await ledger.append("h", start, [entry(n) for n in range(start, start + 7)])

    await with_ledger(fill, keep)
    # Up to the last checkpoint entries are not looked at again, after it they are.
    statement(keep, "UPDATE ledger_entries SET cost_nano = 1 WHERE number = 28")
    assert await with_ledger(lambda ledger: ledger.count(), keep) == 35
    statement(keep, "UPDATE ledger_entries SET cost_nano = 1 WHERE number = 29")

    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="numbered 35"):
            await ledger.count()

    await with_ledger(work, keep)


OLD = """
CREATE TABLE entries (id TEXT NOT NULL UNIQUE, request_id TEXT NOT NULL, attempt INTEGER NOT NULL,
tenant TEXT NOT NULL, route TEXT NOT NULL, model TEXT NOT NULL, deployment TEXT NOT NULL,
status TEXT NOT NULL, prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
cost_nano INTEGER NOT NULL, unpriced INTEGER NOT NULL, estimated INTEGER NOT NULL,
stream INTEGER NOT NULL, latency_ms INTEGER NOT NULL, at_ms INTEGER NOT NULL, error TEXT,
http_status INTEGER NOT NULL);
CREATE INDEX entries_by_tenant ON entries (tenant, at_ms);
CREATE INDEX entries_by_request ON entries (request_id);
"""
OLD_DAYS = """
CREATE TABLE days (tenant TEXT NOT NULL, day INTEGER NOT NULL, cost_nano INTEGER NOT NULL,
PRIMARY KEY (tenant, day)) WITHOUT ROWID;
"""


@pytest.mark.parametrize("version", [1, 2])
async def test_a_ledger_of_an_older_version_becomes_a_new_one(version: int, tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    some = [entry(n, at_ms=NOW_MS + n * DAY_MS) for n in range(3)]
    some.append(entry(3, status="voided", at_ms=NOW_MS, error="gone"))
    connection = sqlite3.connect(old)
    connection.executescript(OLD + (OLD_DAYS if version == 2 else ""))
    for e in some:
        marks = ", ".join("?" * 18)
        connection.execute(f"INSERT INTO entries VALUES ({marks})", e.values()[:18])
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()

    async def work(ledger: Ledger) -> None:
        (told,) = await ledger.spent(["acme"], NOW_MS)
        assert told[:5] == (4, 19_675, 300, 2023 * 12 + 10, 300 + 301 + 302)
        assert [(await ledger.entries(e.request_id))[0] for e in some] == some
        assert await ledger.append("h", 1, [entry(2), entry(4)]) == 5

    await with_ledger(work, Keep(str(old)))
    await with_ledger(lambda ledger: ledger.count(), Keep(str(new)))
    assert shape(old) == shape(new)
    assert await with_ledger(lambda ledger: ledger.count(), Keep(str(old))) == 5


def shape(path: Path) -> dict[str, object]:
    found = inspect(create_engine(f"sqlite:///{path}"))
    return {
        table: (
            sorted(str(column) for column in found.get_columns(table)),
            [
                {
                    **index,
                    "dialect_options": {k: str(v) for k, v in index["dialect_options"].items()},
                }
                for index in found.get_indexes(table)
            ],
        )
        for table in found.get_table_names()
    }


async def test_a_ledger_of_the_third_version_learns_of_answers_and_feedback(keep: Keep) -> None:
    await with_ledger(lambda ledger: ledger.append("h", 1, [entry(1), opened(2)]), keep)
    statement(keep, "DROP INDEX ledger_entries_by_response")
    for table in ("ledger_entries", "ledger_opened"):
        for column in ("response_id", "cache_key", "cached_tokens"):
            statement(keep, f"ALTER TABLE {table} DROP COLUMN {column}")
    for table in ("ledger_feedback", "ledger_feedback_sums", "ledger_ratings"):
        statement(keep, f"DROP TABLE {table}")
    statement(keep, "UPDATE ledger_version SET version = 3")

    async def work(ledger: Ledger) -> None:
        assert await ledger.entries("r1") == [entry(1)]
        assert await ledger.feedback() == []
        assert await ledger.append("h", 2, [entry(2, response_id="a"), opened(3)]) == 2
        assert (await ledger.entries("r2"))[0].response_id == "a"

    await with_ledger(work, keep)
    if keep.path is not None:
        new = keep.path + "-new"
        await with_ledger(lambda ledger: ledger.count(), Keep(new))
        assert shape(Path(keep.path)) == shape(Path(new))


async def test_a_ledger_of_the_fourth_version_has_its_sums_made_anew(keep: Keep) -> None:
    some = [entry(n, deployment=f"d{n % 2}", at_ms=n * DAY_MS // 3) for n in range(1, 9)]
    await with_ledger(lambda ledger: ledger.append("h", 1, [*some, opened(9)]), keep)
    for table in ("ledger_entries", "ledger_opened"):
        statement(keep, f"ALTER TABLE {table} DROP COLUMN cached_tokens")
    for table in ("ledger_sums", "ledger_checkpoints"):
        statement(keep, f"DROP TABLE {table}")
    by = "tenant TEXT NOT NULL, day BIGINT NOT NULL, model TEXT NOT NULL"
    old = ", ".join(f"{name} BIGINT NOT NULL" for name in SUMS[:16])
    statement(keep, f"CREATE TABLE ledger_sums ({by}, {old}, PRIMARY KEY (tenant, day, model))")
    statement(keep, f"CREATE TABLE ledger_checkpoints (number INTEGER PRIMARY KEY, {old})")
    statement(keep, "INSERT INTO ledger_sums VALUES ('acme', 0, 'small'" + ", 8" * 16 + ")")
    statement(keep, "UPDATE ledger_version SET version = 4")

    async def work(ledger: Ledger) -> None:
        told = await ledger.usage(group_by="deployment")
        assert told["attempts"] == 8
        for name in ("d0", "d1"):
            mine = [e for e in some if e.deployment == name]
            assert told["by_deployment"][name] == fold(mine).as_dict()
        assert await ledger.append("h", 2, [entry(9, cached_tokens=7)]) == 9
        assert (await ledger.usage())["cached_prompt_tokens"] == 7

    await with_ledger(work, keep)
    if keep.path is not None:
        new = keep.path + "-new"
        await with_ledger(lambda ledger: ledger.count(), Keep(new))
        assert shape(Path(keep.path)) == shape(Path(new))


async def test_a_ledger_of_a_newer_version_is_left_alone(keep: Keep) -> None:
    await with_ledger(lambda ledger: ledger.append("h", 1, [entry(1)]), keep)
    statement(keep, "UPDATE ledger_version SET version = 99")

    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="of version 99, newer than"):
            await ledger.count()

    await with_ledger(work, keep)


async def test_tables_of_somebody_else_are_left_alone(postgres: PostgresServer) -> None:
    keep = Keep(url=postgres.fresh())
    statement(keep, "CREATE TABLE ledger_entries (precious text)")

    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="not a ledger"):
            await ledger.count()

    await with_ledger(work, keep)


async def test_a_ledger_has_one_owner_at_a_time(keep: Keep) -> None:
    async def work(first: Ledger) -> None:
        await first.append("h", 1, [entry(1)])
        second = keep.ledger()
        with pytest.raises(StoreFailed, match=rf"process {os.getpid()}.*Stop that"):
            await second.append("h", 1, [entry(2)])
        await first.close()
        assert await second.append("h", 1, [entry(2)]) == 2
        await second.close()

    await with_ledger(work, keep)


async def test_an_owner_waits_for_the_session_of_the_one_before(postgres: PostgresServer) -> None:
    keep = Keep(url=postgres.fresh())
    first, looked = keep.ledger(), 0
    await first.append("h", 1, [entry(1)])
    loop = asyncio.get_running_loop()

    def clock() -> float:
        nonlocal looked
        looked += 1
        if looked == 3:
            asyncio.run_coroutine_threadsafe(first.close(), loop).result()
        return float(looked)

    second = keep.ledger(clock, 10.0)
    assert await second.append("h", 1, [entry(2)]) == 2
    await second.close()


async def test_a_server_that_crashes_fails_what_waits_and_is_found_again() -> None:
    with postgres_server() as server:
        ledger = Keep(url=server.fresh()).ledger(lock_wait_s=10.0)
        assert await ledger.append("h", 1, [entry(1)]) == 1
        server.kill()
        answers = await asyncio.gather(
            *(ledger.append("h", n, [entry(n)]) for n in range(1, 20)),
            ledger.count(),
            return_exceptions=True,
        )
        assert all(isinstance(answer, StoreFailed) for answer in answers)
        assert ledger.stats()["failing"] == ledger.stats()["last_error"] is not None
        server.start()
        answers = await asyncio.gather(
            *(ledger.append("h", n, [entry(n)]) for n in range(1, 20)), ledger.count()
        )
        assert answers[-1] == 19
        assert ledger.stats()["failing"] is None
        await ledger.close()


async def test_a_session_that_is_ended_loses_nothing(postgres: PostgresServer) -> None:
    keep = Keep(url=postgres.fresh())

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(1)])
        postgres.run(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name LIKE 'forebay ledger%'"
        )
        with pytest.raises(StoreFailed):
            await ledger.append("h", 2, [entry(2)])
        assert await ledger.append("h", 2, [entry(1), entry(2)]) == 2

    await with_ledger(work, keep)


async def test_a_server_that_does_not_sync_is_refused() -> None:
    with postgres_server("-c", "fsync=off") as server:
        ledger = Keep(url=server.fresh()).ledger()
        with pytest.raises(StoreFailed, match="fsync = off"):
            await ledger.append("h", 1, [entry(1)])
        await ledger.close()


async def test_commits_wait_for_the_disk_where_the_server_would_not(
    postgres: PostgresServer,
) -> None:
    url = postgres.fresh() + "%20-csynchronous_commit%3Doff"
    ledger = Keep(url=url).ledger()
    await ledger.append("h", 1, [entry(1)])
    assert ledger._store is not None
    connection = ledger._store._connection
    assert connection is not None
    assert connection.exec_driver_sql("SHOW synchronous_commit").scalar_one() == "on"
    connection.rollback()
    await ledger.close()


@pytest.mark.parametrize(
    "change",
    [
        ("@127.0.0.1", "@127.0.0.1:1"),  # nobody listens there
        ("/postgres?", "/nowhere?"),
        ("forebay:", "stranger:"),
        ("postgresql://", "postgresql:"),
        ("search_path", "search path"),
        ("?options", "?nonsense=1&options"),
    ],
)
async def test_no_failure_tells_the_password(
    change: tuple[str, str], postgres: PostgresServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    url = postgres.fresh()
    if change[0] == "@127.0.0.1":
        url = url.replace(f":{postgres.port}/", "/")
    url = url.replace(*change)
    ledger = Keep(url=url).ledger()
    with pytest.raises(StoreFailed) as failure:
        await ledger.append("h", 1, [entry(1)])
    told = f"{ledger.stats()}{caplog.text}{''.join(traceback.format_exception(failure.value))}"
    await ledger.close()
    for secret in (PASSWORD, "canary"):
        assert secret not in told


def test_columns_are_in_every_table() -> None:
    from actors.ledger import schema

    assert [c.name for c in schema.ENTRIES.columns] == ["number", *COLUMNS]
    assert [c.name for c in schema.CHECKPOINTS.columns] == ["number", *SUMS]
