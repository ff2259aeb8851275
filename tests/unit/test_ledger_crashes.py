"""What a ledger file holds after power cuts, kills, a full disk and a failing one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from actors.ledger.owner import Ledger
from actors.ledger.policy import Entry, StoreFailed, fold
from tests.support.failing_disk import Disk, State, is_whole, lay_out
from tests.unit.test_ledger_owner import entry

LIVES = 6


async def live(
    ledger: Ledger, batches: list[list[Entry]], on_ack: Callable[[list[Entry]], None]
) -> None:
    """Sends the batches, several at once, as desks do. What fails stays with them."""

    async def send(number: int, batch: list[Entry]) -> None:
        try:
            await ledger.append("h", number, batch)
        except StoreFailed:
            return
        on_ack(batch)

    for start in range(0, len(batches), 3):
        await asyncio.gather(*(send(n, b) for n, b in enumerate(batches[start : start + 3])))


def heard_at(disk: Disk, told: list[tuple[int, list[Entry]]]) -> Callable[[list[Entry]], None]:
    return lambda batch: told.append((len(disk.events), batch))


@pytest.mark.parametrize("seed", range(8))
async def test_nothing_acknowledged_is_lost_over_power_cuts_and_kills(
    seed: int, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    state: State = {}
    sent: dict[str, Entry] = {}
    acknowledged: set[str] = set()
    waiting: list[list[Entry]] = []
    for number in range(LIVES):
        at = tmp_path / str(number)
        at.mkdir()
        lay_out(state, at)
        path = at / "ledger.db"
        fresh = [
            [
                entry(rng.randrange(10**9), tenant=rng.choice("abc"))
                for _ in range(rng.randint(1, 9))
            ]
            for _ in range(rng.randint(1, 12))
        ]
        sent.update((e.id, e) for batch in fresh for e in batch)
        batches = [*waiting, *fresh]
        told: list[tuple[int, list[Entry]]] = []
        with Disk(state) as disk:
            ledger = Ledger(str(path), lock_wait_s=0)
            disk.broken = rng.random() < 0.2  # for one batch or two
            await live(ledger, batches[:2], heard_at(disk, told))
            disk.broken = False
            await live(ledger, batches[2:], heard_at(disk, told))
            if rng.random() < 0.5:
                await ledger.close()
            ended = len(disk.events)
        await ledger.close()
        moment = rng.randint(0, ended)
        state = disk.state(moment)
        if rng.random() < 0.6:
            state = {name: file.power_cut(rng) for name, file in state.items()}
        heard = [batch for events, batch in told if events <= moment]
        acknowledged.update(e.id for batch in heard for e in batch)
        waiting = [batch for batch in batches if batch not in heard]
    last = tmp_path / "last"
    last.mkdir()
    lay_out(state, last)
    ledger = Ledger(str(last / "ledger.db"), lock_wait_s=0)
    kept = [e for id_ in sent for e in await ledger.entries(f"r{id_[1:]}")]
    usage = await ledger.usage()
    await ledger.close()
    assert acknowledged <= {e.id for e in kept}
    assert all(sent[e.id] == e for e in kept)
    assert usage["total_cost_nano"] == fold(kept).cost_nano
    assert usage["entries"] == len(kept)
    assert is_whole(last / "ledger.db") == "ok"


@pytest.mark.parametrize("how", ["full", "broken"])
async def test_a_disk_that_is_full_or_fails_acknowledges_nothing_and_comes_back(
    how: str, tmp_path: Path
) -> None:
    path = tmp_path / "ledger.db"
    with Disk() as disk:
        ledger = Ledger(str(path), lock_wait_s=0)
        assert await ledger.append("h", 1, [entry(1)]) == 1
        setattr(disk, how, True)
        for _ in range(3):
            with pytest.raises(StoreFailed, match="full" if how == "full" else "I/O error"):
                await ledger.append("h", 2, [entry(2), entry(3)])
        assert ledger.stats()["failing"] == ledger.stats()["last_error"]
        setattr(disk, how, False)
        assert await ledger.append("h", 2, [entry(2), entry(3)]) == 3
        assert ledger.stats()["failing"] is None
        assert ledger.stats()["failures"] == 3
        left = disk.state()
    await ledger.close()
    at = tmp_path / "after"
    at.mkdir()
    lay_out({name: file.power_cut(random.Random(1)) for name, file in left.items()}, at)
    assert is_whole(at / "ledger.db") == "ok"
    again = Ledger(str(at / "ledger.db"), lock_wait_s=0)
    assert await again.count() == 3
    await again.close()


async def test_what_waits_shares_one_sync(tmp_path: Path) -> None:
    with Disk() as disk:
        ledger = Ledger(str(tmp_path / "ledger.db"), lock_wait_s=0)
        await ledger.count()
        before = disk.syncs
        await asyncio.gather(*(ledger.append("h", n, [entry(n)]) for n in range(1, 501)))
        assert await ledger.count() == 500
        commits, syncs = ledger.stats()["commits"], disk.syncs - before
        assert syncs == commits <= 10
        await ledger.close()
