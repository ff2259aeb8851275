"""Anthropic's words and OpenAI's: what goes over, what comes back, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.lib.streaming._messages import accumulate_event
from anthropic.types import Message, RawMessageStreamEvent
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from forebay import errors, schemas
from forebay.anthropic_wire import Asked, Events, asked, error_body, message
from forebay.errors import GatewayError, InvalidRequest, ResponseValidationError
from forebay.tally import StreamTally

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
PNG = {"type": "base64", "media_type": "image/png", "data": "iVBORw0="}
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}}
TOOL = {"name": "f", "description": "adds", "input_schema": SCHEMA}
KEPT = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}


def body(*turns: Any, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": turn} for turn in turns or ("hi",)]
    return {"model": "m", "max_tokens": 9, "messages": messages, **fields}


def chat(request: dict[str, Any]) -> dict[str, Any]:
    """The chat request, which has to be one in the eyes of the pipeline too."""
    translated = asked(request).body
    schemas.check("chat", translated)
    return translated


def turns(*messages: dict[str, Any], **fields: Any) -> Any:
    return chat({**body(), "messages": list(messages), **fields})["messages"]


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        chat({**body(), **fields})
    assert str(caught.value.param) in caught.value.message
    return caught.value


def said(*blocks: Any) -> Any:
    """What becomes of a user's content blocks."""
    return chat(body(list(blocks)))["messages"][-1]["content"]


# --- requests ---------------------------------------------------------------------------------


def test_the_smallest_request() -> None:
    expected = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]}

    assert chat(body()) == expected


def test_the_request_is_only_read() -> None:
    request = body([{"type": "text", "text": "a", **KEPT}], tools=[TOOL], system="s")
    before = json.dumps(request)
    chat(request)

    assert json.dumps(request) == before


def test_what_is_null_was_not_given() -> None:
    absent = dict.fromkeys(("system", "tools", "top_k", "thinking", "container", "stream"))

    assert chat({**body(), **absent}) == chat(body())


def test_parameters_in_openais_words() -> None:
    translated = chat(
        body(
            temperature=0.5,
            top_p=0.9,
            stream=True,
            stop_sequences=["a", "b"],
            metadata={"user_id": "u-1"},
            service_tier="standard_only",
            output_config={"effort": "high", "format": {"type": "json_schema", "schema": SCHEMA}},
        )
    )

    assert (translated["temperature"], translated["top_p"]) == (0.5, 0.9)
    assert translated["stream"] is True
    assert translated["stop"] == ["a", "b"]
    assert translated["user"] == "u-1"
    assert translated["service_tier"] == "default"
    assert translated["reasoning_effort"] == "high"
    assert translated["response_format"]["json_schema"]["schema"] == SCHEMA


def test_what_says_nothing_becomes_nothing() -> None:
    silent = {
        "stop_sequences": [],
        "tools": [],
        "system": "",
        "metadata": {"user_id": None},
        "service_tier": "auto",
        "thinking": {"type": "disabled"},
        "output_config": {},
    }

    assert chat(body(**silent)) == chat(body())


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        ("be kind", "be kind"),
        ([{"type": "text", "text": "be kind"}], "be kind"),
        (
            [{"type": "text", "text": "be"}, {"type": "text", "text": "kind", **KEPT}],
            [{"type": "text", "text": "be"}, {"type": "text", "text": "kind", **KEPT}],
        ),
    ],
)
def test_a_system_prompt_is_the_first_message(system: Any, expected: Any) -> None:
    translated = chat(body(system=system))["messages"]

    assert translated[0] == {"role": "system", "content": expected}
    assert translated[1]["role"] == "user"


def test_a_system_message_keeps_its_place() -> None:
    told = turns({"role": "user", "content": "a"}, {"role": "system", "content": "b"})

    assert [turn["role"] for turn in told] == ["user", "system"]


def test_one_text_is_a_string_and_several_are_parts() -> None:
    one, two = {"type": "text", "text": "a"}, {"type": "text", "text": "b"}

    assert said(one) == "a"
    assert said(one, two) == [one, two]


def test_images_as_data_and_as_addresses() -> None:
    there = {"type": "url", "url": "https://x.test/cat.png"}
    parts = said({"type": "image", "source": PNG, **KEPT}, {"type": "image", "source": there})

    assert parts[0]["image_url"]["url"] == "data:image/png;base64,iVBORw0="
    assert parts[0]["cache_control"] == KEPT["cache_control"]
    assert parts[1]["image_url"]["url"] == there["url"]


