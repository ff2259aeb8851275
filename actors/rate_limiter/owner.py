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
RESERVE = 0.05  # kept of a tenant that one desk alone uses, for whoever comes next
HOURS_AHEAD_S = 0.5  # so much of a desk's demand is lent of the hourly count


@dataclass(slots=True)
class _Lease:
    """What one desk holds of one tenant."""

    holder: str
    expires_s: float
    rate_per_s: float = 0.0
    capacity: float = 0.0
    demand_per_s: float = 0.0


@dataclass(slots=True)
class _Tenant:
    """One tenant's state: what is not lent, and who holds the rest."""

    limits: Limits
    bucket: Bucket
    hour: RollingHour = field(default_factory=RollingHour)
    leases: dict[str, _Lease] = field(default_factory=dict)
    slots: dict[str, int] = field(default_factory=dict)  # holder → slots it has
    slots_short_s: float = -1e9  # when somebody was last refused a slot


class RateLimiter:
    """Owns every tenant's bucket, hourly count and slots, and lends parts of them.

    A lease is a sub-bucket: rate, capacity and level are moved to the desk and come back, by word
    of the desk or, after its life and a margin, by themselves and empty. So what all desks admit
    stays within the tenant's limits at every instant, without the owner being asked.

    Bounds: TENANTS_MAX tenants; those that are full again and lent to nobody are forgotten.
    Beyond that, new tenants are refused. HOLDERS_MAX answers are remembered for repeated messages.

    Failure behaviour: a restarted owner knows nothing of what was used or lent. Unless somebody
    vouches that there was no owner before, it lends nothing for one lease life, and its buckets are
    as if emptied at its start. Desks tell it again which slots they hold. Its hourly counts begin
    at zero.
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
        known = self._answers.get(holder)
        if known is not None and known[0] == seq:
            self._repeated += 1
            return known[1]
        if known is not None and seq < known[0]:
            # An older message that was overtaken: its desk has given it up.
            return [Grant(ask.tenant, ask.lease, self._name, 0.0) for ask in asks]
        now = self._clock()
        answer = [self._answer(holder, ask, now) for ask in asks]
        self._answers[holder] = (seq, answer)
        self._answers.move_to_end(holder)
        while len(self._answers) > HOLDERS_MAX:
            self._answers.popitem(last=False)
        return answer

    def holder_gone(self, holder: str) -> int:
        """The holder is known to be dead: its slots are free. How many there were."""
        freed = 0
        for tenant in self._tenants.values():
            freed += tenant.slots.pop(holder, 0)
        self._answers.pop(holder, None)
        return freed

    def holders(self) -> list[str]:
        """Who holds slots now."""
        return sorted({holder for tenant in self._tenants.values() for holder in tenant.slots})

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
            return Grant(ask.tenant, ask.lease, self._name, 0.0, refusal=full, slot_refusal=full)
        self._reclaim(tenant, now)
        lease = self._take_back(tenant, holder, ask, now)
        if ask.over:
            if lease is not None:
                self._end(tenant, ask.lease, ask.level, now)
            self._forget_if_full(ask.tenant, tenant, now)
            return Grant(ask.tenant, ask.lease, self._name, 0.0)
        if lease is None:
            lease = tenant.leases[ask.lease] = _Lease(holder, 0.0)
        lease.expires_s = now + self._lease_s + MARGIN_S
        lease.demand_per_s = max(ask.demand_per_s, float(ask.need))
        share, refusal = self._lend(tenant, lease, ask, now)
        hours, hour_refusal = self._lend_hours(tenant, ask, now)
        slots, slot_refusal = self._lend_slots(tenant, holder, ask, now)
        rate, capacity = self._targets(tenant, lease)
        return Grant(
            ask.tenant,
            ask.lease,
            self._name,
            0.0 if self._learning(now) else self._lease_s,
            share=share,
            hours=hours,
            slots=slots,
            rate_target=rate,
            capacity_target=capacity,
            slots_wanted=now - tenant.slots_short_s < 1.0,
            refusal=refusal or hour_refusal,
            slot_refusal=slot_refusal,
            figures=self._figures(tenant, ask, share, now),
        )

    def _tenant(self, ask: Ask, now: float) -> _Tenant | None:
        tenant = self._tenants.get(ask.tenant)
        if tenant is None:
            if len(self._tenants) >= TENANTS_MAX:
                self._sweep(now)
            if len(self._tenants) >= TENANTS_MAX:
                return None
            limits = ask.limits
            level = float(limits.burst)
            if not self._fresh:
                level = min(level, (now - self._born_s) * limits.rate_per_s)
            bucket = Bucket(limits.rate_per_s, limits.burst, level, now)
            tenant = self._tenants[ask.tenant] = _Tenant(limits, bucket)
        elif ask.limits.version >= tenant.limits.version and ask.limits != tenant.limits:
            self._relimit(tenant, ask, now)
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
        tenant.bucket = Bucket(rate, max(0.0, ask.limits.burst - lent_capacity), level, now)

    def _reclaim(self, tenant: _Tenant, now: float) -> None:
        """Leases whose life is over come back by themselves, empty."""
        for name in [n for n, lease in tenant.leases.items() if lease.expires_s <= now]:
            self._end(tenant, name, 0.0, now)

    def _end(self, tenant: _Tenant, name: str, level: float, now: float) -> None:
        lease = tenant.leases.pop(name)
        level = min(level, lease.capacity)
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

    def _take_back(self, tenant: _Tenant, holder: str, ask: Ask, now: float) -> _Lease | None:
        """What the desk returns, as far as it is known to have had it."""
        if ask.slots_held:
            tenant.slots[holder] = ask.slots_held
        else:
            tenant.slots.pop(holder, None)
        if ask.hours_back:
            tenant.hour.give_back(ask.hours_back)
        lease = tenant.leases.get(ask.lease)
        if lease is None or ask.back is NOTHING or ask.back == NOTHING:
            return lease
        rate = min(ask.back.rate_per_s, lease.rate_per_s)
        capacity = min(ask.back.capacity, lease.capacity)
        lease.rate_per_s -= rate
        lease.capacity -= capacity
        self._put(tenant, Share(rate, capacity, ask.back.level), now)
        return lease

    def _targets(self, tenant: _Tenant, lease: _Lease) -> tuple[float, float]:
        """How much rate and capacity this lease should have: its share of the demand."""
        limits = tenant.limits
        if limits.requests_per_minute is None:
            return 0.0, 0.0
        total = sum(other.demand_per_s for other in tenant.leases.values())
        part = lease.demand_per_s / total if total > 0 else 1.0 / len(tenant.leases)
        part *= 1.0 - RESERVE
        return limits.rate_per_s * part, max(1.0, limits.burst * part)

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
        rate, capacity = self._targets(tenant, lease)
        rate = max(0.0, rate - lease.rate_per_s)
        capacity = max(0.0, capacity - lease.capacity)
        bucket.refill(now)
        capacity = min(capacity, bucket.capacity)
        # The level follows the capacity, what is needed at once goes first, and what the bucket
        # that is left could not hold goes along; the desk's bucket must have room for it.
        even = bucket.level * capacity / bucket.capacity if bucket.capacity > EPSILON else 0.0
        overflow = bucket.level - (bucket.capacity - capacity)
        room = max(0.0, lease.capacity + capacity - ask.level)
        share = bucket.carve(rate, capacity, min(room, max(even, overflow, float(ask.need))), now)
        lease.rate_per_s += share.rate_per_s
        lease.capacity += share.capacity
        level = ask.level + share.level
        if not ask.need or level >= 1.0 - EPSILON:
            return share, None
        return share, self._short(tenant, lease, level, now)

    def _short(self, tenant: _Tenant, lease: _Lease, level: float, now: float) -> Refusal:
        """Why not even one permit could be given, and when it can."""
        limits, bucket = tenant.limits, tenant.bucket
        assert limits.requests_per_minute is not None
        rate = bucket.rate_per_s + lease.rate_per_s
        others = limits.rate_per_s - rate
        missing = 1.0 - level - bucket.level
        wait_s = max(0.0, missing) / rate if rate > EPSILON else self._lease_s + MARGIN_S
        lent = others > limits.rate_per_s * EPSILON and len(tenant.leases) > 1
        return self._refused(
            "requests_per_minute", limits.requests_per_minute, level, wait_s, lent=lent
        )

    def _lend_hours(self, tenant: _Tenant, ask: Ask, now: float) -> tuple[int, Refusal | None]:
        limit = tenant.limits.requests_per_hour
        if limit is None:
            return 0, None
        left = limit - tenant.hour.used(now)
        wanted = max(ask.need, int(ask.demand_per_s * HOURS_AHEAD_S)) - ask.hours_held
        hours = max(0, min(wanted, left))
        if hours:
            tenant.hour.book(hours, now)
        if ask.need and not hours and not ask.hours_held:
            wait_s = tenant.hour.wait_s(now)
            return 0, self._refused("requests_per_hour", float(limit), 0.0, wait_s)
        return hours, None

    def _lend_slots(
        self, tenant: _Tenant, holder: str, ask: Ask, now: float
    ) -> tuple[int, Refusal | None]:
        limit = tenant.limits.concurrent
        if limit is None or not ask.slots_need:
            return 0, None
        if self._learning(now):
            wait_s = self._learnt_s() - now
            return 0, self._refused("concurrent_requests", float(limit), 0.0, wait_s, lent=True)
        free = limit - sum(tenant.slots.values())
        slots = max(0, min(ask.slots_need, free))
        if slots:
            tenant.slots[holder] = tenant.slots.get(holder, 0) + slots
        if slots == ask.slots_need:
            return slots, None
        tenant.slots_short_s = now
        others = any(other != holder for other in tenant.slots)
        refusal = self._refused("concurrent_requests", float(limit), 0.0, 0.1, lent=others)
        return slots, refusal

    def _figures(self, tenant: _Tenant, ask: Ask, share: Share, now: float) -> Figures | None:
        limits = tenant.limits
        if limits.requests_per_minute is None:
            return None
        level = tenant.bucket.level + ask.level + share.level
        missing = max(0.0, limits.burst - level)
        return Figures(limits.requests_per_minute, max(0.0, level), missing / limits.rate_per_s)

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
