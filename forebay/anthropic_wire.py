"""Anthropic's Messages API in OpenAI's words: requests one way, answers and errors the other.

Rule 1: pure translation. It asks no table and waits for nothing; any upstream can answer.
Rule 2: what has no counterpart is refused with the path of the field as the caller wrote it, never
        dropped and never repeated. Hints that change no answer (`cache_control` where OpenAI's
        shape has no place for it, citations of earlier turns) are the exception.
Rule 3: a parameter that OpenAI's API does not know travels on, and the group's `allowed_params`
        decide about it: `top_k` and `thinking` pass where every deployment is a Claude.
Rule 4: one content block is open at a time. Pieces that cannot be told apart are an error.

Source: Anthropic's API reference, version 2023-06-01, and what its official client parses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from forebay.errors import GatewayError, InvalidRequest, ResponseValidationError
from forebay.schemas import parameters
from forebay.tally import BYTES_PER_TOKEN

USER_ID_CHARS_MAX = 1024
STOP_SEQUENCES_MAX = 64
"""Both as for `user` and `stop` on OpenAI's route."""

_REQUIRED = ("model", "max_tokens", "messages")
_SAME = frozenset(("model", "max_tokens", "stream", "temperature", "top_p"))
"""Called the same in both APIs, so the pipeline's own check names them rightly."""

_MEDIA = ("image/jpeg", "image/png", "image/gif", "image/webp")
_EFFORTS = ("low", "medium", "high", "xhigh", "max")
_TIERS = {"auto": None, "standard_only": "default"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none", "tool": None}
_STOPS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
    "refusal": "refusal",
}
_ERROR_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_NOT_IN_AN_ID = re.compile(r"[^A-Za-z0-9_-]+")

