"""What desks and owners have in common on the line between them."""

from __future__ import annotations

import io
import pickle
from typing import Any

from actors.rate_limiter.terms import Ask, Limits
from actors.ref import Packed

ASKS = [Ask(f"tenant-{n}", Limits(requests_per_minute=60.0)) for n in range(50)]


class Asking(pickle.Pickler):
    """A pickler that is asked about values as Ray's is, and counts."""

    def __init__(self, into: io.BytesIO) -> None:
        super().__init__(into, pickle.HIGHEST_PROTOCOL)
        self.asked = 0

    def reducer_override(self, value: Any) -> Any:
        self.asked += 1
        return NotImplemented


def crossed(values: Any) -> tuple[Any, int]:
    """The values as they arrive, and how often Python was asked."""
    into = io.BytesIO()
    pickler = Asking(into)
    pickler.dump(values)
    return pickle.loads(into.getvalue()), pickler.asked


def test_packed_values_arrive_as_a_plain_tuple_of_the_same() -> None:
    arrived, _ = crossed(Packed(ASKS))
    assert type(arrived) is tuple
    assert arrived == tuple(ASKS) == Packed(ASKS)


def test_nobody_is_asked_about_each_of_them() -> None:
    _, asked = crossed(Packed(ASKS))
    assert asked <= 2  # about the whole, and what unpacks it
    assert crossed(ASKS)[1] > len(ASKS)
