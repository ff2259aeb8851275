"""What one desk holds of each tenant, decided without waiting: the desk's sync half.

Rule 1: nothing here awaits; messages are values that `message` gives out and `granted` takes in.
Rule 2: a lease is used only until its life, counted from the send of the ask that won it, is over.
Rule 3: what is given up with a message is given up when the message leaves, delivered or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.rate_limiter.policy import (
    NOTHING,
    Ask,
    Bucket,
    Figures,
    Grant,
    Limits,
    Refusal,
    Share,
)

RENEW_S = 0.2
IDLE_S = 1.0  # a tenant that nobody asks for is given back after this
DEMAND_FADE = 0.7  # weight of the past in the demand's moving average, per tick
SLOTS_AHEAD = 4  # slots asked for beyond the need, so that a busy desk asks seldom


@dataclass(slots=True)
class Held:
    """One tenant, as this desk holds it."""

    limits: Limits
    lease: str
    owner: str = ""
    bucket: Bucket | None = None
    until_s: float = 0.0
    hours: int = 0
    slots: int = 0  # held in all
    slots_used: int = 0
    used_s: float = 0.0
    told_s: float = -1e9
    arrivals: int = 0
    demand_per_s: float = 0.0
    need: int = 0  # requests that wait for a permit
    slots_need: int = 0  # requests that wait for a slot
    give: Share = NOTHING
    give_slots: bool = False
    ask_again_s: float = 0.0  # a refused need is not repeated before
    refused_s: float = 0.0
    figures: Figures | None = None
    refusal: Refusal | None = None
    slot_refusal: Refusal | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """One tick's asks to one owner."""

    seq: int
    asks: list[Ask] = field(default_factory=list)


