"""A stream folded into the answer it amounts to."""

from __future__ import annotations

from typing import Any

from forebay.schemas import StreamTally

ASKED = {"messages": [{"role": "user", "content": "12345678"}]}


def chunk(delta: dict[str, Any], finish_reason: str | None = None, **fields: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "created": 1, "model": "m-2026", "choices": [choice], **fields}


def folded(*chunks: dict[str, Any], complete: bool = True, route: str = "chat") -> Any:
    tally = StreamTally(route)
    for item in chunks:
        tally.add(item)
    return tally.answer(ASKED, complete)


def test_pieces_of_text_become_one_message() -> None:
    usage = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    answer = folded(
        chunk({"role": "assistant", "content": ""}),
        chunk({"content": "Hel"}),
        chunk({"content": "lo"}),
        chunk({}, "stop"),
        {"choices": [], "usage": usage},
    )

    assert answer.body["choices"] == [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "Hello"}}
    ]
    assert answer.body["object"] == "chat.completion"
    assert (answer.model, answer.usage, answer.estimated) == ("m-2026", usage, False)
    assert answer.cost_nano is None


def test_tool_calls_are_joined_by_index() -> None:
    def call(index: int, **fields: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": index, **fields}]})

    answer = folded(
        call(0, id="a", type="function", function={"name": "f", "arguments": ""}),
        call(1, id="b", type="function", function={"name": "g", "arguments": "{}"}),
        call(0, function={"arguments": '{"x":'}),
        call(0, function={"arguments": "1}"}),
        chunk({}, "tool_calls"),
    )

    assert answer.body["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": "{}"}},
    ]


def test_tool_calls_that_all_have_index_0_are_told_apart_by_id() -> None:
    def call(**fields: Any) -> dict[str, Any]:
        return chunk({"tool_calls": [{"index": 0, **fields}]})

    answer = folded(
        call(id="a", type="function", function={"name": "f", "arguments": '{"x":'}),
        call(function={"arguments": "1}"}),
        call(id="b", type="function", function={"name": "g", "arguments": '{"y"'}),
        call(id="b", function={"arguments": ":2"}),
        call(id="", function={"arguments": "}"}),
        call(id="a", function={"arguments": " "}),
        chunk({}, "tool_calls"),
    )

    assert answer.body["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"x":1} '}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": '{"y":2}'}},
    ]


def test_an_id_may_come_after_the_first_piece() -> None:
    answer = folded(
        chunk({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": ""}}]}),
        chunk({"tool_calls": [{"index": 0, "id": "a", "function": {"arguments": "{}"}}]}),
    )

    assert answer.body["choices"][0]["message"]["tool_calls"] == [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}}
    ]


def test_log_probabilities_are_joined() -> None:
    def piece(text: str) -> dict[str, Any]:
        told = {"content": [{"token": text, "logprob": -0.5}], "refusal": None}
        return {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": told}]}

    answer = folded(piece("a"), piece("b"))

    assert [one["token"] for one in answer.body["choices"][0]["logprobs"]["content"]] == ["a", "b"]


def test_choices_are_told_apart() -> None:
    second = {"index": 1, "text": "b", "finish_reason": "stop"}
    first = {"index": 0, "text": "a", "finish_reason": "stop"}
    answer = folded({"choices": [second]}, {"choices": [first]}, route="completion")

    assert [choice["text"] for choice in answer.body["choices"]] == ["a", "b"]
    assert answer.body["object"] == "text_completion"


def test_tokens_are_estimated_where_no_usage_came() -> None:
    answer = folded(chunk({"content": "12345"}), complete=False)

    assert answer.estimated
    assert answer.usage == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}
    assert answer.body["choices"][0]["finish_reason"] == "cancelled"


def test_chunks_are_only_read() -> None:
    call = {"index": 0, "function": {"arguments": "{"}}
    first = chunk({"tool_calls": [call]})
    folded(first, chunk({"tool_calls": [{"index": 0, "function": {"arguments": "}"}}]}))

    assert first == chunk({"tool_calls": [{"index": 0, "function": {"arguments": "{"}}]})
