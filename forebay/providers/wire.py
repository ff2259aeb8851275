"""The events of a stream as they come over the wire, checked before LiteLLM reads them.

LiteLLM and the clients below it leave out what they cannot read, and go on: half an event, one
without choices, bytes that are no UTF-8. The answer would lack a piece and nobody would know.

Rule 1: every `data:` line is a whole JSON object, or `[DONE]`, after which nothing is read. Where
        a stream has bare lines, each of them is.
Rule 2: an error inside a stream is an error, whatever the provider calls it.
Rule 3: where the address says that OpenAI's format is spoken, a chunk's types are OpenAI's.
Rule 4: what came before the bad event is passed on; the bad event and what follows is not. Only
        whole lines are, so that nobody below has to put a long one together again and again.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Self

import httpx
import orjson

from forebay.errors import GatewayError, ProviderConnectionError
from forebay.providers.failures import ErrorEvent
from forebay.providers.relay.ear import EAR, Ear

LINE_BYTES_MAX = 8 << 20
"""The longest event; a picture in a chunk has some MiB."""
SHOWN_BYTES_MAX = 80
EVENTS = "text/event-stream"
LINES = frozenset({"application/stream+json", "application/x-ndjson"})
"""Streams of JSON objects, one a line."""

_FIELDS = frozenset({b"data", b"event", b"id", b"retry", b""})
_TEXT = (str, type(None))
_LISTS = frozenset({"mistral", "azure_ai"})
"""Providers whose models say some contents in lists of parts."""


class Unreadable(Exception):
    """What a provider sent makes no sense; the text says what."""


def watch(
    response: httpx.Response, error: Callable[[BaseException], GatewayError], provider: str
) -> None:
    """Check the events of `response` from now on, if it is a stream of events or of lines.

    What is compressed is left to LiteLLM's own eyes. `error` makes an error of ours of an
    `ErrorEvent` or an `Unreadable`.
    """
    headers = response.headers
    kind = headers.get("content-type", "").partition(";")[0].strip()
    plain = headers.get("content-encoding", "identity") == "identity"
    if (kind == EVENTS or kind in LINES) and plain and not response.is_stream_consumed:
        stream = response.stream
        assert isinstance(stream, httpx.AsyncByteStream)
        reader = Reader(provider, response.request.url.path, error, bare=kind in LINES)
        response.stream = Wire(stream, reader)


class WatchedTexts:
    """As much of an openai client as LiteLLM asks of one for texts; watches what it opens.

    LiteLLM opens a stream of texts only when its first chunk is asked for, and keeps it to itself.
    """

    def __init__(
        self,
        client: Any,
        error: Callable[[BaseException], GatewayError],
        provider: str,
        ear: Ear | None = None,
    ) -> None:
        self._client = client
        self._error = error
        self._provider = provider
        self._ear = ear

    @property
    def completions(self) -> Self:
        return self

    @property
    def with_raw_response(self) -> Self:
        return self

    async def create(self, **asked: Any) -> Any:
        heard = EAR.set(self._ear)
        try:
            raw = await self._client.completions.with_raw_response.create(**asked)
        finally:
            EAR.reset(heard)
        watch(raw.http_response, self._error, self._provider)
        return raw


class Wire(httpx.AsyncByteStream):
    """A body that is read over `reader`'s shoulder.

    Owns nothing: closing it closes the body. Bounded as the reader is.

    Failure behaviour: gives the lines before a bad event, then raises the reader's error.
    """

    def __init__(self, body: httpx.AsyncByteStream, reader: Reader) -> None:
        self._body = body
        self._reader = reader
        self._pieces: AsyncIterator[bytes] | None = None

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._pieces = aiter(self._body)
        return self

    async def __anext__(self) -> bytes:
        reader, pieces = self._reader, self._pieces
        assert pieces is not None
        while reader.failure is None:
            try:
                lines = reader.read(await anext(pieces))
            except StopAsyncIteration:
                lines = reader.end()
                if not lines and reader.failure is None:
                    raise
            if lines:
                return lines
        raise reader.failure

    async def aclose(self) -> None:
        await self._body.aclose()


class Reader:
    """Reads events and says what is wrong with them, in `failure`. `bare`: each line is one.

    Owns the beginning of a line whose end has not come. Bounded by `line_bytes_max`. `taken` is
    given each good event, parsed and as it came; `done` says that none follows.
    """

    def __init__(
        self,
        provider: str,
        path: str,
        error: Callable[[BaseException], GatewayError],
        *,
        bare: bool = False,
        line_bytes_max: int = LINE_BYTES_MAX,
        taken: Callable[[dict[str, Any], bytes], None] | None = None,
    ) -> None:
        self.done = False
        self.failure: GatewayError | None = None
        self._provider = provider
        self._error = error
        self._line_bytes_max = line_bytes_max
        self._bare = bare
        self._is_openai = path.endswith("/completions")
        self._ends = _ending_of(path)
        self._lists = provider in _LISTS
        self._begun: list[bytes] = []
        self._begun_bytes = 0
        self._event = b""
        self._unreadable = False
        self._ended = False
        self._taken = taken

    def read(self, piece: bytes) -> bytes:
        """The lines that this piece completes, up to the first bad one, which `failure` tells."""
        if self.done:
            return piece
        if b"\n" not in piece and b"\r" not in piece:
            self._begun.append(piece)
            self._begun_bytes += len(piece)
            if self._begun_bytes > self._line_bytes_max:
                self._fail(f"an event of more than {self._line_bytes_max} bytes")
            return b""
        whole = b"".join([*self._begun, piece]) if self._begun else piece
        self._begun.clear()
        self._begun_bytes = 0
        good = 0
        for line in whole.splitlines(keepends=True):
            if line[-1:] not in (b"\n", b"\r"):
                self._begun.append(line)
                self._begun_bytes = len(line)
                break
            if not self._goes_on(line):
                return whole if self.failure is None else whole[:good]
            good += len(line)
        return whole if good == len(whole) else whole[:good]

    def end(self) -> bytes:
        """The body is over: its last line, if that has no end. `failure` tells if it was cut."""
        last = b"".join(self._begun)
        self._begun.clear()
        if last and not self.done:
            self._read_line(last)
        if self._unreadable or not (self._ended or self.done or self.failure is not None):
            self.failure = ProviderConnectionError(
                f"{self._provider} broke off its answer", provider=self._provider
            )
        return last if self.failure is None else b""

    def _goes_on(self, line: bytes) -> bool:
        self._read_line(line)
        return self.failure is None and not self.done

    def _read_line(self, line: bytes) -> None:
        line = line.rstrip(b"\r\n").removeprefix(b"\xef\xbb\xbf")
        if not line:
            self._event = b""
            return
        if self._bare:
            self._read_data(line.strip())
            return
        name, _, value = line.partition(b":")
        value = value.strip()
        if name == b"data":
            if value:
                self._read_data(value)
        elif name == b"event":
            self._event = value
        elif name not in _FIELDS:
            self._fail(f"no event: {_shown(line)}")

    def _read_data(self, value: bytes) -> None:
        if value.startswith(b"[DONE]"):
            self.done = True
            return
        if len(value) > self._line_bytes_max:
            self._fail(f"an event of more than {self._line_bytes_max} bytes")
            return
        try:
            data = orjson.loads(value)
        except orjson.JSONDecodeError:
            self._fail(f"no JSON: {_shown(value)}")
            return
        if not isinstance(data, dict):
            self._fail(f"no JSON object: {_shown(value)}")
        elif self._is_error(data):
            self.failure = self._error(ErrorEvent(data))
        elif self._is_openai and (wrong := _wrong(data, self._lists)):
            self._fail(f"{wrong} of the wrong type: {_shown(value)}")
        else:
            self._ended = self._ended or self._ends(data)
            if self._taken is not None:
                self._taken(data, value)

    def _is_error(self, data: Mapping[str, Any]) -> bool:
        named = data.get("object") == "error" or data.get("type") == "error"
        return bool(data.get("error")) or named or self._event == b"error"

    def _fail(self, said: str) -> None:
        self._unreadable = True
        self.failure = self._error(Unreadable(said))


def _wrong(chunk: Mapping[str, Any], lists: bool) -> str | None:
    """The field of a chunk that is not of OpenAI's type; None if all are."""
    usage, choices = chunk.get("usage"), chunk.get("choices")
    if usage is not None and not isinstance(usage, dict):
        return "usage"
    if choices is None and usage is not None:
        return None
    if not isinstance(choices, list):
        return "choices"
    for choice in choices:
        if not isinstance(choice, dict):
            return "choices"
        if not isinstance(choice.get("index", 0), int):
            return "index"
        if not isinstance(choice.get("finish_reason"), _TEXT):
            return "finish_reason"
        if not isinstance(choice.get("text"), _TEXT):
            return "text"
        delta = choice.get("delta")
        if delta is not None and (wrong := _wrong_delta(delta, lists)):
            return wrong
    return None


