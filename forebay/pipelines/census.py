"""What a source holds: rows, texts without words, duplicates of texts and of ids, sizes, a sample.

Rule 1: what is kept of a row is eight bytes of hash each of its id and of its text, and of at most
        HASHES_MAX rows. Beyond that only hashes that end in enough zero bits are kept, of all
        equal values or of none: so the share of duplicates stays an honest estimate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

HASHES_MAX = 16_000_000
SAMPLE_PER_BLOCK = 50
SAMPLE_MAX = 2_000
SAMPLE_TEXT_CHARS_MAX = 20_000


@dataclass(frozen=True, slots=True, eq=False)
class Counted:
    """One block's part."""

    rows: int
    empty: int
    size: int
    ids: NDArray[np.uint64]
    texts: NDArray[np.uint64]
    sample: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Census:
    """`size` is the UTF-8 bytes of all texts, `duplicates` are texts that stand there already.

    `twice` is the hash of an id that stands there more than once, None where none was found.
    """

    rows: int
    empty: int
    duplicates: int
    size: int
    sample: tuple[str, ...]
    twice: int | None


def count(texts: list[str | None], ids: NDArray[Any] | None) -> Counted:
    """A block's part of a census."""
    from pandas.util import hash_array

    words = [text for text in texts if text is not None and text.strip()]
    sizes = [len(w) if w.isascii() else len(w.encode("utf-8", "surrogatepass")) for w in words]
    step = max(1, len(words) // SAMPLE_PER_BLOCK)
    sample = [word[:SAMPLE_TEXT_CHARS_MAX] for word in words[::step][:SAMPLE_PER_BLOCK]]
    none = np.empty(0, np.uint64)
    return Counted(
        len(texts),
        len(texts) - len(words),
        sum(sizes),
        none if ids is None else hash_array(ids, categorize=False),
        hash_array(np.array(words, dtype=object), categorize=False) if words else none,
        sample,
    )


def total(parts: Iterable[Counted], hashes_max: int = HASHES_MAX) -> Census:
    """The census of all blocks."""
    ids, texts = _Hashes(hashes_max), _Hashes(hashes_max)
    rows = empty = size = 0
    sample: list[str] = []
    for part in parts:
        rows, empty, size = rows + part.rows, empty + part.empty, size + part.size
        ids.add(part.ids)
        texts.add(part.texts)
        sample.extend(part.sample)
        if len(sample) > 2 * SAMPLE_MAX:
            sample = sample[::2]
    repeated, _ = texts.repeated()
    _, twice = ids.repeated()
    kept = max(1, texts.kept)
    duplicates = round((rows - empty) * repeated / kept)
    return Census(rows, empty, duplicates, size, tuple(sample[:SAMPLE_MAX]), twice)


class _Hashes:
    """Owns up to `most` hashes: those that end in `bits` zero bits."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._bits = 0
        self._parts: list[NDArray[np.uint64]] = []
        self.kept = 0

    def add(self, hashes: NDArray[np.uint64]) -> None:
        self._parts.append(self._thinned(hashes))
        self.kept += len(self._parts[-1])
        while self.kept > self._most:
            self._bits += 1
            self._parts = [self._thinned(part) for part in self._parts]
            self.kept = sum(map(len, self._parts))

    def repeated(self) -> tuple[int, int | None]:
        """How many are there again, and one of them."""
        if not self.kept:
            return 0, None
        hashes = np.sort(np.concatenate(self._parts))
        again = hashes[1:][hashes[1:] == hashes[:-1]]
        return len(again), int(again[0]) if len(again) else None

    def _thinned(self, hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
        mask = np.uint64((1 << self._bits) - 1)
        return hashes[(hashes & mask) == 0] if self._bits else hashes
