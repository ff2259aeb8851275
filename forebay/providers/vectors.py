"""Embeddings off the wire: one float32 array, checked, whatever form they came in.

128 vectors of 1536 numbers cost 0.1 ms to decode from base64, and 15 ms from JSON floats (with
LiteLLM's and OpenAI's objects around them, 10 and 340 ms).
"""

from __future__ import annotations

import binascii
from collections.abc import Sequence
from typing import Any

import numpy as np
import pybase64
from numpy.typing import NDArray

from forebay.errors import ResponseValidationError


def decoded(data: Sequence[Any], texts: int, dimensions: int | None) -> NDArray[np.float32]:
    """The vectors in the order of the texts, float32 of shape (texts, d).

    `data` holds OpenAI's objects `{"index", "embedding"}` in any order, their embeddings base64 of
    little-endian float32 or lists of numbers.

    Raises:
        ResponseValidationError: a vector is missing, doubled, of another length than the first or
            than `dimensions`, or holds what is not a finite number.
    """
    if len(data) != texts:
        raise ResponseValidationError(f"{len(data)} vectors came for {texts} texts")
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
    return array


def _row(embedding: Any) -> NDArray[np.float32]:
    try:
        if isinstance(embedding, str):
            return np.frombuffer(pybase64.b64decode(embedding, validate=True), "<f4")
        return np.asarray(embedding, dtype=np.float32).reshape(-1)
    except (ValueError, TypeError, binascii.Error):
        raise ResponseValidationError("vectors came in a form that is not known") from None