def test_documents_as_pdf_and_as_text() -> None:
    pdf = {"type": "base64", "media_type": "application/pdf", "data": "JVBERi0="}
    text = {"type": "text", "media_type": "text/plain", "data": "words"}
    parts = said(
        {"type": "document", "source": pdf, "title": "a.pdf"},
        {"type": "document", "source": text, "title": "b"},
    )

    assert parts[0]["file"] == {
        "file_data": "data:application/pdf;base64,JVBERi0=",
        "filename": "a.pdf",
    }
    assert parts[1]["text"] == "b\n\nwords"


def test_tools_and_their_results_travel_as_calls_and_tool_messages() -> None:
    calls = [{"type": "tool_use", "id": f"t{n}", "name": "f", "input": {"x": n}} for n in (1, 2)]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "3"},
        {
            "type": "tool_result",
            "tool_use_id": "t2",
            "content": [{"type": "text", "text": "no"}],
            "is_error": True,
        },
    ]
    told = turns(
        {"role": "assistant", "content": [{"type": "text", "text": "wait"}, *calls]},
        {"role": "user", "content": [*results, {"type": "text", "text": "and?"}]},
        tools=[TOOL],
    )

    assert told[0]["content"] == "wait"
    assert told[0]["tool_calls"][1] == {
        "id": "t2",
        "type": "function",
        "function": {"name": "f", "arguments": '{"x":2}'},
    }
    assert told[1:] == [
        {"role": "tool", "tool_call_id": "t1", "content": "3"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "user", "content": "and?"},
    ]


def test_a_call_without_words_has_no_content() -> None:
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    told = turns({"role": "assistant", "content": [call]})

    assert told[0]["content"] is None


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, ""),
        ([], ""),
        (
            [{"type": "image", "source": PNG}],
            [{"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0="}}],
        ),
    ],
)
def test_a_result_may_be_empty_or_an_image(content: Any, expected: Any) -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": content}

    assert turns({"role": "user", "content": [result]})[0]["content"] == expected


def test_a_failure_without_words_still_says_that_it_is_one() -> None:
    image = {"type": "image", "source": PNG}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [image], "is_error": True}
    parts = turns({"role": "user", "content": [result]})[0]["content"]

    assert [part["type"] for part in parts] == ["text", "image_url"]


def test_marks_for_prompt_caching_stay_on_their_parts() -> None:
    result = {"type": "tool_result", "tool_use_id": "t", "content": "3", **KEPT}
    told = turns(
        {"role": "user", "content": [result]},
        {"role": "assistant", "content": [{"type": "text", "text": "a", **KEPT}]},
    )

    assert told[0]["content"] == [{"type": "text", "text": "3", **KEPT}]
    assert told[1]["content"] == [{"type": "text", "text": "a", **KEPT}]
    assert chat(body(tools=[{**TOOL, **KEPT}]))["tools"][0]["cache_control"]


def test_a_tool_is_a_function() -> None:
    translated = chat(body(tools=[{**TOOL, "type": "custom", "strict": True}]))

    assert translated["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "adds",
                "parameters": SCHEMA,
                "strict": True,
            },
        }
    ]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"type": "auto"}, {"tool_choice": "auto"}),
        ({"type": "none"}, {"tool_choice": "none"}),
        (
            {"type": "any", "disable_parallel_tool_use": True},
            {"tool_choice": "required", "parallel_tool_calls": False},
        ),
        (
            {"type": "tool", "name": "f"},
            {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        ),
    ],
)
def test_the_choice_among_tools(choice: Any, expected: dict[str, Any]) -> None:
    plain, chosen = chat(body(tools=[TOOL])), chat(body(tools=[TOOL], tool_choice=choice))

    assert chosen == {**plain, **expected}


def test_thoughts_of_earlier_turns_go_back_only_to_a_model_that_thinks() -> None:
    thought = {"type": "thinking", "thinking": "hm", "signature": "s"}
    hidden = {"type": "redacted_thinking", "data": "d"}
    turn = {"role": "assistant", "content": [thought, hidden, {"type": "text", "text": "a"}]}
    request = {**body(), "messages": [turn]}
    thinking = asked({**request, "thinking": {"type": "adaptive"}})

    assert "thinking_blocks" not in asked(request).body["messages"][0]
    assert thinking.body["messages"][0]["thinking_blocks"] == [thought, hidden]
    assert thinking.thinking


