from __future__ import annotations

import heapq
import random
from collections import Counter
from dataclasses import dataclass

import pytest

from actors.batcher.lane import INTERACTIVE_IN_A_ROW, Go, LaneState, Upstream, sooner
from actors.batcher.linger import Linger, Rate
from actors.batcher.policy import BULK_LINGER_S, LINGER_S, Caps, Room


@dataclass(eq=False)
class Text:
    arrived_s: float = 0.0
    tenant: str = "t"
    tokens: int = 10
    size: int = 30
    dead: bool = False
    client: int = 0
    number: int = 0


def waiting(count: int = 1, *, bulk: bool = False, caps: Caps | None = None) -> LaneState[Text]:
    lane: LaneState[Text] = LaneState(caps or Caps())
    for _ in range(count):
        lane.add(Text(), bulk)
    return lane


def asked(lane: LaneState[Text], upstream: Upstream, now_s: float) -> Go[Text] | float | None:
    """As the Batcher asks its lanes, of which this is the only one."""
    wake_s: float | None = None
    for bulk in upstream.turns:
        told = lane.next_of(bulk, upstream, now_s)
        if isinstance(told, Go):
            return told
        wake_s = sooner(wake_s, told)
    return wake_s


def go(lane: LaneState[Text], upstream: Upstream, now_s: float = 0.0) -> Go[Text]:
    told = asked(lane, upstream, now_s)
    assert isinstance(told, Go)
    return told


def test_with_nothing_under_way_texts_leave_at_once() -> None:
    assert len(go(waiting(3), Upstream()).units) == 3


def test_an_empty_lane_waits_for_nothing() -> None:
    assert asked(waiting(0), Upstream(), 0.0) is None
    assert waiting(0).is_idle


def test_beside_another_call_a_text_waits_for_company_that_is_to_be_expected() -> None:
    lane, upstream = waiting(0), Upstream()
    lane.began(False, upstream)
    for moment in range(200):  # 1000 a second
        lane.came(1, moment / 1000)
    lane.add(Text(arrived_s=0.2), False)
    due_s = asked(lane, upstream, 0.2)
    assert isinstance(due_s, float)
    assert 0.2 < due_s <= 0.2 + LINGER_S
    assert isinstance(asked(lane, upstream, due_s), Go)


def test_beside_another_call_a_text_that_expects_no_company_leaves_at_once() -> None:
    lane, upstream = waiting(1), Upstream()
    lane.began(False, upstream)
    lane.came(1, 0.0)
    assert isinstance(asked(lane, upstream, 0.0), Go)


@pytest.mark.parametrize("caps", [Caps(items_max=3), Caps(tokens_max=30), Caps(bytes_max=90)])
def test_a_full_call_does_not_linger(caps: Caps) -> None:
    lane, upstream = waiting(2, caps=caps), Upstream()
    lane.began(False, upstream)
    lane.came(1000, 0.0)
    assert isinstance(asked(lane, upstream, 0.0), float)
    lane.add(Text(), False)
    assert len(go(lane, upstream).units) == 3


def test_many_texts_share_out_among_free_places_and_bulk_fills_its_calls() -> None:
    lane, upstream = waiting(1000), Upstream()
    sizes = []
    while isinstance(told := asked(lane, upstream, 0.0), Go):
        sizes.append(len(told.units))
        lane.began(told.bulk, upstream)
    assert sizes == [256, 256, 256, 232]
    assert len(go(waiting(1000, bulk=True), Upstream()).units) == 1000


def test_a_linger_of_nothing_is_none() -> None:
    lane, upstream = waiting(2, caps=Caps(linger_s=0.0)), Upstream()
    lane.began(False, upstream)
    lane.came(1000, 0.0)
    assert isinstance(asked(lane, upstream, 0.0), Go)


def test_retries_wait_for_those_that_failed_with_them_even_where_nothing_is_under_way() -> None:
    lane: LaneState[Text] = LaneState(Caps(), idle_linger_s=0.02)
    lane.add(Text(arrived_s=1.0), False)
    assert asked(lane, Upstream(), 1.0) == 1.02
    assert isinstance(asked(lane, Upstream(), 1.02), Go)


def test_no_more_calls_at_once_than_the_upstream_takes() -> None:
    lane, upstream = waiting(9, caps=Caps(items_max=1)), Upstream()
    for _ in range(upstream.concurrency.limit):
        lane.began(go(lane, upstream).bulk, upstream)
    assert asked(lane, upstream, 0.0) is None
    lane.ended(False, upstream)
    assert isinstance(asked(lane, upstream, 0.0), Go)


def test_without_a_permit_everything_waits_and_the_call_grows() -> None:
    lane, upstream = waiting(1), Upstream()
    upstream.shut(5.0, ValueError("busy"))
    assert asked(lane, upstream, 0.0) == 5.0
    lane.add(Text(), False)
    assert len(go(lane, upstream, 5.0).units) == 2


