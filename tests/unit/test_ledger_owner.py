from __future__ import annotations

import asyncio
import os
import pickle
import sqlite3
import stat
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from actors.file_lock import FileLock
from actors.ledger import usage as usage_file
from actors.ledger.owner import Ledger
from actors.ledger.policy import (
    DAY_MS,
    MINUTE_MS,
    STATUSES,
    TENANTS_PER_READ_MAX,
    Entry,
    Spent,
    StoreFailed,
    fold,
)
from actors.ledger.usage import OTHERS
from actors.ref import Clock
from tests.support.postgres_server import PostgresServer

NOW_MS = 1_700_000_000_000


def entry(number: int, **fields: Any) -> Entry:
    return Entry(
        **{
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
            "cost_nano": 300 + number,
            "unpriced": False,
            "estimated": False,
            "stream": False,
            "latency_ms": 12,
            "at_ms": number,
            "error": None,
            "http_status": 200,
            **fields,
        }
    )


def numbered(draws: list[dict[str, Any]]) -> list[Entry]:
    return [entry(number, **fields) for number, fields in enumerate(draws)]


entry_lists = st.lists(
    st.fixed_dictionaries(
        {
            "attempt": st.integers(1, 3),
            "tenant": st.sampled_from(["acme", "zenith", "ünïcode"]),
            "model": st.sampled_from(["small", "large", "embed"]),
            "status": st.sampled_from(STATUSES),
            "prompt_tokens": st.integers(0, 10**9),
            "completion_tokens": st.integers(0, 10**9),
            "cost_nano": st.integers(0, 10**13),
            "unpriced": st.booleans(),
            "estimated": st.booleans(),
            "stream": st.booleans(),
            "saved_nano": st.integers(0, 10**12),
            "tool_calls": st.integers(0, 20),
            "deployment": st.sampled_from(["d1", "d2"]),
            "route": st.sampled_from(["chat", "embedding"]),
            "latency_ms": st.integers(0, 400_000),
            "cached_tokens": st.integers(0, 10**9),
            "requests": st.integers(1, 50),
            "error": st.sampled_from([None, "boom"]),
            "at_ms": st.integers(0, 3 * DAY_MS),
        }
    ),
    max_size=25,
).map(numbered)


@dataclass(frozen=True)
class Keep:
    """Where a test's ledger is kept: a file, or a schema of a PostgreSQL database."""

    path: str | None = None
    url: str | None = None

    def ledger(self, clock: Clock = time.monotonic, lock_wait_s: float = 0.0) -> Ledger:
        url = None if self.url is None else partial(str, self.url)
        return Ledger(self.path, clock, lock_wait_s, url)


MEMORY = Keep()


@pytest.fixture(scope="session", params=["sqlite", "postgres"])
def fresh(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[], Keep]:
    """Makes places that are empty."""
    if request.param == "postgres":
        server = request.getfixturevalue("postgres")
        return lambda: Keep(url=server.fresh())
    return lambda: Keep(str(tmp_path_factory.mktemp("ledger") / "ledger.db"))


@pytest.fixture
def keep(fresh: Callable[[], Keep]) -> Keep:
    return fresh()


async def with_ledger(work: Callable[[Ledger], Any], keep: Keep = MEMORY) -> Any:
    ledger = keep.ledger()
    try:
        return await work(ledger)
    finally:
        await ledger.close()


