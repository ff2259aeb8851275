from __future__ import annotations

import asyncio
import mmap
import os
import resource
import signal
import stat
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.holders import holder_id
from actors.ledger import desk as desk_module
from actors.ledger import spool as spool_module
from actors.ledger.desk import LedgerDesk, OpenEntry
from actors.ledger.orphans import LOST, Orphans
from actors.ledger.owner import Ledger
from actors.ledger.policy import Entry, LedgerFull, StoreFailed
from actors.ledger.spool import SEGMENT_BYTES, Found, Segment, Spool, SpoolFull, read, spools
from actors.ref import InlineRef, OwnerUnavailable

OURS = holder_id("node")
PLACE = OURS.partition("/")[0]
CALL: dict[str, Any] = {
    "request_id": "r1",
    "tenant": "acme",
    "route": "chat",
    "model": "m",
    "deployment": "d",
}


def dead(number: int) -> str:
    """A process of this node that does not exist: there are fewer pids than that."""
    return f"{PLACE}/{2**30 + number}/1"


def make(directory: Path, holder: str = OURS, **options: Any) -> Spool:
    return Spool(directory, holder, "nonce", lambda: 0.0, **options)


def held(spool: Spool) -> tuple[list[Any], list[Any]]:
    """What anybody would find in the file now."""
    left = read(spool.path.read_bytes())
    return left.opened, left.entries


def die(spool: Spool) -> None:
    """Its process is gone: the file is as it is, and nobody has it open."""
    spool._let_go()


def test_what_begins_is_in_the_file_until_it_ends(tmp_path: Path) -> None:
    spool = make(tmp_path)
    one, _ = spool.begin(["a", 1]), spool.begin(["b", 2])
    assert held(spool) == ([["a", 1], ["b", 2]], [])
    spool.end(one)
    assert held(spool) == ([["b", 2]], [])


def test_an_entry_takes_the_place_of_what_it_ends(tmp_path: Path) -> None:
    spool = make(tmp_path)
    begun = spool.begin(["a", "open"])
    spool.keep(["a", "posted"], begun)
    assert held(spool) == ([], [["a", "posted"]])


