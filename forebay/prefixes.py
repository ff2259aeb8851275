"""The beginnings of a prompt by which it is known again, and where a provider's marks may stand.

Rule 1: everything is hashed in the order in which models read it (tools, messages), with the
        tenant in front: no tenant's prompt is ever known by another's.
Rule 2: two prompts share a digest exactly where they are the same up to it.
Rule 3: only reading and hashing here; what was seen before is known elsewhere.

*Edges* are the ends of a prompt's blocks (its tools, a message, a part of one): a provider's marks
stand there. *Steps* are lengths, each a quarter longer than the one before, wherever they fall:
servers that cache prefixes by small blocks know a prompt again in the middle of a message too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import takewhile
from typing import Any, NamedTuple

import orjson

BYTES_PER_TOKEN = 4
"""An estimate, and a careful one: of most texts it says fewer tokens than there are."""

READ_BYTES_MAX = 1024 * 1024
"""What comes after so much of a prompt is not looked at."""

EDGES_MAX = 34
"""Of a prompt's ends of blocks: those of its tools and its system, and the last 32."""

STEP_FIRST_BYTES = 512
STEP_GROWTH = 1.25
ANCHOR_BYTES = 1024

_INSTRUCTS = frozenset({"system", "developer"})
_MARKABLE = frozenset({"system", "user", "assistant", "tool"})
_MARKS = frozenset({"cache_control", "prompt_cache_breakpoint"})
_NOT_REST = _MARKS | {"role", "content"}
_DIGEST_BYTES = 16


class Place(NamedTuple):
    """A block: a message's (whole, or a part of its content), or the last tool (message -1)."""

    message: int
    part: int | None = None


TOOLS = Place(-1)


class Edge(NamedTuple):
    """Where a block ends. `place` is None where no mark may stand."""

    digest: bytes
    size_bytes: int
    place: Place | None

    @property
    def tokens(self) -> int:
        return self.size_bytes // BYTES_PER_TOKEN


@dataclass(slots=True)
class Prompt:
    """A prompt's beginnings, shortest first, and what was decided for it, by group.

    `known` is what was sent before of it, by group, when it came.
    `instructions` is the end of its leading system messages and tools, None where there are none.
    `anchor` names those together with the start of what follows: what most of a conversation's
    prompts share. `hinted` says that the caller has marks or a key of its own.
    """

    tenant: str
    edges: tuple[Edge, ...]
    instructions: Edge | None
    steps: tuple[tuple[bytes, int], ...]
    anchor: bytes
    hinted: bool
    known: dict[str, Any] = field(default_factory=dict)


class _Block(NamedTuple):
    data: bytes
    place: Place | None
    instructs: bool


def read(
    route: str, body: Mapping[str, Any], tenant: str, *, least_bytes: int, steps: bool
) -> Prompt | None:
    """The beginnings of a request's prompt; None where it is shorter than `least_bytes`.

    Those that are shorter have no edge. `steps`: those at fixed lengths too. A body that is no
    request of the route gives None.
    """
    if route == "embedding":
        return None
    blocks = list(_blocks(body))
    if sum(len(block.data) for block in blocks) < least_bytes:
        return None
    leading = sum(1 for _ in takewhile(lambda block: block.instructs, blocks))
    tail = len(blocks) - (EDGES_MAX - 2)
    chain = _Chain(tenant, steps)
    edges: list[Edge] = []
    instructions: Edge | None = None
    for number, block in enumerate(blocks, 1):
        if number == leading + 1:
            chain.anchor(block.data)
        if not chain.add(block.data):
            break
        if chain.size_bytes < least_bytes:
            continue
        if number >= tail or number == leading or block.place == TOOLS:
            edges.append(Edge(chain.digest(), chain.size_bytes, block.place))
            if number == leading:
                instructions = edges[-1]
    anchor = chain.anchored or chain.digest()
    hinted = "prompt_cache_key" in body or _is_marked(body)
    return Prompt(tenant, tuple(edges), instructions, tuple(chain.steps), anchor, hinted)


class _Chain:
    """A running hash that remembers what it was at each step."""

    def __init__(self, tenant: str, steps: bool) -> None:
        name = tenant.encode("utf-8", "surrogatepass")
        self._hash = blake2b(digest_size=_DIGEST_BYTES, person=b"forebay.prompt.1")
        self._hash.update(len(name).to_bytes(8, "big") + name)
        self._next_bytes = STEP_FIRST_BYTES if steps else READ_BYTES_MAX + 1
        self.size_bytes = 0
        self.steps: list[tuple[bytes, int]] = []
        self.anchored: bytes | None = None

    def add(self, data: bytes) -> bool:
        """False: no more is read."""
        begin = 0
        while self.size_bytes + len(data) - begin >= self._next_bytes <= READ_BYTES_MAX:
            end = begin + self._next_bytes - self.size_bytes
            self._hash.update(data[begin:end])
            begin, self.size_bytes = end, self._next_bytes
            self.steps.append((self.digest(), self.size_bytes))
            self._next_bytes = int(self._next_bytes * STEP_GROWTH)
        if self.size_bytes + len(data) - begin > READ_BYTES_MAX:
            return False
        self._hash.update(data[begin:])
        self.size_bytes += len(data) - begin
        return True

    def anchor(self, following: bytes) -> None:
        """The instructions are read: they alone name the prompt, if they are long.

        A long first message is told apart by how it starts; a short one may well be a question
        that nobody asks twice.
        """
        chain = self._hash.copy()
        if len(following) >= 2 * ANCHOR_BYTES:
            chain.update(following[:ANCHOR_BYTES])
        elif self.size_bytes < ANCHOR_BYTES:
            chain.update(following)
        self.anchored = chain.digest()

    def digest(self) -> bytes:
        return self._hash.copy().digest()


