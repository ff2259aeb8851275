"""The cache's second tier: Redis, or whatever speaks its language, behind the owner.

Rule 1: it only ever helps. A look-up takes BUDGET_S at most, stores go in the background, and
        whatever goes wrong is a miss.
Rule 2: a search is never cut short in the middle of a reply. It is left to end by itself, within
        OPERATION_S, while the look-up goes on without it.
Rule 3: what comes back is believed only if it names the version, the scope and the key asked for.
Rule 4: what is swept is not found from that moment on, whether or not it is deleted yet.
Rule 5: the URL may hold a password: it is in no argument of an actor, no reason and no repr.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Protocol
from urllib.parse import parse_qs, unquote, urlsplit
from zlib import crc32

from actors.cache.policy import DIGEST_BYTES, Scope, Sweep
from actors.ref import Clock

BUDGET_S = 0.020
"""Longest that a look-up waits for this tier; with the message around it that is within 25 ms."""
OPERATION_S = 1.0
"""A command without an answer for so long is given up, and its connection with it."""
CONNECT_S = 2.0
SEARCHES_MAX = 16
"""Most searches under way; look-ups beyond that do not ask."""
FOUND_BYTES_MAX = 4 * 1024 * 1024
"""Most bytes of one search's answer; what does not fit in is not found."""
VALUE_BYTES_MAX = 1024 * 1024
"""No larger value is kept here: it would not come back within the budget."""
STORES_MAX = 4096
STORE_BYTES_MAX = 16 * 1024 * 1024
"""Most stores, and bytes of them, that wait; what comes beyond that is not kept here."""
BATCH_MAX = 64
BATCH_BYTES_MAX = 1024 * 1024
SWEEPS_MAX = 64
"""Most sweeps that wait; beyond, they are one sweep of everything."""
SCAN_COUNT = 500
"""Names that are looked at in one step of a sweep: less than a millisecond of Redis's time."""
SWEEP_PAUSE_S = 1.0
"""After a step that was refused."""
FAILURES_MAX = 5
"""So many failed or late commands in a row, and nothing is asked until a probe succeeds."""
BACK_OFF_S = (0.1, 2.0)
STEADY_S = 10.0
"""Who fails again sooner than this is probed ever more rarely, up to the longer back-off."""
REASON_MAX = 200

_FORMAT = b"forebay.cache.4\n"
_MARK_BYTES = 16
_CHECKSUM_BYTES = 4
_HEADER_BYTES = len(_FORMAT) + _MARK_BYTES + DIGEST_BYTES + _CHECKSUM_BYTES

SEARCH = """
local found, bytes = {}, 0
for place, name in ipairs(KEYS) do
  local value = redis.pcall('GET', name)
  if type(value) == 'string' then
    bytes = bytes + #value
    if bytes > tonumber(ARGV[1]) then break end
    found[#found + 1] = place
    found[#found + 1] = redis.call('PTTL', name)
    found[#found + 1] = value
  end
end
return found
"""
"""All keys of a message in one round trip, each with the milliseconds that it has to live."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tier is: a `redis://`, `rediss://`, `unix://` or `dragonfly://` URL, and the first
    part of every key's name there."""

    url: str = field(repr=False)
    namespace: str = "forebay"


class Tell(Protocol):
    """Takes the place of the tier: None where there is none, and why if it should be one."""

    def __call__(self, place: Place | None, problem: str | None = None) -> None: ...


class Places(Protocol):
    """Where the tier is, now and after each change: picklable, and followed inside the owner."""

    async def follow(self, tell: Tell) -> None: ...


@dataclass(frozen=True, slots=True)
class Found:
    """A stored answer, with the seconds that it has to live."""

    value: bytes
    ttl_s: float


@dataclass(slots=True, eq=False)
class _Sweeping:
    """A sweep under way, as far as SCAN's cursor has come."""

    sweep: Sweep
    cursor: int = 0


@dataclass(frozen=True, slots=True)
class _Store:
    scope: Scope
    key: bytes
    name: bytes
    value: bytes
    ttl_ms: int


def name_of(namespace: str, scope: Scope, key: bytes) -> bytes:
    """What an answer is called there: namespace, format, scope, model, digest, between colons."""
    return _name(namespace.encode(), _mark(scope.mark), key[DIGEST_BYTES:], key[:DIGEST_BYTES])


