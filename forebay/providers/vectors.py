"""Embeddings off the wire: one float32 array, checked, whatever form they came in.

128 vectors of 1536 numbers cost 0.5 ms from base64 and 8 ms from JSON's floats; with LiteLLM's and
OpenAI's objects made of each of them, 10 and 300 ms.
"""

from __future__ import annotations

import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Self

import httpx
import numpy as np
import orjson
import pybase64
from numpy.typing import NDArray

from forebay.errors import ResponseValidationError

LARGEST = 1e6
SPREAD = 1e-7
WIDE_SHARE = 0.05
"""Of float32 vectors all numbers are below LARGEST, and at most this share of those that are not 0
is below SPREAD times the largest. Bytes that mean something else read as all sizes there are."""


def decoded(
    data: Sequence[Any], texts: int, dimensions: int | None, *, doubted: bool = False
) -> NDArray[np.float32]:
    """The vectors in the order of the texts, float32 of shape (texts, d).

    `data` holds OpenAI's objects `{"index", "embedding"}` in any order, their embeddings base64 of
    little-endian float32 or lists of numbers. With `doubted`, base64 may be something else.

    Raises:
        ResponseValidationError: a vector is missing, doubled, of another length than the first or
            than `dimensions`, or holds what is not a finite number; or what was doubted looks like
            no float32.
    """
    if not isinstance(data, Sequence) or len(data) != texts:
        came = len(data) if isinstance(data, Sequence) else "no"
        raise ResponseValidationError(f"{came} vectors came for {texts} texts")
    array: NDArray[np.float32] | None = None
    filled = bytearray(texts)
    for place, item in enumerate(data):
        index = item.get("index")
        index = place if index is None else index
        if not isinstance(index, int) or not 0 <= index < texts or filled[index]:
            raise ResponseValidationError("vectors came with missing or doubled indices")
        filled[index] = 1
        row = _row(item.get("embedding"))
        if array is None:
            array = np.empty((texts, len(row)), dtype=np.float32)
            if len(row) == 0 or (dimensions is not None and len(row) != dimensions):
                raise ResponseValidationError(
                    f"vectors of {len(row)} numbers came"
                    + ("" if dimensions is None else f" where {dimensions} were asked for")
                )
        if len(row) != array.shape[1]:
            raise ResponseValidationError("vectors of different lengths came")
        array[index] = row
    if array is None:
        return np.empty((0, dimensions or 0), dtype=np.float32)
    if not np.isfinite(array).all():
        raise ResponseValidationError("vectors came with numbers that are not finite")
    if doubted and not looks_like_float32(array):
        raise ResponseValidationError("what came as base64 is no float32")
    return array


def looks_like_float32(array: NDArray[np.float32]) -> bool:
    """Whether these can be a model's numbers, and not bytes of another type read as float32.

    Quantised vectors (int8, bits), float16 and float64 read as numbers of all sizes, or as whole
    ones where they came as a list.
    """
    sizes = np.abs(array[array != 0])
    if sizes.size == 0:
        return False
    largest = float(sizes.max())
    if not LARGEST**-1 < largest < LARGEST:
        return False
    if np.array_equal(array, np.rint(array)):
        return False
    small = int(np.count_nonzero(sizes < SPREAD * largest))
    return small <= WIDE_SHARE * int(sizes.size)


class VectorsAside:
    """As much of an openai client as LiteLLM asks of one for embeddings; keeps the vectors itself.

    The client below and LiteLLM make objects of each vector, or of each number, and copy them
    several times. They are handed an answer without vectors, which are in `data`: for one call.

    Failure behaviour: the client's own; a body that is no JSON object is a ValueError, as it is
    there.
    """

    def __init__(self, client: Any) -> None:
        self.data: Any = None
        self._client = client

    @property
    def embeddings(self) -> Self:
        return self

    @property
    def with_raw_response(self) -> Self:
        return self

    async def create(
        self,
        *,
        timeout: Any,
        extra_headers: Mapping[str, str] | None = None,
        extra_query: Mapping[str, Any] | None = None,
        extra_body: Mapping[str, Any] | None = None,
        **asked: Any,
    ) -> _Told:
        options: dict[str, Any] = {"timeout": timeout}
        given = {"headers": extra_headers, "params": extra_query, "extra_json": extra_body}
        options |= {name: value for name, value in given.items() if value is not None}
        response = await self._client.post(
            "/embeddings", body=asked, options=options, cast_to=httpx.Response
        )
        answer = orjson.loads(response.content)
        if not isinstance(answer, dict):
            raise ValueError("the answer is no JSON object")
        self.data = answer.get("data")
        return _Told(response.headers, {"object": "list", "model": "", **answer, "data": []})


class _Told:
    """An answer as LiteLLM takes it of an openai client: headers, and `parse().model_dump()`."""

    def __init__(self, headers: Mapping[str, str], answer: dict[str, Any]) -> None:
        self.headers = headers
        self._answer = answer

    def parse(self) -> Self:
        return self

    def model_dump(self) -> dict[str, Any]:
        return self._answer


def _row(embedding: Any) -> NDArray[np.float32]:
    try:
        if isinstance(embedding, str):
            return np.frombuffer(pybase64.b64decode(embedding, validate=True), "<f4")
        return np.asarray(embedding, dtype=np.float32).reshape(-1)
    except (ValueError, TypeError, binascii.Error):
        raise ResponseValidationError("vectors came in a form that is not known") from None
