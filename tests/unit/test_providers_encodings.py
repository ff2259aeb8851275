"""Who is asked for base64, when, and what is taken for float32. No network, no LiteLLM."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.providers import encodings
from forebay.providers.encodings import BASE64, FLOAT, PROBED, Encodings
from forebay.providers.vectors import looks_like_float32
from forebay.routing import Deployment

QUANTISED = (
    "bedrock/amazon.titan-embed-text-v2:0",
    "bedrock/cohere.embed-english-v3",
    "cohere/embed-english-v3.0",
    "perplexity/pplx-embed",
    "sagemaker/some-endpoint",
    "azure_ai/Cohere-embed-v3-english",
    "oci/cohere.embed-english-v3.0",
    "gemini/gemini-embedding-001",
    "vertex_ai/text-embedding-005",
)
"""Models whose providers mean something else by base64, or refuse it."""


def deployment(model: str = "openai/m", **params: Any) -> Deployment:
    provider = model.partition("/")[0]
    return Deployment(id=model, group="g", model=model, provider=provider, params=params, info={})


ELSEWHERE = deployment(api_base="http://localhost:8000/v1")


@pytest.mark.parametrize("model", QUANTISED)
def test_who_means_something_else_by_base64_is_never_asked_for_it(model: str) -> None:
    assert Encodings().begin(deployment(model)) == (None, False)


@pytest.mark.parametrize(
    "given",
    [
        deployment(),
        deployment(api_base="https://api.openai.com/v1"),
        deployment(api_base="https://eu.api.openai.com/v1"),
        deployment("azure/m", api_base="https://x.openai.azure.com"),
        deployment("hosted_vllm/m", api_base="http://localhost:8000/v1"),
    ],
)
def test_who_is_known_to_mean_float32_is_asked_by_every_call(given: Deployment) -> None:
    known = Encodings()
    assert known.begin(given) == (BASE64, True)
    assert known.begin(given) == (BASE64, True), "though nothing has come yet"
    known.learn(given, float32=True)
    assert known.begin(given) == (BASE64, False), "and it need not be doubted any more"


@pytest.mark.parametrize(
    "given",
    [
        ELSEWHERE,
        deployment(base_url="https://openai.com.evil.example"),
        *map(deployment, sorted(f"{provider}/m" for provider in PROBED)),
    ],
)
def test_others_are_asked_by_one_call_and_by_all_when_it_has_shown_what_comes(
    given: Deployment,
) -> None:
    known = Encodings()
    assert known.begin(given) == (BASE64, True)
    assert [known.begin(given) for _ in range(3)] == [(FLOAT, False)] * 3
    known.learn(given, float32=True)
    known.end(given)
    assert known.begin(given) == (BASE64, False)


def test_one_call_in_vain_is_enough() -> None:
    known = Encodings()
    known.begin(ELSEWHERE)
    known.learn(ELSEWHERE, float32=False)
    known.end(ELSEWHERE)
    assert known.begin(ELSEWHERE) == (FLOAT, False)


def test_a_first_call_that_teaches_nothing_leaves_it_to_the_next() -> None:
    known = Encodings()
    known.begin(ELSEWHERE)
    known.end(ELSEWHERE)
    assert known.begin(ELSEWHERE) == (BASE64, True)


@pytest.mark.parametrize(("own", "asked"), [(FLOAT, (FLOAT, False)), (BASE64, (BASE64, True))])
def test_a_deployments_own_word_counts(own: str, asked: tuple[str, bool]) -> None:
    assert Encodings().begin(deployment("acme/m", encoding_format=own)) == asked


def test_what_is_known_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encodings, "KNOWN_MAX", 2)
    known = Encodings()
    for name in ("a", "b", "c"):
        known.learn(deployment(f"openai/{name}"), float32=False)
    assert known.begin(deployment("openai/a")) == (BASE64, True)
    assert known.begin(deployment("openai/c")) == (FLOAT, False)


# --- what is float32 ----------------------------------------------------------------------------

SEEDS = st.integers(0, 2**32 - 1)
DIMENSIONS = st.sampled_from([64, 256, 1024, 1536])


def normal(seed: int, dimensions: int) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((2, dimensions))
    even: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return even


@given(SEEDS, DIMENSIONS, st.floats(1e-3, 1e3), st.floats(0.0, 0.9))
def test_vectors_of_models_are_float32(
    seed: int, dimensions: int, scale: float, zeros: float
) -> None:
    rows = (normal(seed, dimensions) * scale).astype(np.float32)
    rows[np.random.default_rng(seed).random(rows.shape) < zeros] = 0.0
    assert looks_like_float32(rows)


@pytest.mark.parametrize("kind", ["<f2", "<f8", "i1", "u1", "bits", ">f4"])
@given(SEEDS, DIMENSIONS)
def test_bytes_of_another_kind_are_not(kind: str, seed: int, dimensions: int) -> None:
    rows = normal(seed, dimensions)
    if kind == "bits":
        raw = np.packbits(rows > 0)
    elif kind in ("i1", "u1"):
        spread = rows / np.abs(rows).max() * 127
        raw = (spread + (128 if kind == "u1" else 0)).round().astype(kind)
    else:
        raw = rows.astype(kind)
    with np.errstate(invalid="ignore"):
        read = np.frombuffer(raw.tobytes(), "<f4")
        assert not (np.isfinite(read).all() and looks_like_float32(read))


@pytest.mark.parametrize("row", [[0, 1, 1, 0], [-7, 12, 127, -128], [0, 0, 0, 0]])
def test_whole_numbers_are_not(row: list[int]) -> None:
    assert not looks_like_float32(np.array([row], dtype=np.float32))
