"""What goes in and comes out: the OpenAI parameters of each route, checked and never changed.

Rule 1: a request is checked against an allow-list, and the caller's own dict is what travels on.
Rule 2: types are strict. `"5"` is not 5, and `True` is not 1.
Rule 3: an error names the field and never repeats its value.
Rule 4: a name that would choose where or with which credential a provider is called is refused
        even where a deployment's `allowed_params` lists it.

The shapes follow OpenAI's specification. Beside it, assistant messages may carry what providers
add to theirs (reasoning, thinking blocks), so that an answer can be sent back in the next turn.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, NoReturn, Required

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    with_config,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from typing_extensions import TypedDict

from forebay.body import BODY_BYTES_MAX, DEPTH_MAX, parse_json
from forebay.errors import InvalidRequest
from forebay.responses import (
    EmbedResponse,
    GenerateResponse,
    HealthCheckResult,
    HealthStatus,
    Usage,
)
from forebay.tally import StreamTally

__all__ = [
    "BODY_BYTES_MAX",
    "DEPTH_MAX",
    "INPUTS_MAX",
    "MESSAGES_MAX",
    "MODEL_CHARS_MAX",
    "ROUTES",
    "EmbedResponse",
    "GenerateResponse",
    "HealthCheckResult",
    "HealthStatus",
    "StreamTally",
    "Usage",
    "check",
    "connects",
    "openapi_schemas",
    "parameters",
    "parse_json",
]

MESSAGES_MAX = 2048
"""Messages in one chat request; OpenAI's own bound."""
INPUTS_MAX = 100_000
"""Texts in one embedding or completion request; the body's 10 MiB bound the rest."""
MODEL_CHARS_MAX = 256

Route = Literal["chat", "completion", "embedding"]
Validate = Callable[[dict[str, Any]], Any]

# --- names that never come from a caller -----------------------------------------------------

_CONNECTION = re.compile(
    r"""
      (\w+_)? ( api_?(base|key|keys|type|version) | base_?url | base_urls | api_host )
    | (\w+_)? ( headers | header | callback | callbacks | credentials | credential_name )
    | (extra|model|client|user|router|retry)_( body | query | list | secret | config | policy )
    | ( aws | azure | s3 | sagemaker | watsonx | langfuse | langsmith | mock | litellm )_\w+
    | vertex_(ai_)?( project | location | credentials | api_base )
    | anthropic_( federation | identity | issuer | keycloak | organization | service_account )_?\w*
    | openai_( identity | service_account )\w* | auto_router_\w+ | \w+_secret(_\w+)?
    | \w+_cost_per_\w+ | cost_per_\w+
    | custom_llm_provider | custom_prompt_dict | use_litellm_proxy | fallbacks | num_retries
    | context_window_fallback_dict | logger_fn | ssl_verify | ssl_certificate | hf_model_name
    | allowed_openai_params | allowed_params | additional_drop_params | nvcf_function_id
    | base_model | model_info | region_name | routing_strategy | secret_fields
    | proxy_server_request | guardrails
    """,
    re.VERBOSE,
)
"""Endpoints, credentials, headers, callbacks, routing, prices and mocks of the LiteLLM call."""


def connects(name: str) -> bool:
    """Whether `name`, in any case or spelling, says where or as whom a provider is called."""
    plain = unicodedata.normalize("NFKC", name).strip().casefold().replace("-", "_")
    return _CONNECTION.fullmatch(plain) is not None


# --- parts ------------------------------------------------------------------------------------


def _invalid(message: str) -> PydanticCustomError:
    return PydanticCustomError("invalid_value", "{reason}", {"reason": message})


def _model_name(name: str) -> str:
    if not name.isprintable() or "://" in name:
        raise _invalid("must be a model's name: no control characters, no URL")
    return name


def _fetchable(url: str) -> str:
    if not url[:8].casefold().startswith(("https://", "http://", "data:")):
        raise _invalid("must be an http, https or data URL")
    return url


def _inline(data: str) -> str:
    if "://" in data[:32]:
        raise _invalid("must be the data itself, not a URL")
    return data