def is_short(body: Mapping[str, Any], least_bytes: int) -> bool:
    """Whether a glance tells that a prompt is short: most are."""
    if body.get("tools") or "messages" not in body:
        return False
    size = 0
    for message in body["messages"]:
        content = message.get("content")
        if not isinstance(content, str) or len(message) > 2:
            return False
        size += len(content) * (1 if content.isascii() else 4) + 32
        if size >= least_bytes:
            return False
    return True


def _blocks(body: Mapping[str, Any]) -> Iterator[_Block]:
    if "messages" not in body:
        yield _Block(_bytes(body.get("prompt")), None, False)
        return
    messages = body["messages"]
    if body.get("tools"):
        place = TOOLS if body["tools"][-1].get("type") == "function" else None
        yield _Block(_bytes([_plain(tool) for tool in body["tools"]]), place, True)
    leading = True
    # Instructions further down are read first by some: no mark's place would be where it seems.
    straight = not any(
        one["role"] in _INSTRUCTS and other["role"] not in _INSTRUCTS
        for one, other in zip(messages[1:], messages, strict=False)
    )
    for number, message in enumerate(messages):
        role, content = message["role"], message.get("content")
        leading = leading and role in _INSTRUCTS
        if len(message) == 2 and type(content) is str:  # nearly all are
            is_text = content != "" and not content.isspace()
            place = Place(number) if straight and is_text and role in _MARKABLE else None
            yield _Block(b"\0" + role.encode() + b"\0" + _bytes(content), place, leading)
            continue
        markable = straight and role in _MARKABLE and not message.get("tool_calls")
        rest = {k: v for k, v in message.items() if k not in _NOT_REST and v is not None}
        head = b"\0" + role.encode() + b"\0" + (_bytes(rest) if rest else b"")
        if not isinstance(content, list):
            place = Place(number) if markable and isinstance(content, str) else None
            is_text = isinstance(content, str) and not content.isspace() and content != ""
            yield _Block(head + _bytes(content or ""), place if is_text else None, leading)
            continue
        for index, part in enumerate(content):
            text = part.get("text")
            is_text = part.get("type") == "text" and bool(text) and not text.isspace()
            place = Place(number, index) if markable and is_text and role != "tool" else None
            yield _Block(head + _bytes(text if is_text else _plain(part)), place, leading)
            head = b"\0"


def _bytes(value: Any) -> bytes:
    if isinstance(value, str):
        return value.encode("utf-8", "surrogatepass")
    try:
        return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)
    except TypeError:  # numbers beyond 64 bits, lone surrogates
        return repr(value).encode("utf-8", "surrogatepass")


def _plain(part: Any) -> Any:
    """A part or a tool without the caller's marks: they are not read by a model."""
    if not isinstance(part, dict):
        return part
    return {name: value for name, value in part.items() if name not in _MARKS}


def _is_marked(body: Mapping[str, Any]) -> bool:
    """Whether the caller has said itself what is to be cached."""
    parts = [tool for tool in body.get("tools") or () if isinstance(tool, dict)]
    for message in body.get("messages") or ():
        parts.append(message)
        if isinstance(message.get("content"), list):
            parts += message["content"]
    return any(part.get(mark) for part in parts for mark in _MARKS)


def marked(body: Mapping[str, Any], places: list[Place]) -> dict[str, Any]:
    """A copy of the body with Anthropic's marks at these places, in LiteLLM's words."""
    mark = {"cache_control": {"type": "ephemeral"}}
    changed = dict(body)
    messages = changed["messages"] = list(body["messages"])
    for place in places:
        if place == TOOLS:
            changed["tools"] = [*body["tools"][:-1], {**body["tools"][-1], **mark}]
            continue
        message = messages[place.message]
        if message["role"] == "tool":
            messages[place.message] = {**message, **mark}
            continue
        if place.part is None:
            parts = [{"type": "text", "text": message["content"], **mark}]
        else:
            parts = list(message["content"])
            parts[place.part] = {**parts[place.part], **mark}
        messages[place.message] = {**message, "content": parts}
    return changed