@pytest.mark.parametrize("name", ["top_k", "thinking", "context_management", "mcp_servers"])
def test_what_a_deployment_may_allow_is_refused_by_name_where_it_does_not(name: str) -> None:
    value: Any = {"type": "enabled", "budget_tokens": 2048} if name == "thinking" else 5
    error = refused(**{name: value})
    schemas.check("chat", asked(body(**{name: value})).body, {name})

    assert (error.param, error.code) == (name, "unknown_parameter")


@pytest.mark.parametrize("name", ["n", "stop", "tools_of_mine", "response_format", "api_base"])
def test_openais_own_parameters_are_not_anthropics(name: str) -> None:
    error = refused(**{name: 1})

    assert (error.param, error.code) == (name, "unknown_parameter")


@pytest.mark.parametrize("name", ["model", "max_tokens", "messages"])
def test_what_is_required_is_named(name: str) -> None:
    error = refused(**{name: None})

    assert (error.param, error.code) == (name, "missing_required_parameter")


def blocks(*items: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(items)}]}


def spoken(*items: Any) -> dict[str, Any]:
    return {"messages": [{"role": "assistant", "content": list(items)}]}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages[0].name"),
    (blocks("x"), "messages[0].content[0]"),
    (blocks({"text": "x"}), "messages[0].content[0].type"),
    (blocks({"type": "video"}), "messages[0].content[0].type"),
    (blocks({"type": "text"}), "messages[0].content[0].text"),
    (blocks({"type": "text", "text": 5}), "messages[0].content[0].text"),
    (blocks({"type": "text", "text": "x", "bold": True}), "messages[0].content[0].bold"),
    (
        blocks({"type": "text", "text": "x", "cache_control": {"type": "for ever"}}),
        "messages[0].content[0].cache_control.type",
    ),
    (
        blocks({"type": "text", "text": "x", "cache_control": {"type": "ephemeral", "ttl": 5}}),
        "messages[0].content[0].cache_control.ttl",
    ),
    (blocks({"type": "image"}), "messages[0].content[0].source"),
    (
        blocks({"type": "image", "source": {"type": "file", "file_id": "f"}}),
        "messages[0].content[0].source.type",
    ),
    (
        blocks({"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}),
        "messages[0].content[0].source.url",
    ),
    (
        blocks({"type": "image", "source": {**PNG, "media_type": "image/tiff"}}),
        "messages[0].content[0].source.media_type",
    ),
    (
        blocks({"type": "document", "source": {"type": "url", "url": "https://x.test"}}),
        "messages[0].content[0].source.type",
    ),
    (blocks({"type": "tool_result"}), "messages[0].content[0].tool_use_id"),
    (
        blocks({"type": "tool_result", "tool_use_id": "t", "is_error": "yes"}),
        "messages[0].content[0].is_error",
    ),
    (
        blocks({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "search"}]}),
        "messages[0].content[0].content[0].type",
    ),
    (spoken({"type": "image", "source": PNG}), "messages[0].content[0].type"),
    (
        spoken({"type": "tool_use", "id": "t", "name": "f", "input": "{}"}),
        "messages[0].content[0].input",
    ),
    (spoken({"type": "tool_use", "name": "f", "input": {}}), "messages[0].content[0].id"),
    (spoken({"type": "thinking", "thinking": "x"}), "messages[0].content[0].signature"),
    ({"system": 5}, "system"),
    ({"system": [{"type": "image", "source": PNG}]}, "system[0].type"),
    ({"stop_sequences": "a"}, "stop_sequences"),
    ({"stop_sequences": ["a"] * 65}, "stop_sequences"),
    ({"stop_sequences": [5]}, "stop_sequences[0]"),
    ({"metadata": {"user_id": 5}}, "metadata.user_id"),
    ({"metadata": {"user_id": "x" * 1025}}, "metadata.user_id"),
    ({"metadata": {"team": "x"}}, "metadata.team"),
    ({"service_tier": "fast"}, "service_tier"),
    ({"tools": [5]}, "tools[0]"),
    ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
    ({"tools": [{**TOOL, "name": ""}]}, "tools[0].name"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
    ({"tools": [{**TOOL, "defer_loading": True}]}, "tools[0].defer_loading"),
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
    ({"output_config": {"effort": "huge"}}, "output_config.effort"),
    ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ({"thinking": True}, "thinking"),
    ({"temperature": 5}, "temperature"),
    ({"max_tokens": "9"}, "max_tokens"),
    ({"stream": "yes"}, "stream"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[param for _, param in WRONG])
def test_what_is_wrong_is_named_as_the_caller_wrote_it(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)

    assert error.param == param
    assert error.status == 400


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(("type", "text", "source", "content", "input", "id", "name", "role")),
            inner | st.sampled_from(("text", "image", "tool_use", "tool_result", "user")),
            max_size=4,
        )
    ),
    max_leaves=8,
)


