"""A call has one end in the ledger, whatever happens to messages, processes, nodes and disks."""

from __future__ import annotations

import asyncio
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Awaitable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from actors import holders
from actors.ledger import desk as desk_module
from actors.ledger import spool as spool_module
from actors.ledger.desk import LedgerDesk, OpenEntry
from actors.ledger.orphans import Orphans
from actors.ledger.owner import Ledger
from actors.ledger.policy import Entry, StoreFailed, fold
from actors.ledger.spool import spools
from actors.ref import OwnerUnavailable
from tests.support.failing_disk import Disk, State, is_whole, lay_out

T = TypeVar("T")
MOST_NANO, COST_NANO = 100, 7
ANNOUNCED_S = desk_module.ANNOUNCE_AFTER_S
CALL: dict[str, Any] = {
    "request_id": "r1",
    "tenant": "acme",
    "route": "chat",
    "model": "m",
    "deployment": "d",
}
TELLS = ["no", "sent", "durable", "durable"]
"""What the ledger hears of a call when it begins."""
ENDS = ["posted", "posted", "voided", "drop"]
COSTS = {"posted": COST_NANO, "voided": 0, "unsettled": MOST_NANO}


class Machine:
    """Where the ledger's owner runs. A power cut takes what was not synced, and the owner."""

    def __init__(self, state: State | None = None) -> None:
        self._folder = Path(tempfile.mkdtemp())
        self._path = self._folder / "ledger.db"
        lay_out(state or {}, self._folder)
        self._disk = Disk(state)
        self._disk.__enter__()
        self.owner = Ledger(str(self._path), lock_wait_s=0.0)
        self.is_down = False

    async def ends(self, dice: random.Random | None) -> State:
        """What is on its disk then; without dice it was shut down in good order."""
        if dice is None:
            await self.owner.close()
        self.is_down = True
        state = self._disk.state()
        self._disk.__exit__()
        await self.owner.close()
        shutil.rmtree(self._folder)
        if dice is None:
            return state
        return {name: file.power_cut(dice) for name, file in state.items()}

    async def is_whole(self) -> bool:
        await self.owner.close()
        return is_whole(self._path) == "ok"


@dataclass
class Process:
    """A process with a desk, on a node with a directory of spools."""

    holder: str
    directory: Path
    desk: LedgerDesk
    open: list[OpenEntry] = field(default_factory=list)


class Line:
    """Each process's way to the owner, as the world's faults have it."""

    name = "ledger"

    def __init__(self, world: Ledgers) -> None:
        self.sent: Counter[str] = Counter()
        self._world = world

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        world = self._world
        machine, fault = world.machine, world.faults.pop(0) if world.faults else "."
        if fault in "xd":
            if fault == "d" and method == "append":
                world.late.append(args)
            raise OwnerUnavailable(self.name, "message lost")
        if fault == "f":
            raise StoreFailed("disk full")
        answer = await getattr(machine.owner, method)(*args)
        if fault == "2":
            answer = await getattr(machine.owner, method)(*args)
        if machine.is_down:
            raise OwnerUnavailable(self.name, "it went down")
        if method == "append":
            world.durable.update(Entry(*row).id for row in args[2])
        if fault == "a":
            raise OwnerUnavailable(self.name, "answer lost")
        return answer


async def no_pause(_: float) -> None:
    await asyncio.sleep(0)