JsonObject = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A Messages request, translated: the chat request, and what the way back needs to know."""

    body: JsonObject
    stop: tuple[str, ...] = ()
    thinking: bool = False

    @property
    def stream(self) -> bool:
        return self.body.get("stream") is True


# --- requests ---------------------------------------------------------------------------------


def asked(body: JsonObject) -> Asked:
    """The chat request that stands for the Messages request `body`, which is only read.

    Raises:
        InvalidRequest: 400; `param` is the field's path, such as `messages[0].content[1].source`.
    """
    for name in _REQUIRED:
        _required(body, name)
    given = {name: value for name, value in body.items() if value is not None}
    thinking = "thinking" in given and _kind(given["thinking"], "thinking") != "disabled"
    if not thinking:
        given.pop("thinking", None)
    chat: JsonObject = {
        "messages": [
            *_system(given.get("system"), "system"),
            *_turns(given["messages"], thinking=thinking),
        ]
    }
    for name, value in given.items():
        if name in _SAME:
            chat[name] = value
        elif name in _TRANSLATED:
            chat.update(_TRANSLATED[name](value, name))
        elif name not in _ELSEWHERE:
            if name in parameters("chat"):  # of OpenAI's route only
                raise _unknown(name)
            chat[name] = value
    return Asked(chat, tuple(chat.get("stop", ())), thinking)


def _system(value: Any, at: str) -> list[JsonObject]:
    """A system prompt, a text or text blocks, as a system message; none for an empty one."""
    if value is None or value in ("", []):
        return []
    return [{"role": "system", "content": _said(value, at, _TEXT_ONLY)}]


def _turns(value: Any, *, thinking: bool) -> Iterator[JsonObject]:
    """Messages: one of Anthropic's may be several of OpenAI's, for each tool result has its own."""
    if not _list(value, "messages"):
        raise _wrong("messages", "'messages' must not be empty.")
    for turn, at in _items(value, "messages"):
        _only(_object(turn, at), ("role", "content"), at)
        role, content = _required(turn, "role", at), _required(turn, "content", at)
        here = f"{at}.content"
        if role == "user":
            yield from _user(content, here)
        elif role == "assistant":
            yield _assistant(content, here, thinking=thinking)
        elif role == "system":
            yield from _system(content, here)
        else:
            raise _none_of(f"{at}.role", ("user", "assistant", "system"))


def _user(content: Any, at: str) -> Iterator[JsonObject]:
    if isinstance(content, str):
        yield {"role": "user", "content": content}
        return
    if not _list(content, at):
        raise _wrong(at, f"'{at}' must not be empty.")
    parts: list[JsonObject] = []
    for block, here in _items(content, at):
        if _kind(block, here) == "tool_result":
            yield _tool_result(block, here)  # OpenAI wants them right behind the calls
        else:
            parts.append(_part(block, here, _FROM_USERS))
    if parts:
        yield {"role": "user", "content": _plainest(parts)}


def _assistant(content: Any, at: str, *, thinking: bool) -> JsonObject:
    if isinstance(content, str):
        return {"role": "assistant", "content": content}
    parts: list[JsonObject] = []
    calls: list[JsonObject] = []
    thoughts: list[JsonObject] = []
    for block, here in _items(content, at):
        kind = _kind(block, here)
        if kind == "tool_use":
            calls.append(_tool_use(block, here))
        elif kind in ("thinking", "redacted_thinking"):
            thoughts.append(_thought(block, here, kind))
        else:
            parts.append(_part(block, here, _TEXT_ONLY))
    message: JsonObject = {"role": "assistant", "content": "" if not calls else None}
    if any("cache_control" in part for part in parts):
        message["content"] = parts
    elif parts:
        message["content"] = "".join(part["text"] for part in parts)
    if calls:
        message["tool_calls"] = calls
    if thoughts and thinking:  # else Anthropic ignores those of earlier turns, and so do we
        message["thinking_blocks"] = thoughts
    return message


def _tool_use(block: JsonObject, at: str) -> JsonObject:
    _only(block, ("type", "id", "name", "input", "cache_control", "caller"), at)
    arguments = _object(_required(block, "input", at), f"{at}.input")
    return {
        "id": _filled(block, "id", at),
        "type": "function",
        "function": {
            "name": _filled(block, "name", at),
            "arguments": orjson.dumps(arguments).decode(),
        },
    }


def _thought(block: JsonObject, at: str, kind: str) -> JsonObject:
    fields = ("data",) if kind == "redacted_thinking" else ("thinking", "signature")
    _only(block, ("type", *fields), at)
    said = {name: _string(_required(block, name, at), f"{at}.{name}") for name in fields}
    return {"type": kind, **said}


def _tool_result(block: JsonObject, at: str) -> JsonObject:
    """A tool message. OpenAI has no mark for a failed call, so its text says it."""
    _only(block, ("type", "tool_use_id", "content", "is_error", "cache_control"), at)
    content = block.get("content")
    if content is None or isinstance(content, str):
        parts: list[JsonObject] = [{"type": "text", "text": content or ""}]
    else:
        here = f"{at}.content"
        parts = [_part(item, place, _FROM_USERS) for item, place in _items(content, here)]
        parts = parts or [{"type": "text", "text": ""}]
    if _flag(block.get("is_error"), f"{at}.is_error"):
        if parts[0]["type"] == "text":
            parts[0]["text"] = f"Error: {parts[0]['text']}"
        else:
            parts.insert(0, {"type": "text", "text": "Error:"})
    parts[-1].update(_marked(block, at))
    call_id = _filled(block, "tool_use_id", at)
    return {"role": "tool", "tool_call_id": call_id, "content": _plainest(parts)}


# --- requests: content parts ------------------------------------------------------------------


def _text(block: JsonObject, at: str) -> JsonObject:
    _only(block, ("type", "text", "citations", "cache_control"), at)
    return {"type": "text", "text": _string(_required(block, "text", at), f"{at}.text")}


def _image(block: JsonObject, at: str) -> JsonObject:
    _only(block, ("type", "source", "cache_control"), at)
    at = f"{at}.source"
    source = _object(block.get("source"), at)
    kind = _kind(source, at)
    if kind == "url":
        _only(source, ("type", "url"), at)
        url = _filled(source, "url", at)
        if not url[:8].casefold().startswith(("https://", "http://")):
            raise _wrong(f"{at}.url", f"'{at}.url' must be an http or https URL.")
    elif kind == "base64":
        url = _data_url(source, at, _MEDIA)
    else:
        raise _none_of(f"{at}.type", ("base64", "url"))
    return {"type": "image_url", "image_url": {"url": url}}


def _document(block: JsonObject, at: str) -> JsonObject:
    _only(block, ("type", "source", "title", "cache_control"), at)
    title = _string(block.get("title") or "", f"{at}.title")
    at = f"{at}.source"
    source = _object(block.get("source"), at)
    kind = _kind(source, at)
    if kind == "text":
        _only(source, ("type", "media_type", "data"), at)
        text = _filled(source, "data", at)
        return {"type": "text", "text": f"{title}\n\n{text}" if title else text}
    if kind == "base64":
        data = _data_url(source, at, ("application/pdf",))
        return {"type": "file", "file": {"file_data": data, "filename": title or "document.pdf"}}
    raise _none_of(f"{at}.type", ("base64", "text"))


def _data_url(source: JsonObject, at: str, media: tuple[str, ...]) -> str:
    _only(source, ("type", "media_type", "data"), at)
    kind = _required(source, "media_type", at)
    if kind not in media:
        raise _none_of(f"{at}.media_type", media)
    return f"data:{kind};base64,{_filled(source, 'data', at)}"


Part = Callable[[JsonObject, str], JsonObject]

_TEXT_ONLY: Mapping[str, Part] = {"text": _text}
_FROM_USERS: Mapping[str, Part] = {"text": _text, "image": _image, "document": _document}


def _part(block: JsonObject, at: str, parts: Mapping[str, Part]) -> JsonObject:
    kind = _kind(block, at)
    if kind not in parts:
        raise _none_of(f"{at}.type", parts)
    return {**parts[kind](block, at), **_marked(block, at)}


def _said(content: Any, at: str, parts: Mapping[str, Part]) -> str | list[JsonObject]:
    if isinstance(content, str):
        return content
    return _plainest([_part(block, here, parts) for block, here in _items(content, at)])


def _plainest(parts: list[JsonObject]) -> str | list[JsonObject]:
    """A text alone as a string, which every upstream takes."""
    text: str | list[JsonObject] = parts
    if len(parts) == 1 and parts[0].keys() == {"type", "text"}:
        text = parts[0]["text"]
    return text


def _marked(block: JsonObject, at: str) -> JsonObject:
    """The block's mark for prompt caching, as LiteLLM takes it on a part."""
    mark = block.get("cache_control")
    if mark is None:
        return {}
    at = f"{at}.cache_control"
    _only(_object(mark, at), ("type", "ttl"), at)
    if mark.get("type") != "ephemeral":
        raise _none_of(f"{at}.type", ("ephemeral",))
    if mark.get("ttl") not in (None, "5m", "1h"):
        raise _none_of(f"{at}.ttl", ("5m", "1h"))
    return {"cache_control": {name: value for name, value in mark.items() if value is not None}}


