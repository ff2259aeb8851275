from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger import desk as desk_module
from actors.ledger.desk import LedgerDesk
from actors.ledger.owner import Ledger
from actors.ledger.policy import Entry, LedgerFull, Spent, StoreFailed, fold
from actors.ref import InlineRef, OwnerUnavailable

CALL: dict[str, Any] = {
    "request_id": "r1",
    "tenant": "acme",
    "route": "chat",
    "model": "m",
    "deployment": "d",
}


class BadLine:
    """A line to a ledger that loses messages, loses answers and doubles, as its script says."""

    name = "ledger"

    def __init__(self, owner: Any, script: str = "") -> None:
        self.sent: Counter[str] = Counter()
        self._owner = owner
        self._script = list(script)

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        fault = self._script.pop(0) if self._script and method == "append" else "."
        if fault == "x":
            raise OwnerUnavailable(self.name, "message lost")
        if fault == "f":
            raise StoreFailed("disk full")
        answer = await getattr(self._owner, method)(*args)
        if fault == "2":
            answer = await getattr(self._owner, method)(*args)
        if fault == "a":
            raise OwnerUnavailable(self.name, "answer lost")
        return answer


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


def make(
    ref: Any,
    now: list[float] | None = None,
    pause: Callable[[float], Awaitable[None]] = no_pause,
) -> LedgerDesk:
    times = now or [0.0]
    return LedgerDesk(
        ref, "desk", clock=lambda: times[0], wall=lambda: 1_700_000_000.5, pause=pause
    )


async def test_an_attempt_is_opened_then_posted() -> None:
    now = [5.0]
    owner = Ledger()
    desk = make(InlineRef("ledger", owner), now)
    await desk.start()
    call = desk.open(**CALL, stream=True)
    assert desk.stats()["open"] == 1
    now[0] = 5.25
    desk.post(call, prompt_tokens=3, completion_tokens=4, cost_nano=77)
    assert await desk.flush() == 0
    (entry,) = await owner.entries("r1")
    assert entry.status == "posted"
    assert (entry.prompt_tokens, entry.completion_tokens, entry.cost_nano) == (3, 4, 77)
    assert (entry.latency_ms, entry.at_ms) == (250, 1_700_000_000_500)
    assert (entry.stream, entry.unpriced, entry.estimated) == (True, False, False)
    await desk.close()
    await owner.close()


async def test_what_is_settled_stays_settled() -> None:
    desk = make(BadLine(None))
    call = desk.open(**CALL)
    assert desk.post(call, prompt_tokens=1, cost_nano=5) is not None
    assert desk.void(call, "cancelled") is None
    assert desk.post(call, prompt_tokens=1, cost_nano=5) is None
    assert desk.stats() | {"open": 0, "buffered": 1} == desk.stats()


async def test_an_unknown_price_is_flagged_and_not_zero_by_silence() -> None:
    desk = make(BadLine(None))
    entry = desk.post(desk.open(**CALL), prompt_tokens=1, cost_nano=None)
    assert entry is not None
    assert (entry.unpriced, entry.cost_nano) == (True, 0)


async def test_figures_no_provider_can_mean_are_clamped_and_flagged() -> None:
    desk = make(BadLine(None))
    entry = desk.post(desk.open(**CALL), prompt_tokens=10**30, completion_tokens=-1, cost_nano=-5)
    assert entry is not None
    assert entry.estimated
    assert (entry.prompt_tokens, entry.completion_tokens, entry.cost_nano) == (10**12, 0, 0)


async def test_a_failure_costs_nothing_and_keeps_a_short_reason() -> None:
    desk = make(BadLine(None))
    entry = desk.void(desk.open(**CALL, attempt=2), "x" * 10_000, 502)
    assert entry is not None
    assert entry.error is not None
    assert (entry.status, entry.attempt, entry.http_status) == ("voided", 2, 502)
    assert len(entry.error) == 500


