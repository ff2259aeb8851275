"""In which order a group's deployments are tried: the strategies, and what they go by.

Rule 1: lower `order` first, whatever the strategy; what the breaker holds back last.
Rule 2: within one `order` the strategy ranks; whatever it finds alike is shuffled by weight. A
        weight of 0 means: after all others of its order.
Rule 3: what is known of deployments is this process's own experience; nobody is asked. Only what
        they are rated comes from the ledger, from time to time.

By feedback it is Thompson sampling (Thompson, 1933; Chapelle, Li, 2011): a draw from the beta
distribution of each deployment's good and bad ratings, and the highest goes first. One that is
little known, or was rated long ago, draws high often enough to be tried.

By prefix, prompts that begin alike go to one deployment, whose server then has the beginning in its
cache. It is highest random weight hashing (Thaler, Ravishankar, 1998), so that all processes agree
unasked, with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2016): who has more than a little over
its share of the calls gets no more for now. A beginning stays where it was moved to.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from forebay.routing import Deployment, Group, ModelTable

if TYPE_CHECKING:
    from actors.circuit_breaker.policy import Standing
    from actors.ledger.policy import Rating
    from actors.ref import Clock

KNOWN_FOR_S = 60.0  # a latency older than this is asked for anew
SAMPLE_SHARE_MIN = 0.1  # what the newest call counts for, however fast they come
FORGOTTEN_OVER_S = 15.0  # after so long a pause it counts for 63 in 100
ALIKE = 1.1  # latencies up to this multiple of the lowest are no reason to prefer any
EXPLORED_SHARE = 0.02  # of requests go by weight, so that one that became faster is noticed
SENT_OVER_S = 60.0  # a call so long ago counts for 37 in 100 in a deployment's share of them
SENT_SHARE_MAX, SENT_SPARE = 1.05, 2  # times its share of the calls, and so many calls
SENT_CALM = 10  # calls that are no load, whatever share of all they are
BUSY_SHARE_MAX, BUSY_SPARE = 1.25, 4  # the same of calls in flight
PRICES_MAX = 1_000  # names that are filled into patterns are callers' choice; full = begin anew

USUAL_CALL: Mapping[str, Any] = MappingProxyType(
    {"prompt_tokens": 3_000, "completion_tokens": 1_000}
)
"""The usage that deployments' prices are compared by: three tokens in for one out."""


Rank = Callable[[Sequence[Deployment]], list[Deployment]]
"""Orders deployments that nothing but the strategy tells apart."""


@dataclass(slots=True)
class _Seen:
    """What this process knows of one deployment. `took_s` None: it never answered."""

    in_flight: int = 0
    took_s: float | None = None
    at_s: float | None = None  # when a call last told something, be it a failure
    sent: float = 0.0  # calls, those before `sent_s` counting for less the older they are
    sent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Affinity:
    """What a prompt's beginning is called, and the circuit that has it from before."""

    key: bytes
    home: str | None