async def test_an_entry_is_recorded_once_however_often_it_is_sent(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        some = [entry(1), entry(2)]
        assert await ledger.append("h", 1, some) == 2
        assert await ledger.append("h", 1, some) == 2
        assert await ledger.append("h", 2, [entry(2, cost_nano=9), entry(3)]) == 3
        assert await ledger.count() == 3
        assert await ledger.entries("r2") == [entry(2)]
        assert ledger.stats()["rows_known"] == 3

    await with_ledger(work, keep)


@given(some=entry_lists)
@settings(max_examples=60, deadline=None)
def test_the_stores_totals_are_the_fold_of_its_entries(some: list[Entry]) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, some)
        usage = await ledger.usage(group_by="tenant")
        by_day = (await ledger.usage(group_by="day"))["by_day"]
        parts = {"by_model": usage.pop("by_model"), "by_tenant": usage.pop("by_tenant")}
        assert len(usage.pop("data")) == len(parts["by_tenant"])
        assert usage == fold(some).as_dict()
        for name, groups in parts.items():
            keys = {getattr(e, name.removeprefix("by_")) for e in some}
            assert set(groups) == keys
            for key, figures in groups.items():
                mine = [e for e in some if getattr(e, name.removeprefix("by_")) == key]
                assert figures == fold(mine).as_dict()
        for day in range(3):
            mine = [e for e in some if e.at_ms // DAY_MS == day]
            if mine:
                assert by_day[f"1970-01-0{day + 1}"] == fold(mine).as_dict()

    asyncio.run(with_ledger(work))


async def test_usage_takes_a_tenant_and_a_half_open_range(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(n) for n in range(10)] + [entry(10, tenant="zenith")])
        assert (await ledger.usage(tenant="acme"))["total_requests"] == 10
        assert (await ledger.usage("acme", 3, 6))["total_cost_nano"] == 303 + 304 + 305
        assert (await ledger.usage("nobody"))["total_requests"] == 0
        assert (await ledger.usage("nobody"))["by_model"] == {}

    await with_ledger(work, keep)


async def test_an_unknown_grouping_is_an_error(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        with pytest.raises(ValueError, match="group_by is one of"):
            await ledger.usage(group_by="colour")  # type: ignore[arg-type]
        assert await ledger.count() == 0

    await with_ledger(work, keep)


async def test_a_read_that_cannot_be_done_fails_alone() -> None:
    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="Overflow"):
            await ledger.usage(since_ms=2**70)
        assert ledger.stats()["failing"] is None
        assert await ledger.count() == 0

    await with_ledger(work)


async def test_groups_beyond_the_bound_are_added_up(
    keep: Keep, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_file, "GROUPS_MAX", 2)

    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(n, model=f"m{n}") for n in range(5)])
        by_model = (await ledger.usage())["by_model"]
        assert set(by_model) == {"m0", "m1", OTHERS}
        assert by_model[OTHERS]["total_requests"] == 3
        assert sum(m["total_cost_nano"] for m in by_model.values()) == 5 * 300 + 10

    await with_ledger(work, keep)


