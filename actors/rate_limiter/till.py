"""What one desk holds of each tenant, decided without waiting: the desk's sync half.

Rule 1: nothing here awaits; messages are values that `message` gives out and `granted` takes in,
        one at a time: `granted` or `lost` comes before the next `message`.
Rule 2: a lease is used only until its life, counted from the send of the ask that won it, is over.
Rule 3: what is given up with a message is given up when the message leaves, delivered or not.
Rule 4: each message says all that is held, so a lost one needs no memory; the next puts it right.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from actors.rate_limiter.policy import (
    NOTHING,
    SLOT_S,
    Ask,
    Bucket,
    Figures,
    Grant,
    Limits,
    Refusal,
    Share,
    Ticket,
)

RENEW_S = 0.2
ASK_PAUSE_S = 0.02  # a need that others' returns must meet is not repeated sooner
IDLE_S = 1.0  # a tenant that nobody asks for is given back after this
DEMAND_FADE = 0.7  # weight of the past in the demand's moving average, per tick
SLOTS_AHEAD = 4  # slots asked for beyond the need, so that a busy desk asks seldom
SLACK = 0.02  # a part of a lease so small is not worth a return


@dataclass(slots=True)
class Held:
    """One tenant, as this desk holds it."""

    tenant: str
    limits: Limits
    owner: str = ""
    lease: str = ""
    bucket: Bucket | None = None
    until_s: float = 0.0
    hours: int = 0
    hours_minute: int = -1  # the owner's minute in which the oldest of them was booked
    hours_until_s: float = 0.0
    hours_batch: int = 0  # another one for each such minute and owner
    slots: int = 0  # held in all
    slots_used: int = 0
    slots_until_s: float = 0.0  # a free one is not taken later: a new owner may not know of it
    used_s: float = 0.0
    told_s: float = -1e9
    measured_s: float = -1e9
    arrivals: int = 0
    taken: int = 0  # since the figures were told
    demand_per_s: float = 0.0
    need: int = 0  # requests that wait for a permit
    need_again_s: float = 0.0  # a need that was refused is not repeated before
    slots_need: int = 0  # requests that wait for a slot
    slots_again_s: float = 0.0
    rate_over: float = 0.0  # what is to be returned
    capacity_over: float = 0.0
    slots_wanted: bool = False
    answered_s: float = 0.0
    figures: Figures | None = None
    refusal: Refusal | None = None
    slot_refusal: Refusal | None = None

    def live(self, now: float) -> bool:
        """Whether there is a lease, and its life is not over."""
        return self.bucket is not None and now < self.until_s

    def hours_left(self, now: float) -> int:
        return self.hours if now < self.hours_until_s else 0

    @property
    def waiting(self) -> bool:
        return self.need > 0 or self.slots_need > 0


@dataclass(frozen=True, slots=True)
class Message:
    """One tick's asks to one owner."""

    seq: int
    asks: list[Ask] = field(default_factory=list)