class Till:
    """This desk's holdings with one owner. Bounded by the tenants that were active of late."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._seq = 0
        self._leases = 0
        self.held: dict[str, Held] = {}

    def of(self, tenant: str, limits: Limits, now: float) -> Held:
        """The tenant's holdings, with `limits` in force from now on."""
        held = self.held.get(tenant)
        if held is None:
            held = self.held[tenant] = Held(limits, self._new_lease())
        elif held.limits is not limits and held.limits != limits:
            held.limits = limits
        held.used_s = now
        return held

    def take(self, held: Held, now: float) -> bool:
        """A permit for one request, if the lease has one."""
        limits = held.limits
        if limits.requests_per_hour is not None and held.hours < 1:
            return False
        if limits.requests_per_minute is not None:
            bucket = held.bucket
            if bucket is None or now >= held.until_s or not bucket.take(now):
                return False
        if limits.requests_per_hour is not None:
            held.hours -= 1
        return True

    def put_back(self, held: Held, now: float) -> None:
        """A permit that was not used after all."""
        if held.limits.requests_per_hour is not None:
            held.hours += 1
        if held.bucket is not None and now < held.until_s:
            held.bucket.refill(now)
            held.bucket.level = min(held.bucket.capacity, held.bucket.level + 1.0)

    def take_slot(self, held: Held) -> bool:
        """A concurrency slot, if one is held and free."""
        if held.slots_used >= held.slots:
            return False
        held.slots_used += 1
        return True

    def put_slot(self, held: Held) -> None:
        """A slot is free again."""
        held.slots_used -= 1

    def message(self, now: float, *, everything: bool = False) -> Message | None:
        """What there is to say now: needs, renewals that are due, and what is given back."""
        asks = []
        for tenant, held in list(self.held.items()):
            if not (everything or self._due(held, now)):
                continue
            asks.append(self._ask(tenant, held, now, everything))
        if not asks:
            return None
        self._seq += 1
        return Message(self._seq, asks)

    def next_due_s(self, now: float) -> float | None:
        """When `message` will next have something to say, None if never."""
        if not self.held:
            return None
        return min(held.told_s for held in self.held.values()) + RENEW_S

    def granted(self, message: Message, grants: list[Grant], sent_s: float, now: float) -> None:
        """Take in the owner's answer."""
        for ask, grant in zip(message.asks, grants, strict=True):
            held = self.held.get(grant.tenant)
            if held is None:
                continue
            if ask.over:
                if held.lease == ask.lease:
                    self._forget(grant.tenant, held)
                continue
            held.slots += grant.slots
            held.hours += grant.hours
            held.figures = grant.figures
            held.refusal, held.slot_refusal = grant.refusal, grant.slot_refusal
            held.refused_s = now
            held.give_slots = grant.slots_wanted
            if held.lease == grant.lease and grant.life_s > 0:
                self._take_in(held, grant, sent_s, now)

    def lost(self, message: Message) -> None:
        """The message or its answer got lost. What is held is used to its end under its old name;
        the next ask begins anew, since the owner may have lent what never arrived."""
        for ask in message.asks:
            held = self.held.get(ask.tenant)
            if held is None:
                continue
            if ask.over and held.lease == ask.lease:
                self._forget(ask.tenant, held)
            elif held.lease == ask.lease:
                held.lease = self._new_lease()

    # ----------------------------------------------------------------------------------------

    def _due(self, held: Held, now: float) -> bool:
        if held.need or held.slots_need or (held.give_slots and held.slots > held.slots_used):
            return True
        return now - held.told_s >= RENEW_S

    def _ask(self, tenant: str, held: Held, now: float, ending: bool) -> Ask:
        busy = held.need or held.slots_need or held.slots_used
        over = ending or (not busy and now - held.used_s >= IDLE_S)
        self._measure(held, now)
        if (over or held.give_slots) and held.slots > held.slots_used:
            held.slots = held.slots_used
        hours_back = held.hours if over else 0
        held.hours -= hours_back
        level, back = 0.0, NOTHING
        bucket = held.bucket
        if bucket is not None and now >= held.until_s:
            held.bucket = bucket = None
        if bucket is not None:
            if held.give != NOTHING and not over:
                back = bucket.carve(held.give.rate_per_s, held.give.capacity, held.give.level, now)
            bucket.refill(now)
            level = bucket.level
        held.give = NOTHING
        if over:
            held.bucket = None
        held.told_s = now
        ahead = SLOTS_AHEAD if held.slots_need and not held.slot_refusal else 0
        return Ask(
            tenant,
            held.limits,
            held.lease,
            need=held.need,
            demand_per_s=held.demand_per_s,
            level=level,
            back=back,
            hours_held=held.hours,
            hours_back=hours_back,
            slots_held=held.slots,
            slots_need=held.slots_need + ahead if held.slots_need else 0,
            over=over and held.slots == 0,
        )

    def _measure(self, held: Held, now: float) -> None:
        elapsed = now - held.told_s
        if elapsed < RENEW_S / 2:
            return
        recent = held.arrivals / min(elapsed, 1.0)
        held.demand_per_s += (1.0 - DEMAND_FADE) * (recent - held.demand_per_s)
        held.arrivals = 0

    def _take_in(self, held: Held, grant: Grant, sent_s: float, now: float) -> None:
        if held.bucket is None or held.owner != grant.owner or now >= held.until_s:
            held.bucket = Bucket(0.0, 0.0, 0.0, now)
        held.owner = grant.owner
        held.bucket.put(grant.share, now)
        held.until_s = sent_s + grant.life_s
        rate = held.bucket.rate_per_s - grant.rate_target
        capacity = held.bucket.capacity - grant.capacity_target
        slack = 0.02  # not worth a message
        if rate > held.bucket.rate_per_s * slack or capacity > held.bucket.capacity * slack:
            part = max(0.0, capacity) / held.bucket.capacity if held.bucket.capacity else 0.0
            level = held.bucket.level * part
            held.give = Share(max(0.0, rate), max(0.0, capacity), level)

    def _forget(self, tenant: str, held: Held) -> None:
        if held.need or held.slots_need or held.slots:
            held.lease = self._new_lease()
            held.bucket = None
        else:
            del self.held[tenant]

    def _new_lease(self) -> str:
        self._leases += 1
        return f"{self._name}:{self._leases}"
