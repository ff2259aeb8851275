"""The limiter's owner: it alone knows what each tenant has left, and lends it to desks."""

from __future__ import annotations

import math
import secrets
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.rate_limiter.account import Account, Wall
from actors.rate_limiter.policy import EPSILON, RollingHour
from actors.rate_limiter.pool import NEEDS_PER_S, Part, Pool
from actors.rate_limiter.terms import (
    NOTHING,
    Answer,
    Ask,
    Grant,
    Layout,
    Limits,
    Need,
    Refusal,
    Share,
    process_of,
)
from actors.ref import Clock, Packed

TENANTS_MAX = 100_000
HOLDERS_MAX = 10_000
LEASE_S = 0.5
MARGIN_S = 0.1  # a lease is taken back so much later than its desk stops using it
HOURS_AHEAD_S = 0.5  # so much of a desk's demand is lent of the hourly count
SHORT_S = 1.0  # so long the others are asked to give back what is free
SEED_S = 0.05  # the ledger's word may be there so soon
SLOT_WAIT_S = 0.1  # slots may be free again so soon; desks know better
RETURN_S = 0.25  # a hot desk that is asked to returns what is free within this
SILENT_S = 0.4
SILENT_MAX = 100  # named in one answer
FORGET_S = 60.0  # a desk that holds nothing and is not heard of is forgotten after this
RELAYOUT_LEARN_S = 2.0
LAYOUTS_MAX = 16
REFUNDS_MAX = 512  # of a tenant's token grants, for what comes back of them
TIDY = 2  # tenants that are looked at with each message, and with each new tenant

NO_LAYOUT = Layout()


@dataclass(slots=True)
class _Lease:
    """What one desk holds of one tenant's buckets. Its name is its fencing number."""

    name: str
    hot: bool = False
    expires_s: float = 0.0
    token_marks: list[int] = field(default_factory=list)  # grants whose capacity is not home yet


class _Tenant:
    """One tenant's state: what is not lent, and who holds the rest."""

    __slots__ = (
        "account",
        "asked",
        "commit",
        "homes",
        "hour",
        "hour_seeded",
        "layout",
        "leases",
        "limits",
        "money_seeded",
        "opened",
        "ready_s",
        "requests",
        "short",
        "slots",
        "tokens",
        "told_s",
    )

    def __init__(self, limits: Limits, ready_s: float, layout: int) -> None:
        self.limits = limits
        self.ready_s = ready_s  # nothing is lent before
        self.layout = layout  # the number of the layout under which this is known to be its home
        self.requests: Pool | None = None
        self.tokens: Pool | None = None
        self.hour = RollingHour()
        self.account: Account | None = None
        self.leases: dict[str, _Lease] = {}  # by holder, as all of these
        self.slots: dict[str, int] = {}
        self.short: dict[str, tuple[float, float]] = {}  # lacks something since, and until when
        self.told_s: dict[str, float] = {}  # when a holder of slots last spoke
        self.opened: dict[str, int] = {}  # of its `hours_open`, so many are booked
        self.homes: OrderedDict[int, int] = OrderedDict()  # token grants: the bucket's mark then
        self.asked = False  # for the ledger's word
        self.hour_seeded = False
        self.money_seeded = False
        self.commit = -1

    @property
    def unseeded(self) -> bool:
        limits = self.limits
        return (limits.requests_per_hour is not None and not self.hour_seeded) or (
            limits.nano_most is not None and not self.money_seeded
        )

    def pools(self) -> list[Pool]:
        return [pool for pool in (self.requests, self.tokens) if pool is not None]

    def held_by(self, holder: str) -> bool:
        """Whether it holds what never comes back by silence."""
        return holder in self.slots or (self.account is not None and self.account.holds(holder))

    def blank(self, now: float) -> bool:
        """Whether forgetting it loses nothing."""
        return (
            not self.leases
            and not self.slots
            and not self.hour.used(now)
            and all(pool.full(now) for pool in self.pools())
            and not (self.account is not None and self.account.purses)
        )


@dataclass(slots=True)
class _Holder:
    """What is known of one desk."""

    seq: int = -1
    answer: Answer | None = None
    heard_s: float = 0.0
    leases: set[str] = field(default_factory=set)  # tenants
    grips: set[str] = field(default_factory=set)  # tenants of whom it has slots or money
    cold: list[tuple[str, str]] = field(default_factory=list)  # tenant, lease: to be used at once


