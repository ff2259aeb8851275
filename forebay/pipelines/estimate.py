"""What a job will take, before money is spent: calls, tokens, cost and time, each as a range.

Rule 1: nothing is sent to find out. Tokens come from a sample of the texts and the tokenizer that
        is nearest to the model's, and a range says how near that is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forebay.pipelines.census import Census

CONFIDENCE = 1.96
"""Standard errors on both sides of a mean that hold it 19 times of 20."""
FOREIGN = 1.5
"""How much more than expected a count by another model's tokenizer allows for (see Tokenizers)."""


@dataclass(frozen=True, slots=True)
class Range:
    """The likely figure, and what it hardly falls below or exceeds."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Range:
        return Range(self.low * factor, self.likely * factor, self.high * factor)


@dataclass(frozen=True, slots=True)
class Rates:
    """What a deployment, or the best of a group, costs and allows; None: not known, not limited.

    nano-USD per token; requests and tokens per minute; most texts and tokens of one call.
    """

    prompt_nano: float | None
    completion_nano: float | None
    rpm: float | None = None
    tpm: float | None = None
    items_max: int = 2048
    tokens_max: int = 300_000


@dataclass(frozen=True, slots=True)
class Plan:
    """What a job will take. Times in seconds, money in USD, None where it is not known.

    `rows` are those of the source, of which `done` are there already, `empty` have no text, and
    `duplicates` repeat another row's: a text is paid for once while it is in the cache or on its
    way, so duplicates bring `tokens` towards their low end. `time_s` is what the limits of the
    deployments (and no others) ask for at least; None where they have none.
    """

    rows: int
    done: int
    empty: int
    duplicates: int
    tokens: Range
    completion_tokens: Range | None
    calls: int
    cost_usd: Range | None
    time_s: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def tokens_in(
    census: Census, counts: Sequence[tuple[int, int]], *, exact: bool, extra: float = 0.0
) -> Range:
    """Tokens of all texts, from (bytes, tokens) of a sample; `extra` for each row beside them.

    A ratio estimator with its standard error. `exact`: the counts are the model's own; else they
    are FOREIGN times too high. At the low end every duplicate is free.
    """
    rows = census.rows - census.empty
    size = sum(one for one, _ in counts)
    if not rows or not size:
        return Range(0, 0, 0)
    ratio = sum(tokens for _, tokens in counts) / size
    squares = sum((tokens - ratio * one) ** 2 for one, tokens in counts)
    n = len(counts)
    spread = math.sqrt(squares / max(n - 1, 1) / n) * rows if n < rows else 0.0
    high = ratio * census.size + rows * extra
    likely, low = (high, high) if exact else (high / FOREIGN, high / FOREIGN**2)
    unique = 1 - census.duplicates / rows
    error = CONFIDENCE * spread
    return Range(max(0.0, (low - error) * unique), likely, high + error)


def embedding_plan(census: Census, tokens: Range, rates: Rates, done: int) -> Plan:
    """The plan of an embedding job of which `done` rows are through."""
    left = _left(census, done)
    rows, tokens = (census.rows - census.empty) * left, tokens.times(left)
    calls = math.ceil(max(rows / rates.items_max, tokens.likely / rates.tokens_max))
    cost = None if rates.prompt_nano is None else tokens.times(rates.prompt_nano / 1e9)
    time_s = _time(calls, tokens.likely, rates)
    return Plan(
        census.rows, done, census.empty, census.duplicates,
        tokens, None, calls, cost, time_s,
    )  # fmt: skip


def chat_plan(census: Census, tokens: Range, answer: Range, rates: Rates, done: int) -> Plan:
    """The plan of a job that asks once for each row and gets `answer` tokens for it."""
    left = _left(census, done)
    calls = math.ceil((census.rows - census.empty) * left)
    tokens, out = tokens.times(left), answer.times(calls)
    cost = None
    if rates.prompt_nano is not None and rates.completion_nano is not None:
        sent, got = tokens.times(rates.prompt_nano / 1e9), out.times(rates.completion_nano / 1e9)
        cost = Range(sent.low + got.low, sent.likely + got.likely, sent.high + got.high)
    time_s = _time(calls, tokens.likely + out.likely, rates)
    return Plan(
        census.rows, done, census.empty, census.duplicates,
        tokens, out, calls, cost, time_s,
    )  # fmt: skip


def _left(census: Census, done: int) -> float:
    return max(0, census.rows - done) / census.rows if census.rows else 0.0


def _time(calls: float, tokens: float, rates: Rates) -> float | None:
    minutes = [
        amount / limit
        for amount, limit in ((calls, rates.rpm), (tokens, rates.tpm))
        if limit is not None
    ]
    return max(minutes) * 60 if minutes else None
