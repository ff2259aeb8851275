"""One owner and three tills in a bad world: messages that are lost, doubled and late, and deaths.

What must hold whatever happens: in no interval [a, b] more than burst + rate * (b - a) requests are
admitted, never more than `concurrent` slots are in use, and in no 3600 s more than the hourly
count. And where nothing goes wrong, what the limits allow is really had.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors.rate_limiter.owner import LEASE_S, MARGIN_S, RateLimiter
from actors.rate_limiter.policy import Ask, Limits, Ticket
from actors.rate_limiter.till import Till
from tests.support.bad_wire import Fate
from tests.support.fake_time import FakeTime

TILLS = 3
HOUR_S = 3600.0


@dataclass
class Process:
    """A till, its line's late messages, and what goes on in it."""

    name: str
    till: Till = field(default_factory=Till)
    late: deque[tuple[int, list[Ask]]] = field(default_factory=deque)
    tickets: list[tuple[int, Ticket]] = field(default_factory=list)
    running: int = 0


def overrun(log: list[float], rate: float, burst: float) -> float:
    """By how much the log exceeds a bucket that nobody divided, replayed naively."""
    level, last, worst = burst, 0.0, -burst
    for at_s in log:
        level = min(burst, level + (at_s - last) * rate) - 1.0
        last, worst = at_s, max(worst, -level)
    return worst