class Router:
    """Orders the deployments of a group for one request, by the table's strategy.

    Owns one record per deployment of the table (names filled into a pattern share one) and the
    prices of PRICES_MAX names; those that left the table go once nothing is in flight there.
    `price_of` says what `USUAL_CALL` costs, in nano-USD, or None where nobody knows.

    Failure behaviour: none of its own. Not knowing anything, it goes by weight.
    """

    def __init__(
        self, rng: Random, clock: Clock, price_of: Callable[[Deployment], int | None]
    ) -> None:
        self._rng = rng
        self._clock = clock
        self._price_of = price_of
        self._strategies: dict[str, Rank] = {
            "weighted": self._by_weight,
            "least_busy": self._by_calls_in_flight,
            "latency": self._by_latency,
            "cost": self._by_price,
            "prefix": self._by_prefix,
            "feedback": self._by_feedback,
        }
        self.strategy = "weighted"
        self._rank: Rank = self._by_weight
        self._seen: dict[str, _Seen] = {}
        self._circuits: frozenset[str] = frozenset()
        self._prices: dict[str, int] = {}
        self.ratings: Mapping[str, Rating] = {}
        """By deployment id; whoever knows of newer ones replaces it."""

    def learn_table(self, table: ModelTable) -> None:
        """Go by this table's strategy and deployments from now on; what is known of them stays."""
        self.strategy = table.routing
        self._rank = self._strategies[table.routing]
        self._circuits = frozenset(deployment.circuit for deployment in table.deployments())
        self._seen = {
            circuit: seen
            for circuit, seen in self._seen.items()
            if circuit in self._circuits or seen.in_flight
        }
        self._prices.clear()

    def order(
        self,
        group: Group,
        standing: Callable[[str], Standing],
        affinity: Affinity | None = None,
    ) -> list[Deployment]:
        """A group's deployments in the order to try them now, each once.

        `affinity` is the prompt's; only the prefix strategy heeds it.

        `standing` is asked by `circuit`. What the breaker holds back comes at the very end,
        soonest first: asked for a pass, it says when to come back. One that may be probed keeps
        its place.
        """
        if len(group.deployments) == 1:
            return [group.deployments[0]]
        free: list[Deployment] = []
        held: list[tuple[float, Deployment]] = []
        for deployment in group.deployments:
            stands = standing(deployment.circuit)
            if stands.callable:
                free.append(deployment)
            else:
                held.append((stands.retry_after_s or math.inf, deployment))
        rank = self._rank
        if affinity is not None and self.strategy == "prefix":
            rank = partial(self._by_prefix, affinity=affinity)
        ranked = [deployment for tier in _tiers(free) for deployment in rank(tier)]
        if held:
            ranked += [deployment for _, deployment in sorted(held, key=lambda pair: pair[0])]
        return list({deployment.id: deployment for deployment in ranked}.values())

    def began(self, deployment: Deployment) -> None:
        """A call to the deployment goes out; exactly one `ended` follows."""
        circuit = deployment.circuit
        seen = self._seen.get(circuit)
        if seen is None:
            seen = self._seen[circuit] = _Seen()
        seen.in_flight += 1
        now = self._clock()
        seen.sent, seen.sent_s = self._sent(seen, now) + 1, now

    def ended(self, deployment: Deployment, took_s: float | None, ok: bool) -> None:
        """The call is over. `took_s`: seconds to its first token or answer, or to its failure.

        None: it tells nothing of the deployment, as when the caller left or asked for nonsense.
        A failure counts only where it makes the latency worse: failing fast is not being fast.
        """
        circuit = deployment.circuit
        seen = self._seen[circuit]
        assert seen.in_flight > 0, "a call ends once"
        seen.in_flight -= 1
        if circuit not in self._circuits and not seen.in_flight:
            del self._seen[circuit]
        elif took_s is not None:
            now = self._clock()
            if seen.took_s is None or seen.at_s is None:
                seen.took_s = took_s if ok else None
            elif ok or took_s > seen.took_s:
                share = max(SAMPLE_SHARE_MIN, -math.expm1((seen.at_s - now) / FORGOTTEN_OVER_S))
                seen.took_s += share * (took_s - seen.took_s)
            seen.at_s = now

    def stats(self) -> dict[str, Any]:
        """The strategy, how many prices are kept, and what is known of who was called."""
        return {
            "strategy": self.strategy,
            "prices": len(self._prices),
            "deployments": {
                circuit: {"in_flight": seen.in_flight, "latency_s": seen.took_s}
                for circuit, seen in self._seen.items()
            },
        }

    # ------------------------------------------------------------------------- the strategies

    def _by_weight(self, tier: Sequence[Deployment]) -> list[Deployment]:
        return shuffled(tier, self._rng)

    def _by_calls_in_flight(self, tier: Sequence[Deployment]) -> list[Deployment]:
        """Fewest calls of this process first."""
        return sorted(self._by_weight(tier), key=self._in_flight)

    def _by_latency(self, tier: Sequence[Deployment]) -> list[Deployment]:
        """Soonest to answer first, by an average that newer calls count for more in.

        One that nothing is known of, or nothing new, goes before all, one call at a time.
        """
        if self._rng.random() < EXPLORED_SHARE:
            return self._by_weight(tier)
        now = self._clock()
        latencies = {d.circuit: self._latency(d.circuit, now) for d in tier}
        alike = ALIKE * min((s for s in latencies.values() if s > 0), default=0.0)

        def figure(deployment: Deployment) -> float:
            latency = latencies[deployment.circuit]
            return 0.0 if 0 < latency <= alike else latency

        return sorted(self._by_weight(tier), key=figure)

    def _by_price(self, tier: Sequence[Deployment]) -> list[Deployment]:
        """Cheapest first, those whose price nobody knows last."""
        return sorted(self._by_weight(tier), key=self._price)

    def _by_prefix(
        self, tier: Sequence[Deployment], affinity: Affinity | None = None
    ) -> list[Deployment]:
        """Who has the prompt's beginning first, unless it has more to do than its share."""
        if affinity is None:
            ranked = self._by_weight(tier)
        else:
            ranked = by_hash(tier, affinity.key)
            ranked.sort(key=lambda deployment: deployment.circuit != affinity.home)
        full = self._full(tier)
        return sorted(ranked, key=lambda deployment: deployment.circuit in full)

    def _by_feedback(self, tier: Sequence[Deployment]) -> list[Deployment]:
        """Best rated first, by a draw from what their ratings leave open."""
        ratings, draw = self.ratings, self._rng.betavariate
        known = {d.id: ratings[d.id] for d in tier if d.id in ratings}
        shuffled_by_weight = self._by_weight(tier)
        if not known:
            return shuffled_by_weight
        drawn = {
            d.id: draw(1 + rating.good, 1 + rating.bad)
            if (rating := known.get(d.id))
            else draw(1, 1)
            for d in tier
        }
        return sorted(shuffled_by_weight, key=lambda d: -drawn[d.id])

    # ------------------------------------------------------------------------ what they go by

    def _full(self, tier: Sequence[Deployment]) -> set[str]:
        """Circuits with no room for another call within their share of all of the tier's."""
        now = self._clock()
        shares = _shares(tier)
        seen = {circuit: self._seen.get(circuit) or _Seen() for circuit in shares}
        sent = {circuit: self._sent(one, now) for circuit, one in seen.items()}
        sent_max = (sum(sent.values()) + 1) * SENT_SHARE_MAX
        busy_max = (sum(one.in_flight for one in seen.values()) + 1) * BUSY_SHARE_MAX
        return {
            circuit
            for circuit, share in shares.items()
            if sent[circuit] + 1 > max(share * sent_max + SENT_SPARE, SENT_CALM)
            or seen[circuit].in_flight + 1 > share * busy_max + BUSY_SPARE
        }

    @staticmethod
    def _sent(seen: _Seen, now: float) -> float:
        return seen.sent * math.exp((seen.sent_s - now) / SENT_OVER_S) if seen.sent else 0.0

    def _in_flight(self, deployment: Deployment) -> float:
        seen = self._seen.get(deployment.circuit)
        return 0.0 if seen is None else seen.in_flight

    def _latency(self, circuit: str, now: float) -> float:
        """Seconds; below 0 where a call should find out."""
        seen = self._seen.get(circuit)
        if seen is None:
            return -1.0
        is_known = seen.at_s is not None and now - seen.at_s <= KNOWN_FOR_S
        if not is_known and not seen.in_flight:
            return -1.0
        return math.inf if seen.took_s is None else max(seen.took_s, 1e-9)

    def _price(self, deployment: Deployment) -> float:
        price = self._prices.get(deployment.id)
        if price is None:
            price = self._price_of(deployment)
            if price is None:
                return math.inf  # not kept: LiteLLM's list may not be loaded yet
            if len(self._prices) >= PRICES_MAX:
                self._prices.clear()
            self._prices[deployment.id] = price
        return price