class Till:
    """This desk's holdings with one owner. Bounded by the tenants that were active of late."""

    def __init__(self) -> None:
        self._seq = 0
        self._batches = 0
        self.held: dict[str, Held] = {}

    def of(self, tenant: str, limits: Limits, now: float) -> Held:
        """The tenant's holdings. `limits` are in force from now on, unless newer ones are known."""
        held = self.held.get(tenant)
        if held is None:
            held = self.held[tenant] = Held(tenant, limits)
        elif held.limits is not limits and held.limits.version <= limits.version:
            held.limits = limits
        held.used_s = now
        return held

    def take(self, held: Held, now: float) -> Ticket | None:
        """A permit for one request, if the lease has one."""
        limits = held.limits
        hourly = limits.requests_per_hour is not None
        if hourly and held.hours_left(now) < 1:
            return None
        era = 0
        if limits.requests_per_minute is not None:
            bucket = held.bucket
            if bucket is None or now >= held.until_s or not bucket.take(now):
                return None
            era = bucket.era
        if hourly:
            held.hours -= 1
        held.taken += 1
        return Ticket(held.tenant, limits, True, held.lease, era, held.hours_batch)

    def put_back(self, held: Held, ticket: Ticket, now: float) -> None:
        """A permit that was not used after all, as far as it is still this lease's."""
        if held.limits.requests_per_hour is not None and held.hours_batch == ticket.hours_batch:
            held.hours += 1
        if held.bucket is not None and held.lease == ticket.lease and now < held.until_s:
            held.bucket.put_back(ticket.era, now)

    def take_slot(self, held: Held, now: float) -> bool:
        """A concurrency slot, if one is held and free. The lease's life is over for slots too."""
        if held.slots_used >= held.slots or now >= held.slots_until_s:
            return False
        held.slots_used += 1
        return True

    def put_slot(self, held: Held, now: float) -> None:
        """A slot is free again."""
        held.slots_used -= 1
        held.used_s = now

    def permit_in_s(self, held: Held, now: float) -> float | None:
        """Seconds until the lease has a permit by itself, None if it will not have one."""
        if held.limits.requests_per_hour is not None and held.hours_left(now) < 1:
            return None
        if held.bucket is None or not held.live(now):
            return None
        wait_s = held.bucket.wait_s(now)
        return wait_s if now + wait_s < held.until_s else None

    def message(self, now: float, *, everything: bool = False) -> Message | None:
        """What there is to say now: needs, renewals that are due, and what is given back."""
        # Renewals travel together: when one is due, those that are nearly due come along.
        renewing = any(now >= held.told_s + RENEW_S for held in self.held.values())
        soon_s = now - RENEW_S / 2
        due = [
            held
            for held in self.held.values()
            if everything or now >= self._due_s(held) or (renewing and held.told_s <= soon_s)
        ]
        asks = [self._ask(held, now, everything) for held in due]
        if not asks:
            return None
        self._seq += 1
        return Message(self._seq, asks)

    def next_due_s(self) -> float | None:
        """When `message` will next have something to say, None if never."""
        return min(map(self._due_s, self.held.values()), default=None)

    def granted(self, message: Message, grants: list[Grant], sent_s: float, now: float) -> None:
        """Take in the owner's answer."""
        for ask, grant in zip(message.asks, grants, strict=True):
            held = self.held[ask.tenant]
            held.answered_s = now
            held.taken = 0
            held.slots += grant.slots
            self._take_hours(held, grant, sent_s)
            if ask.over and self._forget(held, sent_s):
                continue
            held.figures, held.slots_wanted = grant.figures, grant.slots_wanted
            held.refusal, held.need_again_s = grant.refusal, _again_s(grant.refusal, now)
            held.slot_refusal = grant.slot_refusal
            held.slots_again_s = _again_s(grant.slot_refusal, now)
            if grant.limits is not None and grant.limits.version > held.limits.version:
                held.limits = grant.limits
            if grant.life_s > 0:
                held.slots_until_s = sent_s + grant.life_s
                self._take_lease(held, grant, sent_s, now)

    def lost(self, message: Message, sent_s: float) -> None:
        """The message or its answer got lost. What is held is used to its end."""
        for ask in message.asks:
            held = self.held.get(ask.tenant)
            if ask.over and held is not None:
                self._forget(held, sent_s)

    # ----------------------------------------------------------------------------------------

    def _due_s(self, held: Held) -> float:
        due_s = held.told_s + RENEW_S
        if held.need:
            due_s = min(due_s, held.need_again_s)
        if held.slots_need:
            due_s = min(due_s, held.slots_again_s)
        if held.slots_wanted and held.slots > held.slots_used:
            due_s = min(due_s, held.answered_s)
        return due_s

    def _ask(self, held: Held, now: float, ending: bool) -> Ask:
        idle = not (held.waiting or held.slots_used) and now - held.used_s >= IDLE_S
        over = ending or idle
        self._measure(held, now)
        if over or held.slots_wanted:
            held.slots = held.slots_used
        hours_back = held.hours if over or now >= held.hours_until_s else 0
        held.hours -= hours_back
        if held.bucket is not None and not held.live(now):
            held.bucket, held.lease = None, ""
        lease, share, level_back = held.lease, NOTHING, 0.0
        bucket = held.bucket
        if bucket is not None and over:
            bucket.refill(now)
            level_back = bucket.level
            held.bucket, held.lease = None, ""
        elif bucket is not None:
            bucket.refill(now)
            if held.rate_over or held.capacity_over:
                part = min(1.0, held.capacity_over / bucket.capacity) if bucket.capacity else 0.0
                level = bucket.level * part
                back = bucket.carve(held.rate_over, held.capacity_over, level, now)
                level_back = back.level
            share = Share(bucket.rate_per_s, bucket.capacity, bucket.level)
        held.rate_over = held.capacity_over = 0.0
        held.told_s = now
        return Ask(
            held.tenant,
            held.limits,
            held.owner,
            lease,
            share,
            level_back,
            need=held.need,
            demand_per_s=held.demand_per_s,
            hours_held=held.hours,
            hours_back=hours_back,
            hours_minute=held.hours_minute,
            slots_held=held.slots,
            slots_need=held.slots_need,
            slots_ahead=SLOTS_AHEAD if held.slots_need and held.slot_refusal is None else 0,
            over=over,
        )

    def _measure(self, held: Held, now: float) -> None:
        elapsed = now - held.measured_s
        if elapsed < RENEW_S / 2:
            return
        recent = held.arrivals / min(elapsed, 1.0)
        held.demand_per_s += (1.0 - DEMAND_FADE) * (recent - held.demand_per_s)
        held.arrivals = 0
        held.measured_s = now

    def _take_hours(self, held: Held, grant: Grant, sent_s: float) -> None:
        """All that are held count as booked when the oldest of them was."""
        if grant.owner != held.owner:
            held.hours = held.hours_batch = 0
        if grant.hours:
            if held.hours < 1:
                self._batches += 1
                held.hours_batch = self._batches
                held.hours_minute = grant.hours_minute
                held.hours_until_s = sent_s + SLOT_S
            held.hours += grant.hours
        held.owner = grant.owner

    def _take_lease(self, held: Held, grant: Grant, sent_s: float, now: float) -> None:
        if held.bucket is None or held.lease != grant.lease:
            held.bucket = Bucket(0.0, 0.0, 0.0, now)
        held.lease = grant.lease
        held.until_s = sent_s + grant.life_s
        bucket = held.bucket
        bucket.put(grant.share, now)
        rate = bucket.rate_per_s - grant.rate_target
        capacity = bucket.capacity - grant.capacity_target
        if rate > bucket.rate_per_s * SLACK or capacity > bucket.capacity * SLACK:
            held.rate_over, held.capacity_over = max(0.0, rate), max(0.0, capacity)

    def _forget(self, held: Held, sent_s: float) -> bool:
        """Whether nobody wanted anything of the tenant since the message left."""
        forgotten = not (held.waiting or held.slots or held.used_s > sent_s)
        if forgotten:
            del self.held[held.tenant]
        return forgotten


def _again_s(refusal: Refusal | None, now: float) -> float:
    """When a need that was refused is worth repeating."""
    if refusal is None:
        return now
    return now + (ASK_PAUSE_S if refusal.lent else min(refusal.retry_after_s, RENEW_S))
