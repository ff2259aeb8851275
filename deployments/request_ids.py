"""Names for requests that come without one."""

from __future__ import annotations

import os
from collections.abc import Callable

ID_BYTES = 16
SHARED_BYTES = 4
IDS_DRAWN = 256


class RequestIds:
    """Gives request ids that nobody can guess: 96 random bits after 32 that the ids of one draw
    share. What lies together in the ledger's index is then written together.

    Owns up to IDS_DRAWN that nobody has yet, since asking the system for each one alone costs more
    than all the rest of it.
    """

    def __init__(self, random: Callable[[int], bytes] = os.urandom) -> None:
        self._random = random
        self._drawn: list[str] = []

    def __call__(self) -> str:
        if not self._drawn:
            drawn = self._random(IDS_DRAWN * ID_BYTES).hex()
            shared = 2 * SHARED_BYTES
            self._drawn = [
                f"req_{drawn[:shared]}{drawn[start + shared : start + 2 * ID_BYTES]}"
                for start in range(0, len(drawn), 2 * ID_BYTES)
            ]
        return self._drawn.pop()
