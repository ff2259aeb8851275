"""Which texts travel together.

Rule 1: a call never exceeds a cap. Only a text that is over a cap by itself goes out all the same,
        alone: the provider knows best whether it takes it.
Rule 2: order is kept: what does not fit any more ends the call, nothing overtakes it.
Rule 3: a call that one text spoils is halved where one caller's texts end and another's begin, as
        near to the middle as there is such a place: who is innocent is asked for once again.

No clock and no event loop here.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from actors.batcher.policy import Caps, Text

BYTES_PER_TOKEN = 3
"""Fewer than English has (about 4), and one CJK character: estimates err on the high side."""
WEIGHT_UNIT = 1 << 16
"""What one byte weighs, so that a text shared by several callers still splits finely."""


def size_of(text: Text) -> int:
    """UTF-8 bytes; of token ids what estimates as many tokens."""
    if isinstance(text, tuple):
        return BYTES_PER_TOKEN * len(text)
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def tokens_of(size: int) -> int:
    """Tokens that a text of `size` UTF-8 bytes may have, estimated high."""
    return max(1, -(-size // BYTES_PER_TOKEN))


class Load:
    """One provider call while it is filled."""

    __slots__ = ("bytes", "caps", "items", "tokens")

    def __init__(self, caps: Caps) -> None:
        self.caps = caps
        self.items = self.tokens = self.bytes = 0

    def takes(self, size: int, tokens: int) -> bool:
        """Whether one more text of `size` bytes still fits."""
        if not self.items:
            return True
        caps = self.caps
        return (
            self.items < caps.items_max
            and self.tokens + tokens <= caps.tokens_max
            and self.bytes + size <= caps.bytes_max
        )

    def add(self, size: int, tokens: int) -> None:
        self.items += 1
        self.tokens += tokens
        self.bytes += size


def cut(sizes: Sequence[int], caps: Caps) -> list[range]:
    """The calls that carry texts of these sizes in this order, as few as first-come packing has."""
    calls: list[range] = []
    begin, load = 0, Load(caps)
    for place, size in enumerate(sizes):
        tokens = tokens_of(size)
        if not load.takes(size, tokens):
            calls.append(range(begin, place))
            begin, load = place, Load(caps)
        load.add(size, tokens)
    if sizes:
        calls.append(range(begin, len(sizes)))
    return calls


def middle(callers: Sequence[Hashable]) -> int:
    """Where to halve a call, given whose each of its texts is: neither half is empty."""
    count = len(callers)
    assert count > 1, "one text cannot be halved"
    half = count // 2
    for away in range(half + 1):
        for place in (half - away, half + away):
            if 0 < place < count and callers[place - 1] != callers[place]:
                return place
    return half
