"""What goes in and comes out: allow-listed, strictly typed, never changed."""

from __future__ import annotations

import ast
import copy
import importlib.util
import pickle
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forebay import schemas
from forebay.errors import InvalidRequest
from forebay.schemas import (
    EmbedResponse,
    GenerateResponse,
    HealthCheckResult,
    HealthStatus,
    Usage,
    check,
)

USER = {"role": "user", "content": "hi"}
CHAT: dict[str, Any] = {"model": "m", "messages": [USER]}
BASE: dict[str, dict[str, Any]] = {
    "chat": CHAT,
    "completion": {"model": "m", "prompt": "hi"},
    "embedding": {"model": "m", "input": "hi"},
}


def refusal(route: str, body: dict[str, Any], allowed: tuple[str, ...] = ()) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        check(route, body, allowed)
    return caught.value


def chat_refusal(**fields: Any) -> InvalidRequest:
    return refusal("chat", {**CHAT, **fields})


# --- what is accepted -------------------------------------------------------------------------

FULL: dict[str, Any] = {
    "model": "m",
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "system", "content": [{"type": "text", "text": "Be kind."}], "name": "s"},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is this?", "cache_control": {"type": "ephemeral"}},
                {"type": "image_url", "image_url": {"url": "https://x/y.png", "detail": "low"}},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
                {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
                {"type": "file", "file": {"file_data": "data:application/pdf;base64,AA=="}},
            ],
        },
        {
            "role": "assistant",
            "content": None,
            "refusal": None,
            "annotations": [],
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "42"},
        {"role": "function", "name": "f", "content": None},
    ],
    "audio": {"voice": "alloy", "format": "mp3"},
    "frequency_penalty": 0,
    "function_call": {"name": "f"},
    "functions": [{"name": "f", "parameters": {"type": "object"}}],
    "logit_bias": {"50256": -100},
    "logprobs": True,
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "metadata": {"project": "x"},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "x"},
    "presence_penalty": -2,
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}},
    "safety_identifier": "s",
    "seed": 5,
    "service_tier": "auto",
    "stop": ["a", "b"],
    "store": False,
    "stream": True,
    "stream_options": {"include_usage": True},
    "temperature": 0.5,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "strict": True,
                "parameters": {"type": "object", "properties": {"api_key": {"type": "string"}}},
            },
        },
        {"type": "custom", "custom": {"name": "c", "format": {"type": "text"}}},
    ],
    "top_logprobs": 2,
    "top_p": 1,
    "user": "u",
    "verbosity": "low",
    "web_search_options": {"user_location": {"type": "approximate", "approximate": {"city": "B"}}},
}


def test_every_openai_chat_parameter_is_accepted() -> None:
    check("chat", FULL)


def test_a_request_is_read_and_never_changed() -> None:
    before = copy.deepcopy(FULL)
    check("chat", FULL)

    assert before == FULL


def test_no_parameter_of_the_installed_openai_client_is_unknown() -> None:
    root = Path(next(iter(_package("openai"))))
    files = {"chat": "chat/completion", "completion": "completion", "embedding": "embedding"}
    for route, name in files.items():
        tree = ast.parse((root / "types" / f"{name}_create_params.py").read_text())
        shapes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
        names = {
            field
            for shape in shapes
            if shape.name.endswith(("ParamsBase", "ParamsStreaming", "CreateParams"))
            for field in _annotated(shape)
        }

        assert names
        assert names <= schemas.parameters(route), route


def test_null_is_taken_for_every_optional_parameter() -> None:
    optional = schemas.parameters("chat") - {"model", "messages"}

    check("chat", {**CHAT, **dict.fromkeys(optional)})


def test_an_answer_can_be_sent_back_as_the_assistants_turn() -> None:
    turn = {
        "role": "assistant",
        "content": "",
        "audio": None,
        "function_call": None,
        "tool_calls": None,
        "thinking_blocks": [{"type": "thinking", "thinking": "hm", "signature": "s"}],
        "provider_specific_fields": {"citations": None},
    }

    check("chat", {**CHAT, "messages": [USER, turn, USER]})


@pytest.mark.parametrize("given", ["a", ["a", "b"], [1, 2], [[1, 2], [3]]])
def test_texts_and_tokens_are_taken(given: Any) -> None:
    check("embedding", {"model": "m", "input": given, "dimensions": 64, "encoding_format": "float"})
    check("completion", {"model": "m", "prompt": given, "max_tokens": 0, "echo": True})


def test_a_missing_model_is_left_to_whoever_knows_a_default() -> None:
    check("chat", {"messages": [USER]})


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize("route", ["chat", "completion", "embedding"])
@pytest.mark.parametrize(
    "name",
    [
        "api_base",
        "api_key",
        "base_url",
        "extra_headers",
        "extra_body",
        "mock_response",
        "custom_llm_provider",
        "callbacks",
        "success_callback",
        "API_BASE",
        "Api_Key",
        "metadata ",
        "ａpi_base",
        "top_k",
        "",
    ],
)
def test_an_unknown_parameter_is_refused_by_name(route: str, name: str) -> None:
    error = refusal(route, {**BASE[route], name: "x"})

    assert error.param == name
    assert error.code == "unknown_parameter"
    assert error.status == 400


