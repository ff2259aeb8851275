"""The push channel: an owner hosts snapshots, desks hold one long poll each.

Rule 1: a version says only "not the one you have"; it is never compared for order.
Rule 2: what is said is the state as it is now, not each step on the way to it.
Rule 3: a host never forgets a waiter, and a client never gives up on a host.

The idea is Ray Serve's `LongPollHost`; unlike its client, this one outlives its host.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

from actors.ref import Clock, OwnerRef, OwnerUnavailable

HOLD_S = 20.0  # how long a poll is held; also how late a silently dead host is noticed
KEYS_MAX = 20_000  # above what any owner bounds its own keys by; reaching it is a bug there
ANSWER_S = 5.0  # how long after the hold an answer may still come
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 1.0
GONE = 0  # the version of a key that the host does not have

Sleep = Callable[[float], Awaitable[None]]
Snapshots = dict[str, tuple[int, Any]]

log = logging.getLogger(__name__)


class Backoff:
    """Pauses between attempts: doubling from 50 ms to 1 s, each half to wholly as long as that."""

    def __init__(self, random: Callable[[], float] = random.random) -> None:
        self._random = random
        self._pause_s = BACKOFF_MIN_S

    def next_s(self) -> float:
        """The next pause in seconds."""
        pause_s = self._pause_s * (0.5 + self._random() / 2)
        self._pause_s = min(BACKOFF_MAX_S, self._pause_s * 2)
        return pause_s

    def reset(self) -> None:
        """An attempt succeeded: start from the shortest pause again."""
        self._pause_s = BACKOFF_MIN_S


class SnapshotHost:
    """The newest value of each key, and everybody who waits for a newer one.

    Owns: one value and one version per key. All versions come from one counter with a random
    start, so neither a restarted host nor a key that went and came back looks unchanged.
    Bounds: `KEYS_MAX` keys (more is a programmer's error and raises); waiters are calls of the
    actor, bounded by its concurrency, and each ends after its `hold_s`.
    Failure behaviour: nothing is kept; a restarted host tells each client what it has now, and
    which of the client's keys it does not have. A closed host answers `OwnerUnavailable`.
    """

    def __init__(
        self, name: str = "host", getrandbits: Callable[[int], int] = random.getrandbits
    ) -> None:
        self.name = name
        self.waiting = 0
        self._version = getrandbits(48)
        self._held: Snapshots = {}
        self._changed = asyncio.Event()
        self._closed = False

    def __len__(self) -> int:
        return len(self._held)

    def publish(self, key: str, value: Any) -> None:
        """Make `value` the newest of `key` and wake whoever waits."""
        if key not in self._held and len(self._held) >= KEYS_MAX:
            raise ValueError(f"{self.name} hosts {KEYS_MAX} keys already; it must bound them")
        self._version += 1
        self._held[key] = (self._version, value)
        self._wake()

    def withdraw(self, key: str) -> None:
        """Forget `key`; clients that knew it hear that it is gone."""
        if self._held.pop(key, None) is not None:
            self._wake()

    async def watch(self, seen: dict[str, int], hold_s: float = HOLD_S) -> Snapshots:
        """What differs from `seen` (key to version), at once, or as soon as something does.

        Returns key to (version, value); keys the caller does not list count as different, and
        listed keys that are not here come as `(GONE, None)`. `{}` when `hold_s` seconds passed.

        Raises:
            OwnerUnavailable: the host is closed, or was while the caller waited.
        """
        # Nothing is awaited between the comparison and taking hold of the event, so no change
        # can fall between them.
        self.waiting += 1
        try:
            async with asyncio.timeout(hold_s):
                while not self._closed and not (changes := self._since(seen)):
                    await self._changed.wait()
        except TimeoutError:
            return {}
        finally:
            self.waiting -= 1
        if self._closed:
            raise OwnerUnavailable(self.name, "it is closed")
        return changes

    def close(self) -> None:
        """Send all waiters away, and everybody who comes after."""
        self._closed = True
        self._wake()

    def _since(self, seen: dict[str, int]) -> Snapshots:
        changes = {key: held for key, held in self._held.items() if seen.get(key) != held[0]}
        changes.update({key: (GONE, None) for key in seen if key not in self._held})
        return changes

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class WatchClient:
    """One long poll on an owner, for ever.

    Owns: the versions last seen, and the task that polls. `connected` says whether the last poll
    was answered, `changes` how many values were handed on, `errors` what went wrong so far.
    Bounds: one poll at a time; keys as many as the host has.
    Failure behaviour: while the owner is away the last values stand and polling goes on with a
    pause of 50 ms to 1 s. Any other error of the owner's is logged when it is a new one, and
    polling goes on in the same way. What `on_change` raises is logged and counted, and the value
    counts as handed on: the next one gets its chance.
    """

    def __init__(
        self,
        ref: OwnerRef,
        on_change: Callable[[str, Any], None],
        clock: Clock = time.monotonic,
        random: Callable[[], float] = random.random,
        *,
        hold_s: float = HOLD_S,
        answer_s: float = ANSWER_S,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self.connected = False
        self.changes = 0
        self.errors = 0
        self._ref = ref
        self._on_change = on_change
        self._clock = clock
        self._hold_s = hold_s
        self._answer_s = answer_s
        self._sleep = sleep
        self._backoff = Backoff(random)
        self._seen: dict[str, int] = {}
        self._lost_at = clock()
        self._trouble = ""
        self._polling: asyncio.Task[None] | None = None

    @property
    def away_s(self) -> float:
        """For how many seconds the owner has been away; 0 while it answers."""
        return 0.0 if self.connected else self._clock() - self._lost_at

    async def start(self) -> None:
        """Hand on all there is now, then keep watching in the background.

        Raises:
            OwnerUnavailable: the owner could not be reached; starting again is fine.
            Exception: what `on_change` raised for one of the first values.
        """
        if self._polling is not None:
            return
        failure = self._hand_on(await self._poll(0.0))
        if failure is not None:
            raise failure
        self._polling = asyncio.create_task(self._run(), name=f"watch {self._ref.name}")

    async def close(self) -> None:
        """Stop watching."""
        task, self._polling = self._polling, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def stats(self) -> dict[str, Any]:
        return {
            "connected": self.connected,
            "changes": self.changes,
            "errors": self.errors,
            "away_s": self.away_s,
        }

    async def _run(self) -> None:
        while True:
            # After trouble the first poll is not held, so that `connected` is true again at once.
            try:
                changes = await self._poll(self._hold_s if self.connected else 0.0)
            except OwnerUnavailable:
                await self._pause()
            except Exception as error:  # a bug of the owner's, or another protocol: never silent
                if repr(error) != self._trouble:
                    self._trouble = repr(error)
                    log.exception("%s: watching again", self._ref.name)
                await self._pause()
            else:
                self._hand_on(changes)

    async def _poll(self, hold_s: float) -> Snapshots:
        changes: Snapshots = await self._ref.ask(
            "watch", dict(self._seen), hold_s, timeout_s=hold_s + self._answer_s
        )
        self.connected = True
        self._trouble = ""
        self._backoff.reset()
        return changes

    async def _pause(self) -> None:
        if self.connected:
            self.connected, self._lost_at = False, self._clock()
        self.errors += 1
        await self._sleep(self._backoff.next_s())

    def _hand_on(self, changes: Snapshots) -> Exception | None:
        """Hand on every change; what went wrong first, if anything did."""
        first: Exception | None = None
        for key, (version, value) in changes.items():
            if version == GONE:
                self._seen.pop(key, None)
            else:
                self._seen[key] = version
            self.changes += 1
            try:
                self._on_change(key, value)
            except Exception as error:  # one value that cannot be taken must not stop the others
                log.exception("%s: the change of %r was not taken", self._ref.name, key)
                self.errors += 1
                first = first or error
        return first
