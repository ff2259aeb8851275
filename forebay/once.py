"""Requests with an `Idempotency-Key`: made once, and answered again for a day.

Rule 1: the key is claimed, durably, before anything is reserved or called.
Rule 2: what has a key goes on when its client leaves: it comes again, and is to find the answer.
Rule 3: only a whole answer is kept. A call that failed gives its key back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

import orjson

from actors.ledger.claims_desk import ClaimsDesk
from actors.ledger.idempotency import ANSWER_BYTES_MAX, Claim, Differs, Full, Kept, Running, Won
from actors.ref import OwnerUnavailable
from forebay import codec
from forebay.call import Call, Facts, Result, Stream
from forebay.codec import Answer
from forebay.errors import GatewayError, InvalidRequest, Overloaded
from forebay.tally import StreamTally

CARRIED_MAX = 1_000
"""Most calls that go on without their client; beyond, one ends with its client."""
CLOSE_WAIT_S = 2.0
HEADER = "Idempotency-Key"
AGAIN_S = 1.0

_LENGTH = struct.Struct("<I")
T = TypeVar("T")

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Before:
    """The answer that the key's first request had, and what was told with it."""

    answer: Answer
    warnings: list[str]


class Turn:
    """One request's turn at its key. `won`: the call is its own to make."""

    __slots__ = ("_asking", "_claim", "_desk", "_told", "won")

    def __init__(self, desk: ClaimsDesk, claim: Claim) -> None:
        self._desk = desk
        self._claim = claim
        self._asking: asyncio.Task[Any] | None = None
        self._told = False
        self.won = False

    async def take(self, left_s: Callable[[], float]) -> Before | None:
        """The answer from before; None, and the call is this request's to make.

        Where another request makes it this one waits, for as long as it has time.

        Raises:
            InvalidRequest: 409. The key was used for another body (`idempotency_key_reused`), or
                the other request takes too long (`idempotency_key_in_use`).
            Overloaded: nobody knows what became of the key; nothing was called.
        """
        while True:
            self._told = False
            asking = asyncio.get_running_loop().create_task(self._desk.claim(self._claim, left_s()))
            self._asking = asking
            try:
                # Whoever leaves meanwhile may have won all the same, and has to give it back.
                told = await asyncio.shield(asking)
            except OwnerUnavailable as error:
                raise Overloaded(
                    f"{HEADER} cannot be looked up now: {error}", retry_after_s=AGAIN_S
                ) from None
            if isinstance(told, Won):
                self.won = True
                return None
            self._told = True
            if isinstance(told, Kept):
                return _unpack(told.answer)
            if isinstance(told, Differs):
                raise InvalidRequest.about(
                    HEADER,
                    f"This {HEADER} was used for another request body; use a new one.",
                    code="idempotency_key_reused",
                    status=409,
                )
            if isinstance(told, Full):
                raise Overloaded(
                    f"{told.most} requests with an {HEADER} are under way", retry_after_s=AGAIN_S
                )
            if not told.patient or left_s() <= 0:
                raise _in_use(told)

    async def keep(self, answer: Answer, facts: Facts) -> str | None:
        """Hands in the answer. Returns why it is not kept, None where it is."""
        self._told = True
        try:
            kept = _pack(answer, facts)
        except TypeError:  # what no JSON can say
            kept = b""
        if not 0 < len(kept) <= ANSWER_BYTES_MAX:
            await self._desk.finish(self._claim, None)
            return f"an answer of {len(kept)} bytes is not kept: a repeat is a call of its own"
        if await self._desk.finish(self._claim, kept):
            return None
        return "the ledger did not keep the answer: a repeat may be a call of its own"

    async def give_back(self) -> None:
        """The key is free again, if it was, or may have been, this request's. Called once."""
        if self._asking is None or self._told:
            return
        self._told = True
        await asyncio.wait([self._asking])
        await self._desk.finish(self._claim, None)


Run = Callable[[Call, Turn], Awaitable[T]]


