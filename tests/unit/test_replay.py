"""A whole answer told as a stream amounts to itself, from wherever the telling goes on."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay import replay
from forebay.codec import Answer
from forebay.tally import StreamTally

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
ASKED: dict[str, Any] = {"messages": []}


def answer(*choices: dict[str, Any], **head: Any) -> Answer:
    body = {"id": "c", "created": 1, "model": "m", "object": "chat.completion", **head}
    return Answer(body | {"choices": list(choices), "usage": USAGE}, USAGE, None, "m")


def said(text: str | None, index: int = 0, **message: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": text, **message}
    return {"index": index, "finish_reason": "stop", "message": told}


def folded(chunks: list[dict[str, Any]], route: str = "chat") -> Answer:
    tally = StreamTally(route)
    for chunk in chunks:
        tally.add(chunk)
    return tally.answer(ASKED, complete=True)


CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x": [1, 2]}'}}
ANSWERS = [
    answer(said("Hello there,\n\n  world ")),
    answer(said("eins"), said("zwei drei", 1)),
    answer(said("so", reasoning_content="let me think", annotations=[{"url": "u"}])),
    answer(said(None, tool_calls=[CALL, {**CALL, "id": "b"}])),
    answer(said(None, function_call={"name": "f", "arguments": '{"a": 1}'})),
    answer({**said("x"), "logprobs": {"content": [{"token": "x", "logprob": -1.0}]}}),
]


@pytest.mark.parametrize("whole", ANSWERS)
def test_the_chunks_amount_to_the_answer(whole: Answer) -> None:
    assert folded(list(replay.chunks("chat", whole))) == whole


@pytest.mark.parametrize("whole", ANSWERS)
def test_it_can_go_on_from_anywhere(whole: Answer) -> None:
    chunks = list(replay.chunks("chat", whole))
    for count in range(1, len(chunks) + 1):
        first = [orjson.dumps(chunk) for chunk in chunks[:count]]
        rest = list(replay.chunks("chat", whole, replay.told("chat", first, ASKED)))
        assert folded(chunks[:count] + rest) == whole, count
        assert len(rest) <= len(chunks) - count


def test_what_is_beside_the_text_goes_on_where_it_stopped() -> None:
    def piece(word: str, **beside: Any) -> dict[str, Any]:
        logprobs = {"content": [{"token": word, "logprob": -1.0}]}
        delta = {"role": "assistant", "content": word, **beside}
        return {"choices": [{"index": 0, "delta": delta, "logprobs": logprobs}]}

    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    chunks = [piece("a"), piece(" b"), piece(" c", annotations=[{"url": "u"}]), end]
    whole = folded([*chunks, {"choices": [], "usage": USAGE}])
    for count in range(1, len(chunks) + 1):
        told = replay.told("chat", [orjson.dumps(chunk) for chunk in chunks[:count]], ASKED)
        assert folded(chunks[:count] + list(replay.chunks("chat", whole, told))) == whole, count


def test_a_text_completion_too() -> None:
    choice = {"index": 0, "finish_reason": "length", "text": "one two three"}
    whole = answer(choice, object="text_completion")
    chunks = list(replay.chunks("completion", whole))

    assert folded(chunks, "completion") == whole
    assert [c["choices"][0]["text"] for c in chunks[:4]] == ["one", " two", " three", ""]
    assert {c["object"] for c in chunks} == {"text_completion"}


def test_chunks_look_like_a_providers() -> None:
    chunks = list(replay.chunks("chat", answer(said("one two"), system_fingerprint="fp")))

    assert [c["object"] for c in chunks] == ["chat.completion.chunk"] * 5
    assert {(c["id"], c["model"], c["system_fingerprint"]) for c in chunks} == {("c", "m", "fp")}
    assert [c["choices"][0] for c in chunks[:4]] == [
        {"index": 0, "finish_reason": None, "delta": {"role": "assistant", "content": ""}},
        {"index": 0, "finish_reason": None, "delta": {"content": "one"}},
        {"index": 0, "finish_reason": None, "delta": {"content": " two"}},
        {"index": 0, "finish_reason": "stop", "delta": {}},
    ]
    assert (chunks[4]["choices"], chunks[4]["usage"]) == ([], USAGE)


@given(st.text(max_size=200))
def test_no_text_loses_a_character(text: str) -> None:
    whole = answer(said(text))
    assert folded(list(replay.chunks("chat", whole))).body["choices"][0]["message"]["content"] == (
        text
    )