def _plain_metadata(metadata: dict[str, str]) -> dict[str, str]:
    for key in metadata:
        if connects(key):
            raise _invalid("has a key that callers may not set")
    return metadata


def _opaque(value: Any) -> Any:
    """A provider's own fields, passed back: any shape, as long as no name in it connects."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str) or connects(key):
                raise _invalid("has a key that callers may not set")
            _opaque(item)
    elif isinstance(value, list):
        for item in value:
            _opaque(item)
    return value


ModelName = Annotated[
    str, Field(min_length=1, max_length=MODEL_CHARS_MAX), AfterValidator(_model_name)
]
Label = Annotated[str, Field(min_length=1, max_length=256)]
Note = Annotated[str, Field(max_length=1024)]
Url = Annotated[str, AfterValidator(_fetchable)]
Inline = Annotated[str, AfterValidator(_inline)]
Opaque = Annotated[dict[str, Any], AfterValidator(_opaque)]
JsonSchema = dict[str, Any]
Unit = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Heat = Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
Choices = Annotated[int, Field(ge=1, le=128)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[dict[Label, Bias], Field(max_length=1024)]
Stop = str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=64)]
Metadata = Annotated[
    dict[
        Annotated[str, Field(max_length=64)],
        Annotated[str, Field(max_length=512)],
    ],
    Field(max_length=16),
    AfterValidator(_plain_metadata),
]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=2**32)]], Field(fail_fast=True, min_length=1)
]
Words = Annotated[str, Field(min_length=1)]
Texts = (
    Words
    | Annotated[list[Words], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX)]
    | TokenIds
    | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1, max_length=INPUTS_MAX)]
)

STRICT = ConfigDict(extra="forbid", strict=True)


@with_config(STRICT)
class CacheControl(TypedDict, total=False):
    """Anthropic's mark for prompt caching, as LiteLLM takes it on content parts."""

    type: Required[Literal["ephemeral"]]
    ttl: Literal["5m", "1h"]


@with_config(STRICT)
class CacheBreakpoint(TypedDict):
    mode: Literal["explicit"]


@with_config(STRICT)
class TextPart(TypedDict, total=False):
    type: Required[Literal["text"]]
    text: Required[str]
    prompt_cache_breakpoint: CacheBreakpoint | None
    cache_control: CacheControl | None


@with_config(STRICT)
class ImageUrl(TypedDict, total=False):
    url: Required[Url]
    detail: Literal["auto", "low", "high", "original"] | None


@with_config(STRICT)
class ImagePart(TypedDict, total=False):
    type: Required[Literal["image_url"]]
    image_url: Required[ImageUrl]
    prompt_cache_breakpoint: CacheBreakpoint | None
    cache_control: CacheControl | None


@with_config(STRICT)
class InputAudio(TypedDict):
    data: Inline
    format: Literal["wav", "mp3"]


@with_config(STRICT)
class AudioPart(TypedDict, total=False):
    type: Required[Literal["input_audio"]]
    input_audio: Required[InputAudio]
    prompt_cache_breakpoint: CacheBreakpoint | None


@with_config(STRICT)
class FileSource(TypedDict, total=False):
    file_data: Inline
    file_id: Inline
    filename: str


@with_config(STRICT)
class FilePart(TypedDict, total=False):
    type: Required[Literal["file"]]
    file: Required[FileSource]
    prompt_cache_breakpoint: CacheBreakpoint | None
    cache_control: CacheControl | None


@with_config(STRICT)
class RefusalPart(TypedDict):
    type: Literal["refusal"]
    refusal: str


Part = Annotated[
    TextPart | ImagePart | AudioPart | FilePart | RefusalPart, Field(discriminator="type")
]
Content = str | Annotated[list[Part], Field(fail_fast=True, min_length=1)]


@with_config(STRICT)
class FunctionCall(TypedDict, total=False):
    name: Required[str]
    arguments: Required[str]


@with_config(STRICT)
class FunctionToolCall(TypedDict, total=False):
    id: Required[str]
    type: Required[Literal["function"]]
    function: Required[FunctionCall]
    index: int | None
    provider_specific_fields: Opaque | None


