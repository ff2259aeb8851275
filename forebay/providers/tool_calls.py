"""Tools for a model that was not trained on them.

They are described to the model in words. Where a call is demanded, a grammar makes the answer one
whose arguments follow the tool's schema; where it is left to the model, a text that begins with
`<tool_call>` is read as a call.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forebay.errors import InvalidRequest

_BEGIN, _END = "<tool_call>", "</tool_call>"
_PARTIAL = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"]+)"\s*,\s*"arguments"\s*:\s*(.*)', re.S)


@dataclass(frozen=True, slots=True)
class Tools:
    """The functions a chat may call. `forced`: the answer must be a call of one of them."""

    functions: tuple[Mapping[str, Any], ...]
    forced: bool

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> Tools | None:
        choice = body.get("tool_choice", "auto")
        tools = body.get("tools") or ()
        if not tools and choice not in ("auto", "none"):
            raise InvalidRequest.about("tool_choice", "tool_choice is given without tools")
        if not tools or choice == "none":
            return None
        functions = []
        for place, tool in enumerate(tools):
            if tool.get("type") != "function":
                raise InvalidRequest.about(
                    f"tools[{place}].type", "tools other than functions are not supported"
                )
            functions.append(tool["function"])
        if choice in ("auto", "required"):
            return cls(tuple(functions), choice == "required")
        name = choice.get("function", {}).get("name") if isinstance(choice, Mapping) else None
        chosen = tuple(f for f in functions if f["name"] == name)
        if not chosen:
            raise InvalidRequest.about("tool_choice", "tool_choice names no tool of this request")
        return cls(chosen, True)

    def described(self) -> str:
        """What the model is told about the functions."""
        lines = [json.dumps(dict(function)) for function in self.functions]
        return (
            "You can call these functions:\n"
            + "\n".join(lines)
            + f'\nTo call one, answer only {_BEGIN}{{"name": its name, "arguments": '
            f"an object}}{_END}."
        )

    def schema(self) -> dict[str, Any]:
        """JSON schema of a call."""
        calls = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "arguments": function.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for function in self.functions
        ]
        return calls[0] if len(calls) == 1 else {"anyOf": calls}

    def may_be_call(self, text: str) -> bool:
        """Whether a text that begins like this may turn out to be a call."""
        if self.forced:
            return True
        begun = text.lstrip()
        return begun.startswith(_BEGIN) or _BEGIN.startswith(begun)

    def call(self, text: str) -> dict[str, Any] | None:
        """The call that a text is; None when it is none. A forced one may have been cut short."""
        text = text.strip().removeprefix(_BEGIN).removesuffix(_END)
        name, arguments = None, ""
        try:
            said = json.loads(text)
            name = said["name"]
            arguments = json.dumps(said["arguments"])
        except (ValueError, TypeError, KeyError):
            cut = _PARTIAL.match(text) if self.forced else None
            if cut is not None:
                name, arguments = cut[1], cut[2]
        if name not in [function["name"] for function in self.functions]:
            return None
        return {
            "id": "call_" + uuid.uuid4().hex[:24],
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def said_call(call: Mapping[str, Any]) -> str:
    """A call of an earlier turn, as the model is taught to say it."""
    function = call.get("function", {})
    name, arguments = json.dumps(function.get("name")), function.get("arguments") or "{}"
    return f'{_BEGIN}{{"name": {name}, "arguments": {arguments}}}{_END}'
