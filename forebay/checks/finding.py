"""What a check says of an answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

BuiltIn = Literal[
    "empty", "truncated", "refusal", "json", "schema", "tools", "secret", "pii", "markup"
]
Rule = BuiltIn | Literal["blocked", "validator", "moderation"]
"""What a finding is counted under; `blocked` and `validator` are the operator's own."""

RULES: tuple[str, ...] = (*get_args(BuiltIn), "blocked", "validator", "moderation")


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about an answer that its caller should know: a rule broken, or only bent.

    The message quotes nothing of the answer.
    """

    message: str
    broken: bool
    rule: Rule