class Deliveries(RuleBasedStateMachine):
    """Messages are sent, doubled, lost, reordered and sent again; calls are announced before they
    end, or not; the owner is replaced, or dies with what it was doing."""

    def place(self) -> Keep:
        self.folder = tempfile.TemporaryDirectory()
        return Keep(os.path.join(self.folder.name, "ledger.db"))

    @initialize()
    def start(self) -> None:
        self.keep = self.place()
        self.loop = asyncio.new_event_loop()
        self.ledger = self.keep.ledger(lock_wait_s=10.0)
        self.acknowledged: dict[str, Entry] = {}
        self.waiting: list[list[Entry]] = []
        self.delivered: list[list[Entry]] = []
        self.commits: dict[str, int] = {}
        self.announced: set[str] = set()
        self.number = 0

    def run(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(awaitable)

    def deliver(self, batch: list[Entry]) -> None:
        commit = self.run(self.ledger.append("h", len(self.delivered), batch))
        for sent in batch:
            if sent.id not in self.maybe:
                assert self.commits.setdefault(sent.id, commit) == commit
        self.delivered.append(batch)

    @property
    def maybe(self) -> set[str]:
        """Entries whose commit nobody knows: their messages were not answered alone."""
        if not hasattr(self, "unsure"):
            self.unsure: set[str] = set()
        return self.unsure

    @rule(size=st.integers(0, 5), cost_nano=st.integers(0, 10**12))
    def post(self, size: int, cost_nano: int) -> None:
        batch = [
            entry(self.number + n, cost_nano=cost_nano, status=STATUSES[n % len(STATUSES)])
            for n in range(size)
        ]
        self.number += size
        self.waiting.append(batch)

    @rule(ahead=st.integers(0, 7))
    def announce(self, ahead: int) -> None:
        some = [entry(self.number + n - 3, status="open", cost_nano=10**13) for n in range(ahead)]
        self.run(self.ledger.append("h", 0, some))
        self.announced.update(e.id for e in some)

    @rule(which=st.integers(0, 100))
    def answer_arrives(self, which: int) -> None:
        if self.waiting:
            batch = self.waiting.pop(which % len(self.waiting))
            self.deliver(batch)
            self.acknowledged.update({e.id: e for e in batch})

    @rule()
    def answer_is_lost(self) -> None:
        if self.waiting:
            self.deliver(self.waiting[0])

    @rule(which=st.integers(0, 100))
    def an_old_message_comes_again(self, which: int) -> None:
        if self.delivered:
            self.deliver(self.delivered[which % len(self.delivered)])

    @rule()
    def several_messages_share_a_commit(self) -> None:
        batches, self.waiting = self.waiting, []
        self.maybe.update(e.id for batch in batches for e in batch)

        async def all_at_once() -> None:
            await asyncio.gather(*(self.ledger.append("h", 0, b) for b in [*batches, *batches]))

        self.run(all_at_once())
        self.acknowledged.update({e.id: e for batch in batches for e in batch})

    @rule()
    def the_owner_is_replaced(self) -> None:
        self.run(self.ledger.close())
        self.ledger = self.keep.ledger(lock_wait_s=10.0)

    @rule(turns=st.integers(0, 3))
    def the_owner_goes_down_with_messages_on_their_way(self, turns: int) -> None:
        """What it was told is written or is not; the senders hear nothing, and send again."""
        self.maybe.update(e.id for batch in self.waiting for e in batch)

        async def unheard() -> None:
            on_their_way = [
                asyncio.ensure_future(self.ledger.append("h", 0, batch)) for batch in self.waiting
            ]
            for _ in range(turns):
                await asyncio.sleep(0)
            for message in on_their_way:
                message.cancel()

        self.run(unheard())
        self.the_owner_is_replaced()
        # They come again later; what counts is that each is there once then.
        batches, self.waiting = self.waiting, []
        for batch in reversed(batches):
            self.deliver(batch)
            self.acknowledged.update({e.id: e for e in batch})

    @invariant()
    def money_is_conserved(self) -> None:
        if not hasattr(self, "ledger"):
            return
        sent = {e.id: e for batch in self.delivered for e in batch} | self.acknowledged
        usage = self.run(self.ledger.usage())
        told = {name: value for name, value in usage.items() if name != "by_model"}
        assert told == fold(sent.values()).as_dict()
        assert self.run(self.ledger.count()) == len(sent)
        open_now = sum(self.run(self.ledger.holders()).values())
        assert open_now == self.ledger.stats()["open"] == len(self.announced - sent.keys())

    def teardown(self) -> None:
        if hasattr(self, "ledger"):
            self.run(self.ledger.close())
            self.loop.close()
            self.folder.cleanup()


TestDeliveries = Deliveries.TestCase
TestDeliveries.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_deliveries_to_a_server(postgres: PostgresServer) -> None:
    class ToServer(Deliveries):
        def place(self) -> Keep:
            super().place()
            return Keep(url=postgres.fresh())

    few = settings(max_examples=5, stateful_step_count=15, deadline=None)
    run_state_machine_as_test(ToServer, settings=few)


async def test_closing_and_opening_again_keeps_all_that_was_acknowledged(tmp_path: Path) -> None:
    path = str(tmp_path / "deep" / "ledger.db")
    some = [entry(n, error="e" if n % 2 else None, unpriced=n % 3 == 0) for n in range(50)]

    async def write(ledger: Ledger) -> None:
        await ledger.append("h", 1, some)

    async def read(ledger: Ledger) -> list[Entry]:
        return [(await ledger.entries(e.request_id))[0] for e in some]

    await with_ledger(write, Keep(path))
    assert await with_ledger(read, Keep(path)) == some
    assert stat.S_IMODE((tmp_path / "deep").stat().st_mode) == 0o700


async def test_a_copy_taken_after_the_acknowledgement_holds_the_entry(tmp_path: Path) -> None:
    # What a killed process leaves behind: the files as they are, nothing closed.
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(1)])
        for suffix in ("", "-wal"):
            (tmp_path / f"copy.db{suffix}").write_bytes((tmp_path / f"l.db{suffix}").read_bytes())

    await with_ledger(work, Keep(str(tmp_path / "l.db")))
    assert await with_ledger(lambda ledger: ledger.count(), Keep(str(tmp_path / "copy.db"))) == 1


