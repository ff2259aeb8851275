"""The right answers: text, tokens, vectors and tool arguments as pure functions of the question.

A token here is a run of up to eight non-space characters with one space before it, or a single
space. It is no provider's tokenizer; it is exact, cheap, and the same in the simulator's usage
figures, in its streams (one chunk a token) and in the tests that check both.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from hashlib import blake2b, shake_256
from typing import Any

import numpy as np
from numpy.typing import NDArray

# fmt: off
WORDS = (
    "amber", "basin", "cedar", "delta", "ember", "fjord", "grove", "haven",
    "inlet", "jetty", "knoll", "lagoon", "meadow", "north", "ocean", "pebble",
    "quarry", "river", "sluice", "tarn", "upland", "valley", "weir", "yonder",
    "zephyr", "brook", "canal", "dune", "estuary", "flume", "gorge", "heath",
)
# fmt: on
ANSWER_TOKENS = 11

DIMENSIONS_BY_MODEL = {
    "text-embedding-3-small": 1536,
    "text-embedding-3-large": 3072,
    "text-embedding-ada-002": 1536,
    "gemini-embedding-001": 3072,
    "text-embedding-004": 768,
    "embed-english-v3.0": 1024,
    "embed-multilingual-v3.0": 1024,
    "embed-v4.0": 1536,
}
DIMENSIONS = 256
DIMENSIONS_MAX = 4096

_PIECE = re.compile(r"\s?\S{1,8}|\s")


def pieces(text: str) -> list[str]:
    """The tokens of a text; joined they are the text."""
    return _PIECE.findall(text)


def count_tokens(text: str) -> int:
    return len(_PIECE.findall(text))


def digest(text: str) -> str:
    """Sixteen hex digits that name the text."""
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def answer_text(prompt: str, tokens: int = ANSWER_TOKENS) -> str:
    """The answer to a prompt: exactly `tokens` tokens (at least 3) that begin with its digest."""
    seed = blake2b(prompt.encode("utf-8", "surrogatepass"), digest_size=8)
    raw = seed.digest()
    words = [WORDS[raw[i & 7] * (i + 1) & 31] for i in range(max(tokens - 3, 0))]
    return " ".join(["sim", seed.hexdigest(), *words])


def vector(text: str, dimensions: int = DIMENSIONS) -> NDArray[np.float32]:
    """The embedding of a text: `(dimensions,) float32`, unit length, different for each text.

    A shorter vector is the longer one's beginning, brought to unit length again, as OpenAI's
    `dimensions` does it.
    """
    raw = shake_256(text.encode("utf-8", "surrogatepass")).digest(2 * dimensions)
    values = np.frombuffer(raw, dtype="<i2").astype(np.float32)
    values /= np.float32(np.sqrt(np.dot(values, values)))
    return values


def vectors(texts: Sequence[str], dimensions: int) -> NDArray[np.float32]:
    """`(len(texts), dimensions) float32`, one row a text."""
    rows = np.empty((len(texts), dimensions), dtype=np.float32)
    for i, text in enumerate(texts):
        rows[i] = vector(text, dimensions)
    return rows


def dimensions_of(model: str) -> int:
    return DIMENSIONS_BY_MODEL.get(model.rsplit("/", 1)[-1], DIMENSIONS)


def tool_arguments(schema: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """Arguments that satisfy a tool's parameters schema, filled from the prompt."""
    properties = schema.get("properties")
    if not isinstance(properties, Mapping):
        return {}
    required = schema.get("required")
    names = required if isinstance(required, list) else list(properties)
    return {str(name): _value(properties.get(name), prompt, str(name)) for name in names}


def _value(schema: Any, prompt: str, name: str) -> Any:
    if not isinstance(schema, Mapping):
        return digest(prompt)
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return choices[0]
    number = int(digest(prompt + name)[:4], 16)
    match str(schema.get("type", "string")).lower():
        case "integer":
            return number
        case "number":
            return number / 4
        case "boolean":
            return number % 2 == 0
        case "array":
            return [_value(schema.get("items"), prompt, name)]
        case "object":
            return tool_arguments(schema, prompt)
        case _:
            return WORDS[number % len(WORDS)]
