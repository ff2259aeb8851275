"""A Service that answers by script, and ASGI driven by hand: no network, no mocks.

`ScriptedService` checks requests as the pipeline does and remembers every call. `Client` speaks
ASGI to an app and sees each message it sends, in order.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deployments.http import HttpCall, KeyEntry, Keys, Reply, StreamReply
from forebay import schemas
from forebay.errors import GatewayError, ModelNotFound
from forebay.secrets import hash_key

SECRET = b"s" * 32
TELLS: dict[str, Any] = {
    "model_group": "small",
    "deployment": "d-1",
    "attempts": 2,
    "retries": 1,
    "cache": "miss",
    "cost_nano": 28_500,
    "overhead_ms": 0.25,
    "config_version": 7,
}


@dataclass(frozen=True)
class Figure:
    limit: float
    remaining: float
    reset_s: float


def keys_of(admins: Sequence[str] = (), **keys: str) -> Keys:
    """A table where `acme="k"` makes "k" a key of tenant acme."""
    entries = [
        KeyEntry(tenant, f"{tenant}-key", hash_key(key, SECRET), tenant in admins)
        for tenant, key in keys.items()
    ]
    return Keys(entries, SECRET, open_to_all=False)


def no_keys() -> Keys:
    """Nobody ever had a key."""
    return Keys([], SECRET, open_to_all=True)


def chat_body(text: str = "Hello!") -> dict[str, Any]:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "small-2026",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def chunk(text: str | None = None, **fields: Any) -> dict[str, Any]:
    delta = {} if text is None else {"content": text}
    choice = {"index": 0, "delta": delta, "finish_reason": fields.pop("finish_reason", None)}
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "small-2026"}
    return {**head, "choices": [choice], **fields}


def usage_chunk() -> dict[str, Any]:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    return {**chunk(), "choices": [], "usage": usage}


HELLO = [chunk("Hel"), chunk("lo"), chunk(finish_reason="stop"), usage_chunk()]


class ScriptedChunks:
    """An async generator's face on a list, waiting where the list holds an Event."""

    def __init__(self, script: Sequence[Any]) -> None:
        self.closed = asyncio.Event()
        self._script = script
        self._chunks = self._play()

    def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        return self

    async def __anext__(self) -> dict[str, Any]:
        found: dict[str, Any] = await anext(self._chunks)
        return found

    async def aclose(self) -> None:
        await self._chunks.aclose()
        self.closed.set()

    async def _play(self) -> Any:
        try:
            for step in self._script:
                if isinstance(step, asyncio.Event):
                    await step.wait()
                elif isinstance(step, Exception):
                    raise step
                else:
                    yield step
        finally:
            self.closed.set()


