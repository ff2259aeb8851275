"""Gemini's wire format: generateContent and embedContent, streamed and batched."""

from __future__ import annotations

from typing import Any

import orjson

from tests.support.simulator.dialects.ask import (
    Ask,
    BadAsk,
    Choice,
    Frame,
    Reply,
    Request,
    Tool,
    field_int,
    flatten,
)

_STATUS = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    500: "INTERNAL",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
_FINISH = {"stop": "STOP", "length": "MAX_TOKENS", "tool_calls": "STOP"}


class Gemini:
    """Reads and writes Gemini's bodies. Field names in camelCase or snake_case, as Google takes."""

    request_id_header = b"x-request-id"

    def read(self, route: str, request: Request, body: dict[str, Any]) -> Ask:
        model = request.path.rpartition("/")[2].partition(":")[0]
        if route == "embed_content":
            return self._read_embeddings(model, [body], single=True)
        if route == "batch_embed_contents":
            return self._read_embeddings(model, body.get("requests"), single=False)
        stream = route == "stream_generate_content"
        if stream and "alt=sse" not in request.query:
            raise BadAsk("the simulator streams with alt=sse only")
        return self._read_generate(model, body, route, stream)

    def _read_generate(self, model: str, body: dict[str, Any], route: str, stream: bool) -> Ask:
        contents = body.get("contents")
        if not isinstance(contents, list) or not contents:
            raise BadAsk("* GenerateContentRequest.contents: contents is not specified")
        turns = [
            (turn.get("role", "user"), turn.get("parts") or [])
            for turn in contents
            if isinstance(turn, dict)
        ]
        texts = [(role, flatten(parts)) for role, parts in turns]
        users = [i for i, (role, text) in enumerate(texts) if role == "user" and text]
        at = users[-1] if users else len(texts) - 1
        system = _either(body, "systemInstruction", "system_instruction")
        context = [flatten(system.get("parts"))] if isinstance(system, dict) else []
        context += [text for i, (_, text) in enumerate(texts) if i != at and text]
        config = _either(body, "generationConfig", "generation_config") or {}
        mime = _either(config, "responseMimeType", "response_mime_type")
        choosing = _either(body, "toolConfig", "tool_config") or {}
        calling = _either(choosing, "functionCallingConfig", "function_calling_config") or {}
        return Ask(
            route,
            model,
            (texts[at][1],),
            context="\n".join(text for text in context if text),
            stream=stream,
            max_tokens=field_int(config, "maxOutputTokens", "max_output_tokens"),
            tools=_tools(body.get("tools")),
            forced={"ANY": "any", "NONE": "none"}.get(str(calling.get("mode", "")).upper(), ""),
            after_tool=any(
                isinstance(part, dict) and _either(part, "functionResponse", "function_response")
                for part in turns[-1][1]
            ),
            json_answer=mime == "application/json",
        )

    def _read_embeddings(self, model: str, requests: Any, *, single: bool) -> Ask:
        if not isinstance(requests, list) or not requests:
            raise BadAsk("* BatchEmbedContentsRequest.requests: requests is not specified")
        texts, dimensions = [], None
        for one in requests:
            content = one.get("content") if isinstance(one, dict) else None
            if not isinstance(content, dict):
                raise BadAsk("* EmbedContentRequest.content: contents is not specified")
            texts.append(flatten(content.get("parts")))
            dimensions = field_int(one, "outputDimensionality", "output_dimensionality")
        options = {"single": single}
        return Ask("embeddings", model, texts=texts, dimensions=dimensions, options=options)

    def answer(self, ask: Ask, reply: Reply) -> bytes:
        if reply.vectors is None:
            choice = reply.choices[0]
            return orjson.dumps(_body(ask, reply, [_part(choice)], _FINISH[choice.finish], None))
        values = [{"values": row} for row in reply.vectors]
        return orjson.dumps(
            {"embedding": values[0]} if ask.options["single"] else {"embeddings": values},
            option=orjson.OPT_SERIALIZE_NUMPY,
        )

    def frames(self, ask: Ask, reply: Reply) -> list[Frame]:
        choice = reply.choices[0]
        if choice.tool is not None:
            body = _body(ask, reply, [_part(choice)], "STOP", None)
            return [Frame(_sse(body), len(choice.pieces))]
        last = len(choice.pieces) - 1
        frames = []
        for i, piece in enumerate(choice.pieces):
            finish = _FINISH[choice.finish] if i == last else None
            frames.append(Frame(_sse(_body(ask, reply, [{"text": piece}], finish, i + 1)), 1))
        return frames

    def error(
        self, status: int, message: str, param: str | None, code: str | None, wait_s: float | None
    ) -> bytes:
        name = code or _STATUS.get(status, "UNKNOWN")
        detail: dict[str, Any] = {"code": status, "message": message, "status": name}
        if wait_s is not None:
            retry = {"@type": "type.googleapis.com/google.rpc.RetryInfo"}
            detail["details"] = [{**retry, "retryDelay": f"{wait_s:g}s"}]
        return orjson.dumps({"error": detail})


def _either(body: dict[str, Any], camel: str, snake: str) -> Any:
    return body.get(camel, body.get(snake))


def _tools(given: Any) -> list[Tool]:
    tools = []
    for group in given if isinstance(given, list) else []:
        declared = _either(group, "functionDeclarations", "function_declarations")
        for function in declared or []:
            parameters = function.get("parameters") or {}
            tools.append(Tool(str(function.get("name", "")), parameters))
    return tools


def _part(choice: Choice) -> dict[str, Any]:
    if choice.tool is None:
        return {"text": choice.text}
    arguments = orjson.loads(choice.tool.arguments)
    return {"functionCall": {"name": choice.tool.name, "args": arguments}}


def _body(
    ask: Ask, reply: Reply, parts: list[dict[str, Any]], finish: str | None, so_far: int | None
) -> dict[str, Any]:
    candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": 0}
    if finish is not None:
        candidate["finishReason"] = finish
    body: dict[str, Any] = {"candidates": [candidate]}
    if reply.usage:
        completion = reply.completion_tokens if so_far is None else so_far
        body["usageMetadata"] = {
            "promptTokenCount": reply.prompt_tokens,
            "candidatesTokenCount": completion,
            "totalTokenCount": reply.prompt_tokens + completion,
        }
    return {**body, "modelVersion": ask.model, "responseId": reply.id}


def _sse(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\r\n\r\n"
