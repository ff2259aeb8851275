"""Cohere's wire format: v2 chat with its event stream, v1 and v2 embed.

A client that accepts `application/json` and not `text/event-stream` gets a stream of JSON lines
in place of server-sent events. LiteLLM is such a client, and reads nothing else.
"""

from __future__ import annotations

import base64
from typing import Any

import orjson

from tests.support.simulator.dialects.ask import (
    EVENT_STREAM,
    Ask,
    BadAsk,
    Frame,
    Reply,
    Request,
    field_int,
    field_str,
)
from tests.support.simulator.dialects.openai import (
    DONE,
    read_tools,
    split_messages,
    tool_call,
)

TEXTS_MAX = 96
LINES = b"application/stream+json"
_FINISH = {"stop": "COMPLETE", "length": "MAX_TOKENS", "tool_calls": "TOOL_CALL"}


class Cohere:
    """Reads and writes Cohere's bodies."""

    request_id_header = b"x-request-id"

    def read(self, route: str, request: Request, body: dict[str, Any]) -> Ask:
        model = field_str(body, "model")
        if route == "chat_v2":
            return self._read_chat(model, request, body)
        texts = body.get("texts")
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise BadAsk("invalid request: texts must be a list of strings", param="texts")
        if len(texts) > TEXTS_MAX:
            raise BadAsk(
                f"invalid request: total number of texts must be at most {TEXTS_MAX} - "
                f"received {len(texts)}"
            )
        kinds = body.get("embedding_types") or ["float"]
        if not set(kinds) <= {"float", "base64"}:
            raise BadAsk(f"invalid request: the simulator has no embedding_types {kinds}")
        by_type = route == "embed_v2" or "embedding_types" in body
        return Ask(
            "embeddings",
            model,
            texts=texts,
            dimensions=field_int(body, "output_dimension"),
            options={"kinds": kinds, "by_type": by_type, "version": route[-1:]},
        )

    def _read_chat(self, model: str, request: Request, body: dict[str, Any]) -> Ask:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise BadAsk("invalid request: messages must be a non-empty list", param="messages")
        prompt, context = split_messages(messages)
        response_format = body.get("response_format")
        accept = request.headers.get(b"accept", b"")
        lines = b"application/json" in accept and b"event-stream" not in accept
        return Ask(
            "chat_v2",
            model,
            (prompt,),
            context=context,
            stream=body.get("stream") is True,
            stream_type=LINES if lines else EVENT_STREAM,
            max_tokens=field_int(body, "max_tokens"),
            tools=read_tools(body.get("tools") or []),
            forced={"REQUIRED": "any", "NONE": "none"}.get(str(body.get("tool_choice")), ""),
            after_tool=messages[-1].get("role") == "tool",
            json_answer=isinstance(response_format, dict)
            and response_format.get("type") == "json_object",
        )

    def answer(self, ask: Ask, reply: Reply) -> bytes:
        if reply.vectors is not None:
            return self._answer_vectors(ask, reply)
        choice = reply.choices[0]
        message: dict[str, Any] = {"role": "assistant"}
        if choice.tool is None:
            message["content"] = [{"type": "text", "text": choice.text}]
        else:
            message |= {"tool_plan": "", "tool_calls": [tool_call(choice)]}
        finish = _FINISH[choice.finish]
        body = {"id": reply.id, "finish_reason": finish, "message": message, "usage": _usage(reply)}
        return orjson.dumps(body)

    def _answer_vectors(self, ask: Ask, reply: Reply) -> bytes:
        assert reply.vectors is not None
        rows: dict[str, list[Any]] = {}
        for kind in ask.options["kinds"]:
            rows[kind] = list(reply.vectors)
            if kind == "base64":
                raw = [row.astype("<f4").tobytes() for row in rows[kind]]
                rows[kind] = [base64.b64encode(row).decode() for row in raw]
        by_type = ask.options["by_type"]
        body = {
            "id": reply.id,
            "texts": list(ask.texts),
            "embeddings": rows if by_type else rows["float"],
            "response_type": "embeddings_by_type" if by_type else "embeddings_floats",
            "meta": {
                "api_version": {"version": ask.options["version"]},
                "billed_units": {"input_tokens": reply.prompt_tokens} if reply.usage else {},
            },
        }
        return orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)

    def frames(self, ask: Ask, reply: Reply) -> list[Frame]:
        choice = reply.choices[0]
        frames: list[Frame] = []
        lines = ask.stream_type == LINES

        def add(kind: str, delta: dict[str, Any] | None, tokens: int = 0, **more: Any) -> None:
            data = {"type": kind, **more}
            if delta is not None:
                data["delta"] = delta
            written = orjson.dumps(data)
            if lines:
                frames.append(Frame(written + b"\n", tokens))
            else:
                frames.append(Frame(b"event: %b\ndata: %b\n\n" % (kind.encode(), written), tokens))

        message: dict[str, Any] = {
            "role": "assistant",
            "content": [],
            "tool_plan": "",
            "tool_calls": [],
            "citations": [],
        }
        add("message-start", {"message": message}, id=reply.id)
        if choice.tool is None:
            empty = {"content": {"type": "text", "text": ""}}
            add("content-start", {"message": empty}, index=0)
            for piece in choice.pieces:
                add("content-delta", {"message": {"content": {"text": piece}}}, 1, index=0)
            add("content-end", None, index=0)
        else:
            call = tool_call(choice)
            call["function"]["arguments"] = ""
            add("tool-call-start", {"message": {"tool_calls": call}}, index=0)
            for piece in choice.pieces:
                part = {"tool_calls": {"function": {"arguments": piece}}}
                add("tool-call-delta", {"message": part}, 1, index=0)
            add("tool-call-end", None, index=0)
        end = {"finish_reason": _FINISH[choice.finish], "usage": _usage(reply)}
        add("message-end", end, id=reply.id)
        if not lines:
            frames.append(Frame(DONE))
        return frames

    def error(
        self, status: int, message: str, param: str | None, code: str | None, wait_s: float | None
    ) -> bytes:
        return orjson.dumps({"message": message})


def _usage(reply: Reply) -> dict[str, Any]:
    if not reply.usage:
        return {}
    tokens = {"input_tokens": reply.prompt_tokens, "output_tokens": reply.completion_tokens}
    return {"billed_units": tokens, "tokens": tokens}