@with_config(STRICT)
class CustomCall(TypedDict):
    name: str
    input: str


@with_config(STRICT)
class CustomToolCall(TypedDict, total=False):
    id: Required[str]
    type: Required[Literal["custom"]]
    custom: Required[CustomCall]
    index: int | None
    provider_specific_fields: Opaque | None


ToolCall = Annotated[FunctionToolCall | CustomToolCall, Field(discriminator="type")]


@with_config(STRICT)
class SystemMessage(TypedDict, total=False):
    role: Required[Literal["system"]]
    content: Required[Content]
    name: str | None


@with_config(STRICT)
class DeveloperMessage(TypedDict, total=False):
    role: Required[Literal["developer"]]
    content: Required[Content]
    name: str | None


@with_config(STRICT)
class UserMessage(TypedDict, total=False):
    role: Required[Literal["user"]]
    content: Required[Content]
    name: str | None


@with_config(STRICT)
class AssistantMessage(TypedDict, total=False):
    role: Required[Literal["assistant"]]
    content: Content | None
    name: str | None
    refusal: str | None
    audio: Opaque | None
    annotations: Annotated[list[Any], AfterValidator(_opaque)] | None
    function_call: FunctionCall | None
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True)] | None
    reasoning: str | None
    reasoning_content: str | None
    thinking_blocks: Annotated[list[Any], AfterValidator(_opaque)] | None
    images: Annotated[list[Any], AfterValidator(_opaque)] | None
    provider_specific_fields: Opaque | None


@with_config(STRICT)
class ToolMessage(TypedDict, total=False):
    role: Required[Literal["tool"]]
    content: Required[Content]
    tool_call_id: Required[str]
    name: str | None


@with_config(STRICT)
class FunctionMessage(TypedDict):
    role: Literal["function"]
    content: str | None
    name: str


Message = Annotated[
    SystemMessage
    | DeveloperMessage
    | UserMessage
    | AssistantMessage
    | ToolMessage
    | FunctionMessage,
    Field(discriminator="role"),
]


@with_config(STRICT)
class FunctionDefinition(TypedDict, total=False):
    name: Required[Label]
    description: str | None
    parameters: JsonSchema | None
    strict: bool | None


@with_config(STRICT)
class FunctionTool(TypedDict, total=False):
    type: Required[Literal["function"]]
    function: Required[FunctionDefinition]
    cache_control: CacheControl | None


@with_config(STRICT)
class Grammar(TypedDict):
    definition: str
    syntax: Literal["lark", "regex"]


@with_config(STRICT)
class TextFormat(TypedDict):
    type: Literal["text"]


@with_config(STRICT)
class GrammarFormat(TypedDict):
    type: Literal["grammar"]
    grammar: Grammar


@with_config(STRICT)
class CustomDefinition(TypedDict, total=False):
    name: Required[Label]
    description: str | None
    format: Annotated[TextFormat | GrammarFormat, Field(discriminator="type")] | None


@with_config(STRICT)
class CustomTool(TypedDict):
    type: Literal["custom"]
    custom: CustomDefinition


Tool = Annotated[FunctionTool | CustomTool, Field(discriminator="type")]


@with_config(STRICT)
class Named(TypedDict):
    name: Label


@with_config(STRICT)
class FunctionChoice(TypedDict):
    type: Literal["function"]
    function: Named


@with_config(STRICT)
class CustomChoice(TypedDict):
    type: Literal["custom"]
    custom: Named


@with_config(STRICT)
class AllowedTools(TypedDict):
    mode: Literal["auto", "required"]
    tools: list[Opaque]


@with_config(STRICT)
class AllowedChoice(TypedDict):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (
    Literal["none", "auto", "required"]
    | Annotated[FunctionChoice | CustomChoice | AllowedChoice, Field(discriminator="type")]
)


@with_config(STRICT)
class JsonObjectFormat(TypedDict):
    type: Literal["json_object"]


