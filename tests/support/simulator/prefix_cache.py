"""A provider's prompt cache: which tokens of a prompt it need not read again.

OpenAI's dialect caches by itself, in blocks of 16 tokens, as vLLM does. Anthropic's caches up to a
mark (`cache_control`) of at least 1,024 tokens, and finds again what ended up to 20 blocks before.
Both drop what was used least.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from tests.support.simulator.truth import count_tokens, pieces

BLOCK_TOKENS = 16
MARKED_TOKENS_MIN = 1024
LOOK_BACK_BLOCKS = 20
MARKS_MAX = 4


class Served(NamedTuple):
    """Tokens of one prompt that were cached, and that were written to the cache for the next."""

    cached: int
    written: int
    marks: int


class PrefixCache:
    """Owns the digests of beginnings and their tokens, `tokens_max` in all."""

    def __init__(self, tokens_max: int) -> None:
        self._tokens_max = tokens_max
        self._sizes: OrderedDict[bytes, int] = OrderedDict()
        self._tokens = 0

    def serve_blocks(self, model: str, body: dict[str, Any]) -> Served:
        """By itself: whole blocks of text, from the start."""
        digest = blake2b(model.encode())
        text = "\0".join(text for _, text, _ in _parts(body))
        tokens = pieces(text)
        cached, missed = 0, False
        for start in range(0, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            digest.update("".join(tokens[start : start + BLOCK_TOKENS]).encode())
            key = digest.digest()
            missed = missed or key not in self._sizes
            cached += 0 if missed else BLOCK_TOKENS
            self._keep(key, BLOCK_TOKENS)
        return Served(cached, 0, 0)

    def serve_marks(self, model: str, body: dict[str, Any]) -> Served:
        """Up to the marks."""
        digest = blake2b(model.encode())
        ends: list[tuple[bytes, int]] = []
        marks: list[int] = []
        total = 0
        for kind, text, marked in _parts(body):
            digest.update(f"\0{kind}\0{text}".encode())
            total += count_tokens(text)
            if marked:
                marks.append(len(ends))
            ends.append((digest.digest(), total))
        cached = written = 0
        for mark in marks:
            for key, size in reversed(ends[max(0, mark - LOOK_BACK_BLOCKS) : mark + 1]):
                if key in self._sizes:
                    cached = max(cached, size)
                    self._keep(key, 0)
                    break
        for mark in marks:
            key, size = ends[mark]
            if size >= MARKED_TOKENS_MIN and key not in self._sizes:
                written = max(written, size - cached)
                self._keep(key, max(1, size - cached))
        return Served(cached, written, len(marks))

    def _keep(self, key: bytes, size: int) -> None:
        if key in self._sizes:
            self._sizes.move_to_end(key)
            return
        self._sizes[key] = size
        self._tokens += size
        while self._tokens > self._tokens_max:
            self._tokens -= self._sizes.popitem(last=False)[1]


def _parts(body: dict[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Tools, system and messages in the order in which they are read: kind, text, marked."""
    for tool in body.get("tools") or ():
        plain = {name: value for name, value in tool.items() if name != "cache_control"}
        yield "tool", orjson.dumps(plain).decode(), "cache_control" in tool
    told = [("system", body.get("system"))] if body.get("system") else []
    told += [(str(m["role"]), m.get("content")) for m in body.get("messages") or ()]
    for role, content in told:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        for part in parts:
            plain = {name: value for name, value in part.items() if name != "cache_control"}
            is_text = isinstance(part.get("text"), str)
            text = part["text"] if is_text else orjson.dumps(plain).decode()
            yield role, text, "cache_control" in part
