"""Vectors off the wire, and prices of what was used: no network, no LiteLLM."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.errors import ResponseValidationError
from forebay.providers.prices import Prices
from forebay.providers.vectors import decoded
from forebay.routing import Deployment

ROWS = np.array([[1.5, -2.0], [0.25, 3.0], [7.0, 0.0]], dtype=np.float32)


def item(index: int | None, row: Any) -> dict[str, Any]:
    return {"object": "embedding", "index": index, "embedding": row}


def as_base64(row: np.ndarray) -> str:
    return base64.b64encode(row.astype("<f4").tobytes()).decode()


@given(st.permutations(range(3)), st.lists(st.booleans(), min_size=3, max_size=3))
def test_vectors_come_in_the_order_of_the_texts_in_either_form(
    order: list[int], as_text: list[bool]
) -> None:
    data = [item(n, as_base64(ROWS[n]) if as_text[n] else ROWS[n].tolist()) for n in order]
    np.testing.assert_array_equal(decoded(data, 3, None), ROWS)


def test_without_indices_the_order_is_as_sent() -> None:
    array = decoded([item(None, row.tolist()) for row in ROWS], 3, 2)
    np.testing.assert_array_equal(array, ROWS)
    assert array.dtype == np.float32
    assert array.flags["C_CONTIGUOUS"]


def test_no_texts_no_vectors() -> None:
    assert decoded([], 0, None).shape == (0, 0)


@pytest.mark.parametrize(
    ("data", "texts", "dimensions"),
    [
        ([item(0, [1.0])], 2, None),
        ([item(0, [1.0]), item(0, [1.0])], 2, None),
        ([item(0, [1.0]), item(2, [1.0])], 2, None),
        ([item(0, [1.0]), item(-1, [1.0])], 2, None),
        ([item(0, [1.0]), item(1, [1.0, 2.0])], 2, None),
        ([item(0, [1.0, 2.0])], 1, 3),
        ([item(0, [])], 1, None),
        ([item(0, [float("inf")])], 1, None),
        ([item(0, None)], 1, None),
        ([item(0, ["x"])], 1, None),
        ([item(0, "not base64!")], 1, None),
        ([item(0, base64.b64encode(b"abc").decode())], 1, None),
        ([item(0, as_base64(np.array([np.nan])))], 1, None),
    ],
)
def test_what_is_not_a_vector_for_each_text_is_refused(
    data: list[dict[str, Any]], texts: int, dimensions: int | None
) -> None:
    with pytest.raises(ResponseValidationError):
        decoded(data, texts, dimensions)


# --- prices -----------------------------------------------------------------------------------


def deployment(provider: str = "acme", info: Any = None, **params: Any) -> Deployment:
    return Deployment(
        id="d", group="g", model=f"{provider}/m", provider=provider, params=params, info=info or {}
    )


USAGE = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
CACHED = USAGE | {"prompt_tokens_details": {"cached_tokens": 60}}


@pytest.mark.parametrize(
    ("given", "usage", "nano"),
    [
        (deployment(input_cost_per_token=1e-6, output_cost_per_token=2e-6), USAGE, 120_000),
        (deployment(info={"input_cost_per_token": 1e-6}), USAGE, 100_000),
        (deployment(input_cost_per_token="1.5e-07"), USAGE, 15_000),
        (deployment(input_cost_per_token=1e-6, cache_read_input_token_cost=1e-7), CACHED, 46_000),
        (deployment(input_cost_per_token=1e-6), CACHED, 100_000),
        (deployment(input_cost_per_token=0, output_cost_per_token=0), USAGE, 0),
        (deployment("local"), USAGE, 0),
        (deployment("local", input_cost_per_token=1e-6), USAGE, 100_000),
        (deployment(input_cost_per_second=0.1), USAGE, None),
        (deployment(input_cost_per_token="cheap"), USAGE, None),
        (deployment(input_cost_per_token=1e-6), None, None),
        (deployment(), USAGE, None),
    ],
)
def test_own_prices_are_added_up_and_unknown_ones_are_none(
    given: Deployment, usage: Any, nano: int | None
) -> None:
    assert Prices().of_usage(given, usage) == nano


def test_a_free_answer_of_a_model_that_nobody_knows_is_not_free() -> None:
    assert Prices().of_answer(deployment(), USAGE, "m", 0.0) is None
    assert Prices().of_answer(deployment(), USAGE, "m", 1.23e-6) == 1230
