"""Whether a provider's answer is what was asked for, and fit to be handed on.

Rule 1: a rule is broken (an error) or bent (a warning); the level decides what follows.
Rule 2: what is checked, how, and what bounds it, is in `checks`, one kind of rule to a file.
Rule 3: validators of the operator's own run in the request's own process and are trusted; one
        that fails bends the rules and does not fail the request.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache, partial
from importlib.metadata import EntryPoint, entry_points
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from forebay.checks import content
from forebay.checks.finding import RULES, Finding
from forebay.checks.patterns import Pattern
from forebay.checks.shape import shape, texts_of
from forebay.errors import ConfigurationError, ResponseValidationError

if TYPE_CHECKING:
    from forebay.config import GatewayConfig

__all__ = [
    "Evaluation",
    "Finding",
    "Judgement",
    "ValidationLevel",
    "ValidationManager",
    "findings",
    "offered",
    "validate",
]

OWN_RULES_MAX = 64
"""Most validators, and most blocked patterns, of one process."""
FINDINGS_MAX = 20
"""Most findings told of one answer."""
MESSAGE_CHARS_MAX = 300
ENTRY_POINTS = "forebay.validators"
"""Installed packages offer validators to configurations under this group of entry points."""

Validator = Callable[[str, Mapping[str, Any]], str | Iterable[str] | None]
"""Given the text of a choice and the request: what is wrong with it, None or nothing if it is
fine. It must be quick: the request, and others of its process, wait for it."""


class ValidationLevel(StrEnum):
    """strict raises on everything, moderate on errors, lenient on nothing."""

    STRICT = "strict"
    MODERATE = "moderate"
    LENIENT = "lenient"


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was found out about an answer, for whoever listens: OpenTelemetry's
    `gen_ai.evaluation.result`.

    `name` is a rule, `validation` for all of them together, or `feedback.` and its type. `label`
    is pass, warn or fail; `score` is 0 to 1, None where there is none. `explanation` quotes
    nothing of the answer.
    """

    name: str
    label: str
    score: float | None
    explanation: str
    tenant: str
    model: str
    response_id: str
    request_id: str


Listener = Callable[[Evaluation], None]


class Judgement(NamedTuple):
    """What an answer's findings come to at a level."""

    findings: tuple[Finding, ...]
    level: ValidationLevel

    @property
    def fatal(self) -> list[str]:
        """Why the answer is not to be handed on; empty if it may be."""
        if self.level is ValidationLevel.LENIENT:
            return []
        strict = self.level is ValidationLevel.STRICT
        return [finding.message for finding in self.findings if strict or finding.broken]

    @property
    def repairable(self) -> bool:
        """Whether asking once more may help: it does not for more room, or for more goodwill."""
        hopeless = ("truncated", "refusal")
        return bool(self.fatal) and any(one.rule not in hopeless for one in self.findings)

    def and_also(self, more: Iterable[Finding]) -> Judgement:
        """The same with more findings."""
        return Judgement((*self.findings, *more), self.level)

    @property
    def broken(self) -> bool:
        """Whether a rule is broken, whatever the level makes of it."""
        return bool(self.fatal) or any(finding.broken for finding in self.findings)

    @property
    def warnings(self) -> list[str]:
        return [finding.message for finding in self.findings]

    def require(self, model: str | None) -> list[str]:
        """The warnings. Raises ResponseValidationError (502) where the level does not let it by."""
        if not self.findings:
            return []
        fatal = self.fatal
        if fatal:
            message = "The provider's answer is not valid: " + "; ".join(fatal) + "."
            raise ResponseValidationError(message, model=model)
        return self.warnings


def findings(body: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Finding]:
    """Every finding about the shape of the OpenAI-shaped answer `body`. Decides nothing."""
    return shape(body, request)


def validate(body: Mapping[str, Any], request: Mapping[str, Any], level: str) -> list[str]:
    """What is wrong with the shape of the OpenAI-shaped answer `body`: one sentence each.

    Raises ResponseValidationError (502) at level strict for any finding, at moderate for broken
    rules: no choices, an empty answer, JSON that was asked for and is none or does not fit its
    schema, tool calls that cannot be made.
    """
    judgement = Judgement(tuple(findings(body, request)), ValidationLevel(level))
    return judgement.require(body.get("model"))


