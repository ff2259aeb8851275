"""The push channel, with hosts that die and lines that break."""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections import Counter
from typing import Any

import pytest

from actors.ref import InlineRef, OwnerUnavailable
from actors.watch import GONE, KEYS_MAX, Backoff, SnapshotHost, WatchClient
from tests.support.fake_time import FakeTime, settle


class Owner:
    """The least that is an owner with snapshots."""

    def __init__(self, start: int = 1) -> None:
        self.snapshots = SnapshotHost("owner", getrandbits=lambda _: start)

    async def watch(self, seen: dict[str, int], hold_s: float = 20.0) -> Any:
        return await self.snapshots.watch(seen, hold_s)


class Line:
    """A line to an owner that can be cut, and that fails like an actor's when the owner dies."""

    name = "owner"

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.sent: Counter[str] = Counter()
        self.failure: Exception | None = None
        self.asked: list[dict[str, int]] = []
        self._pending: set[asyncio.Task[Any]] = set()

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        self.asked.append(dict(args[0]))
        if self.failure is not None:
            raise self.failure
        task = asyncio.ensure_future(getattr(self.owner, method)(*args))
        self._pending.add(task)
        try:
            return pickle.loads(pickle.dumps(await task))
        except asyncio.CancelledError:
            if self.failure is not None and task.cancelled():
                raise self.failure from None
            raise
        finally:
            task.cancel()
            self._pending.discard(task)

    def cut(self, failure: Exception | None = None) -> None:
        self.failure = failure or OwnerUnavailable(self.name, "it died")
        for task in self._pending:
            task.cancel()

    def mend(self, owner: Any = None) -> None:
        self.failure = None
        self.owner = owner or self.owner


class Heard(dict[str, Any]):
    """What a client was told: the newest values, and all of them in order."""

    def __init__(self) -> None:
        self.said: list[tuple[str, Any]] = []

    def __call__(self, key: str, value: Any) -> None:
        self.said.append((key, value))
        self[key] = value


async def watching(owner: Any) -> tuple[Line, Heard, WatchClient, FakeTime]:
    line, heard, time = Line(owner), Heard(), FakeTime()
    client = WatchClient(line, heard, time, lambda: 0.5, sleep=time.sleep)
    await client.start()
    return line, heard, client, time


async def test_what_differs_is_answered_at_once() -> None:
    host = SnapshotHost(getrandbits=lambda _: 10)
    host.publish("a", "x")
    host.publish("b", "y")

    assert await host.watch({}) == {"a": (11, "x"), "b": (12, "y")}
    assert await host.watch({"a": 11, "b": 7}) == {"b": (12, "y")}


async def test_a_poll_with_nothing_new_ends_empty_after_its_hold() -> None:
    host = SnapshotHost()
    host.publish("a", "x")
    seen = {key: version for key, (version, _) in (await host.watch({})).items()}

    assert await host.watch(seen, hold_s=0.0) == {}
    assert host.waiting == 0


async def test_a_held_poll_is_answered_by_the_next_change() -> None:
    host = SnapshotHost(getrandbits=lambda _: 0)
    poll = asyncio.ensure_future(host.watch({}))
    await settle()
    assert host.waiting == 1
    host.publish("a", "x")

    assert await poll == {"a": (1, "x")}
    assert host.waiting == 0


async def test_changes_of_one_moment_travel_together_and_only_the_newest_of_each_key() -> None:
    host = SnapshotHost(getrandbits=lambda _: 0)
    polls = [asyncio.ensure_future(host.watch({})) for _ in range(3)]
    await settle()
    for value in range(5):
        host.publish("a", value)
    host.publish("b", "y")

    assert await asyncio.gather(*polls) == [{"a": (5, 4), "b": (6, "y")}] * 3


async def test_a_withdrawn_key_is_said_to_be_gone_and_counts_as_new_when_it_returns() -> None:
    host = SnapshotHost(getrandbits=lambda _: 0)
    host.publish("a", "x")
    host.withdraw("a")
    assert await host.watch({"a": 1}) == {"a": (GONE, None)}
    host.publish("a", "x")

    assert await host.watch({"a": 1}) == {"a": (2, "x")}


async def test_a_closed_host_sends_its_waiters_away() -> None:
    host = SnapshotHost("owner")
    poll = asyncio.ensure_future(host.watch({}))
    await settle()
    host.close()

    with pytest.raises(OwnerUnavailable, match="closed"):
        await poll
    with pytest.raises(OwnerUnavailable, match="closed"):
        await host.watch({})


def test_a_host_refuses_more_keys_than_it_may_hold() -> None:
    host = SnapshotHost()
    for number in range(KEYS_MAX):
        host.publish(str(number), None)
    host.publish("0", "changed")

    with pytest.raises(ValueError, match="keys already"):
        host.publish("one more", None)


def test_a_host_needs_no_running_loop_to_be_made_and_published_to() -> None:
    host = SnapshotHost()
    host.publish("a", "x")

    assert asyncio.run(host.watch({}))["a"][1] == "x"


async def test_a_client_has_the_first_snapshot_when_it_has_started() -> None:
    owner = Owner()
    owner.snapshots.publish("a", "x")
    _, heard, client, _ = await watching(owner)

    assert heard == {"a": "x"}
    assert client.connected
    await client.close()


