"""The ledger held against the upstream's own log, to the nano-dollar.

Every request carries its id in its text, as `<id>`, so that what the upstream saw and what the
ledger wrote can be put side by side. Requests that shared an upstream call are judged together.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from actors.ledger.policy import Entry
from tests.support.upstream import Record

PROMPT_NANO, COMPLETION_NANO = 1_000, 3_000
"""What the groups cost that an audit can judge, in nano-USD per token."""
PRICES = {
    "input_cost_per_token": PROMPT_NANO / 1e9,
    "output_cost_per_token": COMPLETION_NANO / 1e9,
}
_ID = re.compile(r"<([\w.-]{1,64})>")


@dataclass
class Audit:
    """What was found. `faults` are sentences; there should be none.

    `flagged` are the entries whose answer was lost or cut, `flagged_log_nano` is what their calls
    cost by the log, and `extra` are intents of calls that never left.
    """

    requests: int = 0
    calls: int = 0
    entries: int = 0
    posted_nano: int = 0
    log_nano: int = 0
    flagged: int = 0
    flagged_log_nano: int = 0
    flagged_most_nano: int = 0
    extra: int = 0
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.requests} requests, {self.calls} upstream calls, {self.entries} attempts in "
            f"the ledger; posted {self.posted_nano} + flagged {self.flagged_log_nano} = log "
            f"{self.log_nano} nano-USD; {self.flagged} flagged hold {self.flagged_most_nano}, "
            f"{self.extra} of calls that never left"
        )


def ids_in(record: Record) -> list[str]:
    """The requests that an upstream call was made for. The script must say `log_bodies`."""
    body = record.body or {}
    given = body.get("input", record.prompt)
    texts = given if isinstance(given, list) else [given]
    return [one for text in texts for one in _ID.findall(str(text))]


def price_nano(record: Record) -> int:
    """What the call cost by the log; nothing where the upstream refused it."""
    if record.status not in (0, 200):
        return 0
    return PROMPT_NANO * record.prompt_tokens + COMPLETION_NANO * record.completion_tokens


def audit(
    records: Iterable[Record], entries: Mapping[str, Sequence[Entry]], sent: Iterable[str]
) -> Audit:
    """`entries` by request id, for every id that was `sent`."""
    found = Audit()
    calls = [(record, ids_in(record)) for record in records]
    alike = _Sets(sent)
    for record, ids in calls:
        if not ids or any(one not in alike for one in ids):
            found.faults.append(f"call {record.id} was made for nobody: {ids}")
            continue
        for one in ids:
            alike.join(ids[0], one)
    of_group: dict[str, list[tuple[Record, list[str]]]] = {}
    for record, ids in calls:
        if ids and ids[0] in alike:
            of_group.setdefault(alike.root(ids[0]), []).append((record, ids))
    for root, members in alike.groups().items():
        _judge(found, of_group.get(root, []), members, entries)
    found.requests, found.calls = len(alike), len(calls)
    return found


def _judge(
    found: Audit,
    calls: Sequence[tuple[Record, list[str]]],
    members: Sequence[str],
    entries: Mapping[str, Sequence[Entry]],
) -> None:
    attempts = [one for member in members for one in entries.get(member, ()) if one.deployment]
    flagged = [one for one in attempts if one.status == "unsettled" or one.estimated]
    posted = [one for one in attempts if one.status == "posted" and not one.estimated]
    posted_nano, log_nano = (
        sum(one.cost_nano for one in posted),
        sum(price_nano(r) for r, _ in calls),
    )
    most_nano = sum(one.most_nano for one in flagged)
    pairs = sum(len(ids) for _, ids in calls)
    extra = [one for one in attempts if one.status in ("unsettled", "voided")]
    told = f"{members[:3]}: posted {posted_nano}, log {log_nano}, flagged up to {most_nano}"
    if len(attempts) < pairs:
        found.faults.append(f"{told}: {pairs} calls have {len(attempts)} entries")
    if len(attempts) - len(extra) > pairs:
        found.faults.append(f"{told}: {pairs} calls have {len(attempts)} entries: {attempts}")
    if not flagged and posted_nano != log_nano:
        found.faults.append(f"{told}: {attempts}")
    if flagged and not posted_nano <= log_nano <= posted_nano + most_nano:
        found.faults.append(f"{told}: {attempts}")
    found.entries += len(attempts)
    found.posted_nano += posted_nano
    found.log_nano += log_nano
    found.flagged += len(flagged)
    found.flagged_most_nano += most_nano
    found.flagged_log_nano += log_nano - posted_nano
    found.extra += max(0, len(attempts) - pairs)


class _Sets:
    """Disjoint sets of request ids."""

    def __init__(self, members: Iterable[str]) -> None:
        self._parent = {one: one for one in members}

    def __contains__(self, one: str) -> bool:
        return one in self._parent

    def __len__(self) -> int:
        return len(self._parent)

    def root(self, one: str) -> str:
        while self._parent[one] != one:
            self._parent[one] = one = self._parent[self._parent[one]]
        return one

    def join(self, one: str, other: str) -> None:
        self._parent[self.root(other)] = self.root(one)

    def groups(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for one in self._parent:
            found.setdefault(self.root(one), []).append(one)
        return found
