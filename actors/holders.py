"""Who holds something of an owner's: a process's name, and whether that process is dead.

Rule 1: only certain death counts. Silence is none, for the calls of a silent process may go on.
Rule 2: a process is judged where it can be seen: on its node, in its namespace of process ids.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

_DEAD_STATES = "ZX"  # zombie, dead: its sockets are closed


def holder_id(node: str) -> str:
    """This process's name among all holders: node and pid namespace, pid, start time.

    A pid alone is reused; with its start time it is not (proc(5), field 22 of `stat`).
    """
    namespace = os.stat("/proc/self/ns/pid").st_ino
    _, started = _stat("self")
    return f"{node}.{namespace}/{os.getpid()}/{started}"


def node_of(holder: str) -> str:
    """The node in a holder's name, without the pid namespace."""
    return holder.partition("/")[0].rpartition(".")[0]


def is_near(holder: str, other: str) -> bool:
    """Whether two processes see each other's pids."""
    return holder.partition("/")[0] == other.partition("/")[0]


def is_on_any(holder: str, nodes: Iterable[str]) -> bool:
    """Whether one of the nodes, by their whole ids, is the holder's, which has a shortened one."""
    node = node_of(holder)
    return any(name.startswith(node) for name in nodes)


def is_dead(holder: str) -> bool:
    """Whether a process that would be visible here exists no more. False for what is no holder."""
    try:
        _, pid, started = holder.rsplit("/", 2)
        number = int(pid)
    except ValueError:
        return False
    try:
        state, began = _stat(str(number))
    except (FileNotFoundError, ProcessLookupError):
        return True
    return began != started or state in _DEAD_STATES


def _stat(pid: str) -> tuple[str, str]:
    """A process's state letter and its start time in clock ticks since boot."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return fields[0], fields[19]
