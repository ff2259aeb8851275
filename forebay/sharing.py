"""Step 3: somebody has the answer, or is getting it, or we lead; and answers that cost nothing.

Rule 1: a tenant's answers are its own, unless the configuration shares them with everybody.
Rule 2: who only gets an answer pays nothing for it; its request counts all the same.
Rule 3: what was judged by other rules, or stands for another model, has another key.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from actors.batcher.policy import Text
from actors.cache.desk import FlightFailed, Hit, Joined, Lead
from actors.cache.policy import Scope, key, text_keys
from forebay import codec, schemas
from forebay.call import Call, Stream
from forebay.codec import Answer
from forebay.errors import GatewayError, GatewayTimeout, InvalidRequest, ProviderError
from forebay.finishing import finish
from forebay.relaying import followed, replayed
from forebay.request import Request
from forebay.reserving import Reservations
from forebay.reviewing import Reviewer
from forebay.routing import Group
from forebay.texts import Texts

if TYPE_CHECKING:
    from forebay.once import Before
    from forebay.system import System

ROUNDS_MAX = 16
"""How often a stream's follower asks again when its leader is lost, before it asks nobody."""
JOINED_TEXTS_MAX = 256
"""Longer lists are told of only where vectors are stored anyway. To join costs 10 us for each text
and takes its vector to the owner, whether anybody waits for it or not: for 2,048 texts of 1,536
dimensions 25 ms and 12 MB, where the list itself costs 5 ms (measured in one process). Such lists
are jobs, which read each text once; two of them seldom have the same texts under way."""
NO_JSON = (TypeError, ValueError, RecursionError)
"""What comes of a body that holds other things than JSON, or is too deep."""


