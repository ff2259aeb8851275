"""Answers and errors survive being bytes."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from forebay import codec, errors
from forebay.call import Facts
from forebay.codec import Answer


def test_an_answer_with_vectors_comes_back_whole() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    answer = Answer({"object": "list"}, {"prompt_tokens": 3}, 17, "m", array)
    back = codec.unpack(codec.pack(answer))

    assert (answer.body, answer.usage, answer.cost_nano) == (back.body, back.usage, back.cost_nano)
    assert back.array is not None
    np.testing.assert_array_equal(array, back.array)


def test_an_answer_of_text_comes_back_whole() -> None:
    answer = Answer({"choices": [{"message": {"content": "naïve ☕"}}]}, None, None, "m")

    assert answer == codec.unpack(codec.pack(answer))


def test_a_body_is_parsed_when_somebody_looks_into_it_and_not_before() -> None:
    answer = Answer({"id": "a", "choices": []}, None, 0, "m")
    back = codec.unpack(codec.pack(answer))

    assert back.json == b'{"id":"a","choices":[]}'
    assert back.body == answer.body
    assert back.json is None, "what somebody may have changed is not sent as it was"


def subclasses(cls: type[errors.GatewayError]) -> list[type[errors.GatewayError]]:
    return [cls, *(deep for sub in cls.__subclasses__() for deep in subclasses(sub))]


@pytest.mark.parametrize("cls", subclasses(errors.GatewayError))
def test_every_error_survives_pickling_and_packing(cls: type[errors.GatewayError]) -> None:
    error = cls(
        "it broke", param="p", code="c", retry_after_s=1.5, model="m", provider="x",
        upstream_status=418,
    )  # fmt: skip
    for back in (pickle.loads(pickle.dumps(error)), codec.unpack_error(codec.pack_error(error))):
        assert type(error) is type(back)
        assert error.__dict__ == back.__dict__
        assert str(error) == str(back)
        assert error.body() == back.body()


def test_a_packed_error_leaves_the_facts_of_its_request_behind() -> None:
    error = errors.ProviderError("down")
    error.facts = Facts("m", attempts=2)

    assert codec.unpack_error(codec.pack_error(error)).facts is None


@pytest.mark.parametrize(("estimated", "fallback"), [(True, False), (False, True), (True, True)])
def test_a_vector_comes_back_whole_at_four_bytes_a_number(estimated: bool, fallback: bool) -> None:
    vector = codec.Vector(np.arange(1536, dtype=np.float32), 17, "modèle", estimated, fallback)
    data = codec.pack_vector(vector)
    back = codec.unpack_vector(data)

    assert len(data) < 4 * 1536 + 32
    assert (back.tokens, back.model) == (17, "modèle")
    assert (back.estimated, back.fallback) == (estimated, fallback)
    np.testing.assert_array_equal(vector.array, back.array)
