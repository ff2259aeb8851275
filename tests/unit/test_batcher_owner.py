from __future__ import annotations

import asyncio
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher import callers as callers_module
from actors.batcher import owner as owner_module
from actors.batcher.owner import Batcher
from actors.batcher.policy import (
    BadVectors,
    BatcherFull,
    Caps,
    Lane,
    NoPermit,
    Order,
    Paid,
    Room,
    Share,
    Vectors,
)
from tests.support.fake_time import FakeTime

LANE = Lane("d1")


class Refused(Exception):
    def __init__(self, upstream_status: int) -> None:
        super().__init__(upstream_status)
        self.upstream_status = upstream_status


def vector_of(text: str) -> list[float]:
    return [float(len(text)), float(sum(map(ord, text)) % 997), 1.0]


class Provider:
    """Embeds texts, logs every call, refuses `poison`, and answers when the gate is open."""

    def __init__(self, *, poison: str = "poison", status: int = 400) -> None:
        self.log: list[tuple[Lane, list[str]]] = []
        self.timeouts_s: list[float] = []
        self.poison = poison
        self.status = status
        self.gate = asyncio.Event()
        self.gate.set()
        self.tokens = 0
        self.cost_nano = 0
        self.opened = 0
        self.closed = False
        self.refusal_costs = 0  # tokens

    def __call__(self) -> Any:
        self.opened += 1
        return self

    async def call(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        self.log.append((lane, texts))
        self.timeouts_s.append(timeout_s)
        await self.gate.wait()
        if self.poison in texts:
            refused = Refused(self.status)
            if self.refusal_costs:
                self.tokens += self.refusal_costs
                self.cost_nano += 7 * self.refusal_costs
                paid = Paid(self.refusal_costs, 7 * self.refusal_costs, "model")
                refused.paid = paid  # type: ignore[attr-defined]
            raise refused
        tokens = sum(len(text) + 1 for text in texts)
        self.tokens += tokens
        self.cost_nano += 7 * tokens
        array = np.array([vector_of(text) for text in texts], dtype=np.float32)
        return Vectors(array, tokens, 7 * tokens, "model")

    @property
    def sent(self) -> list[list[str]]:
        return [texts for _, texts in self.log]


class Opened:
    """What the factory makes: the provider's call, with a close."""

    def __init__(self, provider: Provider) -> None:
        self._provider = provider

    async def __call__(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        return await self._provider.call(lane, texts, timeout_s)

    async def close(self) -> None:
        self._provider.closed = True


def make(provider: Provider) -> Batcher:
    def factory() -> Opened:
        provider.opened += 1
        return Opened(provider)

    return Batcher(factory)


minted = 0


async def embed(
    batcher: Batcher,
    texts: list[str],
    *,
    lane: Lane = LANE,
    call_id: str | None = None,
    timeout_s: float = 60.0,
    coalesce: bool = True,
    caps: Caps | None = None,
    **more: Any,
) -> Share:
    global minted
    minted += 1
    order = Order(timeout_s=timeout_s, coalesce=coalesce, caps=caps or Caps(), **more)
    return await batcher.embed(call_id or f"c{minted}", lane, list(texts), order)


def check(share: Share, texts: list[str]) -> None:
    assert share.array.tolist() == [vector_of(text) for text in texts]
    assert share.array.dtype == np.float32


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_what_arrives_in_one_tick_in_one_lane_travels_together() -> None:
    provider = Provider()
    batcher = make(provider)
    lists = [["a", "b"], ["b", "c", "b"], ["d"]]
    shares = await asyncio.gather(*(embed(batcher, texts) for texts in lists))
    assert provider.sent == [["a", "b", "c", "d"]]
    for share, texts in zip(shares, lists, strict=True):
        check(share, texts)
        assert share.texts_in_call == 4
        assert share.model == "model"
    assert sum(share.prompt_tokens for share in shares) == provider.tokens
    assert sum(share.cost_nano or 0 for share in shares) == provider.cost_nano
    assert batcher.stats()["texts_queued"] == 0


async def test_a_single_text_on_an_idle_lane_leaves_when_the_tick_ends() -> None:
    provider = Provider()
    batcher = make(provider)
    task = asyncio.create_task(embed(batcher, ["a"]))
    await asyncio.sleep(0)  # the caller's own tick
    assert provider.sent == []
    await asyncio.sleep(0)  # the next one
    assert provider.sent == [["a"]]
    check(await task, ["a"])


async def test_without_coalescing_a_list_leaves_in_the_callers_own_tick_and_alone() -> None:
    provider = Provider()
    batcher = make(provider)
    tasks = [asyncio.create_task(embed(batcher, [t], coalesce=False)) for t in "ab"]
    await asyncio.sleep(0)
    assert provider.sent == [["a"], ["b"]]
    for task, text in zip(tasks, "ab", strict=True):
        share = await task
        check(share, [text])
        assert share.texts_in_call == 1


@pytest.mark.parametrize("coalesce", [True, False])
async def test_a_list_over_the_caps_is_split_over_calls_and_put_together_again(
    coalesce: bool,
) -> None:
    provider = Provider()
    texts = [f"text {n % 9}" for n in range(25)]
    share = await embed(make(provider), texts, coalesce=coalesce, caps=Caps(items_max=4))
    check(share, texts)
    assert [len(sent) for sent in provider.sent] == [4, 4, 1]
    assert (share.calls, share.texts_in_call) == (3, 9)
    assert share.prompt_tokens == provider.tokens


async def test_lanes_do_not_mix() -> None:
    provider = Provider()
    batcher = make(provider)
    other = Lane("d1", (("dimensions", 64),))
    await asyncio.gather(embed(batcher, ["a"]), embed(batcher, ["a"], lane=other))
    assert provider.log == [(LANE, ["a"]), (other, ["a"])]


async def test_a_bad_text_fails_only_its_caller() -> None:
    provider = Provider()
    batcher = make(provider)
    lists = [["a"], ["b", "poison"], ["c"], ["d", "a"]]
    answers = await asyncio.gather(
        *(embed(batcher, texts) for texts in lists), return_exceptions=True
    )
    assert isinstance(answers[1], Refused)
    for n in (0, 2, 3):
        share = answers[n]
        assert isinstance(share, Share)
        check(share, lists[n])
    paid = sum(share.prompt_tokens for share in answers if isinstance(share, Share))
    assert paid == provider.tokens


async def test_one_bad_caller_among_many_is_found_in_few_calls() -> None:
    provider = Provider()
    batcher = make(provider)
    callers = [embed(batcher, [f"t{n}" if n != 77 else "poison"]) for n in range(256)]
    answers = await asyncio.gather(*callers, return_exceptions=True)
    assert [n for n, answer in enumerate(answers) if isinstance(answer, Refused)] == [77]
    assert len(provider.sent) == 17


@pytest.mark.parametrize("status", [401, 429, 500])
async def test_other_failures_go_to_everybody_and_are_not_sent_again(status: int) -> None:
    provider = Provider(status=status)
    batcher = make(provider)
    answers = await asyncio.gather(
        embed(batcher, ["a"]), embed(batcher, ["poison"]), return_exceptions=True
    )
    assert all(isinstance(answer, Refused) for answer in answers)
    assert len(provider.sent) == 1


async def test_a_list_that_fails_in_part_says_what_it_has_cost() -> None:
    provider = Provider()
    with pytest.raises(Refused) as caught:
        await embed(make(provider), ["a", "b", "poison"], caps=Caps(items_max=2))
    assert caught.value.paid.prompt_tokens == provider.tokens == 4  # type: ignore[attr-defined]
    assert caught.value.paid.cost_nano == provider.cost_nano  # type: ignore[attr-defined]


async def test_a_call_in_vain_that_costs_is_paid_in_parts_by_all_whom_it_failed() -> None:
    provider = Provider(status=429)
    provider.refusal_costs = 10
    batcher = make(provider)
    lists = [["poison"], ["a"], ["bbb", "ccc"]]
    errors = await asyncio.gather(*(embed(batcher, t) for t in lists), return_exceptions=True)
    paid: list[Paid] = [error.paid for error in errors]  # type: ignore[union-attr]

    assert len(provider.sent) == 1
    assert [(one.prompt_tokens, one.cost_nano) for one in paid] == [(5, 32), (1, 6), (4, 32)]
    assert len({error.beat for error in errors}) == 1  # type: ignore[union-attr]


async def test_what_a_call_in_vain_has_cost_is_in_the_price_of_the_next() -> None:
    provider = Provider()
    provider.refusal_costs = 8
    batcher = make(provider)
    answers = await asyncio.gather(
        *(embed(batcher, t) for t in (["poison"], ["aa"])), return_exceptions=True
    )

    refused, share = answers
    assert provider.sent == [["poison", "aa"], ["poison"], ["aa"]]
    assert isinstance(refused, Refused)
    assert isinstance(share, Share)
    assert refused.paid.prompt_tokens == 6 + 8  # type: ignore[attr-defined]
    assert share.prompt_tokens == 2 + 3
    assert share.cost_nano == 7 * 5


async def test_who_has_left_before_a_call_in_vain_comes_back_leaves_its_part_unclaimed() -> None:
    provider = Provider(status=429)
    provider.refusal_costs = 10
    provider.gate.clear()
    batcher = make(provider)
    stays, leaves = (asyncio.create_task(embed(batcher, t)) for t in (["poison"], ["aaaaaa"]))
    while not provider.sent:
        await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    provider.gate.set()
    with pytest.raises(Refused) as caught:
        await stays

    assert caught.value.paid == Paid(5, 35, "model")  # type: ignore[attr-defined]
    stats = batcher.stats()
    assert (stats["unclaimed_tokens"], stats["unclaimed_nano"]) == (5, 35)


async def test_a_caller_that_has_left_is_not_sent_again() -> None:
    provider = Provider()
    provider.gate.clear()
    batcher = make(provider)
    leaver, bad, stayer = (
        asyncio.create_task(embed(batcher, [text])) for text in ("mine", "poison", "yours")
    )
    await settle()
    leaver.cancel()
    await settle()
    provider.gate.set()
    check(await stayer, ["yours"])
    with pytest.raises(Refused):
        await bad
    assert provider.sent == [["mine", "poison", "yours"], ["poison"], ["yours"]]
    assert batcher.stats()["texts_queued"] == 0


async def test_a_caller_that_leaves_during_the_call_does_not_disturb_the_others() -> None:
    provider = Provider()
    provider.gate.clear()
    batcher = make(provider)
    leaver = asyncio.create_task(embed(batcher, ["mine"]))
    stayer = asyncio.create_task(embed(batcher, ["yours"]))
    await settle()
    leaver.cancel()
    await settle()
    provider.gate.set()
    share = await stayer
    check(share, ["yours"])
    assert share.prompt_tokens + batcher.stats()["unclaimed_tokens"] == provider.tokens


async def test_a_dropped_call_is_not_sent() -> None:
    provider = Provider()
    batcher = make(provider)
    task = asyncio.create_task(embed(batcher, ["a"], call_id="x"))
    await asyncio.sleep(0)
    batcher.drop("x")
    batcher.drop("x")
    batcher.drop("never heard of")
    with pytest.raises(TimeoutError):
        await task
    await settle()
    assert provider.sent == []


async def test_cancelling_an_uncoalesced_call_cancels_the_provider_call() -> None:
    provider = Provider()
    provider.gate.clear()
    batcher = make(provider)
    task = asyncio.create_task(embed(batcher, ["a"], coalesce=False, call_id="x"))
    await settle()
    repeated = asyncio.create_task(embed(batcher, ["a"], coalesce=False, call_id="x"))
    await settle()
    task.cancel()
    with pytest.raises(TimeoutError):
        await repeated
    assert batcher.stats()["texts_queued"] == batcher.stats()["calls_under_way"] == 0


@pytest.mark.parametrize("coalesce", [True, False])
async def test_a_message_that_comes_twice_is_sent_and_paid_once(coalesce: bool) -> None:
    provider = Provider()
    provider.gate.clear()
    batcher = make(provider)
    twins = [
        asyncio.create_task(embed(batcher, ["a"], coalesce=coalesce, call_id="x")) for _ in range(2)
    ]
    await settle()
    provider.gate.set()
    for task in twins:
        check(await task, ["a"])
    check(await embed(batcher, ["a"], call_id="x"), ["a"])
    assert provider.sent == [["a"]]


async def test_answers_are_kept_for_repetition_within_bounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callers_module, "FINISHED_MAX", 2)
    provider = Provider()
    batcher = make(provider)
    for call_id in ("x", "y", "z"):
        await embed(batcher, ["a"], call_id=call_id)
    await embed(batcher, ["a"], call_id="z")
    assert len(provider.sent) == 3
    await embed(batcher, ["a"], call_id="x")
    assert len(provider.sent) == 4
    assert len(batcher._callers._calls) == 2


@pytest.mark.parametrize("coalesce", [True, False])
async def test_a_call_that_takes_too_long_times_out(coalesce: bool) -> None:
    provider = Provider()
    provider.gate.clear()
    batcher = make(provider)
    with pytest.raises(TimeoutError):
        await embed(batcher, ["a"], timeout_s=0.0, coalesce=coalesce)
    assert batcher.stats()["texts_queued"] == 0


async def test_a_call_may_take_as_long_as_its_most_patient_caller() -> None:
    provider = Provider()
    batcher = make(provider)
    await asyncio.gather(
        embed(batcher, ["a"], timeout_s=5.0), embed(batcher, ["b"], timeout_s=50.0)
    )
    assert 49 < provider.timeouts_s[0] <= 50


async def test_a_full_batcher_refuses_and_says_when_to_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callers_module, "TEXTS_QUEUED_MAX", 3)
    provider = Provider()
    provider.gate.clear()
    batcher = make(provider)
    first = asyncio.create_task(embed(batcher, ["a", "b"]))
    await settle()
    with pytest.raises(BatcherFull) as caught:
        await embed(batcher, ["c", "d"])
    assert caught.value.retry_after_s > 0
    provider.gate.set()
    await first
    check(await embed(batcher, ["a", "b", "c", "d"]), ["a", "b", "c", "d"])


