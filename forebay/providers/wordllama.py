"""WordLlama embeddings, read from the installed wheel's files.

A text's vector is the mean of its tokens' vectors, cut to its first 64, 128 or 256 numbers (the
table was trained for that: Kusupati et al., "Matryoshka Representation Learning", 2022) and
brought to length 1. The package itself is never imported: doing so reconfigures logging, and its
own loader looks for the tokenizer in the wrong folder and then on the network.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from forebay.errors import ConfigurationError, InvalidRequest
from forebay.providers.wheels import Find, located, required

EMBED_MODEL = "wordllama-256"
INSTALL = "pip install tokenizers && pip install --no-deps wordllama==0.4.0.post1"
DIMENSIONS = (64, 128, 256)
HEADER_BYTES_MAX = 1 << 20
TOKENS_GATHERED_MAX = 16_384  # rows of the table held at once while averaging: 16 MB

_WEIGHTS = "weights/l2_supercat_256.safetensors"
_TOKENIZER = "tokenizers/l2_supercat_tokenizer_config.json"
_TENSOR = "embedding.weight"


class EmbedModel:
    """The table and the tokenizer; the constructor opens them (about 0.1 s).

    Owns one thread. The table is mapped, not read: processes of one machine share its 16 MB.
    Bounds: TOKENS_GATHERED_MAX rows in hand; the caller bounds the texts. Thread-safe.

    Failure behaviour: nothing is kept between calls; a cancelled call's work is finished and
    thrown away.

    Raises:
        ConfigurationError: the files or `tokenizers` are not installed.
    """

    def __init__(self, *, find: Find = importlib.util.find_spec) -> None:
        wanted: dict[str, Any] = {"model": EMBED_MODEL, "install": INSTALL, "find": find}
        weights = located("wordllama", _WEIGHTS, **wanted)
        words = located("wordllama", _TOKENIZER, **wanted)
        required("tokenizers", **wanted)
        from tokenizers import Tokenizer

        self._table = _mapped(weights)
        self._tokenizer = Tokenizer.from_file(str(words))
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="wordllama")

    async def embed(
        self, texts: Sequence[str], dimensions: int | None = None
    ) -> tuple[np.ndarray, int]:
        """Vectors of the texts, in their order, and the number of their tokens.

        Returns:
            float32 of shape (len(texts), dimensions), rows of length 1; a text without tokens has
            a row of zeros. And the tokens of all texts together.

        Raises:
            InvalidRequest: `dimensions` is not 64, 128 or 256.
        """
        width = _width(dimensions)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self.vectors, list(texts), width)

    def vectors(self, texts: list[str], width: int) -> tuple[np.ndarray, int]:
        """As `embed`, in the calling thread."""
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.array([len(one.ids) for one in encoded], dtype=np.int64)
        total = int(lengths.sum())
        ids = np.empty(total, dtype=np.int64)
        ends = np.cumsum(lengths)
        for one, length, end in zip(encoded, lengths, ends, strict=True):
            ids[end - length : end] = one.ids
        sums = np.zeros((len(texts), width), dtype=np.float32)
        owner = np.repeat(np.arange(len(texts)), lengths)
        for begin in range(0, total, TOKENS_GATHERED_MAX):
            part = slice(begin, begin + TOKENS_GATHERED_MAX)
            rows = self._table[ids[part], :width].astype(np.float32)
            texts_here, starts = np.unique(owner[part], return_index=True)
            sums[texts_here] += np.add.reduceat(rows, starts, axis=0)
        # The mean has the sum's direction, so the length alone is to be mended.
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        sums /= np.where(norms == 0.0, 1.0, norms)
        return sums, total

    def close(self) -> None:
        """Let go of the thread; texts that wait are dropped."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _width(dimensions: int | None) -> int:
    if dimensions is None:
        return DIMENSIONS[-1]
    if dimensions not in DIMENSIONS or isinstance(dimensions, bool):
        raise InvalidRequest.about(
            "dimensions",
            f"{EMBED_MODEL} has 64, 128 or 256 dimensions",
            model=EMBED_MODEL,
            provider="local",
        )
    return dimensions


def _mapped(path: Path) -> np.ndarray:
    """The one tensor of a safetensors file: 8 bytes of length, a JSON header, the data."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            tensor = json.loads(file.read(min(length, HEADER_BYTES_MAX)))[_TENSOR]
        if tensor["dtype"] != "F16":
            raise ValueError(tensor["dtype"])
        begin, _ = tensor["data_offsets"]
        return np.memmap(path, "<f2", "r", offset=8 + length + begin, shape=tuple(tensor["shape"]))
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is not WordLlama's table; install it again: {INSTALL}"
        ) from error