@pytest.mark.parametrize("route", ["chat", "completion", "embedding"])
def test_no_parameter_of_litellms_own_passes(route: str) -> None:
    tree = ast.parse((Path(_package("litellm")[0]) / "types/litellm_params.py").read_text())
    names = {
        name for node in tree.body if isinstance(node, ast.ClassDef) for name in _annotated(node)
    }
    assert "api_base" in names
    assert "mock_response" in names

    for name in names - schemas.parameters(route):
        assert refusal(route, {**BASE[route], name: "x"}).param == name


def test_a_deployments_own_parameters_pass() -> None:
    check("chat", {**CHAT, "min_p": object()}, ("min_p",))


def test_claudes_own_parameters_are_checked_where_they_are_allowed() -> None:
    names = ("top_k", "thinking")
    for thinking in ({"type": "adaptive", "display": "omitted"}, None, {"type": "enabled"}):
        check("chat", {**CHAT, "top_k": 5, "thinking": thinking}, names)
    for wrong, param in (
        ({"top_k": "5"}, "top_k"),
        ({"top_k": True}, "top_k"),
        ({"thinking": 5}, "thinking"),
        ({"thinking": {"type": "enabled", "budget_tokens": "9"}}, "thinking.budget_tokens"),
        ({"thinking": {"budget_tokens": 9}}, "thinking.type"),
        ({"thinking": {"type": "enabled", "api_base": "http://x"}}, "thinking"),
    ):
        assert refusal("chat", {**CHAT, **wrong}, names).param == param
    assert chat_refusal(top_k=5).code == "unknown_parameter"


@pytest.mark.parametrize(
    "name", ["api_key", "API-Base", "extra_headers", "mock_response", "aws_secret_access_key"]
)
def test_connections_are_refused_even_where_a_deployment_allows_them(name: str) -> None:
    assert refusal("chat", {**CHAT, name: "x"}, (name,)).param == name


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"metadata": {"api_base": "http://evil"}}, "metadata"),
        ({"metadata": {"Extra-Headers": "x"}}, "metadata"),
        ({"metadata": {"a": {"api_base": "x"}}}, "metadata.a"),
        ({"metadata": '{"api_base": "x"}'}, "metadata"),
        ({"messages": [{**USER, "api_base": "x"}]}, "messages[0].api_base"),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "", "api_key": 1}]}
                ]
            },
            "messages[0].content[0].api_key",
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "provider_specific_fields": {"a": {"api_key": 1}}}
                ]
            },
            "messages[0].provider_specific_fields",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}, "headers": 1}]},
            "tools[0].headers",
        ),
        ({"tools": [{"type": "mcp", "server_url": "http://evil"}]}, "tools[0].type"),
        ({"stream": True, "stream_options": {"api_base": "x"}}, "stream_options.api_base"),
        ({"response_format": {"type": "text", "api_base": "x"}}, "response_format.api_base"),
        ({"web_search_options": {"base_url": "x"}}, "web_search_options.base_url"),
    ],
)
def test_connections_are_refused_wherever_they_hide(fields: dict[str, Any], param: str) -> None:
    assert chat_refusal(**fields).param == param


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "file:///etc/passwd"}},
        {"type": "image_url", "image_url": {"url": "gopher://x"}},
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "file", "file": {"file_data": "http://169.254.169.254/"}},
        {"type": "file", "file": {"file_id": "gs://bucket/x"}},
        {"type": "input_audio", "input_audio": {"data": "http://x", "format": "wav"}},
    ],
)
def test_only_http_and_data_urls_are_taken(part: dict[str, Any]) -> None:
    error = chat_refusal(messages=[{"role": "user", "content": [part]}])

    assert error.param is not None
    assert error.param.startswith("messages[0].content[0].")


