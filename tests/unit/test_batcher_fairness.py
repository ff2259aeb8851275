from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.batcher import fairness
from actors.batcher.fairness import FairQueue
from actors.batcher.planner import Load
from actors.batcher.policy import Caps


@dataclass(eq=False)
class Text:
    tenant: str
    tokens: int
    number: int = 0
    arrived_s: float = 0.0
    dead: bool = False

    @property
    def size(self) -> int:
        return 3 * self.tokens


def load(items: int = 10**9, tokens: int = 10**9) -> Load:
    return Load(Caps(items_max=items, tokens_max=tokens, bytes_max=10**12))


texts = st.lists(
    st.builds(Text, st.sampled_from("abcd"), st.integers(1, 900)), min_size=1, max_size=60
)


@given(texts, st.integers(1, 12), st.integers(1, 2000))
@settings(deadline=None)
def test_everything_goes_out_once_within_caps_and_each_tenants_texts_in_their_order(
    given_texts: list[Text], items: int, tokens: int
) -> None:
    queue: FairQueue[Text] = FairQueue()
    for number, text in enumerate(given_texts):
        text.number = number
        queue.push(text)
    order: dict[str, list[int]] = defaultdict(list)
    while queue.items:
        taken = queue.take(load(items, tokens))
        assert 0 < len(taken) <= items
        assert len(taken) == 1 or sum(text.tokens for text in taken) <= tokens
        for text in taken:
            order[text.tenant].append(text.number)
    assert queue.tokens == queue.bytes == 0
    assert sorted(n for numbers in order.values() for n in numbers) == list(range(len(given_texts)))
    assert all(numbers == sorted(numbers) for numbers in order.values())


@given(st.integers(2, 6), st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=50)
def test_tenants_who_always_wait_get_the_same_tokens_up_to_a_turn(
    tenants: int, items: int, data: st.DataObject
) -> None:
    queue: FairQueue[Text] = FairQueue()
    tokens = {str(n): data.draw(st.integers(1, 300)) for n in range(tenants)}
    for tenant, each in tokens.items():
        for _ in range(20_000 // max(fairness.TOKENS_LEAST, each)):
            queue.push(Text(tenant, each))
    served: Counter[str] = Counter()
    while sum(served.values()) < 8_000:
        for text in queue.take(load(items)):
            served[text.tenant] += fairness.cost_of(text)
            gap = max(served.values()) - min(served[tenant] for tenant in tokens)
            assert gap <= 2 * (fairness.QUANTUM_TOKENS + 300)


def test_a_single_text_does_not_wait_behind_a_tenants_ten_thousand() -> None:
    queue: FairQueue[Text] = FairQueue()
    for number in range(10_000):
        queue.push(Text("bulk", 10, number))
    queue.take(load(items=96))
    queue.push(Text("small", 10))
    assert "small" in {text.tenant for text in queue.take(load(items=96))}


def test_what_does_not_fit_ends_the_call_and_goes_first_in_the_next() -> None:
    queue: FairQueue[Text] = FairQueue()
    for number, tokens in enumerate((6, 6, 1)):
        queue.push(Text("a", tokens, number))
    assert [text.number for text in queue.take(load(tokens=10))] == [0]
    assert [text.number for text in queue.take(load(tokens=10))] == [1, 2]


def test_a_text_over_every_cap_and_quantum_goes_alone() -> None:
    queue: FairQueue[Text] = FairQueue()
    queue.push(Text("a", 100_000, 0))
    queue.push(Text("a", 1, 1))
    assert [text.number for text in queue.take(load(tokens=10))] == [0]
    assert [text.number for text in queue.take(load(tokens=10))] == [1]


@given(texts, st.integers(1, 8))
@settings(deadline=None)
def test_what_is_put_back_goes_first_and_in_its_order(given_texts: list[Text], items: int) -> None:
    queue: FairQueue[Text] = FairQueue()
    for number, text in enumerate(given_texts):
        text.number = number
        queue.push(text)
    taken = queue.take(load(items))
    queue.put_back(taken)
    assert queue.items == len(given_texts)
    assert queue.tokens == sum(text.tokens for text in given_texts)
    again = []
    while queue.items:
        again += queue.take(load(items))
    by_tenant: dict[str, list[int]] = defaultdict(list)
    for text in again:
        by_tenant[text.tenant].append(text.number)
    assert all(numbers == sorted(numbers) for numbers in by_tenant.values())


@given(texts, st.sets(st.integers(0, 59)))
@settings(deadline=None)
def test_what_is_forgotten_never_goes_out(given_texts: list[Text], forgotten: set[int]) -> None:
    queue: FairQueue[Text] = FairQueue()
    for text in given_texts:
        queue.push(text)
    for number in forgotten:
        if number < len(given_texts):
            queue.forget(given_texts[number])
    alive = [text for text in given_texts if not text.dead]
    assert (queue.items, queue.tokens) == (len(alive), sum(text.tokens for text in alive))
    taken = queue.take(load())
    assert not any(text.dead for text in taken)
    assert len(taken) == len(alive)


def test_a_queue_does_not_keep_what_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fairness, "DEAD_MAX", 10)
    queue: FairQueue[Text] = FairQueue()
    for number in range(200):
        text = Text("ab"[number % 2], 1, number)
        queue.push(text)
        queue.forget(text)
    kept = sum(len(held) for held in queue._queues.values())
    assert kept <= 11
    last = Text("a", 1, 999, arrived_s=7.0)
    queue.push(last)
    assert queue.oldest_s() == 7.0
    assert queue.take(load()) == [last]


def test_the_oldest_is_the_one_that_came_first_of_all_tenants_and_is_still_wanted() -> None:
    queue: FairQueue[Text] = FairQueue()
    first, second = Text("a", 1, arrived_s=1.0), Text("b", 1, arrived_s=2.0)
    for text in (first, second, Text("a", 1, arrived_s=3.0)):
        queue.push(text)
    assert queue.oldest_s() == 1.0
    queue.forget(first)
    assert queue.oldest_s() == 2.0