async def test_a_call_that_takes_long_is_announced_once_and_a_short_one_is_not() -> None:
    now = [5.0]
    owner = Ledger()
    desk = make(InlineRef("ledger", owner), now)
    await desk.start()
    long, short = desk.open(**CALL, most_nano=9), desk.open(**CALL)
    desk.post(short, prompt_tokens=1, cost_nano=1)
    now[0] += 0.9
    desk.open(**CALL)
    for wait_s, announced in ((0.0, 0), (0.1, 1), (0.1, 1), (1.0, 2)):
        now[0] += wait_s
        desk._announce()
        await desk.flush()
        assert sum((await owner.holders()).values()) == announced
    desk.post(long, prompt_tokens=1, cost_nano=7)
    await desk.flush()
    assert [row.cost_nano for row in await owner.entries("r1")] == [1, 7]
    assert await owner.holders() == {"desk": 1}
    assert desk._announcer is None  # nobody is left to be told of
    await desk.close()
    await owner.close()


async def test_the_loops_own_timer_announces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "ANNOUNCE_AFTER_S", 0.0)
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    await desk.start()
    desk.open(**CALL)
    while not desk.stats()["recorded"]:
        await asyncio.sleep(0)
    await desk.flush()
    assert await owner.holders() == {"desk": 1}
    await desk.close()
    await owner.close()


async def test_an_announced_attempt_that_is_not_made_is_none_of_its_requests() -> None:
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    await desk.start()
    unmade = desk.open(**CALL)
    await desk.intend(unmade)
    desk.drop(unmade)
    desk.drop(unmade)
    desk.post(desk.open(**CALL), prompt_tokens=1, cost_nano=5)
    await desk.flush()
    assert [(e.attempt, e.status) for e in await owner.entries("r1")] == [
        (0, "voided"),
        (1, "posted"),
    ]
    usage = await owner.usage()
    assert (usage["total_requests"], usage["failed_requests"]) == (1, 0)
    assert await owner.holders() == {}
    await desk.close()
    await owner.close()


async def test_a_full_desk_announces_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_module, "ENTRIES_BUFFERED_MAX", 3)
    now = [0.0]
    desk = make(BadLine(None), now)
    for _ in range(2):
        desk.open(**CALL)
    now[0] = 5.0
    desk._announce()
    assert desk.stats()["recorded"] == 1


@given(
    script=st.text(alphabet="..xfa2", max_size=12),
    sizes=st.lists(st.integers(1, 700), max_size=6),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=30, deadline=None)
def test_money_is_conserved_whatever_the_line_does(
    script: str, sizes: list[int], seed: int
) -> None:
    async def session() -> None:
        dice = random.Random(seed)
        owner = Ledger()
        desk = make(BadLine(owner, script))
        await desk.start()
        mine: list[Entry] = []
        for size in sizes:
            for _ in range(size):
                call = desk.open(**CALL)
                if dice.random() < 0.2:
                    entry = desk.void(call, "500")
                else:
                    entry = desk.post(
                        call, prompt_tokens=dice.randrange(9), cost_nano=dice.randrange(99)
                    )
                assert entry is not None
                mine.append(entry)
            await asyncio.sleep(0)
        assert await desk.flush(60) == 0
        usage = await owner.usage()
        usage.pop("by_model")
        assert usage == fold(mine).as_dict()
        assert len({entry.id for entry in mine}) == len(mine)
        await desk.close()
        await owner.close()

    asyncio.run(session())


async def test_entries_wait_for_an_owner_that_is_away_and_keep_their_order() -> None:
    owner = Ledger()
    desk = make(BadLine(owner, "xxfa"))
    await desk.start()
    for number in range(3):
        desk.note("hit", **CALL | {"request_id": f"r{number}"})
    assert await desk.flush() == 0
    assert desk.stats()["failures"] == 4
    assert "OwnerUnavailable" in desk.stats()["last_error"]
    assert await owner.count() == 3
    await desk.close()
    await owner.close()


