"""How a desk words its ask about one tenant, and what it gives up with it."""

from __future__ import annotations

from actors.rate_limiter.held import Held
from actors.rate_limiter.policy import EPSILON, Bucket
from actors.rate_limiter.terms import NOTHING, NOTHING_USED, Ask, Need, Share

NEEDS_MAX = 64  # told of those who wait to go on; those behind them are told when these are served
SLOTS_AHEAD = 4  # held beyond the need, so that a busy desk asks seldom
NANO_AHEAD_S = 0.5  # so much of its demand of money a hot desk wants to have
UNIT_FADE = 0.9
MEASURE_S = 0.1
AGE_S_MAX = 0.06  # of those who wait longer, all know that others come before them

_NONE = Need()


def ask_of(held: Held, now: float, *, ending: bool, aside_s: float, idle_s: float) -> Ask:
    """The ask; what it returns is taken off. A cold lease's tokens are set aside for `aside_s`."""
    waiting = held.waiting
    if held.hot:
        over = ending or (not waiting and now - held.used_s >= idle_s)
    else:
        # Without the ledger's word the owner cannot tell what of the carried money it knows.
        seeding = held.seed is not None or (held.purse.carried and held.seed_commit < 0)
        set_aside = held.going_on > 0 and now - held.granted_s < aside_s
        over = ending or not (waiting or seeding or set_aside)
    hot = held.hot and not over
    if hot:
        _measure(held, now)
    if over or held.wanted:
        held.slots = held.slots_used
        held.purse.free = 0
    elif any(need.nano for need in held.needs):
        held.purse.free = 0  # so that the owner sees all there is when it decides
    hours_back = held.hours if over or now >= held.hours_until_s else 0
    held.hours -= hours_back
    if held.lease and now >= held.until_s:
        held.drop_lease(now)
    lease = held.lease
    aside = held.going_on > 0 and now - held.granted_s < aside_s
    requests, requests_back = _bucket(held, "requests", held.requests, over, aside, now)
    tokens, tokens_back = _bucket(held, "tokens", held.tokens, over, False, now)
    if held.tokens is not None:
        held.tokens_told = tokens.level
    if over:
        held.lease, held.requests, held.tokens, held.cold = "", None, None, False
    refunds, held.refunds = tuple(held.refunds), []
    held.told_s = now
    purse = held.purse
    return Ask(
        held.tenant,
        held.limits,
        lease,
        hot,
        requests,
        requests_back,
        held.need,
        held.demand.per_s,
        tokens,
        tokens_back,
        held.token_demand.per_s,
        held.token_unit,
        refunds,
        held.hours,
        hours_back,
        held.hours_minute,
        held.hours_open,
        held.slots,
        purse.spent,
        purse.free + purse.reserved,
        purse.carried,
        _needs(held) if held.needs else (),
        _ahead(held, hot, over),
        held.seed,
        over,
        0.0 if hot else min(AGE_S_MAX, max(0.0, now - held.waited_s)),
    )


def _bucket(
    held: Held, name: str, bucket: Bucket | None, over: bool, aside: bool, now: float
) -> tuple[Share, float]:
    """What is left of a part, and the level that is returned.

    Capacity that nothing can refill is of use only to put something back: it goes home, unless it
    is kept aside for that. Tokens go back to the owner by its own mark.
    """
    if bucket is None:
        return NOTHING, 0.0
    bucket.refill(now)
    if over:
        return NOTHING, bucket.level
    back = 0.0
    excess = held.over.pop(name, None)
    if excess is not None:
        part = min(1.0, excess[1] / bucket.capacity) if bucket.capacity > 0.0 else 0.0
        back = bucket.carve(excess[0], excess[1], bucket.level * part, now).level
    if bucket.rate_per_s <= EPSILON and not aside:
        bucket.carve(0.0, bucket.capacity - max(bucket.level, 0.0), 0.0, now)
    return Share(bucket.rate_per_s, bucket.capacity, bucket.level), back


def _needs(held: Held) -> tuple[Need, ...]:
    """Those who wait to go on; free slots and money here come off the first of them."""
    slots, nano = held.slots_free, held.purse.free
    needs: list[Need] = []
    for need in held.needs:
        if len(needs) >= NEEDS_MAX:
            break
        own_slots, own_nano = min(slots, need.slots), min(nano, need.nano)
        slots, nano = slots - own_slots, nano - own_nano
        needs.append(Need(need.slots - own_slots, need.tokens, need.nano - own_nano))
    return tuple(needs)


def _ahead(held: Held, hot: bool, over: bool) -> Need:
    """What else would be of use: for a cold tenant exactly what its request reserves next."""
    if over or held.wanted:
        return _NONE
    limits = held.limits
    if hot:
        if held.need_refusal is not None:
            return _NONE
        slots = nano = 0
        if limits.concurrent is not None and held.slots_free < SLOTS_AHEAD // 2:
            slots = SLOTS_AHEAD - held.slots_free
        if limits.nano_most is not None:
            nano = max(0, int(held.nano_demand.per_s * NANO_AHEAD_S) - held.purse.free)
        return Need(slots, 0, nano)
    if not held.need or held.needs:
        return _NONE
    ahead = held.ahead
    slots = 1 if limits.concurrent is not None and not held.slots_free else 0
    tokens = 0 if limits.tokens_per_minute is None else ahead.tokens
    nano = 0 if limits.nano_most is None else max(0, ahead.nano - held.purse.free)
    return Need(slots, tokens, nano) if slots or ahead is not NOTHING_USED else _NONE


def _measure(held: Held, now: float) -> None:
    elapsed_s = now - held.measured_s
    if elapsed_s < MEASURE_S:
        return
    for demand in (held.demand, held.token_demand, held.nano_demand):
        demand.measure(elapsed_s)
    held.token_unit *= UNIT_FADE
    held.measured_s = now
