"""The Registry: versions that are durable before they are acknowledged, and pushed after."""

from __future__ import annotations

import asyncio
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from actors.file_lock import FileLock, FileLocked
from actors.ref import InlineRef
from actors.registry import policy as policy_module
from actors.registry.desk import RegistryDesk
from actors.registry.owner import Registry
from actors.registry.policy import (
    DOCUMENT_BYTES_MAX,
    KEYS_MAX,
    OPS_MAX,
    PUTS_MAX,
    REVOKED_MAX,
    SETTINGS_BYTES_MAX,
    TENANTS_MAX,
    VERSIONS_MAX,
    Access,
    Head,
    InvalidDocument,
    InvalidRecord,
    KeyExists,
    KeyRecord,
    RegistryFull,
    RegistryUnavailable,
    Revocation,
    TenantRecord,
    Version,
    VersionConflict,
    canonical,
)
from actors.registry.store import FORMAT, Store, read_access
from tests.support.fake_time import FakeTime


def registry(path: Path | None = None, **more: Any) -> Registry:
    more = {"lock_wait_s": 0.0, "wall": lambda: 1_700_000_000.25, **more}
    return Registry(None if path is None else str(path), **more)


ACME = TenantRecord("acme", {"limits": {"requests_per_minute": 6}, "models": ["m"]})


def key(name: str, tenant: str = "acme", hash_of: str = "", admin: bool = False) -> KeyRecord:
    return KeyRecord(name, tenant, f"hash of {hash_of or name}", admin, 5)


def gone(name: str, tenant: str = "acme", at_ms: int = 1_700_000_000_250) -> Revocation:
    return Revocation(name, tenant, f"hash of {name}", at_ms)


def names(access: Access) -> tuple[list[str], list[str]]:
    """The ids of the keys that are there, and of those that were revoked."""
    return [k.id for k in access.keys.values()], [r.id for r in access.revoked.values()]


async def heard(owner: Registry, only: str = "config") -> Any:
    changes = await owner.watch({}, 0.0)
    return {key: value for key, (_, value) in changes.items() if key == only}


async def heard_later(owner: Registry, than: dict[str, Any]) -> Any:
    """What a watch says to somebody who has heard `than`."""
    changes = await owner.watch({key: number for key, (number, _) in than.items()})
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
    assert owner.stats().items() >= {"puts": 2, "conflicts": 1, "version": 2, "watchers": 0}.items()
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
    before = await owner.watch({})
    watch = asyncio.ensure_future(heard_later(owner, before))
    await owner.put({"a": 1})

    assert (await watch)["config"] == {"version": 1, "document": {"a": 1}}
    await owner.close()


async def test_a_put_whose_caller_went_away_is_published_all_the_same() -> None:
    owner = registry()
    before = await owner.watch({})
    put = asyncio.ensure_future(owner.put({"a": 1}))
    await asyncio.sleep(0)
    put.cancel()

    assert (await heard_later(owner, before))["config"] == {"version": 1, "document": {"a": 1}}
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
    access = Access().with_key(key("ci"), ACME).without_key(gone("old"))
    for value in (Version(1, 2, "note", "digest"), access):
        assert pickle.loads(pickle.dumps(value)) == value
    for error in (
        KeyExists("acme", "ci", "why"),
        RegistryFull("keys", 3),
        InvalidRecord("why"),
        VersionConflict(1, 2),
        InvalidDocument("why"),
        RegistryUnavailable("/a", "why"),
        FileLocked("/a", 7),
    ):
        assert str(pickle.loads(pickle.dumps(error))) == str(error)


# Keys and tenants made at run time


async def test_a_key_and_its_tenant_are_there_once_they_are_given() -> None:
    owner = registry()
    assert await owner.access() == Access()
    assert await owner.add_key(key("ci", admin=True), ACME) == 1
    assert await owner.add_key(key("ops")) == 2

    access = await owner.access()
    assert access.version == 2
    assert access.keys == {k.hash: k for k in (key("ci", admin=True), key("ops"))}
    assert access.tenants == {"acme": ACME}
    assert owner.stats().items() >= {"access": 2, "keys": 2, "tenants": 1, "revoked": 0}.items()
    await owner.close()