@with_config(STRICT)
class NamedSchema(TypedDict, total=False):
    name: Required[Label]
    description: str | None
    schema: JsonSchema
    strict: bool | None


@with_config(STRICT)
class JsonSchemaFormat(TypedDict):
    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


@with_config(STRICT)
class Voice(TypedDict):
    id: Label


@with_config(STRICT)
class AudioOutput(TypedDict):
    voice: Label | Voice
    format: Literal["wav", "aac", "mp3", "flac", "opus", "pcm16"]


@with_config(STRICT)
class ModerationMode(TypedDict):
    mode: Literal["score", "block"]


@with_config(STRICT)
class ModerationPolicy(TypedDict, total=False):
    input: ModerationMode | None
    output: ModerationMode | None


@with_config(STRICT)
class Moderation(TypedDict, total=False):
    model: Required[Label]
    policy: ModerationPolicy | None


@with_config(STRICT)
class Prediction(TypedDict):
    type: Literal["content"]
    content: Content


@with_config(STRICT)
class PromptCacheOptions(TypedDict, total=False):
    mode: Literal["implicit", "explicit"]
    ttl: Literal["30m"]


@with_config(STRICT)
class StreamOptions(TypedDict, total=False):
    include_usage: bool | None
    include_obfuscation: bool | None


@with_config(STRICT)
class Place(TypedDict, total=False):
    city: str | None
    country: str | None
    region: str | None
    timezone: str | None


@with_config(STRICT)
class UserLocation(TypedDict):
    type: Literal["approximate"]
    approximate: Place


@with_config(STRICT)
class WebSearchOptions(TypedDict, total=False):
    search_context_size: Literal["low", "medium", "high"] | None
    user_location: UserLocation | None


@with_config(ConfigDict(extra="allow", strict=True))
class Thinking(TypedDict, total=False):
    type: Required[Label]
    budget_tokens: Tokens | None


@with_config(ConfigDict(extra="allow", strict=True))
class Extras(TypedDict, total=False):
    """Parameters beside OpenAI's, for the deployments that take them: these two are known here."""

    thinking: Annotated[Thinking, AfterValidator(_opaque)] | None
    top_k: int | None


# --- requests ---------------------------------------------------------------------------------


@with_config(STRICT)
class ChatRequest(TypedDict, total=False):
    """POST /v1/chat/completions."""

    model: ModelName
    messages: Required[
        Annotated[list[Message], Field(fail_fast=True, min_length=1, max_length=MESSAGES_MAX)]
    ]
    audio: AudioOutput | None
    frequency_penalty: Penalty | None
    function_call: Literal["none", "auto"] | Named | None
    functions: Annotated[list[FunctionDefinition], Field(fail_fast=True, max_length=1024)] | None
    logit_bias: LogitBias | None
    logprobs: bool | None
    max_completion_tokens: Tokens | None
    max_tokens: Tokens | None
    metadata: Metadata | None
    modalities: list[Literal["text", "audio", "image"]] | None
    moderation: Moderation | None
    n: Choices | None
    parallel_tool_calls: bool | None
    prediction: Prediction | None
    presence_penalty: Penalty | None
    prompt_cache_key: Note | None
    prompt_cache_options: PromptCacheOptions | None
    prompt_cache_retention: Literal["in_memory", "24h"] | None
    reasoning_effort: (
        Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "default"] | None
    )
    response_format: ResponseFormat | None
    safety_identifier: Note | None
    seed: Seed | None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None
    stop: Stop | None
    store: bool | None
    stream: bool | None
    stream_options: StreamOptions | None
    temperature: Heat | None
    tool_choice: ToolChoice | None
    tools: Annotated[list[Tool], Field(fail_fast=True, max_length=1024)] | None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None
    top_p: Unit | None
    user: Note | None
    verbosity: Literal["low", "medium", "high"] | None
    web_search_options: WebSearchOptions | None


