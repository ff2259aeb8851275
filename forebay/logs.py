"""Forebay's log as JSON, a line for each record; and a record for each request, as configured.

Rule 1: no prompt, no answer, no key: a request's record has its figures, and every text passes
        `redact`.
Rule 2: a library does not configure logging. `install` is for processes that are ours.
"""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

import orjson

from forebay.codec import tokens_in
from forebay.ended import Ended
from forebay.providers.redaction import redact

Wanted = Literal["none", "failed", "all"]
Level = Literal["debug", "info", "warning", "error"]

CHARS_MAX = 8_000
"""Of a message, and of a traceback, whose end says the most."""
NAME_CHARS_MAX = 200
ROOT = "forebay"
PACKAGES = (ROOT, "actors", "deployments")
PLAIN = (str, int, float, bool, type(None))

LINES_PER_S_MAX = 100
"""Of failed requests, where only those are told; an outage would fill the disk."""

requests_log = logging.getLogger(f"{ROOT}.requests")
requests_log.addHandler(logging.NullHandler())  # else Python prints errors that nobody asked for


class RequestLog:
    """A record of each request that is over, or of those that failed by our fault or a provider's
    (5xx), LINES_PER_S_MAX a second; its fields are in the record's `fields`. `left_out` tells how
    many failed requests had none since the last one.
    """

    def __init__(self, wanted: Wanted = "failed") -> None:
        self._all = wanted == "all"
        self._failed = wanted != "none"
        self._second = 0
        self._lines = 0
        self._left_out = 0

    def wants(self, status: str) -> bool:
        """Whether a request that ended so is to be told."""
        return self._all or (self._failed and _is_failure(status))

    def ended(self, ended: Ended, trace_id: str | None = None) -> None:
        level = logging.ERROR if _is_failure(ended.status) else logging.INFO
        if not requests_log.isEnabledFor(level) or not self._has_room(ended.ended_s):
            return
        fields = request_fields(ended)
        if trace_id is not None:
            fields["trace_id"] = trace_id
        if self._left_out:
            fields["left_out"], self._left_out = self._left_out, 0
        requests_log.log(level, "request", extra={"fields": fields})

    def _has_room(self, now: float) -> bool:
        if self._second != int(now):
            self._second, self._lines = int(now), 0
        self._lines += 1
        if self._all or self._lines <= LINES_PER_S_MAX:
            return True
        self._left_out += 1
        return False


def _is_failure(status: str) -> bool:
    return status[0] == "5" or status == "error"


def request_fields(ended: Ended) -> dict[str, Any]:
    """What is told of a request. Times are in ms, money in USD."""
    call, facts = ended.call, ended.facts
    fields: dict[str, Any] = {
        "request_id": call.request_id,
        "tenant": call.tenant,
        "route": call.route,
        "model": ended.model if facts is None else facts.group,
        "status": ended.status,
        "stream": ended.streams,
        "duration_ms": _ms(ended.ended_s - ended.started_s),
    }
    if facts is not None:
        fields |= {
            "deployment": facts.deployment,
            "cache": facts.cache,
            "attempts": facts.attempts,
            "retries": facts.retries,
            "fallbacks": facts.fallbacks,
            "provider_ms": _ms(facts.provider_s),
            "overhead_ms": _ms(facts.overhead_s),
            "cost_usd": None if facts.cost_nano is None else facts.cost_nano / 1e9,
            "config_version": facts.config_version,
        }
    if ended.first_chunk_s is not None:
        fields["first_chunk_ms"] = _ms(ended.first_chunk_s)
    if ended.answer is not None:
        sent, given = tokens_in(ended.answer.usage)
        fields |= {"prompt_tokens": sent, "completion_tokens": given}
    errors = [tried.error for tried in ended.tried if tried.error is not None]
    return {**fields, "errors": errors} if errors else fields


class JsonLines(logging.Formatter):
    """A record as one line of JSON: `time` (UTC), `level`, `logger`, `message`, the record's
    `fields`, and `error`, a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC)
        line: dict[str, Any] = {
            "time": at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": redact(record.getMessage())[:CHARS_MAX],
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            line |= {name: _plain(value) for name, value in fields.items() if name not in line}
        if record.exc_info:
            line["error"] = redact(self.formatException(record.exc_info))[-CHARS_MAX:]
        return orjson.dumps(line).decode()


def install(stream: TextIO | None = None) -> None:
    """Have Forebay's records, from INFO on, go to `stream` (stderr) as JSON, and nowhere else."""
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    handler.setFormatter(JsonLines())
    for name in PACKAGES:
        logger = logging.getLogger(name)
        logger.handlers = [handler]
        logger.propagate = False
    obey("info")


def obey(level: Level) -> None:
    """Have only records of this level, and above it, from now on."""
    for name in PACKAGES:
        logging.getLogger(name).setLevel(level.upper())


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return redact(value)[:NAME_CHARS_MAX]
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value if isinstance(value, PLAIN) else type(value).__name__
