"""What goes wrong, and when.

A request's behaviour is laid together from four sheets, the later over the earlier:
the base (`POST /control/script {"latency": 0.1}`), the first rule that matches and has a count
left (`{"status": 503, "count": 3}`: any of `count`, `probability`, `route`, `model`, `text`, `key`
makes it a rule), the model name (`sim-500`, `sim-latency=0.2+tokens=40`), and words in the prompt
(`[[status=429 retry-after=2]]`).
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tests.support.simulator.log import hash_credential

RULES_MAX = 1000
_MAGIC = re.compile(r"\[\[\s*([^\[\]]{1,500}?)\s*\]\]")
_ITEM = re.compile(r"""([A-Za-z][\w-]*)(?:=("[^"]*"|'[^']*'|\S+))?""")


class ScriptError(ValueError):
    """A word that no script knows, or a value of the wrong kind."""


@dataclass(frozen=True, slots=True)
class Behaviour:
    """How one request is treated. All defaults: at once, whole, right, and status 200.

    status, code, message   an error answer in the dialect's shape
    retry_after             seconds, or "date+N": an HTTP date N seconds ahead
    latency                 s before the answer; median of a log-normal when `sigma` > 0
    latency_per_text        s more for every text of an embedding request
    interval                s between stream chunks
    cut_after               chunks, then the connection is closed (`cut=clean`: the body ends well,
                            without [DONE]); a plain answer loses its second half
    malformed_at            this chunk (from 0) makes no sense; of a plain answer, the body is half
    malformed               how the chunk is: "half" a JSON object, "text", without "choices", of
                            wrong "types", no "utf8", an "error" event, or "huge" (9 MiB)
    stall_after, stall      chunks, then silence for `stall` s (None: until the client goes);
                            `stall_after=0` is a slow first token
    reset                   TCP reset "before" the head, or "after" it
    tool                    call this tool ("" = the first one given)
    answer, echo, tokens    the answer's text; the prompt itself; the answer's length
    usage                   "honest", or "missing"
    dims                    embedding dimensions when the request asks for none
    leak                    error texts quote the caller's key, as careless providers do
    poison                  400 for the whole list
    """

    status: int | None = None
    code: str | None = None
    message: str | None = None
    retry_after: str | None = None
    retry_after_ms: int | None = None
    latency: float = 0.0
    sigma: float = 0.0
    latency_per_text: float = 0.0
    interval: float = 0.0
    cut_after: int | None = None
    cut: Literal["abort", "clean"] = "abort"
    malformed_at: int | None = None
    malformed: Literal["half", "text", "choices", "types", "utf8", "error", "huge"] = "half"
    stall_after: int | None = None
    stall: float | None = None
    reset: Literal["before", "after"] | None = None
    tool: str | None = None
    answer: str | None = None
    echo: bool = False
    tokens: int | None = None
    usage: Literal["honest", "missing"] = "honest"
    dims: int | None = None
    leak: bool = False
    poison: bool = False
    log_bodies: bool = False

    @property
    def whole(self) -> bool:
        """Nothing breaks off: the answer can go out in one write."""
        return self.cut_after is None and self.stall_after is None and self.reset is None

    @property
    def plain(self) -> bool:
        """Whole, and there is nothing to wait for."""
        return self.whole and not (self.latency or self.latency_per_text or self.interval)


@dataclass(slots=True)
class Rule:
    """Overrides for requests that match, `count` times (None: always).

    `key` is the caller's, given plainly and kept as the hash that the log has.
    """

    overrides: dict[str, Any]
    count: int | None = None
    probability: float = 1.0
    route: str | None = None
    model: str | None = None
    text: str | None = None
    key: str | None = None

    def __post_init__(self) -> None:
        if self.key is not None:
            self.key = hash_credential(self.key)

    def matches(self, route: str, model: str, text: str, credential: str | None) -> bool:
        return (
            self.count != 0
            and (self.route is None or self.route == route)
            and (self.model is None or self.model == model)
            and (self.text is None or self.text in text)
            and (self.key is None or self.key == credential)
        )


@dataclass(slots=True)
class Settings:
    """What holds for the server, not for one request.

    `concurrency` requests at once, the others queue or get 429 (`over`); `seed` of all chance;
    bounds on embedding requests as OpenAI has them; `prefix_cache` tokens of prompts that begin
    alike are cached (None: nothing is, and nothing of it is logged).
    """

    concurrency: int | None = None
    over: Literal["queue", "429"] = "queue"
    over_retry_after: str | None = "1"
    seed: int = 0
    texts_max: int = 2048
    text_tokens_max: int = 8192
    request_tokens_max: int = 300_000
    prefix_cache: int | None = None