@pytest.mark.parametrize(
    ("room", "until_s"),
    [
        (Room(requests=0, resets_s=0.4), 0.4),
        (Room(tokens=0, resets_s=60.0), 1.0),  # a header is no refusal: it is asked again soon
        (Room(requests=1, tokens=100, resets_s=60.0), None),
    ],
)
def test_what_the_provider_says_is_left_is_heeded(room: Room, until_s: float | None) -> None:
    lane, upstream = waiting(1), Upstream()
    upstream.told(room, 0.0)
    told = asked(lane, upstream, 0.0)
    assert isinstance(told, Go) if until_s is None else told == until_s


def test_parts_of_a_refused_call_go_before_all_else_of_their_kind() -> None:
    for bulk in (False, True):
        lane, upstream = waiting(2, bulk=bulk), Upstream()
        part: Go[Text] = Go([Text(number=7)], bulk, "tree")
        lane.hurry(part)
        assert go(lane, upstream) is part
        assert not lane.is_idle


def test_the_search_through_a_bulk_call_has_bulks_places_and_bulks_turns_only() -> None:
    lane, upstream = waiting(0), Upstream()
    for _ in range(200):
        lane.hurry(Go([Text(client=7)], True, "tree"))
    for _ in range(100):
        lane.add(Text(client=1), False)
        turn = go(lane, upstream)
        assert turn.bulk is False
        lane.began(False, upstream)
        while isinstance(told := asked(lane, upstream, 0.0), Go):
            assert told.bulk
            lane.began(True, upstream)
        assert upstream.bulk == upstream.concurrency.limit - 1
        lane.ended(False, upstream)
        lane.ended(True, upstream)


def test_the_search_through_a_bulk_call_has_its_turn_however_many_wait() -> None:
    lane, upstream = waiting(100, caps=Caps(items_max=1)), Upstream()
    lane.hurry(Go([Text()], True, "tree"))
    turns = [go(lane, upstream).bulk for _ in range(INTERACTIVE_IN_A_ROW + 1)]
    assert turns == [False] * INTERACTIVE_IN_A_ROW + [True]


@pytest.mark.parametrize(
    ("linger_s", "bulk", "most_s"),
    [
        (None, False, LINGER_S),
        (None, True, BULK_LINGER_S),
        (0.01, False, 0.01),
        (0.01, True, 0.01),
        (0.5, True, 0.5),
    ],
)
def test_a_bound_that_is_given_holds_for_bulk_too(
    linger_s: float | None, bulk: bool, most_s: float
) -> None:
    lane, upstream = waiting(0, caps=Caps(linger_s=linger_s)), Upstream()
    lane.began(bulk, upstream)
    lane.linger.took(100.0)
    lane.came(20, 0.0)  # far fewer a second than a call takes
    lane.add(Text(arrived_s=0.0), bulk)
    due_s = asked(lane, upstream, 0.0)
    if 20 * most_s < 1:
        assert isinstance(due_s, Go)
    else:
        assert due_s == pytest.approx(most_s)


def test_bulk_leaves_a_place_free_and_shares_no_call_with_who_waits() -> None:
    lane, upstream = waiting(50, bulk=True, caps=Caps(items_max=1)), Upstream()
    while isinstance(told := asked(lane, upstream, 0.0), Go):
        assert told.bulk
        lane.began(True, upstream)
    assert upstream.in_flight == upstream.concurrency.limit - 1
    lane.add(Text(client=1), False)
    first = go(lane, upstream)
    assert [text.client for text in first.units] == [1]
    assert not first.bulk


def test_bulk_has_its_turn_however_many_wait_before_it() -> None:
    lane, upstream = waiting(100, caps=Caps(items_max=1)), Upstream()
    lane.add(Text(client=1), True)
    turns = [go(lane, upstream).bulk for _ in range(INTERACTIVE_IN_A_ROW + 1)]
    assert turns == [False] * INTERACTIVE_IN_A_ROW + [True]


def test_bulk_is_sent_where_there_is_only_one_place() -> None:
    lane, upstream = waiting(1, bulk=True), Upstream()
    for moment in range(20):
        upstream.concurrency.pushed_back(moment, moment)
    assert upstream.concurrency.limit == 1
    assert go(lane, upstream).bulk


def test_bulk_by_itself_finds_the_places_that_a_provider_has() -> None:
    lane, upstream = waiting(2_000, bulk=True, caps=Caps(items_max=1)), Upstream()
    for moment in range(100):
        calls = 0
        while isinstance(asked(lane, upstream, float(moment)), Go):
            lane.began(True, upstream)
            calls += 1
        for _ in range(calls):
            full = upstream.is_full_of(bulk=True)
            upstream.concurrency.answered(1, float(moment), moment + 0.05, full=full)
            lane.ended(True, upstream)
    assert upstream.concurrency.limit > 8


