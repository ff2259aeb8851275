"""Keys in the ledger: who may make a call, and what is answered to whoever asks again."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from actors.ledger import claims as claims_room
from actors.ledger.claim_store import Bounds, Held, _count
from actors.ledger.claims import Claims
from actors.ledger.claims_desk import ClaimsDesk
from actors.ledger.idempotency import (
    ANSWER_BYTES_MAX,
    GRACE_S,
    KEPT_MS,
    LATE_MS,
    Claim,
    Differs,
    Finish,
    Full,
    Kept,
    Known,
    Running,
    Standing,
    Won,
    standing,
)
from actors.ledger.owner import Ledger
from actors.ledger.policy import StoreFailed
from actors.ledger.store import Store
from actors.ref import InlineRef, OwnerUnavailable
from tests.support.fake_time import FakeTime, settle
from tests.unit.test_ledger_owner import Keep, fresh, keep

__all__ = ["fresh", "keep"]

NOW_S = 1_700_000_000.0


@dataclass
class Day:
    """A wall clock."""

    now_s: float = NOW_S

    def __call__(self) -> float:
        return self.now_s


@dataclass
class Home:
    """A ledger that can be lost and opened again, and what orders are made of."""

    keep: Keep
    day: Day = field(default_factory=Day)
    bounds: Bounds | None = None

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.ledger = Ledger(self.keep.path, url=self._url(), wall=self.day)
        if self.bounds is not None:
            self.ledger._claims._bounds = self.bounds

    def _url(self) -> Any:
        return None if self.keep.url is None else lambda: str(self.keep.url)

    async def restart(self) -> None:
        await self.ledger.close()
        self.open()

    async def claim(self, token: str, name: str = "k", **fields: Any) -> Any:
        wait_s = fields.pop("wait_s", 0.0)
        told = {"fingerprint": "f", "holder": "p1", "lapses_s": 60.0, **fields}
        return await self.ledger.claim(Claim(name, token=token, **told), wait_s)

    async def finish(self, token: str, answer: bytes | None, name: str = "k") -> bool:
        return await self.ledger.finish(Finish(name, token, answer))


@pytest.fixture
async def home(keep: Keep) -> Any:
    here = Home(keep)
    yield here
    await here.ledger.close()


def test_how_a_claim_stands() -> None:
    claim = Claim("k", "f", "mine", "p1", 60.0)
    table = {
        None: Standing.FREE,
        Known("f", "other", 1000, 0): Standing.FREE,
        Known("g", "other", 1000, 9): Standing.FREE,
        Known("f", "other", 1001, 0): Standing.RUNNING,
        Known("f", "mine", 1001, 0): Standing.OWN,
        Known("f", "mine", 1001, 9): Standing.STORED,
        Known("f", "other", 1001, 9): Standing.STORED,
        Known("g", "other", 1001, 0): Standing.OTHER,
        Known("g", "other", 1001, 9): Standing.OTHER,
    }
    assert {known: standing(known, claim, 1000) for known in table} == table


async def test_one_makes_the_call_and_the_others_have_its_answer(home: Home) -> None:
    assert await home.claim("a") == Won("a")
    assert await home.claim("a") == Won("a")  # it came twice
    assert await home.claim("b") == Running(60.0)
    assert await home.claim("b", name="another") == Won("b")
    assert await home.finish("a", b"answer")
    assert await home.finish("a", b"answer")
    assert await home.claim("b") == Kept(b"answer")
    assert await home.claim("c", fingerprint="g") == Differs("k")


async def test_an_answer_is_kept_over_a_restart_and_for_a_day(home: Home) -> None:
    await home.claim("a")
    await home.finish("a", b"answer")
    await home.restart()
    home.day.now_s += KEPT_MS / 1000 - 1
    assert await home.claim("b") == Kept(b"answer")
    home.day.now_s += 1
    assert await home.claim("b", fingerprint="g") == Won("b")


async def test_a_claim_is_durable_before_it_is_won(home: Home) -> None:
    await home.claim("a")
    await home.restart()
    assert await home.claim("b") == Running(60.0)
    assert await home.finish("a", b"answer")
    assert await home.claim("b") == Kept(b"answer")


async def test_what_was_acknowledged_is_in_the_files_of_a_ledger_that_is_killed(
    tmp_path: Path,
) -> None:
    home = Home(Keep(str(tmp_path / "ledger.db")))
    await home.claim("a")
    await home.claim("b", name="answered")
    await home.finish("b", b"answer", name="answered")
    there = tmp_path / "there"
    there.mkdir()
    for file in tmp_path.glob("ledger.db*"):
        shutil.copy(file, there)
    await home.ledger.close()
    other = Home(Keep(str(there / "ledger.db")))
    assert await other.claim("c") == Running(60.0)
    assert await other.claim("c", name="answered") == Kept(b"answer")
    await other.ledger.close()


async def test_a_claim_lapses_and_its_late_answer_counts_unless_another_has_the_key(
    home: Home,
) -> None:
    await home.claim("a")
    await home.claim("a", name="quiet")
    home.day.now_s += 60
    assert await home.claim("b") == Won("b")
    assert not await home.finish("a", b"late")
    assert await home.claim("c") == Running(60.0)
    # Nobody else has asked: late is better than never.
    assert await home.finish("a", b"late", name="quiet")
    assert await home.claim("c", name="quiet") == Kept(b"late")


async def test_a_call_that_failed_gives_its_key_back(home: Home) -> None:
    await home.claim("a")
    assert await home.finish("a", None)
    assert not await home.finish("a", None)
    assert await home.claim("b", fingerprint="g") == Won("b")
    assert not await home.finish("a", None)  # it comes late, and is not b's
    assert await home.claim("c", fingerprint="g") == Running(60.0)


async def test_what_a_dead_process_had_claimed_is_free(home: Home) -> None:
    await home.claim("a")
    await home.claim("b", name="answered")
    await home.finish("b", b"answer", name="answered")
    await home.claim("c", name="another", holder="p2")
    assert await home.ledger.holders() == {"p1": 1, "p2": 1}
    assert await home.ledger.holder_gone("p1") == 0
    assert await home.ledger.holders() == {"p2": 1}
    assert await home.claim("d") == Won("d")
    assert await home.claim("d", name="answered") == Kept(b"answer")
    assert await home.claim("d", name="another") == Running(60.0)


async def test_who_waits_hears_of_the_answer_or_may_make_the_call(home: Home) -> None:
    await home.claim("a")
    waiting = [asyncio.ensure_future(home.claim(f"w{n}", wait_s=600.0)) for n in range(2)]
    other = asyncio.ensure_future(home.claim("o", wait_s=600.0, fingerprint="g"))
    assert await other == Differs("k")
    await home.finish("a", None)
    done, (left,) = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    (won,) = done
    assert isinstance(won.result(), Won)
    await home.finish(won.result().token, b"answer")
    assert await left == Kept(b"answer")
    assert home.ledger._claims._waiting == {}


async def test_no_more_wait_than_there_is_room_for(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims_room, "WAITERS_MAX", 0)
    await home.claim("a")
    assert await home.claim("b", wait_s=600.0) == Running(60.0, patient=False)


async def test_the_oldest_answers_leave_first(keep: Keep) -> None:
    home = Home(keep, bounds=Bounds(keys=4, size=10))
    for number, name in enumerate(("a", "b", "c")):
        home.day.now_s += 1
        await home.claim(name, name=name)
        assert await home.finish(name, b"x" * (number + 2), name=name)
    await home.restart()  # what there is is counted anew
    await home.claim("d", name="d")
    assert await home.finish("d", b"dddd", name="d")  # 13 bytes with a, b, c
    await home.claim("e", name="e")
    stands = {name: await home.claim("z", name=name) for name in ("b", "c", "d")}
    assert stands == {"b": Won("z"), "c": Kept(b"xxxx"), "d": Kept(b"dddd")}
    # Keys are bounded too, and what is under way never leaves.
    for name in ("f", "g"):
        assert await home.claim(name, name=name) == Won(name)
    assert await home.claim("h", name="h") == Full(4)
    assert home.ledger.stats()["claims"]["keys"] == 4
    assert not await home.finish("f", b"x" * 11, name="f")  # more than all there may be
    assert await home.claim("h", name="h") == Won("h")
    await home.ledger.close()


async def test_what_is_too_old_takes_no_room(home: Home) -> None:
    await home.claim("a", name="a")
    await home.finish("a", b"answer", name="a")
    await home.claim("b", name="b")
    home.day.now_s += (KEPT_MS + LATE_MS) / 1000
    await home.claim("c", name="c")
    assert home.ledger.stats()["claims"] | {"commits": 0} == {
        "keys": 1,
        "bytes": 0,
        "waiting": 0,
        "commits": 0,
    }


async def test_orders_that_come_together_share_a_commit(home: Home) -> None:
    names = [f"k{n}" for n in range(100)]
    told = await asyncio.gather(*(home.claim("a", name=name) for name in names))
    assert told == [Won("a")] * 100
    assert home.ledger.stats()["claims"]["commits"] <= 2


async def test_an_answer_too_long_and_orders_too_many_are_refused(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="bytes of answer"):
        await home.finish("a", b"x" * (ANSWER_BYTES_MAX + 1))
    monkeypatch.setattr(claims_room, "BYTES_QUEUED_MAX", 3)
    with pytest.raises(StoreFailed, match="wait for the disk"):
        await home.finish("a", b"four")
    monkeypatch.setattr(claims_room, "ORDERS_QUEUED_MAX", 0)
    with pytest.raises(StoreFailed, match="wait for the disk"):
        await home.claim("a")
    assert home.ledger._claims._waiting == {}


async def test_a_store_that_fails_acknowledges_nothing_and_is_counted_anew() -> None:
    ledger, failing = Ledger(), True

    async def do(work: Any) -> Any:
        if failing:
            raise StoreFailed("the disk is full")
        return await ledger._do(work)

    claims = Claims(do, FakeTime(), Day())
    with pytest.raises(StoreFailed, match="disk is full"):
        await claims.claim(Claim("k", "f", "a", "p1", 60.0), 0.0)
    failing = False
    assert await claims.claim(Claim("k", "f", "a", "p1", 60.0), 0.0) == Won("a")
    failing = True
    with pytest.raises(StoreFailed):
        await claims.finish(Finish("k", "a", b"answer"))
    failing = False
    assert await claims.finish(Finish("k", "a", b"answer"))
    assert claims.stats() == {"keys": 1, "bytes": 6, "waiting": 0, "commits": 2}
    await ledger.close()


# --- the desk ---------------------------------------------------------------------------------


class Flaky(InlineRef):
    """An owner whose line fails as it is told, before or after the message."""

    def __init__(self, owner: object) -> None:
        super().__init__("ledger", owner)
        self.fails: list[str] = []

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        how = self.fails.pop(0) if self.fails else ""
        if how == "before":
            raise OwnerUnavailable(self.name, "away")
        told = await super().ask(method, *args, timeout_s=timeout_s)
        if how == "after":
            raise OwnerUnavailable(self.name, "lost")
        return told


def test_a_key_is_one_tenants_and_a_token_one_requests() -> None:
    desk = ClaimsDesk(InlineRef("ledger", None), "p1")
    names = [desk.new(*which, "f").name for which in (("a", "b c"), ("a b", "c"), ("a", "b c"))]
    assert names[0] == names[2] != names[1]
    assert desk.new("a", "k", "f").token != desk.new("a", "k", "f").token
    assert desk.new("\ud800", "k", "f").holder == "p1"


async def test_an_end_is_told_until_it_is_taken_and_a_claim_fails_at_once() -> None:
    ledger, time = Ledger(), FakeTime()
    ref = Flaky(ledger)

    async def pause(for_s: float) -> None:
        time.now += for_s

    desk = ClaimsDesk(ref, "p1", time, pause)
    claim = desk.new("acme", "k", "f")
    ref.fails = ["after"]
    with pytest.raises(OwnerUnavailable):
        await desk.claim(claim, 30.0)
    assert await desk.claim(claim, 30.0) == Won(claim.token)
    other = await desk.claim(desk.new("acme", "k", "f"), 0.0)
    assert isinstance(other, Running)
    assert other.lapses_s == pytest.approx(30.0 + GRACE_S, abs=5.0)
    ref.fails = ["before", "after", "before"]
    assert await desk.finish(claim, b"answer")
    assert await desk.claim(desk.new("acme", "k", "f"), 30.0) == Kept(b"answer")
    ref.fails = ["before"] * 99
    assert not await desk.finish(claim, b"answer")
    assert desk.stats()["failures"] > 5
    await ledger.close()


# --- as one -----------------------------------------------------------------------------------

KEYS, BODIES, TOKENS = ("k1", "k2"), ("f", "g"), [f"t{n}" for n in range(5)]


def counted(store: Store) -> Held:
    """How many keys and bytes of answers the table has."""
    with store.transaction() as connection:
        return _count(connection)


class Keys(RuleBasedStateMachine):
    """Any claims, ends, deaths, restarts and days, delivered any number of times.

    Of each key: while its time is not over, one call at a time, and nobody is answered anything but
    what the call that has it was answered.
    """

    @initialize()
    def begin(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.directory = tempfile.TemporaryDirectory()
        self.home = Home(Keep(str(Path(self.directory.name) / "ledger.db")))
        self.minted = 0
        # By key: fingerprint, token, holder, until when (ms), answer.
        self.held: dict[str, tuple[str, str, str, int, bytes | None]] = {}
        self.used: dict[str, tuple[str, str, str]] = {}

    def teardown(self) -> None:
        if hasattr(self, "home"):
            self.loop.run_until_complete(self.home.ledger.close())
            self.loop.close()
            self.directory.cleanup()

    @property
    def now_ms(self) -> int:
        return int(self.home.day.now_s * 1000)

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def expected(self, key: str, body: str, token: str, holder: str, lapses_s: float) -> Any:
        held = self.held.get(key)
        if held is None or held[3] <= self.now_ms:
            self.held[key] = (body, token, holder, self.now_ms + int(lapses_s * 1000), None)
            return Won(token)
        if held[0] != body:
            return Differs(key)
        if held[4] is not None:
            return Kept(held[4])
        return Won(token) if held[1] == token else Running((held[3] - self.now_ms) / 1000)

    @rule(
        key=st.sampled_from(KEYS),
        body=st.sampled_from(BODIES),
        holder=st.sampled_from(["p1", "p2"]),
        lapses_s=st.sampled_from([1.0, 70.0]),
    )
    def claim(self, key: str, body: str, holder: str, lapses_s: float) -> None:
        self.minted += 1
        token = f"t{self.minted}"
        self.used[token] = (key, body, holder)
        told = self.run(
            self.home.claim(token, key, fingerprint=body, holder=holder, lapses_s=lapses_s)
        )
        assert told == self.expected(key, body, token, holder, lapses_s)

    @rule(data=st.data())
    def claim_again(self, data: st.DataObject) -> None:
        if self.used:
            token = data.draw(st.sampled_from(sorted(self.used)))
            key, body, holder = self.used[token]
            told = self.run(self.home.claim(token, key, fingerprint=body, holder=holder))
            assert told == self.expected(key, body, token, holder, 60.0)

    @rule(data=st.data(), answered=st.booleans())
    def finish(self, data: st.DataObject, answered: bool) -> None:
        if not self.used:
            return
        token = data.draw(st.sampled_from(sorted(self.used)))
        key = self.used[token][0]
        answer = f"answer of {token}".encode() if answered else None
        done = self.run(self.home.finish(token, answer, key))
        held = self.held.get(key)
        if held is None or held[1] != token:
            assert not done
        elif held[4] is not None:
            assert done  # it stays as it is
        elif answer is None:
            assert done
            del self.held[key]
        else:
            assert done
            self.held[key] = (held[0], token, held[2], self.now_ms + KEPT_MS, answer)

    @rule(holder=st.sampled_from(["p1", "p2"]))
    def die(self, holder: str) -> None:
        self.run(self.home.ledger.holder_gone(holder))
        for key, held in list(self.held.items()):
            if held[2] == holder and held[4] is None:
                del self.held[key]

    @rule()
    def restart(self) -> None:
        self.run(self.home.restart())

    @rule(by_s=st.sampled_from([0.5, 60.0, 650.0, KEPT_MS / 1000]))
    def wait(self, by_s: float) -> None:
        self.home.day.now_s += by_s
        old = self.now_ms - LATE_MS
        # Swept by whatever order comes next.
        self.held = {key: held for key, held in self.held.items() if held[3] > old}

    @invariant()
    def its_sums_are_those_of_the_table(self) -> None:
        if not hasattr(self, "home"):
            return
        held = self.home.ledger._claims._held
        if held is not None:
            assert held == self.run(self.home.ledger._do(counted))


def test_keys_are_held_by_one_whatever_happens() -> None:
    run_state_machine_as_test(
        Keys, settings=settings(max_examples=40, stateful_step_count=25, deadline=None)
    )


@given(answers=st.lists(st.binary(min_size=1, max_size=40), max_size=12))
@settings(max_examples=25, deadline=None)
def test_what_is_kept_is_never_more_than_there_may_be(answers: list[bytes]) -> None:
    async def work() -> None:
        home = Home(Keep(), bounds=Bounds(keys=5, size=64))
        for number, answer in enumerate(answers):
            home.day.now_s += 1
            await home.claim("a", name=f"k{number}")
            await home.finish("a", answer, name=f"k{number}")
            held = home.ledger._claims._held
            assert held is not None
            assert held.keys <= 5
            assert held.size <= 64
            assert await home.claim("b", name=f"k{number}") == Kept(answer)
        await settle()
        await home.ledger.close()

    asyncio.run(work())
