"""One request to SmolLM2: from OpenAI's words to llama.cpp's, and back.

A pure translation around one call of the runtime: it runs in the thread that calls `run`, and hands
each chunk to whoever wants it. What the model cannot do is refused with the parameter's name.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from forebay.errors import GatewayError, InvalidRequest, ProviderError
from forebay.providers.tool_calls import Tools, said_call

CHAT_MODEL = "smollm2-135m"

CHAT_TOKENS_DEFAULT = 512
TEXT_TOKENS_DEFAULT = 16  # OpenAI's default for /v1/completions
CHOICES_MAX = 8
TEMPERATURE_DEFAULT = 0.0  # at the model card's 0.2 it is wrong about France half of the time
TOP_P_DEFAULT = 0.9

# Where the caller gives no system message. With the template's own ("… named SmolLM, trained by
# Hugging Face") the model answers plain questions in broken French.
_SYSTEM = "You are a helpful AI assistant. Answer in English, briefly and correctly."

_SAMPLED = frozenset(
    {
        *("temperature", "top_p", "max_tokens", "max_completion_tokens", "stop", "seed", "n"),
        *("presence_penalty", "frequency_penalty", "logit_bias"),
    }
)
_WITHOUT_EFFECT = frozenset(
    {
        *("model", "stream", "stream_options", "user", "metadata", "store", "service_tier"),
        *("safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
        *("prompt_cache_options", "parallel_tool_calls"),
    }
)
CHAT_PARAMS = _SAMPLED | {"messages", "tools", "tool_choice", "response_format"}
CHAT_PARAMS |= {"logprobs", "top_logprobs"}
TEXT_PARAMS = _SAMPLED | {"prompt", "echo"}

Emit = Callable[[Any], None]


class Generation:
    """One request in llama.cpp's words, and what it generates in OpenAI's.

    Several choices (`n`, or several prompts) are generated one after the other. Setting `stopped`
    ends it at the next token.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        body = {name: value for name, value in body.items() if value is not None}
        self.stopped = False
        self._is_text = "messages" not in body
        _refuse_unsupported(body, TEXT_PARAMS if self._is_text else CHAT_PARAMS)
        self._tools = Tools.of(body)
        self._ask = _sampling(body, self._is_text, self._tools)
        self._seed: int | None = body.get("seed")
        self._n = _number(body, "n", CHOICES_MAX) or 1
        self._alternatives: int = body.get("top_logprobs", 0)
        self._include_usage = bool(body.get("stream_options", {}).get("include_usage"))
        self._echo = bool(body.get("echo"))
        self._prompts = (
            _prompts(body["prompt"])
            if self._is_text
            else [_messages(body["messages"], self._tools)]
        )
        self._head = {
            "id": ("cmpl-" if self._is_text else "chatcmpl-") + uuid.uuid4().hex,
            "object": "text_completion" if self._is_text else "chat.completion.chunk",
            "created": int(time.time()),
            "model": CHAT_MODEL,
        }
        self._prompt_tokens = 0
        self._completion_tokens = 0

    def run(self, server: Any, emit: Emit) -> None:
        """Generate in the calling thread, handing each chunk to `emit`."""
        index = 0
        for prompt in self._prompts:
            for nth in range(self._n):
                if not self.stopped:
                    self._choice(server, prompt, index, emit, counts_prompt=nth == 0)
                index += 1
        if self._include_usage and not self.stopped:
            usage = {
                "prompt_tokens": self._prompt_tokens,
                "completion_tokens": self._completion_tokens,
                "total_tokens": self._prompt_tokens + self._completion_tokens,
            }
            emit({**self._head, "choices": [], "usage": usage})

    def _choice(
        self, server: Any, prompt: Any, index: int, emit: Emit, *, counts_prompt: bool
    ) -> None:
        ask = {**self._ask, "prompt" if self._is_text else "messages": prompt}
        if self._seed is not None:
            ask["seed"] = (self._seed + index) % 2**32
        say = _Text(self._head, index, emit) if self._is_text else self._speech(index, emit)
        if self._echo:
            say.part(prompt, None, None)
        trouble: list[GatewayError] = []
        usage: dict[str, int] = {}
        finished = False

        def take(chunk: dict[str, Any]) -> bool:
            # Whatever is raised in here would be swallowed by llama.cpp.
            nonlocal finished
            try:
                if "error" in chunk:
                    raise _refused(chunk["error"])
                usage.update(chunk.get("usage") or {})
                for choice in chunk.get("choices") or ():
                    text = choice["text"] if self._is_text else choice["delta"].get("content")
                    finish_reason = choice["finish_reason"]
                    finished = finished or finish_reason is not None
                    say.part(text or "", self._logprobs(choice), finish_reason)
            except GatewayError as error:
                trouble.append(error)
            except Exception as error:  # noqa: BLE001 - raised again by the caller
                trouble.append(ProviderError(f"{CHAT_MODEL} failed: {error}", provider="local"))
            return self.stopped or bool(trouble)

        handle = server.handle_completions if self._is_text else server.handle_chat_completions
        try:
            handle(ask, take)
        except ValueError as error:  # how the bindings report a request they cannot read
            raise InvalidRequest(str(error), model=CHAT_MODEL, provider="local") from None
        if trouble:
            raise trouble[0]
        if not finished and not self.stopped:
            raise ProviderError(f"{CHAT_MODEL} broke off its answer", provider="local")
        if counts_prompt:
            self._prompt_tokens += usage.get("prompt_tokens", 0)
        self._completion_tokens += usage.get("completion_tokens", 0)

    def _speech(self, index: int, emit: Emit) -> _Speech:
        return _Speech(self._head, index, emit, self._tools)

    def _logprobs(self, choice: Mapping[str, Any]) -> dict[str, Any] | None:
        """A chunk's log probabilities with as many alternatives as were asked for."""
        if not choice.get("logprobs"):
            return None
        tokens = []
        for token in choice["logprobs"]["content"]:
            others = [_without_id(other) for other in token["top_logprobs"][: self._alternatives]]
            tokens.append({**_without_id(token), "top_logprobs": others})
        return {"content": tokens, "refusal": None}


