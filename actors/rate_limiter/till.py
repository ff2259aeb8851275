"""What one desk holds of one owner's tenants, decided without waiting: the desk's sync half.

Rule 1: nothing here awaits; messages are values that `message` gives out and `granted` takes in,
        one at a time: `granted` or `lost` comes before the next `message`.
Rule 2: a lease is used only until its life, counted from the send of the ask that won it, is over;
        a cold one only until the next message leaves that does not name it.
Rule 3: what is given up with a message is given up when the message leaves, delivered or not.
Rule 4: each ask says all that is held, so a lost one needs no memory; the next puts it right.
Rule 5: no step looks at tenants that are not hot, do not wait and have nothing to tell.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from actors.rate_limiter.agenda import RENEW_S, SOON_S, Agenda
from actors.rate_limiter.asking import ask_of
from actors.rate_limiter.book import Commits, NoBook
from actors.rate_limiter.held import NEVER_S, Held, Reservation, Told
from actors.rate_limiter.policy import EPSILON, SLOT_S, Bucket
from actors.rate_limiter.terms import (
    NOTHING_USED,
    Amount,
    Answer,
    Ask,
    Figures,
    Grant,
    Limits,
    Need,
    Refusal,
    Seed,
    Share,
    Ticket,
)

ASK_PAUSE_S = 0.02  # a need that others' returns must meet is not repeated sooner
PAUSE_S = 0.005  # nor one that was met in part
ASIDE_S = 0.04  # a counted request goes on by then, or what is set aside for it is given back
RETURN_S = 0.01  # what was lent singly to a hot tenant goes back so soon
HOT_GAP_S = 0.5  # requests that follow each other so closely, HOT_STREAK times, make a tenant hot
HOT_STREAK = 3
IDLE_S = 1.0  # a hot tenant that nobody asks for is given back after this, a cold one forgotten
SEED_PAUSE_S = 0.1
LOOSE_MAX = 1_000
TOLD_MAX = 10_000
FADE_MAX = 500  # looked at in one step
SLACK = 0.02  # a part of a lease so small is not worth a return
SLOT_FADE = 0.9


@dataclass(frozen=True, slots=True)
class Message:
    """One tick's asks to one owner; `owner` is the life of it that they speak of."""

    seq: int
    asks: list[Ask] = field(default_factory=list)
    owner: str = ""
    helds: list[Held] = field(default_factory=list)


