from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

from actors.batcher import courier
from actors.batcher.courier import BUSY, LINGER_S, LISTS_MAX, TEXTS_MAX, Courier, Many
from actors.batcher.policy import Share
from actors.ref import OwnerUnavailable


def share(texts: list[str]) -> Share:
    array = np.array([[len(text)] for text in texts], dtype=np.float32)
    return Share(array, len(texts), 1, "m", "call-1", len(texts))


class Owner:
    """Answers a list when its gate opens: the one named by its first text, or at once."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.left: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.many = Many(self.embed)

    async def embed(self, call_id: str, lane: str, texts: list[str]) -> Share:
        self.begun.append(call_id)
        try:
            if texts[0] in self.gates:
                await self.gates[texts[0]].wait()
        except asyncio.CancelledError:
            self.left.append(call_id)
            raise
        if texts[0] == "bad":
            raise ValueError("bad text")
        return share(texts)


class Line:
    """Messages pickled on their way, or lost."""

    name = "batcher"

    def __init__(self, owner: Owner) -> None:
        self.owner = owner
        self.sent: Counter[str] = Counter()
        self.messages: list[tuple[str, Any]] = []
        self.lost = False

    async def ask(self, method: str, /, *args: Any, timeout_s: float = 5.0) -> Any:
        self.sent[method] += 1
        self.messages.append((method, args))
        if self.lost:
            raise OwnerUnavailable(self.name, "it died")
        if method == "embed":
            return await self.owner.embed(*args)
        if method == "embed_many":
            return pickle.loads(pickle.dumps(await self.owner.many(*args)))
        return method


class Here:
    """A courier whose company is waited for until `go` is called."""

    def __init__(self) -> None:
        self.owner = Owner()
        self.line = Line(self.owner)
        self.paused: list[float] = []
        self._go = asyncio.Event()
        self.courier = Courier(self.line, pause=self._pause)
        self._asked = 0
        self.crowd: list[asyncio.Task[Any]] = []

    async def _pause(self, seconds: float) -> None:
        self.paused.append(seconds)
        await self._go.wait()

    async def ask(self, *texts: str, timeout_s: float = 10.0) -> Share:
        self._asked += 1
        call_id = f"c{self._asked}"
        answer = await self.courier.ask("embed", call_id, "lane", list(texts), timeout_s=timeout_s)
        assert isinstance(answer, Share)
        return answer

    async def busy(self) -> None:
        """As many lists under way as make the next one wait for company."""
        self.owner.gates["slow"] = asyncio.Event()
        self.crowd = [asyncio.create_task(self.ask("slow")) for _ in range(BUSY)]
        await settled()
        self.line.messages.clear()

    def begin(self, *texts: str, **fields: Any) -> asyncio.Task[Share]:
        return asyncio.create_task(self.ask(*texts, **fields))

    async def go(self) -> None:
        await settled()
        self._go.set()
        await settled()

    @property
    def methods(self) -> list[str]:
        return [method for method, _ in self.line.messages]


@pytest.fixture
async def here() -> AsyncIterator[Here]:
    here = Here()
    yield here
    for gate in here.owner.gates.values():
        gate.set()
    await asyncio.gather(*here.crowd)


async def settled() -> None:
    for _ in range(12):
        await asyncio.sleep(0)


async def test_a_quiet_process_sends_each_list_at_once_and_alone(here: Here) -> None:
    assert (await here.ask("a")).array.tolist() == [[1.0]]
    assert here.methods == ["embed"]
    assert here.paused == []


async def test_a_busy_one_sends_what_comes_within_a_few_milliseconds_in_one_message(
    here: Here,
) -> None:
    await here.busy()
    tasks = [here.begin("x" * n) for n in range(1, 6)]
    await here.go()
    assert [(await task).array.tolist() for task in tasks] == [[[float(n)]] for n in range(1, 6)]
    assert here.methods == ["embed_many"]
    assert here.paused == [LINGER_S]


async def test_what_is_done_is_answered_and_the_rest_is_come_back_for(here: Here) -> None:
    await here.busy()
    here.owner.gates["later"] = asyncio.Event()
    first, later = here.begin("a"), here.begin("later")
    await here.go()
    assert (await first).array.tolist() == [[1.0]]
    assert not later.done()
    here.owner.gates["later"].set()
    assert (await later).array.tolist() == [[5.0]]
    assert here.methods == ["embed_many", "embed_many"]
    assert Counter(here.owner.begun).most_common(1)[0][1] == 1, "nothing is begun twice"


async def test_a_failure_is_its_callers_alone(here: Here) -> None:
    await here.busy()
    good, bad = here.begin("a"), here.begin("bad")
    await here.go()
    assert (await good).prompt_tokens == 1
    with pytest.raises(ValueError, match="bad text"):
        await bad


async def test_a_message_that_is_lost_is_told_to_all_who_are_in_it(here: Here) -> None:
    await here.busy()
    here.line.lost = True
    tasks = [here.begin("a"), here.begin("b")]
    await here.go()
    for task in tasks:
        with pytest.raises(OwnerUnavailable):
            await task
    here.line.lost = False


async def test_a_caller_that_has_left_is_not_sent(here: Here) -> None:
    await here.busy()
    gone, stays = here.begin("gone"), here.begin("stays")
    await settled()
    gone.cancel()
    await here.go()
    assert (await stays).prompt_tokens == 1
    assert [args[0][0][2] for _, args in here.line.messages] == [["stays"]]


async def test_no_answer_in_time_is_an_owner_that_is_away(here: Here) -> None:
    await here.busy()
    here.owner.gates["never"] = asyncio.Event()
    late = here.begin("never", timeout_s=0.0)
    await here.go()
    with pytest.raises(OwnerUnavailable):
        await late


async def test_a_long_list_travels_alone(here: Here) -> None:
    await here.busy()
    texts = ["a"] * (TEXTS_MAX + 1)
    assert len((await here.ask(*texts)).array) == len(texts)
    assert here.methods == ["embed"]


async def test_a_full_message_does_not_wait(here: Here) -> None:
    await here.busy()
    tasks = [here.begin("a") for _ in range(LISTS_MAX)]
    assert len(await asyncio.gather(*tasks)) == LISTS_MAX
    assert here.methods == ["embed_many"]
    await here.go()
    assert here.methods == ["embed_many"], "nothing is left to be sent"


async def test_the_vectors_of_one_caller_do_not_keep_those_of_the_others(here: Here) -> None:
    await here.busy()
    tasks = [here.begin("a"), here.begin("b")]
    await here.go()
    arrays = [(await task).array for task in tasks]
    assert all(array.base is None for array in arrays)


async def test_other_messages_pass_as_they_are(here: Here) -> None:
    assert await here.courier.ask("drop", "c1") == "drop"


async def test_what_nobody_comes_back_for_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(courier, "HELD_S", 0.0)
    owner = Owner()
    owner.gates["later"] = asyncio.Event()
    came = await owner.many([("c1", "lane", ["a"]), ("c2", "lane", ["later"])])
    assert [place for place, _ in came] == [0]
    while not owner.left:
        await asyncio.sleep(0)
    assert owner.left == ["c2"]
