"""What LiteLLM made of a request, as a rule for all requests of the same form.

Rule 1: a rule is taken from a request that LiteLLM really sent, and says no more than that one
        shows: where it went, with which headers, which parameters it left out, renamed and added.
Rule 2: where a value was changed, or something added whose origin is not known, there is no rule.
Rule 3: headers that name the client are left out; of one that is not known there is no rule.
Rule 4: answers are asked for unpacked: packing saves a provider's bytes, and costs our core.
"""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import httpx
import orjson

from forebay.providers.relay.ear import Ear
from forebay.providers.relay.pool import Origin, Target

RENAMES = frozenset(
    {
        ("max_tokens", "max_completion_tokens"),
        ("max_completion_tokens", "max_tokens"),
        ("seed", "random_seed"),
    }
)
"""What LiteLLM calls by another name, value unchanged."""

ADDED: Mapping[str, Any] = {"usage": {"include": True}, "stream": True}
"""What LiteLLM adds of itself: OpenRouter is asked for usage so; a stream for being one."""

PATHS = {"chat": "/chat/completions", "completion": "/completions", "embedding": "/embeddings"}

_OURS = frozenset({b"connection", b"content-length", b"accept-encoding", b"user-agent"})
_KNOWN = frozenset(
    {b"host", b"authorization", b"api-key", b"accept", b"content-type", b"openai-organization"}
    | {b"openai-project", b"http-referer", b"x-title"}
)


@dataclass(frozen=True, slots=True, eq=False)
class Rule:
    """How requests of one form to one deployment are sent.

    `fixed` is what every such body holds beside the caller's own parameters, `left_out` the names
    that are not sent, `renamed` those that have another name there. `bare`: messages go without
    their nulls. The head of `target` holds a credential.
    """

    target: Target
    fixed: Mapping[str, Any]
    left_out: frozenset[str]
    renamed: Mapping[str, str]
    bare: bool

    def __repr__(self) -> str:
        return f"Rule({self.target})"

    def worded(self, body: Mapping[str, Any]) -> bytes:
        """The bytes to send. `body`'s nulls and its `model` are not.

        Raises:
            TypeError: it holds what is no JSON, or a number or text that JSON's writer refuses.
        """
        left_out, renamed = self.left_out, self.renamed
        sent = dict(self.fixed)
        for name, value in body.items():
            if value is not None and name not in left_out:
                sent[renamed.get(name, name)] = value
        if self.bare:
            sent["messages"] = list(map(_without_nulls, sent["messages"]))
        return orjson.dumps(sent)


def asked_of(body: Mapping[str, Any]) -> dict[str, bytes] | None:
    """A body's parameters as JSON each, before LiteLLM has its hands on them; None: it has none."""
    try:
        return {
            name: orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
            for name, value in body.items()
            if value is not None and name != "model"
        }
    except TypeError:
        return None


def rule_of(
    route: str, asked: Mapping[str, bytes], own: Mapping[str, Any], ear: Ear
) -> Rule | None:
    """The rule that an overheard request shows; None if it shows none.

    `asked` are the caller's parameters (see `asked_of`), `own` the deployment's.
    """
    request = ear.request
    if ear.heard != 1 or request is None or ear.proxied or request.method != "POST":
        return None
    if not request.url.path.endswith(PATHS[route]):
        return None
    target = _target(request, own, ear.ssl)
    sent = _body(request)
    if target is None or sent is None:
        return None
    fixed: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    bare = False
    for name, value in sent.items():
        data = orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
        if asked.get(name) == data:
            continue
        if name == "messages" and name in asked:
            given = map(_without_nulls, orjson.loads(asked[name]))
            bare = data == orjson.dumps(list(given), option=orjson.OPT_SORT_KEYS)
            if bare:
                continue
        if name in asked:
            return None
        before = _former_name(name, data, asked, sent)
        if before is not None:
            renamed[before] = name
        elif name == "model" or _is_own(name, value, own):
            fixed[name] = value
        else:
            return None
    left_out = frozenset(asked) - frozenset(sent) - frozenset(renamed)
    return Rule(
        target,
        fixed,
        left_out | frozenset({"model"}),
        renamed,
        bare,
    )


def _without_nulls(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if value is not None}


def _former_name(
    name: str, data: bytes, asked: Mapping[str, bytes], sent: Mapping[str, Any]
) -> str | None:
    for before, after in RENAMES:
        if after == name and before not in sent and asked.get(before) == data:
            return before
    return None


def _is_own(name: str, value: Any, own: Mapping[str, Any]) -> bool:
    """Whether LiteLLM adds this always, or the deployment's parameters say it."""
    if name in ADDED and ADDED[name] == value:
        return True
    further = own.get("extra_body")
    return any(
        name in holder and holder[name] == value
        for holder in (own, further if isinstance(further, Mapping) else {})
    )


def _target(request: httpx.Request, own: Mapping[str, Any], verify: Any) -> Target | None:
    """Where the request went, with the headers that are to be kept; None: they are not known."""
    given: set[bytes] = set()
    for place in ("extra_headers", "headers"):
        if isinstance(own.get(place), Mapping):
            given |= {str(name).lower().encode() for name in own[place]}
    kept = {b"user-agent": b"forebay", b"accept-encoding": b"identity"}
    for name, value in request.headers.raw:
        name = name.lower()
        if name in given or name in _KNOWN:
            kept[name] = value
        elif name not in _OURS and not name.startswith(b"x-stainless-"):
            return None
    url = request.url
    tls = url.scheme == "https"
    if tls and not isinstance(verify, ssl.SSLContext):
        verify = _tls(verify is not False)
    port = url.port or (443 if tls else 80)
    origin = Origin(url.raw_host.decode("ascii"), port, verify if tls else None)
    try:
        return Target.of(origin, url.raw_path, kept)
    except ValueError:
        return None


@cache
def _tls(verified: bool) -> ssl.SSLContext:
    """The machine's own trust, or none at all: one each, since connections are shared by it."""
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    if not verified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _body(request: httpx.Request) -> dict[str, Any] | None:
    try:
        body = orjson.loads(request.content)
    except (httpx.RequestNotRead, orjson.JSONDecodeError):
        return None
    return body if isinstance(body, dict) else None