class Sharing:
    """Finds answers that exist already or are on their way, over the cache's desk.

    Bounded by the desk, and by ROUNDS_MAX questions for a stream. Failure behaviour: fails open, as
    the desk does: where it knows nothing, the request leads.
    """

    def __init__(self, system: System, reservations: Reservations, reviewer: Reviewer) -> None:
        self._system = system
        self._reservations = reservations
        self._reviewer = reviewer

    @property
    def is_on(self) -> bool:
        """Whether anything is shared, as configured; else nothing has to be looked up."""
        config = self._system.config.gateway
        return config.enable_caching or config.enable_request_deduplication

    async def look_up(self, request: Request) -> Answer | Lead | None:
        """An answer from elsewhere; the lead, where it is ours to get; None: it is nobody else's.

        Raises:
            GatewayError: what the call failed with that this one shared.
        """
        system, call, facts = self._system, request.call, request.facts
        read, join = self.may_share(call)
        if not (read or join):
            return None
        scope = self.scope(call)
        address = self.address(scope, call, request.group)
        facts.cache_key = self.cache_key(address)
        asked_s = system.clock()
        try:
            found = await system.cache.lookup(
                address, scope, read=read, join=join, patience_s=request.left_s(system.clock)
            )
        except FlightFailed as failure:
            facts.cache = "joined"
            self.note_wait(request, asked_s)
            raise codec.unpack_error(failure.error) from None
        if isinstance(found, Joined):
            self.note_wait(request, asked_s)
        if isinstance(found, Lead):
            facts.cache = "miss"
            system.meter.cache("miss")
            return found
        if isinstance(found, Joined) and not self._reviewer.is_moderated(found):
            # A stream's, or one with a doubt: who wants it whole is to have it judged.
            facts.cache = "miss"
            system.meter.cache("miss")
            return system.cache.alone(address, scope)
        answer = self.shared(request, found)
        if facts.cache == "joined":  # it may be a stream's, which nobody has judged
            facts.warnings += self._reviewer.validate(request, answer)
        self.free(request)
        return answer

    async def look_up_stream(self, request: Request) -> Stream | Lead | None:
        """As `look_up`, for those who want the answer piece by piece."""
        system, call, facts = self._system, request.call, request.facts
        read, join = self.may_share(call)
        if not (read or join):
            return None
        scope = self.scope(call)
        address = self.address(scope, call, request.group)
        facts.cache_key = self.cache_key(address)
        for _ in range(ROUNDS_MAX):
            # Who leads may have to go on for others when its own time is up.
            ends_s = max(0.0, request.ends_s - system.clock())
            (found,) = await system.cache.ask(
                [address], scope, read=read, join=join, patience_s=ends_s, stream=True
            )
            chunks: AsyncGenerator[dict[str, Any], None]
            if isinstance(found, Lead):
                break
            if isinstance(found, Hit):
                chunks = replayed(call.route, self.shared(request, found))
            else:
                listening = system.cache.listen(found.flight)
                asked_s = system.clock()
                try:
                    news = await listening.more(request.left_s(system.clock))
                except BaseException as failure:
                    listening.close()
                    if not isinstance(failure, FlightFailed):
                        raise
                    facts.cache = "joined"
                    raise codec.unpack_error(failure.error) from None
                finally:
                    self.note_wait(request, asked_s)
                if news is None:
                    listening.close()
                    continue
                if isinstance(news, Joined):
                    listening.close()
                    chunks = replayed(call.route, self.shared(request, news))
                else:
                    facts.cache = "joined"
                    left_s = partial(request.left_s, system.clock)
                    lost, heard = partial(self._lost, request), partial(self._heard, request)
                    chunks = followed(listening, news, call.route, call.body, left_s, lost, heard)
            return await self.handed(request, chunks)
        else:
            found = Lead(address, scope, None)
        facts.cache = "miss"
        system.meter.cache("miss")
        return found

    def texts(self, request: Request, given: Sequence[Text]) -> Texts:
        """The texts of a request, each to be shared by a key of its own."""
        call, group = request.call, request.group
        shared = {name: value for name, value in call.body.items() if name != "input"}
        scope = self.scope(call)
        keys = text_keys(scope, call.route, group.name, shared, given, _meaning(group))
        return Texts(self._system.cache, scope, given, keys)

    def shared_texts(self, request: Request, texts: Texts) -> Answer:
        """The vectors of texts that are all known by now."""
        system, facts = self._system, request.facts
        facts.cached = texts.cached
        answer = texts.answer()
        if texts.sent_any:
            system.meter.cache("miss")
            return answer
        facts.cache = "hit" if facts.cached else "joined"
        first = request.group.deployments[0]
        saved = system.provider.price(first, answer.usage, model=answer.model)
        facts.saved_nano = saved or 0
        self.free(request)
        return answer

    def may_share_texts(self, call: Call, count: int) -> tuple[bool, bool]:
        """As `may_share`, for a list of so many texts."""
        read, join = self.may_share(call)
        return read, join and (read or count <= JOINED_TEXTS_MAX)

    def shared(self, request: Request, found: Hit | Joined) -> Answer:
        """A stored answer, or that of somebody else's call."""
        answer, facts = codec.unpack(found.value), request.facts
        facts.cache = "hit" if isinstance(found, Hit) else "joined"
        facts.saved_nano = answer.cost_nano or 0
        facts.response_id = answer.id
        if answer.clamped is not None:
            request.tell_clamp(answer.clamped)
        return answer

    def replay(self, request: Request, before: Before) -> Answer:
        """What the first request with this key was answered."""
        answer, facts = before.answer, request.facts
        facts.replayed = True
        facts.saved_nano = answer.cost_nano or 0
        facts.response_id = answer.id
        facts.clamped = answer.clamped
        facts.warnings += before.warnings
        return answer

    async def handed(
        self, request: Request, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> Stream:
        """A stream of chunks that no provider gives for this request."""
        system, facts = self._system, request.facts
        shared = self._share_out(request, chunks)
        system.meter.first_token(system.clock() - request.started_s)
        facts.total_s = system.clock() - request.started_s
        await anext(shared)  # into its `try`, as in `Streams.open`
        return Stream(shared, facts)

    def free(self, request: Request) -> None:
        """An answer from the cache, from somebody else's call, or from before: it costs nothing."""
        system, call, facts = self._system, request.call, request.facts
        if not facts.replayed:
            system.meter.cache(facts.cache)
        known = facts.replayed or facts.cache == "hit"
        if known and not system.tenants.counts_cache_hits(call.tenant):
            self._reservations.uncount(request)
        system.books.free(call, facts, system.clock() - request.started_s)

    def still_for_all(self, request: Request, lead: Lead | None) -> Lead | None:
        """Where tenants share answers, one's limit shortens nobody else's: another one leads."""
        clamped = request.facts.clamped is not None
        if lead is None or not clamped or self.scope(request.call).tenant is not None:
            return lead
        self._system.cache.land(lead)
        return None

    def note_wait(self, request: Request, since_s: float) -> None:
        """Somebody else's call was waited for since then: that is no overhead of ours."""
        request.facts.provider_s += self._system.clock() - since_s

    def may_share(self, call: Call) -> tuple[bool, bool]:
        """Whether a stored answer may serve the call, and whether another's running one may."""
        config = self._system.config.gateway
        if not self.is_on:
            return False, False
        if not schemas.understands(call.route, call.body):
            return False, False
        read = config.enable_caching and call.cache_read
        join = config.deduplicate == "all" or not _asks_for_variety(call.body)
        return read, join and config.enable_request_deduplication

    def scope(self, call: Call) -> Scope:
        """Who shares the answer: the tenant's own, or everybody where that is configured."""
        cache = self._system.config.gateway.cache_config
        shared = cache is not None and cache.scope == "shared"
        return Scope(None if shared else call.tenant)

    def address(self, scope: Scope, call: Call, group: Group) -> bytes:
        """Where an answer is kept: what was judged by other rules is kept elsewhere."""
        meaning = _meaning(group) + self._system.validation.rules
        try:
            return key(scope, call.route, group.name, call.body, meaning)
        except NO_JSON as error:  # Python's callers can ask for what no request can say
            message = f"the request cannot be sent as JSON: {error}"
            raise InvalidRequest(message, code="invalid_json") from None

    def cache_key(self, address: bytes) -> str:
        """What a correction of the answer is to take out of the cache, if anything."""
        return address.hex() if self._system.config.gateway.enable_caching else ""

    async def _share_out(
        self, request: Request, chunks: AsyncGenerator[dict[str, Any], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """A stream that is not ours. The first item is no chunk, as in `Relay.own`."""
        status, follows = "cancelled", request.facts.cache == "joined"
        clock = self._system.clock
        asked_s: float | None = None
        try:
            yield {}
            asked_s = clock()
            async for chunk in chunks:
                if follows:
                    self.note_wait(request, asked_s)
                asked_s = None
                yield chunk
                asked_s = clock()
            status = "ok"
        except GatewayError as error:
            status = str(error.status)
            raise
        finally:
            await chunks.aclose()
            if follows and asked_s is not None:
                self.note_wait(request, asked_s)
            if status in ("ok", "cancelled"):
                self.free(request)
            finish(self._system, request.call, request, status)

    def _heard(self, request: Request, whole: Answer) -> None:
        """The end of a stream that was somebody else's."""
        request.facts.saved_nano = whole.cost_nano or 0
        request.facts.response_id = whole.id

    def _lost(self, request: Request) -> GatewayError:
        """The stream that we followed came to no end, and what was told cannot be taken back."""
        if request.left_s(self._system.clock) <= 0:
            timeout_s = request.deadline_s - request.started_s
            return GatewayTimeout(f"no answer within {timeout_s:g} s", model=request.facts.group)
        return ProviderError("the call that this stream shared was lost", model=request.facts.group)


def _meaning(group: Group) -> str:
    """What a model's name stands for: another configuration may mean something else by it."""
    return " ".join(deployment.meaning for deployment in group.deployments)


def _asks_for_variety(body: dict[str, Any]) -> bool:
    """Whether two equal requests are meant to get two different answers."""
    temperature, n = body.get("temperature"), body.get("n")
    return (temperature is not None and temperature > 0) or (n is not None and n > 1)