WRITER = """
import asyncio, sys
from actors.ledger.owner import Ledger
from tests.unit.test_ledger_owner import entry

async def main():
    ledger = Ledger(sys.argv[1])
    for number in range(10**6):
        await ledger.append("h", number, [entry(number)])
        print(number, flush=True)

asyncio.run(main())
"""


async def test_what_a_killed_process_had_acknowledged_is_there(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    arguments = [sys.executable, "-c", WRITER, path]
    root = Path(__file__).parents[2]
    writer = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=root)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) == 50:
            break
    writer.kill()
    acknowledged = int((["50", *writer.stdout.read().split("\n")[:-1]])[-1])
    # Its lock is free as soon as the kernel has buried it; until then the next owner waits.
    ledger = Ledger(path)
    assert await ledger.count() in (acknowledged + 1, acknowledged + 2)
    await ledger.close()
    writer.wait()


async def test_a_ledger_file_has_one_owner_at_a_time(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")

    async def work(first: Ledger) -> None:
        await first.append("h", 1, [entry(1)])
        second = Ledger(path, lock_wait_s=0)
        with pytest.raises(StoreFailed, match=rf"in use by process {os.getpid()}"):
            await second.append("h", 1, [entry(2)])
        await first.close()
        assert await second.append("h", 1, [entry(2)]) == 2
        assert await second.count() == 2
        await second.close()

    await with_ledger(work, Keep(path))


async def test_an_owner_waits_for_the_one_it_replaces_to_let_go(tmp_path: Path) -> None:
    path = str(tmp_path / "ledger.db")
    old = FileLock(path)
    old.acquire(0)
    looked = 0

    def clock() -> float:  # the old process dies at the third look
        nonlocal looked
        looked += 1
        if looked == 3:
            old.release()
        return float(looked)

    ledger = Ledger(path, clock=clock, lock_wait_s=10)
    assert await ledger.append("h", 1, [entry(1)]) == 1
    await ledger.close()


async def test_a_file_that_is_something_else_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "other.db"
    other = sqlite3.connect(path)
    other.execute("CREATE TABLE precious (x)")
    other.commit()
    other.close()

    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="not a ledger"):
            await ledger.count()

    await with_ledger(work, Keep(str(path)))


async def test_a_failing_store_acknowledges_nothing_and_recovers(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "ledger.db"
    path.parent.write_text("a file where the folder should be")

    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="Exists"):
            await ledger.append("h", 1, [entry(1)])
        path.parent.unlink()
        assert await ledger.append("h", 1, [entry(1)]) == 1
        assert ledger.stats()["failures"] == 1

    await with_ledger(work, Keep(str(path)))


