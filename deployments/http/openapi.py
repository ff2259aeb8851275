"""The OpenAPI 3.1 description of every route, built once.

A test holds it against the paths that are served, both ways.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import orjson

from actors.ledger.policy import GROUPS, Totals
from forebay.schemas import openapi_schemas
from forebay.usage import in_usd

Schema = dict[str, Any]

_REF = "#/components/schemas/"
_JSON = "application/json"
_OPEN: list[dict[str, list[str]]] = []
_HEX: dict[str, Any] = {"pattern": "^[0-9a-f]{80}$"}
_MOMENT = "An ISO 8601 date or time, UTC where it does not say, or epoch seconds"
_KEY: list[dict[str, list[str]]] = [{"bearer": []}, {"apiKey": []}]


@cache
def rendered() -> bytes:
    """The document as JSON, made when it is first asked for."""
    return orjson.dumps(document())


def document() -> dict[str, Any]:
    """The whole document."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Forebay",
            "version": "1",
            "description": "One gateway to many LLM providers, on OpenAI's and Anthropic's routes.",
        },
        "security": _KEY,
        "paths": {**_openai_paths(), **_native_paths(), **_ops_paths(), **_admin_paths()},
        "components": {
            "schemas": {**openapi_schemas(), **_answers()},
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "apiKey": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _openai_paths() -> dict[str, Any]:
    chat = _post(
        "createChatCompletion",
        "Chat",
        "ChatRequest",
        "ChatCompletion",
        stream="ChatCompletionChunk",
    )
    completion = _post(
        "createCompletion", "Completion", "CompletionRequest", "Completion", stream="Completion"
    )
    message = _post(
        "createMessage",
        "Chat, in Anthropic's words",
        "MessageRequest",
        "Message",
        stream="MessageEvent",
        error="AnthropicError",
    )
    message["responses"]["200"]["content"]["text/event-stream"]["schema"]["description"] = (
        "`event:` and `data:` lines of MessageEvent, the last one `message_stop`."
    )
    message["parameters"].append(_parameter("anthropic-version", "header"))
    return {
        "/v1/messages": {"post": message},
        "/v1/chat/completions": {"post": chat},
        "/v1/completions": {"post": completion},
        "/v1/embeddings": {
            "post": _post("createEmbedding", "Embeddings", "EmbeddingRequest", "EmbeddingList")
        },
        "/v1/models": {"get": _get("listModels", "The models this key may use", _ref("ModelList"))},
        "/v1/models/{id}": {
            "get": _get("retrieveModel", "One model", _ref("Model"), [_parameter("id", "path")])
        },
    }


def _native_paths() -> dict[str, Any]:
    return {
        "/api/v1/gateway/generate": {
            "post": _post("generate", "Text", "GenerateRequest", "Envelope", error="ErrorEnvelope")
        },
        "/api/v1/gateway/generate/stream": {
            "post": _post(
                "generateStream",
                "Text as events",
                "GenerateRequest",
                None,
                stream="GenerateEvent",
                error="ErrorEnvelope",
            )
        },
        "/api/v1/gateway/embeddings": {
            "post": _post("embed", "Vectors", "EmbedRequest", "Envelope", error="ErrorEnvelope")
        },
        "/api/v1/gateway/providers": {
            "get": _get("providers", "What is configured", _ref("Envelope"))
        },
        "/api/v1/gateway/rate-limits": {
            "get": _get(
                "rateLimits",
                "The caller's limits; an admin may name another tenant",
                _ref("Envelope"),
                [_parameter("tenant", "query")],
            )
        },
    }


def _ops_paths() -> dict[str, Any]:
    anything: Schema = {"type": "object"}
    ready = _get("ready", "Whether requests can be served", anything, security=_OPEN)
    ready["responses"]["503"] = _answer("Not yet", anything)
    queries = [
        _parameter(
            "tenant", "query", {"description": "Whose usage; any or all for an admin's key"}
        ),
        _parameter(
            "group_by",
            "query",
            {
                "description": "One or more, with commas",
                "pattern": "^({0})(,({0}))*$".format("|".join(GROUPS)),
                "examples": ["model,day"],
            },
        ),
        _parameter("start", "query", {"description": f"The first moment. {_MOMENT}"}),
        _parameter("end", "query", {"description": f"The first moment after it. {_MOMENT}"}),
    ]
    text = {"text/plain": {"schema": {"type": "string"}}}
    metrics = _get("metrics", "Prometheus text", anything, security=_OPEN)
    metrics["responses"]["200"]["content"] = text
    return {
        "/health": {"get": _get("health", "The process answers", anything, security=_OPEN)},
        "/health/ready": {"get": ready},
        "/health/detail": {"get": _get("healthDetail", "Owners, desks, breakers", anything)},
        "/metrics": {"get": metrics},
        "/v1/usage": {
            "get": _get("usage", "Requests, tokens and cost", _ref("UsageReport"), queries)
        },
        "/v1/feedback": {
            "post": {
                **_get(
                    "recordFeedback",
                    "What a tenant thinks of an answer",
                    _ref("Feedback"),
                    [_parameter("tenant", "query")],
                    status="2XX",
                ),
                "requestBody": _request("FeedbackRequest"),
            }
        },
        "/v1/feedback/stats": {
            "get": _get(
                "feedbackStats",
                "What answers are worth",
                anything,
                [_parameter("tenant", "query")],
            )
        },
        "/openapi.json": {"get": _get("openapi", "This document", anything, security=_OPEN)},
    }


def _admin_paths() -> dict[str, Any]:
    tenant, matches = _parameter("tenant", "query"), _parameter("if-match", "header")
    return {
        "/admin/keys": {
            "get": _get("listKeys", "Every key in force; no key is told", _ref("KeyList")),
            "post": {
                **_get("createKey", "A new key, told this once", _ref("NewKey"), status="201"),
                "requestBody": _request("KeyRequest"),
            },
        },
        "/admin/keys/{id}": {
            "delete": _get(
                "revokeKey",
                "The key is refused everywhere within a second",
                _ref("RevokedKey"),
                [_parameter("id", "path"), tenant],
            )
        },
        "/admin/config": {
            "get": _get("readConfig", "The configuration in force", _ref("Configuration")),
            "put": {
                **_get("writeConfig", "The new version", _ref("ConfigVersion"), [matches]),
                "requestBody": _request("ConfigDocument"),
            },
        },
        "/admin/breakers": {
            "get": _get("listBreakers", "How each deployment stands", _ref("BreakerList"))
        },
        "/admin/breakers/{id}": {
            "post": {
                **_get(
                    "setBreaker",
                    "Every process obeys within a second",
                    _ref("BreakerState"),
                    [_parameter("id", "path")],
                ),
                "requestBody": _request("BreakerOrder"),
            }
        },
        "/admin/cache": {
            "get": _get("readCache", "What is stored, and what it saves", _ref("CacheFigures")),
            "delete": _get(
                "clearCache",
                "What is a tenant's, a model's and a key's is forgotten; with none of them, all",
                _ref("Cleared"),
                [tenant, _parameter("model", "query"), _parameter("key", "query", _HEX)],
            ),
        },
    }


def _request(name: str) -> dict[str, Any]:
    return {"required": True, "content": {_JSON: {"schema": _ref(name)}}}


def _post(
    operation: str,
    summary: str,
    request: str,
    answer: str | None,
    *,
    stream: str | None = None,
    error: str = "Error",
) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer is not None:
        content[_JSON] = {"schema": _ref(answer)}
    if stream is not None:
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": f"`data:` lines of {stream}, then [DONE]."}
        }
    return {
        "operationId": operation,
        "summary": summary,
        "parameters": [_parameter(name, "header") for name in _STEERING],
        "requestBody": _request(request),
        "responses": {
            "200": {"description": "The answer", "content": content},
            "4XX": _answer("Refused", _ref(error)),
            "5XX": _answer("Failed", _ref(error)),
        },
    }


