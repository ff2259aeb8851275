"""The words of the limiter: what callers say and hear, and what desk and owner tell each other.

Rule 1: everything here is an immutable value; what crosses a process pickles as a plain tuple.
Rule 2: units are whole: requests, tokens, slots, nano-USD. Rates and levels of buckets are floats.
Rule 3: durations only. The owner's clock decides; a desk counts a lease's life from its send.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, fields
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

TOKEN_BURST_PART = 6
"""A tenant may use a sixth of its tokens per minute at once."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a tenant may use; None means no limit of that kind.

    `burst` is how many requests may come at once where `requests_per_minute` limits. `day_nano` and
    `month_nano` are nano-USD per UTC day and month. With `hard_minute` no 60 s ever have more than
    the limit (the burst comes out of the rate): a provider's own quota is held so. `version` is the
    configuration's that says all this: where two processes differ, the newer one wins.

    What follows from it is reckoned once, and not sent along. `nano_most` is the most one request
    may ever cost, None where money is not limited. `counts`: the number of requests is limited.
    `meters`: what a request uses is, not only that it happens. `reserves`: a counted request has to
    reserve something before it may go on.
    """

    requests_per_minute: float | None = None
    burst: int = 10
    requests_per_hour: int | None = None
    concurrent: int | None = None
    tokens_per_minute: int | None = None
    day_nano: int | None = None
    month_nano: int | None = None
    hard_minute: bool = False
    version: int = field(default=0, compare=False)
    nano_most: int | None = field(init=False, repr=False, compare=False)
    counts: bool = field(init=False, repr=False, compare=False)
    meters: bool = field(init=False, repr=False, compare=False)
    reserves: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        tell = partial(object.__setattr__, self)
        money = [most for most in (self.day_nano, self.month_nano) if most is not None]
        tell("nano_most", min(money, default=None))
        tell("counts", self.requests_per_minute is not None or self.requests_per_hour is not None)
        tell("meters", self.tokens_per_minute is not None or bool(money))
        tell("reserves", self.concurrent is not None or self.meters)

    def __reduce__(self) -> tuple[Any, ...]:
        return Limits, _said(self)

    @property
    def rate_per_s(self) -> float:
        """Requests per second."""
        limit = self.requests_per_minute or 0.0
        if self.hard_minute and limit:
            limit = max(limit - self.burst + 1, limit / 2)
        return limit / 60.0

    @property
    def token_burst(self) -> float:
        """Tokens that may be used at once; a single request may use more, once all are there."""
        return (self.tokens_per_minute or 0) / TOKEN_BURST_PART

    @property
    def token_rate_per_s(self) -> float:
        limit = float(self.tokens_per_minute or 0)
        return (limit - self.token_burst if self.hard_minute else limit) / 60.0

    @property
    def tokens_most(self) -> int:
        """The most one request may ever use; 0 where tokens are not limited."""
        limit = self.tokens_per_minute or 0
        return int(limit - self.token_burst) if self.hard_minute else limit

    @property
    def remembers(self) -> bool:
        """Whether the ledger has to tell a new owner what was used before it."""
        return self.requests_per_hour is not None or self.nano_most is not None


_said = attrgetter(*(one.name for one in fields(Limits) if one.init))


class Amount(NamedTuple):
    """What a request uses at most, or used: tokens, and nano-USD."""

    tokens: int = 0
    nano: int = 0


NOTHING_USED = Amount()


class Refusal(NamedTuple):
    """No, and when to come back.

    `kind` is requests_per_minute, requests_per_hour, tokens_per_minute, concurrent_requests,
    usd_per_day, usd_per_month, queue or tenants; `limit` and `remaining` are in its unit (USD
    kinds: nano-USD). Others that are refused at the same time come `spacing_s` apart after it.
    `lent`: others hold the rest, or calls that are under way may leave some of it; it is worth
    waiting a moment. `never`: no waiting helps, the request is larger than the limit itself.
    `soonest_s`: before that nobody can be served, whoever's turn it is.
    """

    kind: str
    limit: float
    remaining: float
    retry_after_s: float
    lent: bool = False
    spacing_s: float = 0.0
    never: bool = False
    soonest_s: float = 0.0


class Figures(NamedTuple):
    """A limit as its tenant sees it: `remaining` now, and seconds until all of it is there."""

    limit: float
    remaining: float
    reset_s: float


class Share(NamedTuple):
    """A part of a bucket on its way from one holder to another.

    It begins to refill `after_s` from now, so that requests that overtake each other on their way
    to the provider do not look like more than were admitted.
    """

    rate_per_s: float = 0.0
    capacity: float = 0.0
    level: float = 0.0
    after_s: float = 0.0


NOTHING = Share()


class Need(NamedTuple):
    """What one counted request waits for before it may go on: all of it or nothing."""

    slots: int = 0
    tokens: int = 0
    nano: int = 0


class Seed(NamedTuple):
    """What the ledger knows of a tenant, for an owner that knows nothing.

    `commit` is the number of the last entry it had. `day` counts UTC days since 1970, `month` UTC
    months since the year 0. `minutes` are requests of the last hour: (age in whole minutes, count).
    """

    commit: int
    day: int = 0
    day_nano: int = 0
    month: int = 0
    month_nano: int = 0
    minutes: tuple[tuple[int, int], ...] = ()


class Ask(NamedTuple):
    """What a desk says to the owner about one tenant: what it has, what it needs, what it returns.

    All that is held is said each time, so a lost message needs no memory.

    lease         the lease that `requests` and `tokens` belong to, "" if there is none
    hot           wants a lease with a rate; else only what it needs now
    requests      its bucket of requests as it is now, what is returned taken off
    requests_back the level that is returned; rate and capacity that are missing are returned too
    need          requests that wait to be counted
    demand_per_s  recent arrivals
    tokens, tokens_back, token_demand_per_s   the same for tokens
    token_unit    the most that one of its requests took of late
    refunds       (mark, tokens) of reservations whose lease is over: the owner's own marks
    hours_held    of the hourly count; `hours_back`, booked in `hours_minute` or later, return
    hours_open    counted under an earlier owner, and perhaps not in the ledger
    slots_held    in use and free ones
    nano_spent    settled since the owner named in the message lives: it only grows
    nano_held     money held, reserved or free
    nano_carried  reserved or settled under an earlier owner, and perhaps not in the ledger
    needs         requests that wait to go on, in order, each all or nothing
    ahead         what else it could use soon, if there is plenty
    seed          the ledger's word, where the owner asked for it
    over          ends the lease
    age_s         the first of those that wait came so long ago: what has refilled since is for
                  whoever comes in time
    """

    tenant: str
    limits: Limits
    lease: str = ""
    hot: bool = False
    requests: Share = NOTHING
    requests_back: float = 0.0
    need: int = 0
    demand_per_s: float = 0.0
    tokens: Share = NOTHING
    tokens_back: float = 0.0
    token_demand_per_s: float = 0.0
    token_unit: float = 0.0
    refunds: tuple[tuple[int, int], ...] = ()
    hours_held: int = 0
    hours_back: int = 0
    hours_minute: int = 0
    hours_open: int = 0
    slots_held: int = 0
    nano_spent: int = 0
    nano_held: int = 0
    nano_carried: int = 0
    needs: tuple[Need, ...] = ()
    ahead: Need = Need()
    seed: Seed | None = None
    over: bool = False
    age_s: float = 0.0


class Grant(NamedTuple):
    """The owner's answer to one ask. Everything in it is added to what the desk holds.

    lease, life_s   the lease and how long it lives, counted from the send of the ask; 0: nothing
    requests        added to the desk's bucket, or all of it if `lease` is another than before
    tokens          the same; `token_mark` is the owner's mark for refunds of what came now
    rate_target, capacity_target     what the desk's bucket of requests has above these is to return
    token_rate_target, token_capacity_target   the same
    hours           booked in `hours_minute`
    slots, nano     now held as well
    admitted        so many of `needs`, from the first on, are covered by what is held now
    refusal         why `need` could not be met at all
    need_refusal    why the first of `needs` that is not admitted is not
    wanted          others lack slots, tokens or money: return what is free
    unseeded        the owner needs the ledger's word about this tenant
    seed_commit     that of the word it has: settled money with a later commit is to be told, the
                    rest is known. -1: none is needed or there is none yet
    moved           another owner is this tenant's home by now
    limits          those in force, None if they are the desk's own
    requests_figures, tokens_figures  for response headers
    """

    tenant: str
    lease: str = ""
    life_s: float = 0.0
    requests: Share = NOTHING
    tokens: Share = NOTHING
    token_mark: int = 0
    rate_target: float = 0.0
    capacity_target: float = 0.0
    token_rate_target: float = 0.0
    token_capacity_target: float = 0.0
    hours: int = 0
    hours_minute: int = 0
    slots: int = 0
    nano: int = 0
    admitted: int = 0
    refusal: Refusal | None = None
    need_refusal: Refusal | None = None
    wanted: bool = False
    unseeded: bool = False
    seed_commit: int = -1
    moved: bool = False
    limits: Limits | None = None
    requests_figures: Figures | None = None
    tokens_figures: Figures | None = None


class Answer(NamedTuple):
    """The owner's answer to a message, one grant per ask in order; a message may have no asks.

    `owner` names the owner's life: another name is an owner that knows nothing of what was held.
    `silent` are processes, of any node, that hold something and were not heard of lately: who can
    see that one of them is dead calls `holder_gone`.
    """

    owner: str
    grants: tuple[Grant, ...] = ()
    silent: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Layout:
    """How many owners there are; `version` is the newer the larger."""

    version: int = 0
    shards: int = 1

    def home(self, tenant: str) -> int:
        """The shard that owns a tenant, by rendezvous hash (Thaler and Ravishankar, 1996)."""
        if self.shards == 1:
            return 0
        return max(range(self.shards), key=lambda shard: _weight(shard, tenant))


def _weight(shard: int, tenant: str) -> bytes:
    return hashlib.blake2b(f"{shard}\0{tenant}".encode(), digest_size=8).digest()


class Ticket(NamedTuple):
    """A counted request. `counted` is false where nothing limits the number of requests.

    `lease`, `mark` and `hours_batch` say where its permit came from, so that it can go back there.
    """

    tenant: str
    limits: Limits
    counted: bool
    lease: str = ""
    mark: int = 0
    hours_batch: int = 0


class Hold(NamedTuple):
    """What a request has reserved; `id` makes settling it idempotent. 0: it needs nothing."""

    tenant: str
    id: int
    amount: Amount = NOTHING_USED


def process_of(holder: str) -> str:
    """A holder is `process#desk`; this is the process."""
    return holder.partition("#")[0]