async def test_a_message_that_cannot_be_stored_fails_alone(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        bad = entry(1, prompt_tokens=2**70)
        answers = await asyncio.gather(
            ledger.append("h", 1, [entry(2)]),
            ledger.append("h", 2, [bad, entry(3)]),
            ledger.append("h", 3, [entry(4)]),
            return_exceptions=True,
        )
        assert [answers[0], answers[2]] == [1, 2]
        assert isinstance(answers[1], StoreFailed)
        assert await ledger.count() == 2

    await with_ledger(work, keep)


async def test_text_that_is_not_unicode_is_stored_escaped(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await ledger.append("h", 1, [entry(1, model="bad \ud800 model", tenant="nul \0 ok")])
        (stored,) = await ledger.entries("r1")
        assert stored.model == "bad \\ud800 model"
        assert stored.tenant == "nul \\x00 ok"
        assert (await ledger.usage(tenant="nul \0 ok"))["total_requests"] == 1

    await with_ledger(work, keep)


async def test_many_messages_share_a_few_commits(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        await asyncio.gather(*(ledger.append("h", n, [entry(n)]) for n in range(500)))
        assert await ledger.count() == 500
        assert ledger.stats()["commits"] <= 100

    await with_ledger(work, keep)


async def test_an_owner_whose_queue_is_full_takes_nothing_more(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        with pytest.raises(StoreFailed, match="wait for the disk"):
            await ledger.append("h", 1, [entry(1)] * 200_001)
        assert await ledger.append("h", 2, [entry(1)]) == 1
        assert ledger.stats()["rows_queued"] == 0

    await with_ledger(work, keep)


async def test_a_caller_that_gives_up_does_not_undo_the_write(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        impatient = asyncio.ensure_future(ledger.append("h", 1, [entry(1)]))
        await asyncio.sleep(0)
        impatient.cancel()
        assert await ledger.count() == 1
        assert ledger.stats()["rows_queued"] == 0

    await with_ledger(work, keep)


async def test_a_commit_tells_reads_that_have_a_message_from_those_that_lack_it(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        async def knows(tenant: str) -> tuple[int, bool]:
            (spent,) = await ledger.spent([tenant], NOW_MS)
            return spent.commit, spent.day_nano > 0

        def paid(number: int, tenant: str) -> Entry:
            return entry(number, tenant=tenant, at_ms=NOW_MS)

        assert await ledger.append("h", 1, []) == 0
        assert await knows("a") == (0, False)
        mine = [paid(1, "a"), paid(2, "a")]
        first, second = await asyncio.gather(
            ledger.append("h", 1, mine), ledger.append("i", 1, [paid(3, "b")])
        )
        between = await knows("a")
        assert await ledger.append("i", 2, [paid(4, "b")]) == 4
        assert 2 <= first <= between[0] == 3
        assert second == 3
        assert between[1]
        # The answer was lost: the read between had the rows, so no later commit may be told.
        assert await ledger.append("h", 1, mine) == 2
        # A known entry in new company: what is new came later.
        assert await ledger.append("h", 2, [*mine, paid(5, "a")]) == 5
        assert await ledger.append("h", 3, []) == 5

    await with_ledger(work, keep)


async def test_messages_that_failed_together_get_commits_of_their_own(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        bad = entry(0, prompt_tokens=2**70)
        answers = await asyncio.gather(
            *(ledger.append("h", n, [entry(n)]) for n in range(1, 4)),
            ledger.append("h", 4, [bad]),
            ledger.append("h", 2, [entry(2)]),
            return_exceptions=True,
        )
        assert isinstance(answers[3], StoreFailed)
        assert answers[4] in (2, answers[1])
        assert [answer >= n for n, answer in enumerate(answers[:3], 1)] == [True] * 3  # type: ignore[operator]

    await with_ledger(work, keep)


def spent_of(some: list[Entry], tenant: str, at_ms: int) -> Spent:
    """What `spent` says, by hand."""
    mine = [e for e in some if e.tenant == tenant]
    today = time.gmtime(at_ms / 1000)

    def paid(length: int) -> int:
        return sum(
            e.cost_nano
            for e in mine
            if e.status in ("posted", "unsettled")
            and time.gmtime(e.at_ms / 1000)[:length] == today[:length]
        )

    def ages(hits: bool) -> tuple[tuple[int, int], ...]:
        counted = Counter(
            max(0, at_ms - e.at_ms) // MINUTE_MS
            for e in mine
            if e.attempt == 1 and e.status != "refused"
            if (e.status in ("hit", "replay")) == hits
            if abs(at_ms - e.at_ms) < 62 * MINUTE_MS
        )
        return tuple(sorted(counted.items()))

    day, month = at_ms // DAY_MS, today.tm_year * 12 + today.tm_mon - 1
    return Spent(len(some), day, paid(3), month, paid(2), ages(False), ages(True))


@given(some=entry_lists, at_ms=st.integers(0, 40 * DAY_MS), batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_what_is_spent_is_the_sum_of_its_entries(some: list[Entry], at_ms: int, batch: int) -> None:
    async def work(ledger: Ledger) -> None:
        for start in range(0, len(some), batch):
            await ledger.append("h", start, some[start : start + batch])
            await ledger.append("h", start, some[start : start + batch])
        tenants = ["zenith", "nobody", "ünïcode", "acme"]
        times = [at_ms, *(e.at_ms + shift for e in some[:5] for shift in (0, -1, 61 * MINUTE_MS))]
        for when in (when for when in times if when >= 0):
            told = await ledger.spent(tenants, when)
            assert told == [spent_of(some, tenant, when) for tenant in tenants]

    asyncio.run(with_ledger(work))


async def test_requests_are_told_by_their_age_and_hits_apart(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        def aged(number: int, minutes: float, **fields: Any) -> Entry:
            at_ms = NOW_MS - int(minutes * MINUTE_MS)
            return entry(number, at_ms=at_ms, cost_nano=0, **fields)

        some = [
            aged(1, 0.5),
            aged(2, 61.9),
            aged(3, 62.0),
            aged(4, 7.0, status="hit"),
            aged(5, 7.5, status="voided"),
            aged(6, 7.6, attempt=2),
            aged(7, 7.7, status="refused"),
            aged(8, 7.8, status="joined"),
            aged(9, -0.2),
            aged(10, -90.0),
        ]
        await ledger.append("h", 1, some)
        (spent,) = await ledger.spent(["acme"], NOW_MS)
        assert spent.minutes == ((0, 2), (7, 2), (61, 1))
        assert spent.hit_minutes == ((7, 1),)
        assert (spent.month, spent.day) == (2023 * 12 + 10, 19_675)

    await with_ledger(work, keep)


async def test_a_read_has_a_bound(keep: Keep) -> None:
    async def work(ledger: Ledger) -> None:
        most = [f"t{n}" for n in range(TENANTS_PER_READ_MAX)]
        assert len(await ledger.spent(most, NOW_MS)) == TENANTS_PER_READ_MAX
        with pytest.raises(ValueError, match="1001 tenants"):
            await ledger.spent([*most, "one more"], NOW_MS)
        assert await ledger.spent([], NOW_MS) == []

    await with_ledger(work, keep)


async def test_a_closed_ledger_refuses_and_closes_twice() -> None:
    ledger = Ledger()
    await ledger.append("h", 1, [])
    await ledger.close()
    await ledger.close()
    with pytest.raises(StoreFailed, match="closed"):
        await ledger.append("h", 1, [entry(1)])


def test_a_ledger_is_made_without_an_event_loop_and_without_touching_the_disk() -> None:
    assert Ledger("/nowhere/at/all.db").protocol() == 6
    assert pickle.loads(pickle.dumps({"path": None, "lock_wait_s": 10.0}))
