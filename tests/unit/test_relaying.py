"""A stream ends once, whatever its own client does and whoever follows it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.cache.policy import Lead
from forebay.call import Call, Stream
from forebay.errors import GatewayError, GatewayTimeout, Overloaded, ProviderError
from tests.support.fake_time import settle
from tests.support.house import House, open_house
from tests.support.readers import Reader, Slow, drained, opened, words

Open = Callable[..., Awaitable[House]]
ALL = "abcdefghij"
CUT = ProviderError("cut", upstream_status=502)
SOON_S = 0.02


class Ends:
    """What became of streams: how often each was posted, landed, and finished, and as what."""

    def __init__(self, here: House, monkeypatch: pytest.MonkeyPatch) -> None:
        self.posted: list[str | None] = []
        self.landed: list[str] = []
        self.finished: Counter[str] = Counter()
        post, land = here.system.books.post_call, here.system.cache.land
        finish = here.system.meter.request

        def posted(entry: Any, answer: Any, error: GatewayError | None = None) -> None:
            self.posted.append(None if error is None else type(error).__name__)
            post(entry, answer, error)

        def landed(lead: Lead, value: Any = None, error: Any = None, ttl_s: Any = None) -> None:
            self.landed.append("value" if value else "error" if error else "nothing")
            land(lead, value, error, ttl_s)

        def finished(route: str, model: str, tenant: str, status: str, *times: float) -> None:
            self.finished[status] += 1
            finish(route, model, tenant, status, *times)

        monkeypatch.setattr(here.system.books, "post_call", posted)
        monkeypatch.setattr(here.system.cache, "land", landed)
        monkeypatch.setattr(here.system.meter, "request", finished)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not true():
            await settle()


def time_is_up(stream: Stream) -> None:
    """Its client's deadline, without the wait for it."""
    chunks: Any = stream.chunks
    chunks.ag_frame.f_locals["self"]._expire()


def lose_the_leader(here: House) -> None:
    """As for those elsewhere who follow a process that dies, and is silent for too long."""
    now_s = time.monotonic()
    here.system._refs["cache"].owner._lapse(now_s + 60)  # type: ignore[attr-defined]
    for channel in here.system.cache._channels:
        channel.give_up(now_s + 86_400)


async def followed(here: House) -> Reader:
    """Somebody who follows the stream under way, and of whom its leader knows."""
    follower = Reader(here)
    await until(lambda: bool(here.system.cache.stats()["following"]))
    await settle()
    return follower


async def test_a_client_that_does_not_read_holds_up_none_who_follow(house: Open) -> None:
    here = await house(enable_caching=True)
    slow = Slow(here)
    await slow.say(1)
    leader = await opened(here)
    await anext(leader.chunks)
    follower = await followed(here)
    await slow.say(5)
    await follower.hears("abcde")
    await slow.say(10)
    await follower.end()

    assert follower.heard == ALL
    assert "a" + words(await drained(leader)) == ALL, "it finds what it has not taken"
    assert here.provider.asked == ["openai/a"]
    assert (await opened(here)).facts.cache == "hit"
    assert here.at_rest


async def test_a_stream_that_nobody_follows_waits_for_its_client(house: Open) -> None:
    here = await house()
    said = []
    here.provider.between = lambda: said.append(1)
    stream = await opened(here)
    for _ in range(5):
        await settle()

    assert len(said) == 0, "the provider is asked for the second chunk when the first is taken"
    await anext(stream.chunks)
    await anext(stream.chunks)
    assert len(said) == 1
    assert "carried" not in here.system.cache.stats()
    await stream.chunks.aclose()