class _Text:
    """One choice of a text completion, as chunks."""

    def __init__(self, head: dict[str, Any], index: int, emit: Emit) -> None:
        self._head, self._index, self._emit = head, index, emit

    def part(self, text: str, logprobs: Any, finish_reason: str | None) -> None:
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        self._emit({**self._head, "choices": [choice]})


class _Speech:
    """One choice of a chat, as chunks; text that is a tool call, or may become one, is held."""

    def __init__(self, head: dict[str, Any], index: int, emit: Emit, tools: Tools | None) -> None:
        self._head, self._index, self._emit, self._tools = head, index, emit, tools
        self._held = ""
        self._holding = tools is not None
        self._chunk({"role": "assistant", "content": ""})

    def part(self, text: str, logprobs: Any, finish_reason: str | None) -> None:
        if self._holding:
            self._held += text
            text = ""
            if self._tools is not None and not self._tools.may_be_call(self._held):
                text, self._holding = self._held, False
        if finish_reason is None:
            if text:
                self._chunk({"content": text}, None, logprobs)
            return
        call = self._tools.call(self._held) if self._holding and self._tools else None
        if call is not None:
            self._chunk({"tool_calls": [{"index": 0, **call}]})
            finish_reason = "tool_calls" if finish_reason == "stop" else finish_reason
        elif self._holding:
            text = self._held
        if text:
            self._chunk({"content": text}, None, logprobs)
        self._chunk({}, finish_reason)

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
    ) -> None:
        choice = {
            "index": self._index,
            "delta": delta,
            "logprobs": logprobs,
            "finish_reason": finish_reason,
        }
        self._emit({**self._head, "choices": [choice]})


def _without_id(token: Mapping[str, Any]) -> dict[str, Any]:
    return {name: token[name] for name in ("token", "logprob", "bytes")}


def _refuse_unsupported(body: Mapping[str, Any], supported: frozenset[str]) -> None:
    for name in body:
        if name not in supported and name not in _WITHOUT_EFFECT:
            raise _unsupported(name, f"{name} is")


def _unsupported(param: str, what: str) -> InvalidRequest:
    verb = "" if what.endswith(" is") else " are"
    return InvalidRequest.about(
        param, f"{what}{verb} not supported by {CHAT_MODEL}", model=CHAT_MODEL, provider="local"
    )


def _number(body: Mapping[str, Any], name: str, most: int | None = None) -> int | None:
    """A whole number of at least 1 from the body, None where there is none."""
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InvalidRequest.about(name, f"{name} must be a whole number of at least 1")
    if most is not None and value > most:
        raise InvalidRequest.about(name, f"{name} is at most {most} for {CHAT_MODEL}")
    return value


