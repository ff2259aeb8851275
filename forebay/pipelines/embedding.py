"""Vectors for a column of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from forebay.errors import GatewayError, ProviderError
from forebay.pipelines.account import Done, alike
from forebay.pipelines.patience import Patience
from forebay.pipelines.system import answer as ask
from forebay.pipelines.system import most_nano_of_texts
from forebay.pipelines.vectors import EMPTY, Got, Rows, embed_rows

if TYPE_CHECKING:
    from forebay.gateway import LiteLLMGateway

EMBEDDING, ERROR, TOKENS = "embedding", "embedding_error", "tokens"
COLUMNS = (EMBEDDING, ERROR, TOKENS)


@dataclass(frozen=True, slots=True)
class EmbedWork:
    """How a block is embedded."""

    text_column: str
    model: str | None
    tenant_id: str | None = None
    dimensions: int | None = None
    raises: bool = False
    patience_s: float = 600.0
    anew: bool = False
    error_column: str = ERROR

    def again(self) -> EmbedWork:
        return replace(self, anew=True)

    def texts(self, table: pa.Table) -> list[str | None]:
        texts: list[str | None] = table[self.text_column].to_pylist()
        return texts

    def most_nano(self, gateway: LiteLLMGateway, table: pa.Table) -> int:
        return most_nano_of_texts(gateway, self.model, self.texts(table))

    async def run(
        self, gateway: LiteLLMGateway, table: pa.Table, doubtful: bool
    ) -> tuple[pa.Table, Done, GatewayError | None]:
        texts = self.texts(table)

        async def send(words: Sequence[str], partial: bool) -> Got:
            return await self._send(gateway, words, partial)

        patience = Patience.of(self.patience_s, doubtful)
        rows = await embed_rows(texts, send, patience, doubtful=doubtful)
        sent = [text for text in texts if text]
        refusals = [words for words in rows.errors if words not in (None, EMPTY)]
        done = Done(
            sum(vector is not None for vector in rows.vectors) + _failed(rows),
            _failed(rows),
            sum(rows.tokens),
            rows.cost_nano,
            rows.cached,
            len(sent) - len(set(sent)),
            len(refusals),
            alike(refusals),
        )
        return _with_columns(table, rows), done, rows.halted

    def nothing(self, table: pa.Table) -> pa.Table:
        return _with_columns(table.slice(0, 0), Rows.of(0))

    async def _send(self, gateway: LiteLLMGateway, words: Sequence[str], partial: bool) -> Got:
        body = {"input": list(words), "model": self.model, "dimensions": self.dimensions}
        if self.tenant_id is not None:
            body["tenant_id"] = self.tenant_id
        result = await ask(gateway, "embedding", body, partial=partial, anew=self.anew)
        answer, facts = result.answer, result.facts
        assert answer.array is not None, "an embedding answer carries vectors"
        if facts.fallbacks:
            # Retried until the model that was asked for is back: two models' vectors never mix.
            raise ProviderError(f"a fallback answered for {facts.group}; its vectors are not used")
        tokens = int((answer.usage or {}).get("prompt_tokens") or 0)
        return Got(answer.array, tokens, facts.cost_nano, facts.cached, dict(facts.failed))


def _failed(rows: Rows) -> int:
    return sum(error is not None for error in rows.errors)


def _with_columns(table: pa.Table, rows: Rows) -> pa.Table:
    """The block with its new columns, without the rows that were not sent."""
    known = [
        place
        for place, (vector, error) in enumerate(zip(rows.vectors, rows.errors, strict=True))
        if vector is not None or error is not None
    ]
    if len(known) < table.num_rows:
        table = table.take(pa.array(known, pa.int64()))
    vectors = [rows.vectors[place] for place in known]
    errors = [rows.errors[place] for place in known]
    tokens = [rows.tokens[place] for place in known]
    table = table.append_column(EMBEDDING, fixed_size(vectors))
    table = table.append_column(ERROR, pa.array(errors, pa.string()))
    return table.append_column(TOKENS, pa.array(tokens, pa.int64()))


def fixed_size(vectors: Sequence[Any]) -> pa.Array:
    """Vectors as Arrow's FixedSizeList<float>, null where there is none; all null, of no type."""
    size = next((len(vector) for vector in vectors if vector is not None), None)
    if size is None:
        return pa.nulls(len(vectors))
    flat = np.zeros((len(vectors), size), np.float32)
    missing = np.zeros(len(vectors), bool)
    for row, vector in enumerate(vectors):
        if vector is None:
            missing[row] = True
        else:
            flat[row] = vector
    mask = pa.array(missing) if missing.any() else None
    return pa.FixedSizeListArray.from_arrays(pa.array(flat.reshape(-1)), size, mask=mask)
