from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.ledger import desk as desk_module
from actors.ledger.desk import LedgerDesk
from actors.ledger.owner import Ledger
from actors.ledger.policy import Entry, LedgerFull, StoreFailed, fold
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


def make(ref: Any, now: list[float] | None = None) -> LedgerDesk:
    times = now or [0.0]
    return LedgerDesk(
        ref, "desk", clock=lambda: times[0], wall=lambda: 1_700_000_000.5, pause=no_pause
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