FIELDS = (
    *("messages", "system", "tools", "tool_choice", "metadata", "thinking"),
    *("output_config", "service_tier", "stop_sequences", "max_tokens"),
)


@given(st.dictionaries(st.sampled_from(FIELDS), anything))
def test_whatever_is_sent_is_a_request_or_a_named_refusal(fields: dict[str, Any]) -> None:
    refusal: InvalidRequest | None = None
    try:
        schemas.check("chat", asked({**body(), **fields}).body, ("thinking",))
    except InvalidRequest as error:
        refusal = error

    assert refusal is None or refusal.param


# --- answers ----------------------------------------------------------------------------------


def answer(finish: str = "stop", **said: Any) -> dict[str, Any]:
    told = {"role": "assistant", "content": "Hello!", **said}
    return {
        "id": "chatcmpl-1",
        "model": "m-2026",
        "choices": [{"index": 0, "message": told, "finish_reason": finish}],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def call(arguments: str = '{"x":1}', call_id: str | None = "t1") -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": "f", "arguments": arguments}}


def told(given: dict[str, Any], request: Asked | None = None) -> dict[str, Any]:
    """The Message, which the official client has to understand."""
    made = message(given, request or Asked({}), "req_1")
    Message.model_validate(made)
    return made


def test_an_answer() -> None:
    assert told(answer()) == {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "m-2026",
        "content": [{"type": "text", "text": "Hello!"}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {"input_tokens": 3, "output_tokens": 2},
    }


def test_an_answer_without_an_id_is_named_after_its_request() -> None:
    assert told({**answer(), "id": None})["id"] == "msg_req_1"


@pytest.mark.parametrize(
    ("finish", "reason"),
    [
        ("stop", "end_turn"),
        ("length", "max_tokens"),
        ("tool_calls", "tool_use"),
        ("content_filter", "refusal"),
        ("eos", "end_turn"),
    ],
)
def test_why_it_stopped(finish: str, reason: str) -> None:
    assert told(answer(finish))["stop_reason"] == reason


def test_a_stop_sequence_is_told_where_the_provider_tells_it() -> None:
    given = answer()
    given["choices"][0]["stop_reason"] = "END"
    made = told(given, Asked({}, stop=("END",)))

    assert (made["stop_reason"], made["stop_sequence"]) == ("stop_sequence", "END")
    assert told(given)["stop_reason"] == "end_turn"


def test_tool_calls_are_tool_uses_in_their_order() -> None:
    made = told(answer("stop", content=None, tool_calls=[call(), call("", "t2")]))

    assert made["content"] == [
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "t2", "name": "f", "input": {}},
    ]
    assert made["stop_reason"] == "tool_use"


def test_a_call_without_an_id_gets_one() -> None:
    made = told(answer(content=None, tool_calls=[call(call_id=None)]))

    assert made["content"][0]["id"] == "toolu_1_0"


@pytest.mark.parametrize("arguments", ["{", "[]", "5", "null"])
def test_arguments_that_are_no_object_are_the_providers_failure(arguments: str) -> None:
    with pytest.raises(ResponseValidationError, match="'f'"):
        told(answer("tool_calls", tool_calls=[call(arguments)]))


def test_arguments_that_were_cut_short_are_empty_and_the_reason_says_so() -> None:
    made = told(answer("length", content=None, tool_calls=[call('{"x":')]))

    assert made["content"][0]["input"] == {}
    assert made["stop_reason"] == "max_tokens"


def test_a_refusal_is_told_in_its_words() -> None:
    made = told(answer(content=None, refusal="No."))

    assert made["content"] == [{"type": "text", "text": "No."}]
    assert made["stop_reason"] == "refusal"


def test_thoughts_are_told_to_whom_asked_for_them() -> None:
    thoughts = [
        {"type": "thinking", "thinking": "hm", "signature": "s"},
        {"type": "redacted_thinking", "data": "d"},
    ]
    made = told(answer(thinking_blocks=thoughts), Asked({}, thinking=True))

    assert made["content"][:2] == thoughts
    assert len(told(answer(thinking_blocks=thoughts))["content"]) == 1
    reasoned = told(answer(reasoning_content="hm"), Asked({}, thinking=True))
    assert reasoned["content"][0] == {"type": "thinking", "thinking": "hm", "signature": ""}


@pytest.mark.parametrize(
    "cached",
    [
        {"cache_read_input_tokens": 60, "cache_creation_input_tokens": 30},
        {"prompt_tokens_details": {"cached_tokens": 60, "cache_creation_tokens": 30}},
    ],
)
def test_cached_tokens_are_counted_beside_the_input(cached: dict[str, Any]) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, **cached}
    usage["completion_tokens_details"] = {"reasoning_tokens": 3}

    assert told({**answer(), "usage": usage})["usage"] == {
        "input_tokens": 10,
        "output_tokens": 5,
        "cache_creation_input_tokens": 30,
        "cache_read_input_tokens": 60,
        "output_tokens_details": {"thinking_tokens": 3},
    }