async def test_the_newest_settings_of_a_tenant_hold() -> None:
    owner = registry()
    newer = TenantRecord("acme", {"models": []})
    await owner.add_key(key("a"), ACME)
    await owner.add_key(key("b"), newer)
    await owner.add_key(key("c"))

    assert (await owner.access()).tenants == {"acme": newer}
    await owner.close()


async def test_what_one_caller_does_to_settings_the_registry_does_not_see() -> None:
    owner = registry()
    mine: dict[str, Any] = {"limits": {"requests_per_minute": 6}}
    await owner.add_key(key("a"), TenantRecord("acme", mine))
    mine["limits"]["requests_per_minute"] = 6_000

    told = (await owner.access()).tenants["acme"].settings
    assert told == {"limits": {"requests_per_minute": 6}}
    await owner.close()


async def test_a_key_is_given_once_whoever_asks_again() -> None:
    owner = registry()
    await owner.add_key(key("ci"), ACME, "op")
    await owner.add_key(key("x"), op_id="other")

    assert await owner.add_key(key("ci"), ACME, "op") == 1
    with pytest.raises(KeyExists, match="there already"):
        await owner.add_key(key("ci2", "other", hash_of="ci"))
    with pytest.raises(KeyExists, match=r"'ci' of tenant 'acme' .* has a key of this id"):
        await owner.add_key(key("ci", hash_of="another"))
    await owner.add_key(key("ci", "other", hash_of="third"))  # ids are a tenant's own
    assert (await owner.access()).version == 3
    await owner.close()


async def test_a_revoked_key_is_gone_for_ever_but_its_id_is_free() -> None:
    owner = registry()
    await owner.add_key(key("ci"), op_id="give")
    assert await owner.revoke_key("acme", "ci", "hash of ci", "take") == 2
    assert await owner.revoke_key("acme", "ci", "hash of ci", "take") == 2
    assert await owner.revoke_key("acme", "ci", "hash of ci") == 2
    assert await owner.add_key(key("ci"), op_id="give") == 1  # a late copy gives nothing
    for name in ("ci", "other"):
        with pytest.raises(KeyExists, match="was revoked"):
            await owner.add_key(key(name, hash_of="ci"))
    assert await owner.add_key(key("ci", hash_of="another")) == 3
    assert await owner.revoke_key("acme", "ci", "hash of ci", "late") == 3

    access = await owner.access()
    assert access.revoked == {"hash of ci": gone("ci")}
    assert list(access.keys) == ["hash of another"]
    await owner.close()


async def test_a_key_of_the_configuration_can_be_revoked_unseen() -> None:
    owner = registry()
    await owner.put({"tenants": []})

    assert await owner.revoke_key("acme", "configured", "hash of configured") == 1
    assert (await owner.access()).revoked == {"hash of configured": gone("configured")}
    assert await owner.current() == (1, {"tenants": []})
    await owner.close()


async def test_a_held_watch_hears_of_a_revocation_alone() -> None:
    owner = registry()
    await owner.put({"a": 1})
    before = await owner.watch({})
    watch = asyncio.ensure_future(heard_later(owner, before))
    await owner.revoke_key("acme", "ci", "hash of ci")

    assert await watch == {"access": Access(1, revoked={"hash of ci": gone("ci")})}
    await owner.close()


async def test_a_revocation_whose_caller_went_away_is_published_all_the_same() -> None:
    owner = registry()
    before = await owner.watch({})
    revoking = asyncio.ensure_future(owner.revoke_key("acme", "ci", "hash of ci"))
    await asyncio.sleep(0)
    revoking.cancel()

    assert (await heard_later(owner, before))["access"].version == 1
    await owner.close()


