"""The most that a request may use, known before it is called; and what is sent so that it holds.

Rule 1: pure and fast: no I/O, nothing is imported on the way, no body is written out as JSON where
        it is a plain chat.
Rule 2: a figure here is an upper bound. What is reserved and not used goes back; what would be
        used and was not reserved could break a limit.
Rule 3: what a caller asked for is only ever lowered, and only where a limit of tokens or money
        demands it.

A byte-level tokenizer makes no more tokens of a text than it has bytes in UTF-8; that bound needs
no tokenizer. For long texts a caller may give a tighter one.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from actors.rate_limiter.terms import Amount, Limits
from forebay.errors import BudgetExceeded, RequestTooLarge

if TYPE_CHECKING:
    from forebay.providers.prices import PriceBound, Rate
    from forebay.routing import Deployment

Tighter = Callable[[str], int]
"""An upper bound of the tokens of one text that is lower than its bytes; it may cost some time."""

LONG_BYTES = 4096
"""Shorter texts are worth no tokenizer."""
COUNTED_BYTES_MAX = 65_536
"""Most bytes of one request that a tokenizer sees (10 ms at worst); the rest count as bytes."""

# What chat templates, tool prompts and providers add; upper figures of those that are published.
PER_REQUEST = 32
PER_MESSAGE = 6
PER_TEXT = 8
PER_TOOLS = 600  # the system prompt that comes with tools (Anthropic's is up to 530)
PER_TOOL = 32
SEARCH_TOKENS = 8_000

IMAGE_TOKENS = 6_000
IMAGE_LOW_TOKENS = 3_000
IMAGE_ORIGINAL_TOKENS = 12_000
IMAGE_TOKENS_4O_MINI = 48_200  # 2,833 + 8 tiles of 5,667
AUDIO_LEAST = 256
AUDIO_CHARS_PER_TOKEN = 16  # base64; the densest is 32 tokens/s of 8 kbit/s
FILE_LEAST = 6_000
FILE_CHARS_PER_TOKEN = 4
FILE_BY_ID_TOKENS = 50_000

FIRST_GUESS = 1024
FIRST_GUESS_REASONING = 8192
"""Models that think before they answer need room for both."""
LEAST_GUESS = 256
GUESS_MOST = 131_072
GUESSES_MAX = 10_000
NAMES_MAX = 1_000  # of models that were looked at
GUESS_WINDOW = 64
GUESS_QUANTILE = 0.95

ASKED = ("max_tokens", "max_completion_tokens", "max_output_tokens")

_REASONS = re.compile(r"(^|[/.:])(o[134](-|$)|gpt-([5-9]|[1-9]\d)|codex-)")
_NO_TOKENS = frozenset(
    {
        *ASKED,
        *("model", "messages", "prompt", "input", "n", "best_of", "stream", "stream_options"),
        *("temperature", "top_p", "frequency_penalty", "presence_penalty", "seed", "user", "stop"),
        *("logprobs", "top_logprobs", "logit_bias", "metadata", "store", "service_tier"),
        *("parallel_tool_calls", "reasoning_effort", "verbosity", "modalities", "audio", "echo"),
        *("prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("safety_identifier", "moderation", "dimensions", "encoding_format", "timeout"),
    }
)
"""Parameters that put nothing into the prompt. All others count with their JSON."""

_DEARER = frozenset({"modalities", "audio", "service_tier", "web_search_options", "speed"})
"""Parameters that may make a token dearer than a token of text usually is."""


# -------------------------------------------------------------------------------- what is asked


def prompt_tokens(
    route: str,
    body: Mapping[str, Any],
    *,
    models: Collection[str] = (),
    tighter: Tighter | None = None,
) -> int:
    """The most tokens that the prompt of a checked `body` may be, for any of these models."""
    return _Prompt(models, tighter).measure(route, body).tokens


def asked_tokens(route: str, body: Mapping[str, Any]) -> int | None:
    """The most tokens that all choices may have by the caller's own words; None: it says nothing.

    The largest of `max_tokens`, `max_completion_tokens` and `max_output_tokens`, for each of `n`
    (or of `best_of`, where that is more). Embeddings have none.
    """
    each = _asked_each(route, body)
    return None if each is None else each * _choices(route, body)


def first_guess(body: Mapping[str, Any], model: str = "") -> int:
    """What to expect of an answer before anything is known."""
    thinking = body.get("thinking")
    budget: Any = thinking.get("budget_tokens") if isinstance(thinking, Mapping) else None
    if _is_count(budget):
        return min(GUESS_MOST, int(budget) + FIRST_GUESS)
    effort = body.get("reasoning_effort")
    if effort not in (None, "none", "minimal") or reasons(model):
        return FIRST_GUESS_REASONING
    return FIRST_GUESS


@lru_cache(maxsize=NAMES_MAX)
def reasons(model: str) -> bool:
    """Whether this is one of OpenAI's models that take `max_completion_tokens` only, by name."""
    return _REASONS.search(model) is not None


