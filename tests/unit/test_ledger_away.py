"""What requests get while the ledger takes nothing, and what it has when it is back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest

from actors.ledger import desk as desk_module
from actors.ledger import spool as spool_module
from actors.ledger.policy import StoreFailed
from actors.ledger.spool import Spool
from forebay.call import Call
from forebay.errors import Overloaded
from tests.support.fake_time import settle
from tests.support.house import House

Open = Callable[..., Awaitable[House]]


class Away:
    """A ledger's store that takes nothing until it is back."""

    def __init__(self, here: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.owner: Any = here.system._refs["ledger"].owner  # type: ignore[attr-defined]
        self._append, self._monkeypatch = self.owner.append, monkeypatch

    def begins(self) -> None:
        async def failing(*_: Any) -> int:
            raise StoreFailed("the disk is gone")

        self._monkeypatch.setattr(self.owner, "append", failing)

    def ends(self) -> None:
        self._monkeypatch.setattr(self.owner, "append", self._append)


async def whole(here: House, call: Call) -> str:
    return (await here.pipeline.answer(call)).facts.cache


async def stream(here: House, call: Call) -> str:
    begun = await here.pipeline.stream(call)
    async with aclosing(begun.chunks):
        async for _ in begun.chunks:
            pass
    return begun.facts.cache


@pytest.mark.parametrize("answered", [whole, stream])
async def test_paid_calls_stop_at_the_spools_bound_and_hits_go_on(
    house: Open,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answered: Callable[[House, Call], Awaitable[str]],
) -> None:
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 4096)
    here = await house(enable_caching=True)
    desk, clock = here.system._ledger, here.system.clock
    desk._spool = Spool(tmp_path / "spool", here.system.holder, "n", clock, bytes_max=8192)
    away = Away(here, monkeypatch)
    first = here.call("kept")
    await answered(here, first)
    await desk.flush()
    away.begins()
    paid, hits, refused = [first], [], []
    while not refused:
        paid.append(here.call(f"new {len(paid)}"))
        try:
            await answered(here, paid[-1])
        except Overloaded:
            refused.append(paid.pop())
    assert 3 < len(paid) < 60
    assert "has its 8192 bytes" in desk.refusal
    asked = len(here.provider.asked)
    for _ in range(20):
        hits.append(here.call("kept"))
        assert await answered(here, hits[-1]) == "hit"
        refused.append(here.call("other"))
        with pytest.raises(Overloaded) as caught:
            await answered(here, refused[-1])
        assert (caught.value.status, caught.value.retry_after_s) == (503, 1.0)
    assert len(here.provider.asked) == asked == len(paid)

    away.ends()
    assert await desk.flush() == 0
    assert [[e.status for e in await here.entries(call)] for call in paid] == [["posted"]] * asked
    assert [[e.status for e in await here.entries(call)] for call in hits] == [["hit"]] * 20
    usage = await here.system.books.usage()
    assert usage["refused_requests"] == len(refused)
    assert usage["total_requests"] == len(paid) + len(hits) + len(refused)
    assert await answered(here, here.call("again")) == "miss"
    assert here.at_rest


@pytest.mark.parametrize("answered", [whole, stream])
async def test_a_strict_ledger_that_is_away_stops_paid_calls_at_once_and_no_hits(
    house: Open,
    monkeypatch: pytest.MonkeyPatch,
    answered: Callable[[House, Call], Awaitable[str]],
) -> None:
    here = await house(enable_caching=True, ledger={"durability": "strict"})
    away = Away(here, monkeypatch)
    await answered(here, here.call("kept"))
    away.begins()
    monkeypatch.setattr(desk_module, "INTENT_WAIT_S", 0.0)
    refused = here.call("new")
    with pytest.raises(Overloaded) as caught:
        await answered(here, refused)
    assert (caught.value.status, caught.value.retry_after_s) == (503, 1.0)
    assert await answered(here, here.call("kept")) == "hit"
    assert len(here.provider.asked) == 1

    away.ends()
    monkeypatch.setattr(desk_module, "INTENT_WAIT_S", 5.0)
    (entry,) = await here.entries(refused)
    assert (entry.status, entry.http_status, entry.cost_nano) == ("voided", 503, 0)
    assert await away.owner.holders() == {}
    assert (await here.system.books.usage())["total_requests"] == 3
    assert here.at_rest


async def test_a_strict_ledger_has_the_intent_while_the_provider_is_asked(house: Open) -> None:
    here = await house(ledger={"durability": "strict"})
    owner: Any = here.system._refs["ledger"].owner  # type: ignore[attr-defined]
    gate = asyncio.Event()
    here.provider.steps["openai/a"] = [gate]
    call = here.call()
    task = asyncio.create_task(here.pipeline.answer(call))
    while not here.provider.asked:
        await settle()
    assert await owner.holders() == {here.system.holder: 1}
    assert await here.entries(call) == []
    gate.set()
    await task
    assert [e.status for e in await here.entries(call)] == ["posted"]
    assert await owner.holders() == {}