def test_of_a_beginning_and_its_entry_the_entry_is_believed(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.begin(["a", "open"])
    spool.keep(["a", "posted"])
    assert held(spool) == ([], [["a", "posted"]])


def test_one_record_stands_for_many_refusals(tmp_path: Path) -> None:
    spool = make(tmp_path)
    place = spool.tally(["a", "refused"])
    assert place is not None
    assert held(spool) == ([], [["a", "refused"]])
    spool.count(place, 3)
    assert held(spool) == ([], [["a", "refused", 3]])


def test_only_its_owner_may_read_it_and_nothing_is_made_before_it_is_needed(tmp_path: Path) -> None:
    spool = make(tmp_path / "new")
    assert not spool.path.parent.exists()
    spool.begin(["a"])
    assert stat.S_IMODE(spool.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(spool.path.parent.stat().st_mode) == 0o700


def test_what_nobody_needs_leaves_no_file(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.keep(["a"], spool.begin(["a"]))
    spool.acknowledge(1)
    spool.close()
    spool.close()
    assert spools(tmp_path) == []


def test_its_space_is_used_again(tmp_path: Path) -> None:
    spool = make(tmp_path)
    wide = "x" * 1000
    for number in range(3000):  # 3 MB
        spool.keep([str(number), wide], spool.begin([str(number), wide]))
        spool.acknowledge(1)
    assert spool.size_bytes <= 2 * SEGMENT_BYTES
    assert spool.path.stat().st_size == spool.size_bytes


def test_what_a_former_use_of_the_space_left_is_no_record(tmp_path: Path) -> None:
    spool = make(tmp_path)
    wide = "x" * 1000
    for number in range(10_000, 10_600):  # more than two segments, of records of one length
        spool.keep([str(number), wide])
        spool.acknowledge(1)
    found = [int(values[0]) for values in held(spool)[1]]
    assert found == list(range(10_600 - len(found), 10_600))
    assert len(found) < SEGMENT_BYTES // 1000


def test_what_stays_open_keeps_only_its_own_segment(tmp_path: Path) -> None:
    spool = make(tmp_path)
    wide = "x" * 1000
    spool.begin(["long"])
    for number in range(3000):
        spool.keep([str(number), wide])
        spool.acknowledge(1)
    assert spool.size_bytes <= 3 * SEGMENT_BYTES
    assert held(spool)[0] == [["long"]]


def test_space_that_was_needed_once_goes_back_to_the_disk(tmp_path: Path) -> None:
    spool = make(tmp_path)
    wide = "x" * 1000
    for number in range(3000):
        spool.keep([str(number), wide])
    most = spool.size_bytes
    assert most >= 12 * SEGMENT_BYTES
    spool.acknowledge(3000)
    for number in range(300):
        spool.keep([str(number), wide])
        spool.acknowledge(1)
    assert spool.path.stat().st_size == spool.size_bytes <= most / 2


def test_a_full_spool_takes_no_beginning_and_loses_no_end(tmp_path: Path) -> None:
    now = [0.0]
    spool = Spool(tmp_path, OURS, "n", lambda: now[0], bytes_max=SEGMENT_BYTES)
    wide, begun = "x" * 1000, []
    with pytest.raises(SpoolFull, match="has its"):
        while True:
            begun.append(spool.begin([str(len(begun)), wide]))
    assert spool.refusal
    spool.keep(["0", "posted" + wide], begun[0])
    opened, entries = held(spool)
    assert (len(opened), entries) == (len(begun), [])  # it is in memory, and still open here
    spool.acknowledge(1)
    assert len(held(spool)[0]) == len(begun) - 1
    for place in begun[1:]:
        spool.end(place)
    now[0] += 1
    assert not spool.refusal
    spool.begin(["again"])
    assert held(spool)[0] == [["again"]]


def test_a_full_disk_is_a_refusal_and_no_signal(tmp_path: Path) -> None:
    now = [0.0]
    spool = Spool(tmp_path, OURS, "n", lambda: now[0])
    wide = "x" * 1000
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SEGMENT_BYTES + 5000, hard))
    try:
        with pytest.raises(SpoolFull, match="cannot grow"):
            for number in range(1000):
                spool.begin([str(number), wide])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert spool.refusal
    now[0] += 1
    spool.begin(["there is room again"])


def test_a_directory_that_cannot_be_made_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SpoolFull, match="cannot grow"):
        make(tmp_path / "file" / "spool").begin(["a"])


