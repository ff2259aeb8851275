"""Who takes turns in `bodies` and `streaming`: the upstream itself, Forebay, LiteLLM Proxy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks import peers
from benchmarks.options import Report
from benchmarks.processes import Child
from benchmarks.system import System
from tests.support.upstream import Upstream

NAMES = {"direct": "the upstream itself", "forebay": "Forebay", "peer": "LiteLLM Proxy"}


@dataclass(slots=True)
class Side:
    """One of NAMES: where it answers, to which keys, and its processes."""

    name: str
    url: str
    keys: Sequence[str] = ()
    child: Child | None = None
    system: System | None = None

    def sent(self, count: int) -> None:
        if self.system is not None:
            self.system.sent += count


@contextmanager
def sides_of(
    report: Report, name: str, upstream: Upstream, scratch: Path, *, with_peer: bool = True
) -> Iterator[list[Side]]:
    """All of NAMES, in that order; without the peer where it is not wanted, or cannot be had.
    Afterwards Forebay's ledger is compared with what it was sent."""
    with ExitStack() as stack:
        system = stack.enter_context(System(name, upstream.url, scratch))
        sides = [
            Side("direct", upstream.url),
            Side("forebay", system.url, system.keys, system.child, system),
        ]
        if with_peer:
            with report.part(NAMES["peer"]):
                peer = stack.enter_context(peers.running("litellm-proxy", upstream.url, scratch))
                sides.append(Side("peer", peer.url, peer.keys, peer.child))
        yield sides
        report.audit(NAMES["forebay"], system)


def in_turn(sides: Sequence[Side], number: int) -> Sequence[Side]:
    """Each round begins at the other end."""
    return sides if number % 2 else sides[::-1]