class Limiter(RuleBasedStateMachine):
    @initialize(
        rpm=st.sampled_from([60.0, 600.0, 6000.0, None]),
        burst=st.sampled_from([1, 2, 3, 10, 40]),
        hourly=st.sampled_from([None, 5, 50]),
        concurrent=st.sampled_from([1, 4, 12]),
    )
    def begin(self, rpm: float | None, burst: int, hourly: int | None, concurrent: int) -> None:
        self.clock = FakeTime()
        self.names = count()
        self.limits = Limits(rpm, burst, hourly, concurrent)
        self.owner = RateLimiter(self.clock, LEASE_S, fresh=True, nonce="0")
        self.born_s = self.clock()
        self.hours_from = "0"
        self.processes = [self.process() for _ in range(TILLS)]
        self.log: dict[int, float] = {}
        self.hour_log: dict[int, float] = {}
        self.untold: set[str] = set()
        self.excused = False  # slots were in use that a new owner could not be told of in time

    def process(self) -> Process:
        return Process(f"process-{next(self.names)}")

    @rule(
        n=st.integers(0, TILLS - 1),
        many=st.integers(1, 30),
        slots=st.integers(0, 3),
        fate=st.sampled_from([Fate.ARRIVES] * 6 + list(Fate)),
        delay_s=st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.05, 0.3, 0.55, 1.2]),
    )
    def want(self, n: int, many: int, slots: int, fate: Fate, delay_s: float) -> None:
        """Requests arrive; the till asks; what it was given is used at once."""
        process = self.processes[n]
        held = process.till.of("acme", self.limits, self.clock())
        held.arrivals += many
        held.need, held.slots_need = many, slots
        self.admit(process, many)
        self.tick(n, fate, delay_s)
        self.admit(process, many)
        held.need = held.slots_need = 0
        for _ in range(slots):
            if process.till.take_slot(held, self.clock()):
                process.running += 1

    @rule(
        n=st.integers(0, TILLS - 1),
        fate=st.sampled_from([Fate.ARRIVES] * 6 + list(Fate)),
        delay_s=st.sampled_from([0.0, 0.0, 0.01, 0.55]),
    )
    def tick(self, n: int, fate: Fate, delay_s: float) -> None:
        """A message leaves, if there is anything to say, and takes its time either way."""
        process, sent_s = self.processes[n], self.clock()
        message = process.till.message(sent_s)
        if message is None:
            return
        if fate is Fate.LATE:
            process.late.append((message.seq, message.asks))
        if fate in (Fate.LATE, Fate.LOST):
            process.till.lost(message, sent_s)
            return
        self.clock.now += delay_s / 2
        grants = self.owner.lease(process.name, message.seq, message.asks)
        if fate is Fate.DOUBLED:
            assert self.owner.lease(process.name, message.seq, message.asks) == grants
        self.untold.discard(process.name)
        self.clock.now += delay_s / 2
        if fate is Fate.UNHEARD:
            process.till.lost(message, sent_s)
        else:
            process.till.granted(message, grants, sent_s, self.clock())

    @rule(n=st.integers(0, TILLS - 1), many=st.integers(1, 20))
    def use(self, n: int, many: int) -> None:
        self.admit(self.processes[n], many)

    @rule(n=st.integers(0, TILLS - 1), which=st.integers(0, 100))
    def uncount(self, n: int, which: int) -> None:
        process = self.processes[n]
        if process.tickets:
            number, ticket = process.tickets.pop(which % len(process.tickets))
            del self.log[number]
            self.hour_log.pop(number, None)
            held = process.till.held.get("acme")
            if held is not None:
                process.till.put_back(held, ticket, self.clock())

    @rule(n=st.integers(0, TILLS - 1))
    def settle(self, n: int) -> None:
        process = self.processes[n]
        if process.running:
            process.running -= 1
            process.till.put_slot(process.till.held["acme"], self.clock())

    @rule(for_s=st.sampled_from([0.001, 0.02, 0.1, 0.2, 0.2, 0.25, 0.4, 0.49, 0.61, 1.1]))
    def wait(self, for_s: float) -> None:
        self.clock.now += for_s

    @rule(for_s=st.sampled_from([5.0, 30.0, 61.0, 3540.0]))
    def wait_long(self, for_s: float) -> None:
        if self.limits.requests_per_hour is not None:
            self.clock.now += for_s

    @rule()
    def all_are_hot(self) -> None:
        """Everybody uses all there is, and asks for more."""
        for n in range(TILLS):
            self.want(n, 60, 0, Fate.ARRIVES, 0.0)

    @rule(n=st.integers(0, TILLS - 1))
    def deliver_late(self, n: int) -> None:
        process = self.processes[n]
        if process.late:
            self.owner.lease(process.name, *process.late.popleft())

    @precondition(lambda self: not self.untold)
    @rule(n=st.integers(0, TILLS - 1), known=st.booleans())
    def die(self, n: int, known: bool) -> None:
        """A process dies with its calls; its slots stay taken until that is known."""
        gone = self.processes[n]
        self.processes[n] = self.process()
        if known:
            self.owner.holder_gone(gone.name)
            assert gone.name not in self.owner.holders()

    @rule()
    def restart(self) -> None:
        self.owner = RateLimiter(self.clock, LEASE_S, nonce=f"{next(self.names)}")
        self.born_s = self.clock()
        self.untold = {process.name for process in self.processes if process.running}
        self.hour_log = {}
        self.hours_from = self.owner._name
        for process in self.processes:
            process.late.clear()

    @invariant()
    def no_interval_has_more_than_burst_and_rate(self) -> None:
        rpm = self.limits.requests_per_minute
        if rpm is not None:
            assert overrun(list(self.log.values()), rpm / 60.0, self.limits.burst) < 1e-6

    @invariant()
    def no_hour_has_more_than_the_hourly_count(self) -> None:
        limit = self.limits.requests_per_hour
        if limit is not None:
            used = list(self.hour_log.values())
            for first, last in zip(used, used[limit:], strict=False):
                assert last - first >= HOUR_S

    @invariant()
    def no_more_slots_are_in_use_than_there_are(self) -> None:
        running = sum(process.running for process in self.processes)
        if self.untold and self.clock() >= self.born_s + LEASE_S + MARGIN_S:
            self.excused = True
        if running == 0:
            self.excused = False
        assert self.excused or running <= (self.limits.concurrent or 0)

    def admit(self, process: Process, many: int) -> None:
        if not self.limits.counts:
            return
        now = self.clock()
        held = process.till.held.get("acme")
        if held is None:
            return
        for _ in range(many):
            ticket = process.till.take(held, now)
            if ticket is None:
                break
            number = next(self.names)
            self.log[number] = now
            if held.owner == self.hours_from:  # what the one before lent, it alone knew
                self.hour_log[number] = now
            process.tickets.append((number, ticket))