# --- streams ----------------------------------------------------------------------------------


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "chatcmpl-1", "model": "m-2026", "choices": [choice]}


def piece(index: int | None, call_id: str | None = None, **function: Any) -> dict[str, Any]:
    return chunk(tool_calls=[{"index": index, "id": call_id, "function": function}])


USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}


def events(*chunks: dict[str, Any], request: Asked | None = None) -> list[dict[str, Any]]:
    stream = Events(request or Asked({}), "req_1")
    made = [event for given in chunks for event in stream.add(given)]
    return [*made, *stream.end()]


def folded(made: list[dict[str, Any]]) -> dict[str, Any]:
    """The Message that the official client makes of the events."""
    snapshot: Any = None
    buffers: dict[int, bytes] = {}
    for event in made:
        if event["type"] != "ping":
            parsed = EVENT.validate_python(event)
            snapshot = accumulate_event(event=parsed, current_snapshot=snapshot, json_bufs=buffers)
    whole: dict[str, Any] = snapshot.to_dict()
    return {name: value for name, value in whole.items() if name != "stop_details"}


def test_the_events_of_a_text() -> None:
    made = events(chunk(role="assistant"), chunk(content="Hel"), chunk(content="lo"), USAGE)

    assert made == [
        {
            "type": "message_start",
            "message": {
                "id": "msg_1",
                "type": "message",
                "role": "assistant",
                "model": "m-2026",
                "content": [],
                "stop_reason": None,
                "stop_sequence": None,
                "usage": {"input_tokens": 0, "output_tokens": 0},
            },
        },
        {
            "type": "content_block_start",
            "index": 0,
            "content_block": {"type": "text", "text": ""},
        },
        {"type": "ping"},
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "Hel"},
        },
        {
            "type": "content_block_delta",
            "index": 0,
            "delta": {"type": "text_delta", "text": "lo"},
        },
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": {"input_tokens": 3, "output_tokens": 2},
        },
        {"type": "message_stop"},
    ]


def test_a_text_and_two_calls_are_three_blocks_one_after_the_other() -> None:
    made = events(
        chunk(content="Wait."),
        piece(0, "t1", name="f", arguments=""),
        piece(0, arguments='{"x":'),
        piece(0, arguments="1}"),
        piece(1, "t2", name="g", arguments="{}"),
        chunk("tool_calls"),
        USAGE,
    )
    order = [(event["type"], event.get("index")) for event in made if "index" in event]

    assert order == sorted(order, key=lambda item: item[1] or 0)
    assert folded(made)["content"] == [
        {"type": "text", "text": "Wait."},
        {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}},
        {"type": "tool_use", "id": "t2", "name": "g", "input": {}},
    ]
    assert folded(made)["stop_reason"] == "tool_use"


@pytest.mark.parametrize("indexes", [(0, 0), (None, None)])
def test_calls_are_told_apart_by_their_ids_too(indexes: tuple[int | None, int | None]) -> None:
    made = events(
        piece(indexes[0], "t1", name="f", arguments='{"x":1}'),
        piece(indexes[1], "t2", name="f", arguments='{"x":2}'),
    )

    assert [block["input"] for block in folded(made)["content"]] == [{"x": 1}, {"x": 2}]


def test_an_id_that_comes_again_with_each_piece_is_the_same_call() -> None:
    made = events(
        piece(0, "t1", name="f", arguments='{"x"'), piece(0, "t1", name="f", arguments=":1}")
    )

    assert folded(made)["content"][0]["input"] == {"x": 1}


