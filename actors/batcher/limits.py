"""What a provider takes in one call, where it says so while it refuses one.

Rule 1: words count only if they say less than was sent: a limit that was kept is no explanation.
Rule 2: what is said of a single text is no limit of a call; that text is found by bisection.
Rule 3: what was learnt is forgotten after LEARNT_S: it may have been another one's limit.

No clock and no event loop here: times are arguments.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from actors.batcher.policy import Caps

LEARNT_S = 3600.0
BYTES_LEAST = 64 * 1024
TOO_LARGE = 413
WORDS_MAX = 2000

_N = r"\D{0,24}?(\d[\d,_]*)"
_ITEMS = (
    r"(?:batch size|array (?:length|size)|number of (?:texts|inputs|items|instances|requests))"
    rf"[^.\d]{{0,60}}?(?:maximum|max|at most|limit|exceeds?|up to|less than or equal){_N}",
    rf"(?:at most|no more than|up to|maximum of|max(?:imum)?(?: of)?|limit of){_N}"
    r" (?:\w+ ){0,2}?(?:texts|inputs|items|instances|documents|embeddings|requests (?:can|in))",
    rf"max(?:imum)?(?: allowed)? (?:client )?batch size{_N}",
    rf"array[^.\d]{{0,60}}maximum length{_N}",
)
_MOST = r"(?:max(?:imum)?|limit|at most|up to)"
_CALL = r"(?:request|batch|call)"
_TOKENS = (
    rf"{_MOST}{_N} tokens? (?:per|in (?:a|one|each)) {_CALL}",
    rf"{_MOST}[^.\d]{{0,40}}tokens? per (?:\w+ )?{_CALL}{_N}",
    rf"tokens? in (?:the |a |this )?batch[^.\d]{{0,60}}?(?:{_MOST}|exceeds?|more than){_N}",
)
_OF_ONE_TEXT = re.compile(
    r"context length|each (?:text|input)|per (?:text|input)\b|this text", re.IGNORECASE
)
_FIND_ITEMS = [re.compile(pattern, re.IGNORECASE) for pattern in _ITEMS]
_FIND_TOKENS = [re.compile(pattern, re.IGNORECASE) for pattern in _TOKENS]


@dataclass(frozen=True, slots=True)
class Learnt:
    """Caps that a provider has named; None: it has not."""

    items_max: int | None = None
    tokens_max: int | None = None
    bytes_max: int | None = None

    def __bool__(self) -> bool:
        return any(cap is not None for cap in (self.items_max, self.tokens_max, self.bytes_max))


def learn(status: int, words: str, *, items: int, tokens: int, size: int) -> Learnt:
    """What a refusal says of the caps, given what was sent: texts, estimated tokens, bytes."""
    words = words[:WORDS_MAX]
    if items < 2:
        return Learnt()
    if _OF_ONE_TEXT.search(words) is None:
        named = _smallest(_FIND_ITEMS, words)
        if named is not None and 0 < named < items:
            return Learnt(items_max=named)
        named = _smallest(_FIND_TOKENS, words)
        if named is not None and 0 < named < tokens:
            return Learnt(tokens_max=named)
    if status == TOO_LARGE and size > BYTES_LEAST:
        return Learnt(bytes_max=max(BYTES_LEAST, size // 2))
    return Learnt()


def _smallest(patterns: list[re.Pattern[str]], words: str) -> int | None:
    found = [
        int(re.sub(r"\D", "", match.group(1)))
        for pattern in patterns
        for match in pattern.finditer(words)
    ]
    return min(found, default=None)


class LearntCaps:
    """Owns what one upstream has said of its caps. Bounded: three figures.

    Failure behaviour: what is forgotten is said again by the provider, for one refused call.
    """

    def __init__(self) -> None:
        self._learnt = Learnt()
        self._until_s = 0.0

    def note(self, learnt: Learnt, now_s: float) -> None:
        """The lowest that was named within LEARNT_S holds."""
        old = self._learnt if now_s < self._until_s else Learnt()
        self._learnt = Learnt(
            *(
                _lower(getattr(old, name), getattr(learnt, name))
                for name in ("items_max", "tokens_max", "bytes_max")
            )
        )
        self._until_s = now_s + LEARNT_S

    def under(self, caps: Caps, now_s: float) -> Caps:
        """The caps that hold: those given, and what was learnt where that is less."""
        if not self._learnt or now_s >= self._until_s:
            return caps
        told = self._learnt
        return replace(
            caps,
            items_max=_least(caps.items_max, told.items_max),
            tokens_max=_least(caps.tokens_max, told.tokens_max),
            bytes_max=_least(caps.bytes_max, told.bytes_max),
        )


def _lower(old: int | None, new: int | None) -> int | None:
    return min((cap for cap in (old, new) if cap is not None), default=None)


def _least(given: int, told: int | None) -> int:
    return given if told is None else min(given, told)
