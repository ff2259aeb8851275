"""A prompt's beginnings: what is the same, what is not, and where a provider's marks go."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from forebay import prefixes
from forebay.prefixes import (
    ANCHOR_BYTES,
    EDGES_MAX,
    READ_BYTES_MAX,
    STEP_FIRST_BYTES,
    TOOLS,
    Place,
    Prompt,
)

LONG = "All work and no play makes Jack a dull boy. " * 200


def read(*messages: dict[str, Any], tenant: str = "acme", **body: Any) -> Prompt:
    found = prefixes.read(
        "chat", {"messages": list(messages), **body}, tenant, least_bytes=0, steps=True
    )
    assert found is not None
    return found


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def tool(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


def shared_edges(one: Prompt, other: Prompt) -> int:
    return len({edge.digest for edge in one.edges} & {edge.digest for edge in other.edges})


class TestWhatIsTheSame:
    def test_a_conversation_that_goes_on_shares_all_its_ends(self) -> None:
        first = [said("system", "Be brief."), said("user", "Hi")]
        one = read(*first)
        other = read(*first, said("assistant", "Hello"), said("user", "And now?"))

        assert one.edges == other.edges[:2]
        assert [edge.place for edge in other.edges] == [Place(n) for n in range(4)]

    def test_another_tenant_shares_nothing(self) -> None:
        one, other = read(said("user", LONG)), read(said("user", LONG), tenant="other")
        assert shared_edges(one, other) == 0
        assert not {digest for digest, _ in one.steps} & {digest for digest, _ in other.steps}
        assert one.anchor != other.anchor

    def test_what_a_model_reads_first_splits_all_that_follows(self) -> None:
        messages = [said("system", "Be brief."), said("user", "Hi")]
        plain = read(*messages)
        for other in (
            read(*messages, tools=[tool("f")]),
            read(said("system", "Be long."), messages[1]),
            read(said("developer", "Be brief."), messages[1]),
            read({**messages[0], "name": "x"}, messages[1]),
        ):
            assert shared_edges(plain, other) == 0

    def test_sampling_and_marks_split_nothing(self) -> None:
        mark = {"cache_control": {"type": "ephemeral"}}
        part = {"type": "text", "text": LONG}
        plain = read(said("user", [part]), tools=[tool("f")])
        marked = read(said("user", [{**part, **mark}]), tools=[{**tool("f"), **mark}], seed=1)

        assert plain.edges == marked.edges
        assert (plain.hinted, marked.hinted) == (False, True)
        assert read(said("user", "Hi"), prompt_cache_key="mine").hinted

    def test_steps_are_shared_up_to_where_two_texts_part(self) -> None:
        one, other = read(said("user", LONG + "one")), read(said("user", LONG + "other, longer"))
        both = [a for a, b in zip(one.steps, other.steps, strict=False) if a == b]
        assert both == list(one.steps)
        assert both[-1][1] > len(LONG) / prefixes.STEP_GROWTH

        early = read(said("user", "x" + LONG))
        assert not set(one.steps) & set(early.steps)

    @given(st.lists(st.text(min_size=1, max_size=2_000), min_size=1, max_size=5), st.data())
    def test_steps_do_not_depend_on_what_follows(self, texts: list[str], data: Any) -> None:
        messages = [said("user", text) for text in texts]
        fewer = data.draw(st.integers(1, len(messages)))
        one, other = read(*messages), read(*messages[:fewer])
        assert one.steps[: len(other.steps)] == other.steps
        assert [size for _, size in one.steps] == sorted({size for _, size in one.steps})

    def test_the_anchor_is_what_a_conversations_prompts_share(self) -> None:
        system, question = said("system", "s" * ANCHOR_BYTES), said("user", "Why?")
        answer = [said("assistant", "So."), said("user", "Really?")]
        for first in ([system, question], [said("system", "brief"), question], [question]):
            assert read(*first).anchor == read(*first, *answer).anchor
        assert read(system, question).anchor == read(system, said("user", "What?")).anchor
        assert read(question).anchor != read(said("user", "What?")).anchor

        document, another = "d" * 2 * ANCHOR_BYTES, "e" * 2 * ANCHOR_BYTES
        told = read(system, said("user", document + "one"))
        assert told.anchor == read(system, said("user", document + "other")).anchor
        assert told.anchor != read(system, said("user", another + "one")).anchor


class TestWhatIsRead:
    def test_short_prompts_and_texts_for_vectors_are_not(self) -> None:
        body = {"messages": [said("user", "x" * 99)]}
        assert prefixes.read("chat", body, "acme", least_bytes=4096, steps=False) is None
        body = {"messages": [said("user", "x" * 5000)]}
        assert prefixes.read("chat", body, "acme", least_bytes=4096, steps=False) is not None
        assert prefixes.read("embedding", {"input": LONG}, "a", least_bytes=0, steps=True) is None

    def test_a_text_completion_has_steps_and_no_places(self) -> None:
        found = prefixes.read("completion", {"prompt": LONG}, "a", least_bytes=512, steps=True)
        assert found is not None
        assert found.steps[0][1] == STEP_FIRST_BYTES
        assert [edge.place for edge in found.edges] == [None]
        assert prefixes.read("completion", {"prompt": [[1]]}, "a", least_bytes=0, steps=True)

    def test_no_more_than_the_beginning_of_a_huge_prompt(self) -> None:
        huge = read(said("system", LONG), said("user", "x" * READ_BYTES_MAX), said("user", "?"))
        assert [edge.place for edge in huge.edges] == [Place(0)]
        assert huge.steps[-1][1] <= READ_BYTES_MAX

    def test_no_more_than_the_last_ends_of_a_long_conversation(self) -> None:
        turns = [said("user", str(number)) for number in range(500)]
        found = read(said("system", "Be brief."), *turns, tools=[tool("f")])
        assert len(found.edges) <= EDGES_MAX + 1
        assert [edge.place for edge in found.edges[:2]] == [TOOLS, Place(0)]
        assert found.instructions == found.edges[1]
        assert found.edges[-1].place == Place(500)

    def test_whatever_json_can_say_is_read(self) -> None:
        odd = {"type": "text", "text": "\ud800"}
        number = {"type": "file", "file": {"n": 2**70}}
        assert len(read(said("user", [odd, number]), said("assistant", None)).edges) == 3


class TestMarks:
    def test_no_mark_stands_where_a_provider_takes_none(self) -> None:
        found = read(
            said("user", [{"type": "image_url", "image_url": {"url": "u"}}]),
            said("assistant", "calls", tool_calls=[{"id": "1"}]),
            said("tool", "answer", tool_call_id="1"),
            said("user", "  "),
            said("function", "f", name="f"),
            said("user", "Hi"),
        )
        places = [edge.place for edge in found.edges]
        assert places == [None, None, Place(2), None, None, Place(5)]

    def test_instructions_further_down_leave_no_place_certain(self) -> None:
        found = read(said("user", "Hi"), said("system", "Be brief."), said("user", "Well?"))
        assert {edge.place for edge in found.edges} == {None}

    def test_they_are_put_on_a_copy(self) -> None:
        body = {
            "tools": [tool("f"), tool("g")],
            "messages": [
                said("system", "Be brief."),
                said("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
                said("tool", "c", tool_call_id="1"),
            ],
        }
        before = copy.deepcopy(body)
        marked = prefixes.marked(body, [TOOLS, Place(0), Place(1, 0), Place(2)])

        mark = {"type": "ephemeral"}
        assert body == before
        assert [t.get("cache_control") for t in marked["tools"]] == [None, mark]
        system, user, answer = marked["messages"]
        assert system["content"] == [{"type": "text", "text": "Be brief.", "cache_control": mark}]
        assert [part.get("cache_control") for part in user["content"]] == [mark, None]
        assert (answer["content"], answer["cache_control"]) == ("c", mark)
