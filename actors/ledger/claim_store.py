"""Claims in the ledger's database: what orders do to the table `ledger_claims`.

Rule 1: orders that came together are done together, in their order, in one transaction.
Rule 2: what is done again has no effect: a claim that is held stays so, and so does an answer that
        is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import BigInteger, Connection, bindparam, delete, func, insert, select, update

from actors.ledger.idempotency import (
    CLAIMS_MAX,
    KEPT_BYTES_MAX,
    KEPT_MS,
    LATE_MS,
    Claim,
    Differs,
    Finish,
    Full,
    Gone,
    Kept,
    Known,
    Outcome,
    Running,
    Standing,
    Won,
    may_finish,
    standing,
)
from actors.ledger.schema import CLAIMS

EVICTED_AT_ONCE = 100

Order = Claim | Finish | Gone
Told = Outcome | bool | tuple[str, ...]
"""Of a claim its outcome; of a finish whether the key was still its own; of an end the keys that
are free again."""

_C = CLAIMS.c
# Made once: to make a statement takes as long as to run it.
_NAMED = _C.name == bindparam("key")
_KNOWN = select(_C.fingerprint, _C.token, _C.until_ms, _C.size).where(_NAMED)
_ANSWER = select(_C.answer).where(_NAMED)
_NEW = insert(CLAIMS)
_KEEP = update(CLAIMS).where(_NAMED)
_FORGET = delete(CLAIMS).where(_NAMED)
_OLD = _C.until_ms <= bindparam("then_ms", type_=BigInteger)
_SUMS = select(func.count(), func.coalesce(func.sum(_C.size), 0))
_OLD_SUMS = _SUMS.where(_OLD)
_OLDEST = (
    select(_C.name, _C.fingerprint, _C.token, _C.until_ms, _C.size)
    .where(_C.size > 0)
    .order_by(_C.until_ms, _C.name)
    .limit(EVICTED_AT_ONCE)
)


class Held(NamedTuple):
    """How many keys there are, and how many bytes of answers."""

    keys: int
    size: int


class Bounds(NamedTuple):
    keys: int = CLAIMS_MAX
    size: int = KEPT_BYTES_MAX


def holders(connection: Connection, most: int) -> dict[str, int]:
    """Who has claims that are not finished, and how many."""
    many = func.count().label("many")
    found = select(_C.holder, many).where(_C.size == 0).group_by(_C.holder).limit(most)
    return {row.holder: row.many for row in connection.execute(found)}


def obey(
    connection: Connection,
    orders: Sequence[Order],
    now_ms: int,
    held: Held | None,
    bounds: Bounds,
) -> tuple[list[Told], Held]:
    """Does all of them. `held` is what was there before, None where nobody has counted yet."""
    claims = _Claims(connection, now_ms, held or _count(connection), bounds)
    claims.sweep()
    told = [claims.obey(order) for order in orders]
    return told, claims.held


def _count(connection: Connection) -> Held:
    keys, size = connection.execute(_SUMS).one()
    return Held(int(keys), int(size))


class _Claims:
    """The table within one transaction, at one moment. Bounded by `bounds`."""

    def __init__(self, connection: Connection, now_ms: int, held: Held, bounds: Bounds) -> None:
        self._connection = connection
        self._now_ms = now_ms
        self._bounds = bounds
        self.held = held

    def obey(self, order: Order) -> Told:
        if isinstance(order, Claim):
            return self._claim(order)
        if isinstance(order, Finish):
            return self._finish(order)
        return self._gone(order)

    def sweep(self) -> None:
        """What is too old leaves."""
        then = {"then_ms": self._now_ms - LATE_MS}
        keys, size = self._connection.execute(_OLD_SUMS, then).one()
        if keys:
            self._connection.execute(delete(CLAIMS).where(_OLD), then)
            self._add(-int(keys), -int(size))

    def _claim(self, claim: Claim) -> Outcome:
        known = self._known(claim.name)
        stands = standing(known, claim, self._now_ms)
        if stands is Standing.OTHER:
            return Differs(claim.name)
        if stands is Standing.OWN:
            return Won(claim.token)
        if stands is Standing.STORED:
            kept = self._connection.execute(_ANSWER, {"key": claim.name})
            return Kept(bytes(kept.scalar_one()))
        if stands is Standing.RUNNING:
            assert known is not None, "something runs"
            return Running((known.until_ms - self._now_ms) / 1000)
        if known is not None:
            self._forget(claim.name, known)
        elif not self._make_room(1, 0):
            return Full(self._bounds.keys)
        row = {
            "name": claim.name,
            "fingerprint": claim.fingerprint,
            "token": claim.token,
            "holder": claim.holder,
            "until_ms": self._now_ms + int(claim.lapses_s * 1000),
            "size": 0,
        }
        self._connection.execute(_NEW, row)
        self._add(1, 0)
        return Won(claim.token)

    def _finish(self, finish: Finish) -> bool:
        known = self._known(finish.name)
        if known is None or not may_finish(known, finish.token):
            return known is not None and known.token == finish.token  # it came twice
        if not finish.answer:
            self._forget(finish.name, known)
            return True
        size = len(finish.answer)
        if not self._make_room(0, size):
            self._forget(finish.name, known)
            return False
        kept = {"until_ms": self._now_ms + KEPT_MS, "size": size, "answer": finish.answer}
        self._connection.execute(_KEEP, {"key": finish.name, **kept})
        self._add(0, size)
        return True

    def _gone(self, gone: Gone) -> tuple[str, ...]:
        theirs = (_C.holder == gone.holder, _C.size == 0)
        names = tuple(self._connection.execute(select(_C.name).where(*theirs)).scalars())
        if names:
            self._connection.execute(delete(CLAIMS).where(*theirs))
            self._add(-len(names), 0)
        return names

    def _known(self, name: str) -> Known | None:
        found = self._connection.execute(_KNOWN, {"key": name}).first()
        return None if found is None else Known(*found)

    def _forget(self, name: str, known: Known) -> None:
        self._connection.execute(_FORGET, {"key": name})
        self._add(-1, -known.size)

    def _make_room(self, keys: int, size: int) -> bool:
        """Whether so much more fits, when the oldest answers have left."""
        while not self._fits(keys, size):
            found = self._connection.execute(_OLDEST).all()
            for name, *known in found:
                self._forget(name, Known(*known))
                if self._fits(keys, size):
                    return True
            if not found:
                return False
        return True

    def _fits(self, keys: int, size: int) -> bool:
        most = self._bounds
        return self.held.keys + keys <= most.keys and self.held.size + size <= most.size

    def _add(self, keys: int, size: int) -> None:
        self.held = Held(self.held.keys + keys, self.held.size + size)
