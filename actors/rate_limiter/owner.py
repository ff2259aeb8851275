"""The limiter's owner: it alone knows what each tenant has left, and lends it to desks."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from actors.rate_limiter.policy import (
    EPSILON,
    NOTHING,
    Ask,
    Bucket,
    Figures,
    Grant,
    Limits,
    Refusal,
    RollingHour,
    Share,
)
from actors.ref import Clock

TENANTS_MAX = 100_000
HOLDERS_MAX = 10_000
LEASE_S = 0.5
MARGIN_S = 0.1  # a lease is taken back so much later than its desk stops using it
RESERVE = 0.05  # of a large burst, kept for whoever comes next
SPARE_RATIO = 1.1  # a lease so far above its target is about to be cut down
HOURS_AHEAD_S = 0.5  # so much of a desk's demand is lent of the hourly count
NEEDS_PER_S = 5.0  # a request that waits counts as so much demand
SHORT_S = 1.0  # so long the others are asked to give back slots
TURN_S = 1.0  # so long a desk has a whole token's capacity where there are more desks than tokens


@dataclass(slots=True)
class _Lease:
    """What one desk holds of one tenant, at most. Its name is its fencing number."""

    name: str
    expires_s: float = 0.0
    rate_per_s: float = 0.0
    capacity: float = 0.0
    demand_per_s: float = 0.0
    level: float = 0.0  # what its desk had left when it last spoke

    def has_spare(self, target_per_s: float) -> bool:
        """Whether the owner may yet get something of it for others."""
        return self.level >= 1.0 or self.rate_per_s > target_per_s * SPARE_RATIO


@dataclass(slots=True)
class _Tenant:
    """One tenant's state: what is not lent, and who holds the rest."""

    limits: Limits
    bucket: Bucket
    hour: RollingHour = field(default_factory=RollingHour)
    leases: dict[str, _Lease] = field(default_factory=dict)  # by holder
    slots: dict[str, int] = field(default_factory=dict)  # by holder
    short: dict[str, float] = field(default_factory=dict)  # when a holder last lacked a slot


