"""LiteLLM's `model_list`: its shape, what is checked beyond it, and what in it is hidden."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, NotRequired, Required

from pydantic import ConfigDict, Field, GetCoreSchemaHandler
from pydantic_core import CoreSchema
from typing_extensions import TypedDict  # pydantic wants this one before Python 3.12

from forebay import secrets
from forebay.faults import Fault
from forebay.not_built import not_built
from forebay.providers.prices import is_price

Figure = Annotated[float, Field(ge=0, strict=True)]
Whole = Annotated[int, Field(ge=0, strict=True)]
Order = Annotated[int, Field(strict=True)]
ModelName = Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[^\x00-\x1f\x7f]+$")]


class LiteLLMParams(TypedDict, total=False):
    """LiteLLM's `litellm_params`: how to call one deployment. Other keys go to the provider."""

    __pydantic_config__ = ConfigDict(extra="allow", coerce_numbers_to_str=True)  # type: ignore[misc]

    model: Required[ModelName]
    weight: Figure | None
    order: Order | None
    rpm: Whole | None
    tpm: Whole | None
    allowed_params: list[str]
    lane: Literal["auto", "litellm", "relay"] | None


class ModelEntry(TypedDict):
    """One entry of LiteLLM's `model_list`: a deployment, in the group `model_name`.

    `rpm` and `tpm` are the deployment's own limits, held by all processes together. Without a
    `weight` anywhere in a group, `rpm`, or else `tpm`, serve as weights too, as they do in
    LiteLLM's simple shuffle. `allowed_params` are parameters beyond
    OpenAI's that callers may send to this deployment. `lane` in `litellm_params` goes before the
    server's.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", coerce_numbers_to_str=True)  # type: ignore[misc]

    model_name: ModelName
    litellm_params: LiteLLMParams
    model_info: NotRequired[dict[str, Any]]
    weight: NotRequired[Figure | None]
    order: NotRequired[Order | None]
    rpm: NotRequired[Whole | None]
    tpm: NotRequired[Whole | None]
    allowed_params: NotRequired[list[str]]


CALL_CAPS = ("max_texts_per_call", "max_tokens_per_call", "max_bytes_per_call")
"""Of `model_info`: most of one embedding call, where the deployment takes more or less than is
known of its provider."""

# What no caller may send, whatever the operator allows: it chooses whose key goes where.
NEVER_ALLOWED = frozenset(
    {"api_base", "api_key", "api_version", "base_url", "extra_headers", "headers"}
    | {"custom_llm_provider", "mock_response", "model_list", "litellm_params"}
    | {"callbacks", "user_config"}
)


class Shape:
    """Checks a plain dict as the given TypedDict, and leaves it a plain dict to type checkers."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.shape)


def entry_faults(entry: Mapping[str, Any]) -> Iterator[Fault]:
    """What the shape of a `model_list` entry does not tell."""
    params = entry["litellm_params"]
    for fault in not_built("litellm_params", params):
        yield fault.under("litellm_params")
    for path in _malformed(params):
        yield Fault(("litellm_params", *path), "write os.environ/NAME for an environment variable")
    for place, names in (
        (("allowed_params",), entry.get("allowed_params")),
        (("litellm_params", "allowed_params"), params.get("allowed_params")),
    ):
        for name in sorted(NEVER_ALLOWED.intersection(names or ())):
            yield Fault(place, f"{name!r} decides where keys go and is never left to callers")
    info = entry.get("model_info") or {}
    yield from (fault.under("litellm_params") for fault in _price_faults(params))
    yield from (fault.under("model_info") for fault in _price_faults(info))
    for name in CALL_CAPS:
        if name in info and (type(info[name]) is not int or info[name] < 1):
            yield Fault(("model_info", name), "must be a whole number of at least 1")
    for name in ("rpm", "tpm"):
        figure = params.get(name, entry.get(name, info.get(name)))
        if figure == 0:
            yield Fault((name,), "0 would never let a call through; leave the entry or this out")
        elif figure is not None and (type(figure) is not int or figure < 0):
            yield Fault((name,), "must be a whole number of at least 1")
    identity = info.get("id")
    if identity is not None and not re.fullmatch(r"[\x21-\x7e]{1,128}", str(identity)):
        yield Fault(("model_info", "id"), "must be up to 128 printable characters without spaces")


def _malformed(value: Any) -> Iterator[tuple[str | int, ...]]:
    """Where texts are that were meant as references and are not."""
    if secrets.is_text(value):
        if secrets.is_malformed_reference(value):
            yield ()
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from ((key, *path) for path in _malformed(item))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from ((index, *path) for path in _malformed(item))


def hidden(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of an entry with its secrets in `SecretStr`s."""
    copy = dict(entry)
    params = _with_numbers(entry["litellm_params"])
    copy["litellm_params"] = secrets.hide(params, secrets.is_secret_param)
    if "model_info" in entry:
        info = _with_numbers(entry["model_info"])
        copy["model_info"] = secrets.hide(info, secrets.is_secret_name)
    return copy


def _with_numbers(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same with prices as numbers: YAML takes `1e-7`, without a point, for a text."""
    return {
        name: float(value) if is_price(name) and isinstance(value, str) else value
        for name, value in values.items()
    }


def _price_faults(values: Mapping[str, Any]) -> Iterator[Fault]:
    for name, value in values.items():
        if not is_price(name) or value is None or isinstance(value, Mapping | list):
            continue
        try:
            fine = not isinstance(value, bool) and 0 <= float(value) < math.inf
        except (TypeError, ValueError):
            fine = False
        if not fine:
            yield Fault((name,), "must be a price in USD: a number, and not negative")
