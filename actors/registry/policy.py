"""What a version of the configuration is, and how putting one can fail."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

CONFIG_KEY = "config"  # the one key that the Registry publishes
LOCK_WAIT_S = 10.0  # the process of an owner that was replaced may still be dying
DOCUMENT_BYTES_MAX = 8 * 2**20
NOTE_CHARS_MAX = 500
VERSIONS_MAX = 1_000  # versions kept; older ones are forgotten, their numbers never used again
PUTS_MAX = 10_000  # put ids kept


@dataclass(frozen=True, slots=True)
class Version:
    """One version in the history. `at_ms` is UTC epoch milliseconds; `digest` is of the document.

    The digest is blake2b-128 over the canonical JSON, in hex.
    """

    version: int
    at_ms: int
    note: str
    digest: str


@dataclass(frozen=True, slots=True)
class Head:
    """The newest version: its number (0 when there is none yet) and its canonical JSON."""

    version: int = 0
    text: str = "{}"

    def document(self) -> dict[str, Any]:
        """The document, each time a new object."""
        return dict(json.loads(self.text))


class VersionConflict(Exception):
    """The document was made for version `expected`, but the newest one is `current`."""

    def __init__(self, expected: int, current: int) -> None:
        super().__init__(expected, current)
        self.expected, self.current = expected, current

    def __str__(self) -> str:
        return (
            f"version {self.expected} was expected, but the newest is {self.current}: "
            "look at it, and put the document again for that version"
        )


class InvalidDocument(ValueError):
    """The document is not plain JSON, or it is too large. Nothing was stored."""


class RegistryUnavailable(Exception):
    """The Registry's file cannot be used: somebody else has it, it is damaged, the disk is full.

    Whether a `put` that failed so was stored is known by putting it again with the same id.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"the registry's file {self.path} cannot be used: {self.reason}"


def canonical(document: Mapping[str, Any]) -> str:
    """The document as JSON, the same text for equal documents (keys sorted, ASCII, no spaces).

    Raises:
        InvalidDocument: it is no JSON object, or has more than `DOCUMENT_BYTES_MAX` bytes.
    """
    if not isinstance(document, Mapping):
        raise InvalidDocument(f"a configuration is a mapping, not {type(document).__name__}")
    try:
        text = json.dumps(dict(document), sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDocument(f"a configuration must be plain JSON: {error}") from None
    if len(text) > DOCUMENT_BYTES_MAX:
        raise InvalidDocument(f"a configuration of {len(text)} bytes is over {DOCUMENT_BYTES_MAX}")
    return text


def digest(text: str) -> str:
    """blake2b-128 of canonical JSON, in hex."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
