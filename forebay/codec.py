"""Answers and errors as bytes, for the places that keep or carry them without looking inside.

An answer is a JSON header, its body's own JSON, which a hit sends on without a look inside, and
behind them the vectors as raw little-endian float32: a list of 1536 floats costs 3 ms to write as
JSON and nothing this way.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import orjson

from forebay import errors
from forebay.errors import GatewayError

_LENGTHS = struct.Struct("<II")
_VECTOR = struct.Struct("<IHB")
_ESTIMATED, _FALLBACK = 1, 2


@dataclass(slots=True)
class Answer:
    """What a provider answered, whole.

    `body` is OpenAI-shaped and JSON-able. For embeddings it has no vectors; they are `array`,
    float32 of shape (n, d). `cost_nano` is integer nano-USD, None when no price is known.
    `clamped` is the completion tokens that its tenant's limit left it, None where none did.
    `moderated`: the moderation's model was asked, and had nothing to say.
    `json` is the body as JSON while nobody has looked into it: `body` is parsed when it is read.
    """

    body: dict[str, Any]
    usage: dict[str, Any] | None
    cost_nano: int | None
    model: str
    array: np.ndarray | None = None
    estimated: bool = False
    clamped: int | None = None
    moderated: bool = False
    json: bytes | None = field(default=None, compare=False, repr=False)
    packed_id: str | None = field(default=None, compare=False, repr=False)

    @property
    def id(self) -> str:
        """The provider's name for it, "" where it gave none."""
        return str(self.body.get("id") or "") if self.packed_id is None else self.packed_id

    def __getattr__(self, name: str) -> Any:
        # Only what has no value yet is looked up here: the body of an answer made by `unpack`.
        if name != "body" or self.json is None:
            raise AttributeError(name)
        self.body, self.json = orjson.loads(self.json), None
        return self.body


def tokens_in(usage: Mapping[str, Any] | None) -> tuple[int, int]:
    """Prompt and completion tokens of a usage object; what it does not say is 0."""
    usage = usage or {}
    return int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)


def cached_in(usage: Mapping[str, Any] | None) -> int:
    """Prompt tokens that the provider had in a cache of its own, as its usage object says."""
    usage = usage or {}
    details = usage.get("prompt_tokens_details") or {}
    return int(details.get("cached_tokens") or usage.get("cache_read_input_tokens") or 0)


def costs_of(one_nano: int | None, other_nano: int | None) -> int | None:
    """What two calls cost together, in nano-USD; None where the price of one is not known."""
    return None if one_nano is None or other_nano is None else one_nano + other_nano


def pack(answer: Answer) -> bytes:
    """The answer as one byte string."""
    array = answer.array
    header = orjson.dumps(
        {
            "usage": answer.usage,
            "cost_nano": answer.cost_nano,
            "model": answer.model,
            "id": answer.id,
            "estimated": answer.estimated,
            "clamped": answer.clamped,
            "moderated": answer.moderated,
            "shape": None if array is None else array.shape,
        }
    )
    body = orjson.dumps(answer.body)
    vectors = b"" if array is None else np.ascontiguousarray(array, dtype="<f4").tobytes()
    return _LENGTHS.pack(len(header), len(body)) + header + body + vectors


def unpack(data: bytes) -> Answer:
    """The inverse of `pack`. The array is a read-only view into `data`."""
    header_bytes, body_bytes = _LENGTHS.unpack_from(data)
    body_at = _LENGTHS.size + header_bytes
    end = body_at + body_bytes
    header = orjson.loads(data[_LENGTHS.size : body_at])
    shape = header.pop("shape")
    array = None if shape is None else np.frombuffer(data, "<f4", offset=end).reshape(shape)
    name = header.pop("id", None)
    answer = Answer({}, **header, array=array, json=data[body_at:end], packed_id=name)
    del answer.body  # read when somebody asks for it
    return answer


@dataclass(slots=True)
class Vector:
    """One text's vector, float32 of shape (d,), and the tokens that the text is.

    `fallback`: it is another model's than the one that was asked for.
    """

    array: np.ndarray
    tokens: int
    model: str
    estimated: bool = False
    fallback: bool = False


def pack_vector(vector: Vector) -> bytes:
    """The vector as one byte string: four bytes a number, and a few for the rest."""
    model = vector.model.encode()
    flags = _ESTIMATED * vector.estimated | _FALLBACK * vector.fallback
    head = _VECTOR.pack(vector.tokens, len(model), flags)
    return head + model + np.ascontiguousarray(vector.array, dtype="<f4").tobytes()


def unpack_vector(data: bytes) -> Vector:
    """The inverse of `pack_vector`. The array is a read-only view into `data`."""
    tokens, length, flags = _VECTOR.unpack_from(data)
    end = _VECTOR.size + length
    array = np.frombuffer(data, "<f4", offset=end)
    model = data[_VECTOR.size : end].decode()
    return Vector(array, tokens, model, bool(flags & _ESTIMATED), bool(flags & _FALLBACK))


def pack_error(error: GatewayError) -> bytes:
    """The error as JSON: its class's name and its fields, but for the figures of a moment and the
    facts of a request."""
    fields = {**error.__dict__, "figures": None}
    fields.pop("facts", None)
    return orjson.dumps({"class": type(error).__name__, **fields})


def unpack_error(data: bytes) -> GatewayError:
    """The inverse of `pack_error`."""
    fields = orjson.loads(data)
    cls = getattr(errors, fields.pop("class"))
    error: GatewayError = cls(fields["message"])
    error.__dict__.update(fields)
    return error
