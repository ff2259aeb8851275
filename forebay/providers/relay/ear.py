"""What LiteLLM says to a provider, overheard; and what it is told in the provider's place.

Rule 1: only LiteLLM's own HTTP transport is listened to, and only in the context of a call that
        has an ear.
Rule 2: an ear that holds an answer gives it to the first request; a second one reaches nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import httpx

EAR: ContextVar[Ear | None] = ContextVar("forebay_ear", default=None)


class Ear:
    """One LiteLLM call's requests. With an `answer` it is asked in the provider's place; without,
    `learn` is told of each request before it leaves. `over` is to be called when the call is.

    `heard` counts the requests, and `request` is the last of them: whether it goes over a proxy,
    and with which SSL settings, is beside it.
    """

    __slots__ = ("answer", "heard", "learn", "over", "proxied", "request", "ssl")

    def __init__(
        self,
        answer: httpx.Response | None = None,
        learn: Callable[[Ear], None] | None = None,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        self.answer = answer
        self.learn = learn
        self.over = over
        self.heard = 0
        self.request: httpx.Request | None = None
        self.proxied = False
        self.ssl: Any = None

    def tell(self, request: httpx.Request) -> httpx.Response:
        """The answer, once."""
        answer = self.answer
        if answer is None or self.heard > 1:
            raise httpx.ConnectError("this call has had its answer", request=request)
        return answer


def listen(transport: Any) -> None:
    """Have a class of LiteLLM's transports tell the ear of whoever calls. May be done twice."""
    original = transport.handle_async_request
    if getattr(original, "has_ears", False):
        return

    async def handle_async_request(self: Any, request: httpx.Request) -> httpx.Response:
        ear = EAR.get()
        if ear is not None:
            ear.heard += 1
            if ear.answer is not None:
                return ear.tell(request)
            ear.request = request
            ear.ssl = self._ssl_verify
            ear.proxied = await self._get_proxy_settings(request) is not None
            if ear.learn is not None:
                ear.learn(ear)
        response: httpx.Response = await original(self, request)
        return response

    handle_async_request.has_ears = True  # type: ignore[attr-defined]
    transport.handle_async_request = handle_async_request
