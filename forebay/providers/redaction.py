"""A provider's text as callers may read it: without keys, and without what LiteLLM wraps around it.

Every text that comes from a provider passes `spoken`, and nothing else lets it through. Known
secrets are replaced wherever they stand; what only looks like a key is replaced too, since a
provider may quote keys that are not ours (a caller's, another tenant's, a masked form of ours).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MASK = "***"
MESSAGE_CHARS_MAX = 2_000
SECRET_CHARS_MIN = 6
WRAPPINGS_MAX = 4

_KEYLIKE = re.compile(
    r"""
      \b(?:sk|pk|rk|gsk|xai|hf|gh[op]|glpat|pplx|nvapi|r8|fw|tgp|csk|voyage|pa)[-_][\w*.\-]{6,}
    | \bAIza[\w\-]{20,}                              # Google
    | \b(?:AKIA|ASIA)[A-Z0-9]{12,}                   # AWS
    | \beyJ[\w\-]{8,}\.[\w\-]{8,}(?:\.[\w\-]*)?      # JSON Web Tokens
    """,
    re.X,
)
_VALUE = r"""[^\s"'&,;<>(){}\[\]]{4,}"""
_NAMED = re.compile(
    rf"""
    (?P<name>
        \b(?:bearer|basic)\s+
      | (?:key|token|secret|password|passwd|credentials?|authorization|signature)
        (?:\s+(?:provided|given))?  ["']?\s*[:=]\s*["']?  (?:(?:bearer|basic)\s+)?
    )
    {_VALUE}
    """,
    re.X | re.I,
)
_USERINFO = re.compile(r"(?<=://)[^/@\s]+@")
_TRACEBACK = re.compile(r"\s*Traceback \(most recent call last\):.*", re.S)
_WRAPPING = re.compile(
    r"(?:litellm\.\w+|\w+(?:Error|Timeout|Exception)):\s+|\w+(?:Exception|Error) - "
)


def redact(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` without the given secrets and without anything that looks like a key."""
    for secret in sorted(secrets, key=len, reverse=True):
        if len(secret) >= SECRET_CHARS_MIN:
            text = text.replace(secret, MASK)
    text = _USERINFO.sub(f"{MASK}@", text)
    text = _KEYLIKE.sub(MASK, text)
    return _NAMED.sub(lambda found: found["name"] + MASK, text)


def spoken(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` redacted, on its own, and at most MESSAGE_CHARS_MAX long."""
    text = _TRACEBACK.sub("", text).strip()
    for _ in range(WRAPPINGS_MAX):
        wrapping = _WRAPPING.match(text)
        if wrapping is None:
            break
        text = text[wrapping.end() :]
    text = redact(_message_in(text), secrets)
    return text if len(text) <= MESSAGE_CHARS_MAX else text[: MESSAGE_CHARS_MAX - 1] + "…"


def secrets_in(params: Mapping[str, Any]) -> list[str]:
    """The texts in resolved `litellm_params` that must not be seen: all but the harmless ones."""
    return [text for name, value in params.items() for text in _texts(name, value)]


def error_object(body: Any) -> Mapping[str, Any]:
    """The inner object of a JSON error body: OpenAI's, Anthropic's, Google's."""
    if isinstance(body, list) and body:
        body = body[0]
    if not isinstance(body, Mapping):
        return {}
    inner = body.get("error")
    return inner if isinstance(inner, Mapping) else body


_HARMLESS = frozenset({"model", "api_base", "base_url", "api_version", "custom_llm_provider"})


def _texts(name: str, value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if name not in _HARMLESS and not name.endswith(("_region_name", "_location", "_project")):
            yield value
            scheme, _, rest = value.partition(" ")
            if rest and scheme.lower() in ("bearer", "basic"):
                yield rest
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(str(key), item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(name, item)


def _message_in(text: str) -> str:
    """The message of a JSON error body, where the text is one; otherwise the text."""
    shown = text[2:-1] if text.startswith("b'") and text.endswith("'") else text
    if not shown.startswith(("{", "[")):
        return text
    try:
        message = error_object(json.loads(shown)).get("message")
    except ValueError:
        return text
    return message if isinstance(message, str) and message else text