async def test_a_full_desk_stops_paid_calls_and_drops_only_what_cost_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(desk_module, "ENTRIES_BUFFERED_MAX", 3)
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    calls = [desk.open(**CALL) for _ in range(2)]
    desk.note("hit", **CALL)
    assert desk.full
    with pytest.raises(LedgerFull):
        desk.open(**CALL)
    desk.note("refused", **CALL, http_status=429)
    for call in calls:
        desk.post(call, prompt_tokens=1, cost_nano=1)
    assert desk.stats() | {"buffered": 3, "dropped": 1} == desk.stats()
    await desk.start()
    assert await desk.flush() == 0
    assert desk.stats()["full"] is False
    assert await owner.count() == 3
    await desk.close()
    await owner.close()


async def test_usage_includes_what_this_process_has_just_recorded() -> None:
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    await desk.start()
    desk.post(desk.open(**CALL), prompt_tokens=1, cost_nano=1)
    assert (await desk.usage(tenant="acme"))["total_requests"] == 1
    await desk.close()
    await owner.close()


async def test_entries_leave_in_messages_of_five_hundred() -> None:
    owner = Ledger()
    ref = InlineRef("ledger", owner)
    desk = make(ref)
    await desk.start()
    for _ in range(1200):
        desk.note("hit", **CALL)
    assert await desk.flush() == 0
    assert ref.sent == {"append": 3}
    await desk.close()
    await owner.close()


