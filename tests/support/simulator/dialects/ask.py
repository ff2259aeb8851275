"""What every dialect reads into and writes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import orjson
from numpy.typing import NDArray

from tests.support.simulator import truth
from tests.support.simulator.script import Behaviour

EVENT_STREAM = b"text/event-stream; charset=utf-8"
TOOL_PHRASES = ("use the tool", "call the tool", "use a tool", "call a tool")


class Request(NamedTuple):
    """One HTTP request; header names in lower case."""

    method: bytes
    path: str
    query: str
    headers: dict[bytes, bytes]
    body: bytes
    bytes_in: int
    keep_alive: bool


class BadAsk(Exception):
    """The request is one that the real provider refuses."""

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    parameters: Mapping[str, Any]


@dataclass(slots=True)
class Ask:
    """One request, whatever its wire format. `prompts` for text, `texts` for vectors.

    `forced`: "" the model may call a tool, "none" it may not, "any" it must, else the tool's name.
    `texts_tokens` is given where texts came as token numbers; `stream_type` is the stream's
    content type.
    """

    route: str
    model: str
    prompts: Sequence[str] = ()
    texts: Sequence[str] = ()
    texts_tokens: Sequence[int] | None = None
    context: str = ""
    choices: int = 1
    stream: bool = False
    stream_type: bytes = EVENT_STREAM
    max_tokens: int | None = None
    tools: Sequence[Tool] = ()
    forced: str = ""
    after_tool: bool = False
    json_answer: bool = False
    echo_prompt: bool = False
    dimensions: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """Where words for the simulator may stand: the last user message, or all texts."""
        source = self.texts or self.prompts
        return source[0] if len(source) == 1 else "\n".join(source)


class ToolCall(NamedTuple):
    id: str
    name: str
    arguments: str


@dataclass(slots=True)
class Choice:
    """One answer. `pieces` joined are `text`; a tool call takes the text's place."""

    text: str
    pieces: list[str]
    finish: str
    tool: ToolCall | None = None


@dataclass(slots=True)
class Reply:
    """The answer to an Ask and what it costs. `usage` False: the provider forgets to say.

    `cached_tokens` of the prompt came from a cache, `written_tokens` of it went into one.
    """

    id: str
    created: int
    choices: list[Choice]
    prompt_tokens: int
    completion_tokens: int
    usage: bool = True
    vectors: NDArray[np.float32] | None = None
    cached_tokens: int = 0
    written_tokens: int = 0


class Frame(NamedTuple):
    """One chunk of a stream and how many tokens of the answer it carries."""

    data: bytes
    tokens: int = 0


class Dialect(Protocol):
    """A wire format. `read` raises BadAsk; the rest is pure rendering."""

    request_id_header: bytes

    def read(self, route: str, request: Request, body: dict[str, Any]) -> Ask: ...

    def answer(self, ask: Ask, reply: Reply) -> bytes: ...

    def frames(self, ask: Ask, reply: Reply) -> list[Frame]: ...

    def error(
        self, status: int, message: str, param: str | None, code: str | None, wait_s: float | None
    ) -> bytes: ...


def field_str(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise BadAsk(f"you must provide a {name} parameter", param=name)
    return value


def field_int(body: Mapping[str, Any], *names: str, least: int = 1) -> int | None:
    for name in names:
        value = body.get(name)
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise BadAsk(f"{name}: {value!r} is not an integer of at least {least}", param=name)
        return value
    return None


def flatten(content: Any) -> str:
    """The text of a message: a string, or the text parts of a list of parts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return ""


def check_texts(
    texts: Sequence[str], counts: Sequence[int], *, each_max: int, all_max: int, texts_max: int
) -> None:
    """OpenAI's bounds on a list of texts; one bad text refuses the whole list."""
    if not texts:
        raise BadAsk("'$.input' is invalid: the list is empty", param="input")
    if len(texts) > texts_max:
        raise BadAsk(
            f"'$.input' is invalid: at most {texts_max} texts, not {len(texts)}", param="input"
        )
    if any(not text for text in texts):
        raise BadAsk("'$.input' is invalid: a text is empty", param="input")
    longest = max(counts)
    if longest > each_max:
        raise BadAsk(
            f"This model's maximum context length is {each_max} tokens, however you requested "
            f"{longest} tokens ({longest} in your prompt; 0 for the completion). "
            "Please reduce your prompt; or completion length."
        )
    if sum(counts) > all_max:
        raise BadAsk(
            f"Requested {sum(counts)} tokens, max {all_max} tokens per request",
            code="max_tokens_per_request",
        )


def compose(ask: Ask, behaviour: Behaviour, reply_id: str, created: int, n: int) -> Reply:
    """The right answer to an Ask, under a Behaviour. `n` makes ids of tool calls unique."""
    usage = behaviour.usage == "honest"
    if ask.texts:
        counts = ask.texts_tokens
        total = sum(truth.count_tokens(t) for t in ask.texts) if counts is None else sum(counts)
        dimensions = ask.dimensions or behaviour.dims or truth.dimensions_of(ask.model)
        rows = truth.vectors(ask.texts, dimensions)
        return Reply(reply_id, created, [], total, 0, usage, rows)
    choices = [
        _choice(ask, behaviour, prompt, i, n) for prompt in ask.prompts for i in range(ask.choices)
    ]
    prompt_tokens = sum(truth.count_tokens(prompt) for prompt in ask.prompts)
    if ask.context:
        prompt_tokens += truth.count_tokens(ask.context)
    completion_tokens = sum(len(choice.pieces) for choice in choices)
    return Reply(reply_id, created, choices, prompt_tokens, completion_tokens, usage)


def _choice(ask: Ask, behaviour: Behaviour, prompt: str, index: int, n: int) -> Choice:
    tool = _tool(ask, behaviour, prompt)
    if tool is not None:
        arguments = orjson.dumps(truth.tool_arguments(tool.parameters, prompt)).decode()
        call = ToolCall(f"call_{n:08x}{index:04x}", tool.name, arguments)
        return Choice("", truth.pieces(arguments), "tool_calls", call)
    if behaviour.echo:
        text = prompt
    elif behaviour.answer is not None:
        text = behaviour.answer
    else:
        asked = prompt if index == 0 else f"{prompt}#{index}"
        text = truth.answer_text(asked, behaviour.tokens or truth.ANSWER_TOKENS)
    if ask.json_answer:
        text = orjson.dumps({"answer": text}).decode()
    if ask.echo_prompt:
        text = prompt + text
    found = truth.pieces(text)
    if ask.max_tokens is not None and len(found) > ask.max_tokens:
        found = found[: ask.max_tokens]
        return Choice("".join(found), found, "length")
    return Choice(text, found, "stop")


def _tool(ask: Ask, behaviour: Behaviour, prompt: str) -> Tool | None:
    """The tool to call: the script's, the request's forced one, or one the prompt asks for."""
    if ask.after_tool or ask.route == "completions":
        return None
    if behaviour.tool is not None:
        named = [tool for tool in ask.tools if tool.name == behaviour.tool] or list(ask.tools)[:1]
        return named[0] if named else Tool(behaviour.tool or "simulated", {})
    if not ask.tools or ask.forced == "none":
        return None
    if ask.forced and ask.forced != "any":
        return next((tool for tool in ask.tools if tool.name == ask.forced), ask.tools[0])
    lowered = prompt.lower()
    if ask.forced == "any" or any(phrase in lowered for phrase in TOOL_PHRASES):
        return next((tool for tool in ask.tools if tool.name in prompt), ask.tools[0])
    return None