BASE = Behaviour()
_BEHAVIOUR = {field.name: str(field.type) for field in dataclasses.fields(Behaviour)}
_SETTINGS = {field.name: str(field.type) for field in dataclasses.fields(Settings)}
_SELECTORS = {"count": "int", "probability": "float"}
_SELECTORS |= dict.fromkeys(("route", "model", "text", "key"), "str")


class Script:
    """Owns base, rules, settings and the dice. Bounded by RULES_MAX rules, then ScriptError.

    Failure behaviour: none of it outlives the process; a restarted simulator behaves well.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.base = BASE
        self.settings = Settings()
        self.rules: list[Rule] = []
        self.dice = random.Random(0)

    def apply(self, document: Mapping[str, Any]) -> None:
        """Take one posted object: settings, base, or a rule. All of it or, on error, nothing."""
        overrides: dict[str, Any] = {}
        selectors: dict[str, Any] = {}
        settings: dict[str, Any] = {}
        for given, value in document.items():
            name = given.replace("-", "_")
            if name in _SELECTORS:
                selectors[name] = _convert(name, value, _SELECTORS[name])
            elif name in _SETTINGS:
                settings[name] = _convert(name, value, _SETTINGS[name])
            else:
                overrides.update(_override(name, value))
        if selectors:
            if len(self.rules) >= RULES_MAX:
                raise ScriptError(f"more than {RULES_MAX} rules")
            self.rules.append(Rule(overrides, **selectors))
        else:
            self.base = dataclasses.replace(self.base, **overrides)
        for name, value in settings.items():
            setattr(self.settings, name, value)
        if "seed" in settings:
            self.dice = random.Random(self.settings.seed)

    def describe(self) -> dict[str, Any]:
        return {
            "base": dataclasses.asdict(self.base),
            "rules": [dataclasses.asdict(rule) for rule in self.rules],
            "settings": dataclasses.asdict(self.settings),
        }

    def decide(
        self, route: str, model: str, text: str, magic: bool, credential: str | None = None
    ) -> Behaviour:
        """The behaviour of one request; uses up one count of the rule that matched."""
        overrides: dict[str, Any] = {}
        for rule in self.rules:
            if not rule.matches(route, model, text, credential):
                continue
            if rule.probability < 1.0 and self.dice.random() >= rule.probability:
                continue
            if rule.count is not None:
                rule.count -= 1
            overrides.update(rule.overrides)
            break
        if "sim-" in model:
            overrides.update(from_model(model))
        if magic:
            overrides.update(from_text(text))
        return dataclasses.replace(self.base, **overrides) if overrides else self.base

    def delay_s(self, behaviour: Behaviour, texts: int) -> float:
        """Seconds before this answer: median x exp(sigma N(0, 1)), plus the share of each text."""
        latency = behaviour.latency
        if behaviour.sigma and latency:
            latency *= math.exp(behaviour.sigma * self.dice.gauss(0.0, 1.0))
        return latency + behaviour.latency_per_text * texts


def from_model(model: str) -> dict[str, Any]:
    """`sim-503`, or `sim-` and `word=value` joined by `+`; any other name says nothing."""
    words = model.rsplit("/", 1)[-1].removeprefix("sim-")
    if words.isdigit():
        return {"status": int(words)}
    overrides: dict[str, Any] = {}
    if "=" in words:
        for item in words.split("+"):
            name, _, value = item.partition("=")
            overrides.update(_override(name, value))
    return overrides


def from_text(text: str) -> dict[str, Any]:
    """What `[[word=value word ...]]` asks for. Brackets without a word we know are just text."""
    overrides: dict[str, Any] = {}
    for found in _MAGIC.finditer(text):
        items = _ITEM.findall(found[1])
        if not any(name.replace("-", "_") in _BEHAVIOUR for name, _ in items):
            continue
        for name, value in items:
            overrides.update(_override(name, value.strip("\"'") if value else True))
    return overrides


def _override(name: str, value: Any) -> dict[str, Any]:
    name = name.replace("-", "_")
    if name not in _BEHAVIOUR:
        raise ScriptError(f"unknown script word {name!r}; known: {', '.join(sorted(_BEHAVIOUR))}")
    return {name: _convert(name, value, _BEHAVIOUR[name])}


def _convert(name: str, value: Any, kind: str) -> Any:
    """A value of the field's type, from JSON or from text."""
    if value is None and "None" in kind:
        return None
    if kind.startswith("Literal"):
        choices = re.findall(r"'([^']*)'|\"([^\"]*)\"", kind)
        if str(value) not in {a or b for a, b in choices}:
            raise ScriptError(f"{name}: {value!r} is not one of {kind}")
        return str(value)
    try:
        match kind.removesuffix(" | None"):
            case "bool":
                return value if isinstance(value, bool) else str(value).lower() in ("1", "true")
            case "int":
                return int(value)
            case "float":
                return float(value)
            case _:
                return "" if value is True else str(value)
    except (TypeError, ValueError):
        raise ScriptError(f"{name}: {value!r} is not {kind}") from None
