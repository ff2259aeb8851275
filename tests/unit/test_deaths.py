"""Who is dead, and that only certain death is told."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Collection, Iterator

import pytest

from actors import holders
from actors.rate_limiter.deaths import NODES_PAUSE_S, PERIOD_S, DeathWatch
from tests.support.fake_time import FakeTime, settle

NAME_OF = "from actors.holders import holder_id; print(holder_id('n1'), flush=True); input()"
HERE = "n1.7/100/5"


class Child:
    """A process that says its name, and ends when it is told."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", NAME_OF],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.holder = self.process.stdout.readline().strip()

    def end(self) -> None:
        """It is a zombie then, until `buried`."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)

    def buried(self) -> None:
        self.process.wait()


@pytest.fixture
def child() -> Iterator[Child]:
    child = Child()
    yield child
    if child.process.poll() is None:
        child.end()
        child.buried()
    assert child.process.stdout is not None
    child.process.stdout.close()


class TestHolders:
    def test_a_process_is_dead_from_its_end_on_and_not_before(self, child: Child) -> None:
        assert not holders.is_dead(child.holder)
        child.end()
        assert holders.is_dead(child.holder), "a zombie holds no connection"
        child.buried()
        assert holders.is_dead(child.holder)

    def test_this_process_lives_and_one_that_had_its_pid_before_does_not(self) -> None:
        own = holders.holder_id("n1")
        assert not holders.is_dead(own)
        assert holders.is_dead(own.rpartition("/")[0] + "/1")

    @pytest.mark.parametrize("name", ["", "acme", "n1.7/100", "n1.7/self/5", "//"])
    def test_what_is_no_holder_is_never_dead(self, name: str) -> None:
        assert not holders.is_dead(name)

    def test_near_is_the_same_node_and_the_same_namespace(self, child: Child) -> None:
        own = holders.holder_id("n1")
        assert holders.is_near(child.holder, own)
        assert not holders.is_near(holders.holder_id("n2"), own)
        assert not holders.is_near("n1.7/1/2", "n1.8/1/2")
        assert holders.node_of(own) == "n1"


class Limiter:
    """Names who is silent, and remembers whose death it was told."""

    def __init__(self, *silent: str) -> None:
        self.named = set(silent)
        self.told: list[str] = []
        self.down = False

    def silent(self) -> set[str]:
        return set(self.named)

    async def holder_gone(self, process: str) -> None:
        if self.down:
            raise ConnectionError("the owner is away")
        self.told.append(process)
        self.named.discard(process)


class Nodes:
    """Ray's nodes that live; None: Ray does not say."""

    def __init__(self, *alive: str, known: bool = True) -> None:
        self.asked = 0
        self._alive = alive if known else None

    async def __call__(self) -> Collection[str] | None:
        self.asked += 1
        return self._alive


class TestWatch:
    async def test_a_dead_sibling_is_reported_and_a_silent_one_is_not(self) -> None:
        limiter, nodes = Limiter("n1.7/1/1", "n1.7/2/2"), Nodes()
        watch = DeathWatch(limiter, HERE, nodes, is_dead=lambda name: name == "n1.7/2/2")
        await watch.look()
        await watch.look()

        assert limiter.told == ["n1.7/2/2"]
        assert watch.reported == 1
        assert nodes.asked == 0, "who is near is seen without Ray"

    async def test_a_child_that_ended_is_reported(self, child: Child) -> None:
        limiter = Limiter(child.holder)
        watch = DeathWatch(limiter, holders.holder_id("n1"), Nodes())
        await watch.look()
        assert limiter.told == []
        child.end()
        await watch.look()
        assert limiter.told == [child.holder]

    async def test_nobody_reports_itself(self) -> None:
        limiter = Limiter(HERE)
        await DeathWatch(limiter, HERE, Nodes(), is_dead=lambda _: True).look()
        assert limiter.told == []

    async def test_the_far_are_dead_when_their_node_is(self) -> None:
        limiter = Limiter("n1.8/1/1", "n2.7/1/1", "n3.7/1/1")
        watch = DeathWatch(limiter, HERE, Nodes("n1ffff", "n2ffff"), is_dead=lambda _: True)
        await watch.look()
        assert limiter.told == ["n3.7/1/1"], "another namespace's pids mean nothing here"

    async def test_without_word_of_the_nodes_nobody_far_is_dead(self) -> None:
        limiter = Limiter("n3.7/1/1")
        await DeathWatch(limiter, HERE, Nodes(known=False)).look()
        assert limiter.told == []

    async def test_ray_is_asked_now_and_then_only(self) -> None:
        nodes = Nodes("n2")
        watch = DeathWatch(Limiter("n2.7/1/1"), HERE, nodes)
        rounds = int(NODES_PAUSE_S / PERIOD_S)
        for _ in range(rounds * 3):
            await watch.look()
        assert nodes.asked == 3

    async def test_a_round_that_fails_is_not_the_last(self) -> None:
        time, limiter = FakeTime(), Limiter("n1.7/2/2")
        limiter.down = True
        watch = DeathWatch(limiter, HERE, Nodes(), is_dead=lambda _: True, sleep=time.sleep)
        await watch.start()
        await time.advance(3 * PERIOD_S)
        assert (limiter.told, watch.reported) == ([], 0)
        limiter.down = False
        await time.advance(PERIOD_S)
        assert limiter.told == ["n1.7/2/2"]
        await watch.close()
        await watch.close()
        await settle()
        assert [task.get_name() for task in asyncio.all_tasks()].count("deaths") == 0