_STEERING = (
    "x-request-id",
    "x-forebay-timeout",
    "x-forebay-priority",
    "cache-control",
    "idempotency-key",
)


def _get(
    operation: str,
    summary: str,
    schema: Schema,
    parameters: list[dict[str, Any]] | None = None,
    *,
    security: list[dict[str, list[str]]] = _KEY,
    status: str = "200",
) -> dict[str, Any]:
    return {
        "operationId": operation,
        "summary": summary,
        "security": security,
        "parameters": parameters or [],
        "responses": {status: _answer(summary, schema), "4XX": _answer("Refused", _ref("Error"))},
    }


def _usage_report() -> Schema:
    """Totals, what they are by model and by each group, and a row for each combination."""
    kinds = {int: "integer", float: "number"}
    told: dict[str, Any] = in_usd(Totals().as_dict())
    figures = _object(tuple(told), **{name: {"type": kinds[type(v)]} for name, v in told.items()})
    by = {"type": "object", "additionalProperties": figures}
    groups: dict[str, Schema] = {name: {"type": "string"} for name in GROUPS}
    return _with(
        figures, **{f"by_{name}": by for name in GROUPS}, data=_list(_with(figures, **groups))
    )


def _answer(description: str, schema: Schema) -> dict[str, Any]:
    return {"description": description, "content": {_JSON: {"schema": schema}}}


