"""Regular expressions of operators, run in bounded time.

Rule 1: they are those of Rust's `regex` crate, which pydantic brings along: no look-around and no
        back-references, and therefore none that takes exponential time.
Rule 2: the worst takes the text's characters times its own states. One with many, such as
        `.{0,900}x`, looks at less of the text: STEPS_MAX in all, some 0.1 s.
"""

from __future__ import annotations

import re

from pydantic_core import SchemaError, SchemaValidator, core_schema

PATTERN_CHARS_MAX = 2_000
STEPS_MAX = 20_000_000
"""Most characters times states of one look; a step takes 4 to 6 ns (measured)."""

_TOKEN = re.compile(
    r"\\[pPxuU]\{[^}]*\}|\\.|\(\?[a-zA-Z-]*[:)]|\(\?P?<[^>]*>|\{(?P<least>\d+),?(?P<most>\d*)\}|.",
    re.DOTALL,
)


class Pattern:
    """A compiled pattern, found anywhere in a text.

    It may take a look at `chars_max` characters; who hands it more makes it take its time.

    Raises:
        ValueError: it is too long, or none that takes linear time.
    """

    def __init__(self, text: str) -> None:
        if not text or len(text) > PATTERN_CHARS_MAX:
            raise ValueError(f"no text of 1 to {PATTERN_CHARS_MAX} characters")
        self.text = text
        self.chars_max = STEPS_MAX // _states(text)
        schema = core_schema.str_schema(pattern=text, regex_engine="rust-regex")
        try:
            self._validator = SchemaValidator(schema)
        except SchemaError as error:
            why = str(error).strip().splitlines()[-1].strip().removeprefix("error: ")
            raise ValueError(
                f"no regular expression that takes linear time ({why}); look-around and "
                "back-references are not supported"
            ) from None

    def is_in(self, text: str) -> bool:
        if not text.isascii():  # Rust has no form for the lone surrogates that JSON lets through
            text = text.encode("utf-8", "replace").decode()
        return self._validator.isinstance_python(text)


def _states(text: str) -> int:
    """About how many places of a pattern may be under way at once: one for each character or
    class, times what its counts say."""
    outer: list[int] = []
    total, last, in_class = 0, 0, 0
    for token in _TOKEN.finditer(text):
        told = token[0]
        if in_class:
            in_class += (told == "[") - (told == "]")
        elif told.startswith("("):
            if told.endswith(")"):  # flags, such as (?i)
                continue
            outer.append(total)
            total = 0
        elif told == ")" and outer:
            last = max(1, total)
            total = outer.pop() + last
        elif token["least"]:
            times = max(1, int(token["most"] or token["least"]))
            total += last * (times - 1)
            last *= times
        elif told not in "*+?|^$":
            in_class = int(told == "[")
            last = 1
            total += 1
    return max(1, total)
