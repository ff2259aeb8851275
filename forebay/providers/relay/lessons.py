"""What LiteLLM has shown of forms of requests, and who waits to be shown.

Rule 1: one request of a form at a time is a lesson; those that come meanwhile wait for it, but not
        for long.
Rule 2: a lesson is over when its request leaves, or when its call is, whatever came of it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import partial
from typing import Any

from forebay.providers.relay.ear import Ear
from forebay.providers.relay.forms import Form
from forebay.providers.relay.rules import Rule, asked_of, rule_of

FORMS_MAX = 10_000
"""Forms that are known; above it all of them are forgotten."""
LESSON_S = 1.0
"""How long requests of a form wait to be shown: over LiteLLM's lane the rest of a crowd would cost
fifty times as much."""

Key = tuple[int, str, Form]
"""A deployment's number, a route, and the form of its requests."""
Lesson = asyncio.Future[None]


class Lessons:
    """Owns the rules by form, bounded by `forms_max`, and a future for each lesson under way, of
    which there are no more than calls.

    Failure behaviour: a lesson that shows nothing, for it came to nothing, is somebody else's.
    """

    def __init__(self, forms_max: int = FORMS_MAX) -> None:
        self._forms_max = forms_max
        self._rules: dict[Key, Rule | None] = {}
        self._under_way: dict[tuple[Key, asyncio.AbstractEventLoop], Lesson] = {}

    def __len__(self) -> int:
        """Forms that are known."""
        return len(self._rules)

    @property
    def under_way(self) -> int:
        return len(self._under_way)

    def find(
        self, key: Key, body: Mapping[str, Any], own: Mapping[str, Any], *, may_wait: bool
    ) -> Rule | Ear | Lesson | None:
        """The rule of a form; an ear for LiteLLM's lane to learn it with; None: that lane's.

        A future where another request has that ear, and it may be waited for. `own` are the
        deployment's parameters.
        """
        rule = self._rules.get(key)
        if rule is not None or key in self._rules:
            return rule
        place = key, asyncio.get_running_loop()
        if place in self._under_way:
            return self._under_way[place] if may_wait else None
        asked = asked_of(body)
        if asked is None:
            return None
        self._under_way[place] = place[1].create_future()
        return Ear(learn=partial(self._learn, key, asked, own), over=partial(self._end, place))

    def _learn(
        self, key: Key, asked: Mapping[str, bytes], own: Mapping[str, Any], ear: Ear
    ) -> None:
        if len(self._rules) >= self._forms_max:
            self._rules.clear()
        self._rules[key] = rule_of(key[1], asked, own, ear)
        ear.over()

    def _end(self, place: tuple[Key, asyncio.AbstractEventLoop]) -> None:
        lesson = self._under_way.pop(place, None)
        if lesson is not None and not lesson.done():
            lesson.set_result(None)
