"""Texts that a provider has refused, each when it was alone in a call."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

from actors.batcher.policy import Lane, Text

TTL_S = 300.0
TEXTS_MAX = 10_000
"""Most texts remembered; the one refused longest ago is forgotten."""


class Poison:
    """Owns what providers refused lately, and how. Bounded by TEXTS_MAX and TTL_S.

    Failure behaviour: what is forgotten is found again by bisection.
    """

    def __init__(self) -> None:
        self._refused: OrderedDict[bytes, tuple[float, Exception]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._refused)

    def remember(self, lane: Lane, text: Text, error: Exception, now_s: float) -> None:
        """The provider has refused this text of this lane, which was alone in its call."""
        key = _key(_kind(lane), text)
        self._refused[key] = (now_s + TTL_S, alone(error))
        self._refused.move_to_end(key)
        while len(self._refused) > TEXTS_MAX:
            self._refused.popitem(last=False)

    def among(
        self, lane: Lane, texts: Sequence[Text], now_s: float
    ) -> Iterator[tuple[int, Exception]]:
        """The places of those texts that the provider refused lately, and how it did."""
        kind = _kind(lane)
        for place, text in enumerate(texts):
            key = _key(kind, text)
            known = self._refused.get(key)
            if known is None:
                continue
            until_s, error = known
            if now_s < until_s:
                yield place, error
            else:
                del self._refused[key]


def alone(error: Exception) -> Exception:
    """The error as one text's: without its price, and the frames that it was raised through."""
    error = copy.copy(error)
    if hasattr(error, "paid"):
        del error.paid
    return error


def _kind(lane: Lane) -> Any:
    """First tries and retries are of one kind here."""
    words = repr((lane.deployment, lane.params, lane.owner, lane.tokens))
    return blake2b(words.encode("utf-8", "surrogatepass"), digest_size=16)


def _key(kind: Any, text: Text) -> bytes:
    digest = kind.copy()
    given = text if isinstance(text, str) else repr(text)
    digest.update(given.encode("utf-8", "surrogatepass"))
    key: bytes = digest.digest()
    return key