class RateLimiter:
    """Owns every tenant's bucket, hourly count and slots, and lends parts of them.

    A lease is a sub-bucket: rate, capacity and level are moved to the desk and come back, by word
    of the desk or, after its life and a margin, by themselves and empty. So what all desks admit
    stays within the tenant's limits at every instant, without the owner being asked.

    Bounds: TENANTS_MAX tenants; those that are full again and lent to nobody are forgotten.
    Beyond that, new tenants are refused. HOLDERS_MAX answers are remembered for repeated messages.

    Failure behaviour: a restarted owner knows nothing of what was used or lent. Unless somebody
    vouches that there was no owner before, it lends no rate and no slots for one lease life, in
    which desks tell it which slots they hold, and its buckets are empty at the end of that. Its
    hourly counts begin at zero.

    A holder may be `process#desk`: `holders` and `holder_gone` speak of the process.
    """

    PROTOCOL = 1

    def __init__(
        self,
        clock: Clock = time.monotonic,
        lease_s: float = LEASE_S,
        *,
        fresh: bool = False,
        nonce: str | None = None,
    ) -> None:
        self._name = nonce or secrets.token_hex(8)
        self._clock = clock
        self._lease_s = lease_s
        self._born_s = clock()
        self._fresh = fresh
        self._tenants: dict[str, _Tenant] = {}
        self._answers: OrderedDict[str, tuple[int, list[Grant]]] = OrderedDict()
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._leases = 0
        self._messages = 0
        self._repeated = 0

    def protocol(self) -> int:
        return self.PROTOCOL

    async def close(self) -> None:
        """Nothing to let go of."""

    def vouch(self) -> None:
        """No owner lent anything before this one: buckets may start full."""
        self._fresh = True

    def lease(self, holder: str, seq: int, asks: list[Ask]) -> list[Grant]:
        """Answer all asks of one desk's tick. The same `seq` again gets the same answer."""
        self._messages += 1
        if _process(holder) in self._dead:
            # Sent before its process died: what it says it holds is nobody's any more.
            return [Grant(ask.tenant, self._name) for ask in asks]
        known = self._answers.get(holder)
        if known is not None and known[0] == seq:
            self._repeated += 1
            return known[1]
        if known is not None and seq < known[0]:
            # An older message that was overtaken: its desk has given it up.
            return [Grant(ask.tenant, self._name) for ask in asks]
        now = self._clock()
        answer = [self._answer(holder, ask, now) for ask in asks]
        self._answers[holder] = (seq, answer)
        self._answers.move_to_end(holder)
        while len(self._answers) > HOLDERS_MAX:
            self._answers.popitem(last=False)
        return answer

    def holder_gone(self, holder: str) -> int:
        """The process is known to be dead: its slots are free. How many there were."""
        self._dead[holder] = None
        while len(self._dead) > HOLDERS_MAX:
            self._dead.popitem(last=False)
        freed = 0
        for tenant in self._tenants.values():
            for name in [name for name in tenant.slots if _process(name) == holder]:
                freed += tenant.slots.pop(name)
        return freed

    def holders(self) -> list[str]:
        """The processes that hold slots now."""
        return sorted({_process(name) for t in self._tenants.values() for name in t.slots})

    def state(self, tenant: str) -> dict[str, Any]:
        """One tenant's state, for people."""
        found = self._tenants.get(tenant)
        if found is None:
            return {"known": False}
        now = self._clock()
        self._reclaim(found, now)
        found.bucket.refill(now)
        return {
            "known": True,
            "level": found.bucket.level,
            "leases": len(found.leases),
            "hour_used": found.hour.used(now),
            "slots_lent": sum(found.slots.values()),
        }

    def stats(self) -> dict[str, Any]:
        return {
            "tenants": len(self._tenants),
            "leases": sum(len(tenant.leases) for tenant in self._tenants.values()),
            "slots_lent": sum(sum(t.slots.values()) for t in self._tenants.values()),
            "messages": self._messages,
            "repeated": self._repeated,
        }

    # ----------------------------------------------------------------------------------------

    def _answer(self, holder: str, ask: Ask, now: float) -> Grant:
        tenant = self._tenant(ask, now)
        if tenant is None:
            full = Refusal("tenants", TENANTS_MAX, 0.0, 1.0)
            return Grant(ask.tenant, self._name, refusal=full, slot_refusal=full)
        self._reclaim(tenant, now)
        self._reconcile(tenant, holder, ask, now)
        if ask.over:
            tenant.leases.pop(holder, None)
            self._forget_if_full(ask.tenant, tenant, now)
            return Grant(ask.tenant, self._name)
        lease = tenant.leases.get(holder)
        if lease is None:
            self._leases += 1
            lease = tenant.leases[holder] = _Lease(f"{self._name}:{self._leases}")
        lease.expires_s = now + self._lease_s + MARGIN_S
        # Without those who wait, what a desk was given would look like all that it wants.
        lease.demand_per_s = ask.demand_per_s + ask.need * NEEDS_PER_S
        lease.level = ask.held.level
        learning = self._learning(now)
        rate, capacity = self._targets(tenant, lease, now)
        share, refusal = self._lend(tenant, lease, ask, now)
        hours, minute, hour_refusal = self._lend_hours(tenant, ask, now)
        slots, slot_refusal = self._lend_slots(tenant, holder, ask, now)
        return Grant(
            ask.tenant,
            self._name,
            "" if learning else lease.name,
            0.0 if learning else self._lease_s,
            share,
            hours,
            minute,
            slots,
            rate_target=rate,
            capacity_target=capacity,
            slots_wanted=any(
                other != holder and now - since_s < SHORT_S
                for other, since_s in tenant.short.items()
            ),
            refusal=refusal or hour_refusal,
            slot_refusal=slot_refusal,
            limits=tenant.limits,
            figures=self._figures(tenant, ask.held.level + share.level),
        )

    def _tenant(self, ask: Ask, now: float) -> _Tenant | None:
        tenant = self._tenants.get(ask.tenant)
        if tenant is None:
            if len(self._tenants) >= TENANTS_MAX:
                self._sweep(now)
            if len(self._tenants) >= TENANTS_MAX:
                return None
            limits = ask.limits
            if self._fresh:
                bucket = Bucket(limits.rate_per_s, limits.burst, limits.burst, now)
            else:
                bucket = Bucket(limits.rate_per_s, limits.burst, 0.0, self._learnt_s())
            tenant = self._tenants[ask.tenant] = _Tenant(limits, bucket)
        elif ask.limits.version >= tenant.limits.version:
            if ask.limits != tenant.limits:
                self._relimit(tenant, ask, now)
            tenant.limits = ask.limits  # equal ones may be of a newer version
        return tenant

    def _relimit(self, tenant: _Tenant, ask: Ask, now: float) -> None:
        """New limits: what is lent stays lent, the rest is what the new limits leave over."""
        lent_rate = sum(lease.rate_per_s for lease in tenant.leases.values())
        lent_capacity = sum(lease.capacity for lease in tenant.leases.values())
        tenant.bucket.refill(now)
        level = tenant.bucket.level
        if tenant.limits.requests_per_minute is None:
            level = float(ask.limits.burst)
        tenant.limits = ask.limits
        rate = max(0.0, ask.limits.rate_per_s - lent_rate)
        since_s = max(now, tenant.bucket.at_s)
        tenant.bucket = Bucket(rate, max(0.0, ask.limits.burst - lent_capacity), level, since_s)

    def _reclaim(self, tenant: _Tenant, now: float) -> None:
        """Leases whose life is over come back by themselves, empty as of then."""
        over = [name for name, lease in tenant.leases.items() if lease.expires_s <= now]
        for name in over:
            lease = tenant.leases.pop(name)
            level = min(lease.capacity, (now - lease.expires_s) * lease.rate_per_s)
            self._put(tenant, Share(lease.rate_per_s, lease.capacity, level), now)

    def _put(self, tenant: _Tenant, share: Share, now: float) -> None:
        """Take a part back, but never more than the limits in force have room for."""
        bucket, limits = tenant.bucket, tenant.limits
        lent_rate = sum(lease.rate_per_s for lease in tenant.leases.values())
        lent_capacity = sum(lease.capacity for lease in tenant.leases.values())
        room_rate = max(0.0, limits.rate_per_s - lent_rate - bucket.rate_per_s)
        room_capacity = max(0.0, limits.burst - lent_capacity - bucket.capacity)
        bucket.put(
            Share(
                min(share.rate_per_s, room_rate), min(share.capacity, room_capacity), share.level
            ),
            now,
        )

    def _reconcile(self, tenant: _Tenant, holder: str, ask: Ask, now: float) -> None:
        """What a desk says it has is the truth, as long as that is not more than it was lent."""
        if ask.slots_held:
            tenant.slots[holder] = ask.slots_held
        else:
            tenant.slots.pop(holder, None)
        if ask.hours_back and ask.owner == self._name:
            tenant.hour.give_back(ask.hours_back, ask.hours_minute)
        lease = tenant.leases.get(holder)
        if lease is None:
            return
        if ask.lease == lease.name:
            held, level = ask.held, ask.level_back
        else:  # it never heard of this lease, or let it end
            held, level = NOTHING, 0.0
            del tenant.leases[holder]
        rate, capacity = lease.rate_per_s, lease.capacity
        lease.rate_per_s = min(rate, held.rate_per_s)
        lease.capacity = min(capacity, held.capacity)
        rate, capacity = rate - lease.rate_per_s, capacity - lease.capacity
        if rate > 0.0 or capacity > 0.0 or level > 0.0:
            self._put(tenant, Share(rate, capacity, level), now)

    def _targets(self, tenant: _Tenant, lease: _Lease, now: float) -> tuple[float, float]:
        """How much rate and capacity this lease should have.

        Less than one token's capacity admits nothing. So each has one, and the rest by its share
        of the demand; if there are more desks than tokens they have them in turns.
        """
        limits, leases = tenant.limits, list(tenant.leases.values())
        if limits.requests_per_minute is None:
            return 0.0, 0.0
        tokens, rate = limits.burst, limits.rate_per_s
        if tokens < len(leases):
            leases = [other for other in leases if other.demand_per_s > 0] or leases
        if tokens < len(leases):
            turn = (leases.index(lease) if lease in leases else 0) + int(now / TURN_S) * tokens
            mine = lease in leases and turn % len(leases) < tokens
            return (rate / tokens, 1.0) if mine else (0.0, 0.0)
        if lease not in leases:
            return 0.0, 0.0
        total = sum(other.demand_per_s for other in leases)
        part = lease.demand_per_s / total if total > 0 else 1.0 / len(leases)
        spare = tokens * RESERVE if tokens * RESERVE >= 1.0 else 0.0
        return rate * part, 1.0 + max(0.0, tokens - len(leases) - spare) * part

    def _lend(
        self, tenant: _Tenant, lease: _Lease, ask: Ask, now: float
    ) -> tuple[Share, Refusal | None]:
        limits, bucket = tenant.limits, tenant.bucket
        if limits.requests_per_minute is None:
            return NOTHING, None
        if self._learning(now):
            return NOTHING, self._refused(
                "requests_per_minute",
                limits.requests_per_minute,
                0.0,
                self._learnt_s() - now,
                lent=True,
            )
        rate, capacity = self._targets(tenant, lease, now)
        rate = max(0.0, rate - lease.rate_per_s)
        capacity = max(0.0, capacity - lease.capacity)
        bucket.refill(now)
        capacity = min(capacity, bucket.capacity)
        # The level follows the capacity, what is needed at once goes first, and what the bucket
        # that is left could not hold goes along; the desk's bucket must have room for it.
        even = bucket.level * capacity / bucket.capacity if bucket.capacity > EPSILON else 0.0
        overflow = bucket.level - (bucket.capacity - capacity)
        level = ask.held.level if ask.lease == lease.name else 0.0
        room = max(0.0, lease.capacity + capacity - level)
        share = bucket.carve(rate, capacity, min(room, max(even, overflow, float(ask.need))), now)
        lease.rate_per_s += share.rate_per_s
        lease.capacity += share.capacity
        level += share.level
        if not ask.need or level >= 1.0 - EPSILON:
            return share, None
        return share, self._short(tenant, lease, level, now)

    def _short(self, tenant: _Tenant, lease: _Lease, level: float, now: float) -> Refusal:
        """Why not even one permit could be given, and when it can."""
        limits, bucket = tenant.limits, tenant.bucket
        assert limits.requests_per_minute is not None
        rate = bucket.rate_per_s + lease.rate_per_s
        missing = 1.0 - level - bucket.level
        wait_s = max(0.0, missing) / rate if rate > EPSILON else self._lease_s + MARGIN_S
        lent = any(
            other.has_spare(self._targets(tenant, other, now)[0])
            for other in tenant.leases.values()
            if other is not lease
        )
        return self._refused(
            "requests_per_minute", limits.requests_per_minute, level, wait_s, lent=lent
        )

    def _lend_hours(self, tenant: _Tenant, ask: Ask, now: float) -> tuple[int, int, Refusal | None]:
        """So many, booked in which minute. Ahead of the need only while there is plenty."""
        limit = tenant.limits.requests_per_hour
        if limit is None:
            return 0, 0, None
        left = limit - tenant.hour.used(now)
        ahead = min(int(ask.demand_per_s * HOURS_AHEAD_S), left // (2 * len(tenant.leases)))
        hours = max(0, min(max(ask.need, ahead) - ask.hours_held, left))
        minute = tenant.hour.book(hours, now) if hours else 0
        if ask.need and not hours and not ask.hours_held:
            wait_s = tenant.hour.wait_s(now)
            return 0, 0, self._refused("requests_per_hour", float(limit), 0.0, wait_s)
        return hours, minute, None

    def _lend_slots(
        self, tenant: _Tenant, holder: str, ask: Ask, now: float
    ) -> tuple[int, Refusal | None]:
        limit = tenant.limits.concurrent
        if limit is None or not ask.slots_need:
            tenant.short.pop(holder, None)
            return (0 if limit is not None else ask.slots_need), None
        if self._learning(now):
            wait_s = self._learnt_s() - now
            return 0, self._refused("concurrent_requests", float(limit), 0.0, wait_s, lent=True)
        free = max(0, limit - sum(tenant.slots.values()))
        slots = min(ask.slots_need, free)
        if slots == ask.slots_need:
            slots += min(ask.slots_ahead, (free - slots) // 2)
        if slots:
            tenant.slots[holder] = tenant.slots.get(holder, 0) + slots
        if slots >= ask.slots_need:
            tenant.short.pop(holder, None)
            return slots, None
        tenant.short = {h: at_s for h, at_s in tenant.short.items() if now - at_s < SHORT_S}
        tenant.short[holder] = now
        others = any(other != holder for other in tenant.slots)
        refusal = self._refused("concurrent_requests", float(limit), 0.0, 0.1, lent=others)
        return slots, refusal

    def _figures(self, tenant: _Tenant, level: float) -> Figures | None:
        """As this desk may see them: what it holds, and what nobody does."""
        limits = tenant.limits
        if limits.requests_per_minute is None:
            return None
        level += tenant.bucket.level
        missing = max(0.0, limits.burst - level)
        reset_s = missing / limits.rate_per_s if limits.rate_per_s > 0.0 else 0.0
        return Figures(limits.requests_per_minute, max(0.0, level), reset_s)

    def _refused(
        self, kind: str, limit: float, remaining: float, wait_s: float, *, lent: bool = False
    ) -> Refusal:
        return Refusal(kind, limit, max(0.0, remaining), max(wait_s, 0.001), lent)

    def _learnt_s(self) -> float:
        return self._born_s + self._lease_s + MARGIN_S

    def _learning(self, now: float) -> bool:
        return not self._fresh and now < self._learnt_s()

    def _sweep(self, now: float) -> None:
        for name, tenant in list(self._tenants.items()):
            self._reclaim(tenant, now)
            self._forget_if_full(name, tenant, now)

    def _forget_if_full(self, name: str, tenant: _Tenant, now: float) -> None:
        """A tenant that is as if never seen carries no information."""
        tenant.bucket.refill(now)
        full = tenant.bucket.level >= tenant.bucket.capacity - EPSILON
        if full and not tenant.leases and not tenant.slots and not tenant.hour.used(now):
            del self._tenants[name]


def _process(holder: str) -> str:
    return holder.partition("#")[0]