class RateLimiter:
    """Owns every tenant's buckets, hourly count, slots and money, and lends parts of them.

    A lease is a sub-bucket: rate, capacity and level are moved to the desk and come back, by word
    of the desk or, after its life and a margin, by themselves and empty. So what all desks admit
    stays within the tenant's limits at every instant, without the owner being asked. A lease of a
    desk that is not hot is over with its next message that does not name it.

    Bounds: TENANTS_MAX tenants; those that are full again and lent to nobody are forgotten.
    Beyond that, new tenants are refused. HOLDERS_MAX desks; beyond, those not heard of for longest
    are forgotten, and what slots and money they hold stays taken.

    Failure behaviour: a restarted owner knows nothing of what was used or lent. Unless somebody
    vouches that there was no owner before, it lends nothing for one lease life, in which desks
    tell it what they hold, and its buckets are empty at the end of that. Hourly counts and money
    are lent only when the ledger's word is there, read after that time. Slots and money never come
    back by silence, only by word or when their process is known to be dead.

    A holder may be `process#desk`: `holders`, `holder_gone` and `silent` speak of the process.
    """

    PROTOCOL = 4

    def __init__(
        self,
        clock: Clock = time.monotonic,
        wall: Wall = time.time,
        lease_s: float = LEASE_S,
        *,
        shard: int = 0,
        layout: Layout = NO_LAYOUT,
        fresh: bool = False,
        nonce: str | None = None,
    ) -> None:
        self._name = nonce or secrets.token_hex(8)
        self._clock = clock
        self._wall = wall
        self._lease_s = lease_s
        self._shard = shard
        self._born_s = clock()
        self._fresh = fresh
        # (how many were adopted before it, the layout, since when), the one in force last
        self._layouts: list[tuple[int, Layout, float]] = [(0, layout, self._born_s)]
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._holders: OrderedDict[str, _Holder] = OrderedDict()  # the one heard of last is last
        self._dead: OrderedDict[str, None] = OrderedDict()
        self._leases = 0
        self._marks = 0
        self._messages = 0
        self._asks = 0
        self._repeated = 0

    def protocol(self) -> int:
        return self.PROTOCOL

    async def close(self) -> None:
        """Nothing to let go of."""

    def vouch(self) -> None:
        """No owner lent anything before this one: buckets may start full."""
        self._fresh = True

    def adopt(self, layout: Layout) -> bool:
        """From now on tenants are at home by this layout, unless it is older than the one in force.

        Those that come here by it start empty after RELAYOUT_LEARN_S. Another one of the same
        version takes its place: what was announced may be taken back, or turn out otherwise.
        Version 0 is that of whoever knows no configuration, and changes nothing.
        """
        now = self._layout
        if layout == now or layout.version == 0 or layout.version < now.version:
            return False
        self._layouts.append((self._number + 1, layout, self._clock()))
        del self._layouts[:-LAYOUTS_MAX]
        return True

    def lease(
        self,
        holder: str,
        seq: int,
        asks: Sequence[Ask],
        layout: Layout = NO_LAYOUT,
        owner: str = "",
    ) -> Answer:
        """Answer all asks of one desk's message. The same `seq` again gets the same answer.

        `owner` is the owner's life that the desk's numbers are about: said of another one, leases,
        returns and what was spent mean nothing here, and all its money may have been spent or not.
        """
        self._messages += 1
        known = self._holders.get(holder)
        if process_of(holder) in self._dead or (known is not None and seq < known.seq):
            # Sent before its process died, or overtaken: what it says is not so any more.
            return Answer(self._name, tuple(Grant(ask.tenant) for ask in asks))
        if known is not None and seq == known.seq and known.answer is not None:
            self._repeated += 1
            return known.answer
        self.adopt(layout)
        now = self._clock()
        if known is None:
            known = self._holders[holder] = _Holder()
            while len(self._holders) > HOLDERS_MAX:
                self._holders.popitem(last=False)
        self._holders.move_to_end(holder)
        known.seq, known.heard_s = seq, now
        self._end_cold(holder, known, asks, now)
        self._asks += len(asks)
        ours = owner == self._name
        grants = Packed([self._answer(holder, known, ask, ours, now) for ask in asks])
        self._tidy(now)
        known.answer = Answer(self._name, grants, self._silent(now))
        return known.answer

    def holder_gone(self, holder: str) -> int:
        """The process is known to be dead: its slots are free. How many there were."""
        self._dead[holder] = None
        while len(self._dead) > HOLDERS_MAX:
            self._dead.popitem(last=False)
        freed, now = 0, self._clock()
        for name in [name for name in self._holders if process_of(name) == holder]:
            known = self._holders.pop(name)
            for tenant_name in known.leases | known.grips:
                tenant = self._tenants.get(tenant_name)
                if tenant is None:
                    continue
                self._reclaim(tenant, now)
                freed += tenant.slots.pop(name, 0)
                if tenant.account is not None:
                    tenant.account.roll(self._wall())
                    tenant.account.gone(name)
                self._end(tenant, name, now)
                for by_holder in (tenant.short, tenant.told_s, tenant.opened):
                    by_holder.pop(name, None)
        return freed

    def holders(self) -> list[str]:
        """The processes that hold slots or money now."""
        return sorted({process_of(name) for name, known in self._holders.items() if known.grips})

    def state(self, tenant: str) -> dict[str, Any]:
        """One tenant's state, for people."""
        found = self._tenants.get(tenant)
        if found is None:
            return {"known": False}
        now, limits = self._clock(), found.limits
        self._reclaim(found, now)
        state: dict[str, Any] = {"known": True, "leases": len(found.leases)}
        if found.requests is not None:
            state["requests"] = found.requests.state(now)
        if found.tokens is not None:
            state["tokens"] = found.tokens.state(now)
        if limits.requests_per_hour is not None:
            used = found.hour.used(now)
            left = max(0, limits.requests_per_hour - used)
            state["hour"] = {"limit": limits.requests_per_hour, "used": used, "remaining": left}
        if limits.concurrent is not None:
            in_use = sum(found.slots.values())
            state["concurrent"] = {"limit": limits.concurrent, "in_use": in_use}
        if found.account is not None:
            found.account.roll(self._wall())
            state |= found.account.state(limits, self._wall())
        return state

    def stats(self) -> dict[str, Any]:
        holders = self._holders.values()
        gripped = {name for known in holders for name in known.grips}
        slots = (sum(t.slots.values()) for name in gripped if (t := self._tenants.get(name)))
        return {
            "tenants": len(self._tenants),
            "leases": sum(len(known.leases) for known in holders),
            "slots_lent": sum(slots),
            "holders": len(self._holders),
            "messages": self._messages,
            "asks": self._asks,
            "repeated": self._repeated,
            "layout": self._layout.version,
        }

    # ----------------------------------------------------------------------------------------

    def _answer(self, holder: str, known: _Holder, ask: Ask, ours: bool, now: float) -> Grant:
        tenant = self._tenant(ask, now)
        if not isinstance(tenant, _Tenant):
            return tenant
        if tenant.leases:
            self._reclaim(tenant, now)
        self._reconcile(tenant, holder, ask, ours, now)
        wants = ask.hot or ask.need or ask.needs
        if ask.over:
            self._end(tenant, holder, now)
            grant = Grant(ask.tenant, seed_commit=tenant.commit)
        elif now < tenant.ready_s:
            grant = self._not_yet(tenant, ask, now)
        elif wants or holder in tenant.leases:
            grant = self._lend(tenant, holder, known, ask, now)
        else:
            grant = self._word(tenant, ask)
        if holder in tenant.leases:
            known.leases.add(ask.tenant)
        else:
            known.leases.discard(ask.tenant)
        if tenant.held_by(holder):
            known.grips.add(ask.tenant)
        else:
            known.grips.discard(ask.tenant)
        return grant

    def _tenant(self, ask: Ask, now: float) -> _Tenant | Grant:
        tenant = self._tenants.get(ask.tenant)
        if tenant is not None and tenant.layout != self._number:
            if self._stays(ask.tenant, tenant):
                tenant.layout = self._number
            else:
                del self._tenants[ask.tenant]
                tenant = None
        if tenant is None:
            if self._layout.home(ask.tenant) != self._shard:
                return Grant(ask.tenant, moved=True)
            self._tidy(now)
            if len(self._tenants) >= TENANTS_MAX:
                full = Refusal("tenants", TENANTS_MAX, 0.0, 1.0)
                return Grant(ask.tenant, refusal=full, need_refusal=full)
            return self._meet(ask.tenant, ask.limits, now)
        self._tenants.move_to_end(ask.tenant)
        if ask.limits is not tenant.limits and ask.limits.version >= tenant.limits.version:
            if ask.limits != tenant.limits:
                self._relimit(tenant, ask.limits, now)
            tenant.limits = ask.limits  # equal ones may be of a newer version
        return tenant

    def _meet(self, name: str, limits: Limits, now: float) -> _Tenant:
        """A tenant of whom nothing is known, or who is full and lent to nobody."""
        since_s = self._since_s(name)
        tenant = _Tenant(limits, since_s or 0.0, self._number)
        full, at_s = (True, now) if since_s is None else (False, since_s)
        self._equip(tenant, full, at_s)
        self._tenants[name] = tenant
        return tenant

    def _equip(self, tenant: _Tenant, full: bool, at_s: float) -> None:
        """Make what its limits need and is not there yet."""
        limits = tenant.limits
        if limits.requests_per_minute is not None and tenant.requests is None:
            burst = float(limits.burst)
            tenant.requests = Pool(
                "requests_per_minute",
                limits.requests_per_minute,
                limits.rate_per_s,
                burst,
                burst if full else 0.0,
                at_s,
            )
        if limits.tokens_per_minute is not None and tenant.tokens is None:
            burst = limits.token_burst
            tenant.tokens = Pool(
                "tokens_per_minute",
                float(limits.tokens_per_minute),
                limits.token_rate_per_s,
                burst,
                burst if full else 0.0,
                at_s,
            )
        if limits.nano_most is not None and tenant.account is None:
            tenant.account = Account(self._wall())

    def _relimit(self, tenant: _Tenant, limits: Limits, now: float) -> None:
        tenant.limits = limits
        tenant.homes.clear()  # the bucket counts its marks anew
        if tenant.requests is not None:
            if limits.requests_per_minute is None:
                tenant.requests = None
            else:
                tenant.requests.relimit(
                    limits.requests_per_minute, limits.rate_per_s, float(limits.burst), now
                )
        if tenant.tokens is not None:
            if limits.tokens_per_minute is None:
                tenant.tokens = None
            else:
                tenant.tokens.relimit(
                    float(limits.tokens_per_minute),
                    limits.token_rate_per_s,
                    limits.token_burst,
                    now,
                )
        if limits.nano_most is None:
            tenant.account, tenant.money_seeded = None, False
        if limits.requests_per_hour is None:
            tenant.hour, tenant.hour_seeded = RollingHour(), False
        if limits.concurrent is None:
            tenant.slots.clear()
        self._equip(tenant, True, max(now, tenant.ready_s))

    # ------------------------------------------------------------------- what comes back

    def _end_cold(self, holder: str, known: _Holder, asks: Sequence[Ask], now: float) -> None:
        """What was lent to be used at once is used, or still named."""
        if not known.cold:
            return
        named = {ask.lease for ask in asks if ask.lease}
        cold, known.cold = known.cold, []
        for tenant_name, lease_name in cold:
            if lease_name in named:
                continue
            known.leases.discard(tenant_name)
            tenant = self._tenants.get(tenant_name)
            lease = None if tenant is None else tenant.leases.get(holder)
            if tenant is not None and lease is not None and lease.name == lease_name:
                self._reclaim(tenant, now)
                self._end(tenant, holder, now)

    def _reclaim(self, tenant: _Tenant, now: float) -> None:
        """Leases whose life is over come back by themselves, empty as of then."""
        over = [(lease.expires_s, name) for name, lease in tenant.leases.items()]
        for at_s, name in sorted(each for each in over if each[0] <= now):
            self._end(tenant, name, at_s)

    def _end(self, tenant: _Tenant, holder: str, at_s: float) -> None:
        """The lease is over; what its desk did not return counts as used."""
        lease = tenant.leases.pop(holder, None)
        if lease is None:
            return
        for pool in tenant.pools():
            pool.end(holder, at_s)
        self._came_home(tenant, lease)

    def _came_home(self, tenant: _Tenant, lease: _Lease) -> None:
        """The capacity of its token grants is back: refunds of them find room from now on."""
        if tenant.tokens is not None:
            for mark in lease.token_marks:
                tenant.homes[mark] = tenant.tokens.bucket.mark
            while len(tenant.homes) > REFUNDS_MAX:
                tenant.homes.popitem(last=False)
        lease.token_marks.clear()

    def _reconcile(self, tenant: _Tenant, holder: str, ask: Ask, ours: bool, now: float) -> None:
        """What a desk says it has is the truth, as long as that is not more than it was lent."""
        limits = tenant.limits
        lease = tenant.leases.get(holder)
        if lease is not None and ask.lease != lease.name:
            self._end(tenant, holder, now)  # it never heard of this lease, or let it end
        elif lease is not None:
            if tenant.requests is not None:
                tenant.requests.told(holder, ask.requests, ask.requests_back, now)
            if tenant.tokens is not None:
                home = tenant.tokens.told(holder, ask.tokens, ask.tokens_back, now)
                if home and lease.token_marks:
                    self._came_home(tenant, lease)
        if ask.refunds and ours and tenant.tokens is not None:
            self._refund(tenant, tenant.tokens, ask.refunds, now)
        if limits.concurrent is not None:
            if ask.slots_held:
                tenant.slots[holder] = ask.slots_held
                tenant.told_s[holder] = now
            else:
                tenant.slots.pop(holder, None)
                tenant.told_s.pop(holder, None)
        if limits.requests_per_hour is not None:
            if ask.hours_back and ours:
                tenant.hour.give_back(ask.hours_back, ask.hours_minute)
            opened = ask.hours_open - tenant.opened.get(holder, 0)
            if opened > 0:
                tenant.opened[holder] = ask.hours_open
                tenant.hour.book(opened, now)
        account = tenant.account
        if account is not None:
            account.roll(self._wall())
            if ours:
                account.told(holder, ask.nano_spent, ask.nano_held, ask.nano_carried)
            else:
                nano = ask.nano_spent + ask.nano_held + ask.nano_carried
                account.unknown(holder, nano)
        if ask.seed is not None and ours and tenant.asked and tenant.unseeded:
            if limits.requests_per_hour is not None and not tenant.hour_seeded:
                tenant.hour.seed(ask.seed.minutes, now)
                tenant.hour_seeded = True
            if account is not None and not tenant.money_seeded:
                account.seed(ask.seed)
                tenant.money_seeded = True
                tenant.commit = ask.seed.commit

    def _refund(
        self, tenant: _Tenant, pool: Pool, refunds: tuple[tuple[int, int], ...], now: float
    ) -> None:
        """Tokens that were lent to be used at once and were not, or that were too few."""
        bucket = pool.bucket
        for mark, tokens in refunds:
            if tokens < 0:
                bucket.charge(-tokens, now)
                continue
            home = tenant.homes.get(mark)
            if home is None and any(mark in lease.token_marks for lease in tenant.leases.values()):
                home = bucket.mark  # its capacity is not home: as far as there is room just now
            if home is not None:
                bucket.put_back(home, float(tokens), now)

    # ------------------------------------------------------------------- what is lent

    def _word(self, tenant: _Tenant, ask: Ask) -> Grant:
        """Nothing is lent."""
        unseeded = tenant.unseeded
        tenant.asked = tenant.asked or unseeded
        limits = tenant.limits if ask.limits is not tenant.limits else None
        return Grant(ask.tenant, unseeded=unseeded, seed_commit=tenant.commit, limits=limits)

    def _not_yet(self, tenant: _Tenant, ask: Ask, now: float) -> Grant:
        """Desks may still use what another owner lent them."""
        limits, wait_s = tenant.limits, max(0.001, tenant.ready_s - now)
        refusal = need_refusal = None
        if ask.need:
            kind, limit = "requests_per_minute", limits.requests_per_minute
            if limit is None:
                kind, limit = "requests_per_hour", limits.requests_per_hour
            refusal = Refusal(kind, float(limit or 0), 0.0, wait_s, True)
        if ask.needs:
            kind = _kind(limits, ask.needs[0])
            need_refusal = Refusal(kind, _limit(limits, kind), 0.0, wait_s, True)
        return Grant(
            ask.tenant,
            refusal=refusal,
            need_refusal=need_refusal,
            limits=limits if ask.limits is not limits else None,
        )

    def _lend(self, tenant: _Tenant, holder: str, known: _Holder, ask: Ask, now: float) -> Grant:
        limits, requests, tokens = tenant.limits, tenant.requests, tenant.tokens
        lease = tenant.leases.get(holder)
        if lease is None:
            self._leases += 1
            lease = tenant.leases[holder] = _Lease(f"{self._name}:{self._leases}")
        lease.hot = ask.hot
        lease.expires_s = now + self._lease_s + MARGIN_S
        if not ask.hot:
            known.cold.append((ask.tenant, lease.name))
        word = self._word(tenant, ask)
        request_part = token_part = None
        share = token_share = NOTHING
        # Without those who wait, what a desk was given would look like all that it wants.
        if requests is not None:
            demand = ask.demand_per_s + ask.need * NEEDS_PER_S
            request_part = requests.wants(holder, ask.hot, demand, 1.0)
        if tokens is not None:
            unit = ask.token_unit
            demand = ask.token_demand_per_s + len(ask.needs) * NEEDS_PER_S * max(unit, 1.0)
            token_part = tokens.wants(holder, ask.hot, demand, unit)
        need, refusal = self._hours_for(tenant, ask, word.unseeded, now)
        counted: float = need
        if requests is not None and request_part is not None:
            share = _lend_requests(requests, request_part, need, now, ask.age_s)
            counted = min(need, math.floor(request_part.level + EPSILON))
            if counted:
                requests.served(holder)
            elif ask.need and refusal is None:
                refusal = requests.refusal(holder, request_part, 1.0, 1.0, need, now)
        hours = minute = 0
        if limits.requests_per_hour is not None and not word.unseeded:
            hours = self._hours(tenant, ask, int(counted), now)
            minute = tenant.hour.book(hours, now) if hours else 0
        if tokens is not None and token_part is not None:
            token_share = tokens.lend_part(token_part, 0.0, now)
        lent = _Lender(self, tenant, holder, ask, token_part, token_share, now)
        need_refusal = lent.needs(word.unseeded)
        wanted = self._wanted(tenant, holder, now)
        if need_refusal is None and not wanted:
            lent.ahead(word.unseeded, counted > 0 or not ask.need)
        self._note_short(tenant, holder, need_refusal, now)
        if lent.slots:
            tenant.slots[holder] = tenant.slots.get(holder, 0) + lent.slots
            tenant.told_s.setdefault(holder, now)
        if tenant.account is not None:
            tenant.account.lend(holder, lent.nano)
        mark = 0
        if lent.tokens.level > 0.0:
            self._marks += 1
            mark = self._marks
            lease.token_marks.append(mark)
            del lease.token_marks[:-REFUNDS_MAX]
        rates = requests.targets(request_part, now) if requests and request_part else (0.0, 0.0)
        token_rates = tokens.targets(token_part, now) if tokens and token_part else (0.0, 0.0)
        return Grant(
            ask.tenant,
            lease.name,
            self._lease_s,
            share,
            lent.tokens,
            mark,
            rates[0],
            rates[1],
            token_rates[0],
            token_rates[1],
            hours,
            minute,
            lent.slots,
            lent.nano,
            lent.admitted,
            refusal,
            need_refusal,
            wanted,
            word.unseeded,
            word.seed_commit,
            False,
            word.limits,
            requests.figures(request_part.level) if requests and request_part else None,
            tokens.figures(token_part.level) if tokens and token_part else None,
        )

    def _hours_for(
        self, tenant: _Tenant, ask: Ask, unseeded: bool, now: float
    ) -> tuple[int, Refusal | None]:
        """How many of those that wait the hour has room for."""
        limit = tenant.limits.requests_per_hour
        if limit is None or not ask.need:
            return ask.need, None
        if unseeded and not tenant.hour_seeded:
            need = min(ask.need, ask.hours_held)
            wait_s, lent = SEED_S, True
        else:
            left = max(0, limit - tenant.hour.used(now))
            need = min(ask.need, ask.hours_held + left)
            wait_s, lent = tenant.hour.wait_s(now), False
        if need:
            return need, None
        return 0, Refusal("requests_per_hour", float(limit), 0.0, max(wait_s, 0.001), lent)

    def _hours(self, tenant: _Tenant, ask: Ask, counted: int, now: float) -> int:
        """So many are lent. Ahead of the need only while there is plenty."""
        assert tenant.limits.requests_per_hour is not None
        if not tenant.hour_seeded:
            return 0
        left = max(0, tenant.limits.requests_per_hour - tenant.hour.used(now))
        ahead = min(int(ask.demand_per_s * HOURS_AHEAD_S), left // (2 * len(tenant.leases)))
        return max(0, min(max(counted, ahead if ask.hot else 0) - ask.hours_held, left))

    def _note_short(
        self, tenant: _Tenant, holder: str, refusal: Refusal | None, now: float
    ) -> None:
        if refusal is None or refusal.never:
            if tenant.short:
                tenant.short.pop(holder, None)
            return
        since_s, until_s = tenant.short.get(holder, (now, now))
        tenant.short[holder] = (since_s if now <= until_s else now, now + SHORT_S)

    def _wanted(self, tenant: _Tenant, holder: str, now: float) -> bool:
        """Whether somebody else lacks something."""
        if not tenant.short:
            return False
        for name in [name for name, (_, until_s) in tenant.short.items() if until_s < now]:
            del tenant.short[name]
        return any(name != holder for name in tenant.short)

    # ------------------------------------------------------------------- who is where

    @property
    def _layout(self) -> Layout:
        return self._layouts[-1][1]

    @property
    def _number(self) -> int:
        return self._layouts[-1][0]

    def _stays(self, name: str, tenant: _Tenant) -> bool:
        """Whether this was its home under every layout since it was last looked at."""
        if tenant.layout < self._layouts[0][0]:
            return False
        return all(
            layout.home(name) == self._shard
            for number, layout, _ in self._layouts
            if number > tenant.layout
        )

    def _since_s(self, name: str) -> float | None:
        """Since when a tenant that is not known has been filling up here; None: always."""
        since_s = None if self._fresh else self._born_s + self._lease_s + MARGIN_S
        before: bool | None = None
        for _, layout, at_s in self._layouts:
            here = layout.home(name) == self._shard
            if here and (before is False or (before is None and at_s > self._born_s)):
                since_s = at_s + RELAYOUT_LEARN_S
            before = here
        return since_s

    def _silent(self, now: float) -> tuple[str, ...]:
        """Processes that hold what never comes back by silence, and are silent."""
        silent: dict[str, None] = {}
        forgotten: list[str] = []
        for name, known in self._holders.items():
            if now - known.heard_s < SILENT_S or len(silent) + len(forgotten) >= SILENT_MAX:
                break
            if known.grips:
                silent[process_of(name)] = None
            elif now - known.heard_s >= FORGET_S:
                forgotten.append(name)
        for name in forgotten:
            del self._holders[name]
        return tuple(silent)

    def _tidy(self, now: float) -> None:
        """Forget the tenants that are as if never seen, beginning with those idle for longest."""
        for _ in range(min(TIDY, len(self._tenants))):
            name, tenant = next(iter(self._tenants.items()))
            if tenant.leases:
                self._reclaim(tenant, now)
            moved = tenant.layout != self._number and not self._stays(name, tenant)
            keep = tenant.limits.remembers and len(self._tenants) < TENANTS_MAX // 2
            if moved or (not keep and now >= tenant.ready_s and tenant.blank(now)):
                del self._tenants[name]
            else:
                self._tenants.move_to_end(name)


class _Lender:
    """What one ask is lent for those who wait to go on, and ahead of them."""

    def __init__(
        self,
        owner: RateLimiter,
        tenant: _Tenant,
        holder: str,
        ask: Ask,
        part: Part | None,
        share: Share,
        now: float,
    ) -> None:
        self._wall = owner._wall
        self._tenant = tenant
        self._holder = holder
        self._ask = ask
        self._part = part
        self._own = 0.0 if part is None else part.level  # of tokens, not yet for anybody
        self._now = now
        self.tokens = share
        self.slots = 0
        self.nano = 0
        self.admitted = 0
        limit = tenant.limits.concurrent
        self._free = 0 if limit is None else max(0, limit - sum(tenant.slots.values()))
        self._left = 0 if tenant.account is None else tenant.account.available(tenant.limits)

    def needs(self, unseeded: bool) -> Refusal | None:
        """As many as are covered, in order, and why the next one is not."""
        for need in self._ask.needs:
            refusal = self._serve(need, unseeded)
            if refusal is not None:
                return refusal
            self.admitted += 1
        return None

    def ahead(self, unseeded: bool, counted: bool) -> None:
        """What will be needed: exactly that for who is not hot, else more while there is plenty."""
        ahead, tenant = self._ask.ahead, self._tenant
        if not ahead or ahead == Need():
            return
        if not self._ask.hot:
            if counted:
                self._serve(ahead, unseeded)
            return
        limits = tenant.limits
        if limits.concurrent is not None:
            slots = min(ahead.slots, (self._free - self.slots) // 2)
            self.slots += max(0, slots)
        if tenant.account is not None and tenant.money_seeded:
            plenty = (self._left - self.nano) // (2 * len(tenant.leases))
            self.nano += max(0, min(ahead.nano, plenty))

    def _serve(self, need: Need, unseeded: bool) -> Refusal | None:
        """All of a need, or nothing of it and the reason."""
        tenant, limits, now = self._tenant, self._tenant.limits, self._now
        slots = need.slots if limits.concurrent is not None else 0
        nano = need.nano if tenant.account is not None else 0
        pool, part = tenant.tokens, self._part
        tokens = need.tokens if pool is not None else 0
        most = limits.nano_most
        if tokens > limits.tokens_most:
            kind = "tokens_per_minute"
            return Refusal(kind, _limit(limits, kind), 0.0, 60.0, never=True)
        if nano and tenant.account is not None and most is not None and nano > most:
            return tenant.account.refusal(limits, nano, self._wall())
        if slots > self._free - self.slots:
            others = self._others_may_return()
            limit = float(limits.concurrent or 0)
            return Refusal("concurrent_requests", limit, 0.0, SLOT_WAIT_S, others)
        if nano and tenant.account is not None and not tenant.money_seeded:
            kind = _kind(limits, Need(nano=nano))
            return Refusal(kind, _limit(limits, kind), 0.0, SEED_S, lent=True)
        if nano and tenant.account is not None and nano > self._left - self.nano:
            return tenant.account.refusal(limits, nano, self._wall(), self.nano)
        if tokens and pool is not None and part is not None:
            lacking = tokens - self._own
            share: Share | None = NOTHING
            if tokens > pool.burst and lacking > 0.0:
                share = None if self._own < part.level else pool.lend_big(part, tokens, now)
            elif lacking > 0.0:
                share = pool.lend_exactly(part, lacking, now, self._ask.age_s)
            if share is None:
                many = len(self._ask.needs) - self.admitted
                return pool.refusal(self._holder, part, tokens, tokens, many, now)
            self.tokens = _both(self.tokens, share)
            self._own += share.level - tokens
            pool.served(self._holder)
        self.slots += slots
        self.nano += nano
        return None

    def _others_may_return(self) -> bool:
        """Whether a hot desk with slots has not had the time yet to return those that are free."""
        tenant = self._tenant
        since_s, until_s = tenant.short.get(self._holder, (self._now, self._now))
        if until_s < self._now:
            since_s = self._now
        return any(
            name in tenant.leases and tenant.leases[name].hot and told_s <= since_s + RETURN_S
            for name, told_s in tenant.told_s.items()
            if name != self._holder
        )


def _lend_requests(pool: Pool, part: Part, need: int, now: float, ago_s: float) -> Share:
    """A part with a rate if it can have one, and else as many as wait, as far as they were there
    when they came."""
    share = pool.lend_part(part, float(need), now)
    if pool.targets(part, now)[0] > 0.0:
        return share
    lacking = math.ceil(need - part.level - EPSILON)
    there = max(0, math.floor(pool.bucket.level_before(ago_s, now) + EPSILON))
    more = pool.lend_exactly(part, float(min(lacking, there)), now) if lacking > 0 else NOTHING
    return share if more is None else _both(share, more)


def _both(one: Share, other: Share) -> Share:
    """Two shares that are lent at the same moment."""
    if one is NOTHING:
        return other
    if other is NOTHING:
        return one
    return Share(
        one.rate_per_s + other.rate_per_s,
        one.capacity + other.capacity,
        one.level + other.level,
        max(one.after_s, other.after_s),
    )


def _kind(limits: Limits, need: Need) -> str:
    """The kind of limit that a need meets first."""
    if need.slots and limits.concurrent is not None:
        return "concurrent_requests"
    if need.tokens and limits.tokens_per_minute is not None:
        return "tokens_per_minute"
    return "usd_per_day" if limits.day_nano is not None else "usd_per_month"


def _limit(limits: Limits, kind: str) -> float:
    return {
        "concurrent_requests": float(limits.concurrent or 0),
        "tokens_per_minute": float(limits.tokens_per_minute or 0),
        "usd_per_day": float(limits.day_nano or 0),
        "usd_per_month": float(limits.month_nano or 0),
    }[kind]