def shuffled(deployments: Sequence[Deployment], rng: Random) -> list[Deployment]:
    """LiteLLM's simple shuffle, repeated on what is left.

    Each pick goes by `weight` if any of those left has one above 0, else by `rpm`, else by `tpm`,
    else all are alike; one without the figure in use comes after all that have it.
    """
    left, picked = list(deployments), []
    weights = _weights(left)
    while len(left) > 1:
        if not any(weights):
            weights = _weights(left)
        index = _index_of_one(weights, rng)
        del weights[index]
        picked.append(left.pop(index))
    return picked + left


def by_hash(deployments: Sequence[Deployment], key: bytes) -> list[Deployment]:
    """An order that is the key's own: each comes first for a share of keys that is its weight's.

    Who comes or goes moves only the keys that are, or then are, its own.
    """
    weights = _weights(deployments)

    def score(pair: tuple[Deployment, float]) -> float:
        digest = blake2b(pair[0].circuit.encode(), key=key, digest_size=8).digest()
        drawn = (int.from_bytes(digest) + 0.5) / 2.0**64
        return -math.log(drawn) / pair[1] if pair[1] > 0 else math.inf

    ranked = sorted(zip(deployments, weights, strict=True), key=score)
    return [deployment for deployment, _ in ranked]


def _shares(deployments: Sequence[Deployment]) -> dict[str, float]:
    """What share of the calls each circuit is meant to get."""
    weights = _weights(deployments)
    shares: dict[str, float] = {}
    for deployment, weight in zip(deployments, weights, strict=True):
        shares[deployment.circuit] = shares.get(deployment.circuit, 0.0) + weight / sum(weights)
    return shares


def _index_of_one(weights: Sequence[float], rng: Random) -> int:
    mark = rng.random() * sum(weights)
    for index, weight in enumerate(weights):
        mark -= weight
        if mark < 0:
            return index
    return len(weights) - 1  # the sum was rounded up


def _tiers(deployments: Sequence[Deployment]) -> Sequence[Sequence[Deployment]]:
    """Those that a strategy ranks among each other: of one `order`, those without one last."""
    ranks = [(math.inf if d.order is None else d.order, d.weight == 0) for d in deployments]
    tiers = sorted(set(ranks))
    if len(tiers) < 2:
        return [deployments]
    return [
        [d for d, rank in zip(deployments, ranks, strict=True) if rank == tier] for tier in tiers
    ]


def _weights(deployments: Sequence[Deployment]) -> list[float]:
    weights = [d.weight or 0.0 for d in deployments]
    if not any(weights):
        weights = [d.rpm or 0.0 for d in deployments]
        if not any(weights):
            weights = [d.tpm or 0.0 for d in deployments]
            if not any(weights):
                return [1.0] * len(deployments)
    return weights
