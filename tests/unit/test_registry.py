"""The Registry: versions that are durable before they are acknowledged, and pushed after."""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from actors.file_lock import FileLock, FileLocked
from actors.ref import InlineRef
from actors.registry import policy as policy_module
from actors.registry.desk import RegistryDesk
from actors.registry.owner import Registry
from actors.registry.policy import (
    DOCUMENT_BYTES_MAX,
    PUTS_MAX,
    VERSIONS_MAX,
    Head,
    InvalidDocument,
    RegistryUnavailable,
    Version,
    VersionConflict,
    canonical,
)
from actors.registry.store import Store
from tests.support.fake_time import FakeTime


def registry(path: Path | None = None, **more: Any) -> Registry:
    more = {"lock_wait_s": 0.0, "wall": lambda: 1_700_000_000.25, **more}
    return Registry(None if path is None else str(path), **more)


async def heard(owner: Registry, seen: dict[str, int] | None = None) -> Any:
    changes = await owner.watch(seen or {}, 0.0)
    return {key: value for key, (_, value) in changes.items()}


async def until(true: Any) -> None:
    """Wait for another thread's work; the test's own timeout ends a wait in vain."""
    while not true():
        await asyncio.sleep(0.001)


async def test_versions_are_numbered_from_one_and_the_newest_is_current() -> None:
    owner = registry()
    assert await owner.current() == (0, {})
    assert await owner.put({"a": 1}, "first") == 1
    assert await owner.put({"a": 2}, "second") == 2

    assert await owner.current() == (2, {"a": 2})
    await owner.close()


async def test_an_equal_document_is_the_same_version_whatever_was_expected() -> None:
    owner = registry()
    await owner.put({"a": 1, "b": [1, 2]})

    assert await owner.put({"b": [1, 2], "a": 1}) == 1
    assert await owner.put({"b": (1, 2), "a": 1}, expected=7) == 1
    assert len(await owner.history()) == 1
    await owner.close()


async def test_an_empty_document_is_a_version_too() -> None:
    owner = registry()

    assert await owner.put({}) == 1
    assert await owner.put({}) == 1
    await owner.close()


async def test_a_document_made_for_another_version_is_refused_and_says_which_there_is() -> None:
    owner = registry()
    await owner.put({"a": 1}, expected=0)
    await owner.put({"a": 2}, expected=1)
    with pytest.raises(VersionConflict, match="version 1 was expected, but the newest is 2") as e:
        await owner.put({"a": 3}, expected=1)

    assert (e.value.expected, e.value.current) == (1, 2)
    assert await owner.current() == (2, {"a": 2})
    assert owner.stats() == {"puts": 2, "conflicts": 1, "version": 2, "watchers": 0}
    await owner.close()


async def test_of_writers_racing_for_a_version_one_wins() -> None:
    owner = registry()
    results = await asyncio.gather(
        *(owner.put({"a": n}, expected=0) for n in range(8)), return_exceptions=True
    )

    assert results.count(1) == 1
    assert sum(isinstance(result, VersionConflict) for result in results) == 7
    await owner.close()


async def test_a_message_that_comes_again_later_does_not_bring_its_document_back(
    tmp_path: Path,
) -> None:
    owner = registry(tmp_path / "r.db")
    assert await owner.put({"a": 1}, put_id="x") == 1
    assert await owner.put({"a": 1}, put_id="y") == 1
    assert await owner.put({"a": 2}, put_id="z", expected=1) == 2
    assert await owner.put({"a": 2}, put_id="z", expected=1) == 2
    await owner.close()
    owner = registry(tmp_path / "r.db")
    assert await owner.put({"a": 1}, put_id="x") == 1
    assert await owner.put({"a": 1}, put_id="y") == 1

    assert await owner.current() == (2, {"a": 2})
    await owner.close()