def test_a_rate_fades_and_counts_what_came_of_late() -> None:
    rate = Rate()
    assert rate.per_s(0.0) == 0.0
    for moment in range(5000):
        rate.add(1, moment / 500)
    assert rate.per_s(10.0) == pytest.approx(500, rel=0.01)
    assert rate.per_s(20.0) < 1


def test_a_linger_is_a_quarter_of_a_call_at_most_and_as_long_as_a_call_takes_to_fill() -> None:
    linger = Linger()
    linger.came(10_000, 0.0)
    linger.took(0.04)
    assert linger.wait_s(room=10**6, most_s=1.0, now_s=0.0) == pytest.approx(0.01)
    assert linger.wait_s(room=50, most_s=1.0, now_s=0.0) == pytest.approx(0.005)
    assert linger.wait_s(room=10**6, most_s=0.002, now_s=0.0) == 0.002


# -------------------------------------------------------------------------------- simulation


class Simulation:
    """Clients that ask for one text after the other, on a clock of its own.

    The upstream takes 50 ms and 0.25 ms per text, `places` calls at once, the others queue there.
    """

    def __init__(self, seed: int, *, places: int = 4, linger_s: float = 0.025) -> None:
        self.dice = random.Random(seed)
        self.places = places
        self.now_s = 0.0
        self.events: list[tuple[float, int, str, object]] = []
        self.made = 0
        self.lane: LaneState[Text] = LaneState(Caps(linger_s=linger_s))
        self.upstream = Upstream()
        self.free_s = [0.0] * places
        self.calls: list[int] = []
        self.asked: dict[int, float] = {}
        self.took_s: list[float] = []
        self.answered: Counter[int] = Counter()

    def at(self, when_s: float, what: str, of: object = None) -> None:
        self.made += 1
        heapq.heappush(self.events, (when_s, self.made, what, of))

    def run(self, clients: int, texts: int, think_s: float = 0.0) -> None:
        left = texts
        for client in range(clients):
            self.at(self.dice.uniform(0, 0.01), "ask", client)
        while self.events:
            self.now_s, _, what, of = heapq.heappop(self.events)
            if what == "ask" and left:
                left -= 1
                text = Text(self.now_s, client=of, number=texts - left)  # type: ignore[arg-type]
                self.lane.add(text, False)
                self.lane.came(1, self.now_s)
            elif what == "answer":
                units: list[Text]
                began_s: float
                units, began_s = of  # type: ignore[misc]
                took_s = self.now_s - began_s
                full = self.upstream.is_full_of(bulk=False)
                self.lane.ended(False, self.upstream)
                self.lane.linger.took(took_s)
                self.upstream.concurrency.answered(len(units), began_s, self.now_s, full=full)
                for text in units:
                    self.answered[text.number] += 1
                    self.took_s.append(self.now_s - text.arrived_s)
                    pause_s = self.dice.expovariate(1 / think_s) if think_s else 0.0
                    self.at(self.now_s + pause_s + self.dice.uniform(0, 0.002), "ask", text.client)
            self.send()

    def send(self) -> None:
        told = asked(self.lane, self.upstream, self.now_s)
        while isinstance(told, Go):
            self.lane.began(False, self.upstream)
            self.calls.append(len(told.units))
            place = self.free_s.index(min(self.free_s))
            begins_s = max(self.now_s, self.free_s[place])
            self.free_s[place] = begins_s + 0.05 + 0.00025 * len(told.units)
            self.at(self.free_s[place], "answer", (told.units, self.now_s))
            told = asked(self.lane, self.upstream, self.now_s)
        if told is not None:
            self.at(told, "wake")


@pytest.mark.parametrize("seed", range(5))
def test_ten_thousand_texts_of_two_hundred_clients_are_at_most_five_hundred_calls(
    seed: int,
) -> None:
    run = Simulation(seed)
    run.run(clients=200, texts=10_000)
    assert len(run.calls) <= 500
    assert run.answered == Counter(range(1, 10_001))
    assert sum(run.calls) == 10_000
    assert sorted(run.took_s)[5_000] < 0.15


@pytest.mark.parametrize("seed", range(3))
def test_a_lone_client_waits_for_nobody(seed: int) -> None:
    run = Simulation(seed)
    run.run(clients=1, texts=100, think_s=0.2)
    assert run.calls == [1] * 100
    assert max(run.took_s) < 0.0503


@pytest.mark.parametrize("seed", range(3))
def test_few_clients_wait_no_longer_than_the_bound_and_what_is_under_way(seed: int) -> None:
    run = Simulation(seed, places=64)
    run.run(clients=4, texts=400, think_s=0.2)
    assert max(run.took_s) <= 0.0503 + 0.025 + 0.001
    assert sorted(run.took_s)[200] < 0.055


def test_more_places_upstream_are_found_and_used() -> None:
    run = Simulation(1, places=32)
    run.run(clients=2_000, texts=60_000)
    assert run.answered == Counter(range(1, 60_001))
    assert run.upstream.concurrency.limit > 5