@with_config(STRICT)
class CompletionRequest(TypedDict, total=False):
    """POST /v1/completions."""

    model: ModelName
    prompt: Required[Texts]
    best_of: Annotated[int, Field(ge=1, le=20)] | None
    echo: bool | None
    frequency_penalty: Penalty | None
    logit_bias: LogitBias | None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None
    n: Choices | None
    presence_penalty: Penalty | None
    seed: Seed | None
    stop: Stop | None
    stream: bool | None
    stream_options: StreamOptions | None
    suffix: str | None
    temperature: Heat | None
    top_p: Unit | None
    user: Note | None


@with_config(STRICT)
class EmbeddingRequest(TypedDict, total=False):
    """POST /v1/embeddings."""

    model: ModelName
    input: Required[Texts]
    dimensions: Annotated[int, Field(ge=1, le=65_536)] | None
    encoding_format: Literal["float", "base64"] | None
    user: Note | None


ROUTES: Mapping[str, Any] = {
    "chat": ChatRequest,
    "completion": CompletionRequest,
    "embedding": EmbeddingRequest,
}
_EXTRAS: Validate = TypeAdapter(Extras).validator.validate_python
_VALIDATES: Mapping[str, Validate] = {
    route: TypeAdapter(shape).validator.validate_python for route, shape in ROUTES.items()
}
_UNDERSTOOD = {
    route: frozenset(shape.__annotations__) | frozenset(Extras.__annotations__)
    for route, shape in ROUTES.items()
}
_PARAMETERS = {route: frozenset(shape.__annotations__) for route, shape in ROUTES.items()}


# --- the check --------------------------------------------------------------------------------


def parameters(route: str) -> frozenset[str]:
    """The parameters of `route`: "chat", "completion" or "embedding"."""
    return _PARAMETERS[route]


def understands(route: str, body: Mapping[str, Any]) -> bool:
    """Whether it is known here what every parameter of a checked `body` means.

    What `allowed_params` lets through beside that may mean anything: a session, a side effect.
    """
    return body.keys() <= _UNDERSTOOD[route]


