"""One HTTP request and its answer, over bare ASGI.

Rule 1: a body is read once, counted while it streams in, and only after the caller is known.
Rule 2: every answer carries the request's id; every failure has its status and its shape, and
        none has a stack trace.
"""

from __future__ import annotations

import logging
import math
import re
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, Protocol, TypeVar, cast
from urllib.parse import parse_qsl

import orjson
from starlette.types import Receive, Scope, Send

from deployments.http.auth import TenantIdentity
from deployments.http.errands import ClientGone, unless_gone
from deployments.http.peer import peer_behind
from deployments.http.service import HttpCall, Priority, Route, Service
from forebay.body import too_large
from forebay.call import checked_key
from forebay.errors import (
    AuthenticationError,
    BudgetExceeded,
    GatewayError,
    InvalidRequest,
    PermissionDenied,
    RateLimitError,
)
from forebay.schemas import BODY_BYTES_MAX, parse_json

T = TypeVar("T")
Header = tuple[bytes, bytes]
Handler = Callable[["Exchange"], Awaitable[None]]

JSON: Header = (b"content-type", b"application/json")
NO_SNIFFING: Header = (b"x-content-type-options", b"nosniff")

log = logging.getLogger("forebay.http")

_ID = re.compile(rb"[A-Za-z0-9._:/+=@~-]{1,128}")
_KEY_LIKE = re.compile(
    r"""(?ix)
      (?: bearer\s+ | (?:api[-_]?key|token|secret|password|authorization)["']?\s*[:=]\s*["']? )
      [^\s"',}]+
    | \b (?:sk|pk|rk|gsk|xai|key|fb|AIza) [-_]? [\w-]{12,}
    """
)


