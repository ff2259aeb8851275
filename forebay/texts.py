"""Texts to embed, one by one: what is known already, what others are getting, what is to be sent.
A text is words or token ids.

Rule 1: each distinct text has one row, however often it stands in the list.
Rule 2: what we lead is landed before we wait for anybody, so no two lists wait for each other.
Rule 3: a failure goes to those who wait only where it says something of the provider, or where the
        text was sent alone: a long list's own trouble is no news for who shares one text with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.batcher.policy import Text, split
from actors.cache.desk import CacheDesk, Follow, Hit, Lead
from actors.cache.policy import Scope
from forebay import codec
from forebay.codec import Answer, Vector
from forebay.errors import (
    CircuitBreakerOpenError,
    GatewayError,
    GatewayTimeout,
    ProviderError,
)

ROUNDS_MAX = 16
"""How often texts whose leader is lost are asked for again, before they are sent without asking."""
OF_THE_PROVIDER = (ProviderError, CircuitBreakerOpenError, GatewayTimeout)


def inputs_of(given: Any) -> list[Text]:
    """What is to be embedded, one by one; token ids as tuples."""
    if isinstance(given, str):
        return [given]
    if isinstance(given[0], int):
        return [tuple(given)]
    return [one if isinstance(one, str) else tuple(one) for one in given]


class Texts:
    """Owns the rows of one request, and what it leads until that has landed; bounded by its list.

    Failure behaviour: fails open, as the desk does: what nobody knows is sent. Vectors of unequal
    length, such as a model leaves behind that has changed, are forgotten and all texts sent; so
    they are where a fallback's vectors would stand beside others.
    """

    def __init__(
        self, desk: CacheDesk, scope: Scope, texts: Sequence[Text], keys: Sequence[bytes]
    ) -> None:
        self._desk = desk
        self._scope = scope
        rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        self._keys = list(rows)
        self._rows = [rows[key] for key in keys]
        self._texts: list[Text] = [""] * len(rows)
        for row, text in zip(self._rows, texts, strict=True):
            self._texts[row] = text
        self._vectors: list[Vector | None] = [None] * len(rows)
        self._known: set[int] = set()  # rows from the cache
        self._sent: set[int] = set()
        self._refused: dict[int, Exception] = {}
        self._leads: dict[int, Lead] = {}
        self._flights: dict[int, str] = {}
        self._rounds = 0
        self._evened = False

    @property
    def to_send(self) -> list[str | list[int]]:
        """The texts that are ours to get, as a body holds them."""
        texts = (self._texts[row] for row in self._leads)
        return [text if isinstance(text, str) else list(text) for text in texts]

    @property
    def awaited(self) -> bool:
        """Whether others are getting some of the rest."""
        return bool(self._flights)

    @property
    def sent_any(self) -> bool:
        return bool(self._sent)

    @property
    def failed(self) -> tuple[tuple[int, Exception], ...]:
        """Positions of the list that the provider refused alone, and how."""
        if not self._refused:
            return ()
        rows = enumerate(self._rows)
        return tuple((place, self._refused[row]) for place, row in rows if row in self._refused)

    @property
    def cached(self) -> int:
        """How many of the list's vectors came from the cache."""
        return sum(row in self._known for row in self._rows)

    @property
    def of_fallback(self) -> bool:
        """Whether a fallback's vectors are among them, ours or those of whom we joined."""
        return any(vector is not None and vector.fallback for vector in self._vectors)

    async def look_up(self, *, read: bool, join: bool, patience_s: float) -> None:
        """Ask for every text, in as few messages as they fit into."""
        await self._ask(range(len(self._keys)), read, join, patience_s)

    async def wait(self, *, read: bool, join: bool, patience_s: float) -> None:
        """Wait for what others are getting. Where a leader is lost, the text may be ours next.

        Raises FlightFailed with the first failure.
        """
        flights, self._flights = self._flights, {}
        lost = []
        for row, joined in zip(
            flights, await self._desk.follow_all(list(flights.values()), patience_s), strict=True
        ):
            if joined is None:
                lost.append(row)
            else:
                self._vectors[row] = codec.unpack_vector(joined.value)
        if not lost:
            return
        self._rounds += 1
        if self._rounds < ROUNDS_MAX:
            await self._ask(lost, read, join, patience_s)
        else:
            self._leads.update({row: self._alone(row) for row in lost})

    def take(
        self,
        answer: Answer,
        ttl_s: float | None,
        *,
        own: bool = True,
        failed: Sequence[tuple[int, Exception]] = (),
    ) -> None:
        """The answer to what `to_send` was: kept for `ttl_s` seconds, if at all, and handed on.

        `own`: it is of the model that was asked for, and no fallback's. `failed` places of it have
        no vector, and why.
        """
        array, usage = answer.array, answer.usage or {}
        assert array is not None, "an embedding answer carries vectors"
        refused = dict(failed)
        weights = [
            0 if place in refused else _weight(self._texts[row])
            for place, row in enumerate(self._leads)
        ]
        tokens = split(int(usage.get("prompt_tokens") or 0), weights)
        leads = list(self._leads.items())
        for place, ((row, lead), one, part) in enumerate(zip(leads, array, tokens, strict=True)):
            if place in refused:
                self._refused[row] = error = refused[place]
                told = codec.pack_error(error) if isinstance(error, GatewayError) else None
                self._desk.land(lead, None, told)
                continue
            vector = Vector(one, part, answer.model, answer.estimated, fallback=not own)
            self._vectors[row] = vector
            self._sent.add(row)
            if lead.flight is not None or ttl_s is not None:
                self._desk.land(lead, codec.pack_vector(vector), None, ttl_s)
        self._leads.clear()

    def give_up(self, told: bytes | None, error: GatewayError | None) -> None:
        """What has not landed is not going to; `told` says so to those whom `error` concerns."""
        concerns = len(self._keys) == 1 or isinstance(error, OF_THE_PROVIDER)
        for lead in self._leads.values():
            self._desk.land(lead, None, told if concerns else None)
        self._leads.clear()

    def even(self) -> bool:
        """Whether all vectors go together. If not, every text is ours to send, once.

        Raises ProviderError where the provider's own vectors differ in length.
        """
        there = [vector for vector in self._vectors if vector is not None]
        if len({(v.array.size, v.model if v.fallback else None) for v in there}) <= 1:
            return True
        if self._evened:
            raise ProviderError("the provider's vectors have different lengths")
        self._evened = True
        self._known.clear()
        self._refused.clear()
        self._leads = {row: self._alone(row) for row in range(len(self._keys))}
        return False

    def answer(self) -> Answer:
        """The list's vectors in its order, when all are there; zeros for those that failed.

        `prompt_tokens` counts each distinct text, and `cached_tokens` those of them that were not
        sent for this request.
        """
        there = {row: vector for row, vector in enumerate(self._vectors) if vector is not None}
        assert len(there) + len(self._refused) == len(self._keys), "every text has its vector"
        last = there[max(self._sent, default=min(there))]
        none = np.zeros_like(last.array)
        rows = np.stack([none if vector is None else vector.array for vector in self._vectors])
        tokens = sum(vector.tokens for vector in there.values())
        spared = tokens - sum(there[row].tokens for row in self._sent)
        usage: dict[str, Any] = {"prompt_tokens": tokens, "total_tokens": tokens}
        if spared:
            usage["prompt_tokens_details"] = {"cached_tokens": spared}
        return Answer(
            body={"object": "list", "model": last.model, "usage": usage},
            usage=usage,
            cost_nano=None,
            model=last.model,
            array=rows if len(rows) == len(self._rows) else rows[self._rows],
            estimated=any(vector.estimated for vector in there.values()),
        )

    def _alone(self, row: int) -> Lead:
        return self._desk.alone(self._keys[row], self._scope)

    async def _ask(self, rows: Sequence[int], read: bool, join: bool, patience_s: float) -> None:
        keys = [self._keys[row] for row in rows]
        found = await self._desk.ask(keys, self._scope, read=read, join=join, patience_s=patience_s)
        for row, one in zip(rows, found, strict=True):
            if isinstance(one, Hit):
                self._vectors[row] = codec.unpack_vector(one.value)
                self._known.add(row)
            elif isinstance(one, Follow):
                self._flights[row] = one.flight
            else:
                self._leads[row] = one


def _weight(text: Text) -> int:
    return len(text if isinstance(text, tuple) else text.encode("utf-8", "surrogatepass"))
