"""What one desk holds of one tenant, and what it took of it for requests that are under way."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from actors.rate_limiter.policy import Bucket
from actors.rate_limiter.purse import Purse
from actors.rate_limiter.terms import (
    NOTHING_USED,
    Amount,
    Figures,
    Grant,
    Limits,
    Need,
    Refusal,
    Seed,
    Ticket,
)

PLACE_GRACE_S = 0.25  # a place that nobody came back for is forgotten so much after its time
PLACES_MAX = 16
DEMAND_FADE = 0.7  # weight of the past in the demand's moving average, per renewal
LOOSE_S = 10.0  # a counted request that reserves nothing is in the ledger after this
NEVER_S = -1e9


@dataclass(slots=True, eq=False)
class Reservation:
    """What one request took; what it does not use goes back where it came from."""

    held: Held
    ticket: Ticket
    amount: Amount
    at_s: float
    slots: int = 0
    tokens: int = 0
    nano: int = 0
    era: int = 0
    hours: int = 0
    lease: str = ""
    token_mark: int = 0  # of this desk's own bucket
    owner_mark: int = 0  # of the owner's, where the tokens came directly from there
    owner: str = ""
    settled: bool = False


@dataclass(slots=True, eq=False)
class Demand:
    """A moving average of what is wanted per second."""

    per_s: float = 0.0
    since: float = 0.0  # wanted since it was measured

    def measure(self, elapsed_s: float) -> None:
        recent = self.since / min(elapsed_s, 1.0)
        self.per_s += (1.0 - DEMAND_FADE) * (recent - self.per_s)
        self.since = 0.0


class Places:
    """The moments at which those who were refused come back, one after the other.

    Bounded by PLACES_MAX: whoever is refused beyond shares the last place.
    """

    __slots__ = ("at_s",)

    def __init__(self) -> None:
        self.at_s: list[float] = []

    def hand_out(self, first_s: float, spacing_s: float, now: float) -> float:
        """The next place at or after `first_s`, `spacing_s` after the one before."""
        places = self.at_s
        while places and places[0] + PLACE_GRACE_S < now:
            del places[0]
        at_s = max(first_s, places[-1] + spacing_s) if places else first_s
        if len(places) >= PLACES_MAX:
            return places[-1]
        places.append(at_s)
        return at_s

    def used(self) -> None:
        """Somebody came and was served."""
        if self.at_s:
            del self.at_s[0]


@dataclass(slots=True, eq=False)
class Told:
    """The owner's last figures of a tenant, and what this process used since."""

    limits: Limits
    at_s: float = 0.0
    requests: Figures | None = None
    tokens: Figures | None = None
    taken: int = 0
    tokens_taken: int = 0

    def hear(self, grant: Grant, limits: Limits, now: float) -> None:
        """What was refused is not there, whatever else is."""
        if grant.requests_figures is None and grant.tokens_figures is None:
            return
        self.limits, self.at_s, self.taken, self.tokens_taken = limits, now, 0, 0
        self.requests = _at_most(grant.requests_figures, "requests", grant.refusal)
        self.tokens = _at_most(grant.tokens_figures, "tokens", grant.need_refusal)

    def figures(self, now: float) -> dict[str, Figures]:
        """As they are by now."""
        figures = {}
        limits = self.limits
        for name, last, taken, rate in (
            ("requests", self.requests, self.taken, limits.rate_per_s),
            ("tokens", self.tokens, self.tokens_taken, limits.token_rate_per_s),
        ):
            if last is None:
                continue
            most = last.remaining + last.reset_s * rate
            left = min(most, last.remaining - taken + (now - self.at_s) * rate)
            reset_s = (most - left) / rate if rate > 0.0 else last.reset_s
            figures[name] = Figures(last.limit, max(0.0, left), max(0.0, reset_s))
        return figures


def _at_most(last: Figures | None, name: str, refusal: Refusal | None) -> Figures | None:
    if last is None or refusal is None or refusal.kind != f"{name}_per_minute":
        return last
    return last._replace(remaining=min(last.remaining, refusal.remaining))


