"""What callers ask of the Batcher, what it asks of a provider, and who pays how much of that.

Rule 1: shares are integers that sum to the provider's figure exactly (largest remainder).
Rule 2: within a provider call each distinct text is sent once, whoever asked for it and how often;
        what it costs is split evenly among those who wanted it when it was sent.

No clock and no event loop here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

LINGER_S = 0.025
BULK_LINGER_S = 0.25
"""Bulk waits longer for company: it wants full calls, and nobody sits before it."""

Text = str | tuple[int, ...]
"""A text, or one that its sender has made token ids of."""


@dataclass(frozen=True, slots=True)
class Lane:
    """What texts must have in common to share a call: deployment, parameters, and the owner of the
    credential where that is a tenant's own. Texts that are sent again travel by themselves, so that
    the provider call that carries them is a retry or is none; and so do token ids (`tokens`), which
    no call may hold beside words. `kinds` are the parameters' types: `true` is not 1, though Python
    thinks so."""

    deployment: str
    params: tuple[tuple[str, Any], ...] = ()
    owner: str = ""
    retry: bool = False
    tokens: bool = False
    kinds: tuple[str, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        kinds = tuple([type(value).__name__ for _, value in self.params])
        object.__setattr__(self, "kinds", kinds)


@dataclass(frozen=True, slots=True)
class Caps:
    """Most of one provider call: texts, estimated tokens, and UTF-8 bytes of text; and with `hedge`
    two copies of it where the first is late. `linger_s` is how long a text waits for company at
    the most, while other calls of its lane are under way; None: LINGER_S, bulk BULK_LINGER_S."""

    items_max: int = 2048
    tokens_max: int = 300_000
    bytes_max: int = 4 * 1024 * 1024
    hedge: bool = False
    linger_s: float | None = None

    def lingers_s(self, bulk: bool) -> float:
        """How long a text waits for company at the most."""
        if self.linger_s is not None:
            return self.linger_s
        return BULK_LINGER_S if bulk else LINGER_S


@dataclass(frozen=True, slots=True)
class Order:
    """How one caller's list is to be sent, and for whom.

    `bulk` lists yield to others and are sent again where the queue is full. `patience_s` is how
    long the list may wait for the provider's own limits where they leave no room now; bulk waits
    to its end. `coalesce` off: at once, and with nobody else's texts. `partial`: a text that the
    provider refuses fails alone, in Share.failed, and not the list. `anew`: it is asked for even
    where the provider has refused it lately.
    """

    tenant: str = ""
    timeout_s: float = 60.0
    coalesce: bool = True
    bulk: bool = False
    patience_s: float = 0.0
    caps: Caps = field(default_factory=Caps)
    partial: bool = False
    anew: bool = False


@dataclass(frozen=True, slots=True)
class Room:
    """What the provider says is left of its limits, until `resets_s` seconds from now."""

    requests: int | None = None
    tokens: int | None = None
    resets_s: float = 0.0


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
    room: Room | None = None


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
    this caller's part of what hedging has cost, to be booked and charged to nobody. `busy`
    is the share of a core that the Batcher itself takes. `failed` are positions that the provider
    refused, each with its error; their vectors are zeros.
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
    busy: float = 0.0
    failed: tuple[tuple[int, Exception], ...] = ()


@dataclass(frozen=True, slots=True)
class Paid:
    """What a failed call of several provider calls has cost: set as `paid` on its exception."""

    prompt_tokens: int
    cost_nano: int | None
    model: str


class BatcherFull(Exception):
    """Too many texts wait already. Nothing was sent; come back in `retry_after_s`."""

    def __init__(self, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return "too many texts wait to be embedded"


class NoPermit(Exception):
    """Nothing was sent: the provider's limits leave no room for `retry_after_s` seconds.

    `error` is for callers who cannot wait so long.
    """

    def __init__(self, retry_after_s: float, error: Exception) -> None:
        super().__init__(retry_after_s, error)
        self.retry_after_s = retry_after_s
        self.error = error

    def __str__(self) -> str:
        return str(self.error)


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