# --- requests: parameters ---------------------------------------------------------------------


def _stop(value: Any, at: str) -> JsonObject:
    sequences = [_string(item, here) for item, here in _items(value, at)]
    if len(sequences) > STOP_SEQUENCES_MAX:
        raise _wrong(at, f"'{at}' may hold at most {STOP_SEQUENCES_MAX} sequences.")
    return {"stop": sequences} if sequences else {}


def _tools(value: Any, at: str) -> JsonObject:
    tools = [_tool(tool, here) for tool, here in _items(value, at)]
    return {"tools": tools} if tools else {}


def _tool(tool: Any, at: str) -> JsonObject:
    if _object(tool, at).get("type") not in (None, "custom"):
        raise _wrong(
            f"{at}.type",
            f"'{at}.type': tools that the provider itself runs are not supported here; "
            "expected 'custom'.",
        )
    own = ("type", "name", "description", "input_schema", "strict", "cache_control")
    _only(tool, (*own, "eager_input_streaming"), at)
    schema = _object(_required(tool, "input_schema", at), f"{at}.input_schema")
    function: JsonObject = {"name": _filled(tool, "name", at), "parameters": schema}
    if tool.get("description") is not None:
        function["description"] = _string(tool["description"], f"{at}.description")
    if tool.get("strict") is not None:
        function["strict"] = _flag(tool["strict"], f"{at}.strict")
    return {"type": "function", "function": function, **_marked(tool, at)}


