"""What a server of ours lets an application do beyond ASGI.

Rule 1: it stands behind the `receive` and the `send` that the server gave, and whoever wraps one of
        them is not passed by: what is wrapped is plain ASGI.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any


class Peer(ABC):
    """The client of one request, as its server knows it."""

    __slots__ = ()

    @abstractmethod
    def whole_body(self) -> bytes | None:
        """The request's body, if all of it is here; else None, and `receive` is to be asked."""

    @abstractmethod
    def answer(self, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> bool:
        """Send a whole answer, of which `headers` tell the length; their names are in good order,
        and lower-case.

        Whether that could be done without waiting; if not, `send` is to be asked.
        """

    @abstractmethod
    def watch(self, leave: Callable[[], object]) -> None:
        """Call `leave`, once, when the client hangs up before it has its answer."""

    @abstractmethod
    def has_left(self) -> bool:
        """Whether the client has hung up."""

    @abstractmethod
    def unwatch(self) -> None:
        """Forget what `watch` was told."""


def peer_behind(method: Any) -> Peer | None:
    """Whose `receive` or `send` this is; None for another server's, and for what is wrapped."""
    owner = getattr(method, "__self__", None)
    return owner if isinstance(owner, Peer) else None
