"""How many tokens a text is at most, by OpenAI's tokenizers as LiteLLM brings them along.

Rule 1: nothing is fetched: an encoding whose file is not there is one we do not have.
"""

from __future__ import annotations

import hashlib
import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from forebay.routing import Deployment

NEWER, OLDER = "o200k_base", "cl100k_base"
FACTOR = 1.5
"""How many more tokens than OpenAI's another tokenizer makes of text in ASCII, with room."""

OPENAI = frozenset({"openai", "azure", "text-completion-openai"})
_BY_NAME = (
    (re.compile(r"^(ft:)?(gpt-4o|gpt-4\.[15]|gpt-[5-9]|chatgpt-4o|o[134](-|$))"), NEWER),
    (re.compile(r"^(ft:)?(gpt-4(-|$)|gpt-3\.?5|text-embedding-|davinci-002|babbage-002)"), OLDER),
)


class Tokenizers:
    """OpenAI's encodings. Owns nothing that grows.

    Failure behaviour: without an encoding it has no count (None), and the bytes count.
    """

    def __init__(self, encodings: Mapping[str, Any]) -> None:
        self._encodings = encodings

    @classmethod
    def bundled(cls) -> Self:
        """Those that came with LiteLLM, which has to be imported by now. Takes 0.3 s."""
        importlib.import_module("litellm.litellm_core_utils.default_encoding")
        folder = Path(importlib.import_module("litellm").__file__ or "").parent
        folder /= "litellm_core_utils/tokenizers"
        tiktoken = importlib.import_module("tiktoken")
        return cls(
            {
                name: tiktoken.get_encoding(name)
                for name in (NEWER, OLDER)
                if (folder / _file_of(name)).is_file()
            }
        )

    def count(self, deployment: Deployment, text: str) -> int | None:
        """An upper bound of the tokens that the deployment makes of a text."""
        name = encoding_of(deployment)
        encoding = self._encodings.get(name or NEWER)
        if encoding is None:
            return None
        tokens = len(encoding.encode_ordinary(text))
        if name is not None:
            return tokens
        size = len(text.encode("utf-8", "surrogatepass"))
        beyond = size - len(text.encode("ascii", "ignore"))
        return min(size, int(tokens * FACTOR) + 1 + beyond)


def encoding_of(deployment: Deployment) -> str | None:
    """The name of a model's encoding, if it is OpenAI's."""
    if deployment.provider not in OPENAI:
        return None
    base = deployment.info.get("base_model") or deployment.params.get("base_model")
    model = (base if isinstance(base, str) else deployment.model).rpartition("/")[2]
    return next((name for regex, name in _BY_NAME if regex.search(model)), None)


def _file_of(name: str) -> str:
    """tiktoken names a file in its cache by the hash of the address it is fetched from."""
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    return hashlib.sha1(url.encode(), usedforsecurity=False).hexdigest()