async def test_a_client_starts_on_a_host_that_has_nothing_yet() -> None:
    owner = Owner()
    _, heard, client, _ = await watching(owner)
    assert heard == {}
    owner.snapshots.publish("a", "x")
    await settle()

    assert heard == {"a": "x"}
    await client.close()


async def test_a_client_that_finds_no_owner_says_so_and_may_start_again() -> None:
    line, heard = Line(Owner()), Heard()
    line.owner.snapshots.publish("a", "x")
    line.cut()
    client = WatchClient(line, heard)
    with pytest.raises(OwnerUnavailable):
        await client.start()
    assert not client.connected
    line.mend()
    await client.start()

    assert heard == {"a": "x"}
    await client.close()


async def test_no_change_between_two_polls_is_lost() -> None:
    owner = Owner()
    _, heard, client, _ = await watching(owner)
    for value in range(200):
        owner.snapshots.publish("a", value)
        owner.snapshots.publish(f"k{value % 7}", value)
        await settle(value % 4)
    await settle()

    assert heard["a"] == 199
    assert {heard[f"k{n}"] for n in range(7)} == set(range(193, 200))
    await client.close()


async def test_a_client_hears_only_what_has_changed() -> None:
    owner = Owner()
    owner.snapshots.publish("a", 1)
    owner.snapshots.publish("b", 1)
    _, heard, client, _ = await watching(owner)
    owner.snapshots.publish("a", 2)
    await settle()

    assert heard.said == [("a", 1), ("b", 1), ("a", 2)]
    assert client.changes == 3
    await client.close()


async def test_a_client_of_a_dead_host_resumes_and_hears_what_it_missed() -> None:
    owner = Owner()
    owner.snapshots.publish("a", 1)
    line, heard, client, time = await watching(owner)
    line.cut()
    await settle()
    assert not client.connected
    owner.snapshots.publish("a", 2)
    await time.advance(5.0)
    assert client.away_s == 5.0
    assert heard == {"a": 1}
    line.mend()
    await time.advance(1.0)

    assert client.connected
    assert client.away_s == 0.0
    assert heard == {"a": 2}
    await client.close()


async def test_a_restarted_host_is_seen_as_change_even_with_the_same_keys_and_values() -> None:
    owner = Owner(start=1_000)
    owner.snapshots.publish("a", 1)
    owner.snapshots.publish("lost", 1)
    line, heard, client, time = await watching(owner)
    line.cut()
    again = Owner(start=77)
    again.snapshots.publish("a", 1)
    line.mend(again)
    await time.advance(1.0)

    assert heard.said == [("a", 1), ("lost", 1), ("a", 1), ("lost", None)]
    assert line.asked[-1] == {"a": 78}
    await client.close()


async def test_a_client_of_a_closed_inline_owner_resumes_at_its_successor() -> None:
    owner, heard, time = Owner(), Heard(), FakeTime()
    ref = InlineRef("owner", owner)
    client = WatchClient(ref, heard, time, sleep=time.sleep)
    await client.start()
    owner.snapshots.close()
    ref.owner = again = Owner(start=50)
    again.snapshots.publish("a", "x")
    await time.advance(1.0)

    assert heard == {"a": "x"}
    await client.close()


async def test_a_client_is_patient_with_an_owner_that_stays_away() -> None:
    line, _, client, time = await watching(Owner())
    line.cut()
    await time.advance(60.0)

    assert 60 <= line.sent["watch"] <= 90
    await client.close()


async def test_an_owners_own_error_is_logged_once_and_outlived(
    caplog: pytest.LogCaptureFixture,
) -> None:
    line, heard, client, time = await watching(Owner())
    with caplog.at_level(logging.ERROR):
        line.cut(KeyError("a bug"))
        await time.advance(10.0)
    assert len(caplog.records) == 1
    line.mend()
    line.owner.snapshots.publish("a", "x")
    await time.advance(1.0)

    assert heard == {"a": "x"}
    await client.close()


async def test_a_value_that_cannot_be_taken_stops_no_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    owner, taken = Owner(), []

    def take(key: str, value: Any) -> None:
        if value == "bad":
            raise ValueError(value)
        taken.append((key, value))

    client = WatchClient(Line(owner), take)
    await client.start()
    with caplog.at_level(logging.ERROR):
        owner.snapshots.publish("a", "bad")
        owner.snapshots.publish("b", "good")
        await settle()
    owner.snapshots.publish("a", "good")
    await settle()

    assert taken == [("b", "good"), ("a", "good")]
    assert client.errors == len(caplog.records) == 1
    await client.close()


async def test_a_first_value_that_cannot_be_taken_fails_the_start() -> None:
    owner = Owner()
    owner.snapshots.publish("a", "bad")

    def refuse(key: str, value: Any) -> None:
        raise ValueError(value)

    with pytest.raises(ValueError, match="bad"):
        await WatchClient(Line(owner), refuse).start()


async def test_a_closed_client_leaves_no_poll_behind() -> None:
    owner = Owner()
    _, _, client, _ = await watching(owner)
    await settle()
    assert owner.snapshots.waiting == 1
    await client.close()
    await settle()

    assert owner.snapshots.waiting == 0


def test_pauses_double_to_a_second_and_start_over() -> None:
    backoff = Backoff(random=lambda: 1.0)
    assert [backoff.next_s() for _ in range(7)] == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    backoff.reset()

    assert backoff.next_s() == 0.05
    assert Backoff(random=lambda: 0.0).next_s() == 0.025