@pytest.mark.parametrize(
    "late",
    [
        piece(0, arguments="1}"),
        piece(0, "t1", arguments="1}"),
        piece(0, "t1", name="f", arguments="1}"),
        piece(2, arguments="{}"),
    ],
)
def test_pieces_of_calls_that_cannot_be_told_apart_are_an_error(late: dict[str, Any]) -> None:
    with pytest.raises(ResponseValidationError, match="tool call"):
        events(
            piece(0, "t1", name="f", arguments='{"x":'),
            piece(1, "t2", name="f", arguments='{"x":'),
            late,
        )


def test_thinking_comes_before_the_text_and_is_signed() -> None:
    thinking = Asked({}, thinking=True)
    made = events(
        chunk(reasoning_content="h", thinking_blocks=[{"type": "thinking", "thinking": "h"}]),
        chunk(thinking_blocks=[{"type": "thinking", "thinking": "", "signature": "s"}]),
        chunk(thinking_blocks=[{"type": "redacted_thinking", "data": "d"}]),
        chunk(content="a"),
        request=thinking,
    )

    assert folded(made)["content"] == [
        {"type": "thinking", "thinking": "h", "signature": "s"},
        {"type": "redacted_thinking", "data": "d"},
        {"type": "text", "text": "a"},
    ]
    assert [event["type"] for event in events(chunk(reasoning_content="h"))] == [
        "message_start",
        "message_delta",
        "message_stop",
    ]


def test_a_stream_that_says_nothing_is_a_message_all_the_same() -> None:
    whole = folded(events())

    assert (whole["id"], whole["content"], whole["stop_reason"]) == ("msg_req_1", [], "end_turn")


def test_tokens_that_nobody_counted_are_estimated_and_say_so() -> None:
    usage = events(chunk(content="12345678"), chunk("stop"))[-2]["usage"]

    assert usage == {"input_tokens": 0, "output_tokens": 2, "estimated": True}


words = st.text(min_size=1, max_size=12)
inputs = st.dictionaries(words, st.integers() | words, max_size=3)


@st.composite
def streamed(draw: st.DrawFn) -> list[dict[str, Any]]:
    """An answer of words and calls, cut into chunks anywhere."""
    chunks = [chunk(role="assistant", content="")]

    def cut(text: str) -> list[str]:
        places = sorted(draw(st.sets(st.integers(0, len(text)), max_size=4)))
        return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]

    if draw(st.booleans()):
        chunks += [chunk(content=part) for part in cut(draw(words))]
    for index, given_input in enumerate(draw(st.lists(inputs, max_size=3))):
        chunks.append(piece(index, f"t{index}", name="f", arguments=""))
        chunks += [piece(index, arguments=part) for part in cut(json.dumps(given_input))]
    finish = draw(st.sampled_from(("stop", "length", "content_filter")))
    return [*chunks, chunk(finish), USAGE]


@given(streamed())
def test_a_stream_folds_into_the_message_it_would_have_been(chunks: list[dict[str, Any]]) -> None:
    tally = StreamTally("chat")
    for given_chunk in chunks:
        tally.add(given_chunk)
    whole = tally.answer({}, complete=True).body

    assert folded(events(*chunks)) == told(whole)


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (errors.InvalidRequest("x"), "invalid_request_error"),
        (errors.InvalidRequest("x", status=409), "invalid_request_error"),
        (errors.AuthenticationError("x"), "authentication_error"),
        (errors.PermissionDenied("x"), "permission_error"),
        (errors.ModelNotFound("x"), "not_found_error"),
        (errors.RequestTooLarge("x"), "request_too_large"),
        (errors.RateLimitError("x"), "rate_limit_error"),
        (errors.BudgetExceeded("x"), "rate_limit_error"),
        (errors.ProviderError("x"), "api_error"),
        (errors.GatewayError("x"), "api_error"),
        (errors.Overloaded("x"), "overloaded_error"),
        (errors.CircuitBreakerOpenError("x"), "overloaded_error"),
        (errors.GatewayTimeout("x"), "timeout_error"),
    ],
)
def test_errors_in_anthropics_shape(error: GatewayError, kind: str) -> None:
    assert error_body(error, "req_1") == {
        "type": "error",
        "error": {"type": kind, "message": "x"},
        "request_id": "req_1",
    }
