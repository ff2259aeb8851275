"""OpenAI's wire format: chat completions, completions, embeddings."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

import orjson

from tests.support.simulator import truth
from tests.support.simulator.dialects.ask import (
    Ask,
    BadAsk,
    Choice,
    Frame,
    Reply,
    Request,
    Tool,
    field_int,
    field_str,
    flatten,
)

_TYPES = {
    400: ("invalid_request_error", None),
    401: ("invalid_request_error", "invalid_api_key"),
    403: ("invalid_request_error", "unsupported_country_region_territory"),
    404: ("invalid_request_error", "model_not_found"),
    413: ("invalid_request_error", None),
    422: ("invalid_request_error", None),
    429: ("requests", "rate_limit_exceeded"),
}
DONE = b"data: [DONE]\n\n"


class OpenAI:
    """Reads and writes OpenAI's bodies."""

    request_id_header = b"x-request-id"

    def read(self, route: str, request: Request, body: dict[str, Any]) -> Ask:
        model = field_str(body, "model")
        if route == "chat":
            return self._read_chat(model, body)
        if route == "completions":
            return self._read_completion(model, body)
        return self._read_embedding(model, body)

    def _read_chat(self, model: str, body: dict[str, Any]) -> Ask:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadAsk("Invalid 'messages': a non-empty array is expected.", param="messages")
        prompt, context = split_messages(messages)
        ask = Ask("chat", model, (prompt,), context=context, stream=body.get("stream") is True)
        if len(body) > 2:
            ask.max_tokens = field_int(body, "max_completion_tokens", "max_tokens")
            ask.choices = field_int(body, "n") or 1
            ask.options = options(body)
            response_format = body.get("response_format")
            if isinstance(response_format, dict):
                ask.json_answer = response_format.get("type") in ("json_object", "json_schema")
            if "tools" in body or "functions" in body:
                ask.tools = read_tools(body.get("tools") or body.get("functions"))
                ask.forced = _forced(body.get("tool_choice", body.get("function_call")))
                ask.after_tool = messages[-1].get("role") in ("tool", "function")
        return ask

    def _read_completion(self, model: str, body: dict[str, Any]) -> Ask:
        prompt = body.get("prompt", "<|endoftext|>")
        prompts = prompt if isinstance(prompt, list) else [prompt]
        if not prompts or not all(isinstance(one, str) for one in prompts):
            raise BadAsk("Invalid 'prompt': a string or strings are expected.", param="prompt")
        return Ask(
            "completions",
            model,
            prompts,
            choices=field_int(body, "n") or 1,
            stream=body.get("stream") is True,
            max_tokens=field_int(body, "max_tokens"),
            echo_prompt=body.get("echo") is True,
            options=options(body),
        )

    def _read_embedding(self, model: str, body: dict[str, Any]) -> Ask:
        texts = body.get("input")
        counts = None
        numbers = isinstance(texts, list) and texts and all(isinstance(t, int) for t in texts)
        if isinstance(texts, str) or numbers:
            texts = [texts]
        if not isinstance(texts, list):
            raise BadAsk("'$.input' is invalid. A string or a list is expected.", param="input")
        if texts and all(isinstance(text, list) for text in texts):
            counts = [len(text) for text in texts]
            texts = [",".join(map(str, text)) for text in texts]
        if not all(isinstance(text, str) for text in texts):
            raise BadAsk("'$.input' is invalid. Strings are expected.", param="input")
        encoding = body.get("encoding_format", "float")
        if encoding not in ("float", "base64"):
            raise BadAsk(f"Invalid encoding_format: {encoding!r}", param="encoding_format")
        dimensions = field_int(body, "dimensions")
        if dimensions is not None and dimensions > truth.DIMENSIONS_MAX:
            raise BadAsk(
                f"Invalid value for 'dimensions' = {dimensions}. Must be less than or equal to "
                f"{truth.DIMENSIONS_MAX}.",
                param="dimensions",
            )
        return Ask(
            "embeddings",
            model,
            texts=texts,
            texts_tokens=counts,
            dimensions=dimensions,
            options={"encoding": encoding},
        )

    def answer(self, ask: Ask, reply: Reply) -> bytes:
        if reply.vectors is not None:
            return self._answer_vectors(ask, reply)
        chat = ask.route == "chat"
        body: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + reply.id,
            "object": "chat.completion" if chat else "text_completion",
            "created": reply.created,
            "model": ask.model,
            "choices": [
                _chat_choice(ask, choice, i) if chat else _text_choice(choice, i)
                for i, choice in enumerate(reply.choices)
            ],
        }
        if reply.usage:
            body["usage"] = _usage(reply)
        if chat:
            body["system_fingerprint"] = "fp_simulator"
        return orjson.dumps(body)

    def _answer_vectors(self, ask: Ask, reply: Reply) -> bytes:
        assert reply.vectors is not None
        rows: list[Any] = list(reply.vectors)
        if ask.options["encoding"] == "base64":
            rows = [base64.b64encode(row.astype("<f4").tobytes()).decode() for row in rows]
        body: dict[str, Any] = {
            "object": "list",
            "data": [
                {"object": "embedding", "index": i, "embedding": row} for i, row in enumerate(rows)
            ],
            "model": ask.model,
        }
        if reply.usage:
            body["usage"] = {
                "prompt_tokens": reply.prompt_tokens,
                "total_tokens": reply.prompt_tokens,
            }
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def frames(self, ask: Ask, reply: Reply) -> list[Frame]:
        chat = ask.route == "chat"
        head: dict[str, Any] = {
            "id": ("chatcmpl-" if chat else "cmpl-") + reply.id,
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": reply.created,
            "model": ask.model,
        }
        include_usage = bool(ask.options.get("include_usage"))
        if include_usage:
            head["usage"] = None
        frames: list[Frame] = []

        def add(index: int, part: dict[str, Any], finish: str | None, tokens: int) -> None:
            choice = {"index": index, **part, "logprobs": None, "finish_reason": finish}
            frames.append(Frame(sse({**head, "choices": [choice]}), tokens))

        for i, choice in enumerate(reply.choices):
            if not chat:
                for piece in choice.pieces:
                    add(i, {"text": piece}, None, 1)
                add(i, {"text": ""}, choice.finish, 0)
                continue
            if choice.tool is not None:
                name = {"name": choice.tool.name, "arguments": ""}
                call = {"index": 0, "id": choice.tool.id, "type": "function", "function": name}
                delta = {"role": "assistant", "content": None, "tool_calls": [call]}
                add(i, {"delta": delta}, None, 0)
                for piece in choice.pieces:
                    part = {"index": 0, "function": {"arguments": piece}}
                    add(i, {"delta": {"tool_calls": [part]}}, None, 1)
            else:
                delta = {"role": "assistant", "content": "", "refusal": None}
                add(i, {"delta": delta}, None, 0)
                for piece in choice.pieces:
                    add(i, {"delta": {"content": piece}}, None, 1)
            add(i, {"delta": {}}, choice.finish, 0)
        if include_usage and reply.usage:
            frames.append(Frame(sse({**head, "choices": [], "usage": _usage(reply)})))
        frames.append(Frame(DONE))
        return frames

    def error(
        self, status: int, message: str, param: str | None, code: str | None, wait_s: float | None
    ) -> bytes:
        kind, usual = _TYPES.get(status, ("server_error", None))
        if wait_s is not None and status == 429:
            message += f" Please try again in {wait_s:g}s."
        detail = {"message": message, "type": kind, "param": param, "code": code or usual}
        return orjson.dumps({"error": detail})