class Exchange:
    """A request being answered. Belongs to one task; `started` says that the status is out."""

    __slots__ = (
        "_echo_id",
        "_receive",
        "_send",
        "arrived_s",
        "handed_on",
        "headers",
        "request_id",
        "scope",
        "service",
        "started",
        "tenant",
    )

    def __init__(
        self,
        service: Service,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        arrived_s: float,
        new_id: Callable[[], str],
        echo_id: bool = True,
    ) -> None:
        self._echo_id = echo_id
        self.service = service
        self.scope = scope
        self._receive = receive
        self._send = send
        self.arrived_s = arrived_s
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        given = self.headers.get(b"x-request-id")
        named = given is not None and _ID.fullmatch(given) is not None
        self.request_id: str = given.decode() if given is not None and named else new_id()
        self.tenant: str | None = None
        self.started = False
        self.handed_on = False  # the service answers for it from now on

    # --- in -----------------------------------------------------------------------------------

    def identify(self) -> TenantIdentity:
        """The caller, or AuthenticationError. Call it before anything else is read."""
        identity = self.service.keys.identify(self.headers)
        self.tenant = identity.tenant
        return identity

    def admin(self) -> TenantIdentity:
        """The caller, who must be an admin; AuthenticationError or PermissionDenied."""
        identity = self.identify()
        if not identity.admin:
            raise PermissionDenied("This needs an admin's key.", code="admin_only")
        return identity

    def tenant_asked(self, what: str) -> str | None:
        """The tenant that `?tenant=` names: an admin may name any, others only themselves."""
        identity = self.identify()
        tenant = self.query().get("tenant")
        if identity.admin:
            return tenant
        if tenant not in (None, identity.tenant):
            raise PermissionDenied(f"A tenant sees only its own {what}.", param="tenant")
        return identity.tenant

    def query(self) -> dict[str, str]:
        """The query string; of a name that is given twice the last one counts."""
        return dict(parse_qsl(self.scope["query_string"].decode("latin-1")))

    async def json_body(self) -> dict[str, Any]:
        """The request's JSON object; 413, 415 or 400 when there is none."""
        return parse_json(await self._body())

    def call(self, route: Route, body: dict[str, Any], tenant: str, *, stream: bool) -> HttpCall:
        """The call that body and headers make together."""
        headers = self.headers
        call = HttpCall(
            route=route,
            body=body,
            tenant=tenant,
            request_id=self.request_id,
            stream=stream,
            timeout_s=_timeout(headers.get(b"x-forebay-timeout")),
            priority=_priority(headers.get(b"x-forebay-priority")),
            cache_control=self._cache_control(),
            idempotency_key=_idempotency_key(headers.get(b"idempotency-key")),
            trace_parent=_trace_parent(headers.get(b"traceparent")),
            arrived_s=self.arrived_s,
        )
        self.handed_on = True
        return call

    def _cache_control(self) -> str | None:
        """What is asked of the cache; the header may stand there several times."""
        if b"cache-control" not in self.headers:
            return None
        lines = (value for name, value in self.scope["headers"] if name == b"cache-control")
        parts = b",".join(lines).decode("latin-1").lower().split(",")
        asked = {part.strip() for part in parts}
        return ", ".join(name for name in ("no-cache", "no-store") if name in asked) or None

    def correlation_id(self) -> str:
        """`X-Correlation-ID` as sent, or the request's id."""
        given = self.headers.get(b"x-correlation-id", b"")
        return given.decode() if _ID.fullmatch(given) else self.request_id

    def unless_gone(
        self, work: Coroutine[Any, Any, T], close: Callable[[T], Awaitable[None]] | None = None
    ) -> Coroutine[Any, Any, T]:
        """The result of `work`, or ClientGone as soon as nobody waits for it any more. Only after
        the body has been read. `close` is for a result that comes nevertheless."""
        return unless_gone(self._receive, work, close)

    async def _body(self) -> bytes:
        headers = self.headers
        encoding = headers.get(b"content-encoding")
        if encoding is not None and encoding.strip().lower() not in (b"", b"identity"):
            raise InvalidRequest.about(
                "Content-Encoding",
                "Compressed request bodies are not accepted.",
                code="unsupported_content_encoding",
                status=415,
            )
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind.startswith(b"multipart/"):
            raise InvalidRequest.about(
                "Content-Type",
                "The body must be application/json.",
                code="unsupported_content_type",
                status=415,
            )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared) > BODY_BYTES_MAX:
            raise too_large()
        peer = peer_behind(self._receive)
        body = None if peer is None else peer.whole_body()
        if body is None:
            return await self._read()
        if len(body) > BODY_BYTES_MAX:
            raise too_large()
        return body

    async def _read(self) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > BODY_BYTES_MAX:
                raise too_large()
            if not message.get("more_body"):
                return b"".join([*pieces, piece]) if pieces else bytes(piece)
            pieces.append(piece)

    # --- out ----------------------------------------------------------------------------------

    async def start(self, status: int, headers: list[Header]) -> None:
        """Send status and headers; the request's id is added, unless the server around us does."""
        self._complete(headers)
        await self._begin(status, headers)

    def _complete(self, headers: list[Header]) -> None:
        if self._echo_id:
            headers.append((b"x-request-id", self.request_id.encode()))
        headers.append(NO_SNIFFING)

    async def _begin(self, status: int, headers: list[Header]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": body, "more_body": more})

    async def send(self, status: int, body: bytes, headers: list[Header] | None = None) -> None:
        """Send a whole answer; JSON unless `headers` names another content type."""
        headers = [JSON] if headers is None else headers
        headers.append((b"content-length", b"%d" % len(body)))
        self._complete(headers)
        peer = peer_behind(self._send)
        if peer is not None and peer.answer(status, headers, body):
            self.started = True
            return
        await self._begin(status, headers)
        await self.write(b"" if self.scope["method"] == "HEAD" else body, more=False)

    async def send_json(self, value: Any, status: int = 200) -> None:
        await self.send(status, orjson.dumps(value, default=str))


Shape = Callable[[Exchange, GatewayError], dict[str, Any]]
"""How an API words an error."""


def openai_shape(exchange: Exchange, error: GatewayError) -> dict[str, Any]:
    """OpenAI's error body."""
    return {"error": error.body()}


class Endpoint:
    """What answers on one path: a handler per method, and a shape for everything that goes wrong.

    An ASGI app. Bounded by the server's own limits on connections. Failure behaviour: a
    GatewayError becomes its status; anything else is logged and becomes a 500 that names nothing
    but the request; once the status is out, the connection is cut instead. Where the path takes
    calls, of `route`, the service hears of those that came to nothing before it was asked.
    """

    def __init__(
        self,
        service: Service,
        handlers: Mapping[str, Handler],
        *,
        clock: Callable[[], float],
        new_id: Callable[[], str],
        echo_id: bool = True,
        shape: Shape = openai_shape,
        route: Route | None = None,
    ) -> None:
        self._echo_id = echo_id
        self._service = service
        self._route = route
        self._handlers = dict(handlers)
        if "GET" in handlers:
            self._handlers.setdefault("HEAD", handlers["GET"])
        self._clock = clock
        self._new_id = new_id
        self._shape = shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(
            self._service,
            scope,
            receive,
            send,
            arrived_s=self._clock(),
            new_id=self._new_id,
            echo_id=self._echo_id,
        )
        try:
            handler = self._handlers.get(scope["method"])
            if handler is None:
                raise _method_not_allowed(scope)
            await handler(exchange)
        except GatewayError as error:
            await self._fail(exchange, error)
        except ClientGone:
            return
        except Exception as error:  # noqa: BLE001 - the last line: it is logged and answered
            log_failure(exchange, error)
            await self._fail(exchange, internal_error(exchange))

    async def _fail(self, exchange: Exchange, error: GatewayError) -> None:
        if exchange.started:
            raise error
        if self._route is not None and not exchange.handed_on:
            self._service.refused(self._route, exchange.tenant, exchange.request_id, error.status)
        headers = [JSON, *refusal_headers(exchange, error)]
        if error.status == 405:
            headers.append((b"allow", ", ".join(sorted(self._handlers)).encode()))
        await exchange.send(error.status, orjson.dumps(self._shape(exchange, error)), headers)


def internal_error(exchange: Exchange) -> GatewayError:
    """What a client is told about a failure nobody foresaw."""
    return GatewayError(
        f"Internal error. Quote request id {exchange.request_id} when you report it.",
        code="internal_error",
    )


def log_failure(exchange: Exchange, error: Exception) -> None:
    """Log where an unforeseen failure came from, with anything that looks like a key cut out."""
    trace = "".join(traceback.format_exception(error))
    told = {"fields": {"request_id": exchange.request_id, "tenant": exchange.tenant}}
    text = _KEY_LIKE.sub("[redacted]", trace)
    log.error("request %s failed\n%s", exchange.request_id, text, extra=told)


def refusal_headers(exchange: Exchange, error: GatewayError) -> list[Header]:
    """When to come back, what was tried, and what is left of the limits."""
    headers: list[Header] = [
        (b"x-litellm-call-id", exchange.request_id.encode()),
        (b"x-forebay-config-version", b"%d" % exchange.service.config_version),
    ]
    if error.retry_after_s is not None and error.status in (409, 429, 503):
        wait_s = max(0.0, error.retry_after_s)
        headers.append((b"retry-after", b"%d" % math.ceil(wait_s)))
        headers.append((b"retry-after-ms", b"%d" % math.ceil(wait_s * 1000)))
    if not _worth_a_retry(error):
        headers.append((b"x-should-retry", b"false"))
    if isinstance(error, AuthenticationError):
        headers.append((b"www-authenticate", b"Bearer"))
    if error.facts is not None:
        headers += attempt_headers(error.facts)
    if error.figures is not None:
        headers += limit_headers(error.figures)
    elif isinstance(error, RateLimitError) and exchange.tenant is not None:
        headers += limit_headers(exchange.service.figures(exchange.tenant))
    return headers


class Attempted(Protocol):
    """What was tried for a request: the last deployment, "" for none, and how often."""

    @property
    def deployment(self) -> str: ...
    @property
    def attempts(self) -> int: ...
    @property
    def retries(self) -> int: ...
    @property
    def fallbacks(self) -> int: ...


_NOT_TRIED: tuple[Header, ...] = (
    (b"x-forebay-attempts", b"0"),
    (b"x-litellm-attempted-retries", b"0"),
    (b"x-litellm-attempted-fallbacks", b"0"),
)


def attempt_headers(facts: Attempted) -> list[Header]:
    """What was tried, LiteLLM's names beside our own. Where nothing was, no deployment is named."""
    if not (facts.attempts or facts.retries or facts.fallbacks or facts.deployment):
        return list(_NOT_TRIED)
    headers: list[Header] = [
        (b"x-forebay-attempts", b"%d" % facts.attempts),
        (b"x-litellm-attempted-retries", b"%d" % facts.retries),
        (b"x-litellm-attempted-fallbacks", b"%d" % facts.fallbacks),
    ]
    if facts.deployment:
        deployment = ascii_value(facts.deployment)
        headers += (b"x-forebay-deployment", deployment), (b"x-litellm-model-id", deployment)
    return headers


def ascii_value(name: str) -> bytes:
    """A name as a header value; whatever does not belong in one is escaped."""
    return name.encode("ascii", "backslashreplace") if name.isprintable() else repr(name).encode()


def _worth_a_retry(error: GatewayError) -> bool:
    """Whether waiting helps: not for a spent budget, nor for what no limit will ever allow, nor for
    a key that was used for something else, though clients send what gets a 409 again.

    A provider that gives no time may be better any moment.
    """
    if isinstance(error, BudgetExceeded) or error.code == "idempotency_key_reused":
        return False
    told = error.retry_after_s is not None or error.upstream_status is not None
    return told or not isinstance(error, RateLimitError)


_LIMIT_NAMES: Mapping[str, tuple[bytes, bytes, bytes]] = {
    kind: (
        f"x-ratelimit-limit-{kind}".encode(),
        f"x-ratelimit-remaining-{kind}".encode(),
        f"x-ratelimit-reset-{kind}".encode(),
    )
    for kind in ("requests", "tokens")
}


def limit_headers(figures: Mapping[str, Any] | None) -> list[Header]:
    """OpenAI's x-ratelimit headers. Remaining is rounded down, reset up: both can be relied on."""
    headers: list[Header] = []
    for kind, figure in (figures or {}).items():
        limit, remaining, reset = _LIMIT_NAMES[kind]
        left = max(0, math.floor(figure.remaining))
        headers += (
            (limit, b"%d" % figure.limit),
            (remaining, b"%d" % left),
            (reset, duration(figure.reset_s)),
        )
    return headers


def duration(seconds: float) -> bytes:
    """Seconds as OpenAI writes them: 20ms, 1.5s, 6m0s. Rounded up to a millisecond.

    >>> duration(0.0201), duration(1.5), duration(360)
    (b'21ms', b'1.5s', b'6m0s')
    """
    ms = math.ceil(max(0.0, seconds) * 1000 - 1e-6)
    if ms < 1000:
        return b"%dms" % ms if ms else b"0s"
    minutes, ms = divmod(ms, 60_000)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60}m{text}".encode()
    return (f"{minutes}m{text}" if minutes else text).encode()


# --- headers that steer a request -------------------------------------------------------------


def _timeout(given: bytes | None) -> float | None:
    if given is None:
        return None
    try:
        timeout_s = float(given)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequest.about(
            "x-forebay-timeout", "x-forebay-timeout must be a positive number of seconds."
        )
    return timeout_s


def _priority(given: bytes | None) -> Priority:
    if given is None:
        return "interactive"
    priority = given.decode("latin-1").strip().lower()
    if priority not in ("interactive", "bulk"):
        raise InvalidRequest.about(
            "x-forebay-priority", "x-forebay-priority must be interactive or bulk."
        )
    return cast("Priority", priority)


def _trace_parent(given: bytes | None) -> str | None:
    return given.decode("latin-1") if given else None


def _idempotency_key(given: bytes | None) -> str | None:
    return None if given is None else checked_key(given.decode("latin-1"), "Idempotency-Key")


def _method_not_allowed(scope: Scope) -> InvalidRequest:
    return InvalidRequest(
        f"Not allowed to {scope['method'][:16]} on this path.",
        code="method_not_allowed",
        status=405,
    )
