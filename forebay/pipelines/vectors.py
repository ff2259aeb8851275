"""Vectors for the rows of a block: whole lists at once, and bad texts found by halving."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from actors.batcher.policy import split
from forebay.errors import GatewayError, ProviderError
from forebay.pipelines.account import HOPELESS_ROWS, alike, hopeless
from forebay.pipelines.patience import Patience, halves_help, kind_of

EMPTY = "there is no text"


@dataclass(frozen=True, slots=True, eq=False)
class Got:
    """One answer: float32 of shape (n, d), tokens, nano-USD (None: unknown), cached rows, and the
    places of texts that were refused alone."""

    array: NDArray[np.float32]
    tokens: int
    cost_nano: int | None
    cached: int = 0
    failed: Mapping[int, Exception] = field(default_factory=dict)


def words_of(error: Exception) -> str:
    """What a row's error column says."""
    if isinstance(error, GatewayError):
        return plain(f"{error.code or error.type}: {error.message}")
    return plain(f"{type(error).__name__}: {error}")


def plain(text: str) -> str:
    """The text as a column can hold it: half an emoji, as JSON may have, becomes U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


Send = Callable[[Sequence[str], bool], Awaitable[Got]]
"""Texts, and whether those that are refused may fail alone; else all fail with the first."""


@dataclass(slots=True, eq=False)
class Rows:
    """What came of a block's rows: `vectors[i]` or `errors[i]`; what the provider counted for each
    in `tokens[i]`. `halted` is the error that ends the job: rows without either were not sent."""

    vectors: list[NDArray[np.float32] | None]
    errors: list[str | None]
    tokens: list[int]
    cost_nano: int | None = 0
    cached: int = 0
    halted: GatewayError | None = None
    _sizes: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, count: int) -> Rows:
        return cls([None] * count, [None] * count, [0] * count)

    def take(self, rows: Sequence[int], texts: Sequence[str], got: Got) -> None:
        if len(got.array) != len(rows):
            raise ProviderError(f"{len(got.array)} vectors came for {len(rows)} texts")
        self._sizes.add(int(got.array.shape[1]))
        if len(self._sizes) > 1:
            raise ProviderError(f"vectors of different lengths came: {sorted(self._sizes)}")
        sizes = [
            0 if place in got.failed else len(text.encode("utf-8", "surrogatepass"))
            for place, text in enumerate(texts)
        ]
        for row, vector, tokens in zip(rows, got.array, split(got.tokens, sizes), strict=True):
            self.vectors[row], self.tokens[row] = vector, tokens
        for place, error in got.failed.items():
            self.vectors[rows[place]], self.errors[rows[place]] = None, words_of(error)
        self.cached += got.cached
        unknown = got.cost_nano is None or self.cost_nano is None
        self.cost_nano = None if unknown else (self.cost_nano or 0) + (got.cost_nano or 0)


async def embed_rows(
    texts: Sequence[str | None], send: Send, patience: Patience, *, doubtful: bool = False
) -> Rows:
    """Vectors of a block's texts; those that cannot be embedded fail alone.

    The provider's refusals are searched by the Batcher, where it does (`Got.failed`), else by
    halving here. `doubtful`: no row of the job has been done yet, so a refusal may be of the job.
    Then some rows are sent alone, before all of a refused block are looked through for bad ones.

    Raises nothing: an error that would meet every row alike is in `halted`, beside what had been
    paid for before it.
    """
    rows = Rows.of(len(texts))
    whole: list[tuple[int, str]] = []
    for row, text in enumerate(texts):
        if text is None or not text.strip():
            rows.errors[row] = EMPTY
        else:
            whole.append((row, text))

    async def get(part: list[tuple[int, str]]) -> None:
        if rows.halted is not None or not part:
            return
        places, words = [row for row, _ in part], [text for _, text in part]
        partial = len(part) > 1 and not (part is whole and doubtful)

        def final(error: GatewayError) -> bool:
            return len(part) > 1 and halves_help(error)

        try:
            got = await patience.bear(lambda: send(words, partial), final)
            rows.take(places, words, got)
        except GatewayError as error:
            if len(part) > 1 and halves_help(error):
                if part is whole and doubtful and kind_of(error) == "row":
                    part = await probed(part)
                middle = len(part) // 2
                await asyncio.gather(get(part[:middle]), get(part[middle:]))
            elif kind_of(error) == "row":
                for row in places:
                    rows.errors[row] = words_of(error)
            else:
                rows.halted = rows.halted or error

    async def probed(part: list[tuple[int, str]]) -> list[tuple[int, str]]:
        """The rest, after rows from all over it were sent alone."""
        if len(part) <= HOPELESS_ROWS:
            return part
        step = len(part) // HOPELESS_ROWS
        some = part[::step][:HOPELESS_ROWS]
        await asyncio.gather(*(get([one]) for one in some))
        refusals = [words for row, _ in some if (words := rows.errors[row]) is not None]
        if len(refusals) == len(some) and (words := alike(refusals)):
            rows.halted = rows.halted or hopeless(len(some), words)
            for row, _ in some:
                rows.errors[row] = None  # the next run has them again
        return [one for place, one in enumerate(part) if place % step or one not in some]

    await get(whole)
    return rows
