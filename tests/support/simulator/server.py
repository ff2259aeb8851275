"""Sockets and time: an HTTP/1.1 server that plays the scripted provider.

A request is read, its behaviour decided and its answer composed at once. What then has nothing to
wait for and nothing to break is answered in the same call, in one write; everything else becomes a
task that the client's going cancels.
"""

from __future__ import annotations

import asyncio
import re
import socket
import struct
import time
import uuid
from collections import Counter, deque
from collections.abc import Coroutine
from email.utils import formatdate
from http import HTTPStatus
from typing import Any, cast

import httptools
import orjson

from tests.support.simulator.dialects.anthropic import Anthropic
from tests.support.simulator.dialects.ask import (
    EVENT_STREAM,
    Ask,
    BadAsk,
    Dialect,
    Frame,
    Reply,
    Request,
    check_texts,
    compose,
)
from tests.support.simulator.dialects.cohere import Cohere
from tests.support.simulator.dialects.gemini import Gemini
from tests.support.simulator.dialects.openai import OpenAI
from tests.support.simulator.log import Log, hash_credential
from tests.support.simulator.prefix_cache import PrefixCache
from tests.support.simulator.script import Behaviour, Script, ScriptError
from tests.support.simulator.truth import count_tokens

BODY_BYTES_MAX = 64 << 20
PIPELINED_MAX = 64
CREDENTIALS_MAX = 10_000
ONE_WRITE_BYTES_MAX = 64 << 10
FOR_EVER_S = 3600.0

OPENAI: Dialect = OpenAI()
GEMINI: Dialect = Gemini()
ANTHROPIC: Dialect = Anthropic()
COHERE: Dialect = Cohere()
NAMES = {id(OPENAI): "openai", id(GEMINI): "gemini", id(ANTHROPIC): "anthropic"}
NAMES[id(COHERE)] = "cohere"

ROUTES: dict[str, tuple[str, Dialect]] = {
    "/v1/chat/completions": ("chat", OPENAI),
    "/v1/completions": ("completions", OPENAI),
    "/v1/embeddings": ("embeddings", OPENAI),
    "/v1/messages": ("messages", ANTHROPIC),
    "/v1/messages/count_tokens": ("count_tokens", ANTHROPIC),
    "/v2/chat": ("chat_v2", COHERE),
    "/v2/embed": ("embed_v2", COHERE),
    "/v1/embed": ("embed_v1", COHERE),
}
GEMINI_PATH = re.compile(r"(?:/v1beta|/v1)?/models/[^/:]+:([A-Za-z]+)")
GEMINI_ROUTES = {
    "generateContent": "generate_content",
    "streamGenerateContent": "stream_generate_content",
    "embedContent": "embed_content",
    "batchEmbedContents": "batch_embed_contents",
}
MESSAGES = {
    401: "Incorrect API key provided (simulated).",
    404: "The model `MODEL` does not exist or you do not have access to it (simulated).",
    429: "Rate limit reached for MODEL on requests per min (simulated).",
    500: "The server had an error while processing your request (simulated).",
    503: "The engine is currently overloaded, please try again later (simulated).",
    529: "Overloaded (simulated)",
}
SAYING = b'{"choices": [{"index": 0, "delta": {"content": "%b"}}]}'
MALFORMED = {
    "text": b"the boiler burst",
    "choices": b'{"id": "chatcmpl-0", "object": "chat.completion.chunk"}',
    "types": b'{"choices": [{"index": "zero", "delta": "word"}]}',
    "utf8": SAYING % b"\xff\xfe",
    "error": b'{"error": {"message": "the boiler burst (simulated)", "type": "server_error"}}',
    "huge": SAYING % (b"x" * (9 << 20)),
}
MODELS = ("sim", "sim-large", "sim-embed")