async def test_what_comes_while_a_message_is_on_its_way_waits_for_company(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A busy owner's slow answers must not turn each of them into the next message."""
    monkeypatch.setattr(desk_module, "SEND_AFTER_S", 0.0)
    owner = Ledger()
    gates = [asyncio.Event(), asyncio.Event()]

    class SlowLine(BadLine):
        async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
            answer = await super().ask(method, *args, timeout_s=timeout_s)
            if method == "append" and self.sent["append"] <= len(gates):
                await gates[self.sent["append"] - 1].wait()
            return answer

    line = SlowLine(owner)
    desk = make(line)
    await desk.start()
    desk.note("hit", **CALL)
    while line.sent["append"] < 1:
        await asyncio.sleep(0)
    monkeypatch.setattr(desk_module, "SEND_AFTER_S", 60.0)
    for _ in range(3):
        desk.note("hit", **CALL)
    gates[0].set()
    for _ in range(20):
        await asyncio.sleep(0)
    assert line.sent["append"] == 1
    gates[1].set()
    assert await desk.flush() == 0
    assert line.sent["append"] == 2
    assert await owner.count() == 4
    await desk.close()
    await owner.close()


async def test_closing_hands_in_the_rest() -> None:
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    await desk.start()
    desk.note("hit", **CALL)
    await desk.close()
    assert await owner.count() == 1
    assert desk.stats()["buffered"] == 0
    await owner.close()


def test_two_desks_of_one_name_never_mint_the_same_id() -> None:
    first, second = make(BadLine(None)), make(BadLine(None))
    assert first.open(**CALL).id != second.open(**CALL).id


AT_MS = 1_700_000_000_500


def pay(desk: LedgerDesk, tenant: str = "acme") -> int:
    """Records an entry of 1 nano-USD and returns its mark."""
    desk.post(desk.open(**CALL | {"tenant": tenant}), prompt_tokens=1, cost_nano=1)
    return desk.mark()


async def test_a_mark_has_a_commit_once_it_is_acknowledged() -> None:
    owner = Ledger()
    desk, other = make(InlineRef("ledger", owner)), make(InlineRef("ledger", owner))
    await desk.start()
    await other.start()
    assert (desk.mark(), desk.commit_of(0)) == (0, 0)
    first = pay(desk)
    assert (first, desk.commit_of(first)) == (1, None)
    await desk.flush()
    pay(other)
    await other.flush()
    second = pay(desk)
    assert desk.commit_of(second) is None
    await desk.flush()
    assert [desk.commit_of(mark) for mark in (0, first, second)] == [0, 1, 3]
    assert other.commit_of(1) == 2
    await desk.close()
    await other.close()
    await owner.close()


async def test_of_marks_long_ago_the_oldest_commit_known_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(desk_module, "COMMITS_KEPT", 2)
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    await desk.start()
    for _ in range(4):
        pay(desk)
        await desk.flush()
    assert [desk.commit_of(mark) for mark in range(5)] == [0, 3, 3, 3, 4]
    await desk.close()
    await owner.close()


async def test_a_message_is_sent_again_as_it_was() -> None:
    owner = Ledger()
    desk: LedgerDesk

    async def more_comes(_: float) -> None:
        pay(desk)

    desk = make(BadLine(owner, "a"), pause=more_comes)
    await desk.start()
    pay(desk)
    await desk.flush()
    await desk.flush()
    assert (desk.mark(), desk.stats()["messages"]) == (2, 2)
    assert [desk.commit_of(mark) for mark in (1, 2)] == [1, 2]
    await desk.close()
    await owner.close()


async def test_what_is_spent_includes_what_this_process_has_just_recorded() -> None:
    owner = Ledger()
    desk = make(InlineRef("ledger", owner))
    await desk.start()
    mark = pay(desk)
    (acme, nobody) = await desk.spent(["acme", "nobody"], AT_MS)
    assert (acme.commit, acme.day_nano, acme.minutes) == (1, 1, ((0, 1),))
    assert (nobody.commit, nobody.day_nano, nobody.minutes) == (1, 0, ())
    assert desk.commit_of(mark) == 1
    await desk.close()
    await owner.close()


async def test_a_store_that_cannot_be_read_is_an_owner_that_is_away() -> None:
    owner = Ledger()
    await owner.append("h", 1, [])
    await owner.close()
    with pytest.raises(OwnerUnavailable, match="the ledger is closed"):
        await make(InlineRef("ledger", owner)).spent(["acme"], AT_MS)
    with pytest.raises(OwnerUnavailable, match="the ledger is closed"):
        await make(InlineRef("ledger", owner)).usage("acme")


@given(
    scripts=st.lists(st.text(alphabet="..xfaa22", max_size=10), min_size=1, max_size=4),
    seed=st.integers(0, 2**32),
    rounds=st.integers(1, 12),
    per_message=st.integers(1, 4),
)
@settings(max_examples=100, deadline=None)
def test_a_read_knows_an_entry_exactly_if_its_commit_is_not_later(
    scripts: list[str], seed: int, rounds: int, per_message: int
) -> None:
    async def session() -> None:
        dice = random.Random(seed)
        owner = Ledger()
        reads: list[dict[str, Spent]] = []
        paid: list[tuple[str, LedgerDesk, int]] = []

        async def read() -> None:
            # Each entry has a tenant of its own, so that a read tells which entries it knows.
            names = [tenant for tenant, _, _ in paid]
            told = await owner.spent(names, AT_MS)
            assert len({spent.commit for spent in told}) <= 1
            reads.append(dict(zip(names, told, strict=True)))

        async def pause(_: float) -> None:  # between a failed message and the next try
            await act()
            await read()

        async def act() -> None:
            for _ in range(dice.randrange(6)):
                desk = dice.choice(desks)
                tenant = f"t{len(paid)}"
                paid.append((tenant, desk, pay(desk, tenant)))

        desks = [make(BadLine(owner, script), pause=pause) for script in scripts]
        for desk in desks:
            await desk.start()
        for _ in range(rounds):
            await act()
            jobs = [dice.choice(desks).flush(60) for _ in range(dice.randrange(3))]
            await asyncio.gather(*jobs, *(read() for _ in range(dice.randrange(3))))
        # A desk that pauses has something left, and may give the others more.
        while any(desk.stats()["buffered"] for desk in desks):
            for desk in desks:
                await desk.flush(60)
        await read()
        for known in reads:
            for tenant, desk, mark in paid:
                commit = desk.commit_of(mark)
                assert commit is not None
                if tenant in known:
                    assert known[tenant].day_nano == int(commit <= known[tenant].commit)
                    assert known[tenant].month_nano == known[tenant].day_nano
                    assert sum(n for _, n in known[tenant].minutes) == known[tenant].day_nano
        assert len(paid) == await owner.count()
        for desk in desks:
            await desk.close()
        await owner.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(desk_module, "ENTRIES_PER_MESSAGE_MAX", per_message)
        asyncio.run(session())