async def test_the_history_is_newest_first() -> None:
    owner = registry()
    for n in range(5):
        await owner.put({"a": n}, f"note {n}")
    history = await owner.history(2)

    assert [(each.version, each.note) for each in history] == [(5, "note 4"), (4, "note 3")]
    assert history[0].at_ms == 1_700_000_000_250
    assert history[0].digest == policy_module.digest('{"a":4}')
    await owner.close()


async def test_old_versions_are_forgotten_but_their_numbers_are_not_used_again() -> None:
    store = Store(None)
    for n in range(VERSIONS_MAX + 10):
        store.put(f'{{"a":{n}}}', "", None, f"id{n}", 0)

    history = store.history(10 * VERSIONS_MAX)
    assert [history[0].version, history[-1].version] == [VERSIONS_MAX + 10, 11]
    assert len(history) == VERSIONS_MAX


def test_old_put_ids_are_forgotten() -> None:
    store = Store(None)
    for n in range(PUTS_MAX + 1):
        store.put('{"a":1}', "", None, f"id{n}", 0)
    store.put('{"a":2}', "", None, "", 0)

    assert store.put('{"a":1}', "", None, "id1", 0)[0] == 1
    assert store.put('{"a":1}', "", None, "id0", 0)[0] == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"a": float("nan")},
        {"a": {1, 2}},
        {"a": b"x"},
        {("a",): 1},
        ["a"],
        {"a": "x" * DOCUMENT_BYTES_MAX},
    ],
)
async def test_what_is_not_plain_json_or_too_large_is_refused(wrong: Any) -> None:
    owner = registry()
    with pytest.raises(InvalidDocument, match="configuration"):
        await owner.put(wrong)

    assert await owner.current() == (0, {})
    await owner.close()


def test_any_text_can_be_in_a_document() -> None:
    store, text = Store(None), canonical({"a": "\ud800 é \0 '; DROP TABLE versions; --"})
    store.put(text, "note", None, "", 0)

    assert store.head() == Head(1, text)


# What is pushed


async def test_nothing_is_published_before_the_first_version() -> None:
    owner = registry()
    assert await heard(owner) == {}
    await owner.put({"a": 1})

    assert await heard(owner) == {"config": {"version": 1, "document": {"a": 1}}}
    await owner.close()


async def test_a_held_watch_hears_of_a_put() -> None:
    owner = registry()
    watch = asyncio.ensure_future(owner.watch({}))
    await owner.put({"a": 1})

    assert (await watch)["config"][1] == {"version": 1, "document": {"a": 1}}
    await owner.close()


async def test_a_put_whose_caller_went_away_is_published_all_the_same() -> None:
    owner = registry()
    put = asyncio.ensure_future(owner.put({"a": 1}))
    await asyncio.sleep(0)
    put.cancel()

    assert (await owner.watch({}))["config"][1] == {"version": 1, "document": {"a": 1}}
    await owner.close()


async def test_what_one_caller_does_to_a_document_no_other_sees() -> None:
    owner = registry()
    mine = {"a": {"b": 1}}
    await owner.put(mine)
    mine["a"]["b"] = 2
    (await owner.current())[1]["a"]["b"] = 3
    (await heard(owner))["config"]["document"]["a"]["b"] = 4

    assert await owner.current() == (1, {"a": {"b": 1}})
    await owner.close()


# The file


async def test_versions_outlive_their_owner(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "r.db"
    owner = registry(path)
    await owner.put({"a": 1}, "kept")
    await owner.close()
    owner = registry(path)

    assert await heard(owner) == {"config": {"version": 1, "document": {"a": 1}}}
    assert await owner.put({"a": 2}, expected=1) == 2
    assert [each.note for each in await owner.history()] == ["", "kept"]
    await owner.close()


async def test_only_its_user_can_read_the_file(tmp_path: Path) -> None:
    owner = registry(tmp_path / "dir" / "r.db")
    await owner.put({"a": 1})

    assert {each.stat().st_mode & 0o077 for each in (tmp_path / "dir").iterdir()} == {0}
    await owner.close()


def test_every_commit_is_synced_to_disk(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "r.db"))
    store.put("{}", "", None, "", 0)
    connection = store._connection
    assert connection is not None

    assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    store.close()