def check(route: str, body: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Raise InvalidRequest unless `body` is a request of `route`.

    `allowed` are further parameters that the deployments take (`Group.allowed_params`); of these
    only `thinking` and `top_k` are checked. A missing `model` is no error here, since there may be
    a default one. `body` is only read. The error's `param` is the field's path, such as
    `messages[0].content`; its `code` is `unknown_parameter`, `missing_required_parameter`,
    `invalid_type` or `invalid_value`.
    """
    known = _PARAMETERS[route]
    if not body.keys() <= known:
        body, extras = _parted(body, known, allowed)
        _checked(_EXTRAS, extras)
    _checked(_VALIDATES[route], body)
    if body.get("stream_options") is not None and body.get("stream") is not True:
        raise InvalidRequest.about(
            "stream_options",
            "The 'stream_options' parameter is only allowed when 'stream' is true.",
            code="invalid_value",
        )


def openapi_schemas() -> dict[str, Any]:
    """JSON schemas (2020-12) of requests and answers, by name, for `components.schemas`."""
    models = [*ROUTES.values(), GenerateResponse, HealthCheckResult]
    _, definitions = TypeAdapter.json_schemas(
        [(model, "validation", TypeAdapter(model)) for model in models],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = definitions["$defs"]
    for shape in ROUTES.values():
        schemas[shape.__name__]["required"].insert(0, "model")
    return schemas


def _parted(
    body: dict[str, Any], known: frozenset[str], allowed: Collection[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """`body` and the deployments' own parameters; raises for the first unknown one."""
    extras: dict[str, Any] = {}
    for name, value in body.items():
        if name in known:
            continue
        if name not in allowed or connects(str(name)):
            shown = str(name)[:64]
            raise InvalidRequest.about(
                shown, f"Unknown parameter: {shown!r}.", code="unknown_parameter"
            )
        extras[name] = value
    return {name: value for name, value in body.items() if name in known}, extras


def _checked(validate: Validate, body: dict[str, Any]) -> None:
    try:
        validate(body)
    except ValidationError as error:
        _refuse(body, error)


# --- errors -----------------------------------------------------------------------------------

_TAGGED_FIELDS = frozenset(
    ("messages", "content", "tools", "tool_calls", "tool_choice", "format", "response_format")
)
_EXPECTED = {
    "string_type": "a string",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "a boolean",
    "list_type": "an array",
    "dict_type": "an object",
    "none_required": "null",
    "model_attributes_type": "an object",
}
_NAMES = {
    type(None): "null",
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    list: "an array",
    dict: "an object",
}

Path = tuple[str | int, ...]


def _refuse(body: dict[str, Any], error: ValidationError) -> NoReturn:
    """The 400 for the most specific of the errors."""
    found = error.errors(include_url=False, include_input=True)
    located = [(_path(body, detail), detail) for detail in found]
    at, detail = max(located, key=lambda item: _reach(item[0]))
    beside = [other for path, other in located if path == at]
    expected = list(dict.fromkeys(_EXPECTED.get(other["type"], "") for other in beside))
    param = _shown(at)
    if all(expected):
        wanted = " or ".join(expected)
        given = _NAMES.get(type(detail["input"]), "something else")
        message = f"Invalid type for '{param}': expected {wanted}, got {given}."
        raise InvalidRequest.about(param, message, code="invalid_type") from None
    detail = next(other for other in beside if other["type"] not in _EXPECTED)
    code, message = _told(param, detail)
    raise InvalidRequest.about(param, message, code=code) from None


def _reach(path: Path) -> tuple[int, list[int]]:
    """How far into the body the validator came: deeper first, then further along its lists."""
    return len(path), [step for step in path if isinstance(step, int)]


def _told(param: str, detail: ErrorDetails) -> tuple[str, str]:
    """OpenAI's code and a sentence for one pydantic error. Never the input itself."""
    kind, context = detail["type"], detail.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        return "missing_required_parameter", f"Missing required parameter: '{param}'."
    if kind == "extra_forbidden":
        return "unknown_parameter", f"Unknown parameter: '{param}'."
    if kind in ("literal_error", "enum"):
        return "invalid_value", f"Invalid value for '{param}': expected {context['expected']}."
    if kind == "union_tag_invalid":
        tags = context["expected_tags"]
        return "invalid_value", f"Invalid value for '{param}': expected one of {tags}."
    if kind == "invalid_value":
        return "invalid_value", f"'{param}' {context['reason']}."
    if kind in ("too_short", "string_too_short") and context["min_length"] == 1:
        return "invalid_value", f"'{param}' must not be empty."
    reason = detail["msg"].replace("Input should", "it should")
    return "invalid_value", f"Invalid value for '{param}': {reason}."


def _path(body: dict[str, Any], detail: ErrorDetails) -> Path:
    """Where in the body an error is: pydantic's location without the names of union members.

    The first step after a tagged union is its tag; what neither indexes a list nor is a key of
    the dict at hand names a union member. The last step of a missing field is kept.
    """
    value: Any = body
    path: list[str | int] = []
    tag: Any = None
    for step in detail["loc"]:
        if tag is not None and step == tag:
            tag = None
            continue
        tag = None
        if isinstance(step, int):
            reachable = isinstance(value, list) and step < len(value)
        else:
            reachable = isinstance(value, dict) and step in value
        if reachable:
            path.append(step)
            value = value[step]
            tag = _tag(path, value)
    last = detail["loc"][-1]
    if detail["type"] == "missing":
        path.append(last)
    elif detail["type"].startswith("union_tag"):
        path.append(detail.get("ctx", {})["discriminator"].strip("'"))
    return tuple(path)


def _tag(path: list[str | int], value: Any) -> Any:
    """The tag that pydantic's location names next, when `value` is a member of a tagged union."""
    if not isinstance(value, dict):
        return None
    fields = [step for step in path if isinstance(step, str)]
    if not fields or fields[-1] not in _TAGGED_FIELDS:
        return None
    return value.get("role" if fields[-1] == "messages" else "type")


def _shown(path: Path) -> str:
    """`messages[0].content`; long keys are cut."""
    shown = ""
    for step in path:
        if isinstance(step, int):
            shown += f"[{step}]"
        else:
            shown += f".{step[:64]}" if shown else step[:64]
    return shown
