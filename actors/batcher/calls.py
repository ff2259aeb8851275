"""Callers' lists on their way: the texts that they wait for, and what comes back to whom."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from actors.batcher.planner import WEIGHT_UNIT
from actors.batcher.policy import (
    BadVectors,
    Order,
    Paid,
    Share,
    Spare,
    Text,
    Vectors,
    split,
)

if TYPE_CHECKING:
    from actors.batcher.flights import Line


@dataclass(slots=True, eq=False)
class Call:
    """One caller's list, until each of its texts is answered for.

    `left` counts the positions that are not; `wait_until_s` is until when it can do without a
    permit. `refused` positions have failed alone.
    """

    id: str
    texts: list[Text]
    chars: int
    order: Order
    deadline_s: float
    wait_until_s: float
    done: asyncio.Future[Share]
    left: int
    waiters: int = 0
    units: list[Unit] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    debts: list[Paid] = field(default_factory=list)  # for provider calls that brought nothing
    error: Exception | None = None
    refused: dict[int, Exception] = field(default_factory=dict)
    claimed: bool = False  # somebody has been given what came of it
    written_off: bool = False


@dataclass(slots=True, eq=False)
class Unit:
    """One distinct text of a lane, and who wants it where.

    `queued`: it waits in the lane's queue; `airborne`: a call that carries it is under way, which
    ends by `ends_s`.
    """

    text: Text
    size: int
    tokens: int
    tenant: str
    bulk: bool
    arrived_s: float
    line: Line | None
    takers: list[tuple[Call, int]] = field(default_factory=list)
    queued: bool = True
    airborne: bool = False
    dead: bool = False
    ends_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """What one provider call brought a caller: `rows` of its vectors, for these `positions`."""

    positions: Sequence[int]
    rows: Sequence[int]
    vectors: Vectors
    prompt_tokens: int
    cost_nano: int | None
    call_id: str
    texts: int
    spare: Spare | None = None


def buyers_of(units: Iterable[Unit]) -> dict[Call, int]:
    """Who pays for a call with these texts, and by what weight.

    A text weighs its bytes, split evenly among the callers who want it now. Who comes later pays
    nothing.
    """
    weights: dict[Call, int] = {}
    for unit in units:
        takers = unit.takers
        if len(takers) == 1:
            call = takers[0][0]
            weights[call] = weights.get(call, 0) + unit.size * WEIGHT_UNIT
            continue
        callers = dict.fromkeys(call for call, _ in takers)
        weight = unit.size * WEIGHT_UNIT // len(callers)
        for call in callers:
            weights[call] = weights.get(call, 0) + weight
    return weights


def split_cost(cost_nano: int | None, weights: Sequence[int]) -> list[int] | list[None]:
    return [None] * len(weights) if cost_nano is None else split(cost_nano, weights)


def checked(vectors: Vectors, count: int) -> Vectors:
    """The vectors as one float32 array. Raises BadVectors where they do not fit `count` texts."""
    array = np.ascontiguousarray(vectors.array, dtype=np.float32)
    if array.ndim != 2 or array.shape[0] != count:
        raise BadVectors(f"{count} texts were answered with vectors of shape {array.shape}")
    if not np.isfinite(array).all():
        raise BadVectors("some of the provider's vectors are not finite")
    if array is vectors.array:
        return vectors
    return Vectors(
        array,
        vectors.prompt_tokens,
        vectors.cost_nano,
        vectors.model,
        vectors.estimated,
        vectors.room,
    )


def share_of(call: Call, busy: float) -> Share:
    """All that the call has been brought. Raises BadVectors where it does not go together."""
    array = _assembled(call)
    paid = paid_by(call)
    assert paid is not None, "what is answered has its parts"
    first = call.parts[0]
    return Share(
        array,
        paid.prompt_tokens,
        paid.cost_nano,
        first.vectors.model,
        first.call_id,
        sum(part.texts for part in call.parts),
        any(part.vectors.estimated for part in call.parts),
        len(call.parts),
        _sum_of([part.spare for part in call.parts if part.spare is not None]),
        busy,
        tuple(sorted(call.refused.items(), key=lambda item: item[0])),
    )


def paid_by(call: Call) -> Paid | None:
    """What a caller owes for all that was sent for it, in vain or not; None: nothing was."""
    owed = [Paid(part.prompt_tokens, part.cost_nano, part.vectors.model) for part in call.parts]
    owed += call.debts
    if not owed:
        return None
    costs = [one.cost_nano for one in owed]
    known = [cost for cost in costs if cost is not None]
    tokens = sum(one.prompt_tokens for one in owed)
    return Paid(tokens, sum(known) if len(known) == len(costs) else None, owed[0].model)


def with_paid(error: Exception, call: Call) -> Exception:
    """The error, and with it what its caller pays all the same."""
    paid = paid_by(call)
    if paid is None and getattr(error, "paid", None) is None:
        return error
    error = copy.copy(error)  # others may have got the same one
    error.paid = paid  # type: ignore[attr-defined]
    return error


def _assembled(call: Call) -> NDArray[np.float32]:
    """The caller's rows in its own order: a copy, unless it had the whole provider call."""
    count = len(call.texts)
    first = call.parts[0]
    array = first.vectors.array
    in_order = list(range(count))
    if len(array) == count and first.rows == in_order == first.positions:
        return array
    dimensions = {part.vectors.array.shape[1] for part in call.parts}
    if len(dimensions) > 1:
        raise BadVectors(f"parts of one list came back with {sorted(dimensions)} dimensions")
    make = np.zeros if call.refused else np.empty
    whole = make((count, dimensions.pop()), dtype=np.float32)
    for part in call.parts:
        whole[part.positions] = part.vectors.array[part.rows]
    return whole


def _sum_of(spares: list[Spare]) -> Spare | None:
    if not spares:
        return None
    costs = [spare.cost_nano for spare in spares]
    known = [cost for cost in costs if cost is not None]
    return Spare(
        sum(spare.prompt_tokens for spare in spares),
        sum(known) if len(known) == len(costs) else None,
        spares[0].model,
        any(spare.estimated for spare in spares),
    )