async def test_a_second_owner_of_the_file_is_told_who_has_it(tmp_path: Path) -> None:
    first, second = registry(tmp_path / "r.db"), registry(tmp_path / "r.db")
    await first.put({"a": 1})
    for call in (second.current, lambda: second.put({"a": 2}), lambda: second.watch({}, 0.0)):
        with pytest.raises(RegistryUnavailable, match=f"in use by process {os.getpid()}"):
            await call()
    assert second.protocol() == Registry.PROTOCOL
    await first.close()

    assert await second.current() == (1, {"a": 1})
    await second.close()


async def test_an_owner_waits_for_its_predecessor_to_end(tmp_path: Path) -> None:
    time, pauses = FakeTime(), count(1)
    first = Store(str(tmp_path / "r.db"))
    first.put('{"a":1}', "", None, "", 0)

    def pause(for_s: float) -> None:
        time.now += for_s
        if next(pauses) == 100:
            first.close()

    owner = registry(tmp_path / "r.db", clock=time, pause=pause, lock_wait_s=10.0)
    calls = await asyncio.gather(*(owner.current() for _ in range(5)))

    assert calls == [(1, {"a": 1})] * 5
    assert time.now == pytest.approx(1_005.0)
    await owner.close()


def test_waiting_for_a_lock_ends(tmp_path: Path) -> None:
    time = FakeTime()
    holder = FileLock(str(tmp_path / "x"))
    holder.acquire(0.0)

    def pause(for_s: float) -> None:
        time.now += for_s

    with pytest.raises(FileLocked, match="in use by process"):
        FileLock(str(tmp_path / "x"), time, pause).acquire(10.0)
    assert time.now == pytest.approx(1_010.0, abs=0.1)
    holder.release()
    holder.release()
    FileLock(str(tmp_path / "x"), time, pause).acquire(0.0)


