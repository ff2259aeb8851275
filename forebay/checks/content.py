"""Whether an answer says what it should not: secrets, personal data, markup that would run.

Rule 1: every pattern is linear in the text: a fixed beginning, then classes with a bounded count
        in which that beginning does not occur again. Before it a simpler one is looked for, by a
        machine that is linear whatever the pattern.
Rule 2: what the request itself says is no leak. Nor is a card number whose check digit is wrong.
Rule 3: a finding says what kind it is and never quotes it.
Rule 4: markup within a code fence, or between backticks, is shown and not run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from forebay.checks.finding import Finding
from forebay.checks.patterns import Pattern

CHARS_MAX = 1_000_000
"""Most characters of a text that are looked at."""
MATCHES_MAX = 20
"""Most candidates of one kind that are looked at; the first good one is enough."""


class _Kind(NamedTuple):
    """A kind of thing. Where `quick`, which takes next to no time, finds nothing, it is not there;
    else `pattern` says where it may be, and `holds` whether it is.

    A `quick` has no `\\b`: its machine is thirty times slower with one, where a text is not ASCII.
    """

    name: str
    quick: Pattern
    pattern: re.Pattern[str]
    holds: Callable[[str], bool] = bool


_SECRETS = (
    _Kind(
        "a private key",
        Pattern("-----BEGIN [A-Z ]*PRIVATE KEY"),
        re.compile(r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY"),
    ),
    _Kind(
        "an API key",
        Pattern("(sk-|[sr]k_live_)[A-Za-z0-9_-]{20}"),
        re.compile(r"\b(?:sk-(?:ant-|proj-|or-v1-)?|[sr]k_live_)[A-Za-z0-9_-]{20,200}"),
    ),
    _Kind(
        "an AWS key",
        Pattern("(AKIA|ASIA)[A-Z0-9]{16}"),
        re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ),
    _Kind(
        "a Google API key",
        Pattern("AIza[A-Za-z0-9_-]{35}"),
        re.compile(r"\bAIza[A-Za-z0-9_-]{35}"),
    ),
    _Kind(
        "a GitHub token",
        Pattern("gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50}"),
        re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{50,100})"),
    ),
    _Kind(
        "a Slack token",
        Pattern("xox[abprs]-[A-Za-z0-9-]{20}"),
        re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{20,200}"),
    ),
    _Kind(
        "a JSON web token",
        Pattern(r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\."),
        re.compile(
            r"(?<![\w-])eyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10}"
        ),
    ),
)


def _luhn(text: str) -> bool:
    """Whether the last digit checks the others, as on payment cards (ISO/IEC 7812)."""
    digits = [int(sign) for sign in text if sign.isdigit()]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[-2::-2]]
    return (
        13 <= len(digits) <= 19
        and len(set(digits)) > 1
        and not ((sum(digits[-1::-2]) + sum(doubled)) % 10)
    )


def _iban(text: str) -> bool:
    """Whether the two check digits are right (ISO 13616)."""
    packed = text.replace(" ", "")
    number = "".join(str(int(sign, 36)) for sign in packed[4:] + packed[:4])
    return 15 <= len(packed) <= 34 and int(number) % 97 == 1


_PERSONAL = (
    _Kind(
        "an e-mail address",
        Pattern(r"[A-Za-z0-9_.+-]@[A-Za-z0-9-]+\.[A-Za-z0-9-]"),
        re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}"),
        lambda text: not text.lower().endswith((".example", "example.com", "example.org")),
    ),
    _Kind(
        "a card number",
        Pattern("[0-9]{4}([ -]?[0-9]){9}"),
        re.compile(r"(?<![\w.-])\d{4}(?:[ -]?\d){9,15}(?![\w-])", re.ASCII),
        _luhn,
    ),
    _Kind(
        "a social security number",
        Pattern("[0-9]{3}-[0-9]{2}-[0-9]{4}"),
        re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\d-])", re.ASCII),
    ),
    _Kind(
        "an IBAN",
        Pattern("[A-Z]{2}[0-9]{2}( ?[A-Z0-9]){11}"),
        re.compile(r"\b[A-Z]{2}\d\d(?: ?[A-Z0-9]){11,30}\b", re.ASCII),
        _iban,
    ),
)

_MARKUP = (
    _Kind(
        "a tag that runs or loads something",
        Pattern(r"(?i)<\s*(script|iframe|object|embed|applet|base|meta|link|form|svg)"),
        re.compile(
            r"<\s{0,8}(?:script|iframe|object|embed|applet|base|meta|link|form|svg)\b", re.I
        ),
    ),
    _Kind(
        "a tag with an event handler",
        Pattern(r"""(?i)[\s/'"]on[a-z]{3,24}\s*="""),
        re.compile(r"<[a-z][^<>]{0,500}?[\s/'\"]on[a-z]{3,24}\s{0,8}=", re.I),
    ),
    _Kind(
        "a link that runs a script",
        Pattern(r"(?i)(javascript|vbscript):\S|data:text/html"),
        re.compile(r"\b(?:javascript|vbscript):(?=\S)|\bdata:text/html\b", re.I),
    ),
    _Kind(
        "an image that tells a server something",
        Pattern(r"(?i)!\[[^\[\]\n]*\]\(\s*https?://"),
        re.compile(r"!\[[^\[\]\n]{0,300}\]\(\s{0,8}https?://[^\s()?#]{1,500}\?[^\s)]", re.I),
    ),
)
_FENCE = "```"

_ANY = Pattern("|".join(f"({kind.quick.text})" for kind in (*_SECRETS, *_PERSONAL, *_MARKUP)))
"""All that is looked for, in one look: most answers hold nothing of it."""


def may_hold(text: str) -> bool:
    """Whether any of the three below may find something."""
    return _ANY.is_in(text)


def secrets(text: str, request: Callable[[], str]) -> Iterator[Finding]:
    """Keys and tokens of known forms."""
    for name in _found(_SECRETS, text, request):
        yield Finding(f"the answer holds {name}", False, "secret")


def personal_data(text: str, request: Callable[[], str]) -> Iterator[Finding]:
    """E-mail addresses and numbers that name or pay for somebody."""
    for name in _found(_PERSONAL, text, request):
        yield Finding(f"the answer holds {name}", False, "pii")


def unsafe_markup(text: str) -> Iterator[Finding]:
    """HTML and Markdown that a page which shows the answer would act on."""
    for kind in _MARKUP:
        if kind.quick.is_in(text):
            for name in _found(_MARKUP, _without_code(text), str):
                yield Finding(f"the answer holds {name}", False, "markup")
            return


def said(request: Mapping[str, Any]) -> str:
    """The texts of a request, one after the other."""
    parts: list[str] = []
    left: list[Any] = [request.get("messages"), request.get("prompt")]
    while left:
        value = left.pop()
        if isinstance(value, str):
            parts.append(value)
        elif isinstance(value, list):
            left += value
        elif isinstance(value, dict):
            left += [value.get("content"), value.get("text")]
    return "\n".join(parts)


def _found(kinds: tuple[_Kind, ...], text: str, request: Callable[[], str]) -> Iterator[str]:
    for kind in kinds:
        if not kind.quick.is_in(text):
            continue
        for _, match in zip(range(MATCHES_MAX), kind.pattern.finditer(text), strict=False):
            if kind.holds(match[0]) and match[0] not in request():
                yield kind.name
                break


def _without_code(text: str) -> str:
    """The text less what stands in code fences and between backticks of one line."""
    outside = "\n".join(text.split(_FENCE)[::2])
    return "\n".join(" ".join(line.split("`")[::2]) for line in outside.split("\n"))
