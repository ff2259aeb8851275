"""Which lane a call takes, and the relay itself.

    lane        takes the relay
    litellm     never
    auto        providers in AUTO, once LiteLLM has shown what it makes of a request of this form
    relay       any provider that speaks OpenAI's format, likewise

The first request of a form goes over LiteLLM and is overheard; those after it are sent as that one
was. So LiteLLM says once where a provider is, with which headers it is called, and what becomes of
the parameters; a request that it would change is never sent otherwise than changed. It also reads
every answer that is not plain: a refusal, an odd shape, another service tier. It is handed the
answer that is already there, and asks nobody.
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import httpx

from actors.batcher.policy import Text, Vectors
from actors.registry.sums import Numbers, Series
from forebay import schemas
from forebay.errors import ResponseValidationError
from forebay.providers.base import STALL_S, Answer, Chunks, Resolve
from forebay.providers.calls import LOCAL, NOT_HANDED_ON, Call
from forebay.providers.litellm import SAY_END, LiteLLMProvider, listed
from forebay.providers.prices import PriceBound, PromptCaching, is_price
from forebay.providers.relay.answers import mend_usage, read_answer, read_vectors
from forebay.providers.relay.connection import Response
from forebay.providers.relay.ear import Ear
from forebay.providers.relay.events import Events
from forebay.providers.relay.forms import form_of
from forebay.providers.relay.lessons import FORMS_MAX, LESSON_S, Lesson, Lessons
from forebay.providers.relay.pool import Pool, Target
from forebay.providers.relay.rules import PATHS, Rule
from forebay.providers.remaining import room_in
from forebay.providers.streams import LiteLLMChunks, Opened
from forebay.providers.vectors import decoded
from forebay.providers.wire import EVENTS

if TYPE_CHECKING:
    from forebay.routing import Deployment

LaneName = Literal["auto", "litellm", "relay"]
Route = Literal["chat", "completion"]

AUTO = frozenset(
    {"openai", "azure", "groq", "together_ai", "mistral", "deepseek", "openrouter", "hosted_vllm"}
)
"""Providers over which a test holds both lanes side by side."""

DEPLOYMENTS_MAX = 1_000
"""Deployments that are known; above it all of them are forgotten."""
ANSWER_BYTES_MAX = 256 << 20

LOST = frozenset({401, 403, 404})
"""Answers after which LiteLLM is asked anew where a provider is, and with which key."""

_PARAMS = NOT_HANDED_ON | frozenset(
    {"api_base", "base_url", "api_key", "api_version", "organization", "drop_params"}
    | {"additional_drop_params", "allowed_openai_params", "extra_headers", "headers"}
    | {"extra_body", "base_model"}
)
"""Deployment parameters that mean the same for every call. With others (identities whose tokens
end, mocks, hooks) LiteLLM may do something else each time."""
_BODY = schemas.parameters("chat") | schemas.parameters("completion")

_OF_THE_WIRE = frozenset(
    {b"content-encoding", b"content-length", b"transfer-encoding", b"connection"}
)


@dataclass(frozen=True, slots=True, repr=False)
class _Known:
    """A deployment as it was when LiteLLM was asked: its parameters, resolved, its model, whether
    LiteLLM does the same for every call of it, and a number that its forms are filed under."""

    params: dict[str, Any]
    model: str
    is_steady: bool
    number: int


@dataclass(slots=True, repr=False, eq=False)
class _Way:
    """How a request goes over the relay: where, the bytes, the deployment's parameters."""

    target: Target
    data: bytes
    params: dict[str, Any]


