"""What an admin changes in a running system: keys, the configuration, breakers and the cache.

Rule 1: the caller must be an admin before anything else is read.
Rule 2: a key is told once, in the answer that makes it; lists name keys and never tell one.
Rule 3: a wrong configuration is the caller's mistake here: 400, with the field.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast, get_args
from urllib.parse import parse_qsl, urlsplit

import orjson

from deployments.http.auth import is_name
from deployments.http.exchange import JSON, Exchange, Header
from deployments.http.service import BreakerOrder
from forebay.errors import ConfigurationError, InvalidRequest, PermissionDenied
from forebay.faults import nearest

KEY_FIELDS: Mapping[str, type] = {
    "tenant": str,
    "id": str,
    "admin": bool,
    "limits": dict,
    "models": list,
}
LISTED = ("id", "tenant", "admin", "source", "created")
KINDS = {str: "a string", bool: "a boolean", dict: "an object", list: "an array of strings"}

FILTERS = ("tenant", "model", "key")
"""What is cleared from the cache, as far as they are given."""

NO_STORE: Header = (b"cache-control", b"no-store")


async def create_key(exchange: Exchange) -> None:
    """POST /admin/keys: 201, with the key, which is never shown again."""
    _require_admin(exchange)
    asked = _key_fields(await exchange.json_body())
    with _faults_are_the_callers():
        made = await exchange.service.create_key(
            asked["tenant"],
            key_id=asked.get("id"),
            admin=asked.get("admin", False),
            limits=asked.get("limits"),
            models=asked.get("models"),
        )
    await exchange.send(201, orjson.dumps(made), [JSON, NO_STORE])


async def list_keys(exchange: Exchange) -> None:
    """GET /admin/keys."""
    _require_admin(exchange)
    keys = await exchange.service.list_keys()
    listed = [{name: key[name] for name in LISTED if name in key} for key in keys]
    await exchange.send_json({"object": "list", "data": listed})


async def revoke_key(exchange: Exchange) -> None:
    """DELETE /admin/keys/{id}, with ?tenant= where several tenants have a key of this id."""
    _require_admin(exchange)
    key_id: str = exchange.scope["path_params"]["id"]
    await exchange.send_json(
        await exchange.service.revoke_key(key_id, exchange.query().get("tenant"))
    )


async def read_config(exchange: Exchange) -> None:
    """GET /admin/config: the version in force and its document, without secrets."""
    _require_admin(exchange)
    told = await exchange.service.read_config()
    headers = [JSON, NO_STORE, (b"etag", b'"%d"' % told["version"])]
    await exchange.send(200, orjson.dumps(told), headers)


async def write_config(exchange: Exchange) -> None:
    """PUT /admin/config: a document as in the file; with If-Match only over that version."""
    _require_admin(exchange)
    expected = _version(exchange.headers.get(b"if-match"))
    document = await exchange.json_body()
    with _faults_are_the_callers():
        version = await exchange.service.write_config(document, expected)
    await exchange.send_json({"version": version})


async def list_breakers(exchange: Exchange) -> None:
    """GET /admin/breakers."""
    _require_admin(exchange)
    told = await exchange.service.breakers()
    await exchange.send_json({"object": "list", **told})


async def set_breaker(exchange: Exchange) -> None:
    """POST /admin/breakers/{id}, with `{"state": "closed" | "open" | "auto"}`."""
    _require_admin(exchange)
    deployment: str = exchange.scope["path_params"]["id"]
    state = _breaker_order(await exchange.json_body())
    await exchange.send_json(await exchange.service.set_breaker(deployment, state))


async def read_cache(exchange: Exchange) -> None:
    """GET /admin/cache: what is stored, and what look-ups and providers' own caches came to."""
    _require_admin(exchange)
    await exchange.send_json(await exchange.service.cache())


async def clear_cache(exchange: Exchange) -> None:
    """DELETE /admin/cache, with ?tenant=, ?model= and ?key=; without any of them, all of it."""
    _require_admin(exchange)
    given = _filters(exchange)
    count = await exchange.service.clear_cache(**{name: given.get(name) for name in FILTERS})
    await exchange.send_json({"invalidated": count, **given})


def _filters(exchange: Exchange) -> dict[str, str]:
    """What the query names, each once and not empty: a slip must not clear everything."""
    query = exchange.scope["query_string"].decode("latin-1")
    given: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name in given or (name in FILTERS and not value):
            words = "is given twice" if name in given else "must not be empty"
            raise InvalidRequest.about(name, f"{name!r} {words}.", code="invalid_value")
        given[name] = value
    return {name: str(value) for name, value in _given(given, FILTERS).items()}


def _require_admin(exchange: Exchange) -> None:
    """An admin. Where no key is needed, a page of another site in a browser here is none."""
    exchange.admin()
    origin = exchange.headers.get(b"origin")
    foreign = origin is not None and _host(origin) != exchange.headers.get(b"host")
    if foreign and exchange.service.keys.open_to_all:
        raise PermissionDenied("Pages of other sites may not do this.", code="foreign_origin")


def _host(origin: bytes) -> bytes:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return b""


@contextmanager
def _faults_are_the_callers() -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise InvalidRequest(error.message, param=error.param, code="invalid_value") from None


def _breaker_order(body: dict[str, Any]) -> BreakerOrder:
    state = _given(body, ("state",), required="state")["state"]
    orders = get_args(BreakerOrder)
    if state not in orders:
        raise InvalidRequest.about(
            "state", f"'state' must be one of {', '.join(orders)}.", code="invalid_value"
        )
    return cast("BreakerOrder", state)


def _given(
    body: Mapping[str, Any], fields: Collection[str], required: str | None = None
) -> dict[str, Any]:
    """The fields that are given, all of them known; null is as if a field were not."""
    for name in body.keys() - set(fields):
        close = nearest(name, fields)
        hint = f"did you mean {close!r}?" if close else f"there are {', '.join(fields)}."
        raise InvalidRequest.about(
            name[:64], f"Unknown parameter: {name[:64]!r}; {hint}", code="unknown_parameter"
        )
    asked = {name: value for name, value in body.items() if value is not None}
    if required is not None and required not in asked:
        raise InvalidRequest.about(
            required,
            f"Missing required parameter: {required!r}.",
            code="missing_required_parameter",
        )
    return asked


def _key_fields(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a new key. InvalidRequest names the first that is wrong."""
    asked = _given(body, KEY_FIELDS, required="tenant")
    for name, value in asked.items():
        if not _fits(value, KEY_FIELDS[name]):
            wanted = KINDS[KEY_FIELDS[name]]
            raise InvalidRequest.about(
                name, f"Invalid type for {name!r}: expected {wanted}.", code="invalid_type"
            )
    for name in ("tenant", "id"):
        if name in asked and not is_name(asked[name]):
            raise InvalidRequest.about(
                name, f"{name!r} must be 1 to 128 letters, digits or ._:@-", code="invalid_value"
            )
    return asked


def _fits(value: Any, kind: type) -> bool:
    if kind is list:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    return isinstance(value, kind)


def _version(given: bytes | None) -> int | None:
    """The version that If-Match names, in quotes or bare; `*` is any, as if it were not there."""
    text = b"*" if given is None else given.strip()
    if text == b"*":
        return None
    bare = text.removeprefix(b"W/").strip(b'"')
    if not (bare.isdigit() and len(bare) <= 18):
        raise InvalidRequest.about(
            "If-Match", "If-Match must be a version, as GET /admin/config tells it."
        )
    return int(bare)