@pytest.mark.parametrize(
    ("record", "tenant", "why"),
    [
        (key(""), None, "a key's id must be"),
        (key("x" * 201), None, "a key's id must be"),
        (key("a", "\ud800"), None, "a key's tenant must be"),
        (replace(key("a"), hash="a\0"), None, "a key's hash must be"),
        (replace(key("a"), hash=b"x"), None, "a key's hash must be"),  # type: ignore[arg-type]
        (key("a"), TenantRecord("other", {}), "key of tenant 'acme', settings of 'other'"),
        (key("a"), TenantRecord("acme", {"a": float("nan")}), "plain JSON"),
        (key("a"), TenantRecord("acme", {"a": "x" * SETTINGS_BYTES_MAX}), "are over"),
    ],
)
async def test_a_record_that_cannot_be_kept_is_refused_in_words(
    record: KeyRecord, tenant: TenantRecord | None, why: str
) -> None:
    owner = registry()
    with pytest.raises(InvalidRecord, match=why):
        await owner.add_key(record, tenant)
    with pytest.raises(InvalidRecord, match="operation's id"):
        await owner.revoke_key("acme", "a", "hash of a", "x" * 201)

    assert await owner.access() == Access()
    await owner.close()


def test_a_full_registry_says_what_it_is_full_of() -> None:
    keys = {f"hash of {n}": key(str(n)) for n in range(KEYS_MAX)}
    tenants = {str(n): TenantRecord(str(n), {}) for n in range(TENANTS_MAX)}
    revoked = {f"hash of {n}": gone(str(n)) for n in range(REVOKED_MAX)}

    with pytest.raises(RegistryFull, match="at most 20000 keys"):
        Access(1, keys).with_key(key("x"), None)
    with pytest.raises(RegistryFull, match="at most 20000 tenants"):
        Access(1, {}, tenants).with_key(key("x"), ACME)
    with pytest.raises(RegistryFull, match="at most 100000 revoked keys"):
        Access(1, {}, {}, revoked).without_key(gone("x"))
    full = Access(1, {}, tenants, revoked)
    assert full.without_key(gone("1")) is full
    assert len(full.with_key(key("x", "1"), TenantRecord("1", {"a": 1})).tenants) == TENANTS_MAX


def test_old_op_ids_are_forgotten_and_change_nothing_then() -> None:
    store = Store(None)
    store.add_key(key("a"), None, "give")
    store.revoke_key(gone("a"), "take")
    for n in range(OPS_MAX):
        store.revoke_key(gone("a"), f"again {n}")

    assert store.revoke_key(gone("a"), "take")[0] == 2
    with pytest.raises(KeyExists):
        store.add_key(key("a"), None, "give")


def killed(path: str, to: Path) -> str:
    """A copy of the file as a kill at this moment leaves it."""
    to.mkdir(exist_ok=True)
    for end in ("", "-wal"):
        shutil.copy(path + end, to / f"r.db{end}")
    return str(to / "r.db")


def test_each_acknowledged_change_of_the_access_outlives_a_kill(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "r.db"))
    store.put("{}", "", None, "", 0)
    steps = [
        lambda: store.add_key(key("a"), ACME, "1"),
        lambda: store.add_key(key("b", "other"), None, "2"),
        lambda: store.revoke_key(gone("a"), "3"),
        lambda: store.revoke_key(gone("configured"), "4"),
        lambda: store.add_key(key("a", hash_of="c"), TenantRecord("acme", {}), "5"),
    ]
    for n, step in enumerate(steps, 1):
        version, access = step()
        path = killed(store.path, tmp_path / str(n))
        assert version == n
        assert read_access(path) == access
        again = Store(path)
        assert again.access() == access
        assert again.head() == Head(1, "{}")
        again.close()
    store.close()