class ValidationManager:
    """`gateway.validation_manager`: all rules, the operator's own among them.

    `rules` says which they are, "" for the usual ones: an answer that was judged by others is not
    taken for one that these would have let by. Validators are told apart by their names.

    Owns the rules of this process: OWN_RULES_MAX validators and as many patterns, those of the
    configuration and those added here. An answer is looked at up to `content.CHARS_MAX` characters
    a choice, and by a pattern of many states up to its `chars_max`, which is a warning. Its methods
    may be called from any thread.

    Failure behaviour: none of its own; see Rule 3.
    """

    def __init__(
        self,
        gateway: GatewayConfig | None = None,
        listener: Listener | None = None,
    ) -> None:
        """`listener` hears of every evaluation; it must be quick, and must not raise."""
        self.listener = listener
        self._added: dict[str, Validator] = {}
        self._added_patterns: dict[str, tuple[Pattern, bool]] = {}
        self._told: dict[str, Validator] = {}
        self._told_patterns: dict[str, tuple[Pattern, bool]] = {}
        self._validators: dict[str, Validator] = {}
        self._patterns: dict[str, tuple[Pattern, bool]] = {}
        self._off: frozenset[str] = frozenset()
        self._moderation = ""
        self._enabled = True
        self.rules = ""
        self._judged = self._invalid = 0
        self._found: Counter[tuple[str, bool]] = Counter()
        self.level = ValidationLevel.MODERATE
        if gateway is not None:
            self.configure(gateway)

    def configure(
        self,
        gateway: GatewayConfig,
        find: Callable[[str], Validator | None] | None = None,
    ) -> None:
        """Go by this configuration from now on; what was added by hand stays, and goes first.

        `find` gets a validator by its name; without it, installed packages are asked.

        Raises:
            ConfigurationError: a validator is offered by nobody, or is no plain function.
        """
        told = gateway.validation
        self._told = {
            name: self._added.get(name) or _required(name, find or offered)
            for name in told.validators
        }
        self._told_patterns = {
            name: (Pattern(text), True) for name, text in told.blocked_patterns.items()
        }
        self.level = gateway.validation_level
        self._off = frozenset(told.off)
        self._moderation = told.moderation_model or ""
        self._enabled = gateway.enable_validation
        self._merge()

    def add_validator(self, name: str, validator: Validator) -> None:
        """Have `validator(text, request)` look at each choice's text, from now on.

        It returns what is wrong (a str, or several), or None. Finding something breaks the rules.

        Raises:
            ConfigurationError: it cannot be called, is `async`, or there are OWN_RULES_MAX.
        """
        _require_callable(name, validator)
        _require_room(name, self._validators, "validators")
        self._added[name] = validator
        self._merge()

    def add_blocked_pattern(self, name: str, pattern: str, *, broken: bool = True) -> None:
        """Look for a regular expression in each choice's text from now on.

        `name` is what findings say, never the match. With `broken=False` it is only a warning.

        Raises:
            ConfigurationError: it is no pattern of linear time, or there are OWN_RULES_MAX.
        """
        _require_room(name, self._patterns, "blocked patterns")
        try:
            compiled = Pattern(pattern)
        except ValueError as error:
            raise ConfigurationError(f"pattern {name!r}: {error}", param="pattern") from None
        self._added_patterns[name] = (compiled, broken)
        self._merge()

    def remove(self, name: str) -> bool:
        """Take back what was added under this name. Whether there was something."""
        taken = [kind.pop(name, None) for kind in (self._added, self._added_patterns)]
        self._merge()
        return any(one is not None for one in taken)

    def _merge(self) -> None:
        """Replaced as a whole, since other threads may be reading them."""
        self._validators = {**self._told, **self._added}
        self._patterns = {**self._told_patterns, **self._added_patterns}
        patterns = sorted((name, one.text) for name, (one, _) in self._patterns.items())
        own = [sorted(self._off), patterns, sorted(self._validators), self._moderation]
        if not self._enabled:
            self.rules = " unjudged"
        else:
            self.rules = f" {own}" if any(own) else ""

    def validate(
        self,
        answer: Mapping[str, Any] | str,
        request: Mapping[str, Any] | None = None,
        level: str | None = None,
    ) -> Judgement:
        """What all rules say of an answer: a text, or an OpenAI-shaped object. Raises nothing."""
        body: Mapping[str, Any] = (
            {"choices": [{"text": answer}]} if isinstance(answer, str) else answer
        )
        found = self._findings(body, request or {})
        kept = tuple(islice(found, FINDINGS_MAX))
        return Judgement(kept, self.level if level is None else ValidationLevel(level))

    def judge(
        self,
        body: Mapping[str, Any],
        request: Mapping[str, Any],
        *,
        tenant: str = "",
        request_id: str = "",
    ) -> Judgement:
        """As `validate`, and counted, and told to who listens."""
        judgement = self.validate(body, request)
        self.tell(judgement, body, tenant=tenant, request_id=request_id)
        return judgement

    def tell(
        self, judgement: Judgement, body: Mapping[str, Any], *, tenant: str, request_id: str
    ) -> None:
        """Count a judgement, and tell it to who listens."""
        self._judged += 1
        if judgement.findings:
            self._invalid += judgement.broken
            for one in judgement.findings:
                self._found[one.rule, one.broken] += 1
        if self.listener is None:
            return
        details = (tenant, str(body.get("model") or ""), str(body.get("id") or ""), request_id)
        for one in judgement.findings:
            label = "fail" if one.broken else "warn"
            self.listener(Evaluation(one.rule, label, None, one.message, *details))
        label = "fail" if judgement.broken else "warn" if judgement.findings else "pass"
        score = {"pass": 1.0, "warn": 0.5, "fail": 0.0}[label]
        whole = "; ".join(judgement.warnings)
        self.listener(Evaluation("validation", label, score, whole, *details))

    def stats(self) -> dict[str, Any]:
        """The level, the operator's rules, and what was found, by rule."""
        return {
            "level": self.level.value,
            "judged": self._judged,
            "invalid": self._invalid,
            "findings": {rule: n for rule in RULES if (n := self._count_of(rule))},
            "validators": sorted(self._validators),
            "blocked_patterns": sorted(self._patterns),
            "off": sorted(self._off),
        }

    def figures(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """What was found since this process began, for its metrics."""
        return {
            ("forebay_validation_findings", rule, "error" if broken else "warning"): (count,)
            for (rule, broken), count in self._found.copy().items()
        }

    def _count_of(self, rule: str) -> int:
        return self._found[rule, True] + self._found[rule, False]

    def _findings(self, body: Mapping[str, Any], request: Mapping[str, Any]) -> Iterator[Finding]:
        off = self._off
        for finding in shape(body, request):
            if finding.rule not in off:
                yield finding
        for whole in texts_of(body):
            text = whole[: content.CHARS_MAX]
            if content.may_hold(text):
                yield from self._said(text, request)
            for name, (pattern, broken) in self._patterns.items():
                if pattern.is_in(text[: pattern.chars_max]):
                    yield Finding(f"the answer holds what {name!r} blocks", broken, "blocked")
                elif pattern.chars_max < len(text):
                    begun = f"only {pattern.chars_max} characters were searched for {name!r}"
                    yield Finding(begun, False, "blocked")
            for name, validator in self._validators.items():
                yield from _own(name, validator, text, request)

    def _said(self, text: str, request: Mapping[str, Any]) -> Iterator[Finding]:
        off, said = self._off, cache(partial(content.said, request))
        if "secret" not in off:
            yield from content.secrets(text, said)
        if "pii" not in off:
            yield from content.personal_data(text, said)
        if "markup" not in off:
            yield from content.unsafe_markup(text)


def _own(
    name: str, validator: Validator, text: str, request: Mapping[str, Any]
) -> Iterator[Finding]:
    try:
        told = validator(text, request)
        wrong: Sequence[str] = [told] if isinstance(told, str) else list(told or ())
    except (Exception, SystemExit) as error:  # noqa: BLE001 - somebody else's code; and it is paid
        yield Finding(f"validator {name!r} failed: {type(error).__name__}", False, "validator")
        return
    for message in wrong:
        yield Finding(f"{name}: {message}"[:MESSAGE_CHARS_MAX], True, "validator")


def _required(name: str, find: Callable[[str], Validator | None]) -> Validator:
    found = find(name)
    if found is None:
        raise ConfigurationError(
            f"validation.validators: no installed package offers {name!r} under the entry points "
            f"{ENTRY_POINTS!r}; install it, or use gateway.validation_manager.add_validator",
            param="validation",
        )
    _require_callable(name, found)
    return found


def _require_callable(name: str, validator: Any) -> None:
    if not callable(validator) or inspect.iscoroutinefunction(validator):
        raise ConfigurationError(
            f"validator {name!r} must be a plain function f(text, request) that answers at once",
            param="validation",
        )


def offered(
    name: str, points: Callable[..., Iterable[EntryPoint]] = entry_points
) -> Validator | None:
    """The validator that an installed package offers under this name.

    Raises:
        ConfigurationError: it cannot be loaded.
    """
    for point in points(group=ENTRY_POINTS, name=name):
        try:
            found: Validator = point.load()
        except Exception as error:  # noqa: BLE001 - importing runs somebody else's code
            raise ConfigurationError(
                f"validation.validators: {name!r} cannot be loaded: {error!r}", param="validation"
            ) from None
        return found
    return None


def _require_room(name: str, rules: Mapping[str, Any], what: str) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigurationError("name must be a non-empty string", param="name")
    if name not in rules and len(rules) >= OWN_RULES_MAX:
        raise ConfigurationError(f"there are {OWN_RULES_MAX} {what}, which is the most")