def _tool_choice(value: Any, at: str) -> JsonObject:
    _only(_object(value, at), ("type", "name", "disable_parallel_tool_use"), at)
    kind = _kind(value, at)
    if kind not in _CHOICES:
        raise _none_of(f"{at}.type", _CHOICES)
    chosen: JsonObject = {"tool_choice": _CHOICES[kind]}
    if kind == "tool":
        function = {"name": _filled(value, "name", at)}
        chosen["tool_choice"] = {"type": "function", "function": function}
    at = f"{at}.disable_parallel_tool_use"
    if _flag(value.get("disable_parallel_tool_use"), at):
        chosen["parallel_tool_calls"] = False
    return chosen


def _metadata(value: Any, at: str) -> JsonObject:
    _only(_object(value, at), ("user_id",), at)
    user = value.get("user_id")
    if user is None:
        return {}
    at = f"{at}.user_id"
    if len(_string(user, at)) > USER_ID_CHARS_MAX:
        raise _wrong(at, f"'{at}' may be at most {USER_ID_CHARS_MAX} characters long.")
    return {"user": user}


def _output_config(value: Any, at: str) -> JsonObject:
    _only(_object(value, at), ("effort", "format"), at)
    config: JsonObject = {}
    if value.get("effort") is not None:
        if value["effort"] not in _EFFORTS:
            raise _none_of(f"{at}.effort", _EFFORTS)
        config["reasoning_effort"] = value["effort"]
    if value.get("format") is not None:
        at = f"{at}.format"
        wanted = _object(value["format"], at)
        _only(wanted, ("type", "schema"), at)
        if _kind(wanted, at) != "json_schema":
            raise _none_of(f"{at}.type", ("json_schema",))
        schema = _object(_required(wanted, "schema", at), f"{at}.schema")
        named = {"name": "answer", "schema": schema, "strict": True}
        config["response_format"] = {"type": "json_schema", "json_schema": named}
    return config


def _service_tier(value: Any, at: str) -> JsonObject:
    if not isinstance(value, str) or value not in _TIERS:
        raise _none_of(at, _TIERS)
    tier = _TIERS[value]
    return {} if tier is None else {"service_tier": tier}


_TRANSLATED: Mapping[str, Callable[[Any, str], JsonObject]] = {
    "stop_sequences": _stop,
    "tools": _tools,
    "tool_choice": _tool_choice,
    "metadata": _metadata,
    "output_config": _output_config,
    "service_tier": _service_tier,
}
_ELSEWHERE = frozenset(("messages", "system"))


# --- requests: what may be wrong --------------------------------------------------------------


def _wrong(at: str, message: str, code: str = "invalid_value") -> InvalidRequest:
    return InvalidRequest.about(at, message, code=code)


def _none_of(at: str, expected: Iterable[str]) -> InvalidRequest:
    listed = ", ".join(repr(name) for name in expected)
    return _wrong(at, f"Invalid value for '{at}': expected one of {listed}.")


def _unknown(at: str) -> InvalidRequest:
    return _wrong(at, f"Unknown parameter: '{at}'.", "unknown_parameter")


def _mistyped(at: str, expected: str) -> InvalidRequest:
    return _wrong(at, f"Invalid type for '{at}': expected {expected}.", "invalid_type")


def _required(of: JsonObject, name: str, at: str = "") -> Any:
    if of.get(name) is None:
        at = f"{at}.{name}" if at else name
        raise _wrong(at, f"Missing required parameter: '{at}'.", "missing_required_parameter")
    return of[name]


