"""A stream of OpenAI's events as chunk dicts that still have the bytes they came in.

Rule 1: each event is checked as on the other lane (`wire.Reader`), and ends the stream alike.
Rule 2: what the dict says and what the bytes say is the same; where a dict has to be mended, its
        bytes are written anew.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from forebay.errors import GatewayError, ProviderConnectionError
from forebay.providers.relay.answers import OWN_ENDS, mend_usage
from forebay.providers.relay.connection import Response
from forebay.providers.wire import Reader

_NO_USAGE = re.compile(rb',\s*"usage"\s*:\s*null')


class RawChunk(dict[str, Any]):
    """A chunk, and the JSON that it was read from: read-only, both of them.

    It has `usage` only where the provider tells some; its JSON may have a null there.
    """

    __slots__ = ("json",)

    def __init__(self, fields: Mapping[str, Any], json: bytes) -> None:
        super().__init__(fields)
        self.json = json

    def told(self, *, with_usage: bool) -> bytes:
        """Its JSON for a client that asked for usage, which then stands in every chunk, or not.

        For one that did not, a chunk that tells some is written without it.
        """
        json = self.json
        named = b'"usage"' in json
        if with_usage:
            return json if named else json[:-1] + b',"usage":null}'
        if not named:
            return json
        if "usage" not in self:
            without, found = _NO_USAGE.subn(b"", json)
            if found == 1:
                return without
        return orjson.dumps({name: value for name, value in self.items() if name != "usage"})


class Events:
    """The chunks of a response that is a stream of events; ends when it does.

    Owns the response. Bounded by the reader's longest line, and by one piece off the wire.

    Failure behaviour: gives the chunks before a bad event, then raises the reader's error; what the
    connection says is raised as it is.
    """

    def __init__(
        self,
        response: Response,
        path: str,
        provider: str,
        error: Callable[[BaseException], GatewayError],
        ending: Callable[[str], str],
        says_end: bool,
    ) -> None:
        """`path` is that of the route that was asked; `ending` is OpenAI's word for a reason to
        end; `says_end`: the provider always has one, and an answer without it was broken off."""
        self._response = response
        self._provider = provider
        self._error = error
        self._ending = ending
        self._says_end = says_end
        self._reader = Reader(provider, path, error, taken=self._take)
        self._chunks: deque[RawChunk] = deque()
        self._ended = False
        self._over = False

    def __aiter__(self) -> Events:
        return self

    async def __anext__(self) -> RawChunk:
        reader, chunks = self._reader, self._chunks
        while not chunks:
            if reader.failure is not None:
                raise self._error(reader.failure)
            if self._over:
                if self._says_end and not self._ended:
                    raise self._error(
                        ProviderConnectionError(f"{self._provider} broke off its answer")
                    )
                raise StopAsyncIteration
            piece = await self._response.piece()
            if piece:
                reader.read(piece)
                self._over = reader.done
            else:
                reader.end()
                self._over = True
        return chunks.popleft()

    async def aclose(self) -> None:
        """Let go of the connection: it is closed, unless all has been said."""
        if self._over:
            self._response.leave()
        else:
            self._response.close()

    def _take(self, data: dict[str, Any], json: bytes) -> None:
        mended = _mend(data)
        for choice in data["choices"]:
            reason = choice.get("finish_reason")
            if reason is not None:
                self._ended = True
                if reason not in OWN_ENDS:
                    choice["finish_reason"] = self._ending(reason)
                    mended = True
        self._chunks.append(RawChunk(data, orjson.dumps(data) if mended else json))


def _mend(data: dict[str, Any]) -> bool:
    """Say what providers say in words of their own in OpenAI's, as LiteLLM does; whether it was
    needed. A usage that is null is none."""
    mended = False
    usage = data.get("usage")
    if usage is not None:
        mended = mend_usage(usage)
    elif "usage" in data:
        del data["usage"]
    if data.get("choices") is None:
        data["choices"] = []
        mended = True
    for choice in data["choices"]:
        delta = choice.get("delta")
        if delta is None:
            continue
        if isinstance(delta.get("content"), list):
            _mend_parts(delta)
            mended = True
        reasoning = delta.get("reasoning")
        if isinstance(reasoning, str) and delta.get("reasoning_content") is None:
            delta["reasoning_content"] = reasoning
            mended = True
    return mended


def _mend_parts(delta: dict[str, Any]) -> None:
    """Mistral's parts: texts, and thoughts that are lists of texts."""
    said, thought = [], []
    for part in delta["content"]:
        if not isinstance(part, dict):
            continue
        if isinstance(part.get("thinking"), list):
            thought += [one.get("text") or "" for one in part["thinking"] if isinstance(one, dict)]
        elif isinstance(part.get("text"), str):
            said.append(part["text"])
    delta["content"] = "".join(said) or None
    if thought:
        delta["reasoning_content"] = "".join(thought)