def test_texts_of_any_kind_and_length_are_kept_as_far_as_they_can_be(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.begin(["a", "\ud800"])
    spool.begin(["b", "y" * 10_000_000])
    (_, strange), (_, long) = held(spool)[0]
    assert (strange, long) == ("\\ud800", "y" * 1000)


@given(
    sizes=st.lists(st.integers(0, 3000), min_size=1, max_size=12),
    cut=st.floats(0, 1),
    noise=st.binary(max_size=40),
)
@settings(max_examples=60, deadline=None)
def test_a_torn_tail_is_dropped_and_all_before_it_is_kept(
    sizes: list[int], cut: float, noise: bytes
) -> None:
    with TemporaryDirectory() as directory:
        spool = make(Path(directory))
        ends = []
        for number, size in enumerate(sizes):
            spool.keep([str(number), "z" * size])
            ends.append(spool._at)
        data = spool.path.read_bytes()
        at = int(cut * ends[-1])
        torn = data[:at] + noise + bytes(len(data) - at - len(noise))
        whole = [number for number, end in enumerate(ends) if end <= at]
        found = [int(values[0]) for values in read(torn).entries]
        assert found[: len(whole)] == whole
        assert len(found) <= len(whole) + (data[at : at + len(noise)] == noise)


def test_a_spool_is_its_processs_own_as_long_as_that_lives(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.begin(["a"])
    assert Found.take(spool.path, OURS) is None  # locked
    die(spool)
    assert Found.take(spool.path, OURS) is None  # not locked, and its process lives
    gone = make(tmp_path, dead(1))
    gone.begin(["b"])
    assert Found.take(gone.path, OURS) is None  # no process, but somebody has it open
    die(gone)
    found = Found.take(gone.path, OURS)
    assert found is not None
    assert found.read().opened == [["b"]]
    assert Found.take(gone.path, OURS) is None  # it is being handed in
    found.remove()
    found.release()
    assert Found.take(gone.path, OURS) is None


def test_a_closed_spool_is_anybodys(tmp_path: Path) -> None:
    spool = make(tmp_path)
    spool.keep(["a"])
    spool.close()
    found = Found.take(spool.path, OURS)
    assert found is not None
    assert found.read().entries == [["a"]]
    found.release()


def test_a_process_of_another_namespace_is_judged_by_its_lock(tmp_path: Path) -> None:
    spool = make(tmp_path, f"node.1/{os.getpid()}/1")
    spool.begin(["a"])
    assert Found.take(spool.path, OURS) is None
    die(spool)
    found = Found.take(spool.path, OURS)
    assert found is not None
    found.release()


# -------------------------------------------------------------------------------- handing in


async def test_a_killed_process_is_handed_in_by_the_next(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        desk = LedgerDesk(InlineRef("ledger", None), holder_id("node"), spools=tmp_path)
        desk.post(desk.open(**CALL, most_nano=99), prompt_tokens=1, cost_nano=7)
        desk.open(**CALL | {"request_id": "r2"}, most_nano=55)
        for _ in range(3):
            desk.refuse(**_refusal("zenith"))
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    owner = Ledger()
    orphans = Orphans(tmp_path, InlineRef("ledger", owner), OURS)
    assert await orphans.sweep()
    (posted,), (lost,) = await owner.entries("r1"), await owner.entries("r2")
    assert (posted.status, posted.cost_nano, posted.tenant) == ("posted", 7, "acme")
    assert (lost.status, lost.cost_nano, lost.most_nano) == ("unsettled", 55, 55)
    assert (lost.error, lost.attempt) == (LOST, 1)
    assert (await owner.usage("zenith"))["refused_requests"] == 3
    assert spools(tmp_path) == []
    stats = {"spools": 1, "entries": 2, "unsettled": 1, "gone": 0, "failures": 0}
    assert orphans.stats() == stats
    await owner.close()


async def test_what_the_ledger_does_not_take_stays(tmp_path: Path) -> None:
    spool = make(tmp_path, dead(1))
    spool.keep(list(_entry("a").values()))
    die(spool)

    class Away:
        async def append(self, *_: Any) -> int:
            raise StoreFailed("disk full")

        async def holders(self) -> dict[str, int]:
            return {dead(1): 1}  # it is not said to be gone while there is its spool

    assert not await Orphans(tmp_path, InlineRef("ledger", Away()), OURS).sweep()
    assert len(spools(tmp_path)) == 1
    owner = Ledger()
    assert await Orphans(tmp_path, InlineRef("ledger", owner), OURS).sweep()
    assert await owner.count() == 1
    await owner.close()


def open_entry(number: str, tenant: str = "acme") -> Entry:
    return _entry(number)._replace(status="open", cost_nano=90, most_nano=90, tenant=tenant)


async def test_what_the_dead_announced_and_no_spool_tells_of_is_unsettled() -> None:
    owner = Ledger()
    living = holder_id("node")
    far, nodes = "gone.1/7/7", "there.1/8/8"
    for holder in (dead(1), living, far, nodes):
        await owner.append(holder, 1, [open_entry(f"{holder}-1"), open_entry(f"{holder}-2")])
    await owner.append(dead(1), 2, [_entry(f"{dead(1)}-2")])

    async def alive() -> set[str]:
        return {"there-and-so-on"}

    with TemporaryDirectory() as name:
        ref = InlineRef("ledger", owner)
        orphans = Orphans(Path(name), ref, f"{PLACE}/1/1", nodes_alive=alive)
        for _ in range(2):  # the second time there is nobody left
            assert await orphans.sweep()
            assert await owner.holders() == {living: 2, nodes: 2}
            assert orphans.stats()["gone"] == 3
    rows = {row.id: row for row in await owner.entries("r")}
    assert {id_: row.status for id_, row in rows.items()} == {
        f"{dead(1)}-1": "unsettled",
        f"{dead(1)}-2": "posted",
        f"{far}-1": "unsettled",
        f"{far}-2": "unsettled",
    }
    assert rows[f"{far}-1"].cost_nano == 90
    # A node that comes back changes nothing of what is settled.
    await owner.append(far, 2, [_entry(f"{far}-1")])
    assert [row for row in await owner.entries("r") if row.id == f"{far}-1"] == [rows[f"{far}-1"]]
    await owner.close()


async def test_without_word_of_the_nodes_and_with_ray_failing_nobody_far_is_dead(
    tmp_path: Path,
) -> None:
    owner = Ledger()
    await owner.append("gone.1/7/7", 1, [open_entry("a")])

    async def fails() -> set[str]:
        raise RuntimeError("Ray is not there")

    ref = InlineRef("ledger", owner)
    assert await Orphans(tmp_path, ref, OURS).sweep()
    failing = Orphans(tmp_path, ref, OURS, nodes_alive=fails)
    assert not await failing.sweep()
    assert failing.stats()["failures"] == 1
    assert await owner.holders() == {"gone.1/7/7": 1}
    await owner.close()


async def test_a_spool_goes_before_the_word_that_its_process_is_gone(tmp_path: Path) -> None:
    owner = Ledger()
    desk = LedgerDesk(InlineRef("ledger", owner), dead(1), spools=tmp_path)
    await desk.start()
    paid, lost = desk.open(**CALL, most_nano=90), desk.open(**CALL, most_nano=90)
    for entry in (paid, lost):
        desk._tell(entry)
    await desk.flush()
    orphans = Orphans(tmp_path, InlineRef("ledger", owner), OURS)
    assert await orphans.sweep()
    assert await owner.holders() == {dead(1): 2}  # somebody has its spool open
    desk._task.cancel()  # type: ignore[union-attr]
    desk.post(paid, prompt_tokens=1, cost_nano=7)
    assert desk._spool is not None
    die(desk._spool)
    assert await orphans.sweep()
    assert {row.id: row.status for row in await owner.entries("r1")} == {
        paid.id: "posted",
        lost.id: "unsettled",
    }
    assert await owner.holders() == {}
    await owner.close()


async def test_one_process_of_a_node_sweeps_and_when_it_ends_another(tmp_path: Path) -> None:
    owner, turns = Ledger(), asyncio.Semaphore(0)

    async def pause(_: float) -> None:
        turns.release()
        await asyncio.Event().wait()

    ref = InlineRef("ledger", owner)
    first, second = (Orphans(tmp_path, ref, OURS, pause=pause) for _ in range(2))
    await first.start()
    await turns.acquire()
    for number, orphans in ((1, second), (2, second)):
        spool = make(tmp_path, dead(number))
        spool.keep(list(_entry(str(number)).values()))
        die(spool)
        await orphans.start()
        await turns.acquire()
        assert len(spools(tmp_path)) == (1 if number == 1 else 0)
        await first.close()
        await orphans.close()
    assert second.stats()["entries"] == 2
    await owner.close()


async def test_a_closed_desk_leaves_what_it_could_not_hand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desk_module, "CLOSE_WAIT_S", 0.0)

    class Gone:
        name, sent = "ledger", Counter[str]()

        async def ask(self, *_: Any, **__: Any) -> Any:
            raise OwnerUnavailable("ledger", "away")

    desk = LedgerDesk(Gone(), OURS, spools=tmp_path)
    await desk.start()
    desk.post(desk.open(**CALL), prompt_tokens=1, cost_nano=7)
    under_way = desk.open(**CALL | {"request_id": "r2"}, most_nano=9)
    await desk.close()
    desk.post(under_way, prompt_tokens=1, cost_nano=1)  # too late: nobody can be told
    with pytest.raises(LedgerFull, match="closed"):
        desk.open(**CALL)
    owner = Ledger()
    assert await Orphans(tmp_path, InlineRef("ledger", owner), OURS).sweep()
    assert [e.status for e in await owner.entries("r1")] == ["posted"]
    assert [e.status for e in await owner.entries("r2")] == ["unsettled"]
    await owner.close()


def _refusal(tenant: str) -> dict[str, Any]:
    return {
        "request_id": "r",
        "tenant": tenant,
        "route": "chat",
        "model": "m",
        "error": "answered with 429",
        "http_status": 429,
    }


def _entry(number: str) -> Entry:
    return Entry(
        number,
        "r",
        1,
        "acme",
        "chat",
        "m",
        "d",
        "posted",
        *(1, 1, 5, False, False, False, 3, 1_700_000_000_000),
        None,
        200,
    )


# ------------------------------------------------------------------------------ conservation


class Killed(BaseException):
    """The process ends here, in the middle of a write."""


class Memory:
    """A mapped segment of a process that is killed when it has written so many more bytes."""

    def __init__(self, mapped: mmap.mmap, life: list[int]) -> None:
        self._mapped, self._life = mapped, life

    def __setitem__(self, part: slice, value: bytes) -> None:
        written = min(len(value), self._life[0])
        self._life[0] -= written
        self._mapped[part.start or 0 : (part.start or 0) + written] = value[:written]
        if written < len(value):
            raise Killed

    def close(self) -> None:
        self._mapped.close()


class MortalSpool(Spool):
    def __init__(self, *args: Any, life: list[int], **options: Any) -> None:
        super().__init__(*args, **options)
        self._life = life

    def _new_segment(self) -> Segment | None:
        segment = super()._new_segment()
        if segment is not None:
            segment.bytes = Memory(segment.bytes, self._life)  # type: ignore[assignment]
        return segment


class Line:
    """A line to a ledger that loses messages, loses answers and doubles, as its dice fall."""

    name = "ledger"

    def __init__(self, owner: Ledger, script: list[str]) -> None:
        self.sent: Counter[str] = Counter()
        self._owner, self._script = owner, script

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        fault = self._script.pop(0) if self._script else "."
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


class World:
    """Processes of one node that begin and end calls, are killed, and hand in for each other."""

    def __init__(self, directory: Path, script: list[str], bytes_max: int) -> None:
        self.directory, self.bytes_max = directory, bytes_max
        self.owner = Ledger()
        self.line = Line(self.owner, script)
        self.processes = 0
        self.expected: dict[str, set[str]] = {}  # id → what its one row may say
        self.refused = 0
        self.refused_in_doubt = 0
        self.full = 0

    async def birth(self, life: int) -> None:
        self.processes += 1
        holder = dead(self.processes)

        async def no_pause(_: float) -> None:
            await asyncio.sleep(0)

        self.desk = LedgerDesk(
            self.line, holder, lambda: 0.0, pause=no_pause, spools=self.directory
        )
        self.spool = MortalSpool(
            self.directory,
            holder,
            str(self.processes),
            lambda: 0.0,
            bytes_max=self.bytes_max,
            life=[life],
        )
        self.desk._spool = self.spool
        self.open: list[OpenEntry] = []
        await self.desk.start()

    async def death(self) -> None:
        task, self.desk._task = self.desk._task, None
        if self.desk._timer is not None:
            self.desk._timer.cancel()
        if self.desk._refusals_timer is not None:
            self.desk._refusals_timer.cancel()
        assert task is not None
        task.cancel()
        await asyncio.wait([task])
        die(self.spool)

    def begin(self) -> None:
        try:
            entry = self.desk.open(**CALL, most_nano=100)
        except LedgerFull:
            self.full += 1
            return
        self.open.append(entry)
        self.expected[entry.id] = {"unsettled"}  # if nothing else becomes of it

    def end(self, how: str) -> None:
        if not self.open:
            return
        entry = self.open.pop(0)
        # Until it returns, either may be the end of it; afterwards only what it says may be.
        allowed = self.expected[entry.id]
        if how == "drop":
            allowed.add("none")
            self.desk.drop(entry)
            self.expected[entry.id] = {"none"}
            return
        allowed.add(how)
        if how == "posted":
            self.desk.post(entry, prompt_tokens=1, cost_nano=7)
        else:
            self.desk.void(entry, "500")
        in_file = bool(self.spool._runs) and self.spool._runs[-1][0] is not None
        if in_file:  # without room it is in memory only, and unsettled if the process ends now
            self.expected[entry.id] = {how}

    def refuse(self) -> None:
        self.refused_in_doubt += 1
        self.desk.refuse(**_refusal("zenith"))
        (counted,) = self.desk._refusals.values()
        if counted.place is not None:  # without room it is in memory only
            self.refused_in_doubt -= 1
            self.refused += 1


OPS = ["begin", "begin", "begin", "posted", "posted", "voided", "drop", "refuse", "refuse"]
OPS += ["flush", "tick", "sweep"]


@given(
    ops=st.lists(st.sampled_from(OPS), min_size=10, max_size=120),
    lives=st.lists(st.integers(0, 3_000), min_size=1, max_size=6),
    script=st.lists(st.sampled_from("...xfa2"), max_size=20),
    segment=st.sampled_from([2048, 4096, 262_144]),
)
@settings(max_examples=150, deadline=None)
def test_every_call_that_began_has_exactly_one_row_whatever_happens(
    ops: list[str], lives: list[int], script: list[str], segment: int
) -> None:
    async def session(directory: Path) -> None:
        world = World(directory, script, bytes_max=4 * segment)
        coming, torn = [*lives, 10**9], 0
        await world.birth(coming.pop(0))
        orphans = Orphans(directory, world.line, OURS)
        for op in ops:
            try:
                if op == "begin":
                    world.begin()
                elif op == "refuse":
                    world.refuse()
                elif op == "flush":
                    await world.desk.flush(0.0)
                elif op == "tick":
                    await asyncio.sleep(0)
                elif op == "sweep":
                    await orphans.sweep()
                else:
                    world.end(op)
            except Killed:
                torn += op == "begin"
                await world.death()
                await world.birth(coming.pop(0) if coming else 10**9)
        await world.death()
        while not await orphans.sweep():
            pass
        assert spools(directory) == []
        rows = await world.owner.entries("r1")
        assert len({row.id for row in rows}) == len(rows)
        told = {row.id: row for row in rows}
        # An intent that was being written may be whole, where what was missing had been there
        # before. Its call was not made.
        strange = told.keys() - world.expected.keys()
        assert len(strange) <= torn
        assert all(told[id_].status == "unsettled" for id_ in strange)
        for id_, allowed in world.expected.items():
            row = told.get(id_)
            assert ("none" if row is None else row.status) in allowed, (id_, row, allowed)
            if row is not None:
                paid = {"posted": 7, "voided": 0, "unsettled": 100}[row.status]
                assert row.cost_nano == paid
        refused = (await world.owner.usage("zenith"))["refused_requests"]
        assert world.refused <= refused <= world.refused + world.refused_in_doubt
        await world.owner.close()

    with TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "SEGMENT_BYTES", segment)
        asyncio.run(session(Path(name)))
