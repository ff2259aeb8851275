"""Regular expressions of operators, run in time linear in the text.

They are those of Rust's `regex` crate, which pydantic brings along: no look-around and no
back-references, and therefore no pattern that takes exponential time.
"""

from __future__ import annotations

from pydantic_core import SchemaError, SchemaValidator, core_schema

PATTERN_CHARS_MAX = 2_000


class Pattern:
    """A compiled pattern, found anywhere in a text.

    Raises:
        ValueError: it is too long, or none that takes linear time.
    """

    def __init__(self, text: str) -> None:
        if not text or len(text) > PATTERN_CHARS_MAX:
            raise ValueError(f"no text of 1 to {PATTERN_CHARS_MAX} characters")
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
