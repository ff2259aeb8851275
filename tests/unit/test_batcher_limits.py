from __future__ import annotations

import pytest

from actors.batcher.limits import BYTES_LEAST, LEARNT_S, Learnt, LearntCaps, learn
from actors.batcher.policy import Caps

SENT = {"items": 500, "tokens": 400_000, "size": 1_000_000}


@pytest.mark.parametrize(
    ("words", "learnt"),
    [
        ("batch size 500 > maximum allowed batch size 32", Learnt(items_max=32)),
        ("Invalid 'input': array too long. Expected an array with maximum length 256", 256),
        ("invalid request: total number of texts must be at most 96, received 500", 96),
        ("The batch size should not be larger than the limit, at most 25 texts.", 25),
        ("at most 100 requests can be in one batch", 100),
        ("'$.input' is invalid: maximum of 128 inputs", 128),
        (
            "Requested 412,000 tokens, max 300,000 tokens per request",
            Learnt(tokens_max=300_000),
        ),
        (
            "The max allowed tokens per submitted batch is 120000. Your batch has 400000 tokens",
            Learnt(tokens_max=120_000),
        ),
        ("Too many tokens in batch: at most 16384 are allowed", Learnt(tokens_max=16_384)),
    ],
)
def test_a_cap_is_learnt_from_the_words_of_a_refusal(words: str, learnt: Learnt | int) -> None:
    expected = Learnt(items_max=learnt) if isinstance(learnt, int) else learnt
    assert learn(400, words, **SENT) == expected


@pytest.mark.parametrize(
    "words",
    [
        "'$.input' is invalid. Please check the API reference",
        "This model's maximum context length is 8192 tokens, however you requested 10000 tokens",
        "each input may have at most 512 tokens per request",
        "maximum allowed batch size 2048",  # that was kept
        "max 500000 tokens per request",
        "Your account 123456 is not allowed to do this",
    ],
)
def test_nothing_is_learnt_from_what_is_no_cap_or_was_kept(words: str) -> None:
    assert not learn(400, words, **SENT)


def test_a_body_that_is_too_large_halves_the_bytes() -> None:
    assert learn(413, "Payload too large", **SENT) == Learnt(bytes_max=500_000)
    assert not learn(413, "too large", items=5, tokens=5, size=BYTES_LEAST)


def test_of_a_single_text_nothing_is_learnt() -> None:
    assert not learn(413, "batch size: maximum 0", items=1, tokens=9, size=10**9)


def test_the_lowest_that_was_named_holds_for_an_hour() -> None:
    caps = LearntCaps()
    given = Caps(items_max=100, tokens_max=1000)
    assert caps.under(given, 0.0) == given
    caps.note(Learnt(items_max=32), 0.0)
    caps.note(Learnt(items_max=64), 10.0)
    caps.note(Learnt(tokens_max=5000), 20.0)
    assert caps.under(given, 30.0) == Caps(items_max=32, tokens_max=1000)
    assert caps.under(Caps(items_max=8), 30.0) == Caps(items_max=8, tokens_max=5000)
    assert caps.under(given, 20.0 + LEARNT_S) == given
    caps.note(Learnt(items_max=64), 20.0 + LEARNT_S)
    assert caps.under(given, 20.0 + LEARNT_S) == Caps(items_max=64, tokens_max=1000)