TestLimiter = Limiter.TestCase
TestLimiter.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_exceeded_in_a_long_storm(seed: int) -> None:
    """The same world, driven hard: every till wants more than there is, at every step."""
    chance = random.Random(seed)
    world = Limiter()
    hourly = (None, 300)[seed % 2]
    world.begin(chance.choice([600.0, 6000.0]), chance.choice([1, 3, 10, 40]), hourly, 4)
    fates = [Fate.ARRIVES] * chance.choice([4, 40]) + list(Fate)
    delays = [0.0] * 10 + [0.01, 0.3, 0.55]
    for step in range(1_500):
        n = chance.randrange(TILLS)
        world.want(n, chance.choice([1, 60]), chance.randrange(3), chance.choice(fates), 0.0)
        world.tick(chance.randrange(TILLS), chance.choice(fates), chance.choice(delays))
        if chance.random() < 0.5:
            world.settle(n)
        if chance.random() < 0.3:
            world.uncount(n, chance.randrange(100))
        if chance.random() < 0.1:
            world.deliver_late(n)
        if chance.random() < 0.02 and not world.untold:
            rare = chance.randrange(3)
            if rare == 0:
                world.die(n, True)
            elif rare == 1:
                world.restart()
            else:
                world.wait_long(3600.0)
        for each in range(TILLS):
            world.use(each, 60)
        world.wait(chance.choice([0.0, 0.001, 0.02, 0.1, 0.3]))
        world.no_more_slots_are_in_use_than_there_are()
        if step % 100 == 0:
            world.no_hour_has_more_than_the_hourly_count()
            world.no_interval_has_more_than_burst_and_rate()


def serve(
    limits: Limits, demands: list[float], for_s: float, concurrent_s: float = 0.0
) -> list[list[float]]:
    """What tills with these demands per s admit over a line that loses nothing and takes 2 ms."""
    clock = FakeTime()
    owner = RateLimiter(clock, fresh=True)
    tills = [Till() for _ in demands]
    helds = [till.of("acme", limits, clock()) for till in tills]
    admitted: list[list[float]] = [[] for _ in demands]
    queued, due = [0.0] * len(demands), [0] * len(demands)
    step_s = 0.005
    for _ in range(int(for_s / step_s)):
        for n, till in enumerate(tills):
            queued[n] = min(queued[n] + demands[n] * step_s, 100.0)
            held = helds[n] = till.of("acme", limits, clock())
            held.arrivals += int(queued[n]) - due[n]
            while queued[n] >= 1.0 and till.take(held, clock()):
                queued[n] -= 1.0
                admitted[n].append(clock())
            held.need = due[n] = int(queued[n])
            message = till.message(clock())
            if message is not None:
                grants = owner.lease(str(n), message.seq, message.asks)
                till.granted(message, grants, clock() - 0.002, clock())
        clock.now += step_s
    return admitted


@pytest.mark.parametrize(
    ("rpm", "burst"), [(60, 1), (60, 10), (600, 1), (600, 10), (6000, 10), (6000, 40), (6000, 300)]
)
def test_one_hot_till_gets_what_the_limits_allow(rpm: float, burst: int) -> None:
    got = len(serve(Limits(rpm, burst), [rpm / 60 * 3], 60.0)[0])
    assert 0.95 * (rpm + burst) <= got <= rpm + burst


@pytest.mark.parametrize(("rpm", "burst"), [(600, 10), (6000, 40), (6000, 300)])
def test_hot_tills_share_what_the_limits_allow(rpm: float, burst: int) -> None:
    shares = [len(share) for share in serve(Limits(rpm, burst), [rpm / 60] * 3, 60.0)]
    assert 0.95 * (rpm + burst) <= sum(shares) <= rpm + burst
    assert min(shares) > 0.2 * sum(shares)


def test_a_till_that_wants_little_is_not_starved_by_a_hot_one() -> None:
    hot, little = serve(Limits(600, 10), [50.0, 0.5], 60.0)
    assert len(hot) > 500
    assert len(little) > 20


def test_desks_take_turns_where_there_are_fewer_tokens_than_desks() -> None:
    shares = [len(share) for share in serve(Limits(600, 1), [20.0] * 3, 60.0)]
    assert sum(shares) > 0.5 * 600
    assert min(shares) > 0.15 * sum(shares)


def test_hourly_counts_are_used_up_and_not_exceeded() -> None:
    limits = Limits(None, requests_per_hour=200)
    assert sum(len(share) for share in serve(limits, [20.0, 5.0, 1.0], 30.0)) == 200
