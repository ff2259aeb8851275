"""The Batcher's owner: one coalescing point per lane, for every process."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from actors.batcher.callers import Callers
from actors.batcher.calls import Call, Part, Unit, buyers_of, split_cost
from actors.batcher.copies import Copies, EmbedCall
from actors.batcher.courier import Many, Message
from actors.batcher.flights import Flight, Line, Tree, Up, unlist
from actors.batcher.lane import Go, LaneState, sooner
from actors.batcher.limits import learn
from actors.batcher.planner import cut, middle, size_of, tokens_of
from actors.batcher.poison import Poison, alone
from actors.batcher.policy import (
    Caps,
    Lane,
    NoPermit,
    Order,
    Paid,
    Share,
    Spare,
    Text,
    Vectors,
    split,
    split_spare,
)
from actors.ref import Clock

LINES_MAX = 1000
"""Most lanes, and most upstreams, that are remembered while nothing waits in them."""
CLOSE_WAIT_S = 5.0
RETRY_LINGER_S = 0.02
"""How long texts that are sent again wait for those that failed with them: they come from several
processes, each of which heard of it a moment sooner or later."""
JOIN_S = 1.0
"""A text joins a call under way only if that call may take as long as its caller has, or so much
less."""
BAD_INPUT = (400, 413, 422)
"""What a provider says to a list that one text spoils."""
PUSHES_BACK = (408, 429, 503, 529)
HANGS_S = 5.0
"""A call that was given less time says nothing of the provider when that is over."""
LEAVES_MAX = 8
"""Most texts of one refused call that are refused one by one in a lane which has never had an
answer: then it is the lane that is refused, and the rest is not asked for."""
NOT_OF_A_TEXT = frozenset({"model", "dimensions", "encoding_format", "user"})

T = TypeVar("T")


class Batcher:
    """Owns the texts that wait to be sent, by lane, and the provider calls under way.

    When and how many at once: see `lane`. A text that several callers want is sent once; who asks
    while it is under way gets it for nothing. With `Order.coalesce` off a caller's list goes out
    at once and alone. A call of several callers that the provider calls bad input is sent again in
    halves, until only the guilty text fails; it is remembered for a while (`poison`). What a
    refusal says of the provider's caps is learnt (`limits`). Callers whose call failed for all of
    them are told the same `beat`, so that they come back together: with Lane.retry they wait up to
    RETRY_LINGER_S for each other and are one provider call again. A caller's own list fails as a
    whole, unless it is `partial`: then it is searched, too, and keeps what was answered.

    With Caps.hedge a call that is late (see `hedge`) is made a second time; the first good answer
    is handed out and the other copy is stopped. What that one has cost is in Share.spare.

    Bounded by what `callers` takes in, and by LINES_MAX for what is remembered of quiet lanes.

    Failure behaviour: nothing survives a restart. Callers' desks send again what had no answer, so
    a call that was on its way is paid for twice. A caller that leaves before its texts are sent
    costs nothing; one that leaves later does not disturb the others, and its part of the price is
    counted as unclaimed, its spare only where that is no estimate. A provider call that fails and
    costs all the same (`paid` on its exception) is paid by its callers in the same parts.
    """

    PROTOCOL = 5

    def __init__(
        self,
        factory: Callable[[], EmbedCall],
        clock: Clock = time.monotonic,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        rng: random.Random | None = None,
        cpu: Clock = time.process_time,
    ) -> None:
        self._clock = clock
        self._pause = pause
        self._rng = rng or random.Random()
        self._counts: Counter[str] = Counter()
        self._callers = Callers(self._counts, clock, cpu)
        self._copies = Copies(factory, self._callers, self._counts, clock, self._spawn)
        self._poison = Poison()
        self._ups: OrderedDict[tuple[str, str], Up] = OrderedDict()
        self._lines: OrderedDict[tuple[Lane, Caps], Line] = OrderedDict()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sent = 0
        self._closed = False
        self._many = Many(self.embed)

    def protocol(self) -> int:
        return self.PROTOCOL

    async def embed(self, call_id: str, lane: Lane, texts: list[Text], order: Order) -> Share:
        """The vectors of `texts`, in their order, and this caller's part of the price.

        A `call_id` that is known joins its call. Raises what the provider call raised, with `paid`
        set where a part of the list was answered, and with `beat`, a number in [0, 1), the same
        for all whom that failure hit; NoPermit's `error`; TimeoutError after `order.timeout_s`
        seconds; BatcherFull; BadVectors; ValueError for an empty list.
        """
        call = self._callers.get(call_id)
        if call is not None:
            return await self._callers.wait(call)
        call = self._callers.accept(call_id, texts, order)
        if self._is_known_bad(call, lane):  # all of it, or what spoils it
            return await self._callers.wait(call)
        if order.coalesce:
            self._enqueue(call, lane)
            return await self._callers.wait(call)
        flights = self._alone(call, lane)
        if len(flights) > 1:
            for flight in flights:
                self._spawn(self._send(flight))
            return await self._callers.wait(call)
        call.waiters += 1
        try:
            await self._send(flights[0])  # in this very tick
            await asyncio.wait([call.done])  # its parts, where it had to be sent again
            call.claimed = True
            return call.done.result()
        finally:
            self._callers.leave(call)

    async def embed_many(self, messages: list[Message]) -> list[tuple[int, Share | Exception]]:
        """`embed` for several lists, answered as soon as some are done: see `courier`."""
        return await self._many(messages)

    def drop(self, call_id: str) -> None:
        """Nobody waits for this call any more. Safe to repeat."""
        call = self._callers.get(call_id)
        if call is None:
            return
        if call.done.done():
            self._callers.write_off(call)  # its answer got lost on the way
        else:
            self._callers.finish(call, TimeoutError("the caller went away"))

    def stats(self) -> dict[str, Any]:
        return {
            "texts_queued": self._callers.texts_queued,
            "calls_under_way": len(self._callers.under_way()),
            "provider_calls": self._sent + self._counts["hedges"],
            "concurrency": {
                key[0]: up.state.concurrency.limit
                for key, up in self._ups.items()
                if up.state.in_flight or up.waiting
            },
            "busy": round(self._callers.busy_share(), 3),
            **self._counts,
        }

    async def close(self) -> None:
        """Lets what waits be sent and come back for CLOSE_WAIT_S, then lets go of the provider."""
        self._closed = self._callers.closed = True
        for up in self._ups.values():
            self._stop_timer(up)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_WAIT_S)
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        for call in self._callers.under_way():
            self._callers.finish(call, TimeoutError("the Batcher was told to stop"))
        await self._copies.close()

    # --------------------------------------------------------------------------------- callers

    def _is_known_bad(self, call: Call, lane: Lane) -> bool:
        """Whether the call has failed by what the provider has refused lately."""
        if call.order.anew or not len(self._poison):
            return False
        for position, error in self._poison.among(lane, call.texts, self._clock()):
            self._counts["remembered"] += 1
            self._refuse(call, position, error)
            if call.error is not None:
                self._callers.finish(call, error)
                return True
        self._callers.complete_if(call)
        return call.done.done()

    def _refuse(self, call: Call, position: int, error: Exception) -> None:
        """The provider does not want this text, which is the call's trouble or its own."""
        call.left -= 1
        if call.order.partial:
            call.refused[position] = alone(error)
        else:
            call.error = error

    # -------------------------------------------------------------------------- lanes and queues

    def _up_of(self, lane: Lane) -> Up:
        key = (lane.deployment, lane.owner)
        up = self._ups.get(key)
        if up is None:
            self._forget_quiet(self._ups, lambda up: not up.waiting and not up.state.in_flight)
            up = self._ups[key] = Up()
        self._ups.move_to_end(key)
        return up

    def _line_of(self, lane: Lane, caps: Caps) -> Line:
        key, up = (lane, caps), self._up_of(lane)
        line = self._lines.get(key)
        if line is None:
            self._forget_quiet(self._lines, lambda line: line.state.is_idle)
            linger_s = min(RETRY_LINGER_S, caps.lingers_s(bulk=False)) if lane.retry else 0.0
            state: LaneState[Unit] = LaneState(caps, idle_linger_s=linger_s)
            line = self._lines[key] = Line(lane, caps, up, state)
        elif line.state.is_idle:
            line.up = up  # the former may have been forgotten
        self._lines.move_to_end(key)
        return line

    def _forget_quiet(self, kept: OrderedDict[Any, T], quiet: Callable[[T], bool]) -> None:
        if len(kept) >= LINES_MAX:
            for key in [key for key, one in kept.items() if quiet(one)][: LINES_MAX // 10]:
                del kept[key]

    def _enqueue(self, call: Call, lane: Lane) -> None:
        line = self._line_of(lane, call.order.caps)
        up, bulk, now = line.up, call.order.bulk, self._clock()
        queued, tenant, fresh = line.queued[bulk], call.order.tenant, 0
        for position, text in enumerate(call.texts):
            if position in call.refused:
                continue
            unit = queued.get(text) or line.flying.get(text)
            if unit is None or (unit.airborne and call.deadline_s - unit.ends_s > JOIN_S):
                size = size_of(text)
                unit = Unit(text, size, tokens_of(size), tenant, bulk, now, line)
                queued[text] = unit
                line.state.add(unit, bulk)
                fresh += 1
            elif unit.airborne:
                self._counts["joined"] += 1
            unit.takers.append((call, position))
            call.units.append(unit)
        line.state.came(fresh, now)
        if not fresh:
            return
        if call.wait_until_s < up.state.shut_s and now < up.state.shut_s:
            self._give_up(call, up.state.refusal)
            return
        up.waiting[lane, line.caps] = line
        self._tick_soon(up)

    def _tick_soon(self, up: Up) -> None:
        """Look at the upstream's lanes when this tick of the event loop has ended."""
        if not up.ticking:
            up.ticking = True
            self._spawn(self._tick(up))

    async def _tick(self, up: Up) -> None:
        flights = self._ready(up)
        for flight in flights[1:]:
            self._spawn(self._send(flight))
        if flights:
            await self._send(flights[0])

    def _ready(self, up: Up) -> list[Flight]:
        """The calls that are to leave now; a timer is set for those that have to wait."""
        up.ticking = False
        now, flights = self._clock(), []
        told = self._next(up, now)
        while isinstance(told, tuple):
            line, go = told
            flight = self._board(line, go, now)
            if flight is not None:
                flights.append(flight)
            told = self._next(up, now)
        for key, line in list(up.waiting.items()):
            if not line.state.waits:
                del up.waiting[key]
        if told is not None:
            self._wake_at(up, told, now)
        return flights

    def _next(self, up: Up, now: float) -> tuple[Line, Go[Unit]] | float | None:
        """A call to make now, of the lane that has waited longest for its turn; or when to ask
        again."""
        wake_s: float | None = None
        for bulk in up.state.turns:
            for key, line in up.waiting.items():
                told = line.state.next_of(bulk, up.state, now)
                if isinstance(told, Go):
                    up.waiting.move_to_end(key)
                    return line, told
                wake_s = sooner(wake_s, told)
        return wake_s

    def _wake_at(self, up: Up, wake_s: float, now: float) -> None:
        if up.timer is not None and up.timer_s <= wake_s:
            return
        self._stop_timer(up)
        if not self._closed:
            up.timer_s = wake_s
            up.timer = asyncio.get_running_loop().create_task(self._wake(up, wake_s - now))

    async def _wake(self, up: Up, after_s: float) -> None:
        await self._pause(after_s)
        up.timer = None
        self._tick_soon(up)

    def _stop_timer(self, up: Up) -> None:
        if up.timer is not None:
            up.timer.cancel()
            up.timer = None

    def _spawn(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --------------------------------------------------------------------------------- boarding

    def _board(self, line: Line, go: Go[Unit], now: float) -> Flight | None:
        """The call that carries these texts, as far as somebody has time left to wait for them."""
        aboard: dict[Text, Unit] = {}
        for unit in go.units:
            unit.queued = False
            unlist(line.queued[unit.bulk], unit)
            unlist(line.flying, unit)
            for call, _ in unit.takers:
                if call.deadline_s <= now and not call.done.done():
                    self._callers.finish(
                        call, TimeoutError("the deadline passed before the texts left")
                    )
            twin = aboard.get(unit.text)
            if twin is not None:
                twin.takers += unit.takers
                for call, _ in unit.takers:
                    call.units.append(twin)
                unit.takers = []
            elif unit.takers:
                aboard[unit.text] = unit
        units = [unit for unit in aboard.values() if unit.takers]
        if not units:
            return None
        line.state.began(go.bulk, line.up.state)
        tree = go.tree if isinstance(go.tree, Tree) else None
        flight = self._flight(line.lane, line.caps, units, line.up, line, go.bulk, tree)
        line.flying.update((unit.text, unit) for unit in units)
        return flight

    def _alone(self, call: Call, lane: Lane) -> list[Flight]:
        """The calls that carry a caller's list and nobody else's."""
        now, caps = self._clock(), call.order.caps
        wanted: dict[Text, Unit] = {}
        for position, text in enumerate(call.texts):
            if position in call.refused:
                continue
            unit = wanted.get(text)
            if unit is None:
                size = size_of(text)
                unit = Unit(text, size, tokens_of(size), call.order.tenant, False, now, None)
                unit.queued = False
                wanted[text] = unit
            unit.takers.append((call, position))
        call.units = list(wanted.values())
        return self._flights(lane, caps, call.units, self._up_of(lane), call.order.bulk, None)

    def _flights(
        self, lane: Lane, caps: Caps, units: list[Unit], up: Up, bulk: bool, tree: Tree | None
    ) -> list[Flight]:
        holding = up.state.learnt.under(caps, self._clock())
        return [
            self._flight(lane, caps, units[run.start : run.stop], up, None, bulk, tree)
            for run in cut([unit.size for unit in units], holding)
        ]

    def _flight(
        self,
        lane: Lane,
        caps: Caps,
        units: list[Unit],
        up: Up,
        line: Line | None,
        bulk: bool,
        tree: Tree | None,
    ) -> Flight:
        flight = Flight(lane, caps, up, line, units, bulk, buyers_of(units), tree)
        ends_s = flight.ends_s
        for unit in units:
            unit.airborne, unit.ends_s = True, ends_s
        return flight

    def _landed(self, flight: Flight) -> None:
        line = flight.line
        for unit in flight.units:
            unit.airborne = False
            if line is not None:
                unlist(line.flying, unit)
        if line is not None:
            line.state.ended(flight.bulk, flight.up.state)
            if flight.up.waiting:
                self._tick_soon(flight.up)

    # --------------------------------------------------------------------------------- sending

    async def _send(self, flight: Flight) -> None:
        """Makes one provider call and hands every caller in it its part, or the failure."""
        self._sent += 1
        call_id = f"call-{self._sent}"
        count = len(flight.units)
        self._counts["texts_sent"] += count
        self._counts["callers_coalesced"] += len(flight.buyers) if len(flight.buyers) > 1 else 0
        state, began_s = flight.up.state, self._clock()
        try:
            vectors, spare = await self._copies.ask(flight)
        except NoPermit as refusal:
            self._sent -= 1
            self._counts["texts_sent"] -= count
            self._landed(flight)
            self._shut(flight, refusal)
        except Exception as error:  # noqa: BLE001
            # It is the callers', whatever it is: each of them gets it, or another try without the
            # others.
            self._counts["failures"] += 1
            self._landed(flight)
            self._heed(flight, error, began_s)
            self._failed(flight, error)
        except asyncio.CancelledError:
            self._landed(flight)
            for call in flight.buyers:
                if not call.done.done():
                    self._callers.finish(call, TimeoutError("the Batcher was told to stop"))
            raise
        else:
            now = self._clock()
            full = state.is_full_of(flight.bulk)
            state.concurrency.answered(count, began_s, now, full=full)
            if vectors.room is not None:
                state.told(vectors.room, now)
            if flight.line is not None:
                flight.line.state.linger.took(now - began_s)
            flight.up.answered.add(flight.lane.params)
            self._callers.answered(count)
            if flight.tree is not None:
                flight.tree.found = True
            self._landed(flight)
            self._hand_out(flight, vectors, spare, call_id)

    # -------------------------------------------------------------------------- what came of it

    def _shut(self, flight: Flight, refusal: NoPermit) -> None:
        """There was no permit: texts go back to the front, callers without patience away."""
        up, line = flight.up, flight.line
        up.state.shut(self._clock() + refusal.retry_after_s, refusal.error)
        self._counts["no_permit"] += 1
        if line is None:
            for call in flight.buyers:
                self._give_up(call, refusal.error)
            return
        units = self._still_wanted(flight.units)
        if flight.tree is not None:
            self._again(flight, units, flight.tree)
        else:
            for unit in units:
                unit.queued = True
                line.queued[unit.bulk].setdefault(unit.text, unit)
            line.state.queue(flight.bulk).put_back(units)
        up.waiting[line.lane, line.caps] = line
        self._tick_soon(up)
        waiting = {
            call
            for one in up.waiting.values()
            for unit in one.state.units()
            for call, _ in unit.takers
            if call.wait_until_s < up.state.shut_s
        }
        for call in waiting:
            self._give_up(call, refusal.error)

    def _heed(self, flight: Flight, error: Exception, began_s: float) -> None:
        """What a failure says of how much the provider can take."""
        status, now = getattr(error, "upstream_status", None), self._clock()
        hung = isinstance(error, TimeoutError) and now - began_s >= HANGS_S
        if status in PUSHES_BACK or hung:
            flight.up.state.concurrency.pushed_back(began_s, now)
            flight.up.state.pause(getattr(error, "retry_after_s", None) or 0.0, now)

    def _failed(self, flight: Flight, error: Exception) -> None:
        self._owe(flight, getattr(error, "paid", None))
        units = self._still_wanted(flight.units)
        if not units:
            return
        status = getattr(error, "upstream_status", None)
        of_text = getattr(error, "param", None) not in NOT_OF_A_TEXT.union(
            name for name, _ in flight.lane.params
        )
        if status not in BAD_INPUT or not of_text:
            self._fail_all(units, error)
        elif len(flight.units) == 1:
            self._spoil(flight, units[0], error)
        elif self._learn(flight, units, status, error):
            pass
        elif self._is_hopeless(flight):
            self._fail_all(units, error)
        elif len(units) == 1 or _is_one_list(units):
            if len(units) == len(flight.units):
                self._fail_all(units, error)
            else:  # the bad text may be of somebody who has left
                self._again(flight, units, flight.tree or Tree())
        else:
            self._counts["halved"] += 1
            half = middle([unit.takers[0][0] for unit in units])
            tree = flight.tree or Tree()
            for part in (units[half:], units[:half]):  # the last one told goes first
                self._again(flight, part, tree)

    def _still_wanted(self, units: list[Unit]) -> list[Unit]:
        """Those of some texts that may be sent again, by whom they are still wanted.

        Who has failed already has waited only for this call to end.
        """
        ended: dict[Call, None] = {}
        for unit in units:
            if all(_is_sound(call) for call, _ in unit.takers):
                continue
            for call, _ in unit.takers:
                if call.error is not None and not call.done.done():
                    call.left -= 1
                    ended[call] = None
            unit.takers = [taker for taker in unit.takers if _is_sound(taker[0])]
        for call in ended:
            self._callers.complete_if(call)
        return [unit for unit in units if unit.takers]

    def _learn(self, flight: Flight, units: list[Unit], status: int, error: Exception) -> bool:
        """Whether the refusal names a cap: then the call goes out again in parts within it."""
        sent = {"items": len(flight.units), "tokens": flight.tokens, "size": flight.size}
        learnt = learn(status, str(error), **sent)
        if not learnt:
            return False
        self._counts["caps_learnt"] += 1
        up, now = flight.up, self._clock()
        up.state.learnt.note(learnt, now)
        caps = up.state.learnt.under(flight.caps, now)
        for run in reversed(cut([unit.size for unit in units], caps)):
            self._again(flight, units[run.start : run.stop], flight.tree or Tree())
        return True

    def _is_hopeless(self, flight: Flight) -> bool:
        tree = flight.tree
        if tree is None or tree.found or tree.leaves < LEAVES_MAX:
            return False
        return flight.lane.params not in flight.up.answered

    def _again(self, flight: Flight, units: list[Unit], tree: Tree) -> None:
        """A part of a refused call goes out again, before what waits."""
        line = flight.line
        if line is None:
            again = self._flight(
                flight.lane, flight.caps, units, flight.up, None, flight.bulk, tree
            )
            self._spawn(self._send(again))
            return
        line.flying.update((unit.text, unit) for unit in units)
        line.state.hurry(Go(units, flight.bulk, tree))
        flight.up.waiting[line.lane, line.caps] = line
        self._tick_soon(flight.up)

    def _spoil(self, flight: Flight, unit: Unit, error: Exception) -> None:
        """The provider refuses this one text."""
        if flight.tree is not None:
            flight.tree.leaves += 1
        if flight.lane.params in flight.up.answered:
            self._poison.remember(flight.lane, unit.text, error, self._clock())
        takers, unit.takers = unit.takers, []
        alike = {call for call, _ in takers}
        for call, position in takers:
            if not call.done.done():
                self._refuse(call, position, error)
        for call in alike:
            if call.error is not None:
                self._callers.release(call)
            self._callers.complete_if(call)

    def _fail_all(self, units: list[Unit], error: Exception) -> None:
        """The failure is all callers', whole lists of them."""
        calls: dict[Call, int] = {}
        for unit in units:
            for call, _ in unit.takers:
                calls[call] = calls.get(call, 0) + 1
            unit.takers = []
        if len(calls) > 1:
            error.beat = self._rng.random()  # type: ignore[attr-defined]
        for call, positions in calls.items():
            if not call.done.done():
                call.left -= positions
                call.error = error
                self._callers.release(call)
                self._callers.complete_if(call)

    def _give_up(self, call: Call, error: Exception | None) -> None:
        """The call cannot wait for a permit; what of it is under way is awaited."""
        if call.done.done():
            return
        call.error = error or TimeoutError("there was no permit in time")
        self._callers.release(call)
        self._callers.complete_if(call)

    def _owe(self, flight: Flight, paid: Paid | None) -> None:
        """A provider call has brought nothing, and costs: each of its callers pays a part."""
        if paid is None:
            return
        weights = list(flight.buyers.values())
        tokens = split(paid.prompt_tokens, weights)
        costs = split_cost(paid.cost_nano, weights)
        for call, part, cost in zip(flight.buyers, tokens, costs, strict=True):
            debt = Paid(part, cost, paid.model)
            if call.done.done():
                self._callers.unclaimed(debt)
            else:
                call.debts.append(debt)

    def _hand_out(
        self, flight: Flight, vectors: Vectors, spare: Spare | None, call_id: str
    ) -> None:
        places: dict[Call, tuple[list[int], list[int]]] = {}
        for row, unit in enumerate(flight.units):
            for call, position in unit.takers:
                place = places.get(call)
                if place is None:
                    place = places[call] = ([], [])
                place[0].append(position)
                place[1].append(row)
            unit.takers = []
        weights = list(flight.buyers.values())
        parts = zip(
            flight.buyers,
            split(vectors.prompt_tokens, weights),
            split_cost(vectors.cost_nano, weights),
            split_spare(spare, weights),
            strict=True,
        )
        count = len(flight.units)
        for call, tokens, cost, part_spare in parts:
            positions, rows = places.pop(call, ([], []))
            part = Part(positions, rows, vectors, tokens, cost, call_id, count, part_spare)
            self._arrived(call, part)
        for call, (positions, rows) in places.items():  # who came later pays nothing
            self._arrived(call, Part(positions, rows, vectors, 0, 0, call_id, count))

    def _arrived(self, call: Call, part: Part) -> None:
        if call.done.done():
            self._callers.unclaimed(part)
            return
        call.parts.append(part)
        call.left -= len(part.positions)
        self._callers.complete_if(call)


def _is_sound(call: Call) -> bool:
    return call.error is None and not call.done.done()


def _is_one_list(units: Sequence[Unit]) -> bool:
    """Whether all is one caller's, whose list fails as a whole."""
    callers = {call for unit in units for call, _ in unit.takers}
    return len(callers) == 1 and not callers.pop().order.partial