class Guess:
    """How long the answers are that a tenant gets from a model group, where nobody says.

    Owns the lengths of the last GUESS_WINDOW answers of each pair, for at most GUESSES_MAX pairs;
    the one that was used least recently is forgotten. The guess is twice their 95th percentile
    (nearest rank in a sliding window), so that an answer that is merely longer than usual is not
    cut; until there are enough of them, it is at least the first guess. Failure behaviour: none.
    """

    def __init__(self, pairs_max: int = GUESSES_MAX) -> None:
        self._pairs_max = pairs_max
        self._known: OrderedDict[tuple[str, str], _Lengths] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def guess(self, tenant: str, group: str, first: int = FIRST_GUESS) -> int:
        """Tokens that one choice is not expected to exceed."""
        lengths = self._known.get((tenant, group))
        if lengths is None:
            return first
        self._known.move_to_end((tenant, group))
        return lengths.guess if lengths.settled else max(first, lengths.guess)

    def learn(self, tenant: str, group: str, tokens: int, cut: bool, *, choices: int = 1) -> None:
        """An answer had `tokens` in all its choices; `cut`: our clamp ended it."""
        each = -(-max(0, tokens) // max(1, choices))
        key = (tenant, group)
        lengths = self._known.get(key)
        if lengths is None:
            if len(self._known) >= self._pairs_max:
                self._known.popitem(last=False)
            lengths = self._known[key] = _Lengths()
        self._known.move_to_end(key)
        lengths.add(min(GUESS_MOST, each * 2 if cut else each))


class _Lengths:
    """The lengths of the last answers, and the guess that comes of them."""

    __slots__ = ("_last", "_sorted", "guess")

    def __init__(self) -> None:
        self._last: deque[int] = deque()
        self._sorted: list[int] = []
        self.guess = 0

    @property
    def settled(self) -> bool:
        """Whether there are enough of them for a 95th percentile that is not simply the most."""
        return len(self._last) >= 1 / (1 - GUESS_QUANTILE)

    def add(self, tokens: int) -> None:
        if len(self._last) == GUESS_WINDOW:
            del self._sorted[bisect_left(self._sorted, self._last.popleft())]
        self._last.append(tokens)
        insort(self._sorted, tokens)
        rank = math.ceil(GUESS_QUANTILE * len(self._last)) - 1
        self.guess = min(GUESS_MOST, max(LEAST_GUESS, 2 * self._sorted[rank]))


# ------------------------------------------------------------------------------------ the bound


class Bound(NamedTuple):
    """The most that a request may use.

    `completion` is the most of one choice, `tokens` all of the request. `nano` is what that costs
    at most, None where money is not limited or no price is known. `clamp` is sent upstream, per
    choice, so that the bound holds; None: the body goes as it is. `rate` is what `nano` was
    reckoned with.
    """

    prompt: int
    completion: int
    choices: int
    asked: bool
    tokens: int
    nano: int | None = None
    clamp: int | None = None
    rate: Rate | None = None

    @property
    def amount(self) -> Amount:
        """What to reserve."""
        return Amount(self.tokens, self.nano or 0)


def bound(
    route: str,
    body: Mapping[str, Any],
    limits: Limits,
    guess: int,
    price: PriceBound | None = None,
    *,
    models: Collection[str] = (),
    tighter: Tighter | None = None,
) -> Bound:
    """The most that a checked `body` may use of what `limits` limit, at any of these models.

    `guess` is what a choice may have where the body says nothing. Where neither tokens nor money
    are limited nothing is clamped, and a guess is no more than that.

    Raises:
        RequestTooLarge: the prompt alone exceeds what the limit of tokens ever allows.
        BudgetExceeded: the shortest answer costs more than the limit of money ever allows.
    """
    prompt = _Prompt(models, tighter).measure(route, body)
    choices = _choices(route, body)
    asked = _asked_each(route, body)
    each = guess if asked is None else asked
    least = min(1, each)
    clamp: int | None = None
    if limits.tokens_per_minute is not None:
        room = (limits.tokens_most - prompt.tokens) // choices
        if room < least:
            raise _too_large(prompt.tokens, choices, limits)
        if asked is None:
            # An untouched bucket has its burst. A long prompt may use more than that, once all is
            # there: its answer is not cut to nothing.
            usual = (int(limits.token_burst) - prompt.tokens) // choices
            clamp = each = max(least, min(each, room, max(usual, LEAST_GUESS)))
        elif each > room:
            clamp = each = room
    nano, rate = None, None
    most = limits.nano_most
    if most is not None and price is not None:
        if asked is None:
            clamp = each
        rate = price.rate(prompt.tokens, prompt.is_plain)
        nano = rate.nano(prompt.tokens, each * choices)
        if nano > most:
            each = min(each, rate.affords(most, prompt.tokens) // choices)
            if each < least or least == 0:
                raise _too_dear(rate.nano(prompt.tokens, least * choices), limits)
            clamp = each
            nano = rate.nano(prompt.tokens, each * choices)
    tokens = prompt.tokens + each * choices
    return Bound(prompt.tokens, each, choices, asked is not None, tokens, nano, clamp, rate)


def most_nano(
    route: str, body: Mapping[str, Any], price: PriceBound, clamp: int | None, model: str
) -> int:
    """What a checked `body` costs at most, in nano-USD, whatever is limited or not."""
    prompt = _Prompt((model,), None).measure(route, body)
    each = _asked_each(route, body) if clamp is None else clamp
    most = (GUESS_MOST if each is None else each) * _choices(route, body)
    return price.rate(prompt.tokens, prompt.is_plain).nano(prompt.tokens, most)


def lowered(bound: Bound, nano_left: int) -> Bound | None:
    """The same request for the money that is left; None if that does not buy any answer."""
    if bound.nano is None or bound.rate is None or bound.nano <= nano_left:
        return bound
    each = min(bound.completion, bound.rate.affords(nano_left, bound.prompt) // bound.choices)
    if each < 1:
        return None
    tokens = bound.prompt + each * bound.choices
    nano = bound.rate.nano(bound.prompt, each * bound.choices)
    return bound._replace(completion=each, clamp=each, tokens=tokens, nano=nano)


def clamped(
    route: str, body: dict[str, Any], bound: Bound, deployment: Deployment
) -> dict[str, Any]:
    """The body to send: `body` itself, or a copy whose answer can be no longer than the bound.

    The parameters that the caller, or the deployment's own `litellm_params`, give are lowered,
    never raised; without any, the one that the model takes is added.
    """
    clamp = bound.clamp
    if clamp is None or route == "embedding":
        return body
    own = deployment.params
    given = {
        name: body[name] if body.get(name) is not None else own[name]
        for name in ASKED
        if body.get(name) is not None or own.get(name) is not None
    }
    if not given:
        chat_only = route == "chat" and reasons(deployment.model)
        return {**body, "max_completion_tokens" if chat_only else "max_tokens": clamp}
    lower = {n: min(v, clamp) if _is_count(v) else clamp for n, v in given.items()}
    return {**body, **lower}


def used(usage: Mapping[str, Any] | None, bound: Bound) -> int:
    """The tokens that a request used; the whole bound where the provider does not say."""
    if not usage:
        return bound.tokens
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if prompt is None and completion is None:
        total = usage.get("total_tokens")
        return bound.tokens if total is None else max(0, int(total))
    return max(0, int(prompt or 0)) + max(0, int(completion or 0))


# ------------------------------------------------------------------------- deployments' own limits


def deployment_limits(rpm: int | None, tpm: int | None, version: int = 0) -> Limits | None:
    """The limits of a deployment: a provider's own quota, which no 60 s may exceed."""
    if rpm is None and tpm is None:
        return None
    return Limits(
        requests_per_minute=None if rpm is None else float(rpm),
        burst=max(1, (rpm or 0) // 20),
        tokens_per_minute=tpm,
        hard_minute=True,
        version=version,
    )


def fits(bound: Bound, limits: Limits) -> Amount:
    """What to reserve of a deployment's `tpm`: never more than there can be.

    A bound is an estimate here, for nobody's answer is cut for a deployment's sake. One that
    exceeds the quota takes all of it.
    """
    if limits.tokens_per_minute is None:
        return Amount()
    return Amount(min(bound.tokens, limits.tokens_most))


# --------------------------------------------------------------------------------------- prompts


class _Prompt:
    """The measuring of one prompt: `tokens` at most, and whether it `is_plain` text."""

    __slots__ = ("_counted", "_models", "_tighter", "is_plain", "tokens")

    def __init__(self, models: Collection[str], tighter: Tighter | None) -> None:
        self._models = models
        self._tighter = tighter
        self._counted = 0
        self.tokens = 0
        self.is_plain = True

    def measure(self, route: str, body: Mapping[str, Any]) -> _Prompt:
        self.tokens += PER_REQUEST
        if route == "chat":
            for message in body["messages"]:
                self.tokens += PER_MESSAGE
                for name, value in message.items():
                    if type(value) is str:
                        self._text(value)
                    elif value is not None:
                        self._field(name, value)
        else:
            self._texts(body["prompt" if route == "completion" else "input"])
        if not body.keys() <= _NO_TOKENS:
            for name in body.keys() - _NO_TOKENS:
                if body[name] is not None:
                    self._parameter(name, body[name])
        if not _DEARER.isdisjoint(body):
            self.is_plain = False
        return self

    def _text(self, text: str) -> None:
        length = len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
        counts = self._tighter is not None and self._counted + length <= COUNTED_BYTES_MAX
        if length > LONG_BYTES and counts:
            assert self._tighter is not None
            self._counted += length
            length = min(length, self._tighter(text))
        self.tokens += length

    def _texts(self, given: Any) -> None:
        """A text, several, token ids, or several lists of those."""
        if type(given) is str:
            self.tokens += PER_TEXT
            self._text(given)
            return
        several = bool(given) and not isinstance(given[0], int)
        self.tokens += PER_TEXT * (len(given) if several else 1)
        if not several:
            self.tokens += len(given)
        elif isinstance(given[0], str):
            longest = max(map(len, given))
            if longest <= LONG_BYTES and all(map(str.isascii, given)):
                self.tokens += sum(map(len, given))
            else:
                for text in given:
                    self._text(text)
        else:
            self.tokens += sum(map(len, given))

    def _field(self, name: str, value: Any) -> None:
        """A field of a message that is no text."""
        if name == "content" and isinstance(value, list):
            for part in value:
                self._part(part)
            return
        if name in ("audio", "images"):
            self.is_plain = False
            self.tokens += IMAGE_TOKENS
        self._json(value)

    def _part(self, part: Mapping[str, Any]) -> None:
        self.tokens += PER_TEXT
        kind = part["type"]
        if "cache_control" in part or kind not in ("text", "refusal"):
            self.is_plain = False
        if kind in ("text", "refusal"):
            self._text(part[kind])
        elif kind == "image_url":
            self.tokens += _image_tokens(part["image_url"].get("detail"), self._models)
        elif kind == "input_audio":
            chars = len(part["input_audio"]["data"])
            self.tokens += AUDIO_LEAST + chars // AUDIO_CHARS_PER_TOKEN
        elif kind == "file" and part["file"].get("file_data"):
            chars = len(part["file"]["file_data"])
            self.tokens += FILE_LEAST + chars // FILE_CHARS_PER_TOKEN
        else:
            self.tokens += FILE_BY_ID_TOKENS

    def _parameter(self, name: str, value: Any) -> None:
        if name in ("tools", "functions") and value:
            self.tokens += PER_TOOLS + PER_TOOL * len(value)
        elif name == "web_search_options":
            self.tokens += SEARCH_TOKENS
        self._json(value)

    def _json(self, value: Any) -> None:
        """JSON with escapes: what a template may make of a value, at its longest."""
        text = json.dumps(value, default=str, skipkeys=True)
        if '"cache_control"' in text:
            self.is_plain = False
        self._text(text)


def _image_tokens(detail: str | None, models: Collection[str]) -> int:
    if detail == "low":
        return IMAGE_LOW_TOKENS
    if any("4o-mini" in model for model in models):
        return IMAGE_TOKENS_4O_MINI
    return IMAGE_ORIGINAL_TOKENS if detail == "original" else IMAGE_TOKENS


def _choices(route: str, body: Mapping[str, Any]) -> int:
    if route == "embedding":
        return 1
    choices: int = max(body.get("n") or 1, body.get("best_of") or 1)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        choices *= len(prompt)
    return choices


def _asked_each(route: str, body: Mapping[str, Any]) -> int | None:
    if route == "embedding":
        return 0
    given = [body[name] for name in ASKED if _is_count(body.get(name))]
    return max(given) if given else None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


# ---------------------------------------------------------------------------------------- refusals


def _too_large(prompt: int, choices: int, limits: Limits) -> RequestTooLarge:
    answer = f" and {choices} answers" if choices > 1 else ""
    return RequestTooLarge(
        f"a prompt of up to {prompt} tokens{answer} can never fit: with tokens_per_minute "
        f"{limits.tokens_per_minute} one request may use {limits.tokens_most} at most; send a "
        "shorter prompt, or have the limit raised",
        code="tokens_over_limit",
    )


def _too_dear(nano: int, limits: Limits) -> BudgetExceeded:
    day, most = limits.day_nano, limits.nano_most or 0
    kind = "usd_per_day" if day is not None and day <= most else "usd_per_month"
    return BudgetExceeded(
        f"this request can never fit: the shortest answer costs up to ${nano / 1e9:.6f}, and "
        f"{kind} is ${most / 1e9:g}; send a shorter prompt, ask for fewer choices or a cheaper "
        "model, or have the limit raised",
        code="cost_over_limit",
    )
