"""A request as it comes in, and what is told of its answer: what every door and step speaks of."""

from __future__ import annotations

import math
import uuid
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

from forebay.codec import Answer
from forebay.config import LIFETIME_S_MAX
from forebay.errors import InvalidRequest
from forebay.tenants import DEFAULT_TENANT

Route = Literal["chat", "completion", "embedding"]

KEY_CHARS_MAX = 255


@dataclass(slots=True)
class Call:
    """One request as it came in, from whichever door.

    `body` holds OpenAI's parameters of the route, verbatim. `timeout_s` can only shorten the
    configured deadline. `may_wait` lets a limit queue the request instead of refusing it. Calls of
    a tenant with the same `idempotency_key` are one, and have one answer. Of a `partial` list of
    texts those that the provider refuses fail alone, in Facts.failed; `anew` texts are asked for
    even where it has refused them lately.
    """

    route: Route
    body: dict[str, Any]
    tenant: str
    request_id: str
    timeout_s: float | None = None
    may_wait: bool = False
    cache_read: bool = True
    cache_write: bool = True
    cache_ttl_s: float | None = None
    bulk: bool = False
    partial: bool = False
    anew: bool = False
    trace_parent: str | None = None  # W3C's, of the trace that it is a part of
    idempotency_key: str | None = None

    @classmethod
    def of(cls, route: Route, keywords: Mapping[str, Any]) -> Self:
        """A call from Python: OpenAI's parameters, and ours among them.

        Ours are `tenant_id`, `idempotency_key`, `timeout` and `cache_ttl` (seconds), and `cache`:
        False for neither
        reading nor storing, or LiteLLM's {"no-cache": True, "no-store": True, "ttl": seconds}. A
        parameter that is None is as if it had not been given.

        Raises:
            InvalidRequest: one of ours has a wrong value.
        """
        body = {name: value for name, value in keywords.items() if value is not None}
        tenant = body.pop("tenant_id", DEFAULT_TENANT)
        timeout_s, cache_ttl_s = body.pop("timeout", None), body.pop("cache_ttl", None)
        wishes = _wishes(body.pop("cache", True))
        key = body.pop("idempotency_key", None)
        if wishes.get("ttl") is not None:
            cache_ttl_s = wishes["ttl"]
        times = ("timeout", timeout_s, math.inf), ("cache_ttl", cache_ttl_s, LIFETIME_S_MAX)
        for name, seconds, most in times:
            number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
            if seconds is not None and not (number and 0 < seconds <= most):
                end = "" if most == math.inf else f", {most} at most"
                raise InvalidRequest.about(
                    name, f"{name} must be a positive number of seconds{end}"
                )
        if not isinstance(tenant, str) or not tenant:
            raise InvalidRequest.about("tenant_id", "tenant_id must be a non-empty string")
        return cls(
            route,
            body,
            tenant,
            request_id=f"req_{uuid.uuid4().hex}",
            timeout_s=timeout_s,
            may_wait=True,
            cache_read=not (wishes.get("no-cache") or wishes.get("no-store")),
            cache_write=not wishes.get("no-store"),
            cache_ttl_s=cache_ttl_s,
            idempotency_key=None if key is None else checked_key(key, "idempotency_key"),
        )


def checked_key(key: object, name: str) -> str:
    """An idempotency key as its client gave it, under this name. Raises InvalidRequest."""
    fits = isinstance(key, str) and 0 < len(key) <= KEY_CHARS_MAX
    if not (isinstance(key, str) and fits and key.isascii() and key.isprintable()):
        raise InvalidRequest.about(
            name, f"{name} must be 1 to {KEY_CHARS_MAX} printable ASCII characters."
        )
    return key


def _wishes(cache: Any) -> dict[str, Any]:
    """What a request says of the cache, in LiteLLM's words."""
    if isinstance(cache, bool):
        return {} if cache else {"no-store": True}
    kinds = {"no-cache": bool, "no-store": bool, "ttl": object}
    if isinstance(cache, Mapping) and all(
        isinstance(value, kinds.get(name, ())) for name, value in cache.items()
    ):
        return dict(cache)
    raise InvalidRequest.about(
        "cache", 'cache must be True, False, or hold "no-cache", "no-store" (bool) and "ttl" only'
    )


@dataclass(slots=True)
class Facts:
    """How an answer came to be; what the response headers tell."""

    group: str
    deployment: str = ""
    attempts: int = 0
    retries: int = 0
    fallbacks: int = 0
    cache: Literal["hit", "miss", "joined", "off"] = "off"
    cached: int = 0  # vectors that came from the cache
    cost_nano: int | None = 0
    saved_nano: int = 0  # what it would have cost, where it cost nothing
    response_id: str = ""  # the answer's own, where somebody else was asked for it
    cache_key: str = ""  # hexadecimal: what the cache has the answer under, if it does
    booked: bool = False  # the ledger has it, though no provider was asked
    replayed: bool = False  # it is what a request with the same key was answered before
    provider_s: float = 0.0
    total_s: float = 0.0
    config_version: int = 0
    clamped: int | None = None  # completion tokens that a limit left, where it left less than asked
    failed: tuple[tuple[int, Exception], ...] = ()  # positions of a partial list, and why
    warnings: list[str] = field(default_factory=list)

    @property
    def overhead_s(self) -> float:
        return max(0.0, self.total_s - self.provider_s)


@dataclass(slots=True)
class Result:
    """An answer and how it came to be."""

    answer: Answer
    facts: Facts


@dataclass(slots=True)
class Stream:
    """A stream whose first chunk has arrived. Close `chunks` to stop the provider."""

    chunks: AsyncGenerator[dict[str, Any], None]
    facts: Facts