class Once:
    """Owns the calls that go on without their client, and what is still to be told the ledger.

    Bounded by CARRIED_MAX calls; what is told is one message of a request that failed.

    Failure behaviour: the desk's. A call whose process dies is lost; its key is free when the
    ledger hears of the death, or when the call's deadline has passed by GRACE_S. An answer that the
    ledger does not take is given all the same, with a warning.
    """

    def __init__(self, desk: ClaimsDesk) -> None:
        self._desk = desk
        self._carried: set[asyncio.Task[Any]] = set()
        self._telling: set[asyncio.Task[None]] = set()
        self._replays = 0
        self._went_on = 0
        self._not_kept = 0

    async def answer(self, call: Call, run: Run[Result]) -> Result:
        """What `run` answers to the call, which takes its turn; it is kept if it was its own."""
        turn = self._turn(call)
        work = asyncio.get_running_loop().create_task(self._answered(call, turn, run))
        return await self._while_wanted(turn, work)

    async def stream(self, call: Call, run: Run[Stream]) -> Stream:
        """As `answer`; the stream is kept when it has come to its end."""
        turn = self._turn(call)
        work = asyncio.get_running_loop().create_task(self._begun(call, turn, run))
        return await self._while_wanted(turn, work, _read_out)

    async def close(self) -> None:
        """Ends what is carried; tells what can be told within CLOSE_WAIT_S."""
        for task in self._carried:
            task.cancel()
        if self._carried:
            await asyncio.wait(self._carried)
        if self._telling:
            await asyncio.wait(self._telling, timeout=CLOSE_WAIT_S)
        for task in self._telling:
            task.cancel()

    def stats(self) -> dict[str, int]:
        return {
            "replays": self._replays,
            "carried": len(self._carried),
            "went_on": self._went_on,
            "not_kept": self._not_kept,
            **self._desk.stats(),
        }

    def _turn(self, call: Call) -> Turn:
        assert call.idempotency_key is not None, "it has a key"
        claim = self._desk.new(call.tenant, call.idempotency_key, fingerprint(call))
        return Turn(self._desk, claim)

    async def _while_wanted(
        self,
        turn: Turn,
        work: asyncio.Task[T],
        rest: Callable[[asyncio.Task[T]], Coroutine[Any, Any, None]] | None = None,
    ) -> T:
        """The work's result. Where its client leaves before, the work goes on, and then `rest`."""
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            if not (turn.won and self._carry(work if rest is None else rest(work))):
                work.cancel()
                await asyncio.wait([work])
            raise

    async def _answered(self, call: Call, turn: Turn, run: Run[Result]) -> Result:
        try:
            result = await run(call, turn)
        except BaseException:
            self._give_back(turn)
            raise
        if turn.won:
            await self._keep(turn, result.answer, result.facts)
        else:
            self._replays += 1
        return result

    async def _begun(self, call: Call, turn: Turn, run: Run[Stream]) -> Stream:
        try:
            stream = await run(call, turn)
        except BaseException:
            self._give_back(turn)
            raise
        if not turn.won:
            self._replays += 1
            return stream
        chunks = self._relayed(call, turn, stream)
        await anext(chunks)  # into its `try`, so that closing or dropping it is noticed
        return Stream(chunks, stream.facts)

    async def _relayed(
        self, call: Call, turn: Turn, stream: Stream
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The stream's chunks, and its end for the key. The first item is no chunk."""
        reading = _Reading(call, stream)
        over = False
        try:
            yield {}
            while (chunk := await reading.next()) is not None:
                yield chunk
            over = True
            await self._keep(turn, reading.answer(), stream.facts)
        except GatewayError:
            over = True
            self._give_back(turn)
            raise
        finally:
            if not over and not self._carry(self._read_on(turn, stream, reading)):
                await reading.close()
                self._give_back(turn)

    async def _read_on(self, turn: Turn, stream: Stream, reading: _Reading) -> None:
        """To the end, for whoever asks again."""
        try:
            while await reading.next() is not None:
                pass
        except BaseException:
            await reading.close()
            self._give_back(turn)
            raise
        await self._keep(turn, reading.answer(), stream.facts)

    async def _keep(self, turn: Turn, answer: Answer, facts: Facts) -> None:
        await asyncio.shield(self._tell(self._kept(turn, answer, facts)))

    async def _kept(self, turn: Turn, answer: Answer, facts: Facts) -> None:
        why = await turn.keep(answer, facts)
        if why is not None:
            self._not_kept += 1
            facts.warnings.append(f"{HEADER}: {why}")
            log.warning("%s: %s", HEADER, why)

    def _give_back(self, turn: Turn) -> None:
        self._tell(turn.give_back())

    def _tell(self, message: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Sent, whether or not the request waits for it."""
        task = asyncio.get_running_loop().create_task(message)
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)
        return task

    def _carry(self, rest: Coroutine[Any, Any, Any] | asyncio.Task[Any]) -> bool:
        """Whether what is left to do goes on by itself."""
        if len(self._carried) >= CARRIED_MAX:
            if asyncio.iscoroutine(rest):
                rest.close()
            return False
        task = asyncio.ensure_future(rest)
        self._carried.add(task)
        task.add_done_callback(self._landed)
        self._went_on += 1
        return True

    def _landed(self, task: asyncio.Task[Any]) -> None:
        self._carried.discard(task)
        if not task.cancelled():
            task.exception()  # nobody is there to be told; the ledger has its entry


class _Reading:
    """Reads a stream, for one reader after the other: a chunk that is asked for stays so when its
    reader leaves."""

    def __init__(self, call: Call, stream: Stream) -> None:
        self._call = call
        self._stream = stream
        self._tally = StreamTally(call.route)
        self._asked: asyncio.Task[dict[str, Any] | None] | None = None

    async def next(self) -> dict[str, Any] | None:
        if self._asked is None:
            self._asked = asyncio.get_running_loop().create_task(self._one())
        chunk = await asyncio.shield(self._asked)
        self._asked = None
        if chunk is not None:
            self._tally.add(chunk)
        return chunk

    async def _one(self) -> dict[str, Any] | None:
        return await anext(self._stream.chunks, None)

    async def close(self) -> None:
        if self._asked is not None:
            self._asked.cancel()
            await asyncio.wait([self._asked])
        await self._stream.chunks.aclose()

    def answer(self) -> Answer:
        """The whole of it, when it has come to its end."""
        facts = self._stream.facts
        answer = self._tally.answer(self._call.body, complete=True)
        answer.cost_nano = facts.cost_nano if facts.cost_nano != 0 else facts.saved_nano
        return answer


async def _read_out(opening: asyncio.Task[Stream]) -> None:
    stream = await opening
    async for _ in stream.chunks:
        pass


def fingerprint(call: Call) -> str:
    """What is asked: the route and the body, whatever the order of its fields."""
    try:
        body = b"o" + orjson.dumps(call.body, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        try:  # integers beyond 64 bits and lone surrogates, which JSON lets through
            body = b"j" + json.dumps(call.body, sort_keys=True, allow_nan=False).encode()
        except (TypeError, ValueError):
            raise InvalidRequest.about(
                HEADER, f"With an {HEADER} every parameter must be plain JSON."
            ) from None
    return hashlib.sha256(call.route.encode() + b"\0" + body).hexdigest()


def _pack(answer: Answer, facts: Facts) -> bytes:
    answer.clamped = facts.clamped
    head = orjson.dumps(facts.warnings)
    return _LENGTH.pack(len(head)) + head + codec.pack(answer)


def _unpack(kept: bytes) -> Before:
    end = _LENGTH.size + _LENGTH.unpack_from(kept)[0]
    return Before(codec.unpack(kept[end:]), orjson.loads(kept[_LENGTH.size : end]))


def _in_use(running: Running) -> InvalidRequest:
    return InvalidRequest.about(
        HEADER,
        f"A request with this {HEADER} is still under way; "
        f"its turn ends in {running.lapses_s:.0f} s at most.",
        code="idempotency_key_in_use",
        status=409,
        retry_after_s=AGAIN_S,
    )
