"""What providers say is left of their limits, in the headers of an answer.

OpenAI's names (Azure, Mistral, Groq and others have them too): `x-ratelimit-remaining-requests` and
`-tokens`, and `x-ratelimit-reset-…`, a time such as `1s`, `6m0s`, `120ms` or `12.5` (seconds).
LiteLLM hands them on with `llm_provider-` before their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from actors.batcher.policy import Room

RESET_S = 1.0
"""How long a limit of nothing is taken to last where the provider does not say."""
_PREFIX = "llm_provider-"
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}
_SPAN = re.compile(r"(?:\d+(?:\.\d+)?(?:ms|s|m|h|d))+")
_STEP = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")


def room_in(headers: Mapping[str, Any]) -> Room | None:
    """What is left, and until when; None where the headers do not say."""
    told = {str(name).lower().removeprefix(_PREFIX): value for name, value in headers.items()}
    requests, tokens = (_count(told, what) for what in ("requests", "tokens"))
    if requests is None and tokens is None:
        return None
    waits_s = [
        _span_s(told.get(f"x-ratelimit-reset-{what}"))
        for what, left in (("requests", requests), ("tokens", tokens))
        if left == 0
    ]
    return Room(requests, tokens, max(waits_s, default=0.0))


def _count(told: Mapping[str, Any], what: str) -> int | None:
    value = str(told.get(f"x-ratelimit-remaining-{what}", ""))
    return int(value) if value.isascii() and value.isdigit() else None


def _span_s(value: Any) -> float:
    words = str(value or "").strip()
    if re.fullmatch(r"\d{1,9}(?:\.\d{1,9})?", words):
        return float(words)
    if len(words) > 40 or not _SPAN.fullmatch(words):
        return RESET_S
    return sum(float(number) * _UNITS_S[unit] for number, unit in _STEP.findall(words))