def test_an_owner_that_was_killed_leaves_every_acknowledged_key_and_revocation(
    tmp_path: Path,
) -> None:
    path = str(tmp_path / "r.db")
    program = (
        "import asyncio, itertools, sys\n"
        "from actors.registry.owner import Registry\n"
        "from actors.registry.policy import KeyRecord\n"
        "async def main():\n"
        "    owner = Registry(sys.argv[1])\n"
        "    for n in itertools.count():\n"
        "        await owner.add_key(KeyRecord(f'{n}', 'acme', f'hash of {n}', False, 0))\n"
        "        print('gave', n, flush=True)\n"
        "        if n % 2:\n"
        "            await owner.revoke_key('acme', f'{n}', f'hash of {n}')\n"
        "            print('took', n, flush=True)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        lines += list(process.stdout)
    access = read_access(path, 10.0)
    assert access is not None
    for what, n in (line.split() for line in lines if line.endswith("\n")):
        if what == "gave":
            assert (f"hash of {n}" in access.keys) != (f"hash of {n}" in access.revoked)
        else:
            assert f"hash of {n}" in access.revoked
    assert access.version - sum(line.endswith("\n") for line in lines) in (0, 1)


async def test_a_restart_loses_no_key_and_brings_none_back(tmp_path: Path) -> None:
    owner = registry(tmp_path / "r.db")
    await owner.put({"a": 1})
    await owner.add_key(key("mine"), ACME)
    await owner.revoke_key("acme", "configured", "hash of configured")
    before = await owner.access()
    await owner.close()
    owner = registry(tmp_path / "r.db")
    await owner.put({"a": 1})  # as `forebay up` does with the same file

    assert await owner.access() == before
    assert names(before) == (["mine"], ["configured"])
    await owner.close()


async def test_a_full_disk_fails_the_change_and_nothing_is_published(tmp_path: Path) -> None:
    owner = registry(tmp_path / "r.db")
    await owner.add_key(key("a"), ACME)
    connection = owner._store._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count = {pages}")
    large = TenantRecord("acme", {"a": "x" * 15_000})
    with pytest.raises(RegistryUnavailable, match="full"):
        await owner.add_key(key("b"), large, "op")
    assert names((await heard(owner, "access"))["access"]) == (["a"], [])

    assert await owner.add_key(key("b"), large, "op") == 2  # opened anew, there is room again
    assert names(await owner.access()) == (["a", "b"], [])
    await owner.close()


OLD_FILE = """
BEGIN;
CREATE TABLE versions (
    version  INTEGER PRIMARY KEY,
    at_ms    INTEGER NOT NULL,
    note     TEXT NOT NULL,
    digest   TEXT NOT NULL,
    document TEXT NOT NULL
);
CREATE TABLE puts (
    number  INTEGER PRIMARY KEY,
    id      TEXT NOT NULL UNIQUE,
    version INTEGER NOT NULL
);
INSERT INTO versions VALUES (1, 5, 'old', 'digest', '{"a":1}'), (2, 6, 'new', 'd2', '{"a":2}');
INSERT INTO puts VALUES (1, 'x', 1), (2, 'y', 2);
PRAGMA user_version = 1;
COMMIT;
"""


def old_file(path: Path) -> str:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = WAL")
    connection.executescript(OLD_FILE)
    connection.close()
    return str(path)


def test_a_file_of_the_first_format_is_brought_up_and_loses_nothing(tmp_path: Path) -> None:
    path = old_file(tmp_path / "r.db")
    assert read_access(path) == Access()
    for n in range(2):
        store = Store(path)
        assert store.head() == Head(2, '{"a":2}')
        assert store.history(9) == [Version(2, 6, "new", "d2"), Version(1, 5, "old", "digest")]
        assert store.put('{"a":1}', "", None, "x", 0) == (1, Head(2, '{"a":2}'))
        assert store.add_key(key(f"{n}"), ACME, f"op {n}")[0] == n + 1
        store.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (FORMAT,)
    connection.close()


def test_a_step_up_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = old_file(tmp_path / "r.db")
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE ops (in_the_way)")
    connection.close()
    store = Store(path)
    with pytest.raises(RegistryUnavailable, match="ops already exists"):
        store.head()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        connection.execute("DROP TABLE ops")
    connection.close()

    assert store.head() == Head(2, '{"a":2}')
    store.close()


# Reading it while nothing runs


def test_reading_the_access_makes_and_changes_nothing(tmp_path: Path) -> None:
    path = str(tmp_path / "r.db")
    assert read_access(path) is None
    assert list(tmp_path.iterdir()) == []
    store = Store(path)
    access = store.add_key(key("a"), ACME, "")[1]
    store.close()
    names_before = {each.name for each in tmp_path.iterdir()}
    data = (tmp_path / "r.db").read_bytes()

    assert read_access(path) == access
    assert {each.name for each in tmp_path.iterdir()} == names_before
    assert (tmp_path / "r.db").read_bytes() == data
    store = Store(path)  # and lets go of the lock
    assert store.access() == access
    store.close()


def test_the_access_of_a_running_system_is_not_read_from_its_file(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "r.db"))
    store.head()
    with pytest.raises(RegistryUnavailable, match=f"by process {os.getpid()}: the system runs"):
        read_access(store.path, 0.0)
    store.close()


