"""One owner and three desks in a bad world: messages lost, doubled and late, deaths and restarts.

What must hold whatever happens: in no interval [a, b] more than burst + rate * (b - a) requests or
tokens are admitted, never more than `concurrent` slots are in use, in no 3600 s more than the
hourly count, and never more money is spent and reserved than there is. Two kinds of desk live in
it: the real till, and the plainest that keeps the owner's rules and asks for more than tills do.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from actors.rate_limiter.account import DAY_S, day_of, month_of
from actors.rate_limiter.held import Reservation
from actors.rate_limiter.owner import LEASE_S, RateLimiter
from actors.rate_limiter.policy import Bucket
from actors.rate_limiter.terms import (
    NOTHING,
    Amount,
    Answer,
    Ask,
    Layout,
    Limits,
    Need,
    Seed,
    Share,
    Ticket,
)
from actors.rate_limiter.till import Message, Till
from tests.support.bad_wire import Fate
from tests.support.fake_time import FakeTime

DESKS = 3
HOUR_S = 3600.0
NO_LAYOUT = Layout()
Packet = tuple[int, list[Ask], str]


@dataclass
class Entry:
    """What the ledger has of one request, once `commit` is set."""

    at_s: float
    nano: int = 0
    commit: int | None = None


@dataclass
class Call:
    """A request that was counted, and what it reserved."""

    at_s: float
    owner: str
    lease: str
    mark: int
    tokens: int = 0
    nano: int = 0
    slot: bool = False
    token_mark: int = 0
    bucket: Bucket | None = None
    bucket_mark: int = 0
    log: list[float] = field(default_factory=list)
    ticket: Ticket | None = None
    taken: Reservation | None = None


class Ledger:
    """Acknowledges late."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.commits = 0

    def commit(self, until: int | None = None) -> None:
        for entry in [each for each in self.entries if each.commit is None][:until]:
            self.commits += 1
            entry.commit = self.commits

    def mark(self) -> int:
        return len(self.entries)

    def commit_of(self, mark: int) -> int | None:
        return self.entries[mark - 1].commit if mark else 0

    def seed(self, now: float, wall_s: float) -> Seed:
        known = [entry for entry in self.entries if entry.commit is not None]
        nano = sum(entry.nano for entry in known)
        minutes = tuple((int((now - e.at_s) // 60), 1) for e in known if now - e.at_s < HOUR_S)
        return Seed(self.commits, day_of(wall_s), nano, month_of(wall_s), nano, minutes)


class Desk:
    """One tenant at one desk, by the owner's rules and nothing besides."""

    def __init__(self, name: str, limits: Limits, world: World) -> None:
        self.name, self.limits, self.world = name, limits, world
        self.seq, self.owner, self.seed_commit = 0, "", -1
        self.lease, self.until_s, self.hot = "", 0.0, False
        self.requests = self.tokens = Bucket(0.0, 0.0, 0.0, 0.0)
        self.token_mark, self.over = 0, (0.0, 0.0, 0.0, 0.0)
        self.slots = self.hours = self.hours_minute = self.nano_free = self.spent = 0
        self.refunds: list[tuple[int, int]] = []
        self.counted: list[Call] = []  # not yet going on
        self.running: list[Call] = []
        self.settled: list[tuple[str, Entry]] = []  # under which owner; commit not told yet
        self.unseeded = False
        self.late: deque[Packet] = deque()

    def live(self, now: float) -> bool:
        return bool(self.lease) and now < self.until_s

    def count(self, now: float) -> bool:
        if not self.live(now) or (self.limits.requests_per_hour and self.hours < 1):
            return False
        mark = 0
        if self.limits.requests_per_minute is not None:
            taken = self.requests.take(1, now)
            if taken is None:
                return False
            mark = taken
        self.hours -= 1 if self.limits.requests_per_hour else 0
        self.counted.append(Call(now, self.owner, self.lease, mark))
        return True

    def go_on(self, need: Need, now: float) -> bool:
        """The first counted request reserves what it needs."""
        limits = self.limits
        if not self.counted or not self.live(now):
            return False
        if limits.concurrent is not None and self.slots <= sum(c.slot for c in self.running):
            return False
        if limits.nano_most is not None and self.nano_free < need.nano:
            return False
        mark = 0
        if limits.tokens_per_minute is not None:
            taken = self.tokens.take(need.tokens, now)
            if taken is None:
                return False
            mark = taken
        call = self.counted.pop(0)
        call.slot = limits.concurrent is not None
        call.tokens, call.nano = need.tokens, need.nano if limits.nano_most is not None else 0
        self.nano_free -= call.nano
        call.owner, call.lease, call.token_mark = self.owner, self.lease, self.token_mark
        call.bucket, call.bucket_mark = self.tokens, mark
        call.log = [now, float(need.tokens)]
        self.world.token_log.append(call.log)
        self.running.append(call)
        return True

    def settle(self, call: Call, part: float, now: float) -> None:
        self.running.remove(call)
        used, nano = int(call.tokens * part), int(call.nano * part)
        call.log[1] = float(used)
        if call.tokens > used:
            if call.lease == self.lease and self.live(now) and call.bucket is self.tokens:
                back = self.tokens.put_back(call.bucket_mark, call.tokens - used, now)
                if not back and call.token_mark:
                    self.refunds.append((call.token_mark, call.tokens - used))
            elif call.token_mark and call.owner == self.owner:
                self.refunds.append((call.token_mark, call.tokens - used))
        entry = Entry(call.at_s, nano)
        self.world.ledger.entries.append(entry)
        self.settled.append((call.owner, entry))
        if call.owner == self.owner:
            self.nano_free += call.nano - nano if self.live(now) else 0
            self.spent += nano

    def give_up(self, call: Call, now: float) -> None:
        if call.lease == self.lease and self.live(now) and self.limits.requests_per_minute:
            self.requests.put_back(call.mark, 1.0, now)

    def carried(self) -> int:
        """Of earlier owners; what is settled, and known to be in the seed or not, is sorted out."""
        for owner, entry in list(self.settled):
            if entry.commit is None or owner == self.owner or self.seed_commit < 0:
                continue
            self.settled.remove((owner, entry))
            if entry.commit > self.seed_commit:
                self.spent += entry.nano
        nano = sum(call.nano for call in self.running if call.owner != self.owner)
        return nano + sum(entry.nano for owner, entry in self.settled if owner != self.owner)

    def hours_open(self) -> int:
        calls = sum(call.owner != self.owner for call in [*self.counted, *self.running])
        return calls + sum(owner != self.owner for owner, _ in self.settled)

    def message(self, need: int, needs: tuple[Need, ...], hot: bool, now: float) -> Packet:
        self.seq += 1
        carried = self.carried()
        if not self.live(now):
            self.nano_free = self.hours = 0
            self.lease, self.requests, self.tokens = "", _empty(now), _empty(now)
        elif not hot and not needs and not need:
            self.lease = "" if not self.hot else self.lease
        used = sum(call.slot for call in self.running)
        if self.world.chance.random() < 0.2:
            self.slots, self.nano_free = used, 0
        free, nano_free, net = self.slots - used, self.nano_free, []
        for each in needs:
            slots, nano = min(each.slots, free), min(each.nano, nano_free)
            free, nano_free = free - slots, nano_free - nano
            net.append(Need(each.slots - slots, each.tokens, each.nano - nano))
        shares, backs = [NOTHING, NOTHING], [0.0, 0.0]
        if self.lease:
            for n, bucket in enumerate((self.requests, self.tokens)):
                bucket.refill(now)
                rate, capacity = self.over[2 * n : 2 * n + 2]
                level = bucket.level * min(1.0, capacity / bucket.capacity) if capacity else 0.0
                backs[n] = bucket.carve(rate, capacity, level, now).level
                shares[n] = Share(bucket.rate_per_s, bucket.capacity, bucket.level)
        self.over = (0.0, 0.0, 0.0, 0.0)
        refunds, self.refunds = tuple(self.refunds), []
        ask = Ask(
            "acme",
            self.limits,
            self.lease,
            hot,
            shares[0],
            backs[0],
            need,
            float(need),
            shares[1],
            backs[1],
            float(sum(each.tokens for each in needs)),
            float(max((each.tokens for each in needs), default=0)),
            refunds,
            hours_held=self.hours,
            hours_open=self.hours_open(),
            slots_held=self.slots,
            nano_spent=self.spent,
            nano_held=self.nano_free
            + sum(call.nano for call in self.running if call.owner == self.owner),
            nano_carried=carried,
            needs=tuple(net),
            ahead=Need(2, 0, 50) if hot else Need(1, 10, 10),
            seed=self.world.ledger.seed(now, self.world.wall()) if self.unseeded else None,
        )
        self.hot = hot
        return self.seq, [ask], self.owner

    def lost(self) -> None:
        if not self.hot:
            self.lease = ""

    def granted(self, answer: Answer, sent_s: float, now: float) -> None:
        if answer.owner != self.owner:
            self.owner, self.spent, self.seed_commit = answer.owner, 0, -1
            self.nano_free = self.hours = 0
            self.lease, self.refunds, self.token_mark = "", [], 0
        (grant,) = answer.grants
        self.unseeded, self.seed_commit = grant.unseeded, grant.seed_commit
        self.slots += grant.slots
        self.nano_free += grant.nano
        self.hours += grant.hours
        if grant.life_s <= 0.0:
            return
        if self.lease != grant.lease:
            self.requests, self.tokens, self.token_mark = _empty(now), _empty(now), 0
        self.lease, self.until_s = grant.lease, sent_s + grant.life_s
        self.requests.put(grant.requests, now)
        self.tokens.put(grant.tokens, now)
        self.token_mark = grant.token_mark or self.token_mark
        self.over = (
            max(0.0, self.requests.rate_per_s - grant.rate_target),
            max(0.0, self.requests.capacity - grant.capacity_target),
            max(0.0, self.tokens.rate_per_s - grant.token_rate_target),
            max(0.0, self.tokens.capacity - grant.token_capacity_target),
        )


class TillDesk:
    """The real till, driven as its desk does."""

    def __init__(self, name: str, limits: Limits, world: World) -> None:
        self.name, self.limits, self.world = name, limits, world
        self.till = Till(world.ledger)
        self.counted: list[Call] = []
        self.running: list[Call] = []
        self.late: deque[Packet] = deque()
        self.sent: Message | None = None

    def count(self, now: float) -> bool:
        held = self.till.of("acme", self.limits, now)
        self.till.arrive(held, now)
        ticket = self.till.take(held, now)
        if ticket is None:
            return False
        self.counted.append(Call(now, "", "", 0, ticket=ticket))
        return True

    def go_on(self, need: Need, now: float) -> bool:
        if not self.counted:
            return False
        call = self.counted[0]
        assert call.ticket is not None
        held = self.till.of("acme", self.limits, now)
        call.taken = self.till.reserve(held, call.ticket, Amount(need.tokens, need.nano), now)
        if call.taken is None:
            return False
        self.running.append(self.counted.pop(0))
        call.slot = self.limits.concurrent is not None
        call.tokens, call.nano = need.tokens, need.nano if self.limits.nano_most else 0
        call.log = [now, float(need.tokens)]
        self.world.token_log.append(call.log)
        return True

    def settle(self, call: Call, part: float, now: float) -> None:
        self.running.remove(call)
        used = Amount(int(call.tokens * part), int(call.nano * part))
        call.log[1] = float(used.tokens)
        self.world.ledger.entries.append(Entry(call.at_s, used.nano))
        assert call.taken is not None
        self.till.settle(call.taken, used, now)

    def give_up(self, call: Call, now: float) -> None:
        assert call.ticket is not None
        self.till.put_back(call.ticket, now)

    def message(self, need: int, needs: tuple[Need, ...], hot: bool, now: float) -> Packet | None:
        for call in [call for call in self.counted if now - call.at_s > 5.0]:
            self.world.give_up_one(self, call)
        held = self.till.of("acme", self.limits, now)
        held.need, held.needs = need, deque(needs)
        if need or needs:
            self.till.wants(held)
        if self.till.unseeded:
            seed = self.world.ledger.seed(now, self.world.wall())
            self.till.seeded(self.till.owner, {"acme": seed}, now)
        self.sent = message = self.till.message(now)
        return None if message is None else (message.seq, message.asks, message.owner)

    def lost(self) -> None:
        if self.sent is not None:
            self.till.lost(self.sent, self.world.clock())
        self._done()

    def granted(self, answer: Answer, sent_s: float, now: float) -> None:
        assert self.sent is not None
        self.till.granted(self.sent, answer, sent_s, now)
        self._done()

    def _done(self) -> None:
        held = self.till.held.get("acme")
        if held is not None:
            held.need, held.needs = 0, deque()


def _empty(now: float) -> Bucket:
    return Bucket(0.0, 0.0, 0.0, now)


def overrun(log: list[tuple[float, float]], rate: float, burst: float) -> float:
    """By how much the log exceeds a bucket that nobody divided, replayed naively."""
    level, last, worst = burst, 0.0, -burst
    for at_s, amount in log:
        level = min(burst, level + (at_s - last) * rate) - amount
        last, worst = at_s, max(worst, -level)
    return worst


class World:
    """The owner, the desks, the ledger, and what really happened."""

    def __init__(
        self, limits: Limits, unit: int, chance: random.Random, *, real: bool = False
    ) -> None:
        self.real = real
        self.clock, self.wall, self.chance = FakeTime(), FakeTime(), chance
        self.wall.now = 20_000 * DAY_S
        self.limits, self.unit = limits, unit
        self.names = 0
        self.ledger = Ledger()
        self.owner = self.make(fresh=True)
        self.desks = [self.desk() for _ in range(DESKS)]
        self.log: list[float] = []
        self.token_log: list[list[float]] = []
        self.lost_nano = 0
        self.most = limits.token_burst

    def make(self, *, fresh: bool) -> RateLimiter:
        self.names += 1
        return RateLimiter(self.clock, self.wall, LEASE_S, fresh=fresh, nonce=f"o{self.names}")

    def desk(self) -> Desk | TillDesk:
        self.names += 1
        kind = TillDesk if self.real else Desk
        return kind(f"process-{self.names}#0", self.limits, self)

    def need(self) -> Need:
        tokens = self.unit * self.chance.choice([1, 1, 2])
        if self.chance.random() < 0.02:
            tokens = min(self.limits.tokens_most, int(self.limits.token_burst * 1.5))
        self.most = max(self.most, tokens)
        nano = self.chance.choice([5, 40])
        limits = self.limits
        return Need(
            1 if limits.concurrent is not None else 0,
            tokens if limits.tokens_per_minute is not None else 0,
            nano if limits.nano_most is not None else 0,
        )

    def want(self, n: int, many: int, hot: bool, fate: Fate, delay_s: float) -> None:
        """Requests arrive; the desk asks; what it was given is used at once."""
        desk = self.desks[n]
        needs = tuple(self.need() for _ in range(min(4, len(desk.counted) + many)))
        self.use(desk, many, needs)
        self.say(desk, many, needs[: len(desk.counted) + 1], hot, fate, delay_s)
        self.use(desk, many, needs)

    def use(self, desk: Desk | TillDesk, many: int, needs: tuple[Need, ...]) -> None:
        now = self.clock()
        for _ in range(many):
            if not desk.count(now):
                break
            self.log.append(now)
        for need in needs:
            if not desk.go_on(need, now):
                break

    def say(
        self,
        desk: Desk | TillDesk,
        need: int,
        needs: tuple[Need, ...],
        hot: bool,
        fate: Fate,
        delay_s: float,
    ) -> None:
        sent_s = self.clock()
        packet = desk.message(need, needs, hot, sent_s)
        if packet is None:
            return
        if fate is Fate.LATE:
            desk.late.append(packet)
        if fate in (Fate.LATE, Fate.LOST):
            desk.lost()
            return
        self.clock.now += delay_s / 2
        answer = self.deliver(desk, packet)
        if fate is Fate.DOUBLED:
            assert self.deliver(desk, packet) == answer
        self.clock.now += delay_s / 2
        if fate is Fate.UNHEARD:
            desk.lost()
        else:
            desk.granted(answer, sent_s, self.clock())

    def deliver(self, desk: Desk | TillDesk, packet: Packet) -> Answer:
        seq, asks, owner = packet
        return self.owner.lease(desk.name, seq, asks, NO_LAYOUT, owner)

    def settle(self, n: int) -> None:
        desk = self.desks[n]
        if desk.running:
            call = self.chance.choice(desk.running)
            desk.settle(call, self.chance.choice([0.0, 0.3, 1.0]), self.clock())

    def give_up(self, n: int) -> None:
        """A counted request does not take place after all."""
        desk = self.desks[n]
        if desk.counted:
            self.give_up_one(desk, desk.counted[-1])

    def give_up_one(self, desk: Desk | TillDesk, call: Call) -> None:
        desk.counted.remove(call)
        desk.give_up(call, self.clock())
        self.log.remove(call.at_s)

    def die(self, n: int, known: bool) -> None:
        """A process dies with its calls; its slots and money stay taken until that is known."""
        gone = self.desks[n]
        self.desks[n] = self.desk()
        for call in [*gone.counted, *gone.running]:
            self.ledger.entries.append(Entry(call.at_s))
        self.ledger.commit()
        if known:
            self.owner.holder_gone(gone.name.partition("#")[0])
            assert gone.name.partition("#")[0] not in self.owner.holders()

    def restart(self) -> None:
        """Every desk is heard of before the new owner has learnt enough."""
        self.owner = self.make(fresh=False)
        self.clock.now += 0.15
        for desk in self.desks:
            desk.late.clear()
            self.clock.now += 0.07
            self.say(desk, 0, (), False, Fate.ARRIVES, self.chance.choice([0.0, 0.02]))
            self.say(desk, 0, (), False, Fate.ARRIVES, 0.0)

    def check(self) -> None:
        limits = self.limits
        running = [call for desk in self.desks for call in desk.running]
        if limits.concurrent is not None:
            assert sum(call.slot for call in running) <= limits.concurrent
        if limits.day_nano is not None:
            spent = sum(entry.nano for entry in self.ledger.entries)
            assert spent + sum(call.nano for call in running) <= limits.day_nano

    def check_all(self) -> None:
        limits = self.limits
        if limits.requests_per_minute is not None and limits.requests_per_hour is None:
            requests = [(at_s, 1.0) for at_s in self.log]
            assert overrun(requests, limits.rate_per_s, limits.burst) < 1e-6
        if limits.tokens_per_minute is not None:
            tokens = [(at_s, amount) for at_s, amount in self.token_log]
            assert overrun(tokens, limits.token_rate_per_s, self.most) < 1e-4
        limit = limits.requests_per_hour
        if limit is not None:
            for first, last in zip(self.log, self.log[limit:], strict=False):
                assert last - first >= HOUR_S


FATES = [Fate.ARRIVES] * 6 + list(Fate)


class Limiter(RuleBasedStateMachine):
    @initialize(
        rpm=st.sampled_from([60.0, 600.0, 6000.0, None]),
        burst=st.sampled_from([1, 2, 3, 10, 40]),
        hourly=st.sampled_from([None, None, 5, 50]),
        concurrent=st.sampled_from([None, 1, 4, 12]),
        tpm=st.sampled_from([None, 6_000, 600_000]),
        day=st.sampled_from([None, 100, 2_000]),
        unit=st.sampled_from([10, 400]),
        real=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def begin(
        self,
        rpm: float | None,
        burst: int,
        hourly: int | None,
        concurrent: int | None,
        tpm: int | None,
        day: int | None,
        unit: int,
        real: bool,
        seed: int,
    ) -> None:
        if rpm is None and hourly is None:
            rpm = 600.0
        limits = Limits(rpm, burst, hourly, concurrent, tpm, day)
        self.world = World(limits, unit, random.Random(seed), real=real)

    @rule(
        n=st.integers(0, DESKS - 1),
        many=st.integers(1, 30),
        hot=st.booleans(),
        fate=st.sampled_from(FATES),
        delay_s=st.sampled_from([0.0, 0.0, 0.0, 0.001, 0.05, 0.3, 0.55, 1.2]),
    )
    def want(self, n: int, many: int, hot: bool, fate: Fate, delay_s: float) -> None:
        self.world.want(n, many, hot, fate, delay_s)

    @rule(n=st.integers(0, DESKS - 1))
    def settle(self, n: int) -> None:
        self.world.settle(n)

    @rule(n=st.integers(0, DESKS - 1))
    def give_up(self, n: int) -> None:
        self.world.give_up(n)

    @rule(many=st.integers(1, 3))
    def commit(self, many: int) -> None:
        self.world.ledger.commit(many)

    @rule(for_s=st.sampled_from([0.001, 0.02, 0.1, 0.2, 0.2, 0.25, 0.4, 0.49, 0.61, 1.1, 5.0]))
    def wait(self, for_s: float) -> None:
        self.world.clock.now += for_s

    @rule(n=st.integers(0, DESKS - 1))
    def deliver_late(self, n: int) -> None:
        desk = self.world.desks[n]
        if desk.late:
            self.world.deliver(desk, desk.late.popleft())

    @rule(n=st.integers(0, DESKS - 1), known=st.booleans())
    def die(self, n: int, known: bool) -> None:
        self.world.die(n, known)

    @rule()
    def restart(self) -> None:
        self.world.restart()

    @invariant()
    def nothing_is_exceeded(self) -> None:
        self.world.check()
        self.world.check_all()


TestLimiter = Limiter.TestCase
TestLimiter.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_nothing_is_exceeded_in_a_long_storm(seed: int, real: bool) -> None:
    """The same world, driven hard: every desk wants more than there is, at every step."""
    chance = random.Random(seed)
    limits = Limits(
        chance.choice([60.0, 600.0, 6000.0]),
        chance.choice([1, 3, 10, 40]),
        (None, None, 300)[seed % 3],
        (4, None)[seed % 2],
        (60_000, 6_000, None)[(seed // 2) % 3],
        (None, 3_000)[(seed // 3) % 2],
    )
    world = World(limits, chance.choice([10, 300]), chance, real=real)
    fates = [Fate.ARRIVES] * chance.choice([4, 40]) + list(Fate)
    delays = [0.0] * 10 + [0.01, 0.3, 0.55]
    for step in range(1_500):
        n = chance.randrange(DESKS)
        hot = chance.random() < 0.6
        world.want(n, chance.choice([1, 60]), hot, chance.choice(fates), chance.choice(delays))
        if chance.random() < 0.7:
            world.settle(n)
        if chance.random() < 0.2:
            world.give_up(n)
        if chance.random() < 0.2:
            world.ledger.commit(2)
        desk = world.desks[n]
        if chance.random() < 0.1 and desk.late:
            world.deliver(desk, desk.late.popleft())
        if chance.random() < 0.02:
            rare = chance.randrange(3)
            if rare == 0:
                world.die(n, True)
            elif rare == 1:
                world.restart()
            else:
                world.clock.now += 3600.0
        world.clock.now += chance.choice([0.0, 0.001, 0.02, 0.1, 0.3])
        world.check()
        if step % 300 == 0:
            world.check_all()
    world.check_all()


def serve(
    limits: Limits, demands: list[float], for_s: float, *, unit: int = 1, real: bool = True
) -> list[list[float]]:
    """What desks with these demands per s admit over a line that loses nothing."""
    chance = random.Random(1)
    world = World(limits, unit, chance, real=real)
    world.desks = [world.desk() for _ in demands]
    admitted: list[list[float]] = [[] for _ in demands]
    queued, due_s, again_s = [0.0] * len(demands), [0.0] * len(demands), [0.0] * len(demands)
    step_s = 0.005
    need = Need(0, unit if limits.tokens_per_minute is not None else 0, 0)
    for _ in range(int(for_s / step_s)):
        now = world.clock()
        for n in chance.sample(range(len(demands)), len(demands)):
            desk = world.desks[n]
            queued[n] = min(queued[n] + demands[n] * step_s, 100.0)
            _serve_one(world, desk, admitted[n], queued, n, need)
            if real or now >= due_s[n] or (queued[n] >= 1.0 and now >= again_s[n]):
                due_s[n], again_s[n] = now + 0.2, now + chance.uniform(0.01, 0.03)
                many = int(queued[n]) - len(desk.counted)
                needs = (need,) * min(int(queued[n]), 4) if limits.reserves else ()
                world.say(desk, max(0, many), needs, True, Fate.ARRIVES, 0.0)
                _serve_one(world, desk, admitted[n], queued, n, need)
            for call in list(desk.running):
                desk.settle(call, 1.0, now)
        world.clock.now += step_s
    world.check_all()
    return admitted


def _serve_one(
    world: World,
    desk: Desk | TillDesk,
    admitted: list[float],
    queued: list[float],
    n: int,
    need: Need,
) -> None:
    now = world.clock()
    while queued[n] >= 1.0:
        if not desk.counted:
            if not desk.count(now):
                return
            world.log.append(now)
        if world.limits.reserves:
            if not desk.go_on(need, now):
                return
        else:
            desk.counted.pop()
        queued[n] -= 1.0
        admitted.append(now)


@pytest.mark.parametrize("real", [True, False])
@pytest.mark.parametrize(
    ("rpm", "burst"), [(60, 1), (60, 10), (600, 1), (600, 10), (6000, 10), (6000, 40), (6000, 300)]
)
def test_one_hot_desk_gets_what_the_limits_allow(rpm: float, burst: int, real: bool) -> None:
    got = len(serve(Limits(rpm, burst), [rpm / 60 * 3], 60.0, real=real)[0])
    assert 0.95 * (rpm + burst) <= got <= rpm + burst


@pytest.mark.parametrize(("rpm", "burst"), [(600, 10), (6000, 40), (6000, 300)])
def test_hot_desks_share_what_the_limits_allow(rpm: float, burst: int) -> None:
    shares = [len(share) for share in serve(Limits(rpm, burst), [rpm / 60] * 3, 60.0)]
    assert 0.95 * (rpm + burst) <= sum(shares) <= rpm + burst
    assert min(shares) > 0.2 * sum(shares)


def test_a_desk_that_wants_little_is_not_starved_by_a_hot_one() -> None:
    hot, little = serve(Limits(600, 10), [50.0, 0.5], 60.0)
    assert len(hot) > 500
    assert len(little) > 20


@pytest.mark.parametrize("real", [True, False])
def test_desks_that_are_more_than_the_burst_are_lent_one_by_one(real: bool) -> None:
    shares = [len(share) for share in serve(Limits(600, 1), [20.0] * 3, 60.0, real=real)]
    assert sum(shares) > 0.6 * 600
    assert min(shares) > 0.1 * sum(shares)


@pytest.mark.parametrize("unit", [10, 400, 4000])
@pytest.mark.parametrize("real", [True, False])
def test_hot_desks_share_the_tokens_that_the_limits_allow(unit: int, real: bool) -> None:
    limits = Limits(60_000, 1_000, tokens_per_minute=60_000)
    demands = [800 / unit] * 3
    shares = [len(share) * unit for share in serve(limits, demands, 60.0, unit=unit, real=real)]
    assert 0.95 * 70_000 - unit <= sum(shares) <= 70_000