def _parameter(name: str, where: str, schema: Schema | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "in": where,
        "required": where == "path",
        "schema": {"type": "string", **(schema or {})},
    }


def _ref(name: str) -> Schema:
    return {"$ref": _REF + name}


def _object(required: tuple[str, ...] = (), **properties: Schema) -> Schema:
    return {"type": "object", "properties": properties, "required": list(required)}


def _list(item: Schema) -> Schema:
    return {"type": "array", "items": item}


def _answers() -> dict[str, Schema]:
    """Schemas of the answers, as far as clients rely on them."""
    string: Schema = {"type": "string"}
    number: Schema = {"type": "number"}
    integer: Schema = {"type": "integer"}
    maybe: Schema = {"type": ["string", "null"]}
    free: Schema = {"type": "object"}
    choice = _object(index=integer, finish_reason=maybe)
    error = _object(("message", "type"), message=string, type=string, param=maybe, code=maybe)
    body = {"id": string, "created": integer, "model": string, "usage": _ref("Usage")}
    kinds = {
        "ChatCompletion": _with(choice, message=free),
        "ChatCompletionChunk": _with(choice, delta=free),
        "Completion": _with(choice, text=string),
    }
    vector: Schema = {"oneOf": [_list(number), {"type": "string", "format": "byte"}]}
    datum = _object(("index", "embedding"), object=string, index=integer, embedding=vector)
    envelope = {
        "message": string,
        "correlation_id": string,
        "request_id": string,
        "timestamp": {"type": "string", "format": "date-time"},
        "metadata": free,
    }
    failure = _object(("code", "message"), code=string, message=string, details=free)
    texts: Schema = {"oneOf": [string, _list(string)]}
    return {
        **{
            name: _object(("choices",), object=string, choices=_list(item), **body)
            for name, item in kinds.items()
        },
        "UsageReport": _usage_report(),
        "Usage": _object(prompt_tokens=integer, completion_tokens=integer, total_tokens=integer),
        "EmbeddingList": _object(("data",), object=string, data=_list(datum), **body),
        "Model": _object(("id", "object"), id=string, object=string, owned_by=string),
        "ModelList": _object(("data",), object=string, data=_list(_ref("Model"))),
        "Error": _object(("error",), error=error),
        "Envelope": _object(("success", "data"), success={"const": True}, data=free, **envelope),
        "ErrorEnvelope": _object(
            ("success", "error"), success={"const": False}, error=failure, **envelope
        ),
        "GenerateRequest": {
            **_object(prompt=string, model=string, messages=_list(_ref_message())),
            "description": "`prompt` or `messages`, and any parameter of ChatRequest.",
        },
        "GenerateEvent": _object(
            ("text", "done"), text=string, done={"type": "boolean"}, finish_reason=maybe
        ),
        "EmbedRequest": _object(("texts",), texts=texts, model=string, dimensions=integer),
        **_feedback_schemas(),
        **_anthropic_schemas(),
        **_admin_schemas(),
    }


def _feedback_schemas() -> dict[str, Schema]:
    string: Schema = {"type": "string"}
    number: Schema = {"type": ["number", "null"]}
    kind: Schema = {"enum": ["correction", "rating", "useful", "improvement", "error"]}
    rating: Schema = {
        "oneOf": [
            {"type": "number", "minimum": 1, "maximum": 5},
            {"type": "boolean"},
            {"enum": ["up", "down"]},
        ]
    }
    return {
        "FeedbackRequest": {
            **_object(
                ("response_id",),
                response_id=string,
                rating=rating,
                type=kind,
                content={},
                id=string,
            ),
            "description": "A `rating` or a `type`. With an `id` of one's own it is recorded once.",
        },
        "Feedback": _object(
            ("id", "response_id", "type", "score", "duplicate"),
            id=string,
            response_id=string,
            type=kind,
            score=number,
            model={"type": ["string", "null"]},
            deployment={"type": ["string", "null"]},
            duplicate={"type": "boolean"},
        ),
    }