def _wrong_delta(delta: Any, lists: bool) -> str | None:
    if not isinstance(delta, dict):
        return "delta"
    content = delta.get("content")
    if not isinstance(content, _TEXT) and not (lists and isinstance(content, list)):
        return "content"
    calls = delta.get("tool_calls")
    if calls is None:
        return None
    if not isinstance(calls, list):
        return "tool_calls"
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else call
        if function is None:
            continue
        if not isinstance(function, dict) or not isinstance(call.get("index", 0), int):
            return "tool_calls"
        if not all(isinstance(function.get(name), _TEXT) for name in ("name", "arguments")):
            return "tool_calls"
    return None


def _ending_of(path: str) -> Callable[[Mapping[str, Any]], bool]:
    """Whether an event of this address's format says that the answer is whole."""
    if path.endswith("/completions"):
        return _has_finish_reason
    if path.endswith(":streamGenerateContent"):
        return lambda data: (
            any(one.get("finishReason") for one in data.get("candidates") or ())
            or bool(data.get("promptFeedback", {}).get("blockReason"))
        )
    if path.endswith("/messages"):
        return lambda data: data.get("type") == "message_stop"
    if path.endswith("/v2/chat"):
        return lambda data: data.get("type") == "message-end"
    return lambda data: True


def _has_finish_reason(chunk: Mapping[str, Any]) -> bool:
    for choice in chunk.get("choices") or ():  # noqa: SIM110 - a generator for each chunk costs more
        if choice.get("finish_reason"):
            return True
    return False


def _shown(value: bytes) -> str:
    return value[:SHOWN_BYTES_MAX].decode(errors="replace")