class Lanes:
    """The provider of a system: LiteLLM's lane, and the relay beside it.

    Owns what LiteLLM has shown (bounded by DEPLOYMENTS_MAX and FORMS_MAX) and one pool of
    connections for each event loop that is not closed. `lane` is the configuration's; a
    deployment's own, in its `litellm_params`, goes before it.

    Failure behaviour: LiteLLM's lane's. What is known of a deployment is forgotten when its
    parameters change, and when the provider says that it is not there, or not for us.
    """

    def __init__(
        self,
        litellm: LiteLLMProvider,
        lane: LaneName = "auto",
        *,
        deployments_max: int = DEPLOYMENTS_MAX,
        forms_max: int = FORMS_MAX,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
    ) -> None:
        self.lane: LaneName = lane
        self._deployments_max = deployments_max
        self._answer_bytes_max = answer_bytes_max
        self._calls: Counter[tuple[str, str]] = Counter()  # by circuit and lane
        self._litellm = litellm
        self._known: dict[str, _Known] = {}
        self._lessons = Lessons(forms_max)
        self._numbers = 0
        self._pools: dict[asyncio.AbstractEventLoop, Pool] = {}

    @property
    def relayed(self) -> int:
        """Calls that went over the relay."""
        return sum(count for (_, lane), count in self._calls.items() if lane == "relay")

    def figures(self) -> dict[Series, Numbers]:
        """How many calls went over which lane, for a `Meter`."""
        return {("forebay_lane_calls", *taken): (n,) for taken, n in self._calls.items()}

    # ------------------------------------------------------------------------- the Provider

    async def warm(self) -> None:
        """Import LiteLLM, off the event loop."""
        await self._litellm.warm()

    async def close(self) -> None:
        """Close this loop's connections, and what LiteLLM's lane has."""
        pool = self._pools.pop(asyncio.get_running_loop(), None)
        if pool is not None:
            pool.close()
        await self._litellm.close()

    def price(
        self,
        deployment: Deployment,
        usage: Mapping[str, Any] | None,
        *,
        model: str | None = None,
    ) -> int | None:
        return self._litellm.price(deployment, usage, model=model)

    def price_bound(self, deployment: Deployment) -> PriceBound | None:
        return self._litellm.price_bound(deployment)

    def price_version(self, deployment: Deployment) -> str:
        return self._litellm.price_version(deployment)

    def prompt_caching(self, deployment: Deployment) -> PromptCaching | None:
        return self._litellm.prompt_caching(deployment)

    def count_tokens(self, deployment: Deployment, text: str) -> int | None:
        return self._litellm.count_tokens(deployment, text)

    def chat(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Coroutine[Any, Any, Answer]:
        """One chat completion.

        Raises:
            GatewayError: see `failures`.
        """
        return self._answer("chat", deployment, body, timeout_s, resolve)

    def completion(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Coroutine[Any, Any, Answer]:
        """One text completion.

        Raises:
            GatewayError: see `failures`.
        """
        return self._answer("completion", deployment, body, timeout_s, resolve)

    def chat_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = STALL_S,
    ) -> Chunks:
        """One chat completion, in chunks; as LiteLLM's lane gives it.

        Raises (from `anext`):
            GatewayError: see `failures`.
        """
        return self._stream("chat", deployment, body, timeout_s, stall_s, resolve)

    def completion_stream(
        self,
        deployment: Deployment,
        body: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
        stall_s: float = STALL_S,
    ) -> Chunks:
        """One text completion, in chunks; as `chat_stream`."""
        return self._stream("completion", deployment, body, timeout_s, stall_s, resolve)

    async def embed(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        *,
        timeout_s: float,
        resolve: Resolve,
    ) -> Vectors:
        """One embedding call; as LiteLLM's lane makes it.

        Raises:
            GatewayError: see `LiteLLMProvider.embed`.
        """
        return await self._litellm.embed(
            deployment, texts, params, timeout_s=timeout_s, resolve=resolve, once=self._embed_once
        )

    # --------------------------------------------------------------------------- the calls

    async def _answer(
        self,
        route: Route,
        deployment: Deployment,
        body: Mapping[str, Any],
        timeout_s: float,
        resolve: Resolve,
    ) -> Answer:
        lane = self._litellm
        way = self._way(route, deployment, body, resolve)
        if isinstance(way, asyncio.Future):
            way = await self._way_after(way, route, deployment, body, resolve)
        if not isinstance(way, _Way):
            with self._taught(deployment, way):
                return await lane.answer(route, deployment, body, timeout_s, resolve, way)
        call = Call(lane.module, deployment, way.params, timeout_s)
        response, data = await self._exchange(deployment, call, way)
        told = read_answer(route, data) if response.status == 200 else None
        if told is None:
            ear = self._handed_over(deployment, response, data)
            return await lane.answer(route, deployment, body, timeout_s, resolve, ear)
        usage, model = told["usage"], told["model"]
        json = None if mend_usage(usage) else data
        usd = usage.get("cost") if deployment.provider == "openrouter" else None
        cost_nano = lane.cost(deployment, usage, model, usd)
        return Answer(told, usage, cost_nano, model, json=json)

    def _stream(
        self,
        route: Route,
        deployment: Deployment,
        body: Mapping[str, Any],
        timeout_s: float,
        stall_s: float,
        resolve: Resolve,
    ) -> LiteLLMChunks:
        asked = body if body.get("stream") is True else {**body, "stream": True}

        async def begin() -> Opened:
            lane = self._litellm
            way = self._way(route, deployment, asked, resolve)
            if isinstance(way, asyncio.Future):
                way = await self._way_after(way, route, deployment, asked, resolve)
            if not isinstance(way, _Way):
                with self._taught(deployment, way):
                    return await lane.open(route, deployment, asked, timeout_s, resolve, way)
            call = Call(lane.module, deployment, way.params, timeout_s, "stream_timeout")
            response = await self._opened(deployment, call, way)
            if response.status == 200 and _content_type(response) == EVENTS:
                events = Events(
                    response,
                    PATHS[route],
                    deployment.provider,
                    call.error,
                    lane.ending,
                    deployment.provider in SAY_END,
                )
                return Opened(events, None, call.error, stall_s=call.limit_s)
            ear = self._handed_over(deployment, response, _Rest(response))
            try:
                return await lane.open(route, deployment, asked, timeout_s, resolve, ear)
            except BaseException:
                response.close()
                raise

        return LiteLLMChunks(begin, timeout_s, stall_s, deployment.provider, deployment.group)

    async def _embed_once(
        self,
        deployment: Deployment,
        texts: Sequence[Text],
        params: Mapping[str, Any],
        timeout_s: float,
        resolve: Resolve,
        encoding: str | None,
        doubted: bool,
    ) -> Vectors:
        lane = self._litellm
        given = {"input": listed(texts), **params}
        if encoding is not None:
            given["encoding_format"] = encoding
        way = self._way("embedding", deployment, given, resolve)
        if isinstance(way, asyncio.Future):
            way = await self._way_after(way, "embedding", deployment, given, resolve)
        if not isinstance(way, _Way):
            with self._taught(deployment, way):
                return await lane.embed_once(
                    deployment, texts, params, timeout_s, resolve, encoding, doubted, way
                )
        call = Call(lane.module, deployment, way.params, timeout_s)
        response, data = await self._exchange(deployment, call, way)
        told = read_vectors(data) if response.status == 200 else None
        if told is None:
            ear = self._handed_over(deployment, response, data)
            return await lane.embed_once(
                deployment, texts, params, timeout_s, resolve, encoding, doubted, ear
            )
        paid, estimated = lane.paid(deployment, told.model, texts, told.prompt_tokens)
        try:
            array = decoded(told.data, len(texts), params.get("dimensions"), doubted=doubted)
        except ResponseValidationError as error:
            failure = call.error(error)
            failure.paid = paid  # type: ignore[attr-defined]
            raise failure from None
        room = room_in(response.headers)
        return Vectors(array, paid.prompt_tokens, paid.cost_nano, paid.model, estimated, room)

    # ------------------------------------------------------------------------- what is known

    def _way(
        self,
        route: str,
        deployment: Deployment,
        body: Mapping[str, Any],
        resolve: Resolve,
        *,
        may_wait: bool = True,
    ) -> _Way | Ear | Lesson | None:
        """How to relay a request; an ear for LiteLLM's lane to learn it with, or None: LiteLLM's.
        A future where another request has that ear: it is done when there is more to say.

        Raises:
            ConfigurationError: a secret is missing.
        """
        known = self._knowledge(deployment, resolve)
        form = None if known is None else form_of(route, body)
        if known is None or form is None:
            return None
        key = known.number, route, form
        found = self._lessons.find(key, body, known.params, may_wait=may_wait)
        if not isinstance(found, Rule):
            return found
        try:
            return _Way(found.target, found.worded(body), known.params)
        except TypeError:  # a number or a text that JSON's writer refuses
            return None

    def _knowledge(self, deployment: Deployment, resolve: Resolve) -> _Known | None:
        """What is known of a deployment as it is now; None where the relay does not serve it."""
        own: LaneName | None = deployment.params.get("lane")
        name = self.lane if own is None else own
        if name == "litellm" or (name == "auto" and deployment.provider not in AUTO):
            return None
        if self._litellm.module is None:
            return None
        params = resolve(deployment.params)
        known = self._known.get(deployment.id)
        if known is None or known.params != params or known.model != deployment.model:
            if len(self._known) >= self._deployments_max:
                self._known.clear()
            self._numbers += 1
            known = _Known(params, deployment.model, _is_steady(params), self._numbers)
            self._known[deployment.id] = known
        return known if known.is_steady else None

    async def _way_after(
        self,
        lesson: Lesson,
        route: str,
        deployment: Deployment,
        body: Mapping[str, Any],
        resolve: Resolve,
    ) -> _Way | Ear | None:
        """As `_way`, when somebody else's lesson is over, or has taken LESSON_S."""
        await asyncio.wait((lesson,), timeout=LESSON_S)
        way = self._way(route, deployment, body, resolve, may_wait=False)
        assert not isinstance(way, asyncio.Future)
        return way

    @contextmanager
    def _taught(self, deployment: Deployment, ear: Ear | None) -> Iterator[None]:
        """A call of LiteLLM's lane, and the lesson that it may be to others."""
        lane = "embedded" if deployment.provider == LOCAL else "litellm"
        self._calls[deployment.circuit, lane] += 1
        try:
            yield
        finally:
            if ear is not None:
                ear.over()

    def _handed_over(
        self, deployment: Deployment, response: Response, content: bytes | _Rest
    ) -> Ear | None:
        """An ear that holds an answer which is LiteLLM's to read. None for one that sends us
        elsewhere: LiteLLM is to ask there."""
        status = response.status
        if status in LOST or 300 <= status < 400:
            self._known.pop(deployment.id, None)
        if 300 <= status < 400:
            return None
        # What is compressed has been unpacked by now.
        kept = [(n, v) for n, v in response.fields if n.lower() not in _OF_THE_WIRE]
        if isinstance(content, bytes):
            return Ear(httpx.Response(status, headers=kept, content=content))
        return Ear(httpx.Response(status, headers=kept, stream=content))

    # ------------------------------------------------------------------------------ the wire

    async def _exchange(
        self, deployment: Deployment, call: Call, way: _Way
    ) -> tuple[Response, bytes]:
        """One request and its whole answer, and the body of that."""
        outer = sys.exception()
        self._calls[deployment.circuit, "relay"] += 1
        pool, limit_s = self._pool(), call.limit_s
        try:
            response = pool.send(way.target, way.data, limit_s)
            if response is None:
                response = await pool.open_and_send(way.target, way.data, limit_s)
            return response, await response.read(self._answer_bytes_max)
        except Exception as error:  # noqa: BLE001 - all of it is raised again, translated
            raise call.error(error, outer) from None

    async def _opened(self, deployment: Deployment, call: Call, way: _Way) -> Response:
        """One request, and the beginning of its answer."""
        outer = sys.exception()
        self._calls[deployment.circuit, "relay"] += 1
        try:
            response = await self._pool().post(way.target, way.data, call.limit_s)
            response.unhurried()
            return response
        except Exception as error:  # noqa: BLE001 - all of it is raised again, translated
            raise call.error(error, outer) from None

    def _pool(self) -> Pool:
        loop = asyncio.get_running_loop()
        pool = self._pools.get(loop)
        if pool is None:
            for other in list(self._pools):
                if other.is_closed():
                    self._pools.pop(other, None)
            pool = self._pools[loop] = Pool()
        return pool


class _Rest(httpx.AsyncByteStream):
    """What is left of a response, for LiteLLM to read."""

    def __init__(self, response: Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self._response.piece():
            yield piece

    async def aclose(self) -> None:
        self._response.close()


def _content_type(response: Response) -> str:
    return response.header(b"content-type").partition(b";")[0].strip().decode("latin-1")


def _is_steady(params: Mapping[str, Any]) -> bool:
    return all(name in _PARAMS or name in _BODY or is_price(name) for name in params)