def pattern_of(namespace: str, sweep: Sweep) -> bytes:
    """Redis's glob of the names of all that the sweep takes, and of no others."""
    literal = re.sub(rb"([*?\[\]\\])", rb"\\\1", namespace.encode())
    scope = None if sweep.scope is None else _mark(sweep.scope)
    if sweep.key is None:
        return _name(literal, scope, sweep.model, None)
    # A key says its model too; one that contradicts the sweep's takes nothing.
    model = sweep.key[DIGEST_BYTES:]
    if sweep.model is not None and sweep.model != model:
        model = sweep.model
    return _name(literal, scope, model, sweep.key[:DIGEST_BYTES])


def _name(
    namespace: bytes, scope: bytes | None, model: bytes | None, digest: bytes | None
) -> bytes:
    parts = (b"*" if part is None else part.hex().encode() for part in (scope, model, digest))
    return b":".join((namespace, b"2", *parts))


def wrap(scope: Scope, key: bytes, value: bytes) -> bytes:
    """A value as it is stored: it says what it is, whose, and the answer to what."""
    return _head(scope, key, value) + value


def unwrap(scope: Scope, key: bytes, stored: bytes) -> bytes | None:
    """The inverse of `wrap`; None for what is of another format, somebody else's, or damaged."""
    value = stored[_HEADER_BYTES:]
    return value if stored[:_HEADER_BYTES] == _head(scope, key, value) else None


def _head(scope: Scope, key: bytes, value: bytes) -> bytes:
    checksum = crc32(value).to_bytes(_CHECKSUM_BYTES, "big")
    return _FORMAT + _mark(scope.mark) + key[:DIGEST_BYTES] + checksum


def _mark(mark: str) -> bytes:
    whole = mark.encode("utf-8", "surrogatepass")
    return blake2b(whole, digest_size=_MARK_BYTES, person=b"forebay.scope.1").digest()