CREDENTIAL_HEADERS = (b"authorization", b"x-api-key", b"x-goog-api-key", b"api-key")
LOGGED_HEADERS = {
    b"accept": "accept",
    b"anthropic-beta": "anthropic-beta",
    b"anthropic-version": "anthropic-version",
    b"content-type": "content-type",
    b"idempotency-key": "idempotency-key",
    b"openai-organization": "openai-organization",
    b"openai-project": "openai-project",
    b"traceparent": "traceparent",
    b"user-agent": "user-agent",
    b"x-stainless-retry-count": "x-stainless-retry-count",
}


class Exchange:
    """One request under way. `record` is its line in the log, filled in as it goes."""

    __slots__ = ("ask", "behaviour", "connection", "dialect", "error", "held", "record", "reply")

    def __init__(self, connection: Connection, dialect: Dialect, record: dict[str, Any]) -> None:
        self.connection = connection
        self.dialect = dialect
        self.record = record
        self.ask: Ask | None = None
        self.reply: Reply | None = None
        self.error: tuple[int, bytes, bytes] | None = None
        self.held = False
        self.behaviour: Behaviour


class Simulator:
    """Owns the script, the log, the counters and the gate of running requests.

    Bounded by BODY_BYTES_MAX a request, PIPELINED_MAX requests waiting on a connection.
    Failure behaviour: nothing but the log outlives the process.
    """

    def __init__(self, log: Log) -> None:
        self.log = log
        self.script = Script()
        self.connections: set[Connection] = set()
        self.started_s = time.time()
        self._queue: deque[asyncio.Future[None]] = deque()
        self._id_prefix = str(uuid.uuid4())[:24]
        self._count = 0
        self._credentials: dict[bytes, str] = {}
        self._prefixes: PrefixCache | None = None
        self._running = 0
        self._reset_counters()

    def _reset_counters(self) -> None:
        self._running_max = self._running
        self._open_max = len(self.connections)
        self._routes: Counter[str] = Counter()
        self._statuses: Counter[int] = Counter()
        self._totals: Counter[str] = Counter()

    # -- taking a request ------------------------------------------------------------------

    def take(
        self, connection: Connection, request: Request
    ) -> tuple[Exchange, Coroutine[Any, Any, None]] | None:
        """Answer at once (None), or give back the exchange and what is left to do for it."""
        path = request.path
        route, dialect = ROUTES.get(path, ("", OPENAI))
        if not route:
            found = GEMINI_PATH.fullmatch(path)
            if found is not None:
                route, dialect = GEMINI_ROUTES.get(found[1], ""), GEMINI
        if not route and self._aside(connection, request):
            return None
        exchange = self._open(connection, request, route, dialect)
        if not route or request.method != b"POST":
            self._refuse(exchange, BadAsk(f"Invalid URL ({request.path})", status=404))
        else:
            self._prepare(exchange, request, route)
        if not self.log.merged:
            self.log.write({"event": "begin", **exchange.record})
        settings, behaviour = self.script.settings, exchange.behaviour
        if settings.concurrency is None and behaviour.plain and self._at_once(exchange):
            return None
        return exchange, self._play(exchange)

    def _open(
        self, connection: Connection, request: Request, route: str, dialect: Dialect
    ) -> Exchange:
        headers = request.headers
        count = self._count
        self._count = count + 1
        caller = headers.get(b"x-request-id")
        record: dict[str, Any] = {
            "id": f"{self._id_prefix}{count:012x}",
            "n": count,
            "request_id": caller.decode("latin-1") if caller is not None else None,
            "dialect": NAMES[id(dialect)],
            "route": route,
            "path": request.path,
            "model": "",
            "stream": False,
            "texts": 0,
            "prompt_tokens": 0,
            "completion_tokens": 0,
            "bytes_in": request.bytes_in,
            "bytes_out": 0,
            "status": 0,
            "chunks": 0,
            "fault": None,
            "disconnected": False,
            "start_ns": time.time_ns(),
            "start_mono_ns": time.monotonic_ns(),
            "credential": self._credential(request),
            "headers": {
                LOGGED_HEADERS[name]: value.decode("latin-1")
                for name, value in headers.items()
                if name in LOGGED_HEADERS
            },
            "keys": [],
        }
        if not self.log.merged:
            record["header_names"] = sorted(name.decode("latin-1") for name in headers)
        exchange = Exchange(connection, dialect, record)
        exchange.behaviour = self.script.base
        return exchange

    def _credential(self, request: Request) -> str | None:
        for name in CREDENTIAL_HEADERS:
            value = request.headers.get(name)
            if value is not None:
                break
        else:
            found = re.search(r"(?:^|&)key=([^&]*)", request.query)
            if found is None:
                return None
            value = found[1].encode()
        known = self._credentials.get(value)
        if known is None:
            if len(self._credentials) >= CREDENTIALS_MAX:
                self._credentials.clear()
            known = self._credentials[value] = hash_credential(value.decode("latin-1"))
        return known

    def _prepare(self, exchange: Exchange, request: Request, route: str) -> None:
        """Read the body, decide the behaviour, compose the answer or the refusal."""
        record = exchange.record
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            message = f"We could not parse the JSON body of your request: {error}"
            self._refuse(exchange, BadAsk(message))
            return
        if not isinstance(body, dict):
            self._refuse(exchange, BadAsk("The body is not a JSON object."))
            return
        keys = list(body)
        for key, value in body.items():
            if value.__class__ is dict:
                keys += [f"{key}.{name}" for name in value]
        keys.sort()
        record["keys"] = keys
        script = self.script
        try:
            ask = exchange.dialect.read(route, request, body)
            exchange.ask = ask
            record["model"] = ask.model
            record["stream"] = ask.stream
            record["texts"] = len(ask.texts)
            magic = b"[[" in request.body
            if magic or script.rules or "sim-" in ask.model:
                behaviour = script.decide(route, ask.model, ask.text, magic, record["credential"])
                exchange.behaviour = behaviour
            else:
                behaviour = exchange.behaviour
            if behaviour.log_bodies:
                record["body"] = body
            self._check(exchange, ask, behaviour, request)
        except ScriptError as error:
            self._refuse(exchange, BadAsk(f"simulator: {error}"))
            return
        except BadAsk as error:
            self._refuse(exchange, error)
            return
        except (AttributeError, KeyError, TypeError) as error:
            self._refuse(exchange, BadAsk(f"simulator: a field has the wrong type: {error}"))
            return
        if exchange.error is None:
            created = record["start_ns"] // 1_000_000_000
            reply = compose(ask, behaviour, record["id"], created, record["n"])
            exchange.reply = reply
            record["prompt_tokens"] = reply.prompt_tokens
            if script.settings.prefix_cache is not None and route in ("chat", "messages"):
                self._serve_prefix(exchange, reply, script.settings.prefix_cache, body)

    def _serve_prefix(
        self, exchange: Exchange, reply: Reply, tokens_max: int, body: dict[str, Any]
    ) -> None:
        if self._prefixes is None:
            self._prefixes = PrefixCache(tokens_max)
        record = exchange.record
        is_marked = exchange.dialect is ANTHROPIC
        serve = self._prefixes.serve_marks if is_marked else self._prefixes.serve_blocks
        served = serve(record["model"], body)
        reply.cached_tokens = min(served.cached, reply.prompt_tokens)
        reply.written_tokens = min(served.written, reply.prompt_tokens - reply.cached_tokens)
        record["cached_tokens"] = reply.cached_tokens
        record["cache_marks"] = served.marks
        record["cache_key"] = body.get("prompt_cache_key")

    def _check(self, exchange: Exchange, ask: Ask, behaviour: Behaviour, request: Request) -> None:
        """Raise BadAsk for what OpenAI refuses; set the scripted error."""
        if behaviour.poison:
            exchange.record["fault"] = "poison"
            raise BadAsk("'$.input' is invalid. Please check the API reference.", param="input")
        if behaviour.status is not None and behaviour.status >= 400:
            exchange.record["fault"] = "status"
            message = MESSAGES.get(behaviour.status, f"simulated {behaviour.status}")
            message = behaviour.message or message.replace("MODEL", ask.model)
            if behaviour.leak:
                key = b" ".join(request.headers.get(name, b"") for name in CREDENTIAL_HEADERS)
                message += f" Your key: {key.decode('latin-1').strip()}"
            self._scripted(exchange, behaviour, behaviour.status, message)
        elif ask.route == "embeddings" and exchange.dialect is OPENAI:
            settings = self.script.settings
            counts = ask.texts_tokens
            check_texts(
                ask.texts,
                [count_tokens(text) for text in ask.texts] if counts is None else counts,
                each_max=settings.text_tokens_max,
                all_max=settings.request_tokens_max,
                texts_max=settings.texts_max,
            )

    def _scripted(
        self, exchange: Exchange, behaviour: Behaviour, status: int, message: str
    ) -> None:
        headers, wait_s = b"", None
        if behaviour.retry_after is not None:
            value, wait_s = retry_after(behaviour.retry_after, time.time())
            headers += b"retry-after: %b\r\n" % value.encode()
        if behaviour.retry_after_ms is not None:
            headers += b"retry-after-ms: %d\r\n" % behaviour.retry_after_ms
        body = exchange.dialect.error(status, message, None, behaviour.code, wait_s)
        exchange.error = (status, body, headers)

    def _refuse(self, exchange: Exchange, error: BadAsk) -> None:
        exchange.record["fault"] = exchange.record["fault"] or "refused"
        body = exchange.dialect.error(error.status, error.message, error.param, error.code, None)
        exchange.error = (error.status, body, b"")

    # -- answering -------------------------------------------------------------------------

    def _at_once(self, exchange: Exchange) -> bool:
        """Answer in one write, unless it is too long for one. True when done."""
        record, ask, reply = exchange.record, exchange.ask, exchange.reply
        if exchange.error is not None or ask is None or reply is None:
            self._send_error(exchange)
        elif ask.stream:
            frames = self._frames(exchange, ask, reply)
            data = b"".join([b"%x\r\n%b\r\n" % (len(frame.data), frame.data) for frame in frames])
            if len(data) > ONE_WRITE_BYTES_MAX:
                return False
            self._count_running()
            record["chunks"] = len(frames)
            record["completion_tokens"] = reply.completion_tokens
            record["status"] = 200
            self._write(exchange, self._stream_head(exchange) + data + b"0\r\n\r\n")
        else:
            self._count_running()
            self._send_plain(exchange, ask, reply)
        self._close(exchange)
        return True

    def _count_running(self) -> None:
        if self._running >= self._running_max:
            self._running_max = self._running + 1

    async def _play(self, exchange: Exchange) -> None:
        """The long way: the gate, the wait, the fault, the stream."""
        record, behaviour = exchange.record, exchange.behaviour
        try:
            if not await self._enter(exchange):
                self._send_error(exchange)
                return
            texts = len(exchange.ask.texts) if exchange.ask is not None else 0
            delay_s = self.script.delay_s(behaviour, texts)
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            if behaviour.reset == "before":
                record["fault"] = "reset"
                exchange.connection.reset()
                return
            ask, reply = exchange.ask, exchange.reply
            if exchange.error is not None or ask is None or reply is None:
                self._send_error(exchange)
            elif ask.stream:
                await self._stream(exchange, self._frames(exchange, ask, reply))
            elif behaviour.whole:
                self._send_plain(exchange, ask, reply)
            else:
                await self._send_broken(exchange, exchange.dialect.answer(ask, reply))
        except asyncio.CancelledError:
            record["disconnected"] = True
        finally:
            self._leave(exchange)
            self._close(exchange)

    async def _enter(self, exchange: Exchange) -> bool:
        """Take one of the slots; False when all are taken and nobody queues."""
        settings = self.script.settings
        limit = settings.concurrency
        if limit is not None and self._running >= limit:
            if settings.over == "429":
                exchange.record["fault"] = "over"
                refusal = Behaviour(status=429, retry_after=settings.over_retry_after)
                self._scripted(exchange, refusal, 429, "simulated concurrency limit")
                return False
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._running -= 1
                    self._wake()
                raise
        else:
            self._running += 1
        exchange.held = True
        self._running_max = max(self._running_max, self._running)
        return True

    def _leave(self, exchange: Exchange) -> None:
        if exchange.held:
            exchange.held = False
            self._running -= 1
            self._wake()

    def _wake(self) -> None:
        """Hand free slots to those who wait, in their order; a slot is counted as it is handed."""
        limit = self.script.settings.concurrency
        while self._queue and (limit is None or self._running < limit):
            turn = self._queue.popleft()
            if not turn.done():
                self._running += 1
                turn.set_result(None)

    def _frames(self, exchange: Exchange, ask: Ask, reply: Reply) -> list[Frame]:
        frames = exchange.dialect.frames(ask, reply)
        at = exchange.behaviour.malformed_at
        if at is not None and at < len(frames):
            exchange.record["fault"] = "malformed"
            kind = exchange.behaviour.malformed
            frames[at] = Frame(broken(frames[at].data, kind), frames[at].tokens)
        return frames

    async def _stream(self, exchange: Exchange, frames: list[Frame]) -> None:
        record, behaviour, connection = exchange.record, exchange.behaviour, exchange.connection
        record["status"] = 200
        self._write(exchange, self._stream_head(exchange))
        if behaviour.reset == "after":
            await self._reset_after_head(exchange)
            return
        for i, frame in enumerate(frames):
            if behaviour.interval and i:
                await asyncio.sleep(behaviour.interval)
            if i == behaviour.cut_after:
                record["fault"] = "cut"
                if behaviour.cut == "clean":
                    break
                connection.close()
                return
            if i == behaviour.stall_after:
                record["fault"] = "stall"
                await asyncio.sleep(FOR_EVER_S if behaviour.stall is None else behaviour.stall)
            self._write(exchange, b"%x\r\n%b\r\n" % (len(frame.data), frame.data))
            record["chunks"] += 1
            record["completion_tokens"] += frame.tokens
            await connection.drain()
        self._write(exchange, b"0\r\n\r\n")

    async def _send_broken(self, exchange: Exchange, body: bytes) -> None:
        """A plain answer that is cut, stalled or reset half-way."""
        record, behaviour, connection = exchange.record, exchange.behaviour, exchange.connection
        reply = exchange.reply
        assert reply is not None
        record["status"] = 200
        record["completion_tokens"] = reply.completion_tokens
        half = len(body) // 2
        if behaviour.cut_after is not None and behaviour.cut == "clean":
            record["fault"] = "cut"
            body = body[:half]
            self._write(exchange, self._plain_head(exchange, len(body)) + body)
            return
        self._write(exchange, self._plain_head(exchange, len(body)))
        if behaviour.reset == "after":
            await self._reset_after_head(exchange)
            return
        self._write(exchange, body[:half])
        if behaviour.stall_after is not None:
            record["fault"] = "stall"
            await asyncio.sleep(FOR_EVER_S if behaviour.stall is None else behaviour.stall)
        if behaviour.cut_after is not None:
            record["fault"] = "cut"
            connection.close()
            return
        self._write(exchange, body[half:])

    async def _reset_after_head(self, exchange: Exchange) -> None:
        """Give the head time to arrive: a reset throws away what the peer has not read."""
        exchange.record["fault"] = "reset"
        await asyncio.sleep(0.02)
        exchange.connection.reset()

    def _send_plain(self, exchange: Exchange, ask: Ask, reply: Reply) -> None:
        body = exchange.dialect.answer(ask, reply)
        if exchange.behaviour.malformed_at is not None:
            exchange.record["fault"] = "malformed"
            body = body[: len(body) // 2]
        exchange.record["status"] = 200
        exchange.record["completion_tokens"] = reply.completion_tokens
        self._write(exchange, self._plain_head(exchange, len(body)) + body)

    def _send_error(self, exchange: Exchange) -> None:
        assert exchange.error is not None
        status, body, headers = exchange.error
        exchange.record["status"] = status
        self._write(exchange, self._plain_head(exchange, len(body), status, headers) + body)

    def _plain_head(
        self, exchange: Exchange, length: int, status: int = 200, headers: bytes = b""
    ) -> bytes:
        return (
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n"
            b"%b: %b\r\n%bcontent-length: %d\r\n\r\n"
            % (
                b"200 OK" if status == 200 else status_line(status),
                exchange.dialect.request_id_header,
                exchange.record["id"].encode(),
                headers if exchange.connection.keep_alive else headers + b"connection: close\r\n",
                length,
            )
        )

    def _stream_head(self, exchange: Exchange) -> bytes:
        return (
            b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n"
            b"cache-control: no-cache\r\n%b: %b\r\n%btransfer-encoding: chunked\r\n\r\n"
            % (
                EVENT_STREAM if exchange.ask is None else exchange.ask.stream_type,
                exchange.dialect.request_id_header,
                exchange.record["id"].encode(),
                b"" if exchange.connection.keep_alive else b"connection: close\r\n",
            )
        )

    def _write(self, exchange: Exchange, data: bytes) -> None:
        exchange.record["bytes_out"] += len(data)
        exchange.connection.write(data)

    def _close(self, exchange: Exchange) -> None:
        """The request is over: count it and write its last line."""
        record = exchange.record
        record["end_ns"] = time.time_ns()
        record["end_mono_ns"] = time.monotonic_ns()
        self._routes[record["route"]] += 1
        self._statuses[record["status"]] += 1
        totals = self._totals
        totals["texts"] += record["texts"]
        totals["prompt_tokens"] += record["prompt_tokens"]
        totals["completion_tokens"] += record["completion_tokens"]
        if record["disconnected"]:
            totals["disconnected"] += 1
        record["event"] = "end"
        self.log.write(record)

    # -- beside the provider's routes ------------------------------------------------------

    def _aside(self, connection: Connection, request: Request) -> bool:
        """Control, health and the list of models: answered at once and not logged."""
        path, method = request.path, request.method
        if path.startswith("/control/"):
            status, body = self._control(method, path, request.body)
        elif path == "/health":
            status, body = 200, {"status": "ok", "simulated": True}
        elif method == b"GET" and path == "/v1/models":
            status, body = 200, {"object": "list", "data": [_model(name) for name in MODELS]}
        elif method == b"GET" and path.startswith("/v1/models/"):
            status, body = 200, _model(path.removeprefix("/v1/models/"))
        else:
            return False
        data = orjson.dumps(body)
        close = b"" if connection.keep_alive else b"connection: close\r\n"
        connection.write(
            b"HTTP/1.1 %b\r\ncontent-type: application/json\r\n%bcontent-length: %d\r\n\r\n%b"
            % (status_line(status), close, len(data), data)
        )
        return True

    def _control(self, method: bytes, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        self.log.flush()
        if path == "/control/stats":
            return 200, self.stats()
        if path == "/control/script" and method == b"GET":
            return 200, self.script.describe()
        if method != b"POST":
            return 404, {"error": f"no {path}"}
        if path == "/control/reset":
            self.script.reset()
            self._prefixes = None
            self._reset_counters()
            self._wake()
            return 200, {"log_bytes": self.log.size()}
        if path == "/control/script":
            try:
                posted = orjson.loads(body)
                for one in posted if isinstance(posted, list) else [posted]:
                    self.script.apply(one)
            except (ValueError, AttributeError) as error:
                return 400, {"error": str(error)}
            self._wake()
            return 200, self.script.describe()
        return 404, {"error": f"no {path}"}

    def stats(self) -> dict[str, Any]:
        return {
            "requests": sum(self._routes.values()),
            "by_route": dict(self._routes),
            "by_status": {str(status): n for status, n in self._statuses.items()},
            "running": self._running,
            "running_max": self._running_max,
            "queued": len(self._queue),
            "connections": len(self.connections),
            "connections_max": self._open_max,
            "texts": self._totals["texts"],
            "prompt_tokens": self._totals["prompt_tokens"],
            "completion_tokens": self._totals["completion_tokens"],
            "disconnected": self._totals["disconnected"],
            "log_bytes": self.log.size(),
            "uptime_s": time.time() - self.started_s,
        }

    def opened(self, connection: Connection) -> None:
        self.connections.add(connection)
        self._open_max = max(self._open_max, len(self.connections))


class Connection(asyncio.Protocol):
    """One socket. Requests on it are answered in their order, one at a time."""

    def __init__(self, simulator: Simulator) -> None:
        self.keep_alive = True
        self._simulator = simulator
        self._transport: asyncio.Transport | None = None
        self._parser: Any = httptools.HttpRequestParser(self)
        self._task: asyncio.Task[None] | None = None
        self._waiting: deque[Request] = deque()
        self._drained: asyncio.Future[None] | None = None
        self._clear()

    def _clear(self) -> None:
        self._url = b""
        self._headers: dict[bytes, bytes] = {}
        self._body: list[bytes] = []
        self._body_bytes = 0

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._simulator.opened(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError:
            self.close()
            raise  # a fault of the simulator's own: it shows on stderr
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            if self._transport is not None:
                self._transport.write(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._waiting.clear()
        self._simulator.connections.discard(self)
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        if self._task is not None:
            self._task.cancel()

    def pause_writing(self) -> None:
        self._drained = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # httptools

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if b"expect" in self._headers:
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > BODY_BYTES_MAX:
            self.write(b"HTTP/1.1 413 Content Too Large\r\ncontent-length: 0\r\n\r\n")
            self.close()
        self._body.append(body)

    def on_message_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        parser = self._parser
        request = Request(
            parser.get_method(),
            path,
            query,
            self._headers,
            body,
            len(self._url) + len(body),
            parser.should_keep_alive(),
        )
        self._clear()
        if self._task is None:
            self._take(request)
        elif len(self._waiting) < PIPELINED_MAX:
            self._waiting.append(request)
        else:
            self.close()

    # the requests

    def _take(self, request: Request) -> None:
        self.keep_alive = request.keep_alive
        rest = self._simulator.take(self, request)
        if rest is not None:
            self._task = asyncio.get_running_loop().create_task(rest[1])
            self._task.add_done_callback(self._done)
        elif not request.keep_alive:
            self.close()

    def _done(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.result()
        if not self.keep_alive:
            self.close()
        elif self._waiting and self._transport is not None:
            self._take(self._waiting.popleft())

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer has read enough; at least let the loop turn now and then."""
        if self._drained is not None:
            await self._drained

    def close(self) -> None:
        """Send what is written, then FIN."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            transport.close()

    def reset(self) -> None:
        """RST: what is not sent yet is lost."""
        if self._transport is not None:
            transport, self._transport = self._transport, None
            sock = transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()


def retry_after(given: str, now_s: float) -> tuple[str, float | None]:
    """The header's value and the seconds it means; `date+3` becomes an HTTP date."""
    if given.startswith("date"):
        wait_s = float(given.removeprefix("date").lstrip("+") or 0)
        return formatdate(now_s + wait_s, usegmt=True), wait_s
    try:
        return given, float(given)
    except ValueError:
        return given, None


def broken(frame: bytes, kind: str) -> bytes:
    """A frame that makes no sense; see `Behaviour.malformed`."""
    if kind == "half":
        return frame[: max(len(frame) // 2, len(b"data: {"))] + b"\n\n"
    return b"data: %b\n\n" % MALFORMED[kind]


def status_line(status: int) -> bytes:
    try:
        return b"%d %b" % (status, HTTPStatus(status).phrase.encode())
    except ValueError:
        return b"%d Simulated" % status


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 1_700_000_000, "owned_by": "simulator"}


async def listen(simulator: Simulator, host: str, port: int) -> asyncio.Server:
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: Connection(simulator), host, port, backlog=4096)