def sse(data: Any) -> bytes:
    return b"data: " + orjson.dumps(data) + b"\n\n"


def options(body: Mapping[str, Any]) -> dict[str, Any]:
    given = body.get("stream_options")
    include = isinstance(given, dict) and given.get("include_usage") is True
    legacy = "functions" in body and "tools" not in body
    return {"include_usage": include, "legacy": legacy}


def split_messages(messages: list[Any]) -> tuple[str, str]:
    """The last user message, and all other text before and after it."""
    prompt: str | None = None
    context: list[str] = []
    for message in reversed(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadAsk("Invalid 'messages': each needs a 'role'.", param="messages")
        text = flatten(message.get("content"))
        if prompt is None and message["role"] == "user":
            prompt = text
        elif text:
            context.append(text)
    if prompt is None:
        prompt = context.pop(0) if context else ""
    return prompt, "\n".join(reversed(context))


def read_tools(given: Any) -> list[Tool]:
    if not isinstance(given, list):
        raise BadAsk("Invalid 'tools': an array is expected.", param="tools")
    tools = []
    for entry in given:
        function = entry.get("function", entry) if isinstance(entry, dict) else {}
        parameters = function.get("parameters")
        tools.append(
            Tool(str(function.get("name", "")), parameters if isinstance(parameters, dict) else {})
        )
    return tools


def _forced(given: Any) -> str:
    if isinstance(given, dict):
        return str(given.get("function", given).get("name", ""))
    return {"required": "any", "none": "none"}.get(str(given), "")


def tool_call(choice: Choice) -> dict[str, Any]:
    assert choice.tool is not None
    function = {"name": choice.tool.name, "arguments": choice.tool.arguments}
    return {"id": choice.tool.id, "type": "function", "function": function}


def _chat_choice(ask: Ask, choice: Choice, index: int) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": choice.text, "refusal": None}
    finish = choice.finish
    if choice.tool is not None:
        message["content"] = None
        call = tool_call(choice)
        if ask.options.get("legacy"):
            message["function_call"] = call["function"]
            finish = "function_call"
        else:
            message["tool_calls"] = [call]
    return {"index": index, "message": message, "logprobs": None, "finish_reason": finish}


def _text_choice(choice: Choice, index: int) -> dict[str, Any]:
    return {"index": index, "text": choice.text, "logprobs": None, "finish_reason": choice.finish}


def _usage(reply: Reply) -> dict[str, Any]:
    usage: dict[str, Any] = {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.completion_tokens,
        "total_tokens": reply.prompt_tokens + reply.completion_tokens,
    }
    if reply.cached_tokens:
        usage["prompt_tokens_details"] = {"cached_tokens": reply.cached_tokens}
    return usage