def test_the_access_in_a_file_that_is_none_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "r.db").write_bytes(b"something else entirely" * 100)
    with pytest.raises(RegistryUnavailable, match="not a database"):
        read_access(str(tmp_path / "r.db"))
    with sqlite3.connect(tmp_path / "later.db") as connection:
        connection.execute(f"PRAGMA user_version = {FORMAT + 1}")
    connection.close()
    with pytest.raises(RegistryUnavailable, match=f"its format is {FORMAT + 1}"):
        read_access(str(tmp_path / "later.db"))
    (tmp_path / "empty.db").write_bytes(b"")
    assert read_access(str(tmp_path / "empty.db")) == Access()


# All of it against a naive model

NAMES = st.sampled_from(["a", "b", "c"])


class Changes(RuleBasedStateMachine):
    """Keys come and go, messages come twice, the owner is restarted and killed."""

    def __init__(self) -> None:
        super().__init__()
        self.dir = Path(tempfile.mkdtemp())
        self.store = Store(str(self.dir / "r.db"))
        self.store.access()
        self.kills = count()
        self.version = 0
        self.good: list[KeyRecord] = []
        self.bad: set[str] = set()
        self.settings: dict[str, int] = {}
        self.said: list[tuple[Any, int]] = []  # messages that were answered, and the answers

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.dir)

    @rule(name=NAMES, tenant=NAMES, hash_of=NAMES, number=st.none() | st.integers(0, 9))
    def give(self, name: str, tenant: str, hash_of: str, number: int | None) -> None:
        record = key(name, tenant, hash_of)
        made = None if number is None else TenantRecord(tenant, {"n": number})
        op_id = f"op {len(self.said)}"
        taken = record.hash in self.bad or any(
            k.hash == record.hash or (k.tenant, k.id) == (tenant, name) for k in self.good
        )
        if taken:
            with pytest.raises(KeyExists):
                self.store.add_key(record, made, op_id)
            return
        self.version += 1
        self.good.append(record)
        if number is not None:
            self.settings[tenant] = number
        assert self.store.add_key(record, made, op_id)[0] == self.version
        self.said.append((lambda: self.store.add_key(record, made, op_id), self.version))

    @rule(name=NAMES, tenant=NAMES, hash_of=NAMES)
    def take(self, name: str, tenant: str, hash_of: str) -> None:
        revocation = Revocation(name, tenant, f"hash of {hash_of}", 0)
        op_id = f"op {len(self.said)}"
        self.version += revocation.hash not in self.bad
        self.bad.add(revocation.hash)
        self.good = [k for k in self.good if k.hash != revocation.hash]
        assert self.store.revoke_key(revocation, op_id)[0] == self.version
        self.said.append((lambda: self.store.revoke_key(revocation, op_id), self.version))

    @rule(data=st.data())
    def say_again(self, data: st.DataObject) -> None:
        if self.said:
            message, answer = data.draw(st.sampled_from(self.said))
            assert message()[0] == answer

    @rule()
    def restart(self) -> None:
        path = self.store.path
        self.store.close()
        self.store = Store(path)

    @rule()
    def kill(self) -> None:
        # What is opened next is a copy: the file as it is, without the goodbye of the one before.
        self.store.access()
        path = killed(self.store.path, self.dir / str(next(self.kills)))
        self.store.close()
        self.store = Store(path)

    @invariant()
    def it_is_as_the_model_says(self) -> None:
        access = self.store.access()
        assert access.version == self.version
        assert list(access.keys.values()) == self.good
        assert set(access.revoked) == self.bad
        assert {t: r.settings["n"] for t, r in access.tenants.items()} == self.settings


Changes.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestChanges = Changes.TestCase


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
    desk = RegistryDesk(ref, lambda *config: taken.append(config), clock=time, sleep=time.sleep)
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


async def test_a_desk_hears_of_keys_and_revocations_first_and_with_each_change() -> None:
    owner = registry()
    heard: list[Any] = []
    await owner.put({"a": 1})
    desk = RegistryDesk(
        InlineRef("registry", owner), lambda *config: heard.append(config), heard.append
    )
    await desk.start()
    assert heard == [Access(), (1, {"a": 1})]
    assert await desk.add_key(key("ci"), ACME) == 1
    await until(lambda: len(heard) == 3)
    assert await desk.revoke_key("acme", "ci", "hash of ci") == 2
    await until(lambda: len(heard) == 4)

    assert names(heard[2]) == (["ci"], [])
    assert names(heard[3]) == ([], ["ci"])
    assert desk.last_access == heard[3] == await desk.access()
    assert desk.stats()["access"] == 2
    with pytest.raises(KeyExists):
        await desk.add_key(key("ci"))
    await desk.close()
    await owner.close()


async def test_a_desk_gives_a_key_once_when_it_names_the_operation() -> None:
    owner = registry()
    desk = RegistryDesk(InlineRef("registry", owner), lambda *_: None)

    assert await desk.add_key(key("ci"), ACME, "op") == 1
    assert await desk.add_key(key("ci"), ACME, "op") == 1
    assert await desk.revoke_key("acme", "ci", "hash of ci", "op 2") == 2
    await owner.close()


async def test_the_last_access_holds_while_the_registry_is_away_or_has_nothing(
    tmp_path: Path,
) -> None:
    time, heard = FakeTime(), []
    first = registry(tmp_path / "r.db")
    await first.revoke_key("acme", "ci", "hash of ci")
    ref = InlineRef("registry", first)
    desk = RegistryDesk(ref, lambda *_: None, heard.append, clock=time, sleep=time.sleep)
    await desk.start()
    await first.close()
    emptied = ref.owner = registry()
    await emptied.access()
    await time.advance(2.0)
    assert desk.stats()["connected"]
    assert names(desk.last_access or Access()) == ([], ["ci"])
    await emptied.close()
    again = ref.owner = registry(tmp_path / "r.db")
    await again.access()
    await time.advance(2.0)
    assert len(heard) == 1  # what is known is not handed on again
    await desk.add_key(key("new"))
    await until(lambda: len(heard) == 2)

    assert names(heard[1]) == (["new"], ["ci"])
    await desk.close()
    await again.close()


async def test_an_access_that_cannot_be_obeyed_leaves_the_one_before_in_force() -> None:
    owner = registry()

    def obey(access: Access) -> None:
        if access.version == 1:
            raise ValueError("bad")

    desk = RegistryDesk(InlineRef("registry", owner), lambda *_: None, obey)
    await desk.start()
    await desk.add_key(key("a"))
    await until(lambda: desk.stats()["errors"])
    assert desk.last_access == Access()
    await desk.add_key(key("b"))
    await until(lambda: desk.last_access != Access())

    assert desk.last_access == await desk.access()
    await desk.close()
    await owner.close()