class RedisTier:
    """Owns the connections to one Redis, the searches under way, the stores and sweeps that wait.

    Bounded by SEARCHES_MAX, STORES_MAX and STORE_BYTES_MAX; beyond them nothing is asked, and
    nothing kept; and by SWEEPS_MAX. Connections are as many as searches, and one for stores.

    Failure behaviour: never raises, never blocks for more than BUDGET_S. After FAILURES_MAX failed
    or late commands in a row it is down: not asked, and what waits to be stored is dropped. It is
    probed in the background, with a pause of 0.1 to 2 s, and comes back when a probe is answered
    within the budget. A Redis that refuses to store (full, read-only) is still read. A sweep waits
    until it can be done, and what it takes is not found until then; who closes the tier earlier
    leaves it undone.
    """

    def __init__(
        self,
        place: Place,
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.up = False
        self._place = place
        self._clock = clock
        self._pause = pause
        self._client: Any = None
        self._searches: set[asyncio.Task[list[Found | None]]] = set()
        self._queue: deque[_Store] = deque()
        self._queue_bytes = 0
        self._queued = asyncio.Event()  # there is something to do for the writer
        self._sweeps: dict[Sweep, _Sweeping] = {}
        self._fell = asyncio.Event()
        self._failures = 0
        self._reason: str | None = "not connected yet"
        self._unstored: str | None = None
        self._unswept: str | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._counts: Counter[str] = Counter()

    def start(self) -> None:
        """Connects in the background."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._mind_for_ever()), loop.create_task(self._write())]

    async def close(self) -> None:
        """Lets go of the connections; what waits to be stored is lost."""
        self.up = False
        tasks: list[asyncio.Task[Any]] = [*self._tasks, *self._searches]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        if self._client is not None:
            await self._client.aclose()

    async def find(self, wanted: Sequence[tuple[Scope, bytes]]) -> list[Found | None]:
        """The stored answers, in order: None for what is not there, or not there in time."""
        nothing: list[Found | None] = [None] * len(wanted)
        if not self.up or not wanted:
            return nothing
        if len(self._searches) >= SEARCHES_MAX:
            self._counts["not_asked"] += 1
            return nothing
        search = asyncio.get_running_loop().create_task(self._search(wanted))
        self._searches.add(search)
        search.add_done_callback(self._ended)
        self._counts["searches"] += 1
        await asyncio.wait([search], timeout=BUDGET_S)
        if not search.done():
            self._counts["late"] += 1
            self._failed(f"no answer within {BUDGET_S * 1000:.0f} ms")
            return nothing
        if search.cancelled():
            return nothing
        error = search.exception()
        if error is not None:
            self._failed(self._told(error))
            return nothing
        self._failures = 0
        found = search.result()
        self._counts["found"] += len(found) - found.count(None)
        return found

    def store(self, scope: Scope, key: bytes, value: bytes, ttl_s: float) -> None:
        """Keeps a value for `ttl_s` seconds, if all is well; in the background."""
        size = _HEADER_BYTES + len(value)
        full = len(self._queue) >= STORES_MAX or self._queue_bytes + size > STORE_BYTES_MAX
        if not self.up or full or size > VALUE_BYTES_MAX or ttl_s < 0.001:
            self._counts["not_stored"] += 1
            return
        name = name_of(self._place.namespace, scope, key)
        stored = wrap(scope, key, value)
        self._queue.append(_Store(scope, key, name, stored, int(ttl_s * 1000)))
        self._queue_bytes += size
        self._queued.set()

    def sweep(self, sweep: Sweep) -> None:
        """Deletes what the sweep takes, in the background, as soon as all is well; until that is
        done, none of it is found. What is stored while it is under way may be deleted too."""
        if len(self._sweeps) >= SWEEPS_MAX:
            self._sweeps.clear()
            sweep = Sweep()
        self._sweeps[sweep] = _Sweeping(sweep)
        self._queue = deque(
            store for store in self._queue if not sweep.takes(store.scope.mark, store.key)
        )
        self._queue_bytes = sum(len(store.value) for store in self._queue)
        if self.up:
            self._queued.set()

    @property
    def unswept(self) -> list[Sweep]:
        """The sweeps that are not done yet."""
        return list(self._sweeps)

    def stats(self) -> dict[str, Any]:
        """`state` is healthy or degraded, and degraded has a `reason`."""
        reason = self._reason or self._unstored or self._unswept
        return {
            "state": "healthy" if reason is None else "degraded",
            "reason": reason,
            "searching": len(self._searches),
            "queued": len(self._queue),
            "queued_bytes": self._queue_bytes,
            "sweeping": len(self._sweeps),
            **self._counts,
        }

    # -------------------------------------------------------------------------------- searching

    async def _search(self, wanted: Sequence[tuple[Scope, bytes]]) -> list[Found | None]:
        names = [name_of(self._place.namespace, scope, key) for scope, key in wanted]
        found: list[Found | None] = [None] * len(wanted)
        reply = await self._client.eval(SEARCH, len(names), *names, FOUND_BYTES_MAX)
        for place, ttl_ms, stored in zip(reply[::3], reply[1::3], reply[2::3], strict=True):
            scope, key = wanted[place - 1]
            value = unwrap(scope, key, stored)
            if value is None or ttl_ms <= 0:
                self._counts["not_ours"] += 1
            elif not any(sweep.takes(scope.mark, key) for sweep in self._sweeps):
                found[place - 1] = Found(value, ttl_ms / 1000)
        return found

    def _ended(self, search: asyncio.Task[list[Found | None]]) -> None:
        """Whoever waited for it has judged it; one that was late is judged already."""
        self._searches.discard(search)
        if not search.cancelled():
            search.exception()

    # ---------------------------------------------------------------------------------- storing

    async def _write(self) -> None:
        """Stores and sweeps, turn about: a batch of these, a step of those."""
        while True:
            await self._queued.wait()
            batch = self._next_batch()
            if batch:
                await self._write_batch(batch)
            if self._sweeps and self.up:
                await self._sweep_on(next(iter(self._sweeps.values())))

    async def _write_batch(self, batch: list[_Store]) -> None:
        try:
            async with self._client.pipeline(transaction=False) as pipe:
                for store in batch:
                    pipe.set(store.name, store.value, px=store.ttl_ms)
                replies = await pipe.execute(raise_on_error=False)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, answers are kept in memory all the same.
            self._counts["not_stored"] += len(batch)
            self._failed(self._told(error))
            return
        refused = [reply for reply in replies if isinstance(reply, Exception)]
        self._unstored = f"does not store: {self._told(refused[0])}" if refused else None
        self._counts["stored"] += len(batch) - len(refused)
        self._counts["not_stored"] += len(refused)

    async def _sweep_on(self, sweeping: _Sweeping) -> None:
        """One step: a page of names, and those of them gone that are meant."""
        sweep, client = sweeping.sweep, self._client
        pattern = pattern_of(self._place.namespace, sweep)
        try:
            cursor, names = await client.scan(sweeping.cursor, match=pattern, count=SCAN_COUNT)
            if names:
                self._counts["swept"] += await client.unlink(*names)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, what is swept is not found; it is tried again, from the beginning.
            sweeping.cursor = 0
            self._unswept = f"does not forget: {self._told(error)}"
            if not _is_refusal(error):
                self._failed(self._told(error))
            await self._pause(SWEEP_PAUSE_S)
            return
        self._unswept = None
        sweeping.cursor = cursor
        if cursor == 0 and self._sweeps.get(sweep) is sweeping:
            del self._sweeps[sweep]
            self._rest()

    def _rest(self) -> None:
        if not self._queue and not self._sweeps:
            self._queued.clear()

    def _next_batch(self) -> list[_Store]:
        batch: list[_Store] = []
        size = 0
        while self._queue and len(batch) < BATCH_MAX and size < BATCH_BYTES_MAX:
            store = self._queue.popleft()
            size += len(store.value)
            batch.append(store)
        self._queue_bytes -= size
        self._rest()
        return batch

    # ------------------------------------------------------------------------------ up and down

    def _failed(self, reason: str) -> None:
        self._counts["failures"] += 1
        self._failures += 1
        if self._failures < FAILURES_MAX or not self.up:
            return
        self.up = False
        self._reason = reason
        self._counts["not_stored"] += len(self._queue)
        self._queue.clear()
        self._queue_bytes = 0
        self._queued.clear()
        self._fell.set()

    async def _mind_for_ever(self) -> None:
        """Probes until it is answered, and again after each fall."""
        back_off_s = BACK_OFF_S[0]
        while True:
            self._reason = await self._probe()
            if self._reason is None:
                self._failures = 0
                self._fell.clear()
                self.up = True
                if self._sweeps:
                    self._queued.set()
                since_s = self._clock()
                await self._fell.wait()
                if self._clock() - since_s >= STEADY_S:
                    back_off_s = BACK_OFF_S[0]
            await self._pause(back_off_s)
            back_off_s = min(2 * back_off_s, BACK_OFF_S[1])

    async def _probe(self) -> str | None:
        """Why it cannot be used, or None. The first command may have to connect, so the second one
        counts: a search like any other, for nothing."""
        probe = name_of(self._place.namespace, Scope(None), b"probe")
        if self._client is None:
            try:
                self._client = _client(self._place.url)
            except (TypeError, ValueError):
                return "its URL is not understood"  # nor is it known what in it is a secret
        try:
            await self._client.eval(SEARCH, 1, probe, 0)
            begun_s = self._clock()
            await self._client.eval(SEARCH, 1, probe, 0)
        except Exception as error:  # noqa: BLE001
            # Whatever it is, it is said in the health report, and probed again.
            return self._told(error)
        took_s = self._clock() - begun_s
        limit = f"and only {BUDGET_S * 1000:.0f} are waited"
        return None if took_s <= BUDGET_S else f"answers in {took_s * 1000:.0f} ms, {limit}"

    def _told(self, error: BaseException) -> str:
        """An error in one line, without what may be a part of the password."""
        text = next(iter(str(error).splitlines()), "")[:REASON_MAX]
        hide = not text or any(secret in str(error) for secret in _secrets_in(self._place.url))
        return type(error).__name__ if hide else f"{type(error).__name__}: {text}"


def _is_refusal(error: Exception) -> bool:
    """Redis is there, and says no."""
    from redis.exceptions import ResponseError

    return isinstance(error, ResponseError)


def _secrets_in(url: str) -> list[str]:
    """The texts of a URL that are not to be told; an empty one means all of it."""
    split = urlsplit(url)
    if "@" in url and "@" not in split.netloc:
        return [""]  # a password that was not quoted: it cannot be known where it ends
    given = [split.password or "", *parse_qs(split.query).get("password", [])]
    return [form for secret in given if secret for form in (secret, unquote(secret))]


def _client(url: str) -> Any:
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    if url.startswith("dragonfly://"):
        url = f"redis://{url.removeprefix('dragonfly://')}"
    return Redis.from_url(
        url,
        protocol=2,
        socket_timeout=OPERATION_S,
        socket_connect_timeout=CONNECT_S,
        retry=Retry(NoBackoff(), 0),
        max_connections=SEARCHES_MAX + 2,  # the writer, and the probe
    )
