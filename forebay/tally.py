"""A stream, folded chunk by chunk into the whole answer it amounts to.

Used to settle, validate and keep a stream; the chunks themselves go to the client untouched.
"""

from __future__ import annotations

from typing import Any

from forebay.codec import Answer

BYTES_PER_TOKEN = 4
"""The usual estimate for English text, used only where the provider reports no usage."""

_JOINED = ("content", "refusal", "reasoning_content", "arguments", "input")
"""Fields whose pieces are concatenated; of every other field the last value counts."""


class StreamTally:
    """What a stream has said so far.

    Owns the pieces of one answer; bounded by that answer's own length. Failure behaviour: a chunk
    without choices or usage adds nothing; a stream cut short yields what had arrived.
    """

    def __init__(self, route: str) -> None:
        self._object = "chat.completion" if route == "chat" else "text_completion"
        self._head: dict[str, Any] = {}
        self._choices: dict[int, _Choice] = {}
        self._usage: dict[str, Any] | None = None

    def add(self, chunk: dict[str, Any]) -> None:
        """Fold in one OpenAI chunk, which is only read."""
        for name in ("id", "created", "model", "system_fingerprint", "service_tier"):
            if chunk.get(name) is not None:
                self._head[name] = chunk[name]
        if chunk.get("usage"):
            self._usage = chunk["usage"]
        for choice in chunk.get("choices") or ():
            index = choice.get("index") or 0
            if index not in self._choices:
                self._choices[index] = _Choice()
            self._choices[index].add(choice)

    def answer(self, request: dict[str, Any], complete: bool) -> Answer:
        """The answer as if it had not been streamed; `request` is the body that asked for it.

        Where the provider reported no usage, or was cut short before it could, tokens are
        estimated from the texts' bytes and `estimated` is true. `cost_nano` is left open.
        """
        usage = self._usage
        estimated = usage is not None and bool(usage.get("estimated"))
        if usage is None:
            usage, estimated = self._estimate(request), True
        chat = self._object == "chat.completion"
        choices = sorted(self._choices.items())
        body = {
            **self._head,
            "object": self._object,
            "choices": [choice.whole(index, chat) for index, choice in choices],
            "usage": usage,
        }
        if not complete:
            for choice in body["choices"]:
                choice["finish_reason"] = choice["finish_reason"] or "cancelled"
        return Answer(body, usage, None, str(self._head.get("model", "")), estimated=estimated)

    def _estimate(self, request: dict[str, Any]) -> dict[str, Any]:
        asked = request.get("messages") or request.get("prompt")
        prompt = -(-_text_bytes(asked) // BYTES_PER_TOKEN)
        said = sum(_text_bytes(choice.said) for choice in self._choices.values())
        completion = -(-said // BYTES_PER_TOKEN)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


class _Choice:
    """One choice of the answer: its text in pieces, its tool calls by index and id.

    Some providers give every call the index 0; a new id at an old index is another call.
    """

    def __init__(self) -> None:
        self.said: list[str] = []
        self._fields: dict[str, Any] = {}
        self._text: dict[str, list[str]] = {}
        self._calls: list[tuple[int, dict[str, Any]]] = []  # by index, in the order of arrival
        self._logprobs: dict[str, Any] = {}
        self._finish_reason: str | None = None

    def add(self, choice: dict[str, Any]) -> None:
        self._finish_reason = choice.get("finish_reason") or self._finish_reason
        if choice.get("text"):
            self._piece("text", choice["text"])
        for name, value in (choice.get("logprobs") or {}).items():
            if isinstance(value, list):
                self._logprobs.setdefault(name, []).extend(value)
        for name, value in (choice.get("delta") or {}).items():
            if name == "tool_calls":
                for call in value or ():
                    self._merge(self._call_of(call), call)
            elif name in _JOINED and isinstance(value, str):
                self._piece(name, value)
            elif isinstance(value, dict):
                self._merge(self._fields.setdefault(name, {}), value)
            elif value is not None:
                self._fields[name] = value

    def whole(self, index: int, chat: bool) -> dict[str, Any]:
        text = {name: "".join(pieces) for name, pieces in self._text.items()}
        head: dict[str, Any] = {"index": index, "finish_reason": self._finish_reason}
        if self._logprobs:
            head["logprobs"] = self._logprobs
        if not chat:
            return {**head, "text": text.get("text", "")}
        message = {"role": "assistant", "content": None, **self._fields, **text}
        if self._calls:
            calls = sorted(self._calls, key=lambda numbered: numbered[0])
            message["tool_calls"] = [_without_index(call) for _, call in calls]
        return {**head, "message": message}

    def _call_of(self, piece: dict[str, Any]) -> dict[str, Any]:
        """The call that this is a piece of: by its id, else the last one at its index."""
        index, name = piece.get("index") or 0, piece.get("id")
        found: dict[str, Any] | None = None
        for number, call in self._calls:
            if name and call.get("id") == name:
                return call
            if number == index and not (name and call.get("id")):
                found = call
        if found is None:
            found = {}
            self._calls.append((index, found))
        return found

    def _piece(self, name: str, piece: str) -> None:
        self._text.setdefault(name, []).append(piece)
        self.said.append(piece)

    def _merge(self, whole: dict[str, Any], part: dict[str, Any]) -> None:
        for name, value in part.items():
            if isinstance(value, dict):
                self._merge(whole.setdefault(name, {}), value)
            elif name in _JOINED and isinstance(value, str):
                whole[name] = whole.get(name, "") + value
                self.said.append(value)
            elif value is not None and (value != "" or name not in whole):
                whole[name] = value


def _without_index(call: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in call.items() if name != "index"}


def _text_bytes(value: Any) -> int:
    """UTF-8 bytes of the texts in messages or a prompt; images and files are not counted."""
    if isinstance(value, str):
        return len(value.encode("utf-8", "surrogatepass"))  # Python's callers may have halves
    if isinstance(value, list):
        return sum(_text_bytes(item) for item in value)
    if isinstance(value, dict):
        return sum(_text_bytes(value.get(name)) for name in ("content", "text"))
    return BYTES_PER_TOKEN if isinstance(value, int) else 0
