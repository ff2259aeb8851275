"""A prompt with columns in it: `Summarise {title}: {body}`. `{{` and `}}` are plain braces."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from forebay.errors import ConfigurationError


class MissingValue(Exception):
    """A row has no value in a column that its prompt needs."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column

    def __str__(self) -> str:
        return f"column {self.column!r} is empty"


@dataclass(frozen=True, slots=True)
class Template:
    """Pieces of text, each with the column that follows it (None: nothing does)."""

    pieces: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, prompt: str) -> Template:
        """
        Raises:
            ConfigurationError: the braces do not match, or hold more than a column's name.
        """
        try:
            parsed = list(string.Formatter().parse(prompt))
        except ValueError as error:
            raise ConfigurationError(f"prompt: {error}", param="prompt") from None
        for _, name, form, conversion in parsed:
            if name is not None and (not name or form or conversion):
                raise ConfigurationError(
                    "prompt: braces hold the name of a column, as in {title}; write {{ for a brace",
                    param="prompt",
                )
        if not any(name for _, name, _, _ in parsed):
            raise ConfigurationError(
                "prompt names no column, so every row would be asked the same; write {column}",
                param="prompt",
            )
        return cls(tuple((text, name) for text, name, _, _ in parsed))

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    def require(self, columns: Sequence[str]) -> None:
        """
        Raises:
            ConfigurationError: a column is not there.
        """
        for name in self.columns:
            if name not in columns:
                raise ConfigurationError(
                    f"prompt: there is no column {name!r}; there are {', '.join(columns)}",
                    param="prompt",
                )

    def fill(self, row: Mapping[str, Any]) -> str:
        """The prompt of one row.

        Raises:
            MissingValue: a column is null.
        """
        parts = []
        for text, name in self.pieces:
            parts.append(text)
            if name is not None:
                if row[name] is None:
                    raise MissingValue(name)
                parts.append(str(row[name]))
        return "".join(parts)
