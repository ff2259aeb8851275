from __future__ import annotations

from collections.abc import AsyncIterator
from decimal import Decimal
from itertools import starmap
from typing import Any

import pytest

from actors.batcher.policy import Paid, Spare
from actors.ledger.desk import LedgerDesk
from actors.ledger.owner import Ledger
from actors.ledger.policy import TENANTS_PER_READ_MAX, Entry
from actors.rate_limiter.terms import Amount, Seed
from actors.ref import InlineRef, OwnerUnavailable
from forebay.books import HEDGING, Books
from forebay.call import Call, Facts
from forebay.codec import Answer
from forebay.errors import (
    DeploymentsBusy,
    GatewayError,
    GatewayTimeout,
    InvalidRequest,
    Overloaded,
    ProviderConnectionError,
    ProviderError,
)
from forebay.providers.prices import PriceBound, Rate
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
    entry = await books.open_call(call, Facts("m", attempts=1), deployment)
    error = DeploymentsBusy("busy")
    assert books.fail_call(entry, error, asked=asked) == Amount()
    assert (await books.usage())["total_requests"] == rows
    assert world.desk.stats()["open"] == 0


async def test_what_was_paid_is_booked_though_the_last_part_asked_nobody(world: World) -> None:
    books = world.books()
    call = Call("embedding", {"input": "a"}, "acme", "r1")
    deployment = Deployment("d", "m", "openai/m", "openai", {})
    entry = await books.open_call(call, Facts("m", attempts=1), deployment)
    error = DeploymentsBusy("busy")
    error.paid = Paid(3, 21, "m")  # type: ignore[attr-defined]
    assert books.fail_call(entry, error, asked=False) == Amount(3, 21)
    assert (await books.usage())["total_cost_nano"] == 21


# --------------------------------------------------------------------- everything is an entry


class Prices:
    """A provider whose list of prices comes when it is warm: 2 and 10 nano-USD per token."""

    def __init__(self) -> None:
        self.is_warm = False

    async def warm(self) -> None:
        self.is_warm = True

    def price_version(self, deployment: Deployment) -> str:
        return "list 1"

    def price_bound(self, deployment: Deployment) -> PriceBound | None:
        if not self.is_warm or deployment.id == "unknown":
            return None
        rate = Rate(Decimal(2), Decimal(10))
        return PriceBound(rate, rate)


def chat(max_tokens: int | None = 7) -> Call:
    messages = [{"role": "user", "content": "hi"}]
    body = {"messages": messages, "max_tokens": max_tokens}
    return Call("chat", {k: v for k, v in body.items() if v is not None}, "acme", "r1")


def deployment(name: str = "d") -> Deployment:
    return Deployment(name, "m", "openai/m", "openai", {})


def priced(world: World, **options: Any) -> Books:
    prices = Prices()
    return world.books(prices=lambda: prices, **options)


async def rows(world: World, request_id: str = "r1") -> list[Any]:
    await world.desk.flush()
    return await world.owner.entries(request_id)


def unconnected() -> ProviderConnectionError:
    error = ProviderConnectionError("refused")
    error.sent = False
    return error


@pytest.mark.parametrize(
    ("error", "status", "http_status"),
    [
        (None, "unsettled", 499),
        (GatewayTimeout("late"), "unsettled", 504),
        (ProviderConnectionError("reset"), "unsettled", 502),
        (ProviderError("makes no sense"), "unsettled", 502),
        (unconnected(), "voided", 502),
        (ProviderError("down", upstream_status=500), "voided", 502),
        (GatewayTimeout("late", upstream_status=408), "voided", 504),
        (InvalidRequest("no"), "voided", 400),
        (Overloaded("full"), "voided", 503),
    ],
)
async def test_a_lost_answer_holds_the_most_it_may_cost_and_a_refused_one_nothing(
    world: World, error: GatewayError | None, status: str, http_status: int
) -> None:
    books = priced(world)
    entry = await books.open_call(chat(), Facts("m", attempts=1), deployment())
    books.void_call(entry, error)
    (row,) = await rows(world)
    most = 2 * (32 + 6 + 2 + 4) + 10 * 7  # the request, a message, "hi" and "user", the answer
    assert (row.status, row.http_status) == (status, http_status)
    assert (row.cost_nano, row.most_nano) == ((most, most) if status == "unsettled" else (0, 0))


async def test_a_loss_at_the_batcher_may_have_cost_something(world: World) -> None:
    books = priced(world)
    entry = await books.open_call(chat(), Facts("m", attempts=1), deployment())
    try:
        try:
            raise OwnerUnavailable("batcher", "it died")
        except OwnerUnavailable as error:
            raise Overloaded(f"texts cannot be sent now: {error}") from None
    except Overloaded as error:
        books.void_call(entry, error)
    (row,) = await rows(world)
    assert row.status == "unsettled"


async def test_where_no_price_is_known_the_most_is_flagged_as_unknown(world: World) -> None:
    books = priced(world)
    entry = await books.open_call(chat(), Facts("m", attempts=1), deployment("unknown"))
    books.void_call(entry, None)
    (row,) = await rows(world)
    assert (row.status, row.cost_nano, row.unpriced) == ("unsettled", 0, True)


async def test_without_a_word_of_its_length_an_answer_may_be_the_longest_there_is(
    world: World,
) -> None:
    entry = await priced(world).open_call(chat(None), Facts("m", attempts=1), deployment())
    assert entry is not None
    assert entry.most_nano == 2 * 44 + 10 * 131_072


async def test_the_calls_of_tools_that_an_answer_asks_for_are_counted(world: World) -> None:
    books = world.books()
    entry = await books.open_call(chat(), Facts("m", attempts=1), deployment())
    message = {"tool_calls": [{"id": "1"}, {"id": "2"}], "content": None}
    answer = Answer({"choices": [{"message": message}]}, {"prompt_tokens": 1}, 5, "m")
    books.post_call(entry, answer)
    (row,) = await rows(world)
    assert row.tool_calls == 2
    assert (await books.usage())["tool_calls"] == 2


async def test_what_came_for_nothing_tells_what_it_saved(world: World) -> None:
    books = world.books()
    facts = Facts("m", cache="hit", saved_nano=12)
    books.free(chat(), facts, 0.001)
    books.end_call(chat(), facts, "ok")
    (row,) = await rows(world)
    assert (row.status, row.cost_nano, row.saved_nano) == ("hit", 0, 12)
    assert (await books.usage())["saved_cost_nano"] == 12


async def test_each_request_is_served_refused_or_failed_and_counted_once(world: World) -> None:
    books = world.books()
    for _ in range(500):
        books.end_call(chat(), Facts("m"), "429")
    for _ in range(20):
        books.end_call(chat(), None, "404")
    books.end_call(chat(), Facts("m"), "cancelled")
    books.end_call(chat(), Facts("m", cache="joined"), "502")
    entry = await books.open_call(chat(), made := Facts("m", attempts=1), deployment())
    books.post_call(entry, Answer({}, {"prompt_tokens": 1}, 5, "m"))
    books.end_call(chat(), made, "ok")
    usage = await books.usage()
    assert usage["total_requests"] == 523
    assert usage["refused_requests"] == 520
    assert (usage["failed_requests"], usage["successful_requests"]) == (2, 1)
    assert usage["entries"] == 5


async def test_a_strict_ledger_has_the_intent_before_the_call(world: World) -> None:
    books = priced(world, strict=True)
    sent = world.ref.sent["append"]
    entry = await books.open_call(chat(), Facts("m", attempts=1), deployment())
    assert world.ref.sent["append"] == sent + 1
    books.post_call(entry, Answer({}, {"prompt_tokens": 1}, 5, "m"))
    (row,) = await rows(world)
    assert (row.status, row.cost_nano) == ("posted", 5)


async def test_a_strict_ledger_that_is_away_stops_the_call_and_the_request_counts_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.ledger.desk.INTENT_WAIT_S", 0.0)
    books, facts = world.books(strict=True), Facts("m", attempts=1)
    await world.owner.close()
    with pytest.raises(Overloaded, match="did not take the intent"):
        await books.open_call(chat(), facts, deployment())
    books.end_call(chat(), facts, "503")
    held = [(entry.status, entry.attempt) for entry in starmap(Entry, world.desk._buffer)]
    assert held == [("open", 1), ("voided", 1)]