def _only(of: JsonObject, known: Iterable[str], at: str) -> None:
    for name, value in of.items():
        if value is not None and name not in known:
            raise _unknown(f"{at}.{name[:64]}")


def _object(value: Any, at: str) -> JsonObject:
    if not isinstance(value, dict):
        raise _mistyped(at, "an object")
    return value


def _list(value: Any, at: str) -> list[Any]:
    if not isinstance(value, list):
        raise _mistyped(at, "an array")
    return value


def _items(value: Any, at: str) -> Iterator[tuple[Any, str]]:
    """Each item of a list, with its path."""
    return ((item, f"{at}[{index}]") for index, item in enumerate(_list(value, at)))


def _string(value: Any, at: str) -> str:
    if not isinstance(value, str):
        raise _mistyped(at, "a string")
    return value


def _filled(of: JsonObject, name: str, at: str) -> str:
    text = _string(_required(of, name, at), f"{at}.{name}")
    if not text:
        raise _wrong(f"{at}.{name}", f"'{at}.{name}' must not be empty.")
    return text


def _flag(value: Any, at: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise _mistyped(at, "a boolean")
    return bool(value)


def _kind(block: Any, at: str) -> str:
    return _string(_required(_object(block, at), "type", at), f"{at}.type")


# --- answers ----------------------------------------------------------------------------------


def message(answer: JsonObject, asked: Asked, request_id: str) -> JsonObject:
    """A chat completion as a Message.

    Raises:
        ResponseValidationError: 502; a tool call that no client could make, such as one whose
            arguments are no JSON object though the answer was not cut short.
    """
    choice: JsonObject = next(iter(answer.get("choices") or ()), {})
    told: JsonObject = choice.get("message") or {}
    finish = choice.get("finish_reason")
    content: list[JsonObject] = []
    if asked.thinking:
        content += _thoughts(told)
    content += [{"type": "text", "text": text} for text in _texts(told)]
    calls = told.get("tool_calls") or ()
    message_id = _message_id(answer.get("id"), request_id)
    for number, call in enumerate(calls):
        content.append(_called(call, message_id, number, cut=finish == "length"))
    refused = bool(told.get("refusal"))
    reason, sequence = _stopped(choice, asked, called=bool(calls), refused=refused)
    return {
        **_head(message_id, answer.get("model"), content, _usage(answer.get("usage"))),
        "stop_reason": reason,
        "stop_sequence": sequence,
    }


class Events:
    """A stream of chat chunks as the events of a Message, in Anthropic's order.

    Owns the state of one stream: which content block is open. Bounded by the number of tool calls
    in the answer, whose ids it keeps. Failure behaviour: pieces of a tool call that is not the open
    one, or that has no name, raise ResponseValidationError; nothing is ever put into the wrong
    block. What the provider's own failure looks like is not decided here.
    """

    def __init__(self, asked: Asked, request_id: str) -> None:
        self._asked = asked
        self._request_id = request_id
        self._message_id: str | None = None
        self._block = -1
        self._open: str | None = None
        self._call: tuple[int, str] | None = None  # the open one's index and id upstream
        self._calls: set[str] = set()
        self._refused = False
        self._choice: JsonObject = {}
        self._usage: JsonObject | None = None
        self._said_bytes = 0

    def add(self, chunk: JsonObject) -> Iterator[JsonObject]:
        """The events that one chunk makes."""
        yield from self._begin(chunk)
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            if choice.get("index"):
                continue  # only one answer was asked for
            delta: JsonObject = choice.get("delta") or {}
            if self._asked.thinking:
                yield from self._think(delta)
            self._refused = self._refused or bool(delta.get("refusal"))
            for text in _texts(delta):
                yield from self._switch("text", {"type": "text", "text": ""})
                yield self._delta({"type": "text_delta", "text": text}, text)
            for piece in delta.get("tool_calls") or ():
                yield from self._piece(piece)
            for name in ("finish_reason", "stop_reason"):
                if choice.get(name) is not None:
                    self._choice[name] = choice[name]

    def end(self) -> Iterator[JsonObject]:
        """The events that close the message."""
        yield from self._begin({})
        yield from self._close()
        called = bool(self._calls)
        reason, sequence = _stopped(self._choice, self._asked, called=called, refused=self._refused)
        usage = _usage(self._usage)
        if self._usage is None:
            usage["output_tokens"] = -(-self._said_bytes // BYTES_PER_TOKEN)
            usage["estimated"] = True
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        yield {"type": "message_delta", "delta": delta, "usage": usage}
        yield {"type": "message_stop"}

    def _begin(self, chunk: JsonObject) -> Iterator[JsonObject]:
        if self._message_id is not None:
            return
        self._message_id = _message_id(chunk.get("id"), self._request_id)
        # What the prompt took is known at the end; the last event's totals overwrite these.
        head = _head(self._message_id, chunk.get("model"), [], _usage(None))
        message = {**head, "stop_reason": None, "stop_sequence": None}
        yield {"type": "message_start", "message": message}

    def _think(self, delta: JsonObject) -> Iterator[JsonObject]:
        for block in _thoughts(delta):
            if block["type"] == "redacted_thinking":
                yield from self._close()
                yield from self._switch("redacted_thinking", block)
                continue
            empty = {"type": "thinking", "thinking": "", "signature": ""}
            yield from self._switch("thinking", empty)
            if thinking := block["thinking"]:
                yield self._delta({"type": "thinking_delta", "thinking": thinking}, thinking)
            if signature := block["signature"]:
                yield self._delta({"type": "signature_delta", "signature": signature})
                yield from self._close()  # it signs a whole block

    def _piece(self, piece: JsonObject) -> Iterator[JsonObject]:
        """A piece of a tool call. Some providers give every call the index 0, others none."""
        function: JsonObject = piece.get("function") or {}
        index, given = piece.get("index") or 0, piece.get("id")
        if self._call is None or self._call[0] != index or given not in (None, "", self._call[1]):
            name = function.get("name")
            if not name:
                raise ResponseValidationError(
                    "the provider sent a piece of a tool call that is not the one at hand"
                )
            call_id = given or _made_up_id(self._message_id, len(self._calls))
            if call_id in self._calls:
                raise ResponseValidationError("the provider sent its tool calls interleaved")
            self._calls.add(call_id)
            yield from self._close()
            block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
            yield from self._switch("tool_use", block)
            self._call = index, call_id
        if arguments := function.get("arguments"):
            delta = {"type": "input_json_delta", "partial_json": arguments}
            yield self._delta(delta, arguments)

    def _switch(self, kind: str, block: JsonObject) -> Iterator[JsonObject]:
        """Have a block of this kind open: the one that is, or `block`."""
        if self._open == kind:
            return
        yield from self._close()
        self._open = kind
        self._block += 1
        yield {"type": "content_block_start", "index": self._block, "content_block": block}
        if self._block == 0:
            yield {"type": "ping"}

    def _close(self) -> Iterator[JsonObject]:
        if self._open is not None:
            self._open = self._call = None
            yield {"type": "content_block_stop", "index": self._block}

    def _delta(self, delta: JsonObject, said: str = "") -> JsonObject:
        self._said_bytes += len(said.encode())
        return {"type": "content_block_delta", "index": self._block, "delta": delta}


def _head(message_id: str, model: Any, content: list[JsonObject], usage: JsonObject) -> JsonObject:
    return {
        "id": message_id,
        "type": "message",
        "role": "assistant",
        "model": model or "",
        "content": content,
        "usage": usage,
    }


def _message_id(given: Any, request_id: str) -> str:
    """`msg_` and the provider's id, so that the same answer has the same id on every route."""
    name = given if isinstance(given, str) and given else request_id
    plain = _NOT_IN_AN_ID.sub("_", name.removeprefix("chatcmpl-"))
    return plain if plain.startswith("msg_") else f"msg_{plain}"


def _made_up_id(message_id: str | None, number: int) -> str:
    return f"toolu_{(message_id or '').removeprefix('msg_')}_{number}"


def _texts(told: JsonObject) -> Iterator[str]:
    """What a message or a delta says: its content, then the words of a refusal."""
    for name in ("content", "refusal"):
        text = told.get(name)
        if isinstance(text, str) and text:
            yield text


def _thoughts(told: JsonObject) -> Iterator[JsonObject]:
    """The thinking in a message or a delta, as LiteLLM and others word it."""
    blocks = told.get("thinking_blocks")
    if not blocks and told.get("reasoning_content"):
        blocks = [{"type": "thinking", "thinking": told["reasoning_content"]}]
    for block in blocks or ():
        if block.get("type") == "redacted_thinking":
            yield {"type": "redacted_thinking", "data": block.get("data") or ""}
        elif block.get("thinking") or block.get("signature"):
            said = {name: block.get(name) or "" for name in ("thinking", "signature")}
            yield {"type": "thinking", **said}


def _called(call: JsonObject, message_id: str, number: int, *, cut: bool) -> JsonObject:
    """A tool call as a tool_use block.

    Arguments that `max_tokens` cut short are no JSON; the stop reason tells, and the input is empty
    as Anthropic's own then may be.
    """
    function: JsonObject = call.get("function") or {}
    name = function.get("name")
    if not name:
        raise ResponseValidationError("the provider called a tool without naming it")
    try:
        arguments = orjson.loads(function.get("arguments") or "{}")
    except orjson.JSONDecodeError:
        arguments = {} if cut else None
    if not isinstance(arguments, dict):
        raise ResponseValidationError(
            f"the provider called the tool {name!r} with arguments that are not a JSON object"
        )
    call_id = call.get("id") or _made_up_id(message_id, number)
    return {"type": "tool_use", "id": call_id, "name": name, "input": arguments}


def _stopped(
    choice: JsonObject, asked: Asked, *, called: bool, refused: bool
) -> tuple[str, str | None]:
    """Why it stopped, and at which stop sequence, where the provider tells (most do not)."""
    reason = _STOPS.get(choice.get("finish_reason") or "stop", "end_turn")
    if reason == "end_turn":
        sequence = choice.get("stop_reason")
        if refused:
            return "refusal", None
        if called:
            return "tool_use", None
        if isinstance(sequence, str) and sequence in asked.stop:
            return "stop_sequence", sequence
    return reason, None


def _usage(usage: JsonObject | None) -> JsonObject:
    """Anthropic counts cached tokens beside the input, OpenAI within it."""
    usage = usage or {}
    prompt = usage.get("prompt_tokens_details") or {}
    read = _first(usage.get("cache_read_input_tokens"), prompt.get("cached_tokens"))
    made = _first(
        usage.get("cache_creation_input_tokens"),
        prompt.get("cache_creation_tokens"),
        prompt.get("cache_write_tokens"),
    )
    told: JsonObject = {
        "input_tokens": max(0, _first(usage.get("prompt_tokens")) - read - made),
        "output_tokens": _first(usage.get("completion_tokens")),
    }
    if made:
        told["cache_creation_input_tokens"] = made
    if read:
        told["cache_read_input_tokens"] = read
    thought = _first((usage.get("completion_tokens_details") or {}).get("reasoning_tokens"))
    if thought:
        told["output_tokens_details"] = {"thinking_tokens": thought}
    if usage.get("estimated"):
        told["estimated"] = True
    return told


def _first(*counts: Any) -> int:
    """The first count that is more than nothing."""
    return next((count for count in counts if isinstance(count, int) and count > 0), 0)


# --- errors -----------------------------------------------------------------------------------


def error_body(error: GatewayError, request_id: str) -> JsonObject:
    """A failure in Anthropic's shape, for a body or for an `error` event."""
    kind = _ERROR_TYPES.get(error.status)
    if kind is None:
        kind = "api_error" if error.status >= 500 else "invalid_request_error"
    failure = {"type": kind, "message": error.message}
    return {"type": "error", "error": failure, "request_id": request_id}