async def test_who_is_too_far_behind_is_cut_off_and_the_others_go_on(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.relaying.UNTAKEN_BYTES_MAX", 150)
    here = await house()
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    await slow.say(1)
    call = here.call()
    leader = await here.pipeline.stream(call)
    await anext(leader.chunks)
    follower = await followed(here)
    for count in range(2, 11):
        await slow.say(count)
    await follower.end()
    with pytest.raises(GatewayTimeout, match=r"cut off: 1\d\d bytes of it were not taken"):
        await drained(leader)

    (entry,) = await here.entries(call)
    assert follower.heard == ALL
    assert (entry.status, entry.error, entry.http_status) == ("posted", None, 200)
    assert (ends.posted, ends.landed) == ([None], ["value"])
    assert ends.finished == {"504": 1, "ok": 1}
    assert here.at_rest


async def test_one_chunk_over_the_bound_cuts_nobody_off(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.relaying.UNTAKEN_BYTES_MAX", 10)
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(1)
    follower = await followed(here)
    for count in range(2, 10):
        await slow.say(count)

    assert leader.heard == follower.heard == "abcdefghi"
    await leader.leave()
    await follower.leave()
    await slow.say(10)
    await until(lambda: here.at_rest)


@pytest.mark.parametrize("reads", [True, False])
async def test_a_clients_own_deadline_does_not_end_the_stream_of_others(
    house: Open, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    here = await house()
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    await slow.say(1)
    leader = await opened(here, timeout_s=50.0)
    await anext(leader.chunks)
    reading = asyncio.create_task(drained(leader)) if reads else None
    follower = await followed(here)
    await slow.say(3)
    await follower.hears("abc")
    time_is_up(leader)
    assert ends.finished["504"] == 1
    with pytest.raises(GatewayTimeout, match="did not end" if reads else "not taken"):
        await (reading or drained(leader))
    await slow.say(10)
    await follower.end()

    assert follower.heard == ALL
    assert (ends.posted, ends.landed) == ([None], ["value"])
    assert ends.finished == {"504": 1, "ok": 1}
    assert here.provider.asked == ["openai/a"]
    assert here.at_rest


@pytest.mark.parametrize("reads", [True, False])
async def test_a_clients_own_deadline_ends_a_stream_that_nobody_follows(
    house: Open, monkeypatch: pytest.MonkeyPatch, reads: bool
) -> None:
    here = await house()
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    await slow.say(1)
    leader = await opened(here, timeout_s=SOON_S)
    await anext(leader.chunks)
    if not reads:
        await until(lambda: ends.finished["504"] == 1)
        await until(lambda: here.at_rest)  # the provider need not be told by the client's leaving
    with pytest.raises(GatewayTimeout, match="did not end" if reads else "not taken"):
        await drained(leader)

    assert (ends.posted, ends.landed) == (["GatewayTimeout"], ["nothing"])
    assert ends.finished == {"504": 1}
    assert here.outcomes() == {"ignored": 1}
    assert here.at_rest


async def test_a_client_that_leaves_before_others_were_told_anything_leaves_them_the_lead(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house()
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    leader = Reader(here)
    await slow.say(2)  # it waits for the provider now
    followers = [await followed(here) for _ in range(3)]
    await leader.leave()
    await until(lambda: len(here.provider.asked) == 2)
    await slow.say(10)
    for follower in followers:
        await follower.end()

    assert [one.heard for one in followers] == [ALL] * 3
    assert sorted(one.cache for one in followers) == ["joined", "joined", "miss"]
    assert (ends.posted, ends.landed) == ([None, None], ["nothing", "value"])
    assert here.provider.asked == ["openai/a"] * 2
    assert here.at_rest


async def test_a_leader_that_is_dead_is_followed_by_exactly_one(house: Open) -> None:
    here = await house()
    slow = Slow(here)
    leader = Reader(here)
    await until(lambda: bool(here.provider.asked))
    followers = [await followed(here) for _ in range(3)]
    lose_the_leader(here)
    await until(lambda: len(here.provider.asked) == 2)
    await slow.say(10)
    for follower in followers:
        await follower.end()

    assert [one.heard for one in followers] == [ALL] * 3
    assert sorted(one.cache for one in followers) == ["joined", "joined", "miss"]
    assert here.provider.asked == ["openai/a"] * 2
    await leader.end()
    assert here.at_rest


async def test_a_failure_goes_to_those_who_follow_and_the_next_one_tries_anew(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house()
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    await slow.say(1)
    leader = await opened(here)
    follower = await followed(here)
    await slow.say(3)
    here.provider.cut = CUT
    await slow.say(4)
    with pytest.raises(ProviderError, match="cut"):
        await follower.end()
    taken = []
    with pytest.raises(ProviderError, match="cut"):
        async for chunk in leader.chunks:
            taken.append(chunk)
    here.provider.cut = None
    await slow.say(10)
    again = await opened(here)

    assert words(taken) == "abcd"
    assert follower.heard in ("abc", "abcd"), "what comes with the end may go with it"
    assert again.facts.cache == "miss"
    assert words(await drained(again)) == ALL
    assert (ends.posted, ends.landed) == (["ProviderError", None], ["error", "value"])
    assert here.at_rest


async def test_closing_the_system_ends_a_stream_that_is_read_for_others(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = await house(rate_limit_config={"concurrent_requests": 1})
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    await slow.say(1)
    leader = await opened(here)
    follower = await followed(here)
    await slow.say(2)
    await follower.hears("ab")
    await here.system.cache.close()
    with pytest.raises(Overloaded, match="stopped"):
        await drained(leader)
    await follower.leave()

    assert (ends.posted, ends.landed) == ([None], ["nothing"])
    assert here.outcomes() == {"ignored": 1}
    assert here.system.limiter.stats()["slots_used"] == 0
    assert here.provider.streams_open == 0


async def test_what_a_closing_system_settles_is_in_the_books(tmp_path: Path) -> None:
    books: dict[str, Any] = {"ledger_url": f"sqlite:///{tmp_path}/books.db"}
    here = await open_house(tmp_path, **books)
    slow = Slow(here)
    await slow.say(1)
    leader = Reader(here)
    await slow.say(1)
    follower = await followed(here)
    await slow.say(2)
    await leader.leave()
    await here.system.close()
    await follower.leave()

    again = await open_house(tmp_path, **books)
    (entry,) = await again.entries(leader.call)
    await again.system.close()
    assert entry.status == "posted"


async def test_where_no_more_are_read_for_others_they_are_told_by_its_end(
    house: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.cache.desk.CARRIED_MAX", 0)
    here = await house()
    slow = Slow(here)
    await slow.say(10)
    leader = await opened(here)
    follower = await followed(here)
    taken = [await anext(leader.chunks) for _ in range(3)]
    await settle()
    assert follower.heard == ""
    taken += await drained(leader)
    await follower.end()

    assert words(taken) == follower.heard == ALL
    assert here.at_rest


# What its own client does, what becomes of the stream, and what who follows it does.
OWN = ["reads", "waits", "leaves", "leaves while it waits", "never comes back", "is late"]
FATES = ["whole", "cut", "closed"]
OTHERS = ["stays", "leaves"]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("fate", FATES)
@pytest.mark.parametrize("own", OWN)
async def test_a_followed_stream_ends_once(
    house: Open, monkeypatch: pytest.MonkeyPatch, own: str, fate: str, other: str
) -> None:
    here = await house(enable_caching=True, rate_limit_config={"concurrent_requests": 1})
    ends = Ends(here, monkeypatch)
    slow = Slow(here)
    await slow.say(1)
    call: Call = here.call(timeout_s=50.0 if own == "is late" else None)
    leader = await here.pipeline.stream(call)
    await anext(leader.chunks)
    follower = await followed(here)
    await slow.say(2)
    await follower.hears("ab")
    reading = None
    if own in ("reads", "leaves while it waits"):
        reading = asyncio.create_task(drained(leader))
        await settle()
    if own == "leaves while it waits" and reading is not None:
        reading.cancel()
        await asyncio.wait([reading])
    elif own == "leaves":
        await leader.chunks.aclose()
    elif own == "is late":
        time_is_up(leader)
    if other == "leaves":
        await follower.leave()
    if fate == "cut":
        here.provider.cut = CUT
    if fate == "closed":
        await here.system.cache.close()
    await slow.say(10)
    await until(lambda: bool(ends.landed))
    if reading is not None:
        await asyncio.wait([reading])
    elif own == "waits":
        await asyncio.gather(drained(leader), return_exceptions=True)
    elif own == "never comes back":
        leader = None  # type: ignore[assignment]
    if other == "stays" and fate != "closed":
        await asyncio.gather(follower.end(), return_exceptions=True)
        assert follower.heard == ALL if fate == "whole" else follower.heard in ("ab", "abc")
    await follower.leave()
    await settle()

    (entry,) = await here.entries(call)
    assert (entry.status, entry.error is None) == ("posted", fate != "cut")
    assert len(ends.posted) == 1
    assert ends.landed == [{"whole": "value", "cut": "error", "closed": "nothing"}[fate]]
    assert ends.finished.total() == 2, "of each request there is one end"
    assert len(here.outcomes()) == 1
    assert here.provider.asked == ["openai/a"]
    assert here.system.limiter.stats()["slots_used"] == 0
    assert here.provider.streams_open == 0