@pytest.mark.parametrize(
    "model", ["", "x" * 257, "a\nb", "a\x00b", "openai/http://evil", 5, ["m"], None]
)
def test_a_model_that_is_no_name_is_refused(model: Any) -> None:
    assert refusal("chat", {**CHAT, "model": model}).param == "model"


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "hi"}, "messages", "invalid_type"),
        ({"messages": None}, "messages", "invalid_type"),
        ({"messages": ["hi"]}, "messages[0]", "invalid_type"),
        (
            {"messages": [USER, {"role": "user"}]},
            "messages[1].content",
            "missing_required_parameter",
        ),
        ({"messages": [{"content": "x"}]}, "messages[0].role", "missing_required_parameter"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "invalid_type"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "invalid_value"),
        ({"messages": [USER] * 2049}, "messages", "invalid_value"),
        ({"temperature": "0"}, "temperature", "invalid_type"),
        ({"temperature": True}, "temperature", "invalid_type"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"max_tokens": 1.0}, "max_tokens", "invalid_type"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"stop": [1]}, "stop[0]", "invalid_type"),
        ({"stream": "true"}, "stream", "invalid_type"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"seed": 2**64}, "seed", "invalid_value"),
        ({"tool_choice": "some"}, "tool_choice", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice.function.name", None),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None),
        ({"logit_bias": {"5": "x"}}, "logit_bias.5", "invalid_type"),
        ({"reasoning_effort": "huge"}, "reasoning_effort", "invalid_value"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str, code: str | None) -> None:
    error = chat_refusal(**fields)

    assert error.param == param
    assert error.code == (code or "missing_required_parameter")
    assert param in str(error)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ("", "input"),
        ([], "input"),
        (["a", ""], "input[1]"),
        ([1, "a"], "input[1]"),
        ([[]], "input[0]"),
        ([1.5], "input[0]"),
        ([-1], "input[0]"),
        ([True], "input[0]"),
        (None, "input"),
        ({"a": 1}, "input"),
    ],
)
def test_a_wrong_or_empty_input_is_refused(given: Any, param: str) -> None:
    assert refusal("embedding", {"model": "m", "input": given}).param == param


def test_an_empty_prompt_is_refused() -> None:
    assert refusal("completion", {"model": "m", "prompt": ""}).param == "prompt"
    assert refusal("completion", {"model": "m"}).param == "prompt"


def test_the_error_never_repeats_a_value_and_cuts_long_names() -> None:
    long = "k" * 5000

    assert "sk-secret" not in str(chat_refusal(temperature="sk-secret"))
    assert "sk-secret" not in str(chat_refusal(messages=[{"role": "sk-secret", "content": ""}]))
    assert len(str(chat_refusal(**{long: 1}))) < 200


def test_a_hundred_thousand_wrong_items_cost_no_more_than_one() -> None:
    assert chat_refusal(messages=[5] * 2000).param == "messages[0]"
    assert refusal("embedding", {"model": "m", "input": [None] * 100_000}).param == "input[0]"


# --- what comes out ---------------------------------------------------------------------------


def test_usage_reads_as_items_and_as_attributes() -> None:
    usage = Usage(prompt_tokens=3, completion_tokens_details={"reasoning_tokens": 2})

    assert usage["prompt_tokens"] == usage.prompt_tokens == 3
    assert usage.completion_tokens_details.reasoning_tokens == 2
    assert pickle.loads(pickle.dumps(usage)) == usage
    with pytest.raises(AttributeError):
        _ = usage.total_tokens


def test_a_generate_response_is_made_from_an_openai_body() -> None:
    message = {"role": "assistant", "content": "Hello", "tool_calls": None}
    body = {
        "id": "c",
        "model": "m-2026",
        "choices": [{"message": message, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
    response = GenerateResponse.of(body, cached=True, cost_nano=1_500, warnings=["short"])

    assert (response.text, response.model, response.finish_reason) == ("Hello", "m-2026", "stop")
    assert response.usage is not None
    assert response.usage.total_tokens == 3
    assert response.cost_usd == 1.5e-6
    assert response.raw_response is not None
    assert response.raw_response["choices"][0]["message"] == message
    assert GenerateResponse.model_validate_json(response.model_dump_json()) == response
    assert pickle.loads(pickle.dumps(response)) == response


def test_the_text_of_a_tool_call_is_empty() -> None:
    body = {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]}

    assert GenerateResponse.of(body).text == ""


def test_an_embed_response_holds_the_array_it_was_given() -> None:
    array = np.array([[0.5, 1.0]], dtype=np.float32)
    response = EmbedResponse(array=array, model="m", usage=Usage(total_tokens=1))

    assert response.array is array
    assert response.embeddings == [[0.5, 1.0]]
    assert response.model_dump()["embeddings"] == [[0.5, 1.0]]
    assert response == EmbedResponse(
        embeddings=[[0.5, 1.0]], model="m", usage=Usage(total_tokens=1)
    )
    assert pickle.loads(pickle.dumps(response)) == response
    with pytest.raises(ValueError, match="either"):
        EmbedResponse(model="m")


def test_a_health_status_is_a_string() -> None:
    result = HealthCheckResult.model_validate(
        {"status": "healthy", "timestamp": datetime(2026, 1, 1, tzinfo=UTC)}
    )

    assert result.status == "healthy"
    assert result.status is HealthStatus.HEALTHY
    assert result.model_dump(mode="json")["status"] == "healthy"


def test_the_json_schemas_name_requests_and_answers() -> None:
    described = schemas.openapi_schemas()

    assert {"ChatRequest", "CompletionRequest", "EmbeddingRequest"} <= described.keys()
    assert described["ChatRequest"]["required"] == ["model", "messages"]
    assert described["ChatRequest"]["additionalProperties"] is False


def _package(name: str) -> list[str]:
    """Where a package is, without importing it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return list(spec.submodule_search_locations)


def _annotated(node: ast.ClassDef) -> set[str]:
    return {
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }
