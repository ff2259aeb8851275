from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from actors.batcher.policy import Paid, Spare
from actors.ledger.desk import LedgerDesk
from actors.ledger.owner import Ledger
from actors.ledger.policy import TENANTS_PER_READ_MAX
from actors.rate_limiter.terms import Amount, Seed
from actors.ref import InlineRef, OwnerUnavailable
from forebay.books import HEDGING, Books
from forebay.call import Call, Facts
from forebay.errors import DeploymentsBusy
from forebay.routing import Deployment

NOW_S = 1_700_000_000.0
DAY, MONTH = 19_675, 2023 * 12 + 10
CALL: dict[str, Any] = {"request_id": "r1", "tenant": "acme", "route": "chat", "model": "m"}


class World:
    """A ledger, its desk, and a wall clock that stands still."""

    def __init__(self) -> None:
        self.now_s = NOW_S
        self.owner = Ledger()
        self.ref = InlineRef("ledger", self.owner)
        self.desk = LedgerDesk(self.ref, "desk", wall=lambda: self.now_s)

    def books(self, **options: Any) -> Books:
        return Books(self.desk, **{"enabled": True, "wall": lambda: self.now_s, **options})

    def pay(self, cost_nano: int) -> None:
        self.desk.post(self.desk.open(**CALL, deployment="d"), prompt_tokens=1, cost_nano=cost_nano)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.desk.start()
    yield world
    await world.desk.close()
    await world.owner.close()


async def test_a_seed_is_what_the_ledger_knows_of_a_tenant(world: World) -> None:
    books = world.books()
    world.pay(70)
    world.now_s += 150
    world.pay(7)
    mark = books.mark()
    assert books.commit_of(mark) is None
    assert await books.seeds(["acme", "nobody"]) == [
        Seed(2, DAY, 77, MONTH, 77, ((0, 1), (2, 1))),
        Seed(2, DAY, 0, MONTH, 0),
    ]
    assert books.commit_of(mark) == 2


async def test_hits_count_for_tenants_that_say_so(world: World) -> None:
    world.desk.note("hit", **CALL)
    world.desk.note("hit", **CALL | {"tenant": "zenith"})
    world.pay(1)
    world.now_s += 60
    world.desk.note("hit", **CALL)
    books = world.books(count_hits=lambda tenant: tenant == "acme")
    acme, zenith = await books.seeds(["acme", "zenith"])
    assert acme.minutes == ((0, 1), (1, 2))
    assert zenith.minutes == ()
    (zenith,) = await world.books().seeds(["zenith"])
    assert zenith.minutes == ((1, 1),)


async def test_many_tenants_are_asked_for_in_several_messages(world: World) -> None:
    world.pay(5)
    names = [f"t{n}" for n in range(2 * TENANTS_PER_READ_MAX)] + ["acme"]
    seeds = await world.books().seeds(names)
    assert len(seeds) == len(names)
    assert [seed.day_nano for seed in seeds] == [0] * (len(names) - 1) + [5]
    assert world.ref.sent["spent"] == 3
    assert await world.books().seeds([]) == []


async def test_books_that_are_off_know_nothing_and_have_nothing_to_wait_for(world: World) -> None:
    books = world.books(enabled=False)
    assert (books.mark(), books.commit_of(books.mark())) == (0, 1)
    assert await books.seeds(["acme", "zenith"]) == [Seed(commit=0)] * 2
    assert not world.ref.sent


async def test_a_ledger_that_cannot_be_read_gives_no_seed(world: World) -> None:
    world.pay(1)
    await world.desk.flush()
    await world.owner.close()
    with pytest.raises(OwnerUnavailable):
        await world.books().seeds(["acme"])


async def test_what_a_second_copy_has_cost_is_in_the_totals_and_on_no_tenants_bill(
    world: World,
) -> None:
    books = world.books()
    world.pay(70)
    call = Call("embedding", {"input": "a"}, "acme", "r1")
    deployment = Deployment("d", "m", "openai/m", "openai", {})
    books.spare(call, Facts("m", attempts=1), deployment, Spare(3, 21, "m", estimated=True))
    by_tenant = (await books.usage(group_by="tenant"))["by_tenant"]
    assert by_tenant["acme"]["total_cost_nano"] == 70
    assert by_tenant[HEDGING]["total_cost_nano"] == 21
    totals = await books.usage()
    assert totals["total_cost_nano"] == 91
    assert totals["total_requests"] == totals["successful_requests"] == 1
    assert totals["estimated_entries"] == 1


@pytest.mark.parametrize(("asked", "rows"), [(True, 1), (False, 0)])
async def test_an_attempt_that_asked_nobody_is_in_no_book(
    world: World, asked: bool, rows: int
) -> None:
    books = world.books()
    call = Call("embedding", {"input": "a"}, "acme", "r1")
    deployment = Deployment("d", "m", "openai/m", "openai", {})
    entry = books.open_call(call, Facts("m", attempts=1), deployment)
    error = DeploymentsBusy("busy")
    assert books.fail_call(entry, error, asked=asked) == Amount()
    assert (await books.usage())["total_requests"] == rows
    assert world.desk.stats()["open"] == 0


async def test_what_was_paid_is_booked_though_the_last_part_asked_nobody(world: World) -> None:
    books = world.books()
    call = Call("embedding", {"input": "a"}, "acme", "r1")
    deployment = Deployment("d", "m", "openai/m", "openai", {})
    entry = books.open_call(call, Facts("m", attempts=1), deployment)
    error = DeploymentsBusy("busy")
    error.paid = Paid(3, 21, "m")  # type: ignore[attr-defined]
    assert books.fail_call(entry, error, asked=False) == Amount(3, 21)
    assert (await books.usage())["total_cost_nano"] == 21