def _sampling(body: Mapping[str, Any], is_text: bool, tools: Tools | None) -> dict[str, Any]:
    """The request without prompt, messages and seed, in llama.cpp's words."""
    tokens = _number(body, "max_completion_tokens") or _number(body, "max_tokens")
    temperature = body.get("temperature", TEMPERATURE_DEFAULT)
    ask: dict[str, Any] = {
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": tokens or (TEXT_TOKENS_DEFAULT if is_text else CHAT_TOKENS_DEFAULT),
        "temperature": temperature,
        "top_p": body.get("top_p", TOP_P_DEFAULT),
        # A prompt read partly from the cache is added up in another order; for a caller who
        # counts on the same answer it is read whole.
        "cache_prompt": body.get("temperature") != 0 and "seed" not in body,
    }
    stop = body.get("stop", "")
    if not isinstance(stop, str) and not all(isinstance(one, str) for one in stop):
        raise InvalidRequest.about("stop", "stop must be a text or a list of texts")
    for name in ("stop", "presence_penalty", "frequency_penalty", "logit_bias"):
        if name in body:
            ask[name] = body[name]
    if "response_format" in body:
        ask["response_format"] = body["response_format"]
    if body.get("logprobs"):
        ask["logprobs"] = True
        ask["top_logprobs"] = max(1, body.get("top_logprobs", 0))
    if tools is not None and tools.forced:
        call = {"name": "call", "schema": tools.schema()}
        ask["response_format"] = {"type": "json_schema", "json_schema": call}
    return ask


def _prompts(prompt: Any) -> list[str]:
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list) or not prompts:
        raise InvalidRequest.about("prompt", "prompt must be a text or a list of texts")
    if not all(isinstance(one, str) for one in prompts):
        raise _unsupported("prompt", "prompts of token numbers")
    return prompts


def _messages(messages: Any, tools: Tools | None) -> list[dict[str, str]]:
    """The chat as the model's template knows it: roles with plain text."""
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest.about("messages", "messages must be a list of messages")
    told: list[dict[str, str]] = []
    for place, message in enumerate(messages):
        role = message.get("role")
        text = _plain_text(message.get("content"), f"messages[{place}].content")
        if role == "developer":
            role = "system"
        elif role == "assistant" and message.get("tool_calls"):
            text += "".join(said_call(call) for call in message["tool_calls"])
        elif role in ("tool", "function"):
            role, text = "user", f"The function answered: {text}"
        told.append({"role": str(role), "content": text})
    if told[0]["role"] != "system":
        told.insert(0, {"role": "system", "content": _SYSTEM})
    if tools is not None:
        told[0]["content"] += "\n\n" + tools.described()
    return told


def _plain_text(content: Any, param: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if part.get("type") != "text":
            raise _unsupported(param, "parts other than text")
        texts.append(part["text"])
    return "\n".join(texts)


def _refused(error: Mapping[str, Any]) -> GatewayError:
    """llama.cpp's error object as an error of ours."""
    message, kind = str(error.get("message", "unknown error")), error.get("type")
    where: dict[str, Any] = {"model": CHAT_MODEL, "provider": "local"}
    if kind == "exceed_context_size_error":
        return InvalidRequest(message, code="context_length_exceeded", **where)
    if error.get("code") == 400 or kind == "invalid_request_error":
        return InvalidRequest(message, **where)
    return ProviderError(message, **where)


def whole(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """The answer that a stream's chunks amount to, in the route's plain shape."""
    head = {name: value for name, value in chunks[0].items() if name != "choices"}
    is_text = head["object"] == "text_completion"
    if not is_text:
        head["object"] = "chat.completion"
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for part in chunk["choices"]:
            choice = choices.setdefault(
                part["index"], {"texts": [], "calls": [], "logprobs": [], "finish_reason": None}
            )
            delta = part.get("delta", {})
            choice["texts"].append((part.get("text") if is_text else delta.get("content")) or "")
            choice["calls"] += delta.get("tool_calls", ())
            choice["logprobs"] += (part.get("logprobs") or {}).get("content") or ()
            choice["finish_reason"] = part["finish_reason"] or choice["finish_reason"]
    return {
        **head,
        "choices": [
            _whole_choice(index, choice, is_text) for index, choice in sorted(choices.items())
        ],
        "usage": chunks[-1]["usage"],
    }


def _whole_choice(index: int, choice: dict[str, Any], is_text: bool) -> dict[str, Any]:
    text = "".join(choice["texts"])
    logprobs = {"content": choice["logprobs"]} if choice["logprobs"] else None
    end = {"logprobs": logprobs, "finish_reason": choice["finish_reason"]}
    if is_text:
        return {"index": index, "text": text, **end}
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if choice["calls"]:
        message["content"] = text or None
        message["tool_calls"] = [
            {name: value for name, value in call.items() if name != "index"}
            for call in choice["calls"]
        ]
    return {"index": index, "message": message, **end}