def test_an_owner_that_was_killed_leaves_every_acknowledged_version_and_no_lock(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "r.db")
    program = (
        "import asyncio, itertools, sys\n"
        "from actors.registry.owner import Registry\n"
        "async def main():\n"
        "    owner = Registry(sys.argv[1])\n"
        "    for n in itertools.count(1):\n"
        "        print(await owner.put({'n': n}), flush=True)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        acknowledged = [int(process.stdout.readline()) for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        acknowledged += [int(line) for line in process.stdout]
    store = Store(path, lock_wait_s=10.0)
    head = store.head()

    assert acknowledged == list(range(1, len(acknowledged) + 1))
    assert head.version in (acknowledged[-1], acknowledged[-1] + 1)
    assert head.document() == {"n": head.version}
    store.close()


async def test_a_file_that_is_no_registry_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.db"
    path.write_bytes(b"something else entirely" * 100)
    owner = registry(path)
    with pytest.raises(RegistryUnavailable, match=r"r\.db cannot be used: file is not a database"):
        await owner.current()

    assert path.read_bytes() == b"something else entirely" * 100
    await owner.close()


async def test_a_file_of_a_later_format_is_refused(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "r.db") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    owner = registry(tmp_path / "r.db")
    with pytest.raises(RegistryUnavailable, match="its format is 99"):
        await owner.current()
    await owner.close()


async def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    owner = registry(tmp_path / "file" / "r.db")
    with pytest.raises(RegistryUnavailable, match=r"cannot be used: .*file"):
        await owner.current()
    await owner.close()


async def test_a_full_disk_fails_the_put_and_nothing_is_published(tmp_path: Path) -> None:
    owner = registry(tmp_path / "r.db")
    await owner.put({"a": 1})
    connection = owner._store._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(RegistryUnavailable, match="full"):
        await owner.put({"a": "x" * 100_000})
    assert await heard(owner) == {"config": {"version": 1, "document": {"a": 1}}}

    assert await owner.put({"a": 2}) == 2  # the file was opened anew, and there is room again
    await owner.close()


async def test_a_closed_registry_says_so_and_closing_twice_is_closing_once() -> None:
    owner = registry()
    await owner.put({"a": 1})
    await owner.close()
    await owner.close()
    with pytest.raises(RegistryUnavailable, match="closed"):
        await owner.put({"a": 2})


def test_it_can_be_an_actor() -> None:
    owner = Registry(**pickle.loads(pickle.dumps({"path": None})))

    assert owner.protocol() == Registry.PROTOCOL
    assert owner.stats()["version"] is None


def test_all_that_travels_survives_pickling() -> None:
    version = Version(1, 2, "note", "digest")
    assert pickle.loads(pickle.dumps(version)) == version
    for error in (
        VersionConflict(1, 2),
        InvalidDocument("why"),
        RegistryUnavailable("/a", "why"),
        FileLocked("/a", 7),
    ):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# The desk


async def test_a_desk_has_the_newest_configuration_when_it_has_started() -> None:
    owner, taken = registry(), []
    await owner.put({"a": 1})
    desk = RegistryDesk(InlineRef("registry", owner), lambda *config: taken.append(config))
    await desk.start()

    assert taken == [(1, {"a": 1})]
    assert (desk.version, desk.document) == (1, {"a": 1})
    await desk.close()
    await owner.close()


async def test_what_one_desk_puts_every_desk_takes() -> None:
    owner, taken = registry(), []
    desks = [
        RegistryDesk(InlineRef("registry", owner), lambda *config: taken.append(config))
        for _ in range(3)
    ]
    for desk in desks:
        await desk.start()
    assert await desks[0].put({"a": 1}, "note", expected=0) == 1
    await until(lambda: len(taken) == 3)

    assert taken == [(1, {"a": 1})] * 3
    assert [each.note for each in await desks[2].history()] == ["note"]
    with pytest.raises(VersionConflict):
        await desks[1].put({"a": 2}, expected=0)
    for desk in desks:
        await desk.close()
    await owner.close()


async def test_a_restarted_registry_brings_nothing_that_is_known_and_all_that_is_new(
    tmp_path: Path,
) -> None:
    time, taken = FakeTime(), []
    ref = InlineRef("registry", registry(tmp_path / "r.db"))
    desk = RegistryDesk(ref, lambda *config: taken.append(config), time, sleep=time.sleep)
    await desk.start()
    await desk.put({"a": 1})
    await until(lambda: taken)
    await ref.owner.close()  # type: ignore[attr-defined]
    again = ref.owner = registry(tmp_path / "r.db")
    await again.current()
    await time.advance(2.0)
    assert desk.stats()["connected"]
    assert taken == [(1, {"a": 1})]
    await desk.put({"a": 2})
    await until(lambda: len(taken) == 2)

    assert taken == [(1, {"a": 1}), (2, {"a": 2})]
    await desk.close()
    await again.close()


async def test_a_document_that_cannot_be_obeyed_leaves_the_one_before_in_force() -> None:
    owner = registry()

    def obey(_: int, document: dict[str, Any]) -> None:
        if document["a"] == "bad":
            raise ValueError("bad")

    desk = RegistryDesk(InlineRef("registry", owner), obey)
    await desk.start()
    await desk.put({"a": "good"})
    await until(lambda: desk.version == 1)
    await desk.put({"a": "bad"})
    await until(lambda: desk.stats()["errors"])
    assert (desk.version, desk.document) == (1, {"a": "good"})
    await desk.put({"a": "better"})
    await until(lambda: desk.version == 3)
    await desk.close()
    await owner.close()
