"""Which texts travel together, and who pays how much of what that costs.

Rule 1: a plan never exceeds a cap. Only a text that is over a cap by itself goes out all the same,
        alone: the provider knows best whether it takes it.
Rule 2: within a plan each distinct text is sent once, whoever asked for it and how often.
Rule 3: shares are integers that sum to the provider's figure exactly (largest remainder).

No clock and no event loop here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BYTES_PER_TOKEN = 3
"""Fewer than English has (about 4), and one CJK character: estimates err on the high side."""
WEIGHT_UNIT = 1 << 16
"""What one byte weighs, so that a text shared by several callers still splits finely."""

Text = str | tuple[int, ...]
"""A text, or one that its sender has made token ids of."""


@dataclass(frozen=True, slots=True)
class Lane:
    """What texts must have in common to share a call: deployment, parameters, and the owner of the
    credential where that is a tenant's own. Texts that are sent again travel by themselves, so that
    the provider call that carries them is a retry or is none; and so do token ids (`tokens`), which
    no call may hold beside words."""

    deployment: str
    params: tuple[tuple[str, Any], ...] = ()
    owner: str = ""
    retry: bool = False
    tokens: bool = False


@dataclass(frozen=True, slots=True)
class Caps:
    """Most of one provider call: texts, estimated tokens, and UTF-8 bytes of text; and with `hedge`
    two copies of it where the first is late."""

    items_max: int = 2048
    tokens_max: int = 300_000
    bytes_max: int = 4 * 1024 * 1024
    hedge: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Vectors:
    """A provider's answer: float32 of shape (n, d) in the order of the texts, and its price.

    `cost_nano` None: the price is not known. `estimated`: the provider did not say how many tokens.
    """

    array: NDArray[np.float32]
    prompt_tokens: int
    cost_nano: int | None
    model: str
    estimated: bool = False


@dataclass(frozen=True, slots=True)
class Spare:
    """What second copies of provider calls have cost, whose answers nobody used.

    `estimated`: one was stopped on its way. The provider is taken to ask the same price for it as
    for the copy that it did answer.
    """

    prompt_tokens: int
    cost_nano: int | None
    model: str
    estimated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """One caller's part: its vectors in its own order, and its part of tokens and cost.

    `call_id` names the (first) provider call, `texts_in_call` counts what was sent in all `calls`
    that carried this caller's texts, other callers' included. `spare` is not in `cost_nano`: it is
    this caller's part of what hedging has cost, to be booked and charged to nobody.
    """

    array: NDArray[np.float32]
    prompt_tokens: int
    cost_nano: int | None
    model: str
    call_id: str
    texts_in_call: int
    estimated: bool = False
    calls: int = 1
    spare: Spare | None = None


@dataclass(frozen=True, slots=True)
class Paid:
    """What a failed call of several provider calls has cost: set as `paid` on its exception."""

    prompt_tokens: int
    cost_nano: int | None
    model: str


@dataclass(frozen=True, slots=True)
class Take:
    """A caller's texts in a batch: those at `positions` of its list are in `rows` of the batch."""

    caller: int
    positions: tuple[int, ...]
    rows: tuple[int, ...]
    weight: int


@dataclass(frozen=True, slots=True)
class Batch:
    """One provider call to make: distinct texts, and who takes which of the vectors."""

    texts: tuple[Text, ...]
    takes: tuple[Take, ...]


class BatcherFull(Exception):
    """Too many texts wait already. Nothing was sent; come back in `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return "too many texts wait to be embedded"


class BadVectors(Exception):
    """The provider's vectors do not fit the texts, or are not numbers."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def split(total: int, weights: Sequence[int]) -> list[int]:
    """Parts of `total` in proportion to `weights`, summing to it exactly.

    Largest remainder (Hamilton's method), ties to the earliest; equal parts where nothing weighs.
    """
    assert total >= 0, "nothing negative is ever split"
    whole = sum(weights)
    if whole == 0:
        weights = [1] * len(weights)
        whole = len(weights)
    parts = [total * weight // whole for weight in weights]
    remainders = [total * weight % whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda index: -remainders[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def split_spare(spare: Spare | None, weights: Sequence[int]) -> list[Spare] | list[None]:
    """Parts of what a second copy has cost, as `split` makes them."""
    if spare is None:
        return [None] * len(weights)
    tokens = split(spare.prompt_tokens, weights)
    if spare.cost_nano is None:
        return [Spare(part, None, spare.model, spare.estimated) for part in tokens]
    costs = split(spare.cost_nano, weights)
    return [
        Spare(part, cost, spare.model, spare.estimated)
        for part, cost in zip(tokens, costs, strict=True)
    ]


def plan(pending: Sequence[Sequence[Text]], caps: Caps) -> list[Batch]:
    """The calls that carry these callers' lists, first come first packed."""
    place: dict[Text, int] = {}  # text → its batch
    wants: list[dict[int, list[int]]] = []  # batch → caller → positions
    items = tokens = size = 0
    for caller, texts in enumerate(pending):
        for position, text in enumerate(texts):
            batch = place.get(text)
            if batch is None:
                text_size = _size(text)
                text_tokens = tokens_of(text_size)
                full = (
                    items + 1 > caps.items_max
                    or tokens + text_tokens > caps.tokens_max
                    or size + text_size > caps.bytes_max
                )
                if not wants or full:
                    wants.append({})
                    items = tokens = size = 0
                items, tokens, size = items + 1, tokens + text_tokens, size + text_size
                batch = place[text] = len(wants) - 1
            wants[batch].setdefault(caller, []).append(position)
    return [_batch(pending, want) for want in wants]


def regroup(pending: Sequence[Sequence[Text]], takes: Sequence[Take]) -> Batch:
    """The call that carries what these takes of a larger one carried."""
    return _batch(pending, {take.caller: list(take.positions) for take in takes})


def tokens_of(size: int) -> int:
    """Tokens that a text of `size` UTF-8 bytes may have, estimated high."""
    return max(1, -(-size // BYTES_PER_TOKEN))


def _size(text: Text) -> int:
    """UTF-8 bytes; of token ids what estimates as many tokens."""
    if isinstance(text, tuple):
        return BYTES_PER_TOKEN * len(text)
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _batch(pending: Sequence[Sequence[Text]], want: dict[int, list[int]]) -> Batch:
    """A text's weight is its bytes, split evenly among the callers in the batch who want it."""
    rows: dict[Text, int] = {}
    wanted_by: Counter[Text] = Counter()
    distinct: list[tuple[int, list[int], set[Text]]] = []
    for caller, positions in want.items():
        texts = {pending[caller][position] for position in positions}
        wanted_by.update(texts)
        distinct.append((caller, positions, texts))
        for position in positions:
            rows.setdefault(pending[caller][position], len(rows))
    takes = [
        Take(
            caller,
            tuple(positions),
            tuple(rows[pending[caller][position]] for position in positions),
            sum(_size(text) * WEIGHT_UNIT // wanted_by[text] for text in texts),
        )
        for caller, positions, texts in distinct
    ]
    return Batch(tuple(rows), tuple(takes))
