"""What callers get back: plain values, JSON-able, picklable."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, computed_field
from pydantic_core import CoreSchema, core_schema

Vectors = npt.NDArray[np.float32]


class Usage(dict[str, Any]):
    """Token counts as the provider reports them, readable as items and as attributes.

    >>> Usage(prompt_tokens=3).prompt_tokens
    3

    A field the provider did not report raises AttributeError (KeyError as an item). Nested objects
    read the same way: `usage.completion_tokens_details.reasoning_tokens`.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Usage(value) if type(value) is dict else value

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[Any], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        counts = core_schema.dict_schema(core_schema.str_schema(), core_schema.any_schema())
        return core_schema.no_info_after_validator_function(
            cls,
            counts,
            serialization=core_schema.plain_serializer_function_ser_schema(dict),
        )


class GenerateResponse(BaseModel):
    """One generated answer.

    `text` is "" when only tool calls came; `raw_response` is the whole OpenAI-shaped body. `model`
    is the provider's own word. `cost_usd` is 0 where no price is known.
    """

    model_config = ConfigDict(extra="forbid")

    text: str
    model: str
    usage: Usage | None = None
    finish_reason: str | None = None
    raw_response: dict[str, Any] = Field(default_factory=dict)
    id: str | None = None
    cached: bool = False
    cost_usd: float = 0.0
    warnings: list[str] = Field(default_factory=list)

    @classmethod
    def of(
        cls,
        body: dict[str, Any],
        *,
        cached: bool = False,
        cost_nano: int | None = None,
        warnings: Sequence[str] = (),
    ) -> GenerateResponse:
        """The answer in an OpenAI body (chat or text); the first choice is the text."""
        choice: Mapping[str, Any] = next(iter(body.get("choices") or ()), {})
        message: Mapping[str, Any] = choice.get("message") or {}
        return cls(
            text=message.get("content") or choice.get("text") or "",
            model=body.get("model") or "",
            usage=body.get("usage"),
            finish_reason=choice.get("finish_reason"),
            raw_response=body,
            id=body.get("id"),
            cached=cached,
            cost_usd=(cost_nano or 0) / 1e9,
            warnings=list(warnings),
        )


class EmbedResponse(BaseModel):
    """Vectors in the caller's order.

    `array` has shape (n, d), float32, and is the array that was given, not a copy. `embeddings` is
    the same as a list of lists of float, made anew each time it is read. `cached` says how many of
    the vectors came from the cache.

    >>> EmbedResponse(embeddings=[[0.5, 1.0]], model="m").array.shape
    (1, 2)
    """

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    array: Vectors = Field(exclude=True, repr=False)
    model: str
    usage: Usage | None = None
    cost_usd: float = 0.0
    cached: int = 0

    def __init__(
        self,
        *,
        model: str,
        array: Vectors | None = None,
        embeddings: Sequence[Sequence[float]] | None = None,
        **fields: Any,
    ) -> None:
        if (array is None) == (embeddings is None):
            raise ValueError("give either array or embeddings")
        vectors = np.asarray(embeddings if array is None else array, dtype=np.float32)
        super().__init__(model=model, array=vectors, **fields)

    @computed_field(repr=False)  # type: ignore[prop-decorator]
    @property
    def embeddings(self) -> list[list[float]]:
        """The vectors as lists of Python floats."""
        vectors: list[list[float]] = self.array.tolist()
        return vectors

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EmbedResponse):
            return NotImplemented
        mine = (self.model, self.usage, self.cost_usd, self.cached)
        theirs = (other.model, other.usage, other.cost_usd, other.cached)
        return mine == theirs and np.array_equal(self.array, other.array)

    __hash__ = None  # type: ignore[assignment]


class HealthStatus(StrEnum):
    """What a health check concludes."""

    HEALTHY = "healthy"
    DEGRADED = "degraded"
    UNHEALTHY = "unhealthy"
    UNKNOWN = "unknown"


class HealthCheckResult(BaseModel):
    """A health check: the conclusion, what it rests on, and how long it took."""

    model_config = ConfigDict(extra="forbid")

    status: HealthStatus
    details: dict[str, Any] = Field(default_factory=dict)
    message: str = ""
    timestamp: datetime
    response_time_ms: float = 0.0