def _anthropic_schemas() -> dict[str, Schema]:
    string: Schema = {"type": "string"}
    maybe: Schema = {"type": ["string", "null"]}
    integer: Schema = {"type": "integer"}
    number: Schema = {"type": "number"}
    free: Schema = {"type": "object"}
    content: Schema = {"oneOf": [string, _list(free)]}
    turn = _object(
        ("role", "content"),
        role={"enum": ["user", "assistant", "system"]},
        content=content,
    )
    usage = _object(("input_tokens", "output_tokens"), input_tokens=integer, output_tokens=integer)
    return {
        "MessageRequest": {
            **_object(
                ("model", "max_tokens", "messages"),
                model=string,
                max_tokens=integer,
                messages=_list(turn),
                system=content,
                stop_sequences=_list(string),
                temperature=number,
                top_p=number,
                stream={"type": "boolean"},
                tools=_list(free),
                tool_choice=free,
                metadata=_object(user_id=maybe),
                output_config=free,
                service_tier={"enum": ["auto", "standard_only"]},
                thinking=free,
            ),
            "description": "`thinking`, other than disabled, and `top_k` only where every "
            "deployment of the model is a Claude or allows them.",
        },
        "Message": _object(
            ("id", "type", "role", "content", "model", "usage"),
            id=string,
            type={"const": "message"},
            role={"const": "assistant"},
            model=string,
            content=_list(free),
            stop_reason=maybe,
            stop_sequence=maybe,
            usage=usage,
        ),
        "MessageEvent": _object(("type",), type=string),
        "AnthropicError": _object(
            ("type", "error", "request_id"),
            type={"const": "error"},
            error=_object(("type", "message"), type=string, message=string),
            request_id=string,
        ),
    }


def _admin_schemas() -> dict[str, Schema]:
    string: Schema = {"type": "string"}
    flag: Schema = {"type": "boolean"}
    free: Schema = {"type": "object"}
    version: Schema = {"type": "integer"}
    whose = {"id": string, "tenant": string}
    key = {**whose, "admin": flag, "created": {"type": ["string", "number"]}}
    standing: dict[str, Schema] = {
        "deployment": string,
        "state": string,
        "reason": string,
        "retry_after_s": {"type": ["number", "null"]},
    }
    listed = _object(
        ("id", "tenant", "admin", "source"), source={"enum": ["config", "runtime"]}, **key
    )
    return {
        "KeyRequest": {
            **_object(("tenant",), **whose, admin=flag, limits=free, models=_list(string)),
            "additionalProperties": False,
            "description": "`limits` and `models` are the tenant's from then on.",
        },
        "NewKey": _object(
            ("id", "tenant", "key", "hash", "admin", "created"), key=string, hash=string, **key
        ),
        "KeyList": _object(("data",), object=string, data=_list(listed)),
        "RevokedKey": _object(("id", "tenant", "revoked"), revoked={"const": True}, **whose),
        "ConfigDocument": {**free, "description": "As in the configuration file."},
        "Configuration": _object(
            ("version", "config"), version=version, config=_ref("ConfigDocument")
        ),
        "ConfigVersion": _object(("version",), version=version),
        "BreakerOrder": {
            **_object(("state",), state={"enum": ["closed", "open", "auto"]}),
            "additionalProperties": False,
            "description": "Forced closed, forced open, or left to judge for itself again.",
        },
        "BreakerState": _object(("deployment", "state"), **standing),
        "CacheFigures": _object(("responses", "prompts"), responses=free, prompts=free),
        "Cleared": _object(
            ("invalidated",), invalidated=version, tenant=string, model=string, key=string
        ),
        "BreakerList": _object(
            ("data", "source"),
            object=string,
            source={"enum": ["owner", "replica"]},
            data=_list(_object(("deployment", "group", "state"), group=string, **standing)),
        ),
    }


def _ref_message() -> Schema:
    return {"$ref": _REF + "ChatRequest/properties/messages/items"}


def _with(schema: Schema, **properties: Schema) -> Schema:
    return {**schema, "properties": {**schema["properties"], **properties}}