@dataclass
class ScriptedService:
    """Answers with what it was given; an exception in the script is raised.

    `refusal` is raised by whatever changes something, and by `rate_limits`.
    """

    keys: Keys = field(default_factory=no_keys)
    config_version: int = 7
    answer: Any = field(default_factory=chat_body)
    chunks: Any = None
    vectors: Any = None
    limits: Mapping[str, Figure] | None = None
    is_ready: bool = True
    tells: dict[str, Any] = field(default_factory=lambda: dict(TELLS))
    calls: list[HttpCall] = field(default_factory=list)
    queries: list[dict[str, Any]] = field(default_factory=list)
    orders: list[tuple[str, str]] = field(default_factory=list)
    refusal: GatewayError | None = None
    refusals: list[tuple[str, str | None, int]] = field(default_factory=list)

    def refused(self, route: str, tenant: str | None, request_id: str, status: int) -> None:
        self.refusals.append((route, tenant, status))

    def at_once(self, call: HttpCall) -> Reply | None:
        return None

    async def chat(self, call: HttpCall) -> Reply | StreamReply:
        self.calls.append(call)
        schemas.check(call.route, call.body)
        await self._before()
        if call.stream:
            script = HELLO if self.chunks is None else self.chunks
            chunks = script if isinstance(script, ScriptedChunks) else ScriptedChunks(script)
            return StreamReply(chunks=chunks, **{**self.tells, "cost_nano": None})
        return Reply(body=self.answer, figures=self.limits, **self.tells)

    completion = chat

    async def embedding(self, call: HttpCall) -> Reply:
        self.calls.append(call)
        schemas.check(call.route, call.body)
        await self._before()
        given = call.body["input"]
        texts = [given] if isinstance(given, str) else given
        array = self.vectors
        if array is None:
            array = np.array([[len(text), 0.1] for text in texts], dtype=np.float32)
        usage = {"prompt_tokens": len(texts), "total_tokens": len(texts)}
        return Reply(body={"model": "embed-2026", "usage": usage}, array=array, **self.tells)

    def models(self, tenant: str) -> list[dict[str, Any]]:
        return [self.model(name, tenant) for name in ("small", "openai/large")]

    def model(self, model_id: str, tenant: str) -> dict[str, Any]:
        if model_id not in ("small", "openai/large"):
            raise ModelNotFound(f"no model {model_id!r}; there are small, openai/large")
        return {"id": model_id, "object": "model", "created": 1, "owned_by": tenant}

    def figures(self, tenant: str) -> Mapping[str, Figure] | None:
        return self.limits

    def ready(self) -> tuple[bool, str]:
        return self.is_ready, "" if self.is_ready else "owners are starting"

    async def health(self, detail: bool) -> dict[str, Any]:
        return {"status": "healthy", **({"owners": {}} if detail else {})}

    async def usage(self, **query: Any) -> dict[str, Any]:
        self.queries.append(query)
        return {"total_requests": 1}

    async def record_feedback(self, tenant: str, **told: Any) -> dict[str, Any]:
        self._refuse()
        self.queries.append({"tenant": tenant, **told})
        return {"id": "f1", "duplicate": told["feedback_id"] == "again"}

    async def feedback_stats(self, tenant: str | None) -> dict[str, Any]:
        self.queries.append({"tenant": tenant})
        return {"tenant": tenant, "total": 0}

    async def metrics(self) -> bytes:
        return b"forebay_requests_total 1\n"

    async def providers(self, tenant: str) -> list[dict[str, Any]]:
        return [{"name": "openai", "models": ["small"]}]

    async def rate_limits(self, tenant: str) -> dict[str, Any]:
        self._refuse()
        return {"tenant": tenant, "requests_per_minute": 60}

    async def create_key(self, tenant: str, **asked: Any) -> dict[str, Any]:
        self._refuse()
        self.queries.append({"tenant": tenant, **asked})
        name = asked["key_id"] or "k1"
        made = {"id": name, "tenant": tenant, "admin": asked["admin"], "created": "2026-01-01"}
        return {**made, "key": "sk-fb-new", "hash": "hmac-sha256:00"}

    async def list_keys(self) -> list[dict[str, Any]]:
        return [
            {"id": "ci", "tenant": "acme", "admin": False, "source": "config"},
            {
                "id": "k1",
                "tenant": "acme",
                "admin": False,
                "source": "runtime",
                "created": "2026-01-01",
                "hash": "hmac-sha256:00",
            },
        ]

    async def revoke_key(self, key_id: str, tenant: str | None) -> dict[str, Any]:
        self._refuse()
        self.queries.append({"key_id": key_id, "tenant": tenant})
        return {"id": key_id, "tenant": tenant or "acme", "revoked": True}

    async def breakers(self) -> dict[str, Any]:
        return {"source": "owner", "data": [{"deployment": "d-1", "state": "closed"}]}

    async def set_breaker(self, deployment: str, state: str) -> dict[str, Any]:
        self._refuse()
        self.orders.append((deployment, state))
        return {"deployment": deployment, "state": f"forced_{state}"}

    async def cache(self) -> dict[str, Any]:
        return {"responses": {"entries": 3}, "prompts": {"hits": 1}}

    async def clear_cache(self, **query: Any) -> int:
        self._refuse()
        self.queries.append(query)
        return 3

    async def read_config(self) -> dict[str, Any]:
        return {"version": self.config_version, "config": {"gateway": {"timeout": 60}}}

    async def write_config(self, document: dict[str, Any], expected: int | None) -> int:
        self._refuse()
        self.queries.append({"document": document, "expected": expected})
        return self.config_version + 1

    def _refuse(self) -> None:
        if self.refusal is not None:
            raise self.refusal

    async def _before(self) -> None:
        if isinstance(self.answer, asyncio.Event):
            await self.answer.wait()
        if isinstance(self.answer, Exception):
            raise self.answer


@dataclass
class Answered:
    """What came back."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    writes: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.writes)

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        error: dict[str, Any] = self.json()["error"]
        return error

    @property
    def events(self) -> list[Any]:
        """The JSON of each SSE event, with "[DONE]" as it is."""
        lines = [part for part in self.body.decode().split("\n\n") if part]
        data = [line.removeprefix("data: ") for line in lines]
        return [item if item == "[DONE]" else json.loads(item) for item in data]


class Client:
    """An HTTP client without HTTP: it calls the app with ASGI messages.

    `leave` hangs up; `on_write` sees each body message as it is sent.
    """

    def __init__(self, app: Any, key: str | None = None) -> None:
        self._app = app
        self._key = key
        self.leave = asyncio.Event()
        self.answered = Answered()
        self.wrote = asyncio.Event()

    async def get(self, path: str, **headers: str) -> Answered:
        return await self.request("GET", path, b"", headers)

    async def post(self, path: str, body: Any, **headers: str) -> Answered:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.request("POST", path, raw, headers)

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] | None = None,
        pieces: Sequence[bytes] | None = None,
    ) -> Answered:
        path, _, query = path.partition("?")
        given = {name.replace("_", "-"): value for name, value in (headers or {}).items()}
        if self._key is not None:
            given.setdefault("authorization", f"Bearer {self._key}")
        scope = {
            "type": "http",
            "method": method,
            "path": path,
            "query_string": query.encode(),
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in given.items()],
        }
        await self._app(scope, self._receiver([body] if pieces is None else pieces), self._sent)
        return self.answered

    def _receiver(self, pieces: Sequence[bytes]) -> Callable[[], Any]:
        left = list(pieces)

        async def receive() -> dict[str, Any]:
            if left:
                piece = left.pop(0)
                return {"type": "http.request", "body": piece, "more_body": bool(left)}
            await self.leave.wait()
            return {"type": "http.disconnect"}

        return receive

    async def _sent(self, message: Mapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            assert not self.answered.status, "the status is sent once"
            self.answered.status = message["status"]
            self.answered.headers = {k.decode(): v.decode() for k, v in message["headers"]}
        elif message["body"]:
            self.answered.writes.append(message["body"])
            self.wrote.set()


def raises(error: GatewayError) -> ScriptedService:
    """A service whose every answer is `error`."""
    return ScriptedService(answer=error)