class Till:
    """This desk's holdings with one owner.

    Bounded by the tenants that were active within IDLE_S or have requests under way; what was
    spent of each tenant is remembered for as long as the owner lives. Failure behaviour: what is
    held is used to its end; another owner is told at once of all that is in use.
    """

    def __init__(self, book: Commits | None = None, batches: Iterator[int] | None = None) -> None:
        self.held: dict[str, Held] = {}
        self.unseeded: dict[str, None] = {}  # tenants of which the owner wants the ledger's word
        self.silent: set[str] = set()
        self.owner = ""
        self._book: Commits = book or NoBook()
        self._seq = 0
        self._batches = batches or count(1)
        self._spent: dict[str, int] = {}
        self._last_told: OrderedDict[str, Told] = OrderedDict()  # of tenants that are forgotten
        self._agenda = Agenda(self.held)
        self._cold: dict[Held, None] = {}  # have a lease that ends with the next message
        self._unsure: dict[Held, None] = {}  # settled money whose commit is not known
        self._confirming: list[Held] = []
        self._fading: deque[tuple[float, Held]] = deque()

    # ---- requests --------------------------------------------------------------------------

    def of(self, tenant: str, limits: Limits, now: float) -> Held:
        """The tenant's holdings. `limits` are in force from now on, unless newer ones are known."""
        held = self.held.get(tenant)
        if held is None:
            held = self.held[tenant] = Held(tenant, limits, self.owner)
            held.purse.spent = self._spent.get(tenant, 0)
            held.told = self._last_told.pop(tenant, None)
            self._fade(held, now)
        elif held.limits is not limits and held.limits.version <= limits.version:
            held.limits = limits
        return held

    def arrive(self, held: Held, now: float, many: int = 1) -> None:
        """A request has come."""
        held.streak = held.streak + 1 if now - held.used_s < HOT_GAP_S else 0
        held.used_s = now
        held.demand.since += many
        if not held.hot and (held.streak >= HOT_STREAK or held.need + len(held.needs) > 1):
            held.hot = True
            held.measured_s = max(held.measured_s, now - RENEW_S)
            self._agenda.hot[held] = None

    def take(self, held: Held, now: float) -> Ticket | None:
        """A permit for one request, if there is one."""
        limits = held.limits
        live = now < held.until_s
        hourly = limits.requests_per_hour is not None
        if hourly and not (live and held.hours >= 1 and held.lease and now < held.hours_until_s):
            return None
        mark = 0
        if limits.requests_per_minute is not None:
            bucket = held.requests
            if bucket is None or not live:
                return None
            taken = bucket.take(1.0, now)
            if taken is None:
                return None
            mark = taken
        if hourly:
            held.hours -= 1
            held.loose.append(now)
            if len(held.loose) > LOOSE_MAX:
                del held.loose[0]
        if held.told is not None:
            held.told.taken += 1
        if limits.reserves:
            held.going_on += 1
        if held.places.at_s:
            held.places.used()
        return Ticket(held.tenant, limits, True, held.lease, mark, held.hours_batch)

    def put_back(self, ticket: Ticket, now: float) -> None:
        """A permit that was not used after all, as far as it is still this lease's."""
        held = self.held.get(ticket.tenant)
        if held is None:
            return
        if held.going_on:
            held.going_on -= 1
        if ticket.hours_batch and held.hours_batch == ticket.hours_batch:
            held.hours += 1
            if held.loose:
                held.loose.pop()
            if not held.hot:
                self._agenda.tell(held, now)
        if held.requests is not None and held.lease == ticket.lease and now < held.until_s:
            held.requests.put_back(ticket.mark, 1.0, now)
            if held.told is not None:
                held.told.taken -= 1

    def reserve(self, held: Held, ticket: Ticket, amount: Amount, now: float) -> Reservation | None:
        """All that one request needs, or nothing."""
        limits, free = held.limits, now < held.free_until_s
        slots = 0 if limits.concurrent is None else 1
        if slots and (held.slots_used >= held.slots or not free):
            return None
        nano = 0 if limits.nano_most is None else amount.nano
        purse = held.purse
        if nano and (purse.free < nano or not free):
            return None
        tokens = 0 if limits.tokens_per_minute is None else amount.tokens
        taken = Reservation(held, ticket, amount, now, slots, tokens, nano, purse.era)
        if tokens:
            bucket = held.tokens
            if bucket is None or now >= held.until_s:
                return None
            mark = bucket.take(float(tokens), now)
            if mark is None:
                return None
            taken.token_mark, taken.lease, taken.owner = mark, held.lease, held.owner
            if bucket.rate_per_s <= 0.0:
                taken.owner_mark = held.token_mark
            if held.told is not None:
                held.told.tokens_taken += tokens
            held.token_demand.since += tokens
            held.token_unit = max(held.token_unit, float(tokens))
            if held.need_places.at_s:
                held.need_places.used()
        held.slots_used += slots
        if nano:
            purse.take(nano)
            held.nano_demand.since += nano
        if ticket.hours_batch:
            taken.hours = 1
            held.hours_running += 1
            if held.loose:
                held.loose.pop()
        held.running += 1
        if held.going_on:
            held.going_on -= 1
        return taken

    def settle(self, taken: Reservation, used: Amount, now: float) -> bool:
        """What was not used is free again; what was used above it is charged. Idempotent.

        Whether the owner is to be told of it before the next tick.
        """
        if taken.settled:
            return False
        taken.settled = True
        held = taken.held
        held.running -= 1
        held.hours_running -= taken.hours
        if taken.slots:
            held.slots_used -= 1
            used_s = now - taken.at_s
            held.slot_s += (1.0 - SLOT_FADE if held.slot_s else 1.0) * (used_s - held.slot_s)
        if taken.tokens or (used.tokens and held.limits.tokens_per_minute is not None):
            self._settle_tokens(held, taken, used.tokens, now)
        nano = used.nano
        if nano and not taken.nano and held.limits.nano_most is None:
            nano = 0
        if taken.nano or nano or taken.hours:
            mark = self._book.mark()
            held.purse.settle(taken.era, taken.nano, nano, mark, taken.hours)
            self._unsure[held] = None
        if held.hot and not held.wanted and not held.refunds:
            return False
        self._agenda.tell(held, now, at_once=held.wanted or bool(held.needs))
        self._fade(held, now)
        return True

    def cancel(self, taken: Reservation, now: float) -> None:
        """The request did not take place: everything is as before it."""
        self.settle(taken, NOTHING_USED, now)
        if taken.ticket.counted:
            self.put_back(taken.ticket, now)

    def wants(self, held: Held, not_before_s: float = NEVER_S) -> None:
        """Somebody waits: the next message asks for it, at once or then."""
        self._agenda.want_at(held, not_before_s)

    def permit_in_s(self, held: Held, now: float) -> float | None:
        """Seconds until the lease has a permit by itself, None if it will not have one."""
        if held.limits.requests_per_hour is not None and held.hours_left(now) < 1:
            return None
        return _ready_in_s(held, held.requests, 1.0, now)

    def need_in_s(self, held: Held, need: Need, now: float) -> float | None:
        """Seconds until the lease has these tokens by itself, None if it will not."""
        if not need.tokens:
            return None
        return _ready_in_s(held, held.tokens, float(need.tokens), now)

    def figures(self, tenant: str, now: float) -> dict[str, Figures]:
        """What is left of "requests" and "tokens", as far as they are limited and known."""
        held = self.held.get(tenant)
        told = self._last_told.get(tenant) if held is None else held.told
        return {} if told is None else told.figures(now)

    # ---- messages --------------------------------------------------------------------------

    def message(self, now: float, *, everything: bool = False) -> Message | None:
        """What there is to say now: needs, renewals that are due, and what is given back."""
        tick = self._agenda.ticks(now)
        if tick or everything:
            self._look_up_commits()
        self._forget_faded(now)
        if everything:
            told = dict.fromkeys(self.held.values())
        elif self._agenda.silent(tick, now):
            return None
        else:
            told = self._agenda.take()
        self._end_cold(told, now)
        if everything and not told:
            return None
        asks = [self._ask(held, now, everything) for held in told]
        self._agenda.spoken(now, soon=bool(self._cold))
        self._seq += 1
        return Message(self._seq, asks, self.owner, list(told))

    def next_due_s(self) -> float | None:
        """When `message` will next have something to say, None if never."""
        return self._agenda.next_s()

    def granted(self, message: Message, answer: Answer, sent_s: float, now: float) -> None:
        """Take in the owner's answer."""
        if answer.owner != self.owner:
            self._new_owner(answer.owner, now)
        elif message.owner == answer.owner:
            for held in self._confirming:
                held.purse.confirm()
                if not held.purse.settled:
                    self._unsure.pop(held, None)
        self._confirming = []
        self.silent.update(answer.silent)
        for held, ask, grant in zip(message.helds, message.asks, answer.grants, strict=False):
            held.asked = False
            if self.held.get(held.tenant) is held:
                self._granted(held, ask, grant, sent_s, now)

    def lost(self, message: Message, sent_s: float) -> None:
        """The message or its answer got lost. What is held is used to its end."""
        self._confirming = []
        for held, ask in zip(message.helds, message.asks, strict=True):
            held.asked = False
            held.refunds += [refund for refund in ask.refunds if refund[1] < 0]
            if self.held.get(held.tenant) is held:
                self._fade(held, sent_s)
                if held.outstanding and not held.hot:
                    self._agenda.tell(held, sent_s + RENEW_S)
                if held.waiting:
                    self._agenda.want_at(held, sent_s)

    def seeded(self, owner: str, seeds: dict[str, Seed], now: float) -> None:
        """The ledger's word, read since that owner asked for it."""
        if owner != self.owner:
            return
        for tenant, seed in seeds.items():
            held = self.held.get(tenant)
            if held is not None and held.unseeded:
                held.seed = seed
                held.again_s = held.need_again_s = now
                self._agenda.want(held)

    def leave(self, tenant: str, now: float) -> Held | None:
        """The tenant has another home: all that is in use goes there, to be told anew."""
        held = self.held.pop(tenant, None)
        self._spent.pop(tenant, None)
        self.unseeded.pop(tenant, None)
        if held is None:
            return None
        self._agenda.forget(held)
        self._cold.pop(held, None)
        self._unsure.pop(held, None)
        held.orphan("", now)
        held.hot, held.fading, held.streak = False, False, 0
        return held

    def join(self, held: Held, now: float) -> None:
        """Take over what another till had of a tenant."""
        assert held.tenant not in self.held
        self.held[held.tenant] = held
        held.owner, held.moved = self.owner, False
        if not held.purse.empty:
            self._unsure[held] = None
        self._fade(held, now)
        if held.outstanding or held.hours_open:
            self._agenda.tell(held, now, at_once=True)
        if held.waiting:
            self._agenda.want(held)

    # ----------------------------------------------------------------------------------------

    def _settle_tokens(self, held: Held, taken: Reservation, used: int, now: float) -> None:
        unused = taken.tokens - used
        lives = held.tokens is not None and held.lease == taken.lease != "" and now < held.until_s
        if taken.owner_mark and unused > 0:
            if taken.owner == held.owner:
                held.refunds.append((taken.owner_mark, unused))
        elif lives and held.tokens is not None and not taken.owner_mark:
            if unused > 0:
                held.tokens.put_back(taken.token_mark, float(unused), now)
            elif unused < 0:
                held.tokens.charge(float(-unused), now)
        elif unused < 0:
            held.refunds.append((taken.owner_mark, unused))

    def _fade(self, held: Held, now: float) -> None:
        if not held.fading:
            held.fading = True
            self._fading.append((now + IDLE_S, held))

    def _ask(self, held: Held, now: float, ending: bool) -> Ask:
        held.asked = True
        ask = ask_of(held, now, ending=ending, aside_s=ASIDE_S, idle_s=IDLE_S)
        if ask.over:
            held.going_on = 0
            self._cold.pop(held, None)
            self._fade(held, now)
            if held.hot:
                held.hot, held.streak = False, 0
                del self._agenda.hot[held]
        return ask

    def _look_up_commits(self) -> None:
        for held in list(self._unsure):
            if held.purse.look(self._book.commit_of):
                if held.seed_commit >= 0 and held.purse.learn(held.seed_commit):
                    self._agenda.tell_along(held)
                self._confirming.append(held)
            if not held.purse.settled:
                del self._unsure[held]

    def _forget_faded(self, now: float) -> None:
        fading = self._fading
        for _ in range(min(FADE_MAX, len(fading))):
            if fading[0][0] > now:
                return
            _, held = fading.popleft()
            held.fading = False
            if held.hot or self.held.get(held.tenant) is not held:
                continue
            if held.running:
                continue  # settling it makes it fade again
            if now - held.used_s < IDLE_S or held.outstanding:
                self._fade(held, now)
                if held.slots or held.hours or held.purse.free or held.purse.carried:
                    self._agenda.tell_along(held)
                continue
            if held.purse.spent:
                self._spent[held.tenant] = held.purse.spent
            if held.told is not None:
                self._last_told[held.tenant] = held.told
                if len(self._last_told) > TOLD_MAX:
                    self._last_told.popitem(last=False)
            self._cold.pop(held, None)
            self.unseeded.pop(held.tenant, None)
            del self.held[held.tenant]

    def _end_cold(self, told: dict[Held, None], now: float) -> None:
        """Cold leases end now, unless something is set aside for a request that is about to go on.

        What is left of them is told with this message.
        """
        for held in list(self._cold):
            if held in told:
                continue
            if self.held.get(held.tenant) is not held:
                del self._cold[held]
                continue
            if held.live(now) and held.left():
                told[held] = None
                continue
            held.drop_lease(now)
            if held.slots_free or held.purse.free or held.hours:
                told[held] = None
            else:
                del self._cold[held]

    def _new_owner(self, name: str, now: float) -> None:
        """It is told at once of all that is in use, so that it does not lend that again."""
        met = self.owner != ""
        self.owner = name
        self._spent.clear()
        self._cold.clear()
        self.unseeded.clear()
        for held in self.held.values():
            held.orphan(name, now)
            if held.running or held.refunds or held.hours_open or not held.purse.empty:
                self._agenda.tell(held, now, at_once=True)
            if held.waiting and met:
                self._agenda.want(held)

    def _granted(self, held: Held, ask: Ask, grant: Grant, sent_s: float, now: float) -> None:
        held.answered_s = now
        held.moved = grant.moved
        if grant.moved:
            # The layout changes; this one's owner has let go of the tenant, ours comes to know.
            held.orphan(held.owner, now)
            if held.waiting:
                held.again_s = held.need_again_s = now + SOON_S
                self._agenda.want_at(held, now + SOON_S)
            return
        held.slots += grant.slots
        held.purse.free += grant.nano
        self._take_hours(held, grant, sent_s)
        held.wanted = grant.wanted
        self._take_refusals(held, ask, grant, now)
        self._take_seed(held, ask, grant)
        if grant.limits is not None and grant.limits.version > held.limits.version:
            held.limits = grant.limits
        if held.told is None:
            held.told = Told(held.limits)
        held.told.hear(grant, held.limits, now)
        if grant.life_s > 0:
            held.free_until_s = sent_s + grant.life_s
            if not ask.over:
                self._take_lease(held, ask, grant, sent_s, now)
        if held.need:
            self._agenda.want_at(held, max(held.again_s, now + PAUSE_S))
        if held.needs:
            self._agenda.want_at(held, max(held.need_again_s, now + PAUSE_S))
        if held.wanted and (held.slots_free or held.purse.free):
            self._agenda.tell(held, now, at_once=True)

    def _take_refusals(self, held: Held, ask: Ask, grant: Grant, now: float) -> None:
        refusal, need_refusal = grant.refusal, grant.need_refusal
        if need_refusal is not None and need_refusal.kind == "concurrent_requests":
            wait_s = held.slot_s / max(1, held.limits.concurrent or 1)
            need_refusal = need_refusal._replace(retry_after_s=max(0.05, wait_s))
        held.refusal, held.need_refusal = refusal, need_refusal
        if need_refusal is not None and grant.admitted < len(ask.needs):
            held.refused_need = ask.needs[grant.admitted]
        held.again_s = now + _pause_s(refusal)
        held.need_again_s = now + _pause_s(need_refusal)

    def _take_seed(self, held: Held, ask: Ask, grant: Grant) -> None:
        if grant.seed_commit >= 0 and grant.seed_commit != held.seed_commit:
            held.seed_commit = grant.seed_commit
            if not held.purse.empty:
                self._unsure[held] = None
        held.unseeded = grant.unseeded
        if not grant.unseeded:
            held.seed = None
            self.unseeded.pop(held.tenant, None)
        elif held.seed is None or ask.seed is not None:
            held.seed = None  # one that came too early
            held.again_s += SEED_PAUSE_S
            held.need_again_s += SEED_PAUSE_S
            if held.waiting or held.hot or held.purse.carried:
                self.unseeded[held.tenant] = None

    def _take_hours(self, held: Held, grant: Grant, sent_s: float) -> None:
        """All that are held count as booked when the oldest of them was."""
        if not grant.hours:
            return
        if held.hours < 1:
            held.hours = 0
            held.hours_batch = next(self._batches)
            held.hours_minute = grant.hours_minute
            held.hours_until_s = sent_s + SLOT_S
        held.hours += grant.hours

    def _take_lease(self, held: Held, ask: Ask, grant: Grant, sent_s: float, now: float) -> None:
        if held.lease != grant.lease:
            held.requests = held.tokens = None
            held.going_on = 0
        held.lease = grant.lease
        held.until_s = sent_s + grant.life_s
        if ask.need or ask.needs:
            held.granted_s = now
        held.cold = not ask.hot
        if held.cold:
            self._cold[held] = None
            self._agenda.speak_by(now + SOON_S)  # so that it ends
        else:
            self._cold.pop(held, None)
        if held.limits.requests_per_minute is not None:
            if held.requests is None:
                held.requests = Bucket(0.0, 0.0, 0.0, now)
            held.requests.put(grant.requests, now)
            if ask.hot and grant.requests.capacity > 0.0 and grant.rate_target <= 0.0:
                # Lent to be used at once: whoever comes next needs the capacity at home.
                self._agenda.tell_along(held)
                self._agenda.speak_by(now + RETURN_S)
            self._note_over(
                held, "requests", held.requests, grant.rate_target, grant.capacity_target
            )
        if held.limits.tokens_per_minute is not None:
            if held.tokens is None:
                held.tokens = Bucket(0.0, 0.0, 0.0, now)
            if grant.tokens != Share() and held.tokens.level < 1.0:
                held.token_mark = grant.token_mark
            held.tokens.put(grant.tokens, now)
            held.tokens_told = held.tokens.level
            self._note_over(
                held, "tokens", held.tokens, grant.token_rate_target, grant.token_capacity_target
            )

    def _note_over(
        self, held: Held, name: str, bucket: Bucket, rate_target: float, capacity_target: float
    ) -> None:
        """What is above the targets is to be returned with the next ask."""
        held.over.pop(name, None)
        if held.cold:
            return
        rate = bucket.rate_per_s - rate_target
        capacity = bucket.capacity - capacity_target
        if rate > bucket.rate_per_s * SLACK + EPSILON or capacity > bucket.capacity * SLACK:
            held.over[name] = (max(0.0, rate), max(0.0, capacity))


def _ready_in_s(held: Held, bucket: Bucket | None, amount: float, now: float) -> float | None:
    if bucket is None or not held.live(now):
        return None
    wait_s = bucket.wait_s(amount, now)
    return wait_s if now + wait_s < held.until_s else None


def _pause_s(refusal: Refusal | None) -> float:
    """After how long a need is worth repeating."""
    if refusal is None:
        return 0.0
    if refusal.lent:
        return ASK_PAUSE_S
    # Who was refused elsewhere may come here in his turn, so only what helps nobody is not asked.
    return min(refusal.soonest_s or refusal.retry_after_s, RENEW_S)
