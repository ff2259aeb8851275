"""The events of a stream, checked: every way in which one can be wrong, in any pieces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.errors import GatewayError, ProviderConnectionError, ProviderError, RateLimitError
from forebay.providers.failures import error_of
from forebay.providers.wire import Reader, Wire, watch

OPENAI = "/v1/chat/completions"
ANTHROPIC = "/v1/messages"
GEMINI = "/v1beta/models/m:streamGenerateContent"
KEY = "sk-do-not-show-this-4711"


def said(error: BaseException) -> GatewayError:
    return error_of(error, provider="acme", model="m", secrets=[KEY])


def reader(path: str = OPENAI, provider: str = "acme", **how: Any) -> Reader:
    return Reader(provider, path, said, **how)


def event(data: Any) -> bytes:
    return b"data: " + (data if isinstance(data, bytes) else orjson.dumps(data)) + b"\n\n"


def chunk(delta: Any = None, **choice: Any) -> bytes:
    first = {"index": 0, "delta": {"content": "a"} if delta is None else delta}
    return event({"choices": [{**first, "finish_reason": None, **choice}]})


def call(**function: Any) -> dict[str, Any]:
    return {"tool_calls": [{"index": 0, "id": "call_1", "function": function}]}


GOOD = [
    chunk(),
    chunk({}),
    chunk({"content": None, "refusal": None}),
    chunk(call(name="weather", arguments="")),
    chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]}),
    event({"choices": []}),
    event({"choices": [], "usage": {"prompt_tokens": 1}}),
    event({"choices": None, "usage": {"prompt_tokens": 1}}),
    event({"choices": [{"index": 0, "content_filter_offsets": {}}]}),
    event({"choices": [{"index": 0, "text": "a"}], "error": None}),
    b": a comment\n\n",
    b"event: message\nid: 7\nretry: 10\n",
    b"\r\n\r\n",
]
WHOLE = [*GOOD, chunk({}, finish_reason="stop"), event(b"[DONE]")]

BAD = {
    "half an object": event(b'{"choices": [{"ind'),
    "text": event(b"the boiler burst"),
    "a number": event(b"7"),
    "null": event(b"null"),
    "a list": event([1]),
    "a page": b"<html>502</html>\n\n",
    "JSON without data": b'{"error": "no"}\n\n',
    "no UTF-8": event(b'{"choices": [{"delta": {"content": "\xff\xfe"}}]}'),
    "half a surrogate": event(b'{"choices": [{"delta": {"content": "\\ud800"}}]}'),
    "nothing": event({}),
    "no choices": event({"id": "c"}),
    "choices are null": event({"choices": None}),
    "choices are text": event({"choices": "a"}),
    "choices are an object": event({"choices": {"0": 1}}),
    "a choice is text": event({"choices": ["a"]}),
    "an index is text": event({"choices": [{"index": "0", "delta": {}}]}),
    "a delta is text": chunk("a"),
    "a content is a number": chunk({"content": 7}),
    "a content is a list": chunk({"content": ["a"]}),
    "a text is a number": event({"choices": [{"text": 7}]}),
    "a reason is a number": chunk({}, finish_reason=7),
    "tool calls are text": chunk({"tool_calls": "a"}),
    "a tool call is text": chunk({"tool_calls": ["a"]}),
    "a tool's index is text": chunk({"tool_calls": [{"index": "0", "function": {}}]}),
    "a tool's function is text": chunk({"tool_calls": [{"function": "f"}]}),
    "arguments are an object": chunk(call(name="weather", arguments={})),
    "usage is text": event({"choices": [], "usage": "a"}),
}

BURST = "the boiler burst"
ERRORS: list[tuple[bytes, type[GatewayError]]] = [
    (event({"error": {"message": BURST, "type": "server_error"}}), ProviderError),
    (event({"error": BURST}), ProviderError),
    (b"event: error\n" + event({"message": BURST}), ProviderError),
    (event({"object": "error", "message": BURST, "code": 500}), ProviderError),
    (event({"type": "error", "error": {"type": "api_error", "message": BURST}}), ProviderError),
    (event({"error": {"message": BURST, "code": "rate_limit_exceeded"}}), RateLimitError),
    (event({"error": {"message": BURST, "code": 429}}), RateLimitError),
]


def test_what_is_right_passes_in_one_piece() -> None:
    reads = reader()
    whole = b"".join(WHOLE)
    assert reads.read(whole) == whole
    reads.end()
    assert reads.failure is None


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40))
def test_what_is_right_passes_in_any_pieces(sizes: list[int]) -> None:
    reads, passed = reader(), b""
    rest = b"".join(WHOLE)
    for size in [*sizes, len(rest)]:
        piece, rest = rest[:size], rest[size:]
        passed += reads.read(piece)
    assert passed + reads.end() == b"".join(WHOLE)
    assert reads.failure is None


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
def test_what_is_wrong_ends_the_stream_just_before_it(bad: bytes) -> None:
    before = b"".join(GOOD)
    reads = reader()
    assert reads.read(before + bad + chunk()) == before
    assert type(reads.failure) is ProviderError
    assert "acme" in str(reads.failure)


@given(
    st.sampled_from(sorted(BAD.values())),
    st.lists(st.integers(1, 60), min_size=1, max_size=40),
)
def test_what_is_wrong_is_not_passed_on_in_any_pieces(bad: bytes, sizes: list[int]) -> None:
    before = b"".join(GOOD)
    rest = before + bad + chunk()
    reads, passed = reader(), b""
    for size in [*sizes, len(rest)]:
        piece, rest = rest[:size], rest[size:]
        passed += reads.read(piece)
        if reads.failure is not None:
            break
    assert reads.failure is not None
    assert passed == before


@pytest.mark.parametrize(("bad", "expected"), ERRORS)
def test_an_error_inside_a_stream_is_that_error(bad: bytes, expected: type[GatewayError]) -> None:
    for path in (OPENAI, ANTHROPIC, GEMINI):
        reads = reader(path)
        assert b"data" not in reads.read(bad)
        assert type(reads.failure) is expected
        assert BURST in str(reads.failure)


def test_an_error_without_its_last_line_break_is_that_error() -> None:
    reads = reader()
    reads.read(b'data: {"error": {"message": "the boiler burst", "code": 429}}')
    reads.end()
    assert type(reads.failure) is RateLimitError


@pytest.mark.parametrize("path", [OPENAI, ANTHROPIC, GEMINI, "/v2/chat", "/invoke"])
def test_half_an_object_is_wrong_in_every_format(path: str) -> None:
    reads = reader(path)
    reads.read(BAD["half an object"])
    assert type(reads.failure) is ProviderError


@pytest.mark.parametrize("path", [ANTHROPIC, GEMINI, "/v2/chat"])
def test_other_formats_are_not_measured_by_openais(path: str) -> None:
    reads = reader(path)
    reads.read(event({"type": "ping"}))
    assert reads.failure is None


def test_lines_without_events_are_measured_too() -> None:
    whole, cut = reader("/v2/chat", bare=True), reader("/v2/chat", bare=True)
    body = b'{"type": "content-delta"}\n{"type": "message-end"}\n'
    assert whole.read(body) + whole.end() == body
    assert whole.failure is None
    assert cut.read(body[:40]) + cut.end() == body[:26]
    assert type(cut.failure) is ProviderConnectionError


def test_models_that_speak_in_lists_may() -> None:
    reads = reader(provider="mistral")
    reads.read(chunk({"content": [{"type": "thinking", "thinking": []}]}))
    assert reads.failure is None


@pytest.mark.parametrize(
    ("path", "last"),
    [
        (OPENAI, chunk({}, finish_reason="stop")),
        (OPENAI, event(b"[DONE]")),
        (OPENAI, event(b"[DONE]").strip()),
        (ANTHROPIC, event({"type": "message_stop"})),
        (GEMINI, event({"candidates": [{"finishReason": "STOP"}]})),
        ("/v2/chat", event({"type": "message-end"})),
        (GEMINI, event({"promptFeedback": {"blockReason": "SAFETY"}})),
    ],
)
def test_a_stream_that_ends_without_an_end_was_broken_off(path: str, last: bytes) -> None:
    whole, cut = reader(path), reader(path)
    begun = chunk() if path == OPENAI else event({"candidates": [{}]})
    whole.read(begun + last)
    whole.end()
    assert whole.failure is None
    cut.read(begun)
    cut.end()
    assert type(cut.failure) is ProviderConnectionError


def test_a_stream_that_ends_inside_an_event_or_before_any_was_broken_off() -> None:
    for body in (b"", chunk()[:-9], b": hello\n\n"):
        reads = reader()
        reads.read(body)
        reads.end()
        assert type(reads.failure) is ProviderConnectionError


def test_what_follows_done_is_not_read() -> None:
    reads = reader()
    body = event(b"[DONE]") + b"<html>"
    assert reads.read(body) == body
    assert reads.read(b"x" * 100) == b"x" * 100
    reads.end()
    assert reads.failure is None


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_an_event_has_a_bound(end: bytes) -> None:
    reads = reader(line_bytes_max=1000)
    for piece in [b"data: ", *[b"x" * 90] * (11 if end == b"\n" else 20), b"x" * 20 + end]:
        assert reads.read(piece) == b""
    assert "1000 bytes" in str(reads.failure)


def test_what_is_shown_of_a_wrong_event_shows_no_key() -> None:
    for body in (event(f"{KEY} is bad".encode()), event({"error": f"bad key {KEY}"})):
        reads = reader()
        reads.read(body)
        assert reads.failure is not None
        assert KEY not in str(reads.failure) + repr(reads.failure.__dict__)


# --- over a body ------------------------------------------------------------------------------


class Body(httpx.AsyncByteStream):
    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self.pieces:
            yield piece

    async def aclose(self) -> None:
        self.closed = True


async def test_a_body_gives_what_was_good_and_then_raises() -> None:
    body = Body(chunk() + BAD["text"], chunk())
    got = []
    with pytest.raises(ProviderError):
        async for piece in Wire(body, reader()):
            got.append(piece)
    assert got == [chunk()]


async def test_a_body_that_is_bad_from_the_start_gives_nothing() -> None:
    with pytest.raises(ProviderError):
        await anext(aiter(Wire(Body(BAD["text"]), reader())))


async def test_closing_closes_the_body() -> None:
    body = Body()
    await Wire(body, reader()).aclose()
    assert body.closed


def response(**headers: str) -> httpx.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = httpx.Request("POST", f"http://host{OPENAI}")
    return httpx.Response(200, headers=named, stream=Body(BAD["half an object"]), request=request)


async def test_only_plain_streams_of_events_are_watched() -> None:
    events = "text/event-stream; charset=utf-8"
    watched = response(content_type=events)
    watch(watched, said, "acme")
    with pytest.raises(ProviderError):
        await watched.aread()
    lines = response(content_type="application/x-ndjson")
    watch(lines, said, "acme")
    with pytest.raises(ProviderError):
        await lines.aread()
    for other in (response(content_type="application/json"), response()):
        watch(other, said, "acme")
        assert await other.aread() == BAD["half an object"]
    packed = response(content_type=events, content_encoding="gzip")
    body = packed.stream
    watch(packed, said, "acme")
    assert packed.stream is body