@pytest.mark.parametrize(
    "array", [np.ones((1, 3)), np.ones(2), np.array([[1.0, 2.0], [float("nan"), 0.0]])]
)
async def test_vectors_that_do_not_fit_the_texts_are_an_error(array: Any) -> None:
    async def call(lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        return Vectors(array, 9, 5, "m")

    batcher = Batcher(lambda: call)
    with pytest.raises(BadVectors):
        await embed(batcher, ["a", "b"])
    assert batcher.stats()["unclaimed_tokens"] == 9


async def test_an_unknown_price_stays_unknown_and_an_estimate_stays_flagged() -> None:
    async def call(lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        return Vectors(np.ones((len(texts), 2), np.float32), 3, None, "m", estimated=True)

    share = await embed(Batcher(lambda: call), ["a", "b"], caps=Caps(items_max=1))
    assert (share.cost_nano, share.prompt_tokens, share.estimated) == (None, 6, True)


async def test_a_provider_that_cannot_be_opened_fails_the_call_and_is_opened_again() -> None:
    provider = Provider()
    attempts = 0

    def factory() -> Opened:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            raise RuntimeError("no such model")
        return Opened(provider)

    batcher = Batcher(factory)
    with pytest.raises(RuntimeError, match="no such model"):
        await embed(batcher, ["a"])
    check(await embed(batcher, ["a"]), ["a"])


async def test_the_provider_is_opened_by_the_first_call_and_closed_with_the_batcher() -> None:
    provider = Provider()
    batcher = make(provider)
    assert provider.opened == 0
    await embed(batcher, ["a"])
    await embed(batcher, ["b"])
    assert provider.opened == 1
    await batcher.close()
    assert provider.closed
    with pytest.raises(BatcherFull):
        await embed(batcher, ["c"])


async def test_an_empty_list_is_an_error() -> None:
    with pytest.raises(ValueError, match="no texts"):
        await embed(make(Provider()), [])


async def test_a_callers_vectors_do_not_keep_the_whole_calls_alive() -> None:
    batcher = make(Provider())
    shares = await asyncio.gather(embed(batcher, ["a"]), embed(batcher, ["b"]))
    assert all(share.array.base is None for share in shares)


def test_a_batcher_is_made_without_an_event_loop() -> None:
    assert Batcher(lambda: None).protocol() == Batcher.PROTOCOL  # type: ignore[arg-type, return-value]


@given(
    lists=st.lists(
        st.lists(
            st.sampled_from(["a", "bb", "ccc", "日本", "poison", *"defghij"]),
            min_size=1,
            max_size=8,
        ),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 2**32),
    items_max=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_whoever_fails_leaves_or_shares_the_tokens_add_up(
    lists: list[list[str]], seed: int, items_max: int
) -> None:
    async def session() -> None:
        dice = random.Random(seed)
        provider = Provider(status=dice.choice([400, 429]))
        provider.refusal_costs = dice.choice([0, 0, 7])
        batcher = make(provider)
        tasks = []
        for texts in lists:
            coalesce = dice.random() < 0.8
            caps = Caps(items_max=items_max)
            tasks.append(asyncio.create_task(embed(batcher, texts, coalesce=coalesce, caps=caps)))
            if dice.random() < 0.3:
                await asyncio.sleep(0)
            if dice.random() < 0.2:
                dice.choice(tasks).cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        told = cost = 0
        for answer, texts in zip(answers, lists, strict=True):
            if isinstance(answer, Share):
                check(answer, texts)
                assert "poison" not in texts
                told, cost = told + answer.prompt_tokens, cost + (answer.cost_nano or 0)
            elif isinstance(answer, Refused):
                assert "poison" in texts or provider.status == 429
                paid = getattr(answer, "paid", None)
                if paid is not None:
                    told, cost = told + paid.prompt_tokens, cost + paid.cost_nano
            else:
                assert isinstance(answer, asyncio.CancelledError)
        stats = batcher.stats()
        assert told + stats.get("unclaimed_tokens", 0) == provider.tokens
        assert cost + stats.get("unclaimed_nano", 0) == provider.cost_nano
        assert all(len(sent) <= items_max for sent in provider.sent)
        assert all(len(sent) == len(set(sent)) for sent in provider.sent)
        assert stats["texts_queued"] == stats["calls_under_way"] == 0

    asyncio.run(session())


# ------------------------------------------------------------------------ what waits, and how


class Slow(Provider):
    """Each call waits until it is told what comes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[asyncio.Future[Exception | None]] = []

    async def call(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        told: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.told.append(told)
        self.log.append((lane, texts))
        error = await told
        if error is not None:
            raise error
        tokens = sum(len(text) + 1 for text in texts)
        self.tokens += tokens
        self.cost_nano += 7 * tokens
        array = np.array([vector_of(text) for text in texts], dtype=np.float32)
        return Vectors(array, tokens, 7 * tokens, "model")

    async def tell(self, number: int, error: Exception | None = None) -> None:
        self.told[number].set_result(error)
        await settle()


def start(batcher: Batcher, *texts: str, **more: Any) -> asyncio.Task[Share]:
    return asyncio.create_task(embed(batcher, list(texts), **more))


async def test_what_comes_while_all_places_are_taken_leaves_in_one_call() -> None:
    time = FakeTime()
    provider = Slow()
    batcher = on(time, provider)
    places = []
    for n in range(4):  # one after the other, each alone
        places.append(start(batcher, f"first {n}"))
        await settle()
    assert len(provider.sent) == 4
    later = []
    for n in range(30):
        later.append(start(batcher, f"later {n}"))
        await settle()
    assert len(provider.sent) == 4
    await provider.tell(0)
    await time.advance(0.025)  # the bound of a linger
    assert [len(sent) for sent in provider.sent] == [1, 1, 1, 1, 30]
    for n in range(1, 5):
        await provider.tell(n)
    for n, share in enumerate(await asyncio.gather(*later)):
        check(share, [f"later {n}"])
    await asyncio.gather(*places)


async def test_a_text_that_is_under_way_is_joined_and_costs_who_comes_later_nothing() -> None:
    provider = Slow()
    batcher = make(provider)
    first = start(batcher, "a")
    await settle()
    second = start(batcher, "a")
    third = start(batcher, "b", "a")
    await settle()
    assert provider.sent == [["a"], ["b"]]
    await provider.tell(0)
    await provider.tell(1)
    shares = await asyncio.gather(first, second, third)
    for share, texts in zip(shares, (["a"], ["a"], ["b", "a"]), strict=True):
        check(share, texts)
    assert [share.prompt_tokens for share in shares] == [2, 0, 2]
    assert sum(share.cost_nano or 0 for share in shares) == provider.cost_nano


async def test_who_has_much_more_time_does_not_join_a_call_that_ends_sooner() -> None:
    provider = Slow()
    batcher = make(provider)
    hasty = start(batcher, "a", timeout_s=5.0)
    await settle()
    patient = start(batcher, "a", timeout_s=60.0)
    await settle()
    assert provider.sent == [["a"], ["a"]]
    await provider.tell(0)
    await provider.tell(1)
    check(await hasty, ["a"])
    check(await patient, ["a"])


async def test_bulk_and_interactive_texts_do_not_share_a_call() -> None:
    provider = Provider()
    batcher = make(provider)
    await asyncio.gather(embed(batcher, ["a"]), embed(batcher, ["b"], bulk=True))
    assert sorted(provider.sent) == [["a"], ["b"]]


async def test_a_tenants_thousands_do_not_keep_another_tenant_from_the_next_call() -> None:
    provider = Slow()
    batcher = make(provider)
    caps = Caps(items_max=50)
    crowd = [start(batcher, f"x{n}", tenant="big", caps=caps) for n in range(1000)]
    small = start(batcher, "small", tenant="small", caps=caps)
    await settle()
    assert any("small" in sent for sent in provider.sent[:2])
    for task in (*crowd, small):
        task.cancel()
    await asyncio.wait([*crowd, small])


async def test_half_of_the_room_is_the_most_that_a_tenant_or_all_bulk_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(callers_module, "TEXTS_QUEUED_MAX", 8)
    provider = Slow()
    batcher = make(provider)
    waiting = [start(batcher, "a", "b", "c", tenant="t")]
    await settle()
    with pytest.raises(BatcherFull):
        await embed(batcher, ["d", "e"], tenant="t")
    waiting.append(start(batcher, "x", "y", tenant="u", bulk=True))
    await settle()
    with pytest.raises(BatcherFull):
        await embed(batcher, ["p", "q", "r"], tenant="v", bulk=True)
    waiting.append(start(batcher, "p", "q", "r", tenant="v"))
    await settle()
    with pytest.raises(BatcherFull):
        await embed(batcher, ["z"], tenant="w")
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)
    assert batcher.stats()["texts_queued"] == 0
    assert not batcher._callers._queued_by
    assert batcher._callers._bulk_queued == 0


# ------------------------------------------------------------------------------------ permits


class Permits(Provider):
    """Refuses leave until told otherwise."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self.retry_after_s: float | None = retry_after_s
        self.asked = 0

    async def call(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        self.asked += 1
        if self.retry_after_s is not None:
            raise NoPermit(self.retry_after_s, Refused(429))
        return await super().call(lane, texts, timeout_s)


def on(time: FakeTime, provider: Provider) -> Batcher:
    return Batcher(lambda: Opened(provider), time, pause=time.sleep)


async def test_texts_wait_for_the_permit_and_the_call_grows_meanwhile() -> None:
    time = FakeTime()
    provider = Permits(1.0)
    batcher = on(time, provider)
    waiting = [start(batcher, f"t{n}", patience_s=10.0) for n in range(3)]
    await time.advance(0.1)
    waiting += [start(batcher, f"t{n}", patience_s=10.0) for n in range(3, 6)]
    await time.advance(0.1)
    assert provider.asked == 1
    provider.retry_after_s = None
    await time.advance(0.79)
    assert provider.sent == []
    await time.advance(0.02)
    assert provider.sent == [[f"t{n}" for n in range(6)]]
    await asyncio.gather(*waiting)
    assert batcher.stats()["provider_calls"] == 1


async def test_who_cannot_wait_for_the_permit_is_told_so_at_once() -> None:
    time = FakeTime()
    provider = Permits(1.0)
    batcher = on(time, provider)
    patient = start(batcher, "a", patience_s=2.0)
    hasty = start(batcher, "b", patience_s=0.5)
    bulk = start(batcher, "c", bulk=True)
    await time.advance(0.0)
    with pytest.raises(Refused):
        await hasty
    with pytest.raises(Refused):
        await embed(batcher, ["later"], patience_s=0.5)
    provider.retry_after_s = None
    await time.advance(1.1)
    check(await patient, ["a"])
    check(await bulk, ["c"])
    assert sorted(provider.sent) == [["a"], ["c"]]
    assert batcher.stats()["texts_queued"] == 0


async def test_a_list_of_its_own_does_not_wait_for_a_permit() -> None:
    time = FakeTime()
    provider = Permits(1.0)
    with pytest.raises(Refused):
        await embed(on(time, provider), ["a"], coalesce=False, patience_s=9.0)


# ------------------------------------------------------------------------ caps and bad texts


class Capped(Provider):
    """Takes `most` texts in one call, and says so."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    async def call(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        if len(texts) > self.most:
            self.log.append((lane, texts))
            raise Worded(400, f"batch size {len(texts)} > maximum allowed batch size {self.most}")
        return await super().call(lane, texts, timeout_s)


class Worded(Refused):
    def __init__(self, upstream_status: int, words: str) -> None:
        super().__init__(upstream_status)
        self.args = (upstream_status, words)

    def __str__(self) -> str:
        return str(self.args[1])


@pytest.mark.parametrize("coalesce", [True, False])
async def test_a_cap_that_a_refusal_names_is_learnt_and_nobody_fails(coalesce: bool) -> None:
    provider = Capped(32)
    batcher = make(provider)
    texts = [f"t{n}" for n in range(100)]
    check(await embed(batcher, texts, coalesce=coalesce), texts)
    assert sorted(len(sent) for sent in provider.sent) == [4, 32, 32, 32, 100]
    check(await embed(batcher, texts, coalesce=coalesce), texts)
    assert sorted(len(sent) for sent in provider.sent[5:]) == [4, 32, 32, 32]


async def test_a_bad_text_is_remembered_and_not_asked_for_again() -> None:
    provider = Provider()
    batcher = make(provider)
    check(await embed(batcher, ["a"]), ["a"])
    for _ in range(3):
        with pytest.raises(Refused):
            await embed(batcher, ["poison"])
    with pytest.raises(Refused):
        await embed(batcher, ["b", "poison"])
    assert provider.sent == [["a"], ["poison"]]
    assert batcher.stats()["texts_queued"] == 0


@pytest.mark.parametrize("coalesce", [True, False])
async def test_of_a_partial_list_only_the_bad_texts_fail_and_each_good_one_is_paid_once(
    coalesce: bool,
) -> None:
    provider = Provider()
    texts = [f"t{n}" if n % 20 else "poison" for n in range(60)]
    share = await embed(make(provider), texts, coalesce=coalesce, partial=True)

    assert [place for place, _ in share.failed] == [0, 20, 40]
    assert all(isinstance(error, Refused) for _, error in share.failed)
    for place, text in enumerate(texts):
        wanted = [0.0] * 3 if text == "poison" else vector_of(text)
        assert share.array[place].tolist() == wanted
    assert share.prompt_tokens == provider.tokens
    assert share.prompt_tokens == sum(len(t) + 1 for t in texts if t != "poison")


async def test_a_partial_list_asks_for_what_is_known_as_bad_only_where_it_is_told_to() -> None:
    provider = Provider()
    batcher = make(provider)
    await embed(batcher, ["a", "poison"], partial=True)
    sent = len(provider.sent)
    share = await embed(batcher, ["b", "poison"], partial=True)

    assert provider.sent[sent:] == [["b"]]
    assert [place for place, _ in share.failed] == [1]
    with pytest.raises(Refused):
        await embed(batcher, ["poison"], partial=True)
    assert len(provider.sent) == sent + 1
    provider.poison = "none"  # the provider has changed its mind
    share = await embed(batcher, ["poison"], partial=True, anew=True)
    assert share.failed == ()
    assert share.array.tolist() == [vector_of("poison")]


async def test_bulk_finds_out_how_many_calls_at_once_do_no_harm() -> None:
    provider = Provider()
    batcher = make(provider)
    provider.gate.clear()
    lists = [[f"{n}"] for n in range(200)]
    tasks = [
        asyncio.create_task(embed(batcher, texts, bulk=True, caps=Caps(items_max=1)))
        for texts in lists
    ]
    for _ in range(30):
        await asyncio.sleep(0)
    first = len(provider.sent)
    provider.gate.set()
    await asyncio.gather(*tasks)

    assert first == 3  # one of four places is left to others
    (limit,) = batcher._ups.values()
    assert limit.state.concurrency.limit > 6


async def test_a_list_that_is_bad_as_a_whole_is_not_searched() -> None:
    provider = Provider()
    with pytest.raises(Refused):
        await embed(make(provider), ["a", "b", "poison", "c"])
    assert len(provider.sent) == 1


async def test_a_lane_that_is_refused_whatever_it_says_is_not_searched_to_the_end() -> None:
    asked = 0

    async def call(lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        nonlocal asked
        asked += 1
        raise Refused(400)

    batcher = Batcher(lambda: call)
    answers = await asyncio.gather(
        *(embed(batcher, [f"t{n}"]) for n in range(200)), return_exceptions=True
    )
    assert all(isinstance(answer, Refused) for answer in answers)
    assert asked < 60


async def test_a_refusal_of_a_parameter_is_no_texts_fault() -> None:
    asked = []

    async def call(lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
        asked.append(texts)
        error = Refused(400)
        error.param = "dimensions"  # type: ignore[attr-defined]
        raise error

    batcher = Batcher(lambda: call)
    lane = Lane("d1", (("dimensions", 7),))
    answers = await asyncio.gather(
        *(embed(batcher, [text], lane=lane) for text in "abc"), return_exceptions=True
    )
    assert all(isinstance(answer, Refused) for answer in answers)
    assert asked == [["a", "b", "c"]]


@pytest.mark.parametrize("seed", range(4))
async def test_one_text_in_a_hundred_is_bad_and_exactly_those_fail(seed: int) -> None:
    dice = random.Random(seed)
    bad = {f"t{n}" for n in dice.sample(range(2000), 20)}

    class Picky(Provider):
        async def call(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
            if bad.intersection(texts):
                self.log.append((lane, texts))
                raise Refused(400)
            return await super().call(lane, texts, timeout_s)

    provider = Picky()
    batcher = make(provider)
    answers = await asyncio.gather(
        *(embed(batcher, [f"t{n}"]) for n in range(2000)), return_exceptions=True
    )
    failed = {f"t{n}" for n, answer in enumerate(answers) if isinstance(answer, Refused)}
    assert failed == bad
    for n, answer in enumerate(answers):
        if isinstance(answer, Share):
            check(answer, [f"t{n}"])
    assert len(provider.sent) < 20 * 2 * 9 + 8


async def test_a_provider_that_pushes_back_gets_fewer_calls_at_once() -> None:
    provider = Slow()
    batcher = make(provider)
    one = start(batcher, "a")
    await settle()
    assert batcher.stats()["concurrency"] == {"d1": 4}
    await provider.tell(0, Refused(429))
    with pytest.raises(Refused):
        await one
    two = start(batcher, "b")
    await settle()
    assert batcher.stats()["concurrency"] == {"d1": 2}
    await provider.tell(1)
    check(await two, ["b"])


async def test_a_provider_that_says_when_to_come_back_is_asked_then() -> None:
    time = FakeTime()
    provider = Slow()
    batcher = on(time, provider)
    one = start(batcher, "a")
    await settle()
    refused = Refused(429)
    refused.retry_after_s = 0.4  # type: ignore[attr-defined]
    await provider.tell(0, refused)
    with pytest.raises(Refused):
        await one
    two = start(batcher, "b")
    await time.advance(0.39)
    assert provider.sent == [["a"]]
    await time.advance(0.02)
    await provider.tell(1)
    check(await two, ["b"])


async def test_a_provider_that_has_nothing_left_is_asked_when_it_has_more() -> None:
    time = FakeTime()

    class Scarce(Provider):
        async def call(self, lane: Lane, texts: list[str], timeout_s: float) -> Vectors:
            room = Room(requests=0, tokens=100, resets_s=0.4)
            return replace(await super().call(lane, texts, timeout_s), room=room)

    provider = Scarce()
    batcher = on(time, provider)
    await embed(batcher, ["a"])
    two, three = start(batcher, "b"), start(batcher, "c")
    await time.advance(0.39)
    assert provider.sent == [["a"]]
    await time.advance(0.02)
    assert provider.sent == [["a"], ["b", "c"]]
    check(await two, ["b"])
    check(await three, ["c"])


@pytest.mark.parametrize(("linger_s", "waits_s"), [(None, 0.02), (0.005, 0.005), (0.0, 0.0)])
async def test_what_is_sent_again_waits_for_company_no_longer_than_anybody(
    linger_s: float | None, waits_s: float
) -> None:
    time = FakeTime()
    provider = Provider()
    batcher = on(time, provider)
    again = start(batcher, "a", lane=Lane("d1", retry=True), caps=Caps(linger_s=linger_s))
    if waits_s:
        await time.advance(waits_s - 0.001)
        assert provider.sent == []
        await time.advance(0.002)
    check(await again, ["a"])


async def test_whose_deadline_passes_while_it_waits_for_a_place_is_not_sent() -> None:
    time = FakeTime()
    provider = Slow()
    batcher = on(time, provider)
    places = []
    for n in range(4):
        places.append(start(batcher, f"first {n}"))
        await settle()
    late = start(batcher, "late", "too", timeout_s=5.0)
    patient = start(batcher, "too", "on time")
    await time.advance(6.0)
    await provider.tell(0)
    await time.advance(1.0)
    with pytest.raises(TimeoutError):
        await late
    assert provider.sent[4:] == [["too", "on time"]]
    for n in range(1, 5):
        await provider.tell(n)
    share = await patient
    check(share, ["too", "on time"])
    assert share.prompt_tokens == len("too") + len("on time") + 2
    await asyncio.gather(*places)
    assert batcher.stats()["texts_queued"] == 0


async def test_who_waits_does_not_wait_for_the_search_through_a_bulk_call() -> None:
    provider = Slow()
    batcher = make(provider)
    bulk = [start(batcher, f"b{n}", bulk=True) for n in range(64)]
    await settle()
    await provider.tell(0, Refused(400))
    searched = 0
    while not all(one.done() for one in bulk):
        one = start(batcher, "now")
        await settle()
        under_way = [n for n, told in enumerate(provider.told) if not told.done()]
        assert ["now"] in [provider.sent[n] for n in under_way]
        for number in under_way:
            texts = provider.sent[number]
            searched += texts != ["now"]
            await provider.tell(number, Refused(400) if "b9" in texts else None)
        check(await one, ["now"])
    answers = await asyncio.gather(*bulk, return_exceptions=True)
    assert [n for n, one in enumerate(answers) if isinstance(one, Refused)] == [9]
    assert searched == 12


async def test_bulk_of_another_lane_has_one_turn_in_five_as_well() -> None:
    provider = Slow()
    batcher = make(provider)
    one = Caps(items_max=1)
    wide = Lane("d1", (("dimensions", 8),))
    bulk = [start(batcher, f"b{n}", lane=wide, bulk=True, caps=one) for n in range(40)]
    waiting = [start(batcher, f"t{n}", caps=one) for n in range(40)]
    await settle()
    for number in range(80):
        await provider.tell(number)
    await asyncio.gather(*bulk, *waiting)
    kinds = "".join(texts[0][0] for texts in provider.sent)
    assert kinds.startswith("tttt" + "btttt" * 9 + "b")
    assert kinds.count("b") == kinds.count("t") == 40


async def test_a_parameter_that_is_true_is_not_one() -> None:
    provider = Provider()
    batcher = make(provider)
    lanes = [Lane("d1", (("normalize", value),)) for value in (True, 1, 1.0)]
    await asyncio.gather(*(embed(batcher, ["a"], lane=lane) for lane in lanes))
    assert [type(lane.params[0][1]) for lane, _ in provider.log] == [bool, int, float]


async def test_quiet_lanes_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "LINES_MAX", 10)
    batcher = make(Provider())
    for n in range(50):
        await embed(batcher, ["a"], lane=Lane(f"d{n}"))
    assert len(batcher._lines) <= 10
    assert len(batcher._ups) <= 10


async def test_closing_tells_who_still_waits_for_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner_module, "CLOSE_WAIT_S", 0.0)
    provider = Slow()
    batcher = make(provider)
    waiting = [start(batcher, f"t{n}", caps=Caps(items_max=1)) for n in range(9)]
    await settle()
    await batcher.close()
    answers = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(answer, TimeoutError) for answer in answers)