@dataclass(slots=True, eq=False)
class Held:
    """One tenant, as this desk holds it."""

    tenant: str
    limits: Limits
    owner: str = ""  # the owner's life that lent what is held
    waited_s: float = float("inf")  # since when somebody waits who will not wait for long
    # The lease, and its parts of the buckets.
    lease: str = ""
    until_s: float = 0.0
    cold: bool = False  # over when the next message leaves that does not name it
    granted_s: float = NEVER_S
    going_on: int = 0  # were counted and have not reserved: what is set aside is for them
    requests: Bucket | None = None
    tokens: Bucket | None = None
    token_mark: int = 0  # the owner's, for the oldest tokens that came without a rate
    tokens_told: float = 0.0  # the level that the owner knows of
    over: dict[str, tuple[float, float]] = field(default_factory=dict)  # to be returned, by bucket
    refunds: list[tuple[int, int]] = field(default_factory=list)
    # The hourly count.
    hours: int = 0
    hours_minute: int = -1  # the owner's minute in which the oldest of them was booked
    hours_until_s: float = 0.0
    hours_batch: int = 0  # another one for each such minute and owner
    hours_open: int = 0
    hours_running: int = 0
    loose: list[float] = field(default_factory=list)  # counted and not reserved, of late
    # Slots, and money.
    slots: int = 0  # held in all
    slots_used: int = 0
    free_until_s: float = 0.0  # free slots and money are not taken later
    purse: Purse = field(default_factory=Purse)
    seed: Seed | None = None
    seed_commit: int = -1
    running: int = 0  # reservations that are not settled
    slot_s: float = 0.0  # how long slots are used, a moving average
    # What is wanted.
    hot: bool = False
    streak: int = 0  # requests that followed each other closely
    used_s: float = NEVER_S
    told_s: float = NEVER_S
    measured_s: float = NEVER_S
    demand: Demand = field(default_factory=Demand)
    token_demand: Demand = field(default_factory=Demand)
    nano_demand: Demand = field(default_factory=Demand)
    token_unit: float = 0.0
    need: int = 0  # requests that wait to be counted
    needs: deque[Need] = field(default_factory=deque)  # those that wait to go on
    ahead: Amount = NOTHING_USED  # what the next one will reserve
    # What the owner said last.
    answered_s: float = 0.0
    refusal: Refusal | None = None
    need_refusal: Refusal | None = None
    refused_need: Need = field(default_factory=Need)
    again_s: float = 0.0  # a refused request to be counted is not repeated before
    need_again_s: float = 0.0  # nor one to go on
    places: Places = field(default_factory=Places)
    need_places: Places = field(default_factory=Places)
    wanted: bool = False
    unseeded: bool = False
    moved: bool = False
    told: Told | None = None
    # Where the till has it.
    asked: bool = False  # in the message that is under way
    fading: bool = False

    def live(self, now: float) -> bool:
        """Whether there is a lease, and its life is not over."""
        return now < self.until_s and self.lease != ""

    def hours_left(self, now: float) -> int:
        return self.hours if now < self.hours_until_s and self.live(now) else 0

    @property
    def waiting(self) -> bool:
        return self.need > 0 or len(self.needs) > 0

    @property
    def slots_free(self) -> int:
        return self.slots - self.slots_used

    @property
    def outstanding(self) -> bool:
        """Whether anything of this must not be forgotten."""
        return bool(
            self.waiting
            or self.running
            or self.slots
            or self.hours
            or self.refunds
            or not self.purse.empty
            or self.asked
        )

    def drop_lease(self, now: float) -> None:
        """Its life is over. A debt of tokens that the owner does not know of is told."""
        if self.tokens is not None:
            self.tokens.refill(min(now, self.until_s))
            debt = min(0.0, self.tokens_told) - self.tokens.level
            if debt >= 1.0:
                self.refunds.append((0, -int(debt)))
        self.lease, self.requests, self.tokens, self.cold = "", None, None, False
        self.over.clear()

    def left(self) -> bool:
        """Whether the lease has a permit or tokens left, or will have if a request is refused."""
        return (
            self.going_on > 0
            or (self.requests is not None and self.requests.level > 0.0)
            or (self.tokens is not None and self.tokens.level != 0.0)
        )

    def orphan(self, owner: str, now: float) -> None:
        """Another owner knows nothing of what was lent; what is in use it is told of."""
        if self.owner:
            self.loose = [at_s for at_s in self.loose if at_s + LOOSE_S >= now]
            self.hours_open = len(self.loose) + self.hours_running + self.purse.orphan()
            self.lease, self.requests, self.tokens, self.cold = "", None, None, False
            self.over.clear()
            self.refunds = [refund for refund in self.refunds if refund[1] < 0]
            self.hours = self.hours_batch = 0
            self.slots = self.slots_used
            self.seed, self.seed_commit, self.unseeded = None, -1, False
            self.again_s = self.need_again_s = 0.0
            self.refusal = self.need_refusal = None
        self.owner = owner
