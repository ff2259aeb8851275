"""What people think of answers, and what follows from it.

Rule 1: feedback is about a response that its tenant was given; nobody rates another's.
Rule 2: it is in the ledger before it is acknowledged, and is never changed.
Rule 3: a score says how good an answer was: a rating or `useful` has one; a correction or an error
        says that it was wrong, which is 0; an improvement says nothing of it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from actors.ledger.policy import SCORE_MAX, Feedback, Rating, Recorded
from actors.ref import OwnerUnavailable
from forebay.errors import InvalidRequest, Overloaded
from forebay.schemas import GenerateResponse
from forebay.validation import Evaluation, Listener

if TYPE_CHECKING:
    from actors.ledger.desk import LedgerDesk

CONTENT_CHARS_MAX = 10_000
TEXT_CHARS_KEPT = 4_000
"""Of the query and the response that somebody sends along, so much is kept."""
ID_CHARS_MAX = 128
RESPONSE_ID_CHARS_MAX = 200
RATINGS_EVERY_S = 5.0
INSIGHT_RATED_MIN = 5
"""Ratings of a deployment before an insight speaks of it."""
LOW, APART = 0.6, 0.15
"""A mean score below LOW is worth a word, and so are two of one model that are so far APART."""

log = logging.getLogger(__name__)


class FeedbackType(StrEnum):
    """What somebody has to say of an answer."""

    CORRECTION = "correction"
    RATING = "rating"
    USEFUL = "useful"
    IMPROVEMENT = "improvement"
    ERROR = "error"


_WORDS = {
    **dict.fromkeys(("up", "yes", "true", "good", "useful"), SCORE_MAX),
    **dict.fromkeys(("down", "no", "false", "bad", "useless"), 0),
}
_STARS = "a rating is 1 to 5, true or false, or 'up' or 'down'"


def score_of(kind: FeedbackType, content: Any) -> int | None:
    """How good the answer was, 0 to SCORE_MAX; None where that is not said.

    `useful` in words of somebody's own is praise; a number there is a rating like any other.

    Raises:
        InvalidRequest: a rating that is none.
    """
    if kind in (FeedbackType.CORRECTION, FeedbackType.ERROR):
        return 0
    if kind is FeedbackType.IMPROVEMENT:
        return None
    if isinstance(content, bool):
        return SCORE_MAX if content else 0
    if isinstance(content, str) and (word := content.strip().lower()) in _WORDS:
        return _WORDS[word]
    if kind is FeedbackType.USEFUL and not isinstance(content, int | float):
        return SCORE_MAX
    try:
        stars = float(content)
    except (TypeError, ValueError):
        stars = math.nan
    if not 1 <= stars <= 5:
        raise InvalidRequest.about("rating", _STARS, code="invalid_value")
    return round((stars - 1) / 4 * SCORE_MAX)


class FeedbackLoop:
    """`gateway.feedback_loop`: takes feedback, counts it, and lets routing and cache have it.

    Owns the newest ratings that the ledger told this process, RATINGS_EVERY_S old at most while
    routing goes by them. `told` is handed each new mapping of them. `forget` is handed the cache
    key of an answer that was corrected, and takes it out of the cache.

    Failure behaviour: feedback that the ledger does not take is an error, and its caller sends it
    again; with the ledger away, routing goes by the ratings of before. An answer that cannot be
    taken out of the cache is a warning in the log; the feedback stands.
    """

    def __init__(
        self,
        desk: LedgerDesk,
        *,
        told: Callable[[Mapping[str, Rating]], None] = lambda ratings: None,
        forget: Callable[[bytes], Awaitable[object]] | None = None,
        wall: Callable[[], float] = time.time,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        new_id: Callable[[], str] = lambda: uuid.uuid4().hex,
    ) -> None:
        self._desk = desk
        self._told = told
        self.forget = forget
        self._wall = wall
        self._pause = pause
        self._new_id = new_id
        self._task: asyncio.Task[None] | None = None
        self._started = False
        self.enabled = True
        self._follows = False
        self.listener: Listener | None = None
        self.ratings: Mapping[str, Rating] = {}
        self._counts = {"recorded": 0, "known": 0, "forgotten": 0, "failures": 0}

    def configure(self, *, enabled: bool, follows: bool) -> None:
        """`follows`: routing goes by ratings, so they are fetched from time to time."""
        self.enabled, self._follows = enabled, follows
        self._run()

    async def start(self) -> None:
        self._started = True
        self._run()

    async def close(self) -> None:
        self._started = False
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def record(
        self,
        feedback_type: str,
        content: Any = None,
        *,
        tenant: str,
        response_id: str | None = None,
        rating: Any = None,
        query: Any = None,
        response: Any = None,
        feedback_id: str | None = None,
    ) -> dict[str, Any] | None:
        """Keeps what a tenant thinks of an answer of its own.

        `rating` is 1 to 5, a bool, or "up" or "down"; without it, the content of a rating is.
        `response` may be a `GenerateResponse`, whose id then says which answer it is. With a
        `feedback_id` (1 to ID_CHARS_MAX characters, the tenant's own choice) sending it again
        changes nothing. Without a response id it counts for the tenant, and for no deployment.

        Returns:
            `id`, `response_id`, `type`, `score` (0 to 1, or None), `model`, `deployment`, and
            `duplicate`: it was there before. None where the feedback loop is off.

        Raises:
            InvalidRequest: 400, something is wrong with it; 404 `response_not_found`: this tenant
                had no such answer; 429 `feedback_full`.
            Overloaded: the ledger does not take it now.
        """
        if not self.enabled:
            return None
        try:
            kind = FeedbackType(feedback_type)
        except ValueError:
            names = ", ".join(FeedbackType)
            raise InvalidRequest.about("type", f"type must be one of {names}") from None
        named = response_id
        if isinstance(response, GenerateResponse):
            named, response = response.id if named is None else named, response.text
        _check_text("response_id", named or None, RESPONSE_ID_CHARS_MAX)
        _check_text("id", feedback_id, ID_CHARS_MAX)
        own = self._new_id() if feedback_id is None else feedback_id
        if rating is None:
            score = score_of(kind, content)
        else:  # stars, also for what was useful
            rated = FeedbackType.RATING if kind is FeedbackType.USEFUL else kind
            score = score_of(rated, rating)
        made = Feedback(
            f"{tenant}/{own}",
            tenant,
            named or "",
            kind.value,
            score,
            _content(rating if content is None else content),
            _kept("query", query),
            _kept("response", response),
            int(self._wall() * 1000),
        )
        recorded = await self._recorded(made)
        self._counts["recorded" if recorded.new else "known"] += 1
        if recorded.new:
            await self._follow_up(made, recorded)
        return {
            "id": own,
            "response_id": named or None,
            "type": kind.value,
            "score": None if score is None else score / SCORE_MAX,
            "model": recorded.model or None,
            "deployment": recorded.deployment or None,
            "duplicate": not recorded.new,
        }

    async def statistics(self, tenant: str | None = None) -> dict[str, Any]:
        """How much there is, of which type, and what answers are worth, of a tenant or of all.

        Returns:
            `total`, `rated`, `mean_score` (0 to 1, None where nothing is rated), `by_type`,
            `by_model` and `by_deployment` with the same, and `insights`, sentences. For all
            tenants also `ratings`: what routing may go by, older ones counting less.

        Raises:
            Overloaded: the ledger cannot be asked now.
        """
        try:
            rows = await self._desk.feedback_sums(tenant)
            ratings = await self._desk.ratings() if tenant is None else {}
        except OwnerUnavailable as error:
            raise Overloaded(f"feedback cannot be read now: {error}", retry_after_s=1.0) from None
        told: dict[str, Any] = {"tenant": tenant, **_summed(rows)}
        by_type = {one.value: [row for row in rows if row[2] == one] for one in FeedbackType}
        told["by_type"] = {name: sum(row[3] for row in mine) for name, mine in by_type.items()}
        told["by_model"] = _grouped(rows, 0)
        told["by_deployment"] = _grouped(rows, 1)
        told["insights"] = insights(rows)
        if tenant is None:
            told["ratings"] = _shown(ratings)
        return told

    def stats(self) -> dict[str, Any]:
        """What this process recorded, and the ratings that it routes by."""
        return {"follows": self._follows, **self._counts, "ratings": _shown(self.ratings)}

    async def refresh(self) -> None:
        """Fetches the ratings now. Raises OwnerUnavailable."""
        self.ratings = await self._desk.ratings()
        self._told(self.ratings)

    # ------------------------------------------------------------------------------------------

    async def _recorded(self, made: Feedback) -> Recorded:
        try:
            recorded = await self._desk.feedback(made)
        except OwnerUnavailable as error:
            raise Overloaded(f"the ledger took no feedback: {error}", retry_after_s=1.0) from None
        except ValueError as error:
            raise InvalidRequest.about(
                "response_id", str(error), code="feedback_full", status=429
            ) from None
        if recorded is None:
            raise InvalidRequest.about(
                "response_id",
                f"no answer {made.response_id[:64]!r} was given to this tenant; use the answer's "
                "'id', or the x-request-id that came with it",
                code="response_not_found",
                status=404,
            )
        return recorded

    async def _follow_up(self, made: Feedback, recorded: Recorded) -> None:
        if made.type == "correction" and recorded.cache_key and self.forget is not None:
            try:
                await self.forget(bytes.fromhex(recorded.cache_key))
                self._counts["forgotten"] += 1
            except OwnerUnavailable as error:
                self._counts["failures"] += 1
                log.warning("a corrected answer is still in the cache: %s", error)
        if self._follows and made.score is not None:
            await self._try_refresh()
        if self.listener is not None:
            score = None if made.score is None else made.score / SCORE_MAX
            label = "none" if score is None else "pass" if score >= 0.5 else "fail"
            self.listener(
                Evaluation(
                    f"feedback.{made.type}",
                    label,
                    score,
                    "",
                    made.tenant,
                    recorded.model,
                    made.response_id,
                    "",
                )
            )

    def _run(self) -> None:
        wanted = self._started and self.enabled and self._follows
        if wanted and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._refresh_for_ever())
        elif not wanted and self._task is not None:
            self._task.cancel()
            self._task = None

    async def _refresh_for_ever(self) -> None:
        while True:
            await self._try_refresh()
            await self._pause(RATINGS_EVERY_S)

    async def _try_refresh(self) -> None:
        try:
            await self.refresh()
        except OwnerUnavailable as error:
            self._counts["failures"] += 1
            log.info("ratings stay as they were: %s", error)


def insights(rows: list[tuple[str, str, str, int, int, int]]) -> list[str]:
    """What stands out, in words: low scores, deployments of a model that differ, much correcting.

    `rows` are (model, deployment, type, how many, how many with a score, sum of scores).
    """
    found: list[str] = []
    means: dict[tuple[str, str], tuple[float, int]] = {}
    for model, deployment in dict.fromkeys((row[0], row[1]) for row in rows):
        told = _summed([row for row in rows if row[:2] == (model, deployment)])
        if deployment and told["rated"] >= INSIGHT_RATED_MIN:
            means[model, deployment] = (told["mean_score"], told["rated"])
    for (model, deployment), (mean, rated) in means.items():
        if mean < LOW:
            found.append(f"{deployment} of {model} is rated {mean:.2f} of 1 over {rated} ratings")
    for model in dict.fromkeys(model for model, _ in means):
        of_model = sorted((mean, name) for (m, name), (mean, _) in means.items() if m == model)
        (low, worst), (high, best) = of_model[0], of_model[-1]
        if high - low >= APART:
            found.append(f"for {model}, {best} ({high:.2f}) is rated above {worst} ({low:.2f})")
    wrong = sum(row[3] for row in rows if row[2] in ("correction", "error"))
    total = sum(row[3] for row in rows)
    if total >= INSIGHT_RATED_MIN and wrong / total > 1 - LOW:
        found.append(f"{wrong} of {total} say that an answer was wrong")
    return found


def _summed(rows: list[tuple[str, str, str, int, int, int]]) -> dict[str, Any]:
    rated, score = sum(row[4] for row in rows), sum(row[5] for row in rows)
    mean = score / rated / SCORE_MAX if rated else None
    return {"total": sum(row[3] for row in rows), "rated": rated, "mean_score": mean}


def _grouped(rows: list[tuple[str, str, str, int, int, int]], column: int) -> dict[str, Any]:
    names = dict.fromkeys(str(row[column]) for row in rows if row[column])
    return {name: _summed([row for row in rows if row[column] == name]) for name in names}


def _shown(ratings: Mapping[str, Rating]) -> dict[str, Any]:
    return {
        name: {
            "good": round(rating.good, 3),
            "bad": round(rating.bad, 3),
            "mean": round(rating.good / max(1e-9, rating.good + rating.bad), 3),
        }
        for name, rating in ratings.items()
    }


def _check_text(name: str, value: Any, chars_max: int) -> None:
    if value is not None and not (isinstance(value, str) and 0 < len(value) <= chars_max):
        raise InvalidRequest.about(
            name, f"{name} must be a string of 1 to {chars_max} characters", code="invalid_value"
        )


def _content(content: Any) -> str:
    try:
        text = content if isinstance(content, str) else json.dumps(content, allow_nan=False)
    except (TypeError, ValueError):
        raise InvalidRequest.about(
            "content", "content must be a string or plain JSON", code="invalid_value"
        ) from None
    if len(text) > CONTENT_CHARS_MAX:
        raise InvalidRequest.about(
            "content", f"content has {CONTENT_CHARS_MAX} characters at most", code="invalid_value"
        )
    return text


def _kept(name: str, text: Any) -> str:
    if text is None:
        return ""
    if not isinstance(text, str):
        raise InvalidRequest.about(name, f"{name} must be a string", code="invalid_type")
    return text[:TEXT_CHARS_KEPT]