class Ledgers(RuleBasedStateMachine):
    """Two nodes with processes that begin and end calls. The near one's sweeper sees its own
    processes die, and hears of the far node from Ray, which may be wrong."""

    @initialize()
    def begins(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(holders, "is_dead", lambda holder: holder in self.dead)
        self.patch.setattr(spool_module, "is_dead", lambda holder: holder in self.dead)
        self.folder = Path(tempfile.mkdtemp())
        self.loop = asyncio.new_event_loop()
        self.now_s = 0.0
        self.dead: set[str] = set()
        self.faults: list[str] = []
        self.late: list[tuple[Any, ...]] = []
        self.durable: set[str] = set()
        self.machine = Machine()
        self.born = 0
        self.lost_disks = 0
        self.far_is_alive = True  # as Ray says
        self.expected: dict[str, set[str]] = {}  # id → what its one row may say
        self.processes: list[Process] = []
        for node in ("near", "far"):
            self.birth(node)
        self.near = Orphans(
            self.spools_of("near"), Line(self), "near.1/1/1", nodes_alive=self.nodes_alive
        )

    def run(self, work: Awaitable[T]) -> T:
        return self.loop.run_until_complete(work)

    async def nodes_alive(self) -> set[str]:
        return {"near", "far"} if self.far_is_alive else {"near"}

    def spools_of(self, node: str) -> Path:
        return self.folder / (node if node == "near" else f"far-{self.lost_disks}")

    def birth(self, node: str) -> None:
        self.born += 1
        holder, directory = f"{node}.1/{self.born}/1", self.spools_of(node)
        desk = LedgerDesk(Line(self), holder, lambda: self.now_s, pause=no_pause, spools=directory)
        self.run(desk.start())
        self.processes.append(Process(holder, directory, desk))

    def death(self, process: Process) -> None:
        """Nothing is closed, and whoever looks finds what is in its file."""
        desk = process.desk
        for timer in (desk._timer, desk._announcer, desk._refusals_timer):
            if timer is not None:
                timer.cancel()
        task, desk._task = desk._task, None
        assert task is not None
        task.cancel()
        self.run(asyncio.wait([task]))
        assert desk._spool is not None
        desk._spool._let_go()
        self.dead.add(process.holder)
        self.processes.remove(process)

    def one(self, which: int) -> Process:
        return self.processes[which % len(self.processes)]

    def far(self) -> list[Process]:
        return [process for process in self.processes if process.holder.startswith("far")]

    # ----------------------------------------------------------------------------- what happens

    @rule(which=st.integers(0, 9), tells=st.lists(st.sampled_from(TELLS), min_size=1, max_size=3))
    def calls_begin(self, which: int, tells: list[str]) -> None:
        for told in tells:
            self.a_call_begins(self.one(which), told)

    def a_call_begins(self, process: Process, told: str) -> None:
        entry = process.desk.open(**CALL, most_nano=MOST_NANO)
        process.open.append(entry)
        self.expected[entry.id] = {"unsettled"}  # if nothing else becomes of it
        if not self.far_is_alive and process.holder.startswith("far"):
            self.expected[entry.id].add("late")
        if told != "no":
            process.desk._tell(entry)
        if told == "durable":
            self.run(process.desk.flush())

    @rule(which=st.integers(0, 9), hows=st.lists(st.sampled_from(ENDS), min_size=1, max_size=3))
    def calls_end(self, which: int, hows: list[str]) -> None:
        process = self.one(which)
        for how in hows[: len(process.open)]:
            self.a_call_ends(process, process.open.pop(0), how)

    def a_call_ends(self, process: Process, entry: OpenEntry, how: str) -> None:
        if how == "posted":
            process.desk.post(entry, prompt_tokens=1, cost_nano=COST_NANO)
        elif how == "voided":
            process.desk.void(entry, "500")
        else:
            process.desk.drop(entry)
            how = "voided" if entry.told else "none"
        # Who was given up by mistake may find that the call has an end already.
        gone = {"unsettled", "late"} if "late" in self.expected[entry.id] else set()
        self.expected[entry.id] = {how, *gone}

    @rule(which=st.integers(0, 9), wait_s=st.sampled_from([0.5, 1.0, 2.0]))
    def time_passes(self, which: int, wait_s: float) -> None:
        self.now_s += wait_s
        desk = self.one(which).desk
        if desk._announcer is not None:
            desk._announcer.cancel()
        desk._announce()

    @rule(which=st.integers(0, 9))
    def what_is_due_is_sent(self, which: int) -> None:
        self.run(self.one(which).desk.flush())

    @rule(turns=st.integers(1, 5))
    def the_loop_turns(self, turns: int) -> None:
        async def turn() -> None:
            for process in self.processes:
                process.desk._due.set()
            for _ in range(turns):
                await asyncio.sleep(0)

        self.run(turn())

    @rule(faults=st.text("xdfa2.", max_size=4))
    def messages_are_lost_and_doubled_and_delayed(self, faults: str) -> None:
        self.faults += faults

    @rule(which=st.integers(0, 9))
    def a_message_comes_late(self, which: int) -> None:
        if self.late:
            args = self.late.pop(which % len(self.late))
            self.run(self.machine.owner.append(*args))
            self.durable.update(Entry(*row).id for row in args[2])

    @rule(which=st.integers(0, 9))
    def a_process_is_killed(self, which: int) -> None:
        process = self.one(which)
        self.death(process)
        self.birth(process.holder.partition(".")[0])

    @rule(lost=st.sampled_from([True, True, False]))
    def the_far_node_dies(self, lost: bool) -> None:
        """With its disk, or it comes back with it later."""
        self.ray_gives_the_far_node_up()
        for process in self.far():
            if lost:
                self.forget_what_nobody_has(process.directory)
            self.death(process)
        if lost:
            shutil.rmtree(self.spools_of("far"), ignore_errors=True)
            self.lost_disks += 1
        self.birth("far")

    def forget_what_nobody_has(self, directory: Path) -> None:
        """What only this disk has is gone with it; what was on its way may come or not."""
        for path in spools(directory):
            left = spool_module.read(path.read_bytes())
            for values in [*left.opened, *left.entries]:
                self.expected[values[0]] |= {"unsettled", "lost"}

    @rule()
    def ray_gives_the_far_node_up(self) -> None:
        self.far_is_alive = False
        for directory in {process.directory for process in self.far()}:
            for path in spools(directory):
                left = spool_module.read(path.read_bytes())
                for values in [*left.opened, *left.entries]:
                    self.expected[values[0]] |= {"unsettled", "late"}

    @rule()
    def ray_sees_the_far_node_again(self) -> None:
        self.far_is_alive = True

    @rule()
    def the_near_node_is_swept(self) -> None:
        self.run(self.near.sweep())

    @rule()
    def the_far_node_is_swept(self) -> None:
        self.run(self.far_sweeper().sweep())

    def far_sweeper(self) -> Orphans:
        return Orphans(self.spools_of("far"), Line(self), "far.1/1/1", nodes_alive=self.nodes_alive)

    @rule(seed=st.integers(0, 2**32))
    def the_owners_machine_loses_its_power(self, seed: int) -> None:
        self.replace_owner(random.Random(seed))

    @rule()
    def the_owner_is_replaced(self) -> None:
        self.replace_owner(None)

    def replace_owner(self, dice: random.Random | None) -> None:
        before = self.machine
        self.machine = Machine(self.run(before.ends(dice)))

    # ------------------------------------------------------------------------------ in the end

    def teardown(self) -> None:
        if not hasattr(self, "machine"):
            return
        try:
            self.ends()
        finally:
            self.run(self.machine.owner.close())
            self.run(self.machine.ends(None))
            self.loop.close()
            self.patch.undo()
            shutil.rmtree(self.folder)

    def ends(self) -> None:
        self.faults.clear()
        for process in list(self.processes):
            self.death(process)
        for sweeper in (self.far_sweeper(), self.near):
            assert self.run(sweeper.sweep())
        while self.late:
            self.a_message_comes_late(0)
        self.far_is_alive = False
        assert self.run(self.near.sweep())

        owner = self.machine.owner
        assert self.run(owner.holders()) == {}, "a call is open, and nobody is left to end it"
        rows = self.run(owner.entries("r1"))
        told = {row.id: row for row in rows}
        assert len(told) == len(rows)
        assert told.keys() <= self.expected.keys()
        assert self.durable <= told.keys(), "what was acknowledged is gone"
        for id_, allowed in self.expected.items():
            row = told.get(id_)
            if row is None:
                assert allowed & {"none", "lost"}, (id_, allowed)
            else:
                assert row.status in allowed, (row, allowed)
                assert row.cost_nano == COSTS[row.status]
        usage = self.run(owner.usage())
        assert usage["entries"] == len(rows)
        totals = fold(rows).as_dict()
        assert {name: usage[name] for name in totals} == totals
        assert self.run(self.machine.is_whole())


TestLedgers = Ledgers.TestCase
TestLedgers.settings = settings(max_examples=10, stateful_step_count=40, deadline=None)
